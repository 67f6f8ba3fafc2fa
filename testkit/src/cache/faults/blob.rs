//! What can happen to a blob that is read.

use std::time::Duration;

use tonic::Code;

/// What happens to a blob that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlobFault {
    /// The size is right, the bytes are not: the first one of the answer is another.
    Corrupt,
    /// As [`BlobFault::Corrupt`], at this offset of the answer, or at its last byte if it ends before.
    CorruptAt(u64),
    /// The answer is this many bytes longer (zeros at the end), or shorter, and otherwise looks well.
    Resize(i64),
    /// The batch's answer does not mention the blob.
    DropFromBatch,
    /// The batch's answer has the blob twice: once with its bytes, once with others.
    Twice {
        /// Whether the wrong ones come first.
        wrong_first: bool,
    },
    /// The batch's answer has, beside this blob, one that was not requested.
    Unasked,
    /// The blob's answer comes after the others of its batch.
    Last,
    /// The blob's own status in a batch, the call's in a stream.
    Status(Code),
    /// RESOURCE_EXHAUSTED, with a `google.rpc.RetryInfo` that asks for this patience.
    RetryAfter(Duration),
    /// The cache does not have it any more, from now on: evicted between the question whether it is there and the read.
    Evict,
    /// Its answer, or its batch's, is sent only after this time.
    Delay(Duration),
    /// The stream breaks with UNAVAILABLE when it has sent this many bytes (before compression).
    CutAfter(u64),
    /// As [`BlobFault::CutAfter`], in the middle of a message that promises more.
    CutWithin(u64),
    /// The stream ends after this many bytes (before compression) as if that were all.
    EndAfter(u64),
    /// The stream is reset by the transport after this many bytes (before compression).
    ResetAfter(u64),
    /// The stream sends this many bytes (before compression), then nothing, and stays open.
    StallAfter(u64),
    /// The stream ends after its last byte without a status.
    NoTrailers,
    /// Where zstd is sent, it is not decodable. No effect on uncompressed answers, like those that follow.
    GarbleCompression,
    /// zstd whose end is missing.
    TruncateCompression,
    /// zstd of this many zeros, some 30,000 times smaller than they are.
    Bomb(u64),
    /// zstd in several frames, which is allowed.
    ManyFrames,
    /// Garbage follows the zstd data.
    TrailingGarbage,
    /// Before the zstd data come this many bytes of frames with nothing in them.
    EmptyFrames(u64),
}

impl BlobFault {
    pub(super) const fn applies(self, place: Transfer) -> bool {
        match self {
            Self::DropFromBatch | Self::Twice { .. } | Self::Unasked | Self::Last => place.batch,
            Self::CutAfter(_)
            | Self::CutWithin(_)
            | Self::EndAfter(_)
            | Self::ResetAfter(_)
            | Self::StallAfter(_)
            | Self::NoTrailers => !place.batch,
            Self::GarbleCompression
            | Self::TruncateCompression
            | Self::Bomb(_)
            | Self::ManyFrames
            | Self::TrailingGarbage
            | Self::EmptyFrames(_) => place.compressed,
            Self::Corrupt
            | Self::CorruptAt(_)
            | Self::Resize(_)
            | Self::Status(_)
            | Self::RetryAfter(_)
            | Self::Evict
            | Self::Delay(_) => true,
        }
    }

    /// Its name, without numbers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Corrupt | Self::CorruptAt(_) => "wrong bytes",
            Self::Resize(_) => "wrong size",
            Self::DropFromBatch => "left out of a batch",
            Self::Twice { .. } => "twice in a batch",
            Self::Unasked => "unasked in a batch",
            Self::Last => "another order in a batch",
            Self::Status(_) => "status of a blob",
            Self::RetryAfter(_) => "retry info of a blob",
            Self::Evict => "evicted before the read",
            Self::Delay(_) => "late blob",
            Self::CutAfter(_) => "stream cut",
            Self::CutWithin(_) => "stream cut within a message",
            Self::EndAfter(_) => "stream ended early",
            Self::ResetAfter(_) => "stream reset",
            Self::StallAfter(_) => "stream stalled",
            Self::NoTrailers => "stream without a status",
            Self::GarbleCompression => "zstd garbled",
            Self::TruncateCompression => "zstd truncated",
            Self::Bomb(_) => "zstd bomb",
            Self::ManyFrames => "zstd in several frames",
            Self::TrailingGarbage => "garbage after zstd",
            Self::EmptyFrames(_) => "empty zstd frames",
        }
    }
}

/// How a blob is about to be sent.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Transfer {
    /// In a batch, else as a stream.
    pub(in super::super) batch: bool,
    /// With zstd.
    pub(in super::super) compressed: bool,
}
