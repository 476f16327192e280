//! The hypervisor of one simulated host.

use crate::domain::{Domain, TSC_PER_NS};
use crate::guest::Program;
use hypervisor::*;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use uuid::Uuid;
use xen_abi::domctl::SCHEDULER_CREDIT2;

/// All hosts of one test: which of them runs which guest.
#[derive(Debug, Default)]
pub struct World {
    running: Mutex<HashMap<Uuid, BTreeSet<String>>>,
    /// Guests that ran on two hosts at once.
    doubled: Mutex<Vec<Uuid>>,
}

impl World {
    fn set_running(&self, guest: Uuid, host: &str, runs: bool) {
        let mut running = lock(&self.running);
        let hosts = running.entry(guest).or_default();
        if runs {
            hosts.insert(host.into());
        } else {
            hosts.remove(host);
        }
        if hosts.len() > 1 {
            lock(&self.doubled).push(guest);
        }
    }

    /// The hosts that run the guest now.
    pub fn hosts_of(&self, guest: Uuid) -> Vec<String> {
        lock(&self.running).get(&guest).into_iter().flatten().cloned().collect()
    }

    /// Guests that have ever run on two hosts at once.
    pub fn doubled(&self) -> Vec<Uuid> {
        lock(&self.doubled).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A simulated host's hypervisor.
#[derive(Debug, Clone)]
pub struct SimXen {
    world: Arc<World>,
    name: String,
    booted: Instant,
    /// Uptime at `booted`, ns.
    uptime: u64,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    domains: BTreeMap<DomId, Domain>,
    free_pages: u64,
    /// Version of the extension's ABI, if it is loaded.
    extension: Option<u32>,
    version: XenVersion,
    pools: BTreeMap<u32, CpuPool>,
    tsc_khz: u32,
    /// Features (ECX of leaf 1) that a guest can have: as told, and as set.
    features: (u32, u32),
}

impl SimXen {
    pub fn new(world: &Arc<World>, name: &str, uptime_ns: u64) -> SimXen {
        let inner = Inner {
            domains: BTreeMap::new(),
            free_pages: 1 << 20,
            extension: Some(1),
            version: XenVersion { major: 4, minor: 17, extra: ".5".into() },
            pools: [(0, CpuPool { id: 0, scheduler: SCHEDULER_CREDIT2, cpus: [0, 1].into() })].into(),
            tsc_khz: 2_000_000,
            features: (u32::MAX, u32::MAX),
        };
        SimXen {
            world: world.clone(),
            name: name.into(),
            booted: Instant::now(),
            uptime: uptime_ns,
            inner: Arc::new(Mutex::new(inner)),
        }
    }

    /// A guest that runs.
    pub fn boot_guest(&self, dom: DomId, uuid: Uuid, program: Program) {
        let config = DomainConfig {
            uuid,
            ssidref: 0,
            flags: 3,
            iommu_opts: 0,
            max_vcpus: 2,
            max_evtchn_port: 1023,
            max_grant_frames: 32,
            max_maptrack_frames: -1,
            grant_opts: 2,
            cpupool: 0,
            emulation_flags: 1,
            misc_flags: 0,
        };
        let mut domain = Domain::new(config);
        domain.boot(dom, program, self.clock());
        lock(&self.inner).domains.insert(dom, domain);
        self.world.set_running(uuid, &self.name, true);
    }

    fn clock(&self) -> i64 {
        (self.uptime + self.booted.elapsed().as_nanos() as u64) as i64
    }

    /// Changes the host as an operator might.
    pub fn set_free_pages(&self, pages: u64) {
        lock(&self.inner).free_pages = pages;
    }

    pub fn set_extension(&self, loaded: bool) {
        lock(&self.inner).extension = loaded.then_some(1);
    }

    pub fn set_extension_abi(&self, version: u32) {
        lock(&self.inner).extension = Some(version);
    }

    pub fn set_version(&self, minor: u16, extra: &str) {
        lock(&self.inner).version = XenVersion { major: 4, minor, extra: extra.into() };
    }

    pub fn set_pool(&self, pool: CpuPool) {
        lock(&self.inner).pools.insert(pool.id, pool);
    }

    /// Puts a domain into a pool.
    pub fn move_to_pool(&self, dom: DomId, pool: u32) {
        if let Some(domain) = lock(&self.inner).domains.get_mut(&dom) {
            domain.config.cpupool = pool;
        }
    }

    /// Gives the guest a NUMA topology.
    pub fn set_vnuma(&self, dom: DomId) {
        if let Some(domain) = lock(&self.inner).domains.get_mut(&dom) {
            domain.vnuma = true;
        }
    }

    /// Makes a guest that was created or grew otherwise than the tests' guests do.
    pub fn change(&self, dom: DomId, change: impl FnOnce(&mut GtState, &mut BTreeMap<Gfn, XenPage>)) {
        if let Some(domain) = lock(&self.inner).domains.get_mut(&dom) {
            change(&mut domain.gt, &mut domain.placed);
        }
    }

    /// The rate of this host's TSC, for guests whose TSC is never emulated.
    pub fn set_tsc_khz(&self, khz: u32) {
        lock(&self.inner).tsc_khz = khz;
    }

    /// The guest's TSC is never emulated.
    pub fn make_tsc_native(&self, dom: DomId) {
        if let Some(domain) = lock(&self.inner).domains.get_mut(&dom) {
            domain.tsc.mode = 2;
        }
    }

    /// The guest will give these pages up and take them again while its memory is copied.
    pub fn balloon(&self, dom: DomId, pages: &[Gfn]) {
        if let Some(domain) = lock(&self.inner).domains.get_mut(&dom) {
            (domain.balloon, domain.reads) = (pages.to_vec(), 0);
        }
    }

    /// The guest has these pages only once somebody looks at them.
    pub fn populate_on_demand_at(&self, dom: DomId, pages: &[Gfn]) {
        if let Some(domain) = lock(&self.inner).domains.get_mut(&dom) {
            domain.pages.retain(|gfn, _| !pages.contains(gfn));
            domain.on_demand = pages.iter().copied().collect();
        }
    }

    /// Mapping this page fails from now on, though it is there.
    pub fn make_unreadable(&self, dom: DomId, gfn: Gfn) {
        if let Some(domain) = lock(&self.inner).domains.get_mut(&dom) {
            domain.unreadable = Some(gfn);
        }
    }

    /// What the host's CPU can do, and what Xen leaves of it when it makes a guest.
    pub fn set_features(&self, told: u32, set: u32) {
        lock(&self.inner).features = (told, set);
    }

    /// What the guest's program has done, and the memory that shows it; `None` if there is no such domain.
    pub fn guest_memory(&self, dom: DomId) -> Option<(u64, BTreeMap<Gfn, Vec<u8>>)> {
        let inner = lock(&self.inner);
        let domain = inner.domains.get(&dom)?;
        let memory = domain.pages.keys().filter_map(|gfn| Some((*gfn, domain.read(*gfn)?.to_vec()))).collect();
        Some((domain.ticks(), memory))
    }

    /// The guest shuts down; its vCPUs stop.
    pub fn shut_down(&self, dom: DomId, reason: u8) {
        if let Some(domain) = lock(&self.inner).domains.get_mut(&dom) {
            domain.shutdown = Some(reason);
        }
    }

    /// Lets the guest go on for a while, if it runs.
    pub fn let_run(&self, dom: DomId) {
        if let Some(domain) = lock(&self.inner).domains.get_mut(&dom) {
            domain.run();
        }
    }

    /// Gives a restored domain the program that its memory holds, as the real guest's program travels in its memory.
    pub fn adopt(&self, dom: DomId, program: Program) {
        if let Some(domain) = lock(&self.inner).domains.get_mut(&dom) {
            domain.program = Some(program);
        }
    }

    /// How often the guest's ports were raised by hand.
    pub fn raised(&self, dom: DomId) -> BTreeSet<Port> {
        lock(&self.inner).domains.get(&dom).map(|d| d.raised.clone()).unwrap_or_default()
    }

    /// The grant entries.
    pub fn grants(&self, dom: DomId) -> Option<Vec<u8>> {
        Some(lock(&self.inner).domains.get(&dom)?.grant_frames.clone())
    }

    fn with<T>(
        &self,
        op: &'static str,
        dom: DomId,
        f: impl FnOnce(&mut Domain) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        let mut inner = lock(&self.inner);
        let domain = inner.domains.get_mut(&dom).ok_or_else(|| HypervisorError::errno(op, dom, Errno::ESRCH))?;
        f(domain).map_err(|errno| HypervisorError::errno(op, dom, errno))
    }

    fn paused<T>(
        &self,
        op: &'static str,
        dom: DomId,
        f: impl FnOnce(&mut Domain) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        self.with(op, dom, |d| if d.pauses == 0 { Err(Errno::EBUSY) } else { f(d) })
    }

    fn info(&self, domid: DomId, d: &Domain) -> DomainInfo {
        DomainInfo {
            domid,
            uuid: d.config.uuid,
            hvm: true,
            hap: true,
            xs_domain: false,
            paused: d.pauses > 0,
            dying: false,
            running: d.pauses == 0,
            blocked: false,
            shutdown: d.shutdown,
            total_pages: d.pages.len() as u64,
            max_pages: d.max_mem_kib / 4,
            outstanding_pages: 0,
            shared_pages: 0,
            paged_pages: 0,
            shared_info: d.placed.iter().find(|(_, p)| **p == XenPage::SharedInfo).map(|(gfn, _)| *gfn),
            cpu_time_ns: d.ticks(),
            online_vcpus: d.vcpus,
            vcpus: d.vcpus,
            ssidref: 0,
            cpupool: d.config.cpupool,
            gpaddr_bits: 48,
            emulation_flags: d.config.emulation_flags,
            misc_flags: 0,
        }
    }
}

/// Reads and writes through to the domain, as a foreign mapping does.
struct Window {
    xen: SimXen,
    dom: DomId,
    gfns: Vec<Gfn>,
    writable: bool,
}

impl Mapping for Window {
    fn len(&self) -> usize {
        self.gfns.len() * PAGE_SIZE
    }

    fn read(&self, offset: usize, buf: &mut [u8]) {
        let inner = lock(&self.xen.inner);
        let domain = inner.domains.get(&self.dom);
        for (i, byte) in buf.iter_mut().enumerate() {
            let at = offset + i;
            let gfn = self.gfns[at / PAGE_SIZE];
            let page = domain.and_then(|d| match d.placed.get(&gfn) {
                Some(XenPage::SharedInfo) => Some(*d.shared_info),
                _ => d.read(gfn),
            });
            *byte = page.map_or(0, |p| p[at % PAGE_SIZE]);
        }
    }

    fn write(&self, offset: usize, data: &[u8]) {
        assert!(self.writable, "write to a read-only mapping");
        let mut inner = lock(&self.xen.inner);
        let Some(domain) = inner.domains.get_mut(&self.dom) else { return };
        for (i, byte) in data.iter().enumerate() {
            let at = offset + i;
            let gfn = self.gfns[at / PAGE_SIZE];
            if domain.placed.get(&gfn) == Some(&XenPage::SharedInfo) {
                domain.shared_info[at % PAGE_SIZE] = *byte;
            } else {
                domain.write(gfn, at % PAGE_SIZE, &[*byte]);
            }
        }
    }

    fn load_u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn store_u32(&self, offset: usize, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }
}

impl Hypervisor for SimXen {
    fn host_info(&self) -> Result<HostInfo> {
        let inner = lock(&self.inner);
        Ok(HostInfo {
            version: inner.version.clone(),
            capabilities: "hvm-3.0-x86_64".into(),
            build_id: "51".into(),
            command_line: String::new(),
            total_pages: 1 << 20,
            free_pages: inner.free_pages,
            outstanding_pages: 0,
            cpus: 2,
            tsc_khz: inner.tsc_khz,
            physcaps: 0,
            extension: inner.extension.map(|abi_version| ExtensionInfo { abi_version }),
        })
    }

    fn now(&self) -> Result<SystemTimeNs> {
        Ok(self.clock() as u64)
    }

    fn host_cpu_policy(&self, _which: HostPolicy) -> Result<CpuPolicy> {
        let (c, d) = (lock(&self.inner).features.0, u32::MAX);
        let leaf = CpuidLeaf { leaf: 1, subleaf: CpuidLeaf::NO_SUBLEAF, a: 0, b: 0, c, d };
        Ok(CpuPolicy { leaves: vec![leaf], msrs: Vec::new() })
    }

    fn domains(&self) -> Result<Vec<DomainInfo>> {
        Ok(lock(&self.inner).domains.iter().map(|(id, d)| self.info(*id, d)).collect())
    }

    fn domain_info(&self, dom: DomId) -> Result<DomainInfo> {
        self.with("XEN_DOMCTL_getdomaininfo", dom, |d| Ok(self.info(dom, d)))
    }

    fn create_domain(&self, dom: DomId, config: &DomainConfig) -> Result<()> {
        let mut inner = lock(&self.inner);
        if inner.domains.contains_key(&dom) {
            return Err(HypervisorError::errno("XEN_DOMCTL_createdomain", dom, Errno::EEXIST));
        }
        if !inner.pools.contains_key(&config.cpupool) {
            return Err(HypervisorError::errno("XEN_DOMCTL_createdomain", dom, Errno::ENOENT));
        }
        inner.domains.insert(dom, Domain::new(config.clone()));
        Ok(())
    }

    fn set_max_vcpus(&self, dom: DomId, count: u32) -> Result<()> {
        self.with("XEN_DOMCTL_max_vcpus", dom, |d| {
            d.vcpus = count;
            d.gt.vcpus = vec![GtVcpu::default(); count as usize];
            Ok(())
        })
    }

    fn set_max_mem(&self, dom: DomId, kib: u64) -> Result<()> {
        self.with("XEN_DOMCTL_max_mem", dom, |d| {
            d.max_mem_kib = kib;
            Ok(())
        })
    }

    fn paging_pool_size(&self, dom: DomId) -> Result<u64> {
        self.with("XEN_DOMCTL_shadow_op", dom, |d| Ok(d.paging_pool))
    }

    fn set_paging_pool_size(&self, dom: DomId, bytes: u64) -> Result<()> {
        self.with("XEN_DOMCTL_shadow_op", dom, |d| {
            d.paging_pool = bytes;
            Ok(())
        })
    }

    fn pause(&self, dom: DomId) -> Result<()> {
        let uuid = self.with("XEN_DOMCTL_pausedomain", dom, |d| {
            d.pauses += 1;
            Ok(d.config.uuid)
        })?;
        self.world.set_running(uuid, &self.name, false);
        Ok(())
    }

    fn unpause(&self, dom: DomId) -> Result<()> {
        let runs = self.with("XEN_DOMCTL_unpausedomain", dom, |d| {
            d.pauses = d.pauses.checked_sub(1).ok_or(Errno::EINVAL)?;
            // A vCPU without a context would not run.
            Ok((d.pauses == 0 && d.context.is_some()).then_some(d.config.uuid))
        })?;
        if let Some(uuid) = runs {
            self.world.set_running(uuid, &self.name, true);
        }
        Ok(())
    }

    fn destroy(&self, dom: DomId) -> Result<()> {
        let removed = lock(&self.inner).domains.remove(&dom);
        let removed = removed.ok_or_else(|| HypervisorError::errno("XEN_DOMCTL_destroydomain", dom, Errno::ESRCH))?;
        self.world.set_running(removed.config.uuid, &self.name, false);
        Ok(())
    }

    fn claim_pages(&self, dom: DomId, pages: u64) -> Result<()> {
        let free = lock(&self.inner).free_pages;
        self.with("XENMEM_claim_pages", dom, |_| if pages > free { Err(Errno::ENOMEM) } else { Ok(()) })
    }

    fn cpu_policy(&self, dom: DomId) -> Result<CpuPolicy> {
        self.with("XEN_DOMCTL_get_cpu_policy", dom, |d| Ok(d.policy.clone()))
    }

    fn set_cpu_policy(&self, dom: DomId, policy: &CpuPolicy) -> Result<()> {
        let features = lock(&self.inner).features.1;
        self.with("XEN_DOMCTL_set_cpu_policy", dom, |d| {
            if d.context.is_some() {
                return Err(Errno::EEXIST);
            }
            d.policy = policy.clone();
            d.policy.leaves.iter_mut().for_each(|leaf| leaf.c &= features);
            Ok(())
        })
    }

    fn tsc_info(&self, dom: DomId) -> Result<TscInfo> {
        // Xen tells no rate in the mode that never emulates.
        self.with("XEN_DOMCTL_gettscinfo", dom, |d| {
            Ok(TscInfo { khz: if d.tsc.mode == 2 { 0 } else { d.tsc.khz }, ..d.tsc })
        })
    }

    fn set_tsc_info(&self, dom: DomId, info: &TscInfo) -> Result<()> {
        self.paused("XEN_DOMCTL_settscinfo", dom, |d| {
            d.tsc = *info;
            Ok(())
        })
    }

    fn vm_assist(&self, dom: DomId) -> Result<u64> {
        self.with("XEN_DOMCTL_getvcpucontext", dom, |d| Ok(d.vm_assist))
    }

    fn set_vm_assist(&self, dom: DomId, bits: u64) -> Result<()> {
        self.paused("XEN_DOMCTL_setvcpucontext", dom, |d| {
            if d.context.is_some() {
                return Err(Errno::EBUSY);
            }
            d.vm_assist = bits;
            Ok(())
        })
    }

    fn vcpu_info(&self, dom: DomId, vcpu: u32) -> Result<VcpuInfo> {
        self.with("XEN_DOMCTL_getvcpuinfo", dom, |d| {
            if vcpu >= d.vcpus {
                return Err(Errno::ESRCH);
            }
            Ok(VcpuInfo { vcpu, online: d.context.is_some(), blocked: false, running: d.pauses == 0, cpu_time_ns: 0 })
        })
    }

    fn cpu_pool(&self, id: u32) -> Result<CpuPool> {
        let pool = lock(&self.inner).pools.get(&id).cloned();
        pool.ok_or_else(|| HypervisorError::errno("XEN_SYSCTL_CPUPOOL_OP_INFO", None, Errno::ENOENT))
    }

    fn share(&self, dom: DomId, scheduler: u32) -> Result<Share> {
        self.with("XEN_DOMCTL_SCHEDOP_getinfo", dom, |d| Ok(Share { scheduler, ..d.share }))
    }

    fn set_share(&self, dom: DomId, share: &Share) -> Result<()> {
        let pool = self.cpu_pool(self.domain_info(dom)?.cpupool)?;
        self.with("XEN_DOMCTL_SCHEDOP_putinfo", dom, |d| {
            if pool.scheduler != share.scheduler {
                return Err(Errno::EINVAL);
            }
            d.share = *share;
            Ok(())
        })
    }

    fn affinity(&self, dom: DomId, vcpu: u32) -> Result<Affinity> {
        self.with("XEN_DOMCTL_getvcpuaffinity", dom, |d| d.affinity.get(vcpu as usize).cloned().ok_or(Errno::EINVAL))
    }

    fn set_affinity(&self, dom: DomId, vcpu: u32, affinity: &Affinity) -> Result<()> {
        let pool = self.cpu_pool(self.domain_info(dom)?.cpupool)?;
        self.with("XEN_DOMCTL_setvcpuaffinity", dom, |d| {
            // vCPUs exist once they have been allocated.
            if vcpu >= d.vcpus || affinity.hard.as_ref().is_some_and(|hard| hard.is_disjoint(&pool.cpus)) {
                return Err(Errno::EINVAL);
            }
            *d.affinity.get_mut(vcpu as usize).ok_or(Errno::EINVAL)? = affinity.clone();
            Ok(())
        })
    }

    fn has_vnuma(&self, dom: DomId) -> Result<bool> {
        self.with("XENMEM_get_vnumainfo", dom, |d| Ok(d.vnuma))
    }

    fn max_gfn(&self, dom: DomId) -> Result<Gfn> {
        self.with("XENMEM_maximum_gpfn", dom, |d| {
            let all = d.pages.keys().chain(d.placed.keys()).chain(&d.on_demand);
            Ok(all.max().copied().unwrap_or(Gfn(0)))
        })
    }

    fn populate_on_demand(&self, dom: DomId) -> Result<PopulateOnDemand> {
        self.with("XENMEM_get_pod_target", dom, |d| {
            let entries = d.on_demand.len() as u64;
            Ok(PopulateOnDemand { entries, cache_pages: entries })
        })
    }

    fn page_types(&self, dom: DomId, gfns: &[Gfn]) -> Result<Vec<PageType>> {
        self.with("XEN_DOMCTL_getpageframeinfo3", dom, |d| {
            for gfn in gfns.iter().filter(|gfn| d.on_demand.remove(gfn)) {
                d.pages.insert(*gfn, None);
            }
            Ok(gfns.iter().map(|g| if d.pages.contains_key(g) { PageType::Ram } else { PageType::NotRam }).collect())
        })
    }

    fn populate(&self, dom: DomId, gfns: &[Gfn], order: u32) -> Result<()> {
        self.with("XENMEM_populate_physmap", dom, |d| {
            for gfn in gfns.iter().flat_map(|g| g.0..g.0 + (1 << order)) {
                // What a page held before is anybody's guess.
                d.pages.entry(Gfn(gfn)).or_insert_with(|| Some(Box::new([0xa5; PAGE_SIZE])));
            }
            Ok(())
        })
    }

    fn depopulate(&self, dom: DomId, gfns: &[Gfn]) -> Result<()> {
        self.with("XENMEM_decrease_reservation", dom, |d| {
            gfns.iter().for_each(|gfn| drop(d.pages.remove(gfn)));
            Ok(())
        })
    }

    fn read_pages(&self, dom: DomId, gfns: &[Gfn], buf: &mut [u8]) -> Result<Vec<std::result::Result<(), Errno>>> {
        self.with("foreign map", dom, |d| {
            let unreadable = d.unreadable;
            let read = |(gfn, out): (&Gfn, &mut [u8])| match d.read(*gfn).filter(|_| unreadable != Some(*gfn)) {
                Some(page) => {
                    out.copy_from_slice(&page);
                    Ok(())
                }
                None => {
                    out.fill(0);
                    Err(Errno::EINVAL)
                }
            };
            let answer = gfns.iter().zip(buf.chunks_exact_mut(PAGE_SIZE)).map(read).collect();
            d.read_again();
            d.run();
            Ok(answer)
        })
    }

    fn write_pages(&self, dom: DomId, gfns: &[Gfn], data: &[u8]) -> Result<Vec<std::result::Result<(), Errno>>> {
        self.paused("foreign map", dom, |d| {
            let mut write =
                |(gfn, page): (&Gfn, &[u8])| if d.write(*gfn, 0, page) { Ok(()) } else { Err(Errno::EINVAL) };
            Ok(gfns.iter().zip(data.chunks_exact(PAGE_SIZE)).map(&mut write).collect())
        })
    }

    fn map_pages(&self, dom: DomId, gfns: &[Gfn], access: Access) -> Result<Box<dyn Mapping>> {
        self.with("foreign map", dom, |d| {
            let there = |g: &Gfn| d.pages.contains_key(g) || d.placed.contains_key(g);
            if gfns.iter().all(there) { Ok(()) } else { Err(Errno::EINVAL) }
        })?;
        Ok(Box::new(Window { xen: self.clone(), dom, gfns: gfns.to_vec(), writable: access == Access::ReadWrite }))
    }

    fn place_xen_page(&self, dom: DomId, page: XenPage, gfn: Gfn) -> Result<()> {
        self.paused("XENMEM_add_to_physmap", dom, |d| {
            d.pages.remove(&gfn);
            d.placed.insert(gfn, page);
            if let XenPage::GrantFrame(index) = page {
                let size = (index as usize + 1) * PAGE_SIZE;
                if d.grant_frames.len() < size {
                    d.grant_frames.resize(size, 0);
                }
            }
            Ok(())
        })
    }

    fn set_memory_map(&self, dom: DomId, map: &[MemoryRange]) -> Result<()> {
        self.with("XENMEM_set_memory_map", dom, |d| {
            d.memory_map = map.to_vec();
            Ok(())
        })
    }

    fn log_dirty_enable(&self, dom: DomId) -> Result<()> {
        self.with("XEN_DOMCTL_shadow_op", dom, |d| {
            if d.dirty.is_some() {
                return Err(Errno::EINVAL);
            }
            d.dirty = Some(BTreeSet::new());
            Ok(())
        })
    }

    fn log_dirty_clean(&self, dom: DomId, bitmap: &mut DirtyBitmap, _last: bool) -> Result<DirtyStats> {
        self.with("XEN_DOMCTL_shadow_op", dom, |d| {
            d.run();
            // As in Xen: when it is off, all is clean, and nobody says so.
            let dirty = d.dirty.as_mut().map(std::mem::take).unwrap_or_default();
            bitmap.clear();
            dirty.iter().for_each(|gfn| bitmap.insert(*gfn));
            Ok(DirtyStats { pages: bitmap.pages(), fault_count: 0, dirty_count: dirty.len() as u32 })
        })
    }

    fn log_dirty_peek(&self, dom: DomId, bitmap: &mut DirtyBitmap) -> Result<DirtyStats> {
        self.with("XEN_DOMCTL_shadow_op", dom, |d| {
            d.run();
            bitmap.clear();
            d.dirty.iter().flatten().for_each(|gfn| bitmap.insert(*gfn));
            Ok(DirtyStats { pages: bitmap.pages(), fault_count: 0, dirty_count: bitmap.count() as u32 })
        })
    }

    fn log_dirty_mark(&self, dom: DomId, gfns: &[Gfn]) -> Result<()> {
        self.with("XEN_DMOP_modified_memory", dom, |d| {
            let last = d.pages.keys().chain(d.placed.keys()).max().copied().unwrap_or(Gfn(0));
            if gfns.iter().any(|gfn| *gfn >= last) {
                return Err(Errno::EINVAL);
            }
            if let Some(dirty) = &mut d.dirty {
                dirty.extend(gfns.iter().filter(|gfn| d.pages.contains_key(gfn)));
            }
            Ok(())
        })
    }

    fn log_dirty_disable(&self, dom: DomId) -> Result<()> {
        self.with("XEN_DOMCTL_shadow_op", dom, |d| {
            d.dirty = None;
            Ok(())
        })
    }

    fn hvm_context(&self, dom: DomId) -> Result<Vec<u8>> {
        self.with("XEN_DOMCTL_gethvmcontext", dom, |d| d.context.clone().ok_or(Errno::EINVAL))
    }

    fn set_hvm_context(&self, dom: DomId, records: &[u8]) -> Result<()> {
        self.paused("XEN_DOMCTL_sethvmcontext", dom, |d| {
            d.context = Some(records.to_vec());
            Ok(())
        })
    }

    fn hvm_param(&self, dom: DomId, index: u32) -> Result<u64> {
        self.with("HVMOP_get_param", dom, |d| Ok(d.params.get(&index).copied().unwrap_or(0)))
    }

    fn set_hvm_param(&self, dom: DomId, index: u32, value: u64) -> Result<()> {
        self.with("HVMOP_set_param", dom, |d| {
            d.params.insert(index, value);
            Ok(())
        })
    }

    fn port_status(&self, dom: DomId, port: Port) -> Result<Option<PortStatus>> {
        self.with("EVTCHNOP_status", dom, |d| {
            let state = |kind| match kind {
                GtPortKind::Unbound { remote } => PortState::Unbound { remote },
                GtPortKind::Interdomain { remote, remote_port } => PortState::Interdomain { remote, remote_port },
                GtPortKind::Virq(virq) => PortState::Virq(virq),
                GtPortKind::Ipi => PortState::Ipi,
                GtPortKind::Pirq(pirq) => PortState::Pirq(pirq),
            };
            let found = d.gt.ports.iter().find(|p| p.port == port);
            Ok((port <= 1023).then(|| PortStatus {
                state: found.map_or(PortState::Closed, |p| state(p.kind)),
                vcpu: found.map_or(0, |p| p.vcpu),
            }))
        })
    }

    fn alloc_unbound_port(&self, dom: DomId, _remote: DomId) -> Result<Port> {
        Err(HypervisorError::unsupported("EVTCHNOP_alloc_unbound", dom, "no simulated caller needs it"))
    }

    fn raise_guest_port(&self, dom: DomId, port: Port) -> Result<()> {
        self.with("EVTCHNOP_send", dom, |d| {
            let bound = d.gt.ports.iter().any(|p| p.port == port && matches!(p.kind, GtPortKind::Interdomain { .. }));
            if !bound {
                return Err(Errno::ENOENT);
            }
            d.raised.insert(port);
            Ok(())
        })
    }

    fn open_events(&self) -> Result<Box<dyn Events>> {
        Err(HypervisorError::unsupported("evtchn", None, "the simulated toolstack needs no event channels of its own"))
    }

    fn grant_table_size(&self, dom: DomId) -> Result<GrantTableSize> {
        self.with("GNTTABOP_query_size", dom, |d| {
            Ok(GrantTableSize { frames: (d.grant_frames.len() / PAGE_SIZE) as u32, max_frames: 32 })
        })
    }

    fn grant_table_version(&self, dom: DomId) -> Result<u32> {
        self.with("GNTTABOP_get_version", dom, |d| Ok(d.gt.grant_version))
    }

    fn grant_table_gfns(&self, dom: DomId) -> Result<Vec<Option<Gfn>>> {
        self.with("GNTTABOP_setup_table", dom, |d| {
            Ok(d.placed
                .iter()
                .filter(|(_, p)| matches!(p, XenPage::GrantFrame(_)))
                .map(|(gfn, _)| Some(*gfn))
                .collect())
        })
    }

    fn read_grant_frames(&self, dom: DomId, _array: GrantArray, first: u32, count: u32) -> Result<Vec<u8>> {
        self.with("XENMEM_acquire_resource", dom, |d| {
            let start = first as usize * PAGE_SIZE;
            d.grant_frames.get(start..start + count as usize * PAGE_SIZE).map(<[u8]>::to_vec).ok_or(Errno::EINVAL)
        })
    }

    fn write_grant_frames(&self, dom: DomId, _array: GrantArray, first: u32, data: &[u8]) -> Result<()> {
        self.paused("XENMEM_acquire_resource", dom, |d| {
            let start = first as usize * PAGE_SIZE;
            if d.grant_frames.len() < start + data.len() {
                d.grant_frames.resize(start + data.len(), 0);
            }
            d.grant_frames[start..start + data.len()].copy_from_slice(data);
            Ok(())
        })
    }

    fn map_grants(&self, dom: DomId, _refs: &[u32], _access: Access) -> Result<Box<dyn Mapping>> {
        Err(HypervisorError::unsupported("gntdev", dom, "the simulated toolstack maps no grants"))
    }

    fn gt_state(&self, dom: DomId) -> Result<GtState> {
        let now = self.clock();
        self.with("ferry extension", dom, |d| {
            let mut gt = GtState { host_now_ns: now, ..d.gt.clone() };
            let guest_now = gt.guest_now_ns();
            for vcpu in &mut gt.vcpus {
                let ticks = vcpu.tsc.ticks.wrapping_add_signed(TSC_PER_NS * (guest_now - vcpu.tsc.at_ns));
                vcpu.tsc = TscPoint { ticks, at_ns: guest_now };
            }
            Ok(gt)
        })
    }

    fn set_gt_state(&self, dom: DomId, step: GtStep, state: &GtState) -> Result<()> {
        self.paused("ferry extension", dom, |d| {
            match step {
                GtStep::AddressWidth => d.gt.guest_is_32bit = state.guest_is_32bit,
                GtStep::GrantVersion => d.gt.grant_version = state.grant_version,
                GtStep::FifoControlBlocks => {
                    if !d.gt.ports.is_empty() {
                        return Err(Errno::EBUSY);
                    }
                    for (to, from) in d.gt.vcpus.iter_mut().zip(&state.vcpus) {
                        to.fifo = from.fifo.map(|fifo| FifoVcpu { tails: [0; 16], ..fifo });
                    }
                }
                GtStep::EmuIrqs => d.gt.emuirqs = state.emuirqs.clone(),
                GtStep::Ports => {
                    d.gt.ports = state.ports.clone();
                    for port in &mut d.gt.ports {
                        if let GtPortKind::Interdomain { remote, .. } = port.kind
                            && remote != dom
                        {
                            port.kind = GtPortKind::Unbound { remote };
                        }
                    }
                }
                GtStep::EventArray => d.gt.event_array = state.event_array.clone(),
                GtStep::FifoTails => {
                    for (to, from) in d.gt.vcpus.iter_mut().zip(&state.vcpus) {
                        if let (Some(to), Some(from)) = (&mut to.fifo, &from.fifo) {
                            to.tails = from.tails;
                        }
                    }
                }
                GtStep::VcpuAreas => {
                    for n in 0..d.gt.vcpus.len() {
                        let Some(from) = state.vcpus.get(n) else { return Err(Errno::EINVAL) };
                        let (info, runstate, time, vector) =
                            (from.vcpu_info, from.runstate_area, from.time_area, from.upcall_vector);
                        if let Some(to) = d.gt.vcpus.get_mut(n) {
                            (to.vcpu_info, to.runstate_area, to.time_area) = (info, runstate, time);
                            to.upcall_vector = vector;
                        }
                        // As map_vcpu_info() of 4.17 does: the old contents, and everything pending.
                        if let Some(place) = info {
                            d.write(place.gfn, place.offset as usize, &[0xff; 64]);
                        }
                    }
                }
                GtStep::ClockOffset => {
                    d.gt.clock_offset_ns = state.clock_offset_ns;
                    d.gt.wall_clock = state.wall_clock;
                }
                GtStep::VcpuTimes => {
                    for (to, from) in d.gt.vcpus.iter_mut().zip(&state.vcpus) {
                        to.runstate = from.runstate;
                        to.singleshot_ns = from.singleshot_ns;
                        to.periodic_period_ns = from.periodic_period_ns;
                        to.periodic_last_ns = from.periodic_last_ns;
                        to.tsc = from.tsc;
                    }
                }
                GtStep::Watchdogs => d.gt.watchdogs = state.watchdogs.clone(),
            }
            Ok(())
        })
    }
}

impl SimXen {
    /// The service domain binds the guest's interdomain ports again, or lets go of them.
    pub(crate) fn bind_ports(&self, dom: DomId, bound: bool) -> Result<()> {
        self.with("EVTCHNOP_bind_interdomain", dom, |d| {
            for port in &mut d.gt.ports {
                port.kind = match port.kind {
                    // The service domain has no business with a pair within the guest.
                    GtPortKind::Unbound { remote } | GtPortKind::Interdomain { remote, .. } if remote == dom => {
                        port.kind
                    }
                    GtPortKind::Unbound { remote } if bound => {
                        GtPortKind::Interdomain { remote, remote_port: port.port + 40 }
                    }
                    GtPortKind::Interdomain { remote, .. } if !bound => GtPortKind::Unbound { remote },
                    kind => kind,
                };
            }
            // A mapping ends: the in-use flags go, and the backend's last writes are marked.
            if !bound {
                for entry in d.grant_frames.chunks_exact_mut(8) {
                    entry[0] &= !0x18;
                }
            }
            Ok(())
        })
    }
}
