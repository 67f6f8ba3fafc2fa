//! What is wanted, as it was written: paths, wildcards, targets, packages, regular expressions.

use std::path::{Path, PathBuf};

use regex::Regex;

use super::{
    super::{exit::Failure, paths},
    GetArgs,
};
use crate::{
    control::{Link, links_in},
    invocation::{pattern::TargetPattern, policy::PathRegex},
};

/// What is wanted, as it was written.
#[derive(Default)]
pub(super) struct Wanted {
    pub(super) paths: Vec<PathBuf>,
    pub(super) globs: Vec<Glob>,
    pub(super) targets: Vec<String>,
    /// All that matches one of them.
    pub(super) regexes: Vec<PathRegex>,
    pub(super) packages: Vec<TargetPattern>,
    /// Of the packages, only what matches one of them, if there are any.
    pub(super) of_packages: Vec<PathRegex>,
}

/// A path with wildcards, against absolute paths.
pub(super) struct Glob {
    pub(super) written: String,
    pub(super) regex: Regex,
    /// What is before the wildcards, if that has one of the build tool's links, such as `bazel-bin`, that is not there.
    pub(super) by_link: Option<PathBuf>,
    /// Whether that link may have led to any configuration.
    pub(super) is_of_any: bool,
}

impl Wanted {
    pub(super) fn read(args: &GetArgs) -> Result<Self, Failure> {
        let mut wanted = Self::default();
        for argument in &args.wanted {
            let text = argument.to_str().unwrap_or_default();
            if is_target(text) {
                wanted.targets.push(text.to_owned());
            } else if text.contains(['*', '?']) && argument.symlink_metadata().is_err() {
                wanted.globs.push(Glob::read(text)?);
            } else {
                wanted.paths.push(argument.clone());
            }
        }
        let of_targets = !wanted.targets.is_empty() || args.failed;
        if let (false, Some(group)) = (of_targets, args.output_group.first()) {
            let message = format!("--output-group={group}: name targets, such as //pkg/...");
            return Err(Failure::usage(message));
        }
        for text in &args.path {
            let regex = text.parse::<PathRegex>();
            let regex = regex.map_err(|e| Failure::usage(format!("--path={text}: {e}")))?;
            if !args.all_of.is_empty() {
                wanted.of_packages.push(regex);
            } else if !of_targets {
                wanted.regexes.push(regex);
            }
        }
        for text in &args.all_of {
            let pattern: TargetPattern = text
                .parse()
                .map_err(|e| Failure::usage(format!("--all-of={text}: {e}")))?;
            if pattern.is_exact() {
                let message = format!("--all-of={text}: name packages: //pkg:all or //pkg/...");
                return Err(Failure::usage(message));
            }
            wanted.packages.push(pattern);
        }
        Ok(wanted)
    }

    /// Whether all that is on record must be gone through.
    pub(super) fn needs_list(&self) -> bool {
        !(self.globs.is_empty() && self.regexes.is_empty() && self.packages.is_empty())
    }
}

/// Whether an argument is a target pattern and not a path.
pub(in crate::cli) fn is_target(text: &str) -> bool {
    let text = text.strip_prefix('-').unwrap_or(text);
    text.starts_with("//") || (text.starts_with('@') && text.contains("//"))
}

impl Glob {
    /// Whether a pattern by a link is about a build of one of these workspaces. A link is in a workspace, not above it.
    pub(super) fn is_meant(&self, workspaces: &[PathBuf]) -> bool {
        self.by_link.as_ref().is_none_or(|before| {
            workspaces.iter().any(|workspace| {
                let depth = workspace.components().count();
                before.starts_with(workspace) && links_in(before, depth).next().is_some()
            })
        })
    }

    /// `*` and `?` stay in one name, `**` does not.
    fn read(text: &str) -> Result<Self, Failure> {
        let fixed = |part: &&str| !part.contains(['*', '?']);
        let parts: Vec<&str> = text.split('/').collect();
        let fixed = parts.iter().take_while(|part| fixed(part)).count();
        let (before, rest) = text.split_at(parts[..fixed].iter().map(|part| part.len() + 1).sum());
        // Links on the way lead to where outputs are recorded.
        let inside = paths::resolve(&Path::new(before).join("x"));
        let inside = inside.map_err(|e| Failure::usage(format!("{text}: {e}")))?;
        let before = inside.parent().unwrap_or(Path::new(""));
        let before = before.to_str().unwrap_or_default().trim_end_matches('/');
        let links = if before.starts_with('/') && !before.contains("/execroot/") {
            links_in(Path::new(before), 0).collect()
        } else {
            Vec::new()
        };
        // An exec path that leads nowhere from here.
        let start = if before.starts_with('/') { "^" } else { "/" };
        let mut starts = vec![format!("{start}{}", regex::escape(before))];
        starts.extend(links.iter().map(|(link, below)| {
            let slash = if below.is_empty() { "" } else { "/" };
            let below = regex::escape(below);
            match link {
                Link::Out => format!("/bazel-out{slash}{below}"),
                Link::Of(kind) => format!("/bazel-out/[^/]+/{kind}{slash}{below}"),
            }
        }));
        let mut regex = format!("(?:{})/", starts.join("|"));
        let mut rest = rest;
        while let Some(letter) = rest.chars().next() {
            let (taken, meaning) = match letter {
                '*' if rest.starts_with("**/") => (3, "(?:.*/)?".to_owned()),
                '*' if rest.starts_with("**") => (2, ".*".to_owned()),
                '*' => (1, "[^/]*".to_owned()),
                '?' => (1, "[^/]".to_owned()),
                other => (other.len_utf8(), regex::escape(&rest[..other.len_utf8()])),
            };
            regex.push_str(&meaning);
            rest = &rest[taken..];
        }
        regex.push('$');
        let regex = Regex::new(&format!("(?s){regex}"));
        Ok(Self {
            written: text.to_owned(),
            by_link: (!links.is_empty()).then(|| before.into()),
            is_of_any: links.iter().any(|(link, _)| matches!(link, Link::Of(_))),
            regex: regex.map_err(|e| Failure::usage(format!("{text}: {e}")))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_by_a_link_is_about_builds_of_its_own_workspace() {
        let workspaces = [PathBuf::from("/home/me/bin/w")];
        for (pattern, is_meant) in [
            ("/home/me/bin/w/bazel-bin/app/*", true),
            ("/home/me/bin/w/bazel-out/*/bin/*", true),
            ("/home/me/bin/*", false),
            ("/home/me/bin/other/bazel-bin/*", false),
            ("bazel-out/*/bin/*", true),
        ] {
            let glob = Glob::read(pattern).unwrap();
            assert_eq!(glob.is_meant(&workspaces), is_meant, "{pattern}");
        }
        assert!(!Glob::read("/w/bazel-out/*/bin/*").unwrap().is_of_any);
        assert!(Glob::read("/w/bazel-bin/*").unwrap().is_of_any);
    }

    #[test]
    fn targets_are_distinguished_from_paths() {
        for (text, target) in [
            ("//pkg:x", true),
            ("-//pkg/...", true),
            ("@repo//pkg:x", true),
            ("@@//:x", true),
            ("bazel-bin/pkg/x", false),
            ("/abs/x", false),
            ("@x", false),
            ("-x", false),
        ] {
            assert_eq!(is_target(text), target, "{text}");
        }
    }

    #[test]
    fn wildcards_stay_in_a_name_unless_there_are_two() {
        for (glob, path, matches) in [
            ("/w/bin/*.txt", "/w/bin/a.txt", true),
            ("/w/bin/*.txt", "/w/bin/sub/a.txt", false),
            ("/w/bin/**/*.txt", "/w/bin/sub/a.txt", true),
            ("/w/bin/**/*.txt", "/w/bin/a.txt", true),
            ("/w/bin/**", "/w/bin/sub/a.txt", true),
            ("/w/b*/?.txt", "/w/bin/a.txt", true),
            ("/w/b*/?.txt", "/w/bin/aa.txt", false),
            ("/w/bin/a.t*", "/w/bin/axt", false),
            ("/w/bin/a.t*", "/x/w/bin/a.txt", false),
            // By links that are not there.
            (
                "/w/bazel-bin/*/*.txt",
                "/ob/execroot/_main/bazel-out/k8/bin/a/b.txt",
                true,
            ),
            (
                "/w/bazel-bin/*/*.txt",
                "/ob/execroot/_main/bazel-out/k8/testlogs/a/b.txt",
                false,
            ),
            (
                "/w/bazel-bin/**",
                "/ob/execroot/_main/bazel-out/k8/bin/a/b.txt",
                true,
            ),
            (
                "/w/bazel-bin/a/*",
                "/ob/execroot/_main/bazel-out/k8/bin/a/b.txt",
                true,
            ),
            (
                "/w/bazel-bin/b/*",
                "/ob/execroot/_main/bazel-out/k8/bin/a/b.txt",
                false,
            ),
            (
                "/w/x-testlogs/**",
                "/ob/execroot/_main/bazel-out/k8/testlogs/a",
                true,
            ),
            (
                "/w/bazel-out/k8/**",
                "/ob/execroot/_main/bazel-out/k8/bin/a",
                true,
            ),
            ("/w/other/**", "/ob/execroot/_main/bazel-out/k8/bin/a", false),
            (
                "bazel-out/*/bin/é*",
                "/ob/execroot/_main/bazel-out/k8/bin/é1",
                true,
            ),
            (
                "bazel-out/*/bin/é*",
                "/ob/execroot/_main/bazel-out/k8/x/é1",
                false,
            ),
        ] {
            let read = Glob::read(glob).unwrap();
            assert_eq!(read.regex.is_match(path), matches, "{glob} {path} {}", read.regex);
        }
    }
}
