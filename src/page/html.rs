//! What all views share: the frame of a page, names, times, numbers, addresses.

use std::{borrow::Cow, time::Duration};

use maud::{DOCTYPE, Markup, html};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use prost_types::Timestamp;

use crate::{
    printable::clipped,
    proto::outhaul::v1 as pb,
    units::{show_count, show_duration},
};

/// Bytes of a name that are shown.
const NAME: usize = 2000;

/// What of the pages is shown, for the navigation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Section {
    /// None of them.
    None,
    Builds,
    Outputs,
    Caches,
    Disk,
}

/// A page. With `live`, parts of it are sent again from that address.
pub(super) fn layout(title: &str, section: Section, live: Option<&str>, body: &Markup) -> Markup {
    let links = [
        (Section::Builds, "/", "Builds"),
        (Section::Outputs, "/outputs", "Outputs"),
        (Section::Caches, "/caches", "Caches"),
        (Section::Disk, "/disk", "Disk"),
    ];
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (name(title)) " · outhaul" }
                link rel="icon" href="data:,";
                link rel="stylesheet" href="/page.css";
                script src="/page.js" defer {}
            }
            body {
                a.skip href="#main" { "Skip to the content" }
                header {
                    a.brand href="/" { "outhaul" }
                    nav aria-label="Sections" {
                        @for (which, address, text) in links {
                            a href=(address) aria-current=[(which == section).then_some("page")] { (text) }
                        }
                    }
                    p #connection role="status" data-live=[live] {}
                }
                main #main tabindex="-1" { (body) }
            }
        }
    }
}

/// A name of somebody else's choice, with everything escaped that is not just shown.
pub(super) fn name(text: &str) -> Cow<'_, str> {
    clipped(text, NAME)
}

/// A word of a command that people copy, in quotes where a shell would take it for something else. `None` of what cannot be
/// shown as it is, and of what would be an option.
pub(super) fn word(text: &str) -> Option<Cow<'_, str>> {
    if text.is_empty() || text.starts_with('-') || name(text) != text {
        return None;
    }
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_@/:.+=,-".contains(c);
    Some(if text.chars().all(is_plain) {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(format!("'{}'", text.replace('\'', "'\\''")))
    })
}

/// A part of an address.
pub(super) fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// The path of a build's page.
pub(super) fn build_path(id: &str) -> String {
    format!("/build/{}", encoded(id))
}

/// The address of an output's page.
pub(super) fn output_path(output: &pb::Output) -> String {
    format!("/output?path={}", encoded(&output.absolute_path()))
}

/// A path with its last part before the others in importance.
pub(super) fn path(text: &str) -> Markup {
    let shown = name(text);
    let (directory, file) = shown
        .rfind('/')
        .map_or(("", &*shown), |at| shown.split_at(at + 1));
    html! { span.path { span.dir { (directory) } (file) } }
}

/// A state as a word with a colour.
pub(super) fn state(name: &str) -> Markup {
    html! { span class={ "state " (name) } { (name) } }
}

/// A moment, which the script shows in the viewer's time zone.
pub(super) fn time(ms: i64) -> Markup {
    if ms <= 0 {
        return html! { "–" };
    }
    let moment = Timestamp {
        seconds: ms.div_euclid(1000),
        nanos: 0,
    };
    let text = moment.to_string();
    let shown = text.replace('T', " ").replace('Z', " UTC");
    html! { time datetime=(text) { (shown) } }
}

/// The time between two moments, in milliseconds.
pub(super) fn span(from_ms: i64, to_ms: i64) -> String {
    let ms = u64::try_from(to_ms.saturating_sub(from_ms)).unwrap_or_default();
    brief(Duration::from_millis(ms))
}

/// A time for people who compare short ones: `0.3 ms`, `12 ms`, `1.2s`.
pub(super) fn brief(time: Duration) -> String {
    let us = time.as_micros();
    match us {
        0..10_000 => format!("{:.1} ms", us as f64 / 1000.0),
        10_000..1_000_000 => format!("{} ms", us / 1000),
        _ => show_duration(time),
    }
}

/// A count and what is counted: `1 output`, `4,120 outputs`.
pub(super) fn count(number: u64, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {what}{plural}", show_count(number))
}

/// What is asked for after the `?` of an address.
#[derive(Debug, Default)]
pub(super) struct Asked(Vec<(String, String)>);

/// Reads it.
pub(super) fn query(text: Option<&str>) -> Asked {
    let pairs = url::form_urlencoded::parse(text.unwrap_or_default().as_bytes());
    Asked(pairs.into_owned().collect())
}

impl Asked {
    /// A value; empty if it is not there.
    pub(super) fn text(&self, name: &str) -> String {
        let found = self.0.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.clone()).unwrap_or_default()
    }

    /// A number; 0 if it is not there, or none.
    pub(super) fn number(&self, name: &str) -> usize {
        self.text(name).parse().unwrap_or_default()
    }
}
