//! After `Go`: connecting and starting the guest; or removing what was made for it.

use super::Run;
use crate::restore::{self, PAUSES};
use crate::silence::Ear;
use crate::trouble::{Doing, Result, Trouble};
use hypervisor::GtPortKind;
use std::time::Instant;

impl Run {
    pub(super) fn connect(&mut self) -> Result<()> {
        let hv = self.host.hypervisor.clone();
        let offer = self.offer.clone().ok_or_else(|| Trouble::new("there is no offer"))?;
        let dom = offer.identity.domid;
        let Some((state, luggage)) = &self.restored else { return Err(Trouble::new("nothing was restored")) };
        // Its number may be another guest's since this host was restarted, whose devices and clocks are not ours to touch.
        match hv.domain_info(dom) {
            Ok(info) if info.uuid == offer.identity.uuid && info.paused && !info.dying => {}
            Ok(info) if info.uuid == offer.identity.uuid => {
                return Err(Trouble::new("the shell that waited for it has been unpaused or destroyed meanwhile"));
            }
            Ok(_) => return Err(Trouble::new(format!("domid {dom} belongs to another guest here now"))),
            Err(error) if error.is_no_such_domain() => {
                return Err(Trouble::new(
                    "the shell with its memory is gone; this host has been restarted, or somebody destroyed it",
                ));
            }
            Err(error) => return Err(error.into()),
        }
        self.host.toolstack.go(&offer, luggage).doing("connect the backends")?;
        self.timeline.mark("connect backends, store and console");
        for port in &state.gt.ports {
            // Events that the backend sent into the void while it was away; one too many is allowed. Within the guest none was lost.
            if matches!(port.kind, GtPortKind::Interdomain { remote, .. } | GtPortKind::Unbound { remote } if remote != dom)
                && let Err(error) = hv.raise_guest_port(dom, port.port)
            {
                tracing::debug!("{}: raise port {}: {error}", self.title(), port.port);
            }
        }
        self.timeline.mark("raise the guest's ports");
        restore::clocks(&*hv, dom, state, self.away).doing("set the clocks")?;
        self.timeline.mark("set the clocks");
        Ok(())
    }

    pub(super) fn start(&mut self) -> Result<()> {
        let hv = self.host.hypervisor.clone();
        let offer = self.offer.clone().ok_or_else(|| Trouble::new("there is no offer"))?;
        let dom = offer.identity.domid;
        let gt = self.restored.as_ref().map(|(state, _)| state.gt.clone()).unwrap_or_default();
        match hv.domain_info(dom) {
            Ok(info) if info.uuid == offer.identity.uuid => {
                if info.paused {
                    restore::watchdogs(&*hv, dom, &gt)?;
                }
            }
            // It was started before this host was restarted, or has ended since: there is nothing to start any more.
            Ok(_) => return Ok(()),
            Err(error) if error.is_no_such_domain() => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        // A guest that can't be listened to starts all the same.
        let ear = if self.talks { self.host.toolstack.packets(&offer.toolstack).ok().map(Ear::new) } else { None };
        let mut unpaused = Instant::now();
        for _ in 0..PAUSES {
            if hv.domain_info(dom)?.paused {
                // The last of these counts: from then on the guest may run.
                self.blackout_ns = self.away.at(hv.now()?);
                hv.unpause(dom)?;
                unpaused = Instant::now();
            }
        }
        self.timeline.mark("unpause");
        if let Err(error) = self.host.toolstack.announce(&offer) {
            tracing::warn!("{}: announce: {error}", self.title());
        }
        self.first_packet = ear.and_then(|mut ear| ear.wait(unpaused));
        Ok(())
    }

    pub(super) fn discard(&mut self) -> Result<()> {
        let Some(offer) = self.offer.clone() else { return Ok(()) };
        if !self.shell_is_ours {
            return Ok(());
        }
        let hv = &*self.host.hypervisor;
        let dom = offer.identity.domid;
        let there = match hv.domain_info(dom) {
            Ok(info) if info.uuid == offer.identity.uuid => true,
            // This host was restarted, and the number is another guest's now: so are nodes and devices of that number.
            Ok(info) => {
                tracing::warn!("{}: domid {dom} is that of {} now; nothing is removed", self.title(), info.uuid);
                return Ok(());
            }
            Err(error) if error.is_no_such_domain() => false,
            Err(error) => return Err(error.into()),
        };
        self.host.toolstack.discard(&offer).doing("remove its nodes and devices")?;
        if there {
            hv.destroy(dom)?;
        }
        Ok(())
    }
}
