//! Credentials from the files of AWS's command-line tools: keys, or a command that prints them (`credential_process`).
//!
//! `~/.aws/credentials` has sections by profile, `~/.aws/config` sections `profile NAME` (AWS's guide to its tools,
//! "Configuration and credential file settings" and "Sourcing credentials with an external process").

use std::{
    collections::HashMap,
    fmt, fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use async_trait::async_trait;
use object_store::{CredentialProvider, aws::AwsCredential};
use serde::Deserialize;
use tokio::io::AsyncReadExt as _;

use super::credentials::{Environment, Kept};

/// Keys in files and those without an expiry are read again after so long.
const KEPT: Duration = Duration::from_secs(60);
/// Credentials are not used for the last part of their life.
const MARGIN: Duration = Duration::from_secs(60);
/// For how long those are used that have less.
const LEAST: Duration = Duration::from_secs(5);
/// The longest file or answer that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Why a profile gives no credentials. Shows no value of the files.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProfileError {
    #[error("failed to read {0}: {1}")]
    Read(PathBuf, io::Error),
    #[error("there is no profile {0} in {1} or {2} (AWS_PROFILE or AWS_DEFAULT_PROFILE)")]
    Missing(String, PathBuf, PathBuf),
    #[error(
        "the profile {0} has {1}, which is not supported: name a profile with keys or with a credential_process"
    )]
    Unsupported(String, &'static str),
    #[error("the profile {0} has an access key without its secret, or a secret without its key")]
    Half(String),
    #[error("the profile {0} has an access key or a session token that cannot be sent in a header")]
    Unsendable(String),
    #[error("credential_process of the profile {0} failed: {1}")]
    Process(String, String),
}

/// A profile of the files.
#[derive(Clone)]
pub(super) struct Profile {
    name: String,
    settings: HashMap<String, String>,
}

/// Where profiles are.
pub(super) struct Files {
    name: String,
    /// Whether it was asked for by its name.
    named: bool,
    credentials: PathBuf,
    config: PathBuf,
}

impl Files {
    /// As AWS's tools find them.
    pub(super) fn new(environment: &Environment) -> Self {
        let home = environment.get("HOME").unwrap_or_default();
        let file = |variable, name: &str| {
            environment
                .get(variable)
                .map_or_else(|| Path::new(&home).join(".aws").join(name), PathBuf::from)
        };
        let named = environment.first(&["AWS_PROFILE", "AWS_DEFAULT_PROFILE"]);
        Self {
            named: named.is_some(),
            name: named.unwrap_or_else(|| "default".to_owned()),
            credentials: file("AWS_SHARED_CREDENTIALS_FILE", "credentials"),
            config: file("AWS_CONFIG_FILE", "config"),
        }
    }

    /// The profile; `None` if there is none and nobody asked for it.
    ///
    /// # Errors
    /// When a file that is there cannot be read, or the profile that was asked for is in none.
    pub(super) fn read(&self) -> Result<Option<Profile>, ProfileError> {
        let text = text_of(&self.config)?;
        let config = section(&text, |header| match &*words(header) {
            [kind, name] => kind == "profile" && *name == self.name,
            // The only one that needs no `profile` there.
            _ => header == "default" && self.name == header,
        });
        let credentials = section(&text_of(&self.credentials)?, |header| header == self.name);
        if config.is_none() && credentials.is_none() {
            if self.named {
                let (credentials, config) = (self.credentials.clone(), self.config.clone());
                return Err(ProfileError::Missing(self.name.clone(), credentials, config));
            }
            return Ok(None);
        }
        let mut settings = config.unwrap_or_default();
        settings.extend(credentials.unwrap_or_default());
        let services = settings.get("services").cloned();
        let services = services.and_then(|name| {
            section(
                &text,
                |header| matches!(&*words(header), [kind, of] if kind == "services" && *of == name),
            )
        });
        // More closely than for all services.
        let endpoint = services.and_then(|mut services| services.remove("s3.endpoint_url"));
        settings.extend(endpoint.map(|url| ("endpoint_url".to_owned(), url)));
        let name = self.name.clone();
        Ok(Some(Profile { name, settings }))
    }
}

fn text_of(file: &Path) -> Result<String, ProfileError> {
    let failed = |e| ProfileError::Read(file.to_owned(), e);
    match fs::metadata(file) {
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(String::new());
        }
        Err(e) => return Err(failed(e)),
        Ok(found) if found.len() > MAX_BYTES => return Err(failed(io::ErrorKind::FileTooLarge.into())),
        Ok(_) => {}
    }
    fs::read_to_string(file).map_err(failed)
}

/// The settings below the headers that fit, by the rules of AWS's tools, which read them with Python's `configparser`: what
/// is indented further than the setting before it belongs to that one: `KEY.NESTED`, if that one has no value of its own.
fn section(text: &str, fits: impl Fn(&str) -> bool) -> Option<HashMap<String, String>> {
    let mut found: Option<HashMap<String, String>> = None;
    let mut inside = false;
    // How far the setting before is indented, if there is one in this section, and its name if it has no value.
    let mut before = None;
    let mut above = String::new();
    for line in text.lines() {
        let written = line.trim_start();
        let indent = line.len() - written.len();
        if written.is_empty() || written.starts_with(['#', ';']) {
            continue;
        }
        if let Some(header) = written.strip_prefix('[') {
            // Whatever follows the name, and even if there is none: the section before it ends here.
            inside = header.split_once(']').is_some_and(|(name, _)| fits(name.trim()));
            before = None;
            if inside {
                found.get_or_insert_default();
            }
            continue;
        }
        let is_nested = before.is_some_and(|before| indent > before);
        let (key, value) = written.split_once(['=', ':']).unwrap_or_default();
        let (mut key, value) = (key.trim().to_ascii_lowercase(), value.trim());
        if is_nested {
            key = format!("{above}.{key}");
        } else {
            before = Some(indent);
            above = if value.is_empty() {
                key.clone()
            } else {
                String::new()
            };
        }
        if let (true, Some(found)) = (inside, &mut found) {
            found.insert(key, value.to_owned());
        }
    }
    found
}

impl Profile {
    fn get(&self, key: &str) -> Option<&str> {
        self.settings
            .get(key)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    pub(super) fn region(&self) -> Option<&str> {
        self.get("region")
    }

    /// The server, if it is not AWS's own.
    pub(super) fn endpoint(&self) -> Option<&str> {
        self.get("endpoint_url")
    }

    /// Whether the bucket's name is in the path, if it says so.
    pub(super) fn path_style(&self) -> Option<bool> {
        match self.get("s3.addressing_style")? {
            "path" => Some(true),
            "virtual" => Some(false),
            _ => None,
        }
    }

    /// Whether it has credentials, or says where they come from.
    ///
    /// # Errors
    /// When they come from where we cannot get them.
    pub(super) fn has_credentials(&self) -> Result<bool, ProfileError> {
        let unsupported = |key| Err(ProfileError::Unsupported(self.name.clone(), key));
        // AWS's tools assume the role whatever keys there are: these are of somebody else.
        let assumed = ["source_profile", "credential_source", "web_identity_token_file"];
        if self.get("role_arn").is_some() && assumed.into_iter().any(|key| self.get(key).is_some()) {
            return unsupported("role_arn");
        }
        match (self.get("aws_access_key_id"), self.get("aws_secret_access_key")) {
            (Some(_), Some(_)) => return Ok(true),
            (None, None) => {}
            _ => return Err(ProfileError::Half(self.name.clone())),
        }
        if self.get("credential_process").is_some() {
            return Ok(true);
        }
        let elsewhere = [
            "sso_session",
            "sso_start_url",
            "role_arn",
            "source_profile",
            "web_identity_token_file",
        ];
        match elsewhere.into_iter().find(|key| self.get(key).is_some()) {
            Some(key) => unsupported(key),
            None => Ok(false),
        }
    }

    /// The credentials, and until when they may be used.
    async fn credentials(&self, patience: Duration) -> Result<(AwsCredential, Instant), ProfileError> {
        let now = Instant::now();
        if let (Some(key_id), Some(secret_key)) =
            (self.get("aws_access_key_id"), self.get("aws_secret_access_key"))
        {
            let credential = AwsCredential {
                key_id: key_id.to_owned(),
                secret_key: secret_key.to_owned(),
                token: self.get("aws_session_token").map(str::to_owned),
            };
            if !is_sendable(&credential) {
                return Err(ProfileError::Unsendable(self.name.clone()));
            }
            return Ok((credential, now + KEPT));
        }
        let failed = |reason: &str| ProfileError::Process(self.name.clone(), reason.to_owned());
        let words = words(self.get("credential_process").unwrap_or_default());
        let Some((program, arguments)) = words.split_first() else {
            return Err(failed("it is empty"));
        };
        let printed = tokio::time::timeout(patience, run(program, arguments))
            .await
            .map_err(|_| failed(&format!("it printed nothing within {patience:?}")))?
            .map_err(|e| failed(&format!("{program}: {e}")))?;
        let printed: Given = serde_json::from_slice(&printed)
            .map_err(|_| failed("it printed no JSON with Version, AccessKeyId and SecretAccessKey"))?;
        if printed.version != Some(1) {
            return Err(failed("it printed another Version than 1"));
        }
        printed
            .credential()
            .map_err(|what| failed(&format!("it printed {what}")))
    }
}

/// What a `credential_process` prints, and the service of a container answers. No `Debug`: it is all secrets.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Given {
    version: Option<u32>,
    access_key_id: String,
    secret_access_key: String,
    #[serde(alias = "Token")]
    session_token: Option<String>,
    expiration: Option<String>,
}

impl Given {
    /// As credentials, and until when they may be used.
    ///
    /// # Errors
    /// What was given instead.
    pub(super) fn credential(self) -> Result<(AwsCredential, Instant), &'static str> {
        let kept = match self.expiration {
            None => KEPT,
            Some(text) => {
                let time = text.parse::<prost_types::Timestamp>().ok();
                let time = time.and_then(|time| SystemTime::try_from(time).ok());
                let time = time.ok_or("an Expiration that is not an RFC 3339 time")?;
                let left = time.duration_since(SystemTime::now()).unwrap_or_default();
                if left.is_zero() {
                    return Err("credentials that have expired");
                }
                left.saturating_sub(MARGIN)
                    .max(left.min(LEAST))
                    .min(Duration::from_secs(24 * 60 * 60))
            }
        };
        let credential = AwsCredential {
            key_id: self.access_key_id,
            secret_key: self.secret_access_key,
            token: self.session_token,
        };
        if !is_sendable(&credential) {
            return Err("a key or a token that cannot be sent in a header");
        }
        Ok((credential, Instant::now() + kept))
    }
}

/// Whether requests can be signed with it: the crate panics where they cannot.
fn is_sendable(credential: &AwsCredential) -> bool {
    let token = credential.token.as_deref().unwrap_or_default();
    [&*credential.key_id, token]
        .iter()
        .all(|text| text.bytes().all(|byte| byte.is_ascii_graphic()))
}

/// What a program prints. Its errors may have secrets in them and are not shown.
async fn run(program: &str, arguments: &[String]) -> io::Result<Vec<u8>> {
    let mut child = tokio::process::Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let mut printed = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX_BYTES).read_to_end(&mut printed).await?;
    }
    let status = child.wait().await?;
    if !status.success() {
        return Err(io::Error::other(status.to_string()));
    }
    Ok(printed)
}

/// The words of a command, by spaces, with quotes and backslashes as a shell reads them; nothing is expanded.
fn words(command: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut begun, mut quote) = (String::new(), false, None);
    let mut characters = command.chars();
    while let Some(c) = characters.next() {
        match (c, quote) {
            ('\'' | '"', None) => (quote, begun) = (Some(c), true),
            (c, Some(open)) if c == open => quote = None,
            ('\\', None | Some('"')) => {
                word.extend(characters.next());
                begun = true;
            }
            (c, None) if c.is_whitespace() => {
                if std::mem::take(&mut begun) {
                    words.push(std::mem::take(&mut word));
                }
            }
            _ => {
                word.push(c);
                begun = true;
            }
        }
    }
    if begun {
        words.push(word);
    }
    words
}

/// Gives the crate what a profile has, and reads the files again in time.
pub(super) struct Provider {
    files: Files,
    patience: Duration,
    kept: Kept<AwsCredential>,
}

impl fmt::Debug for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Provider({})", self.files.name)
    }
}

impl Provider {
    /// A `credential_process` may take so long.
    pub(super) fn new(files: Files, patience: Duration) -> Self {
        Self {
            files,
            patience,
            kept: Kept::default(),
        }
    }

    /// Reads everything again when credentials are next asked for.
    pub(super) fn forget(&self) {
        self.kept.forget();
    }

    async fn fetch(&self) -> object_store::Result<(AwsCredential, Instant)> {
        let failed = |e: ProfileError| object_store::Error::Generic {
            store: "S3",
            source: Box::new(e),
        };
        let profile = self.files.read().map_err(failed)?;
        let missing = || {
            let (credentials, config) = (self.files.credentials.clone(), self.files.config.clone());
            ProfileError::Missing(self.files.name.clone(), credentials, config)
        };
        let profile = profile.ok_or_else(|| failed(missing()))?;
        profile.credentials(self.patience).await.map_err(failed)
    }
}

#[async_trait]
impl CredentialProvider for Provider {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        self.kept.get(self.fetch()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The files of a profile of this name.
    fn files(dir: &Path, name: Option<&str>, credentials: &str, config: &str) -> Files {
        fs::write(dir.join("credentials"), credentials).unwrap();
        fs::write(dir.join("config"), config).unwrap();
        Files {
            name: name.unwrap_or("default").to_owned(),
            named: name.is_some(),
            credentials: dir.join("credentials"),
            config: dir.join("config"),
        }
    }

    async fn given(files: Files) -> Result<Arc<AwsCredential>, String> {
        let provider = Provider::new(files, Duration::from_secs(60));
        assert!(!format!("{provider:?}").contains("s3cret"));
        let given = provider.get_credential().await;
        given.map_err(|e| e.to_string())
    }

    #[tokio::test]
    async fn keys_are_those_of_the_profile() {
        let dir = tempfile::tempdir().unwrap();
        let credentials = "# s\n[default]\naws_access_key_id = A\naws_secret_access_key=x\n\n[other]\n\
                           aws_access_key_id=B\naws_secret_access_key = s3cret=/+\naws_session_token=T\n";
        let config =
            "[profile other]\nregion = eu-west-1\ns3 =\n  region = no\n[default]\nregion=us-west-2\n";
        let other = files(dir.path(), Some("other"), credentials, config);
        assert_eq!(other.read().unwrap().unwrap().region(), Some("eu-west-1"));
        let given_other = given(other).await.unwrap();
        assert_eq!(given_other.key_id, "B");
        assert_eq!(given_other.secret_key, "s3cret=/+");
        assert_eq!(given_other.token.as_deref(), Some("T"));
        let default = given(files(dir.path(), None, credentials, config)).await.unwrap();
        assert_eq!(default.key_id, "A");
    }

    #[test]
    fn files_are_read_as_aws_tools_read_them() {
        let dir = tempfile::tempdir().unwrap();
        let keys = "aws_access_key_id = MINE\naws_secret_access_key = s3cret\n";
        let theirs = "aws_access_key_id = THEIRS\naws_secret_access_key = no\n";
        let indented = "  aws_access_key_id = MINE\n  # x\n\n  aws_secret_access_key = s3cret\n";
        for (name, credentials, config) in [
            // What follows a header is a comment.
            (
                "default",
                format!("[default] # [me]\n{keys}[prod] ; theirs\n{theirs}"),
                "",
            ),
            // A header ends what is before it, also if it is damaged or indented.
            ("default", format!("[default]\n{keys}[prod\n{theirs}"), ""),
            ("default", format!("[default]\n{keys}  [prod]\n{theirs}"), ""),
            ("default", format!("[default]\n{indented}[prod]\n{theirs}"), ""),
            (
                "default",
                format!("  [default]\n{indented}  [prod]\n{theirs}"),
                "",
            ),
            ("default", format!("[default]\n{}", keys.replace(" =", ":")), ""),
            (
                "default",
                format!("[default]\n{keys}s3 =\n  aws_access_key_id = no\n"),
                "",
            ),
            (
                "default",
                String::new(),
                &*format!("[profile no]\n{theirs}[default]\n{keys}"),
            ),
            // Quoted as `aws configure` does, and by hand.
            ("my team", String::new(), &*format!("[profile 'my team']\n{keys}")),
            (
                "my team",
                String::new(),
                &*format!("[profile \"my team\"]\n{keys}"),
            ),
            (
                "prod",
                String::new(),
                &*format!("[profile\tprod]\n{keys}[prod]\n{theirs}[profileprod]\n{theirs}"),
            ),
        ] {
            let shown = format!("{credentials}{config}");
            let profile = files(dir.path(), Some(name), &credentials, config).read();
            let profile = profile.expect(&shown).expect(&shown);
            assert!(profile.has_credentials().expect(&shown), "{shown}");
            assert_eq!(profile.get("aws_access_key_id"), Some("MINE"), "{shown}");
            assert_eq!(profile.get("aws_secret_access_key"), Some("s3cret"), "{shown}");
        }
    }

    #[test]
    fn a_profile_may_name_its_server() {
        let dir = tempfile::tempdir().unwrap();
        let services =
            "[services minio]\ns3 =\n  endpoint_url = http://minio\ndynamodb =\n  endpoint_url = http://no\n";
        for (config, endpoint, path_style) in [
            ("[profile p]\nendpoint_url = http://h\n", Some("http://h"), None),
            ("[profile p]\nservices = minio\n", Some("http://minio"), None),
            (
                "[profile p]\nendpoint_url = http://h\nservices=minio\ns3 =\n    addressing_style = virtual\n",
                Some("http://minio"),
                Some(false),
            ),
            (
                "[profile p]\nservices = other\ns3=\n addressing_style=path\n",
                None,
                Some(true),
            ),
            (
                "[profile p]\nregion = x\n  endpoint_url = http://no\n",
                None,
                None,
            ),
        ] {
            let files = files(dir.path(), Some("p"), "", &format!("{services}{config}"));
            let profile = files.read().unwrap().unwrap();
            assert_eq!(
                (profile.endpoint(), profile.path_style()),
                (endpoint, path_style),
                "{config}"
            );
        }
    }

    #[tokio::test]
    async fn a_command_prints_them() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("my helper");
        fs::write(
            &script,
            "echo >&2 s3cret\n[ \"$1\" = 'a b' ] || exit 3\ncat <<E\n{\"Version\": 1, \"AccessKeyId\": \"P\", \
             \"SecretAccessKey\": \"s3cret\", \"SessionToken\": \"t\", \"Expiration\": \"2999-01-01T00:00:00Z\"}\nE\n",
        )
        .unwrap();
        let config = |arguments: &str| {
            format!(
                "[profile p]\ncredential_process = sh \"{}\" {arguments}\n",
                script.display()
            )
        };
        let good = given(files(dir.path(), Some("p"), "", &config("'a b'")))
            .await
            .unwrap();
        assert_eq!((good.key_id.as_str(), good.token.as_deref()), ("P", Some("t")));
        let bad = given(files(dir.path(), Some("p"), "", &config("a\\ c")))
            .await
            .unwrap_err();
        assert!(bad.contains("exit status: 3") && !bad.contains("s3cret"), "{bad}");
        let expired = "[p]\ncredential_process = echo '{\"Version\":1,\"AccessKeyId\":\"A\",\"SecretAccessKey\":\"s3cret\",\"Expiration\":\"2001-01-01T00:00:00Z\"}'\n";
        let expired = given(files(dir.path(), Some("p"), expired, ""))
            .await
            .unwrap_err();
        assert!(
            expired.contains("have expired") && !expired.contains("s3cret"),
            "{expired}"
        );
        let nonsense = given(files(
            dir.path(),
            Some("p"),
            "[p]\ncredential_process = echo s3cret\n",
            "",
        ))
        .await;
        let nonsense = nonsense.unwrap_err();
        assert!(
            nonsense.contains("no JSON") && !nonsense.contains("s3cret"),
            "{nonsense}"
        );
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let none = files(dir.path(), Some("p"), "[q]\n", "")
            .read()
            .err()
            .unwrap()
            .to_string();
        assert!(none.contains("no profile p"), "{none}");
        assert!(files(dir.path(), None, "[q]\n", "").read().unwrap().is_none());
        for (config, part) in [
            (
                "[profile p]\nsso_session = x\n",
                "has sso_session, which is not supported",
            ),
            ("[profile p]\nrole_arn = x\n", "has role_arn"),
            (
                "[profile p]\nrole_arn = x\nsource_profile = p\naws_access_key_id=a\naws_secret_access_key=b\n",
                "has role_arn",
            ),
            (
                "[profile p]\nrole_arn = x\ncredential_source = Environment\ncredential_process = true\n",
                "has role_arn",
            ),
            ("[profile p]\naws_access_key_id = x\n", "without its secret"),
        ] {
            let profile = files(dir.path(), Some("p"), "", config).read().unwrap().unwrap();
            let error = profile.has_credentials().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        let region_only = files(dir.path(), None, "", "[default]\nregion = x\n")
            .read()
            .unwrap();
        assert!(!region_only.unwrap().has_credentials().unwrap());
    }
}
