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
use std::io::{self, Read, Write};
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
    Stream(Vec<u8>),
    /// To be answered at once by a pong with the same number.
    Ping(u64),
    Pong(u64),
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
    fn encode_payload(&self) -> (u8, Vec<u8>) {
        // Words are plain structures with string keys: JSON can always hold them.
        let json = |said: serde_json::Result<Vec<u8>>| said.unwrap_or_default();
        match self {
            Frame::ToDestination(said) => (kind::TO_DESTINATION, json(serde_json::to_vec(said))),
            Frame::ToSource(said) => (kind::TO_SOURCE, json(serde_json::to_vec(said))),
            Frame::Stream(bytes) => (kind::STREAM, bytes.clone()),
            Frame::Ping(number) => (kind::PING, number.to_le_bytes().to_vec()),
            Frame::Pong(number) => (kind::PONG, number.to_le_bytes().to_vec()),
        }
    }

    /// Writes the frame, without flushing.
    pub fn write(&self, to: &mut impl Write) -> Result<(), WireError> {
        match self {
            Frame::Stream(bytes) => write_frame(to, kind::STREAM, bytes),
            _ => {
                let (kind, payload) = self.encode_payload();
                write_frame(to, kind, &payload)
            }
        }
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
        // Memory grows with what really arrives, not with what the header claims.
        let mut payload = Vec::new();
        from.take(length.into()).read_to_end(&mut payload)?;
        if payload.len() != length as usize {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let mut stored = [0; 4];
        from.read_exact(&mut stored)?;
        let stored = u32::from_le_bytes(stored);
        let mut crc = crc32fast::Hasher::new();
        crc.update(&header);
        crc.update(&payload);
        let computed = crc.finalize();
        if computed != stored {
            return Err(WireError::Checksum { computed, stored });
        }
        Self::decode(kind, payload).map(Some)
    }

    fn decode(kind: u8, payload: Vec<u8>) -> Result<Frame, WireError> {
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
            kind::STREAM => Frame::Stream(payload),
            kind::PING => Frame::Ping(number(&payload)?),
            kind::PONG => Frame::Pong(number(&payload)?),
            other => return Err(WireError::Kind(other)),
        })
    }
}

/// Writes bytes of the image, in as many frames as it takes.
pub fn write_stream(to: &mut impl Write, bytes: &[u8]) -> Result<(), WireError> {
    for chunk in bytes.chunks(MAX_PAYLOAD as usize) {
        write_frame(to, kind::STREAM, chunk)?;
    }
    Ok(())
}

fn write_frame(to: &mut impl Write, kind: u8, payload: &[u8]) -> Result<(), WireError> {
    let length = u32::try_from(payload.len()).ok().filter(|l| *l <= MAX_PAYLOAD);
    let length = length.ok_or(WireError::TooLong(payload.len().try_into().unwrap_or(u32::MAX)))?;
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&length.to_le_bytes());
    header[4] = kind;
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header);
    crc.update(payload);
    to.write_all(&header)?;
    to.write_all(payload)?;
    to.write_all(&crc.finalize().to_le_bytes())?;
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
            Frame::Stream(vec![7; 5000]),
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
