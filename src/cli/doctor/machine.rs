//! What the machine has: output base, space, clocks, file descriptors, FUSE. Nothing here leaves anything behind.

use std::{
    fs::File,
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rustix::fs::{Access, Mode, OFlags};

use super::finding::Finding;
use crate::{
    materialize::place::{Mark, resolve},
    roots::RootRules,
    units::{show_duration, show_size},
};

/// How far clocks may be apart. Tokens and certificates count in minutes.
const SKEW: Duration = Duration::from_secs(60);
/// Descriptors with which a daemon works well; a build needs some hundreds.
const DESCRIPTORS: u64 = 4096;

/// The output base of a workspace whose Bazel cannot be asked: where its `bazel-out` leads, if it is as Bazel makes it.
pub(super) fn output_base(workspace: &Path) -> Option<PathBuf> {
    // …/execroot/NAME/bazel-out
    let link = std::fs::read_link(workspace.join("bazel-out")).ok()?;
    let roots = link.parent()?.parent()?;
    let base = roots
        .parent()
        .filter(|_| roots.file_name().is_some_and(|name| name == "execroot"))?;
    // `bazel clean --expunge` leaves the link.
    base.is_dir().then(|| base.to_owned())
}

/// Whether outputs can be written below an output base.
pub(super) fn output_base_access(base: &Path, rules: &RootRules) -> Finding {
    const CODE: &str = "output-base";
    let refused = |reason: String| {
        Finding::error(
            CODE,
            format!("outhaul cannot write outputs: {reason}"),
            "run outhaul as the user who builds; if the build runs in another mount namespace, see --path-map; for \
             directories of others, --allow-exec-root",
        )
    };
    if let Err(error) = rules.allows(base) {
        return refused(error.to_string());
    }
    let here = rules.translate(&base.to_string_lossy());
    let roots = here.join("execroot").read_dir().into_iter().flatten().flatten();
    let places =
        std::iter::once(here.clone()).chain(roots.map(|entry| entry.path()).filter(|path| path.is_dir()));
    for place in places {
        if let Err(errno) = rustix::fs::access(&place, Access::WRITE_OK | Access::EXEC_OK) {
            return refused(format!("{}: {errno}", place.display()));
        }
    }
    Finding::ok(
        CODE,
        format!("outhaul can write to the output base {}", here.display()),
    )
}

/// Whether there is room for downloads on the file system of a directory, by `--min-free-space`.
pub(super) fn space(directory: &Path, mark: Mark) -> Option<Finding> {
    const CODE: &str = "disk-space";
    let existing = File::open(nearest(directory)?).ok()?;
    let free = rustix::fs::fstatvfs(&existing).ok()?;
    let fix = "free some space (`outhaul du` shows what outputs take, `outhaul evict` removes old ones), or set a smaller \
               --min-free-space";
    if free.f_files > 0 && free.f_favail == 0 {
        return Some(Finding::error(
            CODE,
            format!("the file system of {} has no inodes left", directory.display()),
            fix,
        ));
    }
    Some(if let Some(shortage) = mark.shortage(&existing, false) {
        Finding::error(
            CODE,
            format!("nothing is downloaded to {}: {shortage}", directory.display()),
            fix,
        )
    } else if let Some(shortage) = mark.shortage(&existing, true) {
        Finding::warning(
            CODE,
            format!(
                "no optional output is downloaded to {}: {shortage}",
                directory.display()
            ),
            fix,
        )
    } else {
        let free = free.f_bavail.saturating_mul(free.f_frsize);
        Finding::ok(CODE, format!("{} free for outputs", show_size(free)))
    })
}

/// The nearest directory above that is there.
pub(super) fn nearest(directory: &Path) -> Option<PathBuf> {
    let real = resolve(directory).ok()?;
    real.ancestors().find(|above| above.is_dir()).map(Path::to_owned)
}

/// What a file system's clock says now, by a file without a name.
pub(super) fn file_time(directory: &Path) -> Option<SystemTime> {
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open(nearest(directory)?, flags, Mode::RUSR | Mode::WUSR).ok()?;
    let file = File::from(file);
    rustix::io::write(&file, b"\n").ok()?;
    file.metadata().ok()?.modified().ok()
}

/// Whether two clocks agree.
pub(super) fn clock(whose: &str, theirs: SystemTime, ours: SystemTime) -> Finding {
    const CODE: &str = "clock";
    let (apart, word) = match theirs.duration_since(ours) {
        Ok(apart) => (apart, "ahead of"),
        Err(error) => (error.duration(), "behind"),
    };
    if apart <= SKEW {
        return Finding::ok(CODE, format!("the clock of {whose} agrees with this machine's"));
    }
    Finding::warning(
        CODE,
        format!(
            "the clock of {whose} is {} {word} this machine's",
            show_duration(apart)
        ),
        "set the clocks by NTP: with wrong ones, tokens and certificates are refused and files look newer than they are",
    )
}

/// How many files may be open; nothing is no limit.
pub(super) fn descriptors(most: Option<u64>) -> Finding {
    const CODE: &str = "descriptors";
    match most {
        Some(most) if most < DESCRIPTORS => Finding::warning(
            CODE,
            format!(
                "this process may open {most} files at most; many connections and output trees need more"
            ),
            format!(
                "raise the hard limit to {DESCRIPTORS} or more: ulimit -Hn, or LimitNOFILE= of the service"
            ),
        ),
        Some(most) => Finding::ok(CODE, format!("{most} files may be open")),
        None => Finding::ok(CODE, "any number of files may be open"),
    }
}

/// Whether FUSE's device can be opened.
pub(super) fn fuse_device() -> io::Result<()> {
    let options = OFlags::RDWR | OFlags::CLOEXEC;
    Ok(rustix::fs::open("/dev/fuse", options, Mode::empty()).map(drop)?)
}

/// Whether `outhaul mount` works.
pub(super) fn fuse(device: io::Result<()>, has_helper: bool, is_root: bool) -> Finding {
    const CODE: &str = "fuse";
    match device {
        Err(error) => Finding::note(
            CODE,
            format!("`outhaul mount` does not work here: failed to open /dev/fuse: {error}"),
            "load the kernel module fuse; in a container, pass --device /dev/fuse and the right to mount",
        ),
        Ok(()) if !has_helper && !is_root => Finding::note(
            CODE,
            "`outhaul mount` does not work for this user: there is no fusermount3 in PATH",
            "install the package fuse3",
        ),
        Ok(()) => Finding::ok(CODE, "FUSE is there for `outhaul mount`"),
    }
}

/// Whether a directory may be changed by this user, by its owner and mode; the reason if it may not.
pub(super) fn is_writable(directory: &Path) -> Result<(), String> {
    rustix::fs::access(directory, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK).map_err(|errno| {
        let owner = directory.metadata().map_or_else(
            |_| String::new(),
            |meta| {
                format!(
                    " (it belongs to user {}, mode {:04o})",
                    meta.uid(),
                    meta.mode() & 0o7777
                )
            },
        );
        format!("{}: {errno}{owner}", directory.display())
    })
}

#[cfg(test)]
mod tests {
    use super::{super::finding::Level, *};

    #[test]
    fn the_output_base_is_where_bazel_out_leads() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(output_base(dir.path()), None);
        let link = dir.path().join("bazel-out");
        let base = dir.path().join("ob");
        std::os::unix::fs::symlink(base.join("execroot/_main/bazel-out"), &link).unwrap();
        assert_eq!(output_base(dir.path()), None);
        std::fs::create_dir(&base).unwrap();
        assert_eq!(output_base(dir.path()), Some(base));
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("/somewhere/else", &link).unwrap();
        assert_eq!(output_base(dir.path()), None);
    }

    #[test]
    fn an_output_base_of_ours_is_writable_and_one_that_is_not_allowed_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        let rules = RootRules::default();
        let level = |rules: &RootRules| output_base_access(&base, rules).level;
        assert_eq!(
            level(&rules),
            Level::Error,
            "Bazel's server would have files there"
        );
        std::fs::create_dir_all(base.join("execroot/_main")).unwrap();
        assert_eq!(level(&rules), Level::Ok);
        let elsewhere = RootRules {
            allowed: vec!["/elsewhere".into()],
            ..RootRules::default()
        };
        assert_eq!(level(&elsewhere), Level::Error);
    }

    #[test]
    fn an_exec_root_that_is_closed_to_us_is_an_error() {
        crate::unprivileged::run(
            "cli::doctor::machine::tests::an_exec_root_that_is_closed_to_us_is_an_error",
            |dir| {
                use std::os::unix::fs::PermissionsExt as _;
                let root = dir.join("base/execroot/_main");
                std::fs::create_dir_all(&root).unwrap();
                std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o555)).unwrap();
                let found = output_base_access(&dir.join("base"), &RootRules::default());
                assert_eq!(found.level, Level::Error);
                assert!(found.message.contains("_main"), "{}", found.message);
                assert!(is_writable(&root).unwrap_err().contains("mode 0555"));
            },
        );
    }

    #[test]
    fn space_is_judged_by_the_mark_wherever_the_directory_will_be() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("not/there");
        for (mark, level) in [
            (Mark::NOTHING, Level::Ok),
            (Mark::Amount(u64::MAX), Level::Error),
            (Mark::Part(10_000), Level::Error),
        ] {
            assert_eq!(space(&below, mark).unwrap().level, level, "{mark:?}");
        }
    }

    #[test]
    fn clocks_a_minute_apart_are_worth_a_warning() {
        let ours = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for (theirs, level, part) in [
            (ours, Level::Ok, "agrees"),
            (ours + Duration::from_secs(60), Level::Ok, "agrees"),
            (ours + Duration::from_secs(61), Level::Warning, "ahead of"),
            (ours - Duration::from_secs(3600), Level::Warning, "behind"),
        ] {
            let found = clock("the cache", theirs, ours);
            assert_eq!(found.level, level);
            assert!(found.message.contains(part), "{}", found.message);
        }
        let dir = tempfile::tempdir().unwrap();
        if let Some(theirs) = file_time(dir.path()) {
            assert_eq!(clock("here", theirs, SystemTime::now()).level, Level::Ok);
        }
        assert_eq!(dir.path().read_dir().unwrap().count(), 0);
    }

    #[test]
    fn few_descriptors_are_worth_a_warning() {
        for (most, level) in [
            (Some(1024), Level::Warning),
            (Some(DESCRIPTORS), Level::Ok),
            (None, Level::Ok),
        ] {
            assert_eq!(descriptors(most).level, level, "{most:?}");
        }
    }

    #[test]
    fn what_a_mount_needs_is_a_device_and_for_others_than_root_a_helper() {
        let missing = || Err(io::Error::from(io::ErrorKind::NotFound));
        for (device, has_helper, is_root, level) in [
            (Ok(()), true, false, Level::Ok),
            (Ok(()), false, true, Level::Ok),
            (Ok(()), false, false, Level::Note),
            (missing(), true, true, Level::Note),
        ] {
            assert_eq!(fuse(device, has_helper, is_root).level, level);
        }
    }
}
