//! Single faults: what there is, and some by chance.

use std::time::Duration;

use outhaul_testkit::{
    Chance,
    cache::{BlobFault, Pretence, RequestFault, Rpc, Times},
};
use tonic::Code;

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
    /// This many connections are dead from the beginning.
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
    "garbage after zstd",
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

pub(crate) fn some_output(chance: &mut Chance, outputs: usize) -> Option<usize> {
    (chance.below(3) != 0).then(|| chance.below(outputs as u64) as usize)
}

pub(crate) fn times(chance: &mut Chance) -> Times {
    match chance.below(5) {
        0 => Times::Once,
        1 | 2 => Times::First(1 + chance.below(6) as u32),
        3 => Times::Random {
            seed: chance.number(),
            per_mille: 50 + chance.below(600) as u32,
            most: 100,
        },
        _ => Times::Always,
    }
}

/// An offset of each class: before everything, the first byte, somewhere, the borders of messages and pieces, around the
/// end.
fn offset(chance: &mut Chance) -> u64 {
    let some = chance.below(2_000_000);
    let border = chance.pick(&[100, 16 << 10, 256 << 10, 1 << 20]) + chance.below(3) - 1;
    chance.pick(&[0, 1, some, some / 100, border, 10_000 - 1, 10_000])
}

fn code(chance: &mut Chance) -> Code {
    // Including OK where it is not an error.
    Code::from_i32(chance.below(17) as i32)
}

pub(crate) fn step(chance: &mut Chance, outputs: usize, retries: u32) -> Step {
    match chance.below(12) {
        0..=6 => {
            let fault = blob_fault(chance);
            let times = match fault {
                BlobFault::StallAfter(_) => Times::Once,
                _ => times(chance),
            };
            Step::Blob(some_output(chance, outputs), fault, times)
        }
        7..=9 => {
            let fault = call_fault(chance);
            let times = match fault {
                RequestFault::Stall => Times::First(1 + chance.below(u64::from(retries)) as u32),
                _ => times(chance),
            };
            let rpc = chance.pick(&[
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
            max_batch_bytes: Some(chance.pick(&[0, -1, 1, 4096, 50_000, 1 << 20, i64::MAX, i64::MIN])),
            zstd: chance.pick(&[None, Some(true), Some(false)]),
            digest_functions: match chance.below(4) {
                0 => Some(Vec::new()),
                1 => Some(vec![2, -7, 9999]),
                _ => None,
            },
        }),
        _ => {
            let when = Duration::from_millis(chance.below(60));
            match chance.below(3) {
                0 => Step::Sever(when),
                1 => Step::Kill(when),
                _ => Step::Dead(1 + chance.below(2) as u32),
            }
        }
    }
}

fn blob_fault(chance: &mut Chance) -> BlobFault {
    match chance.below(23) {
        0 => BlobFault::Corrupt,
        1 => BlobFault::CorruptAt(offset(chance)),
        2 => {
            let by = chance.pick(&[1, -1, 100, -100, 100_000, -100_000]);
            BlobFault::Resize(by)
        }
        3 => BlobFault::DropFromBatch,
        4 => BlobFault::Twice {
            wrong_first: chance.below(2) == 0,
        },
        5 => BlobFault::Unasked,
        6 => BlobFault::Last,
        7 | 8 => BlobFault::Status(code(chance)),
        9 => BlobFault::RetryAfter(patience(chance)),
        10 => BlobFault::Evict,
        11 => BlobFault::Delay(Duration::from_millis(chance.below(30))),
        12 => BlobFault::CutAfter(offset(chance)),
        13 => BlobFault::CutWithin(offset(chance)),
        14 => BlobFault::EndAfter(offset(chance)),
        15 => BlobFault::ResetAfter(offset(chance)),
        16 => BlobFault::StallAfter(offset(chance)),
        17 => BlobFault::NoTrailers,
        18 => BlobFault::GarbleCompression,
        19 => BlobFault::TruncateCompression,
        20 => BlobFault::Bomb(chance.pick(&[1, 100_000, 1 << 30])),
        21 => chance.pick(&[BlobFault::ManyFrames, BlobFault::TrailingGarbage]),
        _ => BlobFault::EmptyFrames(chance.pick(&[9, 100_000, 8 << 20])),
    }
}

/// Some of what servers ask for, and some of what none should.
fn patience(chance: &mut Chance) -> Duration {
    chance.pick(&[
        Duration::ZERO,
        Duration::from_millis(10),
        Duration::from_secs(2),
        Duration::from_secs(86_400 * 365),
    ])
}

fn call_fault(chance: &mut Chance) -> RequestFault {
    match chance.below(13) {
        0 | 1 => RequestFault::Status(code(chance)),
        2 => RequestFault::RetryAfter(patience(chance)),
        3 => RequestFault::Delay(Duration::from_millis(chance.below(30))),
        4 => RequestFault::Stall,
        5 => RequestFault::Http(chance.pick(&[200, 301, 400, 401, 403, 404, 429, 500, 502, 503, 504])),
        6 => RequestFault::TrailersOnly(code(chance)),
        7 => RequestFault::Babble(code(chance)),
        8 => RequestFault::HugeHead(chance.pick(&[10_000, 100_000, 1 << 20])),
        9 => RequestFault::AbsurdLength,
        10 => RequestFault::Garbage,
        11 => RequestFault::NoTrailers,
        _ => RequestFault::Reset,
    }
}

/// One failure that trying once more helps against.
pub(crate) fn passing_step(chance: &mut Chance, outputs: usize) -> Step {
    let passing = [
        Code::Unavailable,
        Code::Aborted,
        Code::Internal,
        Code::Unknown,
        Code::Cancelled,
        Code::DeadlineExceeded,
    ];
    match chance.below(3) {
        0 => Step::Sever(Duration::from_millis(chance.below(40))),
        1 => {
            let fault = match chance.below(7) {
                0 => BlobFault::Status(chance.pick(&passing)),
                1 => BlobFault::RetryAfter(patience(chance)),
                2 => BlobFault::CutAfter(offset(chance)),
                3 => BlobFault::CutWithin(offset(chance)),
                4 => BlobFault::EndAfter(offset(chance)),
                5 => BlobFault::ResetAfter(offset(chance)),
                _ => BlobFault::Delay(Duration::from_millis(chance.below(30))),
            };
            Step::Blob(some_output(chance, outputs), fault, Times::Once)
        }
        _ => {
            let fault = match chance.below(7) {
                0 => RequestFault::Status(chance.pick(&passing)),
                1 => RequestFault::RetryAfter(patience(chance)),
                2 => RequestFault::Http(chance.pick(&[429, 500, 502, 503, 504])),
                3 => RequestFault::TrailersOnly(chance.pick(&passing)),
                4 => RequestFault::Babble(chance.pick(&passing)),
                5 => RequestFault::NoTrailers,
                _ => RequestFault::Reset,
            };
            Step::Call(None, fault, Times::Once)
        }
    }
}
