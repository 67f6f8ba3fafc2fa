//! Small blobs, many in a request.
//!
//! `BatchReadBlobs` answers every digest on its own, in any order, and servers have been seen to leave some out, so
//! the answers are matched with the questions here: each digest gets exactly one, whatever came.

use std::collections::HashMap;

use bazel_remote_apis::build::bazel::remote::execution::v2::{BatchReadBlobsRequest, compressor};
use bytes::Bytes;
use futures::future::BoxFuture;
use tonic::Code;

use super::{
    Attribution, BatchAnswer, Capabilities, Sink,
    channel::Connections,
    client::{Client, Failure, from_wire, to_wire},
    error::{RemoteError, RemoteErrorKind},
    status::from_rpc,
    stream,
    wire::{self, Batch, BatchPart},
};
use crate::digest::{Digest, DigestFunction};

/// The most digests in a request: 4,000 keep it under 400 KiB.
pub(crate) const MAX_DIGESTS: usize = 4000;

type Answer = Result<Bytes, RemoteError>;

/// Reads blobs: as many requests as the limits ask for, one after the other. See
/// [`super::BlobStore::read_batch`].
pub(crate) async fn read(
    client: &Client,
    capabilities: &Capabilities,
    digests: &[Digest],
    attribution: &Attribution,
    avoid: bool,
) -> Vec<BatchAnswer> {
    let mut answers: HashMap<&Digest, Answer> = HashMap::with_capacity(digests.len());
    let avoid = if avoid {
        client.pool.carriers(digests)
    } else {
        Connections::default()
    };
    let mut groups: Vec<Vec<&Digest>> = Vec::new();
    let (mut group, mut bytes) = (Vec::new(), 0_u64);
    let mut unbatched = Vec::new();
    for digest in digests {
        if answers.contains_key(digest) {
            continue;
        }
        // Holds the place against repetition; everything below replaces it.
        answers.insert(digest, Ok(Bytes::new()));
        if digest.is_empty() {
            continue;
        }
        if digest.size() > capabilities.max_batch_bytes {
            unbatched.push(digest);
            continue;
        }
        let fits = bytes.saturating_add(digest.size()) <= capabilities.max_batch_bytes
            && group.len() < MAX_DIGESTS
            // A request names one digest function.
            && group.last().is_none_or(|last: &&Digest| last.function() == digest.function());
        if !fits {
            groups.push(std::mem::take(&mut group));
            bytes = 0;
        }
        bytes += digest.size();
        group.push(digest);
    }
    groups.push(group);
    for group in groups {
        if group.is_empty() {
            continue;
        }
        match read_group(client, capabilities, &group, attribution, avoid).await {
            Ok(read) => answers.extend(read),
            // A server may well have streams only.
            Err(failure) if failure.code == Some(Code::Unimplemented) => unbatched.extend(group),
            Err(failure) => answers.extend(group.into_iter().map(|d| (d, Err(failure.error.clone())))),
        }
    }
    for digest in unbatched {
        let answer = read_alone(client, capabilities, digest, attribution, avoid).await;
        answers.insert(digest, answer);
    }
    digests
        .iter()
        .map(|digest| {
            let answer = answers
                .get(digest)
                .cloned()
                .unwrap_or_else(|| Err(unanswered(client, digest)));
            (digest.clone(), answer)
        })
        .collect()
}

/// One request's worth of blobs, tried again for those that may still come.
///
/// # Errors
/// When the server does not know the call; every other failure is an answer.
async fn read_group<'d>(
    client: &Client,
    capabilities: &Capabilities,
    group: &[&'d Digest],
    attribution: &Attribution,
    mut avoid: Connections,
) -> Result<HashMap<&'d Digest, Answer>, Failure> {
    let Some(function) = group.first().map(|d| d.function()) else {
        return Ok(HashMap::new());
    };
    let compressors = if capabilities.zstd_batches && client.options.compression {
        vec![compressor::Value::Identity as i32, compressor::Value::Zstd as i32]
    } else {
        Vec::new()
    };
    let mut answers = HashMap::with_capacity(group.len());
    let mut pending = group.to_vec();
    let mut backoff = client.retry.start();
    loop {
        let context = client.context(format_args!("batch of {} blobs", pending.len()));
        let request = BatchReadBlobsRequest {
            instance_name: client.instance(),
            digests: pending.iter().map(|d| to_wire(d)).collect(),
            acceptable_compressors: compressors.clone(),
            digest_function: function.wire(),
        };
        let answer = client
            .once(
                &context,
                attribution,
                &mut avoid,
                &request,
                wire::batch_read_blobs,
            )
            .await;
        let error = match answer {
            Ok((response, index)) => {
                let (done, failed) = sort_out(client, function, &pending, response);
                for digest in done.keys() {
                    client.pool.note(digest, index);
                }
                answers.extend(done);
                // They fail for one reason, mostly; the one that asks for the longest wait is obeyed.
                let worst = failed.values().max_by_key(|e| e.retry_after).cloned();
                pending.retain(|d| failed.contains_key(d));
                answers.extend(failed.into_iter().map(|(d, e)| (d, Err(e))));
                let Some(worst) = worst else {
                    return Ok(answers);
                };
                worst
            }
            Err(failure) if failure.code == Some(Code::Unimplemented) => return Err(failure),
            Err(failure) => {
                answers.extend(pending.iter().map(|&d| (d, Err(failure.error.clone()))));
                if !failure.error.is_retryable() {
                    return Ok(answers);
                }
                failure.error
            }
        };
        if !backoff.wait(&error).await {
            return Ok(answers);
        }
    }
}

/// Matches a response with the digests asked for: what is settled, and what may come when asked again.
fn sort_out<'d>(
    client: &Client,
    function: DigestFunction,
    asked: &[&'d Digest],
    response: Batch,
) -> (HashMap<&'d Digest, Answer>, HashMap<&'d Digest, RemoteError>) {
    let mut open: HashMap<Digest, &'d Digest> = asked.iter().map(|&d| (d.clone(), d)).collect();
    let mut done = HashMap::with_capacity(asked.len());
    let mut failed = HashMap::new();
    for answer in response.responses {
        let digest = answer.digest.as_ref().and_then(|d| from_wire(function, d));
        let Some(digest) = digest.and_then(|d| open.remove(&d)) else {
            tracing::debug!(
                cache = client.place(),
                digest = ?answer.digest,
                "an answer that nobody asked for, or a second one"
            );
            continue;
        };
        match content(client, digest, answer) {
            Err(error) if error.is_retryable() => {
                failed.insert(digest, error);
            }
            settled => {
                done.insert(digest, settled);
            }
        }
    }
    done.extend(open.into_values().map(|d| (d, Err(unanswered(client, d)))));
    (done, failed)
}

/// The bytes of one answer, decompressed and of the right length.
fn content(client: &Client, digest: &Digest, answer: BatchPart) -> Answer {
    let context = || client.context(format_args!("blob {digest}"));
    let protocol = |message: String| RemoteError::new(RemoteErrorKind::Protocol, context(), message);
    if let Some(status) = answer.status.filter(|s| s.code != Code::Ok as i32) {
        return Err(from_rpc(&context(), &status));
    }
    let data = match compressor::Value::try_from(answer.compressor) {
        Ok(compressor::Value::Identity) => answer.data,
        Ok(compressor::Value::Zstd) => {
            // The size is one that fits a batch. A frame that holds more fails here, before it is unpacked.
            let size = usize::try_from(digest.size()).unwrap_or(usize::MAX);
            zstd::bulk::decompress(&answer.data, size)
                .map_err(|e| protocol(format!("no zstd data of {size} bytes: {e}")))?
                .into()
        }
        _ => {
            return Err(protocol(format!(
                "compressed by a method that was not asked for (number {})",
                answer.compressor
            )));
        }
    };
    if data.len() as u64 != digest.size() {
        return Err(protocol(format!("the server sent {} bytes", data.len())));
    }
    Ok(data)
}

fn unanswered(client: &Client, digest: &Digest) -> RemoteError {
    RemoteError::new(
        RemoteErrorKind::Protocol,
        client.context(format_args!("blob {digest}")),
        "the server's answer leaves it out",
    )
}

/// A blob that no batch may hold, as a stream.
async fn read_alone(
    client: &Client,
    capabilities: &Capabilities,
    digest: &Digest,
    attribution: &Attribution,
    avoid: Connections,
) -> Answer {
    let mut sink = Collect(Vec::new());
    stream::read(client, capabilities, digest, 0, attribution, avoid, &mut sink).await?;
    Ok(sink.0.into())
}

/// Keeps a stream's bytes. The stream ends at the digest's size.
pub(crate) struct Collect(pub(crate) Vec<u8>);

impl Sink for Collect {
    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), String>> {
        self.0.extend_from_slice(&bytes);
        Box::pin(std::future::ready(Ok(())))
    }
}
