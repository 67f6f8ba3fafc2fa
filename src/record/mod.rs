//! The record: what Outhaul knows about outputs, invocations and targets, across restarts.
//!
//! It is a cache, never the truth. Readers check it against the disk, so it may be deleted, damaged, or miss its newest
//! rows; that only costs checking some files again. In return, nothing here ever fails or delays a build: there are no
//! errors after opening, only [`Health`](error::Health).
//!
//! * `handle`, `outputs`, `invocations`, `retention`: the API, in terms of rows.
//! * `which`: which recorded build is meant.
//! * `row`, `value`, `keys`, `wire`: rows, and rows as bytes.
//! * `block`: many outputs' rows as one value. There are up to millions of them, so they are never single values.
//! * `shared`, `pending`, `writer`: the queue of rows on their way to the store, which readers see too; one thread
//!   writes them, and reopens or replaces a store that fails.
//! * `look_up`, `scan`: outputs out of queue and store.
//! * `store`, `shield`, `opening`: sled, its panics, and setting a damaged store aside.
//! * `lock`: one process per state directory.
//! * `examine`: whether a record opens, found out without touching it.
//!
//! A state directory holds `lock`, `record/` (sled), `record.opening` while a store is being opened, `record.compact/`
//! while one is rewritten, and the last few `record.quarantined-<seconds>`.

mod block;
mod error;
mod examine;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod handle;
mod invocations;
mod keys;
mod lock;
mod look_up;
mod opening;
mod outputs;
mod pending;
mod retention;
mod roots;
mod row;
mod scan;
mod shared;
mod shield;
mod store;
#[cfg(test)]
mod tests;
mod value;
mod which;
mod wire;
mod writer;

pub(crate) use block::Row as SeenOutput;
pub(crate) use error::RecordError;
pub(crate) use examine::{Examined, examine};
pub use handle::Record;
pub(crate) use lock::Holder;
pub(crate) use opening::Opening;
pub use retention::Retention;
pub(crate) use retention::RetentionPlan;
pub(crate) use row::with_fields_of;
pub use row::{
    InvocationRow, InvocationState, OutputCounts, OutputRow, OutputState, RootId, TargetRow, TargetState,
    Transfers,
};
pub(crate) use which::Which;
