//! The caches: whether they are asked, what requests took, what went wrong, and what each has given.

use std::time::Duration;

use maud::{Markup, html};
use tonic::Status;

use super::html::{brief, name, state};
use crate::{
    metrics::Metrics,
    proto::outhaul::v1 as pb,
    remote::Standing,
    units::{show_count, show_duration, show_size},
};

/// What is asked of caches, as metrics name it and for people.
const REQUESTS: [(&str, &str); 3] = [
    ("batch", "Batches of small blobs"),
    ("stream", "Large blobs"),
    ("find_missing", "Whether blobs are there"),
];
/// What may go wrong, as metrics name it and for people.
const FAULTS: [(&str, &str); 4] = [
    (
        "outhaul_blobs_total{source=\"none\",outcome=\"failed\"}",
        "Outputs that failed",
    ),
    (
        "outhaul_blobs_total{source=\"none\",outcome=\"evicted\"}",
        "Outputs that were evicted",
    ),
    (
        "outhaul_faults_total{kind=\"mismatch\"}",
        "Answers with wrong bytes",
    ),
    (
        "outhaul_faults_total{kind=\"unusable_answer\"}",
        "Answers that could not be used",
    ),
];

/// What is asked of the control API: what each cache gave to the builds on record.
pub(super) fn request() -> pb::ReportRequest {
    pb::ReportRequest {
        since_ms: 0,
        by: pb::ReportBy::Store.into(),
    }
}

/// The page.
pub(super) fn view(
    caches: &[Standing],
    metrics: &Metrics,
    report: &Result<pb::ReportResponse, Status>,
) -> Markup {
    let counts = metrics.render_classic();
    html! {
        h1 { "Caches" }
        section aria-label="Caches" { (standings(caches)) }
        h2 { "Requests since the daemon started" }
        section aria-label="Requests" { (requests(&counts)) (faults(&counts)) }
        h2 { "What builds on record have downloaded" }
        section aria-label="Downloads" { (downloads(report)) }
    }
}

fn standings(caches: &[Standing]) -> Markup {
    html! {
        @if caches.is_empty() {
            p.empty { "No cache is in use yet: each build names its own." }
        } @else {
            table {
                caption.hidden { "Caches in use" }
                thead { tr { th scope="col" { "State" } th scope="col" { "Cache" } th scope="col" { "Why" } } }
                tbody {
                    @for cache in caches {
                        tr {
                            @if let Some((left, reason)) = &cache.passed_over {
                                td { (state("failed")) }
                                td.wide { code { (name(&cache.name)) } }
                                td {
                                    @if left.is_zero() { "asked again with the next request" }
                                    @else { "not asked for " (show_duration(*left)) }
                                    p.error { (name(reason)) }
                                }
                            } @else {
                                td { (state("asked")) }
                                td.wide { code { (name(&cache.name)) } }
                                td {}
                            }
                        }
                    }
                }
            }
        }
    }
}

/// A value of the metrics.
fn value(counts: &str, metric: &str) -> f64 {
    let lines = counts
        .lines()
        .filter_map(|line| line.strip_prefix(metric)?.strip_prefix(' '));
    lines.filter_map(|text| text.parse::<f64>().ok()).sum()
}

fn requests(counts: &str) -> Markup {
    let of = |metric: &str, kind: &str| value(counts, &format!("outhaul_{metric}{{kind=\"{kind}\"}}"));
    html! {
        table {
            caption.hidden { "Requests by kind" }
            thead {
                tr { th scope="col" { "Request" } th.number scope="col" { "How often" } th.number scope="col" { "Mean time" } }
            }
            tbody {
                @for (kind, text) in REQUESTS {
                    @let times = of("transfer_seconds_count", kind);
                    tr {
                        td.wide { (text) }
                        td.number data-label="requests" { (show_count(of("requests_total", kind) as u64)) }
                        td.number data-label="mean time" {
                            @if times > 0.0 { (brief(Duration::from_secs_f64(of("transfer_seconds_sum", kind) / times))) } @else { "–" }
                        }
                    }
                }
            }
        }
    }
}

fn faults(counts: &str) -> Markup {
    html! {
        dl.numbers {
            @for (metric, text) in FAULTS {
                @let number = value(counts, metric) as u64;
                div { dt { (text) } dd.bad[number > 0] { (show_count(number)) } }
            }
        }
    }
}

fn downloads(report: &Result<pb::ReportResponse, Status>) -> Markup {
    let report = match report {
        Ok(report) => report,
        Err(error) => return html! { p.error { (name(error.message())) } },
    };
    html! {
        @if report.entries.is_empty() {
            p.empty { "Nothing yet." }
        } @else {
            table {
                caption.hidden { "Downloads by cache" }
                thead {
                    tr {
                        th scope="col" { "Cache" }
                        th.number scope="col" { "Builds" }
                        th.number scope="col" { "Outputs" }
                        th.number scope="col" { "Downloaded" }
                        th.number scope="col" { "Without download" }
                    }
                }
                tbody {
                    @for entry in report.entries.iter().take(100) {
                        tr {
                            td.wide { @if entry.name.is_empty() { "(no cache needed)" } @else { code { (name(&entry.name)) } } }
                            td.number data-label="builds" { (show_count(entry.builds)) }
                            td.number data-label="outputs" { (show_count(entry.downloaded)) }
                            td.number data-label="downloaded" { (show_size(entry.downloaded_bytes)) }
                            td.number data-label="without download" { (show_count(entry.without_download)) }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_metrics_count_is_shown_by_the_names_that_they_have() {
        let metrics = Metrics::default();
        metrics.request("stream");
        metrics.transfer("stream").observe(0.5);
        metrics.fault("mismatch");
        metrics.blobs("none", "evicted", 7);
        let counts = metrics.render_classic();
        for (metric, _) in FAULTS {
            assert!(counts.contains(metric), "{metric}");
        }
        assert_eq!(value(&counts, FAULTS[1].0), 7.0);
        assert_eq!(value(&counts, FAULTS[2].0), 1.0);
        let shown = requests(&counts).into_string();
        assert!(shown.contains("500 ms"), "{shown}");
    }
}
