//! The page shared with a domain, read and written while the other side may do the same.

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering, fence};
use thiserror::Error;
use xenstore_wire::ring::{self, RING_SIZE};

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Indexes that can't be: more bytes between them than the ring holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("ring indexes {cons:#x} (consumer) and {prod:#x} (producer) are more than the ring's {RING_SIZE} bytes apart")]
pub struct BadIndexes {
    cons: u32,
    prod: u32,
}

/// A mapped ring page.
#[derive(Debug)]
pub struct RingPage {
    ptr: NonNull<u8>,
}

impl RingPage {
    /// Maps one page of a device, shared, for reading and writing.
    ///
    /// # Errors
    /// As `mmap(2)`.
    pub fn map(device: impl AsFd, offset: u64) -> std::io::Result<RingPage> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let p = unsafe {
            mmap(std::ptr::null_mut(), PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, device, offset)
        }?;
        let ptr = NonNull::new(p.cast()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        Ok(RingPage { ptr })
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset.is_multiple_of(4) && offset + 4 <= PAGE);
        // SAFETY: all offsets are constants of `xenstore_wire::ring`, aligned and inside the page, which stays mapped as
        // long as `self`; this process accesses it atomically only.
        unsafe { AtomicU32::from_ptr(self.ptr.as_ptr().add(offset).cast()) }
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        debug_assert!(offset < PAGE);
        // SAFETY: as above.
        unsafe { AtomicU8::from_ptr(self.ptr.as_ptr().add(offset)) }
    }

    fn indexes(&self, cons: usize, prod: usize) -> Result<(u32, u32, usize), BadIndexes> {
        // Each is read once: the other side may change it at any moment.
        let (c, p) = (self.word(cons).load(Ordering::Acquire), self.word(prod).load(Ordering::Acquire));
        let used = ring::used(c, p).ok_or(BadIndexes { cons: c, prod: p })?;
        Ok((c, p, used))
    }

    /// Takes up to `max` bytes of requests, appended to `buf`. How many there were.
    ///
    /// # Errors
    /// The indexes can't be; nothing is taken.
    pub fn take(&self, max: usize, buf: &mut Vec<u8>) -> Result<usize, BadIndexes> {
        let (cons, _, used) = self.indexes(ring::REQ_CONS, ring::REQ_PROD)?;
        let n = used.min(max);
        buf.extend(
            (0..n as u32).map(|i| self.byte(ring::REQ + ring::offset(cons.wrapping_add(i))).load(Ordering::Relaxed)),
        );
        fence(Ordering::SeqCst);
        if n > 0 {
            self.word(ring::REQ_CONS).store(cons.wrapping_add(n as u32), Ordering::Release);
        }
        Ok(n)
    }

    /// Whether there are requests.
    ///
    /// # Errors
    /// The indexes can't be.
    pub fn has_requests(&self) -> Result<bool, BadIndexes> {
        Ok(self.indexes(ring::REQ_CONS, ring::REQ_PROD)?.2 > 0)
    }

    /// How many bytes of replies fit.
    ///
    /// # Errors
    /// The indexes can't be.
    pub fn room(&self) -> Result<usize, BadIndexes> {
        Ok(RING_SIZE - self.indexes(ring::RSP_CONS, ring::RSP_PROD)?.2)
    }

    /// Puts as many bytes of replies as fit. How many.
    ///
    /// # Errors
    /// The indexes can't be; nothing is put.
    pub fn put(&self, bytes: &[u8]) -> Result<usize, BadIndexes> {
        let (_, prod, used) = self.indexes(ring::RSP_CONS, ring::RSP_PROD)?;
        let n = (RING_SIZE - used).min(bytes.len());
        for (i, &b) in bytes[..n].iter().enumerate() {
            let at = ring::offset(prod.wrapping_add(i as u32));
            self.byte(ring::RSP + at).store(b, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        if n > 0 {
            self.word(ring::RSP_PROD).store(prod.wrapping_add(n as u32), Ordering::Release);
        }
        Ok(n)
    }

    /// Empties both rings. True if the guest had asked for a reconnection and waits to be told.
    pub fn reset(&self) -> bool {
        for i in [ring::REQ_CONS, ring::REQ_PROD, ring::RSP_CONS, ring::RSP_PROD] {
            self.word(i).store(0, Ordering::SeqCst);
        }
        self.word(ring::CONNECTION).compare_exchange(1, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Sets the error field.
    pub fn set_error(&self, error: u32) {
        self.word(ring::ERROR).store(error, Ordering::SeqCst);
    }

    /// The feature field.
    pub fn features(&self) -> u32 {
        self.word(ring::SERVER_FEATURES).load(Ordering::SeqCst)
    }
}

impl Drop for RingPage {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length, and nobody holds a reference into it any more.
        let _ = unsafe { munmap(self.ptr.as_ptr().cast(), PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn page() -> RingPage {
        let fd = memfd_create("ring", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, PAGE as u64).unwrap();
        RingPage::map(&fd, 0).unwrap()
    }

    #[test]
    fn bytes_go_round_the_ring_and_indexes_wrap() {
        let p = page();
        for i in [ring::REQ_CONS, ring::REQ_PROD, ring::RSP_CONS, ring::RSP_PROD] {
            p.word(i).store(u32::MAX - 100, Ordering::SeqCst);
        }
        // The guest writes 300 bytes of requests across the wrap.
        for i in 0..300u32 {
            p.byte(ring::offset((u32::MAX - 100).wrapping_add(i))).store(i as u8, Ordering::SeqCst);
        }
        p.word(ring::REQ_PROD).store((u32::MAX - 100).wrapping_add(300), Ordering::SeqCst);
        let mut got = Vec::new();
        assert_eq!(p.take(200, &mut got).unwrap(), 200);
        assert_eq!(p.take(200, &mut got).unwrap(), 100);
        assert_eq!(got, (0..300u32).map(|i| i as u8).collect::<Vec<_>>());
        assert!(!p.has_requests().unwrap());
        let reply: Vec<u8> = (0..2000u32).map(|i| i as u8).collect();
        assert_eq!(p.put(&reply).unwrap(), RING_SIZE);
        assert_eq!((p.put(&reply).unwrap(), p.room().unwrap()), (0, 0));
        assert_eq!(p.word(ring::RSP_PROD).load(Ordering::SeqCst), (u32::MAX - 100).wrapping_add(1024));
    }

    #[test]
    fn a_producer_that_ran_wild_is_an_error_and_nothing_is_taken() {
        let p = page();
        p.word(ring::REQ_PROD).store(1025, Ordering::SeqCst);
        let mut buf = Vec::new();
        assert!(p.take(10, &mut buf).is_err() && buf.is_empty());
        p.word(ring::RSP_CONS).store(1, Ordering::SeqCst);
        assert!(p.put(b"x").is_err() && p.room().is_err());
        assert_eq!(p.word(ring::RSP_PROD).load(Ordering::SeqCst), 0);
    }
}
