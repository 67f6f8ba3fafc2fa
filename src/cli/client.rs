//! Asks the daemon, or the record itself where no daemon runs.

use std::{
    convert::Infallible,
    fmt,
    io::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status, Streaming, body::Body, service::interceptor::InterceptedService};
use tower::{BoxError, ServiceExt, util::BoxCloneService};

use super::{exit::Failure, print, progress::Progress, run::own_states, runtime};
use crate::{
    bep::commands::has_outputs,
    config::{CacheArgs, ControlAddress, ControlArgs, PlaceArgs, SelectionArgs, StateArgs, from_environment},
    control::{ControlServer, Service},
    daemon::Services,
    invocation::policy::Policy,
    materialize::Counts,
    printable::with_causes,
    proto::outhaul::v1::{
        self as pb, control_client::ControlClient, control_server::ControlServer as ControlService,
        watch_invocation_response::Event,
    },
    record::{Record, RecordError, Which, with_fields_of},
    roots::Destination,
    transport::{ConnectOptions, Connector, Endpoint, TlsFiles},
};

/// How often a daemon on another machine that says nothing is asked whether it is still there. With the time for its
/// answer, that is a minute.
const KEEPALIVE: Duration = Duration::from_secs(45);
/// Trees of many outputs are listed in one message.
const MAX_ANSWER: usize = 256 << 20;

/// How often a command that waits looks whether downloads are paused.
const PAUSED: Duration = Duration::from_secs(1);

/// How many builds are looked through for the newest of a workspace.
const NEWEST: u32 = 1000;

/// The control API, of a daemon or of this process.
type Control = ControlClient<BoxCloneService<http::Request<Body>, http::Response<Body>, BoxError>>;

/// Where a daemon is looked for.
pub(super) enum DaemonAddress {
    /// The socket of the state directory. If nobody answers there, the record can be opened.
    Socket(PathBuf),
    /// What `--control` names.
    Named(Box<ControlAddress>),
}

impl fmt::Display for DaemonAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => path.display().fmt(f),
            Self::Named(address) => address.connect.endpoint.fmt(f),
        }
    }
}

impl DaemonAddress {
    /// The one that the flags name.
    pub(super) fn new(control: &ControlArgs, state: &StateArgs, files: TlsFiles) -> Result<Self, Failure> {
        match control.address(files)? {
            Some(address) => Ok(Self::Named(Box::new(address))),
            None => Ok(Self::Socket(state.socket()?)),
        }
    }

    /// Connects, or says why not.
    pub(super) async fn connect(&self) -> anyhow::Result<Client> {
        let (mut options, token) = match self {
            Self::Socket(path) => (ConnectOptions::new(Endpoint::unix(path.clone())), None),
            Self::Named(address) => (address.connect.clone(), address.token.clone()),
        };
        options.keepalive = options.endpoint.host().map(|_| KEEPALIVE);
        let connector = Connector::new(&options)?;
        let with_token = move |mut request: Request<()>| {
            if let Some(token) = &token {
                token.put(&mut request)?;
            }
            Ok(request)
        };
        let channel = InterceptedService::new(connector.connect().await?, with_token);
        let channel = channel
            .map_response(|answer| answer.map(Body::new))
            .map_err(BoxError::from);
        let control = ControlClient::new(BoxCloneService::new(channel));
        Ok(Client {
            control: control.max_decoding_message_size(MAX_ANSWER),
            here: None,
        })
    }
}

/// Why nothing more is heard of an invocation.
pub(super) enum Lost {
    /// The connection broke, or the daemon is ending: it may be asked again.
    Connection(String),
    /// It was refused, or is not there.
    Refused(Failure),
}

/// What is heard of one invocation.
pub(super) struct Following(Streaming<pb::WatchInvocationResponse>);

impl Following {
    /// The next event; none after the last.
    pub(super) async fn next(&mut self) -> Result<Option<Event>, Lost> {
        loop {
            match self.0.message().await.map_err(lost)? {
                // Of a newer daemon, it may be something that we do not know.
                Some(message) if message.event.is_none() => {}
                message => return Ok(message.and_then(|message| message.event)),
            }
        }
    }
}

/// How a command asks, and how it prints the answer.
#[derive(Debug, Args)]
pub(super) struct AskArgs {
    /// Print JSON, one object per line
    #[arg(long)]
    pub(super) json: bool,

    #[command(flatten)]
    asking: Asking,
}

/// Who knows about builds, and which caches have their outputs.
#[derive(Debug, Args)]
pub(super) struct Asking {
    #[command(flatten)]
    control: ControlArgs,

    #[command(flatten)]
    state: StateArgs,

    #[command(flatten)]
    cache: CacheArgs,
}

impl Asking {
    /// The daemon, or this process in its place.
    pub(super) async fn client(&self) -> Result<Client, Failure> {
        Client::open(&self.control, &self.state, &self.cache).await
    }

    /// The client that knows a build, by its id or as the newest of a workspace.
    pub(super) async fn client_of_build(&self, id: &str, workspace: &str) -> Result<Client, Failure> {
        let found = Client::of_build(&self.control, &self.state, &self.cache, id, workspace).await?;
        Ok(found.0)
    }
}

impl AskArgs {
    /// Asks the client that knows the build of this id, in a runtime of its own.
    pub(super) fn ask<T>(
        &self,
        id: Option<&str>,
        work: impl AsyncFnOnce(&mut Client) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        runtime()?.block_on(async { self.client_of(id).await?.with(work).await })
    }

    /// The daemon that the flags name, or this process in place of the state directory's.
    pub(super) async fn client(&self) -> Result<Client, Failure> {
        self.asking.client().await
    }

    /// The client that knows the build of this id; without an id, the one that the flags name.
    pub(super) async fn client_of(&self, id: Option<&str>) -> Result<Client, Failure> {
        match id {
            Some(id) => self.client_of_build(id, "").await,
            None => self.client().await,
        }
    }

    /// The client that knows a build, by its id or as the newest of a workspace.
    pub(super) async fn client_of_build(&self, id: &str, workspace: &str) -> Result<Client, Failure> {
        self.asking.client_of_build(id, workspace).await
    }
}

/// Asks a daemon, or this process where it has opened the record itself.
pub(super) struct Client {
    control: Control,
    /// This process's own.
    pub(super) here: Option<(Box<Service>, Record)>,
}

/// The newest of these builds of one build's output root, if that one is not.
fn newer_of_root<'a>(rows: &'a [pb::Invocation], build: &pb::Invocation) -> Option<&'a pb::Invocation> {
    let is_newer = |row: &&pb::Invocation| {
        row.exec_root == build.exec_root
            && !row.without_root
            && row.invocation_id != build.invocation_id
            && row.started_ms >= build.started_ms
    };
    let of_it = rows
        .iter()
        .filter(|row| has_outputs(&row.command))
        .filter(is_newer);
    of_it.max_by_key(|row| row.started_ms)
}

/// The newest build with outputs of a workspace; of any, if that is empty.
fn newest_of<'a>(rows: &'a [pb::Invocation], workspace: &str) -> Option<&'a pb::Invocation> {
    let of_it = |row: &&pb::Invocation| workspace.is_empty() || row.workspace == workspace;
    let of_it = rows.iter().filter(|row| has_outputs(&row.command)).filter(of_it);
    of_it.max_by_key(|row| row.started_ms)
}

/// Does the work, and beside it something that never ends.
pub(super) async fn beside<T>(endless: impl Future<Output = Infallible>, work: impl Future<Output = T>) -> T {
    tokio::select! {
        biased;
        done = work => done,
        never = endless => match never {},
    }
}

impl Client {
    /// The daemon that the flags name, or this process in place of the state directory's.
    pub(super) async fn open(
        control: &ControlArgs,
        state: &StateArgs,
        cache: &CacheArgs,
    ) -> Result<Self, Failure> {
        let address = DaemonAddress::new(control, state, cache.tls.files())?;
        match address.connect().await {
            Ok(daemon) => Ok(daemon),
            Err(refused) => Self::here(&address, &refused.to_string(), state, None, cache).await,
        }
    }

    /// The client that knows a build, by its id or as the newest of a workspace, and the state directory that it is of.
    /// While another process has the state directory, a wrapped build keeps what is its own in a directory below it.
    pub(super) async fn of_build(
        control: &ControlArgs,
        state: &StateArgs,
        cache: &CacheArgs,
        invocation_id: &str,
        workspace: &str,
    ) -> Result<(Self, StateArgs), Failure> {
        let mut best = Self::open(control, state, cache)
            .await
            .map(|client| (client, state.clone()));
        if control.address(cache.tls.files())?.is_some() {
            return best;
        }
        let directory = state.directory()?;
        let others: Vec<PathBuf> = if workspace.is_empty() {
            let entries = std::fs::read_dir(directory.join("run"));
            entries
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path())
                .collect()
        } else {
            own_states(&directory, Path::new(workspace)).collect()
        };
        let mut newest = None;
        for (number, directory) in others.into_iter().filter(|other| other.is_dir()).enumerate() {
            if let (0, Ok((client, _))) = (number, &mut best) {
                newest = client.newest(invocation_id, workspace).await;
            }
            let other = StateArgs {
                state_dir: Some(directory),
                control_socket: None,
            };
            // One that is in use is of a build that still runs.
            let Ok(mut client) = Self::open(&ControlArgs::default(), &other, cache).await else {
                continue;
            };
            let found = client.newest(invocation_id, workspace).await;
            let replaced = if found > newest {
                newest = found;
                std::mem::replace(&mut best, Ok((client, other)))
            } else {
                Ok((client, other))
            };
            if let Ok((client, _)) = replaced {
                client.close().await;
            }
        }
        best
    }

    /// When the newest build began that is meant by an id or a workspace.
    async fn newest(&mut self, invocation_id: &str, workspace: &str) -> Option<i64> {
        if !invocation_id.is_empty() {
            return self
                .invocation(invocation_id)
                .await
                .ok()
                .map(|(row, _)| row.started_ms);
        }
        let rows = self.invocations(NEWEST).await.ok()?;
        newest_of(&rows, workspace).map(|row| row.started_ms)
    }

    /// The id of the newest build of a workspace.
    pub(super) async fn newest_of_workspace(&mut self, workspace: &str) -> Result<String, Failure> {
        let rows = self.invocations(NEWEST).await?;
        let found = newest_of(&rows, workspace).map(|row| row.invocation_id.clone());
        found.ok_or_else(|| Failure::not_found(format!("no build of {workspace} is recorded")))
    }

    /// The id of the newest build of a build's output root, if it is another one.
    pub(super) async fn newer_of_root(&mut self, build: &pb::Invocation) -> Result<Option<String>, Failure> {
        if build.without_root {
            return Ok(None);
        }
        let rows = self.invocations(NEWEST).await?;
        Ok(newer_of_root(&rows, build).map(|row| row.invocation_id.clone()))
    }

    /// This process, since no daemon answers: opens the record, unless another one was asked for. The failure tells
    /// whether another process has it, which may be about to answer, or to end. With `own`, the record is made there, for
    /// what needs none.
    pub(super) async fn here(
        address: &DaemonAddress,
        refused: &str,
        state: &StateArgs,
        own: Option<&Path>,
        cache: &CacheArgs,
    ) -> Result<Self, Failure> {
        if let DaemonAddress::Named(_) = address {
            return Err(Failure::failed(format!(
                "no daemon answers on {address}: {refused}"
            )));
        }
        let directory = state.directory()?;
        let journal = directory.join("journal");
        let directory = own.map_or(directory, Path::to_owned);
        if !directory.is_dir() {
            return Err(Failure::not_found(format!(
                "nothing is recorded in {} and no daemon answers on {address}: {refused}",
                directory.display(),
            )));
        }
        let record = match tokio::task::spawn_blocking(move || Record::open_for_command(&directory)).await {
            Ok(Ok((record, _))) => record,
            Ok(Err(error @ RecordError::Held { .. })) => {
                return Err(Failure::held(format!(
                    "{error}, and that process does not answer on {address}: {refused}"
                )));
            }
            Ok(Err(error)) => return Err(Failure::failed(error)),
            Err(error) => return Err(Failure::failed(error)),
        };
        let services = Self::services(record.clone(), cache)?;
        let service = services
            .service
            .with_archives(cache.archives()?)
            .with_journal(journal);
        let server = ControlServer::new(service.clone(), CancellationToken::new()).alone();
        let server = ControlService::new(server).max_decoding_message_size(usize::MAX);
        let control = ControlClient::new(BoxCloneService::new(ServiceExt::<http::Request<Body>>::map_err(
            server,
            BoxError::from,
        )));
        Ok(Self {
            control: control.max_decoding_message_size(usize::MAX),
            here: Some((Box::new(service), record)),
        })
    }

    fn services(record: Record, cache: &CacheArgs) -> Result<Services, Failure> {
        let place: PlaceArgs = from_environment()?;
        let selection: SelectionArgs = from_environment()?;
        let policy = Policy {
            no_local_sources: selection.no_local_sources(),
            ..Policy::default()
        };
        Ok(Services::open(
            record,
            policy,
            place.rules(Destination::ExecRoot)?,
            cache.source_rule(true)?,
            place.options()?,
            false,
        )?)
    }

    pub(super) async fn invocations(&mut self, limit: u32) -> Result<Vec<pb::Invocation>, Failure> {
        let request = pb::ListInvocationsRequest { limit };
        let answer = self.control.list_invocations(request).await;
        Ok(answer.map_err(failure)?.into_inner().invocations)
    }

    pub(super) async fn invocation(
        &mut self,
        id: &str,
    ) -> Result<(pb::Invocation, Vec<pb::Target>), Failure> {
        let answer = self.seen(id).await?;
        let missing = || Failure::not_found(Which::of(id).not_recorded());
        Ok((answer.invocation.ok_or_else(missing)?, answer.targets))
    }

    /// A build with its targets, and what it waits for.
    pub(super) async fn seen(&mut self, id: &str) -> Result<pb::GetInvocationResponse, Failure> {
        let request = pb::GetInvocationRequest {
            invocation_id: id.to_owned(),
        };
        let answer = self.control.get_invocation(request).await;
        Ok(answer.map_err(failure)?.into_inner())
    }

    pub(super) async fn find_outputs(
        &mut self,
        request: pb::FindOutputsRequest,
    ) -> Result<pb::FindOutputsResponse, Failure> {
        let answer = self.control.find_outputs(request).await;
        Ok(answer.map_err(failure)?.into_inner())
    }

    pub(super) async fn caches(&mut self) -> Result<pb::ListCachesResponse, Failure> {
        let answer = self.control.list_caches(pb::ListCachesRequest {}).await;
        Ok(answer.map_err(failure)?.into_inner())
    }

    pub(super) async fn stat(&mut self, paths: Vec<String>) -> Result<Vec<pb::Output>, Failure> {
        let answer = self
            .control
            .stat_outputs(pb::OutputsRequest {
                paths,
                ..Default::default()
            })
            .await;
        Ok(answer.map_err(failure)?.into_inner().outputs)
    }

    pub(super) async fn why(&mut self, paths: Vec<String>) -> Result<Vec<pb::why_response::Answer>, Failure> {
        let answer = self.control.why(pb::WhyRequest { paths }).await;
        Ok(answer.map_err(failure)?.into_inner().answers)
    }

    /// Follows an invocation. Without a daemon, the record is all there is.
    pub(super) async fn watch(&mut self, choice: pb::InvocationChoice) -> Result<Following, Lost> {
        let request = pb::WatchInvocationRequest {
            invocation: Some(choice),
        };
        let events = self.control.watch_invocation(request).await.map_err(lost)?;
        Ok(Following(events.into_inner()))
    }

    pub(super) async fn materialize(
        &mut self,
        paths: Vec<String>,
        progress_id: &str,
    ) -> Result<Vec<pb::materialize_response::Result>, Failure> {
        let request = pb::OutputsRequest {
            paths,
            progress_id: progress_id.to_owned(),
        };
        let says = self.says_paused(|pause| pause.all);
        let answer = beside(says, self.control.materialize(request)).await;
        Ok(answer.map_err(failure)?.into_inner().results)
    }

    /// Asks how far the call of this name is, beside that call. Says nothing where it is not under way, or the daemon does not
    /// know.
    pub(super) fn asks_progress(&self, name: &str) -> impl AsyncFnMut() -> Option<Progress> + use<> {
        let mut control = self.control.clone();
        let request = pb::GetProgressRequest {
            progress_id: name.to_owned(),
        };
        async move || {
            let told = control.get_progress(request.clone()).await.ok()?.into_inner();
            Some(with_fields_of!(told, Counts {} outputs all_outputs bytes all_bytes).into())
        }
    }

    /// Stages, or finds out what would be staged.
    pub(super) async fn stage(&mut self, request: pb::StageRequest) -> Result<pb::StageResponse, Status> {
        let waits_for_all = request.wait_all;
        let waits = !request.dry_run && request.from.is_empty();
        let says = self.says_paused(move |pause| waits && (pause.all || waits_for_all));
        Ok(beside(says, self.control.stage(request)).await?.into_inner())
    }

    /// Calls `each` for every output.
    pub(super) async fn outputs(
        &mut self,
        id: &str,
        class: pb::OutputClass,
        mut each: impl FnMut(pb::Output) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let request = pb::ListOutputsRequest {
            invocation_id: id.to_owned(),
            class: class.into(),
        };
        let outputs = self.control.list_outputs(request).await;
        let mut outputs = outputs.map_err(failure)?.into_inner();
        while let Some(output) = outputs.message().await.map_err(failure)? {
            each(output)?;
        }
        Ok(())
    }

    pub(super) async fn disk_usage(
        &mut self,
        request: pb::DiskUsageRequest,
    ) -> Result<pb::DiskUsageResponse, Failure> {
        let answer = self.control.disk_usage(request).await;
        Ok(answer.map_err(failure)?.into_inner())
    }

    pub(super) async fn report(&mut self, request: pb::ReportRequest) -> Result<pb::ReportResponse, Failure> {
        Ok(self.control.report(request).await.map_err(failure)?.into_inner())
    }

    /// Calls `each` for every part of the answer.
    pub(super) async fn evict(
        &mut self,
        request: pb::EvictRequest,
        mut each: impl FnMut(pb::EvictResponse) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let parts = self.control.evict(request).await;
        let mut parts = parts.map_err(failure)?.into_inner();
        while let Some(part) = parts.message().await.map_err(failure)? {
            each(part)?;
        }
        Ok(())
    }

    pub(super) async fn pause(&mut self, request: pb::PauseRequest) -> Result<pb::Pause, Failure> {
        let answer = self.control.pause(request).await.map_err(failure)?;
        Ok(answer.into_inner().pause.unwrap_or_default())
    }

    /// What was paused until now.
    pub(super) async fn resume(&mut self) -> Result<Option<pb::Pause>, Failure> {
        let answer = self.control.resume(pb::ResumeRequest {}).await;
        Ok(answer.map_err(failure)?.into_inner().ended)
    }

    /// What is paused. An older daemon knows of no such thing.
    pub(super) async fn paused(&mut self) -> Option<pb::Pause> {
        let answer = self.control.get_pause(pb::GetPauseRequest {}).await.ok()?;
        answer.into_inner().pause
    }

    /// Says once that downloads are paused, those that are meant, and never ends: to go beside what may have to wait for them.
    pub(super) fn says_paused<F: Fn(&pb::Pause) -> bool>(
        &self,
        is_meant: F,
    ) -> impl Future<Output = Infallible> + use<F> {
        let daemon = self.here.is_none().then(|| self.control.clone());
        async move {
            // In this process, nothing is paused.
            let Some(control) = daemon else {
                return std::future::pending().await;
            };
            let mut daemon = Self { control, here: None };
            loop {
                tokio::time::sleep(PAUSED).await;
                if let Some(pause) = daemon.paused().await.filter(&is_meant) {
                    // Nobody who cannot be told is a reason to stop.
                    let _ = writeln!(print::err(), "outhaul: waiting: {}", pause.words());
                    return std::future::pending().await;
                }
            }
        }
    }

    /// Does this and closes.
    pub(super) async fn with<T>(
        mut self,
        work: impl AsyncFnOnce(&mut Self) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let done = work(&mut self).await;
        self.close().await;
        done
    }

    /// Writes what is still to be written.
    pub(super) async fn close(self) {
        if let Some((service, record)) = self.here {
            // Blocks for some seconds at most.
            let _ = tokio::task::spawn_blocking(move || {
                service.let_go();
                record.close();
            })
            .await;
        }
    }
}

/// Whether to ask again: not where the answer would be the same.
fn lost(status: Status) -> Lost {
    use tonic::Code;
    match status.code() {
        Code::Unauthenticated
        | Code::PermissionDenied
        | Code::InvalidArgument
        | Code::Unimplemented
        | Code::NotFound => Lost::Refused(failure(status)),
        _ => Lost::Connection(status.message().to_owned()),
    }
}

#[allow(clippy::needless_pass_by_value, reason = "the shape that map_err takes")]
fn failure(status: tonic::Status) -> Failure {
    match status.code() {
        tonic::Code::NotFound => Failure::not_found(status.message()),
        code => {
            // The message is "transport error"; its source says what happened to the connection.
            match std::error::Error::source(&status) {
                Some(cause) => Failure::failed(with_causes(cause)),
                None => Failure::failed(format!("the daemon answered {code}: {}", status.message())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_is_the_newest_of_its_output_root_until_another_begins_there() {
        let row = |id: &str, command: &str, exec_root: &str, started_ms| pb::Invocation {
            invocation_id: id.to_owned(),
            command: command.to_owned(),
            exec_root: exec_root.to_owned(),
            started_ms,
            ..pb::Invocation::default()
        };
        let build = row("build", "build", "/o", 20);
        let imported = pb::Invocation {
            without_root: true,
            ..row("imported", "build", "/o", 30)
        };
        for (other, newer) in [
            (build.clone(), None),
            (imported, None),
            (row("older", "build", "/o", 10), None),
            (row("query", "query", "/o", 30), None),
            (row("elsewhere", "build", "/p", 30), None),
            (row("newer", "test", "/o", 30), Some("newer")),
        ] {
            let rows = [other, row("oldest", "build", "/o", 1)];
            let found = newer_of_root(&rows, &build).map(|row| row.invocation_id.as_str());
            assert_eq!(found, newer, "{rows:?}");
        }
    }
}
