//! Carrying out one action of the machine, and what is done when it fails.

use super::Run;
use crate::handshake::{DestinationAction, DestinationEvent};
use crate::host::{Crashed, meet};
use crate::source::kebab;
use crate::trouble::{Result, Trouble};

impl Run {
    pub(super) fn act(&mut self, action: DestinationAction) -> std::result::Result<(), Crashed> {
        let name = action_name(action);
        if self.fault(&format!("destination.before.{name}"))? {
            let fault = Trouble::new("planted fault");
            match action {
                DestinationAction::Journal(record) => self.journal_failed(record, fault),
                DestinationAction::Send(_) => self.lose_link(),
                DestinationAction::Prepare | DestinationAction::Restore | DestinationAction::Connect => {
                    self.fail(&name, fault);
                }
                // These are tried until they succeed.
                _ => self.todo.push_front(action),
            }
            return Ok(());
        }
        let event = match action {
            DestinationAction::Journal(record) => {
                if let Err(error) = self.write_journal(record) {
                    self.journal_failed(record, error);
                }
                None
            }
            DestinationAction::Send(word) => {
                self.say(word);
                None
            }
            DestinationAction::Prepare => Some(self.prepare()),
            DestinationAction::Restore => self.stage("restore", Self::restore, DestinationEvent::Restored),
            DestinationAction::Connect => self.stage("connect", Self::connect, DestinationEvent::Connected),
            DestinationAction::Start => self.stubborn("start the guest", Self::start, DestinationEvent::Started),
            DestinationAction::Discard => self.stubborn("remove the shell", Self::discard, DestinationEvent::Discarded),
            DestinationAction::Deny(_) => None,
        };
        self.fault(&format!("destination.after.{name}"))?;
        if let Some(event) = event {
            self.hear(event);
        }
        Ok(())
    }

    fn fault(&mut self, point: &str) -> std::result::Result<bool, Crashed> {
        let faults = self.host.faults.clone();
        meet(&*faults, point, || self.lose_link())
    }

    fn stage(
        &mut self,
        name: &str,
        work: fn(&mut Self) -> Result<()>,
        done: DestinationEvent,
    ) -> Option<DestinationEvent> {
        match work(self) {
            Ok(()) => Some(done),
            Err(error) => {
                self.fail(name, error);
                None
            }
        }
    }

    fn stubborn(
        &mut self,
        name: &str,
        work: fn(&mut Self) -> Result<()>,
        done: DestinationEvent,
    ) -> Option<DestinationEvent> {
        loop {
            match work(self) {
                Ok(()) => {
                    self.show(|i| i.waiting_for = None);
                    return Some(done);
                }
                Err(error) => {
                    tracing::error!("{}: {name}: {error}; trying again", self.title());
                    self.show(|i| i.waiting_for = Some(format!("{name}: {error}")));
                    self.rest();
                }
            }
        }
    }

    pub(super) fn fail(&mut self, what: &str, error: Trouble) {
        tracing::warn!("{}: {what}: {error}", self.title());
        self.why.push(format!("{what}: {error}"));
        self.hear(DestinationEvent::Failed);
    }
}

/// As points of planted faults and in docs/handshake.md.
pub fn action_name(action: DestinationAction) -> String {
    match action {
        DestinationAction::Journal(record) => format!("journal-{}", kebab(&format!("{record:?}"))),
        DestinationAction::Send(word) => format!("send-{}", kebab(&format!("{word:?}"))),
        DestinationAction::Prepare => "prepare".into(),
        DestinationAction::Restore => "restore".into(),
        DestinationAction::Connect => "connect".into(),
        DestinationAction::Start => "start".into(),
        DestinationAction::Discard => "discard".into(),
        DestinationAction::Deny(_) => "deny".into(),
    }
}
