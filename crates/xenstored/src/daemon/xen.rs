//! [`Devices`] over real Xen: event channels, grants, dom0's ring, and what the hypervisor says of domains.
//!
//! The event channel device is handed from daemon to daemon at a live update with the ports bound through it, so it is
//! handled here and not by `xen-host`.

use super::devices::{Devices, Raised};
use super::ring::RingPage;
use crate::host::DomainState;
use hypervisor::{DomId, Hypervisor, PortState, PortStatus};
use rustix::io::{FdFlags, fcntl_setfd};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use tracing::warn;
use xen_host::XenHost;

/// `VIRQ_DOM_EXC`: something happened to some domain (`xen/include/public/xen.h`).
const VIRQ_DOM_EXC: u32 = 3;
/// Grant reference of a domain's xenstore page (`GNTTAB_RESERVED_XENSTORE`, `xen/include/public/grant_table.h`).
const GRANT_XENSTORE: u32 = 1;

/// Linux' `_IOC(_IOC_NONE, kind, number, size)`.
const fn ioc(kind: u8, number: u8, size: usize) -> libc::c_ulong {
    (size as libc::c_ulong) << 16 | (kind as libc::c_ulong) << 8 | number as libc::c_ulong
}

// Linux: include/uapi/xen/evtchn.h
const BIND_VIRQ: libc::c_ulong = ioc(b'E', 0, 4);
const BIND_INTERDOMAIN: libc::c_ulong = ioc(b'E', 1, 8);
const UNBIND: libc::c_ulong = ioc(b'E', 3, 4);
const NOTIFY: libc::c_ulong = ioc(b'E', 4, 4);
// Linux: include/uapi/xen/gntdev.h
const MAP_GRANT: libc::c_ulong = ioc(b'G', 0, 24);
const UNMAP_GRANT: libc::c_ulong = ioc(b'G', 1, 16);

#[repr(C)]
struct MapGrant {
    count: u32,
    pad: u32,
    index: u64,
    domid: u32,
    reference: u32,
}

#[repr(C)]
struct UnmapGrant {
    index: u64,
    count: u32,
    pad: u32,
}

fn ioctl<T>(f: &File, number: libc::c_ulong, arg: &mut T) -> io::Result<u32> {
    // SAFETY: all callers are in this file and pass the structure that the number stands for; the kernel keeps no address.
    let r = unsafe { libc::ioctl(f.as_raw_fd(), number, std::ptr::from_mut(arg)) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r as u32) }
}

struct Ring {
    /// Unmapped before the grant is given back.
    page: Option<RingPage>,
    /// gntdev's name for the mapping; dom0's page comes from the kernel.
    index: Option<u64>,
}

/// The machine.
pub struct Xen {
    host: XenHost,
    events: File,
    grants: File,
    rings: BTreeMap<u16, Ring>,
    virq: u32,
}

impl std::fmt::Debug for Xen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Xen").field("rings", &self.rings.len()).field("virq", &self.virq).finish_non_exhaustive()
    }
}

fn open(path: &str) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|e| io::Error::new(e.kind(), format!("{path}: {e} (is this Xen's dom0, with its modules loaded?)")))
}

impl Xen {
    /// Opens the devices; `events` is the event channel device of the daemon before us.
    ///
    /// # Errors
    /// A device is missing, or the Xen is one that we don't know.
    pub fn open(events: Option<File>) -> anyhow::Result<Xen> {
        let host = XenHost::open()?;
        let events = match events {
            Some(f) => f,
            None => open("/dev/xen/evtchn")?,
        };
        fcntl_setfd(&events, FdFlags::CLOEXEC)?;
        rustix::io::ioctl_fionbio(&events, true)?;
        let grants = open("/dev/xen/gntdev")?;
        let mut xen = Xen { host, events, grants, rings: BTreeMap::new(), virq: 0 };
        xen.watch_domains(true)?;
        Ok(xen)
    }

    fn map_dom0(&mut self) -> io::Result<()> {
        let page = RingPage::map(open("/proc/xen/xsd_kva")?, 0)?;
        self.rings.insert(0, Ring { page: Some(page), index: None });
        Ok(())
    }

    fn give_back(&self, index: u64) {
        if let Err(e) = ioctl(&self.grants, UNMAP_GRANT, &mut UnmapGrant { index, count: 1, pad: 0 }) {
            warn!("a domain's ring page can't be given back: {e}");
        }
    }
}

impl Devices for Xen {
    fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    fn raised(&mut self) -> io::Result<Raised> {
        let mut buf = [0u8; 4096];
        match (&self.events).read(&mut buf) {
            Ok(n) => {
                (&self.events).write_all(&buf[..n])?;
                let all = buf[..n].chunks_exact(4).map(|c| u32::from_ne_bytes([c[0], c[1], c[2], c[3]]));
                let (virq, ports): (Vec<u32>, Vec<u32>) = all.partition(|&p| p == self.virq);
                Ok(Raised { domain_exception: !virq.is_empty(), ports })
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(Raised::default()),
            Err(e) => Err(e),
        }
    }

    fn watch_domains(&mut self, yes: bool) -> io::Result<()> {
        if yes {
            self.virq = ioctl(&self.events, BIND_VIRQ, &mut [VIRQ_DOM_EXC])?;
        } else {
            self.unbind(self.virq);
            self.virq = 0;
        }
        Ok(())
    }

    fn connect_dom0(&mut self) -> anyhow::Result<u32> {
        self.map_dom0()?;
        let text = std::fs::read_to_string("/proc/xen/xsd_port")
            .map_err(|e| anyhow::anyhow!("/proc/xen/xsd_port: {e} (is xenfs mounted at /proc/xen?)"))?;
        let port: u32 = text.trim().parse().map_err(|_| anyhow::anyhow!("/proc/xen/xsd_port says {text:?}"))?;
        let local = self.bind(0, port)?;
        self.notify(local);
        Ok(local)
    }

    fn map(&mut self, domid: u16) -> io::Result<()> {
        if domid == 0 {
            return self.map_dom0();
        }
        let mut arg = MapGrant { count: 1, pad: 0, index: 0, domid: domid.into(), reference: GRANT_XENSTORE };
        ioctl(&self.grants, MAP_GRANT, &mut arg)?;
        match RingPage::map(&self.grants, arg.index) {
            Ok(page) => {
                self.rings.insert(domid, Ring { page: Some(page), index: Some(arg.index) });
                Ok(())
            }
            Err(e) => {
                self.give_back(arg.index);
                Err(e)
            }
        }
    }

    fn unmap(&mut self, domid: u16) {
        if let Some(mut r) = self.rings.remove(&domid) {
            drop(r.page.take());
            if let Some(i) = r.index {
                self.give_back(i);
            }
        }
    }

    fn ring(&self, domid: u16) -> Option<&RingPage> {
        self.rings.get(&domid).and_then(|r| r.page.as_ref())
    }

    fn bind(&mut self, domid: u16, remote_port: u32) -> io::Result<u32> {
        ioctl(&self.events, BIND_INTERDOMAIN, &mut [u32::from(domid), remote_port])
    }

    fn remote_port(&self, port: u32) -> Option<u32> {
        match self.host.port_status(DomId(0), port) {
            Ok(Some(PortStatus { state: PortState::Interdomain { remote_port, .. }, .. })) => Some(remote_port),
            Ok(s) => {
                warn!(port, "event channel of a ring is not connected to a domain: {s:?}");
                None
            }
            Err(e) => {
                warn!(port, "the hypervisor does not say what an event channel is connected to: {e}");
                None
            }
        }
    }

    fn unbind(&mut self, port: u32) {
        if port != 0
            && let Err(e) = ioctl(&self.events, UNBIND, &mut [port])
        {
            warn!(port, "event channel can't be unbound: {e}");
        }
    }

    fn notify(&self, port: u32) {
        // A domain that is gone can't be told; its end is noticed by other means.
        let _ = ioctl(&self.events, NOTIFY, &mut [port]);
    }

    fn domain_state(&self, domid: u16) -> Option<DomainState> {
        match self.host.domain_info(DomId(domid)) {
            Ok(i) => Some(DomainState { shutdown: i.shutdown.is_some(), dying: i.dying }),
            Err(e) if e.is_no_such_domain() => None,
            Err(e) => {
                // Better to keep a domain that is gone than to lose one that is not.
                warn!(domid, "the hypervisor does not say how the domain is: {e}");
                Some(DomainState::default())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctl_numbers_are_linuxs() {
        assert_eq!([BIND_VIRQ, BIND_INTERDOMAIN, UNBIND, NOTIFY], [0x44500, 0x84501, 0x44503, 0x44504]);
        assert_eq!([MAP_GRANT, UNMAP_GRANT], [0x0018_4700, 0x0010_4701]);
        assert_eq!((size_of::<MapGrant>(), size_of::<UnmapGrant>()), (24, 16));
    }
}
