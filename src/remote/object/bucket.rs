//! A bucket's objects, by name.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt as _, stream::BoxStream};
use object_store::{
    GetOptions, GetRange,
    list::{PaginatedListOptions, PaginatedListResult},
    path::{DELIMITER, Path},
};
use parking_lot::Mutex;
use tokio::{sync::OnceCell, time::Instant};

use super::{
    credentials::{self, Environment, Opened},
    fault::{Broken, Refusal, explain, find},
    service::{StoredSha256, Streamed},
};
use crate::{
    remote::{
        RemoteOptions,
        retry::{RetryPolicy, SystemTimer},
        stall::StallWatch,
    },
    transport::{BucketAddress, RemoteError, RemoteErrorKind, bucket::Provider},
};

/// The most names that a listing may have.
const MAX_LISTED: usize = 1_000_000;
/// The most bytes of all names in a listing.
const MAX_NAMES: usize = 256 << 20;
/// How long getting credentials may take.
const CREDENTIALS: Duration = Duration::from_secs(20);
/// How long those of EC2's metadata service may take.
const METADATA: Duration = Duration::from_secs(5);
/// What to do where they cannot be got.
const PUBLIC: &str = "add anonymous=yes if the bucket is public";
/// The same, where the metadata service has none.
const NO_ROLE: &str = "give the machine a role, set credentials in the environment, or add anonymous=yes if the bucket \
                       is public";
/// How long to wait before asking again for credentials that were not available.
const UNREADY: Duration = Duration::from_secs(10);

/// An object of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listed {
    /// Its name below the address's prefix.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// What changes when the object does, as the store says it.
    pub etag: Option<String>,
}

/// An object that is being read.
pub(crate) struct Reading {
    /// The size of the whole object in bytes.
    pub size: u64,
    /// What changes when the object does, as the store says it.
    pub etag: Option<String>,
    context: String,
    stream: BoxStream<'static, object_store::Result<Bytes>>,
    watch: StallWatch,
    /// Bytes that come and were not asked for.
    skip: u64,
}

impl fmt::Debug for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reading")
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl Reading {
    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// When the connection breaks, or brings too little for too long. What is missing may be asked for again, from its
    /// offset and with the same ETag.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, RemoteError> {
        loop {
            let before = Instant::now();
            let next = tokio::time::timeout(self.watch.left(), self.stream.next()).await;
            let waited = before.elapsed();
            let stalled = || {
                let message = "stalled: the store sends next to nothing";
                RemoteError::timeout(self.context.clone(), message)
            };
            let mut piece = match next {
                Err(_) if self.watch.is_stalled(waited) => return Err(stalled()),
                Err(_) => continue,
                Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => return Err(explain(self.context.clone(), &error)),
                Ok(Some(Ok(piece))) => piece,
            };
            if self.watch.brought(piece.len(), waited) {
                return Err(stalled());
            }
            let skipped = piece.len().min(usize::try_from(self.skip).unwrap_or(usize::MAX));
            self.skip -= skipped as u64;
            let piece = piece.split_off(skipped);
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
    }
}

/// A bucket, as an address has it.
pub(crate) struct Bucket {
    address: BucketAddress,
    opened: Opened,
    options: RemoteOptions,
    retry: RetryPolicy,
    /// Whether we may list it: if not, S3 does not distinguish what is missing from what is forbidden.
    listable: OnceCell<bool>,
    /// Whether the bucket is known to be there, so that a bare 404 is about an object.
    there: AtomicBool,
    /// Why there were no credentials, and until when nobody asks for them again.
    unready: Mutex<Option<(Instant, (RemoteErrorKind, String))>>,
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bucket({})", self.address)
    }
}

impl Bucket {
    /// Opens the bucket at the options' address, with credentials from the environment and from files. Connects nothing
    /// yet.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`] when it is the address of something else, or the credentials cannot be used.
    pub(crate) fn open(options: &RemoteOptions) -> Result<Self, RemoteError> {
        Self::open_in(options, &Environment::of_process())
    }

    pub(super) fn open_in(options: &RemoteOptions, environment: &Environment) -> Result<Self, RemoteError> {
        let endpoint = &options.connect.endpoint;
        let address = endpoint
            .bucket()
            .ok_or_else(|| RemoteError::config(endpoint.to_string(), "is not the address of a bucket"))?;
        Ok(Self {
            opened: credentials::open(options, address, environment)?,
            address: address.clone(),
            options: options.clone(),
            retry: RetryPolicy::new(
                options.retries,
                options.max_retry_delay,
                std::sync::Arc::new(SystemTimer),
            ),
            listable: OnceCell::new(),
            there: AtomicBool::new(false),
            unready: Mutex::new(None),
        })
    }

    /// The address, as it was given.
    pub(crate) const fn address(&self) -> &BucketAddress {
        &self.address
    }

    pub(super) const fn retry(&self) -> &RetryPolicy {
        &self.retry
    }

    /// The objects right below the address's prefix and the segments `below`, which may be empty. In the order of their
    /// names. What is further below is not looked at.
    ///
    /// # Errors
    /// When the store cannot be asked, does not let us list, or has more than a million.
    pub(crate) async fn list(&self, below: &str) -> Result<Vec<Listed>, RemoteError> {
        let context = format!("listing {:?} in {}", below, self.address);
        self.retry.run(|| self.list_once(&context, below)).await
    }

    async fn list_once(&self, context: &str, below: &str) -> Result<Vec<Listed>, RemoteError> {
        self.ready(context).await?;
        let prefix = self.path(context, below)?;
        let mut listed = Vec::new();
        let (mut seen, mut names) = (0, 0);
        let mut page_token = None;
        loop {
            let page = self.page(context, &prefix, page_token.clone()).await?;
            let page = page.map_err(|e| self.refused(context.to_owned(), &e))?;
            self.there.store(true, Relaxed);
            seen += 1 + page.result.common_prefixes.len() + page.result.objects.len();
            for found in page.result.objects {
                let whole = found.location.as_ref();
                let name = match self.address.prefix.as_str() {
                    "" => Some(whole),
                    prefix => whole.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('/')),
                };
                names += whole.len();
                // The prefix itself may be an object's name, too.
                if let Some(name) = name {
                    listed.push(Listed {
                        name: name.to_owned(),
                        size: found.size,
                        etag: found.e_tag,
                    });
                }
            }
            if seen > MAX_LISTED || names > MAX_NAMES {
                let message =
                    format!("there are more than {MAX_LISTED} objects, or their names are too long");
                return Err(RemoteError::rejected(context, message));
            }
            if page.page_token.is_none() {
                break;
            }
            if page.page_token == page_token {
                let message = "the store's listing does not go on";
                return Err(RemoteError::protocol(context, message));
            }
            page_token = page.page_token;
        }
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(listed)
    }

    /// A page of a listing of what is right below a prefix.
    async fn page(
        &self,
        context: &str,
        prefix: &Path,
        page_token: Option<String>,
    ) -> Result<object_store::Result<PaginatedListResult>, RemoteError> {
        let below = format!("{prefix}/");
        let below = (below != "/").then_some(&*below);
        let options = PaginatedListOptions {
            delimiter: Some(DELIMITER.into()),
            page_token,
            ..PaginatedListOptions::default()
        };
        let stall = self.options.stall_timeout;
        let page = tokio::time::timeout(stall, self.opened.pages.list_paginated(below, options)).await;
        page.map_err(|_| RemoteError::timeout(context, format!("no answer within {stall:?}")))
    }

    /// Reads an object, by its name below the address's prefix, from a byte on: the first bytes when the future ends, the
    /// others as they are taken. With `if_match`, only if it still has that ETag. Asks once.
    ///
    /// # Errors
    /// [`RemoteErrorKind::NotFound`] when it is not there, [`RemoteErrorKind::Protocol`] when it has another ETag or ends
    /// before `offset`.
    pub(crate) async fn get(
        &self,
        name: &str,
        offset: u64,
        if_match: Option<&str>,
    ) -> Result<Reading, RemoteError> {
        let range = (offset > 0).then_some(GetRange::Offset(offset));
        self.read(name, range, if_match).await
    }

    /// The first bytes of an object, at most this many, and its size.
    pub(super) async fn beginning(&self, name: &str, bytes: u64) -> Result<(Vec<u8>, Reading), RemoteError> {
        let mut reading = self.read(name, Some(GetRange::Bounded(0..bytes)), None).await?;
        let mut beginning = Vec::new();
        while let Some(piece) = reading.next().await? {
            beginning.extend_from_slice(&piece);
            if beginning.len() as u64 > bytes {
                let message = "the store sent more than was asked for";
                return Err(RemoteError::protocol(reading.context, message));
            }
        }
        Ok((beginning, reading))
    }

    async fn read(
        &self,
        name: &str,
        range: Option<GetRange>,
        if_match: Option<&str>,
    ) -> Result<Reading, RemoteError> {
        let context = self.context(name);
        self.ready(&context).await?;
        let path = self.path(&context, name)?;
        let mut asked = GetOptions {
            range,
            if_match: if_match.map(str::to_owned),
            ..GetOptions::default()
        };
        asked.extensions.insert(Streamed);
        let mut got = self.opened.store.get_opts(&path, asked.clone()).await;
        if let (Err(error), Some(profile)) = (&got, &self.opened.profile)
            && explain(context.clone(), error).kind == RemoteErrorKind::Unauthenticated
        {
            // They may have expired meanwhile, and the profile may have newer ones.
            profile.forget();
            self.ready(&context).await?;
            got = self.opened.store.get_opts(&path, asked.clone()).await;
        }
        let mut skip = 0;
        if let (Err(error), Some(GetRange::Offset(offset))) = (&got, &asked.range)
            && matches!(find(error), Some(Broken::RangeIgnored))
        {
            skip = *offset;
            asked.range = None;
            got = self.opened.store.get_opts(&path, asked).await;
        }
        let got = match got {
            Ok(got) => got,
            Err(error) => return Err(self.missing_or_forbidden(context, &error).await),
        };
        self.there.store(true, Relaxed);
        let size = got.meta.size;
        if skip > size {
            let message = format!("has only {size} bytes");
            return Err(RemoteError::protocol(context, message));
        }
        Ok(Reading {
            size,
            etag: got.meta.e_tag.clone(),
            context,
            stream: got.into_stream(),
            watch: StallWatch::new(self.options.stall_timeout, self.options.min_throughput),
            skip,
        })
    }

    /// The size of an object in bytes; `None` if it is not there.
    pub(super) async fn size(&self, name: &str) -> Result<Option<u64>, RemoteError> {
        let context = self.context(name);
        self.ready(&context).await?;
        let path = self.path(&context, name)?;
        let asked = GetOptions {
            head: true,
            ..GetOptions::default()
        };
        let error = match self.opened.store.get_opts(&path, asked).await {
            Ok(found) => {
                self.there.store(true, Relaxed);
                return Ok(Some(found.meta.size));
            }
            Err(error) => error,
        };
        // An answer to HEAD has no body that would say what is wrong.
        let vague = find(&error).is_some_and(|refusal: &Refusal| {
            refusal.is_vague() && (refusal.status != 404 || !self.there.load(Relaxed))
        });
        let error = if vague {
            match self.read(name, Some(GetRange::Bounded(0..1)), None).await {
                Ok(reading) => return Ok(Some(reading.size)),
                Err(error) => error,
            }
        } else {
            self.refused(context, &error)
        };
        if error.is_not_found() {
            Ok(None)
        } else {
            Err(error)
        }
    }

    /// Whether there are objects below a name, as far as the store's first answer says.
    pub(crate) async fn has_below(&self, name: &str) -> Result<bool, RemoteError> {
        let context = self.context(name);
        let prefix = self.path(&context, name)?;
        let page = self.page(&context, &prefix, None).await?;
        Ok(page.is_ok_and(|page| !page.result.objects.is_empty() || !page.result.common_prefixes.is_empty()))
    }

    /// The SHA-256 that S3 keeps of an object, if it was uploaded with one; no other store has any.
    ///
    /// # Errors
    /// When the store cannot be asked, refuses, or has no such object.
    pub(crate) async fn sha256(&self, name: &str) -> Result<Option<[u8; 32]>, RemoteError> {
        if self.address.provider != Provider::S3 {
            return Ok(None);
        }
        let context = self.context(name);
        let path = self.path(&context, name)?;
        let ask = async || {
            self.ready(&context).await?;
            let asked = GetOptions {
                head: true,
                ..GetOptions::default()
            };
            let found = self.opened.store.get_opts(&path, asked).await;
            let found = found.map_err(|error| self.refused(context.clone(), &error))?;
            Ok(found.extensions.get::<StoredSha256>().map(|sum| sum.0))
        };
        self.retry.run(ask).await
    }

    /// Asks once whether the bucket is there and lets us in.
    pub(super) async fn probe(&self, name: &str) -> Result<(), RemoteError> {
        let context = self.address.to_string();
        self.ready(&context).await?;
        match self.list_one(&context).await {
            // Reading may be allowed where listing is not.
            Err(error) if error.kind == RemoteErrorKind::Denied => match self.size(name).await {
                Ok(_) => Ok(()),
                Err(_) => Err(error),
            },
            ended => ended,
        }
    }

    async fn list_one(&self, context: &str) -> Result<(), RemoteError> {
        let prefix = self.path(context, "")?;
        match self.page(context, &prefix, None).await? {
            // What cannot be read of a listing is one, too.
            Err(error)
                if !matches!(error, object_store::Error::InvalidPath { .. })
                    && find::<Broken>(&error) != Some(&Broken::Cut) =>
            {
                Err(self.refused(context.to_owned(), &error))
            }
            _ => {
                self.there.store(true, Relaxed);
                Ok(())
            }
        }
    }

    /// The error of a read. A missing object is reported as 403 where we may not list, and a missing bucket by some as a bare
    /// 404.
    async fn missing_or_forbidden(&self, context: String, error: &object_store::Error) -> RemoteError {
        let explained = self.refused(context.clone(), error);
        let Some(refusal) = find::<Refusal>(error) else {
            return explained;
        };
        if refusal.is_vague() && refusal.status == 404 && !self.there.load(Relaxed) {
            return match self.list_one(&self.address.to_string()).await {
                Err(error) if matches!(error.kind, RemoteErrorKind::NotFound | RemoteErrorKind::Config) => {
                    RemoteError {
                        kind: RemoteErrorKind::Config,
                        message: format!("there is no such bucket ({})", error.message),
                        ..error
                    }
                }
                _ => explained,
            };
        }
        // Without credentials it is more likely that nothing there is ours to read, until something was.
        let is_anonymous = self.opened.is_anonymous() && !self.there.load(Relaxed);
        // Azure says.
        let is_clear = self.address.provider == Provider::Azure;
        if explained.kind != RemoteErrorKind::Denied || !refusal.may_be_missing() || is_anonymous || is_clear
        {
            return explained;
        }
        let listable = self
            .listable
            .get_or_try_init(|| async {
                match self.list_one(&context).await {
                    Ok(()) => Ok(true),
                    Err(error) if error.kind == RemoteErrorKind::Denied => Ok(false),
                    Err(error) => Err(error),
                }
            })
            .await;
        if listable == Ok(&false) {
            let message = format!(
                "not in the bucket, or not ours to read: the store does not say, since we may not list ({})",
                explained.message
            );
            return RemoteError::new(RemoteErrorKind::NotFound, context, message);
        }
        explained
    }

    /// Gets the credentials, if they are not here yet.
    async fn ready(&self, context: &str) -> Result<(), RemoteError> {
        let unready = || self.unready.lock();
        let failed = |(kind, reason): (RemoteErrorKind, String)| {
            let message = format!("failed to get credentials ({}): {reason}", self.opened.shown);
            RemoteError::new(kind, context, message)
        };
        let known = unready().clone().filter(|(until, _)| *until > Instant::now());
        if let Some((_, known)) = known {
            return Err(failed(known));
        }
        let is_machine = self.opened.is_of_the_machine();
        let patience = match self.opened.is_of_ec2() {
            true => METADATA,
            false => CREDENTIALS.max(self.options.connect.credential_helper_timeout),
        };
        let reason = match tokio::time::timeout(patience, (self.opened.ready)()).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => {
                let explained = explain(context.to_owned(), &error);
                let kind = if explained.is_retryable() {
                    explained.kind
                } else {
                    RemoteErrorKind::Unauthenticated
                };
                (kind, explained.message)
            }
            Err(_) => (
                RemoteErrorKind::Timeout,
                match is_machine {
                    true => format!("no answer within {patience:?}"),
                    false => format!("no answer within {patience:?}; {PUBLIC}"),
                },
            ),
        };
        let reason = match is_machine {
            true => (reason.0, format!("{}; {NO_ROLE}", reason.1)),
            false => reason,
        };
        // Anyone else who waits for them hears the same, instead of waiting as long once more.
        *unready() = Some((Instant::now() + UNREADY, reason.clone()));
        Err(failed(reason))
    }

    fn refused(&self, context: String, error: &object_store::Error) -> RemoteError {
        let mut explained = explain(context, error);
        if find::<Refusal>(error).is_some_and(Refusal::is_changed) {
            explained.message = "the object changed while it was read".to_owned();
        }
        if explained.kind == RemoteErrorKind::Unauthenticated
            && let Some(profile) = &self.opened.profile
        {
            profile.forget();
        }
        if matches!(
            explained.kind,
            RemoteErrorKind::Denied | RemoteErrorKind::Unauthenticated
        ) {
            explained.message = format!("{}; asked with {}", explained.message, self.opened.shown);
        }
        explained
    }

    fn context(&self, name: &str) -> String {
        format!("object {:?} in {}", name, self.address)
    }

    fn path(&self, context: &str, name: &str) -> Result<Path, RemoteError> {
        let whole = match (self.address.prefix.as_str(), name.trim_end_matches('/')) {
            ("", name) => name.to_owned(),
            (prefix, "") => prefix.to_owned(),
            (prefix, name) => format!("{prefix}/{name}"),
        };
        Path::parse(&whole).map_err(|_| {
            let message = "the name has an empty, \".\" or \"..\" segment or a control character";
            RemoteError::rejected(context, message)
        })
    }
}
