//! The metrics as OpenTelemetry has them, read from the text that `/metrics` shows: there is one registry, its crate has no other way
//! to read all of it, and so both say the same.

use crate::metrics::PREFIX;

/// Names and values.
pub(super) type Labels = Vec<(String, String)>;

/// A metric.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Figure {
    /// As OpenTelemetry has names: without its unit, and without `_total`.
    pub(super) name: String,
    pub(super) help: String,
    /// As UCUM has it.
    pub(super) unit: &'static str,
    pub(super) points: Points,
}

/// What it says.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Points {
    /// Counts that only grow.
    Sums(Vec<(Labels, Number)>),
    /// Values as of now.
    Values(Vec<(Labels, Number)>),
    /// How often something was how large.
    Distributions(Vec<(Labels, Distribution)>),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Number {
    Whole(i64),
    Broken(f64),
}

/// How often something was how large.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Distribution {
    pub(super) sum: f64,
    /// The upper bounds of all buckets but the last.
    pub(super) bounds: Vec<f64>,
    pub(super) buckets: Vec<u64>,
    /// What was in them so far: in the text, each bucket has what is in those before it as well.
    below: u64,
}

/// What is known of a metric whose lines are being read.
#[derive(Default)]
struct Family<'a> {
    name: &'a str,
    help: &'a str,
    kind: &'a str,
    unit: &'a str,
    numbers: Vec<(Labels, Number)>,
    distributions: Vec<(Labels, Distribution)>,
}

/// Reads an OpenMetrics text as [`Metrics::render`](crate::metrics::Metrics::render) writes it. What it would not write is left
/// out.
pub(super) fn read(text: &str) -> Vec<Figure> {
    let mut figures = Vec::new();
    let mut family = Family::default();
    for line in text.lines() {
        let words = line.strip_prefix("# ").and_then(|rest| rest.split_once(' '));
        let (word, rest) = words.unwrap_or_default();
        let (name, rest) = rest.split_once(' ').unwrap_or_default();
        if !name.is_empty() && name != family.name {
            figures.extend(std::mem::take(&mut family).figure());
            family.name = name;
        }
        match word {
            "HELP" => family.help = rest,
            "TYPE" => family.kind = rest,
            "UNIT" => family.unit = rest,
            _ if line.starts_with('#') => {}
            _ => {
                // What cannot be read is not ours.
                let _ = family.sample(line);
            }
        }
    }
    figures.extend(family.figure());
    figures
}

impl Family<'_> {
    fn sample(&mut self, line: &str) -> Option<()> {
        let (series, value) = line.rsplit_once(' ')?;
        let (name, labels) = match series.split_once('{') {
            Some((name, labels)) => (name, read_labels(labels.strip_suffix('}')?)?),
            None => (series, Labels::new()),
        };
        let part = name.strip_prefix(self.name)?;
        if self.kind == "histogram" {
            return self.part_of_distribution(part, labels, value);
        }
        let number = match value.parse() {
            Ok(whole) => Number::Whole(whole),
            Err(_) => Number::Broken(value.parse().ok()?),
        };
        self.numbers.push((labels, number));
        Some(())
    }

    fn part_of_distribution(&mut self, part: &str, mut labels: Labels, value: &str) -> Option<()> {
        let bound = labels.iter().position(|(name, _)| name == "le");
        let bound = bound.map(|at| labels.remove(at).1);
        if self.distributions.last().is_none_or(|(last, _)| *last != labels) {
            self.distributions.push((labels, Distribution::default()));
        }
        let (_, distribution) = self.distributions.last_mut()?;
        match (part, bound) {
            ("_sum", None) => distribution.sum = value.parse().ok()?,
            ("_bucket", Some(bound)) => {
                let below: u64 = value.parse().ok()?;
                if bound != "+Inf" {
                    distribution.bounds.push(bound.parse().ok()?);
                }
                distribution
                    .buckets
                    .push(below.saturating_sub(distribution.below));
                distribution.below = below;
            }
            // The count is that of all buckets.
            _ => {}
        }
        Some(())
    }

    fn figure(self) -> Option<Figure> {
        let name = self.name.strip_prefix(PREFIX)?.strip_prefix('_')?;
        let name = match name.strip_suffix(self.unit) {
            Some(before) if !self.unit.is_empty() => before.trim_end_matches('_'),
            _ => name,
        };
        let unit = match self.unit {
            "seconds" => "s",
            "bytes" => "By",
            _ => "",
        };
        Some(Figure {
            name: format!("{PREFIX}.{name}"),
            help: self.help.trim_end_matches('.').to_owned(),
            unit,
            points: match self.kind {
                "counter" => Points::Sums(self.numbers),
                "histogram" => Points::Distributions(self.distributions),
                _ => Points::Values(self.numbers),
            },
        })
    }
}

/// What stands between the braces.
fn read_labels(mut text: &str) -> Option<Labels> {
    let mut labels = Labels::new();
    while !text.is_empty() {
        let (name, rest) = text.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = rest.char_indices();
        let end = loop {
            match chars.next()? {
                (at, '"') => break at,
                (_, '\\') => value.push(match chars.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (_, other) => value.push(other),
            }
        };
        labels.push((name.to_owned(), value));
        text = rest[end + 1..].trim_start_matches(',');
    }
    Some(labels)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::metrics::{Count, Metrics};

    fn figure<'a>(figures: &'a [Figure], name: &str) -> &'a Figure {
        let found = figures.iter().find(|figure| figure.name == name);
        found.unwrap_or_else(|| panic!("no {name} in {figures:#?}"))
    }

    #[test]
    fn all_that_the_registry_has_is_read() {
        let metrics = Metrics::default();
        metrics.blobs("batch", "downloaded", 5);
        metrics.downloaded_bytes.inc_by(70);
        metrics.bytes_in_flight.set(-1);
        for ms in [1, 3, 3, 3_600_000] {
            metrics.held(Duration::from_millis(ms));
        }
        metrics.transfer("stream").observe(0.25);
        let name = "disk cache /a \"b\",\\c={}\nd e";
        metrics.store(name, 2, 30);
        metrics.also("bes", || {
            vec![Count {
                name: "streams",
                help: "Streams.",
                value: 3,
            }]
        });
        let text = metrics.render();
        let figures = read(&text);
        let types = text.lines().filter(|line| line.starts_with("# TYPE")).count();
        assert_eq!(figures.len(), types);

        let blobs = figure(&figures, "outhaul.blobs");
        assert_eq!((&*blobs.help, blobs.unit), ("Outputs by source and outcome", ""));
        let Points::Sums(points) = &blobs.points else {
            panic!("{blobs:?}")
        };
        let labels = [("source", "batch"), ("outcome", "downloaded")];
        let labels: Labels = labels
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into();
        assert!(points.contains(&(labels, Number::Whole(5))), "{points:?}");

        let bytes = figure(&figures, "outhaul.downloaded");
        assert_eq!(bytes.unit, "By");
        assert_eq!(bytes.points, Points::Sums(vec![(Vec::new(), Number::Whole(70))]));
        let flying = figure(&figures, "outhaul.in_flight");
        assert_eq!(
            flying.points,
            Points::Values(vec![(Vec::new(), Number::Whole(-1))])
        );
        let streams = figure(&figures, "outhaul.bes_streams");
        assert_eq!(streams.points, Points::Sums(vec![(Vec::new(), Number::Whole(3))]));
        let stores = figure(&figures, "outhaul.store_outputs");
        let labels = vec![("store".to_owned(), name.to_owned())];
        assert_eq!(stores.points, Points::Sums(vec![(labels, Number::Whole(2))]));

        let hold = figure(&figures, "outhaul.hold");
        assert_eq!(hold.unit, "s");
        let Points::Distributions(points) = &hold.points else {
            panic!("{hold:?}")
        };
        let (_, of_all) = &points[0];
        assert_eq!((of_all.bounds.len(), of_all.buckets.len()), (20, 21));
        assert_eq!(of_all.bounds[..3], [0.001, 0.002, 0.004]);
        assert_eq!(of_all.buckets[..4], [1, 0, 2, 0]);
        assert_eq!((of_all.buckets[20], of_all.sum), (1, 3_600.007));
        let transfers = figure(&figures, "outhaul.transfer");
        let Points::Distributions(points) = &transfers.points else {
            panic!("{transfers:?}")
        };
        let mut sums: Vec<f64> = points.iter().map(|(_, of_kind)| of_kind.sum).collect();
        sums.sort_by(f64::total_cmp);
        assert_eq!(sums, [0.0, 0.25]);
    }

    #[test]
    fn what_is_no_metric_is_left_out() {
        let text = "# TYPE other_x counter\nother_x_total 1\n# TYPE outhaul_y gauge\noops\nouthaul_y{a=\"b} 1\n\
                    outhaul_y{a=\"b\"} c\nouthaul_y 1.5\n# EOF\n";
        let figures = read(text);
        assert_eq!(figures.len(), 1);
        assert_eq!(
            figures[0].points,
            Points::Values(vec![(Vec::new(), Number::Broken(1.5))])
        );
    }
}
