//! What credentials files hold, and how that becomes a token.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::Uri;
use ring::{
    rand::SystemRandom,
    signature::{RSA_PKCS1_SHA256, RsaKeyPair},
};
use rustls::pki_types::{PrivatePkcs8KeyDer, pem::PemObject as _};
use serde::{Deserialize, de::IgnoredAny};

use super::{
    call::Call,
    error::GoogleError,
    token::{Account, DEFAULT_SCOPE, Question, encoded},
};

const TOKEN_ENDPOINT: &str = "https://oauth2.googleapis.com/token";

/// How long an assertion is good, at most an hour.
const ASSERTED: Duration = Duration::from_secs(60 * 60);

/// What a credentials file holds. No `Debug`: it is all secrets.
#[derive(Deserialize)]
pub(super) struct Written {
    r#type: String,
    client_email: Option<String>,
    private_key: Option<String>,
    private_key_id: Option<String>,
    client_id: Option<String>,
    client_secret: Option<String>,
    refresh_token: Option<String>,
    token_uri: Option<String>,
    audience: Option<String>,
    subject_token_type: Option<String>,
    token_url: Option<String>,
    service_account_impersonation_url: Option<String>,
    credential_source: Option<Source>,
    source_credentials: Option<Box<Self>>,
    #[serde(default)]
    delegates: Vec<String>,
    quota_project_id: Option<String>,
}

/// Where another provider's token is. No `Debug`.
#[derive(Clone, Deserialize)]
pub(super) struct Source {
    file: Option<PathBuf>,
    url: Option<String>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    format: Option<Format>,
    /// AWS's, which `url` alone does not bring.
    environment_id: Option<IgnoredAny>,
    /// A program's, which goes before a URL.
    executable: Option<IgnoredAny>,
}

#[derive(Clone, Deserialize)]
struct Format {
    subject_token_field_name: Option<String>,
}

impl Source {
    /// The call that brings it, if it is not in a file.
    fn call(&self) -> Result<Option<Call>, GoogleError> {
        if self.environment_id.is_some() || self.executable.is_some() {
            return Err(GoogleError::UnknownSource);
        }
        let Some(url) = &self.url else {
            let known = self.file.as_ref().map(|_| None);
            return known.ok_or(GoogleError::UnknownSource);
        };
        Ok(Some(Call {
            uri: parsed(url, "credential_source.url")?,
            headers: self.headers.clone().into_iter().collect(),
            body: None,
        }))
    }

    /// The token itself.
    pub(super) async fn token(&self) -> Result<String, GoogleError> {
        let bytes = match (self.call()?, &self.file) {
            (Some(call), _) => call.answer().await?.to_vec(),
            (None, file) => {
                let file = file.as_deref().unwrap_or(Path::new(""));
                let read = tokio::fs::read(file).await;
                read.map_err(|error| GoogleError::UnreadableSource {
                    file: file.to_owned(),
                    error,
                })?
            }
        };
        let text = String::from_utf8(bytes).map_err(|_| GoogleError::EmptySource)?;
        let Some(name) = self
            .format
            .as_ref()
            .and_then(|f| f.subject_token_field_name.as_ref())
        else {
            return Ok(text.trim().to_owned());
        };
        let fields: serde_json::Value = serde_json::from_str(&text).map_err(|_| GoogleError::EmptySource)?;
        let token = fields.get(name).and_then(serde_json::Value::as_str);
        Ok(token.ok_or(GoogleError::EmptySource)?.to_owned())
    }
}

/// The file's content. The decoder's words would quote it.
pub(super) fn read(file: &Path) -> Result<Written, GoogleError> {
    let bytes = std::fs::read(file).map_err(GoogleError::Unreadable)?;
    serde_json::from_slice(&bytes).map_err(|_| GoogleError::NotCredentials)
}

impl Written {
    /// What brings a token, before anybody is asked.
    pub(super) fn question(mut self, scopes: &[String]) -> Result<Question, GoogleError> {
        let token_uri = self.token_uri.as_deref().unwrap_or(TOKEN_ENDPOINT);
        let mut question = match &*self.r#type {
            "service_account" => {
                let key = needed(self.private_key.as_deref(), "private_key")?;
                let email = needed(self.client_email.as_deref(), "client_email")?;
                let id = self.private_key_id.as_deref();
                let assertion = assertion(key, id, email, token_uri, scopes)?;
                let form = form(&[
                    ("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer"),
                    ("assertion", &assertion),
                ]);
                Question::of(Call::form(parsed(token_uri, "token_uri")?, form))
            }
            "authorized_user" => {
                let form = form(&[
                    ("grant_type", "refresh_token"),
                    ("client_id", needed(self.client_id.as_deref(), "client_id")?),
                    (
                        "client_secret",
                        needed(self.client_secret.as_deref(), "client_secret")?,
                    ),
                    (
                        "refresh_token",
                        needed(self.refresh_token.as_deref(), "refresh_token")?,
                    ),
                ]);
                Question::of(Call::form(parsed(token_uri, "token_uri")?, form))
            }
            "external_account" => self.exchange(scopes)?,
            "impersonated_service_account" => {
                let account = self.account(scopes)?;
                let source = self.source_credentials.take();
                let source = source.ok_or(GoogleError::Missing("source_credentials"))?;
                let mut question = source.question(&[DEFAULT_SCOPE.to_owned()])?;
                let account = account.ok_or(GoogleError::Missing("service_account_impersonation_url"))?;
                question.accounts.push(account);
                question
            }
            _ => return Err(GoogleError::UnknownType),
        };
        question.quota_project = self.quota_project_id;
        Ok(question)
    }

    /// The service account that a token stands for, if it does.
    fn account(&self, scopes: &[String]) -> Result<Option<Account>, GoogleError> {
        let Some(url) = &self.service_account_impersonation_url else {
            return Ok(None);
        };
        Ok(Some(Account {
            uri: parsed(url, "service_account_impersonation_url")?,
            scopes: scopes.to_vec(),
            delegates: self.delegates.clone(),
        }))
    }

    /// Another provider's token in exchange for one of Google's (RFC 8693), and with that one a service account's, if it
    /// stands for one.
    fn exchange(&self, scopes: &[String]) -> Result<Question, GoogleError> {
        let source = self.credential_source.clone();
        let source = source.ok_or(GoogleError::Missing("credential_source"))?;
        source.call()?;
        let account = self.account(scopes)?;
        let own = scopes.join(" ");
        let form = form(&[
            ("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange"),
            (
                "requested_token_type",
                "urn:ietf:params:oauth:token-type:access_token",
            ),
            ("audience", needed(self.audience.as_deref(), "audience")?),
            ("scope", if account.is_some() { DEFAULT_SCOPE } else { &own }),
            (
                "subject_token_type",
                needed(self.subject_token_type.as_deref(), "subject_token_type")?,
            ),
        ]);
        let endpoint = parsed(needed(self.token_url.as_deref(), "token_url")?, "token_url")?;
        Ok(Question {
            subject: Some(source),
            accounts: account.into_iter().collect(),
            ..Question::of(Call::form(endpoint, form))
        })
    }
}

fn needed<'a>(field: Option<&'a str>, name: &'static str) -> Result<&'a str, GoogleError> {
    field.ok_or(GoogleError::Missing(name))
}

fn parsed(url: &str, name: &'static str) -> Result<Uri, GoogleError> {
    let uri = url.parse().ok();
    uri.filter(|uri: &Uri| matches!(uri.scheme_str(), Some("https" | "http")) && uri.host().is_some())
        .ok_or(GoogleError::NotUrl(name))
}

/// The signed claim to be a service account (RFC 7523).
fn assertion(
    key: &str,
    key_id: Option<&str>,
    email: &str,
    audience: &str,
    scopes: &[String],
) -> Result<String, GoogleError> {
    let key = PrivatePkcs8KeyDer::from_pem_slice(key.as_bytes()).map_err(|_| GoogleError::PrivateKey)?;
    let key = RsaKeyPair::from_pkcs8(key.secret_pkcs8_der()).map_err(|_| GoogleError::PrivateKey)?;
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
    .map_err(|_| GoogleError::Signature)?;
    Ok(format!("{claim}.{}", URL_SAFE_NO_PAD.encode(signature)))
}

fn form(fields: &[(&str, &str)]) -> String {
    let fields = fields
        .iter()
        .map(|(name, value)| format!("{name}={}", encoded(value)));
    fields.collect::<Vec<_>>().join("&")
}
