//! The daemon's metrics, for `/metrics` in the OpenMetrics format and in Prometheus's older one.
//!
//! What an alert may ask for is there from the start, as 0: of a counter that comes into being with its first fault, no query
//! sees that fault.
//!
//! All modules share one [`Metrics`]; this module depends on none of them.

use std::{
    collections::HashSet,
    fmt::Write as _,
    sync::{Arc, atomic::AtomicI64},
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _, text::encode},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

/// What all names begin with.
pub(crate) const PREFIX: &str = "outhaul";

/// Labels of a blob's end.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct BlobLabels {
    /// Where the bytes came from: `batch`, `stream`, `inline`, `copy`, `disk`, `none`.
    pub source: &'static str,
    /// `downloaded`, `present`, `failed`, `evicted` or `superseded`.
    pub outcome: &'static str,
}

/// A single label named `lane`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct LaneLabels {
    /// `required`, `optional` or `large`.
    pub lane: &'static str,
}

/// A single label named `version`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VersionLabels {
    version: &'static str,
}

/// A single label named `state`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct StateLabels {
    /// `running` or `draining`; or `settled`, `superseded` or `interrupted`.
    pub state: &'static str,
}

/// A single label named `kind`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct KindLabels {
    /// What was counted.
    pub kind: &'static str,
}

/// A single label named `store`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct StoreLabels {
    /// A store of a chain, without credentials; `other` beyond the first ones.
    pub store: String,
}

/// The kinds of faults.
const FAULTS: [&str; 10] = [
    "undecodable_event",
    "refused_output",
    "mismatch",
    "unusable_answer",
    "low_space",
    "disk_full",
    "lease",
    "hold_timeout",
    "journal",
    "action_cache",
];
/// The states of invocations that are not over.
const UNDER_WAY: [&str; 2] = ["running", "draining"];
/// The kinds of requests: those that transfer blobs, and the others.
const TRANSFERS: [&str; 2] = ["batch", "stream"];
const QUESTIONS: [&str; 1] = ["find_missing"];

/// Stores that are counted each by its name.
const STORES: usize = 64;

/// A count that a room keeps itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// Its name, without the program's and the room's.
    pub name: &'static str,
    /// What it counts.
    pub help: &'static str,
    /// How many so far.
    pub value: u64,
}

type Source = Box<dyn Fn() -> Vec<Count> + Send + Sync>;

/// Asks rooms for their counts whenever somebody looks.
#[derive(Clone, Default)]
struct Sources(Arc<Mutex<Vec<(&'static str, Source)>>>);

impl std::fmt::Debug for Sources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sources")
    }
}

impl Collector for Sources {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        for (room, source) in &*self.0.lock() {
            for count in source() {
                let name = format!("{room}_{}", count.name);
                let help = count.help.trim();
                let encoder = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
                ConstCounter::new(count.value).encode(encoder)?;
            }
        }
        // There is no runtime where nothing is served.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let tasks = runtime.metrics().num_alive_tasks() as u64;
            let help = "Tasks of the daemon's runtime";
            let encoder = encoder.encode_descriptor("tasks", help, None, MetricType::Gauge)?;
            ConstGauge::new(tasks).encode(encoder)?;
        }
        Ok(())
    }
}

/// How a notification ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notified {
    /// The receiver took it; the command ended well.
    Sent,
    /// The receiver did not, however often it was tried; the command failed.
    Failed,
    /// It was not tried, or not to the end: too many waited, or the daemon ended.
    Dropped,
}

/// Labels of a notification's end.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct NotificationLabels {
    /// `url` or `command`.
    pub via: &'static str,
    /// `sent`, `failed` or `dropped`.
    pub outcome: &'static str,
}

/// The daemon's counters. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    sources: Sources,
    /// Outputs by how they ended.
    pub blobs: Family<BlobLabels, Counter>,
    /// Bytes of outputs that were downloaded.
    pub downloaded_bytes: Counter,
    /// Outputs that were downloaded, by the store that gave them, where there are several.
    pub store_outputs: Family<StoreLabels, Counter>,
    /// Their bytes.
    pub store_bytes: Family<StoreLabels, Counter>,
    stores: Arc<Mutex<HashSet<String>>>,
    /// Blobs waiting to be fetched.
    pub queue: Family<LaneLabels, Gauge>,
    /// Bytes that are on their way between the cache and the disk.
    pub bytes_in_flight: Gauge<i64, AtomicI64>,
    /// Outputs, and their bytes, that were removed because the disk got full.
    auto_evicted_outputs: Counter,
    auto_evicted_bytes: Counter,
    /// Lanes whose downloads are paused on request.
    paused: Family<LaneLabels, Gauge>,
    /// Requests to the remote cache.
    pub requests: Family<KindLabels, Counter>,
    /// How long those of them took that transfer blobs.
    transfer_seconds: Family<KindLabels, Histogram>,
    /// Events received.
    pub events: Counter,
    /// Events that could not be decoded, journaled, or were refused: by kind.
    pub faults: Family<KindLabels, Counter>,
    /// How long the end of a stream was held back.
    pub hold_seconds: Histogram,
    /// Outputs that leases were asked for, and what was found: by kind.
    pub leases: Family<KindLabels, Counter>,
    /// Outputs of live builds that neither the cache nor the disk had when last asked for.
    pub evicted: Gauge<i64, AtomicI64>,
    /// Invocations that are not over, by their state.
    invocations: Family<StateLabels, Gauge>,
    /// How often invocations came to an end, by its state.
    invocations_ended: Family<StateLabels, Counter>,
    /// Notifications by receiver and outcome.
    pub notifications: Family<NotificationLabels, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Arc::default(),
            sources: Sources::default(),
            blobs: Family::default(),
            downloaded_bytes: Counter::default(),
            store_outputs: Family::default(),
            store_bytes: Family::default(),
            stores: Arc::default(),
            queue: Family::default(),
            bytes_in_flight: Gauge::default(),
            paused: Family::default(),
            auto_evicted_outputs: Counter::default(),
            auto_evicted_bytes: Counter::default(),
            requests: Family::default(),
            transfer_seconds: Family::new_with_constructor(seconds),
            events: Counter::default(),
            faults: Family::default(),
            hold_seconds: seconds(),
            leases: Family::default(),
            evicted: Gauge::default(),
            invocations: Family::default(),
            invocations_ended: Family::default(),
            notifications: Family::default(),
        };
        Self {
            registry: Arc::new(metrics.register()),
            ..metrics
        }
        .with_zeros()
    }
}

/// A histogram of times, from 1 ms to about 9 minutes.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 20))
}

impl Metrics {
    /// With a 0 for what may be counted.
    fn with_zeros(self) -> Self {
        for kind in FAULTS {
            self.faults.get_or_create(&KindLabels { kind }).inc_by(0);
        }
        for kind in TRANSFERS {
            drop(self.transfer(kind));
        }
        for kind in TRANSFERS.into_iter().chain(QUESTIONS) {
            self.requests.get_or_create(&KindLabels { kind }).inc_by(0);
        }
        for kind in ["renewed", "lost", "returned"] {
            self.lease(kind, 0);
        }
        for state in UNDER_WAY {
            self.invocations.get_or_create(&StateLabels { state }).set(0);
        }
        for state in ["settled", "superseded", "interrupted"] {
            self.invocations_ended
                .get_or_create(&StateLabels { state })
                .inc_by(0);
        }
        for lane in ["required", "optional", "large"] {
            self.queue_depth(lane, 0);
        }
        for lane in ["required", "optional"] {
            self.paused(lane, false);
        }
        for source in ["batch", "stream", "inline", "copy"] {
            self.blobs(source, "downloaded", 0);
        }
        self.blobs("disk", "present", 0);
        for outcome in ["failed", "evicted", "superseded"] {
            self.blobs("none", outcome, 0);
        }
        for via in ["url", "command"] {
            for outcome in [Notified::Sent, Notified::Failed, Notified::Dropped] {
                self.notification(via, outcome, 0);
            }
        }
        self
    }

    /// The registry with all of them.
    fn register(&self) -> Registry {
        let mut registry = Registry::with_prefix(PREFIX);
        let build = Family::<VersionLabels, Gauge>::default();
        let version = env!("CARGO_PKG_VERSION");
        build.get_or_create(&VersionLabels { version }).set(1);
        registry.register("build_info", "Which version runs: always 1", build);
        registry.register("blobs", "Outputs by source and outcome", self.blobs.clone());
        self.register_outputs(&mut registry);
        registry.register(
            "queue_depth",
            "Blobs waiting to be fetched, by lane",
            self.queue.clone(),
        );
        registry.register_with_unit(
            "in_flight",
            "Bytes between the cache and the disk",
            Unit::Bytes,
            self.bytes_in_flight.clone(),
        );
        registry.register("requests", "Requests to the remote cache", self.requests.clone());
        registry.register_with_unit(
            "transfer",
            "Time that requests for blobs took, by kind, with waiting for --limit-rate",
            Unit::Seconds,
            self.transfer_seconds.clone(),
        );
        registry.register("events", "Build events received", self.events.clone());
        registry.register("faults", "Errors, by kind", self.faults.clone());
        registry.register_with_unit(
            "hold",
            "Time for which the end of a stream was delayed",
            Unit::Seconds,
            self.hold_seconds.clone(),
        );
        registry.register(
            "invocations",
            "Invocations that are not over, by state",
            self.invocations.clone(),
        );
        registry.register(
            "invocations_ended",
            "Invocations that came to an end, by its state",
            self.invocations_ended.clone(),
        );
        registry.register(
            "leases",
            "Outputs whose leases were renewed (renewed), that the cache has lost (lost) or has again \
             (returned)",
            self.leases.clone(),
        );
        registry.register(
            "evicted_outputs",
            "Outputs of live builds that were neither in the cache nor on disk when leases were last renewed",
            self.evicted.clone(),
        );
        registry.register_collector(Box::new(self.sources.clone()));
        registry.register(
            "notifications",
            "Notifications by receiver and outcome",
            self.notifications.clone(),
        );
        registry
    }

    /// Those that are about what comes to disk and goes from there.
    fn register_outputs(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "downloaded",
            "Bytes downloaded for outputs",
            Unit::Bytes,
            self.downloaded_bytes.clone(),
        );
        registry.register(
            "store_outputs",
            "Outputs downloaded, by the cache that had them, where there are several",
            self.store_outputs.clone(),
        );
        registry.register_with_unit(
            "store_downloaded",
            "Bytes downloaded for outputs, by cache, where there are several",
            Unit::Bytes,
            self.store_bytes.clone(),
        );
        registry.register(
            "paused",
            "Whether downloads are paused (outhaul pause), by lane",
            self.paused.clone(),
        );
        registry.register(
            "auto_evicted_outputs",
            "Outputs removed by --auto-evict",
            self.auto_evicted_outputs.clone(),
        );
        registry.register_with_unit(
            "auto_evicted",
            "Disk space freed by --auto-evict",
            Unit::Bytes,
            self.auto_evicted_bytes.clone(),
        );
    }

    /// Outputs that ended alike.
    pub fn blobs(&self, source: &'static str, outcome: &'static str, count: u64) {
        self.blobs
            .get_or_create(&BlobLabels { source, outcome })
            .inc_by(count);
    }

    /// Counts outputs, and their bytes, that came from one of several stores.
    pub fn store(&self, name: &str, outputs: u64, bytes: u64) {
        let mut known = self.stores.lock();
        let is_named = known.contains(name) || known.len() < STORES && known.insert(name.to_owned());
        drop(known);
        let store = if is_named { name } else { "other" }.to_owned();
        let labels = StoreLabels { store };
        self.store_outputs.get_or_create(&labels).inc_by(outputs);
        self.store_bytes.get_or_create(&labels).inc_by(bytes);
    }

    /// One fault.
    pub fn fault(&self, kind: &'static str) {
        debug_assert!(FAULTS.contains(&kind), "{kind} is not in the list");
        self.faults.get_or_create(&KindLabels { kind }).inc();
    }

    /// One request.
    pub fn request(&self, kind: &'static str) {
        self.requests.get_or_create(&KindLabels { kind }).inc();
    }

    /// For how long a request that transfers blobs took.
    pub(crate) fn transfer(&self, kind: &'static str) -> Histogram {
        debug_assert!(TRANSFERS.contains(&kind), "{kind} is not in the list");
        self.transfer_seconds.get_or_create_owned(&KindLabels { kind })
    }

    /// Counts outputs by their leases: `renewed`, `lost` or `returned`.
    pub fn lease(&self, kind: &'static str, outputs: usize) {
        self.leases
            .get_or_create(&KindLabels { kind })
            .inc_by(outputs as u64);
    }

    /// The length of a lane.
    pub(crate) fn queue_depth(&self, lane: &'static str, depth: usize) {
        let depth = i64::try_from(depth).unwrap_or(i64::MAX);
        self.queue.get_or_create(&LaneLabels { lane }).set(depth);
    }

    /// Outputs were removed because the disk got full.
    pub(crate) fn auto_evicted(&self, outputs: u64, bytes: u64) {
        self.auto_evicted_outputs.inc_by(outputs);
        self.auto_evicted_bytes.inc_by(bytes);
    }

    /// Whether no downloads of a lane are begun, on request.
    pub(crate) fn paused(&self, lane: &'static str, is_paused: bool) {
        self.paused
            .get_or_create(&LaneLabels { lane })
            .set(i64::from(is_paused));
    }

    /// An invocation went from one state (none at its beginning) to another.
    pub fn invocation(&self, from: Option<&'static str>, to: &'static str) {
        if let Some(state) = from.filter(|state| UNDER_WAY.contains(state)) {
            self.invocations.get_or_create(&StateLabels { state }).dec();
        }
        let labels = StateLabels { state: to };
        if UNDER_WAY.contains(&to) {
            self.invocations.get_or_create(&labels).inc();
        } else {
            self.invocations_ended.get_or_create(&labels).inc();
        }
    }

    /// Counts notifications that came to their end.
    pub(crate) fn notification(&self, via: &'static str, outcome: Notified, count: u64) {
        let outcome = match outcome {
            Notified::Sent => "sent",
            Notified::Failed => "failed",
            Notified::Dropped => "dropped",
        };
        self.notifications
            .get_or_create(&NotificationLabels { via, outcome })
            .inc_by(count);
    }

    /// The end of a stream was held back for this long.
    pub fn held(&self, took: Duration) {
        self.hold_seconds.observe(took.as_secs_f64());
    }

    /// Shows a room's own counts as well.
    pub fn also(&self, room: &'static str, counts: impl Fn() -> Vec<Count> + Send + Sync + 'static) {
        let mut sources = self.sources.0.lock();
        sources.push((room, Box::new(counts)));
    }

    /// All of it as OpenMetrics text.
    pub(crate) fn render(&self) -> String {
        let mut text = String::new();
        if encode(&mut text, &self.registry).is_err() {
            // Writing into a String cannot fail; the trait's signature says that it may.
            let _ = writeln!(text, "# encoding failed");
        }
        text
    }

    /// The same in the format that Prometheus had before. Counters have their samples' names there, and there are no units.
    pub(crate) fn render_classic(&self) -> String {
        let mut text = String::new();
        let mut help = "";
        let openmetrics = self.render();
        for line in openmetrics.lines() {
            let words = line.strip_prefix("# ").and_then(|rest| rest.split_once(' '));
            match words {
                Some(("HELP", rest)) => help = rest,
                Some(("TYPE", rest)) => {
                    let (name, kind) = rest.split_once(' ').unwrap_or_default();
                    let help = help.strip_prefix(name).unwrap_or_default();
                    let total = if kind == "counter" { "_total" } else { "" };
                    text.push_str(&format!(
                        "# HELP {name}{total}{help}\n# TYPE {name}{total} {kind}\n"
                    ));
                }
                _ if line.starts_with('#') => {}
                _ => {
                    text.push_str(line);
                    text.push('\n');
                }
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_show_up_in_the_text() {
        let metrics = Metrics::default();
        metrics.blobs("batch", "downloaded", 1);
        metrics.invocation(None, "running");
        metrics.invocation(Some("running"), "settled");
        metrics.held(Duration::from_millis(3));
        metrics.transfer("batch").observe(0.1);
        metrics.queue_depth("required", 7);
        for port in 0..100 {
            metrics.store(&format!("grpc://h:{port}"), 2, 30);
        }
        metrics.also("room", || {
            vec![Count {
                name: "files",
                help: " Files that were opened.",
                value: 3,
            }]
        });
        let text = metrics.render();
        for line in [
            "# HELP outhaul_room_files Files that were opened.\n",
            "outhaul_room_files_total 3",
            "outhaul_blobs_total{source=\"batch\",outcome=\"downloaded\"} 1",
            "outhaul_invocations{state=\"running\"} 0",
            "outhaul_invocations_ended_total{state=\"settled\"} 1",
            "outhaul_faults_total{kind=\"disk_full\"} 0",
            "outhaul_transfer_seconds_count{kind=\"batch\"} 1",
            "outhaul_hold_seconds_count 1",
            "outhaul_queue_depth{lane=\"required\"} 7",
            "outhaul_store_outputs_total{store=\"grpc://h:63\"} 2",
            "outhaul_store_outputs_total{store=\"other\"} 72",
            "outhaul_store_downloaded_bytes_total{store=\"other\"} 1080",
            "# EOF",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }

    #[test]
    fn the_older_format_has_the_same_samples_and_names_counters_by_them() {
        let metrics = Metrics::default();
        metrics.events.inc();
        let (openmetrics, classic) = (metrics.render(), metrics.render_classic());
        let samples = |text: &str| -> Vec<String> {
            let lines = text.lines().filter(|line| !line.starts_with('#'));
            lines.map(str::to_owned).collect()
        };
        assert_eq!(samples(&openmetrics), samples(&classic));
        let events = "# HELP outhaul_events_total Build events received.\n# TYPE outhaul_events_total counter\n\
                      outhaul_events_total 1\n";
        assert!(classic.contains(events), "{classic}");
        assert!(
            classic.contains("# TYPE outhaul_hold_seconds histogram\n"),
            "{classic}"
        );
        assert!(
            !classic.contains("# UNIT") && !classic.contains("# EOF"),
            "{classic}"
        );
    }
}
