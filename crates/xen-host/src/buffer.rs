//! Memory that a hypercall may point to: never paged, never moved, never copied on write.
//!
//! Pages of /dev/xen/hypercall (Linux 4.18 and later) are the kernel's own, so nothing can take them away during a
//! hypercall. Ordinary memory, even locked, can be write-protected for a moment by the kernel's page migration, and then Xen answers EFAULT.

use rustix::mm::{MapFlags, ProtFlags};
use std::fs::File;
use std::io;
use std::ptr::NonNull;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Bytes in a page.
pub const PAGE: usize = hypervisor::PAGE_SIZE;

/// Whole pages for hypercall arguments. Xen only touches them during a hypercall, and a hypercall that uses a buffer is made with
/// that buffer borrowed mutably, so slices of it are ordinary memory.
#[derive(Debug)]
pub struct Buffer {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the buffer alone and is not tied to a thread.
unsafe impl Send for Buffer {}
// SAFETY: through a shared reference it can only be read.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Zeroed pages for at least `len` bytes.
    pub fn new(hypercall_dev: &File, len: usize) -> io::Result<Buffer> {
        let len = len.max(1).checked_next_multiple_of(PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let ptr = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                hypercall_dev,
                0,
            )
        }?;
        let ptr = NonNull::new(ptr.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut buffer = Buffer { ptr, len };
        buffer.bytes_mut().fill(0);
        Ok(buffer)
    }

    /// The address for a guest handle.
    pub fn addr(&mut self) -> u64 {
        self.ptr.as_ptr() as u64
    }

    /// Bytes, a multiple of the page size.
    pub fn capacity(&self) -> usize {
        self.len
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping has `len` readable bytes for the life of the buffer, initialised by the kernel, and nobody writes to
        // them while `self` is borrowed.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `self` is borrowed mutably, so this is the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }

    /// Puts a structure at `offset`. Panics if it does not fit: sizes are this crate's own.
    pub fn put<T: IntoBytes + Immutable + ?Sized>(&mut self, offset: usize, value: &T) {
        let bytes = value.as_bytes();
        self.bytes_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Takes the structure at `offset`. Panics if it does not fit, likewise.
    pub fn get<T: FromBytes>(&self, offset: usize) -> T {
        let bytes = &self.bytes()[offset..offset + size_of::<T>()];
        T::read_from_bytes(bytes).unwrap_or_else(|_| unreachable!("the slice has the type's size"))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}
