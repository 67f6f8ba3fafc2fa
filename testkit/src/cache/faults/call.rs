//! What can happen to a call: by the service, or by whatever stands before it.

use std::time::Duration;

use tonic::Code;

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestFault {
    /// It fails.
    Status(Code),
    /// It fails with RESOURCE_EXHAUSTED and a `google.rpc.RetryInfo` that asks for this patience.
    RetryAfter(Duration),
    /// It is looked at only after this time.
    Delay(Duration),
    /// It is never answered.
    Stall,
    /// A proxy answers with this HTTP status and a web page.
    Http(u16),
    /// The answer has a head with this status and nothing else, as gRPC's "Trailers-Only".
    TrailersOnly(Code),
    /// It fails with a message that must not be shown: control characters, and every header of the request.
    Babble(Code),
    /// The answer's head has this many bytes.
    HugeHead(usize),
    /// The answer's message claims to be of 4 GiB.
    AbsurdLength,
    /// The response is not a valid message.
    Garbage,
    /// The answer is good and ends without a status.
    NoTrailers,
    /// The transport resets the answer after its first bytes.
    Reset,
}

impl RequestFault {
    /// Whether the transport does it: the service never sees the call, or never sees its answer's end.
    pub(super) const fn is_on_the_wire(self) -> bool {
        !matches!(
            self,
            Self::Status(_) | Self::RetryAfter(_) | Self::Delay(_) | Self::Stall
        )
    }

    /// Its name, without numbers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Status(_) => "status of a call",
            Self::RetryAfter(_) => "retry info of a call",
            Self::Delay(_) => "late answer",
            Self::Stall => "no answer",
            Self::Http(_) => "HTTP error",
            Self::TrailersOnly(_) => "head alone",
            Self::Babble(_) => "babbling status",
            Self::HugeHead(_) => "huge head",
            Self::AbsurdLength => "absurd length",
            Self::Garbage => "garbage message",
            Self::NoTrailers => "no status",
            Self::Reset => "answer reset",
        }
    }
}

/// What the cache says of itself, where that is not the truth.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pretence {
    /// `max_batch_total_size_bytes`.
    pub max_batch_bytes: Option<i64>,
    /// Whether zstd is offered; it is taken and sent only where it is in truth.
    pub zstd: Option<bool>,
    /// Numbers of digest functions.
    pub digest_functions: Option<Vec<i32>>,
}
