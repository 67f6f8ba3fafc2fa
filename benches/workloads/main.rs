//! Whole workloads, against their goals: `cargo bench --bench workloads -- --help`.
//!
//! `outhaul serve` is a process of its own, with its journal, its record and its defaults, on tmpfs; so its processor
//! time and its peak memory are its own. The player and the embedded cache are threads of this process, whose processor
//! time is given apart; other caches are processes. Events are encoded and caches filled before anything is measured.
//! In every round, what a workload is compared with runs as well, and ratios are taken round by round. Every file's
//! size is checked after every run, the contents in the warm-up.

mod archives;
mod beside;
mod cache;
mod events;
mod fetched;
mod growth;
mod keyed;
mod known;
#[path = "../net/mod.rs"]
mod net;
mod options;
mod peers;
#[allow(dead_code, reason = "shared with programs that use more of it")]
#[path = "../plain/mod.rs"]
mod plain;
mod process;
mod rig;
mod samples;
mod scale;
mod small;
mod tree;

use std::{
    fs,
    io::{Write as _, stderr, stdout},
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::Result;
use clap::Parser as _;

use crate::{
    cache::{Cache, Kind},
    options::{Options, Workload},
    rig::Rig,
    samples::Goals,
};

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let directory = plain::directory_in(options.dir.as_deref())?;
    head(&options, directory.path())?;
    let mut goals = Goals::default();
    if [Workload::S, Workload::N, Workload::R]
        .into_iter()
        .any(|w| options.has(w))
    {
        let (mut rig, cache) = ready(&options, directory.path())?;
        small::measure(&options, &mut rig, &cache, &mut goals)?;
    }
    for workload in [Workload::M, Workload::D, Workload::L] {
        if options.has(workload) {
            let (mut rig, cache) = ready(&options, directory.path())?;
            fetched::measure(&options, workload, &mut rig, &cache, &mut goals)?;
        }
    }
    if options.has(Workload::E) {
        let (mut rig, cache) = ready(&options, directory.path())?;
        known::measure(&options, &mut rig, &cache, &mut goals)?;
    }
    if options.has(Workload::Archives) {
        let (rig, _cache) = ready(&options, directory.path())?;
        archives::measure(&options, &rig, &mut goals)?;
    }
    if options.has(Workload::Scale) {
        let (mut rig, cache) = ready(&options, directory.path())?;
        scale::measure(&options, &mut rig, &cache)?;
    }
    if options.has(Workload::Growth) {
        let (mut rig, cache) = ready(&options, directory.path())?;
        growth::measure(&options, &mut rig, &cache)?;
    }
    let reached = goals.print()?;
    Ok(ExitCode::from(u8::from(options.check && !reached)))
}

/// A workload's own directory and cache.
fn ready(options: &Options, directory: &Path) -> Result<(Rig, Cache)> {
    let base = directory.join("work");
    rig::remove(&base)?;
    fs::create_dir_all(&base)?;
    let cache = Cache::start(options.cache, &base)?;
    let programs = std::iter::once(&options.outhaul).chain(&options.against);
    let rig = Rig::new(base, programs.cloned().collect(), options.flag.clone())?;
    Ok((rig, cache))
}

/// Says on standard error what goes on.
fn say(text: &str) {
    // Nobody who has closed it misses it.
    let _ = writeln!(stderr(), "workloads: {text}");
}

/// What was measured where.
fn head(options: &Options, directory: &Path) -> Result<()> {
    let first_line = |command: &mut Command| {
        let said = command.output().map(|output| output.stdout).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        said.lines().next().unwrap_or("unknown").trim().to_owned()
    };
    let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = processors
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or("unknown processor", |(_, model)| model.trim());
    let count = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let file_system = first_line(Command::new("stat").args(["-f", "-c", "%T"]).arg(directory));
    let version = first_line(Command::new(&options.outhaul).arg("--version"));
    let cache = options.cache.describe()?;
    let date = first_line(Command::new("date").arg("+%F"));
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    writeln!(
        stdout(),
        "{date}, {count} × {model}, Linux {}, {file_system}; {version}; {cache}.\n\
         `cargo bench --bench workloads -- {}`\n\n\
         Medians of {} rounds after a warm-up, with minimum and maximum.",
        kernel.trim(),
        arguments.join(" "),
        options.rounds
    )?;
    if !matches!(options.cache, Kind::Embedded | Kind::Disk) {
        writeln!(stdout(), "The cache is a process of its own.")?;
    }
    if options.has_peers() {
        writeln!(stdout(), "Peers: {}.", peers::Peers::describe())?;
    }
    Ok(())
}
