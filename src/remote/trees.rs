//! Directories as the cache keeps them, each under a digest that was checked.
//!
//! A `Tree` message and the answers to `GetTree` hold directories inline, and a directory refers to its children by
//! the digest of their encoding. The encoded bytes are kept while decoding and hashed as they came: encoding a decoded
//! directory again would lose the fields that we don't know, and with them the digest.

use std::collections::HashMap;

use anyhow::anyhow;
use bazel_remote_apis::build::bazel::remote::execution::v2::Directory;
use bytes::Bytes;
use prost::Message as _;

use crate::{
    digest::{Digest, DigestFunction},
    transport::RemoteError,
};

/// The most bytes of encoded directories in one tree.
pub(super) const MAX_TREE: u64 = 512 * 1024 * 1024;

/// The error of a tree with more.
pub(super) fn too_large(context: impl Into<String>) -> RemoteError {
    RemoteError::rejected(
        context,
        format!("the tree has more than {MAX_TREE} bytes of directories"),
    )
}

/// A directory and all that are below it, as far as the cache has them.
#[derive(Debug, Clone, PartialEq)]
pub struct DirectoryTree {
    root: Digest,
    directories: HashMap<Digest, Directory>,
    /// Of the encoded directories, in bytes.
    pub(crate) encoded_bytes: u64,
}

/// `Tree`, with its directories left encoded: on the wire, a message and its bytes are the same.
#[derive(Clone, PartialEq, prost::Message)]
struct RawTree {
    #[prost(bytes = "bytes", optional, tag = "1")]
    root: Option<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "2")]
    children: Vec<Bytes>,
}

/// `GetTreeResponse`, likewise.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct RawGetTreeResponse {
    /// Encoded directories.
    #[prost(bytes = "bytes", repeated, tag = "1")]
    pub(crate) directories: Vec<Bytes>,
    /// Not empty when there is more.
    #[prost(string, tag = "2")]
    pub(crate) next_page_token: String,
}

impl DirectoryTree {
    /// An empty tree whose root is still to be added.
    pub(crate) fn rooted_at(root: Digest) -> Self {
        Self {
            root,
            directories: HashMap::new(),
            encoded_bytes: 0,
        }
    }

    /// From an encoded `Tree` message, whose own digest the caller has checked.
    ///
    /// # Errors
    /// When it cannot be decoded or has no root.
    pub fn decode(function: DigestFunction, bytes: Bytes) -> anyhow::Result<Self> {
        let raw = RawTree::decode(bytes).map_err(|e| anyhow!("not a Tree message: {e}"))?;
        let root = raw.root.ok_or_else(|| anyhow!("the Tree has no root"))?;
        let mut tree = Self::rooted_at(Digest::of(function, &root));
        for directory in std::iter::once(root).chain(raw.children) {
            tree.add(directory)?;
        }
        Ok(tree)
    }

    /// Adds an encoded directory under its digest, whichever that is.
    ///
    /// # Errors
    /// When it cannot be decoded.
    pub(crate) fn add(&mut self, bytes: Bytes) -> anyhow::Result<()> {
        let digest = Digest::of(self.root.function(), &bytes);
        self.encoded_bytes += bytes.len() as u64;
        let directory = Directory::decode(bytes).map_err(|e| anyhow!("not a Directory message: {e}"))?;
        self.directories.insert(digest, directory);
        Ok(())
    }

    /// The digest of the root directory.
    pub const fn root(&self) -> &Digest {
        &self.root
    }

    /// A directory of this digest. The empty directory is there without having been sent.
    pub fn get(&self, digest: &Digest) -> Option<&Directory> {
        static EMPTY: std::sync::LazyLock<Directory> = std::sync::LazyLock::new(Directory::default);
        self.directories
            .get(digest)
            .or_else(|| digest.is_empty().then_some(&*EMPTY))
    }

    /// How much memory it holds, roughly, in bytes.
    pub fn weight(&self) -> u32 {
        // Decoded strings and vectors take some four times what they take encoded.
        u32::try_from(self.encoded_bytes.saturating_mul(4).saturating_add(256)).unwrap_or(u32::MAX)
    }

    /// Digests that reachable directories refer to and that are not here, each once. One that is not a digest is passed
    /// over: the expansion names it.
    pub(crate) fn missing(&self) -> Vec<Digest> {
        let mut seen = std::collections::HashSet::new();
        let mut missing = Vec::new();
        let mut stack = vec![self.root.clone()];
        while let Some(digest) = stack.pop() {
            if seen.contains(&digest) {
                continue;
            }
            match self.get(&digest) {
                None => missing.push(digest.clone()),
                Some(directory) => stack.extend(directory.directories.iter().filter_map(|node| {
                    super::client::from_wire(self.root.function(), node.digest.as_ref()?)
                })),
            }
            seen.insert(digest);
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use bazel_remote_apis::build::bazel::remote::execution::v2::{DirectoryNode, Tree};

    use super::*;
    use crate::remote::client::to_wire;

    const SHA256: DigestFunction = DigestFunction::Sha256;

    #[test]
    fn children_are_found_by_the_digest_of_the_bytes_that_came() {
        // A field that this program does not know is part of what was hashed.
        let child = [Directory::default().encode_to_vec(), vec![0xf8, 0x07, 0x01]].concat();
        let digest = Digest::of(SHA256, &child);
        let root = Directory {
            directories: vec![DirectoryNode {
                name: "d".into(),
                digest: Some(to_wire(&digest)),
            }],
            ..Directory::default()
        };
        let raw = RawTree {
            root: Some(root.encode_to_vec().into()),
            children: vec![child.into()],
        };
        let tree = DirectoryTree::decode(SHA256, raw.encode_to_vec().into()).unwrap();
        assert!(tree.get(&digest).is_some());
        assert_eq!(tree.missing(), []);
    }

    #[test]
    fn a_tree_message_is_read_as_it_is_written() {
        let tree = Tree {
            root: Some(Directory::default()),
            children: vec![],
        };
        let read = DirectoryTree::decode(SHA256, tree.encode_to_vec().into()).unwrap();
        assert_eq!(*read.root(), Digest::of(SHA256, b""));
        assert!(read.get(read.root()).is_some());
    }

    #[test]
    fn what_is_no_tree_is_an_error() {
        assert!(DirectoryTree::decode(SHA256, Bytes::new()).is_err());
        assert!(DirectoryTree::decode(SHA256, Bytes::from_static(b"\xff\xff\xff")).is_err());
        assert!(DirectoryTree::decode(SHA256, Bytes::from_static(b"\x0a\x01\xff")).is_err());
    }

    #[test]
    fn absent_directories_are_named_once() {
        let absent = Digest::of(SHA256, b"absent");
        let node = |name: &str| DirectoryNode {
            name: name.into(),
            digest: Some(to_wire(&absent)),
        };
        let root = Directory {
            directories: vec![node("a"), node("b")],
            ..Directory::default()
        };
        let bytes = root.encode_to_vec();
        let mut tree = DirectoryTree::rooted_at(Digest::of(SHA256, &bytes));
        tree.add(bytes.into()).unwrap();
        assert_eq!(tree.missing(), [absent]);
    }
}
