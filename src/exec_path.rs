//! Paths below an exec root that cannot lead out of it.

use std::{borrow::Borrow, fmt, path::Path, str::FromStr, sync::Arc};

/// The directory in an exec root that `bazel clean` deletes and every build fills.
pub(crate) const BUILD_TREE: &str = "bazel-out";

/// The longest path, and the longest name, that Linux takes.
const PATH_MAX: usize = 4095;
const NAME_MAX: usize = 255;

/// A relative path of plain components: no `..`, no `.`, no empty one, no NUL, within the system's lengths.
///
/// Cheap to clone. Ordered by bytes, so that a directory's files lie together.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExecPath(Arc<str>);

/// Why a text is not an exec path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path:?} is not a valid path in an exec root: {reason}")]
pub struct ExecPathError {
    /// The invalid path.
    pub path: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl ExecPath {
    /// Checks a path.
    ///
    /// # Errors
    /// When the path is absolute, empty, too long, or has a component that is empty, `.`, `..` or holds a NUL.
    pub fn new(path: &str) -> Result<Self, ExecPathError> {
        check(path)?;
        Ok(Self(path.into()))
    }

    /// The same without a copy.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn shared(path: &Arc<str>) -> Result<Self, ExecPathError> {
        check(path)?;
        Ok(Self(path.clone()))
    }

    /// The path as text, with `/` between components.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path for the file system.
    pub fn as_path(&self) -> &Path {
        Path::new(&*self.0)
    }

    /// The last component.
    pub fn file_name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }

    /// The directory it lies in, or `None` for a path of one component.
    pub fn parent(&self) -> Option<&str> {
        self.0.rsplit_once('/').map(|(dir, _)| dir)
    }

    /// The components, first to last.
    pub fn components(&self) -> impl Iterator<Item = &str> {
        self.0.split('/')
    }

    /// Whether `dir` is this path or one of its parents.
    pub fn starts_with(&self, dir: &str) -> bool {
        self.0
            .strip_prefix(dir)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// This path with one more below it.
    ///
    /// # Errors
    /// When `below` is not an exec path itself, or the whole becomes too long.
    pub fn join(&self, below: &str) -> Result<Self, ExecPathError> {
        Self::new(&format!("{}/{below}", self.0))
    }
}

/// Whether a name is one that Outhaul keeps for its own files: `.outhaul`, `.outhaul-tmp`, `.outhaul-newest.…`. In any
/// case, since some file systems make no difference.
pub fn is_reserved(name: &str) -> bool {
    const OURS: &[u8] = b".outhaul";
    name.as_bytes()
        .split_at_checked(OURS.len())
        .is_some_and(|(start, rest)| {
            start.eq_ignore_ascii_case(OURS) && matches!(rest.first(), None | Some(b'-'))
        })
}

/// Whether a path is right at first sight, as nearly all of a build's million are: short, without NUL, no component
/// empty or with a dot in front. In one pass without branches.
fn is_plain(path: &[u8]) -> bool {
    let (Some(first), Some(last)) = (path.first(), path.last()) else {
        return false;
    };
    let odd = path
        .windows(2)
        .map(|pair| (pair[0] == 0) | ((pair[0] == b'/') & ((pair[1] == b'/') | (pair[1] == b'.'))))
        .fold(false, |odd, it| odd | it);
    path.len() <= NAME_MAX && !odd && !matches!(first, b'/' | b'.') && !matches!(last, b'/' | 0)
}

/// Whether a text is an exec path, and if not, why.
fn check(path: &str) -> Result<(), ExecPathError> {
    if is_plain(path.as_bytes()) {
        return Ok(());
    }
    let error = |reason| ExecPathError {
        path: path.to_owned(),
        reason,
    };
    if path.starts_with('/') {
        return Err(error("it is absolute"));
    }
    if path.len() > PATH_MAX {
        return Err(error("it is longer than 4095 bytes"));
    }
    for component in path.split('/') {
        match component {
            "" => return Err(error("it has an empty component")),
            "." => return Err(error("it has the component \".\"")),
            ".." => return Err(error("it has the component \"..\"")),
            c if c.len() > NAME_MAX => return Err(error("it has a component longer than 255 bytes")),
            c if c.contains('\0') => return Err(error("it contains a NUL byte")),
            _ => {}
        }
    }
    Ok(())
}

impl fmt::Display for ExecPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ExecPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

impl FromStr for ExecPath {
    type Err = ExecPathError;

    fn from_str(text: &str) -> Result<Self, ExecPathError> {
        Self::new(text)
    }
}

impl Borrow<str> for ExecPath {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for ExecPath {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn our_own_names_are_known_in_any_case() {
        for name in [
            ".outhaul",
            ".outhaul-tmp",
            ".outhaul-newest.ws",
            ".OutHaul-TMP",
            ".outhaul-",
        ] {
            assert!(is_reserved(name), "{name}");
        }
        for name in [
            "",
            "outhaul",
            ".outhau",
            ".outhaulish",
            ".outhaul.toml",
            "x.outhaul-tmp",
            ".\u{f6}uthaul",
        ] {
            assert!(!is_reserved(name), "{name}");
        }
    }

    #[test]
    fn escaping_paths_are_refused_with_a_reason() {
        let long_name = "n".repeat(256);
        let long_path = "abc/".repeat(1100) + "x";
        for (path, part) in [
            ("", "empty component"),
            ("/etc/passwd", "absolute"),
            ("a//b", "empty component"),
            ("a/", "empty component"),
            ("../a", "\"..\""),
            ("a/../../b", "\"..\""),
            ("a/./b", "\".\""),
            ("a\0b", "NUL"),
            (&long_name, "255"),
            (&long_path, "4095"),
        ] {
            let error = ExecPath::new(path).expect_err(path).to_string();
            assert!(error.contains(part), "{path:?}: {error}");
        }
    }

    #[test]
    fn prefixes_end_at_components() {
        let path = ExecPath::new("bazel-out/k8/bin/a/t.d/x").expect("valid");
        assert!(path.starts_with("bazel-out/k8/bin/a/t.d"));
        assert!(!path.starts_with("bazel-out/k8/bin/a/t"));
        assert_eq!(path.parent(), Some("bazel-out/k8/bin/a/t.d"));
        assert_eq!(path.file_name(), "x");
    }

    #[test]
    fn dots_in_front_are_not_dots_alone() {
        for path in ["a/.hidden/x", "..a/b", "...", "a/..b"] {
            let shared: Arc<str> = path.into();
            assert_eq!(
                ExecPath::new(path).expect(path),
                ExecPath::shared(&shared).expect(path)
            );
        }
    }

    proptest! {
        /// Whatever is accepted stays below the directory it is joined to.
        #[test]
        fn accepted_paths_never_escape(text in "[a./\0-]{0,24}") {
            if let Ok(path) = ExecPath::new(&text) {
                let joined = Path::new("/root").join(path.as_path());
                prop_assert!(joined.starts_with("/root"));
                prop_assert!(joined.components().all(|c| !matches!(c, std::path::Component::ParentDir)));
                prop_assert_eq!(path.as_str(), text);
            }
        }
    }
}
