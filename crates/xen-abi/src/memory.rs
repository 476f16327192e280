//! `XENMEM_*` (`xen/include/public/memory.h`).

use crate::layout::{abi_numbers, abi_structs};

abi_numbers! {
    DECREASE_RESERVATION: u64 = 1, "XENMEM_decrease_reservation";
    POPULATE_PHYSMAP: u64 = 6, "XENMEM_populate_physmap";
    ADD_TO_PHYSMAP: u64 = 7, "XENMEM_add_to_physmap";
    SET_MEMORY_MAP: u64 = 13, "XENMEM_set_memory_map";
    MAXIMUM_GPFN: u64 = 14, "XENMEM_maximum_gpfn";
    REMOVE_FROM_PHYSMAP: u64 = 15, "XENMEM_remove_from_physmap";
    GET_POD_TARGET: u64 = 17, "XENMEM_get_pod_target";
    CLAIM_PAGES: u64 = 24, "XENMEM_claim_pages";
    GET_VNUMAINFO: u64 = 26, "XENMEM_get_vnumainfo";
    ACQUIRE_RESOURCE: u64 = 28, "XENMEM_acquire_resource";

    MAPSPACE_SHARED_INFO: u32 = 0, "XENMAPSPACE_shared_info";
    MAPSPACE_GRANT_TABLE: u32 = 1, "XENMAPSPACE_grant_table";
    MAPIDX_GRANT_TABLE_STATUS: u64 = 0x8000_0000, "XENMAPIDX_grant_table_status";

    RESOURCE_GRANT_TABLE: u32 = 1, "XENMEM_resource_grant_table";
    RESOURCE_GRANT_TABLE_SHARED: u32 = 0, "XENMEM_resource_grant_table_id_shared";
    RESOURCE_GRANT_TABLE_STATUS: u32 = 1, "XENMEM_resource_grant_table_id_status";
}

abi_structs! {
    struct MemoryReservation = "struct xen_memory_reservation" {
        extent_start: u64,
        nr_extents: u64,
        extent_order: u32,
        mem_flags: u32,
        domid: u16,
        _pad: [u16; 3],
    }

    struct MemoryDomain = "struct xen_memory_domain" {
        domid: u16,
    }

    struct PodTarget = "struct xen_pod_target" {
        target_pages: u64,
        tot_pages: u64,
        pod_cache_pages: u64,
        pod_entries: u64,
        domid: u16,
        _pad: [u16; 3],
    }

    struct AddToPhysmap = "struct xen_add_to_physmap" {
        domid: u16,
        size: u16,
        space: u32,
        idx: u64,
        gpfn: u64,
    }

    struct RemoveFromPhysmap = "struct xen_remove_from_physmap" {
        domid: u16,
        _pad: [u16; 3],
        gpfn: u64,
    }

    struct MemoryMap = "struct xen_memory_map" {
        nr_entries: u32,
        _pad: u32,
        buffer: u64,
    }

    struct ForeignMemoryMap = "struct xen_foreign_memory_map" {
        domid: u16,
        _pad: [u16; 3],
        map: MemoryMap,
    }

    struct VnumaTopologyInfo = "struct xen_vnuma_topology_info" {
        domid: u16,
        pad: u16,
        nr_vnodes: u32,
        nr_vcpus: u32,
        nr_vmemranges: u32,
        vdistance: u64,
        vcpu_to_vnode: u64,
        vmemrange: u64,
    }

    struct AcquireResource = "struct xen_mem_acquire_resource" {
        domid: u16,
        kind: u16 = "type",
        id: u32,
        nr_frames: u32,
        _pad: u32,
        frame: u64,
        frame_list: u64,
    }
}

/// One entry of a memory map (the BIOS' E820 layout: 20 bytes without padding, so the 64-bit numbers are kept as two
/// halves, low half first).
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    zerocopy::FromBytes,
    zerocopy::IntoBytes,
    zerocopy::KnownLayout,
    zerocopy::Immutable,
)]
#[repr(C)]
pub struct E820Entry {
    pub addr: [u32; 2],
    pub size: [u32; 2],
    pub kind: u32,
}

impl E820Entry {
    pub fn new(addr: u64, size: u64, kind: u32) -> Self {
        let halves = |n: u64| [n as u32, (n >> 32) as u32];
        E820Entry { addr: halves(addr), size: halves(size), kind }
    }
}
