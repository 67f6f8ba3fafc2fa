//! The wire without a disk: `cargo bench --bench fetch`.
//!
//! Blobs are read from the embedded cache as the daemon does it, in batches and streams with as many under way, and
//! dropped as they come; nothing is hashed or written. Server and client share this process and its cores, so a figure
//! is what both cost together. The same again through a slow line of `net/`, where time is what counts. `cargo bench
//! --bench fetch -- small` runs the rows whose name has that word.

mod net;

use std::{
    error::Error,
    io::Write as _,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use net::Delay;
use outhaul::{
    digest::Digest,
    remote::{Attribution, BlobStore as _, GrpcCache, RemoteOptions, Sink},
    transport::Endpoint,
};
use outhaul_testkit::{
    Chance,
    cache::{EmbeddedCache, RunningCache},
};
use rustix::time::{ClockId, clock_gettime};

type Failure = Box<dyn Error>;

/// Rounds of which the median is taken.
const ROUNDS: usize = 5;
/// Streams under way at once, as the daemon's default.
const STREAMS: usize = 4;

fn main() -> Result<(), Failure> {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        writeln!(
            std::io::stdout(),
            "| what | link | MiB/s | µs of CPU per blob | ms |\n|---|---|---|---|---|"
        )?;
        for (name, count, size) in [
            ("small: 20,000 blobs of 2.5 KiB", 20_000_usize, 2560_usize),
            ("medium: 1,000 blobs of 200 KiB", 1000, 200 << 10),
            ("large: 4 blobs of 128 MiB", 4, 128 << 20),
        ] {
            for (link, rtt, rate) in [
                ("none", None, None),
                ("0 ms", Some(0), None),
                ("5 ms", Some(5), None),
                ("25 ms", Some(25), None),
                ("5 ms, 1 Gbit/s", Some(5), Some(1_000_000_000)),
                ("5 ms, 100 Mbit/s", Some(5), Some(100_000_000)),
            ] {
                let row = format!("| {name} | {link} |");
                if !wanted.iter().all(|word| row.contains(word)) {
                    continue;
                }
                // No longer than it takes to see it.
                let count = if rate == Some(100_000_000) {
                    count.div_ceil(4)
                } else {
                    count
                };
                let (rounds, size) = match rate {
                    Some(_) => (1, if size > 100 << 20 { 32 << 20 } else { size }),
                    None => (ROUNDS, size),
                };
                let figures = measure(count, size, rtt, rate, rounds).await?;
                writeln!(std::io::stdout(), "{row} {figures} |")?;
            }
        }
        Ok(())
    })
}

/// Blobs like compiled code's: some of it repeats.
fn blob(seed: usize, size: usize) -> Bytes {
    let mut chance = Chance::new(seed as u64);
    let mut bytes = Vec::with_capacity(size + 32);
    while bytes.len() < size {
        bytes.extend_from_slice(&chance.number().to_le_bytes());
        bytes.extend_from_slice(b"\x48\x89\xe5\x00\x00\x00\x00\x00");
    }
    bytes.truncate(size);
    bytes.into()
}

/// A cache with this number of blobs.
async fn filled(count: usize, size: usize) -> Result<(RunningCache, Vec<Digest>), Failure> {
    let cache = EmbeddedCache::builder().start().await?;
    let digests = (0..count).map(|n| cache.store().put(blob(n, size))).collect();
    Ok((cache, digests))
}

async fn measure(
    count: usize,
    size: usize,
    rtt: Option<u64>,
    rate: Option<u64>,
    rounds: usize,
) -> Result<String, Failure> {
    let (cache, digests) = filled(count, size).await?;
    let upstream: SocketAddr = cache.endpoint().trim_start_matches("grpc://").parse()?;
    let delay = rtt
        .map(|ms| Delay::start(upstream, Duration::from_millis(ms), rate))
        .transpose()?;
    let addr = delay.as_ref().map_or(upstream, Delay::addr);
    let endpoint = Endpoint::parse("--remote-cache", &format!("grpc://{addr}"))?;
    let store = GrpcCache::new(RemoteOptions::new(endpoint))?;
    let mut times = Vec::new();
    for round in 0..=rounds {
        let (start, cpu) = (Instant::now(), processor_time());
        if size > 1 << 20 {
            streams(&store, &digests).await?;
        } else {
            batches(&store, &digests).await?;
        }
        // The first makes the connections.
        if round > 0 {
            times.push((start.elapsed(), processor_time() - cpu));
        }
    }
    drop(store);
    cache.stop().await;
    times.sort_unstable();
    let (wall, cpu) = times[times.len() / 2];
    let mib = (count * size) as f64 / f64::from(1 << 20) / wall.as_secs_f64();
    let each = cpu.as_secs_f64() * 1e6 / count as f64;
    Ok(format!("{mib:.0} | {each:.1} | {:.0}", wall.as_secs_f64() * 1e3))
}

/// User and system time of this process so far.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Batches of a MiB, eight under way.
async fn batches(store: &GrpcCache, digests: &[Digest]) -> Result<(), Failure> {
    let attribution = Arc::new(Attribution::default());
    let per_batch = ((1 << 20) / digests[0].size() as usize).clamp(1, 4000);
    let mut done = stream::iter(digests.chunks(per_batch).map(<[Digest]>::to_vec))
        .map(|chunk| {
            let (store, attribution) = (store.clone(), attribution.clone());
            tokio::spawn(async move { store.read_batch(&chunk, &attribution, false).await })
        })
        .buffer_unordered(8);
    while let Some(answers) = done.next().await {
        for (digest, answer) in answers? {
            assert_eq!(answer?.len() as u64, digest.size());
        }
    }
    Ok(())
}

/// Counts.
struct Counter(u64);

#[async_trait]
impl Sink for Counter {
    async fn write(&mut self, bytes: Bytes) -> std::io::Result<()> {
        self.0 += bytes.len() as u64;
        Ok(())
    }
}

async fn streams(store: &GrpcCache, digests: &[Digest]) -> Result<(), Failure> {
    let attribution = Arc::new(Attribution::default());
    let mut done = stream::iter(digests.to_vec())
        .map(|digest| {
            let (store, attribution) = (store.clone(), attribution.clone());
            tokio::spawn(async move {
                let mut sink = Counter(0);
                store
                    .read_stream(&digest, 0, &attribution, false, &mut sink)
                    .await?;
                Ok::<_, outhaul::transport::RemoteError>(sink.0 == digest.size())
            })
        })
        .buffer_unordered(STREAMS);
    while let Some(whole) = done.next().await {
        assert!(whole??);
    }
    Ok(())
}
