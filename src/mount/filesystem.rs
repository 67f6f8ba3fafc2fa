//! What the kernel asks, and the answers. Questions about what is in memory are answered at once; all that needs the record
//! or a cache is answered by a task of its own, so that nobody waits for another reader's file.

use std::{
    collections::HashMap,
    ffi::OsStr,
    os::unix::fs::FileExt as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyStatfs, Request,
};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{
    catalog::{BY_INVOCATION, LATEST, OURS, STATUS, Slot},
    error::ReadError,
    interrupt::interrupted,
    prefetch,
    shared::Shared,
    store::Opened,
    tree::{Node, TOP, Tree, What},
};
use crate::{output::Class, units::show_duration};

/// How long the kernel may go by what it was told of a build, which does not change.
const LONG: Duration = Duration::from_secs(3600);
/// The same of what may change: which builds there are, and which is the newest.
const SHORT: Duration = Duration::from_secs(1);

/// The numbers of what is above the builds.
const ROOT: u32 = 1;
const ALL: u32 = 2;
const OWN: u32 = 3;
const TEXT: u32 = 4;
/// Of the first workspace's directory; its link has the next one.
const WORKSPACES: u32 = 16;

/// Read requests that the kernel may have under way ahead of readers.
const AHEAD: u16 = 64;

/// What an inode number stands for.
enum Place {
    Root,
    All,
    Own,
    Text,
    Workspace(usize),
    Latest(usize),
    Build(Arc<Slot>, Node),
}

impl Place {
    const fn kind(&self) -> Option<FileType> {
        match self {
            Self::Root | Self::All | Self::Own | Self::Workspace(_) | Self::Build(_, TOP) => {
                Some(FileType::Directory)
            }
            Self::Text => Some(FileType::RegularFile),
            Self::Latest(_) => Some(FileType::Symlink),
            Self::Build(..) => None,
        }
    }

    fn ino(&self) -> INodeNo {
        INodeNo(match self {
            Self::Root => u64::from(ROOT),
            Self::All => u64::from(ALL),
            Self::Own => u64::from(OWN),
            Self::Text => u64::from(TEXT),
            Self::Workspace(at) => u64::from(WORKSPACES) + 2 * *at as u64,
            Self::Latest(at) => u64::from(WORKSPACES) + 2 * *at as u64 + 1,
            Self::Build(slot, node) => u64::from(slot.number) << 32 | u64::from(*node),
        })
    }
}

/// One name in a directory.
struct Listed {
    place: Place,
    name: String,
}

/// Something open.
enum Open {
    /// Of a build that stays in memory as long.
    File(Opened, #[expect(dead_code, reason = "it is only held")] Arc<()>),
    /// A build's directory.
    Directory(#[expect(dead_code, reason = "it is only held")] Arc<()>),
    Text(Vec<u8>),
    /// Of a directory that may change: as it was when it was opened.
    List(Vec<Listed>),
}

/// The path of a build, as the status tells it.
fn path_of(slot: &Slot) -> String {
    format!("{BY_INVOCATION}/{}", slot.build.id)
}

/// Where a link to a build leads.
fn link_to(id: &str) -> String {
    format!("../{BY_INVOCATION}/{id}")
}

/// The file system.
pub(super) struct Mounted(Arc<Inner>, Option<oneshot::Sender<()>>);

struct Inner {
    shared: Arc<Shared>,
    runtime: tokio::runtime::Handle,
    open: Mutex<HashMap<u64, Arc<Open>>>,
    /// The number of what was opened last.
    opened: AtomicU64,
    mounted_at: SystemTime,
    owner: (u32, u32),
}

impl Mounted {
    /// Answers with what these have, on the current tokio runtime. Tells `ended` when the kernel asks nothing more.
    pub(super) fn new(shared: Arc<Shared>, ended: oneshot::Sender<()>) -> Self {
        let inner = Arc::new(Inner {
            shared,
            runtime: tokio::runtime::Handle::current(),
            open: Mutex::default(),
            opened: AtomicU64::new(0),
            mounted_at: SystemTime::now(),
            owner: (
                rustix::process::geteuid().as_raw(),
                rustix::process::getegid().as_raw(),
            ),
        });
        Self(inner, Some(ended))
    }
}

impl Inner {
    fn place(&self, ino: INodeNo) -> Option<Place> {
        let node = ino.0 as u32;
        match (ino.0 >> 32) as u32 {
            0 => Some(match node {
                ROOT => Place::Root,
                ALL => Place::All,
                OWN => Place::Own,
                TEXT => Place::Text,
                _ => {
                    let number = node.checked_sub(WORKSPACES)?;
                    let at = number as usize / 2;
                    if number % 2 == 0 {
                        Place::Workspace(at)
                    } else {
                        Place::Latest(at)
                    }
                }
            }),
            number => Some(Place::Build(self.shared.catalog.slot(number)?, node)),
        }
    }

    fn attr(&self, place: &Place) -> Option<FileAttr> {
        let (mut kind, mut size) = (place.kind(), 0);
        if let Place::Build(slot, node) = place
            && *node != TOP
        {
            let tree = slot.tree()?;
            kind = Some(match tree.what(*node)? {
                What::File(digest) => {
                    size = digest.size();
                    FileType::RegularFile
                }
                What::Link(target) => {
                    size = target.len() as u64;
                    FileType::Symlink
                }
                What::Directory => FileType::Directory,
            });
        }
        if let Place::Latest(at) = place {
            size = link_to(&self.shared.catalog.latest(*at)?).len() as u64;
        }
        let kind = kind?;
        let time = match place {
            Place::Build(slot, _) => {
                let ms = slot.build.settled_ms.max(slot.build.started_ms);
                UNIX_EPOCH + Duration::from_millis(ms.try_into().unwrap_or(0))
            }
            _ => self.mounted_at,
        };
        Some(FileAttr {
            ino: place.ino(),
            size,
            blocks: size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm: match (kind, place) {
                (FileType::Symlink, _) => 0o777,
                (_, Place::Text) => 0o444,
                _ => 0o555,
            },
            // Of a directory, 1 says that it does not tell how many directories are in it.
            nlink: 1,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: 128 << 10,
            flags: 0,
        })
    }

    /// How long the kernel may remember a name.
    const fn lasts(place: &Place) -> Duration {
        match place {
            Place::Build(_, node) if *node != TOP => LONG,
            _ => SHORT,
        }
    }

    fn entry(&self, place: Option<Place>, reply: ReplyEntry) {
        match place.and_then(|place| Some((self.attr(&place)?, Self::lasts(&place)))) {
            Some((attr, lasts)) => reply.entry(&lasts, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// What has this name in a directory of a build.
    fn entry_in(&self, slot: &Arc<Slot>, tree: &Tree, directory: Node, name: &str, reply: ReplyEntry) {
        match tree.find(directory, name) {
            Some(node) => self.entry(Some(Place::Build(slot.clone(), node)), reply),
            None => {
                // A compiler looks for each header in many directories: the kernel remembers where there is none.
                if let Some(mut attr) = self.attr(&Place::Root) {
                    attr.ino = INodeNo(0);
                    reply.entry(&LONG, &attr, Generation(0));
                }
            }
        }
    }

    /// Reads the list of builds again. An error only where nothing is known that could be shown instead.
    async fn refresh(&self) -> Result<(), Errno> {
        let Err(reason) = self.shared.catalog.refresh(false).await else {
            return Ok(());
        };
        self.shared.report.failed("the list of builds", &reason.0);
        if self.shared.catalog.builds().is_empty() {
            Err(Errno::EIO)
        } else {
            Ok(())
        }
    }

    /// What has this name in a directory above the builds.
    async fn find(&self, parent: &Place, name: &str) -> Result<Option<Place>, Errno> {
        let catalog = &self.shared.catalog;
        Ok(match (parent, name) {
            (Place::Root, BY_INVOCATION) => Some(Place::All),
            (Place::Root, OURS) => Some(Place::Own),
            (Place::Own, STATUS) => Some(Place::Text),
            (Place::Root, name) => {
                self.refresh().await?;
                let mut all = catalog.workspaces().into_iter();
                all.find(|(_, known)| known == name)
                    .map(|(at, _)| Place::Workspace(at))
            }
            (Place::All, id) => {
                self.refresh().await?;
                catalog.build(id).map(|slot| Place::Build(slot, TOP))
            }
            (Place::Workspace(at), LATEST) => {
                self.refresh().await?;
                catalog.latest(*at).map(|_| Place::Latest(*at))
            }
            _ => None,
        })
    }

    /// What is in a directory above the builds.
    async fn list(&self, place: &Place) -> Result<Vec<Listed>, Errno> {
        let listed = |place, name: &str| Listed {
            place,
            name: name.to_owned(),
        };
        let catalog = &self.shared.catalog;
        Ok(match place {
            Place::Root => {
                self.refresh().await?;
                let mut all = vec![listed(Place::Own, OURS), listed(Place::All, BY_INVOCATION)];
                let workspaces = catalog.workspaces().into_iter();
                all.extend(workspaces.map(|(at, name)| listed(Place::Workspace(at), &name)));
                all
            }
            Place::All => {
                self.refresh().await?;
                let builds = catalog.builds().into_iter();
                builds
                    .map(|slot| {
                        let name = slot.build.id.clone();
                        listed(Place::Build(slot, TOP), &name)
                    })
                    .collect()
            }
            Place::Own => vec![listed(Place::Text, STATUS)],
            Place::Workspace(at) => vec![listed(Place::Latest(*at), LATEST)],
            _ => return Err(Errno::ENOTDIR),
        })
    }

    /// What work comes to that needs the record, as long as the thread that asks waits for it. It goes on in any case.
    async fn in_time<T: Send + 'static>(
        &self,
        thread: u32,
        path: &str,
        work: impl Future<Output = Result<T, Errno>> + Send + 'static,
    ) -> Result<T, Errno> {
        let task = tokio::spawn(work);
        tokio::select! {
            done = tokio::time::timeout(self.shared.timeout, task) => match done {
                Ok(Ok(done)) => done,
                Ok(Err(error)) => {
                    self.shared.report.failed(path, &error.to_string());
                    Err(Errno::EIO)
                }
                Err(_) => {
                    let limit = show_duration(self.shared.timeout);
                    let reason = format!("the record did not answer within {limit} (--timeout); try again later");
                    self.shared.report.failed(path, &reason);
                    Err(Errno::EIO)
                }
            },
            () = interrupted(thread) => Err(Errno::EINTR),
        }
    }

    /// A build's tree; that it cannot be read is told.
    async fn tree(&self, slot: &Arc<Slot>) -> Result<Arc<Tree>, Errno> {
        let path = path_of(slot);
        self.shared.catalog.tree(slot).await.map_err(|reason| {
            self.shared.report.failed(&path, &reason.0);
            Errno::EIO
        })
    }

    fn opened(&self, what: Open, flags: FopenFlags, reply: ReplyOpen) {
        let number = self.opened.fetch_add(1, Ordering::Relaxed) + 1;
        self.open.lock().insert(number, Arc::new(what));
        reply.opened(FileHandle(number), flags);
    }

    fn handle(&self, handle: FileHandle) -> Option<Arc<Open>> {
        self.open.lock().get(&handle.0).cloned()
    }

    /// Opens a file that must be fetched first.
    async fn fetch(&self, slot: Arc<Slot>, tree: Arc<Tree>, node: Node, pid: u32, reply: ReplyOpen) {
        let Some(blob) = self.shared.blob(&slot, &tree, node) else {
            let path = format!("{}/{}", path_of(&slot), tree.path(node));
            self.shared
                .report
                .failed(&path, "it is not the path of an output");
            reply.error(Errno::EIO);
            return;
        };
        let path = format!("{}/{}", path_of(&slot), blob.path);
        let waiting = self.shared.report.waits(path);
        let limit = self.shared.timeout;
        let got = tokio::select! {
            got = tokio::time::timeout(limit, self.shared.store.bring(&blob, Class::Required)) => {
                got.unwrap_or(Err(ReadError::Late(limit)))
            }
            () = interrupted(pid) => Err(ReadError::Interrupted),
        };
        waiting.ended(got.as_ref().err());
        match got {
            Ok(file) => {
                let file = Open::File(file, slot.pin());
                self.opened(file, FopenFlags::FOPEN_KEEP_CACHE, reply);
                prefetch::siblings(&self.shared, &slot, &tree, node);
            }
            Err(error) => reply.error(error.errno()),
        }
    }

    /// Calls `add` for what is in a directory, from the entry with this number on, until it says that there is no more room.
    fn read_directory(
        &self,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut add: impl FnMut(u64, &str, &FileAttr, Duration) -> bool,
    ) -> Result<(), Errno> {
        let place = self.place(ino).ok_or(Errno::ESTALE)?;
        let own = self.attr(&place).ok_or(Errno::ESTALE)?;
        let open = self.handle(handle);
        let skipped = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, name) in [".", ".."].into_iter().enumerate().skip(skipped) {
            if add(at as u64 + 1, name, &own, Duration::ZERO) {
                return Ok(());
            }
        }
        let numbers = skipped.max(2) as u64 + 1..;
        let skipped = skipped.saturating_sub(2);
        let mut full = |number, name: &str, place: Place| {
            let attr = self.attr(&place);
            attr.is_some_and(|attr| add(number, name, &attr, Self::lasts(&place)))
        };
        match (&place, open.as_deref()) {
            (_, Some(Open::List(list))) => {
                for (number, listed) in numbers.zip(list.iter().skip(skipped)) {
                    let again = self.place(listed.place.ino());
                    if again.is_some_and(|place| full(number, &listed.name, place)) {
                        break;
                    }
                }
            }
            (Place::Build(slot, node), _) => {
                let tree = slot.tree().ok_or(Errno::ESTALE)?;
                let children = tree.children(*node).get(skipped..).unwrap_or_default();
                for (number, child) in numbers.zip(children) {
                    if full(number, tree.name(*child), Place::Build(slot.clone(), *child)) {
                        break;
                    }
                }
            }
            _ => return Err(Errno::EBADF),
        }
        Ok(())
    }
}

impl Filesystem for Mounted {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // What a kernel does not know is done without.
        for wish in [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
        ] {
            let _ = config.add_capabilities(wish);
        }
        let _ = config.set_max_background(AHEAD);
        Ok(())
    }

    fn destroy(&mut self) {
        if let Some(ended) = self.1.take() {
            let _ = ended.send(());
        }
        if !self.0.shared.is_running.load(Ordering::Acquire) {
            return;
        }
        // At its end the session would unmount whatever is mounted there by then. This thread ends with the process.
        loop {
            std::thread::park();
        }
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let Some(name) = name.to_str() else {
            return reply.error(Errno::ENOENT);
        };
        let place = match self.0.place(parent) {
            None => return reply.error(Errno::ESTALE),
            Some(Place::Build(slot, node)) if slot.tree().is_some() => {
                if let Some(tree) = slot.tree() {
                    self.0.entry_in(&slot, tree, node, name, reply);
                }
                return;
            }
            Some(place) => place,
        };
        let (inner, name, thread) = (self.0.clone(), name.to_owned(), request.pid());
        self.0.runtime.spawn(async move {
            let work = inner.clone();
            if let Place::Build(slot, node) = place {
                let of = slot.clone();
                let path = path_of(&slot);
                match inner
                    .in_time(thread, &path, async move { work.tree(&of).await })
                    .await
                {
                    Ok(tree) => inner.entry_in(&slot, &tree, node, &name, reply),
                    Err(errno) => reply.error(errno),
                }
                return;
            }
            let path = name.clone();
            let found = inner.in_time(thread, &path, async move { work.find(&place, &name).await });
            match found.await {
                Ok(found) => inner.entry(found, reply),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let place = self.0.place(ino);
        match place.and_then(|place| Some((self.0.attr(&place)?, Inner::lasts(&place)))) {
            Some((attr, lasts)) => reply.attr(&lasts, &attr),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match self.0.place(ino) {
            Some(Place::Latest(at)) => match self.0.shared.catalog.latest(at) {
                Some(id) => reply.data(link_to(&id).as_bytes()),
                None => reply.error(Errno::ENOENT),
            },
            Some(Place::Build(slot, node)) => match slot.tree().and_then(|tree| tree.what(node)) {
                Some(What::Link(target)) => reply.data(target.as_bytes()),
                _ => reply.error(Errno::EINVAL),
            },
            _ => reply.error(Errno::EINVAL),
        }
    }

    fn open(&self, request: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let (slot, node) = match self.0.place(ino) {
            Some(Place::Text) => {
                let text = self.0.shared.status().into_bytes();
                return self
                    .0
                    .opened(Open::Text(text), FopenFlags::FOPEN_DIRECT_IO, reply);
            }
            Some(Place::Build(slot, node)) => (slot, node),
            _ => return reply.error(Errno::ESTALE),
        };
        let Some(tree) = slot.tree().cloned() else {
            return reply.error(Errno::ESTALE);
        };
        let Some(What::File(digest)) = tree.what(node) else {
            return reply.error(Errno::EINVAL);
        };
        if let Some(file) = self.0.shared.store.ready(digest) {
            let file = Open::File(file, slot.pin());
            return self.0.opened(file, FopenFlags::FOPEN_KEEP_CACHE, reply);
        }
        let (inner, pid) = (self.0.clone(), request.pid());
        self.0
            .runtime
            .spawn(async move { inner.fetch(slot, tree, node, pid, reply).await });
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.0.handle(handle).as_deref() {
            Some(Open::File(opened, _)) => {
                let mut bytes = vec![0; size as usize];
                let mut got = 0;
                while got < bytes.len() {
                    match opened.file.read_at(&mut bytes[got..], offset + got as u64) {
                        Ok(0) => break,
                        Ok(more) => got += more,
                        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                        Err(error) => return reply.error(error.into()),
                    }
                }
                reply.data(&bytes[..got]);
            }
            Some(Open::Text(text)) => {
                let rest = text.get(usize::try_from(offset).unwrap_or(usize::MAX)..);
                let rest = rest.unwrap_or_default();
                reply.data(&rest[..rest.len().min(size as usize)]);
            }
            _ => reply.error(Errno::EBADF),
        }
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.0.open.lock().remove(&handle.0);
        reply.ok();
    }

    // There is nothing to write, and the kernel does not ask again.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let unchanging = FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE;
        let place = match self.0.place(ino) {
            None => return reply.error(Errno::ESTALE),
            Some(Place::Build(slot, _)) if slot.tree().is_some() => {
                return self.0.opened(Open::Directory(slot.pin()), unchanging, reply);
            }
            Some(place) => place,
        };
        let (inner, thread) = (self.0.clone(), request.pid());
        self.0.runtime.spawn(async move {
            let work = inner.clone();
            if let Place::Build(slot, _) = place {
                let (pin, path) = (slot.pin(), path_of(&slot));
                match inner
                    .in_time(thread, &path, async move { work.tree(&slot).await })
                    .await
                {
                    Ok(_) => inner.opened(Open::Directory(pin), unchanging, reply),
                    Err(errno) => reply.error(errno),
                }
                return;
            }
            let list = inner.in_time(
                thread,
                "the list of builds",
                async move { work.list(&place).await },
            );
            match list.await {
                Ok(list) => inner.opened(Open::List(list), FopenFlags::empty(), reply),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn readdir(&self, _: &Request, ino: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let added = self
            .0
            .read_directory(ino, handle, offset, |number, name, attr, _| {
                reply.add(attr.ino, number, attr.kind, name)
            });
        match added {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdirplus(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let added = self
            .0
            .read_directory(ino, handle, offset, |number, name, attr, lasts| {
                reply.add(attr.ino, number, name, &lasts, attr, Generation(0))
            });
        match added {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.0.open.lock().remove(&handle.0);
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let (_, bound) = self.0.shared.store.filled();
        reply.statfs(bound / 4096, 0, 0, 0, 0, 4096, 255, 4096);
    }
}
