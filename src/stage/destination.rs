//! Where outputs are staged to: which directories may be named, and the one that was.
//!
//! What is asked for is a path, and links on the way may be changed by anyone who stages at the same time. So the path
//! is resolved once and walked from the top without following links; the directory that this ends in is the one that
//! was judged, and its descriptor is what everything else goes by.

use std::{
    ffi::OsStr,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{self, Mode, OFlags},
    io::Errno,
};

use super::{error::StageError, origin::Origins};
use crate::{materialize::place::resolve, transport::without_secrets};

const DIRECTORY: OFlags = OFlags::PATH
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Which directories a caller may name.
#[derive(Debug, Clone, Default)]
pub(crate) enum Reach {
    /// Any that the process may write.
    #[default]
    Anywhere,
    /// These, and those below them; none, if there are none. Likewise the URLs that may be staged from.
    Below(Arc<[PathBuf]>, Origins),
}

/// A directory to stage into, open.
#[derive(Debug)]
pub(crate) struct Destination {
    /// As it was asked for.
    asked: PathBuf,
    /// The path with symlinks resolved.
    pub(super) real: PathBuf,
    pub(super) fd: Arc<OwnedFd>,
}

impl Reach {
    /// Whether callers may not have all that the process may.
    pub(super) const fn is_bounded(&self) -> bool {
        matches!(self, Self::Below(..))
    }

    /// Refuses a URL that may not be staged from, and that was named so.
    ///
    /// # Errors
    /// When it is not in reach.
    pub(super) fn admit(&self, url: &str, text: &str) -> Result<(), StageError> {
        match self {
            Self::Below(_, origins) if !origins.allow(url) => Err(StageError::DeniedOrigin {
                from: without_secrets(text),
            }),
            _ => Ok(()),
        }
    }

    /// Opens a directory, if it may be named. With `make`, what is missing of it is made; without, it is `None` if it is
    /// not there. Never in the state directory, nor around it. Blocks.
    ///
    /// # Errors
    /// When it may not be named, or not be opened or made.
    pub(crate) fn open(
        &self,
        asked: &Path,
        state: Option<&Path>,
        make: bool,
    ) -> Result<Option<Destination>, StageError> {
        let failed = |reason: String| StageError::Setting {
            flag: format!("--to={}", asked.display()),
            reason,
        };
        let denied = |reason: String| StageError::Denied {
            directory: asked.to_owned(),
            reason,
        };
        if !asked.is_absolute() {
            return Err(failed("must be an absolute path".to_owned()));
        }
        let real = resolve(asked).map_err(|e| failed(e.to_string()))?;
        if let Self::Below(allowed, _) = self {
            let is_below = |allowed: &PathBuf| allowed.canonicalize().is_ok_and(|all| real.starts_with(all));
            // What is missing may yet lead anywhere.
            let leads_up = real.components().any(|part| part == Component::ParentDir);
            if leads_up || !allowed.iter().any(is_below) {
                return Err(denied(
                    "callers of this port may only stage into directories given with --control-stage-dir"
                        .to_owned(),
                ));
            }
        }
        let state = state.and_then(|path| Some((path.canonicalize().ok()?, fs::stat(path).ok()?)));
        if let Some((path, _)) = &state
            && path.starts_with(&real)
        {
            return Err(denied(format!(
                "it contains outhaul's state directory {}",
                path.display()
            )));
        }
        let error = |errno: Errno| failed(errno.to_string());
        let mut fd = fs::open("/", DIRECTORY, Mode::empty()).map_err(error)?;
        for name in real.components().skip(1) {
            fd = match open_below(&fd, name.as_os_str(), make) {
                Err(Errno::NOENT | Errno::NOTDIR) if !make => return Ok(None),
                next => next.map_err(error)?,
            };
            let Some((path, own)) = &state else {
                continue;
            };
            let here = fs::fstat(&fd).map_err(error)?;
            if (here.st_dev, here.st_ino) == (own.st_dev, own.st_ino) {
                return Err(denied(format!(
                    "it is inside outhaul's state directory {}",
                    path.display()
                )));
            }
        }
        Ok(Some(Destination {
            asked: asked.to_owned(),
            real,
            fd: Arc::new(fd),
        }))
    }
}

impl Destination {
    /// A path that leads to this directory and no other, whatever comes into its place.
    pub(crate) fn path(&self) -> PathBuf {
        let path = PathBuf::from(format!("/proc/self/fd/{}", self.fd.as_raw_fd()));
        if path.exists() { path } else { self.real.clone() }
    }

    /// Whether a device and an inode are this directory's.
    #[allow(clippy::unnecessary_cast)]
    pub(super) fn is(&self, device: u64, inode: u64) -> bool {
        fs::fstat(&self.fd).is_ok_and(|own| (own.st_dev as u64, own.st_ino as u64) == (device, inode))
    }

    /// A text about [`path`](Self::path), with the directory's own name.
    pub(crate) fn named(&self, text: &str) -> String {
        text.replace(&*self.path().to_string_lossy(), &self.asked.to_string_lossy())
    }

    /// An error, likewise.
    pub(super) fn name_in(&self, error: StageError) -> StageError {
        match error {
            StageError::Setting { flag, reason } => StageError::Setting {
                flag: self.named(&flag),
                reason: self.named(&reason),
            },
            StageError::Io { action, path, source } => StageError::Io {
                action,
                path: match path.strip_prefix(self.path()) {
                    Ok(below) => self.asked.join(below),
                    Err(_) => path,
                },
                source,
            },
            other => other,
        }
    }
}

/// Opens a directory in another one without following a link; with `make`, makes it if it is missing.
pub(crate) fn open_below(fd: &OwnedFd, name: &OsStr, make: bool) -> Result<OwnedFd, Errno> {
    let open = || fs::openat(fd, name, DIRECTORY, Mode::empty());
    match open() {
        Err(Errno::NOENT) if make => {}
        opened => return opened,
    }
    match fs::mkdirat(fd, name, Mode::from_raw_mode(0o777)) {
        Ok(()) | Err(Errno::EXIST) => open(),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn denied<T: std::fmt::Debug>(opened: Result<T, StageError>) -> bool {
        matches!(opened, Err(StageError::Denied { .. }))
    }

    #[test]
    fn only_directories_below_those_that_are_allowed_are_opened_whatever_links_say() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        for name in ["allowed/in", "other", "allowed-not"] {
            std::fs::create_dir_all(dir.join(name)).unwrap();
        }
        symlink("../other", dir.join("allowed/out")).unwrap();
        symlink("in", dir.join("allowed/link")).unwrap();
        symlink("nowhere", dir.join("allowed/dangling")).unwrap();
        symlink("allowed/in", dir.join("way")).unwrap();
        let reach = Reach::Below([dir.join("allowed")].into(), Origins::default());
        for (name, fine) in [
            ("allowed", true),
            ("allowed/in", true),
            ("allowed/link", true),
            ("allowed/new/one", true),
            ("way/new", true),
            ("other/../allowed/in", true),
            ("other", false),
            ("allowed/out", false),
            ("allowed/out/new", false),
            ("allowed/../other", false),
            ("allowed/missing/../../other", false),
            ("allowed-not", false),
            ("", false),
        ] {
            let opened = reach.open(&dir.join(name), None, true);
            match opened {
                Ok(_) => assert!(fine, "{name}"),
                Err(error) => assert!(!fine && denied::<()>(Err(error)), "{name}"),
            }
        }
        assert!(reach.open(&dir.join("allowed/dangling"), None, true).is_err());
        assert!(!dir.join("other/new").exists() && !dir.join("allowed/missing").exists());
        assert!(!dir.join("allowed/nowhere").exists());
        assert!(denied(Reach::Below([].into(), Origins::default()).open(
            &dir.join("allowed"),
            None,
            true
        )));
        assert!(
            Reach::Anywhere
                .open(&dir.join("other"), None, true)
                .unwrap()
                .is_some()
        );
        assert!(
            reach
                .open(&dir.join("allowed/absent"), None, false)
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn the_state_directory_is_nowhere_on_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let state = dir.join("home/state");
        std::fs::create_dir_all(state.join("journal")).unwrap();
        symlink("home/state", dir.join("link")).unwrap();
        for name in [
            "home/state",
            "home/state/journal",
            "home/state/new",
            "link/new",
            "home",
            "",
        ] {
            let opened = Reach::Anywhere.open(&dir.join(name), Some(&state), true);
            assert!(denied(opened), "{name}");
        }
        assert_eq!(std::fs::read_dir(&state).unwrap().count(), 1);
        let beside = Reach::Anywhere.open(&dir.join("home/beside"), Some(&state), true);
        assert!(beside.unwrap().is_some());
    }

    #[test]
    fn a_directory_that_was_opened_stays_the_one_that_is_meant() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("to");
        let opened = Reach::Anywhere.open(&to, None, true).unwrap().unwrap();
        std::fs::rename(&to, dir.path().join("moved")).unwrap();
        std::fs::create_dir(dir.path().join("trap")).unwrap();
        symlink("trap", &to).unwrap();
        std::fs::write(opened.path().join("file"), "x").unwrap();
        assert!(dir.path().join("moved/file").exists());
        let text = format!("cannot write {}/file", opened.path().display());
        assert_eq!(opened.named(&text), format!("cannot write {}/file", to.display()));
    }
}
