//! Where a test's files belong.
//!
//! Events name them symbolically (`test.log`, `test.outputs__outputs.zip`). On disk they lie below
//! `bazel-out/<configuration>/testlogs/<package>/<target>/`, in `shard_I_of_N`, `run_J_of_M` or `shard_I_of_N_run_J_of_M`
//! where there is more than one of either; the last attempt has the plain names, earlier ones lie in `test_attempts/`
//! (measured with Bazel 4.2.3 and 7.7.1). How many shards and runs there are, and which attempt was the last, is only
//! known once the test's summary has come.

use std::collections::HashMap;

use super::runfiles::parts_of;
use crate::{
    bep::event::{Content, File, TestResult},
    digest::Digest,
};

/// How many of each a test had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct TestShape {
    pub(super) shards: u32,
    pub(super) runs: u32,
}

impl TestShape {
    /// What the summary says, or else what the results show.
    pub(super) fn of(results: &[TestResult], shards: u32, runs: u32) -> Self {
        let most = |count: fn(&TestResult) -> u32| results.iter().map(count).max().unwrap_or(0);
        Self {
            shards: shards.max(most(|r| r.shard)),
            runs: runs.max(most(|r| r.run)),
        }
    }
}

/// The number of the last attempt of each shard and run.
pub(super) fn last_attempts(results: &[TestResult]) -> HashMap<(u32, u32), u32> {
    let mut last = HashMap::new();
    for result in results {
        let attempt: &mut u32 = last.entry((result.shard, result.run)).or_default();
        *attempt = (*attempt).max(result.attempt);
    }
    last
}

/// The exec path of a test's file; `None` for one that has no place that we know of. `siblings` is whether outputs of other
/// repositories lie beside those of the main one (`--experimental_sibling_repository_layout`).
pub(super) fn exec_path(
    file: &File,
    result: &TestResult,
    shape: TestShape,
    last_attempt: bool,
    mnemonic: Option<&str>,
    siblings: bool,
) -> Option<String> {
    let (repository, package, name) = parts_of(&result.label)?;
    let below = below(package, name);
    let mut path = if file.has_prefix() {
        let testlogs = file.path.get(..file.prefix_len)?;
        if siblings || repository.is_empty() {
            format!("{testlogs}/{below}")
        } else {
            format!("{testlogs}/external/{repository}/{below}")
        }
    } else {
        path_of_target(&result.label, mnemonic?, "testlogs", siblings)?
    };
    let mut part = String::new();
    if shape.shards > 1 {
        part = format!("shard_{}_of_{}", result.shard, shape.shards);
    }
    if shape.runs > 1 {
        if !part.is_empty() {
            part.push('_');
        }
        part.push_str(&format!("run_{}_of_{}", result.run, shape.runs));
    }
    if !part.is_empty() {
        path.push('/');
        path.push_str(&part);
    }
    path.push('/');
    let name = file.name();
    if last_attempt {
        path.push_str(&file_name(name)?);
    } else {
        // Bazel moves these two; where the rest of an earlier attempt goes depends on its version.
        let extension = name
            .strip_prefix("test.")
            .filter(|e| matches!(*e, "log" | "xml"))?;
        path.push_str(&format!("test_attempts/attempt_{}.{extension}", result.attempt));
    }
    Some(path)
}

/// The empty file by which a shard has said that it knows of shards. No event names it, but it is an output like the others,
/// of which one names the digest function. Bazel 7 lets no test pass without it, by default; of an older one
/// it may be a file too many, which does no harm.
pub(super) fn shard_mark(result: &TestResult, shape: TestShape) -> Option<File> {
    let like = result
        .files
        .first()
        .filter(|_| result.passed && shape.shards > 1)?;
    let Content::Blob(digest) = &like.content else {
        return None;
    };
    let name = "test.shard";
    Some(File {
        path: match like
            .path
            .get(..like.prefix_len)
            .filter(|prefix| !prefix.is_empty())
        {
            Some(prefix) => format!("{prefix}/{name}").into(),
            None => name.into(),
        },
        prefix_len: like.prefix_len,
        content: Content::Blob(Digest::of(digest.function(), b"")),
        uri: None,
    })
}

/// Where a target's own file or directory lies, in a directory of the output tree such as `bin`.
pub(super) fn path_of_target(label: &str, mnemonic: &str, directory: &str, siblings: bool) -> Option<String> {
    let (repository, package, name) = parts_of(label)?;
    let below = below(package, name);
    Some(match repository {
        "" => format!("bazel-out/{mnemonic}/{directory}/{below}"),
        _ if siblings => format!("bazel-out/{repository}/{mnemonic}/{directory}/{below}"),
        _ => format!("bazel-out/{mnemonic}/{directory}/external/{repository}/{below}"),
    })
}

/// The directory of a target in its repository.
fn below(package: &str, name: &str) -> String {
    match package {
        "" => name.to_owned(),
        package => format!("{package}/{name}"),
    }
}

/// The symbolic names whose file is called otherwise (Bazel's `TestFileNameConstants` and `TestRunnerAction`, the same in
/// 4.2.3 and 7.7.1).
const CALLED_OTHERWISE: &[(&str, &str)] = &[
    ("test.lcov", "coverage.dat"),
    ("test.stderr", "test.err"),
    ("test.splitlogs", "test.raw_splitlogs/test.splitlogs"),
    ("baseline.lcov", "baseline_coverage.dat"),
];

/// The symbolic name's place below the test's directory.
fn file_name(name: &str) -> Option<String> {
    if let Some((_, file)) = CALLED_OTHERWISE.iter().find(|(symbol, _)| *symbol == name) {
        return Some((*file).to_owned());
    }
    for directory in ["test.outputs", "test.outputs_manifest"] {
        if let Some(below) = name
            .strip_prefix(directory)
            .and_then(|rest| rest.strip_prefix("__"))
        {
            return Some(format!("{directory}/{below}"));
        }
    }
    (name.starts_with("test.") || name == "baseline_coverage.dat").then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bep::event::Content;

    fn file(name: &str) -> File {
        File {
            path: name.into(),
            prefix_len: 0,
            content: Content::Unknown,
            uri: None,
        }
    }

    fn result(label: &str, shard: u32, run: u32, attempt: u32) -> TestResult {
        TestResult {
            label: label.to_owned(),
            shard,
            run,
            attempt,
            ..TestResult::default()
        }
    }

    fn place(name: &str, result: &TestResult, shards: u32, runs: u32, last: bool) -> Option<String> {
        exec_path(
            &file(name),
            result,
            TestShape { shards, runs },
            last,
            Some("k8"),
            false,
        )
    }

    #[test]
    fn files_lie_where_bazel_puts_them() {
        let t = result("//a/b:t", 1, 2, 1);
        for (name, shards, runs, last, expected) in [
            ("test.log", 0, 1, true, "test.log"),
            ("test.xml", 1, 1, true, "test.xml"),
            ("test.log", 2, 1, true, "shard_1_of_2/test.log"),
            ("test.log", 0, 3, true, "run_2_of_3/test.log"),
            ("test.xml", 2, 3, true, "shard_1_of_2_run_2_of_3/test.xml"),
            (
                "test.log",
                2,
                1,
                false,
                "shard_1_of_2/test_attempts/attempt_1.log",
            ),
            (
                "test.outputs__outputs.zip",
                0,
                1,
                true,
                "test.outputs/outputs.zip",
            ),
            (
                "test.outputs_manifest__MANIFEST",
                0,
                1,
                true,
                "test.outputs_manifest/MANIFEST",
            ),
            ("test.outputs/x/y.txt", 0, 1, true, "test.outputs/x/y.txt"),
            ("test.outputs", 0, 1, true, "test.outputs"),
            ("test.lcov", 0, 1, true, "coverage.dat"),
            ("test.lcov", 2, 1, true, "shard_1_of_2/coverage.dat"),
            ("test.stderr", 0, 1, true, "test.err"),
            ("test.splitlogs", 0, 1, true, "test.raw_splitlogs/test.splitlogs"),
            ("baseline.lcov", 0, 1, true, "baseline_coverage.dat"),
            ("test.warnings", 0, 1, true, "test.warnings"),
            (
                "test.infrastructure_failure",
                0,
                1,
                true,
                "test.infrastructure_failure",
            ),
        ] {
            let expected = format!("bazel-out/k8/testlogs/a/b/t/{expected}");
            assert_eq!(place(name, &t, shards, runs, last), Some(expected), "{name}");
        }
        assert_eq!(place("test.outputs__outputs.zip", &t, 0, 1, false), None);
        assert_eq!(place("elsewhere", &t, 0, 1, true), None);
    }

    #[test]
    fn a_shard_that_passed_has_said_that_it_knows_of_shards() {
        let log = Digest::of(crate::digest::DigestFunction::Blake3, b"log");
        let mut passed = result("//a:t", 2, 1, 1);
        passed.passed = true;
        passed.files = vec![File {
            content: Content::Blob(log.clone()),
            ..file("test.log")
        }];
        let shape = |shards| TestShape { shards, runs: 1 };
        let mark = shard_mark(&passed, shape(3)).unwrap();
        let empty = Digest::of(log.function(), b"");
        assert_eq!((&*mark.path, mark.content), ("test.shard", Content::Blob(empty)));
        assert_eq!(shard_mark(&passed, shape(1)), None);
        let mut prefixed = passed.clone();
        prefixed.files[0].path = "bazel-out/k8/testlogs/test.log".into();
        prefixed.files[0].prefix_len = "bazel-out/k8/testlogs".len();
        let mark = shard_mark(&prefixed, shape(2)).unwrap();
        let path = exec_path(&mark, &prefixed, shape(2), true, None, false);
        assert_eq!(path.unwrap(), "bazel-out/k8/testlogs/a/t/shard_2_of_2/test.shard");
        passed.passed = false;
        assert_eq!(shard_mark(&passed, shape(3)), None);
    }

    #[test]
    fn packages_and_repositories_become_directories() {
        for (label, expected) in [
            ("//:t", "t"),
            ("//a", "a/a"),
            ("@r//p:t", "external/r/p/t"),
            ("@@r~1//:t", "external/r~1/t"),
        ] {
            let path = place("test.log", &result(label, 0, 1, 1), 0, 1, true);
            assert_eq!(path, Some(format!("bazel-out/k8/testlogs/{expected}/test.log")));
        }
    }

    #[test]
    fn with_sibling_repositories_each_has_directories_of_its_own() {
        for (label, expected) in [
            ("//p:t", "k8/testlogs/p/t"),
            ("@@r~//p:t", "r~/k8/testlogs/p/t"),
            ("@r//:t", "r/k8/testlogs/t"),
        ] {
            let result = result(label, 0, 1, 1);
            let shape = TestShape::default();
            let path = exec_path(&file("test.log"), &result, shape, true, Some("k8"), true);
            assert_eq!(path, Some(format!("bazel-out/{expected}/test.log")));
        }
    }

    #[test]
    fn a_prefix_of_the_events_own_is_used() {
        let file = File {
            path: "bazel-out/k8-opt/testlogs/test.log".into(),
            prefix_len: "bazel-out/k8-opt/testlogs".len(),
            content: Content::Unknown,
            uri: None,
        };
        let path = exec_path(
            &file,
            &result("//a:t", 0, 1, 1),
            TestShape::default(),
            true,
            None,
            false,
        );
        assert_eq!(path.as_deref(), Some("bazel-out/k8-opt/testlogs/a/t/test.log"));
    }

    #[test]
    fn the_last_attempt_is_that_of_its_own_shard_and_run() {
        let results = [
            result("//a", 1, 1, 1),
            result("//a", 1, 1, 2),
            result("//a", 2, 1, 1),
        ];
        assert_eq!(last_attempts(&results), HashMap::from([((1, 1), 2), ((2, 1), 1)]));
        assert_eq!(TestShape::of(&results, 0, 0), TestShape { shards: 2, runs: 1 });
    }
}
