//! Where the bytes come from, and what is reported where they do not come.

use super::*;

#[tokio::test]
async fn what_keeps_all_optional_archives_away_is_reported_for_each() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("to");
    let destination = Reach::Anywhere.open(&to, None, true).unwrap().unwrap();
    let optional = |name| Artifact {
        class: Class::Optional,
        ..artifact(name, blob(b"1"))
    };
    let store: Arc<dyn BlobStore> = Arc::new(Nowhere("there is no cache".to_owned()));
    let mut gather = Gather::default();
    gather.take_archives(&mut vec![optional("a.tar"), optional("b.tar")], &store);
    // Nothing can be written: another directory is in its place.
    std::fs::rename(&to, dir.path().join("moved")).unwrap();
    std::fs::create_dir(&to).unwrap();
    let together = Directories::default().at(&to);
    let brought = gather.bring(Class::Optional, &destination, &together).await;
    assert!(brought.is_err() && !gather.is_open());
    let (mut marker, mut open) = (Marker::new("inv", "/w", &Wish::default()), HashSet::new());
    gather.note(&mut marker, &mut open);
    let missing: Vec<_> = marker.missing.iter().map(|one| one.path.as_str()).collect();
    assert_eq!((missing, open.len()), (vec!["a.tar", "b.tar"], 0));
    for one in marker.missing {
        assert!(
            one.error.contains("replaced by another directory"),
            "{}",
            one.error
        );
    }
}

/// A cache that has one blob, and notes what it was asked for.
#[derive(Default)]
struct Cache {
    blobs: HashMap<Digest, Bytes>,
    asked: Mutex<Vec<Digest>>,
}

#[async_trait]
impl BlobStore for Cache {
    async fn capabilities(&self) -> Result<Capabilities, RemoteError> {
        Err(RemoteError::new(RemoteErrorKind::Config, "", ""))
    }

    async fn read_batch(&self, digests: &[Digest], _: &Attribution, _: bool) -> Vec<BatchAnswer> {
        self.asked.lock().unwrap().extend_from_slice(digests);
        let missing = || RemoteError::new(RemoteErrorKind::NotFound, "", "");
        let answers = digests
            .iter()
            .map(|d| (d.clone(), self.blobs.get(d).cloned().ok_or_else(missing)));
        answers.collect()
    }

    async fn read_stream(
        &self,
        digest: &Digest,
        offset: u64,
        _: &Attribution,
        _: bool,
        sink: &mut dyn Sink,
    ) -> Result<(), RemoteError> {
        self.asked.lock().unwrap().push(digest.clone());
        sink.write(self.blobs[digest].slice(offset as usize..))
            .await
            .unwrap();
        Ok(())
    }

    async fn find_missing(&self, _: &[Digest], _: &Attribution) -> Result<Vec<Digest>, RemoteError> {
        Ok(Vec::new())
    }

    fn describe(&self) -> String {
        String::new()
    }
}

#[derive(Default)]
struct Gathered(Vec<u8>);

#[async_trait]
impl Sink for Gathered {
    async fn write(&mut self, bytes: Bytes) -> std::io::Result<()> {
        self.0.extend_from_slice(&bytes);
        Ok(())
    }
}

#[tokio::test]
async fn the_output_trees_copy_is_read_unless_there_is_any_doubt() {
    use std::os::unix::fs::MetadataExt as _;
    let dir = tempfile::tempdir().unwrap();
    let bytes = vec![7; 3 << 20];
    let digest = Digest::of(DigestFunction::Sha256, &bytes);
    std::fs::write(dir.path().join("f"), &bytes).unwrap();
    let stamp = || {
        let seen = std::fs::metadata(dir.path().join("f")).unwrap();
        Stamp {
            size: seen.len(),
            mtime_ns: seen.mtime() * 1_000_000_000 + seen.mtime_nsec(),
            inode: seen.ino(),
            device: seen.dev(),
            ..Stamp::default()
        }
    };
    let cache = Arc::new(Cache {
        blobs: HashMap::from([(digest.clone(), Bytes::from(bytes.clone()))]),
        ..Cache::default()
    });
    let nobody = Attribution::default();
    let copy = Copy {
        root: dir.path().into(),
        path: ExecPath::new("f").unwrap(),
        stamp: stamp(),
    };
    let store = LocalFirst::new(HashMap::from([(digest.clone(), copy.clone())]), cache.clone());
    let list = [digest.clone()];
    // Both ways; then with doubts; then when the file has changed.
    let local = [(false, true), (true, false), (false, false)];
    for (n, (avoid, served)) in local.into_iter().enumerate() {
        if n == 2 {
            std::fs::write(dir.path().join("f"), &bytes[1..]).unwrap();
            assert!(!looks_right(&copy, digest.size()));
        }
        cache.asked.lock().unwrap().clear();
        let answers = store.read_batch(&list, &nobody, avoid).await;
        assert_eq!(answers[0].1.as_ref().unwrap().len(), bytes.len());
        assert_eq!(store.served(&digest), served, "batch {n}");
        let mut sink = Gathered::default();
        store
            .read_stream(&digest, 0, &nobody, avoid, &mut sink)
            .await
            .unwrap();
        assert!(sink.0 == bytes);
        assert_eq!(store.served(&digest), served, "stream {n}");
        assert_eq!(cache.asked.lock().unwrap().is_empty(), served, "cache {n}");
    }
}
