//! An event channel of the witness's own, through /dev/xen/evtchn: both ends are in this guest. A pair that was closed
//! and made anew cannot pass for the old one, because nobody but the witness makes it: a kernel that reconnects its
//! drivers after a suspend does not know it.
//!
//! One event is under way at a time, because Xen merges those that are not yet taken: each that is sent must arrive.

use crate::context::{Context, Pacer};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};
use witness::report::Noticed;
use xen_abi::hypercall::DOMID_SELF;

const DEVICE: &str = "/dev/xen/evtchn";
/// _IOC(_IOC_NONE, 'E', number, size) (include/uapi/xen/evtchn.h).
const fn ioc(number: u64, size: u64) -> u64 {
    size << 16 | (b'E' as u64) << 8 | number
}
/// IOCTL_EVTCHN_BIND_INTERDOMAIN: remote domain, remote port.
const BIND_INTERDOMAIN: u64 = ioc(1, 8);
/// IOCTL_EVTCHN_BIND_UNBOUND_PORT: remote domain.
const BIND_UNBOUND_PORT: u64 = ioc(2, 4);
/// IOCTL_EVTCHN_NOTIFY: port.
const NOTIFY: u64 = ioc(4, 4);

/// How long an event may take. A guest that stands still meanwhile gets it when it goes on, perhaps after its timer:
/// [`GRACE`].
const LIMIT: Duration = Duration::from_secs(5);
const GRACE: Duration = Duration::from_secs(1);

/// Two ports of this guest that lead to each other.
#[derive(Debug)]
struct Pair {
    device: File,
    ports: [u32; 2],
    raised: VecDeque<u32>,
}

impl Pair {
    fn open() -> Result<Pair, String> {
        let say = |what: &str, e: io::Error| format!("{DEVICE}: {what}: {e}");
        let device = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(DEVICE)
            .map_err(|e| say("open", e))?;
        let own = u32::from(DOMID_SELF);
        let one = call(&device, BIND_UNBOUND_PORT, [own, 0]).map_err(|e| say("make a port", e))?;
        let other = call(&device, BIND_INTERDOMAIN, [own, one]).map_err(|e| say("connect a port", e))?;
        let mut pair = Pair { device, ports: [one, other], raised: VecDeque::new() };
        // Xen raises a port when it is connected.
        while pair.take(other, GRACE).map_err(|e| say("read", e))? {}
        Ok(pair)
    }

    /// Sends from one end; true if the event arrives at the other.
    fn round(&mut self, from: usize) -> io::Result<bool> {
        let (Some(from), Some(to)) = (self.ports.get(from).copied(), self.ports.get(1 - from).copied()) else {
            return Ok(true);
        };
        // An event that was raised without having been sent (a resume may do that) is no answer.
        while self.take(to, Duration::ZERO)? {}
        call(&self.device, NOTIFY, [from, 0])?;
        Ok(self.take(to, LIMIT)? || self.take(to, GRACE)?)
    }

    /// Takes one event of a port, and lets the next one come.
    fn take(&mut self, port: u32, limit: Duration) -> io::Result<bool> {
        let end = Instant::now() + limit;
        loop {
            while let Some(raised) = self.raised.pop_front() {
                self.device.write_all(&raised.to_ne_bytes())?;
                if raised == port {
                    return Ok(true);
                }
            }
            let rest = end.saturating_duration_since(Instant::now());
            let mut poll = libc::pollfd { fd: self.device.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd, as many as are told.
            let ready = unsafe { libc::poll(&raw mut poll, 1, i32::try_from(rest.as_millis()).unwrap_or(i32::MAX)) };
            if ready < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return Err(io::Error::last_os_error());
            }
            if ready <= 0 {
                if Instant::now() >= end {
                    return Ok(false);
                }
                continue;
            }
            let mut bytes = [0; 64];
            match self.device.read(&mut bytes) {
                Ok(n) => {
                    let ports = bytes.get(..n).unwrap_or_default().chunks_exact(4);
                    self.raised.extend(ports.filter_map(|p| p.try_into().ok()).map(u32::from_ne_bytes));
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// An ioctl of the device, all of which take at most two 32-bit numbers; the result is a port or 0.
fn call(device: &File, request: u64, mut numbers: [u32; 2]) -> io::Result<u32> {
    // SAFETY: the requests used here read at most eight bytes at the address, and `numbers` has as many.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), request as _, numbers.as_mut_ptr()) };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Starts the load; an error says why this guest can't have it.
pub fn start(ctx: &Arc<Context>) -> Result<(), String> {
    if ctx.config.events == 0 {
        return Ok(());
    }
    let mut pair = Pair::open()?;
    let c = ctx.clone();
    crate::spawn("events", move || {
        let mut pacer = Pacer::new(c.config.events);
        for turn in 0usize.. {
            pacer.wait(&c);
            let from = turn % 2;
            c.counters.events_sent.add(1);
            match pair.round(from) {
                Ok(true) => c.counters.events_back.add(1),
                lost => {
                    c.counters.events_lost.add(1);
                    let error = match lost {
                        Ok(_) => format!("nothing came within {} s", (LIMIT + GRACE).as_secs()),
                        Err(e) => e.to_string(),
                    };
                    c.notice(Noticed::EventLost { ports: [pair.ports[from], pair.ports[1 - from]], error });
                }
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ioctl_numbers_are_linuxs() {
        // Computed with the C macros from include/uapi/xen/evtchn.h.
        assert_eq!([BIND_INTERDOMAIN, BIND_UNBOUND_PORT, NOTIFY], [0x0008_4501, 0x0004_4502, 0x0004_4504]);
    }

    /// A socket stands for the device: it gives the ports that were raised, and takes the acknowledgements.
    fn pair(events: &[u32]) -> Pair {
        let (ours, mut other) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        for event in events {
            other.write_all(&event.to_ne_bytes()).unwrap();
        }
        // The other end stays open: a closed one would be readable for ever.
        std::mem::forget(other);
        Pair { device: File::from(std::os::fd::OwnedFd::from(ours)), ports: [7, 8], raised: VecDeque::new() }
    }

    #[test]
    fn only_the_ports_own_event_counts() {
        let quick = Duration::from_millis(20);
        assert!(pair(&[8]).take(8, quick).unwrap());
        assert!(pair(&[7, 8]).take(8, quick).unwrap());
        assert!(!pair(&[7]).take(8, quick).unwrap());
        assert!(!pair(&[]).take(8, quick).unwrap());
        let mut twice = pair(&[8, 8]);
        assert!(twice.take(8, quick).unwrap() && twice.take(8, quick).unwrap() && !twice.take(8, quick).unwrap());
    }

    #[test]
    fn without_xen_it_says_so() {
        if !std::path::Path::new(DEVICE).exists() {
            assert!(Pair::open().unwrap_err().contains(DEVICE));
        }
    }
}
