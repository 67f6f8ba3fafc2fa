//! Google's credentials, as Bazel's `--google_credentials` and `--google_default_credentials` name them: from a service
//! account's key, a user's refresh token or a Google machine's metadata to a token that is good for an hour or so.
//!
//! Keys and tokens are in no error, log or `Debug`, and neither is what a server says of them. A file is read anew for
//! each token, so that nothing keeps a key, and a newer file counts.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{Request, StatusCode, Uri, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Full, Limited};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use ring::{
    rand::SystemRandom,
    signature::{RSA_PKCS1_SHA256, RsaKeyPair},
};
use rustls::pki_types::{PrivatePkcs8KeyDer, pem::PemObject as _};
use serde::Deserialize;

use super::{
    error::{RemoteError, RemoteErrorKind},
    options::Header,
};
use crate::{https::client_for, printable::with_causes};

/// What a token is good for where nobody says so, as for Bazel.
pub(crate) const DEFAULT_SCOPE: &str = "https://www.googleapis.com/auth/cloud-platform";

const TOKEN_ENDPOINT: &str = "https://oauth2.googleapis.com/token";
const METADATA_HOST: &str = "metadata.google.internal";
const METADATA_PATH: &str = "/computeMetadata/v1/instance/service-accounts/default/token";
/// What the machine says that it is.
const PRODUCT: &str = "/sys/class/dmi/id/product_name";

/// How long an assertion is good, at most an hour.
const ASSERTED: Duration = Duration::from_secs(60 * 60);
/// A token is not used for the last part of its life.
const MARGIN: Duration = Duration::from_secs(60);
/// How long a server may take for its answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// The waits before further tries.
const WAITS: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(1)];
/// The most that is read of an answer.
const ANSWER: usize = 1 << 20;

/// The errors of a token endpoint that may be repeated: words of OAuth 2.0 (RFC 6749, section 5.2). Others may hold
/// anything.
const ERRORS: [&str; 6] = [
    "invalid_request",
    "invalid_client",
    "invalid_grant",
    "unauthorized_client",
    "unsupported_grant_type",
    "invalid_scope",
];

/// Which credentials, and what for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Google {
    /// The file that is named; without one, what this program's environment has (“application default credentials”).
    pub file: Option<PathBuf>,
    /// What tokens are to be good for.
    pub scopes: Vec<String>,
}

/// What a credentials file holds. No `Debug`: it is all secrets.
#[derive(Deserialize)]
struct Written {
    r#type: String,
    client_email: Option<String>,
    private_key: Option<String>,
    private_key_id: Option<String>,
    client_id: Option<String>,
    client_secret: Option<String>,
    refresh_token: Option<String>,
    token_uri: Option<String>,
    quota_project_id: Option<String>,
}

/// A request for a token. No `Debug`: it is as good as one.
struct Question {
    uri: Uri,
    /// A form; or nothing, for a machine's metadata.
    form: Option<String>,
    /// The project that calls are put down to.
    quota_project: Option<String>,
}

/// What a token endpoint answers. No `Debug`.
#[derive(Deserialize)]
struct Granted {
    access_token: String,
    #[serde(default)]
    expires_in: u64,
}

#[derive(Deserialize)]
struct Refused {
    error: String,
}

/// A try that failed, and whether another one may fare better.
struct Failed {
    reason: String,
    is_lasting: bool,
}

impl Google {
    /// Whether there are such credentials here, and of a kind that can be used.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`] that names the flag.
    pub(crate) fn check(&self) -> Result<(), RemoteError> {
        let error = |reason| RemoteError::new(RemoteErrorKind::Config, self.flag(), reason);
        self.question(&|name| std::env::var_os(name))
            .map(|_| ())
            .map_err(error)
    }

    /// A token as headers, and for how long they are good.
    pub(super) async fn headers(&self) -> Result<(Vec<Header>, Duration), RemoteError> {
        let error = |reason| RemoteError::new(RemoteErrorKind::Unauthenticated, self.flag(), reason);
        let question = self.question(&|name| std::env::var_os(name)).map_err(error)?;
        let mut waits = WAITS.into_iter();
        let granted = loop {
            let failed = match question.ask().await {
                Ok(granted) => break granted,
                Err(failed) => failed,
            };
            let wait = waits.next().filter(|_| !failed.is_lasting);
            tokio::time::sleep(wait.ok_or_else(|| error(failed.reason))?).await;
        };
        let unusable = |_| error("the token that came cannot be sent".to_owned());
        let bearer = format!("Bearer {}", granted.access_token);
        let mut headers = vec![Header::new("authorization", &bearer).map_err(unusable)?];
        if let Some(project) = &question.quota_project {
            let unusable = |_| error("the file's quota_project_id cannot be sent".to_owned());
            headers.push(Header::new("x-goog-user-project", project).map_err(unusable)?);
        }
        let kept = Duration::from_secs(granted.expires_in).saturating_sub(MARGIN);
        // The clock must not overflow.
        Ok((headers, kept.min(Duration::from_secs(24 * 60 * 60))))
    }

    fn flag(&self) -> String {
        match &self.file {
            Some(file) => format!("--google-credentials={}", file.display()),
            None => "--google-default-credentials".to_owned(),
        }
    }

    /// The request that brings a token, in an environment; or why there is none.
    fn question(&self, variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Question, String> {
        if self.scopes.is_empty() {
            return Err("--google-auth-scopes names no scope".to_owned());
        }
        if let Some(file) = &self.file {
            return read(file)?.question(&self.scopes);
        }
        let named = |name| variable(name).filter(|value| !value.is_empty());
        if let Some(file) = named("GOOGLE_APPLICATION_CREDENTIALS").map(PathBuf::from) {
            let in_file = |reason| format!("GOOGLE_APPLICATION_CREDENTIALS={}: {reason}", file.display());
            return read(&file)
                .and_then(|written| written.question(&self.scopes))
                .map_err(in_file);
        }
        let directory = named("CLOUDSDK_CONFIG")
            .map(PathBuf::from)
            .or_else(|| Some(PathBuf::from(named("HOME")?).join(".config/gcloud")));
        let file = directory.map(|directory| directory.join("application_default_credentials.json"));
        if let Some(file) = file.filter(|file| file.is_file()) {
            return read(&file)
                .and_then(|written| written.question(&self.scopes))
                .map_err(|reason| format!("{}: {reason}", file.display()));
        }
        let host = named("GCE_METADATA_HOST").map(|host| host.to_string_lossy().into_owned());
        let is_theirs = || std::fs::read_to_string(PRODUCT).is_ok_and(|name| name.starts_with("Google"));
        let host = match host {
            Some(host) => host,
            None if is_theirs() => METADATA_HOST.to_owned(),
            None => {
                return Err(
                    "there are none: GOOGLE_APPLICATION_CREDENTIALS is not set, gcloud has left no \
                     application_default_credentials.json, and this is no machine of Google's"
                        .to_owned(),
                );
            }
        };
        let scopes = encoded(&self.scopes.join(","));
        Ok(Question {
            uri: format!("http://{host}{METADATA_PATH}?scopes={scopes}")
                .parse()
                .map_err(|_| "GCE_METADATA_HOST is no host")?,
            form: None,
            quota_project: None,
        })
    }
}

/// The file's content. The decoder's words would quote it.
fn read(file: &Path) -> Result<Written, String> {
    let bytes = std::fs::read(file).map_err(|error| format!("the credentials cannot be read: {error}"))?;
    serde_json::from_slice(&bytes).map_err(|_| "the file is not one of Google's credentials".to_owned())
}

impl Written {
    fn question(self, scopes: &[String]) -> Result<Question, String> {
        let lacks = |name| move || format!("the file's credentials have no {name}");
        let uri: Uri = self
            .token_uri
            .as_deref()
            .unwrap_or(TOKEN_ENDPOINT)
            .parse()
            .ok()
            .filter(|uri: &Uri| matches!(uri.scheme_str(), Some("https" | "http")) && uri.host().is_some())
            .ok_or("the file's token_uri is no URL")?;
        let form = match &*self.r#type {
            "service_account" => {
                let key = self.private_key.ok_or_else(lacks("private_key"))?;
                let email = self.client_email.ok_or_else(lacks("client_email"))?;
                let id = self.private_key_id.as_deref();
                let audience = self.token_uri.as_deref().unwrap_or(TOKEN_ENDPOINT);
                let assertion = assertion(&key, id, &email, audience, scopes)?;
                form(&[
                    ("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer"),
                    ("assertion", &assertion),
                ])
            }
            "authorized_user" => form(&[
                ("grant_type", "refresh_token"),
                ("client_id", &self.client_id.ok_or_else(lacks("client_id"))?),
                (
                    "client_secret",
                    &self.client_secret.ok_or_else(lacks("client_secret"))?,
                ),
                (
                    "refresh_token",
                    &self.refresh_token.ok_or_else(lacks("refresh_token"))?,
                ),
            ]),
            _ => {
                return Err(
                    "the file's credentials are neither a service_account nor an authorized_user; others \
                     cannot be used"
                        .to_owned(),
                );
            }
        };
        Ok(Question {
            uri,
            form: Some(form),
            quota_project: self.quota_project_id,
        })
    }
}

/// The signed claim to be a service account (RFC 7523).
fn assertion(
    key: &str,
    key_id: Option<&str>,
    email: &str,
    audience: &str,
    scopes: &[String],
) -> Result<String, String> {
    let unusable = "the file's private_key is no RSA key in PKCS #8";
    let key = PrivatePkcs8KeyDer::from_pem_slice(key.as_bytes()).map_err(|_| unusable)?;
    let key = RsaKeyPair::from_pkcs8(key.secret_pkcs8_der()).map_err(|_| unusable)?;
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let mut head = BTreeMap::from([("alg", "RS256"), ("typ", "JWT")]);
    head.extend(key_id.map(|id| ("kid", id)));
    let claims = serde_json::json!({
        "iss": email,
        "scope": scopes.join(" "),
        "aud": audience,
        "iat": now.as_secs(),
        "exp": (now + ASSERTED).as_secs(),
    });
    let head = serde_json::json!(head).to_string();
    let claim = format!(
        "{}.{}",
        URL_SAFE_NO_PAD.encode(head),
        URL_SAFE_NO_PAD.encode(claims.to_string())
    );
    let mut signature = vec![0; key.public().modulus_len()];
    key.sign(
        &RSA_PKCS1_SHA256,
        &SystemRandom::new(),
        claim.as_bytes(),
        &mut signature,
    )
    .map_err(|_| "the file's private_key does not sign")?;
    Ok(format!("{claim}.{}", URL_SAFE_NO_PAD.encode(signature)))
}

fn form(fields: &[(&str, &str)]) -> String {
    let fields = fields
        .iter()
        .map(|(name, value)| format!("{name}={}", encoded(value)));
    fields.collect::<Vec<_>>().join("&")
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

impl Question {
    /// One try.
    async fn ask(&self) -> Result<Granted, Failed> {
        let place = self.uri.authority().map_or("", |authority| {
            // Without a user's name and password.
            authority
                .as_str()
                .rsplit_once('@')
                .map_or(authority.as_str(), |(_, host)| host)
        });
        let lasting = |reason: &str| Failed {
            reason: format!("{place}: {reason}"),
            is_lasting: true,
        };
        let passing = |reason: &str| Failed {
            is_lasting: false,
            ..lasting(reason)
        };
        let request = match &self.form {
            Some(form) => Request::post(self.uri.clone())
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(Full::from(form.clone())),
            None => Request::get(self.uri.clone())
                .header("metadata-flavor", "Google")
                .body(Full::default()),
        };
        let request = request.map_err(|error| lasting(&error.to_string()))?;
        let client = client_for(self.uri.scheme_str() == Some("https"))
            .map_err(|error| lasting(&format!("no certificate authorities: {error}")))?;
        let asking = async {
            let answer = client
                .request(request)
                .await
                .map_err(|error| with_causes(&error))?;
            let (head, body) = answer.into_parts();
            let body = Limited::new(body, ANSWER).collect().await;
            let body = body.map_err(|_| "its answer breaks off or is too long".to_owned())?;
            Ok::<_, String>((head.status, body.to_bytes()))
        };
        let (status, body) = tokio::time::timeout(PATIENCE, asking)
            .await
            .map_err(|_| passing("does not answer"))?
            .map_err(|reason| passing(&reason))?;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|_| lasting("its answer has no token"));
        }
        let said = serde_json::from_slice::<Refused>(&body).ok();
        let said = said.and_then(|refused| ERRORS.into_iter().find(|error| *error == refused.error));
        let reason = format!(
            "gives no token ({status}{}{})",
            said.map_or("", |_| ": "),
            said.unwrap_or("")
        );
        let is_passing = status.is_server_error()
            || matches!(
                status,
                StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT
            );
        Err(if is_passing {
            passing(&reason)
        } else {
            lasting(&reason)
        })
    }
}

#[cfg(test)]
#[path = "google_tests.rs"]
mod tests;
