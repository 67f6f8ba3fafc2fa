//! A last look at what is on disk, behind the end of the stream.
//!
//! In minimal mode, Bazels before 6 delete at the end of a command whatever they have fetched in it as inputs of
//! actions of their own (`RemoteModule`, measured with 4.2.3), be it asked for or not: an output that was rightly found
//! present when its target was completed, or that was put there by us before, is gone when the command returns. They
//! do so before they end the stream.

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use tokio::task::spawn_blocking;

use super::{Actor, Placed};
use crate::{
    materialize::{Outcome, Want},
    output::Class,
};

impl Actor {
    /// Wants once more what is not on disk any more. Once for each end of the stream.
    pub(super) async fn look_again(&mut self) {
        if self.stream_open || std::mem::replace(&mut self.looked_again, true) {
            return;
        }
        let placed = std::mem::take(&mut self.placed);
        let (Some(place), Some(session)) = (&self.place, &self.session) else {
            return;
        };
        if place.root.epoch.current() != place.version {
            // What a newer build does with its outputs is no business of this one.
            return;
        }
        let root: PathBuf = place.root.place.path().to_owned();
        let gone = spawn_blocking(move || {
            let mut placed = placed;
            placed.retain(|placed| !is_still_there(&root, placed));
            placed
        });
        let mut wants = Vec::new();
        for placed in gone.await.unwrap_or_default() {
            let Some(wanted) = self.wanted.get_mut(&placed.path).filter(|w| w.done) else {
                continue;
            };
            wanted.done = false;
            wanted.on_disk = false;
            match wanted.class {
                Class::Required => {
                    self.pending_required += 1;
                    self.course.begin(wanted.sequence);
                }
                _ => self.pending_optional += 1,
            }
            self.tally.take_back(&placed.outcome);
            wants.push(Want::new(placed.path, wanted.content.clone(), wanted.class, None));
        }
        if !wants.is_empty() {
            tracing::debug!(
                invocation = %self.row.invocation_id,
                outputs = wants.len(),
                "the build tool has deleted or changed outputs at its end; they are fetched again"
            );
            self.shared.materializer.want(session, wants).await;
        }
    }
}

/// Whether it is the same file as before, or in the place of a link or a directory anything at all. Only decides
/// whether there is a closer look, so links are followed wherever they lead.
fn is_still_there(root: &Path, placed: &Placed) -> bool {
    let path = root.join(placed.path.as_path());
    let stamp = match &placed.outcome {
        Outcome::Downloaded { stamp, .. } | Outcome::Present { stamp, .. } => stamp.as_ref(),
        _ => None,
    };
    match stamp {
        Some(stamp) => std::fs::metadata(path)
            .is_ok_and(|now| (now.dev(), now.ino(), now.size()) == (stamp.device, stamp.inode, stamp.size)),
        None => path.symlink_metadata().is_ok(),
    }
}
