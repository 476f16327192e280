//! Which pages the guest writes to, and whether that is known to nobody else.
//!
//! Xen keeps one log of it for each domain and does not say whose. Stock `xl save` and `xl migrate` take out of it what they look at, begin it
//! anew, and end it with themselves; and who looks at a log that has ended finds all pages clean, without an error
//! (`paging_log_dirty_op`, xen/arch/x86/mm/paging.c). Pages would be missing from the copy and nothing would show. So each look leaves a
//! few marks, and the next must find them.

use crate::guest::{GfnRange, gfns};
use crate::trouble::{Doing, Result, Trouble};
use hypervisor::{DirtyBitmap, DomId, Errno, Gfn, Hypervisor, PageType};
use std::time::Duration;

/// Pages that are marked at each look. They are sent once more, so there are few.
const MARKS: usize = 4;
/// Pages that are considered for it.
const CANDIDATES: u64 = 64;

/// The log of one guest.
#[derive(Debug, Default)]
pub struct DirtyLog {
    /// Some of the guest's memory, evenly from all of it.
    candidates: Vec<Gfn>,
    marks: Vec<Gfn>,
    whose: Whose,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Whose {
    /// As far as is known here.
    #[default]
    Nobodys,
    Ours,
    Others,
}

/// Refuses while somebody else copies the guest's memory ([`crate::toolstack::Toolstack::alone`]).
pub type Alone<'a> = &'a dyn Fn() -> Result<()>;

impl DirtyLog {
    /// That of a daemon before this one, which may have left it on.
    pub fn left_over() -> DirtyLog {
        DirtyLog { whose: Whose::Ours, ..DirtyLog::default() }
    }

    /// Begins it; all pages are clean then. `ram` is where the guest has memory.
    ///
    /// # Errors
    /// It is that of stock tools at work, and stays as it is.
    pub fn start(&mut self, hv: &dyn Hypervisor, dom: DomId, ram: &[GfnRange], alone: Alone<'_>) -> Result<()> {
        match hv.log_dirty_enable(dom) {
            // Xen has the same answer for a guest with passed-through devices, which the preflight has refused.
            Err(error) if error.as_errno() == Some(Errno::EINVAL) => {
                alone()?;
                // Left on by stock tools that were killed (Ctrl-C is enough). Nothing but another save, which the guest takes part in,
                // would ever switch it off.
                hv.log_dirty_disable(dom).and_then(|()| hv.log_dirty_enable(dom))
            }
            result => result,
        }
        .doing("watch which pages the guest writes to")?;
        self.whose = Whose::Ours;
        // Stock tools that have come since the preflight end this log to begin their own, and the first look would take pages from them.
        if let Err(others) = alone() {
            self.whose = Whose::Others;
            return Err(others);
        }
        let total: u64 = ram.iter().map(|(_, count)| *count).sum();
        let step = usize::try_from(total / CANDIDATES).unwrap_or(usize::MAX).max(1);
        self.candidates = gfns(ram).step_by(step).collect();
        self.mark(hv, dom, &DirtyBitmap::new(0))
    }

    /// The pages that were written to since they were last taken, and all of them stay in the log. Costs the guest nothing.
    pub fn look(&mut self, hv: &dyn Hypervisor, dom: DomId, bitmap: &mut DirtyBitmap) -> Result<()> {
        hv.log_dirty_peek(dom, bitmap)?;
        self.find_marks(bitmap)
    }

    /// The same, and they are clean from then on: the guest pays for it, since Xen has to be asked at its next access to each page of its
    /// memory. `last`: it is paused, and no look follows.
    pub fn take(&mut self, hv: &dyn Hypervisor, dom: DomId, bitmap: &mut DirtyBitmap, last: bool) -> Result<()> {
        // What is in a log that is not ours any more stays in it.
        self.look(hv, dom, bitmap)?;
        hv.log_dirty_clean(dom, bitmap, last)?;
        self.find_marks(bitmap)?;
        // What is written between the look and the marks and is taken away in between would not show: some microseconds.
        if last { Ok(()) } else { self.mark(hv, dom, bitmap) }
    }

    fn find_marks(&mut self, bitmap: &DirtyBitmap) -> Result<()> {
        if let Some(missing) = self.marks.iter().find(|gfn| !bitmap.contains(**gfn)) {
            self.whose = Whose::Others;
            return Err(Trouble::new(format!(
                "somebody else has looked at which pages it writes to, or has ended that (the mark at page {missing} is gone), \
                 so the copy is not whole; is it being saved or migrated by xl?"
            ))
            .todo("try again when that is over"));
        }
        Ok(())
    }

    /// Pages that the guest has just not written to: it could put back what a thief has taken.
    fn mark(&mut self, hv: &dyn Hypervisor, dom: DomId, dirty: &DirtyBitmap) -> Result<()> {
        let last = hv.max_gfn(dom)?;
        let types = hv.page_types(dom, &self.candidates)?;
        let there = self.candidates.iter().zip(types).filter(|(gfn, kind)| *kind == PageType::Ram && **gfn < last);
        let there: Vec<Gfn> = there.map(|(gfn, _)| *gfn).collect();
        let clean: Vec<Gfn> = there.iter().copied().filter(|gfn| !dirty.contains(*gfn)).collect();
        let from = if clean.is_empty() { there } else { clean };
        self.marks = from.iter().copied().step_by((from.len() / MARKS).max(1)).take(MARKS).collect();
        if self.marks.is_empty() {
            return Err(Trouble::new(
                "it has given up nearly all of its memory, so it can't be seen whether its writes are watched",
            )
            .todo("try again when its balloon rests"));
        }
        hv.log_dirty_mark(dom, &self.marks).doing("mark pages in the log of its writes")?;
        // One that its balloon took just before bears no mark. One that goes later keeps it.
        let mut types = hv.page_types(dom, &self.marks)?.into_iter();
        self.marks.retain(|_| types.next() == Some(PageType::Ram));
        Ok(())
    }

    /// Ends it, unless it is somebody else's by now: stock tools would go on with a log that is empty.
    pub fn stop(&mut self, hv: &dyn Hypervisor, dom: DomId, alone: Alone<'_>) -> Result<()> {
        if std::mem::take(&mut self.whose) != Whose::Ours {
            return Ok(());
        }
        alone()?;
        Ok(hv.log_dirty_disable(dom)?)
    }

    /// Pages a second that the guest writes to, by what it does in so long.
    pub fn rate(hv: &dyn Hypervisor, dom: DomId, ram: &[GfnRange], alone: Alone<'_>, watch: Duration) -> Result<u64> {
        let mut log = DirtyLog::default();
        let mut bitmap = DirtyBitmap::new(hv.max_gfn(dom)?.0 + 1);
        let looked = log.start(hv, dom, ram, alone).and_then(|()| {
            std::thread::sleep(watch);
            log.look(hv, dom, &mut bitmap)
        });
        let stopped = log.stop(hv, dom, alone);
        looked?;
        stopped?;
        let written = bitmap.count().saturating_sub(log.marks.len() as u64);
        Ok(written * 1000 / u64::try_from(watch.as_millis()).unwrap_or(u64::MAX).max(1))
    }
}
