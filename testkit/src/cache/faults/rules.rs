//! The rules of a running cache, and what they say of a call, a blob or a connection.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::{
    blob::{BlobFault, Transfer},
    call::{Pretence, RequestFault},
    rule::{Rule, Times},
};
use crate::cache::stats::Rpc;
use outhaul_digest::Digest;

#[derive(Debug, Default)]
struct Rules {
    blobs: Vec<Rule<Digest, BlobFault>>,
    requests: Vec<Rule<Rpc, RequestFault>>,
    pretence: Pretence,
    /// How often a rule was applied, by its fault's name.
    fired: BTreeMap<&'static str, u64>,
    line: Line,
    /// How many of the next connections are dead from the beginning.
    dead: u32,
}

/// What a connection holds to learn its fate.
#[derive(Debug, Clone, Default)]
pub(in super::super) struct Line {
    /// Cancelled to break it.
    pub(in super::super) severed: CancellationToken,
    /// Cancelled to let it die: it stays open, and nothing is read from it or written to it any more.
    pub(in super::super) dead: CancellationToken,
}

#[derive(Debug, Default)]
struct Shared {
    /// Number of rules, read without the lock: a cache without faults does not pay for them.
    armed: AtomicUsize,
    rules: Mutex<Rules>,
}

/// The faults of a running cache. A handle: clones share the rules.
#[derive(Debug, Clone, Default)]
pub struct Faults(Arc<Shared>);

impl Faults {
    /// Adds a rule for one blob. When several rules match a read, the one added first that is not used up counts.
    pub fn blob(&self, digest: &Digest, fault: BlobFault, times: Times) {
        self.add(|rules| rules.blobs.push(Rule::new(Some(digest.clone()), fault, times)));
    }

    /// Adds a rule for whatever blob is read.
    pub fn every_blob(&self, fault: BlobFault, times: Times) {
        self.add(|rules| rules.blobs.push(Rule::new(None, fault, times)));
    }

    /// Adds a rule for one kind of call. All delays that match are added up; of the rest the one added first counts.
    pub fn request(&self, rpc: Rpc, fault: RequestFault, times: Times) {
        self.add(|rules| rules.requests.push(Rule::new(Some(rpc), fault, times)));
    }

    /// Adds a rule for whatever call.
    pub fn every_request(&self, fault: RequestFault, times: Times) {
        self.add(|rules| rules.requests.push(Rule::new(None, fault, times)));
    }

    /// Has the cache say something else of itself from now on.
    pub fn pretend(&self, pretence: Pretence) {
        self.change(|rules| rules.pretence = pretence);
    }

    /// Breaks every open connection at once, as a crash of the server would. New ones are accepted.
    pub fn sever_connections(&self) {
        let old = self.change(|rules| std::mem::take(&mut rules.line));
        old.severed.cancel();
    }

    /// Lets every open connection die without a word, as when a cable is pulled: it stays open, but nothing is read from
    /// it or written to it any more, not even an answer to a ping. New ones are accepted.
    pub fn kill_connections(&self) {
        // They can still be severed.
        let line = self.change(|rules| {
            *rules.fired.entry("connections died").or_default() += 1;
            let dead = std::mem::take(&mut rules.line.dead);
            Line {
                severed: rules.line.severed.clone(),
                dead,
            }
        });
        line.dead.cancel();
    }

    /// The next N connections are accepted and never answered.
    pub fn accept_dead(&self, connections: u32) {
        self.change(|rules| rules.dead = connections);
    }

    /// Forgets all rules and everything that was pretended. Dead connections stay dead, later ones live.
    pub fn clear(&self) {
        self.change(|rules| {
            rules.blobs.clear();
            rules.requests.clear();
            rules.pretence = Pretence::default();
            rules.dead = 0;
            self.0.armed.store(0, Ordering::Release);
        });
    }

    /// How many times a rule was applied.
    pub fn fired(&self) -> u64 {
        self.change(|rules| rules.fired.values().sum())
    }

    /// How many times rules were applied, by the names of their faults.
    pub fn fired_by_name(&self) -> BTreeMap<&'static str, u64> {
        self.change(|rules| rules.fired.clone())
    }

    pub(in super::super) fn pretence(&self) -> Pretence {
        self.change(|rules| rules.pretence.clone())
    }

    /// What a new connection holds.
    pub(in super::super) fn line(&self) -> Line {
        self.change(|rules| {
            let mut line = rules.line.clone();
            if rules.dead > 0 {
                rules.dead -= 1;
                *rules.fired.entry("dead connection accepted").or_default() += 1;
                line.dead = CancellationToken::new();
                line.dead.cancel();
            }
            line
        })
    }

    /// What shall happen to a blob about to be sent.
    pub(in super::super) fn on_blob(&self, digest: &Digest, place: Transfer) -> Option<BlobFault> {
        if !self.is_armed() {
            return None;
        }
        self.change(|rules| {
            let rule = rules
                .blobs
                .iter_mut()
                .find_map(|rule| (rule.fault.applies(place) && rule.matches(digest)).then_some(rule))?;
            *rules.fired.entry(rule.fault.name()).or_default() += 1;
            Some(rule.take())
        })
    }

    /// What shall happen to a call that the service takes up: a delay, then perhaps one of the other faults.
    pub(in super::super) fn on_request(&self, rpc: Rpc) -> (Duration, Option<RequestFault>) {
        let mut delay = Duration::ZERO;
        let mut outcome = None;
        if !self.is_armed() {
            return (delay, outcome);
        }
        self.change(|rules| {
            for rule in &mut rules.requests {
                let is_delay = matches!(rule.fault, RequestFault::Delay(_));
                if rule.fault.is_on_the_wire() || (outcome.is_some() && !is_delay) || !rule.matches(&rpc) {
                    continue;
                }
                match rule.fault {
                    RequestFault::Delay(time) => delay += time,
                    fault => outcome = Some(fault),
                }
                *rules.fired.entry(rule.fault.name()).or_default() += 1;
                rule.take();
            }
        });
        (delay, outcome)
    }

    /// What happens to a call before the service sees it, or to its answer afterwards.
    pub(in super::super) fn on_wire(&self, rpc: Rpc) -> Option<RequestFault> {
        if !self.is_armed() {
            return None;
        }
        self.change(|rules| {
            let rule = rules
                .requests
                .iter_mut()
                .find_map(|rule| (rule.fault.is_on_the_wire() && rule.matches(&rpc)).then_some(rule))?;
            *rules.fired.entry(rule.fault.name()).or_default() += 1;
            Some(rule.take())
        })
    }

    fn is_armed(&self) -> bool {
        self.0.armed.load(Ordering::Acquire) > 0
    }

    fn add(&self, push: impl FnOnce(&mut Rules)) {
        self.change(push);
        self.0.armed.fetch_add(1, Ordering::Release);
    }

    fn change<T>(&self, change: impl FnOnce(&mut Rules) -> T) -> T {
        change(&mut self.0.rules.lock())
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;
    use outhaul_digest::DigestFunction;

    const BATCH: Transfer = Transfer {
        batch: true,
        compressed: false,
    };
    const STREAM: Transfer = Transfer {
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
        let by_name = faults.fired_by_name();
        assert_eq!(by_name["stream cut"], 2);
        assert_eq!(by_name["left out of a batch"], 1);
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

    #[test]
    fn what_happens_on_the_wire_is_not_the_services_business() {
        let faults = Faults::default();
        faults.request(Rpc::BatchRead, RequestFault::Http(502), Times::Once);
        faults.request(Rpc::BatchRead, RequestFault::Stall, Times::Once);
        assert_eq!(faults.on_wire(Rpc::StreamRead), None);
        assert_eq!(faults.on_wire(Rpc::BatchRead), Some(RequestFault::Http(502)));
        assert_eq!(faults.on_wire(Rpc::BatchRead), None);
        assert_eq!(faults.on_request(Rpc::BatchRead).1, Some(RequestFault::Stall));
    }

    #[test]
    fn a_line_is_severed_or_dies_and_the_next_one_lives() {
        let faults = Faults::default();
        let first = faults.line();
        faults.kill_connections();
        let second = faults.line();
        assert!(first.dead.is_cancelled() && !first.severed.is_cancelled());
        assert!(!second.dead.is_cancelled());
        faults.sever_connections();
        assert!(first.severed.is_cancelled() && second.severed.is_cancelled());
        faults.accept_dead(1);
        assert!(faults.line().dead.is_cancelled());
        let living = faults.line();
        assert!(!living.dead.is_cancelled() && !living.severed.is_cancelled());
    }
}
