//! Who may run the guest: the handshake of one migration as two pure state machines.
//!
//! [`Source`] and [`Destination`] take events and return [actions](SourceAction). They do no I/O, hold no clock and know no
//! payload. The driver carries actions out **in order, each to its end before the next begins**; in particular a `Journal` action has
//! been synced to disk before the following action starts. A crash may fall between any two actions; [`Source::recover`] and
//! [`Destination::recover`] go on from what the journal holds. `tests/model.rs` checks exactly these machines against crashes of
//! either daemon and loss, duplication and reordering of messages. docs/handshake.md has the figure and the table of crashes.

mod destination;
mod source;

pub use destination::{Destination, DestinationAction, DestinationEvent, DestinationState};
pub use source::{Outcome, Source, SourceAction, SourceEvent, SourceState};

use serde::{Deserialize, Serialize};

/// What the source says. The connection carries each with its payload; the machines need only the kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ToDestination {
    /// May this guest come? (identity, sizes, versions, devices)
    Offer,
    /// All memory and every record has been sent.
    Final,
    /// The guest is yours. Said only after the source's journal holds [`SourceRecord::Go`]; repeated on every new connection.
    Go,
    /// The guest is not coming. Answered by [`ToSource::Returned`].
    Abort,
    /// The source's copy is destroyed. Answered by [`ToSource::Bye`].
    Moved,
}

/// What the destination says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ToSource {
    /// The shell domain is there, send the memory.
    Accept,
    /// No, and nothing was kept.
    Refuse,
    /// Everything is restored but the backends' connections, and on disk (with the digest of what was restored).
    Ready,
    /// This migration will never run here: its shell is gone and its I/O finished.
    Returned,
    /// The guest runs here.
    Running,
    /// Nothing is kept of this migration.
    Bye,
}

/// Records of the source's journal, in the order they can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum SourceRecord {
    /// A migration began. Carries what a roll-back after a crash needs.
    Begin,
    /// The guest is about to be paused. Carries what a roll-back after a crash needs.
    Freeze,
    /// The commit: from here on the destination decides.
    Go,
    /// It did not happen: the guest is ours, whatever was undone so far.
    Abort,
    /// Rolled back; only the destination may not know it yet.
    RolledBack,
    /// The destination runs it: our copy must go.
    Done,
    /// Our copy is gone; only the destination may not know it yet.
    Left,
    /// Both sides know; the journal can be deleted.
    Closed,
}

/// Records of the destination's journal, in the order they can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum DestinationRecord {
    /// A shell domain is about to be made.
    Begin,
    /// Restored, and all that the later steps need is in this record or on disk.
    Ready,
    /// `Go` was heard.
    Accepted,
    /// It will never run here.
    Refused,
    /// The point of no return: it will run here.
    Starting,
    /// It has been started.
    Running,
    /// Both sides know; the journal can be deleted.
    Closed,
}

/// Why an operator's wish is not granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Denied {
    #[error("the guest was already handed over; it can't be called back, only the destination can return it")]
    Committed,
    #[error(
        "only the other host knows whether the guest runs there; make sure that it is powered off or cut from disk and network, \
         then say so with --peer-fenced"
    )]
    NotFenced,
    #[error("there is nothing to resolve: this side knows the outcome or can still go back by itself")]
    NothingToResolve,
}
