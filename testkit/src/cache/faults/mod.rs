//! Misbehaviour on demand: what real servers do now and then, but never when a test asks for it.
//!
//! Rules are plain data, kept in the order in which they were added. They are looked at in three places only: when a call
//! comes off the connection and when the service takes it up ([`RequestFault`]), and when a blob is about to be sent
//! ([`BlobFault`]). Connections have no rules: a call makes them break, die or stop reading.

mod blob;
mod call;
mod rule;
mod rules;
mod zstd;

pub use self::{
    blob::BlobFault,
    call::{Pretence, RequestFault},
    rule::Times,
    rules::Faults,
};
pub(super) use self::{blob::Transfer, rules::Line, zstd::packed};
