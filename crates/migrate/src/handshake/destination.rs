//! The destination's half.

use super::{Denied, DestinationRecord, ToDestination, ToSource};
use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DestinationState {
    /// Nothing is known of this migration: never heard of, or over for both sides.
    Unknown,
    /// Checking the offer and making the shell domain.
    Preparing,
    /// Memory is coming in.
    Receiving,
    /// All is there and being restored.
    Restoring,
    /// Restored and on disk; waits for `Go` or `Abort`, for as long as it takes.
    Ready,
    /// `Go` was heard; backends are being connected.
    Connecting,
    /// The point of no return has passed; the guest is being unpaused.
    Starting,
    Running,
    /// It will never run here; the shell is being destroyed.
    Discarding {
        /// The source knows: it said so itself, or it is answered as for an id that is unknown.
        source_knows: bool,
    },
    /// It will never run here, and nothing of it is left.
    Refused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DestinationEvent {
    Peer(ToDestination),
    LinkLost,
    /// The shell is there.
    Prepared,
    /// The preflight refused; nothing was made.
    Unfit,
    Restored,
    Connected,
    Started,
    Discarded,
    /// Receiving, restoring or connecting failed.
    Failed,
    /// The operator wants the outcome decided here.
    Resolve {
        peer_fenced: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DestinationAction {
    /// Append and sync, before anything that follows.
    Journal(DestinationRecord),
    Send(ToSource),
    /// Preflight, then make the shell domain.
    Prepare,
    Restore,
    /// Connect backends, store and console, set clocks. Can be repeated.
    Connect,
    /// Unpause, arm watchdogs, announce. Can be repeated.
    Start,
    /// Finish I/O, destroy the shell. Can be repeated, also when there is none.
    Discard,
    /// Tell the operator no.
    Deny(Denied),
}

use DestinationAction as A;
use DestinationEvent as E;
use DestinationState as S;

/// The destination's state machine; see the [module](super).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Destination {
    state: DestinationState,
}

impl Default for Destination {
    fn default() -> Self {
        Self::unknown()
    }
}

impl Destination {
    /// The machine for an id that no journal knows: it takes an offer, and answers late words so that the source can end.
    pub fn unknown() -> Self {
        Destination { state: S::Unknown }
    }

    /// The machine after a restart of the daemon, from the last whole record of the journal.
    pub fn recover(last: DestinationRecord) -> (Self, Vec<DestinationAction>) {
        let (state, actions) = match last {
            // What was received went with the daemon.
            DestinationRecord::Begin => {
                (S::Discarding { source_knows: false }, vec![A::Journal(DestinationRecord::Refused), A::Discard])
            }
            DestinationRecord::Ready => (S::Ready, vec![]),
            DestinationRecord::Accepted => (S::Connecting, vec![A::Connect]),
            DestinationRecord::Refused => (S::Discarding { source_knows: true }, vec![A::Discard]),
            DestinationRecord::Starting => (S::Starting, vec![A::Start]),
            DestinationRecord::Running => (S::Running, vec![]),
            DestinationRecord::Closed => (S::Unknown, vec![]),
        };
        (Destination { state }, actions)
    }

    pub fn state(&self) -> DestinationState {
        self.state
    }

    pub fn on(&mut self, event: DestinationEvent) -> Vec<DestinationAction> {
        match (self.state, event) {
            (S::Unknown, E::Peer(ToDestination::Offer)) => {
                self.go_to(S::Preparing, [A::Journal(DestinationRecord::Begin), A::Prepare])
            }
            (S::Preparing, E::Prepared) => self.go_to(S::Receiving, [A::Send(ToSource::Accept)]),
            (S::Preparing, E::Unfit) => {
                self.go_to(S::Unknown, [A::Journal(DestinationRecord::Closed), A::Send(ToSource::Refuse)])
            }
            (S::Receiving, E::Peer(ToDestination::Final)) => self.go_to(S::Restoring, [A::Restore]),
            (S::Restoring, E::Restored) => {
                self.go_to(S::Ready, [A::Journal(DestinationRecord::Ready), A::Send(ToSource::Ready)])
            }
            (S::Ready, E::Peer(ToDestination::Go)) => {
                self.go_to(S::Connecting, [A::Journal(DestinationRecord::Accepted), A::Connect])
            }
            // The source is gone for good and we have all of the guest.
            (S::Ready, E::Resolve { peer_fenced: true }) => {
                self.go_to(S::Connecting, [A::Journal(DestinationRecord::Accepted), A::Connect])
            }
            (S::Ready, E::Resolve { peer_fenced: false }) => vec![A::Deny(Denied::NotFenced)],
            (_, E::Resolve { .. }) => vec![A::Deny(Denied::NothingToResolve)],
            (S::Connecting, E::Connected) => {
                self.go_to(S::Starting, [A::Journal(DestinationRecord::Starting), A::Start])
            }
            (S::Starting, E::Started) => {
                self.go_to(S::Running, [A::Journal(DestinationRecord::Running), A::Send(ToSource::Running)])
            }
            (S::Running, E::Peer(ToDestination::Go)) => vec![A::Send(ToSource::Running)],
            (S::Running, E::Peer(ToDestination::Moved)) => {
                self.go_to(S::Unknown, [A::Journal(DestinationRecord::Closed), A::Send(ToSource::Bye)])
            }

            // An incomplete copy is worth nothing without its source; `Go` for it can't be genuine.
            (S::Preparing | S::Receiving | S::Restoring, E::LinkLost | E::Failed | E::Peer(ToDestination::Go))
            | (S::Connecting, E::Failed) => self.discard(false),
            (
                S::Preparing | S::Receiving | S::Restoring | S::Ready | S::Connecting,
                E::Peer(ToDestination::Abort | ToDestination::Moved),
            ) => self.discard(true),
            (S::Discarding { source_knows: false }, E::Discarded) => {
                self.go_to(S::Refused, [A::Send(ToSource::Returned)])
            }
            (S::Discarding { source_knows: true }, E::Discarded) => {
                self.go_to(S::Unknown, [A::Journal(DestinationRecord::Closed), A::Send(ToSource::Returned)])
            }
            (S::Refused, E::Peer(ToDestination::Go)) => vec![A::Send(ToSource::Returned)],
            (S::Refused, E::Peer(ToDestination::Abort)) => {
                self.go_to(S::Unknown, [A::Journal(DestinationRecord::Closed), A::Send(ToSource::Returned)])
            }
            (S::Refused, E::Peer(ToDestination::Offer)) => vec![A::Send(ToSource::Refuse)],

            // Forgotten, or the journal's folder was lost: what has no record never runs here.
            (S::Unknown, E::Peer(ToDestination::Go | ToDestination::Abort)) => vec![A::Send(ToSource::Returned)],
            (S::Unknown, E::Peer(ToDestination::Moved)) => vec![A::Send(ToSource::Bye)],

            _ => vec![],
        }
    }

    fn discard(&mut self, source_knows: bool) -> Vec<DestinationAction> {
        self.go_to(S::Discarding { source_knows }, [A::Journal(DestinationRecord::Refused), A::Discard])
    }

    fn go_to<const N: usize>(
        &mut self,
        state: DestinationState,
        actions: [DestinationAction; N],
    ) -> Vec<DestinationAction> {
        self.state = state;
        actions.into()
    }
}
