// SPDX-License-Identifier: GPL-2.0-only
//! The GET operations. They work on any domain, paused or not; of a running one they give a picture that may be a moment old.

use crate::abi::{
    self, DomainState, Fault, Info, PirqState, PortState, Request, VcpuState, domain_fields, domain_flags, features,
    port_flags, port_state, vcpu_fields, vcpu_flags,
};
use crate::request::{Progress, Refusal, check_list, give, give_entry, refuse};
use crate::table as t;
use crate::xen::{self, Domain, ENOENT, EOPNOTSUPP, Evtchn, Vcpu, load};
use crate::{clock, patch};

pub fn info(request: &Request, progress: &mut Progress) -> Result<(), Refusal> {
    let (wc_sec, wc_nsec) = xen::wall_clock();
    let info = Info {
        size: size_of::<Info>() as u32,
        version: abi::ABI_VERSION,
        features: features::GET | features::SET | features::CLOCK,
        build_id: patch::BUILD_ID,
        clock_domains: clock::domains(),
        now: xen::now(),
        wc_sec,
        wc_nsec,
        reserved: 0,
    };
    give(request, &info, progress)
}

pub fn domain(d: Domain, request: &Request, progress: &mut Progress) -> Result<(), Refusal> {
    if !d.is_hvm() {
        return Err(refuse(EOPNOTSUPP, Fault::NOT_HVM));
    }
    let mut s = DomainState { fields: domain_fields::SETTABLE, max_vcpus: d.max_vcpus(), ..DomainState::default() };
    s.flags = domain_flags::HVM
        | flag(!d.fifo().is_null(), domain_flags::FIFO)
        | flag(d.has_32bit_shinfo(), domain_flags::WIDTH_32)
        | flag(d.is_paused(), domain_flags::PAUSED)
        | flag(d.is_dying(), domain_flags::DYING)
        | flag(d.get::<u8>(t::D_SHUTTING_DOWN) | d.get::<u8>(t::D_SHUT_DOWN) != 0, domain_flags::SHUTDOWN)
        | flag(d.get::<u8>(t::D_VTSC) != 0, domain_flags::VTSC)
        | flag(d.get::<u32>(t::D_EMULATION) & t::EMU_USE_PIRQ as u32 != 0, domain_flags::HVM_PIRQS)
        | flag(d.get::<u8>(t::D_TIME_OFFSET_SET) != 0, domain_flags::TIME_OFFSET_SET);
    let pl: *const u8 = d.get(t::D_PL_TIME);
    // SAFETY: shared_info is a page of Xen's heap, in the direct map. `pl` is the HVM domain's and lives as long as the domain; the
    // table.
    unsafe {
        s.shared_info_gfn = xen::gfn_of_mapping(d.shared_info());
        if !pl.is_null() {
            s.hvm_stime_offset = load(pl, t::PL_STIME_OFFSET);
            s.hvm_last_guest_time = load(pl, t::PL_LAST_GUEST_TIME);
        }
    }
    s.max_port = d.get(t::D_MAX_PORT);
    s.pirqs = d.get(t::D_NR_PIRQS);
    s.create_flags = d.get(t::D_OPTIONS);
    s.vm_assist = d.get(t::D_VM_ASSIST);
    {
        let _held = d.event_lock();
        s.valid_ports = d.get(t::D_VALID_EVTCHNS);
        s.active_ports = d.get(t::D_ACTIVE_EVTCHNS);
        s.xen_ports = d.get(t::D_XEN_EVTCHNS);
        let fifo = d.fifo();
        if !fifo.is_null() {
            s.fifo_words = d.fifo_words();
            s.fifo_pages = s.fifo_words / abi::FIFO_WORDS_PER_PAGE;
            for (i, gfn) in s.fifo_array.iter_mut().enumerate().take(s.fifo_pages as usize) {
                // SAFETY: the event lock is held, so the structure and its pages stay; `i` is below the number of pages, and
                // `fifo_array` has 128 like Xen's. A page that is there is mapped for good.
                unsafe {
                    let page: *const u8 = load(fifo, i * 8);
                    if !page.is_null() {
                        *gfn = xen::gfn_of_mapping(page);
                    }
                }
            }
        }
    }
    clock::describe(d, &mut s);
    let armed: u32 = d.get(t::D_WATCHDOG_MAP);
    for (i, watchdog) in s.watchdogs.iter_mut().enumerate() {
        let timer = d.at(t::D_WATCHDOG_TIMER + i * t::T_SIZE);
        watchdog.in_use = armed >> i & 1;
        // SAFETY: one of the domain's `NR_WATCHDOGS` timers, initialised with the domain: `s.watchdogs` has as many entries.
        unsafe {
            if watchdog.in_use != 0 && xen::timer_is_active(timer) {
                watchdog.remaining = xen::timer_expires(timer).wrapping_sub(s.now).max(1);
            }
        }
    }
    give(request, &s, progress)
}

pub fn vcpu(d: Domain, request: &Request, progress: &mut Progress) -> Result<(), Refusal> {
    if !d.is_hvm() {
        return Err(refuse(EOPNOTSUPP, Fault::NOT_HVM));
    }
    let v = d.vcpu(request.index).ok_or(refuse(ENOENT, Fault::VCPU))?;
    if d.is_paused() && d != xen::current().domain() {
        bring_cr2_up_to_date(v);
    }
    let s = vcpu_state(d, v);
    give(request, &s, progress)
}

/// Copies a paused guest's CR2 to where Xen's HVM context takes it from.
///
/// An AMD CPU keeps it in the VMCB, and Xen 4.17 never copies it out of there (mended upstream in 2026: "x86/svm: Always sync guest CR2
/// on VMExit"), so that a save has an old value, mostly 0. A guest that takes part in its save is never inside its page-fault handler then;
/// one that is just held may have taken the fault and not read CR2 yet.
fn bring_cr2_up_to_date(v: Vcpu) {
    if !xen::is_svm() {
        return;
    }
    let vmcb: *const u8 = v.get(t::V_VMCB);
    if !vmcb.is_null() {
        // SAFETY: `is_svm` says that this part of the vCPU is SVM's; not null; Xen frees a VMCB only with its vCPU. The guest is
        // paused.
        let cr2: u64 = unsafe { load(vmcb, t::VMCB_CR2) };
        v.set(t::V_CR2, cr2);
    }
}

fn vcpu_state(d: Domain, v: Vcpu) -> VcpuState {
    let offset = clock::offset(d);
    let pause_flags: u64 = v.get(t::V_PAUSE_FLAGS);
    let mut s = VcpuState { fields: vcpu_fields::SETTABLE, id: v.id(), pause_flags, ..VcpuState::default() };
    s.flags = flag(v.get::<u8>(t::V_INITIALISED) != 0, vcpu_flags::INITIALISED)
        | flag(pause_flags >> t::VPF_DOWN_BIT & 1 != 0, vcpu_flags::DOWN)
        | flag(pause_flags >> t::VPF_BLOCKED_BIT & 1 != 0, vcpu_flags::BLOCKED);
    // SAFETY: the mask has a bit for each of the domain's vCPUs, of which `v` is one, and lives as long as the domain.
    let polling: u8 = unsafe {
        let mask: *const u8 = poll_mask(d);
        load(mask, (v.id() / 8) as usize)
    };
    s.flags |= flag(polling >> (v.id() % 8) & 1 != 0, vcpu_flags::POLLING);
    s.poll_port = v.get(t::V_POLL_EVTCHN);

    if v.get::<u64>(t::V_INFO_MFN) != u64::MAX {
        let info: *const u8 = v.get(t::V_INFO);
        s.flags |= vcpu_flags::VCPU_INFO_PLACED;
        // SAFETY: its mfn is set, which Xen does after it has mapped the page and set the pointer; it unmaps it in a domctl only,
        // and this is one.
        s.vcpu_info_gfn = unsafe { xen::gfn_of_mapping(info) };
        s.vcpu_info_offset = (info as u64 & (xen::PAGE_SIZE - 1)) as u32;
    }
    s.upcall_vector = u32::from(v.get::<u8>(t::V_UPCALL));
    s.runstate_area = v.get(t::V_RUNSTATE_GUEST);
    s.time_area = v.get(t::V_TIME_AREA);
    s.runstate = v.get(t::V_RUNSTATE + t::RS_STATE);
    s.runstate_entry = v.get::<i64>(t::V_RUNSTATE + t::RS_ENTRY).wrapping_add(offset);
    s.runstate_time = v.get(t::V_RUNSTATE + t::RS_TIME);
    {
        let _held = d.event_lock();
        let control = v.fifo_control();
        if !control.is_null() {
            s.flags |= vcpu_flags::FIFO_CONTROL;
            // SAFETY: not null, and the event lock is held: the page is mapped for good and stays so.
            s.fifo_control_gfn = unsafe { xen::gfn_of_mapping(control) };
            s.fifo_control_offset = (control as u64 & (xen::PAGE_SIZE - 1)) as u32;
        }
        let fifo = v.fifo();
        if !fifo.is_null() {
            for (i, tail) in s.fifo_tails.iter_mut().enumerate() {
                // SAFETY: not null, and kept by the event lock; 16 queues like `fifo_tails` (the table).
                *tail = unsafe { load(fifo, t::FV_QUEUE + i * t::FQ_SIZE + t::FQ_TAIL) };
            }
        }
        s.virq_ports = v.get(t::V_VIRQ);
    }
    // SAFETY: one of the vCPU's timers (`Vcpu`'s invariant).
    unsafe {
        let singleshot = v.at(t::V_SINGLESHOT);
        if xen::timer_is_active(singleshot) {
            s.flags |= vcpu_flags::SINGLESHOT;
            s.singleshot_expires = xen::timer_expires(singleshot).wrapping_add(offset);
        }
    }
    s.periodic_period = v.get(t::V_PERIOD);
    if s.periodic_period != 0 {
        s.flags |= vcpu_flags::PERIODIC;
        s.periodic_last = v.get::<i64>(t::V_PERIOD_LAST).wrapping_add(offset);
    }
    s.hvm_stime_offset = v.get(t::V_HVM_STIME_OFFSET);
    s.tsc_offset = v.get(t::V_TSC_OFFSET);
    (s.tsc, s.tsc_at) = clock::guest_tsc(d, v);
    s
}

/// `d->poll_mask`: a pointer where a domain can have more vCPUs than a word has bits, else the word itself.
fn poll_mask(d: Domain) -> *const u8 {
    if t::POLL_MASK_IS_POINTER != 0 { d.get(t::D_POLL_MASK) } else { d.at(t::D_POLL_MASK) }
}

/// Ports that one hold of the event lock covers, and the look-ups it makes at most.
const CHUNK: usize = 16;
const CHUNK_PORTS: u32 = 256;

pub fn ports(d: Domain, request: &Request, progress: &mut Progress) -> Result<(), Refusal> {
    check_list::<PortState>(request)?;
    let mut port = request.index.max(1);
    while progress.done < request.count {
        let room = (request.count - progress.done).min(CHUNK as u32);
        let mut chunk = [PortState::default(); CHUNK];
        let mut found = 0u32;
        let mut end = false;
        {
            let _held = d.event_lock();
            // Counted, not compared with a last port: the first one may be the largest number there is.
            for _ in 0..CHUNK_PORTS {
                let Some(evtchn) = d.evtchn(port) else {
                    end = true;
                    break;
                };
                if evtchn.state() != port_state::FREE {
                    let Some(entry) = chunk.get_mut(found as usize) else { break };
                    if found == room {
                        break;
                    }
                    *entry = port_state_of(d, port, evtchn);
                    found += 1;
                }
                port += 1;
            }
        }
        for entry in chunk.iter().take(found as usize) {
            give_entry(request, progress.done, entry)?;
            progress.done += 1;
        }
        if end {
            return Ok(());
        }
    }
    // There may be nothing more; the next call says so.
    progress.next = port;
    Ok(())
}

fn port_state_of(d: Domain, port: u32, evtchn: Evtchn) -> PortState {
    let state = evtchn.state();
    let lastq: u32 = evtchn.get(t::E_LASTQ);
    let mut s = PortState {
        port,
        state,
        notify_vcpu: evtchn.get(t::E_NOTIFY),
        priority: evtchn.get(t::E_PRIORITY),
        last_priority: lastq as u8,
        last_vcpu: (lastq >> 16) as u16,
        ..PortState::default()
    };
    s.flags = if evtchn.consumer_is_xen() { port_flags::XEN } else { 0 };
    if d.fifo().is_null() {
        s.flags |= if d.two_level_bit(port, false) { port_flags::PENDING } else { 0 };
        s.flags |= if d.two_level_bit(port, true) { port_flags::MASKED } else { 0 };
        s.priority = 0;
        s.last_priority = 0;
        s.last_vcpu = 0;
    } else if let Some(word) = d.fifo_word(port) {
        s.word = word;
        s.flags |= if word >> 31 & 1 != 0 { port_flags::PENDING } else { 0 };
        s.flags |= if word >> 30 & 1 != 0 { port_flags::MASKED } else { 0 };
        s.flags |= if word >> 29 & 1 != 0 { port_flags::LINKED } else { 0 };
    } else if evtchn.get::<u8>(t::E_PENDING) != 0 {
        // Xen never takes this mark back, so with a word it means nothing any more.
        s.flags |= port_flags::PENDING_EARLY;
    }
    if state == port_state::UNBOUND {
        s.remote_domid = evtchn.get(t::E_UNBOUND_DOMID);
    } else if state == port_state::INTERDOMAIN {
        let remote: *mut u8 = evtchn.get(t::E_REMOTE_DOM);
        s.remote_port = evtchn.get(t::E_REMOTE_PORT);
        if !remote.is_null() {
            s.remote_domid = Domain(remote).id();
        }
    } else if state == port_state::PIRQ {
        s.irq = evtchn.get(t::E_PIRQ);
    } else if state == port_state::VIRQ {
        s.irq = evtchn.get(t::E_VIRQ);
    }
    s
}

pub fn pirqs(d: Domain, request: &Request, progress: &mut Progress) -> Result<(), Refusal> {
    check_list::<PirqState>(request)?;
    if !d.is_hvm() {
        return Err(refuse(EOPNOTSUPP, Fault::NOT_HVM));
    }
    let limit: u32 = d.get(t::D_NR_PIRQS);
    let mut pirq = request.index;
    let mut looked = 0;
    while pirq < limit && progress.done < request.count {
        // Bounds one call's work; the caller goes on from `next`.
        if looked == 4 * abi::MAX_ENTRIES {
            break;
        }
        looked += 1;
        let state = {
            let _held = d.event_lock();
            let info = d.pirq(pirq);
            if info.is_null() {
                None
            } else {
                // SAFETY: not null, and the event lock, under which Xen takes pirqs away, is held. The domain is HVM (checked
                // above), so both fields are there.
                let (port, emuirq): (u32, i32) = unsafe { (load(info, t::PIRQ_EVTCHN), load(info, t::PIRQ_EMUIRQ)) };
                Some(PirqState { pirq, emuirq, port, reserved: 0 })
            }
        };
        if let Some(state) = state
            && (state.port != 0 || state.emuirq != abi::EMUIRQ_UNBOUND)
        {
            give_entry(request, progress.done, &state)?;
            progress.done += 1;
        }
        pirq += 1;
    }
    progress.next = if pirq < limit { pirq } else { 0 };
    Ok(())
}

const fn flag(condition: bool, value: u32) -> u32 {
    if condition { value } else { 0 }
}
