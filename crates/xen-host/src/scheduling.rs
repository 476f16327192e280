//! CPU pools, affinities, and the parameters of the schedulers credit and credit2.

use crate::{Buffer, Lent, XenHost};
use hypervisor::*;
use std::collections::BTreeSet;
use xen_abi::{domctl, sysctl};

/// More CPUs than any host of Xen's has.
const MAX_CPUS: u32 = 1 << 16;

impl XenHost {
    /// Bits in a mask of this host's CPUs.
    fn cpu_bits(&self) -> Result<u32> {
        let mut phys = sysctl::PhysInfo::default();
        self.sysctl("XEN_SYSCTL_physinfo", sysctl::PHYSINFO, &mut phys)?;
        Ok(phys.max_cpu_id.saturating_add(1).min(MAX_CPUS))
    }

    fn cpu_mask(&self, bits: u32) -> Result<Lent<'_>> {
        self.privcmd.buffer(bits.div_ceil(8) as usize)
    }

    pub(crate) fn pool(&self, id: u32) -> Result<CpuPool> {
        const NAME: &str = "XEN_SYSCTL_CPUPOOL_OP_INFO";
        let bits = self.cpu_bits()?;
        let mut mask = self.cpu_mask(bits)?;
        let cpumap = domctl::Bitmap { bitmap: mask.addr(), nr_bits: bits, _pad: 0 };
        let mut op = sysctl::CpupoolOp { op: sysctl::CPUPOOL_OP_INFO, cpupool_id: id, cpumap, ..Default::default() };
        self.sysctl(NAME, sysctl::CPUPOOL_OP, &mut op).map_err(|e| e.with_detail(format!("pool {id}")))?;
        // Xen answers for the next higher pool if there is none of that number.
        if op.cpupool_id != id {
            return Err(HypervisorError::errno(NAME, None, Errno::ENOENT).with_detail(format!("pool {id}")));
        }
        Ok(CpuPool { id, scheduler: op.sched_id, cpus: read(&mask, bits) })
    }

    pub(crate) fn share_of(&self, dom: DomId, scheduler: u32) -> Result<Share> {
        let mut op = domctl::SchedulerOp { sched_id: scheduler, cmd: domctl::SCHEDOP_GETINFO, ..Default::default() };
        self.domctl("XEN_DOMCTL_SCHEDOP_getinfo", domctl::SCHEDULER_OP, dom, &mut op)?;
        Ok(Share { scheduler, weight: op.weight, cap: op.cap })
    }

    pub(crate) fn put_share(&self, dom: DomId, share: &Share) -> Result<()> {
        let mut op = domctl::SchedulerOp {
            sched_id: share.scheduler,
            cmd: domctl::SCHEDOP_PUTINFO,
            weight: share.weight,
            cap: share.cap,
            ..Default::default()
        };
        self.domctl("XEN_DOMCTL_SCHEDOP_putinfo", domctl::SCHEDULER_OP, dom, &mut op)
            .map_err(|e| e.with_detail(format!("weight {}, cap {}", share.weight, share.cap)))
    }

    pub(crate) fn affinity_of(&self, dom: DomId, vcpu: u32) -> Result<Affinity> {
        let bits = self.cpu_bits()?;
        let (mut hard, mut soft) = (self.cpu_mask(bits)?, self.cpu_mask(bits)?);
        self.affinity_op("XEN_DOMCTL_getvcpuaffinity", domctl::GETVCPUAFFINITY, dom, vcpu, bits, &mut hard, &mut soft)?;
        let some = |mask: &Buffer| Some(read(mask, bits)).filter(|cpus| (cpus.len() as u64) < u64::from(bits));
        Ok(Affinity { hard: some(&hard), soft: some(&soft) })
    }

    pub(crate) fn put_affinity(&self, dom: DomId, vcpu: u32, affinity: &Affinity) -> Result<()> {
        let bits = self.cpu_bits()?;
        let write = |cpus: &Option<BTreeSet<u32>>| -> Result<Lent<'_>> {
            let mut mask = self.cpu_mask(bits)?;
            // A spare buffer has old contents.
            mask.bytes_mut().fill(0);
            for cpu in (0..bits).filter(|cpu| cpus.as_ref().is_none_or(|cpus| cpus.contains(cpu))) {
                mask.bytes_mut()[cpu as usize / 8] |= 1 << (cpu % 8);
            }
            Ok(mask)
        };
        let (mut hard, mut soft) = (write(&affinity.hard)?, write(&affinity.soft)?);
        self.affinity_op("XEN_DOMCTL_setvcpuaffinity", domctl::SETVCPUAFFINITY, dom, vcpu, bits, &mut hard, &mut soft)
    }

    #[allow(clippy::too_many_arguments, reason = "one operation with its two masks, called twice")]
    fn affinity_op(
        &self,
        name: &'static str,
        cmd: u32,
        dom: DomId,
        vcpu: u32,
        bits: u32,
        hard: &mut Buffer,
        soft: &mut Buffer,
    ) -> Result<()> {
        let map = |mask: &mut Buffer| domctl::Bitmap { bitmap: mask.addr(), nr_bits: bits, _pad: 0 };
        let mut op = domctl::VcpuAffinity {
            vcpu,
            flags: domctl::VCPUAFFINITY_HARD | domctl::VCPUAFFINITY_SOFT,
            cpumap_hard: map(hard),
            cpumap_soft: map(soft),
        };
        self.domctl(name, cmd, dom, &mut op).map_err(|e| e.with_detail(format!("vCPU {vcpu}")))
    }
}

/// The CPUs of a mask.
fn read(mask: &Buffer, bits: u32) -> BTreeSet<u32> {
    (0..bits).filter(|cpu| mask.bytes().get(*cpu as usize / 8).is_some_and(|byte| byte >> (cpu % 8) & 1 == 1)).collect()
}
