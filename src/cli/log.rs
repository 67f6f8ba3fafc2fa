//! Where the log goes: one line of standard error for each event, whatever is in it.

use std::{
    borrow::Cow,
    io::{self, IsTerminal as _, Write},
};

use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

use super::exit::Failure;
use crate::printable::escaped;

/// Starts the log with a level or with directives.
pub(super) fn start_log(filter: &str, json: bool) -> Result<(), Failure> {
    // A bare level is about us, not about every frame of the libraries below.
    let directives = if filter.contains(['=', ',']) {
        filter.to_owned()
    } else {
        // What `fuser` warns of is what it was not told to answer.
        format!("warn,fuser=error,outhaul={filter}")
    };
    let filter =
        EnvFilter::try_new(directives).map_err(|e| Failure::usage(format!("--log={filter}: {e}")))?;
    let ansi = io::stderr().is_terminal();
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(Lines { ansi })
        // Standard error may be a pipe whose reader has gone: without this, its failure is a panic.
        .log_internal_errors(false)
        .with_ansi(ansi)
        .with_target(false);
    if json {
        log.json().init();
    } else {
        log.compact().init();
    }
    Ok(())
}

/// Makes writers to standard error that are given one event at a time.
#[derive(Debug, Clone, Copy)]
struct Lines {
    /// Whether colours are meant.
    ansi: bool,
}

/// See [`Lines`].
struct Line<W> {
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
        match escaped(line, self.ansi, false) {
            Cow::Borrowed(_) => self.out.write_all(event)?,
            Cow::Owned(mut shown) => {
                shown.extend_from_slice(&event[line.len()..]);
                self.out.write_all(&shown)?;
            }
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
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
            "name x\\n2026 ERROR forged\\r\\u001b[2J\n"
        );
        assert_eq!(
            written("Stra\u{c3}\u{9f}e \u{9b}2J \u{a0}\u{85}\n", false),
            "Stra\u{c3}\\u009fe \\u009b2J \u{a0}\\u0085\n"
        );
        assert_eq!(
            written("\x1b[32mINFO\x1b[0m x\ny\n", true),
            "\x1b[32mINFO\x1b[0m x\\ny\n"
        );
    }
}
