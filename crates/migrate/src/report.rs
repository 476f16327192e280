//! Progress while a migration runs, and the report afterwards.

use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};
use uuid::Uuid;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    #[default]
    Preflight,
    Precopy,
    /// The guest is paused.
    Blackout,
    /// `Go` is in the journal; the destination decides.
    Committed,
    RollingBack,
    /// The guest runs on the destination; what it left here is removed.
    Leaving,
    /// The operator has the outcome; the destination may still have to be told.
    Done,
}

/// A look at a running migration.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    pub phase: Phase,
    pub round: u32,
    /// Pages left of this round.
    pub remaining_pages: u64,
    /// Of the guest's memory.
    pub total_pages: u64,
    pub sent_bytes: u64,
    /// Bytes a second, over the present round.
    pub rate: u64,
    /// Pages a second that the guest dirties, over the last round.
    pub dirty_rate: u64,
    /// If the guest were paused now, milliseconds.
    pub expected_blackout_ms: u64,
    /// What is waited for, where that is not the phase's usual work.
    pub waiting_for: Option<String>,
}

/// One round of precopy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    pub pages: u64,
    /// Of these, all zeroes.
    pub zero_pages: u64,
    pub bytes: u64,
    pub micros: u64,
    /// Pages dirtied meanwhile.
    pub dirtied: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    Source,
    Network,
    Destination,
}

/// One step of the blackout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    pub place: Place,
    pub name: String,
    pub micros: u64,
}

/// What became of a migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub id: Uuid,
    pub domid: u16,
    pub name: String,
    pub peer: String,
    /// The guest runs on the destination.
    pub moved: bool,
    /// Why not.
    pub error: Option<String>,
    pub ending: Ending,
    /// What is not on the destination as it was, though nothing that the guest could notice.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// What is on this host of it, now that the migration is over.
    #[serde(default)]
    pub left: Left,
    pub rounds: Vec<Round>,
    pub bytes: u64,
    pub total_ms: u64,
    /// From the pause to the unpause, split; the steps add up to it. For a guest that stayed: how long it was paused.
    pub blackout_us: u64,
    pub steps: Vec<Step>,
    /// For a guest that has moved and whose vifs were not silent anyhow.
    #[serde(default)]
    pub silence: Option<Silence>,
}

impl Report {
    /// How long nothing came from the guest's vifs: what its peers notice, but for the network's own delays. Microseconds.
    pub fn silence_us(&self) -> Option<u64> {
        let Silence { before_us, after_us } = self.silence?;
        Some(before_us.saturating_add(self.blackout_us).saturating_add(after_us))
    }
}

/// What makes the silence of the guest's vifs longer than the blackout: it may send only now and then, gets less of a CPU that it shares
/// with its hosts' work on the move, and has to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Silence {
    /// From its last packet to the pause, microseconds.
    pub before_us: u64,
    /// From the unpause to its first packet, microseconds.
    pub after_us: u64,
}

/// What a host has of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Left {
    Runs,
    Paused,
    ShutDown,
    Gone,
    #[default]
    Unknown,
}

impl std::fmt::Display for Left {
    /// Behind "the guest …".
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Left::Runs => "runs here",
            Left::Paused => "is here, but paused (`xl unpause` lets it run)",
            Left::ShutDown => "is here, but has shut down",
            Left::Gone => "is gone: it was destroyed meanwhile",
            Left::Unknown => "may be here: Xen did not say (see `xl list`)",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    Moved,
    /// Refused by either side before anything was touched.
    Refused,
    /// A limit was reached or an operator cancelled.
    GivenUp,
    Failed,
    /// Brought to its end by a daemon that was started again, or by `ferry resolve`.
    Recovered,
}

/// Times consecutive steps: whatever passes between two marks belongs to the second.
#[derive(Debug, Clone)]
pub struct Timeline {
    started: Instant,
    last: Instant,
    place: Place,
    steps: Vec<Step>,
}

impl Timeline {
    pub fn start(place: Place) -> Self {
        let now = Instant::now();
        Timeline { started: now, last: now, place, steps: Vec::new() }
    }

    /// The step that has just ended.
    pub fn mark(&mut self, name: &str) {
        let now = Instant::now();
        let micros = micros(now - self.last);
        self.last = now;
        self.steps.push(Step { place: self.place, name: name.into(), micros });
    }

    /// What was waited for since the last mark was these steps of the other host; the rest of the wait was the network's.
    pub fn mark_remote(&mut self, steps: Vec<Step>, network: &str) {
        let now = Instant::now();
        let waited = micros(now - self.last);
        self.last = now;
        let remote: u64 = steps.iter().map(|s| s.micros).sum();
        self.steps.push(Step { place: Place::Network, name: network.into(), micros: waited.saturating_sub(remote) });
        self.steps.extend(steps);
    }

    /// As [`Timeline::mark_remote`], for the last steps of a time that is known to have taken so many microseconds in all: what came
    /// after it, the answer's way back, is no part of it.
    pub fn end_remote(&mut self, steps: Vec<Step>, total_micros: u64, network: &str) {
        let remote: u64 = steps.iter().map(|s| s.micros).sum();
        let micros = total_micros.saturating_sub(self.total_micros() + remote);
        self.last = Instant::now();
        self.steps.push(Step { place: Place::Network, name: network.into(), micros });
        self.steps.extend(steps);
    }

    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    pub fn total_micros(&self) -> u64 {
        self.steps.iter().map(|s| s.micros).sum()
    }
}

pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
