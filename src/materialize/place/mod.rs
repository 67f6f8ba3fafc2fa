//! Placing verified files: everything that touches an output tree.
//!
//! Blocking code, called from writer threads of its own. An [`OutputRoot`] is one exec root (or output directory);
//! every thread that works in it has a [`Placer`]. Bytes come in with their digest and go under their final name
//! only when they match it, by link or rename, never by writing in place. Every name is looked up from the root's
//! descriptor, one directory at a time as far as links are concerned, so that nothing planted on the way leads
//! out. An [`Epoch`] decides who may still publish.
//!
//! | file | what it is about |
//! |---|---|
//! | `root` | a root on disk, and whether it and its `bazel-out` are still the ones that were there |
//! | `left` | the same, once it was closed and opened again |
//! | `allow` | which directories may be a root |
//! | `aliases`, `leaning` | outputs that lie where links lead |
//! | `epoch` | the newest invocation wins |
//! | `claim` | also over those that other processes follow |
//! | `walk` | finding and making directories beneath the root, links included |
//! | `writable` | read-only directories, opened and restored |
//! | `temp` | where files lie before they have a name; sweeping |
//! | `publish` | from a written file to its final name |
//! | `check`, `hash`, `dirs` | is it already there? |
//! | `elsewhere` | the same where an output service has `bazel-out`: size alone, nothing is read |
//! | `placer`, `staging`, `entries` | batches of small files; new directories whole; symlinks and directories |
//! | `large`, `copy` | one big file as a stream; copies of one that is already there |
//! | `runfiles` | manifests of runfiles, and what is there of what they name |
//! | `tidy` | removing what was staged before, or what the cache still has; finding extra files |
//! | `space`, `mark`, `promised` | how much of a file system is to stay free |
//! | `sys` | stamps and the few system calls with fallbacks |

mod aliases;
mod allow;
mod check;
mod claim;
mod copy;
mod dirs;
mod elsewhere;
mod entries;
mod epoch;
mod error;
mod hash;
mod item;
mod large;
mod leaning;
mod left;
mod mark;
mod modes;
mod options;
mod placer;
mod promised;
mod publish;
mod root;
mod runfiles;
mod space;
mod spot;
mod staging;
mod sys;
mod temp;
mod tidy;
mod walk;
mod writable;

#[cfg(test)]
mod tests;

pub(crate) use allow::resolve;
pub(crate) use allow::{Allowance, is_allowed_open, is_allowed_root, looks_like_exec_root, seen_beneath};
pub use epoch::Epoch;
pub(crate) use error::{PlaceError, PlaceErrorKind};
pub(crate) use hash::{Check, Vouched};
pub use item::Item;
pub(crate) use item::Placed;
pub(crate) use large::LargeFile;
pub(crate) use left::Left;
pub(crate) use mark::Mark;
pub use options::PlaceOptions;
pub use placer::Placer;
pub(crate) use root::MARKERS;
pub use root::OutputRoot;
pub(crate) use runfiles::{Lying, Seen, owner, read_source, small_text};
#[cfg(feature = "mount")]
pub(crate) use temp::mount_point;
pub(crate) use temp::{TempDir, temp_in};
#[cfg(test)]
pub(crate) use tests::Mount;
