//! Calls about a build's life go before and after its streams, and a service that does not take them is not an obstacle.

use std::sync::Mutex;

use bytes::Bytes;
use outhaul_testkit::PATIENCE;
use tonic::{Code, metadata::MetadataMap};

use super::{
    fake::{Fake, Plan},
    rig::{Rig, options, stream},
};
use crate::{
    bes::{HoldMode, lifecycle::Lifecycle, upstream::order::LifecycleEvent},
    builds::Progress,
};

/// Makes a call, which is counted until it is done with.
fn call(rig: &Rig, number: u64, opening: bool) -> Lifecycle {
    let (counted, request) = (Lifecycle::default(), Bytes::from(format!("call {number}")));
    let event = LifecycleEvent {
        opening,
        _pending: counted.count(&request),
        request,
        headers: MetadataMap::new(),
    };
    rig.upstream.lifecycle(&rig.around, &rig.key.build_id, event);
    counted
}

async fn heard(call: Lifecycle) {
    tokio::time::timeout(PATIENCE, call.drained()).await.unwrap();
}

/// Which calls came, and where the stream began and ended.
fn order(fake: &Fake) -> Vec<String> {
    let order = fake.0.order.lock().unwrap();
    let mut order: Vec<_> = order
        .iter()
        .map(|request| match std::str::from_utf8(request) {
            Ok(text) if text.starts_with("call") => text.to_owned(),
            _ => "event".to_owned(),
        })
        .collect();
    order.dedup();
    order
}

#[tokio::test]
async fn calls_keep_their_places_around_the_stream() {
    let fake = Fake::new([], Plan::Good);
    let address = fake.serve("127.0.0.1:0".parse().unwrap()).await;
    let first = Rig::with(options(address), HoldMode::Target, false, 0);
    // The calls were there before the stream.
    fake.0
        .refusals
        .lock()
        .unwrap()
        .extend([Code::Unavailable, Code::Unavailable]);
    let opening = [call(&first, 1, true), call(&first, 2, true)];
    let mut rig = first.another();
    rig.send(&stream(9));
    rig.finish();
    rig.until("begun", |status| status.acked == 2).await;
    assert!(rig.upstream.has_undelivered());
    let closing = [call(&rig, 3, false), call(&rig, 4, false)];
    for call in opening {
        heard(call).await;
    }
    rig.engine.progress.send_replace(Progress {
        open: None,
        through: 9,
        ..Progress::default()
    });
    rig.until_finished().await;
    for call in closing {
        heard(call).await;
    }
    let expected = ["call 1", "call 2", "event", "call 3", "call 4"];
    assert_eq!(order(&fake), expected);
    // Nothing is kept of a build that is over.
    drop(rig.queue);
    rig.around.forwards.close();
    tokio::time::timeout(PATIENCE, rig.around.forwards.wait())
        .await
        .unwrap();
    assert_eq!(rig.upstream.inner.calls.len(), 0);
    assert!(!rig.upstream.has_undelivered());
}

#[tokio::test]
async fn a_service_without_lifecycle_calls_gets_the_stream_all_the_same() {
    for code in [
        Code::Unimplemented,
        Code::InvalidArgument,
        Code::PermissionDenied,
        Code::FailedPrecondition,
        Code::NotFound,
    ] {
        let fake = Fake::new([], Plan::Good);
        let mut rig = Rig::start(&fake).await;
        fake.0.refusals.lock().unwrap().extend([code, code]);
        let calls = [call(&rig, 1, true), call(&rig, 2, false)];
        rig.send(&stream(9));
        rig.finish();
        rig.until_finished().await;
        for call in calls {
            heard(call).await;
        }
        let refusals = Mutex::lock(&fake.0.refusals).unwrap().len();
        assert_eq!(refusals, 0, "{code:?}: asked once each");
    }
}
