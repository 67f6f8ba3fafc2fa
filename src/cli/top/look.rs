//! What the screens show is asked of the daemon again and again, over as many connections as it takes.

use std::time::Duration;

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until},
};

use crate::{
    cli::{
        client::{Client, DaemonAddress},
        exit::{self, Failure},
    },
    proto::outhaul::v1 as pb,
};

/// The shortest time between two looks, and after a lost connection.
const PAUSE: Duration = Duration::from_secs(1);
/// The share of the time that looks may take is one in so many,
const SHARE: u32 = 20;
/// unless that would be longer than this.
const LONGEST: Duration = Duration::from_secs(10);
/// What hardly changes is looked at again after that time.
const SELDOM: Duration = Duration::from_secs(30);
/// Builds that are listed.
pub(super) const BUILDS: u32 = 200;
/// Outputs that are found, and lines of other lists.
pub(super) const ROWS: usize = 200;
/// Targets of a build that are kept.
pub(super) const TARGETS: usize = 1000;

/// What a screen is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Subject {
    /// The list of builds.
    Builds,
    /// One build, by its id.
    Build(String),
    /// A search over recorded outputs: of a build's output root, or of all without an id.
    Outputs { build: String, text: String },
    /// One output, by its absolute path.
    Output(String),
    /// The caches.
    Caches,
    /// What outputs take on disk.
    Disk,
}

/// What the daemon says of it.
#[derive(Debug)]
pub(super) enum Answer {
    Builds(Vec<pb::Invocation>),
    Build(Box<Seen>),
    Outputs(pb::FindOutputsResponse),
    /// What `why` says.
    Output(Option<Box<pb::why_response::Answer>>),
    Caches(Caches),
    Disk(pb::DiskUsageResponse),
    /// There is no such build or output.
    Nothing(String),
}

/// A build as it is at one moment.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) build: pb::Invocation,
    pub(super) waiting: pb::Waiting,
    /// The first of its targets, those that failed before the others.
    pub(super) targets: Vec<pb::Target>,
    /// How many it has.
    pub(super) all_targets: usize,
}

impl From<pb::GetInvocationResponse> for Seen {
    fn from(answer: pb::GetInvocationResponse) -> Self {
        let mut targets = answer.targets;
        let all_targets = targets.len();
        targets.sort_by_key(|target| target.state().rank());
        targets.truncate(TARGETS);
        targets.shrink_to_fit();
        Self {
            build: answer.invocation.unwrap_or_default(),
            waiting: answer.waiting.unwrap_or_default(),
            targets,
            all_targets,
        }
    }
}

/// The caches, and what each gave to the builds on record.
#[derive(Debug, Default)]
pub(super) struct Caches {
    pub(super) standing: Vec<pb::list_caches_response::Cache>,
    pub(super) given: Vec<pb::report_response::Entry>,
}

/// What is told to the screens.
#[derive(Debug)]
pub(super) enum Told {
    /// A daemon answers.
    Connected,
    /// None does, or not any more: why.
    Lost(String),
    /// What it does not download at present.
    Paused(Option<pb::Pause>),
    /// It has said this of the subject.
    Answer(Subject, Answer),
}

impl Subject {
    /// How long after a look, which took so long, the next one follows.
    fn pause(&self, answer: &Answer, took: Duration) -> Duration {
        let shortest = match (self, answer) {
            (Self::Builds | Self::Caches, _) => PAUSE,
            (Self::Build(_), Answer::Build(seen)) if !seen.build.state().is_over() => PAUSE,
            (Self::Build(_), _) => 5 * PAUSE,
            (Self::Outputs { .. } | Self::Output(_) | Self::Disk, _) => SELDOM,
        };
        shortest.max(took.saturating_mul(SHARE).min(LONGEST))
    }

    async fn look(&self, client: &mut Client) -> Result<Answer, Failure> {
        Ok(match self {
            Self::Builds => Answer::Builds(client.invocations(BUILDS).await?),
            Self::Build(id) => Answer::Build(Box::new(client.seen(id).await?.into())),
            Self::Outputs { build, text } => {
                let request = pb::FindOutputsRequest {
                    invocation_id: build.clone(),
                    text: text.clone(),
                    limit: ROWS as u32,
                };
                Answer::Outputs(client.find_outputs(request).await?)
            }
            Self::Output(path) => {
                let mut answers = client.why(vec![path.clone()]).await?;
                Answer::Output(answers.pop().map(Box::new))
            }
            Self::Caches => {
                let request = pb::ReportRequest {
                    since_ms: 0,
                    by: pb::ReportBy::Store.into(),
                };
                let standing = client.caches().await?.caches;
                let mut given = client.report(request).await?.entries;
                given.truncate(ROWS);
                Answer::Caches(Caches { standing, given })
            }
            Self::Disk => {
                let request = pb::DiskUsageRequest {
                    workspace: String::new(),
                    by: pb::DiskUsageBy::Workspace.into(),
                };
                let mut usage = client.disk_usage(request).await?;
                usage.entries.truncate(ROWS);
                Answer::Disk(usage)
            }
        })
    }
}

/// Looks at what is shown, until nobody takes the answers.
pub(super) async fn look(
    address: DaemonAddress,
    mut shown: watch::Receiver<Subject>,
    told: mpsc::Sender<Told>,
) {
    let lost = async |reason: String| {
        let sent = told.send(Told::Lost(reason)).await.is_ok();
        sleep(PAUSE).await;
        sent
    };
    loop {
        let mut client = match address.connect().await {
            Ok(client) => client,
            Err(refused) => {
                if !lost(refused.to_string()).await {
                    return;
                }
                continue;
            }
        };
        if told.send(Told::Connected).await.is_err() {
            return;
        }
        match hear(&mut client, &mut shown, &told).await {
            None => return,
            Some(failure) => {
                if !lost(failure.message).await {
                    return;
                }
            }
        }
    }
}

/// Looks until the connection is lost: why. `None` once nobody takes the answers.
async fn hear(
    client: &mut Client,
    shown: &mut watch::Receiver<Subject>,
    told: &mpsc::Sender<Told>,
) -> Option<Failure> {
    loop {
        let subject = shown.borrow_and_update().clone();
        let began = Instant::now();
        let looked = tokio::select! {
            looked = subject.look(client) => looked,
            // What takes long is not waited for once something else is shown.
            changed = shown.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return None,
            },
        };
        let answer = match looked {
            Ok(answer) => answer,
            Err(failure) if failure.code == exit::NOT_FOUND => Answer::Nothing(failure.message),
            Err(failure) => return Some(failure),
        };
        let pause = subject.pause(&answer, began.elapsed());
        told.send(Told::Paused(client.paused().await)).await.ok()?;
        told.send(Told::Answer(subject, answer)).await.ok()?;
        tokio::select! {
            () = sleep_until(Instant::now() + pause) => {}
            changed = shown.changed() => changed.ok()?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_very_many_targets_those_are_kept_that_failed() {
        let target = |n: usize| pb::Target {
            label: format!("//:{n}"),
            state: match n {
                99_999 => pb::TargetState::Failed,
                _ => pb::TargetState::Settled,
            }
            .into(),
            ..pb::Target::default()
        };
        let seen = Seen::from(pb::GetInvocationResponse {
            targets: (0..100_000).map(target).collect(),
            ..pb::GetInvocationResponse::default()
        });
        assert_eq!((seen.targets.len(), seen.all_targets), (TARGETS, 100_000));
        assert_eq!(seen.targets[0].label, "//:99999");
        assert!(seen.targets.capacity() < 2 * TARGETS);
    }

    #[test]
    fn what_takes_long_is_looked_at_less_often() {
        let build = |state: pb::InvocationState| {
            let seen = Seen {
                build: pb::Invocation {
                    state: state.into(),
                    ..pb::Invocation::default()
                },
                ..Seen::default()
            };
            Answer::Build(Box::new(seen))
        };
        let subject = Subject::Build(String::new());
        let running = build(pb::InvocationState::Running);
        let pause = |ms| subject.pause(&running, Duration::from_millis(ms));
        assert_eq!(pause(1), PAUSE);
        assert_eq!(pause(100), Duration::from_secs(2));
        assert_eq!(pause(60_000), LONGEST);
        let over = build(pb::InvocationState::Settled);
        assert_eq!(subject.pause(&over, Duration::ZERO), 5 * PAUSE);
    }
}
