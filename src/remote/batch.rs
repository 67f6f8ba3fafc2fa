//! Small blobs, many in a request.
//!
//! `BatchReadBlobs` answers every digest on its own, in any order, and servers have been seen to leave some out, so
//! the answers are matched with the questions here: each digest gets exactly one, whatever came.

use std::{cell::RefCell, collections::HashMap};

use bazel_remote_apis::build::bazel::remote::execution::v2::{BatchReadBlobsRequest, compressor};
use bytes::Bytes;
use tonic::Code;
use zstd::bulk::Decompressor;

use super::{
    Attribution, BatchAnswer, Capabilities,
    client::{Client, MAX_MESSAGE, services},
    limits::{Halving, is_too_much},
    pool::Connections,
    reading::Collect,
    stream,
    wire::{self, Batch, BatchPart},
};
use crate::{
    digest::{Digest, DigestFunction},
    transport::{RemoteError, RemoteErrorKind},
};

/// The most digests in a request: 4,000 keep it under 400 KiB.
pub(crate) const MAX_DIGESTS: usize = 4000;

/// What one blob's answer has beside its bytes: digest and status, and the server's words about what went wrong.
const ANSWER_EACH: u64 = 1024;
/// What an answer may have beside all that.
const ANSWER_ROOM: u64 = 128 << 10;

type Answer = Result<Bytes, RemoteError>;

/// What is asked for, and the answer to each as far as there is one.
struct Asked<'d> {
    digests: &'d [Digest],
    answers: Vec<Option<Answer>>,
}

impl Asked<'_> {
    /// Leaves those of the places that may be asked for again. Gives why, or `None` if there are none: they fail for one
    /// reason, mostly, and the one that asks for the longest wait is obeyed.
    fn retain_retryable(&self, pending: &mut Vec<usize>) -> Option<RemoteError> {
        let retryable = |at: &usize| match &self.answers[*at] {
            Some(Err(error)) if error.is_retryable() => Some(error),
            _ => None,
        };
        pending.retain(|at| retryable(at).is_some());
        let errors = pending.iter().filter_map(retryable);
        errors.max_by_key(|error| error.retry_after).cloned()
    }
}

/// How blobs are asked for, by their places in [`Asked`].
#[derive(Default)]
struct Plan {
    /// Each is one request's worth, of one digest function.
    groups: Vec<Vec<usize>>,
    /// Too large for a batch.
    unbatched: Vec<usize>,
    /// With the place of the same blob before it.
    repeated: Vec<(usize, usize)>,
}

impl Plan {
    /// Answers what needs no request. A group has `most` bytes if it has more than one blob.
    fn of(asked: &mut Asked<'_>, most: u64, largest: u64) -> Self {
        let digests = asked.digests;
        let mut plan = Self::default();
        let mut first_of = HashMap::with_capacity(digests.len());
        let mut bytes = 0_u64;
        for (at, digest) in digests.iter().enumerate() {
            if digest.is_empty() {
                asked.answers[at] = Some(Ok(Bytes::new()));
                continue;
            }
            let first = *first_of.entry(digest).or_insert(at);
            if first != at {
                plan.repeated.push((at, first));
                continue;
            }
            if digest.size() > largest {
                plan.unbatched.push(at);
                continue;
            }
            let fits = |group: &&mut Vec<usize>| {
                bytes.saturating_add(digest.size()) <= most
                    && group.len() < MAX_DIGESTS
                    // A request names one digest function.
                    && group.last().is_none_or(|&last| digests[last].function() == digest.function())
            };
            if let Some(group) = plan.groups.last_mut().filter(fits) {
                group.push(at);
                bytes += digest.size();
            } else {
                plan.groups.push(vec![at]);
                bytes = digest.size();
            }
        }
        plan
    }
}

/// Blobs that were refused one after the other, alone as well, with nothing taken between them.
#[derive(Default)]
struct Refusals {
    alone: u32,
    last: Option<RemoteError>,
}

impl Refusals {
    /// After this many, neither the size of the request nor a single blob is the reason: the rest is not asked for one by one.
    const ENOUGH: u32 = 3;

    fn is_hopeless(&self) -> Option<&RemoteError> {
        self.last.as_ref().filter(|_| self.alone >= Self::ENOUGH)
    }
}

/// Reads blobs: as many requests as the limits ask for, one after the other. See
/// [`super::BlobStore::read_batch`].
pub(crate) async fn read(
    client: &Client,
    capabilities: &Capabilities,
    digests: &[Digest],
    attribution: &Attribution,
    avoid: bool,
) -> Vec<BatchAnswer> {
    let suspect = avoid;
    let avoid = if suspect {
        client.pool.carriers(digests)
    } else {
        Connections::default()
    };
    let mut asked = Asked {
        digests,
        answers: vec![None; digests.len()],
    };
    let most = client.learned.batch_bytes(capabilities.max_batch_bytes);
    let Plan {
        groups,
        mut unbatched,
        repeated,
    } = Plan::of(&mut asked, most, capabilities.max_batch_bytes);
    let reader = Reader {
        client,
        capabilities,
        attribution,
        avoid,
        suspect,
    };
    let mut refusals = Refusals::default();
    for group in groups {
        // The only other failure: a server may well have streams only.
        if reader
            .read_in_parts(group.clone(), &mut asked, &mut refusals)
            .await
            .is_err()
        {
            unbatched.extend(group);
        }
    }
    for at in unbatched {
        let answer = reader.read_alone(&digests[at]).await;
        asked.answers[at] = Some(answer);
    }
    for (at, first) in repeated {
        asked.answers[at] = asked.answers[first].clone();
    }
    digests
        .iter()
        .zip(asked.answers)
        .map(|(digest, answer)| {
            let answer = answer.unwrap_or_else(|| Err(unanswered(client, digest)));
            (digest.clone(), answer)
        })
        .collect()
}

/// Why a request was not even looked at.
enum Refusal {
    /// The server does not know the call.
    Unknown,
    /// It may be taken when it asks for less. With the places of the blobs that it is about.
    TooMuch(RemoteError, Vec<usize>),
}

/// How requests are made.
struct Reader<'a> {
    client: &'a Client,
    capabilities: &'a Capabilities,
    attribution: &'a Attribution,
    avoid: Connections,
    /// Bytes that were wrong came for one of these blobs: compression is left out, in case that was to blame.
    suspect: bool,
}

impl Reader<'_> {
    /// One request's worth of blobs, in halves where the server refuses to give as much.
    ///
    /// # Errors
    /// When the server does not know the call; every other failure is an answer.
    async fn read_in_parts(
        &self,
        group: Vec<usize>,
        asked: &mut Asked<'_>,
        refusals: &mut Refusals,
    ) -> Result<(), ()> {
        let mut halving = Halving::default();
        let mut refused = false;
        let mut parts = vec![group];
        while let Some(part) = parts.pop() {
            let bytes = part.iter().map(|&at| asked.digests[at].size()).sum();
            let (error, mut part) = match self.read_group(part, asked).await {
                Ok(()) => {
                    halving.taken(bytes);
                    *refusals = Refusals::default();
                    continue;
                }
                Err(Refusal::Unknown) => return Err(()),
                Err(Refusal::TooMuch(error, part)) => (error, part),
            };
            refused = true;
            if let Some(error) = refusals.is_hopeless() {
                part.iter()
                    .for_each(|&at| asked.answers[at] = Some(Err(error.clone())));
            } else if part.len() > 1 {
                tracing::debug!(%error, blobs = part.len(), "the server refused a batch; retrying with half of it");
                let second = part.split_off(part.len() / 2);
                parts.extend([second, part]);
            } else if let [at] = *part {
                let digest = &asked.digests[at];
                halving.refused_alone(digest.size());
                let answer = self.read_alone(digest).await;
                // Neither way: it is not for how much was asked.
                if matches!(&answer, Err(e) if e.kind == RemoteErrorKind::Rejected) {
                    refusals.alone += 1;
                    refusals.last = Some(error);
                }
                asked.answers[at] = Some(answer);
            }
        }
        if refused {
            halving.learn(&self.client.learned);
        }
        Ok(())
    }

    /// One request's worth of blobs, given by their places, tried again for those that may still come.
    async fn read_group(&self, mut pending: Vec<usize>, asked: &mut Asked<'_>) -> Result<(), Refusal> {
        let (client, digests) = (self.client, asked.digests);
        let Some(function) = pending.first().map(|&at| digests[at].function()) else {
            return Ok(());
        };
        let mut avoid = self.avoid;
        let mut plain = self.suspect || client.learned.plain_batches();
        let mut refused_zstd = false;
        let mut backoff = client.retry.start();
        loop {
            let context = client.context(format_args!("batch of {} blobs", pending.len()));
            let running = client.batches.begin(self.capabilities.zstd_batches && !plain);
            let others = BatchReadBlobsRequest {
                instance_name: client.instance(),
                digests: Vec::new(),
                acceptable_compressors: if running.zstd() {
                    vec![compressor::Value::Identity as i32, compressor::Value::Zstd as i32]
                } else {
                    Vec::new()
                },
                digest_function: function.wire(),
            };
            let request = wire::batch_request(&others, pending.iter().map(|&at| &digests[at]));
            let most = largest_answer(pending.iter().map(|&at| &digests[at]));
            let answer = client
                .once(
                    (services::CAS, &context),
                    self.attribution,
                    &mut avoid,
                    &request,
                    |channel, request| wire::batch_read_blobs(channel, request, most),
                )
                .await;
            let error = match answer {
                Ok((response, line)) => {
                    if refused_zstd {
                        client.learned.found_plain();
                    }
                    for &at in &pending {
                        client.pool.note(&digests[at], line.index);
                    }
                    running.brought(sort_out(client, function, &pending, response, asked));
                    match asked.retain_retryable(&mut pending) {
                        Some(worst) => worst,
                        None => return Ok(()),
                    }
                }
                // A proxy that hands on its backend's capabilities may not take its compressors.
                Err(failure)
                    if running.zstd()
                        && (is_too_much(&failure) || failure.code == Some(Code::Unimplemented)) =>
                {
                    (plain, refused_zstd) = (true, true);
                    continue;
                }
                Err(failure) if failure.code == Some(Code::Unimplemented) => return Err(Refusal::Unknown),
                Err(failure) if is_too_much(&failure) => {
                    return Err(Refusal::TooMuch(failure.error, pending));
                }
                Err(failure) => {
                    for &at in &pending {
                        asked.answers[at] = Some(Err(failure.error.clone()));
                    }
                    if !failure.error.is_retryable() {
                        return Ok(());
                    }
                    failure.error
                }
            };
            drop(running);
            if !backoff.wait(&error).await {
                return Ok(());
            }
        }
    }

    /// A blob that no batch may hold, as a stream.
    async fn read_alone(&self, digest: &Digest) -> Answer {
        let mut sink = Collect::default();
        stream::read(
            self.client,
            self.capabilities,
            digest,
            0,
            self.attribution,
            self.avoid,
            &mut sink,
        )
        .await?;
        Ok(sink.into_bytes())
    }
}

/// The most that an answer about these blobs is taken for, in bytes: enough for a server to add a thing or two, or to
/// say everything twice; but not so much that its answers, of which many are under way, fill the memory.
fn largest_answer<'d>(digests: impl Iterator<Item = &'d Digest>) -> usize {
    let blobs = digests.fold(0_u64, |sum, digest| {
        sum.saturating_add(digest.size() + ANSWER_EACH)
    });
    let most = blobs.saturating_mul(2).saturating_add(ANSWER_ROOM);
    usize::try_from(most).map_or(MAX_MESSAGE, |most| most.min(MAX_MESSAGE))
}

/// Matches a response with the digests asked for, each of which gets an answer. Says how many bytes came.
fn sort_out(
    client: &Client,
    function: DigestFunction,
    pending: &[usize],
    response: Batch,
    asked: &mut Asked<'_>,
) -> u64 {
    let digests = asked.digests;
    for &at in pending {
        asked.answers[at] = None;
    }
    // Servers answer in the order in which they were asked, mostly. Where one does not, a map finds the place.
    let mut next = 0;
    let mut places: Option<HashMap<&Digest, (usize, usize)>> = None;
    let mut bytes = 0;
    for part in response.responses {
        let raw = part.digest.as_ref();
        let found = match pending.get(next) {
            Some(&at) if raw.is_some_and(|raw| raw.is(&digests[at])) => Some((next, at)),
            _ => raw.and_then(|raw| raw.parse(function)).and_then(|digest| {
                let places = places.get_or_insert_with(|| {
                    let place = |(n, &at): (usize, &usize)| (&digests[at], (n, at));
                    pending.iter().enumerate().map(place).collect()
                });
                places.get(&digest).copied()
            }),
        };
        let at = found.map(|(n, at)| {
            next = n + 1;
            at
        });
        let Some(at) = at.filter(|&at| asked.answers[at].is_none()) else {
            tracing::debug!(
                cache = client.place(),
                digest = ?part.digest,
                "an unexpected or repeated response"
            );
            continue;
        };
        let answer = content(client, &digests[at], part);
        bytes += answer.as_ref().map_or(0, |data| data.len() as u64);
        asked.answers[at] = Some(answer);
    }
    for &at in pending {
        if asked.answers[at].is_none() {
            asked.answers[at] = Some(Err(unanswered(client, &digests[at])));
        }
    }
    bytes
}

/// The bytes of one answer, decompressed and of the right length.
fn content(client: &Client, digest: &Digest, answer: BatchPart) -> Answer {
    let context = || client.context(format_args!("blob {digest}"));
    let protocol = |message: String| RemoteError::protocol(context(), message);
    if let Some(status) = answer.status.filter(|s| s.code != Code::Ok as i32) {
        return Err(client.blob_error(&context(), &status));
    }
    let data = match compressor::Value::try_from(answer.compressor) {
        Ok(compressor::Value::Identity) => answer.data,
        Ok(compressor::Value::Zstd) => {
            // The size is one that fits a batch. A frame that holds more fails here, before it is unpacked.
            let size = usize::try_from(digest.size()).unwrap_or(usize::MAX);
            unpack(&answer.data, size)
                .map_err(|e| protocol(format!("not valid zstd data of {size} bytes: {e}")))?
                .into()
        }
        _ => {
            return Err(protocol(format!(
                "compressed with a compressor that was not requested (number {})",
                answer.compressor
            )));
        }
    };
    if data.len() as u64 != digest.size() {
        return Err(protocol(format!("the server sent {} bytes", data.len())));
    }
    Ok(data)
}

thread_local! {
    /// To make one costs as much as to unpack a small blob.
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Unpacks at most this many bytes.
fn unpack(packed: &[u8], size: usize) -> std::io::Result<Vec<u8>> {
    DECOMPRESSOR.with_borrow_mut(|kept| {
        let decompressor = match kept {
            Some(decompressor) => decompressor,
            None => kept.insert(Decompressor::new()?),
        };
        decompressor.decompress(packed, size)
    })
}

fn unanswered(client: &Client, digest: &Digest) -> RemoteError {
    RemoteError::protocol(
        client.context(format_args!("blob {digest}")),
        "missing from the server's response",
    )
}
