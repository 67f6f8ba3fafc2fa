//! A build with Outhaul leaves on disk what the same Bazel alone would have left, whatever its configuration.
//!
//! Every configuration is built twice by a real Bazel, alone and with Outhaul, from the same state of the tree and of the
//! cache: the exit codes are the same, and whatever is there after the first is there after the second, with the same
//! bytes, modes and targets of links. They are chosen so that all pairs of values of [`FACTORS`](config::FACTORS) occur.
//!
//! `OUTHAUL_ALIKE_CASES=N` tries N of them by lot instead (`scripts/alike`), `OUTHAUL_ALIKE_SEED` repeats the choice, and
//! `OUTHAUL_ALIKE='command:test cache:disk'` tries that one, with the first value of whatever is not named.

mod config;
mod side;

use std::time::Instant;

use outhaul_testkit::number;
use rand::{SeedableRng as _, rngs::StdRng};

use self::{
    config::{Config, Urls},
    side::{Ground, Left, Side},
};
use crate::harness::{Cache, CacheKind, Daemon, Scratch, Stage, Upstream};

/// A test that passes is to pass again; `scripts/alike` looks further.
const SEED: u64 = 13;

for_each_bazel!(embedded: a_build_leaves_what_bazel_alone_leaves);

fn configurations(seed: u64) -> Vec<Config> {
    if let Ok(text) = std::env::var("OUTHAUL_ALIKE") {
        return vec![Config::parse(&text)];
    }
    let random = &mut StdRng::seed_from_u64(seed);
    let mut chosen = match number("OUTHAUL_ALIKE_CASES") {
        Some(cases) => (0..cases).map(|_| Config::random(random)).collect(),
        None => Config::all_pairs(random),
    };
    // Each umask is that of a server of its own.
    chosen.sort_by_key(|config| config.get("umask"));
    chosen
}

fn a_build_leaves_what_bazel_alone_leaves(stage: &Stage) {
    let seed = number("OUTHAUL_ALIKE_SEED").unwrap_or(SEED);
    let cache = stage.cache();
    // Without one of these peers, that cache is another of the same sort.
    let or_embedded = |kind: CacheKind| {
        Cache::start(if kind.is_there() {
            kind
        } else {
            CacheKind::Embedded
        })
    };
    let (casd, http) = (or_embedded(CacheKind::Casd), or_embedded(CacheKind::Nginx));
    let upstream = Upstream::start();
    let dir = Scratch::new("alike");
    let urls = Urls {
        grpc: cache.url().to_owned(),
        casd: casd.url().to_owned(),
        http: http.url().to_owned(),
        disk: dir.join("disk").display().to_string(),
        backend: upstream.flag().replace("--bes-backend", "--bes_backend"),
        json: dir.join("events.json").display().to_string(),
    };
    let allowed = format!("--allow-remote-cache={},{},{}", urls.grpc, urls.casd, urls.http);
    let daemon = Daemon::with(&["--remote-cache=from-build", &allowed]);
    let mut bazel = stage.bazel(&cache);
    // Its server has whichever umask was the last.
    bazel.keep_out();
    let mut ground = Ground::new(&bazel, &dir, &urls, daemon.bes());
    let configurations = configurations(seed);
    eprintln!(
        "{:?}: OUTHAUL_ALIKE_SEED={seed}, {} configurations",
        stage.version,
        configurations.len()
    );
    let mut wrong = Vec::new();
    for (number, config) in configurations.iter().enumerate() {
        let began = Instant::now();
        ground.fill(config);
        let alone = ground.left(config, Side::Alone);
        let with = ground.left(config, Side::With);
        let differences = alone.lacks(&with, config);
        let verdict = if differences.is_empty() {
            "alike"
        } else {
            "NOT ALIKE"
        };
        eprintln!(
            "{:?} {number}: {verdict}, {:.1?}: {config}",
            stage.version,
            began.elapsed()
        );
        if !differences.is_empty() {
            let report = report(config, &differences, &alone, &with);
            eprintln!("{report}");
            wrong.push(report);
        }
    }
    assert!(
        wrong.is_empty(),
        "OUTHAUL_ALIKE_SEED={seed}: {} of {} configurations are not alike\n\n{}",
        wrong.len(),
        configurations.len(),
        wrong.join("\n\n")
    );
}

fn report(config: &Config, differences: &[String], alone: &Left, with: &Left) -> String {
    format!(
        "OUTHAUL_ALIKE='{config}'\n{}\n-- alone: {}\n-- with Outhaul: {}",
        differences.join("\n"),
        alone.run,
        with.run
    )
}
