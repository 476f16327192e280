//! The header of a file that `xl save` writes: `struct save_file_header` in tools/xl/xl.h, then the domain's
//! configuration.

use crate::error::ErrorKind;
use crate::wire::{Field, Reader};

/// The 32 octets that a file of `xl save` starts with.
pub const MAGIC: &[u8; 32] = b"Xen saved domain, xl format\n \0 \r";
/// Size of the fixed part in bytes.
pub const HEADER_SIZE: usize = 48;
/// `SAVEFILE_BYTEORDER_VALUE`.
pub const BYTE_ORDER: u32 = 0x0102_0304;
/// `XL_MANDATORY_FLAG_JSON`: the configuration is libxl's JSON, not xl's text.
pub const MANDATORY_JSON: u32 = 1 << 0;
/// `XL_MANDATORY_FLAG_STREAMv2`: a libxl v2 stream follows.
pub const MANDATORY_STREAM_V2: u32 = 1 << 1;

/// The fixed part of the header. The optional data follows it: a u32 length and that many bytes of configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XlHeader {
    /// `XL_MANDATORY_FLAG_*`; an unknown bit refuses the file.
    pub mandatory_flags: u32,
    /// No bit is defined; xl reads past those that it does not know.
    pub optional_flags: u32,
    /// Length of the data that follows, in bytes.
    pub optional_data_len: u32,
}

impl XlHeader {
    /// Reads the fixed part.
    pub fn decode(bytes: &[u8; HEADER_SIZE]) -> Result<Self, ErrorKind> {
        let mut reader = Reader::new(bytes);
        let magic = reader.bytes(MAGIC.len(), "magic")?;
        if magic != MAGIC {
            let mut found = [0; 8];
            found.copy_from_slice(&bytes[..8]);
            return Err(ErrorKind::NotAStream { found });
        }
        let order: u32 = reader.get("byteorder")?;
        if order == BYTE_ORDER.swap_bytes() {
            return Err(ErrorKind::BigEndian);
        }
        if order != BYTE_ORDER {
            return Err(ErrorKind::BadMagic { field: "byteorder", expected: BYTE_ORDER.into(), found: order.into() });
        }
        let header = XlHeader {
            mandatory_flags: reader.get("mandatory_flags")?,
            optional_flags: reader.get("optional_flags")?,
            optional_data_len: reader.get("optional_data_len")?,
        };
        if header.mandatory_flags & !(MANDATORY_JSON | MANDATORY_STREAM_V2) != 0 {
            return Err(ErrorKind::BadValue {
                field: "mandatory_flags",
                value: header.mandatory_flags.into(),
                why: "a flag that is not known",
            });
        }
        if header.mandatory_flags & MANDATORY_STREAM_V2 == 0 {
            return Err(ErrorKind::BadValue {
                field: "mandatory_flags",
                value: header.mandatory_flags.into(),
                why: "no libxl v2 stream follows; Xen 4.5 and older wrote such files",
            });
        }
        Ok(header)
    }

    /// Appends the fixed part.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(MAGIC);
        for field in [BYTE_ORDER, self.mandatory_flags, self.optional_flags, self.optional_data_len] {
            field.put(out);
        }
    }
}

/// The domain's configuration from the optional data: without the NUL that xl counts into its length.
///
/// An empty slice if there is none.
pub fn config(optional_data: &[u8]) -> Result<&[u8], ErrorKind> {
    if optional_data.is_empty() {
        return Ok(&[]);
    }
    let config = Reader::new(optional_data).blob("config")?;
    Ok(config.strip_suffix(b"\0").unwrap_or(config))
}

/// The optional data for a configuration, as xl writes it: with a NUL, and its length before it.
pub fn optional_data(config: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(config.len() + 5);
    (config.len() as u32 + 1).put(&mut out);
    out.extend_from_slice(config);
    out.push(0);
    out
}
