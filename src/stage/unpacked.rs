//! Where archives among a build's outputs are unpacked.

use super::error::StageError;
use crate::{archive::Format, collection::own_directory, exec_path::ExecPath, output::OutputContent};

/// Whether an output is an archive that can be unpacked: its file name says so.
pub(super) fn is_archive(content: &OutputContent, exec_path: &ExecPath) -> bool {
    matches!(content, OutputContent::Blob(_)) && Format::of(exec_path.file_name()).is_some()
}

/// The directory in the place of an archive that it is unpacked into; `None` if the output is not an archive.
///
/// # Errors
/// When its name cannot be a directory's.
pub(super) fn unpacked_at(
    content: &OutputContent,
    exec_path: &ExecPath,
    place: &ExecPath,
) -> Result<Option<ExecPath>, StageError> {
    if !is_archive(content, exec_path) {
        return Ok(None);
    }
    let error = |reason: String| StageError::Setting {
        flag: "--extract".to_owned(),
        reason,
    };
    let stem = own_directory(exec_path.file_name()).map_err(|e| error(e.to_string()))?;
    let place = match place.parent() {
        Some(parent) => format!("{parent}/{stem}"),
        None => stem.to_owned(),
    };
    let place = ExecPath::new(&place).map_err(|e| error(e.to_string()))?;
    Ok(Some(place))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::{Digest, DigestFunction};

    #[test]
    fn an_archive_is_unpacked_in_its_place_by_its_name() {
        let blob = OutputContent::Blob(Digest::of(DigestFunction::Sha256, b"x"));
        let path = |text: &str| ExecPath::new(text).unwrap();
        for (place, expected) in [
            ("bazel-out/bin/p/sdk-1.2.tar.zst", Some("bazel-out/bin/p/sdk-1.2")),
            ("sdk.zip", Some("sdk")),
            ("bazel-out/bin/p/notes.txt", None),
        ] {
            let at = unpacked_at(&blob, &path(place), &path(place)).unwrap();
            assert_eq!(at, expected.map(path), "{place}");
        }
        let odd = path("bazel-out/bin/.git.zip");
        let refused = unpacked_at(&blob, &odd, &odd).unwrap_err().to_string();
        assert!(
            refused.contains("--extract") && refused.contains(".git.zip"),
            "{refused}"
        );
        let link = OutputContent::Symlink("x".to_owned());
        assert_eq!(unpacked_at(&link, &path("a.tar"), &path("a.tar")).unwrap(), None);
    }
}
