//! Which remote cache an invocation's outputs are fetched from.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use crate::{
    bep::event::CommandLine,
    digest::DigestFunction,
    remote::{BlobStore, Chain, DiskCache, GrpcCache, Nowhere, RemoteOptions},
    transport::{
        Endpoint, Google, Header, RemoteError, TlsFiles,
        auth::{check_helper, has_helper},
        google::DEFAULT_SCOPE,
        netrc, split_user_info, without_user_info,
    },
    units::parse_duration,
};

/// What newer Bazels, and forks that redact, write in the place of a secret.
const REDACTED: &str = "<REDACTED>";

/// Where to fetch from.
#[derive(Clone)]
pub enum SourceRule {
    /// One cache for all builds.
    Fixed(Arc<GrpcCache>),
    /// The cache that the build itself uses, from its canonical command line.
    FromBuild {
        /// Everything but the address: time-outs, connections, further headers.
        template: Box<RemoteOptions>,
        /// Endpoints that a stream may name; `None` where anyone who names it is trusted, because it is the user's own
        /// command or file.
        allowed: Option<Vec<Endpoint>>,
    },
}

/// A cache in use, and how to name it in the record.
#[derive(Clone)]
pub struct SourceCache {
    store: Option<Arc<GrpcCache>>,
    blobs: Arc<dyn BlobStore>,
    /// Its endpoint; empty where there is a disk cache alone.
    pub endpoint: String,
    /// Its instance name.
    pub instance_name: String,
}

impl SourceCache {
    /// As what fetching needs.
    #[must_use]
    pub fn blobs(&self) -> Arc<dyn BlobStore> {
        Arc::clone(&self.blobs)
    }

    /// The same without the build's disk cache: reading fills a cache at the address only if it comes there.
    #[must_use]
    pub fn remote_blobs(&self) -> Arc<dyn BlobStore> {
        match &self.store {
            Some(store) => store.clone(),
            None => self.blobs(),
        }
    }

    /// Asks the remote cache whether it is there, and lets us in.
    ///
    /// # Errors
    /// When there is none, or it does not answer.
    pub async fn probe(&self) -> Result<(), RemoteError> {
        match &self.store {
            Some(store) => store.probe().await.map(|_| ()),
            None => self.blobs.capabilities().await.map(|_| ()),
        }
    }

    /// Options of the build's own that could not be used.
    #[must_use]
    pub fn left_out(&self) -> &[String] {
        self.store
            .as_ref()
            .map_or(&[], |store| store.options().left_out.as_slice())
    }

    /// The address, if there is one.
    #[must_use]
    pub fn address(&self) -> Option<&Endpoint> {
        self.store.as_ref().map(|store| &store.options().connect.endpoint)
    }
}

/// The directories that relative paths on a build's command line start from, as they are for us.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BuildDirectories {
    /// The workspace, where Bazel's server runs.
    pub workspace: PathBuf,
    /// Where the build's client was started.
    pub working_directory: PathBuf,
}

/// The caches in use.
pub struct Sources {
    rule: RwLock<SourceRule>,
    open: Mutex<HashMap<String, SourceCache>>,
}

impl Sources {
    /// By a rule.
    #[must_use]
    pub fn new(rule: SourceRule) -> Self {
        Self {
            rule: RwLock::new(rule),
            open: Mutex::default(),
        }
    }

    /// Another rule, for builds from now on. Those that have found their cache keep it.
    pub fn set_rule(&self, rule: SourceRule) {
        *self.rule.write().unwrap_or_else(PoisonError::into_inner) = rule;
        // They may hold credentials that do not count any more.
        self.open.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The function of digests whose build does not tell which it is.
    #[must_use]
    pub fn digest_function(&self) -> DigestFunction {
        match self.rule() {
            SourceRule::Fixed(cache) => cache.options().digest_function,
            SourceRule::FromBuild { template, .. } => template.digest_function,
        }
    }

    fn rule(&self) -> SourceRule {
        self.rule.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The cache for a build: its disk cache, if it has one that can be read, and then the remote one.
    ///
    /// # Errors
    /// In words: the build names no gRPC cache, or one that is not allowed, and no disk cache.
    pub fn of_build(
        &self,
        command_line: Option<&CommandLine>,
        directories: &BuildDirectories,
    ) -> Result<SourceCache, String> {
        let remote = match &self.rule() {
            SourceRule::Fixed(cache) => Ok(named(cache)),
            SourceRule::FromBuild { template, allowed } => command_line
                .ok_or_else(|| "the build sent no command line to take the remote cache from".to_owned())
                .and_then(|line| options_of(line, template, directories))
                .and_then(|options| {
                    check(allowed.as_deref(), &options.connect.endpoint)?;
                    let key = key(&options.connect.endpoint.to_string(), &options.instance_name);
                    self.open(key, options)
                }),
        };
        let Some(path) = command_line.and_then(|line| disk_cache(line, directories)) else {
            return remote;
        };
        let disk = match DiskCache::open(&path) {
            Ok(disk) => Arc::new(disk),
            Err(error) => {
                tracing::debug!("not reading the build's --disk_cache: {error}");
                return remote;
            }
        };
        Ok(match remote {
            Ok(remote) => SourceCache {
                blobs: Arc::new(Chain::new(vec![disk, remote.blobs()])),
                ..remote
            },
            Err(reason) => SourceCache {
                store: None,
                blobs: Arc::new(Chain::new(vec![disk, Arc::new(Nowhere(reason))])),
                endpoint: String::new(),
                instance_name: String::new(),
            },
        })
    }

    /// The cache that a recorded invocation used.
    ///
    /// # Errors
    /// In words: nothing is recorded, it is not allowed, or it cannot be used.
    pub fn of_record(&self, endpoint: &str, instance_name: &str) -> Result<SourceCache, String> {
        match &self.rule() {
            SourceRule::Fixed(cache) => Ok(named(cache)),
            SourceRule::FromBuild { template, allowed } => {
                let options = recorded(template, endpoint, instance_name)?;
                check(allowed.as_deref(), &options.connect.endpoint)?;
                let key = key(endpoint, instance_name);
                {
                    let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(cache) = open.get(&key) {
                        return Ok(cache.clone());
                    }
                }
                self.open(key, options)
            }
        }
    }

    /// The cache of a build that somebody else has written down. Its word is not enough to send credentials anywhere:
    /// where there are any, the user must have named the endpoint. No flag of the build's command line is heeded.
    ///
    /// # Errors
    /// In words: it names no cache, one that is not allowed, or one that credentials would go to.
    pub fn of_import(&self, endpoint: &str, instance_name: &str) -> Result<SourceCache, String> {
        match &self.rule() {
            SourceRule::Fixed(cache) => Ok(named(cache)),
            SourceRule::FromBuild { template, allowed } => {
                let options = recorded(template, endpoint, instance_name)?;
                check(allowed.as_deref(), &options.connect.endpoint)?;
                if allowed.is_none() && has_credentials(&options) {
                    return Err(format!(
                        "a build without an output root on this machine, such as an imported one, names the \
                         remote cache {}, and outhaul sends credentials to it only if you confirm that: give \
                         --remote-cache or --allow-remote-cache",
                        options.connect.endpoint
                    ));
                }
                // Never one that a build of here has opened with its own credentials.
                self.open(format!("import {}", key(endpoint, instance_name)), options)
            }
        }
    }

    fn open(&self, key: String, options: RemoteOptions) -> Result<SourceCache, String> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        // Another build may come with other credentials for the same place.
        if let Some(cache) = open.get(&key).filter(|cache| {
            let store = cache.store.as_ref();
            store.is_some_and(|store| *store.options() == options)
        }) {
            return Ok(cache.clone());
        }
        let cache = Arc::new(GrpcCache::new(options).map_err(|e| e.to_string())?);
        let cache = named(&cache);
        open.insert(key, cache.clone());
        Ok(cache)
    }
}

fn key(endpoint: &str, instance_name: &str) -> String {
    format!("{endpoint} {instance_name}")
}

/// Options for what is written down of a cache.
fn recorded(template: &RemoteOptions, endpoint: &str, instance_name: &str) -> Result<RemoteOptions, String> {
    if endpoint.is_empty() {
        return Err("no remote cache is recorded for it; give --remote-cache".to_owned());
    }
    let mut options = template.clone();
    options.connect.endpoint = Endpoint::parse("--remote-cache", endpoint).map_err(|e| e.to_string())?;
    instance_name.clone_into(&mut options.instance_name);
    Ok(options)
}

fn check(allowed: Option<&[Endpoint]>, endpoint: &Endpoint) -> Result<(), String> {
    match allowed {
        Some(allowed) if !allowed.contains(endpoint) => Err(format!(
            "the build names the remote cache {endpoint}, which is not allowed; see --allow-remote-cache"
        )),
        _ => Ok(()),
    }
}

/// Whether anything would tell the server who we are.
fn has_credentials(options: &RemoteOptions) -> bool {
    !options.connect.headers.is_empty()
        || !options.connect.credential_helpers.is_empty()
        || options.connect.google.is_some()
        || options.connect.tls.client_certificate.is_some()
        || options.connect.tls.client_key.is_some()
}

/// Endpoint and instance name of the cache that a build's canonical command line names, and nothing else of it.
#[must_use]
pub fn address_of(line: &CommandLine) -> Option<(String, String)> {
    let placeholder = Endpoint::parse("--remote-cache", "grpc://localhost:1").ok()?;
    let options = options_of(
        line,
        &RemoteOptions::new(placeholder),
        &BuildDirectories::default(),
    )
    .ok()?;
    Some((options.connect.endpoint.to_string(), options.instance_name))
}

fn named(cache: &Arc<GrpcCache>) -> SourceCache {
    SourceCache {
        store: Some(cache.clone()),
        blobs: cache.clone(),
        endpoint: cache.options().connect.endpoint.to_string(),
        instance_name: cache.options().instance_name.clone(),
    }
}

/// Where the build's `--disk_cache` is. A relative one lies below the directory that the client was started in, and `~/`
/// is the home directory, as for Bazel.
fn disk_cache(line: &CommandLine, directories: &BuildDirectories) -> Option<PathBuf> {
    let text = line.given("disk_cache")?;
    let path = match text.strip_prefix("~/") {
        Some(below) => std::env::home_dir()?.join(below),
        None => directories.working_directory.join(text),
    };
    path.is_absolute().then_some(path)
}

/// Whether a cache's address is that of one behind HTTP, which is not read.
pub fn is_http(address: &str) -> bool {
    address.starts_with("http://") || address.starts_with("https://")
}

/// The cache that a build's canonical command line names.
///
/// One option of the build's that cannot be used does not cost the cache: it is left out, noted in
/// [`RemoteOptions::left_out`], and told if the server refuses us then.
///
/// # Errors
/// In words, naming the build's own flag.
pub fn options_of(
    line: &CommandLine,
    template: &RemoteOptions,
    directories: &BuildDirectories,
) -> Result<RemoteOptions, String> {
    let Some((flag, endpoint)) = line.remote_cache() else {
        return Err(
            "the build uses no remote cache: it has neither --remote_cache nor --remote_executor".to_owned(),
        );
    };
    if is_http(endpoint) {
        return Err(format!(
            "the build's --{flag}={} is an HTTP cache; only gRPC caches are supported",
            without_user_info(endpoint)
        ));
    }
    let mut options = template.clone();
    let (address, user_info) = split_user_info(endpoint);
    options.connect.endpoint = Endpoint::parse(&format!("--{flag}"), &address).map_err(|e| e.to_string())?;
    if let Some(instance) = line.last("remote_instance_name") {
        instance.clone_into(&mut options.instance_name);
    }
    if let Some(proxy) = line
        .last("remote_proxy")
        .and_then(|value| value.strip_prefix("unix:"))
    {
        options.connect.proxy = Some(directories.workspace.join(proxy));
    }
    if !directories.workspace.as_os_str().is_empty() {
        options.connect.workspace = Some(directories.workspace.clone());
    }
    add_headers(line, &mut options);
    if options.connect.endpoint.is_tls() {
        options.connect.tls_authority_override = line.given("tls_authority_override").map(str::to_owned);
        add_tls(line, directories, &mut options);
    }
    add_helpers(line, &mut options);
    // A helper that is for the endpoint goes before Google's credentials, and they go before a `.netrc`.
    let is_known = has_helper(&options.connect) || add_google(line, directories, &mut options);
    add_login(user_info, is_known, &mut options);
    if let Some(function) = line.given("digest_function") {
        match function.parse::<DigestFunction>() {
            Ok(function) => options.digest_function = function,
            Err(error) => options.left_out.push(format!("--digest_function: {error}")),
        }
    }
    options.validate().map_err(|e| e.to_string())?;
    Ok(options)
}

fn add_headers(line: &CommandLine, options: &mut RemoteOptions) {
    // `run` knows some from the command itself already.
    let own = options.connect.headers.clone();
    let is_known = |name: &str| own.iter().any(|known| known.name().eq_ignore_ascii_case(name));
    for name in ["remote_header", "remote_cache_header"] {
        for text in line.all(name) {
            let (header, value) = text.split_once('=').unwrap_or(("", text));
            if value == REDACTED {
                if !is_known(header) {
                    options.left_out.push(format!(
                        "--{name}={header}: its value is redacted in the build's events"
                    ));
                }
                continue;
            }
            match Header::parse(&format!("--{name}"), text) {
                Ok(header) if own.contains(&header) => {}
                Ok(header) => options.connect.headers.push(header),
                Err(error) => options.left_out.push(error.to_string()),
            }
        }
    }
}

/// Bazel's server runs in the workspace, where relative files are looked for.
fn add_tls(line: &CommandLine, directories: &BuildDirectories, options: &mut RemoteOptions) {
    let path = |name| Some(directories.workspace.join(line.given(name)?));
    let files = &mut options.connect.tls;
    let certificate = path("tls_certificate").filter(|_| files.certificate.is_none());
    if certificate.is_some() {
        let tried = TlsFiles {
            certificate,
            ..TlsFiles::default()
        };
        match tried.read() {
            Ok(_) => files.certificate = tried.certificate,
            Err(error) => options.left_out.push(error.to_string()),
        }
    }
    if files.client_certificate.is_some() || files.client_key.is_some() {
        return;
    }
    match (path("tls_client_certificate"), path("tls_client_key")) {
        (client_certificate @ Some(_), client_key @ Some(_)) => {
            let tried = TlsFiles {
                certificate: files.certificate.clone(),
                client_certificate,
                client_key,
            };
            match tried.read() {
                Ok(_) => *files = tried,
                Err(error) => options.left_out.push(error.to_string()),
            }
        }
        (Some(file), None) => options.left_out.push(format!(
            "--tls_client_certificate={}: requires --tls_client_key",
            file.display()
        )),
        (None, Some(file)) => options.left_out.push(format!(
            "--tls_client_key={}: requires --tls_client_certificate",
            file.display()
        )),
        (None, None) => {}
    }
}

fn add_helpers(line: &CommandLine, options: &mut RemoteOptions) {
    for name in ["credential_helper", "experimental_credential_helper"] {
        for text in line.all(name) {
            match check_helper(&options.connect, text) {
                Ok(()) => options.connect.credential_helpers.push(text.to_owned()),
                Err(error) => options.left_out.push(error.to_string()),
            }
        }
    }
    let connect = &mut options.connect;
    for (name, duration) in [
        ("timeout", &mut connect.credential_helper_timeout),
        ("cache_duration", &mut connect.credential_helper_cache_duration),
    ] {
        for prefix in ["experimental_", ""] {
            let name = format!("{prefix}credential_helper_{name}");
            match line.given(&name).map(parse_duration) {
                None => {}
                Some(Ok(given)) => *duration = given,
                Some(Err(error)) => options.left_out.push(format!("--{name}: {error}")),
            }
        }
    }
}

/// Google's credentials that a build's command line asks for: a file goes before the default ones. Bazel's server runs in
/// the workspace, where a relative file is looked for.
pub(crate) fn google_of(line: &CommandLine, workspace: &Path) -> Option<Google> {
    let file = line.given("google_credentials").map(|file| workspace.join(file));
    if file.is_none() && line.switch("google_default_credentials") != Some(true) {
        return None;
    }
    let scopes = line.last("google_auth_scopes").unwrap_or(DEFAULT_SCOPE);
    let scopes = scopes.split(',').filter(|scope| !scope.is_empty());
    Some(Google {
        file,
        scopes: scopes.map(str::to_owned).collect(),
    })
}

/// Whether Google's credentials are asked for, if only to no avail.
fn add_google(line: &CommandLine, directories: &BuildDirectories, options: &mut RemoteOptions) -> bool {
    if options.connect.google.is_some() {
        return true;
    }
    let Some(google) = google_of(line, &directories.workspace) else {
        return false;
    };
    match google.check() {
        Ok(()) => options.connect.google = Some(google),
        Err(error) => options.left_out.push(error.to_string()),
    }
    true
}

/// User name and password: of the address itself, or of the user's `.netrc`, where nothing else says who it is.
fn add_login(user_info: Option<(String, String)>, is_known: bool, options: &mut RemoteOptions) {
    let says_who = |header: &Header| header.name() == "authorization";
    if options.connect.headers.iter().any(says_who) {
        return;
    }
    let login = user_info.or_else(|| {
        let host = options.connect.endpoint.host().filter(|_| !is_known)?;
        let file = match std::env::var_os("NETRC") {
            Some(file) => PathBuf::from(file),
            None => std::env::home_dir()?.join(".netrc"),
        };
        netrc::login(&std::fs::read_to_string(file).ok()?, host)
    });
    if let Some((user, password)) = login {
        options.connect.headers.push(Header::basic(&user, &password));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

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
            (vec![("remote_cache", "http://h/c")], "HTTP cache"),
            (vec![("remote_cache", "https://user:secret@h/c")], "***@h/c"),
            (vec![("remote_cache", "ftp://h/c")], "--remote_cache"),
        ] {
            let error = options_of(&line(&options), &template(), &BuildDirectories::default()).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    fn sources(header: bool, allowed: Option<&str>) -> Sources {
        let mut template = template();
        if header {
            template.connect.headers = vec![Header::parse("--remote-header", "x-token=abc").unwrap()];
        }
        let parse = |url| Endpoint::parse("--allow-remote-cache", url).unwrap();
        Sources::new(SourceRule::FromBuild {
            template: Box::new(template),
            allowed: allowed.map(|url| vec![parse(url)]),
        })
    }

    #[tokio::test]
    async fn what_is_recorded_is_no_more_allowed_than_what_a_build_says() {
        let sources = sources(true, Some("grpc://good:1"));
        sources.of_record("grpc://good:1", "main").unwrap();
        let told = sources
            .of_build(
                Some(&line(&[("remote_cache", "grpc://evil:1")])),
                &BuildDirectories::default(),
            )
            .err();
        assert!(told.as_ref().unwrap().contains("--allow-remote-cache"));
        assert_eq!(sources.of_record("grpc://evil:1", "main").err(), told);
        assert_eq!(sources.of_import("grpc://evil:1", "main").err(), told);
        sources.of_import("grpc://good:1", "main").unwrap();
    }

    #[tokio::test]
    async fn an_imported_build_gets_no_credentials_for_where_it_points() {
        let error = sources(true, None).of_import("grpc://evil:1", "").err().unwrap();
        for part in ["grpc://evil:1", "--remote-cache", "--allow-remote-cache"] {
            assert!(error.contains(part), "{error}");
        }
        // Nor those that a build of here has brought for itself.
        let sources = sources(false, None);
        let own = line(&[("remote_cache", "grpc://h:1"), ("remote_header", "x-token=abc")]);
        assert!(has_credentials(
            sources
                .of_build(Some(&own), &BuildDirectories::default())
                .unwrap()
                .store
                .unwrap()
                .options()
        ));
        let imported = sources.of_import("grpc://h:1", "").unwrap();
        assert!(!has_credentials(imported.store.unwrap().options()));
        assert!(has_credentials(
            sources
                .of_record("grpc://h:1", "")
                .unwrap()
                .store
                .unwrap()
                .options()
        ));
        let error = sources.of_import("", "").err().unwrap();
        assert!(error.contains("give --remote-cache"), "{error}");
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
        for (name, value, told) in [
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
                left_out.contains(told) && !left_out.contains("s3cret"),
                "{left_out}"
            );
            assert_eq!(options.connect.headers.len(), 1, "the others are sent");
            assert!(
                options.connect.credential_helpers.is_empty() && options.connect.tls.certificate.is_none()
            );
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
        assert_eq!(
            disk("~/cache"),
            std::env::home_dir().map(|home| home.join("cache"))
        );
        assert_eq!(disk(""), None);
    }

    #[test]
    fn an_address_may_have_a_user_and_need_not_have_a_port() {
        for (address, shown, header) in [
            ("grpc://me:s3cret@h:9", "grpc://h:9", Some("Basic bWU6czNjcmV0")),
            (
                "grpcs://me%40x:s%3Acret@h",
                "grpcs://h:443",
                Some("Basic bWVAeDpzOmNyZXQ="),
            ),
            ("grpc://h", "grpc://h:80", None),
            ("GRPC://h:9/", "grpc://h:9", None),
            ("dns:///h:9", "grpcs://h:9", None),
            ("h", "grpcs://h:443", None),
        ] {
            let line = line(&[("remote_cache", address)]);
            let options = options_of(&line, &template(), &BuildDirectories::default()).expect(address);
            assert_eq!(options.connect.endpoint.to_string(), shown);
            assert_eq!(
                options.connect.headers.first().map(Header::value),
                header,
                "{address}"
            );
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
            (&[("disk_cache", &disk)], "no remote cache"),
            (
                &[("disk_cache", &disk), ("remote_cache", "http://h/c")],
                "HTTP cache",
            ),
        ];
        for (options, reason) in cases {
            let cache = sources(false, None)
                .of_build(Some(&line(options)), &BuildDirectories::default())
                .unwrap();
            let asked = [digest.clone(), absent.clone()];
            let mut answers = cache.blobs().read_batch(&asked, &nobody, false).await;
            let error = answers.pop().unwrap().1.unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
            assert_eq!(&answers[0].1.as_ref().unwrap()[..], b"alpha");
        }
        // One that cannot be read is as if it were not named.
        let options = [("disk_cache", "/nonexistent"), ("remote_cache", "grpc://h:1")];
        let cache = sources(false, None)
            .of_build(Some(&line(&options)), &BuildDirectories::default())
            .unwrap();
        assert_eq!(cache.blobs().describe(), "grpc://h:1");
    }
}
