//! Rows to bytes and back.
//!
//! A value is a schema version, a checksum and a message: `[version][4 bytes of BLAKE3 of the rest][message]`. (Outputs
//! are in blocks instead of messages; see `block`.) The checksum is there because the worst a damaged value could do is to name another digest and be believed. A value
//! that does not check out, or has a version of another program, is treated as if it were absent.

use prost::Message;

use super::row::{
    InvocationRow, InvocationState, OutputCounts, RootId, RootRow, TargetRow, TargetState, Transfers,
    with_fields_of,
};
use crate::proto::outhaul::v1::{
    RecordInvocation, RecordTarget, RecordTransfers, record_invocation, record_target,
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
    #[error("invalid field: {0}")]
    Field(&'static str),
}

fn checksum(message: &[u8]) -> [u8; CHECKSUM_LEN] {
    let hash = blake3::hash(message);
    let mut sum = [0; CHECKSUM_LEN];
    sum.copy_from_slice(&hash.as_bytes()[..CHECKSUM_LEN]);
    sum
}

/// What `fill` writes, as a value.
pub(super) fn seal_value(fill: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut value = vec![0; HEADER_LEN];
    value[0] = VALUE_VERSION;
    fill(&mut value);
    let sum = checksum(&value[HEADER_LEN..]);
    value[1..HEADER_LEN].copy_from_slice(&sum);
    value
}

/// What was written into a value.
pub(super) fn open_value(value: &[u8]) -> Result<&[u8], ValueError> {
    let Some((header, content)) = value.split_at_checked(HEADER_LEN) else {
        return Err(ValueError::Short);
    };
    if header[0] != VALUE_VERSION {
        return Err(ValueError::Version(header[0]));
    }
    if header[1..] != checksum(content) {
        return Err(ValueError::Checksum);
    }
    Ok(content)
}

/// A message as a value.
pub(super) fn seal(message: &impl Message) -> Vec<u8> {
    seal_value(|value| message.encode(value).expect("a Vec grows as needed"))
}

/// The message in a value.
pub(super) fn unseal<M: Message + Default>(value: &[u8]) -> Result<M, ValueError> {
    M::decode(open_value(value)?).map_err(|e| ValueError::Message(e.to_string()))
}

/// States have the same names in rows and messages. What a message says that is not known counts as the last one.
macro_rules! states {
    ($row:ident, $message:path: $($name:ident)*, else $unknown:ident) => {
        impl From<$row> for $message {
            fn from(state: $row) -> Self {
                match state {
                    $($row::$name => Self::$name,)*
                }
            }
        }

        impl From<$message> for $row {
            fn from(state: $message) -> Self {
                match state {
                    $(<$message>::$name => Self::$name,)*
                    <$message>::Unspecified => Self::$unknown,
                }
            }
        }
    };
}

// One that a later program added is surely not running here.
states!(InvocationState, record_invocation::State: Running Draining Settled Superseded Interrupted, else Interrupted);
states!(TargetState, record_target::State: Announced Completed Settled Failed Aborted, else Announced);

fn encode_transfers(transfers: Transfers) -> RecordTransfers {
    with_fields_of!(transfers, RecordTransfers {} downloaded downloaded_bytes without_download)
}

fn decode_transfers(transfers: RecordTransfers) -> Transfers {
    with_fields_of!(transfers, Transfers {} downloaded downloaded_bytes without_download)
}

// === RootRow ===

pub(super) fn encode_root(row: &RootRow) -> Vec<u8> {
    seal(row)
}

pub(super) fn decode_root(value: &[u8]) -> Result<RootRow, ValueError> {
    unseal(value)
}

// === InvocationRow ===

/// The fields that a row and its message have alike.
macro_rules! invocation {
    ($from:ident, $to:ident { $($own:tt)* }) => {
        with_fields_of!($from, $to { $($own)* }
            invocation_id build_id command workspace exec_root started_ms settled_ms exit_code finished hold_us errors
            build_tool_version remote_cache remote_instance_name version imported attempt)
    };
}

pub(super) fn encode_invocation(row: &InvocationRow) -> Vec<u8> {
    let state = record_invocation::State::from(row.state);
    let row = row.clone();
    let outputs = row.outputs;
    seal(&invocation!(
        row,
        RecordInvocation {
            root: row.root.map_or(0, RootId::number),
            state: state.into(),
            downloaded: outputs.downloaded,
            downloaded_bytes: outputs.downloaded_bytes,
            stores: outputs.stores.into_iter().collect(),
            store_bytes: outputs.store_bytes.into_iter().collect(),
            rules: outputs
                .rules
                .into_iter()
                .map(|(rule, transfers)| (rule, encode_transfers(transfers)))
                .collect(),
            present: outputs.present,
            failed: outputs.failed,
            known: outputs.known,
            superseded: outputs.superseded,
        }
    ))
}

pub(super) fn decode_invocation(value: &[u8]) -> Result<InvocationRow, ValueError> {
    let row: RecordInvocation = unseal(value)?;
    let state = row.state().into();
    Ok(invocation!(
        row,
        InvocationRow {
            root: (row.root != 0).then_some(RootId(row.root)),
            state,
            outputs: with_fields_of!(row, OutputCounts {
                stores: row.stores.into_iter().collect(),
                store_bytes: row.store_bytes.into_iter().collect(),
                rules: row
                    .rules
                    .into_iter()
                    .map(|(rule, transfers)| (rule, decode_transfers(transfers)))
                    .collect(),
            } downloaded downloaded_bytes present failed known superseded),
        }
    ))
}

// === TargetRow ===

/// Without its names: they are in the key.
pub(super) fn encode_target(row: &TargetRow) -> Vec<u8> {
    let state = record_target::State::from(row.state);
    let any = row.transfers != Transfers::default();
    seal(&with_fields_of!(row, RecordTarget {
        state: state.into(),
        transfers: any.then(|| encode_transfers(row.transfers)),
    } success required optional failed known))
}

/// Without its names.
pub(super) fn decode_target(value: &[u8]) -> Result<TargetRow, ValueError> {
    let row: RecordTarget = unseal(value)?;
    let state = row.state().into();
    Ok(with_fields_of!(
        row,
        TargetRow {
            state: state,
            transfers: row.transfers.map(decode_transfers).unwrap_or_default(),
        } success required optional failed known,
        ..TargetRow::default()
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::proto::outhaul::v1::RecordRoot;

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_without_a_panic(bytes in any::<Vec<u8>>()) {
            let sealed = seal_value(|value| value.extend_from_slice(&bytes));
            let _ = decode_root(&sealed);
            let _ = decode_invocation(&sealed);
            let _ = decode_target(&sealed);
        }

        #[test]
        fn roots_invocations_and_targets_read_back(texts in any::<[String; 8]>(), n in any::<[u64; 8]>(),
                                                   times in any::<(i64, i64, i32)>(), yes in any::<bool>(),
                                                   root in any::<u32>(), state in 0..5usize) {
            let [a, b, c, d, e, f, g, h] = texts;
            let a2 = a.clone();
            let transfers = |n: u64| Transfers { downloaded: n, downloaded_bytes: n / 2, without_download: n / 3 };
            let root_row = RootRow { path: a.clone(), device: n[0], inode: n[1], newest_invocation: b.clone(),
                version: n[2], workspace: c.clone() };
            prop_assert_eq!(decode_root(&encode_root(&root_row)), Ok(root_row));
            let target = TargetRow { label: String::new(), aspect: String::new(), configuration: String::new(),
                state: [TargetState::Announced, TargetState::Completed, TargetState::Settled, TargetState::Failed,
                    TargetState::Aborted][state], success: yes, required: n[0], optional: n[1], failed: n[2],
                known: n[3], transfers: transfers(n[4]) };
            prop_assert_eq!(decode_target(&encode_target(&target)), Ok(target));
            let invocation = InvocationRow { invocation_id: a, build_id: b, root: (root != 0).then_some(RootId(root)),
                command: c, workspace: d, exec_root: e,
                state: [InvocationState::Running, InvocationState::Draining, InvocationState::Settled,
                    InvocationState::Superseded, InvocationState::Interrupted][state],
                started_ms: times.0, settled_ms: times.1, exit_code: times.2, finished: yes,
                outputs: OutputCounts { downloaded: n[0], downloaded_bytes: n[1], present: n[2], failed: n[3], known: n[4],
                    superseded: n[5], stores: [(f.clone(), n[0]), (g.clone(), n[1])].into(), store_bytes: [(f.clone(), n[2])].into(),
                    rules: [(g.clone(), transfers(n[3])), (a2, Transfers::default())].into() },
                hold_us: n[6], errors: vec![f.clone(), g.clone()], build_tool_version: f, remote_cache: g,
                remote_instance_name: h, version: n[7], imported: n[7] % 2 == 1,
                attempt: root };
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
}
