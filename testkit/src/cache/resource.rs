//! ByteStream's resource names (`remote_execution.proto`, comments on `ContentAddressableStorage`):
//!
//! * read: `{instance/}blobs/{function/}{hash}/{size}` or `{instance/}compressed-blobs/zstd/{function/}{hash}/{size}`
//! * write: `{instance/}uploads/{uuid}/`, the same from `blobs` or `compressed-blobs` on, `{/anything}`

use std::str::FromStr as _;

use tonic::Status;

use outhaul_digest::DigestFunction;

/// A resource name, taken apart but not yet checked against the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Resource<'a> {
    /// Empty if it has none.
    pub(super) instance: &'a str,
    /// Whether the stream's bytes are zstd.
    pub(super) compressed: bool,
    /// The function, if named.
    pub(super) function: Option<DigestFunction>,
    pub(super) hash: &'a str,
    /// Size of the blob before compression.
    pub(super) size: u64,
}

impl<'a> Resource<'a> {
    /// Takes a name for reading apart.
    pub(super) fn for_read(name: &'a str) -> Result<Self, Status> {
        let (instance, keyword, rest) = split(name).ok_or_else(|| malformed(name))?;
        match Self::blob(instance, keyword, rest) {
            Some((resource, None)) => Ok(resource),
            _ => Err(malformed(name)),
        }
    }

    /// Takes a name for writing apart.
    pub(super) fn for_write(name: &'a str) -> Result<Self, Status> {
        let parse = || {
            let (instance, keyword, rest) = split(name)?;
            let (_uuid, blob) = rest.split_once('/').filter(|_| keyword == "uploads")?;
            let (keyword, rest) = blob.split_once('/')?;
            Some(Self::blob(instance, keyword, rest)?.0)
        };
        parse().ok_or_else(|| malformed(name))
    }

    /// Also gives what follows the size.
    fn blob(instance: &'a str, keyword: &str, rest: &'a str) -> Option<(Self, Option<&'a str>)> {
        let (compressed, rest) = match keyword {
            "blobs" => (false, rest),
            "compressed-blobs" => (true, rest.strip_prefix("zstd/")?),
            _ => return None,
        };
        let (first, after_first) = rest.split_once('/')?;
        let (function, hash, rest) = match DigestFunction::from_str(first) {
            // The API's own spelling only: lowercase, no dash.
            Ok(function) if function.name() == first => {
                let (hash, rest) = after_first.split_once('/')?;
                (Some(function), hash, rest)
            }
            _ => (None, first, after_first),
        };
        let (size, metadata) = match rest.split_once('/') {
            Some((size, metadata)) => (size, Some(metadata)),
            None => (rest, None),
        };
        // `parse` alone would take a plus sign.
        let digits = size.bytes().all(|b| b.is_ascii_digit());
        let resource = Self {
            instance,
            compressed,
            function,
            hash,
            size: size.parse().ok().filter(|_| digits)?,
        };
        Some((resource, metadata))
    }
}

/// Instance name, first keyword, and what follows it. An instance name has no keyword among its segments.
fn split(name: &str) -> Option<(&str, &str, &str)> {
    let mut start = 0;
    for segment in name.split('/') {
        if matches!(segment, "blobs" | "compressed-blobs" | "uploads") {
            let instance = name[..start].trim_end_matches('/');
            let rest = name.get(start + segment.len() + 1..)?;
            return Some((instance, segment, rest));
        }
        start += segment.len() + 1;
    }
    None
}

fn malformed(name: &str) -> Status {
    Status::invalid_argument(format!("malformed resource name {name:?}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_taken_apart() {
        let plain = Resource {
            instance: "",
            compressed: false,
            function: None,
            hash: "ab12",
            size: 7,
        };
        let blake = Some(DigestFunction::Blake3);
        for (name, expected) in [
            ("blobs/ab12/7", plain),
            (
                "a/b/blobs/ab12/7",
                Resource {
                    instance: "a/b",
                    ..plain
                },
            ),
            (
                "i/compressed-blobs/zstd/blake3/ab12/7",
                Resource {
                    instance: "i",
                    compressed: true,
                    function: blake,
                    ..plain
                },
            ),
        ] {
            assert_eq!(Resource::for_read(name).unwrap(), expected);
        }
        for (name, expected) in [
            ("uploads/u-u/blobs/ab12/7", plain),
            ("uploads/u-u/blobs/ab12/7/some/name", plain),
            (
                "x/uploads/u/compressed-blobs/zstd/ab12/7",
                Resource {
                    instance: "x",
                    compressed: true,
                    ..plain
                },
            ),
        ] {
            assert_eq!(Resource::for_write(name).unwrap(), expected);
        }
    }

    #[test]
    fn malformed_names_are_refused() {
        for name in [
            "",
            "blobs",
            "blobs/",
            "blobs/ab",
            "blobs/ab/",
            "blobs/ab/-1",
            "blobs/ab/+1",
            "blobs/ab/1/x",
            "compressed-blobs/ab/1",
            "compressed-blobs/gzip/ab/1",
            "compressed-blobs/zstd",
            "uploads/u/blobs/ab/1",
        ] {
            assert!(Resource::for_read(name).is_err(), "{name}");
        }
        for name in [
            "blobs/ab/1",
            "uploads/blobs/ab/1",
            "uploads/u/uploads/u/blobs/ab/1",
        ] {
            assert!(Resource::for_write(name).is_err(), "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_name_panics(name in "[a-z/]{0,8}(blobs|uploads|compressed-blobs|é)?[a-z0-9/é]{0,20}(blobs/)?[a-z0-9/]{0,9}") {
            let _ = Resource::for_read(&name);
            let _ = Resource::for_write(&name);
        }
    }
}
