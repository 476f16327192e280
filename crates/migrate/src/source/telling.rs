//! Progress and the report.

use super::Run;
use crate::handshake::{Outcome, SourceState};
use crate::report::{Ending, Left, Phase, Progress, Report, Timeline, millis};
use std::sync::PoisonError;

impl Run {
    pub(super) fn progress(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn set_phase(&self) {
        let phase = match self.machine.state() {
            SourceState::Offering => Phase::Preflight,
            SourceState::Copying => Phase::Precopy,
            SourceState::Freezing | SourceState::AwaitingReady => Phase::Blackout,
            SourceState::Committed => Phase::Committed,
            SourceState::RollingBack => Phase::RollingBack,
            SourceState::Leaving => Phase::Leaving,
            SourceState::RolledBack | SourceState::Left | SourceState::Closed(_) => Phase::Done,
        };
        self.progress(|p| p.phase = phase);
    }

    fn left(&self) -> Left {
        match self.host.hypervisor.domain_info(self.dom()) {
            Ok(info) if info.uuid != self.guest.identity.uuid || info.dying => Left::Gone,
            Ok(info) if info.shutdown.is_some() => Left::ShutDown,
            Ok(info) if info.paused => Left::Paused,
            Ok(_) => Left::Runs,
            Err(error) if error.is_no_such_domain() => Left::Gone,
            Err(_) => Left::Unknown,
        }
    }

    pub(super) fn report(&mut self, outcome: Outcome) {
        let moved = outcome == Outcome::Moved;
        let ending = match self.ending {
            _ if self.recovered => Ending::Recovered,
            _ if moved => Ending::Moved,
            ending => ending,
        };
        let steps = self.timeline.as_ref().map(|t| t.steps().to_vec()).unwrap_or_default();
        let report = Report {
            id: self.id,
            domid: self.dom().0,
            name: self.guest.identity.name.clone(),
            peer: self.peer.clone(),
            moved,
            error: (!moved).then(|| self.why.clone().unwrap_or_else(|| "the daemon was stopped meanwhile".into())),
            ending,
            warnings: self.warnings.clone(),
            left: self.left(),
            rounds: self.precopy.rounds().to_vec(),
            bytes: self.precopy.total_bytes(),
            total_ms: millis(self.started.elapsed()),
            blackout_us: self.timeline.as_ref().map_or(0, Timeline::total_micros),
            steps,
            silence: self.silence,
        };
        // Whoever asked finds it as it stays.
        self.recording = None;
        match &report.error {
            None => tracing::info!(id = %self.id, "{}: {ending:?}, blackout {} µs", self.title(), report.blackout_us),
            Some(why) => tracing::warn!(id = %self.id, "{}: {ending:?}: {why}", self.title()),
        }
        *self.shared.report.lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
    }
}
