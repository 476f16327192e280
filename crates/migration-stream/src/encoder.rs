//! From headers and records to bytes.

use crate::decoder::Event;
use crate::error::Layer;
use crate::libxc::{self, DomainHeader, ImageHeader};
use crate::libxl::{self, LibxlHeader};
use crate::wire::Field;
use crate::xl::{self, XlHeader};
use crate::{OPTIONAL, gt, padding};

/// Writes a stream into a buffer of its own; take the bytes with [`Encoder::take`], or look at them and [`Encoder::clear`] them, as
/// often as it suits.
#[derive(Debug, Default)]
pub struct Encoder {
    out: Vec<u8>,
    /// Over `out`. Each piece is gone over once, and its checksum joined to all that it counts for.
    out_crc: crc32fast::Hasher,
    image_crc: crc32fast::Hasher,
    stream_crc: crc32fast::Hasher,
}

impl Encoder {
    /// An encoder with an empty buffer.
    pub fn new() -> Self {
        Encoder::default()
    }

    /// Bytes that wait in the buffer.
    pub fn len(&self) -> usize {
        self.out.len()
    }

    /// Nothing waits in the buffer.
    pub fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    /// What has been written since the last call.
    pub fn take(&mut self) -> Vec<u8> {
        self.out_crc.reset();
        std::mem::take(&mut self.out)
    }

    /// What waits in the buffer.
    pub fn bytes(&self) -> &[u8] {
        &self.out
    }

    /// CRC-32 (IEEE) of what waits in the buffer.
    pub fn crc(&self) -> u32 {
        self.out_crc.clone().finalize()
    }

    /// Empties the buffer and keeps its room: a new one of some MiB for each batch of pages would be filled by page faults.
    pub fn clear(&mut self) {
        self.out_crc.reset();
        self.out.clear();
    }

    /// The header of an `xl save` file, with libxl's JSON as its configuration.
    pub fn xl_header(&mut self, config_json: &[u8]) {
        let data = xl::optional_data(config_json);
        let header = XlHeader {
            mandatory_flags: xl::MANDATORY_JSON | xl::MANDATORY_STREAM_V2,
            optional_flags: 0,
            optional_data_len: data.len() as u32,
        };
        self.xl(&header, &data);
    }

    fn xl(&mut self, header: &XlHeader, data: &[u8]) {
        self.append(|out| {
            header.encode(out);
            out.extend_from_slice(data);
        });
    }

    /// The header of a libxl stream.
    pub fn libxl_header(&mut self) {
        self.in_stream(|out| LibxlHeader { options: 0 }.encode(out));
    }

    /// Image and domain header of a libxc image, from which checksums count.
    pub fn image(&mut self, domain: &DomainHeader) {
        self.image_header(&ImageHeader { version: libxc::VERSION });
        self.in_image(|out| domain.put(out));
    }

    fn image_header(&mut self, header: &ImageHeader) {
        self.image_crc = crc32fast::Hasher::new();
        self.in_image(|out| header.encode(out));
    }

    /// A record from its type and body.
    pub fn raw(&mut self, layer: Layer, rtype: u32, body: &[u8]) {
        self.record(layer, rtype, body.len(), |out| out.extend_from_slice(body));
    }

    /// A record whose body is put in place, `length` bytes of it.
    fn record(&mut self, layer: Layer, rtype: u32, length: usize, body: impl FnOnce(&mut Vec<u8>)) {
        let put = |out: &mut Vec<u8>| {
            out.reserve(16 + length);
            rtype.put(out);
            (length as u32).put(out);
            body(out);
            out.resize(out.len() + padding(length), 0);
        };
        match layer {
            Layer::Libxc => self.in_image(put),
            Layer::Libxl | Layer::Xl => self.in_stream(put),
        }
    }

    /// A record of the libxl stream.
    pub fn libxl(&mut self, record: &libxl::Record<'_>) {
        let (rtype, body) = record.encode();
        self.raw(Layer::Libxl, rtype, &body);
    }

    /// A record of the libxc image.
    pub fn libxc(&mut self, record: &libxc::Record<'_>) {
        let (rtype, body) = record.encode();
        self.raw(Layer::Libxc, rtype, &body);
    }

    /// A mandatory GT record of the libxl stream.
    pub fn gt_libxl(&mut self, record: &gt::LibxlRecord) {
        let (rtype, body) = record.encode();
        self.raw(Layer::Libxl, rtype, &body);
    }

    /// A mandatory GT record of the libxc image.
    pub fn gt_libxc(&mut self, record: &gt::LibxcRecord) {
        let (rtype, body) = record.encode();
        self.raw(Layer::Libxc, rtype, &body);
    }

    /// A PAGE_DATA record: the entries, and 4096 bytes for each that has contents.
    pub fn page_data(&mut self, entries: &[libxc::PageEntry], pages: &[u8]) {
        let length = libxc::PageData::size(entries, pages);
        self.record(Layer::Libxc, libxc::rec::PAGE_DATA, length, |out| libxc::PageData::encode(entries, pages, out));
    }

    /// GT_CHECKSUM over the image so far; optional for an ordinary stream.
    pub fn checksum(&mut self, optional: bool) {
        let crc = self.image_crc.clone().finalize();
        let (rtype, body) = gt::LibxcRecord::Checksum(crc).encode();
        self.raw(Layer::Libxc, rtype | if optional { OPTIONAL } else { 0 }, &body);
    }

    /// GT_STREAM_CHECKSUM over the libxl layer so far; optional for an ordinary stream.
    pub fn stream_checksum(&mut self, optional: bool) {
        let crc = self.stream_crc.clone().finalize();
        let (rtype, body) = gt::LibxlRecord::Checksum(crc).encode();
        self.raw(Layer::Libxl, rtype | if optional { OPTIONAL } else { 0 }, &body);
    }

    /// What a decoder gave, written again.
    pub fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Xl(header, data) => self.xl(header, data),
            Event::Libxl(header) => self.in_stream(|out| header.encode(out)),
            Event::Image(header) => self.image_header(header),
            Event::Domain(header) => self.in_image(|out| header.put(out)),
            Event::Record(record) => self.raw(record.layer, record.rtype, record.body),
        }
    }

    fn in_image(&mut self, put: impl FnOnce(&mut Vec<u8>)) {
        let crc = self.append(put);
        self.image_crc.combine(&crc);
    }

    fn in_stream(&mut self, put: impl FnOnce(&mut Vec<u8>)) {
        let crc = self.append(put);
        self.stream_crc.combine(&crc);
    }

    /// Gives the checksum of what was put.
    fn append(&mut self, put: impl FnOnce(&mut Vec<u8>)) -> crc32fast::Hasher {
        let start = self.out.len();
        put(&mut self.out);
        let mut crc = crc32fast::Hasher::new();
        crc.update(&self.out[start..]);
        self.out_crc.combine(&crc);
        crc
    }
}
