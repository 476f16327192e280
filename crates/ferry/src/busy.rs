//! Which guests somebody is at work on: a guest's log-dirty can serve only one, and a second would take pages from the first unseen.

use hypervisor::DomId;
use migrate::{Result, Trouble};
use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
pub struct Busy(Mutex<BTreeSet<DomId>>);

/// Until it is dropped, nobody else gets this guest.
#[derive(Debug)]
pub struct Hold<'a> {
    busy: &'a Busy,
    dom: DomId,
}

impl Busy {
    pub fn hold(&self, dom: DomId) -> Result<Hold<'_>> {
        if self.set().insert(dom) {
            return Ok(Hold { busy: self, dom });
        }
        Err(Trouble::new("another migration or dry run of it is just beginning").todo("try again when that is over"))
    }

    fn set(&self) -> MutexGuard<'_, BTreeSet<DomId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.busy.set().remove(&self.dom);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_held_once_until_the_hold_ends() {
        let busy = Busy::default();
        let hold = busy.hold(DomId(5)).unwrap();
        assert!(busy.hold(DomId(5)).unwrap_err().to_string().contains("just beginning"));
        let _other = busy.hold(DomId(6)).unwrap();
        drop(hold);
        busy.hold(DomId(5)).unwrap();
    }
}
