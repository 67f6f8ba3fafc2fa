//! `outhaul doctor`: looks at a workspace, and says what would go wrong when it is built with Outhaul, under `outhaul run`
//! or with a daemon in its rc files.
//!
//! It looks and changes nothing. What the command's options come to, Bazel itself says, as for `run`; but only a server that
//! runs anyway is asked, unless the user wants one started. One function judges one thing, by plain facts where that can
//! be.

mod bazel;
mod caches;
mod finding;
mod machine;
mod options;
mod port;
mod state;

use std::{
    ffi::{OsStr, OsString},
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use clap::Args;
use serde_json::json;

use self::{
    bazel::{Place, SCRATCH},
    finding::{Finding, Level},
    options::{CHECKS, Command},
    port::{Listener, listener},
};
use super::{
    client::DaemonAddress,
    exit::{self, Failure},
    print,
    run::{
        CommandInfo, Line, Setting, can_forward, directories_of, find, is_ours, names_a_cache, path_without,
        reach_of, take_own_headers, waits_for_all,
    },
    runtime,
    scratch::Scratch,
};
use crate::{
    bep::event::CommandLine,
    config::{BES_LISTEN, CacheArgs, ControlArgs, PlaceArgs, StateArgs, UpstreamArgs},
    printable::printable,
    record::{Examined, examine},
    roots::{Destination, RootRules},
    sources::Sources,
    transport::Endpoint,
};

/// How long a daemon may take to answer.
const DAEMON: Duration = Duration::from_secs(5);

/// Arguments of `outhaul doctor`.
#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Look at the workspace around this directory; by default, around the current one
    #[arg(long, value_name = "DIR")]
    workspace: Option<PathBuf>,

    /// Start Bazel's server if none runs for the workspace: only Bazel knows what the options in rc files come to
    #[arg(long)]
    start_bazel: bool,

    /// Exit with code 1 if there are warnings, too
    #[arg(long)]
    strict: bool,

    /// Print JSON, one object per line
    #[arg(long)]
    json: bool,

    /// The Bazel command to look at, such as `bazel test --config=ci //...`; by default `bazel build`
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,

    #[command(flatten)]
    state: StateArgs,

    #[command(flatten)]
    place: PlaceArgs,

    #[command(flatten)]
    cache: CacheArgs,

    #[command(flatten)]
    upstream: UpstreamArgs,
}

pub(super) fn main(args: DoctorArgs) -> Result<u8, Failure> {
    // Before any limit is raised: it is the one that builds and daemons start with.
    let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let found = runtime()?.block_on(examine_all(&args, descriptors))?;
    show(&args, &found)?;
    let bad = if args.strict { Level::Warning } else { Level::Error };
    let any_bad = found.iter().any(|finding| finding.level >= bad);
    Ok(if any_bad { exit::FAILED } else { exit::OK })
}

async fn examine_all(args: &DoctorArgs, descriptors: Option<u64>) -> Result<Vec<Finding>, Failure> {
    let directory = match &args.workspace {
        Some(directory) => std::path::absolute(directory)?,
        None => std::env::current_dir()?,
    };
    let place = Place::new(directory, &args.command);
    let line = Line::building(&place.command).ok_or_else(|| {
        Failure::usage(
            "the command after -- must be one of Bazel's that builds: bazel build, test, run or coverage",
        )
    })?;
    let rules = args.place.rules(Destination::ExecRoot)?;
    let mark = args.place.options()?.place.space;
    let mut found = vec![bazel::workspace(&place)];
    let asked = place.ask(&line, args.start_bazel).await;
    found.push(bazel::program(
        &place,
        asked.as_ref().and_then(|(info, _)| info.version),
    ));
    let mut base = place.workspace.as_deref().and_then(machine::output_base);
    let mut backend = None;
    if let Some((info, is_asked)) = &asked {
        found.push(bazel::options(info, *is_asked));
        if let Ok(options) = &info.options {
            let line = options.line();
            base = options.output_base.clone().or(base);
            backend = of_command(args, info, &line, base.as_deref(), &rules, &mut found).await?;
        }
    }
    if !found.iter().any(|finding| finding.code == "cache") && args.cache.names_a_cache() {
        let cache = args.cache.cache()?;
        found.extend(caches::all(&cache).await);
    }
    if let Some(base) = &base {
        found.push(machine::output_base_access(base, &rules));
        let here = rules.translate(&base.to_string_lossy());
        found.extend(machine::space(&here, mark));
        let asked = machine::file_time(&here).map(|theirs| (theirs, SystemTime::now()));
        found.extend(asked.map(|(theirs, ours)| {
            machine::clock(&format!("the file system of {}", here.display()), theirs, ours)
        }));
    }
    let state = args.state.directory()?;
    found.push(state::directory(&state));
    found.push(record(args, state).await?);
    if backend.is_none()
        && let Ok(address) = BES_LISTEN.parse()
    {
        found.push(port::port(address, &listener(address).await, false));
    }
    found.push(machine::descriptors(descriptors));
    let helper = find(OsStr::new("fusermount3"), &path_without(), is_ours);
    let is_root = rustix::process::geteuid().is_root();
    found.push(machine::fuse(machine::fuse_device(), helper.is_some(), is_root));
    Ok(found)
}

/// What the command's options say. Gives the address on this machine that its events go to, if there is one.
async fn of_command(
    args: &DoctorArgs,
    info: &CommandInfo,
    line: &CommandLine,
    base: Option<&Path>,
    rules: &RootRules,
    found: &mut Vec<Finding>,
) -> Result<Option<SocketAddr>, Failure> {
    let command = Command {
        version: info.version,
        line,
    };
    if let Err(error) = reach_of(info) {
        found.push(bazel::server(&error));
    }
    let (mut address, mut is_ours) = (None, false);
    if let Some(local) = command.local_backend()
        && let Some((at, listener)) = local_listener(&local).await
    {
        address = Some(at);
        is_ours = matches!(listener, Listener::Outhaul { .. } | Listener::Manager { .. });
        found.push(port::port(at, &listener, true));
    }
    let forward = can_forward(info, line, (args.upstream.clone(), args.cache.clone()));
    found.push(bazel::backend(
        line.given("bes_backend"),
        is_ours,
        forward.map_err(|error| error.to_string()),
    ));
    found.extend(CHECKS.iter().filter_map(|check| check(&command)));

    let mut cache = args.cache.clone();
    take_own_headers(&mut cache, &args.command);
    let sources = Sources::new(cache.source_rule(true)?);
    let of_cache = match sources.of_build(Some(line), &directories_of(info)) {
        Ok(cache) => caches::all(&cache).await,
        Err(reason) => vec![caches::none(&reason)],
    };
    let fault = of_cache.iter().find(|finding| finding.level == Level::Error);
    let reached = fault.map_or(Ok(()), |finding| Err(finding.message.clone()));
    let place = base.map_or(Ok(()), |base| {
        let allowed = rules.allows(base);
        allowed.map_err(|error| error.to_string())
    });
    let setting = Setting {
        keep: false,
        word: &info.word,
        repeats: info.word == "build",
        version: info.version,
        options: Ok(line),
        place,
        cache: if names_a_cache(line) { reached } else { Ok(()) },
        is_builds_cache: !args.cache.names_a_cache(),
        reads_action_cache: !args.place.no_action_cache,
        is_waited_for: info.word != "run" && !info.is_script || waits_for_all(line),
    };
    found.push(options::downloads(&setting));
    found.extend(of_cache);
    Ok(address)
}

/// Who listens where events go on this machine; for a name, at the first of its addresses where anybody does.
async fn local_listener(endpoint: &Endpoint) -> Option<(SocketAddr, Listener)> {
    let mut found = None;
    for address in socket_addresses(endpoint) {
        let listener = listener(address).await;
        if !matches!(listener, Listener::Nobody) {
            return Some((address, listener));
        }
        found = found.or(Some((address, listener)));
    }
    found
}

/// The addresses that a server on this machine may have.
fn socket_addresses(endpoint: &Endpoint) -> Vec<SocketAddr> {
    let authority = endpoint.authority();
    let port = authority.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
    let (Some(host), Some(port)) = (endpoint.host(), port) else {
        return Vec::new();
    };
    let ips = host.parse().map_or_else(
        |_| vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
        |ip: IpAddr| vec![ip],
    );
    ips.into_iter().map(|ip| SocketAddr::new(ip, port)).collect()
}

/// Whether the record opens. A process that has it is asked for something small.
async fn record(args: &DoctorArgs, state: PathBuf) -> Result<Finding, Failure> {
    let examined = tokio::task::spawn_blocking(move || match Scratch::temporary(SCRATCH) {
        Ok(scratch) => examine(&state, scratch.path()),
        Err(failure) => Examined::Unknown(failure.message),
    });
    let examined = examined.await.map_err(Failure::failed)?;
    let answers = if let Examined::Held(_) = examined {
        let address = DaemonAddress::new(&ControlArgs::default(), &args.state, args.cache.tls.files())?;
        let asking = async { address.connect().await.ok()?.invocations(1).await.ok() };
        matches!(tokio::time::timeout(DAEMON, asking).await, Ok(Some(_)))
    } else {
        false
    };
    Ok(state::record(&examined, answers))
}

fn show(args: &DoctorArgs, found: &[Finding]) -> Result<(), Failure> {
    let mut out = print::out();
    for finding in found {
        let message = printable(&finding.message);
        if args.json {
            let value = json!({
                "code": finding.code,
                "level": finding.level.to_string(),
                "message": finding.message,
                "fix": finding.fix,
            });
            writeln!(out, "{value}")?;
            continue;
        }
        writeln!(out, "{:7}  {}: {message}", finding.level, finding.code)?;
        if let Some(fix) = &finding.fix {
            writeln!(out, "{:7}  -> {}", "", printable(fix))?;
        }
    }
    let count = |level| found.iter().filter(|finding| finding.level == level).count();
    let counted = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    writeln!(
        print::err(),
        "outhaul: found {}, {} and {}",
        counted(count(Level::Error), "error"),
        counted(count(Level::Warning), "warning"),
        counted(count(Level::Note), "note")
    )?;
    Ok(())
}
