//! Records of the libxc layer: state that the hypervisor holds.

use serde_json::Value;

use super::{
    Type, bad, begin, decode_checksum, decode_entries, decode_fixed, encode_checksum, encode_entries, encode_fixed,
    recognise, start,
};
use crate::error::{ErrorKind, Layer};
use crate::libxc::{HvmParam, PAGE_SIZE, decode_hvm_params, encode_hvm_params};
use crate::wire::{Field, Reader, object, wire_struct};

/// Queues of a FIFO control block (`EVTCHN_FIFO_MAX_QUEUES`, public/event_channel.h).
pub const FIFO_QUEUES: usize = 16;
/// Ports that a domain can have at most (`EVTCHN_FIFO_NR_CHANNELS`).
pub const PORTS_MAX: u32 = 1 << 17;
/// Pages of the FIFO event array at most: 1024 ports to a page.
pub const FIFO_PAGES_MAX: usize = 128;
/// A gfn field without a page.
pub const NO_GFN: u64 = u64::MAX;

wire_struct! {
    /// GT_DOMAIN: what `XEN_DOMCTL_createdomain` needs to make the same domain, and its limits. A stream that has it is
    /// that of a guest-transparent migration.
    pub struct Domain {
        /// The domain's id, which it keeps.
        pub domid: u32,
        /// XSM label.
        pub ssidref: u32,
        /// UUID.
        pub handle: [u8; 16],
        /// `XEN_DOMCTL_CDF_*`.
        pub create_flags: u32,
        /// `XEN_DOMCTL_IOMMU_*`.
        pub iommu_opts: u32,
        /// vCPUs that exist, online or not.
        pub max_vcpus: u32,
        /// Highest event-channel port, inclusive.
        pub max_evtchn_port: u32,
        /// Frames that the grant table may grow to.
        pub max_grant_frames: i32,
        /// Frames of the maptrack table.
        pub max_maptrack_frames: i32,
        /// Highest version of the grant table that the guest may choose.
        pub grant_opts: u32,
        /// CPU pool.
        pub cpupool_id: u32,
        /// `XEN_X86_EMU_*`.
        pub emulation_flags: u32,
        /// `XEN_X86_*` of `xen_arch_domainconfig.misc_flags`.
        pub misc_flags: u32,
        /// Memory limit in KiB.
        pub max_mem_kib: u64,
        /// Pages that the domain has.
        pub total_pages: u64,
        /// Pool for page tables of the guest's memory (p2m, shadow), in bytes.
        pub paging_pool_bytes: u64,
    }
}

wire_struct! {
    /// An entry of GT_MEMORY_MAP: the E820 map as `XENMEM_memory_map` tells the guest.
    pub struct MemoryRange {
        /// First byte.
        pub start: u64,
        /// Length in bytes.
        pub size: u64,
        /// E820 type.
        pub kind: u32,
        /// Zero.
        pub reserved: u32,
    }
}

/// Flags of [`SharedInfo`].
pub mod shared_info_flags {
    /// The guest uses the 32-bit layouts (`has_32bit_shinfo`).
    pub const WIDTH_32: u32 = 1 << 0;
    /// Every flag that is defined.
    pub const ALL: u32 = WIDTH_32;
}

wire_struct! {
    /// GT_SHARED_INFO: where shared_info is, and what decides its layout. Its contents are in SHARED_INFO.
    pub struct SharedInfo {
        /// Guest frame, or [`NO_GFN`] while the guest has not placed it.
        pub gfn: u64,
        /// `VMASST_TYPE_*` bits.
        pub vm_assist: u64,
        /// [`shared_info_flags`].
        pub flags: u32,
        /// Zero.
        pub reserved: u32,
    }
}

/// Flags of [`Vcpu`].
pub mod vcpu_flags {
    /// vcpu_info is at `vcpu_info_gfn`; else in shared_info.
    pub const VCPU_INFO: u32 = 1 << 0;
    /// A runstate area is registered.
    pub const RUNSTATE_AREA: u32 = 1 << 1;
    /// The runstate area's address is guest-physical (Xen 4.18 and later); else virtual.
    pub const RUNSTATE_PHYSICAL: u32 = 1 << 2;
    /// A time area is registered.
    pub const TIME_AREA: u32 = 1 << 3;
    /// The time area's address is guest-physical; else virtual.
    pub const TIME_PHYSICAL: u32 = 1 << 4;
    /// The single-shot timer is armed.
    pub const SINGLESHOT: u32 = 1 << 5;
    /// Every flag that is defined.
    pub const ALL: u32 = 0x3f;
}

wire_struct! {
    /// GT_VCPU: one vCPU's areas, upcall vector, runstate and PV timers.
    pub struct Vcpu {
        /// vCPU.
        pub vcpu_id: u32,
        /// [`vcpu_flags`].
        pub flags: u32,
        /// Guest frame of vcpu_info, [`NO_GFN`] without the flag.
        pub vcpu_info_gfn: u64,
        /// Offset of vcpu_info in its frame, bytes.
        pub vcpu_info_offset: u32,
        /// Vector of `HVMOP_set_evtchn_upcall_vector`, 0 if none.
        pub upcall_vector: u32,
        /// Address of the runstate area, virtual or physical by the flag.
        pub runstate_area: u64,
        /// Address of the time area, virtual or physical by the flag.
        pub time_area: u64,
        /// `RUNSTATE_*`.
        pub runstate: u32,
        /// Zero.
        pub reserved: u32,
        /// When it entered that state; guest's system time, ns.
        pub runstate_entry: i64,
        /// Time running, runnable, blocked, offline; ns.
        pub runstate_time: [u64; 4],
        /// Expiry of the single-shot timer; guest's system time, ns.
        pub singleshot_expiry: i64,
        /// Period of the periodic timer, ns; 0: stopped.
        pub periodic_period: u64,
        /// When the periodic timer last fired; guest's system time, ns.
        pub periodic_last: i64,
    }
}

/// Values of [`Port::kind`]: `EVTCHNSTAT_*` (public/event_channel.h). Closed ports are not in the record.
pub mod port_kind {
    /// Waits for `remote_domid`.
    pub const UNBOUND: u8 = 1;
    /// Was connected to `remote_domid` at the capture; restored as unbound for it.
    pub const INTERDOMAIN: u8 = 2;
    /// Bound to pirq `detail`.
    pub const PIRQ: u8 = 3;
    /// Bound to VIRQ `detail`.
    pub const VIRQ: u8 = 4;
    /// vCPU to vCPU.
    pub const IPI: u8 = 5;
}

wire_struct! {
    /// An entry of GT_EVTCHN.
    pub struct Port {
        /// Port number, not 0.
        pub port: u32,
        /// [`port_kind`].
        pub kind: u8,
        /// FIFO: priority, 0 is the highest, 7 the default.
        pub priority: u8,
        /// Not 0: Xen itself consumes events on this side (an ioreq server).
        pub xen_consumer: u8,
        /// 1: Xen's own pending flag of the port (`evtchn->pending`).
        pub pending: u8,
        /// vCPU that is notified.
        pub notify_vcpu: u32,
        /// Domain at the other end, for unbound and interdomain ports.
        pub remote_domid: u16,
        /// FIFO: vCPU of the queue that the port was last on.
        pub last_vcpu: u16,
        /// Remote port, pirq or VIRQ.
        pub detail: u32,
        /// FIFO: priority of the queue that the port was last on.
        pub last_priority: u8,
        /// Zero.
        pub reserved: [u8; 3],
    }
}

/// GT_EVTCHN: every port of the guest that is not closed, in ascending order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evtchn {
    /// The guest uses the FIFO ABI; its GT_EVTCHN_FIFO comes before this record.
    pub fifo: bool,
    /// The ports.
    pub ports: Vec<Port>,
}

impl Evtchn {
    fn decode(body: &[u8]) -> Result<Self, ErrorKind> {
        let mut reader = Reader::new(body);
        let count = begin(&mut reader)?;
        let abi: u32 = reader.get("abi")?;
        if abi > 1 {
            return Err(bad("abi", abi, "neither 2-level (0) nor FIFO (1)"));
        }
        reader.zero(4, "reserved")?;
        let ports: Vec<Port> = reader.list(count, "port")?;
        reader.finish()?;
        let mut previous = 0;
        for port in &ports {
            if port.port <= previous || port.port >= PORTS_MAX {
                return Err(bad("port", port.port, "ports must ascend, from 1 to 2^17 - 1"));
            }
            if !(port_kind::UNBOUND..=port_kind::IPI).contains(&port.kind) {
                return Err(bad("kind", port.kind, "not a kind of port"));
            }
            if usize::from(port.priority.max(port.last_priority)) >= FIFO_QUEUES {
                return Err(bad("priority", port.priority.max(port.last_priority), "priorities end at 15"));
            }
            if port.pending > 1 || port.reserved != [0; 3] {
                return Err(ErrorKind::NotZero { field: "reserved" });
            }
            previous = port.port;
        }
        Ok(Evtchn { fifo: abi == 1, ports })
    }

    fn encode(&self) -> Vec<u8> {
        let mut body = start(self.ports.len());
        u32::from(self.fifo).put(&mut body);
        0u32.put(&mut body);
        self.ports.iter().for_each(|port| port.put(&mut body));
        body
    }
}

wire_struct! {
    /// A vCPU's control block in GT_EVTCHN_FIFO.
    pub struct FifoControl {
        /// Guest frame of the control block.
        pub gfn: u64,
        /// Its offset in the frame, bytes, a multiple of 8.
        pub offset: u32,
        /// vCPU.
        pub vcpu_id: u32,
        /// Xen's tail of each queue: a port, 0 if it never had one.
        pub tails: [u32; FIFO_QUEUES],
    }
}

/// GT_EVTCHN_FIFO: control blocks, event array and queue tails of a guest with FIFO event channels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvtchnFifo {
    /// One for each vCPU that has a control block, in ascending order.
    pub controls: Vec<FifoControl>,
    /// Guest frames of the event array, in order.
    pub array: Vec<u64>,
}

impl EvtchnFifo {
    fn decode(body: &[u8]) -> Result<Self, ErrorKind> {
        let mut reader = Reader::new(body);
        let count = begin(&mut reader)?;
        let pages: u32 = reader.get("array_pages")?;
        reader.zero(4, "reserved")?;
        if pages as usize > FIFO_PAGES_MAX {
            return Err(bad("array_pages", pages, "the event array has at most 128 pages"));
        }
        let controls: Vec<FifoControl> = reader.list(count, "control")?;
        let array = reader.list(pages as usize, "array_gfn")?;
        reader.finish()?;
        if !controls.is_sorted_by(|a, b| a.vcpu_id < b.vcpu_id) {
            return Err(bad("vcpu_id", 0u32, "the vCPUs must ascend"));
        }
        for control in &controls {
            if control.offset as usize >= PAGE_SIZE || !control.offset.is_multiple_of(8) {
                return Err(bad("offset", control.offset, "not a multiple of 8 inside a page"));
            }
            if let Some(&tail) = control.tails.iter().find(|&&tail| tail >= PORTS_MAX) {
                return Err(bad("tails", tail, "not a port"));
            }
        }
        Ok(EvtchnFifo { controls, array })
    }

    fn encode(&self) -> Vec<u8> {
        let mut body = start(self.controls.len());
        (self.array.len() as u32).put(&mut body);
        0u32.put(&mut body);
        self.controls.iter().for_each(|control| control.put(&mut body));
        self.array.iter().for_each(|gfn| gfn.put(&mut body));
        body
    }
}

/// GT_GRANT_TABLE: version, size and place of the grant table. The entries are in GT_GRANT_FRAMES.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrantTable {
    /// 1 or 2.
    pub table_version: u32,
    /// Guest frame of each frame of the table; [`NO_GFN`] where the guest has placed none.
    pub frames: Vec<u64>,
    /// Version 2: guest frame of each status frame.
    pub status_frames: Vec<u64>,
}

impl GrantTable {
    fn decode(body: &[u8]) -> Result<Self, ErrorKind> {
        let mut reader = Reader::new(body);
        let count = begin(&mut reader)?;
        let table_version: u32 = reader.get("table_version")?;
        let status: u32 = reader.get("status_frames")?;
        if !(1..=2).contains(&table_version) {
            return Err(bad("table_version", table_version, "grant tables have version 1 or 2"));
        }
        if table_version == 1 && status != 0 {
            return Err(bad("status_frames", status, "only version 2 has status frames"));
        }
        let frames = reader.list(count, "gfn")?;
        let status_frames = reader.list(status as usize, "status_gfn")?;
        reader.finish()?;
        Ok(GrantTable { table_version, frames, status_frames })
    }

    fn encode(&self) -> Vec<u8> {
        let mut body = start(self.frames.len());
        self.table_version.put(&mut body);
        (self.status_frames.len() as u32).put(&mut body);
        self.frames.iter().chain(&self.status_frames).for_each(|gfn| gfn.put(&mut body));
        body
    }
}

/// GT_GRANT_FRAMES: contents of some frames of the grant table, as the guest saw them. The receiver clears GTF_reading
/// and GTF_writing (version 1: in the entries, version 2: in the status words): no mapping exists there yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrantFrames {
    /// Status frames of version 2; else frames of entries.
    pub status: bool,
    /// Index of the first frame.
    pub first: u32,
    /// 4096 bytes for each frame.
    pub contents: Vec<u8>,
}

impl GrantFrames {
    /// Number of frames.
    pub fn count(&self) -> usize {
        self.contents.len() / PAGE_SIZE
    }

    fn decode(body: &[u8]) -> Result<Self, ErrorKind> {
        let mut reader = Reader::new(body);
        let count = begin(&mut reader)?;
        let array: u32 = reader.get("array")?;
        let first = reader.get("first")?;
        if array > 1 {
            return Err(bad("array", array, "neither entries (0) nor status words (1)"));
        }
        let contents = reader.bytes(count.saturating_mul(PAGE_SIZE), "frame")?.to_vec();
        reader.finish()?;
        Ok(GrantFrames { status: array == 1, first, contents })
    }

    fn encode(&self) -> Vec<u8> {
        let mut body = start(self.count());
        u32::from(self.status).put(&mut body);
        self.first.put(&mut body);
        body.extend_from_slice(&self.contents[..self.count() * PAGE_SIZE]);
        body
    }
}

wire_struct! {
    /// GT_CLOCK: the guest's clocks at the pause.
    pub struct Clock {
        /// Guest's system time (pvclock) at the pause, ns.
        pub system_time: i64,
        /// Guest's wall clock at the pause, ns since 1970-01-01 UTC.
        pub wall_clock: u64,
        /// Seconds of `XEN_DOMCTL_settimeoffset`, contained in `wall_clock`.
        pub time_offset: i64,
        /// Guest's TSC frequency, kHz.
        pub tsc_khz: u32,
        /// Zero.
        pub reserved: u32,
    }
}

wire_struct! {
    /// An entry of GT_WATCHDOG: an armed watchdog (`SCHEDOP_watchdog`).
    pub struct Watchdog {
        /// The number that the guest has for it, from 1.
        pub id: u32,
        /// Zero.
        pub reserved: u32,
        /// Time until it bites, from the pause on; ns.
        pub remaining: u64,
    }
}

wire_struct! {
    /// An entry of GT_EMUIRQ: a pirq that stands for an emulated interrupt.
    pub struct Emuirq {
        /// Pirq.
        pub pirq: u32,
        /// GSI, or one of Xen's `IRQ_*` values below 0.
        pub emuirq: i32,
    }
}

/// A GT record of the libxc layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LibxcRecord {
    Domain(Domain),
    MemoryMap(Vec<MemoryRange>),
    SharedInfo(SharedInfo),
    Vcpu(Vcpu),
    Evtchn(Evtchn),
    EvtchnFifo(EvtchnFifo),
    GrantTable(GrantTable),
    GrantFrames(GrantFrames),
    Clock(Clock),
    Watchdog(Vec<Watchdog>),
    Emuirq(Vec<Emuirq>),
    /// HVM parameters that act when they are set, so after everything else: HVM_PARAM_CALLBACK_IRQ.
    HvmParamsLate(Vec<HvmParam>),
    /// CRC-32 of every byte from the image header up to this record's header.
    Checksum(u32),
}

impl LibxcRecord {
    /// Which record it is.
    pub fn gt_type(&self) -> Type {
        match self {
            LibxcRecord::Domain(_) => Type::Domain,
            LibxcRecord::MemoryMap(_) => Type::MemoryMap,
            LibxcRecord::SharedInfo(_) => Type::SharedInfo,
            LibxcRecord::Vcpu(_) => Type::Vcpu,
            LibxcRecord::Evtchn(_) => Type::Evtchn,
            LibxcRecord::EvtchnFifo(_) => Type::EvtchnFifo,
            LibxcRecord::GrantTable(_) => Type::GrantTable,
            LibxcRecord::GrantFrames(_) => Type::GrantFrames,
            LibxcRecord::Clock(_) => Type::Clock,
            LibxcRecord::Watchdog(_) => Type::Watchdog,
            LibxcRecord::Emuirq(_) => Type::Emuirq,
            LibxcRecord::HvmParamsLate(_) => Type::HvmParamsLate,
            LibxcRecord::Checksum(_) => Type::Checksum,
        }
    }

    /// Reads a body; `None` if the type is not a GT record. The bool tells whether the optional bit was set.
    pub fn decode(rtype: u32, body: &[u8]) -> Result<Option<(Self, bool)>, ErrorKind> {
        let Some((gt, optional)) = recognise(Layer::Libxc, rtype)? else { return Ok(None) };
        let record = match gt {
            Type::Domain => LibxcRecord::Domain(decode_fixed(body).and_then(check_domain)?),
            Type::MemoryMap => LibxcRecord::MemoryMap(decode_entries(body)?),
            Type::SharedInfo => LibxcRecord::SharedInfo(decode_fixed(body).and_then(check_shared_info)?),
            Type::Vcpu => LibxcRecord::Vcpu(decode_fixed(body).and_then(check_vcpu)?),
            Type::Evtchn => LibxcRecord::Evtchn(Evtchn::decode(body)?),
            Type::EvtchnFifo => LibxcRecord::EvtchnFifo(EvtchnFifo::decode(body)?),
            Type::GrantTable => LibxcRecord::GrantTable(GrantTable::decode(body)?),
            Type::GrantFrames => LibxcRecord::GrantFrames(GrantFrames::decode(body)?),
            Type::Clock => LibxcRecord::Clock(decode_fixed(body).and_then(check_clock)?),
            Type::Watchdog => LibxcRecord::Watchdog(decode_entries(body)?),
            Type::Emuirq => LibxcRecord::Emuirq(decode_entries(body)?),
            Type::HvmParamsLate => {
                let mut reader = Reader::new(body);
                super::no_entries(begin(&mut reader)?)?;
                LibxcRecord::HvmParamsLate(decode_hvm_params(reader.rest())?)
            }
            Type::Checksum => LibxcRecord::Checksum(decode_checksum(body)?),
            Type::Identity | Type::Devices | Type::Xenstore | Type::Toolstack | Type::StreamChecksum => {
                return Ok(None);
            }
        };
        Ok(Some((record, optional)))
    }

    /// Type on the wire, without the optional bit, and body.
    pub fn encode(&self) -> (u32, Vec<u8>) {
        let body = match self {
            LibxcRecord::Domain(value) => encode_fixed(value),
            LibxcRecord::MemoryMap(entries) => encode_entries(entries),
            LibxcRecord::SharedInfo(value) => encode_fixed(value),
            LibxcRecord::Vcpu(value) => encode_fixed(value),
            LibxcRecord::Evtchn(value) => value.encode(),
            LibxcRecord::EvtchnFifo(value) => value.encode(),
            LibxcRecord::GrantTable(value) => value.encode(),
            LibxcRecord::GrantFrames(value) => value.encode(),
            LibxcRecord::Clock(value) => encode_fixed(value),
            LibxcRecord::Watchdog(entries) => encode_entries(entries),
            LibxcRecord::Emuirq(entries) => encode_entries(entries),
            LibxcRecord::HvmParamsLate(params) => {
                let mut body = start(0);
                body.extend_from_slice(&encode_hvm_params(params));
                body
            }
            LibxcRecord::Checksum(crc) => encode_checksum(*crc),
        };
        (self.gt_type().number(), body)
    }

    /// The record for reports.
    pub fn json(&self) -> Value {
        fn list<T: Field>(entries: &[T]) -> Value {
            entries.iter().map(Field::json).collect()
        }
        match self {
            LibxcRecord::Domain(value) => value.json(),
            LibxcRecord::MemoryMap(entries) => list(entries),
            LibxcRecord::SharedInfo(value) => value.json(),
            LibxcRecord::Vcpu(value) => value.json(),
            LibxcRecord::Evtchn(value) => object([("fifo", value.fifo.into()), ("ports", list(&value.ports))]),
            LibxcRecord::EvtchnFifo(value) => {
                object([("controls", list(&value.controls)), ("array", list(&value.array))])
            }
            LibxcRecord::GrantTable(value) => object([
                ("table_version", value.table_version.into()),
                ("frames", list(&value.frames)),
                ("status_frames", list(&value.status_frames)),
            ]),
            LibxcRecord::GrantFrames(value) => object([
                ("status", value.status.into()),
                ("first", value.first.into()),
                ("count", value.count().into()),
            ]),
            LibxcRecord::Clock(value) => value.json(),
            LibxcRecord::Watchdog(entries) => list(entries),
            LibxcRecord::Emuirq(entries) => list(entries),
            LibxcRecord::HvmParamsLate(params) => list(params),
            LibxcRecord::Checksum(crc) => object([("crc32", format!("{crc:#010x}").into())]),
        }
    }
}

fn check_domain(domain: Domain) -> Result<Domain, ErrorKind> {
    if !(1..0x7ff0).contains(&domain.domid) {
        return Err(bad("domid", domain.domid, "guests have ids from 1 to 0x7fef"));
    }
    if domain.max_vcpus == 0 || domain.max_vcpus > 4096 {
        return Err(bad("max_vcpus", domain.max_vcpus, "a domain has 1 to 4096 vCPUs"));
    }
    if domain.max_evtchn_port >= PORTS_MAX {
        return Err(bad("max_evtchn_port", domain.max_evtchn_port, "the highest port is 2^17 - 1"));
    }
    Ok(domain)
}

fn check_shared_info(info: SharedInfo) -> Result<SharedInfo, ErrorKind> {
    if info.flags & !shared_info_flags::ALL != 0 || info.reserved != 0 {
        return Err(bad("flags", info.flags, "reserved bits are set"));
    }
    Ok(info)
}

fn check_vcpu(vcpu: Vcpu) -> Result<Vcpu, ErrorKind> {
    if vcpu.flags & !vcpu_flags::ALL != 0 || vcpu.reserved != 0 {
        return Err(bad("flags", vcpu.flags, "reserved bits are set"));
    }
    if vcpu.vcpu_info_offset as usize >= PAGE_SIZE {
        return Err(bad("vcpu_info_offset", vcpu.vcpu_info_offset, "past the end of the page"));
    }
    if vcpu.upcall_vector > 0xff {
        return Err(bad("upcall_vector", vcpu.upcall_vector, "vectors end at 255"));
    }
    if vcpu.runstate > 3 {
        return Err(bad("runstate", vcpu.runstate, "there are four runstates"));
    }
    Ok(vcpu)
}

fn check_clock(clock: Clock) -> Result<Clock, ErrorKind> {
    if clock.reserved != 0 { Err(ErrorKind::NotZero { field: "reserved" }) } else { Ok(clock) }
}
