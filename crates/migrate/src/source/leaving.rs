//! The two ways out: the guest goes on here, or what is left of it goes.

use super::Run;
use crate::restore::PAUSES;
use crate::trouble::{Doing, Result};
use hypervisor::GtStep;

impl Run {
    /// Whatever was done is undone; all of it can be done again.
    pub(super) fn roll_back(&mut self) -> Result<()> {
        let hv = self.host.hypervisor.clone();
        let dom = self.dom();
        if let Err(error) = self.dirty_log.stop(&*hv, dom) {
            // Off already, or the guest is gone.
            tracing::debug!("{}: {error}", self.title());
        }
        let Some(freeze) = &self.freeze else { return Ok(()) };
        match hv.domain_info(dom) {
            Ok(info) if info.uuid == self.guest.identity.uuid && !info.dying => {}
            // Nothing is left to bring back: the host has been restarted, or an operator has destroyed it.
            Ok(_) => return Ok(()),
            Err(error) if error.is_no_such_domain() => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        self.host.toolstack.unfreeze(&self.guest).doing("connect the backends again")?;
        if !freeze.watchdogs.is_empty() {
            let gt = hypervisor::GtState { watchdogs: freeze.watchdogs.clone(), ..hv.gt_state(dom)? };
            hv.set_gt_state(dom, GtStep::Watchdogs, &gt)?;
        }
        for _ in 0..PAUSES {
            if !hv.domain_info(dom)?.paused {
                break;
            }
            hv.unpause(dom)?;
        }
        self.mark("roll back");
        self.freeze = None;
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
