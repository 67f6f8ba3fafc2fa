//! What builds cost as they grow.

use anyhow::Result;

use crate::{
    cache::Cache,
    events::Stream,
    known,
    options::Options,
    plain::spread,
    rig::Rig,
    samples::{Samples, Table, note},
    say, small,
};

/// Numbers of files.
const STEPS: [usize; 4] = [1_000, 10_000, 100_000, 1_000_000];
/// Beyond, files are only known: they would fill the memory that they are to lie in.
const MOST_FETCHED: usize = 100_000;

pub(crate) fn measure(options: &Options, rig: &mut Rig, cache: &Cache) -> Result<()> {
    let mut rows = Vec::new();
    for files in STEPS.map(|step| options.scaled(step)) {
        say(&format!("scale: {files} files"));
        let mut samples = Samples::default();
        if files <= MOST_FETCHED {
            let tree = small::shape((files / 100).max(1)).make()?;
            cache.fill(&rig.player, tree.blobs())?;
            let stream = Stream::new(&tree, rig.setting(cache));
            for _ in 0..options.rounds {
                rig.fresh()?;
                let daemon = rig.serve(cache, &[])?;
                note(&mut samples, "S", rig.play(&daemon, cache, &stream)?);
                tree.check(&rig.exec_root(), false)?;
                daemon.process.stop();
                let daemon = rig.serve(cache, &[])?;
                note(&mut samples, "N", rig.play(&daemon, cache, &stream)?);
            }
        }
        let tree = known::shape((files / 50).max(1)).make()?;
        let stream = Stream::new(&tree, rig.setting(cache));
        drop(tree);
        for _ in 0..options.rounds {
            rig.fresh()?;
            let daemon = rig.serve(cache, &["--download=minimal"])?;
            note(&mut samples, "E", rig.play(&daemon, cache, &stream)?);
        }
        rows.push((files, samples));
    }
    rig.fresh()?;
    let names = [
        ("S", "fetched, nothing there"),
        ("N", "all there, daemon just started"),
        ("E", "only known, in nested sets"),
    ];
    for (name, what) in names {
        let table = Table::new(
            &format!("As builds grow: {what}"),
            &[
                "files",
                "wall time",
                "a file",
                "processor time",
                "peak memory",
                "beyond an idle daemon's, a file",
            ],
        )?;
        for (files, samples) in &rows {
            let get = |figure: &str| samples.get(&format!("{name} {figure}"));
            if get("wall").is_empty() {
                continue;
            }
            let each = |values: &[f64], unit: f64| -> String {
                let values: Vec<f64> = values.iter().map(|v| v * unit / *files as f64).collect();
                spread(&values, 1)
            };
            table.row(&[
                &files.to_string(),
                &format!("{} s", spread(get("wall"), 3)),
                &format!("{} µs", each(get("wall"), 1e6)),
                &format!("{} s", spread(get("cpu"), 2)),
                &format!("{} MiB", spread(get("peak"), 0)),
                &format!("{} bytes", each(get("grown"), 1.0)),
            ])?;
        }
    }
    Ok(())
}
