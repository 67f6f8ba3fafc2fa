//! A chain of stores that each lack some blobs and damage others: every file is right or absent, is there if any store has
//! it, and the store that is named for it has it.

#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use outhaul::{
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    materialize::{
        MaterializeOptions, Materializer, Outcome, Root, Session, Want,
        place::{Epoch, OutputRoot},
    },
    metrics::Metrics,
    output::{Class, OutputContent},
    remote::{Attribution, RemoteOptions},
    sources::SourceCache,
    transport::Endpoint,
};
use outhaul_testkit::{
    Chance,
    cache::{BlobFault, EmbeddedCache, RunningCache, Times},
    number,
};
use tonic::Code;

/// Blobs up to this many bytes are read in batches.
const SMALL: u64 = 4096;
/// How often a store may be asked for a blob: twice for the bytes, each with a retry or two, and once more for another file.
const ASKED: u64 = 12;

/// What a store makes of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    Well,
    Not,
    /// Wrong, always.
    Wrong,
    /// Wrong once.
    Once,
    /// It does not answer for it, and so perhaps not for others.
    Silent,
}

const HOLDS: [Holds; 8] = [
    Holds::Well,
    Holds::Well,
    Holds::Well,
    Holds::Not,
    Holds::Not,
    Holds::Wrong,
    Holds::Once,
    Holds::Silent,
];

struct Stores {
    servers: Vec<RunningCache>,
    /// Their names, and what each makes of each blob.
    all: Vec<(String, Vec<Holds>)>,
    cache: SourceCache,
}

fn options(address: &str) -> RemoteOptions {
    let mut options = RemoteOptions::new(Endpoint::parse_cache("--remote-cache", address).unwrap());
    options.retries = 1;
    options.max_retry_delay = Duration::from_millis(10);
    options.min_throughput = 0;
    options
}

/// Fills a disk cache.
fn fill(dir: &Path, chance: &mut Chance, blobs: &[Vec<u8>]) -> Vec<Holds> {
    let fill_one = |bytes: &Vec<u8>| {
        let digest = Digest::of(DigestFunction::Sha256, bytes);
        let hash = digest.hash_hex();
        let path = dir.join("cas").join(&hash[..2]).join(&hash);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut wrong = bytes.clone();
        wrong[0] ^= 1;
        match chance.below(8) {
            0..3 => {
                std::fs::write(path, bytes).unwrap();
                return Holds::Well;
            }
            3 => std::fs::write(path, &bytes[1..]).unwrap(),
            4 => std::fs::create_dir(path).unwrap(),
            5 => std::os::unix::fs::symlink("/dev/zero", path).unwrap(),
            6 => {
                std::fs::write(path, wrong).unwrap();
                return Holds::Wrong;
            }
            _ => {}
        }
        Holds::Not
    };
    blobs.iter().map(fill_one).collect()
}

/// Fills a server, and arms it.
fn arm(server: &RunningCache, chance: &mut Chance, blobs: &[Vec<u8>], is_silent: bool) -> Vec<Holds> {
    let arm_one = |bytes: &Vec<u8>| {
        let mut holds = chance.pick(&HOLDS);
        if holds == Holds::Silent && !is_silent {
            holds = Holds::Not;
        }
        if holds == Holds::Not {
            return holds;
        }
        let digest = server.store().put(bytes.clone());
        let wrong = chance.pick(&[
            BlobFault::Corrupt,
            BlobFault::CorruptAt(bytes.len() as u64 / 2),
            BlobFault::Resize(-1),
            BlobFault::Resize(1),
        ]);
        match holds {
            Holds::Wrong => server.faults().blob(&digest, wrong, Times::Always),
            Holds::Once => server.faults().blob(&digest, wrong, Times::Once),
            Holds::Silent => {
                let fault = BlobFault::Status(Code::Unavailable);
                server.faults().blob(&digest, fault, Times::Always);
            }
            Holds::Well | Holds::Not => {}
        }
        holds
    };
    blobs.iter().map(arm_one).collect()
}

async fn stores(chance: &mut Chance, dir: &Path, blobs: &[Vec<u8>]) -> Stores {
    let mut stores = Vec::new();
    let mut chain = Vec::new();
    let mut servers = Vec::new();
    if chance.below(2) == 0 {
        let disk = dir.join("disk");
        stores.push((
            format!("disk cache {}", disk.display()),
            fill(&disk, chance, blobs),
        ));
        chain.push(options(&format!("file://{}", disk.display())));
    }
    let is_silent = chance.below(3) == 0;
    while stores.len() < 2 || stores.len() < 3 && chance.below(2) == 0 {
        let server = EmbeddedCache::builder().start().await.unwrap();
        let held = arm(&server, chance, blobs, is_silent);
        stores.push((server.endpoint(), held));
        chain.push(options(&server.endpoint()));
        servers.push(server);
    }
    Stores {
        servers,
        all: stores,
        cache: SourceCache::chain(chain).unwrap(),
    }
}

/// Wants all blobs in a directory, and gives how each ended.
async fn materialize(stores: &Stores, out: &Path, blobs: &[Vec<u8>]) -> BTreeMap<usize, Outcome> {
    let options = MaterializeOptions {
        writers: 2,
        small_limit: SMALL,
        batch_bytes: 3 * SMALL,
        batch_count: 5,
        ..MaterializeOptions::default()
    };
    let materializer = Materializer::start(options, Metrics::default()).unwrap();
    let root = OutputRoot::open(out, true).unwrap();
    let session = |completions| Session {
        root: Arc::new(Root {
            id: 0,
            place: Arc::new(root),
            epoch: Epoch::new(),
        }),
        version: 0,
        store: stores.cache.blobs(),
        attribution: Arc::new(Attribution::default()),
        served: None,
        trace: None,
        completions,
    };
    let want = |(number, bytes): (usize, &Vec<u8>)| {
        let content = OutputContent::Blob(Digest::of(DigestFunction::Sha256, bytes));
        let path = ExecPath::new(&format!("d{}/{number}", number % 3)).unwrap();
        Want::new(path, content, Class::Required, None)
    };
    let wants = blobs.iter().enumerate().map(want).collect();
    let mut request = materializer.request(session, wants).await;
    let mut ends = BTreeMap::new();
    while let Some(list) = request.next().await {
        for end in list {
            let name = end.path.as_str().rsplit('/').next().unwrap();
            let earlier = ends.insert(name.parse().unwrap(), end.outcome);
            assert!(earlier.is_none(), "{name} ended twice");
        }
    }
    materializer.close().await;
    ends
}

/// Whether a file is what it should be, and was named rightly; the reason if not.
fn check(stores: &Stores, number: usize, file: &PathBuf, bytes: &[u8], end: &Outcome) -> Result<(), String> {
    let held: Vec<(&str, Holds)> = stores
        .all
        .iter()
        .map(|(name, held)| (&**name, held[number]))
        .collect();
    let has_silence = |name: &str| {
        let (_, held) = stores.all.iter().find(|(known, _)| known == name).unwrap();
        held.contains(&Holds::Silent)
    };
    let found = std::fs::read(file).ok();
    if found.as_deref().is_some_and(|found| found != bytes) {
        return Err("wrong bytes".to_owned());
    }
    let is_sure = held
        .iter()
        .any(|(name, holds)| matches!(holds, Holds::Well | Holds::Once) && !has_silence(name));
    match end {
        Outcome::Downloaded { store, .. } => {
            let store = store.as_deref().ok_or("no store is named")?;
            let holds = held
                .iter()
                .find(|(name, _)| *name == store)
                .map(|(_, holds)| *holds);
            if found.is_none() || !matches!(holds, Some(Holds::Well | Holds::Once)) {
                return Err(format!("it is not from {store}"));
            }
        }
        _ if found.is_some() => return Err("a file that is not reported".to_owned()),
        _ if is_sure => return Err("a store has it".to_owned()),
        Outcome::Evicted(_) if held.iter().any(|(_, holds)| *holds != Holds::Not) => {
            return Err("evicted, although not every store says so".to_owned());
        }
        _ => {}
    }
    Ok(())
}

async fn case(seed: u64) {
    let mut chance = Chance::new(seed);
    let dir = tempfile::tempdir().unwrap();
    let blobs: Vec<Vec<u8>> = (0..chance.between(5, 60))
        .map(|number| {
            let most = chance.pick(&[20, SMALL, 5 * SMALL]);
            let length = chance.between(9, most) as usize;
            let mut bytes = chance.bytes(length);
            // No two are the same.
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            bytes
        })
        .collect();
    let stores = stores(&mut chance, dir.path(), &blobs).await;
    let out = dir.path().join("out");
    let materialized = materialize(&stores, &out, &blobs);
    let ends = tokio::time::timeout(Duration::from_secs(300), materialized).await;
    let ends = ends.unwrap_or_else(|_| panic!("OUTHAUL_FAULT_SEED={seed}: it does not end"));
    assert_eq!(ends.len(), blobs.len(), "OUTHAUL_FAULT_SEED={seed}");
    for (number, bytes) in blobs.iter().enumerate() {
        let file = out.join(format!("d{}/{number}", number % 3));
        if let Err(why) = check(&stores, number, &file, bytes, &ends[&number]) {
            let held: Vec<_> = stores
                .all
                .iter()
                .map(|(name, held)| (name, held[number]))
                .collect();
            panic!(
                "OUTHAUL_FAULT_SEED={seed}: blob {number}: {why}\n{:?}\n{held:?}",
                ends[&number]
            );
        }
    }
    for server in stores.servers {
        let stats = server.stats();
        let asked = stats.batch_read_blobs + stats.stream_reads;
        let most = ASKED * blobs.len() as u64;
        assert!(asked <= most, "OUTHAUL_FAULT_SEED={seed}: {asked} requests");
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_faulty_stores_leave_every_file_right_or_absent_and_name_the_store() {
    let cases = number("OUTHAUL_FAULT_CASES").unwrap_or(24);
    let first = number("OUTHAUL_FAULT_SEED").unwrap_or_else(super::some_seed);
    println!("{cases} chains from OUTHAUL_FAULT_SEED={first}");
    for seed in first..first + cases {
        case(seed).await;
    }
}
