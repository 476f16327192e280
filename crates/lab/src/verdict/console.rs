//! T8 by the ring of a guest's console: nothing lost, nothing twice, nothing torn.

use std::time::Duration;

use super::{Judged, Outcome, Promise, Seen, Stretch, add};
use crate::steps::Move;
use crate::steps::ring::{Fault, Line, Ring};

/// Size of the ring of what the guest writes. With so much on each side of a move every byte of it was used anew.
const RING: u64 = 2048;
/// Faults that are shown; the rest is counted.
const MOST: usize = 8;

/// Judges the console's ring in a stretch of the run, for the moves that began in it.
pub(super) fn add_console(judged: &mut [Judged], seen: &Seen<'_>, stretch: Stretch) {
    let Some(ring) = &seen.record.console else { return };
    let broken = within(&ring.faults, stretch);
    if !broken.is_empty() {
        let mut evidence = told(&broken);
        let dropped = seen.view.beats.last().map_or(0, |beat| beat.body.reports_lost);
        if dropped > 0 {
            evidence.push(format!("the witness dropped {dropped} reports itself: its console took nothing for long"));
        }
        add(judged, Promise::T8, Outcome::Fail, evidence);
        return;
    }
    let unseen = within(&ring.unseen, stretch);
    if !unseen.is_empty() {
        add(judged, Promise::T8, Outcome::NotExercised, told(&unseen));
        return;
    }
    let (outcome, evidence) = match exercised(ring, seen, stretch) {
        // The disk's ring is judged by what is on the disk.
        Ok(evidence) if has_disk(seen) => (Outcome::NotExercised, evidence),
        Ok(evidence) => (Outcome::Pass, evidence),
        Err(missing) => (Outcome::NotExercised, vec![missing]),
    };
    add(judged, Promise::T8, outcome, evidence);
}

fn within(faults: &[Fault], stretch: Stretch) -> Vec<&Fault> {
    faults.iter().filter(|fault| stretch.holds(fault.at)).collect()
}

fn told(faults: &[&Fault]) -> Vec<String> {
    let mut told: Vec<String> = faults.iter().take(MOST).map(|fault| format!("console: {}", fault.what)).collect();
    if faults.len() > MOST {
        told.push(format!("console: and {} more like these", faults.len() - MOST));
    }
    told
}

fn has_disk(seen: &Seen<'_>) -> bool {
    let first = seen.record.first.iter().chain(seen.last);
    first.flat_map(|look| &look.body.devices).any(|device| device.name.starts_with("vbd"))
}

/// What came, if it was enough to tell.
fn exercised(ring: &Ring, seen: &Seen<'_>, stretch: Stretch) -> Result<Vec<String>, String> {
    let moves: Vec<&Move> = seen.moves.iter().copied().filter(|m| stretch.holds(m.began)).collect();
    if moves.is_empty() {
        return part(ring, None, Duration::ZERO, Duration::MAX).map(|text| vec![format!("console: {text}")]);
    }
    let mut evidence = Vec::new();
    for entry in moves {
        let earlier = seen.moves.iter().rev().find(|m| m.began < entry.began);
        let later = seen.moves.iter().find(|m| m.began > entry.began);
        let from = earlier.map_or(Duration::ZERO, |m| m.ended.unwrap_or(m.began));
        let until = later.map_or(Duration::MAX, |m| m.began);
        let ended = entry.ended.ok_or_else(|| format!("console: {} has not ended", entry.how))?;
        let on = if entry.moved { &entry.to } else { &entry.from };
        let before = part(ring, Some(&entry.from), from, entry.began);
        let before = before.map_err(|missing| format!("console: before {}: {missing}", entry.how))?;
        let after = part(ring, Some(on), ended, until);
        let after = after.map_err(|missing| format!("console: after {}: {missing}", entry.how))?;
        evidence
            .push(format!("console: before {}: {before}; after it: {after}; each once, whole, in order", entry.how));
    }
    Ok(evidence)
}

/// What came from one host in one time.
fn part(ring: &Ring, host: Option<&str>, from: Duration, until: Duration) -> Result<String, String> {
    let came = |line: &&Line| line.at >= from && line.at < until && host.is_none_or(|host| line.host == host);
    let lines: Vec<&Line> = ring.lines.iter().filter(came).collect();
    let numbers: Vec<u64> = lines.iter().filter_map(|line| line.number).collect();
    let answers = lines.len() - numbers.len();
    let bytes: u64 = lines.iter().map(|line| line.bytes).sum();
    let on = host.map_or_else(String::new, |host| format!(" on {host}"));
    match (numbers.first(), numbers.last()) {
        (Some(first), Some(last)) if bytes >= RING && answers > 0 => {
            Ok(format!("reports {first} to {last} and {answers} answers{on}"))
        }
        _ => Err(format!("only {} reports of {bytes} bytes and {answers} answers came{on}", numbers.len())),
    }
}
