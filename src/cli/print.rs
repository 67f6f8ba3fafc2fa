//! Standard output and error for what people and programs read, whatever names and messages hold.

use std::{
    fmt,
    io::{self, Stderr, StdoutLock, Write},
};

use crate::printable::escaped;

/// Escapes what a terminal would not just show. What is given to it by `write!` is written at once.
pub(super) struct Shown<W>(W);

/// Standard output, for all but files' bytes.
pub(super) fn out() -> Shown<StdoutLock<'static>> {
    Shown(io::stdout().lock())
}

/// Standard error.
pub(super) fn err() -> Shown<Stderr> {
    Shown(io::stderr())
}

impl<W: Write> Write for Shown<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write_all(&escaped(bytes, false, true))?;
        Ok(bytes.len())
    }

    fn write_fmt(&mut self, text: fmt::Arguments<'_>) -> io::Result<()> {
        self.write_all(text.to_string().as_bytes())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
