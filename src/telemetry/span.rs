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

/// How much of a text is kept, in bytes: a build names its command and its workspace as it likes, and collectors take
/// requests of 4 MiB.
const TEXT: usize = 1024;

/// The text, or its beginning if it is too long.
pub(super) fn short(mut text: String) -> String {
    if text.len() > TEXT {
        let end = (0..=TEXT).rev().find(|&at| text.is_char_boundary(at));
        text.truncate(end.unwrap_or_default());
        text.push('…');
    }
    text
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(short(text))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_at_a_character() {
        for (text, length) in [
            ("x".repeat(TEXT), TEXT),
            ("x".repeat(TEXT + 1), TEXT + 3),
            ("é".repeat(TEXT), TEXT + 3),
            (format!("x{}", "é".repeat(TEXT)), TEXT + 2),
        ] {
            let Value::Text(kept) = Value::from(&*text) else {
                unreachable!()
            };
            assert_eq!(kept.len(), length);
            assert!(text.starts_with(kept.trim_end_matches('…')));
        }
    }
}
