//! What others hold of a running migration.

use super::Input;
use crate::command::{Answer, Command, NotDone};
use crate::handshake::{Denied, SourceEvent, SourceState};
use crate::report::{Progress, Report};
use hypervisor::DomId;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use uuid::Uuid;

/// A hold on a running migration, for whoever watches or commands it.
#[derive(Debug, Clone)]
pub struct Handle {
    pub id: Uuid,
    pub domid: DomId,
    pub name: String,
    pub peer: String,
    pub(super) shared: Arc<Shared>,
    pub(super) input: mpsc::Sender<Input>,
}

#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) progress: Mutex<Progress>,
    pub(super) state: Mutex<Option<SourceState>>,
    pub(super) report: Mutex<Option<Report>>,
}

impl Handle {
    pub fn progress(&self) -> Progress {
        self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The report, once the outcome is known.
    pub fn report(&self) -> Option<Report> {
        self.shared.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// `None` before the first step.
    pub fn state(&self) -> Option<SourceState> {
        *self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing is left to do, not even to tell the destination.
    pub fn is_over(&self) -> bool {
        matches!(self.state(), Some(SourceState::Closed(_)))
    }

    /// Answered at once, or with what it is busy with.
    pub fn cancel(&self) -> std::result::Result<(), NotDone> {
        self.command(Command::new(SourceEvent::Cancel))
    }

    /// As [`Handle::cancel`], but patient: the other host is mostly gone when this is said.
    pub fn resolve(&self, peer_fenced: bool) -> std::result::Result<(), NotDone> {
        self.command(Command::without_peer(SourceEvent::Resolve { peer_fenced }))
    }

    fn command(&self, (command, answer): (Command<SourceEvent>, Answer)) -> std::result::Result<(), NotDone> {
        // A migration whose thread has ended has nothing left to decide.
        self.input.send(Input::Operator(command)).map_err(|_| Denied::NothingToResolve)?;
        answer.wait(|| (self.state().unwrap_or(SourceState::Offering), self.progress().waiting_for))
    }
}
