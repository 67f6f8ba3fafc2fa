//! Files in a directory of this machine.

use std::{
    collections::HashSet,
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{anyhow, bail};
use async_trait::async_trait;
use rustix::{
    fs::{self, AtFlags, Dir, FileType, Mode, OFlags},
    io::Errno,
};

use super::{Collection, Item, Listing, Only, SIDECAR};
use crate::{
    open_files::open_regular,
    remote::{Sink, pour},
    transport::{RemoteError, RemoteErrorKind},
};

/// A directory, or one file in it. Of a directory, only regular files count, and symlinks to checksums.
pub(super) struct LocalDirectory {
    path: PathBuf,
    directory: Arc<OwnedFd>,
    /// The file, if one is named.
    only: Option<Only>,
}

impl LocalDirectory {
    /// Opens what a path leads to; a file under its own name or another one.
    ///
    /// # Errors
    /// In words, when it is not there or cannot be opened, or it is a directory that is given a name.
    pub(super) fn open(path: &Path, given: Option<&str>) -> anyhow::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut real = path.to_owned();
        let (path, only) = if path.is_dir() {
            if given.is_some() {
                bail!("is a directory; NAME= is for one file");
            }
            (path, None)
        } else {
            let name_of = |path: &Path| {
                let name = path.file_name().and_then(|name| name.to_str());
                let name = name.ok_or_else(|| anyhow!("does not name a file with a name in UTF-8"))?;
                Ok::<_, anyhow::Error>(name.to_owned())
            };
            // The user's own word, such as `latest.tar.gz`: the checksum is beside it, or where it leads.
            let name = name_of(path)?;
            let has_sum = path.with_file_name(format!("{name}{SIDECAR}")).exists();
            if path.is_symlink() && !has_sum {
                real = path.canonicalize()?;
            }
            let only = Only::new(name_of(&real)?, Some(given.unwrap_or(&name)));
            (real.parent().unwrap_or(&real), Some(only))
        };
        let directory = fs::open(path, flags, Mode::empty())?;
        Ok(Self {
            path: path.to_owned(),
            directory: Arc::new(directory),
            only,
        })
    }

    fn name_of(&self, item: &Item) -> String {
        match &self.only {
            Some(only) => only.own_name(item),
            None => item.name.clone(),
        }
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
    let (mut items, mut sums) = (Vec::new(), Vec::new());
    let mut links = 0_u64;
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
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Symlink && name.ends_with(SIDECAR) {
            sums.push(Item::named(name.to_owned()));
        } else if kind == FileType::Symlink {
            links += 1;
        } else if kind == FileType::RegularFile {
            items.push(Item {
                size: u64::try_from(stat.st_size).ok(),
                ..Item::named(name.to_owned())
            });
        }
    }
    if links > 0 {
        tracing::warn!(
            links,
            "symlinks are left out; name one itself to have it followed"
        );
    }
    // Of anything else, they are symlinks like others.
    let files: HashSet<&str> = items.iter().map(|item| &*item.name).collect();
    sums.retain(|sum| {
        sum.name
            .strip_suffix(SIDECAR)
            .is_some_and(|of| files.contains(of))
    });
    items.append(&mut sums);
    items.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(items)
}

/// Opens a regular file; with `follows`, also where a symlink leads.
fn open_file(directory: &OwnedFd, name: &str, follows: bool) -> io::Result<(File, u64)> {
    if follows {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = File::from(fs::openat(directory, name, flags, Mode::empty())?);
        let metadata = file.metadata()?;
        if metadata.is_file() {
            return Ok((file, metadata.len()));
        }
    }
    open_regular(directory, name)?.ok_or_else(|| io::Error::other("is not a regular file"))
}

#[async_trait]
impl Collection for LocalDirectory {
    async fn list(&self) -> Result<Listing, RemoteError> {
        if let Some(only) = &self.only {
            return Ok(Listing::of_one(&only.name));
        }
        let directory = Arc::clone(&self.directory);
        let listed = tokio::task::spawn_blocking(move || entries(&directory)).await;
        let items = listed.map_err(io::Error::other).and_then(|items| items);
        Ok(Listing::whole(items.map_err(|e| self.error("", &e))?))
    }

    async fn read(&self, item: &Item, sink: &mut dyn Sink) -> Result<(), RemoteError> {
        let name = self.name_of(item);
        let error = |error: io::Error| self.error(&name, &error);
        let (directory, of_file) = (Arc::clone(&self.directory), name.clone());
        // What is listed as a file is no symlink, unless somebody has replaced it. What is named itself may be one.
        let follows = self.only.is_some() || item.size.is_none() && name.ends_with(SIDECAR);
        let opened = tokio::task::spawn_blocking(move || open_file(&directory, &of_file, follows)).await;
        let opened = opened.map_err(io::Error::other).and_then(|opened| opened);
        let (file, size) = opened.map_err(error)?;
        if pour(file, 0, size, &name, sink).await? {
            return Ok(());
        }
        let cut = "the file became shorter while it was read, or cannot be read";
        Err(error(io::Error::other(cut)))
    }

    fn own_name(&self) -> Option<String> {
        self.only.as_ref().map(|only| only.own.clone())
    }

    fn describe(&self) -> String {
        match &self.only {
            Some(only) => self.path.join(&only.own).display().to_string(),
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
        let all = LocalDirectory::open(dir.path(), None).unwrap();
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
        let one = LocalDirectory::open(&dir.path().join("a.tar"), None).unwrap();
        let listing = one.list().await.unwrap();
        assert!(!listing.is_complete);
        assert_eq!(listing.items, [Item::named("a.tar".to_owned())]);
        assert!(LocalDirectory::open(&dir.path().join("no/such.tar"), None).is_err());
        assert!(LocalDirectory::open(dir.path(), Some("x.tar")).is_err());
        for name in ["b.tar.sha256sum", "of-none.sha256sum"] {
            std::os::unix::fs::symlink("f.sum", dir.path().join(name)).unwrap();
        }
        std::fs::write(dir.path().join("f.sum"), "sum of f").unwrap();
        let sum = Item::named("b.tar.sha256sum".to_owned());
        let items = all.list().await.unwrap().items;
        assert!(items.contains(&sum));
        assert!(
            !items.iter().any(|item| item.name == "of-none.sha256sum"),
            "{items:?}"
        );
        let link = LocalDirectory::open(&dir.path().join("e.tar"), None).unwrap();
        let listed = link.list().await.unwrap().items;
        assert_eq!(listed, [Item::named("e.tar".to_owned())]);
        for (from, item, bytes) in [(&all, &sum, "sum of f"), (&link, &listed[0], "a")] {
            let mut kept = Collect::default();
            from.read(item, &mut kept).await.unwrap();
            assert_eq!(kept.into_bytes(), bytes.as_bytes());
        }
        assert_eq!(link.own_name().as_deref(), Some("a.tar"));
        // A checksum beside the link is its own.
        std::fs::write(dir.path().join("e.tar.sha256sum"), "sum of e").unwrap();
        let link = LocalDirectory::open(&dir.path().join("e.tar"), None).unwrap();
        for (item, bytes) in [("e.tar", "a"), ("e.tar.sha256sum", "sum of e")] {
            let mut kept = Collect::default();
            link.read(&Item::named(item.to_owned()), &mut kept).await.unwrap();
            assert_eq!(kept.into_bytes(), bytes.as_bytes());
        }
        let other = LocalDirectory::open(&dir.path().join("a.tar"), Some("x.zip")).unwrap();
        assert_eq!(
            other.list().await.unwrap().items,
            [Item::named("x.zip".to_owned())]
        );
        std::fs::write(dir.path().join("a.tar.sha256sum"), "sum").unwrap();
        for (name, bytes) in [("x.zip", "a"), ("x.zip.sha256sum", "sum")] {
            let mut kept = Collect::default();
            let item = Item::named(name.to_owned());
            other.read(&item, &mut kept).await.unwrap();
            assert_eq!(kept.into_bytes(), bytes.as_bytes(), "{name}");
        }
    }
}
