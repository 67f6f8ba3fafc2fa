//! Recorded outputs by parts of their paths, by target or by digest, page by page.

use std::{
    collections::{HashMap, HashSet},
    ops::ControlFlow,
    path::PathBuf,
};

use tokio_util::sync::CancellationToken;

use super::{Service, find::Found, show};
use crate::{
    output::Class,
    proto::outhaul::v1 as pb,
    record::{OutputState, RootId, SeenOutput},
};

/// Rows that are looked at for one page. The page ends there, and the next one goes on.
const LOOKED_AT: usize = 250_000;
/// Words that are looked for in each of them.
const WORDS: usize = 16;
/// The fewest letters of a hash that are taken for one.
const SHORTEST_HASH: usize = 6;

/// Which outputs are asked for by how they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Kind {
    /// All of them.
    #[default]
    All,
    /// Those that were put or found on disk.
    OnDisk,
    /// Those that are wanted, and could not be downloaded or are evicted.
    Missing,
    /// Those that the cache does not have any more.
    Evicted,
    /// Those that are only recorded.
    Known,
}

impl Kind {
    fn fits(self, row: &SeenOutput<'_>) -> bool {
        match self {
            Self::All => true,
            Self::OnDisk => row.state() == OutputState::Materialized,
            Self::Missing => {
                row.class() > Class::Known
                    && matches!(row.state(), OutputState::Failed | OutputState::Evicted)
            }
            Self::Evicted => row.state() == OutputState::Evicted,
            Self::Known => row.state() == OutputState::Known,
        }
    }
}

/// A place among all outputs: the number of a root, and a path in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cursor {
    root: u32,
    path: String,
}

impl std::fmt::Display for Cursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.root, self.path)
    }
}

impl std::str::FromStr for Cursor {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (root, path) = text.split_once(':').unwrap_or((text, ""));
        Ok(Self {
            root: root.parse()?,
            path: path.to_owned(),
        })
    }
}

/// Which outputs are asked for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Query {
    /// Only those of this invocation's output root; empty for all roots.
    pub(crate) invocation: String,
    /// Words, each of which is a part of the path or of the label, or the beginning of the digest.
    pub(crate) text: String,
    /// How they are.
    pub(crate) kind: Kind,
    /// Only those of these targets, and those with these exec paths; empty for all.
    pub(crate) whose: HashSet<String>,
    /// Only those after this place.
    pub(crate) after: Option<Cursor>,
    /// How many, at most.
    pub(crate) most: usize,
}

/// Some outputs, in the order of their roots and paths, the newest root first.
#[derive(Debug, Default)]
pub(crate) struct Page {
    pub(crate) outputs: Vec<pb::Output>,
    /// From where on there may be more.
    pub(crate) next: Option<Cursor>,
    /// How many were looked at.
    pub(crate) looked_at: usize,
    /// Whether the invocation has no output root here, or has not named it yet.
    pub(crate) without_root: bool,
}

/// What is looked for in a row.
struct Words(Vec<Word>);

struct Word {
    text: String,
    /// Whether it is found in any case.
    folded: bool,
    /// If it may be the beginning of a hash: that, in lowercase.
    hash: Option<String>,
}

impl Words {
    fn new(text: &str) -> Self {
        let words = text.split_whitespace().take(WORDS).map(|word| {
            let hash = word.split_once('/').map_or(word, |(hash, _)| hash);
            let hash = hash.rsplit_once(':').map_or(hash, |(_, hash)| hash);
            let is_hash = hash.len() >= SHORTEST_HASH && hash.bytes().all(|b| b.is_ascii_hexdigit());
            Word {
                text: word.to_owned(),
                folded: !word.bytes().any(|b| b.is_ascii_uppercase()),
                hash: is_hash.then(|| hash.to_ascii_lowercase()),
            }
        });
        Self(words.collect())
    }

    /// Whether a row, whose path this is, has all of them.
    fn are_in(&self, row: &SeenOutput<'_>, path: &str) -> bool {
        let label = row.label();
        let (mut folded_path, mut folded_label) = (String::new(), String::new());
        if self.0.iter().any(|word| word.folded) {
            folded_path = path.to_ascii_lowercase();
            folded_label = label.to_ascii_lowercase();
        }
        self.0.iter().all(|word| {
            let (path, label) = if word.folded {
                (&*folded_path, &*folded_label)
            } else {
                (path, label)
            };
            let has_hash = |hash: &String| row.hash().is_some_and(|of| hex::encode(of).starts_with(hash));
            path.contains(&word.text)
                || label.contains(&word.text)
                || word.hash.as_ref().is_some_and(has_hash)
        })
    }
}

impl Service {
    /// Finds recorded outputs, with their state checked against the disk. `None` if there is no such invocation.
    pub(crate) async fn find_outputs(&self, query: Query) -> Option<Page> {
        self.catch_up().await;
        let only = match query.invocation.as_str() {
            "" => None,
            id => match self.row_of(id).await?.root {
                None => {
                    return Some(Page {
                        without_root: true,
                        ..Page::default()
                    });
                }
                root => root,
            },
        };
        self.read(move |service, gone| service.find_page(&query, only, gone))
            .await
    }

    /// Blocks on the record and on the disk.
    fn find_page(&self, query: &Query, only: Option<RootId>, gone: &CancellationToken) -> Page {
        let mut roots = self.record.roots();
        roots.retain(|(id, _)| only.is_none_or(|only| only == *id));
        roots.sort_by_key(|(id, _)| std::cmp::Reverse(*id));
        let words = Words::new(&query.text);
        let mut page = Page::default();
        let mut placers = HashMap::new();
        for (root, row) in roots {
            let mut after = "";
            if let Some(cursor) = &query.after {
                if cursor.root < root.number() {
                    continue;
                }
                if cursor.root == root.number() {
                    after = &cursor.path;
                }
            }
            let mut rows = Vec::new();
            let mut last = String::new();
            let room = query.most.saturating_sub(page.outputs.len());
            let mut looked_at = page.looked_at;
            let is_end = self.record.see_outputs_after(root, after, |row| {
                if rows.len() >= room || looked_at >= LOOKED_AT || gone.is_cancelled() {
                    return ControlFlow::Break(());
                }
                looked_at += 1;
                row.write_path(&mut last);
                let is_whose = query.whose.is_empty()
                    || query.whose.contains(row.label())
                    || query.whose.contains(&last);
                if is_whose && query.kind.fits(&row) && words.are_in(&row, &last) {
                    rows.extend(row.path().zip(row.to_row()));
                }
                ControlFlow::Continue(())
            });
            page.looked_at = looked_at;
            let exec_root = PathBuf::from(&row.path);
            for (path, row) in rows {
                let exec_root = exec_root.clone();
                let found = Found {
                    root,
                    exec_root,
                    path,
                    row,
                };
                let was_there = found.row.state == OutputState::Materialized;
                let present = was_there && self.is_present(&mut placers, &found);
                page.outputs.push(show::output(&found, present));
            }
            if !is_end {
                // Nothing was looked at in this root if the page was full before it.
                let path = if last.is_empty() { after.to_owned() } else { last };
                page.next = Some(Cursor {
                    root: root.number(),
                    path,
                });
                break;
            }
        }
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        control::service::calls::tests::service,
        exec_path::ExecPath,
        output::OutputContent,
        record::{InvocationRow, OutputRow, Record},
    };

    async fn found(service: &Service, query: Query) -> Option<Vec<String>> {
        let page = service.find_outputs(Query { most: 10, ..query }).await?;
        Some(page.outputs.into_iter().map(|output| output.exec_path).collect())
    }

    #[tokio::test]
    async fn what_a_build_lacks_is_told_apart_from_what_others_of_its_output_root_lack() {
        let dir = tempfile::tempdir().unwrap();
        let (record, _) = Record::open(dir.path()).unwrap();
        let root = record.root("/exec", 1, 2);
        let build = |id: &str, root| InvocationRow {
            invocation_id: id.to_owned(),
            root,
            ..InvocationRow::default()
        };
        record.put_invocation(&build("rooted", Some(root)));
        record.put_invocation(&build("rootless", None));
        let rows = ["x", "y", "z"].map(|name| {
            let row = OutputRow {
                state: OutputState::Failed,
                class: Class::Required,
                label: format!("//{name}").into(),
                ..OutputRow::known(OutputContent::Symlink(String::new()))
            };
            (ExecPath::new(&format!("bazel-out/{name}")).unwrap(), row)
        });
        record.put_outputs(root, rows.into());
        let service = service(record);
        let missing = |whose: &[&str]| Query {
            invocation: "rooted".to_owned(),
            kind: Kind::Missing,
            whose: whose.iter().map(|&one| one.to_owned()).collect(),
            ..Query::default()
        };
        for (whose, expected) in [
            (&[][..], &["bazel-out/x", "bazel-out/y", "bazel-out/z"][..]),
            (&["//y"], &["bazel-out/y"]),
            (&["//other", "bazel-out/z"], &["bazel-out/z"]),
        ] {
            let found = found(&service, missing(whose)).await;
            assert_eq!(found.unwrap(), expected, "{whose:?}");
        }
        // One without an output root is not one that nobody knows.
        let of = |id: &str| Query {
            invocation: id.to_owned(),
            ..Query::default()
        };
        assert!(service.find_outputs(of("rootless")).await.unwrap().without_root);
        assert!(!service.find_outputs(of("rooted")).await.unwrap().without_root);
        assert!(service.find_outputs(of("nobody")).await.is_none());
    }

    #[test]
    fn a_row_is_compared_with_few_words_however_many_there_are() {
        assert_eq!(Words::new(&"b ".repeat(4000)).0.len(), WORDS);
    }
}
