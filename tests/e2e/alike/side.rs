//! Builds of a configuration, and what they leave.

use std::{
    collections::{BTreeMap, hash_map::DefaultHasher},
    hash::{Hash as _, Hasher as _},
    path::{Path, PathBuf},
    process::Command,
};

use outhaul_testkit::{Ran, Running};

use super::config::{Config, Urls};
use crate::harness::{Bazel, Entry, Scratch, Tree};

/// The source that is edited, before and after.
const EDITED: (&str, &str, &str) = ("gen/source.txt", "a source file\n", "edited\n");

/// Who builds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Bazel alone.
    Alone,
    /// The same command with Outhaul.
    With,
}

/// What a build leaves.
pub(super) struct Left {
    pub(super) run: Ran,
    tree: Tree,
    /// Bazel's links in the workspace.
    links: BTreeMap<String, PathBuf>,
}

/// A workspace that is built in over and over.
pub(super) struct Ground<'a> {
    bazel: &'a Bazel,
    dir: &'a Scratch,
    urls: &'a Urls,
    /// The flag for a daemon.
    bes: String,
    /// The workspace's own rc file.
    rc: String,
    umask: &'static str,
}

impl<'a> Ground<'a> {
    pub(super) fn new(bazel: &'a Bazel, dir: &'a Scratch, urls: &'a Urls, bes: String) -> Self {
        let rc = std::fs::read_to_string(bazel.workspace().join(".bazelrc")).unwrap();
        std::fs::create_dir(dir.join("home")).unwrap();
        Self {
            bazel,
            dir,
            urls,
            bes,
            rc,
            umask: "",
        }
    }

    /// Sees to it that the cache has whatever the configuration builds.
    pub(super) fn fill(&mut self, config: &Config) {
        if self.umask != config.get("umask") {
            self.plain("shutdown", &[]);
            self.umask = config.get("umask");
        }
        if matches!(config.get("cache"), "none" | "dead") || config.is("before", "uncached") {
            return;
        }
        self.plain("clean", &[]);
        self.bazel.write(EDITED.0, EDITED.1);
        self.build(config, None, &["--remote_upload_local_results"]);
        if config.is("before", "edited") {
            self.bazel.write(EDITED.0, EDITED.2);
            self.build(config, None, &["--remote_upload_local_results"]);
        }
    }

    /// Builds from the state that the configuration begins with.
    pub(super) fn left(&self, config: &Config, side: Side) -> Left {
        self.remove_links();
        self.plain("clean", &[]);
        self.bazel.write(EDITED.0, EDITED.1);
        match config.get("before") {
            "clean" => {}
            "local" => {
                self.build(config, None, &["--remote_cache=", "--disk_cache="]);
            }
            // That Bazel takes nothing from it, it does not promise of a disk cache.
            "uncached" => {
                let _ = std::fs::remove_dir_all(&self.urls.disk);
            }
            _ => {
                self.build(config, Some(side), &[]);
            }
        }
        match config.get("before") {
            "edited" => self.bazel.write(EDITED.0, EDITED.2),
            "deleted" => self.delete(),
            _ => {}
        }
        let more = ["--noremote_accept_cached"];
        let more = &more[..usize::from(config.is("before", "uncached"))];
        let run = self.build(config, Some(side), more);
        let tree = self
            .out()
            .map(|out| Tree::of(&out))
            .unwrap_or_else(|| Tree(BTreeMap::new()));
        let tree = tree.only(|path| !path.starts_with("_tmp") && path.contains('/'));
        Left {
            run,
            tree,
            links: self.links(),
        }
    }

    /// Runs the configuration's command, with more flags after its own; without a side alone, and not for its outcome.
    fn build(&self, config: &Config, side: Option<Side>, more: &[&str]) -> Ran {
        let version = self.bazel.version();
        let with = if side == Some(Side::With) {
            config.get("under")
        } else {
            "alone"
        };
        let mut flags = config.flags(version, self.urls);
        if with == "serve" {
            flags.retain(|flag| !flag.starts_with("--bes_backend"));
            flags.push(self.bes.clone());
        }
        let mut line = self.bazel.command_line(config.get("command"));
        let rc_lines = |word: &str| {
            flags
                .iter()
                .map(|flag| format!("{word} {flag}\n"))
                .collect::<String>()
        };
        let mut rc = self.rc.clone();
        match config.get("flags-in") {
            "argv" => line.extend(flags.iter().cloned()),
            "rc" => rc += &format!("\n{}", rc_lines("build")),
            "config" => {
                rc += &format!(
                    "\n{}build --enable_platform_specific_config\n",
                    rc_lines("build:inner")
                );
                rc += "build:ci --config=inner\n";
                line.push("--config=ci".to_owned());
            }
            "bazelrc" => {
                let path = self.dir.join("other.bazelrc");
                std::fs::write(&path, rc_lines("build")).unwrap();
                line.insert(1, format!("--bazelrc={}", path.display()));
            }
            "import" => {
                rc += "\ntry-import %workspace%/more.bazelrc\ntry-import %workspace%/missing.bazelrc\n";
                self.bazel.write("more.bazelrc", &rc_lines("build"));
            }
            other => unreachable!("{other}"),
        }
        self.bazel.write(".bazelrc", &rc);
        line.extend(more.iter().map(|flag| (*flag).to_owned()));
        line.extend(config.targets(version).iter().map(|target| (*target).to_owned()));
        let outhaul =
            std::env::var("OUTHAUL_BIN").unwrap_or_else(|_| env!("CARGO_BIN_EXE_outhaul").to_owned());
        let in_front: &[&str] = match with {
            "run" => &[&outhaul, "run", "--"],
            "strict" => &[&outhaul, "run", "--strict", "--"],
            "keep" => &[&outhaul, "run", "--keep-download-mode", "--"],
            _ => &[],
        };
        let line = in_front.iter().copied().chain(line.iter().map(String::as_str));
        self.process(config.get("home"), line).wait()
    }

    /// A command that builds nothing.
    fn plain(&self, command: &str, args: &[&str]) -> Ran {
        self.bazel.write(".bazelrc", &self.rc);
        let line = self.bazel.command_line(command);
        let line = line.iter().map(String::as_str).chain(args.iter().copied());
        self.process("own", line).wait()
    }

    fn process<'b>(&self, home: &str, line: impl Iterator<Item = &'b str>) -> Running {
        let mut process = Command::new("sh");
        process.args([
            "-c",
            "umask \"$0\"; exec \"$@\"",
            if self.umask.is_empty() { "022" } else { self.umask },
        ]);
        process.args(line).current_dir(self.bazel.workspace());
        for (name, _) in std::env::vars_os() {
            let is_ours = |name: &str| name.starts_with("OUTHAUL_") || name.starts_with("XDG_");
            if name.to_str().is_some_and(is_ours) {
                process.env_remove(name);
            }
        }
        match home {
            "own" => process.env("HOME", self.dir.join("home")),
            "none" => process.env_remove("HOME"),
            // Where not even root may write.
            "read-only" => process.env("HOME", "/proc"),
            other => unreachable!("{other}"),
        };
        Running::start(process)
    }

    /// Bazel's output tree, wherever its links are.
    fn out(&self) -> Option<PathBuf> {
        let mut bases = std::fs::read_dir(self.bazel.output_user_root())
            .unwrap()
            .flatten();
        bases.find_map(|base| {
            let roots = std::fs::read_dir(base.path().join("execroot")).ok()?;
            roots
                .flatten()
                .map(|root| root.path().join("bazel-out"))
                .find(|out| out.is_dir())
        })
    }

    fn links(&self) -> BTreeMap<String, PathBuf> {
        let entries = std::fs::read_dir(self.bazel.workspace()).unwrap().flatten();
        entries
            .filter_map(|entry| {
                let target = std::fs::read_link(entry.path()).ok()?;
                Some((entry.file_name().into_string().unwrap(), target))
            })
            .collect()
    }

    /// Links of the configurations before, which no `clean` of another prefix removes.
    fn remove_links(&self) {
        for name in self.links().into_keys() {
            std::fs::remove_file(self.bazel.workspace().join(name)).unwrap();
        }
    }

    /// Deletes a third of the files and links, always the same.
    fn delete(&self) {
        let Some(out) = self.out() else { return };
        for (path, entry) in &Tree::of(&out).0 {
            let mut hasher = DefaultHasher::new();
            path.hash(&mut hasher);
            if hasher.finish().is_multiple_of(3)
                && !matches!(entry, Entry::Directory { .. })
                && path.contains('/')
            {
                remove(&out.join(path));
            }
        }
    }
}

/// Removes a file, also from a read-only directory.
fn remove(path: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    let above = path.parent().unwrap();
    let before = std::fs::metadata(above).unwrap().permissions();
    std::fs::set_permissions(above, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::remove_file(path).unwrap();
    std::fs::set_permissions(above, before).unwrap();
}

/// Of a Bazel that crashed: 4.2.3 does so when it is told to run what it was told not to download.
const CRASH: Option<i32> = Some(37);

/// Files whose bytes say when they were made.
fn depends_on_the_time(path: &str) -> bool {
    ["test.xml", "test.cache_status", "attempt_1.xml", "outputs.zip"]
        .iter()
        .any(|name| path.ends_with(name))
}

impl Left {
    /// What is there, and not as it is there in another.
    pub(super) fn lacks(&self, other: &Self, config: &Config) -> Vec<String> {
        let mut list = Vec::new();
        if self.run.code == CRASH {
            return list;
        }
        if self.run.code != other.run.code && !self.is_known(other, config) {
            list.push(format!(
                "exit code {:?}, with Outhaul {:?}",
                self.run.code, other.run.code
            ));
        }
        let waited = |left: &Self| {
            left.run
                .err
                .contains("for the previous invocation failed to complete")
        };
        if waited(other) && !waited(self) && !uploads_to_nobody(config) {
            list.push("it waited for events of the build before".to_owned());
        }
        // A program is not run after another exit code.
        let both_ran = self.run.code == other.run.code;
        if config.is("command", "run") && both_ran && self.run.out() != other.run.out() {
            list.push(format!(
                "it printed {:?}, with Outhaul {:?}",
                self.run.out(),
                other.run.out()
            ));
        }
        if self.links != other.links {
            list.push(format!("links {:?}, with Outhaul {:?}", self.links, other.links));
        }
        for (path, entry) in &self.tree.0 {
            match other.tree.0.get(path) {
                None => list.push(format!("- {path}: {entry:?}")),
                Some(found) if is_like(path, entry, found) => {}
                Some(found) => list.push(format!("! {path}: {entry:?}, with Outhaul {found:?}")),
            }
        }
        list
    }

    /// Whether the exit code of another is one that Bazel alone would not have had, for a known reason.
    fn is_known(&self, other: &Self, config: &Config) -> bool {
        match other.run.code {
            // What was asked for failed to download; nor is it on disk after Bazel alone, which does not even try.
            Some(45) => {
                config.is("under", "strict") && {
                    let failed = other.run.err.lines().filter_map(|line| {
                        let (path, _) = line.strip_prefix("outhaul: bazel-out/")?.split_once(": ")?;
                        let entry = self.tree.0.get(path);
                        Some(entry.is_some_and(|entry| !matches!(entry, Entry::Link { hash: None, .. })))
                    });
                    let are_there: Vec<bool> = failed.collect();
                    !are_there.is_empty() && !are_there.contains(&true)
                }
            }
            // `outhaul run` prevents it.
            Some(38) => uploads_to_nobody(config) && config.is("upload", "default"),
            _ => false,
        }
    }
}

/// Whether Bazel uploads its logs to a cache that is down for the sake of an event service.
fn uploads_to_nobody(config: &Config) -> bool {
    config.is("under", "serve") && config.is("cache", "dead")
}

fn is_like(path: &str, entry: &Entry, found: &Entry) -> bool {
    // Debian's Bazel 7 makes what it downloads executable for its owner alone, for it changes modes by Java's means.
    let is_mode = |one: u32, other: u32| one & !0o011 == other & !0o011;
    match (entry, found) {
        (
            Entry::File { hash, mode, .. },
            Entry::File {
                hash: bytes,
                mode: other,
                ..
            },
        ) => is_mode(*mode, *other) && (hash == bytes || depends_on_the_time(path)),
        (Entry::Directory { mode }, Entry::Directory { mode: other }) => is_mode(*mode, *other),
        // One that leads to nothing alone may lead to something.
        (Entry::Link { target, hash: None }, Entry::Link { target: other, .. }) => target == other,
        (one, other) => one == other,
    }
}
