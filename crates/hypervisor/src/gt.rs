//! Guest-transparent state: what of a domain stock Xen neither shows nor accepts, and the extension does.
//!
//! Times are nanoseconds of the *host's* system time unless said otherwise; whoever moves a domain shifts them by
//! the difference of the clock offsets.

use crate::types::{DomId, Gfn, Port};
use serde::{Deserialize, Serialize};

/// All of a domain's guest-transparent state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GtState {
    /// The guest uses the 32-bit layout of shared_info (`has_32bit_shinfo`).
    pub guest_is_32bit: bool,
    /// Added to the host's `NOW()` wherever the guest is told the time; 0 for a domain that was born here.
    pub clock_offset_ns: i64,
    /// 1 or 2; what the guest uses.
    pub grant_version: u32,
    /// Highest port that the domain may ever use (`XEN_DOMCTL_createdomain`'s `max_evtchn_port`).
    pub max_evtchn_port: Port,
    /// `Some` if the guest uses the FIFO ABI; frames of the event array in order, 1024 ports each.
    pub event_array: Option<Vec<Gfn>>,
    /// Every port that is not closed, ascending.
    pub ports: Vec<GtPort>,
    /// One for each vCPU, in order.
    pub vcpus: Vec<GtVcpu>,
    pub watchdogs: Vec<Watchdog>,
    /// Emulated interrupts that the guest has routed to event channels (HVM with pirqs).
    pub emuirqs: Vec<EmuIrq>,
}

/// One event-channel port of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GtPort {
    pub port: Port,
    pub kind: GtPortKind,
    pub vcpu: u32,
    /// FIFO ABI: 0 highest to 15; 7 is the default.
    pub priority: u8,
    /// FIFO ABI: the queue that the port was last put on (`fifo_lastq`).
    pub last_vcpu: u16,
    pub last_priority: u8,
    /// Xen's own pending flag for the port (`evtchn->pending`; a port set up before its bit could be raised).
    pub pending: bool,
    /// Not 0: Xen itself handles events on the guest's side (an ioreq server's port).
    pub consumer: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GtPortKind {
    Unbound {
        remote: DomId,
    },
    /// On a set the port becomes unbound for `remote`, whose backend binds it again.
    Interdomain {
        remote: DomId,
        remote_port: Port,
    },
    Virq(u32),
    Ipi,
    Pirq(u32),
}

/// A place in guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestPlace {
    pub gfn: Gfn,
    /// Bytes from the start of the frame.
    pub offset: u32,
}

/// Where a guest asked Xen to keep an area up to date.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestArea {
    /// By guest virtual address (`VCPUOP_register_*_memory_area`).
    Virtual(u64),
    /// By guest-physical place (`VCPUOP_register_*_phys_area`, Xen 4.18 and later).
    Physical(GuestPlace),
}

/// `struct vcpu_runstate_info`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runstate {
    /// `RUNSTATE_*`.
    pub state: u32,
    /// When the vCPU entered it.
    pub entry_time_ns: u64,
    /// Nanoseconds spent running, runnable, blocked, offline.
    pub time_ns: [u64; 4],
}

/// Where a vCPU's FIFO control block is, and what Xen knows of its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FifoVcpu {
    pub control_block: GuestPlace,
    /// The last port on the queue of each priority, 0 if it is empty.
    pub tails: [Port; 16],
}

/// One vCPU's guest-transparent state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GtVcpu {
    /// `None`: in shared_info, where Xen puts those of the first 32 vCPUs.
    pub vcpu_info: Option<GuestPlace>,
    pub runstate_area: Option<GuestArea>,
    pub time_area: Option<GuestArea>,
    pub runstate: Runstate,
    /// `HVMOP_set_evtchn_upcall_vector`; 0: not set.
    pub upcall_vector: u8,
    /// `None`: the vCPU has no FIFO control block.
    pub fifo: Option<FifoVcpu>,
    /// When the single-shot timer will fire.
    pub singleshot_ns: Option<u64>,
    /// Period of the periodic timer, 0 if it is stopped.
    pub periodic_period_ns: u64,
    /// When the periodic timer last fired.
    pub periodic_last_ns: u64,
}

/// A `SCHEDOP_watchdog` timer. It runs in host time, also while the domain is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watchdog {
    /// As the guest knows it, 1 or 2.
    pub id: u32,
    /// Nanoseconds left until it bites.
    pub remaining_ns: u64,
}

/// A pirq that stands for an emulated interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EmuIrq {
    pub pirq: u32,
    pub emuirq: i32,
}

/// The steps in which a [`GtState`] is put into a fresh, paused domain; this is their order. Other steps of the restore
/// (memory, grant table, shared_info, HVM context) lie between them, so each is a call of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum GtStep {
    /// `guest_is_32bit`: decides the layout of shared_info, so before that is placed.
    AddressWidth,
    /// `grant_version`: before the table is grown and filled.
    GrantVersion,
    /// `vcpus[..].fifo.control_block`: while no port is allocated.
    FifoControlBlocks,
    /// `ports`: at their exact numbers. Interdomain ones become unbound for their remote domain.
    Ports,
    /// `event_array`.
    EventArray,
    /// Priorities, `fifo_lastq`, queue tails: after all ports exist.
    FifoQueues,
    /// Places of vcpu_info, runstate and time areas, upcall vectors.
    VcpuAreas,
    /// Runstate counters, periodic and single-shot timers.
    VcpuTimes,
    /// `emuirqs`.
    EmuIrqs,
    /// `clock_offset_ns`, everywhere the guest can see the host's time.
    ClockOffset,
    /// `watchdogs`: an empty list disarms all.
    Watchdogs,
}
