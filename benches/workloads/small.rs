//! S, and what follows it: the same again with all present (N), with a daemon just started, and with one file in a
//! hundred changed (R).

use anyhow::Result;

use crate::{
    beside::Beside,
    cache::Cache,
    events::Stream,
    net::Delay,
    options::{Line, Options, Workload},
    peers::Peers,
    plain,
    rig::{Cost, Daemon, Rig},
    samples::{Goals, Samples, Table, compare, note, rows},
    say,
    tree::{Shape, Tree},
};

/// One in this many files is changed by R.
pub(crate) const CHANGED: usize = 100;
/// Most memory that S may take.
pub(crate) const MEMORY: f64 = 256.0;
const MIB: f64 = (1 << 20) as f64;

/// What is played.
struct Small<'a> {
    options: &'a Options,
    rig: &'a mut Rig,
    cache: &'a Cache,
    tree: Tree,
    changed: Tree,
    stream: Stream,
    changed_stream: Stream,
    folders: Vec<plain::Folder>,
    /// Lines to the cache, and the proxies that are them.
    lines: Vec<(Line, Delay)>,
    beside: Beside,
    /// Where they are installed and S is measured.
    peers: Option<Peers>,
}

/// The shape of S.
pub(crate) fn shape(folders: usize) -> Shape {
    Shape {
        folders,
        files: 100,
        sizes: 1024..=4096,
        distinct: None,
        nested: false,
        known_only: false,
    }
}

pub(crate) fn measure(options: &Options, rig: &mut Rig, cache: &Cache, goals: &mut Goals) -> Result<()> {
    say("S: making the files");
    let tree = shape(options.scaled(1000)).make()?;
    let changed = tree.changed(CHANGED, 0);
    for tree in [&tree, &changed] {
        cache.fill(&rig.player, tree.blobs())?;
    }
    let mut lines: Vec<Line> = Vec::new();
    if options.has(Workload::S) {
        for line in options.lines() {
            lines.extend(
                [line.near(), line]
                    .into_iter()
                    .filter(|l| !lines.contains(l))
                    .collect::<Vec<_>>(),
            );
        }
        lines.dedup();
    }
    let lines = lines
        .into_iter()
        .map(|line| Ok((line, Delay::start(cache.address()?, line.rtt(), line.bits)?)))
        .collect::<Result<Vec<_>>>()?;
    let peers = (options.has(Workload::S) && options.has_peers())
        .then(|| Peers::ready(rig, cache, &tree))
        .transpose()?;
    let beside = Beside::ready(rig, cache, &tree)?;
    let setting = rig.setting(cache);
    let mut small = Small {
        stream: Stream::new(&tree, setting.clone()),
        changed_stream: Stream::new(&changed, setting),
        folders: tree.plain(),
        options,
        rig,
        cache,
        tree,
        changed,
        lines,
        beside,
        peers,
    };
    let mut samples = Samples::default();
    for round in 0..=options.rounds {
        small.round(round, &mut samples)?;
        if round == 0 {
            samples.clear();
        } else {
            say(&format!("S: round {round} of {}", options.rounds));
        }
    }
    small.report(&samples, goals)
}

impl Small<'_> {
    fn round(&mut self, round: u32, samples: &mut Samples) -> Result<()> {
        // Who goes first changes from round to round.
        if round.is_multiple_of(2) {
            self.limit(samples)?;
            self.ours(round, samples)?;
        } else {
            self.ours(round, samples)?;
            self.limit(samples)?;
        }
        self.beside
            .round(self.rig, &self.tree, "S", round == 0, samples)?;
        if let Some(peers) = &mut self.peers {
            peers.round(self.rig, &self.tree, round, "S", samples)?;
        }
        self.distant(round, samples)
    }

    /// The plain programs.
    fn limit(&mut self, samples: &mut Samples) -> Result<()> {
        let plain = self.rig.base().join("plain");
        samples.add("limit", plain::create(&plain, &self.folders)?.as_secs_f64());
        samples.add("lstat", plain::look(&plain, &self.folders)?.as_secs_f64());
        Ok(std::fs::remove_dir_all(plain)?)
    }

    fn ours(&mut self, round: u32, samples: &mut Samples) -> Result<()> {
        let more = self.options.has(Workload::N) || self.options.has(Workload::R);
        let (cache, stream) = (self.cache, &self.stream);
        let (tree, changed, changed_stream) = (&self.tree, &self.changed, &self.changed_stream);
        self.rig.in_turns(round, |rig| {
            let root = rig.exec_root();
            rig.fresh()?;
            let daemon = rig.serve(cache, &[])?;
            note(samples, &rig.name("S"), rig.play(&daemon, cache, stream)?);
            tree.check(&root, round == 0)?;
            if more {
                note(samples, &rig.name("warm"), rig.play(&daemon, cache, stream)?);
                daemon.process.stop();
                let daemon = rig.serve(cache, &[])?;
                samples.add(rig.name("start"), daemon.start);
                note(samples, &rig.name("cold"), rig.play(&daemon, cache, stream)?);
                tree.remove_changed(changed, &root)?;
                note(samples, &rig.name("R"), rig.play(&daemon, cache, changed_stream)?);
                changed.check(&root, round == 0)?;
            }
            rig.fresh()
        })
    }

    /// S once more through each line.
    fn distant(&mut self, round: u32, samples: &mut Samples) -> Result<()> {
        for number in 0..self.lines.len() {
            let number = (number + round as usize) % self.lines.len();
            let Some((line, proxy)) = self.lines.get(number) else {
                continue;
            };
            self.rig.fresh()?;
            let daemon = self
                .rig
                .serve_through(self.cache, &format!("grpc://{}", proxy.addr()), &[])?;
            let name = line.name();
            note(samples, &name, self.play(&daemon)?);
            self.tree.check(&self.rig.exec_root(), round == 0)?;
        }
        self.rig.fresh()
    }

    fn play(&mut self, daemon: &Daemon) -> Result<Cost> {
        self.rig.play(daemon, self.cache, &self.stream)
    }

    fn report(&self, samples: &Samples, goals: &mut Goals) -> Result<()> {
        let files = self.tree.count();
        let title = format!(
            "S: {files} files of 1 to 4 KiB in {} directories, {:.0} MiB",
            self.tree.folders.len(),
            self.tree.bytes() as f64 / MIB
        );
        let per_second = |name: &str| -> Vec<f64> {
            let values = samples.get(name).iter();
            values.map(|seconds| files as f64 / seconds / 1e3).collect()
        };
        let table = Table::new(&title, &["what", "result"])?;
        rows(&table, samples, "S", "outhaul, cold")?;
        table.figures("… per second", &per_second("S wall"), 1, " thousand files")?;
        table.figures(
            "limit program: hash, create, write",
            samples.get("limit"),
            3,
            " s",
        )?;
        let ratio = samples.ratio("S wall", "limit");
        table.figures("**outhaul / limit program**", &ratio, 2, "")?;
        for (line, _) in &self.lines {
            let name = line.name();
            table.figures(
                &format!("outhaul, {name}"),
                samples.get(&format!("{name} wall")),
                3,
                " s",
            )?;
            table.figures(
                "… processor time of the daemon",
                samples.get(&format!("{name} cpu")),
                2,
                " s",
            )?;
        }
        if self.options.cache == crate::Kind::Embedded && self.options.has(Workload::S) {
            goals.at_most("S / limit program", ratio, 2.0, "");
        }
        if self.options.has(Workload::S) {
            goals.at_most("S: peak memory", samples.get("S peak").to_vec(), MEMORY, " MiB");
            for (line, _) in self.lines.iter().filter(|(line, _)| *line != line.near()) {
                let ratio = samples.ratio(
                    &format!("{} wall", line.name()),
                    &format!("{} wall", line.near().name()),
                );
                goals.at_most(&format!("S, {} / 0 ms", line.name()), ratio, 1.5, "");
            }
        }
        if self.options.has(Workload::S) {
            self.beside.report(&table, samples, "S", goals)?;
        }
        if let Some(peers) = &self.peers {
            peers.report(&table, samples, "S", goals)?;
        }
        self.report_again(samples, goals)
    }

    /// N and R.
    fn report_again(&self, samples: &Samples, goals: &mut Goals) -> Result<()> {
        let names = [
            ("S", "S"),
            ("warm", "N, warm"),
            ("cold", "N, just started"),
            ("R", "R"),
        ];
        compare(samples, &names)?;
        if samples.get("warm wall").is_empty() {
            return Ok(());
        }
        if self.options.has(Workload::N) {
            let table = Table::new("N: S again, with everything present", &["what", "result"])?;
            rows(&table, samples, "warm", "outhaul, warm")?;
            rows(&table, samples, "cold", "outhaul, just started")?;
            table.figures("… starting it on the record", samples.get("start"), 3, " s")?;
            table.figures("limit program: `lstat`", samples.get("lstat"), 3, " s")?;
            let ratio = samples.ratio("warm wall", "lstat");
            table.figures("**outhaul, warm / `lstat`**", &ratio, 2, "")?;
            let cold = samples.ratio("cold wall", "lstat");
            table.figures("outhaul, just started / `lstat`", &cold, 2, "")?;
            goals.at_most("N, warm / two-thread lstat", ratio, 3.0, "");
        }
        if self.options.has(Workload::R) {
            let table = Table::new("R: S with 1 % of its contents changed", &["what", "result"])?;
            rows(&table, samples, "R", "outhaul")?;
            let bound = samples.get("S wall").iter().zip(samples.get("warm wall"));
            let bound: Vec<f64> = bound.map(|(s, n)| 0.05 * s + n).collect();
            let ratio: Vec<f64> = samples
                .get("R wall")
                .iter()
                .zip(&bound)
                .map(|(r, b)| r / b)
                .collect();
            table.figures("**R / (0.05 × S + N)**", &ratio, 2, "")?;
            goals.at_most("R / (0.05 × S + N)", ratio, 1.0, "");
        }
        Ok(())
    }
}
