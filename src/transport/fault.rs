//! What has befallen a connection, by the types of the errors that a status comes from.

use std::{error::Error, io};

use h2::Reason;
use rustls::{AlertDescription, CertificateError};
use tonic::Status;

/// What has befallen a connection, where it makes a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The server has not looked at the call: it ends the connection in good order, as servers do from time to time, or
    /// the connection has too many calls.
    SentAway,
    /// The other end does not answer pings.
    Silent,
    /// The server's certificate is refused.
    Certificate(Distrust),
    /// The server refused our TLS.
    Refused,
    /// The server does not speak TLS, or not HTTP/2 with it.
    NoTls,
    /// The server does not speak HTTP/2 as it should.
    NoHttp2,
    /// The connection was closed.
    Closed,
    /// The connection was reset.
    Reset,
}

/// Why a server's certificate is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Distrust {
    /// No authority that is trusted has signed it.
    Issuer,
    /// It is an authority's own, which only signs others. Java, and so Bazel, takes one that is trusted for a server's.
    Authority,
    /// It is for other names than the one in the address.
    Name,
    /// It has expired, or is not valid yet.
    Time,
    /// Anything else.
    Other,
}

impl Distrust {
    fn of(error: &CertificateError) -> Self {
        match error {
            // Another authority of the same name has not signed it either.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => Self::Issuer,
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => Self::Name,
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. } => Self::Time,
            // rustls has no word of its own for it.
            CertificateError::Other(error) if error.to_string() == "CaUsedAsEndEntity" => Self::Authority,
            _ => Self::Other,
        }
    }

    /// What is wrong, and what to do.
    pub(crate) const fn advice(self) -> &'static str {
        match self {
            Self::Issuer => {
                "the server's certificate is not trusted; give its certificate authority with --tls-certificate"
            }
            Self::Authority => {
                "the server's certificate is that of a certificate authority (CA:TRUE), which may only sign \
                 others; give the server one that it has signed, or a self-signed one with CA:FALSE"
            }
            Self::Name => {
                "the server's certificate is not for the host name in the address; use a name that the \
                 certificate has as a subject alternative name (its CN does not count)"
            }
            Self::Time => {
                "the server's certificate has expired, or is not valid yet; renew it, or set this machine's clock"
            }
            Self::Other => "the server's certificate is not valid",
        }
    }
}

impl Fault {
    /// `None` for a status that the server has sent, and for other faults.
    pub(crate) fn of(status: &Status) -> Option<Self> {
        of_error(status.source()?)
    }

    /// Whether it is a fault of TLS that no retry cures.
    pub(crate) const fn is_of_tls(self) -> bool {
        matches!(self, Self::Certificate(_) | Self::Refused | Self::NoTls)
    }
}

/// As [`Fault::of`], of any error and its causes.
pub(super) fn of_error(error: &(dyn Error + 'static)) -> Option<Fault> {
    let found = if let Some(error) = error.downcast_ref::<hyper::Error>() {
        of_hyper(error)
    } else if let Some(error) = error.downcast_ref::<h2::Error>() {
        of_h2(error)
    } else if let Some(error) = error.downcast_ref::<rustls::Error>() {
        of_rustls(error)
    } else if let Some(error) = error.downcast_ref::<io::Error>() {
        of_io(error)
    } else {
        // tonic keeps this type to itself.
        (error.to_string() == "HTTP/2 was not negotiated.").then_some(Fault::NoTls)
    };
    found.or_else(|| of_error(error.source()?))
}

fn of_hyper(error: &hyper::Error) -> Option<Fault> {
    if error.is_timeout() {
        Some(Fault::Silent)
    } else if error.is_canceled() || error.is_incomplete_message() {
        Some(Fault::Closed)
    } else {
        None
    }
}

fn of_h2(error: &h2::Error) -> Option<Fault> {
    match (error.get_io(), error.reason()) {
        (Some(error), _) => of_io(error),
        (None, Some(Reason::NO_ERROR | Reason::REFUSED_STREAM)) => Some(Fault::SentAway),
        (None, _) => Some(Fault::NoHttp2),
    }
}

/// Alerts that say nothing of us: the server cannot go on with this connection.
const PASSING: [AlertDescription; 2] = [AlertDescription::InternalError, AlertDescription::UserCanceled];

fn of_rustls(error: &rustls::Error) -> Option<Fault> {
    match error {
        rustls::Error::InvalidCertificate(error) => Some(Fault::Certificate(Distrust::of(error))),
        rustls::Error::InvalidMessage(_) => Some(Fault::NoTls),
        rustls::Error::AlertReceived(alert) if PASSING.contains(alert) => Some(Fault::Reset),
        rustls::Error::AlertReceived(_) => Some(Fault::Refused),
        _ => None,
    }
}

fn of_io(error: &io::Error) -> Option<Fault> {
    let within = error.get_ref().and_then(|inner| of_error(inner));
    within.or_else(|| match error.kind() {
        io::ErrorKind::BrokenPipe => Some(Fault::Closed),
        io::ErrorKind::ConnectionReset => Some(Fault::Reset),
        // Once TLS is established, h2 keeps only the text of a TLS error.
        io::ErrorKind::InvalidData => match error.to_string() {
            text if text.starts_with("received fatal alert") => {
                let passes = PASSING.iter().any(|alert| text.ends_with(&format!("{alert:?}")));
                Some(if passes { Fault::Reset } else { Fault::Refused })
            }
            text if text.starts_with("received corrupt message") => Some(Fault::NoTls),
            _ => None,
        },
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use rustls::InvalidMessage;

    use super::*;

    fn of(error: impl Into<Box<dyn Error + Send + Sync>>) -> Option<Fault> {
        Fault::of(&Status::from_error(error.into()))
    }

    #[test]
    fn faults_are_recognized_by_their_types_and_not_by_a_servers_message() {
        let tls = |error: rustls::Error| of(io::Error::new(io::ErrorKind::InvalidData, error));
        for (fault, expected) in [
            (of(h2::Error::from(Reason::NO_ERROR)), Fault::SentAway),
            (of(h2::Error::from(Reason::REFUSED_STREAM)), Fault::SentAway),
            (of(h2::Error::from(Reason::FRAME_SIZE_ERROR)), Fault::NoHttp2),
            (
                tls(CertificateError::UnknownIssuer.into()),
                Fault::Certificate(Distrust::Issuer),
            ),
            (
                tls(CertificateError::Expired.into()),
                Fault::Certificate(Distrust::Time),
            ),
            (
                tls(CertificateError::BadEncoding.into()),
                Fault::Certificate(Distrust::Other),
            ),
            (tls(InvalidMessage::InvalidContentType.into()), Fault::NoTls),
            (
                tls(rustls::Error::AlertReceived(AlertDescription::InternalError)),
                Fault::Reset,
            ),
            (
                of(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "received fatal alert: InternalError",
                )),
                Fault::Reset,
            ),
            (
                tls(rustls::Error::AlertReceived(
                    AlertDescription::CertificateRequired,
                )),
                Fault::Refused,
            ),
            (
                of(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "received fatal alert: CertificateRequired",
                )),
                Fault::Refused,
            ),
            (
                of(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "received corrupt message of type InvalidContentType",
                )),
                Fault::NoTls,
            ),
            (of(io::Error::from(io::ErrorKind::BrokenPipe)), Fault::Closed),
            (of(io::Error::from(io::ErrorKind::ConnectionReset)), Fault::Reset),
        ] {
            assert_eq!(fault, Some(expected));
        }
        assert_eq!(of(io::Error::from(io::ErrorKind::ConnectionRefused)), None);
        assert_eq!(
            Fault::of(&Status::unavailable(
                "invalid peer certificate, connection closed"
            )),
            None
        );
    }
}
