//! `outhaul demo`: the whole thing without a build tool or a server.
//!
//! A small HTTP cache is filled by a generated build, whose events are played to the real event service as Bazel
//! would. Then some outputs are deleted, and a second build is played in which everything is a cache hit. With `--serve`,
//! builds go on, for the status page to show.

use std::{
    io::Write as _,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use tokio::{net::TcpListener, sync::broadcast};

use super::{
    ending::Signals,
    exit::{self, Failure},
    print, runtime,
};
use crate::{
    access::ListenerRules,
    bes::{BesAddress, BesListener},
    config::{PlaceArgs, from_environment},
    daemon::{AdminListener, Daemon, DaemonOptions, Retention, Services},
    demo::{DemoCache, GeneratedBuild, GeneratedContent, Setting, Shape, play},
    digest::{Digest, DigestFunction},
    invocation::{Report, policy::Policy},
    remote::RemoteOptions,
    roots::{Destination, RootRules},
    sources::{SourceCache, SourceRule},
    transport::Endpoint,
};

/// Arguments of `outhaul demo`.
#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// Directory to use; by default a new one in the temporary directory. It is not deleted, so that you can look at it
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Run a generated build every few seconds, until you stop it, and show them on the status page, whose address is
    /// printed
    #[arg(long)]
    serve: bool,
}

/// Where the status page is, if nothing else is there.
const PAGE: u16 = 8986;
/// The time from the end of a build of `--serve` to the next one.
const PAUSE: Duration = Duration::from_secs(4);
/// How far away its cache is.
const FAR: Duration = Duration::from_millis(120);
/// Of every so many of its builds, one is large, one has lost a blob, and one is all cache hits after files were deleted.
const ROUND: u64 = 4;
/// What builds of `--serve` leave behind.
const KEPT: Retention = Retention {
    max_age: Duration::from_secs(3600),
    journal_bytes: 64 << 20,
};

pub(super) fn main(args: DemoArgs) -> Result<u8, Failure> {
    runtime()?.block_on(demo(args))
}

async fn demo(args: DemoArgs) -> Result<u8, Failure> {
    let base = match args.dir {
        Some(dir) => std::path::absolute(dir)?,
        None => std::env::temp_dir().join(format!("outhaul-demo-{}", std::process::id())),
    };
    let exec_root = base.join("execroot/_main");
    std::fs::create_dir_all(&exec_root).map_err(|e| Failure::usage(format!("{}: {e}", base.display())))?;
    let mut out = print::out();

    let cache = if args.serve {
        DemoCache::far_away(FAR)
    } else {
        DemoCache::default()
    };
    let address = cache.serve().await?;
    writeln!(out, "An embedded remote cache listens on {address}.")?;
    let setting = Setting {
        workspace: base.join("workspace").display().to_string(),
        exec_root: exec_root.display().to_string(),
        remote_cache: address.clone(),
        instance_name: String::new(),
    };
    let options = if args.serve {
        DaemonOptions {
            admin: Some(page().await?),
            retention: Some(KEPT),
            ..DaemonOptions::default()
        }
    } else {
        DaemonOptions::default()
    };
    let (daemon, mut reports) = start(&base, &address, options).await?;
    if args.serve {
        return serve(&base, daemon, reports, &cache, &setting).await;
    }
    let build = GeneratedBuild::new(|bytes| cache.put(bytes), setting, 1);
    let bes = daemon
        .bes
        .first()
        .map(|a| format!("grpc://{a}"))
        .unwrap_or_default();
    writeln!(out, "The daemon takes build events on {bes}.\n")?;
    let shutdown = daemon.shutdown_token();
    let serving = tokio::spawn(daemon.join());

    writeln!(
        out,
        "A first build runs remotely and downloads nothing itself (--remote_download_minimal):"
    )?;
    writeln!(out, "  {}", run(&bes, &build, &mut reports).await?)?;
    let missing = check(&build, &exec_root)?;
    writeln!(out, "  its command has returned; {}\n", verdict(&build, missing))?;

    let deleted = delete_some(&build, &exec_root)?;
    writeln!(
        out,
        "{deleted} of its outputs are deleted. A second build, all cache hits, executes nothing:"
    )?;
    let build = build.incremental();
    writeln!(out, "  {}", run(&bes, &build, &mut reports).await?)?;
    let missing_now = check(&build, &exec_root)?;
    writeln!(out, "  {}\n", verdict(&build, missing_now))?;
    writeln!(out, "The files are in {}", exec_root.join("bazel-out").display())?;

    shutdown.cancel();
    let served = serving.await.map_err(Failure::failed)?;
    served.map_err(Failure::failed)?;
    Ok(if missing == 0 && missing_now == 0 && deleted > 0 {
        exit::OK
    } else {
        exit::FAILED
    })
}

/// The port of the status page.
async fn page() -> Result<AdminListener, Failure> {
    let listener = match TcpListener::bind((Ipv4Addr::LOCALHOST, PAGE)).await {
        Ok(listener) => listener,
        // A daemon, mostly.
        Err(_) => TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?,
    };
    Ok(AdminListener {
        listener,
        access: ListenerRules::default(),
    })
}

/// Builds until a signal comes.
async fn serve(
    base: &Path,
    daemon: Daemon,
    mut reports: broadcast::Receiver<Report>,
    cache: &DemoCache,
    setting: &Setting,
) -> Result<u8, Failure> {
    let mut out = print::out();
    if let Some(page) = daemon.admin {
        writeln!(out, "The status page is http://{page}/")?;
    }
    writeln!(
        out,
        "A generated build starts {} s after the one before has ended; their files are in {}. Press Ctrl-C to stop.\n",
        PAUSE.as_secs(),
        base.display()
    )?;
    out.flush()?;
    let bes = daemon
        .bes
        .first()
        .map(|a| format!("grpc://{a}"))
        .unwrap_or_default();
    let shutdown = daemon.shutdown_token();
    let _second = Signals::listen()?.heed(shutdown.clone());
    let serving = tokio::spawn(daemon.join());
    let building = async {
        for number in 1.. {
            writeln!(
                print::out(),
                "{}",
                another(number, &bes, cache, setting, &mut reports).await?
            )?;
            tokio::time::sleep(PAUSE).await;
        }
        Ok::<_, Failure>(())
    };
    tokio::select! {
        built = building => built?,
        () = shutdown.cancelled() => {}
    }
    shutdown.cancel();
    let served = serving.await.map_err(Failure::failed)?;
    served.map_err(Failure::failed)?;
    Ok(exit::OK)
}

/// The exec root of the large builds.
fn beside(exec_root: &str) -> String {
    let path = Path::new(exec_root).with_file_name("large");
    path.display().to_string()
}

/// Runs one of the builds of `--serve`: most have new outputs, some have lost one of them, and large ones have their own
/// output tree.
async fn another(
    number: u64,
    bes: &str,
    cache: &DemoCache,
    setting: &Setting,
    reports: &mut broadcast::Receiver<Report>,
) -> Result<String, Failure> {
    if number.is_multiple_of(ROUND) {
        let shape = Shape {
            targets: 24,
            files_per_target: 50,
            file_size: 24_000,
            seed: number,
            ..Shape::default()
        };
        let large = Setting {
            workspace: format!("{}-large", setting.workspace),
            exec_root: beside(&setting.exec_root),
            ..setting.clone()
        };
        std::fs::create_dir_all(&large.exec_root)?;
        let filled = shape.fill(|bytes| cache.put(bytes));
        let id = filled.invocation_id(number);
        let events = filled.events(&large, &id);
        play(bes, &id, &id, events).await.map_err(Failure::failed)?;
        return Ok(reports.recv().await.map_err(Failure::failed)?.line);
    }
    let loses = number % ROUND == 3;
    let put = |bytes: Vec<u8>| {
        // One of the headers.
        if loses && bytes.len() == 1000 {
            Digest::of(DigestFunction::Sha256, &bytes)
        } else {
            cache.put(bytes)
        }
    };
    let build = if number % ROUND == 2 {
        let before = GeneratedBuild::new(put, setting.clone(), number - 1);
        delete_some(&before, Path::new(&setting.exec_root))?;
        before.incremental()
    } else {
        GeneratedBuild::new(put, setting.clone(), number)
    };
    run(bes, &build, reports).await
}

/// Starts a daemon for a cache, and gives what it reports of builds.
async fn start(
    base: &Path,
    cache: &str,
    options: DaemonOptions,
) -> Result<(Daemon, broadcast::Receiver<Report>), Failure> {
    let endpoint = Endpoint::parse_cache("--remote-cache", cache).map_err(Failure::failed)?;
    let cache = SourceCache::open(RemoteOptions::new(endpoint)).map_err(Failure::failed)?;
    let services = Services::open(
        super::record::open_record(&base.join("state")).await?,
        Policy::default(),
        RootRules {
            destination: Destination::ExecRoot,
            allowed: vec![base.to_owned()],
            ..RootRules::default()
        },
        SourceRule::Fixed(cache),
        from_environment::<PlaceArgs>()?.options()?,
        false,
    )?;
    let listener =
        BesListener::bind(&BesAddress::Tcp(([127, 0, 0, 1], 0).into())).map_err(Failure::failed)?;
    let reports = services.engine.reports();
    let options = DaemonOptions {
        journal_dir: Some(base.join("state/journal")),
        bes: vec![listener],
        ..options
    };
    let daemon = Daemon::start(services, options).await.map_err(Failure::failed)?;
    Ok((daemon, reports))
}

/// Plays a build to the daemon, and gives what that reports of it.
async fn run(
    address: &str,
    build: &GeneratedBuild,
    reports: &mut broadcast::Receiver<Report>,
) -> Result<String, Failure> {
    play(address, &build.invocation_id(), &build.build_id(), build.events())
        .await
        .map_err(Failure::failed)?;
    Ok(reports.recv().await.map_err(Failure::failed)?.line)
}

fn verdict(build: &GeneratedBuild, missing: usize) -> String {
    let outputs = build.outputs().len();
    match missing {
        0 => format!("all {outputs} top-level outputs are on disk, with the right bytes"),
        n => format!("{n} of {outputs} top-level outputs are missing or wrong"),
    }
}

/// How many of the build's top-level outputs are not on disk as they should be.
fn check(build: &GeneratedBuild, exec_root: &Path) -> Result<usize, Failure> {
    let mut missing = 0;
    for output in build.outputs() {
        let path = exec_root.join(&output.path);
        let right = match &output.content {
            GeneratedContent::File(digest) => std::fs::read(&path)
                .is_ok_and(|bytes| crate::digest::Digest::of(digest.function(), &bytes) == *digest),
            GeneratedContent::Symlink(target) => {
                std::fs::read_link(&path).is_ok_and(|t| t == Path::new(target))
            }
            GeneratedContent::EmptyDirectory => path.is_dir(),
        };
        if !right {
            missing += 1;
            writeln!(print::err(), "outhaul: {} is missing or wrong", path.display())?;
        }
    }
    Ok(missing)
}

/// Deletes every third file.
fn delete_some(build: &GeneratedBuild, exec_root: &Path) -> Result<usize, Failure> {
    let mut deleted = 0;
    for output in build.outputs().iter().step_by(3) {
        if matches!(output.content, GeneratedContent::File(_)) {
            let path = exec_root.join(&output.path);
            std::fs::remove_file(&path).map_err(|e| Failure::failed(format!("{}: {e}", path.display())))?;
            deleted += 1;
        }
    }
    Ok(deleted)
}

#[cfg(test)]
mod tests {
    #[test]
    fn large_builds_stay_in_the_directory_whatever_its_name_is() {
        let large = super::beside("/tmp/_main/d/execroot/_main");
        assert_eq!(large, "/tmp/_main/d/execroot/large");
    }
}
