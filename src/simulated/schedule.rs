//! What goes wrong, and when.

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    fmt,
    time::Duration,
};

use tokio_util::sync::CancellationToken;
use turmoil::Sim;

use super::Chance;

/// Two hosts with a way between them.
pub(crate) type Link = (&'static str, &'static str);

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Change {
    /// All that is on its way is lost, and all that is sent. Connections never recover from that: nothing is sent twice
    /// here, so their ends learn of it only by waiting.
    Cut(Link),
    /// The same, from the first one to the second one.
    CutOneWay(Link),
    /// What was cut works again, for new connections.
    Mend(Link),
    /// Nothing arrives, and nothing is lost.
    Hold(Link),
    /// What was held arrives.
    Release(Link),
    /// Every message takes so long.
    Slow(Link, Duration),
    /// At each message, all that is on its way is lost with this probability.
    Lossy(Link, f64),
    /// All connections that there are die without a word, on whichever link.
    Forget,
    /// The host's process is gone, its sockets are closed.
    Crash(&'static str),
    /// It is asked to end, see [`asked_to_end`].
    Stop(&'static str),
    /// It is started again.
    Start(&'static str),
}

/// Faults in the order of their times, each with its end.
#[derive(Debug, Clone)]
pub(crate) struct Schedule {
    to_come: VecDeque<(Duration, Change)>,
    done: Vec<(Duration, Change)>,
    /// When the last fault has ended.
    pub(crate) healed: Duration,
}

thread_local! {
    static STOPS: RefCell<BTreeMap<&'static str, CancellationToken>> = const { RefCell::new(BTreeMap::new()) };
}

/// What asks the process that begins now on a host to end.
pub(crate) fn asked_to_end(host: &'static str) -> CancellationToken {
    let stop = CancellationToken::new();
    STOPS.with_borrow_mut(|stops| stops.insert(host, stop.clone()));
    stop
}

/// How long a process that is asked to end may take for it.
const ENDING: Duration = Duration::from_secs(10);

/// Faults are one of these so long, at most.
const LONGEST: [Duration; 4] = [
    Duration::from_millis(200),
    Duration::from_secs(3),
    Duration::from_secs(20),
    Duration::from_secs(90),
];

impl Schedule {
    /// Faults of the links, and deaths of the hosts, that begin within a time: up to four of each.
    pub(crate) fn random(
        chance: &mut Chance,
        links: &[Link],
        hosts: &[&'static str],
        within: Duration,
    ) -> Self {
        let mut all = Vec::new();
        for &link in links {
            let mut at = Duration::ZERO;
            for _ in 0..chance.below(5) {
                at += chance.time(within);
                let longest = chance.pick(&LONGEST);
                let ends = at + chance.time(longest);
                let (first, last) = fault(chance, link);
                all.extend([(at, first), (ends, last)]);
                at = ends + Duration::from_millis(1);
            }
        }
        for &host in hosts {
            let mut at = Duration::ZERO;
            for _ in 0..chance.below(4) {
                at += chance.time(within);
                let mut down = if chance.happens(0.5) {
                    Duration::ZERO
                } else {
                    chance.time(LONGEST[2])
                };
                let mut end = Change::Crash(host);
                if chance.happens(0.25) {
                    down += ENDING;
                    end = Change::Stop(host);
                }
                all.extend([(at, end), (at + down, Change::Start(host))]);
                at += down + Duration::from_millis(1);
            }
        }
        Self::of(all)
    }

    /// Just these.
    pub(crate) fn of(changes: impl IntoIterator<Item = (Duration, Change)>) -> Self {
        let mut all: Vec<_> = changes.into_iter().collect();
        // Stable: what ends does so before the same thing begins again.
        all.sort_by_key(|(at, _)| *at);
        Self {
            healed: all.last().map_or(Duration::ZERO, |(at, _)| *at),
            to_come: all.into(),
            done: Vec::new(),
        }
    }

    /// With more changes; those have no part in [`Self::healed`].
    pub(crate) fn and(self, more: impl IntoIterator<Item = (Duration, Change)>) -> Self {
        let healed = self.healed;
        Self {
            healed,
            ..Self::of(self.to_come.into_iter().chain(more))
        }
    }

    /// Faults so far.
    pub(crate) fn faults(&self) -> u64 {
        self.done.iter().filter(|(_, change)| change.is_fault()).count() as u64
    }

    /// So far, those for which something is true.
    pub(crate) fn count(&self, is: impl Fn(&Change) -> bool) -> u64 {
        self.done.iter().filter(|(_, change)| is(change)).count() as u64
    }

    /// Does what is due.
    pub(super) fn follow(&mut self, sim: &mut Sim<'_>) {
        while let Some(&(at, change)) = self.to_come.front()
            && at <= sim.elapsed()
        {
            self.to_come.pop_front();
            change.make(sim);
            self.done.push((at, change));
        }
    }
}

impl Change {
    const fn is_fault(&self) -> bool {
        !matches!(self, Self::Mend(_) | Self::Release(_) | Self::Start(_))
    }

    fn make(self, sim: &mut Sim<'_>) {
        match self {
            Self::Cut((a, b)) => sim.partition(a, b),
            Self::CutOneWay((a, b)) => sim.partition_oneway(a, b),
            Self::Mend((a, b)) => {
                sim.set_link_fail_rate(a, b, 0.0);
                sim.set_link_latency(a, b, Duration::from_millis(5));
                sim.repair(a, b);
            }
            Self::Hold((a, b)) => sim.hold(a, b),
            Self::Release((a, b)) => sim.release(a, b),
            Self::Slow((a, b), latency) => sim.set_link_latency(a, b, latency),
            Self::Lossy((a, b), rate) => sim.set_link_fail_rate(a, b, rate),
            Self::Forget => super::net::forget(),
            Self::Crash(host) => sim.crash(host),
            Self::Stop(host) => STOPS.with_borrow(|stops| {
                if let Some(stop) = stops.get(host) {
                    stop.cancel();
                }
            }),
            Self::Start(host) => sim.bounce(host),
        }
    }
}

fn fault(chance: &mut Chance, link: Link) -> (Change, Change) {
    let back = (link.1, link.0);
    match chance.below(9) {
        0 | 1 => (Change::Cut(link), Change::Mend(link)),
        2 => (Change::CutOneWay(link), Change::Mend(link)),
        3 => (Change::CutOneWay(back), Change::Mend(link)),
        4 | 5 => (Change::Hold(link), Change::Release(link)),
        6 => {
            let latency = chance.time(Duration::from_secs(5));
            (Change::Slow(link, latency), Change::Mend(link))
        }
        _ => (
            Change::Lossy(link, chance.pick(&[0.3, 0.03, 0.003])),
            Change::Mend(link),
        ),
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "after:")?;
        for (at, change) in &self.done {
            writeln!(f, "  {at:?}: {change:?}")?;
        }
        if !self.to_come.is_empty() {
            writeln!(f, "with {} changes to come", self.to_come.len())?;
        }
        Ok(())
    }
}
