//! How files are placed.

use super::mark::Mark;

/// How files are placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PlaceOptions {
    /// Files get the mode 0755 instead of 0555.
    pub writable: bool,
    /// What is to stay free.
    pub space: Mark,
}

impl PlaceOptions {
    pub(super) const fn mode(self) -> u32 {
        if self.writable { 0o755 } else { 0o555 }
    }
}
