//! Several stores, asked one after the other.
//!
//! What a store does not have, the next one is asked for at once. One that fails three times in a row is passed over for a
//! while, and one that does not let us in at once ([`health`]). A blob that came with wrong bytes is asked for once more where
//! it came from, on another connection, and then of the others ([`memory`]). A blob is not found only if every store says so.

mod actions;
mod health;
mod memory;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::Instant;

use self::{
    health::{Health, News, Ticket},
    memory::{Memory, Trust, bit},
};
use super::{
    ActionStore, Attribution, BatchAnswer, BlobStore, Capabilities, Sink, Standing, actions::MetadataCache,
};
use crate::{
    digest::Digest,
    printable::printable,
    transport::{RemoteError, RemoteErrorKind},
};

/// Stores in the order in which they are asked.
pub(crate) struct Chain {
    members: Vec<Member>,
    memory: Memory,
    metadata: MetadataCache,
}

struct Member {
    store: Arc<dyn ActionStore>,
    /// As it is shown to people where a file came from.
    name: Arc<str>,
    health: Mutex<Health>,
}

impl Member {
    fn ask(&self) -> Result<Ticket, RemoteError> {
        self.health.lock().ask(Instant::now())
    }

    /// What it answers to a request that the ticket allows, and what that says of it.
    async fn asked<T>(
        &self,
        ticket: Result<Ticket, RemoteError>,
        answer: impl Future<Output = Result<T, RemoteError>>,
    ) -> Result<T, RemoteError> {
        let ticket = ticket?;
        let answer = answer.await;
        self.heard(ticket, answer.as_ref().err());
        answer
    }

    /// As [`Member::ask`], for what some stores answer without asking anybody: only a failure is to be reported.
    fn look(&self) -> Result<Ticket, RemoteError> {
        self.health.lock().look(Instant::now())
    }

    /// Takes in what came of a request, and logs when it changes what is asked.
    fn heard(&self, ticket: Ticket, error: Option<&RemoteError>) {
        let news = self.health.lock().heard(ticket, Instant::now(), error);
        let store = &*self.name;
        let error = error.map(tracing::field::display);
        match news {
            None => {}
            Some(News::PassedOver(delay)) => {
                tracing::warn!(store, error, ?delay, "a store is passed over for now");
            }
            Some(News::Back) => tracing::info!(store, "a store that was passed over answers again"),
        }
    }
}

/// What each store says of a blob that it did not give.
#[derive(Default)]
struct Refusals(Vec<(usize, RemoteError)>);

impl Chain {
    /// The most stores.
    pub(crate) const MOST: usize = 16;

    /// Of these, the first one first; those beyond [`Chain::MOST`] are left out.
    pub(crate) fn new(stores: Vec<Arc<dyn ActionStore>>) -> Self {
        let member = |store: Arc<dyn ActionStore>| Member {
            name: printable(&store.describe()).into(),
            store,
            health: Mutex::default(),
        };
        Self {
            members: stores.into_iter().take(Self::MOST).map(member).collect(),
            memory: Memory::default(),
            metadata: MetadataCache::new(),
        }
    }

    /// The error for what no store gave: "not found" only if all say so, and otherwise that of the store that is most
    /// likely to have it, with what all of them say.
    fn nobody(&self, what: impl FnOnce() -> String, refusals: Refusals) -> RemoteError {
        let mut refusals = refusals.0;
        if refusals.len() == 1
            && let Some((_, only)) = refusals.pop()
        {
            return only;
        }
        let best = refusals.iter().map(|(_, error)| error).min_by_key(|e| hope(e));
        let kind = best.map_or(RemoteErrorKind::NotFound, |error| error.kind);
        let retry_after = best.and_then(|error| error.retry_after);
        let said = |(store, error): &(usize, RemoteError)| {
            let name = self.members.get(*store).map_or("", |member| &*member.name);
            format!("{name}: {}", error.message)
        };
        let all: Vec<String> = refusals.iter().map(said).collect();
        RemoteError {
            retry_after,
            ..RemoteError::new(kind, what(), all.join("; "))
        }
    }

    /// Asks one store for small blobs. What it gave wrong before, and what comes unusable, is asked for once more, on
    /// another connection.
    async fn ask_batch(
        &self,
        number: usize,
        digests: &[Digest],
        attribution: &Attribution,
    ) -> Vec<BatchAnswer> {
        let Some(member) = self.members.get(number) else {
            return Vec::new();
        };
        let mut answers = Vec::with_capacity(digests.len());
        let (mut first, mut again) = (Vec::new(), Vec::new());
        for digest in digests {
            match self.memory.trust(digest, number) {
                Trust::Full => first.push(digest.clone()),
                Trust::Doubted => again.push(digest.clone()),
                Trust::None => answers.push((digest.clone(), Err(wrong_before(digest)))),
            }
        }
        for (avoid, asked) in [(false, first), (true, again)] {
            if asked.is_empty() {
                continue;
            }
            let mut given = self
                .ask_once(member, &asked, attribution, avoid, &mut answers)
                .await;
            if !given.is_empty() && !avoid {
                self.doubt(&given, number);
                given = self
                    .ask_once(member, &given, attribution, true, &mut answers)
                    .await;
            }
            self.doubt(&given, number);
            answers.extend(given.into_iter().map(|digest| {
                let error = wrong_before(&digest);
                (digest, Err(error))
            }));
        }
        answers
    }

    fn doubt(&self, digests: &[Digest], number: usize) {
        for digest in digests {
            self.memory.doubt(digest, bit(number));
        }
    }

    /// One request. Adds its answers, and gives those that cannot be used.
    async fn ask_once(
        &self,
        member: &Member,
        digests: &[Digest],
        attribution: &Attribution,
        avoid: bool,
        answers: &mut Vec<BatchAnswer>,
    ) -> Vec<Digest> {
        let ticket = match member.ask() {
            Ok(ticket) => ticket,
            Err(error) => {
                answers.extend(digests.iter().map(|d| (d.clone(), Err(error.clone()))));
                return Vec::new();
            }
        };
        let given = member.store.read_batch(digests, attribution, avoid).await;
        let failed = |(_, answer): &BatchAnswer| answer.as_ref().err().cloned();
        let all: Option<Vec<RemoteError>> = given.iter().map(failed).collect();
        // One that answers for one blob is there.
        let best = all.and_then(|all| all.into_iter().max_by_key(hope_of_answer));
        member.heard(ticket, best.as_ref());
        let mut unusable = Vec::new();
        for (digest, answer) in given {
            match answer {
                Err(error) if error.kind == RemoteErrorKind::Protocol => {
                    tracing::debug!(store = &*member.name, %error, "no usable answer");
                    unusable.push(digest);
                }
                answer => answers.push((digest, answer)),
            }
        }
        unusable
    }
}

fn wrong_before(digest: &Digest) -> RemoteError {
    let message = "it gave wrong bytes or no usable answer for this blob, twice";
    RemoteError::protocol(format!("reading {digest}"), message)
}

/// How likely a store has what it did not give: the lowest is the likeliest.
const fn hope(error: &RemoteError) -> u8 {
    use RemoteErrorKind as Kind;
    match error.kind {
        Kind::Unavailable | Kind::Timeout => 0,
        Kind::Protocol | Kind::Sink => 1,
        Kind::Denied | Kind::Unauthenticated => 2,
        Kind::Rejected => 3,
        Kind::Config => 4,
        Kind::NotFound => 5,
    }
}

/// Which error of a batch says most about the store: that it answers goes before that it refuses, and that before silence.
const fn hope_of_answer(error: &RemoteError) -> u8 {
    use RemoteErrorKind as Kind;
    match error.kind {
        Kind::NotFound | Kind::Protocol | Kind::Rejected | Kind::Sink => 2,
        Kind::Denied | Kind::Unauthenticated | Kind::Config => 1,
        Kind::Unavailable | Kind::Timeout => 0,
    }
}

#[async_trait]
impl BlobStore for Chain {
    /// Those of the first store that answers, which is asked first.
    async fn capabilities(&self) -> Result<Capabilities, RemoteError> {
        let mut refusals = Refusals::default();
        for (number, member) in self.members.iter().enumerate() {
            match member.asked(member.look(), member.store.capabilities()).await {
                Ok(capabilities) => return Ok(capabilities),
                Err(error) => refusals.0.push((number, error)),
            }
        }
        Err(self.nobody(|| "the remote caches".to_owned(), refusals))
    }

    async fn read_batch(&self, digests: &[Digest], attribution: &Attribution, _: bool) -> Vec<BatchAnswer> {
        let mut found: HashMap<Digest, Bytes> = HashMap::with_capacity(digests.len());
        let mut refusals: HashMap<Digest, Refusals> = HashMap::new();
        let mut seen = HashSet::with_capacity(digests.len());
        let asked = digests.iter().filter(|digest| !digest.is_empty());
        let mut rest: Vec<Digest> = asked.filter(|digest| seen.insert(*digest)).cloned().collect();
        for number in 0..self.members.len() {
            if rest.is_empty() {
                break;
            }
            for (digest, answer) in self.ask_batch(number, &rest, attribution).await {
                match answer {
                    Ok(bytes) => {
                        self.memory.gave(&digest, 0, number);
                        found.insert(digest, bytes);
                    }
                    Err(error) => refusals.entry(digest).or_default().0.push((number, error)),
                }
            }
            rest.retain(|digest| !found.contains_key(digest));
        }
        let answer = |digest: &Digest| {
            let answer = match found.get(digest) {
                Some(bytes) => Ok(bytes.clone()),
                None if digest.is_empty() => Ok(Bytes::new()),
                None => {
                    let refusals = refusals.remove(digest).unwrap_or_default();
                    Err(self.nobody(|| format!("reading {digest}"), refusals))
                }
            };
            (digest.clone(), answer)
        };
        digests.iter().map(answer).collect()
    }

    async fn read_stream(
        &self,
        digest: &Digest,
        offset: u64,
        attribution: &Attribution,
        _: bool,
        sink: &mut dyn Sink,
    ) -> Result<(), RemoteError> {
        let mut counted = Counted {
            sink,
            at: offset,
            end: digest.size(),
        };
        let mut refusals = Refusals::default();
        let mut givers = 0;
        for (number, member) in self.members.iter().enumerate() {
            let tries = match self.memory.trust(digest, number) {
                Trust::Full => &[false, true][..],
                Trust::Doubted => &[true],
                Trust::None => {
                    refusals.0.push((number, wrong_before(digest)));
                    continue;
                }
            };
            for (left, &avoid) in (0..tries.len()).rev().zip(tries) {
                let ticket = match member.ask() {
                    Ok(ticket) => ticket,
                    Err(error) => {
                        refusals.0.push((number, error));
                        break;
                    }
                };
                // What another store began is gone on with here.
                let at = counted.at;
                let read = member
                    .store
                    .read_stream(digest, at, attribution, avoid, &mut counted)
                    .await;
                if counted.at > at {
                    givers |= bit(number);
                }
                member.heard(ticket, read.as_ref().err());
                let Err(error) = read else {
                    self.memory.gave(digest, givers, number);
                    return Ok(());
                };
                if error.kind == RemoteErrorKind::Sink {
                    return Err(error);
                }
                let is_wrong = error.kind == RemoteErrorKind::Protocol;
                if is_wrong && counted.at > at {
                    // Nothing can go on after bytes that may be wrong: the reader starts again.
                    self.memory.gave(digest, givers, number);
                    self.memory.blame(digest);
                    return Err(error);
                }
                if is_wrong {
                    self.memory.doubt(digest, bit(number));
                }
                if !is_wrong || left == 0 {
                    refusals.0.push((number, error));
                    break;
                }
            }
        }
        self.memory.gave_up(digest);
        Err(self.nobody(|| format!("reading {digest}"), refusals))
    }

    async fn find_missing(
        &self,
        digests: &[Digest],
        attribution: &Attribution,
    ) -> Result<Vec<Digest>, RemoteError> {
        let mut rest = digests.to_vec();
        let mut refusals = Refusals::default();
        for (number, member) in self.members.iter().enumerate() {
            if rest.is_empty() {
                break;
            }
            let answer = member.store.find_missing(&rest, attribution);
            match member.asked(member.ask(), answer).await {
                Ok(missing) => rest = missing,
                Err(error) => refusals.0.push((number, error)),
            }
        }
        // A store that did not answer may have what the others have not.
        if rest.is_empty() || refusals.0.is_empty() {
            return Ok(rest);
        }
        Err(self.nobody(|| format!("looking for {} blobs", rest.len()), refusals))
    }

    fn describe(&self) -> String {
        let all: Vec<&str> = self.members.iter().map(|member| &*member.name).collect();
        all.join(", ")
    }

    fn standing(&self) -> Vec<Standing> {
        let now = Instant::now();
        let members = self.members.iter().map(|member| Standing {
            name: member.name.to_string(),
            passed_over: member.health.lock().passed_over(now),
        });
        members.collect()
    }

    fn origin(&self, digest: &Digest) -> Option<Arc<str>> {
        let member = self.members.get(self.memory.last(digest)?)?;
        Some(Arc::clone(&member.name))
    }

    fn distrust(&self, digest: &Digest) -> bool {
        let Some(blamed) = self.memory.blame(digest) else {
            return false;
        };
        let mut hope = false;
        for (number, member) in self.members.iter().enumerate() {
            if blamed & bit(number) != 0 {
                tracing::warn!(store = &*member.name, %digest, "a store gave wrong bytes");
            }
            hope |= self.memory.trust(digest, number) != Trust::None;
        }
        hope
    }
}

/// A sink that knows how far a blob has come: the next store goes on from there. Takes no more than the blob has.
struct Counted<'a> {
    sink: &'a mut dyn Sink,
    at: u64,
    end: u64,
}

#[async_trait]
impl Sink for Counted<'_> {
    async fn write(&mut self, mut bytes: Bytes) -> io::Result<()> {
        let room = self.end.saturating_sub(self.at);
        bytes.truncate(usize::try_from(room).unwrap_or(usize::MAX));
        self.at += bytes.len() as u64;
        self.sink.write(bytes).await
    }
}
