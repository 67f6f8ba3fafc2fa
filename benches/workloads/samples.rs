//! What was measured, and the tables of it.

use std::{
    collections::BTreeMap,
    io::{Write as _, stdout},
};

use anyhow::Result;

use crate::{
    plain::{median, spread},
    rig::Cost,
};

const MIB: f64 = (1 << 20) as f64;

/// Figures by name, one of each round.
#[derive(Debug, Default)]
pub(crate) struct Samples(BTreeMap<String, Vec<f64>>);

impl Samples {
    pub(crate) fn add(&mut self, name: impl Into<String>, value: f64) {
        self.0.entry(name.into()).or_default().push(value);
    }

    pub(crate) fn get(&self, name: &str) -> &[f64] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// Forgets a warm-up.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// One figure over another, round by round.
    pub(crate) fn ratio(&self, name: &str, other: &str) -> Vec<f64> {
        let pairs = self.get(name).iter().zip(self.get(other));
        pairs.map(|(one, two)| one / two).collect()
    }
}

/// A Markdown table, printed row by row.
#[derive(Debug)]
pub(crate) struct Table;

impl Table {
    pub(crate) fn new(title: &str, columns: &[&str]) -> Result<Self> {
        let mut out = stdout().lock();
        writeln!(out, "\n### {title}\n")?;
        writeln!(out, "| {} |", columns.join(" | "))?;
        writeln!(out, "|{}", "---|".repeat(columns.len()))?;
        Ok(Self)
    }

    /// A row of figures as `median (least to greatest)`; none if nothing was measured.
    pub(crate) fn figures(&self, what: &str, values: &[f64], digits: usize, unit: &str) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        let figure = spread(values, digits);
        Ok(self.row(&[what, &format!("{figure}{unit}")])?)
    }

    pub(crate) fn row(&self, cells: &[&str]) -> std::io::Result<()> {
        let mut out = stdout().lock();
        writeln!(out, "| {} |", cells.join(" | "))?;
        out.flush()
    }
}

/// Notes what a play took under names of its own.
pub(crate) fn note(samples: &mut Samples, name: &str, cost: Cost) {
    samples.add(format!("{name} wall"), cost.wall);
    samples.add(format!("{name} rest"), cost.rest);
    samples.add(format!("{name} cpu"), cost.cpu);
    samples.add(format!("{name} cache"), cost.cache_cpu);
    samples.add(format!("{name} player"), cost.player_cpu);
    samples.add(format!("{name} peak"), cost.peak / MIB);
    if let Some(blobs) = cost.blobs {
        samples.add(format!("{name} blobs"), blobs as f64);
    }
    samples.add(format!("{name} grown"), cost.peak - cost.before);
}

/// Begins the names of the other program's figures.
pub(crate) const AGAINST: &str = "against ";

/// A table of what the other program took for the same, if there is one.
pub(crate) fn compare(samples: &Samples, names: &[(&str, &str)]) -> Result<()> {
    let there = |name: &str| !samples.get(&format!("{AGAINST}{name} wall")).is_empty();
    if !names.iter().any(|(name, _)| there(name)) {
        return Ok(());
    }
    let columns = ["what", "this program", "the other", "this / the other"];
    let table = Table::new("Against another build of outhaul", &columns)?;
    for (name, what) in names.iter().filter(|(name, _)| there(name)) {
        for (figure, called, unit) in [
            ("wall", "wall time", " s"),
            ("cpu", "processor time", " s"),
            ("peak", "peak memory", " MiB"),
        ] {
            let (mine, theirs) = (format!("{name} {figure}"), format!("{AGAINST}{name} {figure}"));
            table.row(&[
                &format!("{what}: {called}"),
                &format!("{}{unit}", spread(samples.get(&mine), 3)),
                &format!("{}{unit}", spread(samples.get(&theirs), 3)),
                &spread(&samples.ratio(&mine, &theirs), 3),
            ])?;
        }
    }
    Ok(())
}

/// The rows that a play consists of.
pub(crate) fn rows(table: &Table, samples: &Samples, name: &str, what: &str) -> Result<()> {
    let get = |figure: &str| samples.get(&format!("{name} {figure}"));
    table.figures(&format!("{what}: wall time"), get("wall"), 3, " s")?;
    table.figures("… until the daemon is idle", get("rest"), 3, " s")?;
    table.figures("… processor time of the daemon", get("cpu"), 2, " s")?;
    table.figures("… of the cache", get("cache"), 2, " s")?;
    table.figures("… of the player", get("player"), 2, " s")?;
    table.figures("… requested blobs", get("blobs"), 0, "")?;
    table.figures("… peak memory of the daemon", get("peak"), 0, " MiB")
}

/// The goals, with what came out.
#[derive(Debug, Default)]
pub(crate) struct Goals(Vec<Goal>);

#[derive(Debug)]
struct Goal {
    what: String,
    values: Vec<f64>,
    limit: f64,
    at_least: bool,
    unit: &'static str,
}

impl Goals {
    /// A figure that may at most be so much.
    pub(crate) fn at_most(&mut self, what: &str, values: Vec<f64>, limit: f64, unit: &'static str) {
        self.add(what, values, limit, unit, false);
    }

    /// A figure that must at least be so much.
    pub(crate) fn at_least(&mut self, what: &str, values: Vec<f64>, limit: f64, unit: &'static str) {
        self.add(what, values, limit, unit, true);
    }

    fn add(&mut self, what: &str, values: Vec<f64>, limit: f64, unit: &'static str, at_least: bool) {
        if !values.is_empty() {
            self.0.push(Goal {
                what: what.to_owned(),
                values,
                limit,
                at_least,
                unit,
            });
        }
    }

    /// Prints the table; gives whether all were reached.
    pub(crate) fn print(&self) -> Result<bool> {
        if self.0.is_empty() {
            return Ok(true);
        }
        let table = Table::new("Goals", &["what", "result", "goal", "reached"])?;
        let mut all = true;
        for goal in &self.0 {
            let median = median(&goal.values).unwrap_or(f64::NAN);
            let reached = if goal.at_least {
                median >= goal.limit
            } else {
                median <= goal.limit
            };
            all &= reached;
            let bound = if goal.at_least { "at least" } else { "at most" };
            table.row(&[
                &goal.what,
                &format!("{}{}", spread(&goal.values, 2), goal.unit),
                &format!("{bound} {}{}", goal.limit, goal.unit),
                if reached { "yes" } else { "**no**" },
            ])?;
        }
        Ok(all)
    }
}
