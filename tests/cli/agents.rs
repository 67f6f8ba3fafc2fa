//! `outhaul mcp`, as a coding agent talks to it.

use std::process::Stdio;

use outhaul_testkit::in_time;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

use crate::support::{World, outhaul};

/// A client of the server.
struct Agent {
    child: Child,
    input: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    asked: u64,
}

impl Agent {
    /// Starts it, and says hello.
    async fn start(world: &World, args: &[&str]) -> Self {
        let mut command = outhaul();
        command
            .arg("mcp")
            .arg(world.state())
            .arg(world.cache_flag())
            .args(args);
        command.current_dir(world.dir.path());
        let mut command = Command::from(command);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut agent = Self {
            child,
            input,
            lines: BufReader::new(output).lines(),
            asked: 0,
        };
        let hello = json!({"protocolVersion": "2025-06-18", "capabilities": {},
            "clientInfo": {"name": "test", "version": "1"}});
        let answer = agent.ask("initialize", hello).await;
        assert_eq!(answer["serverInfo"]["name"], "outhaul", "{answer}");
        agent
            .send(json!({"jsonrpc": "2.0", "method": "notifications/initialized"}))
            .await;
        agent
    }

    async fn send(&mut self, message: Value) {
        self.input
            .write_all(format!("{message}\n").as_bytes())
            .await
            .unwrap();
    }

    async fn ask(&mut self, method: &str, params: Value) -> Value {
        let answer = self.answers(method, &[params]).await.remove(0);
        assert!(answer["error"].is_null(), "{answer}");
        answer["result"].clone()
    }

    /// Asks several things at once, and gives all that is answered.
    async fn answers(&mut self, method: &str, asked: &[Value]) -> Vec<Value> {
        let before = self.asked;
        for params in asked {
            self.asked += 1;
            self.send(json!({"jsonrpc": "2.0", "id": self.asked, "method": method, "params": params}))
                .await;
        }
        let mut answers = Vec::new();
        while answers.len() < asked.len() {
            let line = in_time(self.lines.next_line()).await.unwrap().expect("an answer");
            let answer: Value = serde_json::from_str(&line).expect(&line);
            let id = answer["id"].as_u64();
            if id.is_some_and(|id| before < id && id <= self.asked) {
                answers.push(answer);
            }
        }
        answers
    }

    async fn tools(&mut self) -> Vec<String> {
        let answer = self.ask("tools/list", json!({})).await;
        let tools = answer["tools"].as_array().unwrap();
        let named = |tool: &Value| {
            assert_eq!(tool["inputSchema"]["type"], "object", "{tool}");
            assert_eq!(
                tool["annotations"]["readOnlyHint"],
                tool["name"] != "get",
                "{tool}"
            );
            tool["name"].as_str().unwrap().to_owned()
        };
        tools.iter().map(named).collect()
    }

    /// What a tool answers.
    async fn call(&mut self, tool: &str, arguments: Value) -> Value {
        let mut answer = self
            .ask("tools/call", json!({"name": tool, "arguments": arguments}))
            .await;
        assert_ne!(answer["isError"], true, "{answer}");
        answer["structuredContent"].take()
    }

    /// What a tool says of what it cannot answer.
    async fn refused(&mut self, tool: &str, arguments: Value) -> String {
        let answer = self
            .ask("tools/call", json!({"name": tool, "arguments": arguments}))
            .await;
        assert_eq!(answer["isError"], true, "{answer}");
        answer["content"][0]["text"].as_str().unwrap().to_owned()
    }

    /// Hangs up.
    async fn end(self) -> Option<i32> {
        let Self { mut child, input, .. } = self;
        drop(input);
        in_time(child.wait()).await.unwrap().code()
    }
}

fn count(answer: &Value, list: &str) -> usize {
    answer[list]
        .as_array()
        .unwrap_or_else(|| panic!("{answer}"))
        .len()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_reads_what_builds_have_left_and_writes_only_where_it_may() {
    let world = World::new().await;
    let mut server = world.serve(&["--download=minimal"]).await;
    world.play(&world.build, server.address()).await;
    let id = world.build.invocation_id();
    let app = world.file("app/app").0.path.clone();
    // With a daemon, and without.
    for has_daemon in [true, false] {
        if !has_daemon {
            server.signal(Signal::TERM);
            server.end().await;
        }
        let mut agent = Agent::start(&world, &[]).await;
        assert_eq!(
            agent.tools().await,
            ["build", "builds", "outputs", "test_log", "why"]
        );
        let builds = agent.call("builds", json!({})).await;
        assert_eq!((count(&builds, "builds"), &builds["left_out"]), (1, &json!(0)));
        assert_eq!(builds["builds"][0]["invocation_id"], id);
        let none = agent.call("builds", json!({"workspace": "/none"})).await;
        assert_eq!(count(&none, "builds"), 0);

        let row = &builds["builds"][0];
        let workspace = format!("{}/", row["workspace"].as_str().unwrap());
        let of_workspace = agent.call("builds", json!({"workspace": workspace})).await;
        assert_eq!(count(&of_workspace, "builds"), 1);
        // What is not known is not passed over: the answer would be about another build.
        let error = agent.refused("build", json!({"invocation": id})).await;
        assert!(error.contains("unknown field `invocation`"), "{error}");
        // Agents ask several things at once.
        let why = |path| json!({"name": "why", "arguments": {"paths": [path]}});
        for answer in agent
            .answers("tools/call", &["/none/x", "/none/y", "/none/z"].map(why))
            .await
        {
            assert_eq!(answer["result"]["isError"], false, "{answer}");
        }

        let build = agent.call("build", json!({"invocation_id": id})).await;
        assert_eq!(build["build"]["state"], "settled", "{build}");
        assert_eq!(build["targets"][0]["label"], "//broken:broken", "{build}");
        let failed = agent
            .call(
                "build",
                json!({"invocation_id": id, "failed_only": true, "limit": 1}),
            )
            .await;
        assert_eq!(count(&failed, "targets"), 1);
        assert_eq!(failed["left_out"], 0, "{failed}");

        let all = agent.call("outputs", json!({"limit": 2})).await;
        assert_eq!(count(&all, "outputs"), 2);
        assert!(all["left_out"].as_u64() > Some(3), "{all}");
        let found = agent
            .call("outputs", json!({"targets": ["//app:app"], "path": ".*/app/app"}))
            .await;
        assert_eq!(count(&found, "outputs"), 1);
        assert_eq!(found["outputs"][0]["size"], 5_000_000, "{found}");
        let absolute = found["outputs"][0]["path"].as_str().unwrap().to_owned();
        let why = agent.call("why", json!({"paths": [absolute, "/none/x"]})).await;
        assert!(why["answers"][0]["why"].to_string().contains("known"), "{why}");
        assert_eq!(why["answers"][1]["why"][0], "no recorded build has named it");

        for (tool, arguments, part) in [
            ("build", json!({"invocation_id": "none"}), "none"),
            ("outputs", json!({"path": "("}), "path: ("),
            ("outputs", json!({"targets": ["x y"]}), "x y"),
            ("test_log", json!({"target": "//app:app"}), "//app:app"),
            ("test_log", json!({"target": "//..."}), "name one target"),
            (
                "outputs",
                json!({"invocation_id": "none", "workspace": row["workspace"]}),
                "none",
            ),
        ] {
            let said = agent.refused(tool, arguments).await;
            assert!(said.contains(part), "{tool}: {said}");
        }
        assert_eq!(agent.end().await, Some(0));
    }
    // Nothing was written.
    assert!(!world.exec_root().join(&app).exists());
    std::fs::create_dir_all(world.exec_root().join("bazel-out")).unwrap();
    let mut agent = Agent::start(&world, &["--allow-get"]).await;
    assert!(agent.tools().await.contains(&"get".to_owned()));
    let got = agent
        .call("get", json!({"invocation_id": id, "targets": ["//app:app"]}))
        .await;
    assert!(count(&got, "outputs") > 0, "{got}");
    assert!(got["outputs"][0]["error"].is_null(), "{got}");
    assert_eq!(
        std::fs::metadata(world.exec_root().join(&app)).unwrap().len(),
        5_000_000
    );
    let path = world.exec_root().join(&world.file("style.css").0.path);
    let got = agent.call("get", json!({"paths": [path, "/none/x"]})).await;
    assert_eq!(got["outputs"][0]["path"], "/none/x", "{got}");
    assert!(!got["outputs"][0]["error"].is_null() && path.exists(), "{got}");
    let said = agent
        .refused("get", json!({"invocation_id": id, "paths": ["/none/x"]}))
        .await;
    assert!(said.contains("a path says itself"), "{said}");
    let said = agent.refused("get", json!({})).await;
    assert!(said.contains("targets or paths"), "{said}");
    assert_eq!(agent.end().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_ends_nothing() {
    let world = World::new().await;
    let mut agent = Agent::start(&world, &[]).await;
    for line in [
        "{",
        "[]",
        "null",
        "{\"jsonrpc\": \"2.0\", \"id\": 99, \"method\": \"none\"}",
        "\u{0}",
    ] {
        agent
            .input
            .write_all(format!("{line}\n").as_bytes())
            .await
            .unwrap();
    }
    assert_eq!(agent.tools().await.len(), 5);
    // Nothing is recorded here.
    let said = agent.refused("builds", json!({})).await;
    assert!(said.contains("nothing is recorded"), "{said}");
    assert_eq!(agent.end().await, Some(0));
}
