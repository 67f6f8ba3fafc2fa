//! Compressors: from the bytes of an archive to those of the tar in it.

use std::{
    cell::{Cell, RefCell},
    io::{self, BufRead, BufReader, Read},
    rc::Rc,
};

use ::tar::{EntryType, Header};
use flate2::bufread::GzDecoder;
use liblzma::{bufread::XzDecoder, stream};
use zstd::zstd_safe;

use super::{Archive, ArchiveError, Format, Limit};

const BUFFER: usize = 128 << 10;
/// How many of an archive's first bytes are kept.
const FIRST: usize = 64;

/// The size of a header of a tar; everything in one has a multiple of it.
pub(super) const BLOCK: u64 = 512;

/// zstd's number for a window over the limit: `ZSTD_error_frameParameter_windowTooLarge` of `zstd_errors.h`.
const WINDOW_TOO_LARGE: usize = 16;

/// What is known of an archive's bytes while they are read.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// How many were read.
    pub(super) read: Cell<u64>,
    /// The first of them.
    first: RefCell<Vec<u8>>,
    /// Whether they could not be read to their end.
    failed: Cell<bool>,
    /// How many bytes of the tar may still be read before its next member; `None` while a member is read.
    allowed: Cell<Option<u64>>,
    /// How many bytes of the tar were read.
    tar: Cell<u64>,
    /// Those that were read before the next member, and how many of them only fill the last block of the one before.
    headers: RefCell<Vec<u8>>,
    filling: Cell<u64>,
    over: Cell<bool>,
    /// Whether the tar's bytes have ended.
    pub(super) ended: Cell<bool>,
}

impl Watch {
    /// From here on, headers are read, of at most this many bytes; `None` is the data of a member.
    pub(super) fn allow(&self, bytes: Option<u64>) {
        self.allowed.set(bytes);
        if bytes.is_some() {
            self.headers.borrow_mut().clear();
            let read = self.tar.get();
            self.filling.set(read.next_multiple_of(BLOCK) - read);
        }
    }

    /// The extended header among those that were just read. Of that, the tar library shows only what it makes of it.
    pub(super) fn extended_header(&self) -> Option<Vec<u8>> {
        let headers = self.headers.borrow();
        let mut rest = headers.get(usize::try_from(self.filling.get()).ok()?..)?;
        loop {
            let (block, data) = rest.split_at_checked(usize::try_from(BLOCK).ok()?)?;
            let header = Header::from_byte_slice(block);
            let size = usize::try_from(header.entry_size().ok()?).ok()?;
            match header.entry_type() {
                EntryType::XHeader | EntryType::XGlobalHeader => return Some(data.get(..size)?.to_vec()),
                EntryType::GNULongName | EntryType::GNULongLink => {
                    rest = data.get(size.checked_next_multiple_of(block.len())?..)?;
                }
                _ => return None,
            }
        }
    }

    /// What an error means that came with reading.
    pub(super) fn error(&self, error: io::Error, archive: &Archive<'_>) -> ArchiveError {
        if self.failed.get() {
            let archive = archive.name.to_owned();
            return ArchiveError::Source {
                archive,
                source: error,
            };
        }
        let is_xz_memory = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<stream::Error>())
            .is_some_and(|error| *error == stream::Error::MemLimit);
        if self.over.get() {
            archive.over(Limit::Header)
        } else if is_xz_memory {
            archive.over(Limit::XzMemory)
        } else if archive.format == Format::TarZst && is_large_window(&error) {
            archive.over(Limit::ZstdWindow)
        } else {
            // What has begun well is what its name says.
            let what = match self.tar.get() {
                0 => what_it_is(&self.first.borrow(), archive.format),
                _ => "",
            };
            archive.damaged(format!("{error}{what}"))
        }
    }
}

/// What an archive that cannot be read is instead, by its first bytes; empty where they are what the name says.
fn what_it_is(first: &[u8], format: Format) -> &'static str {
    const FORMATS: &[(&[u8], Format, &str)] = &[
        (
            b"\x1f\x8b",
            Format::TarGz,
            "; it is a gzip file, whatever its name says",
        ),
        (
            b"\x28\xb5\x2f\xfd",
            Format::TarZst,
            "; it is a zstd file, whatever its name says",
        ),
        (
            b"\xfd7zXZ\0",
            Format::TarXz,
            "; it is an xz file, whatever its name says",
        ),
        (
            b"PK\x03\x04",
            Format::Zip,
            "; it is a zip file, whatever its name says",
        ),
    ];
    let text = first.trim_ascii_start();
    if first.is_empty() {
        "; it is empty"
    } else if let Some((_, of, what)) = FORMATS.iter().find(|(magic, ..)| first.starts_with(magic)) {
        if *of == format { "" } else { what }
    } else if first.starts_with(b"BZh") {
        "; it is a bzip2 file, which cannot be unpacked"
    } else if text.starts_with(b"<") {
        "; it looks like a page in HTML or XML, such as of a login"
    } else if format == Format::Tar {
        ""
    } else {
        "; it is not compressed like that: a browser or a proxy may have unpacked it"
    }
}

/// Whether zstd says that a frame has a larger window than is allowed. It has nothing but words for that.
pub(super) fn is_large_window(error: &io::Error) -> bool {
    error.to_string() == zstd_safe::get_error_name(0_usize.wrapping_sub(WINDOW_TOO_LARGE))
}

/// The archive's bytes.
struct Source<R> {
    inner: R,
    watch: Rc<Watch>,
}

impl<R: Read> Read for Source<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.inner.read(buffer) {
                Ok(n) => {
                    let mut first = self.watch.first.borrow_mut();
                    let more = n.min(FIRST - first.len());
                    first.extend_from_slice(&buffer[..more]);
                    drop(first);
                    self.watch.read.set(self.watch.read.get() + n as u64);
                    return Ok(n);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.watch.failed.set(true);
                    return Err(error);
                }
            }
        }
    }
}

/// The tar's bytes, up to the end of the last stream of the compressor, and no further than is allowed.
pub(super) struct Decoded<'a> {
    inner: Box<dyn Read + 'a>,
    watch: Rc<Watch>,
}

impl<'a> Decoded<'a> {
    pub(super) fn new(
        source: impl Read + 'a,
        archive: &Archive<'_>,
        watch: &Rc<Watch>,
    ) -> Result<Self, ArchiveError> {
        let source = Source {
            inner: source,
            watch: Rc::clone(watch),
        };
        let source = BufReader::with_capacity(BUFFER, source);
        let error = |error| watch.error(error, archive);
        let inner: Box<dyn Read + 'a> = match archive.format {
            Format::Tar => Box::new(source),
            Format::TarGz => Box::new(Streams::new(GzDecoder::new(source), |decoder| {
                let rest = rest(decoder.into_inner())?;
                Ok(rest.map(GzDecoder::new))
            })),
            Format::TarZst => {
                let window = archive.limits[Limit::ZstdWindow];
                let one = move |source: BufReader<Source<_>>| -> io::Result<_> {
                    Ok(zstd_decoder(source, window)?.single_frame())
                };
                Box::new(Streams::new(one(source).map_err(error)?, move |decoder| {
                    rest(decoder.finish())?.map(one).transpose()
                }))
            }
            Format::TarXz => {
                let stream =
                    stream::Stream::new_stream_decoder(archive.limits[Limit::XzMemory], stream::CONCATENATED)
                        .map_err(|e| error(e.into()))?;
                Box::new(XzDecoder::new_stream(source, stream))
            }
            Format::Zip => return Err(archive.damaged("a zip file cannot be read as it comes".to_owned())),
        };
        let watch = Rc::clone(watch);
        Ok(Self { inner, watch })
    }
}

/// What several streams of a compressor hold, one after the other.
struct Streams<D, N> {
    now: Option<D>,
    /// The decoder of what follows a stream; `None` at the end.
    next: N,
}

impl<D: Read, N: FnMut(D) -> io::Result<Option<D>>> Streams<D, N> {
    const fn new(first: D, next: N) -> Self {
        let now = Some(first);
        Self { now, next }
    }
}

impl<D: Read, N: FnMut(D) -> io::Result<Option<D>>> Read for Streams<D, N> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(decoder) = &mut self.now {
            let n = decoder.read(buffer)?;
            if n > 0 || buffer.is_empty() {
                return Ok(n);
            }
            if let Some(ended) = self.now.take() {
                self.now = (self.next)(ended)?;
            }
        }
        Ok(0)
    }
}

/// What follows a stream, if that is another one. Zeros are nothing: programs that write whole records fill the last one so
/// (bsdtar to a pipe), and decompressors pass over them.
fn rest<R: BufRead>(mut source: R) -> io::Result<Option<R>> {
    if !matches!(source.fill_buf()?, [0, ..]) {
        return Ok((!source.fill_buf()?.is_empty()).then_some(source));
    }
    loop {
        let zeros = source.fill_buf()?;
        if zeros.iter().any(|byte| *byte != 0) {
            return Err(io::Error::other("something follows its end"));
        }
        let n = zeros.len();
        if n == 0 {
            return Ok(None);
        }
        source.consume(n);
    }
}

/// A decoder of all frames, with a limit for the window in bytes.
pub(super) fn zstd_decoder<'a, R: io::BufRead>(
    source: R,
    window: u64,
) -> io::Result<zstd::stream::read::Decoder<'a, R>> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(source)?;
    // From 1 KiB to 2 GiB: zstd takes no others.
    decoder.window_log_max(window.max(1).ilog2().clamp(10, 31))?;
    Ok(decoder)
}

impl Read for Decoded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut wanted = buffer.len();
        if let Some(allowed) = self.watch.allowed.get() {
            wanted = wanted.min(usize::try_from(allowed).unwrap_or(usize::MAX));
            if wanted == 0 && !buffer.is_empty() {
                self.watch.over.set(true);
                return Err(io::Error::other("the headers of a member are too long"));
            }
        }
        let n = self.inner.read(&mut buffer[..wanted])?;
        if n == 0 && wanted > 0 {
            self.watch.ended.set(true);
        }
        self.watch.tar.set(self.watch.tar.get() + n as u64);
        if let Some(allowed) = self.watch.allowed.get() {
            self.watch.allowed.set(Some(allowed.saturating_sub(n as u64)));
            self.watch.headers.borrow_mut().extend_from_slice(&buffer[..n]);
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bytes_say_what_an_archive_is_instead() {
        for (first, format, said) in [
            (&b"\x1f\x8b\x08"[..], Format::TarGz, ""),
            (b"\x1f\x8b\x08", Format::Tar, "gzip"),
            (b"\x28\xb5\x2f\xfd", Format::TarXz, "zstd"),
            (b"\xfd7zXZ\0", Format::TarZst, "xz"),
            (b"PK\x03\x04", Format::TarGz, "zip"),
            (b"BZh9", Format::TarGz, "bzip2"),
            (b" \n<!DOCTYPE html>", Format::TarGz, "HTML"),
            (b"dir/file", Format::TarGz, "not compressed"),
            (b"dir/file", Format::Tar, ""),
            (b"", Format::TarZst, "empty"),
        ] {
            let what = what_it_is(first, format);
            assert!(
                what.contains(said) && what.is_empty() == said.is_empty(),
                "{first:?} {format:?}: {what}"
            );
        }
    }
}
