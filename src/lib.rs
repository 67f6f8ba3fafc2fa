//! Outhaul downloads a remote build's top-level outputs in the background.
//!
//! A build tool with a remote cache need not download anything: its event stream names every output by path and digest.
//! Outhaul listens to that stream, decides which outputs somebody asked for, fetches those that are not there, verifies
//! and places them, and lets the build tool's command return when that is done. It records the rest, so that any output
//! can be downloaded later by its path.
//!
//! This crate is the program's library; `main.rs` calls [`cli::main`] and no more. `docs/architecture.md` tells a
//! build's way through it step by step, `docs/bazel.md` what Bazel does and needs.
//!
//! # The way of the data
//!
//! ```text
//!  Bazel ──gRPC──▶ bes ───events──▶ invocation ──wants──▶ materialize ──files──▶ output root
//!  event file ───▶ bep ──┘            │    ▲  selection       │   ▲
//!                         │           └─metadata──▶ record ◀──┘   └──bytes── remote ◀── the cache
//!                         ▼ journal                   ▲
//!                                                  control ◀── cli, admin port
//! ```
//!
//! One direction: events come in at one end, files go out at the other, and nothing imports its caller.
//!
//! # The rooms
//!
//! * [`bep`] turns wire messages into a small domain [`bep::Event`], and knows the graph of named sets. No networks, no
//!   disks.
//! * [`builds`] is what the event service and the builds ask of each other, and knows neither.
//! * [`journal`] keeps on disk what was acknowledged, a file for each stream.
//! * [`bes`] is the door: it journals events, acknowledges them, and holds the last acknowledgement back. It does not know
//!   what is wanted.
//! * [`invocation`] is one build's life. [`invocation::build`] and [`invocation::selection`] are the decisions, plain data
//!   in and out; [`invocation::Engine`] runs a task for each build that carries them out.
//! * [`materialize`] gets wanted outputs to disk. One coordinator task owns all state; [`materialize::place`] is
//!   everything that touches an output tree, on threads of its own.
//! * [`remote`] is the client of a Remote Execution API cache. It has never heard of Bazel.
//! * [`action_cache`] reads what Bazel itself has on disk of outputs that no event names: files to facts, nothing else.
//! * [`record`] keeps what is known of outputs and builds, in sled, behind an interface that cannot fail a build.
//! * [`stage`] picks outputs of a recorded build and copies them to a directory; it carries builds elsewhere.
//! * [`doors`] says who may come in at the listening sockets: certificates, tokens, whose process it is.
//! * [`control`] answers the other commands and shows health and metrics.
//! * [`notify`] tells others, by HTTP or by a command, what is settled.
//! * [`daemon`] puts the rooms together and opens the doors; [`config`] checks what the user set; [`cli`] has one file
//!   for each subcommand.
//! * [`digest`], [`exec_path`], [`output`], [`units`] are values that cannot hold anything bad, so that nobody downstream
//!   checks again; [`metrics`] counts.
//! * [`embedded_cache`] and [`demo`] stand in for a server and a build, in `outhaul demo` and in tests.
//!
//! # The promises
//!
//! Before all of them: **never worse than without.** A build under `outhaul run`, or with Outhaul in its `.bazelrc`, never
//! ends with less on disk than the same Bazel command alone would have left, in the download mode that its user asked for
//! (top-level where they asked for none), whatever its configuration. What Outhaul did not see, or could not do, is said;
//! `--strict` makes it fail. The measure is what the real Bazel leaves, also where the event stream does not name it.
//!
//! 1. **The build never suffers.** No fault here (a dead cache, a full disk, a damaged record, a crash) fails or hangs the
//!    user's build, unless they asked for `--strict`. Everything that holds has a deadline: [`bes::HoldPolicy`].
//! 2. **Nothing partial, nothing wrong.** A final path only ever holds bytes whose digest was verified. Nothing is written
//!    through a link over what is there, or outside of the output tree: [`materialize::place`].
//! 3. **Metadata first.** Path, digest and size of every output that the stream names are on record before a byte of it is
//!    asked for, selected or not.
//! 4. **The newest build wins.** Nothing that an older build wanted overwrites or resurrects what a newer one owns:
//!    [`materialize::place::Epoch`].
//! 5. **The record is a cache of facts.** It may be deleted or damaged at any time, and is checked against the disk before
//!    it is believed: [`output::Stamp`].
//! 6. **Acknowledged means kept.** An event acknowledged to the build tool is in the journal, and a restart goes on from
//!    there: [`journal`].
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod action_cache;
pub mod bep;
pub mod bes;
pub mod builds;
pub mod chance;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod demo;
pub mod digest;
pub mod doors;
pub mod embedded_cache;
pub mod exec_path;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod https;
pub mod invocation;
pub mod journal;
pub mod lease;
pub mod materialize;
pub mod metrics;
pub mod notify;
mod open_files;
pub mod output;
mod printable;
pub mod record;
pub mod remote;
mod removal;
#[cfg(test)]
mod simulated;
pub mod stage;
pub mod units;
#[cfg(test)]
mod unprivileged;

/// Types generated from `proto/`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/protocols.rs"));

    /// The encoded descriptors of every protocol here, for the reflection service.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
