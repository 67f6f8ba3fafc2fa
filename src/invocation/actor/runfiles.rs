//! After the end of the stream: what programs that were asked for need at run time.
//!
//! Bazel's top-level mode brings the runfiles of what is asked for. The manifests have their names; their digests are
//! those of the stream, or of Bazel's action cache ([`crate::action_cache`]). Only what is absent is brought: a file that
//! lies there is newer than what the action cache says. What is absent and has no digest has failed.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap, HashSet},
    hash::BuildHasher as _,
    sync::Arc,
};

use indexmap::IndexMap;
use tokio::task::spawn_blocking;

use super::{
    super::{
        build::{Build, Named},
        rows::ACTION_CACHE,
        runfiles::{self, Needed},
    },
    Actor, PathHasher,
    parts::Known,
    phase::Step,
    site::Site,
};
use crate::{
    action_cache::{self, Facts},
    bep::event::{CommandLine, TargetId},
    exec_path::ExecPath,
    invocation::shared::Remembered,
    materialize::{Root, place::Seen},
    output::{Class, OutputContent},
    record::{Record, RootId, TargetRow},
    roots::Destination,
};

/// How much older than a build the files that it makes may look, in milliseconds.
const CLOCKS_MS: i64 = 2000;

/// What a program needs, and the stream does not bring, and is not a file on disk.
struct Missing {
    target: Arc<TargetId>,
    /// Whether the program is this target's.
    is_sure: bool,
    program: Arc<str>,
    path: ExecPath,
    seen: Seen,
}

/// What is known of that.
struct Found {
    missing: Missing,
    /// The outputs there: itself, or the files of a tree.
    outputs: Vec<(ExecPath, OutputContent)>,
    /// Those that are not on disk.
    absent: Vec<usize>,
    /// It is a directory with nothing in it, and Bazel may have left it so.
    is_empty: bool,
}

impl Actor {
    /// Wants the runfiles of the programs that were asked for. Once for each end of the stream.
    pub(super) async fn bring_runfiles(&mut self) {
        if !self.phase.takes(Step::BringRunfiles) || self.phase.is_interrupted() {
            return;
        }
        let is_exec_root = self.shared.roots.rules().destination == Destination::ExecRoot;
        let is_blocked = self.site.blocked().is_some() || self.ledger.tally.superseded > 0;
        // An output service has these as well.
        let session = self.site.session();
        let is_served = session.is_some_and(|session| session.served.is_some());
        let line = self.build.command_line();
        if !is_exec_root || is_served || is_blocked || !runfiles::are_built(line) {
            return;
        }
        if runfiles::is_off(line, "build_runfile_manifests") {
            // In its other modes, Bazel has downloaded them.
            let is_minimal = line.is_some_and(|line| line.download_mode() == Some("minimal"));
            if is_minimal && !self.ledger.wanted.is_empty() {
                self.ledger
                    .tally
                    .note("with --nobuild_runfile_manifests, runfiles are unknown and were not downloaded");
            }
            return;
        }
        let Some(missing) = self.missing_runfiles().await else {
            return;
        };
        if missing.is_empty() {
            return;
        }
        if self.trees_are_whole(&missing).await {
            return;
        }
        let cached = self.action_cache(None).await;
        self.want_runfiles(missing, cached).await;
    }

    /// The programs that have manifests, with the targets that they are of, and whether that is sure.
    async fn programs(&mut self) -> Vec<(String, Arc<TargetId>, bool)> {
        let Some(place) = self.site.open_root() else {
            return Vec::new();
        };
        let directories: Vec<String> = self.ledger.directories.iter().map(str::to_owned).collect();
        // Programs need not be among their targets' outputs, and may lie anywhere in the packages' directories.
        let targets = self.ledger.targets.iter();
        let targets = targets.filter(|(target, row)| row.success && target.aspect.is_empty());
        let packages = targets.filter_map(|(target, _)| self.build.package_directory(target));
        let packages: BTreeSet<String> = packages.collect();
        // An alias has outputs in another package, which may be below its own.
        let is_foreign =
            |directory: &str| !packages.contains(directory) && runfiles::place_in_bin(directory).is_some();
        let foreign = directories.iter().filter(|directory| is_foreign(directory));
        let foreign: BTreeSet<String> = foreign.cloned().collect();
        let walked: Vec<String> = packages.iter().chain(&foreign).cloned().collect();
        let root = place.root.clone();
        let found = spawn_blocking(move || root.place.programs(&directories, &walked)).await;
        let (found, passed_over) = found.unwrap_or_default();
        if let Some(directory) = passed_over {
            self.ledger.tally.note(&format!(
                "did not look for programs in {directory} and perhaps in other directories, as the packages have too many \
                 directories of outputs; if there are programs, their runfiles were not downloaded"
            ));
        }
        if found.is_empty() {
            return Vec::new();
        }
        let owners = Owners::of(&self.ledger.targets, &mut self.build);
        let of_foreign = self.named_in(&foreign);
        let of_foreign = |program: &str| {
            let mut ends = program.rmatch_indices('/');
            ends.find_map(|(end, _)| of_foreign.get(&program[..end]).map(|target| Arc::clone(target)))
        };
        let (mut programs, mut others) = (Vec::new(), Vec::new());
        for program in found {
            let owner = owners.of_program(self, &program);
            match owner.or_else(|| owners.named_after(&program).map(|target| (target, false))) {
                Some((target, is_sure)) => programs.push((program, target, is_sure)),
                None => {
                    let target = owners.by_package(&program).or_else(|| of_foreign(&program));
                    others.extend(target.map(|target| (program, target)));
                }
            }
        }
        programs.extend(self.unnamed_programs(others).await);
        programs
    }

    /// A target that has outputs in each of these directories.
    fn named_in(&self, directories: &BTreeSet<String>) -> HashMap<&str, &Arc<TargetId>> {
        let wanted = self.ledger.wanted.iter().filter_map(|(path, wanted)| {
            let directory = path
                .parent()
                .filter(|directory| directories.contains(*directory))?;
            let owns = wanted.class > Class::Known && may_own(&self.build, &wanted.target);
            owns.then_some((directory, &wanted.target))
        });
        wanted.collect()
    }

    /// Of programs in targets' packages that no event names: those that this build has made, or that were wanted before
    /// because of a target of this build. A program may have any name, and need not be among its target's outputs.
    async fn unnamed_programs(
        &self,
        others: Vec<(String, Arc<TargetId>)>,
    ) -> Vec<(String, Arc<TargetId>, bool)> {
        let Some(place) = self.site.open_root().filter(|_| !others.is_empty()) else {
            return Vec::new();
        };
        let (root, id, record) = (place.root.clone(), place.id, self.shared.record.clone());
        // None of a test's own, as above.
        let tests = self.ledger.targets.keys();
        let tests = tests.filter(|target| self.build.is_tested(&target.label));
        let tests: Vec<String> = tests
            .filter_map(|target| runfiles::place_of(&target.label))
            .map(|(package, name)| format!("{package}{name}"))
            .collect();
        let is_tests = |program: &str| {
            let place = runfiles::place_in_bin(program).unwrap_or_default();
            tests.iter().any(|test| place.starts_with(test.as_str()))
        };
        let mut others = others;
        others.retain(|(program, _)| !is_tests(program));
        let begun_ms = self.row.started_ms.saturating_sub(CLOCKS_MS);
        let targets = self.ledger.targets.keys();
        let labels: HashSet<String> = targets.map(|target| target.label.clone()).collect();
        let look = move || {
            let is_of_build = |program: &String| {
                root.place
                    .manifest_made_ms(program)
                    .is_some_and(|made| made >= begun_ms)
                    || ExecPath::new(program).is_ok_and(|path| {
                        let row = record.output(id, &path);
                        row.is_some_and(|row| row.class > Class::Known && labels.contains(&*row.label))
                    })
            };
            let of_build = others.into_iter().filter(|(program, _)| is_of_build(program));
            of_build
                .map(|(program, target)| (program, target, false))
                .collect()
        };
        spawn_blocking(look).await.unwrap_or_default()
    }

    /// What the programs need and is not known to be there; `None` without programs.
    async fn missing_runfiles(&mut self) -> Option<Vec<Missing>> {
        let programs = self.programs().await.into_iter();
        let wanted = programs.filter_map(|(program, target, is_sure)| {
            // None of a test's own program, in a command that tests, for one.
            let most = self.build.most_of_runfiles(&target.label);
            (most > Class::Known).then_some((program, target, is_sure, most))
        });
        let mut programs: Vec<_> = wanted.collect();
        // What two of them need is wanted as much as the one that is wanted more.
        programs.sort_by(|a, b| (Reverse(a.3), &a.0).cmp(&(Reverse(b.3), &b.0)));
        let place = self.site.open_root().filter(|_| !programs.is_empty())?;
        let (root, version) = (place.root.clone(), place.version);
        let exec_root = self
            .build
            .exec_root()
            .unwrap_or_default()
            .trim_end_matches('/')
            .to_owned();
        let look = move || {
            // What a newer build does with its outputs is no business of this one.
            if !root.epoch.is_newest(version) {
                return None;
            }
            let here = root.place.path().to_string_lossy().into_owned();
            let mut looked_at = HashSet::with_hasher(PathHasher::default());
            let mut missing = Vec::new();
            let mut odd = Vec::new();
            for (program, target, is_sure, class) in programs {
                let mut needed = Needed::default();
                let mut reasons = Vec::new();
                match root.place.runfiles_manifest(&program) {
                    Ok(Some(manifest)) => needed.take_in(&manifest, &[&exec_root, &here]),
                    Ok(None) => reasons.push(format!("the manifest of the runfiles of {program} is gone")),
                    Err(error) => reasons.push(format!(
                        "failed to read the manifest of the runfiles of {program}: {error}"
                    )),
                }
                let invalid = needed.odd.iter();
                reasons.extend(
                    invalid.map(|path| format!("{path}, a runfile of {program}, is not a valid output path")),
                );
                odd.extend(
                    reasons
                        .into_iter()
                        .map(|reason| (target.clone(), is_sure, class, reason)),
                );
                let program: Arc<str> = program.into();
                for path in needed.outputs {
                    if !looked_at.insert(path.clone()) {
                        continue;
                    }
                    let seen = root.place.see(&path);
                    if seen == Seen::File {
                        continue;
                    }
                    missing.push(Missing {
                        target: target.clone(),
                        is_sure,
                        program: program.clone(),
                        path,
                        seen,
                    });
                }
            }
            Some((missing, odd))
        };
        let (mut missing, odd) = spawn_blocking(look).await.ok()??;
        for (target, is_sure, class, reason) in odd {
            self.runfile_failed(&target, is_sure, class, &reason);
        }
        // The stream brings what it names, or has said that it cannot be downloaded.
        missing.retain(|missing| !self.ledger.wanted.contains_key(&missing.path));
        Some(missing)
    }

    /// Whether only trees are missing, and all that the action cache said of them before is there.
    async fn trees_are_whole(&self, missing: &[Missing]) -> bool {
        let Some(place) = self.site.open_root() else {
            return false;
        };
        let Some(Remembered { state, trees, .. }) = self.shared.action_cache(place.id) else {
            return false;
        };
        let is_known =
            |missing: &Missing| missing.seen == Seen::Directory && trees.contains_key(&missing.path);
        if !missing.iter().all(is_known) || !matches!(self.action_cache(Some(state)).await, Known::Unchanged)
        {
            return false;
        }
        let root = place.root.clone();
        let asked: Vec<ExecPath> = missing.iter().map(|missing| missing.path.clone()).collect();
        let are_there = spawn_blocking(move || {
            let files = asked.iter().filter_map(|tree| trees.get(tree)).flatten();
            files
                .into_iter()
                .all(|path| root.place.see(path) != Seen::Nothing)
        });
        are_there.await.unwrap_or(false)
    }

    async fn want_runfiles(&mut self, missing: Vec<Missing>, cached: Known) {
        let Some(place) = self.site.open_root() else {
            return;
        };
        let (record, root, id) = (self.shared.record.clone(), place.root.clone(), place.id);
        let known = std::mem::take(&mut self.ledger.known);
        let with_ways = missing.into_iter().map(|missing| {
            let is_on_its_way = self.ledger.directories.contains(&missing.path);
            (missing, is_on_its_way)
        });
        let missing: Vec<(Missing, bool)> = with_ways.collect();
        // In its other modes, Bazel has filled the directories that it makes.
        let is_minimal = |line: &CommandLine| line.download_mode() == Some("minimal");
        let may_be_hollow = self.build.command_line().is_none_or(is_minimal);
        let look = move || {
            let look = |(missing, is_on_its_way): (Missing, bool)| {
                let mut outputs = match &cached {
                    Known::Facts(facts, _) => of_facts(facts, &missing.path),
                    _ => Vec::new(),
                };
                if outputs.is_empty() {
                    // What the stream names without asking for it is recorded.
                    outputs = of_stream(&record, id, &known, &missing.path);
                }
                Found::look(missing, outputs, &root, may_be_hollow && !is_on_its_way)
            };
            let found: Vec<Found> = missing.into_iter().map(look).collect();
            (found, cached, known)
        };
        let Ok((found, cached, known)) = spawn_blocking(look).await else {
            tracing::error!("looking for runfiles panicked; this is a bug in outhaul");
            return;
        };
        self.ledger.known = known;
        let mut wants: HashMap<Arc<TargetId>, Vec<Named>> = HashMap::new();
        let mut trees = HashMap::new();
        for found in found {
            let Some(named) = self.named_of(&found, &cached) else {
                continue;
            };
            if !named.is_empty() {
                let target = found.missing.target.clone();
                wants.entry(target).or_default().extend(named);
            }
            if found.is_tree() {
                let files = found.outputs.into_iter().map(|(path, _)| path);
                trees.insert(found.missing.path, files.collect());
            }
        }
        // It is remembered when it is recorded.
        if let Site::Open(place) = &mut self.site {
            place.known = Some((cached, Arc::new(trees)));
        }
        for (target, named) in wants {
            self.outputs(target, named).await;
        }
        self.ask().await;
    }

    /// What is wanted of what was found; `None` if it is lost.
    fn named_of(&mut self, found: &Found, cached: &Known) -> Option<Vec<Named>> {
        let Missing {
            target,
            is_sure,
            program,
            path,
            ..
        } = &found.missing;
        let tree = Some(path.as_str()).filter(|_| found.is_tree());
        if let Some(reason) = found.is_lost(cached) {
            let verdict = self
                .build
                .select_runfile(&target.label, path.as_str(), tree, None);
            let reason = format!("{path}, a runfile of {program}: {reason}");
            self.runfile_failed(target, *is_sure, verdict.class, &reason);
            return None;
        }
        let mut wanted = Vec::new();
        for (path, content) in found.absent.iter().filter_map(|at| found.outputs.get(*at)) {
            let size = match content {
                OutputContent::Blob(digest) => Some(digest.size()),
                _ => None,
            };
            let verdict = self
                .build
                .select_runfile(&target.label, path.as_str(), tree, size);
            if verdict.class > Class::Known {
                wanted.push(Named {
                    path: path.clone(),
                    content: content.clone(),
                    class: verdict.class,
                    rule: verdict.rule,
                    group: Arc::default(),
                    event: ACTION_CACHE.into(),
                    sequence: self.ledger.stream.taken(),
                    set: None,
                });
            }
        }
        Some(wanted)
    }

    fn runfile_failed(&mut self, target: &Arc<TargetId>, is_sure: bool, class: Class, reason: &str) {
        if class == Class::Known {
            return;
        }
        // Not all of a target that failed was made; and a manifest may be left from another build.
        let row = self.ledger.targets.get_mut(target);
        if !is_sure || row.as_ref().is_some_and(|row| !row.success) {
            self.ledger.tally.note(reason);
            return;
        }
        tracing::warn!(invocation = %self.row.invocation_id, "{reason}");
        if class != Class::Required {
            return self.fail(class, reason);
        }
        if let Some(row) = row {
            Arc::make_mut(row).failed += 1;
        }
        // No program is made of files that tests leave.
        self.ledger.tally.lost += 1;
        self.fail(class, reason);
    }
}

/// Whose a program may be.
struct Owners<'a> {
    /// By the places of their names, and how much their runfiles can be wanted.
    by_name: HashMap<String, (Class, &'a Arc<TargetId>)>,
    /// By their packages, and how much their runfiles can be wanted: of several, one of those where that is most. Those of
    /// tests are not, in a command that tests.
    by_package: HashMap<String, (Class, &'a Arc<TargetId>)>,
}

impl<'a> Owners<'a> {
    fn of(targets: &'a IndexMap<Arc<TargetId>, Arc<TargetRow>>, build: &mut Build) -> Self {
        let mut owners = Self {
            by_name: HashMap::new(),
            by_package: HashMap::new(),
        };
        for (target, row) in targets {
            if row.success
                && may_own(build, target)
                && let Some((package, name)) = runfiles::place_of(&target.label)
            {
                let most = build.most_of_runfiles(&target.label);
                owners.by_name.insert(format!("{package}{name}"), (most, target));
                let before = owners.by_package.get(&package);
                if before.is_none_or(|(before, _)| *before < most) {
                    owners.by_package.insert(package, (most, target));
                }
            }
        }
        owners
    }

    /// The target that a program is of, and whether that is sure; `None` for one that was requested only by filegroups
    /// of files, or in an earlier build.
    fn of_program(&self, actor: &Actor, program: &str) -> Option<(Arc<TargetId>, bool)> {
        let named = actor
            .ledger
            .wanted
            .get(program)
            .filter(|wanted| wanted.class > Class::Known);
        let place = runfiles::place_in_bin(program)?;
        let owner = named.filter(|wanted| may_own(&actor.build, &wanted.target));
        if let Some(wanted) = owner
            && let Some((package, _)) = runfiles::place_of(&wanted.target.label)
            && place.starts_with(&package)
        {
            return Some((wanted.target.clone(), true));
        }
        if let Some((_, target)) = self.by_name.get(&*place) {
            return Some(((*target).clone(), true));
        }
        // An alias has the outputs, and the runfiles, of what is in another package.
        if let Some(wanted) = owner {
            return Some((wanted.target.clone(), false));
        }
        // It is wanted, but another one has named it first.
        named?;
        self.by_package(program).map(|target| (target, false))
    }

    /// The target of the program's package whose name its file's has before a dot, such as `app` for `launchers/app.sh`. Whichever
    /// build made its manifest, it may well be of that target.
    fn named_after(&self, program: &str) -> Option<Arc<TargetId>> {
        let place = runfiles::place_in_bin(program)?;
        let ends = place.rmatch_indices('/').map(|(at, _)| at + 1).chain([0]);
        let file = place.rsplit('/').next()?;
        // Only dots: `app_test` is another target than `app`.
        let stem = file.split('.').next().filter(|stem| stem.len() < file.len())?;
        let mut packages = ends.map(|end| &place[..end]);
        let (most, target) = packages.find_map(|package| self.by_name.get(&format!("{package}{stem}")))?;
        (*most > Class::Known).then(|| (*target).clone())
    }

    /// A target of the package that a program is in.
    fn by_package(&self, program: &str) -> Option<Arc<TargetId>> {
        let place = runfiles::place_in_bin(program)?;
        let ends = place.rmatch_indices('/').map(|(at, _)| at + 1).chain([0]);
        let mut packages = ends.filter_map(|end| self.by_package.get(&place[..end]));
        packages.next().map(|(_, target)| (*target).clone())
    }
}

/// A filegroup passes on the outputs of others, whose runfiles are not built for it.
fn may_own(build: &Build, target: &TargetId) -> bool {
    target.aspect.is_empty() && !build.is_filegroup(&target.label)
}

impl Found {
    /// Looks for what should be there. Blocks on the file system.
    fn look(
        missing: Missing,
        outputs: Vec<(ExecPath, OutputContent)>,
        root: &Root,
        may_be_hollow: bool,
    ) -> Self {
        let is_directory = missing.seen == Seen::Directory;
        let is_absent = |path: &ExecPath| {
            !is_directory || (*path != missing.path && root.place.see(path) == Seen::Nothing)
        };
        let absent = outputs.iter().enumerate();
        let absent = absent.filter(|(_, (path, _))| is_absent(path));
        Self {
            absent: absent.map(|(at, _)| at).collect(),
            is_empty: may_be_hollow && is_directory && root.place.is_empty(&missing.path),
            outputs,
            missing,
        }
    }

    fn is_tree(&self) -> bool {
        let path = &self.missing.path;
        self.missing.seen == Seen::Directory || self.outputs.iter().any(|(of, _)| of != path)
    }

    /// Why it cannot be downloaded, if it cannot.
    fn is_lost(&self, known: &Known) -> Option<String> {
        if !self.outputs.is_empty() {
            return None;
        }
        let path = &self.missing.path;
        match known {
            // What is in a tree is not known, and Bazel creates the directories of trees early.
            Known::Nothing(reason) if self.is_empty => Some(format!(
                "it is an empty directory on disk, but the build may have put files into it; {reason}"
            )),
            _ if self.missing.seen == Seen::Directory => None,
            Known::Nothing(reason) => Some(reason.clone()),
            Known::Facts(facts, _) if facts.is_ambiguous(path) => {
                Some("Bazel's action cache has two digests for it and does not say which is newer".to_owned())
            }
            _ => Some("its digest is in neither the build's events nor Bazel's action cache".to_owned()),
        }
    }
}

/// What the action cache has at a path: a file, or the files of a tree.
fn of_facts(facts: &Facts, path: &ExecPath) -> Vec<(ExecPath, OutputContent)> {
    let output =
        |output: &action_cache::Output| (output.path.clone(), OutputContent::Blob(output.digest.clone()));
    match facts.get(path.as_str()) {
        Some(file) => vec![output(file)],
        None => facts.tree(path.as_str()).map(output).collect(),
    }
}

/// What the stream has said of a path that is not wanted.
fn of_stream(
    record: &Record,
    root: RootId,
    known: &HashSet<u64, PathHasher>,
    path: &ExecPath,
) -> Vec<(ExecPath, OutputContent)> {
    let is_known = |path: &ExecPath| known.contains(&known.hasher().hash_one(path.as_str()));
    if is_known(path)
        && let Some(row) = record.output(root, path)
    {
        return vec![(path.clone(), row.content)];
    }
    let below = record.scan_outputs(root, &format!("{path}/"));
    let of_it = below.filter(|(path, _)| is_known(path));
    of_it.map(|(path, row)| (path, row.content)).collect()
}
