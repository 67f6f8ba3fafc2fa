//! Strings by their numbers.

use std::borrow::Cow;

use super::{
    cursor::{Cursor, Fault},
    frame,
};

/// The index file's own format: paths are kept as text whose characters are the path's bytes.
pub(super) const FORMAT: i64 = 1;

/// The strings, by number.
#[derive(Debug, Default)]
pub(super) struct Index<'a>(Vec<Option<&'a [u8]>>);

impl<'a> Index<'a> {
    /// Takes in a file's strings.
    pub(super) fn take_in(&mut self, file: &'a [u8]) -> Result<(), Fault> {
        // A record has ten bytes and its string; so a number that is higher than there are records is a lie.
        let most = self.0.len() + file.len() / 10;
        frame::records(file, 0, Cursor::piece, |string, is_set, cursor| {
            if !is_set {
                return Err(cursor.fault("unexpected removal of a string"));
            }
            let id = cursor.int32()?;
            let Some(id) = usize::try_from(id).ok().filter(|id| *id < most) else {
                return Err(cursor.fault("string number too high"));
            };
            if bytes_of(string).is_none() {
                return Err(cursor.fault("string is not Latin-1"));
            }
            if id >= self.0.len() {
                self.0.resize(id + 1, None);
            }
            // A journal may have again what the file has.
            match self.0[id].replace(string) {
                Some(other) if other != string => Err(cursor.fault("two strings have the same number")),
                _ => Ok(()),
            }
        })
    }

    /// How many there are; none if a number is missing between them.
    pub(super) fn len(&self) -> Option<usize> {
        self.0.iter().all(Option::is_some).then_some(self.0.len())
    }

    /// The bytes of a string.
    pub(super) fn get(&self, id: i32) -> Option<Cow<'a, [u8]>> {
        bytes_of((*self.0.get(usize::try_from(id).ok()?)?)?)
    }
}

/// The bytes that a string stands for: it is UTF-8, and its characters are the bytes.
fn bytes_of(string: &[u8]) -> Option<Cow<'_, [u8]>> {
    if string.is_ascii() {
        return Some(Cow::Borrowed(string));
    }
    let text = std::str::from_utf8(string).ok()?;
    let bytes: Option<Vec<u8>> = text.chars().map(|c| u8::try_from(u32::from(c)).ok()).collect();
    bytes.map(Cow::Owned)
}
