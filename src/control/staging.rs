//! Staging as the control API tells it.

use std::path::{Path, PathBuf};

use tokio::{sync::mpsc, task::spawn_blocking};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use super::service::{Service, progress::CountedCall, show::shown};
use crate::{
    collection::Checking,
    digest::{Digest, DigestFunction},
    output::OutputContent,
    proto::outhaul::v1 as pb,
    record::{InvocationRow, Which, with_fields_of},
    stage::{
        Ended, Ends, Gathered, Manner, StageError, StageErrorKind, Staged, Stager, Wish, check,
        marker::Missing, remembered, select::Artifact, stager::Plan,
    },
};

/// As a gRPC status.
fn status_of(error: &StageError) -> Status {
    let code = match error.kind() {
        StageErrorKind::NotFound => Code::NotFound,
        StageErrorKind::Request => Code::InvalidArgument,
        StageErrorKind::Denied => Code::PermissionDenied,
        StageErrorKind::Failed => Code::FailedPrecondition,
    };
    let mut status = Status::new(code, error.to_string());
    if let StageError::Nothing(id) = error
        && let Ok(id) = id.parse()
    {
        status.metadata_mut().insert(NOTHING_OF, id);
    }
    status
}

/// Goes with the refusal to stage a build that is here, but names no outputs: its id.
const NOTHING_OF: &str = "outhaul-invocation-id";

/// The build that was found, but has nothing to stage.
pub(crate) fn nothing_of(status: &Status) -> Option<String> {
    let id = status.metadata().get(NOTHING_OF)?;
    id.to_str().ok().map(str::to_owned)
}

/// An answer, and the work that continues after it.
pub(crate) struct Answered {
    /// As of now.
    pub(crate) response: pb::StageResponse,
    /// Ends with all outputs' ends.
    pub(crate) rest: Option<tokio::task::JoinHandle<Ends>>,
    /// Until it is answered, it can be asked how far this is.
    _call: Option<CountedCall>,
}

impl Answered {
    /// Waits for what still goes on.
    pub(crate) async fn finish(self) -> pb::StageResponse {
        let mut response = self.response;
        if let Some(rest) = self.rest {
            match rest.await {
                Ok(ended) => {
                    response.outputs = all_outputs(&ended.outputs, &ended.gathered);
                    response.pending = 0;
                }
                Err(error) => response
                    .notes
                    .push(format!("staging optional outputs stopped: {error}")),
            }
        }
        response
    }
}

/// The answer to a dry run: what would be staged.
fn planned(plan: Plan) -> Answered {
    let outputs = plan.selection.artifacts.iter().map(|one| pb::StagedOutput {
        error: plan.error(one).unwrap_or_default().to_owned(),
        local_path: plan
            .local(one)
            .map_or_else(String::new, |path| path.display().to_string()),
        ..artifact(one)
    });
    let outputs = outputs
        .chain(plan.gathered().iter().map(gathered_output))
        .collect();
    Answered {
        response: pb::StageResponse {
            invocation_id: plan.build.invocation_id.clone(),
            staged: false,
            outputs,
            pending: 0,
            notes: plan.selection.notes,
        },
        rest: None,
        _call: None,
    }
}

impl Service {
    /// Stages, and answers when what is required is there, or all if that is asked for.
    ///
    /// # Errors
    /// When there is nothing to stage from, or the request does not fit the build.
    pub(super) async fn stage(&self, request: pb::StageRequest) -> Result<pb::StageResponse, Status> {
        let (service, wait) = (self.clone(), request.wait_all);
        let gone = CancellationToken::new();
        let _asked = gone.clone().drop_guard();
        // A task of its own, so that an asker who goes away leaves nothing half done: what is not needed any more is given
        // up in good order.
        let staging = tokio::spawn(async move {
            let answered = service.begin_stage(request, &gone).await?;
            Ok(if wait {
                answered.finish().await
            } else {
                answered.response
            })
        });
        staging.await.unwrap_or_else(|error| {
            Err(if error.is_panic() {
                Status::internal("staging panicked; this is a bug in outhaul")
            } else {
                Status::unavailable("the daemon is shutting down")
            })
        })
    }

    fn journaled(&self) -> Result<&Stager, Status> {
        self.stager()
            .ok_or_else(|| Status::failed_precondition("there is no journal to stage from"))
    }

    /// As [`Service::stage`], but the rest is left to the caller.
    pub(crate) async fn begin_stage(
        &self,
        request: pb::StageRequest,
        gone: &CancellationToken,
    ) -> Result<Answered, Status> {
        let stager = self.journaled()?;
        let which = Which {
            invocation_id: request.invocation_id.clone(),
            workspace: request.workspace.clone(),
        };
        let wish = wish(request.wish.clone().unwrap_or_default());
        let manner = manner(&request);
        // Before anything is read.
        if !request.dry_run {
            let directory = absolute(&request.directory)?;
            let may = stager.destination(&directory, false).await;
            may.map_err(|e| status_of(&e))?;
        }
        if !request.from.is_empty() && which != Which::default() {
            return Err(Status::invalid_argument(
                "from: cannot be combined with an invocation or a workspace",
            ));
        }
        let planning = async {
            match &*request.from {
                [] => stager.plan(&which, &wish, &manner).await,
                from => stager.plan_from(from, &wish, &manner).await,
            }
        };
        let plan = gone.run_until_cancelled(planning).await;
        let plan = plan.ok_or_else(|| Status::cancelled("the caller has disconnected"))?;
        let plan = plan.map_err(|e| status_of(&e))?;
        let invocation_id = plan.build.invocation_id.clone();
        if request.dry_run {
            return Ok(planned(plan));
        }
        let directory = absolute(&request.directory)?;
        let call = self.counted_call(&request.progress_id);
        let Staged {
            staged,
            outputs,
            gathered,
            notes,
            rest,
        } = stager
            .stage(plan, &directory, (call.counted.clone(), gone))
            .await
            .map_err(|e| status_of(&e))?;
        let outputs = all_outputs(&outputs, &gathered);
        let open = |output: &&pb::StagedOutput| {
            output.outcome() == pb::OutputOutcome::Unspecified && output.error.is_empty()
        };
        let pending = if rest.is_some() {
            outputs.iter().filter(open).count()
        } else {
            0
        };
        let response = pb::StageResponse {
            invocation_id,
            staged,
            outputs,
            pending: pending as u64,
            notes,
        };
        Ok(Answered {
            response,
            rest,
            _call: Some(call),
        })
    }

    /// Whether what was staged is there still, in a directory that may be asked about.
    pub(super) async fn is_staged(
        &self,
        request: pb::IsStagedRequest,
    ) -> Result<pb::IsStagedResponse, Status> {
        let stager = self.journaled()?;
        let directory = absolute(&request.directory)?;
        let opened = stager.destination(&directory, false).await;
        let Some(opened) = opened.map_err(|e| status_of(&e))? else {
            return Ok(pb::IsStagedResponse {
                problems: vec![format!("{}: no such directory", directory.display())],
                ..pb::IsStagedResponse::default()
            });
        };
        let looked = self.read(move |_, _| {
            let answer = look(&opened.path(), request);
            let named = |text: String| opened.named(&text);
            match answer {
                Ok(mut answer) => {
                    answer.problems = answer.problems.into_iter().map(named).collect();
                    Ok(answer)
                }
                Err(status) => Err(Status::new(status.code(), opened.named(status.message()))),
            }
        });
        looked
            .await
            .unwrap_or_else(|| Err(Status::internal("examining the directory panicked")))
    }

    /// Every output that a build without an output root names: its journal tells.
    pub(super) async fn named(&self, row: InvocationRow) -> Result<Vec<pb::Output>, Status> {
        let stager = self.stager();
        let stager = stager.ok_or_else(|| Status::not_found("the invocation has no output root"))?;
        let which = Which {
            invocation_id: row.invocation_id.clone(),
            ..Which::default()
        };
        let plan = stager
            .plan(&which, &Wish::default(), &Manner::default())
            .await
            .map_err(|e| Status::not_found(e.to_string()))?;
        let output = |artifact: Artifact| {
            let shown = self::artifact(&artifact);
            pb::Output {
                exec_root: row.exec_root.clone(),
                exec_path: shown.exec_path,
                digest: shown.digest,
                symlink_target: shown.symlink_target,
                directory: shown.directory,
                state: pb::OutputState::Known.into(),
                class: pb::OutputClass::Known.into(),
                rule: "the build has no output root here".to_owned(),
                label: shown.label,
                aspect: shown.aspect,
                output_group: shown.output_group,
                invocation_id: row.invocation_id.clone(),
                ..pb::Output::default()
            }
        };
        Ok(plan.selection.artifacts.into_iter().map(output).collect())
    }
}

/// Hands a list over, of one class if given.
pub(super) async fn tell(outputs: Vec<pb::Output>, class: pb::OutputClass, answer: mpsc::Sender<pb::Output>) {
    for output in outputs {
        if (class == pb::OutputClass::Unspecified || output.class() == class)
            && answer.send(output).await.is_err()
        {
            break;
        }
    }
}

/// Whether what was staged is there still.
pub(crate) async fn is_staged(request: pb::IsStagedRequest) -> Result<pb::IsStagedResponse, Status> {
    let directory = absolute(&request.directory)?;
    spawn_blocking(move || look(&directory, request))
        .await
        .unwrap_or_else(|_| Err(Status::internal("examining the directory panicked")))
}

fn look(directory: &Path, request: pb::IsStagedRequest) -> Result<pb::IsStagedResponse, Status> {
    let which = Which {
        invocation_id: request.invocation_id,
        workspace: request.workspace,
    };
    let wish = request.wish.map(wish);
    let from = remembered(&request.from);
    let answer = check::is_staged(directory, &which, &from, wish.as_ref()).map_err(|e| status_of(&e))?;
    Ok(pb::IsStagedResponse {
        staged: answer.is_staged(),
        problems: answer.problems,
        files: answer.files,
        complete: answer.complete,
        invocation_ids: answer.invocations,
        from: answer.from,
        missing: answer.missing.into_iter().map(not_staged).collect(),
    })
}

fn absolute(directory: &str) -> Result<PathBuf, Status> {
    if Path::new(directory).is_absolute() {
        Ok(directory.into())
    } else {
        Err(Status::invalid_argument(format!(
            "the directory {directory:?} must be an absolute path"
        )))
    }
}

fn wish(wish: pb::StageWish) -> Wish {
    with_fields_of!(wish, Wish {} targets output_groups include exclude required optional flatten extract runfiles failed)
}

fn manner(request: &pb::StageRequest) -> Manner {
    Manner {
        checking: match request.checking() {
            pb::Checking::Unspecified | pb::Checking::Auto => Checking::Auto,
            pb::Checking::Require => Checking::Require,
            pb::Checking::None => Checking::None,
        },
        checksums: request.checksums.clone(),
        jobs: request.jobs,
        limits: request.limits.clone(),
        so_far: request.dry_run && request.so_far,
    }
}

fn not_staged(missing: Missing) -> pb::NotStaged {
    pb::NotStaged {
        path: missing.path,
        error: missing.error,
    }
}

/// Outputs of a build, and files of a collection or archives.
fn all_outputs(outputs: &[Ended], gathered: &[Gathered]) -> Vec<pb::StagedOutput> {
    let mut all: Vec<_> = outputs.iter().map(staged_output).collect();
    all.extend(gathered.iter().map(gathered_output));
    all.sort_by(|a, b| a.path.cmp(&b.path));
    all
}

fn gathered_output(one: &Gathered) -> pb::StagedOutput {
    pb::StagedOutput {
        path: one.place.clone(),
        exec_path: one.name.to_string(),
        label: one.label.to_string(),
        aspect: one.aspect.to_string(),
        output_group: one.group.to_string(),
        class: pb::OutputClass::from(one.class).into(),
        digest: one.digest.as_ref().map(shown),
        outcome: one
            .outcome
            .map_or(pb::OutputOutcome::Unspecified, Into::into)
            .into(),
        error: one.error.clone(),
        ..pb::StagedOutput::default()
    }
}

fn artifact(artifact: &Artifact) -> pb::StagedOutput {
    let mut output = pb::StagedOutput {
        path: artifact.place.to_string(),
        exec_path: artifact.exec_path.to_string(),
        label: artifact.label.to_string(),
        aspect: artifact.aspect.to_string(),
        output_group: artifact.group.to_string(),
        class: pb::OutputClass::from(artifact.class).into(),
        ..pb::StagedOutput::default()
    };
    match &artifact.content {
        OutputContent::Blob(digest) => output.digest = Some(shown(digest)),
        OutputContent::Inline(bytes) => {
            output.digest = Some(shown(&Digest::of(DigestFunction::Sha256, bytes)));
        }
        OutputContent::Symlink(target) => output.symlink_target.clone_from(target),
        OutputContent::Directory => output.directory = true,
    }
    output
}

fn staged_output(ended: &Ended) -> pb::StagedOutput {
    pb::StagedOutput {
        outcome: ended
            .outcome
            .map_or(pb::OutputOutcome::Unspecified, Into::into)
            .into(),
        error: ended.error.clone(),
        ..artifact(&ended.artifact)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_without_outputs_is_told_apart_from_none() {
        let nothing = status_of(&StageError::Nothing("inv".to_owned()));
        assert_eq!(
            (nothing.code(), nothing_of(&nothing)),
            (Code::NotFound, Some("inv".to_owned()))
        );
        let unknown = status_of(&StageError::Unknown("inv".to_owned()));
        assert_eq!((unknown.code(), nothing_of(&unknown)), (Code::NotFound, None));
    }
}
