//! Writes frames as a classic pcap file (magic 0xa1b23c4d: nanosecond time stamps; see the pcap-savefile manual page), so
//! that a run can be looked at with Wireshark or tcpdump.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Bytes kept of each frame: enough for all headers, small enough for the pages of a migration.
const SNAP: usize = 160;
/// The file stops growing here, so that a long run cannot fill the disk.
const MAX_FILE: u64 = 64 << 20;

/// A capture file.
#[derive(Debug)]
pub struct Pcap {
    out: BufWriter<File>,
    written: u64,
    epoch: Duration,
}

impl Pcap {
    /// Creates the file; the run starts now.
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut out = BufWriter::new(File::create(path)?);
        let mut header = Vec::with_capacity(24);
        for word in [0xa1b2_3c4d_u32, 0x0004_0002, 0, 0, SNAP as u32, 1] {
            header.extend_from_slice(&word.to_le_bytes());
        }
        out.write_all(&header)?;
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Self { out, written: header.len() as u64, epoch })
    }

    /// Appends a frame seen at `at`, unless the file is full.
    pub fn frame(&mut self, at: Duration, frame: &[u8]) -> io::Result<()> {
        if self.written >= MAX_FILE {
            return Ok(());
        }
        let kept = &frame[..frame.len().min(SNAP)];
        let time = self.epoch + at;
        for word in [time.as_secs() as u32, time.subsec_nanos(), kept.len() as u32, frame.len() as u32] {
            self.out.write_all(&word.to_le_bytes())?;
        }
        self.out.write_all(kept)?;
        self.written += 16 + kept.len() as u64;
        Ok(())
    }

    /// Writes out what is buffered.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_the_documented_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pcap");
        let mut pcap = Pcap::create(&path).unwrap();
        pcap.frame(Duration::from_millis(1), &[7; 60]).unwrap();
        pcap.frame(Duration::from_millis(2), &[8; 1514]).unwrap();
        pcap.flush().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes[..8], [0x4d, 0x3c, 0xb2, 0xa1, 2, 0, 4, 0]);
        assert_eq!(bytes[20], 1, "link type Ethernet");
        assert_eq!(bytes[24 + 8..24 + 16], [60, 0, 0, 0, 60, 0, 0, 0]);
        let second = 24 + 16 + 60;
        assert_eq!(bytes[second + 8..second + 16], [160, 0, 0, 0, 0xea, 5, 0, 0]);
        assert_eq!(bytes.len(), second + 16 + 160);
    }
}
