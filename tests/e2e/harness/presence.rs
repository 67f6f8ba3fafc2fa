//! Looks, at the instant an event reports a completion, whether what it speaks of is on disk.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use outhaul::proto::build_event_stream::{
    BuildEvent, File, NamedSetOfFiles, TargetComplete, build_event::Payload, build_event_id::Id, file,
};
use sha2::{Digest as _, Sha256};

use super::{bazel::Version, upstream::Seen};

/// What was looked at so far. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Presence(Arc<Mutex<State>>);

/// What came of that.
#[derive(Debug, Clone, Default)]
pub(crate) struct Looked {
    /// Completions of targets, aspects and tests.
    pub(crate) completions: usize,
    /// Files that they speak of.
    pub(crate) files: usize,
    /// Those of them that were not there, or wrong.
    pub(crate) wrong: Vec<String>,
}

impl Looked {
    /// What was not there, or wrong, but for what a Bazel takes away itself: version 4 fetches the file that one link
    /// leads to for an action of its own, and deletes it when that is done.
    pub(crate) fn wrong_for(&self, version: Version) -> Vec<&str> {
        let excused = |wrong: &str| version == Version::Four && wrong.contains("/rules/link.txt: ");
        let wrong = self.wrong.iter().map(String::as_str);
        wrong.filter(|wrong| !excused(wrong)).collect()
    }
}

#[derive(Default)]
struct State {
    invocations: HashMap<String, Invocation>,
    looked: Looked,
}

/// What an invocation's events have said.
#[derive(Default)]
struct Invocation {
    exec_root: PathBuf,
    tests_only: bool,
    test_rules: HashSet<String>,
    sets: HashMap<String, NamedSetOfFiles>,
    /// The highest number, so that repetitions are not looked at again.
    highest: i64,
}

impl Presence {
    /// For [`super::Upstream::watched`].
    pub(crate) fn watch(&self) -> impl Fn(&Seen) + Send + Sync + 'static {
        let this = self.clone();
        move |seen| this.look(seen)
    }

    /// What came of it so far.
    pub(crate) fn looked(&self) -> Looked {
        self.0.lock().unwrap().looked.clone()
    }

    fn look(&self, seen: &Seen) {
        let Some(event) = seen.decoded() else { return };
        let mut state = self.0.lock().unwrap();
        let State { invocations, looked } = &mut *state;
        let invocation = invocations.entry(seen.invocation().to_owned()).or_default();
        if seen.sequence() <= invocation.highest {
            return;
        }
        invocation.highest = seen.sequence();
        invocation.take(event, looked);
    }
}

impl Invocation {
    fn take(&mut self, event: BuildEvent, looked: &mut Looked) {
        let Some(id) = event.id.and_then(|id| id.id) else {
            return;
        };
        match (id, event.payload) {
            (_, Some(Payload::WorkspaceInfo(info))) => self.exec_root = info.local_exec_root.into(),
            (_, Some(Payload::Started(started))) => {
                self.tests_only = matches!(started.command.as_str(), "test" | "coverage");
            }
            (Id::TargetConfigured(target), Some(Payload::Configured(configured)))
                if configured.target_kind.ends_with("_test rule") =>
            {
                self.test_rules.insert(target.label);
            }
            (Id::NamedSet(id), Some(Payload::NamedSetOfFiles(set))) => {
                self.sets.insert(id.id, set);
            }
            (Id::TargetCompleted(target), Some(Payload::Completed(completed))) => {
                // What a test command asks for are the tests' results.
                if self.tests_only && self.test_rules.contains(&target.label) {
                    return;
                }
                looked.completions += 1;
                for file in self.files(&completed) {
                    self.check(&target.label, &self.path(&file), &file, looked);
                }
                for directory in &completed.directory_output {
                    looked.files += 1;
                    if !self.path(directory).is_dir() {
                        looked
                            .wrong
                            .push(format!("{}: {directory:?} is no directory", target.label));
                    }
                }
            }
            (Id::TestResult(test), Some(Payload::TestResult(result))) => {
                looked.completions += 1;
                for file in &result.test_action_output {
                    // Others are put together of several attempts and shards.
                    if matches!(file.name.as_str(), "test.log" | "test.xml") {
                        self.check(
                            &test.label,
                            &self.test_output(&test.label, &file.name),
                            file,
                            looked,
                        );
                    }
                }
            }
            _ => {}
        }
    }

    /// Every file of a target, in all its output groups.
    fn files(&self, completed: &TargetComplete) -> Vec<File> {
        let mut files = Vec::new();
        let mut gone_through = HashSet::new();
        for group in &completed.output_group {
            files.extend(group.inline_files.iter().cloned());
            let mut open: Vec<&str> = group.file_sets.iter().map(|set| set.id.as_str()).collect();
            while let Some(id) = open.pop() {
                if !gone_through.insert(id) {
                    continue;
                }
                let set = self.sets.get(id).expect("a set comes before who refers to it");
                files.extend(set.files.iter().cloned());
                open.extend(set.file_sets.iter().map(|set| set.id.as_str()));
            }
        }
        // Source files have no root.
        files.retain(|file| !file.path_prefix.is_empty());
        files
    }

    fn path(&self, file: &File) -> PathBuf {
        let prefix: PathBuf = file.path_prefix.iter().collect();
        self.exec_root.join(prefix).join(&file.name)
    }

    /// Where a test that is neither sharded nor repeated leaves a file, under whichever configuration.
    fn test_output(&self, label: &str, name: &str) -> PathBuf {
        let place = label
            .trim_start_matches('@')
            .trim_start_matches("//")
            .replace(':', "/");
        let out = self.exec_root.join("bazel-out");
        let configurations = std::fs::read_dir(&out).into_iter().flatten().flatten();
        configurations
            .map(|entry| entry.path().join("testlogs").join(&place).join(name))
            .find(|path| path.exists())
            .unwrap_or_else(|| out.join("testlogs").join(place).join(name))
    }

    fn check(&self, label: &str, path: &Path, file: &File, looked: &mut Looked) {
        looked.files += 1;
        if let Err(what) = right(path, file) {
            looked.wrong.push(format!("{label}: {}: {what}", path.display()));
        }
    }
}

/// Whether a path holds what an event says of it.
fn right(path: &Path, file: &File) -> Result<(), String> {
    if let Some(file::File::SymlinkTargetPath(target)) = &file.file {
        let found = std::fs::read_link(path).map_err(|e| e.to_string())?;
        return (found == Path::new(target))
            .then_some(())
            .ok_or_else(|| format!("leads to {}, not {target}", found.display()));
    }
    let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
    let expected = match &file.file {
        Some(file::File::Contents(contents)) => {
            return (*contents == bytes)
                .then_some(())
                .ok_or_else(|| "has other bytes".to_owned());
        }
        // Old Bazels have the digest in the URI alone.
        Some(file::File::Uri(uri)) if file.digest.is_empty() => uri.rsplit('/').nth(1).unwrap_or_default(),
        _ => &file.digest,
    };
    let found = hex::encode(Sha256::digest(&bytes));
    (found == expected)
        .then_some(())
        .ok_or_else(|| format!("has the digest {found}, not {expected}"))
}
