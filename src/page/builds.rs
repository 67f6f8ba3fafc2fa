//! The list of builds.

use std::borrow::Cow;

use maud::{Markup, html};

use super::html::{Asked, build_path, name, span, state, time};
use crate::{
    proto::outhaul::v1 as pb,
    units::{now_ms, show_count, show_size},
};

/// Builds that are listed unless asked otherwise, and at most.
const LISTED: u32 = 50;
const MOST: u32 = 1000;

/// How many builds are asked for.
pub(super) fn limit(asked: &Asked) -> u32 {
    match u32::try_from(asked.number("limit")) {
        Ok(0) | Err(_) => LISTED,
        Ok(limit) => limit.min(MOST),
    }
}

/// The page.
pub(super) fn view(list: &[pb::Invocation], limit: u32, paused: Option<&pb::Pause>) -> Markup {
    html! {
        h1 { "Builds" }
        @if let Some(pause) = paused { p { (pause.words()) } }
        section #builds aria-label="Builds" { (table(list, limit)) }
    }
}

/// The live part of it.
pub(super) fn table(list: &[pb::Invocation], limit: u32) -> Markup {
    if list.is_empty() {
        return html! {
            p.empty {
                "No builds are recorded yet. Run Bazel with " code { "--bes_backend=grpc://HOST:PORT" }
                ", the address of this daemon's port for build events: by default " code { "grpc://127.0.0.1:8985" } "."
            }
        };
    }
    html! {
        table {
            caption.hidden { "Builds, newest first" }
            thead {
                tr {
                    th scope="col" { "State" }
                    th scope="col" { "Command" }
                    th scope="col" { "Workspace" }
                    th scope="col" { "Started" }
                    th.number scope="col" { "Took" }
                    th.number scope="col" { "Downloaded" }
                    th.number scope="col" { "Present" }
                    th.number scope="col" { "Failed" }
                }
            }
            tbody { @for build in list { (row(build)) } }
        }
        @if list.len() == limit as usize && limit < MOST {
            p.more { a href={ "/?limit=" ((limit * 4).min(MOST)) } { "Older builds" } }
        }
    }
}

fn row(build: &pb::Invocation) -> Markup {
    html! {
        tr {
            td { (state(build.shown_state())) }
            td { a href=(build_path(&build.invocation_id)) { (command(build)) } " " (exit(build)) }
            td.wide { (super::html::path(&build.workspace)) }
            td { (time(build.started_ms)) }
            td.number data-label="took" { (took(build)) }
            td.number data-label="downloaded" {
                (show_count(build.downloaded)) " " small { (show_size(build.downloaded_bytes)) }
            }
            td.number data-label="present" { (show_count(build.present)) }
            td.number data-label="failed" { @if build.failed > 0 { strong.bad { (show_count(build.failed)) } } @else { "0" } }
        }
    }
}

/// The build tool's command, which is not the first thing that is heard of a build.
pub(super) fn command(build: &pb::Invocation) -> Cow<'_, str> {
    match &*build.command {
        "" => Cow::Borrowed("(not known yet)"),
        command => name(command),
    }
}

/// The build tool's exit code, if it says that something is wrong.
pub(super) fn exit(build: &pb::Invocation) -> Markup {
    html! {
        @if let Some(code) = build.exit_code.filter(|code| *code != 0) {
            small.exit.bad { "exit code " (code) }
        }
    }
}

/// From its beginning to when all that it wanted was there, or to now.
pub(super) fn took(build: &pb::Invocation) -> String {
    if build.started_ms <= 0 {
        return "–".to_owned();
    }
    if build.settled_ms > 0 {
        return span(build.started_ms, build.settled_ms);
    }
    if build.state().is_over() {
        return "–".to_owned();
    }
    span(build.started_ms, now_ms())
}
