//! A client that sends a stream as Bazel's uploader does: it keeps what is not acknowledged, and when a connection
//! breaks, it sends that again on another one.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use prost::Message as _;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, transport::Endpoint};

use super::{daemon::PORT, ledger::Ledger};
use crate::{
    bes::{raw::PublishBuildEventClient, tests::harness::key},
    proto::google::devtools::build::v1::{
        BuildEvent, OrderedBuildEvent, PublishLifecycleEventRequest, StreamId, build_event::Event,
    },
    simulated::{Chance, net, now},
};

/// How a client ends.
#[derive(Debug, Clone, Copy)]
pub(super) enum Manner {
    /// With its last acknowledgement.
    Stays,
    /// It cancels the stream after this event.
    Cancels(i64),
}

/// Acknowledgements come within so long where nothing is wrong with the way: two ways, a few ticks.
const SOON: Duration = Duration::from_secs(2);
/// What an upstream service that is not there may cost the last acknowledgement: as long as it takes to see that.
const SEEN: Duration = Duration::from_secs(95);

/// Sends a stream. `quick` says that nothing is ever wrong between here and the daemon.
pub(super) async fn play(ledger: Arc<Ledger>, name: String, manner: Manner, mut chance: Chance, quick: bool) {
    let requests = &ledger.plans[&name].requests;
    let last = requests.len() as i64;
    // When the build comes to each event.
    let mut due = Instant::now();
    let times: Vec<Instant> = requests
        .iter()
        .map(|_| {
            let longest = chance.pick(&[1, 10, 500, 3000]);
            due += chance.time(Duration::from_millis(longest));
            due
        })
        .collect();
    let endpoint = Endpoint::from_shared(format!("http://outhaul:{PORT}"))
        .expect("a URI")
        .connect_timeout(Duration::from_secs(10))
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true);
    if ledger.plans[&name].calls {
        call(
            &ledger,
            &name,
            &endpoint,
            Event::BuildEnqueued(Default::default()),
        )
        .await;
        call(
            &ledger,
            &name,
            &endpoint,
            Event::InvocationAttemptStarted(Default::default()),
        )
        .await;
    }
    let mut failures = 0;
    loop {
        let mut client = PublishBuildEventClient::new(net::channel(&endpoint));
        let (sender, outbound) = mpsc::channel(16);
        let mut sender = Some(sender);
        let first = ledger.fate(&name).acked;
        let mut sent = first;
        // When the newest event was sent.
        let mut sent_at = now();
        let opened = client
            .publish_build_tool_event_stream(Request::new(ReceiverStream::new(outbound)))
            .await;
        if let Ok(opened) = opened {
            ledger.change(&name, |fate| fate.connections += 1);
            let mut answers = opened.into_inner();
            loop {
                let sends = sender.is_some() && sent < last;
                let next = async {
                    sleep_until(times[sent as usize]).await;
                    match &sender {
                        Some(sender) => sender.send(requests[sent as usize].clone()).await.is_ok(),
                        None => false,
                    }
                };
                let answer = tokio::select! {
                    biased;
                    answer = answers.message() => answer,
                    taken = next, if sends => {
                        if taken {
                            sent += 1;
                            sent_at = now();
                        }
                        if sent == last {
                            ledger.change(&name, |fate| {
                                fate.finished.get_or_insert(sent_at);
                            });
                        }
                        if !taken || sent == last {
                            sender = None;
                        }
                        if let Manner::Cancels(at) = manner && sent >= at {
                            // A moment, or several.
                            sleep(chance.time(Duration::from_secs(3))).await;
                            ledger.change(&name, |fate| (fate.over, fate.cancelled) = (true, true));
                            drop(answers);
                            return;
                        }
                        continue;
                    }
                };
                match answer {
                    Ok(Some(ack)) => {
                        let sequence = ack.sequence_number;
                        ledger.acknowledged(&name, sequence, sent);
                        failures = 0;
                        let fate = ledger.fate(&name);
                        if quick && sequence < last {
                            // Only the newest one's time is known; the others are older.
                            let late = sequence == sent && now() > sent_at + SOON;
                            ledger
                                .verdict
                                .check(!late, || format!("{name}: {sequence} was acknowledged late"));
                        } else if quick && let Some(settled) = fate.settled {
                            let free = settled.max(sent_at) + SEEN;
                            ledger
                                .verdict
                                .check(now() < free, || format!("{name}: held by upstream: {fate:?}"));
                        }
                    }
                    Ok(None) => {
                        let acked = ledger.fate(&name).acked;
                        ledger.verdict.check(acked == last, || {
                            format!("{name}: closed with OK at {acked} of {last}")
                        });
                        if ledger.plans[&name].calls {
                            let finished = Event::InvocationAttemptFinished(Default::default());
                            call(&ledger, &name, &endpoint, finished).await;
                            call(
                                &ledger,
                                &name,
                                &endpoint,
                                Event::BuildFinished(Default::default()),
                            )
                            .await;
                        }
                        ledger.change(&name, |fate| fate.over = true);
                        return;
                    }
                    Err(status) => {
                        // Bazel does not try again after these.
                        let fatal = matches!(
                            status.code(),
                            Code::InvalidArgument | Code::FailedPrecondition | Code::PermissionDenied
                        );
                        ledger.verdict.check(!fatal, || format!("{name}: {status}"));
                        ledger.verdict.check(!quick, || {
                            format!("{name} broke though nothing was wrong: {status}")
                        });
                        break;
                    }
                }
            }
        }
        // Bazel's waits.
        sleep(Duration::from_secs(1).mul_f64(1.6_f64.powi(failures.min(4)))).await;
        failures += 1;
    }
}

/// Sends the build's life, until that is answered.
async fn call(ledger: &Ledger, name: &str, endpoint: &Endpoint, event: Event) {
    let request = PublishLifecycleEventRequest {
        build_event: Some(OrderedBuildEvent {
            stream_id: Some(StreamId {
                build_id: key(name).build_id,
                component: 1,
                invocation_id: name.to_owned(),
            }),
            sequence_number: 1,
            event: Some(BuildEvent {
                event_time: None,
                event: Some(event),
            }),
        }),
        ..PublishLifecycleEventRequest::default()
    };
    let request = Bytes::from(request.encode_to_vec());
    loop {
        let mut client = PublishBuildEventClient::new(net::channel(endpoint));
        // Bazel's deadline.
        let answer = timeout(
            Duration::from_secs(15),
            client.publish_lifecycle_event(request.clone()),
        )
        .await;
        if let Ok(Ok(_)) = answer {
            ledger.change(name, |fate| fate.calls += 1);
            return;
        }
        sleep(Duration::from_secs(1)).await;
    }
}
