//! Xen's domain image formats for x86 HVM and PVH domains, and the records that a guest-transparent migration adds.
//!
//! * [`xl`]: the header that `xl save` writes before everything else.
//! * [`libxl`]: the libxl stream, version 2.
//! * [`libxc`]: the libxc image, version 3 (2 is read too), which lies inside it.
//! * [`hvm`]: the records inside libxc's HVM_CONTEXT.
//! * [`gt`]: the new records; docs/stream-format.md specifies them.
//!
//! There is no I/O here. A [`Decoder`] takes bytes as they come and gives headers and records; an [`Encoder`] gives
//! bytes. What one reads the other writes again byte for byte. [`check`] judges a stream's order and contents, [`show`]
//! tells of it, [`strip`] takes the GT records out.

pub mod check;
mod decoder;
mod encoder;
mod error;
pub mod gt;
pub mod hvm;
pub mod libxc;
pub mod libxl;
pub mod show;
pub mod strip;
pub mod wire;
pub mod xl;

pub use decoder::{Decoder, Event, Limits, RawRecord};
pub use encoder::Encoder;
pub use error::{ErrorKind, Layer, Place, StreamError};

/// `REC_TYPE_OPTIONAL`: a receiver that does not know such a record may skip it.
pub const OPTIONAL: u32 = 0x8000_0000;
/// Size of a record's header (type and body_length) in bytes, in both layers.
pub const RECORD_HEADER_SIZE: usize = 8;

/// The name of a record type, or "unknown".
pub fn record_name(layer: Layer, rtype: u32) -> &'static str {
    match layer {
        Layer::Xl => None,
        Layer::Libxl => libxl::record_name(rtype),
        Layer::Libxc => libxc::record_name(rtype),
    }
    .unwrap_or("unknown")
}

/// Bytes of zeroes after a body of this length.
pub fn padding(body_length: usize) -> usize {
    body_length.wrapping_neg() & 7
}

/// A slice as an array, for slices whose length the caller has just fixed.
pub(crate) fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(bytes);
    out
}
