//! What is asked for.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::StageError;
use crate::{
    invocation::{pattern::TargetPattern, policy::PathRegex},
    output::Class,
};

/// Which outputs of a build are wished for, as the user wrote it. Part of a marker, so its fields' names stay.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Wish {
    /// Target patterns; empty for all targets.
    pub targets: Vec<String>,
    /// Output groups; empty for all that are not hidden.
    pub output_groups: Vec<String>,
    /// Regular expressions that a whole exec path, or its tree's, must match one of; empty for all.
    pub include: Vec<String>,
    /// Regular expressions of exec paths that are left out.
    pub exclude: Vec<String>,
    /// Regular expressions of what must be there. With any, all else is optional.
    pub required: Vec<String>,
    /// Regular expressions of what may be missing.
    pub optional: Vec<String>,
    /// Whether outputs lie right in the directory, by file name, instead of at their exec paths.
    pub flatten: bool,
}

/// A [`Wish`] whose patterns have been read.
#[derive(Debug, Clone)]
pub struct Request {
    /// As it was written.
    pub wish: Wish,
    pub(super) targets: Vec<TargetPattern>,
    pub(super) include: Vec<PathRegex>,
    pub(super) exclude: Vec<PathRegex>,
    pub(super) required: Vec<PathRegex>,
    pub(super) optional: Vec<PathRegex>,
}

/// Which build.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Which {
    /// The invocation; empty for the newest.
    pub invocation_id: String,
    /// A directory in the workspace whose newest build is meant, absolute; empty for any.
    pub workspace: String,
}

impl Request {
    /// Reads a wish.
    ///
    /// # Errors
    /// Naming the flag whose value makes no sense.
    pub fn new(wish: Wish) -> Result<Self, StageError> {
        fn all<T: std::str::FromStr>(flag: &str, texts: &[String]) -> Result<Vec<T>, StageError>
        where
            T::Err: std::fmt::Display,
        {
            let read = |text: &String| {
                text.parse().map_err(|e: T::Err| StageError::Setting {
                    flag: format!("{flag}={text}"),
                    reason: e.to_string(),
                })
            };
            texts.iter().map(read).collect()
        }
        Ok(Self {
            targets: all("TARGET", &wish.targets)?,
            include: all("--include", &wish.include)?,
            exclude: all("--exclude", &wish.exclude)?,
            required: all("--required", &wish.required)?,
            optional: all("--optional", &wish.optional)?,
            wish,
        })
    }

    /// How much an output is wanted that any of these paths stands for: its own and that of its tree.
    pub(super) fn class(&self, paths: &[&str]) -> Class {
        let any = |list: &[PathRegex]| list.iter().any(|regex| hits(regex, paths));
        let required = any(&self.required) || (self.required.is_empty() && !any(&self.optional));
        if required {
            Class::Required
        } else {
            Class::Optional
        }
    }
}

pub(super) fn hits(regex: &PathRegex, paths: &[&str]) -> bool {
    paths.iter().any(|path| regex.matches(path))
}

impl Wish {
    /// With lists whose order means nothing in one order, to be compared. That of target patterns means something.
    pub(super) fn sorted(&self) -> Self {
        let mut wish = self.clone();
        for list in [
            &mut wish.output_groups,
            &mut wish.include,
            &mut wish.exclude,
            &mut wish.required,
            &mut wish.optional,
        ] {
            list.sort();
            list.dedup();
        }
        wish
    }
}

impl Which {
    /// Whether the directory asked for is this workspace, or lies in it. Blocks on the file system.
    pub(super) fn is_of(&self, workspace: &str) -> bool {
        if workspace.is_empty() {
            return false;
        }
        let asked = Path::new(&self.workspace);
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        asked.starts_with(workspace) || real(asked).starts_with(real(Path::new(workspace)))
    }
}
