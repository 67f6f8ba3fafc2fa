//! Extended headers of tars (POSIX `pax`): what of them must be honoured, or else the archive refused.

use tar::PaxExtensions;

use super::{Archive, ArchiveError};

/// Keys that decide where a member goes and what is in it. Twice, or for all members at once, programs read them
/// differently.
const DECISIVE: &[&[u8]] = &[b"path", b"linkpath", b"size"];

/// Keys of sparse files in the formats 0.0, 0.1 and 1.0 of GNU tar. Taken for ordinary files they have wrong bytes.
const SPARSE: &[u8] = b"GNU.sparse.";

/// Judges the extended header of a member, or one for all members that follow.
pub(super) fn judge(
    archive: &Archive<'_>,
    member: &str,
    extensions: PaxExtensions<'_>,
    is_global: bool,
) -> Result<(), ArchiveError> {
    let mut seen = [false; DECISIVE.len()];
    for extension in extensions {
        let extension = extension.map_err(|_| {
            let what =
                format!("the extended header of {member:?} is malformed, or has a value of several lines");
            archive.damaged(what)
        })?;
        let key = extension.key_bytes();
        if key.starts_with(SPARSE) {
            let reason =
                "is sparse in PAX format; make the archive with `tar --format=gnu` or without --sparse";
            return Err(archive.unsupported(member, reason.to_owned()));
        }
        let Some(at) = DECISIVE.iter().position(|decisive| *decisive == key) else {
            continue;
        };
        if is_global || std::mem::replace(&mut seen[at], true) {
            let key = String::from_utf8_lossy(key);
            let how = if is_global { "for all members" } else { "twice" };
            return Err(archive.damaged(format!("an extended header sets {key:?} {how}")));
        }
    }
    Ok(())
}
