//! Files as Bazel writes them, for tests: not from Bazel, but from the table of the formats.

use std::collections::BTreeMap;

use super::{
    facts::{Files, Output, VALIDATION},
    frame::{MAGIC, RECORD},
    index,
};

/// One action's outputs, for [`Written`].
#[derive(Debug, Clone, Default)]
pub(crate) struct Action {
    /// The name of the action: its first output.
    pub(crate) primary: String,
    pub(crate) inputs: Vec<String>,
    pub(crate) files: Vec<(String, Metadata)>,
    /// With the files below each.
    pub(crate) trees: Vec<(String, Vec<(String, Metadata)>)>,
}

#[derive(Debug, Clone)]
pub(crate) struct Metadata {
    pub(crate) hash: Vec<u8>,
    pub(crate) size: i64,
    pub(crate) expires_ms: i64,
    pub(crate) link_to: Option<String>,
}

impl Metadata {
    /// What a fact says.
    pub(crate) fn of(output: &Output) -> Self {
        Self {
            hash: output.digest.hash().to_vec(),
            size: i64::try_from(output.digest.size()).unwrap_or(i64::MAX),
            expires_ms: output.expires_ms,
            link_to: output.link_to.as_ref().map(|path| path.as_str().to_owned()),
        }
    }
}

/// The four files, while they are written.
#[derive(Debug, Clone)]
pub(crate) struct Written {
    pub(crate) actions: Vec<u8>,
    pub(crate) journal: Vec<u8>,
    pub(crate) index: Vec<u8>,
    pub(crate) index_journal: Vec<u8>,
    strings: BTreeMap<String, i32>,
}

impl Written {
    /// Writes the files of this format, but for the journals, where Bazel has them in an output base.
    #[cfg(test)]
    pub(crate) fn save(&self, output_base: &std::path::Path, format: i64) {
        let directory = output_base.join("action_cache");
        std::fs::create_dir_all(&directory).unwrap();
        for (stem, bytes) in [("action_cache", &self.actions), ("filename_index", &self.index)] {
            std::fs::write(directory.join(format!("{stem}_v{format}.blaze")), bytes).unwrap();
        }
    }

    /// Files without records, of a format.
    pub(crate) fn new(format: i64) -> Self {
        Self {
            actions: header(format),
            journal: header(format),
            index: header(index::FORMAT),
            index_journal: header(index::FORMAT),
            strings: BTreeMap::new(),
        }
    }

    pub(super) fn files(&self) -> Files<'_> {
        Files {
            actions: &self.actions,
            journal: &self.journal,
            index: &self.index,
            index_journal: &self.index_journal,
        }
    }

    /// What they say.
    #[cfg(test)]
    pub(crate) fn facts(&self) -> super::Facts {
        let decoded = super::Facts::decode(&self.files(), crate::digest::DigestFunction::Sha256);
        decoded.map(|(facts, _)| facts).unwrap()
    }

    /// A string's number; a new one is written to the index.
    pub(crate) fn string(&mut self, text: &str) -> i32 {
        if let Some(id) = self.strings.get(text) {
            return *id;
        }
        let id = i32::try_from(self.strings.len()).unwrap_or(i32::MAX);
        self.strings.insert(text.to_owned(), id);
        // As characters that are the path's bytes.
        let latin: String = text.bytes().map(char::from).collect();
        self.index.push(RECORD);
        piece(&mut self.index, latin.as_bytes());
        self.index.push(1);
        self.index.extend(id.to_be_bytes());
        id
    }

    /// Appends an action, and what Bazel writes with each.
    pub(crate) fn put(&mut self, action: &Action, to_journal: bool) {
        let key = self.string(&action.primary);
        let mut value = Vec::new();
        blob(&mut value, b"an action key");
        blob(&mut value, &[7; 32]);
        if action.inputs.is_empty() {
            varint(&mut value, u64::from(u32::MAX));
        } else {
            varint(&mut value, action.inputs.len() as u64);
            for input in &action.inputs {
                self.refer(&mut value, input);
            }
        }
        blob(&mut value, b"");
        varint(&mut value, action.files.len() as u64);
        for (path, metadata) in &action.files {
            self.refer(&mut value, path);
            self.metadata(&mut value, metadata);
        }
        varint(&mut value, action.trees.len() as u64);
        for (tree, children) in &action.trees {
            self.refer(&mut value, tree);
            varint(&mut value, children.len() as u64);
            for (below, metadata) in children {
                self.refer(&mut value, below);
                self.metadata(&mut value, metadata);
            }
            value.extend([0, 0]);
        }
        let count = i32::try_from(self.strings.len()).unwrap_or(i32::MAX);
        let file = if to_journal {
            &mut self.journal
        } else {
            &mut self.actions
        };
        for (key, value) in [(key, &*value), (VALIDATION, &count.to_be_bytes()[..])] {
            file.push(RECORD);
            file.extend(key.to_be_bytes());
            file.push(1);
            piece(file, value);
        }
    }

    /// Appends to the journal that an action is gone.
    #[cfg(test)]
    pub(crate) fn remove(&mut self, primary: &str) {
        let key = self.string(primary);
        self.journal.push(RECORD);
        self.journal.extend(key.to_be_bytes());
        self.journal.push(0);
    }

    fn refer(&mut self, value: &mut Vec<u8>, text: &str) {
        let id = self.string(text);
        varint(value, u64::from(id.cast_unsigned()));
    }

    fn metadata(&mut self, value: &mut Vec<u8>, metadata: &Metadata) {
        blob(value, &metadata.hash);
        varint(value, metadata.size.cast_unsigned());
        varint(value, 1);
        varint(value, metadata.expires_ms.cast_unsigned());
        match &metadata.link_to {
            Some(path) => {
                varint(value, 1);
                self.refer(value, path);
            }
            None => varint(value, 0),
        }
    }
}

fn header(format: i64) -> Vec<u8> {
    [MAGIC.to_be_bytes(), format.to_be_bytes()].concat()
}

fn piece(file: &mut Vec<u8>, bytes: &[u8]) {
    let len = i32::try_from(bytes.len()).unwrap_or(i32::MAX);
    file.extend(len.to_be_bytes());
    file.extend(bytes);
}

fn blob(value: &mut Vec<u8>, bytes: &[u8]) {
    varint(value, bytes.len() as u64);
    value.extend(bytes);
}

fn varint(value: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        value.push(u8::try_from(number & 0x7f).unwrap_or_default() | 0x80);
        number >>= 7;
    }
    value.push(u8::try_from(number).unwrap_or_default());
}
