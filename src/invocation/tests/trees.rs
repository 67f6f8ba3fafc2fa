//! Trees, in whichever order events report them: which files are wanted by a tree's root, and that no tree with files
//! is taken for an empty one.
//!
//! `OUTHAUL_HOSTILE_CASES` is how many random builds there are, `OUTHAUL_HOSTILE_SEED` repeats one.

use std::collections::BTreeSet;

use outhaul_testkit::Chance;
use rand::RngExt as _;

use super::*;
use crate::invocation::{
    policy::PathRegex,
    selection::{Command, GroupContext, Origin, Selector},
};

const ASPECT: &str = "//x.bzl%aspect";

fn complete(label: &str, aspect: &str, group: OutputGroup, trees: &[&str]) -> Completed {
    Completed {
        target: TargetId {
            label: label.to_owned(),
            aspect: aspect.to_owned(),
            ..TargetId::default()
        },
        success: true,
        groups: vec![group],
        directories: trees.iter().map(|tree| file(tree)).collect(),
    }
}

fn group(name: &str, sets: &[&str]) -> OutputGroup {
    OutputGroup {
        name: name.to_owned(),
        sets: sets.iter().map(|s| (*s).to_owned()).collect(),
        ..OutputGroup::default()
    }
}

fn picks(regex: &str) -> Policy {
    Policy {
        mode: DownloadMode::Minimal,
        regexes: vec![regex.parse().unwrap()],
        ..Policy::default()
    }
}

fn play_with(policy: &Policy, events: Vec<Event>) -> Vec<Effect> {
    let mut build = Build::new(policy.clone());
    build.handle(1, started());
    build.handle(2, root());
    let mut effects = Vec::new();
    for (number, event) in events.into_iter().enumerate() {
        effects.extend(build.handle(3 + number as i64, event));
    }
    effects.extend(build.end());
    effects
}

/// How often each path is named.
fn times(effects: &[Effect]) -> BTreeMap<&str, usize> {
    let mut times = BTreeMap::new();
    for effect in effects {
        if let Effect::Outputs(_, named) = effect {
            for named in named {
                *times.entry(named.path.as_str()).or_default() += 1;
            }
        }
    }
    times
}

#[test]
fn a_root_picks_its_tree_whichever_event_has_the_set_first() {
    let aspect = Event::Completed(complete("//:t", ASPECT, group("report", &["0"]), &[]));
    let target = Event::Completed(complete("//:t", "", group("default", &["0"]), &["t.d"]));
    let other = Event::Completed(complete("//:o", "", group("default", &["0"]), &[]));
    let inline = OutputGroup {
        files: vec![file("t.d/x")],
        ..group("default", &[])
    };
    let inline = Event::Completed(complete("//:i", ASPECT, inline, &[]));
    for events in [
        vec![aspect.clone(), target.clone()],
        vec![target.clone(), aspect.clone()],
        vec![other.clone(), target.clone()],
        vec![target.clone(), other.clone()],
        vec![inline.clone(), target.clone()],
        vec![target.clone(), inline, other, aspect],
    ] {
        let events = [set("0", &["t.d/x", "y"], &[])].into_iter().chain(events);
        let effects = play_with(&picks(r".*/t\.d"), events.collect());
        let outputs = collect(effects);
        assert_eq!(class_of(&outputs, "t.d/x"), Some(Class::Required));
        assert_eq!(class_of(&outputs, "bin/y"), Some(Class::Known));
        assert_eq!(class_of(&outputs, "t.d"), None, "it is not empty");
    }
}

#[test]
fn a_rule_for_others_picks_a_tree_whose_root_a_target_names_later() {
    let policy = Policy {
        mode: DownloadMode::Minimal,
        rules: vec![r"required aspect=* path=.*/t\.d".parse().unwrap()],
        ..Policy::default()
    };
    // The target's own set is another one, of another group.
    let aspect = complete("//:t", ASPECT, group("report", &["0"]), &[]);
    let target = complete("//:t", "", group("default", &["1"]), &["t.d"]);
    let events = vec![
        set("0", &["t.d/x"], &[]),
        set("1", &["t.d/x"], &[]),
        Event::Completed(aspect),
        Event::Completed(target),
    ];
    let outputs = collect(play_with(&policy, events));
    assert_eq!(class_of(&outputs, "t.d/x"), Some(Class::Required));
}

#[test]
fn a_tree_with_files_is_never_an_empty_directory_however_many_share_it() {
    let trees: Vec<String> = (0..200).map(|n| format!("t{n}.d")).collect();
    let names: Vec<&str> = trees.iter().map(String::as_str).collect();
    let files: Vec<String> = trees.iter().map(|tree| format!("{tree}/x")).collect();
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    let mut events = vec![set("0", &files, &[])];
    for n in 0..100 {
        let group = group(&format!("g{n}"), &["0"]);
        events.push(Event::Completed(complete(&format!("//:t{n}"), "", group, &names)));
    }
    let effects = play_with(&Policy::default(), events);
    let times = times(&effects);
    assert_eq!(times.len(), trees.len());
    assert!(times.values().all(|times| *times == 1), "{times:?}");
    assert!(times.keys().all(|path| path.ends_with("/x")));
}

#[test]
fn what_was_said_of_a_file_is_not_said_again_when_its_tree_is_known() {
    let mut bad = file("t.d/bad");
    bad.path = "bazel-out/k8/bin/t.d/../bad".into();
    let mut unknown = file("t.d/unknown");
    (unknown.content, unknown.uri) = (Content::Unknown, Some("bytestream://h/blobs/no/1".into()));
    let files = NamedSet {
        id: "0".to_owned(),
        files: vec![bad, unknown, file("t.d/x")],
        ..NamedSet::default()
    };
    let target = complete("//:t", "", group("default", &["0"]), &["t.d"]);
    let events = vec![
        Event::NamedSet(files),
        Event::Completed(complete("//:t", ASPECT, group("report", &["0"]), &[])),
        Event::Completed(target.clone()),
        Event::Completed(target),
    ];
    let effects = play_with(&picks(r".*/t\.d"), events);
    let unusable = effects
        .iter()
        .filter(|e| matches!(e, Effect::Unusable(..)))
        .count();
    assert_eq!(unusable, 2, "{effects:?}");
    assert_eq!(required(&effects), ["t.d/x"]);
}

/// So many that a step for each pair of them would never end.
const MANY: usize = 30_000;

#[test]
fn trees_of_very_many_targets_take_time_in_proportion_to_their_number() {
    let mut events = vec![set("all", &["shared"], &[])];
    for n in 0..MANY {
        events.push(set(
            &n.to_string(),
            &[&format!("t{n}.d/x"), &format!("y{n}")],
            &["all"],
        ));
        let id = n.to_string();
        let aspect = complete(&format!("//:t{n}"), ASPECT, group("report", &[&id]), &[]);
        events.push(Event::Completed(aspect));
    }
    // All have the last one's trees, one after the other, in a target and its set that has everything.
    let ids: Vec<String> = (0..MANY).map(|n| n.to_string()).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    events.push(set("top", &[], &ids));
    for n in 0..MANY {
        let tree = format!("t{n}.d");
        let target = complete(&format!("//:t{n}"), "", group("default", &["top"]), &[&tree]);
        events.push(Event::Completed(target));
    }
    let effects = play_with(&picks(r".*/t\d+\.d"), events);
    assert_eq!(required(&effects).len(), MANY);
    // Known at first, and then wanted.
    assert_eq!(times(&effects).values().sum::<usize>(), 3 * MANY + 1);
}

#[test]
fn trees_in_each_other_take_no_time_of_their_own() {
    let deep: Vec<String> = (1..1000).map(|n| vec!["d"; n].join("/")).collect();
    let roots: Vec<&str> = deep.iter().map(String::as_str).collect();
    let files: Vec<String> = (0..300)
        .map(|n| format!("{}/x{n}", deep.last().unwrap()))
        .collect();
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    for roots in [roots.clone(), roots.iter().rev().copied().collect()] {
        let mut events = vec![
            set("0", &files, &[]),
            Event::Completed(complete("//:t", ASPECT, group("report", &["0"]), &[])),
        ];
        for root in roots {
            let target = complete("//:t", "", group("default", &["0"]), &[root]);
            events.push(Event::Completed(target));
        }
        let effects = play_with(&picks(".*/d"), events);
        assert_eq!(required(&effects).len(), files.len());
        assert!(times(&effects).values().all(|times| *times <= 2));
    }
}

/// Policies by which a tree's root can only add to what is wanted.
fn policy(chance: &mut Chance) -> Policy {
    let regex = |text: &str| -> Vec<PathRegex> { vec![text.parse().unwrap()] };
    let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    let mode = chance.pick(&[DownloadMode::Minimal, DownloadMode::Toplevel]);
    let mut policy = Policy {
        mode,
        ..Policy::default()
    };
    match chance.below(6) {
        0 => policy.regexes = regex(r".*/t[01]\.d"),
        1 => policy.rules = rules(&[r"required path=.*/t[12]\.d"]),
        2 => policy.rules = rules(&[r"required aspect=* path=.*/t0\.d"]),
        3 => {
            policy.rules = rules(&[r"required label=//p:1 path=.*/t1\.d"]);
            policy.regexes = regex(r".*/t2\.d");
        }
        4 => policy.output_groups = vec!["g1".to_owned()],
        _ => {
            policy.output_groups = vec!["g0".to_owned()];
            policy.regexes = regex(r".*/t0\.d");
        }
    }
    policy
}

/// What a build names as a whole, without regard to who says what first.
fn expected(policy: &Policy, sets: &[Vec<String>], completions: &[Completed]) -> BTreeMap<String, Class> {
    let roots: BTreeSet<&str> = completions
        .iter()
        .flat_map(|completed| completed.directories.iter().map(|d| &*d.path))
        .collect();
    let mut selector = Selector::new(policy.clone());
    let mut classes: BTreeMap<String, Class> = BTreeMap::new();
    let mut name = |path: String, class| {
        let old = classes.entry(path).or_insert(class);
        *old = class.max(*old);
    };
    let mut filled: BTreeSet<&str> = BTreeSet::new();
    for path in sets.iter().flatten() {
        let path = file(path).path;
        filled.extend(roots.iter().filter(|root| path.starts_with(&format!("{root}/"))));
        name(path.to_string(), Class::Known);
    }
    for completed in completions {
        for group in &completed.groups {
            let profile = selector.profile(&GroupContext {
                command: Command::Build,
                label: &completed.target.label,
                aspect: &completed.target.aspect,
                group: &group.name,
                origin: Origin::Group { test_rule: false },
            });
            let in_sets = group
                .sets
                .iter()
                .flat_map(|id| &sets[id.parse::<usize>().unwrap()]);
            let in_sets = in_sets.map(|path| file(path).path);
            for path in in_sets.chain(group.files.iter().map(|file| file.path.clone())) {
                let root = roots.iter().find(|root| path.starts_with(&format!("{root}/")));
                let verdict = selector.select(profile, &path, root.copied(), Some(path.len() as u64));
                name(path.to_string(), verdict.class);
            }
            for root in completed.directories.iter().map(|d| &*d.path) {
                if !filled.contains(root) && !group.incomplete {
                    let verdict = selector.select(profile, root, Some(root), None);
                    name(root.to_owned(), verdict.class);
                }
            }
        }
    }
    classes
}

#[test]
fn no_order_of_events_changes_what_is_wanted() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let cases = number("OUTHAUL_HOSTILE_CASES").unwrap_or(40) * 10;
    let first = number("OUTHAUL_HOSTILE_SEED").unwrap_or_else(|| rand::rng().random_range(0..1 << 32));
    for seed in first..first.saturating_add(cases) {
        let chance = &mut Chance::new(seed);
        let policy = policy(chance);
        // Files of trees t0 to t2, in any of a few sets, and besides; a tree may have none.
        let mut sets: Vec<Vec<String>> = vec![Vec::new(); chance.between(1, 5) as usize];
        for n in 0..chance.below(12) {
            let tree = chance.below(4);
            let name = match tree {
                3 => format!("plain{n}"),
                _ => format!("t{tree}.d/{}{n}", chance.pick(&["", "sub/", "a/b/"])),
            };
            let set = chance.below(sets.len() as u64) as usize;
            sets[set].push(name.clone());
            if chance.below(4) == 0 {
                let set = chance.below(sets.len() as u64) as usize;
                sets[set].push(name);
            }
        }
        let mut completions = Vec::new();
        for n in 0..chance.between(1, 6) {
            let is_aspect = chance.below(2) == 0;
            let mut has: Vec<String> = Vec::new();
            for id in 0..sets.len() {
                if chance.below(2) == 0 {
                    has.push(id.to_string());
                }
            }
            let mut group = group(
                &format!("g{}", chance.below(2)),
                &has.iter().map(String::as_str).collect::<Vec<_>>(),
            );
            group.incomplete = chance.below(5) == 0;
            let tree = format!("t{}.d", chance.below(3));
            // A tree of which a set has nothing may be reported as empty before an event of its own has more.
            if chance.below(3) == 0 && sets.iter().flatten().any(|f| f.starts_with(&tree)) {
                group.files = vec![file(&format!("{tree}/inline{}", chance.below(2)))];
            }
            // Who names a tree refers to the sets that have its files.
            let roots: Vec<String> = (0..3)
                .filter(|_| !is_aspect)
                .map(|tree| format!("t{tree}.d"))
                .filter(|_| chance.below(2) == 0)
                .collect();
            for root in &roots {
                for (id, files) in sets.iter().enumerate() {
                    let id = id.to_string();
                    if files.iter().any(|f| f.starts_with(root)) && !group.sets.contains(&id) {
                        group.sets.push(id);
                    }
                }
            }
            let aspect = if is_aspect { ASPECT } else { "" };
            let roots: Vec<&str> = roots.iter().map(String::as_str).collect();
            let label = format!("//p:{}", n % 3);
            completions.push(complete(&label, aspect, group, &roots));
        }
        let expected = expected(&policy, &sets, &completions);
        let mut events: Vec<Event> = completions.into_iter().map(Event::Completed).collect();
        for (id, files) in sets.iter().enumerate() {
            let files: Vec<&str> = files.iter().map(String::as_str).collect();
            events.push(set(&id.to_string(), &files, &[]));
        }
        for _ in 0..6 {
            for at in (1..events.len()).rev() {
                let other = chance.below(at as u64 + 1) as usize;
                events.swap(at, other);
            }
            let outputs = collect(play_with(&policy, events.clone()));
            let classes: BTreeMap<String, Class> = outputs
                .into_iter()
                .map(|(path, (class, _))| (path, class))
                .collect();
            assert_eq!(
                classes, expected,
                "OUTHAUL_HOSTILE_SEED={seed} {policy:?} {events:#?}"
            );
        }
    }
}
