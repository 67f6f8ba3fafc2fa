//! Where a store's credentials come from: the environment, files and the machine, in the order of the providers' own tools.
//!
//! What decides is whether anything is configured. If nothing is, requests go without credentials (`anonymous=auto`), and
//! no metadata service is asked that is not there: away from its provider, that takes a minute to fail.

use std::{
    fmt, fs,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use object_store::{
    ClientOptions, CredentialProvider, ObjectStore, RetryConfig, StaticCredentialProvider,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GcpCredential, GoogleCloudStorageBuilder},
};

use super::{
    fault::explain,
    profile::{Files, ProfileError, Provider},
    service::Connector,
};
use crate::{
    remote::RemoteOptions,
    transport::{
        BucketAddress, Google, RemoteError, RemoteErrorKind,
        bucket::{Anonymous, Provider as Of},
    },
};

/// The account of Azure's emulator, and its key, which are the same everywhere (Azurite's documentation).
const EMULATOR: (&str, &str) = (
    "devstoreaccount1",
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
);

/// What credentials are called that are none.
const NONE: &str = "no credentials";
/// What Azure's key is called.
const ACCOUNT_KEY: &str = "the account's key";
/// The variables that together name a web identity of AWS.
const WEB_IDENTITY: [&str; 2] = ["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"];

/// The value of a variable, if it is set.
type Variables = Box<dyn Fn(&str) -> Option<String> + Send + Sync>;

/// The variables that are set, and what the machine says that it is. No `Debug`: variables may be secrets.
pub(super) struct Environment {
    get: Variables,
    /// The directory with the machine's vendor and the like: `/sys/class/dmi/id`.
    machine: PathBuf,
}

impl Environment {
    /// This process's.
    pub(super) fn of_process() -> Self {
        Self {
            get: Box::new(|name| std::env::var(name).ok()),
            machine: "/sys/class/dmi/id".into(),
        }
    }

    #[cfg(test)]
    pub(super) fn fake(variables: &[(&str, &str)], machine: &std::path::Path) -> Self {
        let variables: std::collections::HashMap<String, String> = variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        Self {
            get: Box::new(move |name| variables.get(name).cloned()),
            machine: machine.to_owned(),
        }
    }

    /// A variable that is set and not empty.
    pub(super) fn get(&self, name: &str) -> Option<String> {
        (self.get)(name).filter(|value| !value.is_empty())
    }

    /// The first of them.
    fn first(&self, names: &[&str]) -> Option<String> {
        names.iter().find_map(|name| self.get(name))
    }

    fn machine_says(&self, file: &str, word: &str) -> bool {
        fs::read_to_string(self.machine.join(file)).is_ok_and(|text| text.contains(word))
    }
}

/// A store, ready to be asked.
pub(super) struct Opened {
    pub(super) store: Arc<dyn ObjectStore>,
    /// What the credentials are that it is shown, for messages.
    pub(super) shown: &'static str,
    /// Gets the credentials, so that a failure to do so is told from one of the store.
    pub(super) ready: Ready,
    /// Gets them again when they have expired before their time.
    pub(super) profile: Option<Arc<Provider>>,
}

impl Opened {
    pub(super) fn is_anonymous(&self) -> bool {
        self.shown == NONE
    }
}

type Readying = Pin<Box<dyn Future<Output = object_store::Result<()>> + Send>>;
pub(super) type Ready = Box<dyn Fn() -> Readying + Send + Sync>;

fn ready<P: CredentialProvider + ?Sized + 'static>(provider: &Arc<P>) -> Ready {
    let provider = Arc::clone(provider);
    Box::new(move || {
        let provider = Arc::clone(&provider);
        Box::pin(async move { provider.get_credential().await.map(|_| ()) })
    })
}

/// The same, if these are credentials at all.
fn if_any<P: CredentialProvider + ?Sized + 'static>(shown: &str, provider: &Arc<P>) -> Ready {
    if shown == NONE { nothing() } else { ready(provider) }
}

fn nothing() -> Ready {
    Box::new(|| Box::pin(async { Ok(()) }))
}

fn no_retries() -> RetryConfig {
    RetryConfig {
        max_retries: 0,
        ..RetryConfig::default()
    }
}

/// Opens the options' bucket. Connects nothing yet.
///
/// # Errors
/// When the credentials that are configured cannot be used.
pub(super) fn open(
    options: &RemoteOptions,
    address: &BucketAddress,
    environment: &Environment,
) -> Result<Opened, RemoteError> {
    let connector = Connector::new(options)?;
    match address.provider {
        Of::S3 => s3(options, address, environment, connector),
        Of::Gcs => gcs(options, address, environment, connector),
        Of::Azure => azure(options, address, environment, connector),
    }
}

fn wrong(address: &BucketAddress, reason: impl fmt::Display) -> RemoteError {
    RemoteError::config(format!("credentials for {address}"), reason.to_string())
}

fn built<T>(address: &BucketAddress, store: object_store::Result<T>) -> Result<T, RemoteError> {
    store.map_err(|e| RemoteError {
        kind: RemoteErrorKind::Config,
        ..explain(address.to_string(), &e)
    })
}

fn s3(
    options: &RemoteOptions,
    address: &BucketAddress,
    environment: &Environment,
    connector: Connector,
) -> Result<Opened, RemoteError> {
    let files = Files::new(environment);
    let profile = match files.read() {
        Err(_) if address.anonymous == Anonymous::Yes => None,
        profile => profile.map_err(|e: ProfileError| wrong(address, e))?,
    };
    let endpoint = address
        .endpoint
        .clone()
        .or_else(|| environment.first(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]));
    let region = address
        .region
        .clone()
        .or_else(|| environment.first(&["AWS_REGION", "AWS_DEFAULT_REGION"]))
        .or_else(|| profile.as_ref()?.region().map(str::to_owned))
        .unwrap_or_else(|| "us-east-1".to_owned());
    let plain = endpoint.as_ref().is_some_and(|url| url.starts_with("http://"));
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(&address.bucket)
        .with_region(&region)
        .with_retry(no_retries())
        .with_client_options(ClientOptions::new().with_allow_http(plain))
        .with_http_connector(connector);
    // Certificates are for one level of names, and other servers' buckets have none.
    let in_path = address
        .path_style
        .unwrap_or(endpoint.is_some() || address.bucket.contains('.'));
    builder = builder.with_virtual_hosted_style_request(!in_path);
    if let Some(url) = endpoint {
        let url = match url.split_once("://") {
            Some((scheme, host)) if !in_path => format!("{scheme}://{}.{host}", address.bucket),
            _ => url,
        };
        builder = builder.with_endpoint(url);
    }
    let (mut shown, mut provider) = (NONE, None);
    let keys = (
        environment.get("AWS_ACCESS_KEY_ID"),
        environment.get("AWS_SECRET_ACCESS_KEY"),
    );
    let has = |names: &[&str]| names.iter().all(|name| environment.get(name).is_some());
    let has_profile = match &profile {
        Some(profile)
            if address.anonymous != Anonymous::Yes && keys == (None, None) && !has(&WEB_IDENTITY) =>
        {
            profile.has_credentials().map_err(|e| wrong(address, e))?
        }
        _ => false,
    };
    let set = |mut builder: AmazonS3Builder, pairs: &[(AmazonS3ConfigKey, &str)]| {
        for (key, variable) in pairs {
            if let Some(value) = environment.get(variable) {
                builder = builder.with_config(*key, value);
            }
        }
        builder
    };
    if address.anonymous == Anonymous::Yes {
        builder = builder.with_skip_signature(true);
    } else if let (Some(id), Some(secret)) = &keys {
        shown = "the keys in the environment";
        builder = builder.with_access_key_id(id).with_secret_access_key(secret);
        if let Some(token) = environment.get("AWS_SESSION_TOKEN") {
            builder = builder.with_token(token);
        }
    } else if keys != (None, None) {
        return Err(wrong(
            address,
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must both be set",
        ));
    } else if has(&WEB_IDENTITY) {
        shown = "a web identity";
        builder = set(
            builder,
            &[
                (
                    AmazonS3ConfigKey::WebIdentityTokenFile,
                    "AWS_WEB_IDENTITY_TOKEN_FILE",
                ),
                (AmazonS3ConfigKey::RoleArn, "AWS_ROLE_ARN"),
                (AmazonS3ConfigKey::RoleSessionName, "AWS_ROLE_SESSION_NAME"),
                (AmazonS3ConfigKey::StsEndpoint, "AWS_ENDPOINT_URL_STS"),
            ],
        );
    } else if has_profile {
        shown = "a profile of the AWS files";
        let of_profile = Arc::new(Provider::new(files, options.connect.credential_helper_timeout));
        builder = builder.with_credentials(of_profile.clone());
        provider = Some(of_profile);
    } else if has(&["AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"])
        || has(&[
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
        ])
    {
        shown = "the container's role";
        builder = set(
            builder,
            &[
                (
                    AmazonS3ConfigKey::ContainerCredentialsRelativeUri,
                    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
                ),
                (
                    AmazonS3ConfigKey::ContainerCredentialsFullUri,
                    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
                ),
                (
                    AmazonS3ConfigKey::ContainerAuthorizationTokenFile,
                    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
                ),
            ],
        );
    } else if address.anonymous == Anonymous::No || is_ec2(environment) {
        shown = "the machine's role";
    } else {
        builder = builder.with_skip_signature(true);
    }
    let store = built(address, builder.build())?;
    Ok(Opened {
        ready: if_any(shown, store.credentials()),
        store: Arc::new(store),
        shown,
        profile: provider,
    })
}

/// Whether this is a machine of Amazon's with a metadata service (EC2's guide, "Detect whether a host is an EC2 instance").
fn is_ec2(environment: &Environment) -> bool {
    let disabled = environment.get("AWS_EC2_METADATA_DISABLED");
    !disabled.is_some_and(|value| value.eq_ignore_ascii_case("true"))
        && (environment.machine_says("sys_vendor", "Amazon EC2")
            || environment.machine_says("product_uuid", "ec2"))
}

/// Whether the bucket is at Google, or on this machine.
fn is_googles(options: &RemoteOptions, address: &BucketAddress) -> bool {
    let host = address.host().unwrap_or_default();
    address.endpoint.is_none()
        || options.connect.endpoint.is_local()
        || host == "googleapis.com"
        || host.ends_with(".googleapis.com")
}

fn gcs(
    options: &RemoteOptions,
    address: &BucketAddress,
    environment: &Environment,
    connector: Connector,
) -> Result<Opened, RemoteError> {
    let google = match (&options.connect.google, address.anonymous) {
        (_, Anonymous::Yes) => None,
        (Some(google), _) => Some(google.clone()),
        // Nobody has said that another server may have the user's own token.
        (None, Anonymous::Auto) if !is_googles(options, address) => None,
        (None, anonymous) => {
            let default = Google {
                file: None,
                scopes: vec![crate::transport::google::DEFAULT_SCOPE.to_owned()],
            };
            // What is configured and wrong is an error, not a reason to go without.
            let configured = environment.get("GOOGLE_APPLICATION_CREDENTIALS").is_some();
            match default.check() {
                Ok(()) => Some(default),
                Err(error) if configured || anonymous == Anonymous::No => return Err(error),
                Err(_) => None,
            }
        }
    };
    // A token is a password: it is not sent in clear, but to this machine.
    let clear = !address.is_tls() && !options.connect.endpoint.is_local();
    if clear && google.is_some() {
        if options.connect.google.is_some() || address.anonymous == Anonymous::No {
            return Err(wrong(
                address,
                "tokens are not sent unencrypted: use https:// in endpoint=",
            ));
        }
        tracing::debug!("{address} is not encrypted: asking without credentials");
    }
    let google = google.filter(|_| !clear);
    let mut builder = GoogleCloudStorageBuilder::new()
        .with_bucket_name(&address.bucket)
        .with_retry(no_retries())
        .with_client_options(ClientOptions::new().with_allow_http(!address.is_tls()))
        .with_http_connector(connector)
        .with_skip_signature(google.is_none());
    if let Some(url) = &address.endpoint {
        builder = builder.with_base_url(url);
    }
    let (shown, ready, builder) = match google {
        Some(google) => {
            let tokens = Arc::new(Tokens {
                google,
                known: Mutex::new(None),
            });
            let ready = ready(&tokens);
            ("Google's credentials", ready, builder.with_credentials(tokens))
        }
        None => {
            let bearer = String::new();
            let none = StaticCredentialProvider::new(GcpCredential { bearer });
            (NONE, nothing(), builder.with_credentials(Arc::new(none)))
        }
    };
    Ok(Opened {
        store: Arc::new(built(address, builder.build())?),
        shown,
        ready,
        profile: None,
    })
}

/// Google's tokens, as the rest of the program gets them.
struct Tokens {
    google: Google,
    known: Mutex<Option<(Arc<GcpCredential>, Instant)>>,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tokens")
    }
}

impl Tokens {
    async fn credential(&self) -> object_store::Result<Arc<GcpCredential>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((credential, _)) = known.filter(|(_, until)| *until > Instant::now()) {
            return Ok(credential);
        }
        let (headers, kept) = self
            .google
            .headers()
            .await
            .map_err(|e| object_store::Error::Generic {
                store: "GCS",
                source: Box::new(e),
            })?;
        let bearer = headers.iter().find(|header| header.name() == "authorization");
        let bearer = bearer.and_then(|header| header.value().strip_prefix("Bearer "));
        let bearer = bearer.unwrap_or_default().to_owned();
        let credential = Arc::new(GcpCredential { bearer });
        let until = Instant::now() + kept.max(Duration::from_secs(1));
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some((credential.clone(), until));
        Ok(credential)
    }
}

type Given<'a> = Pin<Box<dyn Future<Output = object_store::Result<Arc<GcpCredential>>> + Send + 'a>>;

impl CredentialProvider for Tokens {
    type Credential = GcpCredential;

    fn get_credential<'life0, 'async_trait>(&'life0 self) -> Given<'async_trait>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        Box::pin(self.credential())
    }
}

fn azure(
    options: &RemoteOptions,
    address: &BucketAddress,
    environment: &Environment,
    connector: Connector,
) -> Result<Opened, RemoteError> {
    let connection = environment
        .get("AZURE_STORAGE_CONNECTION_STRING")
        .unwrap_or_default();
    let connected = |name: &str| {
        let mut pairs = connection.split(';').filter_map(|pair| pair.split_once('='));
        pairs
            .find(|(key, _)| key.trim() == name)
            .map(|(_, value)| value.to_owned())
    };
    let account = address
        .account
        .clone()
        .or_else(|| environment.first(&["AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME"]))
        .or_else(|| connected("AccountName"))
        .ok_or_else(|| {
            wrong(
                address,
                "no storage account: add account= or set AZURE_STORAGE_ACCOUNT",
            )
        })?;
    let endpoint = address.endpoint.clone().or_else(|| connected("BlobEndpoint"));
    let plain = endpoint.as_ref().is_some_and(|url| url.starts_with("http://"));
    let mut builder = MicrosoftAzureBuilder::new()
        .with_container_name(&address.bucket)
        .with_account(&account)
        .with_retry(no_retries())
        .with_client_options(ClientOptions::new().with_allow_http(plain))
        .with_http_connector(connector);
    if let Some(url) = endpoint {
        builder = builder.with_endpoint(url);
    }
    let names = [
        "AZURE_STORAGE_KEY",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_ACCESS_KEY",
    ];
    let key = environment
        .first(&names)
        .or_else(|| connected("AccountKey"))
        .or_else(|| (account == EMULATOR.0 && plain).then(|| EMULATOR.1.to_owned()));
    let sas = environment
        .first(&["AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY"])
        .or_else(|| connected("SharedAccessSignature"));
    let has = |names: &[&str]| names.iter().all(|name| environment.get(name).is_some());
    let mut set = |pairs: &[(AzureConfigKey, &str)]| {
        for (key, variable) in pairs {
            if let Some(value) = environment.get(variable) {
                builder = std::mem::take(&mut builder).with_config(*key, value);
            }
        }
    };
    let application = [
        (AzureConfigKey::ClientId, "AZURE_CLIENT_ID"),
        (AzureConfigKey::AuthorityId, "AZURE_TENANT_ID"),
        (AzureConfigKey::AuthorityHost, "AZURE_AUTHORITY_HOST"),
    ];
    let shown = if address.anonymous == Anonymous::Yes {
        builder = builder.with_skip_signature(true);
        NONE
    } else if let Some(sas) = sas {
        // A signature is narrower than the account's key: anyone who sets both means it.
        builder = builder.with_config(AzureConfigKey::SasKey, sas);
        "the shared access signature in the environment"
    } else if let Some(key) = key {
        builder = builder.with_access_key(key);
        ACCOUNT_KEY
    } else if has(&["AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_FEDERATED_TOKEN_FILE"]) {
        set(&application);
        set(&[(AzureConfigKey::FederatedTokenFile, "AZURE_FEDERATED_TOKEN_FILE")]);
        "a workload identity"
    } else if has(&["AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_CLIENT_SECRET"]) {
        set(&application);
        set(&[(AzureConfigKey::ClientSecret, "AZURE_CLIENT_SECRET")]);
        "an application's secret"
    } else if address.anonymous == Anonymous::No
        || environment.machine_says("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77")
    {
        set(&application);
        "the machine's identity"
    } else {
        builder = builder.with_skip_signature(true);
        NONE
    };
    // The account's key signs; all others are as good as a password, which is not sent in clear but to this machine.
    if plain && ![NONE, ACCOUNT_KEY].contains(&shown) && !options.connect.endpoint.is_local() {
        return Err(wrong(
            address,
            format_args!("{shown} is not sent unencrypted: use https:// in endpoint=, or add anonymous=yes"),
        ));
    }
    let store = built(address, builder.build())?;
    Ok(Opened {
        ready: if_any(shown, store.credentials()),
        store: Arc::new(store),
        shown,
        profile: None,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::transport::Endpoint;

    /// What a bucket is read with, in an environment; or the error.
    fn with(url: &str, variables: &[(&str, &str)], machine: &Path) -> Result<&'static str, String> {
        let endpoint = Endpoint::parse_cache("--remote-cache", url).unwrap();
        let options = RemoteOptions::new(endpoint);
        let environment = Environment::fake(variables, machine);
        let address = options.connect.endpoint.bucket().unwrap().clone();
        open(&options, &address, &environment)
            .map(|opened| opened.shown)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn credentials_are_found_in_the_order_of_the_providers_tools() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        let nowhere = dir.path().join("none");
        fs::create_dir(dir.path().join("aws")).unwrap();
        fs::write(dir.path().join("aws/sys_vendor"), "Amazon EC2\n").unwrap();
        fs::create_dir(dir.path().join("azure")).unwrap();
        let tag = "7783-7084-3265-9085-8269-3286-77\n";
        fs::write(dir.path().join("azure/chassis_asset_tag"), tag).unwrap();
        let file = dir.path().join("credentials");
        fs::write(&file, "[default]\naws_access_key_id=a\naws_secret_access_key=b\n").unwrap();
        let keys = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")];
        let web = [("AWS_WEB_IDENTITY_TOKEN_FILE", "/t"), ("AWS_ROLE_ARN", "r")];
        let profile = [("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap())];
        let ecs = [("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/x")];
        let all = [&keys[..], &web, &profile, &ecs, &[("HOME", home)]].concat();
        for (url, variables, expected) in [
            ("s3://b", &all[..], "the keys in the environment"),
            ("s3://b", &all[2..], "a web identity"),
            ("s3://b", &all[4..], "a profile of the AWS files"),
            ("s3://b", &all[5..], "the container's role"),
            ("s3://b", &all[6..], "no credentials"),
            ("s3://b?anonymous=no", &all[6..], "the machine's role"),
            ("s3://b?anonymous=yes", &all[..], "no credentials"),
            ("az://c?account=a", &[], "no credentials"),
            ("az://c?account=a&anonymous=no", &[], "the machine's identity"),
            (
                "az://c?account=a",
                &[("AZURE_STORAGE_KEY", "a2V5")],
                "the account's key",
            ),
            (
                "az://c",
                &[(
                    "AZURE_STORAGE_CONNECTION_STRING",
                    "AccountName=a;AccountKey=YWI=;X=y",
                )],
                "the account's key",
            ),
            (
                "az://c?account=a",
                &[
                    ("AZURE_STORAGE_KEY", "a2V5"),
                    ("AZURE_STORAGE_SAS_TOKEN", "?sv=1&sig=x"),
                ],
                "the shared access signature in the environment",
            ),
            (
                "az://c?endpoint=http://127.0.0.1:1/devstoreaccount1&account=devstoreaccount1",
                &[],
                "the account's key",
            ),
        ] {
            assert_eq!(with(url, variables, &nowhere), Ok(expected), "{url}");
        }
        assert_eq!(
            with("s3://b", &[], &dir.path().join("aws")),
            Ok("the machine's role")
        );
        let disabled = [("AWS_EC2_METADATA_DISABLED", "true")];
        assert_eq!(
            with("s3://b", &disabled, &dir.path().join("aws")),
            Ok("no credentials")
        );
        let azure = with("az://c?account=a", &[], &dir.path().join("azure"));
        assert_eq!(azure, Ok("the machine's identity"));
    }

    #[test]
    fn half_of_the_credentials_are_an_error_that_shows_none() {
        let dir = tempfile::tempdir().unwrap();
        for (url, variables, part) in [
            (
                "s3://b",
                &[("AWS_SECRET_ACCESS_KEY", "s3cret")][..],
                "must both be set",
            ),
            (
                "s3://b",
                &[("AWS_PROFILE", "p"), ("HOME", "/nonexistent")],
                "no profile p",
            ),
            ("az://c", &[("AZURE_STORAGE_KEY", "s3cret")], "no storage account"),
            (
                "az://c?account=a",
                &[("AZURE_STORAGE_KEY", "s3cret*")],
                "az://c?account=a",
            ),
        ] {
            let error = with(url, variables, dir.path()).unwrap_err();
            assert!(error.contains(part) && !error.contains("s3cret"), "{error}");
        }
    }
}
