//! A guest as a stream of records (docs/stream-format.md), and back.

use crate::guest::{Device, Grants, GuestKind, GuestState, Identity, Offer};
use crate::toolstack::Luggage;
use crate::trouble::{Result, Trouble};
use hypervisor::{
    DomId, EmuIrq, FifoVcpu, Gfn, GtPort, GtPortKind, GtState, GtVcpu, GuestArea, GuestPlace, PAGE_SIZE, Runstate,
    TscInfo, WallClock, Watchdog,
};
use migration_stream::check::Checker;
use migration_stream::libxc::{DomainHeader, HvmParam, PageData, PageEntry};
use migration_stream::{Decoder, Encoder, Event, Limits, gt, libxc, libxl};
use uuid::Uuid;
use xen_abi::hvm_op::{ParamRole, param};

/// Longest record that is taken from a peer, bytes: 1024 pages with their entries, or the store of one domain.
const RECORD_MAX: u32 = 16 << 20;
/// Frames of the grant table in one record.
const GRANT_FRAMES: usize = 64;

// ---- writing ----

/// What comes before memory: who it is, its devices, what its shell is made from.
pub fn write_head(to: &mut Encoder, offer: &Offer) {
    let identity = &offer.identity;
    let shell = &offer.shell;
    to.libxl_header();
    to.gt_libxl(&gt::LibxlRecord::Identity(gt::Identity {
        domid: identity.domid.0,
        kind: match identity.kind {
            GuestKind::Hvm => gt::DomainKind::Hvm,
            GuestKind::Pvh => gt::DomainKind::Pvh,
        },
        uuid: *identity.uuid.as_bytes(),
        name: identity.name.clone(),
        host: offer.host.clone(),
        xen_version: offer.xen.to_string(),
        build_id: offer.build_id.clone(),
        writer: offer.writer.clone(),
    }));
    to.gt_libxl(&gt::LibxlRecord::Devices(offer.devices.iter().map(device).collect()));
    to.libxl(&libxl::Record::LibxcContext);
    to.image(&DomainHeader::hvm(offer.xen.major.into(), offer.xen.minor.into()));
    let config = &shell.config;
    to.gt_libxc(&gt::LibxcRecord::Domain(gt::Domain {
        domid: identity.domid.0.into(),
        ssidref: config.ssidref,
        handle: *config.uuid.as_bytes(),
        create_flags: config.flags,
        iommu_opts: config.iommu_opts,
        max_vcpus: config.max_vcpus,
        max_evtchn_port: config.max_evtchn_port,
        max_grant_frames: config.max_grant_frames,
        max_maptrack_frames: config.max_maptrack_frames,
        grant_opts: config.grant_opts,
        cpupool_id: config.cpupool,
        emulation_flags: config.emulation_flags,
        misc_flags: config.misc_flags,
        max_mem_kib: shell.max_mem_kib,
        total_pages: shell.total_pages,
        paging_pool_bytes: shell.paging_pool,
    }));
    let ranges = shell.memory_map.iter();
    to.gt_libxc(&gt::LibxcRecord::MemoryMap(
        ranges.map(|r| gt::MemoryRange { start: r.start, size: r.size, kind: r.kind, reserved: 0 }).collect(),
    ));
    let leaves = shell.policy.leaves.iter();
    to.libxc(&libxc::Record::CpuidPolicy(
        leaves.map(|l| libxc::CpuidLeaf { leaf: l.leaf, subleaf: l.subleaf, a: l.a, b: l.b, c: l.c, d: l.d }).collect(),
    ));
    // A record must have an entry; a policy may have none.
    if !shell.policy.msrs.is_empty() {
        let msrs = shell.policy.msrs.iter();
        to.libxc(&libxc::Record::MsrPolicy(
            msrs.map(|m| libxc::MsrEntry { idx: m.index, flags: m.flags, val: m.value }).collect(),
        ));
    }
    to.libxc(&libxc::Record::StaticDataEnd);
}

/// A batch of pages: those of `zero` are all zeroes and carry no contents, those of `gone` are no longer there.
pub fn write_pages(to: &mut Encoder, with_data: &[Gfn], data: &[u8], zero: &[Gfn], gone: &[Gfn]) {
    let entry = |page_type| move |gfn: &Gfn| PageEntry { gfn: gfn.0, page_type };
    let entries: Vec<PageEntry> = with_data
        .iter()
        .map(|gfn| PageEntry::normal(gfn.0))
        .chain(zero.iter().map(entry(libxc::PageType::XALLOC)))
        .chain(gone.iter().map(entry(libxc::PageType::XTAB)))
        .collect();
    if !entries.is_empty() {
        to.page_data(&entries, data);
    }
}

/// What comes after memory, to the end.
pub fn write_tail(to: &mut Encoder, state: &GuestState, luggage: &Luggage) {
    to.libxc(&libxc::Record::TscInfo(libxc::TscInfo {
        mode: state.tsc.mode,
        khz: state.tsc.khz,
        nsec: state.tsc.elapsed_ns,
        incarnation: state.tsc.incarnation,
        reserved: 0,
    }));
    let (late, early): (Vec<_>, Vec<_>) =
        state.params.iter().partition(|(index, _)| param(*index).is_some_and(|p| p.role == ParamRole::Callback));
    let params = |list: Vec<(u32, u64)>| -> Vec<HvmParam> {
        list.into_iter().map(|(index, value)| HvmParam { index: index.into(), value }).collect()
    };
    to.libxc(&libxc::Record::HvmParams(params(early)));
    let grants = &state.grants;
    let number = |gfn: &Option<Gfn>| gfn.map_or(gt::NO_GFN, |g| g.0);
    to.gt_libxc(&gt::LibxcRecord::GrantTable(gt::GrantTable {
        table_version: grants.version,
        frames: grants.gfns.iter().map(number).collect(),
        status_frames: grants.status_gfns.iter().map(number).collect(),
    }));
    for (status, contents) in [(false, &grants.shared), (true, &grants.status)] {
        for (n, chunk) in contents.chunks(GRANT_FRAMES * PAGE_SIZE).enumerate() {
            let first = (n * GRANT_FRAMES) as u32;
            to.gt_libxc(&gt::LibxcRecord::GrantFrames(gt::GrantFrames { status, first, contents: chunk.to_vec() }));
        }
    }
    let flags = if state.gt.guest_is_32bit { gt::shared_info_flags::WIDTH_32 } else { 0 };
    to.gt_libxc(&gt::LibxcRecord::SharedInfo(gt::SharedInfo {
        gfn: state.shared_info.as_ref().map_or(gt::NO_GFN, |(gfn, _)| gfn.0),
        vm_assist: state.vm_assist,
        flags,
        reserved: 0,
    }));
    if let Some((_, page)) = &state.shared_info {
        to.libxc(&libxc::Record::SharedInfo(page));
    }
    write_events(to, &state.gt);
    to.libxc(&libxc::Record::HvmContext(&state.hvm_context));
    for (vcpu_id, vcpu) in (0u32..).zip(&state.gt.vcpus) {
        to.gt_libxc(&gt::LibxcRecord::Vcpu(write_vcpu(vcpu_id, vcpu)));
    }
    let wall = &state.gt.wall_clock;
    let wall_ns = wall.sec.saturating_mul(1_000_000_000).saturating_add(wall.nsec.into());
    to.gt_libxc(&gt::LibxcRecord::Clock(gt::Clock {
        system_time: state.system_time,
        wall_clock: wall_ns.saturating_add_signed(state.system_time),
        time_offset: 0,
        tsc_khz: state.tsc.khz,
        reserved: 0,
    }));
    if !state.gt.watchdogs.is_empty() {
        let watchdogs = state.gt.watchdogs.iter();
        to.gt_libxc(&gt::LibxcRecord::Watchdog(
            watchdogs
                .map(|w| gt::Watchdog { id: w.id, reserved: 0, remaining: w.remaining_ns.max(0).unsigned_abs() })
                .collect(),
        ));
    }
    if !late.is_empty() {
        to.gt_libxc(&gt::LibxcRecord::HvmParamsLate(params(late)));
    }
    to.checksum(false);
    to.libxc(&libxc::Record::End);
    to.gt_libxl(&gt::LibxlRecord::Xenstore(luggage.store.clone()));
    to.gt_libxl(&gt::LibxlRecord::Toolstack(gt::Toolstack {
        nodes: luggage
            .nodes
            .iter()
            .map(|n| gt::Node { path: n.path.clone(), value: n.value.clone(), perms: n.perms.clone() })
            .collect(),
        userdata: luggage
            .userdata
            .iter()
            .map(|(name, contents)| gt::Userdata { name: name.clone(), contents: contents.clone() })
            .collect(),
    }));
    to.stream_checksum(false);
    to.libxl(&libxl::Record::End);
}

fn write_events(to: &mut Encoder, state: &GtState) {
    if !state.emuirqs.is_empty() {
        let irqs = state.emuirqs.iter();
        to.gt_libxc(&gt::LibxcRecord::Emuirq(irqs.map(|e| gt::Emuirq { pirq: e.pirq, emuirq: e.emuirq }).collect()));
    }
    if let Some(array) = &state.event_array {
        let controls = (0u32..).zip(&state.vcpus).filter_map(|(vcpu_id, vcpu)| {
            let fifo = vcpu.fifo.as_ref()?;
            let GuestPlace { gfn, offset } = fifo.control_block;
            Some(gt::FifoControl { gfn: gfn.0, offset, vcpu_id, tails: fifo.tails })
        });
        to.gt_libxc(&gt::LibxcRecord::EvtchnFifo(gt::EvtchnFifo {
            controls: controls.collect(),
            array: array.iter().map(|g| g.0).collect(),
        }));
    }
    let port = |p: &GtPort| {
        let (kind, remote_domid, detail) = match p.kind {
            GtPortKind::Unbound { remote } => (gt::port_kind::UNBOUND, remote.0, 0),
            GtPortKind::Interdomain { remote, remote_port } => (gt::port_kind::INTERDOMAIN, remote.0, remote_port),
            GtPortKind::Virq(virq) => (gt::port_kind::VIRQ, 0, virq),
            GtPortKind::Ipi => (gt::port_kind::IPI, 0, 0),
            GtPortKind::Pirq(pirq) => (gt::port_kind::PIRQ, 0, pirq),
        };
        gt::Port {
            port: p.port,
            kind,
            priority: p.priority,
            xen_consumer: p.xen_consumer.into(),
            pending: p.pending_early.into(),
            notify_vcpu: p.vcpu,
            remote_domid,
            last_vcpu: p.last_vcpu,
            detail,
            last_priority: p.last_priority,
            reserved: [0; 3],
        }
    };
    to.gt_libxc(&gt::LibxcRecord::Evtchn(gt::Evtchn {
        fifo: state.event_array.is_some(),
        ports: state.ports.iter().map(port).collect(),
    }));
}

fn write_vcpu(vcpu_id: u32, vcpu: &GtVcpu) -> gt::Vcpu {
    use gt::vcpu_flags as flag;
    let mut flags = 0;
    let mut area = |area: Option<GuestArea>, there: u32, physical: u32| match area {
        None => 0,
        Some(GuestArea::Virtual(address)) => {
            flags |= there;
            address
        }
        Some(GuestArea::Physical(place)) => {
            flags |= there | physical;
            place.gfn.0 * PAGE_SIZE as u64 + u64::from(place.offset)
        }
    };
    let runstate_area = area(vcpu.runstate_area, flag::RUNSTATE_AREA, flag::RUNSTATE_PHYSICAL);
    let time_area = area(vcpu.time_area, flag::TIME_AREA, flag::TIME_PHYSICAL);
    if vcpu.vcpu_info.is_some() {
        flags |= flag::VCPU_INFO;
    }
    if vcpu.singleshot_ns.is_some() {
        flags |= flag::SINGLESHOT;
    }
    gt::Vcpu {
        vcpu_id,
        flags,
        vcpu_info_gfn: vcpu.vcpu_info.map_or(gt::NO_GFN, |p| p.gfn.0),
        vcpu_info_offset: vcpu.vcpu_info.map_or(0, |p| p.offset),
        upcall_vector: vcpu.upcall_vector.into(),
        runstate_area,
        time_area,
        runstate: vcpu.runstate.state,
        reserved: 0,
        runstate_entry: vcpu.runstate.entry_time_ns,
        runstate_time: vcpu.runstate.time_ns.map(|t| t.max(0).unsigned_abs()),
        singleshot_expiry: vcpu.singleshot_ns.unwrap_or(0),
        periodic_period: vcpu.periodic_period_ns.max(0).unsigned_abs(),
        periodic_last: vcpu.periodic_last_ns,
    }
}

fn device(device: &Device) -> gt::Device {
    gt::Device {
        class: device.class.clone(),
        devid: device.devid,
        backend_domid: device.backend_domid,
        frontend_state: device.frontend_state,
        backend_state: device.backend_state,
        frontend: device.frontend.clone(),
        backend: device.backend.clone(),
        needs: device.needs.clone(),
    }
}

// ---- reading ----

/// Takes a guest's image as it comes: pages go out at once, the rest is kept until the end.
#[derive(Debug)]
pub struct Reader {
    decoder: Decoder,
    checker: Checker,
    parts: Parts,
    pages: u64,
}

/// The records after memory, as far as they have come.
#[derive(Debug, Default)]
struct Parts {
    identity: Option<(u16, Uuid, String)>,
    tsc: Option<TscInfo>,
    params: Vec<(u32, u64)>,
    grants: Grants,
    shared_info: Option<gt::SharedInfo>,
    shared_info_page: Option<Vec<u8>>,
    hvm_context: Vec<u8>,
    gt: GtState,
    fifo: Option<gt::EvtchnFifo>,
    clock: Option<gt::Clock>,
    luggage: Luggage,
}

/// What a batch of pages holds.
#[derive(Debug, Default)]
pub struct Pages<'a> {
    pub with_data: Vec<Gfn>,
    /// The contents of those, in their order.
    pub data: &'a [u8],
    /// All zeroes.
    pub zero: Vec<Gfn>,
    /// The guest has given them up.
    pub gone: Vec<Gfn>,
}

impl Default for Reader {
    fn default() -> Self {
        let limits = Limits { record: RECORD_MAX, ..Limits::default() };
        Reader { decoder: Decoder::new(limits), checker: Checker::new(), parts: Parts::default(), pages: 0 }
    }
}

impl Reader {
    /// Takes the next bytes; hands batches of pages to `put`.
    pub fn feed(&mut self, bytes: Vec<u8>, mut put: impl FnMut(Pages<'_>) -> Result<()>) -> Result<()> {
        self.decoder.feed_owned(bytes);
        while let Some(event) = self.decoder.next()? {
            self.checker.event(&event);
            let Event::Record(record) = &event else { continue };
            match record.layer {
                migration_stream::Layer::Libxc => match record.libxc()? {
                    libxc::Record::PageData(pages) => {
                        self.pages += pages.count() as u64;
                        put(sort(&pages))?;
                    }
                    other => self.parts.libxc(other),
                },
                _ => self.parts.libxl(record.libxl()?),
            }
        }
        Ok(())
    }

    /// Pages that have come so far.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The end: the stream must be whole, in order, and that of the guest that was offered.
    pub fn finish(mut self, offered: &Identity) -> Result<(GuestState, Luggage)> {
        let end = self.decoder.finish();
        if let Some(first) = self.checker.finish(end).into_iter().next() {
            return Err(first.into());
        }
        let (domid, uuid, name) =
            self.parts.identity.take().ok_or_else(|| Trouble::new("the image has no GT_IDENTITY"))?;
        if (DomId(domid), uuid) != (offered.domid, offered.uuid) {
            return Err(Trouble::new(format!(
                "the image is that of domain {domid} ({name}, {uuid}), which was not offered"
            )));
        }
        self.parts.assemble()
    }
}

fn sort<'a>(pages: &PageData<'a>) -> Pages<'a> {
    let mut sorted = Pages { data: pages.contents(), ..Pages::default() };
    for (entry, data) in pages.iter() {
        match data {
            Some(_) => sorted.with_data.push(Gfn(entry.gfn)),
            None if entry.page_type == libxc::PageType::XALLOC => sorted.zero.push(Gfn(entry.gfn)),
            None => sorted.gone.push(Gfn(entry.gfn)),
        }
    }
    sorted
}

impl Parts {
    fn libxl(&mut self, record: libxl::Record<'_>) {
        let libxl::Record::Gt(record, _) = record else { return };
        match record {
            gt::LibxlRecord::Identity(i) => self.identity = Some((i.domid, Uuid::from_bytes(i.uuid), i.name)),
            gt::LibxlRecord::Xenstore(store) => self.luggage.store = store,
            gt::LibxlRecord::Toolstack(toolstack) => {
                self.luggage.nodes = toolstack
                    .nodes
                    .into_iter()
                    .map(|n| crate::toolstack::StoreNode { path: n.path, value: n.value, perms: n.perms })
                    .collect();
                self.luggage.userdata = toolstack.userdata.into_iter().map(|u| (u.name, u.contents)).collect();
            }
            // Told in the offer already, and judged there.
            gt::LibxlRecord::Devices(_) | gt::LibxlRecord::Checksum(_) => {}
        }
    }

    fn libxc(&mut self, record: libxc::Record<'_>) {
        match record {
            libxc::Record::TscInfo(t) => {
                self.tsc = Some(TscInfo { mode: t.mode, khz: t.khz, incarnation: t.incarnation, elapsed_ns: t.nsec });
            }
            libxc::Record::HvmParams(params) => self.params.extend(params.into_iter().filter_map(narrow)),
            libxc::Record::SharedInfo(page) => self.shared_info_page = Some(page.to_vec()),
            libxc::Record::HvmContext(context) => self.hvm_context = context.to_vec(),
            libxc::Record::Gt(record, _) => self.gt(record),
            _ => {}
        }
    }

    fn gt(&mut self, record: gt::LibxcRecord) {
        match record {
            gt::LibxcRecord::Domain(domain) => {
                self.gt.create_flags = domain.create_flags;
                self.gt.max_evtchn_port = domain.max_evtchn_port;
            }
            gt::LibxcRecord::SharedInfo(info) => {
                self.gt.guest_is_32bit = info.flags & gt::shared_info_flags::WIDTH_32 != 0;
                self.shared_info = Some(info);
            }
            gt::LibxcRecord::GrantTable(table) => {
                self.gt.grant_version = table.table_version;
                self.grants.version = table.table_version;
                self.grants.gfns = table.frames.into_iter().map(placed).collect();
                self.grants.status_gfns = table.status_frames.into_iter().map(placed).collect();
            }
            // The checker has seen to it that they come in order and are all there.
            gt::LibxcRecord::GrantFrames(frames) if frames.status => self.grants.status.extend(frames.contents),
            gt::LibxcRecord::GrantFrames(frames) => self.grants.shared.extend(frames.contents),
            gt::LibxcRecord::EvtchnFifo(fifo) => self.fifo = Some(fifo),
            gt::LibxcRecord::Evtchn(evtchn) => self.gt.ports = evtchn.ports.iter().map(read_port).collect(),
            gt::LibxcRecord::Vcpu(vcpu) => self.gt.vcpus.push(read_vcpu(&vcpu)),
            gt::LibxcRecord::Clock(clock) => self.clock = Some(clock),
            gt::LibxcRecord::Watchdog(watchdogs) => {
                let signed = |ns| i64::try_from(ns).unwrap_or(i64::MAX);
                self.gt.watchdogs =
                    watchdogs.iter().map(|w| Watchdog { id: w.id, remaining_ns: signed(w.remaining) }).collect();
            }
            gt::LibxcRecord::Emuirq(irqs) => {
                self.gt.emuirqs = irqs.iter().map(|e| EmuIrq { pirq: e.pirq, emuirq: e.emuirq }).collect();
            }
            gt::LibxcRecord::HvmParamsLate(params) => self.params.extend(params.into_iter().filter_map(narrow)),
            gt::LibxcRecord::MemoryMap(_) | gt::LibxcRecord::Checksum(_) => {}
        }
    }

    fn assemble(mut self) -> Result<(GuestState, Luggage)> {
        let missing = |what: &str| Trouble::new(format!("the image has no {what}"));
        let info = self.shared_info.ok_or_else(|| missing("GT_SHARED_INFO"))?;
        let clock = self.clock.ok_or_else(|| missing("GT_CLOCK"))?;
        if let Some(fifo) = self.fifo {
            for control in fifo.controls {
                let vcpu = usize::try_from(control.vcpu_id).ok().and_then(|id| self.gt.vcpus.get_mut(id));
                let vcpu = vcpu.ok_or_else(|| missing("GT_VCPU for a FIFO control block"))?;
                let control_block = GuestPlace { gfn: Gfn(control.gfn), offset: control.offset };
                vcpu.fifo = Some(FifoVcpu { control_block, tails: control.tails });
            }
            self.gt.event_array = Some(fifo.array.into_iter().map(Gfn).collect());
        }
        let base = clock.wall_clock.saturating_add_signed(clock.system_time.saturating_neg());
        self.gt.wall_clock = WallClock { sec: base / 1_000_000_000, nsec: (base % 1_000_000_000) as u32 };
        let state = GuestState {
            vm_assist: info.vm_assist,
            tsc: self.tsc.ok_or_else(|| missing("X86_TSC_INFO"))?,
            hvm_context: self.hvm_context,
            params: self.params,
            shared_info: self.shared_info_page.filter(|_| info.gfn != gt::NO_GFN).map(|page| (Gfn(info.gfn), page)),
            gt: self.gt,
            grants: self.grants,
            system_time: clock.system_time,
        };
        Ok((state, self.luggage))
    }
}

fn placed(gfn: u64) -> Option<Gfn> {
    (gfn != gt::NO_GFN).then_some(Gfn(gfn))
}

fn narrow(p: HvmParam) -> Option<(u32, u64)> {
    // An index past 32 bits is no parameter of any Xen; restoring refuses unknown ones by number.
    Some((u32::try_from(p.index).unwrap_or(u32::MAX), p.value))
}

fn read_port(p: &gt::Port) -> GtPort {
    let remote = DomId(p.remote_domid);
    GtPort {
        port: p.port,
        kind: match p.kind {
            gt::port_kind::INTERDOMAIN => GtPortKind::Interdomain { remote, remote_port: p.detail },
            gt::port_kind::PIRQ => GtPortKind::Pirq(p.detail),
            gt::port_kind::VIRQ => GtPortKind::Virq(p.detail),
            gt::port_kind::IPI => GtPortKind::Ipi,
            _ => GtPortKind::Unbound { remote },
        },
        vcpu: p.notify_vcpu,
        priority: p.priority,
        last_vcpu: p.last_vcpu,
        last_priority: p.last_priority,
        pending_early: p.pending != 0,
        xen_consumer: p.xen_consumer != 0,
    }
}

fn read_vcpu(v: &gt::Vcpu) -> GtVcpu {
    use gt::vcpu_flags as flag;
    let area = |address: u64, there: u32, physical: u32| {
        let place = || GuestPlace { gfn: Gfn(address / PAGE_SIZE as u64), offset: (address % PAGE_SIZE as u64) as u32 };
        (v.flags & there != 0)
            .then(|| if v.flags & physical != 0 { GuestArea::Physical(place()) } else { GuestArea::Virtual(address) })
    };
    GtVcpu {
        vcpu_info: (v.flags & flag::VCPU_INFO != 0)
            .then_some(GuestPlace { gfn: Gfn(v.vcpu_info_gfn), offset: v.vcpu_info_offset }),
        runstate_area: area(v.runstate_area, flag::RUNSTATE_AREA, flag::RUNSTATE_PHYSICAL),
        time_area: area(v.time_area, flag::TIME_AREA, flag::TIME_PHYSICAL),
        runstate: Runstate {
            state: v.runstate,
            entry_time_ns: v.runstate_entry,
            time_ns: v.runstate_time.map(|t| i64::try_from(t).unwrap_or(i64::MAX)),
        },
        upcall_vector: u8::try_from(v.upcall_vector).unwrap_or(0),
        fifo: None,
        singleshot_ns: (v.flags & flag::SINGLESHOT != 0).then_some(v.singleshot_expiry),
        periodic_period_ns: i64::try_from(v.periodic_period).unwrap_or(i64::MAX),
        periodic_last_ns: v.periodic_last,
        ..GtVcpu::default()
    }
}
