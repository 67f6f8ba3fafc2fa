//! Names that the build tool has encoded twice.
//!
//! Bazel keeps names as bytes, one in each character of a string, and some versions (4.2 is one) put many into events as
//! they are: the label `//:süß` comes as `//:sÃ¼Ã\u{9f}`. Files of named sets come right.

use crate::proto::build_event_stream::File;

/// The name whose UTF-8 bytes are the characters of this one; if they are not valid UTF-8, the name itself.
pub(super) fn fix_double_encoding(name: String) -> String {
    if name.is_ascii() {
        return name;
    }
    let bytes: Option<Vec<u8>> = name.chars().map(|c| u8::try_from(c).ok()).collect();
    bytes
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .unwrap_or(name)
}

/// The same for the path of each file.
pub(super) fn fix_files(mut files: Vec<File>) -> Vec<File> {
    for file in &mut files {
        file.name = fix_double_encoding(std::mem::take(&mut file.name));
        for part in &mut file.path_prefix {
            *part = fix_double_encoding(std::mem::take(part));
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_encoded_twice_is_decoded_once_more() {
        for name in [
            "",
            "//a:b",
            "//:süß",
            "//:日本",
            "é",
            "e\u{301}",
            "\u{9b}",
            "ÿ",
            "日Ã\u{9f}",
        ] {
            assert_eq!(fix_double_encoding(name.to_owned()), name);
            let twice: String = name.bytes().map(char::from).collect();
            assert_eq!(fix_double_encoding(twice), name);
        }
    }
}
