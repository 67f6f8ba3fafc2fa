//! HTTP caches, by the program itself: what it reads from them, and that passwords are shown nowhere.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Bytes,
    extract::{Path as UrlPath, State},
    http::{HeaderMap, StatusCode},
    routing::get,
};
use outhaul::demo::{GeneratedBuild, GeneratedContent, Setting};
use outhaul_testkit::{Ran, finish};

use crate::support::{World, delimited, outhaul};

/// Of `me` and `hush/hush`.
const BASIC: &str = "Basic bWU6aHVzaC9odXNo";

/// A cache with a world's blobs, for those who know the password.
struct Served {
    address: String,
    /// The paths that were asked for.
    asked: Arc<Mutex<Vec<String>>>,
}

#[derive(Clone)]
struct Shelf {
    blobs: Arc<HashMap<String, Vec<u8>>>,
    asked: Arc<Mutex<Vec<String>>>,
}

async fn load(
    State(shelf): State<Shelf>,
    UrlPath(path): UrlPath<String>,
    headers: HeaderMap,
) -> (StatusCode, [(&'static str, &'static str); 1], Bytes) {
    let text = [("content-type", "text/plain")];
    let shown = headers
        .get("authorization")
        .map_or(&b""[..], |value| value.as_bytes());
    if shown != BASIC.as_bytes() {
        // Some servers repeat what they were sent.
        let words = [b"I do not know ", shown].concat();
        return (StatusCode::UNAUTHORIZED, text, words.into());
    }
    let blob = path
        .rsplit('/')
        .next()
        .and_then(|hash| shelf.blobs.get(hash))
        .cloned();
    shelf.asked.lock().unwrap().push(path);
    match blob {
        Some(blob) => (StatusCode::OK, text, blob.into()),
        None => (StatusCode::NOT_FOUND, text, "no".into()),
    }
}

async fn serve(world: &World) -> Served {
    let blobs = world
        .build
        .outputs()
        .iter()
        .filter_map(|output| match &output.content {
            GeneratedContent::File(digest) => {
                Some((digest.hash_hex(), world.cache.store().get(digest)?.to_vec()))
            }
            _ => None,
        });
    let shelf = Shelf {
        blobs: Arc::new(blobs.collect()),
        asked: Arc::default(),
    };
    let asked = shelf.asked.clone();
    let app = Router::new().route("/{*path}", get(load)).with_state(shelf);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move { axum::serve(listener, app).await });
    Served { address, asked }
}

/// Runs a command with everything logged; demands that it shows no password.
async fn shown(args: &[&str], netrc: &str) -> Ran {
    let mut command = outhaul();
    command.args(args).env("OUTHAUL_LOG", "trace").env("NETRC", netrc);
    let ran = finish(command).await;
    let text = format!("{}{}", String::from_utf8_lossy(&ran.stdout), ran.err);
    for secret in ["hush", "aHVzaC9odXNo", "bWU6"] {
        assert!(!text.contains(secret), "{secret} is shown: {text}");
    }
    ran
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_is_fetched_with_the_password_of_the_url_or_of_a_netrc() {
    let world = World::new().await;
    let served = serve(&world).await;
    let digest = world.file("liblib.a").1.clone();
    let bytes = world.cache.store().get(&digest).unwrap();
    let digest = digest.to_string();
    let netrc = world.path("netrc");
    std::fs::write(&netrc, "machine 127.0.0.1 login me password hush/hush\n").unwrap();
    let address = &served.address;
    let with = format!("--remote-cache=http://me:hush%2Fhush@{address}/team/");
    let without = format!("--remote-cache=http://{address}/team");
    let wrong = format!("--remote-cache=http://me:hush-hush@{address}/team");
    let nowhere = "--remote-cache=http://me:hush%2Fhush@127.0.0.1:0/team";
    let fetch = async |cache: &str, netrc: &str| {
        let args = ["fetch", "blob", &digest, cache, "-o", "-", "--remote-retries=0"];
        shown(&args, netrc).await
    };
    for (cache, netrc) in [(&with, "/dev/null"), (&without, &*netrc), (&with, &*netrc)] {
        assert_eq!(fetch(cache, netrc).await.expect(0).stdout, bytes);
    }
    assert!(
        served
            .asked
            .lock()
            .unwrap()
            .iter()
            .all(|path| path.starts_with("team/cas/"))
    );
    let args = [
        "fetch",
        "blob",
        &digest,
        &without,
        "-o",
        "-",
        "--remote-retries=0",
        "--no-netrc",
    ];
    shown(&args, &netrc).await.says(1, &["requires credentials"]);
    for cache in [&without, &wrong] {
        fetch(cache, "/dev/null")
            .await
            .says(1, &["requires credentials", "--credential-helper"]);
    }
    fetch(nowhere, "/dev/null")
        .await
        .says(2, &["--remote-cache=http://127.0.0.1:0/team"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cache_of_a_build_is_taken_from_its_events() {
    let world = World::new().await;
    let served = serve(&world).await;
    let setting = |remote_cache: String| Setting {
        workspace: world.path("workspace"),
        exec_root: world.exec_root().display().to_string(),
        remote_cache,
        instance_name: String::new(),
    };
    let file = |name: &str, remote_cache: String| {
        let build = GeneratedBuild::new(|bytes| world.cache.store().put(bytes), setting(remote_cache), 1);
        let path = world.path(name);
        std::fs::write(&path, delimited(build.events())).unwrap();
        path
    };
    let address = &served.address;
    let events = file("with.bin", format!("http://me:hush%2Fhush@{address}/pre"));
    let elsewhere = format!("--allow-remote-cache=http://{address}/other");
    let args = ["fetch", "bep", &events, "--remote-cache=from-build", &elsewhere];
    let ran = shown(&args, "/dev/null").await;
    ran.says(1, &["not allowed", &format!("http://{address}/pre")]);
    let allowed = format!("--allow-remote-cache=http://{address}");
    shown(&["fetch", "bep", &events, &allowed], "/dev/null")
        .await
        .expect(0);
    world.assert_complete();
    assert!(
        served
            .asked
            .lock()
            .unwrap()
            .iter()
            .all(|path| path.starts_with("pre/cas/"))
    );
    let events = file("without.bin", format!("http://{address}/pre"));
    let out = world.path("out");
    let args = [
        "fetch",
        "bep",
        &events,
        "--output-dir",
        &out,
        "--remote-retries=0",
    ];
    shown(&args, "/dev/null").await.says(1, &["requires credentials"]);
}
