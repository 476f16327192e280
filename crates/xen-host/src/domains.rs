//! Domains: listing, creating, vCPU contexts, HVM contexts.

use crate::XenHost;
use crate::host::structures;
use hypervisor::*;
use uuid::Uuid;
use xen_abi::{domctl, sysctl};

/// Domains asked for in one hypercall.
const LIST_BATCH: u32 = 256;

/// Largest HVM context that is believed: some records for each vCPU of the largest guest, with room.
const MAX_CONTEXT: u32 = 64 << 20;

fn info(i: &domctl::GetDomainInfo) -> DomainInfo {
    let flag = |f: u32| i.flags & f != 0;
    DomainInfo {
        domid: DomId(i.domain),
        uuid: Uuid::from_bytes(i.handle),
        hvm: flag(domctl::DOMINF_HVM_GUEST),
        hap: flag(domctl::DOMINF_HAP),
        xs_domain: flag(domctl::DOMINF_XS_DOMAIN),
        paused: flag(domctl::DOMINF_PAUSED),
        dying: flag(domctl::DOMINF_DYING),
        running: flag(domctl::DOMINF_RUNNING),
        blocked: flag(domctl::DOMINF_BLOCKED),
        shutdown: flag(domctl::DOMINF_SHUTDOWN)
            .then_some((i.flags >> domctl::DOMINF_SHUTDOWN_SHIFT & domctl::DOMINF_SHUTDOWN_MASK) as u8),
        total_pages: i.tot_pages,
        max_pages: i.max_pages,
        outstanding_pages: i.outstanding_pages,
        shared_pages: i.shr_pages,
        paged_pages: i.paged_pages,
        shared_info: crate::host::placed(i.shared_info_frame),
        cpu_time_ns: i.cpu_time,
        online_vcpus: i.nr_online_vcpus,
        vcpus: i.max_vcpu_id.wrapping_add(1),
        ssidref: i.ssidref,
        cpupool: i.cpupool,
        gpaddr_bits: i.gpaddr_bits,
        emulation_flags: i.arch_config.emulation_flags,
        misc_flags: i.arch_config.misc_flags,
    }
}

impl XenHost {
    fn list_from(&self, first: u16, max: u32) -> Result<Vec<domctl::GetDomainInfo>> {
        let mut buffer = self.privcmd.buffer(max as usize * size_of::<domctl::GetDomainInfo>())?;
        let mut op = sysctl::GetDomainInfoList {
            first_domain: first,
            max_domains: max,
            buffer: buffer.addr(),
            ..Default::default()
        };
        self.sysctl("XEN_SYSCTL_getdomaininfolist", sysctl::GETDOMAININFOLIST, &mut op)?;
        Ok(structures(buffer.bytes(), op.num_domains.min(max)).collect())
    }

    pub(crate) fn list_domains(&self) -> Result<Vec<DomainInfo>> {
        let mut all = Vec::new();
        let mut first = 0;
        loop {
            let part = self.list_from(first, LIST_BATCH)?;
            all.extend(part.iter().map(info));
            match part.last() {
                Some(last) if part.len() as u32 == LIST_BATCH => first = last.domain + 1,
                _ => return Ok(all),
            }
        }
    }

    pub(crate) fn info_of(&self, dom: DomId) -> Result<DomainInfo> {
        // XEN_DOMCTL_getdomaininfo answers for the next higher domain if there is none of that id, as the list does.
        let found = self.list_from(dom.0, 1)?;
        match found.first() {
            Some(i) if i.domain == dom.0 => Ok(info(i)),
            _ => Err(HypervisorError::errno("XEN_SYSCTL_getdomaininfolist", dom, Errno::ESRCH)),
        }
    }

    pub(crate) fn create(&self, dom: DomId, c: &DomainConfig) -> Result<()> {
        const NAME: &str = "XEN_DOMCTL_createdomain";
        // Xen would choose a number of its own for these.
        if dom.0 == 0 || dom.0 >= xen_abi::hypercall::DOMID_FIRST_RESERVED {
            return Err(HypervisorError::errno(NAME, dom, Errno::EINVAL).with_detail("not a guest's domid"));
        }
        let arch = domctl::ArchDomainConfig { emulation_flags: c.emulation_flags, misc_flags: c.misc_flags };
        if self.interface.createdomain_altp2m {
            let mut op = domctl::v17::CreateDomain {
                ssidref: c.ssidref,
                handle: c.uuid.into_bytes(),
                flags: c.flags,
                iommu_opts: c.iommu_opts,
                max_vcpus: c.max_vcpus,
                max_evtchn_port: c.max_evtchn_port,
                max_grant_frames: c.max_grant_frames,
                max_maptrack_frames: c.max_maptrack_frames,
                grant_opts: c.grant_opts,
                cpupool_id: c.cpupool,
                arch,
                ..Default::default()
            };
            self.domctl(NAME, domctl::CREATEDOMAIN, dom, &mut op)
        } else {
            let mut op = domctl::CreateDomain {
                ssidref: c.ssidref,
                handle: c.uuid.into_bytes(),
                flags: c.flags,
                iommu_opts: c.iommu_opts,
                max_vcpus: c.max_vcpus,
                max_evtchn_port: c.max_evtchn_port,
                max_grant_frames: c.max_grant_frames,
                max_maptrack_frames: c.max_maptrack_frames,
                grant_opts: c.grant_opts,
                cpupool_id: c.cpupool,
                arch,
                ..Default::default()
            };
            self.domctl(NAME, domctl::CREATEDOMAIN, dom, &mut op)
        }
    }

    /// `XEN_DOMCTL_getvcpucontext`.
    pub(crate) fn vcpu_context(&self, dom: DomId, vcpu: u32) -> Result<domctl::VcpuGuestContext> {
        let mut buffer = self.privcmd.buffer(size_of::<domctl::VcpuGuestContext>())?;
        let mut op = domctl::VcpuContext { vcpu, _pad: 0, ctxt: buffer.addr() };
        self.domctl("XEN_DOMCTL_getvcpucontext", domctl::GETVCPUCONTEXT, dom, &mut op)
            .map_err(|e| e.with_detail(format!("vCPU {vcpu}")))?;
        Ok(buffer.get(0))
    }

    /// Of an HVM domain's context the assists are what stays; registers are set by the HVM context after. The vCPU stays down.
    pub(crate) fn put_vm_assist(&self, dom: DomId, bits: u64) -> Result<()> {
        let mut buffer = self.privcmd.buffer(size_of::<domctl::VcpuGuestContext>())?;
        buffer.put(0, &domctl::VcpuGuestContext { vm_assist: bits, ..Default::default() });
        let mut op = domctl::VcpuContext { vcpu: 0, _pad: 0, ctxt: buffer.addr() };
        self.domctl("XEN_DOMCTL_setvcpucontext", domctl::SETVCPUCONTEXT, dom, &mut op)
            .map_err(|e| e.with_detail(format!("vm_assist {bits:#x}")))
    }

    pub(crate) fn get_context(&self, dom: DomId) -> Result<Vec<u8>> {
        const NAME: &str = "XEN_DOMCTL_gethvmcontext";
        let mut op = domctl::HvmContext::default();
        self.domctl(NAME, domctl::GETHVMCONTEXT, dom, &mut op)?;
        if op.size > MAX_CONTEXT {
            return Err(HypervisorError::malformed(NAME, dom, format!("a context of {} bytes", op.size)));
        }
        let size = op.size;
        let mut buffer = self.privcmd.buffer(size as usize)?;
        let mut op = domctl::HvmContext { size, _pad: 0, buffer: buffer.addr() };
        self.domctl(NAME, domctl::GETHVMCONTEXT, dom, &mut op)?;
        if op.size > size {
            return Err(HypervisorError::malformed(NAME, dom, format!("{} bytes, with room for {size}", op.size)));
        }
        Ok(buffer.bytes()[..op.size as usize].to_vec())
    }

    pub(crate) fn put_context(&self, dom: DomId, records: &[u8]) -> Result<()> {
        const NAME: &str = "XEN_DOMCTL_sethvmcontext";
        if records.len() > MAX_CONTEXT as usize {
            return Err(HypervisorError::malformed(NAME, dom, format!("a context of {} bytes", records.len())));
        }
        let mut buffer = self.privcmd.buffer(records.len())?;
        buffer.put(0, records);
        let mut op = domctl::HvmContext { size: records.len() as u32, _pad: 0, buffer: buffer.addr() };
        self.domctl(NAME, domctl::SETHVMCONTEXT, dom, &mut op)
    }
}
