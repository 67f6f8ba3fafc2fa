//! Bazel's compact execution log (`--execution_log_compact_file`, Bazel 7.1 and later): what the actions of one build have
//! made, with digests. A stream of zstd with an entry after its length each; entries refer to earlier ones by number.
//!
//! Actions that Bazel had no need to run are not in it, so it has only a part.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, BufRead, BufReader, Read},
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use prost::Message as _;
use rustix::fs::{self, Mode, OFlags};

use super::{
    ActionCacheError,
    facts::{Facts, OUTPUT_DIRECTORY, Output},
};
use crate::{
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    open_files::{GUARDED, patient},
    proto::execution_log::{self as wire, entry::Kind},
};

/// Bytes of the file, of one entry, and of all entries.
const LARGEST: u64 = 512 << 20;
const ENTRY: u64 = 64 << 20;
const ENTRIES: u64 = 8 << 30;
/// Files that are remembered, those of trees included.
const FILES: usize = 4_000_000;
/// The largest window of zstd, as a power of two: that of its highest levels.
const WINDOW: u32 = 27;

/// What a log says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Log {
    /// The build; empty in logs of old versions.
    pub(crate) invocation_id: String,
    /// The outputs of its actions.
    pub(crate) facts: Facts,
}

/// What is wrong with a log.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It ends in the middle.
    Torn,
    /// The entry that begins at this byte, once it is decompressed, makes no sense.
    Bad(u64, &'static str),
}

/// Reads a log. Blocks on the file system.
///
/// # Errors
/// When it cannot be read, is too large, ends in the middle, or makes no sense.
pub(crate) fn read_log(path: &Path) -> Result<Log, ActionCacheError> {
    read(path, |_| true)
}

/// The same, if it is a file of our own user's that the build tool was told to write.
///
/// # Errors
/// As [`read_log`], or when it is another user's.
pub(crate) fn read_own_log(path: &Path) -> Result<Log, ActionCacheError> {
    read(path, |owner| owner == rustix::process::geteuid().as_raw())
}

/// Reads a log, if its owner may be believed: that of the file that is read, whatever is put in its place meanwhile.
fn read(path: &Path, is_believed: impl Fn(u32) -> bool) -> Result<Log, ActionCacheError> {
    let system = |operation, source| ActionCacheError::System {
        operation,
        path: path.to_owned(),
        source,
    };
    let unfit = |reason: &str| ActionCacheError::Unfit {
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    // A user may have a link there.
    let flags = GUARDED.difference(OFlags::NOFOLLOW);
    let file = patient(|| fs::open(path, flags, Mode::empty())).map_err(|e| system("open", e.into()))?;
    let file = File::from(file);
    let metadata = file.metadata().map_err(|e| system("look at", e))?;
    if !is_believed(metadata.uid()) {
        return Err(unfit("it belongs to another user"));
    }
    if !metadata.is_file() {
        return Err(unfit("it is not a regular file"));
    }
    if metadata.len() > LARGEST {
        return Err(unfit("it is too large"));
    }
    decode(BufReader::new(file)).map_err(|fault| match fault {
        Fault::Torn => ActionCacheError::Torn {
            path: path.to_owned(),
        },
        Fault::Bad(at, what) => ActionCacheError::Damaged {
            path: path.to_owned(),
            at: usize::try_from(at).unwrap_or(usize::MAX),
            what,
        },
    })
}

/// What entries refer to.
enum Item {
    File(Output),
    Tree(Vec<Output>),
    /// Neither an output nor anything else that is kept.
    Other,
}

/// Decodes a log.
pub(super) fn decode(input: impl BufRead) -> Result<Log, Fault> {
    let mut decoder =
        zstd::Decoder::with_buffer(input).map_err(|_| Fault::Bad(0, "it cannot be decompressed"))?;
    decoder
        .window_log_max(WINDOW)
        .map_err(|_| Fault::Bad(0, "it cannot be decompressed"))?;
    let mut entries = Entries {
        input: BufReader::new(decoder),
        at: 0,
    };
    let mut reading = Reading {
        function: DigestFunction::Sha256,
        log: Log::default(),
        items: HashMap::new(),
        files: 0,
        outputs: HashMap::new(),
        links: Vec::new(),
    };
    loop {
        let at = entries.at;
        let Some(bytes) = entries.next()? else {
            return if at == 0 {
                Err(Fault::Torn)
            } else {
                Ok(reading.end())
            };
        };
        let entry = wire::Entry::decode(&*bytes).map_err(|_| Fault::Bad(at, "it is not an entry"))?;
        reading
            .take(entry, at == 0)
            .map_err(|what| Fault::Bad(at, what))?;
    }
}

/// The entries of a log.
struct Entries<R> {
    input: R,
    at: u64,
}

impl<R: Read> Entries<R> {
    fn next(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        let began = self.at;
        let mut length = 0_u64;
        for place in 0.. {
            let Some(byte) = self.byte()? else {
                return if place == 0 { Ok(None) } else { Err(Fault::Torn) };
            };
            if place > 4 {
                return Err(Fault::Bad(began, "invalid length of an entry"));
            }
            length |= u64::from(byte & 0x7f) << (7 * place);
            if byte & 0x80 == 0 {
                break;
            }
        }
        if length > ENTRY || began + length > ENTRIES {
            return Err(Fault::Bad(began, "it is too large"));
        }
        let mut bytes = Vec::new();
        // As much as there is, so that a wrong length costs no memory.
        let read = (&mut self.input).take(length).read_to_end(&mut bytes);
        read.map_err(|e| self.fault(&e))?;
        self.at += bytes.len() as u64;
        if bytes.len() as u64 == length {
            Ok(Some(bytes))
        } else {
            Err(Fault::Torn)
        }
    }

    fn byte(&mut self) -> Result<Option<u8>, Fault> {
        let mut byte = [0];
        match self.input.read_exact(&mut byte) {
            Ok(()) => {
                self.at += 1;
                Ok(Some(byte[0]))
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && !is_torn(&error) => Ok(None),
            Err(error) => Err(self.fault(&error)),
        }
    }

    fn fault(&self, error: &io::Error) -> Fault {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            Fault::Torn
        } else {
            Fault::Bad(self.at, "it cannot be decompressed")
        }
    }
}

/// Whether the decompressor has missed something, and not only the reader at its end.
fn is_torn(error: &io::Error) -> bool {
    error
        .get_ref()
        .is_some_and(|inner| inner.to_string().contains("incomplete frame"))
}

/// A log as far as it was read.
struct Reading {
    function: DigestFunction,
    log: Log,
    items: HashMap<u32, Item>,
    /// How many files those have.
    files: usize,
    /// What actions have made, by path; of a tree, its files.
    outputs: HashMap<String, Vec<Output>>,
    /// Links, and where they lead.
    links: Vec<(ExecPath, ExecPath)>,
}

impl Reading {
    fn take(&mut self, entry: wire::Entry, is_first: bool) -> Result<(), &'static str> {
        let item = match entry.kind {
            Some(Kind::Invocation(invocation)) if is_first => {
                let name = invocation
                    .hash_function_name
                    .to_ascii_lowercase()
                    .replace('-', "");
                self.function = name.parse().map_err(|_| "unknown digest function")?;
                self.log.invocation_id = invocation.id;
                Item::Other
            }
            Some(Kind::Invocation(_)) => return Err("a second invocation"),
            Some(Kind::File(file)) => match output_path(&file.path)? {
                Some(path) => Item::File(self.output(path, None, &file)?),
                None => Item::Other,
            },
            Some(Kind::Directory(directory)) => match output_path(&directory.path)? {
                Some(tree) => {
                    let children = directory.files.iter().map(|file| {
                        let path = tree.join(&file.path).map_err(|_| "invalid path of an output")?;
                        self.output(path, Some(tree.clone()), file)
                    });
                    Item::Tree(children.collect::<Result<_, _>>()?)
                }
                None => Item::Other,
            },
            Some(Kind::Spawn(spawn)) => {
                self.spawn(&spawn)?;
                Item::Other
            }
            Some(Kind::Symlink(link)) => {
                let paths = (output_path(&link.output_path)?, output_path(&link.input_path)?);
                // Others are sources, which are there.
                if let (Some(from), Some(to)) = paths {
                    self.links.push((from, to));
                }
                Item::Other
            }
            None => Item::Other,
        };
        self.files += match &item {
            Item::Tree(files) => files.len(),
            Item::File(_) | Item::Other => 1,
        };
        if self.files > FILES {
            return Err("it names too many files");
        }
        if entry.id != 0 && self.items.insert(entry.id, item).is_some() {
            return Err("two entries have one number");
        }
        Ok(())
    }

    fn spawn(&mut self, spawn: &wire::Spawn) -> Result<(), &'static str> {
        let has_failed = spawn.exit_code != 0 || !spawn.status.is_empty();
        let is_remote = spawn.cache_hit || spawn.runner == "remote" || spawn.remote_cacheable;
        // Zero: an output that was not made.
        for output in spawn.outputs.iter().filter(|output| output.id != 0) {
            let item = self.items.get(&output.id).ok_or("reference to a missing entry")?;
            if has_failed || !is_remote {
                continue;
            }
            // An action that ran again has made what it made last.
            match item {
                Item::File(file) => {
                    self.outputs
                        .insert(file.path.as_str().to_owned(), vec![file.clone()]);
                }
                Item::Tree(files) => {
                    if let Some(tree) = files.first().and_then(|file| file.tree.as_ref()) {
                        self.outputs.insert(tree.as_str().to_owned(), files.clone());
                    }
                }
                Item::Other => {}
            }
        }
        Ok(())
    }

    fn output(
        &self,
        path: ExecPath,
        tree: Option<ExecPath>,
        file: &wire::File,
    ) -> Result<Output, &'static str> {
        let digest = match &file.digest {
            Some(digest) => {
                let size = u64::try_from(digest.size_bytes).map_err(|_| "negative size")?;
                Digest::from_hex(Some(self.function), &digest.hash, size).map_err(|_| "invalid digest")?
            }
            None => Digest::of(self.function, b""),
        };
        Ok(Output {
            path,
            digest,
            tree,
            link_to: None,
            // It was made, or found, in this very build.
            expires_ms: i64::MAX,
            is_primary: true,
        })
    }

    fn end(mut self) -> Log {
        for (from, to) in std::mem::take(&mut self.links) {
            let target = match self.outputs.get(to.as_str()).map(Vec::as_slice) {
                Some([file]) if file.tree.is_none() => file.clone(),
                _ => continue,
            };
            let link = Output {
                path: from.clone(),
                link_to: Some(target.link_to.clone().unwrap_or(target.path)),
                ..target
            };
            self.outputs.insert(from.as_str().to_owned(), vec![link]);
        }
        let mut seen = HashSet::new();
        let mut outputs: Vec<Output> = self.outputs.into_values().flatten().collect();
        outputs.retain(|output| seen.insert(output.path.clone()));
        self.log.facts = Facts::of_log(outputs);
        self.log
    }
}

/// The path below `bazel-out`; `None` for one elsewhere.
fn output_path(path: &str) -> Result<Option<ExecPath>, &'static str> {
    if !path.starts_with(OUTPUT_DIRECTORY) {
        return Ok(None);
    }
    ExecPath::new(path)
        .map(Some)
        .map_err(|_| "invalid path of an output")
}

/// What the fuzz target runs: entries of any bytes, and a stream of any. What is read makes sense.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    let check = |log: Log| {
        let outputs = log.facts.outputs();
        assert!(outputs.is_sorted_by(|a, b| a.path < b.path));
        for output in outputs {
            assert!(output.path.starts_with("bazel-out"));
            assert_eq!(log.facts.get(output.path.as_str()), Some(output));
        }
    };
    if let Ok(log) = decode(data) {
        check(log);
    }
    let Ok(packed) = zstd::bulk::compress(data, 1) else {
        return;
    };
    if let Ok(log) = decode(&*packed) {
        check(log);
        // Without its end it is never taken for whole.
        assert_eq!(decode(&packed[..packed.len() - 1]), Err(Fault::Torn));
    }
}

#[cfg(test)]
mod tests {
    use super::{
        wire::{Directory, Entry, Invocation, Spawn, SpawnOutput, Symlink},
        *,
    };

    fn file(path: &str, text: &str) -> wire::File {
        let digest = Digest::of(DigestFunction::Sha256, text.as_bytes());
        wire::File {
            path: path.to_owned(),
            digest: (!text.is_empty()).then(|| wire::Digest {
                hash: digest.hash_hex(),
                size_bytes: i64::try_from(text.len()).unwrap(),
            }),
        }
    }

    fn spawn(outputs: &[u32]) -> Spawn {
        Spawn {
            outputs: outputs.iter().map(|id| SpawnOutput { id: *id }).collect(),
            cache_hit: true,
            ..Spawn::default()
        }
    }

    fn written(entries: &[(u32, Kind)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (id, kind) in entries {
            let entry = Entry {
                id: *id,
                kind: Some(kind.clone()),
            };
            entry.encode_length_delimited(&mut bytes).unwrap();
        }
        zstd::encode_all(&*bytes, 3).unwrap()
    }

    fn entries() -> Vec<(u32, Kind)> {
        let invocation = Invocation {
            hash_function_name: "SHA-256".to_owned(),
            id: "inv".to_owned(),
        };
        let tree = Directory {
            path: "bazel-out/k8/bin/tree".to_owned(),
            files: vec![file("a", "of a"), file("sub/b c", "of b")],
        };
        let link = Symlink {
            input_path: "bazel-out/k8/bin/x".to_owned(),
            output_path: "bazel-out/k8/bin/link".to_owned(),
        };
        vec![
            (0, Kind::Invocation(invocation)),
            (1, Kind::File(file("app/source.c", "source"))),
            (7, Kind::File(file("bazel-out/k8/bin/x", "of x"))),
            (3, Kind::File(file("bazel-out/k8/bin/empty", ""))),
            (4, Kind::Directory(tree)),
            (
                5,
                Kind::File(file("bazel-out/k8/bin/input", "of an action that did not run")),
            ),
            (0, Kind::Spawn(spawn(&[7, 3, 0]))),
            (0, Kind::Spawn(spawn(&[4]))),
            (0, Kind::Symlink(link)),
        ]
    }

    #[test]
    fn outputs_trees_and_links_of_the_actions_that_ran_are_reported() {
        let log = decode(&*written(&entries())).unwrap();
        assert_eq!(log.invocation_id, "inv");
        let outputs = log.facts.outputs().iter();
        let outputs: Vec<_> = outputs
            .map(|output| {
                let name = output.path.as_str().strip_prefix("bazel-out/k8/bin/").unwrap();
                (
                    name,
                    output.digest.size(),
                    output.tree.is_some(),
                    output.link_to.is_some(),
                )
            })
            .collect();
        assert_eq!(
            outputs,
            [
                ("empty", 0, false, false),
                ("link", 4, false, true),
                ("tree/a", 4, true, false),
                ("tree/sub/b c", 4, true, false),
                ("x", 4, false, false),
            ]
        );
        assert_eq!(log.facts.extent(), crate::action_cache::Extent::Log);
    }

    #[test]
    fn what_failed_or_stayed_on_one_machine_is_not_in_the_cache() {
        for change in [
            (|spawn: &mut Spawn| spawn.exit_code = 1) as fn(&mut Spawn),
            |spawn| spawn.status = "TIMEOUT".to_owned(),
            |spawn| spawn.cache_hit = false,
        ] {
            let mut entries = entries();
            for (_, kind) in &mut entries {
                if let Kind::Spawn(spawn) = kind {
                    change(spawn);
                }
            }
            assert_eq!(decode(&*written(&entries)).unwrap().facts.outputs(), []);
        }
    }

    #[test]
    fn a_log_that_is_torn_or_lies_is_refused_as_a_whole() {
        let whole = written(&entries());
        for end in 0..whole.len() {
            let torn = decode(&whole[..end]);
            assert_eq!(torn, Err(Fault::Torn), "{end}");
        }
        // Its end came between two entries, or in one.
        let plain = zstd::decode_all(&*whole).unwrap();
        let cut = zstd::encode_all(&plain[..plain.len() - 1], 3).unwrap();
        assert_eq!(decode(&*cut), Err(Fault::Torn));
        type Change = fn(&mut Vec<(u32, Kind)>);
        for (change, what) in [
            (
                (|e| e.push((0, Kind::Spawn(spawn(&[99]))))) as Change,
                "missing entry",
            ),
            (
                |e| e.push((7, Kind::File(file("bazel-out/y", "y")))),
                "one number",
            ),
            (|e| e.push(e[0].clone()), "second invocation"),
            (
                |e| e.push((9, Kind::File(file("bazel-out/../y", "y")))),
                "invalid path",
            ),
            (
                |e| {
                    e.push((
                        9,
                        Kind::Directory(Directory {
                            path: "bazel-out/t".to_owned(),
                            files: vec![file("../y", "y")],
                        }),
                    ));
                },
                "invalid path",
            ),
            (
                |e| {
                    let mut short = file("bazel-out/y", "y");
                    short.digest.as_mut().unwrap().hash.pop();
                    e.push((9, Kind::File(short)));
                },
                "invalid digest",
            ),
            (
                |e| {
                    if let Kind::Invocation(invocation) = &mut e[0].1 {
                        invocation.hash_function_name = "CRC".to_owned();
                    }
                },
                "digest function",
            ),
        ] {
            let mut entries = entries();
            change(&mut entries);
            match decode(&*written(&entries)) {
                Err(Fault::Bad(_, said)) => assert!(said.contains(what), "{said}"),
                other => panic!("{what}: {other:?}"),
            }
        }
        let huge = zstd::encode_all(&[0xff, 0xff, 0xff, 0xff, 0x0f][..], 3).unwrap();
        assert_eq!(decode(&*huge), Err(Fault::Bad(0, "it is too large")));
        assert!(matches!(decode(&b"no log at all"[..]), Err(Fault::Bad(0, _))));
    }
}
