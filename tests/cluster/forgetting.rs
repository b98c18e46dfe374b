//! A file system in memory that forgets what was not synced.
//!
//! - What a file holds is what was in it at its last `fsync` or `fdatasync`; the names in a
//!   directory are those of the directory's own last `fsync`. Stricter than most file systems, which
//!   sync a file's name with the file; POSIX promises no more.
//! - [`Disk::cut`] is the power cut, once the process that used it is dead. It forgets either all
//!   that was not synced, or some of it, page by page and in no order, as a disk that was writing
//!   back on its own would.
//! - Nothing is kept in the kernel's caches (direct I/O, names and attributes of no duration), so
//!   that it may stay mounted over a cut.
//!
//! `sync_file_range` does not reach a file system at all: sled's own flush makes nothing durable
//! here.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs,
    ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use rand::Rng;
use rand::rngs::StdRng;

const PAGE_BYTES: usize = 4096;
const ROOT: u64 = 1;
/// Of names and attributes: not kept.
const NEVER: Duration = Duration::ZERO;

/// What a power cut does with what was not synced.
pub enum Cut<'a> {
    ForgetsAll,
    /// Each page, size and directory by chance.
    ForgetsSome(&'a mut StdRng),
}

/// A mounted file system; unmounted when it is dropped.
pub struct Disk {
    tree: Arc<Mutex<Tree>>,
    hangs: Arc<Hangs>,
    _session: BackgroundSession,
}

/// While it is true, syncs wait.
#[derive(Default)]
struct Hangs(Mutex<bool>, Condvar);

impl Hangs {
    fn set(&self, hangs: bool) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = hangs;
        self.1.notify_all();
    }

    fn wait(&self) {
        let hangs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.1.wait_while(hangs, |hangs| *hangs));
    }
}

struct Tree {
    inodes: BTreeMap<u64, Inode>,
    next: u64,
    syncs: u64,
    /// Answers syncs and does nothing: the proof that the tests notice.
    lies: bool,
    /// How long a sync takes.
    slow: Duration,
}

enum Inode {
    Dir { names: BTreeMap<OsString, u64>, synced: BTreeMap<OsString, u64> },
    File(File),
}

#[derive(Default)]
struct File {
    data: Vec<u8>,
    synced: Vec<u8>,
    /// Pages that were written since.
    dirty: BTreeSet<usize>,
}

impl File {
    fn write(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset + bytes.len();
        if self.data.len() < end {
            self.resize(end);
        }
        self.data[offset..end].copy_from_slice(bytes);
        self.dirty.extend(offset / PAGE_BYTES..end.div_ceil(PAGE_BYTES));
    }

    fn resize(&mut self, size: usize) {
        let (low, high) = (self.data.len().min(size), self.data.len().max(size));
        self.data.resize(size, 0);
        self.dirty.extend(low / PAGE_BYTES..high.div_ceil(PAGE_BYTES));
    }

    fn sync(&mut self) {
        self.synced.resize(self.data.len(), 0);
        for page in std::mem::take(&mut self.dirty) {
            copy_page(&self.data, &mut self.synced, page);
        }
    }

    fn cut(&mut self, cut: &mut Cut) {
        if let Cut::ForgetsSome(rng) = cut {
            if rng.random() {
                self.synced.resize(self.data.len(), 0);
            }
            for page in &self.dirty {
                if rng.random() {
                    copy_page(&self.data, &mut self.synced, *page);
                }
            }
        }
        self.dirty.clear();
        self.data.clone_from(&self.synced);
    }
}

/// As far as both have it.
fn copy_page(from: &[u8], to: &mut [u8], page: usize) {
    let start = page * PAGE_BYTES;
    let end = (start + PAGE_BYTES).min(from.len()).min(to.len());
    if start < end {
        to[start..end].copy_from_slice(&from[start..end]);
    }
}

impl Disk {
    /// Mounts an empty one. Needs root and /dev/fuse.
    pub fn mount(at: &Path) -> io::Result<Disk> {
        std::fs::create_dir_all(at)?;
        let root = Inode::Dir { names: BTreeMap::new(), synced: BTreeMap::new() };
        let tree = Tree {
            inodes: [(ROOT, root)].into(),
            next: ROOT + 1,
            syncs: 0,
            lies: false,
            slow: Duration::ZERO,
        };
        let tree = Arc::new(Mutex::new(tree));
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("forgetting".into())];
        let hangs = Arc::<Hangs>::default();
        let session = fuser::spawn_mount(Forgetting(tree.clone(), hangs.clone()), at, &config)?;
        Ok(Disk { tree, hangs, _session: session })
    }

    pub fn cut(&self, mut cut: Cut) {
        self.tree().cut(&mut cut);
    }

    pub fn syncs(&self) -> u64 {
        self.tree().syncs
    }

    /// From now on syncs are answered and not done.
    pub fn lie(&self) {
        self.tree().lies = true;
    }

    /// From now on every sync takes so long, and whatever else is asked for waits for it.
    #[allow(dead_code)] // used by the fault runs
    pub fn slow(&self, by: Duration) {
        self.tree().slow = by;
    }

    /// From now on a sync does not end before [`Disk::resume`], and whatever else is asked for waits for it.
    pub fn hang(&self) {
        self.hangs.set(true);
    }

    pub fn resume(&self) {
        self.hangs.set(false);
    }

    fn tree(&self) -> MutexGuard<'_, Tree> {
        self.tree.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Answer<T> = Result<T, Errno>;

impl Tree {
    fn cut(&mut self, cut: &mut Cut) {
        for inode in self.inodes.values_mut() {
            match inode {
                Inode::File(file) => file.cut(cut),
                Inode::Dir { names, synced } => {
                    if let Cut::ForgetsSome(rng) = cut
                        && rng.random()
                    {
                        synced.clone_from(names);
                    }
                    names.clone_from(synced);
                }
            }
        }
        let mut reached = BTreeSet::new();
        let mut todo = vec![ROOT];
        while let Some(id) = todo.pop() {
            reached.insert(id);
            if let Some(Inode::Dir { names, .. }) = self.inodes.get(&id) {
                todo.extend(names.values());
            }
        }
        self.inodes.retain(|id, _| reached.contains(id));
    }

    fn dir(&mut self, id: INodeNo) -> Answer<&mut BTreeMap<OsString, u64>> {
        match self.inodes.get_mut(&id.0) {
            Some(Inode::Dir { names, .. }) => Ok(names),
            Some(_) => Err(Errno::ENOTDIR),
            None => Err(Errno::ENOENT),
        }
    }

    fn file(&mut self, id: INodeNo) -> Answer<&mut File> {
        match self.inodes.get_mut(&id.0) {
            Some(Inode::File(file)) => Ok(file),
            Some(_) => Err(Errno::EISDIR),
            None => Err(Errno::ENOENT),
        }
    }

    fn find(&mut self, parent: INodeNo, name: &OsStr) -> Answer<u64> {
        self.dir(parent)?.get(name).copied().ok_or(Errno::ENOENT)
    }

    fn make(&mut self, parent: INodeNo, name: &OsStr, inode: Inode) -> Answer<FileAttr> {
        let id = self.next;
        let names = self.dir(parent)?;
        if names.contains_key(name) {
            return Err(Errno::EEXIST);
        }
        names.insert(name.into(), id);
        self.next += 1;
        self.inodes.insert(id, inode);
        self.attr(id)
    }

    fn attr(&self, id: u64) -> Answer<FileAttr> {
        let (kind, perm, size) = match self.inodes.get(&id).ok_or(Errno::ENOENT)? {
            Inode::Dir { .. } => (FileType::Directory, 0o755, 0),
            Inode::File(file) => (FileType::RegularFile, 0o644, file.data.len() as u64),
        };
        Ok(FileAttr {
            ino: INodeNo(id),
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: PAGE_BYTES as u32,
            flags: 0,
        })
    }

    fn sync(&mut self, id: INodeNo) -> Answer<()> {
        self.syncs += 1;
        std::thread::sleep(self.slow);
        if self.lies {
            return Ok(());
        }
        match self.inodes.get_mut(&id.0).ok_or(Errno::ENOENT)? {
            Inode::File(file) => file.sync(),
            Inode::Dir { names, synced } => synced.clone_from(names),
        }
        Ok(())
    }

    fn remove(&mut self, parent: INodeNo, name: &OsStr, dir: bool) -> Answer<()> {
        let id = self.find(parent, name)?;
        match self.inodes.get(&id) {
            Some(Inode::Dir { .. }) if !dir => return Err(Errno::EISDIR),
            Some(Inode::File(_)) if dir => return Err(Errno::ENOTDIR),
            Some(Inode::Dir { names, .. }) if !names.is_empty() => return Err(Errno::ENOTEMPTY),
            _ => {}
        }
        // The inode stays for who has it open, and for the synced names: a cut drops it.
        self.dir(parent)?.remove(name);
        Ok(())
    }

    fn rename(&mut self, from: (INodeNo, &OsStr), to: (INodeNo, &OsStr)) -> Answer<()> {
        let id = self.find(from.0, from.1)?;
        self.dir(to.0)?.insert(to.1.into(), id);
        if from != to {
            self.dir(from.0)?.remove(from.1);
        }
        Ok(())
    }
}

struct Forgetting(Arc<Mutex<Tree>>, Arc<Hangs>);

impl Forgetting {
    fn tree(&self) -> MutexGuard<'_, Tree> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn entry(answer: Answer<FileAttr>, reply: ReplyEntry) {
    match answer {
        Ok(attr) => reply.entry(&NEVER, &attr, Generation(0)),
        Err(error) => reply.error(error),
    }
}

fn empty(answer: Answer<()>, reply: ReplyEmpty) {
    match answer {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

impl Filesystem for Forgetting {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut tree = self.tree();
        let found = tree.find(parent, name);
        entry(found.and_then(|id| tree.attr(id)), reply);
    }

    fn getattr(&self, _: &Request, id: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.tree().attr(id.0) {
            Ok(attr) => reply.attr(&NEVER, &attr),
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        id: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<std::time::SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<std::time::SystemTime>,
        _chgtime: Option<std::time::SystemTime>,
        _bkuptime: Option<std::time::SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut tree = self.tree();
        let resized = match size {
            Some(size) => tree.file(id).map(|file| file.resize(size as usize)),
            None => Ok(()),
        };
        match resized.and_then(|()| tree.attr(id.0)) {
            Ok(attr) => reply.attr(&NEVER, &attr),
            Err(error) => reply.error(error),
        }
    }

    fn mkdir(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let dir = Inode::Dir { names: BTreeMap::new(), synced: BTreeMap::new() };
        entry(self.tree().make(parent, name, dir), reply);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(self.tree().remove(parent, name, false), reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(self.tree().remove(parent, name, true), reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut tree = self.tree();
        let taken = tree.find(new_parent, new_name).is_ok();
        empty(
            match (flags.is_empty(), flags == RenameFlags::RENAME_NOREPLACE, taken) {
                (true, _, _) | (_, true, false) => {
                    tree.rename((parent, name), (new_parent, new_name))
                }
                (_, true, true) => Err(Errno::EEXIST),
                _ => Err(Errno::EINVAL),
            },
            reply,
        );
    }

    fn open(&self, _: &Request, id: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let mut tree = self.tree();
        match tree.file(id) {
            Ok(file) => {
                if flags.0 & libc::O_TRUNC != 0 {
                    file.resize(0);
                }
                reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
            }
            Err(error) => reply.error(error),
        }
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        match self.tree().make(parent, name, Inode::File(File::default())) {
            Ok(attr) => reply.created(
                &NEVER,
                &attr,
                Generation(0),
                FileHandle(0),
                FopenFlags::FOPEN_DIRECT_IO,
            ),
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _: &Request,
        id: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.tree().file(id) {
            Ok(file) => {
                let start = (offset as usize).min(file.data.len());
                let end = (start + size as usize).min(file.data.len());
                reply.data(&file.data[start..end]);
            }
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        id: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.tree().file(id) {
            Ok(file) => {
                file.write(offset as usize, data);
                reply.written(data.len() as u32);
            }
            Err(error) => reply.error(error),
        }
    }

    /// Of a closed descriptor: makes nothing durable.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, id: INodeNo, _: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.1.wait();
        empty(self.tree().sync(id), reply);
    }

    fn fsyncdir(
        &self,
        _: &Request,
        id: INodeNo,
        _: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.1.wait();
        empty(self.tree().sync(id), reply);
    }

    fn readdir(
        &self,
        _: &Request,
        id: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let mut tree = self.tree();
        let names = match tree.dir(id) {
            Ok(names) => names.clone(),
            Err(error) => return reply.error(error),
        };
        let dots = [(OsString::from("."), id.0), (OsString::from(".."), id.0)];
        let all = dots.into_iter().chain(names);
        for (place, (name, id)) in all.enumerate().skip(offset as usize) {
            let Ok(attr) = tree.attr(id) else { continue };
            if reply.add(INodeNo(id), place as u64 + 1, attr.kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let free = 1 << 20;
        reply.statfs(free, free, free, 1 << 20, 1 << 20, PAGE_BYTES as u32, 255, PAGE_BYTES as u32);
    }
}
