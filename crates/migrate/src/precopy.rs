//! When to go on copying, when to pause the guest, and when to give up.

use crate::report::{Round, micros};
use hypervisor::PAGE_SIZE;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// What the operator allows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Longest that the guest may be away.
    pub downtime: Duration,
    /// Longest that copying may take.
    pub time: Duration,
    pub rounds: u32,
    /// What the blackout takes besides sending pages: measured on these two hosts by migrations before, or the configuration's guess.
    pub fixed: Duration,
    /// The part of `fixed` that comes when the other host has restored the guest: the commit, its backends, the unpause. If it was never
    /// measured it is taken to be as long as what came before.
    pub after: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            downtime: Duration::from_millis(300),
            time: Duration::from_secs(3600),
            rounds: 30,
            fixed: Duration::from_millis(50),
            after: None,
        }
    }
}

/// So few pages are not worth another round.
const FEW: u64 = 64;

/// A round is worth it while the pages that are left would make the blackout longer by this part of what it takes anyhow.
const WORTH: u32 = 4;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Judgement {
    /// Copy what was dirtied meanwhile.
    Again,
    /// Pause the guest.
    Freeze,
    /// The limits can't be kept.
    GiveUp(String),
}

/// Counts rounds and rates.
#[derive(Debug)]
pub struct Precopy {
    limits: Limits,
    started: Instant,
    round_started: Instant,
    pages: u64,
    zero: u64,
    bytes: u64,
    total_bytes: u64,
    rounds: Vec<Round>,
    dirty: u64,
}

impl Default for Precopy {
    fn default() -> Self {
        Precopy::new(Limits::default())
    }
}

impl Precopy {
    pub fn new(limits: Limits) -> Self {
        let now = Instant::now();
        Precopy {
            limits,
            started: now,
            round_started: now,
            pages: 0,
            zero: 0,
            bytes: 0,
            total_bytes: 0,
            rounds: Vec::new(),
            dirty: 0,
        }
    }

    pub fn begin_round(&mut self) {
        self.round_started = Instant::now();
        (self.pages, self.zero, self.bytes) = (0, 0, 0);
    }

    pub fn sent(&mut self, pages: u64, zero: u64) {
        self.pages += pages;
        self.zero += zero;
    }

    pub fn count_bytes(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.total_bytes += bytes;
    }

    /// Ends a round in which the guest has dirtied so many pages.
    pub fn end_round(&mut self, dirtied: u64) -> Judgement {
        self.dirty = dirtied;
        let micros = micros(self.round_started.elapsed());
        self.rounds.push(Round { pages: self.pages, zero_pages: self.zero, bytes: self.bytes, micros, dirtied });
        self.judge()
    }

    fn judge(&self) -> Judgement {
        if self.expected_blackout() <= self.limits.downtime {
            // The limit is what may be, not what is aimed at.
            let another =
                self.is_shrinking() && self.round() < self.limits.rounds && self.started.elapsed() < self.limits.time;
            return if another { Judgement::Again } else { Judgement::Freeze };
        }
        if self.dirty <= FEW || self.limits.fixed > self.limits.downtime {
            return self.give_up("its fixed part alone is too long");
        }
        if self.round() >= self.limits.rounds {
            return self.give_up(&format!("{} rounds did not help", self.round()));
        }
        if self.started.elapsed() >= self.limits.time {
            return self.give_up(&format!("{:?} did not help", self.limits.time));
        }
        Judgement::Again
    }

    /// Whether each round still leaves clearly fewer pages than the one before, and those that are left are worth one: the guest pays for each
    /// with a fault at its next access to every page, and its peers hear less of it.
    fn is_shrinking(&self) -> bool {
        let before = match self.rounds.as_slice() {
            [.., before, _] => before.dirtied,
            _ => u64::MAX,
        };
        self.dirty > FEW && self.dirty < before / 4 * 3 && self.time_to_send(self.dirty) > self.limits.fixed / WORTH
    }

    fn give_up(&self, why: &str) -> Judgement {
        Judgement::GiveUp(format!(
            "the blackout would be about {} ms, more than the limit of {} ms, and {why} (the guest dirties {} MiB/s, {} MiB/s get through); \
             raise --downtime-limit, or move it when it is less busy",
            self.expected_blackout().as_millis(),
            self.limits.downtime.as_millis(),
            (self.dirty_rate() * PAGE_SIZE as u64) >> 20,
            self.rate() >> 20
        ))
    }

    /// Within a round of which so many pages are left: why the copying has taken too long, if the guest can't be paused just as well.
    pub fn out_of_time(&self, left: u64) -> Option<String> {
        let Limits { downtime, time, fixed, .. } = self.limits;
        let taken = self.started.elapsed();
        (taken >= time && fixed + self.time_to_send(left) > downtime).then(|| {
            format!(
                "the copying has taken {} s and {left} pages of this round are left, so the blackout would be longer than the limit of {} ms; \
                 raise --max-time or --downtime-limit, or move it when it is less busy",
                taken.as_secs(),
                downtime.as_millis()
            )
        })
    }

    /// Rounds that have ended, or the present one's number while it lasts.
    pub fn round(&self) -> u32 {
        u32::try_from(self.rounds.len()).unwrap_or(u32::MAX)
    }

    pub fn rounds(&self) -> &[Round] {
        &self.rounds
    }

    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Bytes a second that got through in the last round worth measuring.
    pub fn rate(&self) -> u64 {
        let measured =
            |bytes: u64, micros: u64| (bytes > 1 << 20 && micros > 0).then(|| bytes.saturating_mul(1_000_000) / micros);
        let now = measured(self.bytes, micros(self.round_started.elapsed()));
        let before = self.rounds.iter().rev().find_map(|r| measured(r.bytes, r.micros));
        now.or(before).unwrap_or(100 << 20).max(1)
    }

    /// Pages a second that the guest dirtied in the last round.
    pub fn dirty_rate(&self) -> u64 {
        self.rounds.last().map_or(0, |r| r.dirtied.saturating_mul(1_000_000) / r.micros.max(1))
    }

    /// If the guest were paused now.
    pub fn expected_blackout(&self) -> Duration {
        self.limits.fixed + self.time_to_send(self.dirty)
    }

    fn time_to_send(&self, pages: u64) -> Duration {
        // All of the last round's pages may have contents, and rates of rounds full of zero pages are bytes a second too.
        let micros = u128::from(pages) * PAGE_SIZE as u128 * 1_000_000 / u128::from(self.rate());
        Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
    }

    /// How long after the pause the other host must have restored the guest: what comes then takes its time too. `most` is the longest that
    /// is ever waited, whatever the operator allows.
    pub fn until_restored(&self, most: Duration) -> Duration {
        let Limits { downtime, after, .. } = self.limits;
        after.map_or(downtime / 2, |after| downtime.saturating_sub(after)).min(most)
    }

    /// The last look before the commit: why the guest, which was away for so long when the other host had restored it, can't be back in time.
    pub fn restored_too_late(&self, away: Duration) -> Option<String> {
        let downtime = self.limits.downtime;
        let after = self.limits.after.unwrap_or(away);
        (away + after > downtime).then(|| {
            format!(
                "the guest was away for {} ms when the other host had restored it, and its start there takes about {} ms more, so the blackout \
                 would be longer than the limit of {} ms; raise --downtime-limit, or look what keeps the two hosts busy",
                away.as_millis(),
                after.as_millis(),
                downtime.as_millis()
            )
        })
    }

    /// After the pause, with the true number of pages left: why this would break the limit.
    pub fn too_late(&self, away: Duration, pages: u64) -> Option<String> {
        let expected = away + self.time_to_send(pages) + self.limits.after.unwrap_or_default();
        (expected > self.limits.downtime).then(|| {
            format!(
                "the guest has been paused for {} ms and {pages} pages are left, so the blackout would be longer than the limit of {} ms; \
                 raise --downtime-limit, or move it when it is less busy",
                away.as_millis(),
                self.limits.downtime.as_millis()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(round: Round, limits: Limits) -> Judgement {
        let mut precopy = Precopy::new(limits);
        precopy.dirty = round.dirtied;
        precopy.rounds = vec![round];
        precopy.judge()
    }

    fn round(mib_per_s: u64, dirtied: u64) -> Round {
        Round { pages: 10_000, zero_pages: 0, bytes: mib_per_s << 20, micros: 1_000_000, dirtied }
    }

    #[test]
    fn the_limit_decides() {
        let limits = Limits { rounds: 2, ..Limits::default() };
        // 100 MiB/s are 25600 pages a second: 250 ms for 6400 pages.
        assert_eq!(after(round(100, 6000), Limits { rounds: 1, ..limits.clone() }), Judgement::Freeze);
        assert_eq!(after(round(100, 7000), limits.clone()), Judgement::Again);
        assert!(matches!(after(round(100, 7000), Limits { rounds: 1, ..limits.clone() }), Judgement::GiveUp(_)));
        assert!(matches!(
            after(round(100, 7000), Limits { time: Duration::ZERO, ..limits.clone() }),
            Judgement::GiveUp(_)
        ));
        let slow = Limits { fixed: Duration::from_secs(1), ..limits };
        assert!(matches!(after(round(100, 1), slow), Judgement::GiveUp(_)));
    }

    #[test]
    fn rounds_go_on_while_they_help() {
        let mut precopy = Precopy::new(Limits::default());
        let mut judge_after = |dirtied| {
            precopy.dirty = dirtied;
            precopy.rounds.push(round(100, dirtied));
            precopy.judge()
        };
        assert_eq!(judge_after(6000), Judgement::Again);
        assert_eq!(judge_after(3000), Judgement::Again);
        assert_eq!(judge_after(2900), Judgement::Freeze);
        assert_eq!(judge_after(FEW), Judgement::Freeze);
    }

    #[test]
    fn what_comes_after_the_restoring_is_kept_free_for_it() {
        let of = |downtime, after| {
            let ms = Duration::from_millis;
            Precopy::new(Limits { downtime: ms(downtime), after: Some(ms(after)), ..Limits::default() })
        };
        let most = Duration::from_secs(60);
        let until = |downtime, after| of(downtime, after).until_restored(most).as_millis();
        assert_eq!([until(300, 0), until(300, 120), until(300, 400), until(600_000, 50)], [300, 180, 0, 60_000]);
        let unknown = Precopy::new(Limits::default());
        assert_eq!(unknown.until_restored(most).as_millis(), 150);
        assert_eq!(unknown.restored_too_late(Duration::from_millis(150)), None);
        assert!(
            unknown.restored_too_late(Duration::from_millis(151)).is_some(),
            "what was never measured takes as long again"
        );
        let late = |away| of(300, 120).restored_too_late(Duration::from_millis(away));
        assert_eq!(late(180), None);
        let why = late(181).expect("it is too late");
        assert!(
            why.contains("was away for 181 ms") && why.contains("120 ms more") && why.contains("limit of 300 ms"),
            "{why}"
        );
    }

    #[test]
    fn the_time_is_over_within_a_round_too() {
        let left = |time, left| Precopy::new(Limits { time, ..Limits::default() }).out_of_time(left);
        assert_eq!(left(Duration::from_secs(9), 1 << 20), None);
        assert_eq!(left(Duration::ZERO, 6000), None, "it can be paused");
        let why = left(Duration::ZERO, 7000).expect("it takes too long");
        assert!(why.contains("7000 pages of this round are left") && why.contains("limit of 300 ms"), "{why}");
    }

    #[test]
    fn what_turns_out_after_the_pause_counts_too() {
        let mut precopy = Precopy::new(Limits::default());
        precopy.rounds = vec![round(100, 0)];
        assert_eq!(precopy.too_late(Duration::from_millis(40), 6400), None);
        assert!(precopy.too_late(Duration::from_millis(60), 6400).is_some());
    }
}
