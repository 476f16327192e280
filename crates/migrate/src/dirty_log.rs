//! Which pages the guest writes to, and whether that is known to nobody else.
//!
//! Xen keeps one log of it for each domain and does not say whose. Stock `xl save` and `xl migrate` take out of it what they look at, begin it
//! anew, and end it with themselves; and who looks at a log that has ended finds all pages clean, without an error
//! (`paging_log_dirty_op`, xen/arch/x86/mm/paging.c). Pages would be missing from the copy and nothing would show. So each look leaves a
//! few marks, and the next must find them.

use crate::guest::{GfnRange, gfns};
use crate::trouble::{Doing, Result, Trouble};
use hypervisor::{DirtyBitmap, DomId, Gfn, Hypervisor, PageType};

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
    stolen: bool,
}

impl DirtyLog {
    /// Begins it; all pages are clean then. `ram` is where the guest has memory.
    pub fn start(&mut self, hv: &dyn Hypervisor, dom: DomId, ram: &[GfnRange]) -> Result<()> {
        if hv.log_dirty_enable(dom).is_err() {
            // Left on by a daemon that was killed, or by stock tools that were.
            hv.log_dirty_disable(dom)?;
            hv.log_dirty_enable(dom).doing("watch which pages the guest writes to")?;
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
        hv.log_dirty_clean(dom, bitmap, last)?;
        self.find_marks(bitmap)?;
        // What is written between the look and the marks and is taken away in between would not show: some microseconds.
        if last { Ok(()) } else { self.mark(hv, dom, bitmap) }
    }

    fn find_marks(&mut self, bitmap: &DirtyBitmap) -> Result<()> {
        if let Some(missing) = self.marks.iter().find(|gfn| !bitmap.contains(**gfn)) {
            self.stolen = true;
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
    pub fn stop(&self, hv: &dyn Hypervisor, dom: DomId) -> hypervisor::Result<()> {
        if self.stolen { Ok(()) } else { hv.log_dirty_disable(dom) }
    }
}
