//! Where a store's credentials come from: the environment, files and the machine, in the order of the providers' own tools.
//!
//! What decides is whether anything is configured. If nothing is, requests go without credentials (`anonymous=auto`), and
//! no metadata service is asked that is not there: away from its provider, that takes a minute to fail.

mod azure;
mod container;
mod gcs;
mod s3;

use std::{fmt, fs, path::PathBuf, pin::Pin, str::FromStr, sync::Arc, time::Instant};

use object_store::{CredentialProvider, ObjectStore, RetryConfig, list::PaginatedListStore};
use parking_lot::Mutex;
use url::Url;

use super::{fault::explain, profile::Provider, service::Connector};
use crate::{
    remote::RemoteOptions,
    transport::{
        BucketAddress, RemoteError, RemoteErrorKind,
        bucket::{Provider as Of, server_url},
    },
};

/// What missing credentials are called.
const NONE: &str = "no credentials";
/// What the credentials are called that a machine's metadata service gives: Amazon's, Azure's and Google's.
const OF_THE_MACHINE: [&str; 3] = [EC2, "the machine's identity", "the machine's service account"];
/// What those of a machine of Amazon's are called.
const EC2: &str = "the machine's role";

/// Credentials that are good for a while. However many requests wait for them, they are fetched once.
pub(super) struct Kept<T> {
    known: Mutex<Option<(Arc<T>, Instant)>>,
    /// Held while new ones are fetched.
    fetching: tokio::sync::Mutex<()>,
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self {
            known: Mutex::default(),
            fetching: tokio::sync::Mutex::default(),
        }
    }
}

impl<T> Kept<T> {
    /// Those that are still good, or new ones, with the time until which they are.
    pub(super) async fn get<E>(
        &self,
        fetch: impl Future<Output = Result<(T, Instant), E>>,
    ) -> Result<Arc<T>, E> {
        let good = || {
            let known = self.known.lock();
            let known = known.as_ref().filter(|(_, until)| *until > Instant::now());
            known.map(|(credential, _)| Arc::clone(credential))
        };
        if let Some(credential) = good() {
            return Ok(credential);
        }
        let _fetching = self.fetching.lock().await;
        if let Some(credential) = good() {
            return Ok(credential);
        }
        let (credential, until) = fetch.await?;
        let credential = Arc::new(credential);
        *self.known.lock() = Some((Arc::clone(&credential), until));
        Ok(credential)
    }

    /// Fetches new ones when credentials are next asked for.
    pub(super) fn forget(&self) {
        *self.known.lock() = None;
    }
}

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

    /// A variable that is set and not empty, without blanks around it: secrets of CI often end in a line feed.
    pub(super) fn get(&self, name: &str) -> Option<String> {
        let value = (self.get)(name)?;
        Some(value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    /// The first of them.
    pub(super) fn first(&self, names: &[&str]) -> Option<String> {
        names.iter().find_map(|name| self.get(name))
    }

    /// Whether all of them are set.
    fn has(&self, names: &[&str]) -> bool {
        names.iter().all(|name| self.get(name).is_some())
    }

    /// Those of these variables that are set, as settings of the crate's builders, which know them by these names.
    fn settings<K: FromStr>(&self, names: &[&str]) -> Vec<(K, String)> {
        let setting = |name: &&str| Some((name.to_ascii_lowercase().parse().ok()?, self.get(name)?));
        names.iter().filter_map(setting).collect()
    }

    fn machine_says(&self, file: &str, word: &str) -> bool {
        fs::read_to_string(self.machine.join(file)).is_ok_and(|text| text.contains(word))
    }
}

/// A store, ready to be asked.
pub(super) struct Opened {
    pub(super) store: Arc<dyn ObjectStore>,
    /// The same, for its listings by pages.
    pub(super) pages: Arc<dyn PaginatedListStore>,
    /// What the credentials are that it is shown, for messages.
    pub(super) shown: &'static str,
    /// Gets the credentials, so that a failure to do so is distinguished from one of the store.
    pub(super) ready: Ready,
    /// Gets them again when they have expired before their time.
    pub(super) profile: Option<Arc<Provider>>,
}

impl Opened {
    pub(super) fn is_anonymous(&self) -> bool {
        self.shown == NONE
    }

    /// Whether EC2's metadata service is asked: it is near, and answers at once or never. Azure's may take long for a
    /// machine's first token.
    pub(super) fn is_of_ec2(&self) -> bool {
        self.shown == EC2
    }

    /// Whether a machine's metadata service is asked.
    pub(super) fn is_of_the_machine(&self) -> bool {
        OF_THE_MACHINE.contains(&self.shown)
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
        Of::S3 => s3::open(options, address, environment, connector),
        Of::Gcs => gcs::open(options, address, connector),
        Of::Azure => azure::open(address, environment, connector),
    }
}

/// A text that goes into a header or a URL: the crate takes any, and panics where it does not fit.
fn sendable(address: &BucketAddress, name: &str, value: String) -> Result<String, RemoteError> {
    if value.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(value);
    }
    let reason = "contains a blank or another character that cannot be sent";
    Err(wrong(address, format_args!("{name} {reason}")))
}

/// The URL of a server that is not from the address, where `name` says it.
fn server_at(address: &BucketAddress, name: &str, url: &str) -> Result<String, RemoteError> {
    server_url(url).map_err(|reason| wrong(address, format_args!("{name} {reason}")))
}

/// Refuses a server's name that none can have: the crate would panic.
fn check_host(address: &BucketAddress, url: &str) -> Result<(), RemoteError> {
    match Url::parse(url) {
        Ok(_) => Ok(()),
        Err(error) => Err(wrong(address, format_args!("no server can be at {url}: {error}"))),
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use object_store::ObjectStoreExt as _;

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
        let url = "AWS_CONTAINER_CREDENTIALS_FULL_URI";
        let all = [&keys[..], &web, &profile, &ecs, &[("HOME", home)]].concat();
        for (url, variables, expected) in [
            ("s3://b", &all[..], "the keys in the environment"),
            ("s3://b", &all[2..], "a web identity"),
            ("s3://b", &all[4..], "a profile of the AWS files"),
            ("s3://b", &all[5..], "the container's role"),
            ("s3://b", &[(url, "http://localhost:1/x")], "the container's role"),
            (
                "s3://b",
                &[(url, "http://[fd00:ec2::23]/x")],
                "the container's role",
            ),
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
                "az://c",
                &[(
                    "AZURE_STORAGE_CONNECTION_STRING",
                    "BlobEndpoint=http://127.0.0.1:1/a/;SharedAccessSignature=sv=1&sig=x",
                )],
                "the shared access signature in the environment",
            ),
            (
                "az://c?account=other&anonymous=yes",
                &[("AZURE_STORAGE_CONNECTION_STRING", "AccountName=a;AccountKey=YWI=")],
                "no credentials",
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

    /// The crate takes what it is given, and panics when it is asked.
    #[tokio::test]
    async fn what_cannot_be_sent_is_an_error_and_no_panic() {
        const KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "AK"), ("AWS_SECRET_ACCESS_KEY", "s")];
        let here = "s3://b?endpoint=http://127.0.0.1:1";
        let azure = "az://c?endpoint=http://127.0.0.1:1/a";
        let application = [("AZURE_CLIENT_ID", "i"), ("AZURE_CLIENT_SECRET", "s")];
        let with_tenant = |tenant| [application[0], application[1], ("AZURE_TENANT_ID", tenant)].to_vec();
        for (url, variables, part) in [
            (here, vec![("AWS_REGION", "us-east-1\n")], None),
            (here, vec![("AWS_SESSION_TOKEN", " tok\r\n")], None),
            (
                here,
                vec![("AWS_SESSION_TOKEN", "t\u{f6}k")],
                Some("AWS_SESSION_TOKEN"),
            ),
            (
                here,
                vec![("AWS_ACCESS_KEY_ID", "A\nK")],
                Some("AWS_ACCESS_KEY_ID"),
            ),
            (here, vec![("AWS_SECRET_ACCESS_KEY", "\u{1}\u{f6} x")], None),
            (here, vec![("AWS_REGION", "us east-1")], Some("AWS_REGION")),
            (here, vec![("AWS_REGION", "eu:1")], Some("AWS_REGION")),
            (
                here,
                vec![("AWS_DEFAULT_REGION", "a|b")],
                Some("AWS_DEFAULT_REGION"),
            ),
            (
                "s3://b",
                vec![("AWS_ENDPOINT_URL", " http://127.0.0.1:1/\n")],
                None,
            ),
            (
                "s3://b",
                vec![("AWS_ENDPOINT_URL", "127.0.0.1:1")],
                Some("AWS_ENDPOINT_URL"),
            ),
            (
                "s3://b",
                vec![("AWS_ENDPOINT_URL_S3", "http://10.0.0.300:1")],
                Some("AWS_ENDPOINT_URL_S3"),
            ),
            (
                "s3://b",
                vec![("AWS_ENDPOINT_URL", "http://h:99999")],
                Some("AWS_ENDPOINT_URL"),
            ),
            ("s3://xn--zz", vec![], Some("xn--zz")),
            ("az://c", vec![("AZURE_STORAGE_ACCOUNT", "a b")], Some("account")),
            (
                azure,
                vec![("AZURE_STORAGE_ACCOUNT", "a\n"), ("AZURE_STORAGE_KEY", "a2V5\n")],
                None,
            ),
            // What is not used refuses nothing.
            (
                azure,
                vec![("AZURE_STORAGE_KEY", "a2V5"), ("AZURE_AUTHORITY_HOST", "lo gin")],
                None,
            ),
            (azure, with_tenant("t/x"), Some("AZURE_TENANT_ID")),
            (azure, with_tenant("t x"), Some("AZURE_TENANT_ID")),
            (
                azure,
                [with_tenant("t"), vec![("AZURE_AUTHORITY_HOST", "lo gin")]].concat(),
                Some("AZURE_AUTHORITY_HOST"),
            ),
        ] {
            let account = [("AZURE_STORAGE_ACCOUNT", "a")];
            let mut all: Vec<_> = KEYS.into_iter().chain(account).collect();
            all.retain(|(name, _)| variables.iter().all(|(other, _)| other != name));
            all.extend(&variables);
            let endpoint = Endpoint::parse_cache("--remote-cache", url).unwrap();
            let options = RemoteOptions::new(endpoint);
            let address = options.connect.endpoint.bucket().unwrap().clone();
            let opened = open(&options, &address, &Environment::fake(&all, Path::new("/none")));
            match (opened, part) {
                (Ok(opened), None) => {
                    // Nothing listens there.
                    assert!(
                        opened.store.head(&"x".into()).await.is_err(),
                        "{url} {variables:?}"
                    );
                }
                (Err(error), Some(part)) => assert!(error.to_string().contains(part), "{error}"),
                (opened, _) => panic!("{url} {variables:?}: {:?}", opened.map(|opened| opened.shown)),
            }
        }
        let task = [("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "x y")];
        let error = with("s3://b", &task, Path::new("/none")).unwrap_err();
        assert!(
            error.contains("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"),
            "{error}"
        );
        let not_hosts = [
            "http://h:99999",
            "http://[zz]",
            "http://1.2.3.4.5",
            "http://[::1]x",
        ];
        for url in not_hosts.map(|server| format!("s3://b?endpoint={server}")) {
            assert!(Endpoint::parse_cache("--remote-cache", &url).is_err(), "{url}");
        }
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
            (
                "s3://b",
                &[("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://s3cret@elsewhere/")],
                "is not encrypted",
            ),
            (
                "s3://b",
                &[("AWS_DEFAULT_PROFILE", "q"), ("HOME", "/nonexistent")],
                "no profile q",
            ),
            ("az://c", &[("AZURE_STORAGE_KEY", "s3cret")], "no storage account"),
            (
                "az://c?account=a",
                &[(
                    "AZURE_STORAGE_CONNECTION_STRING",
                    "AccountName=b;SharedAccessSignature=s3cret",
                )],
                "is not of the account a",
            ),
            (
                "az://c",
                &[(
                    "AZURE_STORAGE_CONNECTION_STRING",
                    "BlobEndpoint=http://h/a;SharedAccessSignature=sig=s3cret",
                )],
                "not sent unencrypted",
            ),
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
