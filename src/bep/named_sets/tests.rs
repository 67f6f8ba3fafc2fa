use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::bep::event::Content;

fn set(id: &str, children: &[&str]) -> NamedSet {
    NamedSet {
        id: id.to_owned(),
        files: vec![File {
            path: format!("bazel-out/{id}").into(),
            prefix_len: 9,
            content: Content::Unknown,
            uri: None,
        }],
        children: children.iter().map(|&c| c.to_owned()).collect(),
        authority: None,
    }
}

fn ids(sets: &NamedSets, roots: &[&str]) -> Vec<String> {
    let expansion = sets.expand(roots.iter().copied(), |_| false);
    expansion.map(|(index, _)| sets.id(index).to_owned()).collect()
}

#[test]
fn a_shared_set_is_visited_once_parents_first_without_copying_files() {
    let mut sets = NamedSets::new();
    for (id, children) in [
        ("0", &[][..]),
        ("1", &["0"]),
        ("2", &["0", "0"]),
        ("3", &["1", "2"]),
    ] {
        assert_eq!(sets.insert(set(id, children)), []);
    }
    assert_eq!(ids(&sets, &["3", "1"]), ["3", "1", "0", "2"]);
    let (_, files) = sets.expand(["0"], |_| false).next().unwrap();
    assert!(Arc::ptr_eq(files, sets.files("0").unwrap()));
}

#[test]
fn a_set_that_comes_again_is_counted_and_the_first_one_stays() {
    let mut sets = NamedSets::new();
    sets.insert(set("0", &[]));
    sets.insert(NamedSet {
        id: "0".to_owned(),
        files: vec![],
        children: vec!["9".to_owned()],
        authority: None,
    });
    assert_eq!((sets.len(), sets.repeated), (1, 1));
    assert_eq!(sets.files("0").unwrap().len(), 1);
    assert!(sets.is_complete(["0"]));
}

#[test]
fn a_target_is_released_by_the_last_set_below_it() {
    let mut sets = NamedSets::new();
    sets.insert(set("top", &["left", "right", "left"]));
    let both = sets.park(["top", "other"]).unwrap();
    let top = sets.park(["top", "top"]).unwrap();
    assert_eq!(sets.insert(set("left", &["leaf"])), []);
    assert_eq!(sets.insert(set("leaf", &[])), []);
    assert_eq!(sets.insert(set("right", &["leaf"])), [top]);
    assert_eq!(sets.insert(set("other", &[])), [both]);
    assert_eq!(sets.park(["top", "other"]), None);
    assert_eq!((sets.parked(), sets.finish()), (0, vec![]));
}

#[test]
fn the_end_releases_the_rest_and_names_what_is_missing() {
    let mut sets = NamedSets::new();
    sets.insert(set("a", &["x", "b"]));
    sets.insert(set("b", &["y", "c"]));
    sets.insert(set("c", &[]));
    let a = sets.park(["a"]).unwrap();
    let z = sets.park(["z", "c"]).unwrap();
    let mut released = sets.finish();
    released[0].missing.sort();
    assert_eq!(
        released,
        [
            Released {
                ticket: a,
                missing: vec!["x".to_owned(), "y".to_owned()]
            },
            Released {
                ticket: z,
                missing: vec!["z".to_owned()]
            },
        ]
    );
    let mut expansion = sets.expand(["a", "unheard"], |_| false);
    assert_eq!(expansion.by_ref().count(), 3);
    assert_eq!(expansion.missing(), ["unheard", "x", "y"]);
    assert_eq!(sets.park(["a"]), None, "nobody waits after the end");
}

#[test]
fn a_cycle_waits_for_the_end_and_ends() {
    let mut sets = NamedSets::new();
    sets.insert(set("self", &["self"]));
    sets.insert(set("a", &["b"]));
    let ticket = sets.park(["a", "self"]).unwrap();
    assert_eq!(sets.insert(set("b", &["a"])), []);
    assert_eq!(ids(&sets, &["a"]), ["a", "b"]);
    assert_eq!(
        sets.finish(),
        [Released {
            ticket,
            missing: vec![]
        }]
    );
}

#[test]
fn nothing_is_lost_after_a_set_that_was_expanded_too_early() {
    let mut sets = NamedSets::new();
    let mut done = SetBits::default();
    sets.insert(set("a", &["b"]));
    assert_eq!(sets.expand(["a"], |i| done.test_and_set(i)).count(), 1);
    sets.insert(set("b", &[]));
    assert_eq!(sets.expand(["a"], |i| done.test_and_set(i)).count(), 2);
    assert_eq!(sets.expand(["a"], |i| done.test_and_set(i)).count(), 0);
}

#[test]
fn a_very_long_chain_in_the_worst_order_is_expanded_and_released() {
    const SETS: usize = 200_000;
    let mut sets = NamedSets::new();
    let link = |n: usize, children: Vec<String>| NamedSet {
        id: n.to_string(),
        files: vec![],
        children,
        authority: None,
    };
    let mut ticket = None;
    for n in (1..SETS).rev() {
        assert_eq!(sets.insert(link(n, vec![(n - 1).to_string()])), []);
        ticket = ticket.or_else(|| sets.park([n.to_string().as_str()]));
    }
    assert_eq!(sets.insert(link(0, vec![])), [ticket.unwrap()]);
    let top = (SETS - 1).to_string();
    let mut done = SetBits::default();
    assert_eq!(
        sets.expand([top.as_str()], |i| done.test_and_set(i)).count(),
        SETS
    );
    assert_eq!(sets.expand([top.as_str()], |i| done.test_and_set(i)).count(), 0);
}

#[test]
fn naming_the_missing_is_bounded_per_target() {
    let mut sets = NamedSets::new();
    let many: Vec<String> = (0..1000).map(|n| n.to_string()).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    sets.insert(set("top", &many));
    sets.park(["top"]).unwrap();
    assert_eq!(sets.finish()[0].missing.len(), MISSING_NAMED);
}

proptest! {
    /// Against the plain definition: reachability over all edges.
    #[test]
    fn tickets_and_expansions_agree_with_reachability(
        edges in proptest::collection::vec((0..12_usize, 0..12_usize), 0..30),
        order in Just((0..12_usize).collect::<Vec<_>>()).prop_shuffle(),
        absent in 0..4_usize,
    ) {
        // Edges lead from greater to smaller numbers: no cycles.
        let children = |n: usize| -> Vec<String> {
            edges.iter().filter(|(from, to)| *from == n && to < from).map(|(_, to)| to.to_string()).collect()
        };
        let mut sets = NamedSets::new();
        let tickets: Vec<Ticket> = (0..12).map(|n: usize| sets.park([n.to_string().as_str()]).unwrap()).collect();
        let arrived = &order[absent..];
        let mut released = BTreeSet::new();
        for &n in arrived {
            let ids = children(n);
            let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
            for ticket in sets.insert(set(&n.to_string(), &ids)) {
                prop_assert!(released.insert(ticket), "released twice");
            }
        }
        for (n, ticket) in tickets.iter().enumerate() {
            let mut reached = BTreeSet::new();
            let mut missing = BTreeSet::new();
            let mut todo = vec![n];
            while let Some(m) = todo.pop() {
                if arrived.contains(&m) {
                    if reached.insert(m.to_string()) {
                        todo.extend(children(m).iter().map(|c| c.parse::<usize>().unwrap()));
                    }
                } else {
                    missing.insert(m.to_string());
                }
            }
            let root = n.to_string();
            let mut expansion = sets.expand([root.as_str()], |_| false);
            let visited: Vec<String> = expansion.by_ref().map(|(i, _)| sets.id(i).to_owned()).collect();
            prop_assert_eq!(visited.len(), reached.len());
            prop_assert_eq!(visited.into_iter().collect::<BTreeSet<_>>(), reached);
            prop_assert_eq!(expansion.missing().iter().cloned().collect::<BTreeSet<_>>(), missing.clone());
            prop_assert_eq!(released.contains(ticket), missing.is_empty());
            prop_assert_eq!(sets.is_complete([root.as_str()]), missing.is_empty());
        }
        for Released { ticket, missing } in sets.finish() {
            prop_assert!(!missing.is_empty());
            prop_assert!(released.insert(ticket));
        }
        prop_assert_eq!(released.len(), 12);
    }
}
