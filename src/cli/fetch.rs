//! `outhaul fetch`: outputs without a build tool and without a daemon.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::{Args, Subcommand};
use tokio::sync::broadcast;

use super::{
    exit::{self, Failure},
    paths::special,
    print,
    progress::{of_builds, watched},
    runtime,
};
use crate::{
    action_cache::{ActionCacheError, read_log},
    bep::{Event, EventFile},
    builds::{Builds as _, StreamEnd, StreamKey},
    config::{CacheArgs, PlaceArgs, SelectionArgs},
    daemon::Services,
    digest::Digest,
    exec_path::{ExecPath, is_reserved},
    invocation::{Engine, Report, policy::PathRegex, tally::Tally},
    materialize::{
        Counted, Materializer, Outcome, Root, Session, Want,
        place::{Epoch, OutputRoot},
    },
    metrics::Metrics,
    output::{Class, OutputContent},
    printable::printable,
    remote::{ActionStore, Attribution, WrittenDigest, expand_action, expand_any_tree, read_blob},
    removal::remove_all,
    roots::Destination,
    transport::{RemoteError, RemoteErrorKind},
};

mod archive;

/// How long an interrupted command waits for what its threads are doing, so that they can remove what they have begun. What
/// is left of longer work is swept by the next one.
const LEAVING: Duration = Duration::from_secs(20);
/// How long a cache that failed may take to say why.
const EXPLANATION: Duration = Duration::from_secs(5);

/// What to fetch.
#[derive(Debug, Subcommand)]
pub(super) enum FetchCommand {
    /// The top-level outputs of a build, from its saved event file (--build_event_binary_file or
    /// --build_event_json_file)
    Bep(Box<BepArgs>),
    /// All outputs of an action, by the digest of the action
    Action(TreeArgs),
    /// A directory tree, by the digest of its Tree message or of its root Directory
    Tree(TreeArgs),
    /// Outputs of the actions of a build, from its compact execution log (--execution_log_compact_file)
    Log(LogArgs),
    /// One blob
    Blob(BlobArgs),
    /// Archives from a directory, a URL or the cache, unpacked when all are whole
    Archive(Box<archive::ArchiveArgs>),
}

/// Arguments of `outhaul fetch bep`.
#[derive(Debug, Args)]
pub(super) struct BepArgs {
    /// The event file
    file: PathBuf,

    /// Follow the file as it grows, until the build's last event; it does not need to exist yet
    #[arg(long)]
    follow: bool,

    /// Put files into this directory instead of the build's own exec root
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,

    /// With --output-dir: put all files directly into it, by file name
    #[arg(long, requires = "output_dir")]
    flatten: bool,

    #[command(flatten)]
    selection: SelectionArgs,

    #[command(flatten)]
    place: PlaceArgs,

    #[command(flatten)]
    cache: CacheArgs,
}

/// Arguments of `outhaul fetch action` and `outhaul fetch tree`.
#[derive(Debug, Args)]
pub(super) struct TreeArgs {
    /// The digest: HASH/SIZE or FUNCTION/HASH/SIZE; the size may be left out where the cache knows it, as a disk cache
    /// does
    digest: String,

    /// Directory to put the outputs into; created if it does not exist
    #[arg(long, value_name = "DIR")]
    output_dir: PathBuf,

    #[command(flatten)]
    place: PlaceArgs,

    #[command(flatten)]
    cache: CacheArgs,
}

/// Arguments of `outhaul fetch log`.
#[derive(Debug, Args)]
pub(super) struct LogArgs {
    /// The log
    file: PathBuf,

    /// Only outputs whose whole exec path, or that of their tree artifact, matches (repeatable)
    #[arg(long, value_name = "REGEX")]
    path: Vec<PathRegex>,

    /// Directory to put the outputs into, at their exec paths; created if it does not exist
    #[arg(long, value_name = "DIR", required_unless_present = "list")]
    output_dir: Option<PathBuf>,

    /// Only list them: digest and path
    #[arg(long, conflicts_with = "output_dir")]
    list: bool,

    #[command(flatten)]
    place: PlaceArgs,

    #[command(flatten)]
    cache: CacheArgs,
}

/// Arguments of `outhaul fetch blob`.
#[derive(Debug, Args)]
pub(super) struct BlobArgs {
    /// The digest: HASH/SIZE or FUNCTION/HASH/SIZE; the size may be left out where the cache knows it, as a disk cache
    /// does
    digest: String,

    /// File to write; `-` for standard output
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    #[command(flatten)]
    place: PlaceArgs,

    #[command(flatten)]
    cache: CacheArgs,
}

pub(super) fn main(command: FetchCommand) -> Result<u8, Failure> {
    let runtime = runtime()?;
    let ended = runtime.block_on(async {
        match command {
            FetchCommand::Bep(args) => bep(*args).await,
            FetchCommand::Action(args) => tree(args, true).await,
            FetchCommand::Tree(args) => tree(args, false).await,
            FetchCommand::Log(args) => log(args).await,
            FetchCommand::Blob(args) => blob(args).await,
            FetchCommand::Archive(args) => archive::main(*args).await,
        }
    });
    runtime.shutdown_timeout(LEAVING);
    ended
}

async fn bep(args: BepArgs) -> Result<u8, Failure> {
    let destination = match args.output_dir {
        Some(path) => Destination::Directory {
            path: std::path::absolute(path)?,
            flatten: args.flatten,
        },
        None => Destination::ExecRoot,
    };
    let policy = args.selection.policy()?;
    let rules = args.place.rules(destination)?;
    let options = args.place.options()?;
    // The file is the user's own, so it may say where its cache is.
    let source = args.cache.source_rule(true)?;
    let file = &args.file;
    while args.follow && !file.exists() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut events = EventFile::open(file, args.follow).await.map_err(Failure::usage)?;
    // What is fetched by hand is not a build that anybody asks about later: its record lives as long as we do.
    let scratch = Scratch::new()?;
    let record = super::record::open_record(&scratch.0).await?;
    let services = Services::open(record.clone(), policy, rules, source, options, false)?;
    let mut reports = services.engine.reports();
    let mut trouble = Vec::new();
    let mut ended = Vec::new();
    let work = async {
        let told = (&mut trouble, &mut ended);
        let (stream, end) = play(&mut events, args.follow, (&services.engine, &mut reports), told).await;
        if let Some(stream) = &stream {
            ended.push(settled((&services.engine, &mut reports), stream, end).await);
        }
        stream.is_some()
    };
    let look = async || Some(of_builds(&services.engine, |_| true).await);
    if !watched("outputs", work, look).await {
        let reason = trouble.join("; ");
        let separator = if reason.is_empty() { "" } else { ": " };
        return Err(Failure::failed(format!(
            "{}: does not contain the start of a build{separator}{reason}",
            file.display()
        )));
    }
    let mut err = print::err();
    for message in &trouble {
        writeln!(err, "outhaul: {}", printable(message))?;
    }
    for report in ended.iter().filter_map(|(_, report)| report.as_ref()) {
        for message in &report.messages {
            writeln!(err, "outhaul: {}", printable(message))?;
        }
        writeln!(err, "{}", report.line)?;
    }
    // Blocks for some seconds at most. With the output tree goes its directory of temporary files.
    let service = services.service.clone();
    let _ = tokio::task::spawn_blocking(move || {
        service.let_go();
        record.close();
    })
    .await;
    Ok(
        if ended.iter().all(|(failed, _)| *failed == 0) && trouble.is_empty() {
            exit::OK
        } else {
            exit::FAILED
        },
    )
}

/// How many outputs of a build have failed, and what is told of it.
type BuildEnd = (u64, Option<Report>);

/// Ends a stream, and waits for what comes of its build.
async fn settled(
    (engine, reports): (&Engine, &mut broadcast::Receiver<Report>),
    stream: &StreamKey,
    end: StreamEnd,
) -> BuildEnd {
    engine.ended(stream, end).await;
    let failed = engine.settled(stream).await.failed;
    (failed, reports.recv().await.ok())
}

/// Hands the events of a file to the engine. Gives their stream, once the start of the build has come, and how it ended. A
/// file of several builds, one after the other, has them settled in this order.
async fn play(
    events: &mut EventFile,
    follow: bool,
    (engine, reports): (&Engine, &mut broadcast::Receiver<Report>),
    (trouble, ended): (&mut Vec<String>, &mut Vec<BuildEnd>),
) -> (Option<StreamKey>, StreamEnd) {
    let mut stream: Option<StreamKey> = None;
    let mut backlog = Vec::new();
    let mut number = 0;
    loop {
        let framed = match events.next().await {
            Ok(Some(framed)) => framed,
            Ok(None) => return (stream, StreamEnd::Finished),
            Err(error) if error.is_skippable() => {
                trouble.push(error.to_string());
                continue;
            }
            Err(error) => {
                trouble.push(error.to_string());
                return (stream, StreamEnd::Broken(error.to_string()));
            }
        };
        let last = framed.last;
        if let Event::Started(started) = &framed.event {
            // One that begins again under its id goes on.
            if let Some(before) = stream
                .take()
                .filter(|before| before.invocation_id != started.invocation_id)
            {
                ended.push(settled((engine, &mut *reports), &before, StreamEnd::Finished).await);
                number = 0;
            }
            stream = Some(StreamKey {
                build_id: String::new(),
                invocation_id: started.invocation_id.clone(),
                ..StreamKey::default()
            });
        }
        backlog.push(framed);
        if let Some(stream) = &stream {
            let numbers = number + 1..;
            number += backlog.len() as i64;
            let events = numbers.zip(backlog.drain(..)).collect();
            engine.events(stream, events).await;
        }
        if last && follow {
            return (stream, StreamEnd::Finished);
        }
    }
}

/// The outputs of an action, or the files of a directory tree.
async fn tree(args: TreeArgs, is_action: bool) -> Result<u8, Failure> {
    let cache = args.cache.cache()?.actions();
    let digest = digest(&written(&args.digest)?, &args.cache, &*cache).await?;
    let nobody = Attribution::default();
    let expanded = if is_action {
        expand_action(&*cache, &digest, &nobody).await
    } else {
        expand_any_tree(&*cache, &digest, &nobody).await.map(Some)
    };
    let missing = || Failure::not_found(format!("{}: no result for action {digest}", cache.describe()));
    let expanded = match expanded {
        Ok(expanded) => expanded.ok_or_else(missing)?,
        Err(error) => return Err(in_plain_words(&*cache, error).await),
    };
    let outputs = expanded.into_iter().map(|e| (e.path, e.content)).collect();
    let ended = into_directory(&args.output_dir, &args.place, cache, outputs).await?;
    Ok(ended.code())
}

/// The outputs that an execution log reports.
async fn log(args: LogArgs) -> Result<u8, Failure> {
    let file = args.file.clone();
    let read = tokio::task::spawn_blocking(move || read_log(&file)).await;
    let log = read.map_err(Failure::failed)?.map_err(|error| match error {
        ActionCacheError::System { .. } => Failure::usage(error),
        error => Failure::failed(error),
    })?;
    let mut outputs: Vec<_> = log.facts.outputs().iter().collect();
    if !args.path.is_empty() {
        outputs.retain(|output| {
            let paths = [Some(&output.path), output.tree.as_ref()].into_iter().flatten();
            let mut paths = paths.map(ExecPath::as_str);
            paths.any(|path| args.path.iter().any(|regex| regex.matches(path)))
        });
    }
    if outputs.is_empty() {
        return Err(Failure::not_found(format!(
            "{}: no action in it has made such an output",
            args.file.display()
        )));
    }
    let Some(directory) = &args.output_dir else {
        let mut out = print::out();
        for output in outputs {
            writeln!(out, "{}  {}", output.digest, printable(output.path.as_str()))?;
        }
        return Ok(exit::OK);
    };
    let cache = args.cache.cache()?.actions();
    let outputs = outputs
        .into_iter()
        .map(|output| (output.path.clone(), OutputContent::Blob(output.digest.clone())));
    let ended = into_directory(directory, &args.place, cache, outputs.collect()).await?;
    Ok(ended.code())
}

async fn blob(args: BlobArgs) -> Result<u8, Failure> {
    let cache = args.cache.cache()?.actions();
    let digest = digest(&written(&args.digest)?, &args.cache, &*cache).await?;
    let path = std::path::absolute(&args.output)?;
    let failed = |e: std::io::Error| Failure::failed(format!("{}: {e}", path.display()));
    let is_standard = args.output == Path::new("-");
    let special = if is_standard {
        None
    } else {
        special(&path).map_err(failed)?
    };
    if is_standard || special.is_some() {
        let bytes = match read_blob(&*cache, &digest, &Attribution::default()).await {
            Ok(bytes) => bytes,
            Err(error) => return Err(in_plain_words(&*cache, error).await),
        };
        match special {
            Some(mut file) => file.write_all(&bytes).map_err(failed)?,
            None => std::io::stdout().lock().write_all(&bytes)?,
        }
        return Ok(exit::OK);
    }
    let named = path.parent().zip(path.file_name().and_then(|name| name.to_str()));
    let (directory, name) =
        named.ok_or_else(|| Failure::usage(format!("{}: not a file name", path.display())))?;
    let name = ExecPath::new(name).map_err(Failure::usage)?;
    let outputs = vec![(name, OutputContent::Blob(digest))];
    let ended = into_directory(directory, &args.place, cache, outputs).await?;
    // As with standard output: the one thing that was asked for is not there.
    Ok(if ended.evicted > 0 {
        exit::NOT_FOUND
    } else {
        ended.code()
    })
}

/// An error of the cache's; where asking the cache again says what is wrong with the settings, that.
async fn in_plain_words(cache: &dyn ActionStore, error: RemoteError) -> Failure {
    if error.is_not_found() {
        return Failure::not_found(error);
    }
    match tokio::time::timeout(EXPLANATION, cache.probe()).await {
        Ok(Err(explained)) => Failure::failed(explained),
        Ok(Ok(())) | Err(_) => Failure::failed(error),
    }
}

/// A digest as it is given.
fn written(text: &str) -> Result<WrittenDigest, Failure> {
    text.parse().map_err(|e| Failure::usage(format!("{text}: {e}")))
}

/// The digest that is meant. Of a hash alone, the store knows the size.
async fn digest(
    written: &WrittenDigest,
    args: &CacheArgs,
    cache: &dyn ActionStore,
) -> Result<Digest, Failure> {
    let assumed = args
        .digest_function
        .parse()
        .map_err(|e| Failure::usage(format!("--digest-function: {e}")))?;
    match written.find(assumed, cache).await {
        Ok(digest) => Ok(digest),
        Err(error) if error.kind == RemoteErrorKind::Config => Err(Failure::usage(error)),
        Err(error) => Err(in_plain_words(cache, error).await),
    }
}

/// How fetching ended.
struct Ended {
    failed: u64,
    /// Those of the failed that the cache no longer has.
    evicted: u64,
}

impl Ended {
    const fn code(&self) -> u8 {
        if self.failed == 0 { exit::OK } else { exit::FAILED }
    }
}

/// Brings outputs into a directory, all of them required.
async fn into_directory(
    directory: &Path,
    place: &PlaceArgs,
    cache: Arc<dyn ActionStore>,
    outputs: Vec<(ExecPath, OutputContent)>,
) -> Result<Ended, Failure> {
    let materializer = Materializer::start(place.options()?, Metrics::default())?;
    let directory = std::path::absolute(directory)?;
    let opened = tokio::task::spawn_blocking(move || OutputRoot::open(&directory, true)).await;
    let root = opened.map_err(Failure::failed)?.map_err(Failure::usage)?;
    let session = |completions| Session {
        root: Arc::new(Root {
            id: 0,
            place: Arc::new(root),
            epoch: Epoch::new(),
        }),
        version: 0,
        store: cache,
        attribution: Arc::new(Attribution::default()),
        trace: None,
        served: None,
        completions,
    };
    let mut tally = Tally::default();
    let (ours, outputs): (Vec<_>, Vec<_>) = outputs
        .into_iter()
        .partition(|(path, _)| path.components().next().is_some_and(is_reserved));
    for (path, _) in ours {
        let reason = format!("{path} has a name that is reserved for outhaul");
        tally.fail(Class::Required, &reason);
    }
    let wants = outputs
        .into_iter()
        .map(|(path, content)| Want::new(path, content, Class::Required, None))
        .collect();
    let begun = std::time::Instant::now();
    let counted = Arc::new(Counted::default());
    let request = materializer.request(session, wants).await;
    let mut request = request.counted_by(counted.clone());
    let mut evicted = 0;
    let work = async {
        while let Some(list) = request.next().await {
            for completion in &list {
                tally.add(completion);
                evicted += u64::from(matches!(completion.outcome, Outcome::Evicted(_)));
            }
        }
    };
    watched("outputs", work, async || Some(counted.now().into())).await;
    // Temporary files' directory goes with it.
    materializer.close().await;
    let mut err = print::err();
    for message in &tally.messages {
        writeln!(err, "outhaul: {}", printable(message))?;
    }
    writeln!(err, "{}", tally.summary(begun.elapsed()))?;
    Ok(Ended {
        failed: tally.failed,
        evicted,
    })
}

/// A directory of our own, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, Failure> {
        let name = format!(
            "outhaul-fetch-{}-{:016x}",
            std::process::id(),
            rand::random::<u64>()
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).map_err(|e| Failure::failed(format!("{}: {e}", path.display())))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left in the temporary directory is the system's to clean.
        let _ = remove_all(&self.0);
    }
}
