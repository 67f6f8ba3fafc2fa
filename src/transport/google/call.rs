//! Calls to those who give tokens.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Uri, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Full, Limited};
use serde::{Deserialize, de::DeserializeOwned};

use super::error::GoogleError;
use crate::{
    printable::with_causes,
    transport::{http_head::is_passing, https::client_for},
};

/// How long a server may take for its answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// The waits before further tries.
const WAITS: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(1)];
/// The most that is read of an answer.
const ANSWER: usize = 1 << 20;

/// The errors of a token endpoint that may be repeated: words of OAuth 2.0 (RFC 6749, section 5.2; RFC 8693, section
/// 2.2.2). Others may hold anything.
const ERRORS: [&str; 7] = [
    "invalid_request",
    "invalid_client",
    "invalid_grant",
    "invalid_target",
    "unauthorized_client",
    "unsupported_grant_type",
    "invalid_scope",
];

/// A call. No `Debug`: it is as good as a token.
pub(super) struct Call {
    pub(super) uri: Uri,
    pub(super) headers: Vec<(String, String)>,
    /// What is posted; nothing is posted without it.
    pub(super) body: Option<String>,
}

#[derive(Deserialize)]
struct Refused {
    error: String,
}

/// A try that failed, and whether another one may fare better.
struct Failed {
    error: GoogleError,
    is_lasting: bool,
}

impl Call {
    /// One that posts a form.
    pub(super) fn form(uri: Uri, form: String) -> Self {
        Self {
            uri,
            headers: vec![(
                CONTENT_TYPE.to_string(),
                "application/x-www-form-urlencoded".to_owned(),
            )],
            body: Some(form),
        }
    }

    /// The answer; or why there is none, in words without secrets.
    pub(super) async fn answer(&self) -> Result<Bytes, GoogleError> {
        let mut waits = WAITS.into_iter();
        loop {
            let failed = match self.ask().await {
                Ok(answer) => return Ok(answer),
                Err(failed) => failed,
            };
            let wait = waits.next().filter(|_| !failed.is_lasting);
            tokio::time::sleep(wait.ok_or(failed.error)?).await;
        }
    }

    /// The same, decoded.
    pub(super) async fn answered<T: DeserializeOwned>(&self) -> Result<T, GoogleError> {
        // The decoder's words would quote the answer.
        serde_json::from_slice(&self.answer().await?)
            .map_err(|_| GoogleError::NoToken(self.place().to_owned()))
    }

    /// Who is asked, without a user's name and password.
    pub(super) fn place(&self) -> &str {
        let authority = self.uri.authority().map_or("", |authority| authority.as_str());
        authority.rsplit_once('@').map_or(authority, |(_, host)| host)
    }

    async fn ask(&self) -> Result<Bytes, Failed> {
        let lasting = |reason: &str| Failed {
            error: GoogleError::Server {
                server: self.place().to_owned(),
                reason: reason.to_owned(),
            },
            is_lasting: true,
        };
        let passing = |reason: &str| Failed {
            is_lasting: false,
            ..lasting(reason)
        };
        let mut request = match self.body {
            Some(_) => Request::post(self.uri.clone()),
            None => Request::get(self.uri.clone()),
        };
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let request = request
            .body(Full::from(self.body.clone().unwrap_or_default()))
            .map_err(|_| lasting("cannot be sent what it is to be sent"))?;
        let client = client_for(self.uri.scheme_str() == Some("https"))
            .map_err(|error| lasting(&format!("no certificate authorities: {error}")))?;
        let asking = async {
            let answer = client
                .request(request)
                .await
                .map_err(|error| with_causes(&error))?;
            let (head, body) = answer.into_parts();
            let body = Limited::new(body, ANSWER).collect().await;
            let body = body.map_err(|_| "its response is truncated or too long".to_owned())?;
            Ok::<_, String>((head.status, body.to_bytes()))
        };
        let (status, body) = tokio::time::timeout(PATIENCE, asking)
            .await
            .map_err(|_| passing("does not answer"))?
            .map_err(|reason| passing(&reason))?;
        if status.is_success() {
            return Ok(body);
        }
        let said = serde_json::from_slice::<Refused>(&body).ok();
        let said = said.and_then(|refused| ERRORS.into_iter().find(|error| *error == refused.error));
        let reason = match said {
            Some(error) => format!("gives no token ({status}: {error})"),
            None => format!("gives no token ({status})"),
        };
        Err(if is_passing(status) {
            passing(&reason)
        } else {
            lasting(&reason)
        })
    }
}
