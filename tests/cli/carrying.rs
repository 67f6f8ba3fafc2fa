//! Exported builds that mean harm, and what programs need that comes with them.

use std::{path::Path, process::Command};

use outhaul_testkit::{Ran, clean, finish};

use crate::support::{World, run};

/// A file in the form that `export` writes: this header, and frames of these bytes.
fn file(header: &str, frames: &[Vec<u8>]) -> Vec<u8> {
    let mut file = b"outhaul-build\n\x01".to_vec();
    let header = [b"H", header.as_bytes()].concat();
    for raw in std::iter::once(&header).chain(frames) {
        let body = zstd::bulk::compress(raw, 9).unwrap();
        let length = u32::try_from(body.len()).unwrap().to_le_bytes();
        let sum = blake3::hash(&[&length[..], &body].concat());
        file.extend(length);
        file.extend_from_slice(&sum.as_bytes()[..8]);
        file.extend(body);
    }
    file
}

fn header(id: &str) -> serde_json::Value {
    serde_json::json!({
        "invocation_id": id, "build_id": id, "command": id, "workspace": id, "exec_root": id, "started_ms": i64::MAX,
        "settled_ms": i64::MIN, "exit_code": 1, "build_tool_version": id, "remote_cache": id,
        "remote_instance_name": id, "digest_function": id, "finished": true, "written_by": id,
    })
}

fn end(events: u64) -> Vec<u8> {
    [b"E", &events.to_le_bytes()[..]].concat()
}

/// Nothing that was printed moves a cursor, colours, or reorders what stands around it.
#[track_caller]
fn is_plain(ran: &Ran) {
    let odd = |c: char| {
        c.is_control() && c != '\n' || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let all = ran.out() + &ran.err;
    assert!(!all.contains(odd), "{all:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_file_says_of_itself_is_printed_and_does_nothing_else() {
    let world = World::new().await;
    let path = world.path("file");
    let id = "x\nouthaul: forged\r\u{1b}[2J\u{1b}]0;title\u{7}\u{9b}31m\u{202e}\u{7f}";
    std::fs::write(&path, file(&header(id).to_string(), &[end(0)])).unwrap();
    for _ in 0..2 {
        let ran = run(["import", &path, &world.state()]).await.expect(0);
        is_plain(&ran);
        assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
        assert!(ran.err.contains("forged"), "{}", ran.err);
    }
    for args in [
        &["status"][..],
        &["status", "--json"],
        &["status", id],
        &["status", id, "--json"],
        &["status", &format!("{id}no")],
        &["ls", id],
        &["stage", "--invocation", id, "--to", &world.path("to")],
        &["export", id, "-o", &world.path("again")],
        &["gc", "--dry-run", "--max-age=0s"],
        &["gc", "--dry-run", "--json", "--max-age=0s"],
    ] {
        let state = world.state();
        is_plain(&run(args.iter().copied().chain([&*state])).await);
    }
    let json = run(["status", "--json", &world.state()]).await.expect(0).json();
    assert_eq!(json[0]["invocation_id"], id, "JSON says what it is");

    // An error that quotes the file; and of another build with this id.
    let mut quoted = header("y");
    quoted["started_ms"] = id.into();
    let mut another = header(id);
    another["build_id"] = "another\u{1b}[2J".into();
    for header in [quoted, another] {
        std::fs::write(&path, file(&header.to_string(), &[end(0)])).unwrap();
        let ran = run(["import", &path, &world.state()]).await.expect(1);
        is_plain(&ran);
        assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_file_does_not_take_much_memory() {
    let world = World::new().await;
    let path = world.path("file");
    // Events without a byte; of Bazel's end; sets of files that are two bytes each.
    let line = |event: &[u8]| {
        let length = u8::try_from(event.len()).unwrap();
        [&[length, b'e'], &7_i64.to_le_bytes()[..], &[0], event].concat()
    };
    let many_files = {
        let files = [0x0a, 0x00].repeat(50 << 20);
        let mut event = vec![0x7a];
        prost::encoding::encode_varint(files.len() as u64, &mut event);
        event.extend(files);
        let mut frame = vec![b'R'];
        prost::encoding::encode_varint(event.len() as u64, &mut frame);
        frame.push(b'e');
        frame.extend(7_i64.to_le_bytes());
        frame.push(0);
        frame.extend(event);
        frame
    };
    let frames = [
        [b"R".to_vec(), line(b"").repeat(20 << 20)].concat(),
        [b"R".to_vec(), line(&[0x72, 0x00]).repeat(10 << 20)].concat(),
        many_files,
    ];
    for frame in frames {
        let bytes = file(&header("x").to_string(), &[frame, end(1)]);
        assert!(bytes.len() < 100_000, "{}", bytes.len());
        std::fs::write(&path, bytes).unwrap();
        let mut command = Command::new("sh");
        let limited = format!(
            "ulimit -v 1500000; exec '{}' import {path} {}",
            env!("CARGO_BIN_EXE_outhaul"),
            world.state()
        );
        command.args(["-c", &limited]);
        let ran = finish(clean(command)).await;
        ran.says(1, &[&path, "far more than a file of its size"]);
    }
}

/// A build whose program has a manifest of runfiles: a source, and with `lost`, an output that nobody has.
fn with_runfiles(world: &World, lost: &str) -> String {
    let (app, _) = world.file("app/app");
    let source = world.path("workspace/src.txt");
    std::fs::create_dir_all(world.path("workspace")).unwrap();
    std::fs::write(&source, "when it was exported").unwrap();
    // So Bazel says whose output base it is.
    std::fs::write(world.path("DO_NOT_BUILD_HERE"), world.path("workspace")).unwrap();
    let manifest = format!("_main/src.txt {source}\n{lost}");
    let beside = world.exec_root().join(format!("{}.runfiles_manifest", app.path));
    std::fs::write(beside, manifest).unwrap();
    source
}

#[tokio::test(flavor = "multi_thread")]
async fn runfiles_are_those_of_the_file_and_what_it_lacks_is_said() {
    let world = World::new().await;
    let mut server = world.serve(&[]).await;
    world.play(&world.build, server.address()).await;
    let (app, _) = world.file("app/app");
    let lost = world.exec_root().join("bazel-out/k8-fastbuild/bin/lost.txt");
    let file = world.path("app.outhaul");
    let export = async || run(["export", "--runfiles", "-o", &file, &world.state()]).await;
    with_runfiles(&world, &format!("_main/lost.txt {}\n", lost.display()));
    let ran = export().await;
    ran.says(1, &["lost.txt", "not in the file"]);
    let source = with_runfiles(&world, "");
    export().await.expect(0);
    // On this machine, which has the build itself, and changes its source.
    std::fs::write(source, "since then").unwrap();
    let runs = async |file: &str, to: &str, state: &str| {
        let to = world.path(to);
        let flag = format!("--from-export={file}");
        let ran = run(["exec", &flag, "--to", &to, state, "//app:app"]).await;
        ran.says(126, &["app/app", "neither an ELF file"]);
        let source = Path::new(&to).join(format!("{}.runfiles/_main/src.txt", app.path));
        assert_eq!(std::fs::read_to_string(source).unwrap(), "when it was exported");
    };
    runs(&file, "here", &world.state()).await;
    server.signal(rustix::process::Signal::TERM);
    server.end().await;
    // By way of another machine, where it was imported without them before.
    let without = world.path("without.outhaul");
    run(["export", "-o", &without, &world.state()]).await.expect(0);
    let state = format!("--state-dir={}", world.path("elsewhere"));
    for file in [&without, &file] {
        run(["import", file, &state]).await.says(0, &["imported build"]);
    }
    let again = world.path("again.outhaul");
    let ran = run(["export", "--runfiles", "-o", &again, &state]).await;
    ran.expect(0);
    let state = format!("--state-dir={}", world.path("a third one"));
    runs(&again, "there", &state).await;

    // A second run needs neither the workspace nor the output base.
    let again = world.path("copied");
    for is_away in [false, true] {
        if is_away {
            std::fs::remove_dir_all(world.exec_root()).unwrap();
            std::fs::remove_dir_all(world.path("workspace")).unwrap();
        }
        let args = ["exec", "--to", &again, &world.state(), "//app:app"];
        run(args).await.says(126, &["app/app", "neither an ELF file"]);
    }
    let source = Path::new(&again).join(format!("{}.runfiles/_main/src.txt", app.path));
    std::fs::remove_file(source).unwrap();
    run(["exec", "--to", &again, &world.state(), "//app:app"])
        .await
        .says(2, &["output root"]);
}
