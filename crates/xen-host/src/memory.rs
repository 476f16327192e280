//! Memory, log-dirty, event-channel status and the grant table of another domain.

use crate::XenHost;
use hypervisor::*;
use xen_abi::{dm_op, domctl, event, grant, hypercall, memory};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// gfns in one hypercall: what XEN_DOMCTL_getpageframeinfo3 takes at most, and a sensible size for the others.
const BATCH: usize = 1024;
/// Frames of a resource that Xen hands out in one step.
const RESOURCE_BATCH: u32 = 32;

/// Where the operation and the extents of XEN_DMOP_modified_memory lie in its page, and how many extents have room.
const MARK_OPERATION: usize = 64;
const MARK_EXTENTS: usize = 128;
pub(crate) const MARK_BATCH: usize = (PAGE_SIZE - MARK_EXTENTS) / size_of::<dm_op::ModifiedExtent>();

impl XenHost {
    fn memory_op<P: FromBytes + IntoBytes + Immutable>(
        &self,
        name: &'static str,
        cmd: u64,
        dom: DomId,
        arg: &mut P,
    ) -> Result<i64> {
        self.op(hypercall::MEMORY_OP, cmd, arg)?.map_err(|e| HypervisorError::errno(name, dom, e))
    }

    pub(crate) fn claim(&self, dom: DomId, pages: u64) -> Result<()> {
        let mut op = memory::MemoryReservation { nr_extents: pages, domid: dom.0, ..Default::default() };
        self.memory_op("XENMEM_claim_pages", memory::CLAIM_PAGES, dom, &mut op)
            .map_err(|e| e.with_detail(format!("{pages} pages")))
            .map(drop)
    }

    pub(crate) fn highest_gfn(&self, dom: DomId) -> Result<Gfn> {
        let mut op = memory::MemoryDomain { domid: dom.0 };
        let gfn = self.memory_op("XENMEM_maximum_gpfn", memory::MAXIMUM_GPFN, dom, &mut op)?;
        Ok(Gfn(gfn as u64))
    }

    pub(crate) fn vnuma_of(&self, dom: DomId) -> Result<bool> {
        // Without room for an answer: only whether there would be one.
        let mut op = memory::VnumaTopologyInfo { domid: dom.0, ..Default::default() };
        match self.op(hypercall::MEMORY_OP, memory::GET_VNUMAINFO, &mut op)? {
            Ok(_) | Err(Errno::ENOBUFS) => Ok(true),
            Err(Errno::EOPNOTSUPP) => Ok(false),
            Err(e) => Err(HypervisorError::errno("XENMEM_get_vnumainfo", dom, e)),
        }
    }

    pub(crate) fn pod_of(&self, dom: DomId) -> Result<PopulateOnDemand> {
        let mut op = memory::PodTarget { domid: dom.0, ..Default::default() };
        self.memory_op("XENMEM_get_pod_target", memory::GET_POD_TARGET, dom, &mut op)?;
        Ok(PopulateOnDemand { entries: op.pod_entries, cache_pages: op.pod_cache_pages })
    }

    pub(crate) fn types_of(&self, dom: DomId, gfns: &[Gfn]) -> Result<Vec<PageType>> {
        let mut types = Vec::with_capacity(gfns.len());
        for part in gfns.chunks(BATCH) {
            let mut buffer = self.privcmd.buffer(part.len() * 8)?;
            put_gfns(&mut buffer, part);
            let mut op = domctl::GetPageFrameInfo3 { num: part.len() as u64, array: buffer.addr() };
            self.domctl("XEN_DOMCTL_getpageframeinfo3", domctl::GETPAGEFRAMEINFO3, dom, &mut op)?;
            types.extend(crate::host::structures::<u64>(buffer.bytes(), part.len() as u32).map(|t| {
                match t as u32 & domctl::PFINFO_LTAB_MASK {
                    domctl::PFINFO_XTAB => PageType::NotRam,
                    domctl::PFINFO_BROKEN => PageType::Broken,
                    _ => PageType::Ram,
                }
            }));
        }
        Ok(types)
    }

    pub(crate) fn populate_extents(&self, dom: DomId, gfns: &[Gfn], order: u32) -> Result<()> {
        const NAME: &str = "XENMEM_populate_physmap";
        let mut done = 0;
        for part in gfns.chunks(BATCH) {
            let mut buffer = self.privcmd.buffer(part.len() * 8)?;
            put_gfns(&mut buffer, part);
            let mut op = memory::MemoryReservation {
                extent_start: buffer.addr(),
                nr_extents: part.len() as u64,
                extent_order: order,
                domid: dom.0,
                ..Default::default()
            };
            let n = self
                .memory_op(NAME, memory::POPULATE_PHYSMAP, dom, &mut op)
                .map_err(|e| e.with_detail(format!("from {:?}", part[0])))? as usize;
            done += n;
            if n < part.len() {
                let detail = format!(
                    "{done} of {} extents of {} KiB done; {:?} has no memory left on the host or in the domain's limit",
                    gfns.len(),
                    4u64 << order,
                    part[n]
                );
                return Err(HypervisorError::errno(NAME, dom, Errno::ENOMEM).with_detail(detail));
            }
        }
        Ok(())
    }

    pub(crate) fn remove_pages(&self, dom: DomId, gfns: &[Gfn]) -> Result<()> {
        for part in gfns.chunks(BATCH) {
            // Memory is freed by giving it back; what is not memory (Xen's own pages) is only unmapped.
            for (gfn, kind) in part.iter().zip(self.types_of(dom, part)?) {
                if kind == PageType::Ram {
                    let mut buffer = self.privcmd.buffer(8)?;
                    put_gfns(&mut buffer, std::slice::from_ref(gfn));
                    let mut op = memory::MemoryReservation {
                        extent_start: buffer.addr(),
                        nr_extents: 1,
                        domid: dom.0,
                        ..Default::default()
                    };
                    const NAME: &str = "XENMEM_decrease_reservation";
                    let n = self.memory_op(NAME, memory::DECREASE_RESERVATION, dom, &mut op)?;
                    if n != 1 {
                        return Err(HypervisorError::errno(NAME, dom, Errno::EBUSY).with_detail(format!("{gfn:?}")));
                    }
                } else {
                    let mut op = memory::RemoveFromPhysmap { domid: dom.0, gpfn: gfn.0, ..Default::default() };
                    self.memory_op("XENMEM_remove_from_physmap", memory::REMOVE_FROM_PHYSMAP, dom, &mut op)
                        .map_err(|e| e.with_detail(format!("{gfn:?}")))?;
                }
            }
        }
        Ok(())
    }

    pub(crate) fn copy_out(
        &self,
        dom: DomId,
        gfns: &[Gfn],
        buf: &mut [u8],
    ) -> Result<Vec<std::result::Result<(), Errno>>> {
        check_length("read pages", dom, gfns.len(), buf.len())?;
        let mut all = Vec::with_capacity(gfns.len());
        for (gfns, buf) in gfns.chunks(BATCH).zip(buf.chunks_mut(BATCH * PAGE_SIZE)) {
            let (pages, results) = self.privcmd.map_frames(dom, gfns, Access::Read)?;
            for ((i, page), result) in buf.chunks_exact_mut(PAGE_SIZE).enumerate().zip(&results) {
                match result {
                    Ok(()) => pages.read(i * PAGE_SIZE, page),
                    Err(_) => page.fill(0),
                }
            }
            all.extend(results);
        }
        Ok(all)
    }

    pub(crate) fn copy_in(&self, dom: DomId, gfns: &[Gfn], data: &[u8]) -> Result<Vec<std::result::Result<(), Errno>>> {
        check_length("write pages", dom, gfns.len(), data.len())?;
        let mut all = Vec::with_capacity(gfns.len());
        for (gfns, data) in gfns.chunks(BATCH).zip(data.chunks(BATCH * PAGE_SIZE)) {
            let (pages, results) = self.privcmd.map_frames(dom, gfns, Access::ReadWrite)?;
            for ((i, page), result) in data.chunks_exact(PAGE_SIZE).enumerate().zip(&results) {
                if result.is_ok() {
                    pages.write(i * PAGE_SIZE, page);
                }
            }
            all.extend(results);
        }
        Ok(all)
    }

    pub(crate) fn add_to_physmap(&self, dom: DomId, page: XenPage, gfn: Gfn) -> Result<()> {
        let (space, idx) = match page {
            XenPage::SharedInfo => (memory::MAPSPACE_SHARED_INFO, 0),
            XenPage::GrantFrame(n) => (memory::MAPSPACE_GRANT_TABLE, n.into()),
            XenPage::GrantStatusFrame(n) => {
                (memory::MAPSPACE_GRANT_TABLE, u64::from(n) | memory::MAPIDX_GRANT_TABLE_STATUS)
            }
        };
        let mut op = memory::AddToPhysmap { domid: dom.0, space, idx, gpfn: gfn.0, ..Default::default() };
        self.memory_op("XENMEM_add_to_physmap", memory::ADD_TO_PHYSMAP, dom, &mut op)
            .map_err(|e| e.with_detail(format!("{page:?} at {gfn:?}")))
            .map(drop)
    }

    pub(crate) fn put_memory_map(&self, dom: DomId, map: &[MemoryRange]) -> Result<()> {
        let entries: Vec<_> = map.iter().map(|r| memory::E820Entry::new(r.start, r.size, r.kind)).collect();
        let mut buffer = self.privcmd.buffer(entries.as_bytes().len())?;
        buffer.put(0, entries.as_slice());
        let mut op = memory::ForeignMemoryMap {
            domid: dom.0,
            _pad: [0; 3],
            map: memory::MemoryMap { nr_entries: map.len() as u32, _pad: 0, buffer: buffer.addr() },
        };
        self.memory_op("XENMEM_set_memory_map", memory::SET_MEMORY_MAP, dom, &mut op)
            .map_err(|e| e.with_detail(format!("{} ranges", map.len())))
            .map(drop)
    }

    /// The log-dirty operations, all of them sub-commands of XEN_DOMCTL_shadow_op.
    pub(crate) fn shadow_op(
        &self,
        dom: DomId,
        op: u32,
        mode: u32,
        bitmap: Option<&mut DirtyBitmap>,
    ) -> Result<DirtyStats> {
        let name = match op {
            domctl::SHADOW_OP_OFF => "XEN_DOMCTL_SHADOW_OP_OFF",
            domctl::SHADOW_OP_CLEAN => "XEN_DOMCTL_SHADOW_OP_CLEAN",
            domctl::SHADOW_OP_PEEK => "XEN_DOMCTL_SHADOW_OP_PEEK",
            _ => "XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY",
        };
        let mut shadow = domctl::ShadowOp { op, mode, ..Default::default() };
        let Some(bitmap) = bitmap else {
            self.domctl(name, domctl::SHADOW_OP, dom, &mut shadow)?;
            return Ok(DirtyStats::default());
        };
        let bytes = bitmap.words_mut().len() * 8;
        let mut buffer = self.privcmd.buffer(bytes)?;
        // A spare buffer has old contents, and Xen writes only as far as the guest's memory goes.
        buffer.bytes_mut()[..bytes].fill(0);
        shadow.dirty_bitmap = buffer.addr();
        shadow.pages = bitmap.pages();
        self.domctl(name, domctl::SHADOW_OP, dom, &mut shadow)?;
        bitmap.words_mut().as_mut_bytes().copy_from_slice(&buffer.bytes()[..bytes]);
        bitmap.trim();
        Ok(DirtyStats {
            pages: shadow.pages,
            fault_count: shadow.stats.fault_count,
            dirty_count: shadow.stats.dirty_count,
        })
    }

    /// XEN_DMOP_modified_memory, for at most [`MARK_BATCH`] pages.
    pub(crate) fn modified_memory(&self, dom: DomId, gfns: &[Gfn]) -> Result<()> {
        const NAME: &str = "XEN_DMOP_modified_memory";
        // One page holds all: the two descriptors, the operation, the extents.
        let mut buffer = self.privcmd.buffer(PAGE_SIZE)?;
        let operation = 8 + size_of::<dm_op::ModifiedMemory>();
        let addr = buffer.addr();
        buffer.put(0, &dm_op::Buf { h: addr + MARK_OPERATION as u64, size: operation as u64 });
        let extents = gfns.len() * size_of::<dm_op::ModifiedExtent>();
        buffer.put(size_of::<dm_op::Buf>(), &dm_op::Buf { h: addr + MARK_EXTENTS as u64, size: extents as u64 });
        buffer.put(MARK_OPERATION, &dm_op::MODIFIED_MEMORY);
        buffer.put(MARK_OPERATION + 4, &0u32);
        buffer.put(MARK_OPERATION + 8, &dm_op::ModifiedMemory { nr_extents: gfns.len() as u32, opaque: 0 });
        for (n, gfn) in gfns.iter().enumerate() {
            let extent = dm_op::ModifiedExtent { nr: 1, first_pfn: gfn.0, ..Default::default() };
            buffer.put(MARK_EXTENTS + n * size_of::<dm_op::ModifiedExtent>(), &extent);
        }
        // SAFETY: both descriptors point into `buffer`, held mutably, and cover no more than was put there.
        let r = unsafe { self.privcmd.hypercall(hypercall::DM_OP, [dom.0.into(), 2, addr, 0, 0]) };
        r.map(drop).map_err(|e| HypervisorError::errno(NAME, dom, e))
    }

    // ---- event channels ----

    fn event_op<P: FromBytes + IntoBytes + Immutable>(
        &self,
        cmd: u64,
        arg: &mut P,
    ) -> Result<std::result::Result<i64, Errno>> {
        self.op(hypercall::EVENT_CHANNEL_OP, cmd, arg)
    }

    pub(crate) fn status_of(&self, dom: DomId, port: Port) -> Result<Option<PortStatus>> {
        const NAME: &str = "EVTCHNOP_status";
        let mut op = event::Status { dom: dom.0, port, ..Default::default() };
        let error = |e| HypervisorError::errno(NAME, dom, e).with_detail(format!("port {port}"));
        match self.event_op(event::STATUS, &mut op)? {
            Ok(_) => {}
            Err(Errno::EINVAL) => return Ok(None),
            // Xen up to 4.18 does not describe the ports that it consumes itself.
            Err(Errno::EACCES) if !self.interface.status_of_xen_ports => {
                return Ok(Some(PortStatus { state: PortState::Xen, vcpu: 0 }));
            }
            Err(e) => return Err(error(e)),
        }
        let remote = DomId(op.u.dom);
        let state = match op.status {
            event::STAT_CLOSED => PortState::Closed,
            event::STAT_UNBOUND => PortState::Unbound { remote },
            event::STAT_INTERDOMAIN => PortState::Interdomain { remote, remote_port: op.u.port },
            event::STAT_PIRQ => PortState::Pirq(op.u.number()),
            event::STAT_VIRQ => PortState::Virq(op.u.number()),
            event::STAT_IPI => PortState::Ipi,
            other => {
                let text = format!("port {port} has the unknown state {other}");
                return Err(HypervisorError::malformed(NAME, dom, text));
            }
        };
        Ok(Some(PortStatus { state, vcpu: op.vcpu }))
    }

    pub(crate) fn alloc_unbound(&self, dom: DomId, remote: DomId) -> Result<Port> {
        let mut op = event::AllocUnbound { dom: dom.0, remote_dom: remote.0, port: 0 };
        self.event_op(event::ALLOC_UNBOUND, &mut op)?
            .map_err(|e| HypervisorError::errno("EVTCHNOP_alloc_unbound", dom, e))?;
        Ok(op.port)
    }

    pub(crate) fn raise(&self, dom: DomId, port: Port) -> Result<()> {
        let detail = || format!("port {port}");
        // The control domain's ports belong to the domain, not to the process that bound them, so the send works for a port of its kernel too.
        let local = match self.status_of(dom, port)? {
            Some(PortStatus { state: PortState::Interdomain { remote: DomId::DOM0, remote_port }, .. }) => remote_port,
            _ => return Err(HypervisorError::errno("raise event channel", dom, Errno::ENOENT).with_detail(detail())),
        };
        self.event_op(event::SEND, &mut event::Send { port: local })?
            .map_err(|e| HypervisorError::errno("EVTCHNOP_send", dom, e).with_detail(detail()))
            .map(drop)
    }

    // ---- grant table ----

    /// A grant-table operation on one structure, whose status `status` reads.
    fn grant_op<P: FromBytes + IntoBytes + Immutable>(
        &self,
        name: &'static str,
        cmd: u64,
        dom: DomId,
        arg: &mut P,
        status: impl FnOnce(&P) -> i16,
    ) -> Result<()> {
        self.op(hypercall::GRANT_TABLE_OP, cmd, arg)?.map_err(|e| HypervisorError::errno(name, dom, e))?;
        match status(arg) {
            grant::GNTST_OKAY => Ok(()),
            grant::GNTST_BAD_DOMAIN => Err(HypervisorError::errno(name, dom, Errno::ESRCH)),
            grant::GNTST_PERMISSION_DENIED => Err(HypervisorError::errno(name, dom, Errno::EPERM)),
            other => Err(HypervisorError::malformed(name, dom, format!("grant status {other}"))),
        }
    }

    pub(crate) fn table_size(&self, dom: DomId) -> Result<GrantTableSize> {
        let mut op = grant::QuerySize { dom: dom.0, ..Default::default() };
        self.grant_op("GNTTABOP_query_size", grant::QUERY_SIZE, dom, &mut op, |o| o.status)?;
        Ok(GrantTableSize { frames: op.nr_frames, max_frames: op.max_nr_frames })
    }

    pub(crate) fn table_version(&self, dom: DomId) -> Result<u32> {
        let mut op = grant::GetVersion { dom: dom.0, ..Default::default() };
        self.grant_op("GNTTABOP_get_version", grant::GET_VERSION, dom, &mut op, |_| grant::GNTST_OKAY)?;
        Ok(op.version)
    }

    pub(crate) fn table_gfns(&self, dom: DomId) -> Result<Vec<Option<Gfn>>> {
        let count = self.table_size(dom)?.frames;
        let mut buffer = self.privcmd.buffer(count as usize * 8)?;
        let mut op =
            grant::SetupTable { dom: dom.0, nr_frames: count, frame_list: buffer.addr(), ..Default::default() };
        self.grant_op("GNTTABOP_setup_table", grant::SETUP_TABLE, dom, &mut op, |o| o.status)?;
        Ok(crate::host::structures::<u64>(buffer.bytes(), count).map(crate::host::placed).collect())
    }

    fn table_part(&self, dom: DomId, array: GrantArray, first: u32, count: u32) -> Result<crate::Pages> {
        let id = match array {
            GrantArray::Shared => memory::RESOURCE_GRANT_TABLE_SHARED,
            GrantArray::Status => memory::RESOURCE_GRANT_TABLE_STATUS,
        };
        self.privcmd
            .map_resource(dom, memory::RESOURCE_GRANT_TABLE, id, first, count)
            .map_err(|e| e.with_detail(format!("grant table, {array:?} frames {first}..{}", first + count)))
    }

    pub(crate) fn read_table(&self, dom: DomId, array: GrantArray, first: u32, count: u32) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut done = 0;
        while done < count {
            let n = RESOURCE_BATCH.min(count - done);
            let pages = self.table_part(dom, array, first.saturating_add(done), n)?;
            let start = bytes.len();
            bytes.resize(start + pages.len(), 0);
            pages.read(0, &mut bytes[start..]);
            done += n;
        }
        Ok(bytes)
    }

    pub(crate) fn write_table(&self, dom: DomId, array: GrantArray, first: u32, data: &[u8]) -> Result<()> {
        if !data.len().is_multiple_of(PAGE_SIZE) {
            let text = format!("{} bytes are no whole frames", data.len());
            return Err(HypervisorError::malformed("XENMEM_acquire_resource", dom, text));
        }
        for (i, part) in data.chunks(RESOURCE_BATCH as usize * PAGE_SIZE).enumerate() {
            let first = first.saturating_add(i as u32 * RESOURCE_BATCH);
            self.table_part(dom, array, first, (part.len() / PAGE_SIZE) as u32)?.write(0, part);
        }
        Ok(())
    }
}

fn put_gfns(buffer: &mut crate::Buffer, gfns: &[Gfn]) {
    for (i, gfn) in gfns.iter().enumerate() {
        buffer.put(i * 8, &gfn.0);
    }
}

fn check_length(op: &'static str, dom: DomId, pages: usize, bytes: usize) -> Result<()> {
    if pages.checked_mul(PAGE_SIZE) == Some(bytes) {
        return Ok(());
    }
    Err(HypervisorError::malformed(op, dom, format!("{bytes} bytes for {pages} pages")))
}
