use super::*;
use crate::transport::RemoteErrorKind;
use proptest::prelude::*;

fn parse(text: &str) -> Result<Endpoint, RemoteError> {
    Endpoint::parse("--remote-cache", text)
}

#[test]
fn every_form_is_read_as_bazel_reads_it() {
    for (text, shown, uri) in [
        (
            "grpc://localhost:9092",
            "grpc://localhost:9092",
            "http://localhost:9092",
        ),
        (
            "grpcs://Cache.Example",
            "grpcs://cache.example:443",
            "https://cache.example:443",
        ),
        (
            "grpcs://cache.example:8443/",
            "grpcs://cache.example:8443",
            "https://cache.example:8443",
        ),
        (
            "cache.example:8980",
            "grpcs://cache.example:8980",
            "https://cache.example:8980",
        ),
        (
            "cache.example",
            "grpcs://cache.example:443",
            "https://cache.example:443",
        ),
        ("grpc://[::1]:80", "grpc://[::1]:80", "http://[::1]:80"),
        ("unix:/run/cache.sock", "unix:/run/cache.sock", "http://localhost"),
        (
            "unix:///run/cache.sock",
            "unix:/run/cache.sock",
            "http://localhost",
        ),
    ] {
        let endpoint = parse(text).expect(text);
        assert_eq!(endpoint.to_string(), shown);
        assert_eq!(endpoint.http_uri(), uri);
        assert_eq!(parse(shown), Ok(endpoint));
    }
}

fn cache(text: &str) -> Result<Endpoint, RemoteError> {
    Endpoint::parse_cache("--remote-cache", text)
}

#[test]
fn an_http_cache_has_a_path_and_is_an_address_of_caches_only() {
    for (text, shown) in [
        ("http://cache", "http://cache:80"),
        ("HTTPS://Cache.Example/", "https://cache.example:443"),
        ("http://h:8080/Team/cas//", "http://h:8080/Team/cas"),
        ("http://[::1]:90/a%20b/@c", "http://[::1]:90/a%20b/@c"),
    ] {
        let endpoint = cache(text).expect(text);
        assert!(endpoint.is_http() && parse(text).is_err(), "{text}");
        assert_eq!(endpoint.to_string(), shown);
        assert_eq!(endpoint.credential_uri().as_deref(), Some(shown));
        assert_eq!(endpoint.is_tls(), shown.starts_with("https"));
        assert_eq!(cache(shown), Ok(endpoint));
    }
    assert_eq!(cache("grpc://h:1"), parse("grpc://h:1"));
    for (text, part) in [
        ("http://", "empty"),
        ("http://h:0/x", "1 to 65535"),
        ("http://h/x?layout=bazel", "query"),
        ("http://h/a/%2e%2E/b", ".."),
        ("http://h/a b", "percent-encoding"),
        ("https://me:s3cret@h/x", "***@h/x"),
        ("https://me:s3/cret@h/x", "***@h/x"),
    ] {
        let shown = cache(text).expect_err(text).to_string();
        assert!(shown.contains(part) && !shown.contains("s3"), "{shown}");
    }
}

#[test]
fn a_permission_for_an_http_cache_holds_below_its_path() {
    for (allowed, asked, expected) in [
        ("http://h/team", "http://h:80/team/x", true),
        ("http://h", "http://h/x", true),
        ("http://h/team", "http://h/team", true),
        ("http://h/team", "http://h/teams", false),
        ("http://h/team/x", "http://h/team", false),
        ("http://h", "https://h", false),
        ("http://h", "http://h:81/", false),
        ("http://h", "grpc://h:80", false),
        ("grpc://h:80", "grpc://h", true),
    ] {
        let (allowed, asked) = (cache(allowed).unwrap(), cache(asked).unwrap());
        assert_eq!(allowed.covers(&asked), expected, "{allowed} {asked}");
    }
}

#[test]
fn user_and_password_are_taken_off_and_decoded() {
    for (text, address, user, password) in [
        (
            "http://me%40x:a%3Ab+c%C3%A9@h/p@q",
            "http://h/p@q",
            "me@x",
            "a:b+c\u{e9}",
        ),
        ("https://me:a:b@h:1", "https://h:1", "me", "a:b"),
        ("grpc://me@h:1", "grpc://h:1", "me", ""),
    ] {
        let expected = (address.to_owned(), Some((user.to_owned(), password.to_owned())));
        assert_eq!(split_user_info(text), expected);
    }
    for text in ["http://h/p@q", "https://h", "grpc://h:1"] {
        assert_eq!(split_user_info(text), (text.to_owned(), None));
    }
}

#[test]
fn a_directory_is_an_address_of_caches_only() {
    for (text, path, shown) in [
        (
            "file:///var/cache/bazel",
            "/var/cache/bazel",
            "file:///var/cache/bazel",
        ),
        ("FILE:/a//b/./c/", "/a/b/c", "file:///a/b/c"),
        (
            "file:///a b/%2c/%C3%a9",
            "/a b/,/\u{e9}",
            "file:///a%20b/%2C/%C3%A9",
        ),
        ("file:///a@b:c", "/a@b:c", "file:///a@b:c"),
    ] {
        let endpoint = Endpoint::parse_cache("--remote-cache", text).expect(text);
        assert_eq!(endpoint.directory_path(), Some(Path::new(path)));
        assert_eq!(endpoint.to_string(), shown);
        assert!(
            endpoint.is_local() && endpoint.host().is_none() && parse(text).is_err(),
            "{text}"
        );
        assert_eq!(Endpoint::parse_cache("--remote-cache", shown), Ok(endpoint));
    }
    for text in ["file://host/dir", "file:dir", "file:", "file:///a%00b"] {
        let error = Endpoint::parse_cache("--remote-cache", text).expect_err(text);
        assert!(
            error.to_string().starts_with(&format!("--remote-cache={text}: ")),
            "{error}"
        );
    }
    assert_eq!(Endpoint::parse_cache("x", "grpc://h:1"), parse("grpc://h:1"));
}

#[test]
fn this_machine_is_known_by_its_addresses() {
    for (text, local) in [
        ("unix:/run/cache.sock", true),
        ("grpc://localhost:1", true),
        ("grpc://127.0.0.9:1", true),
        ("grpcs://[::1]:1", true),
        ("grpc://10.0.0.1:1", false),
        ("localhost.example", false),
    ] {
        assert_eq!(parse(text).unwrap().is_local(), local, "{text}");
    }
}

#[test]
fn errors_name_the_flag_the_text_and_the_fault() {
    for (text, part) in [
        ("http://cache:80", "unknown scheme"),
        ("grpc://cache:0", "1 to 65535"),
        ("grpc://cache:+1", "1 to 65535"),
        ("grpc://cache:99999", "1 to 65535"),
        ("grpc://cache:80/main", "--remote-instance-name"),
        ("grpc://ca che:80", "character"),
        ("grpc://:80", "empty"),
        ("::1:80", "[IPV6]"),
        ("unix:relative.sock", "absolute"),
        ("unix:/dir/", "not a file path"),
    ] {
        let error = parse(text).expect_err(text);
        assert_eq!(error.kind, RemoteErrorKind::Config);
        let shown = error.to_string();
        assert!(shown.contains(part), "{text}: {shown}");
        assert!(shown.starts_with(&format!("--remote-cache={text}")), "{shown}");
    }
}

#[test]
fn credentials_in_an_address_are_refused_and_not_repeated() {
    for text in [
        "grpcs://me:s3cret@cache:443",
        "s3cret@cache:443",
        "grpc://a/s3cret@b@cache:1",
        "file://me:s3cret@host/dir",
    ] {
        let shown = cache(text).expect_err(text).to_string();
        assert!(!shown.contains("s3cret"), "{shown}");
    }
}

#[test]
fn helpers_are_asked_about_the_host_and_an_unusual_port() {
    assert_eq!(parse("a.b").unwrap().credential_uri().unwrap(), "https://a.b/");
    assert_eq!(
        parse("grpc://a.b:80").unwrap().credential_uri().unwrap(),
        "https://a.b:80/"
    );
    assert_eq!(parse("unix:/x").unwrap().credential_uri(), None);
}

proptest! {
    /// Whatever is accepted is shown in a form that reads back the same, and has a valid URI.
    #[test]
    fn accepted_endpoints_read_back(text in "(grpcs?://|https?://|unix:|)[a-z0-9:./%\\[\\]@-]{0,20}") {
        if let Ok(endpoint) = cache(&text) {
            prop_assert_eq!(cache(&endpoint.to_string()), Ok(endpoint.clone()));
            prop_assert!(endpoint.http_uri().parse::<http::Uri>().is_ok(), "{}", endpoint.http_uri());
        }
    }
}
