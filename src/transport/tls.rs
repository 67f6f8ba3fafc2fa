//! The files that TLS needs.

use std::{
    fs,
    path::{Path, PathBuf},
};

use hyper_rustls::ConfigBuilderExt;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use super::{Endpoint, RemoteError, https};

/// PEM files for connections with TLS.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// The authorities that may sign the server's certificate, instead of the system's.
    pub certificate: Option<PathBuf>,
    /// Our certificate.
    pub client_certificate: Option<PathBuf>,
    /// Its key.
    pub client_key: Option<PathBuf>,
}

impl TlsFiles {
    /// Checks what one file alone does not show.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`](super::RemoteErrorKind::Config), naming the flag.
    pub(crate) fn validate(&self, endpoint: &Endpoint) -> Result<(), RemoteError> {
        for (flag, file) in [
            ("--tls-certificate", &self.certificate),
            ("--tls-client-certificate", &self.client_certificate),
            ("--tls-client-key", &self.client_key),
        ] {
            if let Some(file) = file
                && !endpoint.is_tls()
            {
                return Err(wrong(
                    flag,
                    file,
                    format!(
                        "{endpoint} is not encrypted; use {}://",
                        if endpoint.is_http() { "https" } else { "grpcs" }
                    ),
                ));
            }
        }
        match (&self.client_certificate, &self.client_key) {
            (Some(file), None) => Err(wrong(
                "--tls-client-certificate",
                file,
                "requires --tls-client-key",
            )),
            (None, Some(file)) => Err(wrong(
                "--tls-client-key",
                file,
                "requires --tls-client-certificate",
            )),
            _ => Ok(()),
        }
    }

    /// Reads them.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`](super::RemoteErrorKind::Config), naming the file.
    pub(crate) fn read(&self) -> Result<ClientTlsConfig, RemoteError> {
        let config = ClientTlsConfig::new();
        let config = match &self.certificate {
            Some(file) => config.ca_certificate(Certificate::from_pem(pem(
                "--tls-certificate",
                file,
                "CERTIFICATE",
            )?)),
            None => config.with_native_roots(),
        };
        match (&self.client_certificate, &self.client_key) {
            (Some(certificate), Some(key)) => Ok(config.identity(Identity::from_pem(
                pem("--tls-client-certificate", certificate, "CERTIFICATE")?,
                pem("--tls-client-key", key, "PRIVATE KEY")?,
            ))),
            _ => Ok(config),
        }
    }

    /// As [`TlsFiles::read`], for a client with HTTP/1.1. Reads nothing if the connection is not encrypted.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`](super::RemoteErrorKind::Config), naming the file.
    pub(crate) fn client_config(&self, is_tls: bool) -> Result<ClientConfig, RemoteError> {
        let no_tls = |e: &dyn std::fmt::Display| RemoteError::config("TLS", e.to_string());
        let certificates = |flag: &str, file: &Path| {
            let bytes = pem(flag, file, "CERTIFICATE")?;
            CertificateDer::pem_slice_iter(&bytes)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|e| wrong(flag, file, e.to_string()))
        };
        let config = match &self.certificate {
            Some(file) if is_tls => {
                let flag = "--tls-certificate";
                let mut roots = RootCertStore::empty();
                for certificate in certificates(flag, file)? {
                    roots
                        .add(certificate)
                        .map_err(|e| wrong(flag, file, e.to_string()))?;
                }
                https::trusting(roots).map_err(|e| no_tls(&e))?
            }
            None if is_tls => https::tls()
                .and_then(ConfigBuilderExt::with_native_roots)
                .map_err(|e| no_tls(&e))?,
            _ => https::trusting(RootCertStore::empty()).map_err(|e| no_tls(&e))?,
        };
        let (Some(chain), Some(key), true) = (&self.client_certificate, &self.client_key, is_tls) else {
            return Ok(config.with_no_client_auth());
        };
        let flag = "--tls-client-key";
        let bytes = pem(flag, key, "PRIVATE KEY")?;
        let private = PrivateKeyDer::from_pem_slice(&bytes).map_err(|e| wrong(flag, key, e.to_string()))?;
        config
            .with_client_auth_cert(certificates("--tls-client-certificate", chain)?, private)
            .map_err(|e| wrong("--tls-client-certificate", chain, e.to_string()))
    }
}

/// The bytes of a PEM file that has at least one section of the kind.
fn pem(flag: &str, file: &Path, section: &str) -> Result<Vec<u8>, RemoteError> {
    let bytes = fs::read(file).map_err(|e| wrong(flag, file, e.to_string()))?;
    let end = format!("{section}-----");
    if !String::from_utf8_lossy(&bytes)
        .lines()
        .any(|line| line.starts_with("-----BEGIN ") && line.trim_end().ends_with(&end))
    {
        let reason = format!("does not contain a PEM section {section}");
        return Err(wrong(flag, file, reason));
    }
    Ok(bytes)
}

fn wrong(flag: &str, file: &Path, reason: impl std::fmt::Display) -> RemoteError {
    let context = format!("{flag}={}", file.display());
    RemoteError::config(context, reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::RemoteErrorKind;

    #[test]
    fn files_that_hold_no_certificate_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ca.pem");
        fs::write(&file, "hello").unwrap();
        for (path, part) in [
            (dir.path().join("none.pem"), "No such file"),
            (file, "does not contain a PEM section CERTIFICATE"),
        ] {
            let files = TlsFiles {
                certificate: Some(path.clone()),
                ..TlsFiles::default()
            };
            let error = files.read().err().unwrap();
            assert_eq!(error.kind, RemoteErrorKind::Config);
            let shown = error.to_string();
            assert!(
                shown.contains(part) && shown.contains(&format!("--tls-certificate={}", path.display())),
                "{shown}"
            );
        }
    }
}
