//! What recorded outputs take on disk.

use maud::{Markup, html};
use tonic::Status;

use super::html::{Asked, build_path, count, name, path, time};
use crate::{
    proto::outhaul::v1::{self as pb, DiskUsageBy},
    units::{show_count, show_size},
};

/// Rows of a table.
const ROWS: usize = 200;

/// How outputs are counted together, by the names in addresses and for people.
const WAYS: [(DiskUsageBy, &str, &str); 3] = [
    (DiskUsageBy::Workspace, "workspace", "By workspace"),
    (DiskUsageBy::Target, "target", "By target"),
    (DiskUsageBy::Invocation, "build", "By build"),
];

/// The way that is asked for.
pub(super) fn by(asked: &Asked) -> DiskUsageBy {
    let wanted = asked.text("by");
    let way = WAYS.iter().find(|(_, name, _)| *name == wanted);
    way.map_or(DiskUsageBy::Workspace, |(by, ..)| *by)
}

/// The same for the control API.
pub(super) fn request(by: DiskUsageBy) -> pb::DiskUsageRequest {
    pb::DiskUsageRequest {
        workspace: String::new(),
        by: by.into(),
    }
}

/// The page. Counting takes its time, so that the script asks for it.
pub(super) fn view() -> Markup {
    html! {
        h1 { "Disk" }
        p { "Recorded outputs that are on disk. " code { "outhaul evict" } " removes those that the cache still has." }
        @for (_, name, title) in WAYS {
            h2 { (title) }
            section aria-label=(title) data-load={ "/disk/usage?by=" (name) } {
                p.empty { a href={ "/disk/usage?by=" (name) } { "Count" } }
            }
        }
    }
}

/// What was counted.
pub(super) fn usage(by: DiskUsageBy, usage: &Result<pb::DiskUsageResponse, Status>) -> Markup {
    let usage = match usage {
        Ok(usage) => usage,
        Err(error) => return html! { p.error { (name(error.message())) } },
    };
    let most = usage.entries.first().map_or(0, |entry| entry.bytes).max(1);
    html! {
        p { (count(usage.outputs, "output")) ", " (show_size(usage.bytes)) "." }
        @if !usage.entries.is_empty() {
            table {
                caption.hidden { "What takes the most" }
                thead {
                    tr {
                        th scope="col" { "What" }
                        th.number scope="col" { "Outputs" }
                        th.number scope="col" { "Size" }
                        th scope="col" { span.hidden { "Share" } }
                        th scope="col" { "Used last" }
                    }
                }
                tbody {
                    @for entry in usage.entries.iter().take(ROWS) {
                        tr {
                            td.wide { (what(by, &entry.name)) }
                            td.number data-label="outputs" { (show_count(entry.outputs)) }
                            td.number data-label="size" { (show_size(entry.bytes)) }
                            td { meter min="0" max=(most) value=(entry.bytes) aria-hidden="true" {} }
                            td { (time(entry.used_ms)) }
                        }
                    }
                }
            }
            @let more = usage.entries.len().saturating_sub(ROWS);
            @if more > 0 { p.more { "and " (show_count(more as u64)) " smaller ones: see " code { "outhaul du" } } }
        }
    }
}

fn what(by: DiskUsageBy, text: &str) -> Markup {
    html! {
        @if text.is_empty() { "(not recorded)" }
        @else if by == DiskUsageBy::Invocation { a href=(build_path(text)) { code { (name(text)) } } }
        @else if by == DiskUsageBy::Target { span.label { (name(text)) } }
        @else { (path(text)) }
    }
}
