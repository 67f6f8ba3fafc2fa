//! Where outputs may be, no matter who made the links on the way.

use std::os::unix::fs::symlink;

use super::*;

/// Each with the path of an output, and what it would be put over.
const WAYS: [(&str, &str); 5] = [
    ("bazel-out/l/file", "file"),
    ("bazel-out/l/sources/file", "sources/file"),
    ("bazel-out/l/../file", "file"),
    ("bazel-out/l/.outhaul-newest._main", ".outhaul-newest._main"),
    ("bazel-out/l/.outhaul-tmp/x", ".outhaul-tmp/x"),
];

#[test]
fn no_link_leads_an_output_out_of_the_build_tree() {
    everywhere(|mut f| {
        fs::create_dir(f.path("sources")).unwrap();
        for precious in ["file", "sources/file"] {
            fs::write(f.path(precious), "precious").unwrap();
        }
        let (root, epoch) = (f.root.path().to_owned(), Epoch::new());
        // By a link of the build's own, relative, absolute, in a chain, and to the output base.
        for target in [
            PathBuf::from(".."),
            root.clone(),
            "m".into(),
            "../../..".into(),
            root.join("bazel-out/.."),
        ] {
            f.placer
                .place_symlink(&exec("bazel-out/m"), "..", &epoch, 1)
                .unwrap();
            let target = target.to_str().unwrap();
            f.placer
                .place_symlink(&exec("bazel-out/l"), target, &epoch, 1)
                .unwrap();
            for (path, _) in WAYS {
                let Ok(path) = ExecPath::new(path) else { continue };
                f.place(path.as_str(), "evil").unwrap_err();
                f.placer.place_symlink(&path, "evil", &epoch, 1).unwrap_err();
                f.placer.make_directory(&path, &epoch, 1).unwrap_err();
                let mut large = f.placer.begin_large(&path, &digest("evil")).unwrap();
                large.write(b"evil").unwrap();
                large.finish(&epoch, 1).unwrap_err();
            }
        }
        for precious in ["file", "sources/file"] {
            assert_eq!(f.read(precious), "precious");
        }
        assert!(!f.base.path().join(".outhaul-newest._main").exists());
        // Nor through a link in the file's own place.
        symlink("../file", f.path("bazel-out/link")).unwrap();
        f.place("bazel-out/link", "ours").unwrap();
        assert_eq!(f.read("file"), "precious");
        assert_eq!(f.read("bazel-out/link"), "ours");
    });
}

#[test]
fn in_an_exec_root_there_are_no_outputs_but_below_bazel_out() {
    everywhere(|mut f| {
        for path in [
            "file",
            "sources/file",
            "bazel-out",
            "bazel-outer/file",
            ".outhaul-tmp/x",
        ] {
            let error = f.place(path, "x").unwrap_err();
            assert!(error.to_string().contains("in bazel-out"), "{error}");
            let content = OutputContent::Directory;
            f.placer.check(&exec(path), &content, None).unwrap_err();
        }
    });
}

/// As `--output-dir` and `stage --to`.
#[test]
fn in_a_directory_of_the_users_own_our_names_are_kept_from_outputs() {
    let dir = tempfile::tempdir().unwrap();
    let root = Arc::new(OutputRoot::open(&dir.path().join("out"), true).unwrap());
    let mut placer = Placer::new(Arc::clone(&root), PlaceOptions::default());
    let epoch = Epoch::new();
    for name in [
        ".outhaul",
        ".outhaul/staged-x.json",
        ".outhaul-tmp",
        ".outhaul-tmp/1-2/0",
        ".outhaul-tmp-1-2-3",
        ".outhaul-newest._main",
        ".OutHaul-TMP/x",
    ] {
        let file = (exec(name), digest("x"), "x");
        let error = placer
            .place_many(&[item(&file)], &epoch, 1)
            .remove(0)
            .unwrap_err();
        assert!(
            error.to_string().contains("this name is reserved for outhaul"),
            "{error}"
        );
        placer.place_symlink(&exec(name), "x", &epoch, 1).unwrap_err();
        placer.make_directory(&exec(name), &epoch, 1).unwrap_err();
        placer.begin_large(&exec(name), &digest("x")).unwrap_err();
        placer
            .check(&exec(name), &OutputContent::Directory, None)
            .unwrap_err();
    }
    // A link does not lead there either: it is replaced.
    for target in [".outhaul-tmp", ".", ".outhaul"] {
        fs::create_dir_all(root.path().join(".outhaul")).unwrap();
        let link = root.path().join("link");
        symlink(target, &link).unwrap();
        let file = (exec("link/file"), digest("x"), "x");
        placer.place_many(&[item(&file)], &epoch, 1).remove(0).unwrap();
        assert!(!link.is_symlink());
        assert_eq!(fs::read_to_string(link.join("file")).unwrap(), "x");
        assert!(!root.path().join(target).join("file").exists());
        fs::remove_dir_all(link).unwrap();
    }
    let file = (exec(".outhaulers"), digest("x"), "x");
    placer.place_many(&[item(&file)], &epoch, 1).remove(0).unwrap();
}

#[test]
fn in_a_directory_of_the_users_own_no_link_stands_for_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let root = Arc::new(OutputRoot::open(&dir.path().join("out"), true).unwrap());
    let mut placer = Placer::new(Arc::clone(&root), PlaceOptions::default());
    let epoch = Epoch::new();
    for round in 0..2 {
        let _ = fs::remove_file(root.path().join("alias"));
        placer.place_symlink(&exec("alias"), "real", &epoch, 1).unwrap();
        let files = [
            (exec("alias"), digest("one"), "one"),
            (exec("real"), digest("two"), "two"),
        ];
        for which in [round, 1 - round] {
            let content = OutputContent::Blob(files[which].1.clone());
            let check = placer.check(&files[which].0, &content, None).unwrap();
            assert!(
                matches!(check, Check::Absent | Check::Differs) || which == 1,
                "{check:?}"
            );
            placer
                .place_many(&[item(&files[which])], &epoch, 1)
                .remove(0)
                .unwrap();
        }
        for (path, _, bytes) in &files {
            assert_eq!(
                fs::read_to_string(root.path().join(path.as_path())).unwrap(),
                *bytes
            );
        }
    }
}
