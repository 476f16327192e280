//! `XEN_SYSCTL_*` (`xen/include/public/sysctl.h`), interface version 0x15.

use crate::domctl::{Bitmap, PAYLOAD_LEN};
use crate::layout::{abi_numbers, abi_structs};

abi_numbers! {
    PHYSINFO: u32 = 3, "XEN_SYSCTL_physinfo";
    GETDOMAININFOLIST: u32 = 6, "XEN_SYSCTL_getdomaininfolist";
    CPUPOOL_OP: u32 = 18, "XEN_SYSCTL_cpupool_op";
    LIVEPATCH_OP: u32 = 27, "XEN_SYSCTL_livepatch_op";
    GET_CPU_POLICY: u32 = 29, "XEN_SYSCTL_get_cpu_policy";

    CPUPOOL_OP_INFO: u32 = 3, "XEN_SYSCTL_CPUPOOL_OP_INFO";

    CPU_POLICY_RAW: u32 = 0, "XEN_SYSCTL_cpu_policy_raw";
    CPU_POLICY_HOST: u32 = 1, "XEN_SYSCTL_cpu_policy_host";
    CPU_POLICY_HVM_MAX: u32 = 3, "XEN_SYSCTL_cpu_policy_hvm_max";
    CPU_POLICY_HVM_DEFAULT: u32 = 5, "XEN_SYSCTL_cpu_policy_hvm_default";

    PHYSCAP_HVM: u32 = 1 << 0, "XEN_SYSCTL_PHYSCAP_hvm";
    PHYSCAP_HAP: u32 = 1 << 3, "XEN_SYSCTL_PHYSCAP_hap";
    PHYSCAP_SHADOW: u32 = 1 << 4, "XEN_SYSCTL_PHYSCAP_shadow";
    PHYSCAP_GNTTAB_V1: u32 = 1 << 8, "XEN_SYSCTL_PHYSCAP_gnttab_v1";
    PHYSCAP_GNTTAB_V2: u32 = 1 << 9, "XEN_SYSCTL_PHYSCAP_gnttab_v2";
}

abi_structs! {
    /// The whole operation with the union as bytes.
    struct SysctlRaw = "struct xen_sysctl" {
        cmd: u32,
        interface_version: u32,
        u: [u64; PAYLOAD_LEN / 8],
    }

    struct PhysInfo = "struct xen_sysctl_physinfo" {
        threads_per_core: u32,
        cores_per_socket: u32,
        nr_cpus: u32,
        max_cpu_id: u32,
        nr_nodes: u32,
        max_node_id: u32,
        cpu_khz: u32,
        capabilities: u32,
        arch_capabilities: u32,
        _pad: u32,
        total_pages: u64,
        free_pages: u64,
        scrub_pages: u64,
        outstanding_pages: u64,
        max_mfn: u64,
        hw_cap: [u32; 8],
    }

    struct GetDomainInfoList = "struct xen_sysctl_getdomaininfolist" {
        first_domain: u16,
        _pad: u16,
        max_domains: u32,
        buffer: u64,
        num_domains: u32,
        _pad2: u32,
    }

    struct CpupoolOp = "struct xen_sysctl_cpupool_op" {
        op: u32,
        cpupool_id: u32,
        sched_id: u32,
        domid: u32,
        cpu: u32,
        n_dom: u32,
        cpumap: Bitmap,
    }

    struct CpuPolicy = "struct xen_sysctl_cpu_policy" {
        index: u32,
        nr_leaves: u32,
        nr_msrs: u32,
        _rsvd: u32,
        leaves: u64,
        msrs: u64,
    }
}
