//! `outhaul demo`: the whole thing without a build tool or a server.
//!
//! A small HTTP cache is filled by a generated build, whose events are played to the real event service as Bazel
//! would. Then some outputs are deleted, and a second build is played in which everything is a cache hit.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use clap::Args;
use tokio::sync::broadcast;

use super::{
    exit::{self, Failure},
    print, runtime,
};
use crate::{
    bes::{BesAddress, BesListener},
    config::{PlaceArgs, from_environment},
    daemon::{Daemon, DaemonOptions, Services},
    demo::{DemoCache, GeneratedBuild, GeneratedContent, Setting, play},
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
}

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

    let cache = DemoCache::default();
    let address = cache.serve().await?;
    writeln!(out, "An embedded remote cache listens on {address}.")?;
    let setting = Setting {
        workspace: base.join("workspace").display().to_string(),
        exec_root: exec_root.display().to_string(),
        remote_cache: address.clone(),
        instance_name: String::new(),
    };
    let build = GeneratedBuild::new(|bytes| cache.put(bytes), setting, 1);
    let (daemon, mut reports) = start(&base, &address).await?;
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

/// Starts a daemon for a cache, and gives what it reports of builds.
async fn start(base: &Path, cache: &str) -> Result<(Daemon, broadcast::Receiver<Report>), Failure> {
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
        ..DaemonOptions::default()
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
