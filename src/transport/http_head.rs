//! What the head of an HTTP answer says, for all clients alike (RFC 9110).

use http::{HeaderMap, StatusCode, header};

use super::RemoteErrorKind;

/// What a status means that brings nothing of what was asked for. [`RemoteErrorKind::Unavailable`] is tried again.
pub(crate) fn kind_of(status: StatusCode) -> RemoteErrorKind {
    match status.as_u16() {
        204 | 404 | 410 => RemoteErrorKind::NotFound,
        401 => RemoteErrorKind::Unauthenticated,
        403 => RemoteErrorKind::Denied,
        _ if is_passing(status) => RemoteErrorKind::Unavailable,
        _ => RemoteErrorKind::Rejected,
    }
}

/// Whether the same request may be answered better a little later.
pub(crate) fn is_passing(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 425 | 429 | 500..=599)
}

/// The bytes that an answer brings of something, by its `Content-Range`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ContentRange {
    /// The number of the first byte.
    pub(crate) first: u64,
    /// The number of the last one, which is not before the first.
    pub(crate) last: u64,
    /// How many bytes there are in all, more than the last one's number; `None` if the server does not know.
    pub(crate) total: Option<u64>,
}

/// A head's `Content-Range: bytes FIRST-LAST/TOTAL` (RFC 9110, 14.4). Anything that is not exactly that is `None`, and so
/// are ranges that cannot be, and two headers.
pub(crate) fn content_range(headers: &HeaderMap) -> Option<ContentRange> {
    let mut values = headers.get_all(header::CONTENT_RANGE).iter();
    let text = values.next()?.to_str().ok()?;
    if values.next().is_some() {
        return None;
    }
    let (unit, range) = text.split_once(' ')?;
    let (range, total) = range.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let range = ContentRange {
        first: number(first)?,
        last: number(last)?,
        total: match total {
            "*" => None,
            total => Some(number(total)?),
        },
    };
    let can_be = range.first <= range.last && range.total.is_none_or(|total| range.last < total);
    (unit.eq_ignore_ascii_case("bytes") && can_be).then_some(range)
}

/// How many bytes there are, by the `Content-Range: bytes */TOTAL` of an answer that brings none of them (status 416).
pub(crate) fn total_without_range(headers: &HeaderMap) -> Option<u64> {
    let text = headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
    number(text.strip_prefix("bytes */")?)
}

/// Digits alone: the standard library's parser takes a sign as well.
fn number(text: &str) -> Option<u64> {
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(values: &[&'static str]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for value in values {
            map.append(header::CONTENT_RANGE, value.parse().unwrap());
        }
        map
    }

    #[test]
    fn only_exact_ranges_are_read() {
        let range = |first, last, total| Some(ContentRange { first, last, total });
        for (text, expected) in [
            ("bytes 5-9/10", range(5, 9, Some(10))),
            ("Bytes 5-5/*", range(5, 5, None)),
            ("bytes */10", None),
            ("bytes 5/10", None),
            ("items 5-9/10", None),
            ("bytes=5-9/10", None),
            ("bytes  5-9/10", None),
            ("bytes 5 - 9/10", None),
            ("bytes +5-9/10", None),
            ("bytes -9/10", None),
            ("bytes 9-5/10", None),
            ("bytes 5-10/10", None),
            ("bytes 5-9/", None),
            ("bytes 5-9/ten", None),
            ("bytes 5-9/99999999999999999999", None),
        ] {
            assert_eq!(content_range(&head(&[text])), expected, "{text}");
        }
        assert_eq!(content_range(&head(&["bytes 5-9/10", "bytes 0-9/10"])), None);
        assert_eq!(content_range(&HeaderMap::new()), None);
        assert_eq!(total_without_range(&head(&["bytes */10"])), Some(10));
        assert_eq!(total_without_range(&head(&["bytes 0-1/10"])), None);
    }

    #[test]
    fn what_may_pass_is_tried_again() {
        for (status, expected) in [
            (204, RemoteErrorKind::NotFound),
            (302, RemoteErrorKind::Rejected),
            (400, RemoteErrorKind::Rejected),
            (401, RemoteErrorKind::Unauthenticated),
            (403, RemoteErrorKind::Denied),
            (404, RemoteErrorKind::NotFound),
            (408, RemoteErrorKind::Unavailable),
            (429, RemoteErrorKind::Unavailable),
            (500, RemoteErrorKind::Unavailable),
            (599, RemoteErrorKind::Unavailable),
            (600, RemoteErrorKind::Rejected),
        ] {
            assert_eq!(
                kind_of(StatusCode::from_u16(status).unwrap()),
                expected,
                "{status}"
            );
        }
    }
}
