//! The plainest program that ends with the same files on disk: what nothing can be much faster than.
//!
//! The bytes are in memory already; two threads hash them and create the files, each in directories of its own. There
//! is no protocol, no temporary name, no record, and nobody else's files to be careful with.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use outhaul_testkit::Chance;
use sha2::{Digest as _, Sha256};

/// Threads that write, as the daemon has on two cores.
pub(crate) const THREADS: usize = 2;
/// Rounds of which the median is taken.
pub(crate) const ROUNDS: usize = 5;
/// Pieces in which a large file is hashed and written.
pub(crate) const PIECE: usize = 1 << 20;

/// One directory's worth of files: names and bytes.
pub(crate) struct Folder {
    /// Below the base.
    pub(crate) path: PathBuf,
    /// File names, and what is in them.
    pub(crate) files: Vec<(String, Bytes)>,
}

/// Folders full of files with bytes of their own.
pub(crate) fn folders(count: usize, files: usize, size: usize) -> Vec<Folder> {
    (0..count)
        .map(|folder| Folder {
            path: format!("gen/t{folder}/d0").into(),
            files: (0..files)
                .map(|file| {
                    (
                        format!("f{file}.out"),
                        Chance::new((folder * files + file) as u64).bytes(size).into(),
                    )
                })
                .collect(),
        })
        .collect()
}

/// Runs `work` for every folder, on [`THREADS`] threads that take turns; gives the wall time.
pub(crate) fn on_threads<F: Sync>(
    folders: &[F],
    work: impl Fn(&F) -> io::Result<()> + Sync,
) -> io::Result<Duration> {
    let start = Instant::now();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|n| {
                let mut mine = folders.iter().skip(n).step_by(THREADS);
                let work = &work;
                scope.spawn(move || mine.try_for_each(work))
            })
            .collect();
        threads.into_iter().try_for_each(|thread| {
            thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
        })
    })?;
    Ok(start.elapsed())
}

/// Hashes every file's bytes and creates the file, in pieces if it is large.
pub(crate) fn create(base: &Path, folders: &[Folder]) -> io::Result<Duration> {
    on_threads(folders, |folder| {
        let directory = base.join(&folder.path);
        fs::create_dir_all(&directory)?;
        for (name, bytes) in &folder.files {
            let mut hasher = Sha256::new();
            let mut file = fs::File::create_new(directory.join(name))?;
            for piece in bytes.chunks(PIECE) {
                hasher.update(piece);
                file.write_all(piece)?;
            }
            std::hint::black_box(hasher.finalize());
        }
        Ok(())
    })
}

/// `lstat` of every file.
pub(crate) fn look(base: &Path, folders: &[Folder]) -> io::Result<Duration> {
    on_threads(folders, |folder| {
        let directory = base.join(&folder.path);
        for (name, bytes) in &folder.files {
            assert_eq!(
                fs::symlink_metadata(directory.join(name))?.len(),
                bytes.len() as u64
            );
        }
        Ok(())
    })
}

/// A new directory to measure in: below `$OUTHAUL_BENCH_DIR`, else on tmpfs where there is one. It goes when dropped.
pub(crate) fn directory() -> io::Result<tempfile::TempDir> {
    directory_in(None)
}

/// The same below another directory, if one is given.
pub(crate) fn directory_in(base: Option<&Path>) -> io::Result<tempfile::TempDir> {
    let base = base
        .map(Path::to_owned)
        .or_else(|| std::env::var_os("OUTHAUL_BENCH_DIR").map(PathBuf::from))
        .unwrap_or_else(|| {
            let tmpfs = PathBuf::from("/dev/shm");
            if tmpfs.is_dir() {
                tmpfs
            } else {
                std::env::temp_dir()
            }
        });
    tempfile::Builder::new().prefix("outhaul-bench-").tempdir_in(base)
}

/// The middle one; of an even number, the mean of the middle two.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = sorted.get(sorted.len() / 2)?;
    let lower = sorted.get((sorted.len() - 1) / 2)?;
    Some((lower + upper) / 2.0)
}

/// The median with minimum and maximum.
pub(crate) fn spread(values: &[f64], digits: usize) -> String {
    let least = values.iter().copied().reduce(f64::min);
    let greatest = values.iter().copied().reduce(f64::max);
    match (least, median(values), greatest) {
        (Some(least), Some(median), Some(greatest)) => {
            format!("{median:.digits$} ({least:.digits$} to {greatest:.digits$})")
        }
        _ => "nothing was measured".to_owned(),
    }
}
