//! Messages: a 16-byte header (`struct xsd_sockmsg`) and up to [`PAYLOAD_MAX`] bytes.
//!
//! The header's fields are in the byte order of the machine; both architectures that Xen runs on are little endian.

use crate::PAYLOAD_MAX;
use thiserror::Error;

/// Length of [`Header`] on the wire, in bytes.
pub const HEADER_LEN: usize = 16;

/// `struct xsd_sockmsg`: four little-endian `u32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Operation, see [`crate::Op`].
    pub op: u32,
    /// Chosen by the client, echoed in the reply; 0 in a watch event.
    pub req_id: u32,
    /// Transaction, or 0.
    pub tx_id: u32,
    /// Bytes of payload that follow.
    pub len: u32,
}

impl Header {
    /// Decodes the 16 bytes.
    pub fn from_bytes(b: &[u8; HEADER_LEN]) -> Header {
        let f = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
        Header { op: f(0), req_id: f(4), tx_id: f(8), len: f(12) }
    }

    /// Encodes to 16 bytes.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut b = [0; HEADER_LEN];
        for (i, v) in [self.op, self.req_id, self.tx_id, self.len].into_iter().enumerate() {
            b[i * 4..i * 4 + 4].copy_from_slice(&v.to_le_bytes());
        }
        b
    }
}

/// A whole message.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Message {
    /// The header; `len` is that of `payload`.
    pub header: Header,
    /// The payload.
    pub payload: Vec<u8>,
}

impl Message {
    /// A message of any type. The payload must not be longer than [`PAYLOAD_MAX`]; the receiver drops the connection
    /// of a sender that breaks this.
    pub fn new(op: u32, req_id: u32, tx_id: u32, payload: Vec<u8>) -> Message {
        Message { header: Header { op, req_id, tx_id, len: payload.len() as u32 }, payload }
    }

    /// Header and payload.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut v = Vec::with_capacity(HEADER_LEN + self.payload.len());
        v.extend_from_slice(&self.header.to_bytes());
        v.extend_from_slice(&self.payload);
        v
    }
}

/// A header that announces more than is allowed. The connection can't be used any more (`XENSTORE_ERROR_PROTO`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("message of {len} bytes announced, the limit is {PAYLOAD_MAX}")]
pub struct FrameError {
    /// The announced length.
    pub len: u32,
}

/// Puts messages together from pieces of any size. Holds at most one message.
///
/// It never asks for bytes beyond the message at hand, so whoever feeds it knows exactly which bytes have left the ring.
#[derive(Debug, Clone, Default)]
pub struct FrameDecoder {
    head: [u8; HEADER_LEN],
    head_used: usize,
    body: Vec<u8>,
    failed: Option<FrameError>,
}

impl FrameDecoder {
    /// An empty decoder.
    pub fn new() -> FrameDecoder {
        FrameDecoder::default()
    }

    /// How many more bytes of the stream can be used now: 0 once a message is complete.
    pub fn wants(&self) -> usize {
        if self.head_used < HEADER_LEN {
            HEADER_LEN - self.head_used
        } else {
            (Header::from_bytes(&self.head).len as usize).saturating_sub(self.body.len())
        }
    }

    /// Takes bytes up to the end of the message at hand, returns how many.
    ///
    /// # Errors
    /// A length beyond the limit; from then on every call fails.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<usize, FrameError> {
        let mut used = 0;
        while used < bytes.len() {
            if let Some(e) = self.failed {
                return Err(e);
            }
            let rest = &bytes[used..];
            let n = self.wants().min(rest.len());
            if n == 0 {
                break;
            }
            if self.head_used < HEADER_LEN {
                self.head[self.head_used..self.head_used + n].copy_from_slice(&rest[..n]);
                self.head_used += n;
                if self.head_used == HEADER_LEN {
                    let len = Header::from_bytes(&self.head).len;
                    if len as usize > PAYLOAD_MAX {
                        self.failed = Some(FrameError { len });
                        return Err(FrameError { len });
                    }
                    self.body.reserve_exact(len as usize);
                }
            } else {
                self.body.extend_from_slice(&rest[..n]);
            }
            used += n;
        }
        match self.failed {
            Some(e) => Err(e),
            None => Ok(used),
        }
    }

    /// The message, once it is complete; the decoder is empty afterwards.
    pub fn take(&mut self) -> Option<Message> {
        if self.head_used < HEADER_LEN || self.failed.is_some() || self.wants() != 0 {
            return None;
        }
        self.head_used = 0;
        Some(Message { header: Header::from_bytes(&self.head), payload: std::mem::take(&mut self.body) })
    }

    /// True if a message has been begun and not taken.
    pub fn is_partial(&self) -> bool {
        self.head_used != 0
    }

    /// The bytes held, as they came.
    pub fn partial(&self) -> Vec<u8> {
        let mut v = self.head[..self.head_used].to_vec();
        v.extend_from_slice(&self.body);
        v
    }

    /// Memory held for the payload, in bytes.
    pub fn held(&self) -> usize {
        self.body.capacity()
    }

    /// Forgets what was begun.
    pub fn reset(&mut self) {
        *self = FrameDecoder::new();
    }
}
