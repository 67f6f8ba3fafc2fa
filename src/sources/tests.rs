use std::time::Duration;

use super::{
    caches::{endpoints, has_credentials},
    command_line::{disk_cache, home_of, options_of},
    *,
};
use crate::{
    bep::event::CommandLine,
    digest::DigestFunction,
    remote::RemoteOptions,
    transport::{Endpoint, Google, Header, google::DEFAULT_SCOPE},
};

fn line(options: &[(&str, &str)]) -> CommandLine {
    CommandLine {
        label: "canonical".to_owned(),
        options: options
            .iter()
            .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
            .collect(),
    }
}

fn template() -> RemoteOptions {
    RemoteOptions::new(Endpoint::parse("--remote-cache", "grpc://unused:1").unwrap())
}

#[test]
fn endpoint_and_instance_come_from_the_builds_own_flags() {
    let line = line(&[
        ("remote_cache", "grpc://first:1"),
        ("remote_cache", "grpc://cache:9092"),
        ("remote_executor", "grpc://exec:1"),
        ("remote_instance_name", "main/x"),
        ("remote_header", "x-token=abc"),
    ]);
    let options = options_of(&line, &template(), &BuildDirectories::default()).unwrap();
    assert_eq!(options.connect.endpoint.to_string(), "grpc://cache:9092");
    assert_eq!(options.instance_name, "main/x");
    assert_eq!(options.connect.headers.len(), 1);
    assert!(!format!("{options:?}").contains("abc"));
}

#[test]
fn what_cannot_be_used_is_named() {
    for (options, part) in [
        (vec![], "--remote_cache"),
        (vec![("remote_cache", "")], "--remote_cache"),
        (vec![("remote_cache", "https://user:secret@h:x/c")], "65535"),
        (vec![("remote_cache", "ftp://h/c")], "--remote_cache"),
    ] {
        let error = options_of(&line(&options), &template(), &BuildDirectories::default()).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn an_executor_is_its_own_cache() {
    let options = options_of(
        &line(&[("remote_executor", "grpc://exec:1")]),
        &template(),
        &BuildDirectories::default(),
    )
    .unwrap();
    assert_eq!(options.connect.endpoint.to_string(), "grpc://exec:1");
}

/// The options of a build with a cache at `grpcs://h` and these.
fn with(options: &[(&str, &str)], directories: &BuildDirectories) -> RemoteOptions {
    let all: Vec<_> = std::iter::once(("remote_cache", "grpcs://h"))
        .chain(options.iter().copied())
        .collect();
    options_of(&line(&all), &template(), directories).unwrap()
}

#[test]
fn one_option_that_cannot_be_used_is_left_out_and_never_costs_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("no.pem"), "hello").unwrap();
    let directories = BuildDirectories {
        workspace: dir.path().to_owned(),
        working_directory: dir.path().to_owned(),
    };
    for (name, value, reported) in [
        ("remote_header", "<REDACTED>", "redacted"),
        ("remote_header", "x-key=<REDACTED>", "--remote_header=x-key"),
        ("remote_cache_header", "no header", "NAME=VALUE"),
        ("remote_header", "te=s3cret", "reserved for gRPC"),
        ("remote_header", "x-bin=s3cret", "binary"),
        ("remote_header", "x=s3cret\u{1}\u{e9}", "printable"),
        ("credential_helper", "tools/helper", "absolute"),
        ("credential_helper", "a.*.b=/bin/helper", "scope"),
        ("credential_helper", "example.com=", "does not name a program"),
        ("tls_certificate", "no.pem", "does not contain a PEM section"),
        ("tls_certificate", "/nonexistent/ca.pem", "/nonexistent/ca.pem"),
        ("tls_client_certificate", "no.pem", "requires --tls_client_key"),
        ("tls_client_key", "no.pem", "requires --tls_client_certificate"),
        (
            "google_credentials",
            "none.json",
            "none.json: failed to read the credentials",
        ),
        (
            "google_credentials",
            "no.pem",
            "does not contain Google credentials",
        ),
        ("credential_helper_timeout", "soon", "--credential_helper_timeout"),
        ("digest_function", "crc", "crc"),
    ] {
        let options = with(&[("remote_header", "x-good=1"), (name, value)], &directories);
        assert_eq!(
            options.left_out.len(),
            1,
            "{name}={value}: {:?}",
            options.left_out
        );
        let left_out = &options.left_out[0];
        assert!(
            left_out.contains(reported) && !left_out.contains("s3cret"),
            "{left_out}"
        );
        assert_eq!(options.connect.headers.len(), 1, "the others are sent");
        assert!(options.connect.credential_helpers.is_empty() && options.connect.tls.certificate.is_none());
        assert_eq!(options.connect.google, None);
    }
    // For other hosts, and of forms that only newer Bazels know: nothing to be said.
    for value in ["example.com/team=/bin/helper", "*.example.com=/bin/helper"] {
        assert_eq!(
            with(&[("credential_helper", value)], &directories).left_out,
            Vec::<String>::new()
        );
    }
}

#[test]
fn a_helper_goes_before_googles_credentials_and_a_file_before_the_default_ones() {
    let dir = tempfile::tempdir().unwrap();
    let user = r#"{"type":"authorized_user","client_id":"c","client_secret":"s","refresh_token":"r"}"#;
    std::fs::write(dir.path().join("user.json"), user).unwrap();
    let directories = BuildDirectories {
        workspace: dir.path().to_owned(),
        working_directory: dir.path().join("below"),
    };
    let google = |file: Option<&str>, scopes: &[&str]| {
        Some(Google {
            file: file.map(|file| dir.path().join(file)),
            scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(),
        })
    };
    let (file, default) = (
        ("google_credentials", "user.json"),
        ("google_default_credentials", "1"),
    );
    let of = |options: &[(&str, &str)]| with(options, &directories).connect.google;
    assert_eq!(of(&[file, default]), google(Some("user.json"), &[DEFAULT_SCOPE]));
    assert_eq!(
        of(&[("google_auth_scopes", "a,b"), file]),
        google(Some("user.json"), &["a", "b"])
    );
    assert_eq!(of(&[file, ("google_credentials", "")]), None);
    assert_eq!(of(&[file, ("credential_helper", "/bin/helper")]), None);
    assert_eq!(
        of(&[file, ("credential_helper", "elsewhere=/bin/helper")]),
        google(Some("user.json"), &[DEFAULT_SCOPE])
    );
    let asked = |options: &[(&str, &str)]| google_of(&line(options), dir.path());
    assert_eq!(asked(&[default]), google(None, &[DEFAULT_SCOPE]));
    assert_eq!(asked(&[default, ("nogoogle_default_credentials", "")]), None);
    assert_eq!(asked(&[("google_auth_scopes", "a")]), None);
}

#[test]
fn files_and_helpers_lie_where_bazel_looks_for_them() {
    let dir = tempfile::tempdir().unwrap();
    let (workspace, below) = (dir.path().join("ws"), dir.path().join("ws/below"));
    std::fs::create_dir_all(&below).unwrap();
    let authority = rcgen::generate_simple_self_signed(vec!["h".to_owned()]).unwrap();
    std::fs::write(workspace.join("ca.pem"), authority.cert.pem()).unwrap();
    let directories = BuildDirectories {
        workspace: workspace.clone(),
        working_directory: below.clone(),
    };
    let options = with(
        &[
            ("tls_certificate", "ca.pem"),
            ("credential_helper", "%workspace%/tools/helper"),
            ("credential_helper_timeout", "90s"),
            ("experimental_credential_helper_cache_duration", "2m"),
            ("tls_authority_override", "cache.test"),
            ("remote_proxy", "unix:run/proxy.sock"),
        ],
        &directories,
    );
    assert_eq!(options.left_out, Vec::<String>::new());
    assert_eq!(options.connect.credential_helper_timeout, Duration::from_secs(90));
    assert_eq!(
        options.connect.credential_helper_cache_duration,
        Duration::from_secs(120)
    );
    assert_eq!(
        options.connect.tls_authority_override.as_deref(),
        Some("cache.test")
    );
    assert_eq!(options.connect.proxy, Some(workspace.join("run/proxy.sock")));
    assert_eq!(options.connect.tls.certificate, Some(workspace.join("ca.pem")));
    assert_eq!(options.connect.workspace, Some(workspace));
    let disk = |value| disk_cache(&line(&[("disk_cache", value)]), &directories);
    assert_eq!(disk("cache"), Some(below.join("cache")));
    assert_eq!(disk("/cache"), Some("/cache".into()));
    assert_eq!(disk("/cache/.././../x/./y"), Some("/x/y".into()));
    assert_eq!(disk("nowhere/../cache"), Some(below.join("cache")));
    assert!(disk("~/cache").is_some_and(|path| path.is_absolute() && path.ends_with("cache")));
    assert_eq!(disk(""), None);
}

#[test]
fn a_home_is_where_the_list_of_users_says() {
    let users = b"caf\xe9:x:7:7:\xe9:/home/caf:/bin/sh\nroot:x:0:0:root:/root:/bin/sh\n\nno\nme:x:1000:1000:M, E:/home/me:/bin/sh\n\
                 none:x:1001:1:::\nslash:x:1002:1::/:/bin/sh\nshort:x:1003";
    for (user, home) in [
        (0, Some("/root")),
        (1000, Some("/home/me")),
        (1001, None),
        (1002, None),
        (1003, None),
        (1, None),
    ] {
        assert_eq!(home_of(users, user), home.map(Into::into), "{user}");
    }
}

#[test]
fn an_address_may_have_a_user_and_need_not_have_a_port() {
    for (address, shown, header, authority) in [
        (
            "grpc://me:s3cret@h:9",
            "grpc://h:9",
            Some("Basic bWU6czNjcmV0"),
            Some("me:s3cret@h:9"),
        ),
        (
            "grpcs://k3y@h",
            "grpcs://h:443",
            Some("Basic azN5Og=="),
            Some("k3y@h:443"),
        ),
        // It cannot stand there as Bazel decodes it.
        ("grpc://me:a%20b@h:9", "grpc://h:9", Some("Basic bWU6YSBi"), None),
        ("unix:/tmp/a@b", "unix:/tmp/a@b", None, None),
        (
            "grpcs://me%40x:s%3Acret@h",
            "grpcs://h:443",
            Some("Basic bWVAeDpzOmNyZXQ="),
            Some("me@x:s:cret@h:443"),
        ),
        (
            "https://me%40x:s%3Acret@h/p@q",
            "https://h:443/p@q",
            Some("Basic bWVAeDpzOmNyZXQ="),
            None,
        ),
        ("HTTP://h/p/", "http://h:80/p", None, None),
        ("grpc://h", "grpc://h:80", None, None),
        ("GRPC://h:9/", "grpc://h:9", None, None),
        ("dns:///h:9", "grpcs://h:9", None, None),
        ("h", "grpcs://h:443", None, None),
    ] {
        let line = line(&[("remote_cache", address)]);
        let options = options_of(&line, &template(), &BuildDirectories::default()).expect(address);
        assert_eq!(options.connect.endpoint.to_string(), shown);
        assert_eq!(
            options.connect.headers.first().map(Header::value),
            header,
            "{address}"
        );
        let shown = options.connect.authority.as_ref().map(Header::value);
        assert_eq!(shown, authority, "{address}");
        assert!(!format!("{:?}", options.connect).contains("s3cret"));
    }
    // What is said outright goes first.
    let line = line(&[
        ("remote_cache", "grpc://me:s3cret@h:9"),
        ("remote_header", "Authorization=mine"),
    ]);
    let options = options_of(&line, &template(), &BuildDirectories::default()).unwrap();
    assert_eq!(options.connect.headers.len(), 1);
    assert_eq!(options.connect.headers[0].value(), "mine");
}

#[test]
fn a_build_that_gives_its_cache_less_time_does_not_wait_longer() {
    for (text, seconds) in [
        ("40", 40),
        ("30s", 30),
        ("1", 30),
        // It means nothing, or waits longer than we do.
        ("0", 60),
        ("3600", 60),
        ("soon", 60),
    ] {
        let line = line(&[("remote_cache", "grpc://h:1"), ("remote_timeout", text)]);
        let options = options_of(&line, &template(), &BuildDirectories::default()).unwrap();
        assert_eq!(options.stall_timeout.as_secs(), seconds, "{text}");
    }
    let line = line(&[("remote_cache", "grpc://h:1"), ("remote_timeout", "40")]);
    let own = RemoteOptions {
        stall_timeout: Duration::from_secs(300),
        ..template()
    };
    let options = options_of(&line, &own, &BuildDirectories::default()).unwrap();
    assert_eq!(options.stall_timeout.as_secs(), 300);
}

#[test]
fn an_http_cache_is_opened_as_bazel_opens_it() {
    let of = |options: &[(&str, &str)]| {
        let all = [&[("remote_cache", "http://me:pass@h/p")], options].concat();
        options_of(&line(&all), &template(), &BuildDirectories::default()).unwrap()
    };
    // It has no instances, and each of its connections carries one request.
    let options = of(&[("remote_instance_name", "main"), ("remote_max_connections", "7")]);
    assert_eq!((&*options.instance_name, options.connections()), ("", 7));
    for (text, count) in [("0", 100), ("many", 100), ("1000000", 1000)] {
        assert_eq!(
            of(&[("remote_max_connections", text)]).connections(),
            count,
            "{text}"
        );
    }
    let grpc = line(&[("remote_cache", "grpc://h:1"), ("remote_max_connections", "7")]);
    let grpc = options_of(&grpc, &template(), &BuildDirectories::default()).unwrap();
    assert_eq!(grpc.connections(), 4);
    // The URL's own user goes before a helper, and that before all others.
    let options = of(&[
        ("credential_helper", "/bin/helper"),
        ("google_default_credentials", "1"),
    ]);
    assert!(options.connect.credential_helpers.is_empty() && options.connect.google.is_none());
    assert_eq!(options.connect.headers[0].value(), "Basic bWU6cGFzcw==");
    assert!(!format!("{options:?}").contains("pass"));
}

#[tokio::test]
async fn a_path_is_allowed_with_what_is_below_it() {
    let parse = |url| Endpoint::parse_cache("--allow-remote-cache", url).unwrap();
    let sources = Sources::new(SourceRule::FromBuild {
        template: Box::new(template()),
        before: Vec::new(),
        allowed: Some(vec![parse("http://h/team")]),
    });
    for (url, is_allowed) in [
        ("http://h/team/a", true),
        ("http://me:pass@h:80/team", true),
        ("http://h/teams", false),
        ("https://h/team", false),
        ("http://h/", false),
    ] {
        let line = line(&[("remote_cache", url)]);
        let opened = sources.of_build(Some(&line), &BuildDirectories::default());
        assert_eq!(opened.is_ok(), is_allowed, "{url}");
    }
}

fn sources(header: bool, allowed: Option<&str>) -> Sources {
    let mut template = template();
    if header {
        template.connect.headers = vec![Header::parse("--remote-header", "x-token=abc").unwrap()];
    }
    let parse = |url| Endpoint::parse_cache("--allow-remote-cache", url).unwrap();
    Sources::new(SourceRule::FromBuild {
        template: Box::new(template),
        before: Vec::new(),
        allowed: allowed.map(|urls| urls.split(' ').map(parse).collect()),
    })
}

#[tokio::test]
async fn what_is_recorded_is_no_more_allowed_than_what_a_build_says() {
    let sources = sources(true, Some("grpc://good:1"));
    sources.of_record("grpc://good:1", "main").unwrap();
    let reported = sources
        .of_build(
            Some(&line(&[("remote_cache", "grpc://evil:1")])),
            &BuildDirectories::default(),
        )
        .err();
    let words = reported.as_ref().unwrap().to_string();
    assert!(words.contains("--allow-remote-cache"));
    assert_eq!(sources.of_record("grpc://evil:1", "main").err(), reported);
    assert_eq!(sources.of_import("grpc://evil:1", "main").err(), reported);
    sources.of_import("grpc://good:1", "main").unwrap();
}

#[tokio::test]
async fn an_imported_build_gets_no_credentials_for_where_it_points() {
    let error = sources(true, None)
        .of_import("grpc://evil:1", "")
        .err()
        .unwrap()
        .to_string();
    for part in ["grpc://evil:1", "--remote-cache", "--allow-remote-cache"] {
        assert!(error.contains(part), "{error}");
    }
    // A bucket's are in the environment, for whatever server it is.
    let error = sources(false, None)
        .of_import("s3://b?endpoint=http://evil:1", "")
        .err();
    assert!(error.unwrap().to_string().contains("--allow-remote-cache"));
    sources(false, None)
        .of_import("s3://b?anonymous=yes", "")
        .unwrap();
    // Nor those that a build of here has brought for itself.
    let sources = sources(false, None);
    let own = line(&[("remote_cache", "grpc://h:1"), ("remote_header", "x-token=abc")]);
    assert!(has_credentials(
        sources
            .of_build(Some(&own), &BuildDirectories::default())
            .unwrap()
            .options()
            .as_ref()
            .unwrap()
    ));
    let imported = sources.of_import("grpc://h:1", "").unwrap();
    assert!(!has_credentials(&imported.options().unwrap()));
    assert!(has_credentials(
        sources
            .of_record("grpc://h:1", "")
            .unwrap()
            .options()
            .as_ref()
            .unwrap()
    ));
    let error = sources.of_import("", "").err().unwrap().to_string();
    assert!(error.contains("give --remote-cache"), "{error}");
}

#[tokio::test]
async fn a_disk_cache_stands_before_the_remote_one_or_in_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let digest = crate::digest::Digest::of(DigestFunction::Sha256, b"alpha");
    let place = dir.path().join("cas").join(&digest.hash_hex()[..2]);
    std::fs::create_dir_all(&place).unwrap();
    std::fs::write(place.join(digest.hash_hex()), "alpha").unwrap();
    let disk = dir.path().display().to_string();
    let absent = crate::digest::Digest::of(DigestFunction::Sha256, b"x-ray");
    let nobody = crate::remote::Attribution::default();
    let cases: [(&[(&str, &str)], &str); 2] = [
        (&[("disk_cache", &disk)], "not in the disk cache"),
        (
            &[("disk_cache", &disk), ("remote_cache", "ftp://h/c")],
            "unknown scheme",
        ),
    ];
    for (options, reason) in cases {
        let cache = sources(false, None)
            .of_build(Some(&line(options)), &BuildDirectories::default())
            .unwrap();
        assert_eq!(cache.endpoint, format!("file://{disk}"));
        let asked = [digest.clone(), absent.clone()];
        let mut answers = cache.blobs().read_batch(&asked, &nobody, false).await;
        let error = answers.pop().unwrap().1.unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert_eq!(&answers[0].1.as_ref().unwrap()[..], b"alpha");
    }
    // One that is not there may appear, and none needs to be allowed.
    let options = [("disk_cache", "/nonexistent"), ("remote_cache", "grpc://h:1")];
    for (allowed, named) in [
        (None, "file:///nonexistent grpc://h:1"),
        (Some("grpc://h:1"), "file:///nonexistent grpc://h:1"),
        (Some("grpc://other:1"), "file:///nonexistent"),
    ] {
        let cache = sources(false, allowed)
            .of_build(Some(&line(&options)), &BuildDirectories::default())
            .unwrap();
        assert_eq!(cache.endpoint, named);
    }
}

#[tokio::test]
async fn a_chain_is_found_again_by_what_is_recorded_of_it() {
    let sources = sources(false, None);
    let own = line(&[
        ("disk_cache", "/d e"),
        ("remote_cache", "grpc://h:1"),
        ("remote_header", "x-token=abc"),
    ]);
    let opened = sources
        .of_build(Some(&own), &BuildDirectories::default())
        .unwrap();
    assert_eq!(opened.endpoint, "file:///d%20e grpc://h:1");
    let recorded = sources.of_record(&opened.endpoint, "").unwrap();
    // The same connections, and credentials.
    assert!(std::sync::Arc::ptr_eq(&opened.actions(), &recorded.actions()));
    // Directories of another machine are not those of this one.
    assert_eq!(
        sources.of_import(&opened.endpoint, "").unwrap().endpoint,
        "grpc://h:1"
    );
    assert_eq!(
        sources.of_import("file:///d", "").err(),
        Some(SourceError::NotRecorded)
    );
    let many: Vec<String> = (1..=17).map(|port| format!("grpc://h:{port}")).collect();
    assert_eq!(
        sources.of_record(&many.join(" "), "").err(),
        Some(SourceError::TooMany(17))
    );
    // What is fixed stays so, with the directories that the build had.
    let fixed = RemoteOptions::new(Endpoint::parse("--remote-cache", "grpc://fixed:1").unwrap());
    sources.set_rule(SourceRule::Fixed(SourceCache::open(fixed).unwrap()));
    for recorded in [
        sources.of_record(&opened.endpoint, "").unwrap(),
        sources
            .of_build(Some(&own), &BuildDirectories::default())
            .unwrap(),
    ] {
        assert_eq!(recorded.endpoint, "file:///d%20e grpc://fixed:1");
    }
    assert_eq!(
        sources.of_import(&opened.endpoint, "").unwrap().endpoint,
        "grpc://fixed:1"
    );
    assert_eq!(sources.of_record("", "").unwrap().endpoint, "grpc://fixed:1");
}

#[tokio::test]
async fn a_chain_has_the_credentials_of_the_build_that_asks_for_it() {
    let sources = sources(false, None);
    let of = |disk: &[(&str, &str)], token| {
        let all = [disk, &[("remote_cache", "grpc://h:1"), ("remote_header", token)]].concat();
        let opened = sources.of_build(Some(&line(&all)), &BuildDirectories::default());
        let opened = opened.unwrap();
        let token = opened.options().unwrap().connect.headers[0].value().to_owned();
        (opened, token)
    };
    let disk = [("disk_cache", "/d")];
    assert_eq!(of(&disk, "x-token=one").1, "one");
    assert_eq!(of(&[], "x-token=two").1, "two");
    let (two, token) = of(&disk, "x-token=two");
    assert_eq!(token, "two");
    let (again, _) = of(&disk, "x-token=two");
    assert!(std::sync::Arc::ptr_eq(&two.actions(), &again.actions()));
    // However many there are, not all are kept.
    for port in 1..200 {
        sources.of_record(&format!("grpc://h:{port}"), "").unwrap();
    }
    assert!(sources.chains() <= 64);
}

#[test]
fn of_a_recorded_cache_it_is_known_that_the_builds_own_password_is_not() {
    let sources = || {
        let template = RemoteOptions::new(Endpoint::parse("--remote-cache", "grpc://x:1").unwrap());
        Sources::new(SourceRule::FromBuild {
            template: Box::new(template),
            before: Vec::new(),
            allowed: None,
        })
    };
    let build = line(&[("remote_cache", "http://user:s3cret@cache.test:1/c")]);
    let before = sources();
    let opened = before.of_build(Some(&build), &BuildDirectories::default());
    let endpoint = opened.unwrap().endpoint;
    // While the process lives, its credentials are known.
    let options = before.of_record(&endpoint, "").unwrap().options().unwrap();
    assert_eq!((options.connect.headers.len(), options.left_out.len()), (1, 0));
    // After a restart, what to do is known.
    let options = sources().of_record(&endpoint, "").unwrap().options().unwrap();
    let [left_out] = &options.left_out[..] else {
        panic!("{:?}", options.left_out);
    };
    for part in ["password", ".netrc", "--remote-cache=URL"] {
        assert!(left_out.contains(part), "{left_out}");
    }
    let options = sources().of_import(&endpoint, "").unwrap().options().unwrap();
    assert!(!has_credentials(&options));
}

#[test]
fn addresses_in_a_record_are_read_as_they_were_written() {
    let shown = |text: &str| {
        let all = endpoints(text)?;
        Ok::<_, crate::transport::RemoteError>(all.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    for (text, expected) in [
        ("grpc://h:1", vec!["grpc://h:1"]),
        // Written when there was one only.
        ("unix:/a b%20", vec!["unix:/a b%20"]),
        ("unix:/a%20b%2520 grpc://h:1", vec!["unix:/a b%20", "grpc://h:1"]),
        (
            "file:///a%20b grpcs://h:443",
            vec!["file:///a%20b", "grpcs://h:443"],
        ),
    ] {
        assert_eq!(shown(text).unwrap(), expected);
    }
    assert!(shown("grpc://h:1 ftp://h").is_err() && shown("").is_err());
}
