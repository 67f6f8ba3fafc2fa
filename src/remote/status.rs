//! What a gRPC status means for a cache's client.

use std::error::Error as _;

use bazel_remote_apis::google::rpc;
use prost::Message as _;
use tonic::{Code, Status};

use crate::{
    printable::{and_causes, clipped, is_plain},
    transport::{Fault, RemoteError, RemoteErrorKind, Secrets, retry_delay},
};

/// How much of a server's message is kept. Proxies answer with whole web pages.
pub(super) const MAX_MESSAGE: usize = 500;

/// The error for a failed call. `context` says what was tried on what; `secrets` is what is not to be shown.
pub(crate) fn from_status(context: &str, status: &Status, secrets: &Secrets) -> RemoteError {
    let message = and_causes(status.message().to_owned(), status.source());
    let details = rpc::Status::decode(status.details()).ok();
    RemoteError {
        retry_after: details.and_then(|status| retry_delay(&status)),
        ..error(context, status.code(), &message, Fault::of(status), secrets)
    }
}

/// The error for one blob of a batch.
pub(crate) fn from_rpc(context: &str, status: &rpc::Status, secrets: &Secrets) -> RemoteError {
    let code = Code::from_i32(status.code);
    RemoteError {
        retry_after: retry_delay(status),
        ..error(context, code, &status.message, None, secrets)
    }
}

fn error(context: &str, code: Code, message: &str, fault: Option<Fault>, secrets: &Secrets) -> RemoteError {
    let mut message = readable(message);
    if message.is_empty() {
        message = code.description().to_lowercase();
    }
    let kind = kind(code, &message, fault);
    RemoteError::new(kind, context, clipped(&secrets.conceal(message), MAX_MESSAGE))
}

fn kind(code: Code, message: &str, fault: Option<Fault>) -> RemoteErrorKind {
    match code {
        // buildbox-casd, Buildbarn and others say so of an instance name that they don't serve.
        Code::NotFound | Code::InvalidArgument if refuses_instance(message) => RemoteErrorKind::Rejected,
        Code::NotFound => RemoteErrorKind::NotFound,
        _ if fault.is_some_and(Fault::is_of_tls) => RemoteErrorKind::Config,
        _ if fault == Some(Fault::Silent) => RemoteErrorKind::Timeout,
        // Internal and Unknown too: servers and proxies use them for whatever broke, and Bazel retries them.
        Code::Unavailable
        | Code::Aborted
        | Code::ResourceExhausted
        | Code::Cancelled
        | Code::Internal
        | Code::Unknown => RemoteErrorKind::Unavailable,
        Code::DeadlineExceeded => RemoteErrorKind::Timeout,
        Code::PermissionDenied => RemoteErrorKind::Denied,
        Code::Unauthenticated => RemoteErrorKind::Unauthenticated,
        Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented => RemoteErrorKind::Rejected,
        Code::Ok | Code::AlreadyExists | Code::OutOfRange | Code::DataLoss => RemoteErrorKind::Protocol,
    }
}

/// Whether the message is about the instance name, and not about a blob that some instance does not have.
pub(crate) fn refuses_instance(message: &str) -> bool {
    let message = message.to_ascii_lowercase();
    message.contains("instance")
        && !["blob", "digest", "object", "action"]
            .iter()
            .any(|w| message.contains(w))
}

/// One line without control characters, nor those that turn the direction of what follows, so that a server's words can
/// go to a terminal and a log.
pub(super) fn readable(text: &str) -> String {
    text.split(|c: char| c.is_whitespace() || !is_plain(c))
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bazel_remote_apis::google::protobuf::Any;

    use super::*;
    use crate::transport::RetryInfo;

    fn kind_of(code: Code, message: &str) -> RemoteErrorKind {
        from_status("reading x", &Status::new(code, message), &Secrets::default()).kind
    }

    #[test]
    fn codes_are_sorted_into_kinds() {
        use RemoteErrorKind as K;
        for (code, kind) in [
            (Code::NotFound, K::NotFound),
            (Code::Unavailable, K::Unavailable),
            (Code::ResourceExhausted, K::Unavailable),
            (Code::Internal, K::Unavailable),
            (Code::DeadlineExceeded, K::Timeout),
            (Code::PermissionDenied, K::Denied),
            (Code::Unauthenticated, K::Unauthenticated),
            (Code::InvalidArgument, K::Rejected),
            (Code::Unimplemented, K::Rejected),
            (Code::OutOfRange, K::Protocol),
        ] {
            assert_eq!(kind_of(code, "words"), kind, "{code:?}");
        }
    }

    #[test]
    fn a_refused_instance_is_no_missing_blob() {
        assert_eq!(
            kind_of(Code::NotFound, "unknown instance name \"x\""),
            RemoteErrorKind::Rejected
        );
        assert_eq!(
            kind_of(Code::InvalidArgument, "Invalid instance name"),
            RemoteErrorKind::Rejected
        );
        assert_eq!(
            kind_of(Code::NotFound, "blob abc/3 not found in instance main"),
            RemoteErrorKind::NotFound
        );
    }

    #[test]
    fn an_untrusted_certificate_is_not_retried() {
        let error = from_status(
            "x",
            &Status::from_error(Box::new(rustls::Error::from(
                rustls::CertificateError::UnknownIssuer,
            ))),
            &Secrets::default(),
        );
        assert_eq!(error.kind, RemoteErrorKind::Config);
        assert!(!error.is_retryable());
    }

    #[test]
    fn the_servers_retry_info_is_found_among_the_details() {
        let info = RetryInfo {
            retry_delay: Some(prost_types::Duration {
                seconds: 2,
                nanos: 500_000_000,
            }),
        };
        let details = rpc::Status {
            code: Code::Unavailable as i32,
            message: String::new(),
            details: vec![
                Any {
                    type_url: "type.googleapis.com/google.rpc.DebugInfo".into(),
                    value: vec![0xff],
                },
                Any {
                    type_url: "type.googleapis.com/google.rpc.RetryInfo".into(),
                    value: info.encode_to_vec(),
                },
            ],
        };
        let status = Status::with_details(Code::Unavailable, "busy", details.encode_to_vec().into());
        let after = Some(Duration::from_millis(2500));
        assert_eq!(from_status("x", &status, &Secrets::default()).retry_after, after);
        assert_eq!(from_rpc("x", &details, &Secrets::default()).retry_after, after);
    }

    #[test]
    fn undecodable_details_and_negative_delays_are_passed_over() {
        let garbage = Status::with_details(Code::Unavailable, "busy", vec![0xff, 0xff].into());
        assert_eq!(from_status("x", &garbage, &Secrets::default()).retry_after, None);
        let info = RetryInfo {
            retry_delay: Some(prost_types::Duration {
                seconds: -1,
                nanos: 0,
            }),
        };
        let negative = rpc::Status {
            details: vec![Any {
                type_url: "type.googleapis.com/google.rpc.RetryInfo".into(),
                value: info.encode_to_vec(),
            }],
            ..rpc::Status::default()
        };
        assert_eq!(from_rpc("x", &negative, &Secrets::default()).retry_after, None);
    }

    #[test]
    fn a_servers_words_are_one_line_of_bounded_length() {
        let page = format!("<html>\r\n\u{202e}\x1b[31m{}", "é".repeat(1000));
        let message = from_status("x", &Status::unknown(page), &Secrets::default()).message;
        assert!(message.starts_with("<html> [31mé"), "{message}");
        assert!(message.len() <= MAX_MESSAGE + 3);
    }
}
