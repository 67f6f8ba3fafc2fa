//! Asks the daemon, or the record itself where no daemon runs.

use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use super::exit::Failure;
use crate::{
    config::{CacheArgs, PlaceArgs, StateArgs},
    control::Service,
    daemon::Rooms,
    invocation::{policy::Policy, roots::Destination},
    proto::outhaul::v1::{self as pb, control_client::ControlClient},
    record::{Record, RecordError},
};

/// Who answers.
pub(super) enum Client {
    /// A daemon.
    Daemon(ControlClient<Channel>),
    /// This process, which has opened the record.
    Here(Box<Service>, Record),
}

impl Client {
    /// The daemon of the state directory, or this process in its place.
    pub(super) async fn open(state: &StateArgs, cache: &CacheArgs) -> Result<Self, Failure> {
        let socket = state.socket()?;
        let refused = match connect(&socket).await {
            Ok(channel) => {
                // Trees of many outputs are listed in one message.
                let client = ControlClient::new(channel).max_decoding_message_size(256 << 20);
                return Ok(Self::Daemon(client));
            }
            Err(error) => error,
        };
        let directory = state.directory()?;
        let journal = directory.join("journal");
        if !directory.is_dir() {
            return Err(Failure::not_found(format!(
                "nothing is recorded in {} and no daemon answers on {}: {refused}",
                directory.display(),
                socket.display()
            )));
        }
        let record = match tokio::task::spawn_blocking(move || Record::open(&directory)).await {
            Ok(Ok((record, _))) => record,
            Ok(Err(error @ RecordError::Held { .. })) => {
                return Err(Failure::held(format!(
                    "{error}, and it does not answer on {}: {refused}",
                    socket.display()
                )));
            }
            Ok(Err(error)) => return Err(Failure::failed(error)),
            Err(error) => return Err(Failure::failed(error)),
        };
        let place = PlaceArgs::from_environment()?;
        let rooms = Rooms::open(
            record.clone(),
            Policy::default(),
            place.rules(Destination::ExecRoot)?,
            cache.source_rule(true)?,
            place.options()?,
            false,
        )?;
        Ok(Self::Here(Box::new(rooms.service.with_journal(journal)), record))
    }

    pub(super) async fn invocations(&mut self, limit: u32) -> Result<Vec<pb::Invocation>, Failure> {
        match self {
            Self::Daemon(client) => {
                let answer = client
                    .list_invocations(pb::ListInvocationsRequest { limit })
                    .await;
                Ok(answer.map_err(told)?.into_inner().invocations)
            }
            Self::Here(service, _) => Ok(service.invocations(limit).await),
        }
    }

    pub(super) async fn invocation(
        &mut self,
        id: &str,
    ) -> Result<(pb::Invocation, Vec<pb::Target>), Failure> {
        let missing = || match id {
            "" => Failure::not_found("no invocation is recorded"),
            id => Failure::not_found(format!("no invocation {id:?} is recorded")),
        };
        match self {
            Self::Daemon(client) => {
                let request = pb::GetInvocationRequest {
                    invocation_id: id.to_owned(),
                };
                let answer = client.get_invocation(request).await.map_err(told)?.into_inner();
                Ok((answer.invocation.ok_or_else(missing)?, answer.targets))
            }
            Self::Here(service, _) => service.invocation(id).await.ok_or_else(missing),
        }
    }

    pub(super) async fn stat(&mut self, paths: Vec<String>) -> Result<Vec<pb::Output>, Failure> {
        match self {
            Self::Daemon(client) => {
                let answer = client.stat_outputs(pb::OutputsRequest { paths }).await;
                Ok(answer.map_err(told)?.into_inner().outputs)
            }
            Self::Here(service, _) => Ok(service.stat(paths).await),
        }
    }

    pub(super) async fn materialize(
        &mut self,
        paths: Vec<String>,
    ) -> Result<Vec<pb::materialize_response::Result>, Failure> {
        match self {
            Self::Daemon(client) => {
                let answer = client.materialize(pb::OutputsRequest { paths }).await;
                Ok(answer.map_err(told)?.into_inner().results)
            }
            Self::Here(service, _) => Ok(service.materialize(paths).await),
        }
    }

    /// Calls `each` for every output.
    pub(super) async fn outputs(
        &mut self,
        id: &str,
        class: &str,
        mut each: impl FnMut(pb::Output) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        match self {
            Self::Daemon(client) => {
                let request = pb::ListOutputsRequest {
                    invocation_id: id.to_owned(),
                    class: class.to_owned(),
                };
                let mut outputs = client.list_outputs(request).await.map_err(told)?.into_inner();
                while let Some(output) = outputs.message().await.map_err(told)? {
                    each(output)?;
                }
            }
            Self::Here(service, _) => {
                let mut outputs = service.outputs(id, class).await.map_err(Failure::not_found)?;
                while let Some(output) = outputs.recv().await {
                    each(output)?;
                }
            }
        }
        Ok(())
    }

    /// Writes what is still to be written.
    pub(super) async fn close(self) {
        if let Self::Here(service, record) = self {
            // Blocks for some seconds at most.
            let _ = tokio::task::spawn_blocking(move || {
                service.let_go();
                record.close();
            })
            .await;
        }
    }
}

async fn connect(socket: &Path) -> Result<Channel, String> {
    let path: PathBuf = socket.to_owned();
    // First by hand: the channel's own error does not tell a missing socket from a refusing one.
    UnixStream::connect(&path).await.map_err(|e| e.to_string())?;
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .map_err(|e| e.to_string())
}

#[allow(clippy::needless_pass_by_value, reason = "the shape that map_err takes")]
fn told(status: tonic::Status) -> Failure {
    match status.code() {
        tonic::Code::NotFound => Failure::not_found(status.message()),
        code => Failure::failed(format!("the daemon answered {code}: {}", status.message())),
    }
}
