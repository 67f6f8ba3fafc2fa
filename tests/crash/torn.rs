//! State directories as a power cut, a bad disk or a backup leave them: torn, damaged, from another time.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use outhaul_testkit::{Chance, PATIENCE, Running, in_time};

use crate::{
    client::Client,
    settings::{cases, first_seed},
    world::World,
};

/// Copies a directory's files in any order, with time between them, while somebody may be writing.
fn copy_torn(from: &Path, to: &Path, dice: &mut Chance) {
    let mut open = vec![PathBuf::new()];
    let mut files = Vec::new();
    while let Some(dir) = open.pop() {
        fs::create_dir_all(to.join(&dir)).unwrap();
        for entry in fs::read_dir(from.join(&dir))
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
        {
            let path = dir.join(entry.file_name());
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => open.push(path),
                Ok(kind) if kind.is_file() => files.push(path),
                _ => {}
            }
        }
    }
    while !files.is_empty() {
        let path = files.swap_remove(dice.below(files.len() as u64) as usize);
        // It may be gone by now.
        let _ = fs::copy(from.join(&path), to.join(&path));
        if dice.happens(0.3) {
            std::thread::sleep(Duration::from_micros(dice.below(8000)));
        }
    }
}

/// What was done to a file.
fn damage(path: &Path, dice: &mut Chance) -> String {
    let mut bytes = fs::read(path).unwrap();
    let what = match dice.below(7) {
        0 if !bytes.is_empty() => {
            let flips = 1 + dice.below(3);
            let mut places = Vec::new();
            for _ in 0..flips {
                let at = dice.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << dice.below(8);
                places.push(at);
            }
            format!("bits flipped at {places:?}")
        }
        1 if !bytes.is_empty() => {
            // Where data is, rather than the space that was reserved for it.
            let end = bytes.iter().rposition(|b| *b != 0).unwrap_or(0) as u64 + 1;
            let at = dice.below(end) as usize;
            bytes[at] = dice.number() as u8;
            format!("another byte at {at}")
        }
        2 => {
            let at = dice.below(bytes.len() as u64 + 1) as usize;
            let end = bytes.len().min(at + 1 + dice.below(8192) as usize);
            bytes[at..end].fill(0);
            format!("zeros at {at}..{end}")
        }
        3 => {
            let len = dice.below(bytes.len() as u64 + 1) as usize;
            bytes.truncate(len);
            format!("cut at {len}")
        }
        4 => {
            let more = dice.below(5000) as usize;
            let more = dice.bytes(more);
            bytes.extend_from_slice(&more);
            format!("{} bytes more", more.len())
        }
        5 => {
            fs::remove_file(path).unwrap();
            return "removed".into();
        }
        _ => {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
            return "a directory".into();
        }
    };
    fs::write(path, bytes).unwrap();
    what
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            match entry.file_type().unwrap() {
                kind if kind.is_dir() => open.push(entry.path()),
                kind if kind.is_file() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found.sort();
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_state_directory_is_like_nothing_false_is_said_and_the_next_build_ends_right() {
    let (seed, wanted) = (first_seed(), cases(6));
    let (mut done, mut worlds, mut quarantined, mut damages, mut present) = (0, 0, 0, 0, 0);
    while done < wanted {
        let mut world = World::new(seed + worlds).await;
        worlds += 1;
        eprintln!("world {} in {}", world.seed, world.dir.path().display());
        let mut old: Vec<PathBuf> = Vec::new();
        let mut state = "state".to_owned();
        for round in 0..10 {
            if done == wanted {
                break;
            }
            done += 1;
            let mut dice = world.dice.clone();
            // A build that is under way while its daemon's state is copied.
            let server = Running::serve(world.serve_in(&state)).await;
            let client = Client::new(world.builds.next(&mut dice));
            let (sending, address) = (client.clone(), server.address().to_owned());
            let pause = Duration::from_micros(dice.below(4000));
            let sent = tokio::spawn(async move { sending.send(&address, pause).await });
            tokio::time::sleep(Duration::from_micros(dice.below(150_000))).await;
            let (from, to) = (
                world.dir.path().join(&state),
                world.dir.path().join(format!("torn{round}")),
            );
            let (copied, mut copying) = (to.clone(), dice.clone());
            tokio::task::spawn_blocking(move || copy_torn(&from, &copied, &mut copying))
                .await
                .unwrap();
            dice.number();
            in_time(sent).await.unwrap().unwrap();
            drop(server);
            world.assert_complete(&client.build);

            // That copy, or one from an earlier time; damaged, or not.
            old.push(to);
            let chosen = match dice.happens(0.25) {
                true => old.swap_remove(dice.below(old.len() as u64) as usize),
                false => old.pop().unwrap(),
            };
            let mut what = vec![chosen.display().to_string()];
            if dice.happens(0.7) {
                damages += 1;
                // What cannot be locked is an error of its own, before anything is believed.
                let mut files = files(&chosen);
                files.retain(|path| path.file_name().is_some_and(|name| name != "lock"));
                for _ in 0..=dice.below(2) {
                    if !files.is_empty() {
                        let path = files.swap_remove(dice.below(files.len() as u64) as usize);
                        what.push(format!("{}: {}", path.display(), damage(&path, &mut dice)));
                    }
                }
            }
            state = chosen.file_name().unwrap().to_str().unwrap().to_owned();
            let context = format!("world {}: {what:#?}", world.seed);
            let before = world.quarantined_in(&state);
            let server = Running::serve(world.serve_in(&state)).await;
            let next = match dice.happens(0.3) {
                true => world.builds.again(&client.build),
                false => world.builds.next(&mut dice),
            };
            let next = Client::new(next);
            let sent = tokio::time::timeout(PATIENCE, next.send(server.address(), pause)).await;
            if !matches!(sent, Ok(Ok(()))) {
                panic!("{context}\n{sent:?}\n{}", server.logged("").await);
            }
            let missing = world.missing_up_to(&next.build, i64::MAX);
            assert!(
                missing.is_empty(),
                "{context}\n{missing:?}\n{}",
                server.logged("").await
            );
            world.assert_complete(&next.build);
            present += world.assert_honest_in(&state, &next.build.invocation_id).await;
            quarantined += world.quarantined_in(&state) - before;
            drop(server);
            world.dice = dice;
        }
    }
    eprintln!(
        "{done} states, {damages} of them damaged, {quarantined} records set aside, {present} outputs called present, \
         seeds from {seed}"
    );
}
