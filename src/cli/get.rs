//! `outhaul get`: recorded outputs to disk, by path, label or pattern.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    io::Write as _,
    path::{Path, PathBuf},
};

use clap::Args;
use regex::Regex;
use serde_json::json;

use super::{
    client::{AskArgs, Client},
    exit,
    exit::Failure,
    paths, print, runfiles, runtime,
    stage::{self, WhichArgs},
    view,
};
use crate::{
    control::{Link, links_in, without_intermediates},
    invocation::{
        pattern::{self, TargetPattern},
        policy::PathRegex,
        rows,
    },
    printable::printable,
    proto::outhaul::v1 as pb,
};

/// Paths of one request to the daemon.
pub(super) const AT_ONCE: usize = 50_000;

/// Arguments of `outhaul get`.
#[derive(Debug, Args)]
pub(super) struct GetArgs {
    /// Outputs, by path: as you see them (bazel-bin/pkg/x), absolute, or as exec paths (bazel-out/…); a directory
    /// stands for everything in it, and * ? ** match recorded outputs. Or outputs of targets: //pkg:name, //pkg:all,
    /// //pkg/..., or with a leading `-` to exclude (after `--`)
    #[arg(value_name = "PATH|TARGET", required_unless_present_any = ["path", "all_of", "failed"])]
    wanted: Vec<PathBuf>,

    /// Only these output groups of the targets (repeatable)
    #[arg(long, value_name = "GROUP", value_delimiter = ',')]
    output_group: Vec<String>,

    /// Only outputs of the targets whose whole exec path, or that of their tree artifact, matches, and of --all-of; without
    /// these, all recorded outputs whose whole exec path matches (repeatable)
    #[arg(long, value_name = "REGEX")]
    path: Vec<String>,

    /// Everything that is recorded of these packages, with intermediate outputs: //pkg:all or //pkg/... (repeatable)
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    all_of: Vec<String>,

    /// The outputs of failed tests: logs, XML reports and undeclared outputs; with targets, only of these
    #[arg(long)]
    failed: bool,

    /// With everything that the programs among them need at run time (their runfiles), by the manifests that Bazel wrote
    /// beside them on this machine
    #[arg(long)]
    runfiles: bool,

    #[command(flatten)]
    which: WhichArgs,

    #[command(flatten)]
    ask: AskArgs,
}

/// What is wanted, as it was written.
#[derive(Default)]
struct Wanted {
    paths: Vec<PathBuf>,
    globs: Vec<Glob>,
    targets: Vec<String>,
    /// All that matches one of them.
    regexes: Vec<PathRegex>,
    packages: Vec<TargetPattern>,
    /// Of the packages, only what matches one of them, if there are any.
    of_packages: Vec<PathRegex>,
}

/// A path with wildcards, against absolute paths.
struct Glob {
    written: String,
    regex: Regex,
    /// What is before the wildcards, if that has one of the build tool's links, such as `bazel-bin`, that is not there.
    by_link: Option<PathBuf>,
    /// Whether that link may have led to any configuration.
    is_of_any: bool,
}

impl Wanted {
    fn read(args: &GetArgs) -> Result<Self, Failure> {
        let mut wanted = Self::default();
        for argument in &args.wanted {
            let text = argument.to_str().unwrap_or_default();
            if is_target(text) {
                wanted.targets.push(text.to_owned());
            } else if text.contains(['*', '?']) && argument.symlink_metadata().is_err() {
                wanted.globs.push(Glob::read(text)?);
            } else {
                wanted.paths.push(argument.clone());
            }
        }
        let of_targets = !wanted.targets.is_empty() || args.failed;
        if let (false, Some(group)) = (of_targets, args.output_group.first()) {
            let message = format!("--output-group={group}: name targets, such as //pkg/...");
            return Err(Failure::usage(message));
        }
        for text in &args.path {
            let regex = text.parse::<PathRegex>();
            let regex = regex.map_err(|e| Failure::usage(format!("--path={text}: {e}")))?;
            if !args.all_of.is_empty() {
                wanted.of_packages.push(regex);
            } else if !of_targets {
                wanted.regexes.push(regex);
            }
        }
        for text in &args.all_of {
            let pattern: TargetPattern = text
                .parse()
                .map_err(|e| Failure::usage(format!("--all-of={text}: {e}")))?;
            if pattern.is_exact() {
                let message = format!("--all-of={text}: name packages: //pkg:all or //pkg/...");
                return Err(Failure::usage(message));
            }
            wanted.packages.push(pattern);
        }
        Ok(wanted)
    }

    /// Whether all that is on record must be gone through.
    fn needs_list(&self) -> bool {
        !(self.globs.is_empty() && self.regexes.is_empty() && self.packages.is_empty())
    }
}

/// Whether an argument is a target pattern and not a path.
pub(super) fn is_target(text: &str) -> bool {
    let text = text.strip_prefix('-').unwrap_or(text);
    text.starts_with("//") || (text.starts_with('@') && text.contains("//"))
}

impl Glob {
    /// Whether a pattern by a link is about a build of one of these workspaces. A link is in a workspace, not above it.
    fn is_meant(&self, workspaces: &[PathBuf]) -> bool {
        self.by_link.as_ref().is_none_or(|before| {
            workspaces.iter().any(|workspace| {
                let depth = workspace.components().count();
                before.starts_with(workspace) && links_in(before, depth).next().is_some()
            })
        })
    }

    /// `*` and `?` stay in one name, `**` does not.
    fn read(text: &str) -> Result<Self, Failure> {
        let fixed = |part: &&str| !part.contains(['*', '?']);
        let parts: Vec<&str> = text.split('/').collect();
        let fixed = parts.iter().take_while(|part| fixed(part)).count();
        let (before, rest) = text.split_at(parts[..fixed].iter().map(|part| part.len() + 1).sum());
        // Links on the way lead to where outputs are recorded.
        let inside = paths::resolve(&Path::new(before).join("x"));
        let inside = inside.map_err(|e| Failure::usage(format!("{text}: {e}")))?;
        let before = inside.parent().unwrap_or(Path::new(""));
        let before = before.to_str().unwrap_or_default().trim_end_matches('/');
        let links = if before.starts_with('/') && !before.contains("/execroot/") {
            links_in(Path::new(before), 0).collect()
        } else {
            Vec::new()
        };
        // An exec path that leads nowhere from here.
        let start = if before.starts_with('/') { "^" } else { "/" };
        let mut starts = vec![format!("{start}{}", regex::escape(before))];
        starts.extend(links.iter().map(|(link, below)| {
            let slash = if below.is_empty() { "" } else { "/" };
            let below = regex::escape(below);
            match link {
                Link::Out => format!("/bazel-out{slash}{below}"),
                Link::Of(kind) => format!("/bazel-out/[^/]+/{kind}{slash}{below}"),
            }
        }));
        let mut regex = format!("(?:{})/", starts.join("|"));
        let mut rest = rest;
        while let Some(letter) = rest.chars().next() {
            let (taken, meaning) = match letter {
                '*' if rest.starts_with("**/") => (3, "(?:.*/)?".to_owned()),
                '*' if rest.starts_with("**") => (2, ".*".to_owned()),
                '*' => (1, "[^/]*".to_owned()),
                '?' => (1, "[^/]".to_owned()),
                other => (other.len_utf8(), regex::escape(&rest[..other.len_utf8()])),
            };
            regex.push_str(&meaning);
            rest = &rest[taken..];
        }
        regex.push('$');
        let regex = Regex::new(&format!("(?s){regex}"));
        Ok(Self {
            written: text.to_owned(),
            by_link: (!links.is_empty()).then(|| before.into()),
            is_of_any: links.iter().any(|(link, _)| matches!(link, Link::Of(_))),
            regex: regex.map_err(|e| Failure::usage(format!("{text}: {e}")))?,
        })
    }
}

pub(super) fn main(args: &GetArgs) -> Result<u8, Failure> {
    let wanted = Wanted::read(args)?;
    let mut paths = resolved(&wanted.paths)?;
    let selects = wanted.needs_list() || !wanted.targets.is_empty() || args.failed;
    let (invocation, workspace) = if selects {
        args.which.or_around()?
    } else if args.which.is_given() {
        let message = "--invocation and --workspace are for targets and patterns; a path says itself which build it is of";
        return Err(Failure::usage(message));
    } else {
        (String::new(), String::new())
    };
    runtime()?.block_on(async {
        let client = if selects {
            args.ask.client_of_build(&invocation, &workspace).await?
        } else {
            args.ask.client().await?
        };
        let got = async |client: &mut Client| {
            let mut of_build = None;
            if selects {
                if !invocation.is_empty() && (wanted.needs_list() || args.runfiles) {
                    refuse_older(client, &invocation).await?;
                }
                let selected = selected(client, args, &wanted, &invocation, &workspace).await?;
                paths.extend(selected.0);
                of_build = selected.1;
            }
            let show = if args.ask.json { Show::Json } else { Show::Text };
            let (code, there) = get(client, &paths, of_build.as_ref(), show).await?;
            if !args.runfiles || there.is_empty() {
                return Ok(code);
            }
            let runfiles = runfiles::of(client, &there).await?;
            if runfiles.programs == 0 {
                return Err(Failure::not_found(runfiles::NO_MANIFEST));
            }
            Ok(worse(code, runfiles.get(client, &there, show).await?))
        };
        client.with(got).await
    })
}

/// That one failed to download weighs more than that another is not known.
pub(super) const fn worse(one: u8, other: u8) -> u8 {
    match (one, other) {
        (exit::FAILED, _) | (_, exit::FAILED) => exit::FAILED,
        (exit::OK, code) | (code, _) => code,
    }
}

/// How results are shown.
#[derive(Debug, Clone, Copy)]
pub(super) enum Show {
    Text,
    Json,
    /// Only what failed.
    Failures,
}

/// Outputs of one build, as that one has named them.
pub(super) struct OfBuild {
    id: String,
    /// By their absolute paths.
    outputs: HashMap<String, pb::StagedOutput>,
}

impl OfBuild {
    pub(super) fn new(build: &pb::Invocation, outputs: Vec<pb::StagedOutput>) -> Self {
        let below = |output: pb::StagedOutput| (format!("{}/{}", build.exec_root, output.exec_path), output);
        Self {
            id: build.invocation_id.clone(),
            outputs: outputs.into_iter().map(below).collect(),
        }
    }

    /// Whether an output has the content that the build has named there; `None` if it has named nothing there.
    pub(super) fn has(&self, output: &pb::Output) -> Option<bool> {
        if output.invocation_id == self.id {
            return Some(true);
        }
        let named = self.outputs.get(&view::absolute(output))?;
        let named = (&named.digest, &named.symlink_target, named.directory);
        Some(named == (&output.digest, &output.symlink_target, output.directory))
    }

    /// Makes an error of an output that another build has put in the place of what was asked for.
    fn check(&self, result: &mut pb::materialize_response::Result) {
        if let Some(output) = &result.output
            && result.error.is_empty()
            && self.has(output) == Some(false)
        {
            let (here, id) = (&output.invocation_id, &self.id);
            result.error = format!(
                "build {here} is newer and has other content here; `outhaul stage --invocation {id} --to DIR` copies \
                 what build {id} has named"
            );
            result.outcome = pb::OutputOutcome::Unspecified.into();
        }
    }
}

/// Refuses a build that is not the newest of its output root: what is recorded there, and what Bazel has written beside
/// programs, may be the newest one's.
async fn refuse_older(client: &mut Client, id: &str) -> Result<(), Failure> {
    let (build, _) = client.invocation(id).await?;
    match client.newer_of_root(&build).await? {
        None => Ok(()),
        Some(newer) => Err(Failure::usage(format!(
            "--invocation={id}: build {newer} of the same output root is newer, and paths, packages and --runfiles are \
             about the newest one; name targets, or use `outhaul stage --invocation {id} --to DIR`"
        ))),
    }
}

/// Brings outputs to disk, and shows what came of each. Gives the code, and the outputs that are there. Of a build, only
/// what that one has named counts.
pub(super) async fn get(
    client: &mut Client,
    paths: &[String],
    of_build: Option<&OfBuild>,
    show: Show,
) -> Result<(u8, Vec<pb::Output>), Failure> {
    let mut code = exit::OK;
    let mut there = Vec::new();
    let mut results = materialized(client, paths).await?;
    if let Some(of_build) = of_build {
        results.iter_mut().for_each(|result| of_build.check(result));
    }
    if let (false, Some(failure)) = (matches!(show, Show::Json), all_failed(&results)) {
        return Err(failure);
    }
    for result in results {
        code = worse(code, show.result(&result)?);
        there.extend(result.output.filter(|_| result.error.is_empty()));
    }
    Ok((code, there))
}

/// Why all of several outputs failed, if it is the same for all.
fn all_failed(results: &[pb::materialize_response::Result]) -> Option<Failure> {
    let [first, _, ..] = results else { return None };
    let is_same = |result: &pb::materialize_response::Result| {
        result.output.is_some() && !result.error.is_empty() && result.error == first.error
    };
    results.iter().all(is_same).then(|| {
        let (path, more) = (printable(&first.path), results.len() - 1);
        Failure::failed(format!("{path} and {more} more: {}", printable(&first.error)))
    })
}

/// Brings outputs to disk.
pub(super) async fn materialized(
    client: &mut Client,
    paths: &[String],
) -> Result<Vec<pb::materialize_response::Result>, Failure> {
    let mut results = Vec::with_capacity(paths.len());
    for paths in paths.chunks(AT_ONCE) {
        results.extend(client.materialize(paths.to_vec()).await?);
    }
    Ok(results)
}

impl Show {
    /// Shows what came of one output, and gives the code for it.
    pub(super) fn result(self, result: &pb::materialize_response::Result) -> Result<u8, Failure> {
        let code = match &result.output {
            _ if result.error.is_empty() => exit::OK,
            Some(_) => exit::FAILED,
            None => exit::NOT_FOUND,
        };
        match self {
            Self::Json => {
                let value = json!({
                    "path": result.path,
                    "outcome": view::non_empty(&result.outcome().name()),
                    "error": view::non_empty(&result.error),
                    "output": result.output.as_ref().map(view::output_json),
                });
                writeln!(print::out(), "{value}")?;
            }
            _ if code != exit::OK => {
                let (path, error) = (printable(&result.path), printable(&result.error));
                writeln!(print::err(), "outhaul: {path}: {error}")?;
            }
            Self::Text => {
                let (path, outcome) = (printable(&result.path), result.outcome().name());
                writeln!(print::out(), "{path}: {outcome}")?;
            }
            Self::Failures => {}
        }
        Ok(code)
    }
}

/// The absolute paths of what targets and patterns select, and the outputs that are a build's own.
async fn selected(
    client: &mut Client,
    args: &GetArgs,
    wanted: &Wanted,
    invocation: &str,
    workspace: &str,
) -> Result<(BTreeSet<String>, Option<OfBuild>), Failure> {
    let mut paths = BTreeSet::new();
    let mut of_build = None;
    if !wanted.targets.is_empty() || args.failed {
        let wish = pb::StageWish {
            failed: args.failed,
            targets: wanted.targets.clone(),
            output_groups: args.output_group.clone(),
            include: args.path.clone(),
            ..pb::StageWish::default()
        };
        let (build, outputs) = of_targets(client, wish, invocation, workspace).await?;
        let named = OfBuild::new(&build, outputs);
        paths.extend(named.outputs.keys().cloned());
        of_build = Some(named);
    }
    if wanted.needs_list() {
        // Of the build that is meant.
        let id = match (invocation, workspace) {
            ("", "") => String::new(),
            ("", workspace) => client.newest_of_workspace(workspace).await?,
            (id, _) => id.to_owned(),
        };
        listed(client, &id, wanted, &mut paths).await?;
    }
    Ok((paths, of_build))
}

/// What targets of a build select, and the build.
pub(super) async fn of_targets(
    client: &mut Client,
    wish: pb::StageWish,
    invocation: &str,
    workspace: &str,
) -> Result<(pb::Invocation, Vec<pb::StagedOutput>), Failure> {
    let request = pb::StageRequest {
        invocation_id: invocation.to_owned(),
        workspace: workspace.to_owned(),
        wish: Some(wish),
        dry_run: true,
        ..pb::StageRequest::default()
    };
    let found = client.stage(request).await;
    let found = found.map_err(|status| stage::failure(&status))?;
    for note in &found.notes {
        writeln!(print::err(), "outhaul: {}", printable(note))?;
    }
    let (build, _) = client.invocation(&found.invocation_id).await?;
    Ok((build, found.outputs))
}

/// Adds what is on record and matches.
async fn listed(
    client: &mut Client,
    id: &str,
    wanted: &Wanted,
    paths: &mut BTreeSet<String>,
) -> Result<(), Failure> {
    let mut all = Vec::new();
    // Those that patterns name are packages, too: of an intermediate output, no event tells the label.
    let named = wanted.packages.iter().map(TargetPattern::package);
    let mut packages: HashSet<String> = named.collect();
    let workspaces = workspaces_of(client, id, wanted).await?;
    let are_meant: Vec<bool> = wanted
        .globs
        .iter()
        .map(|glob| glob.is_meant(&workspaces))
        .collect();
    let globs = wanted
        .globs
        .iter()
        .map(|glob| (glob.written.clone(), glob.is_of_any));
    let regexes = wanted
        .regexes
        .iter()
        .map(|regex| (format!("--path={regex}"), false));
    let patterns: Vec<(String, bool)> = globs.chain(regexes).collect();
    // By the configuration where only one counts.
    let mut found = vec![BTreeMap::<(usize, String), Vec<String>>::new(); patterns.len()];
    client
        .outputs(id, pb::OutputClass::Unspecified, |output| {
            let path = format!("{}/{}", output.exec_root, output.exec_path);
            let globs = wanted.globs.iter().zip(&are_meant);
            let globs = globs.map(|(glob, is_meant)| *is_meant && glob.regex.is_match(&path));
            let regexes = wanted
                .regexes
                .iter()
                .map(|regex| regex.matches(&output.exec_path));
            let hits = patterns.iter().zip(globs.chain(regexes));
            for (found, ((_, is_of_any), _)) in found.iter_mut().zip(hits).filter(|(_, (_, hit))| *hit) {
                let configuration = output.exec_path.split('/').nth(1).filter(|_| *is_of_any);
                let configuration = configuration.unwrap_or_default();
                let place = found.entry((configuration.len(), configuration.to_owned()));
                place.or_default().push(path.clone());
            }
            if !wanted.packages.is_empty() {
                if let Some((package, _)) = output.label.split_once(':') {
                    packages.insert(package.trim_start_matches('@').to_owned());
                }
                let narrows = &wanted.of_packages;
                if narrows.is_empty() || narrows.iter().any(|regex| regex.matches(&output.exec_path)) {
                    all.push((path, output.exec_path));
                }
            }
            Ok(())
        })
        .await?;
    for ((written, _), found) in patterns.into_iter().zip(found) {
        // The one with the shortest name, as for paths.
        let (_, found) = found
            .into_iter()
            .next()
            .ok_or_else(|| Failure::not_found(format!("{written}: no recorded output matches")))?;
        paths.extend(found);
    }
    match of_packages(all, &packages, &wanted.packages) {
        Ok(found) => paths.extend(found),
        Err(mut failure) => {
            let (build, _) = client.invocation(id).await?;
            let version = &build.build_tool_version;
            if rows::is_known_by_events_alone(version) {
                failure.message = format!("{}, {}", failure.message, without_intermediates(version));
            }
            return Err(failure);
        }
    }
    Ok(())
}

/// Where the build's workspace is, as it was given and as it is, if any pattern is by a link in it.
async fn workspaces_of(client: &mut Client, id: &str, wanted: &Wanted) -> Result<Vec<PathBuf>, Failure> {
    if wanted.globs.iter().all(|glob| glob.by_link.is_none()) {
        return Ok(Vec::new());
    }
    let (build, _) = client.invocation(id).await?;
    let given = PathBuf::from(build.workspace);
    let real = given.canonicalize().ok();
    let all = [Some(given), real].into_iter().flatten();
    Ok(all
        .filter(|workspace| !workspace.as_os_str().is_empty())
        .collect())
}

/// The paths of those rows that are in a package which matches. Each pattern that takes in must be of use.
fn of_packages(
    rows: Vec<(String, String)>,
    packages: &HashSet<String>,
    patterns: &[TargetPattern],
) -> Result<Vec<String>, Failure> {
    let mut hits = vec![false; patterns.len()];
    let mut paths = Vec::new();
    for (path, exec_path) in rows {
        let Some(label) = label_of(&exec_path, packages) else {
            continue;
        };
        for (hit, pattern) in hits.iter_mut().zip(patterns) {
            *hit |= pattern.is_negative || pattern.covers(&label);
        }
        if pattern::matches(patterns, &label) {
            paths.push(path);
        }
    }
    let missed = patterns.iter().zip(&hits).find(|(_, hit)| !**hit);
    match missed.map(|(pattern, _)| pattern) {
        Some(pattern) => Err(Failure::not_found(format!(
            "--all-of={pattern}: no recorded output is in such a package"
        ))),
        None => Ok(paths),
    }
}

/// A label in the package that an output is in: the nearest directory above that is known to be one, or its own.
fn label_of(exec_path: &str, packages: &HashSet<String>) -> Option<String> {
    // After `bazel-out`, the configuration, and `bin` or the like.
    let below = exec_path.splitn(4, '/').nth(3)?;
    let (repository, below) = match below.strip_prefix("external/") {
        Some(below) => below.split_once('/')?,
        None => ("", below),
    };
    let (directory, name) = below.rsplit_once('/').unwrap_or(("", below));
    let ends = directory.rmatch_indices('/').map(|(at, _)| at);
    let mut above = [directory.len()].into_iter().chain(ends).chain([0]);
    let known = above.find(|&end| packages.contains(&format!("{repository}//{}", &directory[..end])));
    let package = &directory[..known.unwrap_or(directory.len())];
    Some(format!("{repository}//{package}:{name}"))
}

/// Users' paths as the record knows them.
pub(super) fn resolved(paths: &[PathBuf]) -> Result<Vec<String>, Failure> {
    paths
        .iter()
        .map(|path| {
            let resolved =
                paths::resolve(path).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
            resolved.into_os_string().into_string().map_err(|_| {
                Failure::usage(format!(
                    "{}: not UTF-8 (recorded paths always are)",
                    path.display()
                ))
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_by_a_link_is_about_builds_of_its_own_workspace() {
        let workspaces = [PathBuf::from("/home/me/bin/w")];
        for (pattern, is_meant) in [
            ("/home/me/bin/w/bazel-bin/app/*", true),
            ("/home/me/bin/w/bazel-out/*/bin/*", true),
            ("/home/me/bin/*", false),
            ("/home/me/bin/other/bazel-bin/*", false),
            ("bazel-out/*/bin/*", true),
        ] {
            let glob = Glob::read(pattern).unwrap();
            assert_eq!(glob.is_meant(&workspaces), is_meant, "{pattern}");
        }
        assert!(!Glob::read("/w/bazel-out/*/bin/*").unwrap().is_of_any);
        assert!(Glob::read("/w/bazel-bin/*").unwrap().is_of_any);
    }

    #[test]
    fn targets_are_distinguished_from_paths() {
        for (text, target) in [
            ("//pkg:x", true),
            ("-//pkg/...", true),
            ("@repo//pkg:x", true),
            ("@@//:x", true),
            ("bazel-bin/pkg/x", false),
            ("/abs/x", false),
            ("@x", false),
            ("-x", false),
        ] {
            assert_eq!(is_target(text), target, "{text}");
        }
    }

    #[test]
    fn wildcards_stay_in_a_name_unless_there_are_two() {
        for (glob, path, matches) in [
            ("/w/bin/*.txt", "/w/bin/a.txt", true),
            ("/w/bin/*.txt", "/w/bin/sub/a.txt", false),
            ("/w/bin/**/*.txt", "/w/bin/sub/a.txt", true),
            ("/w/bin/**/*.txt", "/w/bin/a.txt", true),
            ("/w/bin/**", "/w/bin/sub/a.txt", true),
            ("/w/b*/?.txt", "/w/bin/a.txt", true),
            ("/w/b*/?.txt", "/w/bin/aa.txt", false),
            ("/w/bin/a.t*", "/w/bin/axt", false),
            ("/w/bin/a.t*", "/x/w/bin/a.txt", false),
            // By links that are not there.
            (
                "/w/bazel-bin/*/*.txt",
                "/ob/execroot/_main/bazel-out/k8/bin/a/b.txt",
                true,
            ),
            (
                "/w/bazel-bin/*/*.txt",
                "/ob/execroot/_main/bazel-out/k8/testlogs/a/b.txt",
                false,
            ),
            (
                "/w/bazel-bin/**",
                "/ob/execroot/_main/bazel-out/k8/bin/a/b.txt",
                true,
            ),
            (
                "/w/bazel-bin/a/*",
                "/ob/execroot/_main/bazel-out/k8/bin/a/b.txt",
                true,
            ),
            (
                "/w/bazel-bin/b/*",
                "/ob/execroot/_main/bazel-out/k8/bin/a/b.txt",
                false,
            ),
            (
                "/w/x-testlogs/**",
                "/ob/execroot/_main/bazel-out/k8/testlogs/a",
                true,
            ),
            (
                "/w/bazel-out/k8/**",
                "/ob/execroot/_main/bazel-out/k8/bin/a",
                true,
            ),
            ("/w/other/**", "/ob/execroot/_main/bazel-out/k8/bin/a", false),
            (
                "bazel-out/*/bin/é*",
                "/ob/execroot/_main/bazel-out/k8/bin/é1",
                true,
            ),
            (
                "bazel-out/*/bin/é*",
                "/ob/execroot/_main/bazel-out/k8/x/é1",
                false,
            ),
        ] {
            let read = Glob::read(glob).unwrap();
            assert_eq!(read.regex.is_match(path), matches, "{glob} {path} {}", read.regex);
        }
    }

    #[test]
    fn an_output_is_in_the_nearest_package_that_is_known() {
        let packages = ["//a", "//a/b", "lib//p"].map(str::to_owned).into();
        for (path, label) in [
            ("bazel-out/k8/bin/a/x", "//a:x"),
            ("bazel-out/k8/bin/a/_objs/x/x.o", "//a:x.o"),
            ("bazel-out/k8/bin/a/b/c/x", "//a/b:x"),
            ("bazel-out/k8/bin/other/x", "//other:x"),
            ("bazel-out/k8/bin/x", "//:x"),
            ("bazel-out/k8/bin/external/lib/p/q/x", "lib//p:x"),
        ] {
            assert_eq!(label_of(path, &packages).as_deref(), Some(label), "{path}");
        }
        assert_eq!(label_of("bazel-out/volatile", &packages), None);
    }

    #[test]
    fn packages_need_no_target_of_theirs_in_the_build() {
        let rows = [
            "bazel-out/k8/bin/app/lib/x",
            "bazel-out/k8/bin/libs/deep/x",
            "bazel-out/k8/bin/x",
        ];
        for (pattern, expected) in [
            ("//libs/...", &["libs/deep/x"][..]),
            ("//libs/deep:all", &["libs/deep/x"]),
            ("//app/lib:all", &["app/lib/x"]),
            ("//app/...", &["app/lib/x"]),
            ("//...", &["app/lib/x", "libs/deep/x", "x"]),
        ] {
            let pattern: TargetPattern = pattern.parse().unwrap();
            let packages = ["//".to_owned(), "//app".to_owned(), pattern.package()].into();
            let rows = rows.map(|path| (path.to_owned(), path.to_owned()));
            let paths = of_packages(rows.into(), &packages, std::slice::from_ref(&pattern));
            let paths = paths.unwrap_or_else(|failure| panic!("{}", failure.message));
            let below = paths
                .iter()
                .map(|path| path.strip_prefix("bazel-out/k8/bin/").unwrap());
            assert_eq!(below.collect::<Vec<_>>(), expected, "{pattern}");
        }
    }

    #[test]
    fn what_all_outputs_fail_with_is_said_once() {
        let result = |path: &str, error: &str| pb::materialize_response::Result {
            path: path.to_owned(),
            error: error.to_owned(),
            output: Some(pb::Output::default()),
            ..Default::default()
        };
        let same = [result("/a", "gone"), result("/b", "gone"), result("/c", "gone")];
        let failure = all_failed(&same).map(|failure| failure.message);
        assert_eq!(failure.as_deref(), Some("/a and 2 more: gone"));
        assert!(all_failed(&same[..1]).is_none());
        assert!(all_failed(&[result("/a", "gone"), result("/b", "evicted")]).is_none());
        assert!(all_failed(&[result("/a", ""), result("/b", "")]).is_none());
    }

    #[test]
    fn each_pattern_of_packages_must_match() {
        let packages = ["//a", "//b"].map(str::to_owned).into();
        for (patterns, expected) in [
            (&["//a:all"][..], Ok(1)),
            (&["//..."], Ok(2)),
            (&["//...", "-//b/..."], Ok(1)),
            (&["//a/...", "-//none/..."], Ok(1)),
            (&["-//b/..."], Ok(1)),
            (&["//a:all", "//none/..."], Err("--all-of=//none/...: ")),
            (&["//none:all", "//a/..."], Err("--all-of=//none:all: ")),
        ] {
            let rows = ["bazel-out/k8/bin/a/x", "bazel-out/k8/bin/b/x"];
            let rows = rows.map(|path| (format!("/w/{path}"), path.to_owned()));
            let read: Vec<TargetPattern> = patterns.iter().map(|text| text.parse().unwrap()).collect();
            match (of_packages(rows.into(), &packages, &read), expected) {
                (Ok(paths), Ok(count)) => assert_eq!(paths.len(), count, "{patterns:?}"),
                (Err(failure), Err(part)) => assert!(failure.message.starts_with(part), "{patterns:?}"),
                (got, _) => panic!("{patterns:?}: {:?}", got.map_err(|failure| failure.message)),
            }
        }
    }
}
