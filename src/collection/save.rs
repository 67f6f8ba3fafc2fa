//! Files that get their names when they are whole.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, Write},
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{self, AtFlags, CWD, Mode, OFlags},
    io::Errno,
};

use crate::{
    digest::{Digest, DigestFunction, Hasher},
    open_files::open_regular,
};

/// How much is read at once, in bytes.
const PIECE: usize = 256 << 10;

/// A directory that files are put into.
#[derive(Debug, Clone)]
pub(crate) struct Directory {
    path: PathBuf,
    fd: Arc<OwnedFd>,
}

impl Directory {
    /// Opens a directory; makes it if it does not exist.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            path: path.to_owned(),
            fd: Arc::new(fs::open(path, flags, Mode::empty())?),
        })
    }

    /// A directory that is open already. The path is for messages.
    pub(super) fn opened(path: PathBuf, fd: OwnedFd) -> Self {
        let fd = Arc::new(fd);
        Self { path, fd }
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The digest of the regular file with this name; `None` if there is no such file.
    ///
    /// # Errors
    /// The system's, when it cannot be read.
    pub(crate) fn digest_of(&self, name: &str, function: DigestFunction) -> io::Result<Option<Digest>> {
        let mut file = match open_regular(&self.fd, name) {
            Ok(Some((file, _))) => file,
            Ok(None) | Err(Errno::NOENT | Errno::LOOP) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut hasher = Hasher::new(function);
        let mut buffer = vec![0; PIECE];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(Some(hasher.finish())),
                read => hasher.update(&buffer[..read]),
            }
        }
    }

    /// A file without a name in it.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn file(&self) -> io::Result<SavedFile> {
        let mode = Mode::from_raw_mode(0o666);
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let (fd, temporary) = match fs::openat(&self.fd, ".", flags | OFlags::TMPFILE, mode) {
            // Not every file system has files without names.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                let name = temporary_name();
                let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
                (fs::openat(&self.fd, &name, flags, mode)?, Some(name))
            }
            opened => (opened?, None),
        };
        Ok(SavedFile {
            directory: Arc::clone(&self.fd),
            file: File::from(fd),
            temporary,
        })
    }
}

fn temporary_name() -> String {
    format!(".outhaul-{:016x}", rand::random::<u64>())
}

/// A file that is gone when it is dropped before it has its name.
#[derive(Debug)]
pub(crate) struct SavedFile {
    directory: Arc<OwnedFd>,
    file: File,
    /// The name that it has in the meantime, if it needs one.
    temporary: Option<String>,
}

impl SavedFile {
    /// The file, at its beginning.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn rewound(&mut self) -> io::Result<&mut File> {
        self.file.rewind()?;
        Ok(&mut self.file)
    }

    /// Gives it its name, in the place of a file that has it.
    ///
    /// # Errors
    /// The system's: a directory is in the way, for one.
    pub(crate) fn publish(self, name: &str) -> io::Result<()> {
        let directory = Arc::clone(&self.directory);
        self.publish_in(&directory, name).map(drop)
    }

    /// The same in another directory of the file system. Gives the file's inode number.
    pub(super) fn publish_in(mut self, directory: &OwnedFd, name: &str) -> io::Result<u64> {
        let inode = fs::fstat(&self.file)?.st_ino;
        if self.temporary.is_none() {
            let temporary = temporary_name();
            // By its name in /proc, which needs no privileges.
            let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            fs::linkat(CWD, path, &self.directory, &temporary, AtFlags::SYMLINK_FOLLOW)?;
            self.temporary = Some(temporary);
        }
        if let Some(temporary) = &self.temporary {
            fs::renameat(&self.directory, temporary, directory, name)?;
        }
        self.temporary = None;
        Ok(inode)
    }
}

impl Write for SavedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for SavedFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // What cannot be removed now is known by its name.
            let _ = fs::unlinkat(&self.directory, temporary, AtFlags::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn a_file_has_its_name_when_it_is_whole_and_never_another() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::create(&dir.path().join("a/b")).unwrap();
        let here = directory.path().to_owned();
        let mut file = directory.file().unwrap();
        file.write_all(b"wrong").unwrap();
        drop(file);
        assert_eq!(names(&here), Vec::<String>::new());
        std::fs::write(here.join("x"), "old").unwrap();
        let mut file = directory.file().unwrap();
        file.write_all(b"new").unwrap();
        assert_eq!(std::fs::read(here.join("x")).unwrap(), b"old");
        file.publish("x").unwrap();
        assert_eq!(std::fs::read(here.join("x")).unwrap(), b"new");
        assert_eq!(names(&here), ["x"]);
        let of = |name| directory.digest_of(name, DigestFunction::Sha256).unwrap();
        assert_eq!(of("x"), Some(Digest::of(DigestFunction::Sha256, b"new")));
        assert_eq!(of("y"), None);
        // A directory is not replaced, and nothing is left.
        std::fs::create_dir_all(here.join("d/e")).unwrap();
        std::os::unix::fs::symlink("x", here.join("l")).unwrap();
        assert_eq!((of("d"), of("l")), (None, None));
        assert!(directory.file().unwrap().publish("d").is_err());
        directory.file().unwrap().publish("l").unwrap();
        assert!(here.join("l").symlink_metadata().unwrap().is_file());
        let mut left = names(&here);
        left.sort();
        assert_eq!(left, ["d", "l", "x"]);
    }
}
