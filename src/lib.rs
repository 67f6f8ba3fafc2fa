//! Outhaul downloads a remote build's top-level outputs in the background.
//!
//! With a remote cache, a build tool does not have to download its outputs: its event stream names every output by path
//! and digest. Outhaul receives that stream, selects the requested outputs, downloads and verifies the missing ones,
//! and lets the build tool's command return when they are on disk. It records the rest, so that any output can be
//! downloaded later by its path.
//!
//! This crate is the program's library; `main.rs` only calls [`cli::main`]. `docs/architecture.md` follows a build
//! through it step by step, `docs/internals.md` has details, and `docs/bazel.md` describes how Bazel behaves.
//!
//! # Data flow
//!
//! ```text
//!  Bazel ──gRPC──▶ bes ───events──▶ invocation ──wants──▶ materialize ──files──▶ output root
//!  event file ───▶ bep ──┘            │    ▲  selection       │   ▲
//!                         │           └─metadata──▶ record ◀──┘   └──bytes── remote ◀── the cache
//!                         ▼ journal                   ▲
//!                                                  control ◀── cli, status page
//! ```
//!
//! One direction: events come in at one end, files go out at the other, and nothing imports its caller.
//!
//! # The rooms
//!
//! * [`bep`] decodes wire messages into a small domain [`bep::Event`], and has the graph of named sets. It uses neither
//!   networks nor disks.
//! * [`builds`] is the interface between the event service and the builds, and depends on neither.
//! * [`journal`] keeps acknowledged events on disk, one file per stream.
//! * [`bes`] is the event service: it journals events, acknowledges them, and delays the last acknowledgement. It does not
//!   know which outputs are wanted.
//! * [`invocation`] is the life of one build. [`invocation::build`] and [`invocation::selection`] make the decisions, with
//!   plain data in and out; [`invocation::Engine`] runs a task per build that carries them out.
//! * [`materialize`] downloads and places wanted outputs. One coordinator task owns all state; [`materialize::place`] does
//!   all access to output trees, on threads of its own.
//! * [`roots`] knows which directories may be written into, and begins builds in them, so that the newest one wins.
//! * [`sources`] chooses the cache that a build's outputs are downloaded from.
//! * [`remote`] is the client of a Remote Execution API cache. It does not depend on Bazel.
//! * [`transport`] connects to servers: addresses, TLS, credentials.
//! * [`action_cache`] reads Bazel's action cache, which has the digests of outputs that no event names.
//! * [`record`] stores what is known about outputs and builds, in sled, with an interface that cannot fail a build.
//! * `archive` unpacks archives, and publishes what was in them as a whole.
//! * `collection` downloads archives by name, from directories, URLs and the cache, and knows their checksums.
//! * [`stage`] copies outputs of a recorded build to a directory; it also exports and imports builds.
//! * `mount` shows recorded builds as a read-only directory, over FUSE.
//! * [`access`] controls access to listeners: certificates, tokens, the user of the connecting process.
//! * [`control`] answers the other commands and shows health and metrics.
//! * `page` shows what `control` knows as web pages, live and without any other host.
//! * [`notify`] sends notifications about settled targets and builds, by HTTP or to a command.
//! * `telemetry` exports traces of builds and the metrics to an OpenTelemetry collector.
//! * [`daemon`] connects the rooms and opens the listeners; [`config`] checks the user's settings; [`cli`] has one file per
//!   subcommand.
//! * [`digest`], [`exec_path`], [`output`], [`units`] are values that cannot hold anything invalid, so that no other code
//!   checks them again; [`metrics`] counts.
//! * [`demo`] replaces a server and a build, in `outhaul demo`; its builds are used by tests, too.
//!
//! # The promises
//!
//! First of all: **never worse than without Outhaul.** A build under `outhaul run`, or with Outhaul in its `.bazelrc`,
//! never ends with less on disk than the same Bazel command alone would have left, in the user's download mode
//! (top-level by default), whatever its configuration. Outhaul reports what it did not see or could not do, and
//! `--strict` turns that into a failure. The measure is what the real Bazel leaves, even if the event stream does not
//! name it.
//!
//! 1. **The build never suffers.** No fault here (a dead cache, a full disk, a damaged record, a crash) fails or hangs the
//!    user's build, unless `--strict` is set. Every wait has a deadline: [`bes::HoldPolicy`].
//! 2. **Nothing partial, nothing wrong.** A final path only ever holds bytes whose digest was verified. Nothing is written
//!    through a symlink, or outside of the output tree: [`materialize::place`].
//! 3. **Metadata first.** Path, digest and size of every output that the stream names are recorded before any of its bytes
//!    are requested, selected or not.
//! 4. **The newest build wins.** Nothing that an older build wanted overwrites or resurrects what a newer one owns:
//!    [`roots::Roots::begin`], [`materialize::place::Epoch`].
//! 5. **The record is a cache.** It may be deleted or damaged at any time, and is checked against the disk before it is
//!    used: [`output::Stamp`].
//! 6. **Acknowledged means kept.** An event acknowledged to the build tool is in the journal, and a restart continues from
//!    there: [`journal`].
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod access;
mod action_cache;
mod archive;
pub mod bep;
pub mod bes;
pub mod builds;
pub mod cli;
mod collection;
mod config;
mod control;
pub mod daemon;
pub mod demo;
pub mod exec_path;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
pub mod invocation;
pub mod journal;
mod lease;
pub mod materialize;
pub mod metrics;
#[cfg(feature = "mount")]
mod mount;
mod notify;
mod open_files;
pub mod output;
mod page;
mod printable;
pub mod record;
pub mod remote;
mod removal;
pub mod roots;
#[cfg(test)]
mod simulated;
pub mod sources;
mod stage;
mod telemetry;
pub mod transport;
mod units;
#[cfg(test)]
mod unprivileged;

pub use outhaul_digest as digest;

/// Types generated from `proto/`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/protocols.rs"));

    /// The encoded descriptors of every protocol here, for the reflection service.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
