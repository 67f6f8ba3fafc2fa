//! `docs/bazel-flags.md` names every flag of a Bazel that concerns what Outhaul does.

use std::collections::{BTreeMap, BTreeSet};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use prost::Message as _;

use crate::harness::{Stage, Version};

for_each_bazel!(embedded: the_table_names_the_flags_that_the_bazel_has);

const TABLE: &str = include_str!("../../docs/bazel-flags.md");

/// Flags that concern remote caches, downloads, build events, or the names and places of outputs. A `*` stands for
/// anything.
const CONCERNING: &[&str] = &[
    // Caches.
    "remote_*",
    "experimental_remote_*",
    "incompatible_remote_*",
    "disk_cache*",
    "experimental_disk_cache*",
    "tls_*",
    "credential*",
    "experimental_credential*",
    "google_*",
    "grpc_*",
    "digest_function",
    "*action_cache",
    "action_cache_store*",
    "experimental_inmemory_*",
    "rewind_lost_inputs",
    // Events.
    "bes_*",
    "bep_*",
    "build_event_*",
    "experimental_build_event_*",
    "experimental_bep*",
    "experimental_use_event_based*",
    "experimental_stream_log*",
    "keep_backend*",
    "build_metadata",
    "build_request_id",
    "invocation_id",
    "keep_going",
    "legacy_important_outputs",
    "*nested_set*",
    // Outputs.
    "output_base",
    "output_groups",
    "output_path*",
    "output_user_root",
    "experimental_*output_dir*",
    "experimental_output_path*",
    "experimental_writable_outputs",
    "symlink_prefix",
    "*convenience_symlinks*",
    "*_out_symlink",
    "use_top_level_targets_for_symlinks",
    "*plus_in_repo_names",
    "*run_validations",
    "*use_validation_aspect",
    "*runfile_*",
    "*runfiles*",
    // Tests.
    "runs_per_test*",
    "flaky_test_attempts",
    "test_output",
    "test_sharding_strategy",
    "*undeclared*",
    "combined_report",
    "experimental_*coverage_outputs",
    "experimental_split_coverage*",
];

/// What matches a pattern and concerns the outputs of no build.
const OTHERS: &[&str] = &["action_cache", "experimental_throttle_action_cache_check"];

/// What `bazel help flags-as-proto` prints, as far as it is needed: `bazel_flags.proto` of Bazel.
#[derive(Clone, PartialEq, prost::Message)]
struct Flags {
    #[prost(message, repeated, tag = "1")]
    list: Vec<Flag>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Flag {
    #[prost(string, tag = "1")]
    name: String,
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name.strip_prefix(start).is_some_and(|name| {
            (0..=name.len()).any(|at| name.get(at..).is_some_and(|name| matches(rest, name)))
        }),
    }
}

fn concerns(name: &str) -> bool {
    !OTHERS.contains(&name) && CONCERNING.iter().any(|pattern| matches(pattern, name))
}

/// The table's flags, each with what the column of versions says. None is named twice.
#[track_caller]
fn table() -> BTreeMap<&'static str, &'static str> {
    let mut table = BTreeMap::new();
    for line in TABLE.lines().filter(|line| line.starts_with("| `--")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        assert_eq!(cells.len(), 5, "a row has three cells: {line}");
        for flag in cells[1].split(", ") {
            let name = flag.strip_prefix("`--").and_then(|flag| flag.strip_suffix('`'));
            let name = name.unwrap_or_else(|| panic!("{flag} is no flag: {line}"));
            assert_eq!(table.insert(name, cells[2]), None, "--{name} is there twice");
        }
    }
    table
}

#[test]
fn the_table_names_no_flag_twice_and_each_says_what_is_done() {
    let words = ["**Honoured", "**No effect", "**Left to Bazel", "**Not honoured"];
    for line in TABLE.lines().filter(|line| line.starts_with("| `--")) {
        let reported = line.split('|').nth(3).unwrap_or_default().trim();
        assert!(words.iter().any(|word| reported.starts_with(word)), "{line}");
    }
    assert!(table().len() > 150);
}

#[test]
fn patterns_match_whole_names() {
    for (pattern, name, expected) in [
        ("a_b", "a_b", true),
        ("a_b", "a_bc", false),
        ("a_*", "a_", true),
        ("a_*", "xa_b", false),
        ("*_b", "a_b_b", true),
        ("*_b", "a_b_c", false),
        ("a*b*c", "abxbc", true),
        ("a*b*c", "acb", false),
    ] {
        assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
    }
}

fn the_table_names_the_flags_that_the_bazel_has(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let (version, least) = match bazel.version() {
        Version::Two | Version::Four => ("4.2.3", 95),
        Version::Seven => ("7.7.1", 150),
    };
    // With the flags that the other help texts do not show.
    let reported = bazel.run("help", &["flags-as-proto"]).ok();
    let reported = STANDARD.decode(reported.out().trim()).unwrap();
    let known: BTreeSet<String> = Flags::decode(reported.as_slice())
        .unwrap()
        .list
        .into_iter()
        .map(|flag| flag.name)
        .collect();
    let table = table();

    let concerning: Vec<&String> = known.iter().filter(|name| concerns(name)).collect();
    assert!(concerning.len() >= least, "{} of {version}", concerning.len());
    let lacking: Vec<_> = concerning
        .iter()
        .filter(|name| !table.contains_key(name.as_str()))
        .collect();
    assert!(
        lacking.is_empty(),
        "flags of {version} that docs/bazel-flags.md lacks: {lacking:#?}"
    );

    let is_said = |versions: &str| versions.is_empty() || versions.contains(version);
    let wrong: Vec<_> = table
        .iter()
        .filter(|(name, versions)| known.contains(**name) != is_said(versions))
        .collect();
    assert!(
        wrong.is_empty(),
        "docs/bazel-flags.md is wrong about which versions have these, {version} being asked: {wrong:#?}"
    );
}
