//! Two daemons: on one state directory, and on one output root.

use std::time::{Duration, Instant};

use outhaul_testkit::{
    PATIENCE, Running,
    cache::{RequestFault, Rpc, Times},
    finish, in_time, until,
};
use tokio::task::JoinHandle;

use crate::{
    build::Build,
    check::names,
    client::Client,
    settings::{cases, first_seed},
    world::World,
};

impl World {
    fn claimed(&self) -> Vec<u8> {
        std::fs::read(self.output_base().join(".outhaul-newest._main")).unwrap_or_default()
    }

    /// As a process that is in the middle of placing older files, until this is closed.
    fn placing(&self) -> std::fs::File {
        let newest = std::fs::File::open(self.output_base().join(".outhaul-newest._main")).unwrap();
        rustix::fs::flock(&newest, rustix::fs::FlockOperation::LockShared).unwrap();
        newest
    }

    /// Such a process, which places some files of a build after a pause, all with other bytes, and is done.
    fn place_late(&self, build: &Build, pause: Duration, from: usize) -> JoinHandle<()> {
        let (placing, late, root) = (self.placing(), self.dir.path().join("late"), self.exec_root());
        let paths: Vec<String> = build.files.keys().skip(from).step_by(7).cloned().collect();
        tokio::task::spawn_blocking(move || {
            std::thread::sleep(pause);
            for path in paths {
                std::fs::write(&late, "older").unwrap();
                // Its directory may not be there yet.
                let _ = std::fs::rename(&late, root.join(path));
            }
            drop(placing);
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_owner_of_a_state_directory_is_named_to_others_that_want_it() {
    let mut world = World::new(first_seed()).await;
    let mut dice = world.dice.clone();
    let server = Running::serve(world.serve()).await;
    let client = Client::new(world.builds.next(&mut dice));
    client.send(server.address(), Duration::ZERO).await.unwrap();
    let holder = format!("pid {}", server.id());
    let file = world.dir.path().join("x.outhaul");
    let export = format!("-o{}", file.display());
    finish(world.command(&["export", &client.build.invocation_id, &export]))
        .await
        .expect(0);
    let cache = world.cache_flag();
    for args in [
        vec!["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none", &cache],
        vec!["gc"],
        vec!["import", file.to_str().unwrap()],
    ] {
        let ran = finish(world.command(&args)).await;
        assert!(ran.code.is_some_and(|code| code != 0), "{args:?}: {ran:?}");
        for part in [&*holder, "outhaul serve", "--state-dir"] {
            assert!(ran.err.contains(part), "{args:?}: no {part:?} in {}", ran.err);
        }
    }
    // Those that only ask are answered by the daemon.
    let some = client.build.files.keys().next().unwrap();
    for args in [["status", "--json"], ["get", some], ["stat", some]] {
        finish(world.command(&args)).await.expect(0);
    }
    // A command of the build tool's is never refused.
    let mut run = world.command(&["run", &world.cache_flag()]);
    run.current_dir(world.dir.path()).args(["--", "true", "build"]);
    finish(run).await.expect(0);
    // Nothing holds what a killed process held, whatever the file says.
    drop(server);
    std::fs::write(world.state().join("lock"), "pid 1\ncommand init\nsince 1\n").unwrap();
    let _server = Running::serve(world.serve()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_build_that_another_daemon_follows_ends_what_an_older_one_still_wants() {
    let mut world = World::new(first_seed()).await;
    let mut dice = world.dice.clone();
    let (first, mut second) = (
        Running::serve(world.serve()).await,
        Running::serve(world.serve_in("other")).await,
    );
    for rpc in [Rpc::BatchRead, Rpc::StreamRead] {
        world
            .cache
            .faults()
            .request(rpc, RequestFault::Delay(Duration::from_secs(8)), Times::Always);
    }
    let older = Client::new(world.builds.next(&mut dice));
    let (sending, address) = (older.clone(), first.address().to_owned());
    let sent = tokio::spawn(async move { sending.send(&address, Duration::ZERO).await });
    until(
        "its last event is held, and its requests are on their way",
        async || older.acked() >= older.messages() - 1 && world.cache.stats().batch_reads > 0,
    )
    .await;
    world.cache.faults().clear();
    let newer = Client::new(world.builds.next(&mut dice));
    let began = Instant::now();
    in_time(newer.send(second.address(), Duration::ZERO))
        .await
        .unwrap();
    assert!(began.elapsed() < PATIENCE / 4, "nobody waits for the older one");
    world.assert_complete(&newer.build);
    // The older one's bytes come, and go nowhere; its client is let go.
    in_time(sent).await.unwrap().unwrap();
    world.assert_complete(&newer.build);
    let log = first.logged("another outhaul process, pid").await;
    assert!(log.contains("(outhaul serve)"), "{log}");
    let status = world.status(&older.build.invocation_id).await.unwrap();
    assert_eq!(status["state"], "superseded", "{status}");
    assert_eq!(status["failed"], 0, "{status}");

    // The first one's turn again, with what it knows.
    let third = Client::new(world.builds.again(&older.build));
    third.send(first.address(), Duration::ZERO).await.unwrap();
    world.assert_complete(&third.build);
    assert!(second.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_is_passed_on_to_another_daemon_is_followed_by_both() {
    let mut world = World::new(first_seed()).await;
    let mut dice = world.dice.clone();
    let second = Running::serve(world.serve_in("other")).await;
    let mut command = world.serve();
    command.arg(format!("--bes-backend={}", second.address()));
    let first = Running::serve(command).await;
    for _ in 0..3 {
        let client = Client::new(world.builds.next(&mut dice));
        in_time(client.send(first.address(), Duration::ZERO))
            .await
            .unwrap();
        world.assert_complete(&client.build);
        for state in ["state", "other"] {
            let ran = finish(world.command_in(state, &["status", "--json", &client.build.invocation_id]));
            let status = ran.await.expect(0).json().remove(0);
            assert_eq!(
                (&status["superseded"], &status["failed"]),
                (&0.into(), &0.into()),
                "{state}"
            );
        }
    }
}

/// A process that has the lock for so long that the newer build is not held any more: what it places then is put right
/// when it is done, by the daemon that has said so.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_stopped_process_places_after_the_end_of_a_newer_build_is_put_right() {
    let mut world = World::new(first_seed()).await;
    let mut dice = world.dice.clone();
    let server = Running::serve(world.serve()).await;
    let older = Client::new(world.builds.next(&mut dice));
    older.send(server.address(), Duration::ZERO).await.unwrap();
    let placing = world.placing();
    let began = Instant::now();
    let newer = Client::new(world.builds.next(&mut dice));
    in_time(newer.send(server.address(), Duration::ZERO))
        .await
        .unwrap();
    assert!(began.elapsed() > Duration::from_secs(5), "it was not held");
    world.assert_complete(&newer.build);
    server
        .logged("which has been placing a file of an older build")
        .await;
    world.place_late(&newer.build, Duration::ZERO, 0).await.unwrap();
    drop(placing);
    server.logged("checking again what it may have replaced").await;
    let is_older =
        |path: &String| std::fs::read(world.exec_root().join(path)).is_ok_and(|bytes| bytes == b"older");
    until("it is put right", async || {
        !newer.build.files.keys().any(is_older)
    })
    .await;
    world.assert_complete(&newer.build);
}

/// Older builds under way in one daemon while newer ones go through the other.
#[tokio::test(flavor = "multi_thread")]
async fn two_daemons_that_write_into_one_root_leave_the_newest_builds_files() {
    let (seed, wanted) = (first_seed(), cases(6));
    let mut world = World::new(seed).await;
    eprintln!("world {seed} in {}", world.dir.path().display());
    let mut dice = world.dice.clone();
    let mut servers = [
        Running::serve(world.serve()).await,
        Running::serve(world.serve_in("other")).await,
    ];
    let (mut overtaken, mut late) = (0, 0);
    for round in 0..wanted {
        // Slow enough that there is something to overtake.
        world.cache.faults().clear();
        let slow = RequestFault::Delay(Duration::from_millis(dice.below(150)));
        for rpc in [Rpc::BatchRead, Rpc::StreamRead] {
            world.cache.faults().request(rpc, slow, Times::Always);
        }
        let first = dice.below(2) as usize;
        let older = Client::new(world.builds.next(&mut dice));
        let before = world.claimed();
        let (sending, address) = (older.clone(), servers[first].address().to_owned());
        let pause = Duration::from_micros(dice.below(5000));
        let sent = tokio::spawn(async move { sending.send(&address, pause).await });
        until("it begins", async || world.claimed() != before).await;
        tokio::time::sleep(Duration::from_micros(dice.below(120_000))).await;
        overtaken += u64::from(!older.is_done());
        let newer = Client::new(match dice.happens(0.3) {
            true => world.builds.again(&older.build),
            false => world.builds.next(&mut dice),
        });
        // A third process may be in the middle of placing older files, and place them late.
        let late = dice.happens(0.35).then(|| {
            late += 1;
            let pause = Duration::from_millis(1000 + dice.below(1500));
            world.place_late(&newer.build, pause, dice.below(30) as usize)
        });
        in_time(newer.send(servers[1 - first].address(), Duration::ZERO))
            .await
            .unwrap_or_else(|e| panic!("world {seed}: {e}"));
        if let Some(late) = late {
            late.await.unwrap();
        }
        world.assert_complete(&newer.build);
        in_time(sent)
            .await
            .unwrap()
            .unwrap_or_else(|e| panic!("world {seed}: {e}"));
        world.assert_complete(&newer.build);
        let alive = [0, 1].map(|n: usize| servers[n].id());
        world.assert_swept(&alive).await;
        if round % 20 == 19 {
            // One that comes again with older builds in its journal.
            let state = ["state", "other"][first];
            servers[first].kill();
            servers[first] = Running::serve(world.serve_in(state)).await;
            world.assert_complete(&newer.build);
        }
    }
    let left = names(&world.output_base());
    assert!(left.contains(".outhaul-newest._main"), "{left:?}");
    eprintln!(
        "two daemons: {wanted} pairs of builds, {overtaken} overtaken, {late} with a third, seed {seed}"
    );
}
