//! Which remote cache an invocation's outputs are fetched from.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use crate::{
    bep::event::CommandLine,
    digest::DigestFunction,
    remote::{BlobStore, Endpoint, GrpcCache, Header, RemoteOptions, without_user_info},
};

/// What some build tools write in the place of a secret.
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
        /// Endpoints that a stream may name; `None` where whoever names it is trusted, because it is the user's own
        /// command or file.
        allowed: Option<Vec<Endpoint>>,
    },
}

/// A cache in use, and how to name it in the record.
#[derive(Clone)]
pub struct SourceCache {
    /// The cache.
    pub store: Arc<GrpcCache>,
    /// Its endpoint.
    pub endpoint: String,
    /// Its instance name.
    pub instance_name: String,
}

impl SourceCache {
    /// As what fetching needs.
    #[must_use]
    pub fn blobs(&self) -> Arc<dyn BlobStore> {
        self.store.clone()
    }
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

    fn rule(&self) -> SourceRule {
        self.rule.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The cache for a build.
    ///
    /// # Errors
    /// In words: the build names no gRPC cache, or one that is not allowed.
    pub fn of_build(&self, command_line: Option<&CommandLine>) -> Result<SourceCache, String> {
        match &self.rule() {
            SourceRule::Fixed(cache) => Ok(named(cache)),
            SourceRule::FromBuild { template, allowed } => {
                let line =
                    command_line.ok_or("the build told no command line to take the remote cache from")?;
                let options = options_of(line, template)?;
                check(allowed.as_deref(), &options.endpoint)?;
                self.open(
                    key(&options.endpoint.to_string(), &options.instance_name),
                    options,
                )
            }
        }
    }

    /// The cache that a recorded invocation used.
    ///
    /// # Errors
    /// In words: nothing is recorded, it is not allowed, or it can't be used.
    pub fn of_record(&self, endpoint: &str, instance_name: &str) -> Result<SourceCache, String> {
        match &self.rule() {
            SourceRule::Fixed(cache) => Ok(named(cache)),
            SourceRule::FromBuild { template, allowed } => {
                let options = recorded(template, endpoint, instance_name)?;
                check(allowed.as_deref(), &options.endpoint)?;
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
                check(allowed.as_deref(), &options.endpoint)?;
                if allowed.is_none() && has_credentials(&options) {
                    return Err(format!(
                        "a build without an output root here, such as an imported one, names the remote cache {}, \
                         which is sent no credentials on its word; give --remote-cache, or name it with \
                         --allow-remote-cache",
                        options.endpoint
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
        if let Some(cache) = open.get(&key).filter(|cache| *cache.store.options() == options) {
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
    options.endpoint = Endpoint::parse("--remote-cache", endpoint).map_err(|e| e.to_string())?;
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
    !options.headers.is_empty()
        || !options.credential_helpers.is_empty()
        || options.tls_client_certificate.is_some()
        || options.tls_client_key.is_some()
}

/// Endpoint and instance name of the cache that a build's canonical command line names, and nothing else of it.
#[must_use]
pub fn address_of(line: &CommandLine) -> Option<(String, String)> {
    let placeholder = Endpoint::parse("--remote-cache", "grpc://localhost:1").ok()?;
    let options = options_of(line, &RemoteOptions::new(placeholder)).ok()?;
    Some((options.endpoint.to_string(), options.instance_name))
}

fn named(cache: &Arc<GrpcCache>) -> SourceCache {
    SourceCache {
        store: cache.clone(),
        endpoint: cache.options().endpoint.to_string(),
        instance_name: cache.options().instance_name.clone(),
    }
}

/// The cache that a build's canonical command line names.
///
/// # Errors
/// In words, naming the build's own flag.
pub fn options_of(line: &CommandLine, template: &RemoteOptions) -> Result<RemoteOptions, String> {
    // As Bazel: a remote executor is its own cache unless another is named.
    let endpoint = ["remote_cache", "remote_executor"]
        .into_iter()
        .filter_map(|name| {
            line.last(name)
                .filter(|value| !value.is_empty())
                .map(|value| (name, value))
        })
        .next();
    let Some((flag, endpoint)) = endpoint else {
        return Err(
            "the build uses no remote cache: it has neither --remote_cache nor --remote_executor".to_owned(),
        );
    };
    if endpoint.starts_with("http://") || endpoint.starts_with("https://") {
        return Err(format!(
            "the build's --{flag}={} is an HTTP cache; only gRPC caches can be read",
            without_user_info(endpoint)
        ));
    }
    let mut options = template.clone();
    options.endpoint = Endpoint::parse(&format!("--{flag}"), endpoint).map_err(|e| e.to_string())?;
    if let Some(instance) = line.last("remote_instance_name") {
        instance.clone_into(&mut options.instance_name);
    }
    for name in ["remote_header", "remote_cache_header"] {
        for header in line.all(name) {
            let header = Header::parse(&format!("--{name}"), header).map_err(|e| e.to_string())?;
            // `run` knows it from the command itself already; some Bazels tell no value here.
            let is_known = template.headers.iter().any(|known| {
                known.name() == header.name()
                    && (known.value() == header.value() || header.value() == REDACTED)
            });
            if !is_known {
                options.headers.push(header);
            }
        }
    }
    if options.endpoint.is_tls() {
        let path = |name| line.last(name).filter(|v| !v.is_empty()).map(Into::into);
        options.tls_certificate = options.tls_certificate.or_else(|| path("tls_certificate"));
        options.tls_client_certificate = options
            .tls_client_certificate
            .or_else(|| path("tls_client_certificate"));
        options.tls_client_key = options.tls_client_key.or_else(|| path("tls_client_key"));
    }
    for name in ["credential_helper", "experimental_credential_helper"] {
        options
            .credential_helpers
            .extend(line.all(name).map(str::to_owned));
    }
    if let Some(function) = line.last("digest_function").filter(|v| !v.is_empty()) {
        options.digest_function = function
            .parse::<DigestFunction>()
            .map_err(|e| format!("the build's --digest_function: {e}"))?;
    }
    options.validate().map_err(|e| e.to_string())?;
    Ok(options)
}

#[cfg(test)]
mod tests {
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
        let options = options_of(&line, &template()).unwrap();
        assert_eq!(options.endpoint.to_string(), "grpc://cache:9092");
        assert_eq!(options.instance_name, "main/x");
        assert_eq!(options.headers.len(), 1);
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
            (
                vec![("remote_cache", "grpc://h:1"), ("digest_function", "crc")],
                "crc",
            ),
        ] {
            let error = options_of(&line(&options), &template()).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    fn sources(header: bool, allowed: Option<&str>) -> Sources {
        let mut template = template();
        if header {
            template.headers = vec![Header::parse("--remote-header", "x-token=abc").unwrap()];
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
            .of_build(Some(&line(&[("remote_cache", "grpc://evil:1")])))
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
            sources.of_build(Some(&own)).unwrap().store.options()
        ));
        let imported = sources.of_import("grpc://h:1", "").unwrap();
        assert!(!has_credentials(imported.store.options()));
        assert!(has_credentials(
            sources.of_record("grpc://h:1", "").unwrap().store.options()
        ));
        let error = sources.of_import("", "").err().unwrap();
        assert!(error.contains("give --remote-cache"), "{error}");
    }

    #[test]
    fn an_executor_is_its_own_cache() {
        let options = options_of(&line(&[("remote_executor", "grpc://exec:1")]), &template()).unwrap();
        assert_eq!(options.endpoint.to_string(), "grpc://exec:1");
    }
}
