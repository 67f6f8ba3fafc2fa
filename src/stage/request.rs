//! What is asked for.

use std::{collections::HashMap, path::Path};

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
    /// Of some things, each of a workspace, those of the workspace asked for: the innermost one that the directory lies
    /// in. All of them if none is asked for. Blocks on the file system.
    pub(super) fn innermost<'a, T>(
        &self,
        all: impl IntoIterator<Item = T>,
        workspace: impl Fn(&T) -> &'a str,
    ) -> Vec<T> {
        if self.workspace.is_empty() {
            return all.into_iter().collect();
        }
        let mut depths: HashMap<&str, Option<usize>> = HashMap::new();
        let mut found: Vec<(usize, T)> = Vec::new();
        for one in all {
            let workspace = workspace(&one);
            let depth = *depths
                .entry(workspace)
                .or_insert_with(|| self.depth_of(workspace));
            found.extend(depth.map(|depth| (depth, one)));
        }
        let deepest = found.iter().map(|(depth, _)| *depth).max();
        found.retain(|(depth, _)| Some(*depth) == deepest);
        found.into_iter().map(|(_, one)| one).collect()
    }

    /// How deep a workspace lies that the directory asked for is, or lies in.
    fn depth_of(&self, workspace: &str) -> Option<usize> {
        if workspace.is_empty() {
            return None;
        }
        let asked = Path::new(&self.workspace);
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let of = real(Path::new(workspace));
        let is_in = asked.starts_with(workspace) || real(asked).starts_with(&of);
        is_in.then(|| of.components().count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workspace_within_another_has_its_own_builds() {
        let innermost = |asked: &str, all: &[&'static str]| {
            let which = Which {
                workspace: asked.to_owned(),
                ..Which::default()
            };
            which.innermost(all.iter().copied(), |workspace| *workspace)
        };
        let all = ["/w", "/w/inner", "", "/other", "/w/inner", "/w"];
        assert_eq!(innermost("/w/inner/sub", &all), ["/w/inner", "/w/inner"]);
        assert_eq!(innermost("/w/inner", &all), ["/w/inner", "/w/inner"]);
        assert_eq!(innermost("/w/innermost", &all), ["/w", "/w"]);
        assert_eq!(innermost("/x", &all), [""; 0]);
        assert_eq!(innermost("", &all), all);
    }
}
