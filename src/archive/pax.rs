//! Extended headers of tars (POSIX `pax`): what of them must be honoured, or else the archive refused.

use ::tar::PaxExtensions;

use super::{Archive, ArchiveError};

/// Keys that decide where a member goes and what is in it. Twice, or for all members at once, programs read them
/// differently.
const DECISIVE: &[&[u8]] = &[b"path", b"linkpath", SIZE];
const SIZE: &[u8] = b"size";

/// Keys of sparse files in the formats 0.0, 0.1 and 1.0 of GNU tar. Taken for ordinary files they have wrong bytes.
const SPARSE: &[u8] = b"GNU.sparse.";

/// A key and its value.
type Record<'a> = (&'a [u8], &'a [u8]);

/// Judges the extended header of a member, or one for all members that follow.
pub(super) fn judge(
    archive: &Archive<'_>,
    member: &str,
    header: &[u8],
    is_global: bool,
) -> Result<(), ArchiveError> {
    let damaged = |what: &str| archive.damaged(format!("the extended header of {member:?} {what}"));
    let records = records(header).ok_or_else(|| damaged("is malformed"))?;
    if records.iter().any(|(key, _)| key.starts_with(SPARSE)) {
        let reason = "is sparse in PAX format; make the archive with `tar --format=gnu` or without --sparse";
        return Err(archive.unsupported(member, reason.to_owned()));
    }
    let decisive: Vec<_> = records
        .into_iter()
        .filter(|(key, _)| DECISIVE.contains(key))
        .collect();
    for (at, (key, _)) in decisive.iter().enumerate() {
        let is_again = decisive[..at].iter().any(|(before, _)| before == key);
        if is_global || is_again {
            let key = String::from_utf8_lossy(key);
            let how = if is_global { "for all members" } else { "twice" };
            return Err(archive.damaged(format!("an extended header sets {key:?} {how}")));
        }
    }
    if decisive != by_lines(header) {
        return Err(damaged("has a name or size in or after a value of several lines"));
    }
    Ok(())
}

/// The records of a header. Their lengths say where they end: values, such as extended attributes, may have any bytes.
fn records(mut rest: &[u8]) -> Option<Vec<Record<'_>>> {
    let mut records = Vec::new();
    while !rest.is_empty() {
        let digits = rest.iter().position(|byte| !byte.is_ascii_digit())?;
        let length: usize = std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()?;
        let record = rest
            .get(digits..length)?
            .strip_prefix(b" ")?
            .strip_suffix(b"\n")?;
        let equals = record.iter().position(|byte| *byte == b'=')?;
        records.push((&record[..equals], &record[equals + 1..]));
        rest = &rest[length..];
    }
    Some(records)
}

/// What the tar library makes of the decisive ones: it takes each line for a record, and no size after one that is none.
fn by_lines(header: &[u8]) -> Vec<Record<'_>> {
    let mut is_whole = true;
    let mut found = Vec::new();
    for extension in PaxExtensions::new(header) {
        let Ok(extension) = extension else {
            is_whole = false;
            continue;
        };
        let key = extension.key_bytes();
        if DECISIVE.contains(&key) && (is_whole || key != SIZE) {
            found.push((key, extension.value_bytes()));
        }
    }
    found
}
