//! What is asked for.

use serde::{Deserialize, Serialize};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::error::StageError;
use crate::{
    invocation::{
        pattern::{PatternError, TargetPattern},
        policy::PathRegex,
    },
    output::Class,
};

/// Regular expressions of one request, and what all of them may come to once they are compiled: memory, and the time
/// that it takes.
const REGEXES: usize = 1000;
pub(super) const COMPILED: usize = 32 << 20;
/// Target patterns and output groups of one request.
const NAMES: usize = 10_000;
/// Bytes of all texts of one request.
const TEXT: usize = 1 << 20;

/// Anyone who waits for the answer; what is done for them ends with this.
#[derive(Debug)]
pub(super) struct Caller(pub(super) CancellationToken, #[allow(dead_code)] DropGuard);

impl Default for Caller {
    fn default() -> Self {
        let token = CancellationToken::new();
        Self(token.clone(), token.drop_guard())
    }
}

/// Which outputs of a build are wished for, as the user wrote it. Part of a marker, so its fields' names stay.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Wish {
    /// Target patterns; empty for all targets.
    pub(crate) targets: Vec<String>,
    /// Output groups; empty for all that are not hidden.
    pub(crate) output_groups: Vec<String>,
    /// Regular expressions that a whole exec path, or its tree's, must match one of; empty for all.
    pub(crate) include: Vec<String>,
    /// Regular expressions of exec paths that are left out.
    pub(crate) exclude: Vec<String>,
    /// Regular expressions of what must be there. With any, all else is optional.
    pub(crate) required: Vec<String>,
    /// Regular expressions of what may be missing.
    pub(crate) optional: Vec<String>,
    /// Whether outputs lie right in the directory, by file name, instead of at their exec paths.
    pub(crate) flatten: bool,
    /// Whether archives are unpacked.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) extract: bool,
    /// Whether programs are staged with what they need at run time.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) runfiles: bool,
    /// Whether only outputs of tests that have failed are asked for.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) failed: bool,
}

/// How files of collections are verified, and how they and archives are brought. The same comes of it in any manner, so it is
/// no part of a marker.
#[derive(Debug, Clone, Default)]
pub(crate) struct Manner {
    /// What checksums are good for.
    pub(crate) checking: crate::collection::Checking,
    /// Checksums, as `sha256sum` writes them.
    pub(crate) checksums: String,
    /// How many files are downloaded at the same time; 0 for the default.
    pub(crate) jobs: u32,
    /// Changed limits of one archive, as `NAME=VALUE`.
    pub(crate) limits: Vec<String>,
    /// Whether a build that still runs counts as far as it has come. Nothing is staged then.
    pub(crate) so_far: bool,
}

impl Manner {
    /// How many files of one request are downloaded at the same time by default.
    pub(crate) const JOBS: u16 = 10;
    /// And how many at most.
    pub(crate) const MOST_JOBS: u16 = 128;

    /// Refuses what has no effect on outputs of a build.
    pub(super) fn check_for_build(&self) -> Result<(), StageError> {
        let given = [
            ("--checksum", self.checking != crate::collection::Checking::Auto),
            ("--checksum-file", !self.checksums.is_empty()),
        ];
        match given.into_iter().find(|(_, is_given)| *is_given) {
            Some((flag, _)) => Err(StageError::Setting {
                flag: flag.to_owned(),
                reason: "requires --from; outputs of a build are verified against their digests".to_owned(),
            }),
            None => Ok(()),
        }
    }
}

/// A [`Wish`] whose patterns have been read.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// As it was written.
    pub(crate) wish: Wish,
    pub(super) targets: Vec<TargetPattern>,
    pub(super) include: Vec<PathRegex>,
    pub(super) exclude: Vec<PathRegex>,
    pub(super) required: Vec<PathRegex>,
    pub(super) optional: Vec<PathRegex>,
    caller: CancellationToken,
}

impl Request {
    /// Reads a wish.
    ///
    /// # Errors
    /// Naming the flag whose value makes no sense.
    #[cfg(test)]
    pub(crate) fn new(wish: Wish) -> Result<Self, StageError> {
        Self::for_caller(wish, CancellationToken::new())
    }

    /// The same for a caller who may go away. May take some tenths of a second.
    pub(super) fn for_caller(wish: Wish, caller: CancellationToken) -> Result<Self, StageError> {
        wish.check()?;
        let count = wish.regexes().map(|(_, list)| list.len()).sum::<usize>();
        let size = COMPILED / count.max(1);
        let regexes = |flag: &str, texts: &[String]| -> Result<Vec<PathRegex>, StageError> {
            let read = |text: &String| {
                if caller.is_cancelled() {
                    return Err(gone());
                }
                PathRegex::within(text, size.min(PathRegex::SIZE))
                    .map_err(|e| setting(flag, text, format!("{e} (for one of the request's {count})")))
            };
            texts.iter().map(read).collect()
        };
        let target = |text: &String| {
            text.parse()
                .map_err(|e: PatternError| setting("TARGET", text, e.to_string()))
        };
        Ok(Self {
            targets: wish.targets.iter().map(target).collect::<Result<_, _>>()?,
            include: regexes("--include", &wish.include)?,
            exclude: regexes("--exclude", &wish.exclude)?,
            required: regexes("--required", &wish.required)?,
            optional: regexes("--optional", &wish.optional)?,
            wish,
            caller,
        })
    }

    /// Fails once nobody waits for what is found any more.
    pub(super) fn still_asked(&self) -> Result<(), StageError> {
        if self.caller.is_cancelled() {
            Err(gone())
        } else {
            Ok(())
        }
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

fn setting(flag: &str, text: &str, reason: String) -> StageError {
    StageError::Setting {
        flag: format!("{flag}={text}"),
        reason,
    }
}

pub(super) fn gone() -> StageError {
    StageError::Internal("the caller has disconnected".to_owned())
}

pub(super) fn hits(regex: &PathRegex, paths: &[&str]) -> bool {
    paths.iter().any(|path| regex.matches(path))
}

impl Wish {
    /// Its lists of regular expressions, with their flags.
    pub(super) fn regexes(&self) -> impl Iterator<Item = (&'static str, &[String])> {
        [
            ("--include", &*self.include),
            ("--exclude", &*self.exclude),
            ("--required", &*self.required),
            ("--optional", &*self.optional),
        ]
        .into_iter()
    }

    /// Refuses what is too much for one request, before any of it is read.
    pub(super) fn check(&self) -> Result<(), StageError> {
        let names = [
            ("TARGET", &*self.targets),
            ("--output-group", &*self.output_groups),
        ];
        let text = names.into_iter().chain(self.regexes());
        let text: usize = text.flat_map(|(_, list)| list).map(String::len).sum();
        for (flag, found, most, what) in [
            (
                "--include",
                self.regexes().map(|(_, list)| list.len()).sum(),
                REGEXES,
                "regular expressions",
            ),
            (
                "TARGET",
                names.iter().map(|(_, list)| list.len()).sum(),
                NAMES,
                "targets and output groups",
            ),
            ("TARGET", text, TEXT, "bytes of patterns"),
        ] {
            if found > most {
                return Err(StageError::Setting {
                    flag: flag.to_owned(),
                    reason: format!("the request has {found} {what}, which exceeds the limit of {most}"),
                });
            }
        }
        Ok(())
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_request_may_cost_so_much_and_no_more() {
        let wish = |include: Vec<String>, targets: usize| Wish {
            include,
            targets: vec!["//a:b".to_owned(); targets],
            ..Wish::default()
        };
        let plain = |n: usize| {
            (0..n)
                .map(|n| format!("bazel-out/.*/lib{n}\\.(so|a)"))
                .collect::<Vec<_>>()
        };
        Request::new(wish(plain(REGEXES), NAMES)).unwrap();
        Request::new(wish(vec![r"\w+/.*\.so".to_owned(); 100], 0)).unwrap();
        for (wish, part) in [
            (wish(vec![r"\pL{200}".to_owned(); 200], 0), "size limit"),
            (wish(plain(REGEXES + 1), 0), "1001 regular expressions"),
            (wish(Vec::new(), NAMES + 1), "10001 targets"),
            (wish(vec!["a".repeat(TEXT + 1)], 0), "bytes of patterns"),
        ] {
            let error = Request::new(wish).unwrap_err();
            assert!(matches!(error, StageError::Setting { .. }), "{error}");
            assert!(error.to_string().contains(part), "{error}");
        }
        let caller = Caller::default();
        let token = caller.0.clone();
        let request = Request::for_caller(wish(plain(1), 1), token.clone()).unwrap();
        request.still_asked().unwrap();
        drop(caller);
        assert!(request.still_asked().is_err());
        assert!(Request::for_caller(wish(plain(1), 1), token).is_err());
    }
}
