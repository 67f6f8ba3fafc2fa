//! The subcommands, and the settings that all of them have.

use std::{ffi::OsString, io::Write as _, path::PathBuf, process::ExitCode};

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

#[cfg(feature = "mcp")]
use super::mcp;
#[cfg(feature = "mount")]
use super::mount;
use super::{
    demo, doctor, du, evict, exec,
    exit::{self, Failure},
    export, fetch, gc, get, import, is_staged,
    log::start_log,
    ls, manual, pause, print, profiles, report, run, serve, stage, stat, status, top, wait, watch,
};
use crate::config::with_config_file;

/// Downloads a remote build's top-level outputs in the background.
#[derive(Debug, Parser)]
#[command(name = "outhaul", version, about, args_override_self = true, after_help = exit::HELP)]
pub(super) struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Configuration file (TOML), by default outhaul/config.toml in the XDG configuration directory
    #[arg(long, global = true, value_name = "FILE", env = "OUTHAUL_CONFIG")]
    config: Option<PathBuf>,

    /// What to log to standard error: a level, or directives such as outhaul::materialize=debug
    #[arg(long, global = true, value_name = "FILTER", env = "OUTHAUL_LOG")]
    log: Option<String>,

    /// Log as JSON, one object per line
    #[arg(long, global = true, env = "OUTHAUL_LOG_JSON")]
    log_json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon: receive build events and download the builds' top-level outputs
    Serve(Box<serve::ServeArgs>),
    /// Run a build command with a daemon of its own, and return when its outputs are on disk
    Run(Box<run::RunArgs>),
    /// Download outputs without a build tool: from a saved event file, or an action, a tree or a blob by digest
    #[command(subcommand)]
    Fetch(fetch::FetchCommand),
    /// Download recorded outputs by path, top-level or not
    Get(get::GetArgs),
    /// Run a program of a recorded build with its runfiles, without the build tool
    Exec(exec::ExecArgs),
    /// Show what is recorded about outputs: digest, size, state, target
    Stat(stat::Question),
    /// Show why outputs were downloaded or not, and where their bytes came from
    Why(stat::Question),
    /// Wait until the outputs of a build, or of some of its targets, are on disk
    Wait(wait::WaitArgs),
    /// Print a JSON line for each file of a build once it is complete under its final name
    Watch(watch::WatchArgs),
    /// Show the state of builds
    Status(status::StatusArgs),
    /// Show builds, caches and disk usage live in the terminal
    Top(top::TopArgs),
    /// List the recorded outputs of a build's output root
    Ls(ls::LsArgs),
    /// Show the profiles: named sets of rules for what editors, debuggers and coverage tools read
    Profiles(profiles::ProfilesArgs),
    /// Show recorded builds as a read-only directory (FUSE); files are downloaded when they are opened
    #[cfg(feature = "mount")]
    Mount(Box<mount::MountArgs>),
    /// Copy named outputs of a recorded build to a directory
    Stage(stage::StageArgs),
    /// Check whether a staged directory is complete and unchanged
    IsStaged(is_staged::IsStagedArgs),
    /// Pause the daemon's downloads of optional outputs, or with --all every download
    Pause(pause::PauseArgs),
    /// Have the daemon download again after `outhaul pause`
    Resume(pause::ResumeArgs),
    /// Write a recorded build to a file, to stage its outputs on another machine
    Export(export::ExportArgs),
    /// Import a build that was exported on another machine
    Import(import::ImportArgs),
    /// Show how much of the disk the recorded outputs take
    Du(du::DuArgs),
    /// Show what builds have downloaded, by target, rule, cache, workspace or day, and what it has cost
    Report(report::ReportArgs),
    /// Remove downloaded outputs that the cache still has, to free disk space
    Evict(evict::EvictArgs),
    /// Delete the records and journals of old builds
    Gc(gc::GcArgs),
    /// Look for what would go wrong when a workspace is built with Outhaul
    Doctor(Box<doctor::DoctorArgs>),
    /// Answer coding agents by the Model Context Protocol (MCP), on standard input and output
    #[cfg(feature = "mcp")]
    Mcp(Box<mcp::McpArgs>),
    /// Print the completions for a shell
    Completions(manual::CompletionsArgs),
    /// Write the manual pages to a directory
    Man(manual::ManArgs),
    /// Show how it works, without a build tool or a server
    Demo(demo::DemoArgs),
}

/// Parses the arguments and runs the command.
pub fn main() -> ExitCode {
    if let Some(code) = run::called_as_another() {
        return code;
    }
    let args: Vec<OsString> = std::env::args_os().collect();
    let command = Cli::command();
    let cli = match configured(&command, args) {
        Ok(args) => match command
            .try_get_matches_from(args)
            .and_then(|m| Cli::from_arg_matches(&m))
        {
            Ok(cli) => cli,
            Err(error) => {
                // Help and version are errors to clap, and go to standard output.
                let _ = error.print();
                return ExitCode::from(if error.use_stderr() { exit::USAGE } else { exit::OK });
            }
        },
        Err(failure) => return report(&failure),
    };
    let default = match &cli.command {
        Command::Serve(_) => "info",
        // What is left out, and sent unencrypted, is nobody else's to say. What is missing of a build is.
        Command::Fetch(fetch::FetchCommand::Bep(_)) => "error",
        Command::Fetch(_) | Command::Stage(_) => "warn",
        _ => "error",
    };
    if let Err(failure) = start_log(cli.log.as_deref().unwrap_or(default), cli.log_json) {
        return report(&failure);
    }
    let result = match cli.command {
        Command::Serve(args) => serve::main(*args),
        Command::Run(args) => run::main(*args),
        Command::Fetch(command) => fetch::main(command),
        Command::Get(args) => get::main(&args),
        Command::Exec(args) => exec::main(&args),
        Command::Stat(args) => stat::stat(&args),
        Command::Why(args) => stat::why(&args),
        Command::Wait(args) => wait::main(&args),
        Command::Watch(args) => watch::main(&args),
        Command::Status(args) => status::main(&args),
        Command::Top(args) => top::main(&args),
        Command::Ls(args) => ls::main(&args),
        Command::Profiles(args) => profiles::main(&args),
        #[cfg(feature = "mount")]
        Command::Mount(args) => mount::main(*args),
        Command::Stage(args) => stage::main(&args),
        Command::IsStaged(args) => is_staged::main(&args),
        Command::Pause(args) => pause::pause(&args),
        Command::Resume(args) => pause::resume(&args),
        Command::Export(args) => export::main(args),
        Command::Import(args) => import::main(&args),
        Command::Du(args) => du::main(&args),
        Command::Report(args) => report::main(&args),
        Command::Evict(args) => evict::main(&args),
        Command::Gc(args) => gc::main(&args),
        Command::Doctor(args) => doctor::main(*args),
        #[cfg(feature = "mcp")]
        Command::Mcp(args) => mcp::main(*args),
        Command::Completions(args) => manual::completions(&args, Cli::command()),
        Command::Man(args) => manual::pages(&args, Cli::command()),
        Command::Demo(args) => demo::main(args),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(failure) => report(&failure),
    }
}

fn report(failure: &Failure) -> ExitCode {
    if !failure.message.is_empty() {
        // Nowhere to say that standard error is closed.
        let _ = writeln!(print::err(), "outhaul: {}", failure.message);
    }
    ExitCode::from(failure.code)
}

/// The arguments with the configuration file's settings in front of the subcommand's own.
pub(super) fn configured(command: &clap::Command, args: Vec<OsString>) -> Result<Vec<OsString>, Failure> {
    let subcommands: Vec<String> = command
        .get_subcommands()
        .map(|s| s.get_name().to_owned())
        .collect();
    let flag = |sub: &clap::Command, flag: &str| {
        sub.get_arguments()
            .chain(command.get_arguments())
            .find(|arg| arg.get_long() == Some(flag))
            .map(|arg| arg.get_action().takes_values())
    };
    let known = |name: &str, wanted: &str| {
        // Which groups a daemon downloads says nothing of which ones are staged.
        if matches!(name, "stage" | "is-staged") && wanted == "output-group" {
            return None;
        }
        // What fails a build is not what fails a look at it.
        if name == "doctor" && wanted == "strict" {
            return None;
        }
        let sub = command.find_subcommand(name)?;
        // Commands with commands of their own (fetch) take flags only after those, so the file cannot set them.
        if sub.has_subcommands() {
            None
        } else {
            flag(sub, wanted)
        }
    };
    let known_anywhere = |wanted: &str| {
        command
            .get_subcommands()
            .flat_map(|sub| std::iter::once(sub).chain(sub.get_subcommands()))
            .any(|sub| flag(sub, wanted).is_some())
    };
    with_config_file(args, &subcommands, known, known_anywhere).map_err(Failure::usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
