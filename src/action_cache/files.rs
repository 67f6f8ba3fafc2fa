//! The directory, and reading it while somebody may write.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _},
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::{
    fs::{self, AtFlags, Dir, FileType, Mode, OFlags},
    io::Errno,
};

use super::{
    ActionCacheError, FORMATS,
    cursor::Fault,
    facts::{self, Actions, Facts, Files},
    frame, index,
};
use crate::{
    digest::DigestFunction,
    open_files::{GUARDED, patient},
};

/// Below the output base.
const DIRECTORY: &str = "action_cache";
/// Bytes of one file. One with a million actions is about as large.
const LARGEST: u64 = 512 << 20;
/// How often it is tried, and how long is waited in between: writing takes milliseconds.
const TRIES: usize = 5;
const PAUSE: Duration = Duration::from_millis(20);

/// The files as they were when they were read.
#[derive(Debug, Clone)]
pub(crate) struct State {
    files: Box<Inodes>,
    actions: Actions,
    /// Of the digests.
    function: DigestFunction,
}

/// The files at one moment. Two that are equal are of the same bytes.
type Inodes = [Option<Inode>; 4];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Inode {
    device: u64,
    inode: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

/// What came of reading.
#[derive(Debug)]
pub(crate) enum Reading {
    /// There is no action cache.
    Absent,
    /// It says the same as before of every output.
    Unchanged,
    /// It has these facts: all, or those that it has in addition to what was known.
    Read(Facts, State),
}

/// Reads the action cache of an output base, unless it is unchanged. `function` is the digest function of the
/// build. Blocks on the file system.
///
/// # Errors
/// When it is somebody else's, too large, of a format that is not known, damaged, or written all the time.
pub(crate) fn read(
    output_base: &Path,
    function: DigestFunction,
    known: Option<&State>,
) -> Result<Reading, ActionCacheError> {
    let path = output_base.join(DIRECTORY);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = match patient(|| fs::open(&path, flags, Mode::empty())) {
        Ok(directory) => directory,
        Err(Errno::NOENT) => return Ok(Reading::Absent),
        Err(errno) => return Err(system("open", &path, errno)),
    };
    let directory = Directory {
        fd: directory.as_fd(),
        path,
    };
    let stat = fs::fstat(directory.fd).map_err(|errno| system("look at", &directory.path, errno))?;
    directory.is_ours(&directory.path, stat.st_uid)?;
    for again in 0..TRIES {
        if again > 0 {
            thread::sleep(PAUSE);
        }
        let names = match directory.names()? {
            Found::Names(names) => names,
            Found::Nothing => return Ok(Reading::Absent),
            // The file of actions is removed before its new one is put there.
            Found::NoActions => continue,
        };
        let before = directory.look(&names)?;
        // Removed before the new one is put there: the actions, or the strings.
        if before[0].is_none() || before[2].is_none() {
            continue;
        }
        if let Some(known) = known.filter(|known| known.function == function)
            && let Some(grown) = directory.grown(&names, known, &before, function)?
        {
            return Ok(grown);
        }
        let Some(files) = directory.bytes(&names, &before, 0)? else {
            continue;
        };
        if directory.look(&names)? == before {
            directory.check_formats(&names, &files, 0)?;
            let decoded = Facts::decode(&Files::of(&files), function);
            let (facts, actions) = decoded.map_err(|fault| directory.damaged(&names, fault))?;
            let files = Box::new(before);
            return Ok(Reading::Read(
                facts,
                State {
                    files,
                    actions,
                    function,
                },
            ));
        }
    }
    Err(ActionCacheError::Busy { path: directory.path })
}

struct Directory<'a> {
    fd: BorrowedFd<'a>,
    path: PathBuf,
}

/// Names of the actions, their journal, the strings, and theirs; and the format that the names say.
struct Names {
    names: [String; 4],
    format: Option<i64>,
}

enum Found {
    Names(Names),
    Nothing,
    NoActions,
}

impl Names {
    /// Of the format with this number in the names; `None` for that without.
    fn of(format: Option<i64>) -> Self {
        let names = match format {
            Some(number) => [
                format!("action_cache_v{number}.blaze"),
                format!("action_journal_v{number}.blaze"),
                format!("filename_index_v{number}.blaze"),
                format!("filename_index_v{number}.journal"),
            ],
            None => [
                "action_cache.blaze",
                "action_journal.blaze",
                "filename_index.blaze",
                "filename_index_journal.blaze",
            ]
            .map(str::to_owned),
        };
        Self { names, format }
    }
}

/// The format that the name of a file of actions, or of their journal, says; the inner `None` for one without number.
fn format_of(name: &str) -> Option<(bool, Option<i64>)> {
    let (is_actions, rest) = match name.strip_prefix("action_cache") {
        Some(rest) => (true, rest),
        None => (false, name.strip_prefix("action_journal")?),
    };
    let rest = rest.strip_suffix(".blaze")?;
    if rest.is_empty() {
        return Some((is_actions, None));
    }
    let number = rest.strip_prefix("_v")?;
    let is_number = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    is_number
        .then(|| number.parse().ok())
        .flatten()
        .map(|number| (is_actions, Some(number)))
}

impl Directory<'_> {
    /// Finds out which format is in use. Another version of Bazel may have left files of another one: the one that was written
    /// last counts, be it only its journal, as by every build of a server that has run before.
    fn names(&self) -> Result<Found, ActionCacheError> {
        let error = |errno| system("read", &self.path, errno);
        // Whether there are actions, and when they or their journal were written.
        let mut formats: HashMap<Option<i64>, (bool, (i64, i64))> = HashMap::new();
        let mut has_journal = false;
        for entry in patient(|| Dir::read_from(self.fd)).map_err(error)? {
            let entry = entry.map_err(error)?;
            let Some((is_actions, format)) = entry.file_name().to_str().ok().and_then(format_of) else {
                continue;
            };
            has_journal |= !is_actions;
            let Ok(stat) = fs::statat(self.fd, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) else {
                has_journal = true;
                continue;
            };
            let written = (stat.st_mtime, stat.st_mtime_nsec.cast_signed());
            let (has_actions, last) = formats.entry(format).or_insert((false, written));
            *has_actions |= is_actions;
            *last = written.max(*last);
        }
        let of_actions = formats.into_iter().filter(|(_, (has_actions, _))| *has_actions);
        let newest = of_actions.max_by_key(|(format, (_, written))| (*written, *format));
        Ok(match newest {
            Some((format, _)) => Found::Names(Names::of(format)),
            None if has_journal => Found::NoActions,
            None => Found::Nothing,
        })
    }

    fn look(&self, names: &Names) -> Result<Inodes, ActionCacheError> {
        let mut files = [None; 4];
        for (file, name) in files.iter_mut().zip(&names.names) {
            match fs::statat(self.fd, name.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => *file = Some(inode(&stat)),
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(system("look at", &self.path.join(name), errno)),
            }
        }
        Ok(files)
    }

    /// What there is in addition to what was read before, if nothing has changed but that journals have grown; `None` if more
    /// has, or only all files say. Every build writes one action again, that of the workspace's status, which has nothing to
    /// say.
    fn grown(
        &self,
        names: &Names,
        known: &State,
        now: &Inodes,
        function: DigestFunction,
    ) -> Result<Option<Reading>, ActionCacheError> {
        if *known.files == *now {
            return Ok(Some(Reading::Unchanged));
        }
        let [actions, journal, index, index_journal] = &*known.files;
        let from = grown_from(journal.as_ref(), now[1].as_ref());
        let (Some(from), Some(_)) = (from, grown_from(index_journal.as_ref(), now[3].as_ref())) else {
            return Ok(None);
        };
        if [actions, index] != [&now[0], &now[2]] {
            return Ok(None);
        }
        // What makes no sense is said when all of it is read.
        let journal = match &now[1] {
            Some(state) => self.file(&names.names[1], state)?,
            None => Some(Vec::new()),
        };
        let Some(journal) = journal else {
            return Ok(None);
        };
        // In most builds; then nobody needs the strings.
        if facts::has_no_outputs(&journal, from, &known.actions) {
            return Ok(Some(Reading::Unchanged));
        }
        let Some(mut files) = self.bytes(names, now, 2)? else {
            return Ok(None);
        };
        files[1] = journal;
        if self.look(names)? != *now || self.check_formats(names, &files, 1).is_err() {
            return Ok(None);
        }
        let decoded = Facts::decode_grown(&Files::of(&files), from, &known.actions, function);
        Ok(decoded.ok().flatten().map(|(facts, actions)| {
            let files = Box::new(*now);
            Reading::Read(
                facts,
                State {
                    files,
                    actions,
                    function,
                },
            )
        }))
    }

    /// The files' bytes, actions first, without those before one; `None` if one is not what it was.
    fn bytes(
        &self,
        names: &Names,
        before: &Inodes,
        first: usize,
    ) -> Result<Option<[Vec<u8>; 4]>, ActionCacheError> {
        if let Some(number) = names.format.filter(|number| !FORMATS.contains(number)) {
            let path = self.path.join(&names.names[0]);
            return Err(ActionCacheError::Format { path, number });
        }
        let mut files: [Vec<u8>; 4] = Default::default();
        for ((file, name), state) in files.iter_mut().zip(&names.names).zip(before).skip(first) {
            let Some(state) = state else { continue };
            match self.file(name, state)? {
                Some(bytes) => *file = bytes,
                None => return Ok(None),
            }
        }
        Ok(Some(files))
    }

    fn file(&self, name: &str, before: &Inode) -> Result<Option<Vec<u8>>, ActionCacheError> {
        let path = self.path.join(name);
        let unfit = |reason: String| ActionCacheError::Unfit {
            path: path.clone(),
            reason,
        };
        let file = match patient(|| fs::openat(self.fd, name, GUARDED, Mode::empty())) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => return Err(unfit("it is a symlink".to_owned())),
            Err(errno) => return Err(system("open", &path, errno)),
        };
        let stat = fs::fstat(&file).map_err(|errno| system("look at", &path, errno))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(unfit("it is not a regular file".to_owned()));
        }
        self.is_ours(&path, stat.st_uid)?;
        if inode(&stat) != *before {
            return Ok(None);
        }
        if before.size > LARGEST {
            let (size, most) = (
                crate::units::show_size(before.size),
                crate::units::show_size(LARGEST),
            );
            return Err(unfit(format!("its size of {size} exceeds the limit of {most}")));
        }
        let len = usize::try_from(before.size).unwrap_or(usize::MAX);
        let mut bytes = Vec::with_capacity(len);
        File::from(file)
            .take(before.size)
            .read_to_end(&mut bytes)
            .map_err(|source| ActionCacheError::System {
                operation: "read",
                path,
                source,
            })?;
        Ok((bytes.len() == len).then_some(bytes))
    }

    fn is_ours(&self, path: &Path, owner: u32) -> Result<(), ActionCacheError> {
        let user = rustix::process::geteuid().as_raw();
        if owner == user {
            return Ok(());
        }
        Err(ActionCacheError::Unfit {
            path: path.to_owned(),
            reason: format!("it belongs to user {owner}, not to user {user}"),
        })
    }

    /// Refuses files, from one on, that are of other formats.
    fn check_formats(
        &self,
        names: &Names,
        files: &[Vec<u8>; 4],
        first: usize,
    ) -> Result<(), ActionCacheError> {
        for (number, file) in files.iter().enumerate().skip(first) {
            // A journal has nothing in it as long as its header is not written out; and there may be none.
            if number % 2 == 1 && file.len() < frame::HEADER {
                continue;
            }
            let format = frame::format(file).map_err(|fault| self.damaged(names, (number, fault)))?;
            let is_known = if number < 2 {
                FORMATS.contains(&format) && names.format.is_none_or(|named| named == format)
            } else {
                format == index::FORMAT
            };
            if !is_known {
                return Err(ActionCacheError::Format {
                    path: self.path.join(&names.names[number]),
                    number: format,
                });
            }
        }
        Ok(())
    }

    fn damaged(&self, names: &Names, (number, fault): (usize, Fault)) -> ActionCacheError {
        ActionCacheError::Damaged {
            path: self.path.join(&names.names[number]),
            at: fault.at,
            what: fault.what,
        }
    }
}

/// Where a journal's new bytes begin, if it has only grown.
fn grown_from(before: Option<&Inode>, now: Option<&Inode>) -> Option<usize> {
    let size = match (before, now) {
        (None, _) => 0,
        (Some(before), Some(now)) => {
            let is_it = (before.device, before.inode) == (now.device, now.inode);
            (is_it && before.size <= now.size).then_some(before.size)?
        }
        (Some(_), None) => return None,
    };
    usize::try_from(size).ok()
}

const fn inode(stat: &fs::Stat) -> Inode {
    Inode {
        device: stat.st_dev,
        inode: stat.st_ino,
        size: stat.st_size.cast_unsigned(),
        mtime: (stat.st_mtime, stat.st_mtime_nsec.cast_signed()),
        ctime: (stat.st_ctime, stat.st_ctime_nsec.cast_signed()),
    }
}

fn system(operation: &'static str, path: &Path, errno: Errno) -> ActionCacheError {
    ActionCacheError::System {
        operation,
        path: path.to_owned(),
        source: io::Error::from(errno),
    }
}
