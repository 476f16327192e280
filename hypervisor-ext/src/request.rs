// SPDX-License-Identifier: GPL-2.0-only
//! The way in: `arch_do_domctl` is wrapped, our command is picked out, checked and carried out.

use crate::abi::{self, Fault, Request, op};
use crate::table as t;
use crate::xen::{
    self, DOMID_FIRST_RESERVED, Domain, DomainLock, EBUSY, EINVAL, ENOBUFS, EOPNOTSUPP, EPERM, ESRCH, load, store,
};
use crate::{clock, get, set};

/// A refusal: errno, and which value was refused.
#[derive(Clone, Copy)]
pub struct Refusal {
    pub errno: i64,
    pub fault: u32,
}

pub const fn refuse(errno: i64, fault: u32) -> Refusal {
    Refusal { errno, fault }
}

/// How far an operation came.
#[derive(Clone, Copy, Default)]
pub struct Progress {
    pub done: u32,
    pub next: u32,
}

unsafe extern "C" {
    fn ferry_original_arch_do_domctl(domctl: *mut u8, d: *mut u8, handle: u64) -> i64;
}

/// `arch_do_domctl(domctl, d, u_domctl)`: `domctl` is Xen's copy of the caller's structure, `u_domctl` the caller's address of it.
/// Xen has checked that the caller is privileged over the domain, holds the domctl lock, and keeps `d` alive.
#[unsafe(no_mangle)]
extern "C" fn ferry_arch_do_domctl(domctl: *mut u8, d: *mut u8, handle: u64) -> i64 {
    // SAFETY: `domctl` is Xen's own copy on its stack, whose union has 128 bytes at this offset (the table), 64 of them a
    // `Request`, which any bits are. If the command is not ours, Xen's own function gets what Xen gave.
    unsafe {
        if load::<u32>(domctl, 0) != abi::DOMCTL {
            return ferry_original_arch_do_domctl(domctl, d, handle);
        }
        let mut request: Request = load(domctl, t::DOMCTL_U);
        if request.magic != abi::MAGIC {
            return EOPNOTSUPP;
        }
        let mut progress = Progress::default();
        let outcome =
            if d.is_null() { Err(refuse(ESRCH, Fault::TARGET)) } else { carry_out(Domain(d), &request, &mut progress) };
        request.done = progress.done;
        request.next = progress.next;
        request.fault = match outcome {
            Ok(()) => Fault::NONE,
            Err(refusal) => refusal.fault,
        };
        store(domctl, t::DOMCTL_U, request);
        let answered = xen::copy_to_guest(
            handle.wrapping_add(t::DOMCTL_U as u64),
            domctl.add(t::DOMCTL_U),
            size_of::<Request>() as u32,
        );
        match (outcome, answered) {
            (Err(refusal), _) => refusal.errno,
            (Ok(()), Err(errno)) => errno,
            (Ok(()), Ok(())) => 0,
        }
    }
}

fn carry_out(d: Domain, request: &Request, progress: &mut Progress) -> Result<(), Refusal> {
    if request.version != abi::ABI_VERSION {
        return Err(refuse(EINVAL, Fault::VERSION));
    }
    if request.reserved.iter().any(|word| *word != 0) {
        return Err(refuse(EINVAL, Fault::RESERVED));
    }
    // `if`, not `match`: a jump table would be an indirect branch, which Xen's speculation hardening does not allow.
    let op = request.op;
    if op == op::INFO {
        return get::info(request, progress);
    }
    if op >= op::SET_DOMAIN {
        return carry_out_set(d, request, progress);
    }
    if op == op::GET_DOMAIN {
        get::domain(d, request, progress)
    } else if op == op::GET_VCPU {
        get::vcpu(d, request, progress)
    } else if op == op::GET_PORTS {
        get::ports(d, request, progress)
    } else if op == op::GET_PIRQS {
        get::pirqs(d, request, progress)
    } else {
        Err(refuse(EOPNOTSUPP, Fault::OP))
    }
}

fn carry_out_set(d: Domain, request: &Request, progress: &mut Progress) -> Result<(), Refusal> {
    if d == xen::current().domain() || d.id() >= DOMID_FIRST_RESERVED {
        return Err(refuse(EPERM, Fault::TARGET));
    }
    if !d.is_hvm() {
        return Err(refuse(EOPNOTSUPP, Fault::NOT_HVM));
    }
    // The domctl lock is held all along, and only under it a domain is killed, soft-reset or unpaused by its controller: what is
    // checked now holds. The domain lock is what Xen takes to place a vcpu_info and to give vCPUs a context. Neither keeps out what
    // dom0, or a stub device model, does to the target's event channels and pirqs (EVTCHNOP_reset, PHYSDEVOP_map_pirq); the event
    // lock does.
    // SAFETY: a domctl, with no lock held but the domctl's, which Xen takes before this one as well.
    let _held = unsafe { DomainLock::lock(d) };
    if d.is_dying() {
        return Err(refuse(EINVAL, Fault::DYING));
    }
    // Gap: a guest that a debugger (gdbsx) stops counts as paused a moment before its vCPUs have stopped.
    if !d.is_paused() {
        return Err(refuse(EBUSY, Fault::NOT_PAUSED));
    }
    let op = request.op;
    if op == op::SET_DOMAIN {
        set::domain(d, request, progress)
    } else if op == op::SET_VCPU {
        set::vcpu(d, request, progress)
    } else if op == op::SET_PORTS {
        set::ports(d, request, progress)
    } else if op == op::SET_PIRQS {
        set::pirqs(d, request, progress)
    } else if op == op::SET_CLOCK {
        let wanted: abi::ClockOffset = take(request)?;
        check_header(wanted.size, wanted.version, size_of::<abi::ClockOffset>())?;
        if wanted.offset.unsigned_abs() > abi::MAX_CLOCK_OFFSET as u64 {
            return Err(refuse(EINVAL, Fault::CLOCK));
        }
        if wanted.wall < 0 {
            return Err(refuse(EINVAL, Fault::CLOCK));
        }
        clock::set(d, wanted.offset, wanted.wall);
        progress.done = 1;
        Ok(())
    } else {
        Err(refuse(EOPNOTSUPP, Fault::OP))
    }
}

/// Checks the front of a structure that came from the caller.
pub fn check_header(size: u32, version: u32, expected: usize) -> Result<(), Refusal> {
    if size as usize != expected {
        Err(refuse(EINVAL, Fault::SIZE))
    } else if version != abi::ABI_VERSION {
        Err(refuse(EINVAL, Fault::VERSION))
    } else {
        Ok(())
    }
}

/// Checks that the request's buffer is one `T`.
fn check_single<T>(request: &Request) -> Result<(), Refusal> {
    if request.count != 0 {
        return Err(refuse(EINVAL, Fault::COUNT));
    }
    match (request.entry_size as usize).cmp(&size_of::<T>()) {
        core::cmp::Ordering::Less => Err(refuse(ENOBUFS, Fault::SIZE)),
        core::cmp::Ordering::Greater => Err(refuse(EINVAL, Fault::SIZE)),
        core::cmp::Ordering::Equal => Ok(()),
    }
}

/// Reads the one structure that the request's buffer holds.
pub fn take<T: abi::Plain>(request: &Request) -> Result<T, Refusal> {
    check_single::<T>(request)?;
    // SAFETY: only the operations come here, so this is a domctl. Any address will do.
    unsafe { fetch(request.buffer) }
}

/// Answers with one structure.
pub fn give<T: abi::Plain>(request: &Request, value: &T, progress: &mut Progress) -> Result<(), Refusal> {
    check_single::<T>(request)?;
    // SAFETY: as in `take`.
    unsafe { deliver(request.buffer, value)? };
    progress.done = 1;
    Ok(())
}

/// Checks that the request's buffer is a list of `T`.
pub fn check_list<T>(request: &Request) -> Result<(), Refusal> {
    if request.entry_size as usize != size_of::<T>() {
        return Err(refuse(EINVAL, Fault::SIZE));
    }
    if request.count == 0 || request.count > abi::MAX_ENTRIES {
        return Err(refuse(EINVAL, Fault::COUNT));
    }
    Ok(())
}

/// Address of an entry of the request's list.
fn entry_address<T>(request: &Request, index: u32) -> u64 {
    request.buffer.wrapping_add(u64::from(index).wrapping_mul(size_of::<T>() as u64))
}

pub fn take_entry<T: abi::Plain>(request: &Request, index: u32) -> Result<T, Refusal> {
    // SAFETY: as in `take`.
    unsafe { fetch(entry_address::<T>(request, index)) }
}

pub fn give_entry<T: abi::Plain>(request: &Request, index: u32, value: &T) -> Result<(), Refusal> {
    // SAFETY: as in `take`.
    unsafe { deliver(entry_address::<T>(request, index), value) }
}

/// Reads a `T` at any address of the caller.
///
/// # Safety
/// This is a domctl, so that the running vCPU is the caller's.
unsafe fn fetch<T: abi::Plain>(from: u64) -> Result<T, Refusal> {
    let mut value = core::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: `value` has the size given. Any bits are a `T` (`Plain`), and it was zero before.
    unsafe {
        xen::copy_from_guest(value.as_mut_ptr().cast(), from, size_of::<T>() as u32)
            .map_err(|errno| refuse(errno, Fault::BUFFER))?;
        Ok(value.assume_init())
    }
}

/// Writes a `T` to any address of the caller.
///
/// # Safety
/// This is a domctl, so that the running vCPU is the caller's.
unsafe fn deliver<T: abi::Plain>(to: u64, value: &T) -> Result<(), Refusal> {
    // SAFETY: `value` has the size given, and no padding (`Plain`) by which something else would leak.
    unsafe {
        xen::copy_to_guest(to, core::ptr::from_ref(value).cast(), size_of::<T>() as u32)
            .map_err(|errno| refuse(errno, Fault::BUFFER))
    }
}
