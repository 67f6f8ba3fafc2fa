//! Many outputs' rows as one value: what the store holds, and what waits for it.
//!
//! A block has rows in the order of their directories and of the names in them (a directory's files lie together;
//! its subdirectories follow). What rows share is in it once: directories, and *contexts*, which is everything of a row
//! that its neighbours mostly have too, such as the target that named it. A row of a known file is then its name, its
//! hash and some six bytes. Nothing is decoded before somebody asks for it: rows are found by bisection and compared as
//! bytes.
//!
//! A row is `[directory][context][length of the name][name][body]`, numbers as in protobuf. The body is the content,
//! then the stamp, then when it was materialised, as far as the context says that they are there.

mod build;
mod seal;

use std::{cmp::Ordering, sync::Arc};

use bytes::Bytes;

pub(super) use build::{Builder, Remap, merge};
pub(super) use seal::{Texts, seal, unseal};

use super::{
    row::{OutputRow, OutputState},
    wire::Reader,
};
use crate::{
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    output::{Class, OutputContent, Stamp},
};

/// What a row has for a content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// No content: the output is not known any more. Only in rows that wait for the store.
    Removed,
    Blob(DigestFunction),
    Inline,
    Symlink,
    Directory,
}

/// The texts of a context, by what they are.
#[derive(Debug, Clone, Copy)]
enum Text {
    Rule,
    Label,
    Aspect,
    Group,
    Invocation,
    Event,
    Source,
    Error,
}

const TEXTS: usize = 8;

/// What neighbouring rows mostly share.
#[derive(Debug, Clone)]
pub(super) struct Context {
    kind: Kind,
    state: OutputState,
    class: Class,
    /// The stamp's device, if rows have a stamp.
    device: Option<u64>,
    /// Whether rows have when they were materialised, and how long that took.
    timed: bool,
    version: u64,
    texts: [Arc<str>; TEXTS],
}

impl Context {
    fn text(&self, text: Text) -> &Arc<str> {
        &self.texts[text as usize]
    }
}

/// Rows in order. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Block {
    /// Each with a slash at its end; empty for what lies directly below the root.
    directories: Vec<Arc<str>>,
    contexts: Vec<Context>,
    offsets: Offsets,
    rows: Bytes,
    /// Bytes of the texts of directories and contexts.
    heads: usize,
}

/// Where each row begins.
#[derive(Debug, Clone, Default)]
struct Offsets {
    bytes: Bytes,
    wide: bool,
}

impl Offsets {
    const fn width(wide: bool) -> usize {
        if wide { 4 } else { 2 }
    }

    const fn len(&self) -> usize {
        self.bytes.len() / Self::width(self.wide)
    }

    fn get(&self, i: usize) -> Option<usize> {
        let width = Self::width(self.wide);
        let at = i.checked_mul(width)?;
        let bytes = self.bytes.get(at..at + width)?;
        let mut number = [0; 4];
        number[..width].copy_from_slice(bytes);
        usize::try_from(u32::from_le_bytes(number)).ok()
    }
}

/// A row in a block: an output's row of which nothing is decoded before it is asked for.
#[derive(Clone, Copy)]
pub(crate) struct Row<'a> {
    directory: &'a Arc<str>,
    context: &'a Context,
    context_index: usize,
    name: &'a [u8],
    body: &'a [u8],
}

impl Block {
    pub(super) const fn len(&self) -> usize {
        self.offsets.len()
    }

    /// Bytes that it takes in memory, roughly.
    pub(super) fn bytes(&self) -> usize {
        self.rows.len()
            + self.offsets.bytes.len()
            + self.contexts.len() * size_of::<Context>()
            + self.directories.len() * 32
            + self.heads
            + 256
    }

    /// The `i`th row. `None` also for one that makes no sense.
    pub(super) fn row(&self, i: usize) -> Option<Row<'_>> {
        let begin = self.offsets.get(i)?;
        let end = self.offsets.get(i + 1).unwrap_or(self.rows.len());
        let mut reader = Reader(self.rows.get(begin..end)?);
        let directory = self.directories.get(reader.index()?)?;
        let context_index = reader.index()?;
        let context = self.contexts.get(context_index)?;
        let name = reader.bytes()?;
        Some(Row {
            directory,
            context,
            context_index,
            name,
            body: reader.0,
        })
    }

    /// Rows from the `i`th on.
    pub(super) fn rows_from(&self, i: usize) -> impl Iterator<Item = Row<'_>> {
        (i..self.len()).filter_map(|i| self.row(i))
    }

    /// Where a row is, or would be. `likely` is looked at first: anyone who looks many up asks for neighbours.
    pub(super) fn find(&self, directory: &str, name: &str, likely: usize) -> Result<usize, usize> {
        let order = |i| {
            // One that makes no sense is never found.
            self.row(i)
                .map_or(Ordering::Less, |row| row.order(directory, name))
        };
        if likely < self.len() && order(likely) == Ordering::Equal {
            return Ok(likely);
        }
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = usize::midpoint(low, high);
            match order(middle) {
                Ordering::Less => low = middle + 1,
                Ordering::Equal => return Ok(middle),
                Ordering::Greater => high = middle,
            }
        }
        Err(low)
    }
}

impl<'a> Row<'a> {
    pub(super) const fn directory(&self) -> &'a Arc<str> {
        self.directory
    }

    pub(super) const fn name(&self) -> &'a [u8] {
        self.name
    }

    /// How it stands to a place in the order of blocks.
    pub(super) fn order(&self, directory: &str, name: &str) -> Ordering {
        let directories = if std::ptr::eq(self.directory.as_ptr(), directory.as_ptr()) {
            // The same text, mostly: then one is no longer than the other.
            self.directory.len().cmp(&directory.len())
        } else {
            self.directory.as_bytes().cmp(directory.as_bytes())
        };
        directories.then_with(|| self.name.cmp(name.as_bytes()))
    }

    /// Bytes that it takes in a block, roughly.
    pub(super) const fn size(&self) -> usize {
        self.name.len() + self.body.len() + 6
    }

    pub(super) const fn is_removal(&self) -> bool {
        matches!(self.context.kind, Kind::Removed)
    }

    /// Its exec path.
    pub(crate) fn path(&self) -> Option<ExecPath> {
        let name = std::str::from_utf8(self.name).ok()?;
        let mut path = String::with_capacity(self.directory.len() + name.len());
        path.push_str(self.directory);
        path.push_str(name);
        ExecPath::new(&path).ok()
    }

    /// Whether it knows this content.
    pub(crate) fn content_is(&self, content: &OutputContent) -> bool {
        let mut reader = Reader(self.body);
        match (self.context.kind, content) {
            (Kind::Blob(function), OutputContent::Blob(digest)) => {
                function == digest.function()
                    && reader.take(function.hash_len()) == Some(digest.hash())
                    && reader.varint() == Some(digest.size())
            }
            (Kind::Inline, OutputContent::Inline(bytes)) => reader.bytes() == Some(bytes),
            (Kind::Symlink, OutputContent::Symlink(target)) => reader.bytes() == Some(target.as_bytes()),
            (Kind::Directory, OutputContent::Directory) => true,
            _ => false,
        }
    }

    /// The hash of its blob.
    pub(crate) fn hash(&self) -> Option<&'a [u8]> {
        match self.context.kind {
            Kind::Blob(function) => Reader(self.body).take(function.hash_len()),
            _ => None,
        }
    }

    /// How far it has come.
    pub(crate) const fn state(&self) -> OutputState {
        self.context.state
    }

    /// How much it was wanted.
    pub(crate) const fn class(&self) -> Class {
        self.context.class
    }

    /// The selection rule that decided, as text.
    pub(crate) fn rule(&self) -> &'a str {
        self.context.text(Text::Rule)
    }

    /// The output group that it was in.
    pub(crate) fn output_group(&self) -> &'a str {
        self.context.text(Text::Group)
    }

    /// The target that named it last.
    pub(crate) fn label(&self) -> &'a str {
        self.context.text(Text::Label)
    }

    /// Where its bytes came from.
    pub(crate) fn source(&self) -> &'a str {
        self.context.text(Text::Source)
    }

    /// Writes its path in place of what is in `into`; less than all of it where it makes no sense.
    pub(crate) fn write_path(&self, into: &mut String) {
        into.clear();
        into.push_str(self.directory);
        into.push_str(std::str::from_utf8(self.name).unwrap_or_default());
    }

    /// The event that named it.
    pub(crate) fn event(&self) -> &'a str {
        self.context.text(Text::Event)
    }

    /// Its stamp.
    pub(crate) fn stamp(&self) -> Option<Stamp> {
        self.parts()?.1
    }

    /// All of it.
    pub(crate) fn to_row(self) -> Option<OutputRow> {
        let (content, stamp, materialized_at_ms, took_us) = self.parts()?;
        let text = |text| self.context.text(text).clone();
        Some(OutputRow {
            content,
            state: self.context.state,
            class: self.context.class,
            rule: text(Text::Rule),
            label: text(Text::Label),
            aspect: text(Text::Aspect),
            output_group: text(Text::Group),
            invocation_id: text(Text::Invocation),
            event: text(Text::Event),
            stamp,
            source: text(Text::Source),
            materialized_at_ms,
            took_us,
            error: self.context.text(Text::Error).to_string(),
            version: self.context.version,
        })
    }

    /// Content, stamp, and when it was materialised and how long that took.
    pub(crate) fn parts(&self) -> Option<(OutputContent, Option<Stamp>, i64, u64)> {
        let mut reader = Reader(self.body);
        let mut size = 0;
        let content = match self.context.kind {
            Kind::Removed => return None,
            Kind::Blob(function) => {
                let hash = reader.take(function.hash_len())?;
                size = reader.varint()?;
                OutputContent::Blob(Digest::new(function, hash, size).ok()?)
            }
            Kind::Inline => OutputContent::Inline(Bytes::copy_from_slice(reader.bytes()?)),
            Kind::Symlink => OutputContent::Symlink(std::str::from_utf8(reader.bytes()?).ok()?.to_owned()),
            Kind::Directory => OutputContent::Directory,
        };
        let stamp = match self.context.device {
            None => None,
            Some(device) => Some(reader.stamp(size, device)?),
        };
        let (at, took) = if self.context.timed {
            (reader.signed()?, reader.varint()?)
        } else {
            (0, 0)
        };
        Some((content, stamp, at, took))
    }
}

/// A path's directory, with its slash, and the name in it.
pub(super) fn split(path: &str) -> (&str, &str) {
    path.rfind('/')
        .map_or(("", path), |slash| path.split_at(slash + 1))
}

#[cfg(test)]
mod tests;
