//! Builds whose outputs are links.

use super::*;

#[tokio::test]
async fn links_of_builds_lead_no_output_to_sources_or_to_our_own_files() {
    let mut f = Fixture::new(false).await;
    settlement(&f).await;
    let base = f.dir.path().to_owned();
    let exec_root = base.join("execroot/_main");
    fs::create_dir_all(exec_root.join("sources")).unwrap();
    fs::create_dir_all(exec_root.join("bazel-out")).unwrap();
    let precious = ["execroot/_main/BUILD", "execroot/_main/sources/a.c"];
    for path in precious {
        fs::write(base.join(path), "precious").unwrap();
    }
    let before = elsewhere(&base);
    let newest = ".outhaul-newest._main";
    let evil = |path: &str| at(path, Content::Inline("evil".into()));
    let link = |path: &str, target: &str| at(path, Content::Symlink(target.to_owned()));
    let exec_root = exec_root.display().to_string();
    for (n, (target, names)) in [
        ("..", ["BUILD", "sources/a.c", "new"]),
        (&*exec_root, ["BUILD", "sources/a.c", "new"]),
        ("../sources", ["a.c", "new", "new/deep"]),
        ("m", ["BUILD", "sources/a.c", "new"]),
        ("../../..", [newest, ".outhaul-tmp/x", "state/x"]),
    ]
    .into_iter()
    .enumerate()
    {
        let m = if target == "m" { ".." } else { "nowhere" };
        let mut files = vec![link("bazel-out/l", target), link("bazel-out/m", m)];
        let behind = names.map(|name| evil(&format!("bazel-out/l/{name}")));
        // In the same build, and in one after it.
        files.extend(behind.clone());
        let settled = build(&mut f, &format!("same {n}"), files).await;
        assert_eq!(settled.failed, 3, "{target}: {settled:?}");
        let settled = build(&mut f, &format!("next {n}"), behind.to_vec()).await;
        assert_eq!(settled.failed, 3, "{target}: {settled:?}");
        // With a link in the place of the file itself.
        let name = format!("bazel-out/own{n}");
        let settled = build(
            &mut f,
            &format!("link {n}"),
            vec![link(&name, &format!("{target}/{}", names[0]))],
        )
        .await;
        assert_eq!(settled.failed, 0, "{settled:?}");
        let settled = build(&mut f, &format!("file {n}"), vec![evil(&name)]).await;
        assert_eq!(settled.failed, 0, "{settled:?}");
        assert!(!Path::new(&exec_root).join(&name).is_symlink());
    }
    for path in precious {
        assert_eq!(fs::read_to_string(base.join(path)).unwrap(), "precious");
    }
    assert_eq!(elsewhere(&base), before);
    // No event made a later build an old one.
    let settled = build(&mut f, "honest", vec![evil("bazel-out/honest")]).await;
    assert_eq!(settled.failed, 0, "{settled:?}");
}

#[tokio::test]
async fn a_file_in_the_place_of_an_earlier_builds_link_leaves_alone_what_that_led_to() {
    for into_directory in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let (destination, top) = if into_directory {
            let (path, flatten) = (out.clone(), false);
            (Destination::Directory { path, flatten }, out)
        } else {
            (Destination::ExecRoot, dir.path().join("execroot/_main"))
        };
        let mut f = Fixture::within(dir, "execroot/_main", "/w", destination, false).await;
        settlement(&f).await;
        let [one, two] = ["one", "two"].map(|bytes| Content::Blob(f.cache.store().put(bytes)));
        let bytes = |name: &str| fs::read_to_string(top.join("bazel-out").join(name)).unwrap();
        let real = |content: &Content| at("bazel-out/real", content.clone());
        let alias = |content: &Content| at("bazel-out/alias", content.clone());
        for (n, swapped) in [false, true, false, true].into_iter().enumerate() {
            let link = Content::Symlink("real".to_owned());
            let settled = build(&mut f, &format!("link {n}"), vec![alias(&link), real(&one)]).await;
            assert_eq!((settled.failed, &*bytes("alias")), (0, "one"));
            for round in 0..2 {
                let mut files = vec![alias(&one), real(&two)];
                if swapped {
                    files.reverse();
                }
                let settled = build(&mut f, &format!("files {n} {round}"), files).await;
                assert_eq!(settled.failed, 0, "{settled:?}");
                assert_eq!((&*bytes("alias"), &*bytes("real")), ("one", "two"));
            }
        }
        // A directory where a link was.
        let link = at("bazel-out/dir", Content::Symlink("tree".to_owned()));
        let tree = |content: &Content| at("bazel-out/tree/file", content.clone());
        build(&mut f, "directory link", vec![link, tree(&one)]).await;
        let files = vec![at("bazel-out/dir/file", two.clone()), tree(&one)];
        let settled = build(&mut f, "directory", files).await;
        assert_eq!(bytes("tree/file"), "one");
        // In an exec root the link may be the build tool's own, which others go through as well.
        if into_directory {
            assert_eq!((settled.failed, &*bytes("dir/file")), (0, "two"), "{settled:?}");
        } else {
            assert_eq!(settled.failed, 1, "{settled:?}");
            assert!(settled.messages[0].contains("symlink"), "{settled:?}");
        }
    }
}
