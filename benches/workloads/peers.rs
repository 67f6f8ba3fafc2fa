//! Other programs that fetch a tree from the same cache, and `outhaul fetch tree` beside them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;
use bazel_remote_apis::build::bazel::remote::execution::v2::{
    Digest as WireDigest, Directory, DirectoryNode, FileNode,
};
use bytes::Bytes;
use outhaul::digest::{Digest, DigestFunction};
use prost::Message as _;

use crate::{
    cache::{Cache, find},
    process::run,
    rig::{Rig, remove},
    samples::{Goals, Samples, Table},
    say,
    tree::{BIN, Tree},
};

/// Most of the faster peer's time that ours may take.
const GOAL: f64 = 0.5;

/// One that fetches.
struct Peer {
    name: &'static str,
    /// Its program and arguments, without the directory that comes last.
    command: Box<dyn Fn(&Path) -> Command>,
}

/// All that there are.
pub(crate) struct Peers(Vec<Peer>);

impl Peers {
    /// Puts the tree's directories into the cache, and finds the programs.
    pub(crate) fn ready(rig: &Rig, cache: &Cache, tree: &Tree) -> Result<Self> {
        let (root, blobs) = directories(tree);
        cache.fill(&rig.player, blobs.into_iter())?;
        let (address, root) = (cache.address()?.to_string(), root.to_string());
        let instance = cache.instance();
        let outhaul = {
            let (program, endpoint, root) = (rig.outhaul(), cache.endpoint(), root.clone());
            move |into: &Path| {
                let mut command = program.command();
                command.args(["fetch", "tree", &root, "--remote-cache", &endpoint]);
                command.args(["--remote-instance-name", instance]);
                command.arg("--output-dir").arg(into);
                command
            }
        };
        let mut peers = vec![Peer {
            name: "outhaul fetch tree",
            command: Box::new(outhaul),
        }];
        if let Some(program) = find("remotetool") {
            let (address, root) = (address.clone(), root.clone());
            let command = move |into: &Path| {
                let mut command = Command::new(&program);
                command.args([
                    "--operation=download_dir",
                    "--service_no_security",
                    "--alsologtostderr=false",
                ]);
                command
                    .arg(format!("--service={address}"))
                    .arg(format!("--digest={root}"));
                command
                    .arg(format!("--instance={instance}"))
                    .arg(format!("--path={}", into.display()));
                command
            };
            peers.push(Peer {
                name: "remotetool download_dir",
                command: Box::new(command),
            });
        }
        // LUCI's, which wants an instance name to be given, and takes another where the cache is on this machine.
        if let Some(program) = find("cas") {
            let command = move |into: &Path| {
                let mut command = Command::new(&program);
                command.args([
                    "download",
                    "-cas-addr",
                    &address,
                    "-cas-instance",
                    "projects/bench/instances/default_instance",
                ]);
                command.args(["-digest", &root, "-dir"]).arg(into);
                command
            };
            peers.push(Peer {
                name: "LUCI cas download",
                command: Box::new(command),
            });
        }
        Ok(Self(peers))
    }

    /// Who they are.
    pub(crate) fn describe() -> String {
        let found = ["remotetool", "cas", "rclone"].map(|name| {
            find(name).map_or_else(|| format!("no {name}"), |program| program.display().to_string())
        });
        found.join(", ")
    }

    /// Lets each fetch the tree; who begins changes from round to round. One that can't do it with this cache in the
    /// first round is left out of the others.
    pub(crate) fn round(
        &mut self,
        rig: &Rig,
        tree: &Tree,
        round: u32,
        workload: &str,
        samples: &mut Samples,
    ) -> Result<()> {
        let into: PathBuf = rig.base().join("peer");
        let turn = round as usize % self.0.len().max(1);
        let mut unable = Vec::new();
        for number in (turn..self.0.len()).chain(0..turn) {
            let Some(peer) = self.0.get(number) else {
                continue;
            };
            std::fs::create_dir_all(&into)?;
            match run(&mut (peer.command)(&into), &rig.base().join("peer.log")) {
                Ok(wall) => {
                    samples.add(format!("{workload} {}", peer.name), wall);
                    tree.check(&into, round == 0)?;
                }
                Err(error) if round == 0 && number > 0 => {
                    let said = format!("{error:#}");
                    say(&format!(
                        "{} is left out: {}",
                        peer.name,
                        said.lines().last().unwrap_or("")
                    ));
                    unable.push(peer.name);
                }
                Err(error) => return Err(error),
            }
            remove(&into)?;
        }
        self.0.retain(|peer| !unable.contains(&peer.name));
        Ok(())
    }

    /// Rows for them, and the goal.
    pub(crate) fn report(
        &self,
        table: &Table,
        samples: &Samples,
        workload: &str,
        goals: &mut Goals,
    ) -> Result<()> {
        let get = |peer: &Peer| samples.get(&format!("{workload} {}", peer.name));
        for peer in &self.0 {
            table.figures(&format!("`{}`", peer.name), get(peer), 3, " s")?;
        }
        let Some((ours, others)) = self.0.split_first() else {
            return Ok(());
        };
        if others.is_empty() {
            return Ok(());
        }
        let of = |mine: &[f64]| -> Vec<f64> {
            let fastest = |n: usize| {
                others
                    .iter()
                    .filter_map(|peer| get(peer).get(n))
                    .copied()
                    .fold(f64::INFINITY, f64::min)
            };
            mine.iter()
                .enumerate()
                .map(|(n, wall)| wall / fastest(n))
                .collect()
        };
        let (tree, daemon) = (of(get(ours)), of(samples.get(&format!("{workload} wall"))));
        table.figures("**`outhaul fetch tree` / the faster peer**", &tree, 2, "")?;
        table.figures("the daemon's build / the faster peer", &daemon, 2, "")?;
        if workload != "L" {
            goals.at_most(
                &format!("{workload}: outhaul fetch tree / the faster peer"),
                tree,
                GOAL,
                "",
            );
            goals.at_most(
                &format!("{workload}: the daemon's build / the faster peer"),
                daemon,
                GOAL,
                "",
            );
        }
        Ok(())
    }
}

/// The tree's directories as the Remote Execution API has them: the root's digest, and all blobs.
fn directories(tree: &Tree) -> (Digest, Vec<(Digest, Bytes)>) {
    let mut all: BTreeMap<PathBuf, Directory> = BTreeMap::new();
    for folder in &tree.folders {
        let path = Path::new(BIN).join(&folder.path);
        for (parent, child) in path.ancestors().skip(1).zip(path.ancestors()) {
            all.entry(parent.to_owned()).or_default();
            all.entry(child.to_owned()).or_default();
        }
        let directory = all.entry(path).or_default();
        directory.files.extend(folder.files.iter().map(|file| FileNode {
            name: file.name.clone(),
            digest: Some(wire(&file.digest)),
            ..FileNode::default()
        }));
        directory.files.sort_by(|a, b| a.name.cmp(&b.name));
    }
    let mut blobs = Vec::new();
    // Children come after their parents in the map's order, so it is emptied from its end.
    while let Some((path, directory)) = all.pop_last() {
        let bytes = Bytes::from(directory.encode_to_vec());
        let digest = Digest::of(DigestFunction::Sha256, &bytes);
        blobs.push((digest.clone(), bytes));
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return (digest, blobs);
        };
        let directories = &mut all.entry(parent.to_owned()).or_default().directories;
        directories.push(DirectoryNode {
            name: name.to_string_lossy().into_owned(),
            digest: Some(wire(&digest)),
        });
        directories.sort_by(|a, b| a.name.cmp(&b.name));
    }
    // A tree of nothing.
    (Digest::of(DigestFunction::Sha256, b""), blobs)
}

fn wire(digest: &Digest) -> WireDigest {
    WireDigest {
        hash: digest.hash_hex(),
        size_bytes: digest.size() as i64,
    }
}
