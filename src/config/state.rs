//! Where the daemon keeps what it knows, and how it holds builds back.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;

use super::{ConfigError, duration};
use crate::bes::{HoldMode, HoldPolicy};

/// Flags of the state directory.
#[derive(Debug, Clone, Args)]
pub(crate) struct StateArgs {
    /// Directory of the record and the journal; by default outhaul/ in the XDG state directory
    #[arg(long, value_name = "DIR", env = "OUTHAUL_STATE_DIR")]
    pub state_dir: Option<PathBuf>,

    /// Unix socket of the control API; by default control.sock in the state directory
    #[arg(long, value_name = "PATH", env = "OUTHAUL_CONTROL_SOCKET")]
    pub control_socket: Option<PathBuf>,
}

impl StateArgs {
    /// The state directory.
    ///
    /// # Errors
    /// When neither the flag nor the environment names one.
    pub(crate) fn directory(&self) -> Result<PathBuf, ConfigError> {
        if let Some(path) = &self.state_dir {
            return std::path::absolute(path)
                .map_err(|e| ConfigError::new(format!("--state-dir={}", path.display()), e));
        }
        let absolute = |name: &str| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        absolute("XDG_STATE_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
            .map(|base| base.join("outhaul"))
            .ok_or_else(|| {
                ConfigError::new(
                    "--state-dir",
                    "is required: neither XDG_STATE_HOME nor HOME is set",
                )
            })
    }

    /// The control socket.
    ///
    /// # Errors
    /// As [`StateArgs::directory`]; or the path is longer than a socket's may be.
    pub(crate) fn socket(&self) -> Result<PathBuf, ConfigError> {
        let path = match &self.control_socket {
            Some(path) => path.clone(),
            None => self.directory()?.join("control.sock"),
        };
        check_socket_path("--control-socket", &path)?;
        Ok(path)
    }
}

/// Linux allows 107 bytes for a socket's path.
pub(crate) fn check_socket_path(flag: &str, path: &Path) -> Result<(), ConfigError> {
    if path.as_os_str().len() > 107 {
        return Err(ConfigError::new(
            format!("{flag}={}", path.display()),
            "exceeds the limit of 107 bytes for the path of a unix socket",
        ));
    }
    Ok(())
}

/// Flags of holding.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Holding")]
pub(crate) struct HoldArgs {
    /// What waits for outputs: invocation (the build command), target (also the TargetComplete events that are
    /// forwarded, see --bes-backend) or none
    #[arg(long, value_name = "MODE", env = "OUTHAUL_HOLD", default_value = "invocation")]
    pub hold: String,

    /// Longest time that the build waits; outputs that are still missing are downloaded after it has ended [default: 10m;
    /// with `outhaul run`, until all have been downloaded or failed]
    #[arg(long, value_name = "DURATION", env = "OUTHAUL_HOLD_TIMEOUT")]
    pub hold_timeout: Option<String>,

    /// Fail the build command if a required output cannot be downloaded in time
    #[arg(long, env = "OUTHAUL_STRICT")]
    pub strict: bool,
}

impl HoldArgs {
    /// How long the build waits by default.
    pub(crate) const TIMEOUT: Duration = Duration::from_secs(10 * 60);

    /// As what the event service takes, with this timeout by default.
    ///
    /// # Errors
    /// Naming the flag that is wrong.
    pub(crate) fn policy(&self, default: Duration) -> Result<HoldPolicy, ConfigError> {
        let mode = match self.hold.as_str() {
            "invocation" => HoldMode::Invocation,
            "target" => HoldMode::Target,
            "none" => HoldMode::None,
            other => {
                return Err(ConfigError::new(
                    "--hold",
                    format!("expected invocation, target or none, got {other:?}"),
                ));
            }
        };
        if self.strict && mode == HoldMode::None {
            return Err(ConfigError::new(
                "--strict",
                "requires --hold=invocation or --hold=target: a command that does not wait for outputs cannot \
                 fail because of them",
            ));
        }
        let given = self.hold_timeout.as_deref();
        let timeout = given.map_or(Ok(default), |text| duration("--hold-timeout", text))?;
        if timeout.is_zero() {
            return Err(ConfigError::new(
                "--hold-timeout",
                "must be greater than zero; use --hold=none",
            ));
        }
        Ok(HoldPolicy {
            mode,
            timeout,
            strict: self.strict,
            is_followed: false,
        })
    }
}
