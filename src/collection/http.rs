//! One file at an HTTP URL, and the file with its checksum beside it; or those that the page of a directory names.
//!
//! Ranges, conditions and statuses are those of RFC 9110. A file is resumed with `Range`, and with `If-Range` where the
//! server gives a strong entity tag.

use std::time::SystemTime;

use anyhow::Error;
use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http::{
    HeaderMap, HeaderValue, Request, Response, StatusCode,
    header::{
        ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, ETAG, HeaderName, IF_RANGE,
        LAST_MODIFIED, LOCATION, RANGE, TRANSFER_ENCODING, USER_AGENT,
    },
};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::{
    Collection, Item, Listing, SIDECAR,
    address::Address,
    page::files,
    plan::Text,
    resume::{self, Opened, Patience, Ranged},
};
use crate::{
    printable::with_causes,
    remote::Sink,
    transport::{
        Auth, Header, RemoteError, RemoteErrorKind,
        http_head::{ContentRange, content_range, kind_of, total_without_range},
        https::HttpsClient,
        retry_after,
    },
};

/// How many redirects are followed.
const REDIRECTS: usize = 10;

/// The most bytes that the page of a directory may have.
const PAGE: usize = 16 << 20;

/// What a name has between the slashes of a URL.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// A directory at a URL that ends in a slash, or one file.
pub(super) struct HttpFiles {
    pub(super) address: Address,
    /// The file's name, if one is named.
    pub(super) only: Option<String>,
    pub(super) client: HttpsClient,
    pub(super) patience: Patience,
    /// Where credentials come from if the URL has none.
    pub(super) auth: Option<Auth>,
}

impl HttpFiles {
    /// The URL of a file; without a name, that of the directory.
    fn address_of(&self, item: &Item) -> Result<Address, RemoteError> {
        let suffix = match &self.only {
            // This file, or the one beside it with its checksum.
            Some(name) => item.name.strip_prefix(&**name).unwrap_or(SIDECAR).to_owned(),
            None => utf8_percent_encode(&item.name, SEGMENT).to_string(),
        };
        if suffix.is_empty() {
            return Ok(self.address.clone());
        }
        let with_suffix = self.address.with_suffix(&suffix);
        with_suffix.map_err(|reason| RemoteError::config(self.address.to_string(), reason))
    }

    async fn headers(&self) -> Result<Vec<Header>, RemoteError> {
        match &self.auth {
            Some(auth) => Ok(auth.headers("").await?.0),
            None => Ok(Vec::new()),
        }
    }

    /// Asks, and follows redirects. Credentials go to no other server than the URL's own.
    async fn request(
        &self,
        first: Address,
        range: Option<(u64, Option<&str>)>,
    ) -> Result<Response<Incoming>, RemoteError> {
        let mut address = first.clone();
        for _ in 0..=REDIRECTS {
            let mut headers = vec![(ACCEPT_ENCODING, "identity".to_owned())];
            if let Some((offset, version)) = range {
                headers.push((RANGE, format!("bytes={offset}-")));
                if let Some(etag) = version.filter(|version| is_strong(version)) {
                    headers.push((IF_RANGE, etag.to_owned()));
                }
            }
            if let Some(login) = address.login() {
                headers.push((AUTHORIZATION, login.value().to_owned()));
            } else if address.is_same_server(&first) {
                for header in self.headers().await? {
                    if let Ok(name) = HeaderName::from_bytes(header.name().as_bytes()) {
                        headers.push((name, header.value().to_owned()));
                    }
                }
            }
            let response = self.ask(&address, headers).await?;
            let location = response.headers().get(LOCATION);
            let Some(location) = location.filter(|_| is_redirect(response.status())) else {
                return Ok(response);
            };
            let rejected = |reason: Error| RemoteError::rejected(address.to_string(), reason);
            // Some servers send names as they are.
            let location = String::from_utf8_lossy(location.as_bytes());
            address = address.follow(&location).map_err(rejected)?;
        }
        let message = format!("redirects more than {REDIRECTS} times");
        Err(RemoteError::rejected(first.to_string(), message))
    }

    async fn ask(
        &self,
        address: &Address,
        headers: Vec<(HeaderName, String)>,
    ) -> Result<Response<Incoming>, RemoteError> {
        let error = |kind, message: String| RemoteError::new(kind, address.to_string(), message);
        let mut request = Request::get(address.uri().clone())
            .header(USER_AGENT, concat!("outhaul/", env!("CARGO_PKG_VERSION")));
        for (name, value) in headers {
            // A value that cannot be sent is not repeated.
            let mut value = HeaderValue::from_str(&value).map_err(|_| {
                error(
                    RemoteErrorKind::Config,
                    format!("the header {name} cannot be sent"),
                )
            })?;
            value.set_sensitive(name != RANGE && name != IF_RANGE);
            request = request.header(name, value);
        }
        let request = request
            .body(Full::new(Bytes::new()))
            .map_err(|e| error(RemoteErrorKind::Config, e.to_string()))?;
        // The client's errors do not name URLs.
        let response = self.client.request(request).await;
        response.map_err(|e| error(RemoteErrorKind::Unavailable, with_causes(&e)))
    }
}

#[async_trait]
impl Ranged for HttpFiles {
    async fn open(&self, item: &Item, offset: u64, version: Option<&str>) -> Result<Opened, RemoteError> {
        let address = self.address_of(item)?;
        let context = address.to_string();
        let range = (offset > 0).then_some((offset, version));
        let response = self.request(address, range).await?;
        let (head, body) = response.into_parts();
        let (begin, size) = placed(head.status, &head.headers, offset)
            .map_err(|refused| refused.error(&context, head.status, &head.headers))?;
        let coding = head.headers.get(CONTENT_ENCODING).map(HeaderValue::as_bytes);
        if let Some(coding) = coding.filter(|coding| !is_its_own(&item.name, coding)) {
            let coding = String::from_utf8_lossy(coding).into_owned();
            let message = format!("the server sent Content-Encoding {coding}, although none was asked for");
            return Err(RemoteError::protocol(context, message));
        }
        let version = [ETAG, LAST_MODIFIED]
            .iter()
            .find_map(|name| head.headers.get(name));
        let version = version.and_then(|value| value.to_str().ok()).map(str::to_owned);
        let at_end = head.status == StatusCode::RANGE_NOT_SATISFIABLE;
        let bytes = if at_end {
            stream::empty().boxed()
        } else {
            body.into_data_stream()
                .map(move |piece| {
                    piece.map_err(|e| RemoteError::unavailable(context.clone(), with_causes(&e)))
                })
                .boxed()
        };
        Ok(Opened {
            begin,
            size,
            version: version.or_else(|| at_end.then(|| version_given(range))?),
            bytes,
        })
    }

    fn address(&self, item: &Item) -> String {
        self.address_of(item)
            .map_or_else(|_| self.address.to_string(), |address| address.to_string())
    }
}

/// An answer without a file has no version of it, either.
fn version_given(range: Option<(u64, Option<&str>)>) -> Option<String> {
    range.and_then(|(_, version)| version.map(str::to_owned))
}

#[async_trait]
impl Collection for HttpFiles {
    async fn list(&self) -> Result<Listing, RemoteError> {
        if let Some(name) = &self.only {
            return Ok(Listing::of_one(name));
        }
        let mut page = Text::of_at_most(PAGE);
        let read = self.read(&Item::named(String::new()), &mut page).await;
        read.map_err(unlisted)?;
        let files = files(&page.text(), &self.address).ok_or_else(|| {
            let message = "the server shows no list of files for it".to_owned();
            unlisted(RemoteError::rejected(self.describe(), message))
        });
        Ok(Listing::whole(files?))
    }

    fn own_name(&self) -> Option<String> {
        let of_url = self.address.file_name().ok();
        of_url.filter(|name| self.only.is_some() && !name.is_empty())
    }

    async fn read(&self, item: &Item, sink: &mut dyn Sink) -> Result<(), RemoteError> {
        resume::read(self, item, &self.patience, sink).await
    }

    fn describe(&self) -> String {
        self.address.to_string()
    }
}

/// Why a directory cannot be listed, and what to do.
fn unlisted(mut error: RemoteError) -> RemoteError {
    use RemoteErrorKind::{Denied, NotFound, Rejected};
    if matches!(error.kind, Denied | NotFound | Rejected) {
        error.message += "; a directory is listed by the page that the server shows for it (nginx: autoindex on): without \
                          one, name each file";
    }
    error
}

/// Whether an entity tag promises the same bytes (RFC 9110, 8.8.1).
fn is_strong(etag: &str) -> bool {
    etag.starts_with('"')
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Whether all content codings are the file's own, or change nothing: some servers say of `x.tar.gz` that it is a `x.tar`
/// that is coded so, and repeat what is no coding of the bytes, such as S3's `aws-chunked` or `utf-8`, from an upload.
fn is_its_own(name: &str, codings: &[u8]) -> bool {
    let name = name.to_ascii_lowercase();
    let ends = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    let codings = codings.to_ascii_lowercase();
    codings
        .split(|byte| *byte == b',')
        .all(|coding| match coding.trim_ascii() {
            b"gzip" | b"x-gzip" => ends(&[".gz", ".tgz"]),
            b"zstd" => ends(&[".zst", ".tzst"]),
            b"xz" | b"x-xz" => ends(&[".xz", ".txz"]),
            b"br" | b"deflate" | b"compress" | b"x-compress" | b"bzip2" | b"x-bzip2" | b"dcb" | b"dcz" => {
                false
            }
            _ => true,
        })
}

/// Why an answer brings no bytes.
#[derive(Debug, PartialEq, Eq)]
enum Refused {
    /// By its status.
    Status,
    /// A range that was not asked for, or none where there must be one.
    Range,
    /// The end of the body cannot be distinguished from a broken connection.
    Endless,
}

impl Refused {
    fn error(self, context: &str, status: StatusCode, headers: &HeaderMap) -> RemoteError {
        let error = |kind, message: String| RemoteError::new(kind, context, message);
        match self {
            Self::Range => error(
                RemoteErrorKind::Protocol,
                "the server sent another range than was asked for".to_owned(),
            ),
            Self::Endless => error(
                RemoteErrorKind::Protocol,
                "the server does not say where the file ends (neither Content-Length nor chunked)".to_owned(),
            ),
            Self::Status => RemoteError {
                retry_after: retry_after(headers, SystemTime::now()),
                ..error(kind_of(status), format!("the server answered {status}"))
            },
        }
    }
}

/// Where an answer's bytes begin in the file, and how many the whole file has, as far as the answer says.
fn placed(status: StatusCode, headers: &HeaderMap, offset: u64) -> Result<(u64, Option<u64>), Refused> {
    let number = |name| headers.get(name)?.to_str().ok()?.parse::<u64>().ok();
    let length = number(CONTENT_LENGTH);
    match status {
        StatusCode::OK => {
            if length.is_none() && !is_chunked(headers) {
                return Err(Refused::Endless);
            }
            Ok((0, length))
        }
        StatusCode::PARTIAL_CONTENT => {
            let ContentRange { first, last, total } = content_range(headers).ok_or(Refused::Range)?;
            let is_rest = total.is_none_or(|total| last.checked_add(1) == Some(total));
            let is_length = length.is_none_or(|length| last.checked_sub(first) == length.checked_sub(1));
            if first != offset || offset == 0 || !is_rest || !is_length {
                return Err(Refused::Range);
            }
            Ok((first, total))
        }
        StatusCode::RANGE_NOT_SATISFIABLE if offset > 0 => {
            let size = total_without_range(headers);
            // The connection broke after the last byte, and nobody had said that it was the last.
            if size == Some(offset) {
                Ok((offset, size))
            } else {
                Err(Refused::Range)
            }
        }
        _ => Err(Refused::Status),
    }
}

/// Whether chunks show where the body ends. Other codings end with the connection.
fn is_chunked(headers: &HeaderMap) -> bool {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let is_chunked = |coding: &HeaderValue| coding.as_bytes().eq_ignore_ascii_case(b"chunked");
    codings.next().is_some_and(is_chunked) && codings.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&str, &str)| (name.parse().unwrap(), value.parse().unwrap());
        pairs
            .iter()
            .map(pair)
            .collect::<Vec<(HeaderName, HeaderValue)>>()
            .into_iter()
            .collect()
    }

    #[test]
    fn a_range_is_the_one_that_was_asked_for() {
        for (status, pairs, offset, expected) in [
            (200, &[("content-length", "9")][..], 0, Ok((0, Some(9)))),
            (200, &[("content-length", "9")], 5, Ok((0, Some(9)))),
            (200, &[("transfer-encoding", "chunked")], 0, Ok((0, None))),
            (200, &[("transfer-encoding", "gzip")], 0, Err(Refused::Endless)),
            (200, &[], 0, Err(Refused::Endless)),
            (
                206,
                &[("content-range", "bytes 5-8/9"), ("content-length", "4")],
                5,
                Ok((5, Some(9))),
            ),
            (206, &[("content-range", "bytes 5-8/*")], 5, Ok((5, None))),
            (206, &[("content-range", "bytes 4-8/9")], 5, Err(Refused::Range)),
            (206, &[("content-range", "bytes 5-7/9")], 5, Err(Refused::Range)),
            (
                206,
                &[("content-range", "bytes 5-8/9"), ("content-length", "9")],
                5,
                Err(Refused::Range),
            ),
            (206, &[("content-range", "bytes 0-8/9")], 0, Err(Refused::Range)),
            (206, &[("content-range", "lines 5-8/9")], 5, Err(Refused::Range)),
            (206, &[], 5, Err(Refused::Range)),
            (416, &[("content-range", "bytes */9")], 9, Ok((9, Some(9)))),
            (416, &[("content-range", "bytes */8")], 9, Err(Refused::Range)),
            (416, &[], 9, Err(Refused::Range)),
            (404, &[], 0, Err(Refused::Status)),
            (204, &[], 0, Err(Refused::Status)),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(
                placed(status, &headers(pairs), offset),
                expected,
                "{status} {pairs:?} {offset}"
            );
        }
    }

    #[test]
    fn a_status_says_whether_another_try_helps() {
        for (status, kind) in [
            (404, RemoteErrorKind::NotFound),
            (401, RemoteErrorKind::Unauthenticated),
            (403, RemoteErrorKind::Denied),
            (429, RemoteErrorKind::Unavailable),
            (503, RemoteErrorKind::Unavailable),
            (400, RemoteErrorKind::Rejected),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            let error = Refused::Status.error("x", status, &headers(&[("retry-after", "7")]));
            assert_eq!((error.kind, error.retry_after.unwrap().as_secs()), (kind, 7));
        }
    }

    #[test]
    fn a_files_own_coding_is_no_coding() {
        for (name, coding, own) in [
            ("a.tar.gz", "gzip", true),
            ("a.TGZ", "GZIP", true),
            ("a.tar.zst", "gzip", false),
            ("a.tar.zst", "zstd", true),
            ("a.tar", "br", false),
            ("a.tar", "identity", true),
            ("a.tar", "", true),
            ("a.tar", "aws-chunked", true),
            ("a.tar", "UTF-8", true),
            ("a.tar", "aws-chunked, gzip", false),
            ("a.tar.gz", "gzip,aws-chunked", true),
        ] {
            assert_eq!(is_its_own(name, coding.as_bytes()), own, "{name} {coding}");
        }
    }
}
