//! Which remote cache an invocation's outputs are fetched from.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    bep::event::CommandLine,
    digest::DigestFunction,
    remote::{BlobStore, Endpoint, GrpcCache, Header, RemoteOptions, without_user_info},
};

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
    rule: SourceRule,
    open: Mutex<HashMap<String, SourceCache>>,
}

impl Sources {
    /// By a rule.
    #[must_use]
    pub fn new(rule: SourceRule) -> Self {
        Self {
            rule,
            open: Mutex::default(),
        }
    }

    /// The cache for a build.
    ///
    /// # Errors
    /// In words: the build names no gRPC cache, or one that is not allowed.
    pub fn of_build(&self, command_line: Option<&CommandLine>) -> Result<SourceCache, String> {
        match &self.rule {
            SourceRule::Fixed(cache) => Ok(named(cache)),
            SourceRule::FromBuild { template, allowed } => {
                let line =
                    command_line.ok_or("the build told no command line to take the remote cache from")?;
                let options = options_of(line, template)?;
                if let Some(allowed) = allowed
                    && !allowed.contains(&options.endpoint)
                {
                    return Err(format!(
                        "the build names the remote cache {}, which is not allowed; see --allow-remote-cache",
                        options.endpoint
                    ));
                }
                self.open(options)
            }
        }
    }

    /// The cache that a recorded invocation used.
    ///
    /// # Errors
    /// In words: nothing is recorded, or it can't be used.
    pub fn of_record(&self, endpoint: &str, instance_name: &str) -> Result<SourceCache, String> {
        match &self.rule {
            SourceRule::Fixed(cache) => Ok(named(cache)),
            SourceRule::FromBuild { template, .. } => {
                {
                    let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
                    let same = |c: &&SourceCache| c.endpoint == endpoint && c.instance_name == instance_name;
                    if let Some(cache) = open.values().find(same) {
                        return Ok(cache.clone());
                    }
                }
                if endpoint.is_empty() {
                    return Err("no remote cache is recorded for it; give --remote-cache".to_owned());
                }
                let mut options = (**template).clone();
                options.endpoint = Endpoint::parse("--remote-cache", endpoint).map_err(|e| e.to_string())?;
                instance_name.clone_into(&mut options.instance_name);
                self.open(options)
            }
        }
    }

    fn open(&self, options: RemoteOptions) -> Result<SourceCache, String> {
        let key = format!("{} {}", options.endpoint, options.instance_name);
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
            options
                .headers
                .push(Header::parse(&format!("--{name}"), header).map_err(|e| e.to_string())?);
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

    #[test]
    fn an_executor_is_its_own_cache() {
        let options = options_of(&line(&[("remote_executor", "grpc://exec:1")]), &template()).unwrap();
        assert_eq!(options.endpoint.to_string(), "grpc://exec:1");
    }
}
