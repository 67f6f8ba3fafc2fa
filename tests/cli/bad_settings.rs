//! Settings that can't be: each is refused by name before anything is opened.

use std::os::unix::fs::PermissionsExt as _;

use outhaul_testkit::finish;

use crate::support::{World, outhaul, run};

/// Every flag with a value, with invalid values, and what the message must say.
const WRONG: &[(&str, &str)] = &[
    ("--bes-listen", "nonsense"),
    ("--bes-listen", "127.0.0.1"),
    ("--admin-listen", "nonsense"),
    ("--idle-timeout", "nonsense"),
    ("--idle-timeout", "0s"),
    ("--hold", "nonsense"),
    ("--hold-timeout", "nonsense"),
    ("--hold-timeout", "-1s"),
    ("--hold-timeout", "0s"),
    ("--download", "nonsense"),
    ("--download-regex", "("),
    ("--target", "nonsense"),
    ("--max-size", "nonsense"),
    ("--rule", "nonsense"),
    ("--rule", "required nonsense=1"),
    ("--allow-exec-root", "relative"),
    ("--path-map", "nonsense"),
    ("--path-map", "a=b"),
    ("--writers", "0"),
    ("--writers", "nonsense"),
    ("--bytes-in-flight", "1"),
    ("--bytes-in-flight", "nonsense"),
    ("--limit-rate", "0"),
    ("--limit-rate", "50MiB/min"),
    ("--limit-rate", "50MiB/sec"),
    ("--limit-rate", "50"),
    ("--retention-age", "14"),
    ("--min-free-space", "101%"),
    ("--min-free-space", "nonsense"),
    ("--lease-renewal", "0s"),
    ("--lease-renewal", "nonsense"),
    ("--lease-age", "nonsense"),
    ("--lease-rate", "0"),
    ("--linger", "nonsense"),
    ("--control-stage-from", "file:///d/"),
    ("--control-stage-from", "https://h/a/../b"),
    ("--remote-cache", "http://h/x?y"),
    ("--remote-proxy", "h:1"),
    ("--remote-cache", "ftp://h:1"),
    ("--remote-cache", "grpc://"),
    ("--remote-cache", "grpc://h:99999"),
    ("--remote-cache", "unix:"),
    ("--remote-cache", "from-build"),
    ("--remote-instance-name", "a//b"),
    ("--remote-instance-name", "a/blobs"),
    ("--remote-header", "nonsense"),
    ("--remote-header", "a b=c"),
    ("--tls-certificate", "/nowhere.pem"),
    ("--tls-client-certificate", "/nowhere.pem"),
    ("--tls-client-key", "/nowhere.pem"),
    ("--credential-helper", "relative/helper="),
    ("--google-credentials", "/nowhere.json"),
    ("--google-default-credentials", "nonsense"),
    ("--remote-cache-compression", "nonsense"),
    ("--remote-max-connections", "0"),
    ("--remote-max-connections", "nonsense"),
    ("--remote-retries", "nonsense"),
    ("--remote-retry-max-delay", "nonsense"),
    ("--remote-timeout", "nonsense"),
    ("--remote-timeout", "0s"),
    ("--digest-function", "nonsense"),
    ("--log", "a=b=c"),
    ("--config", "/nowhere.toml"),
];

#[tokio::test]
async fn every_flags_wrong_values_name_the_flag() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    for (flag, value) in WRONG {
        let mut args = vec![
            "serve".to_owned(),
            format!("--state-dir={}", state.display()),
            "--bes-listen=127.0.0.1:0".to_owned(),
            "--admin-listen=none".to_owned(),
        ];
        if *flag != "--remote-cache" {
            args.push("--remote-cache=grpcs://127.0.0.1:1".to_owned());
        }
        args.retain(|arg| !arg.starts_with(flag));
        args.push(format!("{flag}={value}"));
        let ran = tokio::time::timeout(std::time::Duration::from_secs(10), run(&args)).await;
        let ran = ran.unwrap_or_else(|_| panic!("{flag}={value} is taken"));
        assert_eq!(ran.code, Some(2), "{flag}={value}: {}", ran.err);
        assert!(ran.err.contains(flag), "{flag}={value}: {}", ran.err);
        assert!(!state.exists(), "{flag}={value}: nothing was opened");
    }
}

#[tokio::test]
async fn a_cache_is_asked_for_by_the_flags_name() {
    let dir = tempfile::tempdir().unwrap();
    let state = format!("--state-dir={}", dir.path().join("s").display());
    run(["serve", &state]).await.says(2, &["--remote-cache"]);
    let digest = format!("{}/1", "a".repeat(64));
    run(["fetch", "blob", &digest, "-o", "-"])
        .await
        .says(2, &["--remote-cache"]);
}

#[tokio::test]
async fn wrong_configuration_files_name_file_and_key() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.toml");
    let flag = format!("--config={}", file.display());
    for (text, part) in [
        ("nonsense-key = 1", "nonsense-key"),
        ("remote-cache = [", "c.toml"),
        ("[serve]\nto = 'x'", "to"),
        ("writers = 1.5", "writers"),
        ("hold = 'nonsense'", "--hold"),
    ] {
        std::fs::write(&file, text).unwrap();
        let ran = run([
            "serve",
            &flag,
            "--remote-cache=grpc://h:1",
            "--state-dir=/nonexistent/s",
        ])
        .await;
        ran.says(2, &[part]);
    }
    std::fs::write(&file, b"\xff\xfe").unwrap();
    run(["serve", &flag]).await.says(2, &["c.toml"]);
    let directory = format!("--config={}", dir.path().display());
    run(["serve", &directory]).await.says(2, &[&directory]);
}

#[tokio::test]
async fn wrong_environment_variables_are_named_as_well() {
    let mut command = outhaul();
    command.args(["serve", "--remote-cache=grpc://h:1", "--state-dir=/nonexistent/s"]);
    command.env("OUTHAUL_HOLD", "nonsense");
    finish(command).await.says(2, &["--hold", "nonsense"]);
    // Also where the flag is taken by a command that places files without having it.
    let world = World::new().await;
    let mut server = world.serve(&[]).await;
    server.signal(rustix::process::Signal::TERM);
    server.end().await;
    let mut command = outhaul();
    command
        .args(["status", &world.state()])
        .env("OUTHAUL_WRITERS", "nonsense");
    finish(command).await.says(2, &["--writers"]);
}

#[tokio::test]
async fn googles_credentials_of_a_kind_that_cannot_be_used_are_not_passed_over() {
    let home = tempfile::tempdir().unwrap();
    let directory = home.path().join(".config/gcloud");
    std::fs::create_dir_all(&directory).unwrap();
    let file = directory.join("application_default_credentials.json");
    std::fs::write(&file, r#"{"type": "other"}"#).unwrap();
    let digest = format!("{}/1", "a".repeat(64));
    let mut command = outhaul();
    command.args(["fetch", "blob", &digest, "-o", "-"]);
    command
        .arg("--remote-cache=gs://b?endpoint=http://127.0.0.1:1")
        .env("HOME", home.path());
    let parts = [
        &*file.display().to_string(),
        "not a service_account",
        "anonymous=yes",
    ];
    finish(command).await.says(2, &parts);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_directory_that_is_held_names_its_holder_and_the_way_out() {
    let world = World::new().await;
    let server = world.serve(&[]).await;
    let pid = server.id().to_string();
    let args = ["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"];
    let (state, cache) = (world.state(), world.cache_flag());
    let ran = run(args.iter().copied().chain([state.as_str(), cache.as_str()])).await;
    ran.says(1, &[&pid, "--state-dir", &world.path("state")]);
    // Alive but on another socket than is asked.
    let socket = format!("--control-socket={}", world.path("other.sock"));
    let ran = run(["status", &state, &socket]).await;
    ran.says(1, &[&pid, &world.path("other.sock")]);
    // And the first one goes on.
    world.play(&world.build, server.address()).await;
    world.assert_complete();
}

#[tokio::test(flavor = "multi_thread")]
async fn listeners_that_are_taken_or_cannot_be_are_named() {
    let world = World::new().await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let file = world.path("file");
    std::fs::write(&file, "precious").unwrap();
    let long = format!("{}/{}", world.path("d"), "x".repeat(120));
    for (flag, value) in [
        ("--bes-listen", address.clone()),
        ("--admin-listen", address.clone()),
        ("--bes-listen", format!("unix:{file}")),
        ("--control-socket", file.clone()),
        ("--control-socket", format!("{file}/x")),
        ("--control-socket", long.clone()),
        ("--bes-listen", format!("unix:{long}")),
    ] {
        let mut args = vec!["serve".to_owned(), world.state(), world.cache_flag()];
        for (other, value) in [("--bes-listen", "127.0.0.1:0"), ("--admin-listen", "none")] {
            if other != flag {
                args.push(format!("{other}={value}"));
            }
        }
        args.push(format!("{flag}={value}"));
        let named = value.strip_prefix("unix:").unwrap_or(&value);
        run(&args).await.says(2, &[flag, named]);
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_directory_that_cannot_be_made_or_written_is_named() {
    let world = World::new().await;
    let file = world.path("file");
    std::fs::write(&file, "").unwrap();
    let start = async |state: &str| {
        let flag = format!("--state-dir={state}");
        // The control socket is elsewhere, so that the state directory is what fails.
        let socket = format!("--control-socket={}", world.path("c.sock"));
        let args = ["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"];
        let cache = world.cache_flag();
        run(args.iter().copied().chain([&*flag, &*socket, &*cache])).await
    };
    start(&format!("{file}/x")).await.says(1, &["--state-dir", &file]);
    start(&file).await.says(1, &["--state-dir", &file]);
    let locked = world.path("locked");
    std::fs::create_dir(&locked).unwrap();
    std::fs::set_permissions(&locked, std::fs::Permissions::from_mode(0o555)).unwrap();
    // For root there is no such thing.
    if std::fs::write(format!("{locked}/probe"), "").is_err() {
        start(&locked).await.says(1, &["--state-dir", &locked]);
    }
}
