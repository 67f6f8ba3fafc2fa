//! The signature that lets a receiver know who speaks.

use std::{fmt, fs, path::Path};

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use super::error::NotifyError;

/// The key of the signatures. Never shown.
#[derive(Clone)]
pub(crate) struct Secret(Vec<u8>);

impl Secret {
    /// Reads it from a file; one line break at the end is not part of it.
    ///
    /// # Errors
    /// The file cannot be read, or holds nothing.
    pub(crate) fn read(path: &Path) -> Result<Self, NotifyError> {
        let mut bytes = fs::read(path).map_err(NotifyError::SecretFile)?;
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
            if bytes.last() == Some(&b'\r') {
                bytes.pop();
            }
        }
        if bytes.is_empty() {
            return Err(NotifyError::NoSecret);
        }
        Ok(Self(bytes))
    }

    /// The value of `x-outhaul-signature-256`: HMAC-SHA256 of the body, written as GitHub's webhooks write it.
    pub(super) fn sign(&self, body: &[u8]) -> String {
        let mut mac = <Hmac<Sha256>>::new_from_slice(&self.0)
            .unwrap_or_else(|_| unreachable!("HMAC takes keys of any length"));
        mac.update(body);
        format!("sha256={}", hex::encode(mac.finalize().into_bytes()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_those_of_githubs_webhooks() {
        // The example in GitHub's documentation, "Validating webhook deliveries".
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        for text in [
            "It's a Secret to Everybody",
            "It's a Secret to Everybody\n",
            "It's a Secret to Everybody\r\n",
        ] {
            fs::write(&path, text).unwrap();
            assert_eq!(
                Secret::read(&path).unwrap().sign(b"Hello, World!"),
                "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
            );
        }
    }

    #[test]
    fn a_secret_that_is_none_is_refused_and_none_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        Secret::read(&path).unwrap_err();
        for text in ["", "\n"] {
            fs::write(&path, text).unwrap();
            let error = Secret::read(&path).unwrap_err().to_string();
            assert!(error.contains("no secret"), "{error}");
        }
        fs::write(&path, "hush").unwrap();
        assert!(!format!("{:?}", Secret::read(&path).unwrap()).contains("hush"));
    }
}
