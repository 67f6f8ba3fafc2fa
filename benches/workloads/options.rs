//! The command line.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, ValueEnum};

use crate::cache::Kind;

/// Measures whole workloads: `outhaul serve` in a process of its own, a player that sends a generated build's events as
/// Bazel would, a cache, and in the same rounds the limit programs and the peers that are installed.
///
/// Prints Markdown tables with medians, minima and maxima, and the goals with the results. buildbox-casd,
/// bazel-remote, nginx, the object stores and the peers (remotetool of remote-apis-sdks, cas of luci-go, rclone) are looked for where scripts/install-peers
/// puts programs ($OUTHAUL_PEERS or ~/.cache/outhaul-peers, bin) and then on the PATH. L needs 16 GiB of memory.
#[derive(Debug, Parser)]
#[command(name = "workloads", bin_name = "cargo bench --bench workloads --")]
pub(crate) struct Options {
    /// What is measured; by default everything but `archives`, `scale` and `growth`
    #[arg(value_enum, ignore_case = true, value_name = "WORKLOAD")]
    pub(crate) workloads: Vec<Workload>,

    /// Rounds that count, after one warm-up in which contents are checked as well
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,

    /// Part of each workload's size
    #[arg(long, default_value_t = 1.0)]
    pub(crate) scale: f64,

    /// Exit with 1 when a goal is missed
    #[arg(long)]
    pub(crate) check: bool,

    /// Which cache
    #[arg(long, value_enum, default_value_t = Kind::Embedded)]
    pub(crate) cache: Kind,

    /// Also S through a line with these round trips, in milliseconds
    #[arg(long, value_delimiter = ',', value_name = "MS")]
    pub(crate) rtt: Vec<u64>,

    /// And that many bits a second: 100m, 1g; with --rtt, each with each
    #[arg(long, value_delimiter = ',', value_name = "BITS", value_parser = bits)]
    pub(crate) bandwidth: Vec<u64>,

    /// A checkout of TheRock (github.com/ROCm/TheRock), whose fetch_artifacts.py `archives` is compared with
    #[arg(long, value_name = "DIR")]
    pub(crate) therock: Option<PathBuf>,

    /// How the archives of `archives` are compressed
    #[arg(long, value_enum, default_value_t = Packing::Zst)]
    pub(crate) packing: Packing,

    /// Without the peers that are installed
    #[arg(long)]
    pub(crate) no_peers: bool,

    /// Where to work; by default $OUTHAUL_BENCH_DIR, else /dev/shm
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,

    /// Another build of outhaul than the one that was made with this benchmark
    #[arg(long, value_name = "PROGRAM", default_value = env!("CARGO_BIN_EXE_outhaul"))]
    pub(crate) outhaul: PathBuf,

    /// Another build of outhaul to compare with, in the same rounds
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) against: Option<PathBuf>,

    /// A flag more for `outhaul serve`, to compare settings: --flag=--writers=4 (repeatable)
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    pub(crate) flag: Vec<String>,

    /// What `cargo bench` says
    #[arg(long, hide = true)]
    bench: bool,
}

/// A workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    /// 100,000 files of 1 to 4 KiB in 1,000 directories
    S,
    /// 5,000 files of 200 KiB
    M,
    /// 4 files of 1 GiB
    L,
    /// 50,000 files with 5,000 distinct digests
    D,
    /// S once more with everything present, with a daemon that has run and with one just started
    N,
    /// 1,000,000 files in shared nested sets over 20,000 targets, all only known
    E,
    /// S with 1 % of its contents changed
    R,
    /// 20 archives of 100 MiB with 10,000 files, in a bucket of versitygw, unpacked into one tree
    Archives,
    /// Time and memory as builds grow
    Scale,
    /// What lies on disk after 100 builds of R, one after the other
    Growth,
}

/// A compressor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Packing {
    /// .tar.zst
    Zst,
    /// .tar.xz, which takes minutes to make
    Xz,
}

impl Packing {
    /// What tar calls it.
    pub(crate) const fn flag(self) -> &'static str {
        match self {
            Self::Zst => "--zstd",
            Self::Xz => "--xz",
        }
    }

    /// How the names of such archives end.
    pub(crate) const fn ending(self) -> &'static str {
        match self {
            Self::Zst => "zst",
            Self::Xz => "xz",
        }
    }
}

impl Options {
    /// Whether a workload is to be measured.
    pub(crate) fn has(&self, workload: Workload) -> bool {
        if self.workloads.is_empty() {
            !matches!(workload, Workload::Archives | Workload::Scale | Workload::Growth)
        } else {
            self.workloads.contains(&workload)
        }
    }

    /// This many, or the part of them that was asked for.
    pub(crate) fn scaled(&self, count: usize) -> usize {
        ((count as f64 * self.scale).round() as usize).max(1)
    }

    /// Whether the peers that are installed fetch trees as well: they know caches by gRPC only.
    pub(crate) const fn has_peers(&self) -> bool {
        !self.no_peers && self.cache.is_grpc()
    }

    /// The lines that S is also fetched through.
    pub(crate) fn lines(&self) -> Vec<Line> {
        let rtts = if self.rtt.is_empty() && !self.bandwidth.is_empty() {
            &[0][..]
        } else {
            &self.rtt
        };
        let rates: Vec<Option<u64>> = if self.bandwidth.is_empty() {
            vec![None]
        } else {
            self.bandwidth.iter().copied().map(Some).collect()
        };
        let each = |&rtt: &u64| rates.iter().map(move |&bits| Line { rtt, bits });
        rtts.iter().flat_map(each).collect()
    }
}

/// A line to the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Line {
    /// In milliseconds.
    rtt: u64,
    /// A second.
    pub(crate) bits: Option<u64>,
}

impl Line {
    pub(crate) const fn rtt(self) -> Duration {
        Duration::from_millis(self.rtt)
    }

    /// The same without a round trip.
    pub(crate) const fn near(self) -> Self {
        Self { rtt: 0, ..self }
    }

    pub(crate) fn name(self) -> String {
        let rate = match self.bits {
            None => String::new(),
            Some(bits) if bits % 1_000_000_000 == 0 => format!(", {} Gbit/s", bits / 1_000_000_000),
            Some(bits) => format!(", {} Mbit/s", bits / 1_000_000),
        };
        format!("{} ms round trip{rate}", self.rtt)
    }
}

fn bits(text: &str) -> Result<u64> {
    let (digits, unit) = text.split_at(text.len().saturating_sub(1));
    let unit = match unit {
        "m" | "M" => 1_000_000,
        "g" | "G" => 1_000_000_000,
        _ => bail!("write 100m or 1g"),
    };
    let number: u64 = digits.parse().context("write 100m or 1g")?;
    Ok(number * unit)
}
