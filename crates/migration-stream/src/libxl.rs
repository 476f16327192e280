//! The libxl domain image format, version 2: docs/specs/libxl-migration-stream.pandoc and
//! tools/libs/light/libxl_sr_stream_format.h.

use crate::error::ErrorKind;
use crate::gt;
use crate::wire::{Field, Reader};

/// "LibxlFmt".
pub const IDENT: u64 = 0x4c69_6278_6c46_6d74;
/// `RESTORE_STREAM_VERSION`.
pub const VERSION: u32 = 2;
/// Size of the header in bytes.
pub const HEADER_SIZE: usize = 16;
/// `RESTORE_OPT_BIG_ENDIAN`.
pub const OPT_BIG_ENDIAN: u32 = 1 << 0;
/// `RESTORE_OPT_LEGACY`: made by the conversion tool for streams of Xen 4.5 and older.
pub const OPT_LEGACY: u32 = 1 << 1;

/// `REC_TYPE_*` of libxl.
pub mod rec {
    /// Last record.
    pub const END: u32 = 0;
    /// A libxc stream follows.
    pub const LIBXC_CONTEXT: u32 = 1;
    /// Nodes of the device model's xenstore area.
    pub const EMULATOR_XENSTORE_DATA: u32 = 2;
    /// State of the device model.
    pub const EMULATOR_CONTEXT: u32 = 3;
    /// End of a checkpoint.
    pub const CHECKPOINT_END: u32 = 4;
    /// COLO control.
    pub const CHECKPOINT_STATE: u32 = 5;
}

/// The stream's header; its fields are big-endian whatever the records are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibxlHeader {
    /// `RESTORE_OPT_*`.
    pub options: u32,
}

impl LibxlHeader {
    /// Reads the header.
    pub fn decode(bytes: &[u8; HEADER_SIZE]) -> Result<Self, ErrorKind> {
        let ident = u64::from_be_bytes(crate::array(&bytes[..8]));
        let version = u32::from_be_bytes(crate::array(&bytes[8..12]));
        let options = u32::from_be_bytes(crate::array(&bytes[12..]));
        if ident != IDENT {
            return Err(ErrorKind::BadMagic { field: "ident", expected: IDENT, found: ident });
        }
        if version != VERSION {
            return Err(ErrorKind::UnsupportedVersion { what: "the libxl stream", supported: "2", found: version });
        }
        if options & OPT_BIG_ENDIAN != 0 {
            return Err(ErrorKind::BigEndian);
        }
        if options & !OPT_LEGACY != 0 {
            return Err(ErrorKind::BadValue { field: "options", value: options.into(), why: "reserved bits are set" });
        }
        Ok(LibxlHeader { options })
    }

    /// Appends the header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&IDENT.to_be_bytes());
        out.extend_from_slice(&VERSION.to_be_bytes());
        out.extend_from_slice(&self.options.to_be_bytes());
    }
}

/// Names of libxl's record types.
pub fn record_name(rtype: u32) -> Option<&'static str> {
    Some(match rtype {
        rec::END => "END",
        rec::LIBXC_CONTEXT => "LIBXC_CONTEXT",
        rec::EMULATOR_XENSTORE_DATA => "EMULATOR_XENSTORE_DATA",
        rec::EMULATOR_CONTEXT => "EMULATOR_CONTEXT",
        rec::CHECKPOINT_END => "CHECKPOINT_END",
        rec::CHECKPOINT_STATE => "CHECKPOINT_STATE",
        _ => return gt::Type::of(crate::Layer::Libxl, rtype).map(|t| t.name()),
    })
}

/// The device model that an emulator record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Emulator {
    /// `EMULATOR_*`: 0 unknown, 1 QEMU traditional, 2 QEMU upstream.
    pub id: u32,
    /// Index of this emulator for the domain.
    pub index: u32,
}

/// A record of the libxl stream, typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record<'a> {
    /// END.
    End,
    /// LIBXC_CONTEXT: a libxc image follows.
    LibxcContext,
    /// EMULATOR_XENSTORE_DATA: alternating keys and values, each ended by NUL.
    EmulatorXenstoreData(Emulator, &'a [u8]),
    /// EMULATOR_CONTEXT: the emulator's own format.
    EmulatorContext(Emulator, &'a [u8]),
    /// CHECKPOINT_END.
    CheckpointEnd,
    /// CHECKPOINT_STATE with its control id and four octets of padding, if there.
    CheckpointState(&'a [u8]),
    /// A record of a guest-transparent migration; true when it came with the optional bit.
    Gt(gt::LibxlRecord, bool),
    /// An optional record that is not known; a restore may skip it.
    UnknownOptional(u32, &'a [u8]),
}

impl<'a> Record<'a> {
    /// Reads the body of a record of type `rtype`. A mandatory type that is not known is an error.
    pub fn decode(rtype: u32, body: &'a [u8]) -> Result<Self, ErrorKind> {
        let empty = |record| Reader::new(body).finish().map(|()| record);
        let emulator = || {
            let mut reader = Reader::new(body);
            let emulator = Emulator { id: reader.get("emulator_id")?, index: reader.get("index")? };
            if emulator.id > 2 {
                let why = "not an emulator that is known";
                return Err(ErrorKind::BadValue { field: "emulator_id", value: emulator.id.into(), why });
            }
            Ok((emulator, reader.rest()))
        };
        match rtype {
            rec::END => empty(Record::End),
            rec::LIBXC_CONTEXT => empty(Record::LibxcContext),
            rec::EMULATOR_XENSTORE_DATA => {
                let (emulator, data) = emulator()?;
                Ok(Record::EmulatorXenstoreData(emulator, data))
            }
            rec::EMULATOR_CONTEXT => {
                let (emulator, data) = emulator()?;
                Ok(Record::EmulatorContext(emulator, data))
            }
            rec::CHECKPOINT_END => empty(Record::CheckpointEnd),
            rec::CHECKPOINT_STATE => {
                if body.len() < 4 {
                    return Err(ErrorKind::TooShort { field: "control_id", wanted: 4, have: body.len() });
                }
                Ok(Record::CheckpointState(body))
            }
            _ => match gt::LibxlRecord::decode(rtype, body)? {
                Some((record, optional)) => Ok(Record::Gt(record, optional)),
                None if rtype & crate::OPTIONAL != 0 => Ok(Record::UnknownOptional(rtype, body)),
                None => Err(ErrorKind::UnknownMandatory),
            },
        }
    }

    /// The record's type on the wire and its body.
    pub fn encode(&self) -> (u32, Vec<u8>) {
        let emulator = |e: &Emulator, data: &[u8]| {
            let mut body = Vec::with_capacity(8 + data.len());
            e.id.put(&mut body);
            e.index.put(&mut body);
            body.extend_from_slice(data);
            body
        };
        match self {
            Record::End => (rec::END, Vec::new()),
            Record::LibxcContext => (rec::LIBXC_CONTEXT, Vec::new()),
            Record::EmulatorXenstoreData(e, data) => (rec::EMULATOR_XENSTORE_DATA, emulator(e, data)),
            Record::EmulatorContext(e, data) => (rec::EMULATOR_CONTEXT, emulator(e, data)),
            Record::CheckpointEnd => (rec::CHECKPOINT_END, Vec::new()),
            Record::CheckpointState(data) => (rec::CHECKPOINT_STATE, data.to_vec()),
            Record::Gt(record, optional) => {
                let (rtype, body) = record.encode();
                (rtype | if *optional { crate::OPTIONAL } else { 0 }, body)
            }
            Record::UnknownOptional(rtype, body) => (*rtype, body.to_vec()),
        }
    }
}
