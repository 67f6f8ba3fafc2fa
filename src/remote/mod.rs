//! The interface to a remote cache, and its implementations.
//!
//! This module does not depend on Bazel or its events.

pub mod retry;

mod actions;
mod batch;
mod call;
mod capabilities;
#[cfg_attr(
    not(feature = "object-stores"),
    allow(dead_code, reason = "only stores have it")
)]
mod casblob;
mod chain;
mod client;
mod compression;
mod copies;
mod disk;
mod expand;
mod grpc;
mod http;
mod inflate;
#[cfg_attr(
    not(feature = "object-stores"),
    allow(dead_code, reason = "only stores have it")
)]
mod layout;
mod limits;
mod metadata;
mod nowhere;
#[cfg(feature = "object-stores")]
pub(crate) mod object;
mod open;
mod options;
mod pool;
mod reading;
mod rope;
mod stall;
mod status;
mod store;
mod stream;
mod trees;
mod wire;
mod written;

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use self::reading::Collect;
pub(crate) use self::retry::counting_retries;
pub(crate) use self::{
    chain::Chain,
    copies::{Copy, LOCAL_FILES, LocalFirst, Offer, is_local, looks_right},
    disk::{DiskCache, pour},
    http::HttpCache,
    nowhere::Nowhere,
    open::open,
    options::MAX_HTTP_CONNECTIONS,
    reading::{expand_action, expand_any_tree, read_blob},
    written::WrittenDigest,
};
pub use self::{
    compression::Compression,
    grpc::GrpcCache,
    metadata::Attribution,
    options::RemoteOptions,
    store::{ActionStore, BatchAnswer, BlobStore, Capabilities, Sink, Standing},
};
