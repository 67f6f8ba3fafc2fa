//! The collection that a URL leads to.

use std::{path::PathBuf, sync::Arc};

use anyhow::anyhow;
use percent_encoding::percent_decode_str;

use super::{
    Collection, Patience, address::Address, directory::LocalDirectory, http::HttpFiles, is_file_name,
};
#[cfg(feature = "object-stores")]
use super::{Only, bucket::BucketDirectory};
#[cfg(feature = "object-stores")]
use crate::{remote::object::Bucket, transport::BucketAddress};
use crate::{
    remote::{RemoteOptions, WrittenDigest},
    transport::{
        Auth, ConnectOptions, Endpoint, Header, RemoteError, auth::has_helper, https::client_for, netrc,
        without_secrets,
    },
};

/// What the URI of a blob begins with.
const BLOBS: &str = "bytestream://";
/// The hosts that Google's credentials are for.
const GOOGLE: &str = "storage.googleapis.com";

/// How servers are reached, and what they are shown.
#[derive(Debug, Clone)]
pub(crate) struct Access {
    /// How often and how long to try.
    pub(crate) patience: Patience,
    /// Credential helpers, Google's credentials, time-outs, and for buckets the certificate authorities. Headers and our own
    /// certificate are those of the remote cache: they are sent to no other server. The endpoint does not count.
    pub(crate) options: RemoteOptions,
}

/// What a user names, under its own name or under another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source<'a> {
    /// The name that it is given.
    pub(crate) name: Option<&'a str>,
    /// Where it is.
    pub(crate) location: Location<'a>,
}

/// Where something is that a user names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Location<'a> {
    /// At a URL, see [`open`].
    Url(&'a str),
    /// In the remote cache, see [`BlobArchive`](super::BlobArchive).
    Blob(WrittenDigest),
}

impl<'a> Source<'a> {
    /// Reads `[NAME=]URL` or `[NAME=]DIGEST`.
    ///
    /// # Errors
    /// In words that do not repeat the text, when it is neither.
    pub(crate) fn parse(text: &'a str) -> Result<Self, &'static str> {
        let (name, location) = match text.split_once('=') {
            Some((name, location)) if is_file_name(name) => (Some(name), location),
            _ => (None, text),
        };
        let location = if location.contains("://") && !location.starts_with(BLOBS) {
            Location::Url(location)
        } else {
            let written = location.parse();
            let is_path = location.starts_with(['/', '.', '~']) || location.starts_with("file:");
            Location::Blob(written.map_err(|_| {
                if is_path {
                    "is a path; write it as file:///DIRECTORY/ or file:///DIRECTORY/FILE"
                } else {
                    "is neither a URL nor a digest (HASH/SIZE, or HASH)"
                }
            })?)
        };
        Ok(Self { name, location })
    }
}

/// Opens what a URL leads to, under the name that it has or under another one. Connects nothing yet.
///
/// # Errors
/// Naming the URL without what may be secret in it.
pub(crate) fn open(
    url: &str,
    name: Option<&str>,
    access: &Access,
) -> Result<Arc<dyn Collection>, RemoteError> {
    // In a query may be a signature.
    let shown = without_secrets(url);
    let error = |reason: anyhow::Error| RemoteError::config(shown.clone(), reason);
    let Some((scheme, rest)) = url.split_once("://") else {
        return Err(error(anyhow!("is not a URL")));
    };
    match &*scheme.to_ascii_lowercase() {
        "file" => {
            let path = rest.strip_prefix("localhost").unwrap_or(rest);
            let path = percent_decode_str(path).decode_utf8();
            let path = path.map_err(|_| error(anyhow!("is not a path in UTF-8")))?;
            if !path.starts_with('/') {
                return Err(error(anyhow!("must have an absolute path: file:///DIR/")));
            }
            let path = PathBuf::from(&*path);
            Ok(Arc::new(LocalDirectory::open(&path, name).map_err(error)?))
        }
        "http" | "https" => {
            let address = Address::parse(url).map_err(error)?;
            let name = match name {
                Some(name) => name.to_owned(),
                None => address.file_name().map_err(error)?,
            };
            let only = Some(name).filter(|name| !name.is_empty());
            if only.as_ref().is_some_and(|name| !is_file_name(name)) {
                return Err(error(anyhow!(
                    "does not end in a usable file name; write NAME=URL"
                )));
            }
            // A redirect may lead to https, wherever it begins.
            let client = match client_for(true) {
                Err(_) if !address.is_https() => client_for(false),
                client => client,
            };
            Ok(Arc::new(HttpFiles {
                client: client.map_err(|e| error(e.into()))?,
                auth: auth(&address, access)?,
                patience: access.patience.clone(),
                only,
                address,
            }))
        }
        "s3" | "gs" | "az" => bucket(url, name, access),
        _ => Err(error(anyhow!(
            "unknown scheme; use file://, http://, https://, s3://, gs:// or az://"
        ))),
    }
}

/// The objects right below a prefix that ends in a slash, or one object.
#[cfg(feature = "object-stores")]
fn bucket(url: &str, name: Option<&str>, access: &Access) -> Result<Arc<dyn Collection>, RemoteError> {
    let mut endpoint = Endpoint::parse_cache("URL", url)?;
    let mut only = None;
    if !url.split('?').next().unwrap_or(url).ends_with('/')
        && let Some((parent, own)) = endpoint.bucket().and_then(BucketAddress::split_last)
    {
        endpoint = Endpoint::parse_cache("URL", &parent.to_string())?;
        only = Some(Only::new(own, name));
    } else if name.is_some() {
        let reason = "is a prefix; NAME= is for one object";
        return Err(RemoteError::config(without_secrets(url), reason));
    }
    let mut options = access.options.clone();
    options.connect.endpoint = endpoint;
    options.connect.headers = Vec::new();
    // Who we are is for the remote cache to know.
    options.connect.tls.client_certificate = None;
    options.connect.tls.client_key = None;
    Ok(Arc::new(BucketDirectory {
        bucket: Bucket::open(&options)?,
        only,
        patience: access.patience.clone(),
    }))
}

#[cfg(not(feature = "object-stores"))]
fn bucket(url: &str, _: Option<&str>, _: &Access) -> Result<Arc<dyn Collection>, RemoteError> {
    let message = "this outhaul was built without object stores (the feature object-stores)";
    Err(RemoteError::config(without_secrets(url), message))
}

/// The server that credentials are for. A helper is to know whether they are sent in clear.
fn server(address: &Address) -> Result<Endpoint, RemoteError> {
    let scheme = if address.is_https() { "https" } else { "http" };
    let host = address.uri().host().unwrap_or_default();
    Endpoint::parse_cache("URL", &format!("{scheme}://{host}:{}", address.port()))
}

/// What a server is shown if the URL has no user name: what a credential helper says, or Google's credentials, or the
/// login in the user's `.netrc`; the first of these that there is.
fn auth(address: &Address, access: &Access) -> Result<Option<Auth>, RemoteError> {
    let mut connect = ConnectOptions {
        endpoint: server(address)?,
        headers: Vec::new(),
        // The socket is that of the remote cache.
        proxy: None,
        ..access.options.connect.clone()
    };
    if let Some(login) = address.login() {
        // The URL's own is sent with the URL, and with nothing else.
        connect.headers.push(login.clone());
        connect.credential_helpers.clear();
        connect.google = None;
        Auth::new(&connect)?.warn_if_unencrypted(&connect);
        return Ok(None);
    }
    let host = address.host();
    let is_google = host == GOOGLE || host.strip_suffix(GOOGLE).is_some_and(|rest| rest.ends_with('.'));
    if !address.is_https() || !is_google {
        connect.google = None;
    }
    if !has_helper(&connect) && connect.google.is_none() && !connect.no_netrc {
        let login = netrc::of_user(host);
        connect
            .headers
            .extend(login.map(|(user, password)| Header::basic(&user, &password)));
    }
    let auth = Auth::new(&connect)?;
    auth.warn_if_unencrypted(&connect);
    Ok(Some(auth))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_helper_is_asked_about_the_scheme_that_is_spoken() {
        for (url, expected) in [
            ("http://h/a.tar", "http://h:80"),
            ("http://[::1]:81/d/a.tar?sig=1", "http://[::1]:81"),
            ("https://h/a.tar", "https://h:443"),
        ] {
            let server = server(&Address::parse(url).unwrap()).unwrap();
            assert_eq!(server.credential_uri().as_deref(), Some(expected), "{url}");
            assert_eq!(server.is_tls(), url.starts_with("https"));
        }
    }
}
