//! What a `.netrc` says of a host, as curl and Bazel read it.

use std::path::PathBuf;

/// Login and password for a host in the user's own file: `$NETRC`, or `~/.netrc`.
pub(crate) fn of_user(host: &str) -> Option<(String, String)> {
    let file = match std::env::var_os("NETRC") {
        Some(file) => PathBuf::from(file),
        None => std::env::home_dir()?.join(".netrc"),
    };
    login(&text(std::fs::read(file).ok()?), host)
}

/// Bytes as text: what is not UTF-8 is ISO 8859-1, as which Bazel reads all of it.
fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|e| e.as_bytes().iter().copied().map(char::from).collect())
}

/// The words of the file, without comments and macros. A macro goes on to an empty line; nothing of it is a login.
fn words(text: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut in_macro = false;
    for line in text.lines() {
        if in_macro {
            in_macro = !line.trim().is_empty();
        } else if !line.trim_start().starts_with('#') {
            let before = line.split_whitespace().take_while(|word| *word != "macdef");
            let known = words.len();
            words.extend(before);
            in_macro = line.split_whitespace().nth(words.len() - known).is_some();
        }
    }
    words
}

/// Login and password for a host: of the last `machine` that is named so, else of `default`.
fn login(text: &str, host: &str) -> Option<(String, String)> {
    let mut words = words(text).into_iter();
    // The login and password of the host and of all others, and which of the two is being read.
    let (mut own, mut others) = (Entry::default(), Entry::default());
    let mut ignored = Entry::default();
    let mut now = &mut ignored;
    while let Some(word) = words.next() {
        match word {
            "machine" if words.next().is_some_and(|name| name.eq_ignore_ascii_case(host)) => {
                now = &mut own;
                *now = Entry::default();
            }
            "machine" => now = &mut ignored,
            "default" => now = &mut others,
            "login" => now.0 = words.next(),
            "password" => now.1 = words.next(),
            "account" => {
                words.next();
            }
            _ => {}
        }
    }
    let (login, password) = [own, others]
        .into_iter()
        .find(|(_, password)| password.is_some())?;
    Some((login.unwrap_or_default().to_owned(), password?.to_owned()))
}

/// What is known of a login and its password.
type Entry<'a> = (Option<&'a str>, Option<&'a str>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_goes_before_the_default_and_others_are_passed_over() {
        let netrc = "# machine cache.example login no password no\nmachine other.example login a password b\n\
                    machine Cache.Example\n  login me\n  account x password secret\ndefault login any password thing\n";
        let of = |host| login(netrc, host);
        let pair = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(of("cache.example"), pair("me", "secret"));
        assert_eq!(of("other.example"), pair("a", "b"));
        assert_eq!(of("else.example"), pair("any", "thing"));
        assert_eq!(login("machine a login x", "a"), None);
        for (text, expected) in [
            ("machine a password x\nmacdef init\nmachine b password y", None),
            (
                "macdef init\ncd /\nmachine b password no\n \nmachine b password y",
                pair("", "y"),
            ),
            ("machine b login c macdef init\nno\n\npassword y", pair("c", "y")),
            // As for Bazel, the last one counts.
            (
                "machine b password no\ndefault password no\nmachine b login c password y",
                pair("c", "y"),
            ),
            ("default password y\nmachine b login c", pair("", "y")),
        ] {
            assert_eq!(login(text, "b"), expected, "{text}");
        }
        assert_eq!(text(b"# Schl\xfcssel".to_vec()), "# Schl\u{fc}ssel");
        assert_eq!(text("# Schl\u{fc}ssel".into()), "# Schl\u{fc}ssel");
        assert_eq!(login("", "a"), None);
    }
}
