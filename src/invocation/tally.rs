//! What became of an invocation's outputs, in numbers and in words.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    materialize::{Completion, Outcome},
    output::Class,
    printable::clipped,
    record::{OutputState, Transfers},
    remote::LOCAL_FILES,
    units::{show_count, show_duration, show_size},
};

/// How many failures are kept in words.
const MESSAGES: usize = 10;
/// Bytes of one of them; a path alone may have 4,095.
const MESSAGE: usize = 6000;
/// Rules that are counted apart; what others have made wanted is counted together.
const RULES: usize = 64;
const OTHER_RULES: &str = "other rules";
/// The part of a path, `bazel-out/CONFIGURATION/testlogs/…`, that says that tests have left a file there.
const TEST_FILES: &str = "testlogs";
/// Where what `coverage` makes of these files is: `bazel-out/_coverage/…`.
const REPORTS: &str = "_coverage";

/// The number of a rule in [`Tally::rules`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RuleIndex(u8);

/// Counts of one invocation's outputs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Outputs that were not there and are now.
    pub downloaded: u64,
    /// Bytes of the downloaded outputs.
    pub downloaded_bytes: u64,
    /// How many of the downloaded outputs each store gave, where there are several.
    pub stores: Vec<(Arc<str>, u64)>,
    /// How many bytes of them each gave, where there are several.
    pub store_bytes: BTreeMap<Arc<str>, u64>,
    /// What was transferred for the outputs that each rule has made wanted, in the order in which they were named.
    pub(crate) rules: Vec<(Arc<str>, Transfers)>,
    /// Outputs that were there already, or that an output service has.
    pub present: u64,
    /// Of these, those whose blobs were read so that a cache on the way keeps them.
    pub warmed: u64,
    /// Bytes of the warmed files.
    pub warmed_bytes: u64,
    /// Required outputs that failed to download.
    pub failed: u64,
    /// Of these, those that no cache has, that could not be read from it, or that there is no room for.
    pub lost: u64,
    /// Of these, those that there is no room for.
    pub without_room: u64,
    /// Of those that are lost, files that tests have left.
    pub lost_of_tests: u64,
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
        let (path, outcome) = (&completion.path, &completion.outcome);
        if outcome.is_lost() && completion.class == Class::Required {
            self.lose(path.as_str());
            self.without_room += u64::from(matches!(outcome, Outcome::NoSpace(_)));
        }
        match outcome.state() {
            Some(OutputState::Materialized | OutputState::Known) => self.count(outcome, u64::saturating_add),
            Some(OutputState::Evicted) => self.fail(
                completion.class,
                &format!("{path}: evicted from the cache ({})", outcome.reason()),
            ),
            Some(OutputState::Failed) => {
                self.fail(completion.class, &format!("{path}: {}", outcome.reason()));
            }
            None => self.superseded += 1,
        }
    }

    /// Takes note that the cache does not have a required output.
    pub(crate) fn lose(&mut self, path: &str) {
        self.lost += 1;
        let mut parts = path.split('/').skip(1);
        if parts.next() == Some(REPORTS) || parts.next() == Some(TEST_FILES) {
            self.lost_of_tests += 1;
        }
    }

    /// Uncounts what was on disk and is not any more: it will be counted again.
    pub(crate) fn take_back(&mut self, outcome: &Outcome) {
        if outcome.is_on_disk() {
            self.count(outcome, u64::saturating_sub);
        }
    }

    /// Counts what is on disk, or uncounts it.
    fn count(&mut self, outcome: &Outcome, change: fn(u64, u64) -> u64) {
        let Outcome::Downloaded { bytes, store, .. } = outcome else {
            self.present = change(self.present, 1);
            if let Outcome::Served { warmed: Some(bytes) } = outcome {
                self.warmed = change(self.warmed, 1);
                self.warmed_bytes = change(self.warmed_bytes, *bytes);
            }
            return;
        };
        self.downloaded = change(self.downloaded, 1);
        self.downloaded_bytes = change(self.downloaded_bytes, *bytes);
        if let Some(store) = store {
            match self.stores.iter_mut().find(|(known, _)| known == store) {
                Some((_, count)) => *count = change(*count, 1),
                None => self.stores.push((Arc::clone(store), change(0, 1))),
            }
            let bytes_of = self.store_bytes.entry(Arc::clone(store)).or_default();
            *bytes_of = change(*bytes_of, *bytes);
        }
    }

    /// The number of a rule, from now on.
    pub(crate) fn rule(&mut self, rule: &Arc<str>) -> RuleIndex {
        // Mostly one or two, and shared.
        let known = self
            .rules
            .iter()
            .position(|(known, _)| Arc::ptr_eq(known, rule) || known == rule);
        let index = known.unwrap_or(self.rules.len()).min(RULES);
        if index == self.rules.len() {
            let name = if index < RULES {
                rule.clone()
            } else {
                OTHER_RULES.into()
            };
            self.rules.push((name, Transfers::default()));
        }
        RuleIndex(index as u8)
    }

    /// Counts, or uncounts, what was transferred for an output that this rule has made wanted.
    pub(crate) fn count_transfers(
        &mut self,
        transfers: Transfers,
        rule: RuleIndex,
        change: fn(u64, u64) -> u64,
    ) {
        if let Some((_, of_rule)) = self.rules.get_mut(usize::from(rule.0)) {
            *of_rule = of_rule.changed(transfers, change);
        }
    }

    /// What was transferred, by the rule that has made it wanted.
    pub(crate) fn transfers(&self) -> impl Iterator<Item = (String, Transfers)> {
        let counted = self
            .rules
            .iter()
            .filter(|(_, of_rule)| *of_rule != Transfers::default());
        counted.map(|(rule, of_rule)| (rule.to_string(), *of_rule))
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
    pub(crate) fn warming(&self) -> String {
        let (files, bytes) = (show_count(self.warmed), show_size(self.warmed_bytes));
        format!("warmed {files} files, {bytes}")
    }

    /// The summary line. `settled_in` is how long after the build's last event everything required was there.
    pub fn summary(&self, settled_in: Duration) -> String {
        // What was copied from files of this machine was not downloaded.
        let is_here = |store: &str| store == LOCAL_FILES;
        let here = self.stores.iter().find(|(store, _)| is_here(store));
        let here = here.map_or(0, |(_, count)| *count);
        let here_bytes = self.store_bytes.get(LOCAL_FILES).copied().unwrap_or_default();
        let mut line = format!(
            "outhaul: {} downloaded ({}), {} already present, {} failed, {} known; settled in {}",
            show_count(self.downloaded.saturating_sub(here)),
            show_size(self.downloaded_bytes.saturating_sub(here_bytes)),
            show_count(self.present),
            show_count(self.failed),
            show_count(self.known),
            show_duration(settled_in),
        );
        let stores = self.stores.iter().filter(|(_, count)| *count > 0);
        let stores = stores.map(|(store, count)| match show_count(*count) {
            count if is_here(store) => format!("{count} from {store} ({})", show_size(here_bytes)),
            count => format!("{count} from {store}"),
        });
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
            fetched: None,
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
    fn what_was_copied_from_this_machine_is_told_apart_from_downloads() {
        let mut tally = Tally::default();
        for (source, store) in [
            (Source::Batch, Some("grpc://h:1")),
            (Source::Stream, Some(LOCAL_FILES)),
            (Source::Copy, Some(LOCAL_FILES)),
            (Source::Copy, None),
        ] {
            let outcome = Outcome::Downloaded {
                source,
                store: store.map(Into::into),
                stamp: None,
                bytes: 1024,
            };
            tally.add(&completion(Class::Required, outcome));
        }
        assert_eq!(
            tally.summary(Duration::ZERO),
            "outhaul: 2 downloaded (2.0 KiB), 0 already present, 0 failed, 0 known; settled in 0.00s; \
             1 from grpc://h:1, 2 from local files (2.0 KiB)"
        );
    }

    #[test]
    fn what_too_many_rules_have_made_wanted_is_counted_together() {
        let mut tally = Tally::default();
        let one = Transfers {
            downloaded: 1,
            ..Transfers::default()
        };
        for _ in 0..2 {
            for n in 0..RULES + 3 {
                let rule = tally.rule(&format!("rule: path={n}").into());
                tally.count_transfers(one, rule, u64::saturating_add);
            }
        }
        tally.rule(&"not counted".into());
        let counted: Vec<(String, Transfers)> = tally.transfers().collect();
        assert_eq!(counted.len(), RULES + 1);
        assert!(
            counted[..RULES]
                .iter()
                .all(|(_, of_rule)| of_rule.downloaded == 2)
        );
        assert_eq!(
            (&*counted[RULES].0, counted[RULES].1.downloaded),
            (OTHER_RULES, 6)
        );
    }

    #[test]
    fn failures_are_distinguished_and_kept_in_words() {
        let mut tally = Tally::default();
        tally.add(&completion(
            Class::Required,
            Outcome::Failed("in the way".to_owned()),
        ));
        tally.add(&completion(
            Class::Optional,
            Outcome::Evicted("not found".to_owned()),
        ));
        tally.add(&completion(Class::Required, Outcome::Superseded));
        assert_eq!((tally.failed, tally.optional_failed, tally.superseded), (1, 1, 1));
        assert_eq!(tally.messages.len(), 2);
        assert_eq!(tally.lost, 0);
        for outcome in [Outcome::Evicted, Outcome::Unavailable, Outcome::NoSpace] {
            tally.add(&completion(Class::Required, outcome("no answer".to_owned())));
        }
        tally.fail(Class::Required, "refused");
        assert_eq!((tally.failed, tally.lost), (5, 3), "refused is not lost");
        assert_eq!(tally.without_room, 1);
        assert_eq!(tally.lost_of_tests, 0);
        for path in [
            "bazel-out/k8/testlogs/a/test.log",
            "bazel-out/_coverage/_coverage_report.dat",
        ] {
            tally.add(&Completion {
                path: ExecPath::new(path).unwrap(),
                ..completion(Class::Required, Outcome::Evicted("not found".to_owned()))
            });
        }
        assert_eq!((tally.failed, tally.lost, tally.lost_of_tests), (7, 5, 2));
        assert!(tally.messages[0].contains("bazel-out/x: in the way"));
        let line = tally.summary(Duration::ZERO);
        assert!(
            line.contains("7 failed") && line.contains("1 optional failed") && line.contains("newer build")
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
