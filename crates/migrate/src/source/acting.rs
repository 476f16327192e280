//! Carrying out one action of the machine, and what is done when it fails.

use super::Run;
use crate::handshake::{SourceAction, SourceEvent};
use crate::host::{Crashed, meet};
use crate::trouble::{Result, Trouble};

impl Run {
    pub(super) fn act(&mut self, action: SourceAction) -> std::result::Result<(), Crashed> {
        let name = action_name(action);
        if self.fault(&format!("source.before.{name}"))? {
            let fault = Trouble::new("planted fault");
            match action {
                SourceAction::Journal(record) => self.journal_failed(record, fault),
                SourceAction::Send(_) => self.lost(fault.to_string()),
                SourceAction::Precopy | SourceAction::Freeze => self.failed(&name, fault),
                // These are tried until they succeed.
                _ => self.todo.push_front(action),
            }
            return Ok(());
        }
        self.set_phase();
        let event = match action {
            SourceAction::Journal(record) => {
                if let Err(error) = self.write_journal(record) {
                    self.journal_failed(record, error);
                }
                None
            }
            SourceAction::Send(word) => {
                if let Err(error) = self.say(word) {
                    self.lost(error.to_string());
                }
                None
            }
            SourceAction::Precopy => self.stage("precopy", Self::precopy, SourceEvent::PrecopyDone),
            SourceAction::Freeze => self.stage("freeze", Self::freeze, SourceEvent::FreezeDone),
            SourceAction::RollBack => self.stubborn("roll back", Self::roll_back, SourceEvent::RolledBack),
            SourceAction::Destroy => {
                self.stubborn("remove what is left of the guest", Self::destroy, SourceEvent::Destroyed)
            }
            SourceAction::Deny(_) => None,
            SourceAction::Report(outcome) => {
                self.report(outcome);
                None
            }
        };
        self.fault(&format!("source.after.{name}"))?;
        if let Some(event) = event {
            self.hear(event);
        }
        Ok(())
    }

    /// A planted fault; `true`: the action shall fail.
    fn fault(&mut self, point: &str) -> std::result::Result<bool, Crashed> {
        let faults = self.host.faults.clone();
        meet(&*faults, point, || self.lost("planted fault".into()))
    }

    /// A stage that may fail: then the guest stays.
    fn stage(&mut self, name: &str, work: fn(&mut Self) -> Result<()>, done: SourceEvent) -> Option<SourceEvent> {
        match work(self) {
            Ok(()) => Some(done),
            Err(error) => {
                self.failed(name, error);
                None
            }
        }
    }

    fn failed(&mut self, stage: &str, error: Trouble) {
        tracing::warn!("{}: {stage}: {error}", self.title());
        if self.why.is_none() {
            self.why = Some(format!("{stage}: {error}"));
        }
        self.hear(SourceEvent::Failed);
    }

    /// A stage that must succeed in the end: it is tried until it does.
    fn stubborn(&mut self, name: &str, work: fn(&mut Self) -> Result<()>, done: SourceEvent) -> Option<SourceEvent> {
        loop {
            match work(self) {
                Ok(()) => {
                    self.progress(|p| p.waiting_for = None);
                    return Some(done);
                }
                Err(error) => {
                    tracing::error!("{}: {name}: {error}; trying again", self.title());
                    self.progress(|p| p.waiting_for = Some(format!("{name}: {error}")));
                    self.rest();
                }
            }
        }
    }
}

/// `journal-go`, `send-offer`, `precopy`: as points of planted faults and in docs/handshake.md.
pub fn action_name(action: SourceAction) -> String {
    match action {
        SourceAction::Journal(record) => format!("journal-{}", kebab(&format!("{record:?}"))),
        SourceAction::Send(word) => format!("send-{}", kebab(&format!("{word:?}"))),
        SourceAction::Precopy => "precopy".into(),
        SourceAction::Freeze => "freeze".into(),
        SourceAction::RollBack => "roll-back".into(),
        SourceAction::Destroy => "destroy".into(),
        SourceAction::Deny(_) => "deny".into(),
        SourceAction::Report(_) => "report".into(),
    }
}

/// `RolledBack` → `rolled-back`.
pub(crate) fn kebab(camel: &str) -> String {
    let mut out = String::new();
    for c in camel.chars() {
        if c.is_ascii_uppercase() && !out.is_empty() {
            out.push('-');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}
