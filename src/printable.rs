//! Escapes untrusted text for terminals and log lines.
//!
//! A file name may contain line breaks, or escape sequences that move the cursor or change the title. Untrusted text
//! must not be able to forge a line of output.

use std::{borrow::Cow, error::Error, fmt::Write as _, io::Write as _};

/// Whether a character is shown as what it is. Those that change the direction of writing reorder what stands around
/// them.
pub(crate) fn is_plain(c: char) -> bool {
    !c.is_control()
        && !matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// The text with everything escaped that is not just shown: `\n`, `\u{1b}`.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    if text.chars().all(is_plain) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_plain(c) {
            shown.push(c);
        } else {
            // Writing to a string cannot fail.
            let _ = write!(shown, "{}", c.escape_default());
        }
    }
    Cow::Owned(shown)
}

/// The same, truncated to this many bytes.
pub(crate) fn clipped(text: &str, most: usize) -> Cow<'_, str> {
    if text.len() <= most {
        return printable(text);
    }
    let end = (0..=most).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    Cow::Owned(format!("{}…", printable(&text[..end])))
}

/// An error with its causes: that of a connection alone is often just "transport error".
pub(crate) fn with_causes(error: &dyn Error) -> String {
    and_causes(error.to_string(), error.source())
}

/// A message and its causes, leaving out those whose text it has already.
pub(crate) fn and_causes(mut text: String, mut source: Option<&(dyn Error + 'static)>) -> String {
    while let Some(cause) = source {
        let more = cause.to_string();
        if text.is_empty() {
            text = more;
        } else if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}

/// Whole pieces of output with everything escaped that is not just shown, as JSON has it, so that JSON stays what it
/// is: the last look at what goes to a terminal or a log, no matter who forgot [`printable`]. Colours (`ESC [ … m`) and
/// line ends may be let through.
pub(crate) fn escaped(bytes: &[u8], colours: bool, line_ends: bool) -> Cow<'_, [u8]> {
    if bytes.iter().all(|byte| (0x20..0x7f).contains(byte)) {
        return Cow::Borrowed(bytes);
    }
    let mut shown = Vec::with_capacity(bytes.len() + 16);
    for chunk in bytes.utf8_chunks() {
        let mut rest = chunk.valid();
        while let Some(c) = rest.chars().next() {
            let mut taken = c.len_utf8();
            if c == '\u{1b}' && colours {
                taken = colour(rest).unwrap_or(taken);
            }
            let (piece, after) = rest.split_at(taken);
            rest = after;
            // Writing to a vector cannot fail.
            let _ = match c {
                _ if is_plain(c) || taken > c.len_utf8() || c == '\n' && line_ends => {
                    shown.write_all(piece.as_bytes())
                }
                '\n' => shown.write_all(b"\\n"),
                '\r' => shown.write_all(b"\\r"),
                '\t' => shown.write_all(b"\\t"),
                c => write!(shown, "\\u{:04x}", u32::from(c)),
            };
        }
        for byte in chunk.invalid() {
            let _ = write!(shown, "\\x{byte:02x}");
        }
    }
    Cow::Owned(shown)
}

/// The length of a sequence that sets a colour, at the beginning of a text.
fn colour(text: &str) -> Option<usize> {
    let parameters = text.strip_prefix("\u{1b}[")?;
    let end = parameters.find(|c: char| !c.is_ascii_digit() && c != ';')?;
    parameters.get(end..)?.starts_with('m').then_some(2 + end + 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_plain_stays_and_what_is_not_is_seen() {
        for text in ["bazel-out/k8/bin/a b/é/日本.txt", "", "a\\b \"c\""] {
            assert!(matches!(printable(text), Cow::Borrowed(same) if same == text));
        }
        assert_eq!(
            printable("a\nb\r\t\u{1b}[2J\u{7}\u{9b}"),
            "a\\nb\\r\\t\\u{1b}[2J\\u{7}\\u{9b}"
        );
        assert_eq!(printable("x\u{202e}txt.exe"), "x\\u{202e}txt.exe");
        assert_eq!(clipped("aé\n", 2), "a…");
        assert_eq!(clipped("aé\n", 9), "aé\\n");
    }

    #[test]
    fn what_goes_out_is_escaped_as_json_has_it() {
        let out = |text: &str, colours, line_ends| {
            String::from_utf8(escaped(text.as_bytes(), colours, line_ends).into_owned()).unwrap()
        };
        assert_eq!(out("a é\n", false, true), "a é\n");
        assert_eq!(out("a\nb\r\t", false, false), "a\\nb\\r\\t");
        assert_eq!(
            out("\u{1b}[31mx\u{1b}[2J\u{1b}", true, false),
            "\u{1b}[31mx\\u001b[2J\\u001b"
        );
        assert_eq!(
            out("\u{1b}[31m\u{9b}\u{202e}\u{7f}", false, false),
            "\\u001b[31m\\u009b\\u202e\\u007f"
        );
        assert_eq!(&*escaped(b"a\xc2\xff", false, false), b"a\\xc2\\xff");
        let text = "a\u{1b}\u{9b}\u{202e}\u{7f}\n日";
        let json = serde_json::json!({ "x": text }).to_string();
        let shown: serde_json::Value =
            serde_json::from_slice(&escaped(json.as_bytes(), false, true)).unwrap();
        assert_eq!(shown["x"], text);
    }

    proptest! {
        #[test]
        fn nothing_that_goes_out_moves_a_cursor(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let shown = String::from_utf8(escaped(&bytes, false, false).into_owned()).unwrap();
            prop_assert!(shown.chars().all(is_plain));
        }

        #[test]
        fn nothing_that_is_shown_moves_a_cursor(text in ".{0,40}", most in 0..60_usize) {
            for shown in [printable(&text), clipped(&text, most)] {
                prop_assert!(shown.chars().all(is_plain));
            }
        }
    }
}
