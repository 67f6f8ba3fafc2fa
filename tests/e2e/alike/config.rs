//! Configurations of a build: one value of every factor, chosen so that all pairs of values occur.

use std::{collections::HashSet, fmt};

use rand::{RngExt as _, rngs::StdRng};

use crate::harness::Version;

/// What builds differ in, and the values that it has. The first value is what most people have.
pub(super) const FACTORS: [(&str, &[&str]); 14] = [
    ("under", &["run", "strict", "serve", "keep"]),
    ("command", &["build", "test", "run"]),
    (
        "cache",
        &[
            "grpc",
            "casd",
            "http",
            "disk",
            "grpc+disk",
            "http+disk",
            "none",
            "dead",
        ],
    ),
    ("flags-in", &["argv", "rc", "config", "bazelrc", "import"]),
    (
        "download",
        &[
            "default",
            "minimal",
            "toplevel",
            "all",
            "outputs=toplevel",
            "regex",
        ],
    ),
    ("upload", &["default", "nowait", "async"]),
    (
        "targets",
        &[
            "files", "trees", "programs", "tests", "aspects", "failing", "all", "without",
        ],
    ),
    ("umask", &["022", "077", "002"]),
    ("home", &["own", "none", "read-only"]),
    ("links", &["default", "custom", "none"]),
    (
        "before",
        &["clean", "warm", "deleted", "local", "edited", "uncached"],
    ),
    ("modes", &["default", "writable"]),
    ("runfiles", &["default", "no-links", "none"]),
    (
        "more",
        &[
            "nothing",
            "backend",
            "paths-local",
            "invocation",
            "no-upload",
            "event-files",
            "groups",
            "unzipped",
        ],
    ),
];

/// A value for each factor, by number.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Config(Vec<usize>);

impl Config {
    /// Values drawn by lot.
    pub(super) fn random(random: &mut StdRng) -> Self {
        Self(
            FACTORS
                .iter()
                .map(|(_, values)| random.random_range(0..values.len()))
                .collect(),
        )
    }

    /// Configurations in which all pairs of values occur.
    pub(super) fn all_pairs(random: &mut StdRng) -> Vec<Self> {
        let mut open = HashSet::new();
        for (n, (_, ones)) in FACTORS.iter().enumerate() {
            for (m, (_, others)) in FACTORS.iter().enumerate().skip(n + 1) {
                for one in 0..ones.len() {
                    open.extend((0..others.len()).map(|other| (n, one, m, other)));
                }
            }
        }
        let mut chosen = Vec::new();
        while let Some(&(n, one, m, other)) = open.iter().min() {
            let candidates = (0..60).map(|_| {
                let mut config = Self::random(random);
                (config.0[n], config.0[m]) = (one, other);
                config
            });
            let best =
                candidates.max_by_key(|config| config.pairs().filter(|pair| open.contains(pair)).count());
            let best = best.expect("there are candidates");
            for pair in best.pairs() {
                open.remove(&pair);
            }
            chosen.push(best);
        }
        chosen
    }

    fn pairs(&self) -> impl Iterator<Item = (usize, usize, usize, usize)> {
        let last = self.0.len();
        (0..last).flat_map(move |n| (n + 1..last).map(move |m| (n, self.0[n], m, self.0[m])))
    }

    /// The value of a factor.
    #[track_caller]
    pub(super) fn get(&self, factor: &str) -> &'static str {
        let number = FACTORS.iter().position(|(name, _)| *name == factor);
        let number = number.unwrap_or_else(|| panic!("no factor is called {factor}"));
        FACTORS[number].1[self.0[number]]
    }

    pub(super) fn is(&self, factor: &str, value: &str) -> bool {
        let (_, values) = FACTORS
            .iter()
            .find(|(name, _)| *name == factor)
            .expect("a factor");
        assert!(values.contains(&value), "{factor} is never {value}");
        self.get(factor) == value
    }

    /// From what [`Display`](fmt::Display) shows; what is not named has its first value.
    pub(super) fn parse(text: &str) -> Self {
        let mut config = Self(vec![0; FACTORS.len()]);
        for part in text.split_whitespace() {
            let (name, value) = part
                .split_once(':')
                .unwrap_or_else(|| panic!("{part} is no factor:value"));
            let number = FACTORS.iter().position(|(factor, _)| *factor == name);
            let number = number.unwrap_or_else(|| panic!("no factor is called {name}"));
            let at = FACTORS[number].1.iter().position(|one| *one == value);
            config.0[number] = at.unwrap_or_else(|| panic!("{name} is never {value}"));
        }
        config
    }

    /// What is to be built, and the options that belong to it.
    pub(super) fn targets(&self, version: Version) -> &'static [&'static str] {
        let linked = version == Version::Seven;
        match (self.get("command"), self.get("targets")) {
            ("build", "files") => &["//:all", "//gen:all"],
            ("build", "trees") => &["//rules:all"],
            ("build", "programs") if linked => &[
                "//gen:alias",
                "//runfiles:linked",
                "//runfiles:hidden",
                "//gen:tool",
            ],
            ("build", "programs") => &["//runfiles:app", "//gen:tool"],
            ("build", "tests") => &["//tests:all", "//deep/..."],
            ("build", "aspects") => &[
                "--aspects=//rules:defs.bzl%report",
                "--output_groups=+report",
                "//gen:one",
                "//rules:flat",
            ],
            ("build", "failing") => &[
                "--keep_going",
                "--output_groups=+mixed,+good",
                "//rules:half",
                "//gen:broken",
                "//:all",
                "//gen:many",
            ],
            ("run", "trees") => &["//rules:program"],
            ("run", "programs") if linked => &["//runfiles:linked"],
            ("run", "programs" | "all") => &["//runfiles:app"],
            ("run", "failing") => &["//gen:broken"],
            ("run", "aspects") => &[
                "--aspects=//rules:defs.bzl%report",
                "--output_groups=+report",
                "//gen:tool",
            ],
            ("run", _) => &["//gen:tool"],
            (_, "all") => &["//..."],
            (_, "without") => &["--", "//...", "-//gen:all"],
            (_, "tests") => &["//tests:all", "//deep/..."],
            (_, "trees") => &["//tests:outputs"],
            (_, "programs") => &["//tests:made", "//tests:pass"],
            (_, "files") => &["//tests:sharded", "//gen:one"],
            (_, "aspects") => &[
                "--aspects=//rules:defs.bzl%report",
                "--output_groups=+report",
                "//tests:pass",
            ],
            (_, "failing") => &["--keep_going", "//tests:fail", "//tests:pass", "//gen:one"],
            (command, targets) => unreachable!("{command} {targets}"),
        }
    }

    /// The options of the build, but for those that belong to its targets. What a version does not know is left out.
    pub(super) fn flags(&self, version: Version, url: &Urls) -> Vec<String> {
        let is_new = version == Version::Seven;
        let mut flags: Vec<String> = Vec::new();
        let mut add = |flag: &str| flags.push(flag.to_owned());
        let grpc = format!("--remote_cache={}", url.grpc);
        let disk = format!("--disk_cache={}", url.disk);
        let http = format!("--remote_cache={}", url.http);
        match self.get("cache") {
            "grpc" => add(&grpc),
            "casd" => add(&format!("--remote_cache={}", url.casd)),
            "http" => add(&http),
            "disk" => add(&disk),
            "grpc+disk" => [&grpc, &disk].into_iter().for_each(|flag| add(flag)),
            "http+disk" => [&http, &disk].into_iter().for_each(|flag| add(flag)),
            "dead" => {
                add("--remote_cache=grpc://127.0.0.1:1");
                add("--remote_retries=0");
            }
            _ => {}
        }
        match self.get("download") {
            "minimal" => add("--remote_download_minimal"),
            "toplevel" => add("--remote_download_toplevel"),
            "outputs=toplevel" if is_new => add("--remote_download_outputs=toplevel"),
            "all" if is_new => add("--remote_download_all"),
            "regex" if is_new => {
                add("--remote_download_minimal");
                add("--remote_download_regex=.*(one|top)\\.txt");
            }
            _ => {}
        }
        match self.get("upload") {
            "nowait" => add("--bes_upload_mode=nowait_for_upload_complete"),
            "async" => add("--bes_upload_mode=fully_async"),
            _ => {}
        }
        match self.get("links") {
            "custom" => add("--symlink_prefix=out-"),
            "none" => add("--symlink_prefix=/"),
            _ => {}
        }
        if self.is("modes", "writable") && is_new {
            add("--experimental_writable_outputs");
        }
        match self.get("runfiles") {
            "no-links" => add("--nobuild_runfile_links"),
            "none" => add("--noenable_runfiles"),
            _ => {}
        }
        match self.get("more") {
            "backend" => add(&url.backend),
            "paths-local" => add("--experimental_build_event_upload_strategy=local"),
            "invocation" => add("--invocation_id=aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"),
            "no-upload" => add("--noremote_upload_local_results"),
            "event-files" => {
                add("--bes_keywords=a,b");
                add("--build_metadata=A=b");
                add(&format!("--build_event_json_file={}", url.json));
            }
            "groups" => add("--output_groups=extra"),
            "unzipped" if is_new => add("--nozip_undeclared_test_outputs"),
            _ => {}
        }
        flags
    }
}

/// Where everything is that flags name.
pub(super) struct Urls {
    pub(super) grpc: String,
    pub(super) casd: String,
    pub(super) http: String,
    pub(super) disk: String,
    /// A whole flag.
    pub(super) backend: String,
    pub(super) json: String,
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (name, values)) in FACTORS.iter().enumerate() {
            let space = if number == 0 { "" } else { " " };
            write!(f, "{space}{name}:{}", values[self.0[number]])?;
        }
        Ok(())
    }
}
