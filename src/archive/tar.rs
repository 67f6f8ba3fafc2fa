//! Tars, as they come.

use std::{
    io::{self, Read},
    rc::Rc,
};

use ::tar::{Entry, EntryType};

use super::{
    Archive, ArchiveError, Limit, Mode, Staging, Unpacked,
    decode::{BLOCK, Decoded, Watch},
    flatten::{MANIFEST, Manifest},
    member::{self, Naming, Spot},
    pax,
    tree::Tree,
};

/// The type of a member that is only a name for the whole archive (`tar --label`).
const LABEL: u8 = b'V';

/// How many zeros at the end of a tar are nothing to count: they fill its last record.
const PADDING: u64 = 64 << 10;

/// One archive while it is unpacked.
struct Unpacking<'a> {
    archive: &'a Archive<'a>,
    watch: &'a Watch,
    tree: Tree<'a>,
    /// With [`Mode::Flatten`]; `None` before the first member.
    manifest: Option<Manifest>,
}

/// Unpacks a tar as it comes, to the proper end of it and of its compressor, and reads `source` to its end.
///
/// # Errors
/// When `source` fails ([`ArchiveError::Source`]), or anything in the archive is damaged, not allowed or over a limit.
/// The [`Staging`] must not be published then.
pub(crate) fn unpack(
    source: impl Read,
    archive: &Archive<'_>,
    staging: &Staging,
) -> Result<Unpacked, ArchiveError> {
    let watch = Rc::new(Watch::default());
    let decoded = Decoded::new(source, archive, &watch)?;
    let mut tar = ::tar::Archive::new(decoded);
    let mut unpacking = Unpacking {
        archive,
        watch: &watch,
        tree: Tree::new(staging, *archive),
        manifest: None,
    };
    let error = |e| watch.error(e, archive);
    watch.allow(Some(archive.limits[Limit::Header]));
    let mut entries = tar.entries().map_err(error)?;
    loop {
        watch.allow(Some(archive.limits[Limit::Header]));
        let Some(entry) = entries.next() else { break };
        let mut entry = entry.map_err(error)?;
        unpacking.member(&mut entry)?;
    }
    watch.allow(None);
    unpacking.end(tar.into_inner())?;
    if matches!(archive.mode, Mode::Flatten) && unpacking.manifest.is_none() {
        return Err(no_manifest(archive));
    }
    Ok(unpacking.tree.finish())
}

fn no_manifest(archive: &Archive<'_>) -> ArchiveError {
    ArchiveError::Manifest {
        archive: archive.name.to_owned(),
        reason: format!("its first member is not {MANIFEST}"),
    }
}

/// What a member is to us.
enum Kind {
    File,
    Directory,
    Symlink,
    HardLink,
}

impl Unpacking<'_> {
    /// Sees to it that a tar has its end: two blocks of zeros, of which one was read, and nothing but zeros after them. A
    /// tar that was cut between two members is like a shorter one but for that. More zeros than tars are padded with count
    /// like the bytes of a file.
    fn end(&mut self, mut rest: Decoded<'_>) -> Result<(), ArchiveError> {
        let (archive, watch) = (self.archive, self.watch);
        let cut = || archive.damaged("it is cut off: its end is missing".to_owned());
        if watch.ended.get() {
            return Err(cut());
        }
        let mut zeros: u64 = 0;
        let mut buffer = vec![0; 64 << 10];
        loop {
            let n = match rest.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(watch.error(e, archive)),
            };
            if buffer[..n].iter().any(|byte| *byte != 0) {
                return Err(archive.damaged("something follows its end".to_owned()));
            }
            zeros = zeros.saturating_add(n as u64);
            if zeros > PADDING {
                self.tree.spend(n as u64, watch.read.get())?;
            }
        }
        if zeros < BLOCK {
            return Err(cut());
        }
        Ok(())
    }

    fn member<R: Read>(&mut self, entry: &mut Entry<'_, R>) -> Result<(), ArchiveError> {
        let name = entry.path_bytes().into_owned();
        let shown = String::from_utf8_lossy(&name).into_owned();
        let kind = entry.header().entry_type();
        let is_global = kind.is_pax_global_extensions();
        if entry.pax_extensions().map_err(|e| self.error(e))?.is_some() {
            let extended = self.watch.extended_header();
            let extended = extended.ok_or_else(|| {
                self.archive.damaged(format!(
                    "the extended header of {shown:?} is not where it should be"
                ))
            })?;
            pax::judge(self.archive, &shown, &extended, is_global)?;
        }
        if is_global {
            if name != *entry.header().path_bytes() {
                return Err(self
                    .archive
                    .damaged(format!("a long name, {shown:?}, is of no member")));
            }
            // Else its data would be read with the next member's headers.
            self.watch.allow(None);
            io::copy(entry, &mut io::sink()).map_err(|e| self.error(e))?;
            return self.tree.count();
        }
        self.watch.allow(None);
        if kind.as_byte() == LABEL && entry.size() == 0 {
            return self.tree.count();
        }
        let kind = self.kind(kind, &name, entry.size(), &shown)?;
        if matches!(self.archive.mode, Mode::Flatten) && self.manifest.is_none() {
            return self.manifest(&name, &kind, entry);
        }
        let spot = self.spot(&name, matches!(kind, Kind::Directory))?;
        let path = match spot {
            Spot::At(path) => path,
            Spot::Target if matches!(kind, Kind::Directory) => return self.tree.count(),
            Spot::Target | Spot::Nowhere => return self.leave_out(entry),
        };
        let target = entry.link_name_bytes().map(std::borrow::Cow::into_owned);
        let target = target.unwrap_or_default();
        match kind {
            Kind::Directory => self.tree.directory(&path),
            Kind::Symlink => self.tree.symlink(&path, &target, self.watch.read.get()),
            Kind::HardLink => match self.spot(&target, false)? {
                Spot::At(to) => self.tree.hard_link(&path, &to, self.watch.read.get()),
                Spot::Target | Spot::Nowhere => Err(self.archive.link(
                    path.as_str(),
                    &target,
                    "its target is not among the files that are unpacked",
                )),
            },
            Kind::File => {
                // Any of them, as `--flatten` does, and as Bazel does for its own outputs.
                let is_executable = entry.header().mode().map_err(|e| self.error(e))? & 0o111 != 0;
                let size = entry.size();
                let (archive, watch) = (self.archive, self.watch);
                let read = |buffer: &mut [u8]| match entry.read(buffer) {
                    Ok(n) => Ok((n, watch.read.get())),
                    Err(e) => Err(watch.error(e, archive)),
                };
                self.tree.file(&path, is_executable, size, read)
            }
        }
    }

    /// What a member is, if it can be unpacked.
    fn kind(&self, kind: EntryType, name: &[u8], size: u64, shown: &str) -> Result<Kind, ArchiveError> {
        let unsupported = |what: &str| {
            let reason = format!("is {what}; only files, directories and links are unpacked");
            Err(self.archive.unsupported(shown, reason))
        };
        let kind = match kind {
            // Tars of old have directories as files with a slash.
            EntryType::Regular if name.ends_with(b"/") => Kind::Directory,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => return Ok(Kind::File),
            EntryType::Directory => Kind::Directory,
            EntryType::Symlink => Kind::Symlink,
            EntryType::Link => Kind::HardLink,
            EntryType::Char | EntryType::Block => return unsupported("a device"),
            EntryType::Fifo => return unsupported("a named pipe"),
            other => return unsupported(&format!("of the type {:?}", char::from(other.as_byte()))),
        };
        if size != 0 {
            return Err(self
                .archive
                .damaged(format!("{shown:?} has data, but is not a file")));
        }
        Ok(kind)
    }

    fn spot(&self, name: &[u8], is_directory: bool) -> Result<Spot, ArchiveError> {
        let naming = match (self.archive.mode, &self.manifest) {
            (Mode::Flatten, Some(manifest)) => Naming::Flatten(manifest),
            (Mode::Flatten, None) => return Err(no_manifest(self.archive)),
            (Mode::Extract { strip_components }, _) => Naming::Strip(*strip_components),
        };
        member::spot(self.archive, &naming, name, is_directory)
    }

    /// Reads the first member, which is not unpacked.
    fn manifest<R: Read>(
        &mut self,
        name: &[u8],
        kind: &Kind,
        entry: &mut Entry<'_, R>,
    ) -> Result<(), ArchiveError> {
        let is_it = matches!(kind, Kind::File) && member::text(self.archive, name, false)? == MANIFEST;
        if !is_it {
            return Err(no_manifest(self.archive));
        }
        let most = self.archive.limits[Limit::Manifest];
        if entry.size() > most {
            return Err(self.archive.over(Limit::Manifest));
        }
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).map_err(|e| self.error(e))?;
        if (bytes.len() as u64) < entry.size() {
            return Err(self.archive.damaged(format!("it is cut off in {MANIFEST}")));
        }
        self.manifest = Some(Manifest::parse(self.archive, &bytes)?);
        self.tree.count()
    }

    /// Passes over a member. Its bytes count as if they were written.
    fn leave_out<R: Read>(&mut self, entry: &mut Entry<'_, R>) -> Result<(), ArchiveError> {
        self.tree.count()?;
        let mut buffer = vec![0; 64 << 10];
        loop {
            match entry.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => self.tree.spend(n as u64, self.watch.read.get())?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.error(e)),
            }
        }
    }

    fn error(&self, error: io::Error) -> ArchiveError {
        self.watch.error(error, self.archive)
    }
}
