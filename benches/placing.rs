//! Checking and placing alone, against the plain program: `cargo bench --bench placing`.
//!
//! The coordinator and its writers get their bytes from memory, so no wire and no record is in the figures. Each row
//! gives wall time and processor time (all threads, kernel included) a file; processor time is the steadier of the two
//! on a shared machine. The number of directories of 100 files of 2.5 KiB is the first argument, 200 without one.

mod plain;

use std::{
    collections::HashMap,
    error::Error,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use outhaul::{
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    materialize::{
        Completion, MaterializeOptions, Materializer, Outcome, Root, Session, Want,
        place::{Epoch, Item, OutputRoot, PlaceOptions, Placer},
    },
    metrics::Metrics,
    output::{Class, OutputContent, Stamp},
    remote::{Attribution, BatchAnswer, BlobStore, Capabilities, Sink},
    transport::RemoteError,
};
use plain::{Folder, ROUNDS, create, directory, folders, look, spread};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::mpsc;

type Failure = Box<dyn Error>;

/// Files of one directory.
const FILES: usize = 100;
const SIZE: usize = 2560;
/// How many outputs have the same bytes, where some have.
const COPIES: usize = 10;

fn main() -> Result<(), Failure> {
    // Cargo passes flags of its own.
    let count = std::env::args().find_map(|arg| arg.parse().ok()).unwrap_or(200);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let folders = folders(count, FILES, SIZE);
    let files = Files::new(&folders)?;
    let mut table = Table::default();
    for round in 0..=ROUNDS {
        // The first is the warm-up.
        let rows = runtime.block_on(measure(&files, &folders))?;
        if round > 0 {
            table.add(rows);
        }
    }
    table.print((count * FILES) as f64)
}

/// Times of one row in one round: wall and processor.
type Row = (&'static str, Duration, Duration);

#[derive(Default)]
struct Table(Vec<(&'static str, Vec<f64>, Vec<f64>)>);

impl Table {
    fn add(&mut self, rows: Vec<Row>) {
        for (index, (name, wall, cpu)) in rows.into_iter().enumerate() {
            if self.0.len() == index {
                self.0.push((name, Vec::new(), Vec::new()));
            }
            if let Some((_, walls, cpus)) = self.0.get_mut(index) {
                walls.push(wall.as_secs_f64() * 1e6);
                cpus.push(cpu.as_secs_f64() * 1e6);
            }
        }
    }

    fn print(&self, files: f64) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        writeln!(
            out,
            "| what | wall, µs a file | processor, µs a file |\n|---|---|---|"
        )?;
        for (name, walls, cpus) in &self.0 {
            let each = |values: &[f64]| spread(&values.iter().map(|v| v / files).collect::<Vec<_>>(), 2);
            writeln!(out, "| {name} | {} | {} |", each(walls), each(cpus))?;
        }
        Ok(())
    }
}

/// All files: where, what, and the bytes.
struct Files {
    list: Vec<(ExecPath, Digest, Bytes)>,
    store: Arc<Memory>,
}

impl Files {
    fn new(folders: &[Folder]) -> Result<Self, Failure> {
        let mut list = Vec::new();
        for folder in folders {
            for (name, bytes) in &folder.files {
                let path = ExecPath::new(&format!(
                    "bazel-out/k8-fastbuild/bin/{}/{name}",
                    folder.path.display()
                ))?;
                let bytes = Bytes::copy_from_slice(bytes);
                list.push((path, Digest::of(DigestFunction::Sha256, &bytes), bytes));
            }
        }
        let blobs = list
            .iter()
            .map(|(_, digest, bytes)| (digest.clone(), bytes.clone()))
            .collect();
        let store = Arc::new(Memory {
            blobs,
            answered: AtomicU64::new(0),
        });
        Ok(Self { list, store })
    }

    /// What is wanted, a directory's worth at a time, as completed targets name it. Every `same` neighbours have the
    /// bytes of the first.
    fn wants(&self, stamps: &HashMap<ExecPath, Stamp>, same: usize) -> Vec<Vec<Want>> {
        let all: Vec<Want> = self
            .list
            .iter()
            .enumerate()
            .map(|(n, (path, ..))| {
                // Every tenth directory's worth apart, so that copies come long after the first.
                let group = self.list.len() / same;
                let digest = self.list.get(n % group).map(|(_, digest, _)| digest.clone());
                let content = digest.map_or(OutputContent::Directory, OutputContent::Blob);
                Want::new(path.clone(), content, Class::Required, stamps.get(path).copied())
            })
            .collect();
        all.chunks(FILES).map(<[Want]>::to_vec).collect()
    }
}

/// A cache in memory.
struct Memory {
    blobs: HashMap<Digest, Bytes>,
    answered: AtomicU64,
}

#[async_trait]
impl BlobStore for Memory {
    async fn capabilities(&self) -> Result<Capabilities, RemoteError> {
        Ok(Capabilities::plain(4 << 20))
    }

    async fn read_batch(
        &self,
        digests: &[Digest],
        _attribution: &Attribution,
        _avoid: bool,
    ) -> Vec<BatchAnswer> {
        self.answered.fetch_add(digests.len() as u64, Ordering::Relaxed);
        digests
            .iter()
            .map(|digest| {
                (
                    digest.clone(),
                    Ok(self.blobs.get(digest).cloned().unwrap_or_default()),
                )
            })
            .collect()
    }

    async fn read_stream(
        &self,
        _digest: &Digest,
        _offset: u64,
        _attribution: &Attribution,
        _avoid: bool,
        _sink: &mut dyn Sink,
    ) -> Result<(), RemoteError> {
        Ok(())
    }

    async fn find_missing(
        &self,
        _digests: &[Digest],
        _attribution: &Attribution,
    ) -> Result<Vec<Digest>, RemoteError> {
        Ok(Vec::new())
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}

fn processor() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// Runs something and notes what it took.
async fn timed<T>(
    rows: &mut Vec<Row>,
    name: &'static str,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let (wall, cpu) = (Instant::now(), processor());
    let result = work.await?;
    rows.push((name, wall.elapsed(), processor().saturating_sub(cpu)));
    Ok(result)
}

async fn measure(files: &Files, folders: &[Folder]) -> Result<Vec<Row>, Failure> {
    let mut rows = Vec::new();
    let base = directory()?;
    let here = base.path().join("plain");
    timed(&mut rows, "plain program: hash and create", async {
        Ok(create(&here, folders)?)
    })
    .await?;
    timed(&mut rows, "plain program: `lstat`", async {
        Ok(look(&here, folders)?)
    })
    .await?;
    let none = HashMap::new();

    let one = base.path().join("one");
    fs::create_dir_all(one.join("bazel-out"))?;
    let root = Arc::new(OutputRoot::open(&one, false)?);
    let mut placer = Placer::new(root, PlaceOptions::default());
    let place = |placer: &mut Placer| -> Result<(), Failure> {
        for folder in files.list.chunks(FILES) {
            let items: Vec<Item<'_>> = folder
                .iter()
                .map(|(path, digest, bytes)| Item {
                    path,
                    digest,
                    bytes,
                    is_new: true,
                })
                .collect();
            for placed in placer.place_many(&items, &Epoch::new(), 0) {
                placed?;
            }
        }
        Ok(())
    };
    timed(&mut rows, "one thread: place in new directories", async {
        place(&mut placer)
    })
    .await?;
    for (path, ..) in &files.list {
        fs::remove_file(one.join(path.as_path()))?;
    }
    timed(
        &mut rows,
        "one thread: place in directories that are there",
        async { place(&mut placer) },
    )
    .await?;
    fs::remove_dir_all(&one)?;

    let mut rig = Rig::new(&base.path().join("many"), files)?;
    let name = "all threads: absent, new directories";
    let stamps = rig.run(&mut rows, name, files.wants(&none, 1)).await?;
    let name = "all threads: present, just placed";
    tokio::time::sleep(Duration::from_millis(30)).await;
    let stamps = rig.run(&mut rows, name, files.wants(&stamps, 1)).await?;
    let name = "all threads: present, recorded";
    rig.run(&mut rows, name, files.wants(&stamps, 1)).await?;
    for (path, ..) in &files.list {
        fs::remove_file(rig.path.join(path.as_path()))?;
    }
    let name = "all threads: absent, directories that are there";
    rig.run(&mut rows, name, files.wants(&none, 1)).await?;

    let mut rig = Rig::new(&base.path().join("same"), files)?;
    let before = files.store.answered.load(Ordering::Relaxed);
    let wants = files.wants(&none, COPIES);
    let name = "all threads: absent, ten of each blob";
    rig.run(&mut rows, name, wants).await?;
    let transfers = files.store.answered.load(Ordering::Relaxed) - before;
    let blobs = files.list.len() / COPIES;
    writeln!(std::io::stderr(), "{transfers} transfers for {blobs} blobs")?;
    Ok(rows)
}

/// A coordinator with a root of its own.
struct Rig {
    path: PathBuf,
    materializer: Materializer,
    session: Arc<Session>,
    completions: mpsc::UnboundedReceiver<Vec<Completion>>,
}

impl Rig {
    fn new(path: &Path, files: &Files) -> Result<Self, Failure> {
        fs::create_dir_all(path.join("bazel-out"))?;
        let place = Arc::new(OutputRoot::open(path, false)?);
        let (sender, completions) = mpsc::unbounded_channel();
        let session = Arc::new(Session {
            root: Arc::new(Root {
                id: 1,
                place,
                epoch: Epoch::new(),
            }),
            version: 1,
            store: files.store.clone(),
            attribution: Arc::default(),
            served: None,
            trace: None,
            completions: sender,
        });
        Ok(Self {
            path: path.to_owned(),
            materializer: Materializer::start(MaterializeOptions::default(), Metrics::default())?,
            session,
            completions,
        })
    }

    /// Wants everything, a piece at a time, and waits for all answers. Gives the files' stamps.
    async fn run(
        &mut self,
        rows: &mut Vec<Row>,
        name: &'static str,
        wants: Vec<Vec<Want>>,
    ) -> Result<HashMap<ExecPath, Stamp>, Failure> {
        let expected: usize = wants.iter().map(Vec::len).sum();
        let (materializer, session) = (self.materializer.clone(), self.session.clone());
        let completions = &mut self.completions;
        let lists = timed(rows, name, async move {
            let sending = tokio::spawn(async move {
                for piece in wants {
                    materializer.want(&session, piece).await;
                }
            });
            let mut lists = Vec::new();
            let mut seen = 0;
            while seen < expected {
                let list = completions.recv().await.ok_or("the coordinator is gone")?;
                seen += list.len();
                lists.push(list);
            }
            sending.await?;
            Ok(lists)
        })
        .await?;
        let mut stamps = HashMap::new();
        for completion in lists.into_iter().flatten() {
            match completion.outcome {
                Outcome::Downloaded { stamp, .. } | Outcome::Present { stamp, .. } => {
                    stamps.extend(stamp.map(|stamp| (completion.path, stamp)));
                }
                other => return Err(format!("{}: {other:?}", completion.path).into()),
            }
        }
        Ok(stamps)
    }
}
