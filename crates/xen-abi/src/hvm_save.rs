//! HVM save records (`xen/include/public/hvm/save.h`, `arch-x86/hvm/save.h`): the stream that `XEN_DOMCTL_gethvmcontext` gives.
//!
//! A stream is records, each a [`Descriptor`] and its payload, from one HEADER to one END. Little-endian, no padding between.

use crate::layout::{abi_numbers, abi_structs};
use zerocopy::{FromBytes, IntoBytes};

abi_numbers! {
    FILE_MAGIC: u32 = 0x5438_1286, "HVM_FILE_MAGIC";
    FILE_VERSION: u32 = 1, "HVM_FILE_VERSION";
    CODE_END: u16 = 0, "HVM_SAVE_CODE(END)";
    CODE_HEADER: u16 = 1, "HVM_SAVE_CODE(HEADER)";
    CODE_CPU: u16 = 2, "HVM_SAVE_CODE(CPU)";
    CODE_PIC: u16 = 3, "HVM_SAVE_CODE(PIC)";
    CODE_IOAPIC: u16 = 4, "HVM_SAVE_CODE(IOAPIC)";
    CODE_LAPIC: u16 = 5, "HVM_SAVE_CODE(LAPIC)";
    CODE_LAPIC_REGS: u16 = 6, "HVM_SAVE_CODE(LAPIC_REGS)";
    CODE_PCI_IRQ: u16 = 7, "HVM_SAVE_CODE(PCI_IRQ)";
    CODE_ISA_IRQ: u16 = 8, "HVM_SAVE_CODE(ISA_IRQ)";
    CODE_PCI_LINK: u16 = 9, "HVM_SAVE_CODE(PCI_LINK)";
    CODE_PIT: u16 = 10, "HVM_SAVE_CODE(PIT)";
    CODE_RTC: u16 = 11, "HVM_SAVE_CODE(RTC)";
    CODE_HPET: u16 = 12, "HVM_SAVE_CODE(HPET)";
    CODE_PMTIMER: u16 = 13, "HVM_SAVE_CODE(PMTIMER)";
    CODE_MTRR: u16 = 14, "HVM_SAVE_CODE(MTRR)";
    CODE_VIRIDIAN_DOMAIN: u16 = 15, "HVM_SAVE_CODE(VIRIDIAN_DOMAIN)";
    CODE_CPU_XSAVE: u16 = 16, "CPU_XSAVE_CODE";
    CODE_VIRIDIAN_VCPU: u16 = 17, "HVM_SAVE_CODE(VIRIDIAN_VCPU)";
    CODE_VMCE_VCPU: u16 = 18, "HVM_SAVE_CODE(VMCE_VCPU)";
    CODE_TSC_ADJUST: u16 = 19, "HVM_SAVE_CODE(TSC_ADJUST)";
    CODE_CPU_MSR: u16 = 20, "CPU_MSR_CODE";
    CODE_MAX: u16 = 20, "HVM_SAVE_CODE_MAX";
}

/// The name of a record type, if Xen 4.17 to 4.20 has it.
pub fn code_name(code: u16) -> Option<&'static str> {
    const NAMES: [&str; CODE_MAX as usize + 1] = [
        "END",
        "HEADER",
        "CPU",
        "PIC",
        "IOAPIC",
        "LAPIC",
        "LAPIC_REGS",
        "PCI_IRQ",
        "ISA_IRQ",
        "PCI_LINK",
        "PIT",
        "RTC",
        "HPET",
        "PMTIMER",
        "MTRR",
        "VIRIDIAN_DOMAIN",
        "CPU_XSAVE",
        "VIRIDIAN_VCPU",
        "VMCE_VCPU",
        "TSC_ADJUST",
        "CPU_MSR",
    ];
    NAMES.get(usize::from(code)).copied()
}

abi_structs! {
    struct Descriptor = "struct hvm_save_descriptor" {
        typecode: u16,
        instance: u16,
        /// Bytes that follow.
        length: u32,
    }

    struct Header = "struct hvm_save_header" {
        magic: u32,
        version: u32,
        /// Changeset of the Xen that saved.
        changeset: u64,
        /// CPUID leaf 1 EAX of the saving machine.
        cpuid: u32,
        /// Guest TSC frequency in kHz.
        gtsc_khz: u32,
    }

    struct Cpu = "struct hvm_hw_cpu" {
        /// FXSAVE image.
        fpu_regs: [u8; 512],
        rax: u64,
        rbx: u64,
        rcx: u64,
        rdx: u64,
        rbp: u64,
        rsi: u64,
        rdi: u64,
        rsp: u64,
        r8: u64,
        r9: u64,
        r10: u64,
        r11: u64,
        r12: u64,
        r13: u64,
        r14: u64,
        r15: u64,
        rip: u64,
        rflags: u64,
        cr0: u64,
        cr2: u64,
        cr3: u64,
        cr4: u64,
        dr0: u64,
        dr1: u64,
        dr2: u64,
        dr3: u64,
        dr6: u64,
        dr7: u64,
        cs_sel: u32,
        ds_sel: u32,
        es_sel: u32,
        fs_sel: u32,
        gs_sel: u32,
        ss_sel: u32,
        tr_sel: u32,
        ldtr_sel: u32,
        cs_limit: u32,
        ds_limit: u32,
        es_limit: u32,
        fs_limit: u32,
        gs_limit: u32,
        ss_limit: u32,
        tr_limit: u32,
        ldtr_limit: u32,
        idtr_limit: u32,
        gdtr_limit: u32,
        cs_base: u64,
        ds_base: u64,
        es_base: u64,
        fs_base: u64,
        gs_base: u64,
        ss_base: u64,
        tr_base: u64,
        ldtr_base: u64,
        idtr_base: u64,
        gdtr_base: u64,
        cs_arbytes: u32,
        ds_arbytes: u32,
        es_arbytes: u32,
        fs_arbytes: u32,
        gs_arbytes: u32,
        ss_arbytes: u32,
        tr_arbytes: u32,
        ldtr_arbytes: u32,
        sysenter_cs: u64,
        sysenter_esp: u64,
        sysenter_eip: u64,
        shadow_gs: u64,
        /// Obsolete, ignored by Xen.
        msr_flags: u64,
        msr_lstar: u64,
        msr_star: u64,
        msr_cstar: u64,
        msr_syscall_mask: u64,
        msr_efer: u64,
        msr_tsc_aux: u64,
        /// What RDTSC would have returned at the save.
        tsc: u64,
        /// Bits 0-7 vector, 8-10 type, 11 error valid, 31 valid.
        pending_event: u32,
        error_code: u32,
        /// Bit 0: the FPU has been used.
        flags: u32,
        _pad0: u32,
    }

    struct Pic = "struct hvm_hw_vpic" {
        irr: u8,
        imr: u8,
        isr: u8,
        irq_base: u8,
        /// Low half: progress of initialisation; high half: line of highest priority.
        init_state_priority: u8 = "",
        /// Bit fields of the mode, from bit 0: ISR select, poll, auto-EOI, rotate, nested, special mask, is master.
        mode_bits: u8 = "",
        elcr: u8,
        int_output: u8,
    }

    struct IoApic = "struct hvm_hw_vioapic" {
        base_address: u64,
        ioregsel: u32,
        id: u32,
        redirtbl: [u64; 48],
    }

    /// Xen 4.17's; later versions append `pending_esr` ([`LapicEsr`]).
    struct Lapic = "struct hvm_hw_lapic" {
        apic_base_msr: u64,
        disabled: u32,
        timer_divisor: u32,
        tdt_msr: u64,
    }

    struct LapicRegs = "struct hvm_hw_lapic_regs" {
        data: [u8; 1024],
    }

    struct PciIrqs = "struct hvm_hw_pci_irqs" {
        /// One bit for each device * 4 + INTx.
        asserted: [u64; 2] = "pad",
    }

    struct IsaIrqs = "struct hvm_hw_isa_irqs" {
        /// One bit for each ISA interrupt.
        asserted: u64 = "pad",
    }

    struct PciLink = "struct hvm_hw_pci_link" {
        route: [u8; 4],
        _pad0: [u8; 4],
    }

    struct PitChannel = "struct hvm_hw_pit_channel" {
        count: u32,
        latched_count: u16,
        count_latched: u8,
        status_latched: u8,
        status: u8,
        read_state: u8,
        write_state: u8,
        write_latch: u8,
        rw_mode: u8,
        mode: u8,
        bcd: u8,
        gate: u8,
    }

    struct Pit = "struct hvm_hw_pit" {
        channels: [PitChannel; 3],
        speaker_data_on: u32,
        _pad0: u32,
    }

    struct Rtc = "struct hvm_hw_rtc" {
        cmos_data: [u8; 14],
        cmos_index: u8,
        _pad0: u8,
        /// Seconds that the guest's RTC is ahead of the host's time.
        rtc_offset: i64,
    }

    struct HpetTimer = "__typeof__(((struct hvm_hw_hpet *)0)->timers[0])" {
        config: u64,
        cmp: u64,
        fsb: u64,
        res4: u64,
    }

    struct Hpet = "struct hvm_hw_hpet" {
        capability: u64,
        res0: u64,
        config: u64,
        res1: u64,
        isr: u64,
        res2: [u64; 25],
        mc64: u64,
        res3: u64,
        timers: [HpetTimer; 3],
        res5: [u64; 84],
        period: [u64; 3],
    }

    struct PmTimer = "struct hvm_hw_pmtimer" {
        tmr_val: u32,
        pm1a_sts: u16,
        pm1a_en: u16,
    }

    struct Mtrr = "struct hvm_hw_mtrr" {
        msr_pat_cr: u64,
        msr_mtrr_var: [u64; 16],
        msr_mtrr_fixed: [u64; 11],
        msr_mtrr_cap: u64,
        msr_mtrr_def_type: u64,
    }

    /// The fixed start of a CPU_XSAVE record; the extended areas that `xcr0_accum` enables follow.
    struct CpuXsave = "struct hvm_hw_cpu_xsave" {
        xfeature_mask: u64,
        xcr0: u64,
        xcr0_accum: u64,
        fpu_sse: [u8; 512] = "save_area.fpu_sse",
        xstate_bv: u64 = "save_area.xsave_hdr.xstate_bv",
        xcomp_bv: u64 = "save_area.xsave_hdr.xcomp_bv",
        reserved: [u64; 6] = "save_area.xsave_hdr.reserved",
    }

    struct ViridianDomain = "struct hvm_viridian_domain_context" {
        hypercall_gpa: u64,
        guest_os_id: u64,
        time_ref_count: u64,
        reference_tsc: u64,
    }

    struct ViridianVcpu = "struct hvm_viridian_vcpu_context" {
        vp_assist_msr: u64,
        apic_assist_pending: u8,
        _pad: [u8; 7],
        simp_msr: u64,
        sint_msr: [u64; 16],
        stimer_config_msr: [u64; 4],
        stimer_count_msr: [u64; 4],
    }

    struct VmceVcpu = "struct hvm_vmce_vcpu" {
        caps: u64,
        mci_ctl2_bank0: u64,
        mci_ctl2_bank1: u64,
        mcg_ext_ctl: u64,
    }

    struct TscAdjust = "struct hvm_tsc_adjust" {
        tsc_adjust: u64,
    }

    /// One entry of a CPU_MSR record, which is a 32-bit count, 32 bits of padding, and so many of these.
    struct OneMsr = "struct hvm_one_msr" {
        index: u32,
        rsvd: u32 = "_rsvd",
        val: u64,
    }
}

/// What Xen 4.20 appends to a LAPIC record.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    zerocopy::FromBytes,
    zerocopy::IntoBytes,
    zerocopy::KnownLayout,
    zerocopy::Immutable,
)]
#[repr(C)]
pub struct LapicEsr {
    pub pending_esr: u32,
    pub _pad: u32,
}

/// A record of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    pub code: u16,
    /// The vCPU, or 0.
    pub instance: u16,
    pub payload: &'a [u8],
    /// Where the payload starts in the stream.
    pub offset: usize,
}

impl Record<'_> {
    /// The payload's start as a structure of this module; `None` if the payload is shorter. Longer payloads (of later
    /// versions, or of variable length) are fine.
    pub fn get<T: FromBytes>(&self) -> Option<T> {
        T::read_from_prefix(self.payload).ok().map(|(t, _)| t)
    }

    /// The MSRs of a CPU_MSR record. `None` if the count does not fit the length.
    pub fn msrs(&self) -> Option<Vec<OneMsr>> {
        let (count, rest) = u32::read_from_prefix(self.payload).ok()?;
        let rest = rest.get(4..)?;
        if rest.len() != (count as usize).checked_mul(size_of::<OneMsr>())? {
            return None;
        }
        Some(rest.chunks_exact(size_of::<OneMsr>()).filter_map(|c| OneMsr::read_from_bytes(c).ok()).collect())
    }
}

/// Why a stream is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamError {
    /// Ends inside the descriptor or payload that starts at this offset.
    Truncated { offset: usize },
    /// The first record is not a HEADER of 24 bytes with the right magic and version.
    BadHeader,
    /// Bytes after the END record, from this offset.
    Trailing { offset: usize },
    /// No END record.
    NoEnd,
}

impl core::fmt::Display for StreamError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Truncated { offset } => write!(f, "HVM context ends inside the record at byte {offset}"),
            Self::BadHeader => f.write_str("HVM context does not start with a valid HEADER record"),
            Self::Trailing { offset } => write!(f, "HVM context has bytes after its END record, from byte {offset}"),
            Self::NoEnd => f.write_str("HVM context has no END record"),
        }
    }
}

impl core::error::Error for StreamError {}

/// Splits a stream into its records, HEADER first, END left out.
pub fn records(stream: &[u8]) -> Result<Vec<Record<'_>>, StreamError> {
    let mut records = Vec::new();
    let mut offset = 0;
    loop {
        let rest = stream.get(offset..).unwrap_or(&[]);
        if rest.is_empty() {
            return Err(StreamError::NoEnd);
        }
        let (d, rest) = Descriptor::read_from_prefix(rest).map_err(|_| StreamError::Truncated { offset })?;
        let payload = rest.get(..d.length as usize).ok_or(StreamError::Truncated { offset })?;
        let start = offset + size_of::<Descriptor>();
        let record = Record { code: d.typecode, instance: d.instance, payload, offset: start };
        if offset == 0 {
            let good = d.typecode == CODE_HEADER
                && payload.len() == size_of::<Header>()
                && record.get::<Header>().is_some_and(|h| h.magic == FILE_MAGIC && h.version == FILE_VERSION);
            if !good {
                return Err(StreamError::BadHeader);
            }
        }
        offset = start + payload.len();
        if d.typecode == CODE_END {
            return if offset == stream.len() { Ok(records) } else { Err(StreamError::Trailing { offset }) };
        }
        records.push(record);
    }
}

/// Appends a record to a stream. Payloads are far below 4 GiB; one that is not is cut off by a debug assertion.
pub fn push_record(stream: &mut Vec<u8>, code: u16, instance: u16, payload: &[u8]) {
    debug_assert!(u32::try_from(payload.len()).is_ok());
    let d = Descriptor { typecode: code, instance, length: payload.len() as u32 };
    stream.extend_from_slice(d.as_bytes());
    stream.extend_from_slice(payload);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header { magic: FILE_MAGIC, version: FILE_VERSION, ..Header::default() }
    }

    fn stream(records: &[(u16, u16, Vec<u8>)]) -> Vec<u8> {
        let mut s = Vec::new();
        push_record(&mut s, CODE_HEADER, 0, header().as_bytes());
        for (code, instance, payload) in records {
            push_record(&mut s, *code, *instance, payload);
        }
        push_record(&mut s, CODE_END, 0, &[]);
        s
    }

    #[test]
    fn every_cut_and_every_trailing_byte_is_found() {
        let s = stream(&[(CODE_TSC_ADJUST, 1, 7u64.to_le_bytes().to_vec())]);
        let r = records(&s).unwrap();
        assert_eq!(r.len(), 2);
        assert_eq!(r[1].get::<TscAdjust>().unwrap().tsc_adjust, 7);
        for cut in 0..s.len() {
            assert!(records(&s[..cut]).is_err(), "cut at {cut}");
        }
        let mut long = s.clone();
        long.push(0);
        assert_eq!(records(&long), Err(StreamError::Trailing { offset: s.len() }));
        let mut bad = s;
        bad[8] ^= 1;
        assert_eq!(records(&bad), Err(StreamError::BadHeader));
    }

    #[test]
    fn an_msr_count_that_lies_is_refused() {
        let mut payload = vec![2, 0, 0, 0, 0, 0, 0, 0];
        payload.extend_from_slice(OneMsr { index: 0x48, rsvd: 0, val: 4 }.as_bytes());
        let r = Record { code: CODE_CPU_MSR, instance: 0, payload: &payload, offset: 0 };
        assert_eq!(r.msrs(), None);
        payload[0] = 1;
        let r = Record { code: CODE_CPU_MSR, instance: 0, payload: &payload, offset: 0 };
        assert_eq!(r.msrs().unwrap()[0].val, 4);
    }

    proptest! {
        #[test]
        fn records_survive_a_round_trip(rs in prop::collection::vec((2u16..30, any::<u16>(), prop::collection::vec(any::<u8>(), 0..40)), 0..8)) {
            let s = stream(&rs);
            let got = records(&s).unwrap();
            prop_assert_eq!(got.len(), rs.len() + 1);
            for (g, (code, instance, payload)) in got[1..].iter().zip(&rs) {
                prop_assert_eq!((g.code, g.instance, g.payload), (*code, *instance, &payload[..]));
                prop_assert_eq!(&s[g.offset..g.offset + payload.len()], &payload[..]);
            }
        }

        #[test]
        fn any_bytes_give_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut s = Vec::new();
            push_record(&mut s, CODE_HEADER, 0, header().as_bytes());
            s.extend_from_slice(&bytes);
            if let Ok(rs) = records(&s) {
                for r in rs { let _ = (r.msrs(), r.get::<Cpu>()); }
            }
        }
    }
}
