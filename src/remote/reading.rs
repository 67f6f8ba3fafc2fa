//! Whole blobs, trees and what actions resulted in, read from any store and verified.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt::Display,
    io,
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;

use super::{
    ActionStore, Attribution, BlobStore, Sink,
    expand::{self, Expanded, TreeRef},
    trees::{DirectoryTree, MAX_TREE, too_large},
};
use crate::{
    digest::Digest,
    transport::{RemoteError, RemoteErrorKind},
};

/// Keeps what it is given; without a copy if that comes in one piece.
#[derive(Default)]
pub(crate) struct Collect {
    first: Bytes,
    all: Vec<u8>,
}

impl Collect {
    /// Takes the next bytes.
    pub(crate) fn add(&mut self, bytes: Bytes) {
        if self.all.is_empty() {
            if self.first.is_empty() {
                self.first = bytes;
                return;
            }
            self.all.extend_from_slice(&self.first);
        }
        self.all.extend_from_slice(&bytes);
    }

    /// All of them.
    pub(crate) fn into_bytes(self) -> Bytes {
        if self.all.is_empty() {
            self.first
        } else {
            self.all.into()
        }
    }
}

#[async_trait]
impl Sink for Collect {
    async fn write(&mut self, bytes: Bytes) -> io::Result<()> {
        self.add(bytes);
        Ok(())
    }
}

fn protocol<S: BlobStore + ?Sized>(store: &S, what: &str, message: impl Display) -> RemoteError {
    let context = format!("{what} from {}", store.describe());
    RemoteError::protocol(context, message)
}

/// A blob, whole and verified. Bytes that are wrong are asked for once more, elsewhere.
///
/// # Errors
/// When it is missing, or wrong twice.
pub(crate) async fn read_blob<S: BlobStore + ?Sized>(
    store: &S,
    digest: &Digest,
    attribution: &Attribution,
) -> Result<Bytes, RemoteError> {
    let batched = digest.size() <= store.capabilities().await?.max_batch_bytes;
    let mut avoid = false;
    loop {
        let bytes = if batched {
            let asked = std::slice::from_ref(digest);
            let answer = store.read_batch(asked, attribution, avoid).await.pop();
            answer.map_or_else(|| Ok(Bytes::new()), |(_, answer)| answer)?
        } else {
            let mut whole = Collect::default();
            let read = store.read_stream(digest, 0, attribution, avoid, &mut whole).await;
            // An answer that cannot be used is like wrong bytes.
            if let Err(error) = read {
                let may_come = error.kind == RemoteErrorKind::Protocol && (store.distrust(digest) || !avoid);
                if !may_come {
                    return Err(error);
                }
                avoid = true;
                continue;
            }
            whole.into_bytes()
        };
        let actual = Digest::of(digest.function(), &bytes);
        if actual == *digest {
            return Ok(bytes);
        }
        let may_come = store.distrust(digest);
        if avoid && !may_come {
            let message = format!("the server sent bytes with the digest {actual}");
            return Err(protocol(store, &format!("blob {digest}"), message));
        }
        avoid = true;
    }
}

/// A directory tree, complete, with every digest checked.
///
/// # Errors
/// When the store cannot be asked, lacks a part of it, or it is too large.
pub(super) async fn read_tree<S: ActionStore + ?Sized>(
    store: &S,
    reference: &TreeRef,
    attribution: &Attribution,
) -> Result<DirectoryTree, RemoteError> {
    let too_large = |what: &str| too_large(format!("{what} from {}", store.describe()));
    let root = match reference {
        TreeRef::Root(root) => root,
        TreeRef::Tree(digest) => {
            let what = format!("tree {digest}");
            if digest.size() > MAX_TREE {
                return Err(too_large(&what));
            }
            let bytes = read_blob(store, digest, attribution).await?;
            return DirectoryTree::decode(digest.function(), bytes).map_err(|e| protocol(store, &what, e));
        }
    };
    let what = format!("directory {root}");
    let mut tree = DirectoryTree::rooted_at(root.clone());
    if !root.is_empty() {
        store.add_directories(root, attribution, &mut tree).await?;
    }
    // What that leaves out, as blobs, level by level.
    loop {
        let missing = tree.missing();
        if missing.is_empty() {
            return Ok(tree);
        }
        if missing.iter().map(Digest::size).sum::<u64>() > MAX_TREE - tree.encoded_bytes.min(MAX_TREE) {
            return Err(too_large(&what));
        }
        for (digest, answer) in store.read_batch(&missing, attribution, false).await {
            let mut bytes = answer?;
            if Digest::of(digest.function(), &bytes) != digest {
                store.distrust(&digest);
                bytes = read_blob(store, &digest, attribution).await?;
            }
            tree.add(bytes).map_err(|e| protocol(store, &what, e))?;
        }
    }
}

/// All outputs of an action, trees expanded, in the order of paths; `None` when the store has no result.
///
/// # Errors
/// When the store cannot be asked, a tree is missing, or the result names what must not be written.
pub(crate) async fn expand_action(
    store: &dyn ActionStore,
    action: &Digest,
    attribution: &Attribution,
) -> Result<Option<Vec<Expanded>>, RemoteError> {
    let Some(result) = store.action_result(action, attribution).await? else {
        return Ok(None);
    };
    let what = format!("result for action {action}");
    let refused = |e: expand::ExpandError| protocol(store, &what, e.to_string());
    let function = action.function();
    let mut trees: HashMap<TreeRef, Arc<DirectoryTree>> = HashMap::new();
    for reference in expand::trees_of(function, &result).map_err(refused)? {
        if let Entry::Vacant(entry) = trees.entry(reference) {
            let tree = store.tree(entry.key(), attribution).await?;
            entry.insert(tree);
        }
    }
    expand::expand_result(function, &result, &trees, expand::MAX_ENTRIES)
        .map(Some)
        .map_err(refused)
}

/// Everything in a tree, by the digest of its `Tree` message or of its root `Directory`, whichever it is. The two cannot
/// be distinguished by their digests; a `Tree` has its root in field 1, where a `Directory` has files, so decoding says.
///
/// # Errors
/// When the store cannot be asked, lacks a part of it, or the blob is neither.
pub(crate) async fn expand_any_tree(
    store: &dyn ActionStore,
    digest: &Digest,
    attribution: &Attribution,
) -> Result<Vec<Expanded>, RemoteError> {
    let expanded = |tree: &DirectoryTree| {
        expand::expand_tree(None, tree, expand::MAX_ENTRIES)
            .map_err(|e| protocol(store, &format!("tree {digest}"), e.to_string()))
    };
    // A store that gives any blob gives a `Tree` as well, and it decodes as a directory whose files are not valid.
    let root = store.tree(&TreeRef::Root(digest.clone()), attribution).await;
    let root_error = match root.and_then(|tree| expanded(&tree)) {
        Ok(found) => return Ok(found),
        Err(error) => error,
    };
    let tree = store.tree(&TreeRef::Tree(digest.clone()), attribution).await;
    tree.and_then(|tree| expanded(&tree)).map_err(|tree_error| {
        if root_error.is_not_found() {
            tree_error
        } else {
            root_error
        }
    })
}
