//! Buckets in object stores, as caches and as collections of named objects.
//!
//! The `object_store` crate has the three protocols: signatures, names, listings. Everything around a request is ours: the
//! HTTP client (`service`), time-outs, retries, where credentials come from (`credentials`), and what an error means
//! (`fault`). The crate's own limits would end a large object after half a minute, and its errors do not distinguish a missing
//! object from a missing bucket.

mod bucket;
mod cache;
mod credentials;
mod fault;
mod profile;
mod service;

#[cfg(test)]
mod tests;

pub(crate) use self::{bucket::Bucket, cache::ObjectCache};
