//! What a guest-transparent migration asks of a hypervisor: one trait, the state that it moves, one error type.
//!
//! [`Hypervisor`] is implemented over a real Xen by `xen-host` and in one process by `xen-sim`. It is object-safe and every
//! operation takes `&self`: the hypervisor is shared, and keeps its own order. Operations are as small as the
//! migration's steps; none of them retries or decides.

mod error;
mod gt;
pub mod inspect;
mod types;

pub use error::{Cause, Errno, HypervisorError, Result};
pub use gt::*;
pub use types::*;

use std::os::fd::BorrowedFd;
use std::time::Duration;

/// A running hypervisor, seen from its control domain.
pub trait Hypervisor: Send + Sync {
    // ---- the host ----

    fn host_info(&self) -> Result<HostInfo>;

    /// The hypervisor's `NOW()`, what it tells a guest without clock offset.
    fn now(&self) -> Result<SystemTimeNs>;

    fn host_cpu_policy(&self, which: HostPolicy) -> Result<CpuPolicy>;

    // ---- domains ----

    /// Every domain, ascending.
    fn domains(&self) -> Result<Vec<DomainInfo>>;

    /// `ESRCH` ([`HypervisorError::is_no_such_domain`]) if there is no such domain.
    fn domain_info(&self, dom: DomId) -> Result<DomainInfo>;

    /// Creates a domain under exactly this id, paused (its creation holds one pause count), without vCPUs or memory.
    /// `EEXIST` if the id is taken.
    fn create_domain(&self, dom: DomId, config: &DomainConfig) -> Result<()>;

    /// Allocates the vCPUs; `count` must be the `max_vcpus` it was created with.
    fn set_max_vcpus(&self, dom: DomId, count: u32) -> Result<()>;

    /// Limit of memory, KiB.
    fn set_max_mem(&self, dom: DomId, kib: u64) -> Result<()>;

    /// Size of the pool for p2m or shadow tables, bytes.
    fn paging_pool_size(&self, dom: DomId) -> Result<u64>;
    fn set_paging_pool_size(&self, dom: DomId, bytes: u64) -> Result<()>;

    /// Adds one to the control domain's pause count, and returns when no vCPU runs.
    fn pause(&self, dom: DomId) -> Result<()>;

    /// Takes one from the control domain's pause count.
    fn unpause(&self, dom: DomId) -> Result<()>;

    /// Destroys the domain and waits until Xen has taken it down (the operation is restarted as Xen asks). A domain whose
    /// pages are still mapped elsewhere stays as a dying domain.
    fn destroy(&self, dom: DomId) -> Result<()>;

    /// Reserves host memory for a domain that is about to be populated; 0 gives the rest back.
    fn claim_pages(&self, dom: DomId, pages: u64) -> Result<()>;

    fn cpu_policy(&self, dom: DomId) -> Result<CpuPolicy>;

    /// Before the first vCPU has run. The error's detail names the leaf or MSR that Xen objects to.
    fn set_cpu_policy(&self, dom: DomId, policy: &CpuPolicy) -> Result<()>;

    fn tsc_info(&self, dom: DomId) -> Result<TscInfo>;

    /// Sets what [`Hypervisor::tsc_info`] shall give afterwards, `incarnation` included.
    fn set_tsc_info(&self, dom: DomId, info: &TscInfo) -> Result<()>;

    /// `VMASST_TYPE_*` bits.
    fn vm_assist(&self, dom: DomId) -> Result<u64>;

    /// Before the HVM context is set, while the vCPU is not online.
    fn set_vm_assist(&self, dom: DomId, bits: u64) -> Result<()>;

    fn vcpu_info(&self, dom: DomId, vcpu: u32) -> Result<VcpuInfo>;

    // ---- scheduling ----

    /// `ENOENT` (as error number) if there is no pool of this number.
    fn cpu_pool(&self, id: u32) -> Result<CpuPool>;

    /// `scheduler` is that of the domain's pool, credit or credit2.
    fn share(&self, dom: DomId, scheduler: u32) -> Result<Share>;

    /// Likewise; `EINVAL` if its pool has another scheduler.
    fn set_share(&self, dom: DomId, share: &Share) -> Result<()>;

    fn affinity(&self, dom: DomId, vcpu: u32) -> Result<Affinity>;

    /// `EINVAL` if none of the hard affinity's CPUs is in the domain's pool.
    fn set_affinity(&self, dom: DomId, vcpu: u32, affinity: &Affinity) -> Result<()>;

    // ---- memory ----

    /// The guest was given a NUMA topology of its own.
    fn has_vnuma(&self, dom: DomId) -> Result<bool>;

    /// The highest gfn the guest has anything at.
    fn max_gfn(&self, dom: DomId) -> Result<Gfn>;

    /// What of the guest's memory has no pages yet. Once none is left, none can come.
    fn populate_on_demand(&self, dom: DomId) -> Result<PopulateOnDemand>;

    /// What is behind each gfn, in order. To ask about a gfn that is populated on demand populates it.
    fn page_types(&self, dom: DomId, gfns: &[Gfn]) -> Result<Vec<PageType>>;

    /// Every gfn with ordinary memory, ascending: what a first round copies. Guests have large holes, and asking about a hole costs as
    /// much as about memory, so this looks from both ends and stops when it has found as many pages as the domain has.
    fn ram_gfns(&self, dom: DomId) -> Result<Vec<Gfn>> {
        const BATCH: u64 = 1024;
        let total = self.domain_info(dom)?.total_pages;
        let (mut low, mut high) = (0, self.max_gfn(dom)?.0.saturating_add(1));
        let mut found = Vec::new();
        let mut from_top = Vec::new();
        while low < high && ((found.len() + from_top.len()) as u64) < total {
            let up: Vec<_> = (low..high.min(low + BATCH)).map(Gfn).collect();
            low += up.len() as u64;
            let down: Vec<_> = (low.max(high.saturating_sub(BATCH))..high).rev().map(Gfn).collect();
            high -= down.len() as u64;
            for (gfns, list) in [(up, &mut found), (down, &mut from_top)] {
                let types = self.page_types(dom, &gfns)?;
                list.extend(gfns.iter().zip(types).filter(|(_, t)| *t == PageType::Ram).map(|(g, _)| *g));
            }
        }
        from_top.reverse();
        found.append(&mut from_top);
        Ok(found)
    }

    /// Gives the guest memory at each of these gfns, extents of 2^`order` pages. All or an error that says how many were done.
    fn populate(&self, dom: DomId, gfns: &[Gfn], order: u32) -> Result<()>;

    /// Takes away whatever is at each of these gfns.
    fn depopulate(&self, dom: DomId, gfns: &[Gfn]) -> Result<()>;

    /// Copies whole pages out: `buf` has [`PAGE_SIZE`] bytes for each gfn. The answer has one entry for each gfn; where it is an error
    /// that page's bytes in `buf` are zero.
    fn read_pages(&self, dom: DomId, gfns: &[Gfn], buf: &mut [u8]) -> Result<Vec<std::result::Result<(), Errno>>>;

    /// Copies whole pages in, likewise.
    fn write_pages(&self, dom: DomId, gfns: &[Gfn], data: &[u8]) -> Result<Vec<std::result::Result<(), Errno>>>;

    /// Maps pages of a guest until the mapping is dropped. Fails if any of them cannot be mapped. The domain cannot go away
    /// entirely before.
    fn map_pages(&self, dom: DomId, gfns: &[Gfn], access: Access) -> Result<Box<dyn Mapping>>;

    /// Places one of Xen's own pages at a gfn (`XENMEM_add_to_physmap`). Memory that was there is lost. For a
    /// grant frame the table grows as needed.
    fn place_xen_page(&self, dom: DomId, page: XenPage, gfn: Gfn) -> Result<()>;

    /// `XENMEM_set_memory_map`. There is no reader for another domain's.
    fn set_memory_map(&self, dom: DomId, map: &[MemoryRange]) -> Result<()>;

    // ---- log-dirty ----

    /// Starts marking pages as the guest writes to them; all are clean then. A second call answers `EINVAL`.
    fn log_dirty_enable(&self, dom: DomId) -> Result<()>;

    /// Fills `bitmap` with the pages written since the last call, and marks all clean. `last`: include also pages that the hypervisor
    /// itself holds mapped for writing; ask so with the domain paused.
    fn log_dirty_clean(&self, dom: DomId, bitmap: &mut DirtyBitmap, last: bool) -> Result<DirtyStats>;

    /// The same without marking anything clean.
    fn log_dirty_peek(&self, dom: DomId, bitmap: &mut DirtyBitmap) -> Result<DirtyStats>;

    /// Marks pages as the guest's writes do. **No error** if the marking is off: then nothing is marked, and as little is it an error
    /// to look at the bitmap, which is all clean then. Pages that are no memory are passed over; the last gfn of the domain is refused.
    fn log_dirty_mark(&self, dom: DomId, gfns: &[Gfn]) -> Result<()>;

    fn log_dirty_disable(&self, dom: DomId) -> Result<()>;

    // ---- vCPU and platform state ----

    /// All HVM save records, from the header to the end record (`xen_abi::hvm_save`). The domain is best paused.
    fn hvm_context(&self, dom: DomId) -> Result<Vec<u8>>;

    fn set_hvm_context(&self, dom: DomId, records: &[u8]) -> Result<()>;

    /// `HVM_PARAM_*` (`xen_abi::hvm_params`). `EINVAL` for one that does not exist or may not be read.
    fn hvm_param(&self, dom: DomId, index: u32) -> Result<u64>;
    fn set_hvm_param(&self, dom: DomId, index: u32, value: u64) -> Result<()>;

    // ---- event channels ----

    /// `None` for a port number past the last that can exist in the domain now.
    fn port_status(&self, dom: DomId, port: Port) -> Result<Option<PortStatus>>;

    /// Every port that is not closed, ascending.
    fn ports(&self, dom: DomId) -> Result<Vec<(Port, PortStatus)>> {
        let mut ports = Vec::new();
        let mut port = 1;
        while let Some(status) = self.port_status(dom, port)? {
            if status.state != PortState::Closed {
                ports.push((port, status));
            }
            port += 1;
        }
        Ok(ports)
    }

    /// Allocates a port in `dom` (a number of Xen's choice) that waits for `remote`.
    fn alloc_unbound_port(&self, dom: DomId, remote: DomId) -> Result<Port>;

    /// Raises the guest's end of an interdomain channel once, whoever in the control domain holds the other end. `ENOENT` (as error number) if that
    /// port is not connected to the control domain.
    fn raise_guest_port(&self, dom: DomId, port: Port) -> Result<()>;

    /// A handle for event channels of the control domain itself; what is bound through it is closed with it.
    fn open_events(&self) -> Result<Box<dyn Events>>;

    // ---- grant table ----

    fn grant_table_size(&self, dom: DomId) -> Result<GrantTableSize>;

    fn grant_table_version(&self, dom: DomId) -> Result<u32>;

    /// Where the guest sees its grant frames (the whole table, in order); `None` for a frame that it has not placed, as early in its
    /// boot.
    fn grant_table_gfns(&self, dom: DomId) -> Result<Vec<Option<Gfn>>>;

    /// The contents of frames `first..first + count`, [`PAGE_SIZE`] bytes each.
    fn read_grant_frames(&self, dom: DomId, array: GrantArray, first: u32, count: u32) -> Result<Vec<u8>>;

    /// Writes whole frames from `first` on; the table grows as needed.
    fn write_grant_frames(&self, dom: DomId, array: GrantArray, first: u32, data: &[u8]) -> Result<()>;

    /// Maps pages that `dom` has granted to the control domain, by grant reference.
    fn map_grants(&self, dom: DomId, refs: &[u32], access: Access) -> Result<Box<dyn Mapping>>;

    // ---- guest-transparent state (through the extension) ----

    /// All of it. The domain should be paused, or parts will not fit each other. `Unsupported` if the extension is not loaded.
    fn gt_state(&self, dom: DomId) -> Result<GtState>;

    /// Puts one step's part of `state` into a paused domain. The error names the value that was refused. An error leaves nothing changed, but
    /// for [`GtStep::Ports`], [`GtStep::EmuIrqs`], and running out of memory: such a domain is not used any further.
    fn set_gt_state(&self, dom: DomId, step: GtStep, state: &GtState) -> Result<()>;
}

/// How a page is to be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    ReadWrite,
}

/// Another domain's memory, mapped. That domain may change it at any moment: take a copy, then judge the copy.
pub trait Mapping: Send {
    /// Bytes, a multiple of [`PAGE_SIZE`].
    fn len(&self) -> usize;

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies out. Panics if the range does not lie in the mapping: ranges are the caller's own arithmetic, never the guest's word.
    fn read(&self, offset: usize, buf: &mut [u8]);

    /// Copies in; panics likewise, and for a read-only mapping.
    fn write(&self, offset: usize, data: &[u8]);

    /// One aligned 32-bit word, in one access, with acquire order.
    fn load_u32(&self, offset: usize) -> u32;

    /// One aligned 32-bit word, in one access, with release order.
    fn store_u32(&self, offset: usize, value: u32);

    /// Full memory barrier between the accesses before and after it.
    fn fence(&self) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}

/// Event channels of the control domain.
pub trait Events: Send {
    /// Connects a new local port to `dom`'s unbound `port`; the remote end is raised once.
    fn bind_interdomain(&mut self, dom: DomId, port: Port) -> Result<Port>;

    /// A new local port that waits for `dom`.
    fn bind_unbound(&mut self, dom: DomId) -> Result<Port>;

    /// A local port for a global VIRQ (`VIRQ_DOM_EXC`, …).
    fn bind_virq(&mut self, virq: u32) -> Result<Port>;

    fn unbind(&mut self, port: Port) -> Result<()>;

    fn notify(&mut self, port: Port) -> Result<()>;

    /// The next local port that was raised, or `None` after `timeout` (`None`: wait without end). The port stays masked until
    /// [`Events::unmask`].
    fn next(&mut self, timeout: Option<Duration>) -> Result<Option<Port>>;

    fn unmask(&mut self, port: Port) -> Result<()>;

    /// Becomes readable when [`Events::next`] has something.
    fn as_fd(&self) -> BorrowedFd<'_>;
}
