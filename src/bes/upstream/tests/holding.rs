//! Completions go upstream when they are true.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use outhaul_testkit::PATIENCE;

use super::{
    fake::{Fake, Plan},
    requests::{self, last, with_event, with_id},
    rig::{Rig, options, stream},
};
use crate::{
    bes::{HoldMode, HoldPolicy},
    builds::Progress,
    proto::build_event_stream::{
        BuildEvent, BuildEventId, File, NamedSetOfFiles,
        build_event::Payload,
        build_event_id::{Id, NamedSetOfFilesId},
        file,
    },
};

/// A fake that notes how far the engine was when each event came.
fn watching(fake: &Fake, rig: &Rig) -> Arc<Mutex<Vec<(i64, i64)>>> {
    let came = Arc::<Mutex<Vec<(i64, i64)>>>::default();
    let (noted, engine) = (Arc::clone(&came), Arc::clone(&rig.engine));
    *fake.0.hook.lock().unwrap() = Some(Box::new(move |sequence| {
        let through = engine.progress.borrow().through;
        noted.lock().unwrap().push((sequence, through));
    }));
    came
}

fn progress(through: i64, failed_at: Option<i64>) -> Progress {
    Progress {
        open: None,
        through,
        failed_at,
        messages: vec!["bazel-out/x: evicted".to_owned()],
    }
}

#[tokio::test]
async fn completions_wait_for_their_outputs_and_what_is_before_them_does_not() {
    let fake = Fake::new([], Plan::Good);
    let address = fake.serve("127.0.0.1:0".parse().unwrap()).await;
    let mut rig = Rig::with(options(address), HoldMode::Target, false, 0);
    let came = watching(&fake, &rig);
    // Every third event is a completion.
    rig.send(&stream(9));
    rig.finish();
    for held in [3, 6, 9] {
        rig.until("flushed", |status| status.acked == held - 1).await;
        assert_eq!(fake.numbers().len() as i64, held - 1);
        rig.engine.progress.send_replace(progress(held, None));
    }
    rig.until_finished().await;
    for (sequence, through) in came.lock().unwrap().iter() {
        assert!(
            sequence % 3 != 0 || through >= sequence,
            "{sequence} at {through}"
        );
    }
    assert_eq!(fake.numbers(), (1..=10).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_hold_ends_at_its_timeout() {
    let fake = Fake::new([], Plan::Good);
    let address = fake.serve("127.0.0.1:0".parse().unwrap()).await;
    let hold = HoldPolicy {
        mode: HoldMode::Target,
        timeout: Duration::from_millis(20),
        strict: false,
        is_followed: false,
    };
    let mut rig = Rig::under(options(address), hold, 0);
    rig.send(&stream(9));
    rig.finish();
    rig.until_finished().await;
    assert_eq!(rig.status.borrow().acked, 10);
}

#[tokio::test]
async fn no_time_runs_while_the_build_has_not_said_what_an_event_calls_for() {
    let fake = Fake::new([], Plan::Good);
    let address = fake.serve("127.0.0.1:0".parse().unwrap()).await;
    let timeout = Duration::from_millis(20);
    let hold = HoldPolicy {
        mode: HoldMode::Target,
        timeout,
        strict: true,
        is_followed: false,
    };
    let mut rig = Rig::under(options(address), hold, 0);
    let reported = |open, through| Progress {
        open,
        through,
        ..Progress::default()
    };
    // As a test's result before its summary.
    rig.engine.progress.send_replace(reported(Some(1), 0));
    rig.send(&stream(9));
    rig.finish();
    tokio::time::sleep(timeout * 10).await;
    assert!(!rig.status.borrow().finished, "strict would have cut it short");
    rig.engine.progress.send_replace(reported(None, 9));
    rig.until_finished().await;
    assert_eq!(rig.status.borrow().acked, 10);
}

#[tokio::test]
async fn a_failed_completion_is_forwarded_unless_strict() {
    for strict in [false, true] {
        let fake = Fake::new([], Plan::Good);
        let address = fake.serve("127.0.0.1:0".parse().unwrap()).await;
        let mut rig = Rig::with(options(address), HoldMode::Target, strict, 0);
        rig.engine.progress.send_replace(progress(9, Some(6)));
        rig.send(&stream(9));
        rig.finish();
        rig.until_finished().await;
        if strict {
            assert_eq!(rig.status.borrow().acked, 5);
            assert_eq!(fake.numbers(), [1, 2, 3, 4, 5]);
            fake.until("cancelled", |seen| seen[0].end == Some(false)).await;
        } else {
            assert_eq!(rig.status.borrow().acked, 10);
        }
    }
}

#[tokio::test]
async fn at_a_shutdown_nothing_held_is_let_go() {
    let fake = Fake::new([], Plan::Good);
    let address = fake.serve("127.0.0.1:0".parse().unwrap()).await;
    let mut rig = Rig::with(options(address), HoldMode::Target, false, 0);
    rig.send(&[with_id(1, 2), with_id(2, 5), last(3)]);
    rig.until("flushed", |status| status.acked == 1).await;
    rig.around.shutdown.cancel();
    // The engine's last word, which must not be believed.
    rig.engine.progress.send_replace(progress(3, None));
    rig.around.halt.cancel();
    rig.around.forwards.close();
    tokio::time::timeout(PATIENCE, rig.around.forwards.wait())
        .await
        .unwrap();
    assert_eq!(fake.numbers(), [1]);
}

#[tokio::test]
async fn files_on_disk_are_named_in_place_of_blobs_once_they_are_there() {
    let fake = Fake::new([], Plan::Good);
    let address = fake.serve("127.0.0.1:0".parse().unwrap()).await;
    let mut options = options(address);
    options.rewrite_uris = true;
    let mut rig = Rig::with(options, HoldMode::Target, false, 0);
    let event = |uris: [&str; 2]| {
        let files = uris.iter().map(|uri| File {
            file: Some(file::File::Uri((*uri).to_owned())),
            ..File::default()
        });
        let event = BuildEvent {
            id: Some(BuildEventId {
                id: Some(Id::NamedSet(NamedSetOfFilesId { id: "0".to_owned() })),
            }),
            payload: Some(Payload::NamedSetOfFiles(NamedSetOfFiles {
                files: files.collect(),
                ..NamedSetOfFiles::default()
            })),
            ..BuildEvent::default()
        };
        with_event(2, prost::Message::encode_to_vec(&event))
    };
    let blob = |size| format!("bytestream://cache/blobs/{}/{size}", hex::encode([size; 32]));
    let (here, gone) = (blob(1), blob(2));
    rig.send(&[with_id(1, 2), event([&here, &gone]), last(3)]);
    rig.finish();
    rig.until("flushed", |status| status.acked == 1).await;
    let path = PathBuf::from("/execroot/a b");
    rig.engine.local.lock().unwrap().insert(1, path);
    rig.engine.progress.send_replace(progress(2, None));
    rig.until_finished().await;
    let seen = fake.seen();
    assert_eq!(seen[0].requests[1], event(["file:///execroot/a%20b", &gone]));
    assert_eq!(requests::sequence(&seen[0].requests[1]), 2);
}
