//! `outhaul mount`: recorded builds as a read-only directory.

use std::{collections::HashMap, fmt::Display, io::Write as _, path::PathBuf, sync::Arc, time::Duration};

use clap::Args;
use parking_lot::Mutex;
use tokio::{runtime::Handle, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{
    client::{Client, DaemonAddress},
    ending::Signals,
    exit::{self, Failure},
    print, runtime,
};
use crate::{
    bep::commands::has_outputs,
    config::{CacheArgs, ControlArgs, PlaceArgs, StateArgs, from_environment},
    control::staging::nothing_of,
    daemon::{notify_ready, notify_stopping},
    digest::Digest,
    exec_path::ExecPath,
    mount::{
        Build, Content, Mount, MountError, MountOptions, PATIENCE, Rows, TREE_PATIENCE, TreeBuilder, Unread,
    },
    printable::printable,
    proto::outhaul::v1 as pb,
    units::{parse_duration, parse_size},
};

/// Builds of a state directory that are shown at most, the newest.
const BUILDS: u32 = 1000;

/// How often it is looked whether a build that has the record to itself has ended.
const HELD: Duration = Duration::from_millis(200);

/// How long a mount that is just being made may take to be there when it is to end already.
const STARTING: Duration = Duration::from_secs(2);

/// Arguments of `outhaul mount`.
#[derive(Debug, Args)]
pub(super) struct MountArgs {
    /// Where to mount: an empty directory, or one to be made
    #[arg(value_name = "DIR")]
    directory: PathBuf,

    /// Directory to keep downloaded files in; by default mount in the state directory
    #[arg(long, value_name = "DIR", env = "OUTHAUL_STORE_DIR")]
    store_dir: Option<PathBuf>,

    /// How much to keep in it; of the files that nobody has open, those that were read longest ago are removed first
    #[arg(
        long,
        value_name = "SIZE",
        env = "OUTHAUL_STORE_SIZE",
        default_value = "10GiB"
    )]
    store_size: String,

    /// How long a program that opens a file waits for it at most; the download goes on
    #[arg(long, value_name = "DURATION", default_value = "1m")]
    timeout: String,

    /// Download nothing before it is read: by default, the outputs that the newest build of each workspace was asked for are
    /// downloaded as soon as it has ended, into at most half of the store
    #[arg(long, env = "OUTHAUL_NO_PREFETCH")]
    no_prefetch: bool,

    /// Let other users read, too; unless root mounts, /etc/fuse.conf must have user_allow_other
    #[arg(long, env = "OUTHAUL_ALLOW_OTHER")]
    allow_other: bool,

    #[command(flatten)]
    control: ControlArgs,

    #[command(flatten)]
    state: StateArgs,

    #[command(flatten)]
    cache: CacheArgs,
}

pub(super) fn main(args: MountArgs) -> Result<u8, Failure> {
    let wrong =
        |flag: &str, text: &str, reason: &dyn Display| Failure::usage(format!("--{flag}={text}: {reason}"));
    let store_bytes = parse_size(&args.store_size).map_err(|e| wrong("store-size", &args.store_size, &e))?;
    let timeout = parse_duration(&args.timeout).map_err(|e| wrong("timeout", &args.timeout, &e))?;
    if timeout.is_zero() {
        return Err(wrong("timeout", &args.timeout, &"must be greater than zero"));
    }
    let store = match &args.store_dir {
        Some(directory) => std::path::absolute(directory)?,
        None => args.state.directory()?.join("mount"),
    };
    let place: PlaceArgs = from_environment()?;
    let needed = [args.state.directory(), args.state.socket()];
    let options = MountOptions {
        directory: args.directory,
        store,
        needed: needed.into_iter().flatten().collect(),
        store_bytes,
        timeout,
        allow_other: args.allow_other,
        prefetch: !args.no_prefetch,
        source: args.cache.source_rule(true)?,
        materialize: place.options()?,
    };
    let rows = Recorded {
        state_dirs: Mutex::new(vec![args.state]),
        control: args.control,
        cache: args.cache,
        alone: tokio::sync::Mutex::default(),
    };
    // A wrong address is reported before anything is mounted.
    rows.control.address(rows.cache.tls.files())?;
    let runtime = runtime()?;
    let ended = runtime.block_on(async {
        let stop = CancellationToken::new();
        let at_once = Signals::listen_to_terminal()?.heed(stop.clone());
        let mut start = std::pin::pin!(Mount::start(options, Arc::new(rows)));
        let started = tokio::select! {
            started = &mut start => Some(started),
            // What is mounted in this moment is to be unmounted; a directory that does not answer is not waited for.
            () = stop.cancelled() => tokio::time::timeout(STARTING, start).await.ok(),
        };
        let Some(started) = started else {
            return Ok(exit::OK);
        };
        let mut mount = started?;
        let at = printable(&mount.at().display().to_string()).into_owned();
        // The mount is there even if nobody reads this.
        let _ = writeln!(
            print::err(),
            "outhaul: mounted on {at}; to unmount, send SIGTERM or press Ctrl-C"
        );
        notify_ready();
        let unmounted = tokio::select! {
            unmounted = mount.unmounted() => unmounted,
            () = stop.cancelled() => Ok(()),
        };
        notify_stopping();
        let ended = mount.end(at_once).await;
        unmounted.map_err(|reason| Failure::failed(format!("{at}: {reason}")))?;
        ended.map_err(|reason| Failure::failed(format!("failed to unmount {at}: {reason}")))?;
        Ok(exit::OK)
    });
    // Downloads that nobody waits for any more.
    runtime.shutdown_background();
    ended
}

impl From<MountError> for Failure {
    fn from(error: MountError) -> Self {
        match error {
            MountError::Mounted { .. } | MountError::Hides { .. } | MountError::NotEmpty(_) => {
                Self::usage(error)
            }
            _ => Self::failed(error),
        }
    }
}

/// The builds of a daemon or of the record, and of the wrapped builds that had to keep what is theirs apart.
struct Recorded {
    /// State directories; their places do not change.
    state_dirs: Mutex<Vec<StateArgs>>,
    control: ControlArgs,
    cache: CacheArgs,
    /// Held by the one question for which the record is open in this process.
    alone: tokio::sync::Mutex<()>,
}

impl Recorded {
    /// The state directories as they are now, with their places.
    fn state_dirs(&self) -> Vec<(usize, StateArgs)> {
        let mut state_dirs = self.state_dirs.lock();
        let is_named = self
            .control
            .address(self.cache.tls.files())
            .is_ok_and(|address| address.is_some());
        let apart = state_dirs.first().and_then(|state| state.directory().ok());
        if let Some(directory) = apart.filter(|_| !is_named) {
            let entries = std::fs::read_dir(directory.join("run"))
                .into_iter()
                .flatten()
                .flatten();
            for path in entries.map(|entry| entry.path()).filter(|path| path.is_dir()) {
                if !state_dirs
                    .iter()
                    .any(|known| known.state_dir.as_ref() == Some(&path))
                {
                    state_dirs.push(StateArgs {
                        state_dir: Some(path),
                        control_socket: None,
                    });
                }
            }
        }
        state_dirs.iter().cloned().enumerate().collect()
    }

    /// Who can be asked about a state directory; `None` where nothing is recorded, or, with `quietly`, no daemon answers.
    async fn client(
        &self,
        state_dir: usize,
        state: &StateArgs,
        quietly: bool,
    ) -> Result<Option<Asked<'_>>, Failure> {
        let none = ControlArgs::default();
        let control = if state_dir == 0 { &self.control } else { &none };
        let daemon = DaemonAddress::new(control, state, self.cache.tls.files())?;
        if let Ok(client) = daemon.connect().await {
            return Ok(Some(Asked { client, _alone: None }));
        }
        if quietly {
            return Ok(None);
        }
        let alone = self.alone.lock().await;
        match Client::open(control, state, &self.cache).await {
            Ok(client) => Ok(Some(Asked {
                client,
                _alone: Some(alone),
            })),
            // Nothing has been recorded yet.
            Err(failure) if failure.code == exit::NOT_FOUND => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    async fn all_builds(&self, quietly: bool) -> Result<HashMap<usize, Vec<Build>>, Failure> {
        let mut lists = HashMap::new();
        for (state_dir, state) in self.state_dirs() {
            let mut asked = match self.client(state_dir, &state, quietly).await {
                Ok(Some(asked)) => asked,
                Ok(None) if quietly => continue,
                Ok(None) => {
                    lists.insert(state_dir, Vec::new());
                    continue;
                }
                // Of a build that is running: what was known before is shown until it has ended.
                Err(failure) if failure.held || state_dir > 0 => continue,
                Err(failure) => return Err(failure),
            };
            let builds = asked.builds(state_dir).await;
            asked.client.close().await;
            match builds {
                Ok(builds) => lists.insert(state_dir, builds),
                Err(failure) if state_dir == 0 => return Err(failure),
                Err(_) => continue,
            };
        }
        Ok(lists)
    }

    async fn fill(&self, build: &Build, is_newest: bool, tree: TreeBuilder) -> Result<TreeBuilder, Failure> {
        let gone = || Failure::not_found("it is not recorded any more");
        let state = self
            .state_dirs
            .lock()
            .get(build.state_dir)
            .cloned()
            .ok_or_else(gone)?;
        let client = loop {
            match self.client(build.state_dir, &state, false).await {
                // Of a build that is running. The reader waits as long as it likes.
                Err(failure) if failure.held => sleep(HELD).await,
                client => break client,
            }
        };
        let mut asked = client?.ok_or_else(gone)?;
        let filled = if is_newest && !build.is_from_elsewhere {
            asked.newest(build, tree).await
        } else {
            named(&mut asked.client, &build.id, tree).await
        };
        asked.client.close().await;
        filled
    }
}

/// Somebody who is asked.
struct Asked<'a> {
    client: Client,
    /// Where this process opens the record itself, one question at a time does: it would find the record in use by the other.
    _alone: Option<tokio::sync::MutexGuard<'a, ()>>,
}

impl Asked<'_> {
    /// The builds that may have outputs.
    async fn builds(&mut self, state_dir: usize) -> Result<Vec<Build>, Failure> {
        let rows = self.client.invocations(BUILDS).await?.into_iter();
        let rows = rows.filter(|row| row.started_ms > 0 && has_outputs(&row.command));
        Ok(rows.map(|row| build(state_dir, row)).collect())
    }

    /// All that is recorded of the output root of a build that was the newest of it a moment ago. If it is not when all is
    /// read, some of it may be another build's: then what this one has named.
    async fn newest(&mut self, build: &Build, mut tree: TreeBuilder) -> Result<TreeBuilder, Failure> {
        let each = |output: pb::Output| {
            let is_wanted = output.class() != pb::OutputClass::Known;
            let content = content(output.digest.as_ref(), &output.symlink_target, output.directory);
            add(&mut tree, &output.exec_path, content, is_wanted);
            Ok(())
        };
        if !build.is_outdated(&self.builds(build.state_dir).await?) {
            self.client
                .outputs(&build.id, pb::OutputClass::Unspecified, each)
                .await?;
            if !build.is_outdated(&self.builds(build.state_dir).await?) {
                return Ok(tree);
            }
        }
        named(&mut self.client, &build.id, TreeBuilder::new(&build.exec_root)).await
    }
}

/// What a question comes to, unless it takes too long. It is given up then, and the record is free for others.
fn ask<T>(patience: Duration, question: impl Future<Output = Result<T, Failure>>) -> Result<T, Unread> {
    let answer = Handle::current().block_on(async { tokio::time::timeout(patience, question).await });
    match answer {
        Ok(answer) => answer.map_err(|failure| Unread(failure.message)),
        Err(_) => Err(Unread("the record did not answer in time".to_owned())),
    }
}

impl Rows for Recorded {
    fn builds(&self, quietly: bool) -> Result<HashMap<usize, Vec<Build>>, Unread> {
        ask(PATIENCE, self.all_builds(quietly))
    }

    fn outputs(&self, build: &Build, is_newest: bool, tree: TreeBuilder) -> Result<TreeBuilder, Unread> {
        ask(TREE_PATIENCE, self.fill(build, is_newest, tree))
    }
}

/// Adds what the events of a build name.
async fn named(client: &mut Client, id: &str, mut tree: TreeBuilder) -> Result<TreeBuilder, Failure> {
    let request = pb::StageRequest {
        invocation_id: id.to_owned(),
        wish: Some(pb::StageWish::default()),
        dry_run: true,
        ..pb::StageRequest::default()
    };
    match client.stage(request).await {
        Ok(answer) => {
            for output in &answer.outputs {
                let content = content(output.digest.as_ref(), &output.symlink_target, output.directory);
                add(&mut tree, &output.exec_path, content, false);
            }
            Ok(tree)
        }
        Err(status) if nothing_of(&status).is_some() => Ok(tree),
        Err(status) => Err(Failure::failed(status.message())),
    }
}

fn build(state_dir: usize, row: pb::Invocation) -> Build {
    Build {
        is_over: row.state().is_over(),
        id: row.invocation_id,
        workspace: row.workspace,
        exec_root: row.exec_root,
        is_from_elsewhere: row.without_root,
        remote_cache: row.remote_cache,
        remote_instance_name: row.remote_instance_name,
        started_ms: row.started_ms,
        settled_ms: row.settled_ms,
        state_dir,
    }
}

/// What an output is; none for a digest that is not one.
fn content<'a>(digest: Option<&pb::Digest>, target: &'a str, is_directory: bool) -> Option<Content<'a>> {
    if is_directory {
        return Some(Content::Directory);
    }
    if !target.is_empty() {
        return Some(Content::Link(target));
    }
    let digest = digest?;
    let function = digest.function.parse().ok()?;
    Digest::from_hex(Some(function), &digest.hash, digest.size)
        .ok()
        .map(Content::File)
}

fn add(tree: &mut TreeBuilder, path: &str, content: Option<Content<'_>>, is_wanted: bool) {
    if let Some(content) = content
        && let Ok(path) = ExecPath::new(path)
    {
        tree.add(&path, content, is_wanted);
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: MountArgs,
    }

    #[tokio::test]
    async fn while_a_build_has_the_record_the_list_is_as_it_was_and_a_builds_outputs_are_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let state_dir = format!("--state-dir={}", state.display());
        let Line { args } = Line::parse_from(["mount", "/mnt", &state_dir]);
        let (record, _) = crate::record::Record::open(&state).unwrap();
        record.put_invocation(&crate::record::InvocationRow {
            invocation_id: "one".to_owned(),
            command: "build".to_owned(),
            started_ms: 1,
            ..crate::record::InvocationRow::default()
        });
        let rows = Recorded {
            state_dirs: Mutex::new(vec![args.state]),
            control: args.control,
            cache: args.cache,
            alone: tokio::sync::Mutex::default(),
        };
        assert!(
            rows.all_builds(false).await.unwrap().is_empty(),
            "no directory has answered"
        );
        let build = build(0, pb::Invocation::default());
        let mut filled = std::pin::pin!(rows.fill(&build, false, TreeBuilder::new("/o")));
        let early = tokio::time::timeout(Duration::from_secs(1), &mut filled).await;
        assert!(early.is_err(), "it was not waited for");
        record.close();
        let failure = filled.await.err().unwrap();
        assert!(!failure.held, "{}", failure.message);
        assert_eq!(rows.all_builds(false).await.unwrap()[&0].len(), 1);
    }

    #[tokio::test]
    async fn without_a_daemon_one_question_at_a_time_has_the_record() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let (record, _) = crate::record::Record::open(&state).unwrap();
        record.close();
        let state_dir = format!("--state-dir={}", state.display());
        let Line { args } = Line::parse_from(["mount", "/mnt", &state_dir]);
        let rows = Recorded {
            state_dirs: Mutex::new(vec![args.state.clone()]),
            control: args.control,
            cache: args.cache,
            alone: tokio::sync::Mutex::default(),
        };
        let first = rows.client(0, &args.state, false).await.unwrap().unwrap();
        let mut second = std::pin::pin!(rows.client(0, &args.state, false));
        // Longer than the record waits for another process.
        let early = tokio::time::timeout(Duration::from_secs(1), &mut second).await;
        assert!(early.is_err(), "both have it, or the second was refused");
        first.client.close().await;
        drop(first._alone);
        assert!(second.await.unwrap().is_some());
    }
}
