//! What the witness reports.
//!
//! Every report is an [`Envelope`]. Counters never go back and never restart within one `run`, so a lost datagram loses
//! nothing that the next one does not tell again. Times are nanoseconds of the guest's own CLOCK_MONOTONIC unless the
//! name says otherwise.

use crate::klog::LineClass;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The frame around every report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Envelope {
    /// [`crate::wire::VERSION`].
    pub v: u32,
    /// Drawn at start; another value means that the guest was started anew.
    pub run: u64,
    /// Counts reports of this run from 1. The same report over two ways has the same number.
    pub seq: u64,
    /// When it was made, CLOCK_MONOTONIC.
    pub mono_ns: u64,
    /// When it was made, CLOCK_REALTIME.
    pub real_ns: u64,
    /// The report.
    pub body: Body,
}

/// The reports. The JSON has the name in `kind`, in snake case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Body {
    /// Once, when everything is running.
    Hello(Hello),
    /// Every `witness.beat_ms`.
    Beat(Beat),
    /// At once, when something was noticed.
    Anomaly(Anomaly),
    /// After the fsync of a journal record.
    Journal(JournalAck),
    /// At the start, when asked for, every `witness.snapshot_s`, and within the final report. By TCP only.
    Snapshot(Box<Snapshot>),
    /// The last report, after all loads stopped and everything was verified. By TCP, and on the console without its
    /// snapshot's long parts.
    Final(Box<Final>),
}

/// The first report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// The witness's version.
    pub version: String,
    /// `uname -r`.
    pub kernel: String,
    /// The settings in force, as they would stand on the command line.
    pub settings: String,
    /// Online vCPUs.
    pub vcpus: u32,
    /// What cannot be looked at in this guest, and why.
    pub absent: Vec<String>,
}

/// The counters. Small enough for a datagram.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Beat {
    /// Time since the witness started.
    pub up_ms: u64,
    /// True while the loads run (false after `quiet`).
    pub loads: bool,
    /// Anomalies noticed, those not sent included; clock gaps and lines of starved vCPUs not.
    pub anomalies: u64,
    /// Anomalies only counted, because too many of the kind had been sent.
    pub anomalies_unsent: u64,
    /// Reports lost because the queue to the peer was full; that to the console, in a guest without a network.
    pub reports_lost: u64,

    /// Store operations done, and those that ended in an error.
    pub store_ops: u64,
    /// See `store_ops`.
    pub store_errors: u64,
    /// Slowest store operation.
    pub store_max_ms: u64,
    /// Writes by the watch load.
    pub watch_writes: u64,
    /// Events of the watch load's own watch. Equal to `watch_writes` when the load is at rest.
    pub watch_events: u64,
    /// Events of watches that guard what should not change.
    pub watch_strays: u64,
    /// Long-held transactions that committed.
    pub tx_committed: u64,
    /// Long-held transactions that ended with EAGAIN.
    pub tx_again: u64,
    /// Long-held transactions that ended with any other error.
    pub tx_failed: u64,

    /// Times the ports and grants were read through hypercalls.
    pub xen_reads: u64,
    /// Copies through the witness's own grants that were right.
    pub grant_copies: u64,
    /// Copies through the witness's own grants that failed or were wrong.
    pub grant_bad: u64,
    /// Events sent through the witness's own event channel.
    pub events_sent: u64,
    /// Those that arrived.
    pub events_back: u64,
    /// Those that did not, or could not be sent.
    pub events_lost: u64,

    /// Readings of all clocks.
    pub clock_reads: u64,
    /// Backwards steps of any clock.
    pub clock_backwards: u64,
    /// Largest time between two readings, by CLOCK_MONOTONIC.
    pub gap_us: u64,
    /// When that gap began (CLOCK_MONOTONIC).
    pub gap_at_ms: u64,
    /// Ticks of the fine timer.
    pub ticks: u64,
    /// Most that a tick was late.
    pub tick_late_us: u64,
    /// Stolen time of all vCPUs.
    pub steal_ms: u64,

    /// Pages of memory checked.
    pub pages: u64,
    /// Pages that were wrong.
    pub pages_bad: u64,
    /// Times that registers were checked.
    pub regs: u64,
    /// Times that a register was wrong.
    pub regs_bad: u64,

    /// Highest journal record that is fsynced; all below are too.
    pub journal: u64,
    /// Versioned sectors written.
    pub rewrites: u64,
    /// Versioned sectors read back and right.
    pub rereads: u64,
    /// Sectors that were wrong, older than what was acknowledged, and requests that failed.
    pub disk_bad: u64,
    /// Slowest disk request.
    pub disk_max_ms: u64,

    /// Frames sent on the TCP stream.
    pub tcp_sent: u64,
    /// Frames that came back on the TCP stream.
    pub tcp_back: u64,
    /// Times that the TCP connection broke.
    pub tcp_breaks: u64,
    /// Longest time from sending a frame on the TCP stream to its coming back.
    pub tcp_max_ms: u64,
    /// Datagrams sent on the UDP stream.
    pub udp_sent: u64,
    /// Datagrams that came back.
    pub udp_back: u64,
    /// Longest time between two that came back.
    pub udp_max_ms: u64,
    /// Datagrams to the receive-only address.
    pub rx: u64,
    /// Highest sequence number among them.
    pub rx_seq: u64,
    /// Longest time between two of them.
    pub rx_max_ms: u64,
    /// Carrier changes of all links (from the kernel's own counters).
    pub link_changes: u64,
    /// Kernel log lines since the witness started.
    pub klog: u64,
}

/// After the fsync of a journal record: this record and all before it are on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalAck {
    /// Sequence number of the record, from 1.
    pub record: u64,
    /// CRC of the record as in [`crate::disk::Record`].
    pub crc: u32,
}

/// The last report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Final {
    /// True if there was no anomaly. Clock gaps and the kernel's lines on stalls do not count: only somebody outside knows
    /// whether the guest was starved.
    pub clean: bool,
    /// Everything once more, after all loads stopped and memory and disk were read in full.
    pub snapshot: Snapshot,
}

/// Something that can be looked at, or the reason why it can't be in this guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Item<T> {
    /// It was read.
    Seen(T),
    /// It could not be.
    Absent(String),
}

impl<T> Item<T> {
    /// What was read.
    pub fn seen(&self) -> Option<&T> {
        match self {
            Item::Seen(t) => Some(t),
            Item::Absent(_) => None,
        }
    }
    /// Why it could not be read.
    pub fn why_absent(&self) -> Option<&str> {
        match self {
            Item::Seen(_) => None,
            Item::Absent(why) => Some(why),
        }
    }
}

impl<T> Default for Item<T> {
    fn default() -> Self {
        Item::Absent("not looked at".into())
    }
}

impl<T, E: fmt::Display> From<Result<T, E>> for Item<T> {
    fn from(r: Result<T, E>) -> Self {
        match r {
            Ok(t) => Item::Seen(t),
            Err(e) => Item::Absent(e.to_string()),
        }
    }
}

/// Everything that a guest can look at, at one time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// `start`, `asked`, `periodic` or `final`.
    pub reason: String,
    /// All counters.
    pub counters: Beat,
    /// Who the guest is.
    pub identity: Identity,
    /// Every xenstore node that the guest can see in its own area, its /vm area and its backends' areas, sorted by path.
    pub store: Item<Vec<StoreNode>>,
    /// Watches that the witness holds, with their events.
    pub watches: Vec<WatchState>,
    /// Event channels that are in use, by EVTCHNOP_status.
    pub ports: Item<Vec<Port>>,
    /// The grant table.
    pub grants: Item<Grants>,
    /// HVM parameters that the guest may read.
    pub hvm_params: Item<Vec<HvmParam>>,
    /// Runstate of each vCPU, by VCPUOP_get_runstate_info.
    pub runstates: Item<Vec<Runstate>>,
    /// Lines of /proc/interrupts.
    pub interrupts: Vec<Interrupt>,
    /// The kernel's log.
    pub kernel_log: KernelLog,
    /// Network links.
    pub links: Vec<Link>,
    /// PV devices as the guest's kernel sees them.
    pub devices: Vec<Device>,
    /// Clocks.
    pub clocks: Clocks,
    /// MemTotal of /proc/meminfo, KiB.
    pub mem_total_kib: u64,
}

/// Who the guest is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// `domid` in its xenstore area.
    pub domid_store: Item<u16>,
    /// ECX of hypervisor CPUID leaf 4 (xen/include/public/arch-x86/cpuid.h).
    pub domid_cpuid: Item<u16>,
    /// /sys/hypervisor/uuid.
    pub uuid_kernel: Item<String>,
    /// Last part of the `vm` node.
    pub uuid_store: Item<String>,
    /// The `name` node.
    pub name: Item<String>,
    /// /sys/hypervisor/version, joined.
    pub xen_version: Item<String>,
    /// CPUID leaves that the guest can see, the host-bound ones left out.
    pub cpuid: Vec<CpuidLeaf>,
}

/// One CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// EAX in.
    pub leaf: u32,
    /// ECX in.
    pub sub: u32,
    /// EAX, EBX, ECX, EDX out.
    pub out: [u32; 4],
}

/// A xenstore node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreNode {
    /// Absolute path.
    pub path: String,
    /// Its value; bytes that are not printable ASCII as `\xNN`, a backslash as `\\`.
    pub value: String,
    /// Its permissions as in xenstore.txt, the parts joined by spaces: `n0 r5`. `?` and an error name if unreadable.
    pub perms: String,
}

/// A watch that the witness holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchState {
    /// Path as registered.
    pub path: String,
    /// Token.
    pub token: String,
    /// True for the watch of the load, whose events are expected.
    pub load: bool,
    /// Events after the one that registering causes.
    pub events: u64,
    /// The last events of a watch that is not the load's, at most 16.
    pub last: Vec<WatchEvent>,
}

/// An event of a watch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchEvent {
    /// When it was read.
    pub mono_ns: u64,
    /// The path it names.
    pub path: String,
}

/// An event channel as EVTCHNOP_status tells it (xen/include/public/event_channel.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Local port.
    pub port: u32,
    /// EVTCHNSTAT_*: 1 unbound, 2 interdomain, 3 pirq, 4 virq, 5 ipi.
    pub status: u32,
    /// vCPU that is notified.
    pub vcpu: u32,
    /// Remote domid for unbound and interdomain.
    pub remote_dom: Option<u16>,
    /// Remote port for interdomain; not the guest's business, so never compared.
    pub remote_port: Option<u32>,
    /// pirq or virq number.
    pub irq: Option<u32>,
}

/// The grant table as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grants {
    /// GNTTABOP_get_version.
    pub version: u32,
    /// GNTTABOP_query_size: frames now.
    pub frames: u32,
    /// GNTTABOP_query_size: most frames.
    pub max_frames: u32,
    /// Grants that the witness holds through /dev/xen/gntalloc, or why it has none.
    pub own: Item<Vec<OwnGrant>>,
}

/// A grant of the witness to its own domid, used for copies with GNTTABOP_copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnGrant {
    /// Grant reference.
    pub gref: u32,
    /// Domid it is granted to.
    pub domid: u16,
}

/// An HVM parameter (xen/include/public/hvm/params.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HvmParam {
    /// Index.
    pub index: u32,
    /// Value.
    pub value: u64,
}

/// vcpu_runstate_info (xen/include/public/vcpu.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runstate {
    /// vCPU.
    pub vcpu: u32,
    /// Xen system time at which the state was entered, ns.
    pub entry_ns: u64,
    /// Time running, runnable, blocked, offline, ns.
    pub time_ns: [u64; 4],
}

/// A line of /proc/interrupts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interrupt {
    /// Number or short name at the line's start.
    pub irq: String,
    /// Sum over the CPUs.
    pub count: u64,
    /// The rest, white space squeezed: chip and names.
    pub name: String,
}

/// The kernel's log since the witness started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelLog {
    /// Lines after start-up was over, the newest last; at most 200.
    pub lines: Vec<KernelLine>,
    /// Lines that were dropped from the front.
    pub dropped: u64,
    /// Sequence number of the last record read.
    pub last_seq: u64,
}

/// A line of /dev/kmsg.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelLine {
    /// Sequence number in the kernel's log.
    pub seq: u64,
    /// The kernel's timestamp, µs.
    pub at_us: u64,
    /// Syslog level, 0 to 7.
    pub level: u8,
    /// What kind of line it is.
    pub class: LineClass,
    /// The text, at most 300 bytes.
    pub text: String,
}

/// A network link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Name.
    pub dev: String,
    /// MAC address.
    pub mac: String,
    /// MTU.
    pub mtu: u32,
    /// `operstate`.
    pub state: String,
    /// `carrier_changes`, kept by the kernel.
    pub carrier_changes: u64,
}

/// A PV device under /sys/bus/xen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Name on the bus, e.g. `vbd-51712`.
    pub name: String,
    /// State as the kernel has it, e.g. `Connected`.
    pub state: String,
    /// Driver bound to it.
    pub driver: String,
}

/// A clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clock {
    /// CLOCK_MONOTONIC.
    Monotonic,
    /// CLOCK_BOOTTIME.
    Boottime,
    /// CLOCK_REALTIME.
    Realtime,
    /// RDTSC.
    Tsc,
}

/// All clocks, read one right after the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockReading {
    /// CLOCK_MONOTONIC, ns.
    pub mono_ns: u64,
    /// CLOCK_BOOTTIME, ns.
    pub boot_ns: u64,
    /// CLOCK_REALTIME, ns.
    pub real_ns: u64,
    /// RDTSC.
    pub tsc: u64,
}

/// What the clock readers saw.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Clocks {
    /// First reading of the run.
    pub first: ClockReading,
    /// Last reading.
    pub last: ClockReading,
    /// TSC frequency, kHz, measured against CLOCK_MONOTONIC in the first seconds; 0 until then.
    pub tsc_khz: u64,
    /// Clock source of the kernel.
    pub clocksource: String,
    /// The largest gaps between two readings, the largest first, at most 12.
    pub gaps: Vec<Gap>,
    /// How often each clock stepped back, and by how much at most.
    pub backwards: Vec<Backwards>,
    /// Steal time of all vCPUs, ms.
    pub steal_ms: u64,
    /// Times that steal time went back.
    pub steal_backwards: u64,
    /// Lateness of the fine timer: how many ticks were late by less than 0.1, 1, 2, 5, 10, 50, 100, 500 ms, and the rest.
    pub tick_late: [u64; 9],
}

/// Two readings with much time between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// CLOCK_MONOTONIC of the reading before it.
    pub at_ns: u64,
    /// By CLOCK_MONOTONIC, ns.
    pub mono_ns: u64,
    /// By CLOCK_BOOTTIME, ns; negative if it stepped back.
    pub boot_ns: i64,
    /// By CLOCK_REALTIME, ns; negative if it stepped back.
    pub real_ns: i64,
    /// By RDTSC, ticks; negative if it stepped back.
    pub tsc: i64,
}

/// Backwards steps of one clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backwards {
    /// Which.
    pub clock: Clock,
    /// How often.
    pub count: u64,
    /// Largest, in ns (ticks for the TSC).
    pub most: u64,
}

/// A promise of the design.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Promise {
    /// domid, uuid and name.
    T1,
    /// The xenstore view; no watch fires because of the move.
    T2,
    /// Watches, transactions, half-done requests.
    T3,
    /// Event channels.
    T4,
    /// The grant table.
    T5,
    /// Shared areas, vectors, callback.
    T6,
    /// Clocks and timers.
    T7,
    /// Ring requests and the disk.
    T8,
    /// The network.
    T9,
    /// Memory and vCPU state.
    T10,
}

impl Promise {
    /// All, in order.
    pub const ALL: [Promise; 10] = [
        Promise::T1,
        Promise::T2,
        Promise::T3,
        Promise::T4,
        Promise::T5,
        Promise::T6,
        Promise::T7,
        Promise::T8,
        Promise::T9,
        Promise::T10,
    ];

    /// What is promised, in a line.
    pub fn says(self) -> &'static str {
        match self {
            Promise::T1 => "domid, uuid and name are unchanged",
            Promise::T2 => "every xenstore node the guest can see is the same, and no watch fires because of the move",
            Promise::T3 => "watches, open transactions and half-sent requests go on",
            Promise::T4 => "every event channel keeps port, type and vCPU; no event is lost",
            Promise::T5 => "the grant table is the same",
            Promise::T6 => "shared areas, upcall vectors and callback stay where the guest put them",
            Promise::T7 => "no clock goes backwards, or forwards by more than the blackout; timers fire",
            Promise::T8 => {
                "every ring request is answered once; what was acknowledged is on the disk, nothing is replayed"
            }
            Promise::T9 => "TCP connections go on; the network learns the new place without the guest",
            Promise::T10 => "memory and vCPU state are the same, bit for bit",
        }
    }
}

impl fmt::Display for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Something that the witness noticed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Anomaly {
    /// When it was noticed.
    pub mono_ns: u64,
    /// What.
    pub what: Noticed,
}

/// What can be noticed. The JSON has the name in `type`, in snake case. Texts are at most 300 bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Noticed {
    /// domid, uuid or name is another.
    Identity {
        /// Which: the name of the field in [`Identity`].
        field: String,
        /// It was.
        before: String,
        /// It is.
        after: String,
    },
    /// A xenstore node changed, came or went. `None`: there is no such node.
    StoreNode {
        /// Path.
        path: String,
        /// Value and permissions before.
        before: Option<String>,
        /// Value and permissions now.
        after: Option<String>,
    },
    /// A store operation failed.
    StoreError {
        /// Operation and path.
        op: String,
        /// The error.
        error: String,
    },
    /// A watch fired that guards what should not change.
    WatchFired {
        /// The watch's path.
        watch: String,
        /// The path that the event names.
        path: String,
    },
    /// The watch load wrote and the event did not come within 10 s.
    WatchSilent {
        /// Path.
        path: String,
        /// Events missing.
        missing: u64,
    },
    /// A long-held transaction ended in an error other than EAGAIN.
    Transaction {
        /// How long it had been open.
        held_ms: u64,
        /// The error.
        error: String,
    },
    /// An event channel is another, came or went.
    PortChanged {
        /// Local port.
        port: u32,
        /// Before.
        before: Option<Port>,
        /// Now.
        after: Option<Port>,
    },
    /// An event did not arrive that was sent through the witness's own event channel.
    EventLost {
        /// The port that it was sent from, and the one that it was for.
        ports: [u32; 2],
        /// What went wrong.
        error: String,
    },
    /// The grant table's version or size is another.
    GrantTable {
        /// `version`, `frames` or `max_frames`.
        field: String,
        /// Before.
        before: u32,
        /// Now.
        after: u32,
    },
    /// A copy through the witness's own grants failed or gave wrong bytes.
    GrantCopy {
        /// Source and destination references.
        grefs: [u32; 2],
        /// What went wrong.
        error: String,
    },
    /// An interrupt line came or went.
    InterruptLine {
        /// Number and name.
        line: String,
        /// True if it came.
        came: bool,
    },
    /// A line of the kernel's log that is of interest.
    KernelLine(KernelLine),
    /// A clock went backwards.
    ClockBackwards {
        /// Which.
        clock: Clock,
        /// By how much, ns (ticks for the TSC).
        by: u64,
    },
    /// A clock moved against CLOCK_MONOTONIC by more than the tolerance between two readings.
    ClockStep {
        /// Which.
        clock: Clock,
        /// By how much, ns.
        by_ns: i64,
        /// Time between the readings by CLOCK_MONOTONIC.
        gap_ns: u64,
    },
    /// Nothing was read for longer than the tolerance.
    ClockGap(Gap),
    /// Steal time went backwards or grew by more than the time that passed.
    Steal {
        /// Before, ms.
        before_ms: u64,
        /// Now, ms.
        after_ms: u64,
    },
    /// A page is not what was written to it.
    Page {
        /// Index in the region.
        page: u64,
        /// First wrong byte.
        offset: u32,
        /// What was written there.
        want: u64,
        /// What is there.
        found: u64,
    },
    /// A register lost what was put into it.
    Register {
        /// Name.
        register: String,
        /// What was put into it.
        want: u64,
        /// What was in it.
        found: u64,
    },
    /// A disk request failed.
    DiskError {
        /// Request.
        op: String,
        /// Byte offset.
        offset: u64,
        /// The error.
        error: String,
    },
    /// A sector holds something else than the last acknowledged write.
    DiskWrong {
        /// Slot (rewritten sectors) or record (journal).
        slot: u64,
        /// `journal` or `rewrite`.
        area: String,
        /// The last acknowledged version.
        want: u64,
        /// What it holds: a version, or 0 if it is no valid sector.
        found: u64,
    },
    /// The TCP stream broke.
    TcpBroken {
        /// How.
        error: String,
        /// Frames sent and not come back.
        outstanding: u64,
    },
    /// A frame on the TCP stream was not the next one.
    TcpOrder {
        /// Sequence number that was due.
        want: u64,
        /// That came.
        found: u64,
    },
    /// A link's carrier or state is another.
    LinkChanged {
        /// Before.
        before: Link,
        /// Now.
        after: Link,
    },
    /// A PV device's state is another.
    DeviceChanged {
        /// Name.
        name: String,
        /// State before.
        before: String,
        /// State now.
        after: String,
    },
}

impl Noticed {
    /// The promise that it speaks against, if what was noticed was caused by the move.
    pub fn promise(&self) -> Promise {
        match self {
            Noticed::Identity { .. } => Promise::T1,
            Noticed::StoreNode { .. } | Noticed::WatchFired { .. } | Noticed::DeviceChanged { .. } => Promise::T2,
            Noticed::StoreError { .. } | Noticed::WatchSilent { .. } | Noticed::Transaction { .. } => Promise::T3,
            Noticed::PortChanged { .. } | Noticed::EventLost { .. } | Noticed::InterruptLine { .. } => Promise::T4,
            Noticed::GrantTable { .. } | Noticed::GrantCopy { .. } => Promise::T5,
            Noticed::KernelLine(line) => line.class.promise(),
            Noticed::ClockBackwards { .. }
            | Noticed::ClockStep { .. }
            | Noticed::ClockGap(_)
            | Noticed::Steal { .. } => Promise::T7,
            Noticed::DiskError { .. } | Noticed::DiskWrong { .. } => Promise::T8,
            Noticed::TcpBroken { .. } | Noticed::TcpOrder { .. } | Noticed::LinkChanged { .. } => Promise::T9,
            Noticed::Page { .. } | Noticed::Register { .. } => Promise::T10,
        }
    }
}

/// `?` stands for "no such node, port…".
fn or_none<T: fmt::Display>(v: &Option<T>) -> String {
    v.as_ref().map_or_else(|| "none".into(), ToString::to_string)
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.status {
            0 => "closed",
            1 => "unbound",
            2 => "interdomain",
            3 => "pirq",
            4 => "virq",
            5 => "ipi",
            _ => "unknown",
        };
        write!(f, "{kind}")?;
        if let Some(dom) = self.remote_dom {
            write!(f, " d{dom}")?;
        }
        if let Some(irq) = self.irq {
            write!(f, " {irq}")?;
        }
        write!(f, " vCPU {}", self.vcpu)
    }
}

impl fmt::Display for Noticed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Noticed::Identity { field, before, after } => write!(f, "{field} was {before}, is {after}"),
            Noticed::StoreNode { path, before, after } => {
                write!(f, "store node {path} was {}, is {}", or_none(before), or_none(after))
            }
            Noticed::StoreError { op, error } => write!(f, "store {op}: {error}"),
            Noticed::WatchFired { watch, path } => write!(f, "watch on {watch} fired for {path}"),
            Noticed::WatchSilent { path, missing } => write!(f, "{missing} events of the watch on {path} did not come"),
            Noticed::Transaction { held_ms, error } => write!(f, "transaction held for {held_ms} ms ended in {error}"),
            Noticed::PortChanged { port, before, after } => {
                write!(f, "port {port} was {}, is {}", or_none(before), or_none(after))
            }
            Noticed::EventLost { ports: [from, to], error } => write!(f, "event from port {from} to {to}: {error}"),
            Noticed::GrantTable { field, before, after } => {
                write!(f, "grant table's {field} was {before}, is {after}")
            }
            Noticed::GrantCopy { grefs: [from, to], error } => write!(f, "copy from grant {from} to {to}: {error}"),
            Noticed::InterruptLine { line, came } => {
                write!(f, "interrupt line \"{line}\" {}", if *came { "came" } else { "went" })
            }
            Noticed::KernelLine(l) => write!(f, "kernel said at {:.3} s: {}", l.at_us as f64 / 1e6, l.text),
            Noticed::ClockBackwards { clock, by } => write!(f, "clock {clock:?} went back by {by}"),
            Noticed::ClockStep { clock, by_ns, gap_ns } => {
                write!(f, "clock {clock:?} stepped by {by_ns} ns against Monotonic within {gap_ns} ns")
            }
            Noticed::ClockGap(g) => write!(f, "no clock reading for {:.3} ms", g.mono_ns as f64 / 1e6),
            Noticed::Steal { before_ms, after_ms } => write!(f, "steal time was {before_ms} ms, is {after_ms} ms"),
            Noticed::Page { page, offset, want, found } => {
                write!(f, "memory page {page} at {offset:#x}: wrote {want:#018x}, found {found:#018x}")
            }
            Noticed::Register { register, want, found } => {
                write!(f, "register {register}: put {want:#018x}, found {found:#018x}")
            }
            Noticed::DiskError { op, offset, error } => write!(f, "disk {op} at byte {offset}: {error}"),
            Noticed::DiskWrong { slot, area, want, found } => {
                write!(f, "disk {area} slot {slot}: version {want} was acknowledged, {found} is there")
            }
            Noticed::TcpBroken { error, outstanding } => {
                write!(f, "TCP stream broke with {outstanding} frames out: {error}")
            }
            Noticed::TcpOrder { want, found } => write!(f, "TCP stream: frame {want} was due, {found} came"),
            Noticed::LinkChanged { before, after } => write!(
                f,
                "link {}: {} with {} carrier changes, was {} with {}",
                after.dev, after.state, after.carrier_changes, before.state, before.carrier_changes
            ),
            Noticed::DeviceChanged { name, before, after } => write!(f, "device {name} was {before}, is {after}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{MAX_DATAGRAM, VERSION, parse_report};

    fn envelope(body: Body) -> Envelope {
        Envelope { v: VERSION, run: u64::MAX, seq: 1 << 30, mono_ns: 1 << 50, real_ns: 1 << 61, body }
    }

    #[test]
    fn every_body_survives_json() {
        let gap = Gap { at_ns: 1, mono_ns: 2, boot_ns: -3, real_ns: 4, tsc: 5 };
        for body in [
            Body::Beat(Beat::default()),
            Body::Journal(JournalAck { record: 3, crc: 9 }),
            Body::Anomaly(Anomaly { mono_ns: 5, what: Noticed::ClockGap(gap) }),
            Body::Anomaly(Anomaly {
                mono_ns: 5,
                what: Noticed::KernelLine(KernelLine {
                    seq: 2,
                    at_us: 1,
                    level: 4,
                    class: LineClass::Stall,
                    text: "x".into(),
                }),
            }),
            Body::Snapshot(Box::default()),
            Body::Final(Box::new(Final { clean: true, snapshot: Snapshot::default() })),
        ] {
            let e = envelope(body);
            let text = serde_json::to_vec(&e).unwrap();
            assert!(text.starts_with(b"{\"v\":"));
            assert_eq!(parse_report(&text).unwrap(), e);
        }
    }

    #[test]
    fn a_day_of_counters_fits_a_datagram() {
        // Every number as large as a day at a thousand a second makes it.
        let text = serde_json::to_string(&Beat::default()).unwrap();
        let numbers = text.matches(":0").count();
        let e = serde_json::to_vec(&envelope(Body::Beat(Beat::default()))).unwrap();
        assert!(e.len() + numbers * 7 <= MAX_DATAGRAM, "{} + {numbers} numbers of 8 digits", e.len());
    }
}
