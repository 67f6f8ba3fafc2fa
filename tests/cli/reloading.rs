//! SIGHUP opens no door wider than it may be open.

use outhaul_testkit::Running;
use tonic::Code;

use crate::{
    access::{Pki, TOKEN, channel, publish, reload, replace},
    support::{World, outhaul},
};

const RELOADED: &str = "reloaded:";
const NOT_RELOADED: &str = "reload failed";

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
    let open = channel(server.door(), Some(other.trusting(true))).await.unwrap();
    let right: &[(&'static str, &str)] = &[("x-outhaul-token", TOKEN)];
    let mut build = world.build.incremental();
    publish(open.clone(), &build, right).await.unwrap();

    let new_token = "another-token-that-nobody-guesses";
    replace(&other.token, new_token);
    reload(&server, RELOADED).await;
    build = build.incremental();
    publish(open.clone(), &build, right).await.unwrap();
    let newer = channel(server.door(), Some(other.trusting(true))).await.unwrap();
    let refused = publish(newer.clone(), &build, right).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
    let new: &[(&'static str, &str)] = &[("x-outhaul-token", new_token)];
    publish(newer, &build, new).await.unwrap();

    replace(&other.ca, &pki);
    reload(&server, RELOADED).await;
    build = build.incremental();
    publish(open, &build, right).await.unwrap();
    let taken = match channel(server.door(), Some(other.trusting(true))).await {
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
