//! The file of the state journal (docs/xenstored-journal.md): written by memory copies into a mapping, so that all that a
//! killed daemon had written is there, and nothing of what it had not.
//!
//! The file has its full size from the start (a mapping must not run into a full file system). What counts ends at
//! `committed`, one word that is stored last. A file is never changed from one snapshot to another: the next one is made
//! beside it and renamed over it.

use super::kill_point::may_die_here;
use crc32fast::hash;
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use thiserror::Error;

const MAGIC: &[u8; 8] = b"FERRYXSJ";
/// Version 1 always had a record of the store's count of changes, which is read as well.
const VERSION: u32 = 2;
const OLDEST: u32 = 1;
/// Where the snapshot begins.
const DATA: usize = 4096;
/// Bytes before a batch: its length and its checksum.
const FRAME: usize = 8;
/// Room for batches, at least.
const ROOM: usize = if cfg!(test) { 2 << 10 } else { 4 << 20 };
/// Length of a boot id, in bytes.
pub const BOOT_ID: usize = 36;

mod at {
    pub const VERSION: usize = 8;
    /// Checksum of the bytes from `BOOT` to `STATE`.
    pub const CHECK: usize = 12;
    pub const BOOT: usize = 16;
    pub const SNAPSHOT_LEN: usize = 56;
    pub const SNAPSHOT_CHECK: usize = 64;
    pub const STATE: usize = 68;
    pub const COMMITTED: usize = 72;
    pub const PUBLISHED: usize = 80;
}

/// In use, or left by a daemon that was killed.
const LIVE: u32 = 1;
/// Another program took over: it knows better.
const HANDED_OVER: u32 = 2;

/// A journal that can't be used.
#[derive(Debug, Error)]
pub enum JournalError {
    /// Reading failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Somebody holds its lock.
    #[error("another daemon is using it")]
    InUse,
    /// Not one of ours, or of another version.
    #[error("{0}")]
    Foreign(String),
    /// A part does not have its checksum.
    #[error("byte {offset}: {what}")]
    Damaged {
        /// In the file.
        offset: usize,
        /// Which part.
        what: &'static str,
    },
}

/// What a file holds.
#[derive(Debug)]
pub enum Loaded {
    /// Nothing that counts: why, if there is a file at all.
    Nothing(Option<&'static str>),
    /// A store.
    State(Contents),
}

/// See [`Loaded`].
#[derive(Debug)]
pub struct Contents {
    bytes: Vec<u8>,
    snapshot: Range<usize>,
    batches: Vec<Range<usize>>,
    /// The daemon may not have come to publish the last batch's ring indexes.
    pub unpublished: bool,
    // Nobody else takes it before the next one stands in its place.
    _lock: File,
}

impl Contents {
    /// The stream.
    pub fn snapshot(&self) -> &[u8] {
        self.bytes.get(self.snapshot.clone()).unwrap_or(&[])
    }

    /// In their order.
    pub fn batches(&self) -> impl Iterator<Item = &[u8]> {
        self.batches.iter().filter_map(|r| self.bytes.get(r.clone()))
    }
}

/// The id of this boot of the kernel.
///
/// # Errors
/// The kernel does not say.
pub fn boot_id() -> io::Result<[u8; BOOT_ID]> {
    let text = std::fs::read("/proc/sys/kernel/random/boot_id")?;
    text.get(..BOOT_ID).and_then(|b| b.try_into().ok()).ok_or_else(|| ErrorKind::InvalidData.into())
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).and_then(|s| s.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 8).and_then(|s| s.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// Reads and checks a journal.
///
/// # Errors
/// It is in use, not ours, or damaged before the end of what counts.
pub fn load(path: &Path, boot: &[u8; BOOT_ID]) -> Result<Loaded, JournalError> {
    let mut file = match File::options().read(true).write(true).open(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Loaded::Nothing(None)),
        f => f?,
    };
    lock(&file)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    contents(bytes, boot, file)
}

fn lock(f: &File) -> Result<(), JournalError> {
    match flock(f, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => Err(JournalError::InUse),
        r => Ok(r.map_err(io::Error::from)?),
    }
}

fn contents(bytes: Vec<u8>, boot: &[u8; BOOT_ID], lock: File) -> Result<Loaded, JournalError> {
    let damaged = |offset, what| Err(JournalError::Damaged { offset, what });
    if bytes.get(..8) != Some(MAGIC) {
        return Err(JournalError::Foreign("it is no state journal".into()));
    }
    match u32_at(&bytes, at::VERSION) {
        OLDEST..=VERSION => {}
        v => {
            let text = format!("it is of version {v}, this daemon knows versions {OLDEST} to {VERSION}");
            return Err(JournalError::Foreign(text));
        }
    }
    if bytes.len() < DATA || hash(&bytes[at::BOOT..at::STATE]) != u32_at(&bytes, at::CHECK) {
        return damaged(0, "the header is damaged");
    }
    if bytes[at::BOOT..at::BOOT + BOOT_ID] != *boot {
        return Ok(Loaded::Nothing(Some("it is of another boot of this machine")));
    }
    match u32_at(&bytes, at::STATE) {
        LIVE => {}
        HANDED_OVER => return Ok(Loaded::Nothing(Some("its daemon had handed over to another program"))),
        _ => return damaged(at::STATE, "the state is neither in use nor handed over"),
    }
    let word = |at| usize::try_from(u64_at(&bytes, at)).unwrap_or(usize::MAX);
    let (committed, published) = (word(at::COMMITTED), word(at::PUBLISHED));
    if committed > bytes.len() {
        return damaged(bytes.len(), "the file is shorter than what was written");
    }
    let snapshot = DATA..DATA.saturating_add(word(at::SNAPSHOT_LEN));
    if snapshot.end > committed || hash(&bytes[snapshot.clone()]) != u32_at(&bytes, at::SNAPSHOT_CHECK) {
        return damaged(DATA, "the snapshot is damaged");
    }
    let mut batches = Vec::new();
    let mut offset = snapshot.end;
    while offset < committed {
        let len = u32_at(&bytes, offset) as usize;
        let body = offset + FRAME..(offset + FRAME).saturating_add(len);
        if body.end > committed || hash(&bytes[body.clone()]) != u32_at(&bytes, offset + 4) {
            return damaged(offset, "a batch is damaged");
        }
        offset = body.end;
        batches.push(body);
    }
    Ok(Loaded::State(Contents { snapshot, batches, unpublished: published != committed, bytes, _lock: lock }))
}

/// A journal being written.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    boot: [u8; BOOT_ID],
    map: Map,
    committed: usize,
    // Keeps the lock.
    _file: File,
}

impl Journal {
    /// Begins one, in place of what is there: a snapshot and the batches that belong to it. `unpublished`: the last one
    /// tells of ring indexes that are not published yet.
    ///
    /// # Errors
    /// There is no room, or no folder.
    pub fn create(
        path: &Path,
        boot: [u8; BOOT_ID],
        snapshot: &[u8],
        batches: &[&[u8]],
        unpublished: bool,
    ) -> Result<Journal, JournalError> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let mut next = path.as_os_str().to_owned();
        next.push(".new");
        let next = PathBuf::from(next);
        let mut file = File::options().read(true).write(true).create(true).truncate(true).mode(0o600).open(&next)?;
        lock(&file)?;
        may_die_here();
        let size = DATA + snapshot.len() + batches.iter().map(|b| FRAME + b.len()).sum::<usize>();
        let full = size + ROOM.max(snapshot.len());
        reserve(&mut file, full)?;
        let mut head = vec![0; DATA];
        let mut put = |at: usize, b: &[u8]| head[at..at + b.len()].copy_from_slice(b);
        put(0, MAGIC);
        put(at::VERSION, &VERSION.to_le_bytes());
        put(at::BOOT, &boot);
        put(at::SNAPSHOT_LEN, &(snapshot.len() as u64).to_le_bytes());
        put(at::SNAPSHOT_CHECK, &hash(snapshot).to_le_bytes());
        let check = hash(&head[at::BOOT..at::STATE]);
        head[at::CHECK..at::CHECK + 4].copy_from_slice(&check.to_le_bytes());
        file.write_all(&head)?;
        file.write_all(snapshot)?;
        let map = Map::new(&file, full)?;
        let mut j = Journal { path: path.to_owned(), boot, map, committed: DATA + snapshot.len(), _file: file };
        j.map.word(at::PUBLISHED).store(j.committed as u64, Ordering::Relaxed);
        for (i, b) in batches.iter().enumerate() {
            if !j.append(b) {
                return Err(io::Error::from(ErrorKind::StorageFull).into());
            }
            if !unpublished || i + 1 < batches.len() {
                j.published();
            }
        }
        j.map.half(at::STATE).store(LIVE, Ordering::Release);
        may_die_here();
        std::fs::rename(&next, path)?;
        may_die_here();
        Ok(j)
    }

    /// Writes a batch; from then on it counts. False: there is no room, nothing was written.
    #[must_use]
    pub fn append(&mut self, batch: &[u8]) -> bool {
        let end = self.committed + FRAME + batch.len();
        if end > self.map.len {
            return false;
        }
        let mut frame = [0; FRAME];
        frame[..4].copy_from_slice(&(batch.len() as u32).to_le_bytes());
        frame[4..].copy_from_slice(&hash(batch).to_le_bytes());
        self.map.copy(self.committed, &frame);
        let (first, second) = batch.split_at(batch.len() / 2);
        self.map.copy(self.committed + FRAME, first);
        may_die_here();
        self.map.copy(self.committed + FRAME + first.len(), second);
        may_die_here();
        self.committed = end;
        // Last of all: what is before this word is in the file before it.
        self.map.word(at::COMMITTED).store(end as u64, Ordering::Release);
        may_die_here();
        true
    }

    /// The last batch's ring indexes are published.
    pub fn published(&mut self) {
        self.map.word(at::PUBLISHED).store(self.committed as u64, Ordering::Release);
    }

    /// Begins anew, with another snapshot.
    ///
    /// # Errors
    /// There is no room; this one goes on.
    pub fn replace(&mut self, snapshot: &[u8], batches: &[&[u8]], unpublished: bool) -> Result<(), JournalError> {
        *self = Journal::create(&self.path, self.boot, snapshot, batches, unpublished)?;
        Ok(())
    }

    /// Another program takes over, or does not: then this one counts again.
    pub fn hand_over(&self, yes: bool) {
        self.map.half(at::STATE).store(if yes { HANDED_OVER } else { LIVE }, Ordering::SeqCst);
    }

    /// Bytes of the file.
    pub fn size(&self) -> usize {
        self.map.len
    }
}

/// Gives a file all the blocks that it will need.
fn reserve(file: &mut File, len: usize) -> io::Result<()> {
    match fallocate(&*file, FallocateFlags::empty(), 0, len as u64) {
        // ramfs, say: blocks are there once they are written.
        Err(rustix::io::Errno::OPNOTSUPP) => {
            let zeros = vec![0; 1 << 16];
            let mut left = len;
            while left > 0 {
                let n = left.min(zeros.len());
                file.write_all(&zeros[..n])?;
                left -= n;
            }
            file.rewind()
        }
        r => Ok(r?),
    }
}

/// A file in memory.
#[derive(Debug)]
struct Map {
    ptr: NonNull<u8>,
    len: usize,
}

impl Map {
    fn new(file: &File, len: usize) -> io::Result<Map> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let p =
            unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0) }?;
        let ptr = NonNull::new(p.cast()).ok_or(ErrorKind::OutOfMemory)?;
        Ok(Map { ptr, len })
    }

    fn half(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset.is_multiple_of(4) && offset + 4 <= DATA);
        // SAFETY: offsets are constants of `at`, aligned and inside of the first page, which stays mapped as long as `self`;
        // nobody but this process writes to the file, whose lock it holds, and it does so atomically here.
        unsafe { AtomicU32::from_ptr(self.ptr.as_ptr().add(offset).cast()) }
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset.is_multiple_of(8) && offset + 8 <= DATA);
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(self.ptr.as_ptr().add(offset).cast()) }
    }

    fn copy(&mut self, at: usize, bytes: &[u8]) {
        assert!(at >= DATA && at.checked_add(bytes.len()).is_some_and(|end| end <= self.len));
        // SAFETY: the place is inside of the mapping, all of whose blocks the file has (`fallocate`); it overlaps neither
        // `bytes`, which are elsewhere in memory, nor the words of the header.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.ptr.as_ptr().add(at), bytes.len()) };
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length, and nobody holds a reference into it any more.
        let _ = unsafe { munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: [u8; BOOT_ID] = [b'b'; BOOT_ID];

    fn state(path: &Path) -> Contents {
        match load(path, &BOOT).unwrap() {
            Loaded::State(c) => c,
            n => panic!("{n:?}"),
        }
    }

    #[test]
    fn what_was_committed_comes_back_and_what_was_not_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        assert!(matches!(load(&path, &BOOT).unwrap(), Loaded::Nothing(None)));
        let mut j = Journal::create(&path, BOOT, b"snapshot", &[b"first"], false).unwrap();
        assert!(matches!(load(&path, &BOOT), Err(JournalError::InUse)));
        assert!(j.append(b"second"));
        j.published();
        assert!(j.append(b"third"));
        j.map.copy(j.committed, b"not committed");
        drop(j);
        let c = state(&path);
        assert_eq!((c.snapshot(), c.unpublished), (&b"snapshot"[..], true));
        assert_eq!(c.batches().collect::<Vec<_>>(), [&b"first"[..], b"second", b"third"]);
        assert!(matches!(load(&path, &BOOT), Err(JournalError::InUse)), "as long as it is being read");
        drop(c);
        assert!(matches!(load(&path, &[b'c'; BOOT_ID]).unwrap(), Loaded::Nothing(Some(_))));
    }

    #[test]
    fn one_that_was_handed_over_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let j = Journal::create(&path, BOOT, b"", &[], false).unwrap();
        j.hand_over(true);
        drop(j);
        assert!(matches!(load(&path, &BOOT).unwrap(), Loaded::Nothing(Some(_))));
    }

    #[test]
    fn it_is_full_before_it_grows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut j = Journal::create(&path, BOOT, b"", &[], false).unwrap();
        let size = j.size();
        let batch = vec![7; 100];
        let n = (0..).take_while(|_| j.append(&batch)).count();
        assert_eq!(n, ROOM / (batch.len() + FRAME));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), size as u64);
        j.replace(b"short", &[b"last"], true).unwrap();
        assert!(j.append(&batch));
        drop(j);
        assert_eq!(state(&path).batches().map(<[u8]>::len).collect::<Vec<_>>(), [4, 100]);
    }

    #[test]
    fn no_damaged_byte_goes_unnoticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut j = Journal::create(&path, BOOT, b"snapshot", &[b"first"], false).unwrap();
        assert!(j.append(b"second"));
        let end = j.committed;
        drop(j);
        let good = std::fs::read(&path).unwrap();
        let header = (0..at::STATE).chain(at::COMMITTED..at::PUBLISHED);
        for i in header.chain(DATA..end) {
            let mut bad = good[..end].to_vec();
            bad[i] ^= 0x41;
            let r = contents(bad, &BOOT, tempfile::tempfile().unwrap());
            assert!(r.is_err(), "byte {i}: {r:?}");
        }
        assert!(contents(good[..end - 1].to_vec(), &BOOT, tempfile::tempfile().unwrap()).is_err());
        assert!(contents(good[..end].to_vec(), &BOOT, tempfile::tempfile().unwrap()).is_ok());
    }
}
