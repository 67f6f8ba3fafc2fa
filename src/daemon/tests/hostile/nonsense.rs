//! Builds of random events.
//!
//! `OUTHAUL_HOSTILE_CASES` is how many random builds there are, `OUTHAUL_HOSTILE_SEED` repeats one.

use outhaul_testkit::number;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::*;

/// A name of few, so that they meet.
fn name(random: &mut StdRng) -> String {
    let odd = [
        "..", ".", "", "a\nb", "\u{7f}", "x\0", "A", "é", "link", "very", "deep", "a",
    ];
    let mut name = String::new();
    for n in 0..random.random_range(1..4) {
        if n > 0 {
            name.push('/');
        }
        match random.random_range(0..8) {
            0 => name.push_str(odd[random.random_range(0..odd.len())]),
            _ => name.push_str(["a", "b", "c"][random.random_range(0..3)]),
        }
    }
    name
}

/// Links, files and directories that earlier builds may have left where this one has outputs.
fn plant(bin: &Path, random: &mut StdRng) {
    let names = ["a", "b", "c", "a/b", "b/c", "c/a"];
    for _ in 0..random.random_range(0..8) {
        let path = bin.join(names[random.random_range(0..names.len())]);
        let to = names[random.random_range(0..names.len())];
        fs::create_dir_all(bin).unwrap();
        let _ = match random.random_range(0..5) {
            0 => std::os::unix::fs::symlink(bin.join(to), path),
            1 => std::os::unix::fs::symlink(to, path),
            2 => fs::hard_link(bin.join(to), path),
            3 => fs::create_dir(path),
            _ => fs::write(path, random.random_range(0..6_u32).to_string()),
        };
    }
}

fn content(f: &Fixture, random: &mut StdRng) -> Content {
    let bytes = random.random_range(0..6_u32).to_string();
    match random.random_range(0..10) {
        0 => Content::Symlink(
            [
                "../..",
                "/etc/passwd",
                "a",
                "loop",
                "",
                "b/../c",
                "../../..",
                "../../../..",
                "../../../../sources",
                "a/b",
                "../b",
                "c",
            ][random.random_range(0..12)]
            .to_owned(),
        ),
        1 => Content::Inline(bytes.into()),
        2 => Content::Unknown,
        3 => Content::Blob(absent(&bytes)),
        4 => {
            let hash = [random.random(); 32];
            Content::Blob(Digest::new(DigestFunction::Sha256, &hash, random.random()).unwrap())
        }
        _ => Content::Blob(f.cache.store().put(bytes)),
    }
}

fn event(f: &Fixture, random: &mut StdRng) -> Event {
    let id = |random: &mut StdRng| random.random_range(0..12_u32).to_string();
    let label = |random: &mut StdRng| match random.random_range(0..20) {
        0 => "not a label\n".to_owned(),
        1 => "/".repeat(random.random_range(0..40)),
        _ => format!("//p:{}", random.random_range(0..6)),
    };
    let files = |random: &mut StdRng| -> Vec<File> {
        (0..random.random_range(0..5))
            .map(|_| {
                let mut file = of(&name(random), content(f, random));
                if random.random_range(0..12) == 0 {
                    // Test logs and sources have no prefix.
                    (file.path, file.prefix_len) = ("test.log".into(), 0);
                }
                file
            })
            .collect()
    };
    let ids =
        |random: &mut StdRng| -> Vec<String> { (0..random.random_range(0..4)).map(|_| id(random)).collect() };
    let target = |random: &mut StdRng| TargetId {
        label: label(random),
        aspect: ["", "", "//x.bzl%a"][random.random_range(0..3)].to_owned(),
        configuration: String::new(),
    };
    match random.random_range(0..14) {
        0 => Event::Started(Started {
            command: ["build", "test", "run", "", "query"][random.random_range(0..5)].to_owned(),
            started_ms: random.random(),
            ..Started::default()
        }),
        1 => Event::ExecRoot(f.dir.path().join("execroot/_main").display().to_string()),
        2 => Event::TestResult(TestResult {
            label: label(random),
            run: random.random(),
            shard: random.random_range(0..3),
            attempt: random.random(),
            files: files(random),
            ..TestResult::default()
        }),
        3 => Event::TestSummary {
            label: label(random),
            configuration: String::new(),
            shard_count: random.random(),
            run_count: random.random_range(0..3),
        },
        4 => Event::Aborted {
            target: random.random::<bool>().then(|| target(random)),
            reason: "X".to_owned(),
            description: "\u{1b}".to_owned(),
        },
        5 => Event::Configured {
            label: label(random),
            kind: "sh_test rule".to_owned(),
            completions: (0..random.random_range(0..3)).map(|_| target(random)).collect(),
        },
        6 => Event::Unreadable(vec![format!("/{}", name(random))]),
        7 => Event::Finished {
            exit_code: random.random(),
            name: String::new(),
            ended_ms: 0,
        },
        8..=10 => Event::NamedSet(NamedSet {
            id: id(random),
            files: files(random),
            children: ids(random),
            authority: None,
        }),
        _ => Event::Completed(Completed {
            target: target(random),
            success: random.random(),
            groups: vec![OutputGroup {
                name: "default".to_owned(),
                sets: ids(random),
                files: files(random),
                incomplete: random.random_range(0..4) == 0,
            }],
            directories: files(random),
        }),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn builds_of_nonsense_settle_and_write_nothing_elsewhere() {
    let cases = number("OUTHAUL_HOSTILE_CASES").unwrap_or(12);
    let first = number("OUTHAUL_HOSTILE_SEED").unwrap_or_else(|| rand::rng().random_range(0..1 << 32));
    for seed in first..first.saturating_add(cases) {
        eprintln!("OUTHAUL_HOSTILE_SEED={seed} OUTHAUL_HOSTILE_CASES=1");
        let random = &mut StdRng::seed_from_u64(seed);
        let mut f = Fixture::new(random.random()).await;
        let exec_root = f.dir.path().join("execroot/_main");
        fs::create_dir_all(exec_root.join("sources")).unwrap();
        fs::write(exec_root.join("a"), "a source").unwrap();
        plant(&exec_root.join("bazel-out/k8/bin"), random);
        let before = elsewhere(f.dir.path());
        for _ in 0..random.random_range(1..80) {
            let event = event(&f, random);
            f.send(event).await;
            if random.random_range(0..30) == 0 {
                // The client goes, and comes back.
                f.services
                    .engine
                    .ended(&f.key, StreamEnd::Broken("gone".to_owned()))
                    .await;
            }
        }
        let settlement = settlement(&f).await;
        for message in &settlement.messages {
            assert!(!message.contains(char::is_control), "{message:?}");
        }
        assert_eq!(elsewhere(f.dir.path()), before, "OUTHAUL_HOSTILE_SEED={seed}");
        assert_eq!(fs::read_to_string(exec_root.join("a")).unwrap(), "a source");
        assert_eq!(
            wrong(&f).await,
            Vec::<String>::new(),
            "OUTHAUL_HOSTILE_SEED={seed}"
        );
    }
}
