//! Traces of builds: what those who know of a build's doings are handed, and where spans go.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use super::{
    parent::TraceParent,
    span::{Attribute, Span, SpanId, TraceId, Value, short},
};
use crate::units::now_ns;

/// Spans below its own that one build exports; its own has the number of the others.
pub(super) const SPANS: u32 = 1000;

/// Where spans go, if anywhere. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Traces(Option<Arc<Sink>>);

/// The queue's beginning.
pub(super) struct Sink {
    pub(super) queue: mpsc::Sender<Span>,
    /// Spans that found no room.
    pub(super) dropped: Arc<AtomicU64>,
    /// What all builds are a part of.
    pub(super) parent: Option<TraceParent>,
}

impl Sink {
    fn send(&self, span: Span) {
        if self.queue.try_send(span).is_err() {
            self.dropped.fetch_add(1, Relaxed);
        }
    }
}

/// Which build it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Build<'a> {
    pub(crate) invocation_id: &'a str,
    pub(crate) build_id: &'a str,
    pub(crate) attempt: u32,
    /// Whether it comes again from an earlier life of the process, whose parent is not known any more.
    pub(crate) is_resumed: bool,
}

impl Traces {
    pub(super) fn to(sink: Sink) -> Self {
        Self(Some(Arc::new(sink)))
    }

    /// The trace of a build. None where nothing is exported, or where the build's parent is not either.
    pub(crate) fn of(&self, build: Build<'_>) -> Option<Arc<Trace>> {
        let sink = self.0.clone()?;
        let parent = sink.parent.filter(|_| !build.is_resumed);
        if parent.is_some_and(|parent| !parent.is_sampled) {
            return None;
        }
        Some(Arc::new(Trace {
            id: parent.map_or_else(|| trace_id(build.invocation_id), |parent| parent.trace),
            parent: parent.map(|parent| parent.span),
            seed: Sha256::new()
                .chain_update(build.invocation_id)
                .chain_update([0])
                .chain_update(build.build_id)
                .chain_update(build.attempt.to_le_bytes()),
            clock: (Instant::now(), now_ns()),
            state: Mutex::default(),
            sink,
        }))
    }
}

/// An invocation id's bytes, if it is a UUID, or else the beginning of its hash.
fn trace_id(invocation_id: &str) -> TraceId {
    let mut id = TraceId::default();
    let has_dashes = |at: &usize| invocation_id.as_bytes().get(*at) == Some(&b'-');
    let is_uuid = invocation_id.len() == 36 && [8, 13, 18, 23].iter().all(has_dashes);
    let digits = invocation_id.replace('-', "");
    if !is_uuid || hex::decode_to_slice(digits, &mut id).is_err() || id == TraceId::default() {
        id.copy_from_slice(&Sha256::digest(invocation_id)[..size_of::<TraceId>()]);
    }
    id
}

/// The trace of one build, for all that notes spans in it. Its own span has an id by the build's ids, so that what an earlier
/// life of the process has exported is a part of the same.
pub struct Trace {
    sink: Arc<Sink>,
    id: TraceId,
    parent: Option<SpanId>,
    seed: Sha256,
    /// One moment by both clocks: spans of one build are in order, however the system's clock is set meanwhile.
    clock: (Instant, i64),
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The build's own span.
    root: SpanId,
    begun: Option<Instant>,
    ended: Option<Instant>,
    /// How often it has begun.
    times: u32,
    spans: u32,
    /// Spans beyond those.
    left_out: u64,
    /// What would end the hold.
    limit: Option<String>,
    /// The build's cache.
    cache: String,
}

impl State {
    /// Counts one more span, unless there are too many.
    fn admit(&mut self) -> bool {
        let has_room = self.spans < SPANS;
        if has_room {
            self.spans += 1;
        } else {
            self.left_out += 1;
        }
        has_room
    }
}

impl Trace {
    /// The build has begun, or goes on after its end.
    pub(crate) fn begin(&self) {
        let mut state = self.state.lock();
        if state.begun.is_some() && state.ended.is_none() {
            return;
        }
        let seed = self.seed.clone().chain_update(state.times.to_le_bytes());
        let mut root = SpanId::default();
        root.copy_from_slice(&seed.finalize()[..size_of::<SpanId>()]);
        *state = State {
            root,
            begun: Some(Instant::now()),
            times: state.times.saturating_add(1),
            // Word of it may come before the first event.
            limit: state.limit.take(),
            cache: std::mem::take(&mut state.cache),
            ..State::default()
        };
    }

    /// All that it wanted has come to its end. `error` says why the build counts as failed, if it does.
    pub(crate) fn end(
        &self,
        attributes: impl IntoIterator<Item = (&'static str, Value)>,
        error: Option<String>,
    ) {
        let mut state = self.state.lock();
        let Some(begun) = state.begun.filter(|_| state.ended.is_none()) else {
            return;
        };
        let ended = Instant::now();
        state.ended = Some(ended);
        let mut attributes: Vec<Attribute> = attributes.into_iter().collect();
        if state.left_out > 0 {
            attributes.push(("outhaul.spans_left_out", state.left_out.into()));
        }
        self.sink.send(Span {
            id: state.root,
            parent: self.parent,
            attributes,
            error: error.map(short),
            ..self.span("build", state.root, (begun, ended))
        });
    }

    /// The build's cache, without credentials.
    pub(crate) fn reads_from(&self, cache: &str) {
        cache.clone_into(&mut self.state.lock().cache);
    }

    /// The build tool's command waits, at most until this limit ends it.
    pub(crate) fn holds(&self, limit: &str) {
        self.state.lock().limit = Some(limit.to_owned());
    }

    /// It has waited for so long, and so many required outputs are still on their way.
    pub(crate) fn held(&self, took: Duration, timed_out: bool, pending: u64) {
        let mut state = self.state.lock();
        let Some(build) = state.begun else { return };
        // Word of it comes a little after the build's own end.
        let ended = state.ended.unwrap_or_else(Instant::now);
        if !state.admit() {
            return;
        }
        let begun = ended.checked_sub(took).unwrap_or(build).max(build);
        let mut attributes = vec![
            ("outhaul.hold.timed_out", timed_out.into()),
            ("outhaul.hold.pending", pending.into()),
        ];
        let limit = state.limit.take();
        attributes.extend(limit.map(|limit| ("outhaul.hold.limit", limit.into())));
        self.sink.send(Span {
            attributes,
            ..self.span("hold", state.root, (begun, ended))
        });
    }

    fn span(&self, name: &'static str, root: SpanId, (begun, ended): (Instant, Instant)) -> Span {
        Span {
            trace: self.id,
            id: rand::random::<[u8; 8]>(),
            parent: Some(root),
            name,
            is_call: false,
            begin_ns: self.at(begun),
            end_ns: self.at(ended),
            attributes: Vec::new(),
            error: None,
        }
    }

    /// Nanoseconds since the epoch.
    fn at(&self, moment: Instant) -> u64 {
        let (then, then_ns) = self.clock;
        let ns = |time: Duration| i64::try_from(time.as_nanos()).unwrap_or(i64::MAX);
        let at = match moment.checked_duration_since(then) {
            Some(after) => then_ns.saturating_add(ns(after)),
            None => then_ns.saturating_sub(ns(then.duration_since(moment))),
        };
        u64::try_from(at).unwrap_or_default()
    }

    /// Counts one more span. The build's own, unless there are too many.
    fn admit(&self) -> Option<SpanId> {
        let mut state = self.state.lock();
        state.admit().then_some(state.root)
    }
}

/// Begins a span of a build, if there is a trace of it.
pub(crate) fn open(trace: Option<&Arc<Trace>>, name: &'static str) -> Option<Open> {
    trace.map(|trace| Open {
        trace: trace.clone(),
        name,
        begun: Instant::now(),
        is_call: false,
        attributes: Vec::new(),
        error: None,
        outcome: None,
    })
}

/// A span that has begun. It ends when it is dropped: as `cancelled`, unless it has an outcome by then.
pub(crate) struct Open {
    trace: Arc<Trace>,
    name: &'static str,
    begun: Instant,
    is_call: bool,
    attributes: Vec<Attribute>,
    error: Option<String>,
    outcome: Option<&'static str>,
}

impl Open {
    /// As a request to another service.
    pub(crate) fn calling(mut self) -> Self {
        self.is_call = true;
        self
    }

    /// Adds what is known of it.
    pub(crate) fn note(&mut self, name: &'static str, value: impl Into<Value>) {
        self.attributes.push((name, value.into()));
    }

    /// Which store it was, where there are several; or else the build's cache.
    pub(crate) fn store(&mut self, store: Option<Arc<str>>) {
        let store = store.map_or_else(
            || self.trace.state.lock().cache.clone(),
            |store| store.to_string(),
        );
        self.note("outhaul.store", store);
    }

    /// How it came out, in a word; and why it counts as failed, if it does.
    pub(crate) fn outcome(&mut self, outcome: &'static str, error: Option<String>) {
        self.outcome = Some(outcome);
        self.error = error.map(short);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let Some(root) = self.trace.admit() else { return };
        self.note("outhaul.outcome", self.outcome.unwrap_or("cancelled"));
        let span = Span {
            is_call: self.is_call,
            attributes: std::mem::take(&mut self.attributes),
            error: self.error.take(),
            ..self.trace.span(self.name, root, (self.begun, Instant::now()))
        };
        self.trace.sink.send(span);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0f3b2c1a-5d4e-4f60-8a7b-9c0d1e2f3a4b";

    fn traces(room: usize, parent: Option<&str>) -> (Traces, mpsc::Receiver<Span>, Arc<AtomicU64>) {
        let (queue, spans) = mpsc::channel(room);
        let dropped = Arc::<AtomicU64>::default();
        let sink = Sink {
            queue,
            dropped: dropped.clone(),
            parent: parent.map(|text| text.parse().unwrap()),
        };
        (Traces::to(sink), spans, dropped)
    }

    fn build(invocation_id: &str, is_resumed: bool) -> Build<'_> {
        Build {
            invocation_id,
            build_id: "b",
            attempt: 0,
            is_resumed,
        }
    }

    #[test]
    fn a_traces_id_is_the_invocations_and_never_zero() {
        assert_eq!(hex::encode(trace_id(ID)), ID.replace('-', ""));
        assert_eq!(trace_id(&ID.to_uppercase()), trace_id(ID));
        let zero = "00000000-0000-0000-0000-000000000000";
        for other in ["", "ci-run-7", zero, &ID[1..], &ID.replace('a', "x")] {
            let id = trace_id(other);
            assert_eq!(id, Sha256::digest(other)[..16], "{other}");
        }
    }

    #[test]
    fn spans_are_the_builds_and_in_order() {
        let (traces, mut spans, _) = traces(100, None);
        let trace = traces.of(build(ID, false)).unwrap();
        trace.begin();
        trace.begin();
        trace.holds("--hold-timeout=5s");
        let mut batch = open(Some(&trace), "download batch").unwrap().calling();
        batch.outcome("downloaded", None);
        drop(batch);
        drop(open(Some(&trace), "place"));
        trace.end(
            [("outhaul.state", "settled".into())],
            Some("exit code 1".to_owned()),
        );
        trace.end([], None);
        trace.held(Duration::from_nanos(1), true, 3);
        let spans: Vec<Span> = std::iter::from_fn(|| spans.try_recv().ok()).collect();
        let names: Vec<_> = spans.iter().map(|span| span.name).collect();
        assert_eq!(names, ["download batch", "place", "build", "hold"]);
        let root = &spans[2];
        assert_eq!((root.parent, root.error.as_deref()), (None, Some("exit code 1")));
        for span in &spans {
            assert_eq!(span.trace, trace_id(ID));
            assert!(span.name == "build" || span.parent == Some(root.id), "{span:?}");
            assert!(root.begin_ns <= span.begin_ns && span.begin_ns <= span.end_ns);
            assert!(span.end_ns <= root.end_ns, "{span:?}");
        }
        assert!(spans[0].is_call && !spans[1].is_call);
        assert_eq!(spans[1].attributes, [("outhaul.outcome", "cancelled".into())]);
        let hold = [
            ("outhaul.hold.timed_out", true.into()),
            ("outhaul.hold.pending", 3_u64.into()),
            ("outhaul.hold.limit", "--hold-timeout=5s".into()),
        ];
        assert_eq!(spans[3].attributes, hold);
    }

    #[test]
    fn one_that_goes_on_after_its_end_gets_another_span_and_one_of_an_earlier_life_the_same() {
        let (traces, mut spans, _) = traces(100, None);
        let mut roots = Vec::new();
        for times in [2, 1] {
            let trace = traces.of(build(ID, false)).unwrap();
            for _ in 0..times {
                trace.begin();
                trace.end([], None);
                roots.push(spans.try_recv().unwrap().id);
            }
        }
        assert_ne!(roots[0], roots[1]);
        assert_eq!(roots[0], roots[2]);
    }

    #[test]
    fn a_builds_parent_is_its_own_processes_and_says_whether_anything_is_exported() {
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let (sampled, mut spans, _) = traces(100, Some(parent));
        for (is_resumed, is_child) in [(false, true), (true, false)] {
            let trace = sampled.of(build(ID, is_resumed)).unwrap();
            trace.begin();
            trace.end([], None);
            let span = spans.try_recv().unwrap();
            assert_eq!(
                span.parent.map(hex::encode),
                is_child.then(|| "00f067aa0ba902b7".to_owned())
            );
            assert_eq!(span.trace == trace_id(ID), !is_child);
        }
        let (unsampled, ..) = traces(100, Some(&parent.replace("-01", "-00")));
        assert!(unsampled.of(build(ID, false)).is_none());
        assert!(Traces::default().of(build(ID, false)).is_none());
    }

    #[test]
    fn spans_are_bounded_for_each_build_and_in_the_queue_and_the_rest_is_counted() {
        let (traces, mut spans, dropped) = traces(SPANS as usize + 1, None);
        let trace = traces.of(build(ID, false)).unwrap();
        trace.begin();
        for _ in 0..SPANS + 7 {
            drop(open(Some(&trace), "place"));
        }
        trace.end([], None);
        trace.held(Duration::ZERO, false, 0);
        assert_eq!(dropped.load(Relaxed), 0, "the hold is one too many");
        trace.begin();
        trace.end([], None);
        assert_eq!(dropped.load(Relaxed), 1, "the queue is full");
        let spans: Vec<Span> = std::iter::from_fn(|| spans.try_recv().ok()).collect();
        assert_eq!(spans.len(), SPANS as usize + 1);
        let root = spans.last().unwrap();
        assert_eq!(root.attributes, [("outhaul.spans_left_out", 7_u64.into())]);
    }
}
