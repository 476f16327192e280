//! The seeded generator behind every byte that the witness writes to memory and disk.

/// SplitMix64 (Steele, Lea, Flood 2014): any 64-bit state gives a full-period sequence, and a page can be made from its
/// number without making those before it.
#[derive(Clone, Copy, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// The next number.
    #[allow(clippy::should_implement_trait, reason = "it has no end, so there is no Option to give")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

/// Numbers in a page of 4096 bytes.
pub const PAGE_WORDS: usize = 512;

fn page_rng(seed: u64, page: u64, version: u64) -> Rng {
    // Two rounds, so that neighbours in page and version have nothing in common.
    let mut r = Rng::new(seed ^ page.wrapping_mul(0xD6E8_FEB8_6659_FD93));
    Rng::new(r.next() ^ version.wrapping_mul(0xA076_1D64_78BD_642F))
}

/// Fills a page.
pub fn fill_page(words: &mut [u64], seed: u64, page: u64, version: u64) {
    let mut rng = page_rng(seed, page, version);
    for w in words {
        *w = rng.next();
    }
}

/// A word that is not what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Index of the word in the page.
    pub word: usize,
    /// Written.
    pub want: u64,
    /// Found.
    pub found: u64,
}

/// Looks for the first word of a page that is not what [`fill_page`] wrote.
pub fn check_page(words: &[u64], seed: u64, page: u64, version: u64) -> Option<Difference> {
    let mut rng = page_rng(seed, page, version);
    words.iter().enumerate().find_map(|(word, found)| {
        let want = rng.next();
        (want != *found).then_some(Difference { word, want, found: *found })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_told_from_another_version_page_and_seed() {
        let mut page = vec![0; PAGE_WORDS];
        fill_page(&mut page, 1, 2, 3);
        assert_eq!(check_page(&page, 1, 2, 3), None);
        for (s, p, v) in [(0, 2, 3), (1, 3, 3), (1, 2, 4), (1, 2, 2)] {
            assert_eq!(check_page(&page, s, p, v).map(|d| d.word), Some(0));
        }
        page[511] ^= 1 << 63;
        assert_eq!(check_page(&page, 1, 2, 3).map(|d| d.word), Some(511));
    }
}
