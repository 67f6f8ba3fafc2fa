//! What a store's errors mean.
//!
//! Stores say what is wrong by a word in the answer's body (`<Code>`), and Azure in a header, too. The status alone does
//! not: S3 answers 404 for a missing bucket and 403 for a missing object that the caller may not list.

use std::{
    error::Error,
    io,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, StatusCode};

use crate::{
    remote::status::{MAX_MESSAGE, readable},
    transport::{RemoteError, RemoteErrorKind, Secrets, http_head::kind_of, retry_after},
};

/// A request that the store refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("status {status} {code} {message}")]
pub(super) struct Refusal {
    pub(super) status: u16,
    /// The store's word for it; empty if it gave none, as answers to HEAD do.
    pub(super) code: String,
    /// The store's words, without what was sent as credentials.
    pub(super) message: String,
    pub(super) retry_after: Option<Duration>,
}

/// A request that no answer came to, or half of one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    #[error("no answer within {0:?}")]
    Slow(Duration),
    #[error("the store ignored the range that was asked for")]
    RangeIgnored,
    #[error("{0} is not encrypted")]
    NotEncrypted(String),
    #[error("the answer has more than {0} bytes")]
    Long(usize),
    #[error("{0} cannot be verified: {1}")]
    NoAuthorities(String, String),
    #[error("the store cut its listing and does not say how it goes on: it does not know ListObjectsV2")]
    Cut,
}

impl Refusal {
    /// From an answer's head and the beginning of its body.
    pub(super) fn new(status: StatusCode, headers: &HeaderMap, body: &[u8], secrets: &Secrets) -> Self {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let body = String::from_utf8_lossy(body);
        let code = text("x-ms-error-code")
            .or_else(|| element(&body, "Code"))
            .unwrap_or_default();
        let is_word = |code: &str| code.len() <= 64 && code.bytes().all(|b| b.is_ascii_alphanumeric());
        let region = text("x-amz-bucket-region").or_else(|| element(&body, "Region"));
        let mut message = secrets.conceal(readable(element(&body, "Message").unwrap_or_default()));
        if let Some(region) = region.filter(|region| {
            region.len() < 32 && (status.is_redirection() || code == "AuthorizationHeaderMalformed")
        }) {
            let region = secrets.conceal(readable(region));
            message = format!("the bucket is in the region {region}: add region=");
        }
        if message.len() > MAX_MESSAGE {
            let end = (0..=MAX_MESSAGE).rev().find(|at| message.is_char_boundary(*at));
            message.truncate(end.unwrap_or_default());
        }
        Self {
            status: status.as_u16(),
            code: if is_word(code) {
                code.to_owned()
            } else {
                String::new()
            },
            message,
            retry_after: retry_after(headers, SystemTime::now()),
        }
    }

    /// What kind of error it is, by the store's word, else by the status.
    pub(super) fn kind(&self) -> RemoteErrorKind {
        use RemoteErrorKind as Kind;
        match &*self.code {
            "NoSuchKey" | "BlobNotFound" | "NoSuchVersion" => Kind::NotFound,
            "NoSuchBucket"
            | "ContainerNotFound"
            | "ResourceNotFound"
            | "AccountNotFound"
            | "InvalidBucketName"
            | "InvalidResourceName"
            | "PermanentRedirect"
            | "TemporaryRedirect"
            | "AuthorizationHeaderMalformed"
            | "InvalidAccessKeyId"
            // versitygw's word, with 404.
            | "XAdminUserNotFound"
            | "SignatureDoesNotMatch"
            | "AuthenticationFailed"
            | "InvalidSecurity"
            | "RequestTimeTooSkewed"
            | "UserProjectMissing"
            | "SecondLevelDomainForbidden"
            | "AccountProblem"
            | "AllAccessDisabled"
            | "NotSignedUp"
            | "UserDisable" => Kind::Config,
            "InvalidObjectState" => Kind::Rejected,
            "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired" | "NoAuthenticationInformation" => {
                Kind::Unauthenticated
            }
            "SlowDown" | "RequestTimeout" | "InternalError" | "ServiceUnavailable" | "ServerBusy"
            | "OperationTimedOut" => Kind::Unavailable,
            code => match self.status {
                409 => Kind::Denied,
                // Something else than the object is missing.
                404 | 410 if !code.is_empty() => Kind::Config,
                301 | 307 | 308 => Kind::Config,
                412 | 416 => Kind::Protocol,
                status => StatusCode::from_u16(status).map_or(Kind::Rejected, kind_of),
            },
        }
    }

    /// Whether the object is not the one that was asked for any more.
    pub(super) const fn is_changed(&self) -> bool {
        self.status == 412
    }

    /// Whether this may be what a store says of a missing object to those who may not list it.
    pub(super) fn may_be_missing(&self) -> bool {
        self.status == 403 && matches!(&*self.code, "" | "AccessDenied" | "Forbidden" | "AllAccessDenied")
    }

    /// Whether only the status says that something is missing.
    pub(super) fn is_vague(&self) -> bool {
        self.code.is_empty() && matches!(self.status, 400..=404)
    }

    fn advice(&self) -> &'static str {
        match &*self.code {
            "NoSuchBucket" | "ContainerNotFound" => "there is no such bucket",
            "ResourceNotFound" => "there is no such container, or it is not public",
            "InvalidAccessKeyId" | "XAdminUserNotFound" => "the store does not know the access key",
            "SignatureDoesNotMatch" | "AuthenticationFailed" => "the secret key is wrong",
            "RequestTimeTooSkewed" => "this machine's clock is wrong",
            "ExpiredToken" | "TokenRefreshRequired" => "the credentials have expired",
            "InvalidToken" => "the session token is not valid, or has expired",
            "SecondLevelDomainForbidden" => {
                "the store wants the bucket in the host's name: add path-style=no"
            }
            "AccountProblem" | "AllAccessDisabled" | "NotSignedUp" | "UserDisable" => {
                "the store has disabled the account"
            }
            "InvalidObjectState" => "it is in an archive tier of the store, and must be restored first",
            "UserProjectMissing" => "the bucket's readers must pay, which is not supported",
            _ => match self.kind() {
                RemoteErrorKind::Denied => "permission denied by the store",
                RemoteErrorKind::Unauthenticated => "the store requires credentials",
                RemoteErrorKind::Config if self.code == "InvalidBucketName" => {
                    "the store takes no buckets of this name"
                }
                RemoteErrorKind::Config if matches!(self.status, 301 | 307 | 308 | 400) => {
                    "the bucket is elsewhere"
                }
                RemoteErrorKind::NotFound => "not in the bucket",
                _ => "the store refused the request",
            },
        }
    }

    /// As the error of an operation.
    pub(super) fn into_error(self, context: String) -> RemoteError {
        let what = match &*self.code {
            "" => format!("status {}", self.status),
            code => code.to_owned(),
        };
        let advice = self.advice();
        let message = match &*self.message {
            "" => format!("{advice} ({what})"),
            words => format!("{advice} ({what}: {words})"),
        };
        let mut error = RemoteError::new(self.kind(), context, message);
        error.retry_after = self.retry_after;
        error
    }
}

/// Whether a page of a listing says that there is more, and not how to ask for it. The crate takes that for the end.
pub(super) fn is_cut(page: &[u8]) -> bool {
    let page = String::from_utf8_lossy(page);
    element(&page, "IsTruncated") == Some("true")
        && element(&page, "NextContinuationToken").is_none_or(str::is_empty)
}

/// The text of an XML element, which has no elements in it. Entities stay as they are.
fn element<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    Some(text.trim())
}

/// An error of this type among what an error comes from.
pub(super) fn find<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    std::iter::successors(Some(error), |error| (**error).source()).find_map(|error| error.downcast_ref())
}

/// An error of the crate's, as that of an operation.
pub(super) fn explain(context: String, error: &object_store::Error) -> RemoteError {
    if let Some(refusal) = find::<Refusal>(error) {
        return refusal.clone().into_error(context);
    }
    let inner =
        std::iter::successors(Some(error as &(dyn Error + 'static)), |error| (**error).source()).last();
    let said = inner.map_or_else(String::new, |inner| readable(&inner.to_string()));
    let kind = match find::<Broken>(error) {
        Some(Broken::Slow(_)) => RemoteErrorKind::Timeout,
        Some(Broken::RangeIgnored | Broken::Long(_) | Broken::Cut) => RemoteErrorKind::Protocol,
        Some(Broken::NotEncrypted(_) | Broken::NoAuthorities(..)) => RemoteErrorKind::Config,
        None if find::<hyper::Error>(error).is_some()
            || find::<hyper_util::client::legacy::Error>(error).is_some()
            || find::<io::Error>(error).is_some_and(|error| error.kind() != io::ErrorKind::NotFound) =>
        {
            return RemoteError::unavailable(context, format!("failed to reach the store: {said}"));
        }
        None => RemoteErrorKind::Protocol,
    };
    RemoteError::new(kind, context, said)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(status: u16, headers: &[(&'static str, &str)], body: &str) -> Refusal {
        let headers = headers
            .iter()
            .map(|(name, value)| ((*name).parse().unwrap(), value.parse().unwrap()))
            .collect();
        let secrets = Secrets::of(["s3cret-key"].into_iter());
        Refusal::new(
            StatusCode::from_u16(status).unwrap(),
            &headers,
            body.as_bytes(),
            &secrets,
        )
    }

    fn xml(code: &str) -> String {
        format!(
            "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>About s3cret-key</Message></Error>"
        )
    }

    #[test]
    fn the_stores_word_decides_before_the_status() {
        use RemoteErrorKind as Kind;
        for (status, code, kind) in [
            (404, "NoSuchKey", Kind::NotFound),
            (404, "BlobNotFound", Kind::NotFound),
            (404, "NoSuchBucket", Kind::Config),
            (404, "ContainerNotFound", Kind::Config),
            (404, "InvalidAccessKeyId", Kind::Config),
            (403, "SignatureDoesNotMatch", Kind::Config),
            (403, "RequestTimeTooSkewed", Kind::Config),
            (403, "AccessDenied", Kind::Denied),
            (403, "SecondLevelDomainForbidden", Kind::Config),
            (403, "InvalidObjectState", Kind::Rejected),
            (403, "UserDisable", Kind::Config),
            (403, "NotOfThisTable", Kind::Denied),
            (400, "ExpiredToken", Kind::Unauthenticated),
            (400, "RequestTimeout", Kind::Unavailable),
            (503, "SlowDown", Kind::Unavailable),
            (404, "", Kind::NotFound),
            (404, "NoSuchThing", Kind::Config),
            (401, "", Kind::Unauthenticated),
            (429, "", Kind::Unavailable),
            (416, "InvalidRange", Kind::Protocol),
            (405, "MethodNotAllowed", Kind::Rejected),
        ] {
            let refusal = refusal(status, &[], &xml(code));
            assert_eq!(refusal.kind(), kind, "{status} {code}");
            let shown = refusal.into_error("reading x".to_owned()).to_string();
            assert!(shown.contains(code) && !shown.contains("s3cret"), "{shown}");
        }
        assert_eq!(
            refusal(404, &[("x-ms-error-code", "ContainerNotFound")], "").kind(),
            Kind::Config
        );
    }

    #[test]
    fn a_bucket_of_another_region_is_reported_where_it_is() {
        for refusal in [
            refusal(301, &[("x-amz-bucket-region", "eu-central-1")], ""),
            refusal(
                400,
                &[],
                "<Error><Code>AuthorizationHeaderMalformed</Code><Message>no</Message><Region>eu-central-1</Region></Error>",
            ),
        ] {
            assert_eq!(refusal.kind(), RemoteErrorKind::Config);
            let shown = refusal.into_error("x".to_owned()).to_string();
            assert!(shown.contains("region eu-central-1"), "{shown}");
        }
    }

    #[test]
    fn hostile_answers_are_shortened_and_made_readable() {
        let long = "ä\u{1b}[31m".repeat(4000);
        let body = format!("<Code>{long}</Code><Message>{long}</Message>");
        let refusal = refusal(503, &[("retry-after", "7")], &body);
        assert!(refusal.code.is_empty() && refusal.message.len() <= MAX_MESSAGE);
        assert!(!refusal.message.contains('\u{1b}'));
        assert_eq!(refusal.retry_after, Some(Duration::from_secs(7)));
    }
}
