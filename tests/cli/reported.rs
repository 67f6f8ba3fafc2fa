//! Event streams as users have reported them, whose outputs must not be lost without a word.

use std::path::{Path, PathBuf};

use outhaul::embedded_cache::{EmbeddedCache, RunningCache};

use crate::support::{Ran, run};

/// A cache with the two blobs that the streams name, and an exec root.
struct Scene {
    dir: tempfile::TempDir,
    cache: RunningCache,
}

impl Scene {
    async fn new() -> Self {
        let cache = EmbeddedCache::builder().start().await.unwrap();
        cache.store().put("alpha\n");
        cache.store().put("x-ray\n");
        let dir = tempfile::tempdir().unwrap();
        let scene = Self { dir, cache };
        std::fs::create_dir_all(scene.bin()).unwrap();
        scene
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("execroot/_main")
    }

    fn bin(&self) -> PathBuf {
        self.root().join("bazel-out/k8-fastbuild/bin")
    }

    /// A build of 7.7.1 with this command and these options, which has the events.
    async fn fetch(&self, command: &str, options: &[(&str, &str)], events: &[&str], args: &[&str]) -> Ran {
        let remote_cache = self.cache.endpoint();
        let options: Vec<_> = std::iter::once(&("remote_cache", &*remote_cache))
            .chain(options)
            .map(|(name, value)| serde_json::json!({"optionName": name, "optionValue": value}))
            .collect();
        let mut lines = vec![
            serde_json::json!({"id": {"started": {}}, "started": {
                "uuid": "11111111-1111-1111-1111-111111111111", "startTimeMillis": "1700000000000",
                "buildToolVersion": "7.7.1", "command": command, "workspaceDirectory": "/ws"}}),
            serde_json::json!({"id": {"structuredCommandLine": {"commandLineLabel": "canonical"}},
                "structuredCommandLine": {"commandLineLabel": "canonical", "sections": [{
                    "sectionLabel": "command options", "optionList": {"option": options}}]}}),
            serde_json::json!({"id": {"workspace": {}}, "workspaceInfo": {"localExecRoot": self.root()}}),
            serde_json::json!({"id": {"configuration": {"id": "c"}},
                "configuration": {"mnemonic": "k8-fastbuild"}}),
        ];
        lines.extend(events.iter().map(|event| serde_json::from_str(event).unwrap()));
        lines.push(serde_json::json!({"id": {"buildFinished": {}},
            "finished": {"exitCode": {"name": "SUCCESS"}}, "lastMessage": true}));
        let file = self.dir.path().join("build.json");
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(&file, text).unwrap();
        let file = file.display().to_string();
        run(["fetch", "bep", &file].into_iter().chain(args.iter().copied())).await
    }
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A target whose outputs are those of the set `0`.
const COMPLETED: &str = r#"{"id": {"targetCompleted": {"label": "//:a", "configuration": {"id": "c"}}},
    "completed": {"success": true, "outputGroup": [{"name": "default", "fileSets": [{"id": "0"}]}]}}"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_local_file_without_a_digest_is_there_or_has_failed() {
    let scene = Scene::new().await;
    let set = r#"{"id": {"namedSet": {"id": "0"}}, "namedSetOfFiles": {"files": [
        {"pathPrefix": ["bazel-out", "k8-fastbuild", "bin"], "name": "a.txt", "length": "6",
         "digest": "b6a98d9ce9a2d9149288fa3df42d377c3e42737afdcdaf714e33c0a100b51060"},
        {"pathPrefix": ["bazel-out", "k8-fastbuild", "bin"], "name": "loc.txt",
         "uri": "file:///nowhere/bazel-out/k8-fastbuild/bin/loc.txt"}]}}"#;
    let events = [set, COMPLETED];
    let path = "bazel-out/k8-fastbuild/bin/loc.txt";
    scene
        .fetch("build", &[], &events, &[])
        .await
        .says(1, &[path, "without a digest", "1 downloaded", "1 failed"]);
    assert_eq!(text(&scene.bin().join("a.txt")), "alpha\n");
    std::fs::write(scene.bin().join("loc.txt"), "local").unwrap();
    scene
        .fetch("build", &[], &events, &[])
        .await
        .says(0, &["2 already present", "0 failed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn coverage_lies_under_its_name_on_disk() {
    let scene = Scene::new().await;
    let configured =
        r#"{"id": {"targetConfigured": {"label": "//p:t"}}, "configured": {"targetKind": "sh_test rule"}}"#;
    let completed = r#"{"id": {"targetCompleted": {"label": "//p:t", "configuration": {"id": "c"}}},
        "completed": {"success": true}}"#;
    let result = r#"{"id": {"testResult": {"label": "//p:t", "run": 1, "shard": 1, "attempt": 1,
        "configuration": {"id": "c"}}}, "testResult": {"status": "PASSED", "testActionOutput": [
        {"pathPrefix": ["bazel-out", "k8-fastbuild", "testlogs"], "name": "test.log", "contents": "bG9n"},
        {"pathPrefix": ["bazel-out", "k8-fastbuild", "testlogs"], "name": "test.lcov", "contents": "bGNvdg=="}]}}"#;
    let summary = r#"{"id": {"testSummary": {"label": "//p:t", "configuration": {"id": "c"}}},
        "testSummary": {"totalRunCount": 1, "runCount": 1}}"#;
    let report = r#"{"id": {"buildToolLogs": {}}, "buildToolLogs": {"log": [
        {"name": "command.profile.gz", "contents": "cA=="},
        {"name": "coverage_report.lcov", "contents": "cmVwb3J0"}]}}"#;
    let events = [configured, completed, result, summary, report];
    scene
        .fetch("coverage", &[], &events, &[])
        .await
        .says(0, &["3 downloaded"]);
    let out = scene.root().join("bazel-out");
    assert_eq!(text(&out.join("k8-fastbuild/testlogs/p/t/coverage.dat")), "lcov");
    assert_eq!(text(&out.join("_coverage/_coverage_report.dat")), "report");
    assert!(!out.join("k8-fastbuild/testlogs/p/t/test.lcov").exists());
}
