//! What the daemon takes, now and then, and how much more it may be in the end.

use std::fmt::Write as _;

/// What the daemon takes at one moment.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    /// Seconds since the beginning.
    pub at: f64,
    /// Resident memory.
    pub rss_kib: u64,
    /// Of it, what is not of files.
    pub anon_kib: u64,
    pub threads: u64,
    pub descriptors: u64,
    /// Tasks of the runtime.
    pub tasks: u64,
    /// Bytes and files in the state directory; and how many of these are journals.
    pub state_kib: u64,
    pub state_files: u64,
    pub journals: u64,
    /// Invocations that the daemon has begun.
    pub invocations: u64,
}

pub fn table(title: &str, samples: &[Sample]) -> String {
    let mut text = format!(
        "{title}\n{:>7} {:>9} {:>9} {:>8} {:>6} {:>6} {:>10} {:>7} {:>9} {:>8}\n",
        "s", "RSS KiB", "anon KiB", "threads", "fds", "tasks", "state KiB", "files", "journals", "builds"
    );
    for s in samples {
        let _ = writeln!(
            text,
            "{:>7.0} {:>9} {:>9} {:>8} {:>6} {:>6} {:>10} {:>7} {:>9} {:>8}",
            s.at,
            s.rss_kib,
            s.anon_kib,
            s.threads,
            s.descriptors,
            s.tasks,
            s.state_kib,
            s.state_files,
            s.journals,
            s.invocations
        );
    }
    text
}

/// How much more of something there may be, from the first quarter's end to the last one's.
pub struct Bound {
    what: &'static str,
    of: fn(&Sample) -> u64,
    /// In percent, and in whole pieces on top.
    percent: u64,
    plus: u64,
}

const BOUNDS: [Bound; 6] = [
    Bound {
        what: "memory (KiB)",
        of: |s| s.anon_kib,
        percent: 15,
        // What is bounded and fills up slowly: the store's cache (64 MiB), and what is remembered of 65,536 files.
        plus: 80 << 10,
    },
    Bound {
        what: "threads",
        of: |s| s.threads,
        percent: 0,
        // The runtime's pool for blocking work keeps its threads as long as there is a little to do.
        plus: 16,
    },
    Bound {
        what: "descriptors",
        of: |s| s.descriptors,
        percent: 0,
        plus: 16,
    },
    Bound {
        what: "tasks",
        of: |s| s.tasks,
        percent: 0,
        plus: 16,
    },
    Bound {
        what: "state directory (KiB)",
        of: |s| s.state_kib,
        percent: 25,
        // The store is rewritten from there on.
        plus: 64 << 10,
    },
    Bound {
        what: "files in the state directory",
        of: |s| s.state_files,
        percent: 25,
        // What is kept, of some 50 s, depends on how many builds the machine makes in that time.
        plus: 3000,
    },
];

/// How much memory the builds of the last quarter may have left behind, each, and on top of it all: a leak shows here
/// whatever else fills up, if there are enough builds.
const EACH_KIB: u64 = 3;
const NOISE_KIB: u64 = 12 << 10;
/// Of fewer builds nothing can be said: the allocator's own ups and downs are larger.
pub const ENOUGH: u64 = 1000;

/// What was left behind by the builds between two quiet moments, if it is too much.
pub fn leak(before: &Sample, after: &Sample) -> Option<String> {
    let builds = after.invocations.saturating_sub(before.invocations);
    let grew = after.anon_kib.saturating_sub(before.anon_kib);
    let most = builds * EACH_KIB + NOISE_KIB;
    (builds >= ENOUGH && grew > most)
        .then(|| format!("{builds} builds have left {grew} KiB of memory behind, beyond {most}"))
}

impl Bound {
    /// What has grown by more than it may.
    pub fn check(first: &Sample, last: &Sample) -> Vec<String> {
        BOUNDS
            .iter()
            .filter_map(|bound| {
                let (before, after) = ((bound.of)(first), (bound.of)(last));
                let most = before + before * bound.percent / 100 + bound.plus;
                (after > most).then(|| format!("{} grew from {before} to {after}, beyond {most}", bound.what))
            })
            .collect()
    }
}
