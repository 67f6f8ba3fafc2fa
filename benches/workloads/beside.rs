//! What a workload with a cache of another kind than gRPC is compared with, in the same rounds: a program that copies
//! and verifies the same files, or the same build with the embedded cache by gRPC.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Result;
use sha2::{Digest as _, Sha256};

use crate::{
    cache::{Cache, Kind},
    events::Stream,
    keyed::place_on_disk,
    plain::{self, PIECE},
    rig::{Rig, remove},
    samples::{Goals, Samples, Table, note},
    tree::{BIN, Folder, Tree},
};

/// Most times the copying program's wall time.
const COPY_GOAL: f64 = 2.0;
/// Most times the wall time by gRPC: of many small files from nginx, each of which is a request, and of large ones.
const SMALL_GOAL: f64 = 3.0;
const LARGE_GOAL: f64 = 1.1;

/// The other one.
pub(crate) enum Beside {
    /// There is none: the cache is one by gRPC.
    Nothing,
    /// Copies the files from this disk cache.
    Copy(PathBuf),
    /// The same build by gRPC, with the embedded cache, instead of this kind.
    Grpc {
        kind: Kind,
        cache: Box<Cache>,
        stream: Stream,
    },
}

impl Beside {
    /// For what the build has its cache in.
    pub(crate) fn ready(rig: &Rig, cache: &Cache, tree: &Tree) -> Result<Self> {
        if let Some(directory) = cache.directory() {
            return Ok(Self::Copy(directory.to_owned()));
        }
        if cache.kind().is_grpc() {
            return Ok(Self::Nothing);
        }
        let kind = cache.kind();
        let cache = Cache::start(Kind::Embedded, rig.base())?;
        cache.fill(&rig.player, tree.blobs())?;
        let stream = Stream::new(tree, rig.setting(&cache));
        let cache = Box::new(cache);
        Ok(Self::Grpc { kind, cache, stream })
    }

    /// Does it once, with nothing there.
    pub(crate) fn round(
        &self,
        rig: &mut Rig,
        tree: &Tree,
        workload: &str,
        contents: bool,
        samples: &mut Samples,
    ) -> Result<()> {
        match self {
            Self::Nothing => Ok(()),
            Self::Copy(cache) => {
                let into = rig.base().join("copied");
                let took = copy(cache, &into, &tree.folders)?;
                samples.add(format!("{workload} copied"), took.as_secs_f64());
                tree.check(&into, contents)?;
                remove(&into)
            }
            Self::Grpc { cache, stream, .. } => {
                rig.fresh()?;
                let daemon = rig.serve(cache, &[])?;
                let cost = rig.play(&daemon, cache, stream)?;
                note(samples, &format!("{workload} by gRPC"), cost);
                tree.check(&rig.exec_root(), contents)?;
                rig.fresh()
            }
        }
    }

    /// Rows for it, and the goal.
    pub(crate) fn report(
        &self,
        table: &Table,
        samples: &Samples,
        workload: &str,
        goals: &mut Goals,
    ) -> Result<()> {
        let wall = format!("{workload} wall");
        match self {
            Self::Nothing => Ok(()),
            Self::Copy(_) => {
                let copied = format!("{workload} copied");
                let figures = samples.get(&copied);
                table.figures("copy program: read, hash, create, write", figures, 3, " s")?;
                let ratio = samples.ratio(&wall, &copied);
                table.figures("**outhaul / copy program**", &ratio, 2, "")?;
                if workload == "S" {
                    goals.at_most("S, disk cache / copy program", ratio, COPY_GOAL, "");
                }
                Ok(())
            }
            Self::Grpc { kind, .. } => {
                let grpc = |figure: &str| format!("{workload} by gRPC {figure}");
                let get = |figure: &str| samples.get(&grpc(figure));
                table.figures("outhaul, embedded cache by gRPC: wall time", get("wall"), 3, " s")?;
                table.figures("… processor time of the daemon", get("cpu"), 2, " s")?;
                let ratio = samples.ratio(&wall, &grpc("wall"));
                table.figures("**outhaul / outhaul by gRPC**", &ratio, 2, "")?;
                let cpu = samples.ratio(&format!("{workload} cpu"), &grpc("cpu"));
                table.figures("… processor time of the daemon", &cpu, 2, "")?;
                let goal = match (workload, kind) {
                    ("S", Kind::Nginx) => SMALL_GOAL,
                    ("L", _) => LARGE_GOAL,
                    _ => return Ok(()),
                };
                let what = format!("{workload}, {kind:?} / {workload} by gRPC");
                goals.at_most(&what, ratio, goal, "");
                Ok(())
            }
        }
    }
}

/// Copies every file from a disk cache to its place, hashing it, on as many threads as the limit program has; gives the
/// wall time.
fn copy(cache: &Path, into: &Path, folders: &[Folder]) -> io::Result<Duration> {
    plain::on_threads(folders, |folder| {
        let directory = into.join(BIN).join(&folder.path);
        fs::create_dir_all(&directory)?;
        let mut buffer = vec![0; PIECE];
        for file in &folder.files {
            let mut from = File::open(cache.join(place_on_disk(&file.digest.hash_hex())))?;
            let mut to = File::create_new(directory.join(&file.name))?;
            let mut hasher = Sha256::new();
            loop {
                let count = from.read(&mut buffer)?;
                let piece = buffer.get(..count).unwrap_or_default();
                if piece.is_empty() {
                    break;
                }
                hasher.update(piece);
                to.write_all(piece)?;
            }
            if hasher.finalize()[..] != *file.digest.hash() {
                return Err(io::Error::other(format!("{} has other bytes", file.digest)));
            }
        }
        Ok(())
    })
}
