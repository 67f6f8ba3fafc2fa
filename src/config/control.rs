//! The control API on TCP: the daemon's listener, and how other commands find it.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;

use super::{
    AccessArgs, ConfigError,
    access::{server_tls, token},
};
use crate::{
    access::{Rules, Token},
    bes::BesAddress,
    stage::{Origin, Origins, Reach},
    transport::{ConnectOptions, Endpoint, TlsFiles, without_secrets, without_user_info},
};

/// Flags of the daemon's control port.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Control API")]
pub(crate) struct ControlListenArgs {
    /// Serve the control API on TCP as well: IP:PORT. Needs --control-token-file or --listen-tls-client-ca, and TLS
    /// unless the address is a loopback one
    #[arg(long, value_name = "ADDR", env = "OUTHAUL_CONTROL_LISTEN")]
    pub control_listen: Option<String>,

    /// PEM file of the control port's certificate, if it differs from --listen-tls-certificate
    #[arg(long, value_name = "FILE", env = "OUTHAUL_CONTROL_TLS_CERTIFICATE")]
    pub control_tls_certificate: Option<PathBuf>,

    /// PEM file of the key of --control-tls-certificate
    #[arg(long, value_name = "FILE", env = "OUTHAUL_CONTROL_TLS_KEY")]
    pub control_tls_key: Option<PathBuf>,

    /// File with the token that callers of the control port must send
    #[arg(long, value_name = "FILE", env = "OUTHAUL_CONTROL_TOKEN_FILE")]
    pub control_token_file: Option<PathBuf>,

    /// Directory that callers of the control port may stage outputs into, including its subdirectories (repeatable);
    /// without it, they cannot stage
    #[arg(
        long,
        value_name = "DIR",
        env = "OUTHAUL_CONTROL_STAGE_DIR",
        value_delimiter = ','
    )]
    pub control_stage_dir: Vec<PathBuf>,

    /// URL that callers of the control port may stage archives from, including what is below it (repeatable): http://,
    /// https://, s3://, gs:// or az://. What is below --remote-cache is allowed without it, directories of this machine are
    /// not
    #[arg(
        long,
        value_name = "URL",
        env = "OUTHAUL_CONTROL_STAGE_FROM",
        value_delimiter = ','
    )]
    pub control_stage_from: Vec<String>,
}

/// A control port that can be opened.
pub(crate) struct ControlPort {
    /// The address to listen on.
    pub address: SocketAddr,
    /// Who may connect.
    pub rules: Rules,
    /// What they may have something staged into.
    pub reach: Reach,
}

impl ControlListenArgs {
    /// The port, if one is asked for. Its callers may stage from these caches as well, if they have URLs of files.
    ///
    /// # Errors
    /// Naming the flag that is wrong or missing.
    pub(crate) fn port(
        &self,
        access: &AccessArgs,
        caches: &[String],
    ) -> Result<Option<ControlPort>, ConfigError> {
        let own = [&self.control_tls_certificate, &self.control_tls_key];
        let tls = if own.iter().any(|file| file.is_some()) {
            server_tls(
                ["--control-tls-certificate", "--control-tls-key"],
                self.control_tls_certificate.as_deref(),
                self.control_tls_key.as_deref(),
                access.listen_tls_client_ca.as_deref(),
            )?
        } else {
            access.tls()?
        };
        let token = token("--control-token-file", self.control_token_file.as_deref())?;
        let origins = self.origins(caches)?;
        let Some(text) = &self.control_listen else {
            return Ok(None);
        };
        let flag = || format!("--control-listen={}", without_user_info(text));
        let address = match text.parse() {
            Ok(BesAddress::Tcp(address)) => address,
            Ok(BesAddress::Unix(_)) => {
                return Err(ConfigError::new(
                    flag(),
                    "expected IP:PORT; for a unix socket, use --control-socket",
                ));
            }
            Err(_) => return Err(ConfigError::new(flag(), "expected IP:PORT")),
        };
        let rules = Rules {
            tls,
            token,
            // Of another user's process, a token was asked for.
            other_users: false,
        };
        Self::check(&flag(), access, address, &rules)?;
        let absolute = |dir: &PathBuf| {
            std::path::absolute(dir)
                .map_err(|e| ConfigError::new(format!("--control-stage-dir={}", dir.display()), e))
        };
        let reach: Result<Vec<_>, _> = self.control_stage_dir.iter().map(absolute).collect();
        Ok(Some(ControlPort {
            address,
            rules,
            reach: Reach::Below(reach?.into(), origins),
        }))
    }

    fn origins(&self, caches: &[String]) -> Result<Origins, ConfigError> {
        let given = self.control_stage_from.iter().map(|url| {
            let flag = || format!("--control-stage-from={}", without_secrets(url));
            Origin::parse(url).map_err(|e| ConfigError::new(flag(), e.to_string()))
        });
        let mut origins = given.collect::<Result<Vec<_>, _>>()?;
        // Of others, no file has a URL.
        origins.extend(caches.iter().filter_map(|url| Origin::parse(url).ok()));
        Ok(Origins::Below(origins.into()))
    }

    /// Whether a port may be open at an address by these rules.
    ///
    /// # Errors
    /// Naming the listener's flag, or the one that is missing.
    pub(crate) fn check(
        listener: &str,
        access: &AccessArgs,
        address: SocketAddr,
        rules: &Rules,
    ) -> Result<(), ConfigError> {
        let certified = rules.tls.as_ref().is_some_and(|tls| tls.wants_certificates);
        if rules.token.is_none() && !certified {
            return Err(ConfigError::new(
                "--control-token-file",
                "--control-listen requires this or --listen-tls-client-ca: otherwise anyone who can reach the \
                 port controls the daemon",
            ));
        }
        if rules.tls.is_none() && !address.ip().to_canonical().is_loopback() && !access.insecure {
            return Err(ConfigError::new(
                listener,
                "requires --control-tls-certificate and --control-tls-key, or --listen-tls-certificate and \
                 --listen-tls-key: otherwise the token is sent unencrypted",
            ));
        }
        Ok(())
    }
}

/// Flags of commands that ask a daemon.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ControlArgs {
    /// Address of the daemon: unix:PATH, grpcs://HOST:PORT, or grpc://HOST:PORT on this machine; by default
    /// --control-socket. With it, the record of this machine is not used
    #[arg(long, value_name = "ADDR", env = "OUTHAUL_CONTROL")]
    pub control: Option<String>,

    /// File with the token for a daemon on TCP
    #[arg(long, value_name = "FILE", env = "OUTHAUL_CONTROL_TOKEN_FILE")]
    pub control_token_file: Option<PathBuf>,
}

/// A daemon elsewhere, or under another name.
#[derive(Debug, Clone)]
pub(crate) struct ControlAddress {
    /// How the daemon is reached.
    pub connect: ConnectOptions,
    /// What it is shown.
    pub token: Option<Token>,
}

impl ControlArgs {
    /// The daemon that `--control` names, if it names one.
    ///
    /// # Errors
    /// Naming the flag that is wrong or missing.
    pub(crate) fn address(&self, files: TlsFiles) -> Result<Option<ControlAddress>, ConfigError> {
        let Some(text) = &self.control else {
            return Ok(None);
        };
        let endpoint = Endpoint::parse("--control", text)?;
        let token = token("--control-token-file", self.control_token_file.as_deref())?;
        let is_remote = endpoint.host().is_some();
        if is_remote {
            let identity = files.client_certificate.as_ref().zip(files.client_key.as_ref());
            if token.is_none() && identity.is_none() {
                return Err(ConfigError::new(
                    "--control-token-file",
                    "--control over TCP requires this or --tls-client-certificate",
                ));
            }
            if !endpoint.is_tls() && !endpoint.is_local() {
                return Err(ConfigError::new(
                    format!("--control={text}"),
                    "would send the token unencrypted; use grpcs://",
                ));
            }
        }
        let mut connect = ConnectOptions::new(endpoint);
        if connect.endpoint.is_tls() {
            files.read()?;
            connect.tls = files;
        }
        // A socket is guarded by the system.
        let token = token.filter(|_| is_remote);
        Ok(Some(ControlAddress { connect, token }))
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
        #[command(flatten)]
        access: AccessArgs,
    }

    #[derive(Parser)]
    struct Ask {
        #[command(flatten)]
        args: ControlArgs,
    }

    fn port(args: &[&str]) -> Result<Option<ControlPort>, ConfigError> {
        let args = std::iter::once("outhaul").chain(args.iter().copied());
        let serve = Serve::parse_from(args);
        serve.args.port(&serve.access, &[])
    }

    fn address(args: &[&str]) -> Result<Option<ControlAddress>, ConfigError> {
        let args = std::iter::once("outhaul").chain(args.iter().copied());
        Ask::parse_from(args).args.address(TlsFiles::default())
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
                .rules
                .tls
                .is_none()
        );
        let far = port(&["--control-listen=0.0.0.0:1", &token, &certificate, &key]);
        assert!(far.unwrap().unwrap().rules.tls.is_some());
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
            let error = port(&args).err().expect("wrong").to_string();
            assert!(error.contains(flag), "{args:?}: {error}");
        }
    }

    #[test]
    fn callers_of_the_port_reach_the_directories_that_are_named_and_none_by_default() {
        let (_dir, token, ..) = files();
        let token = format!("--control-token-file={token}");
        for (args, expected) in [
            (vec![], vec![]),
            (
                vec!["--control-stage-dir=/a", "--control-stage-dir=/b/c"],
                vec!["/a", "/b/c"],
            ),
        ] {
            let args: Vec<&str> = ["--control-listen=127.0.0.1:0", &token]
                .into_iter()
                .chain(args)
                .collect();
            let Reach::Below(dirs, _) = port(&args).unwrap().unwrap().reach else {
                panic!("anywhere")
            };
            assert_eq!(*dirs, *expected.iter().map(PathBuf::from).collect::<Vec<_>>());
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
        assert!(!local.connect.endpoint.is_tls() && local.token.is_some());
        let far = address(&["--control=grpcs://ci.example:1", &token])
            .unwrap()
            .unwrap();
        assert!(far.connect.endpoint.is_tls());
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
