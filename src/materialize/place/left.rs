//! A root that is closed in the middle of a build, and opened again for it.
//!
//! As long as a root is open, the numbers of its inodes cannot be given to other directories. What is kept in the place
//! of the descriptors also has the time at which each directory was made, which no directory that gets its number
//! later can share.

use rustix::fs::{self, AtFlags, StatxFlags};

use super::{
    error::{PlaceError, PlaceErrorKind},
    leaning::Leaning,
    root::{BuildTree, OutputRoot},
    sys::{self, Inode},
};

/// What is kept of a root in the middle of a build.
pub struct Left {
    root: Known,
    build_tree: LeftTree,
    leaning: Leaning,
}

/// A directory, known without a descriptor.
#[derive(PartialEq)]
struct Known {
    inode: Inode,
    /// Seconds and nanoseconds, where the file system has them.
    made: Option<(i64, u32)>,
}

/// What was known of `bazel-out`: see [`BuildTree`].
enum LeftTree {
    Unguarded,
    Held(Known),
    Fresh,
    Gone,
}

fn known(fd: impl std::os::fd::AsFd) -> rustix::io::Result<Known> {
    let inode = sys::inode(&fs::fstat(&fd)?);
    let made = fs::statx(&fd, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME).ok();
    let made = made.filter(|stat| stat.stx_mask & StatxFlags::BTIME.bits() != 0);
    Ok(Known {
        inode,
        made: made.map(|stat| (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec)),
    })
}

impl OutputRoot {
    /// What is to be kept while the root may be closed, for the build that has begun.
    ///
    /// # Errors
    /// When its directories cannot be looked at.
    pub fn leave(&self) -> Result<Left, PlaceError> {
        let error = |errno| PlaceError::system_error("stat output root", self.path(), errno);
        let build_tree = self.build_tree.read();
        let build_tree = match &*build_tree {
            BuildTree::Unguarded => LeftTree::Unguarded,
            BuildTree::Held { fd, .. } => LeftTree::Held(known(fd).map_err(error)?),
            BuildTree::Fresh => LeftTree::Fresh,
            BuildTree::Gone => LeftTree::Gone,
        };
        Ok(Left {
            root: known(self).map_err(error)?,
            build_tree,
            leaning: self.aliases.leaning(),
        })
    }

    /// The build goes on in this root, which was opened again: in the place of [`begin_build`](Self::begin_build).
    ///
    /// # Errors
    /// When it is another directory, or cannot be read.
    pub fn come_back(&self, left: Left) -> Result<(), PlaceError> {
        let error = |errno| PlaceError::system_error("stat output root", self.path(), errno);
        if known(self).map_err(error)? != left.root {
            let kind = PlaceErrorKind::RootGone("it was deleted or replaced");
            return Err(PlaceError::new("open output root", self.path(), kind));
        }
        self.modes.forget();
        self.aliases.lean_again(left.leaning);
        let mut build_tree = self.build_tree.write();
        *build_tree = match left.build_tree {
            LeftTree::Unguarded => BuildTree::Unguarded,
            LeftTree::Fresh => self.hold_build_tree()?.unwrap_or(BuildTree::Fresh),
            LeftTree::Gone => BuildTree::Gone,
            LeftTree::Held(before) => match self.hold_build_tree()? {
                Some(BuildTree::Held { fd, inode }) if known(&fd).map_err(error)? == before => {
                    BuildTree::Held { fd, inode }
                }
                _ => BuildTree::Gone,
            },
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_goes_on_in_its_own_root_and_bazel_out_and_in_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let (path, out) = (dir.path().join("root"), dir.path().join("root/bazel-out"));
        let open = || OutputRoot::open(&path, false).unwrap();
        let make = || std::fs::create_dir_all(&path).unwrap();
        let remove = |what| std::fs::remove_dir_all(what).unwrap();
        let goes_on = |between: &dyn Fn()| {
            let left = open().leave().unwrap();
            between();
            let root = open();
            root.come_back(left)
                .and_then(|()| root.guard("bazel-out/x"))
                .is_ok()
        };
        make();
        assert!(!goes_on(&|| {}), "there is no bazel-out");
        std::fs::create_dir(&out).unwrap();
        assert!(goes_on(&|| {}));
        // The numbers of these are given again at once on some file systems.
        for _ in 0..20 {
            assert!(!goes_on(&|| {
                remove(&out);
                std::fs::create_dir(&out).unwrap();
            }));
            assert!(!goes_on(&|| {
                remove(&path);
                make();
                std::fs::create_dir(&out).unwrap();
            }));
        }
        assert!(!goes_on(&|| remove(&out)));
        assert!(!goes_on(&|| std::fs::create_dir(&out).unwrap()), "it was gone");

        remove(&out);
        let root = open();
        root.begin_build(true).unwrap();
        let left = root.leave().unwrap();
        drop(root);
        let root = open();
        root.come_back(left).unwrap();
        root.guard("bazel-out/x").unwrap();
        std::fs::create_dir(&out).unwrap();
        root.guard("bazel-out/x").unwrap();
    }
}
