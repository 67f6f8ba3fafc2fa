//! Bazel's target patterns, matched against the labels that a stream names.

use std::{fmt, str::FromStr};

/// One target pattern: `//pkg:name`, `//pkg`, `//pkg:all`, `//pkg:*`, `//pkg/...`, `//...`, with an optional
/// repository, and with `-` in front to take targets out again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetPattern {
    /// Whether it takes targets out.
    pub(crate) is_negative: bool,
    repository: String,
    package: String,
    scope: Scope,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Scope {
    /// One target by name.
    Target(String),
    /// Every target of the package.
    Package,
    /// Every target of the package and those below it.
    Below,
}

/// Why a text is not a target pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{pattern:?} is not a target pattern: {reason} (write //pkg:name, //pkg:all or //pkg/...)")]
pub struct PatternError {
    pattern: String,
    reason: &'static str,
}

impl FromStr for TargetPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let error = |reason| PatternError {
            pattern: text.to_owned(),
            reason,
        };
        let (negative, rest) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let (repository, rest) = rest
            .split_once("//")
            .ok_or_else(|| error("it does not contain //"))?;
        if !repository.is_empty() && !repository.starts_with('@') {
            return Err(error("the part before // is not a repository"));
        }
        let (package, scope) = match rest.split_once(':') {
            Some((package, "all" | "*" | "all-targets")) => match package.strip_suffix("...") {
                Some(above) => (above.trim_end_matches('/'), Scope::Below),
                None => (package, Scope::Package),
            },
            Some((_, "")) => return Err(error("there is no target after the colon")),
            Some((package, name)) => (package, Scope::Target(name.to_owned())),
            None => match rest.strip_suffix("...") {
                Some("") => ("", Scope::Below),
                Some(above) if above.ends_with('/') => (above.trim_end_matches('/'), Scope::Below),
                Some(_) => return Err(error("... must be a path component of its own")),
                None if rest.is_empty() => return Err(error("it is empty")),
                None => {
                    let name = rest.rsplit('/').next().unwrap_or(rest);
                    (rest, Scope::Target(name.to_owned()))
                }
            },
        };
        Ok(Self {
            is_negative: negative,
            repository: repository.trim_start_matches('@').to_owned(),
            package: package.to_owned(),
            scope,
        })
    }
}

impl TargetPattern {
    /// Whether it names one target.
    pub(crate) const fn is_exact(&self) -> bool {
        matches!(self.scope, Scope::Target(_))
    }

    /// The package that it names, without `@`.
    pub(crate) fn package(&self) -> String {
        format!("{}//{}", self.repository, self.package)
    }

    /// Whether it is about a label, be it to take it in or out.
    pub(crate) fn covers(&self, label: &str) -> bool {
        let Some((repository, rest)) = label.split_once("//") else {
            return false;
        };
        if repository.trim_start_matches('@') != self.repository {
            return false;
        }
        let (package, name) = match rest.split_once(':') {
            Some((package, name)) => (package, name),
            None => (rest, rest.rsplit('/').next().unwrap_or(rest)),
        };
        match &self.scope {
            Scope::Target(wanted) => package == self.package && name == wanted,
            Scope::Package => package == self.package,
            Scope::Below => {
                self.package.is_empty()
                    || package
                        .strip_prefix(&self.package)
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
        }
    }
}

impl fmt::Display for TargetPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let minus = if self.is_negative { "-" } else { "" };
        let at = if self.repository.is_empty() { "" } else { "@" };
        write!(f, "{minus}{at}{}//{}", self.repository, self.package)?;
        match &self.scope {
            Scope::Target(name) => write!(f, ":{name}"),
            Scope::Package => f.write_str(":all"),
            Scope::Below if self.package.is_empty() => f.write_str("..."),
            Scope::Below => f.write_str("/..."),
        }
    }
}

/// Whether a list of patterns takes in a label. As on Bazel's command line the last one that covers it decides; a
/// list that only takes out starts from everything, and an empty list takes everything in.
pub(crate) fn matches(patterns: &[TargetPattern], label: &str) -> bool {
    let start = patterns.iter().all(|p| p.is_negative);
    patterns
        .iter()
        .rev()
        .find(|p| p.covers(label))
        .map_or(start, |p| !p.is_negative)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(texts: &[&str]) -> Vec<TargetPattern> {
        texts.iter().map(|t| t.parse().unwrap()).collect()
    }

    #[test]
    fn patterns_cover_what_bazel_means_by_them() {
        for (pattern, yes, no) in [
            ("//a:x", "//a:x", "//a:y"),
            ("//a/b", "//a/b:b", "//a/b:c"),
            ("//a:all", "//a:y", "//a/b:y"),
            ("//a:*", "//a:y", "//ab:y"),
            ("//a/...", "//a/b:y", "//ab:y"),
            ("//a/...", "//a:y", "@r//a:y"),
            ("//...", "//q/r:s", "@@r//q:s"),
            ("@r//...", "@@r//q:s", "//q:s"),
            ("//...:all", "//q/r:s", "@r//q"),
            ("//a:x", "@@//a:x", "//b:x"),
        ] {
            assert!(matches(&list(&[pattern]), yes), "{pattern} {yes}");
            assert!(!matches(&list(&[pattern]), no), "{pattern} {no}");
        }
    }

    #[test]
    fn the_last_covering_pattern_decides() {
        let patterns = list(&["//...", "-//third/...", "//third/party:keep"]);
        assert!(matches(&patterns, "//a:b"));
        assert!(!matches(&patterns, "//third/x:y"));
        assert!(matches(&patterns, "//third/party:keep"));
        assert!(matches(&list(&["-//a/..."]), "//b:c"));
        assert!(matches(&[], "//b:c"));
    }

    #[test]
    fn bad_patterns_are_named() {
        for text in ["a:b", "x//a", "//", "//a:", "//a...", "-"] {
            let error = text.parse::<TargetPattern>().expect_err(text).to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn patterns_print_as_they_are_written() {
        for text in ["//a:x", "-//a/...", "//...", "@r//p:all"] {
            assert_eq!(text.parse::<TargetPattern>().unwrap().to_string(), text);
        }
    }
}
