//! How the coordinator treats invalid answers, and bugs that others had there.

use std::os::unix::fs::MetadataExt as _;

use async_trait::async_trait;

use super::*;
use crate::{
    remote::{BatchAnswer, BlobStore, Capabilities, Sink},
    transport::RemoteError,
};

#[tokio::test]
async fn an_unusable_answer_is_asked_for_once_more_and_no_oftener() {
    for (size, fault) in [
        (10, BlobFault::DropFromBatch),
        (10, BlobFault::Resize(-1)),
        (10, BlobFault::Resize(1)),
        (10, BlobFault::Twice { wrong_first: true }),
        (10, BlobFault::CorruptAt(9)),
        (3 << 20, BlobFault::Resize(1)),
        (3 << 20, BlobFault::CorruptAt(1 << 19)),
    ] {
        let f = Fixture::new().await;
        let once = f.cache.store().put(vec![1; size]);
        let always = f.cache.store().put(vec![2; size]);
        f.cache.faults().blob(&once, fault, Times::Once);
        f.cache.faults().blob(&always, fault, Times::Always);
        let mut asker = f.asker(1);
        f.want(&asker, Class::Required, &[("always", &always), ("once", &once)])
            .await;
        let ends = asker.ends(2).await;
        assert!(
            matches!(&ends[0].1, Outcome::Failed(reason) | Outcome::Unavailable(reason) if !reason.is_empty()),
            "{size} {fault:?}: {ends:?}"
        );
        assert!(
            matches!(ends[1].1, Outcome::Downloaded { .. }),
            "{size} {fault:?}: {ends:?}"
        );
        assert!(!f.path("always").exists());
        assert_eq!(fs::read(f.path("once")).unwrap(), vec![1; size]);
        let asked = f.cache.stats();
        assert_eq!(asked.batch_read_blobs + asked.stream_reads, 4, "{fault:?}");
    }
}

/// A store that breaks its word.
#[derive(Clone, Copy)]
enum Broken {
    Panics,
    SaysNothing,
    AnswersOthers,
    /// Gives wrong bytes, and says each time that the next ones may be right.
    Hopes,
}

#[async_trait]
impl BlobStore for Broken {
    async fn capabilities(&self) -> Result<Capabilities, RemoteError> {
        panic!("not requested")
    }

    async fn read_batch(&self, digests: &[Digest], _: &Attribution, _: bool) -> Vec<BatchAnswer> {
        match self {
            Self::Panics => panic!("a bug"),
            Self::SaysNothing => Vec::new(),
            Self::Hopes => {
                let wrong = |d: &Digest| (d.clone(), Ok(vec![b'!'; d.size() as usize].into()));
                digests.iter().map(wrong).collect()
            }
            Self::AnswersOthers => {
                let other = |digest: &Digest| Digest::of(digest.function(), digest.hash());
                let answers = digests.iter().map(|d| (other(d), Ok("bytes".into())));
                answers.collect()
            }
        }
    }

    async fn read_stream(
        &self,
        _: &Digest,
        _: u64,
        _: &Attribution,
        _: bool,
        _: &mut dyn Sink,
    ) -> Result<(), RemoteError> {
        match self {
            Self::Panics => panic!("a bug"),
            // All is well, it says, and has sent nothing.
            Self::SaysNothing | Self::AnswersOthers | Self::Hopes => Ok(()),
        }
    }

    async fn find_missing(&self, _: &[Digest], _: &Attribution) -> Result<Vec<Digest>, RemoteError> {
        panic!("not requested")
    }

    fn describe(&self) -> String {
        "broken".to_owned()
    }

    fn distrust(&self, _: &Digest) -> bool {
        matches!(self, Self::Hopes)
    }
}

#[tokio::test]
async fn every_asker_is_answered_whatever_the_store_does() {
    for store in [
        Broken::Panics,
        Broken::SaysNothing,
        Broken::AnswersOthers,
        Broken::Hopes,
    ] {
        let f = Fixture::new().await;
        let (sender, completions) = mpsc::unbounded_channel();
        let session = Arc::new(Session {
            root: f.root.clone(),
            version: 1,
            store: Arc::new(store),
            attribution: Arc::new(Attribution::default()),
            trace: None,
            served: None,
            completions: sender,
        });
        let mut asker = Asker { session, completions };
        let small = Digest::of(crate::digest::DigestFunction::Sha256, b"small");
        let large = Digest::of(crate::digest::DigestFunction::Sha256, &vec![1; 3 << 20]);
        let wants = [("a", &small), ("b", &small), ("c", &large), ("d", &large)];
        f.want(&asker, Class::Required, &wants).await;
        for (path, outcome) in asker.ends(4).await {
            assert!(
                matches!(&outcome, Outcome::Failed(reason) | Outcome::Unavailable(reason) if !reason.is_empty()),
                "{path}: {outcome:?}"
            );
        }
        assert_eq!(fs::read_dir(f.path("")).unwrap().count(), 0, "nothing is left");
    }
}

#[tokio::test]
async fn a_blob_evicted_before_it_is_read_is_reported_and_asked_for_again_when_wanted_again() {
    for size in [10, 3 << 20] {
        let f = Fixture::new().await;
        let digest = f.cache.store().put(vec![1; size]);
        f.cache.faults().blob(&digest, BlobFault::Evict, Times::Once);
        let mut asker = f.asker(1);
        f.want(&asker, Class::Required, &[("x", &digest)]).await;
        assert!(matches!(asker.end().await, Outcome::Evicted(reason) if reason.contains(&digest.hash_hex())));
        assert!(!f.path("x").exists());
        // Uploaded again: that it was missing is not a fact to be remembered.
        f.cache.store().put(vec![1; size]);
        f.want(&asker, Class::Required, &[("x", &digest)]).await;
        assert!(matches!(asker.end().await, Outcome::Downloaded { .. }));
    }
}

#[tokio::test]
async fn outputs_of_one_blob_share_nothing_that_a_user_could_change() {
    for size in [10, 300 << 10, 3 << 20] {
        let f = Fixture::new().await;
        let digest = f.cache.store().put(vec![1; size]);
        let mut asker = f.asker(1);
        f.want(
            &asker,
            Class::Required,
            &[("a/run", &digest), ("b/data", &digest)],
        )
        .await;
        asker.ends(2).await;
        let [one, other] = ["a/run", "b/data"].map(|name| fs::metadata(f.path(name)).unwrap());
        // Taking the right to execute from one leaves the other as it is.
        assert_ne!(one.ino(), other.ino());
        for found in [one, other] {
            assert_eq!((found.mode() & 0o7777, found.nlink()), (0o555, 1));
        }
    }
}
