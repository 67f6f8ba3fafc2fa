//! The dashboard, the alert rules and the documentation name metrics that exist; promtool takes them.

use std::{
    collections::BTreeSet,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use outhaul_testkit::peers;
use regex::Regex;
use serde_json::Value;

use crate::{admin::get_from, support::World};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(repository().join(path)).unwrap()
}

/// What a daemon shows that has built once, in Prometheus's older format.
async fn page() -> String {
    let world = World::new().await;
    let server = world.serve(&["--admin-listen=127.0.0.1:0"]).await;
    let log = server.logged("health and metrics on http://").await;
    let address = log.split("health and metrics on http://").nth(1).unwrap();
    let address = address.lines().next().unwrap().trim();
    world.play(&world.build, server.address()).await;
    let (head, body) = get_from(address, address, "/metrics", "").await;
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    body
}

/// The names of metrics in a text, without what histograms add to them.
fn names(text: &str) -> BTreeSet<String> {
    let name = Regex::new(r"\bouthaul_[a-z_]*[a-z]\b").unwrap();
    let base = Regex::new("_(bucket|sum|count)$").unwrap();
    let found = name
        .find_iter(text)
        .map(|found| base.replace(found.as_str(), "").into_owned());
    found.collect()
}

/// What queries ask of labels, as the page writes it.
fn labels(queries: &str) -> BTreeSet<String> {
    let matcher = Regex::new(r#"([a-z]+)=~?"([a-z_|]+)""#).unwrap();
    let found = matcher.captures_iter(queries).flat_map(|found| {
        let values = found[2].split('|').map(str::to_owned);
        let label = found[1].to_owned();
        values
            .map(move |value| format!("{label}=\"{value}\""))
            .collect::<Vec<_>>()
    });
    found.collect()
}

/// The expressions of a dashboard's panels.
fn queries(dashboard: &Value) -> String {
    let mut queries = String::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().unwrap() {
            queries.push_str(target["expr"].as_str().unwrap());
            queries.push('\n');
        }
    }
    assert!(!queries.is_empty());
    queries
}

#[tokio::test(flavor = "multi_thread")]
async fn dashboard_alerts_and_documentation_name_the_metrics_that_exist() {
    let page = page().await;
    let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let exist: BTreeSet<String> = types
        .map(|rest| rest.split(' ').next().unwrap().to_owned())
        .collect();
    // These come with a second cache.
    let with_several = [
        "outhaul_store_outputs_total",
        "outhaul_store_downloaded_bytes_total",
    ]
    .map(str::to_owned);
    let documentation = read("docs/cli.md");
    let documentation = documentation.split("## Metrics\n").nth(1).unwrap();
    let rules = read("dist/prometheus/outhaul.rules.yml");
    let dashboard = serde_json::from_str(&read("dist/grafana/outhaul.json")).unwrap();
    let queries = queries(&dashboard);
    for (what, text) in [
        ("docs/cli.md", documentation),
        ("the rules", &rules),
        ("the dashboard", &queries),
    ] {
        let named = names(text);
        assert!(!named.is_empty(), "{what}");
        let unknown: Vec<&String> = named
            .iter()
            .filter(|name| !exist.contains(*name) && !with_several.contains(name) && *name != "outhaul_bes")
            .collect();
        assert_eq!(unknown, Vec::<&String>::new(), "{what}: {page}");
    }
    let documented = names(documentation);
    let undocumented: Vec<&String> = exist
        .iter()
        .filter(|name| !documented.contains(*name) && !name.starts_with("outhaul_bes_"))
        .collect();
    assert_eq!(undocumented, Vec::<&String>::new());
    for label in labels(&rules).iter().chain(&labels(&queries)) {
        assert!(page.contains(label), "{label} is missing in\n{page}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn promtool_takes_the_metrics_and_the_alert_rules() {
    if !peers::are_there("promtool_takes_the_metrics_and_the_alert_rules", &["promtool"]) {
        return;
    }
    let page = page().await;
    let promtool = |args: &[&str], input: &str| {
        let mut running = Command::new(peers::program("promtool"))
            .args(args)
            .current_dir(repository())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        running.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let ended = running.wait_with_output().unwrap();
        let said = [ended.stdout, ended.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(ended.status.success(), "promtool {args:?}: {said}\n{input}");
    };
    promtool(&["check", "metrics"], &page);
    promtool(&["check", "rules", "dist/prometheus/outhaul.rules.yml"], "");
    promtool(&["test", "rules", "tests/cli/alerts.yml"], "");
}
