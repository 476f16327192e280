//! From headers and records to bytes.

use crate::decoder::Event;
use crate::error::Layer;
use crate::libxc::{self, DomainHeader, ImageHeader};
use crate::libxl::{self, LibxlHeader};
use crate::wire::Field;
use crate::xl::{self, XlHeader};
use crate::{OPTIONAL, gt, padding};

/// Writes a stream into a buffer of its own; take the bytes with [`Encoder::take`] as often as it suits.
#[derive(Debug, Default)]
pub struct Encoder {
    out: Vec<u8>,
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
        std::mem::take(&mut self.out)
    }

    /// The header of an `xl save` file, with libxl's JSON as its configuration.
    pub fn xl_header(&mut self, config_json: &[u8]) {
        let data = xl::optional_data(config_json);
        let header = XlHeader {
            mandatory_flags: xl::MANDATORY_JSON | xl::MANDATORY_STREAM_V2,
            optional_flags: 0,
            optional_data_len: data.len() as u32,
        };
        header.encode(&mut self.out);
        self.out.extend_from_slice(&data);
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
        let put = |out: &mut Vec<u8>| {
            out.reserve(16 + body.len());
            rtype.put(out);
            (body.len() as u32).put(out);
            out.extend_from_slice(body);
            out.resize(out.len() + padding(body.len()), 0);
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
        let body = libxc::PageData::encode(entries, pages);
        self.raw(Layer::Libxc, libxc::rec::PAGE_DATA, &body);
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
            Event::Xl(header, data) => {
                header.encode(&mut self.out);
                self.out.extend_from_slice(data);
            }
            Event::Libxl(header) => self.in_stream(|out| header.encode(out)),
            Event::Image(header) => self.image_header(header),
            Event::Domain(header) => self.in_image(|out| header.put(out)),
            Event::Record(record) => self.raw(record.layer, record.rtype, record.body),
        }
    }

    fn in_image(&mut self, put: impl FnOnce(&mut Vec<u8>)) {
        let start = self.out.len();
        put(&mut self.out);
        self.image_crc.update(&self.out[start..]);
    }

    fn in_stream(&mut self, put: impl FnOnce(&mut Vec<u8>)) {
        let start = self.out.len();
        put(&mut self.out);
        self.stream_crc.update(&self.out[start..]);
    }
}
