//! Events that go on to another build event service: what is said there is true by then, and complete.

use std::sync::{Arc, Mutex};

use outhaul::proto::build_event_stream::{build_event::Payload, build_event_id::Id, file};
use outhaul_testkit::eventually;
use prost::Message as _;

use crate::harness::{Bazel, Daemon, Expected, Presence, Proxy, Seen, Stage, Upstream, Version, executed};

for_each_bazel!(real with 4 rarely:
    nobody_hears_of_a_target_before_its_outputs_are_there,
    nobody_hears_of_a_test_before_its_log_is_there,
    the_whole_stream_goes_on_in_order_as_bazel_sent_it,
    a_target_that_cannot_be_downloaded_goes_on_as_it_came_unless_strict,
    files_are_called_by_their_place_on_disk_when_asked_for,
);

/// Four targets of a megabyte each, which takes a second on the slow wire.
const SLOW: &str = r#"
[genrule(
    name = "slow%d" % i,
    outs = ["slow%d.txt" % i],
    cmd = "yes 'line %d' 2>/dev/null | head -c 1048576 > $@ || test -s $@" % i,
) for i in range(4)]
"#;
/// Bytes a second.
const WIRE: u64 = 1 << 20;

/// The workspace with targets that are slow to fetch.
pub(crate) fn with_slow_targets(bazel: &Bazel) {
    std::fs::create_dir(bazel.workspace().join("slow")).unwrap();
    bazel.write("slow/BUILD", SLOW);
}

fn nobody_hears_of_a_target_before_its_outputs_are_there(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    with_slow_targets(&bazel);
    let expected = Expected::of(&bazel, &["//..."]);
    let look = |hold: &str| {
        let presence = Presence::default();
        let upstream = Upstream::watched(presence.watch());
        let proxy = Proxy::start(&cache);
        proxy.slow(WIRE);
        let daemon = Daemon::with(&[&format!("--remote-cache={}", proxy.url()), hold, &upstream.flag()]);
        bazel.clean();
        let run = bazel.build(&[&daemon.bes(), "//..."]).ok();
        assert_eq!(executed(&run), 0, "everything is in the cache; {run}");
        expected.are_there(&bazel, &daemon.log());
        let status = daemon.settled();
        upstream.complete(status["invocation_id"].as_str().unwrap(), || daemon.log());
        let looked = presence.looked();
        assert!(looked.completions > 10 && looked.files > 20, "{looked:#?}");
        looked
    };
    let held = look("--hold=target");
    assert_eq!(held.wrong_for(stage.version), Vec::<&str>::new());
    // Who looks would have noticed: only the command waits there.
    let not_held = look("--hold=invocation");
    assert!(
        not_held
            .wrong
            .iter()
            .filter(|wrong| wrong.contains("slow"))
            .count()
            >= 4,
        "{not_held:#?}"
    );
    assert_eq!(
        (held.completions, held.files),
        (not_held.completions, not_held.files)
    );
}

fn nobody_hears_of_a_test_before_its_log_is_there(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let targets = ["//tests:pass", "//deep/er:deep_test"];
    let presence = Presence::default();
    let upstream = Upstream::watched(presence.watch());
    let proxy = Proxy::start(&cache);
    let daemon = Daemon::with(&[
        &format!("--remote-cache={}", proxy.url()),
        "--hold=target",
        &upstream.flag(),
    ]);
    bazel.test(&targets).ok();
    bazel.clean();
    // Long enough for the events to arrive first, if they may.
    proxy.slow(2 << 10);
    let run = bazel
        .test(&[&[daemon.bes().as_str()], &targets[..]].concat())
        .ok();
    assert!(
        run.err.contains("2 tests pass") || run.out().contains("2 tests pass"),
        "{run}"
    );
    let status = daemon.settled();
    upstream.complete(status["invocation_id"].as_str().unwrap(), || daemon.log());
    let looked = presence.looked();
    // Bazel 4 names the logs alone.
    assert!(looked.completions >= 2 && looked.files >= 2, "{looked:#?}");
    assert_eq!(looked.wrong, Vec::<String>::new());
}

fn the_whole_stream_goes_on_in_order_as_bazel_sent_it(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    let upstream = Upstream::start();
    let daemon = Daemon::with(&[
        &format!("--remote-cache={}", cache.url()),
        "--hold=target",
        &upstream.flag(),
    ]);
    let file = bazel.workspace().join("events.bin");
    let to_file = format!("--build_event_binary_file={}", file.display());
    bazel.build(&[&daemon.bes(), &to_file, "//..."]).ok();
    let id = daemon.settled()["invocation_id"].as_str().unwrap().to_owned();
    let stream = upstream.complete(&id, || daemon.log());
    // No number is missing, and nothing came twice where nothing went wrong.
    let numbers: Vec<i64> = upstream.seen(&id).iter().map(|seen| seen.sequence()).collect();
    let last = i64::try_from(stream.len()).unwrap();
    assert_eq!(numbers, (1..=last).collect::<Vec<_>>());
    // Bazel writes the same events into its file. (Now and then in another order: it hands them to its transports from
    // several threads.)
    let written = std::fs::read(file).unwrap();
    let mut rest = written.as_slice();
    let mut written = Vec::new();
    while !rest.is_empty() {
        let length = prost::decode_length_delimiter(&mut rest).unwrap();
        let (event, after) = rest.split_at(length);
        written.push(event);
        rest = after;
    }
    let mut forwarded: Vec<&[u8]> = stream.iter().filter_map(|seen| seen.bazel_event()).collect();
    assert_eq!(
        forwarded.len(),
        stream.len() - 1,
        "only the last request has no event"
    );
    written.sort_unstable();
    forwarded.sort_unstable();
    assert!(written == forwarded, "other events than Bazel wrote");
    // The calls around the stream go on as well; the closing ones after it, and after Bazel's own end.
    eventually("the lifecycle calls have come", || {
        upstream.lifecycle().len() >= 4
    });
    let calls = upstream.lifecycle();
    let names: Vec<&str> = calls.iter().map(|call| call.name).collect();
    assert_eq!(
        names,
        [
            "build_enqueued",
            "attempt_started",
            "attempt_finished",
            "build_finished"
        ]
    );
    let after: Vec<usize> = calls.iter().map(|call| call.after).collect();
    assert_eq!(after, [0, 0, stream.len(), stream.len()]);
    // The request as a whole is Bazel's, ids and all.
    let first = &stream[0].request;
    assert!(
        first
            .notification_keywords
            .iter()
            .any(|keyword| keyword == "protocol_name=BEP"),
        "{first:?}"
    );
    assert_eq!(first.encoded_len(), stream[0].bytes.len());
    let builds: Vec<String> = stream
        .iter()
        .map(|seen| {
            let ordered = seen.request.ordered_build_event.clone().unwrap();
            ordered.stream_id.unwrap().build_id
        })
        .collect();
    assert!(
        builds.iter().all(|build| *build == calls[0].stream.build_id),
        "{builds:?}"
    );
}

/// Whether an event reports that a target is complete.
fn completes(seen: &Seen, label: &str) -> bool {
    seen.decoded()
        .and_then(|event| event.id?.id)
        .is_some_and(|id| matches!(id, Id::TargetCompleted(target) if target.label == label))
}

fn a_target_that_cannot_be_downloaded_goes_on_as_it_came_unless_strict(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    with_slow_targets(&bazel);
    let targets = ["//:a", "//slow:slow0"];
    Expected::of(&bazel, &targets);
    let attempt = |strict: &[&str]| {
        let upstream = Upstream::start();
        let proxy = Proxy::start(&cache);
        let cache_flag = format!("--remote-cache={}", proxy.url());
        let backend = upstream.flag();
        let args = [
            cache_flag.as_str(),
            "--remote-retries=1",
            "--remote-retry-max-delay=100ms",
            "--hold=target",
            backend.as_str(),
        ];
        let daemon = Daemon::with(&[&args, strict].concat());
        bazel.clean();
        // In the middle of the large output, which is not the first.
        proxy.slow(WIRE / 8);
        let running = bazel.start("build", &[&[daemon.bes().as_str()], &targets[..]].concat());
        eventually("the download is under way", || proxy.passed() > 128 << 10);
        proxy.cut();
        let run = running.wait();
        eventually("the invocation is settled", || {
            daemon.outhaul().status()["state"] == "settled"
        });
        let status = daemon.outhaul().status();
        assert!(status["failed"].as_u64() >= Some(1), "{status:#}; {run}");
        assert!(!bazel.has("bazel-bin/slow/slow0.txt"), "nothing is there in part");
        let id = status["invocation_id"].as_str().unwrap().to_owned();
        (run, id, upstream, daemon)
    };

    let (run, id, upstream, daemon) = attempt(&[]);
    assert_eq!(run.code, Some(0), "{run}");
    let stream = upstream.complete(&id, || daemon.log());
    assert!(stream.iter().any(|seen| completes(seen, "//slow:slow0")), "{run}");

    let (run, id, upstream, _daemon) = attempt(&["--strict"]);
    assert_eq!(run.code, Some(STREAM_FAILED), "{run}");
    assert!(
        run.err.contains("outhaul: ") && run.err.contains("slow0"),
        "{run}"
    );
    let stream = upstream.stream(&id);
    assert!(
        !stream.is_empty()
            && !stream
                .iter()
                .any(|seen| seen.is_end() || completes(seen, "//slow:slow0")),
        "{} events have come",
        stream.len()
    );
}

/// Bazel's exit code when its event stream failed for good (PERSISTENT_BUILD_EVENT_SERVICE_UPLOAD_ERROR).
const STREAM_FAILED: i32 = 45;

fn files_are_called_by_their_place_on_disk_when_asked_for(stage: &Stage) {
    let cache = stage.cache();
    let bazel = stage.bazel(&cache);
    with_slow_targets(&bazel);
    Expected::of(&bazel, &["//..."]);
    // What was named, and what of it was not there at that instant.
    let named: Arc<Mutex<(usize, Vec<String>)>> = Arc::default();
    let looking = named.clone();
    let upstream = Upstream::watched(move |seen| {
        let Some(Payload::NamedSetOfFiles(set)) = seen.decoded().and_then(|event| event.payload) else {
            return;
        };
        // Source files have no root, and are not fetched.
        for named_file in set.files.iter().filter(|file| !file.path_prefix.is_empty()) {
            let Some(file::File::Uri(uri)) = &named_file.file else {
                continue;
            };
            let mut looking = looking.lock().unwrap();
            looking.0 += 1;
            let path = uri.strip_prefix("file://").map(std::path::Path::new);
            if !path.is_some_and(|path| path.is_file() && path.ends_with(&named_file.name)) {
                looking.1.push(uri.clone());
            }
        }
    });
    let proxy = Proxy::start(&cache);
    let daemon = Daemon::with(&[
        &format!("--remote-cache={}", proxy.url()),
        "--hold=target",
        "--rewrite-uris",
        &upstream.flag(),
    ]);
    proxy.slow(WIRE);
    let run = bazel.build(&[&daemon.bes(), "//..."]).ok();
    assert_eq!(executed(&run), 0, "everything is in the cache; {run}");
    let id = daemon.settled()["invocation_id"].as_str().unwrap().to_owned();
    upstream.complete(&id, || daemon.log());
    let named = named.lock().unwrap();
    assert!(named.0 > 20, "{named:?}");
    // What Bazel 4 takes away itself: see `Looked::wrong_for`.
    let excused = |uri: &&String| stage.version == Version::Four && uri.ends_with("/rules/link.txt");
    let wrong: Vec<&String> = named.1.iter().filter(|uri| !excused(uri)).collect();
    assert_eq!(wrong, Vec::<&String>::new());
}
