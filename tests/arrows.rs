//! The arrows between rooms and files: what `docs/architecture.md` says about directions is true.
//!
//! Product code only: what is compiled for tests or for fuzzing may look wherever it likes.

#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use syn::{
    Attribute, Item, ItemUse, UseTree,
    visit::{self, Visit},
};

/// The rooms, from the ground up. A room may use those of lower floors and none of its own.
const FLOORS: &[&[&str]] = &[
    &["exec_path", "metrics", "open_files", "printable", "units"],
    &["access", "action_cache", "bep", "output", "removal", "transport"],
    &["builds", "record", "remote", "telemetry"],
    &["demo", "journal", "materialize", "sources"],
    &["archive", "roots"],
    &["bes", "collection", "invocation"],
    &["lease", "mount", "notify", "stage"],
    &["config", "control"],
    &["page"],
    &["daemon"],
    &["cli"],
];

/// Files that are no room: the crate itself, and what only tests and fuzzing have.
const NO_ROOMS: &[&str] = &["fuzzing", "lib", "main", "simulated", "unprivileged"];

/// How many files may import each other in a circle.
const CIRCLE: usize = 3;

/// A module's path within the crate.
type Module = Vec<String>;

/// A file's imports.
#[derive(Default)]
struct Imports {
    /// Paths within the crate.
    paths: Vec<Module>,
    /// What it hands on under another path: the name, and where it comes from.
    handed_on: Vec<(String, Module)>,
}

fn rust_files(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

fn module_of(file: &Path, src: &Path) -> Module {
    let relative = file.strip_prefix(src).unwrap().with_extension("");
    let mut module: Module = relative
        .iter()
        .map(|part| part.to_str().unwrap().to_owned())
        .collect();
    if module.last().is_some_and(|last| last == "mod") {
        module.pop();
    }
    module
}

/// Whether something is compiled only for tests or for fuzzing.
fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let syn::Meta::List(list) = &attribute.meta else {
            return false;
        };
        let condition = list.tokens.to_string();
        list.path.is_ident("cfg")
            && !condition.contains("not")
            && (condition.contains("test") || condition.contains("fuzzing"))
    })
}

/// Collects what one file of the product imports.
struct Reader<'a> {
    module: &'a Module,
    imports: Imports,
    /// Modules that this file declares for tests only.
    tests: Vec<Module>,
}

impl Reader<'_> {
    /// A path's place within the crate, if it says so by its first word.
    fn absolute(&self, segments: &[String]) -> Option<Module> {
        let (first, rest) = segments.split_first()?;
        let mut at = match first.as_str() {
            "crate" => return Some(rest.to_vec()),
            "self" => self.module.clone(),
            "super" => self.module.split_last()?.1.to_vec(),
            _ => return None,
        };
        let mut rest = rest;
        while let Some((_, further)) = rest.split_first().filter(|(next, _)| *next == "super") {
            at.pop();
            rest = further;
        }
        at.extend_from_slice(rest);
        Some(at)
    }

    fn read(&mut self, tree: &UseTree, before: &[String], handed_on: bool) {
        let mut path = before.to_vec();
        match tree {
            UseTree::Path(part) => {
                path.push(part.ident.to_string());
                self.read(&part.tree, &path, handed_on);
            }
            UseTree::Group(group) => {
                for tree in &group.items {
                    self.read(tree, &path, handed_on);
                }
            }
            UseTree::Name(name) => {
                if name.ident != "self" {
                    path.push(name.ident.to_string());
                }
                self.end(&path, name.ident.to_string(), handed_on);
            }
            UseTree::Rename(name) => {
                path.push(name.ident.to_string());
                self.end(&path, name.rename.to_string(), handed_on);
            }
            UseTree::Glob(_) => self.end(&path, String::new(), handed_on),
        }
    }

    fn end(&mut self, path: &[String], name: String, handed_on: bool) {
        let own = || [self.module.clone(), path.to_vec()].concat();
        let Some(path) = self.absolute(path).or_else(|| handed_on.then(own)) else {
            return;
        };
        if handed_on {
            self.imports.handed_on.push((name, path));
        } else {
            self.imports.paths.push(path);
        }
    }
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        let attributes = match item {
            Item::Mod(item) => &item.attrs,
            Item::Fn(item) => &item.attrs,
            Item::Use(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            Item::Struct(item) => &item.attrs,
            _ => &Vec::new(),
        };
        if !is_for_tests(attributes) {
            visit::visit_item(self, item);
        } else if let Item::Mod(item) = item {
            let mut module = self.module.clone();
            module.push(item.ident.to_string());
            self.tests.push(module);
        }
    }

    fn visit_stmt(&mut self, statement: &'ast syn::Stmt) {
        let attributes = match statement {
            syn::Stmt::Local(local) => &local.attrs,
            syn::Stmt::Expr(syn::Expr::If(expression), _) => &expression.attrs,
            syn::Stmt::Expr(syn::Expr::Block(expression), _) => &expression.attrs,
            _ => &Vec::new(),
        };
        if !is_for_tests(attributes) {
            visit::visit_stmt(self, statement);
        }
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        if !is_for_tests(&item.attrs) {
            visit::visit_impl_item_fn(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let handed_on = !matches!(item.vis, syn::Visibility::Inherited);
        self.read(&item.tree, &[], handed_on);
    }

    // `pub(in crate::room)` imports nothing.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<String> = path.segments.iter().map(|part| part.ident.to_string()).collect();
        if let Some(path) = self.absolute(&segments)
            && !path.is_empty()
        {
            self.imports.paths.push(path);
        }
        visit::visit_path(self, path);
    }
}

/// Which file imports which, by their modules.
fn arrows() -> BTreeMap<Module, BTreeSet<Module>> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    let (mut all, mut tests) = (BTreeMap::new(), Vec::new());
    for file in &files {
        let module = module_of(file, &src);
        let parsed = syn::parse_file(&fs::read_to_string(file).unwrap()).unwrap();
        let mut reader = Reader {
            module: &module,
            imports: Imports::default(),
            tests: Vec::new(),
        };
        reader.visit_file(&parsed);
        tests.append(&mut reader.tests);
        let imports = reader.imports;
        all.insert(module, imports);
    }
    all.retain(|module, _| !tests.iter().any(|test| module.starts_with(test)));
    let handed_on: BTreeMap<(Module, String), Module> = all
        .iter()
        .flat_map(|(module, imports)| {
            let names = imports.handed_on.iter().cloned();
            names.map(|(name, from)| ((module.clone(), name), from))
        })
        .collect();
    let end = |path: &Module| {
        let mut path = path.clone();
        // A name may be handed on by a room that has it from another one of its files.
        for _ in 0..4 {
            let file = file_of(&all, &path)?;
            match path
                .get(file.len())
                .and_then(|name| handed_on.get(&(file.clone(), name.clone())))
            {
                Some(from) => path.clone_from(from),
                None => return Some(file),
            }
        }
        file_of(&all, &path)
    };
    let arrows = all.iter().map(|(module, imports)| {
        let ends = imports.paths.iter().filter_map(end);
        // What the generated code is in is no room.
        let ends = ends.filter(|end| end != module && !end.is_empty());
        (module.clone(), ends.collect())
    });
    arrows.collect()
}

/// The file that has what is at a path: of the longest module on its way that is one.
fn file_of(files: &BTreeMap<Module, Imports>, path: &Module) -> Option<Module> {
    let modules = (0..=path.len()).rev().map(|end| path[..end].to_vec());
    modules.into_iter().find(|module| files.contains_key(module))
}

fn floor(room: &str) -> usize {
    let found = FLOORS.iter().position(|floor| floor.contains(&room));
    found.unwrap_or_else(|| {
        panic!(
            "the room {room:?} is on no floor: add it to FLOORS in {}",
            file!()
        )
    })
}

#[test]
fn every_room_uses_only_rooms_of_lower_floors() {
    let arrows = arrows();
    let mut wrong = Vec::new();
    for (from, ends) in &arrows {
        if NO_ROOMS.contains(&from[0].as_str()) {
            continue;
        }
        for to in ends.iter().filter(|to| to[0] != from[0] && to[0] != "lib") {
            if floor(&to[0]) >= floor(&from[0]) {
                wrong.push(format!("{} uses {}", from.join("::"), to.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "against the order of the rooms: {wrong:#?}");
    let rooms: BTreeSet<&str> = arrows.keys().map(|module| module[0].as_str()).collect();
    for room in FLOORS.iter().copied().flatten() {
        assert!(rooms.contains(room), "there is no room {room:?} any more");
    }
    // As many as this would not be found if paths were read wrongly.
    let count: usize = arrows.values().map(BTreeSet::len).sum();
    assert!(count > 1000, "only {count} arrows were found");
}

#[test]
fn the_floors_are_those_of_the_documentation() {
    let text =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/architecture.md")).unwrap();
    let (_, table) = text.split_once("## Rooms").unwrap();
    let (table, _) = table.split_once("\n## ").unwrap();
    for room in FLOORS.iter().copied().flatten() {
        assert!(
            table.contains(&format!("`{room}`")),
            "{room} is not in the table of rooms"
        );
    }
}

#[test]
fn no_circle_of_files_is_larger_than_three() {
    let arrows = arrows();
    for circle in circles(&arrows) {
        let names: Vec<String> = circle.iter().map(|module| module.join("::")).collect();
        assert!(names.len() <= CIRCLE, "these import each other: {names:#?}");
    }
}

/// Files that reach each other, in groups of two and more.
fn circles(arrows: &BTreeMap<Module, BTreeSet<Module>>) -> Vec<BTreeSet<Module>> {
    let reach = |from: &Module| {
        let (mut seen, mut next) = (BTreeSet::new(), vec![from.clone()]);
        while let Some(at) = next.pop() {
            for to in arrows.get(&at).into_iter().flatten() {
                if seen.insert(to.clone()) {
                    next.push(to.clone());
                }
            }
        }
        seen
    };
    let reached: BTreeMap<&Module, BTreeSet<Module>> =
        arrows.keys().map(|file| (file, reach(file))).collect();
    let mut circles: Vec<BTreeSet<Module>> = Vec::new();
    for (file, ends) in &reached {
        if circles.iter().any(|circle| circle.contains(*file)) {
            continue;
        }
        let back = ends
            .iter()
            .filter(|end| reached.get(end).is_some_and(|ends| ends.contains(*file)));
        let circle: BTreeSet<Module> = back.cloned().collect();
        if circle.len() > 1 {
            circles.push(circle);
        }
    }
    circles
}

#[test]
fn circles_are_found() {
    let module = |name: &str| vec![name.to_owned()];
    let arrows = [
        ("a", vec!["b"]),
        ("b", vec!["c", "d"]),
        ("c", vec!["a"]),
        ("d", vec![]),
    ];
    let arrows: BTreeMap<Module, BTreeSet<Module>> = arrows
        .iter()
        .map(|(from, ends)| (module(from), ends.iter().map(|to| module(to)).collect()))
        .collect();
    let circle: BTreeSet<Module> = ["a", "b", "c"].map(module).into();
    assert_eq!(circles(&arrows), [circle]);
}
