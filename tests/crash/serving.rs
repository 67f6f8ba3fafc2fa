//! `outhaul serve`, killed while it takes builds, starts and ends.

use std::time::{Duration, Instant};

use outhaul_testkit::{PATIENCE, Running, in_time};

use crate::{
    client::Client,
    kill::Moment,
    settings::{cases, first_seed},
    world::World,
};

/// Kills in one world, so that a world has a past.
const KILLS_PER_WORLD: u64 = 12;

/// What a run has gone through.
#[derive(Debug, Default)]
struct Counts {
    worlds: u64,
    builds: u64,
    kills: u64,
    at_start: u64,
    at_end: u64,
    /// Events that had been acknowledged by who was killed.
    acked: i64,
    /// Outputs that were called present by who came after.
    present: usize,
    quarantined: usize,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_leaves_whole_files_and_the_next_one_goes_on() {
    let wanted = cases(6);
    let seed = first_seed();
    let mut counts = Counts::default();
    let mut spans = Spans::default();
    while counts.kills < wanted {
        let mut world = World::new(seed + counts.worlds).await;
        eprintln!("world {} in {}", world.seed, world.dir.path().display());
        let end = wanted.min(counts.kills + KILLS_PER_WORLD);
        while counts.kills < end {
            round(&mut world, &mut spans, &mut counts).await;
        }
        counts.worlds += 1;
        counts.quarantined += world.quarantined_in("state");
    }
    eprintln!("{counts:?}, seeds from {seed}");
}

/// About how long things take here, for choosing moments within them.
#[derive(Debug)]
struct Spans {
    start: Duration,
    build: Duration,
}

impl Default for Spans {
    fn default() -> Self {
        Self {
            start: Duration::from_millis(150),
            build: Duration::from_millis(400),
        }
    }
}

fn mean(old: Duration, new: Duration) -> Duration {
    (old * 3 + new) / 4
}

/// A build whose daemon is killed, daemons that go on with it, and a build that nobody disturbs.
async fn round(world: &mut World, spans: &mut Spans, counts: &mut Counts) {
    let mut dice = world.dice.clone();
    let build = world.builds.next(&mut dice);
    let missing: Vec<_> = build
        .files
        .keys()
        .filter(|path| !world.exec_root().join(path).exists())
        .cloned()
        .collect();
    let client = Client::new(build);
    let pause = Duration::from_micros(dice.below(6000));

    let mut server = Running::serve(world.serve()).await;
    let moment = Moment::of_build(&mut dice, world, spans.build, &missing);
    let pid = server.id();
    // Not every moment comes.
    let deadline = spans.build * 2;
    let (killing, sending) = (moment.clone(), client.clone());
    let killed = tokio::task::spawn_blocking(move || killing.kill(pid, deadline));
    let address = server.address().to_owned();
    // It ends with the connection; what it says of that does not matter here.
    let _ = sending.send(&address, pause).await;
    killed.await.unwrap();
    server.end().await;
    counts.kills += 1;
    counts.builds += 1;
    counts.at_end += u64::from(matches!(moment, Moment::Ending(..)));
    counts.acked += client.acked();
    world.assert_whole();
    world.assert_kept(&client);

    while dice.happens(0.35) {
        let mut starting = Running::start(world.serve());
        let pid = starting.id();
        let moment = Moment::of_start(&mut dice, spans.start + spans.build / 3);
        tokio::task::spawn_blocking(move || moment.kill(pid, PATIENCE))
            .await
            .unwrap();
        starting.end().await;
        counts.kills += 1;
        counts.at_start += 1;
        world.assert_whole();
        world.assert_kept(&client);
    }

    let began = Instant::now();
    let mut server = Running::serve(world.serve()).await;
    spans.start = mean(spans.start, began.elapsed());
    let address = server.address().to_owned();
    // The build is taken up after the listeners are open.
    let began = Instant::now();
    while client.acked() > 0 && world.status(&client.build.invocation_id).await.is_none() {
        assert!(
            began.elapsed() < PATIENCE,
            "world {}: {} acknowledged, and nobody knows the build of {moment:?}; {:?}\n{}",
            world.seed,
            client.acked(),
            crate::check::names(&world.state().join("journal")),
            server.logged("").await
        );
    }
    if !client.is_done() && dice.happens(0.5) {
        // The build tool lives, and comes back with what it knows of no acknowledgement for.
        in_time(client.send(&address, Duration::ZERO))
            .await
            .unwrap_or_else(|e| panic!("world {}: {e}", world.seed));
        world.assert_complete(&client.build);
    } else {
        // What it had acknowledged comes anyway.
        let began = Instant::now();
        loop {
            let missing = world.missing_up_to(&client.build, client.acked());
            if missing.is_empty() {
                break;
            }
            assert!(
                began.elapsed() < PATIENCE,
                "world {}: {missing:?}\n{}",
                world.seed,
                server.logged("").await
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    world.assert_swept(&[server.id()]).await;
    world.assert_whole();
    if client.acked() > 0 && dice.happens(0.5) {
        counts.present += world.assert_honest(&client.build.invocation_id).await;
    }

    let next = if dice.happens(0.3) {
        world.builds.again(&client.build)
    } else {
        world.builds.next(&mut dice)
    };
    let client = Client::new(next);
    let began = Instant::now();
    in_time(client.send(&address, pause)).await.unwrap();
    spans.build = mean(spans.build, began.elapsed());
    counts.builds += 1;
    world.assert_complete(&client.build);
    if dice.happens(0.5) {
        let present = world.assert_honest(&client.build.invocation_id).await;
        assert!(present >= client.build.files.len(), "{present}");
        counts.present += present;
    }
    if dice.happens(0.5) {
        server.signal(rustix::process::Signal::TERM);
        assert_eq!(server.end().await, Some(0));
        world.assert_swept(&[]).await;
    } else {
        server.kill();
        counts.kills += 1;
    }
    world.dice = dice;
}
