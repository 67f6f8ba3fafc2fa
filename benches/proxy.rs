//! What forwarding costs the daemon: `cargo bench --bench proxy`.
//!
//! A stream of 100,000 events (each target's configuration, its set of files and its completion) is played as Bazel would
//! to a real `outhaul serve` in a process of its own, which journals them, decodes them, records what they name and
//! forwards them to an upstream service in this process. Nothing is downloaded and nothing held. The figure is events
//! per second of the daemon's processor time: what a core can do, no matter what else is busy. It is given for all threads
//! together, and for tokio's alone, which do all of it except writing the record's store (`outhaul-record`, `sled-io`).
//! The same stream without an upstream, in turns, says what of that forwarding is.

#[allow(dead_code, reason = "shared with programs that use more of it")]
mod plain;

use std::{
    error::Error,
    fs,
    io::Write as _,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use outhaul::{
    demo::{FilledShape, Setting, Shape, play},
    digest::{Digest, DigestFunction},
    proto::google::devtools::build::v1::{
        PublishBuildToolEventStreamRequest, PublishBuildToolEventStreamResponse,
        PublishLifecycleEventRequest,
        publish_build_event_server::{PublishBuildEvent, PublishBuildEventServer},
    },
};
use outhaul_testkit::{Running, clean, cpu, cpu_of_threads, eventually, until};
use plain::{ROUNDS, directory, spread};
use tokio::{net::UnixListener, sync::mpsc};
use tokio_stream::wrappers::{UnboundedReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

type Failure = Box<dyn Error>;

/// Three events for each, beside a few for the build.
const TARGETS: usize = 33_333;

/// An upstream service that acknowledges everything and counts.
#[derive(Clone, Default)]
struct Upstream(Arc<AtomicU64>);

#[tonic::async_trait]
impl PublishBuildEvent for Upstream {
    async fn publish_lifecycle_event(
        &self,
        _: Request<PublishLifecycleEventRequest>,
    ) -> Result<Response<()>, Status> {
        Ok(Response::new(()))
    }

    type PublishBuildToolEventStreamStream =
        UnboundedReceiverStream<Result<PublishBuildToolEventStreamResponse, Status>>;

    async fn publish_build_tool_event_stream(
        &self,
        request: Request<Streaming<PublishBuildToolEventStreamRequest>>,
    ) -> Result<Response<Self::PublishBuildToolEventStreamStream>, Status> {
        let (acks, responses) = mpsc::unbounded_channel();
        let (mut requests, count) = (request.into_inner(), self.0.clone());
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                let event = request.ordered_build_event.unwrap_or_default();
                count.fetch_add(1, Relaxed);
                let ack = PublishBuildToolEventStreamResponse {
                    stream_id: event.stream_id,
                    sequence_number: event.sequence_number,
                };
                if acks.send(Ok(ack)).is_err() {
                    break;
                }
            }
        });
        Ok(Response::new(UnboundedReceiverStream::new(responses)))
    }
}

/// Starts a daemon.
fn start(base: &Path, name: &str, upstream: Option<&str>) -> Running {
    let mut command = clean(Command::new(env!("CARGO_BIN_EXE_outhaul")));
    command
        .arg("serve")
        .arg(format!(
            "--bes-listen=unix:{}",
            base.join(format!("{name}.sock")).display()
        ))
        .arg(format!("--state-dir={}", base.join(name).display()))
        .args(["--admin-listen=none", "--hold=none", "--download=minimal"])
        // Nobody is there; nobody is asked.
        .arg("--remote-cache=grpc://127.0.0.1:9");
    if let Some(upstream) = upstream {
        command.arg(format!("--bes-backend={upstream}"));
    }
    let mut daemon = Running::start(command);
    eventually(name, || daemon.is_open());
    daemon
}

/// Where the build seems to have run.
fn setting(base: &Path) -> Setting {
    Setting {
        workspace: base.join("workspace").display().to_string(),
        exec_root: base.join("execroot/_main").display().to_string(),
        remote_cache: "grpc://127.0.0.1:9".to_owned(),
        instance_name: String::new(),
    }
}

/// What one play took, in seconds.
struct Cost {
    /// The daemon's processor time.
    cpu: f64,
    /// That of tokio's threads.
    tokio: f64,
    /// Until everything was upstream.
    wall: f64,
    events: f64,
}

/// Plays the build once.
async fn run(
    base: &Path,
    daemon: &Running,
    filled: &FilledShape,
    number: u64,
    forwarded: impl Fn() -> bool,
) -> Result<Cost, Failure> {
    let setting = setting(base);
    let id = filled.invocation_id(number);
    let (cpu_before, tokio, begun) = (
        cpu(daemon.id()),
        cpu_of_threads(daemon.id(), "tokio"),
        Instant::now(),
    );
    let played = play(daemon.address(), &id, "b", filled.events(&setting, &id)).await?;
    until("everything is forwarded", async || forwarded()).await;
    let wall = begun.elapsed().as_secs_f64();
    // What is recorded after the acknowledgements belongs to the cost as well: until a fifth of a second is idle.
    let mut last = cpu(daemon.id());
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = cpu(daemon.id());
        if now - last <= 0.01 {
            return Ok(Cost {
                cpu: now - cpu_before,
                tokio: cpu_of_threads(daemon.id(), "tokio") - tokio,
                wall,
                events: played.messages as f64 / 1e3,
            });
        }
        last = now;
    }
}

fn main() -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(measure())
}

async fn measure() -> Result<(), Failure> {
    let base = directory()?;
    let upstream = Upstream::default();
    let socket = base.path().join("upstream.sock");
    let listener = UnixListener::bind(&socket)?;
    let server = PublishBuildEventServer::new(upstream.clone()).max_decoding_message_size(64 << 20);
    tokio::spawn(
        Server::builder()
            .add_service(server)
            .serve_with_incoming(UnixListenerStream::new(listener)),
    );
    let shape = Shape {
        targets: TARGETS,
        files_per_target: 1,
        file_size: 16,
        ..Shape::default()
    };
    let filled = shape.fill(|bytes| Digest::of(DigestFunction::Sha256, &bytes));
    let forwarding = start(
        base.path(),
        "forwarding",
        Some(&format!("unix:{}", socket.display())),
    );
    let alone = start(base.path(), "alone", None);
    fs::create_dir_all(base.path().join("execroot/_main"))?;
    // And the event that ends the stream.
    let all = filled.events(&setting(base.path()), "").count() as u64 + 1;
    let (mut costs, mut costs_alone) = (vec![], vec![]);
    for number in 0..=ROUNDS as u64 {
        let before = upstream.0.load(Relaxed);
        let arrived = || upstream.0.load(Relaxed) >= before + all;
        let cost = run(base.path(), &forwarding, &filled, number, arrived).await?;
        let cost_alone = run(base.path(), &alone, &filled, number, || true).await?;
        // The first is the warm-up.
        if number > 0 {
            costs.push(cost);
            costs_alone.push(cost_alone);
        }
    }
    let row = |what: &str, values: Vec<f64>, unit: &str| {
        let digits = if unit.is_empty() { 2 } else { 1 };
        writeln!(
            std::io::stdout(),
            "| {what} | {}{unit} |",
            spread(&values, digits)
        )
    };
    let each = |costs: &[Cost], value: fn(&Cost) -> f64| costs.iter().map(value).collect();
    writeln!(
        std::io::stdout(),
        "| {all} events, {TARGETS} targets | result |\n|---|---|"
    )?;
    let unit = " thousand events";
    let second = "per second of processor time";
    row(
        &format!("journalled, decoded, recorded and forwarded, {second}"),
        each(&costs, |c| c.events / c.cpu),
        unit,
    )?;
    row(
        &format!("the same, {second} of tokio's threads"),
        each(&costs, |c| c.events / c.tokio),
        unit,
    )?;
    row(
        &format!("without forwarding, {second}"),
        each(&costs_alone, |c| c.events / c.cpu),
        unit,
    )?;
    let pairs = costs.iter().zip(&costs_alone);
    row(
        "processor time, with / without forwarding",
        pairs.map(|(with, without)| with.cpu / without.cpu).collect(),
        "",
    )?;
    row(
        "until everything is upstream, per second of wall time (player, daemon and upstream share the cores)",
        each(&costs, |c| c.events / c.wall),
        unit,
    )?;
    Ok(())
}
