//! Pages of others, mapped into this process.

use crate::buffer::PAGE;
use hypervisor::{Access, Mapping};
use rustix::mm::{MapFlags, ProtFlags};
use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// A mapping of a Xen device. Others write to it at any moment, so it is never lent out as a slice: bytes are copied.
#[derive(Debug)]
pub struct Pages {
    ptr: NonNull<u8>,
    /// Bytes.
    len: usize,
    access: Access,
}

// SAFETY: the mapping belongs to this value alone and is not tied to a thread; the pages themselves are shared memory in any case.
unsafe impl Send for Pages {}

impl Pages {
    /// Maps `pages` pages of a device; what is behind them is for an ioctl to say (privcmd), or was said before (gntdev).
    pub(crate) fn reserve(dev: &File, pages: usize, access: Access, offset: u64) -> io::Result<Pages> {
        let len = pages.checked_mul(PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
        if len == 0 {
            return Ok(Pages { ptr: NonNull::dangling(), len, access });
        }
        let prot = match access {
            Access::Read => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let ptr = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, dev, offset) }?;
        let ptr = NonNull::new(ptr.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Pages { ptr, len, access })
    }

    pub(crate) fn addr(&self) -> u64 {
        self.ptr.as_ptr() as u64
    }

    fn check(&self, offset: usize, len: usize) {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "bytes {offset}..+{len} of a mapping of {} bytes",
            self.len
        );
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        self.check(offset, 4);
        assert!(offset.is_multiple_of(4), "word at odd offset {offset}");
        // SAFETY: aligned (pages are) and inside the mapping, which lives as long as `self`; all access to it from here is atomic or
        // a plain copy of bytes that nobody relies on to be consistent.
        unsafe { AtomicU32::from_ptr(self.ptr.as_ptr().add(offset).cast()) }
    }
}

impl Mapping for Pages {
    fn len(&self) -> usize {
        self.len
    }

    fn read(&self, offset: usize, buf: &mut [u8]) {
        self.check(offset, buf.len());
        // SAFETY: the source lies in the mapping, the target is a slice of our own, so they do not overlap. The other side may write
        // meanwhile; then the copy holds a mixture, which callers must expect of shared memory.
        unsafe { std::ptr::copy_nonoverlapping(self.ptr.as_ptr().add(offset), buf.as_mut_ptr(), buf.len()) }
    }

    fn write(&self, offset: usize, data: &[u8]) {
        self.check(offset, data.len());
        assert_eq!(self.access, Access::ReadWrite, "write to a read-only mapping");
        // SAFETY: the target lies in the mapping, which is writable; the source is a slice of our own.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.ptr.as_ptr().add(offset), data.len()) }
    }

    fn load_u32(&self, offset: usize) -> u32 {
        self.word(offset).load(Ordering::Acquire)
    }

    fn store_u32(&self, offset: usize, value: u32) {
        assert_eq!(self.access, Access::ReadWrite, "write to a read-only mapping");
        self.word(offset).store(value, Ordering::Release);
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if self.len != 0 {
            // SAFETY: the mapping was made by `reserve`, and no reference into it outlives `self`.
            let _ = unsafe { rustix::mm::munmap(self.ptr.as_ptr().cast(), self.len) };
        }
    }
}
