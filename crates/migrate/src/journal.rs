//! The journal of one migration on one host: an append-only file that outlives the daemon.
//!
//! ```text
//! file    "FERRYJ1\n"  role (1 byte: 'S' or 'D')  id (16 bytes, as the uuid is written)  record*
//! record  length of payload (u32 LE)  kind (u8)  payload  CRC-32 (IEEE) of length, kind and payload (u32 LE)
//! ```
//!
//! A record counts once it is whole: [`Journal::append`] returns after `fdatasync`, and the file's name is on disk (its folder is
//! synced) before [`Journal::create`] returns. A crash while appending leaves a torn record at the very end, which opening cuts
//! off; a damaged record with more behind it is an error, since then the file can't be trusted. Payloads are the engine's
//! own (JSON); the handshake needs only the kinds.

use crate::handshake::{DestinationRecord, SourceRecord};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use uuid::Uuid;

const MAGIC: &[u8; 8] = b"FERRYJ1\n";
const HEADER: usize = MAGIC.len() + 1 + 16;
/// Length, kind and CRC.
const FRAME: usize = 4 + 1 + 4;
/// Longest payload, bytes: device descriptions and the store's snapshot of one domain.
pub const MAX_PAYLOAD: usize = 64 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    Source,
    Destination,
}

impl Role {
    fn byte(self) -> u8 {
        match self {
            Role::Source => b'S',
            Role::Destination => b'D',
        }
    }

    /// The journal's file name ends with this.
    pub fn extension(self) -> &'static str {
        match self {
            Role::Source => "source",
            Role::Destination => "destination",
        }
    }
}

/// A kind of record, as a byte of the file.
pub trait RecordKind: Copy + Eq + 'static {
    const ROLE: Role;
    /// Every kind with its byte; a byte never changes its meaning.
    const BYTES: &'static [(Self, u8)];

    fn byte(self) -> u8 {
        // Every kind is in the table: the test below goes through it.
        Self::BYTES.iter().find(|(kind, _)| *kind == self).map_or(0, |(_, byte)| *byte)
    }

    fn from_byte(byte: u8) -> Option<Self> {
        Self::BYTES.iter().find(|(_, b)| *b == byte).map(|(kind, _)| *kind)
    }
}

impl RecordKind for SourceRecord {
    const ROLE: Role = Role::Source;
    const BYTES: &'static [(Self, u8)] = &[
        (SourceRecord::Begin, 1),
        (SourceRecord::Freeze, 2),
        (SourceRecord::Go, 3),
        (SourceRecord::Abort, 4),
        (SourceRecord::RolledBack, 5),
        (SourceRecord::Done, 6),
        (SourceRecord::Left, 7),
        (SourceRecord::Closed, 8),
    ];
}

impl RecordKind for DestinationRecord {
    const ROLE: Role = Role::Destination;
    const BYTES: &'static [(Self, u8)] = &[
        (DestinationRecord::Begin, 1),
        (DestinationRecord::Ready, 2),
        (DestinationRecord::Accepted, 3),
        (DestinationRecord::Refused, 4),
        (DestinationRecord::Starting, 5),
        (DestinationRecord::Running, 6),
        (DestinationRecord::Closed, 7),
    ];
}

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("journal {path}: {cause}")]
    Io { path: PathBuf, cause: io::Error },
    #[error("journal {path}: {what}; a migration's outcome may hang on it: keep the file, and see docs/handshake.md")]
    Damaged { path: PathBuf, what: String },
}

/// An open journal whose records are of kind `K`.
#[derive(Debug)]
pub struct Journal<K> {
    path: PathBuf,
    file: File,
    id: Uuid,
    records: Vec<(K, Vec<u8>)>,
}

impl<K: RecordKind> Journal<K> {
    /// `<dir>/<id>.source` or `.destination`.
    pub fn path_for(dir: &Path, id: Uuid) -> PathBuf {
        dir.join(format!("{id}.{}", K::ROLE.extension()))
    }

    /// A new journal; an error if there is one for this id.
    pub fn create(dir: &Path, id: Uuid) -> Result<Self, JournalError> {
        let path = Self::path_for(dir, id);
        let make = || -> io::Result<File> {
            std::fs::create_dir_all(dir)?;
            let mut file = OpenOptions::new().read(true).append(true).create_new(true).open(&path)?;
            let mut header = Vec::with_capacity(HEADER);
            header.extend_from_slice(MAGIC);
            header.push(K::ROLE.byte());
            header.extend_from_slice(id.as_bytes());
            file.write_all(&header)?;
            file.sync_all()?;
            File::open(dir)?.sync_all()?;
            Ok(file)
        };
        let file = make().map_err(|cause| JournalError::Io { path: path.clone(), cause })?;
        Ok(Journal { path, file, id, records: Vec::new() })
    }

    /// Opens the journal at `path` and reads its records; cuts off a torn one at the end. `None` if the crash came before the header
    /// was whole: then nothing has been done in its name, and the file is removed.
    pub fn open(path: &Path) -> Result<Option<Self>, JournalError> {
        let io = |cause| JournalError::Io { path: path.to_owned(), cause };
        let mut file = OpenOptions::new().read(true).append(true).open(path).map_err(io)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() < HEADER {
            std::fs::remove_file(path).map_err(io)?;
            return Ok(None);
        }
        let (id, records, whole) =
            decode::<K>(&bytes).map_err(|what| JournalError::Damaged { path: path.to_owned(), what })?;
        if whole < bytes.len() {
            file.set_len(whole as u64).map_err(io)?;
            file.sync_all().map_err(io)?;
            file.seek(SeekFrom::End(0)).map_err(io)?;
        }
        Ok(Some(Journal { path: path.to_owned(), file, id, records }))
    }

    /// Appends a record; it is on disk when this returns.
    ///
    /// # Errors
    /// It is not, and will not be found there later: whoever goes on without it must not be overruled by it after a restart.
    pub fn append(&mut self, kind: K, payload: &[u8]) -> Result<(), JournalError> {
        let io = |cause| JournalError::Io { path: self.path.clone(), cause };
        if payload.len() > MAX_PAYLOAD {
            return Err(io(io::Error::other(format!("record of {} bytes is too long", payload.len()))));
        }
        let before = self.file.metadata().map_err(io)?.len();
        if let Err(cause) = self.file.write_all(&encode_record(kind, payload)).and_then(|()| self.file.sync_data()) {
            if let Err(error) = self.file.set_len(before).and_then(|()| self.file.sync_data()) {
                tracing::error!(
                    "{}: {error}: a record that could not be written may be read back",
                    self.path.display()
                );
            }
            let _ = self.file.seek(SeekFrom::End(0));
            return Err(io(cause));
        }
        self.records.push((kind, payload.to_vec()));
        Ok(())
    }

    pub fn id(&self) -> Uuid {
        self.id
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The kind of the last whole record.
    pub fn last(&self) -> Option<K> {
        self.records.last().map(|(kind, _)| *kind)
    }

    /// Payload of the last record of this kind.
    pub fn payload(&self, kind: K) -> Option<&[u8]> {
        self.records.iter().rev().find(|(k, _)| *k == kind).map(|(_, payload)| payload.as_slice())
    }

    /// Removes the file: both sides know the outcome.
    pub fn delete(self) -> Result<(), JournalError> {
        let Journal { path, .. } = self;
        std::fs::remove_file(&path).map_err(|cause| JournalError::Io { path, cause })
    }
}

fn encode_record<K: RecordKind>(kind: K, payload: &[u8]) -> Vec<u8> {
    let mut record = Vec::with_capacity(FRAME + payload.len());
    record.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    record.push(kind.byte());
    record.extend_from_slice(payload);
    let crc = crc32fast::hash(&record);
    record.extend_from_slice(&crc.to_le_bytes());
    record
}

type Decoded<K> = (Uuid, Vec<(K, Vec<u8>)>, usize);

/// Id, records, and how many bytes they take; the rest is a torn record.
fn decode<K: RecordKind>(bytes: &[u8]) -> Result<Decoded<K>, String> {
    let (magic, rest) = bytes.split_first_chunk::<8>().ok_or("too short")?;
    let (role, rest) = rest.split_first().ok_or("too short")?;
    let (id, mut rest) = rest.split_first_chunk::<16>().ok_or("too short")?;
    if magic != MAGIC {
        return Err("it does not begin as a journal does".into());
    }
    if *role != K::ROLE.byte() {
        return Err(format!("it is not a {}'s journal", K::ROLE.extension()));
    }
    let mut records = Vec::new();
    while !rest.is_empty() {
        let offset = bytes.len() - rest.len();
        match next_record::<K>(rest) {
            Next::Whole(kind, payload, after) => {
                records.push((kind, payload.to_vec()));
                rest = after;
            }
            Next::Torn => return Ok((Uuid::from_bytes(*id), records, offset)),
            Next::Damaged(what) => return Err(format!("the record at byte {offset} {what}")),
        }
    }
    Ok((Uuid::from_bytes(*id), records, bytes.len()))
}

enum Next<'a, K> {
    Whole(K, &'a [u8], &'a [u8]),
    /// It reaches the end of the file and is not whole.
    Torn,
    Damaged(&'static str),
}

fn next_record<K: RecordKind>(bytes: &[u8]) -> Next<'_, K> {
    let Some((length, _)) = bytes.split_first_chunk::<4>() else { return Next::Torn };
    let length = u32::from_le_bytes(*length) as usize;
    if length > MAX_PAYLOAD {
        return Next::Damaged("is longer than any record");
    }
    let Some((body, after)) = bytes.split_at_checked(5 + length) else { return Next::Torn };
    let Some((crc, after)) = after.split_first_chunk::<4>() else { return Next::Torn };
    if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
        // Blocks of the last append may reach the disk in any order.
        return if after.is_empty() { Next::Torn } else { Next::Damaged("has a wrong checksum") };
    }
    match body.get(4).copied().and_then(K::from_byte) {
        Some(kind) => Next::Whole(kind, body.get(5..).unwrap_or_default(), after),
        None => Next::Damaged("is of a kind that this version does not know"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written() -> (tempfile::TempDir, PathBuf, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::<SourceRecord>::create(dir.path(), Uuid::from_u128(7)).unwrap();
        journal.append(SourceRecord::Begin, b"{\"domid\":5}").unwrap();
        journal.append(SourceRecord::Freeze, b"").unwrap();
        journal.append(SourceRecord::Go, b"x").unwrap();
        let path = journal.path().to_owned();
        let bytes = std::fs::read(&path).unwrap();
        (dir, path, bytes)
    }

    #[test]
    fn what_was_appended_is_read_again_and_can_go_on() {
        let (_dir, path, _) = written();
        let mut journal = Journal::<SourceRecord>::open(&path).unwrap().unwrap();
        assert_eq!(journal.id(), Uuid::from_u128(7));
        assert_eq!(journal.last(), Some(SourceRecord::Go));
        assert_eq!(journal.payload(SourceRecord::Begin), Some(&b"{\"domid\":5}"[..]));
        journal.append(SourceRecord::Done, b"").unwrap();
        let journal = Journal::<SourceRecord>::open(&path).unwrap().unwrap();
        assert_eq!(journal.last(), Some(SourceRecord::Done));
        assert!(matches!(Journal::<DestinationRecord>::open(&path), Err(JournalError::Damaged { .. })));
        assert!(Journal::<SourceRecord>::create(path.parent().unwrap(), journal.id()).is_err());
        journal.delete().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_crash_at_any_byte_leaves_the_records_before_it() {
        let (_dir, path, bytes) = written();
        let ends = [HEADER, HEADER + FRAME + 11, HEADER + 2 * FRAME + 11, bytes.len()];
        for cut in 0..bytes.len() {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            match Journal::<SourceRecord>::open(&path).unwrap() {
                None => assert!(cut < HEADER),
                Some(mut journal) => {
                    let whole = ends.iter().filter(|end| **end <= cut).count() - 1;
                    assert_eq!(journal.records.len(), whole, "cut at {cut}");
                    journal.append(SourceRecord::Abort, b"why").unwrap();
                    let again = Journal::<SourceRecord>::open(&path).unwrap().unwrap();
                    assert_eq!((again.records.len(), again.last()), (whole + 1, Some(SourceRecord::Abort)));
                }
            }
        }
    }

    #[test]
    fn damage_before_the_end_is_not_taken_for_a_crash() {
        let (_dir, path, mut bytes) = written();
        bytes[HEADER + 6] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert!(matches!(Journal::<SourceRecord>::open(&path), Err(JournalError::Damaged { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "a damaged journal is left as it is");
    }

    #[test]
    fn every_kind_has_a_byte_of_its_own() {
        fn check<K: RecordKind + std::fmt::Debug>() {
            for (kind, byte) in K::BYTES {
                assert_eq!((kind.byte(), K::from_byte(*byte)), (*byte, Some(*kind)));
            }
        }
        check::<SourceRecord>();
        check::<DestinationRecord>();
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<SourceRecord>(&bytes);
            let mut with_header = MAGIC.to_vec();
            with_header.extend([b'D'; 17]);
            with_header.extend(bytes);
            let _ = decode::<DestinationRecord>(&with_header);
        }
    }
}
