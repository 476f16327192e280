//! /dev/xen/evtchn: event channels of the control domain (Linux' `include/uapi/xen/evtchn.h`).

use crate::privcmd::{ioc, ioctl, open_device};
use hypervisor::{Cause, DomId, Errno, Events, HypervisorError, Port, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

const BIND_VIRQ: libc::c_ulong = ioc(b'E', 0, 4);
const BIND_INTERDOMAIN: libc::c_ulong = ioc(b'E', 1, 8);
const BIND_UNBOUND_PORT: libc::c_ulong = ioc(b'E', 2, 4);
const UNBIND: libc::c_ulong = ioc(b'E', 3, 4);
const NOTIFY: libc::c_ulong = ioc(b'E', 4, 4);
const RESET: libc::c_ulong = ioc(b'E', 5, 0);

/// Ports that one read takes from the kernel.
const READ_PORTS: usize = 64;

/// One handle; the ports bound through it are closed with it.
#[derive(Debug)]
pub struct EventDevice {
    file: File,
    /// Raised ports that were read from the kernel and not yet handed out.
    raised: VecDeque<Port>,
}

impl EventDevice {
    pub fn open() -> Result<EventDevice> {
        Ok(EventDevice { file: open_device("/dev/xen/evtchn")?, raised: VecDeque::new() })
    }

    fn call<const N: usize>(&self, op: &'static str, number: libc::c_ulong, mut args: [u32; N]) -> Result<Port> {
        // SAFETY: each of the ioctls above takes a structure of 32-bit numbers of the size in its number, and keeps no address.
        let r = unsafe { ioctl(&self.file, number, args.as_mut_ptr()) };
        r.map(|port| port as Port).map_err(|e| HypervisorError::errno(op, None, e))
    }
}

impl Events for EventDevice {
    fn bind_interdomain(&mut self, dom: DomId, port: Port) -> Result<Port> {
        self.call("EVTCHNOP_bind_interdomain", BIND_INTERDOMAIN, [dom.0.into(), port]).map_err(|mut e| {
            e.domid = Some(dom);
            e.with_detail(format!("port {port}"))
        })
    }

    fn bind_unbound(&mut self, dom: DomId) -> Result<Port> {
        self.call("EVTCHNOP_alloc_unbound", BIND_UNBOUND_PORT, [dom.0.into()]).map_err(|mut e| {
            e.domid = Some(dom);
            e
        })
    }

    fn bind_virq(&mut self, virq: u32) -> Result<Port> {
        self.call("EVTCHNOP_bind_virq", BIND_VIRQ, [virq]).map_err(|e| e.with_detail(format!("virq {virq}")))
    }

    fn unbind(&mut self, port: Port) -> Result<()> {
        self.call("EVTCHNOP_close", UNBIND, [port]).map_err(|e| e.with_detail(format!("port {port}")))?;
        self.raised.retain(|&p| p != port);
        Ok(())
    }

    fn notify(&mut self, port: Port) -> Result<()> {
        self.call("EVTCHNOP_send", NOTIFY, [port]).map_err(|e| e.with_detail(format!("port {port}"))).map(drop)
    }

    fn next(&mut self, timeout: Option<Duration>) -> Result<Option<Port>> {
        const OP: &str = "wait for an event channel";
        let io = |e| HypervisorError::new(OP, None, Cause::Io(e));
        let end = timeout.map(|t| Instant::now() + t);
        while self.raised.is_empty() {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let left = left.map(|l| Timespec { tv_sec: l.as_secs() as i64, tv_nsec: l.subsec_nanos().into() });
            let mut fds = [PollFd::new(&self.file, PollFlags::IN)];
            match poll(&mut fds, left.as_ref()) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(io(e.into())),
            }
            let mut bytes = [0; READ_PORTS * 4];
            match self.file.read(&mut bytes) {
                Ok(n) => {
                    let ports = bytes[..n].chunks_exact(4);
                    self.raised.extend(ports.map(|p| u32::from_ne_bytes([p[0], p[1], p[2], p[3]])));
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                // The kernel's ring of raised ports overflowed: nothing else is told until it is reset. Every port counts as raised
                // then, which only the owner of the ports can do.
                Err(e) if e.raw_os_error() == Some(libc::EFBIG) => {
                    let _ = self.call::<0>("IOCTL_EVTCHN_RESET", RESET, []);
                    return Err(HypervisorError::errno(OP, None, Errno(libc::EFBIG))
                        .with_detail("the kernel's event ring overflowed and was reset; treat every port as raised"));
                }
                Err(e) => return Err(io(e)),
            }
        }
        Ok(self.raised.pop_front())
    }

    fn unmask(&mut self, port: Port) -> Result<()> {
        self.file.write_all(&port.to_ne_bytes()).map_err(|e| {
            HypervisorError::new("EVTCHNOP_unmask", None, Cause::Io(e)).with_detail(format!("port {port}"))
        })
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ioctl_numbers_are_linuxs() {
        assert_eq!(BIND_VIRQ, 0x0004_4500);
        assert_eq!(BIND_INTERDOMAIN, 0x0008_4501);
        assert_eq!(BIND_UNBOUND_PORT, 0x0004_4502);
        assert_eq!(RESET, 0x0000_4505);
    }
}
