//! Wants that are ended, or overtaken, while their places on disk are being looked at.

use super::*;

/// So long takes a look at this much that a test comes before its end.
const MUCH: u64 = 512 << 20;

/// A coordinator whose only writer is busy with the first want of `asker` for a good while.
async fn busy(asker: &Asker, f: &Fixture) {
    let file = fs::File::create(f.path("much")).unwrap();
    file.set_len(MUCH).unwrap();
    let other = Digest::new(crate::digest::DigestFunction::Sha256, &[7; 32], MUCH).unwrap();
    f.want(asker, Class::Required, &[("much", &other)]).await;
}

async fn one_writer() -> Fixture {
    Fixture::with(MaterializeOptions {
        writers: 1,
        ..MaterializeOptions::default()
    })
    .await
}

/// Waits until the writer is through, with an asker of its own.
async fn through(f: &Fixture, version: u64) {
    let digest = f.cache.store().put("through");
    let mut asker = f.asker(version);
    f.want(&asker, Class::Required, &[("through", &digest)]).await;
    assert!(asker.end().await.is_on_disk());
}

#[tokio::test]
async fn a_newer_version_ends_what_is_being_looked_for() {
    let f = one_writer().await;
    let digest = f.cache.store().put("bytes");
    fs::write(f.path("there"), "bytes").unwrap();
    let mut old = f.asker(1);
    busy(&old, &f).await;
    f.want(&old, Class::Required, &[("there", &digest), ("x", &digest)])
        .await;
    f.materializer.begin(&f.root, 2).await;
    // All answers are there when it returns.
    let mut ends = Vec::new();
    while let Ok(list) = old.completions.try_recv() {
        ends.extend(list.into_iter().map(|c| c.outcome));
    }
    assert_eq!(ends, vec![Outcome::Superseded; 3]);
    through(&f, 2).await;
    assert!(old.completions.try_recv().is_err(), "each is answered once");
    assert!(!f.path("x").exists());
}

#[tokio::test]
async fn giving_up_ends_what_is_being_looked_for_and_nothing_else() {
    let f = one_writer().await;
    let digest = f.cache.store().put("bytes");
    let (mut gone, mut stays) = (f.asker(1), f.asker(1));
    busy(&gone, &f).await;
    f.want(&gone, Class::Required, &[("x", &digest)]).await;
    f.want(&stays, Class::Required, &[("x", &digest)]).await;
    f.materializer.cancel(&gone.session).await;
    for (path, end) in gone.ends(2).await {
        assert!(matches!(end, Outcome::Failed(_)), "{path}: {end:?}");
    }
    assert!(is_from(&stays.end().await, Source::Batch));
    through(&f, 1).await;
    assert!(gone.completions.try_recv().is_err(), "each is answered once");
}

#[tokio::test]
async fn the_later_of_two_wants_of_a_path_counts_though_both_are_being_looked_for() {
    let f = one_writer().await;
    let (first, second) = (f.cache.store().put("first"), f.cache.store().put("second"));
    for is_there in [false, true] {
        if is_there {
            fs::write(f.path("x"), "second").unwrap();
        }
        let (mut blocked, mut asker) = (f.asker(1), f.asker(1));
        busy(&blocked, &f).await;
        f.want(&asker, Class::Required, &[("x", &first)]).await;
        f.want(&asker, Class::Required, &[("x", &second)]).await;
        let mut ends = Vec::new();
        while ends.len() < 2 {
            let list = timeout(Duration::from_secs(120), asker.completions.recv()).await;
            ends.extend(list.unwrap().unwrap().into_iter().map(|c| (c.content, c.outcome)));
        }
        for (content, outcome) in ends {
            let is_later = content == OutputContent::Blob(second.clone());
            assert_eq!(outcome.is_on_disk(), is_later, "{content:?}: {outcome:?}");
        }
        assert_eq!(fs::read(f.path("x")).unwrap(), b"second", "{is_there}");
        blocked.end().await;
        fs::remove_file(f.path("x")).unwrap();
    }
}
