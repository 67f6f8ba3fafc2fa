//! A look at a record that changes nothing in its state directory: a copy of it is opened.

use std::{fs, io, path::Path};

use super::{
    handle::Record,
    lock::{self, Holder},
    opening::{self, Opening},
};

/// Larger records are not copied.
const LARGEST: u64 = 1 << 30;

/// What a look at a record finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Examined {
    /// There is none.
    Missing,
    /// A process has it, and so could open it.
    Held(Holder),
    /// How a copy of it opens.
    Opened(Opening),
    /// It was not opened, for this reason.
    Unknown(String),
}

/// Opens a copy of a state directory's record. `scratch` is a directory for it, which is to be removed afterwards. Blocks
/// while the store recovers.
pub(crate) fn examine(state_dir: &Path, scratch: &Path) -> Examined {
    let from = state_dir.join(opening::DIR_NAME);
    if !from.is_dir() {
        return Examined::Missing;
    }
    if let Ok(Some(holder)) = lock::holder(state_dir) {
        return Examined::Held(holder);
    }
    let mut left = LARGEST;
    let examined = match copy(&from, &scratch.join(opening::DIR_NAME), &mut left) {
        Err(error) => Examined::Unknown(format!("failed to copy {}: {error}", from.display())),
        Ok(()) => match Record::open_for_command(scratch) {
            Ok((record, opening)) => {
                record.close();
                Examined::Opened(opening)
            }
            Err(error) => Examined::Unknown(error.to_string()),
        },
    };
    // A process that has it by now may have written while it was copied.
    match lock::holder(state_dir) {
        Ok(Some(holder)) => Examined::Held(holder),
        _ => examined,
    }
}

/// Copies a directory as a store has it: files, and directories of files.
fn copy(from: &Path, to: &Path, left: &mut u64) -> io::Result<()> {
    fs::create_dir(to)?;
    for entry in from.read_dir()? {
        let entry = entry?;
        let (kind, target) = (entry.file_type()?, to.join(entry.file_name()));
        if kind.is_dir() {
            copy(&entry.path(), &target, left)?;
        } else if kind.is_file() {
            *left = left
                .checked_sub(entry.metadata()?.len())
                .ok_or_else(|| io::Error::other("it is larger than 1 GiB"))?;
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(dir: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
        let mut all: Vec<_> = fs::read_dir(dir.join(opening::DIR_NAME))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_file())
            .map(|path| (path.clone(), fs::read(path).unwrap()))
            .collect();
        all.sort();
        all
    }

    #[test]
    fn a_record_is_looked_at_and_stays_as_it_was() {
        let (dir, scratch) = (tempfile::tempdir().unwrap(), || tempfile::tempdir().unwrap());
        let look = || examine(dir.path(), scratch().path());
        assert_eq!(look(), Examined::Missing);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let (record, _) = Record::open(dir.path()).unwrap();
        let Examined::Held(holder) = look() else {
            panic!("{:?}", look())
        };
        assert_eq!(holder.pid, Some(std::process::id()));
        record.close();
        drop(record);
        let before = files(dir.path());
        assert_eq!(look(), Examined::Opened(Opening::Existing));
        assert_eq!(files(dir.path()), before);
        for (path, bytes) in &before {
            fs::write(path, vec![0x5a; bytes.len().max(100)]).unwrap();
        }
        let damaged = files(dir.path());
        let found = look();
        assert!(
            matches!(found, Examined::Opened(Opening::Quarantined { .. })),
            "{found:?}"
        );
        assert_eq!(files(dir.path()), damaged);
    }
}
