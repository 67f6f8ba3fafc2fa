//! A build carried elsewhere: one file with its events and what is needed to fetch its outputs.
//!
//! ```text
//! file   = "outhaul-build\n" version(u8) frame…
//! frame  = length(u32) checksum(8 bytes) body      little-endian; BLAKE3's first 8 bytes, over length and body
//! body   = zstd of 'H' header (JSON) | 'R' records | 'E' count of records (u64)
//! record = length(varint) kind(u8) sequence(i64) received_ms(varint) event
//! ```
//!
//! The first frame is the header, the last one the end: a file that was cut short is known by its lack. Events are
//! those of the journal with what staging, `status` and `ls` read of them (`redact`); all else, such as command lines, what
//! the build prints and the headers of the client's connection, is not a part of it.

mod export;
mod format;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod import;
mod redact;
#[cfg(test)]
mod tests;

pub(crate) use self::{
    export::{Exported, export},
    import::{Imported, import},
};
