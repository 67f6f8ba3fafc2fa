//! Why something could not be placed.

use std::{
    io,
    path::{Path, PathBuf},
};

use rustix::io::Errno;

use super::mark::Shortage;
use crate::digest::Digest;

/// What went wrong, for decisions.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaceErrorKind {
    /// A symlink on the way leads out of the root, or round in circles.
    #[error("the symlink {link:?} on its path leads to {target:?}, which is outside the output root")]
    Escapes {
        /// The link, relative to the root.
        link: String,
        /// Where it leads.
        target: String,
    },
    /// The root or its `bazel-out` was deleted or replaced since work on it began; it is not made again.
    #[error("the output root was cleaned in the meantime: {0}")]
    RootGone(&'static str),
    /// A newer invocation of the same root has begun.
    #[error("superseded by a newer invocation")]
    Superseded,
    /// The bytes are not those of the digest.
    #[error("the bytes have the digest {}, expected {expected}", actual.as_deref().map_or_else(|| "of more bytes".to_owned(), ToString::to_string))]
    Mismatch {
        /// What was asked for.
        expected: Box<Digest>,
        /// What came; `None` when more bytes came than there should be.
        actual: Option<Box<Digest>>,
    },
    /// No space or no quota is left.
    #[error("no space left on the file system, or quota exceeded")]
    NoSpace,
    /// There is space, but it is to stay free.
    #[error("{0}")]
    LowSpace(Box<Shortage>),
    /// The file system or the directory does not let us write.
    #[error("not writable")]
    ReadOnly,
    /// Something else lies there that must not be removed.
    #[error("{0}")]
    Conflict(&'static str),
    /// The file to copy from is not the one that was recorded.
    #[error("the file to copy from has changed")]
    SourceChanged,
    /// The directory may not be an output root.
    #[error("not allowed as an output root: {0}")]
    NotAllowed(String),
    /// A fault of our own.
    #[error("internal error: {0}")]
    Internal(String),
    /// Anything else that the system says.
    #[error("I/O error")]
    Io,
}

/// A failed operation: what, on which path, and the system's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("failed to {operation} {path:?}: {kind}{}", self.system())]
pub struct PlaceError {
    /// Kind of the error, for decisions.
    pub kind: PlaceErrorKind,
    /// What was tried, such as `create`.
    pub operation: &'static str,
    /// On which path: below the root for outputs, absolute for roots.
    pub path: PathBuf,
    /// The system's error number, where it gave one.
    pub errno: Option<i32>,
}

impl PlaceError {
    /// An error that is not the system's.
    pub fn new(operation: &'static str, path: impl AsRef<Path>, kind: PlaceErrorKind) -> Self {
        Self {
            kind,
            operation,
            path: path.as_ref().to_owned(),
            errno: None,
        }
    }

    /// An error of the system's.
    pub(super) fn system_error(operation: &'static str, path: impl AsRef<Path>, errno: Errno) -> Self {
        let kind = match errno {
            Errno::NOSPC | Errno::DQUOT | Errno::FBIG => PlaceErrorKind::NoSpace,
            Errno::ROFS | Errno::ACCESS | Errno::PERM => PlaceErrorKind::ReadOnly,
            Errno::ISDIR | Errno::NOTEMPTY => {
                PlaceErrorKind::Conflict("a non-empty directory is in its place")
            }
            Errno::NOTDIR => {
                PlaceErrorKind::Conflict("a file is in the place of one of its parent directories")
            }
            _ => PlaceErrorKind::Io,
        };
        Self {
            errno: Some(errno.raw_os_error()),
            ..Self::new(operation, path, kind)
        }
    }

    pub(super) fn mismatch(path: impl AsRef<Path>, expected: &Digest, actual: Option<Digest>) -> Self {
        let kind = PlaceErrorKind::Mismatch {
            expected: Box::new(expected.clone()),
            actual: actual.map(Box::new),
        };
        Self::new("verify", path, kind)
    }

    pub(super) fn superseded(path: impl AsRef<Path>) -> Self {
        Self::new("publish", path, PlaceErrorKind::Superseded)
    }

    /// Whether there is no room. What is to stay free by a user's own word is another matter.
    pub(crate) fn is_out_of_space(&self) -> bool {
        match &self.kind {
            PlaceErrorKind::NoSpace => true,
            PlaceErrorKind::LowSpace(shortage) => shortage.is_of_nothing(),
            _ => false,
        }
    }

    /// A fault of our own, such as a thread that is gone.
    pub(in crate::materialize) fn internal(what: &str) -> Self {
        Self::new("place", "", PlaceErrorKind::Internal(what.to_owned()))
    }

    /// Whether a newer invocation has begun.
    pub(crate) const fn is_superseded(&self) -> bool {
        matches!(self.kind, PlaceErrorKind::Superseded)
    }

    /// Whether the bytes were not those of the digest.
    pub(crate) const fn is_mismatch(&self) -> bool {
        matches!(self.kind, PlaceErrorKind::Mismatch { .. })
    }

    /// Whether there is no space for it, or none that may be used.
    pub(crate) const fn is_about_space(&self) -> bool {
        matches!(self.kind, PlaceErrorKind::LowSpace(_) | PlaceErrorKind::NoSpace)
    }

    /// Whether there is space, but none for what is optional.
    pub(in crate::materialize) fn is_for_required_only(&self) -> bool {
        matches!(&self.kind, PlaceErrorKind::LowSpace(shortage) if shortage.is_optional)
    }

    pub(super) fn is_errno(&self, errno: Errno) -> bool {
        self.errno == Some(errno.raw_os_error())
    }

    /// The system's words after a colon, or nothing.
    fn system(&self) -> String {
        self.errno
            .map(|errno| format!(": {}", io::Error::from_raw_os_error(errno)))
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;

    #[test]
    fn errors_say_what_failed_on_what_and_why() {
        let error = PlaceError::system_error("create", "bazel-out/a", Errno::NOSPC);
        assert_eq!(error.kind, PlaceErrorKind::NoSpace);
        let text = error.to_string();
        assert!(
            text.starts_with("failed to create \"bazel-out/a\": no space left"),
            "{text}"
        );
        assert!(text.contains("os error 28"), "{text}");

        for full in [Errno::DQUOT, Errno::FBIG] {
            let error = PlaceError::system_error("write", "a", full);
            assert!(error.is_about_space(), "{error}");
            assert!(error.to_string().contains("quota"), "{error}");
        }

        let digest = Digest::of(DigestFunction::Sha256, b"x");
        let error = PlaceError::mismatch("a", &digest, Some(Digest::of(DigestFunction::Sha256, b"y")));
        assert!(error.to_string().contains(&digest.to_string()), "{error}");
        assert!(
            PlaceError::mismatch("a", &digest, None)
                .to_string()
                .contains("more bytes")
        );
    }
}
