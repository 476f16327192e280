//! The records of a guest-transparent (GT) migration: what stock streams leave out because stock guests rebuild it.
//!
//! docs/stream-format.md specifies them. They come in both layers: what a hypervisor holds in the libxc image, what a
//! toolstack holds in the libxl stream. Every body starts with the same eight octets: version (u16), a reserved u16, and
//! the number of entries (u32). Everything is little-endian. Times are nanoseconds of the guest's own system time, so
//! that no host's clock is in the stream.

mod hypervisor;
mod toolstack;

pub use hypervisor::*;
pub use toolstack::*;

use crate::error::{ErrorKind, Layer};
use crate::wire::{Field, Reader};

/// Version of every record body defined here.
pub const VERSION: u16 = 1;

/// The records, by layer and number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Type {
    Domain,
    MemoryMap,
    SharedInfo,
    Vcpu,
    Evtchn,
    EvtchnFifo,
    GrantTable,
    GrantFrames,
    Clock,
    Watchdog,
    Emuirq,
    HvmParamsLate,
    Checksum,
    Identity,
    Devices,
    Xenstore,
    Toolstack,
    StreamChecksum,
}

impl Type {
    /// Every type, in the order of docs/stream-format.md.
    pub const ALL: [Type; 18] = [
        Type::Domain,
        Type::MemoryMap,
        Type::SharedInfo,
        Type::Vcpu,
        Type::Evtchn,
        Type::EvtchnFifo,
        Type::GrantTable,
        Type::GrantFrames,
        Type::Clock,
        Type::Watchdog,
        Type::Emuirq,
        Type::HvmParamsLate,
        Type::Checksum,
        Type::Identity,
        Type::Devices,
        Type::Xenstore,
        Type::Toolstack,
        Type::StreamChecksum,
    ];

    /// The type of a record, with or without the optional bit; `None` if it is not one of ours.
    pub fn of(layer: Layer, rtype: u32) -> Option<Type> {
        let number = rtype & !crate::OPTIONAL;
        Type::ALL.into_iter().find(|t| t.layer() == layer && t.number() == number)
    }

    /// The number on the wire, without the optional bit: "GT" in ASCII, the layer, and an index.
    pub fn number(self) -> u32 {
        0x4754_0000
            | match self {
                Type::Domain => 0x0001,
                Type::MemoryMap => 0x0002,
                Type::SharedInfo => 0x0003,
                Type::Vcpu => 0x0004,
                Type::Evtchn => 0x0005,
                Type::EvtchnFifo => 0x0006,
                Type::GrantTable => 0x0007,
                Type::GrantFrames => 0x0008,
                Type::Clock => 0x0009,
                Type::Watchdog => 0x000a,
                Type::Emuirq => 0x000b,
                Type::HvmParamsLate => 0x000c,
                Type::Checksum => 0x000d,
                Type::Identity => 0x0101,
                Type::Devices => 0x0102,
                Type::Xenstore => 0x0103,
                Type::Toolstack => 0x0104,
                Type::StreamChecksum => 0x0105,
            }
    }

    /// The layer whose stream carries it.
    pub fn layer(self) -> Layer {
        if self.number() & 0x0100 == 0 { Layer::Libxc } else { Layer::Libxl }
    }

    /// The name in docs/stream-format.md.
    pub fn name(self) -> &'static str {
        match self {
            Type::Domain => "GT_DOMAIN",
            Type::MemoryMap => "GT_MEMORY_MAP",
            Type::SharedInfo => "GT_SHARED_INFO",
            Type::Vcpu => "GT_VCPU",
            Type::Evtchn => "GT_EVTCHN",
            Type::EvtchnFifo => "GT_EVTCHN_FIFO",
            Type::GrantTable => "GT_GRANT_TABLE",
            Type::GrantFrames => "GT_GRANT_FRAMES",
            Type::Clock => "GT_CLOCK",
            Type::Watchdog => "GT_WATCHDOG",
            Type::Emuirq => "GT_EMUIRQ",
            Type::HvmParamsLate => "GT_HVM_PARAMS_LATE",
            Type::Checksum => "GT_CHECKSUM",
            Type::Identity => "GT_IDENTITY",
            Type::Devices => "GT_DEVICES",
            Type::Xenstore => "GT_XENSTORE",
            Type::Toolstack => "GT_TOOLSTACK",
            Type::StreamChecksum => "GT_STREAM_CHECKSUM",
        }
    }

    /// Whether it may come with the optional bit, in the stream of an ordinary migration: a receiver that skips it, or
    /// restores it into a guest that will rebuild everything, does no harm. Event channels are the counter-example: the
    /// guest would allocate new ones and never close those it does not know of.
    pub fn may_be_optional(self) -> bool {
        matches!(
            self,
            Type::MemoryMap
                | Type::GrantTable
                | Type::GrantFrames
                | Type::Checksum
                | Type::Identity
                | Type::StreamChecksum
        )
    }
}

/// Finds our type of a record, and refuses the optional bit where it would do harm.
fn recognise(layer: Layer, rtype: u32) -> Result<Option<(Type, bool)>, ErrorKind> {
    let optional = rtype & crate::OPTIONAL != 0;
    match Type::of(layer, rtype) {
        Some(gt) if optional && !gt.may_be_optional() => Err(ErrorKind::MustBeMandatory),
        Some(gt) => Ok(Some((gt, optional))),
        None => Ok(None),
    }
}

/// The common start of a body; gives the number of entries.
fn begin(reader: &mut Reader<'_>) -> Result<usize, ErrorKind> {
    let version: u16 = reader.get("version")?;
    if version != VERSION {
        return Err(ErrorKind::UnsupportedVersion { what: "the record", supported: "1", found: version.into() });
    }
    reader.zero(2, "reserved")?;
    let count: u32 = reader.get("count")?;
    Ok(count as usize)
}

fn start(count: usize) -> Vec<u8> {
    let mut body = Vec::new();
    VERSION.put(&mut body);
    0u16.put(&mut body);
    (count as u32).put(&mut body);
    body
}

fn bad(field: &'static str, value: impl Into<u64>, why: &'static str) -> ErrorKind {
    ErrorKind::BadValue { field, value: value.into(), why }
}

/// A record that has only its fixed fields, and a count of 0.
fn decode_fixed<T: Field>(body: &[u8]) -> Result<T, ErrorKind> {
    let mut reader = Reader::new(body);
    no_entries(begin(&mut reader)?)?;
    let value = reader.get("body")?;
    reader.finish()?;
    Ok(value)
}

fn encode_fixed<T: Field>(value: &T) -> Vec<u8> {
    let mut body = start(0);
    value.put(&mut body);
    body
}

fn no_entries(count: usize) -> Result<(), ErrorKind> {
    if count != 0 { Err(bad("count", count as u64, "this record has no entries")) } else { Ok(()) }
}

/// A record that is nothing but entries of one size.
fn decode_entries<T: Field>(body: &[u8]) -> Result<Vec<T>, ErrorKind> {
    let mut reader = Reader::new(body);
    let count = begin(&mut reader)?;
    let entries = reader.list(count, "entry")?;
    reader.finish()?;
    Ok(entries)
}

fn encode_entries<T: Field>(entries: &[T]) -> Vec<u8> {
    let mut body = start(entries.len());
    entries.iter().for_each(|entry| entry.put(&mut body));
    body
}

/// A checksum's body: CRC-32 (the polynomial of Ethernet and zlib), then four octets of zero.
pub(crate) fn decode_checksum(body: &[u8]) -> Result<u32, ErrorKind> {
    let [crc, reserved]: [u32; 2] = decode_fixed(body)?;
    if reserved != 0 { Err(ErrorKind::NotZero { field: "reserved" }) } else { Ok(crc) }
}

fn encode_checksum(crc: u32) -> Vec<u8> {
    encode_fixed(&[crc, 0])
}
