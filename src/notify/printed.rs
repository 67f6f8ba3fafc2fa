//! What a command prints, on its way into the log.

use std::{io, time::Duration};

use tokio::net::unix::pipe::Receiver;

use super::document::Document;
use crate::printable::clipped;

/// Bytes of what one command prints that are logged. It may be verbose, and the log is for all.
const LOGGED: usize = 64 << 10;
/// Bytes of a line.
const LINE: usize = 1 << 10;

/// The end of a pipe into which a command prints.
pub(super) struct Printed {
    pipe: Receiver,
    invocation: String,
    /// The beginning of a line.
    line: Vec<u8>,
    logged: usize,
    left_out: u64,
}

impl Printed {
    /// And the end for the command.
    pub(super) fn pipe(document: &Document) -> io::Result<(Self, io::PipeWriter)> {
        let (reader, writer) = io::pipe()?;
        let printed = Self {
            pipe: Receiver::from_owned_fd(reader.into())?,
            invocation: document.invocation_id.clone(),
            line: Vec::new(),
            logged: 0,
            left_out: 0,
        };
        Ok((printed, writer))
    }

    /// Reads until no process can print any more.
    pub(super) async fn read(&mut self) {
        while self.pipe.readable().await.is_ok() && self.take() {}
    }

    /// Takes what is there; whether more may come.
    fn take(&mut self) -> bool {
        let mut piece = [0; 8 << 10];
        match self.pipe.try_read(&mut piece) {
            Ok(0) => false,
            Ok(n) => {
                self.log(piece.get(..n).unwrap_or_default());
                true
            }
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        }
    }

    fn log(&mut self, piece: &[u8]) {
        let room = LOGGED - self.logged;
        let (taken, over) = piece.split_at(piece.len().min(room));
        self.logged += taken.len();
        self.left_out += over.len() as u64;
        for part in taken.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            if self.line.ends_with(b"\n") || self.line.len() >= LINE {
                self.log_line();
            }
        }
    }

    fn log_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end_matches(['\n', '\r']);
        if !text.is_empty() {
            tracing::info!(invocation = %self.invocation, "--on-settled prints: {}", clipped(text, LINE));
        }
    }

    /// The command has ended. Processes that it left running may go on printing for a while, which is not read.
    pub(super) fn end(mut self, rest: Duration) {
        // As much as a pipe holds, and no more: others may fill it without end.
        for _ in 0..64 {
            let before = self.logged + usize::try_from(self.left_out).unwrap_or(usize::MAX);
            if !self.take() || before == self.logged + usize::try_from(self.left_out).unwrap_or(usize::MAX) {
                break;
            }
        }
        self.log_line();
        if self.left_out > 0 {
            tracing::warn!(
                invocation = %self.invocation, "--on-settled prints more than {LOGGED} bytes: omitted {}", self.left_out
            );
        }
        self.logged = LOGGED;
        tokio::spawn(async move { tokio::time::timeout(rest, self.read()).await });
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::{super::document::Event, *};

    #[tokio::test]
    async fn what_is_printed_beyond_the_limit_is_read_and_counted_but_not_logged() {
        let document = Document {
            event: Event::InvocationSettled,
            invocation_id: "i".to_owned(),
            delivery: "d".to_owned(),
            body: "{}".into(),
        };
        let (mut printed, mut writer) = Printed::pipe(&document).unwrap();
        // Far more than the pipe holds.
        let printing = std::thread::spawn(move || writer.write_all("much\n".repeat(1 << 16).as_bytes()));
        printed.read().await;
        printing.join().unwrap().unwrap();
        let printed = (printed.logged, printed.left_out);
        assert_eq!(printed, (LOGGED, (5 << 16) - LOGGED as u64));
    }
}
