//! The newest invocation of a root wins.

use parking_lot::{RwLock, RwLockReadGuard};

use super::claim::{Claim, Working};

/// The newest invocation number of a root.
///
/// Every publication happens while its [`Permit`] is held. [`begin`](Self::begin) waits for the permits that are
/// out, so once it has returned, nothing of an older invocation appears any more. Permits are held for a link or a
/// rename, not for a write, and a thread must never hold two: a waiting `begin` would come between them.
///
/// With a [`Claim`], that holds for the invocations of other processes as well.
#[derive(Debug, Default)]
pub struct Epoch {
    newest: RwLock<u64>,
    claim: Option<Claim>,
}

/// The right to publish, as long as it is held.
#[derive(Debug)]
#[must_use = "publishing is permitted only while this is held"]
pub(crate) struct Permit<'a> {
    _held: RwLockReadGuard<'a, u64>,
}

impl Epoch {
    /// An epoch in which every version may publish.
    pub fn new() -> Self {
        Self::default()
    }

    /// An epoch that is shared with other processes.
    pub fn shared(claim: Option<Claim>) -> Self {
        Self {
            newest: RwLock::default(),
            claim,
        }
    }

    /// Makes `version` the newest, unless a newer one has begun already. When this returns, nothing older than the
    /// newest is being published or will be.
    pub fn begin(&self, version: u64) {
        let mut newest = self.newest.write();
        *newest = version.max(*newest);
    }

    /// The right to publish for `version`; `None` when a newer one has begun.
    pub(crate) fn permit(&self, version: u64) -> Option<Permit<'_>> {
        let newest = self.newest.read();
        let is_newest =
            version >= *newest && self.claim.as_ref().is_none_or(|claim| claim.is_newest(version));
        is_newest.then_some(Permit { _held: newest })
    }

    /// Whether nothing newer than `version` has begun, here or in another process.
    pub(crate) fn is_newest(&self, version: u64) -> bool {
        self.permit(version).is_some()
    }

    /// The newest version that any process has claimed. Blocks on the file system.
    pub fn claimed(&self) -> u64 {
        self.claim.as_ref().map_or(0, Claim::newest)
    }

    /// Takes part without a build of its own: permits are given only until another process begins a newer one, and that one
    /// waits for them. Returns the newest version that any process has claimed. Blocks on the file system.
    ///
    /// # Errors
    /// When other processes cannot be seen.
    pub(crate) fn join(&self) -> std::io::Result<u64> {
        self.claim.as_ref().map_or(Ok(0), Claim::join)
    }

    /// Tells other processes that this invocation has begun, unless they have begun a newer one. When this returns true,
    /// nothing older than the newest is published by any of them; when false, one of them is still in the middle of it,
    /// and what it publishes may come late, until [`is_alone`](Self::is_alone). Blocks, for a second at most.
    pub(crate) fn claim(&self, version: u64, invocation_id: &str) -> bool {
        self.claim
            .as_ref()
            .is_none_or(|claim| claim.begin(version, invocation_id))
    }

    /// Whether no other process is in the middle of publishing any more that was when this one claimed the root. Not
    /// known, and so false, while this process publishes. Blocks on the file system.
    pub(crate) fn is_alone(&self) -> bool {
        self.claim.as_ref().is_none_or(Claim::is_alone)
    }

    /// To be held from before a permit is asked for until it is given back, for as many permits as there are: anyone
    /// who claims the root elsewhere meanwhile waits for it.
    pub(crate) fn working(&self) -> Option<Working> {
        self.claim.as_ref()?.working()
    }

    /// The newest version that has begun in this process.
    pub fn current(&self) -> u64 {
        *self.newest.read()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, mpsc},
        thread,
        time::Duration,
    };

    use super::*;

    #[test]
    fn an_older_version_gets_no_permit() {
        let epoch = Epoch::new();
        epoch.begin(5);
        assert!(epoch.permit(4).is_none());
        assert!(epoch.permit(5).is_some());
        assert!(epoch.permit(6).is_some());
        epoch.begin(3);
        assert_eq!(epoch.current(), 5, "an epoch never goes back");
    }

    #[test]
    fn begin_waits_for_the_permits_that_are_out() {
        let epoch = Arc::new(Epoch::new());
        let permit = epoch.permit(1).unwrap();
        let (begun, has_begun) = mpsc::channel();
        let thread = thread::spawn({
            let epoch = Arc::clone(&epoch);
            move || {
                epoch.begin(2);
                begun.send(()).unwrap();
            }
        });
        assert!(has_begun.recv_timeout(Duration::from_millis(50)).is_err());
        drop(permit);
        has_begun.recv_timeout(Duration::from_secs(10)).unwrap();
        thread.join().unwrap();
        assert!(epoch.permit(1).is_none());
    }
}
