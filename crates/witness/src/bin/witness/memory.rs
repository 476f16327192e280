//! A memory region: three quarters are rewritten at a set rate and checked before, one quarter is written once and checked.

use crate::context::{Context, Pacer, lock};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use witness::pattern::{PAGE_WORDS, check_page, fill_page};
use witness::report::Noticed;

#[derive(Debug)]
pub struct Region {
    seed: u64,
    words: Vec<u64>,
    /// Version of each page; 0 for ever in the part that stays.
    versions: Vec<u64>,
    /// Pages below this are churned.
    churned: usize,
    next_churned: usize,
    next_still: usize,
}

impl Region {
    pub fn new(seed: u64, mib: u32) -> Region {
        let pages = mib as usize * 256;
        let mut region = Region {
            seed,
            words: vec![0; pages * PAGE_WORDS],
            versions: vec![0; pages],
            churned: pages / 4 * 3,
            next_churned: 0,
            next_still: 0,
        };
        for page in 0..pages {
            region.fill(page, 0);
        }
        region
    }

    fn fill(&mut self, page: usize, version: u64) {
        let seed = self.seed;
        let at = page * PAGE_WORDS;
        if let (Some(words), Some(v)) = (self.words.get_mut(at..at + PAGE_WORDS), self.versions.get_mut(page)) {
            fill_page(words, seed, page as u64, version);
            *v = version;
        }
    }

    fn check(&self, page: usize) -> Option<Noticed> {
        let at = page * PAGE_WORDS;
        let words = self.words.get(at..at + PAGE_WORDS)?;
        let d = check_page(words, self.seed, page as u64, *self.versions.get(page)?)?;
        Some(Noticed::Page { page: page as u64, offset: (d.word * 8) as u32, want: d.want, found: d.found })
    }

    /// Checks and rewrites one page, and checks one that stays. A wrong page is reported once: it is written anew.
    fn step(&mut self) -> (u64, Vec<Noticed>) {
        let mut noticed = Vec::new();
        let mut checked = 0;
        if self.churned > 0 {
            // A prime step visits every page of a region whose size it does not divide, neighbours far apart.
            self.next_churned = (self.next_churned + 7919) % self.churned;
            let page = self.next_churned;
            noticed.extend(self.check(page));
            let version = self.versions.get(page).copied().unwrap_or(0) + 1;
            self.fill(page, version);
            checked += 1;
        }
        let still = self.versions.len() - self.churned;
        if still > 0 {
            self.next_still = (self.next_still + 1) % still;
            let page = self.churned + self.next_still;
            if let Some(n) = self.check(page) {
                noticed.push(n);
                self.fill(page, 0);
            }
            checked += 1;
        }
        (checked, noticed)
    }

    /// Checks every page.
    pub fn check_all(&self) -> (u64, Vec<Noticed>) {
        let pages = self.versions.len();
        (pages as u64, (0..pages).filter_map(|p| self.check(p)).collect())
    }
}

/// Counts and reports what a check found.
pub fn report(ctx: &Context, (checked, noticed): (u64, Vec<Noticed>)) {
    ctx.counters.pages.add(checked);
    ctx.counters.pages_bad.add(noticed.len() as u64);
    for n in noticed {
        ctx.notice(n);
    }
}

/// Starts the churn. The region is handed out for the last check.
pub fn start(ctx: &Arc<Context>) -> Option<Arc<Mutex<Region>>> {
    if ctx.config.mem_mib == 0 {
        return None;
    }
    let region = Arc::new(Mutex::new(Region::new(ctx.config.seed, ctx.config.mem_mib)));
    if ctx.config.churn_kib > 0 {
        let (c, r) = (ctx.clone(), region.clone());
        crate::spawn("churn", move || {
            const TURNS: u32 = 10;
            let mut pacer = Pacer::every(Duration::from_secs(1) / TURNS);
            let mut owed_kib = 0;
            loop {
                pacer.wait(&c);
                owed_kib += c.config.churn_kib;
                let pages = owed_kib / (TURNS * 4);
                owed_kib %= TURNS * 4;
                for _ in 0..pages {
                    let found = lock(&r).step();
                    report(&c, found);
                }
            }
        });
    }
    Some(region)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn churn_visits_every_page_and_sees_a_flipped_bit_in_each_part() {
        let mut r = Region::new(3, 1);
        for _ in 0..r.churned {
            assert_eq!(r.step().1, vec![]);
        }
        assert!(r.versions.iter().take(r.churned).all(|v| *v == 1), "every churned page once");
        assert_eq!(r.check_all().1, vec![]);
        for page in [5, r.churned + 5] {
            r.words[page * PAGE_WORDS + 100] ^= 4;
            assert!(matches!(r.check_all().1[..], [Noticed::Page { offset: 800, .. }]));
            let seen: usize = (0..r.churned).map(|_| r.step().1.len()).sum();
            assert_eq!(seen, 1, "page {page}");
            assert_eq!(r.check_all().1, vec![]);
        }
    }

    #[test]
    fn a_page_of_an_older_version_is_seen() {
        let mut r = Region::new(3, 1);
        let old = r.words[..PAGE_WORDS].to_vec();
        r.fill(0, 1);
        r.words[..PAGE_WORDS].copy_from_slice(&old);
        assert_eq!(r.check_all().1.len(), 1);
    }
}
