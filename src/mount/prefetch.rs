//! What is fetched before anybody reads it: the files that the newest builds were asked for, and what lies beside a file that
//! had to be fetched.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream};
use tokio::{task::JoinSet, time::sleep};

use super::{
    catalog::Slot,
    error::Unread,
    shared::Shared,
    shelf::cost,
    tree::{Node, Tree},
};
use crate::{digest::Digest, output::Class};

/// How often a daemon is asked for new builds.
const EVERY: Duration = Duration::from_secs(5);

/// How often is looked whether there are any.
const SOON: Duration = Duration::from_secs(1);

/// How long after a build's outputs could not be read this is tried again.
const AGAIN: Duration = Duration::from_secs(30);

/// Builds whose outputs are fetched at a time.
const BUILDS_AT_ONCE: usize = 3;

/// Blobs of a build that are fetched at a time.
const AT_ONCE: usize = 16;

/// Files beside one that are fetched with it: how many, how large each, and all of them.
const SIBLINGS: usize = 32;
const SIBLING_BYTES: u64 = 1 << 20;
const SIBLINGS_BYTES: u64 = 8 << 20;

/// Fetches what the newest build of each workspace was asked for, now and whenever there is a newer one. Never ends.
pub(super) async fn newest(shared: Arc<Shared>) {
    tokio::join!(refreshing(&shared), following(&shared));
}

/// Asks for new builds, again and again.
async fn refreshing(shared: &Shared) {
    let mut quietly = false;
    loop {
        if let Err(error) = shared.catalog.refresh(quietly).await {
            tracing::debug!(%error, "failed to read the list of builds");
        }
        quietly = true;
        sleep(EVERY).await;
    }
}

/// Waits until a build is not the newest one of its workspace any more.
async fn outdated(shared: &Shared, at: usize, id: &str) {
    while shared.catalog.latest(at).is_some_and(|latest| latest == id) {
        sleep(SOON).await;
    }
}

/// Begins with each build when it is the newest of its workspace, the newest of all first, a few at a time.
async fn following(shared: &Arc<Shared>) {
    let mut known: HashMap<String, Option<Instant>> = HashMap::new();
    let mut tasks = JoinSet::new();
    loop {
        let latest = shared.catalog.workspaces().into_iter();
        let mut latest: Vec<(usize, Arc<Slot>)> = latest
            .filter_map(|(at, _)| Some((at, shared.catalog.build(&shared.catalog.latest(at)?)?)))
            .collect();
        latest.sort_by_key(|(_, slot)| Reverse(slot.build.started_ms));
        known.retain(|id, _| latest.iter().any(|(_, latest)| latest.build.id == *id));
        let bytes = share(shared.store.filled().1, latest.len());
        for (at, slot) in latest {
            if tasks.len() >= BUILDS_AT_ONCE {
                break;
            }
            let id = slot.build.id.clone();
            match known.get(&id) {
                // It is done or under way.
                Some(None) => continue,
                Some(Some(failed)) if failed.elapsed() < AGAIN => continue,
                _ => {}
            }
            known.insert(id.clone(), None);
            let shared = shared.clone();
            tasks.spawn(async move {
                let end = tokio::select! {
                    end = wanted(&shared, &slot, bytes) => end,
                    () = outdated(&shared, at, &id) => Ok(()),
                };
                (id, end)
            });
        }
        let done = tokio::select! {
            Some(done) = tasks.join_next() => done,
            () = sleep(SOON) => continue,
        };
        if let Ok((id, Err(reason))) = done {
            tracing::debug!(id, %reason, "failed to read what a build has");
            known.insert(id, Some(Instant::now()));
        }
    }
}

/// What each of so many workspaces gets of a store: together they get half.
fn share(store: u64, workspaces: usize) -> u64 {
    store / 2 / (workspaces.max(1) as u64)
}

/// Fetches what a build was asked for, into at most so many bytes of the store. What lies in the output tree is not fetched:
/// it is there when somebody reads it.
async fn wanted(shared: &Arc<Shared>, slot: &Arc<Slot>, bytes: u64) -> Result<(), Unread> {
    let tree = shared.catalog.tree(slot).await?;
    fetch(shared, slot, &tree, within(bytes, tree.wanted())).await;
    Ok(())
}

/// The files that fit into so many bytes of disk, each content once.
fn within<'a>(bytes: u64, files: impl Iterator<Item = (Node, &'a Digest)>) -> Vec<Node> {
    let (mut left, mut seen) = (bytes, HashSet::new());
    let fits = files.filter(|(_, digest)| {
        let rest = left.checked_sub(cost(digest)).filter(|_| seen.insert(*digest));
        left = rest.unwrap_or(left);
        rest.is_some()
    });
    fits.map(|(node, _)| node).collect()
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
        fetch(&shared, &slot, &tree, nodes).await;
        drop(place);
    });
}

/// Fetches files, with less haste than for readers. What fails is told to those who read it.
async fn fetch(shared: &Arc<Shared>, slot: &Arc<Slot>, tree: &Arc<Tree>, nodes: Vec<Node>) {
    let blobs = nodes.into_iter().filter_map(|node| shared.blob(slot, tree, node));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;

    #[test]
    fn workspaces_share_half_of_the_store_in_whole_blocks() {
        assert_eq!(
            [0, 1, 3].map(|workspaces| share(6000, workspaces)),
            [3000, 3000, 1000]
        );
        let digest = |n: u8, size| Digest::new(DigestFunction::Md5, &[n; 16], size).unwrap();
        let all = [
            digest(1, 1),
            digest(1, 1),
            digest(2, 9000),
            digest(3, 4096),
            digest(4, 1),
        ];
        let files = || (0..).zip(&all);
        assert_eq!(within(8192, files()), [0, 3]);
        assert_eq!(within(12288, files()), [0, 3, 4]);
        assert_eq!(within(4095, files()), [0_u32; 0]);
    }
}
