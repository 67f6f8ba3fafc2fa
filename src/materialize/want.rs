//! What is asked of the coordinator, and what it answers.

use std::{
    borrow::Cow,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use super::place::{Epoch, OutputRoot};
use crate::{
    exec_path::ExecPath,
    output::{Class, OutputContent, Stamp},
    record::{OutputState, Transfers},
    remote::{Attribution, BlobStore, is_local},
    telemetry::Trace,
};

/// An output root in use: the place on disk, and which invocation is its newest.
pub struct Root {
    /// Number of the root, unique while the daemon runs.
    pub id: u32,
    /// The output root on disk.
    pub place: Arc<OutputRoot>,
    /// The newest version; nothing older is published once it has moved on.
    pub epoch: Epoch,
}

/// One asker's view of the coordinator: which root, as of which version, from which cache, answered where.
pub struct Session {
    /// The output root that is written to.
    pub root: Arc<Root>,
    /// The invocation's version in that root.
    pub version: u64,
    /// The cache to fetch from.
    pub store: Arc<dyn BlobStore>,
    /// What the requests are attributed to.
    pub attribution: Arc<Attribution>,
    /// Who has the root's `bazel-out`, where nothing is placed.
    pub served: Option<Served>,
    /// The trace of the build that asks, if it is traced.
    pub trace: Option<Arc<Trace>>,
    /// Where completions go. One for every want, sooner or later.
    pub completions: mpsc::UnboundedSender<Vec<Completion>>,
}

/// What serves a root's `bazel-out` from elsewhere. Wants end with [`Outcome::Served`] for what is there, and nothing is
/// ever placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    /// In words, for what it does not have: `the output service unix:/s`.
    pub by: String,
    /// Blobs of what it has are read from the cache, verified and dropped, so that a cache on the way keeps them.
    pub warm: bool,
}

impl Served {
    /// Of a root whose `bazel-out` is a link, which nothing is written through wherever it leads. Blocks on the file
    /// system.
    pub(crate) fn by_link(root: &OutputRoot) -> Option<Self> {
        let target = root.elsewhere()?;
        Some(Self {
            by: format!("{}, where the link bazel-out leads,", target.display()),
            warm: false,
        })
    }
}

/// An output that should be on disk.
#[derive(Debug, Clone)]
pub struct Want {
    /// Path of the output in its root.
    pub path: ExecPath,
    /// The expected content.
    pub content: OutputContent,
    /// [`Class::Required`] goes before [`Class::Optional`].
    pub class: Class,
    /// The stamp of a record that says that this very content is there.
    pub recorded: Option<Stamp>,
    /// When it was first wanted.
    pub since: Instant,
}

impl Want {
    /// A want as of now.
    pub fn new(path: ExecPath, content: OutputContent, class: Class, recorded: Option<Stamp>) -> Self {
        Self {
            path,
            content,
            class,
            recorded,
            since: Instant::now(),
        }
    }
}

/// Where an output's bytes came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// A `BatchReadBlobs` request.
    Batch,
    /// A `ByteStream.Read`.
    Stream,
    /// The event itself, or nothing at all (links, directories, empty files).
    Inline,
    /// Another output with the same digest.
    Copy,
}

impl Source {
    /// As it is recorded and counted.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Batch => "batch",
            Self::Stream => "stream",
            Self::Inline => "inline",
            Self::Copy => "copy",
        }
    }

    /// The same with the name of the store, where there are several: `batch from grpc://HOST:PORT`.
    pub(crate) fn with_store(self, store: Option<&str>) -> Cow<'static, str> {
        match store {
            Some(store) => Cow::Owned(format!("{}{FROM}{store}", self.name())),
            None => Cow::Borrowed(self.name()),
        }
    }
}

/// Between the way that bytes came and the name of the store.
const FROM: &str = " from ";

/// What [`Source::with_store`] has put together.
pub(crate) fn split_source(source: &str) -> (&str, Option<&str>) {
    match source.split_once(FROM) {
        Some((way, store)) => (way, Some(store)),
        None => (source, None),
    }
}

/// How a want ended.
///
/// What an outcome means is said here, in its methods: those who count, record or show outcomes ask them, and do not
/// match all the variants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It was not there and is now.
    Downloaded {
        /// Where the bytes came from.
        source: Source,
        /// The store that gave them, where there are several.
        store: Option<Arc<str>>,
        /// The file's stamp; none for links and directories.
        stamp: Option<Stamp>,
        /// Bytes written.
        bytes: u64,
    },
    /// It was there already.
    Present {
        /// The file's stamp; none for links and directories.
        stamp: Option<Stamp>,
        /// Whether its bytes had to be hashed to know that.
        hashed: bool,
    },
    /// It can be read where an output service has it, as far as its size says.
    Served {
        /// Bytes of it that were read from the cache and dropped, if it was to be warmed.
        warmed: Option<u64>,
    },
    /// The cache does not have it, and the disk does not either.
    Evicted(String),
    /// The cache may have it, but could not be read, or has wrong bytes.
    Unavailable(String),
    /// There is no room for it.
    NoSpace(String),
    /// It could not be placed for another reason, or is not to be.
    Failed(String),
    /// A newer invocation of the root has begun.
    Superseded,
}

impl Outcome {
    /// The output's state from now on; `None` if a newer invocation decides it.
    pub const fn state(&self) -> Option<OutputState> {
        match self {
            Self::Downloaded { .. } | Self::Present { .. } => Some(OutputState::Materialized),
            // Bytes that were not read are not known to be right, and the cache has to keep them.
            Self::Served { .. } => Some(OutputState::Known),
            Self::Evicted(_) => Some(OutputState::Evicted),
            Self::Unavailable(_) | Self::NoSpace(_) | Self::Failed(_) => Some(OutputState::Failed),
            Self::Superseded => None,
        }
    }

    /// Whether the output is on disk, or can be read as if it were.
    pub const fn is_on_disk(&self) -> bool {
        matches!(self.state(), Some(OutputState::Materialized | OutputState::Known))
    }

    /// Whether it is missing because no cache has it, or could be read, or there is no room: what the build tool can do
    /// about it by itself, or fail for.
    pub(crate) const fn is_lost(&self) -> bool {
        matches!(self, Self::Evicted(_) | Self::Unavailable(_) | Self::NoSpace(_))
    }

    /// Whether nobody read the output: the disk has what was recorded, as far as a look at it says.
    pub(crate) const fn is_unread(&self) -> bool {
        matches!(self, Self::Present { hashed: false, .. } | Self::Served { .. })
    }

    /// The stamp of the file, if there is one.
    pub const fn stamp(&self) -> Option<Stamp> {
        match self {
            Self::Downloaded { stamp, .. } | Self::Present { stamp, .. } => *stamp,
            _ => None,
        }
    }

    /// Where the bytes came from, as [`Source::with_store`] has it; empty if none came.
    pub fn source(&self) -> Cow<'static, str> {
        match self {
            Self::Downloaded { source, store, .. } => source.with_store(store.as_deref()),
            _ => Cow::Borrowed(""),
        }
    }

    /// Bytes that came.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Downloaded { bytes, .. } => *bytes,
            Self::Served { warmed } => warmed.unwrap_or_default(),
            _ => 0,
        }
    }

    /// What was transferred for it.
    pub(crate) fn transfers(&self) -> Transfers {
        let came = |bytes| Transfers {
            downloaded: 1,
            downloaded_bytes: bytes,
            without_download: 0,
        };
        match self {
            Self::Downloaded {
                source: Source::Batch | Source::Stream,
                bytes,
                store,
                ..
            } if !store.as_deref().is_some_and(is_local) => came(*bytes),
            Self::Served { warmed: Some(bytes) } => came(*bytes),
            Self::Downloaded { .. } | Self::Present { .. } | Self::Served { warmed: None } => Transfers {
                without_download: 1,
                ..Transfers::default()
            },
            _ => Transfers::default(),
        }
    }

    /// Why the output is not on disk; empty if it is.
    pub const fn reason(&self) -> &str {
        match self {
            Self::Evicted(reason)
            | Self::Unavailable(reason)
            | Self::NoSpace(reason)
            | Self::Failed(reason) => reason.as_str(),
            Self::Superseded => "superseded by a newer build",
            Self::Downloaded { .. } | Self::Present { .. } | Self::Served { .. } => "",
        }
    }

    /// As it is counted.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Downloaded { .. } => "downloaded",
            Self::Present { .. } => "present",
            Self::Served { .. } => "served",
            Self::Evicted(_) => "evicted",
            Self::Unavailable(_) | Self::NoSpace(_) | Self::Failed(_) => "failed",
            Self::Superseded => "superseded",
        }
    }
}

/// A want's end.
#[derive(Debug, Clone)]
pub struct Completion {
    /// Path of the output that ended.
    pub path: ExecPath,
    /// What should be there.
    pub content: OutputContent,
    /// How much it was wanted.
    pub class: Class,
    /// How it ended.
    pub outcome: Outcome,
    /// From being wanted to its end.
    pub took: Duration,
    /// From being wanted to asking a cache for its bytes, and to having them; unset for what came without a cache.
    pub fetched: Option<(Duration, Duration)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bytes_that_came_over_a_network_count_as_downloaded() {
        let from = |store: Option<&str>, source| Outcome::Downloaded {
            source,
            store: store.map(Into::into),
            stamp: None,
            bytes: 7,
        };
        let downloaded = |source| from(None, source);
        let served = |warmed| Outcome::Served { warmed };
        let present = Outcome::Present {
            stamp: None,
            hashed: true,
        };
        for (outcome, expected) in [
            (downloaded(Source::Batch), (1, 7, 0)),
            (downloaded(Source::Stream), (1, 7, 0)),
            (from(Some("grpc://cache:9092"), Source::Batch), (1, 7, 0)),
            (from(Some("disk cache /home/a/cache"), Source::Batch), (0, 0, 1)),
            (from(Some("local files"), Source::Stream), (0, 0, 1)),
            (downloaded(Source::Inline), (0, 0, 1)),
            (downloaded(Source::Copy), (0, 0, 1)),
            (present, (0, 0, 1)),
            (served(None), (0, 0, 1)),
            (served(Some(7)), (1, 7, 0)),
            (Outcome::Evicted(String::new()), (0, 0, 0)),
            (Outcome::Superseded, (0, 0, 0)),
        ] {
            let found = outcome.transfers();
            let found = (found.downloaded, found.downloaded_bytes, found.without_download);
            assert_eq!(found, expected, "{outcome:?}");
        }
    }
}
