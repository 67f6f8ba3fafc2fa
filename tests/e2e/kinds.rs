//! The scenarios of the main job with every kind of cache that is not a gRPC one.
//!
//! Each kind has one cache, which gets fuller, and one or two Bazels whose servers go on. So the time of a kind is that of a
//! few tests; a cache that has nothing yet is a matter of the same scenarios with gRPC caches, in files of their own.
//!
//! A server behind HTTP has them all. What reads from the other kinds is exercised by fewer, unless `OUTHAUL_E2E=all`
//! (`scripts/e2e`); the builds in `alike` have some of these kinds, too.

use crate::{
    asking, cold, failing, faults,
    harness::{Daemon, Expected, Scenario, Stage, Version, has_all, run_all},
    incremental, kill, parallel, testing,
};

/// Scenarios with their names.
macro_rules! scenarios {
    ($($room:ident::$name:ident),+ $(,)?) => {
        &[$((stringify!($name), $room::$name as fn(&Stage))),+]
    };
}

/// The main job's.
const ALL: &[Scenario] = scenarios![
    cold::top_level_outputs_are_there_when_the_build_returns,
    incremental::deleted_and_damaged_outputs_come_back_without_execution,
    incremental::a_target_whose_actions_all_hit_the_cache_appears,
    testing::test_outputs_are_in_their_places_and_programs_stay_remote,
    failing::what_was_built_beside_a_failure_is_there,
    asking::outputs_are_known_before_they_are_fetched_and_say_why,
    kill::a_daemon_that_is_killed_goes_on_where_it_was,
    parallel::a_newer_build_wins_over_what_an_older_one_still_downloads,
    // The cache is dead after it.
    faults::a_cache_that_goes_away_fails_a_strict_build_only,
];

/// What depends less on the kind of the cache: with a server, and with a directory before a server.
const MORE: &[Scenario] = scenarios![
    parallel::two_workspaces_build_at_the_same_time_against_one_daemon,
    faults::a_full_disk_is_reported_and_fails_a_strict_build_only,
];

/// What depends on it least: with a server.
const MOST: &[Scenario] = scenarios![
    cold::groups_aspects_and_large_outputs_are_there,
    cold::run_needs_no_configuration,
    // Bazel downloads what this is about by itself.
    testing::every_attempt_and_run_of_a_test_is_in_its_place,
    faults::a_read_only_output_tree_is_reported_and_fails_a_strict_build_only,
    faults::a_damaged_record_costs_no_build_anything,
];

/// What reads from the cache in the most ways, and the cache's end.
const FEW: &[Scenario] = scenarios![
    cold::top_level_outputs_are_there_when_the_build_returns,
    incremental::deleted_and_damaged_outputs_come_back_without_execution,
    faults::a_cache_that_goes_away_fails_a_strict_build_only,
];

fn scenarios(cache: &str, before: &[Scenario]) {
    let all = [before, ALL].concat();
    run_all(&format!("kinds::{cache}"), Version::Seven, cache, &all);
}

fn few_scenarios(cache: &str, before: &[Scenario]) {
    if has_all() {
        scenarios(cache, before);
    } else {
        run_all(&format!("kinds::{cache}"), Version::Seven, cache, FEW);
    }
}

#[test]
fn the_main_job_is_done_with_nginx() {
    let before = if has_all() {
        [MOST, MORE].concat()
    } else {
        Vec::new()
    };
    scenarios("nginx", &before);
}

#[test]
fn the_main_job_is_done_with_a_disk_cache() {
    few_scenarios("disk", &[]);
}

#[test]
fn the_main_job_is_done_with_a_disk_cache_before_nginx() {
    few_scenarios("disk_and_nginx", MORE);
}

#[test]
fn the_main_job_is_done_with_a_bucket_that_an_http_front_fills() {
    few_scenarios("bucket", &[]);
}

#[test]
fn the_main_job_is_done_with_a_bucket_that_is_a_disk_cache() {
    few_scenarios("disk_bucket", &[]);
}

/// Bazel 4 names no digests with these caches, so Outhaul can download nothing. The build has what Bazel downloads, and what
/// it does not is reported.
#[test]
fn with_bazel_4_nothing_is_lost() {
    for cache in ["nginx", "disk", "disk_and_nginx"] {
        let scenarios: [Scenario; 1] = [("bazel_4_keeps_what_it_downloads", bazel_4_keeps_what_it_downloads)];
        run_all(&format!("kinds::{cache} (4)"), Version::Four, cache, &scenarios);
    }
}

fn bazel_4_keeps_what_it_downloads(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let targets = ["//:all", "//gen:all", "//rules:all"];
    let expected = Expected::of(&bazel, &targets);
    // Anything that were missing would fail the build.
    let daemon = Daemon::reading(cache.settings(), &["--strict"]);
    let bes = daemon.bes();
    let in_mode = |mode: &str| bazel.build(&[&[bes.as_str(), mode], &targets[..]].concat());
    in_mode("--remote_download_toplevel").ok();
    expected.are_there(&bazel, &daemon.log());
    let status = daemon.settled();
    assert!(
        status["present"].as_u64() > Some(10) && status["downloaded"] == 0,
        "{status:#}"
    );
    bazel.clean();
    let daemon = Daemon::reading(cache.settings(), &[]);
    let run = bazel
        .build(&[&[daemon.bes().as_str()], &targets[..]].concat())
        .ok();
    let status = daemon.outhaul().status();
    let errors = status["errors"].as_array().expect("a list");
    let is_reported = |error: &serde_json::Value| {
        let text = error.as_str().unwrap_or_default();
        text.contains("before version 7 no digests at all") && text.contains("not on disk")
    };
    assert!(
        errors.iter().filter(|error| is_reported(error)).count() > 5 && status["failed"].as_u64() > Some(10),
        "{status:#}\n{run}"
    );
    assert_eq!(status["state"], "settled", "{status:#}");
}
