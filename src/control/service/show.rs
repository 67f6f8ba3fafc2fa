//! What the record and the engine say, as the protocol has it.

use super::find::Found;
use crate::{
    digest::{Digest, DigestFunction},
    invocation::feed::{OutputEnded, Waiting},
    materialize::Counts,
    output::OutputContent,
    proto::outhaul::v1 as pb,
    record::{OutputState, TargetRow, TargetState, with_fields_of},
    remote::Standing,
};

/// A target.
pub(in crate::control) fn target(row: &TargetRow) -> pb::Target {
    let row = row.clone();
    with_fields_of!(row, pb::Target { state: pb::TargetState::from(row.state).into() }
        label aspect configuration success required optional failed known)
}

/// A target, as those who watch are told of it.
pub(super) fn target_event(row: &TargetRow) -> pb::watch_invocation_response::Event {
    use pb::watch_invocation_response::Event;
    match row.state {
        TargetState::Announced | TargetState::Completed => Event::TargetKnown(target(row)),
        TargetState::Settled | TargetState::Failed | TargetState::Aborted => {
            Event::TargetSettled(target(row))
        }
    }
}

/// How a wanted output ended.
pub(super) fn output_end(ended: &OutputEnded) -> pb::OutputEnd {
    let outcome = &ended.outcome;
    pb::OutputEnd {
        exec_path: ended.path.to_string(),
        label: ended.target.label.clone(),
        class: pb::OutputClass::from(ended.class).into(),
        outcome: pb::OutputOutcome::from(outcome).into(),
        source: outcome.source().into_owned(),
        bytes: outcome.bytes(),
        error: outcome.reason().to_owned(),
        output_group: ended.output_group.to_string(),
        digest: digest_of(&ended.content),
        exec_root: ended.exec_root.display().to_string(),
    }
}

/// What a running build waits for.
pub(in crate::control) fn waiting(waiting: Waiting) -> pb::Waiting {
    let outputs = waiting.outputs.into_iter().map(|output| pb::PendingOutput {
        exec_path: output.path.to_string(),
        label: output.target.label.clone(),
        class: pb::OutputClass::from(output.class).into(),
        bytes: output.bytes,
    });
    let (hold_until_ms, hold_limit) = waiting
        .hold
        .map_or_else(Default::default, |hold| (hold.until_ms, hold.limit));
    pb::Waiting {
        hold_until_ms,
        hold_limit,
        required: waiting.required,
        optional: waiting.optional,
        bytes: waiting.bytes,
        outputs: outputs.collect(),
    }
}

/// How far a call is.
pub(in crate::control) fn progress(counts: Counts) -> pb::GetProgressResponse {
    with_fields_of!(counts, pb::GetProgressResponse {} outputs all_outputs bytes all_bytes)
}

/// Whether a cache is asked at present.
pub(in crate::control) fn cache(standing: Standing) -> pb::list_caches_response::Cache {
    let (left, reason) = standing.passed_over.unzip();
    pb::list_caches_response::Cache {
        name: standing.name,
        passed_over_ms: left.map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX)),
        reason: reason.unwrap_or_default(),
    }
}

fn digest_of(content: &OutputContent) -> Option<pb::Digest> {
    match content {
        OutputContent::Blob(digest) => Some(shown(digest)),
        OutputContent::Inline(bytes) => Some(shown(&Digest::of(DigestFunction::Sha256, bytes))),
        OutputContent::Symlink(_) | OutputContent::Directory => None,
    }
}

pub(in crate::control) fn shown(digest: &Digest) -> pb::Digest {
    pb::Digest {
        function: digest.function().name().to_owned(),
        hash: digest.hash_hex(),
        size: digest.size(),
    }
}

/// An output, given whether it is on disk as it should be.
pub(super) fn output(found: &Found, present: bool) -> pb::Output {
    let row = &found.row;
    let mut output = pb::Output {
        exec_root: found.exec_root.display().to_string(),
        exec_path: found.path.to_string(),
        state: match row.state {
            _ if present => pb::OutputState::Materialized,
            // It was there once; somebody has deleted or changed it since.
            OutputState::Materialized => pb::OutputState::Known,
            state => state.into(),
        }
        .into(),
        class: pb::OutputClass::from(row.class).into(),
        rule: row.rule.to_string(),
        label: row.label.to_string(),
        aspect: row.aspect.to_string(),
        output_group: row.output_group.to_string(),
        invocation_id: row.invocation_id.to_string(),
        event: row.event.to_string(),
        source: row.source.to_string(),
        materialized_at_ms: row.materialized_at_ms,
        took_us: row.took_us,
        error: row.error.clone(),
        ..Default::default()
    };
    output.digest = digest_of(&row.content);
    match &row.content {
        OutputContent::Symlink(target) => output.symlink_target.clone_from(target),
        OutputContent::Directory => output.directory = true,
        OutputContent::Blob(_) | OutputContent::Inline(_) => {}
    }
    output
}
