//! What lies on disk after many builds, each of which changes something else.

use anyhow::Result;

use crate::{
    cache::Cache,
    events::Stream,
    options::Options,
    rig::{Rig, bytes_below},
    samples::Table,
    say, small,
};

/// Builds, one after the other.
const BUILDS: usize = 100;
/// After which the sizes are printed.
const PRINTED: [usize; 7] = [0, 1, 10, 25, 50, 75, 100];
const MIB: f64 = (1 << 20) as f64;

pub(crate) fn measure(options: &Options, rig: &mut Rig, cache: &Cache) -> Result<()> {
    say("growth: making the files");
    let mut tree = small::shape(options.scaled(1000)).make()?;
    cache.fill(&rig.player, tree.blobs())?;
    rig.fresh()?;
    let mut daemon = rig.serve(cache, &[])?;
    let mut rows = Vec::new();
    for build in 0..=BUILDS {
        if build > 0 {
            let changed = tree.changed(small::CHANGED, build as u64);
            tree.remove_changed(&changed, &rig.exec_root())?;
            let blobs = tree.leaves().zip(changed.leaves());
            let new = blobs.filter(|((_, old), (_, new))| old.digest != new.digest);
            let new = new.map(|(_, (_, file))| (file.digest.clone(), file.bytes.clone()));
            cache.fill(&rig.player, new)?;
            tree = changed;
        }
        let cost = rig.play(&daemon, cache, &Stream::new(&tree, rig.setting(cache)))?;
        if !PRINTED.contains(&build) {
            continue;
        }
        tree.check(&rig.exec_root(), false)?;
        // Closed properly, so that nothing is still to be written.
        daemon.process.stop();
        let journal = bytes_below(&rig.state().join("journal"))?;
        rows.push((build, cost.wall, journal, bytes_below(&rig.state())? - journal));
        daemon = rig.serve(cache, &[])?;
        say(&format!("growth: build {build} of {BUILDS}"));
    }
    drop(daemon);
    rig.fresh()?;
    let table = Table::new(
        &format!("{} files, 1 % changed in every build", tree.count()),
        &["builds of R after S", "wall time", "journals", "record"],
    )?;
    for (build, wall, journal, record) in rows {
        table.row(&[
            &build.to_string(),
            &format!("{wall:.3} s"),
            &format!("{:.1} MiB", journal / MIB),
            &format!("{:.1} MiB", record / MIB),
        ])?;
    }
    Ok(())
}
