//! What migrations to a host have cost, for the next one's estimate.

use migrate::report::{Place, Report};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Name of the step whose length depends on what the guest has dirtied.
const PAGES_STEP: &str = "send the last pages";

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Measured {
    /// The blackout without the last pages, µs.
    fixed_us: u64,
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

    /// Takes a report's figures; half of the old estimate stays, so that one odd migration does not count for everything.
    pub fn learn(&self, peer: &str, report: &Report) {
        if !report.moved || report.steps.is_empty() {
            return;
        }
        let pages: u64 =
            report.steps.iter().filter(|s| s.place == Place::Source && s.name == PAGES_STEP).map(|s| s.micros).sum();
        let fixed_us = report.blackout_us.saturating_sub(pages);
        let rate = report.rounds.first().map_or(0, |r| r.bytes.saturating_mul(1_000_000) / r.micros.max(1));
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = peers.entry(peer.into()).or_insert(Measured { fixed_us, rate });
        *entry = Measured { fixed_us: (entry.fixed_us + fixed_us) / 2, rate: (entry.rate + rate) / 2 };
        // It is only an estimate: a disk that is full does not hinder migrations.
        let written = serde_json::to_vec_pretty(&*peers).map(|text| std::fs::write(&self.path, text));
        if let Ok(Err(error)) = written {
            tracing::warn!("write {}: {error}", self.path.display());
        }
    }
}
