//! Why an output is, or is not, on disk: in words.

use std::time::Duration;

use super::Service;
use crate::{proto::outhaul::v1 as pb, units::show_duration};

impl Service {
    /// Explains outputs; what is not found has no lines.
    pub async fn why(&self, paths: Vec<String>) -> Vec<pb::why_response::Answer> {
        // Without an invocation there is nothing that could be missing.
        let outputs = self.stat(paths, "").await.unwrap_or_default();
        outputs
            .into_iter()
            .map(|output| pb::why_response::Answer {
                lines: lines(&output),
                output: Some(output),
            })
            .collect()
    }
}

fn lines(output: &pb::Output) -> Vec<String> {
    if output.exec_path.is_empty() {
        return Vec::new();
    }
    let took = show_duration(Duration::from_micros(output.took_us));
    let on_disk = match (output.state(), &*output.source) {
        (pb::OutputState::Materialized, "") => "yes, written by something other than outhaul".to_owned(),
        (pb::OutputState::Materialized, "present") => {
            format!("yes, it was there already (checked in {took})")
        }
        (pb::OutputState::Materialized, source) => format!("yes, downloaded ({source}) in {took}"),
        (pb::OutputState::Known, _) if output.class() == pb::OutputClass::Known => {
            "no, skipped; `outhaul get` downloads it".to_owned()
        }
        (state, _) => format!("no, {}; `outhaul get` tries again", state.name()),
    };
    let mut lines = vec![
        format!("{}: {}", output.class().name(), output.rule),
        format!("named by: {}, for {}", output.event, namer(output)),
        format!("on disk: {on_disk}"),
    ];
    if !output.error.is_empty() {
        lines.push(format!("last error: {}", output.error));
    }
    lines
}

/// Who named the output last.
pub(crate) fn namer(output: &pb::Output) -> String {
    let mut text = match &*output.label {
        "" => "no target".to_owned(),
        label => label.to_owned(),
    };
    if !output.aspect.is_empty() {
        text.push_str(&format!(", aspect {}", output.aspect));
    }
    if !output.output_group.is_empty() {
        text.push_str(&format!(", output group {}", output.output_group));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(state: pb::OutputState, class: pb::OutputClass, source: &str) -> pb::Output {
        pb::Output {
            exec_path: "bazel-out/x".to_owned(),
            state: state.into(),
            class: class.into(),
            source: source.to_owned(),
            label: "//a:b".to_owned(),
            aspect: "lint".to_owned(),
            output_group: "reports".to_owned(),
            event: "named_set 3".to_owned(),
            ..pb::Output::default()
        }
    }

    #[test]
    fn every_end_is_told_in_words() {
        for (state, class, source, part) in [
            (
                pb::OutputState::Materialized,
                pb::OutputClass::Required,
                "batch",
                "yes, downloaded (batch)",
            ),
            (
                pb::OutputState::Materialized,
                pb::OutputClass::Required,
                "present",
                "yes, it was there already",
            ),
            (
                pb::OutputState::Materialized,
                pb::OutputClass::Known,
                "",
                "something other than outhaul",
            ),
            (pb::OutputState::Known, pb::OutputClass::Known, "", "no, skipped"),
            (
                pb::OutputState::Evicted,
                pb::OutputClass::Required,
                "",
                "no, evicted",
            ),
        ] {
            let lines = lines(&output(state, class, source));
            assert!(lines[2].contains(part), "{lines:?}");
            assert_eq!(
                lines[1],
                "named by: named_set 3, for //a:b, aspect lint, output group reports"
            );
        }
        let mut failed = output(pb::OutputState::Failed, pb::OutputClass::Required, "");
        failed.error = "no space".to_owned();
        assert_eq!(lines(&failed)[3], "last error: no space");
        assert!(
            lines(&pb::Output::default()).is_empty(),
            "nothing is said of what is not known"
        );
    }
}
