//! Misbehaviour on demand: what real servers do now and then, but never when a test asks for it.
//!
//! Rules are plain data, kept in the order in which they were added. They are looked at in two places only: when a call
//! arrives ([`RequestFault`]), and when a blob is about to be sent ([`BlobFault`]).

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::stats::Rpc;
use crate::digest::Digest;

/// What happens to a blob that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BlobFault {
    /// The size is right, the bytes are not: the first one of the answer is another.
    Corrupt,
    /// The answer is this many bytes longer (zeros at the end), or shorter, and otherwise looks well.
    Resize(i64),
    /// The batch's answer does not mention the blob.
    DropFromBatch,
    /// The blob's own status in a batch, the call's in a stream.
    Status(Code),
    /// The stream breaks with UNAVAILABLE when it has sent this many bytes (before compression).
    CutAfter(u64),
    /// The stream sends this many bytes (before compression), then nothing, and stays open.
    StallAfter(u64),
    /// Where zstd is sent, it is not decodable. No effect on uncompressed answers.
    GarbleCompression,
}

impl BlobFault {
    const fn applies(self, place: Place) -> bool {
        match self {
            Self::DropFromBatch => place.batch,
            Self::CutAfter(_) | Self::StallAfter(_) => !place.batch,
            Self::GarbleCompression => place.compressed,
            Self::Corrupt | Self::Resize(_) | Self::Status(_) => true,
        }
    }
}

/// How a blob is about to be sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// In a batch, else as a stream.
    pub(super) batch: bool,
    /// With zstd.
    pub(super) compressed: bool,
}

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RequestFault {
    /// It fails.
    Status(Code),
    /// It is looked at only after this time.
    Delay(Duration),
    /// It is never answered.
    Stall,
}

/// How often a rule is applied before it is used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Times {
    /// The first time only.
    Once,
    /// The first so many times.
    First(u32),
    /// Always.
    Always,
}

#[derive(Debug)]
struct Rule<Match, Fault> {
    /// `None` matches everything.
    on: Option<Match>,
    fault: Fault,
    /// `None` is for ever.
    left: Option<u32>,
}

impl<Match: PartialEq, Fault: Copy> Rule<Match, Fault> {
    fn matches(&self, candidate: &Match) -> bool {
        self.left != Some(0) && self.on.as_ref().is_none_or(|on| on == candidate)
    }

    /// Uses the rule once.
    fn take(&mut self) -> Fault {
        self.left = self.left.map(|left| left - 1);
        self.fault
    }
}

#[derive(Debug, Default)]
struct Rules {
    blobs: Vec<Rule<Digest, BlobFault>>,
    requests: Vec<Rule<Rpc, RequestFault>>,
    /// Cancelled to break the connections that hold it.
    connections: CancellationToken,
}

#[derive(Debug, Default)]
struct Shared {
    /// Number of rules, read without the lock: a cache without faults does not pay for them.
    armed: AtomicUsize,
    fired: AtomicU64,
    rules: Mutex<Rules>,
}

/// The faults of a running cache. A handle: clones share the rules.
#[derive(Debug, Clone, Default)]
pub struct Faults(Arc<Shared>);

impl Faults {
    /// Adds a rule for one blob. When several rules match a read, the one added first that is not used up counts.
    pub fn blob(&self, digest: &Digest, fault: BlobFault, times: Times) {
        self.add(|rules| rules.blobs.push(rule(Some(digest.clone()), fault, times)));
    }

    /// Adds a rule for whatever blob is read.
    pub fn every_blob(&self, fault: BlobFault, times: Times) {
        self.add(|rules| rules.blobs.push(rule(None, fault, times)));
    }

    /// Adds a rule for one kind of call. All delays that match are added up; of the rest the one added first counts.
    pub fn request(&self, rpc: Rpc, fault: RequestFault, times: Times) {
        self.add(|rules| rules.requests.push(rule(Some(rpc), fault, times)));
    }

    /// Adds a rule for whatever call.
    pub fn every_request(&self, fault: RequestFault, times: Times) {
        self.add(|rules| rules.requests.push(rule(None, fault, times)));
    }

    /// Breaks every open connection at once, as a crash of the server would. New ones are accepted.
    pub fn sever_connections(&self) {
        let fresh = CancellationToken::new();
        let old = self.change(|rules| std::mem::replace(&mut rules.connections, fresh));
        old.cancel();
    }

    /// Forgets all rules.
    pub fn clear(&self) {
        self.change(|rules| {
            rules.blobs.clear();
            rules.requests.clear();
            self.0.armed.store(0, Ordering::Release);
        });
    }

    /// How many times a rule was applied.
    #[must_use]
    pub fn fired(&self) -> u64 {
        self.0.fired.load(Ordering::Relaxed)
    }

    /// The token that a new connection holds.
    pub(super) fn connection(&self) -> CancellationToken {
        self.change(|rules| rules.connections.clone())
    }

    /// What shall happen to a blob about to be sent.
    pub(super) fn on_blob(&self, digest: &Digest, place: Place) -> Option<BlobFault> {
        if !self.is_armed() {
            return None;
        }
        self.change(|rules| {
            let rule = rules
                .blobs
                .iter_mut()
                .find(|rule| rule.fault.applies(place) && rule.matches(digest))?;
            self.0.fired.fetch_add(1, Ordering::Relaxed);
            Some(rule.take())
        })
    }

    /// What shall happen to a call: a delay, then perhaps one of the other faults.
    pub(super) fn on_request(&self, rpc: Rpc) -> (Duration, Option<RequestFault>) {
        let mut delay = Duration::ZERO;
        let mut outcome = None;
        if !self.is_armed() {
            return (delay, outcome);
        }
        self.change(|rules| {
            for rule in rules.requests.iter_mut().filter(|rule| rule.matches(&rpc)) {
                match rule.fault {
                    RequestFault::Delay(time) => delay += time,
                    _ if outcome.is_some() => continue,
                    fault => outcome = Some(fault),
                }
                rule.take();
                self.0.fired.fetch_add(1, Ordering::Relaxed);
            }
        });
        (delay, outcome)
    }

    fn is_armed(&self) -> bool {
        self.0.armed.load(Ordering::Acquire) > 0
    }

    fn add(&self, push: impl FnOnce(&mut Rules)) {
        self.change(push);
        self.0.armed.fetch_add(1, Ordering::Release);
    }

    fn change<T>(&self, change: impl FnOnce(&mut Rules) -> T) -> T {
        change(&mut self.0.rules.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

const fn rule<Match, Fault>(on: Option<Match>, fault: Fault, times: Times) -> Rule<Match, Fault> {
    let left = match times {
        Times::Once => Some(1),
        Times::First(times) => Some(times),
        Times::Always => None,
    };
    Rule { on, fault, left }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;

    const BATCH: Place = Place {
        batch: true,
        compressed: false,
    };
    const STREAM: Place = Place {
        batch: false,
        compressed: false,
    };

    #[test]
    fn a_rule_is_used_as_often_as_it_says_and_only_where_it_applies() {
        let faults = Faults::default();
        let digest = Digest::of(DigestFunction::Sha256, b"a");
        let other = Digest::of(DigestFunction::Sha256, b"b");
        faults.blob(&digest, BlobFault::CutAfter(3), Times::First(2));
        faults.every_blob(BlobFault::DropFromBatch, Times::Once);
        assert_eq!(faults.on_blob(&other, STREAM), None);
        assert_eq!(faults.on_blob(&digest, STREAM), Some(BlobFault::CutAfter(3)));
        assert_eq!(faults.on_blob(&digest, BATCH), Some(BlobFault::DropFromBatch));
        assert_eq!(faults.on_blob(&digest, BATCH), None);
        assert_eq!(faults.on_blob(&digest, STREAM), Some(BlobFault::CutAfter(3)));
        assert_eq!(faults.on_blob(&digest, STREAM), None);
        assert_eq!(faults.fired(), 3);
    }

    #[test]
    fn delays_add_up_and_the_first_failure_counts() {
        let faults = Faults::default();
        let (second, millisecond) = (Duration::from_secs(1), Duration::from_millis(1));
        faults.every_request(RequestFault::Delay(second), Times::Always);
        faults.request(Rpc::BatchRead, RequestFault::Status(Code::Aborted), Times::Once);
        faults.request(Rpc::BatchRead, RequestFault::Stall, Times::Once);
        faults.request(Rpc::BatchRead, RequestFault::Delay(millisecond), Times::Once);
        let aborted = Some(RequestFault::Status(Code::Aborted));
        assert_eq!(faults.on_request(Rpc::GetAction), (second, None));
        assert_eq!(faults.on_request(Rpc::BatchRead), (second + millisecond, aborted));
        assert_eq!(
            faults.on_request(Rpc::BatchRead),
            (second, Some(RequestFault::Stall))
        );
        faults.clear();
        assert_eq!(faults.on_request(Rpc::BatchRead), (Duration::ZERO, None));
    }
}
