//! When outputs came, as a chart: bytes over time by source, and the largest outputs as bars.

use std::time::Duration;

use maud::{Markup, html};

use super::html::{brief, count, name, time};
use crate::{
    invocation::timeline::{Bar, Came, Timeline},
    units::{show_count, show_size},
};

/// The chart's width, and the heights of its parts, in the units of the drawing.
const WIDTH: i64 = 1000;
const COLUMNS: u64 = 80;
const AXIS: u64 = 22;
const LANE: u64 = 13;
const GAP: u64 = 3;
/// Columns of the upper part.
const PARTS: usize = 100;
/// Bars that overlap are drawn below each other, up to this many.
const LANES: usize = 20;
/// The narrowest bar.
const NARROWEST: i64 = 2;

/// A moment's place in the drawing.
struct Scale {
    from_us: i64,
    length: i64,
}

impl Scale {
    fn x(&self, us: i64) -> i64 {
        let after = i128::from(us.saturating_sub(self.from_us).clamp(0, self.length));
        i64::try_from(after * i128::from(WIDTH) / i128::from(self.length)).unwrap_or(WIDTH)
    }
}

/// From one moment to another, for people.
fn between(from_us: i64, to_us: i64) -> String {
    let us = u64::try_from(to_us.saturating_sub(from_us)).unwrap_or_default();
    brief(Duration::from_micros(us))
}

/// The chart, with the same in words and numbers.
pub(super) fn view(timeline: &Timeline) -> Markup {
    if timeline.came.outputs == 0 {
        return html! { p.empty { "Nothing was downloaded for this build so far." } };
    }
    let (bars, from_us) = timeline.bars();
    let scale = Scale {
        from_us,
        length: timeline.end_us.saturating_sub(from_us).max(1),
    };
    let sources = timeline.by_source(from_us, PARTS);
    let most = most(&sources);
    let (lanes, left_out) = lanes(&bars);
    let height = COLUMNS + AXIS + lanes.len() as u64 * (LANE + GAP);
    let words = format!(
        "{}, {}, in {}",
        count(timeline.came.outputs, "output"),
        show_size(timeline.came.bytes),
        between(from_us, timeline.end_us)
    );
    let label = format!("When outputs came: {words}");
    html! {
        p { (words) ", from " (time(from_us / 1000)) "." (stages(timeline)) }
        div.chart tabindex="0" role="group" aria-label="Chart of downloads" {
            svg viewBox={ "0 0 " (WIDTH) " " (height) } role="img" aria-label=(label) {
                @for part in 0..PARTS { (column(&sources, part, most)) }
                (axis(&scale))
                @for (number, lane) in (0..).zip(&lanes) {
                    @let y = COLUMNS + AXIS + number * (LANE + GAP);
                    @for bar in lane { (drawn(bar, &sources, &scale, y)) }
                }
            }
        }
        (legend(&sources))
        @if left_out > 0 { p { small { (count(left_out, "bar")) " not drawn: there is no room for so many at a time." } } }
    }
}

/// How long the parts of an output's way took.
fn stages(timeline: &Timeline) -> Markup {
    let stages = timeline.stages;
    let mean = |sum: u64| brief(Duration::from_micros(sum / stages.outputs.max(1)));
    html! {
        @if stages.outputs > 0 {
            " On average, an output was queued for " (mean(stages.queued_us)) ", downloaded in " (mean(stages.fetched_us))
            ", and verified and placed in " (mean(stages.placed_us)) "."
        }
    }
}

type Sources<'a> = [(&'a str, Vec<Came>)];

/// What is drawn of something: what has no bytes, such as a link, is there as well.
fn weight(came: Came) -> u64 {
    came.bytes.max(came.outputs)
}

/// The most that came in one part of the time.
fn most(sources: &Sources<'_>) -> u64 {
    let sum = |part: usize| -> u64 {
        let parts = sources.iter().filter_map(|(_, parts)| parts.get(part));
        parts.map(|came| weight(*came)).sum()
    };
    (0..PARTS).map(sum).max().unwrap_or_default().max(1)
}

/// What came in a part of the time, that of one source above that of another.
fn column(sources: &Sources<'_>, part: usize, most: u64) -> Markup {
    let left = part as i64 * WIDTH / PARTS as i64;
    let mut below = 0;
    let stacked = sources
        .iter()
        .enumerate()
        .filter_map(|(number, (source, parts))| {
            let came = parts.get(part).copied().filter(|came| weight(*came) > 0)?;
            let height = u128::from(weight(came)) * u128::from(COLUMNS) / u128::from(most);
            let height = u64::try_from(height)
                .unwrap_or(COLUMNS)
                .max(1)
                .min(COLUMNS - below);
            below += height;
            Some((number, *source, came, height, COLUMNS - below))
        });
    let stacked: Vec<_> = stacked.collect();
    html! {
        @for (number, source, came, height, y) in stacked {
            rect class={ "s" (number) } x=(left) y=(y) width=(WIDTH / PARTS as i64 - 1) height=(height) {
                title { (name(source)) ": " (show_size(came.bytes)) ", " (count(came.outputs, "output")) }
            }
        }
    }
}

fn axis(scale: &Scale) -> Markup {
    let y = COLUMNS + 1;
    html! {
        line.axis x1="0" y1=(y) x2=(WIDTH) y2=(y) {}
        @for tick in 0..=4 {
            @let at = scale.length / 4 * tick;
            @let anchor = match tick { 0 => "start", 4 => "end", _ => "middle" };
            text x=(WIDTH / 4 * tick) y=(y + 13) text-anchor=(anchor) { (between(0, at)) }
        }
    }
}

/// Bars that do not overlap share a lane; how many found none.
fn lanes<'a>(bars: &[&'a Bar]) -> (Vec<Vec<&'a Bar>>, u64) {
    let mut lanes: Vec<Vec<&Bar>> = Vec::new();
    let mut left_out = 0;
    for bar in bars {
        let is_free = |lane: &Vec<&Bar>| lane.last().is_none_or(|last| last.placed_us <= bar.begins_us());
        let has_room = lanes.len() < LANES;
        match lanes.iter_mut().find(|lane| is_free(lane)) {
            Some(lane) => lane.push(bar),
            None if has_room => lanes.push(vec![bar]),
            None => left_out += 1,
        }
    }
    (lanes, left_out)
}

/// A bar: from being asked for to having come, and lighter from there to its place on disk.
fn drawn(bar: &Bar, sources: &Sources<'_>, scale: &Scale, y: u64) -> Markup {
    let number = sources
        .iter()
        .position(|(source, _)| *source == bar.source_name());
    let class = format!("s{}", number.unwrap_or(sources.len().saturating_sub(1)));
    let from = scale.x(bar.begins_us()).min(WIDTH - NARROWEST);
    let to = scale.x(bar.placed_us).max(from + NARROWEST);
    let came = bar
        .fetched_us
        .map_or(to, |(_, came)| scale.x(came).clamp(from, to));
    html! {
        g {
            title {
                (name(&bar.path)) ": " (show_size(bar.bytes)) ", " (name(&bar.source)) ". "
                @if let Some((asked, came)) = bar.fetched_us {
                    "Queued for " (between(bar.wanted_us, asked)) ", downloaded in " (between(asked, came))
                    ", verified and placed in " (between(came, bar.placed_us)) "."
                } @else {
                    "From being wanted to being there: " (between(bar.wanted_us, bar.placed_us)) "."
                }
            }
            rect class={ "placing " (class) } x=(from) y=(y) width=(to - from) height=(LANE) {}
            rect class=(class) x=(from) y=(y) width=(came - from) height=(LANE) {}
        }
    }
}

/// The sources, with their colours and what each gave.
fn legend(sources: &Sources<'_>) -> Markup {
    html! {
        ul.legend {
            @for (number, (source, parts)) in sources.iter().enumerate() {
                @let outputs: u64 = parts.iter().map(|came| came.outputs).sum();
                @let bytes: u64 = parts.iter().map(|came| came.bytes).sum();
                li {
                    svg.key viewBox="0 0 10 10" aria-hidden="true" { rect class={ "s" (number) } width="10" height="10" {} }
                    " " (name(source)) " " small { (show_size(bytes)) " in " (show_count(outputs)) }
                }
            }
            li { svg.key viewBox="0 0 10 10" aria-hidden="true" { rect.s7.placing width="10" height="10" {} } " verified and placed" }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::invocation::timeline::Arrival;

    #[test]
    fn bars_that_overlap_lie_in_different_lanes_and_markup_in_names_is_text() {
        let mut timeline = Timeline::default();
        for (path, wanted_us, placed_us) in [("a", 0, 100), ("b", 50, 150), ("<script>c", 100, 200)] {
            timeline.add(&Arrival {
                path,
                bytes: 10,
                source: "batch from <b>",
                wanted_us,
                fetched_us: Some((wanted_us, placed_us - 10)),
                placed_us,
            });
        }
        let (bars, _) = timeline.bars();
        let (lanes, left_out) = lanes(&bars);
        let lanes: Vec<Vec<&str>> = lanes
            .iter()
            .map(|lane| lane.iter().map(|bar| &*bar.path).collect())
            .collect();
        assert_eq!((lanes, left_out), (vec![vec!["a", "<script>c"], vec!["b"]], 0));
        let shown = view(&timeline).into_string();
        assert!(!shown.contains("<script>") && !shown.contains("<b>"), "{shown}");
        assert!(shown.contains("&lt;script&gt;c: 10 B"), "{shown}");
        assert!(
            view(&Timeline::default())
                .into_string()
                .contains("Nothing was downloaded")
        );
    }
}
