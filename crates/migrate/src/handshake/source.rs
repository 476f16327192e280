//! The source's half.

use super::{Denied, SourceRecord, ToDestination, ToSource};
use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceState {
    /// The destination is looking at the offer; the guest runs.
    Offering,
    /// Memory is being copied; the guest runs.
    Copying,
    /// The guest is paused and its last state is being captured and sent.
    Freezing,
    /// All is sent.
    AwaitingReady,
    /// `Go` is in the journal. The guest stays frozen until the destination has spoken.
    Committed,
    /// `Abort` is in the journal; the guest is being brought back.
    RollingBack,
    /// The guest runs here again (or still). The destination may not know.
    RolledBack,
    /// The destination runs it; our copy is being destroyed.
    Leaving,
    /// Our copy is gone. The destination may not know.
    Left,
    /// Over for both sides.
    Closed(Outcome),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest runs on the destination.
    Moved,
    /// The guest runs on the source.
    Stayed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    Peer(ToSource),
    /// A connection to the destination is there (again).
    LinkUp,
    LinkLost,
    /// Precopy has converged: freeze now.
    PrecopyDone,
    /// Captured and sent, the end included.
    FreezeDone,
    /// Precopy or freeze failed, gave up on a limit, or `Ready` did not come in time or with the wrong digest.
    Failed,
    RolledBack,
    /// The offer has never left this host.
    PeerUnaware,
    Destroyed,
    /// The operator wants it to stop.
    Cancel,
    /// The operator wants the outcome decided here.
    Resolve {
        peer_fenced: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceAction {
    /// Append and sync, before anything that follows.
    Journal(SourceRecord),
    Send(ToDestination),
    Precopy,
    /// Pause the guest, capture, send.
    Freeze,
    /// Undo whatever was done, unpause. Can be repeated.
    RollBack,
    /// Destroy our copy, quarantine its domid. Can be repeated.
    Destroy,
    /// Tell the operator no.
    Deny(Denied),
    /// The operator gets the answer; the machine may still have to inform the destination.
    Report(Outcome),
}

use SourceAction as A;
use SourceEvent as E;
use SourceState as S;

/// The source's state machine; see the [module](super).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    state: SourceState,
}

impl Source {
    /// A new migration, and its first actions.
    pub fn begin() -> (Self, Vec<SourceAction>) {
        (Source { state: S::Offering }, vec![A::Journal(SourceRecord::Begin), A::Send(ToDestination::Offer)])
    }

    /// The machine after a restart of the daemon, from the last whole record of the journal.
    pub fn recover(last: SourceRecord) -> (Self, Vec<SourceAction>) {
        let (state, actions) = match last {
            // `Go` is sent only after its record: without that record no destination can start the guest.
            SourceRecord::Begin | SourceRecord::Freeze => {
                (S::RollingBack, vec![A::Journal(SourceRecord::Abort), A::RollBack])
            }
            SourceRecord::Go => (S::Committed, vec![]),
            SourceRecord::Abort => (S::RollingBack, vec![A::RollBack]),
            SourceRecord::RolledBack => (S::RolledBack, vec![]),
            SourceRecord::Done => (S::Leaving, vec![A::Destroy]),
            SourceRecord::Left => (S::Left, vec![]),
            SourceRecord::Closed => (S::Closed(Outcome::Moved), vec![]),
        };
        (Source { state }, actions)
    }

    pub fn state(&self) -> SourceState {
        self.state
    }

    /// Whether the daemon has to keep trying to reach the destination.
    pub fn needs_link(&self) -> bool {
        !matches!(self.state, S::Closed(_) | S::RollingBack | S::Leaving)
    }

    pub fn on(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        match (self.state, event) {
            (S::Offering, E::Peer(ToSource::Accept)) => self.go_to(S::Copying, [A::Precopy]),
            (S::Copying, E::PrecopyDone) => self.go_to(S::Freezing, [A::Journal(SourceRecord::Freeze), A::Freeze]),
            (S::Freezing, E::FreezeDone) => self.go_to(S::AwaitingReady, [A::Send(ToDestination::Final)]),
            (S::AwaitingReady, E::Peer(ToSource::Ready)) => {
                self.go_to(S::Committed, [A::Journal(SourceRecord::Go), A::Send(ToDestination::Go)])
            }

            // Before the commit every failure, and every word out of turn, goes back.
            (
                S::Offering | S::Copying | S::Freezing | S::AwaitingReady,
                E::LinkLost
                | E::Failed
                | E::Cancel
                | E::Peer(ToSource::Refuse | ToSource::Returned | ToSource::Running | ToSource::Bye),
            ) => self.abort(),

            // After it only the destination's word, or the operator's.
            (S::Committed, E::LinkUp) => vec![A::Send(ToDestination::Go)],
            (S::Committed, E::Peer(ToSource::Running)) => {
                self.go_to(S::Leaving, [A::Journal(SourceRecord::Done), A::Destroy])
            }
            (S::Committed, E::Peer(ToSource::Returned)) => self.abort(),
            (S::Committed, E::Resolve { peer_fenced: true }) => self.abort(),
            (S::Committed, E::Resolve { peer_fenced: false }) => vec![A::Deny(Denied::NotFenced)],
            (_, E::Resolve { .. }) => vec![A::Deny(Denied::NothingToResolve)],
            (S::Committed | S::Leaving | S::Left | S::Closed(Outcome::Moved), E::Cancel) => {
                vec![A::Deny(Denied::Committed)]
            }

            (S::RollingBack, E::RolledBack) => self.go_to(
                S::RolledBack,
                [A::Journal(SourceRecord::RolledBack), A::Report(Outcome::Stayed), A::Send(ToDestination::Abort)],
            ),
            (S::RolledBack, E::LinkUp) => vec![A::Send(ToDestination::Abort)],
            (S::RolledBack, E::PeerUnaware | E::Peer(ToSource::Returned | ToSource::Refuse)) => {
                self.go_to(S::Closed(Outcome::Stayed), [A::Journal(SourceRecord::Closed)])
            }

            (S::Leaving, E::Destroyed) => self.go_to(
                S::Left,
                [A::Journal(SourceRecord::Left), A::Report(Outcome::Moved), A::Send(ToDestination::Moved)],
            ),
            (S::Left, E::LinkUp) => vec![A::Send(ToDestination::Moved)],
            (S::Left, E::Peer(ToSource::Bye)) => {
                self.go_to(S::Closed(Outcome::Moved), [A::Journal(SourceRecord::Closed)])
            }

            // Repeated or late words and losses that change nothing.
            _ => vec![],
        }
    }

    fn abort(&mut self) -> Vec<SourceAction> {
        self.go_to(S::RollingBack, [A::Journal(SourceRecord::Abort), A::RollBack])
    }

    fn go_to<const N: usize>(&mut self, state: SourceState, actions: [SourceAction; N]) -> Vec<SourceAction> {
        self.state = state;
        actions.into()
    }
}
