//! `outhaul watch`: a line for each file of a build once it is whole under its final name.

use std::collections::{HashMap, HashSet};

use clap::Args;
use serde_json::json;

use super::{
    client::Client,
    exit::Failure,
    follow::{ChoiceArgs, DaemonArgs, Follower, Hears},
    get::OfBuild,
    runtime, view,
    wait::{code, object, print_problems},
};
use crate::{
    control::wait::Judge,
    invocation::policy::PathRegex,
    materialize::split_source,
    proto::outhaul::v1::{self as pb, watch_invocation_response::Event},
};

/// Arguments of `outhaul watch`.
#[derive(Debug, Args)]
pub(super) struct WatchArgs {
    /// Target patterns as Bazel writes them (//pkg:name, //pkg:all, //pkg/..., @repo//...; LABEL%ASPECT for an
    /// aspect); by default the whole build
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,

    /// Only outputs whose whole exec path matches (repeatable)
    #[arg(long, value_name = "REGEX")]
    path: Vec<PathRegex>,

    /// Only outputs of these output groups (repeatable)
    #[arg(long, value_name = "GROUP", value_delimiter = ',')]
    output_group: Vec<String>,

    #[command(flatten)]
    choice: ChoiceArgs,

    /// Continue with every later build of the workspace
    #[arg(long, conflicts_with = "invocation")]
    follow: bool,

    #[command(flatten)]
    daemon: DaemonArgs,
}

pub(super) fn main(args: &WatchArgs) -> Result<u8, Failure> {
    // Before anything else: it counts from here.
    let mut choice = args.choice.choice()?;
    let mut follower = Follower::new(&args.daemon)?;
    if args.follow {
        follower = follower.with_later(choice.workspace.clone());
    }
    runtime()?.block_on(async {
        loop {
            let mut watching = Watching::new(args)?;
            let mut answer = follower.follow(choice, &mut watching).await?;
            if !args.follow {
                print_problems(&answer)?;
                return Ok(code(&answer));
            }
            // A later build may well have such a target.
            answer.not_found.clear();
            print_problems(&answer)?;
            choice = follower.after(&answer.invocation.unwrap_or_default());
        }
    })
}

/// One build.
struct Watching<'a> {
    args: &'a WatchArgs,
    judge: Judge,
    invocation: String,
    /// Exec paths that were printed, and with what.
    printed: HashMap<String, Option<pb::Digest>>,
    /// Whether outputs may have come unheard.
    has_gaps: bool,
}

impl Hears for Watching<'_> {
    type Answer = pb::WaitResponse;

    async fn event(&mut self, client: &mut Client, event: Event) -> Result<Option<Self::Answer>, Failure> {
        let answer = self.judge.take(&event);
        match event {
            Event::Invocation(invocation) => {
                self.has_gaps |= client.here.is_some() || has_outputs(&invocation);
                self.invocation = invocation.invocation_id;
                if self.has_gaps {
                    self.recorded(client, false).await?;
                }
            }
            Event::Output(output) => self.output(&output)?,
            Event::Lagged(_) => self.has_gaps = true,
            Event::Settled(_) | Event::TargetKnown(_) | Event::TargetSettled(_) => {}
        }
        if answer.is_some() && self.has_gaps {
            self.recorded(client, true).await?;
        }
        if answer.is_some() && !self.args.targets.is_empty() {
            self.shared(client).await?;
        }
        Ok(answer)
    }
}

impl<'a> Watching<'a> {
    fn new(args: &'a WatchArgs) -> Result<Self, Failure> {
        Ok(Self {
            args,
            judge: Judge::new(&args.targets).map_err(Failure::usage)?,
            invocation: String::new(),
            printed: HashMap::new(),
            has_gaps: false,
        })
    }

    /// Whether the flags select an output.
    fn is_wanted(&self, exec_path: &str, group: &str) -> bool {
        let (paths, groups) = (&self.args.path, &self.args.output_group);
        (paths.is_empty() || paths.iter().any(|path| path.matches(exec_path)))
            && (groups.is_empty() || groups.iter().any(|wanted| wanted == group))
    }

    /// Prints an output that has just come to its end, if it is whole.
    fn output(&mut self, output: &pb::OutputEnd) -> Result<(), Failure> {
        let is_whole = !output.outcome().is_failure() && output.outcome() != pb::OutputOutcome::Superseded;
        if !is_whole
            || !self.judge.covers_output(output)
            || !self.is_wanted(&output.exec_path, &output.output_group)
        {
            return Ok(());
        }
        let before = self
            .printed
            .insert(output.exec_path.clone(), output.digest.clone());
        if before.is_some_and(|digest| digest == output.digest) {
            return Ok(());
        }
        let (source, store) = split_source(&output.source);
        object(&json!({
            "path": format!("{}/{}", output.exec_root, output.exec_path),
            "exec_path": output.exec_path,
            "digest": output.digest.as_ref().map(view::digest),
            "size": output.digest.as_ref().map(|digest| digest.size),
            "label": output.label,
            "output_group": view::non_empty(&output.output_group),
            "class": output.class().name(),
            "outcome": output.outcome().name(),
            "source": view::non_empty(source),
            "store": store,
            "invocation_id": self.invocation,
        }))?;
        Ok(())
    }

    /// What the build has named, as far as that is known.
    async fn named(&self, client: &mut Client, build: &pb::Invocation) -> OfBuild {
        let request = pb::StageRequest {
            invocation_id: build.invocation_id.clone(),
            wish: Some(pb::StageWish {
                output_groups: self.args.output_group.clone(),
                ..pb::StageWish::default()
            }),
            dry_run: true,
            ..pb::StageRequest::default()
        };
        let named = client.stage(request).await.unwrap_or_default();
        OfBuild::new(build, named.outputs)
    }

    /// Prints what is on disk of the targets that are over, and of what this build has downloaded; of all its targets at
    /// its end.
    async fn recorded(&mut self, client: &mut Client, at_end: bool) -> Result<(), Failure> {
        let id = self.invocation.clone();
        let (build, targets) = client.invocation(&id).await?;
        let is_open = |target: &pb::Target| {
            matches!(
                target.state(),
                pb::TargetState::Announced | pb::TargetState::Completed
            )
        };
        let is_over = |target: &&pb::Target| at_end || !is_open(target);
        let over: HashSet<(String, String)> = targets
            .iter()
            .filter(is_over)
            .map(|target| (target.label.clone(), target.aspect.clone()))
            .collect();
        // What a newer build of the output root has recorded is not this one's.
        let named = match client.newer_of_root(&build).await? {
            Some(_) => Some(self.named(client, &build).await),
            None => None,
        };
        client
            .outputs(&id, pb::OutputClass::Unspecified, |output| {
                let is_its_own = named
                    .as_ref()
                    .is_none_or(|named| named.has(&output) == Some(true));
                let is_of_it = output.invocation_id == id
                    || over.contains(&(output.label.clone(), output.aspect.clone()));
                if !is_there(&output) || !is_of_it || !is_its_own {
                    return Ok(());
                }
                self.found(&build, output)
            })
            .await
    }

    /// Prints those outputs of the given targets that have no line yet: another target of the build has named them before.
    async fn shared(&mut self, client: &mut Client) -> Result<(), Failure> {
        let request = pb::StageRequest {
            invocation_id: self.invocation.clone(),
            wish: Some(pb::StageWish {
                targets: self.args.targets.clone(),
                output_groups: self.args.output_group.clone(),
                ..pb::StageWish::default()
            }),
            dry_run: true,
            so_far: true,
            ..pb::StageRequest::default()
        };
        // Where nothing tells, such as of a target without outputs, there is nothing more to say.
        let Ok(named) = client.stage(request).await else {
            return Ok(());
        };
        // What is asked here replaces no answer that is there.
        let Ok((build, _)) = client.invocation(&self.invocation).await else {
            return Ok(());
        };
        let mut labels = HashMap::new();
        for output in &named.outputs {
            if !self.printed.contains_key(&output.exec_path) {
                let whose = (output.label.clone(), output.output_group.clone());
                labels.insert(output.exec_path.clone(), whose);
            }
        }
        if labels.is_empty() {
            return Ok(());
        }
        let of_build = OfBuild::new(&build, named.outputs);
        let paths: Vec<String> = labels
            .keys()
            .map(|path| format!("{}/{path}", build.exec_root))
            .collect();
        let mut outputs = Vec::new();
        for some in paths.chunks(super::get::AT_ONCE) {
            outputs.extend(client.stat(some.to_vec()).await.unwrap_or_default());
        }
        for output in outputs {
            let is_its_own = is_there(&output) && of_build.has(&output) == Some(true);
            if let Some((label, output_group)) = labels.remove(&output.exec_path).filter(|_| is_its_own) {
                let output = pb::Output {
                    label,
                    output_group,
                    ..output
                };
                self.found(&build, output)?;
            }
        }
        Ok(())
    }

    /// Prints an output that was found on disk.
    fn found(&mut self, build: &pb::Invocation, output: pb::Output) -> Result<(), Failure> {
        let (source, _) = split_source(&output.source);
        let is_brought = !matches!(source, "" | "present");
        let outcome = if is_brought && output.materialized_at_ms >= build.started_ms {
            pb::OutputOutcome::Downloaded
        } else {
            pb::OutputOutcome::Present
        };
        self.output(&pb::OutputEnd {
            class: output.class,
            outcome: outcome.into(),
            source: match outcome {
                pb::OutputOutcome::Downloaded => output.source,
                _ => String::new(),
            },
            exec_path: output.exec_path,
            exec_root: output.exec_root,
            label: output.label,
            output_group: output.output_group,
            digest: output.digest,
            ..pb::OutputEnd::default()
        })
    }
}

/// Whether there may be outputs of a build on disk that nothing is heard of any more: it has said so before, or is over.
fn has_outputs(build: &pb::Invocation) -> bool {
    let goes_on = matches!(
        build.state(),
        pb::InvocationState::Running | pb::InvocationState::Draining | pb::InvocationState::Unspecified
    );
    !goes_on || build.downloaded + build.present > 0
}

/// Whether an output that was wanted is on disk.
fn is_there(output: &pb::Output) -> bool {
    let is_wanted = matches!(
        output.class(),
        pb::OutputClass::Required | pb::OutputClass::Optional
    );
    is_wanted && output.state() == pb::OutputState::Materialized
}
