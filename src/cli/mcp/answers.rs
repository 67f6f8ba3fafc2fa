//! What the tools are asked for, and what they answer.

use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use rmcp::schemars::{self, JsonSchema};
use serde::Deserialize;
use serde_json::{Value, json};

use super::bounded::{List, tail};
use crate::{
    cli::{
        client::{Asking, Client},
        exit::Failure,
        get::{OfBuild, bring::materialized, of_targets, resolved},
        runtime,
        scratch::Scratch,
        stage::{WhichArgs, failure, text},
        view,
    },
    invocation::{
        pattern::{self, TargetPattern},
        policy::PathRegex,
    },
    proto::outhaul::v1 as pb,
};

/// Entries of a list that is not given a limit, and of any.
const LIMIT: usize = 50;
const LIMITS: usize = 500;
/// Bytes of logs that are not given a limit, and of any.
const LOG_BYTES: u64 = 8 << 10;
const LOGS_BYTES: u64 = 64 << 10;
/// Builds among which those of a workspace are looked for.
const BUILDS: u32 = 1000;
/// What test logs are called.
const TEST_LOGS: &str = r".*/(test|attempt_\d+)\.log";

#[derive(Deserialize, JsonSchema)]
pub(super) struct BuildsWish {
    /// Only builds of this workspace: an absolute path
    workspace: Option<PathBuf>,
    /// At most so many; 50 if not given, 500 at most
    limit: Option<usize>,
}

/// A build.
#[derive(Deserialize, JsonSchema)]
struct Which {
    /// The build's invocation ID; if not given, the newest build of the workspace
    invocation_id: Option<String>,
    /// The workspace, as an absolute path; if not given, that of the directory where the server was started
    workspace: Option<PathBuf>,
}

#[derive(Deserialize, JsonSchema)]
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
pub(super) struct WhyWish {
    /// Paths of outputs: absolute, or below the workspace where the server was started, such as bazel-bin/pkg/x
    paths: Vec<PathBuf>,
}

#[derive(Deserialize, JsonSchema)]
pub(super) struct LogWish {
    #[serde(flatten)]
    which: Which,
    /// The test's target, such as //pkg:test
    target: String,
    /// At most so many bytes of all its logs together; 8192 if not given, 65536 at most
    bytes: Option<u64>,
}

#[derive(Deserialize, JsonSchema)]
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
    /// Invocation ID and workspace, either or both empty.
    fn named(self) -> Result<(String, String), Failure> {
        let which = WhichArgs {
            invocation: self.invocation_id.filter(|id| !id.is_empty()),
            workspace: self.workspace.filter(|path| !path.as_os_str().is_empty()),
        };
        which.or_around()
    }
}

/// Asks the client that knows a build.
fn ask<T>(
    asking: &Asking,
    (invocation, workspace): (&str, &str),
    work: impl AsyncFnOnce(&mut Client) -> Result<T, Failure>,
) -> Result<T, Failure> {
    runtime()?.block_on(async {
        let client = asking.client_of_build(invocation, workspace).await?;
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
    let workspace = wish.workspace.map(|path| text(&path, "workspace")).transpose()?;
    let named = workspace.as_deref().unwrap_or_default();
    let rows = ask(asking, ("", named), async |client| {
        client.invocations(BUILDS).await
    })?;
    for row in rows {
        if workspace
            .as_ref()
            .is_none_or(|workspace| row.workspace == *workspace)
        {
            list.push(|| view::invocation_json(&row));
        }
    }
    Ok(list.into_json("builds"))
}

pub(super) fn build(asking: &Asking, wish: BuildWish) -> Result<Value, Failure> {
    let (id, workspace) = wish.which.named()?;
    let meant = (id.as_str(), workspace.as_str());
    let (row, mut targets) = ask(asking, meant, async |client| {
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
    ask(asking, meant, async |client| {
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
    let answers = ask(asking, ("", ""), async |client| client.why(paths).await)?;
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
    let (id, workspace) = wish.which.named()?;
    let scratch = Scratch::temporary("outhaul-mcp-")?;
    let directory = scratch.path().join("logs");
    let request = pb::StageRequest {
        invocation_id: id.clone(),
        workspace: workspace.clone(),
        directory: text(&directory, "TMPDIR")?,
        wish: Some(pb::StageWish {
            targets: vec![wish.target.clone()],
            include: vec![TEST_LOGS.to_owned()],
            ..pb::StageWish::default()
        }),
        wait_all: true,
        ..pb::StageRequest::default()
    };
    let staged = ask(asking, (&id, &workspace), async |client| {
        client.stage(request).await.map_err(|status| failure(&status))
    })?;
    let most = wish.bytes.unwrap_or(LOG_BYTES).min(LOGS_BYTES);
    let share = most / (staged.outputs.len().max(1) as u64);
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
    Ok(answer)
}

/// The end of a file, at most so many bytes, and its size.
fn end_of(path: &Path, most: u64) -> std::io::Result<(String, u64)> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let skipped = size.saturating_sub(most);
    file.seek(SeekFrom::Start(skipped))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok((tail(&bytes, skipped == 0), size))
}

pub(super) fn get(asking: &Asking, wish: GetWish) -> Result<Value, Failure> {
    if wish.targets.is_empty() && wish.paths.is_empty() {
        return Err(Failure::usage("name targets or paths"));
    }
    let mut paths = resolved(&wish.paths)?;
    let (id, workspace) = if wish.targets.is_empty() {
        (String::new(), String::new())
    } else {
        wish.which.named()?
    };
    let targets = pb::StageWish {
        targets: wish.targets,
        output_groups: wish.output_groups,
        ..pb::StageWish::default()
    };
    let mut results = ask(asking, (&id, &workspace), async |client| {
        let mut of_build = None;
        if !targets.targets.is_empty() {
            let (build, outputs) = of_targets(client, targets, &id, &workspace).await?;
            let named = OfBuild::new(&build, outputs);
            paths.extend(named.outputs.keys().cloned());
            of_build = Some(named);
        }
        materialized(client, &paths, of_build.as_ref()).await
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
