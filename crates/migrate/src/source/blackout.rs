//! From the pause until everything is sent.

use super::copying::LISTEN_EVERY;
use super::records::Freeze;
use super::{BATCH, Run};
use crate::capture;
use crate::handshake::SourceRecord;
use crate::image;
use crate::report::{Ending, Place, Timeline};
use crate::restore::PAUSES;
use crate::trouble::{Doing, Result, Trouble};
use hypervisor::{DirtyBitmap, Gfn, GtStep, PAGE_SIZE, PageType};
use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

/// How long dom0 rests before the pause. Copying keeps dom0's CPU busy, and a guest that shares it waits for its turn and for its packets to
/// be carried out. Paused then, it would have been silent for longer than its blackout.
const BREATH: Duration = Duration::from_millis(20);

/// Only a write that is stuck is ended by closing the connection: where the limit is just missed, what looks at the limit says so.
const STUCK: Duration = Duration::from_secs(1);

impl Run {
    pub(super) fn freeze(&mut self) -> Result<()> {
        let hv = self.host.hypervisor.clone();
        let dom = self.dom();
        let rested = Instant::now();
        while rested.elapsed() < BREATH {
            thread::sleep(LISTEN_EVERY);
            self.listen();
        }
        self.look_at_size()?;
        // The pages that Xen writes to by itself are found before the pause; what changes until then is found after it again.
        if hv.domain_info(dom)?.paused {
            return Err(Trouble::new("somebody has paused it while its memory was copied"));
        }
        // A peer that takes nothing more holds up the sending for half a minute else.
        let most = self.precopy.until_restored(self.host.timeouts.ready) + STUCK;
        let fuse = self.link.as_ref().map(|link| link.close_after(most)).transpose()?;
        let timeline = self.timeline.insert(Timeline::start(Place::Source));
        self.freeze = Some(Freeze::default());
        for _ in 0..PAUSES {
            hv.pause(dom)?;
        }
        timeline.mark("pause");
        // What it sent last is on its way now.
        self.listen();
        self.silent_before = self.ear.take().and_then(|ear| ear.silent_for());
        let before = hv.gt_state(dom)?;
        self.paused_at_ns = u64::try_from(before.host_now_ns).unwrap_or(0);
        self.freeze = Some(Freeze { watchdogs: before.watchdogs.clone(), paused_at_ns: self.paused_at_ns });
        if !before.watchdogs.is_empty() {
            self.write_journal(SourceRecord::Freeze)?;
            let disarmed = hypervisor::GtState { watchdogs: Vec::new(), ..before.clone() };
            hv.set_gt_state(dom, GtStep::Watchdogs, &disarmed)?;
        }
        self.still_whole()?;
        self.look_at_size()?;
        if self.resized {
            return Err(Trouble::new("its memory changed in size just before the pause")
                .todo("try again when its balloon rests"));
        }
        self.mark("read clocks, disarm watchdogs");
        self.host.toolstack.freeze(&self.guest).doing("freeze the store and console")?;
        self.mark("freeze the store and console");
        self.host.toolstack.detach(&self.guest).doing("drain the backends")?;
        self.mark("drain the backends");

        let mut bitmap = self.bitmap()?;
        self.dirty_log.take(&*hv, dom, &mut bitmap, true)?;
        let mut state = capture::state(&*hv, dom, before.guest_now_ns(), self.paused_at_ns)?;
        state.gt.watchdogs = before.watchdogs;
        capture::unmarked_pages(&state.params, &state.gt).into_iter().for_each(|gfn| {
            bitmap.insert(gfn);
        });
        let last = self.last_pages(&bitmap)?;
        self.mark("capture the hypervisor's state");
        if let Some(why) = self.precopy.too_late(self.away(), last.len() as u64) {
            self.ending = Ending::GivenUp;
            return Err(Trouble::new(why));
        }
        self.precopy.begin_round();
        self.send_pages(&last)?;
        self.precopy.end_round(0);
        self.mark("send the last pages");
        let luggage = self.host.toolstack.pack(&self.guest).doing("read the guest's part of the store")?;
        self.mark("export the store");
        image::write_tail(&mut self.encoder, &state, &luggage);
        self.state = Some(state);
        self.flush()?;
        self.fuse = fuse;
        Ok(())
    }

    /// Nothing but its own vCPUs and watchdogs can shut the guest down, and they stand still now. One that shut down while its memory was
    /// copied must stay: its toolstack is about to start it anew here, and on the other host it would go on as if it had not.
    fn still_whole(&self) -> Result<()> {
        let info = self.host.hypervisor.domain_info(self.dom())?;
        if info.uuid != self.guest.identity.uuid || info.dying {
            return Err(Trouble::new("it has been destroyed while its memory was copied"));
        }
        if info.max_pages.saturating_mul(PAGE_SIZE as u64 / 1024) != self.offer.shell.max_mem_kib {
            // The other host's copy has the old one, and the guest's balloon would meet it.
            return Err(Trouble::new(
                "its memory limit was changed while its memory was copied (xl mem-set or mem-max)",
            )
            .todo("try again"));
        }
        match info.shutdown {
            Some(reason) => Err(Trouble::new(format!("it shut down while its memory was copied (reason {reason})"))),
            None => Ok(()),
        }
    }

    /// The last look before the commit: what others may have done to it while the other host restored it.
    pub(super) fn still_held(&self) -> Result<()> {
        match self.host.hypervisor.domain_info(self.dom()) {
            Err(error) if error.is_no_such_domain() => {
                return Err(Trouble::new("it has been destroyed while it was being moved"));
            }
            Err(error) => return Err(error).doing("look at it before the commit"),
            Ok(info) if !info.paused && info.uuid == self.guest.identity.uuid => {
                return Err(Trouble::new("somebody has unpaused it again and again, and it has run on")
                    .todo("let it be until the move is over"));
            }
            Ok(_) => {}
        }
        self.still_whole()
    }

    /// The dirty pages that are memory, and every page that is known on one side only.
    fn last_pages(&mut self, bitmap: &DirtyBitmap) -> Result<Vec<Gfn>> {
        let dirty: Vec<Gfn> = bitmap.iter().collect();
        let mut pages = BTreeSet::new();
        for batch in dirty.chunks(BATCH) {
            let types = self.host.hypervisor.page_types(self.dom(), batch)?;
            pages.extend(
                batch
                    .iter()
                    .zip(types)
                    .filter(|(gfn, kind)| *kind == PageType::Ram || self.known.contains(gfn))
                    .map(|(gfn, _)| *gfn),
            );
        }
        if self.host.hypervisor.domain_info(self.dom())?.total_pages != self.offer.shell.total_pages {
            // It has ballooned: find what came and went.
            let now: BTreeSet<Gfn> = self.host.hypervisor.ram_gfns(self.dom())?.into_iter().collect();
            pages.extend(now.symmetric_difference(&self.known));
        }
        Ok(pages.into_iter().collect())
    }

    pub(super) fn mark(&mut self, step: &str) {
        if let Some(timeline) = &mut self.timeline {
            timeline.mark(step);
        }
    }
}
