//! Which files of a collection are asked for.

use std::{collections::HashMap, sync::Arc};

use tokio::task::spawn_blocking;

use super::{Archives, EXTRACT, Gather, Source};
use crate::{
    archive::Mode,
    collection::{
        Checking, Choice, CollectionError, Offer, Patterns, Wanted, check_all, choose, is_file_name, open,
        own_directory,
    },
    exec_path::ExecPath,
    stage::{
        error::StageError,
        origin::{HIDDEN, without_secrets},
        request::{COMPILED, Wish},
    },
};

impl Archives {
    /// The files of a collection that a wish asks for. Lists them; downloads nothing but checksums.
    ///
    /// # Errors
    /// When the URL is wrong, the collection cannot be listed, or a pattern is wrong or matches nothing.
    pub(in crate::stage) async fn choose(&self, from: &str, wish: &Wish) -> Result<Gather, StageError> {
        let setting = |flag: String, reason: String| StageError::Setting { flag, reason };
        let flag = || format!("--from={}", without_secrets(from));
        for (name, list) in [("TARGET", &wish.targets), ("--output-group", &wish.output_groups)] {
            if !list.is_empty() {
                let reason = "is for recorded builds; use --include with --from";
                return Err(setting(name.to_owned(), reason.to_owned()));
            }
        }
        wish.check()?;
        let access = self
            .0
            .as_ref()
            .ok_or_else(|| StageError::Internal("no access to collections is set up".to_owned()))?;
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
        let (name, url) = match from.split_once('=') {
            Some((name, url)) if is_file_name(name) => (Some(name), url),
            _ => (None, from),
        };
        let (url, name) = (url.to_owned(), name.map(str::to_owned));
        let access = access.clone();
        // Looks at the disk: at a directory that may be slow, and at files with credentials.
        let opened = spawn_blocking(move || open(&url, name.as_deref(), &access)).await;
        let opened = opened.map_err(|e| StageError::Internal(e.to_string()))?;
        let collection = opened.map_err(|error| {
            let shown = flag();
            let reason = if shown.ends_with(HIDDEN) {
                "it has a password with a character that must be written as %XX, or no valid port".to_owned()
            } else {
                error.to_string()
            };
            setting(shown, reason)
        })?;
        let offer = if wish.flatten {
            Offer::Archives
        } else {
            Offer::Files
        };
        let chosen = choose(&[collection], &choice, offer).await?;
        let mut gather = Gather {
            from: without_secrets(from),
            ..Gather::default()
        };
        for (wanted, checked) in check_all(chosen, Checking::Auto, None).await {
            gather.add(wanted, wish, checked)?;
        }
        gather.check_places()?;
        Ok(gather)
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
