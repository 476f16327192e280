//! Guest-transparent state: what of a domain stock Xen neither shows nor accepts, and the extension does.
//!
//! Points in time are nanoseconds of the **guest's** system time: the host's `NOW()` plus the domain's clock offset. So what was read on
//! one host can be set on another without arithmetic, once the clock offset is set there.

use crate::types::{DomId, Gfn, Port};
use serde::{Deserialize, Serialize};

/// All of a domain's guest-transparent state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GtState {
    /// The guest uses the 32-bit layout of shared_info (`has_32bit_shinfo`).
    pub guest_is_32bit: bool,
    /// Host's `NOW()` when this was read. Not set.
    pub host_now_ns: i64,
    /// Guest's system time minus host's `NOW()`; 0 for a domain that was born here.
    pub clock_offset_ns: i64,
    /// The guest's wall clock at its system time 0. Set with the clock offset; 0 there lets it follow the host's.
    pub wall_clock: WallClock,
    /// 1 or 2; what the guest uses.
    pub grant_version: u32,
    /// Highest port that the domain may ever use (`XEN_DOMCTL_createdomain`'s `max_evtchn_port`). Not set.
    pub max_evtchn_port: Port,
    /// `XEN_DOMCTL_CDF_*` that the domain was created with. Not set.
    pub create_flags: u32,
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

impl GtState {
    /// The guest's system time when this was read.
    pub fn guest_now_ns(&self) -> i64 {
        self.host_now_ns.saturating_add(self.clock_offset_ns)
    }
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
    /// It became pending before its event word was there (`evtchn.pending`).
    pub pending_early: bool,
    /// Xen itself handles events on the guest's side (an ioreq server's port). Such ports are not set: they come with the device model.
    pub xen_consumer: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GtPortKind {
    Unbound {
        remote: DomId,
    },
    /// On a set the port becomes unbound for `remote`, whose backend binds it again. A pair within the guest is connected again.
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

/// Seconds and nanoseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WallClock {
    pub sec: u64,
    /// Below 10^9.
    pub nsec: u32,
}

impl WallClock {
    /// Nanoseconds since 1970.
    pub fn ns(self) -> i64 {
        i64::try_from(self.sec).unwrap_or(i64::MAX).saturating_mul(1_000_000_000).saturating_add(self.nsec.into())
    }
}

/// `struct vcpu_runstate_info`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runstate {
    /// `RUNSTATE_*`. Not set.
    pub state: u32,
    /// When the vCPU entered it. Not set: a restored vCPU enters its state at the set.
    pub entry_time_ns: i64,
    /// Nanoseconds spent running, runnable, blocked, offline, up to `entry_time_ns`.
    pub time_ns: [i64; 4],
}

impl Runstate {
    /// The counters as they stand at that point of the guest's system time: what to set elsewhere, so that the time since the last
    /// change of state is not lost.
    pub fn at(&self, guest_now_ns: i64) -> Runstate {
        let mut now = Runstate { entry_time_ns: guest_now_ns, ..*self };
        if let Some(t) = now.time_ns.get_mut(self.state as usize) {
            *t = t.saturating_add(guest_now_ns.saturating_sub(self.entry_time_ns).max(0));
        }
        now
    }
}

/// Where a vCPU's FIFO control block is, and what Xen knows of its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FifoVcpu {
    pub control_block: GuestPlace,
    /// The last port on the queue of each priority, 0 if it is empty.
    pub tails: [Port; 16],
}

/// What a vCPU's TSC reads at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TscPoint {
    pub ticks: u64,
    /// Guest's system time.
    pub at_ns: i64,
}

/// One vCPU's guest-transparent state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GtVcpu {
    /// It has been given a context. Not set: the HVM context does that.
    pub initialised: bool,
    /// It has not been brought up. Not set, likewise.
    pub down: bool,
    /// It waits in `SCHEDOP_poll`. Not set: it may wake without cause.
    pub polling: bool,
    /// `None`: in shared_info, where Xen puts those of the first 32 vCPUs.
    pub vcpu_info: Option<GuestPlace>,
    pub runstate_area: Option<GuestArea>,
    pub time_area: Option<GuestArea>,
    pub runstate: Runstate,
    /// `HVMOP_set_evtchn_upcall_vector`; 0: not set.
    pub upcall_vector: u8,
    /// `None`: the vCPU has no FIFO control block.
    pub fifo: Option<FifoVcpu>,
    /// When the single-shot timer will fire; `None`: it is stopped.
    pub singleshot_ns: Option<i64>,
    /// Period of the periodic timer, 0 if it is stopped.
    pub periodic_period_ns: i64,
    /// Last tick of the periodic timer.
    pub periodic_last_ns: i64,
    /// A point that its TSC runs through. The TSC of the HVM context is of a moment that nobody knows.
    pub tsc: TscPoint,
}

/// A `SCHEDOP_watchdog` timer. It runs in host time, also while the domain is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watchdog {
    /// As the guest knows it, 1 or 2.
    pub id: u32,
    /// Nanoseconds left until it bites; in a set, counted from the set.
    pub remaining_ns: i64,
}

/// A pirq that stands for an emulated interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EmuIrq {
    pub pirq: u32,
    /// GSI of the emulated interrupt, or `xen_abi::ext::EMUIRQ_*`.
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
    /// `emuirqs`: before the ports that are bound to them.
    EmuIrqs,
    /// `ports`: at their exact numbers, with vCPU, priority and last queue. Interdomain ones become unbound for their remote domain.
    Ports,
    /// `event_array`.
    EventArray,
    /// `vcpus[..].fifo.tails`: after the event array.
    FifoTails,
    /// Places of vcpu_info, runstate and time areas, upcall vectors.
    VcpuAreas,
    /// `clock_offset_ns` and `wall_clock`, everywhere the guest can see the host's time. May be set again at the end, when the length of the
    /// blackout is known: running timers keep their expiry in the guest's time.
    ClockOffset,
    /// Runstate counters, periodic and single-shot timers, TSC: points in the guest's time, so after its clock offset.
    VcpuTimes,
    /// `watchdogs`: an empty list disarms all.
    Watchdogs,
}

impl GtStep {
    /// Every step, in order.
    pub const ALL: [GtStep; 11] = [
        GtStep::AddressWidth,
        GtStep::GrantVersion,
        GtStep::FifoControlBlocks,
        GtStep::EmuIrqs,
        GtStep::Ports,
        GtStep::EventArray,
        GtStep::FifoTails,
        GtStep::VcpuAreas,
        GtStep::ClockOffset,
        GtStep::VcpuTimes,
        GtStep::Watchdogs,
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_the_present_runstate_is_added_once() {
        let r = Runstate { state: 2, entry_time_ns: 100, time_ns: [1, 2, 3, 4] };
        let at = r.at(150);
        assert_eq!(at.time_ns, [1, 2, 53, 4]);
        assert_eq!(at.at(150), at);
        assert_eq!(r.at(90).time_ns, r.time_ns, "time never goes back");
    }

    #[test]
    fn the_steps_are_listed_in_their_order() {
        assert!(GtStep::ALL.is_sorted());
    }
}
