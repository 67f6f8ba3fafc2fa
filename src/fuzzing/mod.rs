//! What the fuzz targets run: one function for each decoder of bytes from outside.
//!
//! Each takes any bytes at all, must return, and checks what can be checked of the answer: that it is the one of a
//! plainer decoder, that it reads back, that nothing is made up. Decoders that are private to their
//! room have theirs there. `fuzz/` makes a program of them; the tests here run them over the inputs that are kept in
//! `fuzz/seeds`, and over damaged copies of these, so that what was found once stays found without a fuzzer.

mod events;
mod names;
mod settings;
#[cfg(test)]
mod tests;

pub use self::{
    events::{event, event_file, event_json, whole_build},
    names::{digest, exec_path, uri},
    settings::config_file,
};

/// Runs a target's input.
pub type Target = fn(&[u8]);

/// Every target by its name.
pub const TARGETS: &[(&str, Target)] = &[
    ("action_cache", action_cache),
    ("archive", archive),
    ("batch_answer", batch_answer),
    ("bes_request", bes_request),
    ("bes_rewrite", bes_rewrite),
    ("casblob", casblob),
    ("config_file", config_file),
    ("credentials", credentials),
    ("digest", digest),
    ("disk_result", disk_result),
    ("event", event),
    ("event_file", event_file),
    ("event_json", event_json),
    ("exec_path", exec_path),
    ("execution_log", execution_log),
    ("grpc_frames", grpc_frames),
    ("headers", headers),
    ("inflate", inflate),
    ("journal", journal),
    ("marker", marker),
    ("record_block", record_block),
    ("record_value", record_value),
    ("runfiles_manifest", runfiles_manifest),
    ("status", status),
    ("tar", tar),
    ("tree_message", tree_message),
    ("uri", uri),
    ("whole_build", whole_build),
    ("zip", zip),
];

macro_rules! elsewhere {
    ($($(#[$meta:meta])* $name:ident = $path:path;)*) => {$(
        $(#[$meta])*
        pub fn $name(data: &[u8]) {
            $path(data);
        }
    )*};
}

elsewhere! {
    /// A tar that is to be unpacked.
    tar = crate::archive::fuzz::tar;
    /// A zip that is to be unpacked.
    zip = crate::archive::fuzz::zip;
    /// A build tool's action cache.
    action_cache = crate::action_cache::fuzz::action_cache;
    /// A build tool's compact execution log.
    execution_log = crate::action_cache::log::fuzz;
    /// An exported build's file.
    archive = crate::stage::archive_fuzz::archive;
    /// A marker of staged files.
    marker = crate::stage::marker_fuzz;
    /// A cache's answer to a batch.
    batch_answer = crate::remote::fuzz::batch_answer;
    /// A compressed blob of bazel-remote's.
    casblob = crate::remote::fuzz::casblob;
    /// What a credential helper prints.
    credentials = crate::remote::fuzz::credentials;
    /// An action's result in a disk cache.
    disk_result = crate::remote::fuzz::disk_result;
    /// gRPC's frames of blobs.
    grpc_frames = crate::remote::fuzz::grpc_frames;
    /// Compressed blobs.
    inflate = crate::remote::fuzz::inflate;
    /// A cache's error.
    status = crate::remote::fuzz::status;
    /// A cache's directory trees and action results.
    tree_message = crate::remote::fuzz::tree_message;
    /// A request of the event service, as far as it is read.
    bes_request = crate::bes::fuzz::request;
    /// A request whose files are called by their place on disk.
    bes_rewrite = crate::bes::fuzz::rewrite;
    /// A client's headers in a journal.
    headers = crate::bes::fuzz::headers;
    /// A journal's file.
    journal = crate::bes::fuzz::journal;
    /// A program's manifest of runfiles.
    runfiles_manifest = crate::invocation::runfiles::fuzz;
    /// A block of the record's outputs.
    record_block = crate::record::fuzz::block;
    /// The record's other values.
    record_value = crate::record::fuzz::value;
}

/// A file in memory with these bytes, and a path to it for as long as it lives.
#[allow(clippy::expect_used, reason = "without it there is nothing to run")]
pub(crate) fn file_of(data: &[u8]) -> (std::fs::File, std::path::PathBuf) {
    use std::{io::Write as _, os::fd::AsRawFd as _};
    let file = rustix::fs::memfd_create("fuzzing", rustix::fs::MemfdFlags::CLOEXEC).expect("memory");
    let mut file = std::fs::File::from(file);
    file.write_all(data).expect("memory");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    (file, path.into())
}

/// Waits, on a runtime that all runs share.
#[allow(clippy::expect_used, reason = "without it there is nothing to run")]
pub(crate) fn wait_for<T>(future: impl Future<Output = T>) -> T {
    static RUNTIME: std::sync::LazyLock<tokio::runtime::Runtime> = std::sync::LazyLock::new(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime")
    });
    RUNTIME.block_on(future)
}

/// Takes the first byte, which decides about the rest; 0 if the input is empty.
pub(crate) fn first(data: &[u8]) -> (u8, &[u8]) {
    data.split_first()
        .map_or((0, data), |(first, rest)| (*first, rest))
}
