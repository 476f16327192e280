//! What an operator says to a migration that is under way, and the answer, which comes at once or not at all.

use crate::handshake::Denied;
use std::fmt::Debug;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// A command that was not taken up within this time is not taken up any more: whoever said so may have changed his mind, or the other
/// host is not fenced any longer.
const TAKEN_UP: Duration = Duration::from_secs(2);
/// The same for one that is said when the other host is gone: an attempt to reach it takes up to 20 s (connecting and greeting), and
/// nothing is taken up meanwhile.
const TAKEN_UP_WITHOUT_PEER: Duration = Duration::from_secs(25);
/// An answer may come so much after it.
const GRACE: Duration = Duration::from_millis(500);

/// Why a command has done nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotDone {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(
        "its migration is in the middle of a step ({state}{waiting_for}), so the command was not taken up; `ferry status` shows how it goes \
         on, ferryd's log what a step that does not end waits for; say it again then"
    )]
    Busy {
        state: String,
        /// Empty, or with a colon before.
        waiting_for: String,
    },
}

/// One command on its way to the migration's thread.
#[derive(Debug)]
pub(crate) struct Command<T> {
    pub what: T,
    until: Instant,
    answer: mpsc::Sender<Result<(), Denied>>,
}

/// Where its answer comes.
#[derive(Debug)]
pub(crate) struct Answer {
    answered: mpsc::Receiver<Result<(), Denied>>,
    time: Duration,
}

impl<T> Command<T> {
    pub fn new(what: T) -> (Self, Answer) {
        Command::within(what, TAKEN_UP)
    }

    /// One that is said when the other host can't be reached.
    pub fn without_peer(what: T) -> (Self, Answer) {
        Command::within(what, TAKEN_UP_WITHOUT_PEER)
    }

    fn within(what: T, time: Duration) -> (Self, Answer) {
        let (answer, answered) = mpsc::channel();
        (Command { what, until: Instant::now() + time, answer }, Answer { answered, time })
    }

    /// Nobody expects it to do anything any more.
    pub fn is_stale(&self) -> bool {
        Instant::now() >= self.until
    }

    pub fn answer(self, answer: Result<(), Denied>) {
        let _ = self.answer.send(answer);
    }
}

impl Answer {
    /// `look` tells the migration's state and what it waits for, if there is no answer.
    pub fn wait<S: Debug>(self, look: impl FnOnce() -> (S, Option<String>)) -> Result<(), NotDone> {
        match self.answered.recv_timeout(self.time + GRACE) {
            Ok(answer) => Ok(answer?),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(busy(look())),
            // A migration whose thread has ended has nothing left to decide; one that was too busy for it has said nothing.
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(Denied::NothingToResolve.into()),
        }
    }
}

/// The answer in place of a migration that gives none.
pub(crate) fn busy<S: Debug>((state, waiting_for): (S, Option<String>)) -> NotDone {
    let waiting_for = waiting_for.map(|what| format!(": {what}")).unwrap_or_default();
    NotDone::Busy { state: crate::source::kebab(&format!("{state:?}")), waiting_for }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_gets_stale() {
        let (command, answer) = Command::new(7);
        assert!(!command.is_stale());
        command.answer(Err(Denied::NotFenced));
        assert_eq!(answer.wait(|| ((), None)), Err(NotDone::Denied(Denied::NotFenced)));
        let (command, _answer) = Command::within(7, Duration::ZERO);
        assert!(command.is_stale());
    }

    #[test]
    fn no_answer_is_said_to_be_none() {
        let (_command, answer) = Command::new(7);
        let since = Instant::now();
        let error =
            answer.wait(|| (crate::handshake::SourceState::RollingBack, Some("roll back: x".into()))).unwrap_err();
        assert!(error.to_string().contains("(rolling-back: roll back: x)"), "{error}");
        assert!(since.elapsed() < Duration::from_secs(10));
    }
}
