//! A Xen that consists of files in a folder: which domains there are, the pages they share with the daemon, and their
//! events. `stub.c` is the daemon's side of it and says what each file is.

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::ffi::c_void;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

/// Bytes of a shared page.
pub const PAGE: usize = 4096;
/// The daemon's local port for `VIRQ_DOM_EXC`.
pub const VIRQ_PORT: u32 = 1;
/// The daemon's local port for domain N is this plus N.
pub const PORT_BASE: u32 = 16;

/// What the hypervisor says of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainState {
    Running,
    ShutDown,
    Dying,
}

/// The folder.
#[derive(Debug)]
pub struct FakeXen {
    dir: PathBuf,
    to_daemon: File,
    // Held open so that the daemon's notifications find a reader.
    _from_daemon: File,
}

impl FakeXen {
    /// Makes a Xen with nothing but domain 0.
    ///
    /// # Errors
    /// The folder can't be written.
    pub fn create(dir: &Path) -> Result<FakeXen> {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        fs::write(dir.join("port"), PORT_BASE.to_string()).context("write dom0's port")?;
        for fifo in ["to-daemon", "from-daemon"] {
            rustix::fs::mknodat(
                rustix::fs::CWD,
                dir.join(fifo),
                rustix::fs::FileType::Fifo,
                Mode::RUSR | Mode::WUSR,
                0,
            )
            .with_context(|| format!("make the FIFO {fifo}"))?;
        }
        // Opened for reading and writing so that the order in which the two sides open does not matter.
        let open = |name| -> Result<File> {
            let fd = rustix::fs::open(dir.join(name), OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
                .with_context(|| format!("open the FIFO {name}"))?;
            Ok(File::from(fd))
        };
        let xen = FakeXen { dir: dir.to_path_buf(), to_daemon: open("to-daemon")?, _from_daemon: open("from-daemon")? };
        xen.add_domain(0)?;
        Ok(xen)
    }

    /// The folder, for the daemon's environment (`FAKE_XEN`).
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Creates a running domain with an empty ring page.
    ///
    /// # Errors
    /// The files can't be written.
    pub fn add_domain(&self, domid: u16) -> Result<()> {
        fs::write(self.dir.join(format!("ring-{domid}")), [0; PAGE]).context("write a ring page")?;
        self.set_state(domid, DomainState::Running)
    }

    /// Sets what the hypervisor says of a domain.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn set_state(&self, domid: u16, state: DomainState) -> Result<()> {
        let letter = match state {
            DomainState::Running => "r",
            DomainState::ShutDown => "s",
            DomainState::Dying => "d",
        };
        fs::write(self.dir.join(format!("domain-{domid}")), letter).context("write a domain's state")
    }

    /// Takes a domain away, as if its destruction had ended.
    ///
    /// # Errors
    /// It was not there.
    pub fn remove_domain(&self, domid: u16) -> Result<()> {
        fs::remove_file(self.dir.join(format!("domain-{domid}"))).with_context(|| format!("remove domain {domid}"))
    }

    /// Raises `VIRQ_DOM_EXC`: some domain changed its state.
    ///
    /// # Errors
    /// The FIFO is full.
    pub fn raise_dom_exc(&self) -> Result<()> {
        self.raise(VIRQ_PORT)
    }

    /// Raises a local port of the daemon.
    ///
    /// # Errors
    /// The FIFO is full.
    pub fn raise(&self, port: u32) -> Result<()> {
        (&self.to_daemon).write_all(&port.to_ne_bytes()).with_context(|| format!("raise port {port}"))
    }

    /// Raises a local port that may be pending already; many that wait to be taken stand for that.
    ///
    /// # Errors
    /// As [`FakeXen::raise`].
    pub fn raise_again(&self, port: u32) -> Result<()> {
        let waiting = rustix::io::ioctl_fionread(&self.to_daemon).context("look into the FIFO to-daemon")?;
        if waiting > 1024 { Ok(()) } else { self.raise(port) }
    }

    /// Maps the page that a domain shares with the daemon.
    ///
    /// # Errors
    /// There is no such domain.
    pub fn map_ring(&self, domid: u16) -> Result<SharedPage> {
        SharedPage::open(&self.dir.join(format!("ring-{domid}")))
    }
}

/// A page that somebody else may change at any time.
#[derive(Debug)]
pub struct SharedPage {
    base: *mut c_void,
}

// SAFETY: the mapping belongs to the value, and every access to it is atomic.
unsafe impl Send for SharedPage {}

impl SharedPage {
    fn open(path: &Path) -> Result<SharedPage> {
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .with_context(|| format!("open the ring page {}", path.display()))?;
        // SAFETY: a fresh mapping at a place of the kernel's choice; the file has PAGE bytes and is never cut.
        let base = unsafe {
            mmap(ptr::null_mut(), PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
                .context("map a ring page")?
        };
        Ok(SharedPage { base })
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= PAGE);
        // SAFETY: inside the mapping, aligned, and only accessed atomically here.
        unsafe { AtomicU32::from_ptr(self.base.cast::<u8>().add(offset).cast()) }
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < PAGE);
        // SAFETY: inside the mapping, and only accessed atomically here.
        unsafe { AtomicU8::from_ptr(self.base.cast::<u8>().add(offset)) }
    }

    /// A 32-bit word, with acquire order.
    pub fn load(&self, offset: usize) -> u32 {
        self.word(offset).load(Ordering::SeqCst)
    }

    /// A 32-bit word, with release order.
    pub fn store(&self, offset: usize, value: u32) {
        self.word(offset).store(value, Ordering::SeqCst);
    }

    /// One byte of the rings.
    pub fn load_byte(&self, offset: usize) -> u8 {
        self.byte(offset).load(Ordering::Relaxed)
    }

    /// One byte of the rings.
    pub fn store_byte(&self, offset: usize, value: u8) {
        self.byte(offset).store(value, Ordering::Relaxed);
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `open` with this size, and no reference to it outlives the value.
        // A failure would leave it mapped, which harms nobody.
        let _ = unsafe { munmap(self.base, PAGE) };
    }
}
