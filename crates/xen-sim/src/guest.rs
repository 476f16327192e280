//! What a simulated guest does when it runs: every tick it writes to one page, chosen by the tick's number, and counts in another. Other
//! pages it has filled long ago and lets be: those are sent once, and nothing heals what happens to them on the way. So its memory after
//! n ticks can be computed again, and a page that was lost, is stale or damaged shows.

use hypervisor::{Gfn, PAGE_SIZE};
use std::collections::BTreeMap;

/// gfn of the page that counts ticks.
pub const COUNTER: Gfn = Gfn(3);
/// First gfn that ticks write to.
pub const FIRST: u64 = 16;

/// How busy a guest is.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// gfns 0..pages are its memory.
    pub pages: u64,
    /// gfns 16..16 + working_set are written to.
    pub working_set: u64,
    /// So many gfns behind them hold what it wrote long ago.
    pub still: u64,
    /// Ticks for each time that somebody looks at its memory while it runs.
    pub ticks: u64,
}

impl Program {
    /// Pages that it lets be.
    pub fn still_gfns(&self) -> impl Iterator<Item = Gfn> {
        let first = FIRST + self.working_set;
        (first..first + self.still).map(Gfn)
    }

    /// The page that tick `n` writes to, and the offset.
    pub fn target(&self, n: u64) -> (Gfn, usize) {
        let mixed = n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17);
        (Gfn(FIRST + mixed % self.working_set.max(1)), 8 * (n % (PAGE_SIZE as u64 / 8)) as usize)
    }
}

/// What a page holds that the guest lets be: no two words of all of them are the same.
pub fn still_page(gfn: Gfn) -> Vec<u8> {
    let words = PAGE_SIZE as u64 / 8;
    (0..words).flat_map(|n| (gfn.0 * words + n).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}

/// The pages that a guest has written, after `ticks` ticks.
pub fn expected_memory(program: &Program, ticks: u64) -> BTreeMap<Gfn, Vec<u8>> {
    let mut memory: BTreeMap<Gfn, Vec<u8>> = program.still_gfns().map(|gfn| (gfn, still_page(gfn))).collect();
    for n in 1..=ticks {
        let (gfn, offset) = program.target(n);
        let page = memory.entry(gfn).or_insert_with(|| vec![0; PAGE_SIZE]);
        page[offset..offset + 8].copy_from_slice(&n.to_le_bytes());
    }
    memory
}
