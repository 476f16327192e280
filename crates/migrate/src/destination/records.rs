//! What the journal's records hold, and what follows from one that can't be written.

use super::Run;
use crate::guest::{Grants, GuestState, Offer};
use crate::handshake::{Destination, DestinationAction, DestinationRecord};
use crate::journal::Journal;
use crate::restore::Away;
use crate::toolstack::Luggage;
use crate::trouble::{Result, Trouble};
use serde::{Deserialize, Serialize};

/// What the journal's `Begin` and `Refused` hold.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Begin {
    pub(super) offer: Offer,
    /// The domain under the offer's domid is this migration's shell.
    pub(super) shell_is_ours: bool,
}

/// What the journal's `Ready` holds: all that is needed from then on.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) state: GuestState,
    pub(super) luggage: Luggage,
    /// Should `Go` never be heard, but the source be fenced.
    pub(super) away: Away,
}

impl Run {
    pub(super) fn begin(&self) -> Result<Vec<u8>> {
        let offer = self.offer.clone().ok_or_else(|| Trouble::new("there is no offer"))?;
        Ok(serde_json::to_vec(&Begin { offer, shell_is_ours: self.shell_is_ours })?)
    }

    pub(super) fn write_journal(&mut self, record: DestinationRecord) -> Result<()> {
        let payload = match record {
            DestinationRecord::Begin => self.begin()?,
            DestinationRecord::Ready => {
                let (state, luggage) = self.restored.as_ref().ok_or_else(|| Trouble::new("nothing was restored"))?;
                // What has been put into the domain already is there as long as the domain is.
                let state = GuestState { grants: Grants::default(), shared_info: None, ..state.clone() };
                serde_json::to_vec(&Kept { state, luggage: luggage.clone(), away: self.away })?
            }
            DestinationRecord::Accepted => serde_json::to_vec(&self.away)?,
            DestinationRecord::Refused => self.why.join("; ").into_bytes(),
            _ => Vec::new(),
        };
        self.append(record, &payload)?;
        match record {
            DestinationRecord::Ready => self.timeline.mark("write what was restored to disk"),
            DestinationRecord::Accepted => self.timeline.mark("write the commit to disk"),
            DestinationRecord::Starting => self.timeline.mark("write the start to disk"),
            _ => {}
        }
        Ok(())
    }

    pub(super) fn append(&mut self, record: DestinationRecord, payload: &[u8]) -> Result<()> {
        if self.journal.is_none() {
            // `Closed` for an offer that was refused at once needs no file.
            if record == DestinationRecord::Closed {
                return Ok(());
            }
            self.journal = Some(Journal::create(&self.host.journals, self.id)?);
        }
        match &mut self.journal {
            Some(journal) => Ok(journal.append(record, payload)?),
            None => Ok(()),
        }
    }

    /// Nothing may follow a record that is not on disk.
    pub(super) fn journal_failed(&mut self, record: DestinationRecord, error: Trouble) {
        tracing::error!("{}: {error}", self.title());
        self.why.push(format!("write the journal: {error}"));
        match record {
            // Not started, so it may still be refused; without a record an unknown id is refused too.
            DestinationRecord::Begin
            | DestinationRecord::Ready
            | DestinationRecord::Accepted
            | DestinationRecord::Starting => {
                self.todo.clear();
                let (machine, actions) = Destination::recover(DestinationRecord::Begin);
                self.machine = machine;
                // Not to be found as accepted after a restart. Before Begin there is nothing to be found.
                let write = record != DestinationRecord::Begin;
                self.todo.extend(actions.into_iter().filter(|a| write || !matches!(a, DestinationAction::Journal(_))));
            }
            DestinationRecord::Refused | DestinationRecord::Running | DestinationRecord::Closed => {}
        }
    }
}
