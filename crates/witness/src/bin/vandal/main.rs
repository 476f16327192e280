//! A guest's init that attacks its host's xenstore over its own ring ([`witness::attack`]). See "The vandal" in `docs/witness.md`.
//!
//! Its kernel must leave the ring alone (`initcall_blacklist=xenbus_init`), so that nothing else reads and writes it. The page is
//! mapped through /dev/mem: it lies in a region that the memory map calls reserved, which even a strict /dev/mem lets through.

#[path = "../witness/boot.rs"]
#[allow(dead_code, reason = "the witness uses the rest")]
mod boot;
#[path = "../witness/xen.rs"]
#[allow(dead_code, reason = "the witness uses the rest")]
mod xen;

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::time::Duration;
use witness::attack::{ATTACKS, Guest, Ring};
use xen_abi::{event, hypercall};

const PAGE: usize = 4096;
/// HVM_PARAM_STORE_PFN and HVM_PARAM_STORE_EVTCHN (xen/include/public/hvm/params.h).
const STORE_PFN: u32 = 1;
const STORE_EVTCHN: u32 = 2;

/// The real ring page.
#[derive(Debug)]
struct Page {
    base: NonNull<u8>,
    port: u32,
    xen: RefCell<xen::Xen>,
}

impl Page {
    fn open() -> Result<Page, String> {
        let mut xen = xen::Xen::open()?;
        let params = xen.hvm_params()?;
        let param = |index| {
            let found = params.iter().find(|p| p.index == index).map(|p| p.value);
            found.filter(|&v| v != 0).ok_or_else(|| format!("HVM parameter {index} is not set"))
        };
        let (gfn, port) = (param(STORE_PFN)?, param(STORE_EVTCHN)?);
        let port = u32::try_from(port).map_err(|_| format!("xenstore's port is {port}"))?;
        let path = "/dev/mem";
        // Cached, as Xen and dom0 map it.
        let memory = File::options().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(path);
        let memory = memory.map_err(|e| format!("{path}: {e}"))?;
        let offset = libc::off_t::try_from(gfn * PAGE as u64).map_err(|_| format!("xenstore's page is {gfn:#x}"))?;
        // SAFETY: a new mapping at an address of the kernel's choice. The frame is the one that this guest shares with
        // xenstored; its kernel does not use it (see the module), and it is accessed atomically only.
        let base = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), PAGE, access, libc::MAP_SHARED, memory.as_raw_fd(), offset)
        };
        if base == libc::MAP_FAILED {
            return Err(format!("{path}: map frame {gfn:#x}: {}", io::Error::last_os_error()));
        }
        let base = NonNull::new(base.cast()).ok_or("mapped at 0")?;
        println!("vandal: xenstore's frame is {gfn:#x}, its port {port}");
        Ok(Page { base, port, xen: RefCell::new(xen) })
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= PAGE);
        // SAFETY: inside the mapping, which is never undone, aligned, and only accessed atomically by this program.
        unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < PAGE);
        // SAFETY: inside the mapping, which is never undone, and only accessed atomically by this program.
        unsafe { AtomicU8::from_ptr(self.base.as_ptr().add(offset)) }
    }
}

impl Ring for Page {
    fn load(&self, offset: usize) -> u32 {
        self.word(offset).load(Ordering::SeqCst)
    }

    fn store(&self, offset: usize, value: u32) {
        self.word(offset).store(value, Ordering::SeqCst);
    }

    fn load_byte(&self, offset: usize) -> u8 {
        self.byte(offset).load(Ordering::Relaxed)
    }

    fn store_byte(&self, offset: usize, value: u8) {
        self.byte(offset).store(value, Ordering::Relaxed);
    }

    fn notify(&self) -> Result<(), String> {
        let mut xen = self.xen.borrow_mut();
        xen.call(hypercall::EVENT_CHANNEL_OP, [event::SEND, 0, 0, 0, 0], 1, self.port)
            .map(drop)
            .map_err(|e| format!("EVTCHNOP_send on port {}: {e}", self.port))
    }
}

/// Settings on the kernel's command line, `vandal.KEY=VALUE`.
struct Settings {
    attacks: Vec<String>,
    /// How often all of them.
    rounds: u64,
    time: Duration,
    seed: u64,
}

impl Settings {
    fn from(line: &str) -> Result<Settings, String> {
        let mut s = Settings { attacks: Vec::new(), rounds: 1, time: Duration::from_secs(10), seed: 1 };
        for (key, value) in line.split_whitespace().filter_map(|w| w.strip_prefix("vandal.")?.split_once('=')) {
            let number = || value.parse::<u64>().map_err(|_| format!("vandal.{key}={value}: not a number"));
            match key {
                "attacks" => s.attacks = value.split(',').map(str::to_owned).collect(),
                "seconds" => s.time = Duration::from_secs(number()?),
                "rounds" => s.rounds = number()?,
                "seed" => s.seed = number()?,
                _ => {
                    return Err(format!(
                        "vandal.{key}: there is no such setting (there is: attacks, rounds, seconds, seed)"
                    ));
                }
            }
        }
        let known = |name: &String| ATTACKS.iter().any(|(attack, _)| attack == name);
        match s.attacks.iter().find(|name| !known(name)) {
            Some(name) => Err(format!("vandal.attacks: there is no {name:?}")),
            None if s.attacks.is_empty() => Err("vandal.attacks is not set".into()),
            None => Ok(s),
        }
    }
}

fn run() -> Result<(), String> {
    boot::mount_all()?;
    for wrong in boot::load_modules(Path::new("/lib/modules")) {
        println!("vandal: {wrong}");
    }
    let line = std::fs::read_to_string("/proc/cmdline").map_err(|e| format!("/proc/cmdline: {e}"))?;
    let settings = Settings::from(&line)?;
    if !line.contains("initcall_blacklist=xenbus_init") {
        return Err("the kernel uses the ring itself; give it initcall_blacklist=xenbus_init".into());
    }
    boot::wait_for("/dev/xen/privcmd", Duration::from_secs(10));
    let mut guest = Guest::new(Page::open()?, settings.seed);
    for _ in 0..settings.rounds {
        for name in &settings.attacks {
            println!("vandal: {name}: begins");
            let seen = guest.attack(name, settings.time).map_err(|e| format!("{name}: {e}"))?;
            println!("vandal: {name}: {seen}");
        }
    }
    Ok(())
}

fn main() {
    if std::process::id() != 1 {
        println!("vandal: a guest's init; it attacks xenstore. Settings on the kernel's command line:");
        println!("vandal.attacks=NAME,… vandal.rounds=N vandal.seconds=N vandal.seed=N; the attacks:");
        for (name, about) in ATTACKS {
            println!("  {name:13} {about}");
        }
        return;
    }
    match run() {
        Ok(()) => println!("vandal: done"),
        Err(e) => println!("vandal: FAILED: {e}"),
    }
    // An init that ends makes the kernel panic; what it left in the store and on the ring is to stay.
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_and_wrong_ones_refused() {
        let s = Settings::from("quiet vandal.attacks=storm,wild vandal.seconds=3 witness.store=1").expect("good");
        assert_eq!((s.attacks, s.time.as_secs()), (vec!["storm".to_owned(), "wild".to_owned()], 3));
        for wrong in ["", "vandal.attacks=", "vandal.attacks=nap", "vandal.attacks=wild vandal.second=1"] {
            assert!(Settings::from(wrong).is_err(), "{wrong}");
        }
    }
}
