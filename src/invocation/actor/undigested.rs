//! Outputs that the stream names without a digest.
//!
//! A build tool names no digest of what it keeps as a local file: Bazel 4 with an HTTP or a disk cache, later ones there of
//! the files of tests, any with `--experimental_build_event_upload_strategy=local`, and of a directory that is not a tree
//! artifact. Nobody can bring them, and no matter who made them, they are what the build says they are if they are there.

use std::{path::PathBuf, sync::Arc};

use tokio::task::spawn_blocking;

use super::Actor;
use crate::{
    bep::event::{CommandLine, TargetId},
    exec_path::ExecPath,
    output::Class,
    roots::Destination,
    transport::is_http,
};

impl Actor {
    /// Takes note of some. They are looked for when the build tool is done.
    pub(super) fn undigested(&mut self, target: &Arc<TargetId>, outputs: Vec<(Class, ExecPath)>) {
        for (class, path) in outputs {
            if class == Class::Known {
                continue;
            }
            let noted = self
                .undigested
                .entry(path)
                .or_insert_with(|| (class, target.clone()));
            noted.0 = noted.0.max(class);
        }
    }

    /// Counts each as present or as failed. What another event has named with its content is looked after as that. Where
    /// Bazel itself downloads, it has left out what is absent, as it does alone: such as the `test.xml` of a cached test
    /// of `coverage`. That is reported, and fails nothing.
    pub(super) async fn look_for_undigested(&mut self) {
        if self.undigested.is_empty() {
            return;
        }
        self.open_root().await;
        let mut noted: Vec<_> = std::mem::take(&mut self.undigested).into_iter().collect();
        noted.retain(|(path, _)| !self.ledger.wanted.contains_key(path));
        noted.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        let flatten = matches!(
            self.shared.roots.rules().destination,
            Destination::Directory { flatten: true, .. }
        );
        let place = self.site.open_root();
        let root = place.map(|place| place.root.place.path().to_owned());
        let places: Vec<Option<PathBuf>> = noted
            .iter()
            .map(|(path, _)| {
                let below = if flatten { path.file_name() } else { path.as_str() };
                Some(root.as_ref()?.join(below))
            })
            .collect();
        // Only whether anything is there, so links are followed wherever they lead.
        let looked = spawn_blocking(move || -> Vec<bool> {
            let is_there = |place: Option<PathBuf>| place.is_some_and(|place| place.metadata().is_ok());
            places.into_iter().map(is_there).collect()
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
        let why = blocked.unwrap_or_else(|| format!("{cause}, {end}"));
        for (number, (path, (class, target))) in noted.into_iter().enumerate() {
            if there.get(number) == Some(&true) {
                self.ledger.tally.present += 1;
                continue;
            }
            let class = class.min(most);
            self.fail(class, &format!("{path}: {why}"));
            if class == Class::Required {
                self.ledger.fail_target(&target);
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
