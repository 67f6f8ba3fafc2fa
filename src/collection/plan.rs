//! Which archives to fetch, and what their bytes must be.

use std::{borrow::Cow, collections::HashSet, io, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use tokio::task::spawn_blocking;

use super::{Checksum, Checksums, Choice, Collection, CollectionError, Item, Listing, SIDECAR, is_file_name};
use crate::{
    archive::Format,
    output::Class,
    remote::Sink,
    transport::{RemoteError, RemoteErrorKind},
};

/// The most bytes that a file with one checksum may have.
const SIDECAR_BYTES: usize = 64 << 10;
/// How many checksums are read at once.
const READING: usize = 16;

/// What checksums are good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Checking {
    /// Used where there are some.
    #[default]
    Auto,
    /// Every archive must have one.
    Require,
    /// Not looked for. A digest counts all the same.
    None,
}

/// Which files of a list are offered. One that is named itself is in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offer {
    /// Those with the name of an archive that can be unpacked.
    Archives,
    /// All but those that only have the checksum of another one.
    Files,
}

/// An archive to fetch.
#[derive(Clone)]
pub(crate) struct Wanted {
    /// Where it is.
    pub(crate) collection: Arc<dyn Collection>,
    /// Its name there.
    pub(crate) item: Item,
    /// What it is, as far as its name says.
    pub(crate) format: Option<Format>,
    /// Whether it may be missing.
    pub(crate) class: Class,
    /// What its bytes must be, if that is known.
    pub(crate) checksum: Option<Checksum>,
    /// Whether it was named itself, rather than found in a directory.
    pub(crate) is_named: bool,
    /// Whether a list has a file with its checksum; `None` if nobody says.
    has_sidecar: Option<bool>,
}

impl Wanted {
    /// The only file of a collection that knows its checksum, under its own name.
    pub(crate) fn only(collection: Arc<dyn Collection>, item: Item, class: Class) -> Self {
        Self {
            format: Format::of(&item.name),
            checksum: collection.checksum(),
            collection,
            item,
            class,
            is_named: true,
            has_sidecar: Some(false),
        }
    }

    /// What messages call it; without credentials.
    pub(crate) fn address(&self) -> String {
        if self.is_named {
            self.collection.describe()
        } else {
            let directory = self.collection.describe();
            format!("{}/{}", directory.trim_end_matches('/'), self.item.name)
        }
    }
}

/// Lists the collections, and chooses. The order is that of the collections, and in each that of the names.
///
/// # Errors
/// When a collection cannot be asked or has no archives, one that is named itself has a name that no file can be given, or
/// a pattern matches none.
pub(crate) async fn choose(
    collections: &[Arc<dyn Collection>],
    choice: &Arc<Choice>,
    offer: Offer,
) -> Result<Vec<Wanted>, CollectionError> {
    let mut listed = Vec::new();
    for collection in collections {
        listed.push((Arc::clone(collection), collection.list().await?));
    }
    let choice = Arc::clone(choice);
    // There may be a million names.
    let chosen = spawn_blocking(move || choose_of(listed, &choice, offer));
    chosen.await.map_err(CollectionError::stopped)?
}

/// Chooses among what is listed. Blocks.
fn choose_of(
    listed: Vec<(Arc<dyn Collection>, Listing)>,
    choice: &Choice,
    offer: Offer,
) -> Result<Vec<Wanted>, CollectionError> {
    let mut offered = Vec::new();
    for (collection, listing) in &listed {
        let before = offered.len();
        offered.extend(offered_of(collection, listing, offer)?);
        if offered.len() == before {
            return Err(CollectionError::Nothing(collection.describe()));
        }
    }
    let classes = choice.classes(offered.iter().map(|wanted| &*wanted.item.name))?;
    let mut chosen = Vec::new();
    for (mut wanted, class) in offered.into_iter().zip(classes) {
        if let Some(class) = class {
            wanted.class = class;
            chosen.push(wanted);
        }
    }
    if chosen.is_empty() {
        let all: Vec<_> = listed
            .iter()
            .map(|(collection, _)| collection.describe())
            .collect();
        return Err(CollectionError::Nothing(all.join(", ")));
    }
    Ok(chosen)
}

/// What one collection offers.
fn offered_of(
    collection: &Arc<dyn Collection>,
    listing: &Listing,
    offer: Offer,
) -> Result<Vec<Wanted>, CollectionError> {
    let is_named = !listing.is_complete || collection.checksum().is_some();
    let sidecars: HashSet<&str> = listing
        .items
        .iter()
        .filter_map(|item| item.name.strip_suffix(SIDECAR))
        .collect();
    let names: HashSet<&str> = listing.items.iter().map(|item| &*item.name).collect();
    let is_offered = |item: &Item, format: Option<Format>| match offer {
        Offer::Archives => format.is_some(),
        Offer::Files => {
            let of = item.name.strip_suffix(SIDECAR);
            !of.is_some_and(|of| names.contains(of))
        }
    };
    let mut offered = Vec::new();
    let mut left_out = Vec::new();
    for item in &listing.items {
        let format = Format::of(&item.name);
        let has_file_name = is_file_name(&item.name);
        if is_named && !has_file_name {
            let name = item.name.clone();
            return Err(CollectionError::NoFileName { name });
        }
        let is_one = has_file_name && is_offered(item, format);
        if !is_named && !is_one {
            if offer == Offer::Archives && Format::is_unknown(&item.name) {
                left_out.push(&*item.name);
            }
            continue;
        }
        offered.push(Wanted {
            collection: Arc::clone(collection),
            has_sidecar: listing.is_complete.then(|| sidecars.contains(&*item.name)),
            item: item.clone(),
            format,
            class: Class::Known,
            checksum: collection.checksum(),
            is_named,
        });
    }
    if let Some(first) = left_out.first() {
        let (from, count) = (collection.describe(), left_out.len());
        tracing::warn!(
            from,
            count,
            first,
            "archives that cannot be unpacked are left out"
        );
    }
    Ok(offered)
}

async fn check(wanted: &mut Wanted, checking: Checking, list: &Checksums) -> Result<(), CollectionError> {
    if wanted.checksum.is_some() || checking == Checking::None {
        return Ok(());
    }
    // A list has the name that the file has there.
    let own = wanted.collection.own_name();
    let listed = list.get(&wanted.item.name);
    wanted.checksum = match listed.or_else(|| list.get(own.as_deref()?)) {
        Some(sum) => Some(sum.clone()),
        None if wanted.has_sidecar == Some(false) => None,
        None => beside(wanted).await?,
    };
    if wanted.checksum.is_none() {
        wanted.checksum = stored(wanted, checking).await?;
    }
    if wanted.checksum.is_none() && checking == Checking::Require {
        let name = wanted.item.name.clone();
        return Err(CollectionError::NoChecksum { name });
    }
    Ok(())
}

/// Finds out what the archives' bytes must be: what a digest says, or a list, or the files beside them. In their order.
/// An error is that an archive must have a checksum and has none, or that the one that it has cannot be read.
pub(crate) async fn check_all(
    wanted: Vec<Wanted>,
    checking: Checking,
    list: &Arc<Checksums>,
) -> Vec<(Wanted, Result<(), CollectionError>)> {
    let all = wanted.into_iter().map(|wanted| (wanted, Arc::clone(list)));
    stream::iter(all.collect::<Vec<_>>())
        .map(|(mut wanted, list)| async move {
            let checked = check(&mut wanted, checking, &list).await;
            (wanted, checked)
        })
        .buffered(READING)
        .collect()
        .await
}

/// The checksum that the store keeps. One that does not say may well let us read.
async fn stored(wanted: &Wanted, checking: Checking) -> Result<Option<Checksum>, CollectionError> {
    match wanted.collection.stored_checksum(&wanted.item).await {
        Err(error) if checking == Checking::Require && !error.is_not_found() => Err(error.into()),
        Err(error) => {
            tracing::debug!(%error, "the store does not say a checksum");
            Ok(None)
        }
        Ok(sum) => Ok(sum),
    }
}

fn may_not_ask(error: &RemoteError) -> bool {
    matches!(
        error.kind,
        RemoteErrorKind::Denied | RemoteErrorKind::Unauthenticated | RemoteErrorKind::Rejected
    )
}

/// The checksum in the file beside an archive.
async fn beside(wanted: &Wanted) -> Result<Option<Checksum>, CollectionError> {
    let item = Item::named(format!("{}{SIDECAR}", wanted.item.name));
    let mut text = Text::of_at_most(SIDECAR_BYTES);
    match wanted.collection.read(&item, &mut text).await {
        Ok(()) => {}
        Err(error) if error.is_not_found() && wanted.has_sidecar.is_none() => return Ok(None),
        // A store that one may not list refuses what is not there, and so does one whose URLs are signed for one name. If it
        // lets nobody in, the archive is not read either.
        Err(error) if wanted.has_sidecar.is_none() && may_not_ask(&error) => return Ok(None),
        Err(error) => return Err(RemoteError::into(error)),
    }
    let name = wanted.collection.own_name();
    let name = name.as_deref().unwrap_or(&wanted.item.name);
    let sum = Checksum::of_sidecar(&text.text(), name);
    sum.map(Some).map_err(|reason| CollectionError::Checksum {
        file: format!("{}{SIDECAR}", wanted.address()),
        reason,
    })
}

/// Keeps a short text.
pub(super) struct Text {
    bytes: Vec<u8>,
    most: usize,
}

impl Text {
    /// One that refuses more bytes than these.
    pub(super) const fn of_at_most(most: usize) -> Self {
        Self {
            bytes: Vec::new(),
            most,
        }
    }

    pub(super) fn text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.bytes)
    }
}

#[async_trait]
impl Sink for Text {
    async fn write(&mut self, bytes: Bytes) -> io::Result<()> {
        let fits = self.bytes.len() + bytes.len() <= self.most;
        if fits {
            self.bytes.extend_from_slice(&bytes);
        }
        fits.then_some(())
            .ok_or_else(|| io::Error::other(format!("has more than {} bytes", self.most)))
    }
}
