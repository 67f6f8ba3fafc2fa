//! Walks: what is found and made where, and which links lead there.

use std::os::unix::fs::symlink;

use super::{
    walk::{find_dir, follow, make_dir},
    *,
};
use crate::exec_path::BUILD_TREE;

fn root() -> (tempfile::TempDir, OutputRoot) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("execroot/_main");
    fs::create_dir_all(path.join("bazel-out")).unwrap();
    let root = OutputRoot::open(&path, false).unwrap();
    (dir, root)
}

fn escapes<T: std::fmt::Debug>(result: Result<T, PlaceError>) -> bool {
    matches!(result.unwrap_err().kind, PlaceErrorKind::Escapes { .. })
}

/// Every promise of the walk holds with and without `openat2`.
fn both(test: impl Fn(&Path, &OutputRoot)) {
    for with_openat2 in [true, false] {
        let (_dir, root) = root();
        if !with_openat2 {
            root.forget_openat2();
        }
        test(root.path(), &root);
    }
}

/// In the root's `bazel-out`.
fn out(path: &Path, name: &str) -> PathBuf {
    path.join(BUILD_TREE).join(name)
}

#[test]
fn directories_are_found_or_missing() {
    both(|path, root| {
        fs::create_dir_all(out(path, "a/b")).unwrap();
        assert!(find_dir(root, "bazel-out/a/b").unwrap().is_some());
        assert!(find_dir(root, "bazel-out").unwrap().is_some());
        assert!(find_dir(root, "bazel-out/a/c").unwrap().is_none());
        fs::write(out(path, "a/file"), "").unwrap();
        let error = find_dir(root, "bazel-out/a/file/x").unwrap_err();
        assert!(matches!(error.kind, PlaceErrorKind::Conflict(_)), "{error}");
    });
}

#[test]
fn links_inside_the_root_are_followed_absolute_ones_too() {
    both(|path, root| {
        fs::create_dir_all(out(path, "real/deep")).unwrap();
        fs::create_dir(out(path, "links")).unwrap();
        symlink(out(path, "real"), out(path, "links/absolute")).unwrap();
        symlink("../real", out(path, "links/relative")).unwrap();
        symlink("../../bazel-out/real", out(path, "links/around")).unwrap();
        symlink("links/../links/relative/deep/..", out(path, "twisted")).unwrap();
        let real = find_dir(root, "bazel-out/real/deep").unwrap().unwrap();
        assert!(real.through.is_empty());
        for (way, links) in [
            ("links/absolute", 1),
            ("links/relative", 1),
            ("links/around", 1),
            ("twisted", 2),
        ] {
            let found = find_dir(root, &format!("bazel-out/{way}/deep")).unwrap().unwrap();
            assert_eq!(found.inode, real.inode, "{way}");
            assert_eq!(found.path, Path::new("bazel-out/real/deep"));
            assert_eq!(found.through.len(), links, "{:?}", found.through);
            assert!(found.through.contains(&Path::new(BUILD_TREE).join(way)));
        }
        // As a build in another mount namespace spells it, and where that leads out.
        let there = Path::new("/from/ob/execroot/_main");
        symlink(there.join("bazel-out/real"), out(path, "links/mapped")).unwrap();
        symlink(there.join("../outside"), out(path, "links/out")).unwrap();
        symlink(there.join("src"), out(path, "links/source")).unwrap();
        assert!(find_dir(root, "bazel-out/links/mapped/deep").is_err());
        root.spell(vec![there.to_owned()]);
        let found = find_dir(root, "bazel-out/links/mapped/deep").unwrap().unwrap();
        assert_eq!(found.inode, real.inode);
        for out in ["out", "source"] {
            let error = find_dir(root, &format!("bazel-out/links/{out}/deep")).unwrap_err();
            assert!(matches!(error.kind, PlaceErrorKind::Escapes { .. }), "{error}");
        }
        symlink("..", out(path, "links/back")).unwrap();
        let back = find_dir(root, "bazel-out/links/back").unwrap().unwrap();
        assert_eq!(back.through.len(), 1, "also where a directory has been before");
    });
}

#[test]
fn links_out_of_the_build_tree_are_refused() {
    both(|path, root| {
        let outside = path.parent().unwrap().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::create_dir(path.join("sources")).unwrap();
        symlink(&outside, path.join("external")).unwrap();
        symlink(path.join(BUILD_TREE), path.join("again")).unwrap();
        for (link, target) in [
            ("absolute", outside.clone()),
            ("relative", "../../outside".into()),
            ("dotted", out(path, "../../outside")),
            ("circle", "circle".into()),
            // All of these are in the exec root.
            ("root", path.to_owned()),
            ("up", "..".into()),
            ("down", "../sources".into()),
            ("external", path.join("external")),
            ("chain", "down".into()),
            ("tree", path.join("again")),
            ("fresh", "../missing".into()),
        ] {
            symlink(target, out(path, link)).unwrap();
        }
        let epoch = Epoch::new();
        let permit = epoch.permit(0).unwrap();
        for link in fs::read_dir(path.join(BUILD_TREE)).unwrap() {
            let link = link.unwrap().file_name();
            for below in ["", "/x", "/sources/x"] {
                let way = format!("bazel-out/{}{below}", link.to_str().unwrap());
                assert!(escapes(make_dir(root, &way, &permit)), "{way}");
                assert!(escapes(find_dir(root, &way)), "{way}");
                let way = format!("{way}/file");
                assert!(escapes(follow(root, &way)), "{way}");
            }
        }
        for way in ["", "sources", "sources/x", "external/x", "again/x", "missing"] {
            assert!(escapes(find_dir(root, way)), "{way:?}");
            assert!(escapes(make_dir(root, way, &permit)), "{way:?}");
        }
        for untouched in [&outside, &path.join("sources")] {
            assert_eq!(fs::read_dir(untouched).unwrap().count(), 0);
        }
        assert!(!path.join("missing").exists());
    });
}

#[test]
fn a_build_tree_that_is_a_link_is_not_entered() {
    both(|path, root| {
        fs::remove_dir(path.join(BUILD_TREE)).unwrap();
        fs::create_dir(path.join("elsewhere")).unwrap();
        symlink("elsewhere", path.join(BUILD_TREE)).unwrap();
        root.begin_build(true).unwrap();
        let epoch = Epoch::new();
        let permit = epoch.permit(0).unwrap();
        for way in ["bazel-out", "bazel-out/x"] {
            assert!(escapes(find_dir(root, way)), "{way}");
            assert!(escapes(make_dir(root, way, &permit)), "{way}");
        }
        assert_eq!(fs::read_dir(path.join("elsewhere")).unwrap().count(), 0);
    });
}

#[test]
fn missing_directories_are_made_where_links_lead() {
    both(|path, root| {
        symlink(out(path, "real/there"), out(path, "link")).unwrap();
        fs::write(out(path, "file"), "in the way").unwrap();
        let epoch = Epoch::new();
        let permit = epoch.permit(0).unwrap();
        assert!(find_dir(root, "bazel-out/link/x").unwrap().is_none());
        make_dir(root, "bazel-out/link/x", &permit).unwrap();
        assert!(out(path, "real/there/x").is_dir());
        make_dir(root, "bazel-out/file/x", &permit).unwrap();
        assert!(out(path, "file/x").is_dir());
    });
}

#[test]
fn in_a_directory_of_the_users_own_links_are_replaced_or_refused() {
    for with_openat2 in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let root = OutputRoot::open(&dir.path().join("root"), true).unwrap();
        if !with_openat2 {
            root.forget_openat2();
        }
        let path = root.path();
        fs::create_dir_all(path.join("a/real")).unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let epoch = Epoch::new();
        let permit = epoch.permit(0).unwrap();
        for target in [Path::new("real"), Path::new("../a/real"), &path.join("a")] {
            let link = path.join("a/link");
            symlink(target, &link).unwrap();
            assert!(find_dir(&root, "a/link").unwrap().is_none());
            assert!(escapes(follow(&root, "a/link")));
            make_dir(&root, "a/link/x", &permit).unwrap();
            assert!(!link.is_symlink() && link.join("x").is_dir());
            assert_eq!(fs::read_dir(path.join("a/real")).unwrap().count(), 0);
            fs::remove_dir_all(link).unwrap();
        }
        for target in [
            outside.as_path(),
            Path::new("../../outside"),
            &path.join("../outside"),
        ] {
            let link = path.join("a/out");
            symlink(target, &link).unwrap();
            assert!(escapes(find_dir(&root, "a/out/x")));
            assert!(escapes(make_dir(&root, "a/out/x", &permit)));
            fs::remove_file(link).unwrap();
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }
}

#[test]
fn a_link_in_a_files_place_is_followed_to_the_file_that_it_names() {
    both(|path, root| {
        fs::create_dir(out(path, "d")).unwrap();
        symlink(out(path, "d/second"), out(path, "first")).unwrap();
        symlink("../third", out(path, "d/second")).unwrap();
        let spot = follow(root, "bazel-out/first").unwrap().unwrap();
        assert_eq!(spot.path(), Path::new("bazel-out/third"));
        let links = ["bazel-out/first", "bazel-out/d/second"].map(PathBuf::from);
        assert_eq!(*spot.dir.through, links);
        symlink("nowhere/x", out(path, "dangling")).unwrap();
        assert!(follow(root, "bazel-out/dangling").unwrap().is_none());
        symlink("d/..", out(path, "updir")).unwrap();
        assert!(follow(root, "bazel-out/updir").is_err());
        for (n, target) in ["/etc/passwd", "../BUILD", ".."].into_iter().enumerate() {
            let link = format!("out{n}");
            symlink(target, out(path, &link)).unwrap();
            assert!(follow(root, &format!("bazel-out/{link}")).is_err(), "{target}");
        }
    });
}
