//! Which credentials there are, and the token that they bring.

use std::{
    ffi::OsString,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use http::{
    Uri,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;

use super::{
    call::Call,
    error::GoogleError,
    file::{Source, read},
};
use crate::transport::{Header, RemoteError, RemoteErrorKind};

/// The default scope of a token, as for Bazel.
pub(crate) const DEFAULT_SCOPE: &str = "https://www.googleapis.com/auth/cloud-platform";

const METADATA_HOST: &str = "metadata.google.internal";
const METADATA_PATH: &str = "/computeMetadata/v1/instance/service-accounts/default/token";
/// What the machine says that it is.
const PRODUCT: &str = "/sys/class/dmi/id/product_name";

/// A token is not used for the last part of its life.
const MARGIN: Duration = Duration::from_secs(60);

/// Which credentials, and what for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Google {
    /// The file that is named; without one, what this program's environment has (“application default credentials”).
    pub file: Option<PathBuf>,
    /// What tokens are to be good for.
    pub scopes: Vec<String>,
}

/// What brings a token. No `Debug`: it is all secrets.
pub(super) struct Question {
    /// Whose token is to be exchanged, if one is.
    pub(super) subject: Option<Source>,
    pub(super) call: Call,
    /// The service accounts that the token stands for then, one after the other.
    pub(super) accounts: Vec<Account>,
    /// The project that calls are put down to.
    pub(super) quota_project: Option<String>,
}

/// A service account that another token may stand for.
pub(super) struct Account {
    pub(super) uri: Uri,
    /// What its token is to be good for.
    pub(super) scopes: Vec<String>,
    /// The service accounts that are between the two.
    pub(super) delegates: Vec<String>,
}

/// A token, as token endpoints give it, and as service accounts' tokens come. No `Debug`.
#[derive(Deserialize)]
pub(super) struct Granted {
    #[serde(alias = "accessToken")]
    pub(super) access_token: String,
    #[serde(default)]
    expires_in: u64,
    #[serde(rename = "expireTime")]
    expire_time: Option<String>,
}

impl Google {
    /// Whether there are such credentials here, and of a kind that can be used.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`] that names the flag.
    pub(crate) fn check(&self) -> Result<(), RemoteError> {
        self.checked().map_err(|error| self.unusable(&error))
    }

    /// Whether there are any. Those that cannot be used are some.
    ///
    /// # Errors
    /// As [`Google::check`].
    #[cfg_attr(not(feature = "object-stores"), allow(dead_code, reason = "only stores ask"))]
    pub(crate) fn exists(&self) -> Result<bool, RemoteError> {
        match self.checked() {
            Err(GoogleError::NoCredentials) => Ok(false),
            checked => checked.map(|()| true).map_err(|error| self.unusable(&error)),
        }
    }

    fn checked(&self) -> Result<(), GoogleError> {
        self.question(&|name| std::env::var_os(name)).map(|_| ())
    }

    fn unusable(&self, error: &GoogleError) -> RemoteError {
        RemoteError::config(self.flag(), error.to_string())
    }

    /// A token as headers, and for how long they are good.
    pub(crate) async fn headers(&self) -> Result<(Vec<Header>, Duration), RemoteError> {
        let error = |error: GoogleError| {
            RemoteError::new(RemoteErrorKind::Unauthenticated, self.flag(), error.to_string())
        };
        let question = self.question(&|name| std::env::var_os(name)).map_err(error)?;
        let granted = question.ask().await.map_err(error)?;
        let unusable = |_| error(GoogleError::TokenHeader);
        let bearer = format!("Bearer {}", granted.access_token);
        let mut headers = vec![Header::new("authorization", &bearer).map_err(unusable)?];
        if let Some(project) = &question.quota_project {
            let unusable = |_| error(GoogleError::ProjectHeader);
            headers.push(Header::new("x-goog-user-project", project).map_err(unusable)?);
        }
        let kept = granted.lasts(SystemTime::now()).saturating_sub(MARGIN);
        // The clock must not overflow.
        Ok((headers, kept.min(Duration::from_secs(24 * 60 * 60))))
    }

    /// Whether they come from the metadata service of a machine of Google's.
    #[cfg_attr(not(feature = "object-stores"), allow(dead_code, reason = "only stores ask"))]
    pub(crate) fn is_of_the_machine(&self) -> bool {
        let question = self.question(&|name| std::env::var_os(name));
        question.is_ok_and(|question| question.is_of_the_machine())
    }

    pub(super) fn flag(&self) -> String {
        match &self.file {
            Some(file) => format!("--google-credentials={}", file.display()),
            None => "--google-default-credentials".to_owned(),
        }
    }

    /// The request that brings a token, in an environment; or why there is none.
    pub(super) fn question(
        &self,
        variable: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<Question, GoogleError> {
        if self.scopes.is_empty() {
            return Err(GoogleError::NoScope);
        }
        if let Some(file) = &self.file {
            return read(file)?.question(&self.scopes);
        }
        let named = |name| variable(name).filter(|value| !value.is_empty());
        if let Some(file) = named("GOOGLE_APPLICATION_CREDENTIALS").map(PathBuf::from) {
            let in_file = |error| GoogleError::In {
                file: format!("GOOGLE_APPLICATION_CREDENTIALS={}", file.display()),
                error: Box::new(error),
            };
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
                .map_err(|error| GoogleError::In {
                    file: file.display().to_string(),
                    error: Box::new(error),
                });
        }
        let host = named("GCE_METADATA_HOST").map(|host| host.to_string_lossy().into_owned());
        let is_theirs = || std::fs::read_to_string(PRODUCT).is_ok_and(|name| name.starts_with("Google"));
        let host = match host {
            Some(host) => host,
            None if is_theirs() => METADATA_HOST.to_owned(),
            None => return Err(GoogleError::NoCredentials),
        };
        let scopes = encoded(&self.scopes.join(","));
        let uri = format!("http://{host}{METADATA_PATH}?scopes={scopes}");
        Ok(Question::of(Call {
            uri: uri.parse().map_err(|_| GoogleError::MetadataHost)?,
            headers: vec![("metadata-flavor".to_owned(), "Google".to_owned())],
            body: None,
        }))
    }
}

impl Question {
    pub(super) fn of(call: Call) -> Self {
        Self {
            subject: None,
            call,
            accounts: Vec::new(),
            quota_project: None,
        }
    }

    /// Whether it goes to the metadata service.
    pub(super) fn is_of_the_machine(&self) -> bool {
        self.call.uri.path() == METADATA_PATH
    }

    pub(super) async fn ask(&self) -> Result<Granted, GoogleError> {
        let mut granted: Granted = match &self.subject {
            None => self.call.answered().await?,
            Some(subject) => {
                let token = encoded(&subject.token().await?);
                let form = self.call.body.as_deref().unwrap_or_default();
                let call = Call::form(self.call.uri.clone(), format!("{form}&subject_token={token}"));
                call.answered().await?
            }
        };
        for account in &self.accounts {
            granted = account.call(&granted).answered().await?;
        }
        Ok(granted)
    }
}

impl Account {
    fn call(&self, granted: &Granted) -> Call {
        let mut body = serde_json::json!({ "scope": self.scopes, "lifetime": "3600s" });
        if !self.delegates.is_empty() {
            body["delegates"] = self.delegates.clone().into();
        }
        Call {
            uri: self.uri.clone(),
            headers: vec![
                (
                    AUTHORIZATION.to_string(),
                    format!("Bearer {}", granted.access_token),
                ),
                (CONTENT_TYPE.to_string(), "application/json".to_owned()),
            ],
            body: Some(body.to_string()),
        }
    }
}

impl Granted {
    fn lasts(&self, now: SystemTime) -> Duration {
        let end = self.expire_time.as_deref().and_then(|text| {
            let time = text.parse::<prost_types::Timestamp>().ok()?;
            SystemTime::try_from(time).ok()
        });
        match end {
            Some(end) => end.duration_since(now).unwrap_or_default(),
            None => Duration::from_secs(self.expires_in),
        }
    }
}

pub(super) fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}
