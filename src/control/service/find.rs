//! Recorded outputs by the paths that users give.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use tokio_util::sync::CancellationToken;

use super::Service;
use crate::{
    action_cache::{self, ActionCacheError},
    digest::DigestFunction,
    exec_path::ExecPath,
    invocation::rows,
    materialize::place::{Check, PlaceOptions, Placer},
    output::OutputContent,
    record::{OutputRow, RootId},
};

/// A recorded output, found by the path that a user gave.
pub(super) struct Found {
    pub(super) root: RootId,
    pub(super) exec_root: PathBuf,
    pub(super) path: ExecPath,
    pub(super) row: OutputRow,
}

/// What lies in every exec root.
const BUILD_TREE: &str = "bazel-out";

/// Where one of the build tool's links in a workspace leads.
pub(crate) enum Link {
    /// To all of the build tree.
    Out,
    /// To this directory of a configuration.
    Of(&'static str),
}

/// Why intermediate outputs are not recorded, for a build tool whose action cache does not have them.
pub(crate) fn without_intermediates(version: &str) -> String {
    format!("and of intermediate outputs, nothing tells: the action cache of Bazel {version} has no digests")
}

/// Why the action cache beside an exec root tells nothing of outputs, whatever is built. Some Bazels, such as Debian's 4.2.3, do not say
/// which version they are.
fn unread_action_cache(exec_root: &Path) -> Option<ActionCacheError> {
    let output_base = exec_root.parent()?.parent()?;
    let read = action_cache::read(output_base, DigestFunction::Sha256, None);
    read.err().filter(ActionCacheError::is_lasting)
}

/// A path below a directory, or the directory itself.
fn under(directory: &str, below: &str) -> String {
    match below {
        "" => directory.to_owned(),
        below => format!("{directory}/{below}"),
    }
}

/// What the components of a path, from this one on, are symlinks to, as far as their names tell, with what is below
/// them. `--symlink_prefix` may be anything.
pub(crate) fn links_in(path: &Path, skipped: usize) -> impl Iterator<Item = (Link, String)> {
    let names: Vec<&str> = path
        .iter()
        .skip(skipped)
        .filter_map(|name| name.to_str())
        .collect();
    let is_link = |name: &str, kind: &str| {
        name.strip_suffix(kind)
            .is_some_and(|prefix| !prefix.ends_with(char::is_alphanumeric))
    };
    let links = names.iter().enumerate().filter_map(|(at, name)| {
        let link = if is_link(name, "out") {
            Link::Out
        } else {
            Link::Of(["bin", "testlogs"].into_iter().find(|kind| is_link(name, kind))?)
        };
        Some((link, names[at + 1..].join("/")))
    });
    links.collect::<Vec<_>>().into_iter()
}

impl Service {
    /// The recorded output at an absolute path, or at an exec path in the root whose newest invocation is newest.
    pub(super) fn find(&self, path: &str, only: Option<RootId>) -> Option<Found> {
        let mut best: Option<((u64, u64), Found)> = None;
        for (root, exec_path, exec_root, version) in self.places(path) {
            if only.is_some_and(|only| only != root) {
                continue;
            }
            let Ok(exec_path) = ExecPath::new(&exec_path) else {
                continue;
            };
            let Some(row) = self.record.output(root, &exec_path) else {
                continue;
            };
            // Of one root, it is the output that was named last.
            let version = (version, row.version);
            if best.as_ref().is_none_or(|(newest, _)| version > *newest) {
                best = Some((
                    version,
                    Found {
                        root,
                        exec_root,
                        path: exec_path,
                        row,
                    },
                ));
            }
        }
        best.map(|(_, found)| found)
    }

    /// The output at a path, or all outputs below it.
    pub(super) fn find_all(&self, path: &str, gone: &CancellationToken) -> Vec<Found> {
        if let Some(found) = self.find(path, None)
            && found.row.content != OutputContent::Directory
        {
            return vec![found];
        }
        let mut places = self.places(path);
        places.sort_by_key(|(.., version)| std::cmp::Reverse(*version));
        for (root, exec_path, exec_root, _) in places {
            let mut below: Vec<Found> = self
                .record
                .scan_outputs(root, &exec_path)
                .take_while(|_| !gone.is_cancelled())
                .filter(|(path, _)| path.starts_with(&exec_path))
                .map(|(path, row)| Found {
                    root,
                    exec_root: exec_root.clone(),
                    path,
                    row,
                })
                .collect();
            // What no event names is brought with a tree of its own, but not with everything around it.
            if below.iter().any(|found| !rows::is_unasked(&found.row)) {
                below.retain(|found| !rows::is_unasked(&found.row));
            }
            if !below.is_empty() {
                return below;
            }
        }
        Vec::new()
    }

    /// Why nothing is recorded at a path.
    pub(super) fn unnamed(&self, path: &str) -> String {
        let unnamed = "no recorded build has named it";
        for (root, _, exec_root, _) in self.places(path) {
            let Some(build) = self.record.newest_invocation(root) else {
                continue;
            };
            let version = build.build_tool_version;
            if rows::is_known_by_events_alone(&version) {
                return format!("{unnamed}, {}", without_intermediates(&version));
            }
            if version.is_empty()
                && let Some(error) = unread_action_cache(&exec_root)
            {
                return format!("{unnamed}, and of intermediate outputs, nothing tells: {error}");
            }
        }
        unnamed.to_owned()
    }

    /// The roots that a path can lie in, with the exec path that it has there.
    fn places(&self, path: &str) -> Vec<(RootId, String, PathBuf, u64)> {
        let mut places = Vec::new();
        for (id, row) in self.record.roots() {
            let exec_root = PathBuf::from(&row.path);
            if path.starts_with('/') {
                if let Ok(below) = Path::new(path).strip_prefix(&exec_root)
                    && let Some(below) = below.to_str()
                {
                    places.push((id, below.to_owned(), exec_root, row.version));
                }
            } else {
                places.push((id, path.to_owned(), exec_root, row.version));
            }
        }
        if places.is_empty() {
            places = self.by_links(Path::new(path));
        }
        places
    }

    /// The same for a path by one of the build tool's links in a workspace, such as `bazel-bin`, that leads nowhere from
    /// here: the newest builds of that workspace tell where it would lead. Of several configurations, the one with the
    /// shortest name comes first.
    fn by_links(&self, path: &Path) -> Vec<(RootId, String, PathBuf, u64)> {
        let rules = self.roots.rules();
        let roots = self.record.roots().into_iter().filter_map(|(id, row)| {
            let workspace = self.record.newest_invocation(id)?.workspace;
            let mapped = rules.translate(&workspace);
            let real = mapped.canonicalize().ok();
            let workspace = [PathBuf::from(workspace), mapped]
                .into_iter()
                .chain(real)
                .find(|workspace| !workspace.as_os_str().is_empty() && path.starts_with(workspace))?;
            Some((workspace.components().count(), id, row))
        });
        let roots: Vec<_> = roots.collect();
        // A workspace in another has builds of its own.
        let innermost = roots.iter().map(|(depth, ..)| *depth).max();
        let mut places = Vec::new();
        for (depth, id, row) in roots {
            if Some(depth) != innermost {
                continue;
            }
            let mut found = Vec::new();
            let mut configurations = None;
            for (link, below) in links_in(path, depth) {
                match link {
                    Link::Out => found.push(under(BUILD_TREE, &below)),
                    Link::Of(kind) => {
                        let configurations =
                            configurations.get_or_insert_with(|| self.record.directories_in(id, BUILD_TREE));
                        found.extend(
                            configurations
                                .iter()
                                .map(|of| under(&format!("{BUILD_TREE}/{of}/{kind}"), &below)),
                        );
                    }
                }
            }
            found.sort_by_key(String::len);
            let exec_root = PathBuf::from(&row.path);
            places.extend(
                found
                    .into_iter()
                    .map(|found| (id, found, exec_root.clone(), row.version)),
            );
        }
        places
    }

    pub(super) fn is_present(&self, placers: &mut HashMap<RootId, Option<Placer>>, found: &Found) -> bool {
        matches!(self.check(placers, found), Some(Check::Present { .. }))
    }

    /// Whether something else lies in an output's place.
    pub(super) fn differs(&self, placers: &mut HashMap<RootId, Option<Placer>>, found: &Found) -> bool {
        self.check(placers, found) == Some(Check::Differs)
    }

    fn check(&self, placers: &mut HashMap<RootId, Option<Placer>>, found: &Found) -> Option<Check> {
        let placer = placers.entry(found.root).or_insert_with(|| {
            let (_, root) = self.roots.reopen(&found.exec_root).ok()?;
            Some(Placer::new(root.place.clone(), PlaceOptions::default()))
        });
        let stamp = found.row.stamp.as_ref();
        placer
            .as_mut()?
            .check(&found.path, &found.row.content, stamp)
            .ok()
    }
}
