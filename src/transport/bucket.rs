//! The address of a bucket in an object store.

use std::fmt::{self, Write as _};

use anyhow::{anyhow, bail};
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};

use super::{RemoteError, http_url};

/// What cannot stand in the value of a setting as it is.
const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'%').add(b'&').add(b'#').add(b'"');
/// The longest text of an address, in bytes.
const MAX_LENGTH: usize = 4096;

/// Whose protocol a bucket is read by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Provider {
    /// Amazon S3, and what speaks its protocol: `s3://`.
    S3,
    /// Google Cloud Storage: `gs://`.
    Gcs,
    /// Azure Blob Storage, whose buckets are called containers: `az://`.
    Azure,
}

impl Provider {
    const ALL: [Self; 3] = [Self::S3, Self::Gcs, Self::Azure];

    const fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Gcs => "gs",
            Self::Azure => "az",
        }
    }
}

/// Whether requests go without credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Anonymous {
    /// If there are none.
    #[default]
    Auto,
    /// Always: credentials that are there are not used.
    Yes,
    /// Never: without any, it is an error.
    No,
}

impl Anonymous {
    const ALL: [(&'static str, Self); 3] = [("auto", Self::Auto), ("yes", Self::Yes), ("no", Self::No)];
}

/// A bucket, the beginning of the names in it that count, and how the store is reached:
/// `SCHEME://BUCKET[/PREFIX][?KEY=VALUE&…]`. Holds no credentials, so it may be shown anywhere.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct BucketAddress {
    /// Whose protocol it is.
    pub provider: Provider,
    /// The bucket's or container's name.
    pub bucket: String,
    /// What all names begin with, followed by a slash; may be empty, and may have several segments.
    pub prefix: String,
    /// `endpoint=`: the server, as a URL without a query, instead of the provider's own.
    pub endpoint: Option<String>,
    /// `region=`: the bucket's region, for S3.
    pub region: Option<String>,
    /// `path-style=yes|no`: whether the bucket's name is in the path and not in the host, for S3.
    pub path_style: Option<bool>,
    /// `account=`: the storage account, for Azure.
    pub account: Option<String>,
    /// `anonymous=auto|yes|no`.
    pub anonymous: Anonymous,
    /// `layout=`: the name of a preset, see `remote::layout`.
    pub layout: Option<String>,
    /// `template=`: the rule for names instead of a preset's.
    pub template: Option<String>,
    /// `encoding=`: of blobs.
    pub encoding: Option<String>,
}

impl BucketAddress {
    /// Whether a text is meant to be the address of a bucket.
    pub(crate) fn is_one(text: &str) -> bool {
        split_scheme(text).is_some()
    }

    /// Reads the value of the flag `flag`. What follows the `?` is not repeated in errors, since it may be a key
    /// that does not belong there.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`](super::RemoteErrorKind::Config), naming the key.
    pub fn parse(flag: &str, text: &str) -> Result<Self, RemoteError> {
        let (place, query) = text.split_once('?').unwrap_or((text, ""));
        let shown = super::without_user_info(place);
        let error = |reason: String| RemoteError::config(format!("{flag}={shown}"), reason);
        if text.len() > MAX_LENGTH {
            return Err(error(format!("longer than {MAX_LENGTH} bytes")));
        }
        let (provider, rest) = split_scheme(place)
            .ok_or_else(|| error("unknown scheme; use s3://, gs:// or az://".to_owned()))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.contains('@') {
            return Err(error(
                "credentials are not allowed in the URL; give them in the environment or in files".to_owned(),
            ));
        }
        let is_good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'$');
        if bucket.is_empty() || bucket.len() > 222 || !bucket.bytes().all(is_good) || bucket.starts_with('.')
        {
            return Err(error(
                "the bucket's name is empty or contains an invalid character".to_owned(),
            ));
        }
        let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
        if !prefix.is_empty() && prefix.split('/').any(|s| matches!(s, "" | "." | ".."))
            || prefix.contains('#')
            || prefix.chars().any(char::is_control)
        {
            return Err(error(
                "the prefix contains an empty, \".\" or \"..\" segment, # or a control character".to_owned(),
            ));
        }
        let mut address = Self {
            provider,
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
            endpoint: None,
            region: None,
            path_style: None,
            account: None,
            anonymous: Anonymous::Auto,
            layout: None,
            template: None,
            encoding: None,
        };
        let mut seen = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            if seen.contains(&key) {
                return Err(error(format!("{} is set twice", known(key))));
            }
            seen.push(key);
            let value = percent_decode_str(value)
                .decode_utf8()
                .map_err(|_| error(format!("the value of {} is not UTF-8", known(key))))?;
            if value.is_empty() || value.chars().any(char::is_control) {
                return Err(error(format!(
                    "the value of {} is empty or contains a control character",
                    known(key)
                )));
            }
            address.set(key, &value).map_err(|e| error(e.to_string()))?;
        }
        Ok(address)
    }

    fn set(&mut self, key: &str, value: &str) -> anyhow::Result<()> {
        let only = |provider: Provider| {
            if self.provider == provider {
                Ok(())
            } else {
                bail!("{key}= is a setting of {}:// only", provider.scheme())
            }
        };
        let owned = Some(value.to_owned());
        match key {
            "endpoint" => self.endpoint = Some(endpoint(value)?),
            "region" => {
                only(Provider::S3)?;
                if !is_name(value) {
                    bail!("region= contains an invalid character");
                }
                self.region = owned;
            }
            "path-style" => {
                only(Provider::S3)?;
                self.path_style = match value {
                    "yes" => Some(true),
                    "no" => Some(false),
                    _ => bail!("path-style= must be yes or no"),
                };
            }
            "account" => {
                only(Provider::Azure)?;
                if !is_name(value) {
                    bail!("account= contains an invalid character");
                }
                self.account = owned;
            }
            "anonymous" => {
                let found = Anonymous::ALL.into_iter().find(|(name, _)| *name == value);
                self.anonymous = found
                    .ok_or_else(|| anyhow!("anonymous= must be auto, yes or no"))?
                    .1;
            }
            "layout" => self.layout = owned,
            "template" => self.template = owned,
            "encoding" => self.encoding = owned,
            _ => bail!(
                "unknown setting {}; use endpoint, region, path-style, account, anonymous, layout, template or encoding \
                 (keys and tokens belong in the environment or in files)",
                known(key)
            ),
        }
        Ok(())
    }

    /// The server's URL, if it is not the provider's own.
    fn server(&self) -> Option<http::Uri> {
        self.endpoint.as_ref()?.parse().ok()
    }

    /// Whether the connection is encrypted: it is, unless `endpoint=` says otherwise.
    pub(crate) fn is_tls(&self) -> bool {
        self.server().is_none_or(|uri| uri.scheme_str() == Some("https"))
    }

    /// The host of `endpoint=`.
    pub(crate) fn host(&self) -> Option<&str> {
        let (_, rest) = self.endpoint.as_ref()?.split_once("://")?;
        let authority = rest.split('/').next()?;
        match authority.strip_prefix('[') {
            Some(rest) => rest.split(']').next(),
            None => authority.split(':').next(),
        }
    }

    /// The address whose prefix is the last one's parent, and the name below it; `None` without a prefix.
    pub fn split_last(&self) -> Option<(Self, String)> {
        let (before, last) = match self.prefix.rsplit_once('/') {
            Some((before, last)) => (before, last),
            None if self.prefix.is_empty() => return None,
            None => ("", &*self.prefix),
        };
        let parent = Self {
            prefix: before.to_owned(),
            ..self.clone()
        };
        Some((parent, last.to_owned()))
    }
}

/// A key as it may be shown: a long or odd one may be a value that lost its key.
fn known(key: &str) -> String {
    let is_word = key.len() <= 24 && key.bytes().all(|b| b.is_ascii_lowercase() || b"-_".contains(&b));
    if is_word {
        format!("{key}=")
    } else {
        "in the query".to_owned()
    }
}

fn endpoint(value: &str) -> anyhow::Result<String> {
    server_url(value).map_err(|reason| anyhow!("endpoint= {reason}"))
}

/// The URL of a store's server, without slashes at its end.
///
/// # Errors
/// In words that go after what names the URL.
pub(crate) fn server_url(text: &str) -> Result<String, &'static str> {
    const FORM: &str = "must be http://HOST[:PORT][/PATH] or https://HOST[:PORT][/PATH]";
    let (uri, user_info) = http_url(text).map_err(|_| FORM)?;
    if user_info.is_some() {
        return Err("must not contain a user name or password");
    }
    if uri.query().is_some() || text.contains('#') {
        return Err(FORM);
    }
    Ok(text.trim_end_matches('/').to_owned())
}

/// Whether it can be the name of a region, or of an account.
pub(crate) fn is_name(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

fn split_scheme(text: &str) -> Option<(Provider, &str)> {
    let (scheme, rest) = text.split_once("://")?;
    let provider = Provider::ALL
        .into_iter()
        .find(|provider| provider.scheme().eq_ignore_ascii_case(scheme))?;
    Some((provider, rest))
}

impl fmt::Display for BucketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.provider.scheme(), self.bucket)?;
        if !self.prefix.is_empty() {
            write!(f, "/{}", self.prefix)?;
        }
        let path_style = self.path_style.map(|yes| if yes { "yes" } else { "no" });
        let anonymous = Anonymous::ALL
            .into_iter()
            .find(|(_, value)| *value == self.anonymous && *value != Anonymous::Auto)
            .map(|(name, _)| name);
        let settings = [
            ("endpoint", self.endpoint.as_deref()),
            ("region", self.region.as_deref()),
            ("path-style", path_style),
            ("account", self.account.as_deref()),
            ("anonymous", anonymous),
            ("layout", self.layout.as_deref()),
            ("template", self.template.as_deref()),
            ("encoding", self.encoding.as_deref()),
        ];
        let mut separator = '?';
        for (key, value) in settings {
            if let Some(value) = value {
                f.write_char(separator)?;
                write!(f, "{key}={}", utf8_percent_encode(value, ENCODED))?;
                separator = '&';
            }
        }
        Ok(())
    }
}

impl fmt::Debug for BucketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BucketAddress({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::{Endpoint, RemoteErrorKind};
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<BucketAddress, RemoteError> {
        BucketAddress::parse("--remote-cache", text)
    }

    #[test]
    fn every_setting_is_read_and_shown_again() {
        for (text, shown) in [
            ("s3://bucket", "s3://bucket"),
            ("S3://b/a/b%20c/", "s3://b/a/b%20c"),
            (
                "gs://b/p:q+r?layout=bazel-remote-flat",
                "gs://b/p:q+r?layout=bazel-remote-flat",
            ),
            (
                "az://c?account=me&endpoint=http://127.0.0.1:10000/me/",
                "az://c?endpoint=http://127.0.0.1:10000/me&account=me",
            ),
            (
                "s3://b?region=eu-central-1&path-style=no&anonymous=yes&template=x%2F%7Bhash%7D%25&encoding=zstd",
                "s3://b?region=eu-central-1&path-style=no&anonymous=yes&template=x/{hash}%25&encoding=zstd",
            ),
            ("s3://b?anonymous=auto", "s3://b"),
        ] {
            let address = parse(text).expect(text);
            assert_eq!(address.to_string(), shown);
            assert_eq!(parse(shown), Ok(address.clone()));
            let endpoint = Endpoint::parse_cache("--remote-cache", text).expect(text);
            assert_eq!(endpoint.to_string(), shown);
            assert_eq!(endpoint.bucket(), Some(&address));
            assert!(Endpoint::parse("--bes-backend", text).is_err());
        }
        assert_eq!(
            parse("s3://b?template=x%2F%7Bhash%7D%25")
                .unwrap()
                .template
                .unwrap(),
            "x/{hash}%"
        );
    }

    #[test]
    fn faults_name_their_key_and_show_no_secret() {
        for (text, part) in [
            ("s3://", "bucket's name"),
            ("s3://b c", "bucket's name"),
            ("s3://k3y:s3cret@b/p", "credentials are not allowed"),
            ("s3://b/a//b", "segment"),
            ("s3://b/..", "segment"),
            ("s3://b?colour=s3cret", "unknown setting colour="),
            ("az://b?sig=s3cret%3d", "unknown setting sig="),
            ("az://b?sv=2024&sig=s3cret", "unknown setting sv="),
            ("s3://b?S3cretS3cret", "in the query"),
            ("s3://b?endpoint=ftp://h", "endpoint="),
            ("s3://b?endpoint=http://me:s3cret@h", "endpoint="),
            ("s3://b?endpoint=http://h/?x=s3cret", "endpoint="),
            ("s3://b?region=a/b", "region="),
            ("gs://b?region=eu", "s3:// only"),
            ("s3://b?account=a", "az:// only"),
            ("s3://b?path-style=maybe", "path-style="),
            ("s3://b?anonymous=maybe", "anonymous="),
            ("s3://b?layout=a&layout=b", "layout= is set twice"),
            ("s3://b?layout=", "value of layout="),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!(error.kind, RemoteErrorKind::Config);
            let shown = error.to_string();
            assert!(
                shown.contains(part) && shown.starts_with("--remote-cache="),
                "{text}: {shown}"
            );
            assert!(!shown.to_ascii_lowercase().contains("s3cret"), "{shown}");
        }
    }

    #[test]
    fn an_objects_address_is_split_at_its_name() {
        let split = |text| parse(text).unwrap().split_last();
        let (parent, name) = split("s3://b/run-1/a_lib.tar.zst?region=x").unwrap();
        assert_eq!(
            (parent.to_string().as_str(), name.as_str()),
            ("s3://b/run-1?region=x", "a_lib.tar.zst")
        );
        assert_eq!(split("s3://b/name").unwrap().0.to_string(), "s3://b");
        assert_eq!(split("s3://b"), None);
    }

    proptest! {
        #[test]
        fn accepted_addresses_read_back(text in "(s3|gs|az)://[a-z.]{1,4}(/[a-z%+:/.]{0,9})?(\\?[a-z-]{4,9}=[a-z%&={}/]{0,12})?") {
            if let Ok(address) = parse(&text) {
                prop_assert_eq!(parse(&address.to_string()), Ok(address));
            }
        }
    }
}
