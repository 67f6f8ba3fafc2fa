//! What the tools are asked for, and what they answer.

use std::{
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use rmcp::schemars::{self, JsonSchema};
use rustix::fs::CWD;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Mutex;

use super::bounded::{List, tail};
use crate::{
    cli::{
        client::{Asking, Client},
        exec,
        exit::Failure,
        get::{OfBuild, bring::materialized, of_targets, resolved},
        runtime,
        scratch::Scratch,
        stage::{WhichArgs, failure, text, workspace_named},
        view,
    },
    invocation::{
        pattern::{self, TargetPattern},
        policy::PathRegex,
    },
    open_files::open_regular,
    proto::outhaul::v1 as pb,
};

/// Entries of a list that is not given a limit, and of any.
const LIMIT: usize = 50;
const LIMITS: usize = 500;
/// Bytes of logs, as JSON, that are not given a limit, and of any. Those of a list are more.
const LOG_BYTES: u64 = 8 << 10;
const LOGS_BYTES: u64 = 32 << 10;
/// Bytes that each of several logs may have at least.
const LEAST: u64 = 512;
/// Builds that are looked at.
const BUILDS: u32 = 10_000;
/// What test logs are called.
const TEST_LOGS: &str = r".*/(test|attempt_\d+)\.log";
/// Who may open the record. Agents ask several things at once; where no daemon runs, only one at a time can have it.
static TURN: Mutex<()> = Mutex::const_new(());

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BuildsWish {
    /// Only builds of this workspace: an absolute path
    workspace: Option<PathBuf>,
    /// At most so many; 50 if not given, 500 at most
    limit: Option<usize>,
}

/// A build.
#[derive(Deserialize, JsonSchema)]
struct Which {
    /// The build's invocation ID; the workspace does not matter then. If not given, the newest build of the workspace
    invocation_id: Option<String>,
    /// The workspace, as an absolute path; if not given, that of the directory where the server was started, or any if there
    /// is none
    workspace: Option<PathBuf>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BuildWish {
    #[serde(flatten)]
    which: Which,
    /// Whether only targets that failed, or have outputs that could not be downloaded, are shown
    #[serde(default)]
    failed_only: bool,
    /// At most so many targets; 50 if not given, 500 at most
    limit: Option<usize>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct OutputsWish {
    #[serde(flatten)]
    which: Which,
    /// Target patterns such as //pkg:name, //pkg:all, //pkg/... or, to leave targets out, -//pkg:name
    #[serde(default)]
    targets: Vec<String>,
    /// A regular expression that the whole path below the output root (bazel-out/...) must match
    path: Option<String>,
    /// At most so many; 50 if not given, 500 at most
    limit: Option<usize>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct WhyWish {
    /// Paths of outputs: absolute, or below the workspace where the server was started, such as bazel-bin/pkg/x
    paths: Vec<PathBuf>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct LogWish {
    #[serde(flatten)]
    which: Which,
    /// The test's target, such as //pkg:test
    target: String,
    /// About so many bytes of all its logs together; 8192 if not given, 32768 at most
    bytes: Option<u64>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct GetWish {
    #[serde(flatten)]
    which: Which,
    /// Target patterns such as //pkg:name, //pkg:all or //pkg/...
    #[serde(default)]
    targets: Vec<String>,
    /// Only these output groups of the targets
    #[serde(default)]
    output_groups: Vec<String>,
    /// Or paths of outputs: absolute, or below the workspace where the server was started, such as bazel-bin/pkg/x
    #[serde(default)]
    paths: Vec<PathBuf>,
}

impl Which {
    /// Invocation ID or workspace; or neither.
    fn named(self) -> Result<(String, String), Failure> {
        let invocation = self.invocation_id.filter(|id| !id.is_empty());
        let workspace = self.workspace.filter(|path| !path.as_os_str().is_empty());
        let which = WhichArgs {
            workspace: workspace.filter(|_| invocation.is_none()),
            invocation,
        };
        which.or_around()
    }

    const fn is_given(&self) -> bool {
        self.invocation_id.is_some() || self.workspace.is_some()
    }
}

/// Asks the client that knows a build; for what is about none, the daemon, or the state directory's own record.
fn ask<T>(
    asking: &Asking,
    build: Option<(&str, &str)>,
    work: impl AsyncFnOnce(&mut Client) -> Result<T, Failure>,
) -> Result<T, Failure> {
    runtime()?.block_on(async {
        let turn = TURN.lock().await;
        let client = match build {
            Some((invocation, workspace)) => asking.client_of_build(invocation, workspace).await?,
            None => asking.client().await?,
        };
        let _turn = client.here.is_some().then_some(turn);
        client.with(work).await
    })
}

/// The id of the build that is meant.
async fn id_of(client: &mut Client, (id, workspace): (&str, &str)) -> Result<String, Failure> {
    match workspace {
        "" => Ok(id.to_owned()),
        workspace => client.newest_of_workspace(workspace).await,
    }
}

fn limit(wished: Option<usize>) -> usize {
    wished.unwrap_or(LIMIT).min(LIMITS)
}

pub(super) fn builds(asking: &Asking, wish: BuildsWish) -> Result<Value, Failure> {
    let mut list = List::new(limit(wish.limit));
    let workspace = workspace_named(wish.workspace.as_deref())?;
    let rows = ask(asking, Some(("", &workspace)), async |client| {
        client.invocations(BUILDS).await
    })?;
    for row in rows {
        // However many slashes it is written with.
        if workspace.is_empty() || Path::new(&row.workspace) == Path::new(&workspace) {
            list.push(|| view::invocation_json(&row));
        }
    }
    Ok(list.into_json("builds"))
}

pub(super) fn build(asking: &Asking, wish: BuildWish) -> Result<Value, Failure> {
    let (id, workspace) = wish.which.named()?;
    let meant = (id.as_str(), workspace.as_str());
    let (row, mut targets) = ask(asking, Some(meant), async |client| {
        let id = id_of(client, meant).await?;
        client.invocation(&id).await
    })?;
    let is_failed = |target: &pb::Target| !target.success || target.failed > 0;
    targets.sort_by_key(|target| !is_failed(target));
    let mut list = List::new(limit(wish.limit));
    for target in targets {
        if is_failed(&target) || !wish.failed_only {
            list.push(|| view::target_json(&target));
        }
    }
    let mut answer = list.into_json("targets");
    answer["build"] = view::invocation_json(&row);
    Ok(answer)
}

pub(super) fn outputs(asking: &Asking, wish: OutputsWish) -> Result<Value, Failure> {
    let (id, workspace) = wish.which.named()?;
    let meant = (id.as_str(), workspace.as_str());
    let patterns = wish.targets.iter().map(|text| {
        text.parse::<TargetPattern>()
            .map_err(|e| Failure::usage(format!("targets: {text}: {e}")))
    });
    let patterns = patterns.collect::<Result<Vec<_>, _>>()?;
    let path = wish.path.as_ref().map(|text| {
        text.parse::<PathRegex>()
            .map_err(|e| Failure::usage(format!("path: {text}: {e}")))
    });
    let path = path.transpose()?;
    let mut list = List::new(limit(wish.limit));
    ask(asking, Some(meant), async |client| {
        let id = id_of(client, meant).await?;
        client
            .outputs(&id, pb::OutputClass::Unspecified, |output| {
                let is_meant = path.as_ref().is_none_or(|path| path.matches(&output.exec_path))
                    && (patterns.is_empty() || pattern::matches(&patterns, &output.label));
                if is_meant {
                    list.push(|| view::output_json(&output));
                }
                Ok(())
            })
            .await
    })?;
    Ok(list.into_json("outputs"))
}

pub(super) fn why(asking: &Asking, wish: &WhyWish) -> Result<Value, Failure> {
    let paths = resolved(&wish.paths)?;
    let answers = ask(asking, None, async |client| client.why(paths).await)?;
    let mut list = List::new(LIMITS);
    for (path, answer) in wish.paths.iter().zip(answers) {
        list.push(|| match &answer.output {
            Some(output) if !output.exec_path.is_empty() => json!({
                "path": path,
                "why": answer.lines,
                "output": view::output_json(output),
            }),
            _ => json!({ "path": path, "why": ["no recorded build has named it"] }),
        });
    }
    Ok(list.into_json("answers"))
}

/// Copies the logs to a directory of our own: the output tree may have those of another build, or none.
pub(super) fn test_log(asking: &Asking, wish: LogWish) -> Result<Value, Failure> {
    let wanted = exec::target(&wish.target)?;
    let (id, workspace) = wish.which.named()?;
    let scratch = Scratch::temporary("outhaul-mcp-")?;
    let directory = scratch.path().join("logs");
    let request = pb::StageRequest {
        invocation_id: id.clone(),
        workspace: workspace.clone(),
        directory: text(&directory, "TMPDIR")?,
        wish: Some(pb::StageWish {
            include: vec![TEST_LOGS.to_owned()],
            ..wanted
        }),
        wait_all: true,
        ..pb::StageRequest::default()
    };
    let staged = ask(asking, Some((&id, &workspace)), async |client| {
        client.stage(request).await.map_err(|status| failure(&status))
    })?;
    let most = wish.bytes.unwrap_or(LOG_BYTES).min(LOGS_BYTES);
    let share = (most / (staged.outputs.len().max(1) as u64)).max(LEAST.min(most));
    let mut list = List::new(LIMITS);
    for output in &staged.outputs {
        let log = end_of(&directory.join(&output.path), share);
        list.push(|| match log {
            Ok((end, bytes)) if output.error.is_empty() => {
                json!({ "path": output.exec_path, "size": bytes, "tail": end })
            }
            Ok(_) => json!({ "path": output.exec_path, "error": output.error }),
            Err(error) => {
                let reason = view::non_empty(&output.error).map_or_else(|| error.to_string(), str::to_owned);
                json!({ "path": output.exec_path, "error": reason })
            }
        });
    }
    let mut answer = list.into_json("logs");
    answer["invocation_id"] = staged.invocation_id.into();
    if !staged.notes.is_empty() {
        answer["notes"] = staged.notes.into();
    }
    Ok(answer)
}

/// The end of a file, at most so many bytes as JSON, and its size. A build may have made its log a link to anything.
fn end_of(path: &Path, most: u64) -> io::Result<(String, u64)> {
    let (mut file, size) =
        open_regular(CWD, path)?.ok_or_else(|| io::Error::other("it is not a regular file"))?;
    let skipped = size.saturating_sub(most);
    file.seek(SeekFrom::Start(skipped))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    Ok((tail(&bytes, skipped == 0, most), size))
}

pub(super) fn get(asking: &Asking, wish: GetWish) -> Result<Value, Failure> {
    if wish.targets.is_empty() && wish.paths.is_empty() {
        return Err(Failure::usage("name targets or paths"));
    }
    let selects = !wish.targets.is_empty();
    if !selects && (wish.which.is_given() || !wish.output_groups.is_empty()) {
        return Err(Failure::usage(
            "invocation_id, workspace and output_groups are for targets; a path says itself which build it is of",
        ));
    }
    let mut paths = resolved(&wish.paths)?;
    let (id, workspace) = wish.which.named()?;
    let targets = pb::StageWish {
        targets: wish.targets,
        output_groups: wish.output_groups,
        ..pb::StageWish::default()
    };
    let build = Some((id.as_str(), workspace.as_str())).filter(|_| selects);
    let mut results = ask(asking, build, async |client| {
        let mut of_build = None;
        if selects {
            let (build, outputs) = of_targets(client, targets, &id, &workspace).await?;
            let named = OfBuild::new(&build, outputs);
            paths.extend(named.outputs.keys().cloned());
            of_build = Some(named);
        }
        materialized(client, &paths, of_build.as_ref(), "").await
    })?;
    results.sort_by(|a, b| (a.error.is_empty(), &a.path).cmp(&(b.error.is_empty(), &b.path)));
    let mut list = List::new(LIMITS);
    for result in results {
        list.push(|| {
            json!({
                "path": result.path,
                "outcome": view::non_empty(&result.outcome().name()),
                "error": view::non_empty(&result.error),
            })
        });
    }
    Ok(list.into_json("outputs"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_are_read_and_only_their_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("test.log"), "first\nlast\n").unwrap();
        std::os::unix::fs::symlink("test.log", path("link")).unwrap();
        rustix::fs::mkfifoat(CWD, path("pipe"), rustix::fs::Mode::RWXU).unwrap();
        assert_eq!(end_of(&path("test.log"), 8).unwrap(), ("last\n".to_owned(), 11));
        for other in ["link", "pipe", "none", ""] {
            assert!(end_of(&path(other), 8).is_err(), "{other}");
        }
    }
}
