//! Traces and metrics of the real daemon, as a collector gets them over OTLP.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use opentelemetry_proto::tonic::{
    collector::{
        metrics::v1::{
            ExportMetricsServiceRequest, ExportMetricsServiceResponse,
            metrics_service_server::{MetricsService, MetricsServiceServer},
        },
        trace::v1::{
            ExportTraceServiceRequest, ExportTraceServiceResponse,
            trace_service_server::{TraceService, TraceServiceServer},
        },
    },
    common::v1::{KeyValue, any_value::Value},
    metrics::v1::{Metric, metric::Data, number_data_point},
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use outhaul::proto::build_event_stream::{BuildEvent, build_event::Payload};
use outhaul_testkit::{
    Ran, Running,
    cache::{RequestFault, Rpc, Times},
    until,
};
use prost::Message as _;
use rustix::process::Signal;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Code, Request, Response, Status,
    transport::{Identity, Server, ServerTlsConfig},
};

use crate::{
    admin::get_from,
    running::Place,
    secured::Pki,
    support::{World, outhaul, run},
    waiting::unblock,
};

/// What a collector got.
#[derive(Default)]
struct Got {
    spans: Vec<Span>,
    metrics: Vec<Metric>,
    /// Of what the spans came with.
    resource: Vec<KeyValue>,
    headers: BTreeSet<(String, String)>,
    /// What it does with spans, and with metrics.
    manners: [Manners; 2],
}

/// How a service of it treats requests.
#[derive(Clone, Copy, Default)]
struct Manners {
    refuses: Option<Code>,
    takes: Duration,
}

impl Manners {
    async fn show(self) -> Result<(), Status> {
        tokio::time::sleep(self.takes).await;
        self.refuses
            .map_or(Ok(()), |code| Err(Status::new(code, "as it was told\nto")))
    }
}

const SPANS: usize = 0;
const METRICS: usize = 1;

/// A collector.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Got>>);

impl Collector {
    /// Starts one, and gives the flag that leads there.
    async fn start() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let flag = format!("--otlp-endpoint=http://{}", listener.local_addr().unwrap());
        let collector = Self::default();
        collector.serve(Server::builder(), listener);
        (collector, flag)
    }

    fn serve(&self, mut server: Server, listener: TcpListener) {
        let server = server
            .add_service(TraceServiceServer::new(self.clone()))
            .add_service(MetricsServiceServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    }

    fn got(&self) -> MutexGuard<'_, Got> {
        self.0.lock().unwrap()
    }

    fn spans(&self, name: &str) -> Vec<Span> {
        let got = self.got();
        got.spans
            .iter()
            .filter(|span| span.name == name)
            .cloned()
            .collect()
    }

    /// Waits for a build's own span.
    async fn build(&self) -> Span {
        until("the build's own span comes", async || {
            !self.spans("build").is_empty()
        })
        .await;
        self.spans("build").remove(0)
    }

    fn note_headers<T>(&self, request: &Request<T>) {
        let headers = request.metadata().clone().into_headers();
        let text = |(name, value): (&http::HeaderName, &http::HeaderValue)| {
            (name.to_string(), value.to_str().unwrap().to_owned())
        };
        self.got().headers.extend(headers.iter().map(text));
    }
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.note_headers(&request);
        let manners = self.got().manners[SPANS];
        manners.show().await?;
        let mut got = self.got();
        for of_resource in request.into_inner().resource_spans {
            got.resource = of_resource.resource.unwrap().attributes;
            let spans = of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            got.spans.extend(spans);
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Collector {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        let manners = self.got().manners[METRICS];
        manners.show().await?;
        let metrics = request.into_inner().resource_metrics;
        let scopes = metrics
            .into_iter()
            .flat_map(|of_resource| of_resource.scope_metrics);
        self.got().metrics = scopes.flat_map(|scope| scope.metrics).collect();
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

fn texts(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &Value| match value {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        Value::BoolValue(flag) => flag.to_string(),
        other => panic!("{other:?}"),
    };
    let attributes = attributes.iter().map(|attribute| {
        let value = attribute.value.as_ref().unwrap().value.as_ref();
        (attribute.key.clone(), text(value.unwrap()))
    });
    attributes.collect()
}

#[track_caller]
fn says(span: &Span, expected: &[(&str, &str)]) {
    let attributes = texts(&span.attributes);
    for (name, value) in expected {
        let said = attributes.get(*name).map(String::as_str);
        assert_eq!(said, Some(*value), "{name} of {attributes:#?}");
    }
}

fn number(span: &Span, name: &str) -> u64 {
    texts(&span.attributes)[name].parse().unwrap()
}

/// Whether all other spans are below a build's, and within its time.
#[track_caller]
fn assert_nested(spans: &[Span], build: &Span) {
    let mut ids = BTreeSet::new();
    for span in spans {
        assert_eq!(span.trace_id, build.trace_id, "{span:#?}");
        assert!(ids.insert(&span.span_id) && span.span_id.iter().any(|byte| *byte != 0));
        let (begin, end) = (span.start_time_unix_nano, span.end_time_unix_nano);
        assert!(build.start_time_unix_nano <= begin && begin <= end, "{span:#?}");
        assert!(end <= build.end_time_unix_nano, "{span:#?}\n{build:#?}");
        if span.span_id != build.span_id {
            assert_eq!(span.parent_span_id, build.span_id, "{span:#?}");
        }
    }
}

/// The build's events with another exit code, which is otherwise 1.
fn ended_with(world: &World, code: i32) -> Vec<Vec<u8>> {
    let events = world.build.events().map(|bytes| {
        let mut event = BuildEvent::decode(&*bytes).unwrap();
        if let Some(Payload::Finished(finished)) = &mut event.payload {
            finished.exit_code.as_mut().unwrap().code = code;
        }
        event.encode_to_vec()
    });
    events.collect()
}

async fn end(server: &mut Running) {
    server.signal(Signal::TERM);
    assert_eq!(server.end().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_builds_spans_are_in_the_trace_of_its_invocation() {
    let world = World::new().await;
    let (collector, flag) = Collector::start().await;
    let mut command = outhaul();
    command
        .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none", &flag])
        .args([world.state(), world.cache_flag()])
        .env("OTEL_EXPORTER_OTLP_HEADERS", "x-key=a%20b")
        .env("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=ci");
    let mut server = Running::serve(command).await;
    let (id, build_id) = (world.build.invocation_id(), world.build.build_id());
    let played = outhaul::demo::play(
        server.address(),
        &id,
        &build_id,
        ended_with(&world, 0).into_iter(),
    );
    played.await.unwrap();
    world.assert_complete();
    let build = collector.build().await;
    end(&mut server).await;

    let spans = collector.got().spans.clone();
    assert_nested(&spans, &build);
    assert_eq!(hex::encode(&build.trace_id), id.replace('-', ""));
    assert!(
        build.parent_span_id.is_empty() && build.status.is_none(),
        "{build:#?}"
    );
    let downloaded = number(&build, "outhaul.outputs.downloaded");
    let present = number(&build, "outhaul.outputs.present");
    assert_eq!(downloaded + present, world.build.outputs().len() as u64);
    let cache = world.cache.endpoint();
    says(
        &build,
        &[
            ("outhaul.invocation.id", &id),
            ("outhaul.build.id", &build_id),
            ("outhaul.workspace", &world.path("workspace")),
            ("outhaul.command", "build"),
            ("outhaul.state", "settled"),
            ("outhaul.cache", &cache),
            ("outhaul.outputs.failed", "0"),
            ("process.exit.code", "0"),
        ],
    );

    // One file of 5 MB; all others are small.
    let streams = collector.spans("download stream");
    assert_eq!(streams.len(), 1);
    let (large, batches) = (
        number(&streams[0], "outhaul.bytes"),
        collector.spans("download batch"),
    );
    assert_eq!(large, 5_000_000);
    let small: u64 = batches.iter().map(|batch| number(batch, "outhaul.bytes")).sum();
    assert_eq!(large + small, number(&build, "outhaul.bytes"));
    for call in streams.iter().chain(&batches) {
        assert_eq!(call.kind(), SpanKind::Client);
        let expected = [
            ("outhaul.store", &*cache),
            ("outhaul.outcome", "downloaded"),
            ("outhaul.retries", "0"),
        ];
        says(call, &expected);
    }
    let places = collector.spans("place");
    let placed: u64 = places.iter().map(|place| number(place, "outhaul.outputs")).sum();
    assert_eq!(placed, downloaded);
    assert!(
        places.len() < placed as usize,
        "not one for each file: {places:#?}"
    );
    places
        .iter()
        .for_each(|place| says(place, &[("outhaul.outcome", "placed")]));
    let holds = collector.spans("hold");
    assert_eq!(holds.len(), 1);
    says(
        &holds[0],
        &[("outhaul.hold.timed_out", "false"), ("outhaul.hold.pending", "0")],
    );

    let resource = texts(&collector.got().resource);
    assert_eq!(resource["service.name"], "outhaul");
    assert_eq!(resource["deployment.environment"], "ci");
    let header = ("x-key".to_owned(), "a b".to_owned());
    assert!(collector.got().headers.contains(&header));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_build_a_hold_that_ends_too_early_and_retries_are_told() {
    let world = World::new().await;
    let (collector, flag) = Collector::start().await;
    let faults = world.cache.faults();
    let busy = RequestFault::Status(Code::Unavailable);
    faults.request(Rpc::BatchRead, busy, Times::First(1));
    faults.request(Rpc::StreamRead, RequestFault::Stall, Times::Always);
    let mut server = world.serve(&[&flag, "--hold-timeout=200ms"]).await;
    world.play(&world.build, server.address()).await;
    unblock(&world);
    let build = collector.build().await;
    end(&mut server).await;

    assert_nested(&collector.got().spans, &build);
    says(
        &build,
        &[("process.exit.code", "1"), ("outhaul.outputs.failed", "0")],
    );
    let status = build.status.clone().unwrap();
    assert_eq!(
        (status.code(), &*status.message),
        (StatusCode::Error, "exit code 1")
    );
    let hold = collector.spans("hold").remove(0);
    says(
        &hold,
        &[
            ("outhaul.hold.limit", "--hold-timeout=0.2s"),
            ("outhaul.hold.timed_out", "true"),
        ],
    );
    assert!(number(&hold, "outhaul.hold.pending") > 0);
    assert!(hold.end_time_unix_nano < build.end_time_unix_nano);
    let batches = collector.spans("download batch");
    let retries: u64 = batches.iter().map(|batch| number(batch, "outhaul.retries")).sum();
    assert_eq!(retries, 1, "{batches:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn outputs_that_the_cache_does_not_give_fail_their_spans() {
    let world = World::new().await;
    let (collector, flag) = Collector::start().await;
    let refused = || RequestFault::Status(Code::PermissionDenied);
    world
        .cache
        .faults()
        .request(Rpc::StreamRead, refused(), Times::Always);
    world.cache.store().remove(world.file("lib/lint.report").1);
    let mut server = world.serve(&[&flag]).await;
    let (id, build_id) = (world.build.invocation_id(), world.build.build_id());
    let played = outhaul::demo::play(
        server.address(),
        &id,
        &build_id,
        ended_with(&world, 0).into_iter(),
    );
    played.await.unwrap();
    let build = collector.build().await;
    end(&mut server).await;
    let status = build.status.clone().unwrap();
    assert_eq!(status.code(), StatusCode::Error);
    assert_eq!(status.message, "2 required outputs could not be downloaded");
    let stream = collector.spans("download stream").remove(0);
    says(&stream, &[("outhaul.outcome", "failed")]);
    assert_eq!(stream.status.unwrap().code(), StatusCode::Error);
    let batches = collector.spans("download batch");
    let lacking = batches.iter().filter(|batch| {
        let outcome = &texts(&batch.attributes)["outhaul.outcome"];
        assert!(batch.status.is_none(), "the output may be on disk");
        outcome == "not found"
    });
    assert_eq!(lacking.count(), 1, "{batches:#?}");
}

/// What `run` says when a Bazel that it started has built the world's build.
async fn below_run(world: &World, place: Place, flag: &str) -> Ran {
    let place = place.with("WAITS", "yes").arg(&world.cache_flag()).arg(flag);
    let run = Running::start(place.calling("run", &["bazel", "build", "//a"]));
    until("Bazel runs", async || !place.lines("calls").is_empty()).await;
    let call = place.lines("calls").remove(0);
    let (_, address) = call.split_once("--bes_backend=").unwrap();
    world.play(&world.build, address.split_once('>').unwrap().0).await;
    std::fs::write(place.bin().join("go"), "").unwrap();
    let ran = tokio::task::spawn_blocking(|| run.wait()).await;
    ran.unwrap().expect(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_below_run_is_a_part_of_the_environments_trace() {
    let parent = "4bf92f3577b34da6a3ce929d0e0e4736";
    for (given, is_child) in [
        (Some(format!("00-{parent}-00f067aa0ba902b7-01")), true),
        (Some(format!("00-{parent}-00f067aa0ba902b7")), false),
        (None, false),
    ] {
        let world = World::new().await;
        let (collector, flag) = Collector::start().await;
        let mut place = Place::new();
        if let Some(given) = &given {
            place = place.with("TRACEPARENT", given);
        }
        let ran = below_run(&world, place, &flag).await;

        // All of it was sent before the end.
        let build = collector.spans("build").remove(0);
        assert_nested(&collector.got().spans, &build);
        let own = world.build.invocation_id();
        says(&build, &[("outhaul.invocation.id", &own)]);
        let own = own.replace('-', "");
        let trace = if is_child { parent } else { &*own };
        assert_eq!(hex::encode(&build.trace_id), trace);
        let parent_span = if is_child { "00f067aa0ba902b7" } else { "" };
        assert_eq!(hex::encode(&build.parent_span_id), parent_span);
        let is_malformed = given.is_some() && !is_child;
        assert_eq!(
            ran.err.matches("ignoring TRACEPARENT").count(),
            usize::from(is_malformed),
            "{ran}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_come_with_the_values_that_the_admin_port_shows() {
    let world = World::new().await;
    let (collector, flag) = Collector::start().await;
    let mut command = outhaul();
    command
        .args([
            "serve",
            "--bes-listen=127.0.0.1:0",
            "--admin-listen=127.0.0.1:0",
            &flag,
        ])
        .args([world.state(), world.cache_flag()])
        .env("OTEL_METRIC_EXPORT_INTERVAL", "50");
    let mut server = Running::serve(command).await;
    let log = server.logged("health and metrics on http://").await;
    let admin = log.split("health and metrics on http://").nth(1).unwrap();
    let admin = admin.lines().next().unwrap().trim().to_owned();
    world.play(&world.build, server.address()).await;
    collector.build().await;

    // What changes by itself, and what only the text has.
    let is_steady = |line: &&str| {
        !line.starts_with("outhaul_tasks") && !line.contains("_count") && !line.contains("_bucket")
    };
    // Some change a little after the build's end as well.
    until("the same has come", async || {
        let (_, shown) = get_from(&admin, &admin, "/metrics", "").await;
        let lines = shown.lines().filter(|line| line.starts_with("outhaul_"));
        let expected: BTreeSet<String> = lines.filter(is_steady).map(str::to_owned).collect();
        assert!(expected.len() > 50, "{shown}");
        let metrics = collector.got().metrics.clone();
        let sent: BTreeSet<String> = metrics.iter().flat_map(samples).collect();
        expected.is_subset(&sent)
    })
    .await;
    let metrics = collector.got().metrics.clone();
    let hold = metrics
        .iter()
        .find(|metric| metric.name == "outhaul.hold")
        .unwrap();
    let Some(Data::Histogram(held)) = &hold.data else {
        panic!("{hold:?}")
    };
    assert_eq!((held.data_points[0].count, &*hold.unit), (1, "s"));
    assert_eq!(held.data_points[0].bucket_counts.iter().sum::<u64>(), 1);
    end(&mut server).await;
}

/// A metric's lines as Prometheus has them.
fn samples(metric: &Metric) -> Vec<String> {
    let unit = match &*metric.unit {
        "s" => "_seconds",
        "By" => "_bytes",
        "" => "",
        other => panic!("{other}"),
    };
    let name = format!("{}{unit}", metric.name.replacen('.', "_", 1));
    let labels = |attributes: &[KeyValue]| {
        let labels = attributes.iter().map(|attribute| {
            let value = texts(std::slice::from_ref(attribute)).remove(&attribute.key);
            format!("{}=\"{}\"", attribute.key, value.unwrap())
        });
        let labels: Vec<String> = labels.collect();
        if labels.is_empty() {
            String::new()
        } else {
            format!("{{{}}}", labels.join(","))
        }
    };
    let (points, end) = match metric.data.as_ref().unwrap() {
        Data::Sum(sum) => (&sum.data_points, "_total"),
        Data::Gauge(gauge) => (&gauge.data_points, ""),
        Data::Histogram(histogram) => {
            let sums = histogram.data_points.iter();
            let sums = sums.map(|point| format!("{name}_sum{} {:?}", labels(&point.attributes), point.sum()));
            return sums.collect();
        }
        other => panic!("{other:?}"),
    };
    let points = points.iter().map(|point| {
        let value = match point.value.unwrap() {
            number_data_point::Value::AsInt(value) => value.to_string(),
            number_data_point::Value::AsDouble(value) => format!("{value:?}"),
        };
        format!("{name}{end}{} {value}", labels(&point.attributes))
    });
    points.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_is_said_once_and_gets_its_spans_later() {
    let world = World::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let flag = format!("--otlp-endpoint=http://me:hush@{address}");
    let mut server = world.serve(&[&flag]).await;
    world.play(&world.build, server.address()).await;
    world.assert_complete();
    let failed =
        format!("failed to export to the OpenTelemetry collector http://{address} (--otlp-endpoint)");
    server.logged(&failed).await;

    let collector = Collector::default();
    collector.serve(Server::builder(), TcpListener::bind(address).await.unwrap());
    let build = collector.build().await;
    assert_nested(&collector.got().spans, &build);
    let log = server.logged("works again").await;
    assert_eq!(log.matches("failed to export").count(), 1, "{log}");
    assert!(
        !log.contains("hush") && !log.contains("were not exported"),
        "{log}"
    );
    end(&mut server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_may_take_one_kind_alone() {
    for (lacking, said) in [(METRICS, 0), (SPANS, 1)] {
        let world = World::new().await;
        let (collector, flag) = Collector::start().await;
        collector.got().manners[lacking].refuses = Some(Code::Unimplemented);
        let ran = below_run(&world, Place::new(), &flag).await;
        assert_eq!(ran.err.matches("OpenTelemetry").count(), said, "{ran}");
        if lacking == METRICS {
            let build = collector.spans("build").remove(0);
            assert_nested(&collector.got().spans, &build);
        } else {
            assert!(!collector.got().metrics.is_empty());
            let reason = "(--otlp-endpoint) takes no spans: as it was told\\nto; ";
            assert!(
                ran.err.contains(reason) && ran.err.contains("lost in all"),
                "{ran}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_are_not_kept_waiting_by_metrics_that_take_longer_than_their_interval() {
    let world = World::new().await;
    let (collector, flag) = Collector::start().await;
    collector.got().manners[METRICS].takes = Duration::from_millis(20);
    let mut command = outhaul();
    command
        .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none", &flag])
        .args([world.state(), world.cache_flag()])
        .env("OTEL_METRIC_EXPORT_INTERVAL", "1");
    let mut server = Running::serve(command).await;
    until("metrics come", async || !collector.got().metrics.is_empty()).await;
    world.play(&world.build, server.address()).await;
    collector.build().await;
    end(&mut server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_that_are_refused_for_good_are_counted_and_do_not_block_later_ones() {
    let world = World::new().await;
    let (collector, flag) = Collector::start().await;
    // As a collector says that a request is too large.
    collector.got().manners[SPANS].refuses = Some(Code::ResourceExhausted);
    let mut server = world.serve(&[&flag]).await;
    world.play(&world.build, server.address()).await;
    server.logged("failed to export spans to the OpenTelemetry").await;
    collector.got().manners[SPANS].refuses = None;
    let events = world.build.events();
    let played = outhaul::demo::play(server.address(), "another", "build", events);
    played.await.unwrap();
    let build = collector.build().await;
    says(&build, &[("outhaul.invocation.id", "another")]);
    let log = server.logged("not exported to the OpenTelemetry").await;
    assert!(log.contains("exporting spans to the OpenTelemetry"), "{log}");
    assert_eq!(log.matches("failed to export").count(), 1, "{log}");
    end(&mut server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_that_a_collector_does_not_take_at_the_end_are_counted() {
    let world = World::new().await;
    let (collector, flag) = Collector::start().await;
    collector.got().manners[SPANS].takes = Duration::from_secs(3600);
    let mut server = world.serve(&[&flag]).await;
    until("metrics come", async || !collector.got().metrics.is_empty()).await;
    world.play(&world.build, server.address()).await;
    world.assert_complete();
    end(&mut server).await;
    let log = server.logged("no answer within 3.0s; ").await;
    assert!(log.contains(" spans were lost in all"), "{log}");
}

/// One that refuses connections, and one that takes them and says nothing.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_a_collector_that_does_not_answer() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent_address = silent.local_addr().unwrap().to_string();
    for (address, reason) in [
        ("127.0.0.1:1".to_owned(), "refused"),
        (silent_address, "no answer within 1.0s"),
    ] {
        let flag = format!("--otlp-endpoint=http://{address}");
        let world = World::new().await;
        let mut server = world.serve(&[&flag]).await;
        world.play(&world.build, server.address()).await;
        world.assert_complete();
        end(&mut server).await;

        let place = Place::new().arg(&flag);
        let command = place.calling("run", &["true"]);
        let ran = outhaul_testkit::finish(command).await;
        let said = format!("outhaul: failed to export to the OpenTelemetry collector http://{address}");
        let ran = ran.expect(0);
        assert_eq!(ran.err.matches(&said).count(), 1, "{ran}");
        assert!(ran.err.contains(reason), "{ran}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_settings_are_named_at_the_start() {
    let world = World::new().await;
    for command in ["serve", "run"] {
        let rest: &[&str] = if command == "run" { &["--", "true"] } else { &[] };
        for (flag, parts) in [
            (
                "--otlp-endpoint=localhost:4317",
                &["--otlp-endpoint=localhost:4317", "unknown scheme"][..],
            ),
            (
                "--otlp-endpoint=http://me:hush@h:4318/v1/traces",
                &["--otlp-endpoint=", "only a host and a port"],
            ),
        ] {
            let (state, cache) = (world.state(), world.cache_flag());
            let all = [&[command, &state, &cache, flag], rest].concat();
            let ran = run(all).await.says(2, parts);
            assert!(!ran.err.contains("hush"), "{}", ran.err);
        }
        let mut untrusted = outhaul();
        untrusted
            .args([
                command,
                &world.state(),
                &world.cache_flag(),
                "--otlp-endpoint=https://h",
            ])
            .args(rest)
            .env("OTEL_EXPORTER_OTLP_CERTIFICATE", "/no/such/file");
        outhaul_testkit::finish(untrusted)
            .await
            .says(2, &["OTEL_EXPORTER_OTLP_CERTIFICATE=/no/such/file"]);
    }
    let mut help = outhaul();
    help.env("OUTHAUL_OTLP_ENDPOINT", "https://me:hush@h")
        .args(["serve", "--help"]);
    let shown = outhaul_testkit::finish(help).await.expect(0).out();
    assert!(shown.contains("OUTHAUL_OTLP_ENDPOINT") && !shown.contains("hush"));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_exported_unless_asked_for() {
    let (collector, flag) = Collector::start().await;
    let world = World::new().await;
    let url = flag.split_once('=').unwrap().1;
    let mut command = outhaul();
    command
        .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"])
        .args([world.state(), world.cache_flag()])
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", url);
    let mut server = Running::serve(command).await;
    world.play(&world.build, server.address()).await;
    end(&mut server).await;
    assert!(collector.got().spans.is_empty() && collector.got().metrics.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_is_reached_by_tls_if_its_certificate_is_trusted() {
    let world = World::new().await;
    let pki = Pki::new(&world);
    let [certificate, key] = [&pki.certificate, &pki.key].map(|file| std::fs::read(file).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let collector = Collector::default();
    let tls = ServerTlsConfig::new().identity(Identity::from_pem(certificate, key));
    let server = Server::builder().tls_config(tls).unwrap();
    collector.serve(server, listener);
    for (authority, is_trusted) in [(pki.ca.as_str(), true), ("", false)] {
        let mut command = outhaul();
        command
            .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"])
            .arg(format!("--otlp-endpoint=https://localhost:{port}"))
            .args([world.state(), world.cache_flag()])
            .env("OTEL_EXPORTER_OTLP_CERTIFICATE", authority);
        let mut server = Running::serve(command).await;
        if is_trusted {
            until("metrics come", async || !collector.got().metrics.is_empty()).await;
        } else {
            let log = server.logged("failed to export").await;
            assert!(
                log.contains("authority with OTEL_EXPORTER_OTLP_CERTIFICATE"),
                "{log}"
            );
        }
        end(&mut server).await;
    }
}
