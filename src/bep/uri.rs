//! Names of blobs: `bytestream://` URIs, and the resource names in them.
//!
//! The forms are those of the Remote Execution API (comments on `ContentAddressableStorage`) and of Bazel's
//! `ByteStreamBuildEventArtifactUploader`. Instance names have any number of segments, and one of these may be
//! `blobs` too: names are read from the right.

use std::{fmt, str::FromStr};

use crate::digest::{Digest, DigestError, DigestFunction};

const SCHEME: &str = "bytestream://";

/// Why a text does not name a blob.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UriError {
    /// Another scheme, or none.
    #[error("{0:?} is not a bytestream:// uri")]
    Scheme(String),
    /// Not of the form `{instance/}blobs/{function/}HASH/SIZE`.
    #[error("{0:?} does not end in blobs/HASH/SIZE")]
    Form(String),
    /// Compressed, but not with zstd.
    #[error("{name:?} is compressed with {compressor:?}; only zstd is supported")]
    Compressor {
        /// The whole name.
        name: String,
        /// The compressor it names.
        compressor: String,
    },
    /// It does not contain a valid digest.
    #[error("{name:?} is not a valid blob name: {source}")]
    Digest {
        /// The whole name.
        name: String,
        /// What is wrong with the digest.
        source: DigestError,
    },
}

/// A blob's name for `ByteStream.Read`: `{instance/}blobs/{function/}HASH/SIZE`, or with `compressed-blobs/zstd`
/// in place of `blobs`. The digest is always that of the uncompressed bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct ResourceName {
    /// Instance name, empty for the default one; may hold slashes.
    pub instance_name: String,
    /// The blob.
    pub digest: Digest,
    /// Whether its bytes are asked for, or come, compressed with zstd.
    pub zstd: bool,
}

impl ResourceName {
    /// Reads a name. `default_function` says whose hash it is when the name does not: older Bazels leave out
    /// `blake3/`. It is only believed when the hash has the right length.
    ///
    /// # Errors
    /// When the name does not end in a blob's digest.
    pub(crate) fn parse_with(name: &str, default_function: Option<DigestFunction>) -> Result<Self, UriError> {
        let form = || UriError::Form(name.to_owned());
        let digest_error = |source| UriError::Digest {
            name: name.to_owned(),
            source,
        };
        let mut rest = name.rsplit('/');
        let mut next = || rest.next().ok_or_else(form);
        let (size, hash, before) = (next()?, next()?, next()?);
        // Segments that are not the instance's, counted from the right.
        let mut taken = 3;
        let mut function = None;
        let mut kind = before;
        if kind != "blobs" {
            let further = next()?;
            taken += 1;
            if further == "compressed-blobs" {
                kind = further;
                compressor(name, before)?;
            } else {
                // `before` is the function; what stands left of it must be the kind.
                kind = further;
                if kind != "blobs" {
                    if next()? != "compressed-blobs" {
                        return Err(form());
                    }
                    taken += 1;
                    kind = "compressed-blobs";
                    compressor(name, further)?;
                }
                function = Some(before.parse().map_err(digest_error)?);
            }
        }
        // `u64::from_str` takes a sign.
        let size = Some(size)
            .filter(|s| s.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|s| s.parse().ok())
            .ok_or_else(|| digest_error(DigestError::Size(size.to_owned())))?;
        let function = function.or_else(|| default_function.filter(|f| f.hash_len() * 2 == hash.len()));
        let digest = Digest::from_hex(function, hash, size).map_err(digest_error)?;
        let instance_name = name.rsplitn(taken + 1, '/').nth(taken).unwrap_or("").to_owned();
        Ok(Self {
            instance_name,
            digest,
            zstd: kind == "compressed-blobs",
        })
    }
}

fn compressor(name: &str, compressor: &str) -> Result<(), UriError> {
    if compressor == "zstd" {
        Ok(())
    } else {
        Err(UriError::Compressor {
            name: name.to_owned(),
            compressor: compressor.to_owned(),
        })
    }
}

impl FromStr for ResourceName {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        Self::parse_with(text, None)
    }
}

impl fmt::Display for ResourceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.instance_name.is_empty() {
            write!(f, "{}/", self.instance_name)?;
        }
        let kind = if self.zstd {
            "compressed-blobs/zstd"
        } else {
            "blobs"
        };
        // A digest's text names its function exactly where resource names do.
        write!(f, "{kind}/{}", self.digest)
    }
}

/// A blob and the cache that it is said to be in.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct BytestreamUri {
    /// Host and port, or whatever `--remote_bytestream_uri_prefix` put there; for a unix socket a placeholder.
    pub authority: String,
    /// Instance name, empty for the default one; may hold slashes.
    pub instance_name: String,
    /// The blob; uncompressed, also when the URI named its compressed form.
    pub digest: Digest,
}

impl BytestreamUri {
    /// Reads a URI, with a function for a hash whose function it does not name: see
    /// [`ResourceName::parse_with`].
    ///
    /// # Errors
    /// When it has another scheme or names no blob.
    pub(crate) fn parse_with(uri: &str, default_function: Option<DigestFunction>) -> Result<Self, UriError> {
        let rest = uri
            .strip_prefix(SCHEME)
            .ok_or_else(|| UriError::Scheme(uri.to_owned()))?;
        let (authority, name) = rest
            .split_once('/')
            .ok_or_else(|| UriError::Form(uri.to_owned()))?;
        let name = ResourceName::parse_with(name, default_function)?;
        Ok(Self {
            authority: authority.to_owned(),
            instance_name: name.instance_name,
            digest: name.digest,
        })
    }

    /// Whether a URI has this scheme.
    pub(crate) fn is_one(uri: &str) -> bool {
        uri.starts_with(SCHEME)
    }
}

impl FromStr for BytestreamUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        Self::parse_with(text, None)
    }
}

impl fmt::Display for BytestreamUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/", self.authority)?;
        if !self.instance_name.is_empty() {
            write!(f, "{}/", self.instance_name)?;
        }
        write!(f, "blobs/{}", self.digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SHA256: &str = "2c8b08da5ce60398e1f19af0e5dccc744df274b826abe585eaba68c525434806";

    #[test]
    fn instances_and_functions_are_read_from_the_right() {
        let cases = [
            ("bytestream://h:1/blobs/H/4", "h:1", "", DigestFunction::Sha256),
            (
                "bytestream://h/main/blobs/H/4",
                "h",
                "main",
                DigestFunction::Sha256,
            ),
            (
                "bytestream://h/a/b/blobs/blake3/H/4",
                "h",
                "a/b",
                DigestFunction::Blake3,
            ),
            (
                "bytestream://h/blobs/blobs/H/4",
                "h",
                "blobs",
                DigestFunction::Sha256,
            ),
            (
                "bytestream://h/a/blobs/b/blobs/blake3/H/4",
                "h",
                "a/blobs/b",
                DigestFunction::Blake3,
            ),
            (
                "bytestream://h/i/compressed-blobs/zstd/H/4",
                "h",
                "i",
                DigestFunction::Sha256,
            ),
            (
                "bytestream://h/compressed-blobs/zstd/blake3/H/4",
                "h",
                "",
                DigestFunction::Blake3,
            ),
            ("bytestream:///i/blobs/H/4", "", "i", DigestFunction::Sha256),
        ];
        for (text, authority, instance, function) in cases {
            let uri: BytestreamUri = text.replace('H', SHA256).parse().expect(text);
            assert_eq!(uri.authority, authority, "{text}");
            assert_eq!(uri.instance_name, instance, "{text}");
            assert_eq!(uri.digest.function(), function, "{text}");
            assert_eq!((uri.digest.hash_hex().as_str(), uri.digest.size()), (SHA256, 4));
        }
    }

    #[test]
    fn names_of_no_blob_say_what_is_wrong() {
        for (text, part) in [
            ("http://h/blobs/H/4", "bytestream://"),
            ("bytestream://h", "blobs/HASH/SIZE"),
            ("bytestream://h/H/4", "blobs/HASH/SIZE"),
            ("bytestream://h/x/y/H/4", "blobs/HASH/SIZE"),
            ("bytestream://h/blobs/H/-4", "\"-4\""),
            ("bytestream://h/blobs/H/+4", "\"+4\""),
            ("bytestream://h/blobs/H/", "number of bytes"),
            ("bytestream://h/blobs/H/99999999999999999999", "number of bytes"),
            ("bytestream://h/blobs/murmur3/H/4", "murmur3"),
            ("bytestream://h/blobs/sha1/H/4", "sha1 has 40"),
            ("bytestream://h/blobs/abcd/4", "4 hex digits"),
            ("bytestream://h/compressed-blobs/brotli/H/4", "brotli"),
            ("bytestream://h/compressed-blobs/deflate/blake3/H/4", "deflate"),
        ] {
            let error = BytestreamUri::parse_with(&text.replace('H', SHA256), None)
                .expect_err(text)
                .to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_default_function_is_taken_only_where_it_fits_and_nothing_is_named() {
        let of = |text: &str, default| {
            ResourceName::parse_with(&text.replace('H', SHA256), Some(default))
                .expect(text)
                .digest
                .function()
        };
        assert_eq!(of("blobs/H/4", DigestFunction::Blake3), DigestFunction::Blake3);
        assert_eq!(of("blobs/H/4", DigestFunction::Sha1), DigestFunction::Sha256);
        assert_eq!(
            of("blobs/blake3/H/4", DigestFunction::Sha256),
            DigestFunction::Blake3
        );
    }

    fn digests() -> impl Strategy<Value = Digest> {
        (0..DigestFunction::ALL.len(), any::<[u8; 64]>(), any::<u64>()).prop_map(|(function, bytes, size)| {
            let function = DigestFunction::ALL[function];
            Digest::new(function, &bytes[..function.hash_len()], size).unwrap()
        })
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(
            authority in "[a-z0-9.:-]{0,12}",
            instance_name in "((blobs|compressed-blobs|zstd|blake3|[a-z_]{1,5})(/(blobs|zstd|sha256|[a-z]{1,5})){0,3})?",
            digest in digests(),
            zstd in any::<bool>(),
        ) {
            let uri = BytestreamUri { authority, instance_name: instance_name.clone(), digest: digest.clone() };
            prop_assert_eq!(uri.to_string().parse::<BytestreamUri>(), Ok(uri));
            let name = ResourceName { instance_name, digest, zstd };
            prop_assert_eq!(name.to_string().parse::<ResourceName>(), Ok(name));
        }

        #[test]
        fn any_text_is_parsed_without_a_panic(text in "(bytestream://)?([a-f0-9/%é]|blobs|blake3|compressed-blobs|zstd){0,24}") {
            let _ = text.parse::<BytestreamUri>();
            let _ = text.parse::<ResourceName>();
        }
    }
}
