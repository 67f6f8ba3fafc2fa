//! Spans and metrics as OTLP's messages.

use opentelemetry_proto::tonic::{
    collector::{metrics::v1::ExportMetricsServiceRequest, trace::v1::ExportTraceServiceRequest},
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value},
    metrics::v1::{
        AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint,
        ResourceMetrics, ScopeMetrics, Sum, metric::Data, number_data_point,
    },
    resource::v1::Resource,
    trace::v1::{self as wire, ResourceSpans, ScopeSpans, span::SpanKind, status::StatusCode},
};

use super::{
    figures::{Distribution, Figure, Labels, Number, Points},
    span::{Span, Value},
};

/// Says of a span that it is exported, as W3C's trace flags do.
const SAMPLED: u32 = 1;

fn attribute(name: &str, value: any_value::Value) -> KeyValue {
    KeyValue {
        key: name.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}

fn texts<'a>(pairs: impl IntoIterator<Item = &'a (String, String)>) -> Vec<KeyValue> {
    let pairs = pairs.into_iter();
    let attributes = pairs.map(|(name, value)| attribute(name, any_value::Value::StringValue(value.clone())));
    attributes.collect()
}

fn scope() -> Option<InstrumentationScope> {
    Some(InstrumentationScope {
        name: "outhaul".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    })
}

/// Who we are.
pub(super) fn resource(attributes: &[(String, String)]) -> Resource {
    Resource {
        attributes: texts(attributes),
        ..Resource::default()
    }
}

/// A request with spans.
pub(super) fn spans(spans: &[Span], resource: Resource) -> ExportTraceServiceRequest {
    let spans = ScopeSpans {
        scope: scope(),
        spans: spans.iter().map(span).collect(),
        ..ScopeSpans::default()
    };
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(resource),
            scope_spans: vec![spans],
            ..ResourceSpans::default()
        }],
    }
}

fn span(span: &Span) -> wire::Span {
    let kind = if span.is_call {
        SpanKind::Client
    } else {
        SpanKind::Internal
    };
    let attributes = span.attributes.iter().map(|(name, value)| {
        attribute(
            name,
            match value {
                Value::Text(text) => any_value::Value::StringValue(text.clone()),
                Value::Number(number) => any_value::Value::IntValue(*number),
                Value::Flag(flag) => any_value::Value::BoolValue(*flag),
            },
        )
    });
    wire::Span {
        trace_id: span.trace.to_vec(),
        span_id: span.id.to_vec(),
        parent_span_id: span.parent.map_or_else(Vec::new, |id| id.to_vec()),
        flags: SAMPLED,
        name: span.name.to_owned(),
        kind: kind.into(),
        start_time_unix_nano: span.begin_ns,
        end_time_unix_nano: span.end_ns,
        attributes: attributes.collect(),
        status: span.error.as_ref().map(|error| wire::Status {
            message: error.clone(),
            code: StatusCode::Error.into(),
        }),
        ..wire::Span::default()
    }
}

/// A request with metrics, as counted since a moment and read at another one, both in nanoseconds since the epoch.
pub(super) fn metrics(
    figures: Vec<Figure>,
    resource: Resource,
    times: (u64, u64),
) -> ExportMetricsServiceRequest {
    let metrics = ScopeMetrics {
        scope: scope(),
        metrics: figures.into_iter().map(|figure| metric(figure, times)).collect(),
        ..ScopeMetrics::default()
    };
    ExportMetricsServiceRequest {
        resource_metrics: vec![ResourceMetrics {
            resource: Some(resource),
            scope_metrics: vec![metrics],
            ..ResourceMetrics::default()
        }],
    }
}

fn metric(figure: Figure, (since, now): (u64, u64)) -> Metric {
    let cumulative = i32::from(AggregationTemporality::Cumulative);
    let numbers = |points: Vec<(Labels, Number)>, since| {
        let points = points.into_iter().map(|(labels, number)| NumberDataPoint {
            attributes: texts(&labels),
            start_time_unix_nano: since,
            time_unix_nano: now,
            value: Some(match number {
                Number::Whole(number) => number_data_point::Value::AsInt(number),
                Number::Broken(number) => number_data_point::Value::AsDouble(number),
            }),
            ..NumberDataPoint::default()
        });
        points.collect()
    };
    let data = match figure.points {
        Points::Sums(points) => Data::Sum(Sum {
            data_points: numbers(points, since),
            aggregation_temporality: cumulative,
            is_monotonic: true,
        }),
        // Nothing is counted.
        Points::Values(points) => Data::Gauge(Gauge {
            data_points: numbers(points, 0),
        }),
        Points::Distributions(points) => Data::Histogram(Histogram {
            data_points: (points.into_iter())
                .map(|point| distribution(point, (since, now)))
                .collect(),
            aggregation_temporality: cumulative,
        }),
    };
    Metric {
        name: figure.name,
        description: figure.help,
        unit: figure.unit.to_owned(),
        data: Some(data),
        ..Metric::default()
    }
}

fn distribution((labels, point): (Labels, Distribution), (since, now): (u64, u64)) -> HistogramDataPoint {
    HistogramDataPoint {
        attributes: texts(&labels),
        start_time_unix_nano: since,
        time_unix_nano: now,
        count: point.buckets.iter().sum(),
        sum: Some(point.sum),
        bucket_counts: point.buckets,
        explicit_bounds: point.bounds,
        ..HistogramDataPoint::default()
    }
}
