//! What the fuzz targets run of this room: see [`crate::fuzzing`].

use bytes::Bytes;

use super::{
    block::{Texts, merge, seal, unseal},
    keys,
    row::TargetRow,
    value,
};
use crate::output::OutputContent;

/// A value: any bytes, and any bytes with a right checksum; what is read of one reads back.
pub(crate) fn value(data: &[u8]) {
    let _ = (
        value::decode_root(data),
        value::decode_invocation(data),
        value::decode_target(data),
    );
    let sealed = value::seal_value(|value| value.extend_from_slice(data));
    if let Ok(row) = value::decode_root(&sealed) {
        assert_eq!(value::decode_root(&value::encode_root(&row)), Ok(row));
    }
    if let Ok(row) = value::decode_invocation(&sealed) {
        assert_eq!(value::decode_invocation(&value::encode_invocation(&row)), Ok(row));
    }
    if let Ok(row) = value::decode_target(&sealed) {
        assert_eq!(value::decode_target(&value::encode_target(&row)), Ok(row));
    }
    let _ = keys::place(data);
    let _ = keys::invocation_of_by_start(data);
    let mut row = TargetRow::default();
    let _ = keys::name_target(data, "an invocation", &mut row);
}

/// A block of outputs: rows that make sense are paths below a root, and none is lost when it is rewritten.
pub(crate) fn block(data: &[u8]) {
    let _ = unseal(Bytes::copy_from_slice(data), &mut Texts::default());
    let sealed = value::seal_value(|value| value.extend_from_slice(data));
    let Ok(block) = unseal(sealed.into(), &mut Texts::default()) else {
        return;
    };
    let mut rows = Vec::new();
    for row in block.rows_from(0) {
        let _ = (
            row.stamp(),
            row.content_is(&OutputContent::Directory),
            row.is_removal(),
        );
        let _ = (
            row.state(),
            row.class(),
            row.rule(),
            row.output_group(),
            row.size(),
        );
        rows.push((row.path(), row.to_row()));
    }
    let _ = block.find("a/", "b", 3);
    let _ = merge(&block, &block);
    let again = unseal(seal(&block).into(), &mut Texts::default());
    let again = again.map(|block| {
        block
            .rows_from(0)
            .map(|r| (r.path(), r.to_row()))
            .collect::<Vec<_>>()
    });
    assert_eq!(again, Ok(rows));
}
