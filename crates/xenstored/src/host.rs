//! What the store needs from the host it runs on.

use xenstore_wire::Errno;

/// What the hypervisor says about a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DomainState {
    /// It shut down or crashed.
    pub shutdown: bool,
    /// It is being torn down.
    pub dying: bool,
}

/// Commands of `xenstore-control` that reach beyond the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostCommand<'a> {
    /// Trace requests, or stop it.
    Log(bool),
    /// Trace to another file.
    LogFile(&'a [u8]),
    /// Append a report to a file, or to the log.
    Report(Option<&'a [u8]>, &'a str),
    /// Say something in the log.
    Print(&'a [u8]),
    /// `EINVAL`: no program that can be executed. Other errors: it is not there, or out of reach.
    CheckProgram(&'a [u8]),
}

/// Hypervisor, rings and clock. The daemon has one over real Xen and one without; tests and the simulator have others.
pub trait Host {
    /// `None` if there is no such domain.
    fn domain_state(&mut self, domid: u16) -> Option<DomainState>;

    /// Maps the domain's ring page (grant reference 1) and binds its port. The local port.
    ///
    /// # Errors
    /// As they go to the caller of `INTRODUCE`.
    fn connect(&mut self, domid: u16, remote_port: u32) -> Result<u32, Errno>;

    /// Takes over a ring from the daemon before us: maps the page; `local_port` is bound already. The domain's own port, 0 if
    /// that can't be found out.
    ///
    /// # Errors
    /// The page can't be mapped (the domain may have revoked it). The port is released by `disconnect`.
    fn adopt(&mut self, domid: u16, local_port: u32) -> Result<u32, Errno>;

    /// Binds another port of a connected domain instead of the old one. The local port.
    ///
    /// # Errors
    /// The port can't be bound; the old one is gone all the same.
    fn rebind(&mut self, domid: u16, local_port: u32, remote_port: u32) -> Result<u32, Errno>;

    /// Unmaps and unbinds.
    fn disconnect(&mut self, domid: u16, local_port: u32);

    /// Sets the four ring indexes to 0, and ends a reconnection that the guest may be waiting for.
    fn reset_ring(&mut self, domid: u16);

    /// Writes the ring page's error field.
    fn set_ring_error(&mut self, domid: u16, error: u32);

    /// The ring page's feature field; `None` if the domain is not connected.
    fn ring_features(&mut self, domid: u16) -> Option<u32>;

    /// Carries out a `CONTROL` command that is about the daemon's surroundings.
    ///
    /// # Errors
    /// As they go to the caller.
    fn command(&mut self, command: HostCommand<'_>) -> Result<(), Errno>;

    /// Milliseconds on a clock that does not go back.
    fn now_ms(&self) -> u64;
}
