//! One try to post a document.

use std::{
    io,
    time::{Duration, SystemTime},
};

use http::{
    HeaderValue, Request,
    header::{AUTHORIZATION, CONTENT_TYPE, USER_AGENT},
};
use http_body_util::{BodyExt as _, Full, Limited};

use super::{document::Document, retry::Answer, signature::Secret, url::NotifyUrl};
use crate::{
    printable::with_causes,
    transport::https::{HttpsClient, client_for},
};

/// Most that is read of an answer, so that its connection can be used again.
const ANSWER: usize = 64 << 10;
/// How long that may take.
const REST: Duration = Duration::from_secs(1);

/// Posts to one URL.
pub(super) struct Poster {
    url: NotifyUrl,
    secret: Option<Secret>,
    client: HttpsClient,
}

impl Poster {
    /// # Errors
    /// When the URL needs the system's certificate authorities, and none are found.
    pub(super) fn new(url: NotifyUrl, secret: Option<Secret>) -> io::Result<Self> {
        let client = client_for(url.is_https())?;
        Ok(Self::with_client(url, secret, client))
    }

    pub(super) const fn with_client(url: NotifyUrl, secret: Option<Secret>, client: HttpsClient) -> Self {
        Self { url, secret, client }
    }

    /// The receiver, fit to be shown.
    pub(super) const fn url(&self) -> &NotifyUrl {
        &self.url
    }

    /// One try. The status line and headers must come within the deadline; they are the answer, whatever becomes of the
    /// body after them.
    pub(super) async fn post(&self, document: &Document, deadline: Duration) -> Answer {
        let mut request = Request::post(self.url.uri().clone())
            .header(CONTENT_TYPE, "application/json")
            .header(USER_AGENT, concat!("outhaul/", env!("CARGO_PKG_VERSION")))
            .header("x-outhaul-event", document.event.name())
            .header("x-outhaul-delivery", &document.delivery);
        if let Some(secret) = &self.secret {
            request = request.header("x-outhaul-signature-256", secret.sign(&document.body));
        }
        if let Some(value) = self.url.authorization() {
            request = request.header(AUTHORIZATION, HeaderValue::clone(value));
        }
        let request = match request.body(Full::new(document.body.clone())) {
            Ok(request) => request,
            Err(error) => return Answer::Refused(error.to_string()),
        };
        match tokio::time::timeout(deadline, self.client.request(request)).await {
            Ok(Ok(response)) => {
                let (head, body) = response.into_parts();
                let answer = Answer::of(head.status, &head.headers, SystemTime::now());
                // Nothing in it matters.
                let _ = tokio::time::timeout(REST, Limited::new(body, ANSWER).collect()).await;
                answer
            }
            // Whatever went wrong on the way may be better next time. The client's errors do not name URLs.
            Ok(Err(error)) => Answer::Later {
                reason: with_causes(&error),
                asked: None,
            },
            Err(_) => Answer::Later {
                reason: "the receiver does not answer".to_owned(),
                asked: None,
            },
        }
    }
}
