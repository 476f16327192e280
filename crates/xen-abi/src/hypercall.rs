//! Hypercall numbers and the numbers that all of them share (`xen/include/public/xen.h`).

use crate::layout::{abi_numbers, abi_structs};

abi_numbers! {
    PLATFORM_OP: u64 = 7, "__HYPERVISOR_platform_op";
    MEMORY_OP: u64 = 12, "__HYPERVISOR_memory_op";
    XEN_VERSION: u64 = 17, "__HYPERVISOR_xen_version";
    GRANT_TABLE_OP: u64 = 20, "__HYPERVISOR_grant_table_op";
    VCPU_OP: u64 = 24, "__HYPERVISOR_vcpu_op";
    SCHED_OP: u64 = 29, "__HYPERVISOR_sched_op";
    EVENT_CHANNEL_OP: u64 = 32, "__HYPERVISOR_event_channel_op";
    HVM_OP: u64 = 34, "__HYPERVISOR_hvm_op";
    SYSCTL: u64 = 35, "__HYPERVISOR_sysctl";
    DOMCTL: u64 = 36, "__HYPERVISOR_domctl";
    DM_OP: u64 = 41, "__HYPERVISOR_dm_op";

    /// Guests have ids below this.
    DOMID_FIRST_RESERVED: u16 = 0x7ff0;
    DOMID_SELF: u16 = 0x7ff0;
    DOMID_INVALID: u16 = 0x7ff4;

    VIRQ_TIMER: u32 = 0;
    VIRQ_DEBUG: u32 = 1;
    VIRQ_DOM_EXC: u32 = 3;
    VIRQ_XENPMU: u32 = 13;

    /// Bits of the vCPU assists (`XEN_DOMCTL_*vcpucontext`'s `vm_assist`).
    VMASST_TYPE_RUNSTATE_UPDATE_FLAG: u32 = 5, "VMASST_TYPE_runstate_update_flag";
}

abi_structs! {
    /// A bitmap handed by reference.
    struct XenctlBitmap = "struct xenctl_bitmap" {
        bitmap: u64,
        nr_bits: u32,
        _pad: u32,
    }
}

/// The name of a VIRQ, if it has one.
pub fn virq_name(virq: u32) -> Option<&'static str> {
    const NAMES: [&str; 14] = [
        "TIMER",
        "DEBUG",
        "CONSOLE",
        "DOM_EXC",
        "TBUF",
        "",
        "DEBUGGER",
        "XENOPROF",
        "CON_RING",
        "PCPU_STATE",
        "MEM_EVENT",
        "ARGO",
        "ENOMEM",
        "XENPMU",
    ];
    NAMES.get(virq as usize).copied().filter(|n| !n.is_empty())
}
