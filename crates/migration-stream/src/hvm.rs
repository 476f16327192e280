//! What is inside HVM_CONTEXT: the records of public/arch-x86/hvm/save.h, each behind a
//! `struct hvm_save_descriptor` (public/hvm/save.h), little-endian, ended by a descriptor of type and length zero.
//!
//! A record whose length is not the one of its structure (an older or newer Xen, or one that varies) stays raw, so that
//! every context is written back as it was read.

use serde_json::Value;

use crate::error::ErrorKind;
use crate::wire::{Field, Reader, hex, object, wire_struct};

/// `HVM_FILE_MAGIC`.
pub const FILE_MAGIC: u32 = 0x5438_1286;
/// `HVM_FILE_VERSION`.
pub const FILE_VERSION: u32 = 1;
/// Entries that one context may have; Xen 4.17 with 128 vCPUs has about 900.
pub const ENTRIES_MAX: usize = 1 << 16;

wire_struct! {
    /// HEADER (1): `struct hvm_save_header`.
    pub struct Header {
        /// [`FILE_MAGIC`].
        pub magic: u32,
        /// [`FILE_VERSION`].
        pub version: u32,
        /// Changeset of the Xen that saved.
        pub changeset: u64,
        /// CPUID leaf 1 EAX of the saving machine.
        pub cpuid: u32,
        /// Guest TSC frequency in kHz.
        pub gtsc_khz: u32,
    }
}

wire_struct! {
    /// CPU (2): `struct hvm_hw_cpu`, one per vCPU that is not offline.
    #[allow(missing_docs)]
    pub struct Cpu {
        /// FXSAVE image.
        pub fpu_regs: [u8; 512],
        pub rax: u64, pub rbx: u64, pub rcx: u64, pub rdx: u64,
        pub rbp: u64, pub rsi: u64, pub rdi: u64, pub rsp: u64,
        pub r8: u64, pub r9: u64, pub r10: u64, pub r11: u64,
        pub r12: u64, pub r13: u64, pub r14: u64, pub r15: u64,
        pub rip: u64, pub rflags: u64,
        pub cr0: u64, pub cr2: u64, pub cr3: u64, pub cr4: u64,
        pub dr0: u64, pub dr1: u64, pub dr2: u64, pub dr3: u64, pub dr6: u64, pub dr7: u64,
        pub cs_sel: u32, pub ds_sel: u32, pub es_sel: u32, pub fs_sel: u32,
        pub gs_sel: u32, pub ss_sel: u32, pub tr_sel: u32, pub ldtr_sel: u32,
        pub cs_limit: u32, pub ds_limit: u32, pub es_limit: u32, pub fs_limit: u32,
        pub gs_limit: u32, pub ss_limit: u32, pub tr_limit: u32, pub ldtr_limit: u32,
        pub idtr_limit: u32, pub gdtr_limit: u32,
        pub cs_base: u64, pub ds_base: u64, pub es_base: u64, pub fs_base: u64,
        pub gs_base: u64, pub ss_base: u64, pub tr_base: u64, pub ldtr_base: u64,
        pub idtr_base: u64, pub gdtr_base: u64,
        pub cs_arbytes: u32, pub ds_arbytes: u32, pub es_arbytes: u32, pub fs_arbytes: u32,
        pub gs_arbytes: u32, pub ss_arbytes: u32, pub tr_arbytes: u32, pub ldtr_arbytes: u32,
        pub sysenter_cs: u64, pub sysenter_esp: u64, pub sysenter_eip: u64,
        pub shadow_gs: u64,
        /// Obsolete, ignored by Xen.
        pub msr_flags: u64,
        pub msr_lstar: u64, pub msr_star: u64, pub msr_cstar: u64, pub msr_syscall_mask: u64,
        pub msr_efer: u64, pub msr_tsc_aux: u64,
        /// What RDTSC would have returned at the save.
        pub tsc: u64,
        /// Bits 0-7 vector, 8-10 type, 11 error valid, 31 valid.
        pub pending_event: u32,
        pub error_code: u32,
        /// Bit 0: the FPU has been used.
        pub flags: u32,
        pub pad0: u32,
    }
}

wire_struct! {
    /// PIC (3): `struct hvm_hw_vpic`; instance 0 is the master.
    #[allow(missing_docs)]
    pub struct Pic {
        pub irr: u8, pub imr: u8, pub isr: u8, pub irq_base: u8,
        /// Bits 0-3 init_state, 4-7 priority_add.
        pub init_state_priority: u8,
        /// Bit 0 readsel_isr, 1 poll, 2 auto_eoi, 3 rotate_on_auto_eoi, 4 special_fully_nested, 5 special_mask, 6 master.
        pub mode_bits: u8,
        pub elcr: u8, pub int_output: u8,
    }
}

wire_struct! {
    /// IOAPIC (4): `struct hvm_hw_vioapic`.
    #[allow(missing_docs)]
    pub struct IoApic { pub base_address: u64, pub ioregsel: u32, pub id: u32, pub redirtbl: [u64; 48] }
}

wire_struct! {
    /// LAPIC (5): `struct hvm_hw_lapic`, one per vCPU.
    #[allow(missing_docs)]
    pub struct Lapic { pub apic_base_msr: u64, pub disabled: u32, pub timer_divisor: u32, pub tdt_msr: u64 }
}

wire_struct! {
    /// LAPIC_REGS (6): `struct hvm_hw_lapic_regs`, one per vCPU.
    pub struct LapicRegs {
        /// The register page's first 1024 bytes.
        pub data: [u8; 1024],
    }
}

wire_struct! {
    /// PCI_IRQ (7): `struct hvm_hw_pci_irqs`.
    pub struct PciIrq {
        /// One bit for each device * 4 + INTx.
        pub asserted: [u64; 2],
    }
}

wire_struct! {
    /// ISA_IRQ (8): `struct hvm_hw_isa_irqs`.
    pub struct IsaIrq {
        /// One bit for each ISA interrupt.
        pub asserted: u64,
    }
}

wire_struct! {
    /// PCI_LINK (9): `struct hvm_hw_pci_link`.
    #[allow(missing_docs)]
    pub struct PciLink { pub route: [u8; 4], pub pad0: [u8; 4] }
}

wire_struct! {
    /// A channel of [`Pit`].
    #[allow(missing_docs)]
    pub struct PitChannel {
        pub count: u32, pub latched_count: u16, pub count_latched: u8, pub status_latched: u8, pub status: u8,
        pub read_state: u8, pub write_state: u8, pub write_latch: u8, pub rw_mode: u8, pub mode: u8, pub bcd: u8,
        pub gate: u8,
    }
}

wire_struct! {
    /// PIT (10): `struct hvm_hw_pit`.
    #[allow(missing_docs)]
    pub struct Pit { pub channels: [PitChannel; 3], pub speaker_data_on: u32, pub pad0: u32 }
}

wire_struct! {
    /// RTC (11): `struct hvm_hw_rtc`.
    #[allow(missing_docs)]
    pub struct Rtc {
        pub cmos_data: [u8; 14], pub cmos_index: u8, pub pad0: u8,
        /// Seconds that the guest's RTC is ahead of the host's time.
        pub rtc_offset: i64,
    }
}

wire_struct! {
    /// A timer of [`Hpet`].
    #[allow(missing_docs)]
    pub struct HpetTimer { pub config: u64, pub cmp: u64, pub fsb: u64, pub res4: u64 }
}

wire_struct! {
    /// HPET (12): `struct hvm_hw_hpet`.
    #[allow(missing_docs)]
    pub struct Hpet {
        pub capability: u64, pub res0: u64, pub config: u64, pub res1: u64, pub isr: u64, pub res2: [u64; 25],
        /// Main counter.
        pub mc64: u64,
        pub res3: u64, pub timers: [HpetTimer; 3], pub res5: [u64; 84], pub period: [u64; 3],
    }
}

wire_struct! {
    /// PMTIMER (13): `struct hvm_hw_pmtimer`.
    #[allow(missing_docs)]
    pub struct PmTimer { pub tmr_val: u32, pub pm1a_sts: u16, pub pm1a_en: u16 }
}

wire_struct! {
    /// MTRR (14): `struct hvm_hw_mtrr`, one per vCPU.
    #[allow(missing_docs)]
    pub struct Mtrr {
        pub msr_pat_cr: u64, pub msr_mtrr_var: [u64; 16], pub msr_mtrr_fixed: [u64; 11], pub msr_mtrr_cap: u64,
        pub msr_mtrr_def_type: u64,
    }
}

wire_struct! {
    /// VIRIDIAN_DOMAIN (15): `struct hvm_viridian_domain_context`.
    #[allow(missing_docs)]
    pub struct ViridianDomain {
        pub hypercall_gpa: u64, pub guest_os_id: u64, pub time_ref_count: u64, pub reference_tsc: u64,
    }
}

wire_struct! {
    /// VIRIDIAN_VCPU (17): `struct hvm_viridian_vcpu_context`.
    #[allow(missing_docs)]
    pub struct ViridianVcpu {
        pub vp_assist_msr: u64, pub apic_assist_pending: u8, pub pad: [u8; 7], pub simp_msr: u64,
        pub sint_msr: [u64; 16], pub stimer_config_msr: [u64; 4], pub stimer_count_msr: [u64; 4],
    }
}

wire_struct! {
    /// VMCE_VCPU (18): `struct hvm_vmce_vcpu`.
    #[allow(missing_docs)]
    pub struct VmceVcpu { pub caps: u64, pub mci_ctl2_bank0: u64, pub mci_ctl2_bank1: u64, pub mcg_ext_ctl: u64 }
}

wire_struct! {
    /// TSC_ADJUST (19): `struct hvm_tsc_adjust`.
    pub struct TscAdjust {
        /// IA32_TSC_ADJUST.
        pub tsc_adjust: u64,
    }
}

wire_struct! {
    /// One MSR of CPU_MSR (20): `struct hvm_one_msr`.
    #[allow(missing_docs)]
    pub struct Msr { pub index: u32, pub rsvd: u32, pub val: u64 }
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

        /// Name of a type code in public/arch-x86/hvm/save.h.
        pub fn type_name(typecode: u16) -> Option<&'static str> {
            match typecode {
                0 => Some("END"),
                16 => Some("CPU_XSAVE"),
                20 => Some("CPU_MSR"),
                $($code => Some($name),)*
                _ => None,
            }
        }

        impl Contents {
            fn decode(typecode: u16, body: &[u8]) -> Result<Self, ErrorKind> {
                Ok(match typecode {
                    $($code if body.len() == <$ty>::SIZE => Contents::$variant(Box::new(<$ty>::decode(body)?)),)*
                    16 if body.len() >= 24 + 576 => {
                        let mut reader = Reader::new(body);
                        Contents::CpuXsave(CpuXsave {
                            xfeature_mask: reader.get("xfeature_mask")?,
                            xcr0: reader.get("xcr0")?,
                            xcr0_accum: reader.get("xcr0_accum")?,
                            save_area: reader.rest().to_vec(),
                        })
                    }
                    20 if body.len() >= 8 => Self::decode_msrs(body)?,
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
        type_name(self.typecode).map_or_else(|| format!("type {}", self.typecode), str::to_owned)
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
            let typecode: u16 = reader.get("hvm_save_descriptor.typecode")?;
            let instance: u16 = reader.get("hvm_save_descriptor.instance")?;
            let length: u32 = reader.get("hvm_save_descriptor.length")?;
            let body = reader.bytes(length as usize, "hvm_save_descriptor.length")?;
            if typecode == 0 {
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

    /// The CPU records, to be changed.
    pub fn cpus_mut(&mut self) -> impl Iterator<Item = (u16, &mut Cpu)> {
        self.entries.iter_mut().filter_map(|entry| match &mut entry.contents {
            Contents::Cpu(cpu) => Some((entry.instance, &mut **cpu)),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
