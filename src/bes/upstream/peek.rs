//! A look at a forwarded request: is it one that has to be held?
//!
//! A full decode would cost more than the rest of forwarding; an event's id comes first in it and is small.

use crate::bep::wire::{
    Fields,
    bep::{build_event, build_event_id as id},
    event_in,
};

/// What of an event's id matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Something is said to be complete: a target or an aspect on it, a test's run, or one of their summaries.
    Completion,
    /// A named set of files.
    NamedSet,
    /// Anything else.
    Other,
}

/// What the request's event is.
pub(super) fn kind(request: &[u8]) -> Kind {
    let Some(fields) = event_in(request).and_then(|event| first(event, build_event::ID)) else {
        return Kind::Other;
    };
    // `BuildEventId`'s oneof; of several the last would count, so that all have to be looked at.
    let mut kind = Kind::Other;
    for field in Fields::of(fields).map_while(Result::ok) {
        match field.number {
            id::TARGET_COMPLETED | id::TEST_SUMMARY | id::TEST_RESULT | id::TARGET_SUMMARY => {
                return Kind::Completion;
            }
            id::NAMED_SET => kind = Kind::NamedSet,
            _ => {}
        }
    }
    kind
}

/// The submessage of this number that comes first. Ids lead, so that nothing else of a large event is looked at.
fn first(message: &[u8], number: u32) -> Option<&[u8]> {
    Fields::of(message)
        .map_while(Result::ok)
        .find(|field| field.number == number)?
        .inside()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bes::upstream::tests::requests;

    #[test]
    fn completions_are_distinguished_from_the_rest() {
        for (id, expected) in [
            (2, Kind::Other),
            (5, Kind::Completion),
            (6, Kind::Other),
            (7, Kind::Completion),
            (8, Kind::Completion),
            (9, Kind::Other),
            (13, Kind::NamedSet),
            (16, Kind::Other),
            (26, Kind::Completion),
            (29, Kind::Other),
        ] {
            assert_eq!(kind(&requests::with_id(1, id)), expected, "id {id}");
        }
        assert_eq!(kind(&requests::last(2)), Kind::Other);
        assert_eq!(kind(b""), Kind::Other);
        assert_eq!(kind(b"\xff\xff\xff"), Kind::Other);
    }
}
