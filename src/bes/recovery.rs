//! Going on from the journal after a start.

use std::{sync::Arc, time::Duration};

use tokio::sync::oneshot;

use super::{command::Command, context::Context, stream};
use crate::{
    builds::StreamKey,
    journal::{Entry, JournalError, MOST_LOST},
};

/// How long the daemon has been up before it goes on with a build in whose replay another one died, and how long it has
/// eyes for that one alone. Anyone who ends it during the start ends it for another reason.
const CAREFUL: Duration = Duration::from_secs(3);
const ALONE: Duration = Duration::from_secs(30);
/// How often it looks whether that is over.
const LOOK: Duration = Duration::from_millis(200);

/// See [`super::BesService::recover`].
pub(super) async fn recover(context: &Arc<Context>) -> Result<usize, JournalError> {
    let Some(journal) = context.journal.clone() else {
        return Ok(0);
    };
    let dir = journal.dir().to_owned();
    let listed = tokio::task::spawn_blocking(move || {
        let listed = journal.unfinished()?.into_iter();
        let counted = listed.map(|entry| (journal.lost_replays(&entry), entry));
        // What could not be set aside stays where it is.
        Ok(counted.filter(|(lost, _)| *lost < MOST_LOST).collect::<Vec<_>>())
    });
    let unfinished = listed
        .await
        .map_err(|e| JournalError::io("list", dir)(e.into()))??;
    let streams = unfinished.len();
    let (mut opened, mut suspects) = (Vec::new(), Vec::new());
    for (lost, entry) in unfinished {
        // Anyone who asks about the build as soon as the listeners are open must find it at work, however long its journal
        // takes to read: asking for its progress makes the engine know it.
        let (builds, key) = (Arc::clone(&context.builds), entry.key.clone());
        let done = tokio::task::spawn_blocking(move || builds.is_done(&key)).await;
        if !done.unwrap_or(false) {
            let _ = context.builds.progress(&entry.key).await;
        }
        if lost > 0 {
            suspects.push(entry);
        } else {
            opened.push(take_up(context, &entry.key).await);
        }
    }
    let has_suspects = !suspects.is_empty();
    for answered in opened {
        // It does not answer only if it panicked.
        let _ = answered.await;
    }
    let (careful, stop) = (Arc::clone(context), context.shutdown.clone());
    let rest = async move {
        for entry in &suspects {
            take_up_alone(&careful, entry).await;
        }
    };
    if has_suspects {
        context.tasks.spawn(stop.run_until_cancelled_owned(rest));
    }
    Ok(streams)
}

/// Makes a stream take up its journal; answered when it has.
async fn take_up(context: &Arc<Context>, key: &StreamKey) -> oneshot::Receiver<()> {
    let (answer, answered) = oneshot::channel();
    let _ = stream::task(key, context).send(Command::Opened(answer)).await;
    answered
}

/// The same of one that a process has died of, after a while; returns when it has come through, or a while later.
async fn take_up_alone(context: &Arc<Context>, entry: &Entry) {
    tracing::warn!(
        stream = %entry.key,
        "outhaul crashed while it resumed this build; it tries again in {CAREFUL:?}, and sets the journal \
         aside if it crashes once more"
    );
    tokio::time::sleep(CAREFUL).await;
    let _ = take_up(context, &entry.key).await.await;
    let through = async {
        while let Some(journal) = context.journal.clone() {
            let entry = entry.clone();
            let lost = tokio::task::spawn_blocking(move || journal.lost_replays(&entry)).await;
            if lost.unwrap_or(0) == 0 {
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    let _ = tokio::time::timeout(ALONE, through).await;
}
