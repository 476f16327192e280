//! What migrations to a host have cost, for the next one's estimate.

use migrate::report::{Ending, Place, Report, Step};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Name of the step whose length depends on what the guest has dirtied.
const PAGES_STEP: &str = "send the last pages";
/// Name of the source's step with which the destination has restored the guest.
const COMMIT_STEP: &str = "write the commit to disk";
/// Name of the step that brings back a guest whose move was given up.
const BACK_STEP: &str = "roll back";

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Measured {
    /// The blackout without the last pages, µs.
    fixed_us: u64,
    /// Of it what comes when the destination has restored the guest, µs.
    #[serde(default)]
    after_us: u64,
    /// Bytes a second.
    rate: u64,
}

#[derive(Debug)]
pub struct Learned {
    path: PathBuf,
    peers: Mutex<BTreeMap<String, Measured>>,
}

impl Learned {
    /// A file that is missing or can't be read is one that has nothing to tell.
    pub fn open(dir: &Path) -> Learned {
        let path = dir.join("measured.json");
        let peers = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Learned { path, peers: Mutex::new(peers) }
    }

    fn measured(&self, peer: &str) -> Option<Measured> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).get(peer).copied()
    }

    pub fn fixed(&self, peer: &str) -> Option<Duration> {
        self.measured(peer).map(|m| Duration::from_micros(m.fixed_us))
    }

    pub fn rate(&self, peer: &str) -> Option<u64> {
        self.measured(peer).map(|m| m.rate).filter(|rate| *rate > 0)
    }

    pub fn after(&self, peer: &str) -> Option<Duration> {
        self.measured(peer).filter(|m| m.after_us > 0).map(|m| Duration::from_micros(m.after_us))
    }

    /// Takes a report's figures; half of the old estimate stays, so that one odd migration does not count for everything. A move that was
    /// given up with the guest paused tells what a blackout takes before the commit, and so, while nothing else is known, about how long all
    /// of it is (`migrate::Limits::after`): the next one need not pause the guest to find that out.
    pub fn learn(&self, peer: &str, report: &Report) {
        let is = |step: &Step, name| step.place == Place::Source && step.name == name;
        let sum = |steps: &[Step]| steps.iter().map(|s| s.micros).sum::<u64>();
        let steps = &report.steps;
        let pages: u64 = steps.iter().filter(|s| is(s, PAGES_STEP) || is(s, BACK_STEP)).map(|s| s.micros).sum();
        let known_us = sum(steps).saturating_sub(pages);
        let (fixed_us, after_us) = match steps.iter().position(|s| is(s, COMMIT_STEP)) {
            Some(commit) => (known_us, sum(steps.get(commit..).unwrap_or_default())),
            None => (known_us * 2, 0),
        };
        let rate = report.rounds.first().map_or(0, |r| r.bytes.saturating_mul(1_000_000) / r.micros.max(1));
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if steps.is_empty() || !report.moved && (report.ending != Ending::GivenUp || peers.contains_key(peer)) {
            return;
        }
        let new = Measured { fixed_us, after_us, rate };
        let entry = peers.entry(peer.into()).or_insert(new);
        let half = |old: u64, new: u64| old.midpoint(new);
        *entry = Measured {
            fixed_us: half(entry.fixed_us, fixed_us),
            after_us: half(entry.after_us, after_us),
            rate: half(entry.rate, rate),
        };
        // It is only an estimate: a disk that is full does not hinder migrations.
        let written = serde_json::to_vec_pretty(&*peers).map(|text| std::fs::write(&self.path, text));
        if let Ok(Err(error)) = written {
            tracing::warn!("write {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(moved: bool, ending: &str, steps: &[(&str, &str, u64)]) -> Report {
        let steps: Vec<_> = steps
            .iter()
            .map(|(place, name, micros)| serde_json::json!({"place": place, "name": name, "micros": micros}))
            .collect();
        let total: u64 = steps.iter().filter_map(|s| s["micros"].as_u64()).sum();
        serde_json::from_value(serde_json::json!({
            "id": "00000000-0000-0000-0000-000000000001", "domid": 1, "name": "g", "peer": "b", "moved": moved, "error": null,
            "ending": ending, "rounds": [], "bytes": 0, "total_ms": 0, "blackout_us": total, "steps": steps,
        }))
        .expect("a report")
    }

    const MOVED: [(&str, &str, u64); 6] = [
        ("source", "pause", 10),
        ("source", PAGES_STEP, 1000),
        ("destination", "set the vCPUs", 50),
        ("source", COMMIT_STEP, 2),
        ("destination", COMMIT_STEP, 3),
        ("destination", "unpause", 20),
    ];

    #[test]
    fn what_comes_after_the_restoring_is_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let learned = Learned::open(folder.path());
        assert_eq!((learned.fixed("b"), learned.after("b")), (None, None));
        learned.learn("b", &report(true, "moved", &MOVED));
        let of = |learned: &Learned| (learned.fixed("b").unwrap().as_micros(), learned.after("b").unwrap().as_micros());
        assert_eq!(of(&learned), (85, 25));
        assert_eq!(of(&Learned::open(folder.path())), (85, 25), "it is on disk");
    }

    #[test]
    fn a_move_that_was_given_up_counts_only_while_nothing_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let learned = Learned::open(folder.path());
        let slow = [("source", "pause", 700), ("source", PAGES_STEP, 9), ("source", BACK_STEP, 300)];
        learned.learn("b", &report(false, "failed", &slow));
        learned.learn("b", &report(false, "given-up", &[]));
        assert_eq!(learned.fixed("b"), None);
        learned.learn("b", &report(false, "given-up", &slow));
        assert_eq!(learned.fixed("b"), Some(Duration::from_micros(1400)));
        assert_eq!(learned.after("b"), None);
        learned.learn("c", &report(true, "moved", &MOVED));
        learned.learn("c", &report(false, "given-up", &slow));
        assert_eq!(
            learned.fixed("c"),
            Some(Duration::from_micros(85)),
            "one odd one would keep all others from being tried"
        );
    }
}
