//! Files in a directory of this machine.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::anyhow;
use async_trait::async_trait;
use rustix::{
    fs::{self, AtFlags, Dir, FileType, Mode, OFlags},
    io::Errno,
};

use super::{Collection, Item, Listing};
use crate::{
    open_files::open_regular,
    remote::{Sink, pour},
    transport::{RemoteError, RemoteErrorKind},
};

/// A directory, or one file in it. Only regular files count, and no symlink to one.
pub(super) struct LocalDirectory {
    path: PathBuf,
    directory: Arc<OwnedFd>,
    /// The file, if one is named.
    only: Option<String>,
}

impl LocalDirectory {
    /// Opens what a path leads to.
    ///
    /// # Errors
    /// In words, when it is not there or cannot be opened.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let (path, only) = if path.is_dir() {
            (path, None)
        } else {
            let name = path.file_name().and_then(|name| name.to_str());
            let name = name.ok_or_else(|| anyhow!("does not name a file with a name in UTF-8"))?;
            (path.parent().unwrap_or(path), Some(name.to_owned()))
        };
        let directory = fs::open(path, flags, Mode::empty())?;
        Ok(Self {
            path: path.to_owned(),
            directory: Arc::new(directory),
            only,
        })
    }

    fn error(&self, name: &str, error: &io::Error) -> RemoteError {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => RemoteErrorKind::NotFound,
            io::ErrorKind::PermissionDenied => RemoteErrorKind::Denied,
            _ => RemoteErrorKind::Protocol,
        };
        RemoteError::new(
            kind,
            self.path.join(name).display().to_string(),
            error.to_string(),
        )
    }
}

/// Regular files by name, with their sizes. A name that is not UTF-8 is left out: no pattern could choose it.
fn entries(directory: &OwnedFd) -> io::Result<Vec<Item>> {
    let mut items = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().to_str() else {
            continue;
        };
        let stat = match fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error.into()),
        };
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            items.push(Item {
                size: u64::try_from(stat.st_size).ok(),
                ..Item::named(name.to_owned())
            });
        }
    }
    items.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(items)
}

fn open_file(directory: &OwnedFd, name: &str) -> io::Result<(File, u64)> {
    open_regular(directory, name)?.ok_or_else(|| io::Error::other("is not a regular file"))
}

#[async_trait]
impl Collection for LocalDirectory {
    async fn list(&self) -> Result<Listing, RemoteError> {
        if let Some(name) = &self.only {
            return Ok(Listing::of_one(name));
        }
        let directory = Arc::clone(&self.directory);
        let listed = tokio::task::spawn_blocking(move || entries(&directory)).await;
        let items = listed.map_err(io::Error::other).and_then(|items| items);
        Ok(Listing::whole(items.map_err(|e| self.error("", &e))?))
    }

    async fn read(&self, item: &Item, sink: &mut dyn Sink) -> Result<(), RemoteError> {
        let (directory, name) = (Arc::clone(&self.directory), item.name.clone());
        let opened = tokio::task::spawn_blocking(move || open_file(&directory, &name)).await;
        let opened = opened.map_err(io::Error::other).and_then(|opened| opened);
        let (file, size) = opened.map_err(|e| self.error(&item.name, &e))?;
        if pour(file, 0, size, &item.name, sink).await? {
            return Ok(());
        }
        let cut = io::Error::other("the file became shorter while it was read, or cannot be read");
        Err(self.error(&item.name, &cut))
    }

    fn describe(&self) -> String {
        match &self.only {
            Some(name) => self.path.join(name).display().to_string(),
            None => self.path.display().to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remote::Collect;

    #[tokio::test]
    async fn regular_files_right_in_the_directory_are_listed_and_read() {
        let dir = tempfile::tempdir().unwrap();
        let big = vec![7; 3_000_000];
        std::fs::write(dir.path().join("b.tar"), &big).unwrap();
        std::fs::write(dir.path().join("a.tar"), "a").unwrap();
        std::fs::create_dir(dir.path().join("c.tar")).unwrap();
        std::fs::write(dir.path().join("c.tar/d.tar"), "d").unwrap();
        std::os::unix::fs::symlink("a.tar", dir.path().join("e.tar")).unwrap();
        let all = LocalDirectory::open(dir.path()).unwrap();
        let listing = all.list().await.unwrap();
        let names: Vec<_> = listing.items.iter().map(|i| (&*i.name, i.size)).collect();
        assert_eq!(names, [("a.tar", Some(1)), ("b.tar", Some(3_000_000))]);
        assert!(listing.is_complete);
        let mut kept = Collect::default();
        all.read(&listing.items[1], &mut kept).await.unwrap();
        assert_eq!(kept.into_bytes(), big);
        for (name, kind) in [
            ("none.tar", RemoteErrorKind::NotFound),
            ("e.tar", RemoteErrorKind::Protocol),
            ("c.tar", RemoteErrorKind::Protocol),
        ] {
            let error = all
                .read(&Item::named(name.to_owned()), &mut Collect::default())
                .await
                .unwrap_err();
            assert_eq!(error.kind, kind, "{error}");
            assert!(error.to_string().contains(name), "{error}");
        }
        let one = LocalDirectory::open(&dir.path().join("a.tar")).unwrap();
        let listing = one.list().await.unwrap();
        assert!(!listing.is_complete);
        assert_eq!(listing.items, [Item::named("a.tar".to_owned())]);
        assert!(LocalDirectory::open(&dir.path().join("no/such.tar")).is_err());
    }
}
