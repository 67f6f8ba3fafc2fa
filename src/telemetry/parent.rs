//! The span that a build is a part of, by W3C's trace context.

use std::str::FromStr;

use anyhow::{anyhow, ensure};

use super::span::{SpanId, TraceId};

/// What `TRACEPARENT` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TraceParent {
    pub(super) trace: TraceId,
    pub(super) span: SpanId,
    /// Whether the spans of the trace are exported.
    pub(super) is_sampled: bool,
}

/// Bytes of the fields that every version has.
const LENGTH: usize = 55;

/// Bytes in lowercase hexadecimal digits.
fn bytes<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let is_lowercase = !text.bytes().any(|byte| byte.is_ascii_uppercase());
    (is_lowercase && hex::decode_to_slice(text, &mut bytes).is_ok()).then_some(bytes)
}

impl FromStr for TraceParent {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let malformed = || anyhow!("not of the form 00-TRACE-SPAN-FLAGS, in lowercase hexadecimal digits");
        let (known, more) = text.split_at_checked(LENGTH).ok_or_else(malformed)?;
        let mut fields = known.split('-');
        let mut next = || fields.next().unwrap_or_default();
        let [version] = bytes(next()).ok_or_else(malformed)?;
        let trace: TraceId = bytes(next()).ok_or_else(malformed)?;
        let span: SpanId = bytes(next()).ok_or_else(malformed)?;
        let [flags] = bytes(next()).ok_or_else(malformed)?;
        // Later versions may have more fields; 255 is invalid.
        let is_whole = more.is_empty() || version > 0 && more.starts_with('-');
        ensure!(
            is_whole && version < u8::MAX && fields.next().is_none(),
            malformed()
        );
        ensure!(trace != TraceId::default(), "its trace id is zero");
        ensure!(span != SpanId::default(), "its span id is zero");
        Ok(Self {
            trace,
            span,
            is_sampled: flags & 1 != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";

    #[test]
    fn a_parent_is_read_as_the_specification_has_it() {
        for (text, is_sampled) in [
            (format!("00-{TRACE}-{SPAN}-01"), true),
            (format!("00-{TRACE}-{SPAN}-00"), false),
            (format!("00-{TRACE}-{SPAN}-03"), true),
            (format!("cc-{TRACE}-{SPAN}-01-what-comes"), true),
        ] {
            let parent: TraceParent = text.parse().unwrap();
            assert_eq!(hex::encode(parent.trace), TRACE);
            assert_eq!(hex::encode(parent.span), SPAN);
            assert_eq!(parent.is_sampled, is_sampled, "{text}");
        }
    }

    #[test]
    fn what_is_malformed_is_no_parent() {
        for text in [
            String::new(),
            "é".repeat(55),
            format!("00-{TRACE}-{SPAN}"),
            format!("00-{TRACE}-{SPAN}-01-more"),
            format!("01-{TRACE}-{SPAN}-01more"),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{SPAN}-{TRACE}-01"),
            format!("00_{TRACE}-{SPAN}-01"),
            format!("00-{TRACE}-{SPAN}-0g"),
        ] {
            assert!(text.parse::<TraceParent>().is_err(), "{text}");
        }
    }
}
