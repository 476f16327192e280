//! The host itself, and the implementation of the trait: each operation is in the module of its subject.

use crate::Privcmd;
use crate::memory::MARK_BATCH;
use hypervisor::*;
use std::collections::BTreeSet;
use xen_abi::version::{INTERFACES, Interface};
use xen_abi::{domctl, hvm_op, hypercall, sysctl, xenver};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// A running Xen. Cheap to share; every operation is a hypercall of its own.
#[derive(Debug)]
pub struct XenHost {
    pub(crate) privcmd: Privcmd,
    pub(crate) interface: &'static Interface,
    version: XenVersion,
}

impl XenHost {
    /// Opens the devices and refuses a Xen whose interfaces are not known.
    pub fn open() -> Result<XenHost> {
        let privcmd = Privcmd::open()?;
        let number = version_string(&privcmd, xenver::VERSION, 0)?.0;
        let extra = version_string(&privcmd, xenver::EXTRAVERSION, xenver::EXTRAVERSION_LEN)?.1;
        let version = XenVersion { major: (number >> 16) as u16, minor: number as u16, extra };
        let interface = interface_of(&version)?;
        Ok(XenHost { privcmd, interface, version })
    }

    /// The interface numbers of this hypervisor.
    pub fn interface(&self) -> &'static Interface {
        self.interface
    }

    /// The device, for hypercalls that the trait does not know.
    pub fn privcmd(&self) -> &Privcmd {
        &self.privcmd
    }

    /// Highest numbers of leaves and MSRs that any policy has.
    fn policy_limits(&self) -> Result<(u32, u32)> {
        let mut op = sysctl::CpuPolicy { index: sysctl::CPU_POLICY_HOST, ..Default::default() };
        self.sysctl("XEN_SYSCTL_get_cpu_policy", sysctl::GET_CPU_POLICY, &mut op)?;
        Ok((op.nr_leaves, op.nr_msrs))
    }

    /// Reads a policy into buffers with `read(leaves address, leaves, MSRs address, MSRs)`, which says how many there were.
    fn read_policy(
        &self,
        name: &'static str,
        dom: Option<DomId>,
        read: impl FnOnce(u64, u32, u64, u32) -> Result<(u32, u32)>,
    ) -> Result<CpuPolicy> {
        let (max_leaves, max_msrs) = self.policy_limits()?;
        let mut leaves = self.privcmd.buffer(max_leaves as usize * size_of::<domctl::CpuidLeaf>())?;
        let mut msrs = self.privcmd.buffer(max_msrs as usize * size_of::<domctl::MsrEntry>())?;
        let (nr_leaves, nr_msrs) = read(leaves.addr(), max_leaves, msrs.addr(), max_msrs)?;
        if nr_leaves > max_leaves || nr_msrs > max_msrs {
            return Err(HypervisorError::malformed(
                name,
                dom,
                format!("{nr_leaves} leaves and {nr_msrs} MSRs, with room for {max_leaves} and {max_msrs}"),
            ));
        }
        Ok(CpuPolicy {
            leaves: structures::<domctl::CpuidLeaf>(leaves.bytes(), nr_leaves)
                .map(|l| CpuidLeaf { leaf: l.leaf, subleaf: l.subleaf, a: l.a, b: l.b, c: l.c, d: l.d })
                .collect(),
            msrs: structures::<domctl::MsrEntry>(msrs.bytes(), nr_msrs)
                .map(|m| MsrEntry { index: m.idx, flags: m.flags, value: m.val })
                .collect(),
        })
    }

    pub(crate) fn domain_policy(&self, dom: DomId) -> Result<CpuPolicy> {
        const NAME: &str = "XEN_DOMCTL_get_cpu_policy";
        self.read_policy(NAME, Some(dom), |leaves, nr_leaves, msrs, nr_msrs| {
            let mut op = domctl::CpuPolicy { nr_leaves, nr_msrs, leaves, msrs, ..Default::default() };
            self.domctl(NAME, domctl::GET_CPU_POLICY, dom, &mut op)?;
            Ok((op.nr_leaves, op.nr_msrs))
        })
    }

    pub(crate) fn put_domain_policy(&self, dom: DomId, policy: &CpuPolicy) -> Result<()> {
        const NAME: &str = "XEN_DOMCTL_set_cpu_policy";
        let leaves: Vec<_> = policy
            .leaves
            .iter()
            .map(|l| domctl::CpuidLeaf { leaf: l.leaf, subleaf: l.subleaf, a: l.a, b: l.b, c: l.c, d: l.d })
            .collect();
        let msrs: Vec<_> =
            policy.msrs.iter().map(|m| domctl::MsrEntry { idx: m.index, flags: m.flags, val: m.value }).collect();
        let mut leaf_buffer = self.privcmd.buffer(leaves.as_bytes().len())?;
        leaf_buffer.put(0, leaves.as_slice());
        let mut msr_buffer = self.privcmd.buffer(msrs.as_bytes().len())?;
        msr_buffer.put(0, msrs.as_slice());
        let mut op = domctl::CpuPolicy {
            nr_leaves: leaves.len() as u32,
            nr_msrs: msrs.len() as u32,
            leaves: leaf_buffer.addr(),
            msrs: msr_buffer.addr(),
            // Xen leaves them alone unless it objects to something in particular.
            err_leaf: u32::MAX,
            err_subleaf: u32::MAX,
            err_msr: u32::MAX,
            ..Default::default()
        };
        self.domctl(NAME, domctl::SET_CPU_POLICY, dom, &mut op).map_err(|e| {
            if op.err_msr != u32::MAX {
                e.with_detail(format!("MSR {:#x}", op.err_msr))
            } else if op.err_leaf != u32::MAX {
                e.with_detail(format!("CPUID leaf {:#x}, subleaf {:#x}", op.err_leaf, op.err_subleaf))
            } else {
                e
            }
        })
    }
}

/// The interface numbers of a version, or a refusal that names it and those that are supported.
fn interface_of(version: &XenVersion) -> Result<&'static Interface> {
    xen_abi::version::interface(version.major, version.minor).ok_or_else(|| {
        let known: Vec<_> = INTERFACES.iter().map(|i| format!("{}.{}", i.major, i.minor)).collect();
        let text = format!("Xen {version} is not supported; supported are {}", known.join(", "));
        HypervisorError::unsupported("open", None, text)
    })
}

/// `XENVER_*`: the result, and the text if it fills a buffer of `len` bytes.
fn version_string(privcmd: &Privcmd, cmd: u64, len: usize) -> Result<(i64, String)> {
    let mut buffer = privcmd.buffer(len)?;
    buffer.bytes_mut().fill(0);
    let addr = if len == 0 { 0 } else { buffer.addr() };
    // SAFETY: the one address is that of `buffer`, held mutably and as long as Xen writes.
    let r = unsafe { privcmd.hypercall(hypercall::XEN_VERSION, [cmd, addr, 0, 0, 0]) }
        .map_err(|e| HypervisorError::errno("HYPERVISOR_xen_version", None, e))?;
    let text = buffer.bytes().get(..len).unwrap_or(&[]);
    let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
    Ok((r, String::from_utf8_lossy(&text[..end]).into_owned()))
}

/// The hypervisor's build id in hex; empty if it has none.
fn build_id(privcmd: &Privcmd) -> Result<String> {
    /// Room for the id; GNU build ids have 20 bytes.
    const ROOM: u32 = 64;
    let mut buffer = privcmd.buffer(4 + ROOM as usize)?;
    buffer.put(0, &ROOM);
    let addr = buffer.addr();
    // SAFETY: the one address is that of `buffer`, held mutably, and Xen writes at most `ROOM` bytes behind the length.
    match unsafe { privcmd.hypercall(hypercall::XEN_VERSION, [xenver::BUILD_ID, addr, 0, 0, 0]) } {
        Ok(len) => {
            let id = usize::try_from(len).ok().and_then(|len| buffer.bytes().get(4..4 + len)).unwrap_or(&[]);
            Ok(id.iter().map(|b| format!("{b:02x}")).collect())
        }
        Err(Errno::ENODATA) => Ok(String::new()),
        Err(e) => Err(HypervisorError::errno("XENVER_build_id", None, e)),
    }
}

/// The gfn that Xen's machine-to-physical table has for one of its own pages. While the guest has not placed the page, that is all
/// ones, or one of the table's marks, which all lie above any gfn.
pub(crate) fn placed(frame: u64) -> Option<Gfn> {
    (frame < 1 << 40).then_some(Gfn(frame))
}

/// The first `count` structures in a buffer.
pub(crate) fn structures<T: FromBytes>(bytes: &[u8], count: u32) -> impl Iterator<Item = T> + '_ {
    bytes.chunks_exact(size_of::<T>()).take(count as usize).filter_map(|c| T::read_from_bytes(c).ok())
}

impl Hypervisor for XenHost {
    fn host_info(&self) -> Result<HostInfo> {
        let mut phys = sysctl::PhysInfo::new_zeroed();
        self.sysctl("XEN_SYSCTL_physinfo", sysctl::PHYSINFO, &mut phys)?;
        Ok(HostInfo {
            version: self.version.clone(),
            capabilities: version_string(&self.privcmd, xenver::CAPABILITIES, xenver::CAPABILITIES_LEN)?
                .1
                .trim()
                .into(),
            build_id: build_id(&self.privcmd)?,
            command_line: version_string(&self.privcmd, xenver::COMMANDLINE, xenver::COMMANDLINE_LEN)?.1,
            total_pages: phys.total_pages,
            free_pages: phys.free_pages,
            outstanding_pages: phys.outstanding_pages,
            cpus: phys.nr_cpus,
            tsc_khz: phys.cpu_khz,
            physcaps: phys.capabilities,
            extension: self.extension_info()?,
        })
    }

    fn now(&self) -> Result<SystemTimeNs> {
        let mut time = hvm_op::GetTime::default();
        self.op(hypercall::HVM_OP, hvm_op::GET_TIME, &mut time)?
            .map_err(|e| HypervisorError::errno("HVMOP_get_time", None, e))?;
        Ok(time.now)
    }

    fn host_cpu_policy(&self, which: HostPolicy) -> Result<CpuPolicy> {
        const NAME: &str = "XEN_SYSCTL_get_cpu_policy";
        let index = match which {
            HostPolicy::Raw => sysctl::CPU_POLICY_RAW,
            HostPolicy::Host => sysctl::CPU_POLICY_HOST,
            HostPolicy::HvmMax => sysctl::CPU_POLICY_HVM_MAX,
            HostPolicy::HvmDefault => sysctl::CPU_POLICY_HVM_DEFAULT,
        };
        self.read_policy(NAME, None, |leaves, nr_leaves, msrs, nr_msrs| {
            let mut op = sysctl::CpuPolicy { index, nr_leaves, nr_msrs, _rsvd: 0, leaves, msrs };
            self.sysctl(NAME, sysctl::GET_CPU_POLICY, &mut op)?;
            Ok((op.nr_leaves, op.nr_msrs))
        })
    }

    fn domains(&self) -> Result<Vec<DomainInfo>> {
        self.list_domains()
    }

    fn domain_info(&self, dom: DomId) -> Result<DomainInfo> {
        self.info_of(dom)
    }

    fn create_domain(&self, dom: DomId, config: &DomainConfig) -> Result<()> {
        self.create(dom, config)
    }

    fn set_max_vcpus(&self, dom: DomId, count: u32) -> Result<()> {
        self.domctl("XEN_DOMCTL_max_vcpus", domctl::MAX_VCPUS, dom, &mut domctl::MaxVcpus { max: count })
    }

    fn set_max_mem(&self, dom: DomId, kib: u64) -> Result<()> {
        self.domctl("XEN_DOMCTL_max_mem", domctl::MAX_MEM, dom, &mut domctl::MaxMem { max_memkb: kib })
    }

    fn paging_pool_size(&self, dom: DomId) -> Result<u64> {
        let mut op = domctl::PagingMempool::default();
        self.domctl("XEN_DOMCTL_get_paging_mempool_size", domctl::GET_PAGING_MEMPOOL_SIZE, dom, &mut op)?;
        Ok(op.size)
    }

    fn set_paging_pool_size(&self, dom: DomId, bytes: u64) -> Result<()> {
        let mut op = domctl::PagingMempool { size: bytes };
        self.domctl("XEN_DOMCTL_set_paging_mempool_size", domctl::SET_PAGING_MEMPOOL_SIZE, dom, &mut op)
    }

    fn pause(&self, dom: DomId) -> Result<()> {
        self.domctl("XEN_DOMCTL_pausedomain", domctl::PAUSEDOMAIN, dom, &mut [0u8; 0])
    }

    fn unpause(&self, dom: DomId) -> Result<()> {
        self.domctl("XEN_DOMCTL_unpausedomain", domctl::UNPAUSEDOMAIN, dom, &mut [0u8; 0])
    }

    fn destroy(&self, dom: DomId) -> Result<()> {
        self.domctl("XEN_DOMCTL_destroydomain", domctl::DESTROYDOMAIN, dom, &mut [0u8; 0])
    }

    fn claim_pages(&self, dom: DomId, pages: u64) -> Result<()> {
        self.claim(dom, pages)
    }

    fn cpu_policy(&self, dom: DomId) -> Result<CpuPolicy> {
        self.domain_policy(dom)
    }

    fn set_cpu_policy(&self, dom: DomId, policy: &CpuPolicy) -> Result<()> {
        self.put_domain_policy(dom, policy)
    }

    fn tsc_info(&self, dom: DomId) -> Result<TscInfo> {
        let mut op = domctl::TscInfo::default();
        self.domctl("XEN_DOMCTL_gettscinfo", domctl::GETTSCINFO, dom, &mut op)?;
        Ok(TscInfo { mode: op.tsc_mode, khz: op.gtsc_khz, incarnation: op.incarnation, elapsed_ns: op.elapsed_nsec })
    }

    fn set_tsc_info(&self, dom: DomId, info: &TscInfo) -> Result<()> {
        let mut op = domctl::TscInfo {
            tsc_mode: info.mode,
            gtsc_khz: info.khz,
            // Xen counts a restore, and so stores one more than it is given.
            incarnation: info.incarnation.wrapping_sub(1),
            elapsed_nsec: info.elapsed_ns,
            ..Default::default()
        };
        self.domctl("XEN_DOMCTL_settscinfo", domctl::SETTSCINFO, dom, &mut op)
    }

    fn vm_assist(&self, dom: DomId) -> Result<u64> {
        Ok(self.vcpu_context(dom, 0)?.vm_assist)
    }

    fn set_vm_assist(&self, dom: DomId, bits: u64) -> Result<()> {
        self.put_vm_assist(dom, bits)
    }

    fn vcpu_info(&self, dom: DomId, vcpu: u32) -> Result<VcpuInfo> {
        let mut op = domctl::GetVcpuInfo { vcpu, ..Default::default() };
        self.domctl("XEN_DOMCTL_getvcpuinfo", domctl::GETVCPUINFO, dom, &mut op)
            .map_err(|e| e.with_detail(format!("vCPU {vcpu}")))?;
        Ok(VcpuInfo {
            vcpu,
            online: op.online != 0,
            blocked: op.blocked != 0,
            running: op.running != 0,
            cpu_time_ns: op.cpu_time,
        })
    }

    fn cpu_pool(&self, id: u32) -> Result<CpuPool> {
        self.pool(id)
    }

    fn share(&self, dom: DomId, scheduler: u32) -> Result<Share> {
        self.share_of(dom, scheduler)
    }

    fn set_share(&self, dom: DomId, share: &Share) -> Result<()> {
        self.put_share(dom, share)
    }

    fn affinity(&self, dom: DomId, vcpu: u32) -> Result<Affinity> {
        self.affinity_of(dom, vcpu)
    }

    fn set_affinity(&self, dom: DomId, vcpu: u32, affinity: &Affinity) -> Result<()> {
        self.put_affinity(dom, vcpu, affinity)
    }

    fn has_vnuma(&self, dom: DomId) -> Result<bool> {
        self.vnuma_of(dom)
    }

    fn max_gfn(&self, dom: DomId) -> Result<Gfn> {
        self.highest_gfn(dom)
    }

    fn populate_on_demand(&self, dom: DomId) -> Result<PopulateOnDemand> {
        self.pod_of(dom)
    }

    fn page_types(&self, dom: DomId, gfns: &[Gfn]) -> Result<Vec<PageType>> {
        self.types_of(dom, gfns)
    }

    fn populate(&self, dom: DomId, gfns: &[Gfn], order: u32) -> Result<()> {
        self.populate_extents(dom, gfns, order)
    }

    fn depopulate(&self, dom: DomId, gfns: &[Gfn]) -> Result<()> {
        self.remove_pages(dom, gfns)
    }

    fn read_pages(&self, dom: DomId, gfns: &[Gfn], buf: &mut [u8]) -> Result<Vec<std::result::Result<(), Errno>>> {
        self.copy_out(dom, gfns, buf)
    }

    fn write_pages(&self, dom: DomId, gfns: &[Gfn], data: &[u8]) -> Result<Vec<std::result::Result<(), Errno>>> {
        self.copy_in(dom, gfns, data)
    }

    fn map_pages(&self, dom: DomId, gfns: &[Gfn], access: Access) -> Result<Box<dyn Mapping>> {
        let (pages, results) = self.privcmd.map_frames(dom, gfns, access)?;
        let failed: BTreeSet<_> =
            results.iter().zip(gfns).filter_map(|(r, gfn)| r.err().map(|e| format!("{gfn:?}: {e}"))).collect();
        match failed.first() {
            None => Ok(Box::new(pages)),
            Some(first) => Err(HypervisorError::malformed(
                "map foreign frames",
                dom,
                format!("{} of {} frames cannot be mapped, first {first}", failed.len(), gfns.len()),
            )),
        }
    }

    fn place_xen_page(&self, dom: DomId, page: XenPage, gfn: Gfn) -> Result<()> {
        self.add_to_physmap(dom, page, gfn)
    }

    fn set_memory_map(&self, dom: DomId, map: &[MemoryRange]) -> Result<()> {
        self.put_memory_map(dom, map)
    }

    fn log_dirty_enable(&self, dom: DomId) -> Result<()> {
        self.shadow_op(dom, domctl::SHADOW_OP_ENABLE_LOGDIRTY, 0, None).map(drop)
    }

    fn log_dirty_clean(&self, dom: DomId, bitmap: &mut DirtyBitmap, last: bool) -> Result<DirtyStats> {
        let mode = if last { domctl::SHADOW_LOGDIRTY_FINAL } else { 0 };
        self.shadow_op(dom, domctl::SHADOW_OP_CLEAN, mode, Some(bitmap))
    }

    fn log_dirty_peek(&self, dom: DomId, bitmap: &mut DirtyBitmap) -> Result<DirtyStats> {
        self.shadow_op(dom, domctl::SHADOW_OP_PEEK, 0, Some(bitmap))
    }

    fn log_dirty_mark(&self, dom: DomId, gfns: &[Gfn]) -> Result<()> {
        gfns.chunks(MARK_BATCH).try_for_each(|batch| self.modified_memory(dom, batch))
    }

    fn log_dirty_disable(&self, dom: DomId) -> Result<()> {
        self.shadow_op(dom, domctl::SHADOW_OP_OFF, 0, None).map(drop)
    }

    fn hvm_context(&self, dom: DomId) -> Result<Vec<u8>> {
        self.get_context(dom)
    }

    fn set_hvm_context(&self, dom: DomId, records: &[u8]) -> Result<()> {
        self.put_context(dom, records)
    }

    fn hvm_param(&self, dom: DomId, index: u32) -> Result<u64> {
        let mut op = hvm_op::HvmParam { domid: dom.0, index, ..Default::default() };
        self.op(hypercall::HVM_OP, hvm_op::GET_PARAM, &mut op)?
            .map_err(|e| HypervisorError::errno("HVMOP_get_param", dom, e).with_detail(param_name(index)))?;
        Ok(op.value)
    }

    fn set_hvm_param(&self, dom: DomId, index: u32, value: u64) -> Result<()> {
        let mut op = hvm_op::HvmParam { domid: dom.0, index, value, ..Default::default() };
        self.op(hypercall::HVM_OP, hvm_op::SET_PARAM, &mut op)?.map_err(|e| {
            HypervisorError::errno("HVMOP_set_param", dom, e).with_detail(format!("{} = {value:#x}", param_name(index)))
        })?;
        Ok(())
    }

    fn port_status(&self, dom: DomId, port: Port) -> Result<Option<PortStatus>> {
        self.status_of(dom, port)
    }

    fn alloc_unbound_port(&self, dom: DomId, remote: DomId) -> Result<Port> {
        self.alloc_unbound(dom, remote)
    }

    fn raise_guest_port(&self, dom: DomId, port: Port) -> Result<()> {
        self.raise(dom, port)
    }

    fn open_events(&self) -> Result<Box<dyn Events>> {
        Ok(Box::new(crate::EventDevice::open()?))
    }

    fn grant_table_size(&self, dom: DomId) -> Result<GrantTableSize> {
        self.table_size(dom)
    }

    fn grant_table_version(&self, dom: DomId) -> Result<u32> {
        self.table_version(dom)
    }

    fn grant_table_gfns(&self, dom: DomId) -> Result<Vec<Option<Gfn>>> {
        self.table_gfns(dom)
    }

    fn read_grant_frames(&self, dom: DomId, array: GrantArray, first: u32, count: u32) -> Result<Vec<u8>> {
        self.read_table(dom, array, first, count)
    }

    fn write_grant_frames(&self, dom: DomId, array: GrantArray, first: u32, data: &[u8]) -> Result<()> {
        self.write_table(dom, array, first, data)
    }

    fn map_grants(&self, dom: DomId, refs: &[u32], access: Access) -> Result<Box<dyn Mapping>> {
        Ok(Box::new(crate::grants::map(dom, refs, access)?))
    }

    fn gt_state(&self, dom: DomId) -> Result<GtState> {
        self.get_gt(dom)
    }

    fn set_gt_state(&self, dom: DomId, step: GtStep, state: &GtState) -> Result<()> {
        self.put_gt(dom, step, state)
    }
}

fn param_name(index: u32) -> String {
    match hvm_op::param(index) {
        Some(p) => format!("HVM_PARAM_{}", p.name),
        None => format!("parameter {index}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_that_is_not_known_is_refused_by_number() {
        let v = |minor| XenVersion { major: 4, minor, extra: ".1".into() };
        assert_eq!(interface_of(&v(17)).unwrap().domctl, 0x15);
        for minor in [16, 18, 19, 21] {
            let e = interface_of(&v(minor)).unwrap_err().to_string();
            assert_eq!(e, format!("open: Xen 4.{minor}.1 is not supported; supported are 4.17, 4.20"));
        }
    }

    #[test]
    fn marks_of_the_machine_to_physical_table_are_no_places() {
        assert_eq!(placed(0x10), Some(Gfn(0x10)));
        for mark in [u64::MAX, u64::MAX - 1, 0x5555_5555_5555_5555, 1 << 62] {
            assert_eq!(placed(mark), None);
        }
    }
}
