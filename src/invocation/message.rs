//! The messages to an invocation's task.

use std::{path::PathBuf, time::Duration};

use tokio::sync::{mpsc, oneshot, watch};

use super::{
    feed::{Hold, Waiting},
    timeline::Timeline,
    watching::{Begun, Page},
};
use crate::{
    bep::event::StreamEvent,
    builds::{Progress, Settlement, StreamEnd},
    digest::Digest,
    exec_path::ExecPath,
    record::{InvocationRow, TargetRow},
};

/// A message to an invocation's task.
pub(super) enum Message {
    /// Events with their numbers.
    Events(Vec<(i64, StreamEvent)>),
    /// What comes next is beyond a limit of the event service, for this reason.
    Limited(String),
    /// The client's connection was lost; it may come back.
    Lost,
    Ended(StreamEnd),
    /// Answer when everything required is there or has failed.
    Settled(oneshot::Sender<Settlement>),
    /// Answer when everything optional came to its end as well.
    Done(oneshot::Sender<()>),
    /// The end of the stream is held back.
    Holds(Hold),
    /// The end of the stream was held back for so long.
    Held(Duration, bool),
    /// Answer with the present state, and the number of required outputs that are still on their way. If there are none, as
    /// soon as what came of all of them is on record.
    Snapshot(oneshot::Sender<(InvocationRow, u64)>),
    /// Answer with what is waited for, and at most that many of the outputs that are on their way.
    Waiting(usize, oneshot::Sender<Waiting>),
    /// Answer with how outputs have come so far.
    Timeline(oneshot::Sender<Timeline>),
    /// Answer whether the build goes on.
    Busy(oneshot::Sender<bool>),
    /// Answer with the targets so far.
    Targets(oneshot::Sender<Vec<TargetRow>>),
    /// Let a listener follow the build.
    Watch(oneshot::Sender<Begun>),
    /// Answer with the targets from this one on, as many as are in a page.
    Page(usize, oneshot::Sender<Result<Page, Begun>>),
    /// Answer with how far the build is settled.
    Progress(oneshot::Sender<watch::Receiver<Progress>>),
    /// Answer with where these files are on disk.
    LocalFiles(
        Vec<(Option<ExecPath>, Digest)>,
        oneshot::Sender<Vec<Option<PathBuf>>>,
    ),
    /// Give up what is still wanted.
    Cancel(oneshot::Sender<()>),
}

impl Message {
    /// Whether it only asks about the build.
    pub(super) const fn is_question(&self) -> bool {
        matches!(
            self,
            Self::Snapshot(_) | Self::Busy(_) | Self::Waiting(..) | Self::Timeline(_)
        )
    }
}

/// Asks a task something. `None` if it has ended.
pub(super) async fn ask<T>(
    task: &mpsc::Sender<Message>,
    question: impl FnOnce(oneshot::Sender<T>) -> Message,
) -> Option<T> {
    let (answer, answered) = oneshot::channel();
    task.send(question(answer)).await.ok()?;
    answered.await.ok()
}
