//! E: a stream that names very many files, of which none is downloaded.

use anyhow::Result;

use crate::{
    cache::Cache,
    events::Stream,
    options::Options,
    rig::{Rig, bytes_below},
    samples::{Goals, Samples, Table, compare, note, rows},
    say,
    tree::Shape,
};

/// Files of a target's own set.
const FILES: usize = 50;
const MIB: f64 = (1 << 20) as f64;

/// The shape of E.
pub(crate) fn shape(targets: usize) -> Shape {
    Shape {
        folders: targets,
        files: FILES,
        sizes: 1024..=4096,
        distinct: None,
        nested: true,
        known_only: true,
    }
}

pub(crate) fn measure(options: &Options, rig: &mut Rig, cache: &Cache, goals: &mut Goals) -> Result<()> {
    say("E: making the events");
    let tree = shape(options.scaled(20_000)).make()?;
    let stream = Stream::new(&tree, rig.setting(cache));
    let (targets, files) = (tree.folders.len(), tree.count() as f64);
    drop(tree);
    let mut samples = Samples::default();
    for round in 0..=options.rounds {
        rig.in_turns(round, |rig| {
            rig.fresh()?;
            let daemon = rig.serve(cache, &["--download=minimal"])?;
            note(&mut samples, &rig.name("E"), rig.play(&daemon, cache, &stream)?);
            daemon.process.stop();
            samples.add(rig.name("state"), bytes_below(&rig.state())? / MIB);
            Ok(())
        })?;
        if round == 0 {
            samples.clear();
        } else {
            say(&format!("E: round {round} of {}", options.rounds));
        }
    }
    rig.fresh()?;
    let title = format!("E: {files} files in nested sets of {targets} targets, all only known");
    let table = Table::new(&title, &["what", "result"])?;
    rows(&table, &samples, "E", "outhaul")?;
    table.figures("journal and record on disk", samples.get("state"), 0, " MiB")?;
    let rate: Vec<f64> = samples.get("E rest").iter().map(|s| files / s / 1e3).collect();
    table.figures(
        "**known files per second, until the daemon is idle**",
        &rate,
        0,
        " thousand",
    )?;
    let memory: Vec<f64> = samples.get("E peak").iter().map(|p| p * MIB / files).collect();
    table.figures("**peak memory per file**", &memory, 0, " bytes")?;
    goals.at_least("E: known files per second", rate, 500.0, " thousand");
    goals.at_most("E: peak memory per file", memory, 400.0, " bytes");
    compare(&samples, &[("E", "E")])
}
