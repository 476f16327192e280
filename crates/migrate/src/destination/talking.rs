//! Words from and to the source.

use super::{Input, Run};
use crate::guest::Offer;
use crate::handshake::{DestinationAction, DestinationEvent, DestinationState, ToDestination, ToSource};
use crate::report::{Place, Timeline, micros};
use crate::restore::Away;
use crate::source::{GoDetails, StepsDetails, WhyDetails};
use crate::wire::{Frame, Said};
use std::time::Instant;

impl Run {
    pub(super) fn take(&mut self, input: Input) {
        match input {
            Input::Word(link, said) => {
                self.link = Some(link);
                self.word(said);
            }
            Input::Stream(link, piece) => {
                let present = self.link.as_ref().is_some_and(|l| l.is(&link));
                if present
                    && self.machine.state() == DestinationState::Receiving
                    && let Err(error) = self.receive(piece)
                {
                    self.fail("receive memory", error);
                }
            }
            Input::Lost(link) => {
                if self.link.as_ref().is_some_and(|l| l.is(&link)) {
                    self.link = None;
                    self.why.push("the connection was lost".into());
                    self.hear(DestinationEvent::LinkLost);
                }
            }
            Input::Operator(command) if command.is_stale() => {}
            Input::Operator(command) => {
                let peer_fenced = command.what;
                let actions = self.machine.on(DestinationEvent::Resolve { peer_fenced });
                let denied = actions.iter().find_map(|a| match a {
                    DestinationAction::Deny(denied) => Some(*denied),
                    _ => None,
                });
                self.todo.extend(actions);
                command.answer(denied.map_or(Ok(()), Err));
            }
        }
    }

    fn word(&mut self, said: Said<ToDestination>) {
        let state = self.machine.state();
        match (said.word, state) {
            (ToDestination::Offer, DestinationState::Unknown) => {
                match serde_json::from_value::<Offer>(said.details.clone()) {
                    Ok(offer) => {
                        self.see(&offer);
                        self.offer = Some(offer);
                    }
                    Err(error) => {
                        self.why.push(format!("the offer can't be read: {error}"));
                        self.say(ToSource::Refuse);
                        return;
                    }
                }
            }
            (ToDestination::Final, DestinationState::Receiving) => self.timeline = Timeline::start(Place::Destination),
            (ToDestination::Go, DestinationState::Ready) => self.timeline = Timeline::start(Place::Destination),
            (ToDestination::Abort, _) => {
                let details: WhyDetails = serde_json::from_value(said.details).unwrap_or_default();
                self.why.push(format!("the source ended it: {}", details.why.join("; ")));
                self.hear(DestinationEvent::Peer(said.word));
                return;
            }
            _ => {
                self.hear(DestinationEvent::Peer(said.word));
                return;
            }
        }
        if matches!(said.word, ToDestination::Final | ToDestination::Go) {
            // A wrong figure would show in the guest's clocks only.
            let details: GoDetails = match serde_json::from_value(said.details) {
                Ok(details) => details,
                Err(error) => return self.fail("read how long the guest has been away", error.into()),
            };
            self.talks = details.talks;
            match self.host.hypervisor.now() {
                Ok(now) => self.away = Away { away_ns: details.away_ns, at_host_ns: now },
                Err(error) => return self.fail("read the host's time", error.into()),
            }
        }
        self.hear(DestinationEvent::Peer(said.word));
    }

    /// Waits before a step is tried again. What comes meanwhile changes nothing, but an operator wants an answer.
    pub(super) fn rest(&mut self) {
        let until = Instant::now() + self.host.timeouts.reconnect;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            let Ok(input) = self.input.recv_timeout(left) else { return };
            self.take(input);
        }
    }

    pub(super) fn say(&mut self, word: ToSource) {
        let details = match word {
            ToSource::Accept | ToSource::Refuse | ToSource::Returned => {
                serde_json::to_value(WhyDetails { why: self.why.clone(), warnings: self.warnings.clone() })
            }
            ToSource::Ready | ToSource::Running => {
                let digest = self.digest.value();
                let blackout_us = self.blackout_ns / 1000;
                let first_packet_us = self.first_packet.map(micros);
                let steps = self.timeline.steps().to_vec();
                serde_json::to_value(StepsDetails { steps, digest, blackout_us, first_packet_us })
            }
            ToSource::Bye => Ok(serde_json::Value::Null),
        };
        let said = Said { id: self.id, word, details: details.unwrap_or_default() };
        let Some(link) = &self.link else { return };
        if let Err(error) = link.send(&Frame::ToSource(said)) {
            tracing::warn!("{}: say {word:?}: {error}", self.title());
            self.lose_link();
        }
    }

    pub(super) fn lose_link(&mut self) {
        if let Some(link) = self.link.take() {
            link.close();
        }
        self.hear(DestinationEvent::LinkLost);
    }
}
