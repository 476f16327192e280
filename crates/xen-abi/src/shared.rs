//! What Xen and a guest share in memory: shared_info, vcpu_info, time and runstate areas, a PVH guest's start info
//! (`xen/include/public/{xen,vcpu}.h`, `arch-x86/hvm/start_info.h`). 64-bit layouts here, 32-bit ones in [`bits32`].

use crate::layout::{abi_numbers, abi_structs};

abi_numbers! {
    /// vCPUs that have their vcpu_info in shared_info.
    LEGACY_MAX_VCPUS: u32 = 32, "XEN_LEGACY_MAX_VCPUS";
    RUNSTATE_RUNNING: u32 = 0, "RUNSTATE_running";
    RUNSTATE_RUNNABLE: u32 = 1, "RUNSTATE_runnable";
    RUNSTATE_BLOCKED: u32 = 2, "RUNSTATE_blocked";
    RUNSTATE_OFFLINE: u32 = 3, "RUNSTATE_offline";
    /// Set in `state_entry_time` while Xen writes the area.
    RUNSTATE_UPDATE: u64 = 1 << 63, "XEN_RUNSTATE_UPDATE";
    PVCLOCK_TSC_STABLE: u8 = 1 << 0, "XEN_PVCLOCK_TSC_STABLE_BIT";
    PVCLOCK_GUEST_STOPPED: u8 = 1 << 1, "XEN_PVCLOCK_GUEST_STOPPED";
    HVM_START_MAGIC: u32 = 0x336e_c578, "XEN_HVM_START_MAGIC_VALUE";
}

abi_structs! {
    /// The pvclock. `version` is odd while Xen writes.
    struct VcpuTimeInfo = "struct vcpu_time_info" {
        version: u32,
        _pad0: u32,
        tsc_timestamp: u64,
        system_time: u64,
        tsc_to_system_mul: u32,
        tsc_shift: i8,
        flags: u8,
        _pad1: [u8; 2],
    }

    struct VcpuInfo = "struct vcpu_info" {
        evtchn_upcall_pending: u8,
        evtchn_upcall_mask: u8,
        _pad: [u8; 6],
        evtchn_pending_sel: u64,
        arch_cr2: u64 = "arch.cr2",
        _pad_arch: u64,
        time: VcpuTimeInfo,
    }

    struct ArchSharedInfo = "struct arch_shared_info" {
        max_pfn: u64,
        pfn_to_mfn_frame_list_list: u64,
        nmi_reason: u64,
        p2m_cr3: u64,
        p2m_vaddr: u64,
        p2m_generation: u64,
    }

    /// `evtchn_pending` and `evtchn_mask` are the 2-level ABI's.
    struct SharedInfo = "struct shared_info" {
        vcpu_info: [VcpuInfo; LEGACY_MAX_VCPUS as usize],
        evtchn_pending: [u64; 64],
        evtchn_mask: [u64; 64],
        wc_version: u32,
        wc_sec: u32,
        wc_nsec: u32,
        wc_sec_hi: u32,
        arch: ArchSharedInfo,
    }

    struct VcpuRunstateInfo = "struct vcpu_runstate_info" {
        state: u32,
        _pad: u32,
        state_entry_time: u64,
        time: [u64; 4],
    }

    /// What a PVH guest is started with. At the guest-physical address that the loader hands over.
    struct HvmStartInfo = "struct hvm_start_info" {
        magic: u32,
        version: u32,
        flags: u32,
        nr_modules: u32,
        modlist_paddr: u64,
        cmdline_paddr: u64,
        rsdp_paddr: u64,
        memmap_paddr: u64,
        memmap_entries: u32,
        reserved: u32,
    }
}

/// The layouts that a 32-bit guest uses. 64-bit numbers are aligned to 4 bytes there, so they are kept as two halves, low half first.
pub mod bits32 {
    use super::LEGACY_MAX_VCPUS;
    use crate::layout::abi_structs;

    abi_structs! {
        struct VcpuTimeInfo = "struct vcpu_time_info" {
            version: u32,
            _pad0: u32,
            tsc_timestamp: [u32; 2],
            system_time: [u32; 2],
            tsc_to_system_mul: u32,
            tsc_shift: i8,
            flags: u8,
            _pad1: [u8; 2],
        }

        struct VcpuInfo = "struct vcpu_info" {
            evtchn_upcall_pending: u8,
            evtchn_upcall_mask: u8,
            _pad: [u8; 2],
            evtchn_pending_sel: u32,
            arch_cr2: u32 = "arch.cr2",
            _pad_arch: [u32; 5],
            time: VcpuTimeInfo,
        }

        struct ArchSharedInfo = "struct arch_shared_info" {
            max_pfn: u32,
            pfn_to_mfn_frame_list_list: u32,
            nmi_reason: u32,
            p2m_cr3: u32,
            p2m_vaddr: u32,
            p2m_generation: u32,
            wc_sec_hi: u32,
        }

        struct SharedInfo = "struct shared_info" {
            vcpu_info: [VcpuInfo; LEGACY_MAX_VCPUS as usize],
            evtchn_pending: [u32; 32],
            evtchn_mask: [u32; 32],
            wc_version: u32,
            wc_sec: u32,
            wc_nsec: u32,
            arch: ArchSharedInfo,
        }

        struct VcpuRunstateInfo = "struct vcpu_runstate_info" {
            state: u32,
            state_entry_time: [u32; 2],
            time: [[u32; 2]; 4],
        }
    }
}
