//! Spans as they are queued.

/// Sixteen bytes, not all zero.
pub(super) type TraceId = [u8; 16];
/// Eight bytes, not all zero.
pub(super) type SpanId = [u8; 8];

/// What is said of a span.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Value {
    /// In words.
    Text(String),
    /// A count, or a code.
    Number(i64),
    /// Yes or no.
    Flag(bool),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<i32> for Value {
    fn from(number: i32) -> Self {
        Self::Number(number.into())
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

/// Its name, and what it is.
pub(super) type Attribute = (&'static str, Value);

/// Something that took time, and has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) trace: TraceId,
    pub(super) id: SpanId,
    pub(super) parent: Option<SpanId>,
    pub(super) name: &'static str,
    /// Whether it is a request to another service.
    pub(super) is_call: bool,
    /// Nanoseconds since the epoch.
    pub(super) begin_ns: u64,
    /// The same, not before its beginning.
    pub(super) end_ns: u64,
    pub(super) attributes: Vec<Attribute>,
    /// Why it counts as failed, if it does.
    pub(super) error: Option<String>,
}
