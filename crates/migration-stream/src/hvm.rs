//! What is inside HVM_CONTEXT: the records of public/arch-x86/hvm/save.h, each behind a
//! `struct hvm_save_descriptor` (public/hvm/save.h), little-endian, ended by a descriptor of type and length zero.
//!
//! A record whose length is not the one of its structure (an older or newer Xen, or one that varies) stays raw, so that
//! every context is written back as it was read.

use serde_json::Value;
use xen_abi::hvm_save::{self, Descriptor};
use xen_abi::layout::{Show, Shown};
use zerocopy::{FromBytes, IntoBytes};

use crate::error::ErrorKind;
use crate::wire::{Field, Reader, hex, object};

pub use xen_abi::hvm_save::{FILE_MAGIC, FILE_VERSION};
/// Entries that one context may have; Xen 4.17 with 128 vCPUs has about 900.
pub const ENTRIES_MAX: usize = 1 << 16;

/// The records' own structures, whose layouts are xen-abi's: HEADER (1), CPU (2), PIC (3), and so on.
pub use xen_abi::hvm_save::{
    Cpu, Header, Hpet, HpetTimer, IoApic, IsaIrqs as IsaIrq, Lapic, LapicRegs, Mtrr, OneMsr as Msr, PciIrqs as PciIrq,
    PciLink, Pic, Pit, PitChannel, PmTimer, Rtc, TscAdjust, ViridianDomain, ViridianVcpu, VmceVcpu,
};

/// A structure of xen-abi's on the wire: as it lies in memory. It has no padding of the compiler's (zerocopy refuses it), and its
/// numbers are little-endian, as x86 has them.
macro_rules! as_in_memory {
    ($($name:ident)*) => {$(
        impl Field for $name {
            const SIZE: usize = size_of::<$name>();
            fn get(reader: &mut Reader<'_>, field: &'static str) -> Result<Self, ErrorKind> {
                let bytes = reader.bytes(Self::SIZE, field)?;
                Self::read_from_bytes(bytes)
                    .map_err(|_| ErrorKind::TooShort { field, wanted: Self::SIZE, have: bytes.len() })
            }
            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(self.as_bytes());
            }
            fn json(&self) -> Value {
                json_of(self.show())
            }
        }
    )*};
}

as_in_memory! {
    Descriptor Header Cpu Pic IoApic Lapic LapicRegs PciIrq IsaIrq PciLink Pit Rtc Hpet PmTimer Mtrr ViridianDomain
    ViridianVcpu VmceVcpu TscAdjust Msr
}

/// As [`Field::json`] has it: 64-bit numbers and octets as hexadecimal text, other numbers as numbers.
fn json_of(shown: Shown) -> Value {
    match shown {
        Shown::Unsigned(n, 8) => n.json(),
        Shown::Unsigned(n, _) => n.into(),
        Shown::Signed(n) => n.into(),
        Shown::Octets(bytes) => hex(&bytes).into(),
        Shown::List(items) => items.into_iter().map(json_of).collect(),
        Shown::Fields(fields) => Value::Object(
            fields.into_iter().map(|(name, value)| (name.trim_start_matches('_').to_owned(), json_of(value))).collect(),
        ),
    }
}

/// CPU_XSAVE (16): `struct hvm_hw_cpu_xsave`, whose save area is as long as the guest's features ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuXsave {
    /// Ignored by Xen.
    pub xfeature_mask: u64,
    /// XCR0.
    pub xcr0: u64,
    /// All that XCR0 ever was.
    pub xcr0_accum: u64,
    /// FXSAVE image, XSAVE header and the extended components.
    pub save_area: Vec<u8>,
}

macro_rules! contents {
    ($($code:literal $variant:ident($ty:ty) $name:literal,)*) => {
        /// The contents of one record of the context.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum Contents {
            $(#[doc = concat!("Type ", stringify!($code), ", ", $name, ".")] $variant(Box<$ty>),)*
            /// Type 16, CPU_XSAVE.
            CpuXsave(CpuXsave),
            /// Type 20, CPU_MSR: `struct hvm_msr`; its count is the length of the list.
            CpuMsr(Vec<Msr>),
            /// A type that is not known, or one of another length than this Xen's.
            Raw(Vec<u8>),
        }

        impl Contents {
            fn decode(typecode: u16, body: &[u8]) -> Result<Self, ErrorKind> {
                Ok(match typecode {
                    $($code if body.len() == <$ty>::SIZE => Contents::$variant(Box::new(<$ty>::decode(body)?)),)*
                    hvm_save::CODE_CPU_XSAVE if body.len() >= size_of::<hvm_save::CpuXsave>() => {
                        let mut reader = Reader::new(body);
                        Contents::CpuXsave(CpuXsave {
                            xfeature_mask: reader.get("xfeature_mask")?,
                            xcr0: reader.get("xcr0")?,
                            xcr0_accum: reader.get("xcr0_accum")?,
                            save_area: reader.rest().to_vec(),
                        })
                    }
                    hvm_save::CODE_CPU_MSR if body.len() >= 8 => Self::decode_msrs(body)?,
                    _ => Contents::Raw(body.to_vec()),
                })
            }

            fn put(&self, out: &mut Vec<u8>) {
                match self {
                    $(Contents::$variant(value) => value.put(out),)*
                    Contents::CpuXsave(x) => {
                        [x.xfeature_mask, x.xcr0, x.xcr0_accum].iter().for_each(|v| v.put(out));
                        out.extend_from_slice(&x.save_area);
                    }
                    Contents::CpuMsr(msrs) => {
                        (msrs.len() as u32).put(out);
                        // The compiler's padding before the first element of struct hvm_msr.
                        0u32.put(out);
                        msrs.iter().for_each(|msr| msr.put(out));
                    }
                    Contents::Raw(bytes) => out.extend_from_slice(bytes),
                }
            }

            /// The contents for reports.
            pub fn json(&self) -> Value {
                match self {
                    $(Contents::$variant(value) => value.json(),)*
                    Contents::CpuXsave(x) => object([
                        ("xfeature_mask", x.xfeature_mask.json()),
                        ("xcr0", x.xcr0.json()),
                        ("xcr0_accum", x.xcr0_accum.json()),
                        ("save_area", hex(&x.save_area).into()),
                    ]),
                    Contents::CpuMsr(msrs) => msrs.iter().map(Field::json).collect(),
                    Contents::Raw(bytes) => object([("raw", hex(bytes).into())]),
                }
            }
        }
    };
}

contents! {
    1 Header(Header) "HEADER",
    2 Cpu(Cpu) "CPU",
    3 Pic(Pic) "PIC",
    4 IoApic(IoApic) "IOAPIC",
    5 Lapic(Lapic) "LAPIC",
    6 LapicRegs(LapicRegs) "LAPIC_REGS",
    7 PciIrq(PciIrq) "PCI_IRQ",
    8 IsaIrq(IsaIrq) "ISA_IRQ",
    9 PciLink(PciLink) "PCI_LINK",
    10 Pit(Pit) "PIT",
    11 Rtc(Rtc) "RTC",
    12 Hpet(Hpet) "HPET",
    13 PmTimer(PmTimer) "PMTIMER",
    14 Mtrr(Mtrr) "MTRR",
    15 ViridianDomain(ViridianDomain) "VIRIDIAN_DOMAIN",
    17 ViridianVcpu(ViridianVcpu) "VIRIDIAN_VCPU",
    18 VmceVcpu(VmceVcpu) "VMCE_VCPU",
    19 TscAdjust(TscAdjust) "TSC_ADJUST",
}

impl Contents {
    fn decode_msrs(body: &[u8]) -> Result<Self, ErrorKind> {
        let mut reader = Reader::new(body);
        let count: u32 = reader.get("count")?;
        let pad: u32 = reader.get("pad")?;
        // Only the exact form is typed; anything else is kept as it is.
        if pad != 0 || (count as usize).checked_mul(Msr::SIZE) != Some(reader.left()) {
            return Ok(Contents::Raw(body.to_vec()));
        }
        Ok(Contents::CpuMsr(reader.list(count as usize, "msr")?))
    }
}

/// One record of the context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// `HVM_SAVE_CODE()` of the record.
    pub typecode: u16,
    /// vCPU, or index of the device.
    pub instance: u16,
    /// The contents.
    pub contents: Contents,
}

impl Entry {
    /// The type's name, or "type N".
    pub fn name(&self) -> String {
        hvm_save::code_name(self.typecode).map_or_else(|| format!("type {}", self.typecode), str::to_owned)
    }
}

/// A whole context, without its END entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// The entries in their order.
    pub entries: Vec<Entry>,
}

impl Context {
    /// Reads a context: HEADER first, END last, nothing after it.
    pub fn decode(blob: &[u8]) -> Result<Self, ErrorKind> {
        let mut reader = Reader::new(blob);
        let mut entries = Vec::new();
        loop {
            let Descriptor { typecode, instance, length } = reader.get("hvm_save_descriptor")?;
            let body = reader.bytes(length as usize, "hvm_save_descriptor.length")?;
            if typecode == hvm_save::CODE_END {
                if length != 0 || instance != 0 {
                    return Err(ErrorKind::BadValue {
                        field: "hvm_save_descriptor.length",
                        value: length.into(),
                        why: "the END entry has no instance and no body",
                    });
                }
                break;
            }
            if entries.len() >= ENTRIES_MAX {
                return Err(ErrorKind::OverLimit { length: entries.len() as u64 + 1, limit: ENTRIES_MAX as u64 });
            }
            entries.push(Entry { typecode, instance, contents: Contents::decode(typecode, body)? });
        }
        reader.finish()?;
        match entries.first().map(|entry| &entry.contents) {
            Some(Contents::Header(header)) if header.magic == FILE_MAGIC => Ok(Context { entries }),
            Some(Contents::Header(header)) => Err(ErrorKind::BadMagic {
                field: "hvm_save_header.magic",
                expected: FILE_MAGIC.into(),
                found: header.magic.into(),
            }),
            _ => Err(ErrorKind::Missing { what: "the HEADER entry at the start of hvm_ctx" }),
        }
    }

    /// The bytes of the context, END entry included.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for entry in &self.entries {
            entry.typecode.put(&mut out);
            entry.instance.put(&mut out);
            let at = out.len();
            0u32.put(&mut out);
            entry.contents.put(&mut out);
            let length = (out.len() - at - 4) as u32;
            out[at..at + 4].copy_from_slice(&length.to_le_bytes());
        }
        out.extend_from_slice(&[0; 8]);
        out
    }

    /// The CPU records, with their vCPU numbers.
    pub fn cpus(&self) -> impl Iterator<Item = (u16, &Cpu)> {
        self.entries.iter().filter_map(|entry| match &entry.contents {
            Contents::Cpu(cpu) => Some((entry.instance, &**cpu)),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_tell_each_kind_of_field_in_its_way() {
        let rtc = Rtc { cmos_data: [0xab; 14], rtc_offset: -5, ..Rtc::default() };
        let want = serde_json::json!({
            "cmos_data": "abababababababababababababab", "cmos_index": 0, "pad0": 0, "rtc_offset": -5
        });
        assert_eq!(Contents::Rtc(Box::new(rtc)).json(), want);
        assert_eq!(IsaIrq { asserted: 1 << 40 }.json(), serde_json::json!({ "asserted": "0x10000000000" }));
        assert_eq!(PciIrq { asserted: [1, 2] }.json(), serde_json::json!({ "asserted": ["0x1", "0x2"] }));
        let pit = Pit { channels: [PitChannel { latched_count: 7, ..PitChannel::default() }; 3], ..Pit::default() };
        let json = pit.json();
        assert_eq!((&json["channels"][2]["latched_count"], &json["speaker_data_on"]), (&7.into(), &0.into()));
    }

    /// The sizes that gcc gives Xen's structures on x86-64 (public/arch-x86/hvm/save.h of 4.17).
    #[test]
    fn sizes_are_those_of_the_c_structures() {
        assert_eq!(Header::SIZE, 24);
        assert_eq!(Cpu::SIZE, 1032);
        assert_eq!(Pic::SIZE, 8);
        assert_eq!(IoApic::SIZE, 400);
        assert_eq!(Lapic::SIZE, 24);
        assert_eq!(LapicRegs::SIZE, 1024);
        assert_eq!(PciIrq::SIZE, 16);
        assert_eq!(IsaIrq::SIZE, 8);
        assert_eq!(PciLink::SIZE, 8);
        assert_eq!(Pit::SIZE, 56);
        assert_eq!(Rtc::SIZE, 24);
        assert_eq!(Hpet::SIZE, 1048);
        assert_eq!(PmTimer::SIZE, 8);
        assert_eq!(Mtrr::SIZE, 240);
        assert_eq!(ViridianDomain::SIZE, 32);
        assert_eq!(ViridianVcpu::SIZE, 216);
        assert_eq!(VmceVcpu::SIZE, 32);
        assert_eq!(TscAdjust::SIZE, 8);
        assert_eq!(Msr::SIZE, 16);
    }
}
