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
/// How often a rule was applied, by its fault's name.
/// How many of the next connections are dead from the beginning.
/// What a connection holds to learn its fate.
/// Cancelled to break it.
/// Cancelled to let it die: it stays open, and nothing is read from it or written to it any more.
/// Number of rules, read without the lock: a cache without faults does not pay for them.
/// The faults of a running cache. A handle: clones share the rules.
/// Adds a rule for one blob. When several rules match a read, the one added first that is not used up counts.
/// Adds a rule for whatever blob is read.
/// Adds a rule for one kind of call. All delays that match are added up; of the rest the one added first counts.
/// Adds a rule for whatever call.
/// Has the cache say something else of itself from now on.
/// Breaks every open connection at once, as a crash of the server would. New ones are accepted.
/// Lets every open connection die without a word, as when a cable is pulled: it stays open, but nothing is read from
/// it or written to it any more, not even an answer to a ping. New ones are accepted.
// They can still be severed.
/// The next N connections are accepted and never answered.
/// Forgets all rules and everything that was pretended. Dead connections stay dead, later ones live.
/// How many times a rule was applied.
/// How many times rules were applied, by the names of their faults.
/// What a new connection holds.
/// What shall happen to a blob about to be sent.
/// What shall happen to a call that the service takes up: a delay, then perhaps one of the other faults.
/// What happens to a call before the service sees it, or to its answer afterwards.
pub(super) use self::{blob::Transfer, rules::Line, zstd::packed};
