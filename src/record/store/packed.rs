//! Trees of many small rows, packed: each value of sled's has all rows from its key up to the next one's.
//!
//! As rows of their own, the targets of a build of 1,000 made the store 3 MB larger, of which 150 KB were theirs: sled
//! rewrites sixteen rows for each that is changed, and is slow to use the space again.
//!
//! A value is sealed, and has for each row how many bytes of its key are those of the one before, the rest of the key,
//! and its value.

use std::{iter::Peekable, ops::Bound};

use sled::{IVec, Tree};

use super::{Change, MAX_VALUE, batch_of, sort};
use crate::record::{
    error::StoreError,
    value::{ValueError, open_value, seal_value},
    wire::{Reader, put_bytes, put_varint},
};

/// Values that go into sled at once.
const VALUES_PER_BATCH: usize = 64;

/// What a row takes besides its value, roughly.
const ROW_BYTES: usize = 24;

/// What of a key is not counted.
const LONG_KEY: usize = 256;

type Row = (Vec<u8>, Vec<u8>);

/// The key of the first value.
const FIRST: &[u8] = &[];

fn pack(rows: &[Row]) -> Vec<u8> {
    seal_value(|out| {
        let mut before: &[u8] = &[];
        for (key, value) in rows {
            let shared = before.iter().zip(key).take_while(|(a, b)| a == b).count();
            put_varint(out, shared as u64);
            put_bytes(out, &key[shared..]);
            put_bytes(out, value);
            before = key;
        }
    })
}

fn unpack(value: &[u8]) -> Result<Vec<Row>, ValueError> {
    let mut reader = Reader(open_value(value)?);
    let mut rows: Vec<Row> = Vec::new();
    while !reader.0.is_empty() {
        let row = |reader: &mut Reader<'_>| {
            let before = rows.last().map_or(FIRST, |(key, _)| key);
            let key = [before.get(..reader.index()?)?, reader.bytes()?].concat();
            Some((key, reader.bytes()?.to_vec()))
        };
        rows.push(row(&mut reader).ok_or(ValueError::Field("packed row"))?);
    }
    Ok(rows)
}

/// Rows of one value, and where the next value begins.
struct Span {
    key: IVec,
    rows: Vec<Row>,
    upper: Option<IVec>,
}

/// The value that has a key, or would have it. One that cannot be read is as good as empty.
fn span(tree: &Tree, key: &[u8]) -> Result<Span, StoreError> {
    let found = tree.range(..=key).next_back().transpose().map_err(sort)?;
    let (first, mut rows) = match found {
        Some((first, value)) => {
            let rows = unpack(&value).unwrap_or_else(|error| {
                tracing::debug!(%error, "skipped unreadable packed rows of the record");
                Vec::new()
            });
            (first, rows)
        }
        None => (IVec::from(FIRST), Vec::new()),
    };
    let upper = tree
        .range::<&[u8], _>((Bound::Excluded(&first[..]), Bound::Unbounded))
        .next()
        .transpose()
        .map_err(sort)?
        .map(|(key, _)| key);
    if let Some(upper) = &upper {
        // Anything beyond was left by a writer that was killed, and is out of date.
        rows.truncate(rows.partition_point(|(key, _)| key[..] < upper[..]));
    }
    Ok(Span {
        key: first,
        rows,
        upper,
    })
}

/// Reads several keys, in their order.
pub(super) fn get_many<'a>(
    tree: &Tree,
    keys: impl IntoIterator<Item = &'a [u8]>,
) -> Result<Vec<Option<IVec>>, StoreError> {
    keys.into_iter()
        .map(|key| {
            let rows = span(tree, key)?.rows;
            let found = rows.binary_search_by(|(other, _)| other[..].cmp(key)).ok();
            Ok(found.map(|at| IVec::from(&rows[at].1[..])))
        })
        .collect()
}

/// Reads up to `limit` rows whose keys begin with `prefix`, from `start` on.
pub(super) fn page(
    tree: &Tree,
    prefix: &[u8],
    start: Bound<&[u8]>,
    limit: usize,
) -> Result<Vec<(IVec, IVec)>, StoreError> {
    let mut page = Vec::new();
    let mut at = match start {
        Bound::Included(key) | Bound::Excluded(key) => key.to_vec(),
        Bound::Unbounded => Vec::new(),
    };
    loop {
        let span = span(tree, &at)?;
        for (key, value) in span.rows {
            let before = match start {
                Bound::Included(start) => key[..] < *start,
                Bound::Excluded(start) => key[..] <= *start,
                Bound::Unbounded => false,
            };
            if before {
                continue;
            }
            if page.len() == limit || !key.starts_with(prefix) {
                return Ok(page);
            }
            page.push((key.into(), value.into()));
        }
        match span.upper {
            Some(upper) => at = upper.to_vec(),
            None => return Ok(page),
        }
    }
}

/// Applies changes, which are in the order of their keys.
pub(super) fn apply<'a>(
    tree: &Tree,
    changes: impl IntoIterator<Item = (&'a Vec<u8>, &'a Option<Vec<u8>>)>,
) -> Result<(), StoreError> {
    let mut changes = changes.into_iter().peekable();
    let mut batch: Vec<Change> = Vec::new();
    while let Some((key, _)) = changes.peek() {
        let span = span(tree, key)?;
        let is_end = span.upper.is_none();
        let rows = merge(span.rows, span.upper.as_deref(), &mut changes);
        let mut values = split(&rows, is_end).into_iter();
        let first = values.next().map(pack);
        // New ones go first: were the old one shortened before them, rows would be missing in between.
        for rows in values {
            batch.push((rows[0].0.clone(), Some(pack(rows))));
            if batch.len() >= VALUES_PER_BATCH {
                write(tree, std::mem::take(&mut batch))?;
            }
        }
        batch.push((span.key.to_vec(), first));
        if batch.len() >= VALUES_PER_BATCH {
            write(tree, std::mem::take(&mut batch))?;
        }
    }
    write(tree, batch)
}

/// A value's rows with all changes that are its own.
fn merge<'a>(
    old: Vec<Row>,
    upper: Option<&[u8]>,
    changes: &mut Peekable<impl Iterator<Item = (&'a Vec<u8>, &'a Option<Vec<u8>>)>>,
) -> Vec<Row> {
    let mut rows = Vec::with_capacity(old.len() + 16);
    let mut old = old.into_iter().peekable();
    while let Some((key, value)) = changes.next_if(|(key, _)| upper.is_none_or(|upper| key[..] < *upper)) {
        while let Some(row) = old.next_if(|(other, _)| other < key) {
            rows.push(row);
        }
        old.next_if(|(other, _)| other == key);
        rows.extend(value.clone().map(|value| (key.clone(), value)));
    }
    rows.extend(old);
    rows
}

/// Rows in parts that are small enough: full ones at the end of everything, where rows are added in order, and
/// otherwise equal ones, which have room for more.
fn split(rows: &[Row], is_end: bool) -> Vec<&[Row]> {
    // Keys mostly share their beginning with the one before; long ones do not have to.
    let size = |row: &Row| row.1.len() + ROW_BYTES + row.0.len().saturating_sub(LONG_KEY);
    let all: usize = rows.iter().map(size).sum();
    let most = if is_end {
        MAX_VALUE
    } else {
        all / all.div_ceil(MAX_VALUE).max(1) + ROW_BYTES
    };
    let mut parts = Vec::new();
    let (mut begin, mut bytes) = (0, 0);
    for (i, row) in rows.iter().enumerate() {
        if bytes > 0 && bytes + size(row) > most {
            parts.push(&rows[begin..i]);
            (begin, bytes) = (i, 0);
        }
        bytes += size(row);
    }
    if begin < rows.len() {
        parts.push(&rows[begin..]);
    }
    parts
}

fn write(tree: &Tree, changes: Vec<Change>) -> Result<(), StoreError> {
    tree.apply_batch(batch_of(changes)).map_err(sort)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        /// Against a plain map; values are so large that they are split and joined all the time.
        #[test]
        fn packed_rows_are_a_map(steps in prop::collection::vec(
            prop::collection::btree_map("[ab]{0,4}", prop::option::weighted(0.7, 0..3000usize), 0..12), 1..12))
        {
            let db = sled::Config::new().temporary(true).open().unwrap();
            let tree = db.open_tree("t").unwrap();
            let mut model: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
            for step in steps {
                let changes: BTreeMap<Vec<u8>, Option<Vec<u8>>> = step
                    .into_iter()
                    .map(|(key, len)| (key.into_bytes(), len.map(|len| vec![7; len])))
                    .collect();
                apply(&tree, &changes).unwrap();
                for (key, value) in changes {
                    match &value {
                        Some(value) => model.insert(key.clone(), value.clone()),
                        None => model.remove(&key),
                    };
                    let found = get_many(&tree, [&key[..]]).unwrap().remove(0);
                    prop_assert_eq!(found.as_deref(), value.as_deref());
                }
                for (prefix, limit) in [("", 1000), ("a", 1000), ("ab", 2), ("b", 1)] {
                    for start in [Bound::Included(prefix.as_bytes()), Bound::Excluded(prefix.as_bytes())] {
                        let found: Vec<_> = page(&tree, prefix.as_bytes(), start, limit)
                            .unwrap()
                            .iter()
                            .map(|(key, value)| (key.to_vec(), value.to_vec()))
                            .collect();
                        let expected: Vec<_> = model
                            .range::<[u8], _>((start, Bound::Unbounded))
                            .filter(|(key, _)| key.starts_with(prefix.as_bytes()))
                            .take(limit)
                            .map(|(key, value)| (key.clone(), value.clone()))
                            .collect();
                        prop_assert_eq!(found, expected);
                    }
                }
            }
        }
    }

    #[test]
    fn a_value_that_cannot_be_read_is_empty_and_can_be_written() {
        let db = sled::Config::new().temporary(true).open().unwrap();
        let tree = db.open_tree("t").unwrap();
        tree.insert(FIRST, b"nonsense").unwrap();
        let changes: BTreeMap<_, _> = [(b"a".to_vec(), Some(b"1".to_vec()))].into();
        assert_eq!(get_many(&tree, [&b"a"[..]]).unwrap(), [None]);
        apply(&tree, &changes).unwrap();
        assert_eq!(get_many(&tree, [&b"a"[..]]).unwrap(), [Some(IVec::from(b"1"))]);
    }
}
