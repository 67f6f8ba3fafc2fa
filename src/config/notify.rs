//! Flags of notifications about settled targets and builds.

use std::path::PathBuf;

use clap::Args;

use super::{ConfigError, all_parsed, duration};
use crate::notify::{Hook, NotifyOptions, NotifyUrl, Secret};

/// Flags of notifications.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Notifications")]
pub(crate) struct NotifyArgs {
    /// URL to post a JSON document to for every settled target and build: http://... or https://... (repeatable)
    #[arg(long, value_name = "URL", env = "OUTHAUL_NOTIFY_URL", hide_env_values = true)]
    pub notify_url: Vec<String>,

    /// File with the secret for signing posted documents (HMAC-SHA256, like GitHub's webhooks)
    #[arg(long, value_name = "FILE", env = "OUTHAUL_NOTIFY_SECRET_FILE")]
    pub notify_secret_file: Option<PathBuf>,

    /// Shell command to run for every settled target and build, with the document on standard input
    #[arg(
        long,
        value_name = "COMMAND",
        env = "OUTHAUL_ON_SETTLED",
        hide_env_values = true
    )]
    pub on_settled: Option<String>,

    /// How long such a command may run before it is killed
    #[arg(
        long,
        value_name = "DURATION",
        env = "OUTHAUL_ON_SETTLED_TIMEOUT",
        default_value = "5m"
    )]
    pub on_settled_timeout: String,

    /// Events to notify about: target_settled, invocation_settled (repeatable)
    #[arg(
        long,
        value_name = "EVENT",
        env = "OUTHAUL_NOTIFY_EVENTS",
        value_delimiter = ',',
        default_values = ["target_settled", "invocation_settled"]
    )]
    pub notify_events: Vec<String>,
}

impl NotifyArgs {
    /// As what the notifier takes. Reads the secret.
    ///
    /// # Errors
    /// Naming the flag that is wrong, and nothing of a URL.
    pub(crate) fn options(&self) -> Result<NotifyOptions, ConfigError> {
        let urls: Vec<NotifyUrl> = all_parsed("--notify-url", &self.notify_url)?;
        let secret = match &self.notify_secret_file {
            Some(_) if urls.is_empty() => {
                return Err(ConfigError::new(
                    "--notify-secret-file",
                    "requires --notify-url: nothing else is signed",
                ));
            }
            Some(path) => Some(
                Secret::read(path)
                    .map_err(|e| ConfigError::new(format!("--notify-secret-file={}", path.display()), e))?,
            ),
            None => None,
        };
        let timeout = duration("--on-settled-timeout", &self.on_settled_timeout)?;
        if timeout.is_zero() {
            return Err(ConfigError::new(
                "--on-settled-timeout",
                "must be greater than zero",
            ));
        }
        let command = self.on_settled.clone();
        if command.as_ref().is_some_and(|command| command.trim().is_empty()) {
            return Err(ConfigError::new("--on-settled", "must not be empty"));
        }
        let hook = command.map(|command| Hook { command, timeout });
        Ok(NotifyOptions {
            urls,
            secret,
            hook,
            events: all_parsed("--notify-events", &self.notify_events)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::notify::Event;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        notify: NotifyArgs,
    }

    fn options(args: &[&str]) -> Result<NotifyOptions, String> {
        Cli::try_parse_from([&["x"], args].concat())
            .map_err(|e| e.to_string())?
            .notify
            .options()
            .map_err(|e| e.to_string())
    }

    #[test]
    fn nobody_is_notified_unless_asked_for() {
        let nobody = options(&[]).unwrap();
        assert!(nobody.is_empty());
        let some = options(&[
            "--notify-url=http://a/x,y",
            "--notify-url=https://b",
            "--notify-events=invocation_settled",
            "--on-settled=cat",
            "--on-settled-timeout=7s",
        ])
        .unwrap();
        assert!(!some.is_empty());
        let urls: Vec<String> = some.urls.iter().map(ToString::to_string).collect();
        assert_eq!(urls, ["http://a", "https://b"]);
        assert_eq!(some.events, [Event::InvocationSettled]);
        assert_eq!(some.hook.unwrap().timeout.as_secs(), 7);
    }

    #[test]
    fn errors_name_the_flag_and_show_no_secret() {
        for (args, flag) in [
            (&["--notify-url=ftp://user:hush@h/"][..], "--notify-url"),
            (&["--notify-url=hush"], "--notify-url"),
            (&["--notify-secret-file=/nowhere"], "--notify-secret-file"),
            (
                &["--notify-url=http://h/hush", "--notify-secret-file=/nowhere"],
                "--notify-secret-file=/nowhere",
            ),
            (&["--on-settled= "], "--on-settled"),
            (&["--on-settled-timeout=0"], "--on-settled-timeout"),
            (&["--on-settled-timeout=soon"], "--on-settled-timeout"),
            (&["--notify-events=all"], "--notify-events"),
        ] {
            let error = options(args).map(|_| ()).unwrap_err();
            assert!(error.starts_with(flag) && !error.contains("hush"), "{error}");
        }
    }
}
