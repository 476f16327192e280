//! What a run is worth telling: as JSON for scripts, as text for people.

mod table;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use crate::net::peer::GuestView;
use crate::net::switch::SwitchReport;
use crate::scenario::{Expect, Expected, Limits};
use crate::steps::race::{EmulatorRace, TripleFault};
use crate::steps::{Move, StepResult};
use crate::verdict::{self, Judged, Outcome};

/// The whole run. Times are seconds since its start in JSON.
#[derive(Clone, Debug, Serialize)]
pub struct RunReport {
    /// True if all steps were carried out and everything came out as the scenario expects.
    pub passed: bool,
    pub scenario: String,
    pub about: String,
    /// The run's folder.
    pub folder: PathBuf,
    /// From the command to the report.
    pub took: Duration,
    /// Until the hosts were ready for the first step.
    pub set_up: Duration,
    /// 1, or more if earlier ones met the emulator's race.
    pub attempt: u32,
    /// The emulator's race in a host's log, if it was met: host and what stands there.
    pub emulator_races: Vec<(String, EmulatorRace)>,
    /// Triple faults of guests that are not that race, in the last attempt: host and what stands there.
    pub triple_faults: Vec<(String, TripleFault)>,
    pub steps: Vec<StepResult>,
    /// Why the run ended before its time.
    pub error: Option<String>,
    pub moves: Vec<MoveReport>,
    pub guests: Vec<GuestReport>,
    pub switch: SwitchReport,
    /// What came out otherwise than the scenario expects.
    pub unexpected: Vec<String>,
}

/// One move with its figures.
#[derive(Clone, Debug, Serialize)]
pub struct MoveReport {
    #[serde(flatten)]
    pub entry: Move,
    /// From the command to its end.
    pub total: Option<Duration>,
    /// Longest time in which the peer heard nothing on the guest's UDP stream.
    pub udp_silence: Option<Duration>,
    /// Longest time in which the peer heard nothing on the guest's TCP stream.
    pub tcp_silence: Option<Duration>,
    /// Longest time that the guest's own clock jumped over.
    pub clock_gap: Option<Duration>,
    /// The guest's domid before and after, as it reads it itself.
    pub domids: (Option<u16>, Option<u16>),
    /// Each promise, judged by this move alone. Empty for a guest without a witness.
    pub verdict: Vec<Judged>,
}

impl MoveReport {
    /// With what the peer saw of the guest.
    pub fn new(entry: &Move, view: Option<&GuestView>, verdict: Vec<Judged>) -> Self {
        let domid = |look: &Option<crate::net::peer::Received<witness::report::Snapshot>>| {
            look.as_ref().and_then(|s| s.body.identity.domid_store.seen().copied())
        };
        Self {
            total: entry.ended.map(|end| end.saturating_sub(entry.began)),
            udp_silence: view.and_then(|v| verdict::udp_silence(v, entry)),
            tcp_silence: view.and_then(|v| verdict::tcp_silence(v, entry)),
            clock_gap: verdict::clock_gap(entry),
            domids: (domid(&entry.before), domid(&entry.after)),
            entry: entry.clone(),
            verdict,
        }
    }

    /// From the pause to the unpause, as the tool itself reports it.
    pub fn blackout(&self) -> Option<Duration> {
        self.entry.report.as_ref().map(|r| Duration::from_micros(r.blackout_us))
    }
}

/// One guest with a witness.
#[derive(Clone, Debug, Serialize)]
pub struct GuestReport {
    pub guest: String,
    pub verdict: Vec<Judged>,
    /// What the witness could not look at, and why.
    pub absent: Vec<String>,
    /// What the peer saw.
    pub peer: GuestView,
}

/// What came out otherwise than expected.
pub fn unexpected(expect: &Expect, guests: &[GuestReport], moves: &[MoveReport]) -> Vec<String> {
    let mut found = Vec::new();
    for guest in guests {
        for judged in &guest.verdict {
            let expected = expect.of(judged.promise);
            if !expected.allows(judged.outcome) {
                let why = judged.evidence.first().map_or("", String::as_str);
                found.push(format!(
                    "guest {}: {:?} is {}, expected {}: {why}",
                    guest.guest,
                    judged.promise,
                    outcome_word(judged.outcome),
                    expected_word(expected)
                ));
            }
        }
    }
    for (index, m) in moves.iter().enumerate() {
        for judged in &m.verdict {
            let expected = m.entry.expected.get(&judged.promise).copied().unwrap_or_default();
            if !expected.allows(judged.outcome) {
                let why = judged.evidence.first().map_or("", String::as_str);
                found.push(format!(
                    "move {} ({} of {} from {} to {}): {:?} is {}, expected {}: {why}",
                    index + 1,
                    m.entry.how,
                    m.entry.guest,
                    m.entry.from,
                    m.entry.to,
                    judged.promise,
                    outcome_word(judged.outcome),
                    expected_word(expected)
                ));
            }
        }
    }
    let longest = |flow: fn(&GuestView) -> Option<Duration>| guests.iter().filter_map(|g| flow(&g.peer)).max();
    let Limits { udp_silence, tcp_silence, clock_gap, migration } = expect.limits.clone();
    for (what, limit, value) in [
        ("longest UDP silence", udp_silence, longest(|v| v.udp_stream.longest())),
        ("longest TCP silence", tcp_silence, longest(|v| v.tcp_stream.longest())),
        ("longest gap of the guest's clock", clock_gap, moves.iter().filter_map(|m| m.clock_gap).max()),
        ("longest migration", migration, moves.iter().filter_map(|m| m.total).max()),
    ] {
        match (limit, value) {
            (Some(limit), Some(value)) if value > limit.0 => {
                found.push(format!("{what}: {}, at most {} expected", seconds(value), seconds(limit.0)));
            }
            (Some(_), None) => found.push(format!("{what} is limited, but was not measured")),
            _ => {}
        }
    }
    found
}

fn outcome_word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Pass => "pass",
        Outcome::Fail => "FAIL",
        Outcome::NotExercised => "not exercised",
    }
}

fn expected_word(expected: Expected) -> &'static str {
    match expected {
        Expected::Pass => "pass",
        Expected::Fail => "fail",
        Expected::NotExercised => "not exercised",
        Expected::Any => "any",
    }
}

fn seconds(time: Duration) -> String {
    if time < Duration::from_secs(1) {
        format!("{:.0} ms", time.as_secs_f64() * 1e3)
    } else {
        format!("{:.2} s", time.as_secs_f64())
    }
}

fn maybe(time: Option<Duration>) -> String {
    time.map_or_else(|| "not seen".to_owned(), seconds)
}

fn bytes(n: u64) -> String {
    if n < 1 << 20 { format!("{:.1} KiB", n as f64 / 1024.0) } else { format!("{:.1} MiB", n as f64 / 1048576.0) }
}

/// Longest piece of evidence that the text shows; JSON has all of it.
const SHOWN: usize = 150;
/// Pieces of evidence that the text shows of a failed promise.
const PIECES: usize = 4;

fn shortened(text: &str) -> String {
    if text.chars().count() <= SHOWN {
        return text.to_owned();
    }
    text.chars().take(SHOWN).chain("…".chars()).collect()
}

impl RunReport {
    /// For a person.
    pub fn text(&self, expect: &Expect) -> String {
        let mut out = String::new();
        // Writing to a string can't fail.
        let _ = self.write_text(&mut out, expect);
        out
    }

    fn write_text(&self, out: &mut String, expect: &Expect) -> std::fmt::Result {
        writeln!(out, "\n{}: {}", self.scenario, self.about)?;
        let several = self.moves.len() > 1;
        if several {
            table::write(out, &self.moves)?;
        }
        for entry in self.moves.iter().filter(|_| !several) {
            let (m, end) = (&entry.entry, if entry.entry.moved { "" } else { " (the guest did not move)" });
            writeln!(out, "\n  {} of {} from {} to {}{end}", m.how, m.guest, m.from, m.to)?;
            writeln!(out, "    total time              {}", maybe(entry.total))?;
            writeln!(out, "    bytes                   {}", bytes(m.bytes))?;
            writeln!(out, "    longest UDP silence     {}", maybe(entry.udp_silence))?;
            writeln!(out, "    longest TCP silence     {}", maybe(entry.tcp_silence))?;
            writeln!(out, "    gap of guest's clock    {}", maybe(entry.clock_gap))?;
            writeln!(out, "    blackout by its report  {}", maybe(entry.blackout()))?;
            if let (Some(before), Some(after)) = entry.domids {
                writeln!(out, "    domid                   {before} before, {after} after")?;
            }
        }
        for guest in &self.guests {
            let g = &guest.peer;
            writeln!(out, "\n  guest {}, as the peer saw it", guest.guest)?;
            for (name, flow) in [
                ("UDP from the guest", &g.udp_stream),
                ("TCP from the guest", &g.tcp_stream),
                ("UDP echo by the guest", &g.udp_echo),
                ("TCP echo by the guest", &g.tcp_echo),
            ] {
                let c = flow.counts;
                writeln!(
                    out,
                    "    {name:<22}  {:>6} came, {} lost, {} twice, {} late, {} damaged; longest silence {}",
                    c.received,
                    c.lost,
                    c.duplicated + c.conflicting,
                    c.reordered,
                    c.corrupt,
                    maybe(flow.longest())
                )?;
            }
            for absent in &guest.absent {
                writeln!(out, "    not looked at: {absent}")?;
            }
            // With several moves the table has said it.
            if several {
                continue;
            }
            writeln!(out, "\n  promise                                   outcome         expected")?;
            for judged in &guest.verdict {
                let expected = expect.of(judged.promise);
                let mark = if expected.allows(judged.outcome) { ' ' } else { '!' };
                writeln!(
                    out,
                    "  {mark} {:<4}{:<36}{:<16}{}",
                    format!("{:?}", judged.promise),
                    judged.promise.title(),
                    outcome_word(judged.outcome),
                    expected_word(expected)
                )?;
                let shown = if judged.outcome == Outcome::Pass { 1 } else { PIECES };
                for text in judged.evidence.iter().take(shown) {
                    writeln!(out, "          {}", shortened(text))?;
                }
            }
        }
        for (host, race) in &self.emulator_races {
            writeln!(
                out,
                "\n  emulator race on {host}: {} (RIP {:#x}, RSP {:#x} are Xen's)",
                race.line, race.rip, race.rsp
            )?;
        }
        for (host, fault) in &self.triple_faults {
            writeln!(out, "\n  triple fault on {host} that is not the emulator's known race: {}", fault.line)?;
            for line in &fault.dump {
                writeln!(out, "    | {line}")?;
            }
        }
        if let Some(error) = &self.error {
            writeln!(out, "\n  {error}")?;
        }
        for text in &self.unexpected {
            writeln!(out, "  unexpected: {}", shortened(text))?;
        }
        writeln!(
            out,
            "\n{} {} in {} (hosts ready after {}); logs in {}",
            self.scenario,
            if self.passed { "came out as expected" } else { "FAILED" },
            seconds(self.took),
            seconds(self.set_up),
            self.folder.display()
        )
    }

    /// Writes it as JSON.
    pub fn write_json(&self, path: &Path) -> Result<()> {
        let mut value = serde_json::to_value(self).context("the report as JSON")?;
        durations_to_seconds(&mut value);
        let text = serde_json::to_string_pretty(&value).context("the report as JSON")?;
        std::fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))
    }
}

/// serde writes a duration as `{"secs": …, "nanos": …}`; scripts want seconds.
fn durations_to_seconds(value: &mut Value) {
    match value {
        Value::Object(map) => {
            if let (2, Some(secs), Some(nanos)) =
                (map.len(), map.get("secs").and_then(Value::as_u64), map.get("nanos").and_then(Value::as_u64))
            {
                *value = Value::from(secs as f64 + nanos as f64 / 1e9);
                return;
            }
            map.values_mut().for_each(durations_to_seconds);
        }
        Value::Array(list) => list.iter_mut().for_each(durations_to_seconds),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::flow::Silence;
    use crate::scenario::Scenario;
    use crate::verdict::Promise;

    fn expect(text: &str) -> Expect {
        let text = format!("about = \"x\"\n[[host]]\nname = \"a\"\n[expect]\n{text}");
        Scenario::parse(Path::new("x"), &text).unwrap().expect
    }

    fn guest(outcome: Outcome, silence_ms: u64) -> GuestReport {
        let judged = Judged { promise: Promise::T1, outcome, evidence: vec!["domid was 1, is 4".to_owned()] };
        let mut peer = GuestView::default();
        peer.udp_stream.silences = vec![Silence { from: Duration::ZERO, to: Duration::from_millis(silence_ms) }];
        GuestReport { guest: "g".to_owned(), verdict: vec![judged], absent: vec![], peer }
    }

    #[test]
    fn what_is_not_as_expected_is_said() {
        let fails = expect("every-promise = \"fail\"");
        assert!(unexpected(&fails, &[guest(Outcome::Fail, 0)], &[]).is_empty());
        let found = unexpected(&fails, &[guest(Outcome::Pass, 0)], &[]);
        assert_eq!(found, ["guest g: T1 is pass, expected fail: domid was 1, is 4"]);
        assert!(unexpected(&expect(""), &[guest(Outcome::Fail, 0)], &[]).is_empty());
    }

    #[test]
    fn a_move_that_comes_out_otherwise_than_its_step_expects_is_said() {
        let of = |outcome, expected| {
            let entry =
                Move { expected: [(Promise::T1, expected)].into(), ..table::tests::a_move("xl migrate", "a", "b") };
            let judged = Judged { promise: Promise::T1, outcome, evidence: vec!["why".to_owned()] };
            unexpected(&expect(""), &[], &[MoveReport::new(&entry, None, vec![judged])])
        };
        assert!(of(Outcome::Fail, Expected::Fail).is_empty());
        assert!(of(Outcome::Fail, Expected::Any).is_empty());
        let said = "move 1 (xl migrate of g from a to b): T1 is pass, expected fail: why";
        assert_eq!(of(Outcome::Pass, Expected::Fail), [said]);
    }

    #[test]
    fn limits_are_held_and_an_unmeasured_one_is_not_kept() {
        let limits = expect("limits = { udp-silence = \"1s\" }");
        assert!(unexpected(&limits, &[guest(Outcome::Pass, 900)], &[]).is_empty());
        assert_eq!(unexpected(&limits, &[guest(Outcome::Pass, 1100)], &[]).len(), 1);
        assert_eq!(unexpected(&expect("limits = { migration = \"1s\" }"), &[guest(Outcome::Pass, 0)], &[]).len(), 1);
    }

    #[test]
    fn json_has_seconds() {
        let mut value = serde_json::json!({
            "a": serde_json::to_value(Duration::from_millis(1500)).unwrap(),
            "b": [serde_json::to_value(Duration::from_secs(2)).unwrap(), {"secs": 1}],
        });
        durations_to_seconds(&mut value);
        assert_eq!(value, serde_json::json!({"a": 1.5, "b": [2.0, {"secs": 1}]}));
    }
}
