//! A build whose stream has broken off and may be resumed, but of which nothing is on its way.
//!
//! It may stay so for minutes, and there may be hundreds of them, each with a root of its own. So it lets go of its root,
//! which is closed like any other that nobody uses, and opens it again when there is more to do.

use tokio::task::spawn_blocking;

use super::{Actor, Place};
use crate::materialize::place::Left;

/// What it keeps of its root.
pub(super) struct Parted {
    /// Whether the root is still open can be told by this.
    pub(super) root: u32,
    pub(super) left: Left,
    had_session: bool,
}

impl Actor {
    /// Lets go of the root, if nothing is done in it until the stream is resumed.
    pub(super) async fn part(&mut self) {
        let is_over = !self.stream_open && self.interrupted && self.reported.is_some();
        let is_quiet = self.ledger.is_quiet()
            && self.doubt.is_none()
            && self.unwritten.is_empty()
            && self.unasked.is_empty()
            && self.others.is_empty();
        let (Some(exec_root), true) = (self.build.exec_root(), is_over && is_quiet) else {
            return;
        };
        let exec_root = exec_root.to_owned();
        let Some(Place { root, .. }) = &self.place else {
            return;
        };
        let leaving = root.clone();
        let Ok(Ok(left)) = spawn_blocking(move || leaving.place.leave()).await else {
            return;
        };
        self.parted = Some(Parted {
            root: root.id,
            left,
            had_session: self.session.take().is_some(),
        });
        self.place = None;
        self.awaited_root = Some(exec_root);
    }

    /// The stream goes on, and with it the work in the root.
    pub(super) async fn come_back(&mut self) {
        let Some(Parted { had_session, .. }) = self.parted else {
            return;
        };
        if let Some(path) = self.awaited_root.take() {
            self.open_root(path).await;
        }
        if had_session && self.blocked.is_none() {
            self.session().await;
        }
    }
}
