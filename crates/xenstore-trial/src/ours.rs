//! Our daemon on a [`FakeXen`](crate::FakeXen): its devices made of the same files that `stub.c` makes the stock one's of.

use crate::fake_xen::{PORT_BASE, VIRQ_PORT};
use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use xenstored::DomainState;
use xenstored::daemon::Devices;
use xenstored::daemon::devices::Raised;
use xenstored::daemon::ring::RingPage;

/// See the module.
#[derive(Debug)]
pub struct Files {
    dir: PathBuf,
    events: File,
    rings: BTreeMap<u16, RingPage>,
}

impl Files {
    /// Opens the folder; `events` is the FIFO of the daemon before.
    ///
    /// # Errors
    /// It is none.
    pub fn open(dir: &Path, events: Option<OwnedFd>) -> Result<Files> {
        let events = match events {
            Some(fd) => fd,
            None => rustix::fs::open(
                dir.join("to-daemon"),
                OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .context("open the FIFO to-daemon")?,
        };
        rustix::io::ioctl_fionbio(&events, true).context("the FIFO to-daemon")?;
        Ok(Files { dir: dir.to_path_buf(), events: events.into(), rings: BTreeMap::new() })
    }
}

impl Devices for Files {
    fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    fn raised(&mut self) -> io::Result<Raised> {
        let mut buf = [0; 1024];
        let n = match self.events.read(&mut buf) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => 0,
            r => r?,
        };
        let ports = buf[..n].chunks_exact(4).map(|c| u32::from_ne_bytes([c[0], c[1], c[2], c[3]]));
        let (virq, ports): (Vec<u32>, Vec<u32>) = ports.partition(|&p| p == VIRQ_PORT);
        Ok(Raised { domain_exception: !virq.is_empty(), ports })
    }

    fn watch_domains(&mut self, _yes: bool) -> io::Result<()> {
        Ok(())
    }

    fn connect_dom0(&mut self) -> Result<u32> {
        self.map(0)?;
        Ok(self.bind(0, 0)?)
    }

    fn map(&mut self, domid: u16) -> io::Result<()> {
        let file = File::options().read(true).write(true).open(self.dir.join(format!("ring-{domid}")))?;
        self.rings.insert(domid, RingPage::map(&file, 0)?);
        Ok(())
    }

    fn unmap(&mut self, domid: u16) {
        self.rings.remove(&domid);
    }

    fn ring(&self, domid: u16) -> Option<&RingPage> {
        self.rings.get(&domid)
    }

    fn bind(&mut self, domid: u16, _remote_port: u32) -> io::Result<u32> {
        Ok(PORT_BASE + u32::from(domid))
    }

    fn remote_port(&self, _port: u32) -> Option<u32> {
        Some(0)
    }

    fn unbind(&mut self, _port: u32) {}

    fn notify(&self, _port: u32) {
        // Guests of the trial look at their rings by themselves.
    }

    fn domain_state(&self, domid: u16) -> Option<DomainState> {
        let letter = fs::read(self.dir.join(format!("domain-{domid}"))).ok()?;
        Some(DomainState { shutdown: letter.first() == Some(&b's'), dying: letter.first() == Some(&b'd') })
    }
}
