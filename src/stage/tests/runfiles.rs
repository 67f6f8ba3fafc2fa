use super::*;
use crate::{
    output::Class,
    record::{InvocationRow, OutputRow, Record},
    roots::{RootRules, Roots},
    stage::{
        carried::{Carried, What},
        runfiles::{self, Added},
    },
};

const BIN: &str = "bazel-out/k8/bin";

/// A build of one program on this disk.
struct World {
    dir: tempfile::TempDir,
    record: Record,
    row: InvocationRow,
    selection: Selection,
    manifest: String,
    roots: Roots,
    carried: Vec<Carried>,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(std::env::temp_dir().canonicalize().unwrap()).unwrap();
        let (record, _) = Record::open(&dir.path().join("state")).unwrap();
        let exec_root = dir.path().join("base/execroot/_main");
        for directory in [
            "base/execroot/_main/bazel-out/k8/bin",
            "base/external/lib+",
            "w/app",
        ] {
            std::fs::create_dir_all(dir.path().join(directory)).unwrap();
        }
        let exec_root = exec_root.to_str().unwrap().to_owned();
        let workspace = dir.path().join("w").to_str().unwrap().to_owned();
        std::fs::write(dir.path().join("base/DO_NOT_BUILD_HERE"), &workspace).unwrap();
        let roots = Roots::new(RootRules::default(), record.clone());
        let (root, _) = roots.reopen(Path::new(&exec_root)).unwrap();
        let row = InvocationRow {
            invocation_id: "inv".to_owned(),
            root: Some(root),
            version: record.next_version(root),
            workspace,
            exec_root,
            ..InvocationRow::default()
        };
        record.put_invocation(&row);
        let selection = Selection {
            artifacts: vec![artifact(&format!("{BIN}/app"), blob(b"program"))],
            ..Selection::default()
        };
        let manifest = String::new();
        Self {
            dir,
            record,
            row,
            selection,
            manifest,
            roots,
            carried: Vec::new(),
        }
    }

    fn line(&mut self, key: &str, path: &str) {
        let target = self.dir.path().join(path);
        self.manifest += &format!("{key} {}\n", target.display());
    }

    /// A file below the test's directory, in the manifest.
    fn file(&mut self, key: &str, path: &str, text: &str) {
        self.write(path, text);
        self.line(key, path);
    }

    fn write(&self, path: &str, text: &str) {
        let target = self.dir.path().join(path);
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::write(target, text).unwrap();
    }

    /// A link below the test's directory.
    fn link(&self, path: &str, to: &str) {
        let to = to.replace("DIR", self.dir.path().to_str().unwrap());
        std::os::unix::fs::symlink(to, self.dir.path().join(path)).unwrap();
    }

    fn recorded(&self, path: &str, content: OutputContent) {
        let path = ExecPath::new(&format!("{BIN}/{path}")).unwrap();
        let rows = vec![(path, OutputRow::known(content))];
        self.record.put_outputs(self.row.root.unwrap(), rows);
    }

    fn add(&mut self) -> Result<Added, StageError> {
        let at = format!("base/execroot/_main/{BIN}/app.runfiles_manifest");
        self.write(&at, &self.manifest);
        let wish = Wish {
            runfiles: true,
            ..Wish::default()
        };
        let request = Request::new(wish).unwrap();
        runfiles::add(
            &mut self.selection,
            &self.record,
            &self.roots,
            &runfiles::Build {
                row: &self.row,
                function: DigestFunction::Sha256,
                carried: &self.carried,
            },
            &request,
        )
    }

    /// What goes below `app.runfiles`.
    fn placed(&self) -> BTreeMap<&str, &OutputContent> {
        let below = format!("{BIN}/app.runfiles/");
        let artifacts = self.selection.artifacts.iter();
        artifacts
            .filter_map(|a| Some((a.place.as_str().strip_prefix(&below)?, &a.content)))
            .collect()
    }
}

fn out(name: &str) -> String {
    format!("base/execroot/_main/{BIN}/{name}")
}

#[test]
fn whatever_a_manifest_names_is_staged_as_a_file() {
    let mut world = World::new();
    world.file("_main/app/source.txt", "w/app/source.txt", "source");
    world.file("lib+/x.h", "base/external/lib+/x.h", "header");
    // What is on disk is newer than what is recorded.
    world.file("_main/local.txt", &out("local.txt"), "local");
    world.recorded("local.txt", blob(b"older"));
    world.recorded("absent.txt", blob(b"absent"));
    world.line("_main/absent.txt", &out("absent.txt"));
    world.recorded("tree/a b/c", blob(b"child"));
    world.file("_main/tree", &out("tree"), "");
    std::fs::remove_file(world.dir.path().join(out("tree"))).unwrap();
    world.write(&out("tree/here"), "here");
    std::fs::create_dir(world.dir.path().join(out("hollow"))).unwrap();
    world.line("_main/hollow", &out("hollow"));
    world.line("_main/app/app", &out("app"));
    world.line(" _main/with\\sspace\\nand\\bmore", "w/app/source.txt");
    world.manifest += "_main/__init__.py \n_main/link ../some where\n";
    let added = world.add().unwrap();
    assert_eq!(added.absent, HashMap::new());
    let (header, source) = (blob(b"header"), blob(b"source"));
    let expected = [
        ("_main/__init__.py", &OutputContent::Inline(Bytes::new())),
        ("_main/absent.txt", &blob(b"absent")),
        (
            "_main/app/app",
            &OutputContent::Symlink("../../../app".to_owned()),
        ),
        ("_main/app/source.txt", &source),
        ("_main/hollow", &OutputContent::Directory),
        ("_main/link", &OutputContent::Symlink("../some where".to_owned())),
        ("_main/local.txt", &blob(b"local")),
        ("_main/tree/a b/c", &blob(b"child")),
        ("_main/tree/here", &blob(b"here")),
        ("_main/with space\nand\\more", &source),
        ("lib+/x.h", &header),
    ];
    assert_eq!(world.placed(), BTreeMap::from(expected));
    for text in ["source", "header", "local", "here"] {
        let digest = Digest::of(DigestFunction::Sha256, text.as_bytes());
        assert!(added.copies.contains_key(&digest), "{text}");
    }
    assert!(
        world
            .selection
            .artifacts
            .iter()
            .any(|a| a.exec_path.as_str() == "external/lib+/x.h")
    );
}

#[test]
fn what_cannot_be_downloaded_fails_its_program_alone() {
    let mut world = World::new();
    world.selection.artifacts[0].class = Class::Optional;
    world
        .selection
        .artifacts
        .push(artifact(&format!("{BIN}/other"), blob(b"other")));
    world.line("_main/app/gone.txt", "w/app/gone.txt");
    world.line("_main/lost", &out("lost"));
    // Not as sure to be there as the other output is.
    world.line("_main/other", &out("other"));
    let added = world.add().unwrap();
    let mut absent: Vec<_> = added
        .absent
        .iter()
        .map(|(place, reason)| format!("{place}: {reason}"))
        .collect();
    absent.sort();
    assert_eq!(absent.len(), 2, "{absent:?}");
    assert!(absent[0].contains("w/app/gone.txt: No such file"), "{absent:?}");
    assert!(
        absent[1].ends_with(
            "app.runfiles/_main/lost: it is not on disk, and no recorded build has named its digest"
        )
    );
    for artifact in &world.selection.artifacts {
        let class =
            if artifact.place.file_name() == "other" && artifact.place.as_str() == format!("{BIN}/other") {
                Class::Required
            } else {
                Class::Optional
            };
        assert_eq!(artifact.class, class, "{artifact:?}");
    }
}

#[test]
fn what_a_manifest_may_not_name_is_refused() {
    let refused = |make: &dyn Fn(&mut World)| {
        let mut world = World::new();
        make(&mut world);
        world.add().unwrap_err().to_string()
    };
    for (line, reason) in [
        (
            "_main/passwd /etc/passwd\n",
            "neither an output nor a source of the build: /etc/passwd",
        ),
        ("../up \n", "is not a valid path"),
    ] {
        let error = refused(&|world| world.manifest += line);
        assert!(error.contains(reason), "{error}");
    }
    let error = refused(&|world| world.line("_main/x", "w/../secret"));
    assert!(error.contains("neither an output nor a source"), "{error}");
    let error = refused(&|world| {
        world.file("_main/x", "w/x", "x");
        world.line("_main/x/y", "w/x");
    });
    assert!(error.contains("app.runfiles/_main/x"), "{error}");
    let error = refused(&|world| world.selection.artifacts[0] = artifact("bazel-out/k8/bin/no", blob(b"")));
    assert!(error.contains("manifest of runfiles beside it"), "{error}");
    let error = refused(&|world| {
        let row = InvocationRow {
            invocation_id: "newer".to_owned(),
            version: world.record.next_version(world.row.root.unwrap()),
            ..world.row.clone()
        };
        world.record.put_invocation(&row);
    });
    assert!(error.contains("build newer is newer"), "{error}");
    let error = refused(&|world| world.row.root = None);
    assert!(error.contains("not made on this machine"), "{error}");
}

#[test]
fn links_in_bazel_out_lead_to_outputs_and_sources_and_nowhere_else() {
    let mut world = World::new();
    world.write("secret/key", "secret");
    world.write("w/app/source.txt", "source");
    world.write("base/external/lib+/x.h", "header");
    world.write(&out("here.txt"), "here");
    world.link("w/app/own", "../../secret/key");
    for (name, to) in [
        ("near", "here.txt"),
        ("source", "DIR/w/app/source.txt"),
        ("by_exec_root", "DIR/base/execroot/_main/app/source.txt"),
        ("external", "DIR/base/execroot/_main/external/lib+/x.h"),
        ("directory", "DIR/w/app"),
        ("out", "DIR/secret/key"),
        ("up", "../../../../../../secret/key"),
        ("chain", "out"),
        ("passwd", "/etc/passwd"),
    ] {
        world.link(&out(name), to);
        world.line(name, &out(name));
    }
    let added = world.add().unwrap();
    let (here, source, header) = (blob(b"here"), blob(b"source"), blob(b"header"));
    // The links of the workspace are its user's.
    let own = blob(b"secret");
    let mut placed = world.placed();
    let mut refused = Vec::new();
    for name in ["out", "up", "chain", "passwd"] {
        let place = ExecPath::new(&format!("{BIN}/app.runfiles/{name}")).unwrap();
        assert_eq!(placed.remove(name), Some(&OutputContent::Directory));
        refused.push((name, added.absent[&place].clone()));
    }
    let expected = [
        ("near", &here),
        ("source", &source),
        ("by_exec_root", &source),
        ("external", &header),
        ("directory/own", &own),
        ("directory/source.txt", &source),
    ];
    assert_eq!(placed, BTreeMap::from(expected));
    for (name, reason) in refused {
        assert!(
            reason.contains("which is neither an output nor a source of the build"),
            "{name}: {reason}"
        );
    }
    assert_eq!(added.absent.len(), 4);
}

#[test]
fn sources_are_those_of_the_workspace_that_the_output_base_names() {
    let mut world = World::new();
    world.file("_main/x", "w/app/x", "x");
    world.file("lib+/y", "base/external/lib+/y", "y");
    world.write("base/DO_NOT_BUILD_HERE", "/elsewhere");
    let added = world.add().unwrap();
    assert_eq!(world.placed()["lib+/y"], &blob(b"y"));
    let reasons: Vec<_> = added.absent.values().collect();
    assert!(
        matches!(&*reasons, [reason] if reason.contains("DO_NOT_BUILD_HERE")),
        "{reasons:?}"
    );
}

/// A container has `/src` and `/cache/base`; here they are somewhere else.
#[test]
fn with_translated_paths_sources_are_read_where_they_are_here() {
    for is_reported in [true, false] {
        let mut world = World::new();
        world.write("w/app/x", "x");
        world.write("base/external/lib+/y", "y");
        world.write(&out("z"), "z");
        world.link("base/external/own", "/src/app");
        world.write("base/DO_NOT_BUILD_HERE", "/src");
        let dir = world.dir.path().display();
        let mut maps = vec![format!("/cache/base={dir}/base")];
        if is_reported {
            maps.push(format!("/src={dir}/w"));
        }
        world.roots.set_rules(RootRules {
            path_maps: maps.iter().map(|map| map.parse().unwrap()).collect(),
            ..RootRules::default()
        });
        world.row.workspace = "/src".to_owned();
        world.link(&out("link"), "/src/app/x");
        world.manifest = format!(
            "x /src/app/x\ny /cache/base/external/lib+/y\nown/x /cache/base/external/own/x\n\
             z /cache/base/execroot/_main/{BIN}/z\nlink /cache/base/execroot/_main/{BIN}/link\n"
        );
        let added = world.add().unwrap();
        let placed = world.placed();
        let (x, y, z) = (blob(b"x"), blob(b"y"), blob(b"z"));
        assert_eq!((placed["y"], placed["z"]), (&y, &z));
        let absent = |name: &str| {
            let place = ExecPath::new(&format!("{BIN}/app.runfiles/{name}")).unwrap();
            added.absent.get(&place).cloned().unwrap_or_default()
        };
        // An absolute link there leads to what may be another file here.
        assert!(absent("own/x").contains("leads out"), "{:?}", added.absent);
        for name in ["x", "link"] {
            if is_reported {
                assert_eq!(placed[name], &x, "{name}");
            } else {
                assert!(absent(name).contains("--path-map"), "{name}: {:?}", added.absent);
            }
        }
    }
}

#[test]
fn programs_with_the_same_bytes_in_one_place_have_the_runfiles_of_both() {
    let mut world = World::new();
    world.selection.artifacts[0].place = ExecPath::new("app").unwrap();
    world.file("_main/one", "w/one", "one");
    let mut other = artifact(&format!("{BIN}/other/app"), blob(b"program"));
    other.place = ExecPath::new("app").unwrap();
    world.selection.also.push(other);
    let target = world.dir.path().join("w/two").display().to_string();
    world.write("w/two", "two");
    world.write(
        &out("other/app.runfiles_manifest"),
        &format!("_main/two {target}\n"),
    );
    world.add().unwrap();
    let places: Vec<&str> = world
        .selection
        .artifacts
        .iter()
        .map(|a| a.place.as_str())
        .collect();
    assert_eq!(
        places,
        ["app", "app.runfiles/_main/one", "app.runfiles/_main/two"]
    );
}

#[test]
fn what_came_with_a_build_from_elsewhere_is_staged_with_the_bytes_that_came_too() {
    let mut world = World::new();
    world.row.root = None;
    let runfile = |name: &str, exec_path: &str, what| Carried {
        program: format!("{BIN}/app"),
        name: name.to_owned(),
        exec_path: exec_path.to_owned(),
        what: Some(what),
    };
    let file = |text: &[u8]| What::File(Digest::of(DigestFunction::Sha256, text).to_string());
    world.carried = vec![
        runfile("_main/app", &format!("{BIN}/app"), file(b"program")),
        runfile("_main/source", "source", file(b"source")),
        runfile("_main/remote", &format!("{BIN}/remote"), file(b"remote")),
        runfile("_main/empty", "empty", What::Directory(true)),
        runfile("_main/link", "link", What::Link("source".to_owned())),
        runfile("_main/lost", "lost", What::Absent("no such file".to_owned())),
        Carried::bytes(Bytes::from_static(b"source")),
        Carried::bytes(Bytes::from_static(b"program")),
    ];
    let added = world.add().unwrap();
    let inline = OutputContent::Inline(Bytes::from_static(b"source"));
    let expected = [
        ("_main/app", &OutputContent::Symlink("../../app".to_owned())),
        ("_main/empty", &OutputContent::Directory),
        ("_main/link", &OutputContent::Symlink("source".to_owned())),
        ("_main/lost", &OutputContent::Directory),
        ("_main/remote", &blob(b"remote")),
        ("_main/source", &inline),
    ];
    assert_eq!(world.placed(), BTreeMap::from(expected));
    assert_eq!(
        world.selection.artifacts[0].content,
        OutputContent::Inline(Bytes::from_static(b"program"))
    );
    let reasons: Vec<_> = added.absent.values().collect();
    assert!(
        matches!(&*reasons, [reason] if reason.contains("where it was exported: no such file")),
        "{reasons:?}"
    );
    for (name, exec_path) in [("../up", "x"), ("x", "../up"), ("x", "/etc/passwd")] {
        world.selection.artifacts = vec![artifact(&format!("{BIN}/app"), blob(b"program"))];
        world.carried = vec![runfile(name, exec_path, file(b"x"))];
        assert!(world.add().is_err(), "{name} {exec_path}");
    }
}
