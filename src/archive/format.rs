//! Which archives there are, and what is done with their members.

/// Formats by what the names of their files end in.
const ENDINGS: &[(&str, Format)] = &[
    (".tar", Format::Tar),
    (".tar.gz", Format::TarGz),
    (".tgz", Format::TarGz),
    (".tar.zst", Format::TarZst),
    (".tzst", Format::TarZst),
    (".tar.xz", Format::TarXz),
    (".txz", Format::TarXz),
    (".zip", Format::Zip),
];

/// What the names of other archives end in.
const OTHERS: &[&str] = &[
    ".tar.bz2",
    ".tbz2",
    ".tbz",
    ".tar.lz4",
    ".tar.lzma",
    ".tar.lz",
    ".tar.br",
    ".tar.Z",
    ".7z",
    ".rar",
];

/// An archive's format. It follows from the file's name, never by its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// Not compressed.
    Tar,
    /// With gzip, of one member or several.
    TarGz,
    /// With zstd, of one frame or several.
    TarZst,
    /// With xz, of one stream or several.
    TarXz,
    /// A zip file with members that are stored, or compressed with deflate or zstd.
    Zip,
}

impl Format {
    /// The format of a file of this name, in any case; `None` if it is not the name of an archive that can be unpacked.
    pub(crate) fn of(name: &str) -> Option<Self> {
        let found = ENDINGS.iter().find(|(ending, _)| ends_in(name, ending));
        found.map(|(_, format)| *format)
    }

    /// Whether it is the name of an archive that cannot be unpacked.
    pub(crate) fn is_unknown(name: &str) -> bool {
        OTHERS.iter().any(|ending| ends_in(name, ending))
    }
}

/// Whether something is before an ending, in any case.
fn ends_in(name: &str, ending: &str) -> bool {
    let name = name.as_bytes();
    let start = name.len().checked_sub(ending.len()).filter(|start| *start > 0);
    start.is_some_and(|start| name[start..].eq_ignore_ascii_case(ending.as_bytes()))
}

/// Where members go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Mode {
    /// To the names that they have.
    Extract {
        /// How many leading components of each name are cut, as with `tar --strip-components`; members with no more
        /// components than that are left out.
        strip_components: u32,
    },
    /// To their names without the stage directory that `artifact_manifest.txt`, the first member, has for them.
    Flatten,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_an_archive_is() {
        for (name, format) in [
            ("a.tar", Some(Format::Tar)),
            ("blas_lib_gfx942:xnack+.tar.zst", Some(Format::TarZst)),
            ("a.b.TAR.XZ", Some(Format::TarXz)),
            ("a.tgz", Some(Format::TarGz)),
            ("outputs.zip", Some(Format::Zip)),
            (".zip", None),
            ("a.zst", None),
            ("a.tar.bz2", None),
            ("tar", None),
            ("", None),
            ("\u{e4}.zip", Some(Format::Zip)),
        ] {
            assert_eq!(Format::of(name), format, "{name}");
            assert_eq!(Format::is_unknown(name), name == "a.tar.bz2", "{name}");
        }
    }
}
