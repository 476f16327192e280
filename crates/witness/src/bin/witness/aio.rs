//! Linux' asynchronous I/O (io_submit(2)): many requests in flight from one thread. Layouts: include/uapi/linux/aio_abi.h.

use std::io;
use std::os::fd::RawFd;

/// Read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
}

/// struct iocb, little-endian hosts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buf: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    result_fd: u32,
}

/// struct io_event.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct IoEvent {
    data: u64,
    obj: u64,
    result: i64,
    result2: i64,
}

/// Memory for O_DIRECT: whole blocks, aligned to their size.
#[derive(Debug)]
pub struct Blocks {
    start: std::ptr::NonNull<u8>,
    layout: std::alloc::Layout,
    block: usize,
}

// SAFETY: the memory belongs to this value alone; nothing in it is tied to a thread.
unsafe impl Send for Blocks {}

impl Blocks {
    /// `count` blocks of `block` bytes (a power of two), all zeroes.
    pub fn new(count: usize, block: usize) -> Blocks {
        let layout = std::alloc::Layout::from_size_align(count.max(1) * block, block.max(4096))
            .unwrap_or_else(|_| std::alloc::Layout::new::<[u8; 4096]>());
        // SAFETY: the layout's size is not zero.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        let Some(start) = std::ptr::NonNull::new(start) else { std::alloc::handle_alloc_error(layout) };
        Blocks { start, layout, block }
    }

    /// One block; panics if there is no such block.
    pub fn get(&self, i: usize) -> &[u8] {
        assert!((i + 1) * self.block <= self.layout.size());
        // SAFETY: within the allocation, as just checked; `&self` keeps writers away (requests in flight take `&mut`).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(i * self.block), self.block) }
    }

    /// One block to write to; panics if there is no such block.
    pub fn get_mut(&mut self, i: usize) -> &mut [u8] {
        assert!((i + 1) * self.block <= self.layout.size());
        // SAFETY: as above, and `&mut self` keeps all others away.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(i * self.block), self.block) }
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { std::alloc::dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// A context for a number of requests in flight.
#[derive(Debug)]
pub struct Aio {
    context: libc::c_ulong,
}

impl Aio {
    pub fn new(depth: u32) -> io::Result<Aio> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: `context` is zero and valid for the call to fill.
        let rc = unsafe { libc::syscall(libc::SYS_io_setup, depth, &mut context) };
        if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(Aio { context }) }
    }

    /// Submits one request for each offset, block i of `blocks` for offset i, all at once, and waits for all. The
    /// results: bytes moved, or a negative errno.
    pub fn run(&mut self, fd: RawFd, kind: Kind, blocks: &mut Blocks, offsets: &[u64]) -> io::Result<Vec<i64>> {
        let opcode = match kind {
            Kind::Read => 0,
            Kind::Write => 1,
        };
        let mut iocbs = Vec::with_capacity(offsets.len());
        for (i, offset) in offsets.iter().enumerate() {
            iocbs.push(Iocb {
                data: i as u64,
                opcode,
                fd: fd as u32,
                buf: blocks.get_mut(i).as_mut_ptr() as u64,
                len: blocks.block as u64,
                offset: i64::try_from(*offset).map_err(io::Error::other)?,
                ..Iocb::default()
            });
        }
        let mut list: Vec<*mut Iocb> = iocbs.iter_mut().map(std::ptr::from_mut).collect();
        let mut results = vec![i64::from(-libc::EIO); offsets.len()];
        let mut submitted = 0;
        let mut done = 0;
        let mut failure = None;
        while done < list.len() {
            if submitted < list.len() && failure.is_none() {
                let rest = list.get_mut(submitted..).unwrap_or_default();
                // SAFETY: `rest` points to iocbs that live until all events are in (the loop does not end before), and
                // whose buffers are in `blocks`, which is borrowed for as long.
                let n = unsafe { libc::syscall(libc::SYS_io_submit, self.context, rest.len(), rest.as_mut_ptr()) };
                if n < 0 {
                    let e = io::Error::last_os_error();
                    if e.raw_os_error() != Some(libc::EAGAIN) || done == submitted {
                        failure = Some(e);
                    }
                } else {
                    submitted += n as usize;
                }
            }
            if done == submitted {
                break;
            }
            let mut events = [IoEvent::default(); 64];
            // SAFETY: room for as many events as are asked for; no timeout.
            let n = unsafe {
                libc::syscall(
                    libc::SYS_io_getevents,
                    self.context,
                    1,
                    events.len(),
                    events.as_mut_ptr(),
                    std::ptr::null_mut::<libc::timespec>(),
                )
            };
            // An interrupted wait is begun again; nothing else can fail while the context lives, and the buffers may not
            // be let go of before all requests are answered.
            let n = usize::try_from(n).unwrap_or(0);
            for e in events.iter().take(n) {
                if let Some(r) = results.get_mut(e.data as usize) {
                    *r = e.result;
                }
            }
            done += n;
        }
        match failure {
            Some(e) => Err(e),
            None => Ok(results),
        }
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: made by io_setup; no request is in flight outside of `run`.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn writes_and_reads_many_at_once() {
        let path = std::env::temp_dir().join(format!("witness-aio-{}", std::process::id()));
        let file = std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        let mut aio = Aio::new(40).unwrap();
        let mut blocks = Blocks::new(40, 4096);
        let offsets: Vec<u64> = (0..40).map(|i| i * 8192).collect();
        for i in 0..40 {
            blocks.get_mut(i).fill(i as u8 + 1);
        }
        let fd = file.as_raw_fd();
        assert!(aio.run(fd, Kind::Write, &mut blocks, &offsets).unwrap().iter().all(|r| *r == 4096));
        for i in 0..40 {
            blocks.get_mut(i).fill(0);
        }
        assert!(aio.run(fd, Kind::Read, &mut blocks, &offsets).unwrap().iter().all(|r| *r == 4096));
        assert!((0..40).all(|i| blocks.get(i).iter().all(|b| *b == i as u8 + 1)));
        assert!(aio.run(-1, Kind::Read, &mut blocks, &offsets).is_err());
        std::fs::remove_file(&path).unwrap();
    }
}
