//! What the command line says, and what follows from it.

use super::*;

#[test]
fn a_decoder_learns_the_function_from_the_command_line() {
    let mut decoder = Decoder::default();
    let line = proto::BuildEvent {
        payload: Some(Payload::StructuredCommandLine(proto::CommandLine {
            command_line_label: "canonical".into(),
            sections: vec![proto::CommandLineSection {
                section_label: "startup options".into(),
                section_type: Some(SectionType::OptionList(proto::OptionList {
                    option: vec![proto::Option {
                        option_name: "digest_function".into(),
                        option_value: "BLAKE3".into(),
                        ..Default::default()
                    }],
                })),
            }],
        })),
        ..Default::default()
    };
    decoder.decode(&line.encode_to_vec().into()).unwrap();
    assert_eq!(decoder.function(), Some(DigestFunction::Blake3));
    let set = proto::BuildEvent {
        id: Some(proto::BuildEventId {
            id: Some(Id::NamedSet(ids::NamedSetOfFilesId { id: "0".into() })),
        }),
        payload: Some(Payload::NamedSetOfFiles(proto::NamedSetOfFiles {
            files: vec![file(HASH, 4, None)],
            ..Default::default()
        })),
        ..Default::default()
    };
    let Event::NamedSet(set) = decoder.decode(&set.encode_to_vec().into()).unwrap().event else {
        panic!("a named set");
    };
    assert_eq!(set.files[0].content, blake3(4));
}

#[test]
fn command_lines_are_flattened_in_order_with_chunks_under_their_sections_name() {
    let option = |combined: &str, name: &str, value: &str| proto::Option {
        combined_form: combined.into(),
        option_name: name.into(),
        option_value: value.into(),
    };
    let section = |label: &str, section_type| proto::CommandLineSection {
        section_label: label.into(),
        section_type: Some(section_type),
    };
    let chunks = |chunks: &[&str]| {
        SectionType::ChunkList(proto::ChunkList {
            chunk: chunks.iter().map(|&c| c.into()).collect(),
        })
    };
    let event = read(
        Id::StructuredCommandLine(ids::StructuredCommandLineId {
            command_line_label: "original".into(),
        }),
        Payload::StructuredCommandLine(proto::CommandLine {
            command_line_label: String::new(),
            sections: vec![
                section(
                    "startup options",
                    SectionType::OptionList(proto::OptionList {
                        option: vec![option("", "", ""), option("--output_user_root=/o=p", "", "")],
                    }),
                ),
                section("command", chunks(&["test"])),
                section(
                    "command options",
                    SectionType::OptionList(proto::OptionList {
                        option: vec![option("--jobs=1", "jobs", "1"), option("--jobs=2", "jobs", "2")],
                    }),
                ),
                section("residual", chunks(&["//a", "//b"])),
            ],
        }),
    );
    let Event::CommandLine(line) = event else {
        panic!("{event:?}");
    };
    assert_eq!(line.label, "original");
    assert_eq!(line.last("output_user_root"), Some("/o=p"));
    assert_eq!(line.last("jobs"), Some("2"));
    assert_eq!(line.last("command"), Some("test"));
    assert_eq!(line.all("residual").collect::<Vec<_>>(), ["//a", "//b"]);
    assert_eq!(line.options.len(), 6);
}
