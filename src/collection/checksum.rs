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

    /// Reads the file beside an archive of this name: `HASH` alone, or lines as in a list, of which one has the name, or
    /// `-` for what was hashed as it was streamed.
    ///
    /// # Errors
    /// When a line is not a checksum, or none or several are of the archive.
    pub(super) fn of_sidecar(text: &str, name: &str) -> Result<Self, ChecksumError> {
        let mut lines = lines_of(text).peekable();
        if lines.peek().is_none() {
            return Err(ChecksumError::Form(1));
        }
        let mut found: Option<Self> = None;
        let mut others = Vec::new();
        for (number, line) in lines {
            let alone = Self::from_hex(line.trim_end()).map(|sum| (sum, name.to_owned()));
            let Some((sum, named)) = alone.map_or_else(|| line_of(number, line), |line| Ok(Some(line)))?
            else {
                continue;
            };
            let is_of_it = base(&named) == name || named == "-";
            if !is_of_it {
                others.push(named);
            } else if found.replace(sum.clone()).is_some_and(|before| before != sum) {
                return Err(ChecksumError::Twice(name.to_owned()));
            }
        }
        found.ok_or_else(|| match others.split_first() {
            None => ChecksumError::Form(1),
            Some((first, [])) => ChecksumError::Other(first.clone()),
            Some((first, more)) => ChecksumError::Other(format!("{first} and {} more", more.len())),
        })
    }

    /// Of the hash's bytes.
    #[cfg(feature = "object-stores")]
    pub(super) fn of_sha256(hash: [u8; 32]) -> Self {
        let function = DigestFunction::Sha256;
        let hash = hash.to_vec();
        Self { function, hash }
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
    /// A line is not of a form that `sha256sum` writes.
    #[error(
        "line {0} is not a SHA-256 as sha256sum writes it: 64 hex digits, two spaces, a file name; or SHA256 (a file \
         name) = 64 hex digits"
    )]
    Form(usize),
    /// The file beside an archive names other files.
    #[error("has the checksum of another file: {0}")]
    Other(String),
    /// A name has two checksums.
    #[error("has two different checksums for {0}")]
    Twice(String),
}

/// A list of checksums, by file name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Checksums(HashMap<String, Checksum>);

impl Checksums {
    /// Reads what `sha256sum` has written of any number of files. Directories in front of the names do not count, and
    /// nor do empty lines, comments (`#`) and the lines of other algorithms in the BSD form.
    ///
    /// # Errors
    /// Naming the line, or the name.
    pub(crate) fn parse(text: &str) -> Result<Self, ChecksumError> {
        let mut sums = Self::default();
        for (number, line) in lines_of(text) {
            if let Some((sum, named)) = line_of(number, line)? {
                sums.insert(base(&named).to_owned(), sum)?;
            }
        }
        Ok(sums)
    }

    /// With those of another list.
    ///
    /// # Errors
    /// When both have different checksums for one name.
    pub(crate) fn and(mut self, other: Self) -> Result<Self, ChecksumError> {
        for (name, sum) in other.0 {
            self.insert(name, sum)?;
        }
        Ok(self)
    }

    fn insert(&mut self, name: String, sum: Checksum) -> Result<(), ChecksumError> {
        match self.0.get(&name) {
            Some(before) if *before != sum => Err(ChecksumError::Twice(name)),
            _ => {
                self.0.insert(name, sum);
                Ok(())
            }
        }
    }

    /// The checksum of the file with this name.
    pub(crate) fn get(&self, name: &str) -> Option<&Checksum> {
        self.0.get(name)
    }
}

/// The lines that say something, without what an editor has put around them, with their numbers.
fn lines_of(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = (1..).zip(text.lines());
    lines
        .map(|(number, line)| {
            let line = line.strip_prefix('\u{feff}').unwrap_or(line);
            (number, line.trim_start().trim_end_matches('\r'))
        })
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
}

/// A line of `sha256sum`: hash, a space, a space or `*` (binary) or neither, name; or, as with `--tag` and on BSD,
/// `SHA256 (name) = hash`. A line with escapes in its name begins with `\`. Nothing if it is of another algorithm.
fn line_of(number: usize, line: &str) -> Result<Option<(Checksum, String)>, ChecksumError> {
    let form = || ChecksumError::Form(number);
    let (line, is_escaped) = match line.strip_prefix('\\') {
        Some(line) => (line, true),
        None => (line, false),
    };
    let (hash, name) = match tagged(line) {
        Some((algorithm, name, hash)) if is_sha256(algorithm) => (hash, name),
        Some(_) => return Ok(None),
        None => {
            let (hash, name) = line.split_at_checked(DIGITS).ok_or_else(form)?;
            let name = name.strip_prefix(' ').ok_or_else(form)?;
            (hash, name.strip_prefix([' ', '*']).unwrap_or(name))
        }
    };
    let sum = Checksum::from_hex(hash.trim_end()).ok_or_else(form)?;
    let name = if is_escaped {
        plain(name)
    } else {
        Some(name.to_owned())
    };
    let name = name.filter(|name| !name.is_empty());
    Ok(Some((sum, name.ok_or_else(form)?)))
}

/// The parts of `ALGORITHM (name) = hash`, or `ALGORITHM(name)= hash` of OpenSSL.
fn tagged(line: &str) -> Option<(&str, &str, &str)> {
    let (algorithm, rest) = line.split_once('(')?;
    let (name, hash) = rest.rsplit_once(')')?;
    let algorithm = algorithm.trim_end();
    let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '/');
    let is_one = !algorithm.is_empty() && algorithm.len() < DIGITS && algorithm.chars().all(is_word);
    let hash = hash.trim_start().strip_prefix('=')?;
    is_one.then_some((algorithm, name, hash.trim()))
}

fn is_sha256(algorithm: &str) -> bool {
    let names = ["SHA256", "SHA-256", "SHA2-256"];
    names.iter().any(|name| algorithm.eq_ignore_ascii_case(name))
}

/// A name without its escapes.
fn plain(name: &str) -> Option<String> {
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
    Some(plain)
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
            format!("{A}  \n"),
            format!("{}\r\n", A.to_uppercase()),
            format!("{A}  a.tar\n"),
            format!("{A} *build/a.tar\n"),
            format!("{A} a.tar"),
            format!("\u{feff}{A}  a.tar\r\n"),
            format!("\n  {A}  a.tar"),
            format!("# made by CI\n{A}  -\n"),
            format!("SHA256 (dist/a.tar) = {A}\n"),
            format!("SHA2-256(a.tar)= {A}\n"),
            format!("{B}  b.tar\n{A}  a.tar\n"),
            format!("SHA512 (a.tar) = {A}{A}\nSHA256 (a.tar) = {A}\n"),
            format!("{A}  a.tar\n{A}  dir/a.tar\n"),
        ] {
            let sum = Checksum::of_sidecar(&text, "a.tar").unwrap();
            assert!(fits(&sum, "a") && !fits(&sum, "b"), "{text}");
        }
        for (text, error) in [
            (String::new(), ChecksumError::Form(1)),
            ("<html>".to_owned(), ChecksumError::Form(1)),
            (format!("{}  a.tar", &A[..40]), ChecksumError::Form(1)),
            ("# nothing\n".to_owned(), ChecksumError::Form(1)),
            (format!("{A}a.tar"), ChecksumError::Form(1)),
            (format!("{A}{A}  a.tar"), ChecksumError::Form(1)),
            (format!("SHA256 (a.tar) = {}", &A[1..]), ChecksumError::Form(1)),
            (format!("SHA512 (a.tar) = {A}{A}"), ChecksumError::Form(1)),
            ("é".repeat(32), ChecksumError::Form(1)),
            (format!("{A}  b.tar"), ChecksumError::Other("b.tar".to_owned())),
            (
                format!("{A}  c.tar\n{B}  b.tar"),
                ChecksumError::Other("c.tar and 1 more".to_owned()),
            ),
            (
                format!("{A}  a.tar\n{B}  x/a.tar"),
                ChecksumError::Twice("a.tar".to_owned()),
            ),
        ] {
            assert_eq!(Checksum::of_sidecar(&text, "a.tar"), Err(error), "{text}");
        }
    }

    #[test]
    fn a_list_has_one_checksum_for_a_name() {
        let list = format!(
            "# of today\n{A}  ./a.tar\n\n{B} *dir/b.tar\r\n\\{A}  c\\\\\\n.tar\n{A} a.tar\nSHA256 (d (1).tar) = {B}\n"
        );
        let sums = Checksums::parse(&list).unwrap();
        assert!(fits(sums.get("a.tar").unwrap(), "a"));
        assert!(fits(sums.get("b.tar").unwrap(), "b"));
        assert!(fits(sums.get("c\\\n.tar").unwrap(), "a"));
        assert!(fits(sums.get("d (1).tar").unwrap(), "b"));
        assert_eq!(sums.get("dir/b.tar"), None);
        let more = |text: &str| sums.clone().and(Checksums::parse(text).unwrap());
        let both = more(&format!("{A}  e.tar\n{A}  a.tar")).unwrap();
        assert!(fits(both.get("e.tar").unwrap(), "a") && fits(both.get("b.tar").unwrap(), "b"));
        let twice = more(&format!("{B}  a.tar"));
        assert_eq!(twice, Err(ChecksumError::Twice("a.tar".to_owned())));
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
