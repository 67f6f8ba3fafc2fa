//! What a `.netrc` says of a host, as curl and Bazel read it.

use std::path::PathBuf;

/// Login and password for a host in the user's own file: `$NETRC`, or `~/.netrc`.
pub(crate) fn of_user(host: &str) -> Option<(String, String)> {
    let file = match std::env::var_os("NETRC") {
        Some(file) => PathBuf::from(file),
        None => std::env::home_dir()?.join(".netrc"),
    };
    login(&std::fs::read_to_string(file).ok()?, host)
}

/// Login and password for a host: of the `machine` that is named so, else of `default`.
fn login(text: &str, host: &str) -> Option<(String, String)> {
    let mut words = text
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .flat_map(str::split_whitespace);
    // Of what is being read: whether it is about the host, login, password.
    let mut fits = false;
    let (mut login, mut password) = (None, None);
    while let Some(word) = words.next() {
        match word {
            "machine" | "default" => {
                if fits && password.is_some() {
                    break;
                }
                (login, password) = (None, None);
                fits = word == "default" || words.next().is_some_and(|name| name.eq_ignore_ascii_case(host));
            }
            "login" => login = words.next(),
            "password" => password = words.next(),
            "account" => {
                words.next();
            }
            // A macro goes on to an empty line; nothing of it is a login.
            "macdef" => break,
            _ => {}
        }
    }
    fits.then_some((login.unwrap_or_default().to_owned(), password?.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_goes_before_the_default_and_others_are_passed_over() {
        let text = "# machine cache.example login no password no\nmachine other.example login a password b\n\
                    machine Cache.Example\n  login me\n  account x password secret\ndefault login any password thing\n";
        let of = |host| login(text, host);
        let pair = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(of("cache.example"), pair("me", "secret"));
        assert_eq!(of("other.example"), pair("a", "b"));
        assert_eq!(of("else.example"), pair("any", "thing"));
        assert_eq!(login("machine a login x", "a"), None);
        assert_eq!(
            login("machine a password x\nmacdef init\nmachine b password y", "b"),
            None
        );
        assert_eq!(login("", "a"), None);
    }
}
