//! Digests: which function, which hash, how many bytes.
//!
//! A [`Digest`] cannot hold a hash of the wrong length, so nothing downstream checks it again. The functions are
//! those that the Remote Execution API numbers in `DigestFunction.Value` and whose hash is over the plain bytes.

use std::{fmt, str::FromStr};

use sha2::Digest as _;

/// A digest function of the Remote Execution API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum DigestFunction {
    /// SHA-256, the default of every build tool.
    #[default]
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
    /// SHA-1.
    Sha1,
    /// MD5.
    Md5,
    /// BLAKE3 with its default output of 32 bytes.
    Blake3,
}

impl DigestFunction {
    /// Every function, in the order in which a hash's length is matched against them.
    pub const ALL: [Self; 6] = [
        Self::Sha256,
        Self::Sha384,
        Self::Sha512,
        Self::Sha1,
        Self::Md5,
        Self::Blake3,
    ];

    /// Length of the hash in bytes.
    pub const fn hash_len(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha256 | Self::Blake3 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// The name used in resource names and on the command line: lowercase, without a dash.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Sha1 => "sha1",
            Self::Md5 => "md5",
            Self::Blake3 => "blake3",
        }
    }

    /// Number in the Remote Execution API's `DigestFunction.Value`.
    pub const fn wire(self) -> i32 {
        match self {
            Self::Sha256 => 1,
            Self::Sha1 => 2,
            Self::Md5 => 3,
            Self::Sha384 => 5,
            Self::Sha512 => 6,
            Self::Blake3 => 9,
        }
    }

    /// The function with that number, if we can compute it.
    pub fn from_wire(value: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.wire() == value)
    }

    /// Whether resource names and requests name the function: the API lets the length of the hash decide for the
    /// older ones, so only BLAKE3 is named.
    pub const fn is_named(self) -> bool {
        matches!(self, Self::Blake3)
    }

    /// The function that a hash of this many bytes belongs to when nothing names it.
    pub fn from_hash_len(bytes: usize) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.hash_len() == bytes)
    }
}

impl fmt::Display for DigestFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DigestFunction {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let wanted = text.to_ascii_lowercase().replace('-', "");
        Self::ALL
            .into_iter()
            .find(|f| f.name() == wanted)
            .ok_or_else(|| DigestError::Function(text.to_owned()))
    }
}

/// Why a text or message is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// Not a function that we know.
    #[error("unknown digest function {0:?} (known: sha256, sha384, sha512, sha1, md5, blake3)")]
    Function(String),
    /// The hash has no function's length, or not that of the function named.
    #[error("hash {hash:?} has {digits} hex digits, but {expected}")]
    Length {
        /// The hash as given.
        hash: String,
        /// How many digits it has.
        digits: usize,
        /// What was expected, in words.
        expected: String,
    },
    /// The hash has a character that is no hex digit.
    #[error("hash {0:?} is not hexadecimal")]
    NotHex(String),
    /// The size is no number, or negative.
    #[error("size {0:?} is not a number of bytes")]
    Size(String),
    /// Not of the form `HASH/SIZE` or `FUNCTION/HASH/SIZE`.
    #[error("{0:?} is not a digest; write HASH/SIZE or FUNCTION/HASH/SIZE")]
    Form(String),
}

/// The hash's bytes. Everything but SHA-384 and SHA-512 is kept inline, so that a million digests stay small.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum HashBytes {
    /// Up to 32 bytes, the rest zero.
    Inline([u8; 32]),
    /// Hashes longer than 32 bytes.
    Boxed(Box<[u8]>),
}

/// A blob's identity: function, hash and size.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    hash: HashBytes,
    size: u64,
    function: DigestFunction,
}

impl Digest {
    /// From the hash's bytes.
    ///
    /// # Errors
    /// When the hash does not have the function's length.
    pub fn new(function: DigestFunction, hash: &[u8], size: u64) -> Result<Self, DigestError> {
        if hash.len() != function.hash_len() {
            let text = hex::encode(hash);
            return Err(DigestError::Length {
                digits: text.len(),
                hash: text,
                expected: format!("{function} has {}", function.hash_len() * 2),
            });
        }
        let hash = if hash.len() <= 32 {
            let mut inline = [0; 32];
            inline[..hash.len()].copy_from_slice(hash);
            HashBytes::Inline(inline)
        } else {
            HashBytes::Boxed(hash.into())
        };
        Ok(Self { hash, size, function })
    }

    /// From a hash in hex. Without a function, the hash's length decides.
    ///
    /// # Errors
    /// When the hash is not hexadecimal or its length is no function's, or not the named one's.
    pub fn from_hex(function: Option<DigestFunction>, hash: &str, size: u64) -> Result<Self, DigestError> {
        let mut buffer = [0; 64];
        let length = |expected: String| DigestError::Length {
            hash: hash.to_owned(),
            digits: hash.len(),
            expected,
        };
        let not_hex = || DigestError::NotHex(hash.to_owned());
        let is_hex = || hash.bytes().all(|b| b.is_ascii_hexdigit());
        let function = match function {
            Some(function) if function.hash_len() * 2 == hash.len() => function,
            _ if !is_hex() => return Err(not_hex()),
            Some(function) => {
                return Err(length(format!("{function} has {}", function.hash_len() * 2)));
            }
            None if hash.len().is_multiple_of(2) => DigestFunction::from_hash_len(hash.len() / 2)
                .ok_or_else(|| length("no digest function has that length".to_owned()))?,
            None => return Err(length("no digest function has that length".to_owned())),
        };
        let bytes = &mut buffer[..function.hash_len()];
        if !decode_hex(hash.as_bytes(), bytes) {
            return Err(not_hex());
        }
        Self::new(function, bytes, size)
    }

    /// Whether the hash is written so, in digits of either case.
    pub fn is_hex(&self, digits: &[u8]) -> bool {
        let mut hash = [0; 64];
        let length = self.hash().len();
        decode_hex(digits, &mut hash[..length]) && hash[..length] == *self.hash()
    }

    /// The digest of these bytes.
    pub fn of(function: DigestFunction, bytes: &[u8]) -> Self {
        let mut hasher = Hasher::new(function);
        hasher.update(bytes);
        hasher.finish()
    }

    /// The digest function.
    pub const fn function(&self) -> DigestFunction {
        self.function
    }

    /// Size in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Whether this is the empty blob, which every cache has and nobody asks for.
    pub const fn is_empty(&self) -> bool {
        self.size == 0
    }

    /// The hash's bytes.
    pub fn hash(&self) -> &[u8] {
        match &self.hash {
            HashBytes::Inline(bytes) => &bytes[..self.function.hash_len()],
            HashBytes::Boxed(bytes) => bytes,
        }
    }

    /// The hash in lowercase hex.
    pub fn hash_hex(&self) -> String {
        hex::encode(self.hash())
    }
}

impl fmt::Display for Digest {
    /// `HASH/SIZE`, with `blake3/` before it where the length of the hash would not determine the function.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.function.is_named() {
            write!(f, "{}/", self.function)?;
        }
        write!(f, "{}/{}", self.hash_hex(), self.size)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    /// Reads `HASH/SIZE` or `FUNCTION/HASH/SIZE`.
    fn from_str(text: &str) -> Result<Self, DigestError> {
        let parts: Vec<&str> = text.split('/').collect();
        let (function, hash, size) = match parts[..] {
            [hash, size] => (None, hash, size),
            [function, hash, size] => (Some(function.parse()?), hash, size),
            _ => return Err(DigestError::Form(text.to_owned())),
        };
        // `u64::from_str` takes a sign.
        let size = Some(size)
            .filter(|size| size.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|size| size.parse().ok())
            .ok_or_else(|| DigestError::Size(size.to_owned()))?;
        Self::from_hex(function, hash, size)
    }
}

/// The value of every hex digit, of either case; 0xff for other characters.
const NIBBLES: [u8; 256] = {
    let mut table = [0xff; 256];
    let mut value = 0;
    while value < 16 {
        table[b"0123456789abcdef"[value] as usize] = value as u8;
        table[b"0123456789ABCDEF"[value] as usize] = value as u8;
        value += 1;
    }
    table
};

/// Decodes two digits for each byte; `false` when there are too few, or one is invalid. Every output of a build comes
/// through here, some of them several times, so it has no branch a digit.
fn decode_hex(digits: &[u8], to: &mut [u8]) -> bool {
    let mut seen = 0;
    for (pair, byte) in digits.chunks_exact(2).zip(to.iter_mut()) {
        let (high, low) = (NIBBLES[usize::from(pair[0])], NIBBLES[usize::from(pair[1])]);
        seen |= high | low;
        *byte = high << 4 | low & 0xf;
    }
    digits.len() == 2 * to.len() && seen & 0xf0 == 0
}

/// Hashes a stream of bytes and counts them.
pub struct Hasher {
    state: State,
    function: DigestFunction,
    size: u64,
}

enum State {
    Sha256(sha2::Sha256),
    Sha384(sha2::Sha384),
    Sha512(sha2::Sha512),
    Sha1(sha1::Sha1),
    Md5(md5::Md5),
    Blake3(Box<blake3::Hasher>),
}

impl Hasher {
    /// An empty stream.
    pub fn new(function: DigestFunction) -> Self {
        let state = match function {
            DigestFunction::Sha256 => State::Sha256(sha2::Sha256::new()),
            DigestFunction::Sha384 => State::Sha384(sha2::Sha384::new()),
            DigestFunction::Sha512 => State::Sha512(sha2::Sha512::new()),
            DigestFunction::Sha1 => State::Sha1(sha1::Sha1::new()),
            DigestFunction::Md5 => State::Md5(md5::Md5::new()),
            DigestFunction::Blake3 => State::Blake3(Box::new(blake3::Hasher::new())),
        };
        Self {
            state,
            function,
            size: 0,
        }
    }

    /// Appends bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.size += bytes.len() as u64;
        match &mut self.state {
            State::Sha256(s) => s.update(bytes),
            State::Sha384(s) => s.update(bytes),
            State::Sha512(s) => s.update(bytes),
            State::Sha1(s) => s.update(bytes),
            State::Md5(s) => s.update(bytes),
            State::Blake3(s) => {
                s.update(bytes);
            }
        }
    }

    /// Bytes hashed so far.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The digest of all that was appended.
    pub fn finish(self) -> Digest {
        let mut hash = [0; 64];
        let hash = &mut hash[..self.function.hash_len()];
        match self.state {
            State::Sha256(s) => hash.copy_from_slice(&s.finalize()),
            State::Sha384(s) => hash.copy_from_slice(&s.finalize()),
            State::Sha512(s) => hash.copy_from_slice(&s.finalize()),
            State::Sha1(s) => hash.copy_from_slice(&s.finalize()),
            State::Md5(s) => hash.copy_from_slice(&s.finalize()),
            State::Blake3(s) => hash.copy_from_slice(s.finalize().as_bytes()),
        }
        let hash = if hash.len() <= 32 {
            let mut inline = [0; 32];
            inline[..hash.len()].copy_from_slice(hash);
            HashBytes::Inline(inline)
        } else {
            HashBytes::Boxed((&*hash).into())
        };
        Digest {
            hash,
            size: self.size,
            function: self.function,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Published test vectors of "abc".
    #[test]
    fn every_function_gives_its_published_hash() {
        let cases = [
            (DigestFunction::Md5, "900150983cd24fb0d6963f7d28e17f72"),
            (DigestFunction::Sha1, "a9993e364706816aba3e25717850c26c9cd0d89d"),
            (
                DigestFunction::Sha256,
                "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            ),
            (
                DigestFunction::Blake3,
                "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
            ),
        ];
        for (function, expected) in cases {
            let digest = Digest::of(function, b"abc");
            assert_eq!(digest.hash_hex(), expected, "{function}");
            assert_eq!(digest.size(), 3);
        }
        for (function, start) in [
            (DigestFunction::Sha384, "cb00753f45a35e8bb5a03d699ac65007"),
            (DigestFunction::Sha512, "ddaf35a193617abacc417349ae204131"),
        ] {
            let hex = Digest::of(function, b"abc").hash_hex();
            assert_eq!(hex.len(), function.hash_len() * 2);
            assert!(hex.starts_with(start), "{function}: {hex}");
        }
    }

    #[test]
    fn text_form_reads_back_for_every_function() {
        for function in DigestFunction::ALL {
            let digest = Digest::of(function, b"some bytes");
            assert_eq!(digest.to_string().parse(), Ok(digest.clone()));
            let long = format!("{function}/{}/{}", digest.hash_hex(), digest.size());
            assert_eq!(long.parse(), Ok(digest));
        }
    }

    #[test]
    fn digits_are_compared_in_either_case() {
        for function in DigestFunction::ALL {
            let digest = Digest::of(function, b"some bytes");
            let hex = digest.hash_hex();
            assert!(digest.is_hex(hex.as_bytes()) && digest.is_hex(hex.to_uppercase().as_bytes()));
            for wrong in [&hex[2..], &hex.replace(['a', 'b'], "g"), &format!("{hex}00"), ""] {
                assert!(!digest.is_hex(wrong.as_bytes()), "{wrong}");
            }
            assert!(!digest.is_hex(Digest::of(function, b"others").hash_hex().as_bytes()));
        }
    }

    #[test]
    fn bad_digests_say_what_is_wrong() {
        for (text, part) in [
            ("abc", "HASH/SIZE"),
            ("abcd/3", "4 hex digits"),
            ("zz/3", "not hexadecimal"),
            ("900150983cd24fb0d6963f7d28e17f72/-1", "\"-1\" is not a number"),
            ("900150983cd24fb0d6963f7d28e17f72/+1", "\"+1\" is not a number"),
            ("crc32/900150983cd24fb0d6963f7d28e17f72/1", "crc32"),
            ("sha256/900150983cd24fb0d6963f7d28e17f72/1", "sha256 has 64"),
            ("é00150983cd24fb0d6963f7d28e17f7/1", "not hexadecimal"),
        ] {
            let error = text.parse::<Digest>().expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
