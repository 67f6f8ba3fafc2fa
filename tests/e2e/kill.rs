//! The daemon dies in the middle.

use std::path::{Path, PathBuf};

use outhaul_testkit::eventually;

use crate::harness::{Bazel, Daemon, Expected, Stage, Way, executed};

for_each_bazel!(real with 4 rarely: a_daemon_that_is_killed_goes_on_where_it_was);

const BIG: u64 = 100 << 20;

pub(crate) fn a_daemon_that_is_killed_goes_on_where_it_was(stage: &Stage) {
    let cache = stage.cache();
    let way = Way::to(&cache);
    let mut daemon = Daemon::reading(way.settings(), &[]);
    let bazel = stage.bazel(&cache);
    let expected = Expected::of(&bazel, &["//...", "//big"]);
    for round in 0..3 {
        // Anywhere in the download of the large output; the small ones come before it or meanwhile. The first is
        // early: not even they have all come.
        let point = match round {
            0 => 1,
            _ => rand::random_range(1 << 20..BIG * 3 / 4),
        };
        let start = || bazel.start("build", &[&daemon.bes(), "//...", "//big"]);
        let (build, note) = match way.wire() {
            Some(proxy) => {
                proxy.slow(25 << 20);
                let before = proxy.passed();
                let build = start();
                eventually("the download is under way", || proxy.passed() - before >= point);
                let passed = proxy.passed() - before;
                assert!(passed < BIG, "the download was over before the daemon was killed");
                (build, format!("killed after {passed} bytes in round {round}"))
            }
            // From a directory, all comes in an instant, if not at once.
            None => {
                let before = daemon.outhaul().statuses().len();
                let build = start();
                eventually("the build is known", || {
                    daemon.outhaul().statuses().len() > before
                });
                (build, format!("killed in round {round}"))
            }
        };
        let killed = daemon.pid();
        daemon.kill();
        daemon.restart();
        // Before it goes on downloading: at the latest with the build that it takes up from its journal.
        eventually("what the dead daemon left is swept", || {
            leftovers(&bazel, Some(killed)).is_empty()
        });
        way.flow();

        let run = build.wait().ok();
        let log = daemon.log();
        assert!(!log.contains("the record was damaged"), "{note}\n{log}");
        assert!(!log.contains("kept in memory only"), "{note}\n{log}");
        assert_eq!(
            expected.missing(&bazel),
            Vec::<String>::new(),
            "{note}; {run}\n{log}"
        );
        daemon.settled();
        // What comes next finds everything in its place.
        let run = bazel.build(&[&daemon.bes(), "//...", "//big"]).ok();
        assert_eq!(executed(&run), 0, "{note}; {run}");
        expected.are_there(&bazel, &daemon.log());
        let status = daemon.settled();
        assert_eq!(status["downloaded"], 0, "{note}; {status:#}");

        for path in ["big/big.bin", "gen/one.txt", "rules/flat.d"] {
            bazel.delete(&format!("bazel-bin/{path}"));
        }
    }
    daemon.terminate();
    assert_eq!(leftovers(&bazel, None), Vec::<PathBuf>::new());
}

/// What is below a Bazel's output bases under a temporary name of the product's: of one process, or of any.
fn leftovers(bazel: &Bazel, process: Option<u32>) -> Vec<PathBuf> {
    const NAME: &str = ".outhaul-tmp";
    fn visit(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.to_string_lossy().contains(NAME) {
                found.push(path.clone());
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                visit(&path, found);
            }
        }
    }
    let mut found = Vec::new();
    visit(&bazel.output_user_root(), &mut found);
    if let Some(process) = process {
        let name = format!("{process}-");
        found.retain(|path| path.to_string_lossy().contains(&name));
    }
    found
}
