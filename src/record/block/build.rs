//! Making blocks: of rows, and of other blocks.

use std::{cmp::Ordering, sync::Arc};

use super::{Block, Context, Kind, Offsets, Row};
use crate::{
    output::OutputContent,
    record::{
        row::{OutputRow, OutputState},
        wire::{put_bytes, put_signed, put_stamp, put_varint},
    },
};

/// Contexts that are looked at for one that fits. More than that are rarely open at once; one that is there twice
/// costs its bytes and nothing else.
const CONTEXTS_TRIED: usize = 8;

/// Takes rows in order.
#[derive(Default)]
pub(in crate::record) struct Builder {
    directories: Vec<Arc<str>>,
    contexts: Vec<Context>,
    offsets: Vec<u32>,
    rows: Vec<u8>,
    /// Bytes of directories and contexts, for [`Builder::size`].
    heads: usize,
}

/// Which of a builder's contexts the contexts of another block have become.
#[derive(Default)]
pub(in crate::record) struct Remap(Vec<Option<usize>>);

impl Builder {
    pub(in crate::record) const fn is_empty(&self) -> bool {
        self.offsets.is_empty()
    }

    /// Bytes of what was taken, once it is sealed. An estimate.
    pub(in crate::record) const fn size(&self) -> usize {
        self.rows.len() + 2 * self.offsets.len() + self.heads
    }

    /// Takes a row. `name` is without the directory, which ends with a slash.
    pub(in crate::record) fn push(&mut self, directory: &Arc<str>, name: &str, row: &OutputRow) {
        let context = self.context_of(row);
        self.begin(directory, context, name.as_bytes());
        let mut size = 0;
        match &row.content {
            OutputContent::Blob(digest) => {
                self.rows.extend_from_slice(digest.hash());
                size = digest.size();
                put_varint(&mut self.rows, size);
            }
            OutputContent::Inline(bytes) => put_bytes(&mut self.rows, bytes),
            OutputContent::Symlink(target) => put_bytes(&mut self.rows, target.as_bytes()),
            OutputContent::Directory => {}
        }
        if let Some(stamp) = &row.stamp {
            put_stamp(&mut self.rows, size, stamp);
        }
        if timed(row) {
            put_signed(&mut self.rows, row.materialized_at_ms);
            put_varint(&mut self.rows, row.took_us);
        }
    }

    /// Takes note that there is no such row.
    pub(in crate::record) fn push_removal(&mut self, directory: &Arc<str>, name: &str) {
        let empty: Arc<str> = Arc::default();
        let context = self.context(Context {
            kind: Kind::Removed,
            state: OutputState::Known,
            class: crate::output::Class::Known,
            device: None,
            timed: false,
            version: 0,
            texts: std::array::from_fn(|_| empty.clone()),
        });
        self.begin(directory, context, name.as_bytes());
    }

    /// Takes a row of another block. `remap` belongs to that block and this builder.
    pub(in crate::record) fn copy(&mut self, row: &Row<'_>, remap: &mut Remap) {
        if remap.0.len() <= row.context_index {
            remap.0.resize(row.context_index + 1, None);
        }
        let context = match remap.0[row.context_index] {
            Some(context) => context,
            None => {
                let context = self.context(row.context.clone());
                remap.0[row.context_index] = Some(context);
                context
            }
        };
        self.begin(row.directory, context, row.name);
        self.rows.extend_from_slice(row.body);
    }

    /// What was taken, as a block.
    pub(in crate::record) fn finish(self) -> Block {
        let wide = self.rows.len() > usize::from(u16::MAX);
        let mut offsets = Vec::with_capacity(self.offsets.len() * Offsets::width(wide));
        for offset in self.offsets {
            offsets.extend_from_slice(&offset.to_le_bytes()[..Offsets::width(wide)]);
        }
        let mut contexts = self.contexts;
        contexts.shrink_to_fit();
        Block {
            directories: self.directories,
            contexts,
            offsets: Offsets {
                bytes: offsets.into(),
                wide,
            },
            rows: self.rows.into_boxed_slice().into(),
            heads: self.heads,
        }
    }

    fn begin(&mut self, directory: &Arc<str>, context: usize, name: &[u8]) {
        // Rows beyond four GiB cannot be pointed at, and read as none.
        self.offsets
            .push(u32::try_from(self.rows.len()).unwrap_or(u32::MAX));
        if self
            .directories
            .last()
            .is_none_or(|last| !Arc::ptr_eq(last, directory) && **last != **directory)
        {
            self.directories.push(directory.clone());
            self.heads += directory.len() + 2;
        }
        put_varint(&mut self.rows, self.directories.len() as u64 - 1);
        put_varint(&mut self.rows, context as u64);
        put_bytes(&mut self.rows, name);
    }

    /// The number of the context of a row. Compares before it makes one: it is mostly the last.
    fn context_of(&mut self, row: &OutputRow) -> usize {
        let fits = |context: &Context| {
            context.kind == kind(&row.content)
                && context.state == row.state
                && context.class == row.class
                && context.device == row.stamp.map(|stamp| stamp.device)
                && context.timed == timed(row)
                && context.version == row.version
                && texts(row)
                    .into_iter()
                    .zip(&context.texts)
                    .all(|(a, b)| Arc::ptr_eq(a, b) || **a == **b)
                && row.error == *context.texts[super::TEXTS - 1]
        };
        if let Some(found) = self.known_context(fits) {
            return found;
        }
        let [rule, label, aspect, group, invocation, event, source] = texts(row).map(Arc::clone);
        self.add_context(Context {
            kind: kind(&row.content),
            state: row.state,
            class: row.class,
            device: row.stamp.map(|stamp| stamp.device),
            timed: timed(row),
            version: row.version,
            texts: [
                rule,
                label,
                aspect,
                group,
                invocation,
                event,
                source,
                row.error.as_str().into(),
            ],
        })
    }

    fn context(&mut self, context: Context) -> usize {
        let fits = |known: &Context| {
            known.kind == context.kind
                && known.state == context.state
                && known.class == context.class
                && known.device == context.device
                && known.timed == context.timed
                && known.version == context.version
                && known
                    .texts
                    .iter()
                    .zip(&context.texts)
                    .all(|(a, b)| Arc::ptr_eq(a, b) || **a == **b)
        };
        match self.known_context(fits) {
            Some(found) => found,
            None => self.add_context(context),
        }
    }

    fn known_context(&self, fits: impl Fn(&Context) -> bool) -> Option<usize> {
        let recent = self.contexts.iter().enumerate().rev().take(CONTEXTS_TRIED);
        recent.into_iter().find(|(_, known)| fits(known)).map(|(i, _)| i)
    }

    fn add_context(&mut self, context: Context) -> usize {
        self.heads += 24;
        let last = self.contexts.last();
        for (i, text) in context.texts.iter().enumerate() {
            if last.is_none_or(|last| *last.texts[i] != **text) {
                self.heads += text.len() + 1;
            }
        }
        self.contexts.push(context);
        self.contexts.len() - 1
    }
}

/// Two blocks as one; of two rows of the same place, the newer block's stays. Removals are rows here.
pub(in crate::record) fn merge(older: &Block, newer: &Block) -> Block {
    let mut builder = Builder::default();
    let (mut from_older, mut from_newer) = (Remap::default(), Remap::default());
    let mut old = older.rows_from(0).peekable();
    for new in newer.rows_from(0) {
        while let Some(row) = old.next_if(|old| old.order_of(&new) == Ordering::Less) {
            builder.copy(&row, &mut from_older);
        }
        old.next_if(|old| old.order_of(&new) == Ordering::Equal);
        builder.copy(&new, &mut from_newer);
    }
    for row in old {
        builder.copy(&row, &mut from_older);
    }
    builder.finish()
}

impl Row<'_> {
    /// How it stands to another block's row.
    pub(in crate::record) fn order_of(&self, other: &Row<'_>) -> Ordering {
        if Arc::ptr_eq(self.directory, other.directory) {
            return self.name.cmp(other.name);
        }
        (self.directory.as_bytes(), self.name).cmp(&(other.directory.as_bytes(), other.name))
    }
}

const fn kind(content: &OutputContent) -> Kind {
    match content {
        OutputContent::Blob(digest) => Kind::Blob(digest.function()),
        OutputContent::Inline(_) => Kind::Inline,
        OutputContent::Symlink(_) => Kind::Symlink,
        OutputContent::Directory => Kind::Directory,
    }
}

const fn timed(row: &OutputRow) -> bool {
    row.materialized_at_ms != 0 || row.took_us != 0
}

/// All but the error, in the order of `Text`.
const fn texts(row: &OutputRow) -> [&Arc<str>; super::TEXTS - 1] {
    [
        &row.rule,
        &row.label,
        &row.aspect,
        &row.output_group,
        &row.invocation_id,
        &row.event,
        &row.source,
    ]
}
