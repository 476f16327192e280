//! Connections of sources, and which migration their words are for.

use super::{Destinations, Input, Run};
use crate::handshake::{Destination, DestinationAction, DestinationEvent, ToDestination, ToSource};
use crate::link::{Link, Sender};
use crate::source::WhyDetails;
use crate::wire::{Frame, Said};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;

impl Destinations {
    /// Serves one connection until it ends.
    pub fn serve(&self, link: Link) {
        let (sender, mut receiver) = match link.greet() {
            Ok(halves) => halves,
            Err(error) => {
                tracing::warn!("a connection was refused: {error}");
                return;
            }
        };
        // The migration whose image this connection carries, and those it has talked about.
        let mut image: Option<SyncSender<Input>> = None;
        let mut known: Vec<SyncSender<Input>> = Vec::new();
        let ended = loop {
            if self.crashed.load(Ordering::SeqCst) {
                break "crash, as planted".into();
            }
            match receiver.receive() {
                Ok(_) | Err(_) if self.crashed.load(Ordering::SeqCst) => {}
                Ok(Some(Frame::Ping(number))) => {
                    if let Err(error) = sender.send(&Frame::Pong(number)) {
                        break error.to_string();
                    }
                }
                Ok(Some(Frame::Pong(_))) => {}
                Ok(Some(Frame::Stream(piece))) => match &image {
                    Some(tx) if tx.send(Input::Stream(sender.clone(), piece)).is_ok() => {}
                    _ => break "memory without an offer that was accepted".into(),
                },
                Ok(Some(Frame::ToDestination(said))) => {
                    let is_offer = said.word == ToDestination::Offer;
                    let Some(tx) = self.dispatch(&sender, said) else { continue };
                    if is_offer {
                        image = Some(tx.clone());
                    }
                    known.push(tx);
                    // A connection is about one migration; a peer that goes through ids keeps no memory here.
                    if known.len() > 4 {
                        known.remove(0);
                    }
                }
                Ok(Some(Frame::ToSource(_))) => break "it said something that only a destination says".into(),
                Ok(None) => break "closed by the source".into(),
                Err(error) => break error.to_string(),
            }
        };
        tracing::info!("a connection has ended: {ended}");
        sender.close();
        for tx in known {
            let _ = tx.send(Input::Lost(sender.clone()));
        }
    }

    /// Hands a word to its migration, or answers it here if there is none.
    fn dispatch(&self, sender: &Sender, said: Said<ToDestination>) -> Option<SyncSender<Input>> {
        let found = {
            let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            running.get(&said.id).map(|(tx, _)| tx.clone()).ok_or(running.len())
        };
        let tx = match found {
            Ok(tx) => tx,
            Err(count) if said.word == ToDestination::Offer && count < self.host.max_incoming => {
                let run = Run::new(&self.host, said.id, Destination::unknown(), Vec::new());
                let tx = run.input_tx.clone();
                // Before there is a thread: one that hears nothing for a while ends, however long this host stands still just now.
                tx.send(Input::Word(sender.clone(), said)).ok()?;
                self.spawn(run);
                return Some(tx);
            }
            Err(_) => {
                self.answer_unknown(sender, said);
                return None;
            }
        };
        tx.send(Input::Word(sender.clone(), said)).ok()?;
        Some(tx)
    }

    fn answer_unknown(&self, sender: &Sender, said: Said<ToDestination>) {
        let (word, why) = if said.word == ToDestination::Offer {
            (ToSource::Refuse, "as many guests as are allowed are coming in already; try again later")
        } else {
            let actions = Destination::unknown().on(DestinationEvent::Peer(said.word));
            let Some(DestinationAction::Send(word)) = actions.into_iter().next() else { return };
            (word, "this host knows nothing of this migration, so it will never run here")
        };
        let details =
            serde_json::to_value(WhyDetails { why: vec![why.into()], warnings: Vec::new() }).unwrap_or_default();
        if let Err(error) = sender.send(&Frame::ToSource(Said { id: said.id, word, details })) {
            tracing::info!("answer about an unknown migration: {error}");
        }
    }
}
