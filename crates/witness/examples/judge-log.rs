//! Judges a file of the witness's report lines (a console log, or what a peer received): the first snapshot that was asked
//! for against the last snapshot or final report.
//!
//!     cargo run -p witness --example judge-log -- FILE [FROM_S TO_S]
//!
//! FROM_S and TO_S give the move's window by the guest's CLOCK_MONOTONIC, in seconds; without them there was no move.

use std::collections::BTreeSet;
use std::process::ExitCode;
use witness::judge::{Calm, Evidence, Outcome, Outside, Window, judge};
use witness::report::{Body, Snapshot};
use witness::wire::{REPORT_BEGINS, from_console, parse_report};

fn seconds(text: &str) -> Result<u64, String> {
    let s: f64 = text.parse().map_err(|_| format!("{text}: not a number of seconds"))?;
    Ok((s * 1e9) as u64)
}

fn run() -> Result<bool, String> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (file, window) = match &args[..] {
        [file] => (file, None),
        [file, from, to] => (file, Some(Window { from_ns: seconds(from)?, to_ns: seconds(to)? })),
        _ => return Err("usage: judge-log FILE [FROM_S TO_S]".into()),
    };
    let text = std::fs::read_to_string(file).map_err(|e| format!("{file}: {e}"))?;
    let mut seen = BTreeSet::new();
    let mut snapshots: Vec<Snapshot> = Vec::new();
    let mut anomalies = Vec::new();
    for line in text.lines().filter(|l| l.starts_with(REPORT_BEGINS)) {
        let Ok(report) = parse_report(from_console(line).unwrap_or(line).as_bytes()) else { continue };
        if !seen.insert((report.run, report.seq)) {
            continue;
        }
        match report.body {
            Body::Snapshot(s) => snapshots.push(*s),
            Body::Final(f) => snapshots.push(f.snapshot),
            Body::Anomaly(a) => anomalies.push(a),
            Body::Hello(_) | Body::Beat(_) | Body::Journal(_) => {}
        }
    }
    let before = snapshots.iter().find(|s| s.reason == "asked").or(snapshots.first()).ok_or("no snapshot")?;
    let after = snapshots.last().filter(|s| !std::ptr::eq(*s, before)).ok_or("only one snapshot")?;
    let evidence =
        Evidence { before, after, anomalies: &anomalies, window, outside: Outside::default(), calm: Calm::default() };
    let verdicts = judge(&evidence);
    for v in &verdicts {
        println!("{:4} {:?}: {}", v.promise.to_string(), v.outcome, v.promise.says());
        for e in &v.evidence {
            println!("       {e}");
        }
    }
    Ok(verdicts.iter().all(|v| v.outcome != Outcome::Fail))
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(e) => {
            eprintln!("judge-log: {e}");
            ExitCode::from(2)
        }
    }
}
