//! Answers that an agent can take in: lists and texts of a bounded size, which say what they leave out.

use serde_json::Value;

/// Bytes of JSON that the entries of a list may have.
const LIST_BYTES: usize = 48 << 10;

/// A list that takes what fits, in the order in which it comes.
pub(super) struct List {
    entries: Vec<Value>,
    most: usize,
    bytes: usize,
    left_out: usize,
}

impl List {
    /// For at most so many entries.
    pub(super) const fn new(most: usize) -> Self {
        Self {
            entries: Vec::new(),
            most,
            bytes: 0,
            left_out: 0,
        }
    }

    pub(super) fn push(&mut self, entry: impl FnOnce() -> Value) {
        if self.left_out == 0 && self.entries.len() < self.most {
            let entry = entry();
            let bytes = entry.to_string().len();
            if self.bytes + bytes <= LIST_BYTES {
                self.bytes += bytes;
                self.entries.push(entry);
                return;
            }
        }
        self.left_out += 1;
    }

    /// As JSON: the entries by this name, and how many there are besides.
    pub(super) fn into_json(self, name: &str) -> Value {
        let mut answer = serde_json::Map::new();
        answer.insert(name.to_owned(), self.entries.into());
        answer.insert("left_out".to_owned(), self.left_out.into());
        answer.into()
    }
}

/// The end of a text, at most so many bytes as JSON, from the beginning of a line where there is one.
pub(super) fn tail(bytes: &[u8], is_whole: bool, most: usize) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut left = most;
    let mut begin = text.len();
    for (at, c) in text.char_indices().rev() {
        // Without the quotation marks.
        let written = serde_json::Value::from(c.to_string()).to_string().len() - 2;
        if written > left {
            break;
        }
        left -= written;
        begin = at;
    }
    let text = &text[begin..];
    let is_whole = is_whole && begin == 0;
    let whole_lines = match text.find('\n') {
        Some(end) if !is_whole && end + 1 < text.len() => &text[end + 1..],
        _ => text,
    };
    whole_lines.to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_list_takes_what_fits_and_counts_the_rest() {
        let mut list = List::new(2);
        for number in 0..5 {
            list.push(|| json!(number));
        }
        assert_eq!(list.into_json("of"), json!({"of": [0, 1], "left_out": 3}));
        let mut list = List::new(100);
        for _ in 0..100 {
            list.push(|| json!("x".repeat(10_000)));
        }
        let list = list.into_json("of");
        assert_eq!(
            (list["of"].as_array().unwrap().len(), &list["left_out"]),
            (4, &json!(96))
        );
        assert!(list.to_string().len() < LIST_BYTES + 100);
    }

    #[test]
    fn a_tail_begins_with_a_line() {
        for (bytes, is_whole, expected) in [
            (&b"lf\nlast\n"[..], false, "last\n"),
            (b"first\nlast\n", true, "first\nlast\n"),
            (b"one long line", false, "one long line"),
            (b"one long line\n", false, "one long line\n"),
            (b"", true, ""),
            (b"\xff\n\xc3\xa9", false, "\u{e9}"),
        ] {
            assert_eq!(tail(bytes, is_whole, 100), expected);
        }
        for (bytes, most, expected) in [
            (&b"first\nlast\n"[..], 12, "last\n"),
            (b"first\nlast\n", 13, "first\nlast\n"),
            (b"\0\0\0", 12, "\0\0"),
            (b"x\xff", 2, ""),
            (b"x", 0, ""),
        ] {
            assert_eq!(tail(bytes, true, most), expected);
        }
    }
}
