//! Where the log goes: one line of standard error for each event, whatever is in it.

use std::io::{self, Write};

use tracing_subscriber::fmt::MakeWriter;

/// Makes writers to standard error that are given one event at a time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lines {
    /// Whether colours are meant.
    pub(super) ansi: bool,
}

/// See [`Lines`].
pub(super) struct Line<W> {
    out: W,
    ansi: bool,
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<io::Stderr>;

    fn make_writer(&'a self) -> Self::Writer {
        Line {
            out: io::stderr(),
            ansi: self.ansi,
        }
    }
}

impl<W: Write> Write for Line<W> {
    /// Takes an event with its line end.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = event.strip_suffix(b"\n").unwrap_or(event);
        let is_plain = |byte: u8| byte >= 0x20 && byte != 0x7f || byte == 0x1b && self.ansi;
        // U+0080 to U+009F are control characters as well, each of two bytes.
        let (mut shown, mut rest) = (Vec::new(), line);
        while let Some(odd) = (0..rest.len()).find(|&n| !is_plain(rest[n]) || is_c1(&rest[n..])) {
            shown.extend_from_slice(&rest[..odd]);
            let end = odd + if is_c1(&rest[odd..]) { 2 } else { 1 };
            shown.extend(rest[odd..end].escape_ascii());
            rest = &rest[end..];
        }
        if shown.is_empty() && rest.len() == line.len() {
            self.out.write_all(event)?;
            return Ok(event.len());
        }
        shown.extend_from_slice(rest);
        shown.extend_from_slice(&event[line.len()..]);
        self.out.write_all(&shown)?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Whether these bytes begin with a control character beyond ASCII. In UTF-8, 0xC2 is never inside of another character.
const fn is_c1(bytes: &[u8]) -> bool {
    matches!(bytes, [0xc2, 0x80..=0x9f, ..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(event: &str, ansi: bool) -> String {
        let mut line = Line {
            out: Vec::new(),
            ansi,
        };
        line.write_all(event.as_bytes()).unwrap();
        String::from_utf8(line.out).unwrap()
    }

    #[test]
    fn an_event_is_one_line_whatever_is_in_it() {
        assert_eq!(written("a é line\n", false), "a é line\n");
        assert_eq!(
            written("name x\n2026 ERROR forged\r\x1b[2J\n", false),
            "name x\\n2026 ERROR forged\\r\\x1b[2J\n"
        );
        assert_eq!(
            written("Stra\u{c3}\u{9f}e \u{9b}2J \u{a0}\u{85}\n", false),
            "Stra\u{c3}\\xc2\\x9fe \\xc2\\x9b2J \u{a0}\\xc2\\x85\n"
        );
        assert_eq!(
            written("\x1b[32mINFO\x1b[0m x\ny\n", true),
            "\x1b[32mINFO\x1b[0m x\\ny\n"
        );
    }
}
