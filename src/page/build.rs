//! The page of one build.

use maud::{Markup, html};

use super::{
    builds::{exit, how, pending, took},
    html::{build_path, count, encoded, name, path, span, state, time},
    outputs::{self, Wish},
};
use crate::{
    control::{
        Service,
        finding::{Kind, Page, Query},
    },
    invocation::feed::Waiting,
    proto::outhaul::v1 as pb,
    units::{now_ms, show_count, show_size},
};

/// Outputs on their way that are named.
const PENDING: usize = 8;
/// Missing outputs that are shown on the page; the list of outputs has the others.
const MISSING: usize = 20;
/// Targets of one page.
const TARGETS: usize = 100;
/// Targets that the command to build them again names.
const AGAIN: usize = 20;

/// A build as it is at one moment.
pub(super) struct Seen {
    pub(super) invocation: pb::Invocation,
    targets: Vec<pb::Target>,
    waiting: Waiting,
    missing: Page,
}

impl Seen {
    /// Looks at a build. `None` if it is not on record.
    pub(super) async fn look(service: &Service, id: &str) -> Option<Self> {
        let (invocation, targets) = service.invocation(id).await?;
        let waiting = service.waiting(id, PENDING).await.unwrap_or_default();
        let has_missing = invocation.failed > 0 || targets.iter().any(|target| target.failed > 0);
        let missing = if has_missing {
            service
                .find_outputs(Query {
                    invocation: id.to_owned(),
                    kind: Kind::Missing,
                    most: MISSING,
                    ..Query::default()
                })
                .await
        } else {
            None
        };
        Some(Self {
            invocation,
            targets,
            waiting,
            missing: missing.unwrap_or_default(),
        })
    }

    /// The parts of the page that change, by their ids.
    pub(super) fn parts(self) -> [(&'static str, Markup); 3] {
        let summary = summary(&self);
        let problems = problems(&self);
        let targets = targets(&self.invocation, self.targets, 0);
        [("summary", summary), ("problems", problems), ("targets", targets)]
    }
}

/// What the page is called.
pub(super) fn title(build: &pb::Invocation) -> String {
    format!("{} in {}", build.command, build.workspace)
}

/// The page, with some of the outputs if they are recorded here.
pub(super) fn view(seen: Seen, listed: Option<&Markup>) -> Markup {
    let id = seen.invocation.invocation_id.clone();
    let has_root = !seen.invocation.without_root;
    let wish = Wish::of_build(&id);
    let [(_, summary), (_, problems), (_, targets)] = seen.parts();
    html! {
        section #summary aria-label="Summary" { (summary) }
        section #problems aria-label="Problems" { (problems) }
        @if has_root {
            h2 { "Timeline" }
            section #timeline aria-label="Timeline" data-load={ (build_path(&id)) "/timeline" } {
                p.empty { a href={ (build_path(&id)) "/timeline" } { "Show when outputs came" } }
            }
        }
        h2 { "Targets" }
        section #targets aria-label="Targets" { (targets) }
        h2 { "Outputs" }
        @if let Some(listed) = listed {
            (outputs::search(&wish))
            section #outputs aria-label="Outputs" { (listed) }
        } @else {
            p.empty {
                "This build has no output root on this machine. " code { "outhaul ls " (name(&id)) } " lists what it names."
            }
        }
    }
}

fn summary(seen: &Seen) -> Markup {
    let build = &seen.invocation;
    html! {
        h1 { (state(how(build))) " " (name(&build.command)) " " (exit(build)) }
        p.where { (path(&build.workspace)) }
        (waiting(&seen.waiting))
        dl.numbers {
            div { dt { "Downloaded" } dd { (show_count(build.downloaded)) small { (show_size(build.downloaded_bytes)) } } }
            div { dt { "Already present" } dd { (show_count(build.present)) } }
            div { dt { "On their way" } dd { (show_count(build.pending)) } }
            div { dt { "Failed" } dd.bad[build.failed > 0] { (show_count(build.failed)) } }
            div { dt { "Only recorded" } dd { (show_count(build.known)) } }
            @if build.superseded > 0 {
                div { dt { "Left to a newer build" } dd { (show_count(build.superseded)) } }
            }
            div { dt { "Took" } dd { (took(build)) } }
            @if build.hold_us > 0 {
                div { dt { "Held the command" } dd { (span(0, i64::try_from(build.hold_us / 1000).unwrap_or(i64::MAX))) } }
            }
        }
        dl.facts {
            dt { "Started" } dd { (time(build.started_ms)) }
            @if build.settled_ms > 0 { dt { "Settled" } dd { (time(build.settled_ms)) } }
            dt { "Invocation" } dd { code { (name(&build.invocation_id)) } }
            @if !build.remote_cache.is_empty() {
                dt { "Cache" }
                dd {
                    code { (name(&build.remote_cache)) }
                    @if !build.remote_instance_name.is_empty() { " instance " code { (name(&build.remote_instance_name)) } }
                }
            }
            @for (store, outputs) in &build.stores {
                dt { "From" } dd { code { (name(store)) } " " (count(*outputs, "output")) }
            }
            @if !build.build_tool_version.is_empty() { dt { "Bazel" } dd { (name(&build.build_tool_version)) } }
        }
    }
}

/// What holds the command, and until when.
fn waiting(waiting: &Waiting) -> Markup {
    let on_their_way = waiting.required + waiting.optional;
    html! {
        @if let Some(hold) = &waiting.hold {
            p.hold role="status" {
                strong { "The command waits for " (count(waiting.required, "required output")) }
                ", at the latest until " (time(hold.until_ms)) " (" (span(now_ms(), hold.until_ms)) " left, "
                code { (name(&hold.limit)) } ")."
            }
        }
        @if on_their_way > 0 {
            ul.pending {
                @for output in &waiting.outputs {
                    li {
                        (path(output.path.as_str())) " " small { (show_size(output.bytes)) " " (name(&output.target.label)) }
                    }
                }
                @let more = on_their_way.saturating_sub(waiting.outputs.len() as u64);
                @if more > 0 { li { "and " (count(more, "other")) } }
            }
        }
    }
}

fn problems(seen: &Seen) -> Markup {
    let build = &seen.invocation;
    let is_any =
        build.failed > 0 || !build.errors.is_empty() || build.evicted > 0 || !seen.missing.outputs.is_empty();
    html! {
        @if is_any {
            h2 { "Problems" }
            @if build.pending > 0 { p { (pending(build)) " are still downloading." } }
            @let errors = other_errors(seen);
            @if !errors.is_empty() {
                ul.errors { @for error in errors { li { (name(error)) } } }
            }
            (missing(build, &seen.missing))
            (evicted(build, &seen.missing))
        }
    }
}

/// What went wrong, but for what is shown with the missing outputs.
fn other_errors(seen: &Seen) -> Vec<&str> {
    let is_shown = |error: &str| {
        let mut missing = seen.missing.outputs.iter();
        missing.any(|output| {
            error
                .strip_prefix(&*output.exec_path)
                .is_some_and(|rest| rest.starts_with(": "))
        })
    };
    let errors = seen.invocation.errors.iter().map(String::as_str);
    errors.filter(|error| !is_shown(error)).collect()
}

/// Outputs that are not there, and what to do.
fn missing(build: &pb::Invocation, missing: &Page) -> Markup {
    let wish = Wish::of_build(&build.invocation_id).of_kind(Kind::Missing);
    html! {
        @if !missing.outputs.is_empty() {
            p {
                "These wanted outputs are not on disk. " em { "Get" } " tries to download one again; what the cache does not \
                have any more, only a build can bring back."
            }
            (outputs::rows(&missing.outputs))
            @if missing.next.is_some() { p.more { a href=(wish.address(None)) { "All missing outputs" } } }
        }
    }
}

/// Outputs that the cache has lost, and how to have them again.
fn evicted(build: &pb::Invocation, missing: &Page) -> Markup {
    let of_missing = missing.outputs.iter();
    let of_missing =
        of_missing.filter(|output| output.state() == pb::OutputState::Evicted && !output.label.is_empty());
    let mut labels: Vec<&str> = of_missing.map(|output| &*output.label).collect();
    labels.extend(build.evicted_targets.iter().map(String::as_str));
    labels.sort_unstable();
    labels.dedup();
    let counted = build.evicted_target_count.max(labels.len() as u64);
    labels.truncate(AGAIN);
    let more = counted.saturating_sub(labels.len() as u64);
    html! {
        @if build.evicted > 0 {
            p {
                (count(build.evicted, "output")) " of this output root " (if build.evicted == 1 { "is" } else { "are" })
                " neither in the cache nor on disk."
            }
        }
        @if !labels.is_empty() {
            p { "To have evicted outputs again, build their targets:" }
            pre tabindex="0" { code { "bazel build" @for label in &labels { " " (name(label)) } } }
            @if more > 0 { p { "and " (count(more, "other target")) "." } }
        }
    }
}

/// A page of the targets, those that failed first.
pub(super) fn targets(build: &pb::Invocation, mut targets: Vec<pb::Target>, from: usize) -> Markup {
    let order = |target: &pb::Target| match target.state() {
        pb::TargetState::Failed => 0,
        pb::TargetState::Aborted => 1,
        pb::TargetState::Completed => 2,
        pb::TargetState::Announced | pb::TargetState::Unspecified => 3,
        pb::TargetState::Settled => 4,
    };
    targets.sort_by_key(order);
    let all = targets.len();
    let address = format!("{}/targets", build_path(&build.invocation_id));
    let from = from.min(all);
    let shown = &targets[from..all.min(from.saturating_add(TARGETS))];
    let to = from + shown.len();
    html! {
        @if shown.is_empty() {
            p.empty { "No targets are known yet." }
        } @else {
            table {
                caption { "Targets " (show_count(from as u64 + 1)) " to " (show_count(to as u64)) " of " (show_count(all as u64)) }
                thead {
                    tr {
                        th scope="col" { "State" }
                        th scope="col" { "Target" }
                        th.number scope="col" { "Required" }
                        th.number scope="col" { "Optional" }
                        th.number scope="col" { "Only recorded" }
                        th.number scope="col" { "Failed" }
                    }
                }
                tbody { @for target in shown { (target_row(build, target)) } }
            }
            p.more {
                @if from > 0 { a href={ (address) "?from=" (from.saturating_sub(TARGETS)) } { "Previous targets" } " " }
                @if to < all { a href={ (address) "?from=" (to) } { "More targets" } }
            }
        }
    }
}

fn target_row(build: &pb::Invocation, target: &pb::Target) -> Markup {
    let found = format!(
        "/outputs?build={}&q={}",
        encoded(&build.invocation_id),
        encoded(&target.label)
    );
    html! {
        tr {
            td { (state(&target.state().name())) }
            td.wide {
                a.label href=(found) { (name(&target.label)) }
                @if !target.aspect.is_empty() { " " small { "aspect " (name(&target.aspect)) } }
            }
            td.number data-label="required" { (show_count(target.required)) }
            td.number data-label="optional" { (show_count(target.optional)) }
            td.number data-label="only recorded" { (show_count(target.known)) }
            td.number data-label="failed" { @if target.failed > 0 { strong.bad { (show_count(target.failed)) } } @else { "0" } }
        }
    }
}
