//! Frames on the connection between two hosts.
//!
//! ```text
//! greeting  "FERRYGT1"  (8 bytes, from each side, before anything else)
//! frame     length of payload (u32 LE)  kind (u8)  zero (3 bytes)  payload  CRC-32 (IEEE) of all before it (u32 LE)
//! ```
//!
//! Kinds and payloads: [`Frame`]. docs/handshake.md specifies the words' details. A frame that is too long, damaged or of an
//! unknown kind ends the connection with an error; nothing in it has been acted on.

use crate::handshake::{ToDestination, ToSource};
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, Read, Write};
use uuid::Uuid;

pub const GREETING: &[u8; 8] = b"FERRYGT1";
const HEADER: usize = 8;
/// Longest payload of any frame, bytes: a batch of pages with room for its headers, or the largest record of a domain's image.
pub const MAX_PAYLOAD: u32 = 8 << 20;

mod kind {
    pub const TO_DESTINATION: u8 = 1;
    pub const TO_SOURCE: u8 = 2;
    pub const STREAM: u8 = 3;
    pub const PING: u8 = 4;
    pub const PONG: u8 = 5;
}

/// What one frame carries.
#[derive(Debug, Clone, PartialEq)]
pub enum Frame {
    /// A word of the source, its migration, and what goes with it (JSON).
    ToDestination(Said<ToDestination>),
    /// A word of the destination.
    ToSource(Said<ToSource>),
    /// The next bytes of the domain's image (docs/stream-format.md), cut anywhere.
    Stream(Piece),
    /// To be answered at once by a pong with the same number.
    Ping(u64),
    Pong(u64),
}

/// Bytes of the image with their CRC-32 (IEEE), which serves the frame and the digest of the whole: each side goes over them once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub bytes: Vec<u8>,
    pub crc: u32,
}

/// Over an image, piece by piece, from the pieces' checksums.
#[derive(Debug, Clone, Default)]
pub struct Digest(crc32fast::Hasher);

impl Digest {
    /// The next piece, by its checksum and length.
    pub fn add(&mut self, crc: u32, length: usize) {
        self.0.combine(&crc32fast::Hasher::new_with_initial_len(crc, length as u64));
    }

    /// CRC-32 (IEEE) of all pieces in their order.
    pub fn value(&self) -> u32 {
        self.0.clone().finalize()
    }
}

/// A word with its migration and details.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Said<W> {
    pub id: Uuid,
    pub word: W,
    #[serde(default)]
    pub details: serde_json::Value,
}

#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("connection: {0}")]
    Io(#[from] io::Error),
    #[error("the peer is no ferry daemon of a version that can be talked to (it began with {0:02x?})")]
    Greeting([u8; 8]),
    #[error("frame of {0} bytes, longer than any can be")]
    TooLong(u32),
    #[error("frame of unknown kind {0}")]
    Kind(u8),
    #[error("frame damaged on the way (checksum {computed:#010x}, expected {stored:#010x})")]
    Checksum { computed: u32, stored: u32 },
    #[error("frame of kind {kind} that can't be read: {cause}")]
    Malformed { kind: u8, cause: String },
}

pub fn write_greeting(to: &mut impl Write) -> Result<(), WireError> {
    to.write_all(GREETING)?;
    Ok(to.flush()?)
}

pub fn read_greeting(from: &mut impl Read) -> Result<(), WireError> {
    let mut greeting = [0; 8];
    from.read_exact(&mut greeting)?;
    if &greeting != GREETING { Err(WireError::Greeting(greeting)) } else { Ok(()) }
}

impl Frame {
    /// Writes the frame, without flushing.
    pub fn write(&self, to: &mut impl Write) -> Result<(), WireError> {
        // Words are plain structures with string keys: JSON can always hold them.
        let json = |said: serde_json::Result<Vec<u8>>| said.unwrap_or_default();
        let (kind, payload) = match self {
            Frame::ToDestination(said) => (kind::TO_DESTINATION, json(serde_json::to_vec(said))),
            Frame::ToSource(said) => (kind::TO_SOURCE, json(serde_json::to_vec(said))),
            Frame::Stream(piece) => return write_frame(to, kind::STREAM, &piece.bytes, piece.crc),
            Frame::Ping(number) => (kind::PING, number.to_le_bytes().to_vec()),
            Frame::Pong(number) => (kind::PONG, number.to_le_bytes().to_vec()),
        };
        write_frame(to, kind, &payload, crc32fast::hash(&payload))
    }

    /// Reads one frame. `None` at the end of the connection between two frames.
    pub fn read(from: &mut impl Read) -> Result<Option<Frame>, WireError> {
        let mut header = [0; HEADER];
        match from.read(&mut header)? {
            0 => return Ok(None),
            n => from.read_exact(&mut header[n..])?,
        }
        let [l0, l1, l2, l3, kind, _, _, _] = header;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        if length > MAX_PAYLOAD {
            return Err(WireError::TooLong(length));
        }
        if !(kind::TO_DESTINATION..=kind::PONG).contains(&kind) {
            return Err(WireError::Kind(kind));
        }
        // Room for what the header claims, at most MAX_PAYLOAD, so that nothing is moved as it grows; pages of it are used as bytes arrive.
        let mut payload = Vec::with_capacity(length as usize);
        from.take(length.into()).read_to_end(&mut payload)?;
        if payload.len() != length as usize {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let mut stored = [0; 4];
        from.read_exact(&mut stored)?;
        let stored = u32::from_le_bytes(stored);
        let crc = crc32fast::hash(&payload);
        let computed = frame_crc(&header, crc, payload.len());
        if computed != stored {
            return Err(WireError::Checksum { computed, stored });
        }
        Self::decode(kind, payload, crc).map(Some)
    }

    fn decode(kind: u8, payload: Vec<u8>, crc: u32) -> Result<Frame, WireError> {
        let malformed = |cause: String| WireError::Malformed { kind, cause };
        let number = |payload: &[u8]| {
            payload
                .try_into()
                .map(u64::from_le_bytes)
                .map_err(|_| malformed(format!("{} bytes instead of 8", payload.len())))
        };
        Ok(match kind {
            kind::TO_DESTINATION => {
                Frame::ToDestination(serde_json::from_slice(&payload).map_err(|e| malformed(e.to_string()))?)
            }
            kind::TO_SOURCE => Frame::ToSource(serde_json::from_slice(&payload).map_err(|e| malformed(e.to_string()))?),
            kind::STREAM => Frame::Stream(Piece { bytes: payload, crc }),
            kind::PING => Frame::Ping(number(&payload)?),
            kind::PONG => Frame::Pong(number(&payload)?),
            other => return Err(WireError::Kind(other)),
        })
    }
}

/// Writes bytes of the image, in as many frames as it takes. `crc` is their CRC-32 (IEEE).
pub fn write_stream(to: &mut impl Write, bytes: &[u8], crc: u32) -> Result<(), WireError> {
    if bytes.len() <= MAX_PAYLOAD as usize {
        return write_frame(to, kind::STREAM, bytes, crc);
    }
    for chunk in bytes.chunks(MAX_PAYLOAD as usize) {
        write_frame(to, kind::STREAM, chunk, crc32fast::hash(chunk))?;
    }
    Ok(())
}

/// A frame's checksum, from that of its payload.
fn frame_crc(header: &[u8; HEADER], payload: u32, length: usize) -> u32 {
    let mut digest = Digest::default();
    digest.add(crc32fast::hash(header), HEADER);
    digest.add(payload, length);
    digest.value()
}

fn write_frame(to: &mut impl Write, kind: u8, payload: &[u8], crc: u32) -> Result<(), WireError> {
    let length = u32::try_from(payload.len()).ok().filter(|l| *l <= MAX_PAYLOAD);
    let length = length.ok_or(WireError::TooLong(payload.len().try_into().unwrap_or(u32::MAX)))?;
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&length.to_le_bytes());
    header[4] = kind;
    let crc = frame_crc(&header, crc, payload.len()).to_le_bytes();
    write_all(to, &mut [IoSlice::new(&header), IoSlice::new(payload), IoSlice::new(&crc)])
}

/// In as few writes as the connection allows: a header must not go off as a packet of its own.
fn write_all(to: &mut impl Write, mut parts: &mut [IoSlice<'_>]) -> Result<(), WireError> {
    while !parts.is_empty() {
        match to.write_vectored(parts) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
            Ok(n) => IoSlice::advance_slices(&mut parts, n),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames() -> Vec<Frame> {
        vec![
            Frame::ToDestination(Said {
                id: Uuid::from_u128(1),
                word: ToDestination::Offer,
                details: serde_json::json!({"domid": 5}),
            }),
            Frame::Stream(Piece { crc: crc32fast::hash(&[7; 5000]), bytes: vec![7; 5000] }),
            Frame::Ping(3),
            Frame::Pong(u64::MAX),
            Frame::ToSource(Said { id: Uuid::nil(), word: ToSource::Ready, details: serde_json::Value::Null }),
        ]
    }

    fn written() -> Vec<u8> {
        let mut bytes = Vec::new();
        frames().iter().for_each(|frame| frame.write(&mut bytes).unwrap());
        bytes
    }

    #[test]
    fn frames_are_read_as_they_were_written() {
        let bytes = written();
        let mut from = bytes.as_slice();
        for frame in frames() {
            assert_eq!(Frame::read(&mut from).unwrap(), Some(frame));
        }
        assert_eq!(Frame::read(&mut from).unwrap(), None);
    }

    /// Takes as little at a time as a full connection does.
    struct Slow(Vec<u8>);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let n = bytes.len().min(3);
            self.0.extend_from_slice(&bytes[..n]);
            Ok(n)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn frames_are_written_whole_however_little_is_taken_at_a_time() {
        let mut slow = Slow(Vec::new());
        frames().iter().for_each(|frame| frame.write(&mut slow).unwrap());
        assert_eq!(slow.0, written());
    }

    #[test]
    fn a_frames_checksum_is_that_of_all_before_it() {
        for frame in frames() {
            let mut bytes = Vec::new();
            frame.write(&mut bytes).unwrap();
            let (before, crc) = bytes.split_last_chunk::<4>().unwrap();
            assert_eq!(u32::from_le_bytes(*crc), crc32fast::hash(before));
        }
        // Cut into several frames, or not.
        let image: Vec<u8> = (0..MAX_PAYLOAD + 9).map(|n| n as u8).collect();
        let mut bytes = Vec::new();
        write_stream(&mut bytes, &image, crc32fast::hash(&image)).unwrap();
        write_stream(&mut bytes, &image[..99], crc32fast::hash(&image[..99])).unwrap();
        let (mut digest, mut count, mut from) = (Digest::default(), 0, bytes.as_slice());
        while let Some(Frame::Stream(piece)) = Frame::read(&mut from).unwrap() {
            digest.add(piece.crc, piece.bytes.len());
            count += 1;
        }
        let mut all = crc32fast::Hasher::new();
        all.update(&image);
        all.update(&image[..99]);
        assert_eq!((count, digest.value()), (3, all.finalize()));
    }

    #[test]
    fn a_cut_anywhere_is_an_error_or_an_end_between_frames() {
        let bytes = written();
        for cut in 0..bytes.len() {
            let mut from = &bytes[..cut];
            while let Ok(Some(_)) = Frame::read(&mut from) {}
        }
    }

    proptest! {
        #[test]
        fn a_flipped_bit_is_noticed(at in 0usize..5000, bit in 0u8..8) {
            let mut bytes = written();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            let mut from = bytes.as_slice();
            let mut read = Vec::new();
            let failed = loop {
                match Frame::read(&mut from) {
                    Ok(Some(frame)) => read.push(frame),
                    Ok(None) => break false,
                    Err(_) => break true,
                }
            };
            prop_assert!(failed);
            prop_assert_eq!(&read[..], &frames()[..read.len()]);
        }

        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut from = bytes.as_slice();
            while let Ok(Some(_)) = Frame::read(&mut from) {}
        }
    }
}
