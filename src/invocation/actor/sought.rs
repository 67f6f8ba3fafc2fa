//! Outputs that are only looked for: those that the stream names without a digest, and those in an output tree that must not be
//! written into.
//!
//! A build tool names no digest of what it keeps as a local file: Bazel 4 with an HTTP or a disk cache, later ones there of
//! the files of tests, any with `--experimental_build_event_upload_strategy=local`, and of a directory that is not a tree
//! artifact. Nobody can bring them, and no matter who made them, they are what the build says they are if they are there.
//! The same goes for a tree that only Bazel writes into, as far as type and size tell.

use std::{collections::HashSet, path::Path, sync::Arc};

use rustix::fs::FileType;
use tokio::task::spawn_blocking;

use super::{Actor, parts::Sought};
use crate::{
    bep::event::{CommandLine, TargetId},
    exec_path::ExecPath,
    materialize::place::seen_beneath,
    output::{Class, OutputContent},
    roots::Destination,
    transport::is_http,
};

/// Whether something is in a tree that others may write into, and looks like this. Where a link leads is not looked at.
fn is_seen(root: &Path, path: &str, content: Option<&OutputContent>) -> bool {
    let Some((kind, size)) = seen_beneath(root, path) else {
        return false;
    };
    match content {
        _ if kind == FileType::Symlink => true,
        Some(content @ (OutputContent::Blob(_) | OutputContent::Inline(_))) => {
            kind == FileType::RegularFile && size == content.size()
        }
        Some(OutputContent::Directory) => kind == FileType::Directory,
        Some(OutputContent::Symlink(_)) => false,
        None => true,
    }
}

impl Actor {
    /// Takes note of some. They are looked for when the build tool is done.
    pub(super) fn seek(
        &mut self,
        target: &Arc<TargetId>,
        outputs: impl IntoIterator<Item = (Class, ExecPath, Option<OutputContent>)>,
    ) {
        for (class, path, content) in outputs {
            if class == Class::Known {
                continue;
            }
            let sought = self.sought.entry(path).or_insert_with(|| Sought {
                class,
                targets: HashSet::new(),
                content: None,
            });
            sought.class = sought.class.max(class);
            sought.content = content.or(sought.content.take());
            sought.targets.insert(target.clone());
        }
    }

    /// Counts each as present or as failed. What another event has named with its content is looked after as that. Where
    /// Bazel itself downloads, it has left out what is absent, as it does alone: such as the `test.xml` of a cached test
    /// of `coverage`. That is reported, and fails nothing.
    pub(super) async fn look_for_sought(&mut self) {
        if self.sought.is_empty() {
            return;
        }
        self.open_root().await;
        let mut noted: Vec<_> = std::mem::take(&mut self.sought).into_iter().collect();
        noted.retain(|(path, _)| !self.ledger.wanted.contains_key(path));
        noted.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        let flatten = matches!(
            self.shared.roots.rules().destination,
            Destination::Directory { flatten: true, .. }
        );
        let own = self
            .site
            .open_root()
            .map(|place| place.root.place.path().to_owned());
        let open = self.site.read_only().map(Path::to_owned);
        let places: Vec<_> = noted
            .iter()
            .map(|(path, sought)| {
                let below = if flatten { path.file_name() } else { path.as_str() };
                (below.to_owned(), sought.content.clone())
            })
            .collect();
        let looked = spawn_blocking(move || {
            let is_there = |(path, content): (String, Option<OutputContent>)| match (&own, &open) {
                // Only whether anything is there, so links are followed wherever they lead.
                (Some(own), _) => own.join(path).metadata().is_ok(),
                (None, Some(open)) => is_seen(open, &path, content.as_ref()),
                (None, None) => false,
            };
            places.into_iter().map(is_there).collect::<Vec<bool>>()
        });
        let there = looked.await.unwrap_or_default();
        let blocked = self.site.blocked().map(str::to_owned);
        let cause = match self.build.command_line() {
            Some(line) if names_no_digests(line) => {
                "with an HTTP or disk cache, Bazel names no digests of test logs, and before version 7 no digests \
                 at all (use a gRPC cache, or let Bazel download it: --remote_download_regex)"
            }
            _ => "the build names it as a local file, without a digest",
        };
        let (most, end) = if blocked.is_none() && self.leaves_downloads_to_bazel() {
            (Class::Optional, "and Bazel has not downloaded it")
        } else {
            (Class::Required, "and it is not on disk")
        };
        let why = match blocked {
            Some(reason) if self.site.read_only().is_some() => format!("it is not on disk: {reason}"),
            Some(reason) => reason,
            None => format!("{cause}, {end}"),
        };
        for (number, (path, sought)) in noted.into_iter().enumerate() {
            if there.get(number) == Some(&true) {
                self.ledger.tally.present += 1;
                continue;
            }
            let class = sought.class.min(most);
            self.fail(class, &format!("{path}: {why}"));
            if class == Class::Required {
                for target in &sought.targets {
                    self.ledger.fail_target(target);
                }
            }
        }
    }

    /// Whether Bazel brings into its own tree what the user wants there. The events of a file, which have no build id, may
    /// be those of another machine.
    fn leaves_downloads_to_bazel(&self) -> bool {
        let rules = self.shared.roots.rules();
        let line = self.build.command_line();
        !self.row.build_id.is_empty()
            && matches!(rules.destination, Destination::ExecRoot)
            && line.is_some_and(|line| line.download_mode() != Some("minimal"))
            && !self.shared.policy.read().asks_for_more()
    }
}

/// Whether the build has no cache but an HTTP or a disk cache.
fn names_no_digests(line: &CommandLine) -> bool {
    match line.remote_cache() {
        Some((_, url)) => is_http(url),
        None => line.given("disk_cache").is_some(),
    }
}
