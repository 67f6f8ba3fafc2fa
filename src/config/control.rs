//! The control API on TCP: the daemon's door, and how other commands find it.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use clap::Args;
use tonic::transport::{Certificate, ClientTlsConfig, Identity, Server, ServerTlsConfig};

use super::ConfigError;
use crate::{bes::BesAddress, control::Token, remote::Endpoint};

/// Flags of the daemon's control port.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Control API")]
pub struct ControlListenArgs {
    /// Serve the control API on TCP as well: IP:PORT. Needs --control-token-file, and TLS unless the address is a
    /// loopback one
    #[arg(long, value_name = "ADDR", env = "OUTHAUL_CONTROL_LISTEN")]
    pub control_listen: Option<String>,

    /// PEM file of the control port's certificate
    #[arg(long, value_name = "FILE", env = "OUTHAUL_CONTROL_TLS_CERTIFICATE")]
    pub control_tls_certificate: Option<PathBuf>,

    /// PEM file of the key of --control-tls-certificate
    #[arg(long, value_name = "FILE", env = "OUTHAUL_CONTROL_TLS_KEY")]
    pub control_tls_key: Option<PathBuf>,

    /// File with the token that callers of the control port must show
    #[arg(long, value_name = "FILE", env = "OUTHAUL_CONTROL_TOKEN_FILE")]
    pub control_token_file: Option<PathBuf>,
}

/// A control port that can be opened.
#[derive(Debug)]
pub struct ControlPort {
    /// Where.
    pub address: SocketAddr,
    /// With which certificate.
    pub tls: Option<ServerTlsConfig>,
    /// For whom.
    pub token: Token,
}

impl ControlListenArgs {
    /// The port, if one is asked for.
    ///
    /// # Errors
    /// Naming the flag that is wrong or missing.
    pub fn port(&self) -> Result<Option<ControlPort>, ConfigError> {
        let tls = match (&self.control_tls_certificate, &self.control_tls_key) {
            (Some(certificate), Some(key)) => Some(identity(certificate, key)?),
            (None, None) => None,
            (Some(_), None) => {
                return Err(ConfigError::new(
                    "--control-tls-key",
                    "is needed with --control-tls-certificate",
                ));
            }
            (None, Some(_)) => {
                return Err(ConfigError::new(
                    "--control-tls-certificate",
                    "is needed with --control-tls-key",
                ));
            }
        };
        let token = self.control_token_file.as_deref().map(token).transpose()?;
        let Some(text) = &self.control_listen else {
            return Ok(None);
        };
        let flag = || format!("--control-listen={text}");
        let address = match text.parse() {
            Ok(BesAddress::Tcp(address)) => address,
            Ok(BesAddress::Unix(_)) => {
                return Err(ConfigError::new(flag(), "is a unix socket; use --control-socket"));
            }
            Err(_) => return Err(ConfigError::new(flag(), "is not an address: expected IP:PORT")),
        };
        let token = token.ok_or_else(|| {
            ConfigError::new(
                "--control-token-file",
                "is needed with --control-listen: whoever reaches the port could \
                                                      ask for anything",
            )
        })?;
        if tls.is_none() && !address.ip().is_loopback() {
            return Err(ConfigError::new(
                flag(),
                "needs --control-tls-certificate and --control-tls-key: others could read the token on its way",
            ));
        }
        Ok(Some(ControlPort { address, tls, token }))
    }
}

/// Flags of commands that ask a daemon.
#[derive(Debug, Clone, Default, Args)]
pub struct ControlArgs {
    /// The daemon that is asked: unix:PATH, grpcs://HOST:PORT, or grpc://HOST:PORT on this machine; by default
    /// --control-socket. With it, the record of this machine is not looked at
    #[arg(long, value_name = "ADDR", env = "OUTHAUL_CONTROL")]
    pub control: Option<String>,

    /// File with the token of a daemon that is asked over TCP
    #[arg(long, value_name = "FILE", env = "OUTHAUL_CONTROL_TOKEN_FILE")]
    pub control_token_file: Option<PathBuf>,
}

/// A daemon elsewhere, or under another name.
#[derive(Debug, Clone)]
pub struct ControlAddress {
    /// Where.
    pub endpoint: Endpoint,
    /// What it is shown.
    pub token: Option<Token>,
    /// Whom to trust with TLS.
    pub tls: Option<ClientTlsConfig>,
}

impl ControlArgs {
    /// The daemon that `--control` names, if it names one. `authorities` is the file of `--tls-certificate`.
    ///
    /// # Errors
    /// Naming the flag that is wrong or missing.
    pub fn address(&self, authorities: Option<&Path>) -> Result<Option<ControlAddress>, ConfigError> {
        let Some(text) = &self.control else {
            return Ok(None);
        };
        let endpoint = Endpoint::parse("--control", text)
            .map_err(|e| ConfigError::new(e.context.clone(), &e.message))?;
        let token = self.control_token_file.as_deref().map(token).transpose()?;
        if let Some(host) = endpoint.host() {
            if token.is_none() {
                return Err(ConfigError::new(
                    "--control-token-file",
                    "is needed to ask over TCP",
                ));
            }
            let loopback = host == "localhost"
                || host
                    .parse::<std::net::IpAddr>()
                    .is_ok_and(|address| address.is_loopback());
            if !endpoint.is_tls() && !loopback {
                return Err(ConfigError::new(
                    format!("--control={text}"),
                    "would send the token unencrypted; use grpcs://",
                ));
            }
        }
        let tls = match authorities {
            _ if !endpoint.is_tls() => None,
            None => Some(ClientTlsConfig::new().with_native_roots()),
            Some(file) => Some(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem(
                "--tls-certificate",
                file,
                "CERTIFICATE",
            )?))),
        };
        // A socket is guarded by the system.
        let token = token.filter(|_| endpoint.host().is_some());
        Ok(Some(ControlAddress { endpoint, token, tls }))
    }
}

/// The port's certificate and key, as far as can be told by looking.
fn identity(certificate: &Path, key: &Path) -> Result<ServerTlsConfig, ConfigError> {
    let tls = ServerTlsConfig::new().identity(Identity::from_pem(
        pem("--control-tls-certificate", certificate, "CERTIFICATE")?,
        pem("--control-tls-key", key, "PRIVATE KEY")?,
    ));
    // What serving would say, while nothing is open yet.
    Server::builder().tls_config(tls.clone()).map_err(|e| {
        let reason = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
        ConfigError::new(
            format!("--control-tls-certificate={}", certificate.display()),
            reason,
        )
    })?;
    Ok(tls)
}

fn token(path: &Path) -> Result<Token, ConfigError> {
    Token::read(path).map_err(|e| ConfigError::new(format!("--control-token-file={}", path.display()), e))
}

/// The bytes of a PEM file that has a section of the kind.
fn pem(flag: &str, path: &Path, section: &str) -> Result<Vec<u8>, ConfigError> {
    let error = |reason: String| ConfigError::new(format!("{flag}={}", path.display()), reason);
    let bytes = std::fs::read(path).map_err(|e| error(e.to_string()))?;
    if String::from_utf8_lossy(&bytes).contains(&format!("{section}-----")) {
        Ok(bytes)
    } else {
        Err(error(format!("has no PEM section {section}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Serve {
        #[command(flatten)]
        args: ControlListenArgs,
    }

    #[derive(Parser)]
    struct Ask {
        #[command(flatten)]
        args: ControlArgs,
    }

    fn port(args: &[&str]) -> Result<Option<ControlPort>, ConfigError> {
        let args = std::iter::once("outhaul").chain(args.iter().copied());
        Serve::parse_from(args).args.port()
    }

    fn address(args: &[&str]) -> Result<Option<ControlAddress>, ConfigError> {
        let args = std::iter::once("outhaul").chain(args.iter().copied());
        Ask::parse_from(args).args.address(None)
    }

    /// A directory with a token, a certificate and its key.
    fn files() -> (tempfile::TempDir, String, String, String) {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let signed = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let token = file("token", "0123456789abcdef\n");
        let certificate = file("cert.pem", &signed.cert.pem());
        let key = file("key.pem", &signed.signing_key.serialize_pem());
        (dir, token, certificate, key)
    }

    #[test]
    fn a_port_is_opened_with_a_token_and_beyond_the_machine_with_tls() {
        let (dir, token, certificate, key) = files();
        let token = format!("--control-token-file={token}");
        let certificate = format!("--control-tls-certificate={certificate}");
        let key = format!("--control-tls-key={key}");
        assert!(port(&[]).unwrap().is_none());
        assert!(
            port(&["--control-listen=127.0.0.1:0", &token])
                .unwrap()
                .unwrap()
                .tls
                .is_none()
        );
        let far = port(&["--control-listen=0.0.0.0:1", &token, &certificate, &key]);
        assert!(far.unwrap().unwrap().tls.is_some());
        let other = rcgen::generate_simple_self_signed(vec!["other".to_owned()]).unwrap();
        let other_key = dir.path().join("other.pem");
        std::fs::write(&other_key, other.signing_key.serialize_pem()).unwrap();
        let other_key = format!("--control-tls-key={}", other_key.display());
        for (args, flag) in [
            (
                vec!["--control-listen=0.0.0.0:1", &token, &certificate, &other_key],
                "--control-tls-certificate=",
            ),
            (vec!["--control-listen=127.0.0.1:0"], "--control-token-file"),
            (
                vec!["--control-listen=0.0.0.0:1", &token],
                "--control-tls-certificate",
            ),
            (
                vec!["--control-listen=[::]:1", &token],
                "--control-tls-certificate",
            ),
            (
                vec!["--control-listen=0.0.0.0:1", &certificate, &key],
                "--control-token-file",
            ),
            (
                vec!["--control-listen=0.0.0.0:1", &token, &certificate],
                "--control-tls-key",
            ),
            (
                vec!["--control-listen=0.0.0.0:1", &token, &key],
                "--control-tls-certificate",
            ),
            (vec!["--control-listen=unix:/x", &token], "--control-socket"),
            (vec!["--control-listen=here", &token], "--control-listen=here"),
            (
                vec!["--control-token-file=/nonexistent"],
                "--control-token-file=/nonexistent",
            ),
        ] {
            let error = port(&args).expect_err("wrong").to_string();
            assert!(error.contains(flag), "{args:?}: {error}");
        }
    }

    #[test]
    fn a_token_is_never_sent_unencrypted_beyond_the_machine() {
        let (_dir, token, ..) = files();
        let token = format!("--control-token-file={token}");
        assert!(address(&[]).unwrap().is_none());
        assert!(address(&["--control=unix:/x"]).unwrap().unwrap().token.is_none());
        let local = address(&["--control=grpc://127.0.0.1:1", &token])
            .unwrap()
            .unwrap();
        assert!(local.tls.is_none() && local.token.is_some());
        let far = address(&["--control=grpcs://ci.example:1", &token])
            .unwrap()
            .unwrap();
        assert!(far.tls.is_some());
        for (args, flag) in [
            (vec!["--control=grpcs://ci.example:1"], "--control-token-file"),
            (vec!["--control=grpc://ci.example:1", &token], "grpcs://"),
            (vec!["--control=http://ci.example:1", &token], "--control"),
        ] {
            let error = address(&args).expect_err("wrong").to_string();
            assert!(error.contains(flag), "{args:?}: {error}");
        }
    }
}
