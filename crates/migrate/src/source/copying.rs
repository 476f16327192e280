//! Copying the memory of a guest that runs, and sending pages at all.

use super::{BATCH, MAX_RESIZES, Run};
use crate::guest::gfns;
use crate::image;
use crate::precopy::{Judgement, Precopy};
use crate::preflight;
use crate::report::{Ending, millis};
use crate::silence::Ear;
use crate::trouble::{Doing, Result, Trouble};
use hypervisor::{DirtyBitmap, Gfn, PAGE_SIZE, PageType};
use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

/// How long the last round may take to arrive, and how often it is looked whether it has.
const DRY_LIMIT: Duration = Duration::from_secs(1);
const DRY_POLL: Duration = Duration::from_millis(1);
/// So many times packets must have come from a guest that is awake, and so long that is waited for.
const AWAKE: u32 = 2;
const WAKE_LIMIT: Duration = Duration::from_millis(300);
/// How often it is looked whether packets have come.
pub(super) const LISTEN_EVERY: Duration = Duration::from_millis(2);

impl Run {
    pub(super) fn precopy(&mut self) -> Result<()> {
        let hv = self.host.hypervisor.clone();
        let dom = self.dom();
        let toolstack = self.host.toolstack.clone();
        self.dirty_log.start(&*hv, dom, &self.offer.shell.ram, &|| toolstack.alone(dom))?;
        let offer = self.offer.clone();
        image::write_head(&mut self.encoder, &offer);
        let mut todo: Vec<Gfn> = gfns(&offer.shell.ram).collect();
        self.ear = Some(Ear::new(self.host.toolstack.packets(&offer.toolstack)?));
        self.progress(|p| p.total_pages = offer.shell.total_pages);
        self.precopy = Precopy::new(self.limits.clone());
        let mut resizes = 0;
        loop {
            self.precopy.begin_round();
            self.send_pages(&todo)?;
            self.flush()?;
            if self.precopy.round() > 0 {
                self.let_guest_wake()?;
            }
            let mut bitmap = self.bitmap()?;
            self.dirty_log.look(&*hv, dom, &mut bitmap)?;
            let judgement = self.precopy.end_round(bitmap.count());
            let (dirty_rate, expected) = (self.precopy.dirty_rate(), self.precopy.expected_blackout());
            self.progress(|p| {
                p.dirty_rate = dirty_rate;
                p.expected_blackout_ms = millis(expected);
            });
            self.look_at_size()?;
            if std::mem::take(&mut self.resized) {
                resizes += 1;
                if resizes > MAX_RESIZES {
                    self.ending = Ending::GivenUp;
                    return Err(
                        Trouble::new("its memory changes in size all the time").todo("wait until its balloon rests")
                    );
                }
                self.dirty_log.take(&*hv, dom, &mut bitmap, false)?;
                let now: BTreeSet<Gfn> = hv.ram_gfns(dom)?.into_iter().collect();
                todo = now.union(&self.known).copied().collect();
                continue;
            }
            match judgement {
                Judgement::Again => {
                    self.dirty_log.take(&*hv, dom, &mut bitmap, false)?;
                    todo = bitmap.iter().collect();
                }
                // The log is taken after the pause: a guest that has just paid for that is slow, and its peers hear less of it.
                Judgement::Freeze => return self.let_link_run_dry(),
                Judgement::GiveUp(why) => {
                    self.ending = Ending::GivenUp;
                    return Err(Trouble::new(why));
                }
            }
        }
    }

    /// Waits until a guest that sends packets has sent some more. It is slow for a while after pages were taken out of the log; paused then, or
    /// slowed once more, it would not be heard for longer than the blackout.
    fn let_guest_wake(&mut self) -> Result<()> {
        let since = Instant::now();
        let talks = self.ear.as_ref().is_some_and(|ear| ear.silent_for().is_some());
        let mut heard = 0;
        while talks && heard < AWAKE && since.elapsed() < WAKE_LIMIT {
            thread::sleep(LISTEN_EVERY);
            heard += u32::from(self.listen());
            self.check()?;
            self.look_at_size()?;
        }
        Ok(())
    }

    /// Waits until what was sent has arrived: what still waits for the network now would be waited for in the blackout, and its sending keeps
    /// dom0's CPU from a guest that shares it. A peer that is silent for longer is left to the time-outs that there are for it.
    fn let_link_run_dry(&mut self) -> Result<()> {
        let since = Instant::now();
        let number = self.send_ping()?;
        while self.pings.iter().any(|(waiting, _)| *waiting == number) && since.elapsed() < DRY_LIMIT {
            thread::sleep(DRY_POLL);
            self.listen();
            self.check()?;
            self.look_at_size()?;
        }
        Ok(())
    }

    /// Xen does not mark a page that a guest gets while its writes are watched, and marks writes to it only after the next look at the bitmap
    /// (`p2m_add_page`, xen/arch/x86/mm/p2m.c). So if memory went and came, everything is sent once more.
    pub(super) fn look_at_size(&mut self) -> Result<()> {
        let size = self.host.hypervisor.domain_info(self.dom())?.total_pages;
        self.resized |= size != self.size;
        self.size = size;
        Ok(())
    }

    pub(super) fn listen(&mut self) -> bool {
        self.ear.as_mut().is_some_and(Ear::listen)
    }

    pub(super) fn bitmap(&self) -> Result<DirtyBitmap> {
        let hv = &*self.host.hypervisor;
        Ok(DirtyBitmap::new(preflight::reach(hv, &hv.domain_info(self.dom())?)?.0 + 1))
    }

    pub(super) fn send_pages(&mut self, pages: &[Gfn]) -> Result<()> {
        let hv = self.host.hypervisor.clone();
        let mut buffer = vec![0; BATCH * PAGE_SIZE];
        let mut left = pages.len() as u64;
        for batch in pages.chunks(BATCH) {
            self.check()?;
            if self.timeline.is_none()
                && let Some(why) = self.precopy.out_of_time(left)
            {
                self.ending = Ending::GivenUp;
                return Err(Trouble::new(why));
            }
            self.listen();
            self.look_at_size()?;
            let buffer = buffer.get_mut(..batch.len() * PAGE_SIZE).ok_or_else(|| Trouble::new("batch too long"))?;
            let read = hv.read_pages(self.dom(), batch, buffer).doing("read the guest's memory")?;
            let (mut full, mut zero, mut gone) = (Vec::new(), Vec::new(), Vec::new());
            // Those that are sent move together at the front.
            let mut data = 0;
            for ((gfn, read), at) in batch.iter().zip(read).zip((0..).step_by(PAGE_SIZE)) {
                match read {
                    // Given up by the guest since it was offered.
                    Err(_) => {
                        self.known.remove(gfn);
                        gone.push(*gfn);
                    }
                    // Only the first time: what the destination has of it may not be zero.
                    Ok(()) if is_zero(&buffer[at..at + PAGE_SIZE]) && !self.known.contains(gfn) => zero.push(*gfn),
                    Ok(()) => {
                        full.push(*gfn);
                        if at != data {
                            buffer.copy_within(at..at + PAGE_SIZE, data);
                        }
                        data += PAGE_SIZE;
                    }
                }
            }
            let types = hv.page_types(self.dom(), &gone)?;
            let mut there = types.iter().map(|kind| *kind == PageType::Ram);
            let (back, gone): (Vec<Gfn>, Vec<Gfn>) = gone.into_iter().partition(|_| there.next() == Some(true));
            for gfn in back {
                // Taken again just now; else the other host would take it for given up.
                // Its place in the batch is free, so there is room behind those that are sent.
                let page = &mut buffer[data..data + PAGE_SIZE];
                if let Some(Err(errno)) = hv.read_pages(self.dom(), &[gfn], page)?.first() {
                    return Err(Trouble::new(format!("its page {gfn} is there, but can't be read ({errno})")));
                }
                full.push(gfn);
                data += PAGE_SIZE;
            }
            self.known.extend(full.iter().chain(&zero));
            image::write_pages(&mut self.encoder, &full, &buffer[..data], &zero, &gone);
            self.flush()?;
            left -= batch.len() as u64;
            self.precopy.sent(batch.len() as u64, zero.len() as u64);
            let (round, rate, bytes) = (self.precopy.round(), self.precopy.rate(), self.precopy.total_bytes());
            self.progress(|p| {
                p.round = round;
                p.rate = rate;
                p.sent_bytes = bytes;
                p.remaining_pages = left;
            });
        }
        Ok(())
    }

    /// Sends what the encoder holds, and records it if that was asked for.
    pub(super) fn flush(&mut self) -> Result<()> {
        let (bytes, crc) = (self.encoder.bytes(), self.encoder.crc());
        self.digest.add(crc, bytes.len());
        self.precopy.count_bytes(bytes.len() as u64);
        let link = self.link.as_ref().ok_or_else(|| Trouble::new("there is no connection"))?;
        link.stream(bytes, crc)?;
        if let Some(recording) = &mut self.recording {
            recording.add(bytes)?;
        }
        self.encoder.clear();
        Ok(())
    }
}

fn is_zero(page: &[u8]) -> bool {
    // By 128 bytes at a time the compiler makes it a few wide instructions.
    page.chunks(128).all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}
