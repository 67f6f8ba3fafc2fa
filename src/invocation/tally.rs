//! What became of an invocation's outputs, in numbers and in words.

use std::{sync::Arc, time::Duration};

use crate::{
    materialize::{Completion, Outcome},
    output::Class,
    printable::clipped,
    units::{show_count, show_duration, show_size},
};

/// How many failures are kept in words.
const MESSAGES: usize = 10;
/// Bytes of one of them; a path alone may have 4,095.
const MESSAGE: usize = 6000;

/// Counts of one invocation's outputs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Outputs that were not there and are now.
    pub downloaded: u64,
    /// Bytes of the downloaded outputs.
    pub downloaded_bytes: u64,
    /// How many of the downloaded outputs each store gave, where there are several.
    pub stores: Vec<(Arc<str>, u64)>,
    /// Outputs that were there already, or that an output service has.
    pub present: u64,
    /// Of these, those whose blobs were read so that a cache on the way keeps them.
    pub warmed: u64,
    /// Bytes of the warmed files.
    pub warmed_bytes: u64,
    /// Required outputs that failed to download.
    pub failed: u64,
    /// Optional outputs that failed to download.
    pub optional_failed: u64,
    /// Outputs that were only recorded.
    pub known: u64,
    /// Outputs given up because a newer invocation began.
    pub superseded: u64,
    /// The first failures, a line each.
    pub messages: Vec<String>,
}

impl Tally {
    /// Counts one want's end.
    pub fn add(&mut self, completion: &Completion) {
        match &completion.outcome {
            Outcome::Downloaded { bytes, store, .. } => {
                self.downloaded += 1;
                self.downloaded_bytes += bytes;
                if let Some(store) = store {
                    match self.stores.iter_mut().find(|(known, _)| known == store) {
                        Some((_, count)) => *count += 1,
                        None => self.stores.push((Arc::clone(store), 1)),
                    }
                }
            }
            Outcome::Present { .. } => self.present += 1,
            Outcome::Served { warmed } => {
                self.present += 1;
                self.warmed += u64::from(warmed.is_some());
                self.warmed_bytes += warmed.unwrap_or_default();
            }
            Outcome::Superseded => self.superseded += 1,
            Outcome::Evicted(reason) => self.fail(
                completion.class,
                &format!("{}: evicted from the cache ({reason})", completion.path),
            ),
            Outcome::Failed(reason) => self.fail(completion.class, &format!("{}: {reason}", completion.path)),
        }
    }

    /// Uncounts what was on disk and is not any more: it will be counted again.
    pub fn take_back(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Downloaded { bytes, store, .. } => {
                let is_its = |(known, _): &&mut (Arc<str>, u64)| store.as_ref() == Some(known);
                if let Some((_, count)) = self.stores.iter_mut().find(is_its) {
                    *count = count.saturating_sub(1);
                }
                self.downloaded = self.downloaded.saturating_sub(1);
                self.downloaded_bytes = self.downloaded_bytes.saturating_sub(*bytes);
            }
            Outcome::Present { .. } => self.present = self.present.saturating_sub(1),
            Outcome::Served { warmed } => {
                self.present = self.present.saturating_sub(1);
                self.warmed = self.warmed.saturating_sub(u64::from(warmed.is_some()));
                self.warmed_bytes = self.warmed_bytes.saturating_sub(warmed.unwrap_or_default());
            }
            Outcome::Superseded | Outcome::Evicted(_) | Outcome::Failed(_) => {}
        }
    }

    /// Counts a failure.
    pub fn fail(&mut self, class: Class, message: &str) {
        if class == Class::Required {
            self.failed += 1;
        } else {
            self.optional_failed += 1;
        }
        self.note(message);
    }

    /// Keeps a message, if there is room.
    pub fn note(&mut self, message: &str) {
        if self.messages.len() < MESSAGES {
            // Names of others' choice are in it, and it goes to terminals.
            let message = clipped(message, MESSAGE);
            if !self.messages.iter().any(|m| *m == message) {
                self.messages.push(message.into_owned());
            }
        }
    }

    /// What was warmed, in words.
    #[must_use]
    pub fn warming(&self) -> String {
        let (files, bytes) = (show_count(self.warmed), show_size(self.warmed_bytes));
        format!("warmed {files} files, {bytes}")
    }

    /// The summary line. `settled_in` is how long after the build's last event everything required was there.
    #[must_use]
    pub fn summary(&self, settled_in: Duration) -> String {
        let mut line = format!(
            "outhaul: {} downloaded ({}), {} already present, {} failed, {} known; settled in {}",
            show_count(self.downloaded),
            show_size(self.downloaded_bytes),
            show_count(self.present),
            show_count(self.failed),
            show_count(self.known),
            show_duration(settled_in),
        );
        let stores = self.stores.iter().filter(|(_, count)| *count > 0);
        let stores = stores.map(|(store, count)| format!("{} from {store}", show_count(*count)));
        let stores: Vec<String> = stores.collect();
        if !stores.is_empty() {
            line.push_str(&format!("; {}", stores.join(", ")));
        }
        if self.warmed > 0 {
            line.push_str(&format!("; {}", self.warming()));
        }
        if self.superseded > 0 {
            line.push_str(&format!(
                "; {} superseded by a newer build",
                show_count(self.superseded)
            ));
        }
        if self.optional_failed > 0 {
            line.push_str(&format!("; {} optional failed", show_count(self.optional_failed)));
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{exec_path::ExecPath, materialize::Source};

    fn completion(class: Class, outcome: Outcome) -> Completion {
        Completion {
            path: ExecPath::new("bazel-out/x").unwrap(),
            content: crate::output::OutputContent::Directory,
            class,
            outcome,
            took: Duration::ZERO,
        }
    }

    #[test]
    fn the_summary_says_what_the_reviewers_asked_for() {
        let mut tally = Tally {
            known: 4120,
            ..Tally::default()
        };
        for _ in 0..12 {
            tally.add(&completion(
                Class::Required,
                Outcome::Downloaded {
                    source: Source::Batch,
                    store: None,
                    stamp: None,
                    bytes: 297_000,
                },
            ));
        }
        for _ in 0..230 {
            tally.add(&completion(
                Class::Required,
                Outcome::Present {
                    stamp: None,
                    hashed: false,
                },
            ));
        }
        assert_eq!(
            tally.summary(Duration::from_millis(420)),
            "outhaul: 12 downloaded (3.4 MiB), 230 already present, 0 failed, 4,120 known; settled in 0.42s"
        );
    }

    #[test]
    fn failures_are_told_apart_and_kept_in_words() {
        let mut tally = Tally::default();
        tally.add(&completion(
            Class::Required,
            Outcome::Failed("no space".to_owned()),
        ));
        tally.add(&completion(
            Class::Optional,
            Outcome::Evicted("not found".to_owned()),
        ));
        tally.add(&completion(Class::Required, Outcome::Superseded));
        assert_eq!((tally.failed, tally.optional_failed, tally.superseded), (1, 1, 1));
        assert_eq!(tally.messages.len(), 2);
        assert!(tally.messages[0].contains("bazel-out/x: no space"));
        let line = tally.summary(Duration::ZERO);
        assert!(
            line.contains("1 failed") && line.contains("1 optional failed") && line.contains("newer build")
        );
    }

    #[test]
    fn what_is_taken_back_counts_once_when_it_comes_again() {
        let downloaded = Outcome::Downloaded {
            source: Source::Batch,
            store: Some("grpc://h:1".into()),
            stamp: None,
            bytes: 7,
        };
        let present = Outcome::Present {
            stamp: None,
            hashed: false,
        };
        let mut tally = Tally::default();
        for outcome in [&downloaded, &present] {
            tally.add(&completion(Class::Required, outcome.clone()));
        }
        let before = tally.clone();
        for outcome in [&downloaded, &present] {
            tally.take_back(outcome);
            tally.add(&completion(Class::Required, outcome.clone()));
        }
        assert_eq!(tally, before);
        let line = tally.summary(Duration::ZERO);
        assert!(line.ends_with("; 1 from grpc://h:1"), "{line}");
    }
}
