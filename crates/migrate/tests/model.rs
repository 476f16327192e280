//! The handshake, model-checked: the very machines that run, against every crash of either daemon between any two actions, loss,
//! duplication and reordering of words, failing steps, cancel, loss of a host, and the operator.
//!
//! The network is a set of words that were ever said: each may be delivered at any time, any number of times, or never. Only `Offer`
//! and `Final` are delivered once at most, and not after a loss of the link: they belong to the connection that carries the memory,
//! and TCP neither repeats them nor carries them over to the next connection.

use migrate::handshake::*;
use stateright::{Checker, Model, Property};
use std::collections::{BTreeSet, VecDeque};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Guest {
    /// Not here, or only a shell without its memory.
    Absent,
    /// All of it is here, and it is not running.
    Paused,
    Running,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    /// `None`: the daemon has crashed.
    source: Option<Source>,
    source_todo: VecDeque<SourceAction>,
    source_journal: SourceRecord,
    source_guest: Guest,
    source_host: bool,
    destination: Option<Destination>,
    destination_todo: VecDeque<DestinationAction>,
    destination_journal: Option<DestinationRecord>,
    destination_guest: Guest,
    destination_host: bool,
    /// The guest has run there: what it has acknowledged since is lost if the source's copy goes on.
    destination_ran: bool,
    to_destination: BTreeSet<ToDestination>,
    to_source: BTreeSet<ToSource>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Step {
    SourceActs { ok: bool },
    DestinationActs { ok: bool },
    SourceHears(ToSource),
    DestinationHears(ToDestination),
    SourceEvent(SourceEvent),
    DestinationEvent(DestinationEvent),
    SourceCrash,
    SourceRestart,
    DestinationCrash,
    DestinationRestart,
    SourceHostLost,
    DestinationHostLost,
}

/// A fault planted into the machines, to see that the check finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Planted {
    Nothing,
    SourceForgetsToJournal(SourceRecord),
    DestinationForgetsToJournal(DestinationRecord),
    /// `Go` leaves before it is on disk.
    GoBeforeJournal,
    /// The source takes the guest back when the link is cut after `Go`.
    TakesBackOnLoss,
    /// The destination closes its journal as soon as the guest runs.
    ForgetsRunning,
    /// `Returned` is said although the guest may have been started.
    ReturnsLate,
    /// `resolve` does not ask about fencing.
    ResolvesUnfenced,
}

struct Handshake {
    planted: Planted,
}

impl World {
    fn new() -> Self {
        let (source, actions) = Source::begin();
        World {
            source: Some(source),
            source_todo: actions.into(),
            source_journal: SourceRecord::Begin,
            source_guest: Guest::Running,
            source_host: true,
            destination: Some(Destination::unknown()),
            destination_todo: VecDeque::new(),
            destination_journal: None,
            destination_guest: Guest::Absent,
            destination_host: true,
            destination_ran: false,
            to_destination: BTreeSet::new(),
            to_source: BTreeSet::new(),
        }
    }

    fn running(&self) -> usize {
        (self.source_guest == Guest::Running) as usize + (self.destination_guest == Guest::Running) as usize
    }
}

impl Handshake {
    fn source_event(&self, w: &mut World, event: SourceEvent) {
        let Some(machine) = &mut w.source else { return };
        let event = match (self.planted, event, machine.state()) {
            (Planted::TakesBackOnLoss, SourceEvent::LinkLost, SourceState::Committed) => {
                SourceEvent::Resolve { peer_fenced: true }
            }
            (Planted::ResolvesUnfenced, SourceEvent::Resolve { .. }, _) => SourceEvent::Resolve { peer_fenced: true },
            _ => event,
        };
        let mut actions = machine.on(event);
        if self.planted == Planted::GoBeforeJournal
            && actions == [SourceAction::Journal(SourceRecord::Go), SourceAction::Send(ToDestination::Go)]
        {
            actions.reverse();
        }
        w.source_todo.extend(actions);
    }

    fn destination_event(&self, w: &mut World, event: DestinationEvent) {
        let Some(machine) = &mut w.destination else { return };
        let mut actions = machine.on(event);
        match (self.planted, event) {
            (Planted::ForgetsRunning, DestinationEvent::Started) => {
                actions.push(DestinationAction::Journal(DestinationRecord::Closed));
                *machine = Destination::unknown();
            }
            (Planted::ReturnsLate, DestinationEvent::Started) => {
                actions.push(DestinationAction::Send(ToSource::Returned));
            }
            _ => {}
        }
        w.destination_todo.extend(actions);
    }

    /// Carries the next action out. `ok` is whether its work succeeds, where it can fail.
    fn source_acts(&self, w: &mut World, ok: bool) {
        let Some(action) = w.source_todo.pop_front() else { return };
        let done = |event| if ok { event } else { SourceEvent::Failed };
        let event = match action {
            SourceAction::Journal(record) => {
                if self.planted != Planted::SourceForgetsToJournal(record) {
                    w.source_journal = record;
                }
                return;
            }
            SourceAction::Send(word) => {
                w.to_destination.insert(word);
                return;
            }
            SourceAction::Precopy => done(SourceEvent::PrecopyDone),
            SourceAction::Freeze => {
                w.source_guest = Guest::Paused;
                done(SourceEvent::FreezeDone)
            }
            SourceAction::RollBack => {
                if w.source_guest == Guest::Paused {
                    w.source_guest = Guest::Running;
                }
                SourceEvent::RolledBack
            }
            SourceAction::Destroy => {
                w.source_guest = Guest::Absent;
                SourceEvent::Destroyed
            }
            SourceAction::Deny(_) | SourceAction::Report(_) => return,
        };
        self.source_event(w, event);
    }

    fn destination_acts(&self, w: &mut World, ok: bool) {
        let Some(action) = w.destination_todo.pop_front() else { return };
        let done = |event| if ok { event } else { DestinationEvent::Failed };
        let event = match action {
            DestinationAction::Journal(record) => {
                if self.planted != Planted::DestinationForgetsToJournal(record) {
                    w.destination_journal = Some(record);
                }
                return;
            }
            DestinationAction::Send(word) => {
                w.to_source.insert(word);
                return;
            }
            DestinationAction::Prepare => {
                if ok {
                    DestinationEvent::Prepared
                } else {
                    DestinationEvent::Unfit
                }
            }
            DestinationAction::Restore => {
                if ok {
                    w.destination_guest = Guest::Paused;
                }
                done(DestinationEvent::Restored)
            }
            DestinationAction::Connect => done(DestinationEvent::Connected),
            DestinationAction::Start => {
                w.destination_guest = Guest::Running;
                w.destination_ran = true;
                DestinationEvent::Started
            }
            DestinationAction::Discard => {
                w.destination_guest = Guest::Absent;
                DestinationEvent::Discarded
            }
            DestinationAction::Deny(_) => return,
        };
        self.destination_event(w, event);
    }

    fn link_lost(w: &mut World) {
        w.to_destination.remove(&ToDestination::Offer);
        w.to_destination.remove(&ToDestination::Final);
    }

    /// The end of all trouble: what crashed is started again, the link comes back, nothing more is lost and no step fails.
    fn heal(&self, w: &World) -> World {
        let mut w = w.clone();
        for step in [Step::SourceRestart, Step::DestinationRestart] {
            self.apply(&mut w, step);
        }
        let settle = |w: &mut World| {
            while !w.source_todo.is_empty() || !w.destination_todo.is_empty() {
                self.source_acts(w, true);
                self.destination_acts(w, true);
            }
        };
        settle(&mut w);
        self.apply(&mut w, Step::SourceEvent(SourceEvent::LinkLost));
        self.apply(&mut w, Step::DestinationEvent(DestinationEvent::LinkLost));
        settle(&mut w);
        for _ in 0..8 {
            w.to_destination.clear();
            w.to_source.clear();
            if !w.source_host || !w.destination_host {
                break;
            }
            self.source_event(&mut w, SourceEvent::LinkUp);
            settle(&mut w);
            for word in std::mem::take(&mut w.to_destination) {
                self.destination_event(&mut w, DestinationEvent::Peer(word));
            }
            settle(&mut w);
            for word in std::mem::take(&mut w.to_source) {
                self.source_event(&mut w, SourceEvent::Peer(word));
            }
            settle(&mut w);
        }
        w
    }

    fn resolve(&self, w: &World, peer_fenced: bool) -> World {
        let mut w = w.clone();
        if w.source_host {
            self.source_event(&mut w, SourceEvent::Resolve { peer_fenced });
        }
        if w.destination_host {
            self.destination_event(&mut w, DestinationEvent::Resolve { peer_fenced });
        }
        while !w.source_todo.is_empty() || !w.destination_todo.is_empty() {
            self.source_acts(&mut w, true);
            self.destination_acts(&mut w, true);
        }
        w
    }

    fn apply(&self, w: &mut World, step: Step) {
        match step {
            Step::SourceActs { ok } => self.source_acts(w, ok),
            Step::DestinationActs { ok } => self.destination_acts(w, ok),
            Step::SourceHears(word) => self.source_event(w, SourceEvent::Peer(word)),
            Step::DestinationHears(word) => {
                if matches!(word, ToDestination::Offer | ToDestination::Final) {
                    w.to_destination.remove(&word);
                }
                self.destination_event(w, DestinationEvent::Peer(word));
            }
            Step::SourceEvent(event) => {
                if event == SourceEvent::LinkLost {
                    Self::link_lost(w);
                }
                self.source_event(w, event);
            }
            Step::DestinationEvent(event) => {
                if event == DestinationEvent::LinkLost {
                    Self::link_lost(w);
                }
                self.destination_event(w, event);
            }
            Step::SourceCrash => {
                Self::link_lost(w);
                w.source = None;
                w.source_todo.clear();
            }
            Step::DestinationCrash => {
                Self::link_lost(w);
                w.destination = None;
                w.destination_todo.clear();
            }
            Step::SourceRestart if w.source.is_none() && w.source_host => {
                let (machine, actions) = Source::recover(w.source_journal);
                w.source = Some(machine);
                w.source_todo = actions.into();
            }
            Step::DestinationRestart if w.destination.is_none() && w.destination_host => {
                let (machine, actions) = match w.destination_journal {
                    Some(record) => Destination::recover(record),
                    None => (Destination::unknown(), vec![]),
                };
                w.destination = Some(machine);
                w.destination_todo = actions.into();
            }
            Step::SourceRestart | Step::DestinationRestart => {}
            Step::SourceHostLost => {
                self.apply(w, Step::SourceCrash);
                w.source_host = false;
                w.source_guest = Guest::Absent;
            }
            Step::DestinationHostLost => {
                self.apply(w, Step::DestinationCrash);
                w.destination_host = false;
                w.destination_guest = Guest::Absent;
            }
        }
    }
}

impl Model for Handshake {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new()]
    }

    fn actions(&self, w: &World, steps: &mut Vec<Step>) {
        // A host that is lost is the last fault: what is left is for the operator.
        let hosts = w.source_host && w.destination_host;
        match (&w.source, w.source_todo.front()) {
            (None, _) if w.source_host => steps.push(Step::SourceRestart),
            (None, _) => {}
            (Some(_), Some(action)) => {
                steps.push(Step::SourceActs { ok: true });
                if matches!(action, SourceAction::Precopy | SourceAction::Freeze) {
                    steps.push(Step::SourceActs { ok: false });
                }
            }
            (Some(_), None) => {
                steps.extend(w.to_source.iter().map(|&word| Step::SourceHears(word)));
                for event in [
                    SourceEvent::LinkUp,
                    SourceEvent::LinkLost,
                    SourceEvent::Failed,
                    SourceEvent::Cancel,
                    SourceEvent::Resolve { peer_fenced: false },
                ] {
                    steps.push(Step::SourceEvent(event));
                }
            }
        }
        match (&w.destination, w.destination_todo.front()) {
            (None, _) if w.destination_host => steps.push(Step::DestinationRestart),
            (None, _) => {}
            (Some(_), Some(action)) => {
                steps.push(Step::DestinationActs { ok: true });
                if matches!(
                    action,
                    DestinationAction::Prepare | DestinationAction::Restore | DestinationAction::Connect
                ) {
                    steps.push(Step::DestinationActs { ok: false });
                }
            }
            (Some(_), None) => {
                steps.extend(w.to_destination.iter().map(|&word| Step::DestinationHears(word)));
                steps.push(Step::DestinationEvent(DestinationEvent::LinkLost));
                steps.push(Step::DestinationEvent(DestinationEvent::Resolve { peer_fenced: false }));
            }
        }
        if w.source.is_some() && hosts {
            steps.push(Step::SourceCrash);
            steps.push(Step::SourceHostLost);
        }
        if w.destination.is_some() && hosts {
            steps.push(Step::DestinationCrash);
            steps.push(Step::DestinationHostLost);
        }
    }

    fn next_state(&self, w: &World, step: Step) -> Option<World> {
        let mut next = w.clone();
        self.apply(&mut next, step);
        (next != *w).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("S1: never two running copies", |_, w: &World| w.running() <= 1),
            Property::always(
                "nothing acknowledged is lost: once it ran there, the old copy never goes on",
                |_, w: &World| !(w.destination_ran && w.source_guest == Guest::Running),
            ),
            Property::always(
                "S2, S3: once they can talk, exactly one runs and nothing is left over",
                |m: &Handshake, w: &World| {
                    if !w.source_host || !w.destination_host {
                        return true;
                    }
                    let healed = m.heal(w);
                    healed.running() == 1
                        && healed.source_guest != Guest::Paused
                        && healed.destination_guest != Guest::Paused
                        && matches!(healed.source.as_ref().map(Source::state), Some(SourceState::Closed(_)))
                },
            ),
            Property::always("before the commit the source goes on without its peer", |m: &Handshake, w: &World| {
                let committed =
                    |r| matches!(r, SourceRecord::Go | SourceRecord::Done | SourceRecord::Left | SourceRecord::Closed);
                if !w.source_host || w.destination_host || committed(w.source_journal) {
                    return true;
                }
                let healed = m.heal(w);
                // `Go` may be about to be written when the peer dies; then it waits like any other.
                healed.running() == 1 || committed(healed.source_journal)
            }),
            Property::always(
                "a lost peer is decided by the statement that it is fenced, and only by it",
                |m: &Handshake, w: &World| {
                    if w.source_host == w.destination_host {
                        return true;
                    }
                    let healed = m.heal(w);
                    let frozen_here = healed.source_guest == Guest::Paused || healed.destination_guest == Guest::Paused;
                    if !frozen_here {
                        return true;
                    }
                    m.resolve(&healed, false).running() == 0 && m.resolve(&healed, true).running() == 1
                },
            ),
            Property::sometimes("it moves", |_, w: &World| {
                w.destination_guest == Guest::Running && w.source_guest == Guest::Absent
            }),
            Property::sometimes("it is returned after Go", |_, w: &World| {
                w.source_guest == Guest::Running && w.to_destination.contains(&ToDestination::Go)
            }),
        ]
    }
}

fn check(planted: Planted) -> impl Checker<Handshake> {
    Handshake { planted }.checker().spawn_bfs().join()
}

#[test]
fn the_handshake_holds() {
    let checker = check(Planted::Nothing);
    println!("{} states, {} distinct", checker.state_count(), checker.unique_state_count());
    assert!(checker.unique_state_count() > 1000, "the model does not move");
    checker.assert_properties();
}

#[test]
fn planted_faults_are_found() {
    for planted in [
        Planted::SourceForgetsToJournal(SourceRecord::Go),
        Planted::DestinationForgetsToJournal(DestinationRecord::Starting),
        Planted::GoBeforeJournal,
        Planted::TakesBackOnLoss,
        Planted::ForgetsRunning,
        Planted::ReturnsLate,
        Planted::ResolvesUnfenced,
    ] {
        let checker = check(planted);
        let found: Vec<_> = checker.discoveries().into_keys().filter(|name| !name.starts_with("it ")).collect();
        assert!(!found.is_empty(), "{planted:?} was not noticed in {} states", checker.unique_state_count());
        println!("{planted:?}: {found:?}");
    }
}
