//! `outhaul run`: its Bazel leaves on disk what it would have left alone, whatever it is configured to.

use std::{
    collections::HashMap,
    os::unix::fs::symlink,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Bytes,
    extract::{Path as UrlPath, State},
    http::StatusCode,
    routing::get,
};
use outhaul_testkit::{Ran, Running};

use crate::harness::{
    Bazel, Cache, CacheKind, Daemon, Outhaul, Scratch, Stage, Tree, Upstream, Version, cache_hits, executed,
};

for_each_bazel!(embedded:
    nothing_is_missing_with_any_kind_of_cache,
    a_disk_cache_is_where_bazel_has_it,
    a_backend_of_the_rc_files_gets_every_event,
    what_a_backend_has_not_got_is_sent_by_the_next_run,
    what_is_asked_of_bazel_costs_the_build_nothing,
    programs_that_call_bazel_have_their_builds_brought,
    what_was_run_can_be_staged_and_exported,
    a_backend_is_heard_whatever_an_option_implies,
    what_is_missing_is_said_every_time,
    what_tests_are_built_with_is_brought_without_running_them_again,
    an_upload_that_only_outhaul_wants_fails_no_build,
);

for_each_bazel!(casd with 4 rarely: nothing_is_missing_with_any_kind_of_cache);
for_each_bazel!(nginx:
    an_http_cache_that_is_down_costs_the_build_nothing,
    what_an_http_cache_has_lost_is_built_again,
);

/// `outhaul run` of a Bazel's command.
fn wrapped(outhaul: &Outhaul, bazel: &Bazel, flags: &[&str], command: &str, args: &[&str]) -> Ran {
    let mut all: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
    all.push("--".to_owned());
    all.extend(bazel.command_line(command));
    all.extend(args.iter().map(|arg| (*arg).to_owned()));
    outhaul.run(bazel.workspace(), "run", &all)
}

/// A cache behind HTTP, as Bazel wants it.
fn http_cache(runtime: &tokio::runtime::Runtime) -> String {
    type Blobs = Arc<Mutex<HashMap<String, Bytes>>>;
    async fn load(State(blobs): State<Blobs>, UrlPath(path): UrlPath<String>) -> Result<Bytes, StatusCode> {
        blobs
            .lock()
            .unwrap()
            .get(&path)
            .cloned()
            .ok_or(StatusCode::NOT_FOUND)
    }
    async fn store(State(blobs): State<Blobs>, UrlPath(path): UrlPath<String>, body: Bytes) {
        blobs.lock().unwrap().insert(path, body);
    }
    let app = Router::new()
        .route("/{*path}", get(load).put(store))
        .layer(axum::extract::DefaultBodyLimit::disable())
        .with_state(Blobs::default());
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(async move { axum::serve(listener, app).await });
    format!("http://{address}")
}

fn nothing_is_missing_with_any_kind_of_cache(stage: &Stage) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let outhaul = Outhaul::new();
    let dir = Scratch::new("disk-cache");
    let grpc = format!("--remote_cache={}", cache.url());
    let nginx = CacheKind::Nginx
        .is_there()
        .then(|| Cache::start(CacheKind::Nginx));
    let base = nginx
        .as_ref()
        .map_or_else(|| http_cache(&runtime), |nginx| nginx.url().to_owned());
    let http = |path: &str| format!("--remote_cache={base}/{path}");
    let disk = |name: &str| format!("--disk_cache={}", dir.join(name).display());
    let (http_1, http_2, disk_1, disk_2) = (http("1"), http("2"), disk("1"), disk("2"));
    let targets = ["//:all", "//gen:all", "//rules:all"];
    for flags in [
        vec![grpc.as_str()],
        vec![&http_1],
        vec![&disk_1],
        vec![&grpc, &disk_1],
        vec![&http_2, &disk_2],
        vec![],
    ] {
        let args = [&targets[..], &flags[..]].concat();
        let alone = |command: &str| {
            let mut line = bazel.command_line(command);
            let program = line.remove(0);
            let mut process = std::process::Command::new(program);
            process
                .args(line)
                .args(if command == "clean" { &[][..] } else { &args[..] });
            process.current_dir(bazel.workspace());
            Running::start(process).wait().ok()
        };
        // What is there already goes into no cache.
        alone("clean");
        alone("build");
        alone("clean");
        alone("build");
        let expected = bazel.bin();
        alone("clean");
        let run = wrapped(&outhaul, &bazel, &[], "build", &args).ok();
        assert_eq!(
            expected.differences(&bazel.bin()),
            Vec::<String>::new(),
            "{flags:?}: {run}"
        );
        assert!(!run.err.contains("received no events of"), "{run}");
        let takes_over = stage.version == Version::Seven && !flags.is_empty();
        let brought = run.err.contains("outhaul: 0 downloaded");
        assert_eq!(!brought, takes_over, "who downloads; {run}");
        // What is run must be there while Bazel still runs.
        alone("clean");
        let run = wrapped(
            &outhaul,
            &bazel,
            &[],
            "run",
            &[&flags[..], &["//gen:tool"]].concat(),
        )
        .ok();
        assert!(run.out().ends_with("tool\n"), "{run}");
        // With a cache that Bazel fills as it goes, and again when that has all of it.
        if let [first, ..] = *flags
            && first != grpc
        {
            let fresh: Vec<String> = flags.iter().map(|flag| format!("{flag}/fresh")).collect();
            let fresh: Vec<&str> = fresh.iter().map(String::as_str).collect();
            for _ in 0..2 {
                alone("clean");
                let run = wrapped(
                    &outhaul,
                    &bazel,
                    &["--strict"],
                    "build",
                    &[&targets[..], &fresh].concat(),
                )
                .ok();
                assert_eq!(
                    lacking(&expected, &bazel),
                    Vec::<String>::new(),
                    "{fresh:?}: {run}"
                );
            }
        }
    }
}

/// What is not as expected, but for what Bazel leaves in addition when it executes actions.
fn lacking(expected: &Tree, bazel: &Bazel) -> Vec<String> {
    let mut differences = expected.differences(&bazel.bin());
    differences.retain(|line| !line.starts_with("+ "));
    differences
}

/// Bazel builds what it cannot get, and fails no build for that.
fn an_http_cache_that_is_down_costs_the_build_nothing(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let outhaul = Outhaul::new();
    let http = format!("--remote_cache={}", cache.url());
    let args = ["//:all", "//gen:all", &http];
    wrapped(&outhaul, &bazel, &["--strict"], "build", &args).ok();
    let expected = bazel.bin();
    cache.kill();
    bazel.clean();
    let run = wrapped(&outhaul, &bazel, &["--strict"], "build", &args).ok();
    assert_eq!(executed(&run), 9, "{run}");
    assert_eq!(lacking(&expected, &bazel), Vec::<String>::new(), "{run}");
    let is_reported =
        run.err.contains("Bazel downloads outputs itself") && run.err.contains("failed to reach the server");
    assert_eq!(is_reported, stage.version == Version::Seven, "{run}");
}

/// Not where the system would look for it: `..` does not ask what stands before it.
fn a_disk_cache_is_where_bazel_has_it(stage: &Stage) {
    let bazel = Bazel::new(stage.version, "");
    let outhaul = Outhaul::new();
    let dir = Scratch::new("disk-cache");
    let targets = ["//:all", "//gen:all"];
    for (number, path) in ["../rel ative", "nowhere/../here", "~/../../../../../.."]
        .into_iter()
        .enumerate()
    {
        let path = match number {
            2 => format!("{path}{}", dir.join("home").display()),
            _ => path.to_owned(),
        };
        let flag = format!("--disk_cache={path}");
        let args = [&targets[..], &[&flag]].concat();
        // What is made only for others comes from the cache the second time, and stays there.
        for _ in 0..2 {
            bazel.clean();
            wrapped(&outhaul, &bazel, &["--keep-download-mode"], "build", &args).ok();
        }
        let expected = bazel.bin();
        bazel.clean();
        let run = wrapped(&outhaul, &bazel, &["--strict"], "build", &args).ok();
        assert!(
            !run.err.contains("running the command once more"),
            "{path}: {run}"
        );
        assert_eq!(lacking(&expected, &bazel), Vec::<String>::new(), "{path}: {run}");
        let brought = !run.err.contains("outhaul: 0 downloaded");
        assert_eq!(brought, stage.version == Version::Seven, "who downloads; {run}");
    }
    assert!(dir.join("home/cas").is_dir());
}

/// Bazel takes an HTTP cache's word for the results that it has. Alone it builds those whose outputs it fails to download.
fn what_an_http_cache_has_lost_is_built_again(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let outhaul = Outhaul::new();
    let http = format!("--remote_cache={}", cache.url());
    let args = ["//:all", "//gen:one", "//gen:many", "//rules:nested", &http];
    let strict = &["--strict"];
    wrapped(&outhaul, &bazel, strict, "build", &args).ok();
    bazel.clean();
    wrapped(&outhaul, &bazel, strict, "build", &args).ok();
    let expected = bazel.bin();
    bazel.clean();
    cache.lose_blobs();
    let run = wrapped(&outhaul, &bazel, strict, "build", &args).ok();
    assert_eq!(lacking(&expected, &bazel), Vec::<String>::new(), "{run}");
    let again = "running the command once more, so that Bazel";
    assert_eq!(run.err.contains(again), stage.version == Version::Seven, "{run}");
    // The next build finds nothing to do, and a program runs once.
    let run = wrapped(&outhaul, &bazel, strict, "build", &args).ok();
    assert!(!run.err.contains(again), "{run}");
    bazel.clean();
    cache.lose_blobs();
    let run = wrapped(&outhaul, &bazel, strict, "run", &["//gen:tool", &http]).ok();
    assert_eq!(run.out(), "tool\n", "{run}");
}

/// Bazel has found all outputs in the cache, which has lost them since.
fn what_tests_are_built_with_is_brought_without_running_them_again(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let outhaul = Outhaul::new();
    let args = ["//tests:pass", "//gen:all", "//rules:nested"];
    bazel.test(&args).ok();
    let expected = bazel.bin();
    bazel.clean();
    bazel
        .test(&[&args[..], &["--remote_download_minimal"]].concat())
        .ok();
    cache.embedded().store().clear();
    let events = bazel.path("events.json").display().to_string();
    let events = format!("--build_event_json_file={events}");
    let grpc = format!("--remote_cache={}", cache.url());
    let run = wrapped(
        &outhaul,
        &bazel,
        &[],
        "test",
        &[&args[..], &[&grpc, &events]].concat(),
    );
    let is_ours = stage.version == Version::Seven;
    assert_eq!(
        run.err
            .contains("running the command once more without its tests"),
        is_ours,
        "{run}"
    );
    if !is_ours {
        return;
    }
    assert_eq!(run.code, Some(0), "{run}");
    assert_eq!(lacking(&expected, &bazel), Vec::<String>::new(), "{run}");
    assert!(!run.err.contains("still missing"), "{run}");
    assert!(bazel.text("events.json").contains("\"testSummary\""), "{run}");
}

fn a_backend_of_the_rc_files_gets_every_event(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let outhaul = Outhaul::new();
    let grpc = format!("--remote_cache={}", cache.url());
    let own = std::fs::read_to_string(bazel.workspace().join(".bazelrc")).unwrap();
    for mode in [
        "wait_for_upload_complete",
        "nowait_for_upload_complete",
        "fully_async",
    ] {
        let upstream = Upstream::start();
        let backend = upstream.flag().replace("--bes-backend", "--bes_backend");
        let extra = "\ntry-import %workspace%/more.bazelrc\nbuild:linux --bes_keywords=seen\n\
                     build --enable_platform_specific_config\n";
        bazel.write(".bazelrc", &format!("{own}{extra}"));
        bazel.write(
            "more.bazelrc",
            &format!(
                "build:ci --config=inner\nbuild:inner {backend} --bes_upload_mode={mode} --bes_timeout=60s\n"
            ),
        );
        bazel.clean();
        let id = format!("11111111-2222-3333-4444-{:012}", mode.len());
        let id_flag = format!("--invocation_id={id}");
        wrapped(
            &outhaul,
            &bazel,
            &["--strict"],
            "build",
            &["//:all", &grpc, "--config=ci", &id_flag],
        )
        .ok();
        assert_eq!(bazel.text("bazel-bin/a.txt"), "this is a\n", "{mode}");
        upstream.complete(&id, String::new);
    }
}

fn what_a_backend_has_not_got_is_sent_by_the_next_run(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let outhaul = Outhaul::new();
    let mut upstream = Upstream::start();
    let backend = upstream.flag().replace("--bes-backend", "--bes_backend");
    let id = "11111111-2222-3333-4444-555555555555";
    let id_flag = format!("--invocation_id={id}");
    upstream.go_down();
    let run = wrapped(
        &outhaul,
        &bazel,
        &["--hold-timeout=3s"],
        "build",
        &["//:a", &backend, &id_flag],
    )
    .ok();
    assert!(run.err.contains("has not received all events of"), "{run}");
    let strict = &["--strict", "--hold-timeout=3s"];
    let run = wrapped(&outhaul, &bazel, strict, "build", &["//:a", &backend]);
    assert_eq!(run.code, Some(45), "{run}");
    upstream.come_back();
    assert!(upstream.invocations().is_empty());
    wrapped(&outhaul, &bazel, &[], "build", &["//:b", &backend]).ok();
    upstream.complete(id, String::new);
    assert_eq!(upstream.invocations().len(), 3, "{:?}", upstream.invocations());
}

/// Commands whose options Bazel reports in an unusual way, or before which it wants something.
fn a_backend_is_heard_whatever_an_option_implies(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let outhaul = Outhaul::new();
    let upstream = Upstream::start();
    let own = std::fs::read_to_string(bazel.workspace().join(".bazelrc")).unwrap();
    let backend = upstream.flag().replace("--bes-backend", "--bes_backend");
    bazel.write(".bazelrc", &format!("{own}\nbuild {backend}\n"));
    let grpc = format!("--remote_cache={}", cache.url());
    let downloader = format!("--experimental_remote_downloader={}", cache.url());
    for (number, (command, args)) in [
        ("test", vec!["--test_output=streamed", "//tests:pass"]),
        ("build", vec![&*grpc, &*downloader, "//:a"]),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("11111111-2222-3333-4444-{number:012}");
        let id_flag = format!("--invocation_id={id}");
        let args = [&args[..], &[id_flag.as_str()]].concat();
        let run = wrapped(&outhaul, &bazel, &["--strict"], command, &args).ok();
        assert!(!run.err.contains("failed to determine Bazel's options"), "{run}");
        upstream.complete(&id, String::new);
    }
}

/// Failures are reported, and fail a strict command, whether or not Bazel waits for the answer to its last event.
fn what_is_missing_is_said_every_time(stage: &Stage) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let outhaul = Outhaul::new();
    let http = format!("--remote_cache={}", http_cache(&runtime));
    // What is named without a digest, and Bazel leaves out.
    let (command, target) = match stage.version {
        Version::Seven => ("test", "//tests:pass"),
        _ => ("build", "//gen:all"),
    };
    let args = [target, &http, "--remote_download_minimal"];
    wrapped(&outhaul, &bazel, &[], command, &args[..2]).ok();
    for _ in 0..12 {
        bazel.clean();
        let run = wrapped(&outhaul, &bazel, &["--strict"], command, &args);
        assert_eq!(run.code, Some(45), "{run}");
        assert!(
            !run.err.contains(" 0 failed") && run.err.contains(" failed, "),
            "{run}"
        );
        assert!(run.err.contains("before version 7 no digests at all"), "{run}");
    }
}

/// Bazel uploads what its events name wherever they go to. Alone it would not have tried.
fn an_upload_that_only_outhaul_wants_fails_no_build(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let outhaul = Outhaul::new();
    // One that is only a cache.
    let executor = format!("--remote_executor={}", cache.url());
    let args = ["//gen:all", &executor, "--remote_retries=0"];
    let mut line = bazel.command_line("build");
    let mut process = std::process::Command::new(line.remove(0));
    process.args(line).args(args).current_dir(bazel.workspace());
    let alone = Running::start(process).wait();
    bazel.clean();
    let run = wrapped(&outhaul, &bazel, &[], "build", &args);
    assert_eq!(run.code, alone.code, "{alone}{run}");
    bazel.clean();
    let run = wrapped(
        &outhaul,
        &bazel,
        &[],
        "run",
        &["//gen:tool", &executor, "--remote_retries=0"],
    );
    assert!(alone.code != Some(0) || run.out().ends_with("tool\n"), "{run}");
    // A program's own exit code says nothing of uploads: it does not run again.
    let rules = std::fs::read_to_string(bazel.workspace().join("gen/BUILD")).unwrap();
    let cmd = "printf '#!/bin/sh\\necho ran\\nexit 38\\n' > $@";
    let odd = format!("genrule(name = 'odd', outs = ['odd.sh'], executable = True, cmd = {cmd:?})");
    bazel.write("gen/BUILD", &format!("{rules}\n{odd}\n"));
    let run = wrapped(&outhaul, &bazel, &[], "run", &["//gen:odd"]);
    assert_eq!(
        (run.code, run.out().matches("ran").count()),
        (Some(38), 1),
        "{run}"
    );
    // Nor does a command that Bazel does not begin take any longer.
    let begun = Instant::now();
    let run = wrapped(&outhaul, &bazel, &[], "build", &["//gen:all", "--nosuchoption"]);
    assert_eq!(run.code, Some(2), "{run}");
    assert!(begun.elapsed() < Duration::from_secs(8), "{run}");
    assert!(!run.err.contains("outhaul: "), "{run}");
}

fn what_is_asked_of_bazel_costs_the_build_nothing(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let outhaul = Outhaul::new();
    let grpc = format!("--remote_cache={}", cache.url());
    let dir = Scratch::new("files");
    let file = |name: &str| dir.join(name).display().to_string();
    wrapped(&outhaul, &bazel, &[], "build", &["//gen:all", &grpc]).ok();
    // The server that runs now is asked by `doctor` as well.
    let doctor = || {
        let line = bazel.command_line("build");
        let line = line.iter().map(String::as_str);
        let all: Vec<&str> = std::iter::once("--")
            .chain(line)
            .chain(["//gen:all", &grpc])
            .collect();
        let found = outhaul.json(bazel.workspace(), "doctor", &all);
        let level = |code: &str| {
            found
                .iter()
                .find(|finding| finding["code"] == code)
                .map(|f| f["level"].clone())
        };
        (level("bazel-options"), level("output-base"), level("cache"))
    };
    let ok = Some("ok".into());
    assert_eq!(doctor(), (ok.clone(), ok.clone(), ok.clone()));
    let names = ["profile", "log", "explain", "events"];
    let flags = [
        format!("--profile={}", file("profile")),
        format!("--execution_log_json_file={}", file("log")),
        format!("--explain={}", file("explain")),
        format!("--build_event_json_file={}", file("events")),
    ];
    let mut args = vec!["//gen:all", &grpc];
    args.extend(flags.iter().map(String::as_str));
    let run = wrapped(&outhaul, &bazel, &[], "build", &args).ok();
    assert!(
        run.err.contains("(0 packages loaded, 0 targets configured)"),
        "{run}"
    );
    assert_eq!(executed(&run) + cache_hits(&run), 0, "{run}");
    for name in names {
        assert!(dir.join(name).is_file(), "{name}");
        std::fs::remove_file(dir.join(name)).unwrap();
    }
    // One that is asked, and does not build: nothing is written.
    let probing = Scratch::new("probing");
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in --version|*/dev/null/outhaul*) exec {} \"$@\";; esac\n",
        bazel.command_line("build")[0]
    );
    let only_asked = probing.join("bazel");
    std::fs::write(&only_asked, script).unwrap();
    std::fs::set_permissions(&only_asked, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut line = bazel.command_line("build");
    line[0] = only_asked.display().to_string();
    let all: Vec<&str> = std::iter::once("--")
        .chain(line.iter().map(String::as_str))
        .chain(args.iter().copied())
        .collect();
    let run = outhaul.run(bazel.workspace(), "run", &all).ok();
    assert!(!run.err.contains("failed to determine Bazel's options"), "{run}");
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

fn programs_that_call_bazel_have_their_builds_brought(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let bin = Scratch::new("bin");
    let mut line = bazel.command_line("build");
    symlink(line.remove(0), bin.join("bazel")).unwrap();
    let line = line.join(" ");
    let grpc = format!("--remote_cache={}", cache.url());
    bazel.write(
        "Makefile",
        &format!("all: x y\nx:\n\tbazel {line} {grpc} //:a\ny:\n\tenv A=b bazel {line} {grpc} //gen:one -- -//gen:many\n"),
    );
    bazel.build(&["//:a", "//gen:one"]).ok();
    bazel.clean();
    let outhaul = Outhaul::new();
    let path = format!("{}:{}", bin.path().display(), std::env::var("PATH").unwrap());
    let make = || {
        let mut process = std::process::Command::new(env!("CARGO_BIN_EXE_outhaul"));
        process
            .args(["run", "--strict", "--", "make", "-j2"])
            .env("PATH", &path)
            .env("OUTHAUL_STATE_DIR", outhaul.state_dir())
            .current_dir(bazel.workspace());
        Running::start(process).wait().ok()
    };
    let run = make();
    assert_eq!(
        run.err.matches("outhaul: ").count(),
        2,
        "a line for each build; {run}"
    );
    assert!(
        bazel.has("bazel-bin/a.txt") && bazel.has("bazel-bin/gen/one.txt"),
        "{run}"
    );
    // What was in a deleted directory, a Bazel that downloads nothing does not name; and these run only once.
    std::fs::remove_dir_all(bazel.path("bazel-bin/gen")).unwrap();
    let run = make();
    assert!(bazel.has("bazel-bin/gen/one.txt"), "{run}");
}

fn what_was_run_can_be_staged_and_exported(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let grpc = format!("--remote_cache={}", cache.url());
    let dir = Scratch::new("staged");
    let check = |outhaul: &Outhaul, name: &str| {
        let run = wrapped(outhaul, &bazel, &[], "build", &["//:a", &grpc]).ok();
        assert!(!run.err.contains("is not recorded for later commands"), "{run}");
        let to = dir.join(name);
        let to_flag = to.display().to_string();
        outhaul
            .run(
                bazel.workspace(),
                "stage",
                &["--flatten", "--to", &to_flag, "//:a"],
            )
            .ok();
        assert_eq!(std::fs::read_to_string(to.join("a.txt")).unwrap(), "this is a\n");
        let file = dir.join(format!("{name}.outhaul")).display().to_string();
        outhaul.run(bazel.workspace(), "export", &["-o", &file]).ok();
    };
    let outhaul = Outhaul::new();
    check(&outhaul, "alone");
    // While a daemon has the state directory, and knows an older build of the workspace.
    let daemon = Daemon::start(&cache);
    bazel.build(&[&daemon.bes(), "//:b"]).ok();
    check(daemon.outhaul(), "beside");
}
