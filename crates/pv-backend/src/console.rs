//! The guest's console while the guest is away.
//!
//! xenconsoled stays attached to the ring of a paused guest. It would copy what an operator types into that ring, where
//! it is lost once the ring's page has been captured. It cannot be told to let go of one domain (withdrawing the port
//! makes it use a closed event channel), so it is held at the other end: the terminal's output is stopped, as with
//! Ctrl-S, and what is typed waits there.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use hypervisor::{DomId, Gfn, Hypervisor, PAGE_SIZE};
use rustix::termios::{Action, tcflow};

use crate::device::{Console, Inventory};
use crate::error::{Error, Result};
use crate::machine::Machine;
use crate::source::POLL;
use crate::store::Store;

/// `HVM_PARAM_CONSOLE_PFN` (public/hvm/params.h).
const HVM_PARAM_CONSOLE_PFN: u32 = 17;
/// Offset of `out_cons`, which `out_prod` follows, in `struct xencons_interface` (public/io/console.h): behind `in[1024]`,
/// `out[2048]`, in_cons and in_prod.
const OUT_CONS: usize = 1024 + 2048 + 8;

/// A terminal that is held. It goes on when this is dropped.
#[derive(Debug)]
pub struct Hold {
    tty: File,
}

fn open(tty: &str) -> Result<File> {
    let no_control = rustix::fs::OFlags::NOCTTY.bits() as i32;
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(no_control)
        .open(tty)
        .map_err(|source| Error::Machine { what: format!("open the console's terminal {tty}"), source })
}

fn flow(tty: &File, action: Action) -> Result<()> {
    tcflow(tty, action).map_err(|error| Error::Machine {
        what: "hold or release the console's terminal".to_owned(),
        source: error.into(),
    })
}

/// Holds back what is typed at the console. `None` if it has no terminal.
pub fn hold(console: &Console) -> Result<Option<Hold>> {
    let Some(path) = &console.tty else { return Ok(None) };
    let tty = open(path)?;
    flow(&tty, Action::OOff)?;
    Ok(Some(Hold { tty }))
}

/// Lets a terminal go on that a crashed daemon had held.
pub fn release(console: &Console) -> Result<()> {
    match &console.tty {
        Some(path) => flow(&open(path)?, Action::OOn),
        None => Ok(()),
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Err(error) = flow(&self.tty, Action::OOn) {
            tracing::warn!("{error}; type Ctrl-Q in the console if it seems dead");
        }
    }
}

/// Waits until xenconsoled has fetched what the paused guest had written. False if it has not within `limit` (it limits
/// a guest's rate); then that text appears on both hosts.
pub fn wait_output(machine: &dyn Machine, hypervisor: &dyn Hypervisor, domid: u16, limit: Duration) -> Result<bool> {
    let gfn = hypervisor.hvm_param(DomId(domid), HVM_PARAM_CONSOLE_PFN)?;
    if gfn == 0 {
        return Ok(true);
    }
    let start = machine.now();
    loop {
        let mut page = vec![0; PAGE_SIZE];
        let read = hypervisor.read_pages(DomId(domid), &[Gfn(gfn)], &mut page)?;
        if read.iter().any(|page| page.is_err()) {
            // The guest has given the page away: nobody can read it.
            return Ok(true);
        }
        if page[OUT_CONS..OUT_CONS + 4] == page[OUT_CONS + 4..OUT_CONS + 8] {
            return Ok(true);
        }
        if machine.now() - start >= limit {
            return Ok(false);
        }
        machine.sleep(POLL);
    }
}

/// Makes xenconsoled attach on the destination: it looks at the console's area when its port is written, and at a new domain when one is
/// introduced to the store. After the commit, and before the guest's watches are served: `introduced` says that they are, so that this has
/// been done. A guest without a connection with the store has none, and is never introduced.
pub fn attach(store: &mut dyn Store, inventory: &Inventory, introduced: bool) -> Result<()> {
    match &inventory.console {
        // The terminal's name is the source's; xenconsoled writes its own.
        Some(console) if !introduced => {
            store.write(&format!("{}/port", console.area), console.port.to_string().as_bytes())
        }
        _ => Ok(()),
    }
}
