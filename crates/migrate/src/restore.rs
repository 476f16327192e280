//! Putting a guest into the destination's hypervisor, in the order that keeps Xen from destroying what was put before.
//!
//! Createdomain, CPU policy, TSC → memory → address width → grant table → shared_info → FIFO control blocks, ports, event array, queues →
//! HVM context → vCPU areas → the pages that those steps touched, again → callback; after `Go` the clocks. Each function is one step of
//! the report; none of them lets the guest run.

use crate::capture::unmarked_pages;
use crate::cpu;
use crate::guest::{GfnRange, GuestState, Shell};
use crate::trouble::{Doing, Result, Trouble};
use crate::tsc;
use hypervisor::{
    Access, DomId, DomainConfig, Gfn, GrantArray, GtState, GtStep, Hypervisor, PAGE_SIZE, TscPoint, XenPage,
};
use serde::{Deserialize, Serialize};
use std::mem::offset_of;
use xen_abi::grant::{EntryV1, GTF_READING, GTF_WRITING};
use xen_abi::hvm_op::{ParamRole, param};

/// How often the control domain's pause count is raised, on both copies. Each `xl unpause` takes one back and says nothing, so that somebody who
/// wonders why the guest does not run may well do it again.
pub const PAUSES: u32 = 8;

/// Pages populated with one call.
const BATCH: usize = 1024;
/// Pages in an extent of 2 MiB.
const SUPERPAGE: u64 = 512;

/// Makes the domain, paused, in one of this host's CPU pools, with vCPUs, limits, CPU policy and memory map, and its memory populated but
/// empty.
pub fn make_shell(hv: &dyn Hypervisor, dom: DomId, shell: &Shell, cpupool: u32) -> Result<()> {
    hv.create_domain(dom, &DomainConfig { cpupool, ..shell.config.clone() })?;
    // Creation holds one pause count.
    for _ in 1..PAUSES {
        hv.pause(dom)?;
    }
    hv.set_max_vcpus(dom, shell.config.max_vcpus)?;
    hv.set_max_mem(dom, shell.max_mem_kib)?;
    hv.set_paging_pool_size(dom, shell.paging_pool)?;
    hv.set_cpu_policy(dom, &shell.policy)
        .map_err(|e| Trouble::because("this host can't give the guest the CPU that it has", e))?;
    // Xen takes out what it can't give and says nothing. The preflight has compared what the CPU can do; paging and Xen's command line
    // have their say here.
    let lacks = cpu::lacks(&shell.policy, &hv.cpu_policy(dom)?);
    if !lacks.is_empty() {
        return Err(Trouble::new(format!(
            "this host can't give the guest the CPU that it has; it lacks {}",
            lacks.join(", ")
        )));
    }
    set_tsc(hv, dom, shell.tsc)?;
    hv.set_memory_map(dom, &shell.memory_map)?;
    hv.claim_pages(dom, shell.ram.iter().map(|r| r.1).sum())
        .map_err(|e| Trouble::because("not enough free memory", e).todo("free memory on the destination"))?;
    let populated = populate(hv, dom, &shell.ram);
    hv.claim_pages(dom, 0)?;
    populated
}

/// Gives the guest memory, in 2 MiB extents where a whole one fits.
pub fn populate(hv: &dyn Hypervisor, dom: DomId, ram: &[GfnRange]) -> Result<()> {
    let mut super_first = Vec::new();
    let mut single = Vec::new();
    for &(first, count) in ram {
        let end = first.saturating_add(count);
        let mut at = first;
        while at < end {
            if at % SUPERPAGE == 0 && at + SUPERPAGE <= end {
                super_first.push(Gfn(at));
                at += SUPERPAGE;
            } else {
                single.push(Gfn(at));
                at += 1;
            }
        }
    }
    for gfn in super_first {
        // A host without a free 2 MiB extent has single pages still.
        if hv.populate(dom, &[gfn], 9).is_err() {
            single.extend((gfn.0..gfn.0 + SUPERPAGE).map(Gfn));
        }
    }
    for batch in single.chunks(BATCH) {
        hv.populate(dom, batch, 0)?;
    }
    Ok(())
}

/// The incarnation counts moves; Xen adds one by itself, [`Hypervisor::set_tsc_info`] makes up for it.
fn set_tsc(hv: &dyn Hypervisor, dom: DomId, info: hypervisor::TscInfo) -> Result<()> {
    Ok(hv.set_tsc_info(dom, &info)?)
}

/// Grant table, shared_info, event channels, parameters: what must be in place before vCPUs have a context.
pub fn platform(hv: &dyn Hypervisor, dom: DomId, state: &GuestState) -> Result<()> {
    let step = |step| hv.set_gt_state(dom, step, &state.gt);
    hv.set_vm_assist(dom, state.vm_assist)?;
    step(GtStep::AddressWidth)?;

    step(GtStep::GrantVersion)?;
    for (index, gfn) in (0u32..).zip(&state.grants.gfns) {
        if let Some(gfn) = gfn {
            hv.place_xen_page(dom, XenPage::GrantFrame(index), *gfn)?;
        }
    }
    hv.write_grant_frames(dom, GrantArray::Shared, 0, &without_use(&state.grants.shared))?;

    if let Some((gfn, _)) = &state.shared_info {
        hv.place_xen_page(dom, XenPage::SharedInfo, *gfn)?;
    }
    if state.gt.vcpus.iter().any(|v| v.fifo.is_some()) {
        step(GtStep::FifoControlBlocks)?;
    }
    if !state.gt.emuirqs.is_empty() {
        step(GtStep::EmuIrqs)?;
    }
    step(GtStep::Ports)?;
    if state.gt.event_array.is_some() {
        step(GtStep::EventArray)?;
        step(GtStep::FifoTails)?;
    }
    set_params(hv, dom, state, |role| matches!(role, ParamRole::Guest | ParamRole::Port))
}

/// Entries without the flags that say that somebody has the page mapped: nobody has it here, and a flag that stays would keep the
/// guest from ever taking the page back.
fn without_use(shared: &[u8]) -> Vec<u8> {
    let mut frames = shared.to_vec();
    let in_use = (GTF_READING | GTF_WRITING).to_le_bytes();
    for entry in frames.chunks_exact_mut(size_of::<EntryV1>()) {
        for (byte, mask) in entry.iter_mut().skip(offset_of!(EntryV1, flags)).zip(in_use) {
            *byte &= !mask;
        }
    }
    frames
}

fn set_params(hv: &dyn Hypervisor, dom: DomId, state: &GuestState, wanted: impl Fn(ParamRole) -> bool) -> Result<()> {
    for &(index, value) in &state.params {
        let Some(param) = param(index) else {
            return Err(Trouble::new(format!("HVM parameter {index} of the image is not known here")));
        };
        if wanted(param.role) {
            hv.set_hvm_param(dom, index, value)?;
        }
    }
    Ok(())
}

/// vCPUs and platform devices, vCPU areas and timers, the pages that all this wrote into, and last the callback.
pub fn processors(hv: &dyn Hypervisor, dom: DomId, state: &GuestState) -> Result<()> {
    let pages: Vec<Gfn> = unmarked_pages(&state.params, &state.gt).into_iter().collect();
    let mut contents = vec![0; pages.len() * PAGE_SIZE];
    let read = hv.read_pages(dom, &pages, &mut contents)?;
    hv.set_hvm_context(dom, &state.hvm_context).doing("set the vCPUs' and devices' context")?;
    hv.set_gt_state(dom, GtStep::VcpuAreas, &state.gt)?;
    // Pages past the end of an area that does not reach into them may not exist.
    let there: Vec<usize> = (0..pages.len()).filter(|i| matches!(read.get(*i), Some(Ok(())))).collect();
    let gfns: Vec<Gfn> = there.iter().filter_map(|i| pages.get(*i).copied()).collect();
    let data: Vec<u8> = contents
        .chunks_exact(PAGE_SIZE)
        .enumerate()
        .filter(|(i, _)| there.contains(i))
        .flat_map(|(_, page)| page.iter().copied())
        .collect();
    for (gfn, done) in gfns.iter().zip(hv.write_pages(dom, &gfns, &data)?) {
        done.map_err(|errno| Trouble::new(format!("write page {gfn} again: {errno}")))?;
    }
    if let Some((gfn, page)) = &state.shared_info {
        let mapping = hv.map_pages(dom, &[*gfn], Access::ReadWrite).doing("map shared_info")?;
        mapping.write(0, page);
    }
    set_params(hv, dom, state, |role| role == ParamRole::Callback)
}

/// How long the guest had been away at a point of this host's time.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Away {
    pub away_ns: u64,
    pub at_host_ns: u64,
}

impl Away {
    /// The same, at another point of this host's time.
    pub fn at(self, host_ns: u64) -> u64 {
        self.away_ns.saturating_add(host_ns.saturating_sub(self.at_host_ns))
    }
}

/// Sets every clock to where it would be had the guest run all the time. The host's own clock carries them on, so neither the moment of
/// this call nor that of the unpause matters.
pub fn clocks(hv: &dyn Hypervisor, dom: DomId, state: &GuestState, away: Away) -> Result<()> {
    let host_now = hv.now()?;
    let away_ns = away.at(host_now);
    let guest_now = state.system_time.saturating_add_unsigned(away_ns);
    let mut gt: GtState = state.gt.clone();
    gt.clock_offset_ns = guest_now.saturating_sub_unsigned(host_now);
    for vcpu in &mut gt.vcpus {
        vcpu.runstate = vcpu.runstate.at(guest_now);
    }
    for (vcpu, ticks) in tsc::read(&state.hvm_context)? {
        if let Some(vcpu) = gt.vcpus.get_mut(usize::from(vcpu)) {
            vcpu.tsc = TscPoint { ticks, at_ns: state.system_time };
        }
    }
    hv.set_gt_state(dom, GtStep::ClockOffset, &gt)?;
    let mut info = state.tsc;
    info.elapsed_ns = info.elapsed_ns.saturating_add(away_ns);
    set_tsc(hv, dom, info)?;
    hv.set_gt_state(dom, GtStep::VcpuTimes, &gt)?;
    Ok(())
}

/// Arms the guest's watchdogs with what was left at the pause.
pub fn watchdogs(hv: &dyn Hypervisor, dom: DomId, gt: &GtState) -> Result<()> {
    if gt.watchdogs.is_empty() {
        return Ok(());
    }
    Ok(hv.set_gt_state(dom, GtStep::Watchdogs, gt)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_keeps_all_but_its_use() {
        let entry = |flags: u16| [&flags.to_le_bytes()[..], &[7, 0, 1, 2, 3, 4]].concat();
        let before = [entry(1 | 4 | GTF_READING | GTF_WRITING), entry(0x101 | GTF_READING)].concat();
        assert_eq!(without_use(&before), [entry(1 | 4), entry(0x101)].concat());
    }
}
