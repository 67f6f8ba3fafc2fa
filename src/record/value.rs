//! Rows to bytes and back.
//!
//! A value is a schema version, a checksum and a message: `[version][4 bytes of BLAKE3 of the rest][message]`. The
//! checksum is there because the worst a damaged value could do is to name another digest and be believed. A value
//! that does not check out, or has a version of another program, is treated as if it were absent.

use std::{collections::HashSet, sync::Arc};

use prost::Message;

use super::row::{
    InvocationRow, InvocationState, OutputRow, OutputState, RootId, RootRow, TargetRow, TargetState,
};
use crate::{
    digest::{Digest, DigestFunction},
    output::{Class, OutputContent, Stamp},
    proto::outhaul::v1::{
        RecordDigest, RecordInvocation, RecordOutput, RecordRoot, RecordStamp, RecordTarget,
        record_invocation, record_output, record_target,
    },
};

/// Version of the values. Fields may be added to the messages without a new one; it changes when an old value would
/// be misread.
pub(super) const VALUE_VERSION: u8 = 1;

const CHECKSUM_LEN: usize = 4;
const HEADER_LEN: usize = 1 + CHECKSUM_LEN;

/// Why a value cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum ValueError {
    #[error("shorter than its header")]
    Short,
    #[error("version {0} instead of {VALUE_VERSION}")]
    Version(u8),
    #[error("wrong checksum")]
    Checksum,
    #[error("not the expected message: {0}")]
    Message(String),
    #[error("a field cannot hold that: {0}")]
    Field(&'static str),
}

/// Keeps one copy of each text that rows share.
#[derive(Default)]
pub(super) struct Interner {
    /// Each field's last text: neighbours are mostly of one target.
    last: [Arc<str>; TEXT_FIELDS],
    texts: HashSet<Arc<str>>,
}

/// Fields of a row whose texts are shared.
const TEXT_FIELDS: usize = 7;

impl Interner {
    fn take(&mut self, field: usize, text: &str) -> Arc<str> {
        if *self.last[field] != *text {
            self.last[field] = if let Some(known) = self.texts.get(text) {
                known.clone()
            } else {
                let text: Arc<str> = text.into();
                self.texts.insert(text.clone());
                text
            };
        }
        self.last[field].clone()
    }
}

fn checksum(message: &[u8]) -> [u8; CHECKSUM_LEN] {
    let hash = blake3::hash(message);
    let mut sum = [0; CHECKSUM_LEN];
    sum.copy_from_slice(&hash.as_bytes()[..CHECKSUM_LEN]);
    sum
}

/// A message as a value.
pub(super) fn seal(message: &impl Message) -> Vec<u8> {
    let mut value = Vec::with_capacity(HEADER_LEN + message.encoded_len());
    value.push(VALUE_VERSION);
    value.extend_from_slice(&[0; CHECKSUM_LEN]);
    message.encode(&mut value).expect("a Vec grows as needed");
    let sum = checksum(&value[HEADER_LEN..]);
    value[1..HEADER_LEN].copy_from_slice(&sum);
    value
}

/// The message in a value.
pub(super) fn unseal<M: Message + Default>(value: &[u8]) -> Result<M, ValueError> {
    let Some((header, message)) = value.split_at_checked(HEADER_LEN) else {
        return Err(ValueError::Short);
    };
    if header[0] != VALUE_VERSION {
        return Err(ValueError::Version(header[0]));
    }
    if header[1..] != checksum(message) {
        return Err(ValueError::Checksum);
    }
    M::decode(message).map_err(|e| ValueError::Message(e.to_string()))
}

// === OutputRow ===

pub(super) fn encode_output(row: &OutputRow) -> Vec<u8> {
    use record_output::Content;
    let content = match &row.content {
        OutputContent::Blob(digest) => Content::Blob(RecordDigest {
            function: digest.function().wire().unsigned_abs(),
            hash: digest.hash().to_vec().into(),
            size: digest.size(),
        }),
        OutputContent::Inline(bytes) => Content::Inline(bytes.clone()),
        OutputContent::Symlink(target) => Content::SymlinkTarget(target.clone()),
        OutputContent::Directory => Content::EmptyDirectory(true),
    };
    let state = match row.state {
        OutputState::Known => record_output::State::Known,
        OutputState::Materialized => record_output::State::Materialized,
        OutputState::Evicted => record_output::State::Evicted,
        OutputState::Failed => record_output::State::Failed,
    };
    let class = match row.class {
        Class::Known => record_output::Class::Known,
        Class::Optional => record_output::Class::Optional,
        Class::Required => record_output::Class::Required,
    };
    seal(&RecordOutput {
        content: Some(content),
        state: state.into(),
        class: class.into(),
        rule: row.rule.to_string(),
        label: row.label.to_string(),
        aspect: row.aspect.to_string(),
        output_group: row.output_group.to_string(),
        invocation_id: row.invocation_id.to_string(),
        event: row.event.to_string(),
        stamp: row.stamp.map(|stamp| RecordStamp {
            size: stamp.size,
            mtime_ns: stamp.mtime_ns,
            ctime_ns: stamp.ctime_ns,
            inode: stamp.inode,
            device: stamp.device,
            taken_ns: stamp.taken_ns,
        }),
        source: row.source.to_string(),
        materialized_at_ms: row.materialized_at_ms,
        took_us: row.took_us,
        error: row.error.clone(),
        version: row.version,
    })
}

pub(super) fn decode_output(value: &[u8], texts: &mut Interner) -> Result<OutputRow, ValueError> {
    use record_output::Content;
    let row: RecordOutput = unseal(value)?;
    let (state, class) = (row.state(), row.class());
    let content = match row.content.ok_or(ValueError::Field("content"))? {
        Content::Blob(digest) => {
            let function = i32::try_from(digest.function)
                .ok()
                .and_then(DigestFunction::from_wire)
                .ok_or(ValueError::Field("digest function"))?;
            OutputContent::Blob(
                Digest::new(function, &digest.hash, digest.size).map_err(|_| ValueError::Field("hash"))?,
            )
        }
        Content::Inline(bytes) => OutputContent::Inline(bytes),
        Content::SymlinkTarget(target) => OutputContent::Symlink(target),
        Content::EmptyDirectory(_) => OutputContent::Directory,
    };
    Ok(OutputRow {
        content,
        state: match state {
            record_output::State::Materialized => OutputState::Materialized,
            record_output::State::Evicted => OutputState::Evicted,
            record_output::State::Failed => OutputState::Failed,
            // A state that a later program added: only the metadata is sure.
            record_output::State::Known | record_output::State::Unspecified => OutputState::Known,
        },
        class: match class {
            record_output::Class::Required => Class::Required,
            record_output::Class::Optional => Class::Optional,
            record_output::Class::Known | record_output::Class::Unspecified => Class::Known,
        },
        rule: texts.take(0, &row.rule),
        label: texts.take(1, &row.label),
        aspect: texts.take(2, &row.aspect),
        output_group: texts.take(3, &row.output_group),
        invocation_id: texts.take(4, &row.invocation_id),
        event: texts.take(5, &row.event),
        stamp: row.stamp.map(|stamp| Stamp {
            size: stamp.size,
            mtime_ns: stamp.mtime_ns,
            ctime_ns: stamp.ctime_ns,
            inode: stamp.inode,
            device: stamp.device,
            taken_ns: stamp.taken_ns,
        }),
        source: texts.take(6, &row.source),
        materialized_at_ms: row.materialized_at_ms,
        took_us: row.took_us,
        error: row.error,
        version: row.version,
    })
}

// === RootRow ===

pub(super) fn encode_root(row: &RootRow) -> Vec<u8> {
    seal(&RecordRoot {
        path: row.path.clone(),
        device: row.device,
        inode: row.inode,
        newest_invocation: row.newest_invocation.clone(),
        version: row.version,
        workspace: row.workspace.clone(),
    })
}

pub(super) fn decode_root(value: &[u8]) -> Result<RootRow, ValueError> {
    let row: RecordRoot = unseal(value)?;
    Ok(RootRow {
        path: row.path,
        device: row.device,
        inode: row.inode,
        newest_invocation: row.newest_invocation,
        version: row.version,
        workspace: row.workspace,
    })
}

// === InvocationRow ===

pub(super) fn encode_invocation(row: &InvocationRow) -> Vec<u8> {
    use record_invocation::State;
    let state = match row.state {
        InvocationState::Running => State::Running,
        InvocationState::Draining => State::Draining,
        InvocationState::Settled => State::Settled,
        InvocationState::Superseded => State::Superseded,
        InvocationState::Interrupted => State::Interrupted,
    };
    seal(&RecordInvocation {
        invocation_id: row.invocation_id.clone(),
        build_id: row.build_id.clone(),
        root: row.root.map_or(0, RootId::number),
        command: row.command.clone(),
        workspace: row.workspace.clone(),
        exec_root: row.exec_root.clone(),
        state: state.into(),
        started_ms: row.started_ms,
        settled_ms: row.settled_ms,
        exit_code: row.exit_code,
        finished: row.finished,
        downloaded: row.downloaded,
        downloaded_bytes: row.downloaded_bytes,
        present: row.present,
        failed: row.failed,
        known: row.known,
        superseded: row.superseded,
        hold_us: row.hold_us,
        errors: row.errors.clone(),
        build_tool_version: row.build_tool_version.clone(),
        remote_cache: row.remote_cache.clone(),
        remote_instance_name: row.remote_instance_name.clone(),
        version: row.version,
        imported: row.imported,
    })
}

pub(super) fn decode_invocation(value: &[u8]) -> Result<InvocationRow, ValueError> {
    use record_invocation::State;
    let row: RecordInvocation = unseal(value)?;
    let state = match row.state() {
        State::Running => InvocationState::Running,
        State::Draining => InvocationState::Draining,
        State::Settled => InvocationState::Settled,
        State::Superseded => InvocationState::Superseded,
        // Also a state that a later program added: it is surely not running here.
        State::Interrupted | State::Unspecified => InvocationState::Interrupted,
    };
    Ok(InvocationRow {
        invocation_id: row.invocation_id,
        build_id: row.build_id,
        root: (row.root != 0).then_some(RootId(row.root)),
        command: row.command,
        workspace: row.workspace,
        exec_root: row.exec_root,
        state,
        started_ms: row.started_ms,
        settled_ms: row.settled_ms,
        exit_code: row.exit_code,
        finished: row.finished,
        downloaded: row.downloaded,
        downloaded_bytes: row.downloaded_bytes,
        present: row.present,
        failed: row.failed,
        known: row.known,
        superseded: row.superseded,
        hold_us: row.hold_us,
        errors: row.errors,
        build_tool_version: row.build_tool_version,
        remote_cache: row.remote_cache,
        remote_instance_name: row.remote_instance_name,
        version: row.version,
        imported: row.imported,
    })
}

// === TargetRow ===

pub(super) fn encode_target(row: &TargetRow) -> Vec<u8> {
    use record_target::State;
    let state = match row.state {
        TargetState::Announced => State::Announced,
        TargetState::Completed => State::Completed,
        TargetState::Settled => State::Settled,
        TargetState::Failed => State::Failed,
        TargetState::Aborted => State::Aborted,
    };
    seal(&RecordTarget {
        label: row.label.clone(),
        aspect: row.aspect.clone(),
        configuration: row.configuration.clone(),
        state: state.into(),
        success: row.success,
        required: row.required,
        optional: row.optional,
        failed: row.failed,
        known: row.known,
    })
}

pub(super) fn decode_target(value: &[u8]) -> Result<TargetRow, ValueError> {
    use record_target::State;
    let row: RecordTarget = unseal(value)?;
    let state = match row.state() {
        State::Announced | State::Unspecified => TargetState::Announced,
        State::Completed => TargetState::Completed,
        State::Settled => TargetState::Settled,
        State::Failed => TargetState::Failed,
        State::Aborted => TargetState::Aborted,
    };
    Ok(TargetRow {
        label: row.label,
        aspect: row.aspect,
        configuration: row.configuration,
        state,
        success: row.success,
        required: row.required,
        optional: row.optional,
        failed: row.failed,
        known: row.known,
    })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    fn content() -> impl Strategy<Value = OutputContent> {
        let digest = (0..6usize, any::<Vec<u8>>(), any::<u64>()).prop_map(|(function, seed, size)| {
            let function = DigestFunction::ALL[function];
            let hash = Digest::of(function, &seed);
            OutputContent::Blob(Digest::new(function, hash.hash(), size).unwrap())
        });
        prop_oneof![
            digest,
            any::<Vec<u8>>().prop_map(|b| OutputContent::Inline(Bytes::from(b))),
            any::<String>().prop_map(OutputContent::Symlink),
            Just(OutputContent::Directory),
        ]
    }

    fn stamp() -> impl Strategy<Value = Stamp> {
        any::<(u64, i64, i64, u64, u64, i64)>().prop_map(
            |(size, mtime_ns, ctime_ns, inode, device, taken_ns)| Stamp {
                size,
                mtime_ns,
                ctime_ns,
                inode,
                device,
                taken_ns,
            },
        )
    }

    fn output() -> impl Strategy<Value = OutputRow> {
        let state = prop_oneof![
            Just(OutputState::Known),
            Just(OutputState::Materialized),
            Just(OutputState::Evicted),
            Just(OutputState::Failed),
        ];
        let class = prop_oneof![Just(Class::Known), Just(Class::Optional), Just(Class::Required)];
        let texts = any::<(String, String, String, String, String, String, String, String)>();
        (
            content(),
            state,
            class,
            texts,
            proptest::option::of(stamp()),
            any::<(i64, u64, u64)>(),
        )
            .prop_map(|(content, state, class, texts, stamp, numbers)| OutputRow {
                content,
                state,
                class,
                rule: texts.0.into(),
                label: texts.1.into(),
                aspect: texts.2.into(),
                output_group: texts.3.into(),
                invocation_id: texts.4.into(),
                event: texts.5.into(),
                stamp,
                source: texts.6.into(),
                materialized_at_ms: numbers.0,
                took_us: numbers.1,
                error: texts.7,
                version: numbers.2,
            })
    }

    proptest! {
        #[test]
        fn an_output_reads_back_as_it_was(row in output()) {
            prop_assert_eq!(decode_output(&encode_output(&row), &mut Interner::default()), Ok(row));
        }

        #[test]
        fn a_flipped_bit_anywhere_is_noticed(row in output(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let mut value = encode_output(&row);
            let at = at.index(value.len());
            value[at] ^= 1 << bit;
            prop_assert!(decode_output(&value, &mut Interner::default()).is_err());
        }

        #[test]
        fn any_bytes_decode_or_fail_without_a_panic(bytes in any::<Vec<u8>>()) {
            let _ = decode_output(&bytes, &mut Interner::default());
            let mut sealed = vec![VALUE_VERSION];
            sealed.extend_from_slice(&checksum(&bytes));
            sealed.extend_from_slice(&bytes);
            let _ = decode_output(&sealed, &mut Interner::default());
            let _ = decode_root(&sealed);
            let _ = decode_invocation(&sealed);
            let _ = decode_target(&sealed);
        }

        #[test]
        fn roots_invocations_and_targets_read_back(texts in any::<[String; 8]>(), n in any::<[u64; 8]>(),
                                                   times in any::<(i64, i64, i32)>(), yes in any::<bool>(),
                                                   root in any::<u32>(), state in 0..5usize) {
            let [a, b, c, d, e, f, g, h] = texts;
            let root_row = RootRow { path: a.clone(), device: n[0], inode: n[1], newest_invocation: b.clone(),
                version: n[2], workspace: c.clone() };
            prop_assert_eq!(decode_root(&encode_root(&root_row)), Ok(root_row));
            let target = TargetRow { label: a.clone(), aspect: b.clone(), configuration: c.clone(),
                state: [TargetState::Announced, TargetState::Completed, TargetState::Settled, TargetState::Failed,
                    TargetState::Aborted][state], success: yes, required: n[0], optional: n[1], failed: n[2],
                known: n[3] };
            prop_assert_eq!(decode_target(&encode_target(&target)), Ok(target));
            let invocation = InvocationRow { invocation_id: a, build_id: b, root: (root != 0).then_some(RootId(root)),
                command: c, workspace: d, exec_root: e,
                state: [InvocationState::Running, InvocationState::Draining, InvocationState::Settled,
                    InvocationState::Superseded, InvocationState::Interrupted][state],
                started_ms: times.0, settled_ms: times.1, exit_code: times.2, finished: yes, downloaded: n[0],
                downloaded_bytes: n[1], present: n[2], failed: n[3], known: n[4], superseded: n[5], hold_us: n[6],
                errors: vec![f.clone(), g.clone()], build_tool_version: f, remote_cache: g,
                remote_instance_name: h, version: n[7], imported: n[7] % 2 == 1 };
            prop_assert_eq!(decode_invocation(&encode_invocation(&invocation)), Ok(invocation));
        }
    }

    #[test]
    fn a_value_of_another_version_is_refused() {
        let mut value = encode_root(&RootRow::default());
        value[0] = VALUE_VERSION + 1;
        assert_eq!(decode_root(&value), Err(ValueError::Version(VALUE_VERSION + 1)));
        assert_eq!(decode_root(&[]), Err(ValueError::Short));
    }

    #[test]
    fn fields_that_a_later_program_adds_are_skipped() {
        let mut message = RecordRoot {
            path: "/x".into(),
            ..Default::default()
        }
        .encode_to_vec();
        // Field 900, a varint.
        message.extend_from_slice(&[0xa0, 0x38, 0x05]);
        let mut value = vec![VALUE_VERSION];
        value.extend_from_slice(&checksum(&message));
        value.extend_from_slice(&message);
        assert_eq!(decode_root(&value).unwrap().path, "/x");
    }

    #[test]
    fn rows_of_one_target_share_their_texts() {
        let mut row = OutputRow::known(OutputContent::Directory);
        row.label = "//a:b".into();
        let mut texts = Interner::default();
        let value = encode_output(&row);
        let first = decode_output(&value, &mut texts).unwrap();
        let second = decode_output(&value, &mut texts).unwrap();
        assert!(Arc::ptr_eq(&first.label, &second.label));
    }
}
