//! What goes wrong in a case, and when.

use std::{fmt, time::Duration};

use outhaul::{
    embedded_cache::{BlobFault, Pretence, RequestFault, Rpc, Times},
    remote::Compression,
};
use tonic::Code;

use crate::build::Build;

/// SplitMix64: the same numbers everywhere and for ever.
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) const fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    const fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

/// One thing that goes wrong.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// With the blob of one output, or any.
    Blob(Option<usize>, BlobFault, Times),
    /// With one kind of call, or any.
    Call(Option<Rpc>, RequestFault, Times),
    /// The cache says something else of itself.
    Pretend(Pretence),
    /// All connections break after so long.
    Sever(Duration),
    /// All connections die without a word after so long.
    Kill(Duration),
    /// So many connections are dead from the beginning.
    Dead(u32),
}

/// The names of all faults that there are, as [`Step::name`] gives them.
pub(crate) const NAMES: [&str; 38] = [
    "HTTP error",
    "absurd length",
    "another order in a batch",
    "answer reset",
    "babbling status",
    "connections died",
    "connections severed",
    "dead connection accepted",
    "empty zstd frames",
    "evicted before the read",
    "garbage behind zstd",
    "garbage message",
    "head alone",
    "huge head",
    "late answer",
    "late blob",
    "left out of a batch",
    "no answer",
    "no status",
    "pretence",
    "retry info of a blob",
    "retry info of a call",
    "status of a blob",
    "status of a call",
    "stream cut",
    "stream cut within a message",
    "stream ended early",
    "stream reset",
    "stream stalled",
    "stream without a status",
    "twice in a batch",
    "unasked in a batch",
    "wrong bytes",
    "wrong size",
    "zstd bomb",
    "zstd garbled",
    "zstd in several frames",
    "zstd truncated",
];

impl Step {
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Blob(_, fault, _) => fault.name(),
            Self::Call(_, fault, _) => fault.name(),
            Self::Pretend(_) => "pretence",
            Self::Sever(_) => "connections severed",
            Self::Kill(_) => "connections died",
            Self::Dead(_) => "dead connection accepted",
        }
    }

    /// Whether somebody has to wait for a time-out.
    const fn stalls(&self) -> bool {
        matches!(
            self,
            Self::Kill(_)
                | Self::Dead(_)
                | Self::Call(_, RequestFault::Stall, _)
                | Self::Blob(_, BlobFault::StallAfter(_), _)
        )
    }

    /// Whether the cache may say that it does not have a blob which it has.
    pub(crate) fn hides(&self) -> bool {
        matches!(
            self,
            Self::Blob(_, BlobFault::Evict | BlobFault::Status(Code::NotFound), _)
                | Self::Call(
                    _,
                    RequestFault::Status(Code::NotFound)
                        | RequestFault::TrailersOnly(Code::NotFound)
                        | RequestFault::Babble(Code::NotFound),
                    _
                )
        )
    }
}

/// A build and everything that goes wrong with it.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) seed: u64,
    pub(crate) build: Build,
    pub(crate) steps: Vec<Step>,
    /// Nothing that trying again does not help against.
    pub(crate) passes: bool,
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
        let mut rng = Rng::new(!seed);
        let mut stalls = 0;
        for _ in 0..1 + rng.below(8) {
            let step = step(&mut rng, case.build.outputs.len(), case.retries);
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
        case
    }

    /// A case in which everything goes well in the end.
    pub(crate) fn passing(seed: u64) -> Self {
        let mut case = Self::calm(seed, 1);
        case.passes = true;
        let mut rng = Rng::new(!seed ^ 1);
        let outputs = case.build.outputs.len();
        for _ in 0..case.retries {
            case.steps.push(passing_step(&mut rng, outputs));
        }
        for _ in 0..rng.below(3) {
            let fault = match rng.below(6) {
                0 => BlobFault::Unasked,
                1 => BlobFault::Last,
                2 => BlobFault::ManyFrames,
                3 => BlobFault::NoTrailers,
                4 => BlobFault::Delay(Duration::from_millis(rng.below(20))),
                _ => BlobFault::Twice { wrong_first: false },
            };
            let times = times(&mut rng);
            case.steps
                .push(Step::Blob(some_output(&mut rng, outputs), fault, times));
        }
        // What is wrong once is asked for once more; only one such fault, that nothing is wrong twice.
        if rng.one_in(2) {
            let fault = match rng.below(8) {
                0 => BlobFault::Corrupt,
                1 => BlobFault::CorruptAt(rng.below(100_000)),
                2 => BlobFault::Resize(5),
                3 => BlobFault::DropFromBatch,
                4 => BlobFault::Twice { wrong_first: true },
                5 => BlobFault::GarbleCompression,
                6 => BlobFault::Bomb(1 << 30),
                _ => BlobFault::TrailingGarbage,
            };
            let times = Times::Once;
            case.steps
                .push(Step::Blob(some_output(&mut rng, outputs), fault, times));
        }
        if rng.one_in(3) {
            case.steps.push(Step::Pretend(Pretence {
                max_batch_bytes: Some(rng.of(&[0, -1, 1, 50_000, 1 << 20, i64::MAX, i64::MIN])),
                zstd: rng.of(&[None, Some(true), Some(false)]),
                digest_functions: rng.one_in(3).then(Vec::new),
            }));
        }
        case.numbers = (0..case.steps.len()).collect();
        case
    }

    /// Nothing goes wrong yet.
    fn calm(seed: u64, kind: u64) -> Self {
        let mut rng = Rng::new(seed.wrapping_mul(2).wrapping_add(kind));
        let small_limit = rng.of(&[10_000, 64 << 10, 1 << 20]);
        let max_batch = rng.of(&[0, 4096, 50_000, 1 << 20, 3 << 20]);
        Self {
            seed,
            build: Build::new(&mut rng, small_limit, max_batch.max(1000)),
            steps: Vec::new(),
            passes: false,
            zstd: !rng.one_in(4),
            max_batch,
            age: rng.one_in(5).then(|| Duration::from_millis(5 + rng.below(60))),
            compression: rng.of(&[Compression::Always, Compression::Always, Compression::WherePaying]),
            connections: 1 + rng.below(4) as usize,
            retries: 3,
            small_limit,
            batch_bytes: rng.of(&[10_000, 256 << 10, 1 << 20]),
            batch_count: rng.of(&[1, 5, 4000]),
            bytes_in_flight: rng.of(&[300 << 10, 2 << 20, 32 << 20]),
            large_in_flight: 1 + rng.below(4) as usize,
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

fn some_output(rng: &mut Rng, outputs: usize) -> Option<usize> {
    (!rng.one_in(3)).then(|| rng.below(outputs as u64) as usize)
}

fn times(rng: &mut Rng) -> Times {
    match rng.below(5) {
        0 => Times::Once,
        1 | 2 => Times::First(1 + rng.below(6) as u32),
        3 => Times::Random {
            seed: rng.next(),
            per_mille: 50 + rng.below(600) as u32,
            most: 100,
        },
        _ => Times::Always,
    }
}

/// An offset of each class: before everything, the first byte, somewhere, the borders of messages and pieces, around the
/// end.
fn offset(rng: &mut Rng) -> u64 {
    let some = rng.below(2_000_000);
    let border = rng.of(&[100, 16 << 10, 256 << 10, 1 << 20]) + rng.below(3) - 1;
    rng.of(&[0, 1, some, some / 100, border, 10_000 - 1, 10_000])
}

fn code(rng: &mut Rng) -> Code {
    // Including OK, where it is none.
    Code::from_i32(rng.below(17) as i32)
}

fn step(rng: &mut Rng, outputs: usize, retries: u32) -> Step {
    match rng.below(12) {
        0..=6 => {
            let fault = blob_fault(rng);
            let times = match fault {
                BlobFault::StallAfter(_) => Times::Once,
                _ => times(rng),
            };
            Step::Blob(some_output(rng, outputs), fault, times)
        }
        7..=9 => {
            let fault = call_fault(rng);
            let times = match fault {
                RequestFault::Stall => Times::First(1 + rng.below(u64::from(retries)) as u32),
                _ => times(rng),
            };
            let rpc = rng.of(&[
                None,
                Some(Rpc::Capabilities),
                Some(Rpc::BatchRead),
                Some(Rpc::BatchRead),
                Some(Rpc::StreamRead),
                Some(Rpc::StreamRead),
            ]);
            Step::Call(rpc, fault, times)
        }
        10 => Step::Pretend(Pretence {
            max_batch_bytes: Some(rng.of(&[0, -1, 1, 4096, 50_000, 1 << 20, i64::MAX, i64::MIN])),
            zstd: rng.of(&[None, Some(true), Some(false)]),
            digest_functions: match rng.below(4) {
                0 => Some(Vec::new()),
                1 => Some(vec![2, -7, 9999]),
                _ => None,
            },
        }),
        _ => {
            let when = Duration::from_millis(rng.below(60));
            match rng.below(3) {
                0 => Step::Sever(when),
                1 => Step::Kill(when),
                _ => Step::Dead(1 + rng.below(2) as u32),
            }
        }
    }
}

fn blob_fault(rng: &mut Rng) -> BlobFault {
    match rng.below(23) {
        0 => BlobFault::Corrupt,
        1 => BlobFault::CorruptAt(offset(rng)),
        2 => {
            let by = rng.of(&[1, -1, 100, -100, 100_000, -100_000]);
            BlobFault::Resize(by)
        }
        3 => BlobFault::DropFromBatch,
        4 => BlobFault::Twice {
            wrong_first: rng.one_in(2),
        },
        5 => BlobFault::Unasked,
        6 => BlobFault::Last,
        7 | 8 => BlobFault::Status(code(rng)),
        9 => BlobFault::RetryAfter(patience(rng)),
        10 => BlobFault::Evict,
        11 => BlobFault::Delay(Duration::from_millis(rng.below(30))),
        12 => BlobFault::CutAfter(offset(rng)),
        13 => BlobFault::CutWithin(offset(rng)),
        14 => BlobFault::EndAfter(offset(rng)),
        15 => BlobFault::ResetAfter(offset(rng)),
        16 => BlobFault::StallAfter(offset(rng)),
        17 => BlobFault::NoTrailers,
        18 => BlobFault::GarbleCompression,
        19 => BlobFault::TruncateCompression,
        20 => BlobFault::Bomb(rng.of(&[1, 100_000, 1 << 30])),
        21 => rng.of(&[BlobFault::ManyFrames, BlobFault::TrailingGarbage]),
        _ => BlobFault::EmptyFrames(rng.of(&[9, 100_000, 8 << 20])),
    }
}

/// Some of what servers ask for, and some of what none should.
fn patience(rng: &mut Rng) -> Duration {
    rng.of(&[
        Duration::ZERO,
        Duration::from_millis(10),
        Duration::from_secs(2),
        Duration::from_secs(86_400 * 365),
    ])
}

fn call_fault(rng: &mut Rng) -> RequestFault {
    match rng.below(13) {
        0 | 1 => RequestFault::Status(code(rng)),
        2 => RequestFault::RetryAfter(patience(rng)),
        3 => RequestFault::Delay(Duration::from_millis(rng.below(30))),
        4 => RequestFault::Stall,
        5 => RequestFault::Http(rng.of(&[200, 301, 400, 401, 403, 404, 429, 500, 502, 503, 504])),
        6 => RequestFault::TrailersOnly(code(rng)),
        7 => RequestFault::Babble(code(rng)),
        8 => RequestFault::HugeHead(rng.of(&[10_000, 100_000, 1 << 20])),
        9 => RequestFault::AbsurdLength,
        10 => RequestFault::Garbage,
        11 => RequestFault::NoTrailers,
        _ => RequestFault::Reset,
    }
}

/// One failure that trying once more helps against.
fn passing_step(rng: &mut Rng, outputs: usize) -> Step {
    let passing = [
        Code::Unavailable,
        Code::Aborted,
        Code::Internal,
        Code::Unknown,
        Code::Cancelled,
        Code::DeadlineExceeded,
    ];
    match rng.below(3) {
        0 => Step::Sever(Duration::from_millis(rng.below(40))),
        1 => {
            let fault = match rng.below(7) {
                0 => BlobFault::Status(rng.of(&passing)),
                1 => BlobFault::RetryAfter(patience(rng)),
                2 => BlobFault::CutAfter(offset(rng)),
                3 => BlobFault::CutWithin(offset(rng)),
                4 => BlobFault::EndAfter(offset(rng)),
                5 => BlobFault::ResetAfter(offset(rng)),
                _ => BlobFault::Delay(Duration::from_millis(rng.below(30))),
            };
            Step::Blob(some_output(rng, outputs), fault, Times::Once)
        }
        _ => {
            let fault = match rng.below(7) {
                0 => RequestFault::Status(rng.of(&passing)),
                1 => RequestFault::RetryAfter(patience(rng)),
                2 => RequestFault::Http(rng.of(&[429, 500, 502, 503, 504])),
                3 => RequestFault::TrailersOnly(rng.of(&passing)),
                4 => RequestFault::Babble(rng.of(&passing)),
                5 => RequestFault::NoTrailers,
                _ => RequestFault::Reset,
            };
            Step::Call(None, fault, Times::Once)
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
