// SPDX-License-Identifier: GPL-2.0-only
//! What of Xen itself the extension touches: its functions by name, its structures by the offsets of the table.
//!
//! Nothing here owns memory. A [`Domain`] is valid while the domctl that found it runs (Xen holds it by RCU), or while Xen itself
//! is working on it (the wrapped functions). Every accessor is a plain load or store at an offset that the table draws from the
//! headers of the very build the payload is bound to.

use core::ffi::c_void;
use core::sync::atomic::{AtomicU32, Ordering, compiler_fence};

use crate::table as t;

pub const EPERM: i64 = -1;
pub const ENOENT: i64 = -2;
pub const ESRCH: i64 = -3;
pub const ENOMEM: i64 = -12;
pub const EFAULT: i64 = -14;
pub const EBUSY: i64 = -16;
pub const EEXIST: i64 = -17;
pub const EINVAL: i64 = -22;
pub const ENOSPC: i64 = -28;
pub const ENOBUFS: i64 = -105;
pub const EOPNOTSUPP: i64 = -95;

pub const PAGE_SIZE: u64 = 4096;
/// Domids from here on are Xen's own (public/xen.h, `DOMID_FIRST_RESERVED`).
pub const DOMID_FIRST_RESERVED: u16 = 0x7ff0;
/// M2P entry of a page that no gfn leads to (`INVALID_M2P_ENTRY`), and of a shared one (`SHARED_M2P_ENTRY`).
pub const M2P_NONE: u64 = u64::MAX;
pub const M2P_SHARED: u64 = u64::MAX - 1;

unsafe extern "C" {
    pub fn get_s_time() -> i64;
    fn domain_page_map_to_mfn(page: *const u8) -> u64;
    fn copy_to_user_hvm(to: u64, from: *const c_void, len: u32) -> u64;
    fn copy_from_user_hvm(to: *mut c_void, from: u64, len: u32) -> u64;
    fn copy_to_guest_pv(to: u64, from: *const c_void, len: u32) -> u32;
    fn copy_from_guest_pv(to: *mut c_void, from: u64, len: u32) -> u32;
    fn _spin_lock(lock: *mut u8);
    fn _spin_unlock(lock: *mut u8);
    fn _spin_lock_irqsave(lock: *mut u8) -> u64;
    fn _spin_unlock_irqrestore(lock: *mut u8, flags: u64);
    fn _spin_lock_recursive(lock: *mut u8);
    fn _spin_unlock_recursive(lock: *mut u8);
    fn queue_write_lock_slowpath(lock: *mut u8);
    fn _xzalloc(size: u64, align: u64) -> *mut u8;
    pub fn xfree(p: *mut u8);
    pub fn set_timer(timer: *mut u8, expires: i64);
    pub fn stop_timer(timer: *mut u8);
    pub fn migrate_timer(timer: *mut u8, cpu: u32);
    pub fn send_timer_event(v: *mut u8);
    pub fn update_secondary_system_time(v: *mut u8, time: *const u8) -> bool;
    pub fn gtime_to_gtsc(d: *mut u8, time: u64) -> u64;
    pub fn hvm_scale_tsc(d: *mut u8, tsc: u64) -> u64;
    /// Host's system time at a TSC of this CPU.
    pub fn get_s_time_fixed(at_tsc: u64) -> i64;
    /// What the guest would have read at a TSC of this CPU; it knows whether the guest's TSC is emulated.
    pub fn hvm_get_guest_tsc_fixed(v: *mut u8, at_tsc: u64) -> u64;
    #[link_name = "arch/x86/hvm/svm/svm.c#svm_set_tsc_offset"]
    fn svm_set_tsc_offset(v: *mut u8, offset: u64, at_tsc: u64);
    #[link_name = "arch/x86/hvm/vmx/vmx.c#vmx_set_tsc_offset"]
    fn vmx_set_tsc_offset(v: *mut u8, offset: u64, at_tsc: u64);
    pub fn vcpu_runstate_get(v: *mut u8, out: *mut u8);
    pub fn evtchn_alloc_unbound(alloc: *mut AllocUnbound, port: u32) -> i32;
    pub fn evtchn_close(d: *mut u8, port: i32, guest: bool) -> i32;
    pub fn pirq_get_info(d: *mut u8, pirq: i32) -> *mut u8;
    pub fn map_domain_emuirq_pirq(d: *mut u8, pirq: i32, emuirq: i32) -> i32;
    fn radix_tree_lookup(tree: *mut u8, index: u64) -> *mut u8;
    pub fn revert_payload(payload: *mut u8) -> i32;

    #[link_name = "common/event_fifo.c#map_guest_page"]
    fn map_guest_page(d: *mut u8, gfn: u64, virt: *mut *mut u8) -> i32;
    #[link_name = "common/event_fifo.c#unmap_guest_page.part.0"]
    fn unmap_guest_page(virt: *mut u8);
    #[link_name = "common/event_fifo.c#map_control_block"]
    pub fn map_control_block(v: *mut u8, gfn: u64, offset: u32) -> i32;

    #[link_name = "common/event_fifo.c#evtchn_port_ops_fifo"]
    static EVTCHN_PORT_OPS_FIFO: u8;
    #[link_name = "common/time.c#wc_sec"]
    static mut WC_SEC: u64;
    #[link_name = "common/time.c#wc_nsec"]
    static mut WC_NSEC: u32;
    #[link_name = "common/time.c#wc_lock"]
    static mut WC_LOCK: u8;
    #[link_name = "arch/x86/time.c#plt_src"]
    static PLT_SRC: u8;
    #[link_name = "arch/x86/time.c#per_cpu__cpu_time"]
    static PER_CPU_TIME: u8;
    #[link_name = "per_cpu____preempt_count"]
    static PER_CPU_PREEMPT_COUNT: u8;
    #[link_name = "hvm_funcs"]
    static HVM_FUNCS: u8;
}

/// `struct evtchn_alloc_unbound` (public/event_channel.h).
#[repr(C)]
pub struct AllocUnbound {
    pub dom: u16,
    pub remote_dom: u16,
    pub port: u32,
}

/// Loads a `T` at an offset into one of Xen's structures.
#[inline(always)]
pub unsafe fn load<T: Copy>(base: *const u8, offset: usize) -> T {
    unsafe { base.add(offset).cast::<T>().read_volatile() }
}

/// Stores a `T` at an offset into one of Xen's structures.
#[inline(always)]
pub unsafe fn store<T: Copy>(base: *mut u8, offset: usize, value: T) {
    unsafe { base.add(offset).cast::<T>().write_volatile(value) }
}

/// Keeps an index that dom0 gave below `limit` in speculation too: everything behind the fence waits for the check in front of it.
#[inline(always)]
pub fn no_speculation() {
    unsafe { core::arch::asm!("lfence", options(nostack, preserves_flags)) }
}

// ---- the CPU this runs on --------------------------------------------------------------------------------------------

/// `get_cpu_info()`: at the top of the stack that this CPU runs on.
#[inline(always)]
fn cpu_info() -> *const u8 {
    let sp: usize;
    unsafe { core::arch::asm!("mov {}, rsp", out(reg) sp, options(nomem, nostack, preserves_flags)) };
    ((sp | (t::STACK_BYTES - 1)) + 1 - t::CPUINFO_SIZE) as *const u8
}

pub fn current() -> Vcpu {
    Vcpu(unsafe { load(cpu_info(), t::CPUINFO_CURRENT) })
}

pub fn processor_id() -> u32 {
    unsafe { load(cpu_info(), t::CPUINFO_PROCESSOR) }
}

/// Address of this CPU's copy of a per-CPU variable.
#[inline(always)]
fn this_cpu(variable: *const u8) -> *mut u8 {
    let offset: usize = unsafe { load(cpu_info(), t::CPUINFO_PERCPU) };
    variable.wrapping_add(offset).cast_mut()
}

/// This CPU's clock record: the stamp that guests' time is computed from.
pub struct CpuTime {
    pub local_tsc: u64,
    pub local_stime: i64,
    pub mul_frac: u32,
    pub shift: i32,
}

pub fn cpu_time() -> CpuTime {
    unsafe {
        let ct = this_cpu(&raw const PER_CPU_TIME);
        CpuTime {
            local_tsc: load(ct, t::CT_LOCAL_TSC),
            local_stime: load(ct, t::CT_LOCAL_STIME),
            mul_frac: load(ct, t::CT_SCALE + t::TS_MUL),
            shift: load(ct, t::CT_SCALE + t::TS_SHIFT),
        }
    }
}

/// `clocksource_is_tsc()`: the platform timer's reader is the poison that stands for "the TSC itself".
pub fn clocksource_is_tsc() -> bool {
    unsafe { load::<u64>(&raw const PLT_SRC, t::PLT_READ_COUNTER) == t::READ_TSC_POISON as u64 }
}

/// Whether HVM guests run by AMD's SVM (`hvm_funcs.name`; the other is "VMX").
pub fn is_svm() -> bool {
    unsafe {
        let name: *const u8 = load(&raw const HVM_FUNCS, t::HF_NAME);
        !name.is_null() && load::<[u8; 4]>(name, 0) == *b"SVM\0"
    }
}

/// `hvm_funcs.set_tsc_offset`, without the call through a pointer.
pub fn set_tsc_offset(v: Vcpu, offset: u64) {
    unsafe {
        if is_svm() {
            svm_set_tsc_offset(v.0, offset, 0);
        } else {
            vmx_set_tsc_offset(v.0, offset, 0);
        }
    }
}

/// This CPU's TSC, read neither before nor after what stands around it.
pub fn rdtsc() -> u64 {
    let (low, high): (u32, u32);
    unsafe { core::arch::asm!("lfence", "rdtsc", "lfence", out("eax") low, out("edx") high, options(nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

pub fn tsc_scaling_supported() -> bool {
    unsafe { load::<u8>(&raw const HVM_FUNCS, t::HF_TSC_SCALING_BITS) != 0 }
}

pub fn now() -> i64 {
    unsafe { get_s_time() }
}

// ---- memory of the caller --------------------------------------------------------------------------------------------

/// `copy_to_guest()` to the running vCPU's address space.
pub unsafe fn copy_to_guest(to: u64, from: *const u8, len: u32) -> Result<(), i64> {
    let left = unsafe {
        if current().domain().is_hvm() {
            copy_to_user_hvm(to, from.cast(), len)
        } else {
            u64::from(copy_to_guest_pv(to, from.cast(), len))
        }
    };
    if left == 0 { Ok(()) } else { Err(EFAULT) }
}

/// `copy_from_guest()` from the running vCPU's address space.
pub unsafe fn copy_from_guest(to: *mut u8, from: u64, len: u32) -> Result<(), i64> {
    let left = unsafe {
        if current().domain().is_hvm() {
            copy_from_user_hvm(to.cast(), from, len)
        } else {
            u64::from(copy_from_guest_pv(to.cast(), from, len))
        }
    };
    if left == 0 { Ok(()) } else { Err(EFAULT) }
}

/// gfn of an mfn in a translated domain.
fn gfn_of_mfn(mfn: u64) -> u64 {
    let gfn: u64 = unsafe { load(t::M2P_BASE as *const u8, (mfn as usize).wrapping_mul(8)) };
    if gfn == M2P_NONE || gfn == M2P_SHARED { u64::MAX } else { gfn }
}

/// gfn of the page that Xen has mapped at `page`.
pub unsafe fn gfn_of_mapping(page: *const u8) -> u64 {
    gfn_of_mfn(unsafe { domain_page_map_to_mfn((page as usize & !(PAGE_SIZE as usize - 1)) as *const u8) })
}

pub unsafe fn mfn_of_mapping(page: *const u8) -> u64 {
    unsafe { domain_page_map_to_mfn(page) }
}

/// Zeroed memory from Xen's heap, aligned to 8.
pub fn allocate(size: usize) -> Result<*mut u8, i64> {
    let p = unsafe { _xzalloc(size as u64, 8) };
    if p.is_null() { Err(ENOMEM) } else { Ok(p) }
}

// ---- locks -----------------------------------------------------------------------------------------------------------

/// A held `spinlock_t`.
pub struct Spin(*mut u8);

impl Spin {
    pub unsafe fn lock(lock: *mut u8) -> Self {
        unsafe { _spin_lock(lock) };
        no_speculation();
        Self(lock)
    }
}

impl Drop for Spin {
    fn drop(&mut self) {
        unsafe { _spin_unlock(self.0) }
    }
}

/// A held `spinlock_t` that interrupts take too, so they are off meanwhile.
pub struct SpinIrq(*mut u8, u64);

impl SpinIrq {
    pub unsafe fn lock(lock: *mut u8) -> Self {
        let flags = unsafe { _spin_lock_irqsave(lock) };
        no_speculation();
        Self(lock, flags)
    }
}

impl Drop for SpinIrq {
    fn drop(&mut self) {
        unsafe { _spin_unlock_irqrestore(self.0, self.1) }
    }
}

/// A held `domain_lock()`.
pub struct DomainLock(*mut u8);

impl DomainLock {
    pub unsafe fn lock(d: Domain) -> Self {
        let lock = d.0.wrapping_add(t::D_DOMAIN_LOCK);
        unsafe { _spin_lock_recursive(lock) };
        no_speculation();
        Self(lock)
    }
}

impl Drop for DomainLock {
    fn drop(&mut self) {
        unsafe { _spin_unlock_recursive(self.0) }
    }
}

/// A held `write_lock()` (xen/rwlock.h, whose fast paths are inline and so written again here).
pub struct Write(*mut u8);

impl Write {
    pub unsafe fn lock(lock: *mut u8) -> Self {
        unsafe {
            preempt_count(1);
            let counts = &*lock.add(t::RW_COUNTS).cast::<AtomicU32>();
            let mine = t::RW_WRITE_LOCKED as u32 | processor_id();
            if counts.compare_exchange(0, mine, Ordering::SeqCst, Ordering::Relaxed).is_err() {
                queue_write_lock_slowpath(lock);
            }
        }
        no_speculation();
        Self(lock)
    }
}

impl Drop for Write {
    fn drop(&mut self) {
        unsafe {
            let counts = &*self.0.add(t::RW_COUNTS).cast::<AtomicU32>();
            counts.fetch_and(!((t::RW_CPU_MASK | t::RW_WRITE_MASK) as u32), Ordering::SeqCst);
            preempt_count(-1);
        }
    }
}

unsafe fn preempt_count(delta: i32) {
    unsafe {
        let count = this_cpu(&raw const PER_CPU_PREEMPT_COUNT).cast::<i32>();
        count.write_volatile(count.read_volatile().wrapping_add(delta));
    }
}

/// `spin_lock_init()` on memory that is zero.
pub unsafe fn spin_lock_init(lock: *mut u8) {
    // tickets (u32) 0, then recurse_cpu: SPINLOCK_NO_CPU in the low bits of a u16, recurse_cnt 0 above.
    unsafe { store::<u16>(lock, 4, t::SPINLOCK_NO_CPU_ as u16) }
}

// ---- domains ---------------------------------------------------------------------------------------------------------

/// `struct domain *`.
#[derive(Clone, Copy, PartialEq)]
pub struct Domain(pub *mut u8);

impl Domain {
    #[inline(always)]
    pub fn get<T: Copy>(self, offset: usize) -> T {
        unsafe { load(self.0, offset) }
    }

    #[inline(always)]
    pub fn set<T: Copy>(self, offset: usize, value: T) {
        unsafe { store(self.0, offset, value) }
    }

    #[inline(always)]
    pub fn at(self, offset: usize) -> *mut u8 {
        self.0.wrapping_add(offset)
    }

    pub fn id(self) -> u16 {
        self.get(t::D_ID)
    }

    pub fn is_hvm(self) -> bool {
        self.get::<u32>(t::D_OPTIONS) & t::CDF_HVM as u32 != 0
    }

    pub fn is_dying(self) -> bool {
        self.get::<u32>(t::D_IS_DYING) != 0
    }

    pub fn is_paused(self) -> bool {
        self.get::<i32>(t::D_PAUSE_COUNT) > 0
    }

    pub fn has_32bit_shinfo(self) -> bool {
        self.get::<u8>(t::D_32BIT) != 0
    }

    pub fn shared_info(self) -> *mut u8 {
        self.get(t::D_SHARED_INFO)
    }

    pub fn max_vcpus(self) -> u32 {
        self.get(t::D_MAX_VCPUS)
    }

    /// `domain_vcpu()`: the vCPU of that number, if there is one.
    pub fn vcpu(self, id: u32) -> Option<Vcpu> {
        if id >= self.max_vcpus() {
            return None;
        }
        no_speculation();
        let table: *const *mut u8 = self.get(t::D_VCPU);
        if table.is_null() {
            return None;
        }
        let v = unsafe { table.add(id as usize).read() };
        if v.is_null() { None } else { Some(Vcpu(v)) }
    }

    /// Takes `d->event_lock` for writing.
    pub fn event_lock(self) -> Write {
        unsafe { Write::lock(self.at(t::D_EVENT_LOCK)) }
    }

    /// The FIFO state of the domain, null while it uses 2-level event channels.
    pub fn fifo(self) -> *mut u8 {
        self.get(t::D_FIFO)
    }

    /// Number of event words that exist (FIFO).
    pub fn fifo_words(self) -> u32 {
        let fifo = self.fifo();
        if fifo.is_null() { 0 } else { unsafe { load(fifo, t::FD_NUM) } }
    }

    /// The event word of a port, if its page exists. The event lock is held.
    pub fn fifo_word(self, port: u32) -> Option<u32> {
        if port >= self.fifo_words() {
            return None;
        }
        no_speculation();
        unsafe {
            let page: *const u8 = load(self.fifo(), (port / 1024) as usize * 8);
            if page.is_null() { None } else { Some(load(page, (port % 1024) as usize * 4)) }
        }
    }

    /// Switches the domain to FIFO port operations, behind everything that was stored before.
    pub fn set_fifo_port_ops(self) {
        compiler_fence(Ordering::SeqCst);
        self.set(t::D_PORT_OPS, &raw const EVTCHN_PORT_OPS_FIFO);
    }

    /// `max_evtchns()`.
    pub fn max_evtchns(self) -> u32 {
        if !self.fifo().is_null() {
            1 << 17
        } else if self.has_32bit_shinfo() {
            32 * 32
        } else {
            64 * 64
        }
    }

    /// Bits of `evtchn_pending` or `evtchn_mask` in shared_info, 2-level.
    pub fn two_level_bit(self, port: u32, mask: bool) -> bool {
        let offset = match (self.has_32bit_shinfo(), mask) {
            (false, false) => t::SI_EVTCHN_PENDING,
            (false, true) => t::SI_EVTCHN_MASK,
            (true, false) => t::SI32_EVTCHN_PENDING,
            (true, true) => t::SI32_EVTCHN_MASK,
        };
        if port >= 4096 {
            return false;
        }
        no_speculation();
        let byte: u8 = unsafe { load(self.shared_info(), offset + (port / 8) as usize) };
        byte >> (port % 8) & 1 != 0
    }

    /// The event channel of a port, if that port was ever allocated. The event lock is held.
    pub fn evtchn(self, port: u32) -> Option<Evtchn> {
        if port >= self.get::<u32>(t::D_VALID_EVTCHNS) {
            return None;
        }
        no_speculation();
        let port = port as usize;
        unsafe {
            let bucket: *mut u8 = if port < t::E_PER_BUCKET {
                self.get(t::D_EVTCHN)
            } else {
                let group: *const *mut u8 = self.get(t::D_EVTCHN_GROUP + port / t::E_PER_GROUP % t::E_GROUPS * 8);
                if group.is_null() {
                    return None;
                }
                group.add(port % t::E_PER_GROUP / t::E_PER_BUCKET).read()
            };
            if bucket.is_null() { None } else { Some(Evtchn(bucket.add(port % t::E_PER_BUCKET * t::E_SIZE))) }
        }
    }

    /// The `struct pirq` of a number, null when there is none. The event lock is held.
    pub fn pirq(self, pirq: u32) -> *mut u8 {
        unsafe { radix_tree_lookup(self.at(t::D_PIRQ_TREE), u64::from(pirq)) }
    }

    /// Maps one of the guest's pages for good, with a reference and a writable type, as Xen does for a control block.
    pub unsafe fn map_page(self, gfn: u64) -> Result<*mut u8, i64> {
        let mut virt: *mut u8 = core::ptr::null_mut();
        match unsafe { map_guest_page(self.0, gfn, &mut virt) } {
            0 => Ok(virt),
            error => Err(i64::from(error)),
        }
    }

    /// Undoes [`Self::map_page`].
    pub unsafe fn unmap_page(virt: *mut u8) {
        unsafe { unmap_guest_page(virt) }
    }
}

// ---- vCPUs -----------------------------------------------------------------------------------------------------------

/// `struct vcpu *`.
#[derive(Clone, Copy, PartialEq)]
pub struct Vcpu(pub *mut u8);

impl Vcpu {
    #[inline(always)]
    pub fn get<T: Copy>(self, offset: usize) -> T {
        unsafe { load(self.0, offset) }
    }

    #[inline(always)]
    pub fn set<T: Copy>(self, offset: usize, value: T) {
        unsafe { store(self.0, offset, value) }
    }

    #[inline(always)]
    pub fn at(self, offset: usize) -> *mut u8 {
        self.0.wrapping_add(offset)
    }

    pub fn id(self) -> u32 {
        self.get(t::V_ID)
    }

    pub fn domain(self) -> Domain {
        Domain(self.get(t::V_DOMAIN))
    }

    /// The FIFO state of the vCPU, null while the domain uses 2-level event channels.
    pub fn fifo(self) -> *mut u8 {
        self.get(t::V_FIFO)
    }

    pub fn fifo_control(self) -> *mut u8 {
        let fifo = self.fifo();
        if fifo.is_null() { fifo } else { unsafe { load(fifo, 0) } }
    }
}

/// Whether a `struct timer` runs.
pub unsafe fn timer_is_active(timer: *const u8) -> bool {
    let status = usize::from(unsafe { load::<u8>(timer, t::T_STATUS) });
    status == t::T_IN_HEAP || status == t::T_IN_LIST
}

pub unsafe fn timer_expires(timer: *const u8) -> i64 {
    unsafe { load(timer, t::T_EXPIRES) }
}

// ---- event channels --------------------------------------------------------------------------------------------------

/// `struct evtchn *`.
#[derive(Clone, Copy)]
pub struct Evtchn(pub *mut u8);

impl Evtchn {
    #[inline(always)]
    pub fn get<T: Copy>(self, offset: usize) -> T {
        unsafe { load(self.0, offset) }
    }

    #[inline(always)]
    pub fn set<T: Copy>(self, offset: usize, value: T) {
        unsafe { store(self.0, offset, value) }
    }

    pub fn state(self) -> u8 {
        self.get(t::E_STATE)
    }

    /// `consumer_is_xen()`: a bit field of three bits behind the state.
    pub fn consumer_is_xen(self) -> bool {
        self.get::<u8>(t::E_STATE + 1) & 7 != 0
    }

    /// `evtchn_write_lock()`.
    pub fn lock(self) -> Write {
        unsafe { Write::lock(self.0.wrapping_add(t::E_LOCK)) }
    }
}

// ---- wall clock ------------------------------------------------------------------------------------------------------

/// Host's wall clock at host `NOW()` 0: seconds and nanoseconds.
pub fn wall_clock() -> (u64, u32) {
    unsafe {
        let _held = Spin::lock(&raw mut WC_LOCK);
        ((&raw const WC_SEC).read_volatile(), (&raw const WC_NSEC).read_volatile())
    }
}

/// Takes the lock that Xen writes guests' wall clocks under, and gives the host's wall clock.
pub fn locked_wall_clock() -> (Spin, u64, u32) {
    unsafe {
        let held = Spin::lock(&raw mut WC_LOCK);
        (held, (&raw const WC_SEC).read_volatile(), (&raw const WC_NSEC).read_volatile())
    }
}
