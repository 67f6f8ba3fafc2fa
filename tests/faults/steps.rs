//! Single faults: what there is, and some by chance.

use std::time::Duration;

use outhaul::{
    chance::Chance,
    embedded_cache::{BlobFault, Pretence, RequestFault, Rpc, Times},
};
use tonic::Code;

/// The same choices everywhere and for ever.
#[derive(Debug, Clone)]
pub(crate) struct Rng(Chance);

impl Rng {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(Chance::new(seed))
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.0.number()
    }

    pub(crate) const fn below(&mut self, end: u64) -> u64 {
        self.0.below(end)
    }

    pub(crate) const fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn of<T: Copy>(&mut self, all: &[T]) -> T {
        self.0.pick(all)
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
    pub(crate) const fn stalls(&self) -> bool {
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

pub(crate) fn some_output(rng: &mut Rng, outputs: usize) -> Option<usize> {
    (!rng.one_in(3)).then(|| rng.below(outputs as u64) as usize)
}

pub(crate) fn times(rng: &mut Rng) -> Times {
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

pub(crate) fn step(rng: &mut Rng, outputs: usize, retries: u32) -> Step {
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
pub(crate) fn passing_step(rng: &mut Rng, outputs: usize) -> Step {
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
