//! The runfiles of staged programs: what each needs at run time goes into `PROGRAM.runfiles` beside it, as it lies there
//! for Bazel, but with the files themselves instead of links to the workspace and the output base.
//!
//! No manifest goes with them: it would name absolute paths, and programs find their runfiles in the directory.

mod load;
mod local;
mod sources;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
};

use self::load::Load;
use super::{
    carried::Carried,
    error::StageError,
    request::Request,
    select::{Artifact, Selection, side_by_side},
};
use crate::{
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    output::OutputContent,
    record::{InvocationRow, Record},
    remote::Copy,
    roots::Roots,
};

/// Runfiles of one request.
const RUNFILES: usize = 1_000_000;

/// Something that a program needs at run time.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Runfile {
    /// Where it is below `PROGRAM.runfiles`.
    pub(super) name: String,
    /// Where the build has it.
    pub(super) exec_path: ExecPath,
    /// What it is, or why it is missing.
    pub(super) content: Result<OutputContent, String>,
}

/// What is known of runfiles besides that they are wished for.
#[derive(Debug, Default)]
pub(super) struct Added {
    /// Local files that have the bytes of some.
    pub(super) copies: HashMap<Digest, Copy>,
    /// Those of them that no cache need have.
    local: HashSet<Digest>,
    /// Those that are not available, by their places, and why.
    pub(super) absent: HashMap<ExecPath, String>,
}

impl Added {
    /// Where the bytes of an output are on this machine, if no cache need have them.
    pub(super) fn local(&self, content: &OutputContent) -> Option<PathBuf> {
        match content {
            OutputContent::Blob(digest) if self.local.contains(digest) => {
                let copy = self.copies.get(digest)?;
                Some(copy.root.join(copy.path.as_path()))
            }
            _ => None,
        }
    }

    /// Why what belongs at a place is not available.
    pub(super) fn error(&self, place: &ExecPath) -> Option<&str> {
        self.absent.get(place).map(String::as_str)
    }
}

/// A build whose programs are staged.
pub(super) struct Build<'a> {
    pub(super) row: &'a InvocationRow,
    pub(super) function: DigestFunction,
    /// What came with it, if it is from elsewhere.
    pub(super) carried: &'a [Carried],
}

/// Adds the runfiles of the programs among what is selected. Blocks.
///
/// # Errors
/// When none is a program, the manifests are not those of this build, or name what may not be staged.
pub(super) fn add(
    selection: &mut Selection,
    record: &Record,
    roots: &Roots,
    build: &Build<'_>,
    request: &Request,
) -> Result<Added, StageError> {
    if request.wish.extract {
        return Err(refused(
            "programs and their runfiles are staged as they are, without --extract",
        ));
    }
    let mut found = if build.row.root.is_none() && !build.carried.is_empty() {
        let load = Load::of(build.carried, build.function)?;
        for artifact in selection.artifacts.iter_mut().chain(&mut selection.also) {
            let content = std::mem::replace(&mut artifact.content, OutputContent::Directory);
            artifact.content = load.with_bytes(content);
        }
        Found::Carried(load)
    } else {
        let finder = local::Finder::open(record, roots, build.row, build.function, request)?;
        Found::Local(Box::new(finder))
    };
    let mut placing = Placing::of(selection);
    let mut programs = 0;
    for program in selection.artifacts.iter().chain(&selection.also) {
        let runfiles = match &mut found {
            Found::Local(finder) => finder.of(&program.exec_path)?,
            Found::Carried(load) => load.of_program(&program.exec_path),
        };
        let Some(runfiles) = runfiles else { continue };
        programs += 1;
        for runfile in runfiles {
            placing.add(program, runfile)?;
        }
    }
    if programs == 0 {
        return Err(refused(
            "none of the outputs has a manifest of runfiles beside it (NAME.runfiles_manifest, which Bazel writes when it \
             builds a program, but with --nobuild_runfile_manifests)",
        ));
    }
    side_by_side(&placing.all)?;
    selection.artifacts = placing.all.into_values().collect();
    let absent = placing.absent;
    Ok(match found {
        Found::Local(finder) => Added {
            copies: finder.copies,
            local: finder.local,
            absent,
        },
        Found::Carried(_) => Added {
            absent,
            ..Added::default()
        },
    })
}

/// Where runfiles are looked for.
enum Found<'a> {
    /// On this machine.
    Local(Box<local::Finder<'a>>),
    /// In what came with the build.
    Carried(Load),
}

fn refused(reason: impl Into<String>) -> StageError {
    StageError::Setting {
        flag: "--runfiles".to_owned(),
        reason: reason.into(),
    }
}

/// Everything that is to be staged.
struct Placing {
    /// Where outputs that are selected themselves go.
    selected: HashMap<ExecPath, Artifact>,
    /// By their places.
    all: BTreeMap<ExecPath, Artifact>,
    absent: HashMap<ExecPath, String>,
}

impl Placing {
    fn of(selection: &Selection) -> Self {
        let all = selection.artifacts.iter();
        let also = selection.also.iter();
        let by_path = all
            .clone()
            .chain(also)
            .map(|one| (one.exec_path.clone(), one.clone()));
        Self {
            selected: by_path.collect(),
            all: all.map(|one| (one.place.clone(), one.clone())).collect(),
            absent: HashMap::new(),
        }
    }

    fn add(&mut self, program: &Artifact, runfile: Runfile) -> Result<(), StageError> {
        let place = format!("{}.runfiles/{}", program.place, runfile.name);
        let place =
            ExecPath::new(&place).map_err(|e| refused(format!("a runfile of {}: {e}", program.exec_path)))?;
        if self.all.len() > RUNFILES {
            return Err(refused(format!("there are more than {RUNFILES} runfiles")));
        }
        let content = match (self.selected.get(&runfile.exec_path), runfile.content) {
            // It is staged anyway: once is enough.
            (Some(there), _) if there.class >= program.class => {
                OutputContent::Symlink(relative(&place, &there.place))
            }
            (Some(there), _) => there.content.clone(),
            (None, Ok(content)) => content,
            (None, Err(reason)) => {
                self.absent.insert(place.clone(), reason);
                OutputContent::Directory
            }
        };
        let artifact = Artifact {
            group: Arc::from("runfiles"),
            exec_path: runfile.exec_path,
            content,
            place: place.clone(),
            ..program.clone()
        };
        match self.all.get_mut(&place) {
            Some(first) if !first.content.is_same(&artifact.content) => Err(StageError::Collision {
                first: first.exec_path.clone(),
                second: artifact.exec_path,
                place,
            }),
            Some(first) => {
                first.class = first.class.max(artifact.class);
                Ok(())
            }
            None => {
                self.all.insert(place, artifact);
                Ok(())
            }
        }
    }
}

/// The target of a link in one place to another.
fn relative(from: &ExecPath, to: &ExecPath) -> String {
    let same = from.components().zip(to.components());
    let same = same.take_while(|(from, to)| from == to).count();
    let up = from.components().count() - same - 1;
    let down = to.components().skip(same);
    std::iter::repeat_n("..", up)
        .chain(down)
        .collect::<Vec<_>>()
        .join("/")
}
