//! How a build's outputs came: the largest ones each by itself, the others by source and time. Its memory does not grow with
//! the build, so that every build can keep one while it runs.

use std::{cmp::Reverse, collections::BinaryHeap};

use crate::materialize::split_source;

/// Outputs that are kept one by one: those with the most bytes.
const SINGLE: usize = 200;
/// Parts of the time that are told apart. When it gets longer, they get longer.
const PARTS: usize = 1024;
/// How long they are at first, in microseconds.
const FIRST_STEP: i64 = 2_000;
/// Sources that are told apart.
const SOURCES: usize = 8;
/// Where the bytes of all others came from.
const OTHERS: &str = "others";

/// An output that came. Times are microseconds since the epoch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival<'a> {
    pub(crate) path: &'a str,
    pub(crate) bytes: u64,
    /// As rows have it: the way, and the cache where there are several.
    pub(crate) source: &'a str,
    pub(crate) wanted_us: i64,
    /// When the cache was asked, and when it had answered; not known of what is on record, or came without a cache.
    pub(crate) fetched_us: Option<(i64, i64)>,
    pub(crate) placed_us: i64,
}

/// One output on its way from being wanted to being there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Bar {
    pub(crate) bytes: u64,
    pub(crate) path: String,
    pub(crate) source: String,
    pub(crate) wanted_us: i64,
    pub(crate) fetched_us: Option<(i64, i64)>,
    pub(crate) placed_us: i64,
}

/// What came in one part of the time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Came {
    pub(crate) outputs: u64,
    pub(crate) bytes: u64,
}

impl Came {
    fn add(&mut self, other: Self) {
        self.outputs += other.outputs;
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}

/// How long outputs took all together, in microseconds, by what they did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Stages {
    /// Outputs that this is known of.
    pub(crate) outputs: u64,
    pub(crate) queued_us: u64,
    pub(crate) fetched_us: u64,
    pub(crate) placed_us: u64,
}

/// How the outputs of a build came.
#[derive(Debug, Clone, Default)]
pub(crate) struct Timeline {
    /// The ones with the most bytes.
    largest: BinaryHeap<Reverse<Bar>>,
    /// By source, or by cache where there are several: what came in each part of the time.
    sources: Vec<(String, Vec<Came>)>,
    /// Where the first part begins; unset while nothing has come.
    begin_us: Option<i64>,
    /// When the first of the outputs was wanted.
    first_us: Option<i64>,
    step_us: i64,
    /// When the last output was there.
    pub(crate) end_us: i64,
    /// All of it.
    pub(crate) came: Came,
    pub(crate) stages: Stages,
}

impl Timeline {
    /// Of outputs that come in any order, none of them before this moment.
    pub(crate) fn since(begin_us: i64) -> Self {
        Self {
            begin_us: Some(begin_us),
            step_us: FIRST_STEP,
            ..Self::default()
        }
    }

    /// Takes in an output. They come in the order in which they were there, more or less, unless it is known
    /// [since when](Self::since).
    pub(crate) fn add(&mut self, arrival: &Arrival<'_>) {
        if self.begin_us.is_none() {
            self.step_us = FIRST_STEP;
        }
        let begin_us = *self.begin_us.get_or_insert(arrival.wanted_us);
        let first_us = self.first_us.unwrap_or(i64::MAX);
        self.first_us = Some(first_us.min(arrival.wanted_us));
        self.end_us = self.end_us.max(arrival.placed_us);
        let came = Came {
            outputs: 1,
            bytes: arrival.bytes,
        };
        self.came.add(came);
        if let Some((asked, answered)) = arrival.fetched_us {
            let took = |from: i64, to: i64| u64::try_from(to.saturating_sub(from)).unwrap_or_default();
            self.stages.outputs += 1;
            let add = |sum: &mut u64, time: u64| *sum = sum.saturating_add(time);
            add(&mut self.stages.queued_us, took(arrival.wanted_us, asked));
            add(&mut self.stages.fetched_us, took(asked, answered));
            add(&mut self.stages.placed_us, took(answered, arrival.placed_us));
        }
        let at = arrival.placed_us.saturating_sub(begin_us).max(0);
        while at / self.step_us >= PARTS as i64 {
            self.coarsen();
        }
        let part = usize::try_from(at / self.step_us).unwrap_or_default();
        let parts = self.parts_of(arrival.source);
        if parts.len() <= part {
            parts.resize(part + 1, Came::default());
        }
        parts[part].add(came);
        self.keep(arrival);
    }

    fn parts_of(&mut self, source: &str) -> &mut Vec<Came> {
        let name = name_of(source);
        let known = self.sources.iter().position(|(known, _)| known == name);
        let at = known.unwrap_or_else(|| {
            let is_full = self.sources.len() >= SOURCES;
            if !is_full {
                let name = if self.sources.len() + 1 == SOURCES {
                    OTHERS
                } else {
                    name
                };
                self.sources.push((name.to_owned(), Vec::new()));
            }
            self.sources.len() - 1
        });
        &mut self.sources[at].1
    }

    /// Makes parts twice as long.
    fn coarsen(&mut self) {
        self.step_us = self.step_us.saturating_mul(2);
        for (_, parts) in &mut self.sources {
            let pairs = parts.chunks(2).map(|pair| {
                let mut sum = Came::default();
                pair.iter().for_each(|came| sum.add(*came));
                sum
            });
            *parts = pairs.collect();
        }
    }

    fn keep(&mut self, arrival: &Arrival<'_>) {
        let least = self.largest.peek().map_or(0, |Reverse(bar)| bar.bytes);
        if self.largest.len() >= SINGLE && arrival.bytes <= least {
            return;
        }
        self.largest.push(Reverse(Bar {
            bytes: arrival.bytes,
            path: arrival.path.to_owned(),
            source: arrival.source.to_owned(),
            wanted_us: arrival.wanted_us,
            fetched_us: arrival.fetched_us,
            placed_us: arrival.placed_us,
        }));
        if self.largest.len() > SINGLE {
            self.largest.pop();
        }
    }

    /// The largest outputs in the order in which they began, and where the time begins.
    pub(crate) fn bars(&self) -> (Vec<&Bar>, i64) {
        let mut bars: Vec<&Bar> = self.largest.iter().map(|Reverse(bar)| bar).collect();
        bars.sort_by_key(|bar| (bar.begins_us(), bar.placed_us, &bar.path));
        (bars, self.first_us.unwrap_or_default())
    }

    /// By source, what came in each of so many equal parts of the time from a moment to the end.
    pub(crate) fn by_source(&self, from_us: i64, count: usize) -> Vec<(&str, Vec<Came>)> {
        let begin_us = self.begin_us.unwrap_or_default();
        let length = self.end_us.saturating_sub(from_us).max(1);
        let sources = self.sources.iter().map(|(name, parts)| {
            let mut columns = vec![Came::default(); count];
            for (number, came) in parts.iter().enumerate() {
                let at = begin_us
                    .saturating_sub(from_us)
                    .saturating_add(self.step_us.saturating_mul(number as i64));
                let column = i128::from(at.clamp(0, length - 1)) * count as i128 / i128::from(length);
                if let Some(column) = usize::try_from(column).ok().and_then(|at| columns.get_mut(at)) {
                    column.add(*came);
                }
            }
            (&**name, columns)
        });
        sources.collect()
    }
}

impl Bar {
    /// When it was asked for, or wanted if that is not known.
    pub(crate) fn begins_us(&self) -> i64 {
        self.fetched_us.map_or(self.wanted_us, |(asked, _)| asked)
    }

    /// The source as it is told apart in [`Timeline::by_source`].
    pub(crate) fn source_name(&self) -> &str {
        name_of(&self.source)
    }
}

/// The cache, where there are several, or else the way.
fn name_of(source: &str) -> &str {
    let (way, store) = split_source(source);
    store.unwrap_or(way)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival(path: &'static str, bytes: u64, source: &'static str, placed_us: i64) -> Arrival<'static> {
        Arrival {
            path,
            bytes,
            source,
            wanted_us: placed_us - 50,
            fetched_us: Some((placed_us - 40, placed_us - 10)),
            placed_us,
        }
    }

    #[test]
    fn nothing_is_lost_however_long_a_build_takes_and_memory_stays() {
        let mut timeline = Timeline::default();
        let hour = 3_600_000_000;
        for n in 0..10_000_i64 {
            let source = ["batch", "stream", "batch from grpc://a", "stream from grpc://a"][n as usize % 4];
            timeline.add(&arrival("x", n as u64, source, 1_000 + n * hour / 1_000));
        }
        assert_eq!(timeline.came.outputs, 10_000);
        let (bars, from_us) = timeline.bars();
        assert_eq!((bars.len(), from_us), (SINGLE, 950));
        assert!(bars.iter().all(|bar| bar.bytes >= 9_800));
        assert!(timeline.sources.iter().all(|(_, parts)| parts.len() <= PARTS));
        for count in [1, 7, 60, 5000] {
            let sources = timeline.by_source(from_us, count);
            let names: Vec<_> = sources.iter().map(|(name, _)| *name).collect();
            assert_eq!(names, ["batch", "stream", "grpc://a"]);
            let sum: u64 = sources
                .iter()
                .flat_map(|(_, parts)| parts)
                .map(|came| came.outputs)
                .sum();
            assert_eq!(sum, 10_000, "{count}");
            let last: u64 = sources
                .iter()
                .filter_map(|(_, parts)| parts.last())
                .map(|came| came.outputs)
                .sum();
            // Parts of the build's end are longer than the finest columns.
            assert!(last > 0 || count > 1000, "{count}");
        }
        let stages = timeline.stages;
        assert_eq!(
            (stages.queued_us, stages.fetched_us, stages.placed_us),
            (100_000, 300_000, 100_000)
        );
    }

    #[test]
    fn very_many_sources_are_counted_together() {
        let mut timeline = Timeline::default();
        for source in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "a", "j"] {
            timeline.add(&arrival("x", 1, source, 1_000));
        }
        let sources = timeline.by_source(0, 1);
        let counts: Vec<_> = sources
            .iter()
            .map(|(name, parts)| (*name, parts[0].outputs))
            .collect();
        assert_eq!(counts.len(), SOURCES);
        assert_eq!((counts[0], counts[SOURCES - 1]), (("a", 2), (OTHERS, 3)));
    }

    #[test]
    fn times_that_make_no_sense_harm_nothing() {
        let mut timeline = Timeline::default();
        assert!(timeline.by_source(0, 60).is_empty() && timeline.bars().0.is_empty());
        for placed_us in [i64::MAX, 0, -5, i64::MAX] {
            let arrival = Arrival {
                wanted_us: 10,
                fetched_us: Some((i64::MAX, i64::MIN)),
                ..arrival("x", 1, "batch", 100)
            };
            timeline.add(&Arrival { placed_us, ..arrival });
        }
        let sum: u64 = timeline.by_source(10, 60)[0]
            .1
            .iter()
            .map(|came| came.outputs)
            .sum();
        assert_eq!(sum, 4);
    }
}
