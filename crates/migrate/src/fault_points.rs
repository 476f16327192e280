//! The points at which a fault can be planted: before and after every action of either machine. They are found by
//! letting the two machines talk, so a new action is a new point by itself.

use crate::destination;
use crate::handshake::{Destination, DestinationAction, DestinationEvent, Source, SourceAction, SourceEvent};
use crate::host::Fault;
use crate::source;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;

/// What makes the handshake pass a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lead {
    /// Nothing: a good move passes it.
    None,
    /// The destination can't restore the guest: both go back, with the guest paused and its backends detached.
    Restore,
    /// The backends on the destination do not connect after `Go`: it gives the guest back.
    Connect,
    /// The destination's preflight refuses.
    Unfit,
}

impl Lead {
    const ALL: [Lead; 4] = [Lead::None, Lead::Restore, Lead::Connect, Lead::Unfit];

    /// The fault to plant for it besides; for [`Lead::Unfit`] there is none, the guest must be one that does not fit.
    pub fn plant(self) -> Option<Plant> {
        let point = match self {
            Lead::None | Lead::Unfit => return None,
            Lead::Restore => "destination.before.restore",
            Lead::Connect => "destination.before.connect",
        };
        Some(Plant { point: point.to_owned(), fault: Fault::Fail })
    }
}

/// One of the two hosts of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    Source,
    Destination,
}

/// A point of the handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// `source.before.journal-go`
    pub name: String,
    /// What must go wrong before, for the handshake to come there.
    pub lead: Lead,
}

impl Point {
    /// What can happen here that both hosts get over. What is done after an action has no way to fail.
    pub fn faults(&self) -> &'static [Fault] {
        if self.name.contains(".before.") {
            &[Fault::Cut, Fault::Fail, Fault::Crash, Fault::Panic]
        } else {
            &[Fault::Cut, Fault::Crash]
        }
    }
}

/// Where the guest is when both hosts are done with a move in which this happened, each host's daemon having been started again if it was
/// gone: on the source if it happened before the commit. `None`: on either.
pub fn guest_is_on(plant: &Plant) -> Option<Side> {
    let points = all();
    let index = |name: &str| points.iter().position(|point| point.name == name);
    let (at, commit) = (index(&plant.point)?, index("source.before.journal-go")?);
    if points.get(at)?.lead != Lead::None {
        return Some(Side::Source);
    }
    match (plant.point.as_str(), plant.fault) {
        (_, Fault::Hang) => None,
        // `Ready` may be on its way or not.
        ("destination.after.send-ready", _) => None,
        // The source has all that it needs to commit, and comes again.
        ("source.before.journal-go", Fault::Cut) => Some(Side::Destination),
        ("source.before.journal-go", _) => Some(Side::Source),
        // It could not be started there, and is given back.
        (
            "destination.before.journal-accepted"
            | "destination.before.connect"
            | "destination.before.journal-starting",
            Fault::Fail,
        ) => Some(Side::Source),
        _ if at < commit => Some(Side::Source),
        _ => Some(Side::Destination),
    }
}

/// All points, in the order in which the handshake passes them.
pub fn all() -> Vec<Point> {
    let mut points: Vec<Point> = Vec::new();
    for lead in Lead::ALL {
        for action in trace(lead) {
            let (side, action) = action.split_once('.').unwrap_or(("", &action));
            for when in ["before", "after"] {
                let name = format!("{side}.{when}.{action}");
                if points.iter().all(|p| p.name != name) {
                    points.push(Point { name, lead });
                }
            }
        }
    }
    points
}

/// The actions, as `source.precopy`, of a handshake that nothing but its lead disturbs.
fn trace(lead: Lead) -> Vec<String> {
    enum Act {
        Source(SourceAction),
        Destination(DestinationAction),
    }
    let (mut here, first) = Source::begin();
    let mut there = Destination::unknown();
    let mut todo: VecDeque<Act> = first.into_iter().map(Act::Source).collect();
    let mut names = Vec::new();
    while let Some(act) = todo.pop_front() {
        let (to_source, to_destination) = match act {
            Act::Source(action) => {
                names.push(format!("source.{}", source::action_name(action)));
                match action {
                    SourceAction::Send(word) => (None, Some(DestinationEvent::Peer(word))),
                    SourceAction::Precopy => (Some(SourceEvent::PrecopyDone), None),
                    SourceAction::Freeze => (Some(SourceEvent::FreezeDone), None),
                    SourceAction::RollBack => (Some(SourceEvent::RolledBack), None),
                    SourceAction::Destroy => (Some(SourceEvent::Destroyed), None),
                    SourceAction::Journal(_) | SourceAction::Report(_) | SourceAction::Deny(_) => (None, None),
                }
            }
            Act::Destination(action) => {
                names.push(format!("destination.{}", destination::action_name(action)));
                let or_failed = |done, fails| if lead == fails { DestinationEvent::Failed } else { done };
                match action {
                    DestinationAction::Send(word) => (Some(SourceEvent::Peer(word)), None),
                    DestinationAction::Prepare if lead == Lead::Unfit => (None, Some(DestinationEvent::Unfit)),
                    DestinationAction::Prepare => (None, Some(DestinationEvent::Prepared)),
                    DestinationAction::Restore => (None, Some(or_failed(DestinationEvent::Restored, Lead::Restore))),
                    DestinationAction::Connect => (None, Some(or_failed(DestinationEvent::Connected, Lead::Connect))),
                    DestinationAction::Start => (None, Some(DestinationEvent::Started)),
                    DestinationAction::Discard => (None, Some(DestinationEvent::Discarded)),
                    DestinationAction::Journal(_) | DestinationAction::Deny(_) => (None, None),
                }
            }
        };
        todo.extend(to_source.map(|event| here.on(event)).unwrap_or_default().into_iter().map(Act::Source));
        todo.extend(to_destination.map(|event| there.on(event)).unwrap_or_default().into_iter().map(Act::Destination));
    }
    names
}

/// A fault and where it is to happen, as `FERRY_FAULT` has it: `source.before.journal-go=crash`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plant {
    pub point: String,
    pub fault: Fault,
}

impl fmt::Display for Plant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.point, self.fault)
    }
}

/// Why a text plants no fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlantError {
    #[error("{0:?} is not <point>=<cut|fail|crash|panic|hang>")]
    Form(String),
    #[error("{0}: there is no such point; docs/handshake.md lists them")]
    Point(String),
}

impl FromStr for Plant {
    type Err = PlantError;

    fn from_str(text: &str) -> Result<Plant, PlantError> {
        let form = || PlantError::Form(text.to_owned());
        let (point, fault) = text.split_once('=').ok_or_else(form)?;
        let fault = fault.parse().map_err(|()| form())?;
        if all().iter().all(|known| known.name != point) {
            return Err(PlantError::Point(point.to_owned()));
        }
        Ok(Plant { point: point.to_owned(), fault })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fault::Cut => "cut",
            Fault::Fail => "fail",
            Fault::Crash => "crash",
            Fault::Panic => "panic",
            Fault::Hang => "hang",
        })
    }
}

impl FromStr for Fault {
    type Err = ();

    fn from_str(text: &str) -> Result<Fault, ()> {
        let all = [Fault::Cut, Fault::Fail, Fault::Crash, Fault::Panic, Fault::Hang];
        all.into_iter().find(|f| f.to_string() == text).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handshake::{DestinationRecord, SourceRecord, ToDestination, ToSource};
    use std::collections::{BTreeSet, HashSet};

    const TO_SOURCE: [ToSource; 6] =
        [ToSource::Accept, ToSource::Refuse, ToSource::Ready, ToSource::Returned, ToSource::Running, ToSource::Bye];
    const TO_DESTINATION: [ToDestination; 5] =
        [ToDestination::Offer, ToDestination::Final, ToDestination::Go, ToDestination::Abort, ToDestination::Moved];

    /// Every action that the machines have in any state, whatever happens.
    fn reachable() -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        let (source, first) = Source::begin();
        let mut todo = vec![source];
        names.extend(first.into_iter().map(|a| format!("source.{}", source::action_name(a))));
        use SourceRecord as R;
        for record in [R::Begin, R::Freeze, R::Go, R::Abort, R::RolledBack, R::Done, R::Left, R::Closed] {
            todo.push(Source::recover(record).0);
        }
        use SourceEvent as E;
        let mut events = vec![E::LinkUp, E::LinkLost, E::PrecopyDone, E::FreezeDone, E::Failed, E::RolledBack];
        events.extend([E::PeerUnaware, E::Destroyed, E::Cancel]);
        events.extend([false, true].map(|peer_fenced| E::Resolve { peer_fenced }));
        events.extend(TO_SOURCE.map(E::Peer));
        let mut seen = HashSet::new();
        while let Some(machine) = todo.pop() {
            if seen.insert(machine.clone()) {
                for event in &events {
                    let mut next = machine.clone();
                    names.extend(next.on(*event).into_iter().map(|a| format!("source.{}", source::action_name(a))));
                    todo.push(next);
                }
            }
        }
        let mut todo = vec![Destination::unknown()];
        use DestinationRecord as R2;
        for record in [R2::Begin, R2::Ready, R2::Accepted, R2::Refused, R2::Starting, R2::Running, R2::Closed] {
            todo.push(Destination::recover(record).0);
        }
        use DestinationEvent as E2;
        let mut events = vec![E2::LinkLost, E2::Prepared, E2::Unfit, E2::Restored, E2::Connected, E2::Started];
        events.extend([E2::Discarded, E2::Failed]);
        events.extend([false, true].map(|peer_fenced| E2::Resolve { peer_fenced }));
        events.extend(TO_DESTINATION.map(E2::Peer));
        let mut seen = HashSet::new();
        while let Some(machine) = todo.pop() {
            if seen.insert(machine.clone()) {
                for event in &events {
                    let mut next = machine.clone();
                    let actions = next.on(*event).into_iter();
                    names.extend(actions.map(|a| format!("destination.{}", destination::action_name(a))));
                    todo.push(next);
                }
            }
        }
        names.retain(|name| !name.ends_with(".deny"));
        names
    }

    #[test]
    fn every_action_that_is_ever_taken_has_its_points() {
        let points = all();
        let named: BTreeSet<String> = points.iter().map(|p| p.name.replacen(".before.", ".", 1)).collect();
        let missing: Vec<_> = reachable().into_iter().filter(|name| !named.contains(name)).collect();
        assert!(missing.is_empty(), "no lead comes to {missing:?}");
        assert!(points.len() >= 64, "{}", points.len());
        let lead = |name: &str| points.iter().find(|p| p.name == name).unwrap().lead;
        assert_eq!(lead("source.before.journal-go"), Lead::None);
        assert_eq!(lead("source.after.roll-back"), Lead::Restore);
        assert_eq!(lead("destination.before.send-refuse"), Lead::Unfit);
    }

    #[test]
    fn the_page_names_every_point() {
        let page = include_str!("../../../docs/handshake.md");
        let (_, rest) = page.split_once("## Points for planted faults").unwrap();
        let section = rest.split("\n## ").next().unwrap();
        let words = |side: &str| -> BTreeSet<String> {
            let after = section.split_once(&format!("\n    {side} ")).unwrap().1;
            let lines = after.lines().enumerate().take_while(|(n, l)| *n == 0 || l.starts_with("      "));
            lines.flat_map(|(_, l)| l.split([' ', ';'])).filter(|w| !w.is_empty()).map(str::to_owned).collect()
        };
        for side in ["source", "destination"] {
            let prefix = format!("{side}.before.");
            let ours: BTreeSet<String> =
                all().iter().filter_map(|p| p.name.strip_prefix(&prefix)).map(str::to_owned).collect();
            assert_eq!(words(side), ours, "docs/handshake.md, {side}");
        }
    }

    #[test]
    fn a_plant_is_read_as_it_is_written() {
        for point in all() {
            for fault in point.faults() {
                let plant = Plant { point: point.name.clone(), fault: *fault };
                assert_eq!(plant.to_string().parse(), Ok(plant));
            }
        }
        assert!(matches!("source.before.go=cut".parse::<Plant>(), Err(PlantError::Point(_))));
        assert!(matches!("source.before.freeze=burn".parse::<Plant>(), Err(PlantError::Form(_))));
        assert!(matches!("cut".parse::<Plant>(), Err(PlantError::Form(_))));
    }
}
