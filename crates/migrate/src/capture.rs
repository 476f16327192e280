//! Reading a guest out of the source's hypervisor.

use crate::guest::{Grants, GuestState, Shell, ranges};
use crate::trouble::{Doing, Result};
use crate::tsc;
use hypervisor::{
    DomId, DomainConfig, DomainInfo, Gfn, GrantArray, GtState, GuestArea, Hypervisor, MemoryRange, PAGE_SIZE, TscInfo,
};
use std::collections::BTreeSet;
use xen_abi::hvm_op::{PARAM_CONSOLE_PFN, PARAM_STORE_PFN, PARAMS, ParamRole};

/// Where a PVH guest's special pages end and how many there are (`X86_HVM_END_SPECIAL_REGION`, `X86_HVM_NR_SPECIAL_PAGES`,
/// tools/include/xenguest.h, xc_dom.h).
const SPECIAL_END: u64 = 0xff000;
const SPECIAL_PAGES: u64 = 8;
/// Below it lies a PVH guest's low memory, above it up to the special pages its ACPI tables (`HVM_BELOW_4G_MMIO_START`, hvm/e820.h).
const MMIO_START: u64 = 0xf0000;
const FOUR_GIB: u64 = 0x10_0000;

/// The E820 map as the toolstack gave it to a PVH guest at its creation, as far as it shows in the memory the guest has:
/// Xen lets nobody read another domain's map.
pub fn memory_map(ram: &[Gfn]) -> Vec<MemoryRange> {
    let bytes = |pages: u64| pages * PAGE_SIZE as u64;
    let range = |first: u64, end: u64, kind| MemoryRange { start: bytes(first), size: bytes(end - first), kind };
    let (e820_ram, e820_reserved, e820_acpi) = (1, 2, 3);
    let mut map = Vec::new();
    let low_end = ram.iter().take_while(|g| g.0 < MMIO_START).last().map_or(0, |g| g.0 + 1);
    map.push(range(0, low_end, e820_ram));
    let acpi = ram.iter().filter(|g| (MMIO_START..SPECIAL_END - SPECIAL_PAGES).contains(&g.0)).copied();
    map.extend(ranges(acpi).into_iter().map(|(first, count)| range(first, first + count, e820_acpi)));
    map.push(range(SPECIAL_END - SPECIAL_PAGES, SPECIAL_END, e820_reserved));
    if let Some(top) = ram.last().filter(|g| g.0 >= FOUR_GIB) {
        map.push(range(FOUR_GIB, top.0 + 1, e820_ram));
    }
    map
}

/// What the shell domain is made from.
pub fn shell(hv: &dyn Hypervisor, info: &DomainInfo, gt: &GtState, ram: &[Gfn]) -> Result<Shell> {
    let dom = info.domid;
    let grants = hv.grant_table_size(dom)?;
    Ok(Shell {
        config: DomainConfig {
            uuid: info.uuid,
            ssidref: info.ssidref,
            flags: gt.create_flags,
            iommu_opts: 0,
            max_vcpus: info.vcpus,
            max_evtchn_port: gt.max_evtchn_port,
            max_grant_frames: i32::try_from(grants.max_frames).unwrap_or(-1),
            // Only for a guest that maps others' grants, which is refused.
            max_maptrack_frames: -1,
            grant_opts: gt.grant_version.max(2),
            // By its name, in the offer's placement: another host has other numbers.
            cpupool: 0,
            emulation_flags: info.emulation_flags,
            misc_flags: info.misc_flags,
        },
        max_mem_kib: info.max_pages.saturating_mul(PAGE_SIZE as u64 / 1024),
        total_pages: info.total_pages,
        paging_pool: hv.paging_pool_size(dom)?,
        policy: hv.cpu_policy(dom)?,
        tsc: tsc_info(hv, dom)?,
        memory_map: memory_map(ram),
        ram: ranges(ram.iter().copied()),
    })
}

/// With the rate also in the mode that never emulates, where Xen tells none: it is the host's then.
fn tsc_info(hv: &dyn Hypervisor, dom: DomId) -> Result<TscInfo> {
    let mut info = hv.tsc_info(dom)?;
    if info.khz == 0 {
        info.khz = hv.host_info()?.tsc_khz;
    }
    Ok(info)
}

/// Reads the grant table. Version 2 has no reader for where the guest sees its status frames, and is refused by the preflight.
pub fn grants(hv: &dyn Hypervisor, dom: DomId) -> Result<Grants> {
    let version = hv.grant_table_version(dom)?;
    let gfns = hv.grant_table_gfns(dom)?;
    let frames = hv.grant_table_size(dom)?.frames;
    let shared = hv.read_grant_frames(dom, GrantArray::Shared, 0, frames)?;
    Ok(Grants { version, gfns, status_gfns: Vec::new(), shared, status: Vec::new() })
}

/// Reads all that the hypervisor holds of a paused guest besides memory. `system_time` is the guest's at the pause, `paused_at` the host's.
///
/// The TSC runs on while a guest is paused, and Xen saves it as it is at the save. It is taken back to the pause here, from a point that
/// the extension has read together with the guest's time, so that all clocks of the state are of one moment.
pub fn state(hv: &dyn Hypervisor, dom: DomId, system_time: i64, paused_at: u64) -> Result<GuestState> {
    // Before the HVM context, whose CR2 is right only after it (docs/extension-abi.md).
    let gt = hv.gt_state(dom).doing("read event channels, vCPU areas and clocks")?;
    let mut params = Vec::new();
    for param in PARAMS.iter().filter(|p| p.role != ParamRole::DeviceModel) {
        let value = hv.hvm_param(dom, param.index)?;
        if value != 0 {
            params.push((param.index, value));
        }
    }
    let shared_info = match hv.domain_info(dom)?.shared_info {
        None => None,
        Some(gfn) => {
            let mapping = hv.map_pages(dom, &[gfn], hypervisor::Access::Read).doing("map shared_info")?;
            let mut page = vec![0; PAGE_SIZE];
            mapping.read(0, &mut page);
            Some((gfn, page))
        }
    };
    let mut info = tsc_info(hv, dom)?;
    info.elapsed_ns = info.elapsed_ns.saturating_sub(hv.now()?.saturating_sub(paused_at));
    let context = hv.hvm_context(dom)?;
    let at_pause = |vcpu: u16, saved: u64| match gt.vcpus.get(usize::from(vcpu)) {
        Some(v) => tsc::moved(v.tsc, system_time, info.khz),
        None => saved,
    };
    Ok(GuestState {
        vm_assist: hv.vm_assist(dom)?,
        tsc: info,
        hvm_context: tsc::replaced(&context, at_pause)?,
        params,
        shared_info,
        gt,
        grants: grants(hv, dom)?,
        system_time,
    })
}

/// Pages that Xen or the service domain writes to without marking them dirty, so that they are sent again after the pause whatever the
/// bitmap says, and written again on the destination after everything else that touches them: vcpu_info, FIFO control blocks and event
/// array, areas at physical addresses, the store's and the console's ring.
pub fn unmarked_pages(params: &[(u32, u64)], gt: &GtState) -> BTreeSet<Gfn> {
    let mut pages: BTreeSet<Gfn> = params
        .iter()
        .filter(|(index, value)| (*index == PARAM_STORE_PFN || *index == PARAM_CONSOLE_PFN) && *value != 0)
        .map(|(_, value)| Gfn(*value))
        .collect();
    pages.extend(gt.event_array.iter().flatten());
    for vcpu in &gt.vcpus {
        pages.extend(vcpu.vcpu_info.map(|place| place.gfn));
        pages.extend(vcpu.fifo.as_ref().map(|fifo| fifo.control_block.gfn));
        for area in [vcpu.runstate_area, vcpu.time_area].into_iter().flatten() {
            if let GuestArea::Physical(place) = area {
                // An area may lie across the end of its page.
                pages.extend([place.gfn, Gfn(place.gfn.0 + 1)]);
            }
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_of_a_pvh_guest() {
        // 256 MiB, ACPI tables at 0xfc000000, special pages; a hole where the guest has ballooned.
        let ram: Vec<Gfn> =
            (0..0x8000).chain(0x8100..0x10000).chain(0xfc000..0xfc004).chain(0xfeff8..0xff000).map(Gfn).collect();
        let map = memory_map(&ram);
        let text: Vec<_> = map.iter().map(|r| (r.start, r.size, r.kind)).collect();
        assert_eq!(text, [(0, 0x1000_0000, 1), (0xfc00_0000, 0x4000, 3), (0xfeff_8000, 0x8000, 2)]);
        let high: Vec<Gfn> = ram.into_iter().chain((0x10_0000..0x10_0400).map(Gfn)).collect();
        assert_eq!(memory_map(&high).last().map(|r| (r.start, r.size, r.kind)), Some((1 << 32, 0x40_0000, 1)));
    }
}
