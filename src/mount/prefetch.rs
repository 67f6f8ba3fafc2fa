//! What is fetched before anybody reads it: the files that the newest builds were asked for, and what lies beside a file that
//! had to be fetched.

use std::{collections::HashSet, sync::Arc, time::Duration};

use futures::{StreamExt as _, stream};

use super::{
    catalog::Slot,
    shared::Shared,
    tree::{Node, Tree},
};
use crate::output::Class;

/// How often a daemon is asked for new builds.
const EVERY: Duration = Duration::from_secs(5);

/// Blobs of a build that are fetched at a time.
const AT_ONCE: usize = 16;

/// Files beside one that are fetched with it: how many, how large each, and all of them.
const SIBLINGS: usize = 32;
const SIBLING_BYTES: u64 = 1 << 20;
const SIBLINGS_BYTES: u64 = 8 << 20;

/// Fetches what the newest build of each workspace was asked for, now and whenever there is a newer one. Never ends.
pub(super) async fn newest(shared: Arc<Shared>) {
    let (mut done, mut quietly) = (HashSet::new(), false);
    loop {
        let refreshed = shared.catalog.refresh(quietly).await;
        if let Err(error) = refreshed {
            tracing::debug!(error, "failed to read the list of builds");
        }
        quietly = true;
        let latest = shared.catalog.workspaces().into_iter();
        let latest: Vec<(usize, String)> = latest
            .filter_map(|(at, _)| Some((at, shared.catalog.latest(at)?)))
            .collect();
        done.retain(|id| latest.iter().any(|(_, latest)| latest == id));
        for (at, id) in latest {
            if let Some(slot) = shared.catalog.build(&id)
                && done.insert(id.clone())
            {
                wanted(&shared, &slot, || shared.catalog.latest(at).as_ref() == Some(&id)).await;
            }
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// Fetches what a build was asked for, as long as it is the newest, into at most half of the store. What lies in the output
/// tree is not fetched: it is there when somebody reads it.
async fn wanted(shared: &Arc<Shared>, slot: &Arc<Slot>, is_newest: impl Fn() -> bool) {
    let tree = match shared.catalog.tree(slot).await {
        Ok(tree) => tree,
        Err(reason) => {
            tracing::debug!(reason, "failed to read what a build has");
            return;
        }
    };
    let mut left = shared.store.filled().1 / 2;
    let mut seen = HashSet::new();
    let nodes: Vec<Node> = tree
        .wanted()
        .filter(|(_, digest)| seen.insert(*digest))
        .filter(|(_, digest)| match left.checked_sub(digest.size()) {
            Some(rest) => {
                left = rest;
                true
            }
            None => false,
        })
        .map(|(node, _)| node)
        .collect();
    fetch(shared, slot, &tree, nodes, is_newest).await;
}

/// Fetches files that lie behind one in its directory, unless enough is fetched ahead already.
pub(super) fn siblings(shared: &Arc<Shared>, slot: &Arc<Slot>, tree: &Arc<Tree>, node: Node) {
    let Ok(place) = shared.ahead.clone().try_acquire_owned() else {
        return;
    };
    let mut bytes = 0;
    let nodes: Vec<Node> = tree
        .files_after(node)
        .take(SIBLINGS)
        .filter(|(_, digest)| digest.size() <= SIBLING_BYTES && !shared.store.has(digest))
        .take_while(|(_, digest)| {
            bytes += digest.size();
            bytes <= SIBLINGS_BYTES
        })
        .map(|(node, _)| node)
        .collect();
    if nodes.is_empty() {
        return;
    }
    let (shared, slot, tree) = (shared.clone(), slot.clone(), tree.clone());
    tokio::spawn(async move {
        fetch(&shared, &slot, &tree, nodes, || true).await;
        drop(place);
    });
}

/// Fetches files, with less haste than for readers. What fails is told to those who read it.
async fn fetch(
    shared: &Arc<Shared>,
    slot: &Arc<Slot>,
    tree: &Arc<Tree>,
    nodes: Vec<Node>,
    is_needed: impl Fn() -> bool,
) {
    let blobs = nodes.into_iter().take_while(|_| is_needed());
    let blobs = blobs.filter_map(|node| shared.blob(slot, tree, node));
    stream::iter(blobs)
        .for_each_concurrent(AT_ONCE, |blob| async move {
            if shared.store.has(&blob.digest) || blob.is_in_tree().await {
                return;
            }
            if let Err(error) = shared.store.bring(&blob, Class::Optional).await {
                tracing::debug!(path = %blob.path, %error, "failed to fetch ahead");
            }
        })
        .await;
}
