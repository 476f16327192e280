// SPDX-License-Identifier: GPL-2.0-only
//! The SET operations. The caller has seen to it that the target is another HVM domain, paused, not dying, and that its domain lock and Xen's
//! domctl lock are held. So no vCPU of it runs, nothing tears it down, and no other operation of this payload runs.

use core::sync::atomic::{Ordering, compiler_fence};

use crate::abi::{
    self, DomainState, Fault, PirqState, PortState, Request, VcpuState, domain_fields, domain_flags, port_flags,
    port_state, vcpu_fields, vcpu_flags,
};
use crate::clock;
use crate::request::{Progress, Refusal, check_header, check_list, refuse, take, take_entry};
use crate::table as t;
use crate::xen::{
    self, AllocUnbound, DOMID_FIRST_RESERVED, Domain, EBUSY, EEXIST, EINVAL, ENOENT, ENOSPC, EOPNOTSUPP, Evtchn, Vcpu,
    load, store,
};

/// Largest time span that a timer may be set ahead by: Xen's own limit (xen/time.h, `STIME_DELTA_MAX`) is 2^61 - 1.
const LONGEST: i64 = (1 << 61) - 1;

// ---- domain ----------------------------------------------------------------------------------------------------------

pub fn domain(d: Domain, request: &Request, progress: &mut Progress) -> Result<(), Refusal> {
    let wanted: DomainState = take(request)?;
    check_header(wanted.size, wanted.version, size_of::<DomainState>())?;
    if wanted.fields & !domain_fields::SETTABLE != 0 {
        return Err(refuse(EINVAL, Fault::FIELDS));
    }
    // Everything that can be refused is refused before anything is touched.
    if wanted.fields & domain_fields::WATCHDOGS != 0 {
        for watchdog in &wanted.watchdogs {
            let armed = watchdog.in_use == 1 && watchdog.remaining > 0 && watchdog.remaining <= LONGEST;
            let idle = watchdog.in_use == 0 && watchdog.remaining == 0;
            if watchdog.reserved != 0 || !(armed || idle) {
                return Err(refuse(EINVAL, Fault::WATCHDOG));
            }
        }
    }
    if wanted.fields & domain_fields::WIDTH_32 != 0 {
        check_width(d, wanted.flags)?;
    }
    if wanted.fields & domain_fields::FIFO_ARRAY != 0 {
        set_event_array(d, &wanted)?;
    }
    if wanted.fields & domain_fields::WIDTH_32 != 0 {
        d.set::<u8>(t::D_32BIT, u8::from(wanted.flags & domain_flags::WIDTH_32 != 0));
        // The place of the wall clock in shared_info depends on it.
        clock::write_wall_clock(d);
    }
    if wanted.fields & domain_fields::WATCHDOGS != 0 {
        set_watchdogs(d, &wanted);
    }
    progress.done = 1;
    Ok(())
}

/// The width says how a guest's event channel bits and areas are laid out, so it is set before any of them is there.
fn check_width(d: Domain, flags: u32) -> Result<(), Refusal> {
    if d.has_32bit_shinfo() == (flags & domain_flags::WIDTH_32 != 0) {
        return Ok(());
    }
    let mut in_use = {
        let _held = d.event_lock();
        // Ports of a device model (consumed by Xen) have no bit that the guest set yet; those of the guest may.
        d.get::<u32>(t::D_ACTIVE_EVTCHNS) > d.get::<u32>(t::D_XEN_EVTCHNS) + reserved_ports(d) || !d.fifo().is_null()
    };
    for id in 0..d.max_vcpus() {
        if let Some(v) = d.vcpu(id) {
            in_use |= v.get::<u64>(t::V_INFO_MFN) != u64::MAX
                || v.get::<u64>(t::V_RUNSTATE_GUEST) != 0
                || v.get::<u64>(t::V_TIME_AREA) != 0;
        }
    }
    if in_use { Err(refuse(EBUSY, Fault::WIDTH)) } else { Ok(()) }
}

/// Port 0 is reserved in every domain and counts as active.
fn reserved_ports(d: Domain) -> u32 {
    d.evtchn(0).map_or(0, |port0| u32::from(port0.state() == port_state::RESERVED))
}

/// Pages mapped so far by [`set_event_array`], so that they can be given back. One operation runs at a time.
static mut MAPPED: [*mut u8; abi::FIFO_MAX_PAGES] = [core::ptr::null_mut(); abi::FIFO_MAX_PAGES];

fn set_event_array(d: Domain, wanted: &DomainState) -> Result<(), Refusal> {
    let pages = wanted.fifo_pages as usize;
    if pages > abi::FIFO_MAX_PAGES || pages > t::FD_PAGES {
        return Err(refuse(EINVAL, Fault::FIFO_ARRAY));
    }
    // Held throughout, also while the pages are mapped, as Xen does: EVTCHNOP_reset, by dom0 or a stub device model, frees what is filled.
    let _held = d.event_lock();
    let fifo = d.fifo();
    if fifo.is_null() {
        return if pages == 0 { Ok(()) } else { Err(refuse(EINVAL, Fault::FIFO_ARRAY)) };
    }
    if d.fifo_words() != 0 {
        return Err(refuse(EBUSY, Fault::FIFO_ARRAY));
    }
    // SAFETY: the domctl lock is held, so one operation runs at a time, and this function, the only user, is not called from
    // itself.
    let mapped = unsafe { &mut *(&raw mut MAPPED) };
    for (i, (gfn, place)) in wanted.fifo_array.iter().zip(mapped.iter_mut()).enumerate().take(pages) {
        // SAFETY: a domctl, and the domain is not dying (checked in `carry_out_set`, under locks that are still held).
        match unsafe { d.map_page(*gfn) } {
            Ok(page) => *place = page,
            Err(errno) => {
                for page in mapped.iter().take(i) {
                    // SAFETY: mapped just now by the loop, not stored anywhere else, and given back once.
                    unsafe { Domain::unmap_page(*page) };
                }
                return Err(refuse(errno, Fault::FIFO_ARRAY));
            }
        }
    }
    for (i, page) in mapped.iter().enumerate().take(pages) {
        // SAFETY: `i` is below `FD_PAGES` (checked above); the event lock is held, under which Xen writes them and frees `fifo`.
        unsafe { store(fifo, i * 8, *page) };
    }
    // The pages must be seen before the number that says they are there.
    compiler_fence(Ordering::SeqCst);
    // SAFETY: as above.
    unsafe { store::<u32>(fifo, t::FD_NUM, pages as u32 * abi::FIFO_WORDS_PER_PAGE) };
    // No port is raised here, unlike when a guest adds a page: the guest's words and queue heads are in memory as they were, and an event
    // linked before the tails are set would cut a queue that is not empty.
    Ok(())
}

fn set_watchdogs(d: Domain, wanted: &DomainState) {
    // SAFETY: lock and timers are the domain's, as many as `wanted.watchdogs` has; Xen writes the map under this lock, which nobody
    // here holds, and `set_timer` and `stop_timer` take the timer's own.
    unsafe {
        let _held = xen::Spin::lock(d.at(t::D_WATCHDOG_LOCK));
        let mut armed: u32 = d.get(t::D_WATCHDOG_MAP);
        for (i, watchdog) in wanted.watchdogs.iter().enumerate() {
            let timer = d.at(t::D_WATCHDOG_TIMER + i * t::T_SIZE);
            if watchdog.in_use != 0 {
                armed |= 1 << i;
                xen::set_timer(timer, xen::now().saturating_add(watchdog.remaining));
            } else {
                armed &= !(1 << i);
                xen::stop_timer(timer);
            }
        }
        d.set(t::D_WATCHDOG_MAP, armed);
    }
}

// ---- vCPU ------------------------------------------------------------------------------------------------------------

pub fn vcpu(d: Domain, request: &Request, progress: &mut Progress) -> Result<(), Refusal> {
    let wanted: VcpuState = take(request)?;
    check_header(wanted.size, wanted.version, size_of::<VcpuState>())?;
    let fields = wanted.fields;
    if fields & !vcpu_fields::SETTABLE != 0 {
        return Err(refuse(EINVAL, Fault::FIELDS));
    }
    if wanted.id != request.index {
        return Err(refuse(EINVAL, Fault::VCPU));
    }
    let v = d.vcpu(request.index).ok_or(refuse(ENOENT, Fault::VCPU))?;
    check_vcpu(d, v, &wanted)?;

    // What may fail for want of memory or a page comes first.
    if fields & vcpu_fields::FIFO_CONTROL != 0 && wanted.fifo_control_gfn != abi::NO_GFN {
        set_fifo_control(d, v, &wanted)?;
    }
    if fields & vcpu_fields::VCPU_INFO != 0 && wanted.vcpu_info_gfn != abi::NO_GFN {
        place_vcpu_info(d, v, &wanted)?;
    }
    if fields & vcpu_fields::FIFO_TAILS != 0 {
        set_tails(d, v, &wanted)?;
    }
    if fields & vcpu_fields::RUNSTATE_AREA != 0 {
        v.set(t::V_RUNSTATE_GUEST, wanted.runstate_area);
    }
    if fields & vcpu_fields::TIME_AREA != 0 {
        v.set(t::V_TIME_AREA, wanted.time_area);
    }
    if fields & vcpu_fields::RUNSTATE != 0 {
        v.set(t::V_RUNSTATE + t::RS_TIME, wanted.runstate_time);
        v.set(t::V_RUNSTATE + t::RS_ENTRY, xen::now());
    }
    if fields & vcpu_fields::UPCALL != 0 {
        v.set::<u8>(t::V_UPCALL, wanted.upcall_vector as u8);
    }
    if fields & vcpu_fields::SINGLESHOT != 0 {
        set_singleshot(d, v, &wanted);
    }
    if fields & vcpu_fields::PERIODIC != 0 {
        set_periodic(d, v, &wanted);
    }
    if fields & vcpu_fields::TSC != 0 {
        clock::set_guest_tsc(d, v, wanted.tsc, wanted.tsc_at);
    }
    progress.done = 1;
    Ok(())
}

/// Refuses what can be seen to be wrong before anything is touched.
fn check_vcpu(d: Domain, v: Vcpu, wanted: &VcpuState) -> Result<(), Refusal> {
    let fields = wanted.fields;
    if wanted.reserved != 0 {
        return Err(refuse(EINVAL, Fault::RESERVED));
    }
    if fields & vcpu_fields::FIFO_CONTROL != 0 && wanted.fifo_control_gfn != abi::NO_GFN {
        let last = xen::PAGE_SIZE as u32 - t::FIFO_CONTROL_SIZE as u32;
        if wanted.fifo_control_offset > last || wanted.fifo_control_offset % 8 != 0 {
            return Err(refuse(EINVAL, Fault::FIFO_CONTROL));
        }
        let _held = d.event_lock();
        if !v.fifo_control().is_null() {
            return Err(refuse(EBUSY, Fault::FIFO_CONTROL));
        }
    }
    if fields & vcpu_fields::VCPU_INFO != 0 && wanted.vcpu_info_gfn != abi::NO_GFN {
        let align = if d.has_32bit_shinfo() { t::VI32_ALIGN } else { t::VI_ALIGN } as u32;
        let last = xen::PAGE_SIZE as u32 - t::VI_SIZE as u32;
        if wanted.vcpu_info_offset > last || wanted.vcpu_info_offset & (align - 1) != 0 {
            return Err(refuse(EINVAL, Fault::VCPU_INFO));
        }
        if v.get::<u64>(t::V_INFO_MFN) != u64::MAX {
            return Err(refuse(EBUSY, Fault::VCPU_INFO));
        }
    }
    if fields & vcpu_fields::FIFO_TAILS != 0 {
        let words = {
            let _held = d.event_lock();
            if v.fifo_control().is_null() { 0 } else { d.fifo_words() }
        };
        // Xen follows a tail to its event word without a check.
        if wanted.fifo_tails.iter().any(|tail| *tail != 0 && *tail >= words) {
            return Err(refuse(EINVAL, Fault::FIFO_TAIL));
        }
    }
    if fields & vcpu_fields::RUNSTATE_AREA != 0 && !guest_address_is_sane(d, wanted.runstate_area) {
        return Err(refuse(EINVAL, Fault::RUNSTATE_AREA));
    }
    if fields & vcpu_fields::TIME_AREA != 0 && !guest_address_is_sane(d, wanted.time_area) {
        return Err(refuse(EINVAL, Fault::TIME_AREA));
    }
    if fields & vcpu_fields::RUNSTATE != 0 && wanted.runstate_time.iter().any(|time| *time < 0 || *time > 1 << 62) {
        return Err(refuse(EINVAL, Fault::RUNSTATE));
    }
    if fields & vcpu_fields::UPCALL != 0 && (wanted.upcall_vector > 255 || (1..16).contains(&wanted.upcall_vector)) {
        return Err(refuse(EINVAL, Fault::UPCALL));
    }
    let near = |time: i64| {
        let span = time.saturating_sub(xen::now().saturating_add(clock::offset(d)));
        (-LONGEST..=LONGEST).contains(&span)
    };
    if fields & vcpu_fields::SINGLESHOT != 0
        && wanted.flags & vcpu_flags::SINGLESHOT != 0
        && !near(wanted.singleshot_expires)
    {
        return Err(refuse(EINVAL, Fault::SINGLESHOT));
    }
    if fields & vcpu_fields::TSC != 0 && !near(wanted.tsc_at) {
        return Err(refuse(EINVAL, Fault::TSC));
    }
    if fields & vcpu_fields::PERIODIC != 0 {
        // Xen's own limits for VCPUOP_set_periodic_timer.
        let off = wanted.periodic_period == 0;
        let on = (1_000_000..=LONGEST).contains(&wanted.periodic_period) && near(wanted.periodic_last);
        if !off && !on {
            return Err(refuse(EINVAL, Fault::PERIODIC));
        }
    }
    Ok(())
}

/// An address that the guest could have registered: canonical, or below 4 GiB in a 32-bit guest. Xen writes there through the guest's
/// page tables, so it is the guest's own memory whatever it is.
fn guest_address_is_sane(d: Domain, address: u64) -> bool {
    if d.has_32bit_shinfo() {
        address <= u64::from(u32::MAX) - 4096
    } else {
        let top = address as i64 >> 47;
        top == 0 || top == -1
    }
}

/// Maps the vCPU's control block; the domain's first one switches it to FIFO event channels, as EVTCHNOP_init_control does.
fn set_fifo_control(d: Domain, v: Vcpu, wanted: &VcpuState) -> Result<(), Refusal> {
    let _held = d.event_lock();
    if d.fifo().is_null() {
        let before = d.max_evtchns();
        for id in 0..d.max_vcpus() {
            let Some(each) = d.vcpu(id) else { continue };
            if each.fifo().is_null() {
                let fifo = xen::allocate(t::FV_SIZE).map_err(|errno| {
                    forget_fifo(d);
                    refuse(errno, Fault::FIFO_CONTROL)
                })?;
                for queue in 0..abi::FIFO_QUEUES {
                    let at = t::FV_QUEUE + queue * t::FQ_SIZE;
                    // SAFETY: fresh memory of `FV_SIZE` bytes, zeroed, which has `FIFO_QUEUES` queues (the table); nobody else
                    // knows it.
                    unsafe {
                        store::<u8>(fifo, at + t::FQ_PRIORITY, queue as u8);
                        xen::spin_lock_init(fifo.add(at + t::FQ_LOCK));
                    }
                }
                // No port operation looks at it before the switch below.
                each.set(t::V_FIFO, fifo);
            }
        }
        let array = xen::allocate(t::FD_SIZE).map_err(|errno| {
            forget_fifo(d);
            refuse(errno, Fault::FIFO_CONTROL)
        })?;
        // SAFETY: every vCPU has its FIFO state by now, `v` too; the event lock is held, as in Xen. The offset was checked in
        // `check_vcpu`, and Xen refuses a gfn that it can't map.
        let mapped = unsafe { xen::map_control_block(v.0, wanted.fifo_control_gfn, wanted.fifo_control_offset) };
        if mapped != 0 {
            // SAFETY: allocated above, and not given to anybody yet.
            unsafe { xen::xfree(array) };
            forget_fifo(d);
            return Err(refuse(i64::from(mapped), Fault::FIFO_CONTROL));
        }
        d.set(t::D_FIFO, array);
        d.set_fifo_port_ops();
        // Ports that are open already keep their pending state, and get the default priority.
        for port in 1..before {
            let Some(evtchn) = d.evtchn(port) else { break };
            if d.two_level_bit(port, false) {
                evtchn.set::<u8>(t::E_PENDING, 1);
            }
            evtchn.set::<u8>(t::E_PRIORITY, DEFAULT_PRIORITY);
        }
        return Ok(());
    }
    // One that was made after the domain was switched (not all vCPUs could be made at once) has no FIFO state, and Xen does not look.
    if v.fifo().is_null() {
        return Err(refuse(EINVAL, Fault::FIFO_CONTROL));
    }
    // SAFETY: the event lock is held, the offset was checked in `check_vcpu`, and the vCPU has FIFO state.
    match unsafe { xen::map_control_block(v.0, wanted.fifo_control_gfn, wanted.fifo_control_offset) } {
        0 => Ok(()),
        errno => Err(refuse(i64::from(errno), Fault::FIFO_CONTROL)),
    }
}

/// Takes back the vCPUs' FIFO state of a domain that was not switched to FIFO in the end; none of it has a control block. Left there, it
/// would be lost when the guest itself set up FIFO event channels later.
fn forget_fifo(d: Domain) {
    for id in 0..d.max_vcpus() {
        if let Some(v) = d.vcpu(id) {
            let fifo = v.fifo();
            v.set(t::V_FIFO, core::ptr::null_mut::<u8>());
            // SAFETY: null, or of Xen's heap; the event lock is held and the domain uses 2-level event channels, so nobody follows
            // the pointer.
            unsafe { xen::xfree(fifo) };
        }
    }
}

/// public/event_channel.h, `EVTCHN_FIFO_PRIORITY_DEFAULT`
const DEFAULT_PRIORITY: u8 = 7;

/// Points the vCPU at the guest's page, whose contents stay: unlike VCPUOP_register_vcpu_info, which copies the old contents over it and
/// marks every event pending.
fn place_vcpu_info(d: Domain, v: Vcpu, wanted: &VcpuState) -> Result<(), Refusal> {
    // SAFETY: the domain is not dying. The offset leaves room for a vcpu_info and is aligned as Xen asks, and none was placed
    // before (both in `check_vcpu`, under the domain lock, which Xen takes for this too).
    unsafe {
        let page = d.map_page(wanted.vcpu_info_gfn).map_err(|errno| refuse(errno, Fault::VCPU_INFO))?;
        v.set(t::V_INFO, page.add(wanted.vcpu_info_offset as usize));
        compiler_fence(Ordering::SeqCst);
        v.set(t::V_INFO_MFN, xen::mfn_of_mapping(page));
    }
    Ok(())
}

fn set_tails(d: Domain, v: Vcpu, wanted: &VcpuState) -> Result<(), Refusal> {
    let _held = d.event_lock();
    let fifo = v.fifo();
    if fifo.is_null() {
        return Ok(());
    }
    let words = d.fifo_words();
    for (queue, tail) in wanted.fifo_tails.iter().enumerate() {
        let tail = if *tail < words { *tail } else { 0 };
        let at = t::FV_QUEUE + queue * t::FQ_SIZE;
        // SAFETY: not null, and the event lock, held here, keeps it; 16 queues like `fifo_tails` (the table). Xen takes this lock
        // in interrupts as well, inside of the event lock too.
        unsafe {
            let _queue = xen::SpinIrq::lock(fifo.add(at + t::FQ_LOCK));
            store(fifo, at + t::FQ_TAIL, tail);
        }
    }
    Ok(())
}

fn set_singleshot(d: Domain, v: Vcpu, wanted: &VcpuState) {
    let timer = v.at(t::V_SINGLESHOT);
    // SAFETY: the vCPU's timer (`Vcpu`'s invariant); these functions take its own lock. The vCPU's CPU is online, and none goes
    // offline while this one is in a hypercall.
    unsafe {
        if wanted.flags & vcpu_flags::SINGLESHOT != 0 {
            let expires = wanted.singleshot_expires.saturating_sub(clock::offset(d)).max(1);
            xen::migrate_timer(timer, v.get(t::V_PROCESSOR));
            xen::set_timer(timer, expires);
        } else {
            xen::stop_timer(timer);
        }
    }
}

fn set_periodic(d: Domain, v: Vcpu, wanted: &VcpuState) {
    // SAFETY: lock and timer are the vCPU's (`Vcpu`'s invariant); Xen writes these fields under this lock, which nobody here holds.
    unsafe {
        let _held = xen::Spin::lock(v.at(t::V_PERIODIC_LOCK));
        xen::stop_timer(v.at(t::V_PERIODIC));
        v.set(t::V_PERIOD, wanted.periodic_period);
        // Xen starts the timer when it next schedules the vCPU.
        if wanted.periodic_period != 0 {
            v.set(t::V_PERIOD_LAST, wanted.periodic_last.saturating_sub(clock::offset(d)));
        }
    }
}

// ---- ports -----------------------------------------------------------------------------------------------------------

pub fn ports(d: Domain, request: &Request, progress: &mut Progress) -> Result<(), Refusal> {
    check_list::<PortState>(request)?;
    while progress.done < request.count {
        let wanted: PortState = take_entry(request, progress.done)?;
        port(d, &wanted)?;
        progress.done += 1;
    }
    Ok(())
}

fn port(d: Domain, wanted: &PortState) -> Result<(), Refusal> {
    if wanted.port == 0 || wanted.port > i32::MAX as u32 {
        return Err(refuse(EINVAL, Fault::PORT));
    }
    if wanted.reserved != 0 {
        return Err(refuse(EINVAL, Fault::RESERVED));
    }
    // What is in the guest's memory, or told for diagnosis, is no business of a SET; a port of Xen's comes back with its ioreq server.
    if wanted.flags & port_flags::XEN != 0 {
        return Err(refuse(EOPNOTSUPP, Fault::PORT_STATE));
    }
    if wanted.state == port_state::FREE {
        return close(d, wanted.port);
    }
    if !matches!(
        wanted.state,
        port_state::UNBOUND | port_state::INTERDOMAIN | port_state::VIRQ | port_state::IPI | port_state::PIRQ
    ) {
        return Err(refuse(EOPNOTSUPP, Fault::PORT_STATE));
    }
    if wanted.state == port_state::INTERDOMAIN {
        check_pair(d, wanted)?;
    }
    if wanted.priority > 15 || wanted.last_priority > 15 {
        return Err(refuse(EINVAL, Fault::PORT_PRIORITY));
    }
    let v = d.vcpu(u32::from(wanted.notify_vcpu)).ok_or(refuse(ENOENT, Fault::PORT_VCPU))?;
    d.vcpu(u32::from(wanted.last_vcpu)).ok_or(refuse(ENOENT, Fault::PORT_VCPU))?;
    let remote = if wanted.state == port_state::UNBOUND { wanted.remote_domid } else { d.id() };
    if remote >= DOMID_FIRST_RESERVED {
        return Err(refuse(EINVAL, Fault::PORT_REMOTE));
    }
    if wanted.state == port_state::VIRQ {
        check_virq(d, v, wanted)?;
    }
    if wanted.state == port_state::PIRQ {
        check_pirq_port(d, wanted)?;
    }

    // Xen makes the port at its number as an unbound one, with all its own checks; then it gets its kind. For the kinds other than unbound
    // it is unbound to the domain itself meanwhile, which does not run, so nobody can bind it.
    let mut alloc = AllocUnbound { dom: d.id(), remote_dom: remote, port: 0 };
    // SAFETY: `alloc` is laid out as Xen's structure. The event lock, which this takes, is not held; any port that is a positive
    // `i32` will do.
    match i64::from(unsafe { xen::evtchn_alloc_unbound(&mut alloc, wanted.port) }) {
        0 => {}
        errno @ (EBUSY | ENOSPC) => return Err(refuse(errno, Fault::PORT)),
        errno => return Err(refuse(errno, Fault::PORT_STATE)),
    }
    give_kind(d, v, wanted)
}

fn close(d: Domain, port: u32) -> Result<(), Refusal> {
    let state = {
        let _held = d.event_lock();
        d.evtchn(port).map_or(port_state::FREE, Evtchn::state)
    };
    if state == port_state::FREE {
        return Ok(());
    }
    // SAFETY: the event lock, which this takes, is not held any more. What is not there, or Xen's own, is refused, and an
    // interdomain port leads back (`connect`), as Xen asks.
    match unsafe { xen::evtchn_close(d.0, port as i32, true) } {
        0 => Ok(()),
        errno => Err(refuse(i64::from(errno), Fault::PORT)),
    }
}

/// Turns the just made port into what it shall be. The domain lock is held and the domain paused, so it is still there.
fn give_kind(d: Domain, v: Vcpu, wanted: &PortState) -> Result<(), Refusal> {
    let held = d.event_lock();
    let pirq = if wanted.state == port_state::PIRQ {
        // SAFETY: below `nr_pirqs` (checked in `check_pirq_port`); one that is not there is inserted into the domain's tree, under
        // the event lock as Xen asks.
        let info = unsafe { xen::pirq_get_info(d.0, wanted.irq as i32) };
        if info.is_null() {
            drop(held);
            close(d, wanted.port)?;
            return Err(refuse(xen::ENOMEM, Fault::PORT_PIRQ));
        }
        info
    } else {
        core::ptr::null_mut()
    };
    let evtchn = d.evtchn(wanted.port).ok_or(refuse(ENOENT, Fault::PORT))?;
    if wanted.state == port_state::INTERDOMAIN {
        connect(d, evtchn, wanted)?;
        return finish(d, evtchn, wanted);
    }
    if evtchn.state() != port_state::UNBOUND {
        // A backend that was faster than its toolstack: it has bound the port, whose kind is then right already.
        return if wanted.state == port_state::UNBOUND {
            finish(d, evtchn, wanted)
        } else {
            Err(refuse(EBUSY, Fault::PORT))
        };
    }
    {
        let _lock = evtchn.lock();
        if wanted.state == port_state::VIRQ {
            evtchn.set::<u32>(t::E_VIRQ, wanted.irq);
            evtchn.set::<u8>(t::E_STATE, port_state::VIRQ);
        } else if wanted.state == port_state::IPI {
            evtchn.set::<u8>(t::E_STATE, port_state::IPI);
        } else if wanted.state == port_state::PIRQ {
            // SAFETY: both locks are held, the event lock since `pirq` was found, which is not null (checked above).
            unsafe { link_pirq(d, evtchn, pirq, wanted) }
        }
    }
    finish(d, evtchn, wanted)?;
    if wanted.state == port_state::VIRQ {
        // Last: from here on Xen raises it.
        compiler_fence(Ordering::SeqCst);
        v.set::<u32>(t::V_VIRQ + wanted.irq as usize % t::NR_VIRQS_ * 4, wanted.port);
    }
    Ok(())
}

/// A port whose other end is in the same domain: the other end is not there yet, or waits for the domain itself.
fn check_pair(d: Domain, wanted: &PortState) -> Result<(), Refusal> {
    if wanted.remote_domid != d.id() {
        return Err(refuse(EOPNOTSUPP, Fault::PORT_REMOTE));
    }
    if wanted.remote_port == 0 || wanted.remote_port == wanted.port || wanted.remote_port > i32::MAX as u32 {
        return Err(refuse(EINVAL, Fault::PORT_REMOTE));
    }
    let _held = d.event_lock();
    match d.evtchn(wanted.remote_port) {
        None => Ok(()),
        Some(other) if other.state() == port_state::FREE || waits_for_itself(d, other) => Ok(()),
        Some(_) => Err(refuse(EBUSY, Fault::PORT_REMOTE)),
    }
}

fn waits_for_itself(d: Domain, evtchn: Evtchn) -> bool {
    evtchn.state() == port_state::UNBOUND && !evtchn.consumer_is_xen() && evtchn.get::<u16>(t::E_UNBOUND_DOMID) == d.id()
}

/// Connects the just made port, which waits for the domain itself, with its other end if that is there and waits too. Both ends change
/// together, because Xen stops the host when it closes a port whose other end does not lead back. The event lock is held.
fn connect(d: Domain, evtchn: Evtchn, wanted: &PortState) -> Result<(), Refusal> {
    let Some(other) = d.evtchn(wanted.remote_port) else { return Ok(()) };
    if other.state() == port_state::FREE {
        return Ok(());
    }
    if !waits_for_itself(d, evtchn) || !waits_for_itself(d, other) {
        return Err(refuse(EBUSY, Fault::PORT_REMOTE));
    }
    // In the order of their addresses, as `double_evtchn_lock()` does. They are two: `check_pair` refused a port that leads to itself.
    let (first, second) = if (evtchn.0 as usize) < (other.0 as usize) { (evtchn, other) } else { (other, evtchn) };
    let _first = first.lock();
    let _second = second.lock();
    for (end, port) in [(evtchn, wanted.remote_port), (other, wanted.port)] {
        end.set::<*mut u8>(t::E_REMOTE_DOM, d.0);
        end.set::<u32>(t::E_REMOTE_PORT, port);
        end.set::<u8>(t::E_STATE, port_state::INTERDOMAIN);
    }
    Ok(())
}

/// What every kind of port has.
fn finish(d: Domain, evtchn: Evtchn, wanted: &PortState) -> Result<(), Refusal> {
    evtchn.set::<u16>(t::E_NOTIFY, wanted.notify_vcpu);
    if !d.fifo().is_null() {
        evtchn.set::<u8>(t::E_PRIORITY, wanted.priority);
        evtchn.set::<u32>(t::E_LASTQ, u32::from(wanted.last_priority) | u32::from(wanted.last_vcpu) << 16);
        if wanted.flags & port_flags::PENDING_EARLY != 0 {
            evtchn.set::<u8>(t::E_PENDING, 1);
        }
    }
    Ok(())
}

/// A VIRQ that is one for the whole domain belongs to vCPU 0 (`virq_is_global()`).
fn virq_is_global(virq: u32) -> bool {
    // VIRQ_TIMER, _DEBUG, _XENOPROF, _XENPMU are per vCPU; those of the architecture are global (VIRQ_MCA).
    !matches!(virq, 0 | 1 | 7 | 13)
}

fn check_virq(d: Domain, v: Vcpu, wanted: &PortState) -> Result<(), Refusal> {
    if wanted.irq as usize >= t::NR_VIRQS_ {
        return Err(refuse(EINVAL, Fault::PORT_VIRQ));
    }
    xen::no_speculation();
    if virq_is_global(wanted.irq) && wanted.notify_vcpu != 0 {
        return Err(refuse(EINVAL, Fault::PORT_VIRQ));
    }
    let _held = d.event_lock();
    if v.get::<u32>(t::V_VIRQ + wanted.irq as usize * 4) != 0 {
        return Err(refuse(EEXIST, Fault::PORT_VIRQ));
    }
    Ok(())
}

// ---- pirqs -----------------------------------------------------------------------------------------------------------

fn check_pirq_port(d: Domain, wanted: &PortState) -> Result<(), Refusal> {
    if wanted.irq >= d.get::<u32>(t::D_NR_PIRQS) {
        return Err(refuse(EINVAL, Fault::PORT_PIRQ));
    }
    xen::no_speculation();
    let _held = d.event_lock();
    let info = d.pirq(wanted.irq);
    // SAFETY: not null, and kept by the event lock; the table.
    if !info.is_null() && unsafe { load::<u32>(info, t::PIRQ_EVTCHN) } != 0 {
        return Err(refuse(EEXIST, Fault::PORT_PIRQ));
    }
    Ok(())
}

/// What EVTCHNOP_bind_pirq does for a pirq without a physical interrupt: the pirq gets the port, vCPU 0's list gets the event channel (Xen
/// moves it when the port is bound to another vCPU, so here it goes to the list of the vCPU that is notified).
///
/// # Safety
/// The event lock and the event channel's own are held, and `info` is a `struct pirq` that is not freed meanwhile.
unsafe fn link_pirq(d: Domain, evtchn: Evtchn, info: *mut u8, wanted: &PortState) {
    let v = d.vcpu(u32::from(wanted.notify_vcpu));
    let Some(v) = v else { return };
    // SAFETY: the caller vouches for `info`; Xen writes the field under the event lock.
    unsafe { store::<u32>(info, t::PIRQ_EVTCHN, wanted.port) };
    let head: u32 = v.get(t::V_PIRQ_HEAD);
    evtchn.set::<u32>(t::E_PIRQ, wanted.irq);
    evtchn.set::<u32>(t::E_PIRQ_PREV, 0);
    evtchn.set::<u32>(t::E_PIRQ_NEXT, head);
    if head != 0
        && let Some(next) = d.evtchn(head)
    {
        next.set::<u32>(t::E_PIRQ_PREV, wanted.port);
    }
    v.set::<u32>(t::V_PIRQ_HEAD, wanted.port);
    evtchn.set::<u8>(t::E_STATE, port_state::PIRQ);
}

pub fn pirqs(d: Domain, request: &Request, progress: &mut Progress) -> Result<(), Refusal> {
    check_list::<PirqState>(request)?;
    while progress.done < request.count {
        let wanted: PirqState = take_entry(request, progress.done)?;
        pirq(d, &wanted)?;
        progress.done += 1;
    }
    Ok(())
}

fn pirq(d: Domain, wanted: &PirqState) -> Result<(), Refusal> {
    // A passed-through interrupt has a physical one behind it, which only the device's assignment can give.
    let emulated = wanted.emuirq >= 0 || wanted.emuirq == abi::EMUIRQ_MSI;
    if wanted.reserved != 0
        || wanted.pirq >= d.get::<u32>(t::D_NR_PIRQS)
        || !(emulated || wanted.emuirq == abi::EMUIRQ_UNBOUND)
    {
        return Err(refuse(EINVAL, Fault::PIRQ));
    }
    xen::no_speculation();
    if !emulated {
        return Ok(());
    }
    let _held = d.event_lock();
    // SAFETY: the event lock is held, as Xen asks; the pirq is below `nr_pirqs` (checked above).
    match unsafe { xen::map_domain_emuirq_pirq(d.0, wanted.pirq as i32, wanted.emuirq) } {
        0 => {}
        errno => return Err(refuse(i64::from(errno), Fault::PIRQ)),
    }
    // Xen answers 0 also when it kept another mapping.
    let info = d.pirq(wanted.pirq);
    // SAFETY: not null, and kept by the event lock; the domain is HVM, so the field is there.
    if info.is_null() || unsafe { load::<i32>(info, t::PIRQ_EMUIRQ) } != wanted.emuirq {
        return Err(refuse(EBUSY, Fault::PIRQ));
    }
    Ok(())
}
