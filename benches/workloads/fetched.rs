//! M, L and D: fetched with nothing there.

use anyhow::Result;

use crate::{
    beside::Beside,
    cache::{Cache, Kind},
    events::Stream,
    options::{Options, Workload},
    peers::Peers,
    plain,
    rig::Rig,
    samples::{Goals, Samples, Table, compare, note, rows},
    say,
    small::MEMORY,
    tree::{Shape, Tree},
};

const MIB: f64 = (1 << 20) as f64;

/// A workload by numbers.
struct Plan {
    name: &'static str,
    shape: Shape,
    /// Most times the limit program's wall time, with the embedded cache.
    limit: Option<f64>,
    /// Whether the peers fetch it too.
    peers: bool,
}

/// A tree, and the build that makes it.
struct Played {
    tree: Tree,
    stream: Stream,
}

fn plan(options: &Options, workload: Workload) -> Plan {
    let shape = Shape {
        folders: options.scaled(50),
        files: 100,
        sizes: 200 << 10..=200 << 10,
        distinct: None,
        nested: false,
        known_only: false,
    };
    match workload {
        Workload::L => {
            let size = options.scaled(1 << 30);
            Plan {
                name: "L",
                shape: Shape {
                    folders: 4,
                    files: 1,
                    sizes: size..=size,
                    ..shape
                },
                limit: Some(2.5),
                peers: true,
            }
        }
        Workload::D => Plan {
            name: "D",
            shape: Shape {
                folders: options.scaled(500),
                sizes: 1024..=4096,
                distinct: Some(options.scaled(5000)),
                ..shape
            },
            limit: None,
            peers: false,
        },
        _ => Plan {
            name: "M",
            shape,
            limit: None,
            peers: true,
        },
    }
}

pub(crate) fn measure(
    options: &Options,
    workload: Workload,
    rig: &mut Rig,
    cache: &Cache,
    goals: &mut Goals,
) -> Result<()> {
    let plan = plan(options, workload);
    let name = plan.name;
    say(&format!("{name}: making the files"));
    let made = |shape: &Shape, rig: &Rig| -> Result<Played> {
        let tree = shape.make()?;
        cache.fill(&rig.player, tree.blobs())?;
        let stream = Stream::new(&tree, rig.setting(cache));
        Ok(Played { tree, stream })
    };
    let played = made(&plan.shape, rig)?;
    // What D is compared with: as many bytes to write, but each file's are its own.
    let undivided = match plan.shape.distinct {
        Some(_) => Some(made(
            &Shape {
                distinct: None,
                ..plan.shape.clone()
            },
            rig,
        )?),
        None => None,
    };
    let mut peers = (plan.peers && options.has_peers())
        .then(|| Peers::ready(rig, cache, &played.tree))
        .transpose()?;
    let beside = Beside::ready(rig, cache, &played.tree)?;
    let folders = played.tree.plain();
    let mut samples = Samples::default();
    for round in 0..=options.rounds {
        let warm_up = round == 0;
        if round.is_multiple_of(2) {
            limit(rig, &folders, &mut samples)?;
        }
        rig.in_turns(round, |rig| {
            ours(rig, cache, &played, name, warm_up, &mut samples)
        })?;
        if let Some(undivided) = &undivided {
            ours(rig, cache, undivided, "undivided", warm_up, &mut samples)?;
        }
        beside.round(rig, &played.tree, name, warm_up, &mut samples)?;
        if let Some(peers) = &mut peers {
            peers.round(rig, &played.tree, round, name, &mut samples)?;
        }
        if !round.is_multiple_of(2) {
            limit(rig, &folders, &mut samples)?;
        }
        if warm_up {
            samples.clear();
        } else {
            say(&format!("{name}: round {round} of {}", options.rounds));
        }
    }

    let (files, bytes) = (played.tree.count(), played.tree.bytes() as f64 / MIB);
    let distinct = played.tree.distinct();
    let title = format!("{name}: {files} files, {bytes:.0} MiB, {distinct} contents");
    let table = Table::new(&title, &["what", "result"])?;
    rows(&table, &samples, name, "outhaul, cold")?;
    let rate: Vec<f64> = samples
        .get(&format!("{name} wall"))
        .iter()
        .map(|s| bytes / s)
        .collect();
    table.figures("… per second", &rate, 0, " MiB")?;
    table.figures(
        "limit program: hash, create, write",
        samples.get("limit"),
        3,
        " s",
    )?;
    let ratio = samples.ratio(&format!("{name} wall"), "limit");
    table.figures("**outhaul / limit program**", &ratio, 2, "")?;
    if let (Some(most), Kind::Embedded) = (plan.limit, options.cache) {
        goals.at_most(&format!("{name} / limit program"), ratio, most, "");
    }
    if undivided.is_some() {
        rows(
            &table,
            &samples,
            "undivided",
            "outhaul, each file with its own content",
        )?;
        let ratio = samples.ratio(&format!("{name} wall"), "undivided wall");
        table.figures("**D / each file with its own content**", &ratio, 2, "")?;
        goals.at_most("D / the same files with contents of their own", ratio, 1.0, "");
        let transfers: Vec<f64> = samples
            .get(&format!("{name} blobs"))
            .iter()
            .map(|blobs| blobs / distinct as f64)
            .collect();
        table.figures("requested blobs / distinct digests", &transfers, 4, "")?;
        goals.at_most("D: requested blobs / distinct digests", transfers, 1.0, "");
    } else {
        goals.at_most(
            &format!("{name}: peak memory"),
            samples.get(&format!("{name} peak")).to_vec(),
            MEMORY,
            " MiB",
        );
    }
    beside.report(&table, &samples, name, goals)?;
    if let Some(peers) = &peers {
        peers.report(&table, &samples, name, goals)?;
    }
    compare(&samples, &[(name, name)])
}

fn limit(rig: &Rig, folders: &[plain::Folder], samples: &mut Samples) -> Result<()> {
    let plain = rig.base().join("plain");
    samples.add("limit", plain::create(&plain, folders)?.as_secs_f64());
    Ok(std::fs::remove_dir_all(plain)?)
}

fn ours(
    rig: &mut Rig,
    cache: &Cache,
    played: &Played,
    name: &str,
    contents: bool,
    samples: &mut Samples,
) -> Result<()> {
    rig.fresh()?;
    let daemon = rig.serve(cache, &[])?;
    note(
        samples,
        &rig.name(name),
        rig.play(&daemon, cache, &played.stream)?,
    );
    played.tree.check(&rig.exec_root(), contents)?;
    rig.fresh()
}
