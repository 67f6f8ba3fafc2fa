//! Event streams as users have reported them, whose outputs must not be lost without a word.

use std::path::{Path, PathBuf};

use outhaul_testkit::{
    Ran,
    cache::{EmbeddedCache, RunningCache},
};

use crate::support::{program, run};

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

/// The two blobs as files of one set.
const BOTH: &str = r#"{"id": {"namedSet": {"id": "0"}}, "namedSetOfFiles": {"files": [
    {"pathPrefix": ["bazel-out", "k8-fastbuild", "bin"], "name": "a.txt", "length": "6",
     "digest": "b6a98d9ce9a2d9149288fa3df42d377c3e42737afdcdaf714e33c0a100b51060"},
    {"pathPrefix": ["bazel-out", "k8-fastbuild", "bin"], "name": "x.txt", "length": "6",
     "digest": "709852962943fd585fb8a80ea818fbb1011142c3fb3b5d5cbd5f556d0d654fa9"}]}}"#;

#[tokio::test(flavor = "multi_thread")]
async fn one_odd_option_of_the_builds_does_not_cost_the_cache() {
    let scene = Scene::new().await;
    let port = scene.cache.endpoint().rsplit_once(':').unwrap().1.to_owned();
    let with_user = format!("grpc://user:s3cret@127.0.0.1:{port}");
    let workspace = r#"{"id": {"started": {}}, "started": {"uuid": "11111111-1111-1111-1111-111111111111",
        "command": "build", "workspaceDirectory": "/ws"}}"#;
    for (option, reported) in [
        (("remote_header", "<REDACTED>"), "redacted"),
        (
            ("remote_header", "authorization=<REDACTED>"),
            "--remote_header=authorization",
        ),
        (("remote_cache_header", "grpc-timeout=1"), "reserved for gRPC"),
        (("credential_helper", "example.com/team=/bin/cred"), ""),
        (
            ("credential_helper", "tools/cred"),
            "--credential-helper=tools/cred",
        ),
        (("remote_cache", with_user.as_str()), ""),
        (("tls_certificate", "/nonexistent/ca.pem"), ""),
    ] {
        let _ = std::fs::remove_dir_all(scene.bin());
        let ran = scene
            .fetch("build", &[option], &[workspace, BOTH, COMPLETED], &[])
            .await;
        let ran = ran.says(0, &["2 downloaded", "0 failed", reported]);
        assert!(!ran.err.contains("s3cret"), "{}", ran.err);
        assert_eq!(text(&scene.bin().join("x.txt")), "x-ray\n", "{option:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_socket_leads_to_the_cache_whatever_its_address() {
    let scene = Scene::new().await;
    let socket = scene.dir.path().join("cache.sock");
    let cache = EmbeddedCache::builder()
        .bind(format!("unix:{}", socket.display()))
        .start()
        .await
        .unwrap();
    cache.store().put("alpha\n");
    cache.store().put("x-ray\n");
    let proxy = format!("unix:{}", socket.display());
    let options = [
        ("remote_cache", "grpc://cache.invalid:1234"),
        ("remote_proxy", &*proxy),
    ];
    scene
        .fetch("build", &options, &[BOTH, COMPLETED], &[])
        .await
        .says(0, &["2 downloaded"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_on_disk_is_present_without_any_cache_and_the_rest_says_why_not() {
    let scene = Scene::new().await;
    std::fs::write(scene.bin().join("a.txt"), "alpha\n").unwrap();
    for (option, reported) in [
        (("remote_cache", ""), "--remote_executor"),
        (("remote_cache", "http://127.0.0.1:1/cache?x"), "query"),
        (("remote_cache", "ftp://h"), "unknown scheme"),
    ] {
        let events = [BOTH, COMPLETED];
        scene
            .fetch("build", &[option], &events, &[])
            .await
            .says(1, &["1 already present", "1 failed", "bin/x.txt", reported]);
    }
    std::fs::write(scene.bin().join("x.txt"), "x-ray\n").unwrap();
    scene
        .fetch("build", &[("remote_cache", "")], &[BOTH, COMPLETED], &[])
        .await
        .says(0, &["2 already present", "0 failed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_the_cache_lacks_comes_from_the_builds_disk_cache() {
    let scene = Scene::new().await;
    let hash = "709852962943fd585fb8a80ea818fbb1011142c3fb3b5d5cbd5f556d0d654fa9";
    let disk = scene.dir.path().join("disk");
    std::fs::create_dir_all(disk.join("cas/70")).unwrap();
    std::fs::write(disk.join("cas/70").join(hash), "x-ray\n").unwrap();
    scene.cache.store().clear();
    scene.cache.store().put("alpha\n");
    let disk = disk.display().to_string();
    scene
        .fetch("build", &[("disk_cache", &*disk)], &[BOTH, COMPLETED], &[])
        .await
        .says(0, &["2 downloaded"]);
    // Wrong bytes in it do no harm.
    std::fs::write(format!("{disk}/cas/70/{hash}"), "wrong\n").unwrap();
    scene.cache.store().put("x-ray\n");
    std::fs::remove_dir_all(scene.bin()).unwrap();
    scene
        .fetch("build", &[("disk_cache", &*disk)], &[BOTH, COMPLETED], &[])
        .await
        .says(0, &["2 downloaded"]);
    assert_eq!(text(&scene.bin().join("x.txt")), "x-ray\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_helper_of_the_workspace_is_run_and_a_refusal_names_what_was_left_out() {
    let scene = Scene::new().await;
    let workspace = scene.dir.path().join("ws");
    std::fs::create_dir_all(workspace.join("tools")).unwrap();
    let helper = workspace.join("tools/cred.sh");
    program(
        &helper,
        "#!/bin/sh\necho '{\"headers\": {\"x-key\": [\"s3cret-key\"]}}'\n",
    );
    scene.cache.require_header(Some(("x-key", "s3cret-key")));
    let started = serde_json::json!({"id": {"started": {}}, "started": {
        "uuid": "11111111-1111-1111-1111-111111111111", "command": "build", "workspaceDirectory": workspace}});
    let events = [&*started.to_string(), BOTH, COMPLETED];
    let redacted = ("remote_header", "x-key=<REDACTED>");
    let refused = scene.fetch("build", &[redacted], &events, &[]).await;
    let refused = refused.says(1, &["2 failed", "--remote_header=x-key", "give --remote-header"]);
    assert!(!refused.err.contains("s3cret"), "{}", refused.err);
    let helped = [redacted, ("credential_helper", "%workspace%/tools/cred.sh")];
    scene
        .fetch("build", &helped, &events, &[])
        .await
        .says(0, &["2 downloaded"]);
}
