//! SIGHUP: what is read again, and no listener is opened wider than it may be open.

use outhaul::demo::GeneratedBuild;
use outhaul_testkit::{Running, until};
use rustix::process::Signal;
use tonic::Code;

use crate::{
    access::upstream,
    secured::{Pki, TOKEN, channel, publish},
    support::{World, outhaul},
};

const RELOADED: &str = "reloaded:";
const NOT_RELOADED: &str = "reload failed";

/// Replaces a file as tools do: whole.
fn replace(path: &str, text: &str) {
    let beside = format!("{path}.new");
    std::fs::write(&beside, text).unwrap();
    std::fs::rename(beside, path).unwrap();
}

/// Sends SIGHUP, and waits for the daemon's word on it.
async fn reload(server: &Running, word: &str) -> String {
    let before = server.logged("").await.matches(word).count();
    server.signal(Signal::HUP);
    until(word, async || server.stderr().matches(word).count() > before).await;
    server.stderr()
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_certificates_and_settings_are_read_again_at_sighup() {
    let cache = outhaul_testkit::cache::EmbeddedCache::builder().required_header("x-token", "first-secret");
    let world = World::with(cache, "").await;
    let pki = Pki::new(&world);
    let (backend, heard) = upstream(&world).await;
    let config = world.path("config.toml");
    let write = |header: &str, key: &str, download: &str, hold: &str| {
        replace(
            &config,
            &format!(
                "[serve]\nremote_header = ['x-token={header}']\nbes_header = ['x-key={key}']\ndownload = \
                 '{download}'\nhold_timeout = '{hold}'\n"
            ),
        );
    };
    write("first-secret", "first-key", "toplevel", "10m");
    let token = format!("--bes-token-file={}", pki.token);
    let [certificate, key] = &pki.listen();
    let config_flag = format!("--config={config}");
    let backend = format!("--bes-backend={backend}");
    let server = world
        .serve(&[&config_flag, &token, certificate, key, &backend])
        .await;
    let send = async |pki: &Pki, build: &GeneratedBuild, token: &str| match channel(
        server.address(),
        Some(pki.trusting(false)),
    )
    .await
    {
        Ok(channel) => publish(channel, build, &[("x-outhaul-token", token)])
            .await
            .is_ok(),
        Err(_) => false,
    };
    let first = world.build.incremental();
    assert!(send(&pki, &first, TOKEN).await);
    world.assert_complete();

    // All of it is new: the listener's certificate and token, what the cache and upstream want, the selection.
    let renewed = Pki::new(&world);
    let other = "another-token-that-nobody-guesses";
    replace(&pki.token, other);
    world.cache.require_header(Some(("x-token", "second-secret")));
    write("second-secret", "second-key", "toplevel", "10m");
    reload(&server, RELOADED).await;
    std::fs::remove_dir_all(world.exec_root().join("bazel-out")).unwrap();
    let second = first.incremental();
    assert!(
        !send(&pki, &second, other).await,
        "signed by an authority that is not trusted"
    );
    assert!(!send(&renewed, &second, TOKEN).await, "the old token");
    assert!(send(&renewed, &second, other).await);
    world.assert_complete();
    let keys: Vec<String> = heard
        .lock()
        .unwrap()
        .iter()
        .filter_map(|headers| Some(headers.get("x-key")?.to_str().unwrap().to_owned()))
        .collect();
    assert_eq!(keys.first().map(String::as_str), Some("first-key"));
    assert_eq!(keys.last().map(String::as_str), Some("second-key"));

    // What is wrong changes nothing at all, and is reported.
    replace(&pki.token, "short");
    write("third-secret", "third-key", "minimal", "10m");
    let log = reload(&server, "reload failed").await;
    assert!(log.contains("--bes-token-file"), "{log}");
    std::fs::remove_dir_all(world.exec_root().join("bazel-out")).unwrap();
    let third = second.incremental();
    assert!(send(&renewed, &third, other).await);
    world.assert_complete();

    // What can't be changed while it runs is reported, and the rest counts.
    replace(&pki.token, other);
    write("second-secret", "second-key", "minimal", "7m");
    let log = reload(&server, RELOADED).await;
    assert!(
        log.contains("--hold-timeout has changed, which takes effect after a restart"),
        "{log}"
    );
    std::fs::remove_dir_all(world.exec_root().join("bazel-out")).unwrap();
    assert!(send(&renewed, &third.incremental(), other).await);
    let app = world.exec_root().join(&world.file("app/app").0.path);
    assert!(!app.exists(), "nothing is wanted any more");
    for secret in [
        "first-secret",
        "second-secret",
        "third-secret",
        "first-key",
        TOKEN,
        other,
    ] {
        assert!(!log.contains(secret), "{secret} in {log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_port_is_judged_by_where_it_is_open() {
    let world = World::new().await;
    let pki = Pki::new(&world);
    let config = world.path("config.toml");
    let token = format!("control_token_file = '{}'\n", pki.token);
    let tls = format!(
        "control_tls_certificate = '{}'\ncontrol_tls_key = '{}'\n",
        pki.certificate, pki.key
    );
    let write = |address: &str, rest: &[&str]| {
        let listen = format!("control_listen = '{address}'\n");
        replace(&config, &[&["[serve]\n", &listen], rest].concat().concat());
    };
    write("0.0.0.0:0", &[&token, &tls]);
    let server = world.serve(&[&format!("--config={config}")]).await;
    // Right where it will be open, and wrong where it is.
    write("127.0.0.1:0", &[&token]);
    let log = reload(&server, NOT_RELOADED).await;
    assert!(log.contains("--control-listen=0.0.0.0:0: requires"), "{log}");
    write("127.0.0.1:0", &[&token, &tls]);
    let log = reload(&server, RELOADED).await;
    assert!(
        log.contains("--control-listen has changed, which takes effect after a restart"),
        "{log}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn new_rules_hold_for_new_connections_and_open_ones_keep_theirs() {
    let world = World::new().await;
    let (pki, other) = (Pki::new(&world).ca_pem, Pki::new(&world));
    let [certificate, key] = &other.listen();
    let authorities = format!("--listen-tls-client-ca={}", other.ca);
    let token = format!("--bes-token-file={}", other.token);
    let server = world.serve(&[certificate, key, &authorities, &token]).await;
    let open = channel(server.address(), Some(other.trusting(true)))
        .await
        .unwrap();
    let right: &[(&'static str, &str)] = &[("x-outhaul-token", TOKEN)];
    let mut build = world.build.incremental();
    publish(open.clone(), &build, right).await.unwrap();

    let new_token = "another-token-that-nobody-guesses";
    replace(&other.token, new_token);
    reload(&server, RELOADED).await;
    build = build.incremental();
    publish(open.clone(), &build, right).await.unwrap();
    let newer = channel(server.address(), Some(other.trusting(true)))
        .await
        .unwrap();
    let refused = publish(newer.clone(), &build, right).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
    let new: &[(&'static str, &str)] = &[("x-outhaul-token", new_token)];
    publish(newer, &build, new).await.unwrap();

    replace(&other.ca, &pki);
    reload(&server, RELOADED).await;
    build = build.incremental();
    publish(open, &build, right).await.unwrap();
    let taken = match channel(server.address(), Some(other.trusting(true))).await {
        Ok(newest) => publish(newest, &build, new).await.is_ok(),
        Err(_) => false,
    };
    assert!(!taken, "signed by an authority that is not trusted any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_file_that_is_gone_is_not_one_without_settings() {
    let world = World::new().await;
    let dir = world.path("config");
    std::fs::create_dir_all(format!("{dir}/outhaul")).unwrap();
    let file = format!("{dir}/outhaul/config.toml");
    let settings = format!("[serve]\nallow_exec_root = ['{}']\n", world.path("allowed"));
    replace(&file, &settings);
    let mut command = outhaul();
    command
        .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"])
        .args([world.state(), world.cache_flag()])
        .env("XDG_CONFIG_HOME", &dir);
    let server = Running::serve(command).await;
    std::fs::remove_file(&file).unwrap();
    let log = reload(&server, NOT_RELOADED).await;
    assert!(log.contains(&format!("--config={file}")), "{log}");
    replace(&file, &settings);
    let log = reload(&server, RELOADED).await;
    assert!(!log.contains("has changed"), "{log}");
}
