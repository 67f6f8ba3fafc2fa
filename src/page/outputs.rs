//! Outputs: found, listed page by page, explained, and downloaded on demand.

use std::time::Duration;

use maud::{Markup, html};
use serde_json::{Value, json};

use super::html::{Asked, build_path, encoded, name, output_path, path, state, time};
use crate::{
    control::finding::{Cursor, Kind, Page, Query},
    proto::outhaul::v1 as pb,
    units::{show_count, show_duration, show_size},
};

/// Outputs of one page.
const PAGE: usize = 100;
/// Paths of one request to download.
const PATHS: usize = 100;

/// The kinds that can be chosen, by their names in addresses and for people.
const KINDS: [(Kind, &str, &str); 5] = [
    (Kind::All, "", "All outputs"),
    (Kind::OnDisk, "disk", "Recorded as on disk"),
    (Kind::Missing, "missing", "Wanted, but failed or evicted"),
    (Kind::Evicted, "evicted", "Evicted from the cache"),
    (Kind::Known, "known", "Only recorded"),
];

/// Which outputs are asked for.
#[derive(Debug, Clone, Default)]
pub(super) struct Wish {
    build: String,
    text: String,
    kind: Kind,
    after: String,
}

impl Wish {
    /// All outputs of a build's output root.
    pub(super) fn of_build(id: &str) -> Self {
        Self {
            build: id.to_owned(),
            ..Self::default()
        }
    }

    /// Only those that are so.
    pub(super) fn of_kind(self, kind: Kind) -> Self {
        Self { kind, ..self }
    }

    /// What an address asks for.
    pub(super) fn read(asked: &Asked) -> Self {
        let wanted = asked.text("kind");
        let kind = KINDS.iter().find(|(_, name, _)| *name == wanted);
        Self {
            build: asked.text("build"),
            text: asked.text("q").trim().to_owned(),
            kind: kind.map_or(Kind::All, |(kind, ..)| *kind),
            after: asked.text("after"),
        }
    }

    /// The same for the control API.
    pub(super) fn query(&self) -> Query {
        Query {
            invocation: self.build.clone(),
            text: self.text.clone(),
            kind: self.kind,
            after: self.after.parse().ok(),
            most: PAGE,
            ..Query::default()
        }
    }

    /// The address of the list, from a place on.
    pub(super) fn address(&self, after: Option<&Cursor>) -> String {
        let kind = KINDS.iter().find(|(kind, ..)| *kind == self.kind);
        let mut address = format!(
            "/outputs?build={}&q={}&kind={}",
            encoded(&self.build),
            encoded(&self.text),
            kind.map_or("", |(_, name, _)| name)
        );
        if let Some(after) = after {
            address.push_str(&format!("&after={}", encoded(&after.to_string())));
        }
        address
    }
}

/// The page.
pub(super) fn view(wish: &Wish, found: &Page) -> Markup {
    html! {
        h1 { "Outputs" }
        @if !wish.build.is_empty() {
            p.where { "of the output root of build " a href=(build_path(&wish.build)) { code { (name(&wish.build)) } } }
        }
        (search(wish))
        section #outputs aria-label="Outputs" { (table(wish, found)) }
    }
}

/// What is looked for.
pub(super) fn search(wish: &Wish) -> Markup {
    html! {
        form.search role="search" action="/outputs" method="get" {
            @if !wish.build.is_empty() { input type="hidden" name="build" value=(wish.build); }
            label for="q" { "Path, target or digest" }
            input #q type="search" name="q" value=(wish.text) autocomplete="off" spellcheck="false"
                placeholder="e.g. app/main.o, //lib:core or the first letters of a digest";
            label.hidden for="kind" { "Which outputs" }
            select #kind name="kind" {
                @for (kind, value, text) in KINDS {
                    option value=(value) selected[kind == wish.kind] { (text) }
                }
            }
            button type="submit" { "Search" }
        }
    }
}

/// What was found.
pub(super) fn table(wish: &Wish, found: &Page) -> Markup {
    html! {
        @if found.outputs.is_empty() {
            p.empty {
                @if found.without_root {
                    "This build has no output root on this machine, or has not named it yet."
                } @else if found.next.is_some() {
                    "Nothing was found among the " (if wish.after.is_empty() { "first " } else { "next " })
                    (show_count(found.looked_at as u64)) " outputs."
                } @else {
                    "No such outputs are recorded."
                }
            }
        } @else {
            (rows(&found.outputs))
        }
        @if let Some(next) = &found.next {
            p.more { a href=(wish.address(Some(next))) { "More outputs" } }
        }
    }
}

/// A table of outputs.
pub(super) fn rows(outputs: &[pb::Output]) -> Markup {
    html! {
        table {
            caption.hidden { "Outputs" }
            thead {
                tr {
                    th scope="col" { "State" }
                    th scope="col" { "Path" }
                    th scope="col" { "Target" }
                    th.number scope="col" { "Size" }
                    th scope="col" { "From" }
                    th scope="col" { span.hidden { "What can be done" } }
                }
            }
            tbody {
                @for output in outputs {
                    tr {
                        td { (state(how(output))) }
                        td.wide {
                            a href=(output_path(output)) title="Why is it there or not?" { (path(&output.exec_path)) }
                            @if !output.error.is_empty() { p.error { (name(&output.error)) } }
                        }
                        td { span.label { (name(&output.label)) } }
                        td.number data-label="size" { (content(output)) }
                        td { (name(&output.source)) }
                        td { (get(output)) }
                    }
                }
            }
        }
    }
}

/// The state that an output is shown in.
fn how(output: &pb::Output) -> &'static str {
    match output.state() {
        pb::OutputState::Materialized => "on disk",
        pb::OutputState::Evicted => "evicted",
        pb::OutputState::Failed => "failed",
        pb::OutputState::Known | pb::OutputState::Unspecified => "known",
    }
}

/// What an output is, in a word or two.
fn content(output: &pb::Output) -> Markup {
    html! {
        @if let Some(digest) = &output.digest { (show_size(digest.size)) }
        @else if output.directory { "directory" }
        @else { "→ " (name(&output.symlink_target)) }
    }
}

/// The button that downloads an output, if it is not there.
fn get(output: &pb::Output) -> Markup {
    html! {
        @if output.state() != pb::OutputState::Materialized {
            button type="button" data-get=(output.absolute_path()) aria-label={ "Get " (name(&output.exec_path)) } { "Get" }
            span.got role="status" {}
        }
    }
}

/// One output, and why it is there or not.
pub(super) fn one(output: &pb::Output, why: &[String]) -> Markup {
    html! {
        h1 { (state(how(output))) " " (path(&output.exec_path)) }
        p { (get(output)) }
        h2 { "Why" }
        ul.why { @for line in why { li { (name(line)) } } }
        h2 { "What is recorded" }
        dl.facts {
            dt { "Path" } dd { code { (name(&output.absolute_path())) } }
            @if let Some(digest) = &output.digest {
                dt { "Digest" } dd { code { (digest.function) ":" (digest.hash) } " " (show_size(digest.size)) }
            } @else {
                dt { "Content" } dd { (content(output)) }
            }
            dt { "Target" } dd { code { (name(&output.label)) } }
            dt { "Build" } dd { a href=(build_path(&output.invocation_id)) { code { (name(&output.invocation_id)) } } }
            @if output.materialized_at_ms > 0 {
                dt { "Since" } dd { (time(output.materialized_at_ms)) }
                dt { "Took" } dd { (show_duration(Duration::from_micros(output.took_us))) }
            }
        }
    }
}

/// The paths that a request to download names.
pub(super) fn paths(body: &[u8]) -> Option<Vec<String>> {
    let value: Value = serde_json::from_slice(body).ok()?;
    let paths = value.get("paths")?.as_array()?;
    let is_fit = !paths.is_empty() && paths.len() <= PATHS;
    let absolute = |path: &Value| Some(path.as_str().filter(|path| path.starts_with('/'))?.to_owned());
    is_fit.then(|| paths.iter().map(absolute).collect())?
}

/// What became of them, as JSON: the first that failed, or else how many came.
pub(super) fn results(results: &[pb::materialize_response::Result]) -> String {
    let failed = results.iter().find(|result| !result.error.is_empty());
    let value = match failed {
        Some(result) => json!({ "path": result.path, "error": name(&result.error) }),
        None => json!({ "came": results.len() }),
    };
    value.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lists_of_absolute_paths_are_taken_for_paths() {
        assert_eq!(
            paths(br#"{"paths": ["/a", "/b"]}"#),
            Some(vec!["/a".to_owned(), "/b".to_owned()])
        );
        let many = json!({ "paths": vec!["/a"; PATHS + 1] }).to_string();
        for body in [
            "",
            "[]",
            "{}",
            r#"{"paths": []}"#,
            r#"{"paths": ["a"]}"#,
            r#"{"paths": [1]}"#,
            &many,
        ] {
            assert_eq!(paths(body.as_bytes()), None, "{body}");
        }
    }

    #[test]
    fn an_address_asks_again_for_what_it_was_made_of() {
        let wish = Wish {
            build: "a&b=/?".to_owned(),
            text: "//x:y é".to_owned(),
            kind: Kind::Missing,
            after: String::new(),
        };
        let after: Cursor = "7:bazel-out/a b".parse().unwrap();
        let address = wish.address(Some(&after));
        let read = Wish::read(&super::super::html::query(
            address.split_once('?').map(|(_, query)| query),
        ));
        assert_eq!(
            (&read.build, &read.text, read.kind),
            (&wish.build, &wish.text, wish.kind)
        );
        assert_eq!(read.query().after, Some(after));
    }
}
