use std::{
    collections::VecDeque,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use bazel_remote_apis::build::bazel::remote::execution::v2::ActionResult;

use super::*;
use crate::{
    digest::DigestFunction,
    remote::reading::{Collect, read_blob},
};

/// What a store does when it is asked.
#[derive(Clone, Copy, PartialEq)]
enum Act {
    /// Gives what it has.
    Well,
    /// Gives other bytes of the same length.
    Wrong,
    /// The same, but the right ones when it is asked with `avoid`.
    WrongOnce,
    /// Half of a stream comes, and then it fails.
    Breaks,
    /// Half of a stream is wrong, and then it cannot be used; all is right when it is asked with `avoid`.
    UnusableOnce,
    /// The same, always.
    Unusable,
    Fails(RemoteErrorKind),
}

/// A store by the book of a test.
struct Scripted {
    name: &'static str,
    has: Vec<&'static str>,
    act: Mutex<Act>,
    /// Blobs that it was asked for, and whether with `avoid`.
    asked: Mutex<VecDeque<(String, bool)>>,
    requests: AtomicUsize,
    has_result: AtomicBool,
}

fn digest(text: &str) -> Digest {
    Digest::of(DigestFunction::Sha256, text.as_bytes())
}

fn store(name: &'static str, has: &[&'static str], act: Act) -> Arc<Scripted> {
    Arc::new(Scripted {
        name,
        has: has.to_vec(),
        act: Mutex::new(act),
        asked: Mutex::default(),
        requests: AtomicUsize::new(0),
        has_result: AtomicBool::new(false),
    })
}

fn chain(stores: &[&Arc<Scripted>]) -> Chain {
    let stores = stores
        .iter()
        .map(|store| Arc::clone(store) as Arc<dyn ActionStore>);
    Chain::new(stores.collect())
}

impl Scripted {
    fn set(&self, act: Act) {
        *self.act.lock() = act;
    }

    /// How often it was asked for anything since the last time.
    fn requests(&self) -> usize {
        self.requests.swap(0, Ordering::Relaxed)
    }

    fn asked(&self) -> Vec<(String, bool)> {
        self.asked.lock().drain(..).collect()
    }

    fn begin(&self) -> Result<Act, RemoteError> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        match *self.act.lock() {
            Act::Fails(kind) => Err(RemoteError::new(kind, self.name, format!("{} fails", self.name))),
            act => Ok(act),
        }
    }

    fn bytes(&self, wanted: &Digest, avoid: bool) -> Result<Vec<u8>, RemoteError> {
        let act = *self.act.lock();
        let Some(text) = self.has.iter().find(|text| digest(text) == *wanted) else {
            let message = format!("{} has it not", self.name);
            return Err(RemoteError::new(RemoteErrorKind::NotFound, self.name, message));
        };
        self.asked.lock().push_back(((*text).to_owned(), avoid));
        let is_wrong = act == Act::Wrong || act == Act::WrongOnce && !avoid;
        Ok(if is_wrong {
            vec![b'!'; text.len()]
        } else {
            text.as_bytes().to_vec()
        })
    }
}

#[async_trait]
impl BlobStore for Scripted {
    async fn capabilities(&self) -> Result<Capabilities, RemoteError> {
        self.begin().map(|_| Capabilities::plain(6))
    }

    async fn read_batch(&self, digests: &[Digest], _: &Attribution, avoid: bool) -> Vec<BatchAnswer> {
        let begun = self.begin();
        let answer = |digest: &Digest| {
            let bytes = begun.clone().and_then(|_| self.bytes(digest, avoid));
            (digest.clone(), bytes.map(Bytes::from))
        };
        digests.iter().map(answer).collect()
    }

    async fn read_stream(
        &self,
        digest: &Digest,
        offset: u64,
        _: &Attribution,
        avoid: bool,
        sink: &mut dyn Sink,
    ) -> Result<(), RemoteError> {
        let act = self.begin()?;
        let bytes = self.bytes(digest, avoid)?;
        let rest = Bytes::from(bytes).slice(offset as usize..);
        let broken = RemoteError::new(RemoteErrorKind::Unavailable, self.name, "broke");
        if act == Act::Breaks {
            sink.write(rest.slice(..rest.len() / 2)).await.unwrap();
            return Err(broken);
        }
        if act == Act::Unusable || act == Act::UnusableOnce && !avoid {
            sink.write(vec![b'!'; rest.len() / 2].into()).await.unwrap();
            return Err(RemoteError::protocol(self.name, "not the blob"));
        }
        let sink_error = |e| RemoteError::new(RemoteErrorKind::Sink, self.name, e);
        sink.write(rest).await.map_err(sink_error)
    }

    async fn find_missing(&self, digests: &[Digest], _: &Attribution) -> Result<Vec<Digest>, RemoteError> {
        self.begin().map(|_| {
            let asked = digests.iter().map(|d| (d.to_string(), false));
            self.asked.lock().extend(asked);
            let is_missing = |d: &&Digest| !self.has.iter().any(|text| digest(text) == **d);
            digests.iter().filter(is_missing).cloned().collect()
        })
    }

    fn describe(&self) -> String {
        self.name.to_owned()
    }
}

#[async_trait]
impl ActionStore for Scripted {
    async fn action_result(
        &self,
        _: &Digest,
        _: &Attribution,
    ) -> Result<Option<Arc<ActionResult>>, RemoteError> {
        let result = ActionResult {
            stdout_raw: self.name.as_bytes().to_vec(),
            ..ActionResult::default()
        };
        let has_result = self.has_result.load(Ordering::Relaxed);
        self.begin().map(|_| has_result.then(|| Arc::new(result)))
    }

    async fn blob_size(&self, _: DigestFunction, hash: &[u8]) -> Result<Option<u64>, RemoteError> {
        let found = self.has.iter().find(|text| digest(text).hash() == hash);
        self.begin().map(|_| found.map(|text| text.len() as u64))
    }

    async fn probe(&self) -> Result<(), RemoteError> {
        self.begin().map(drop)
    }
}

async fn read(chain: &Chain, text: &str) -> Result<Bytes, RemoteError> {
    let asked = [digest(text)];
    let mut answers = chain.read_batch(&asked, &Attribution::default(), false).await;
    assert_eq!(answers.len(), 1);
    answers.pop().unwrap().1
}

fn origin(chain: &Chain, text: &str) -> Option<String> {
    chain.origin(&digest(text)).map(|name| name.to_string())
}

#[tokio::test]
async fn what_one_store_lacks_is_asked_of_the_next_one_at_once_and_it_is_named() {
    let first = store("first", &["a", "both"], Act::Well);
    let second = store("second", &["b", "both"], Act::Well);
    let chain = chain(&[&first, &second]);
    let asked = ["b", "a", "both", "", "none", "a"].map(digest);
    let answers = chain.read_batch(&asked, &Attribution::default(), false).await;
    let texts: Vec<_> = answers.iter().map(|(_, answer)| answer.as_deref().ok()).collect();
    let expected = [
        Some(&b"b"[..]),
        Some(b"a"),
        Some(b"both"),
        Some(b""),
        None,
        Some(b"a"),
    ];
    assert_eq!(texts, expected);
    assert_eq!(
        (first.requests(), second.requests()),
        (1, 1),
        "small blobs stay together"
    );
    assert_eq!(second.asked(), [("b".to_owned(), false)]);
    for (text, name) in [
        ("a", Some("first")),
        ("both", Some("first")),
        ("b", Some("second")),
        ("none", None),
    ] {
        assert_eq!(origin(&chain, text).as_deref(), name, "{text}");
    }
    let error = answers[4].1.as_ref().unwrap_err();
    assert!(error.is_not_found());
    assert!(error.message.contains("first has it not") && error.message.contains("second has it not"));
    let missing = chain
        .find_missing(&asked[..5], &Attribution::default())
        .await
        .unwrap();
    assert_eq!(missing, ["", "none"].map(digest));
    assert_eq!(second.asked().len(), 3, "only for what is still missing");
}

#[tokio::test]
async fn nothing_is_evicted_as_long_as_one_store_may_have_it() {
    use RemoteErrorKind as Kind;
    for (of_first, of_second, reported) in [
        (Act::Well, Act::Well, Kind::NotFound),
        (Act::Fails(Kind::Unavailable), Act::Well, Kind::Unavailable),
        (Act::Well, Act::Fails(Kind::Timeout), Kind::Timeout),
        (
            Act::Fails(Kind::Denied),
            Act::Fails(Kind::Unavailable),
            Kind::Unavailable,
        ),
        (Act::Fails(Kind::Config), Act::Fails(Kind::Denied), Kind::Denied),
        (Act::Fails(Kind::Config), Act::Well, Kind::Config),
    ] {
        let (first, second) = (store("first", &[], of_first), store("second", &[], of_second));
        let chain = chain(&[&first, &second]);
        let mut sink = Collect::default();
        let blob = digest("x");
        let streamed = chain
            .read_stream(&blob, 0, &Attribution::default(), false, &mut sink)
            .await;
        for error in [read(&chain, "x").await.unwrap_err(), streamed.unwrap_err()] {
            assert_eq!(error.kind, reported);
            assert!(
                error.message.contains("first") && error.message.contains("second"),
                "{error}"
            );
        }
        let missing = chain
            .find_missing(std::slice::from_ref(&blob), &Attribution::default())
            .await;
        assert_eq!(missing.is_ok(), reported == Kind::NotFound);
        assert_eq!(origin(&chain, "x"), None);
    }
}

#[tokio::test(start_paused = true)]
async fn a_dead_store_is_passed_over_for_a_while_and_comes_back() {
    let down = Act::Fails(RemoteErrorKind::Unavailable);
    let first = store("first", &["a"], down);
    let second = store("second", &["a"], Act::Well);
    let chain = chain(&[&first, &second]);
    for _ in 0..10 {
        assert_eq!(read(&chain, "a").await.unwrap()[..], b"a"[..]);
        assert_eq!(origin(&chain, "a").as_deref(), Some("second"));
    }
    assert_eq!(first.requests(), 3);
    tokio::time::advance(Duration::from_secs(30)).await;
    for _ in 0..10 {
        read(&chain, "a").await.unwrap();
    }
    assert_eq!(first.requests(), 1, "one probe");
    let absent = read(&chain, "x").await.unwrap_err();
    assert_eq!(absent.kind, RemoteErrorKind::Unavailable, "it may have it");
    assert!(absent.message.contains("not asked after 3 failures"), "{absent}");
    first.set(Act::Well);
    tokio::time::advance(Duration::from_secs(60)).await;
    read(&chain, "a").await.unwrap();
    assert_eq!(origin(&chain, "a").as_deref(), Some("first"));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_keeps_us_out_is_asked_from_time_to_time() {
    for kind in [
        RemoteErrorKind::Denied,
        RemoteErrorKind::Unauthenticated,
        RemoteErrorKind::Config,
    ] {
        let first = store("first", &["a"], Act::Fails(kind));
        let second = store("second", &["a"], Act::Well);
        let chain = chain(&[&first, &second]);
        for _ in 0..5 {
            read(&chain, "a").await.unwrap();
            read(&chain, "a").await.unwrap();
            tokio::time::advance(Duration::from_secs(3600)).await;
        }
        assert_eq!(first.requests(), 5);
    }
}

#[tokio::test]
async fn wrong_bytes_are_asked_for_once_more_and_then_of_the_next_store() {
    // `read_blob` asks as the materializer does: it verifies, and says the store.
    let long = "longer than a batch";
    for text in ["a", long] {
        let first = store("first", &["a", long], Act::Wrong);
        let second = store("second", &["a", long], Act::Well);
        let chain = chain(&[&first, &second]);
        let nobody = Attribution::default();
        assert_eq!(read_blob(&chain, &digest(text), &nobody).await.unwrap(), text);
        assert_eq!(origin(&chain, text).as_deref(), Some("second"));
        let both = [(text.to_owned(), false), (text.to_owned(), true)];
        assert_eq!(first.asked(), both, "the second time on another connection");
        // Not asked again for that one, but for others.
        assert_eq!(read_blob(&chain, &digest(text), &nobody).await.unwrap(), text);
        assert_eq!(first.asked(), []);
        first.set(Act::Well);
        let other = if text == "a" { long } else { "a" };
        read_blob(&chain, &digest(other), &nobody).await.unwrap();
        assert_eq!(origin(&chain, other).as_deref(), Some("first"));
    }
}

#[tokio::test]
async fn right_bytes_at_the_second_try_are_the_same_stores() {
    let first = store("first", &["a"], Act::WrongOnce);
    let second = store("second", &["a"], Act::Well);
    let chain = chain(&[&first, &second]);
    read_blob(&chain, &digest("a"), &Attribution::default())
        .await
        .unwrap();
    assert_eq!(origin(&chain, "a").as_deref(), Some("first"));
    assert_eq!(second.asked(), []);
}

#[tokio::test]
async fn where_all_are_wrong_it_ends_with_an_error() {
    let stores = [(); 3].map(|()| store("liar", &["a"], Act::Wrong));
    let chain = chain(&stores.iter().collect::<Vec<_>>());
    let error = read_blob(&chain, &digest("a"), &Attribution::default())
        .await
        .unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Protocol);
    for store in stores {
        assert_eq!(store.asked().len(), 2);
    }
}

#[tokio::test]
async fn unusable_answers_are_asked_for_once_more_and_then_of_the_next_store() {
    let first = store("first", &["a"], Act::Fails(RemoteErrorKind::Protocol));
    let second = store("second", &["a"], Act::Well);
    for streams in [false, true] {
        let chain = chain(&[&first, &second]);
        for requests in [2, 0] {
            let mut sink = Collect::default();
            if streams {
                let nobody = Attribution::default();
                let blob = digest("a");
                chain
                    .read_stream(&blob, 0, &nobody, false, &mut sink)
                    .await
                    .unwrap();
                assert_eq!(sink.into_bytes(), &b"a"[..]);
            } else {
                read(&chain, "a").await.unwrap();
            }
            assert_eq!(first.requests(), requests, "streams: {streams}");
        }
    }
}

#[tokio::test]
async fn nothing_goes_on_after_bytes_that_may_be_wrong() {
    let text = "longer than a batch";
    let nobody = Attribution::default();
    for (act, origin_of, asked) in [
        (Act::UnusableOnce, "second", &[false, true][..]),
        (Act::Unusable, "third", &[false, true]),
    ] {
        let first = store("first", &[], Act::Well);
        let second = store("second", &[text], act);
        let third = store("third", &[text], Act::Well);
        let chain = chain(&[&first, &second, &third]);
        assert_eq!(read_blob(&chain, &digest(text), &nobody).await.unwrap(), text);
        assert_eq!(origin(&chain, text).as_deref(), Some(origin_of));
        let avoided: Vec<_> = second.asked().into_iter().map(|(_, avoid)| avoid).collect();
        assert_eq!(avoided, asked);
    }
}

#[tokio::test]
async fn a_blob_that_no_store_gives_whole_is_not_asked_for_again_and_again() {
    let long = "longer than a batch";
    for act in [Act::Unusable, Act::Wrong] {
        let first = store("first", &[long], act);
        let second = store("second", &[], Act::Well);
        let chain = chain(&[&first, &second]);
        let nobody = Attribution::default();
        let wanted = digest(long);
        let read = read_blob(&chain, &wanted, &nobody);
        let error = tokio::time::timeout(Duration::from_secs(60), read).await;
        error.expect("in time").unwrap_err();
        assert_eq!(first.asked().len(), 2);
    }
}

#[tokio::test]
async fn a_stream_that_breaks_is_gone_on_with_by_the_next_store() {
    let first = store("first", &["abcdefgh"], Act::Breaks);
    let second = store("second", &["abcdefgh"], Act::Well);
    let chain = chain(&[&first, &second]);
    let mut sink = Collect::default();
    let blob = digest("abcdefgh");
    chain
        .read_stream(&blob, 2, &Attribution::default(), false, &mut sink)
        .await
        .unwrap();
    assert_eq!(sink.into_bytes(), &b"cdefgh"[..]);
    assert_eq!(origin(&chain, "abcdefgh").as_deref(), Some("second"));
    // Both are doubted if the whole is wrong.
    assert!(chain.distrust(&blob) && chain.distrust(&blob));
    first.set(Act::Well);
    let mut sink = Collect::default();
    chain
        .read_stream(&blob, 0, &Attribution::default(), false, &mut sink)
        .await
        .unwrap();
    assert_eq!(first.asked().last().unwrap(), &("abcdefgh".to_owned(), true));
}

#[tokio::test]
async fn results_and_sizes_come_from_the_first_store_that_has_them() {
    let first = store("first", &[], Act::Well);
    let second = store("second", &["a"], Act::Well);
    let chain = chain(&[&first, &second]);
    let nobody = Attribution::default();
    let action = digest("action");
    assert_eq!(chain.action_result(&action, &nobody).await.unwrap(), None);
    for has in [&second, &first] {
        has.has_result.store(true, Ordering::Relaxed);
        let result = chain.action_result(&action, &nobody).await.unwrap().unwrap();
        assert_eq!(result.stdout_raw, has.name.as_bytes());
    }
    let size = |text: &str| {
        let blob = digest(text);
        let chain = &chain;
        async move { chain.blob_size(blob.function(), blob.hash()).await }
    };
    assert_eq!(size("a").await.unwrap(), Some(1));
    assert_eq!(size("x").await.unwrap(), None);
    chain.probe().await.unwrap();
    first.set(Act::Fails(RemoteErrorKind::Unavailable));
    assert_eq!(size("a").await.unwrap(), Some(1));
    assert!(size("x").await.is_err());
    assert!(chain.action_result(&digest("other"), &nobody).await.is_ok());
    second.has_result.store(false, Ordering::Relaxed);
    assert!(chain.action_result(&action, &nobody).await.is_err());
    assert!(chain.probe().await.is_err());
}
