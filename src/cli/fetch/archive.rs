//! `outhaul fetch archive`: archives from directories, URLs and the cache, checked, and unpacked as a whole.

use std::{
    collections::BTreeMap,
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use clap::{Args, ValueEnum};
use futures::{StreamExt as _, stream};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::digest;
use crate::{
    archive::{Limit, Mode, OnConflict, Unpacked},
    cli::{
        ending::Signals,
        exit::{self, Failure},
        files::FilesArgs,
        print, progress,
    },
    collection::{
        BlobArchive, Choice, ChoiceError, Collection, CollectionError, Directory, Extraction, Location,
        Offer, Patterns, Progress, Source, Wanted, check_all, check_places, choose, download, extract, open,
    },
    config::CacheArgs,
    digest::Digest,
    output::Class,
    printable::printable,
    transport::without_secrets,
    units::{show_count, show_duration, show_size},
};

/// Arguments of `outhaul fetch archive`.
#[derive(Debug, Args)]
pub(in crate::cli) struct ArchiveArgs {
    /// What to fetch: file:///DIR/ or s3://BUCKET/PREFIX/ (gs://, az://) for all archives right in it, file:///DIR/FILE,
    /// s3://BUCKET/FILE or https://HOST/PATH/FILE for one, or the digest (HASH/SIZE, or FUNCTION/HASH/SIZE) of one in the
    /// remote cache. NAME= gives a URL or a digest another file name
    #[arg(required = true, value_name = "[NAME=]URL|DIGEST")]
    sources: Vec<String>,

    /// Directory to put everything into; created if it does not exist
    #[arg(long, value_name = "DIR")]
    output_dir: PathBuf,

    /// Only archives whose file name contains a match (repeatable); each pattern must match something
    #[arg(long, value_name = "REGEX")]
    include: Vec<String>,

    /// Exclude archives whose file name contains a match (repeatable)
    #[arg(long, value_name = "REGEX")]
    exclude: Vec<String>,

    /// Archives that must be fetched; all others are then optional (repeatable)
    #[arg(long, value_name = "REGEX")]
    required: Vec<String>,

    /// Archives that may be missing; without --required, all others must be fetched (repeatable)
    #[arg(long, value_name = "REGEX")]
    optional: Vec<String>,

    #[command(flatten)]
    files: FilesArgs,

    /// Unpack (the default): each archive of a directory into a directory of its own, others right into --output-dir
    #[arg(long, conflicts_with = "no_extract")]
    extract: bool,

    /// Unpack all archives right into --output-dir, without the stage directories that artifact_manifest.txt, the first
    /// member of each, names
    #[arg(long, conflicts_with = "no_extract")]
    flatten: bool,

    /// Keep the archives as they are
    #[arg(long)]
    no_extract: bool,

    /// Leading components of each path to cut, as with tar
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        conflicts_with_all = ["flatten", "no_extract"]
    )]
    strip_components: u32,

    /// What to do with a path that is in two archives with different bytes: fail, or take that of the last archive
    #[arg(long, value_name = "WHAT", value_enum, default_value = "fail")]
    on_conflict: Conflict,

    /// Unpack symlinks that lead out of the directory, too
    #[arg(long)]
    unsafe_links: bool,

    /// Only show what would be fetched
    #[arg(long)]
    dry_run: bool,

    /// Print JSON, one object per line for each archive
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    cache: CacheArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Conflict {
    Fail,
    Last,
}

/// What became of an archive.
struct Ended {
    wanted: Wanted,
    /// `None` if it was given up for another's sake, or is only to be shown.
    result: Option<Result<Got, CollectionError>>,
}

/// What there is of an archive now.
struct Got {
    digest: Digest,
    outcome: &'static str,
    unpacked: Option<Unpacked>,
}

pub(super) async fn main(args: ArchiveArgs) -> Result<u8, Failure> {
    let shutdown = CancellationToken::new();
    let _at_once = Signals::listen()?.heed(shutdown.clone());
    tokio::select! {
        biased;
        // What is dropped then leaves nothing.
        () = shutdown.cancelled() => Err(Failure::failed("interrupted")),
        ended = fetch(&args) => ended,
    }
}

async fn fetch(args: &ArchiveArgs) -> Result<u8, Failure> {
    let begun = Instant::now();
    let choice = Arc::new(Choice::new(&args.patterns()).map_err(Failure::usage)?);
    let list = Arc::new(args.files.checksums()?.1);
    let extraction = args.extraction()?;
    let collections = args.collections().await?;
    let wanted = choose(&collections, &choice, Offer::Archives)
        .await
        .map_err(failure)?;
    check_places(&wanted, extraction.as_ref()).map_err(Failure::failed)?;
    let checked = check_all(wanted, args.files.checking(), &list).await;
    let mut ended = Vec::new();
    let mut ready = Vec::new();
    for (wanted, checked) in checked {
        match checked {
            Ok(()) => ready.push(wanted),
            Err(error) => ended.push(Ended {
                wanted,
                result: Some(Err(error)),
            }),
        }
    }
    let is_lost = ended.iter().any(|one| one.wanted.class == Class::Required);
    let mut complete = true;
    if args.dry_run || is_lost {
        ended.extend(ready.into_iter().map(|wanted| Ended { wanted, result: None }));
    } else {
        let bytes = Arc::new(Progress::default());
        let sizes = ready.iter().map(|wanted| wanted.item.size);
        let total = sizes
            .reduce(|all, size| Some(all?.saturating_add(size?)))
            .flatten();
        let work = async {
            match &extraction {
                Some(extraction) => unpacked(ready, extraction, &bytes).await,
                None => saved(ready, args, &bytes).await.map(|ended| (ended, true)),
            }
        };
        let look = async || {
            Some(progress::Progress {
                bytes: bytes.bytes(),
                all_bytes: total,
                ..progress::Progress::default()
            })
        };
        let (done, whole) = progress::watched("files", work, look).await?;
        complete = whole;
        ended.extend(done);
    }
    args.report(&ended, extraction.as_ref(), complete, begun)
}

/// As they are.
async fn saved(
    wanted: Vec<Wanted>,
    args: &ArchiveArgs,
    bytes: &Arc<Progress>,
) -> Result<Vec<Ended>, Failure> {
    let path = std::path::absolute(&args.output_dir)?;
    let directory =
        Directory::create(&path).map_err(|e| Failure::failed(format!("{}: {e}", path.display())))?;
    let directory = &directory;
    let ended = stream::iter(wanted)
        .map(|wanted| async move {
            let result = download(&wanted, directory, bytes).await.map(|done| Got {
                digest: done.digest,
                outcome: if done.was_present { "present" } else { "downloaded" },
                unpacked: None,
            });
            Ended {
                wanted,
                result: Some(result),
            }
        })
        .buffered(usize::from(args.files.jobs));
    Ok(ended.collect().await)
}

/// Unpacked; and whether all that is required is there.
async fn unpacked(
    wanted: Vec<Wanted>,
    extraction: &Extraction,
    bytes: &Arc<Progress>,
) -> Result<(Vec<Ended>, bool), Failure> {
    let extracted = extract(&wanted, extraction, bytes)
        .await
        .map_err(Failure::failed)?;
    let complete = extracted.is_complete();
    let mut published: BTreeMap<_, _> = extracted.published.into_iter().collect();
    let mut ended = Vec::new();
    for (wanted, one) in wanted.into_iter().zip(extracted.archives) {
        let target = extraction.target(&wanted);
        let result = match (one, published.get(&target)) {
            (Some(Ok(one)), Some(Ok(_))) => Some(Ok(Got {
                digest: one.digest,
                outcome: "extracted",
                unpacked: Some(one.unpacked),
            })),
            // It is reported once: the first of those that were to be there has it.
            (Some(Ok(_)), Some(Err(_))) => published.remove(&target).and_then(Result::err).map(Err),
            (Some(Ok(_)) | None, _) => None,
            (Some(Err(error)), _) => Some(Err(error)),
        };
        ended.push(Ended { wanted, result });
    }
    Ok((ended, complete))
}

/// An error before anything was fetched.
fn failure(error: CollectionError) -> Failure {
    match error {
        CollectionError::Choice(error @ ChoiceError::Pattern { .. }) => Failure::usage(error),
        error if error.is_not_found() => Failure::not_found(error),
        error => Failure::failed(error),
    }
}

impl ArchiveArgs {
    fn patterns(&self) -> Patterns {
        Patterns {
            include: self.include.clone(),
            exclude: self.exclude.clone(),
            required: self.required.clone(),
            optional: self.optional.clone(),
        }
    }

    /// `None` if the archives are kept as they are.
    fn extraction(&self) -> Result<Option<Extraction>, Failure> {
        if self.no_extract {
            return Ok(None);
        }
        let mode = if self.flatten {
            Mode::Flatten
        } else {
            Mode::Extract {
                strip_components: self.strip_components,
            }
        };
        Ok(Some(Extraction {
            directory: std::path::absolute(&self.output_dir)?,
            mode,
            on_conflict: match self.on_conflict {
                Conflict::Fail => OnConflict::Fail,
                Conflict::Last => OnConflict::Last,
            },
            unsafe_links: self.unsafe_links,
            limits: self.files.limits()?,
            // The last one is the last to be unpacked, so that its links find what it has.
            jobs: match self.on_conflict {
                Conflict::Fail => usize::from(self.files.jobs),
                Conflict::Last => 1,
            },
        }))
    }

    async fn collections(&self) -> Result<Vec<Arc<dyn Collection>>, Failure> {
        let access = self.cache.archive_access(self.files.limits()?[Limit::Bytes])?;
        let mut cache = None;
        let mut collections: Vec<Arc<dyn Collection>> = Vec::new();
        for text in &self.sources {
            let neither = |reason| Failure::usage(format!("{}: {reason}", without_secrets(text)));
            let Source { name, location } = Source::parse(text).map_err(neither)?;
            let written = match location {
                Location::Url(url) => {
                    let opened = open(url, name, &access);
                    collections.push(opened.map_err(|error| Failure::usage(error.to_string()))?);
                    continue;
                }
                Location::Blob(written) => written,
            };
            let store = match &cache {
                Some(store) => Arc::clone(store),
                None => cache.insert(self.cache.cache()?.actions()).clone(),
            };
            let digest = digest(&written, &self.cache, &*store).await?;
            collections.push(Arc::new(BlobArchive::new(store, digest, name.map(str::to_owned))));
        }
        Ok(collections)
    }

    fn report(
        &self,
        ended: &[Ended],
        extraction: Option<&Extraction>,
        complete: bool,
        begun: Instant,
    ) -> Result<u8, Failure> {
        let failed = |one: &&Ended| matches!(one.result, Some(Err(_)));
        let required = |one: &&Ended| one.wanted.class == Class::Required;
        let output_dir = std::path::absolute(&self.output_dir)?;
        for one in ended {
            if self.json {
                writeln!(print::out(), "{}", one.json(&output_dir, extraction))?;
            } else if self.dry_run {
                writeln!(print::out(), "{}", one.line())?;
            }
            if let Some(Err(error)) = &one.result {
                let kind = if one.wanted.class == Class::Required {
                    ""
                } else {
                    "optional: "
                };
                writeln!(print::err(), "outhaul: {kind}{}", printable(&error.to_string()))?;
            }
        }
        let lost = ended.iter().filter(failed).filter(required).count();
        if !self.dry_run {
            writeln!(print::err(), "{}", summary(ended, begun))?;
        }
        if lost == 0 && complete {
            return Ok(exit::OK);
        }
        // As with the other commands: what was asked for is not there.
        let is_gone = |one: &Ended| matches!(&one.result, Some(Err(error)) if error.is_not_found());
        let all_gone = lost > 0 && ended.iter().filter(failed).filter(required).all(is_gone);
        Ok(if all_gone { exit::NOT_FOUND } else { exit::FAILED })
    }
}

impl Ended {
    fn json(&self, output_dir: &Path, extraction: Option<&Extraction>) -> Value {
        let got = match &self.result {
            Some(Ok(got)) => Some(got),
            _ => None,
        };
        let place = match extraction {
            Some(extraction) => extraction.target(&self.wanted),
            None => output_dir.join(&self.wanted.item.name),
        };
        let error = match &self.result {
            Some(Err(error)) => Some(error.to_string()),
            _ => None,
        };
        json!({
            "name": self.wanted.item.name,
            "from": self.wanted.address(),
            "class": self.wanted.class.name(),
            "path": place.to_string_lossy(),
            "size": got.map(|got| got.digest.size()).or(self.wanted.item.size),
            "digest": got.map(|got| format!("{}:{}", got.digest.function(), got.digest.hash_hex())),
            "checksum": self.wanted.checksum.as_ref().map(ToString::to_string),
            "outcome": got.map(|got| got.outcome),
            "files": got.and_then(|got| got.unpacked).map(|unpacked| unpacked.files + unpacked.links),
            "bytes": got.and_then(|got| got.unpacked).map(|unpacked| unpacked.bytes),
            "error": error,
        })
    }

    /// What would be fetched.
    fn line(&self) -> String {
        let size = self.wanted.item.size.map_or_else(|| "-".to_owned(), show_size);
        let sum = self
            .wanted
            .checksum
            .as_ref()
            .map_or_else(|| "-".to_owned(), ToString::to_string);
        format!(
            "{}  {size}  {sum}  {}",
            self.wanted.class.name(),
            self.wanted.address()
        )
    }
}

/// Sizes may be whatever servers say.
fn total(numbers: impl Iterator<Item = u64>) -> u64 {
    numbers.fold(0, u64::saturating_add)
}

fn summary(ended: &[Ended], begun: Instant) -> String {
    let mut parts = Vec::new();
    let of = |outcome: &'static str| {
        let got = ended.iter().filter_map(move |one| match &one.result {
            Some(Ok(got)) if got.outcome == outcome => Some(got),
            _ => None,
        });
        got.collect::<Vec<_>>()
    };
    for outcome in ["extracted", "downloaded", "present"] {
        let got = of(outcome);
        if got.is_empty() {
            continue;
        }
        let size = show_size(total(got.iter().map(|got| got.digest.size())));
        let unpacked: Vec<_> = got.iter().filter_map(|got| got.unpacked).collect();
        let mut part = format!("{} {outcome} ({size})", show_count(got.len() as u64));
        if !unpacked.is_empty() {
            let files = total(unpacked.iter().map(|one| one.files + one.links));
            let bytes = show_size(total(unpacked.iter().map(|one| one.bytes)));
            part += &format!(": {} files, {bytes}", show_count(files));
        }
        parts.push(part);
    }
    let count = |wanted: fn(&Ended) -> bool| ended.iter().filter(|one| wanted(one)).count() as u64;
    for (number, what) in [
        (count(|one| matches!(one.result, Some(Err(_)))), "failed"),
        (count(|one| one.result.is_none()), "not fetched"),
    ] {
        if number > 0 {
            parts.push(format!("{} {what}", show_count(number)));
        }
    }
    format!(
        "archives: {} in {}",
        parts.join("; "),
        show_duration(begun.elapsed())
    )
}
