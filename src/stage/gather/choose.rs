//! Which files of a collection are asked for.

use std::{collections::HashMap, sync::Arc};

use tokio::task::spawn_blocking;

use super::{Archives, EXTRACT, Gather, Source};
use crate::{
    archive::{Format, Limit, Mode},
    collection::{
        BlobArchive, Choice, Collection, CollectionError, Location, Offer, Patterns, Source as Named, Wanted,
        check_all, choose, open, own_directory,
    },
    exec_path::ExecPath,
    sources::Sources,
    stage::{
        destination::Reach,
        error::StageError,
        origin::remembered,
        request::{COMPILED, Wish},
    },
    transport::{HIDDEN, without_secrets},
};

/// URLs and digests of one request, and bytes of all of them.
const SOURCES: usize = 1000;
const TEXT: usize = 1 << 20;

fn setting(flag: impl Into<String>, reason: impl Into<String>) -> StageError {
    StageError::Setting {
        flag: flag.into(),
        reason: reason.into(),
    }
}

/// Why what was named cannot be used.
fn invalid(text: &str, reason: String) -> StageError {
    let flag = format!("--from={}", without_secrets(text));
    let reason = if flag.ends_with(HIDDEN) {
        "it has a password with a character that must be written as %XX, or no valid port".to_owned()
    } else {
        reason
    };
    setting(flag, reason)
}

/// Reads what a caller names who may name what is in reach. Anyone who knows a digest knows what the bytes are.
fn named<'a>(text: &'a str, reach: &Reach) -> Result<(&'a str, Named<'a>), StageError> {
    let named = Named::parse(text).map_err(|reason| invalid(text, reason.to_owned()))?;
    if let Location::Url(url) = named.location {
        reach.admit(url, text)?;
    }
    Ok((text, named))
}

impl Archives {
    /// The files that a wish asks for, of collections at URLs and of blobs in the cache. Lists them; downloads nothing but
    /// checksums.
    ///
    /// # Errors
    /// When a URL or digest is wrong, the caller may not name the URL, a collection cannot be listed, or a pattern
    /// is wrong or matches nothing.
    pub(in crate::stage) async fn choose(
        &self,
        mut gather: Gather,
        from: &[String],
        wish: &Wish,
        reach: &Reach,
        sources: &Sources,
    ) -> Result<Gather, StageError> {
        for (name, list) in [("TARGET", &wish.targets), ("--output-group", &wish.output_groups)] {
            if !list.is_empty() {
                return Err(setting(name, "is for recorded builds; use --include with --from"));
            }
        }
        for (name, is_set) in [("--runfiles", wish.runfiles), ("--failed", wish.failed)] {
            if is_set {
                return Err(setting(
                    name,
                    "is for recorded builds, and cannot be combined with --from",
                ));
            }
        }
        let text: usize = from.iter().map(String::len).sum();
        if from.len() > SOURCES || text > TEXT {
            let reason = format!(
                "the request has {} URLs and digests of {text} bytes, which exceeds the limit of {SOURCES}, or of {TEXT} \
                 bytes",
                from.len()
            );
            return Err(setting("--from", reason));
        }
        let named = from.iter().map(|text| named(text, reach));
        let named: Vec<_> = named.collect::<Result<_, _>>()?;
        wish.check()?;
        let count = wish.regexes().map(|(_, list)| list.len()).sum::<usize>();
        let patterns = Patterns {
            include: wish.include.clone(),
            exclude: wish.exclude.clone(),
            required: wish.required.clone(),
            optional: wish.optional.clone(),
        };
        let compiled = spawn_blocking(move || Choice::within(&patterns, COMPILED / count.max(3))).await;
        let compiled = compiled.map_err(|e| StageError::Internal(e.to_string()))?;
        let choice = Arc::new(compiled.map_err(CollectionError::from)?);
        let collections = self.open(named, gather.how.limits[Limit::Bytes], sources).await?;
        let offer = if wish.flatten {
            Offer::Archives
        } else {
            Offer::Files
        };
        let chosen = choose(&collections, &choice, offer).await?;
        gather.from = remembered(from);
        let checksums = Arc::clone(&gather.how.checksums);
        for (wanted, checked) in check_all(chosen, gather.how.checking, &checksums).await {
            gather.add(wanted, wish, checked)?;
        }
        gather.check_places()?;
        Ok(gather)
    }

    /// Opens what is named. `most` is how many bytes may come of a file whose size nobody says.
    async fn open(
        &self,
        named: Vec<(&str, Named<'_>)>,
        most: u64,
        sources: &Sources,
    ) -> Result<Vec<Arc<dyn Collection>>, StageError> {
        let access = self.0.as_ref();
        let mut access = access
            .ok_or_else(|| StageError::Internal("no access to collections is set up".to_owned()))?
            .clone();
        access.patience.most = most;
        let mut collections = Vec::new();
        for (text, Named { name, location }) in named {
            let error = |reason: String| invalid(text, reason);
            let name = name.map(str::to_owned);
            let collection: Arc<dyn Collection> = match location {
                Location::Url(url) => {
                    let (url, access) = (url.to_owned(), access.clone());
                    // Looks at the disk: at a directory that may be slow, and at files with credentials.
                    let opened = spawn_blocking(move || open(&url, name.as_deref(), &access)).await;
                    let opened = opened.map_err(|e| StageError::Internal(e.to_string()))?;
                    opened.map_err(|e| error(e.to_string()))?
                }
                Location::Blob(written) => {
                    let cache = sources.named().map_err(|e| error(e.to_string()))?.actions();
                    let assumed = access.options.digest_function;
                    let digest = written.find(assumed, &*cache).await;
                    Arc::new(BlobArchive::new(
                        cache,
                        digest.map_err(CollectionError::from)?,
                        name,
                    ))
                }
            };
            collections.push(collection);
        }
        Ok(collections)
    }
}

impl Gather {
    /// Takes a file of a collection.
    fn add(
        &mut self,
        wanted: Wanted,
        wish: &Wish,
        checked: Result<(), CollectionError>,
    ) -> Result<(), StageError> {
        let name = ExecPath::new(&wanted.item.name).map_err(|e| StageError::Internal(e.to_string()))?;
        let (mode, place) = match (wanted.format, wish) {
            (None, Wish { flatten: true, .. }) => {
                let name = wanted.item.name;
                return Err(CollectionError::NoArchive { name }.into());
            }
            (None, Wish { extract: true, .. })
                if wanted.is_named && Format::is_unknown(&wanted.item.name) =>
            {
                let name = wanted.item.name;
                return Err(CollectionError::NoArchive { name }.into());
            }
            (_, Wish { flatten: true, .. }) => (Some(Mode::Flatten), String::new()),
            (Some(_), Wish { extract: true, .. }) if wanted.is_named => (Some(EXTRACT), String::new()),
            (Some(_), Wish { extract: true, .. }) => {
                (Some(EXTRACT), own_directory(&wanted.item.name)?.to_owned())
            }
            _ => (None, wanted.item.name.clone()),
        };
        let nobody: Arc<str> = Arc::from("");
        self.sources.push(Source {
            wanted,
            label: Arc::clone(&nobody),
            aspect: Arc::clone(&nobody),
            group: nobody,
            name,
            place,
            digest: None,
            mode,
            earlier: Vec::new(),
            end: checked.err().map(|error| Err(error.to_string())),
        });
        Ok(())
    }

    fn check_places(&self) -> Result<(), StageError> {
        // The marker shows by the name what a file is of.
        let mut names: HashMap<&ExecPath, &Source> = HashMap::new();
        for source in &self.sources {
            if let Some(first) = names.insert(&source.name, source) {
                return Err(CollectionError::SameName {
                    first: first.wanted.address(),
                    second: source.wanted.address(),
                    name: source.name.to_string(),
                }
                .into());
            }
        }
        let mut places: HashMap<&str, &Source> = HashMap::new();
        for source in self.sources.iter().filter(|source| !source.place.is_empty()) {
            if let Some(first) = places.insert(&source.place, source) {
                return Err(StageError::Collision {
                    first: first.name.clone(),
                    second: source.name.clone(),
                    place: ExecPath::new(&source.place).map_err(|e| StageError::Internal(e.to_string()))?,
                });
            }
        }
        Ok(())
    }
}
