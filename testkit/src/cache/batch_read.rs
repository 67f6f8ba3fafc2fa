//! Reading blobs in batches, and what faults make of that.

use std::{sync::Arc, time::Duration};

use bazel_remote_apis::build::bazel::remote::execution::v2::{
    self as reapi, BatchReadBlobsRequest, batch_read_blobs_response, compressor,
};
use bytes::Bytes;
use tonic::{Code, Request, Status};

use super::{
    cas::{ZSTD_LEVEL, total_size},
    context::{Context, injected, inner_busy, inner_status},
    direct::Part,
    faults::{BlobFault, Transfer, packed},
    stats::{Rpc, add},
};
use outhaul_digest::Digest;

/// Below this, zstd costs more than it saves; Bazel's threshold for its own uploads is the same.
const COMPRESS_FROM: usize = 100;

/// An answer to a batch in the making.
struct Batch {
    packer: Packer,
    parts: Vec<Part>,
    /// What comes after those.
    last: Vec<Part>,
    /// How long it is held back.
    delay: Duration,
}

/// An answer about a blob that cannot have been requested: its digest is made from another's.
fn unasked(digest: &Digest) -> Part {
    let bytes = Bytes::from(format!("not {digest}"));
    let other = Digest::of(digest.function(), &bytes);
    let head = batch_read_blobs_response::Response {
        digest: Some(reapi::Digest {
            hash: other.hash_hex(),
            // Small enough.
            size_bytes: i64::try_from(other.size()).unwrap_or(i64::MAX),
        }),
        ..Default::default()
    };
    (head, bytes)
}

/// Compresses the blobs of one answer, with one context for all of them.
struct Packer(Option<zstd::bulk::Compressor<'static>>);

impl Packer {
    fn new(zstd: bool) -> Self {
        // Without memory for a context, the client gets its blobs uncompressed.
        Self(
            zstd.then(|| zstd::bulk::Compressor::new(ZSTD_LEVEL).ok())
                .flatten(),
        )
    }

    /// The compressed bytes, if that makes them fewer.
    fn pack(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let compressor = self.0.as_mut().filter(|_| bytes.len() >= COMPRESS_FROM)?;
        compressor
            .compress(bytes)
            .ok()
            .filter(|packed| packed.len() < bytes.len())
    }
}

impl Context {
    /// The blobs' answers to a batch.
    pub(super) async fn read_batch(
        self: Arc<Self>,
        request: Request<BatchReadBlobsRequest>,
    ) -> Result<Vec<Part>, Status> {
        self.enter(Rpc::BatchRead, &request).await?;
        let request = request.into_inner();
        self.check_instance(&request.instance_name)?;
        add(&self.counters.batch_read_blobs, request.digests.len() as u64);
        let mut digests = Vec::with_capacity(request.digests.len());
        for wire in &request.digests {
            digests.push(self.digest(Some(wire), request.digest_function)?);
        }
        self.check_batch(total_size(&digests))?;
        let zstd = self.zstd
            && request
                .acceptable_compressors
                .contains(&compressor::Value::Zstd.into());
        let mut batch = Batch {
            packer: Packer::new(zstd),
            parts: Vec::with_capacity(digests.len()),
            last: Vec::new(),
            delay: Duration::ZERO,
        };
        for (wire, digest) in request.digests.into_iter().zip(&digests) {
            self.read_for_batch(wire, digest, &mut batch);
        }
        if !batch.delay.is_zero() {
            tokio::time::sleep(batch.delay).await;
        }
        batch.parts.append(&mut batch.last);
        Ok(batch.parts)
    }

    /// Adds one blob's answer to a batch, or whatever a fault makes of it.
    fn read_for_batch(&self, wire: reapi::Digest, digest: &Digest, batch: &mut Batch) {
        let place = Transfer {
            batch: true,
            compressed: batch.packer.0.is_some(),
        };
        let fault = self.faults.on_blob(digest, place);
        let failed = |wire, status| {
            let head = batch_read_blobs_response::Response {
                digest: Some(wire),
                status: Some(status),
                ..Default::default()
            };
            (head, Bytes::new())
        };
        match fault {
            Some(BlobFault::DropFromBatch) => return,
            Some(BlobFault::Status(code)) => {
                let status = inner_status(code, injected(code).message());
                return batch.parts.push(failed(wire, status));
            }
            Some(BlobFault::RetryAfter(patience)) => {
                return batch.parts.push(failed(wire, inner_busy(patience)));
            }
            Some(BlobFault::Evict) => {
                self.store.remove(digest);
            }
            Some(BlobFault::Delay(time)) => batch.delay = batch.delay.max(time),
            Some(BlobFault::Unasked) => batch.parts.push(unasked(digest)),
            _ => {}
        }
        let Some(bytes) = self.store.get(digest) else {
            let status = inner_status(Code::NotFound, format!("blob {digest} is not here"));
            return batch.parts.push(failed(wire, status));
        };
        add(&self.counters.bytes_out, bytes.len() as u64);
        let mut data = bytes;
        if let Some(fault) = fault {
            let mut copy = Vec::from(data);
            spoil(&mut copy, fault);
            data = copy.into();
        }
        let mut compressor = compressor::Value::Identity;
        let lie = fault
            .filter(|_| place.compressed)
            .and_then(|fault| packed(&data, fault));
        if let Some(mut packed) = lie.or_else(|| batch.packer.pack(&data)) {
            if fault == Some(BlobFault::GarbleCompression) {
                garble(&mut packed);
            }
            (data, compressor) = (packed.into(), compressor::Value::Zstd);
        }
        add(&self.counters.wire_bytes_out, data.len() as u64);
        let head = batch_read_blobs_response::Response {
            digest: Some(wire),
            data: Vec::new(),
            compressor: compressor.into(),
            status: Some(inner_status(Code::Ok, "")),
        };
        let part = (head, data);
        match fault {
            Some(BlobFault::Twice { wrong_first }) => {
                let mut other = part.clone();
                let mut bytes = Vec::from(other.1);
                spoil(&mut bytes, BlobFault::Corrupt);
                other.1 = bytes.into();
                let pair = if wrong_first { [other, part] } else { [part, other] };
                batch.parts.extend(pair);
            }
            Some(BlobFault::Last) => batch.last.push(part),
            _ => batch.parts.push(part),
        }
    }
}

/// Applies a fault to the bytes of an answer.
pub(super) fn spoil(data: &mut Vec<u8>, fault: BlobFault) {
    match fault {
        BlobFault::Corrupt => {
            if let Some(first) = data.first_mut() {
                *first ^= 0xff;
            }
        }
        BlobFault::CorruptAt(offset) => {
            let last = data.len().saturating_sub(1);
            let at = usize::try_from(offset).unwrap_or(last).min(last);
            if let Some(byte) = data.get_mut(at) {
                *byte ^= 0xff;
            }
        }
        BlobFault::Resize(by) => {
            let by = isize::try_from(by).unwrap_or(isize::MIN);
            let size = data.len().checked_add_signed(by).unwrap_or(0);
            data.resize(size, 0);
        }
        _ => {}
    }
}

/// Makes a zstd frame undecodable, by way of its magic number.
pub(super) fn garble(frame: &mut [u8]) {
    if let Some(first) = frame.first_mut() {
        *first ^= 0xff;
    }
}
