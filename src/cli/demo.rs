//! `outhaul demo`: the whole thing without a build tool or a server.
//!
//! The embedded cache is filled by a generated build, whose events are played to the real event service as Bazel
//! would. Then some outputs are deleted, and a second build is played in which everything is a cache hit.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use clap::Args;

use super::{
    exit::{self, Failure},
    print, runtime,
};
use crate::{
    bes::{BesAddress, BesListener, HoldPolicy},
    config::{Limits, PlaceArgs},
    daemon::{Daemon, DaemonOptions, Rooms},
    demo::{GeneratedBuild, GeneratedContent, Setting, play},
    embedded_cache::EmbeddedCache,
    invocation::policy::Policy,
    remote::{GrpcCache, RemoteOptions},
    roots::{Destination, RootRules},
    sources::SourceRule,
    transport::Endpoint,
};

/// Arguments of `outhaul demo`.
#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// Directory to use; by default a new one in the temporary directory. It is not deleted, so that you can look at it
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Arguments of `outhaul cache`.
#[derive(Debug, Args)]
pub(super) struct CacheServerArgs {
    /// Where to listen: IP:PORT or unix:PATH
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    listen: String,

    /// Keep blobs as files in this directory instead of in memory
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Offer zstd
    #[arg(long)]
    zstd: bool,
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

    let cache = EmbeddedCache::builder()
        .zstd(true)
        .start()
        .await
        .map_err(Failure::failed)?;
    writeln!(out, "An embedded remote cache listens on {}.", cache.endpoint())?;
    let setting = Setting {
        workspace: base.join("workspace").display().to_string(),
        exec_root: exec_root.display().to_string(),
        remote_cache: cache.endpoint(),
        instance_name: String::new(),
    };
    let build = GeneratedBuild::new(cache.store(), setting, 1);

    let endpoint = Endpoint::parse("--remote-cache", &cache.endpoint()).map_err(Failure::failed)?;
    let store = GrpcCache::new(RemoteOptions::new(endpoint)).map_err(Failure::failed)?;
    let record = super::serve::open_record(&base.join("state")).await?;
    let rooms = Rooms::open(
        record,
        Policy::default(),
        RootRules {
            destination: Destination::ExecRoot,
            allowed: vec![base.clone()],
            ..RootRules::default()
        },
        SourceRule::Fixed(store.into()),
        PlaceArgs::from_environment()?.options()?,
        false,
    )?;
    let listener =
        BesListener::bind(&BesAddress::Tcp(([127, 0, 0, 1], 0).into())).map_err(Failure::failed)?;
    let mut reports = rooms.engine.reports();
    let daemon = Daemon::start(
        rooms,
        DaemonOptions {
            journal_dir: Some(base.join("state/journal")),
            durable: false,
            hold: HoldPolicy::default(),
            upstream: None,
            limits: Limits::default().bes,
            control_message: Limits::default().control_message,
            bes: vec![listener],
            control: None,
            admin: None,
            retention: None,
            leases: None,
            idle_timeout: None,
            notifications: None,
        },
    )
    .await
    .map_err(Failure::failed)?;
    let door = daemon
        .bes
        .first()
        .map(|a| format!("grpc://{a}"))
        .unwrap_or_default();
    writeln!(out, "The daemon takes build events on {door}.\n")?;
    let shutdown = daemon.shutdown_token();
    let serving = tokio::spawn(daemon.join());

    writeln!(
        out,
        "A first build runs remotely and downloads nothing itself (--remote_download_minimal):"
    )?;
    play(&door, &build.invocation_id(), &build.build_id(), build.events())
        .await
        .map_err(Failure::failed)?;
    let first = reports.recv().await.map_err(Failure::failed)?;
    writeln!(out, "  {}", first.line)?;
    let missing = check(&build, &exec_root)?;
    writeln!(out, "  its command has returned; {}\n", verdict(&build, missing))?;

    let deleted = delete_some(&build, &exec_root)?;
    writeln!(
        out,
        "{deleted} of its outputs are deleted. A second build, all cache hits, executes nothing:"
    )?;
    let second_build = build.incremental();
    play(
        &door,
        &second_build.invocation_id(),
        &second_build.build_id(),
        second_build.events(),
    )
    .await
    .map_err(Failure::failed)?;
    let second = reports.recv().await.map_err(Failure::failed)?;
    writeln!(out, "  {}", second.line)?;
    let missing_now = check(&second_build, &exec_root)?;
    writeln!(out, "  {}\n", verdict(&second_build, missing_now))?;
    writeln!(out, "The files are in {}", exec_root.join("bazel-out").display())?;

    shutdown.cancel();
    let served = serving.await.map_err(Failure::failed)?;
    served.map_err(Failure::failed)?;
    cache.stop().await;
    Ok(if missing == 0 && missing_now == 0 && deleted > 0 {
        exit::OK
    } else {
        exit::FAILED
    })
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

pub(super) fn cache(args: CacheServerArgs) -> Result<u8, Failure> {
    runtime()?.block_on(async {
        let cache = EmbeddedCache::builder()
            .zstd(args.zstd)
            .directory(args.dir)
            .bind(args.listen)
            .start()
            .await
            .map_err(Failure::usage)?;
        let mut out = print::out();
        writeln!(out, "{}", cache.endpoint())?;
        out.flush()?;
        tokio::signal::ctrl_c().await?;
        cache.stop().await;
        Ok(exit::OK)
    })
}
