//! Commands that end by themselves, killed on the way: `stage`, `export`, `import`, `gc`, `run`.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant, SystemTime},
};

use outhaul_testkit::{Chance, Running, finish, in_time, until};

use crate::{
    build::Build,
    check::names,
    client::Client,
    settings::{cases, first_seed},
    world::World,
};

/// A world in which some builds were followed, and no daemon runs any more.
async fn settled(seed: u64, builds: u64) -> (World, Vec<Build>) {
    let mut world = World::new(seed).await;
    let mut server = Running::serve(world.serve()).await;
    let mut built = Vec::new();
    for _ in 0..builds {
        let mut dice = world.dice.clone();
        let client = Client::new(world.builds.next(&mut dice));
        world.dice = dice;
        in_time(client.send(server.address(), Duration::ZERO))
            .await
            .unwrap();
        built.push((*client.build).clone());
    }
    server.signal(rustix::process::Signal::TERM);
    assert_eq!(server.end().await, Some(0));
    eprintln!("world {seed} in {}", world.dir.path().display());
    (world, built)
}

/// Runs a command and kills it after some part of the time that it usually takes. False when it was quicker.
pub(crate) async fn killed(command: Command, dice: &mut Chance, usual: &mut Duration) -> bool {
    let began = Instant::now();
    let mut running = Running::start(command);
    let after = Duration::from_micros(dice.below(usual.as_micros() as u64 + 1));
    match tokio::time::timeout(after, running.end()).await {
        Ok(code) => {
            assert_eq!(code, Some(0), "{running}");
            *usual = (*usual * 3 + began.elapsed()) / 4;
            false
        }
        // It may have ended since it was looked at.
        Err(_) if !running.is_running() => {
            assert_eq!(running.end().await, Some(0), "{running}");
            false
        }
        Err(_) => {
            running.kill();
            // So that late moments are reached as well.
            *usual = usual.mul_f64(1.01);
            true
        }
    }
}

/// Files below a directory that a build wants, and all others but those of our own.
fn staged(to: &Path, build: &Build) -> (usize, Vec<String>) {
    let (mut whole, mut wrong) = (0, Vec::new());
    let mut open = vec![to.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().filter_map(Result::ok) {
            let path = entry.path();
            let name = path.strip_prefix(to).unwrap().to_str().unwrap().to_owned();
            if name.starts_with(".outhaul") {
                continue;
            }
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                open.push(path);
            } else if kind.is_symlink() && build.links.contains_key(&name)
                || fs::read(&path).is_ok_and(|bytes| build.wants(&name, &bytes))
            {
                whole += 1;
            } else {
                wrong.push(name);
            }
        }
    }
    (whole, wrong)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_stage_leaves_whole_files_and_is_not_taken_for_done() {
    let seed = first_seed();
    let (world, builds) = settled(seed, 1).await;
    let build = &builds[0];
    let mut dice = world.dice.clone();
    let mut usual = Duration::from_millis(150);
    let (mut kills, wanted) = (0, cases(3));
    while kills < wanted {
        let to = world.dir.path().join(format!("staged{kills}"));
        let flag = format!("--to={}", to.display());
        let args = ["stage", "--invocation", &build.invocation_id, &flag];
        let was_killed = killed(world.command(&args), &mut dice, &mut usual).await;
        let (whole, wrong) = staged(&to, build);
        assert_eq!(wrong, Vec::<String>::new(), "world {seed}: {}", to.display());
        let mut asking = world.command(&["is-staged", "--json", &flag]);
        if was_killed {
            let said = finish(std::mem::replace(&mut asking, world.command(&args))).await;
            let is_staged = said.code == Some(0);
            assert!(
                !is_staged || whole >= build.files.len(),
                "world {seed}: {whole} files are called all: {said:?}"
            );
            finish(asking).await.expect(0);
        }
        let (whole, wrong) = staged(&to, build);
        assert_eq!(wrong, Vec::<String>::new(), "world {seed}");
        assert!(whole >= build.files.len(), "world {seed}: {whole}");
        let left: Vec<_> = names(&to)
            .into_iter()
            .filter(|name| name.contains("tmp"))
            .collect();
        assert_eq!(left, Vec::<String>::new(), "world {seed}");
        kills += u64::from(was_killed);
    }
    eprintln!("stage: {kills} kills, seed {seed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_export_or_import_is_done_again_with_the_same_result() {
    let seed = first_seed();
    let (world, builds) = settled(seed, 1).await;
    let id = builds[0].invocation_id.clone();
    let mut dice = world.dice.clone();
    let mut usual = Duration::from_millis(60);
    let file = world.dir.path().join("build.outhaul");
    let export = format!("-o{}", file.display());
    finish(world.command(&["export", &id, &export])).await.expect(0);
    let whole = fs::read(&file).unwrap();
    let (mut kills, wanted) = (0, cases(4));
    while kills < wanted {
        if dice.happens(0.3) {
            let other = world.dir.path().join(format!("other{kills}.outhaul"));
            let flag = format!("-o{}", other.display());
            kills += u64::from(killed(world.command(&["export", &id, &flag]), &mut dice, &mut usual).await);
            if let Ok(bytes) = fs::read(&other) {
                assert!(bytes == whole, "world {seed}: part of an export has its name");
            }
            continue;
        }
        let state = format!("imported{kills}");
        let import = || world.command_in(&state, &["import", file.to_str().unwrap()]);
        if !killed(import(), &mut dice, &mut usual).await {
            continue;
        }
        kills += 1;
        let journals = world.dir.path().join(&state).join("journal");
        assert!(
            names(&journals).iter().all(|name| !name.ends_with(".journal")),
            "world {seed}: nothing of an imported build is to be done"
        );
        finish(import()).await.expect(0);
        let listed = finish(world.command_in(&state, &["ls", "--json", &id]))
            .await
            .expect(0);
        let outputs = builds[0].files.len() + builds[0].links.len() + builds[0].directories.len();
        assert_eq!(listed.json().len(), outputs, "world {seed}");
        let left: Vec<_> = names(&journals)
            .into_iter()
            .filter(|name| !name.ends_with(".settled") && name != "lock")
            .collect();
        assert_eq!(left, Vec::<String>::new(), "world {seed}");
    }
    eprintln!("export, import: {kills} kills, seed {seed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_gc_is_done_again_and_forgets_nothing_else() {
    let seed = first_seed();
    let (mut world, _) = settled(seed, 1).await;
    let mut usual = Duration::from_millis(60);
    let (mut kills, wanted) = (0, cases(3));
    while kills < wanted {
        let mut dice = world.dice.clone();
        let mut server = Running::serve(world.serve()).await;
        let mut clients = Vec::new();
        for _ in 0..2 {
            let client = Client::new(world.builds.next(&mut dice));
            client.send(server.address(), Duration::ZERO).await.unwrap();
            clients.push(client);
        }
        let newest = clients.pop().unwrap();
        let journals = world.state().join("journal");
        until("it is settled for the daemon, too", async || {
            !names(&journals).iter().any(|name| name.ends_with(".journal"))
        })
        .await;
        server.signal(rustix::process::Signal::TERM);
        assert_eq!(server.end().await, Some(0));
        world.dice = dice;
        for name in names(&journals) {
            if name.ends_with(".settled") && !name.starts_with(&newest.build.invocation_id) {
                let file = fs::File::options()
                    .append(true)
                    .open(journals.join(name))
                    .unwrap();
                file.set_modified(SystemTime::now() - Duration::from_secs(40 * 86400))
                    .unwrap();
            }
        }
        let mut dice = world.dice.clone();
        kills += u64::from(killed(world.command(&["gc", "--max-age=30d"]), &mut dice, &mut usual).await);
        world.dice = dice;
        world.assert_kept(&newest);
        world.assert_complete(&newest.build);
        finish(world.command(&["gc", "--max-age=30d"])).await.expect(0);
        assert_eq!(
            world.status(&newest.build.invocation_id).await.unwrap()["state"],
            "settled"
        );
        let left = names(&journals);
        let others = left
            .iter()
            .filter(|name| *name != "lock" && !name.starts_with(&newest.build.invocation_id));
        assert_eq!((others.count(), left.len()), (0, 2), "{left:?}");
        world.assert_honest(&newest.build.invocation_id).await;
    }
    eprintln!("gc: {kills} kills, seed {seed}");
}

/// A build tool that waits until it is told to end.
fn waiting_tool(dir: &Path) -> PathBuf {
    let path = dir.join("bazel");
    // Asked for its version or its options, it says nothing.
    let text = "#!/bin/sh\ncase \"$*\" in *--version*|*--build_event_json_file*) exit 2;; esac\necho \"$@\" > \"$TOOL_DIR/args.new\"\nmv \"$TOOL_DIR/args.new\" \"$TOOL_DIR/args\"\n\
                while [ ! -e \"$TOOL_DIR/end\" ]; do sleep 0.01; done\n";
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_run_leaves_whole_files_and_the_next_one_ends_right() {
    let seed = first_seed();
    let mut world = World::new(seed).await;
    eprintln!("world {seed} in {}", world.dir.path().display());
    let (mut kills, wanted) = (0, cases(3));
    let mut round = 0;
    let mut usual = Duration::from_millis(150);
    while kills < wanted {
        let mut dice = world.dice.clone();
        for is_killed in [true, false] {
            round += 1;
            let dir = world.dir.path().join(format!("tool{round}"));
            fs::create_dir(&dir).unwrap();
            let tool = waiting_tool(&dir);
            let mut command = world.command(&["run", &world.cache_flag()]);
            command
                .env("TOOL_DIR", &dir)
                .current_dir(world.dir.path())
                .arg("--")
                .arg(tool)
                .args(["build", "//..."]);
            let mut running = Running::start(command);
            let client = Client::new(world.builds.next(&mut dice));
            until("the tool is started", async || dir.join("args").exists()).await;
            let args = fs::read_to_string(dir.join("args")).unwrap();
            let address = args
                .split_whitespace()
                .find_map(|arg| arg.strip_prefix("--bes_backend="))
                .unwrap_or_else(|| panic!("{args}"))
                .to_owned();
            let began = Instant::now();
            let after = Duration::from_micros(dice.below(usual.as_micros() as u64 + 1));
            let sending = client.send(&address, Duration::ZERO);
            if is_killed {
                let sent = tokio::time::timeout(after, sending).await;
                kills += u64::from(sent.is_err());
                running.kill();
                fs::write(dir.join("end"), "").unwrap();
                world.assert_whole();
            } else {
                in_time(sending).await.unwrap();
                usual = (usual * 3 + began.elapsed()) / 4;
                fs::write(dir.join("end"), "").unwrap();
                world.assert_complete(&client.build);
                assert_eq!(running.end().await, Some(0), "{running}");
                world.assert_swept(&[]).await;
            }
        }
        world.dice = dice;
    }
    eprintln!("run: {kills} kills, seed {seed}");
}
