//! From a path as the user sees it to one that the record knows.

use std::{
    fs::{File, OpenOptions},
    io,
    path::{Component, Path, PathBuf},
};

use super::exit::Failure;

/// Makes a user's path absolute and follows the links on its way (`bazel-bin` and its like), but not what it names
/// itself: that may be an output that is a link, or not there at all. One of these links alone stands for the directory that
/// it leads to. An exec path (`bazel-out/…`) that leads nowhere
/// from here is left as it is.
pub(super) fn resolve(path: &Path) -> io::Result<PathBuf> {
    let absolute = plain(&std::path::absolute(path)?);
    let Some((parent, name)) = absolute.parent().zip(absolute.file_name()) else {
        return Ok(absolute);
    };
    // The longest part that is there; outputs' own directories may not be.
    for known in parent.ancestors() {
        if let Ok(real) = known.canonicalize() {
            let rest = parent.strip_prefix(known).unwrap_or(Path::new(""));
            let resolved = real.join(rest).join(name);
            if is_recorded(&resolved) {
                return Ok(resolved);
            }
            let led = resolved.canonicalize().ok();
            if let Some(led) = led.filter(|led| is_recorded(led) && led.is_dir()) {
                return Ok(led);
            }
            let lost = path.starts_with("bazel-out");
            return Ok(if lost { path.to_owned() } else { resolved });
        }
    }
    Ok(absolute)
}

/// Whether outputs may be recorded there.
fn is_recorded(path: &Path) -> bool {
    path.iter().any(|component| component == "execroot")
}

/// The workspace that a directory is in, as Bazel finds it: the nearest one above that has one of its files.
pub(super) fn workspace_around(directory: &Path) -> Option<PathBuf> {
    let marks = ["MODULE.bazel", "REPO.bazel", "WORKSPACE.bazel", "WORKSPACE"];
    directory
        .ancestors()
        .find(|above| marks.iter().any(|mark| above.join(mark).is_file()))
        .map(Path::to_owned)
}

/// A path for a message.
pub(super) fn text(path: &Path, flag: &str) -> Result<String, Failure> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| Failure::usage(format!("{flag}={}: not UTF-8", path.display())))
}

/// The workspace that a directory which a flag names is in, as Bazel names it: its real path. One of another machine is not
/// here to be looked at.
pub(super) fn recorded_workspace(named: Option<&Path>) -> Result<String, Failure> {
    let Some(named) = named else {
        return Ok(String::new());
    };
    let Ok(real) = named.canonicalize() else {
        // A worktree that was removed is not the repository around it.
        return text(&std::path::absolute(named)?, "--workspace");
    };
    text(&workspace_around(&real).unwrap_or(real), "--workspace")
}

/// Without `..`, by the letter: as a user reads it.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                plain.pop();
            }
            other => plain.push(other),
        }
    }
    plain
}

/// A device, a pipe or the like that is named as the file to write, opened: it is written into, and never replaced by a
/// file.
pub(super) fn special(path: &Path) -> io::Result<Option<File>> {
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() && !found.is_dir() => {
            OpenOptions::new().write(true).open(path).map(Some)
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_workspace_above_is_the_one() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("outer/inner/pkg");
        std::fs::create_dir_all(&deep).unwrap();
        // A directory of that name is not a mark.
        std::fs::create_dir(deep.join("WORKSPACE")).unwrap();
        assert_eq!(workspace_around(&deep), None);
        std::fs::write(dir.path().join("outer/WORKSPACE"), "").unwrap();
        assert_eq!(workspace_around(&deep), Some(dir.path().join("outer")));
        std::fs::write(dir.path().join("outer/inner/MODULE.bazel"), "").unwrap();
        assert_eq!(workspace_around(&deep), Some(dir.path().join("outer/inner")));
    }

    #[test]
    fn links_on_the_way_are_followed_and_the_output_itself_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        let bin = base.join("ob/execroot/_main/bazel-out/k8/bin");
        std::fs::create_dir_all(&bin).unwrap();
        std::os::unix::fs::symlink(&bin, base.join("bazel-bin")).unwrap();
        std::os::unix::fs::symlink("elsewhere", bin.join("link")).unwrap();
        std::os::unix::fs::symlink(base.join("ob/execroot/_main/bazel-out"), base.join("bazel-out")).unwrap();
        assert_eq!(resolve(&base.join("bazel-bin")).unwrap(), bin);
        assert_eq!(resolve(&base.join("bazel-out/k8/bin")).unwrap(), bin);
        assert_eq!(
            resolve(&base.join("bazel-out")).unwrap(),
            base.join("ob/execroot/_main/bazel-out")
        );
        for (asked, expected) in [
            ("bazel-bin/link", "link"),
            ("bazel-bin/not/there/yet", "not/there/yet"),
            ("bazel-bin/x/../link", "link"),
            ("bazel-bin/./link", "link"),
        ] {
            assert_eq!(resolve(&base.join(asked)).unwrap(), bin.join(expected), "{asked}");
        }
        assert_eq!(
            resolve(Path::new("bazel-out/k8/bin/x")).unwrap(),
            Path::new("bazel-out/k8/bin/x")
        );
    }
}
