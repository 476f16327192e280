//! The connection to the destination: words and pings, losing it and making it again, and waiting for what comes.

use super::offering::unreachable_peer;
use super::{GoDetails, Input, LEAST_PAUSE, PING_EVERY, REPEAT_AFTER, Run, StepsDetails, WhyDetails};
use crate::handshake::{Denied, SourceAction, SourceEvent, SourceState, ToDestination, ToSource};
use crate::report::{Ending, Silence, Timeline};
use crate::trouble::{Doing, Result, Trouble};
use crate::wire::{Frame, Said};
use std::time::{Duration, Instant};

impl Run {
    pub(super) fn say(&mut self, word: ToDestination) -> Result<()> {
        // What the encoder has flushed may go off with this word only.
        let _until_written = self.fuse.take();
        let details = match word {
            ToDestination::Offer => {
                self.connect()?;
                serde_json::to_value(&self.offer)?
            }
            ToDestination::Final | ToDestination::Go => {
                let away_ns = self.away_ns()?.saturating_add(self.half_round_trip_ns());
                serde_json::to_value(GoDetails { away_ns, talks: self.silent_before.is_some() })?
            }
            ToDestination::Abort => {
                serde_json::to_value(WhyDetails { why: self.why.clone().into_iter().collect(), warnings: Vec::new() })?
            }
            ToDestination::Moved => serde_json::Value::Null,
        };
        self.last_said = Instant::now();
        let link = self.link.as_ref().ok_or_else(|| Trouble::new("there is no connection"))?;
        link.send(&Frame::ToDestination(Said { id: self.id, word, details }))?;
        if word == ToDestination::Final
            && let Some(timeline) = &mut self.timeline
        {
            timeline.mark("send the last pages and the state");
        }
        Ok(())
    }

    fn away_ns(&self) -> Result<u64> {
        let since = self.freeze.as_ref().map_or(self.paused_at_ns, |f| f.paused_at_ns);
        Ok(self.host.hypervisor.now()?.saturating_sub(since))
    }

    fn half_round_trip_ns(&self) -> u64 {
        self.round_trip.map_or(0, |rtt| u64::try_from(rtt.as_nanos() / 2).unwrap_or(0))
    }

    fn connect(&mut self) -> Result<()> {
        let peer = &self.peer;
        let link = self.host.connector.connect(peer).map_err(|e| unreachable_peer(peer, e))?;
        let (sender, mut receiver) = link.greet().doing(format!("talk to {peer}"))?;
        let (tx, reply_to) = (self.input_tx.clone(), sender.clone());
        std::thread::Builder::new().name("from-destination".into()).spawn(move || {
            let lost = loop {
                match receiver.receive() {
                    Ok(Some(Frame::Ping(number))) => {
                        if let Err(error) = reply_to.send(&Frame::Pong(number)) {
                            break error.to_string();
                        }
                    }
                    Ok(Some(frame)) => {
                        if tx.send(Input::Frame(reply_to.clone(), frame)).is_err() {
                            break "the migration is over".into();
                        }
                    }
                    Ok(None) => break "the destination closed it".into(),
                    Err(error) => break error.to_string(),
                }
            };
            reply_to.close();
            let _ = tx.send(Input::Lost(reply_to, lost));
        })?;
        self.last_heard = Instant::now();
        self.pings.clear();
        self.link = Some(sender);
        self.connected = true;
        self.ping();
        Ok(())
    }

    fn ping(&mut self) {
        if let Err(error) = self.send_ping() {
            self.lost(error.to_string());
        }
    }

    /// Gives the ping's number.
    pub(super) fn send_ping(&mut self) -> Result<u64> {
        let number = self.pings.back().map_or(0, |(n, _)| n + 1);
        self.last_ping = Instant::now();
        self.pings.push_back((number, self.last_ping));
        if let Some(link) = &self.link {
            link.send(&Frame::Ping(number))?;
        }
        Ok(number)
    }

    pub(super) fn drop_link(&mut self) {
        if let Some(link) = self.link.take() {
            link.close();
        }
    }

    pub(super) fn lost(&mut self, why: String) {
        let had_link = self.link.is_some();
        self.drop_link();
        let before_commit = matches!(
            self.machine.state(),
            SourceState::Offering | SourceState::Copying | SourceState::Freezing | SourceState::AwaitingReady
        );
        if before_commit {
            self.why.get_or_insert_with(|| why.clone());
        }
        if had_link || before_commit {
            tracing::warn!("{}: connection to {} lost: {why}", self.title(), self.peer);
            self.hear(SourceEvent::LinkLost);
        }
    }

    /// The next event, or `None` when nothing came of what came.
    pub(super) fn wait(&mut self) -> Option<SourceEvent> {
        if self.machine.state() == SourceState::RolledBack && !self.connected {
            return Some(SourceEvent::PeerUnaware);
        }
        if self.link.is_none() && self.machine.needs_link() {
            self.progress_waiting();
            match self.connect() {
                Ok(()) => return Some(SourceEvent::LinkUp),
                Err(error) => tracing::info!("{}: {error}", self.title()),
            }
        }
        // With the guest paused, not a second longer than it must.
        let pause = self.host.timeouts.reconnect;
        let pause = self.limit().map_or(pause, |limit| pause.min(limit.saturating_sub(self.waiting_since.elapsed())));
        match self.input.recv_timeout(pause.max(LEAST_PAUSE)) {
            Ok(input) => self.take(input),
            Err(_) => None,
        }
    }

    fn progress_waiting(&self) {
        let peer = self.peer.clone();
        self.progress(|p| p.waiting_for = Some(format!("{peer} can't be reached; trying again")));
    }

    /// How long the destination has for its answer.
    fn limit(&self) -> Option<Duration> {
        match self.machine.state() {
            SourceState::Offering => Some(self.host.timeouts.accept),
            // It counts from the pause, of which a part was over when this wait began.
            SourceState::AwaitingReady => {
                let before = self.away().saturating_sub(self.waiting_since.elapsed());
                Some(self.precopy.until_restored(self.host.timeouts.ready).saturating_sub(before))
            }
            _ => None,
        }
    }

    /// How long the guest has been paused.
    pub(super) fn away(&self) -> Duration {
        self.timeline.as_ref().map(Timeline::elapsed).unwrap_or_default()
    }

    /// Time passes while waiting for the peer, also while that says what changes nothing.
    pub(super) fn tick(&mut self) -> Option<SourceEvent> {
        let timeouts = self.host.timeouts;
        if let Some(limit) = self.limit()
            && self.waiting_since.elapsed() >= limit
        {
            let why = if self.machine.state() == SourceState::AwaitingReady {
                self.ending = Ending::GivenUp;
                format!(
                    "{} had not restored the guest {} ms after its pause, so the blackout would be longer than its limit allows; raise \
                     --downtime-limit, or look what keeps that host busy",
                    self.peer,
                    self.away().as_millis()
                )
            } else {
                format!("{} did not answer in {limit:?}", self.peer)
            };
            self.why.get_or_insert(why);
            return Some(SourceEvent::Failed);
        }
        if self.link.is_some() {
            // A word may have reached a migration's thread that was just ending; saying it again does no harm.
            let unanswered =
                matches!(self.machine.state(), SourceState::Committed | SourceState::RolledBack | SourceState::Left);
            if unanswered && self.last_said.elapsed() > timeouts.reconnect * REPEAT_AFTER {
                return Some(SourceEvent::LinkUp);
            }
            // A ping that is not answered yet may have been sent late, by a step that took long.
            let unanswered_for = self.pings.front().map(|(_, sent)| sent.elapsed()).unwrap_or_default();
            let paused = self.machine.state() == SourceState::AwaitingReady;
            let silence = if paused { timeouts.silence.min(timeouts.silence_paused) } else { timeouts.silence };
            if self.last_heard.elapsed().min(unanswered_for) > silence {
                self.lost(format!("nothing heard for {silence:?}"));
                return None;
            }
            if self.last_ping.elapsed() > PING_EVERY {
                self.ping();
            }
        }
        None
    }

    fn take(&mut self, input: Input) -> Option<SourceEvent> {
        match input {
            Input::Operator(command) if command.is_stale() => None,
            Input::Operator(command) => {
                let event = command.what;
                let before = self.machine.state();
                let actions = self.machine.on(event);
                let denied = actions.iter().find_map(|a| match a {
                    SourceAction::Deny(denied) => Some(*denied),
                    _ => None,
                });
                if denied.is_none() && before != self.machine.state() {
                    match event {
                        SourceEvent::Cancel => {
                            self.ending = Ending::GivenUp;
                            self.why.get_or_insert_with(|| "cancelled by the operator".into());
                        }
                        SourceEvent::Resolve { .. } => {
                            self.ending = Ending::Recovered;
                            self.why = Some("the operator has stated that the destination is fenced".into());
                        }
                        _ => {}
                    }
                }
                self.todo.extend(actions);
                command.answer(denied.map_or(Ok(()), Err));
                None
            }
            Input::Lost(link, why) => {
                // Only the present connection counts.
                if self.link.as_ref().is_some_and(|present| present.is(&link)) {
                    self.lost(why);
                }
                None
            }
            Input::Frame(link, frame) => {
                if !self.link.as_ref().is_some_and(|present| present.is(&link)) {
                    return None;
                }
                self.last_heard = Instant::now();
                match frame {
                    Frame::Pong(number) if self.pong(number) => None,
                    Frame::ToSource(said) if said.id == self.id => self.word(said),
                    _ => {
                        self.lost("the peer said something that a destination does not say".into());
                        None
                    }
                }
            }
        }
    }

    /// `false`: nobody asked for it. A peer that says more than it was asked would fill this host's memory.
    fn pong(&mut self, number: u64) -> bool {
        while let Some((sent_number, sent)) = self.pings.pop_front() {
            if sent_number == number {
                let rtt = sent.elapsed();
                self.round_trip = Some(self.round_trip.map_or(rtt, |best| best.min(rtt)));
                return true;
            }
        }
        false
    }

    fn word(&mut self, said: Said<ToSource>) -> Option<SourceEvent> {
        let steps = || serde_json::from_value::<StepsDetails>(said.details.clone()).unwrap_or_default();
        let why = || serde_json::from_value::<WhyDetails>(said.details.clone()).unwrap_or_default().why.join("; ");
        match (said.word, self.machine.state()) {
            (ToSource::Ready, SourceState::AwaitingReady) => {
                let details = steps();
                if let Some(timeline) = &mut self.timeline {
                    timeline.mark_remote(details.steps, "carry the last pages and the state");
                }
                let sent = self.digest.value();
                if details.digest != sent {
                    self.why = Some(format!(
                        "the destination restored something else than was sent (digest {:#010x}, sent {sent:#010x})",
                        details.digest
                    ));
                    return Some(SourceEvent::Failed);
                }
                if let Err(error) = self.still_held() {
                    self.why = Some(error.to_string());
                    return Some(SourceEvent::Failed);
                }
                if let Some(why) = self.precopy.restored_too_late(self.away()) {
                    self.ending = Ending::GivenUp;
                    self.why = Some(why);
                    return Some(SourceEvent::Failed);
                }
            }
            (ToSource::Running, SourceState::Committed) => {
                let details = steps();
                if let Some(timeline) = &mut self.timeline {
                    timeline.end_remote(details.steps, details.blackout_us, "carry the commit");
                }
                let after = details.first_packet_us.map(Duration::from_micros);
                self.silence = self.silent_before.zip(after).map(|(before, after)| Silence::new(before, after));
            }
            (ToSource::Accept, SourceState::Offering) => {
                self.warnings = serde_json::from_value::<WhyDetails>(said.details.clone()).unwrap_or_default().warnings;
            }
            (ToSource::Refuse, _) => {
                self.ending = Ending::Refused;
                self.why = Some(why());
            }
            (ToSource::Returned, SourceState::RolledBack) => {}
            (ToSource::Returned, _) => {
                let why = why();
                self.why = Some(format!("the destination gave the guest back: {why}"));
            }
            _ => {}
        }
        Some(SourceEvent::Peer(said.word))
    }

    /// Waits before a step is tried again. What comes meanwhile changes nothing, but an operator wants an answer.
    pub(super) fn rest(&mut self) {
        let until = Instant::now() + self.host.timeouts.reconnect;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            let Ok(input) = self.input.recv_timeout(left) else { return };
            if let Some(event) = self.take(input) {
                self.hear(event);
            }
        }
    }

    /// Takes what has come meanwhile, without waiting. An error if the stage has to end because of it.
    pub(super) fn check(&mut self) -> Result<()> {
        loop {
            match self.input.try_recv() {
                Err(_) => return Ok(()),
                Ok(Input::Operator(command)) if command.is_stale() => {}
                Ok(Input::Operator(command)) if command.what == SourceEvent::Cancel => {
                    command.answer(Ok(()));
                    self.ending = Ending::GivenUp;
                    return Err(Trouble::new("cancelled by the operator"));
                }
                Ok(Input::Operator(command)) => command.answer(Err(Denied::NothingToResolve)),
                Ok(Input::Lost(link, why)) => {
                    if self.link.as_ref().is_some_and(|present| present.is(&link)) {
                        self.drop_link();
                        return Err(Trouble::new(format!("connection to {} lost: {why}", self.peer)));
                    }
                }
                Ok(Input::Frame(_, Frame::Pong(number))) if self.pong(number) => self.last_heard = Instant::now(),
                Ok(Input::Frame(_, Frame::ToSource(said))) => {
                    let why = serde_json::from_value::<WhyDetails>(said.details).unwrap_or_default().why.join("; ");
                    return Err(Trouble::new(format!("the destination ended it ({:?}): {why}", said.word)));
                }
                Ok(Input::Frame(..)) => {
                    return Err(Trouble::new("the peer said something that a destination does not say"));
                }
            }
        }
    }
}
