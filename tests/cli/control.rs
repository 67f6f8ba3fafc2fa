//! The control API over gRPC: what the commands do not show of it.

use std::{collections::BTreeSet, path::Path};

use hyper_util::rt::TokioIo;
use outhaul::{
    demo::{GeneratedContent, Setting, Shape, play},
    proto::outhaul::v1::{self as pb, control_client::ControlClient, watch_invocation_response::Event},
};
use outhaul_testkit::{
    Running,
    cache::{RequestFault, Rpc, Times},
    finish, in_time,
};
use tokio::net::UnixStream;
use tonic::{
    Code, Streaming,
    transport::{Channel, Endpoint, Uri},
};

use crate::{
    support::{World, outhaul},
    waiting::{PERSISTENT, unblock},
};

pub async fn client(world: &World) -> ControlClient<Channel> {
    let socket = world.path("state/control.sock");
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await;
    ControlClient::new(channel.unwrap())
}

pub fn by_id(id: &str) -> Option<pb::InvocationChoice> {
    Some(pb::InvocationChoice {
        invocation_id: id.to_owned(),
        ..pb::InvocationChoice::default()
    })
}

pub async fn watch(
    client: &mut ControlClient<Channel>,
    invocation: Option<pb::InvocationChoice>,
) -> Streaming<pb::WatchInvocationResponse> {
    let request = pb::WatchInvocationRequest { invocation };
    client.watch_invocation(request).await.unwrap().into_inner()
}

pub async fn all(mut events: Streaming<pb::WatchInvocationResponse>) -> Vec<Event> {
    let mut all = Vec::new();
    loop {
        let next = in_time(events.message()).await;
        let Some(message) = next.unwrap() else {
            break;
        };
        all.push(message.event.unwrap());
    }
    all
}

/// No byte comes from the cache until [`unblock`].
pub fn stall(world: &World) {
    let faults = world.cache.faults();
    faults.request(Rpc::StreamRead, RequestFault::Stall, Times::Always);
    faults.request(Rpc::BatchRead, RequestFault::Stall, Times::Always);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_at_a_build_says_what_it_waits_for_and_which_caches_are_asked() {
    let world = World::new().await;
    stall(&world);
    // The last one of a flag counts.
    let server = world
        .serve(&[PERSISTENT, &["--hold=invocation", "--hold-timeout=10m"]].concat())
        .await;
    let mut client = client(&world).await;
    let id = world.build.invocation_id();
    let play = world.play(&world.build, server.address());
    let mut looking = client.clone();
    let look = async {
        loop {
            let request = pb::GetInvocationRequest {
                invocation_id: id.clone(),
            };
            let seen = looking.get_invocation(request).await.ok();
            let waiting = seen.and_then(|seen| seen.into_inner().waiting);
            if let Some(waiting) = waiting.filter(|waiting| waiting.hold_until_ms > 0) {
                return waiting;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let mut asking = client.clone();
    let looked = async {
        let waiting = in_time(look).await;
        assert_eq!(waiting.hold_limit, "--hold-timeout=600s");
        assert!(waiting.required > 0, "{waiting:?}");
        let named: u64 = waiting.outputs.iter().map(|output| output.bytes).sum();
        assert!(waiting.bytes >= named && named > 0, "{waiting:?}");
        assert!(waiting.outputs.len() <= 8 && !waiting.outputs[0].exec_path.is_empty());
        let caches = asking.list_caches(pb::ListCachesRequest {}).await.unwrap();
        let caches = caches.into_inner().caches;
        assert_eq!(caches.len(), 1, "{caches:?}");
        assert!(caches[0].name.contains("127.0.0.1") && caches[0].passed_over_ms.is_none());
        unblock(&world);
    };
    tokio::join!(play, looked);
    let mut find = async |invocation_id: &str, text: &str, limit| {
        let request = pb::FindOutputsRequest {
            invocation_id: invocation_id.to_owned(),
            text: text.to_owned(),
            limit,
        };
        client
            .find_outputs(request)
            .await
            .map(tonic::Response::into_inner)
    };
    let found = find(&id, "app/app", 0).await.unwrap();
    assert!(
        found
            .outputs
            .iter()
            .any(|output| output.exec_path.ends_with("app/app"))
            && !found.more,
        "{found:?}"
    );
    let found = find("", "", 1).await.unwrap();
    assert!(found.outputs.len() == 1 && found.more, "{found:?}");
    let missing = find("no-such-build", "x", 0).await.unwrap_err();
    assert_eq!(missing.code(), tonic::Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_reports_every_target_and_output_and_of_a_settled_build_its_targets() {
    let world = World::new().await;
    stall(&world);
    let server = world.serve(PERSISTENT).await;
    let mut client = client(&world).await;
    let next = pb::InvocationChoice {
        next: true,
        ..pb::InvocationChoice::default()
    };
    let mut live = watch(&mut client, Some(next)).await;
    world.play(&world.build, server.address()).await;
    // Outputs are distinguished from here on.
    let first = in_time(live.message()).await.unwrap().unwrap().event;
    assert!(matches!(first, Some(Event::Invocation(_))), "{first:#?}");
    unblock(&world);
    let live = all(live).await;
    let Some(Event::Settled(settled)) = live.last() else {
        panic!("{live:#?}")
    };
    assert_eq!(
        (settled.state(), settled.failed),
        (pb::InvocationState::Settled, 0)
    );
    let outputs: BTreeSet<&str> = live
        .iter()
        .filter_map(|event| match event {
            Event::Output(output) => {
                let there = matches!(
                    output.outcome(),
                    pb::OutputOutcome::Downloaded | pb::OutputOutcome::Present
                );
                assert!(there && output.error.is_empty(), "{output:?}");
                Some(&*output.exec_path)
            }
            _ => None,
        })
        .collect();
    // All that had to be fetched.
    let expected = world
        .build
        .outputs()
        .iter()
        .filter_map(|output| match &output.content {
            GeneratedContent::File(digest) if digest.size() > 0 => Some(&*output.path),
            _ => None,
        });
    let missed: Vec<&str> = expected.filter(|path| !outputs.contains(path)).collect();
    assert_eq!(missed, Vec::<&str>::new());
    let targets = |events: &[Event]| -> BTreeSet<(String, String, String)> {
        events
            .iter()
            .filter_map(|event| match event {
                Event::TargetSettled(t) => Some((t.label.clone(), t.aspect.clone(), t.state().name())),
                _ => None,
            })
            .collect()
    };
    assert_eq!(targets(&live).len(), 7);

    let recorded = all(watch(&mut client, by_id(&world.build.invocation_id())).await).await;
    assert_eq!(targets(&recorded), targets(&live));
    assert!(matches!(recorded.last(), Some(Event::Settled(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_watcher_hears_of_the_gap_and_misses_no_target_and_no_end() {
    let world = World::new().await;
    let server = world.serve(&[]).await;
    let mut client = client(&world).await;
    // More outputs than are kept for who does not listen, on the way and in the connection's windows.
    let shape = Shape {
        targets: 4,
        files_per_target: 10_000,
        file_size: 1,
        ..Shape::default()
    };
    let build = shape.fill(|bytes| world.cache.store().put(bytes));
    let id = build.invocation_id(1);
    let setting = Setting {
        workspace: world.path("workspace"),
        exec_root: world.exec_root().display().to_string(),
        remote_cache: world.cache.endpoint(),
        instance_name: String::new(),
    };
    let slow = watch(&mut client, by_id(&id)).await;
    play(server.address(), &id, "build", build.events(&setting, &id))
        .await
        .unwrap();
    let events = all(slow).await;
    let outputs = events
        .iter()
        .filter(|event| matches!(event, Event::Output(_)))
        .count();
    assert!(outputs < shape.files(), "it was not slow");
    assert!(events.iter().any(|event| matches!(event, Event::Lagged(_))));
    let settled: BTreeSet<&str> = events
        .iter()
        .filter_map(|event| match event {
            Event::TargetSettled(target) => Some(&*target.label),
            _ => None,
        })
        .collect();
    assert_eq!(settled.len(), shape.targets);
    let Some(Event::Settled(end)) = events.last() else {
        panic!("no end")
    };
    assert_eq!(end.downloaded, shape.files() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_cancelled_ends_as_failed_and_the_rest_stays() {
    let world = World::new().await;
    world
        .cache
        .faults()
        .request(Rpc::StreamRead, RequestFault::Stall, Times::Always);
    let server = world.serve(&["--hold=none"]).await;
    let mut client = client(&world).await;
    world.play(&world.build, server.address()).await;
    let id = world.build.invocation_id();
    let cancel = |id: &str| pb::CancelRequest {
        invocation_id: id.to_owned(),
    };
    // Once all that can be downloaded is there.
    let wait = |targets: &[&str]| pb::WaitRequest {
        invocation: by_id(&id),
        targets: targets.iter().map(|t| (*t).to_owned()).collect(),
        timeout_ms: 60_000,
    };
    let fetched = client.wait(wait(&["//lib:lib"])).await.unwrap().into_inner();
    assert_eq!(fetched.result(), pb::WaitResult::Settled);
    assert!(client.cancel(cancel(&id)).await.unwrap().into_inner().cancelled);
    let answer = client.wait(wait(&["//app:app"])).await.unwrap().into_inner();
    assert_eq!(answer.result(), pb::WaitResult::Failed, "{answer:?}");
    let whole = client.wait(wait(&[])).await.unwrap().into_inner();
    assert!(
        whole.failures.iter().any(|f| f.contains("cancelled")),
        "{whole:?}"
    );
    assert!(!world.exec_root().join(&world.file("app/app").0.path).exists());
    assert!(world.exec_root().join(&world.file("liblib.a").0.path).exists());
    // Nothing is left to give up.
    assert!(!client.cancel(cancel(&id)).await.unwrap().into_inner().cancelled);
    let unknown = client.cancel(cancel("nonsense")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_is_answered_before_a_byte_is_there() {
    let world = World::new().await;
    stall(&world);
    let server = world.serve(&["--hold=none"]).await;
    let mut client = client(&world).await;
    world.play(&world.build, server.address()).await;
    let id = world.build.invocation_id();
    let files = ["app/app", "part0.h", "index.html"].map(|name| world.file(name));
    let mut paths: Vec<String> = files.iter().map(|(output, _)| output.path.clone()).collect();
    paths.push("bazel-out/none".to_owned());
    // The targets are known once their outputs are on record.
    let mut events = watch(&mut client, by_id(&id)).await;
    let mut known = BTreeSet::new();
    while known.len() < 3 {
        let message = in_time(events.message()).await;
        if let Some(Event::TargetKnown(target)) = message.unwrap().unwrap().event
            && ["//app:app", "//lib:lib", "//assets:tree"].contains(&&*target.label)
        {
            known.insert(target.label);
        }
    }
    for invocation_id in [String::new(), id.clone()] {
        let request = pb::BatchStatRequest {
            paths: paths.clone(),
            invocation_id,
        };
        let outputs = client.batch_stat(request).await.unwrap().into_inner().outputs;
        assert_eq!(outputs.len(), 4);
        for ((output, (_, digest)), path) in outputs.iter().zip(&files).zip(&paths) {
            assert_eq!(
                (&output.exec_path, output.state()),
                (path, pb::OutputState::Known),
                "{output:?}"
            );
            let stated = output.digest.as_ref().unwrap();
            assert_eq!((&stated.hash, stated.size), (&digest.hash_hex(), digest.size()));
        }
        assert_eq!(outputs[3], pb::Output::default());
    }
    let request = pb::BatchStatRequest {
        paths: paths.clone(),
        invocation_id: "nonsense".to_owned(),
    };
    assert_eq!(
        client.batch_stat(request).await.unwrap_err().code(),
        Code::NotFound
    );
    let why = client
        .why(pb::WhyRequest { paths })
        .await
        .unwrap()
        .into_inner()
        .answers;
    assert!(
        why[0].lines.iter().any(|line| line.contains("//app:app")),
        "{why:?}"
    );
    assert!(why[3].lines.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_for_nonsense_is_refused_and_one_without_end_times_out() {
    let world = World::new().await;
    let _server = world.serve(&[]).await;
    let mut client = client(&world).await;
    let request = pb::WaitRequest {
        targets: vec!["app".to_owned()],
        ..pb::WaitRequest::default()
    };
    assert_eq!(
        client.wait(request).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    let request = pb::WaitRequest {
        timeout_ms: 50,
        ..pb::WaitRequest::default()
    };
    let answer = client.wait(request).await.unwrap().into_inner();
    assert_eq!(
        (answer.result(), answer.invocation),
        (pb::WaitResult::TimedOut, None)
    );
}

/// A certificate for this machine, its key and a token, as files.
fn credentials(world: &World) -> (String, String, String) {
    let write = |name: &str, text: &str| {
        let path = world.path(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let signed = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    (
        write("cert.pem", &signed.cert.pem()),
        write("key.pem", &signed.signing_key.serialize_pem()),
        write("token", "a-token-that-nobody-guesses\n"),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tcp_only_the_token_is_answered_and_with_tls_only_encrypted() {
    let world = World::new().await;
    let (certificate, key, token) = credentials(&world);
    let token_flag = format!("--control-token-file={token}");
    for (tls, scheme) in [(true, "grpcs"), (false, "grpc")] {
        let mut args = vec!["--control-listen=127.0.0.1:0".to_owned(), token_flag.clone()];
        if tls {
            args.push(format!("--control-tls-certificate={certificate}"));
            args.push(format!("--control-tls-key={key}"));
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut server = world.serve(&args).await;
        let log = server.logged("control API on").await;
        let line = log.lines().find(|line| line.contains("control API on")).unwrap();
        let port = line.rsplit(':').next().unwrap().trim();
        let control = format!("--control={scheme}://localhost:{port}");
        let ask = |args: Vec<String>| async {
            let mut command = outhaul();
            command.args(args);
            finish(command).await
        };
        let trusted = format!("--tls-certificate={certificate}");
        let status = |more: &[&str]| {
            let more = more.iter().map(|arg| (*arg).to_owned());
            ask(["status".to_owned(), "--json".to_owned(), control.clone()]
                .into_iter()
                .chain(more)
                .collect())
        };
        status(&[&token_flag, &trusted]).await.expect(0);
        world.play(&world.build, server.address()).await;
        let waited = vec![
            "wait".to_owned(),
            control.clone(),
            token_flag.clone(),
            trusted.clone(),
            "--timeout=1m".to_owned(),
            "//app:app".to_owned(),
        ];
        ask(waited).await.expect(0);

        status(&[&trusted]).await.says(2, &["--control-token-file"]);
        let wrong = world.path("wrong");
        std::fs::write(&wrong, "another-token-than-that\n").unwrap();
        let wrong = format!("--control-token-file={wrong}");
        status(&[&wrong, &trusted]).await.says(1, &["token"]);
        let mut waits = outhaul();
        waits.args(["wait", &control, &wrong, &trusted]);
        finish(waits).await.says(1, &["token"]);
        if tls {
            status(&[&token_flag]).await.says(1, &["certificate"]);
            let plain = control.replace("grpcs", "grpc");
            let ran = ask(vec!["status".to_owned(), plain, token_flag.clone()]).await;
            assert_eq!(ran.code, Some(1), "{}", ran.err);
        }
        server.signal(rustix::process::Signal::TERM);
        assert_eq!(server.end().await, Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_does_not_open_a_port_that_is_not_guarded() {
    let world = World::new().await;
    let (certificate, key, token) = credentials(&world);
    let token = format!("--control-token-file={token}");
    let tls = [
        format!("--control-tls-certificate={certificate}"),
        format!("--control-tls-key={key}"),
    ];
    for (args, part) in [
        (vec!["--control-listen=127.0.0.1:0"], "--control-token-file"),
        (
            vec!["--control-listen=0.0.0.0:0", &token],
            "--control-tls-certificate",
        ),
        (
            vec!["--control-listen=0.0.0.0:0", &tls[0], &tls[1]],
            "--control-token-file",
        ),
    ] {
        let mut command = outhaul();
        command
            .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"])
            .args([world.state(), world.cache_flag()])
            .args(args);
        finish(command).await.says(2, &[part]);
    }
}

/// A client of the control port, with the token.
async fn over_tcp(
    server: &Running,
) -> impl AsyncFn(pb::StageRequest) -> Result<pb::StageResponse, tonic::Status> + use<> {
    let log = server.logged("control API on").await;
    let line = log.lines().find(|line| line.contains("control API on")).unwrap();
    let port = line.rsplit(':').next().unwrap().trim().to_owned();
    let channel = Endpoint::from_shared(format!("http://127.0.0.1:{port}")).unwrap();
    let client = ControlClient::new(channel.connect().await.unwrap());
    async move |request| {
        let mut request = tonic::Request::new(request);
        let token = "Bearer a-token-that-nobody-guesses".parse().unwrap();
        request.metadata_mut().insert("authorization", token);
        client
            .clone()
            .stage(request)
            .await
            .map(tonic::Response::into_inner)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tcp_nothing_is_staged_but_where_a_flag_says_and_never_into_the_state_directory() {
    let world = World::new().await;
    let (.., token) = credentials(&world);
    let to = |directory: &str| pb::StageRequest {
        directory: world.path(directory),
        wait_all: true,
        ..pb::StageRequest::default()
    };
    for name in ["allowed", "precious"] {
        std::fs::create_dir(world.path(name)).unwrap();
    }
    std::os::unix::fs::symlink("../precious", world.path("allowed/out")).unwrap();
    let token = format!("--control-token-file={token}");
    let allowed = format!("--control-stage-dir={}", world.path("allowed"));
    for dirs in [vec![], vec![&*allowed]] {
        let mut args = vec!["--control-listen=127.0.0.1:0", &token];
        args.extend(&dirs);
        let mut server = world.serve(&args).await;
        world.play(&world.build, server.address()).await;
        let stage = over_tcp(&server).await;
        let mut denied = vec![
            "precious",
            "allowed/out",
            "allowed/out/new",
            "state/journal",
            "state",
        ];
        if dirs.is_empty() {
            denied.extend(["allowed", "allowed/new"]);
        } else {
            let staged = stage(to("allowed/new/one")).await.unwrap();
            assert!(staged.staged, "{staged:?}");
            assert_eq!(
                world.wrong_below(Path::new(&world.path("allowed/new/one"))),
                Vec::<String>::new()
            );
        }
        for directory in denied {
            let status = stage(to(directory)).await.unwrap_err();
            assert_eq!(status.code(), Code::PermissionDenied, "{directory}: {status}");
            assert!(status.message().contains("--control-stage-dir"), "{status}");
        }
        // To look at what would be staged, no directory is written.
        let plan = pb::StageRequest {
            dry_run: true,
            ..pb::StageRequest::default()
        };
        stage(plan).await.unwrap();
        let mut client = client(&world).await;
        for directory in ["state", "state/journal", "state/new/one", "."] {
            let status = client.stage(to(directory)).await.unwrap_err();
            assert_eq!(status.code(), Code::PermissionDenied, "{directory}: {status}");
            assert!(status.message().contains("state directory"), "{status}");
        }
        client.stage(to("anywhere/else")).await.unwrap();
        assert_eq!(std::fs::read_dir(world.path("precious")).unwrap().count(), 0);
        assert!(!Path::new(&world.path("state/new")).exists());
        server.signal(rustix::process::Signal::TERM);
        assert_eq!(server.end().await, Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_call_may_cost_is_bounded_and_keeps_no_build_waiting() {
    let world = World::new().await;
    let server = world.serve(&[]).await;
    world.play(&world.build, server.address()).await;
    let mut client = client(&world).await;
    let wish = |include: Vec<String>| pb::StageRequest {
        wish: Some(pb::StageWish {
            include,
            ..pb::StageWish::default()
        }),
        dry_run: true,
        ..pb::StageRequest::default()
    };
    // All at once, and nobody waits for the answers.
    for _ in 0..64 {
        let mut client = client.clone();
        let request = wish((0..1000).map(|n| format!("{n}\\pL{{{n}}}.*")).collect());
        let call = tokio::spawn(async move { client.stage(request).await });
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        call.abort();
    }
    world.play(&world.build, server.address()).await;
    for request in [
        wish(vec![r"\pL{200}".to_owned(); 200]),
        wish(vec!["a".to_owned(); 1001]),
    ] {
        let status = client.stage(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    }
    let paths = vec!["x".to_owned(); 100_001];
    let stat = pb::BatchStatRequest {
        paths: paths.clone(),
        invocation_id: String::new(),
    };
    let outputs = || pb::OutputsRequest {
        paths: paths.clone(),
        ..pb::OutputsRequest::default()
    };
    let wait = pb::WaitRequest {
        targets: vec!["//a:b".to_owned(); 10_001],
        ..pb::WaitRequest::default()
    };
    for status in [
        client.batch_stat(stat).await.unwrap_err(),
        client.stat_outputs(outputs()).await.unwrap_err(),
        client.materialize(outputs()).await.unwrap_err(),
        client
            .why(pb::WhyRequest { paths: paths.clone() })
            .await
            .unwrap_err(),
        client.wait(wait).await.unwrap_err(),
    ] {
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains("exceeds the limit"), "{status}");
    }
    let all = pb::ListInvocationsRequest { limit: u32::MAX };
    assert_eq!(
        client
            .list_invocations(all)
            .await
            .unwrap()
            .into_inner()
            .invocations
            .len(),
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tcp_only_urls_that_a_flag_names_are_staged_from() {
    use crate::archives::{Archives, nginx, sha256};
    let test = "over_tcp_only_urls_that_a_flag_names_are_staged_from";
    if !outhaul_testkit::peers::are_there(test, &["nginx"]) {
        return;
    }
    let world = World::new().await;
    let (.., token) = credentials(&world);
    let archives = Archives::new();
    archives.file("a.bin", b"a");
    let (_nginx, url) = nginx(archives.dir.path(), "");
    let token = format!("--control-token-file={token}");
    let directory = format!("--control-stage-dir={}", world.path("."));
    let from = format!("--control-stage-from={url}/a.bin");
    let server = world
        .serve(&["--control-listen=127.0.0.1:0", &token, &directory, &from])
        .await;
    let stage = over_tcp(&server).await;
    let request = |from: &str, dry_run: bool| pb::StageRequest {
        from: vec![from.to_owned()],
        directory: world.path("out"),
        dry_run,
        ..pb::StageRequest::default()
    };
    let file = format!("file://{}/", archives.path("in").display());
    for denied in [
        &*file,
        &format!("{url}/b.bin"),
        &format!("x.bin={url}/b.bin"),
        "http://user:s3cret@127.0.0.1:1/a.bin",
        "s3://bucket/a.bin",
    ] {
        for dry_run in [false, true] {
            let status = stage(request(denied, dry_run)).await.unwrap_err();
            assert_eq!(status.code(), Code::PermissionDenied, "{denied}: {status}");
            assert!(status.message().contains("--control-stage-from"), "{status}");
            assert!(!status.message().contains("s3cret"), "{status}");
        }
    }
    // One that is not allowed is enough.
    let mixed = pb::StageRequest {
        from: vec![format!("{url}/a.bin"), file.clone()],
        ..request("", false)
    };
    assert_eq!(stage(mixed).await.unwrap_err().code(), Code::PermissionDenied);
    // Nobody elsewhere decides what an archive may cost here.
    for (jobs, limit, flag) in [
        (11, "archive-depth=9", "--jobs=11"),
        (0, "archive-xz-memory=2GiB", "--limit=archive-xz-memory"),
    ] {
        let more = pb::StageRequest {
            jobs,
            limits: vec![limit.to_owned()],
            ..request(&format!("{url}/a.bin"), false)
        };
        let status = stage(more).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().starts_with(flag), "{status}");
    }
    let staged = stage(request(&format!("{url}/a.bin"), false)).await.unwrap();
    assert!(staged.staged, "{staged:?}");
    assert_eq!(staged.outputs[0].digest.as_ref().unwrap().hash, sha256(b"a"));
    assert_eq!(std::fs::read(world.path("out/a.bin")).unwrap(), b"a");
    // Over the socket, the caller is the user.
    let mut client = client(&world).await;
    client.stage(request(&file, false)).await.unwrap();
    let both = pb::StageRequest {
        invocation_id: "x".to_owned(),
        ..request(&file, false)
    };
    assert_eq!(
        client.stage(both).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    for (name, wish) in [
        (
            "--runfiles",
            pb::StageWish {
                runfiles: true,
                ..pb::StageWish::default()
            },
        ),
        (
            "--failed",
            pb::StageWish {
                failed: true,
                ..pb::StageWish::default()
            },
        ),
    ] {
        let of_a_build = pb::StageRequest {
            wish: Some(wish),
            ..request(&file, false)
        };
        let status = client.stage(of_a_build).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().starts_with(name), "{status}");
    }
    let checked = pb::StageRequest {
        from: Vec::new(),
        checksums: "00  x".to_owned(),
        ..request(&file, false)
    };
    let status = client.stage(checked).await.unwrap_err();
    assert!(status.message().starts_with("--checksum-file"), "{status}");
    let looked = pb::IsStagedRequest {
        directory: world.path("out"),
        from: vec![file.clone()],
        ..pb::IsStagedRequest::default()
    };
    let answer = client.is_staged(looked).await.unwrap().into_inner();
    assert!(answer.staged && answer.from == [file], "{answer:?}");
}
