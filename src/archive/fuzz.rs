//! What the fuzz targets run of this room: see [`crate::fuzzing`].

use std::{
    fs,
    path::{Component, Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use super::{
    Archive, Existing, Format, Limits, Mode, OnConflict, Staging, StagingOptions, unpack, unpack_zip,
};
use crate::{
    fuzzing::{file_of, first},
    removal::remove_all,
};

/// Few enough of everything for thousands of runs a second.
const LIMITS: Limits = Limits([200, 1 << 20, 200, 32, 16 << 10, 16 << 10, 16 << 20, 1 << 20]);

/// A tar; the first byte says how it is compressed, and what is done with it.
pub(crate) fn tar(data: &[u8]) {
    let (choice, data) = first(data);
    let format = [Format::Tar, Format::TarGz, Format::TarZst, Format::TarXz][usize::from(choice & 3)];
    let mode = if choice & 4 == 0 {
        Mode::Extract {
            strip_components: u32::from(choice >> 4 & 1),
        }
    } else {
        Mode::Flatten
    };
    run(choice, format, &mode, |archive, staging| {
        unpack(data, archive, staging).is_ok()
    });
}

/// A zip.
pub(crate) fn zip(data: &[u8]) {
    let (choice, data) = first(data);
    let mode = Mode::Extract {
        strip_components: u32::from(choice >> 4 & 1),
    };
    let (file, _) = file_of(data);
    run(choice, Format::Zip, &mode, |archive, staging| {
        unpack_zip(&file, archive, staging).is_ok()
    });
}

/// A directory of this run's own.
struct Scratch(PathBuf);

impl Scratch {
    #[allow(clippy::expect_used, reason = "without it there is nothing to run")]
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("outhaul-fuzz-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).expect("a temporary directory");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = remove_all(&self.0);
    }
}

/// Unpacks something, and publishes it if that went well: then all links lead inside, and otherwise there is nothing.
#[allow(clippy::expect_used, reason = "a finding")]
fn run(choice: u8, format: Format, mode: &Mode, unpack: impl Fn(&Archive<'_>, &Staging) -> bool) {
    let scratch = Scratch::new();
    let target = scratch.0.join("t");
    let options = StagingOptions {
        existing: Existing::Replace,
        on_conflict: if choice & 8 == 0 {
            OnConflict::Fail
        } else {
            OnConflict::Last
        },
        unsafe_links: false,
        lists: false,
    };
    let staging = Staging::open(&target, options).expect("a staging directory");
    let archive = Archive {
        name: "a",
        order: 0,
        format,
        mode,
        below: "",
        limits: &LIMITS,
    };
    if unpack(&archive, &staging) {
        staging.publish().expect("nothing is in the way");
        leads_inside(&target);
    } else {
        drop(staging);
    }
    let left = fs::read_dir(&scratch.0).expect("it is there").flatten();
    assert!(left.map(|entry| entry.file_name()).all(|name| name == "t"));
}

/// Sees to it that no symlink in a directory leads out of it, by resolving each as the system would.
#[allow(clippy::expect_used, reason = "a finding")]
fn leads_inside(root: &Path) {
    let mut directories = vec![(root.to_owned(), 0_usize)];
    while let Some((directory, depth)) = directories.pop() {
        for entry in fs::read_dir(&directory).expect("it is there").flatten() {
            let kind = entry.file_type().expect("it is there");
            if kind.is_dir() {
                directories.push((entry.path(), depth + 1));
            } else if kind.is_symlink() {
                let target = fs::read_link(entry.path()).expect("it is there");
                let up = target.components().filter(|part| *part == Component::ParentDir);
                assert!(!target.is_absolute() && up.count() <= depth, "{target:?}");
                if let Ok(end) = fs::canonicalize(entry.path()) {
                    assert!(
                        end.starts_with(fs::canonicalize(root).expect("it is there")),
                        "{end:?}"
                    );
                }
            } else {
                assert!(kind.is_file());
            }
        }
    }
}
