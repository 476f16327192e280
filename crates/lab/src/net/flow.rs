//! What a stream of numbered packets tells: how many came, which are missing, twice or out of order, and how long it was
//! silent. No I/O, no clock of its own.

use std::collections::VecDeque;
use std::time::Duration;

use serde::Serialize;

/// Silences that are remembered: of every move of a long run, and of the emulator's pauses between them.
const KEPT_SILENCES: usize = 64;
/// How far back a late or second packet is still told from a lost one.
const WINDOW: usize = 8192;

/// A time in which nothing came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Silence {
    /// The last packet before it.
    pub from: Duration,
    /// The first after it, or the time of asking if it still lasts.
    pub to: Duration,
}

impl Silence {
    /// How long it was.
    pub fn length(&self) -> Duration {
        self.to.saturating_sub(self.from)
    }
}

/// The longest silences of a flow.
#[derive(Clone, Debug, Default)]
pub struct Silences {
    last: Option<Duration>,
    longest: Vec<Silence>,
}

impl Silences {
    /// Something came.
    pub fn heard(&mut self, now: Duration) {
        if let Some(last) = self.last {
            self.keep(Silence { from: last, to: now });
        }
        self.last = Some(now);
    }

    fn keep(&mut self, silence: Silence) {
        let at = self.longest.partition_point(|s| s.length() >= silence.length());
        if at < KEPT_SILENCES {
            self.longest.insert(at, silence);
            self.longest.truncate(KEPT_SILENCES);
        }
    }

    /// From here on nothing is expected any more (the guest was told to stop, say): what follows is no silence.
    pub fn stop(&mut self) {
        self.last = None;
    }

    /// When something came last.
    pub fn last(&self) -> Option<Duration> {
        self.last
    }

    /// The longest silences, the longest first; the one that lasts at `now` counts.
    pub fn longest(&self, now: Duration) -> Vec<Silence> {
        let mut all = self.clone();
        if let Some(last) = self.last {
            all.keep(Silence { from: last, to: now });
        }
        all.longest
    }
}

/// What is known of one recent number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Missing,
    /// Came, with this stamp of the sender.
    Came(u64),
}

/// Numbers of a flow, from 1, each of which should come once.
#[derive(Clone, Debug, Default)]
pub struct Numbers {
    highest: u64,
    /// The slots of `highest` and the numbers below it, newest last.
    window: VecDeque<Slot>,
    counts: Counts,
}

/// How the numbers of a flow came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Different numbers that came.
    pub received: u64,
    /// Numbers below the highest that never came (or so late that it could not be told any more).
    pub lost: u64,
    /// Came again with the same stamp: a copy made by the network.
    pub duplicated: u64,
    /// Came again with another stamp: two senders count on from the same number, as two copies of a guest would.
    pub conflicting: u64,
    /// Came after a higher one.
    pub reordered: u64,
    /// Were damaged.
    pub corrupt: u64,
}

impl Numbers {
    /// Number `n` came; `stamp` is something that the sender draws anew for each packet.
    pub fn came(&mut self, n: u64, stamp: u64) {
        if n == 0 {
            return self.corrupt();
        }
        if n > self.highest {
            let gap = n - self.highest - 1;
            // Anything may be in the field: a number from far ahead must not cost memory.
            self.counts.lost = self.counts.lost.saturating_add(gap);
            for _ in 0..gap.min(WINDOW as u64) {
                self.push(Slot::Missing);
            }
            self.push(Slot::Came(stamp));
            self.highest = n;
            self.counts.received += 1;
            return;
        }
        let back = (self.highest - n) as usize;
        let slot = self.window.len().checked_sub(back + 1).and_then(|at| self.window.get_mut(at));
        match slot {
            Some(slot @ Slot::Missing) => {
                *slot = Slot::Came(stamp);
                self.counts.lost = self.counts.lost.saturating_sub(1);
                self.counts.received += 1;
                self.counts.reordered += 1;
            }
            Some(Slot::Came(before)) if *before != stamp => self.counts.conflicting += 1,
            Some(Slot::Came(_)) | None => self.counts.duplicated += 1,
        }
    }

    fn push(&mut self, slot: Slot) {
        if self.window.len() == WINDOW {
            self.window.pop_front();
        }
        self.window.push_back(slot);
    }

    /// A packet came whose checksum or shape is wrong.
    pub fn corrupt(&mut self) {
        self.counts.corrupt += 1;
    }

    /// The sender started anew with number 1. Counts go on.
    pub fn restart(&mut self) {
        self.highest = 0;
        self.window.clear();
    }

    /// Highest number so far.
    pub fn highest(&self) -> u64 {
        self.highest
    }

    /// The counts so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn the_longest_silence_is_first_and_the_present_one_counts() {
        let mut s = Silences::default();
        for at in [0, 20, 1020, 1040, 1060, 1360] {
            s.heard(ms(at));
        }
        let longest = s.longest(ms(1370));
        assert_eq!(longest[0], Silence { from: ms(20), to: ms(1020) });
        assert_eq!(longest[1].length(), ms(300));
        assert_eq!(s.longest(ms(9360))[0], Silence { from: ms(1360), to: ms(9360) });
        s.stop();
        assert_eq!(s.longest(ms(99_360))[0].length(), ms(1000));
        assert_eq!(s.longest(ms(99_360)).len(), 5);
    }

    #[test]
    fn lost_late_twice_and_two_senders_are_told_apart() {
        let mut n = Numbers::default();
        for (seq, stamp) in [(1, 10), (2, 20), (5, 50), (4, 40), (5, 50), (6, 60), (6, 61)] {
            n.came(seq, stamp);
        }
        n.corrupt();
        let want = Counts { received: 5, lost: 1, duplicated: 1, conflicting: 1, reordered: 1, corrupt: 1 };
        assert_eq!(n.counts(), want);
    }

    #[test]
    fn a_restart_is_no_loss() {
        let mut n = Numbers::default();
        n.came(1, 1);
        n.came(2, 2);
        n.restart();
        n.came(1, 7);
        assert_eq!(n.counts(), Counts { received: 3, ..Counts::default() });
    }

    proptest! {
        #[test]
        fn any_order_of_all_numbers_loses_none(order in Just((1..200u64).collect::<Vec<_>>()).prop_shuffle()) {
            let mut n = Numbers::default();
            for seq in order {
                n.came(seq, seq);
            }
            prop_assert_eq!((n.counts().received, n.counts().lost, n.counts().duplicated), (199, 0, 0));
        }

        #[test]
        fn numbers_from_outside_cost_bounded_memory(seqs in proptest::collection::vec(any::<u64>(), 0..50)) {
            let mut n = Numbers::default();
            for seq in seqs {
                n.came(seq, 0);
            }
            prop_assert!(n.window.len() <= WINDOW);
        }
    }
}
