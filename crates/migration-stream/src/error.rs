//! What can be wrong with a stream, and where.

use std::fmt;

use thiserror::Error;

/// Which of the nested formats a header or record belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layer {
    /// The header that `xl save` puts before the libxl stream (`struct save_file_header`, tools/xl/xl.h).
    Xl,
    /// docs/specs/libxl-migration-stream.pandoc.
    Libxl,
    /// docs/specs/libxc-migration-stream.pandoc.
    Libxc,
}

impl Layer {
    /// The name of the layer as written in reports and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Layer::Xl => "xl",
            Layer::Libxl => "libxl",
            Layer::Libxc => "libxc",
        }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A fault in a stream: what it is, in which header or record, and at which byte.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("byte {offset:#x}: {place}: {kind}")]
pub struct StreamError {
    /// Bytes from the start of the stream to the header or record at fault.
    pub offset: u64,
    /// The header or record at fault.
    pub place: Place,
    /// What is wrong with it.
    pub kind: ErrorKind,
}

/// The header or record that a [`StreamError`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A header of this layer.
    Header(Layer),
    /// A record of this layer, by its type on the wire.
    Record(Layer, u32),
    /// The stream as a whole.
    Stream,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Place::Header(layer) => write!(f, "{layer} header"),
            Place::Record(layer, rtype) => {
                write!(f, "{layer} record {} ({rtype:#010x})", crate::record_name(layer, rtype))
            }
            Place::Stream => f.write_str("stream"),
        }
    }
}

/// What is wrong. Field names are those of docs/stream-format.md and of Xen's own documents.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ErrorKind {
    /// The first bytes are those of none of the three formats.
    #[error("this is no saved domain: the first eight bytes are {found:02x?}")]
    NotAStream {
        /// The bytes found.
        found: [u8; 8],
    },
    /// A field that identifies the format holds something else.
    #[error("{field} is {found:#x}, expected {expected:#x}")]
    BadMagic {
        /// Field name.
        field: &'static str,
        /// The value that the format fixes.
        expected: u64,
        /// The value found.
        found: u64,
    },
    /// A format, image or record version that this code does not read.
    #[error("version {found} of {what} is not known; this program reads {supported}")]
    UnsupportedVersion {
        /// What carries the version.
        what: &'static str,
        /// The versions that are read, in words.
        supported: &'static str,
        /// The version found.
        found: u32,
    },
    /// The stream comes from a big-endian host; every x86 host writes little-endian.
    #[error("the stream is big-endian; x86 hosts write little-endian")]
    BigEndian,
    /// The body ended inside a field.
    #[error("the body ends inside {field}: {wanted} more bytes wanted, {have} there")]
    TooShort {
        /// Field name.
        field: &'static str,
        /// Size of the field in bytes.
        wanted: usize,
        /// Bytes left in the body.
        have: usize,
    },
    /// The body goes on after the last field.
    #[error("{extra} bytes too many after the last field")]
    TooLong {
        /// Bytes left over.
        extra: usize,
    },
    /// A record (or the xl header's data) is longer than the reader allows.
    #[error("length {length} is more than the {limit} bytes that are allowed")]
    OverLimit {
        /// Length that the stream claims, in bytes.
        length: u64,
        /// The reader's limit, in bytes.
        limit: u64,
    },
    /// A field holds a value that the format forbids.
    #[error("{field} is {value:#x}: {why}")]
    BadValue {
        /// Field name.
        field: &'static str,
        /// The value found.
        value: u64,
        /// Why it is not allowed.
        why: &'static str,
    },
    /// Text that is not UTF-8, or holds a NUL.
    #[error("{field} is not text")]
    BadText {
        /// Field name.
        field: &'static str,
    },
    /// Padding or a reserved field is not zero.
    #[error("{field} must be zero")]
    NotZero {
        /// Field name.
        field: &'static str,
    },
    /// A mandatory record that this code does not know; restoring must not go on.
    #[error("mandatory record of unknown type; a newer or foreign sender wrote it, restoring must not go on")]
    UnknownMandatory,
    /// A record that is only valid as mandatory came with the optional bit set.
    #[error("carries the optional bit, but a receiver that skipped it would damage the guest")]
    MustBeMandatory,
    /// A record in the wrong place.
    #[error("out of order: {why}")]
    OutOfOrder {
        /// What should have come before or after it.
        why: &'static str,
    },
    /// The stream lacks something that must be there.
    #[error("{what} is missing")]
    Missing {
        /// The record or entry that is missing.
        what: &'static str,
    },
    /// The bytes differ from what the sender wrote.
    #[error("checksum {computed:#010x} computed, {stored:#010x} stored: the stream was damaged on the way")]
    Checksum {
        /// CRC-32 over the bytes received.
        computed: u32,
        /// CRC-32 that the sender stored.
        stored: u32,
    },
    /// The stream ended before its END record.
    #[error("the stream ends here, before its END record")]
    Truncated,
    /// Bytes after the stream's last record.
    #[error("there are bytes after the END record")]
    AfterEnd,
}
