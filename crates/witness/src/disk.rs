//! What the witness writes to its disk, and how to tell afterwards that nothing is lost or older than acknowledged.
//!
//! | bytes | what |
//! |---|---|
//! | 0..1 MiB | not touched |
//! | 1 MiB..9 MiB | journal: [`JOURNAL_SLOTS`] records of one sector; record n (from 1) in slot (n - 1) mod that |
//! | 9 MiB.. | rewritten blocks: block i at 9 MiB + i * 8 KiB, [`BLOCK`] bytes used, so that no two are merged into one request |
//!
//! A sector is 512 bytes, little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | magic: `WITNESSJ` journal, `WITNESSR` rewrite |
//! | 8..16 | the guest's seed |
//! | 16..24 | record (journal) or slot (rewrite) |
//! | 24..32 | version: 1 in the journal, rising in the rewrite area |
//! | 32..40 | CLOCK_MONOTONIC when it was made, ns |
//! | 40..508 | filler from a generator seeded by all of the above |
//! | 508..512 | CRC-32 (IEEE) of bytes 0..508 |
//!
//! A rewritten block is 8 such sectors with the same version; a block whose sectors differ was torn.

use crate::pattern::Rng;

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// Bytes of a rewritten block.
pub const BLOCK: usize = 4096;
/// Where the journal starts.
pub const JOURNAL_AT: u64 = 1 << 20;
/// Records that the journal holds before it starts from its first slot again.
pub const JOURNAL_SLOTS: u64 = (8 << 20) / SECTOR as u64;
/// Where the rewritten blocks start.
pub const REWRITE_AT: u64 = 9 << 20;
/// From one rewritten block to the next.
pub const REWRITE_STRIDE: u64 = 8192;

/// Byte offset of a journal record (from 1).
pub fn journal_offset(record: u64) -> u64 {
    JOURNAL_AT + (record.saturating_sub(1) % JOURNAL_SLOTS) * SECTOR as u64
}

/// Byte offset of a rewritten block.
pub fn rewrite_offset(slot: u32) -> u64 {
    REWRITE_AT + u64::from(slot) * REWRITE_STRIDE
}

/// Least size of a disk for a number of rewritten blocks.
pub fn least_size(slots: u32) -> u64 {
    rewrite_offset(slots)
}

/// Which area a sector belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Area {
    /// Journal.
    Journal,
    /// Rewritten blocks.
    Rewrite,
}

impl Area {
    fn magic(self) -> [u8; 8] {
        match self {
            Area::Journal => *b"WITNESSJ",
            Area::Rewrite => *b"WITNESSR",
        }
    }
}

/// What a sector says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Area.
    pub area: Area,
    /// The guest's seed.
    pub seed: u64,
    /// Record or slot.
    pub number: u64,
    /// Version.
    pub version: u64,
    /// CLOCK_MONOTONIC, ns.
    pub mono_ns: u64,
}

/// Why a sector is none of the witness's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SectorError {
    /// Not 512 bytes.
    #[error("sector of {0} bytes")]
    Length(usize),
    /// Never written by a witness.
    #[error("no witness wrote this sector")]
    Magic,
    /// Damaged.
    #[error("sector's CRC is {found:#010x}, computed {computed:#010x}")]
    Crc {
        /// In the sector.
        found: u32,
        /// Over its bytes.
        computed: u32,
    },
    /// The sectors of a block are of different versions.
    #[error("torn block: versions {0} and {1}")]
    Torn(u64, u64),
}

fn le64(b: &[u8; SECTOR], at: usize) -> u64 {
    let mut out = [0; 8];
    out.copy_from_slice(&b[at..at + 8]);
    u64::from_le_bytes(out)
}

impl Record {
    /// The sector and its CRC.
    pub fn encode(&self) -> ([u8; SECTOR], u32) {
        let mut b = [0; SECTOR];
        b[0..8].copy_from_slice(&self.area.magic());
        for (at, v) in [(8, self.seed), (16, self.number), (24, self.version), (32, self.mono_ns)] {
            b[at..at + 8].copy_from_slice(&v.to_le_bytes());
        }
        let mut rng = Rng::new(self.seed ^ self.number.rotate_left(20) ^ self.version.rotate_left(40));
        for chunk in b[40..508].chunks_mut(8) {
            let bytes = rng.next().to_le_bytes();
            let n = chunk.len();
            chunk.copy_from_slice(&bytes[..n]);
        }
        let crc = crc32fast::hash(&b[..508]);
        b[508..].copy_from_slice(&crc.to_le_bytes());
        (b, crc)
    }

    /// Reads a sector and its CRC.
    pub fn decode(bytes: &[u8]) -> Result<(Record, u32), SectorError> {
        let b: &[u8; SECTOR] = bytes.try_into().map_err(|_| SectorError::Length(bytes.len()))?;
        let area =
            [Area::Journal, Area::Rewrite].into_iter().find(|a| b.starts_with(&a.magic())).ok_or(SectorError::Magic)?;
        let mut crc = [0; 4];
        crc.copy_from_slice(&b[508..]);
        let (found, computed) = (u32::from_le_bytes(crc), crc32fast::hash(&b[..508]));
        if found != computed {
            return Err(SectorError::Crc { found, computed });
        }
        let record = Record { area, seed: le64(b, 8), number: le64(b, 16), version: le64(b, 24), mono_ns: le64(b, 32) };
        Ok((record, found))
    }

    /// A rewritten block: this sector eight times.
    pub fn encode_block(&self) -> [u8; BLOCK] {
        let (sector, _) = self.encode();
        let mut block = [0; BLOCK];
        for part in block.chunks_exact_mut(SECTOR) {
            part.copy_from_slice(&sector);
        }
        block
    }

    /// Reads a rewritten block.
    pub fn decode_block(bytes: &[u8]) -> Result<Record, SectorError> {
        if bytes.len() != BLOCK {
            return Err(SectorError::Length(bytes.len()));
        }
        let mut first: Option<Record> = None;
        for part in bytes.chunks_exact(SECTOR) {
            let (record, _) = Record::decode(part)?;
            match first {
                None => first = Some(record),
                Some(f) if f != record => return Err(SectorError::Torn(f.version, record.version)),
                Some(_) => {}
            }
        }
        first.ok_or(SectorError::Length(0))
    }
}

/// What is wrong with the journal on a disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JournalFault {
    /// The disk could not be read.
    #[error("record {record}: cannot read the disk: {error}")]
    Read {
        /// Record.
        record: u64,
        /// Error.
        error: String,
    },
    /// The record is not there or damaged.
    #[error("record {record} was acknowledged and is lost: {error}")]
    Lost {
        /// Record.
        record: u64,
        /// What is in its place.
        error: SectorError,
    },
    /// Another record is in its place.
    #[error("record {record} was acknowledged; record {found} of seed {seed} is in its place")]
    Other {
        /// Record.
        record: u64,
        /// Found.
        found: u64,
        /// Found record's seed.
        seed: u64,
    },
    /// The record's CRC is not the one that the peer was told.
    #[error("record {record}: the peer was told CRC {told:#010x}, the disk has {found:#010x}")]
    Changed {
        /// Record.
        record: u64,
        /// Told.
        told: u32,
        /// On the disk.
        found: u32,
    },
}

/// Checks that every record up to `acknowledged` is on the disk (those that the ring has not overwritten since: the last
/// [`JOURNAL_SLOTS`] minus one). `read` fills the buffer from a byte offset of the disk as the guest sees it; `told` gives
/// the CRC that the peer got for a record, if it got it. At most 32 faults are returned.
pub fn check_journal(
    seed: u64,
    acknowledged: u64,
    told: impl Fn(u64) -> Option<u32>,
    mut read: impl FnMut(u64, &mut [u8]) -> std::io::Result<()>,
) -> Vec<JournalFault> {
    let mut faults = Vec::new();
    // The slot of the oldest record may already hold the record after the last acknowledged one.
    let first = acknowledged.saturating_sub(JOURNAL_SLOTS - 2).max(1);
    for record in first..=acknowledged {
        if faults.len() >= 32 {
            break;
        }
        let mut sector = [0; SECTOR];
        if let Err(e) = read(journal_offset(record), &mut sector) {
            faults.push(JournalFault::Read { record, error: e.to_string() });
            continue;
        }
        match Record::decode(&sector) {
            Err(error) => faults.push(JournalFault::Lost { record, error }),
            Ok((r, _)) if r.area != Area::Journal || r.number != record || r.seed != seed => {
                faults.push(JournalFault::Other { record, found: r.number, seed: r.seed });
            }
            Ok((_, found)) => {
                if let Some(told) = told(record).filter(|t| *t != found) {
                    faults.push(JournalFault::Changed { record, told, found });
                }
            }
        }
    }
    faults
}

/// A `read` for [`check_journal`] that asks for whole chunks of so many bytes, each once as long as the offsets go up.
pub fn in_chunks(
    bytes: usize,
    mut read: impl FnMut(u64, &mut [u8]) -> std::io::Result<()>,
) -> impl FnMut(u64, &mut [u8]) -> std::io::Result<()> {
    let mut chunk = vec![0; bytes];
    let mut here = None;
    move |at, buf| {
        let start = at - at % bytes as u64;
        if here.replace(start) != Some(start)
            && let Err(error) = read(start, &mut chunk)
        {
            here = None;
            return Err(error);
        }
        let from = (at - start) as usize;
        let wanted = chunk.get(from..from + buf.len()).ok_or(std::io::ErrorKind::InvalidInput)?;
        buf.copy_from_slice(wanted);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(n: u64) -> Record {
        Record { area: Area::Journal, seed: 5, number: n, version: 1, mono_ns: n * 10 }
    }

    fn disk_with(n: u64) -> Vec<u8> {
        let mut disk = vec![0; least_size(0) as usize];
        for i in 1..=n {
            let at = journal_offset(i) as usize;
            disk[at..at + SECTOR].copy_from_slice(&record(i).encode().0);
        }
        disk
    }

    #[test]
    fn chunks_find_what_sectors_find_and_are_read_once() {
        let mut disk = disk_with(1000);
        let lost = journal_offset(300) as usize;
        disk[lost..lost + SECTOR].fill(0);
        let mut reads = Vec::new();
        let bad = journal_offset(513);
        let read = in_chunks(64 << 10, |at, chunk: &mut [u8]| {
            reads.push(at);
            if at == bad {
                return Err(std::io::Error::other("bad"));
            }
            chunk.copy_from_slice(&disk[at as usize..at as usize + chunk.len()]);
            Ok(())
        });
        let faults = check_journal(5, 600, |_| None, read);
        assert!(matches!(faults[0], JournalFault::Lost { record: 300, .. }), "{faults:?}");
        let unread = |fault: &&JournalFault| matches!(fault, JournalFault::Read { record, .. } if *record >= 513);
        assert_eq!(
            faults.iter().filter(unread).count(),
            31,
            "each record of a chunk that can't be read, up to the limit"
        );
        assert_eq!(reads[..4], [1 << 20, (1 << 20) + (64 << 10), (1 << 20) + (128 << 10), (1 << 20) + (192 << 10)]);
        assert_eq!(reads[4..], [bad; 31]);
    }

    fn check(disk: &[u8], acknowledged: u64) -> Vec<JournalFault> {
        check_journal(
            5,
            acknowledged,
            |r| Some(record(r).encode().1),
            |at, buf| {
                buf.copy_from_slice(&disk[at as usize..at as usize + buf.len()]);
                Ok(())
            },
        )
    }

    #[test]
    fn whole_journal_passes_also_after_it_wrapped() {
        assert_eq!(check(&disk_with(100), 100), vec![]);
        assert_eq!(check(&disk_with(100), 90), vec![]);
        let n = JOURNAL_SLOTS + 50;
        assert_eq!(check(&disk_with(n), n), vec![]);
        // One more was written and not yet acknowledged.
        assert_eq!(check(&disk_with(n + 1), n), vec![]);
    }

    #[test]
    fn lost_old_and_changed_records_are_seen() {
        assert!(matches!(check(&disk_with(99), 100)[..], [JournalFault::Lost { record: 100, .. }]));
        let mut disk = disk_with(100);
        let (a, b) = (journal_offset(7) as usize, journal_offset(8) as usize);
        disk.copy_within(a..a + SECTOR, b);
        assert!(matches!(check(&disk, 100)[..], [JournalFault::Other { record: 8, found: 7, .. }]));
        let mut disk = disk_with(100);
        let at = journal_offset(3) as usize;
        disk[at..at + SECTOR].copy_from_slice(&Record { mono_ns: 1, ..record(3) }.encode().0);
        assert!(matches!(check(&disk, 100)[..], [JournalFault::Changed { record: 3, .. }]));
    }

    #[test]
    fn torn_block_is_seen() {
        let r = Record { area: Area::Rewrite, seed: 1, number: 3, version: 9, mono_ns: 0 };
        let mut block = r.encode_block();
        assert_eq!(Record::decode_block(&block), Ok(r));
        block[SECTOR..2 * SECTOR].copy_from_slice(&Record { version: 8, ..r }.encode().0);
        assert_eq!(Record::decode_block(&block), Err(SectorError::Torn(9, 8)));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_seen(bit in 0usize..SECTOR * 8, n in 1u64..1000) {
            let (mut sector, _) = record(n).encode();
            sector[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Record::decode(&sector).is_err());
        }
    }
}
