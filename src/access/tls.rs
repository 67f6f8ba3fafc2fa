//! TLS of our own listeners.

use std::{fmt, path::Path, sync::Arc, time::SystemTime};

use anyhow::{Error, bail};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _},
    server::WebPkiClientVerifier,
    time_provider::TimeProvider,
};

/// What is spoken inside of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// gRPC.
    Http2,
    /// The admin port.
    Http1,
}

/// A certificate with its key, and whose certificates callers must have. Cheap to clone.
#[derive(Clone)]
pub struct ServerTls {
    http2: Arc<ServerConfig>,
    http1: Arc<ServerConfig>,
    /// Whether callers must have a certificate.
    pub wants_certificates: bool,
}

/// The wall clock, which may be before 1970: then connections that depend on it fail, where the library's own panics.
#[derive(Debug)]
struct Clock;

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        Some(UnixTime::since_unix_epoch(since))
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerTls")
    }
}

/// Why files make no TLS: which of them, and what is wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct TlsError {
    /// The file that cannot be used.
    pub file: TlsFile,
    /// What is wrong with it.
    pub reason: String,
}

/// One of the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsFile {
    /// The certificate, with those that lead to its authority.
    Certificate,
    /// Its key.
    Key,
    /// The authorities of callers' certificates.
    ClientAuthorities,
}

impl ServerTls {
    /// Reads PEM files.
    ///
    /// # Errors
    /// When one cannot be read, has nothing of the kind in it, or doesn't fit the others.
    pub fn read(certificate: &Path, key: &Path, client_authorities: Option<&Path>) -> Result<Self, TlsError> {
        let error = |file, reason: String| TlsError { file, reason };
        let chain = certificates(certificate).map_err(|e| error(TlsFile::Certificate, e.to_string()))?;
        let secret =
            PrivateKeyDer::from_pem_file(key).map_err(|e| error(TlsFile::Key, words(&e, "PRIVATE KEY")))?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_details(provider.clone(), Arc::new(Clock))
            .with_safe_default_protocol_versions()
            .map_err(|e| error(TlsFile::Certificate, e.to_string()))?;
        let builder = match client_authorities {
            None => builder.with_no_client_auth(),
            Some(file) => {
                let failed = |reason| error(TlsFile::ClientAuthorities, reason);
                let mut roots = RootCertStore::empty();
                for authority in certificates(file).map_err(|e| failed(e.to_string()))? {
                    roots.add(authority).map_err(|e| failed(e.to_string()))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                    .build()
                    .map_err(|e| failed(e.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let config = builder
            .with_single_cert(chain, secret)
            .map_err(|e| error(TlsFile::Certificate, e.to_string()))?;
        let speaking = |protocol: &[u8]| {
            let mut config = config.clone();
            config.alpn_protocols = vec![protocol.to_vec()];
            Arc::new(config)
        };
        Ok(Self {
            http2: speaking(b"h2"),
            http1: speaking(b"http/1.1"),
            wants_certificates: client_authorities.is_some(),
        })
    }

    /// As the TLS library takes it.
    pub(super) fn config(&self, protocol: Protocol) -> Arc<ServerConfig> {
        match protocol {
            Protocol::Http2 => self.http2.clone(),
            Protocol::Http1 => self.http1.clone(),
        }
    }
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let all = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| Error::msg(words(&e, "CERTIFICATE")))?;
    if all.is_empty() {
        bail!("does not contain a PEM section CERTIFICATE");
    }
    Ok(all)
}

/// Without the file's content, which the library's words may quote.
fn words(error: &rustls::pki_types::pem::Error, section: &str) -> String {
    use rustls::pki_types::pem::Error;
    match error {
        Error::Io(error) => error.to_string(),
        Error::NoItemsFound => format!("does not contain a PEM section {section}"),
        _ => "is not a PEM file".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_reported_for_the_right_file_and_without_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let certificate = file("c", &made.cert.pem());
        let key = file("k", &made.signing_key.serialize_pem());
        let wrong_key = file("w", &other.signing_key.serialize_pem());
        let text = file("t", "hush hush\n");
        let torn = file(
            "torn",
            "-----BEGIN PRIVATE KEY-----\nhush*\n-----END PRIVATE KEY-----\n",
        );
        let none = dir.path().join("none");
        ServerTls::read(&certificate, &key, None).unwrap();
        assert!(
            ServerTls::read(&certificate, &key, Some(&certificate))
                .unwrap()
                .wants_certificates
        );
        for (certificate, key, clients, file) in [
            (&none, &key, None, TlsFile::Certificate),
            (&text, &key, None, TlsFile::Certificate),
            (&certificate, &none, None, TlsFile::Key),
            (&certificate, &text, None, TlsFile::Key),
            (&certificate, &torn, None, TlsFile::Key),
            (&certificate, &wrong_key, None, TlsFile::Certificate),
            (&certificate, &key, Some(&none), TlsFile::ClientAuthorities),
            (&certificate, &key, Some(&text), TlsFile::ClientAuthorities),
        ] {
            let error = ServerTls::read(certificate, key, clients.map(AsRef::as_ref)).unwrap_err();
            assert_eq!(error.file, file, "{error}");
            assert!(!error.to_string().contains("hush"), "{error}");
        }
    }
}
