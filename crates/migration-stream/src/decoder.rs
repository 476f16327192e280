//! From bytes, as they come, to headers and records.

use crate::error::{ErrorKind, Layer, Place, StreamError};
use crate::libxc::{self, DomainHeader, ImageHeader};
use crate::libxl::{self, LibxlHeader};
use crate::wire::Field;
use crate::xl::{self, XlHeader};
use crate::{OPTIONAL, RECORD_HEADER_SIZE, array, gt, padding};

/// How much a decoder takes before it refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest body of a record, in bytes. The decoder holds one record at a time, and no more of it than has come.
    pub record: u32,
    /// Longest configuration behind the xl header, in bytes.
    pub config: u32,
}

impl Default for Limits {
    /// Xen's own limit for records (`REC_LENGTH_MAX`, 128 MiB), and 1 MiB for the configuration.
    fn default() -> Self {
        Limits { record: libxc::RECORD_MAX, config: 1 << 20 }
    }
}

/// A record as it lies in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawRecord<'a> {
    /// libxl or libxc.
    pub layer: Layer,
    /// Type on the wire, optional bit included.
    pub rtype: u32,
    /// Offset of its header from the start of the stream.
    pub offset: u64,
    /// Body without padding.
    pub body: &'a [u8],
}

impl<'a> RawRecord<'a> {
    /// The name of its type, or "unknown".
    pub fn name(&self) -> &'static str {
        crate::record_name(self.layer, self.rtype)
    }

    /// Whether a receiver that does not know it may skip it.
    pub fn optional(&self) -> bool {
        self.rtype & OPTIONAL != 0
    }

    /// Which GT record it is, if it is one.
    pub fn gt_type(&self) -> Option<gt::Type> {
        gt::Type::of(self.layer, self.rtype)
    }

    /// An error about this record.
    pub fn error(&self, kind: ErrorKind) -> StreamError {
        StreamError { offset: self.offset, place: Place::Record(self.layer, self.rtype), kind }
    }

    /// The body as a record of the libxc image.
    pub fn libxc(&self) -> Result<libxc::Record<'a>, StreamError> {
        libxc::Record::decode(self.rtype, self.body).map_err(|kind| self.error(kind))
    }

    /// The body as a record of the libxl stream.
    pub fn libxl(&self) -> Result<libxl::Record<'a>, StreamError> {
        libxl::Record::decode(self.rtype, self.body).map_err(|kind| self.error(kind))
    }
}

/// The next thing in a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'a> {
    /// The header of `xl save`, and the optional data behind it.
    Xl(XlHeader, &'a [u8]),
    /// The header of a libxl stream.
    Libxl(LibxlHeader),
    /// The header of a libxc image.
    Image(ImageHeader),
    /// The domain header behind it.
    Domain(DomainHeader),
    /// A record. Its body is not judged yet: [`RawRecord::libxc`], [`RawRecord::libxl`].
    Record(RawRecord<'a>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    Xl,
    LibxlHeader,
    LibxlRecords,
    ImageHeader,
    DomainHeader,
    LibxcRecords,
    Done,
}

/// Reads a stream: an `xl save` file, a libxl stream or a bare libxc image, told apart by their first bytes.
///
/// Feed it bytes with [`Decoder::feed`], then take events with [`Decoder::next`] until it gives `None`, and again. After an
/// error it gives that error for ever. At the end of the input call [`Decoder::finish`].
#[derive(Debug)]
pub struct Decoder {
    limits: Limits,
    /// Bytes not consumed yet, from `at` on.
    buf: Vec<u8>,
    at: usize,
    /// Offset of `buf[at]` in the stream.
    offset: u64,
    state: State,
    /// The libxc image lies in a libxl stream.
    nested: bool,
    /// The image stopped at a CHECKPOINT and goes on after libxl's CHECKPOINT_END, without headers.
    in_checkpoint: bool,
    /// Over the image, and over the libxl layer around it.
    image_crc: crc32fast::Hasher,
    stream_crc: crc32fast::Hasher,
    failed: Option<StreamError>,
}

impl Default for Decoder {
    fn default() -> Self {
        Decoder::new(Limits::default())
    }
}

impl Decoder {
    /// A decoder at the start of a stream.
    pub fn new(limits: Limits) -> Self {
        Decoder {
            limits,
            buf: Vec::new(),
            at: 0,
            offset: 0,
            state: State::Start,
            nested: false,
            in_checkpoint: false,
            image_crc: crc32fast::Hasher::new(),
            stream_crc: crc32fast::Hasher::new(),
            failed: None,
        }
    }

    /// Adds bytes. They are copied, so the decoder holds one record and what was fed behind it.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.failed.is_some() {
            return;
        }
        self.buf.drain(..self.at);
        self.at = 0;
        self.buf.extend_from_slice(bytes);
    }

    /// Adds bytes that the caller has no more use for. They are not copied if all that was fed before has been taken.
    pub fn feed_owned(&mut self, bytes: Vec<u8>) {
        if self.failed.is_none() && self.at == self.buf.len() {
            self.buf = bytes;
            self.at = 0;
        } else {
            self.feed(&bytes);
        }
    }

    /// Bytes consumed since the start of the stream.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The input ends here.
    pub fn finish(&mut self) -> Result<(), StreamError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if self.state != State::Done {
            let offset = self.offset + (self.buf.len() - self.at) as u64;
            return Err(StreamError { offset, place: Place::Stream, kind: ErrorKind::Truncated });
        }
        Ok(())
    }

    /// The next header or record; `None` when more bytes are wanted, or at the end.
    #[allow(clippy::should_implement_trait, reason = "the event borrows from the decoder, which Iterator cannot say")]
    pub fn next(&mut self) -> Result<Option<Event<'_>>, StreamError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        match self.step() {
            Ok(None) => Ok(None),
            Ok(Some((item, size))) => {
                let start = self.at;
                let offset = self.offset;
                self.at += size;
                self.offset += size as u64;
                let whole = &self.buf[start..start + size];
                Ok(Some(match item {
                    Item::Xl(header) => Event::Xl(header, &whole[xl::HEADER_SIZE..]),
                    Item::Libxl(header) => Event::Libxl(header),
                    Item::Image(header) => Event::Image(header),
                    Item::Domain(header) => Event::Domain(header),
                    Item::Record { layer, rtype, length } => {
                        let body = &whole[RECORD_HEADER_SIZE..RECORD_HEADER_SIZE + length];
                        Event::Record(RawRecord { layer, rtype, offset, body })
                    }
                }))
            }
            Err(error) => {
                self.failed = Some(error.clone());
                self.buf = Vec::new();
                self.at = 0;
                Err(error)
            }
        }
    }

    fn step(&mut self) -> Result<Option<(Item, usize)>, StreamError> {
        let pending = &self.buf[self.at..];
        let offset = self.offset;
        let header_error = |layer| move |kind| StreamError { offset, place: Place::Header(layer), kind };
        if self.state == State::Start {
            let Some(first) = pending.first_chunk::<8>() else { return Ok(None) };
            self.state = if *first == xl::MAGIC[..8] {
                State::Xl
            } else if *first == libxl::IDENT.to_be_bytes() {
                State::LibxlHeader
            } else if *first == libxc::MARKER.to_be_bytes() {
                State::ImageHeader
            } else {
                let kind = ErrorKind::NotAStream { found: *first };
                return Err(StreamError { offset, place: Place::Stream, kind });
            };
        }
        match self.state {
            State::Start => Ok(None),
            State::Xl => {
                let Some(bytes) = pending.first_chunk() else { return Ok(None) };
                let header = XlHeader::decode(bytes).map_err(header_error(Layer::Xl))?;
                if header.optional_data_len > self.limits.config {
                    let (length, limit) = (header.optional_data_len.into(), self.limits.config.into());
                    return Err(header_error(Layer::Xl)(ErrorKind::OverLimit { length, limit }));
                }
                let size = xl::HEADER_SIZE + header.optional_data_len as usize;
                if pending.len() < size {
                    return Ok(None);
                }
                self.state = State::LibxlHeader;
                Ok(Some((Item::Xl(header), size)))
            }
            State::LibxlHeader => {
                let Some(bytes) = pending.first_chunk() else { return Ok(None) };
                let header = LibxlHeader::decode(bytes).map_err(header_error(Layer::Libxl))?;
                self.stream_crc.update(bytes);
                self.state = State::LibxlRecords;
                self.nested = true;
                Ok(Some((Item::Libxl(header), libxl::HEADER_SIZE)))
            }
            State::ImageHeader => {
                let Some(bytes) = pending.first_chunk() else { return Ok(None) };
                let header = ImageHeader::decode(bytes).map_err(header_error(Layer::Libxc))?;
                self.image_crc = crc32fast::Hasher::new();
                self.image_crc.update(bytes);
                self.state = State::DomainHeader;
                Ok(Some((Item::Image(header), libxc::IMAGE_HEADER_SIZE)))
            }
            State::DomainHeader => {
                let Some(bytes) = pending.first_chunk::<{ libxc::DOMAIN_HEADER_SIZE }>() else { return Ok(None) };
                let header = DomainHeader::decode(bytes).map_err(header_error(Layer::Libxc))?;
                header.validate().map_err(header_error(Layer::Libxc))?;
                self.image_crc.update(bytes);
                self.state = State::LibxcRecords;
                Ok(Some((Item::Domain(header), libxc::DOMAIN_HEADER_SIZE)))
            }
            State::LibxlRecords => self.record(Layer::Libxl),
            State::LibxcRecords => self.record(Layer::Libxc),
            State::Done if pending.is_empty() => Ok(None),
            State::Done => Err(StreamError { offset, place: Place::Stream, kind: ErrorKind::AfterEnd }),
        }
    }

    fn record(&mut self, layer: Layer) -> Result<Option<(Item, usize)>, StreamError> {
        let pending = &self.buf[self.at..];
        let Some(header) = pending.first_chunk::<RECORD_HEADER_SIZE>() else { return Ok(None) };
        let rtype = u32::from_le_bytes(array(&header[..4]));
        let claimed = u32::from_le_bytes(array(&header[4..]));
        let offset = self.offset;
        let error = |kind| StreamError { offset, place: Place::Record(layer, rtype), kind };
        if claimed > self.limits.record {
            return Err(error(ErrorKind::OverLimit { length: claimed.into(), limit: self.limits.record.into() }));
        }
        let length = claimed as usize;
        let size = RECORD_HEADER_SIZE + length + padding(length);
        let Some(whole) = pending.get(..size) else { return Ok(None) };
        if whole[RECORD_HEADER_SIZE + length..].iter().any(|&b| b != 0) {
            return Err(error(ErrorKind::NotZero { field: "padding" }));
        }
        let body = &whole[RECORD_HEADER_SIZE..RECORD_HEADER_SIZE + length];
        let crc = if layer == Layer::Libxc { &mut self.image_crc } else { &mut self.stream_crc };
        if let Some(gt::Type::Checksum | gt::Type::StreamChecksum) = gt::Type::of(layer, rtype) {
            let computed = crc.clone().finalize();
            let stored = gt::decode_checksum(body).map_err(error)?;
            if stored != computed {
                return Err(error(ErrorKind::Checksum { computed, stored }));
            }
        }
        crc.update(whole);
        self.state = match (layer, rtype) {
            (Layer::Libxc, libxc::rec::END) if self.nested => State::LibxlRecords,
            (Layer::Libxc, libxc::rec::END) => State::Done,
            (Layer::Libxc, libxc::rec::CHECKPOINT) if self.nested => {
                self.in_checkpoint = true;
                State::LibxlRecords
            }
            (Layer::Libxl, libxl::rec::LIBXC_CONTEXT) => State::ImageHeader,
            (Layer::Libxl, libxl::rec::CHECKPOINT_END) if self.in_checkpoint => {
                self.in_checkpoint = false;
                State::LibxcRecords
            }
            (Layer::Libxl, libxl::rec::END) => State::Done,
            _ => self.state,
        };
        Ok(Some((Item::Record { layer, rtype, length }, size)))
    }
}

/// An [`Event`] that borrows nothing.
enum Item {
    Xl(XlHeader),
    Libxl(LibxlHeader),
    Image(ImageHeader),
    Domain(DomainHeader),
    Record { layer: Layer, rtype: u32, length: usize },
}
