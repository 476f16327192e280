//! The daemon's [`Host`]: real Xen, or a plain machine where there are only sockets.

use super::devices::{Devices, wire_errno};
use super::log::Log;
use super::ring::RingPage;
use crate::host::{DomainState, Host, HostCommand};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Instant;
use tracing::{info, warn};
use xenstore_wire::{DOMID_FIRST_RESERVED, Errno};

/// See the module.
#[derive(Debug)]
pub struct Machine {
    /// `None` on a plain machine.
    pub xen: Option<Box<dyn Devices>>,
    /// The log.
    pub log: Log,
    /// Local ports and their domains.
    ports: BTreeMap<u32, u16>,
    /// Domains whose rings want a look.
    pub ready: BTreeSet<u16>,
    /// Domains whose requests wait for something else than their event channel: a rate, a quota.
    pub stalled: BTreeSet<u16>,
    /// Domains whose rings are to be emptied, once the journal says so.
    resets: BTreeSet<u16>,
    start: Instant,
}

impl Machine {
    /// A machine, without any connection yet.
    pub fn new(xen: Option<Box<dyn Devices>>, log: Log) -> Machine {
        Machine {
            xen,
            log,
            ports: BTreeMap::new(),
            ready: BTreeSet::new(),
            stalled: BTreeSet::new(),
            resets: BTreeSet::new(),
            start: Instant::now(),
        }
    }

    /// Which domain a local port belongs to.
    pub fn domain_of(&self, port: u32) -> Option<u16> {
        self.ports.get(&port).copied()
    }

    /// A domain's ring page, and a way to tell it.
    pub fn ring(&self, domid: u16) -> Option<&RingPage> {
        self.xen.as_ref().and_then(|x| x.ring(domid))
    }

    /// Tells the other side of a port.
    pub fn notify(&self, port: u32) {
        if let Some(x) = &self.xen {
            x.notify(port);
        }
    }

    /// Whether a domain's ring is to be emptied.
    pub fn has_reset(&self, domid: u16) -> bool {
        self.resets.contains(&domid)
    }

    /// Domains whose rings are to be emptied.
    pub fn resets(&self) -> Vec<u16> {
        self.resets.iter().copied().collect()
    }

    /// Empties the rings that are to be.
    pub fn do_resets(&mut self) {
        for domid in std::mem::take(&mut self.resets) {
            if let Some(x) = &self.xen
                && x.ring(domid).is_some_and(RingPage::reset)
                && let Some((port, _)) = self.ports.iter().find(|(_, d)| **d == domid)
            {
                x.notify(*port);
            }
        }
    }

    /// Tells every domain: something may have happened that it was not told of.
    pub fn notify_all(&self) {
        for port in self.ports.keys() {
            self.notify(*port);
        }
    }

    /// Connects dom0's own ring. The local port.
    ///
    /// # Errors
    /// This is no dom0.
    pub fn connect_dom0(&mut self) -> anyhow::Result<u32> {
        let x = self.xen.as_mut().ok_or_else(|| anyhow::anyhow!("no Xen"))?;
        let port = x.connect_dom0()?;
        self.ports.insert(port, 0);
        self.ready.insert(0);
        Ok(port)
    }

    /// Nanoseconds since the start.
    pub fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }
}

impl Host for Machine {
    fn domain_state(&mut self, domid: u16) -> Option<DomainState> {
        match &self.xen {
            Some(x) => x.domain_state(domid),
            // Nobody can say: permissions may name any domain.
            None => (domid < DOMID_FIRST_RESERVED).then_some(DomainState::default()),
        }
    }

    fn connect(&mut self, domid: u16, remote_port: u32) -> Result<u32, Errno> {
        let x = self.xen.as_mut().ok_or(Errno::ENOSYS)?;
        x.map(domid).map_err(|e| {
            warn!(domid, "its ring page can't be mapped: {e}");
            wire_errno(&e)
        })?;
        match x.bind(domid, remote_port) {
            Ok(port) => {
                self.ports.insert(port, domid);
                self.ready.insert(domid);
                Ok(port)
            }
            Err(e) => {
                warn!(domid, port = remote_port, "its event channel can't be bound: {e}");
                x.unmap(domid);
                Err(wire_errno(&e))
            }
        }
    }

    fn adopt(&mut self, domid: u16, local_port: u32) -> Result<u32, Errno> {
        let x = self.xen.as_mut().ok_or(Errno::ENOSYS)?;
        if local_port == 0 {
            return Err(Errno::EIO);
        }
        self.ports.insert(local_port, domid);
        self.ready.insert(domid);
        x.map(domid).map_err(|e| wire_errno(&e))?;
        Ok(x.remote_port(local_port).unwrap_or(0))
    }

    fn rebind(&mut self, domid: u16, local_port: u32, remote_port: u32) -> Result<u32, Errno> {
        let x = self.xen.as_mut().ok_or(Errno::ENOSYS)?;
        x.unbind(local_port);
        self.ports.remove(&local_port);
        let port = x.bind(domid, remote_port).map_err(|e| {
            warn!(domid, port = remote_port, "its event channel can't be bound: {e}");
            wire_errno(&e)
        })?;
        self.ports.insert(port, domid);
        self.ready.insert(domid);
        Ok(port)
    }

    fn disconnect(&mut self, domid: u16, local_port: u32) {
        self.ports.remove(&local_port);
        self.ready.remove(&domid);
        self.stalled.remove(&domid);
        self.resets.remove(&domid);
        if let Some(x) = &mut self.xen {
            x.unbind(local_port);
            x.unmap(domid);
        }
    }

    fn reset_ring(&mut self, domid: u16) {
        self.resets.insert(domid);
    }

    fn set_ring_error(&mut self, domid: u16, error: u32) {
        if let Some(r) = self.ring(domid) {
            r.set_error(error);
        }
    }

    fn ring_features(&mut self, domid: u16) -> Option<u32> {
        self.ring(domid).map(RingPage::features)
    }

    fn command(&mut self, command: HostCommand<'_>) -> Result<(), Errno> {
        let path = |b| Path::new(OsStr::from_bytes(b));
        match command {
            HostCommand::Log(on) => self.log.trace(on),
            HostCommand::LogFile(f) => self.log.switch(path(f)).map_err(|e| wire_errno(&e))?,
            HostCommand::Report(None, text) => self.log.raw(text),
            HostCommand::Report(Some(f), text) => {
                let mut file =
                    std::fs::File::options().append(true).create(true).open(path(f)).map_err(|e| wire_errno(&e))?;
                file.write_all(text.as_bytes()).map_err(|e| wire_errno(&e))?;
            }
            HostCommand::Print(s) => info!("control: {}", String::from_utf8_lossy(s)),
            HostCommand::CheckProgram(f) => {
                let m = std::fs::metadata(path(f)).map_err(|e| wire_errno(&e))?;
                if !m.is_file() || m.permissions().mode() & 0o111 == 0 {
                    return Err(Errno::EINVAL);
                }
            }
        }
        Ok(())
    }

    fn now_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }
}
