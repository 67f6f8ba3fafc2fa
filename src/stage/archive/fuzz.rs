//! What the fuzz targets run of this room: see [`crate::fuzzing`].

use std::path::Path;

use super::{
    format::{Header, Line, Reader, Writer},
    redact::redact,
};
use crate::fuzzing::first;

/// An exported build: any bytes, frames whose checksums are right and whose content is anything, and whole files with
/// damage, which are never taken for whole. And what of an event may leave.
pub(crate) fn archive(data: &[u8]) {
    let _ = read(data);
    let (choice, rest) = first(data);
    let _ = read(&Writer::<Vec<u8>>::forged(rest));
    damaged(choice, rest);
    if let Ok(event) = redact(data) {
        // Nothing is left to take out.
        assert_eq!(redact(&event).ok(), Some(event));
    }
}

/// All of a file, or nothing if it is damaged.
fn read(bytes: &[u8]) -> Option<(Header, Vec<Line>)> {
    let (mut reader, header) = Reader::new(bytes, Path::new("f")).ok()?;
    let mut all = Vec::new();
    while let Some(lines) = reader.lines().ok()? {
        all.extend(lines);
    }
    Some((header, all))
}

fn damaged(choice: u8, data: &[u8]) {
    let Some((mut bytes, written)) = Writer::<Vec<u8>>::sample(data) else {
        return;
    };
    assert_eq!(read(&bytes).map(|(_, lines)| lines), Some(written));
    let at = (usize::from(choice) * 257 + data.len()) % bytes.len();
    if choice & 1 == 0 {
        bytes.truncate(at);
    } else {
        bytes[at] ^= choice;
    }
    assert_eq!(read(&bytes), None, "damage at {at} was not noticed");
}
