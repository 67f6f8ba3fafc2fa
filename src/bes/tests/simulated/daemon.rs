//! A daemon's life, and its engine's.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    path::PathBuf,
    rc::Rc,
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use futures::future::BoxFuture;
use tokio::{sync::watch, time::sleep};

use super::{ledger::Ledger, upstream};
use crate::{
    access::expect_preface,
    bep::event::{Event, StreamEvent},
    bes::{
        BesOptions, BesService, Upstream, UpstreamOptions, serve,
        tests::harness::{decode, opened},
    },
    builds::{Builds, Progress, Settlement, StreamEnd, StreamKey},
    digest::Digest,
    exec_path::ExecPath,
    journal::{Entry, Journal, JournalOptions},
    simulated::{
        net::{self, Side},
        now,
        schedule::asked_to_end,
    },
    transport::Endpoint,
};

pub(super) const PORT: u16 = 8985;

/// All that a daemon does when it is asked to end takes so long at most, see `serve`.
const DRAINED: Duration = Duration::from_secs(8);

/// What can be seen of the daemon from outside, a moment ago.
#[derive(Debug, Default, Clone)]
pub(super) struct Seen {
    streams: usize,
    undelivered: bool,
    unfinished: usize,
    connections: (usize, usize),
    gaps: u64,
    failures: u64,
}

impl Seen {
    /// Nothing is left to do, and nothing is held on to.
    pub(super) fn is_idle(&self, ledger: &Ledger) -> bool {
        let endless = ledger.endless();
        self.streams <= endless
            && self.unfinished <= endless
            // Forwarders of streams that may go on keep their way upstream.
            && (endless > 0 || (!self.undelivered && self.connections == (0, 0)))
    }
}

/// What a daemon is made of.
#[derive(Clone)]
pub(super) struct Daemon {
    pub(super) ledger: Arc<Ledger>,
    pub(super) options: BesOptions,
    pub(super) forwards: bool,
    pub(super) seen: Rc<RefCell<Seen>>,
}

impl Daemon {
    /// Until its host dies.
    pub(super) async fn live(self) -> turmoil::Result {
        let ledger = &self.ledger;
        ledger.lives.fetch_add(1, Ordering::Relaxed);
        // What the one before it has left, before anything is mended.
        ledger.check_journal();
        let journal = opened(&ledger.dir, JournalOptions::default(), |pause| {
            // The simulated time stands still.
            std::thread::sleep(pause);
            std::future::ready(())
        })
        .await;
        let upstream = if self.forwards {
            let place = format!("grpc://upstream:{}", upstream::PORT);
            let mut options = UpstreamOptions::new(Endpoint::parse("--bes-backend", &place)?);
            options.connect.dial = Some(net::channel);
            Some(Upstream::new(options)?)
        } else {
            None
        };
        let has_events = |entry: &Entry| entry.read().is_ok_and(|mut records| records.next().is_some());
        let unfinished = journal.unfinished()?.into_iter().filter(has_events);
        let engine = Arc::new(Engine {
            ledger: Arc::clone(ledger),
            lives: Mutex::default(),
            unfinished: Mutex::new(unfinished.map(|entry| (entry.key.to_string(), entry)).collect()),
        });
        let service = BesService::new(
            engine,
            Arc::new(|| Box::new(decode)),
            Some(journal),
            upstream,
            self.options,
        );
        service.recover().await?;
        let (routes, _health) = serve::routes(service.clone()).await?;
        let incoming = expect_preface(net::incoming(PORT).await?);
        let stop = asked_to_end("outhaul");
        let serving = serve::server()
            .add_routes(routes)
            .serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
        let closed = Cell::new(false);
        let closing = async {
            stop.cancelled().await;
            ledger.stopped.lock().unwrap().get_or_insert_with(now);
            service.close().await;
            closed.set(true);
        };
        let drained = async {
            stop.cancelled().await;
            sleep(DRAINED).await;
            // What is left are connections whose clients are gone; those are cut.
            ledger
                .verdict
                .check(closed.get(), || format!("not closed within {DRAINED:?}"));
        };
        let all = async { tokio::join!(serving, closing).0 };
        let watching = async {
            loop {
                sleep(Duration::from_secs(1)).await;
                let counters = service.counters();
                let seen = Seen {
                    streams: service.streams(),
                    undelivered: service.has_undelivered(),
                    unfinished: Journal::view(&ledger.dir).unfinished().map_or(0, |all| all.len()),
                    connections: (
                        net::open(PORT, Side::Server),
                        net::open(upstream::PORT, Side::Client),
                    ),
                    gaps: counters.gaps,
                    failures: counters.journal_failures,
                };
                ledger
                    .verdict
                    .check(seen.gaps == 0 && seen.failures == 0, || format!("{counters:?}"));
                *self.seen.borrow_mut() = seen;
            }
        };
        tokio::select! {
            served = all => served.map_err(Into::into),
            () = drained => Ok(()),
            () = watching => Ok(()),
        }
    }
}

/// An engine that settles a stream some time after its end.
struct Engine {
    ledger: Arc<Ledger>,
    /// How far each stream is in this life.
    lives: Mutex<HashMap<String, Life>>,
    /// Journals that were there when it began, and of which it has not got the first event yet.
    unfinished: Mutex<HashMap<String, Entry>>,
}

#[derive(Debug, Default, Clone)]
struct Life {
    highest: i64,
    end: Option<StreamEnd>,
}

impl Engine {
    fn take(&self, stream: &str, sequence: i64, event: &Event) {
        let mut lives = self.lives.lock().unwrap();
        let life = lives.entry(stream.to_owned()).or_default();
        let verdict = &self.ledger.verdict;
        // A task that panics on this event has said before what it is about.
        if let Some(entry) = self.unfinished.lock().unwrap().remove(stream) {
            let marked = Journal::view(&self.ledger.dir).lost_replays(&entry);
            verdict.check(marked > 0, || {
                format!("{stream}: its journal is replayed without a mark")
            });
        }
        if sequence == 1 && matches!(life.end, Some(StreamEnd::Broken(_))) {
            // Resumed after the service had forgotten it, from the journal.
            *life = Life::default();
        }
        verdict.check(sequence == life.highest + 1, || {
            format!("{stream}: the engine gets {sequence} after {}", life.highest)
        });
        verdict.check(life.end != Some(StreamEnd::Finished), || {
            format!("{stream}: the engine gets {sequence} after the end")
        });
        let right = matches!(event, Event::Started(started) if started.invocation_id == format!("{stream}/{sequence}"));
        verdict.check(right, || format!("{stream}: {sequence} is {event:?}"));
        (life.highest, life.end) = (sequence, None);
    }
}

impl Builds for Engine {
    fn events(&self, stream: &StreamKey, events: Vec<(i64, StreamEvent)>) -> BoxFuture<'_, ()> {
        let stream = stream.to_string();
        Box::pin(async move {
            let pace = Duration::from_millis(self.ledger.plans[&stream].pace);
            for (sequence, framed) in events {
                sleep(pace).await;
                self.take(&stream, sequence, &framed.event);
            }
        })
    }

    fn limited(&self, _: &StreamKey, _: String) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    fn ended(&self, stream: &StreamKey, end: StreamEnd) -> BoxFuture<'_, ()> {
        let stream = stream.to_string();
        let mut lives = self.lives.lock().unwrap();
        let life = lives.entry(stream.clone()).or_default();
        let before = life.end.replace(end.clone());
        // One that broke off may go on with nothing but its last event.
        let resumed = end == StreamEnd::Finished && matches!(before, Some(StreamEnd::Broken(_)));
        self.ledger.verdict.check(before.is_none() || resumed, || {
            format!("{stream}: ended with {before:?}, then with {end:?}")
        });
        if end == StreamEnd::Finished {
            let events = self.ledger.plans[&stream].requests.len() as i64 - 1;
            self.ledger.verdict.check(life.highest == events, || {
                format!("{stream}: finished with {} of {events}", life.highest)
            });
        }
        Box::pin(async {})
    }

    fn done(&self, _: &StreamKey) -> BoxFuture<'static, ()> {
        Box::pin(sleep(Duration::from_millis(50)))
    }

    fn settled(&self, stream: &StreamKey) -> BoxFuture<'static, Settlement> {
        let (ledger, stream) = (Arc::clone(&self.ledger), stream.to_string());
        Box::pin(async move {
            match ledger.plans[&stream].settles {
                Some(wait) => sleep(wait).await,
                None => std::future::pending().await,
            }
            ledger.change(&stream, |fate| {
                fate.settled.get_or_insert_with(now);
            });
            Settlement::default()
        })
    }

    fn is_done(&self, stream: &StreamKey) -> bool {
        self.ledger.remembers && self.ledger.fate(&stream.to_string()).settled.is_some()
    }

    fn progress(&self, _: &StreamKey) -> BoxFuture<'static, Option<watch::Receiver<Progress>>> {
        Box::pin(async { None })
    }

    fn local_files(
        &self,
        _: &StreamKey,
        files: Vec<(Option<ExecPath>, Digest)>,
    ) -> BoxFuture<'static, Vec<Option<PathBuf>>> {
        Box::pin(async move { vec![None; files.len()] })
    }

    fn held(&self, _: &StreamKey, _: Duration, _: bool) {}
}
