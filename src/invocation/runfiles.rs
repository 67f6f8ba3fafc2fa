//! What the programs that a build was asked for need at run time, as far as it is made by the build.
//!
//! No event names it. Bazel's own top-level mode brings it; in minimal mode Bazel writes the manifest of a program's
//! runfiles and makes the links, which lead to what is not there.

use std::{borrow::Cow, collections::BTreeSet};

use crate::{bep::event::CommandLine, exec_path::ExecPath};

/// The directory that all outputs lie in.
const OUTPUT_DIRECTORY: &[u8] = b"bazel-out/";
/// The output group of what is built for its effects alone. Runfiles are in it.
const HIDDEN_GROUP: &str = "_hidden_top_level_INTERNAL_";

/// What a manifest names below `bazel-out`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Needed {
    /// Outputs: files, and the roots of trees.
    pub(crate) outputs: BTreeSet<ExecPath>,
    /// What cannot be an output's path, as text.
    pub(crate) odd: Vec<String>,
}

impl Needed {
    /// Takes in a manifest's lines: the name among the runfiles, a space, and where it is. `exec_roots` are the spellings
    /// of the exec root that its absolute paths may begin with.
    pub(crate) fn take_in(&mut self, manifest: &[u8], exec_roots: &[&str]) {
        for line in manifest.split(|byte| *byte == b'\n') {
            let Some(below) = exec_roots.iter().find_map(|root| below(line, root.as_bytes())) else {
                continue;
            };
            let path = if line.starts_with(b" ") {
                unescaped(below)
            } else {
                below.to_vec()
            };
            match std::str::from_utf8(&path).ok().map(ExecPath::new) {
                Some(Ok(path)) => {
                    self.outputs.insert(path);
                }
                _ => self.odd.push(String::from_utf8_lossy(&path).into_owned()),
            }
        }
    }
}

/// What a line's target is below an exec root, if that is where outputs lie.
///
/// A line that begins with a space is escaped (Bazel 7.4 and later): its name has no space then. In others a name may
/// have spaces in older Bazels, and the target begins where an exec root does.
fn below<'a>(line: &'a [u8], exec_root: &[u8]) -> Option<&'a [u8]> {
    let line = line.strip_prefix(b" ").unwrap_or(line);
    let mut from = 0;
    while let Some(space) = line.get(from..)?.iter().position(|byte| *byte == b' ') {
        from += space + 1;
        let below = line[from..].strip_prefix(exec_root);
        if let Some(path) = below.and_then(|below| below.strip_prefix(b"/"))
            && path.starts_with(OUTPUT_DIRECTORY)
        {
            return Some(path);
        }
    }
    None
}

/// A line of a manifest.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The name among the runfiles.
    pub(crate) name: Vec<u8>,
    /// Where it is: an absolute path, or where a link leads; empty for an empty file.
    pub(crate) target: Vec<u8>,
}

/// The lines of a manifest, but for those without a name.
///
/// In a line that begins with a space (Bazel 7.4 and later), both parts are escaped. In others, a name may have spaces in
/// older Bazels, and an absolute path follows it.
pub(crate) fn entries(manifest: &[u8]) -> impl Iterator<Item = Entry> {
    let lines = manifest.split(|byte| *byte == b'\n');
    let entries = lines.map(|line| match line.strip_prefix(b" ") {
        Some(escaped) => {
            let (name, target) = split_at(escaped, escaped.iter().position(|byte| *byte == b' '));
            Entry {
                name: unescaped(name),
                target: unescaped(target),
            }
        }
        None => {
            let absolute = line.windows(2).position(|two| two == b" /");
            let (name, target) = split_at(
                line,
                absolute.or_else(|| line.iter().position(|byte| *byte == b' ')),
            );
            Entry {
                name: name.to_vec(),
                target: target.to_vec(),
            }
        }
    });
    entries.filter(|entry| !entry.name.is_empty())
}

/// What is before a space and after it; without one, all is before it.
fn split_at(line: &[u8], space: Option<usize>) -> (&[u8], &[u8]) {
    match space {
        Some(space) => (&line[..space], &line[space + 1..]),
        None => (line, b""),
    }
}

/// A part of a line as it is meant: `\n` is a newline, `\s` a space and `\b` a backslash.
fn unescaped(target: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(target.len());
    let mut bytes = target.iter().copied();
    while let Some(byte) = bytes.next() {
        plain.push(match byte {
            b'\\' => match bytes.next() {
                Some(b'n') => b'\n',
                Some(b's') => b' ',
                Some(b'b') | None => b'\\',
                Some(other) => other,
            },
            byte => byte,
        });
    }
    plain
}

/// Whether a build makes the runfiles of what it is asked for: not if its `--output_groups` name others instead of the
/// default ones.
pub(super) fn are_built(line: Option<&CommandLine>) -> bool {
    let Some(line) = line else { return true };
    let groups: Vec<&str> = line
        .all("output_groups")
        .flat_map(|groups| groups.split(','))
        .filter(|group| !group.is_empty())
        .collect();
    let mut built = groups.iter().all(|group| group.starts_with(['+', '-']));
    for group in groups {
        match group.split_at_checked(1) {
            Some(("-", HIDDEN_GROUP)) => built = false,
            Some(("+", HIDDEN_GROUP)) => built = true,
            _ => built |= group == HIDDEN_GROUP,
        }
    }
    built
}

/// Whether a switch of the build tool is off.
pub(super) fn is_off(line: Option<&CommandLine>, name: &str) -> bool {
    line.and_then(|line| line.switch(name)) == Some(false)
}

/// The directory of a target's package below that of binaries, empty or with a slash at its end, and the target's name in
/// it. No target has outputs outside of its package.
pub(super) fn place_of(label: &str) -> Option<(String, &str)> {
    let (repository, package, name) = parts_of(label)?;
    let mut place = String::new();
    if !repository.is_empty() {
        place.push_str(&format!("external/{repository}/"));
    }
    if !package.is_empty() {
        place.push_str(&format!("{package}/"));
    }
    Some((place, name))
}

/// The repository of a label, empty for the main one, its package and its name.
pub(super) fn parts_of(label: &str) -> Option<(&str, &str, &str)> {
    let (repository, rest) = label.trim_start_matches('@').split_once("//")?;
    let (package, name) = rest
        .split_once(':')
        .unwrap_or_else(|| (rest, rest.rsplit('/').next().unwrap_or(rest)));
    Some((repository, package, name))
}

/// Where an output lies below the directory of binaries, as [`place_of`] has it.
pub(super) fn place_in_bin(path: &str) -> Option<Cow<'_, str>> {
    let mut parts = path.splitn(4, '/').skip(1);
    let (first, second, rest) = (parts.next()?, parts.next()?, parts.next()?);
    if second == "bin" {
        return Some(rest.into());
    }
    // With --experimental_sibling_repository_layout, a repository's name comes before the configuration.
    let rest = rest.strip_prefix("bin/")?;
    Some(format!("external/{first}/{rest}").into())
}

/// What the fuzz target runs.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(data: &[u8]) {
    let mut needed = Needed::default();
    needed.take_in(data, &["/ob/execroot/ws", "/mnt/ob/execroot/ws"]);
    assert!(entries(data).all(|entry| !entry.name.is_empty()));
    for path in &needed.outputs {
        assert!(path.starts_with("bazel-out") && path.as_str() != "bazel-out");
    }
    // As a plain line each reads back, if it is one line.
    let plain = needed.outputs.iter().filter(|path| !path.as_str().contains('\n'));
    let plain: BTreeSet<ExecPath> = plain.cloned().collect();
    let lines: String = plain
        .iter()
        .map(|path| format!("key /ob/execroot/ws/{path}\n"))
        .collect();
    let mut again = Needed::default();
    again.take_in(lines.as_bytes(), &["/ob/execroot/ws"]);
    assert_eq!(again.outputs, plain);
    assert!(again.odd.is_empty());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needed(manifest: &str) -> Vec<String> {
        let mut needed = Needed::default();
        needed.take_in(manifest.as_bytes(), &["/ob/execroot/ws", "/real/execroot/ws"]);
        needed.outputs.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn outputs_are_distinguished_from_sources_links_and_empty_files() {
        let manifest = "_repo_mapping /ob/execroot/ws/bazel-out/k8/bin/app.repo_mapping\n\
            ws/source /home/u/ws/source\n\
            ws/external/lib/x /ob/external/lib/x\n\
            ws/empty \n\
            ws/link ../some where/else\n\
            ws/lib/gen.txt /real/execroot/ws/bazel-out/k8/bin/lib/gen.txt\n\
            ws/other /ob/execroot/wsx/bazel-out/k8/bin/other\n\
            ws/outer /ob/execroot/ws/bazel-outer/x\n\
            ws/no end /ob/execroot/ws/bazel-out/k8/bin/no end";
        assert_eq!(
            needed(manifest),
            [
                "bazel-out/k8/bin/app.repo_mapping",
                "bazel-out/k8/bin/lib/gen.txt",
                "bazel-out/k8/bin/no end",
            ]
        );
    }

    #[test]
    fn escaped_lines_are_meant_as_they_are_written_and_others_are_not_escaped() {
        let manifest = " ws/a\\sb /ob/execroot/ws/bazel-out/a b\\nc\\bd\n\
            ws/back\\nslash /ob/execroot/ws/bazel-out/back\\nslash\n";
        assert_eq!(
            needed(manifest),
            ["bazel-out/a b\nc\\d", "bazel-out/back\\nslash"]
        );
    }

    #[test]
    fn every_kind_of_line_is_read() {
        let manifest = b"ws/a /w/a\nws/empty \nws/bare\nold name with spaces /w/x y\nws/link ../some where\n\
             \x20ws/a\\sb\\bc\\nd /w/a b\\bc\\nd\n\n /w/nameless\n";
        let read: Vec<(String, String)> = entries(manifest)
            .map(|entry| {
                let text = |bytes| String::from_utf8(bytes).unwrap();
                (text(entry.name), text(entry.target))
            })
            .collect();
        let read: Vec<(&str, &str)> = read.iter().map(|(name, target)| (&**name, &**target)).collect();
        assert_eq!(
            read,
            [
                ("ws/a", "/w/a"),
                ("ws/empty", ""),
                ("ws/bare", ""),
                ("old name with spaces", "/w/x y"),
                ("ws/link", "../some where"),
                ("ws/a b\\c\nd", "/w/a b\\c\nd"),
                ("/w/nameless", ""),
            ]
        );
    }

    #[test]
    fn what_can_be_no_path_is_reported() {
        let mut needed = Needed::default();
        let manifest = b"a /ob/x/bazel-out/../y\nb /ob/x/bazel-out/\xff\nc /ob/x/bazel-out/";
        needed.take_in(manifest, &["/ob/x"]);
        assert_eq!(needed.odd, ["bazel-out/../y", "bazel-out/\u{fffd}", "bazel-out/"]);
    }

    fn line(options: &[(&str, &str)]) -> CommandLine {
        let options = options
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        CommandLine {
            label: "canonical".to_owned(),
            options: options.collect(),
        }
    }

    /// Measured with Bazel 7.7.1 in its top-level mode.
    #[test]
    fn output_groups_in_the_place_of_the_default_ones_build_no_runfiles() {
        for (groups, built) in [
            (&[][..], true),
            (&["foo"], false),
            (&["+foo"], true),
            (&["default"], false),
            (&["-default"], true),
            (&["+foo,-bar", "+x"], true),
            (&["+foo", "bar"], false),
            (&["foo", "_hidden_top_level_INTERNAL_"], true),
            (&["-_hidden_top_level_INTERNAL_"], false),
        ] {
            let options: Vec<_> = groups.iter().map(|group| ("output_groups", *group)).collect();
            assert_eq!(are_built(Some(&line(&options))), built, "{groups:?}");
        }
        assert!(are_built(None));
    }

    #[test]
    fn switches_are_read_in_either_spelling() {
        for (options, off) in [
            (&[][..], false),
            (&[("use_action_cache", "0")], true),
            (&[("use_action_cache", "1")], false),
            (&[("nouse_action_cache", "")], true),
            (&[("nouse_action_cache", ""), ("use_action_cache", "true")], false),
        ] {
            assert_eq!(
                is_off(Some(&line(options)), "use_action_cache"),
                off,
                "{options:?}"
            );
        }
    }

    #[test]
    fn outputs_have_places_in_either_layout() {
        for (path, place) in [
            ("bazel-out/k8/bin/p/x", Some("p/x")),
            (
                "bazel-out/k8/bin/external/lib+1.0/p/x",
                Some("external/lib+1.0/p/x"),
            ),
            ("bazel-out/lib+1.0/k8/bin/p/x", Some("external/lib+1.0/p/x")),
            ("bazel-out/k8/bin/bin/x", Some("bin/x")),
            ("bazel-out/k8/genfiles/p/x", None),
            ("bazel-out/k8/bin", None),
        ] {
            assert_eq!(place_in_bin(path).as_deref(), place, "{path}");
        }
    }

    #[test]
    fn labels_have_places() {
        for (label, place) in [
            ("//a/b:x", Some(("a/b/", "x"))),
            ("//:x/y", Some(("", "x/y"))),
            ("//a/b", Some(("a/b/", "b"))),
            ("@@lib+1.0//p:x", Some(("external/lib+1.0/p/", "x"))),
            ("@//p:x", Some(("p/", "x"))),
            ("x", None),
        ] {
            let found = place_of(label);
            let found = found.as_ref().map(|(package, name)| (package.as_str(), *name));
            assert_eq!(found, place, "{label}");
        }
    }
}
