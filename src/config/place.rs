//! Where files are put, and how.

use std::path::PathBuf;

use anyhow::{anyhow, bail};
use clap::Args;

use super::{ConfigError, all_parsed, parsed, size};
use crate::{
    materialize::{MaterializeOptions, place::PlaceOptions},
    roots::{Destination, RootRules},
    units::parse_size,
};

/// Batches that may be under way where the rate is limited.
const LIMITED_BATCHES: usize = 4;

/// Bytes in a second. `/s` may be left out, unless a number alone would be left.
fn parse_rate(text: &str) -> anyhow::Result<u64> {
    let size = text.trim().strip_suffix("/s");
    let is_number = |text: &str| text.trim().bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let error = || anyhow!("{text:?} is not a rate (write 500KiB/s, 50MiB/s or 1GB/s)");
    let rate = match size {
        None if is_number(text) => return Err(error()),
        _ => parse_size(size.unwrap_or(text)).map_err(|_| error())?,
    };
    match rate {
        0 => bail!("must be greater than zero"),
        rate => Ok(rate),
    }
}

/// Flags of placing.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Output trees")]
pub(crate) struct PlaceArgs {
    /// Directory that exec roots must be in (repeatable); by default, any directory that the daemon's user owns and
    /// that looks like an exec root (`…/execroot/NAME`) is allowed
    #[arg(
        long,
        value_name = "DIR",
        env = "OUTHAUL_ALLOW_EXEC_ROOT",
        value_delimiter = ':'
    )]
    pub allow_exec_root: Vec<PathBuf>,

    /// Use the path TO where the build has FROM, for builds in another mount namespace (repeatable)
    #[arg(long, value_name = "FROM=TO", env = "OUTHAUL_PATH_MAP", value_delimiter = ',')]
    pub path_map: Vec<String>,

    /// Do not read Bazel's action cache, which has the digests of outputs that no event names: runfiles and
    /// intermediate outputs
    #[arg(long, env = "OUTHAUL_NO_ACTION_CACHE")]
    pub no_action_cache: bool,

    /// Make output files writable (0755 instead of 0555), like Bazel's --experimental_writable_outputs
    #[arg(long, env = "OUTHAUL_WRITABLE_OUTPUTS")]
    pub writable_outputs: bool,

    /// Threads that write files; by default one per core, at least 2 and at most 8
    #[arg(long, value_name = "N", env = "OUTHAUL_WRITERS")]
    pub writers: Option<usize>,

    /// Bytes of small files that may be in memory between the cache and the disk
    #[arg(
        long,
        value_name = "SIZE",
        env = "OUTHAUL_BYTES_IN_FLIGHT",
        default_value = "32MiB"
    )]
    pub bytes_in_flight: String,

    /// Download at most this much per second, such as 50MiB/s, and as much again for optional outputs
    #[arg(long, value_name = "SIZE/s", env = "OUTHAUL_LIMIT_RATE")]
    pub limit_rate: Option<String>,

    /// Space to keep free on the file systems of output trees, such as 10GiB or 5%: nothing is downloaded that would
    /// leave less, and no optional output that would leave less than twice as much; by default 64MiB, or 5% of a file
    /// system smaller than 1.25GiB
    #[arg(long, value_name = "SIZE|PERCENT", env = "OUTHAUL_MIN_FREE_SPACE")]
    pub min_free_space: Option<String>,
}

impl PlaceArgs {
    /// The rules for output roots.
    ///
    /// # Errors
    /// Naming the flag that is wrong.
    pub(crate) fn rules(&self, destination: Destination) -> Result<RootRules, ConfigError> {
        for path in &self.allow_exec_root {
            if !path.is_absolute() {
                return Err(ConfigError::new(
                    format!("--allow-exec-root={}", path.display()),
                    "must be an absolute path",
                ));
            }
        }
        Ok(RootRules {
            destination,
            path_maps: all_parsed("--path-map", &self.path_map)?,
            allowed: self.allow_exec_root.clone(),
            no_action_cache: self.no_action_cache,
        })
    }

    /// How much is done at once, and how files are placed.
    ///
    /// # Errors
    /// Naming the flag that is wrong.
    pub(crate) fn options(&self) -> Result<MaterializeOptions, ConfigError> {
        let space = |text: &String| parsed(&format!("--min-free-space={text}"), text);
        let mut options = MaterializeOptions {
            place: PlaceOptions {
                writable: self.writable_outputs,
                space: self
                    .min_free_space
                    .as_ref()
                    .map(space)
                    .transpose()?
                    .unwrap_or_default(),
            },
            ..MaterializeOptions::default()
        };
        if let Some(rate) = &self.limit_rate {
            options.rate =
                Some(parse_rate(rate).map_err(|e| ConfigError::new(format!("--limit-rate={rate}"), e))?);
            // What waits for its turn keeps others from theirs.
            options.batches_in_flight = LIMITED_BATCHES;
        }
        if let Some(writers) = self.writers {
            if !(1..=64).contains(&writers) {
                return Err(ConfigError::new(
                    format!("--writers={writers}"),
                    "must be from 1 to 64",
                ));
            }
            options.writers = writers;
        }
        options.bytes_in_flight = size("--bytes-in-flight", &self.bytes_in_flight)?;
        if options.bytes_in_flight < options.batch_bytes {
            return Err(ConfigError::new(
                "--bytes-in-flight",
                "must be at least 1MiB, the size of a batch",
            ));
        }
        Ok(options)
    }
}
