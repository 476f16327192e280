//! Carries out a scenario's steps on hosts, network and peer, and records what happened.

mod console;
pub mod copies;
mod each;
mod fault;
pub mod ferryd;
mod gone;
pub mod host;
pub mod plan;
pub mod race;
mod reach;
pub mod ring;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use migrate::report::Report;
use serde::Serialize;
use witness::judge::Window;
use witness::report::Snapshot;

use self::copies::Copies;
use self::host::{LabHost, Ran};
use self::ring::Ring;
use crate::net::RunClock;
use crate::net::peer::{Peer, Received};
use crate::net::ports::Network;
use crate::net::switch::PortId;
use crate::progress;
use crate::scenario::{Expected, Scenario, Step};
use crate::verdict::Promise;

/// What the steps work on.
#[derive(Clone, Copy)]
pub struct Lab<'a> {
    pub scenario: &'a Scenario,
    /// In the scenario's order.
    pub hosts: &'a [Arc<dyn LabHost>],
    pub network: &'a Network,
    pub peer: &'a Peer,
    pub clock: RunClock,
    /// Time between two looks at the CPU time of a guest's copies.
    pub apart: Duration,
    /// Where each disk is in a dom0.
    pub disks: &'a BTreeMap<String, String>,
    /// The scenario's own folder: files that it names are looked for there.
    pub base: &'a Path,
    /// The run's folder.
    pub folder: &'a Path,
}

impl std::fmt::Debug for Lab<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lab").field("folder", &self.folder).finish_non_exhaustive()
    }
}

/// How a step ended.
#[derive(Clone, Debug, Serialize)]
pub struct StepResult {
    /// From 1.
    pub number: usize,
    /// What it did, for a person.
    pub what: String,
    /// On the run's time line.
    pub began: Duration,
    /// How long the run was held up by it.
    pub took: Duration,
    /// Why it failed.
    pub error: Option<String>,
}

/// A guest went from one place to another, or was tried to.
#[derive(Clone, Debug, Serialize)]
pub struct Move {
    pub guest: String,
    /// `xl migrate`, `xl save, xl restore` or `ferry migrate`.
    pub how: &'static str,
    pub from: String,
    pub to: String,
    /// When the command was given.
    pub began: Duration,
    /// When it had ended, if it did.
    pub ended: Option<Duration>,
    /// True if the guest arrived.
    pub moved: bool,
    /// Bytes that the hosts exchanged meanwhile, or the length of the file.
    pub bytes: u64,
    /// By the guest's clock.
    pub window: Option<Window>,
    /// What the tool wrote.
    pub output: String,
    /// `ferry migrate`'s own report, if it wrote one.
    pub report: Option<Report>,
    /// What the scenario expects of this move alone.
    #[serde(skip)]
    pub expected: BTreeMap<Promise, Expected>,
    /// The counters of the peer when it began.
    #[serde(skip)]
    pub at_start: PeerMark,
    /// The last look before.
    #[serde(skip)]
    pub before: Option<Received<Snapshot>>,
    /// The next look after.
    #[serde(skip)]
    pub after: Option<Received<Snapshot>>,
}

/// What the peer had counted of a guest at one time.
#[derive(Clone, Copy, Debug, Default)]
pub struct PeerMark {
    pub tcp_accepted: u64,
    pub tcp_broken: u64,
}

/// What the steps remember of a guest.
#[derive(Clone, Debug, Default)]
pub struct GuestRecord {
    /// The host on which it is, if it is on any.
    pub on: Option<String>,
    /// True once it was made.
    pub created: bool,
    /// The first look at it.
    pub first: Option<Received<Snapshot>>,
    pub copies: Vec<Copies>,
    /// What came on its console, if the witness is reached by it alone.
    pub console: Option<Ring>,
}

/// A step that goes on while others are carried out.
struct Pending {
    number: usize,
    what: String,
    began: Duration,
    step: Step,
    /// Index into the moves.
    moving: Option<usize>,
    thread: JoinHandle<Result<Ran>>,
}

/// Carries out the steps.
pub struct Executor<'a> {
    lab: Lab<'a>,
    pub guests: BTreeMap<String, GuestRecord>,
    pub moves: Vec<Move>,
    pub results: Vec<StepResult>,
    pending: BTreeMap<String, Pending>,
    /// When a save began, by guest.
    saves: BTreeMap<String, usize>,
    /// Of guests that report on their console only.
    consoles: BTreeMap<String, console::Reader>,
}

impl std::fmt::Debug for Executor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Executor").field("results", &self.results).finish_non_exhaustive()
    }
}

/// How long a witness may take to answer when it is asked for a snapshot.
const SNAPSHOT_LIMIT: Duration = Duration::from_secs(40);

impl<'a> Executor<'a> {
    /// Nothing is carried out yet.
    pub fn new(lab: Lab<'a>) -> Self {
        let guests = lab.scenario.guests.iter().map(|g| (g.name.get_ref().clone(), GuestRecord::default())).collect();
        Self {
            lab,
            guests,
            moves: Vec::new(),
            results: Vec::new(),
            pending: BTreeMap::new(),
            saves: BTreeMap::new(),
            consoles: BTreeMap::new(),
        }
    }

    /// What the steps work on.
    pub fn lab(&self) -> Lab<'a> {
        self.lab
    }

    /// Carries out all steps; the first that fails ends it. `judge` compares the verdict so far when a step asks for it.
    pub fn run(&mut self, judge: &dyn Fn(&Self, &Step) -> Result<()>) -> Result<()> {
        let steps: Vec<Step> = self.lab.scenario.steps.iter().map(|s| s.get_ref().clone()).collect();
        let total = steps.len();
        for (index, step) in steps.into_iter().enumerate() {
            let number = index + 1;
            let what = each::describe(self, &step);
            progress::say(format!("step {number}/{total}: {what}"));
            let began = self.lab.clock.now();
            let result = match &step {
                Step::ExpectVerdict(_) => {
                    self.look_after_last_moves();
                    judge(self, &step)
                }
                _ => self.carry_out(number, &what, step),
            };
            let took = self.lab.clock.now().saturating_sub(began);
            let error = result.as_ref().err().map(|e| format!("{e:#}"));
            self.results.push(StepResult { number, what: what.clone(), began, took, error });
            match result {
                Ok(()) => progress::say(format!("step {number}/{total}: done in {:.1} s", took.as_secs_f64())),
                Err(error) => return Err(error.context(format!("step {number}/{total} failed: {what}"))),
            }
        }
        let forgotten: Vec<String> = self.pending.keys().cloned().collect();
        for name in forgotten {
            self.join(&name, Duration::from_secs(60))
                .with_context(|| format!("the step in the background {name:?}"))?;
        }
        Ok(())
    }

    /// Asks each running witness for its last report, and looks a last time where the guests are.
    pub fn finish(&mut self) -> Result<()> {
        let mut failed = Vec::new();
        let here: Vec<(String, bool)> = self
            .guests
            .iter()
            .filter(|(_, record)| record.on.is_some())
            .map(|(name, _)| (name.clone(), self.lab.scenario.guest(name).is_some_and(|g| g.witness)))
            .collect();
        for (guest, witness) in here {
            self.look_at_copies(&guest);
            if !witness {
                continue;
            }
            progress::say(format!("guest {guest}: last report"));
            // The snapshot is taken while the loads still run, so that what the verdict compares is alike.
            if let Err(error) = self.look_after(&guest) {
                failed.push(format!("{error:#}"));
            }
            if let Err(error) = self.last_report(&guest, Duration::from_secs(90)) {
                failed.push(error.to_string());
            }
        }
        if failed.is_empty() { Ok(()) } else { Err(anyhow!(failed.join("\n"))) }
    }

    fn host(&self, name: &str) -> Result<&'a Arc<dyn LabHost>> {
        self.lab.hosts.iter().find(|h| h.name() == name).with_context(|| format!("there is no host {name}"))
    }

    fn record(&mut self, guest: &str) -> &mut GuestRecord {
        self.guests.entry(guest.to_owned()).or_default()
    }

    /// The host on which a guest is.
    fn host_of(&self, guest: &str) -> Result<&'a Arc<dyn LabHost>> {
        let on = self.guests.get(guest).and_then(|r| r.on.as_deref());
        self.host(on.with_context(|| format!("guest {guest} is on no host now"))?)
    }

    fn has_witness(&self, guest: &str) -> bool {
        self.lab.scenario.guest(guest).is_some_and(|g| g.witness)
    }

    fn port(&self, host: &str) -> Option<PortId> {
        self.lab.network.switch().port_by_name(host)
    }

    /// Bytes that two hosts have sent each other so far.
    fn traffic(&self, a: &str, b: &str) -> u64 {
        let (Some(a), Some(b)) = (self.port(a), self.port(b)) else { return 0 };
        let switch = self.lab.network.switch();
        switch.bytes_between(a, b) + switch.bytes_between(b, a)
    }

    fn mark(&self, guest: &str) -> PeerMark {
        let view = self.lab.peer.view().into_iter().find(|v| v.name == guest).unwrap_or_default();
        PeerMark { tcp_accepted: view.tcp_accepted, tcp_broken: view.tcp_broken }
    }

    fn look_at_copies(&mut self, guest: &str) {
        let hosts = self.lab.hosts.iter().map(|h| &**h);
        let copies = Copies::look(guest, self.lab.clock.now(), self.lab.apart, hosts);
        self.record(guest).copies.push(copies);
    }

    /// Takes the look that ends the last move, or the run. A snapshot that can't be had is an error; the verdict then
    /// knows that the guest does not answer any more.
    fn look_after(&mut self, guest: &str) -> Result<()> {
        if !self.has_witness(guest) {
            return Ok(());
        }
        let snapshot = self.snapshot(guest)?;
        if let Some(last) = self.moves.iter_mut().rev().find(|m| m.guest == guest && m.ended.is_some())
            && last.after.is_none()
        {
            last.after = Some(snapshot.clone());
        }
        self.record(guest).first.get_or_insert(snapshot);
        Ok(())
    }

    /// A move that is over has no look after it until the next one begins, and can't be judged. A guest that does not answer is judged as one
    /// that has not reported since.
    fn look_after_last_moves(&mut self) {
        let guests: BTreeSet<String> =
            self.moves.iter().filter(|m| m.ended.is_some() && m.after.is_none()).map(|m| m.guest.clone()).collect();
        for guest in guests {
            if let Err(error) = self.look_after(&guest) {
                progress::say(format!("{error:#}"));
            }
        }
    }

    /// A guest is about to move.
    fn begin_move(&mut self, guest: &str, how: &'static str, to: &str) -> Result<usize> {
        let from = self.host_of(guest)?.name().to_owned();
        let before = if self.has_witness(guest) {
            self.look_after(guest).context("the look at the guest before its move")?;
            Some(self.snapshot(guest)?)
        } else {
            None
        };
        let began = self.lab.clock.now();
        self.lab.network.switch().new_epoch(&format!("{how} {guest} {from} to {to} at {:.1} s", began.as_secs_f64()));
        self.moves.push(Move {
            guest: guest.to_owned(),
            how,
            bytes: self.traffic(&from, to),
            from,
            to: to.to_owned(),
            began,
            ended: None,
            moved: false,
            window: before.as_ref().map(|b| Window { from_ns: b.mono_ns, to_ns: b.mono_ns }),
            output: String::new(),
            report: None,
            expected: BTreeMap::new(),
            at_start: self.mark(guest),
            before,
            after: None,
        });
        Ok(self.moves.len() - 1)
    }

    /// The tool that moved a guest has ended.
    fn end_move(&mut self, index: usize, ran: &Ran, moved: bool, bytes: Option<u64>) {
        let now = self.lab.clock.now();
        let Some(entry) = self.moves.get(index) else { return };
        let traffic = self.traffic(&entry.from, &entry.to).saturating_sub(entry.bytes);
        let guest = entry.guest.clone();
        let to = entry.to.clone();
        // The last that it wrote where it was.
        if let Err(error) = self.read_console(&guest) {
            progress::say(format!("{error:#}"));
        }
        if moved {
            self.record(&guest).on = Some(to);
        }
        // The window ends with the first report that was made after the tool's end.
        let reported = self.has_witness(&guest) && self.wait_beats(&guest, 1, Duration::from_secs(20)).is_ok();
        let first_after = self.lab.peer.view().into_iter().find(|v| v.name == guest && reported);
        let first_after = first_after.and_then(|v| v.beats.iter().find(|b| b.at >= now).map(|b| b.mono_ns));
        let Some(entry) = self.moves.get_mut(index) else { return };
        entry.ended = Some(now);
        entry.moved = moved;
        entry.bytes = bytes.unwrap_or(traffic);
        entry.output = ran.text();
        if let (Some(window), Some(end)) = (&mut entry.window, first_after) {
            window.to_ns = end;
        }
        self.look_at_copies(&guest);
    }
}

#[cfg(test)]
mod tests;
