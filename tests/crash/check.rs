//! What must be true of the disk, no matter what was killed.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use outhaul::{
    digest::{Digest, DigestFunction},
    journal::Journal,
};
use outhaul_testkit::{finish, until};
use serde_json::Value;

use crate::{
    build::{Build, History},
    client::Client,
    world::World,
};

impl World {
    /// Every name below the exec root is one that a build asked for, and holds one of its versions, whole.
    pub(crate) fn assert_whole(&self) {
        let root = self.exec_root();
        let mut wrong = Vec::new();
        walk(&root, &mut |path| {
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
            if let Err(what) = is_whole(&self.builds.history, path, &name) {
                wrong.push(format!("{name}: {what}"));
            }
        });
        assert!(wrong.is_empty(), "world {}: {wrong:#?}", self.seed);
        let around: BTreeSet<_> = names(&self.output_base());
        let known = [".outhaul-newest._main", ".outhaul-tmp", "execroot"];
        assert!(
            around.iter().all(|name| known.contains(&name.as_str())),
            "world {}: {around:?}",
            self.seed
        );
    }

    /// What was acknowledged is in the journal.
    pub(crate) fn assert_kept(&self, client: &Client) {
        let acked = client.acked();
        if acked == 0 {
            return;
        }
        let journal = Journal::view(&self.state().join("journal"));
        let records = journal
            .read(&client.build.invocation_id)
            .unwrap_or_else(|e| panic!("world {}: {acked} acknowledged, and {e}", self.seed));
        let numbers: BTreeSet<i64> = records.map(|record| record.unwrap().sequence).collect();
        for number in 1..=acked {
            assert!(
                numbers.contains(&number),
                "world {}: of {acked} acknowledged, {number} is lost",
                self.seed
            );
        }
    }

    /// Nobody's temporary files are left but those of a process that lives.
    pub(crate) async fn assert_swept(&self, alive: &[u32]) {
        let base = self.output_base().join(".outhaul-tmp");
        until("nobody's temporary files are left", async || {
            names(&base).into_iter().all(|name| {
                let pid = name.split('-').next().and_then(|pid| pid.parse().ok());
                pid.is_some_and(|pid: u32| alive.contains(&pid))
            })
        })
        .await;
    }

    /// Everything that the build asked for up to this event is there.
    pub(crate) fn missing_up_to(&self, build: &Build, event: i64) -> Vec<String> {
        let root = self.exec_root();
        let asked = |path: &String| build.called_for.get(path).is_some_and(|number| *number <= event);
        let files = build
            .files
            .keys()
            .filter(|path| asked(path))
            .filter(|path| !fs::read(root.join(path)).is_ok_and(|bytes| build.wants(path, &bytes)));
        let links = build
            .links
            .iter()
            .filter(|(path, _)| asked(path))
            .filter(|(path, target)| !fs::read_link(root.join(path)).is_ok_and(|t| t == Path::new(target)))
            .map(|(path, _)| path);
        files.chain(links).cloned().collect()
    }

    pub(crate) fn assert_complete(&self, build: &Build) {
        let missing = self.missing_up_to(build, i64::MAX);
        assert!(missing.is_empty(), "world {}: {missing:#?}", self.seed);
        for directory in &build.directories {
            assert!(self.exec_root().join(directory).is_dir(), "{directory}");
        }
        self.assert_whole();
    }

    /// What the record says of an invocation; nothing if it does not know it.
    pub(crate) async fn status(&self, invocation_id: &str) -> Option<Value> {
        let ran = finish(self.command(&["status", "--json", invocation_id])).await;
        (ran.code == Some(0)).then(|| ran.json().remove(0))
    }

    /// What is called present is there, with those bytes. Says how many.
    pub(crate) async fn assert_honest(&self, invocation_id: &str) -> usize {
        self.assert_honest_in("state", invocation_id).await
    }

    pub(crate) async fn assert_honest_in(&self, state: &str, invocation_id: &str) -> usize {
        let ran = finish(self.command_in(state, &["ls", "--json", invocation_id]))
            .await
            .expect(0);
        let mut present = 0;
        for output in ran.json() {
            let path = PathBuf::from(output["path"].as_str().unwrap());
            if output["state"] != "materialized" {
                continue;
            }
            present += 1;
            let is_there = match output["digest"].as_str() {
                Some(digest) => fs::read(&path).is_ok_and(|bytes| {
                    let actual = Digest::of(DigestFunction::Sha256, &bytes).hash_hex();
                    digest == format!("sha256:{actual}")
                }),
                None => path.symlink_metadata().is_ok(),
            };
            assert!(is_there, "world {}: called present: {output}", self.seed);
        }
        present
    }

    /// Stores that were set aside.
    pub(crate) fn quarantined_in(&self, state: &str) -> usize {
        let names = names(&self.dir.path().join(state));
        names.iter().filter(|name| name.contains("quarantined")).count()
    }
}

fn is_whole(history: &History, path: &Path, name: &str) -> Result<(), String> {
    let metadata = path.symlink_metadata().map_err(|e| e.to_string())?;
    if metadata.is_symlink() {
        let target = fs::read_link(path).map_err(|e| e.to_string())?;
        return match history.links.get(name) {
            Some(expected) if Path::new(expected) == target => Ok(()),
            _ => Err(format!("a link to {}", target.display())),
        };
    }
    let Some(hashes) = history.files.get(name) else {
        return Err("nobody asked for it".to_owned());
    };
    let bytes = fs::read(path).map_err(|e| e.to_string())?;
    if !hashes.contains(&Digest::of(DigestFunction::Sha256, &bytes).hash_hex()) {
        return Err(format!("{} bytes of no version", bytes.len()));
    }
    match metadata.permissions().mode() & 0o7777 {
        0o555 => Ok(()),
        mode => Err(format!("mode {mode:o}")),
    }
}

/// Calls for everything below that is not a directory.
fn walk(dir: &Path, found: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            walk(&entry.path(), found);
        } else {
            found(&entry.path());
        }
    }
}

/// Names in a directory; none where there is no directory.
pub(crate) fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    entries
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}
