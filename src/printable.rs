//! Texts that others chose, on their way to a terminal or into a line of a log.
//!
//! A file's name may hold line ends, or what moves a terminal's cursor and changes its title. Nobody shall make a line
//! look like one of ours.

use std::{borrow::Cow, fmt::Write as _};

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
            // Writing to a string can't fail.
            let _ = write!(shown, "{}", c.escape_default());
        }
    }
    Cow::Owned(shown)
}

/// The same of no more than so many bytes, and what is behind them left out.
pub(crate) fn clipped(text: &str, most: usize) -> Cow<'_, str> {
    if text.len() <= most {
        return printable(text);
    }
    let end = (0..=most).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    Cow::Owned(format!("{}…", printable(&text[..end])))
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

    proptest! {
        #[test]
        fn nothing_that_is_shown_moves_a_cursor(text in ".{0,40}", most in 0..60_usize) {
            for shown in [printable(&text), clipped(&text, most)] {
                prop_assert!(shown.chars().all(is_plain));
            }
        }
    }
}
