//! Names that lead out, trees that grow without end, and results as servers write them.

use std::sync::Arc;

use proptest::prelude::*;
use prost::Message as _;
use reapi::{Directory, DirectoryNode, FileNode, OutputDirectory, OutputFile, OutputSymlink, SymlinkNode};

use super::*;
use crate::remote::client::to_wire;

const SHA256: DigestFunction = DigestFunction::Sha256;

fn wire(bytes: &[u8]) -> Option<reapi::Digest> {
    Some(to_wire(&Digest::of(SHA256, bytes)))
}

fn file(name: &str) -> FileNode {
    FileNode {
        name: name.into(),
        digest: wire(name.as_bytes()),
        ..FileNode::default()
    }
}

fn tree(root: &Directory, children: &[Directory]) -> DirectoryTree {
    let tree = reapi::Tree {
        root: Some(root.clone()),
        children: children.to_vec(),
    };
    DirectoryTree::decode(SHA256, tree.encode_to_vec().into()).unwrap()
}

fn result(result: &ActionResult) -> Result<Vec<Expanded>, ExpandError> {
    expand_result(
        SHA256,
        result,
        &HashMap::<TreeRef, Arc<DirectoryTree>>::new(),
        100,
    )
}

#[test]
fn empty_directories_are_kept_and_full_ones_implied() {
    let root = Directory {
        files: vec![file("b")],
        symlinks: vec![SymlinkNode {
            name: "a".into(),
            target: "../b".into(),
            ..SymlinkNode::default()
        }],
        directories: vec![DirectoryNode {
            name: "empty".into(),
            digest: wire(b""),
        }],
        ..Directory::default()
    };
    let base = ExecPath::new("out/t").unwrap();
    let entries = expand_tree(Some(base.clone()), &tree(&root, &[]), 100).unwrap();
    let shown: Vec<_> = entries
        .into_iter()
        .map(|e| (e.path.as_str().to_owned(), e.content))
        .collect();
    assert_eq!(
        shown,
        [
            ("out/t/a".to_owned(), OutputContent::Symlink("../b".into())),
            (
                "out/t/b".to_owned(),
                OutputContent::Blob(Digest::of(SHA256, b"b"))
            ),
            ("out/t/empty".to_owned(), OutputContent::Directory),
        ]
    );
    let empty = expand_tree(Some(base), &tree(&Directory::default(), &[]), 100).unwrap();
    assert_eq!(empty.len(), 1);
    assert_eq!(empty[0].content, OutputContent::Directory);
}

#[test]
fn invalid_names_are_refused_and_reported() {
    for name in ["..", ".", "", "a/b", "/etc", "a\0", &"n".repeat(256)] {
        let root = Directory {
            files: vec![file(name)],
            ..Directory::default()
        };
        let base = ExecPath::new("out/t").unwrap();
        let error = expand_tree(Some(base), &tree(&root, &[]), 100).expect_err(name);
        assert_eq!(
            error,
            ExpandError::Name {
                directory: "out/t".into(),
                name: name.into()
            }
        );
        assert!(error.to_string().contains(&format!("{name:?}")), "{error}");
    }
}

#[test]
fn paths_of_a_result_that_lead_out_are_refused() {
    for path in ["../x", "/etc/passwd", "a/../../b", ""] {
        let refused = result(&ActionResult {
            output_files: vec![OutputFile {
                path: path.into(),
                digest: wire(b"x"),
                ..OutputFile::default()
            }],
            ..ActionResult::default()
        });
        assert!(
            matches!(refused, Err(ExpandError::Path(e)) if e.path == path),
            "{path}"
        );
    }
}

#[test]
#[allow(deprecated)]
fn a_link_in_the_old_and_the_new_field_is_one() {
    let link = |target: &str| OutputSymlink {
        path: "out/l".into(),
        target: target.into(),
        ..OutputSymlink::default()
    };
    let both = ActionResult {
        output_symlinks: vec![link("x")],
        output_file_symlinks: vec![link("x")],
        ..ActionResult::default()
    };
    assert_eq!(result(&both).unwrap().len(), 1);
    let torn = ActionResult {
        output_directory_symlinks: vec![link("y")],
        ..both
    };
    assert_eq!(result(&torn), Err(ExpandError::Twice("out/l".into())));
    let untargeted = ActionResult {
        output_symlinks: vec![link("")],
        ..ActionResult::default()
    };
    assert_eq!(result(&untargeted), Err(ExpandError::Target("out/l".into())));
}

#[test]
fn a_directory_that_names_something_twice_is_refused() {
    let root = Directory {
        files: vec![file("a")],
        directories: vec![DirectoryNode {
            name: "a".into(),
            digest: wire(b""),
        }],
        ..Directory::default()
    };
    assert_eq!(
        expand_tree(None, &tree(&root, &[]), 100),
        Err(ExpandError::Twice("a".into()))
    );
}

#[test]
fn invalid_digests_are_reported_by_path() {
    let bad = Some(reapi::Digest {
        hash: "12".into(),
        size_bytes: -1,
    });
    let root = Directory {
        files: vec![FileNode {
            name: "f".into(),
            digest: bad.clone(),
            ..FileNode::default()
        }],
        ..Directory::default()
    };
    assert_eq!(
        expand_tree(None, &tree(&root, &[]), 100),
        Err(ExpandError::Digest("f".into()))
    );
    let without = ActionResult {
        output_directories: vec![OutputDirectory {
            path: "t".into(),
            tree_digest: bad,
            ..OutputDirectory::default()
        }],
        ..ActionResult::default()
    };
    assert_eq!(trees_of(SHA256, &without), Err(ExpandError::Digest("t".into())));
}

#[test]
fn a_small_tree_that_unfolds_without_end_stops_at_the_limit() {
    // Twenty levels, each naming the one below ten times.
    let mut children = vec![Directory {
        files: vec![file("f")],
        ..Directory::default()
    }];
    for _ in 0..20 {
        let below = wire(&children.last().unwrap().encode_to_vec());
        children.push(Directory {
            directories: (0..10)
                .map(|i| DirectoryNode {
                    name: i.to_string(),
                    digest: below.clone(),
                })
                .collect(),
            ..Directory::default()
        });
    }
    let root = children.pop().unwrap();
    assert_eq!(
        expand_tree(None, &tree(&root, &children), 10_000),
        Err(ExpandError::TooMany(10_000))
    );
}

#[test]
fn what_was_not_fetched_is_reported_by_path_and_digest() {
    let root = Directory {
        directories: vec![DirectoryNode {
            name: "d".into(),
            digest: wire(b"gone"),
        }],
        ..Directory::default()
    };
    assert_eq!(
        expand_tree(None, &tree(&root, &[]), 100),
        Err(ExpandError::Missing {
            path: "d".into(),
            digest: Digest::of(SHA256, b"gone")
        })
    );
}

proptest! {
    /// Whatever names a tree has, what comes out lies below the base, and no path comes twice.
    #[test]
    fn nothing_escapes(names in proptest::collection::vec("[a./\0]{0,4}", 0..6)) {
        let root = Directory {
            files: names.iter().map(|n| file(n)).collect(),
            ..Directory::default()
        };
        let base = ExecPath::new("base").unwrap();
        if let Ok(entries) = expand_tree(Some(base), &tree(&root, &[]), 100) {
            prop_assert!(entries.iter().all(|e| e.path.starts_with("base")));
            prop_assert!(entries.windows(2).all(|w| w[0].path < w[1].path));
        }
    }
}
