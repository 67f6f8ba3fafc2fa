//! What commands print, as it is kept in `tests/cli/snapshots`. After a change that is meant, `INSTA_UPDATE=always
//! cargo test --test cli printed` writes them again.

use insta::{assert_snapshot, with_settings};
use outhaul_testkit::Ran;

use crate::support::{World, run};

/// What differs from run to run.
const CHANGING: &[(&str, &str)] = &[
    (
        r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
        "[ID]",
    ),
    (r"(/[^\s:]+)?/\.tmp\w{6}", "[DIR]"),
    (r"127\.0\.0\.1:\d+", "[ADDRESS]"),
    (r"\b\d+(\.\d+)?(ms|µs|s)\b", "[TIME]"),
    (r"\bsha256:[0-9a-f]{64}\b", "[DIGEST]"),
];

/// Both outputs of a command, and its exit code.
fn shown(ran: &Ran) -> String {
    let code = ran
        .code
        .map_or_else(|| "a signal".to_owned(), |code| code.to_string());
    format!(
        "exit code {code}\n--- stdout\n{}--- stderr\n{}",
        ran.out(),
        ran.err
    )
}

/// The commands that the help names.
fn commands(help: &str) -> Vec<&str> {
    let (_, commands) = help.split_once("Commands:\n").unwrap();
    commands
        .lines()
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect()
}

#[tokio::test]
async fn every_commands_help() {
    let all = run(["--help"]).await.expect(0).out();
    let names = commands(&all);
    assert!(names.len() > 10, "{all}");
    with_settings!({ filters => CHANGING.to_vec() }, { assert_snapshot!("help", all) });
    for name in names {
        let help = run([name, "--help"]).await.expect(0).out();
        with_settings!({ filters => CHANGING.to_vec() }, { assert_snapshot!(format!("help_{name}"), help) });
    }
}

#[tokio::test]
async fn the_profiles_with_their_reasons_and_the_users_own() {
    let own = "--profile-rule=logs=required path=.*[.]log";
    let all = run(["profiles", own]).await.expect(0).out();
    assert_snapshot!("profiles", all);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_known_of_a_build() {
    let world = World::new().await;
    let server = world.serve(&[]).await;
    world.play(&world.build, server.address()).await;
    let state = world.state();
    run(["wait", &state]).await.expect(1);
    let (output, _) = world.file("app/app");
    let path = world.exec_root().join(&output.path).display().to_string();
    let staged = world.path("staged");
    let to = format!("--to={staged}");
    for (name, args) in [
        ("status", vec!["status", &state]),
        ("wait", vec!["wait", &state, "//app:app"]),
        ("wait_for_no_target", vec!["wait", &state, "//no:target"]),
        ("stat", vec!["stat", &state, &path]),
        ("why", vec!["why", &state, &path]),
        ("why_of_nothing", vec!["why", &state, "bazel-out/no/such"]),
        ("get", vec!["get", &state, &path]),
        ("stage", vec!["stage", &state, &to, "//app:app"]),
        ("is_staged", vec!["is-staged", &to, "//app:app"]),
    ] {
        let ran = run(args).await;
        with_settings!({ filters => CHANGING.to_vec() }, { assert_snapshot!(name, shown(&ran)) });
    }
    let ran = run(["ls", &state, "--class=required"]).await.expect(0);
    let mut lines: Vec<String> = ran.out().lines().map(str::to_owned).collect();
    lines.sort_unstable();
    with_settings!({ filters => CHANGING.to_vec() }, { assert_snapshot!("ls", lines.join("\n")) });
}

#[tokio::test]
async fn what_is_fetched_of_archives() {
    use crate::archives::{Archives, tar};
    let archives = Archives::new();
    archives.with_sum("lib_generic.tar", &tar(&[("lib/x", "one"), ("lib/y", "two")]));
    archives.file("run_generic.tar", &tar(&[("bin/z", "three")]));
    archives.with_sum("test_generic.tar", b"bytes that are no archive");
    let url = archives.url();
    for (name, args) in [
        (
            "fetch_archive_dry_run",
            vec![&*url, "--dry-run", "--optional=test"],
        ),
        ("fetch_archive_damaged", vec![&*url]),
        ("fetch_archive_optional", vec![&*url, "--optional=test"]),
        (
            "fetch_archive_json",
            vec![&*url, "--json", "--include=lib", "--no-extract"],
        ),
    ] {
        let ran = archives.fetch(&args).await;
        with_settings!({ filters => CHANGING.to_vec() }, { assert_snapshot!(name, shown(&ran)) });
    }
}

#[tokio::test]
async fn completions_and_manual_pages_have_every_command() {
    let all = run(["--help"]).await.expect(0).out();
    let names = commands(&all);
    let dir = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let text = run(["completions", shell]).await.expect(0).out();
        let missing: Vec<_> = names.iter().filter(|name| !text.contains(**name)).collect();
        assert!(missing.is_empty(), "{shell}: {missing:?}");
        assert!(text.contains("remote-cache"), "{shell}");
        if shell == "bash" {
            let file = dir.path().join("outhaul.bash");
            std::fs::write(&file, text).unwrap();
            let script = format!("source {} && complete -p outhaul", file.display());
            let bash = std::process::Command::new("bash")
                .args(["-c", &script])
                .output()
                .unwrap();
            assert!(bash.status.success(), "{bash:?}");
        }
    }
    let pages = dir.path().join("man/man1");
    run(["man", pages.to_str().unwrap()]).await.expect(0);
    for name in names {
        let page = std::fs::read_to_string(pages.join(format!("outhaul-{name}.1"))).unwrap();
        assert!(page.contains("NAME"), "{name}");
    }
    assert!(pages.join("outhaul.1").is_file());
    let file = dir.path().join("outhaul.bash/x");
    run(["man", file.to_str().unwrap()])
        .await
        .says(1, &["outhaul.bash/x"]);
}
