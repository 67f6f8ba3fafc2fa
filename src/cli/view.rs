//! How answers are shown: stable JSON for programs, short text for people.

use std::io::{self, Write};

use serde_json::{Value, json};

use crate::{
    materialize::split_source,
    printable::printable,
    proto::outhaul::v1 as pb,
    units::{show_count, show_size},
};

/// One output as JSON.
pub(super) fn output_json(output: &pb::Output) -> Value {
    let (source, store) = split_source(&output.source);
    json!({
        "path": output.absolute_path(),
        "exec_path": output.exec_path,
        "exec_root": output.exec_root,
        "digest": output.digest.as_ref().map(digest),
        "size": output.digest.as_ref().map(|d| d.size),
        "symlink_target": non_empty(&output.symlink_target),
        "directory": output.directory,
        "state": output.state().name(),
        "class": output.class().name(),
        "rule": output.rule,
        "label": output.label,
        "aspect": non_empty(&output.aspect),
        "output_group": non_empty(&output.output_group),
        "invocation_id": output.invocation_id,
        "event": output.event,
        "source": non_empty(source),
        "store": store,
        "materialized_at_ms": (output.materialized_at_ms > 0).then_some(output.materialized_at_ms),
        "took_us": (output.took_us > 0).then_some(output.took_us),
        "error": non_empty(&output.error),
    })
}

/// One invocation as JSON.
pub(super) fn invocation_json(invocation: &pb::Invocation) -> Value {
    json!({
        "invocation_id": invocation.invocation_id,
        "build_id": invocation.build_id,
        "command": invocation.command,
        "workspace": invocation.workspace,
        "exec_root": invocation.exec_root,
        "state": invocation.state().name(),
        "started_ms": invocation.started_ms,
        "settled_ms": (invocation.settled_ms > 0).then_some(invocation.settled_ms),
        "exit_code": invocation.exit_code,
        "downloaded": invocation.downloaded,
        "downloaded_bytes": invocation.downloaded_bytes,
        "stores": invocation.stores,
        "present": invocation.present,
        "failed": invocation.failed,
        "known": invocation.known,
        "superseded": invocation.superseded,
        "pending": invocation.pending,
        "hold_us": invocation.hold_us,
        "errors": invocation.errors,
        "evicted": invocation.evicted,
        "evicted_target_count": invocation.evicted_target_count,
        "evicted_targets": invocation.evicted_targets,
        "build_tool_version": invocation.build_tool_version,
        "remote_cache": invocation.remote_cache,
        "remote_instance_name": invocation.remote_instance_name,
    })
}

/// One target as JSON.
pub(super) fn target_json(target: &pb::Target) -> Value {
    json!({
        "label": target.label,
        "aspect": non_empty(&target.aspect),
        "configuration": target.configuration,
        "state": target.state().name(),
        "success": target.success,
        "required": target.required,
        "optional": target.optional,
        "failed": target.failed,
        "known": target.known,
    })
}

pub(super) fn non_empty(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

/// `FUNCTION:HASH`.
pub(super) fn digest(digest: &pb::Digest) -> String {
    format!("{}:{}", digest.function, digest.hash)
}

/// What an output is, in a word or two.
pub(super) fn content(output: &pb::Output) -> String {
    match &output.digest {
        Some(digest) => show_size(digest.size),
        None if output.directory => "directory".to_owned(),
        None => format!("-> {}", output.symlink_target),
    }
}

/// One invocation in some lines.
pub(super) fn invocation(out: &mut dyn Write, invocation: &pb::Invocation) -> io::Result<()> {
    let code = invocation
        .exit_code
        .map_or_else(String::new, |code| format!(", exit code {code}"));
    writeln!(
        out,
        "{}  {}  {}{code}  {}",
        printable(&invocation.invocation_id),
        printable(&invocation.command),
        invocation.state().name(),
        printable(&invocation.workspace)
    )?;
    writeln!(out, "  {}", printable(&invocation.summary))?;
    if invocation.pending > 0 {
        writeln!(
            out,
            "  {} required outputs are still downloading",
            show_count(invocation.pending)
        )?;
    }
    if invocation.evicted > 0 {
        let more = usize::try_from(invocation.evicted_target_count)
            .unwrap_or(usize::MAX)
            .saturating_sub(invocation.evicted_targets.len());
        let more = match more {
            0 => String::new(),
            more => format!(" and {} more", show_count(more as u64)),
        };
        writeln!(
            out,
            "  {} outputs of its output root are no longer in the cache; to get them, build again: {}{more}",
            show_count(invocation.evicted),
            printable(&invocation.evicted_targets.join(" "))
        )?;
    }
    for error in &invocation.errors {
        writeln!(out, "  ! {}", printable(error))?;
    }
    Ok(())
}

/// A target of an invocation, for people.
pub(super) fn target(out: &mut dyn Write, target: &pb::Target) -> io::Result<()> {
    let aspect = match &*target.aspect {
        "" => String::new(),
        aspect => format!(" ({aspect})"),
    };
    writeln!(
        out,
        "  {:9} {}: {} required, {} optional, {} known, {} failed",
        target.state().name(),
        printable(&format!("{}{aspect}", target.label)),
        target.required,
        target.optional,
        target.known,
        target.failed
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_others_choice_write_nothing_but_themselves_to_a_terminal() {
        let name = "a\nb\u{1b}[2J\u{9b}".to_owned();
        let shown_name = r"a\nb\u{1b}[2J\u{9b}";
        let one = pb::Target {
            label: name.clone(),
            aspect: name.clone(),
            ..pb::Target::default()
        };
        let all = pb::Invocation {
            invocation_id: name.clone(),
            command: name.clone(),
            workspace: name.clone(),
            errors: vec![name.clone()],
            evicted: 1,
            evicted_targets: vec![name],
            ..pb::Invocation::default()
        };
        let mut out = Vec::new();
        target(&mut out, &one).unwrap();
        invocation(&mut out, &all).unwrap();
        let shown = String::from_utf8(out).unwrap();
        assert_eq!(shown.matches(shown_name).count(), 7, "{shown}");
        assert!(!shown.replace('\n', "").contains(char::is_control), "{shown:?}");
        assert_eq!(shown.lines().count(), 5, "{shown}");
    }
}
