//! The page shared with a domain, read and written while the other side may do the same.

use super::kill_point::may_die_here;
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

    pub(super) fn word(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset.is_multiple_of(4) && offset + 4 <= PAGE);
        // SAFETY: all offsets are constants of `xenstore_wire::ring`, aligned and inside the page, which stays mapped as
        // long as `self`; this process accesses it atomically only.
        unsafe { AtomicU32::from_ptr(self.ptr.as_ptr().add(offset).cast()) }
    }

    pub(super) fn byte(&self, offset: usize) -> &AtomicU8 {
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

    /// Where the next request begins.
    pub fn requests_at(&self) -> u32 {
        self.word(ring::REQ_CONS).load(Ordering::Acquire)
    }

    /// Where the next reply goes.
    pub fn replies_at(&self) -> u32 {
        self.word(ring::RSP_PROD).load(Ordering::Acquire)
    }

    /// Reads up to `max` bytes of requests from index `at` on, appended to `buf`. How many there were. They stay in the
    /// ring until [`RingPage::consume`].
    ///
    /// # Errors
    /// The indexes can't be; nothing is read.
    pub fn peek(&self, at: u32, max: usize, buf: &mut Vec<u8>) -> Result<usize, BadIndexes> {
        // Read once: the other side may change it at any moment.
        let prod = self.word(ring::REQ_PROD).load(Ordering::Acquire);
        let used = ring::used(at, prod).ok_or(BadIndexes { cons: at, prod })?;
        let n = used.min(max);
        buf.extend(
            (0..n as u32).map(|i| self.byte(ring::REQ + ring::offset(at.wrapping_add(i))).load(Ordering::Relaxed)),
        );
        Ok(n)
    }

    /// Gives the room of requests before index `to` back.
    pub fn consume(&self, to: u32) {
        fence(Ordering::SeqCst);
        self.word(ring::REQ_CONS).store(to, Ordering::Release);
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

    /// Lays as many bytes of replies into the ring from index `at` on as fit; the other side does not see them before
    /// [`RingPage::publish`]. How many.
    ///
    /// # Errors
    /// The indexes can't be; nothing is laid.
    pub fn fill(&self, at: u32, bytes: &[u8]) -> Result<usize, BadIndexes> {
        let cons = self.word(ring::RSP_CONS).load(Ordering::Acquire);
        let used = ring::used(cons, at).ok_or(BadIndexes { cons, prod: at })?;
        let n = (RING_SIZE - used).min(bytes.len());
        for (i, &b) in bytes[..n].iter().enumerate() {
            if i == n / 2 {
                may_die_here();
            }
            let to = ring::offset(at.wrapping_add(i as u32));
            self.byte(ring::RSP + to).store(b, Ordering::Relaxed);
        }
        Ok(n)
    }

    /// Shows the other side the replies before index `to`.
    pub fn publish(&self, to: u32) {
        fence(Ordering::SeqCst);
        self.word(ring::RSP_PROD).store(to, Ordering::Release);
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
        let start = p.requests_at();
        assert_eq!(p.peek(start, 200, &mut got).unwrap(), 200);
        assert_eq!(p.requests_at(), start, "they stay until they are consumed");
        assert_eq!(p.peek(start.wrapping_add(200), 200, &mut got).unwrap(), 100);
        p.consume(start.wrapping_add(300));
        assert_eq!(got, (0..300u32).map(|i| i as u8).collect::<Vec<_>>());
        assert!(!p.has_requests().unwrap());
        let reply: Vec<u8> = (0..2000u32).map(|i| i as u8).collect();
        let at = p.replies_at();
        assert_eq!((p.fill(at, &reply).unwrap(), p.room().unwrap()), (RING_SIZE, RING_SIZE), "nobody sees it yet");
        p.publish(at.wrapping_add(1024));
        assert_eq!((p.fill(p.replies_at(), &reply).unwrap(), p.room().unwrap()), (0, 0));
        assert_eq!(p.word(ring::RSP_PROD).load(Ordering::SeqCst), (u32::MAX - 100).wrapping_add(1024));
    }

    #[test]
    fn a_producer_that_ran_wild_is_an_error_and_nothing_is_taken() {
        let p = page();
        p.word(ring::REQ_PROD).store(1025, Ordering::SeqCst);
        let mut buf = Vec::new();
        assert!(p.peek(0, 10, &mut buf).is_err() && buf.is_empty() && p.has_requests().is_err());
        p.word(ring::RSP_CONS).store(1, Ordering::SeqCst);
        assert!(p.fill(0, b"x").is_err() && p.room().is_err());
        assert_eq!(p.word(ring::RSP_PROD).load(Ordering::SeqCst), 0);
    }
}
