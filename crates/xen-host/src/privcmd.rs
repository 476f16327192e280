//! /dev/xen/privcmd: hypercalls, and mappings of foreign frames and of Xen's resources.
//!
//! The ioctls are those of Linux' `include/uapi/xen/privcmd.h`.

use crate::buffer::{Buffer, PAGE};
use crate::mapping::Pages;
use hypervisor::{Access, Cause, DomId, Errno, Gfn, HypervisorError, Result};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Mutex;

/// Linux' `_IOC(_IOC_NONE, kind, number, size)`.
pub(crate) const fn ioc(kind: u8, number: u8, size: usize) -> libc::c_ulong {
    (size as libc::c_ulong) << 16 | (kind as libc::c_ulong) << 8 | number as libc::c_ulong
}

#[repr(C)]
struct Hypercall {
    op: u64,
    arg: [u64; 5],
}

#[repr(C)]
struct MmapBatchV2 {
    num: u32,
    dom: u16,
    addr: u64,
    arr: *const u64,
    err: *mut i32,
}

#[repr(C)]
struct MmapResource {
    dom: u16,
    kind: u32,
    id: u32,
    idx: u32,
    num: u64,
    addr: u64,
}

const IOCTL_HYPERCALL: libc::c_ulong = ioc(b'P', 0, size_of::<Hypercall>());
const IOCTL_MMAPBATCH_V2: libc::c_ulong = ioc(b'P', 4, size_of::<MmapBatchV2>());
const IOCTL_MMAP_RESOURCE: libc::c_ulong = ioc(b'P', 7, size_of::<MmapResource>());

/// Buffers of one page that are kept for the next hypercall.
const SPARE_BUFFERS: usize = 8;

/// How often a hypercall is made again because Xen asks for it. Each try does some of the work, so this is far more than any needs.
const MAX_RESTARTS: u32 = 100_000;

/// Opens a device of the Xen kernel, with an error that says what is missing.
pub(crate) fn open_device(path: &'static str) -> Result<File> {
    OpenOptions::new().read(true).write(true).open(path).map_err(|e| {
        let text = match e.kind() {
            std::io::ErrorKind::NotFound if !Path::new("/proc/xen").exists() => {
                format!("{path}: this machine does not run as Xen's control domain")
            }
            std::io::ErrorKind::NotFound => {
                format!("{path}: not there (is the kernel module loaded? modprobe xen-{})", {
                    path.rsplit('/').next().unwrap_or(path)
                })
            }
            std::io::ErrorKind::PermissionDenied => format!("{path}: permission denied (run as root)"),
            _ => format!("{path}: {e}"),
        };
        HypervisorError::unsupported("open", None, text)
    })
}

/// An `ioctl` with a structure; negative results become errors.
///
/// # Safety
/// `arg` must be what the ioctl of that number takes, and every address in it valid for what the kernel does with it.
pub(crate) unsafe fn ioctl<T>(file: &File, number: libc::c_ulong, arg: *mut T) -> std::result::Result<i64, Errno> {
    // The plain system call: the C library's wrapper would cut the result to 32 bits.
    // SAFETY: the caller vouches for the argument.
    let r = unsafe { libc::syscall(libc::SYS_ioctl, file.as_raw_fd(), number, arg) };
    if r < 0 {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        return Err(Errno(errno));
    }
    Ok(r)
}

/// The device, and a stock of buffers for it.
#[derive(Debug)]
pub struct Privcmd {
    privcmd: File,
    hypercall: File,
    spare: Mutex<Vec<Buffer>>,
}

impl Privcmd {
    pub fn open() -> Result<Privcmd> {
        Ok(Privcmd {
            privcmd: open_device("/dev/xen/privcmd")?,
            hypercall: open_device("/dev/xen/hypercall")?,
            spare: Mutex::new(Vec::new()),
        })
    }

    /// Memory for at least `len` bytes of arguments. Contents are arbitrary.
    pub fn buffer(&self, len: usize) -> Result<Lent<'_>> {
        let spare = if len <= PAGE { self.spare().pop() } else { None };
        let buffer = match spare {
            Some(buffer) => buffer,
            None => Buffer::new(&self.hypercall, len)
                .map_err(|e| HypervisorError::new("allocate hypercall buffer", None, Cause::Io(e)))?,
        };
        Ok(Lent { buffer: Some(buffer), home: self })
    }

    fn spare(&self) -> std::sync::MutexGuard<'_, Vec<Buffer>> {
        self.spare.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Makes a hypercall (`number` as in `xen_abi::hypercall`). Addresses in `args` and in what they point to must be those of
    /// [`Buffer`]s that the caller holds mutably; Xen checks all else.
    ///
    /// # Safety
    /// Every address that the hypercall reads or writes must lie in live buffers that nothing else uses during the call.
    pub unsafe fn hypercall(&self, number: u64, args: [u64; 5]) -> std::result::Result<i64, Errno> {
        for _ in 1..MAX_RESTARTS {
            let mut call = Hypercall { op: number, arg: args };
            // SAFETY: the structure is the ioctl's, and the caller vouches for the addresses.
            match unsafe { ioctl(&self.privcmd, IOCTL_HYPERCALL, &raw mut call) } {
                // Xen asks to be called again; the state of what it did so far is in the arguments.
                Err(Errno::EAGAIN | Errno::EINTR) => std::thread::yield_now(),
                r => return r,
            }
        }
        Err(Errno::EAGAIN)
    }

    /// Maps frames of a domain. Each frame has its own result; touching a page that has an error is a bus error, so callers must not.
    pub fn map_frames(
        &self,
        dom: DomId,
        gfns: &[Gfn],
        access: Access,
    ) -> Result<(Pages, Vec<std::result::Result<(), Errno>>)> {
        const OP: &str = "map foreign frames";
        let count = u32::try_from(gfns.len()).map_err(|_| HypervisorError::errno(OP, dom, Errno::E2BIG))?;
        let mut errors = vec![0i32; gfns.len()];
        let pages = Pages::reserve(&self.privcmd, gfns.len(), access, 0)
            .map_err(|e| HypervisorError::new(OP, dom, Cause::Io(e)))?;
        if count == 0 {
            return Ok((pages, Vec::new()));
        }
        let mut batch = MmapBatchV2 {
            num: count,
            dom: dom.0,
            addr: pages.addr(),
            // `Gfn` is transparent over u64.
            arr: gfns.as_ptr().cast(),
            err: errors.as_mut_ptr(),
        };
        // SAFETY: `arr` and `err` have `num` elements each, `addr` is a mapping of so many pages of this device that is not yet used.
        match unsafe { ioctl(&self.privcmd, IOCTL_MMAPBATCH_V2, &raw mut batch) } {
            // ENOENT: some frames are paged out; their entries say so.
            Ok(_) | Err(Errno::ENOENT) => {}
            Err(e) => return Err(HypervisorError::errno(OP, dom, e)),
        }
        let results = errors.iter().map(|&e| if e == 0 { Ok(()) } else { Err(Errno(e.saturating_neg())) }).collect();
        Ok((pages, results))
    }

    /// Maps frames of a resource of Xen (`XENMEM_acquire_resource`).
    pub fn map_resource(&self, dom: DomId, kind: u32, id: u32, first: u32, count: u32) -> Result<Pages> {
        const OP: &str = "XENMEM_acquire_resource";
        let pages = Pages::reserve(&self.privcmd, count as usize, Access::ReadWrite, 0)
            .map_err(|e| HypervisorError::new(OP, dom, Cause::Io(e)))?;
        let mut resource = MmapResource { dom: dom.0, kind, id, idx: first, num: count.into(), addr: pages.addr() };
        // SAFETY: the structure is the ioctl's, and `addr` is a mapping of `num` pages of this device that is not yet used.
        unsafe { ioctl(&self.privcmd, IOCTL_MMAP_RESOURCE, &raw mut resource) }
            .map_err(|e| HypervisorError::errno(OP, dom, e))?;
        Ok(pages)
    }
}

/// A buffer on loan; goes back to the stock.
#[derive(Debug)]
pub struct Lent<'a> {
    buffer: Option<Buffer>,
    home: &'a Privcmd,
}

impl std::ops::Deref for Lent<'_> {
    type Target = Buffer;
    fn deref(&self) -> &Buffer {
        self.buffer.as_ref().unwrap_or_else(|| unreachable!("only taken on drop"))
    }
}

impl std::ops::DerefMut for Lent<'_> {
    fn deref_mut(&mut self) -> &mut Buffer {
        self.buffer.as_mut().unwrap_or_else(|| unreachable!("only taken on drop"))
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take()
            && buffer.capacity() == PAGE
        {
            let mut spare = self.home.spare();
            if spare.len() < SPARE_BUFFERS {
                spare.push(buffer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers that the C macros of Linux' headers give, written out.
    #[test]
    fn the_ioctl_numbers_are_linuxs() {
        assert_eq!(IOCTL_HYPERCALL, 0x0030_5000);
        assert_eq!(IOCTL_MMAPBATCH_V2, 0x0020_5004);
        assert_eq!(IOCTL_MMAP_RESOURCE, 0x0020_5007);
    }
}
