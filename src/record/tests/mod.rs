//! The record as a whole: what its users are promised, on healthy and on broken stores.

use std::path::Path;

use super::*;
use crate::{
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    output::{Class, OutputContent, Stamp},
};

mod any_damage;
mod api;
mod compacting;
mod crash;
mod damage;
mod full_disk;
mod unprivileged;

fn open(dir: &Path) -> (Record, Opening) {
    Record::open(dir).unwrap()
}

fn path(text: &str) -> ExecPath {
    ExecPath::new(text).unwrap()
}

/// The `n`th row of a build that is the same in every test.
fn numbered(n: u32) -> (ExecPath, OutputRow) {
    let size = u64::from(n);
    let digest = Digest::of(DigestFunction::Sha256, &n.to_be_bytes());
    let digest = Digest::new(DigestFunction::Sha256, digest.hash(), size).unwrap();
    let row = OutputRow {
        state: OutputState::Materialized,
        class: Class::Required,
        rule: "top-level output of the build".into(),
        label: format!("//some/package{}:target", n / 100).into(),
        output_group: "default".into(),
        invocation_id: "5a3d1f1e-6ad3-4b5c-8f0e-0d9c0c5b7a11".into(),
        event: format!("named_set {}", n / 100).into(),
        stamp: Some(Stamp {
            size,
            mtime_ns: 1_763_000_000_000_000_000,
            inode: size,
            ..Stamp::default()
        }),
        source: "batch".into(),
        took_us: 1234,
        version: 7,
        ..OutputRow::known(OutputContent::Blob(digest))
    };
    (
        path(&format!(
            "bazel-out/k8-fastbuild/bin/some/package{}/file{n:06}.o",
            n / 100
        )),
        row,
    )
}

fn numbered_rows(range: std::ops::Range<u32>) -> Vec<(ExecPath, OutputRow)> {
    range.map(numbered).collect()
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

fn invocation(id: &str, started_ms: i64, root: Option<RootId>, version: u64) -> InvocationRow {
    InvocationRow {
        invocation_id: id.into(),
        started_ms,
        root,
        version,
        workspace: "/home/u/ws".into(),
        ..InvocationRow::default()
    }
}
