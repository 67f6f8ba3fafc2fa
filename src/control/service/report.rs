//! What builds have downloaded, added up from their rows in the record.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
};

use prost_types::Timestamp;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::Service;
use crate::{
    proto::outhaul::v1::{self as pb, report_response::Entry},
    record::{InvocationRow, Record, Transfers},
    remote::is_local,
};

/// Entries of one answer.
const ENTRIES: usize = 10_000;
/// Names that are counted apart, some hundred bytes each; what has another one is counted together.
const NAMES: usize = 100_000;
/// The name of that.
const OTHER: &str = "other";

/// What is added up, by name.
#[derive(Default)]
struct Sums {
    entries: HashMap<String, Entry>,
    total: Entry,
    /// The names that the build of the moment was counted for.
    counted: HashSet<String>,
}

impl Sums {
    fn add(&mut self, name: &str, transfers: Transfers) {
        let is_full = self.entries.len() >= NAMES && !self.entries.contains_key(name);
        let name = if is_full { OTHER } else { name };
        if !self.entries.contains_key(name) {
            self.entries.insert(name.to_owned(), Entry::default());
        }
        let Some(entry) = self.entries.get_mut(name) else {
            return;
        };
        if !self.counted.contains(name) {
            self.counted.insert(name.to_owned());
            entry.builds += 1;
        }
        for sum in [entry, &mut self.total] {
            sum.downloaded += transfers.downloaded;
            sum.downloaded_bytes += transfers.downloaded_bytes;
            sum.without_download += transfers.without_download;
        }
    }

    /// Adds a build's parts, and what is left of the whole without a name.
    fn add_parts<'a>(&mut self, whole: Transfers, parts: impl Iterator<Item = (&'a str, Transfers)>) {
        let mut left = whole;
        for (name, part) in parts {
            left = left.changed(part, u64::saturating_sub);
            self.add(name, part);
        }
        if left != Transfers::default() {
            self.add("", left);
        }
    }

    /// Adds a build.
    fn add_build(
        &mut self,
        record: &Record,
        row: &InvocationRow,
        by: pb::ReportBy,
        gone: &CancellationToken,
    ) {
        self.total.builds += 1;
        self.counted.clear();
        let from = Origin::of(row);
        let rules = || {
            let rules = row.outputs.rules.iter();
            rules.map(|(rule, part)| (rule.as_str(), from.charged(*part)))
        };
        let whole = rules().fold(Transfers::default(), |all, (_, part)| {
            all.changed(part, u64::saturating_add)
        });
        match by {
            pb::ReportBy::Unspecified | pb::ReportBy::Workspace => self.add(&row.workspace, whole),
            pb::ReportBy::Day => self.add(&day(row.started_ms), whole),
            pb::ReportBy::Rule => self.add_parts(whole, rules()),
            pb::ReportBy::Store => self.add_stores(row, whole),
            pb::ReportBy::Target => {
                let mut left = whole;
                let targets = record.scan_targets(&row.invocation_id);
                for target in targets.take_while(|_| !gone.is_cancelled()) {
                    let part = from.charged(target.transfers);
                    if part != Transfers::default() {
                        left = left.changed(part, u64::saturating_sub);
                        self.add(&target.label, part);
                    }
                }
                self.add_parts(left, std::iter::empty());
            }
        }
    }

    /// Adds what each cache gave. What no name is recorded for came from the only one.
    fn add_stores(&mut self, row: &InvocationRow, whole: Transfers) {
        let counts = &row.outputs;
        let mut left = whole;
        for (name, outputs) in &counts.stores {
            let part = if is_local(name) {
                Transfers {
                    without_download: *outputs,
                    ..Transfers::default()
                }
            } else {
                Transfers {
                    downloaded: *outputs,
                    downloaded_bytes: counts.store_bytes.get(name).copied().unwrap_or_default(),
                    without_download: 0,
                }
            };
            left = left.changed(part, u64::saturating_sub);
            self.add(name, part);
        }
        let only = Transfers {
            without_download: 0,
            ..left
        };
        if only != Transfers::default() && !row.remote_cache.contains(' ') {
            left = left.changed(only, u64::saturating_sub);
            self.add(&row.remote_cache, only);
        }
        self.add_parts(left, std::iter::empty());
    }

    /// Those with the most bytes first; days from the newest on.
    fn into_response(self, by: pb::ReportBy) -> pb::ReportResponse {
        let named = self
            .entries
            .into_iter()
            .map(|(name, entry)| Entry { name, ..entry });
        let mut entries: Vec<Entry> = named.collect();
        if by == pb::ReportBy::Day {
            entries.sort_by(|a, b| b.name.cmp(&a.name));
        } else {
            entries.sort_by(|a, b| {
                let key = |e: &Entry| {
                    (
                        Reverse(e.downloaded_bytes),
                        Reverse(e.downloaded),
                        Reverse(e.without_download),
                    )
                };
                (key(a), &a.name).cmp(&(key(b), &b.name))
            });
        }
        let left_out = entries.len().saturating_sub(ENTRIES) as u64;
        entries.truncate(ENTRIES);
        pb::ReportResponse {
            entries,
            total: Some(self.total),
            left_out,
        }
    }
}

/// Where the bytes of a build came from that no cache's name is recorded for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    Network,
    /// Its only cache is a directory.
    Disk,
}

impl Origin {
    fn of(row: &InvocationRow) -> Self {
        if row.remote_cache.starts_with("file:") && !row.remote_cache.contains(' ') {
            Self::Disk
        } else {
            Self::Network
        }
    }

    /// What of it came over a network.
    fn charged(self, transfers: Transfers) -> Transfers {
        match self {
            Self::Network => transfers,
            Self::Disk => Transfers {
                without_download: transfers.downloaded + transfers.without_download,
                ..Transfers::default()
            },
        }
    }
}

/// The day of a time in UTC, as `2026-11-29`.
fn day(ms: i64) -> String {
    let seconds = ms.div_euclid(1000);
    let text = Timestamp { seconds, nanos: 0 }.to_string();
    text.split('T').next().unwrap_or_default().to_owned()
}

impl Service {
    /// What builds have downloaded, by what is asked for. Builds that came from elsewhere are left out.
    ///
    /// # Errors
    /// When the code that adds up has a bug.
    pub async fn report(&self, request: pb::ReportRequest) -> Result<pb::ReportResponse, Status> {
        self.catch_up().await;
        let added = self.read(move |service, gone| {
            let by = request.by();
            let mut sums = Sums::default();
            let builds = service.record.scan_invocations();
            // Newest first.
            let builds = builds.take_while(|row| row.started_ms >= request.since_ms);
            for row in builds.filter(|row| !row.imported && row.is_build()) {
                if gone.is_cancelled() {
                    break;
                }
                sums.add_build(&service.record, &row, by, gone);
            }
            sums.into_response(by)
        });
        added
            .await
            .ok_or_else(|| Status::internal("adding up builds panicked; this is a bug in outhaul"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{OutputCounts, TargetRow};

    fn transfers(downloaded: u64, downloaded_bytes: u64, without_download: u64) -> Transfers {
        Transfers {
            downloaded,
            downloaded_bytes,
            without_download,
        }
    }

    fn build(id: &str, started_ms: i64, outputs: OutputCounts) -> InvocationRow {
        InvocationRow {
            invocation_id: id.to_owned(),
            command: "build".to_owned(),
            workspace: format!("/w/{id}"),
            remote_cache: "grpc://cache:1".to_owned(),
            started_ms,
            outputs,
            ..InvocationRow::default()
        }
    }

    /// Each entry's name, builds and transfers.
    fn summed(record: &Record, by: pb::ReportBy) -> Vec<(String, u64, Transfers)> {
        let mut sums = Sums::default();
        for row in record.invocations(100) {
            sums.add_build(record, &row, by, &CancellationToken::new());
        }
        let response = sums.into_response(by);
        let total = response.total.unwrap();
        let bytes: u64 = response.entries.iter().map(|entry| entry.downloaded_bytes).sum();
        assert_eq!(bytes, total.downloaded_bytes, "{by:?}");
        let entries = response.entries.into_iter().map(|e| {
            let transfers = transfers(e.downloaded, e.downloaded_bytes, e.without_download);
            (e.name, e.builds, transfers)
        });
        entries.collect()
    }

    fn own(entries: &[(&str, u64, Transfers)]) -> Vec<(String, u64, Transfers)> {
        let entries = entries.iter().map(|(name, n, t)| ((*name).to_owned(), *n, *t));
        entries.collect()
    }

    #[test]
    fn builds_are_added_up_by_what_is_asked_for_and_nothing_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let (record, _) = Record::open(dir.path()).unwrap();
        const DAY: i64 = 24 * 3600 * 1000;
        let several = OutputCounts {
            rules: [
                ("toplevel".to_owned(), transfers(3, 700, 4)),
                ("runfiles".to_owned(), transfers(1, 300, 0)),
            ]
            .into(),
            stores: [("grpc://a:1".to_owned(), 3), ("disk cache /d".to_owned(), 2)].into(),
            store_bytes: [("grpc://a:1".to_owned(), 900), ("disk cache /d".to_owned(), 80)].into(),
            ..OutputCounts::default()
        };
        let one = OutputCounts {
            rules: [("toplevel".to_owned(), transfers(2, 50, 7))].into(),
            stores: [("local files".to_owned(), 1)].into(),
            store_bytes: [("local files".to_owned(), 9)].into(),
            ..OutputCounts::default()
        };
        record.put_invocation(&InvocationRow {
            remote_cache: "file:///d grpc://a:1".to_owned(),
            ..build("new", 2 * DAY, several)
        });
        record.put_invocation(&build("old", DAY + 1, one));
        let target = |label: &str, transfers| TargetRow {
            label: label.to_owned(),
            transfers,
            ..TargetRow::default()
        };
        record.put_targets(
            "new",
            &[
                target("//a", transfers(2, 600, 0)),
                target("//b", transfers(1, 100, 2)),
                target("//none", Transfers::default()),
            ],
        );
        for (by, expected) in [
            (
                pb::ReportBy::Workspace,
                own(&[
                    ("/w/new", 1, transfers(4, 1000, 4)),
                    ("/w/old", 1, transfers(2, 50, 7)),
                ]),
            ),
            (
                pb::ReportBy::Day,
                own(&[
                    ("1970-01-03", 1, transfers(4, 1000, 4)),
                    ("1970-01-02", 1, transfers(2, 50, 7)),
                ]),
            ),
            (
                pb::ReportBy::Rule,
                own(&[
                    ("toplevel", 2, transfers(5, 750, 11)),
                    ("runfiles", 1, transfers(1, 300, 0)),
                ]),
            ),
            (
                pb::ReportBy::Store,
                own(&[
                    ("grpc://a:1", 1, transfers(3, 900, 0)),
                    ("", 2, transfers(1, 100, 8)),
                    ("grpc://cache:1", 1, transfers(2, 50, 0)),
                    ("disk cache /d", 1, transfers(0, 0, 2)),
                    ("local files", 1, transfers(0, 0, 1)),
                ]),
            ),
            (
                pb::ReportBy::Target,
                own(&[
                    ("//a", 1, transfers(2, 600, 0)),
                    ("", 2, transfers(3, 350, 9)),
                    ("//b", 1, transfers(1, 100, 2)),
                ]),
            ),
        ] {
            assert_eq!(summed(&record, by), expected, "{by:?}");
        }
    }

    #[test]
    fn nothing_of_a_build_is_a_download_if_its_only_cache_is_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (record, _) = Record::open(dir.path()).unwrap();
        let counts = OutputCounts {
            rules: [("toplevel".to_owned(), transfers(3, 700, 2))].into(),
            ..OutputCounts::default()
        };
        record.put_invocation(&InvocationRow {
            remote_cache: "file:///d".to_owned(),
            ..build("a", 1, counts)
        });
        for by in [pb::ReportBy::Workspace, pb::ReportBy::Rule, pb::ReportBy::Target] {
            let found = summed(&record, by);
            assert_eq!((found.len(), found[0].2), (1, transfers(0, 0, 5)), "{by:?}");
        }
    }

    #[test]
    fn names_beyond_the_limit_are_counted_together() {
        let mut sums = Sums::default();
        for n in 0..NAMES + 5 {
            sums.add(&format!("//:{n}"), transfers(1, 1, 0));
        }
        let response = sums.into_response(pb::ReportBy::Target);
        assert_eq!(response.entries.len(), ENTRIES);
        assert_eq!(
            (&*response.entries[0].name, response.entries[0].downloaded),
            (OTHER, 5)
        );
        assert_eq!(response.left_out as usize, NAMES + 1 - ENTRIES);
        assert_eq!(response.total.unwrap().downloaded, NAMES as u64 + 5);
    }
}
