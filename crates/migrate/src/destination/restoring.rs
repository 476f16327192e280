//! Making the shell, and putting into it what comes.

use super::Run;
use crate::handshake::{DestinationEvent, DestinationRecord};
use crate::image::Pages;
use crate::placement;
use crate::preflight;
use crate::restore;
use crate::trouble::{Doing, Result, Trouble};
use crate::wire::Piece;
use hypervisor::{DomId, Gfn, PAGE_SIZE};
use std::collections::BTreeSet;

/// Zero pages written at a time, and what is written.
const ZERO_PAGES: usize = 256;
static ZEROES: [u8; ZERO_PAGES * PAGE_SIZE] = [0; ZERO_PAGES * PAGE_SIZE];

impl Run {
    pub(super) fn prepare(&mut self) -> DestinationEvent {
        match self.try_prepare() {
            Ok(None) => DestinationEvent::Prepared,
            Ok(Some(why)) => {
                if !self.offer.as_ref().is_some_and(|offer| offer.dry_run) {
                    tracing::warn!("{}: refused: {}", self.title(), why.join("; "));
                }
                self.why = why;
                DestinationEvent::Unfit
            }
            Err(error) => {
                tracing::warn!("{}: prepare: {error}", self.title());
                self.why.push(format!("prepare: {error}"));
                DestinationEvent::Failed
            }
        }
    }

    fn try_prepare(&mut self) -> Result<Option<Vec<String>>> {
        let offer = self.offer.clone().ok_or_else(|| Trouble::new("there is no offer"))?;
        let why = preflight::destination(&self.host, &offer)?;
        let plan = placement::plan(&self.host, &offer).doing("see where it may run here")?;
        self.warnings = preflight::remarks(&self.host.hypervisor.host_info()?, &offer);
        self.warnings.extend(plan.warnings.iter().cloned());
        if !why.is_empty() || offer.dry_run {
            return Ok(Some(why));
        }
        let dom = offer.identity.domid;
        // From here on the domain under this id is ours to destroy: the preflight has seen that there was none.
        self.shell_is_ours = true;
        let begin = self.begin()?;
        self.append(DestinationRecord::Begin, &begin)?;
        if let Err(error) = restore::make_shell(&*self.host.hypervisor, dom, &offer.shell, plan.pool) {
            // Somebody else was quicker.
            if let Ok(info) = self.host.hypervisor.domain_info(dom)
                && info.uuid != offer.identity.uuid
            {
                self.shell_is_ours = false;
            }
            return Err(error);
        }
        self.warnings.extend(placement::apply(&*self.host.hypervisor, dom, &plan));
        self.populated = crate::guest::gfns(&offer.shell.ram).collect();
        self.host.toolstack.prepare(&offer).doing("make its nodes and devices")?;
        Ok(None)
    }

    pub(super) fn receive(&mut self, piece: Piece) -> Result<()> {
        self.digest.add(piece.crc, piece.bytes.len());
        let hv = self.host.hypervisor.clone();
        let dom = self.offer.as_ref().map(|o| o.identity.domid).ok_or_else(|| Trouble::new("there is no offer"))?;
        let populated = &mut self.populated;
        self.reader.feed(piece.bytes, |pages| write_pages(&*hv, dom, populated, pages))
    }

    pub(super) fn restore(&mut self) -> Result<()> {
        let hv = self.host.hypervisor.clone();
        let offer = self.offer.clone().ok_or_else(|| Trouble::new("there is no offer"))?;
        let dom = offer.identity.domid;
        let (state, luggage) = std::mem::take(&mut self.reader).finish(&offer.identity)?;
        // Memory that was offered and never sent: the guest gave it up during the copying.
        self.timeline.mark("check the image");
        restore::platform(&*hv, dom, &state).doing("set event channels, grant table and parameters")?;
        self.timeline.mark("set event channels, grant table and parameters");
        restore::processors(&*hv, dom, &state).doing("set the vCPUs")?;
        self.timeline.mark("set the vCPUs");
        self.host.toolstack.unpack(&offer, &luggage).doing("import the store")?;
        self.timeline.mark("import the store");
        self.restored = Some((state, luggage));
        Ok(())
    }
}

/// Puts pages into the shell; memory that the guest has got meanwhile is made, what it has given up is taken.
fn write_pages(
    hv: &dyn hypervisor::Hypervisor,
    dom: DomId,
    populated: &mut BTreeSet<Gfn>,
    pages: Pages<'_>,
) -> Result<()> {
    let there = pages.with_data.iter().chain(&pages.zero).copied();
    let new: Vec<Gfn> = there.filter(|gfn| !populated.contains(gfn)).collect();
    if !new.is_empty() {
        hv.populate(dom, &new, 0).doing("make room for memory that the guest got meanwhile")?;
        populated.extend(new);
    }
    write(hv, dom, &pages.with_data, pages.data)?;
    for gfns in pages.zero.chunks(ZERO_PAGES) {
        write(hv, dom, gfns, &ZEROES[..gfns.len() * PAGE_SIZE])?;
    }
    let gone: Vec<Gfn> = pages.gone.into_iter().filter(|gfn| populated.remove(gfn)).collect();
    if !gone.is_empty() {
        hv.depopulate(dom, &gone)?;
    }
    Ok(())
}

fn write(hv: &dyn hypervisor::Hypervisor, dom: DomId, gfns: &[Gfn], data: &[u8]) -> Result<()> {
    if gfns.is_empty() {
        return Ok(());
    }
    for (gfn, written) in gfns.iter().zip(hv.write_pages(dom, gfns, data)?) {
        written.map_err(|errno| Trouble::new(format!("write page {gfn}: {errno}")))?;
    }
    Ok(())
}
