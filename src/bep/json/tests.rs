use serde_json::Value;

use super::*;
use crate::{
    bep::event::{Content, Event},
    digest::Digest,
};

const HASH: &str = "2c8b08da5ce60398e1f19af0e5dccc744df274b826abe585eaba68c525434806";

#[test]
fn numbers_and_strings_nulls_and_unknown_fields_are_read_alike() {
    let with_length = |length: &str| {
        let line = format!(
            r#"{{"id":{{"namedSet":{{"id":"0"}}}},"children":[{{"x":{{}}}}],"future":[1,{{}}],"namedSetOfFiles":{{
            "fileSets":[{{"id":"1"}}],"files":[{{"name":"a","pathPrefix":["p","q"],"uri":null,"digest":"{HASH}",
            "length":{length},"new":"x"}}]}},"lastMessage":true}}"#
        );
        let framed = decode_json(line.as_bytes(), None).expect(&line);
        assert!(framed.last);
        let Event::NamedSet(set) = framed.event else {
            panic!("{framed:?}");
        };
        assert_eq!(set.children, ["1"]);
        assert_eq!(&*set.files[0].path, "p/q/a");
        set.files[0].content.clone()
    };
    for (length, size) in [("\"4\"", 4), ("4", 4), ("4.0", 4), ("null", 0)] {
        assert_eq!(
            with_length(length),
            Content::Blob(Digest::from_hex(None, HASH, size).unwrap()),
            "{length}"
        );
    }
}

/// As a converter writes it that keeps the names of the proto files.
fn with_proto_names(json: Value) -> Value {
    match json {
        Value::Object(fields) => {
            let renamed = fields.into_iter().map(|(name, value)| {
                let mut proto = String::new();
                for letter in name.chars() {
                    if letter.is_ascii_uppercase() {
                        proto.push('_');
                    }
                    proto.push(letter.to_ascii_lowercase());
                }
                (proto, with_proto_names(value))
            });
            Value::Object(renamed.collect())
        }
        Value::Array(items) => items.into_iter().map(with_proto_names).collect(),
        value => value,
    }
}

#[test]
fn names_of_the_proto_files_are_read_as_well() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bep");
    let mut renamed = 0;
    for version in ["bazel4", "bazel7"] {
        for build in ["build", "groups", "failing", "test-runs"] {
            let text = std::fs::read_to_string(directory.join(format!("{version}-{build}.json"))).unwrap();
            for line in text.lines() {
                let proto = with_proto_names(serde_json::from_str(line).unwrap()).to_string();
                renamed += usize::from(
                    proto.contains(r#""file_sets":"#) || proto.contains(r#""build_tool_version":"#),
                );
                assert_eq!(
                    format!("{:?}", decode_json(proto.as_bytes(), None)),
                    format!("{:?}", decode_json(line.as_bytes(), None)),
                    "{proto}"
                );
            }
        }
    }
    assert!(renamed > 100, "{renamed}");
}

fn test_result(contents: &str) -> Result<StreamEvent, BepError> {
    let line = format!(
        r#"{{"id":{{"testResult":{{"label":"//t","run":1,"shard":"2","attempt":1}}}},
        "testResult":{{"testActionOutput":[{{"name":"x","contents":"{contents}"}}],"status":"PASSED"}}}}"#
    );
    decode_json(line.as_bytes(), None)
}

#[test]
fn inline_bytes_come_in_either_alphabet_of_base64() {
    for (text, bytes) in [
        ("", &b""[..]),
        ("YQ==", b"a"),
        ("YQ", b"a"),
        ("YWI=", b"ab"),
        ("YWJj", b"abc"),
        ("YWJjZA==", b"abcd"),
        ("+/+/", &[0xfb, 0xff, 0xbf]),
        ("-_-_", &[0xfb, 0xff, 0xbf]),
    ] {
        let Event::TestResult(result) = test_result(text).expect(text).event else {
            panic!("a test result");
        };
        assert_eq!((result.run, result.shard), (1, 2));
        assert_eq!(result.files[0].content, Content::Inline(bytes.into()), "{text}");
    }
    for text in ["Y", "YWJjZ", "Y Q=", "é"] {
        test_result(text).expect_err(text);
    }
}

#[test]
fn enums_are_read_by_name_and_number_and_new_names_are_unknown() {
    for (reason, name) in [
        ("\"SKIPPED\"", "SKIPPED"),
        ("7", "SKIPPED"),
        ("\"NEW\"", "UNKNOWN"),
        ("99", "99"),
    ] {
        let line =
            format!(r#"{{"id":{{"targetCompleted":{{"label":"//a"}}}},"aborted":{{"reason":{reason}}}}}"#);
        let Event::Aborted { target, reason, .. } = decode_json(line.as_bytes(), None).expect(&line).event
        else {
            panic!("an aborted event");
        };
        assert_eq!(reason, name);
        assert_eq!(target.unwrap().label, "//a");
    }
}

#[test]
fn lines_that_are_no_event_are_a_skippable_error() {
    for line in [
        "",
        "[]",
        "{",
        r#"{"namedSetOfFiles":{"files":3}}"#,
        r#"{"namedSetOfFiles":{"files":[{"length":"4.5"}]}}"#,
        r#"{"id":{"namedSet":{"id":"\ud800"}}}"#,
    ] {
        assert!(decode_json(line.as_bytes(), None).expect_err(line).is_skippable());
    }
    assert!(decode_json(b"{\"started\":{\"uuid\":\"\xff\"}}", None).is_err());
    assert_eq!(decode_json(b"{}", None).unwrap().event, Event::Other);
}
