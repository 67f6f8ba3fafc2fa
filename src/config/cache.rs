//! Where blobs are fetched from, with Bazel's flag names.

use std::path::PathBuf;

use clap::Args;

use super::{ConfigError, duration, parsed};
use crate::{
    remote::{Chain, Compression, RemoteOptions},
    sources::{SourceCache, SourceRule, add_login},
    transport::{
        Endpoint, Google, Header, RemoteError, TlsFiles, auth::has_helper, google::DEFAULT_SCOPE, is_http,
        split_user_info,
    },
};

/// The value of `--remote-cache` that takes the cache from the build's own command line.
pub(crate) const FROM_BUILD: &str = "from-build";

/// Flags of the remote cache.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Remote cache")]
pub(crate) struct CacheArgs {
    /// Address of the remote cache: grpc://HOST:PORT, grpcs://HOST, grpcs://HOST:PORT or unix:PATH;
    /// http(s)://USER:PASSWORD@HOST:PORT/PREFIX for an HTTP cache, file:///DIR for a disk cache, s3://BUCKET,
    /// gs://BUCKET or az://CONTAINER for a bucket; `from-build` takes it from the build's own command line, as `run` and
    /// `fetch bep` do by default (repeatable: what the first one does not have is read from the next)
    #[arg(long, value_name = "URL", env = "OUTHAUL_REMOTE_CACHE", value_delimiter = ',')]
    pub remote_cache: Vec<String>,

    /// Directory of Bazel's --disk_cache, read before the remote cache; the same as --remote-cache=file:///DIR
    #[arg(long, value_name = "DIR", env = "OUTHAUL_DISK_CACHE")]
    pub disk_cache: Option<PathBuf>,

    /// Do not update the times of files that are read from a disk cache. Bazel updates them, too: its garbage
    /// collection deletes the oldest files first
    #[arg(long, env = "OUTHAUL_NO_DISK_CACHE_TOUCH")]
    pub no_disk_cache_touch: bool,

    /// Treat the status 403 of an HTTP cache as a missing blob: this is how buckets answer callers that may not list
    /// them
    #[arg(long, env = "OUTHAUL_FORBIDDEN_IS_MISSING")]
    pub forbidden_is_missing: bool,

    /// With --remote-cache=from-build: a remote cache that builds may use (repeatable)
    #[arg(
        long,
        value_name = "URL",
        env = "OUTHAUL_ALLOW_REMOTE_CACHE",
        value_delimiter = ','
    )]
    pub allow_remote_cache: Vec<String>,

    /// Instance name at the remote cache
    #[arg(
        long,
        value_name = "NAME",
        env = "OUTHAUL_REMOTE_INSTANCE_NAME",
        default_value = ""
    )]
    pub remote_instance_name: String,

    /// Header for every request to the remote cache (repeatable)
    #[arg(
        long,
        value_name = "NAME=VALUE",
        env = "OUTHAUL_REMOTE_HEADER",
        hide_env_values = true
    )]
    pub remote_header: Vec<String>,

    #[command(flatten)]
    pub tls: TlsArgs,

    /// Credential helper, for all hosts or for those that match SCOPE (repeatable)
    #[arg(long, value_name = "[SCOPE=]PATH", env = "OUTHAUL_CREDENTIAL_HELPER")]
    pub credential_helper: Vec<String>,

    #[command(flatten)]
    google: GoogleArgs,

    /// Do not read ~/.netrc, or the file that NETRC names
    #[arg(long, env = "OUTHAUL_NO_NETRC")]
    pub no_netrc: bool,

    /// Use zstd if the server offers it and measurements show that it makes transfers faster
    #[arg(long, value_name = "BOOL", env = "OUTHAUL_REMOTE_CACHE_COMPRESSION", default_value_t = true,
          action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub remote_cache_compression: bool,

    /// HTTP/2 connections to the remote cache [default: 4], or HTTP/1.1 connections to an HTTP cache [default: 100]
    #[arg(long, value_name = "N", env = "OUTHAUL_REMOTE_MAX_CONNECTIONS")]
    pub remote_max_connections: Option<usize>,

    /// Unix socket through which an HTTP cache is reached, as unix:PATH
    #[arg(long, value_name = "unix:PATH", env = "OUTHAUL_REMOTE_PROXY")]
    pub remote_proxy: Option<String>,

    /// How often to retry a failed request
    #[arg(long, value_name = "N", env = "OUTHAUL_REMOTE_RETRIES", default_value_t = 5)]
    pub remote_retries: u32,

    /// Longest delay before a retry
    #[arg(
        long,
        value_name = "DURATION",
        env = "OUTHAUL_REMOTE_RETRY_MAX_DELAY",
        default_value = "5s"
    )]
    pub remote_retry_max_delay: String,

    /// How long a request may make no progress before it is cancelled and retried
    #[arg(
        long,
        value_name = "DURATION",
        env = "OUTHAUL_REMOTE_TIMEOUT",
        default_value = "60s"
    )]
    pub remote_timeout: String,

    /// Digest function to assume where a digest does not name one: sha256, sha384, sha512, sha1, md5 or blake3
    #[arg(
        long,
        value_name = "FUNCTION",
        env = "OUTHAUL_DIGEST_FUNCTION",
        default_value = "sha256"
    )]
    pub digest_function: String,

    /// Whether the upstream event service uses the TLS files; a cache that is not encrypted may stand beside it then.
    #[arg(skip)]
    pub(super) tls_for_upstream: bool,
}

/// Flags of TLS for what we connect to.
#[derive(Debug, Clone, Args)]
pub(crate) struct TlsArgs {
    /// PEM file of the certificate authorities that may sign the server's certificate
    #[arg(long, value_name = "FILE", env = "OUTHAUL_TLS_CERTIFICATE")]
    pub tls_certificate: Option<PathBuf>,

    /// PEM file of the client certificate
    #[arg(long, value_name = "FILE", env = "OUTHAUL_TLS_CLIENT_CERTIFICATE")]
    pub tls_client_certificate: Option<PathBuf>,

    /// PEM file of the client certificate's key
    #[arg(long, value_name = "FILE", env = "OUTHAUL_TLS_CLIENT_KEY")]
    pub tls_client_key: Option<PathBuf>,
}

impl TlsArgs {
    /// The files.
    pub(crate) fn files(&self) -> TlsFiles {
        TlsFiles {
            certificate: self.tls_certificate.clone(),
            client_certificate: self.tls_client_certificate.clone(),
            client_key: self.tls_client_key.clone(),
        }
    }
}

/// Flags of Google's credentials.
#[derive(Debug, Clone, Args)]
struct GoogleArgs {
    /// File with Google's credentials, for hosts without a credential helper
    #[arg(long, value_name = "FILE", env = "OUTHAUL_GOOGLE_CREDENTIALS")]
    google_credentials: Option<PathBuf>,

    /// Use Google's application default credentials
    #[arg(long, env = "OUTHAUL_GOOGLE_DEFAULT_CREDENTIALS")]
    google_default_credentials: bool,

    /// OAuth scopes to request with Google's credentials
    #[arg(
        long,
        value_name = "LIST",
        env = "OUTHAUL_GOOGLE_AUTH_SCOPES",
        default_value = DEFAULT_SCOPE,
        value_delimiter = ','
    )]
    google_auth_scopes: Vec<String>,
}

impl GoogleArgs {
    /// The credentials, if they are asked for.
    fn google(&self) -> Option<Google> {
        let is_asked_for = self.google_credentials.is_some() || self.google_default_credentials;
        is_asked_for.then(|| Google {
            file: self.google_credentials.clone(),
            scopes: self.google_auth_scopes.clone(),
        })
    }
}

impl CacheArgs {
    /// Whether a cache is named outright.
    pub(crate) fn names_a_cache(&self) -> bool {
        !self.is_from_build() && (!self.remote_cache.is_empty() || self.disk_cache.is_some())
    }

    /// Checks the addresses of a flag before anything is said of them: what stands before a comma in a password would not
    /// be known as one, and what follows one in a path would be another server.
    fn check_addresses(flag: &str, urls: &[String]) -> Result<(), ConfigError> {
        let has_scheme = |url: &String| {
            let begins = ["unix:", "dns:"].iter().any(|scheme| url.starts_with(scheme));
            begins || url.contains("://") || url == FROM_BUILD
        };
        if urls.len() > 1 && !urls.iter().all(has_scheme) {
            return Err(ConfigError::new(
                flag,
                "of several addresses, one has no scheme (such as grpcs://); a comma separates addresses, write %2C for \
                 one that does not",
            ));
        }
        Ok(())
    }

    fn is_from_build(&self) -> bool {
        self.remote_cache.iter().any(|url| url == FROM_BUILD)
    }

    /// The options for `--disk-cache`.
    fn disk_cache(&self) -> Result<Option<RemoteOptions>, ConfigError> {
        let Some(directory) = &self.disk_cache else {
            return Ok(None);
        };
        let error = |reason: &str| ConfigError::new(format!("--disk-cache={}", directory.display()), reason);
        // No shell expands it after a `=`, and Bazel does.
        let path = match directory.strip_prefix("~") {
            Ok(below) => std::env::home_dir()
                .ok_or_else(|| error("there is no home directory; write the whole path"))?
                .join(below),
            Err(_) => std::path::absolute(directory).map_err(|e| error(&e.to_string()))?,
        };
        let endpoint = Endpoint::directory(path).ok_or_else(|| error("not a directory's path"))?;
        Ok(Some(self.options(endpoint)?))
    }

    /// The options for one endpoint.
    fn options(&self, endpoint: Endpoint) -> Result<RemoteOptions, ConfigError> {
        let mut options = RemoteOptions::new(endpoint);
        self.remote_instance_name.clone_into(&mut options.instance_name);
        options.connect.headers = self
            .remote_header
            .iter()
            .map(|text| Header::parse("--remote-header", text))
            .collect::<Result<_, RemoteError>>()?;
        options.connect.tls = self.tls.files();
        options
            .connect
            .credential_helpers
            .clone_from(&self.credential_helper);
        options.connect.google = self.google.google();
        options.connect.google.as_ref().map_or(Ok(()), Google::check)?;
        options.connect.no_netrc = self.no_netrc;
        let proxy = self.proxy()?;
        options.connect.proxy = proxy.filter(|_| options.connect.endpoint.is_http());
        options.compression = if self.remote_cache_compression {
            Compression::WherePaying
        } else {
            Compression::Never
        };
        options.connections = self.remote_max_connections;
        options.retries = self.remote_retries;
        options.max_retry_delay = duration("--remote-retry-max-delay", &self.remote_retry_max_delay)?;
        options.stall_timeout = duration("--remote-timeout", &self.remote_timeout)?;
        options.digest_function = parsed("--digest-function", &self.digest_function)?;
        options.touch = !self.no_disk_cache_touch;
        options.forbidden_is_missing = self.forbidden_is_missing;
        options.connect.workspace = std::env::current_dir().ok();
        Ok(options)
    }

    /// The socket of `--remote-proxy`.
    fn proxy(&self) -> Result<Option<PathBuf>, ConfigError> {
        let Some(text) = &self.remote_proxy else {
            return Ok(None);
        };
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(Some(path.into())),
            _ => Err(ConfigError::new(
                format!("--remote-proxy={text}"),
                "must be the absolute path of a unix socket: unix:/PATH",
            )),
        }
    }

    /// The options for an HTTP cache, with the credentials of its URL or of the user's `.netrc`.
    fn http_options(&self, url: &str) -> Result<RemoteOptions, ConfigError> {
        let (address, user_info) = split_user_info(url);
        let mut options = self.options(Endpoint::parse_cache("--remote-cache", &address)?)?;
        let is_known = has_helper(&options.connect) || options.connect.google.is_some();
        add_login(user_info, is_known, &mut options);
        Ok(options)
    }

    /// The caches that are named outright, in the order in which they are asked.
    ///
    /// # Errors
    /// Naming the flag that is missing or wrong.
    pub(crate) fn cache(&self) -> Result<SourceCache, ConfigError> {
        Self::check_addresses("--remote-cache", &self.remote_cache)?;
        let mut chain: Vec<RemoteOptions> = self.disk_cache()?.into_iter().collect();
        for url in self.remote_cache.iter().filter(|url| *url != FROM_BUILD) {
            let options = if is_http(url) {
                self.http_options(url)?
            } else {
                self.options(Endpoint::parse_cache("--remote-cache", url)?)?
            };
            let endpoint = &options.connect.endpoint;
            if !chain.iter().any(|other| other.connect.endpoint == *endpoint) {
                chain.push(options);
            }
        }
        if chain.is_empty() {
            return Err(ConfigError::new(
                "--remote-cache",
                "is required: grpc://HOST:PORT, grpcs://HOST, unix:PATH, http(s)://HOST[/PREFIX], file:///DIR or a bucket",
            ));
        }
        if chain.len() > Chain::MOST {
            return Err(ConfigError::new(
                "--remote-cache",
                format!(
                    "{} caches are given; at most {} are allowed",
                    chain.len(),
                    Chain::MOST
                ),
            ));
        }
        let is_tls = |options: &RemoteOptions| options.connect.endpoint.is_tls();
        let files_are_for_another = self.tls_for_upstream || chain.iter().any(is_tls);
        for options in &mut chain {
            let is_directory = options.connect.endpoint.directory_path().is_some();
            if !is_tls(options) && (files_are_for_another || is_directory) {
                options.connect.tls = TlsFiles::default();
            }
        }
        Ok(SourceCache::chain(chain)?)
    }

    /// How servers are reached that have archives: with the same patience as the remote cache, and with credentials, but
    /// without the headers that are for the remote cache alone. `most` is how many bytes may come of a file whose size nobody
    /// says.
    ///
    /// # Errors
    /// Naming the flag that is wrong.
    pub(crate) fn archive_access(&self, most: u64) -> Result<crate::collection::Access, ConfigError> {
        use crate::remote::retry::{RetryPolicy, SystemTimer};
        // The address is replaced before it is used.
        let options = self.options(Endpoint::parse("--remote-cache", "grpc://localhost:1")?)?;
        let timer = std::sync::Arc::new(SystemTimer);
        Ok(crate::collection::Access {
            patience: crate::collection::Patience {
                retry: RetryPolicy::new(options.retries, options.max_retry_delay, timer),
                idle: options.stall_timeout,
                most,
            },
            options,
        })
    }

    /// How collections are reached that are staged from.
    ///
    /// # Errors
    /// Naming the flag that is wrong.
    pub(crate) fn archives(&self) -> Result<crate::stage::Archives, ConfigError> {
        let most = crate::archive::Limits::default()[crate::archive::Limit::Bytes];
        self.archive_access(most).map(crate::stage::Archives::new)
    }

    /// The rule by which builds find their cache. Without `--remote-cache` it is the build's own if `trusted`: the
    /// stream is of the user's own command or file.
    ///
    /// # Errors
    /// Naming the flag that is missing or wrong.
    pub(crate) fn source_rule(&self, trusted: bool) -> Result<SourceRule, ConfigError> {
        let from_build = self.is_from_build();
        if from_build && self.remote_cache.len() > 1 {
            return Err(ConfigError::new(
                "--remote-cache=from-build",
                "cannot be combined with other addresses; use --disk-cache for a disk cache before the build's own",
            ));
        }
        let is_open = trusted && self.remote_cache.is_empty();
        if !from_build && !is_open {
            return Ok(SourceRule::Fixed(self.cache()?));
        }
        Self::check_addresses("--allow-remote-cache", &self.allow_remote_cache)?;
        let allowed = self
            .allow_remote_cache
            .iter()
            .map(|url| Endpoint::parse_cache("--allow-remote-cache", url))
            .collect::<Result<Vec<_>, RemoteError>>()?;
        if !trusted && allowed.is_empty() {
            return Err(ConfigError::new(
                "--remote-cache=from-build",
                "requires --allow-remote-cache: an event stream alone is not trusted to choose the remote cache",
            ));
        }
        // The template's address is replaced before it is used.
        let placeholder = Endpoint::parse("--remote-cache", "grpc://localhost:1")?;
        Ok(SourceRule::FromBuild {
            template: Box::new(self.options(placeholder)?),
            before: self.disk_cache()?.into_iter().collect(),
            allowed: (!allowed.is_empty()).then_some(allowed),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        cache: CacheArgs,
    }

    fn rule(args: &[&str], trusted: bool) -> Result<SourceRule, ConfigError> {
        let cli = Cli::parse_from(std::iter::once("outhaul").chain(args.iter().copied()));
        cli.cache.source_rule(trusted)
    }

    #[test]
    fn wrong_values_name_their_flag() {
        for (args, part) in [
            (vec![], "--remote-cache"),
            (vec!["--remote-cache=ftp://x"], "--remote-cache"),
            (vec!["--remote-cache=http://x/y?z"], "query"),
            (
                vec!["--remote-cache=http://x", "--remote-proxy=x:1"],
                "--remote-proxy=x:1",
            ),
            (
                vec!["--remote-cache=http://x", "--tls-certificate=/x"],
                "use https://",
            ),
            (vec!["--remote-cache=from-build"], "--allow-remote-cache"),
            (
                vec!["--remote-cache=from-build", "--remote-cache=grpc://h:1"],
                "--disk-cache",
            ),
            (vec!["--remote-cache=file://h/x"], "file:///DIR"),
            (vec!["--remote-cache=grpcs://me:a,b@h"], "%2C"),
            (vec!["--remote-cache=file:///d,b"], "%2C"),
            (vec!["--remote-cache=http://h/a,b:80"], "--remote-cache"),
            (
                vec!["--remote-cache=h:1", "--remote-cache=grpc://h:2"],
                "no scheme",
            ),
            (
                vec!["--remote-cache=from-build", "--allow-remote-cache=http://h/a,b"],
                "--allow-remote-cache",
            ),
            (
                vec!["--remote-cache=grpc://h:1", "--remote-header=x"],
                "--remote-header",
            ),
            (
                vec!["--remote-cache=grpc://h:1", "--remote-timeout=x"],
                "--remote-timeout",
            ),
            (
                vec!["--remote-cache=grpc://h:1", "--digest-function=x"],
                "--digest-function",
            ),
            (
                vec!["--remote-cache=grpc://h:1", "--tls-client-key=/k"],
                "--tls-client-key",
            ),
        ] {
            let error = rule(&args, false).err().expect("wrong").to_string();
            assert!(error.contains(part), "{args:?}: {error}");
        }
    }

    #[test]
    fn several_caches_are_a_chain_with_directories_first() {
        let endpoint = |args: &[&str]| match rule(args, false).expect("a chain") {
            SourceRule::Fixed(cache) => cache.endpoint,
            SourceRule::FromBuild { .. } => String::new(),
        };
        assert_eq!(
            endpoint(&[
                "--remote-cache=grpc://b:1,file:///d b",
                "--remote-cache=grpcs://a",
                "--remote-cache=grpc://b:1",
                "--disk-cache=/d/a",
            ]),
            "file:///d/a file:///d%20b grpc://b:1 grpcs://a:443"
        );
        assert_eq!(endpoint(&["--disk-cache=/d"]), "file:///d");
        let many: Vec<String> = (1..=17)
            .map(|port| format!("--remote-cache=grpc://h:{port}"))
            .collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let error = rule(&many, false).err().expect("too many").to_string();
        assert!(error.contains("at most 16 are allowed"), "{error}");
    }

    #[test]
    fn a_disk_cache_of_ours_stands_before_the_builds_own() {
        for (args, trusted) in [
            (vec!["--disk-cache=/d"], true),
            (
                vec![
                    "--disk-cache=/d",
                    "--remote-cache=from-build",
                    "--allow-remote-cache=grpc://h:1",
                ],
                false,
            ),
        ] {
            match rule(&args, trusted) {
                Ok(SourceRule::FromBuild { before, .. }) => assert_eq!(before.len(), 1),
                _ => panic!("{args:?}"),
            }
        }
    }

    #[test]
    fn a_trusted_stream_may_name_the_cache() {
        assert!(matches!(
            rule(&[], true),
            Ok(SourceRule::FromBuild { allowed: None, .. })
        ));
        let args = ["--remote-cache=from-build", "--allow-remote-cache=grpc://h:1"];
        assert!(matches!(
            rule(&args, false),
            Ok(SourceRule::FromBuild { allowed: Some(_), .. })
        ));
    }
}
