//! `XEN_DOMCTL_*` (`xen/include/public/domctl.h`), interface version 0x15, and what 0x17 changed.

use crate::layout::{abi_numbers, abi_structs};

abi_numbers! {
    CREATEDOMAIN: u32 = 1, "XEN_DOMCTL_createdomain";
    DESTROYDOMAIN: u32 = 2, "XEN_DOMCTL_destroydomain";
    PAUSEDOMAIN: u32 = 3, "XEN_DOMCTL_pausedomain";
    UNPAUSEDOMAIN: u32 = 4, "XEN_DOMCTL_unpausedomain";
    GETDOMAININFO: u32 = 5, "XEN_DOMCTL_getdomaininfo";
    SETVCPUAFFINITY: u32 = 9, "XEN_DOMCTL_setvcpuaffinity";
    SHADOW_OP: u32 = 10, "XEN_DOMCTL_shadow_op";
    MAX_MEM: u32 = 11, "XEN_DOMCTL_max_mem";
    SETVCPUCONTEXT: u32 = 12, "XEN_DOMCTL_setvcpucontext";
    GETVCPUCONTEXT: u32 = 13, "XEN_DOMCTL_getvcpucontext";
    GETVCPUINFO: u32 = 14, "XEN_DOMCTL_getvcpuinfo";
    MAX_VCPUS: u32 = 15, "XEN_DOMCTL_max_vcpus";
    SCHEDULER_OP: u32 = 16, "XEN_DOMCTL_scheduler_op";
    GETVCPUAFFINITY: u32 = 25, "XEN_DOMCTL_getvcpuaffinity";
    GETHVMCONTEXT: u32 = 33, "XEN_DOMCTL_gethvmcontext";
    SETHVMCONTEXT: u32 = 34, "XEN_DOMCTL_sethvmcontext";
    GET_DEVICE_GROUP: u32 = 50, "XEN_DOMCTL_get_device_group";
    GETHVMCONTEXT_PARTIAL: u32 = 55, "XEN_DOMCTL_gethvmcontext_partial";
    GETTSCINFO: u32 = 59, "XEN_DOMCTL_gettscinfo";
    SETTSCINFO: u32 = 60, "XEN_DOMCTL_settscinfo";
    GETPAGEFRAMEINFO3: u32 = 61, "XEN_DOMCTL_getpageframeinfo3";
    GET_CPU_POLICY: u32 = 82, "XEN_DOMCTL_get_cpu_policy";
    SET_CPU_POLICY: u32 = 83, "XEN_DOMCTL_set_cpu_policy";
    GET_PAGING_MEMPOOL_SIZE: u32 = 85, "XEN_DOMCTL_get_paging_mempool_size";
    SET_PAGING_MEMPOOL_SIZE: u32 = 86, "XEN_DOMCTL_set_paging_mempool_size";

    CDF_HVM: u32 = 1 << 0, "XEN_DOMCTL_CDF_hvm";
    CDF_HAP: u32 = 1 << 1, "XEN_DOMCTL_CDF_hap";
    CDF_OOS_OFF: u32 = 1 << 3, "XEN_DOMCTL_CDF_oos_off";
    CDF_XS_DOMAIN: u32 = 1 << 4, "XEN_DOMCTL_CDF_xs_domain";
    CDF_IOMMU: u32 = 1 << 5, "XEN_DOMCTL_CDF_iommu";
    CDF_NESTED_VIRT: u32 = 1 << 6, "XEN_DOMCTL_CDF_nested_virt";
    CDF_VPMU: u32 = 1 << 7, "XEN_DOMCTL_CDF_vpmu";

    DOMINF_DYING: u32 = 1 << 0, "XEN_DOMINF_dying";
    DOMINF_HVM_GUEST: u32 = 1 << 1, "XEN_DOMINF_hvm_guest";
    DOMINF_SHUTDOWN: u32 = 1 << 2, "XEN_DOMINF_shutdown";
    DOMINF_PAUSED: u32 = 1 << 3, "XEN_DOMINF_paused";
    DOMINF_BLOCKED: u32 = 1 << 4, "XEN_DOMINF_blocked";
    DOMINF_RUNNING: u32 = 1 << 5, "XEN_DOMINF_running";
    DOMINF_XS_DOMAIN: u32 = 1 << 7, "XEN_DOMINF_xs_domain";
    DOMINF_HAP: u32 = 1 << 8, "XEN_DOMINF_hap";
    DOMINF_SHUTDOWN_MASK: u32 = 255, "XEN_DOMINF_shutdownmask";
    DOMINF_SHUTDOWN_SHIFT: u32 = 16, "XEN_DOMINF_shutdownshift";

    PFINFO_LTAB_SHIFT: u32 = 28, "XEN_DOMCTL_PFINFO_LTAB_SHIFT";
    PFINFO_BROKEN: u32 = 0xd << 28, "XEN_DOMCTL_PFINFO_BROKEN";
    PFINFO_XTAB: u32 = 0xf << 28, "XEN_DOMCTL_PFINFO_XTAB";
    PFINFO_LTAB_MASK: u32 = 0xf << 28, "XEN_DOMCTL_PFINFO_LTAB_MASK";

    SHADOW_OP_OFF: u32 = 0, "XEN_DOMCTL_SHADOW_OP_OFF";
    SHADOW_OP_ENABLE_LOGDIRTY: u32 = 2, "XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY";
    SHADOW_OP_CLEAN: u32 = 11, "XEN_DOMCTL_SHADOW_OP_CLEAN";
    SHADOW_OP_PEEK: u32 = 12, "XEN_DOMCTL_SHADOW_OP_PEEK";
    SHADOW_LOGDIRTY_FINAL: u32 = 1, "XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL";

    VCPUAFFINITY_HARD: u32 = 1 << 0, "XEN_VCPUAFFINITY_HARD";
    VCPUAFFINITY_SOFT: u32 = 1 << 1, "XEN_VCPUAFFINITY_SOFT";

    SCHEDULER_CREDIT: u32 = 5, "XEN_SCHEDULER_CREDIT";
    SCHEDULER_CREDIT2: u32 = 6, "XEN_SCHEDULER_CREDIT2";
    SCHEDULER_ARINC653: u32 = 7, "XEN_SCHEDULER_ARINC653";
    SCHEDULER_RTDS: u32 = 8, "XEN_SCHEDULER_RTDS";
    SCHEDULER_NULL: u32 = 9, "XEN_SCHEDULER_NULL";
    SCHEDOP_PUTINFO: u32 = 0, "XEN_DOMCTL_SCHEDOP_putinfo";
    SCHEDOP_GETINFO: u32 = 1, "XEN_DOMCTL_SCHEDOP_getinfo";

    VGCF_ONLINE: u64 = 1 << 5, "VGCF_online";

    EMU_LAPIC: u32 = 1 << 0, "XEN_X86_EMU_LAPIC";
    EMU_HPET: u32 = 1 << 1, "XEN_X86_EMU_HPET";
    EMU_PM: u32 = 1 << 2, "XEN_X86_EMU_PM";
    EMU_RTC: u32 = 1 << 3, "XEN_X86_EMU_RTC";
    EMU_IOAPIC: u32 = 1 << 4, "XEN_X86_EMU_IOAPIC";
    EMU_PIC: u32 = 1 << 5, "XEN_X86_EMU_PIC";
    EMU_VGA: u32 = 1 << 6, "XEN_X86_EMU_VGA";
    EMU_IOMMU: u32 = 1 << 7, "XEN_X86_EMU_IOMMU";
    EMU_PIT: u32 = 1 << 8, "XEN_X86_EMU_PIT";
    EMU_USE_PIRQ: u32 = 1 << 9, "XEN_X86_EMU_USE_PIRQ";
    EMU_VPCI: u32 = 1 << 10, "XEN_X86_EMU_VPCI";
    MSR_RELAXED: u32 = 1, "XEN_X86_MSR_RELAXED";
}

/// Names of the `XEN_X86_EMU_*` bits, from bit 0.
pub static EMU_NAMES: [&str; 11] =
    ["lapic", "hpet", "pm", "rtc", "ioapic", "pic", "vga", "iommu", "pit", "use_pirq", "vpci"];

/// Bytes of the union in `struct xen_domctl`, `struct xen_sysctl` and `struct xen_platform_op`.
pub const PAYLOAD_LEN: usize = 128;

abi_structs! {
    /// The whole operation with the union as bytes.
    struct DomctlRaw = "struct xen_domctl" {
        cmd: u32,
        interface_version: u32,
        domain: u16,
        _pad: [u16; 3],
        u: [u64; PAYLOAD_LEN / 8],
    }

    struct ArchDomainConfig = "struct xen_arch_domainconfig" {
        emulation_flags: u32,
        misc_flags: u32,
    }

    /// Interface version 0x15.
    struct CreateDomain = "struct xen_domctl_createdomain" {
        ssidref: u32,
        handle: [u8; 16],
        flags: u32,
        iommu_opts: u32,
        max_vcpus: u32,
        max_evtchn_port: u32,
        max_grant_frames: i32,
        max_maptrack_frames: i32,
        grant_opts: u32,
        vmtrace_size: u32,
        cpupool_id: u32,
        arch: ArchDomainConfig,
    }

    struct GetDomainInfo = "struct xen_domctl_getdomaininfo" {
        domain: u16,
        _pad1: u16,
        flags: u32,
        tot_pages: u64,
        max_pages: u64,
        outstanding_pages: u64,
        shr_pages: u64,
        paged_pages: u64,
        shared_info_frame: u64,
        cpu_time: u64,
        nr_online_vcpus: u32,
        max_vcpu_id: u32,
        ssidref: u32,
        handle: [u8; 16],
        cpupool: u32,
        gpaddr_bits: u8,
        _pad2: [u8; 7],
        arch_config: ArchDomainConfig,
    }

    struct GetPageFrameInfo3 = "struct xen_domctl_getpageframeinfo3" {
        num: u64,
        array: u64,
    }

    struct ShadowOpStats = "struct xen_domctl_shadow_op_stats" {
        fault_count: u32,
        dirty_count: u32,
    }

    struct ShadowOp = "struct xen_domctl_shadow_op" {
        op: u32,
        mode: u32,
        mb: u32,
        _pad: u32,
        dirty_bitmap: u64,
        pages: u64,
        stats: ShadowOpStats,
    }

    struct MaxMem = "struct xen_domctl_max_mem" {
        max_memkb: u64,
    }

    struct VcpuContext = "struct xen_domctl_vcpucontext" {
        vcpu: u32,
        _pad: u32,
        ctxt: u64,
    }

    struct Bitmap = "struct xenctl_bitmap" {
        bitmap: u64,
        nr_bits: u32,
        _pad: u32,
    }

    struct VcpuAffinity = "struct xen_domctl_vcpuaffinity" {
        vcpu: u32,
        flags: u32,
        cpumap_hard: Bitmap,
        cpumap_soft: Bitmap,
    }

    /// For the schedulers credit and credit2, whose parameters look the same.
    struct SchedulerOp = "struct xen_domctl_scheduler_op" {
        sched_id: u32,
        cmd: u32,
        weight: u16 = "u.credit.weight",
        cap: u16 = "u.credit.cap",
        _pad: [u32; 3],
    }

    struct GetVcpuInfo = "struct xen_domctl_getvcpuinfo" {
        vcpu: u32,
        online: u8,
        blocked: u8,
        running: u8,
        _pad: u8,
        cpu_time: u64,
        cpu: u32,
        _pad2: u32,
    }

    struct MaxVcpus = "struct xen_domctl_max_vcpus" {
        max: u32,
    }

    struct HvmContext = "struct xen_domctl_hvmcontext" {
        size: u32,
        _pad: u32,
        buffer: u64,
    }

    struct HvmContextPartial = "struct xen_domctl_hvmcontext_partial" {
        kind: u32 = "type",
        instance: u32,
        bufsz: u64,
        buffer: u64,
    }

    struct TscInfo = "struct xen_domctl_tsc_info" {
        tsc_mode: u32,
        gtsc_khz: u32,
        incarnation: u32,
        _pad: u32,
        elapsed_nsec: u64,
    }

    struct CpuPolicy = "struct xen_domctl_cpu_policy" {
        nr_leaves: u32,
        nr_msrs: u32,
        leaves: u64,
        msrs: u64,
        err_leaf: u32,
        err_subleaf: u32,
        err_msr: u32,
        _pad: u32,
    }

    struct CpuidLeaf = "struct xen_cpuid_leaf" {
        leaf: u32,
        subleaf: u32,
        a: u32,
        b: u32,
        c: u32,
        d: u32,
    }

    struct MsrEntry = "struct xen_msr_entry" {
        idx: u32,
        flags: u32,
        val: u64,
    }

    struct PagingMempool = "struct xen_domctl_paging_mempool" {
        size: u64,
    }

    struct GetDeviceGroup = "struct xen_domctl_get_device_group" {
        machine_sbdf: u32,
        max_sdevs: u32,
        num_sdevs: u32,
        _pad: u32,
        sdev_array: u64,
    }

    /// `vcpu_guest_context_t`, 64-bit. Of an HVM vCPU only `flags`, some registers and `vm_assist` mean something.
    struct VcpuGuestContext = "struct vcpu_guest_context" {
        fpu_ctxt: [u8; 512],
        flags: u64,
        user_regs: [u64; 25],
        trap_ctxt: [u64; 512],
        ldt_base: u64,
        ldt_ents: u64,
        gdt_frames: [u64; 16],
        gdt_ents: u64,
        kernel_ss: u64,
        kernel_sp: u64,
        ctrlreg: [u64; 8],
        debugreg: [u64; 8],
        event_callback_eip: u64,
        failsafe_callback_eip: u64,
        syscall_callback_eip: u64,
        vm_assist: u64,
        fs_base: u64,
        gs_base_kernel: u64,
        gs_base_user: u64,
    }
}

/// What interface version 0x17 (Xen 4.19, 4.20) changed.
pub mod v17 {
    use super::ArchDomainConfig;
    use crate::layout::abi_structs;

    abi_structs! {
        struct CreateDomain = "struct xen_domctl_createdomain" {
            ssidref: u32,
            handle: [u8; 16],
            flags: u32,
            iommu_opts: u32,
            max_vcpus: u32,
            max_evtchn_port: u32,
            max_grant_frames: i32,
            max_maptrack_frames: i32,
            grant_opts: u32,
            altp2m_opts: u32,
            vmtrace_size: u32,
            cpupool_id: u32,
            arch: ArchDomainConfig,
        }
    }
}
