//! Several stores, asked one after the other.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};

use super::{Attribution, BatchAnswer, BlobStore, Capabilities, Sink};
use crate::{
    digest::Digest,
    transport::{RemoteError, RemoteErrorKind},
};

/// Stores in the order in which they are asked: what the first does not have, or cannot give, the second may. A blob is
/// not found only if none of them has it.
pub struct Chain {
    stores: Vec<Arc<dyn BlobStore>>,
}

impl Chain {
    /// Of these, the first one first; the last one is the one that all the others stand before.
    #[must_use]
    pub fn new(stores: Vec<Arc<dyn BlobStore>>) -> Self {
        Self { stores }
    }

    /// Those that are asked. What turned out to be wrong is asked of the last one alone: it is the one that can be asked
    /// again in another way.
    fn asked(&self, avoid: bool) -> &[Arc<dyn BlobStore>] {
        let first = if avoid {
            self.stores.len().saturating_sub(1)
        } else {
            0
        };
        self.stores.get(first..).unwrap_or_default()
    }
}

/// The most informative error about a blob: "not found" only if no source reports another error.
fn worse(before: Option<RemoteError>, now: RemoteError) -> RemoteError {
    match before {
        Some(before) if now.is_not_found() && !before.is_not_found() => before,
        _ => now,
    }
}

fn nobody(what: &str) -> RemoteError {
    RemoteError::config(what, "no remote cache")
}

impl BlobStore for Chain {
    fn capabilities(&self) -> BoxFuture<'_, Result<Capabilities, RemoteError>> {
        match self.stores.last() {
            Some(last) => last.capabilities(),
            None => futures::future::ready(Err(nobody("the remote cache"))).boxed(),
        }
    }

    fn read_batch<'a>(
        &'a self,
        digests: &'a [Digest],
        attribution: &'a Attribution,
        avoid: bool,
    ) -> BoxFuture<'a, Vec<BatchAnswer>> {
        async move {
            let mut found: HashMap<Digest, Bytes> = HashMap::new();
            let mut errors: HashMap<Digest, RemoteError> = HashMap::new();
            let mut rest = digests.to_vec();
            for store in self.asked(avoid) {
                for (digest, answer) in store.read_batch(&rest, attribution, avoid).await {
                    match answer {
                        Ok(bytes) => {
                            found.insert(digest, bytes);
                        }
                        Err(error) => {
                            let error = worse(errors.remove(&digest), error);
                            errors.insert(digest, error);
                        }
                    }
                }
                rest.retain(|digest| !found.contains_key(digest));
                if rest.is_empty() {
                    break;
                }
            }
            let answer = |digest: &Digest| {
                let answer = match (found.get(digest), errors.get(digest)) {
                    (Some(bytes), _) => Ok(bytes.clone()),
                    (None, Some(error)) => Err(error.clone()),
                    (None, None) => Err(nobody(&digest.to_string())),
                };
                (digest.clone(), answer)
            };
            digests.iter().map(answer).collect()
        }
        .boxed()
    }

    fn read_stream<'a>(
        &'a self,
        digest: &'a Digest,
        offset: u64,
        attribution: &'a Attribution,
        avoid: bool,
        sink: &'a mut dyn Sink,
    ) -> BoxFuture<'a, Result<(), RemoteError>> {
        async move {
            let mut counted = Counted { sink, taken: 0 };
            let mut error = None;
            for store in self.asked(avoid) {
                let from = offset + counted.taken;
                match store
                    .read_stream(digest, from, attribution, avoid, &mut counted)
                    .await
                {
                    Ok(()) => return Ok(()),
                    Err(now) if now.kind == RemoteErrorKind::Sink => return Err(now),
                    Err(now) => error = Some(worse(error, now)),
                }
            }
            Err(error.unwrap_or_else(|| nobody(&digest.to_string())))
        }
        .boxed()
    }

    fn find_missing<'a>(
        &'a self,
        digests: &'a [Digest],
        attribution: &'a Attribution,
    ) -> BoxFuture<'a, Result<Vec<Digest>, RemoteError>> {
        async move {
            let mut rest = digests.to_vec();
            let mut error = None;
            for store in &self.stores {
                if rest.is_empty() {
                    break;
                }
                match store.find_missing(&rest, attribution).await {
                    Ok(missing) => rest = missing,
                    Err(now) => error = Some(now),
                }
            }
            match error {
                // Anyone who did not answer may have what the others have not.
                Some(error) if !rest.is_empty() => Err(error),
                _ => Ok(rest),
            }
        }
        .boxed()
    }

    fn describe(&self) -> String {
        let all: Vec<_> = self.stores.iter().map(|store| store.describe()).collect();
        all.join(", ")
    }
}

/// A sink that knows how much it has been given: the next store goes on from there.
struct Counted<'a> {
    sink: &'a mut dyn Sink,
    taken: u64,
}

impl Sink for Counted<'_> {
    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), String>> {
        self.taken += bytes.len() as u64;
        self.sink.write(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Nowhere, *};
    use crate::{digest::DigestFunction, remote::DiskCache};

    fn digest(text: &str) -> Digest {
        Digest::of(DigestFunction::Sha256, text.as_bytes())
    }

    fn disk(dir: &std::path::Path, texts: &[&str]) -> Arc<dyn BlobStore> {
        for text in texts {
            let hash = digest(text).hash_hex();
            let below = dir.join("cas").join(&hash[..2]);
            std::fs::create_dir_all(&below).unwrap();
            std::fs::write(below.join(hash), text).unwrap();
        }
        Arc::new(DiskCache::open(dir).unwrap())
    }

    #[tokio::test]
    async fn what_one_store_lacks_the_next_one_has_and_the_error_tells_most() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let nobody = Attribution::default();
        let first = disk(a.path(), &["a", "both"]);
        let second = disk(b.path(), &["b", "both"]);
        let asked = [digest("b"), digest("a"), digest("both"), digest("none")];
        let chain = Chain::new(vec![first.clone(), second.clone()]);
        let answers = chain.read_batch(&asked, &nobody, false).await;
        let texts: Vec<_> = answers.iter().map(|(_, answer)| answer.as_deref().ok()).collect();
        assert_eq!(texts, [Some(&b"b"[..]), Some(b"a"), Some(b"both"), None]);
        assert!(answers[3].1.as_ref().unwrap_err().is_not_found());
        assert_eq!(
            chain.find_missing(&asked, &nobody).await.unwrap(),
            [digest("none")]
        );
        // Wrong bytes are asked of the last store again, not of the first.
        let again = chain.read_batch(&asked[1..2], &nobody, true).await;
        assert!(again[0].1.as_ref().unwrap_err().is_not_found());
        // A store that cannot answer may have it: not evicted, in whichever order they are.
        let silent: Arc<dyn BlobStore> = Arc::new(Nowhere("it is away".to_owned()));
        for stores in [vec![first.clone(), silent.clone()], vec![silent, first]] {
            let chain = Chain::new(stores);
            let answers = chain.read_batch(&asked[..2], &nobody, false).await;
            assert_eq!(answers[0].1.as_ref().unwrap_err().kind, RemoteErrorKind::Config);
            assert_eq!(answers[1].1.as_deref().unwrap(), b"a");
            assert!(chain.find_missing(&asked, &nobody).await.is_err());
        }
    }
}
