//! A small file to place, and one that is in its place.

use super::error::PlaceError;
use crate::{digest::Digest, exec_path::ExecPath, output::Stamp};

/// What placing did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Nothing was there.
    Created,
    /// Something else was there.
    Replaced,
    /// The right bytes were there already, and were left alone.
    Kept,
    /// The bytes were right, and nothing was to be placed.
    Dropped,
}

/// A small file to place.
#[derive(Debug, Clone, Copy)]
pub struct Item<'a> {
    /// Path of the output in its root.
    pub path: &'a ExecPath,
    /// What its bytes must have.
    pub digest: &'a Digest,
    /// The bytes, not verified yet.
    pub bytes: &'a [u8],
    /// Nothing was there a moment ago, so the name is tried before there is another look. It costs only time if
    /// something is there by now.
    pub is_new: bool,
}

/// A file that is under its final name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// What the system says of it since. It vouches for the file only once it has been seen again, since the file is
    /// as young as the stamp.
    pub stamp: Stamp,
    /// What was done.
    pub how: How,
}

impl Placed {
    /// Bytes were read that should have the `expected` digest, and are not kept.
    pub(in crate::materialize) fn nowhere(
        path: &ExecPath,
        expected: &Digest,
        actual: Digest,
    ) -> Result<Self, PlaceError> {
        if actual == *expected {
            let (stamp, how) = (Stamp::default(), How::Dropped);
            Ok(Self { stamp, how })
        } else {
            Err(PlaceError::mismatch(path.as_str(), expected, Some(actual)))
        }
    }
}
