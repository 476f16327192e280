//! From what was seen inside and outside the guest to each promise of the design: pass, fail or not exercised, with the
//! evidence.

mod console;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use witness::disk::JournalFault;
pub use witness::judge::Outcome;
use witness::judge::{Calm, Evidence, Outside};
use witness::report::{Anomaly, Snapshot};

use crate::net::peer::{GuestView, Received};
use crate::net::switch::SwitchReport;
use crate::steps::copies::Copies;
use crate::steps::{GuestRecord, Move, PeerMark};

/// A promise of the design. The tests name them by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Promise {
    T1,
    T2,
    T3,
    T4,
    T5,
    T6,
    T7,
    T8,
    T9,
    T10,
    S1,
}

impl Promise {
    /// All of them, in the order of the design.
    pub const ALL: [Promise; 11] = [
        Promise::T1,
        Promise::T2,
        Promise::T3,
        Promise::T4,
        Promise::T5,
        Promise::T6,
        Promise::T7,
        Promise::T8,
        Promise::T9,
        Promise::T10,
        Promise::S1,
    ];

    /// What it promises, in a few words.
    pub fn title(self) -> &'static str {
        match self {
            Promise::T1 => "domid, uuid and name",
            Promise::T2 => "xenstore nodes and permissions",
            Promise::T3 => "watches and transactions",
            Promise::T4 => "event channels",
            Promise::T5 => "grant table",
            Promise::T6 => "shared areas, vectors, callback",
            Promise::T7 => "clocks and timers",
            Promise::T8 => "ring requests and disk writes",
            Promise::T9 => "TCP connections, network place",
            Promise::T10 => "memory and vCPU state",
            Promise::S1 => "one running copy",
        }
    }
}

impl From<witness::report::Promise> for Promise {
    fn from(promise: witness::report::Promise) -> Promise {
        use witness::report::Promise as W;
        match promise {
            W::T1 => Promise::T1,
            W::T2 => Promise::T2,
            W::T3 => Promise::T3,
            W::T4 => Promise::T4,
            W::T5 => Promise::T5,
            W::T6 => Promise::T6,
            W::T7 => Promise::T7,
            W::T8 => Promise::T8,
            W::T9 => Promise::T9,
            W::T10 => Promise::T10,
        }
    }
}

/// A promise, and how it came out in this run.
#[derive(Clone, Debug, Serialize)]
pub struct Judged {
    pub promise: Promise,
    pub outcome: Outcome,
    /// What broke it first, then what was looked at.
    pub evidence: Vec<String>,
}

/// All that is known of one guest with a witness.
#[derive(Clone, Debug)]
pub struct Seen<'a> {
    pub guest: &'a str,
    pub record: &'a GuestRecord,
    pub moves: Vec<&'a Move>,
    pub view: &'a GuestView,
    pub switch: &'a SwitchReport,
    /// What is wrong with the journal on the disk; `None` if nobody looked.
    pub journal: Option<Vec<JournalFault>>,
    /// The last look of the run.
    pub last: Option<&'a Received<Snapshot>>,
}

/// Shortest time before a move from which the allowance for emulation is taken.
const LEAST_CALM: Duration = Duration::from_secs(5);
/// How long after the tool's end a silence still counts to the move.
const AFTERMATH: Duration = Duration::from_secs(3);

/// One stretch of the run, from one look at the guest to another.
struct Leg<'a> {
    before: &'a Received<Snapshot>,
    after: &'a Received<Snapshot>,
    entry: Option<&'a Move>,
    /// What the peer had counted when the next move began, or at the run's end.
    end: PeerMark,
}

/// The part of the run's time line that counts to one judgement.
#[derive(Clone, Copy)]
struct Stretch {
    from: Duration,
    /// `None`: to the run's end.
    until: Option<Duration>,
}

impl Stretch {
    /// The whole run.
    const RUN: Stretch = Stretch { from: Duration::ZERO, until: None };

    fn holds(&self, at: Duration) -> bool {
        at >= self.from && self.until.is_none_or(|until| at < until)
    }
}

fn nothing_yet() -> Vec<Judged> {
    let judged = |promise| Judged { promise, outcome: Outcome::NotExercised, evidence: Vec::new() };
    Promise::ALL.into_iter().map(judged).collect()
}

/// Judges one guest by the whole run.
pub fn judge(seen: &Seen<'_>) -> Vec<Judged> {
    let mut judged = nothing_yet();
    if seen.moves.is_empty() {
        match (&seen.record.first, seen.last) {
            (Some(before), Some(after)) if before.at < after.at => {
                let leg = Leg { before, after, entry: None, end: mark(seen.view) };
                add_leg(&mut judged, seen, "", &leg);
            }
            _ => add_silent(&mut judged, "the guest was not looked at twice"),
        }
    }
    for index in 0..seen.moves.len() {
        let title = if seen.moves.len() > 1 { format!("move {}: ", index + 1) } else { String::new() };
        add_move(&mut judged, seen, &title, index);
    }
    add_outside(&mut judged, seen, Stretch::RUN);
    console::add_console(&mut judged, seen, Stretch::RUN);
    judged
}

/// Judges one of a guest's moves by itself, from the look before it to the look before the next one. What can't be told apart by time
/// counts to each: damaged packets, a fresh start, the journal on the disk.
pub fn judge_move(seen: &Seen<'_>, index: usize) -> Vec<Judged> {
    let mut judged = nothing_yet();
    add_move(&mut judged, seen, "", index);
    let began = |index: usize| seen.moves.get(index).map(|m| m.began);
    let stretch = Stretch { from: began(index).unwrap_or_default(), until: began(index + 1) };
    add_outside(&mut judged, seen, stretch);
    console::add_console(&mut judged, seen, stretch);
    judged
}

fn mark(view: &GuestView) -> PeerMark {
    PeerMark { tcp_accepted: view.tcp_accepted, tcp_broken: view.tcp_broken }
}

fn add_move(judged: &mut [Judged], seen: &Seen<'_>, title: &str, index: usize) {
    let Some(entry) = seen.moves.get(index) else { return };
    let end = seen.moves.get(index + 1).map_or_else(|| mark(seen.view), |next| next.at_start);
    match (&entry.before, &entry.after) {
        (Some(before), Some(after)) => {
            add_leg(judged, seen, title, &Leg { before, after, entry: Some(entry), end });
        }
        (None, _) => add_silent(judged, &format!("{title}the guest was not looked at before {}", entry.how)),
        (_, None) => add_silent(judged, &format!("{title}the guest has not reported since {}", entry.how)),
    }
}

fn add_leg(judged: &mut [Judged], seen: &Seen<'_>, title: &str, leg: &Leg<'_>) {
    // Each leg is judged by what was noticed until its end.
    let until_then = |a: &&Received<Anomaly>| a.body.mono_ns <= leg.after.mono_ns;
    let anomalies: Vec<Anomaly> = seen.view.anomalies.iter().filter(until_then).map(|a| a.body.clone()).collect();
    let evidence = Evidence {
        before: &leg.before.body,
        after: &leg.after.body,
        anomalies: &anomalies,
        window: leg.entry.and_then(|m| m.window),
        outside: outside(seen, leg),
        calm: calm(seen),
    };
    for verdict in witness::judge::judge(&evidence) {
        let evidence = verdict.evidence.into_iter().map(|text| format!("{title}{text}"));
        add(judged, verdict.promise.into(), verdict.outcome, evidence.collect());
    }
}

/// A guest that does not report any more.
fn add_silent(judged: &mut [Judged], text: &str) {
    for promise in [Promise::T9, Promise::T10] {
        add(judged, promise, Outcome::Fail, vec![text.to_owned()]);
    }
}

/// A failure stays, whatever else passes.
fn add(judged: &mut [Judged], promise: Promise, outcome: Outcome, evidence: Vec<String>) {
    let Some(entry) = judged.iter_mut().find(|j| j.promise == promise) else { return };
    match (entry.outcome, outcome) {
        (Outcome::Fail, _) | (_, Outcome::NotExercised) => entry.evidence.extend(evidence),
        (_, Outcome::Fail) => {
            entry.outcome = outcome;
            entry.evidence.splice(0..0, evidence);
        }
        _ => {
            entry.outcome = outcome;
            entry.evidence.extend(evidence);
        }
    }
}

/// The allowance for what emulation alone does: from the quiet time before the first move.
fn calm(seen: &Seen<'_>) -> Calm {
    let first_move = seen.moves.first().and_then(|m| m.before.as_ref());
    match (&seen.record.first, first_move) {
        (Some(first), Some(before)) if before.at.saturating_sub(first.at) >= LEAST_CALM => {
            Calm::from_control(&first.body, &before.body)
        }
        _ => Calm::default(),
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The silence of the guest's UDP stream that belongs to a move.
pub fn udp_silence(view: &GuestView, entry: &Move) -> Option<Duration> {
    let ended = entry.ended?;
    view.udp_stream.longest_within(entry.began, ended + AFTERMATH).map(|s| s.length())
}

/// The silence of the guest's TCP stream that belongs to a move.
pub fn tcp_silence(view: &GuestView, entry: &Move) -> Option<Duration> {
    let ended = entry.ended?;
    view.tcp_stream.longest_within(entry.began, ended + AFTERMATH).map(|s| s.length())
}

/// The largest gap that the guest saw around a move in any of its clocks (by Monotonic, Boottime or Realtime).
pub fn clock_gap(entry: &Move) -> Option<Duration> {
    let (window, after) = (entry.window?, entry.after.as_ref()?);
    let gaps = after.body.clocks.gaps.iter();
    let within = gaps.filter(|g| g.at_ns <= window.to_ns && g.at_ns.saturating_add(g.mono_ns) >= window.from_ns);
    let longest = |g: &witness::report::Gap| g.mono_ns.max(g.boot_ns.unsigned_abs()).max(g.real_ns.unsigned_abs());
    within.map(|g| Duration::from_nanos(longest(g))).max()
}

fn outside(seen: &Seen<'_>, leg: &Leg<'_>) -> Outside {
    let view = seen.view;
    let (accepted, broken) = leg.entry.map_or((1, 0), |m| (m.at_start.tcp_accepted, m.at_start.tcp_broken));
    // What the guest counted on its second address, from the first report after the move (or after the first look).
    let since = leg.entry.map_or(Some(leg.before.at), |m| m.ended);
    let start = since.and_then(|since| view.beats.iter().find(|b| b.at > since));
    let got = start.map(|beat| leg.after.body.counters.rx.saturating_sub(beat.body.rx));
    let sent = start.and_then(|beat| {
        let time = leg.after.at.checked_sub(beat.at)?;
        Some((time.as_secs_f64() * view.quiet_rate) as u64).filter(|n| *n > 0)
    });
    Outside {
        blackout_ns: leg.entry.and_then(|m| udp_silence(view, m)).map(nanos),
        tcp_alive: Some((leg.end.tcp_accepted, leg.end.tcp_broken) == (accepted, broken)),
        receive_only_sent_after: sent,
        receive_only_got_after: got.filter(|_| sent.is_some()),
        journal: seen.journal.clone(),
    }
}

/// What switch and peer saw in a stretch of the run, which no guest can.
fn add_outside(judged: &mut [Judged], seen: &Seen<'_>, stretch: Stretch) {
    let view = seen.view;
    if view.restarts > 0 {
        let text = format!("the guest was started anew {} times", view.restarts);
        add(judged, Promise::T10, Outcome::Fail, vec![text]);
    }
    for (name, flow) in [
        ("guest's UDP stream", &view.udp_stream),
        ("guest's TCP stream", &view.tcp_stream),
        ("echo of the peer's UDP stream", &view.udp_echo),
        ("echo of the peer's TCP stream", &view.tcp_echo),
    ] {
        if flow.counts.corrupt > 0 {
            let text = format!("{name}: {} packets were damaged", flow.counts.corrupt);
            add(judged, Promise::T9, Outcome::Fail, vec![text]);
        }
    }
    let mut broken = Vec::new();
    let mut looked = Vec::new();
    let doubles = seen.switch.double_senders.iter().filter(|d| d.owner == seen.guest && stretch.holds(d.heard_again));
    for double in doubles {
        let port = |id: crate::net::switch::PortId| seen.switch.ports.get(id.0).map_or("?", |p| &p.name);
        broken.push(format!(
            "{} was heard on {} again at {:.3} s, after it had moved to {} (last heard there at {:.3} s), in {}",
            double.mac,
            port(double.port),
            double.heard_again.as_secs_f64(),
            port(double.moved_to),
            double.last_on_moved_to.as_secs_f64(),
            double.epoch
        ));
    }
    if view.udp_stream.counts.conflicting > 0 {
        broken.push(format!(
            "{} numbers of the guest's UDP stream came twice with different time stamps: two copies count on",
            view.udp_stream.counts.conflicting
        ));
    }
    let looks: Vec<&Copies> = seen.record.copies.iter().filter(|copies| stretch.holds(copies.at)).collect();
    for copies in &looks {
        let running = copies.running().len();
        let into = if running > 1 { &mut broken } else { &mut looked };
        into.push(copies.describe());
    }
    for station in seen.switch.stations.iter().filter(|s| s.owner == seen.guest) {
        if let Some(port) = &station.port {
            let moves = station.move_count;
            looked.push(format!("{} was heard on one port at a time, last on {port}, {moves} moves", station.mac));
        }
    }
    if !broken.is_empty() {
        broken.extend(looked);
        add(judged, Promise::S1, Outcome::Fail, broken);
    } else if !looks.is_empty() {
        add(judged, Promise::S1, Outcome::Pass, looked);
    }
}

#[cfg(test)]
mod tests;
