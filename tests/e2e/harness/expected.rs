//! What a build must leave on disk.

use super::{
    bazel::Bazel,
    tree::{Entry, Tree},
};

/// Outputs that nobody asks for with `//...`, though other outputs are made of them; and one that Bazel 4's stream does
/// not name as long as it is a link to what is not there.
const NOT_EXPECTED: &[&str] = &["gen/middle.txt", "rules/link.real.txt", "rules/link.txt"];

/// The top-level outputs of a workspace, as Bazel itself made them.
pub(crate) struct Expected(Tree);

impl Expected {
    /// Of what a Bazel downloads or makes by itself. Fills the cache, and leaves nothing on disk.
    #[track_caller]
    pub(crate) fn of(bazel: &Bazel, targets: &[&str]) -> Self {
        let args = [&["--remote_download_toplevel"], targets].concat();
        bazel.build(&args).ok();
        let expected = Self::now(bazel);
        bazel.clean();
        expected
    }

    /// What is there now.
    #[track_caller]
    fn now(bazel: &Bazel) -> Self {
        let tree = bazel
            .bin()
            .without_runfiles()
            .only(|path| !NOT_EXPECTED.contains(&path));
        assert!(!tree.files().is_empty(), "nothing was built");
        Self(tree)
    }

    /// Those of some paths below `bazel-bin`.
    #[track_caller]
    pub(crate) fn only(&self, wanted: impl Fn(&str) -> bool) -> Self {
        let tree = self.0.only(wanted);
        assert!(!tree.files().is_empty(), "nothing is expected");
        Self(tree)
    }

    /// What a Bazel's tree lacks of them, or has otherwise.
    pub(crate) fn missing(&self, bazel: &Bazel) -> Vec<String> {
        let bin = bazel.bin();
        let found = |path: &str| bin.0.get(path).map(Entry::hash);
        // The mode depends on whether Bazel executed, and is not what is asked here.
        let wrong = self
            .0
            .0
            .iter()
            .filter(|(path, entry)| found(path) != Some(entry.hash()));
        wrong
            .map(|(path, entry)| format!("{path}: {entry:?}, found {:?}", bin.0.get(path)))
            .collect()
    }

    /// Demands all of them.
    #[track_caller]
    pub(crate) fn are_there(&self, bazel: &Bazel, log: &str) {
        let missing = self.missing(bazel);
        assert!(
            missing.is_empty(),
            "{}\nthe daemon said\n{log}",
            missing.join("\n")
        );
    }
}
