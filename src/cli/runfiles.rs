//! What programs need at run time, by the manifests that Bazel wrote beside them on this machine.

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    io::Write as _,
    path::Path,
};

use super::{
    client::Client,
    exit,
    exit::Failure,
    get::bring::{self, Show},
    print,
};
use crate::{
    invocation::{rows, runfiles::Needed},
    materialize::place::OutputRoot,
    printable::{printable, with_causes},
    proto::outhaul::v1 as pb,
};

/// Said where no output has a manifest.
pub(super) const NO_MANIFEST: &str = "none of these outputs has a manifest of runfiles beside it \
     (NAME.runfiles_manifest, which Bazel writes when it builds a program, but with --nobuild_runfile_manifests)";

/// The runfiles of some programs.
#[derive(Default)]
pub(super) struct Runfiles {
    /// How many programs there are.
    pub(super) programs: usize,
    /// Absolute paths of those that are outputs: files, and roots of trees.
    paths: BTreeSet<String>,
    /// What cannot be read, in words.
    problems: Vec<String>,
    /// Whether nothing tells what is in trees, so that one without files may be an empty one or not.
    are_trees_unknown: bool,
}

impl Runfiles {
    /// Brings those that are not among what is there already.
    pub(super) async fn get(
        &self,
        client: &mut Client,
        there: &[pb::Output],
        show: Show,
    ) -> Result<u8, Failure> {
        for problem in &self.problems {
            writeln!(print::err(), "outhaul: {}", printable(problem))?;
        }
        let mut code = if self.problems.is_empty() {
            exit::OK
        } else {
            exit::FAILED
        };
        let there: BTreeSet<String> = there.iter().map(pb::Output::absolute_path).collect();
        let absent: Vec<String> = self.paths.difference(&there).cloned().collect();
        for result in bring::materialized(client, &absent, None, "").await? {
            if result.output.is_some() || !self.is_whole(Path::new(&result.path)) {
                code = bring::worse(code, show.result(&result)?);
            }
        }
        Ok(code)
    }

    /// Whether what no recorded build names is there all the same: a file that was made here, or a tree without files.
    fn is_whole(&self, path: &Path) -> bool {
        let is_empty = || path.read_dir().is_ok_and(|mut entries| entries.next().is_none());
        path.is_file() || path.is_dir() && !(self.are_trees_unknown && is_empty())
    }
}

/// An output root, and how it is spelled in manifests.
struct Opened {
    root: OutputRoot,
    spellings: Vec<String>,
}

impl Opened {
    async fn open(
        client: &mut Client,
        output: &pb::Output,
        runfiles: &mut Runfiles,
    ) -> Result<Self, Failure> {
        let here = output.exec_root.clone();
        let root = OutputRoot::open(Path::new(&here), false);
        let root = root.map_err(|e| Failure::failed(format!("{here}: {}", with_causes(&e))))?;
        let mut spellings = vec![here];
        if let Ok((build, _)) = client.invocation(&output.invocation_id).await {
            // As Bazel spells it, which may be a container's way.
            spellings.push(build.exec_root.trim_end_matches('/').to_owned());
            runfiles.are_trees_unknown |= rows::is_known_by_events_alone(&build.build_tool_version);
        }
        spellings.retain(|spelling| !spelling.is_empty());
        Ok(Self { root, spellings })
    }
}

/// The runfiles of those outputs that have a manifest beside them.
pub(super) async fn of(client: &mut Client, outputs: &[pb::Output]) -> Result<Runfiles, Failure> {
    let mut runfiles = Runfiles::default();
    let mut roots = HashMap::new();
    for output in outputs {
        let opened = match roots.entry(&output.exec_root) {
            Entry::Occupied(opened) => opened.into_mut(),
            Entry::Vacant(vacant) => vacant.insert(Opened::open(client, output, &mut runfiles).await?),
        };
        let manifest = match opened.root.runfiles_manifest(&output.exec_path) {
            Ok(Some(manifest)) => manifest,
            // It is not a program.
            Ok(None) => continue,
            Err(error) => {
                let (path, error) = (output.absolute_path(), with_causes(&error));
                let problem = format!("{path}: failed to read its manifest of runfiles: {error}");
                runfiles.problems.push(problem);
                continue;
            }
        };
        runfiles.programs += 1;
        let mut needed = Needed::default();
        let spellings: Vec<&str> = opened.spellings.iter().map(String::as_str).collect();
        needed.take_in(&manifest, &spellings);
        let paths = needed
            .outputs
            .iter()
            .map(|path| format!("{}/{path}", output.exec_root));
        runfiles.paths.extend(paths);
        let program = &output.exec_path;
        let odd = needed.odd.iter();
        let odd = odd.map(|path| format!("{path}, a runfile of {program}, is not a valid output path"));
        runfiles.problems.extend(odd);
    }
    Ok(runfiles)
}
