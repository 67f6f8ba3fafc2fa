//! How much of a journal the upstream service has: a number in a small file beside it.
//!
//! `NAME.acked` is overwritten in place. A torn, missing or unreadable one counts as nothing: then events are sent
//! again, which upstream knows by their numbers.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use parking_lot::Mutex;

use super::format::{SUM_LEN, checksum};

pub(super) const ACKED: &str = "acked";
const NAME: [u8; 8] = *b"outhaul1";
const LEN: usize = NAME.len() + 8 + SUM_LEN;

/// A journal's cursor. Calls block, for as long as a small write does.
#[derive(Debug)]
pub(crate) struct Cursor {
    path: PathBuf,
    /// Whose acknowledgements it counts: those of another service say nothing.
    service: String,
    file: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    file: Option<File>,
    /// Only the first failure is logged; more of them say nothing new.
    failed: bool,
}

impl Cursor {
    /// The cursor of the journal file with this path, whatever its extension.
    pub(super) fn of(journal: &Path) -> Self {
        Self {
            path: journal.with_extension(ACKED),
            service: String::new(),
            file: Mutex::default(),
        }
    }

    /// Of the acknowledgements of this service. What was noted of another one counts as nothing.
    pub(crate) fn at(mut self, service: &str) -> Self {
        service.clone_into(&mut self.service);
        self
    }

    /// The highest number that upstream is known to have.
    pub(crate) fn load(&self) -> i64 {
        let mut bytes = [0; LEN];
        let read = options().open(&self.path).and_then(|file| {
            file.read_exact_at(&mut bytes, 0)?;
            Ok(())
        });
        match read {
            Ok(()) => decode(&bytes, &self.service).unwrap_or(0),
            Err(_) => 0,
        }
    }

    /// Notes that upstream has everything up to this number.
    pub(crate) fn save(&self, acked: i64) {
        let mut state = self.file.lock();
        let saved = state.write(&self.path, acked, &self.service);
        if let Err(error) = saved
            && !state.failed
        {
            state.failed = true;
            tracing::warn!(
                file = %self.path.display(), %error,
                "failed to record which events upstream has; a restart would send them again"
            );
        }
    }
}

impl State {
    fn write(&mut self, path: &Path, acked: i64, service: &str) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(options().create(true).truncate(false).open(path)?),
        };
        file.write_all_at(&encode(acked, service), 0)
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32);
    options
}

fn encode(acked: i64, service: &str) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    bytes[..8].copy_from_slice(&NAME);
    bytes[8..16].copy_from_slice(&acked.to_le_bytes());
    let sum = checksum(&[&bytes[..16], service.as_bytes()]);
    bytes[16..].copy_from_slice(&sum);
    bytes
}

fn decode(bytes: &[u8; LEN], service: &str) -> Option<i64> {
    let (body, sum) = bytes.split_last_chunk::<SUM_LEN>()?;
    let number = body.strip_prefix(&NAME)?;
    (checksum(&[body, service.as_bytes()]) == *sum).then(|| number.try_into().map(i64::from_le_bytes).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_reads_back_and_anything_torn_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cursor = Cursor::of(&dir.path().join("x.journal"));
        assert_eq!(cursor.load(), 0);
        for n in [1, 77, i64::MAX] {
            cursor.save(n);
            let again = Cursor::of(&dir.path().join("x.settled"));
            assert_eq!(again.load(), n);
            assert_eq!(again.at("grpc://another:1").load(), 0);
        }
        let path = dir.path().join("x.acked");
        let whole = std::fs::read(&path).unwrap();
        assert_eq!(whole.len(), LEN);
        for len in 0..LEN {
            std::fs::write(&path, &whole[..len]).unwrap();
            assert_eq!(cursor.load(), 0, "cut at {len}");
        }
        for at in 0..LEN {
            let mut bad = whole.clone();
            bad[at] ^= 1;
            std::fs::write(&path, bad).unwrap();
            assert_eq!(cursor.load(), 0, "flipped at {at}");
        }
    }
}
