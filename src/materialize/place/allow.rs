//! Which directories may be an output root.

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Component, Path, PathBuf},
};

use rustix::fs::{self, FileType, Mode, OFlags, ResolveFlags};

use super::{
    error::{PlaceError, PlaceErrorKind},
    root::OutputRoot,
};

/// What Bazel, in every version, calls the directory in its output base that exec roots lie in.
const EXEC_ROOTS: &str = "execroot";

/// Who may write where.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Allowance<'a> {
    /// The directories of `--allow-exec-root`.
    pub listed: &'a [PathBuf],
    /// The user has said by `--path-map` that this very directory is an exec root.
    pub is_mapped: bool,
    /// Whose directories may be written into.
    pub uid: u32,
}

/// Checks that a directory, as a stream names it, may be written into.
///
/// Without an allow-list, any directory that looks like an exec root, `…/execroot/NAME` with links resolved, and that
/// the user owns, if neither it nor one above it can be changed by every user of the machine (a sticky one such as
/// `/tmp` cannot, as far as others' entries go); with one, any directory that is in it or below one of its entries,
/// whatever it is and anyone who owns it. Never `/`, a home directory itself, or a directory that holds homes. What
/// does not exist yet is judged by the nearest directory that does.
///
/// # Errors
/// With [`PlaceErrorKind::NotAllowed`] and the reason; or when the path cannot be resolved.
pub(crate) fn is_allowed_root(path: &Path, allowance: Allowance<'_>) -> Result<(), PlaceError> {
    judge(path, None, allowance, &homes())
}

/// The same of a root that is open: where it lies, and whose it is, is asked of the descriptor. What was at the path
/// when that was checked may be another directory by now.
///
/// # Errors
/// As [`is_allowed_root`].
pub(crate) fn is_allowed_open(root: &OutputRoot, allowance: Allowance<'_>) -> Result<(), PlaceError> {
    let owner = root.owner()?;
    judge(&root.place()?, Some(owner), allowance, &homes())
}

/// No lookup of other users' homes: those are theirs, and refused by owner.
fn homes() -> Vec<PathBuf> {
    std::env::home_dir().into_iter().collect()
}

fn judge(
    path: &Path,
    owner: Option<u32>,
    allowance: Allowance<'_>,
    homes: &[PathBuf],
) -> Result<(), PlaceError> {
    let Allowance {
        listed,
        is_mapped,
        uid,
    } = allowance;
    const OPERATION: &str = "check output root";
    let refused = |reason: String| {
        Err(PlaceError::new(
            OPERATION,
            path,
            PlaceErrorKind::NotAllowed(reason),
        ))
    };
    if !path.is_absolute() {
        return refused("it is not an absolute path".to_owned());
    }
    if path.components().any(|c| matches!(c, Component::ParentDir)) {
        return refused("it has the component \"..\"".to_owned());
    }
    let io_error = |e: &std::io::Error| PlaceError::system_error(OPERATION, path, super::root::errno_of(e));
    let real = resolve(path).map_err(|e| io_error(&e))?;
    let mut near_home = homes.iter().filter_map(|home| resolve(home).ok());
    if real.parent().is_none() || near_home.any(|home| home.starts_with(&real)) {
        return refused(format!(
            "{real:?} is the root directory, or is or contains a home directory"
        ));
    }
    if !listed.is_empty() {
        let is_listed = listed
            .iter()
            .any(|a| resolve(a).is_ok_and(|a| real.starts_with(a)));
        return if is_listed {
            Ok(())
        } else {
            refused("it is not in a directory given with --allow-exec-root".to_owned())
        };
    }
    let existing = real.ancestors().find(|a| a.exists()).unwrap_or(&real);
    let owner = match owner {
        Some(owner) => owner,
        None => existing.metadata().map_err(|e| io_error(&e))?.uid(),
    };
    if owner != uid {
        return refused(format!(
            "{existing:?} belongs to user {owner}, not to user {uid}; allow it with --allow-exec-root"
        ));
    }
    for directory in existing.ancestors() {
        let mode = directory.metadata().map_err(|e| io_error(&e))?.mode();
        if mode & 0o1002 == 0o002 {
            return refused(format!(
                "every user of this machine can write to {directory:?} (mode {:04o}); remove that permission, \
                 or allow the directory with --allow-exec-root",
                mode & 0o7777
            ));
        }
    }
    if !is_mapped && !looks_like_exec_root(&real) {
        return refused(format!(
            "{real:?} does not look like a Bazel exec root, which is in a directory named \"{EXEC_ROOTS}\"; if \
             it is one, allow it with --allow-exec-root"
        ));
    }
    Ok(())
}

/// Whether a directory is where Bazel has its exec roots.
pub(crate) fn looks_like_exec_root(path: &Path) -> bool {
    let above = path.parent().and_then(Path::file_name);
    above.is_some_and(|name| name == EXEC_ROOTS)
}

/// What is at a path below a directory that others may write into: its type, and its size. Nothing is opened, no link leads
/// out, and one at the path itself is not followed.
pub(crate) fn seen_beneath(directory: &Path, path: &str) -> Option<(FileType, u64)> {
    let at = OFlags::PATH | OFlags::CLOEXEC;
    let directory = fs::open(
        directory,
        at | OFlags::DIRECTORY | OFlags::NOFOLLOW,
        Mode::empty(),
    )
    .ok()?;
    let opened = fs::openat2(
        &directory,
        path,
        at | OFlags::NOFOLLOW,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
    );
    let stat = fs::fstat(opened.ok()?).ok()?;
    let size = u64::try_from(stat.st_size).ok()?;
    Some((FileType::from_raw_mode(stat.st_mode), size))
}

/// The path without symlinks; what does not exist is appended as it is.
pub(crate) fn resolve(path: &Path) -> std::io::Result<PathBuf> {
    for existing in path.ancestors() {
        match existing.canonicalize() {
            Ok(real) => {
                // What follows an ancestor is below it, so the prefix is always there.
                let rest = path.strip_prefix(existing).unwrap_or(Path::new(""));
                return Ok(real.components().chain(rest.components()).collect());
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(path.to_owned())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn allowance(listed: &[PathBuf], uid: u32) -> Allowance<'_> {
        Allowance {
            listed,
            is_mapped: false,
            uid,
        }
    }

    fn is_allowed_root(path: &Path, listed: &[PathBuf], uid: u32) -> Result<(), PlaceError> {
        super::is_allowed_root(path, allowance(listed, uid))
    }

    fn is_allowed_open(root: &OutputRoot, listed: &[PathBuf], uid: u32) -> Result<(), PlaceError> {
        super::is_allowed_open(root, allowance(listed, uid))
    }

    fn reason(result: Result<(), PlaceError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn a_directory_of_the_user_is_allowed_by_default_and_of_another_not() {
        let dir = tempfile::tempdir().unwrap();
        let me = fs::metadata(dir.path()).unwrap().uid();
        let root = dir.path().join("execroot/_main");
        fs::create_dir_all(&root).unwrap();
        is_allowed_root(&root, &[], me).unwrap();
        is_allowed_root(&dir.path().join("not/there/execroot/yet"), &[], me).unwrap();
        assert!(reason(is_allowed_root(&root, &[], me + 1)).contains("belongs to user"));
    }

    #[test]
    fn what_does_not_look_like_an_exec_root_is_none_unless_the_user_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let me = fs::metadata(dir.path()).unwrap().uid();
        let base = dir.path().join("base");
        let plain = [
            ".ssh",
            "src/.git",
            "src",
            ".config",
            "base",
            "base/execroot",
            "base/external/x",
            "base/execroot/_main/bazel-out",
            "execroots/_main",
        ];
        for name in plain {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        // A link's name alone does not make it one either.
        symlink(dir.path().join(".ssh"), base.join("execroot/link")).unwrap();
        fs::create_dir(dir.path().join("links")).unwrap();
        symlink(dir.path(), dir.path().join("links/execroot")).unwrap();
        for name in plain
            .into_iter()
            .chain(["base/execroot/link", "links/execroot/.ssh"])
        {
            let path = dir.path().join(name);
            let reported = reason(is_allowed_root(&path, &[], me));
            assert!(
                reported.contains("does not look like a Bazel exec root")
                    && reported.contains("--allow-exec-root"),
                "{name}: {reported}"
            );
            let open = OutputRoot::open(&path, false).unwrap();
            reason(is_allowed_open(&open, &[], me));
            is_allowed_root(&path, &[dir.path().to_owned()], me).unwrap();
            let mapped = Allowance {
                is_mapped: true,
                ..allowance(&[], me)
            };
            super::is_allowed_root(&path, mapped).unwrap();
        }
        is_allowed_root(&base.join("execroot/_main"), &[], me).unwrap();
        // By another way to it, it is.
        symlink(base.join("execroot/_main"), dir.path().join("way")).unwrap();
        is_allowed_root(&dir.path().join("way"), &[], me).unwrap();
    }

    #[test]
    fn neither_the_root_nor_homes_are_ever_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home/user");
        fs::create_dir_all(home.join("cache")).unwrap();
        symlink(&home, dir.path().join("link")).unwrap();
        let me = fs::metadata(dir.path()).unwrap().uid();
        let everything = [PathBuf::from("/")];
        let homes = [home.clone()];
        for path in [
            Path::new("/"),
            &home,
            &dir.path().join("home"),
            &dir.path().join("link"),
        ] {
            for allowed in [&[][..], &everything[..]] {
                assert!(
                    reason(judge(path, None, allowance(allowed, me), &homes)).contains("home"),
                    "{path:?}"
                );
            }
        }
        judge(
            &home.join("cache/execroot/_main"),
            None,
            allowance(&[], me),
            &homes,
        )
        .unwrap();
    }

    #[test]
    fn an_allow_list_is_matched_by_where_links_lead() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        fs::create_dir_all(inside.join("sub")).unwrap();
        fs::create_dir(&outside).unwrap();
        symlink(&outside, inside.join("link")).unwrap();
        let allowed = [inside.clone()];
        let nobody = u32::MAX - 1;
        is_allowed_root(&inside.join("sub"), &allowed, nobody).unwrap();
        assert!(
            reason(is_allowed_root(&inside.join("link"), &allowed, nobody)).contains("--allow-exec-root")
        );
        assert!(reason(is_allowed_root(&outside, &allowed, nobody)).contains("--allow-exec-root"));
    }

    #[test]
    fn relative_and_dotted_paths_are_refused() {
        assert!(reason(is_allowed_root(Path::new("a/b"), &[], 0)).contains("absolute"));
        assert!(reason(is_allowed_root(Path::new("/a/../b"), &[], 0)).contains("\"..\""));
    }

    #[test]
    fn a_directory_is_not_written_into_where_everybody_can_replace_it() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let me = fs::metadata(dir.path()).unwrap().uid();
        let (above, root) = (dir.path().join("above"), dir.path().join("above/execroot/root"));
        fs::create_dir_all(&root).unwrap();
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        for open in [&above, &root] {
            mode(open, 0o777);
            let reported = reason(is_allowed_root(&root, &[], me));
            assert!(
                reported.contains("0777") && reported.contains("--allow-exec-root"),
                "{reported}"
            );
            assert!(reason(is_allowed_root(&root.join("not/execroot/yet"), &[], me)).contains("0777"));
            // Who names it vouches for it.
            is_allowed_root(&root, std::slice::from_ref(&root), me).unwrap();
            // Users cannot remove or rename each other's entries.
            mode(open, 0o1777);
            is_allowed_root(&root, &[], me).unwrap();
            mode(open, 0o755);
        }
    }

    #[test]
    fn what_was_opened_is_judged_and_not_what_lies_at_its_path_now() {
        let dir = tempfile::tempdir().unwrap();
        let me = fs::metadata(dir.path()).unwrap().uid();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        fs::create_dir_all(inside.join("root")).unwrap();
        fs::create_dir_all(&outside).unwrap();
        let allowed = [inside.clone()];
        // Checked, and then another directory was put there before it was opened.
        let path = inside.join("root");
        is_allowed_root(&path, &allowed, me).unwrap();
        fs::remove_dir(&path).unwrap();
        symlink(&outside, &path).unwrap();
        let swapped = OutputRoot::open(&path, false).unwrap();
        assert!(reason(is_allowed_open(&swapped, &allowed, me)).contains("--allow-exec-root"));
        // Swapped back, so that a second look at the path would be deceived.
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(reason(is_allowed_open(&swapped, &allowed, me)).contains("--allow-exec-root"));
        let whose = reason(is_allowed_open(&swapped, &[], me + 1));
        assert!(whose.contains("belongs to user"), "{whose}");
        let right = OutputRoot::open(&path, false).unwrap();
        is_allowed_open(&right, &allowed, me).unwrap();
        // Taken away since: nothing is at its place that could be judged.
        fs::remove_dir(&path).unwrap();
        is_allowed_open(&right, &allowed, me).unwrap_err();
    }
}
