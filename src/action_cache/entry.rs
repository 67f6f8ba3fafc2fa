//! What one action's record says of its outputs.

use super::cursor::{Cursor, Fault};

/// What an entry says of one output. Names are numbers of strings.
#[derive(Debug, Clone, Copy)]
pub(super) struct Metadata<'a> {
    pub(super) hash: &'a [u8],
    pub(super) size: u64,
    /// Until when the cache promised to keep it, in milliseconds since the epoch; -1 for no promise.
    pub(super) expires_ms: i64,
    /// Where the output, which is a link, leads to.
    pub(super) link_to: Option<i32>,
}

/// Receives outputs.
pub(super) trait Heed<'a> {
    /// An output that is a file.
    fn file(&mut self, path: i32, metadata: Metadata<'a>) -> Result<(), &'static str>;
    /// A file in a tree.
    fn child(&mut self, tree: i32, below: i32, metadata: Metadata<'a>) -> Result<(), &'static str>;
    /// Any other string that is referred to.
    fn string(&mut self, id: i32) -> Result<(), &'static str>;
}

/// Bytes of the shortest metadata: an empty hash and four numbers.
const METADATA: usize = 5;

/// Goes through an action's record (formats 16 to 18), which has to be whole and nothing more.
pub(super) fn read<'a>(value: &'a [u8], base: usize, heed: &mut impl Heed<'a>) -> Result<(), Fault> {
    let cursor = &mut Cursor::new(value, base);
    // The action's key, and the digest of what went into it.
    cursor.blob()?;
    cursor.blob()?;
    // Inputs that the action has found itself; -1 for an action that finds none.
    let inputs = cursor.clone().varint32()?;
    if inputs == -1 {
        cursor.varint32()?;
    } else {
        for _ in 0..cursor.count(1)? {
            string(cursor, heed)?;
        }
    }
    // The digest of its environment.
    cursor.blob()?;
    for _ in 0..cursor.count(1 + METADATA)? {
        let path = string(cursor, heed)?;
        let metadata = metadata(cursor, heed)?;
        heed.file(path, metadata).map_err(|what| cursor.fault(what))?;
    }
    for _ in 0..cursor.count(4)? {
        let tree = string(cursor, heed)?;
        for _ in 0..cursor.count(1 + METADATA)? {
            let below = string(cursor, heed)?;
            let metadata = metadata(cursor, heed)?;
            heed.child(tree, below, metadata)
                .map_err(|what| cursor.fault(what))?;
        }
        // The tree as an archive, which is not an output.
        if cursor.flag()? {
            metadata(cursor, heed)?;
        }
        if cursor.flag()? {
            string(cursor, heed)?;
        }
    }
    if !cursor.is_at_end() {
        return Err(cursor.fault("trailing bytes after an action's record"));
    }
    Ok(())
}

fn string<'a>(cursor: &mut Cursor<'a>, heed: &mut impl Heed<'a>) -> Result<i32, Fault> {
    let id = cursor.varint32()?;
    heed.string(id).map_err(|what| cursor.fault(what))?;
    Ok(id)
}

fn metadata<'a>(cursor: &mut Cursor<'a>, heed: &mut impl Heed<'a>) -> Result<Metadata<'a>, Fault> {
    let hash = cursor.blob()?;
    let size = u64::try_from(cursor.varint64()?).map_err(|_| cursor.fault("negative size"))?;
    // Where it is: 0 for nowhere, 1 for the remote cache.
    if !matches!(cursor.varint32()?, 0 | 1) {
        return Err(cursor.fault("invalid location of an output"));
    }
    let expires_ms = cursor.varint64()?;
    let link_to = if cursor.flag()? {
        Some(string(cursor, heed)?)
    } else {
        None
    };
    Ok(Metadata {
        hash,
        size,
        expires_ms,
        link_to,
    })
}
