//! When a daemon is killed.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use outhaul_testkit::Chance;
use rustix::process::{Pid, Signal, kill_process};

use crate::world::World;

/// The moment, counted from when the build began, or the daemon was started.
#[derive(Debug, Clone)]
pub(crate) enum Moment {
    /// After so long.
    After(Duration),
    /// As soon as this path is there, or this much after.
    Appears(PathBuf, Duration),
    /// As soon as a file, or all in a directory, has grown by so much.
    Grows(PathBuf, u64, Duration),
    /// As soon as something lies among the temporary files.
    Temporary(PathBuf, Duration),
    /// So long after it was told to end, which it was after that long.
    Ending(Duration, Duration),
}

impl Moment {
    /// One of a build's span, of which it is known about how long it takes.
    pub(crate) fn of_build(dice: &mut Chance, world: &World, span: Duration, missing: &[String]) -> Self {
        let some =
            |dice: &mut Chance, of: Duration| Duration::from_micros(dice.below(of.as_micros() as u64 + 1));
        let soon = some(dice, Duration::from_millis(3));
        match dice.below(10) {
            0..=3 => Self::After(some(dice, span.mul_f64(1.2))),
            4 | 5 if !missing.is_empty() => {
                let path = &missing[dice.below(missing.len() as u64) as usize];
                Self::Appears(world.exec_root().join(path), soon)
            }
            4..=6 => Self::Grows(world.state().join("journal"), dice.below(20_000), soon),
            7 => Self::Grows(world.state().join("record"), dice.below(60_000), soon),
            8 => Self::Temporary(world.output_base().join(".outhaul-tmp"), soon),
            _ => Self::Ending(some(dice, span), some(dice, Duration::from_millis(40))),
        }
    }

    /// One while it starts.
    pub(crate) fn of_start(dice: &mut Chance, span: Duration) -> Self {
        Self::After(Duration::from_micros(
            dice.below(span.mul_f64(1.3).as_micros() as u64 + 1),
        ))
    }

    /// Waits for it, at most until the deadline, and kills. Blocks.
    pub(crate) fn kill(&self, pid: u32, deadline: Duration) {
        let began = Instant::now();
        let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        let until = |mut is_now: Box<dyn FnMut() -> bool>, then: Duration| {
            while !is_now() && began.elapsed() < deadline {
                std::thread::sleep(Duration::from_micros(200));
            }
            std::thread::sleep(then);
        };
        match self {
            Self::After(time) => std::thread::sleep(*time),
            Self::Appears(path, then) => {
                let path = path.clone();
                until(Box::new(move || path.symlink_metadata().is_ok()), *then);
            }
            Self::Grows(path, by, then) => {
                let (path, end) = (path.clone(), size(path) + by);
                until(Box::new(move || size(&path) > end), *then);
            }
            Self::Temporary(base, then) => {
                let base = base.clone();
                until(Box::new(move || size(&base) > 0), *then);
            }
            Self::Ending(at, then) => {
                std::thread::sleep(*at);
                let _ = kill_process(pid, Signal::TERM);
                std::thread::sleep(*then);
            }
        }
        // It may have ended by itself.
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Bytes of a file, or of all files below a directory.
fn size(path: &Path) -> u64 {
    let Ok(metadata) = path.symlink_metadata() else {
        return 0;
    };
    if !metadata.is_dir() {
        return metadata.len();
    }
    let Ok(entries) = path.read_dir() else { return 0 };
    entries
        .filter_map(Result::ok)
        .map(|entry| size(&entry.path()))
        .sum()
}
