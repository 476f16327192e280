//! Frames: the unit in which the byte stream between lab and agent is cut.
//!
//! ```text
//! u32 LE  length of what follows (5 + body)
//! u32 LE  stream number: chosen by the lab, one for each request; 0 is the agent itself
//! u8      kind
//! bytes   body: JSON for open, done, failed and hello; raw bytes for the data kinds; empty otherwise
//! ```

use std::io::{self, Read, Write};

/// The longest body a frame may have, in bytes. Longer data is sent in several frames.
pub const MAX_BODY: usize = 1 << 20;

/// Bytes of the fixed part that the length field counts.
const HEAD: usize = 5;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Agent to lab, stream 0, once whenever the agent starts: a [`crate::message::Hello`].
    Hello = 1,
    /// Lab to agent: a [`crate::message::Request`] that opens the stream.
    Open = 2,
    /// Lab to agent: bytes for standard input or for the file. Agent to lab: standard output, or the file's bytes.
    Data = 3,
    /// Agent to lab: bytes of standard error.
    ErrorData = 4,
    /// Lab to agent: no more [`Kind::Data`] comes.
    End = 5,
    /// Lab to agent: kill the stream's process group.
    Kill = 6,
    /// Lab to agent: the terminal's new size, two u16 LE, rows then columns.
    Resize = 7,
    /// Agent to lab: the stream is over, a [`crate::message::Done`].
    Done = 8,
    /// Agent to lab: the request could not be carried out, a [`crate::message::Failed`]; the stream is over.
    Failed = 9,
    /// Lab to agent on stream 0: answer with a hello. Used to find the start of a frame after a (re)connection.
    Ping = 10,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        Some(match byte {
            1 => Kind::Hello,
            2 => Kind::Open,
            3 => Kind::Data,
            4 => Kind::ErrorData,
            5 => Kind::End,
            6 => Kind::Kill,
            7 => Kind::Resize,
            8 => Kind::Done,
            9 => Kind::Failed,
            10 => Kind::Ping,
            _ => return None,
        })
    }
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Which request it belongs to; 0 for the agent itself.
    pub stream: u32,
    /// What it is.
    pub kind: Kind,
    /// What it carries, at most [`MAX_BODY`] bytes.
    pub body: Vec<u8>,
}

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream itself failed or ended within a frame.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// The length field is impossible.
    #[error("a frame claims {0} bytes, outside {HEAD}..={max}", max = MAX_BODY + HEAD)]
    Length(u32),
    /// The kind byte is unknown.
    #[error("a frame has the unknown kind {0}")]
    Kind(u8),
}

impl Frame {
    /// A frame without a body.
    pub fn empty(stream: u32, kind: Kind) -> Frame {
        Frame { stream, kind, body: Vec::new() }
    }

    /// A frame whose body is `value` as JSON.
    pub fn json<T: serde::Serialize>(stream: u32, kind: Kind, value: &T) -> Result<Frame, FrameError> {
        let body = serde_json::to_vec(value).map_err(io::Error::from)?;
        Ok(Frame { stream, kind, body })
    }

    /// Reads one frame; `None` when the stream ends between frames.
    pub fn read(from: &mut impl Read) -> Result<Option<Frame>, FrameError> {
        let mut length = [0u8; 4];
        let mut got = 0;
        while got < length.len() {
            match from.read(&mut length[got..]) {
                Ok(0) if got == 0 => return Ok(None),
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(n) => got += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        let length = u32::from_le_bytes(length);
        let body_len =
            (length as usize).checked_sub(HEAD).filter(|len| *len <= MAX_BODY).ok_or(FrameError::Length(length))?;
        let mut head = [0u8; HEAD];
        from.read_exact(&mut head)?;
        let [s0, s1, s2, s3, kind] = head;
        let kind = Kind::from_byte(kind).ok_or(FrameError::Kind(kind))?;
        let mut body = vec![0u8; body_len];
        from.read_exact(&mut body)?;
        Ok(Some(Frame { stream: u32::from_le_bytes([s0, s1, s2, s3]), kind, body }))
    }

    /// Writes the frame in one `write_all`. A body over [`MAX_BODY`] is refused.
    pub fn write(&self, to: &mut impl Write) -> Result<(), FrameError> {
        if self.body.len() > MAX_BODY {
            return Err(FrameError::Length(u32::try_from(self.body.len()).unwrap_or(u32::MAX)));
        }
        let length = (self.body.len() + HEAD) as u32;
        let mut bytes = Vec::with_capacity(4 + HEAD + self.body.len());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&self.stream.to_le_bytes());
        bytes.push(self.kind as u8);
        bytes.extend_from_slice(&self.body);
        to.write_all(&bytes)?;
        to.flush()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(stream: u32, kind in 1u8..=10, body in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let frame = Frame { stream, kind: Kind::from_byte(kind).expect("1..=10 are all known"), body };
            let mut bytes = Vec::new();
            frame.write(&mut bytes).expect("a vector takes it");
            let mut rest = bytes.as_slice();
            let read = Frame::read(&mut rest).expect("well formed").expect("not empty");
            prop_assert_eq!(read, frame);
            prop_assert!(rest.is_empty());
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut rest = bytes.as_slice();
            while let Ok(Some(_)) = Frame::read(&mut rest) {}
        }
    }

    #[test]
    fn a_cut_frame_is_an_error_and_a_clean_end_is_not() {
        let mut bytes = Vec::new();
        Frame { stream: 7, kind: Kind::Data, body: vec![1, 2, 3] }.write(&mut bytes).expect("a vector takes it");
        for cut in 1..bytes.len() {
            assert!(matches!(Frame::read(&mut &bytes[..cut]), Err(FrameError::Io(_))), "cut at {cut}");
        }
        assert!(matches!(Frame::read(&mut &bytes[..0]), Ok(None)));
    }

    #[test]
    fn a_huge_length_is_refused_before_memory_is_taken() {
        let bytes = [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 3];
        assert!(matches!(Frame::read(&mut bytes.as_slice()), Err(FrameError::Length(0xffff_ffff))));
    }
}
