//! TheRock's archives: their first member is a list of stage directories, and every other member is in one of these.
//!
//! The format is that of `build_tools/_therock_utils/artifacts.py` in github.com/ROCm/TheRock, class `ArtifactPopulator`.

use std::collections::HashMap;

use super::{Archive, ArchiveError};
use crate::exec_path::ExecPath;

/// The name of the member.
pub(super) const MANIFEST: &str = "artifact_manifest.txt";

/// The stage directories, with their places in the list.
#[derive(Debug, Default)]
pub(super) struct Manifest(HashMap<Box<str>, usize>);

impl Manifest {
    /// Reads the list: one directory a line, empty lines do not count.
    pub(super) fn parse(archive: &Archive<'_>, bytes: &[u8]) -> Result<Self, ArchiveError> {
        let error = |reason: String| ArchiveError::Manifest {
            archive: archive.name.to_owned(),
            reason,
        };
        let text = std::str::from_utf8(bytes).map_err(|_| error(format!("{MANIFEST} is not UTF-8")))?;
        let mut directories = HashMap::new();
        for (place, line) in text.lines().enumerate().filter(|(_, line)| !line.is_empty()) {
            let path = ExecPath::new(line).map_err(|e| {
                error(format!(
                    "line {} of {MANIFEST}, {line:?}, is not a valid path: {}",
                    place + 1,
                    e.reason
                ))
            })?;
            directories.entry(path.as_str().into()).or_insert(place);
        }
        Ok(Self(directories))
    }

    /// What is left of a name without its stage directory: the first of the list that it is in. Empty for a stage
    /// directory itself, if it is in no other.
    pub(super) fn cut<'n>(&self, name: &'n str) -> Option<&'n str> {
        let ends = name.match_indices('/').map(|(at, _)| at);
        let found = ends.filter_map(|end| Some((*self.0.get(&name[..end])?, end + 1)));
        let first = found.min();
        let own = || self.0.contains_key(name).then_some("");
        first.map(|(_, start)| &name[start..]).or_else(own)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Format, Limits, Mode},
        *,
    };

    fn parse(text: &[u8]) -> Result<Manifest, ArchiveError> {
        let archive = Archive {
            name: "a.tar.zst",
            order: 0,
            format: Format::TarZst,
            mode: &Mode::Flatten,
            below: "",
            limits: &Limits::default(),
        };
        Manifest::parse(&archive, text)
    }

    #[test]
    fn the_first_stage_directory_of_the_list_is_cut() {
        let manifest = parse(b"x/stage\n\na/stage\na/stage/b\r\nc/d/e\nc\na/stage\n").unwrap();
        for (name, rest) in [
            ("a/stage/f", Some("f")),
            ("a/stage/b/f", Some("b/f")),
            ("c/d/e/f", Some("f")),
            ("c/d/f", Some("d/f")),
            ("x/stage", Some("")),
            ("a/stage/b", Some("b")),
            ("a/stag", None),
            ("a/stages/f", None),
            ("f", None),
        ] {
            assert_eq!(manifest.cut(name), rest, "{name}");
        }
        assert_eq!(parse(b"").unwrap().cut("a"), None);
    }

    #[test]
    fn wrong_lines_are_named() {
        for text in ["a\n../b\n", "a\n/b", "a\nb//c", "a\n."] {
            let error = parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("line 2 of artifact_manifest.txt"), "{error}");
        }
        assert!(parse(b"\xff").unwrap_err().to_string().contains("UTF-8"));
    }
}
