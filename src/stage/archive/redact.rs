//! What is secret in a build's events, taken out before they leave the machine.
//!
//! The messages are rewritten field by field on the wire, so that everything else stays byte for byte, fields that
//! Outhaul does not know included. Which fields hold command lines, environments and free text is a table below;
//! numbers are those of `build_event_stream.proto` (Bazel 2 to 9).

use std::{borrow::Cow, collections::BTreeSet, sync::LazyLock};

use prost::encoding::{decode_varint, encode_varint};
use regex::{Captures, Regex};

/// Stands where a secret was.
pub const REDACTED: &str = "<redacted>";

/// What is done with a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Treatment {
    /// It goes.
    Drop,
    /// Free text: options and addresses in it are looked for.
    Text,
    /// One argument of a command line; its value may be the next one.
    Argument,
    /// An `Option` of a structured command line.
    Option,
    /// Key and value.
    Entry,
    /// An environment variable: its value goes.
    Variable,
}

/// From `BuildEvent` down.
const FIELDS: &[(&[u64], Treatment)] = &[
    // The address of something fetched, in the event's own id and in those that it announces.
    (&[1, 17, 1], Treatment::Text),
    (&[2, 17, 1], Treatment::Text),
    // progress: standard output and error.
    (&[3, 1], Treatment::Text),
    (&[3, 2], Treatment::Text),
    // aborted: description.
    (&[4, 2], Treatment::Text),
    // started: all options once more, as one text.
    (&[5, 4], Treatment::Drop),
    // action: command line, and what went wrong.
    (&[7, 9], Treatment::Argument),
    (&[7, 11, 1], Treatment::Text),
    // completed, finished: what went wrong.
    (&[8, 9, 1], Treatment::Text),
    (&[14, 5, 1], Treatment::Text),
    // unstructured_command_line.
    (&[12, 1], Treatment::Argument),
    // options_parsed: startup and command options, all and explicit; the invocation policy.
    (&[13, 1], Treatment::Argument),
    (&[13, 2], Treatment::Argument),
    (&[13, 3], Treatment::Argument),
    (&[13, 4], Treatment::Argument),
    (&[13, 5], Treatment::Drop),
    // workspace_status.
    (&[16, 1], Treatment::Entry),
    // configuration: make variables, which --define sets.
    (&[17, 4], Treatment::Entry),
    // structured_command_line: chunks and options.
    (&[22, 2, 2, 1], Treatment::Argument),
    (&[22, 2, 3, 1], Treatment::Option),
    // build_metadata.
    (&[26, 1], Treatment::Entry),
    // exec_request: arguments and environment.
    (&[29, 2], Treatment::Argument),
    (&[29, 3], Treatment::Variable),
];

/// An event that is no protobuf message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// Events whose command lines say which variables are given to actions, tests and repository rules:
/// unstructured_command_line, options_parsed, structured_command_line.
const NAMING: [u64; 3] = [12, 13, 22];

/// What is known to be secret in a build, beyond what its name says.
#[derive(Debug, Default)]
pub(super) struct Secrets {
    /// Variables that options hand on. Their values turn up in command lines and messages, under any name.
    variables: BTreeSet<String>,
    /// An assignment to one of them.
    assignment: Option<Regex>,
}

impl Secrets {
    /// Reads all of a build's events for the variables that its options hand on. What is no message is passed over.
    pub(super) fn learn<'a>(events: impl Iterator<Item = Cow<'a, [u8]>>) -> Self {
        let naming: Vec<(&[u64], Treatment)> = FIELDS
            .iter()
            .filter(|(path, _)| NAMING.contains(&path[0]))
            .copied()
            .collect();
        let none = Self::default();
        let mut variables = BTreeSet::new();
        for event in events {
            let mut redactor = Redactor::new(&none);
            let _ = redactor.message(&event, &naming, 0);
            variables.append(&mut redactor.variables);
        }
        let any = variables
            .iter()
            .map(|name| regex::escape(name))
            .collect::<Vec<_>>();
        let assignment = if any.is_empty() {
            None
        } else {
            // Any number of names; what is too large for the engine cannot be looked for by name.
            Regex::new(&format!(r"(^|[^A-Za-z0-9_])({})={WORD}", any.join("|")))
                .inspect_err(|error| tracing::warn!("variables cannot be looked for in messages: {error}"))
                .ok()
        };
        Self {
            variables,
            assignment,
        }
    }

    /// An event without its secrets.
    pub(super) fn redact(&self, event: &[u8]) -> Result<Vec<u8>, Malformed> {
        Redactor::new(self).message(event, FIELDS, 0)
    }

    fn has(&self, name: &str) -> bool {
        is_secret_word(name) || self.variables.contains(name)
    }
}

/// How much of an option's value is secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Secret {
    Whole,
    /// What stands behind the name of a variable.
    Assigned,
}

/// Whether an option's value is secret, by its name.
fn secret(name: &str) -> Option<Secret> {
    let name = name
        .trim_start_matches('-')
        .to_ascii_lowercase()
        .replace('-', "_");
    if name.ends_with("header") || name.ends_with("headers") || is_secret_word(&name) {
        Some(Secret::Whole)
    } else if name.ends_with("_env") {
        Some(Secret::Assigned)
    } else {
        None
    }
}

fn is_secret_word(name: &str) -> bool {
    let name = name.to_ascii_lowercase().replace('-', "_");
    [
        "token",
        "password",
        "passwd",
        "secret",
        "api_key",
        "apikey",
        "private_key",
        "credential",
    ]
    .iter()
    .any(|word| name.contains(word))
}

struct Redactor<'a> {
    secrets: &'a Secrets,
    /// The argument before was an option whose value is the next one.
    pending: Option<Secret>,
    /// Variables that options have named.
    variables: BTreeSet<String>,
}

/// The bytes of a field, cut off the message.
struct Field<'a> {
    number: u64,
    /// Tag and all.
    whole: &'a [u8],
    /// Of a field with a length.
    content: Option<&'a [u8]>,
}

fn next<'a>(rest: &mut &'a [u8]) -> Result<Field<'a>, Malformed> {
    let start = *rest;
    let tag = decode_varint(rest).map_err(|_| Malformed)?;
    let mut content = None;
    let skip = match tag & 7 {
        0 => {
            decode_varint(rest).map_err(|_| Malformed)?;
            0
        }
        1 => 8,
        2 => {
            let length = decode_varint(rest).map_err(|_| Malformed)?;
            let length = usize::try_from(length).map_err(|_| Malformed)?;
            content = Some(rest.get(..length).ok_or(Malformed)?);
            length
        }
        5 => 4,
        _ => return Err(Malformed),
    };
    *rest = rest.get(skip..).ok_or(Malformed)?;
    Ok(Field {
        number: tag >> 3,
        whole: &start[..start.len() - rest.len()],
        content,
    })
}

fn put(number: u64, content: &[u8], out: &mut Vec<u8>) {
    encode_varint(number << 3 | 2, out);
    encode_varint(content.len() as u64, out);
    out.extend_from_slice(content);
}

/// The text of a message's field, the last one given.
fn text_of(message: &[u8], number: u64) -> Result<String, Malformed> {
    let (mut rest, mut text) = (message, String::new());
    while !rest.is_empty() {
        let field = next(&mut rest)?;
        if let Some(content) = field.content.filter(|_| field.number == number) {
            text = String::from_utf8_lossy(content).into_owned();
        }
    }
    Ok(text)
}

/// A message with some fields' texts changed.
fn with_texts(
    message: &[u8],
    mut change: impl FnMut(u64, &str) -> Option<String>,
) -> Result<Vec<u8>, Malformed> {
    let (mut rest, mut out) = (message, Vec::with_capacity(message.len()));
    while !rest.is_empty() {
        let field = next(&mut rest)?;
        let changed = field
            .content
            .and_then(|content| change(field.number, &String::from_utf8_lossy(content)));
        match changed {
            Some(text) => put(field.number, text.as_bytes(), &mut out),
            None => out.extend_from_slice(field.whole),
        }
    }
    Ok(out)
}

impl<'s> Redactor<'s> {
    const fn new(secrets: &'s Secrets) -> Self {
        Self {
            secrets,
            pending: None,
            variables: BTreeSet::new(),
        }
    }

    fn message(
        &mut self,
        message: &[u8],
        fields: &[(&[u64], Treatment)],
        depth: usize,
    ) -> Result<Vec<u8>, Malformed> {
        let (mut rest, mut out) = (message, Vec::with_capacity(message.len()));
        while !rest.is_empty() {
            let field = next(&mut rest)?;
            let below: Vec<(&[u64], Treatment)> = fields
                .iter()
                .filter(|(path, _)| path.get(depth) == Some(&field.number))
                .copied()
                .collect();
            let (Some(content), Some((path, treatment))) = (field.content, below.first()) else {
                out.extend_from_slice(field.whole);
                continue;
            };
            if path.len() > depth + 1 {
                let inner = self.message(content, &below, depth + 1)?;
                put(field.number, &inner, &mut out);
            } else if let Some(inner) = self.treat(*treatment, content)? {
                put(field.number, &inner, &mut out);
            }
        }
        Ok(out)
    }

    fn treat(&mut self, treatment: Treatment, content: &[u8]) -> Result<Option<Vec<u8>>, Malformed> {
        let lossy = String::from_utf8_lossy(content);
        Ok(match treatment {
            Treatment::Drop => None,
            Treatment::Text => Some(match self.secrets.text(&lossy) {
                // As it was, even if it is not UTF-8.
                Cow::Borrowed(_) => content.to_vec(),
                Cow::Owned(text) => text.into_bytes(),
            }),
            Treatment::Argument => Some(match self.argument(&lossy) {
                Some(text) => text.into_bytes(),
                None => content.to_vec(),
            }),
            Treatment::Option => {
                let name = text_of(content, 2)?;
                let is_secret = secret(&name);
                Some(with_texts(content, |number, text| match (number, is_secret) {
                    (1, Some(Secret::Whole)) => Some(format!("--{name}={REDACTED}")),
                    (1, _) => {
                        self.pending = None;
                        self.argument(text)
                    }
                    (3, _) => Some(self.value(text, is_secret)),
                    _ => None,
                })?)
            }
            Treatment::Entry => {
                let is_secret = self.secrets.has(&text_of(content, 1)?);
                Some(with_texts(content, |number, value| match (number, is_secret) {
                    (2, true) => Some(REDACTED.to_owned()),
                    (2, false) => Some(self.secrets.text(value).into_owned()),
                    _ => None,
                })?)
            }
            Treatment::Variable => Some(with_texts(content, |number, _| {
                (number == 2).then(|| REDACTED.to_owned())
            })?),
        })
    }

    /// An argument without its secret; `None` if it has none.
    fn argument(&mut self, argument: &str) -> Option<String> {
        let pending = self.pending.take();
        let Some(option) = argument.strip_prefix("--") else {
            let changed = self.value(argument, pending);
            return (changed != argument).then_some(changed);
        };
        // A value may stand behind a space in the same text, as a build tool may print it.
        let split = option.split_once('=').map(|(name, rest)| (name, '=', rest));
        let split = split.filter(|(name, ..)| !name.contains(' '));
        let split = split.or_else(|| option.split_once(' ').map(|(name, rest)| (name, ' ', rest)));
        let Some((name, between, rest)) = split else {
            self.pending = secret(option);
            return None;
        };
        let changed = self.value(rest, secret(name));
        (changed != rest).then(|| format!("--{name}{between}{changed}"))
    }
    /// A value without what is secret in it.
    fn value(&mut self, value: &str, is_secret: Option<Secret>) -> String {
        match (is_secret, value.split_once('=')) {
            (Some(Secret::Whole), _) => REDACTED.to_owned(),
            (Some(Secret::Assigned), Some((name, _))) => {
                self.handed_on(name);
                format!("{name}={REDACTED}")
            }
            // Only named: the value is the environment's.
            (Some(Secret::Assigned), None) => {
                self.handed_on(value);
                value.to_owned()
            }
            (None, Some((name, _))) if self.secrets.has(name) && !name.contains(char::is_whitespace) => {
                format!("{name}={REDACTED}")
            }
            (None, _) => self.secrets.text(value).into_owned(),
        }
    }

    fn handed_on(&mut self, name: &str) {
        if !name.is_empty() {
            self.variables.insert(name.to_owned());
        }
    }
}

/// One word as a shell reads it, which may hold spaces and line ends in quotes; or up to the next space. A quote within
/// single quotes is written `'\''`.
const WORD: &str = r#"(?:'[^']*'(?:\\''[^']*')*|"(?:[^"\\]|\\[\s\S])*"|\\"[^"\n]*"|['"]\S*|[^\s'"]+)"#;
/// Options in a running text; a value in quotes may have spaces.
static OPTION: LazyLock<Option<Regex>> = LazyLock::new(|| {
    let quoted = r#"'[^'\n]*'|"[^"\n]*""#;
    Regex::new(&format!(
        r#"--([A-Za-z0-9_@/:.-]+)([= ])({quoted}|[^\s'"]*=(?:{quoted})|[^\s'"]+)"#
    ))
    .ok()
});
/// A variable, or whatever else has a value, whose name says that it is secret.
static ASSIGNMENT: LazyLock<Option<Regex>> = LazyLock::new(|| {
    let words = "token|password|passwd|secret|api[_-]?key|private[_-]?key|credential";
    Regex::new(&format!(r"(?i)\b([A-Z0-9_]*(?:{words})[A-Z0-9_]*)={WORD}")).ok()
});
/// User name and password of an address. A password may hold an `@`.
static USER_INFO: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r#"://[^\s/'"<>]+@"#).ok());
/// A header as libraries print it.
static AUTHORIZATION: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(r#"(?i)(authorization['"]?\s*[:=]\s*['"]?)((?:bearer|basic)\s+)?[^\s'"<]+"#).ok()
});

impl Secrets {
    /// A text without what is secret in it; borrowed if there is nothing.
    fn text<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let mut text = Cow::Borrowed(text);
        let mut replace = |regex: Option<&Regex>, with: &dyn Fn(&Captures<'_>) -> String| {
            let changed = match regex.map(|regex| regex.replace_all(&text, with)) {
                Some(Cow::Owned(changed)) if *changed != *text => changed,
                _ => return,
            };
            text = Cow::Owned(changed);
        };
        replace(OPTION.as_ref(), &|found| {
            let (name, between, given) = (&found[1], &found[2], &found[3]);
            let Some(kind) = secret(name).filter(|_| !given.starts_with("--")) else {
                return found[0].to_owned();
            };
            let bare = given.trim_matches(['\'', '"']);
            let value = Redactor::new(self).value(bare, Some(kind));
            format!("--{name}{between}{value}")
        });
        replace(ASSIGNMENT.as_ref(), &|found| format!("{}={REDACTED}", &found[1]));
        replace(self.assignment.as_ref(), &|found| {
            format!("{}{}={REDACTED}", &found[1], &found[2])
        });
        replace(USER_INFO.as_ref(), &|_| format!("://{REDACTED}@"));
        replace(AUTHORIZATION.as_ref(), &|found| {
            format!("{}{REDACTED}", &found[1])
        });
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_in_texts_go_and_the_rest_stays() {
        for (given, expected) in [
            ("plain words", "plain words"),
            (
                "--remote_header=x-token=abc -c opt",
                "--remote_header=<redacted> -c opt",
            ),
            (
                "--remote_header='x-token=a b' end",
                "--remote_header=<redacted> end",
            ),
            ("--bes_header authorization=abc", "--bes_header <redacted>"),
            ("--action_env=KEY=abc x", "--action_env=KEY=<redacted> x"),
            ("--action_env=PATH --x", "--action_env=PATH --x"),
            ("at https://me:pa@ss@host/x?", "at https://<redacted>@host/x?"),
            ("Authorization: Bearer abc.def", "Authorization: <redacted>"),
            ("--//my:auth_token=abc", "--//my:auth_token=<redacted>"),
            ("--config=ci --jobs=8", "--config=ci --jobs=8"),
            ("bytestream://host/blobs/ab/1", "bytestream://host/blobs/ab/1"),
            (
                "exec env - \\\n    API_TOKEN=abc \\\n    PATH=/bin \\\n",
                "exec env - \\\n    API_TOKEN=<redacted> \\\n    PATH=/bin \\\n",
            ),
            ("API_TOKEN=x ./t", "API_TOKEN=<redacted> ./t"),
            ("export MY_SECRET='a b'; run", "export MY_SECRET=<redacted>; run"),
            (r"MY_SECRET='a'\''b c' run", "MY_SECRET=<redacted> run"),
            ("PRIVATE_KEY='-----\nabc\n-----' x", "PRIVATE_KEY=<redacted> x"),
            (r#"PASSWORD="a \" b" x"#, "PASSWORD=<redacted> x"),
            (r#"{"a": "TOKEN=\"a b\" x"}"#, r#"{"a": "TOKEN=<redacted> x"}"#),
            ("token='abc def", "token=<redacted> def"),
            ("--action_env=KEY='a b' x", "--action_env=KEY=<redacted> x"),
            (
                "https://h/?access_token=abc x",
                "https://h/?access_token=<redacted> x",
            ),
        ] {
            assert_eq!(Secrets::default().text(given), expected);
        }
    }

    #[test]
    fn an_argument_tells_whether_the_next_one_is_secret() {
        let secrets = Secrets::default();
        let mut redactor = Redactor::new(&secrets);
        let mut all = |arguments: &[&str]| -> Vec<String> {
            arguments
                .iter()
                .map(|a| redactor.argument(a).unwrap_or_else(|| (*a).to_owned()))
                .collect()
        };
        assert_eq!(
            all(&[
                "--remote_header",
                "x=abc",
                "--jobs",
                "8",
                "--test_env",
                "K=abc",
                "//a:b"
            ]),
            [
                "--remote_header",
                REDACTED,
                "--jobs",
                "8",
                "--test_env",
                "K=<redacted>",
                "//a:b"
            ]
        );
        assert_eq!(
            all(&[
                "--client_env=HOME=abc",
                "--define=my_password=abc",
                "--define=a=b",
                "-c"
            ]),
            [
                "--client_env=HOME=<redacted>",
                "--define=my_password=<redacted>",
                "--define=a=b",
                "-c"
            ]
        );
    }

    #[test]
    fn what_is_no_message_is_told() {
        let secrets = Secrets::default();
        assert_eq!(secrets.redact(&[0x1a, 0x05, 1]), Err(Malformed));
        assert_eq!(secrets.redact(&[0x0b]), Err(Malformed));
    }
}
