//! Runfiles in an exported build: what its programs need at run time, which no event names, and the bytes of what no cache
//! need have.

use bytes::Bytes;
use prost::Message as _;

/// A runfile, or bytes that are needed for some.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Carried {
    /// The program's exec path; empty for bytes.
    #[prost(string, tag = "1")]
    pub(crate) program: String,
    /// Where it is below `PROGRAM.runfiles`.
    #[prost(string, tag = "2")]
    pub(crate) name: String,
    /// Where the build has it.
    #[prost(string, tag = "3")]
    pub(crate) exec_path: String,
    /// What it is.
    #[prost(oneof = "What", tags = "4, 5, 6, 7, 8")]
    pub(crate) what: Option<What>,
}

/// What a runfile is.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum What {
    /// A file: its digest as text.
    #[prost(string, tag = "4")]
    File(String),
    /// No runfile, but a file's bytes.
    #[prost(bytes = "bytes", tag = "5")]
    Bytes(Bytes),
    /// A symlink, to this.
    #[prost(string, tag = "6")]
    Link(String),
    /// An empty directory.
    #[prost(bool, tag = "7")]
    Directory(bool),
    /// Not available, for this reason.
    #[prost(string, tag = "8")]
    Absent(String),
}

impl Carried {
    /// The bytes of a file.
    pub(crate) fn bytes(bytes: Bytes) -> Self {
        Self {
            what: Some(What::Bytes(bytes)),
            ..Self::default()
        }
    }

    /// From a record of a journal; `None` if it does not hold one.
    pub(crate) fn read(record: Bytes) -> Option<Self> {
        Self::decode(record).ok()
    }
}
