//! Several moves beside each other: their figures, then each promise. A run with one stock move and one of Ferry's is thus a comparison.

use std::fmt::{Result, Write};

use super::{MoveReport, bytes, maybe, outcome_word, shortened};
use crate::verdict::{Outcome, Promise};

/// Width of the first column.
const NAMES: usize = 38;
/// Least width of the others.
const LEAST: usize = 16;
/// Pieces of evidence that are shown for a promise that a move broke.
const PIECES: usize = 2;

/// Stock tools first, whenever in the run they were used: they are what the others are measured against.
fn in_order(moves: &[MoveReport]) -> Vec<&MoveReport> {
    let mut moves: Vec<&MoveReport> = moves.iter().collect();
    moves.sort_by_key(|m| !m.entry.how.starts_with("xl"));
    moves
}

fn way(m: &MoveReport) -> String {
    format!("{} {} to {}", m.entry.guest, m.entry.from, m.entry.to)
}

fn outcome(m: &MoveReport, promise: Promise) -> String {
    let Some(judged) = m.verdict.iter().find(|j| j.promise == promise) else { return "-".to_owned() };
    let expected = m.entry.expected.get(&promise).copied().unwrap_or_default();
    let mark = if expected.allows(judged.outcome) { "" } else { " !" };
    format!("{}{mark}", outcome_word(judged.outcome))
}

/// Writes the table, and below it why a promise was not kept.
pub(super) fn write(out: &mut String, moves: &[MoveReport]) -> Result {
    let moves = in_order(moves);
    let domids = |m: &MoveReport| match m.domids {
        (Some(before), Some(after)) if before == after => format!("{after}, as before"),
        (Some(before), Some(after)) => format!("{before}, then {after}"),
        _ => "not seen".to_owned(),
    };
    let moved = |m: &MoveReport| if m.entry.moved { "arrived" } else { "did not move" }.to_owned();
    type Cell<'a> = &'a dyn Fn(&MoveReport) -> String;
    let figures: [(&str, Cell<'_>); 10] = [
        ("", &|m| m.entry.how.to_owned()),
        ("", &way),
        ("the guest", &moved),
        ("total time", &|m| maybe(m.total)),
        ("bytes", &|m| bytes(m.entry.bytes)),
        ("longest UDP silence", &|m| maybe(m.udp_silence)),
        ("longest TCP silence", &|m| maybe(m.tcp_silence)),
        ("gap of guest's clock", &|m| maybe(m.clock_gap)),
        ("blackout by the tool's report", &|m| maybe(m.blackout())),
        ("domid", &domids),
    ];
    let mut rows: Vec<(String, Vec<String>)> =
        figures.iter().map(|(name, cell)| ((*name).to_owned(), moves.iter().map(|m| cell(m)).collect())).collect();
    rows.push((String::new(), Vec::new()));
    if moves.iter().any(|m| !m.verdict.is_empty()) {
        for promise in Promise::ALL {
            let name = format!("{:<4}{}", format!("{promise:?}"), promise.title());
            rows.push((name, moves.iter().map(|m| outcome(m, promise)).collect()));
        }
    }
    let width = rows.iter().flat_map(|(_, cells)| cells).map(|c| c.chars().count() + 2).fold(LEAST, usize::max);
    writeln!(out)?;
    for (name, cells) in &rows {
        let cells: String = cells.iter().map(|cell| format!("{cell:<width$}")).collect();
        writeln!(out, "{}", format!("  {name:<NAMES$}{cells}").trim_end())?;
    }
    for m in &moves {
        for judged in m.verdict.iter().filter(|j| j.outcome == Outcome::Fail) {
            writeln!(out, "\n  {:?} by {}, {}:", judged.promise, m.entry.how, way(m))?;
            for text in judged.evidence.iter().take(PIECES) {
                writeln!(out, "      {}", shortened(text))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::scenario::Expected;
    use crate::steps::Move;
    use crate::verdict::Judged;

    pub(in super::super) fn a_move(how: &'static str, from: &str, to: &str) -> Move {
        Move {
            guest: "g".to_owned(),
            how,
            from: from.to_owned(),
            to: to.to_owned(),
            began: Duration::from_secs(20),
            ended: Some(Duration::from_secs(30)),
            moved: true,
            bytes: 5 << 20,
            window: None,
            output: String::new(),
            report: None,
            expected: Default::default(),
            at_start: Default::default(),
            before: None,
            after: None,
        }
    }

    fn report(how: &'static str, from: &str, to: &str, outcome: Outcome, expected: Expected) -> MoveReport {
        let entry = Move { expected: [(Promise::T1, expected)].into(), ..a_move(how, from, to) };
        let verdict = vec![Judged { promise: Promise::T1, outcome, evidence: vec![format!("{how} evidence")] }];
        let domids = if outcome == Outcome::Fail { (Some(1), Some(4)) } else { (Some(1), Some(1)) };
        MoveReport { udp_silence: Some(Duration::from_millis(700)), domids, ..MoveReport::new(&entry, None, verdict) }
    }

    #[test]
    fn moves_stand_beside_each_other_the_stock_one_first() {
        let moves = [
            report("ferry migrate", "a", "b", Outcome::Pass, Expected::Pass),
            report("ferry migrate", "b", "a", Outcome::NotExercised, Expected::Pass),
            report("xl migrate", "a", "b", Outcome::Fail, Expected::Fail),
        ];
        let mut out = String::new();
        write(&mut out, &moves).unwrap();
        let row = |name: &str| {
            let line =
                out.lines().find(|l| l.trim_start().starts_with(name)).unwrap_or_else(|| panic!("{name}: {out}"));
            line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(row("xl migrate"), ["xl migrate", "ferry migrate", "ferry migrate"]);
        assert_eq!(row("g a to b"), ["g a to b", "g a to b", "g b to a"]);
        assert_eq!(row("total time"), ["total time", "10.00 s", "10.00 s", "10.00 s"]);
        assert_eq!(row("bytes")[1], "5.0 MiB");
        assert_eq!(row("longest UDP"), ["longest UDP silence", "700 ms", "700 ms", "700 ms"]);
        assert_eq!(row("longest TCP")[1..], ["not seen", "not seen", "not seen"]);
        assert_eq!(row("blackout")[1..], ["not seen", "not seen", "not seen"]);
        assert_eq!(row("domid"), ["domid", "1, then 4", "1, as before", "1, as before"]);
        // What was not judged is not passed, and what is not as expected is marked.
        assert_eq!(row("T1"), ["T1", "domid, uuid and name", "FAIL", "pass", "not exercised !"]);
        assert_eq!(row("T2")[2..], ["-", "-", "-"]);
        assert!(out.contains("T1 by xl migrate, g a to b:\n      xl migrate evidence"), "{out}");
        assert!(!out.contains("ferry migrate evidence"), "{out}");
    }
}
