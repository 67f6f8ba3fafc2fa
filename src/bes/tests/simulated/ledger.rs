//! What was promised to whom, over all lives of the processes.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::PathBuf,
    sync::{Mutex, MutexGuard, atomic::AtomicU64},
    time::Duration,
};

use bytes::Bytes;
use prost::{
    Message as _,
    encoding::{WireType, encode_key, encode_varint},
};

use super::{daemon::Seen, upstream::Service};
use crate::{
    bes::{
        HoldPolicy,
        tests::harness::{key, request},
    },
    journal::{Journal, RecordKind},
    proto::google::devtools::build::v1::build_event::{self, BuildComponentStreamFinished},
    simulated::{Chance, Totals, Verdict, now},
};

/// What a stream is, and what becomes of it.
pub(super) struct Plan {
    /// Its requests, with the last one.
    pub(super) requests: Vec<Bytes>,
    /// How long its outputs take from the stream's end on; `None` for ever.
    pub(super) settles: Option<Duration>,
    /// Milliseconds that the engine takes for an event.
    pub(super) pace: u64,
    /// Whether its client reports the build's life around it.
    pub(super) calls: bool,
}

/// What has become of a stream.
#[derive(Debug, Default, Clone)]
pub(super) struct Fate {
    /// The highest number that its client was acknowledged.
    pub(super) acked: i64,
    /// The client got everything and went, or went without that.
    pub(super) over: bool,
    /// When its last event was first sent, and when an engine first said that it was settled.
    pub(super) finished: Option<Duration>,
    pub(super) settled: Option<Duration>,
    /// Connections that the client made.
    pub(super) connections: u64,
    pub(super) cancelled: bool,
    /// Calls about its life that were answered.
    pub(super) calls: u64,
}

pub(super) struct Ledger {
    pub(super) verdict: Verdict,
    /// Of the journal.
    pub(super) dir: PathBuf,
    pub(super) plans: BTreeMap<String, Plan>,
    hold: HoldPolicy,
    /// Daemons that were started. Lifecycle calls end with theirs.
    pub(super) lives: AtomicU64,
    /// Whether an engine knows what an earlier one has done.
    pub(super) remembers: bool,
    /// When a daemon was first asked to end. It lets those go who wait.
    pub(super) stopped: Mutex<Option<Duration>>,
    fates: Mutex<BTreeMap<String, Fate>>,
}

/// A stream of this many events and its end.
pub(super) fn requests(chance: &mut Chance, name: &str, events: i64) -> Vec<Bytes> {
    let mut requests: Vec<Bytes> = Vec::new();
    for n in 1..=events {
        let mut value = format!("{name}/{n}").into_bytes();
        let padding = chance.pick(&[0, 0, 100, 3000, 3000, 60_000]);
        value.resize(value.len() + padding, 0);
        let event = build_event::Event::BazelEvent(prost_types::Any {
            type_url: "type.googleapis.com/build_event_stream.BuildEvent".to_owned(),
            value,
        });
        let mut request = request(name, n, event).encode_to_vec();
        // An unknown field stays.
        encode_key(777, WireType::LengthDelimited, &mut request);
        encode_varint(3, &mut request);
        request.extend(b"new");
        requests.push(request.into());
    }
    let last = build_event::Event::ComponentStreamFinished(BuildComponentStreamFinished { r#type: 1 });
    requests.push(request(name, events + 1, last).encode_to_vec().into());
    requests
}

impl Ledger {
    pub(super) fn new(
        dir: PathBuf,
        plans: BTreeMap<String, Plan>,
        hold: HoldPolicy,
        remembers: bool,
    ) -> Self {
        Self {
            verdict: Verdict::default(),
            dir,
            fates: Mutex::new(plans.keys().map(|name| (name.clone(), Fate::default())).collect()),
            plans,
            hold,
            lives: AtomicU64::default(),
            remembers,
            stopped: Mutex::default(),
        }
    }

    pub(super) fn fates(&self) -> MutexGuard<'_, BTreeMap<String, Fate>> {
        self.fates.lock().unwrap()
    }

    pub(super) fn fate(&self, name: &str) -> Fate {
        self.fates()[name].clone()
    }

    pub(super) fn change(&self, name: &str, change: impl FnOnce(&mut Fate)) {
        if let Some(fate) = self.fates().get_mut(name) {
            change(fate);
        }
    }

    /// A client got an acknowledgement on a connection on which it has sent events up to `sent`.
    pub(super) fn acknowledged(&self, name: &str, sequence: i64, sent: i64) {
        let fate = self.fate(name);
        self.verdict
            .check(sequence == fate.acked + 1 && sequence <= sent, || {
                format!(
                    "{name}: {sequence} was acknowledged after {}, with {sent} sent",
                    fate.acked
                )
            });
        let last = self.plans[name].requests.len() as i64;
        if sequence == last && self.hold.mode != crate::bes::HoldMode::None {
            // Not sooner in any life of the daemon, at least. Hosts' clocks differ by a tick or two.
            let now = now() + Duration::from_millis(100);
            let timed_out = fate.finished.is_some_and(|at| at + self.hold.timeout <= now);
            let stopped = self.stopped.lock().unwrap().is_some_and(|at| at <= now);
            let free = fate.settled.is_some() || timed_out || stopped;
            self.verdict
                .check(free, || format!("{name}: let go before it was settled: {fate:?}"));
        }
        self.change(name, |fate| fate.acked = sequence);
    }

    /// What was acknowledged is on disk, in order, byte for byte, and nothing else.
    pub(super) fn check_journal(&self) {
        let journal = Journal::view(&self.dir);
        for (name, fate) in self.fates().iter() {
            let expected = &self.plans[name].requests;
            let records: Vec<_> = match journal.find_stream(&key(name)).and_then(|entry| entry.read()) {
                Ok(records) => records
                    .map_while(Result::ok)
                    .filter(|record| matches!(record.kind, RecordKind::Event | RecordKind::Finished))
                    .collect(),
                Err(_) => Vec::new(),
            };
            self.verdict.check(records.len() as i64 >= fate.acked, || {
                format!(
                    "{name}: {} events are in the journal, {} were acknowledged",
                    records.len(),
                    fate.acked
                )
            });
            let right = records.len() <= expected.len()
                && (1..)
                    .zip(&records)
                    .zip(expected)
                    .all(|((n, record), expected)| record.sequence == n && record.payload == *expected);
            self.verdict.check(right, || {
                format!("{name}: the journal has other events than were sent")
            });
        }
    }

    /// Events of a stream that are in the journal.
    pub(super) fn journaled(&self, name: &str) -> usize {
        let records = Journal::view(&self.dir)
            .find_stream(&key(name))
            .and_then(|entry| entry.read());
        records.map_or(0, |records| {
            records
                .map_while(Result::ok)
                .filter(|record| matches!(record.kind, RecordKind::Event | RecordKind::Finished))
                .count()
        })
    }

    /// Streams that will never be settled.
    pub(super) fn endless(&self) -> usize {
        let endless = self.plans.iter().filter(|(_, plan)| plan.settles.is_none());
        endless.filter(|(name, _)| self.journaled(name) > 0).count()
    }

    pub(super) fn clients_are_gone(&self) -> bool {
        // The ghost's client can't say.
        self.fates()
            .iter()
            .all(|(name, fate)| fate.over || name == "ghost")
    }

    pub(super) fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for (name, fate) in self.fates().iter() {
            totals.count("streams", 1);
            totals.count("events acknowledged", fate.acked.unsigned_abs());
            totals.count("connections", fate.connections);
            totals.count("calls", fate.calls);
            totals.count("cancelled", u64::from(fate.cancelled));
            totals.count(
                "ghosts",
                u64::from(name == "ghost" && !fate.over && fate.connections > 0),
            );
        }
        totals
    }

    /// For a failure.
    pub(super) fn state(&self, seen: &Seen, service: Option<&Service>) -> String {
        let mut text = format!("{seen:?}, hold {:?}\n", self.hold);
        for (name, fate) in self.fates().iter() {
            let plan = &self.plans[name];
            let upstream = service.map(|service| service.kept(name));
            let _ = writeln!(
                text,
                "{name}: {} requests, settles {:?}, {fate:?}, {} journalled, upstream {upstream:?}",
                plan.requests.len(),
                plan.settles,
                self.journaled(name),
            );
        }
        text
    }
}
