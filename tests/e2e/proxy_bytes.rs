//! What goes on upstream is what came, byte for byte: also what this version of the protocol does not know, and in forms
//! that no encoder of ours would give it. Needs no peers.

use bytes::Bytes;
use prost::encoding::{WireType, encode_key, encode_varint};

use crate::harness::{Daemon, RawClient, Upstream};

const BUILD: &str = "6f0a4f2e-0000-4000-8000-000000000001";

/// A field with a length.
fn field(number: u32, content: &[u8], message: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, message);
    encode_varint(content.len() as u64, message);
    message.extend_from_slice(content);
}

/// A field that nobody knows, before and after the others.
fn strange(content: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    field(14_999, b"in front", &mut message);
    message.extend_from_slice(content);
    field(15_000, b"after", &mut message);
    message
}

/// The request with a number, its fields back to front and unknown fields at every level.
fn request(invocation: &str, number: u64, event: &[u8]) -> Bytes {
    let mut stream = Vec::new();
    field(6, invocation.as_bytes(), &mut stream);
    // TOOL, as a varint that is longer than it need be.
    stream.extend_from_slice(&[3 << 3, 0x83, 0x00]);
    field(1, BUILD.as_bytes(), &mut stream);

    let mut ordered = Vec::new();
    field(3, &strange(event), &mut ordered);
    encode_key(2, WireType::Varint, &mut ordered);
    encode_varint(number, &mut ordered);
    field(1, &strange(&stream), &mut ordered);

    let mut request = Vec::new();
    field(6, b"project", &mut request);
    field(4, &strange(&ordered), &mut request);
    field(5, b"some_keyword=1", &mut request);
    strange(&request).into()
}

/// A `google.devtools.build.v1.BuildEvent` around one of Bazel's, which has text on standard error.
fn bazel_event(number: u64, text: &[u8]) -> Vec<u8> {
    let mut progress = Vec::new();
    field(2, text, &mut progress);
    let mut count = Vec::new();
    encode_key(1, WireType::Varint, &mut count);
    encode_varint(number, &mut count);
    let mut id = Vec::new();
    field(2, &count, &mut id);
    let mut event = Vec::new();
    field(3, &strange(&progress), &mut event);
    field(1, &strange(&id), &mut event);

    let mut any = Vec::new();
    field(2, &strange(&event), &mut any);
    field(1, b"type.googleapis.com/build_event_stream.BuildEvent", &mut any);
    let mut wrapped = Vec::new();
    field(60, &strange(&any), &mut wrapped);
    wrapped
}

/// The event that ends a stream.
fn finished() -> Vec<u8> {
    let mut wrapped = Vec::new();
    field(59, &[1 << 3, 1], &mut wrapped);
    wrapped
}

/// A stream with these events, and its end.
fn stream(invocation: &str, events: impl Iterator<Item = Vec<u8>>) -> Vec<Bytes> {
    events
        .chain([finished()])
        .zip(1..)
        .map(|(event, number)| request(invocation, number, &event))
        .collect()
}

/// Sends it, and demands that it arrives.
fn goes_through(invocation: &str, requests: Vec<Bytes>) {
    let upstream = Upstream::start();
    let daemon = Daemon::with(&["--remote-cache=unix:/nonexistent", &upstream.flag()]);
    let acks = RawClient::connect(&daemon.bes()).send(requests.clone());
    assert_eq!(acks, (1..=requests.len() as i64).collect::<Vec<_>>());
    let arrived = upstream.complete(invocation, || daemon.log());
    assert_eq!(arrived.len(), requests.len());
    for (sent, arrived) in requests.iter().zip(&arrived) {
        assert!(*sent == arrived.bytes, "event {} was changed", arrived.sequence());
    }
    assert_eq!(
        upstream.seen(invocation).len(),
        requests.len(),
        "nothing came twice"
    );
}

#[test]
fn unknown_fields_and_odd_forms_arrive_as_they_were() {
    let events = (1..=50).map(|number| bazel_event(number, b"text"));
    goes_through("strange", stream("strange", events));
}

#[test]
fn an_event_of_ten_mebibytes_arrives_as_it_was() {
    let large: Vec<u8> = (0..10_u32 << 20).map(|n| (n >> 8 ^ n) as u8).collect();
    let events = (1..=5).map(|number| match number {
        3 => bazel_event(number, &large),
        _ => bazel_event(number, b"small"),
    });
    goes_through("large", stream("large", events));
}

#[test]
fn a_hundred_thousand_events_arrive_in_order() {
    let events = (1..100_000).map(|number| bazel_event(number, b"one of many"));
    goes_through("many", stream("many", events));
}
