//! `outhaul completions` and `outhaul man`: what packages install beside the program, made from its own flags.

use std::{io::Write as _, path::PathBuf};

use clap::{Args, Command};
use clap_complete::Shell;

use super::{exit, exit::Failure, print};

/// Arguments of `outhaul completions`.
#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// The shell, whose startup file or completion directory takes what is printed
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

/// Arguments of `outhaul man`.
#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// Directory for outhaul.1, outhaul-run.1 and so on; created if it does not exist
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

pub(super) fn completions(args: &CompletionsArgs, mut command: Command) -> Result<u8, Failure> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command, "outhaul", &mut text);
    print::out().write_all(&text)?;
    Ok(exit::OK)
}

pub(super) fn pages(args: &ManArgs, command: Command) -> Result<u8, Failure> {
    let written = std::fs::create_dir_all(&args.directory)
        .and_then(|()| clap_mangen::generate_to(command, &args.directory));
    written.map_err(|e| Failure::failed(format!("{}: {e}", args.directory.display())))?;
    Ok(exit::OK)
}
