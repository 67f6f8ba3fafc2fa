//! `outhaul report`: what builds have downloaded, and what that has cost.

use std::{borrow::Cow, io::Write as _};

use clap::{Args, ValueEnum};
use serde_json::json;

use super::{client::AskArgs, exit, exit::Failure, print, runtime};
use crate::{
    config::ConfigError,
    printable::printable,
    proto::outhaul::v1::{self as pb, report_response::Entry},
    units::{now_ms, parse_age, show_count, show_size},
};

/// Bytes of the unit that prices are for.
const GB: f64 = 1e9;

/// Arguments of `outhaul report`.
#[derive(Debug, Args)]
pub(super) struct ReportArgs {
    /// Only builds that began in this time until now
    #[arg(long, value_name = "DURATION", default_value = "7d")]
    since: String,

    /// What to group by: the target that named the outputs, the rule that made them wanted, the cache that they came
    /// from, the workspace, or the day (UTC)
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = By::Workspace)]
    by: By,

    /// Price of a GB (1,000,000,000 bytes) that was downloaded, such as 0.09: adds the cost
    #[arg(long, value_name = "PRICE", value_parser = parse_price)]
    price: Option<f64>,

    /// Print comma-separated values, with a header
    #[arg(long, conflicts_with = "json")]
    csv: bool,

    #[command(flatten)]
    ask: AskArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum By {
    Target,
    Rule,
    Store,
    Workspace,
    Day,
}

fn parse_price(text: &str) -> Result<f64, String> {
    let price = text
        .parse()
        .ok()
        .filter(|price: &f64| price.is_finite() && *price >= 0.0);
    price.ok_or_else(|| "must be a number such as 0.09, and not below 0".to_owned())
}

pub(super) fn main(args: &ReportArgs) -> Result<u8, Failure> {
    let since = parse_age(&args.since).map_err(|e| ConfigError::new(format!("--since={}", args.since), e))?;
    let since_ms = i64::try_from(since.as_millis()).unwrap_or(i64::MAX);
    let by = match args.by {
        By::Target => pb::ReportBy::Target,
        By::Rule => pb::ReportBy::Rule,
        By::Store => pb::ReportBy::Store,
        By::Workspace => pb::ReportBy::Workspace,
        By::Day => pb::ReportBy::Day,
    };
    let request = pb::ReportRequest {
        since_ms: now_ms().saturating_sub(since_ms),
        by: by.into(),
    };
    runtime()?.block_on(async {
        let client = args.ask.client().await?;
        let report = client.with(async |client| client.report(request).await).await?;
        show(args, &report)
    })
}

/// What the bytes of an entry cost.
fn cost(args: &ReportArgs, entry: &Entry) -> Option<f64> {
    Some(args.price? * entry.downloaded_bytes as f64 / GB)
}

fn show(args: &ReportArgs, report: &pb::ReportResponse) -> Result<u8, Failure> {
    let mut out = print::out();
    if args.csv {
        let cost = if args.price.is_some() { ",cost" } else { "" };
        writeln!(
            out,
            "name,builds,downloaded,downloaded_bytes,without_download{cost}"
        )?;
    } else if !args.ask.json && !report.entries.is_empty() {
        let cost = if args.price.is_some() { "       cost" } else { "" };
        writeln!(out, "downloaded    outputs  no download     builds{cost}")?;
    }
    for entry in &report.entries {
        if args.ask.json {
            let value = json!({
                "name": entry.name,
                "builds": entry.builds,
                "downloaded": entry.downloaded,
                "downloaded_bytes": entry.downloaded_bytes,
                "without_download": entry.without_download,
                "cost": cost(args, entry),
            });
            writeln!(out, "{value}")?;
        } else if args.csv {
            writeln!(out, "{}", csv_line(args, entry))?;
        } else {
            writeln!(out, "{}", line(args, entry))?;
        }
    }
    let total = report.total.clone().unwrap_or_default();
    let mut said = format!(
        "outhaul: {} downloaded in {} outputs of {} builds; {} outputs needed no download",
        show_size(total.downloaded_bytes),
        show_count(total.downloaded),
        show_count(total.builds),
        show_count(total.without_download),
    );
    if let (Some(cost), Some(price)) = (cost(args, &total), args.price) {
        said.push_str(&format!("; {cost:.2} at {price} per GB"));
    }
    if report.left_out > 0 {
        said.push_str(&format!(
            "; {} more lines are left out",
            show_count(report.left_out)
        ));
    }
    writeln!(print::err(), "{said}")?;
    Ok(exit::OK)
}

fn line(args: &ReportArgs, entry: &Entry) -> String {
    let name: Cow<'_, str> = match &*entry.name {
        "" => "(none)".into(),
        name => printable(name),
    };
    let cost = cost(args, entry).map_or_else(String::new, |cost| format!("  {cost:>9.2}"));
    format!(
        "{:>10}  {:>9}  {:>11}  {:>9}{cost}  {name}",
        show_size(entry.downloaded_bytes),
        show_count(entry.downloaded),
        show_count(entry.without_download),
        show_count(entry.builds),
    )
}

/// As RFC 4180 has it.
fn csv_line(args: &ReportArgs, entry: &Entry) -> String {
    let name = &entry.name;
    let name: Cow<'_, str> = if name.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", name.replace('"', "\"\"")).into()
    } else {
        name.into()
    };
    let cost = cost(args, entry).map_or_else(String::new, |cost| format!(",{cost}"));
    format!(
        "{name},{},{},{},{}{cost}",
        entry.builds, entry.downloaded, entry.downloaded_bytes, entry.without_download
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: ReportArgs,
    }

    fn args(args: &[&str]) -> ReportArgs {
        Cli::parse_from(std::iter::once("outhaul").chain(args.iter().copied())).args
    }

    #[test]
    fn names_are_quoted_where_csv_needs_it_and_the_price_is_per_gb() {
        for (name, price, expected) in [
            ("//a:b", None, "//a:b,1,2,3000000000,4"),
            (
                "rule: label=//a,b",
                None,
                "\"rule: label=//a,b\",1,2,3000000000,4",
            ),
            (
                "say \"x\"",
                Some("--price=0.1"),
                "\"say \"\"x\"\"\",1,2,3000000000,4,0.3",
            ),
            ("", Some("--price=0"), ",1,2,3000000000,4,0"),
        ] {
            let entry = Entry {
                name: name.to_owned(),
                builds: 1,
                downloaded: 2,
                downloaded_bytes: 3_000_000_000,
                without_download: 4,
            };
            let args = args(price.as_slice());
            assert!(
                csv_line(&args, &entry).starts_with(expected),
                "{}",
                csv_line(&args, &entry)
            );
        }
    }

    #[test]
    fn a_price_is_a_number_that_is_not_below_zero() {
        assert_eq!(parse_price("0.09"), Ok(0.09));
        for bad in ["", "-1", "nan", "inf", "9c"] {
            assert!(parse_price(bad).is_err(), "{bad}");
        }
    }
}
