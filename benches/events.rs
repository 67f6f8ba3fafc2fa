//! The way of the events: `cargo bench --bench events`, or with a stage and a number of files.
//!
//! A build of many targets names its files in one graph of sets, each of which includes two that came before, and wants
//! none of them. Stages: `decode` (bytes to events), `build` (and to what follows from them), `daemon` (a player sends
//! them to a real daemon with journal and record, until the last acknowledgement). Every stage runs in a process of its
//! own, so that its peak memory is its own; the player is another one. CPU time is user and system of the stage's
//! process, without the player's.

use std::{
    error::Error,
    fs,
    io::{Read as _, Write as _},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use bytes::Bytes;
use outhaul::{
    bep::decode::Decoder,
    bes::{BesAddress, BesListener},
    daemon::{Daemon, DaemonOptions, Services},
    demo::play,
    invocation::{
        build::{Build, Effect},
        policy::{DownloadMode, Policy},
    },
    materialize::MaterializeOptions,
    proto::build_event_stream::{
        BuildEvent, BuildEventId, BuildFinished, BuildStarted, File, NamedSetOfFiles, OutputGroup,
        TargetComplete, WorkspaceConfig,
        build_event::Payload,
        build_event_id::{BuildStartedId, ConfigurationId, Empty, Id, NamedSetOfFilesId, TargetCompletedId},
        file,
    },
    record::Record,
    remote::{GrpcCache, RemoteOptions},
    roots::{Destination, RootRules},
    sources::SourceRule,
    transport::Endpoint,
};
use outhaul_testkit::{cpu, status};
use prost::Message as _;

type Failure = Box<dyn Error>;

/// Files that a target has of its own.
const FILES_PER_TARGET: usize = 50;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["play", address, file] => play_file(address, Path::new(file)),
        [stage, files] => run(stage, files.parse()?),
        _ => {
            writeln!(
                std::io::stdout(),
                "| stage | files | thousand files/s | CPU per file | peak memory per file |\n|---|---|---|---|---|"
            )?;
            for stage in ["decode", "build", "daemon"] {
                for files in ["1000", "10000", "100000", "1000000"] {
                    Command::new(std::env::current_exe()?)
                        .args([stage, files])
                        .status()?;
                }
            }
            Ok(())
        }
    }
}

/// What a stage has cost.
struct Cost {
    wall: Duration,
    cpu: f64,
    peak: u64,
}

/// Measures a piece of work; peak memory counts above what there was before.
fn cost(work: impl FnOnce() -> Result<(), Failure>) -> Result<Cost, Failure> {
    // Resets the high-water mark, where that is allowed.
    let _ = fs::write("/proc/self/clear_refs", "5");
    let pid = std::process::id();
    let (before, cpu_before, start) = (memory("VmRSS")?, cpu(pid), Instant::now());
    work()?;
    Ok(Cost {
        wall: start.elapsed(),
        cpu: cpu(pid) - cpu_before,
        peak: memory("VmHWM")?.saturating_sub(before),
    })
}

/// A field of this process's status, in bytes.
fn memory(field: &str) -> Result<u64, Failure> {
    Ok(status(std::process::id(), field).ok_or("no such field")? << 10)
}

fn run(stage: &str, files: usize) -> Result<(), Failure> {
    let base = tempfile::Builder::new()
        .prefix("outhaul-bench")
        .tempdir_in(directory())?;
    let spent = match stage {
        "daemon" => {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            runtime.block_on(daemon(base.path(), files))?
        }
        _ => {
            let exec_root = base.path().display().to_string();
            // Made before: what is measured is reading them.
            let events: Vec<Bytes> = events(files, &exec_root).map(Bytes::from).collect();
            cost(|| match stage {
                "decode" => decode(&events, files),
                _ => build(&events, files),
            })?
        }
    };
    let per_file = |value: f64| value / files as f64;
    writeln!(
        std::io::stdout(),
        "| {stage} | {files} | {:.0} | {:.2} µs | {:.0} B |",
        files as f64 / spent.wall.as_secs_f64() / 1000.0,
        per_file(spent.cpu * 1e6),
        per_file(spent.peak as f64),
    )?;
    Ok(())
}

fn directory() -> std::path::PathBuf {
    std::env::var_os("OUTHAUL_BENCH_DIR").map_or_else(|| "/dev/shm".into(), Into::into)
}

fn decode(events: &[Bytes], files: usize) -> Result<(), Failure> {
    let mut decoder = Decoder::default();
    let mut named = 0;
    for event in events {
        if let outhaul::bep::event::Event::NamedSet(set) = decoder.decode(event)?.event {
            named += set.files.len();
        }
    }
    if named == files {
        Ok(())
    } else {
        Err(format!("{named} files").into())
    }
}

fn build(events: &[Bytes], files: usize) -> Result<(), Failure> {
    let mut decoder = Decoder::default();
    let mut build = Build::new(policy());
    let mut named = 0;
    for (number, event) in events.iter().enumerate() {
        for effect in build.handle(number as i64, decoder.decode(event)?.event) {
            if let Effect::Outputs(_, outputs) = effect {
                named += outputs.len();
            }
        }
    }
    if named == files {
        Ok(())
    } else {
        Err(format!("{named} files").into())
    }
}

fn policy() -> Policy {
    Policy {
        mode: DownloadMode::Minimal,
        ..Policy::default()
    }
}

/// Plays to a daemon of this process, from another.
async fn daemon(base: &Path, files: usize) -> Result<Cost, Failure> {
    let exec_root = base.join("execroot/_main");
    fs::create_dir_all(&exec_root)?;
    let stream = base.join("events");
    let mut out = std::io::BufWriter::new(fs::File::create(&stream)?);
    for event in events(files, &exec_root.display().to_string()) {
        out.write_all(&u32::try_from(event.len())?.to_le_bytes())?;
        out.write_all(&event)?;
    }
    out.flush()?;

    // Nothing is asked of it.
    let endpoint = Endpoint::parse("--remote-cache", "grpc://127.0.0.1:1")?;
    let (record, _) = Record::open(&base.join("state"))?;
    let rules = RootRules {
        destination: Destination::ExecRoot,
        allowed: vec![base.to_owned()],
        ..RootRules::default()
    };
    let services = Services::open(
        record,
        policy(),
        rules,
        SourceRule::Fixed(GrpcCache::new(RemoteOptions::new(endpoint))?.into()),
        MaterializeOptions::default(),
        false,
    )?;
    let options = DaemonOptions {
        journal_dir: Some(base.join("state/journal")),
        bes: vec![BesListener::bind(&BesAddress::Tcp(([127, 0, 0, 1], 0).into()))?],
        ..DaemonOptions::default()
    };
    let daemon = Daemon::start(services, options).await?;
    let address = format!("grpc://{}", daemon.bes.first().ok_or("nothing listens")?);
    let shutdown = daemon.shutdown_token();
    let serving = tokio::spawn(daemon.join());
    let mut player = Command::new(std::env::current_exe()?)
        .args(["play", &address])
        .arg(&stream)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let (mut go, mut reported) = (
        player.stdin.take().ok_or("no stdin")?,
        player.stdout.take().ok_or("no stdout")?,
    );
    let spent = tokio::task::spawn_blocking(move || {
        // The player has read its file and waits.
        reported.read_exact(&mut [0]).map_err(|e| e.to_string())?;
        cost(|| {
            go.write_all(b"g")?;
            reported.read_exact(&mut [0])?;
            Ok(())
        })
        .map_err(|e| e.to_string())
    })
    .await??;
    player.wait()?;
    shutdown.cancel();
    serving.await??;
    Ok(spent)
}

/// Reads the events, says so, waits for a word, plays, and says so.
fn play_file(address: &str, file: &Path) -> Result<(), Failure> {
    let bytes = fs::read(file)?;
    let mut events = Vec::new();
    let mut rest = &bytes[..];
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let (event, after) = after.split_at(u32::from_le_bytes(*length) as usize);
        events.push(event.to_vec());
        rest = after;
    }
    let say_so = || {
        let mut out = std::io::stdout();
        out.write_all(b"t").and_then(|()| out.flush())
    };
    say_so()?;
    std::io::stdin().read_exact(&mut [0])?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(play(
        address,
        "00000000-0000-4000-8000-000000000001",
        "b",
        events.into_iter(),
    ))?;
    Ok(say_so()?)
}

/// A build's events: targets with files of their own in a set that includes two of those before it.
fn events(files: usize, exec_root: &str) -> impl Iterator<Item = Vec<u8>> + use<> {
    let encode = |id: Id, payload: Payload, last_message: bool| {
        let event = BuildEvent {
            id: Some(BuildEventId { id: Some(id) }),
            children: Vec::new(),
            last_message,
            payload: Some(payload),
        };
        event.encode_to_vec()
    };
    let started = BuildStarted {
        uuid: "00000000-0000-4000-8000-000000000001".to_owned(),
        command: "build".to_owned(),
        build_tool_version: "7.7.1".to_owned(),
        workspace_directory: "/home/user/workspace".to_owned(),
        ..BuildStarted::default()
    };
    let workspace = WorkspaceConfig {
        local_exec_root: exec_root.to_owned(),
    };
    let opening = [
        encode(Id::Started(BuildStartedId {}), Payload::Started(started), false),
        encode(Id::Workspace(Empty {}), Payload::WorkspaceInfo(workspace), false),
    ];
    let set_id = |number: usize| NamedSetOfFilesId {
        id: number.to_string(),
    };
    let middle = (0..files.div_ceil(FILES_PER_TARGET)).flat_map(move |target| {
        let numbers = target * FILES_PER_TARGET..files.min((target + 1) * FILES_PER_TARGET);
        let children = [target.checked_sub(1), (target > 2).then_some(target / 2)];
        let set = NamedSetOfFiles {
            files: numbers.map(|number| named_file(target, number)).collect(),
            file_sets: children.into_iter().flatten().map(set_id).collect(),
        };
        let group = OutputGroup {
            name: "default".to_owned(),
            file_sets: vec![set_id(target)],
            ..OutputGroup::default()
        };
        let complete = TargetComplete {
            success: true,
            output_group: vec![group],
            ..TargetComplete::default()
        };
        let id = TargetCompletedId {
            label: format!("//some/package/number{target}:target{target}"),
            aspect: String::new(),
            configuration: Some(ConfigurationId {
                id: "5f3c9b0b8dbb8f1c6d8f2e6a3b1d0c4e7a9f5d2b".to_owned(),
            }),
        };
        [
            encode(Id::NamedSet(set_id(target)), Payload::NamedSetOfFiles(set), false),
            encode(Id::TargetCompleted(id), Payload::Completed(complete), false),
        ]
    });
    let closing = encode(
        Id::BuildFinished(Empty {}),
        Payload::Finished(BuildFinished::default()),
        true,
    );
    opening.into_iter().chain(middle).chain([closing])
}

/// A file as Bazel 7 names it, with a digest of its own that is not a blob's.
fn named_file(target: usize, number: usize) -> File {
    let word = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let digest = format!(
        "{word:016x}{:016x}{:016x}{:016x}",
        word ^ 1,
        word.rotate_left(17),
        !word
    );
    File {
        path_prefix: ["bazel-out", "k8-fastbuild", "bin"].map(str::to_owned).to_vec(),
        name: format!("some/package/number{target}/_objs/target{target}/file{number}.pic.o"),
        file: Some(file::File::Uri(format!(
            "bytestream://cache.example.com:8980/main/blobs/{digest}/2048"
        ))),
        digest,
        length: 2048,
    }
}
