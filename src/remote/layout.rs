//! Where stores without an API of their own keep blobs and action results: what a key is made of, and how the object below
//! it is encoded.
//!
//! Object stores and HTTP servers know keys, not digests; which key a digest has depends on who wrote the objects. The
//! presets are what the well-known writers do, read from their sources and measured. What an object holds is decided by
//! the layout alone: a plain blob may itself begin like a compressed one.

use std::fmt::Write as _;

use crate::digest::{Digest, DigestFunction};

/// The longest template, in bytes: object stores take keys of up to 1024.
const MAX_TEMPLATE: usize = 512;

/// What is kept below a key, and its word in keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The result of an action, by the action's digest: `ac`.
    Action,
    /// A blob, by its own digest: `cas`.
    Blob,
}

impl Kind {
    const fn word(self) -> &'static str {
        match self {
            Self::Action => "ac",
            Self::Blob => "cas",
        }
    }
}

/// How a blob's bytes are in its object. Action results are always plain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As they are.
    Identity,
    /// One zstd stream.
    Zstd,
    /// bazel-remote's file format, see [`super::casblob`].
    Casblob,
}

/// Why a layout cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LayoutError {
    #[error(
        "layout={0} is not known; use bazel, disk, bazel-remote, bazel-remote-plain, bazel-remote-flat, nativelink or buildbuddy, or give template="
    )]
    Preset(String),
    #[error("layout= and template= exclude each other")]
    Both,
    #[error("encoding={0} is not known; use identity, zstd or casblob")]
    Encoding(String),
    #[error("template={0} does not contain {{hash}}, so all blobs would have one key")]
    NoHash(String),
    #[error(
        "template={0} contains the unknown field {{{1}}}; use {{hash}}, {{hash2}}, {{size_bytes}}, {{kind}}, {{function}} or {{function_dir}}"
    )]
    Field(String, String),
    #[error("template={0} has a brace without its counterpart")]
    Brace(String),
    #[error("template={0} would give keys with an empty, \".\" or \"..\" segment, which stores do not take")]
    Segment(String),
    #[error("the template is longer than {MAX_TEMPLATE} bytes or contains a control character")]
    Text,
}

/// A piece of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Hash,
    /// Its first two digits.
    Hash2,
    SizeBytes,
    Kind,
    Function,
    /// `blake3/` and the like for functions newer than Bazel's first ones, and nothing for those: as in Bazel's disk
    /// cache.
    FunctionDir,
}

/// A rule for keys.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Template(Vec<Part>);

/// The keys of a store, and the encoding of its blobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    blobs: Template,
    /// `None` where the layout does not say where action results are.
    actions: Option<Template>,
    encoding: Encoding,
}

/// The presets: name, keys of blobs, keys of action results, encoding of blobs.
const PRESETS: [(&str, &str, Option<&str>, Encoding); 7] = [
    // What Bazel asks of an HTTP server, which puts it into its store as it is.
    (
        "bazel",
        "{kind}/{hash}",
        Some("{kind}/{hash}"),
        Encoding::Identity,
    ),
    // Bazel's `DiskCacheClient`.
    (
        "disk",
        "{function_dir}{kind}/{hash2}/{hash}",
        Some("{function_dir}{kind}/{hash2}/{hash}"),
        Encoding::Identity,
    ),
    // bazel-remote's cache/s3proxy and cache/azblobproxy, in its two storage modes.
    (
        "bazel-remote",
        "cas.v2/{hash2}/{hash}",
        Some("ac/{hash2}/{hash}"),
        Encoding::Casblob,
    ),
    (
        "bazel-remote-plain",
        "cas/{hash2}/{hash}",
        Some("ac/{hash2}/{hash}"),
        Encoding::Identity,
    ),
    // bazel-remote's cache/gcsproxy and cache/httpproxy. Its uncompressed storage mode has the keys of `bazel`.
    (
        "bazel-remote-flat",
        "cas.v2/{hash}",
        Some("ac/{hash}"),
        Encoding::Casblob,
    ),
    // NativeLink's s3_store and gcs_store. Its action results have keys of the same form, with another prefix or bucket.
    ("nativelink", "{hash}-{size_bytes}", None, Encoding::Identity),
    // BuildBuddy's s3_cache.
    (
        "buildbuddy",
        "{hash}/{hash}",
        Some("ac/{hash}/{hash}"),
        Encoding::Identity,
    ),
];

impl Layout {
    /// From the values of `layout=`, `template=` and `encoding=`. Without any it is `bazel`.
    ///
    /// # Errors
    /// Naming the key and its value.
    pub(crate) fn new(
        layout: Option<&str>,
        template: Option<&str>,
        encoding: Option<&str>,
    ) -> Result<Self, LayoutError> {
        let mut made = match (layout, template) {
            (Some(_), Some(_)) => return Err(LayoutError::Both),
            (_, Some(text)) => {
                let blobs = Template::parse(text)?;
                Self {
                    // Without it, an action's result and the action itself would have the same key.
                    actions: blobs.0.contains(&Part::Kind).then(|| blobs.clone()),
                    blobs,
                    encoding: Encoding::Identity,
                }
            }
            (name, None) => {
                let name = name.unwrap_or("bazel");
                let (_, blobs, actions, encoding) = PRESETS
                    .into_iter()
                    .find(|(preset, ..)| *preset == name)
                    .ok_or_else(|| LayoutError::Preset(name.to_owned()))?;
                Self {
                    blobs: Template::parse(blobs)?,
                    actions: actions.map(Template::parse).transpose()?,
                    encoding,
                }
            }
        };
        made.encoding = match encoding {
            None => made.encoding,
            Some("identity") => Encoding::Identity,
            Some("zstd") => Encoding::Zstd,
            Some("casblob") => Encoding::Casblob,
            Some(other) => return Err(LayoutError::Encoding(other.to_owned())),
        };
        Ok(made)
    }

    /// How the objects of a kind are encoded.
    pub(crate) const fn encoding(&self, kind: Kind) -> Encoding {
        match kind {
            Kind::Action => Encoding::Identity,
            Kind::Blob => self.encoding,
        }
    }

    /// The key of a digest; `None` where the layout does not say where action results are.
    pub(crate) fn key(&self, kind: Kind, digest: &Digest) -> Option<String> {
        let size = Some(digest.size());
        self.template(kind)?
            .key(kind, digest.function(), digest.hash(), size)
    }

    /// The key of the blob with this hash; `None` where keys have sizes in them.
    pub(crate) fn key_of_hash(&self, function: DigestFunction, hash: &[u8]) -> Option<String> {
        self.blobs.key(Kind::Blob, function, hash, None)
    }

    const fn template(&self, kind: Kind) -> Option<&Template> {
        match kind {
            Kind::Action => self.actions.as_ref(),
            Kind::Blob => Some(&self.blobs),
        }
    }
}

impl Template {
    fn parse(text: &str) -> Result<Self, LayoutError> {
        if text.len() > MAX_TEMPLATE || text.chars().any(char::is_control) {
            return Err(LayoutError::Text);
        }
        let brace = || LayoutError::Brace(text.to_owned());
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let (plain, after) = rest
                .split_once('{')
                .map_or((rest, None), |(plain, after)| (plain, Some(after)));
            if plain.contains('}') {
                return Err(brace());
            }
            if !plain.is_empty() {
                parts.push(Part::Text(plain.to_owned()));
            }
            let Some(after) = after else { break };
            let (field, after) = after.split_once('}').ok_or_else(brace)?;
            parts.push(match field {
                "hash" => Part::Hash,
                "hash2" => Part::Hash2,
                "size_bytes" => Part::SizeBytes,
                "kind" => Part::Kind,
                "function" => Part::Function,
                "function_dir" => Part::FunctionDir,
                _ => return Err(LayoutError::Field(text.to_owned(), field.to_owned())),
            });
            rest = after;
        }
        let template = Self(parts);
        if !template.0.contains(&Part::Hash) {
            return Err(LayoutError::NoHash(text.to_owned()));
        }
        // Whatever a digest is, its key has the segments of these two.
        for function in [DigestFunction::Sha256, DigestFunction::Blake3] {
            let key = template.key(Kind::Blob, function, &[0; 32], Some(1));
            let is_good = |segment: &str| !matches!(segment, "" | "." | "..");
            if !key.is_some_and(|key| key.split('/').all(is_good)) {
                return Err(LayoutError::Segment(text.to_owned()));
            }
        }
        Ok(template)
    }

    fn key(&self, kind: Kind, function: DigestFunction, hash: &[u8], size: Option<u64>) -> Option<String> {
        let hash = hex::encode(hash);
        let mut key = String::with_capacity(hash.len() * 2);
        for part in &self.0 {
            match part {
                Part::Text(text) => key.push_str(text),
                Part::Hash => key.push_str(&hash),
                Part::Hash2 => key.push_str(hash.get(..2).unwrap_or_default()),
                // Writing to a string cannot fail.
                Part::SizeBytes => write!(key, "{}", size?).ok()?,
                Part::Kind => key.push_str(kind.word()),
                Part::Function => key.push_str(function.name()),
                Part::FunctionDir => match function {
                    DigestFunction::Sha256 | DigestFunction::Sha1 | DigestFunction::Md5 => {}
                    function => {
                        key.push_str(function.name());
                        key.push('/');
                    }
                },
            }
        }
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(function: DigestFunction) -> Digest {
        Digest::of(function, b"hello")
    }

    #[test]
    fn every_preset_has_the_keys_of_its_writer() {
        let digest = digest(DigestFunction::Sha256);
        let h = digest.hash_hex();
        let hh = &h[..2];
        for (name, blob, action, encoding) in [
            (
                "bazel",
                format!("cas/{h}"),
                Some(format!("ac/{h}")),
                Encoding::Identity,
            ),
            (
                "disk",
                format!("cas/{hh}/{h}"),
                Some(format!("ac/{hh}/{h}")),
                Encoding::Identity,
            ),
            (
                "bazel-remote",
                format!("cas.v2/{hh}/{h}"),
                Some(format!("ac/{hh}/{h}")),
                Encoding::Casblob,
            ),
            (
                "bazel-remote-plain",
                format!("cas/{hh}/{h}"),
                Some(format!("ac/{hh}/{h}")),
                Encoding::Identity,
            ),
            (
                "bazel-remote-flat",
                format!("cas.v2/{h}"),
                Some(format!("ac/{h}")),
                Encoding::Casblob,
            ),
            ("nativelink", format!("{h}-5"), None, Encoding::Identity),
            (
                "buildbuddy",
                format!("{h}/{h}"),
                Some(format!("ac/{h}/{h}")),
                Encoding::Identity,
            ),
        ] {
            let layout = Layout::new(Some(name), None, None).unwrap();
            assert_eq!(layout.key(Kind::Blob, &digest), Some(blob.clone()), "{name}");
            assert_eq!(layout.key(Kind::Action, &digest), action, "{name}");
            assert_eq!(layout.encoding(Kind::Blob), encoding, "{name}");
            assert_eq!(layout.encoding(Kind::Action), Encoding::Identity);
            let alone = (name != "nativelink").then_some(blob);
            assert_eq!(
                layout.key_of_hash(DigestFunction::Sha256, digest.hash()),
                alone,
                "{name}"
            );
        }
        assert_eq!(
            Layout::new(None, None, None),
            Layout::new(Some("bazel"), None, None)
        );
    }

    #[test]
    fn newer_functions_have_a_directory_of_their_own_on_disk() {
        let layout = Layout::new(Some("disk"), None, None).unwrap();
        let digest = digest(DigestFunction::Blake3);
        let h = digest.hash_hex();
        let key = layout.key(Kind::Blob, &digest);
        assert_eq!(key, Some(format!("blake3/cas/{}/{h}", &h[..2])));
    }

    #[test]
    fn templates_may_use_every_field() {
        let text = "a:b+c/{function}/{kind}/{hash2}-{hash}_{size_bytes}.zst";
        let layout = Layout::new(None, Some(text), Some("zstd")).unwrap();
        let digest = digest(DigestFunction::Sha1);
        let h = digest.hash_hex();
        let expected = |kind| format!("a:b+c/sha1/{kind}/{}-{h}_5.zst", &h[..2]);
        assert_eq!(layout.key(Kind::Blob, &digest), Some(expected("cas")));
        assert_eq!(layout.key(Kind::Action, &digest), Some(expected("ac")));
        assert_eq!(layout.encoding(Kind::Blob), Encoding::Zstd);
        assert_eq!(layout.key_of_hash(DigestFunction::Sha1, digest.hash()), None);
        let flat = Layout::new(None, Some("{hash}"), None).unwrap();
        assert_eq!(flat.key(Kind::Action, &digest), None);
    }

    #[test]
    fn what_cannot_work_is_named() {
        for (layout, template, encoding, part) in [
            (Some("bazle"), None, None, "layout=bazle is not known"),
            (Some("bazel"), Some("{hash}"), None, "exclude each other"),
            (None, Some("{kind}"), None, "does not contain {hash}"),
            (None, Some("{hash}/{digest}"), None, "unknown field {digest}"),
            (None, Some("{hash"), None, "brace"),
            (None, Some("hash}"), None, "brace"),
            (None, Some("/{hash}"), None, "segment"),
            (None, Some("../{hash}"), None, "segment"),
            (None, Some("a//{hash}"), None, "segment"),
            (None, Some("{hash}/{function_dir}"), None, "segment"),
            (None, Some("{hash}\n"), None, "control"),
            (None, None, Some("gzip"), "encoding=gzip"),
        ] {
            let error = Layout::new(layout, template, encoding).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
