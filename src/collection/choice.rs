//! Which names are wanted, and how much.

use regex::{Regex, RegexBuilder};

use crate::output::Class;

/// Bytes that one pattern may take, unless told otherwise.
const COMPILED: usize = 10 << 20;

/// Patterns as they are given. Each is searched in the file name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Patterns {
    /// If there are any, one of them must match.
    pub(crate) include: Vec<String>,
    /// None of them may match.
    pub(crate) exclude: Vec<String>,
    /// What must be there; everything else may then be missing.
    pub(crate) required: Vec<String>,
    /// What may be missing; without `required`, everything else must be there.
    pub(crate) optional: Vec<String>,
}

/// Patterns that can be matched.
#[derive(Debug)]
pub(crate) struct Choice {
    include: Vec<Regex>,
    exclude: Vec<Regex>,
    required: Vec<Regex>,
    optional: Vec<Regex>,
}

/// What is wrong with a pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChoiceError {
    /// Not a regular expression.
    #[error("{flag}={pattern}: {reason}")]
    Pattern {
        /// The flag.
        flag: &'static str,
        /// Its value.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// It matches no name that is chosen.
    #[error("{flag}={pattern} matches no archive")]
    NoMatch {
        /// The flag.
        flag: &'static str,
        /// Its value.
        pattern: String,
    },
}

impl Choice {
    /// Compiles patterns.
    ///
    /// # Errors
    /// Naming the flag of the one that is wrong.
    pub(crate) fn new(patterns: &Patterns) -> Result<Self, ChoiceError> {
        Self::within(patterns, COMPILED)
    }

    /// The same, of patterns that take up to this many bytes each.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(crate) fn within(patterns: &Patterns, most: usize) -> Result<Self, ChoiceError> {
        let compiled = |flag: &'static str, texts: &[String]| {
            let compile = |text: &String| {
                let compiled = RegexBuilder::new(text).size_limit(most).build();
                compiled.map_err(|e| ChoiceError::Pattern {
                    flag,
                    pattern: text.clone(),
                    reason: e.to_string(),
                })
            };
            texts.iter().map(compile).collect::<Result<Vec<_>, _>>()
        };
        Ok(Self {
            include: compiled("--include", &patterns.include)?,
            exclude: compiled("--exclude", &patterns.exclude)?,
            required: compiled("--required", &patterns.required)?,
            optional: compiled("--optional", &patterns.optional)?,
        })
    }

    /// The class of each name that is chosen, in their order; `None` for the others.
    ///
    /// # Errors
    /// When a pattern matches none of them, other than one that excludes.
    pub(crate) fn classes<'a>(
        &self,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<Option<Class>>, ChoiceError> {
        let (mut classes, mut chosen) = (Vec::new(), Vec::new());
        for name in names {
            let class = self.class(name);
            if class.is_some() {
                chosen.push(name);
            }
            classes.push(class);
        }
        for (flag, patterns) in [
            ("--include", &self.include),
            ("--required", &self.required),
            ("--optional", &self.optional),
        ] {
            let idle = |pattern: &&Regex| !chosen.iter().any(|name| pattern.is_match(name));
            if let Some(pattern) = patterns.iter().find(idle) {
                return Err(ChoiceError::NoMatch {
                    flag,
                    pattern: pattern.as_str().to_owned(),
                });
            }
        }
        Ok(classes)
    }

    fn class(&self, name: &str) -> Option<Class> {
        let any = |patterns: &[Regex]| patterns.iter().any(|pattern| pattern.is_match(name));
        if (!self.include.is_empty() && !any(&self.include)) || any(&self.exclude) {
            return None;
        }
        // As with `stage`.
        let is_required = if self.required.is_empty() {
            !any(&self.optional)
        } else {
            any(&self.required)
        };
        Some(if is_required {
            Class::Required
        } else {
            Class::Optional
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 4] = [
        "blas_lib_gfx942.tar.zst",
        "blas_run_generic.tar.zst",
        "blas_test_gfx942.tar.zst",
        "fft_lib_gfx942.tar.zst",
    ];

    fn choose(patterns: &Patterns) -> Result<String, ChoiceError> {
        let letter = |class: Option<Class>| match class {
            Some(Class::Required) => 'r',
            Some(_) => 'o',
            None => '-',
        };
        let classes = Choice::new(patterns)?.classes(NAMES)?;
        Ok(classes.into_iter().map(letter).collect())
    }

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn patterns_are_searched_in_the_name_and_must_match_something() {
        let patterns = |include: &[&str], exclude: &[&str], required: &[&str], optional: &[&str]| Patterns {
            include: texts(include),
            exclude: texts(exclude),
            required: texts(required),
            optional: texts(optional),
        };
        for (patterns, expected) in [
            (patterns(&[], &[], &[], &[]), "rrrr"),
            (patterns(&["blas_(lib|run)_"], &[], &[], &[]), "rr--"),
            (patterns(&["run", "^fft"], &[], &[], &[]), "-r-r"),
            (patterns(&[], &["gfx942", "nothing"], &[], &[]), "-r--"),
            (patterns(&[], &["fft"], &[], &["test"]), "rro-"),
            (patterns(&[], &[], &["lib"], &[]), "roor"),
            (patterns(&[], &[], &["lib"], &["fft"]), "roor"),
        ] {
            assert_eq!(choose(&patterns).unwrap(), expected, "{patterns:?}");
        }
        for (patterns, part) in [
            (
                patterns(&["blas", "no"], &[], &[], &[]),
                "--include=no matches no archive",
            ),
            (patterns(&["blas"], &[], &["fft"], &[]), "--required=fft"),
            (patterns(&["blas"], &[], &[], &["fft"]), "--optional=fft"),
            (patterns(&[], &["["], &[], &[]), "--exclude=["),
        ] {
            let shown = choose(&patterns).unwrap_err().to_string();
            assert!(shown.contains(part), "{shown}");
        }
    }
}
