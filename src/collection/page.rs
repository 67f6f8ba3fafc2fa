//! The page that an HTTP server shows of a directory: which files are in it.
//!
//! HTML pages are those of nginx, Apache, lighttpd, Python and the like: each file is a link. nginx (`autoindex_format json`)
//! and Caddy also have lists in JSON.

use std::collections::BTreeMap;

use percent_encoding::percent_decode_str;
use serde::Deserialize;

use super::{Item, address::Address, is_file_name};

/// An entry of a list in JSON.
#[derive(Deserialize)]
struct Entry {
    name: String,
    /// nginx: `file`, `directory` or `other`.
    #[serde(default, rename = "type")]
    kind: Option<String>,
    /// Caddy.
    #[serde(default)]
    is_dir: bool,
    #[serde(default)]
    size: Option<u64>,
}

/// The files right in a directory, in the order of their names; `None` if the text is neither a page nor a list.
pub(super) fn files(text: &str, directory: &Address) -> Option<Vec<Item>> {
    let mut files = BTreeMap::new();
    let mut add = |name: String, size| {
        if is_file_name(&name) {
            files.entry(name).or_insert(size);
        }
    };
    let start = text.trim_start_matches('\u{feff}').trim_start();
    if start.starts_with('[') {
        for entry in serde_json::from_str::<Vec<Entry>>(start).ok()? {
            if !entry.is_dir && entry.kind.is_none_or(|kind| kind == "file") {
                add(entry.name, entry.size);
            }
        }
    } else if start.starts_with('<') {
        for link in links(start) {
            if let Some(name) = name_of(&link, directory) {
                add(name, None);
            }
        }
    } else {
        return None;
    }
    let item = |(name, size)| Item {
        size,
        ..Item::named(name)
    };
    Some(files.into_iter().map(item).collect())
}

/// The name of the file that a link leads to, if that is right in the directory. Links with a query sort the page.
fn name_of(link: &str, directory: &Address) -> Option<String> {
    let link = link.split('#').next().unwrap_or(link).trim();
    let has_scheme = |link: &str| link.split('/').next().is_some_and(|first| first.contains(':'));
    if link.is_empty() || link.contains('?') || (has_scheme(link) && !link.contains("://")) {
        return None;
    }
    let target = directory.follow(link).ok()?;
    // Written the same way.
    let base = directory.follow(".").ok()?;
    let name = target.uri().path().strip_prefix(base.uri().path())?;
    if !target.is_same_server(directory) {
        return None;
    }
    percent_decode_str(name).decode_utf8().ok().map(Into::into)
}

/// The targets of a page's links, as they are written in `<a … href=…>`.
fn links(html: &str) -> impl Iterator<Item = String> {
    html.split('<').filter_map(|tag| {
        let rest = tag.strip_prefix(['a', 'A'])?;
        if !rest.starts_with(|c: char| c.is_ascii_whitespace()) {
            return None;
        }
        href(rest).map(unescaped)
    })
}

/// The value of the attribute `href` among those of a tag.
fn href(attributes: &str) -> Option<&str> {
    let mut rest = attributes;
    loop {
        rest = rest.trim_start();
        let end = rest.find(|c: char| c == '=' || c == '>' || c.is_ascii_whitespace())?;
        let (name, after) = rest.split_at(end);
        let after = after.trim_start();
        let Some(value) = after.strip_prefix('=') else {
            if after.starts_with('>') {
                return None;
            }
            rest = after;
            continue;
        };
        let value = value.trim_start();
        let (value, after) = match value.chars().next()? {
            quote @ ('"' | '\'') => value.strip_prefix(quote)?.split_once(quote)?,
            _ => value.split_at(value.find(|c: char| c == '>' || c.is_ascii_whitespace())?),
        };
        if name.eq_ignore_ascii_case("href") {
            return Some(value);
        }
        rest = after;
    }
}

/// The character that a reference names.
fn character(name: &str) -> Option<char> {
    let Some(number) = name.strip_prefix('#') else {
        return match name {
            "amp" => Some('&'),
            "lt" => Some('<'),
            "gt" => Some('>'),
            "quot" => Some('"'),
            "apos" => Some('\''),
            _ => None,
        };
    };
    let number = match number.strip_prefix(['x', 'X']) {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => number.parse(),
    };
    char::from_u32(number.ok()?)
}

/// A text without the references that servers write for characters of HTML's own.
fn unescaped(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('&') {
        plain.push_str(before);
        let reference = after.split_once(';');
        let reference = reference.and_then(|(name, after)| Some((character(name)?, after)));
        let (c, after) = reference.unwrap_or(('&', after));
        plain.push(c);
        rest = after;
    }
    plain.push_str(rest);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Option<Vec<String>> {
        let directory = Address::parse("https://me:pw@h/a%20b/c/?sig=s").unwrap();
        let items = files(text, &directory)?;
        Some(items.into_iter().map(|item| item.name).collect())
    }

    #[test]
    fn the_pages_of_servers_name_the_files_right_in_the_directory() {
        let nginx = "<html>\r\n<head><title>Index of /a b/c/</title></head>\r\n<body>\r\n<h1>Index of</h1><hr><pre>\
             <a href=\"../\">../</a>\r\n<a href=\"deep/\">deep/</a>  01-Jan-2026 00:00  -\r\n\
             <a href=\"a_very_long_name_that_is_cut_where_it_is_shown_x.tar.zst\">a_very_long_name_that_is_c..&gt;</a>\r\n\
             <a href=\"gfx942%3Axnack%2B.tar\">gfx942:xnack+.tar</a>\r\n</pre></body></html>";
        let python = "<!DOCTYPE HTML>\n<ul>\n<li><a href=\"a%26b%20c.tar\">a&amp;b c.tar</a></li>\n\
             <li><a href=\"link.tar\">link.tar@</a></li>\n<li><a href=\"%C3%A4.zip\">ä.zip</a></li>\n</ul>";
        let apache = "<!DOCTYPE HTML PUBLIC \"-//W3C//DTD HTML 3.2 Final//EN\">\n<table>\n\
             <tr><th><a href=\"?C=N;O=D\">Name</a></th></tr>\n<tr><td><a href=\"/a%20b/\">Parent Directory</a></td></tr>\n\
             <tr><td><img src=\"/icons/x.gif\" alt=\"[   ]\"></td><td><a href=\"./x:y.tar\">x:y.tar</a></td></tr>\n\
             <tr><td><A class=f HREF='a&amp;b.tgz'>a&amp;b.tgz</A></td></tr></table>";
        let absolute = "<a download href = /a%20b/c/one.tar>one</a><a href=\"https://H:443/a%20b/c/two.tar#x\">two</a>\
             <a href=\"/a%20b/c/deep/three.tar\">3</a><a href=\"//h/a%20b/c/four.tar\">4</a>";
        for (page, expected) in [
            (
                nginx,
                &[
                    "a_very_long_name_that_is_cut_where_it_is_shown_x.tar.zst",
                    "gfx942:xnack+.tar",
                ][..],
            ),
            (python, &["a&b c.tar", "link.tar", "ä.zip"]),
            (apache, &["a&b.tgz", "x:y.tar"]),
            (absolute, &["four.tar", "one.tar", "two.tar"]),
            ("<html></html>", &[]),
            ("[]", &[]),
        ] {
            assert_eq!(names(page).unwrap(), expected, "{page}");
        }
        let json = "[\n{ \"name\":\"b.tar\", \"type\":\"file\", \"mtime\":\"x\", \"size\":7 },\n\
             { \"name\":\"d.tar\", \"type\":\"directory\" },\n{\"name\":\"a.tar\",\"size\":1,\"is_dir\":false},\n\
             {\"name\":\"e/\",\"is_dir\":true}, {\"name\":\"../x\"}]";
        let directory = Address::parse("https://h/").unwrap();
        let items = files(json, &directory).unwrap();
        let items: Vec<_> = items.iter().map(|item| (&*item.name, item.size)).collect();
        assert_eq!(items, [("a.tar", Some(1)), ("b.tar", Some(7))]);
        for text in ["", "{}", "{\"name\":\"a\"}", "[1]", "a.tar\nb.tar"] {
            assert_eq!(names(text), None, "{text}");
        }
    }

    #[test]
    fn a_directory_may_be_written_in_any_way_that_servers_take() {
        for url in [
            "https://h/Größe/",
            "https://h/{a}/",
            "https://h/a/./",
            "https://h/x/../a/",
        ] {
            let directory = Address::parse(url).unwrap();
            let items = files("<a href=\"x.tar\">x</a><a href=\"../y.tar\">y</a>", &directory).unwrap();
            let names: Vec<_> = items.into_iter().map(|item| item.name).collect();
            assert_eq!(names, ["x.tar"], "{url}");
        }
    }

    #[test]
    fn nothing_elsewhere_is_a_file_of_the_directory() {
        for link in [
            "https://other/a%20b/c/x.tar",
            "http://h/a%20b/c/x.tar",
            "https://h:444/a%20b/c/x.tar",
            "//other/a%20b/c/x.tar",
            "/x.tar",
            "../x.tar",
            "..%2Fx.tar",
            "..",
            ".",
            "",
            "#x.tar",
            "?x.tar",
            "x.tar?y",
            "mailto:me@h",
            "javascript:x",
            "deep/x.tar",
            ".outhaul",
            "%FF.tar",
            "a%00.tar",
        ] {
            let page = format!("<a href=\"{link}\">x</a>");
            assert_eq!(names(&page).unwrap(), Vec::<String>::new(), "{link}");
        }
        // Text that is not a page must not panic either.
        for text in [
            "<a",
            "<a ",
            "<a href",
            "<a href=",
            "<a href=\"",
            "<a =>",
            "<a x=y href='",
            "<a href=&#xD800;>",
        ] {
            let _ = names(text);
        }
    }
}
