// SPDX-License-Identifier: GPL-2.0-only
//! A clock offset for each domain, and the places of Xen where guests are told host time or name it.
//!
//! A guest's system time is the host's `NOW()` plus its domain's offset. Stock Xen has no such offset, so each function that hands out
//! or takes host time for a guest is wrapped: for a domain without an offset the original runs, untouched; for one
//! with an offset the few operations concerned are done here in the guest's time.
//!
//! | function of Xen | what it does for a guest | with an offset |
//! |---|---|---|
//! | `__update_vcpu_system_time` | writes vcpu_time_info | `system_time` has the offset added |
//! | `update_domain_wallclock_time` | writes `wc_*` of shared_info | the offset is taken off, so that wall time goes on |
//! | `update_runstate_area` | writes the runstate area | `state_entry_time` has the offset added |
//! | `common_vcpu_op` | singleshot timer, runstate | in the guest's time |
//! | `compat_common_vcpu_op`, `compat_vcpu_op` | the same for 32-bit guests | in the guest's time |
//! | `do_set_timer_op` | timer | expiry has the offset taken off |
//! | `do_poll` | time-out of SCHEDOP_poll | likewise |
//! | `do_hvm_op` | HVMOP_get_time | the offset is added |
//!
//! Platform timers, the TSC and the viridian clock have offsets of their own in the HVM context and need nothing here.

use core::sync::atomic::{AtomicI64, AtomicPtr, AtomicU32, Ordering, compiler_fence};

use crate::abi;
use crate::table as t;
use crate::xen::{self, Domain, EFAULT, EINVAL, Vcpu, load, store};

/// One slot for each domid. It belongs to a domain only while `owner` is that domain: a domid can be used again before the last
/// domain that had it is freed, the memory of a domain cannot.
struct Slot {
    owner: AtomicPtr<u8>,
    offset: AtomicI64,
    /// What the guest's wall clock is ahead of the host's, ns.
    ahead: AtomicI64,
}

const SLOTS: usize = 0x8000;

static TABLE: [Slot; SLOTS] =
    [const { Slot { owner: AtomicPtr::new(core::ptr::null_mut()), offset: AtomicI64::new(0), ahead: AtomicI64::new(0) } }; SLOTS];

/// What the guest's wall clock is ahead of the host's, ns: a guest that came from a host whose clock was wrong is not to see that.
fn ahead(d: Domain) -> i64 {
    let slot = slot(d);
    if slot.owner.load(Ordering::Acquire) == d.0 { slot.ahead.load(Ordering::Relaxed) } else { 0 }
}

/// Guest's TSC on that vCPU, and guest's system time, of one moment.
pub fn guest_tsc(d: Domain, v: Vcpu) -> (u64, i64) {
    let at = xen::rdtsc();
    // SAFETY: both only calculate. `v` is a vCPU of an HVM domain (GET and SET refuse others), whose `pl_time` has a lock that is
    // taken meanwhile and that nobody here holds. The TSC is of this CPU (the context).
    unsafe { (xen::hvm_get_guest_tsc_fixed(v.0, at), xen::get_s_time_fixed(at).wrapping_add(offset(d))) }
}

/// Lets the TSC of a paused guest's vCPU run through `tsc` at `when` of the guest's system time, at the rate that the domain has.
pub fn set_guest_tsc(d: Domain, v: Vcpu, tsc: u64, when: i64) {
    let (reads, now) = guest_tsc(d, v);
    let since = now.wrapping_sub(when);
    // For an HVM guest this only scales.
    // SAFETY: only calculates, from fields of the domain (`Domain`'s invariant).
    let ticks = unsafe { xen::gtime_to_gtsc(d.0, since.unsigned_abs()) };
    let wanted = if since < 0 { tsc.wrapping_sub(ticks) } else { tsc.wrapping_add(ticks) };
    let to_guest = v.get::<u64>(t::V_TSC_OFFSET).wrapping_add(wanted.wrapping_sub(reads));
    v.set(t::V_TSC_OFFSET, to_guest);
    xen::set_tsc_offset(v, to_guest);
}

/// Domains that own a slot.
static DOMAINS: AtomicU32 = AtomicU32::new(0);

#[inline(always)]
fn slot(d: Domain) -> &'static Slot {
    // The mask keeps the index inside the table whatever the domid, in speculation too.
    // SAFETY: masked to the length of the table, which is a power of 2.
    unsafe { TABLE.get_unchecked(usize::from(d.id()) & (SLOTS - 1)) }
}

/// The domain's clock offset, ns.
#[inline(always)]
pub fn offset(d: Domain) -> i64 {
    let slot = slot(d);
    if slot.owner.load(Ordering::Acquire) == d.0 { slot.offset.load(Ordering::Relaxed) } else { 0 }
}

/// Number of domains that have an offset.
pub fn domains() -> u32 {
    DOMAINS.load(Ordering::SeqCst)
}

/// Gives a paused domain its offset, and its wall clock at its system time 0 (ns; 0: as the host's). Timers that run keep their expiry in
/// the guest's time, so they move in the host's.
pub fn set(d: Domain, new: i64, wall: i64) {
    let old = offset(d);
    let slot = slot(d);
    let owned = slot.owner.load(Ordering::Acquire) == d.0;
    if new == 0 && wall == 0 {
        if owned {
            slot.owner.store(core::ptr::null_mut(), Ordering::Release);
            DOMAINS.fetch_sub(1, Ordering::SeqCst);
        }
    } else {
        slot.offset.store(new, Ordering::Relaxed);
        slot.ahead.store(0, Ordering::Relaxed);
        // A slot of a former domain of this domid counts as ours from here on. That domain may be freed at this very moment, so taking the
        // slot and seeing whose it was is one step, as it is in `release`.
        if !owned && slot.owner.swap(d.0, Ordering::SeqCst).is_null() {
            DOMAINS.fetch_add(1, Ordering::SeqCst);
        }
    }
    if wall != 0 {
        let (sec, nsec) = xen::wall_clock();
        let (sec, nsec) = guest_wall_clock(d, sec, nsec);
        let host = (sec as i64).wrapping_mul(NS_PER_SEC).wrapping_add(i64::from(nsec));
        slot.ahead.store(wall.wrapping_sub(host), Ordering::Relaxed);
    }
    let shift = old.wrapping_sub(new);
    for id in 0..d.max_vcpus() {
        let Some(v) = d.vcpu(id) else { continue };
        if shift == 0 {
            break;
        }
        // SAFETY: lock and timers are the vCPU's (`Vcpu`'s invariant); Xen writes the period's fields under this lock, which nobody
        // here holds. The domain lock is held and the guest paused. `set_timer` takes the timer's own lock, which comes inside, as
        // in Xen.
        unsafe {
            let _held = xen::Spin::lock(v.at(t::V_PERIODIC_LOCK));
            // Of a timer that is off, the last tick is some host time gone by. Moved ahead of the host's clock it would keep a timer that
            // the guest starts later from ticking until then.
            if v.get::<i64>(t::V_PERIOD) != 0 {
                let last: i64 = v.get(t::V_PERIOD_LAST);
                v.set(t::V_PERIOD_LAST, last.saturating_add(shift));
            }
            for timer in [v.at(t::V_SINGLESHOT), v.at(t::V_POLL_TIMER)] {
                if xen::timer_is_active(timer) {
                    xen::set_timer(timer, xen::timer_expires(timer).saturating_add(shift).max(1));
                }
            }
        }
    }
    ferry_update_domain_wallclock_time(d.0);
}

/// Frees the slot of a domain that is being destroyed.
fn release(d: Domain) {
    if slot(d).owner.compare_exchange(d.0, core::ptr::null_mut(), Ordering::SeqCst, Ordering::Relaxed).is_ok() {
        DOMAINS.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Host time of a time that a guest named, at least 1 (0 means "none" to Xen).
fn host_time(guest: i64, offset: i64) -> i64 {
    guest.wrapping_sub(offset).max(1)
}

// ---- the functions that stand in for Xen's ----------------------------------------------------------------------------

unsafe extern "C" {
    fn ferry_original_update_vcpu_system_time(v: *mut u8, force: i32);
    fn ferry_original_update_runstate_area(v: *mut u8) -> bool;
    fn ferry_original_common_vcpu_op(cmd: i32, v: *mut u8, arg: u64) -> i64;
    fn ferry_original_compat_common_vcpu_op(cmd: i32, v: *mut u8, arg: u64) -> i32;
    fn ferry_original_compat_vcpu_op(cmd: i32, id: u32, arg: u64) -> i32;
    fn ferry_original_do_set_timer_op(timeout: i64) -> i64;
    fn ferry_original_do_poll(poll: *mut u8) -> i64;
    fn ferry_original_do_hvm_op(op: u64, arg: u64) -> i64;
    fn ferry_original_arch_domain_destroy(d: *mut u8);
}

/// `struct vcpu_time_info` (public/xen.h), aligned to 4 as in a 32-bit guest.
#[repr(C, packed(4))]
#[derive(Clone, Copy)]
struct TimeInfo {
    version: u32,
    pad0: u32,
    tsc_timestamp: u64,
    system_time: u64,
    tsc_to_system_mul: u32,
    tsc_shift: i8,
    flags: u8,
    pad1: [u8; 2],
}

const PVCLOCK_TSC_STABLE: u8 = 1;

/// `__update_vcpu_system_time(v, force)`.
#[unsafe(no_mangle)]
extern "C" fn ferry_update_vcpu_system_time(v: *mut u8, force: i32) {
    let d = Vcpu(v).domain();
    let offset = offset(d);
    if offset == 0 {
        // SAFETY: Xen's own function, with the arguments that Xen gave.
        return unsafe { ferry_original_update_vcpu_system_time(v, force) };
    }
    // SAFETY: `v` is a vCPU that Xen is at work on, `d` its domain; one with an offset is HVM (only SET_CLOCK gives one).
    unsafe { write_time_info(Vcpu(v), d, offset, force != 0) }
}

/// Writes an HVM guest's vcpu_time_info, in the order that its readers expect: version odd, contents, version even.
///
/// # Safety
/// `v` is a vCPU of the HVM domain `d`: the running one, or one that does not run and that Xen is just writing this for.
unsafe fn write_time_info(v: Vcpu, d: Domain, offset: i64, force: bool) {
    let info: *mut u8 = v.get(t::V_INFO);
    if info.is_null() {
        return;
    }
    let at = if d.has_32bit_shinfo() { t::VI32_TIME } else { t::VI_TIME };
    // SAFETY: a vcpu_info is 64 bytes, this part of it included (the table).
    let place = unsafe { info.add(at).cast::<TimeInfo>() };
    let cpu = xen::cpu_time();

    let (mut tsc, mul, shift);
    if d.get::<u8>(t::D_VTSC) != 0 {
        // The emulated TSC is bound to the platform timers' time, which has its own offset: ours stays out of it.
        let pl: *const u8 = d.get(t::D_PL_TIME);
        // SAFETY: an HVM domain has its `pl_time` as long as it lives (`Domain`'s invariant); the table.
        let stime = cpu
            .local_stime
            .wrapping_add(unsafe { load(pl, t::PL_STIME_OFFSET) })
            .wrapping_add(v.get(t::V_HVM_STIME_OFFSET));
        tsc = if stime >= 0 {
            // SAFETY: only calculates, from fields of the domain.
            unsafe { xen::gtime_to_gtsc(d.0, stime as u64) }
        } else {
            // SAFETY: as above.
            unsafe { xen::gtime_to_gtsc(d.0, stime.wrapping_neg() as u64) }.wrapping_neg()
        };
        mul = d.get(t::D_VTSC_TO_NS + t::TS_MUL);
        shift = d.get::<i32>(t::D_VTSC_TO_NS + t::TS_SHIFT) as i8;
    } else if xen::tsc_scaling_supported() {
        // SAFETY: only calculates, from fields of the domain, which is HVM.
        tsc = unsafe { xen::hvm_scale_tsc(d.0, cpu.local_tsc) };
        mul = d.get(t::D_VTSC_TO_NS + t::TS_MUL);
        shift = d.get::<i32>(t::D_VTSC_TO_NS + t::TS_SHIFT) as i8;
    } else {
        tsc = cpu.local_tsc;
        mul = cpu.mul_frac;
        shift = cpu.shift as i8;
    }
    tsc = tsc.wrapping_add(v.get(t::V_TSC_OFFSET));

    // SAFETY: the vcpu_info is in shared_info, or in a page that Xen unmaps only of a domain whose vCPUs have stopped for good or
    // are reset. The guest may write it at any time, hence volatile. Xen's function writes to its copy `new` too, which is not
    // looked at again.
    unsafe {
        let old = place.read_volatile();
        let mut new = TimeInfo {
            version: old.version,
            pad0: 0,
            tsc_timestamp: tsc,
            system_time: cpu.local_stime.wrapping_add(offset) as u64,
            tsc_to_system_mul: mul,
            tsc_shift: shift,
            flags: if xen::clocksource_is_tsc() { PVCLOCK_TSC_STABLE } else { 0 },
            pad1: [0; 2],
        };
        let same = old.tsc_timestamp == new.tsc_timestamp
            && old.system_time == new.system_time
            && old.tsc_to_system_mul == new.tsc_to_system_mul
            && old.tsc_shift == new.tsc_shift
            && old.flags == new.flags;
        if same && !force {
            return;
        }
        let version = &raw mut (*place).version;
        new.version = old.version.wrapping_add(1) | 1;
        version.write_volatile(new.version);
        compiler_fence(Ordering::SeqCst);
        place.write_volatile(new);
        compiler_fence(Ordering::SeqCst);
        version.write_volatile(new.version.wrapping_add(1));
        xen::update_secondary_system_time(v.0, (&raw mut new).cast());
    }
}

/// `update_domain_wallclock_time(d)`, whole: also for domains without an offset, for which it does what Xen's does.
#[unsafe(no_mangle)]
extern "C" fn ferry_update_domain_wallclock_time(d: *mut u8) {
    let d = Domain(d);
    let (_held, sec, nsec) = xen::locked_wall_clock();
    let (sec, nsec) = guest_wall_clock(d, sec, nsec);
    let si = d.shared_info();
    let [version, wc_sec, wc_nsec, wc_sec_hi] = if d.has_32bit_shinfo() {
        [t::SI32_WC_VERSION, t::SI32_WC_SEC, t::SI32_WC_NSEC, t::SI32_WC_SEC_HI]
    } else {
        [t::SI_WC_VERSION, t::SI_WC_SEC, t::SI_WC_NSEC, t::SI_WC_SEC_HI]
    };
    // SAFETY: every domain that Xen does this for has a shared_info, a page; the table. Xen writes these fields under the lock held
    // here.
    unsafe {
        let odd = load::<u32>(si, version).wrapping_add(1) | 1;
        store(si, version, odd);
        compiler_fence(Ordering::SeqCst);
        store(si, wc_sec, sec as u32);
        store(si, wc_nsec, nsec);
        store(si, wc_sec_hi, (sec >> 32) as u32);
        compiler_fence(Ordering::SeqCst);
        store(si, version, odd.wrapping_add(1));
    }
}

const NS_PER_SEC: i64 = 1_000_000_000;

/// Wall clock at the guest's system time 0. Its wall time is this plus its system time, so the clock offset comes off.
fn guest_wall_clock(d: Domain, sec: u64, nsec: u32) -> (u64, u32) {
    let offset = offset(d).wrapping_sub(ahead(d));
    let sec = sec.wrapping_add(d.get::<i64>(t::D_TIME_OFFSET) as u64);
    let mut ns = i64::from(nsec) - offset % NS_PER_SEC;
    let mut sec = sec.wrapping_sub((offset / NS_PER_SEC) as u64);
    if ns < 0 {
        ns += NS_PER_SEC;
        sec = sec.wrapping_sub(1);
    } else if ns >= NS_PER_SEC {
        ns -= NS_PER_SEC;
        sec = sec.wrapping_add(1);
    }
    (sec, ns as u32)
}

/// `struct vcpu_runstate_info` (public/vcpu.h).
#[repr(C)]
#[derive(Clone, Copy)]
struct Runstate {
    state: i32,
    pad: u32,
    entry: u64,
    time: [u64; 4],
}

/// The same for 32-bit guests, where 64-bit fields are aligned to 4.
#[repr(C, packed(4))]
#[derive(Clone, Copy)]
struct Runstate32 {
    state: i32,
    entry: u64,
    time: [u64; 4],
}

const _: () = assert!(
    size_of::<Runstate>() == t::RS_SIZE
        && core::mem::offset_of!(Runstate, entry) == t::RS_ENTRY
        && core::mem::offset_of!(Runstate, time) == t::RS_TIME
        && size_of::<Runstate32>() == t::RS32_SIZE
        && core::mem::offset_of!(Runstate32, entry) == t::RS32_ENTRY
        && core::mem::offset_of!(Runstate32, time) == t::RS32_TIME
        && core::mem::offset_of!(TimeInfo, system_time) == 16
        && size_of::<TimeInfo>() == 32
);

/// Top bit of `state_entry_time` while the area is being written (public/vcpu.h, `XEN_RUNSTATE_UPDATE`).
const RUNSTATE_UPDATE: u64 = 1 << 63;

/// `update_runstate_area(v)`. True when there is nothing left to do.
#[unsafe(no_mangle)]
extern "C" fn ferry_update_runstate_area(v: *mut u8) -> bool {
    let offset = offset(Vcpu(v).domain());
    if offset == 0 {
        // SAFETY: Xen's own function, with the argument that Xen gave.
        return unsafe { ferry_original_update_runstate_area(v) };
    }
    // SAFETY: Xen calls this for the running vCPU: before `set_current()` for the one that is switched away from, after it for the
    // next.
    unsafe { write_runstate_area(Vcpu(v), offset) }
    true
}

/// Writes the runstate area of the vCPU that is running, or is being switched away from, on this CPU.
///
/// # Safety
/// `v` is what `current` says, so that its address space is the one that is written to.
unsafe fn write_runstate_area(v: Vcpu, offset: i64) {
    let area: u64 = v.get(t::V_RUNSTATE_GUEST);
    if area == 0 {
        return;
    }
    let d = v.domain();
    let narrow = d.has_32bit_shinfo();
    let announce = d.get::<u64>(t::D_VM_ASSIST) >> t::ASSIST_RUNSTATE_UPDATE & 1 != 0;
    // The top byte of state_entry_time carries the mark; Xen writes just that byte.
    let top = area.wrapping_add(if narrow { t::RS32_ENTRY } else { t::RS_ENTRY } as u64 + 7);
    // SAFETY: the table, and `Vcpu`'s invariant; a vCPU that is running changes its runstate on this CPU only. What is copied out
    // are locals of the sizes given.
    unsafe {
        let mut rs: Runstate = load(v.0, t::V_RUNSTATE);
        // A guest whose system time lies before 0 must not take its sign for the mark: it would wait for it to go for ever.
        rs.entry = rs.entry.wrapping_add(offset as u64) & !RUNSTATE_UPDATE;
        // A page that is not there makes the writes fail; Xen ignores that as well.
        if announce {
            rs.entry |= RUNSTATE_UPDATE;
            let mark = (rs.entry >> 56) as u8;
            let _ = xen::copy_to_guest(top, &mark, 1);
            compiler_fence(Ordering::SeqCst);
        }
        if narrow {
            let rs = Runstate32 { state: rs.state, entry: rs.entry, time: rs.time };
            let _ = xen::copy_to_guest(area, (&raw const rs).cast(), size_of::<Runstate32>() as u32);
        } else {
            let _ = xen::copy_to_guest(area, (&raw const rs).cast(), size_of::<Runstate>() as u32);
        }
        if announce {
            rs.entry &= !RUNSTATE_UPDATE;
            compiler_fence(Ordering::SeqCst);
            let mark = (rs.entry >> 56) as u8;
            let _ = xen::copy_to_guest(top, &mark, 1);
        }
    }
}

// public/vcpu.h
const VCPUOP_GET_RUNSTATE_INFO: i32 = 4;
const VCPUOP_REGISTER_RUNSTATE_AREA: i32 = 5;
const VCPUOP_SET_SINGLESHOT_TIMER: i32 = 8;

/// `common_vcpu_op(cmd, v, arg)`.
#[unsafe(no_mangle)]
extern "C" fn ferry_common_vcpu_op(cmd: i32, v: *mut u8, arg: u64) -> i64 {
    let offset = offset(Vcpu(v).domain());
    // SAFETY: Xen gave the arguments, and `v` is a vCPU of the running domain: its own function takes them as they are, ours the
    // same `v`. `rs` is a local of the size given.
    unsafe {
        if offset == 0 {
            return ferry_original_common_vcpu_op(cmd, v, arg);
        }
        match cmd {
            VCPUOP_SET_SINGLESHOT_TIMER => set_singleshot(Vcpu(v), arg, offset),
            VCPUOP_GET_RUNSTATE_INFO => {
                let mut rs = read_runstate(v, offset);
                match xen::copy_to_guest(arg, (&raw mut rs).cast(), size_of::<Runstate>() as u32) {
                    Ok(()) => 0,
                    Err(e) => e,
                }
            }
            VCPUOP_REGISTER_RUNSTATE_AREA => {
                let rc = ferry_original_common_vcpu_op(cmd, v, arg);
                if rc == 0 {
                    rewrite_new_area(Vcpu(v), offset);
                }
                rc
            }
            _ => ferry_original_common_vcpu_op(cmd, v, arg),
        }
    }
}

/// `VCPUOP_get_runstate_info`, in the guest's time.
///
/// # Safety
/// `v` is a vCPU, and this is a hypercall with no lock of the scheduler held.
unsafe fn read_runstate(v: *mut u8, offset: i64) -> Runstate {
    let mut rs = Runstate { state: 0, pad: 0, entry: 0, time: [0; 4] };
    // SAFETY: `v` is the caller's word; `rs` is laid out as Xen's structure (asserted above).
    unsafe { xen::vcpu_runstate_get(v, (&raw mut rs).cast()) };
    rs.entry = rs.entry.wrapping_add(offset as u64);
    rs
}

/// A just registered area was filled by Xen with host time; fill it again. Another vCPU's area gets its turn when that vCPU is
/// switched next, which is before it can look.
///
/// # Safety
/// `v` is a vCPU, and this is a hypercall.
unsafe fn rewrite_new_area(v: Vcpu, offset: i64) {
    if v == xen::current() {
        // SAFETY: it is the running vCPU.
        unsafe { write_runstate_area(v, offset) }
    }
}

/// `struct vcpu_set_singleshot_timer` (public/vcpu.h).
#[repr(C)]
struct SetSingleshot {
    timeout_abs_ns: u64,
    flags: u32,
    pad: u32,
}

/// `VCPUOP_set_singleshot_timer`, in the guest's time.
///
/// # Safety
/// `v` is a vCPU, and this is a hypercall.
unsafe fn set_singleshot(v: Vcpu, arg: u64, offset: i64) -> i64 {
    if v != xen::current() {
        return EINVAL;
    }
    let mut set = SetSingleshot { timeout_abs_ns: 0, flags: 0, pad: 0 };
    let timer = v.at(t::V_SINGLESHOT);
    // SAFETY: `set` is a local of the size given. `v` is the running vCPU (checked above): the timer is its own, these functions
    // take its lock themselves, and Xen sends its event from the same place.
    unsafe {
        if xen::copy_from_guest((&raw mut set).cast(), arg, size_of::<SetSingleshot>() as u32).is_err() {
            return EFAULT;
        }
        let guest_now = xen::now().wrapping_add(offset);
        // Compared by their difference, so that a guest whose system time lies before 0 counts on through it.
        if (set.timeout_abs_ns.wrapping_sub(guest_now as u64) as i64) < 0 {
            xen::stop_timer(timer);
            xen::send_timer_event(v.0);
        } else {
            xen::migrate_timer(timer, xen::processor_id());
            xen::set_timer(timer, host_time(set.timeout_abs_ns as i64, offset));
        }
    }
    0
}

/// `compat_common_vcpu_op(cmd, v, arg)`: the singleshot timer comes by way of `common_vcpu_op`, the runstate does not.
#[unsafe(no_mangle)]
extern "C" fn ferry_compat_common_vcpu_op(cmd: i32, v: *mut u8, arg: u64) -> i32 {
    let offset = offset(Vcpu(v).domain());
    // SAFETY: as in `ferry_common_vcpu_op`.
    unsafe {
        if offset == 0 || cmd != VCPUOP_GET_RUNSTATE_INFO {
            return ferry_original_compat_common_vcpu_op(cmd, v, arg);
        }
        let rs = read_runstate(v, offset);
        let rs = Runstate32 { state: rs.state, entry: rs.entry, time: rs.time };
        match xen::copy_to_guest(arg, (&raw const rs).cast(), size_of::<Runstate32>() as u32) {
            Ok(()) => 0,
            Err(e) => e as i32,
        }
    }
}

/// `compat_vcpu_op(cmd, vcpuid, arg)`: registers a 32-bit guest's runstate area itself.
#[unsafe(no_mangle)]
extern "C" fn ferry_compat_vcpu_op(cmd: i32, id: u32, arg: u64) -> i32 {
    // SAFETY: Xen's own function, with the arguments that Xen gave.
    let rc = unsafe { ferry_original_compat_vcpu_op(cmd, id, arg) };
    if rc == 0 && cmd == VCPUOP_REGISTER_RUNSTATE_AREA {
        let v = xen::current();
        let offset = offset(v.domain());
        if offset != 0 && v.id() == id {
            // SAFETY: it is the running vCPU.
            unsafe { write_runstate_area(v, offset) }
        }
    }
    rc
}

/// `do_set_timer_op(timeout)`: 0 stops the timer.
#[unsafe(no_mangle)]
extern "C" fn ferry_do_set_timer_op(timeout: i64) -> i64 {
    let offset = offset(xen::current().domain());
    let timeout = if offset == 0 || timeout == 0 {
        timeout
    } else if timeout > 0 || timeout.wrapping_sub(offset) > 0 {
        host_time(timeout, offset)
    } else {
        // Before the guest's time 0 and before the host's: Xen treats it as a wrapped time far ahead.
        timeout
    };
    // SAFETY: Xen's own function, which takes any time.
    unsafe { ferry_original_do_set_timer_op(timeout) }
}

/// `do_poll(sched_poll)`: the structure is the caller's own copy; its time-out is 0 for "none". `{ports: ptr, nr_ports: u32, timeout: u64}`.
#[unsafe(no_mangle)]
extern "C" fn ferry_do_poll(poll: *mut u8) -> i64 {
    const TIMEOUT: usize = 16;
    let offset = offset(xen::current().domain());
    // SAFETY: `poll` is Xen's own copy on its stack, a `struct sched_poll` of 24 bytes (public/sched.h); Xen's own function gets it
    // then.
    unsafe {
        if offset != 0 {
            let timeout: i64 = load(poll, TIMEOUT);
            if timeout != 0 {
                store(poll, TIMEOUT, host_time(timeout, offset));
            }
        }
        ferry_original_do_poll(poll)
    }
}

/// public/hvm/hvm_op.h
const HVMOP_GET_TIME: u64 = 10;

/// `do_hvm_op(op, arg)`.
#[unsafe(no_mangle)]
extern "C" fn ferry_do_hvm_op(op: u64, arg: u64) -> i64 {
    let offset = offset(xen::current().domain());
    if offset == 0 || op != HVMOP_GET_TIME {
        // SAFETY: Xen's own function, with the arguments that Xen gave.
        return unsafe { ferry_original_do_hvm_op(op, arg) };
    }
    let now = xen::now().wrapping_add(offset);
    // SAFETY: `now` is a local of 8 bytes.
    match unsafe { xen::copy_to_guest(arg, (&raw const now).cast(), 8) } {
        Ok(()) => 0,
        Err(e) => e,
    }
}

/// `arch_domain_destroy(d)`: the last that happens to a domain before its memory is freed.
#[unsafe(no_mangle)]
extern "C" fn ferry_arch_domain_destroy(d: *mut u8) {
    release(Domain(d));
    // SAFETY: Xen's own function, with the argument that Xen gave.
    unsafe { ferry_original_arch_domain_destroy(d) }
}

/// The hook that Xen calls to revert the payload, with every other CPU parked: refused while a guest lives by an offset, for its clock
/// would jump.
#[unsafe(no_mangle)]
extern "C" fn ferry_revert(payload: *mut u8) -> i32 {
    if domains() != 0 {
        return -abi::REVERT_REFUSED_ERRNO;
    }
    // SAFETY: Xen gave the payload and calls this in place of that function, in the state that it asks for: all other CPUs parked,
    // interrupts off.
    unsafe { xen::revert_payload(payload) }
}

/// Fills the clock's part of a domain's state.
pub fn describe(d: Domain, out: &mut abi::DomainState) {
    let (sec, nsec) = xen::wall_clock();
    out.now = xen::now();
    out.clock_offset = offset(d);
    (out.wc_sec, out.wc_nsec) = guest_wall_clock(d, sec, nsec);
    out.time_offset = d.get(t::D_TIME_OFFSET);
}

/// Writes the wall clock into the guest's shared_info, where its present width wants it.
pub fn write_wall_clock(d: Domain) {
    ferry_update_domain_wallclock_time(d.0);
}
