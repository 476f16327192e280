//! The two ways out: the guest goes on here, or what is left of it goes.

use super::Run;
use crate::restore::PAUSES;
use crate::trouble::{Doing, Result};
use hypervisor::{GtStep, Watchdog};

impl Run {
    /// Whatever was done is undone; all of it can be done again.
    pub(super) fn roll_back(&mut self) -> Result<()> {
        let hv = self.host.hypervisor.clone();
        let dom = self.dom();
        let toolstack = self.host.toolstack.clone();
        if let Err(error) = self.dirty_log.stop(&*hv, dom, &|| toolstack.alone(dom)) {
            // Others' by now, or the guest is gone.
            tracing::debug!("{}: {error}", self.title());
        }
        let Some(freeze) = &self.freeze else { return Ok(()) };
        match hv.domain_info(dom) {
            Ok(info) if info.uuid == self.guest.identity.uuid && !info.dying => {}
            // Nothing is left to bring back: the host has been restarted, or an operator has destroyed it.
            Ok(_) => return self.host.toolstack.abandon(&self.guest),
            Err(error) if error.is_no_such_domain() => return self.host.toolstack.abandon(&self.guest),
            Err(error) => return Err(error.into()),
        }
        let unfrozen = self.host.toolstack.unfreeze(&self.guest).doing("connect the backends again");
        if unfrozen.is_err() && self.host.toolstack.is_detached(&self.guest) {
            return unfrozen;
        }
        // With its backends as they were it can run, even if the store does not answer anybody, and so not the guest.
        if !self.runs_again {
            self.let_run(&freeze.watchdogs)?;
            self.runs_again = true;
        }
        unfrozen?;
        self.mark("roll back");
        self.freeze = None;
        Ok(())
    }

    fn let_run(&self, watchdogs: &[Watchdog]) -> Result<()> {
        let hv = &*self.host.hypervisor;
        let dom = self.dom();
        if !watchdogs.is_empty() {
            // Somebody else may have unpaused it, and they can be set only while it is paused.
            hv.pause(dom)?;
            let armed = hv.gt_state(dom).and_then(|gt| {
                hv.set_gt_state(dom, GtStep::Watchdogs, &hypervisor::GtState { watchdogs: watchdogs.to_vec(), ..gt })
            });
            hv.unpause(dom)?;
            armed?;
        }
        for _ in 0..PAUSES {
            if !hv.domain_info(dom)?.paused {
                break;
            }
            hv.unpause(dom)?;
        }
        Ok(())
    }

    pub(super) fn destroy(&mut self) -> Result<()> {
        let dom = self.dom();
        match self.host.hypervisor.domain_info(dom) {
            Ok(info) if info.uuid == self.guest.identity.uuid => self.host.hypervisor.destroy(dom)?,
            // If this is done again after a restart of the host, the number may be another guest's, and so are the nodes and devices
            // of that number.
            Ok(info) => {
                tracing::warn!("{}: its domid is that of {} now; nothing is removed", self.title(), info.uuid);
                return Ok(());
            }
            Err(error) if error.is_no_such_domain() => {}
            Err(error) => return Err(error.into()),
        }
        self.host.toolstack.forget(&self.guest).doing("remove its nodes and devices")
    }
}
