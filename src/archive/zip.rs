//! Zips, by their central directory.
//!
//! The format is that of PKWARE's APPNOTE.TXT. Programs that read the local headers instead see the same names, or the
//! archive is refused.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, Read},
};

use flate2::bufread::DeflateDecoder;
use rawzip::{
    CompressionMethod, CreatorSystem, EntryMode, ErrorKind, FileReader, MAX_CENTRAL_DIRECTORY_RECORD_SIZE,
    ZipArchive, ZipArchiveEntryWayfinder, ZipFileHeaderRecord, ZipLocator, extra_fields::ExtraFieldId,
};

use super::{
    Archive, ArchiveError, Limit, Mode, Staging, Unpacked,
    decode::{is_large_window, zstd_decoder},
    member::{self, Naming, Spot},
    tree::Tree,
};

/// The type of a file in a mode of Unix, and the types of files.
const TYPE: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;

/// The longest target of a symlink that Linux takes.
const LONGEST_TARGET: u64 = 4095;

/// A member, by the central directory.
struct Member {
    name: Vec<u8>,
    /// The same in UTF-8, if that was not UTF-8 and the entry says what it should be.
    unicode: Option<Vec<u8>>,
    is_of_windows: bool,
    mode: EntryMode,
    method: CompressionMethod,
    is_encrypted: bool,
    size: u64,
    start: u64,
    found: ZipArchiveEntryWayfinder,
}

impl Member {
    fn new(record: &ZipFileHeaderRecord<'_>) -> Self {
        let made_on = record.version_made_by().creator_system();
        let raw = record.file_path();
        let unicode = record.extra_fields().find_map(|(id, field)| {
            let is_path = id == ExtraFieldId::INFO_ZIP_UNICODE_PATH;
            is_path.then(|| unicode_path(field, raw.as_bytes())).flatten()
        });
        Self {
            unicode,
            is_of_windows: matches!(
                made_on,
                CreatorSystem::FAT | CreatorSystem::VFAT | CreatorSystem::NTFS
            ),
            name: record.file_path().as_bytes().to_vec(),
            mode: record.mode(),
            method: record.compression_method(),
            is_encrypted: record.flags().is_encrypted() || record.flags().has_strong_encryption(),
            size: record.uncompressed_size_hint(),
            start: record.local_header_offset(),
            found: record.wayfinder(),
        }
    }

    /// The name with slashes. Older programs on Windows, such as PowerShell 5, write backslashes, and all others read those
    /// so.
    fn path(&self) -> Cow<'_, [u8]> {
        let name = self.unicode.as_ref().unwrap_or(&self.name);
        if !self.is_of_windows || name.contains(&b'/') || !name.contains(&b'\\') {
            return Cow::Borrowed(name);
        }
        let slash = |byte: &u8| if *byte == b'\\' { b'/' } else { *byte };
        name.iter().map(slash).collect()
    }
}

/// The name in Info-ZIP's Unicode Path Extra Field (APPNOTE.TXT, 4.6.9), if it is that of this entry.
fn unicode_path(field: &[u8], raw: &[u8]) -> Option<Vec<u8>> {
    let (version, field) = field.split_first()?;
    let (crc, name) = field.split_first_chunk()?;
    (*version == 1 && u32::from_le_bytes(*crc) == rawzip::crc32(raw)).then(|| name.to_vec())
}

/// One zip while it is unpacked.
struct Unpacking<'a> {
    archive: &'a Archive<'a>,
    zip: &'a ZipArchive<FileReader>,
    /// Bytes of the whole file.
    length: u64,
    strip_components: u32,
    tree: Tree<'a>,
    /// Which bytes of the file belong to members, by where they start.
    used: BTreeMap<u64, u64>,
    local: Vec<u8>,
}

/// Unpacks a zip. The whole file must be there, and verified, since its directory is at the end. Moves the file's position.
///
/// # Errors
/// As [`super::unpack`].
pub(crate) fn unpack(
    file: &File,
    archive: &Archive<'_>,
    staging: &Staging,
) -> Result<Unpacked, ArchiveError> {
    let Mode::Extract { strip_components } = archive.mode else {
        return Err(ArchiveError::Manifest {
            archive: archive.name.to_owned(),
            reason: "it is not a tar".to_owned(),
        });
    };
    let mut buffer = vec![0; MAX_CENTRAL_DIRECTORY_RECORD_SIZE];
    let file = file.try_clone().map_err(|e| source(archive, e))?;
    let length = file.metadata().map_err(|e| source(archive, e))?.len();
    let zip = ZipLocator::new()
        .locate_in_reader(FileReader::from(file), &mut buffer, length)
        .map_err(|(_, e)| failed(archive, e))?;
    if zip.end_offset() != length {
        return Err(archive.damaged("something follows its end".to_owned()));
    }
    let mut unpacking = Unpacking {
        archive,
        zip: &zip,
        length,
        strip_components: *strip_components,
        tree: Tree::new(staging, *archive),
        used: BTreeMap::new(),
        local: vec![0; 2 * usize::from(u16::MAX)],
    };
    let mut entries = zip.entries(&mut buffer);
    let mut count: u64 = 0;
    while let Some(record) = entries.next_entry().map_err(|e| failed(archive, e))? {
        count += 1;
        let member = Member::new(&record);
        unpacking.member(&member)?;
    }
    // Where nothing but 16 bits is for it, programs that write more members let it overflow.
    let hint = zip.entries_hint();
    if count != hint && count % (1 << 16) != hint {
        return Err(archive.damaged(format!("its directory has {count} members where it says {hint}")));
    }
    Ok(unpacking.tree.finish())
}

fn source(archive: &Archive<'_>, source: io::Error) -> ArchiveError {
    let archive = archive.name.to_owned();
    ArchiveError::Source { archive, source }
}

fn failed(archive: &Archive<'_>, error: rawzip::Error) -> ArchiveError {
    match error.into_kind() {
        ErrorKind::IO(error) => read_failed(archive, error),
        kind => archive.damaged(kind.to_string()),
    }
}

/// What an error means that came with reading a member.
fn read_failed(archive: &Archive<'_>, error: io::Error) -> ArchiveError {
    if error.raw_os_error().is_some() {
        source(archive, error)
    } else if is_large_window(&error) {
        archive.over(Limit::ZstdWindow)
    } else {
        archive.damaged(error.to_string())
    }
}

impl<'a> Unpacking<'a> {
    fn member(&mut self, member: &Member) -> Result<(), ArchiveError> {
        let shown = String::from_utf8_lossy(&member.name).into_owned();
        if member.is_encrypted {
            return Err(self.archive.unsupported(&shown, "is encrypted".to_owned()));
        }
        let kind = member.mode.value() & TYPE;
        let path = member.path();
        let is_directory = kind == DIRECTORY || path.ends_with(b"/");
        let naming = Naming::Strip(self.strip_components);
        let spot = member::spot(self.archive, &naming, &path, is_directory)?;
        let mut data = self.data(member, &shown)?;
        let is_empty = member.size == 0;
        match (spot, is_directory) {
            (_, true) if !is_empty => Err(self
                .archive
                .damaged(format!("{shown:?} has data, but is not a file"))),
            (Spot::At(path), true) => self.tree.directory(&path),
            (Spot::Target | Spot::Nowhere, _) => self.tree.count(),
            (Spot::At(path), false) if member.mode.is_symlink() => {
                let target = target(self.archive, member, &mut data, &shown)?;
                self.tree.symlink(&path, &target, self.length)
            }
            (Spot::At(_), false) if kind != REGULAR && kind != 0 => {
                let reason = "is not a file, directory or link; nothing else is unpacked";
                Err(self.archive.unsupported(&shown, reason.to_owned()))
            }
            (Spot::At(path), false) => {
                let is_executable = member.mode.permissions() & 0o111 != 0;
                let (archive, length) = (self.archive, self.length);
                let read = |buffer: &mut [u8]| match data.read(buffer) {
                    Ok(n) => Ok((n, length)),
                    Err(e) => Err(read_failed(archive, e)),
                };
                self.tree.file(&path, is_executable, member.size, read)
            }
        }
    }

    /// The bytes of a member, with an error at their end if their number or checksum is not that of the directory.
    fn data(&mut self, member: &Member, shown: &str) -> Result<Box<dyn Read + 'a>, ArchiveError> {
        let archive = self.archive;
        let entry = self.zip.get_entry(member.found).map_err(|e| failed(archive, e))?;
        let local = entry
            .local_header(&mut self.local)
            .map_err(|e| failed(archive, e))?;
        if local.file_path().as_bytes() != member.name {
            return Err(archive.damaged(format!("{shown:?} has another name in its own header")));
        }
        let end = entry.compressed_data_range().1;
        let before = self.used.range(..end).next_back().map(|(_, end)| *end);
        if before.is_some_and(|before| before > member.start) || end > self.zip.directory_offset() {
            return Err(archive.damaged(format!("{shown:?} shares its bytes with others")));
        }
        self.used.insert(member.start, end);
        let reader = BufReader::with_capacity(64 << 10, entry.reader());
        let decoded: Box<dyn Read + 'a> = match member.method {
            CompressionMethod::STORE => Box::new(reader),
            CompressionMethod::DEFLATE => Box::new(DeflateDecoder::new(reader)),
            CompressionMethod::ZSTD => {
                let decoder = zstd_decoder(reader, archive.limits[Limit::ZstdWindow]);
                Box::new(decoder.map_err(|e| read_failed(archive, e))?)
            }
            method => {
                let reason = format!("is compressed with {method}; stored, deflate and zstd are supported");
                return Err(archive.unsupported(shown, reason));
            }
        };
        Ok(Box::new(entry.verifying_reader(decoded)))
    }
}

/// A symlink's target, which is the data of the member.
fn target(
    archive: &Archive<'_>,
    member: &Member,
    data: &mut dyn Read,
    shown: &str,
) -> Result<Vec<u8>, ArchiveError> {
    if member.size > LONGEST_TARGET {
        return Err(archive.link(shown, b"", "its target is too long"));
    }
    let mut target = Vec::new();
    let read = data.take(LONGEST_TARGET + 1).read_to_end(&mut target);
    read.map_err(|e| read_failed(archive, e))?;
    Ok(target)
}
