//! SIGHUP: the daemon looks at its flags, its configuration file and the files that these name again, without closing
//! a listener.
//!
//! What is read again is credentials (certificates and tokens of its own listeners; headers, certificates and helpers for
//! the cache and the upstream service) and policies (what is downloaded, from where, and into which output trees).
//! Everything is checked before anything is changed: a wrong setting leaves all as it was. Builds that run keep the
//! cache and the selection that they began with.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    io::{IsTerminal as _, stdin},
    net::SocketAddr,
};

use clap::{ArgMatches, Args as _, CommandFactory as _, FromArgMatches as _, parser::ValueSource};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{
    commands::{Cli, configured},
    exit::Failure,
    serve::ServeArgs,
};
use crate::{
    access::ListenerRules,
    bes::{BesAddress, Upstream},
    config::{AccessArgs, CacheArgs, ControlListenArgs, HoldArgs, SelectionArgs, naming_the_file},
    daemon::Services,
    roots::Destination,
};

/// Flags beside those of caches, selection and listeners that count at once; all others wait for a restart.
const AT_ONCE: &[&str] = &[
    "allow_exec_root",
    "bes_header",
    "control_tls_certificate",
    "control_tls_key",
    "control_token_file",
    "path_map",
];

/// What every flag has been given.
type Values = BTreeMap<String, Vec<OsString>>;

/// The rules of the open listeners.
pub(super) struct ListenerAccess {
    pub(super) bes: ListenerRules,
    pub(super) admin: ListenerRules,
    pub(super) control: Option<ListenerRules>,
}

/// What the daemon was started with.
pub(super) struct Settings {
    /// The command line. It names the configuration file that was read: if that is gone when it is read again, all stays
    /// as it is, for no settings are not what anybody has asked for.
    args: Vec<OsString>,
    /// What was read last.
    values: Values,
}

impl Settings {
    /// As they are now, as far as that is known.
    pub(super) fn at_start() -> Self {
        let args = naming_the_file(std::env::args_os().collect());
        let values = parse(&args).map(|(values, _)| values).unwrap_or_default();
        Self { args, values }
    }
}

/// What can be changed while the daemon runs.
pub(super) struct Reload {
    pub(super) settings: Settings,
    pub(super) access: ListenerAccess,
    /// Where build events are taken.
    pub(super) addresses: Vec<BesAddress>,
    /// Where the admin port is.
    pub(super) admin: Option<SocketAddr>,
    /// Where the control port is.
    pub(super) control: Option<SocketAddr>,
    pub(super) upstream: Option<Upstream>,
    pub(super) services: Services,
}

/// Waits for SIGHUP.
pub(super) struct Hangup {
    signal: Signal,
    on_terminal: bool,
}

impl Hangup {
    /// From now on the signal does not end the process.
    pub(super) fn listen() -> std::io::Result<Self> {
        Ok(Self {
            signal: signal(SignalKind::hangup())?,
            on_terminal: stdin().is_terminal(),
        })
    }

    /// Reloads at every signal, until the daemon ends.
    pub(super) async fn heed(mut self, mut reload: Reload, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                received = self.signal.recv() => if received.is_none() { return },
                () = shutdown.cancelled() => return,
            }
            // The signal's other meaning: anyone who started us in a terminal has closed it.
            if self.on_terminal && !stdin().is_terminal() {
                tracing::info!("shutting down: the terminal was closed");
                shutdown.cancel();
                return;
            }
            match reload.run() {
                Ok(()) => tracing::info!("reloaded: listeners, credentials, selection, output trees"),
                Err(failure) => {
                    tracing::error!(
                        "reload failed, keeping the current configuration: {}",
                        failure.message
                    );
                }
            }
        }
    }
}

impl Reload {
    fn run(&mut self) -> Result<(), Failure> {
        let (values, mut args) = parse(&self.settings.args)?;
        let changed = changed(&self.settings.values, &values);
        let at_once = at_once();
        // Everything is checked before anything is changed.
        let hold = args.hold.policy(HoldArgs::TIMEOUT)?;
        let upstream = args.upstream.upstream(&mut args.cache, hold)?;
        let policy = args.selection.policy()?;
        let rules = args.place.rules(Destination::ExecRoot)?;
        let source = args.cache.source_rule(false)?;
        let guards = args.guards(&self.addresses, self.admin)?;
        let control = args.control.port(&args.access, &args.cache.remote_cache)?;
        // Where it is open, which a changed flag alters at a restart only.
        if let Some((at, port)) = self.control.zip(control.as_ref()) {
            let flag = format!("--control-listen={at}");
            ControlListenArgs::check(&flag, &args.access, at, &port.rules)?;
        }

        self.access.bes.set(guards.bes);
        self.access.admin.set(guards.admin);
        if let Some((access, port)) = self.access.control.as_ref().zip(control) {
            access.set(port.rules);
        }
        if let Some((ours, new)) = self.upstream.as_ref().zip(upstream)
            && !changed.contains("bes_backend")
        {
            ours.take_credentials(&new);
        }
        self.services.reload(policy, rules, source);
        for id in changed.iter().filter(|id| !at_once.contains(*id)) {
            tracing::warn!(
                "--{} has changed, which takes effect after a restart",
                id.replace('_', "-")
            );
        }
        // What waits for a restart is reported each time.
        self.settings
            .values
            .extend(values.into_iter().filter(|(id, _)| at_once.contains(id)));
        Ok(())
    }
}

/// Reads flags, environment and configuration file.
fn parse(args: &[OsString]) -> Result<(Values, ServeArgs), Failure> {
    let command = Cli::command();
    let args = configured(&command, args.to_vec())?;
    let words = |error: clap::Error| {
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default();
        Failure::usage(line.trim_start_matches("error: "))
    };
    let matches = command.try_get_matches_from(args).map_err(words)?;
    let Some(("serve", serve)) = matches.subcommand() else {
        return Err(Failure::usage("these are not the flags of serve"));
    };
    Ok((given(serve), ServeArgs::from_arg_matches(serve).map_err(words)?))
}

fn given(matches: &ArgMatches) -> Values {
    matches
        .ids()
        .map(clap::Id::as_str)
        // Groups have names of their own.
        .filter(|id| matches!(matches.try_contains_id(id), Ok(true)))
        .filter(|id| matches.value_source(id) != Some(ValueSource::DefaultValue))
        .filter_map(|id| {
            let raw = matches.try_get_raw(id).ok().flatten()?;
            Some((id.to_owned(), raw.map(OsString::from).collect()))
        })
        .collect()
}

fn changed(before: &Values, now: &Values) -> BTreeSet<String> {
    before
        .keys()
        .chain(now.keys())
        .filter(|id| before.get(*id) != now.get(*id))
        .cloned()
        .collect()
}

/// The flags that count at once.
fn at_once() -> BTreeSet<String> {
    let groups = [
        CacheArgs::augment_args,
        SelectionArgs::augment_args,
        AccessArgs::augment_args,
    ]
    .map(|augment| augment(clap::Command::new("")));
    let flags = groups.iter().flat_map(|group| group.get_arguments());
    flags
        .map(|arg| arg.get_id().as_str())
        .chain(AT_ONCE.iter().copied())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_that_count_at_once_are_flags() {
        let command = Cli::command();
        let serve = command.find_subcommand("serve").unwrap();
        let all: BTreeSet<&str> = serve.get_arguments().map(|arg| arg.get_id().as_str()).collect();
        for id in at_once() {
            assert!(all.contains(&*id), "{id}");
        }
        assert!(!at_once().contains("state_dir"));
    }

    #[test]
    fn what_was_added_taken_away_or_altered_has_changed() {
        let values = |all: &[(&str, &str)]| -> Values {
            all.iter()
                .map(|(id, value)| ((*id).to_owned(), vec![value.into()]))
                .collect()
        };
        let before = values(&[("a", "1"), ("b", "1"), ("c", "1")]);
        let now = values(&[("a", "1"), ("b", "2"), ("d", "1")]);
        let names: Vec<_> = changed(&before, &now).into_iter().collect();
        assert_eq!(names, ["b", "c", "d"]);
    }
}
