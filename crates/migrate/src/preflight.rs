//! What can't move is refused here, with the reason and what to do, before anything is touched.

use crate::cpu;
use crate::guest::{GuestKind, Offer};
use crate::host::Host;
use crate::toolstack::Description;
use crate::trouble::{Result, Trouble};
use hypervisor::{DomId, DomainInfo, Gfn, GtPortKind, GtState, GuestArea, HostInfo, HostPolicy, Hypervisor};
use xen_abi::domctl;
use xen_abi::hvm_op::{PARAMS, ParamRole};

/// `XEN_CPUID_TSC_MODE_NEVER_EMULATE`.
const TSC_NATIVE: u32 = 2;
/// One part in so many: what two hosts of the same kind measure differently, and a guest's time-keeping corrects.
const TSC_TOLERANCE: u32 = 2000;
const FOUR_GIB: u64 = 1 << 20;
/// What a guest that comes in may be created with (`XEN_DOMCTL_CDF_*`): HVM, HAP, out-of-sync shadows off, and measured boot (bit 2).
const SHELL_FLAGS: u32 = domctl::CDF_HVM | domctl::CDF_HAP | domctl::CDF_OOS_OFF | 1 << 2;

/// The source's side: what this guest uses that can't be carried. Empty: nothing.
pub fn source(
    hv: &dyn Hypervisor,
    host: &HostInfo,
    info: &DomainInfo,
    gt: &GtState,
    guest: &Description,
) -> Result<Vec<String>> {
    let mut why = Vec::new();
    if !info.hvm {
        why.push("it is a PV guest; only HVM and PVH guests can move transparently".into());
    }
    if guest.identity.kind == GuestKind::Hvm {
        why.push("it is an HVM guest with a device model, which can't be moved yet; use --mode cooperative".into());
    }
    if let Some(reason) = info.shutdown {
        why.push(format!("it has shut down (reason {reason})"));
    }
    if info.dying {
        why.push("it is being destroyed".into());
    }
    if info.paused && info.shutdown.is_none() {
        // It would run after the move; and whoever paused it (`xl save`, another migration, a debugger) is not done with it.
        why.push("it is paused; `xl unpause` it first, unless somebody is at work on it".into());
    }
    if info.shared_info.is_none() {
        why.push("it has not placed its shared_info: it is still in its boot loader; try again when it runs".into());
    }
    if info.shared_pages != 0 || info.paged_pages != 0 {
        why.push("it has shared or paged-out memory; switch memory sharing and paging off".into());
    }
    if gt.grant_version != 1 {
        why.push(format!("it uses grant table version {}; only version 1 can be moved", gt.grant_version));
    }
    why.extend(features(host, gt));
    if hv.has_vnuma(info.domid)? {
        why.push("it has a NUMA topology of its own (vnuma), which can't be moved; start it without".into());
    }
    for (id, vcpu) in gt.vcpus.iter().enumerate() {
        if vcpu.initialised && vcpu.down {
            why.push(format!(
                "its vCPU {id} was taken down and keeps a context, which Xen does not save; bring it up in the guest"
            ));
        }
    }
    for param in PARAMS.iter().filter(|p| p.role == ParamRole::MustBeZero) {
        if hv.hvm_param(info.domid, param.index)? != 0 {
            why.push(format!("it uses {}, which can't be moved", param.name));
        }
    }
    for port in &gt.ports {
        match port.kind {
            GtPortKind::Unbound { remote } | GtPortKind::Interdomain { remote, .. }
                if remote != DomId::DOM0 && remote != info.domid =>
            {
                why.push(format!(
                    "its event channel {} leads to domain {remote}; only channels to dom0 and within the guest can be moved",
                    port.port
                ));
            }
            GtPortKind::Pirq(pirq) => why.push(format!(
                "its event channel {} is bound to physical interrupt {pirq}; detach passed-through devices",
                port.port
            )),
            _ if port.xen_consumer => {
                why.push(format!("its event channel {} belongs to a device model's ioreq server", port.port));
            }
            _ => {}
        }
    }
    for (id, vcpu) in gt.vcpus.iter().enumerate() {
        let physical = |area| matches!(area, Some(GuestArea::Physical(_)));
        if host.version.minor < 18 && (physical(vcpu.runstate_area) || physical(vcpu.time_area)) {
            why.push(format!("vCPU {id} has an area at a physical address, which Xen {} can't have", host.version));
        }
    }
    why.extend(maps_others(hv, info.domid)?);
    Ok(why)
}

/// What of Xen's the guest was created with or may use, and nobody can read.
fn features(host: &HostInfo, gt: &GtState) -> Vec<String> {
    let mut why = Vec::new();
    if gt.create_flags & domctl::CDF_NESTED_VIRT != 0 {
        why.push("it has nested virtualisation, which can't be moved; start it without (`nestedhvm=0`)".into());
    }
    if gt.create_flags & domctl::CDF_IOMMU != 0 {
        why.push(
            "it was created for passed-through devices, whose writes to memory nobody sees; start it with passthrough=\"disabled\"".into(),
        );
    }
    for (option, what) in [("vpmu", "performance counters"), ("argo", "argo rings")] {
        if switched_on(&host.command_line, option) || (option == "vpmu" && gt.create_flags & domctl::CDF_VPMU != 0) {
            why.push(format!(
                "it may have {what}, which can't be moved; boot this host without the option `{option}` of Xen"
            ));
        }
    }
    why
}

/// Whether an option that is off by default stands on Xen's command line, and not as "off".
fn switched_on(command_line: &str, option: &str) -> bool {
    let mut values = command_line
        .split_whitespace()
        .filter_map(|word| word.strip_prefix(option))
        .filter_map(|rest| if rest.is_empty() { Some("on") } else { rest.strip_prefix('=') });
    // The last one counts.
    values.next_back().is_some_and(|value| !matches!(value, "0" | "no" | "off" | "false" | "disable"))
}

/// Memory that is populated on demand ends the preflight before anybody looks at the guest's memory: each look would make a page, and
/// crash the guest when Xen has none left for it. An entry goes when the guest touches the page or its balloon driver gives it up, and
/// none comes once the guest runs.
pub fn populated(hv: &dyn Hypervisor, dom: DomId) -> Result<()> {
    let pod = hv.populate_on_demand(dom)?;
    if pod.entries == 0 {
        return Ok(());
    }
    Err(Trouble::new(format!(
        "{} MiB of its memory have no pages yet: it was started with less memory than maxmem and is populated on demand",
        pod.entries.div_ceil(256)
    ))
    .todo(if pod.entries > pod.cache_pages {
        "wait until its balloon driver has given up what is above its target; or start it with memory equal to maxmem"
    } else {
        "let the guest use all of its memory once (fill a tmpfs, say), which gives it its pages; or start it with memory equal to maxmem"
    }))
}

/// A guest decides itself how high its highest page lies, and a bit for each page below it is kept, and asked for in each round.
pub fn reach(hv: &dyn Hypervisor, info: &DomainInfo) -> Result<Gfn> {
    let top = hv.max_gfn(info.domid)?;
    // Room for holes, and for what Linux puts above its memory.
    let most = info.max_pages.saturating_mul(16).saturating_add(4 * FOUR_GIB);
    if top.0 > most {
        return Err(Trouble::new(format!(
            "it has a page at gfn {top}, far above its memory of {} MiB; a bit for each page below would take {} MiB here",
            info.max_pages / 256,
            top.0 >> 23
        ))
        .todo("find out what in the guest maps pages there"));
    }
    Ok(top)
}

/// Whether the guest maps pages of other guests: it would need them on the destination.
fn maps_others(hv: &dyn Hypervisor, dom: DomId) -> Result<Vec<String>> {
    use xen_abi::grant::{EntryV1, GTF_READING, GTF_WRITING};
    use zerocopy::FromBytes;
    let mut why = Vec::new();
    for other in hv.domains()? {
        if other.domid == dom || other.dying || other.domid == DomId::DOM0 {
            continue;
        }
        // A domain that goes away meanwhile has nothing to offer.
        let Ok(grants) = crate::capture::grants(hv, other.domid) else { continue };
        if grants.version != 1 {
            continue;
        }
        let mapped = grants
            .shared
            .chunks_exact(size_of::<EntryV1>())
            .filter_map(|e| EntryV1::read_from_bytes(e).ok())
            .any(|e| e.domid == dom.0 && e.flags & (GTF_READING | GTF_WRITING) != 0);
        if mapped {
            why.push(format!("it maps memory of domain {}; stop what connects the two", other.domid));
        }
    }
    Ok(why)
}

/// The destination's side: what is another there, and no reason to refuse.
pub fn remarks(here: &HostInfo, offer: &Offer) -> Vec<String> {
    let same = (&here.version, &here.build_id) == (&offer.xen, &offer.build_id);
    let text = || {
        format!(
            "Xen is {} here and {} on {}, another build; the guest can ask for it",
            here.version, offer.xen, offer.host
        )
    };
    if same { Vec::new() } else { vec![text()] }
}

/// The domain that has all backends of a host: dom0. The guest has it in its store, its grants and its ports.
const BACKEND_DOMID: u16 = 0;

/// The destination's side. Empty: it fits.
pub fn destination(host: &Host, offer: &Offer) -> Result<Vec<String>> {
    let hv = &*host.hypervisor;
    let here = hv.host_info()?;
    let mut why = Vec::new();
    let identity = &offer.identity;
    if offer.host_id == host.id {
        why.push("source and destination are the same host; a domid can't be there twice".into());
    }
    match hv.domain_info(identity.domid) {
        Ok(dying) if dying.dying => why.push(format!(
            "domid {} on {} is that of domain {}, which was destroyed and is not gone yet; wait, and if it stays, look for what \
             holds its pages (`xl list` shows it as (null): a backend that is stuck, xenconsoled, a debugger)",
            identity.domid, host.name, dying.uuid
        )),
        Ok(taken) => why.push(format!(
            "domid {} is taken on {} by domain {}; set domid_policy=\"random\" in xl.conf so that guests get ids that are free everywhere",
            identity.domid, host.name, taken.uuid
        )),
        Err(e) if e.is_no_such_domain() => {}
        Err(e) => return Err(e.into()),
    }
    if let Some(taken) = hv.domains()?.iter().find(|d| d.uuid == identity.uuid && d.domid != identity.domid) {
        why.push(format!("uuid {} is taken on {} by domain {}", identity.uuid, host.name, taken.domid));
    }
    for device in offer.devices.iter().filter(|device| device.backend_domid != BACKEND_DOMID) {
        why.push(format!(
            "{}: its backend is in domain {} on {}, and would be in domain {BACKEND_DOMID} here, which the guest would notice; give it a backend \
             in that domain",
            device.title(),
            device.backend_domid,
            offer.host
        ));
    }
    if (here.version.major, here.version.minor) != (offer.xen.major, offer.xen.minor) {
        why.push(format!(
            "Xen is {} here and {} on {}, and the guest can see that; install the same version on both",
            here.version, offer.xen, offer.host
        ));
    }
    match &here.extension {
        None => {
            why.push(format!("the hypervisor extension is not loaded on {}; run `ferry host load` there", host.name))
        }
        Some(e) if e.abi_version != offer.extension_abi => why.push(format!(
            "the hypervisor extension has version {} here and {} on {}; load the same on both",
            e.abi_version, offer.extension_abi, offer.host
        )),
        Some(_) => {}
    }
    let lacks = cpu::lacks(&offer.shell.policy, &hv.host_cpu_policy(HostPolicy::HvmMax)?);
    if !lacks.is_empty() {
        why.push(format!(
            "the CPU of {} lacks what the guest was started with: {}; move it to a host that has it, or start it anew without (`cpuid=` in \
             its configuration)",
            host.name,
            lacks.join(", ")
        ));
    }
    let free = here.free_pages.saturating_sub(here.outstanding_pages);
    // Page tables and the domain's own structures come on top of its memory.
    let (tsc, khz) = (offer.shell.tsc, here.tsc_khz);
    if tsc.mode == TSC_NATIVE && tsc.khz.abs_diff(khz) > khz / TSC_TOLERANCE {
        why.push(format!(
            "the guest's TSC is never emulated (tsc_mode=\"native\"), and runs at {} MHz on {} and {} MHz here; start it with tsc_mode=\"default\"",
            tsc.khz / 1000,
            offer.host,
            khz / 1000
        ));
    }
    let overhead = offer.shell.paging_pool / 4096 + 256 + u64::from(offer.shell.config.max_vcpus) * 32;
    let needed = offer.shell.total_pages.saturating_add(overhead);
    if free < needed {
        why.push(format!(
            "{} has {} MiB of free memory, the guest needs {} MiB; free memory there (a smaller dom0_mem, fewer guests)",
            host.name,
            free / 256,
            needed.div_ceil(256)
        ));
    }
    let described: u64 = offer.shell.ram.iter().fold(0u64, |sum, r| sum.saturating_add(r.1));
    if described > offer.shell.total_pages.saturating_add(1024) {
        why.push("the offer's memory does not add up".into());
    }
    // A shell is nobody's service domain, whatever the peer says.
    let flags = offer.shell.config.flags;
    if flags & domctl::CDF_HVM == 0 || flags & !SHELL_FLAGS != 0 {
        why.push(format!(
            "the offer asks for a domain with flags {flags:#x}, of which only {SHELL_FLAGS:#x} are taken"
        ));
    }
    why.extend(host.toolstack.fits(offer));
    Ok(why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_xen_are_read_as_xen_does() {
        assert!(switched_on("dom0_mem=1G vpmu", "vpmu"));
        assert!(switched_on("vpmu=bts,ipc", "vpmu") && switched_on("argo=1,mac-permissive=1", "argo"));
        for off in ["", "dom0_mem=1G", "vpmu=0", "vpmu=off", "vpmu=1 vpmu=no", "vpmu-x=1", "novpmu"] {
            assert!(!switched_on(off, "vpmu"), "{off}");
        }
    }
}
