//! What the fuzz targets run of this room: see [`crate::fuzzing`].

use bytes::Bytes;

use super::{
    file::Records,
    format::{self, Batch, FRAME_HEAD_LEN, FrameHead, Head, RecordKind},
};
use crate::{
    builds::StreamKey,
    fuzzing::{file_of, first},
};

/// A journal as somebody left it: any bytes, frames whose checksums are right and whose content is anything, and whole
/// journals with damage, of which no record may be made up.
pub(crate) fn file(data: &[u8]) {
    let _ = Head::decode(data);
    let _ = format::records(Bytes::copy_from_slice(data));
    if let Some(head) = data.first_chunk::<FRAME_HEAD_LEN>() {
        let _ = FrameHead::decode(head);
    }
    let _ = read(data);
    let (choice, rest) = first(data);
    forged(rest);
    damaged(choice, rest);
}

fn head() -> Vec<u8> {
    let key = StreamKey {
        build_id: "b".to_owned(),
        invocation_id: "i".to_owned(),
        ..StreamKey::default()
    };
    Head { key, created_ms: 1 }.encode()
}

/// As much as can be read of a file, in order.
fn read(bytes: &[u8]) -> Vec<(i64, Bytes)> {
    let (_file, path) = file_of(bytes);
    let Ok(records) = Records::open(&path) else {
        return Vec::new();
    };
    records
        .map_while(Result::ok)
        .map(|record| {
            let _ = (record.build_event(), record.headers());
            (record.sequence, record.payload)
        })
        .collect()
}

fn frame(batch: &Batch, raw: &[u8]) -> Vec<u8> {
    let body = zstd::bulk::compress(raw, 1).unwrap_or_default();
    let mut frame = batch.head(&body).to_vec();
    frame.extend_from_slice(&body);
    frame
}

/// The checksum is right, and the rest is anybody's.
fn forged(raw: &[u8]) {
    let mut batch = Batch::default();
    batch.add(1, RecordKind::Other, 1, raw);
    let mut bytes = head();
    bytes.extend(frame(&batch, raw));
    let _ = read(&bytes);
}

/// A few frames, cut or changed somewhere.
fn damaged(choice: u8, data: &[u8]) {
    let (at, data) = first(data);
    let mut bytes = head();
    let mut written = Vec::new();
    for (n, payload) in (1..).zip(data.chunks(16 + usize::from(choice)).take(8)) {
        let mut batch = Batch::default();
        batch.add(7, RecordKind::Event, n, payload);
        bytes.extend(frame(&batch, batch.whole().unwrap_or_default()));
        written.push((n, Bytes::copy_from_slice(payload)));
    }
    assert_eq!(read(&bytes), written);
    let at = (usize::from(at) * 257 + data.len()) % bytes.len();
    if choice & 1 == 0 {
        bytes.truncate(at);
    } else {
        bytes[at] ^= choice | 1;
    }
    let found = read(&bytes);
    assert!(written.starts_with(&found), "records were made up");
}
