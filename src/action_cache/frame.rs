//! What all of the files have in common: a header, and records of keys that are set or removed.

use super::cursor::{Cursor, Fault};

pub(super) const MAGIC: i64 = 0x2007_1105;
pub(super) const RECORD: u8 = 0xfe;

/// Bytes of the header: the magic number and the format's.
pub(super) const HEADER: usize = 16;

/// The format's number in a file's header. A shorter file is invalid; a journal may be, as long as nothing is in it.
pub(super) fn format(file: &[u8]) -> Result<i64, Fault> {
    let mut cursor = Cursor::new(file, 0);
    if cursor.int64()? != MAGIC {
        let what = "not an action cache (wrong magic number)";
        return Err(Fault { at: 0, what });
    }
    cursor.int64()
}

/// Goes through a file's records, from a place on or from the end of the header. `value` takes a key, and with `true` the
/// place of its value; with `false` the key is removed.
///
/// A record that the file's end cuts off is a fault in a journal, too: Bazel has written all of it when a build has
/// come to its end.
pub(super) fn records<'a, K>(
    file: &'a [u8],
    from: usize,
    key: impl Fn(&mut Cursor<'a>) -> Result<K, Fault>,
    mut value: impl FnMut(K, bool, &mut Cursor<'a>) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let from = from.max(HEADER);
    let Some(records) = file.get(from..) else {
        return Ok(());
    };
    let mut cursor = Cursor::new(records, from);
    while !cursor.is_at_end() {
        if cursor.byte()? != RECORD {
            return Err(cursor.fault("start of a record expected"));
        }
        let key = key(&mut cursor)?;
        let is_set = match cursor.byte()? {
            0 => false,
            1 => true,
            _ => return Err(cursor.fault("unknown kind of record")),
        };
        value(key, is_set, &mut cursor)?;
    }
    Ok(())
}
