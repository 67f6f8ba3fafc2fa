//! Archives of a bucket, unpacked into one tree: `outhaul fetch archive --flatten`, rclone with tar after it, and TheRock's
//! script where its checkout is given.

use std::{
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use outhaul::digest::{Digest, DigestFunction};
use outhaul_testkit::{
    cpu,
    stores::{BUCKET, KEYS, Store, StoreKind},
};

use crate::{
    cache::{find, require},
    options::{Options, Packing},
    process::{Ended, run, watched},
    rig::{Rig, remove},
    samples::{Goals, Samples, Table},
    say,
    small::MEMORY,
    tree::letters,
};

const MIB: f64 = (1 << 20) as f64;
/// Archives, and files in each.
const ARCHIVES: usize = 20;
const FILES: usize = 500;
/// Bytes of a file: half as many when they are compressed, so that an archive has 100 MiB.
const SIZE: usize = 2 * (100 << 20) / FILES;
/// Archives that every program downloads, and unpacks, at the same time.
const JOBS: &str = "10";
/// The run whose archives they are, as TheRock's pipelines name it.
const RUN: &str = "12345-linux";
/// The directory of an archive's members that is cut from their names.
const STAGE: &str = "lib/stage";
/// Runs TheRock's script on our bucket without asking GitHub where the run's artifacts are.
const THEROCK: &str = "
import sys
checkout, bucket, run_id, *arguments = sys.argv[1:]
sys.path.insert(0, checkout + '/build_tools')
import fetch_artifacts
from _therock_utils.workflow_outputs import WorkflowOutputRoot
root = WorkflowOutputRoot(bucket=bucket, external_repo='', run_id=run_id, platform='linux')
WorkflowOutputRoot.from_workflow_run = classmethod(lambda cls, **_: root)
fetch_artifacts.main(['--run-id', run_id, *arguments])
";

/// A program that fetches and unpacks all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Ours,
    Rclone,
    TheRock,
}

impl Way {
    const fn name(self) -> &'static str {
        match self {
            Self::Ours => "outhaul fetch archive",
            Self::Rclone => "rclone copy, then tar",
            Self::TheRock => "fetch_artifacts.py",
        }
    }

    /// Most of its time that ours may take.
    const fn goal(self) -> f64 {
        match self {
            Self::Ours => 1.0,
            Self::Rclone => 0.5,
            Self::TheRock => 0.3,
        }
    }
}

struct Archives<'a> {
    options: &'a Options,
    rig: &'a Rig,
    store: Store,
    /// Those that take part, ours first.
    ways: Vec<Way>,
    files: usize,
    size: usize,
}

pub(crate) fn measure(options: &Options, rig: &Rig, goals: &mut Goals) -> Result<()> {
    require(StoreKind::S3.peer())?;
    let mut archives = Archives {
        options,
        rig,
        store: Store::start_in(StoreKind::S3, rig.base()),
        ways: vec![Way::Ours],
        files: FILES,
        size: options.scaled(SIZE),
    };
    archives.find_peers();
    say("archives: making them");
    let packed = archives.make()?;
    let mut samples = Samples::default();
    for round in 0..=options.rounds {
        archives.round(round, &mut samples)?;
        if round == 0 {
            samples.clear();
        } else {
            say(&format!("archives: round {round} of {}", options.rounds));
        }
    }
    archives.report(packed, &samples, goals)
}

impl Archives<'_> {
    fn find_peers(&mut self) {
        if self.options.no_peers {
            return;
        }
        if find("rclone").is_some() {
            self.ways.push(Way::Rclone);
        }
        if self.options.therock.is_some() {
            self.ways.push(Way::TheRock);
        }
    }

    /// Packs archives and puts them into the bucket with their checksums; gives their bytes.
    fn make(&self) -> Result<u64> {
        let (tree, archive) = (self.rig.base().join("made"), self.rig.base().join("made.tar"));
        let mut packed = 0;
        for number in 0..ARCHIVES {
            let stage = tree.join(STAGE);
            fs::create_dir_all(&stage)?;
            fs::write(tree.join("artifact_manifest.txt"), format!("{STAGE}\n"))?;
            for file in 0..self.files {
                fs::write(stage.join(name(number, file)), self.content(number, file))?;
            }
            let mut tar = Command::new("tar");
            tar.args([self.packing().flag(), "-cf"]).arg(&archive);
            tar.arg("-C").arg(&tree).arg("artifact_manifest.txt");
            // No directories: TheRock's script takes a stage directory for a member that is in no stage.
            tar.args((0..self.files).map(|file| format!("{STAGE}/{}", name(number, file))));
            run(&mut tar, &self.log())?;
            let bytes = fs::read(&archive)?;
            packed += bytes.len() as u64;
            let name = format!("{RUN}/part{number}_lib_generic.tar.{}", self.packing().ending());
            let sum = Digest::of(DigestFunction::Sha256, &bytes).hash_hex();
            self.store.put(&name, &bytes);
            self.store.put(&format!("{name}.sha256sum"), sum.as_bytes());
            remove(&tree)?;
        }
        remove(&archive)?;
        Ok(packed)
    }

    fn packing(&self) -> Packing {
        self.options.packing
    }

    fn log(&self) -> PathBuf {
        self.rig.base().join("archives.log")
    }

    fn content(&self, archive: usize, file: usize) -> Vec<u8> {
        letters((archive * FILES + file) as u64, self.size)
    }

    /// Each once, with nothing there; who begins changes from round to round.
    fn round(&self, round: u32, samples: &mut Samples) -> Result<()> {
        let turn = round as usize % self.ways.len();
        for number in (turn..self.ways.len()).chain(0..turn) {
            let Some(way) = self.ways.get(number).copied() else {
                continue;
            };
            let into = self.rig.base().join("unpacked");
            let served = cpu(self.store.id());
            let ended = match way {
                Way::Ours => self.ours(&into),
                Way::Rclone => self.rclone(&into),
                Way::TheRock => self.therock(&into),
            };
            let (name, ended) = (way.name(), ended.with_context(|| way.name())?);
            samples.add(format!("{name} wall"), ended.wall);
            samples.add(format!("{name} cpu"), ended.cpu);
            samples.add(format!("{name} peak"), ended.peak / MIB);
            samples.add(format!("{name} served"), cpu(self.store.id()) - served);
            self.check(&into, round == 0)?;
            remove(&into)?;
        }
        Ok(())
    }

    /// Fails unless every file is there with its size, and if asked for, its content.
    fn check(&self, into: &Path, contents: bool) -> Result<()> {
        for archive in 0..ARCHIVES {
            for file in 0..self.files {
                let path = into.join(name(archive, file));
                let found = fs::symlink_metadata(&path).with_context(|| path.display().to_string())?;
                let is_right = found.is_file()
                    && found.len() == self.size as u64
                    && (!contents || fs::read(&path)? == self.content(archive, file));
                ensure!(is_right, "{} has another content", path.display());
            }
        }
        Ok(())
    }

    fn ours(&self, into: &Path) -> Result<Ended> {
        let mut command = self.rig.outhaul().command();
        command.args(["fetch", "archive", &self.store.url(&format!("{RUN}/"), "")]);
        command.args(["--flatten", "--checksum=require", "--jobs", JOBS, "--output-dir"]);
        command.arg(into).envs(self.store.variables());
        watched(&mut command, &self.log())
    }

    fn rclone(&self, into: &Path) -> Result<Ended> {
        let downloads = self.rig.base().join("downloads");
        let mut command = Command::new(require("rclone")?);
        command.args(["copy", &format!("store:{BUCKET}/{RUN}")]);
        command.arg(&downloads).args(["--transfers", JOBS, "--config="]);
        let [(_, id), (_, secret)] = KEYS;
        let endpoint = self.store.endpoint();
        for (name, value) in [
            ("TYPE", "s3"),
            ("PROVIDER", "Other"),
            ("ENDPOINT", &endpoint),
            ("ACCESS_KEY_ID", id),
            ("SECRET_ACCESS_KEY", secret),
        ] {
            command.env(format!("RCLONE_CONFIG_STORE_{name}"), value);
        }
        let copied = watched(&mut command, &self.log())?;
        fs::create_dir_all(into)?;
        let mut names = Vec::new();
        for entry in fs::read_dir(&downloads)? {
            let path = entry?.path();
            if path.extension().is_some_and(|ending| ending != "sha256sum") {
                names.extend_from_slice(path.as_os_str().as_bytes());
                names.push(0);
            }
        }
        let list = self.rig.base().join("list");
        fs::write(&list, names)?;
        let mut command = Command::new("xargs");
        command.args(["-0", "-n1", "-P", JOBS, "tar", self.packing().flag()]);
        command.args(["--strip-components=2", "-C"]).arg(into).arg("-xf");
        command.stdin(Stdio::from(fs::File::open(&list)?));
        let unpacked = watched(&mut command, &self.log())?;
        remove(&downloads)?;
        Ok(Ended {
            wall: copied.wall + unpacked.wall,
            cpu: copied.cpu + unpacked.cpu,
            peak: copied.peak,
        })
    }

    fn therock(&self, into: &Path) -> Result<Ended> {
        let checkout = self
            .options
            .therock
            .as_deref()
            .context("--therock is not given")?;
        let [(_, id), (_, secret)] = KEYS;
        let run_id = RUN.trim_end_matches("-linux");
        let mut command = Command::new(require("boto3-python")?);
        command
            .args(["-B", "-c", THEROCK])
            .arg(checkout)
            .args([BUCKET, run_id]);
        command.args(["--flatten", "--download-concurrency", JOBS]);
        command
            .args(["--extract-concurrency", JOBS, "--output-dir"])
            .arg(into);
        command.env("AWS_ENDPOINT_URL", self.store.endpoint());
        command.env("AWS_DEFAULT_REGION", "us-east-1");
        command
            .env("AWS_ACCESS_KEY_ID", id)
            .env("AWS_SECRET_ACCESS_KEY", secret);
        watched(&mut command, &self.log())
    }

    fn report(&self, packed: u64, samples: &Samples, goals: &mut Goals) -> Result<()> {
        let unpacked = (ARCHIVES * self.files * self.size) as f64 / MIB;
        let title = format!(
            "Archives: {ARCHIVES} .tar.{} of {:.0} MiB, {} files, {unpacked:.0} MiB, --flatten, {JOBS} at once, versitygw",
            self.packing().ending(),
            packed as f64 / ARCHIVES as f64 / MIB,
            ARCHIVES * self.files,
        );
        let table = Table::new(&title, &["what", "result"])?;
        let get = |way: Way, figure: &str| samples.get(&format!("{} {figure}", way.name()));
        for way in self.ways.iter().copied() {
            table.figures(&format!("{}: wall time", way.name()), get(way, "wall"), 3, " s")?;
            table.figures("… processor time", get(way, "cpu"), 2, " s")?;
            table.figures("… of the store", get(way, "served"), 2, " s")?;
            table.figures("… peak memory", get(way, "peak"), 0, " MiB")?;
        }
        let over = |way: Way, figure: &str| -> Vec<f64> {
            let pairs = get(Way::Ours, figure).iter().zip(get(way, figure));
            pairs.map(|(ours, theirs)| ours / theirs).collect()
        };
        for way in self.ways.iter().copied().filter(|way| *way != Way::Ours) {
            let (name, ratio) = (way.name(), over(way, "wall"));
            table.figures(&format!("**outhaul / {name}**"), &ratio, 2, "")?;
            table.figures("… processor time", &over(way, "cpu"), 2, "")?;
            goals.at_most(&format!("archives / {name}"), ratio, way.goal(), "");
        }
        let peak = get(Way::Ours, "peak").to_vec();
        goals.at_most("archives: peak memory", peak, MEMORY, " MiB");
        Ok(())
    }
}

/// A file's name in the tree, where those of all archives come together.
fn name(archive: usize, file: usize) -> String {
    format!("a{archive}-f{file}.out")
}
