//! Takes what we have sent as credentials out of what a server says: some answer "invalid token …" and quote it, and a
//! server's words end in logs, in the record and in notifications.

use base64::Engine as _;

/// Shorter ones are no secrets (`x-region=eu`), and would be found in any text.
const SHORTEST: usize = 6;
/// What stands in their place.
const CONCEALED: &str = "<concealed>";

/// Texts that are not to be shown, longest first.
#[derive(Default, Clone)]
pub(crate) struct Secrets(Vec<String>);

impl Secrets {
    /// Of the values of headers: whole, and each word; of Basic credentials, also the password in them.
    pub(crate) fn of<'a>(values: impl Iterator<Item = &'a str>) -> Self {
        let mut secrets = Vec::new();
        for value in values {
            let mut add = |text: &str| {
                if text.len() >= SHORTEST && !text.eq_ignore_ascii_case("bearer") {
                    secrets.push(text.to_owned());
                }
            };
            add(value.trim());
            for word in value.split([' ', ',', '\t']) {
                add(word);
            }
            if let Some((scheme, encoded)) = value.trim().split_once(' ')
                && scheme.eq_ignore_ascii_case("basic")
                && let Ok(plain) = base64::engine::general_purpose::STANDARD.decode(encoded.trim())
                && let Ok(plain) = String::from_utf8(plain)
            {
                add(&plain);
                add(plain.split_once(':').map_or("", |(_, password)| password));
            }
        }
        secrets.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
        secrets.dedup();
        Self(secrets)
    }

    /// A text without them.
    pub(crate) fn conceal(&self, mut text: String) -> String {
        for secret in &self.0 {
            if text.contains(secret) {
                text = text.replace(secret, CONCEALED);
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sent_is_not_shown_whole_or_in_part() {
        let basic = base64::engine::general_purpose::STANDARD.encode("me:pass-word");
        let values = [
            "Bearer abc123def",
            "key-1,key-two-two",
            "eu",
            &format!("Basic {basic}"),
        ];
        let secrets = Secrets::of(values.into_iter());
        for (said, shown) in [
            ("invalid token abc123def!", "invalid token <concealed>!"),
            ("authorization: Bearer abc123def", "authorization: <concealed>"),
            ("no such key: key-two-two", "no such key: <concealed>"),
            ("wrong password pass-word", "wrong password <concealed>"),
            (&*format!("what is {basic}?"), "what is <concealed>?"),
            ("try it in eu, Bearer", "try it in eu, Bearer"),
        ] {
            assert_eq!(secrets.conceal(said.to_owned()), shown);
        }
    }
}
