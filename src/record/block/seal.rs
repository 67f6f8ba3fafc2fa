//! Blocks as values of the store, and back.
//!
//! `[texts][directories][contexts][number of rows][width of offsets][offsets][rows]`. Texts are numbered from one; none
//! is the empty text. A directory is given as how much of the one before it begins with, and the rest.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use bytes::Bytes;

use super::{Block, Context, Kind, Offsets, TEXTS};
use crate::{
    digest::DigestFunction,
    output::Class,
    record::{
        row::OutputState,
        value::{ValueError, open_value, seal_value},
        wire::{Reader, put_bytes, put_varint},
    },
};

/// Keeps one copy of each text that blocks share.
#[derive(Default)]
pub(in crate::record) struct Texts(HashSet<Arc<str>>);

impl Texts {
    fn take(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.0.get(text) {
            return known.clone();
        }
        let text: Arc<str> = text.into();
        self.0.insert(text.clone());
        text
    }
}

/// A block as a value.
pub(in crate::record) fn seal(block: &Block) -> Vec<u8> {
    seal_value(|out| {
        let mut numbers: HashMap<&str, u64> = HashMap::from([("", 0)]);
        let mut texts: Vec<&str> = Vec::new();
        let mut indices = Vec::with_capacity(block.contexts.len() * TEXTS);
        for text in block.contexts.iter().flat_map(|context| &context.texts) {
            let index = *numbers.entry(text).or_insert_with(|| {
                texts.push(text);
                texts.len() as u64
            });
            indices.push(index);
        }
        put_varint(out, texts.len() as u64);
        for text in texts {
            put_bytes(out, text.as_bytes());
        }
        put_varint(out, block.directories.len() as u64);
        let mut before: &[u8] = &[];
        for directory in &block.directories {
            let directory = directory.as_bytes();
            let shared = before.iter().zip(directory).take_while(|(a, b)| a == b).count();
            put_varint(out, shared as u64);
            put_bytes(out, &directory[shared..]);
            before = directory;
        }
        put_varint(out, block.contexts.len() as u64);
        for (context, indices) in block.contexts.iter().zip(indices.chunks(TEXTS)) {
            put_context(out, context, indices);
        }
        put_varint(out, block.len() as u64);
        out.push(u8::from(block.offsets.wide));
        out.extend_from_slice(&block.offsets.bytes);
        out.extend_from_slice(&block.rows);
    })
}

/// The block in a value.
pub(in crate::record) fn unseal(value: Bytes, texts: &mut Texts) -> Result<Block, ValueError> {
    let body = open_value(&value)?;
    let mut reader = Reader(body);
    parse(&mut reader, &value, texts).ok_or(ValueError::Field("block"))
}

fn parse(reader: &mut Reader<'_>, value: &Bytes, known: &mut Texts) -> Option<Block> {
    let mut texts: Vec<Arc<str>> = vec![Arc::default()];
    for _ in 0..reader.varint()? {
        texts.push(known.take(reader.text()?));
    }
    let mut directories: Vec<Arc<str>> = Vec::new();
    for _ in 0..reader.varint()? {
        let shared = reader.index()?;
        let rest = reader.bytes()?;
        let before = directories.last().map_or("", |last| &**last).as_bytes();
        let directory = [before.get(..shared)?, rest].concat();
        directories.push(std::str::from_utf8(&directory).ok()?.into());
    }
    let mut contexts = Vec::new();
    for _ in 0..reader.varint()? {
        contexts.push(context(reader, &texts)?);
    }
    let rows = reader.index()?;
    let wide = reader.byte()? != 0;
    let offsets = reader.take(rows.checked_mul(Offsets::width(wide))?)?;
    let of_texts: usize = texts.iter().map(|text| text.len()).sum();
    Some(Block {
        heads: of_texts + directories.iter().map(|directory| directory.len()).sum::<usize>(),
        directories,
        contexts,
        offsets: Offsets {
            bytes: value.slice_ref(offsets),
            wide,
        },
        rows: value.slice_ref(reader.0),
    })
}

fn put_context(out: &mut Vec<u8>, context: &Context, texts: &[u64]) {
    let (kind, function) = match context.kind {
        Kind::Removed => (0, 0),
        Kind::Blob(function) => (1, function.wire().unsigned_abs()),
        Kind::Inline => (2, 0),
        Kind::Symlink => (3, 0),
        Kind::Directory => (4, 0),
    };
    let state = match context.state {
        OutputState::Known => 0,
        OutputState::Materialized => 1,
        OutputState::Evicted => 2,
        OutputState::Failed => 3,
    };
    let class = match context.class {
        Class::Known => 0,
        Class::Optional => 1,
        Class::Required => 2,
    };
    let flags = u8::from(context.device.is_some()) | u8::from(context.timed) << 1;
    out.extend_from_slice(&[kind, state, class, flags]);
    put_varint(out, function.into());
    put_varint(out, context.device.unwrap_or(0));
    put_varint(out, context.version);
    for index in texts {
        put_varint(out, *index);
    }
}

fn context(reader: &mut Reader<'_>, texts: &[Arc<str>]) -> Option<Context> {
    let &[kind, state, class, flags] = reader.take(4)? else {
        return None;
    };
    let function = i32::try_from(reader.varint()?).ok()?;
    let device = reader.varint()?;
    let version = reader.varint()?;
    let mut own: [Arc<str>; TEXTS] = Default::default();
    for text in &mut own {
        text.clone_from(texts.get(reader.index()?)?);
    }
    Some(Context {
        kind: match kind {
            0 => Kind::Removed,
            1 => Kind::Blob(DigestFunction::from_wire(function)?),
            2 => Kind::Inline,
            3 => Kind::Symlink,
            4 => Kind::Directory,
            _ => return None,
        },
        state: match state {
            0 => OutputState::Known,
            1 => OutputState::Materialized,
            2 => OutputState::Evicted,
            3 => OutputState::Failed,
            _ => return None,
        },
        class: match class {
            0 => Class::Known,
            1 => Class::Optional,
            2 => Class::Required,
            _ => return None,
        },
        device: (flags & 1 != 0).then_some(device),
        timed: flags & 2 != 0,
        version,
        texts: own,
    })
}
