//! What the journal's records hold, and what follows from one that can't be written.

use super::Run;
use crate::guest::Offer;
use crate::handshake::{Outcome, Source, SourceAction, SourceRecord};
use crate::journal::Journal;
use crate::trouble::{Result, Trouble};
use hypervisor::Watchdog;
use serde::{Deserialize, Serialize};

/// What the journal's `Begin` holds.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Begin {
    pub(super) peer: String,
    pub(super) offer: Offer,
}

/// What the journal's `Freeze` holds: all that a roll-back has to know besides.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Freeze {
    /// As they were at the pause, and the host's time then.
    pub(super) watchdogs: Vec<Watchdog>,
    pub(super) paused_at_ns: u64,
}

impl Run {
    pub(super) fn write_journal(&mut self, record: SourceRecord) -> Result<()> {
        let payload = match record {
            SourceRecord::Begin => serde_json::to_vec(&Begin { peer: self.peer.clone(), offer: self.offer.clone() })?,
            // Before the pause there is nothing to undo, whatever a daemon that is started again has to assume.
            SourceRecord::Freeze | SourceRecord::Go => {
                serde_json::to_vec(self.freeze.as_ref().unwrap_or(&Freeze::default()))?
            }
            SourceRecord::Abort => self.why.clone().unwrap_or_default().into_bytes(),
            _ => Vec::new(),
        };
        if self.journal.is_none() {
            self.journal = Some(Journal::create(&self.host.journals, self.id)?);
        }
        if let Some(journal) = &mut self.journal {
            journal.append(record, &payload)?;
        }
        if record == SourceRecord::Go
            && let Some(timeline) = &mut self.timeline
        {
            timeline.mark("write the commit to disk");
        }
        Ok(())
    }

    /// Nothing may follow a record that is not on disk.
    pub(super) fn journal_failed(&mut self, record: SourceRecord, error: Trouble) {
        tracing::error!("{}: {error}", self.title());
        self.why.get_or_insert_with(|| format!("write the journal: {error}"));
        self.todo.clear();
        match record {
            // Go has not been sent, so this side may still decide, and remembers that it does. Before Begin there is nothing to remember.
            SourceRecord::Begin | SourceRecord::Freeze | SourceRecord::Go => {
                let known = if record == SourceRecord::Begin { SourceRecord::Abort } else { SourceRecord::Begin };
                let (machine, actions) = Source::recover(known);
                self.machine = machine;
                self.todo.extend(actions);
            }
            // What the record would say is true all the same; a daemon that is started again does it once more.
            SourceRecord::Abort => self.todo.extend([SourceAction::RollBack]),
            SourceRecord::Done => self.todo.extend([SourceAction::Destroy]),
            SourceRecord::RolledBack => self.todo.extend([SourceAction::Report(Outcome::Stayed)]),
            SourceRecord::Left => self.todo.extend([SourceAction::Report(Outcome::Moved)]),
            SourceRecord::Closed => {}
        }
    }
}
