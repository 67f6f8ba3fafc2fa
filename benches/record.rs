//! The record alone: `cargo bench --bench record`.
//!
//! A million known files in 20,000 directories are handed over, looked up, concluded and walked over; and the store's
//! size is printed after a hundred builds that each change one file in a hundred. CPU time is the whole process's, the
//! record's writer included.

use std::{error::Error, fs, io::Write as _, path::Path, sync::Arc, time::Instant};

use outhaul::{
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    output::{Class, OutputContent, Stamp},
    record::{
        InvocationRow, InvocationState, OutputRow, OutputState, Record, Retention, RootId, TargetRow,
        TargetState,
    },
};
use outhaul_testkit::{cpu, status};

type Failure = Box<dyn Error>;

/// Directories, and files in each, of the large build.
const LARGE: (usize, usize) = (20_000, 50);

/// The same of the build that is built again and again.
const SMALL: (usize, usize) = (1000, 100);

const BUILDS: usize = 100;

fn main() -> Result<(), Failure> {
    let mut table = std::io::stdout();
    writeln!(
        table,
        "| what | wall, µs a file | CPU, µs a file |\n|---|---|---|"
    )?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let base = scratch()?;
    large(&base.path().join("large"), &runtime)?;
    churn(&base.path().join("churn"), &runtime)?;
    Ok(())
}

/// A directory in memory, where there is one.
fn scratch() -> std::io::Result<tempfile::TempDir> {
    match Path::new("/dev/shm") {
        shm if shm.is_dir() => tempfile::tempdir_in(shm),
        _ => tempfile::tempdir(),
    }
}

/// Known, looked up, concluded, walked over.
fn large(dir: &Path, runtime: &tokio::runtime::Runtime) -> Result<(), Failure> {
    let (record, _) = Record::open(dir)?;
    let root = record.root("/exec", 1, 2);
    let before = memory("VmRSS");
    let clock = Clock::start();
    for target in 0..LARGE.0 {
        std::hint::black_box(rows(target, LARGE.1, "first", |_| 0));
    }
    clock.print("1,000,000 rows made, and not handed over", LARGE.0 * LARGE.1);
    let clock = Clock::start();
    let mut pending = 0;
    for target in 0..LARGE.0 {
        runtime.block_on(record.room());
        record.put_outputs(root, rows(target, LARGE.1, "first", |_| 0));
        pending = pending.max(record.health().pending_rows);
    }
    clock.print("1,000,000 known files handed over", LARGE.0 * LARGE.1);
    runtime.block_on(record.flush())?;
    clock.print("the same, until they are flushed", LARGE.0 * LARGE.1);
    let mut table = std::io::stdout();
    writeln!(
        table,
        "| memory, MiB more; at its peak; most files pending; MiB on disk; dropped | {} | {}; {pending}; {}; {} |",
        (memory("VmRSS").saturating_sub(before)) >> 20,
        memory("VmHWM") >> 20,
        record.size_on_disk().unwrap_or_default() >> 20,
        record.health().dropped_rows,
    )?;

    let targets: Vec<Vec<ExecPath>> = (0..2000)
        .map(|target| {
            rows(target, LARGE.1, "first", |_| 0)
                .into_iter()
                .map(|(path, _)| path)
                .collect()
        })
        .collect();
    let clock = Clock::start();
    let mut found = 0;
    for paths in &targets {
        found += record.outputs(root, paths).into_iter().flatten().count();
    }
    clock.print("100,000 looked up by directory", found);

    let clock = Clock::start();
    let mut found = 0;
    for paths in &targets {
        for path in paths {
            found += usize::from(record.output(root, path).is_some());
        }
    }
    clock.print("100,000 looked up one by one", found);

    let clock = Clock::start();
    for paths in &targets {
        let rows = record.outputs(root, paths);
        let concluded = paths
            .iter()
            .zip(rows)
            .filter_map(|(path, row)| Some((path.clone(), concluded(row?))))
            .collect();
        record.put_outputs(root, concluded);
    }
    clock.print("100,000 concluded", found);
    runtime.block_on(record.flush())?;
    clock.print("the same, until they are flushed", found);

    let targets: Vec<TargetRow> = (0..LARGE.0).map(target_row).collect();
    let clock = Clock::start();
    for target in targets.chunks(10) {
        runtime.block_on(record.room());
        record.put_targets("0a1b2c3d-0a1b-2c3d-4e5f-0a1b2c3d4e5f", target);
    }
    runtime.block_on(record.flush())?;
    clock.print("20,000 targets, until they are flushed", targets.len());

    let clock = Clock::start();
    let count = record.count_outputs(root, "");
    clock.print("1,000,000 counted", count);
    let clock = Clock::start();
    let count = record.scan_outputs(root, "").count();
    clock.print("1,000,000 walked over", count);
    Ok(())
}

/// A hundred builds of 100,000 files, each with 1 % of them changed.
fn churn(dir: &Path, runtime: &tokio::runtime::Runtime) -> Result<(), Failure> {
    let (record, _) = Record::open(dir)?;
    let root = record.root("/exec", 1, 2);
    let mut table = std::io::stdout();
    writeln!(table, "\n| after | MiB on disk |\n|---|---|")?;
    let size = |record: &Record| record.size_on_disk().unwrap_or_default() as f64 / f64::from(1 << 20);
    let clock = Instant::now();
    for build in 0..=2 * BUILDS {
        if build == BUILDS + 1 {
            let plan = record.plan_retention(&Retention {
                max_age: None,
                max_invocations: Some(10),
            });
            record.execute_retention(&plan);
            runtime.block_on(record.flush())?;
            writeln!(table, "| all but 10 forgotten | {:.1} |", size(&record))?;
        }
        let id = format!("0a1b2c3d-0a1b-2c3d-4e5f-{build:012x}");
        record.put_invocation(&InvocationRow {
            invocation_id: id.clone(),
            root: Some(root),
            started_ms: build as i64,
            state: InvocationState::Settled,
            version: record.next_version(root),
            ..InvocationRow::default()
        });
        for target in 0..SMALL.0 {
            runtime.block_on(record.room());
            let changed = |file: usize| {
                if (file + target) % 100 < build {
                    1 + (build - 1 - (file + target) % 100) / 100
                } else {
                    0
                }
            };
            let rows = rows(target, SMALL.1, &id, |file| changed(file) as u64);
            let rows: Vec<_> = match build {
                0 => rows,
                _ => rows
                    .into_iter()
                    .enumerate()
                    .filter(|(file, _)| (file + target) % 100 == (build - 1) % 100)
                    .map(|(_, row)| row)
                    .collect(),
            };
            conclude(&record, root, rows);
            record.put_targets(&id, &[target_row(target)]);
        }
        runtime.block_on(record.flush())?;
        if build % 10 == 0 || build == 1 {
            writeln!(table, "| {build} builds | {:.1} |", size(&record))?;
        }
    }
    writeln!(table, "| ({:.1} s) |", clock.elapsed().as_secs_f64())?;
    drop(record);
    let (record, _) = Record::open(dir)?;
    writeln!(
        table,
        "| opened again | {:.1} ({} files; {} bytes by the file system) |",
        size(&record),
        record.count_outputs(root, ""),
        du(&dir.join("record"))?
    )?;
    Ok(())
}

fn target_row(target: usize) -> TargetRow {
    TargetRow {
        label: format!("//some/package/{}/{target}:target{target}", target / 100),
        configuration: "7fa2b1".to_owned(),
        state: TargetState::Settled,
        success: true,
        required: 100,
        ..TargetRow::default()
    }
}

fn conclude(record: &Record, root: RootId, rows: Vec<(ExecPath, OutputRow)>) {
    record.put_outputs(root, rows.clone());
    record.put_outputs(
        root,
        rows.into_iter()
            .map(|(path, row)| (path, concluded(row)))
            .collect(),
    );
}

/// A target's files, as a stream names them.
fn rows(
    target: usize,
    files: usize,
    invocation: &str,
    content: impl Fn(usize) -> u64,
) -> Vec<(ExecPath, OutputRow)> {
    let label: Arc<str> = format!("//some/package/{}/{target}:target{target}", target / 100).into();
    let (invocation, event): (Arc<str>, Arc<str>) = (invocation.into(), format!("named_set {target}").into());
    let (rule, group): (Arc<str>, Arc<str>) = ("top-level output of the build".into(), "default".into());
    (0..files)
        .map(|file| {
            let mut seed = [0; 32];
            let hash =
                (target as u64 * 1_000_003 + file as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ content(file);
            for (i, part) in seed.chunks_mut(8).enumerate() {
                part.copy_from_slice(&(hash.rotate_left(i as u32 * 13)).to_le_bytes());
            }
            let digest = Digest::new(DigestFunction::Sha256, &seed, 1000 + file as u64).expect("32 bytes");
            let path = ExecPath::new(&format!(
                "bazel-out/k8-fastbuild/bin/some/package/{}/{target}/file{file:03}.out",
                target / 100
            ));
            let row = OutputRow {
                class: Class::Required,
                rule: rule.clone(),
                label: label.clone(),
                output_group: group.clone(),
                event: event.clone(),
                invocation_id: invocation.clone(),
                version: 1_763_000_000_000,
                ..OutputRow::known(OutputContent::Blob(digest))
            };
            (path.expect("a plain path"), row)
        })
        .collect()
}

fn concluded(row: OutputRow) -> OutputRow {
    OutputRow {
        state: OutputState::Materialized,
        stamp: Some(Stamp {
            size: 1000,
            mtime_ns: 1_763_000_000_123_456_789,
            ctime_ns: 1_763_000_000_123_556_789,
            inode: 12_345_678,
            device: 42,
            taken_ns: 1_763_000_000_323_556_789,
        }),
        source: "batch".into(),
        materialized_at_ms: 1_763_000_000_323,
        took_us: 12_345,
        ..row
    }
}

struct Clock {
    began: Instant,
    cpu: f64,
}

impl Clock {
    fn start() -> Self {
        Self {
            began: Instant::now(),
            cpu: cpu(std::process::id()),
        }
    }

    fn print(&self, what: &str, files: usize) {
        let each = |seconds: f64| seconds * 1e6 / files.max(1) as f64;
        let wall = each(self.began.elapsed().as_secs_f64());
        let cpu = each(cpu(std::process::id()) - self.cpu);
        let _ = writeln!(std::io::stdout(), "| {what} ({files}) | {wall:.2} | {cpu:.2} |");
    }
}

/// Bytes, by a line of the process's status.
fn memory(line: &str) -> u64 {
    status(std::process::id(), line).unwrap_or(0) << 10
}

fn du(dir: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        bytes += match entry.metadata()? {
            meta if meta.is_dir() => du(&entry.path())?,
            meta => meta.len(),
        };
    }
    Ok(bytes)
}
