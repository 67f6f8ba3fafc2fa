//! What markers of earlier stages are believed, and what of them goes.

use super::*;

/// Leaves a marker of these files, which are written too.
fn leave(dir: &Path, invocation: &str, files: &[(&str, &[u8])]) {
    leave_for(dir, invocation, &Wish::default(), files);
}

/// The same for another request; what is in `t` is a whole tree. Answers what stays though it should not.
fn leave_for(dir: &Path, invocation: &str, wish: &Wish, files: &[(&str, &[u8])]) -> Vec<String> {
    let mut marker = Marker::new(invocation, "/w", wish);
    if files.iter().any(|(name, _)| name.starts_with("t/")) {
        marker.trees.push("t".to_owned());
    }
    for (name, bytes) in files {
        std::fs::create_dir_all(dir.join(name).parent().unwrap()).unwrap();
        std::fs::write(dir.join(name), bytes).unwrap();
        marker
            .files
            .push(marker::File::new(&artifact(name, blob(bytes)), None));
    }
    write(&marker, dir)
}

/// Writes a marker whose outputs have all come to their end, and answers what stays though it should not.
fn write(marker: &Marker, dir: &Path) -> Vec<String> {
    marker
        .write(dir, &HashSet::new(), &mut Vec::new(), HashSet::new())
        .unwrap()
}

#[test]
fn what_was_staged_is_believed_as_far_as_the_files_bear_it_out() {
    let dir = tempfile::tempdir().unwrap();
    let any = Which::default();
    let problems = |which: &Which| is_staged(dir.path(), which, &[], None).unwrap().problems;
    assert!(problems(&any)[0].contains("nothing was staged"));
    leave(dir.path(), "one", &[("x", b"1"), ("y", b"2")]);
    assert_eq!(problems(&any), Vec::<String>::new());
    std::fs::write(dir.path().join("x"), "3").unwrap();
    std::fs::remove_file(dir.path().join("y")).unwrap();
    assert_eq!(problems(&any), ["x: changed since it was staged", "y: missing"]);

    // A request that stages something else at one place takes the older one's marker away, another does not.
    let wish_of = |target: &str| Wish {
        targets: texts(&[target]),
        ..Wish::default()
    };
    leave_for(dir.path(), "two", &wish_of("//two"), &[("z", b"5")]);
    leave_for(dir.path(), "three", &wish_of("//three"), &[("x", b"4")]);
    assert_eq!(problems(&any), Vec::<String>::new());
    assert_eq!(problems(&Which::of("two")), Vec::<String>::new());
    assert!(problems(&Which::of("one"))[0].contains("nothing of that request"));
    let answer = is_staged(dir.path(), &any, &[], None).unwrap();
    assert_eq!((answer.files, answer.invocations), (2, texts(&["three", "two"])));

    let other = Wish {
        flatten: true,
        ..Wish::default()
    };
    assert!(
        !is_staged(dir.path(), &any, &[], Some(&other))
            .unwrap()
            .is_staged()
    );
    assert!(
        is_staged(dir.path(), &Which::of("two"), &[], Some(&wish_of("//two")))
            .unwrap()
            .is_staged()
    );
}

#[test]
fn what_an_earlier_stage_put_there_and_this_one_does_not_name_goes() {
    let dir = tempfile::tempdir().unwrap();
    let here = |name: &str| dir.path().join(name).symlink_metadata().is_ok();
    let problems = || {
        is_staged(dir.path(), &Which::default(), &[], None)
            .unwrap()
            .problems
    };
    let other = Wish {
        targets: texts(&["//other"]),
        ..Wish::default()
    };
    leave_for(dir.path(), "o", &other, &[("t2/shared", b"s"), ("x", b"x")]);
    let files: [(&str, &[u8]); 6] = [
        ("t/a", b"a"),
        ("t/b", b"b"),
        ("t/deep/er/c", b"c"),
        ("t/changed", b"d"),
        ("t2/shared", b"s"),
        ("t2/own", b"o"),
    ];
    leave(dir.path(), "one", &files);
    std::fs::write(dir.path().join("t/mine"), "mine").unwrap();
    std::fs::write(dir.path().join("t/changed"), "e").unwrap();
    let notes = leave_for(dir.path(), "two", &Wish::default(), &[("t/a", b"a")]);
    assert_eq!(
        notes,
        ["kept t/changed from an earlier stage: it has changed since"]
    );
    for (name, stays) in [
        ("t/a", true),
        ("t/b", false),
        ("t/deep", false),
        // Changed, somebody else's, and another request's.
        ("t/changed", true),
        ("t/mine", true),
        ("t2/shared", true),
        ("t2/own", false),
    ] {
        assert_eq!(here(name), stays, "{name}");
    }
    assert_eq!(
        problems(),
        [
            "t/changed: not part of the staged tree",
            "t/mine: not part of the staged tree"
        ]
    );
    std::fs::remove_file(dir.path().join("t/changed")).unwrap();
    std::fs::remove_file(dir.path().join("t/mine")).unwrap();
    assert_eq!(problems(), [""; 0]);

    // Another request for the whole tree of a later build, too.
    leave_for(dir.path(), "three", &other, &[("t/z", b"z")]);
    assert!(here("t/z") && !here("t/a") && !here("x"));
    assert_eq!(problems(), [""; 0]);
    // Of one build, requests for different parts stay side by side.
    leave(dir.path(), "three", &[("y", b"y")]);
    assert!(here("t/z") && here("y"));
    // No way leads out, and no link is taken for the file that was staged.
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("z"), "z").unwrap();
    std::fs::remove_dir_all(dir.path().join("t")).unwrap();
    std::os::unix::fs::symlink(outside.path(), dir.path().join("t")).unwrap();
    assert!(problems()[0].starts_with("t/z: "));
    let notes = leave_for(dir.path(), "four", &other, &[("n", b"n")]);
    assert!(outside.path().join("z").exists() && here("t"), "{notes:?}");
}

#[test]
fn what_is_still_on_its_way_is_decided_when_it_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    leave(dir.path(), "one", &[("x", b"1"), ("later", b"2"), ("old", b"3")]);
    let mut marker = Marker::new("two", "/w", &Wish::default());
    marker
        .files
        .push(marker::File::new(&artifact("x", blob(b"1")), None));
    let (open, mut stale) = (HashSet::from(["later".to_owned()]), Vec::new());
    marker
        .write(dir.path(), &open, &mut stale, HashSet::new())
        .unwrap();
    assert!(dir.path().join("later").exists() && !dir.path().join("old").exists());
    // It could not be downloaded: an older build's is not taken for it.
    marker
        .write(dir.path(), &HashSet::new(), &mut stale, HashSet::new())
        .unwrap();
    assert!(dir.path().join("x").exists() && !dir.path().join("later").exists());
}

#[test]
fn what_another_stage_names_meanwhile_stays() {
    let dir = tempfile::tempdir().unwrap();
    leave(dir.path(), "one", &[("shared", b"1"), ("old", b"2")]);
    let together = Directories::default();
    let names = |list: &[&str]| Arc::new(texts(list).into_iter().collect::<HashSet<_>>());
    let (own, other, gone) = (names(&["old"]), names(&["shared"]), names(&["old"]));
    let here = together.at(dir.path());
    for names in [&own, &other, &gone] {
        together.at(dir.path()).join(names);
    }
    drop(gone);
    together.at("/elsewhere".as_ref()).join(&names(&["old"]));
    let marker = Marker::new("two", "/w", &Wish::default());
    here.without_others(&own, |others| {
        assert_eq!(others, *other);
        marker.write(dir.path(), &HashSet::new(), &mut Vec::new(), others)
    })
    .unwrap();
    assert!(dir.path().join("shared").exists() && !dir.path().join("old").exists());
}

#[test]
fn a_file_in_the_place_of_a_tree_has_its_way_made() {
    let dir = tempfile::tempdir().unwrap();
    leave(dir.path(), "one", &[("d/e/x", b"1"), ("d/y", b"2"), ("z", b"3")]);
    marker::make_way(dir.path(), &HashSet::from(["d".to_owned()]), &HashSet::new()).unwrap();
    assert!(!dir.path().join("d").exists() && dir.path().join("z").exists());
}

#[test]
fn an_empty_directory_in_the_place_of_a_file_has_its_way_made() {
    let dir = tempfile::tempdir().unwrap();
    leave(dir.path(), "one", &[("a", b"1"), ("b", b"2"), ("c", b"3")]);
    let directories = texts(&["a", "b/empty", "d"]).into_iter().collect();
    marker::make_way(dir.path(), &HashSet::new(), &directories).unwrap();
    for (name, is_there) in [("a", false), ("b", false), ("c", true)] {
        assert_eq!(dir.path().join(name).exists(), is_there, "{name}");
    }
}

#[test]
fn markers_are_read_only_where_something_is_in_the_way() {
    let dir = tempfile::tempdir().unwrap();
    // No markers can be read there.
    std::fs::write(dir.path().join(marker::DIRECTORY), "x").unwrap();
    std::fs::create_dir_all(dir.path().join("d/e")).unwrap();
    std::fs::write(dir.path().join("d/f"), "x").unwrap();
    std::os::unix::fs::symlink("d", dir.path().join("l")).unwrap();
    for (file, is_free) in [
        ("new", true),
        ("new/x/y", true),
        ("d/f", true),
        ("d/new", true),
        ("l", true),
        ("d/e", false),
        ("d/f/x", false),
        ("l/x", false),
    ] {
        let set = HashSet::from([file.to_owned()]);
        let made = marker::make_way(dir.path(), &set, &HashSet::new());
        assert_eq!(made.is_ok(), is_free, "{file}: {made:?}");
    }
    for (directory, is_free) in [("d/e", true), ("new", true), ("d/f", false), ("l", false)] {
        let set = HashSet::from([directory.to_owned()]);
        let made = marker::make_way(dir.path(), &HashSet::new(), &set);
        assert_eq!(made.is_ok(), is_free, "{directory}: {made:?}");
    }
}

#[test]
fn of_a_workspace_within_another_the_others_markers_do_not_count() {
    let dir = tempfile::tempdir().unwrap();
    for (workspace, name) in [("/w", "outer"), ("/w/inner", "inner")] {
        let mut marker = Marker::new(name, workspace, &Wish::default());
        std::fs::write(dir.path().join(name), name).unwrap();
        let artifact = artifact(name, blob(name.as_bytes()));
        marker.files.push(marker::File::new(&artifact, None));
        write(&marker, dir.path());
    }
    for (asked, expected) in [("/w/inner/sub", "inner"), ("/w/sub", "outer")] {
        let which = Which {
            workspace: asked.to_owned(),
            ..Which::default()
        };
        let answer = is_staged(dir.path(), &which, &[], None).unwrap();
        assert_eq!(
            (answer.is_staged(), answer.invocations),
            (true, texts(&[expected]))
        );
    }
}

#[test]
fn a_marker_that_cannot_be_read_or_leads_outside_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    leave(dir.path(), "one", &[("x", b"1")]);
    let (path, _) = marker::read_all(dir.path()).unwrap().remove(0);
    let text = std::fs::read_to_string(&path).unwrap();
    for (damaged, part) in [
        (text.replace("\"x\"", "\"../x\""), "\"..\""),
        (text.replace("\"version\": 1", "\"version\": 2"), "version 2"),
        (text[..text.len() / 2].to_owned(), "not a marker"),
        (text.replace("sha256/", "crc/"), "crc"),
    ] {
        assert_ne!(damaged, text);
        std::fs::write(&path, damaged).unwrap();
        let problems = is_staged(dir.path(), &Which::default(), &[], None)
            .unwrap()
            .problems;
        assert!(problems.iter().any(|p| p.contains(part)), "{problems:?}");
    }
    // A link in the place of our own directory is not followed.
    let other = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(dir.path(), other.path().join(".outhaul")).unwrap();
    assert!(marker::touch(other.path()).is_err());
    assert!(marker::read_all(other.path()).is_err());
    // Nor is one within it: neither read nor touched.
    let outside = dir.path().join("outside");
    std::fs::write(&outside, &text).unwrap();
    let before = std::fs::metadata(&outside).unwrap().modified().unwrap();
    let timestamp = dir.path().join(".outhaul/staged.timestamp");
    std::os::unix::fs::symlink(&outside, &timestamp).unwrap();
    assert!(marker::touch(dir.path()).is_err());
    assert_eq!(std::fs::metadata(&outside).unwrap().modified().unwrap(), before);
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(&outside, &path).unwrap();
    assert!(marker::read_all(dir.path()).unwrap()[0].1.is_err());
}
