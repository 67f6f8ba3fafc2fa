//! As a user who is not root: only then does a read-only directory refuse.

use super::*;
use crate::unprivileged;

#[test]
fn without_privileges_read_only_trees_are_filled_too() {
    let name = "without_privileges_read_only_trees_are_filled_too";
    unprivileged::run(
        &format!("materialize::place::tests::unprivileged::{name}"),
        fill_a_read_only_tree,
    );
}

fn fill_a_read_only_tree(dir: &Path) {
    let mut f = Fixture::beneath(dir);
    let tree = f.path("bazel-out/tree");
    fs::create_dir(&tree).unwrap();
    set_mode(&tree, 0o555);
    assert!(
        fs::write(tree.join("direct"), "").is_err(),
        "the test is about nothing"
    );
    f.place("bazel-out/tree/file", "one").unwrap();
    f.place("bazel-out/tree/file", "two").unwrap();
    f.place("bazel-out/tree/sub/deep/file", "x").unwrap();
    f.placer
        .place_symlink(&exec("bazel-out/tree/link"), "file", &f.epoch, 1)
        .unwrap();
    let mut large = f
        .placer
        .begin_large(&exec("bazel-out/tree/large"), &digest("big"))
        .unwrap();
    large.write(b"big").unwrap();
    large.finish(&f.epoch, 1).unwrap();
    assert_eq!(f.read("bazel-out/tree/file"), "two");
    assert_eq!(mode(&tree), 0o555);

    let foreign = OutputRoot::open(Path::new("/"), true).unwrap();
    let mut placer = Placer::new(Arc::new(foreign), PlaceOptions::default());
    let file = (exec("not-ours/file"), digest("x"), "x");
    let error = placer
        .place_many(&[item(&file)], &f.epoch, 1)
        .remove(0)
        .unwrap_err();
    assert_eq!(error.kind, PlaceErrorKind::ReadOnly);
    set_mode(&tree, 0o755);
}
