// SPDX-License-Identifier: GPL-2.0-only
//! What of Xen itself the extension touches: its functions by name, its structures by the offsets of the table.
//!
//! Nothing here owns memory. What the SAFETY comments of this crate refer to by name:
//! - *The table* (`t::…`): offsets, sizes and constants drawn from the headers of the very build that the payload is bound to. So a
//!   field's offset added to a pointer to its structure is inside of the structure, and aligned.
//! - *The invariants* of [`Domain`], [`Vcpu`] and [`Evtchn`], stated there.
//! - *The context*: a hypercall, a VM exit or one of Xen's softirqs. Not an interrupt, and interrupts are on. Xen does not preempt
//!   itself: until the payload returns it stays on its CPU, no other softirq runs there, and RCU frees nothing.
//!
//! "Gap" marks what such a reason does not cover, and is known.

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
    fn copy_to_user_hvm(to: u64, from: *const c_void, len: u32) -> u32;
    fn copy_from_user_hvm(to: *mut c_void, from: u64, len: u32) -> u32;
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
    pub fn update_secondary_system_time(v: *mut u8, time: *mut u8) -> bool;
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
///
/// # Safety
/// `base` points to a structure that is there and readable, `offset` is that of a field, and `T` is the field's type: an integer, a
/// raw pointer, or an array or structure of them, so that any bits are one.
#[inline(always)]
pub unsafe fn load<T: Copy>(base: *const u8, offset: usize) -> T {
    // SAFETY: the caller vouches for the place and its type. Volatile, because other CPUs may write it meanwhile, as with Xen's own
    // accesses; what is longer than a word may then be half old.
    unsafe { base.add(offset).cast::<T>().read_volatile() }
}

/// Stores a `T` at an offset into one of Xen's structures.
///
/// # Safety
/// As for [`load`]; and the field may be written now, under the lock that Xen writes it under if there is one.
#[inline(always)]
pub unsafe fn store<T: Copy>(base: *mut u8, offset: usize, value: T) {
    // SAFETY: the caller vouches for the place, its type and the right to write it.
    unsafe { base.add(offset).cast::<T>().write_volatile(value) }
}

/// Keeps an index that dom0 gave below `limit` in speculation too: everything behind the fence waits for the check in front of it.
#[inline(always)]
pub fn no_speculation() {
    // SAFETY: a fence; it changes no memory and no register.
    unsafe { core::arch::asm!("lfence", options(nostack, preserves_flags)) }
}

// ---- the CPU this runs on --------------------------------------------------------------------------------------------

/// `get_cpu_info()`: at the top of the stack that this CPU runs on.
#[inline(always)]
fn cpu_info() -> *const u8 {
    let sp: usize;
    // SAFETY: only reads the stack pointer.
    unsafe { core::arch::asm!("mov {}, rsp", out(reg) sp, options(nomem, nostack, preserves_flags)) };
    ((sp | (t::STACK_BYTES - 1)) + 1 - t::CPUINFO_SIZE) as *const u8
}

pub fn current() -> Vcpu {
    // SAFETY: `cpu_info()` is this CPU's `struct cpu_info`, at the top of every CPU's stack; the table.
    Vcpu(unsafe { load(cpu_info(), t::CPUINFO_CURRENT) })
}

pub fn processor_id() -> u32 {
    // SAFETY: as in `current`.
    unsafe { load(cpu_info(), t::CPUINFO_PROCESSOR) }
}

/// Address of this CPU's copy of a per-CPU variable.
#[inline(always)]
fn this_cpu(variable: *const u8) -> *mut u8 {
    // SAFETY: as in `current`.
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
    // SAFETY: this CPU's copy is there as long as the CPU runs; the table. Only this CPU writes it, outside of interrupts, so not
    // now (the context).
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
    // SAFETY: in Xen's own image, set at boot; the table. The pointer is compared, not called.
    unsafe { load::<u64>(&raw const PLT_SRC, t::PLT_READ_COUNTER) == t::READ_TSC_POISON as u64 }
}

/// Whether HVM guests run by AMD's SVM (`hvm_funcs.name`; the other is "VMX").
pub fn is_svm() -> bool {
    // SAFETY: in Xen's own image, set at boot; the table. The name is null (checked) or a literal, "SVM" or "VMX": four bytes with
    // the 0.
    unsafe {
        let name: *const u8 = load(&raw const HVM_FUNCS, t::HF_NAME);
        !name.is_null() && load::<[u8; 4]>(name, 0) == *b"SVM\0"
    }
}

/// `hvm_funcs.set_tsc_offset`, without the call through a pointer.
pub fn set_tsc_offset(v: Vcpu, offset: u64) {
    // SAFETY: the one for this kind of CPU. `v` is a vCPU of a paused HVM domain, for only a SET comes here: nobody else uses its
    // VMCB, and of a VMCS Xen's function takes hold itself. The last argument only matters to nested guests.
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
    // SAFETY: only reads the TSC; the two registers that it writes are named.
    unsafe { core::arch::asm!("lfence", "rdtsc", "lfence", out("eax") low, out("edx") high, options(nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

pub fn tsc_scaling_supported() -> bool {
    // SAFETY: in Xen's own image, set at boot; the table.
    unsafe { load::<u8>(&raw const HVM_FUNCS, t::HF_TSC_SCALING_BITS) != 0 }
}

pub fn now() -> i64 {
    // SAFETY: only calculates, from this CPU's clock record.
    unsafe { get_s_time() }
}

// ---- memory of the caller --------------------------------------------------------------------------------------------

/// `copy_to_guest()` to the running vCPU's address space.
///
/// # Safety
/// `from` is readable for `len` bytes, and this is the context that `xen` describes. `to` may be anything.
pub unsafe fn copy_to_guest(to: u64, from: *const u8, len: u32) -> Result<(), i64> {
    // SAFETY: `from` is the caller's word. `to` needs none: one function goes through the running vCPU's page tables, the other
    // refuses Xen's own addresses and survives a fault. Which of them is for the running vCPU's kind.
    let left = unsafe {
        if current().domain().is_hvm() {
            copy_to_user_hvm(to, from.cast(), len)
        } else {
            copy_to_guest_pv(to, from.cast(), len)
        }
    };
    if left == 0 { Ok(()) } else { Err(EFAULT) }
}

/// `copy_from_guest()` from the running vCPU's address space.
///
/// # Safety
/// `to` is writable for `len` bytes, and this is the context that `xen` describes. `from` may be anything.
pub unsafe fn copy_from_guest(to: *mut u8, from: u64, len: u32) -> Result<(), i64> {
    // SAFETY: `to` is the caller's word; else as in `copy_to_guest`.
    let left = unsafe {
        if current().domain().is_hvm() {
            copy_from_user_hvm(to.cast(), from, len)
        } else {
            copy_from_guest_pv(to.cast(), from, len)
        }
    };
    if left == 0 { Ok(()) } else { Err(EFAULT) }
}

/// gfn of an mfn in a translated domain.
fn gfn_of_mfn(mfn: u64) -> u64 {
    // SAFETY: Xen keeps an entry of 8 bytes mapped for every page of RAM; `mfn` is one, for only `gfn_of_mapping` comes here.
    let gfn: u64 = unsafe { load(t::M2P_BASE as *const u8, (mfn as usize).wrapping_mul(8)) };
    if gfn == M2P_NONE || gfn == M2P_SHARED { u64::MAX } else { gfn }
}

/// gfn of the page that Xen has mapped at `page`.
///
/// # Safety
/// `page` is an address of RAM that Xen has mapped for good: in its direct map, or by `map_domain_page_global()`.
pub unsafe fn gfn_of_mapping(page: *const u8) -> u64 {
    // SAFETY: the caller vouches for the mapping, which is what the function takes for granted.
    gfn_of_mfn(unsafe { domain_page_map_to_mfn((page as usize & !(PAGE_SIZE as usize - 1)) as *const u8) })
}

/// mfn of the page that Xen has mapped at `page`.
///
/// # Safety
/// As for [`gfn_of_mapping`].
pub unsafe fn mfn_of_mapping(page: *const u8) -> u64 {
    // SAFETY: as in `gfn_of_mapping`.
    unsafe { domain_page_map_to_mfn(page) }
}

/// Zeroed memory from Xen's heap, aligned to 8.
pub fn allocate(size: usize) -> Result<*mut u8, i64> {
    // SAFETY: Xen's heap may be used here (the context), also with spin locks held. Null is looked for below.
    let p = unsafe { _xzalloc(size as u64, 8) };
    if p.is_null() { Err(ENOMEM) } else { Ok(p) }
}

// ---- locks -----------------------------------------------------------------------------------------------------------

/// A held `spinlock_t`.
pub struct Spin(*mut u8);

impl Spin {
    /// # Safety
    /// `lock` is a `spinlock_t` that outlives the guard, not held by this CPU, and one that Xen takes with interrupts on.
    pub unsafe fn lock(lock: *mut u8) -> Self {
        // SAFETY: the caller vouches for the lock.
        unsafe { _spin_lock(lock) };
        no_speculation();
        Self(lock)
    }
}

impl Drop for Spin {
    fn drop(&mut self) {
        // SAFETY: `lock` took it on this CPU, and a guard is not copied: it is held until now.
        unsafe { _spin_unlock(self.0) }
    }
}

/// A held `spinlock_t` that interrupts take too, so they are off meanwhile.
pub struct SpinIrq(*mut u8, u64);

impl SpinIrq {
    /// # Safety
    /// `lock` is a `spinlock_t` that outlives the guard, not held by this CPU. Guards go in the reverse order.
    pub unsafe fn lock(lock: *mut u8) -> Self {
        // SAFETY: the caller vouches for the lock.
        let flags = unsafe { _spin_lock_irqsave(lock) };
        no_speculation();
        Self(lock, flags)
    }
}

impl Drop for SpinIrq {
    fn drop(&mut self) {
        // SAFETY: `lock` took it on this CPU and gave these flags; it is held until now.
        unsafe { _spin_unlock_irqrestore(self.0, self.1) }
    }
}

/// A held `domain_lock()`.
pub struct DomainLock(*mut u8);

impl DomainLock {
    /// # Safety
    /// This is the context that `xen` describes, and no lock is held that Xen takes inside of this one, such as the event lock.
    pub unsafe fn lock(d: Domain) -> Self {
        let lock = d.0.wrapping_add(t::D_DOMAIN_LOCK);
        // SAFETY: part of the domain, initialised with it (`Domain`'s invariant, the table). A CPU may take it again.
        unsafe { _spin_lock_recursive(lock) };
        no_speculation();
        Self(lock)
    }
}

impl Drop for DomainLock {
    fn drop(&mut self) {
        // SAFETY: `lock` took it on this CPU; it is held until now.
        unsafe { _spin_unlock_recursive(self.0) }
    }
}

/// A held `write_lock()` (xen/rwlock.h, whose fast paths are inline and so written again here).
pub struct Write(*mut u8);

impl Write {
    /// # Safety
    /// `lock` is an `rwlock_t` that outlives the guard, not held by this CPU in any way, and one that Xen never waits for in an
    /// interrupt.
    pub unsafe fn lock(lock: *mut u8) -> Self {
        // SAFETY: the caller vouches for the lock; its count is a 32-bit atomic of Xen's (the table). The steps are those of
        // `_write_lock()`, so the slow path finds what it expects; the addition to the preemption count is taken back when the
        // guard goes.
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
        // SAFETY: `lock` took it on this CPU, so it is there and the writer's bits are ours; the steps are those of
        // `_write_unlock()`.
        unsafe {
            let counts = &*self.0.add(t::RW_COUNTS).cast::<AtomicU32>();
            counts.fetch_and(!((t::RW_CPU_MASK | t::RW_WRITE_MASK) as u32), Ordering::SeqCst);
            preempt_count(-1);
        }
    }
}

/// `preempt_disable()` and `preempt_enable()`.
///
/// # Safety
/// What is added is taken back on this CPU.
unsafe fn preempt_count(delta: i32) {
    // SAFETY: this CPU's copy, which is there as long as the CPU runs. Only this CPU writes it, and an interrupt leaves it as it
    // was.
    unsafe {
        let count = this_cpu(&raw const PER_CPU_PREEMPT_COUNT).cast::<i32>();
        count.write_volatile(count.read_volatile().wrapping_add(delta));
    }
}

/// `spin_lock_init()` on memory that is zero.
///
/// # Safety
/// `lock` is zeroed memory of a `spinlock_t` that nobody uses yet.
pub unsafe fn spin_lock_init(lock: *mut u8) {
    // tickets (u32) 0, then recurse_cpu: SPINLOCK_NO_CPU in the low bits of a u16, recurse_cnt 0 above.
    // SAFETY: the caller vouches for the memory; the field lies in its 8 bytes.
    unsafe { store::<u16>(lock, 4, t::SPINLOCK_NO_CPU_ as u16) }
}

// ---- domains ---------------------------------------------------------------------------------------------------------

/// `struct domain *`.
///
/// Invariant: the domain is not freed while this is used. In a domctl Xen holds it by RCU, or it is the caller's own, or the other
/// end of a port whose event lock is held; a wrapped function gets it from Xen, which is at work on it. Its array of vCPUs, its
/// shared_info, its event channels and an HVM domain's `pl_time` live as long. `get`, `set` and `at` are given the table's `D_…`,
/// plus an index that is bounded where it is added; `T` is the field's type, as [`load`] asks; whoever calls `set` may write the
/// field then.
#[derive(Clone, Copy, PartialEq)]
pub struct Domain(pub *mut u8);

impl Domain {
    #[inline(always)]
    pub fn get<T: Copy>(self, offset: usize) -> T {
        // SAFETY: `Domain`'s invariant.
        unsafe { load(self.0, offset) }
    }

    #[inline(always)]
    pub fn set<T: Copy>(self, offset: usize, value: T) {
        // SAFETY: `Domain`'s invariant.
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
        // SAFETY: the array has `max_vcpus` entries, and `id` is below (checked above, in speculation too). Only a domctl writes
        // it.
        let v = unsafe { table.add(id as usize).read() };
        if v.is_null() { None } else { Some(Vcpu(v)) }
    }

    /// Takes `d->event_lock` for writing.
    pub fn event_lock(self) -> Write {
        // SAFETY: part of the domain, initialised with it (`Domain`'s invariant, the table). No caller holds it already, and none
        // of Xen's functions that take it themselves is called under it.
        unsafe { Write::lock(self.at(t::D_EVENT_LOCK)) }
    }

    /// The FIFO state of the domain, null while it uses 2-level event channels.
    pub fn fifo(self) -> *mut u8 {
        self.get(t::D_FIFO)
    }

    /// Number of event words that exist (FIFO).
    pub fn fifo_words(self) -> u32 {
        let fifo = self.fifo();
        // SAFETY: not null, and the callers hold the event lock, under which Xen frees it (a domctl that frees it without cannot
        // run now).
        if fifo.is_null() { 0 } else { unsafe { load(fifo, t::FD_NUM) } }
    }

    /// The event word of a port, if its page exists. The event lock is held.
    pub fn fifo_word(self, port: u32) -> Option<u32> {
        if port >= self.fifo_words() {
            return None;
        }
        no_speculation();
        // SAFETY: `port` is below the number of words, so there is a structure and the page's number is below its 128; the event
        // lock keeps it. A page that is there stays mapped as long, and a word's number is below its 1024.
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
        // SAFETY: shared_info is a page that lives as long as the domain. Ports are below 4096 (checked above): at most 512 bytes
        // from offset 2560 on.
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
        // SAFETY: `port` is below `valid_evtchns` (checked above, in speculation too): Xen has made all groups and buckets up to
        // there and frees them with the domain. Each index is bounded by its remainder: of groups, of a group's buckets, of a
        // bucket's event channels.
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
        // SAFETY: part of the domain (`Domain`'s invariant, the table); the caller holds the event lock, under which Xen changes
        // the tree.
        unsafe { radix_tree_lookup(self.at(t::D_PIRQ_TREE), u64::from(pirq)) }
    }

    /// Maps one of the guest's pages for good, with a reference and a writable type, as Xen does for a control block.
    ///
    /// # Safety
    /// This is the context that `xen` describes, and the domain is not dying, or nothing would ever unmap the page.
    pub unsafe fn map_page(self, gfn: u64) -> Result<*mut u8, i64> {
        let mut virt: *mut u8 = core::ptr::null_mut();
        // SAFETY: `virt` is a place for the answer. Any gfn will do: Xen refuses what is no writable RAM of the domain.
        match unsafe { map_guest_page(self.0, gfn, &mut virt) } {
            0 => Ok(virt),
            error => Err(i64::from(error)),
        }
    }

    /// Undoes [`Self::map_page`].
    ///
    /// # Safety
    /// `virt` came from [`Self::map_page`], nobody uses it any more, and it is unmapped once.
    pub unsafe fn unmap_page(virt: *mut u8) {
        // SAFETY: the caller vouches for it. It is not null, which this part of Xen's function does not look for.
        unsafe { unmap_guest_page(virt) }
    }
}

// ---- vCPUs -----------------------------------------------------------------------------------------------------------

/// `struct vcpu *`.
///
/// Invariant: a vCPU that Xen has finished making, its timers and locks included; it lives as long as its domain. `get`, `set` and
/// `at` are used as those of [`Domain`], with `V_…`.
#[derive(Clone, Copy, PartialEq)]
pub struct Vcpu(pub *mut u8);

impl Vcpu {
    #[inline(always)]
    pub fn get<T: Copy>(self, offset: usize) -> T {
        // SAFETY: `Vcpu`'s invariant.
        unsafe { load(self.0, offset) }
    }

    #[inline(always)]
    pub fn set<T: Copy>(self, offset: usize, value: T) {
        // SAFETY: `Vcpu`'s invariant.
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
        // SAFETY: not null, and its first field is the control block. The callers hold the event lock, under which Xen frees it.
        if fifo.is_null() { fifo } else { unsafe { load(fifo, 0) } }
    }
}

/// Whether a `struct timer` runs.
///
/// # Safety
/// `timer` is a `struct timer` that is there. Nothing is locked: the answer may be a moment old.
pub unsafe fn timer_is_active(timer: *const u8) -> bool {
    // SAFETY: the caller vouches for the timer; the table.
    let status = usize::from(unsafe { load::<u8>(timer, t::T_STATUS) });
    status == t::T_IN_HEAP || status == t::T_IN_LIST
}

/// When a `struct timer` fires, in host time.
///
/// # Safety
/// As for [`timer_is_active`].
pub unsafe fn timer_expires(timer: *const u8) -> i64 {
    // SAFETY: the caller vouches for the timer; the table.
    unsafe { load(timer, t::T_EXPIRES) }
}

// ---- event channels --------------------------------------------------------------------------------------------------

/// `struct evtchn *`.
///
/// Invariant: it is from [`Domain::evtchn`], so it lives as long as its domain. `get` and `set` are used as those of [`Domain`],
/// with `E_…`, and under the domain's event lock.
#[derive(Clone, Copy)]
pub struct Evtchn(pub *mut u8);

impl Evtchn {
    #[inline(always)]
    pub fn get<T: Copy>(self, offset: usize) -> T {
        // SAFETY: `Evtchn`'s invariant.
        unsafe { load(self.0, offset) }
    }

    #[inline(always)]
    pub fn set<T: Copy>(self, offset: usize, value: T) {
        // SAFETY: `Evtchn`'s invariant.
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
        // SAFETY: part of the event channel, initialised with its bucket (the table). Inside of the event lock, as in Xen, which in
        // interrupts only tries to take it; no caller holds it already.
        unsafe { Write::lock(self.0.wrapping_add(t::E_LOCK)) }
    }
}

// ---- wall clock ------------------------------------------------------------------------------------------------------

/// Host's wall clock at host `NOW()` 0: seconds and nanoseconds.
pub fn wall_clock() -> (u64, u32) {
    // SAFETY: in Xen's own image; Xen takes the lock with interrupts on and writes both values under it. Nobody here holds it.
    unsafe {
        let _held = Spin::lock(&raw mut WC_LOCK);
        ((&raw const WC_SEC).read_volatile(), (&raw const WC_NSEC).read_volatile())
    }
}

/// Takes the lock that Xen writes guests' wall clocks under, and gives the host's wall clock.
pub fn locked_wall_clock() -> (Spin, u64, u32) {
    // SAFETY: as in `wall_clock`.
    unsafe {
        let held = Spin::lock(&raw mut WC_LOCK);
        (held, (&raw const WC_SEC).read_volatile(), (&raw const WC_NSEC).read_volatile())
    }
}
