//! What the daemon needs of Xen's devices: [`super::xen`] is the real one, trials have others.

use super::ring::RingPage;
use crate::host::DomainState;
use std::io;
use std::os::fd::BorrowedFd;
use xenstore_wire::Errno;

/// What happened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Raised {
    /// Local ports that were raised.
    pub ports: Vec<u32>,
    /// `VIRQ_DOM_EXC`: a domain shut down, died, or is gone.
    pub domain_exception: bool,
}

/// Event channels, shared pages, and what the hypervisor says of domains.
pub trait Devices: std::fmt::Debug {
    /// Readable when something was raised; handed on to the next daemon at a live update.
    fn events(&self) -> BorrowedFd<'_>;

    /// What was raised since the last call; it can be raised again from now on.
    ///
    /// # Errors
    /// The device is broken.
    fn raised(&mut self) -> io::Result<Raised>;

    /// Looks out for `VIRQ_DOM_EXC`, or leaves that to the next daemon.
    ///
    /// # Errors
    /// As the kernel says.
    fn watch_domains(&mut self, yes: bool) -> io::Result<()>;

    /// Maps dom0's own page, binds its port and raises it. The local port.
    ///
    /// # Errors
    /// The kernel has none: this is not dom0.
    fn connect_dom0(&mut self) -> anyhow::Result<u32>;

    /// Maps a domain's page.
    ///
    /// # Errors
    /// The domain does not grant it.
    fn map(&mut self, domid: u16) -> io::Result<()>;

    /// Unmaps it.
    fn unmap(&mut self, domid: u16);

    /// The page, if it is mapped.
    fn ring(&self, domid: u16) -> Option<&RingPage>;

    /// Binds a port of a domain. The local port.
    ///
    /// # Errors
    /// As the kernel says.
    fn bind(&mut self, domid: u16, remote_port: u32) -> io::Result<u32>;

    /// The domain's port that a local one is connected to.
    fn remote_port(&self, port: u32) -> Option<u32>;

    /// Unbinds a local port.
    fn unbind(&mut self, port: u32);

    /// Raises the other side of a local port.
    fn notify(&self, port: u32);

    /// What the hypervisor says of a domain; `None`: there is none.
    fn domain_state(&self, domid: u16) -> Option<DomainState>;
}

/// The kernel's error as one that goes over the wire.
pub fn wire_errno(e: &io::Error) -> Errno {
    let n = e.raw_os_error().unwrap_or(0);
    Errno::ALL.iter().copied().find(|w| w.number() == n).unwrap_or(Errno::EIO)
}
