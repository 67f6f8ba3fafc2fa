//! Tars as no sane program makes them.

use std::io::Write as _;

use ::tar::{EntryType, Header};

use super::super::Format;

/// A tar that is written member by member, without any checks.
#[derive(Clone, Default)]
pub(crate) struct Tar(Vec<u8>);

/// One member.
pub(crate) struct Entry<'a> {
    pub(crate) kind: EntryType,
    pub(crate) name: &'a [u8],
    pub(crate) link: &'a [u8],
    pub(crate) mode: u32,
    /// What the header says, if not the length of the data.
    pub(crate) size: Option<u64>,
    pub(crate) data: &'a [u8],
}

impl<'a> Entry<'a> {
    pub(crate) fn new(kind: EntryType, name: &'a str) -> Self {
        Self {
            kind,
            name: name.as_bytes(),
            link: b"",
            mode: 0o644,
            size: None,
            data: b"",
        }
    }
}

impl Tar {
    pub(crate) fn entry(mut self, entry: Entry<'_>) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(entry.kind);
        header.set_mode(entry.mode);
        header.set_size(entry.size.unwrap_or(entry.data.len() as u64));
        let old = header.as_old_mut();
        if entry.name.len() > old.name.len() {
            self = self.entry(Entry {
                name: b"././@LongLink",
                data: entry.name,
                ..Entry::new(EntryType::GNULongName, "")
            });
        }
        if entry.link.len() > old.linkname.len() {
            self = self.entry(Entry {
                name: b"././@LongLink",
                data: entry.link,
                ..Entry::new(EntryType::GNULongLink, "")
            });
        }
        let fit = |into: &mut [u8], from: &[u8]| {
            let length = from.len().min(into.len());
            into[..length].copy_from_slice(&from[..length]);
        };
        fit(&mut old.name, entry.name);
        fit(&mut old.linkname, entry.link);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(entry.data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, name: &str, data: &str) -> Self {
        self.entry(Entry {
            data: data.as_bytes(),
            ..Entry::new(EntryType::Regular, name)
        })
    }

    pub(crate) fn directory(self, name: &str) -> Self {
        self.entry(Entry::new(EntryType::Directory, name))
    }

    pub(crate) fn symlink(self, name: &str, to: &str) -> Self {
        self.entry(Entry {
            link: to.as_bytes(),
            ..Entry::new(EntryType::Symlink, name)
        })
    }

    pub(crate) fn hard_link(self, name: &str, to: &str) -> Self {
        self.entry(Entry {
            link: to.as_bytes(),
            ..Entry::new(EntryType::Link, name)
        })
    }

    /// An extended header of POSIX.
    pub(crate) fn pax(self, kind: EntryType, records: &[(&str, &str)]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            // The length of a record counts itself.
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            data.extend_from_slice(format!("{length} {key}={value}\n").as_bytes());
        }
        self.raw_pax(kind, &data)
    }

    pub(crate) fn raw_pax(self, kind: EntryType, data: &[u8]) -> Self {
        self.entry(Entry {
            data,
            ..Entry::new(kind, "PaxHeaders/x")
        })
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// Compresses a tar as one stream.
pub(crate) fn compress(format: Format, tar: &[u8]) -> Vec<u8> {
    match format {
        Format::TarGz => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(tar).unwrap();
            encoder.finish().unwrap()
        }
        Format::TarZst => {
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
            encoder.include_checksum(true).unwrap();
            encoder.write_all(tar).unwrap();
            encoder.finish().unwrap()
        }
        Format::TarXz => {
            let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
            encoder.write_all(tar).unwrap();
            encoder.finish().unwrap()
        }
        Format::Tar | Format::Zip => tar.to_vec(),
    }
}

/// A zip that is written member by member, without any checks.
#[derive(Default)]
pub(crate) struct Zip {
    bytes: Vec<u8>,
    directory: Vec<u8>,
    count: u16,
    /// Where the last member starts.
    last: u32,
}

/// One member.
pub(crate) struct ZipEntry<'a> {
    pub(crate) name: &'a str,
    pub(crate) data: &'a [u8],
    pub(crate) mode: u32,
    /// The name in its own header, if it is another.
    pub(crate) local_name: Option<&'a str>,
    /// What the directory says, if not the length of the data.
    pub(crate) size: Option<u64>,
    pub(crate) crc: Option<u32>,
    pub(crate) flags: u16,
    pub(crate) method: Option<u16>,
    /// Whether its place is that of the member before.
    pub(crate) overlaps: bool,
    pub(crate) is_deflated: bool,
    /// The system that it says it was made on: Unix, if not another.
    pub(crate) made_on: u8,
    /// Extra fields, in the directory only.
    pub(crate) extra: &'a [u8],
}

impl<'a> ZipEntry<'a> {
    pub(crate) fn new(name: &'a str, data: &'a str) -> Self {
        Self {
            name,
            data: data.as_bytes(),
            mode: 0o100_644,
            local_name: None,
            size: None,
            crc: None,
            flags: 0,
            method: None,
            overlaps: false,
            is_deflated: false,
            made_on: 3,
            extra: b"",
        }
    }
}

impl Zip {
    pub(crate) fn file(self, name: &str, data: &str) -> Self {
        self.entry(&ZipEntry::new(name, data))
    }

    pub(crate) fn entry(mut self, entry: &ZipEntry<'_>) -> Self {
        let packed = if entry.is_deflated {
            let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(entry.data).unwrap();
            encoder.finish().unwrap()
        } else {
            entry.data.to_vec()
        };
        let start = if entry.overlaps {
            self.last
        } else {
            self.bytes.len() as u32
        };
        self.last = start;
        // From the flags to the size, as both headers have them; without a time.
        let mut common = Vec::new();
        common.extend_from_slice(&entry.flags.to_le_bytes());
        let method = entry.method.unwrap_or(if entry.is_deflated { 8 } else { 0 });
        common.extend_from_slice(&method.to_le_bytes());
        common.extend_from_slice(&[0; 4]);
        let crc = entry.crc.unwrap_or_else(|| rawzip::crc32(entry.data));
        common.extend_from_slice(&crc.to_le_bytes());
        common.extend_from_slice(&(packed.len() as u32).to_le_bytes());
        let size = entry.size.unwrap_or(entry.data.len() as u64) as u32;
        common.extend_from_slice(&size.to_le_bytes());
        if !entry.overlaps {
            let name = entry.local_name.unwrap_or(entry.name);
            self.bytes.extend_from_slice(b"PK\x03\x04\x14\0");
            self.bytes.extend_from_slice(&common);
            self.bytes.extend_from_slice(&(name.len() as u16).to_le_bytes());
            self.bytes.extend_from_slice(&[0; 2]);
            self.bytes.extend_from_slice(name.as_bytes());
            self.bytes.extend_from_slice(&packed);
        }
        self.directory.extend_from_slice(b"PK\x01\x02\x14");
        self.directory.push(entry.made_on);
        self.directory.extend_from_slice(&[0x14, 0]);
        self.directory.extend_from_slice(&common);
        self.directory
            .extend_from_slice(&(entry.name.len() as u16).to_le_bytes());
        self.directory
            .extend_from_slice(&(entry.extra.len() as u16).to_le_bytes());
        self.directory.extend_from_slice(&[0; 6]);
        self.directory
            .extend_from_slice(&(entry.mode << 16).to_le_bytes());
        self.directory.extend_from_slice(&start.to_le_bytes());
        self.directory.extend_from_slice(entry.name.as_bytes());
        self.directory.extend_from_slice(entry.extra);
        self.count = self.count.wrapping_add(1);
        self
    }

    /// Says that it has so many members.
    pub(crate) fn counting(mut self, count: u16) -> Self {
        self.count = count;
        self
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        let start = self.bytes.len() as u32;
        self.bytes.extend_from_slice(&self.directory);
        self.bytes.extend_from_slice(b"PK\x05\x06\0\0\0\0");
        self.bytes.extend_from_slice(&self.count.to_le_bytes());
        self.bytes.extend_from_slice(&self.count.to_le_bytes());
        self.bytes
            .extend_from_slice(&(self.directory.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(&start.to_le_bytes());
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes
    }
}
