//! Checksums beside archives and in lists, as `sha256sum` writes them.

use std::{collections::HashMap, fmt};

use crate::digest::{Digest, DigestFunction};

/// Digits of a SHA-256.
const DIGITS: usize = 64;

/// The hash that a file's bytes must have.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Checksum {
    function: DigestFunction,
    hash: Vec<u8>,
}

impl Checksum {
    /// The function to hash with.
    pub(crate) const fn function(&self) -> DigestFunction {
        self.function
    }

    /// Whether bytes with this digest are the right ones.
    pub(crate) fn fits(&self, digest: &Digest) -> bool {
        digest.function() == self.function && digest.hash() == self.hash
    }

    /// Reads the file beside an archive of this name: `HASH`, or `HASH  NAME` as `sha256sum` writes it.
    ///
    /// # Errors
    /// When it has more than one line, is of another file, or is not a checksum.
    pub(super) fn of_sidecar(text: &str, name: &str) -> Result<Self, ChecksumError> {
        let text = text.trim_end();
        if text.len() == DIGITS {
            return Self::from_hex(text).ok_or(ChecksumError::Form(1));
        }
        let mut lines = text.lines();
        let line = lines.next().ok_or(ChecksumError::Form(1))?;
        if lines.next().is_some() {
            return Err(ChecksumError::Lines);
        }
        let (sum, named) = line_of(line).ok_or(ChecksumError::Form(1))?;
        if base(&named) == name {
            Ok(sum)
        } else {
            Err(ChecksumError::Other(named))
        }
    }

    fn from_hex(text: &str) -> Option<Self> {
        let hash = hex::decode(text).ok().filter(|hash| hash.len() * 2 == DIGITS)?;
        let function = DigestFunction::Sha256;
        Some(Self { function, hash })
    }
}

impl From<&Digest> for Checksum {
    fn from(digest: &Digest) -> Self {
        Self {
            function: digest.function(),
            hash: digest.hash().to_vec(),
        }
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.function, hex::encode(&self.hash))
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checksum({self})")
    }
}

/// Why a file with checksums cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChecksumError {
    /// A line is not of the form that `sha256sum` writes.
    #[error("line {0} is not a SHA-256 in the form of sha256sum: 64 hex digits, two spaces, a file name")]
    Form(usize),
    /// More than one line beside an archive.
    #[error("has more than one line; a list of checksums goes to --checksum-file")]
    Lines,
    /// The file beside an archive names another file.
    #[error("is the checksum of another file: {0}")]
    Other(String),
    /// A name has two checksums.
    #[error("has two different checksums for {0}")]
    Twice(String),
}

/// A list of checksums, by file name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Checksums(HashMap<String, Checksum>);

impl Checksums {
    /// Reads what `sha256sum` has written of any number of files. Directories in front of the names do not count.
    ///
    /// # Errors
    /// Naming the line, or the name.
    pub(crate) fn parse(text: &str) -> Result<Self, ChecksumError> {
        let mut sums = HashMap::new();
        for (number, line) in (1..).zip(text.lines()) {
            if line.trim().is_empty() {
                continue;
            }
            let (sum, named) = line_of(line).ok_or(ChecksumError::Form(number))?;
            let name = base(&named).to_owned();
            if sums
                .insert(name.clone(), sum.clone())
                .is_some_and(|before| before != sum)
            {
                return Err(ChecksumError::Twice(name));
            }
        }
        Ok(Self(sums))
    }

    /// The checksum of the file with this name.
    pub(crate) fn get(&self, name: &str) -> Option<&Checksum> {
        self.0.get(name)
    }
}

/// A line of `sha256sum`: hash, a space, a space or `*` (binary), name. A line with escapes in its name begins with `\`.
fn line_of(line: &str) -> Option<(Checksum, String)> {
    let (line, is_escaped) = match line.strip_prefix('\\') {
        Some(line) => (line, true),
        None => (line, false),
    };
    let (hash, name) = line.split_at_checked(DIGITS)?;
    let sum = Checksum::from_hex(hash)?;
    let name = name.strip_prefix("  ").or_else(|| name.strip_prefix(" *"))?;
    let name = name.strip_suffix('\r').unwrap_or(name);
    if name.is_empty() {
        return None;
    }
    if !is_escaped {
        return Some((sum, name.to_owned()));
    }
    let mut plain = String::with_capacity(name.len());
    let mut chars = name.chars();
    while let Some(c) = chars.next() {
        plain.push(match c {
            '\\' => match chars.next()? {
                'n' => '\n',
                'r' => '\r',
                '\\' => '\\',
                _ => return None,
            },
            c => c,
        });
    }
    Some((sum, plain))
}

fn base(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb";
    const B: &str = "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d";

    fn fits(sum: &Checksum, text: &str) -> bool {
        sum.fits(&Digest::of(DigestFunction::Sha256, text.as_bytes()))
    }

    #[test]
    fn the_file_beside_an_archive_has_a_hash_with_or_without_a_name() {
        for text in [
            A.to_owned(),
            format!("{A}\n"),
            format!("{}\r\n", A.to_uppercase()),
            format!("{A}  a.tar\n"),
            format!("{A} *build/a.tar\n"),
        ] {
            let sum = Checksum::of_sidecar(&text, "a.tar").unwrap();
            assert!(fits(&sum, "a") && !fits(&sum, "b"), "{text}");
        }
        for (text, error) in [
            (String::new(), ChecksumError::Form(1)),
            ("<html>".to_owned(), ChecksumError::Form(1)),
            (format!("{}  a.tar", &A[..40]), ChecksumError::Form(1)),
            (format!("{A} a.tar"), ChecksumError::Form(1)),
            ("é".repeat(32), ChecksumError::Form(1)),
            (format!("{A}  b.tar"), ChecksumError::Other("b.tar".to_owned())),
            (format!("{A}  a.tar\n{B}  b.tar"), ChecksumError::Lines),
        ] {
            assert_eq!(Checksum::of_sidecar(&text, "a.tar"), Err(error), "{text}");
        }
    }

    #[test]
    fn a_list_has_one_checksum_for_a_name() {
        let list = format!("{A}  ./a.tar\n\n{B} *dir/b.tar\r\n\\{A}  c\\\\\\n.tar\n{A}  a.tar\n");
        let sums = Checksums::parse(&list).unwrap();
        assert!(fits(sums.get("a.tar").unwrap(), "a"));
        assert!(fits(sums.get("b.tar").unwrap(), "b"));
        assert!(fits(sums.get("c\\\n.tar").unwrap(), "a"));
        assert_eq!(sums.get("dir/b.tar"), None);
        for (text, error) in [
            (format!("{A}  a\nx"), ChecksumError::Form(2)),
            (format!("{A}  "), ChecksumError::Form(1)),
            (
                format!("{A}  x/a\n{B}  y/a"),
                ChecksumError::Twice("a".to_owned()),
            ),
        ] {
            assert_eq!(Checksums::parse(&text), Err(error), "{text}");
        }
    }
}
