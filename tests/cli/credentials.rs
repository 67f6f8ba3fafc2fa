//! The credentials of object stores: each kind that works without the providers, with servers that check it.

use std::{path::Path, process::Command};

use outhaul_testkit::{
    Ran, finish,
    stores::{BUCKET, KEYS, Store, StoreKind},
};

use crate::{
    archives::{sha256, tar},
    support::{outhaul, program},
};

/// `outhaul fetch archive` of a URL into a directory, logging everything.
async fn fetch(url: &str, out: &Path, set: impl FnOnce(&mut Command)) -> Ran {
    let _ = std::fs::remove_dir_all(out);
    let mut command = outhaul();
    command
        .args(["fetch", "archive", url, "--remote-retries=0", "--output-dir"])
        .arg(out)
        .env("OUTHAUL_LOG", "trace,outhaul=trace");
    set(&mut command);
    finish(command).await
}

/// What was unpacked: the file `x` of the archive `a`, alone or in its own directory.
#[track_caller]
fn assert_there(ran: &Ran, out: &Path) {
    let there = [out.join("x"), out.join("a/x")];
    assert!(
        ran.code == Some(0)
            && there
                .iter()
                .any(|path| std::fs::read(path).is_ok_and(|bytes| bytes == b"1")),
        "{ran}"
    );
}

#[track_caller]
fn assert_hidden(ran: &Ran, secrets: &[&str]) {
    let text = format!("{}{}", ran.out(), ran.err);
    for secret in secrets {
        assert!(!text.contains(secret), "{secret} is shown: {ran}");
    }
}

/// A store with an archive and its checksum.
fn filled(kind: StoreKind) -> Store {
    let store = Store::start(kind);
    let bytes = tar(&[("x", "1")]);
    store.put("d/a.tar", &bytes);
    store.put("d/a.tar.sha256sum", format!("{}\n", sha256(&bytes)).as_bytes());
    store
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_access_signature_is_enough_for_azure() {
    if !StoreKind::Azure.is_there("a_shared_access_signature_is_enough_for_azure") {
        return;
    }
    let store = filled(StoreKind::Azure);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let account = format!("{}/devstoreaccount1", store.endpoint());
    let good = store.signature(false);
    let secret = good.rsplit_once('=').unwrap().1;
    let connection = format!("BlobEndpoint={account};SharedAccessSignature={good}");
    let directory = store.url("d/", "");
    let checked = ["--checksum=require"];
    for (variable, value) in [
        ("AZURE_STORAGE_SAS_TOKEN", &good),
        ("AZURE_STORAGE_SAS_TOKEN", &format!("?{good}")),
        ("AZURE_STORAGE_CONNECTION_STRING", &connection),
    ] {
        for url in [&directory, &store.url("d/a.tar", "")] {
            let ran = fetch(url, &out, |command| {
                command.args(checked).env(variable, value);
            });
            let ran = ran.await;
            assert_there(&ran, &out);
            assert_hidden(&ran, &[secret]);
        }
    }
    for (token, part) in [
        (store.signature(true), "shared access signature"),
        (good.replace("sp=rl", "sp=rwl"), "shared access signature"),
    ] {
        let ran = fetch(&directory, &out, |command| {
            command.env("AZURE_STORAGE_SAS_TOKEN", &token);
        });
        let ran = ran.await;
        assert!(ran.code == Some(1) && ran.err.contains(part), "{ran}");
        assert_hidden(&ran, &[token.rsplit_once('=').unwrap().1]);
        assert!(!out.exists());
    }
    // The same as a URL of its own, which lets in to the checksum beside it as well.
    let url = format!("{account}/{BUCKET}/d/a.tar?{good}");
    let ran = fetch(&url, &out, |command| {
        command.args(checked);
    });
    let ran = ran.await;
    assert_there(&ran, &out);
    assert_hidden(&ran, &[secret]);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_s3_come_from_profiles_and_sessions_and_are_in_presigned_urls() {
    let test = "keys_of_s3_come_from_profiles_and_sessions_and_are_in_presigned_urls";
    if !StoreKind::S3.is_there(test) {
        return;
    }
    let store = filled(StoreKind::S3);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let [(_, id), (_, secret)] = KEYS;
    let home = dir.path().join("home");
    std::fs::create_dir_all(home.join(".aws")).unwrap();
    let helper = dir.path().join("helper");
    let answer = serde_json::json!({
        "Version": 1, "AccessKeyId": id, "SecretAccessKey": secret,
    });
    program(&helper, &format!("#!/bin/sh\necho '{answer}'\n"));
    let keys = |token: &str| format!("aws_access_key_id = {id}\naws_secret_access_key = {secret}\n{token}\n");
    let wrong = keys("").replace(secret, "wr0ng");
    let credentials = format!(
        "[default]\n{}[ci]\n{}[wrong]\n{wrong}[session]\n{}",
        keys(""),
        keys(""),
        keys("aws_session_token = t0ken"),
    );
    let credentials_file = home.join(".aws/credentials");
    std::fs::write(&credentials_file, credentials).unwrap();
    let config = format!(
        "[profile tool]\nregion = us-east-1\ncredential_process = {}\n",
        helper.display()
    );
    std::fs::write(home.join(".aws/config"), config).unwrap();
    let url = store.url("d/", "");
    let home = home.display().to_string();
    let file = credentials_file.display().to_string();
    for variables in [
        &[("HOME", &*home)][..],
        &[("HOME", &home), ("AWS_PROFILE", "ci")],
        &[("HOME", &home), ("AWS_PROFILE", "tool")],
        &[("AWS_SHARED_CREDENTIALS_FILE", &file), ("AWS_PROFILE", "ci")],
    ] {
        let ran = fetch(&url, &out, |command| {
            command
                .args(["--checksum=require"])
                .envs(variables.iter().copied());
        });
        let ran = ran.await;
        assert_there(&ran, &out);
        assert_hidden(&ran, &[secret]);
    }
    // It knows no sessions, so a token that comes with a request is wrong.
    for variables in [
        &[KEYS[0], KEYS[1], ("AWS_SESSION_TOKEN", "t0ken")][..],
        &[("HOME", &home), ("AWS_PROFILE", "session")],
    ] {
        let ran = fetch(&url, &out, |command| {
            command.envs(variables.iter().copied());
        });
        let ran = ran.await.says(1, &["InvalidToken"]);
        assert_hidden(&ran, &[secret, "t0ken"]);
    }
    for (profile, part) in [("wrong", "SignatureDoesNotMatch"), ("none", "no profile none")] {
        let ran = fetch(&url, &out, |command| {
            command.env("HOME", &home).env("AWS_PROFILE", profile);
        });
        let ran = ran.await;
        assert!(ran.code != Some(0) && ran.err.contains(part), "{ran}");
        assert_hidden(&ran, &["wr0ng", secret]);
    }
    // It lets in to one object, and not to the checksum beside that.
    let presigned = store.presigned("d/a.tar");
    let signature = presigned.rsplit_once('=').unwrap().1;
    let ran = fetch(&presigned, &out, |_| ()).await;
    assert_there(&ran, &out);
    assert_hidden(&ran, &[signature]);
    let ran = fetch(&presigned, &out, |command| {
        command.arg("--checksum=require");
    });
    let ran = ran.await.says(1, &["a.tar.sha256sum"]);
    assert_hidden(&ran, &[signature]);
    let ran = fetch(&presigned.replace("d/a.tar", "d/b.tar"), &out, |_| ()).await;
    assert!(ran.code == Some(1) && ran.err.contains("403"), "{ran}");
    assert_hidden(&ran, &[signature]);
}
