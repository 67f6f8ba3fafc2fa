//! What goes wrong in a case, and when.

use std::{fmt, time::Duration};

use outhaul::remote::Compression;
use outhaul_testkit::{
    Chance,
    cache::{BlobFault, Pretence, Times},
};

use crate::{
    build::Build,
    steps::{Step, passing_step, some_output, step, times},
};

/// A build and everything that goes wrong with it.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) seed: u64,
    pub(crate) build: Build,
    pub(crate) steps: Vec<Step>,
    /// Nothing that trying again does not help against.
    pub(crate) passes: bool,
    /// When the next build begins, while this one may still be on its way.
    pub(crate) overtaken: Option<Duration>,
    /// Whether zstd is served.
    pub(crate) zstd: bool,
    /// The server's limit for batches; 0 for none.
    pub(crate) max_batch: u64,
    /// After how long the server sends connections away.
    pub(crate) age: Option<Duration>,
    pub(crate) compression: Compression,
    pub(crate) connections: usize,
    pub(crate) retries: u32,
    pub(crate) small_limit: u64,
    pub(crate) batch_bytes: u64,
    pub(crate) batch_count: usize,
    pub(crate) bytes_in_flight: u64,
    pub(crate) large_in_flight: usize,
    numbers: Vec<usize>,
}

impl Case {
    /// A case in which anything goes wrong.
    pub(crate) fn new(seed: u64) -> Self {
        let mut case = Self::calm(seed, 0);
        let mut chance = Chance::new(!seed);
        let mut stalls = 0;
        for _ in 0..1 + chance.below(8) {
            let step = step(&mut chance, case.build.outputs.len(), case.retries);
            if step.stalls() {
                stalls += 1;
                // Each costs a time-out or some.
                if stalls > 2 {
                    continue;
                }
            }
            case.steps.push(step);
        }
        case.numbers = (0..case.steps.len()).collect();
        case.overtaken = (chance.below(4) == 0).then(|| Duration::from_millis(chance.below(50)));
        case
    }

    /// A case in which everything goes well in the end.
    pub(crate) fn passing(seed: u64) -> Self {
        let mut case = Self::calm(seed, 1);
        case.passes = true;
        let mut chance = Chance::new(!seed ^ 1);
        let outputs = case.build.outputs.len();
        for _ in 0..case.retries {
            case.steps.push(passing_step(&mut chance, outputs));
        }
        for _ in 0..chance.below(3) {
            let fault = match chance.below(6) {
                0 => BlobFault::Unasked,
                1 => BlobFault::Last,
                2 => BlobFault::ManyFrames,
                3 => BlobFault::NoTrailers,
                4 => BlobFault::Delay(Duration::from_millis(chance.below(20))),
                _ => BlobFault::Twice { wrong_first: false },
            };
            let times = times(&mut chance);
            case.steps
                .push(Step::Blob(some_output(&mut chance, outputs), fault, times));
        }
        // What is wrong once is asked for once more; only one such fault, that nothing is wrong twice.
        if chance.below(2) == 0 {
            let fault = match chance.below(8) {
                0 => BlobFault::Corrupt,
                1 => BlobFault::CorruptAt(chance.below(100_000)),
                2 => BlobFault::Resize(5),
                3 => BlobFault::DropFromBatch,
                4 => BlobFault::Twice { wrong_first: true },
                5 => BlobFault::GarbleCompression,
                6 => BlobFault::Bomb(1 << 30),
                _ => BlobFault::TrailingGarbage,
            };
            let times = Times::Once;
            case.steps
                .push(Step::Blob(some_output(&mut chance, outputs), fault, times));
        }
        if chance.below(3) == 0 {
            case.steps.push(Step::Pretend(Pretence {
                max_batch_bytes: Some(chance.pick(&[0, -1, 1, 50_000, 1 << 20, i64::MAX, i64::MIN])),
                zstd: chance.pick(&[None, Some(true), Some(false)]),
                digest_functions: (chance.below(3) == 0).then(Vec::new),
            }));
        }
        case.numbers = (0..case.steps.len()).collect();
        case
    }

    /// Nothing goes wrong yet.
    fn calm(seed: u64, kind: u64) -> Self {
        let mut chance = Chance::new(seed.wrapping_mul(2).wrapping_add(kind));
        let small_limit = chance.pick(&[10_000, 64 << 10, 1 << 20]);
        let max_batch = chance.pick(&[0, 4096, 50_000, 1 << 20, 3 << 20]);
        Self {
            seed,
            build: Build::new(&mut chance, small_limit, max_batch.max(1000)),
            steps: Vec::new(),
            passes: false,
            overtaken: None,
            zstd: chance.below(4) != 0,
            max_batch,
            age: (chance.below(5) == 0).then(|| Duration::from_millis(5 + chance.below(60))),
            compression: chance.pick(&[Compression::Always, Compression::Always, Compression::WherePaying]),
            connections: 1 + chance.below(4) as usize,
            retries: 3,
            small_limit,
            batch_bytes: chance.pick(&[10_000, 256 << 10, 1 << 20]),
            batch_count: chance.pick(&[1, 5, 4000]),
            bytes_in_flight: chance.pick(&[300 << 10, 2 << 20, 32 << 20]),
            large_in_flight: 1 + chance.below(4) as usize,
            numbers: Vec::new(),
        }
    }

    /// Leaves these steps and no others.
    pub(crate) fn keep(&mut self, numbers: &[usize]) {
        let kept = self.steps.iter().enumerate().filter(|(n, _)| numbers.contains(n));
        (self.numbers, self.steps) = kept.map(|(n, step)| (n, step.clone())).unzip();
    }

    pub(crate) fn drop_step(&mut self, at: usize) {
        self.steps.remove(at);
        self.numbers.remove(at);
    }

    /// How long the client waits for an answer: not long where it has to, long where a busy machine could take its time.
    pub(crate) fn patience(&self) -> Duration {
        if self.steps.iter().any(Step::stalls) {
            Duration::from_millis(700)
        } else {
            Duration::from_secs(10)
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let test = if self.passes {
            "faults_that_pass"
        } else {
            "random_faults"
        };
        let steps: Vec<String> = self.numbers.iter().map(usize::to_string).collect();
        writeln!(
            f,
            "repeat it with: OUTHAUL_FAULT_SEED={} OUTHAUL_FAULT_CASES=1 OUTHAUL_FAULT_STEPS={} cargo test --test \
             faults {test}",
            self.seed,
            steps.join(",")
        )?;
        for (step, number) in self.steps.iter().zip(&self.numbers) {
            writeln!(f, "  {number}: {step:?}")?;
        }
        if let Some(after) = self.overtaken {
            writeln!(f, "  overtaken after {after:?}")?;
        }
        writeln!(
            f,
            "  server: zstd {}, batches of {}, connections for {:?}",
            self.zstd, self.max_batch, self.age
        )?;
        writeln!(
            f,
            "  client: {:?}, {} connections, batches of {} bytes and {} blobs, large from {}, {} bytes and {} large in \
             flight",
            self.compression,
            self.connections,
            self.batch_bytes,
            self.batch_count,
            self.small_limit,
            self.bytes_in_flight,
            self.large_in_flight
        )?;
        for (index, output) in self.build.outputs.iter().enumerate() {
            writeln!(f, "  {index}: {} is {}", output.path, output.shall)?;
        }
        Ok(())
    }
}
