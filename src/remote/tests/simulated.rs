//! The client and the embedded cache on a network that fails by schedules.

use std::{
    cell::RefCell,
    rc::Rc,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::{BoxFuture, join_all};
use outhaul_testkit::cache::{EmbeddedCache, RunningCache};

use super::*;
use crate::{
    remote::retry::Timer,
    simulated::{
        Chance, Schedule, Totals, Verdict, each_seed, is_custom, net, now, run,
        schedule::{Change, Link},
    },
};

const PORT: u16 = 8980;
const LINK: Link = ("outhaul", "cache");

/// Faults begin within so long.
const TROUBLE: Duration = Duration::from_secs(60);

/// A dead connection is known as such: the ping's interval and the time for its answer, and the way there and back.
const PINGED: Duration = Duration::from_secs(41);

/// Waits as asked, with chance from a seed.
struct Waits {
    chance: Mutex<Chance>,
    count: AtomicU64,
}

impl Timer for Waits {
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        self.count.fetch_add(1, Ordering::Relaxed);
        Box::pin(tokio::time::sleep(duration))
    }

    fn jitter(&self) -> f64 {
        self.chance.lock().unwrap().part()
    }
}

/// Takes bytes at its pace.
struct Paced {
    bytes: Vec<u8>,
    pace: Duration,
}

impl Paced {
    const fn fast() -> Self {
        Self {
            bytes: Vec::new(),
            pace: Duration::ZERO,
        }
    }
}

#[async_trait]
impl Sink for Paced {
    async fn write(&mut self, bytes: Bytes) -> std::io::Result<()> {
        self.bytes.extend_from_slice(&bytes);
        let pace = self.pace;
        if !pace.is_zero() {
            tokio::time::sleep(pace).await;
        }
        Ok(())
    }
}

/// Everything about a schedule but its faults.
struct World {
    verdict: Verdict,
    totals: RefCell<Totals>,
    /// What the cache has.
    blobs: Vec<(Digest, Bytes)>,
    /// What it does not have.
    missing: Vec<Digest>,
    healed: Duration,
    waits: Arc<Waits>,
    /// Bytes that may have come, and waits that may have been made.
    bytes: AtomicU64,
    tries: AtomicU64,
}

impl World {
    fn new(chance: &mut Chance, healed: Duration) -> Self {
        let blobs: Vec<Bytes> = (0..chance.between(3, 12))
            .map(|_| {
                let most = chance.pick(&[200, 20_000, 300_000, 4_000_000]);
                let length = chance.between(1, most) as usize;
                let mut bytes = chance.bytes(length.div_ceil(2));
                // Half of it is worth compressing.
                bytes.resize(length, 7);
                bytes.into()
            })
            .collect();
        Self {
            verdict: Verdict::default(),
            totals: RefCell::default(),
            blobs: blobs.into_iter().map(|bytes| (digest(&bytes), bytes)).collect(),
            missing: (0..3).map(|_| digest(&chance.bytes(9))).collect(),
            healed,
            waits: Arc::new(Waits {
                chance: Mutex::new(chance.another()),
                count: AtomicU64::new(0),
            }),
            bytes: AtomicU64::new(0),
            tries: AtomicU64::new(0),
        }
    }

    /// One thing that the coordinator would ask for; whether it worked.
    async fn ask(&self, cache: &GrpcCache, chance: &mut Chance) -> bool {
        let began = now();
        let kind = chance.below(10);
        let (name, worked) = match kind {
            0..=4 => ("stream", self.stream(cache, chance).await),
            5..=7 => ("batch", self.batch(cache, chance).await),
            8 => ("find missing", self.find_missing(cache, chance).await),
            _ => ("missing blob", self.stream_missing(cache, chance).await),
        };
        let took = now() - began;
        // With the faults gone, it is as many tries as there are, each on a connection that died, at most; and before,
        // each try ends as well, by the deadline for an answer if not by the pings.
        let since_healed = now().saturating_sub(began.max(self.healed));
        let longest = (PINGED + Duration::from_secs(6)) * 6 * 2;
        self.verdict.check(since_healed < longest, || {
            format!("{name} took {took:?}, {since_healed:?} of it after the network had healed")
        });
        let mut totals = self.totals.borrow_mut();
        totals.count("asked", 1);
        totals.count("failed", u64::from(!worked));
        totals.most("seconds", took.as_secs());
        totals.most("seconds after healing", since_healed.as_secs());
        worked
    }

    /// Only what is broken for now is an error: the network's faults look like nothing worse.
    fn judge(&self, what: &str, error: &RemoteError) {
        self.verdict.check(error.is_retryable(), || {
            format!("{what}: {:?}: {error}", error.kind)
        });
    }

    fn allow(&self, bytes: u64, tries: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.tries.fetch_add(tries, Ordering::Relaxed);
    }

    async fn stream(&self, cache: &GrpcCache, chance: &mut Chance) -> bool {
        let (digest, expected) = &self.blobs[chance.below(self.blobs.len() as u64) as usize];
        let size = expected.len() as u64;
        let offset = if chance.happens(0.2) {
            chance.below(size)
        } else {
            0
        };
        let mut sink = Paced {
            bytes: Vec::new(),
            pace: Duration::from_millis(chance.pick(&[0, 0, 5, 200])),
        };
        // Each 16 KiB may forgive all tries so far.
        self.allow(size - offset, 5 * (2 + (size - offset) / (16 << 10)));
        let result = cache
            .read_stream(digest, offset, &attribution(), false, &mut sink)
            .await;
        let expected = &expected[offset as usize..];
        self.verdict.check(expected.starts_with(&sink.bytes), || {
            format!("{digest} from {offset}: wrong bytes in the sink")
        });
        match &result {
            Ok(()) => self.verdict.check(sink.bytes.len() == expected.len(), || {
                format!(
                    "{digest} from {offset}: {} bytes of {}",
                    sink.bytes.len(),
                    expected.len()
                )
            }),
            Err(error) => self.judge("stream", error),
        }
        result.is_ok()
    }

    async fn stream_missing(&self, cache: &GrpcCache, chance: &mut Chance) -> bool {
        let digest = &self.missing[chance.below(self.missing.len() as u64) as usize];
        let mut sink = Paced::fast();
        self.allow(0, 10);
        match cache
            .read_stream(digest, 0, &attribution(), false, &mut sink)
            .await
        {
            Err(error) if error.is_not_found() => true,
            Err(error) => {
                self.judge("missing blob", &error);
                false
            }
            Ok(()) => {
                self.verdict
                    .check(false, || format!("{digest} is nowhere, and was read"));
                false
            }
        }
    }

    async fn batch(&self, cache: &GrpcCache, chance: &mut Chance) -> bool {
        let mut asked = Vec::new();
        for (digest, bytes) in &self.blobs {
            if bytes.len() <= 300_000 && chance.happens(0.6) {
                asked.push((digest.clone(), Some(bytes)));
            }
        }
        for digest in &self.missing {
            if chance.happens(0.3) {
                asked.push((digest.clone(), None));
            }
        }
        let digests: Vec<_> = asked.iter().map(|(digest, _)| digest.clone()).collect();
        let bytes: u64 = digests.iter().map(Digest::size).sum();
        // A batch starts over at each try.
        self.allow(bytes * 6, 10);
        let answers = cache.read_batch(&digests, &attribution(), false).await;
        self.verdict.check(answers.len() == asked.len(), || {
            "answers of a batch are missing".to_owned()
        });
        let mut all = true;
        for ((digest, answer), (asked, expected)) in answers.iter().zip(&asked) {
            self.verdict
                .check(digest == asked, || "answers in another order".to_owned());
            match (answer, expected) {
                (Ok(bytes), Some(expected)) => self
                    .verdict
                    .check(bytes == *expected, || format!("{digest}: wrong bytes in a batch")),
                (Ok(_), None) => self
                    .verdict
                    .check(false, || format!("{digest} is nowhere, and was read")),
                (Err(error), None) if error.is_not_found() => {}
                (Err(error), _) => {
                    self.judge("batch", error);
                    all = false;
                }
            }
        }
        all
    }

    async fn find_missing(&self, cache: &GrpcCache, chance: &mut Chance) -> bool {
        let present = self.blobs.iter().map(|(digest, _)| digest.clone());
        let asked: Vec<_> = present
            .chain(self.missing.iter().cloned())
            .filter(|_| chance.happens(0.7))
            .collect();
        self.allow(0, 10);
        match cache.find_missing(&asked, &attribution()).await {
            Ok(mut found) => {
                let mut expected: Vec<_> = asked
                    .into_iter()
                    .filter(|digest| self.missing.contains(digest))
                    .collect();
                found.sort();
                expected.sort();
                self.verdict.check(found == expected, || {
                    format!("{found:?} are missing, not {expected:?}")
                });
                true
            }
            Err(error) => {
                self.judge("find missing", &error);
                false
            }
        }
    }
}

/// A cache that has the blobs, restarted with its host.
fn host(sim: &mut turmoil::Sim<'_>, world: &Rc<World>, zstd: bool) -> Rc<RefCell<Vec<RunningCache>>> {
    let lives = Rc::<RefCell<Vec<RunningCache>>>::default();
    let (world, kept) = (Rc::clone(world), Rc::clone(&lives));
    sim.host("cache", move || {
        let (world, kept) = (Rc::clone(&world), Rc::clone(&kept));
        async move {
            let cache = EmbeddedCache::builder().zstd(zstd);
            let cache = cache.serve(format!("grpc://cache:{PORT}"), net::incoming(PORT).await?)?;
            for (digest, bytes) in &world.blobs {
                cache.store().put_unverified(digest.clone(), bytes.clone());
            }
            kept.borrow_mut().push(cache);
            std::future::pending::<()>().await;
            Ok(())
        }
    });
    lives
}

fn one_schedule(seed: u64) -> Result<Totals, String> {
    let mut chance = Chance::new(seed);
    let builder = net::network(&mut chance);
    let mut schedule = Schedule::random(&mut chance, &[LINK], &["cache"], TROUBLE);
    let world = Rc::new(World::new(&mut chance, schedule.healed));
    let mut sim = builder.build();
    let zstd = chance.happens(0.5);
    let lives = host(&mut sim, &world, zstd);
    let mut options = RemoteOptions::new(Endpoint::parse("--remote-cache", "grpc://cache:8980").unwrap());
    options.connect.dial = Some(net::channel);
    options.compression = if zstd {
        Compression::Always
    } else {
        Compression::Never
    };
    options.connections = Some(chance.pick(&[1, 2, 4]));
    let workers = chance.between(1, 6);
    let each = chance.between(2, 12);
    let finished = Rc::new(RefCell::new(false));
    sim.client("outhaul", {
        let (world, finished) = (Rc::clone(&world), Rc::clone(&finished));
        async move {
            let cache = GrpcCache::with_timer(options, world.waits.clone())?;
            let work = (0..workers).map(|_| {
                let (world, cache, mut chance) = (&world, &cache, chance.another());
                async move {
                    for _ in 0..each {
                        tokio::time::sleep(chance.time(TROUBLE / 4)).await;
                        world.ask(cache, &mut chance).await;
                    }
                }
            });
            join_all(work).await;
            tokio::time::sleep(world.healed.saturating_sub(now())).await;
            // Whatever is left of its connections, each of which may be dead.
            let began = now();
            let worked = world.stream(&cache, &mut chance).await;
            let took = now() - began;
            world.verdict.check(worked, || {
                "nothing can be read though nothing is wrong".to_owned()
            });
            world
                .totals
                .borrow_mut()
                .most("seconds to recover", took.as_secs());
            *finished.borrow_mut() = true;
            Ok(())
        }
    });
    let limit = Duration::from_secs(7200);
    let elapsed = run(&mut sim, &mut schedule, &world.verdict, limit, |_| {
        *finished.borrow()
    })?;
    let mut totals = world.totals.take();
    totals.elapsed = elapsed;
    let waits = world.waits.count.load(Ordering::Relaxed);
    let tries = world.tries.load(Ordering::Relaxed);
    if waits > tries {
        return Err(format!("{waits} waits for another try, of {tries}\n{schedule}"));
    }
    // What a try loses: what had come of a frame, and what the sink had not taken yet when its turn ended.
    let allowed =
        world.bytes.load(Ordering::Relaxed) + (waits + 1) * (3 << 20) + totals.get("asked") * (64 << 10);
    let received = net::received();
    if received > allowed {
        return Err(format!("{received} bytes came, for {allowed}\n{schedule}"));
    }
    for life in lives.borrow().iter() {
        let stats = life.stats();
        totals.count("resumed", stats.stream_reads_resumed);
    }
    totals.count("retries", waits);
    totals.count("bytes", received);
    totals.count("faults", schedule.faults());
    totals.count(
        "crashes",
        schedule.count(|change| matches!(change, Change::Crash(_))),
    );
    Ok(totals)
}

#[test]
fn whatever_the_network_does_reads_end_and_what_they_bring_is_right() {
    let totals = each_seed(
        "whatever_the_network_does_reads_end_and_what_they_bring_is_right",
        25,
        one_schedule,
    );
    if !is_custom() {
        for what in ["asked", "failed", "resumed", "retries", "faults", "crashes"] {
            assert!(totals.get(what) > 0, "{what} was never met");
        }
    }
}

/// A cache with one blob, and something that is done with it.
fn simulate<F: Future<Output = ()> + 'static>(
    size: usize,
    connections: usize,
    mut schedule: Schedule,
    test: impl FnOnce(GrpcCache, Rc<World>) -> F + 'static,
) -> outhaul_testkit::cache::Stats {
    let mut chance = Chance::new(1);
    let mut sim = net::plain().build();
    let mut world = World::new(&mut chance, schedule.healed);
    let bytes = Bytes::from(chance.bytes(size));
    world.blobs = vec![(digest(&bytes), bytes)];
    let world = Rc::new(world);
    let lives = host(&mut sim, &world, false);
    let mut options = RemoteOptions::new(Endpoint::parse("--remote-cache", "grpc://cache:8980").unwrap());
    options.connect.dial = Some(net::channel);
    (options.compression, options.connections) = (Compression::Never, Some(connections));
    let finished = Rc::new(RefCell::new(false));
    sim.client("outhaul", {
        let (world, finished) = (Rc::clone(&world), Rc::clone(&finished));
        async move {
            let cache = GrpcCache::with_timer(options, world.waits.clone())?;
            test(cache, world).await;
            *finished.borrow_mut() = true;
            Ok(())
        }
    });
    let limit = Duration::from_secs(3600);
    run(&mut sim, &mut schedule, &world.verdict, limit, |_| {
        *finished.borrow()
    })
    .unwrap();
    lives.borrow()[0].stats()
}

/// Reads it, and says how long that took.
async fn whole(cache: &GrpcCache, world: &World) -> Duration {
    let (digest, expected) = &world.blobs[0];
    let mut sink = Paced::fast();
    let began = now();
    cache
        .read_stream(digest, 0, &attribution(), false, &mut sink)
        .await
        .unwrap();
    assert!(sink.bytes == *expected);
    now() - began
}

#[test]
fn a_dead_connection_is_found_by_a_ping_and_the_transfer_goes_on_where_it_was() {
    // For a moment only, but what was on its way is lost.
    let schedule = Schedule::of([
        (Duration::from_millis(400), Change::Cut(LINK)),
        (Duration::from_millis(500), Change::Mend(LINK)),
    ]);
    let size = 8 << 20;
    let stats = simulate(size, 4, schedule, |cache, world| async move {
        let took = whole(&cache, &world).await;
        let longest = PINGED + Duration::from_secs(4);
        assert!((Duration::from_secs(40)..longest).contains(&took), "{took:?}");
    });
    assert_eq!((stats.stream_reads, stats.stream_reads_resumed), (2, 1));
    let received = net::received();
    assert!(received < size as u64 + (2 << 20), "{received} bytes came");
}

#[test]
fn a_cache_that_is_gone_costs_a_fixed_number_of_tries() {
    let schedule = Schedule::of([(Duration::ZERO, Change::Hold(LINK))]);
    let stats = simulate(1000, 4, schedule, |cache, world| async move {
        let options = cache.options().clone();
        let began = now();
        let error = cache
            .read_stream(&world.blobs[0].0, 0, &attribution(), false, &mut Paced::fast())
            .await
            .unwrap_err();
        world.judge("stream", &error);
        let took = now() - began;
        assert_eq!(
            world.waits.count.load(Ordering::Relaxed),
            u64::from(options.retries)
        );
        let each = options.connect.connect_timeout + options.max_retry_delay;
        let longest = each * (options.retries + 1);
        assert!(
            (options.connect.connect_timeout * options.retries..longest).contains(&took),
            "{took:?}"
        );
    });
    assert_eq!(stats.connections, 0);
}

#[test]
fn connections_that_died_unnoticed_cost_one_ping_and_not_one_each() {
    let schedule = Schedule::of([(Duration::from_secs(50), Change::Forget)]);
    // Each is pinged at once, since nothing came on it for so long, and has 10 s for its answer.
    simulate(1000, 4, schedule, |cache, world| async move {
        join_all((0..8).map(|_| whole(&cache, &world))).await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        let took = whole(&cache, &world).await;
        assert!(took < Duration::from_secs(12), "{took:?}");
    });
}
