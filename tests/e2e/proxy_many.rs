//! Many large builds at once. Needs no peers: the builds are generated.

use std::collections::BTreeMap;

use outhaul::demo::{Setting, Shape, play};
use outhaul_testkit::{cache::EmbeddedCache, eventually, status};

use crate::harness::{Daemon, Scratch, Upstream, has_all};

const STREAMS: u64 = 50;
/// Of resident memory, at its highest.
const MEMORY: u64 = 512 << 20;

#[test]
fn fifty_large_builds_settle_in_bounded_memory() {
    // Fewer where time is short.
    let targets = if has_all() { 2000 } else { 500 };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let dir = Scratch::new("many");
    let cache = runtime.block_on(EmbeddedCache::builder().start()).unwrap();
    let upstream = Upstream::start();
    let daemon = Daemon::with(&[
        &format!("--remote-cache={}", cache.endpoint()),
        "--hold=target",
        "--log=warn,outhaul::cli=info",
        &upstream.flag(),
    ]);
    let endpoint = daemon.bes().trim_start_matches("--bes_backend=").to_owned();
    let shape = Shape {
        targets,
        files_per_target: 1,
        file_size: 64,
        ..Shape::default()
    };
    let build = shape.fill(|bytes| cache.store().put(bytes));
    let settings: BTreeMap<String, Setting> = (0..STREAMS)
        .map(|number| {
            let root = dir.join(format!("{number}/execroot/_main"));
            std::fs::create_dir_all(&root).unwrap();
            let setting = Setting {
                workspace: dir.join(format!("{number}/workspace")).display().to_string(),
                exec_root: root.display().to_string(),
                remote_cache: cache.endpoint(),
                instance_name: String::new(),
            };
            (build.invocation_id(number), setting)
        })
        .collect();
    let messages: BTreeMap<String, usize> = runtime.block_on(async {
        let mut playing = tokio::task::JoinSet::new();
        for (number, (id, setting)) in settings.clone().into_iter().enumerate() {
            let (endpoint, build) = (endpoint.clone(), build.clone());
            playing.spawn(async move {
                let events = build.events(&setting, &id);
                let report = play(&endpoint, &id, &format!("build-{number}"), events)
                    .await
                    .unwrap();
                (id, usize::try_from(report.messages).unwrap())
            });
        }
        playing.join_all().await.into_iter().collect()
    });
    let peak = status(daemon.pid(), "VmHWM").unwrap() << 10;
    assert!(peak > 0 && peak < MEMORY, "{} MiB at the highest", peak >> 20);

    let statuses = daemon.outhaul().json(dir.path(), "status", &["--limit", "100"]);
    assert_eq!(statuses.len() as u64, STREAMS);
    for status in &statuses {
        assert!(
            status["state"] == "settled" && status["failed"] == 0 && status["pending"] == 0,
            "{status:#}"
        );
        let placed = status["downloaded"].as_u64().unwrap() + status["present"].as_u64().unwrap();
        assert_eq!(placed, targets as u64, "{status:#}");
    }
    for (id, setting) in &settings {
        for (path, digest) in build.outputs() {
            let path = std::path::Path::new(&setting.exec_root).join(path);
            let size = std::fs::metadata(&path)
                .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
                .len();
            assert_eq!(size, digest.size());
        }
        let stream = upstream.complete(id, || daemon.log());
        assert_eq!(stream.len(), messages[id]);
    }
    runtime.block_on(cache.stop());
    let peak = status(daemon.pid(), "VmHWM").unwrap() << 10;
    // What is known of the builds stays for some minutes; without giving anything back, all of it would.
    let mut idle = peak;
    eventually("memory goes back when nothing is left to do", || {
        idle = status(daemon.pid(), "VmRSS").unwrap() << 10;
        idle < peak / 100 * 85
    });
    eprintln!(
        "the daemon used {} MiB at the highest, and {} MiB when it was idle",
        peak >> 20,
        idle >> 20
    );
}
