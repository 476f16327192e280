//! The ABI of Ferry's hypervisor extension: what a hot-loaded Xen answers beyond its own hypercalls.
//!
//! One hypercall carries all of it: `__HYPERVISOR_domctl` with [`DOMCTL`] as its command, the target's domid in
//! `domain`, and a [`Request`] in the union `u`. The request names an operation and points to a buffer of the caller.
//! The same file is compiled into the extension itself (`hypervisor-ext`), so it depends on nothing and allocates nothing.
//!
//! Rules that hold for every operation:
//! * All integers are in the machine's own byte order (little endian), all structures are `repr(C)` without implicit padding.
//! * Every structure begins with its own size and [`ABI_VERSION`]; the extension refuses others with `-EINVAL`
//!   ([`Fault::SIZE`], [`Fault::VERSION`]).
//! * The caller must be the control domain (Xen's own check of a domctl). For every SET the target must be another domain,
//!   paused by its controller (`XEN_DOMCTL_pausedomain`), and not dying.
//! * A SET either does all that it was asked for or changes nothing, except [`op::SET_PORTS`], [`op::SET_PIRQS`] (which say in
//!   [`Request::done`] how many entries were taken) and [`op::SET_VCPU`] and [`op::SET_DOMAIN`] when the hypervisor runs
//!   out of memory or a page of the guest cannot be mapped (then the fields in front of the one named by
//!   [`Request::fault`] are set).
//! * Absolute times are nanoseconds of the **guest's** system time: the host's `NOW()` plus the domain's clock offset. So a time that
//!   was read on one host can be written on another without arithmetic, once the offset is set there.
//!
//! Errors (negative errno of Xen, as the hypercall's result): `EPERM` caller, `ESRCH` no such domain, `ENOSYS` extension not
//! loaded, `EOPNOTSUPP` operation or guest type, `EBUSY` target not paused or port/area taken, `EINVAL` a value (see
//! [`Request::fault`]), `ENOENT` no such vCPU, `ENOBUFS` buffer too small, `EFAULT` buffer not accessible, `ENOSPC` port past the
//! limit, `ENOMEM`.

/// The domctl command. Xen's own commands are small numbers; this is "FER1" read as a big-endian word.
pub const DOMCTL: u32 = 0x4645_5231;
/// [`Request::magic`]: "FERRYEXT" cut to a word, so that a stray domctl is not taken for ours.
pub const MAGIC: u32 = 0x5458_4546;
/// Version of this file's structures. Changes whenever the meaning or place of a field changes.
pub const ABI_VERSION: u32 = 2;
/// Xen's `XEN_DOMCTL_*` union `u` has this many bytes (xen/include/public/domctl.h, `pad`).
pub const DOMCTL_UNION_SIZE: usize = 128;
/// A gfn field that has no page.
pub const NO_GFN: u64 = u64::MAX;
/// A guest address field (runstate area, time area) that is not registered.
pub const NO_ADDRESS: u64 = 0;
/// Queues of one vCPU's FIFO control block (xen/include/public/event_channel.h, `EVTCHN_FIFO_MAX_QUEUES`).
pub const FIFO_QUEUES: usize = 16;
/// Most event-array pages a domain can have: 2^17 ports, 1024 words to a page (`EVTCHN_FIFO_NR_CHANNELS`).
pub const FIFO_MAX_PAGES: usize = 128;
/// Ports described by one event-array page.
pub const FIFO_WORDS_PER_PAGE: u32 = 1024;
/// Entries of a vCPU's VIRQ table (xen/include/public/xen.h, `NR_VIRQS`).
pub const VIRQS: usize = 24;
/// Watchdogs of one domain (xen/include/xen/sched.h, `NR_DOMAIN_WATCHDOG_TIMERS`).
pub const WATCHDOGS: usize = 2;
/// Most port or pirq entries that one request may carry, so that the time in the hypervisor is bounded.
pub const MAX_ENTRIES: u32 = 1024;
/// Largest absolute value of a clock offset, in ns: 100 years.
pub const MAX_CLOCK_OFFSET: i64 = 100 * 366 * 86_400 * 1_000_000_000;

/// Errno with which the extension refuses to be reverted while a domain lives by its clock offset: ETXTBSY, which Xen itself never answers to
/// that (its EBUSY says that its CPUs could not be gathered in time, and is worth another try).
pub const REVERT_REFUSED_ERRNO: i32 = 26;

/// [`Request::op`].
pub mod op {
    /// Fills an [`super::Info`]. The target may be any domain, such as domain 0; it is not looked at.
    pub const INFO: u32 = 0;
    /// Fills a [`super::DomainState`].
    pub const GET_DOMAIN: u32 = 1;
    /// Fills a [`super::VcpuState`] for [`super::Request::index`]. Of a domain that its controller paused, it also brings the CR2 that a
    /// following `XEN_DOMCTL_gethvmcontext` reads up to date, which Xen 4.17 does not do on AMD.
    pub const GET_VCPU: u32 = 2;
    /// Fills up to [`super::Request::count`] entries of [`super::PortState`], from port [`super::Request::index`] on. Ports that are
    /// free are left out. [`super::Request::next`] is the port to go on from, 0 when there are no more.
    pub const GET_PORTS: u32 = 3;
    /// Fills up to [`super::Request::count`] entries of [`super::PirqState`], from pirq [`super::Request::index`] on, those without
    /// an event channel and without an emulated interrupt left out. [`super::Request::next`] as for ports.
    pub const GET_PIRQS: u32 = 4;
    /// Applies those parts of a [`super::DomainState`] that its `fields` names ([`super::domain_fields`]).
    pub const SET_DOMAIN: u32 = 16;
    /// Applies those parts of a [`super::VcpuState`] that its `fields` names ([`super::vcpu_fields`]), to vCPU
    /// [`super::Request::index`].
    pub const SET_VCPU: u32 = 17;
    /// Makes [`super::Request::count`] ports from entries of [`super::PortState`], in order, each at its exact number.
    pub const SET_PORTS: u32 = 18;
    /// Makes [`super::Request::count`] pirq entries from [`super::PirqState`]. Ports of type pirq are made after, by `SET_PORTS`.
    pub const SET_PIRQS: u32 = 19;
    /// Sets the domain's clock offset from a [`super::ClockOffset`]. Running timers keep their expiry in the guest's time.
    pub const SET_CLOCK: u32 = 20;
}

/// The domctl's payload: lies at the start of `struct xen_domctl`'s union `u`. 64 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// In: [`MAGIC`].
    pub magic: u32,
    /// In: [`ABI_VERSION`].
    pub version: u32,
    /// In: one of [`op`].
    pub op: u32,
    /// In: vCPU, or first port or pirq.
    pub index: u32,
    /// In: entries that the buffer holds, for the operations on lists; 0 for the others. At most [`MAX_ENTRIES`].
    pub count: u32,
    /// In: bytes of one entry, or of the one structure.
    pub entry_size: u32,
    /// In: address of the buffer in the caller.
    pub buffer: u64,
    /// Out: entries filled or taken; 1 for the operations on one structure.
    pub done: u32,
    /// Out: where to go on in a list, 0 at its end.
    pub next: u32,
    /// Out: with `-EINVAL` and its kin, one of [`Fault`]: which value was refused.
    pub fault: u32,
    /// Must be 0.
    pub reserved: [u32; 5],
}

/// [`Request::fault`]: which value was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

impl Fault {
    /// Nothing was refused.
    pub const NONE: u32 = 0;
    /// A structure's size, or [`Request::entry_size`], is not this version's.
    pub const SIZE: u32 = 1;
    /// A version is not [`ABI_VERSION`].
    pub const VERSION: u32 = 2;
    /// [`Request::op`].
    pub const OP: u32 = 3;
    /// [`Request::count`].
    pub const COUNT: u32 = 4;
    /// A reserved field that is not 0.
    pub const RESERVED: u32 = 5;
    /// The target is the caller, or one of Xen's own domains.
    pub const TARGET: u32 = 6;
    /// The target is not paused by its controller.
    pub const NOT_PAUSED: u32 = 7;
    /// The target is dying.
    pub const DYING: u32 = 8;
    /// The target is not an HVM or PVH guest.
    pub const NOT_HVM: u32 = 9;
    /// [`Request::index`]: no such vCPU.
    pub const VCPU: u32 = 10;
    /// A bit of `fields` that cannot be set.
    pub const FIELDS: u32 = 11;
    /// The 32-bit flag: ports exist already, or shared areas are placed.
    pub const WIDTH: u32 = 12;
    /// The event array: no control block yet, too many pages, or pages there already.
    pub const FIFO_ARRAY: u32 = 13;
    /// A FIFO control block: its offset, its page, or one is there already.
    pub const FIFO_CONTROL: u32 = 14;
    /// A queue tail past the event array, or no control block.
    pub const FIFO_TAIL: u32 = 15;
    /// The vcpu_info's place.
    pub const VCPU_INFO: u32 = 16;
    /// The runstate area's address.
    pub const RUNSTATE_AREA: u32 = 17;
    /// The time area's address.
    pub const TIME_AREA: u32 = 18;
    /// A runstate counter: negative or past 2^62.
    pub const RUNSTATE: u32 = 19;
    /// The upcall vector: 1 to 15.
    pub const UPCALL: u32 = 20;
    /// The singleshot timer's expiry.
    pub const SINGLESHOT: u32 = 21;
    /// The periodic timer's period.
    pub const PERIODIC: u32 = 22;
    /// A watchdog.
    pub const WATCHDOG: u32 = 23;
    /// A port's number: 0, past the limit, or taken.
    pub const PORT: u32 = 24;
    /// A port's state, or its combination with other fields.
    pub const PORT_STATE: u32 = 25;
    /// A port's remote domain.
    pub const PORT_REMOTE: u32 = 26;
    /// A port's VIRQ: unknown, global on a vCPU other than 0, or bound already.
    pub const PORT_VIRQ: u32 = 27;
    /// A port's vCPU, or the vCPU of its last queue.
    pub const PORT_VCPU: u32 = 28;
    /// A port's priority, or the priority of its last queue.
    pub const PORT_PRIORITY: u32 = 29;
    /// A port's pirq: unknown, or bound already.
    pub const PORT_PIRQ: u32 = 30;
    /// A pirq entry.
    pub const PIRQ: u32 = 31;
    /// The clock offset: larger than [`MAX_CLOCK_OFFSET`].
    pub const CLOCK: u32 = 32;
    /// The buffer.
    pub const BUFFER: u32 = 33;
    /// The moment of a TSC.
    pub const TSC: u32 = 34;

    /// What a value of [`Request::fault`] means, in words for a message.
    pub const fn describe(fault: u32) -> &'static str {
        match fault {
            Self::NONE => "no particular value",
            Self::SIZE => "the size of a structure (is the extension of the same version as this program?)",
            Self::VERSION => "the version of a structure (is the extension of the same version as this program?)",
            Self::OP => "the operation's number",
            Self::COUNT => "the number of entries",
            Self::RESERVED => "a reserved field that is not 0",
            Self::TARGET => "the target domain (the caller itself, or one of Xen's own)",
            Self::NOT_PAUSED => "the target domain is not paused by its controller",
            Self::DYING => "the target domain is dying",
            Self::NOT_HVM => "the target domain is neither HVM nor PVH",
            Self::VCPU => "the vCPU's number",
            Self::FIELDS => "a field that cannot be set",
            Self::WIDTH => "the 32-bit flag (ports or areas are there already)",
            Self::FIFO_ARRAY => "the FIFO event array",
            Self::FIFO_CONTROL => "the FIFO control block",
            Self::FIFO_TAIL => "a FIFO queue's tail",
            Self::VCPU_INFO => "the vcpu_info's place",
            Self::RUNSTATE_AREA => "the runstate area's address",
            Self::TIME_AREA => "the time area's address",
            Self::RUNSTATE => "a runstate counter",
            Self::UPCALL => "the upcall vector",
            Self::SINGLESHOT => "the singleshot timer's expiry",
            Self::PERIODIC => "the periodic timer's period",
            Self::WATCHDOG => "a watchdog",
            Self::PORT => "an event channel's port number (0, past the limit, or taken)",
            Self::PORT_STATE => "an event channel's state",
            Self::PORT_REMOTE => "an event channel's remote domain",
            Self::PORT_VIRQ => "an event channel's VIRQ",
            Self::PORT_VCPU => "an event channel's vCPU",
            Self::PORT_PRIORITY => "an event channel's priority",
            Self::PORT_PIRQ => "an event channel's pirq",
            Self::PIRQ => "a pirq entry",
            Self::CLOCK => "the clock offset",
            Self::BUFFER => "the buffer",
            Self::TSC => "the moment of a TSC",
            _ => "a value this program does not know",
        }
    }
}

/// What [`op::INFO`] tells of the loaded extension. 64 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// Bytes of this structure.
    pub size: u32,
    /// [`ABI_VERSION`].
    pub version: u32,
    /// [`features`].
    pub features: u64,
    /// Build-id of the hypervisor that the extension was made for (GNU note, 20 bytes).
    pub build_id: [u8; 20],
    /// Domains that have a clock offset other than 0. The extension cannot be unloaded while there is one.
    pub clock_domains: u32,
    /// Host's `NOW()`, ns since the hypervisor started.
    pub now: i64,
    /// Host's wall clock minus host's `NOW()`: seconds since 1970 ...
    pub wc_sec: u64,
    /// ... and nanoseconds, below 10^9.
    pub wc_nsec: u32,
    /// 0.
    pub reserved: u32,
}

/// [`Info::features`].
pub mod features {
    /// The GET operations.
    pub const GET: u64 = 1 << 0;
    /// The SET operations, but for the clock.
    pub const SET: u64 = 1 << 1;
    /// [`super::op::SET_CLOCK`].
    pub const CLOCK: u64 = 1 << 2;
}

/// [`DomainState::flags`]; not settable but for [`domain_flags::WIDTH_32`].
pub mod domain_flags {
    /// HVM or PVH guest.
    pub const HVM: u32 = 1 << 0;
    /// The guest uses FIFO event channels; otherwise the 2-level ABI.
    pub const FIFO: u32 = 1 << 1;
    /// shared_info, vcpu_info and the areas have the 32-bit layout (`has_32bit_shinfo`).
    pub const WIDTH_32: u32 = 1 << 2;
    /// Paused by its controller.
    pub const PAUSED: u32 = 1 << 3;
    /// Dying.
    pub const DYING: u32 = 1 << 4;
    /// Has shut down, or is about to.
    pub const SHUTDOWN: u32 = 1 << 5;
    /// Its TSC is emulated (`vtsc`).
    pub const VTSC: u32 = 1 << 6;
    /// Uses pirqs for emulated interrupts (`XENFEAT_hvm_pirqs`).
    pub const HVM_PIRQS: u32 = 1 << 7;
    /// [`super::DomainState::time_offset`] has been set by somebody.
    pub const TIME_OFFSET_SET: u32 = 1 << 8;
}

/// [`DomainState::fields`]: in a SET, what to apply; in a GET, what the structure holds.
pub mod domain_fields {
    /// [`super::domain_flags::WIDTH_32`]. Only while no port is open and no vcpu_info is placed: changing it later would move
    /// what the guest sees. Apply it first.
    pub const WIDTH_32: u64 = 1 << 0;
    /// `fifo_pages` and `fifo_array`. Raises nothing: words and queues are in the guest's memory. The control block of at least one vCPU
    /// must be set before; ports should be (a page that holds a stale LINKED bit makes its port unallocatable).
    pub const FIFO_ARRAY: u64 = 1 << 1;
    /// `watchdogs`.
    pub const WATCHDOGS: u64 = 1 << 2;
    /// Every field that SET can apply.
    pub const SETTABLE: u64 = WIDTH_32 | FIFO_ARRAY | WATCHDOGS;
}

/// One of a domain's watchdogs (`SCHEDOP_watchdog`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Watchdog {
    /// Time until it bites, in ns; in a SET, counted from the SET. 0 when it is not armed.
    pub remaining: i64,
    /// 1 when the guest has this watchdog in use.
    pub in_use: u32,
    /// 0.
    pub reserved: u32,
}

/// State of a domain. 1184 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainState {
    /// Bytes of this structure.
    pub size: u32,
    /// [`ABI_VERSION`].
    pub version: u32,
    /// [`domain_fields`].
    pub fields: u64,
    /// [`domain_flags`].
    pub flags: u32,
    /// vCPUs the domain was made with; not all need be initialised.
    pub max_vcpus: u32,
    /// gfn of the shared_info page, [`NO_GFN`] when the guest has not placed it.
    pub shared_info_gfn: u64,
    /// Event words that the event array holds: 1024 for each page. 0 without FIFO.
    pub fifo_words: u32,
    /// Valid entries of `fifo_array`.
    pub fifo_pages: u32,
    /// gfns of the event array's pages.
    pub fifo_array: [u64; FIFO_MAX_PAGES],
    /// Highest port the domain may ever use (`max_evtchn_port`, inclusive).
    pub max_port: u32,
    /// Ports below this have been allocated at some time (`valid_evtchns`); none above is in use.
    pub valid_ports: u32,
    /// Ports in use, those of Xen among them.
    pub active_ports: u32,
    /// Ports that Xen itself consumes (ioreq servers).
    pub xen_ports: u32,
    /// Number of pirqs the domain may use.
    pub pirqs: u32,
    /// `XEN_DOMCTL_*` creation flags (`XEN_DOMCTL_CDF_*`).
    pub create_flags: u32,
    /// vm_assist bits.
    pub vm_assist: u64,
    /// Host's `NOW()` when this was read, ns since the hypervisor started.
    pub now: i64,
    /// The clock offset: guest's system time minus host's `NOW()`, ns. 0 for a domain that was never set.
    pub clock_offset: i64,
    /// Wall clock as the guest sees it in shared_info: seconds since 1970 at its system time 0 ...
    pub wc_sec: u64,
    /// ... and nanoseconds.
    pub wc_nsec: u32,
    /// 0.
    pub reserved: u32,
    /// `XEN_DOMCTL_settimeoffset`, seconds; contained in `wc_sec`.
    pub time_offset: i64,
    /// Platform timers: guest time minus host `NOW()`, ns (`pl_time.stime_offset`); travels in the HVM context, told for diagnosis.
    pub hvm_stime_offset: i64,
    /// Platform timers: last guest time handed out (`pl_time.last_guest_time`); for diagnosis.
    pub hvm_last_guest_time: u64,
    /// The watchdogs.
    pub watchdogs: [Watchdog; WATCHDOGS],
}

impl Default for DomainState {
    fn default() -> Self {
        Self {
            size: size_of::<Self>() as u32,
            version: ABI_VERSION,
            fields: 0,
            flags: 0,
            max_vcpus: 0,
            shared_info_gfn: NO_GFN,
            fifo_words: 0,
            fifo_pages: 0,
            fifo_array: [NO_GFN; FIFO_MAX_PAGES],
            max_port: 0,
            valid_ports: 0,
            active_ports: 0,
            xen_ports: 0,
            pirqs: 0,
            create_flags: 0,
            vm_assist: 0,
            now: 0,
            clock_offset: 0,
            wc_sec: 0,
            wc_nsec: 0,
            reserved: 0,
            time_offset: 0,
            hvm_stime_offset: 0,
            hvm_last_guest_time: 0,
            watchdogs: [Watchdog { remaining: 0, in_use: 0, reserved: 0 }; WATCHDOGS],
        }
    }
}

impl DomainState {
    /// Guest's system time when this was read, ns.
    pub const fn guest_now(&self) -> i64 {
        self.now.wrapping_add(self.clock_offset)
    }
}

/// [`VcpuState::flags`]; not settable.
pub mod vcpu_flags {
    /// Has been given a context (`is_initialised`).
    pub const INITIALISED: u32 = 1 << 0;
    /// Not brought up (`VPF_down`).
    pub const DOWN: u32 = 1 << 1;
    /// Waits for an event or an interrupt (`VPF_blocked`).
    pub const BLOCKED: u32 = 1 << 2;
    /// Waits in `SCHEDOP_poll`. It may wake without cause after a migration.
    pub const POLLING: u32 = 1 << 3;
    /// Has its vcpu_info in a page of its own choice.
    pub const VCPU_INFO_PLACED: u32 = 1 << 4;
    /// Has a FIFO control block.
    pub const FIFO_CONTROL: u32 = 1 << 5;
    /// The singleshot timer runs.
    pub const SINGLESHOT: u32 = 1 << 6;
    /// The periodic timer runs.
    pub const PERIODIC: u32 = 1 << 7;
}

/// [`VcpuState::fields`]: in a SET, what to apply; in a GET, what the structure holds.
pub mod vcpu_fields {
    /// `vcpu_info_gfn`, `vcpu_info_offset`. The page's contents are kept. Nothing to do when the gfn is [`super::NO_GFN`].
    pub const VCPU_INFO: u64 = 1 << 0;
    /// `runstate_area`.
    pub const RUNSTATE_AREA: u64 = 1 << 1;
    /// `time_area`.
    pub const TIME_AREA: u64 = 1 << 2;
    /// `runstate_time`; the vCPU's present state then counts from the moment of the SET. `runstate` and `runstate_entry` are not set.
    pub const RUNSTATE: u64 = 1 << 3;
    /// `upcall_vector`.
    pub const UPCALL: u64 = 1 << 4;
    /// `fifo_control_gfn`, `fifo_control_offset`. The first one turns the domain to FIFO event channels.
    pub const FIFO_CONTROL: u64 = 1 << 5;
    /// `fifo_tails`. The event array must be set before.
    pub const FIFO_TAILS: u64 = 1 << 6;
    /// `singleshot_expires` and the flag [`super::vcpu_flags::SINGLESHOT`], which says whether the timer runs.
    pub const SINGLESHOT: u64 = 1 << 7;
    /// `periodic_period` and `periodic_last`.
    pub const PERIODIC: u64 = 1 << 8;
    /// `tsc` and `tsc_at`. After the clock offset: the vCPU's TSC then runs through that point.
    pub const TSC: u64 = 1 << 9;
    /// Every field that SET can apply.
    pub const SETTABLE: u64 = VCPU_INFO
        | RUNSTATE_AREA
        | TIME_AREA
        | RUNSTATE
        | UPCALL
        | FIFO_CONTROL
        | FIFO_TAILS
        | SINGLESHOT
        | PERIODIC
        | TSC;
}

/// State of a vCPU. 344 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuState {
    /// Bytes of this structure.
    pub size: u32,
    /// [`ABI_VERSION`].
    pub version: u32,
    /// [`vcpu_fields`].
    pub fields: u64,
    /// vCPU's number.
    pub id: u32,
    /// [`vcpu_flags`].
    pub flags: u32,
    /// gfn of the page with the vcpu_info, [`NO_GFN`] while it is in shared_info or nowhere.
    pub vcpu_info_gfn: u64,
    /// Offset of the vcpu_info in that page, bytes.
    pub vcpu_info_offset: u32,
    /// Per-vCPU upcall vector (`HVMOP_set_evtchn_upcall_vector`), 0 when none.
    pub upcall_vector: u32,
    /// Guest virtual address of the runstate area, [`NO_ADDRESS`] when none.
    pub runstate_area: u64,
    /// Guest virtual address of the secondary time area, [`NO_ADDRESS`] when none.
    pub time_area: u64,
    /// Runstate: one of `RUNSTATE_*` (xen/include/public/vcpu.h).
    pub runstate: u32,
    /// Port that the vCPU polls, -1 for any of several.
    pub poll_port: i32,
    /// When the vCPU entered that state, guest's system time.
    pub runstate_entry: i64,
    /// Time spent in each of the four states, ns, up to `runstate_entry`.
    pub runstate_time: [i64; 4],
    /// gfn of the page with the FIFO control block, [`NO_GFN`] when there is none.
    pub fifo_control_gfn: u64,
    /// Offset of the control block in that page, a multiple of 8.
    pub fifo_control_offset: u32,
    /// Tail of each FIFO queue: a port, 0 when the queue has none.
    pub fifo_tails: [u32; FIFO_QUEUES],
    /// Port of each VIRQ, 0 when it is not bound. Set through the ports.
    pub virq_ports: [u32; VIRQS],
    /// 0.
    pub reserved: u32,
    /// Expiry of the singleshot timer, guest's system time; meaningful with [`vcpu_flags::SINGLESHOT`].
    pub singleshot_expires: i64,
    /// Period of the periodic timer, ns; 0 when it is off.
    pub periodic_period: i64,
    /// Last tick of the periodic timer, guest's system time.
    pub periodic_last: i64,
    /// Xen's pause flags (`VPF_*`), for diagnosis.
    pub pause_flags: u64,
    /// This vCPU's addend to the platform timers' time (`hvm.stime_offset`), for diagnosis.
    pub hvm_stime_offset: i64,
    /// Host TSC to guest TSC (`cache_tsc_offset`), for diagnosis.
    pub tsc_offset: u64,
    /// What the guest would read from this vCPU's TSC at `tsc_at`. Xen's HVM context has a TSC too, but does not say of when.
    pub tsc: u64,
    /// Guest's system time, ns.
    pub tsc_at: i64,
}

impl Default for VcpuState {
    fn default() -> Self {
        Self {
            size: size_of::<Self>() as u32,
            version: ABI_VERSION,
            fields: 0,
            id: 0,
            flags: 0,
            vcpu_info_gfn: NO_GFN,
            vcpu_info_offset: 0,
            upcall_vector: 0,
            runstate_area: NO_ADDRESS,
            time_area: NO_ADDRESS,
            runstate: 0,
            poll_port: 0,
            runstate_entry: 0,
            runstate_time: [0; 4],
            fifo_control_gfn: NO_GFN,
            fifo_control_offset: 0,
            fifo_tails: [0; FIFO_QUEUES],
            virq_ports: [0; VIRQS],
            reserved: 0,
            singleshot_expires: 0,
            periodic_period: 0,
            periodic_last: 0,
            pause_flags: 0,
            hvm_stime_offset: 0,
            tsc_offset: 0,
            tsc: 0,
            tsc_at: 0,
        }
    }
}

impl VcpuState {
    /// The runstate counters as they stand at `guest_now`: the present state's share is added. This is what to SET elsewhere, so that the
    /// time between the last change of state and the capture is not lost.
    pub fn runstate_at(&self, guest_now: i64) -> [i64; 4] {
        let mut time = self.runstate_time;
        let share = guest_now.saturating_sub(self.runstate_entry).max(0);
        if let Some(t) = time.get_mut(self.runstate as usize) {
            *t = t.saturating_add(share);
        }
        time
    }
}

/// [`PortState::state`]: Xen's `ECS_*` (xen/include/xen/sched.h).
pub mod port_state {
    /// Free.
    pub const FREE: u8 = 0;
    /// Reserved: neither free nor usable.
    pub const RESERVED: u8 = 1;
    /// Waits for [`super::PortState::remote_domid`] to bind. The only form in which SET makes a port that leads to another domain.
    pub const UNBOUND: u8 = 2;
    /// Bound to [`super::PortState::remote_port`] of [`super::PortState::remote_domid`]. In a SET the domain must be the port's own: the first
    /// end to come waits for the domain itself, and the second is connected to it.
    pub const INTERDOMAIN: u8 = 3;
    /// Bound to the pirq in [`super::PortState::irq`].
    pub const PIRQ: u8 = 4;
    /// Bound to the VIRQ in [`super::PortState::irq`].
    pub const VIRQ: u8 = 5;
    /// For vCPU to vCPU.
    pub const IPI: u8 = 6;
}

/// [`PortState::flags`].
pub mod port_flags {
    /// Consumed by Xen itself, for a device model. Not settable: it comes back with the ioreq server.
    pub const XEN: u8 = 1 << 0;
    /// Pending. Told for diagnosis: the bit is in the guest's memory.
    pub const PENDING: u8 = 1 << 1;
    /// Masked. Likewise.
    pub const MASKED: u8 = 1 << 2;
    /// Linked into a FIFO queue. Likewise.
    pub const LINKED: u8 = 1 << 3;
    /// Became pending and has no event word yet (`evtchn.pending`): the guest gets it when it adds that page. Settable.
    pub const PENDING_EARLY: u8 = 1 << 4;
}

/// One event channel of a domain. 28 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortState {
    /// Local port.
    pub port: u32,
    /// [`port_state`]. In a SET, [`port_state::FREE`] closes the port if it is open.
    pub state: u8,
    /// [`port_flags`].
    pub flags: u8,
    /// vCPU that is notified.
    pub notify_vcpu: u16,
    /// FIFO: priority, 0 (highest) to 15.
    pub priority: u8,
    /// FIFO: priority of the queue it was last linked on.
    pub last_priority: u8,
    /// FIFO: vCPU of the queue it was last linked on.
    pub last_vcpu: u16,
    /// Unbound and interdomain: the other domain.
    pub remote_domid: u16,
    /// 0.
    pub reserved: u16,
    /// Interdomain: the other domain's port.
    pub remote_port: u32,
    /// VIRQ or pirq number.
    pub irq: u32,
    /// FIFO: the event word as it stands in the guest's memory, for diagnosis. 0 without.
    pub word: u32,
}

/// [`PirqState::emuirq`]: no emulated interrupt (`IRQ_UNBOUND`).
pub const EMUIRQ_UNBOUND: i32 = -1;
/// [`PirqState::emuirq`]: a passed-through interrupt (`IRQ_PT`).
pub const EMUIRQ_PASSTHROUGH: i32 = -2;
/// [`PirqState::emuirq`]: an emulated MSI (`IRQ_MSI_EMU`).
pub const EMUIRQ_MSI: i32 = -3;

/// One pirq of an HVM domain. 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PirqState {
    /// The pirq.
    pub pirq: u32,
    /// GSI of the emulated interrupt that it stands for, or one of the `EMUIRQ_*`.
    pub emuirq: i32,
    /// Port bound to it, 0 when none. Set through the ports.
    pub port: u32,
    /// 0.
    pub reserved: u32,
}

/// What [`op::SET_CLOCK`] takes. 24 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockOffset {
    /// Bytes of this structure.
    pub size: u32,
    /// [`ABI_VERSION`].
    pub version: u32,
    /// Guest's system time minus host's `NOW()`, ns; at most [`MAX_CLOCK_OFFSET`] either way. 0 takes the offset away.
    pub offset: i64,
    /// What the guest's wall clock read at its system time 0, ns since 1970: it goes on from there, and steps with the host's. 0: the host's.
    pub wall: i64,
}

const _: () = {
    assert!(size_of::<Request>() == 64 && size_of::<Request>() <= DOMCTL_UNION_SIZE);
    assert!(size_of::<Info>() == 64);
    assert!(size_of::<Watchdog>() == 16);
    assert!(size_of::<DomainState>() == 1184);
    assert!(size_of::<VcpuState>() == 344);
    assert!(size_of::<PortState>() == 28);
    assert!(size_of::<PirqState>() == 16);
    assert!(size_of::<ClockOffset>() == 24);
};

/// A structure that crosses the hypercall: plain integers without padding, its size and version in front where it has them.
///
/// # Safety
/// Implement it only for `repr(C)` structures that have no padding bytes and for which every bit pattern is valid.
pub unsafe trait Plain: Copy {}

// SAFETY: repr(C), integers only; the sizes asserted above are the sums of their fields, so there is no padding.
unsafe impl Plain for Info {}
// SAFETY: as above.
unsafe impl Plain for DomainState {}
// SAFETY: as above.
unsafe impl Plain for VcpuState {}
// SAFETY: as above.
unsafe impl Plain for PortState {}
// SAFETY: as above.
unsafe impl Plain for PirqState {}
// SAFETY: as above.
unsafe impl Plain for ClockOffset {}
