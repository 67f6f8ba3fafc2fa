//! What a build's directory shows: names, digests, links. Plain data that never changes once it is there.
//!
//! A build has up to millions of outputs and few of them are read, so a file is as small as can be: its name is a place in
//! one text that all names share, and a directory's children are a range of one list.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, Hasher as _},
    ops::Range,
};

use foldhash::fast::RandomState;

use crate::{digest::Digest, exec_path::ExecPath};

/// A file, link or directory of a tree, by its number.
pub(crate) type Node = u32;

/// The directory that all others lie in.
pub(super) const TOP: Node = 0;

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content<'a> {
    /// A file with this blob's bytes.
    File(Digest),
    /// A symlink with this target.
    Link(&'a str),
    /// A directory.
    Directory,
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What<'a> {
    File(&'a Digest),
    Link(&'a str),
    Directory,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Directory,
    /// A file that the build was asked for, or another one.
    File {
        is_wanted: bool,
    },
    Link,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    parent: Node,
    /// Where its name begins.
    name: u32,
    /// Of a directory, where its children begin in the list; of a file, the place of its digest; of a link, where its
    /// target begins.
    first: u32,
    /// Of a directory, how many children; of a link, how long the target is.
    count: u32,
    /// How long the name is.
    length: u8,
    kind: Kind,
}

/// The outputs of one build.
#[derive(Debug, Default)]
pub(super) struct Tree {
    entries: Vec<Entry>,
    /// The nodes by parent and name.
    order: Vec<Node>,
    digests: Vec<Digest>,
    /// Names and targets of links.
    text: String,
}

impl Tree {
    /// How many nodes.
    pub(super) const fn len(&self) -> usize {
        self.entries.len()
    }

    /// Bytes of memory.
    #[cfg(test)]
    pub(super) const fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Entry>()
            + self.order.capacity() * size_of::<Node>()
            + self.digests.capacity() * size_of::<Digest>()
            + self.text.capacity()
    }

    fn entry(&self, node: Node) -> Option<&Entry> {
        self.entries.get(node as usize)
    }

    fn part(&self, first: u32, length: usize) -> &str {
        let first = first as usize;
        self.text.get(first..first + length).unwrap_or_default()
    }

    fn name_of(&self, entry: &Entry) -> &str {
        self.part(entry.name, usize::from(entry.length))
    }

    /// A node's name; empty for the top.
    pub(super) fn name(&self, node: Node) -> &str {
        self.entry(node).map_or("", |entry| self.name_of(entry))
    }

    /// The directory that a node lies in.
    pub(super) fn parent(&self, node: Node) -> Node {
        self.entry(node).map_or(TOP, |entry| entry.parent)
    }

    /// What a node is, if there is one of that number.
    pub(super) fn what(&self, node: Node) -> Option<What<'_>> {
        let entry = self.entry(node)?;
        Some(match entry.kind {
            Kind::Directory => What::Directory,
            Kind::File { .. } => What::File(self.digests.get(entry.first as usize)?),
            Kind::Link => What::Link(self.part(entry.first, entry.count as usize)),
        })
    }

    /// A node's path from the top.
    pub(super) fn path(&self, node: Node) -> String {
        let (mut names, mut at) = (Vec::new(), node);
        while at != TOP {
            names.push(self.name(at));
            at = self.parent(at);
        }
        names.reverse();
        names.join("/")
    }

    /// What lies in a directory, by name.
    pub(super) fn children(&self, directory: Node) -> &[Node] {
        let Some(entry) = self
            .entry(directory)
            .filter(|entry| entry.kind == Kind::Directory)
        else {
            return &[];
        };
        let first = entry.first as usize;
        self.order
            .get(first..first + entry.count as usize)
            .unwrap_or_default()
    }

    /// What has this name in a directory.
    pub(super) fn find(&self, directory: Node, name: &str) -> Option<Node> {
        let children = self.children(directory);
        let found = children.binary_search_by(|child| self.name(*child).cmp(name));
        Some(children[found.ok()?])
    }

    /// The files in the same directory that come after a file.
    pub(super) fn files_after(&self, node: Node) -> impl Iterator<Item = (Node, &Digest)> {
        let children = self.children(self.parent(node));
        let at = children.binary_search_by(|child| self.name(*child).cmp(self.name(node)));
        let rest = at.map_or(&[][..], |at| &children[at + 1..]);
        rest.iter().filter_map(|child| match self.what(*child)? {
            What::File(digest) => Some((*child, digest)),
            _ => None,
        })
    }

    /// The files that the build was asked for.
    pub(super) fn wanted(&self) -> impl Iterator<Item = (Node, &Digest)> {
        let nodes = (TOP..).zip(&self.entries);
        nodes.filter_map(|(node, entry)| {
            let is_wanted = entry.kind == Kind::File { is_wanted: true };
            Some((
                node,
                self.digests.get(entry.first as usize).filter(|_| is_wanted)?,
            ))
        })
    }
}

/// Takes in what a build has, in any order, and makes a [`Tree`] of it.
pub(crate) struct TreeBuilder {
    tree: Tree,
    /// Where links of the build lead that lead into the build itself.
    exec_root: String,
    directories: HashMap<Box<str>, Node, RandomState>,
    /// The directory of the last path: the next one is often in the same.
    last: (String, Node),
    hasher: RandomState,
    /// Where names are, by their hash.
    names: HashMap<u64, Range<u32>, RandomState>,
    /// How many outputs were too many.
    left_out: usize,
}

impl TreeBuilder {
    /// An empty tree of a build with this exec root.
    pub(crate) fn new(exec_root: &str) -> Self {
        let top = Entry {
            parent: TOP,
            name: 0,
            first: 0,
            count: 0,
            length: 0,
            kind: Kind::Directory,
        };
        Self {
            tree: Tree {
                entries: vec![top],
                ..Tree::default()
            },
            exec_root: exec_root.to_owned(),
            directories: HashMap::default(),
            last: (String::new(), TOP),
            hasher: RandomState::default(),
            names: HashMap::default(),
            left_out: 0,
        }
    }

    /// Takes an output in; of two at one path, the later one counts.
    pub(crate) fn add(&mut self, path: &ExecPath, content: Content<'_>, is_wanted: bool) {
        if self.try_add(path, content, is_wanted).is_none() {
            self.left_out += 1;
        }
    }

    /// `None` where there are more than the numbers can count.
    fn try_add(&mut self, path: &ExecPath, content: Content<'_>, is_wanted: bool) -> Option<()> {
        if content == Content::Directory {
            return self.directory(path.as_str()).map(|_| ());
        }
        let parent = self.directory(path.parent().unwrap_or_default())?;
        let (first, count, kind) = match content {
            Content::Directory => return None,
            Content::File(digest) => {
                self.tree.digests.push(digest);
                let first = u32::try_from(self.tree.digests.len() - 1).ok()?;
                (first, 0, Kind::File { is_wanted })
            }
            Content::Link(target) => {
                let target = self.target(path, target);
                let first = self.text(&target)?;
                (first, u32::try_from(target.len()).ok()?, Kind::Link)
            }
        };
        self.push(parent, path.file_name(), first, count, kind)
            .map(|_| ())
    }

    /// A link's target. One into the build's own exec root leads to the same file here.
    fn target(&self, path: &ExecPath, target: &str) -> String {
        let below = target.strip_prefix(&self.exec_root);
        let below = below.and_then(|below| below.strip_prefix('/'));
        match below.filter(|_| !self.exec_root.is_empty()) {
            Some(below) => "../".repeat(path.components().count() - 1) + below,
            None => target.to_owned(),
        }
    }

    /// The node of a directory, which is made with all that are above it.
    fn directory(&mut self, path: &str) -> Option<Node> {
        if path.is_empty() {
            return Some(TOP);
        }
        if self.last.0 == path {
            return Some(self.last.1);
        }
        let mut missing = Vec::new();
        let (mut at, mut node) = (path, TOP);
        loop {
            if let Some(known) = self.directories.get(at) {
                node = *known;
                break;
            }
            missing.push(at);
            match at.rsplit_once('/') {
                Some((above, _)) => at = above,
                None => break,
            }
        }
        for path in missing.into_iter().rev() {
            let name = path.rsplit('/').next().unwrap_or(path);
            node = self.push(node, name, 0, 0, Kind::Directory)?;
            self.directories.insert(path.into(), node);
        }
        self.last = (path.to_owned(), node);
        Some(node)
    }

    fn push(&mut self, parent: Node, name: &str, first: u32, count: u32, kind: Kind) -> Option<Node> {
        let node = Node::try_from(self.tree.entries.len()).ok()?;
        let length = u8::try_from(name.len()).ok()?;
        let name = self.interned(name)?;
        self.tree.entries.push(Entry {
            parent,
            name,
            first,
            count,
            length,
            kind,
        });
        Some(node)
    }

    fn text(&mut self, text: &str) -> Option<u32> {
        let first = u32::try_from(self.tree.text.len()).ok()?;
        self.tree.text.push_str(text);
        Some(first)
    }

    /// Where a name is: many files of a build have the same.
    fn interned(&mut self, name: &str) -> Option<u32> {
        let mut hasher = self.hasher.build_hasher();
        hasher.write(name.as_bytes());
        let hash = hasher.finish();
        if let Some(known) = self.names.get(&hash)
            && self.tree.text.get(known.start as usize..known.end as usize) == Some(name)
        {
            return Some(known.start);
        }
        let first = self.text(name)?;
        let end = first.checked_add(u32::try_from(name.len()).ok()?)?;
        self.names.insert(hash, first..end);
        Some(first)
    }

    /// The tree, and how many outputs are not in it because there are too many.
    pub(super) fn finish(self) -> (Tree, usize) {
        let Self {
            mut tree, left_out, ..
        } = self;
        let mut order: Vec<Node> = (1..tree.entries.len() as u32).collect();
        let key = |node: &Node| {
            let entry = &tree.entries[*node as usize];
            (entry.parent, tree.name_of(entry))
        };
        order.sort_by(|a, b| key(a).cmp(&key(b)));
        // What was named last counts, but a directory has more in it.
        order.dedup_by(|later, kept| {
            let is_same = key(later) == key(kept);
            if is_same && tree.entries[*kept as usize].kind != Kind::Directory {
                *kept = *later;
            }
            is_same
        });
        let parent = |node: Node| tree.entries[node as usize].parent;
        let ranges = order.chunk_by(|a, b| parent(*a) == parent(*b));
        let ranges: Vec<(Node, u32)> = ranges
            .map(|children| (parent(children[0]), children.len() as u32))
            .collect();
        let mut first = 0;
        for (parent, count) in ranges {
            let directory = &mut tree.entries[parent as usize];
            (directory.first, directory.count) = (first, count);
            first += count;
        }
        tree.order = order;
        tree.entries.shrink_to_fit();
        tree.order.shrink_to_fit();
        tree.digests.shrink_to_fit();
        tree.text.shrink_to_fit();
        (tree, left_out)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::digest::DigestFunction;

    fn digest(text: &str) -> Digest {
        Digest::of(DigestFunction::Sha256, text.as_bytes())
    }

    fn built(outputs: &[(&str, Content<'_>)]) -> Tree {
        let mut builder = TreeBuilder::new("/ob/execroot/_main");
        for (path, content) in outputs {
            builder.add(
                &ExecPath::new(path).unwrap(),
                content.clone(),
                path.ends_with("wanted"),
            );
        }
        builder.finish().0
    }

    fn at(tree: &Tree, path: &str) -> Option<Node> {
        path.split('/').try_fold(TOP, |node, name| tree.find(node, name))
    }

    #[test]
    fn files_links_and_directories_are_found_by_their_paths() {
        let tree = built(&[
            ("bazel-out/k8/bin/b", Content::File(digest("b"))),
            ("bazel-out/k8/bin/a", Content::File(digest("a"))),
            ("bazel-out/k8/bin/empty", Content::Directory),
            ("bazel-out/k8/bin/sub/link", Content::Link("../a")),
            ("bazel-out/k8/bin/sub/away", Content::Link("/usr/bin/x")),
            (
                "bazel-out/k8/bin/sub/home",
                Content::Link("/ob/execroot/_main/bazel-out/k8/bin/a"),
            ),
            ("bazel-out/k8/bin/c_wanted", Content::File(digest("c"))),
        ]);
        let what = |path| tree.what(at(&tree, path).unwrap()).unwrap();
        assert_eq!(what("bazel-out/k8/bin/a"), What::File(&digest("a")));
        assert_eq!(what("bazel-out/k8/bin/empty"), What::Directory);
        assert_eq!(what("bazel-out/k8/bin/sub/link"), What::Link("../a"));
        assert_eq!(what("bazel-out/k8/bin/sub/away"), What::Link("/usr/bin/x"));
        let home = "../../../../bazel-out/k8/bin/a";
        assert_eq!(what("bazel-out/k8/bin/sub/home"), What::Link(home));
        assert_eq!(at(&tree, "bazel-out/k8/bin/none"), None);
        assert_eq!(at(&tree, "bazel-out/k8/bin/a/below"), None);
        let bin = at(&tree, "bazel-out/k8/bin").unwrap();
        let names: Vec<&str> = tree.children(bin).iter().map(|node| tree.name(*node)).collect();
        assert_eq!(names, ["a", "b", "c_wanted", "empty", "sub"]);
        let after: Vec<&str> = tree
            .files_after(at(&tree, "bazel-out/k8/bin/a").unwrap())
            .map(|(node, _)| tree.name(node))
            .collect();
        assert_eq!(after, ["b", "c_wanted"]);
        let wanted: Vec<String> = tree.wanted().map(|(node, _)| tree.path(node)).collect();
        assert_eq!(wanted, ["bazel-out/k8/bin/c_wanted"]);
        assert_eq!((tree.name(TOP), tree.path(TOP)), ("", String::new()));
    }

    #[test]
    fn the_later_of_two_files_counts_and_a_directory_with_files_always() {
        let tree = built(&[
            ("bazel-out/x", Content::File(digest("older"))),
            ("bazel-out/x", Content::File(digest("newer"))),
            ("bazel-out/d", Content::File(digest("file"))),
            ("bazel-out/d/in", Content::File(digest("in"))),
            ("bazel-out/e/in", Content::File(digest("in"))),
            ("bazel-out/e", Content::File(digest("file"))),
        ]);
        let what = |path| tree.what(at(&tree, path).unwrap()).unwrap();
        assert_eq!(what("bazel-out/x"), What::File(&digest("newer")));
        assert_eq!(what("bazel-out/d/in"), What::File(&digest("in")));
        assert_eq!(what("bazel-out/e/in"), What::File(&digest("in")));
        assert_eq!(tree.children(at(&tree, "bazel-out").unwrap()).len(), 3);
    }

    #[test]
    fn a_known_file_takes_at_most_a_hundred_and_forty_bytes() {
        for count in [1_000, 100_000] {
            let mut builder = TreeBuilder::new("/w");
            for n in 0..count {
                let path = format!(
                    "bazel-out/k8-fastbuild/bin/pkg{}/_objs/lib/some_source_{n}.pic.o",
                    n / 50
                );
                builder.add(
                    &ExecPath::new(&path).unwrap(),
                    Content::File(digest(&path)),
                    false,
                );
            }
            let (tree, left_out) = builder.finish();
            assert_eq!(left_out, 0);
            assert!(tree.bytes() / count <= 140, "{} bytes", tree.bytes() / count);
        }
    }

    proptest! {
        #[test]
        fn every_output_is_there_whatever_the_order(
            paths in proptest::collection::vec("[abc]{1,2}(/[abc]{1,2}){0,3}", 1..60)
        ) {
            let mut builder = TreeBuilder::new("");
            let mut expected = BTreeMap::new();
            for (n, path) in paths.iter().enumerate() {
                let digest = digest(&n.to_string());
                builder.add(&ExecPath::new(path).unwrap(), Content::File(digest.clone()), false);
                expected.insert(path.clone(), digest);
            }
            let tree = builder.finish().0;
            for (path, digest) in &expected {
                let node = at(&tree, path).unwrap();
                prop_assert_eq!(&tree.path(node), path);
                let inside = format!("{path}/");
                let is_directory = expected.keys().any(|other| other.starts_with(&inside));
                let what = if is_directory { What::Directory } else { What::File(digest) };
                prop_assert_eq!(tree.what(node).unwrap(), what);
            }
        }
    }
}
