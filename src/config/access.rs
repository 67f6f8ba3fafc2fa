//! Who may come in where the daemon listens.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use clap::Args;

use super::ConfigError;
use crate::access::{Rules, ServerTls, TlsFile, Token};

/// Where build tools connect unless told otherwise.
pub(crate) const BES_LISTEN: &str = "127.0.0.1:8985";

/// Flags of all listening sockets.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Who may connect")]
pub(crate) struct AccessArgs {
    /// PEM file of the certificate for TLS on every TCP port that the daemon listens on
    #[arg(long, value_name = "FILE", env = "OUTHAUL_LISTEN_TLS_CERTIFICATE")]
    pub listen_tls_certificate: Option<PathBuf>,

    /// PEM file of the key of --listen-tls-certificate
    #[arg(long, value_name = "FILE", env = "OUTHAUL_LISTEN_TLS_KEY")]
    pub listen_tls_key: Option<PathBuf>,

    /// PEM file of the certificate authorities for client certificates; callers of these ports must then present one
    #[arg(long, value_name = "FILE", env = "OUTHAUL_LISTEN_TLS_CLIENT_CA")]
    pub listen_tls_client_ca: Option<PathBuf>,

    /// File with the token that build tools must send on TCP (--bes_header=authorization=Bearer TOKEN)
    #[arg(long, value_name = "FILE", env = "OUTHAUL_BES_TOKEN_FILE")]
    pub bes_token_file: Option<PathBuf>,

    /// File with the token that callers of the admin port must send, except for /healthz and /readyz
    #[arg(long, value_name = "FILE", env = "OUTHAUL_ADMIN_TOKEN_FILE")]
    pub admin_token_file: Option<PathBuf>,

    /// Accept connections from other machines, and from other users of this machine, without TLS or authentication.
    /// Anyone who can send build events can then write files into your output trees
    #[arg(long, env = "OUTHAUL_INSECURE")]
    pub insecure: bool,
}

impl AccessArgs {
    /// The rules for build tools.
    ///
    /// # Errors
    /// Naming the flag that is wrong.
    pub(crate) fn bes(&self) -> Result<Rules, ConfigError> {
        self.rules("--bes-token-file", self.bes_token_file.as_deref())
    }

    /// The rules of the admin port.
    ///
    /// # Errors
    /// Naming the flag that is wrong.
    pub(crate) fn admin(&self) -> Result<Rules, ConfigError> {
        self.rules("--admin-token-file", self.admin_token_file.as_deref())
    }

    fn rules(&self, flag: &str, file: Option<&Path>) -> Result<Rules, ConfigError> {
        Ok(Rules {
            tls: self.tls()?,
            token: token(flag, file)?,
            other_users: self.insecure,
        })
    }

    /// TLS, if there is a certificate.
    pub(super) fn tls(&self) -> Result<Option<ServerTls>, ConfigError> {
        server_tls(
            ["--listen-tls-certificate", "--listen-tls-key"],
            self.listen_tls_certificate.as_deref(),
            self.listen_tls_key.as_deref(),
            self.listen_tls_client_ca.as_deref(),
        )
    }

    /// Whether an address may be listened on by these rules: beyond this machine, only with TLS and for those who can
    /// say who they are.
    ///
    /// # Errors
    /// Naming the listener's flag and the one that is missing.
    pub(crate) fn check(
        &self,
        listener: &str,
        token_flag: &str,
        address: SocketAddr,
        rules: &Rules,
    ) -> Result<(), ConfigError> {
        if self.insecure || address.ip().to_canonical().is_loopback() {
            return Ok(());
        }
        let missing = match &rules.tls {
            None => "--listen-tls-certificate and --listen-tls-key".to_owned(),
            Some(tls) if !tls.wants_certificates && rules.token.is_none() => {
                format!("{token_flag} or --listen-tls-client-ca")
            }
            Some(_) => return Ok(()),
        };
        Err(ConfigError::new(
            listener,
            format!(
                "{address} can be reached from other machines, which requires {missing}; or --insecure, if \
                 everyone there may do everything"
            ),
        ))
    }
}

/// TLS from a pair of flags, both or neither of which are given.
pub(super) fn server_tls(
    [certificate_flag, key_flag]: [&str; 2],
    certificate: Option<&Path>,
    key: Option<&Path>,
    authorities: Option<&Path>,
) -> Result<Option<ServerTls>, ConfigError> {
    const AUTHORITIES: &str = "--listen-tls-client-ca";
    let (certificate, key) = match (certificate, key) {
        (Some(certificate), Some(key)) => (certificate, key),
        (None, None) if authorities.is_some() => {
            return Err(ConfigError::new(
                AUTHORITIES,
                format!("requires {certificate_flag}"),
            ));
        }
        (None, None) => return Ok(None),
        (Some(_), None) => {
            return Err(ConfigError::new(
                key_flag,
                format!("is required with {certificate_flag}"),
            ));
        }
        (None, Some(_)) => {
            return Err(ConfigError::new(
                certificate_flag,
                format!("is required with {key_flag}"),
            ));
        }
    };
    ServerTls::read(certificate, key, authorities)
        .map(Some)
        .map_err(|e| {
            let (flag, path) = match e.file {
                TlsFile::Certificate => (certificate_flag, certificate),
                TlsFile::Key => (key_flag, key),
                TlsFile::ClientAuthorities => (AUTHORITIES, authorities.unwrap_or(Path::new(""))),
            };
            ConfigError::new(format!("{flag}={}", path.display()), e)
        })
}

/// The token in a file, if there is one.
pub(super) fn token(flag: &str, file: Option<&Path>) -> Result<Option<Token>, ConfigError> {
    let read = |path: &Path| {
        Token::read(path).map_err(|e| ConfigError::new(format!("{flag}={}", path.display()), e))
    };
    file.map(read).transpose()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        access: AccessArgs,
    }

    fn check(args: &[&str], address: &str) -> Result<(), String> {
        let access = Cli::parse_from(std::iter::once("outhaul").chain(args.iter().copied())).access;
        let rules = access.bes().map_err(|e| e.to_string())?;
        access
            .check(
                "--bes-listen",
                "--bes-token-file",
                address.parse().unwrap(),
                &rules,
            )
            .map_err(|e| e.to_string())
    }

    #[test]
    fn other_machines_are_listened_to_only_with_tls_and_only_if_they_say_who_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let file = |flag: &str, text: &str| {
            let path = dir.path().join(flag.trim_start_matches('-'));
            std::fs::write(&path, text).unwrap();
            format!("{flag}={}", path.display())
        };
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let certificate = &*file("--listen-tls-certificate", &made.cert.pem());
        let key = &*file("--listen-tls-key", &made.signing_key.serialize_pem());
        let authority = &*file("--listen-tls-client-ca", &made.cert.pem());
        let token = &*file("--bes-token-file", "0123456789abcdef");
        for near in ["127.0.0.1:1", "127.1.2.3:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
            check(&[], near).unwrap();
            check(&[token], near).unwrap();
        }
        for far in [
            "0.0.0.0:1",
            "[::]:1",
            "192.0.2.1:1",
            "[2001:db8::1]:1",
            "[::ffff:192.0.2.1]:1",
        ] {
            for (args, missing) in [
                (&[][..], "--listen-tls-certificate"),
                (&[token], "--listen-tls-certificate"),
                (&[certificate, key], "--bes-token-file or --listen-tls-client-ca"),
                (&[certificate], "--listen-tls-key"),
                (&[key, token], "--listen-tls-certificate"),
                (&[authority, token], "--listen-tls-certificate"),
            ] {
                let error = check(args, far).unwrap_err();
                assert!(error.contains(missing), "{args:?} {far}: {error}");
            }
            check(&[certificate, key, token], far).unwrap();
            check(&[certificate, key, authority], far).unwrap();
            check(&["--insecure"], far).unwrap();
        }
        let none = dir.path().join("none");
        let none = format!("--bes-token-file={}", none.display());
        assert!(check(&[&none], "127.0.0.1:1").unwrap_err().contains(&none));
    }
}
