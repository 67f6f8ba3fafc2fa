//! URLs as they may be shown.

/// What is shown of a URL in which it is unclear where a password ends.
pub(crate) const HIDDEN: &str = "://***";

/// A URL as markers remember it, and as messages show it: without a user name, a password or a query, which may be a
/// signature. The same URL gives the same text. Of one that may have a password with a `/`, `?` or `#` in it, only the
/// scheme is left.
pub(crate) fn without_secrets(url: &str) -> String {
    let cut = |text: &str| text.split(['?', '#']).next().unwrap_or(text).to_owned();
    if !url.contains("://") {
        return cut(url.rsplit('@').next().unwrap_or(url));
    }
    let place = cut(url);
    let Some((scheme, rest)) = place.split_once("://") else {
        return String::new();
    };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = authority.rsplit('@').next().unwrap_or(authority);
    // A colon comes before a port, or is part of an address in brackets; buckets have neither.
    let is_port = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let is_address = host.starts_with('[') && host.ends_with(']');
    let is_odd = match host.rsplit_once(':') {
        Some((_, port)) => !is_address && (!is_port(port) || is_bucket(scheme)),
        None => false,
    };
    if is_odd {
        return format!("{scheme}{HIDDEN}");
    }
    format!("{scheme}://{host}{path}")
}

fn is_bucket(scheme: &str) -> bool {
    matches!(&*scheme.to_ascii_lowercase(), "s3" | "gs" | "az")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_of_a_url_are_not_remembered() {
        for (url, expected) in [
            ("https://u:p@h:1/a/b.tar?sig=s#f", "https://h:1/a/b.tar"),
            ("https://h/a@b.tar", "https://h/a@b.tar"),
            ("x.tar=https://u:p@h/a", "x.tar=https://h/a"),
            ("s3://b/p/?endpoint=http://h", "s3://b/p/"),
            ("u:p@h/x", "h/x"),
            ("u:p?w@h/x", "h/x"),
            ("https:/u:p#w@h/x?sig=s", "h/x"),
            ("u:p?w://@h", ""),
            ("s3://AKIA:abc@bucket/p/", "s3://bucket/p/"),
            ("s3://AKIA:abc/def@bucket/p/", "s3://***"),
            ("s3://AKIA:123/def@bucket/p/", "s3://***"),
            ("https://u:p/w@h/a", "https://***"),
            ("https://u:p?w@h/a", "https://***"),
            ("https://u:p#w@h/a", "https://***"),
            ("https://u:/w@h/a", "https://***"),
            ("x.tar=https://u:p/w@h/a", "x.tar=https://***"),
            ("https://u:p@[::1]/a", "https://[::1]/a"),
            ("https://[::1]:8080/a", "https://[::1]:8080/a"),
        ] {
            assert_eq!(without_secrets(url), expected);
        }
    }
}
