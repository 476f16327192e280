//! `cargo xtask faults`: each fault at each point of the handshake, one by one, on two hosts in the lab.
//!
//! The points are those of `migrate::fault_points`. A scenario is written with one `fault` step for each; a guest goes to and
//! fro between one pair of hosts for as long as all goes well. A failed step ends a run, and the rest gets new hosts. Where a host
//! is switched off (`--kind gone`) each point has hosts of its own.

use crate::generated::{self, Runner};
use anyhow::{Result, bail};
use migrate::fault_points::{self, Lead, Plant, Side};
use migrate::host::Fault;
use serde_json::Value;
use std::fmt::Write as _;
use std::process::ExitCode;

/// What is run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only points whose name holds this: `source.before.journal-go`, `connect`
    #[arg(long, value_name = "POINT")]
    step: Option<String>,
    /// Only this kind of fault
    #[arg(long, value_parser = ["cut", "fail", "crash", "panic", GONE])]
    kind: Option<String>,
    /// Only tell what would be run
    #[arg(long)]
    list: bool,
    /// Leave out so many: to go on where a run was ended
    #[arg(long, value_name = "N", default_value_t = 0)]
    skip: usize,
    /// No more than so many: a part of a long run, with a verdict of its own
    #[arg(long, value_name = "N")]
    take: Option<usize>,
    /// So many for one pair of hosts
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    chunk: usize,
}

/// The kind of fault that no host gets over: it is switched off.
const GONE: &str = "gone";

/// A fault with what must go wrong before.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Case {
    plant: Plant,
    lead: Lead,
}

impl Case {
    /// The point is where a host is switched off.
    fn gone(&self) -> bool {
        self.plant.fault == Fault::Hang
    }

    fn kind(&self) -> String {
        if self.gone() { GONE.to_owned() } else { self.plant.fault.to_string() }
    }

    fn gone_step(&self, then: Then) -> String {
        let lead: Vec<String> = self.lead.plant().iter().map(|lead| format!("{:?}", lead.to_string())).collect();
        let (point, then, unfit) = (&self.plant.point, then.step(), self.lead == Lead::Unfit);
        format!(
            "{{ guest = \"g\", point = {point:?}, then = {then:?}, faults = [{}], unfit = {unfit} }}",
            lead.join(", ")
        )
    }

    /// All that is planted, as the scenario has it.
    fn faults(&self) -> Vec<String> {
        let lead = self.lead.plant().filter(|lead| lead.point != self.plant.point);
        lead.iter().chain([&self.plant]).map(ToString::to_string).collect()
    }
}

/// What becomes of the guest when the host that comes to a point is switched off there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// The other host runs it, and asked nobody.
    Runs,
    /// The other host waits for the operator's word.
    Waits,
    /// As Waits, but it had been started on the host that is gone: what it did there is lost with it.
    Diverges,
    /// It was on the host that is gone.
    Lost,
}

impl Then {
    /// docs/handshake.md, "When a host is gone for good".
    fn of(point: &str) -> Then {
        match point.split_once(".before.").unwrap_or((point, "")) {
            ("source", "journal-go" | "send-go") => Then::Waits,
            ("source", "journal-done" | "destroy" | "journal-left" | "report" | "send-moved" | "journal-closed") => {
                Then::Runs
            }
            ("destination", "journal-accepted" | "connect" | "journal-starting" | "start") => Then::Waits,
            ("destination", "journal-running" | "send-running") => Then::Diverges,
            ("destination", "journal-closed" | "send-bye") | ("source", _) => Then::Lost,
            _ => Then::Runs,
        }
    }

    /// As the lab's step has it.
    fn step(self) -> &'static str {
        match self {
            Then::Runs => "runs",
            Then::Waits | Then::Diverges => "waits",
            Then::Lost => "lost",
        }
    }

    /// What the witness may be asked for.
    fn expect(self) -> &'static str {
        match self {
            // The operator answers at once, so that it stands still for seconds only.
            Then::Runs | Then::Waits => "every-promise = \"pass\"\n",
            Then::Diverges | Then::Lost => "every-promise = \"any\"\n",
        }
    }
}

/// How one came out.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Outcome {
    case: Case,
    /// What was wrong; nothing if all held.
    wrong: Vec<String>,
}

fn cases(options: &Options) -> Vec<Case> {
    let points = fault_points::all().into_iter();
    let wanted = points.filter(|p| options.step.as_ref().is_none_or(|step| p.name.contains(step.as_str())));
    let each = wanted.flat_map(|point| {
        let of = |fault: &Fault| Case { plant: Plant { point: point.name.clone(), fault: *fault }, lead: point.lead };
        let gone = point.name.contains(".before.").then_some(Fault::Hang);
        point.faults().iter().chain(&gone).map(of).collect::<Vec<_>>()
    });
    let of_kind = each.filter(|c| options.kind.as_ref().is_none_or(|kind| c.kind() == *kind));
    of_kind.skip(options.skip).take(options.take.unwrap_or(usize::MAX)).collect()
}

/// The guest, behind its hosts. It is small, so that a move is short; what its ramdisk leaves behind is no memory that must be sent.
const STAGE: &str = r#"
[[disk]]
name = "lun"
delay = "5ms"

[[guest]]
name = "g"
memory = "128M"
command-line = "init_on_free=1"
[guest.workload]
mem-mib = 4
journal = 5
rewrite = 32
churn-kib = 128
tcp = 5
udp = 10
tick-duty = 5
regs-spin-us = 500
[guest.peer]
tcp = 5
udp = 5
quiet = 10
[[guest.vif]]
mac = "00:16:3e:f0:00:01"
[[guest.vif]]
mac = "00:16:3e:f0:00:02"
[[guest.vbd]]
disk = "lun"

[[step]]
create = { guest = "g", on = "a" }

[[step]]
wait = { guest = "g", reports = 2, limit = "180s" }

[[step]]
sleep = "3s"
"#;
/// Steps of [`STAGE`].
const BEFORE: usize = 3;
/// A generous time for each, with the two looks at the guest.
const SECONDS_EACH: usize = 420;

fn scenario(cases: &[Case]) -> String {
    let seconds = 600 + cases.len() * SECONDS_EACH;
    let mut text = format!(
        "about = \"Faults at {} points of the handshake, one after another: one host runs the guest, which notices nothing.\"\n\
         time-limit = \"{seconds}s\"\n\n{}{STAGE}",
        cases.len(),
        generated::two_hosts("2G")
    );
    let mut expect = "every-promise = \"pass\"\n";
    for case in cases {
        if case.gone() {
            let then = Then::of(&case.plant.point);
            let _ = write!(text, "\n[[step]]\ngone = {}\n", case.gone_step(then));
            expect = then.expect();
            continue;
        }
        let faults: Vec<String> = case.faults().iter().map(|f| format!("{f:?}")).collect();
        let unfit = if case.lead == Lead::Unfit { ", unfit = true" } else { "" };
        let on = match fault_points::guest_is_on(&case.plant) {
            Some(Side::Source) => ", guest-on = \"source\"",
            Some(Side::Destination) => ", guest-on = \"destination\"",
            None => "",
        };
        let _ = write!(text, "\n[[step]]\nfault = {{ guest = \"g\", faults = [{}]{unfit}{on} }}\n", faults.join(", "));
    }
    text.push_str("\n[expect]\n");
    text + expect
}

/// Runs all, or lists them.
pub fn run(options: &Options) -> Result<ExitCode> {
    let cases = cases(options);
    if cases.is_empty() {
        bail!("no point of the handshake fits; `cargo xtask faults --list` shows all");
    }
    if options.list {
        for (number, case) in cases.iter().enumerate() {
            println!("{:>4}  {}", options.skip + number, describe(case));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let runner = Runner::new("faults")?;
    let mut done: Vec<Outcome> = Vec::new();
    while let Some(rest) = cases.get(done.len()..).filter(|rest| !rest.is_empty()) {
        let chunk = rest.get(..together(rest).min(options.chunk)).unwrap_or(rest);
        let outcomes = run_chunk(&runner, done.len(), chunk)?;
        done.extend(outcomes);
    }
    println!("\n=== faults");
    for outcome in &done {
        let word = if outcome.wrong.is_empty() { "pass" } else { "FAIL" };
        println!("{word}  {}", describe(&outcome.case));
        outcome.wrong.iter().for_each(|wrong| println!("      {wrong}"));
    }
    let failed = done.iter().filter(|outcome| !outcome.wrong.is_empty()).count();
    println!("{} passed, {failed} failed", done.len() - failed);
    Ok(ExitCode::from(u8::from(failed > 0)))
}

fn describe(case: &Case) -> String {
    let lead = match case.lead {
        Lead::None => String::new(),
        Lead::Unfit => " (the destination refuses the guest)".to_owned(),
        lead => lead.plant().map(|lead| format!(" (after {lead})")).unwrap_or_default(),
    };
    format!("{}={}{lead}", case.plant.point, case.kind())
}

/// How many of these, from the first on, one pair of hosts can have: what is switched off does not come back.
fn together(cases: &[Case]) -> usize {
    if cases.first().is_some_and(Case::gone) { 1 } else { cases.iter().take_while(|case| !case.gone()).count() }
}

/// Runs a scenario for these; gives the outcome of those that it came to, at least one.
fn run_chunk(runner: &Runner, first: usize, chunk: &[Case]) -> Result<Vec<Outcome>> {
    let report = runner.run(&format!("faults-{first:03}"), &scenario(chunk), 900 + chunk.len() * SECONDS_EACH)?;
    outcomes(&report, chunk)
}

/// Reads the lab's report: which faults it came to, and what was wrong.
fn outcomes(report: &Value, chunk: &[Case]) -> Result<Vec<Outcome>> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let steps = list(&report["steps"]);
    let reached = steps.len().saturating_sub(BEFORE);
    if reached == 0 {
        bail!("no fault was come to: {}", report["error"].as_str().unwrap_or("no reason is in the report"));
    }
    let mut outcomes: Vec<Outcome> =
        chunk.iter().take(reached).map(|case| Outcome { case: case.clone(), wrong: Vec::new() }).collect();
    let errors = steps.iter().skip(BEFORE).map(|step| step["error"].as_str());
    for (outcome, error) in outcomes.iter_mut().zip(errors) {
        outcome.wrong.extend(error.map(str::to_owned));
    }
    // What a host takes with it that is gone breaks promises, and is expected to.
    if report["passed"] == true {
        return Ok(outcomes);
    }
    // Each step is one move. What can't be put down to one is put down to the last.
    for judged in list(&report["guests"]).iter().flat_map(|guest| list(&guest["verdict"])) {
        if judged["outcome"] != "fail" {
            continue;
        }
        let promise = judged["promise"].as_str().unwrap_or("?");
        let evidence = list(&judged["evidence"]);
        let broken = evidence.first().and_then(Value::as_str).unwrap_or("no evidence");
        let mut blame = |index: usize, text: &str| {
            if let Some(outcome) = outcomes.get_mut(index) {
                outcome.wrong.push(format!("{promise}: {text}"));
            }
        };
        blame(move_of(broken).unwrap_or(reached - 1).min(reached - 1), broken);
    }
    if outcomes.iter().all(|outcome| outcome.wrong.is_empty()) {
        let unexpected: Vec<_> =
            list(&report["unexpected"]).iter().filter_map(Value::as_str).map(str::to_owned).collect();
        let error = report["error"].as_str().map(str::to_owned);
        if let Some(last) = outcomes.last_mut() {
            last.wrong = error.into_iter().chain(unexpected).collect();
        }
    }
    Ok(outcomes)
}

/// `move 3: …` is the third, index 2.
fn move_of(evidence: &str) -> Option<usize> {
    let number: usize = evidence.strip_prefix("move ")?.split(':').next()?.parse().ok()?;
    number.checked_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build;
    use serde_json::json;
    use std::fs;
    use std::path::Path;

    fn options(step: Option<&str>, kind: Option<&str>) -> Options {
        let (step, kind) = (step.map(str::to_owned), kind.map(str::to_owned));
        Options { step, kind, list: false, skip: 0, take: None, chunk: 24 }
    }

    #[test]
    fn parts_of_a_run_make_up_the_whole() {
        let part = |skip, take| cases(&Options { skip, take, ..options(None, Some(GONE)) });
        let whole = part(0, None);
        assert_eq!([part(0, Some(7)), part(7, Some(3)), part(10, None)].concat(), whole);
        assert_eq!(part(7, Some(3)).len(), 3);
    }

    #[test]
    fn the_scenario_of_all_is_one_that_the_lab_reads() {
        let all = cases(&options(None, None));
        assert!(all.len() >= 160, "{}", all.len());
        let read = lab::scenario::Scenario::parse(Path::new("faults.toml"), &scenario(&all)).expect("a good scenario");
        assert_eq!(read.steps.len(), BEFORE + all.len());
        let text = scenario(&all);
        for want in [
            "[\"destination.before.restore=fail\", \"source.after.roll-back=crash\"]",
            "[\"destination.before.send-refuse=cut\"], unfit = true, guest-on = \"source\"",
            "[\"destination.before.restore=fail\"], guest-on = \"source\"",
            "[\"destination.before.start=cut\"], guest-on = \"destination\"",
            "[\"destination.after.send-ready=cut\"] }",
            "[\"source.before.journal-go=crash\"]",
            "point = \"source.before.roll-back\", then = \"lost\", faults = [\"destination.before.restore=fail\"], unfit = false }",
            "point = \"destination.before.send-refuse\", then = \"runs\", faults = [], unfit = true }",
            "point = \"source.before.send-go\", then = \"waits\", faults = [],",
        ] {
            assert!(text.contains(want), "{want}");
        }
    }

    #[test]
    fn what_becomes_of_the_guest_is_said_for_each_point() {
        let gone = cases(&options(None, Some(GONE)));
        let count = |then| gone.iter().filter(|case| Then::of(&case.plant.point) == then).count();
        let all = [Then::Runs, Then::Waits, Then::Diverges, Then::Lost].map(count);
        assert_eq!(all, [16, 6, 2, 12]);
        assert_eq!(together(&gone), 1);
        assert_eq!(describe(gone.first().expect("one")), "source.before.journal-begin=gone");
        // Nothing that others get over is run on a host that is gone.
        let both = cases(&options(Some("before.send-go"), None));
        assert_eq!((together(&both), both.len()), (4, 5));
    }

    #[test]
    fn the_sample_is_made_of_points_that_there_are() {
        let file = build::root().expect("the root").join("scenarios/migrate-faults.toml");
        let text = fs::read_to_string(&file).expect("the sample");
        let sample = lab::scenario::Scenario::parse(&file, &text).expect("a good scenario");
        let mut seen = 0;
        for step in &sample.steps {
            if let lab::scenario::Step::Fault(step) = step.get_ref() {
                for fault in step.faults.get_ref() {
                    fault.parse::<Plant>().expect("a point of the handshake");
                    seen += 1;
                }
            }
        }
        assert!(seen >= 4, "{seen}");
    }

    #[test]
    fn points_are_chosen() {
        let crash = cases(&options(Some("journal-go"), Some("crash")));
        let names: Vec<String> = crash.iter().map(|c| c.plant.to_string()).collect();
        assert_eq!(names, ["source.before.journal-go=crash", "source.after.journal-go=crash"]);
        assert!(cases(&options(Some("nothing"), None)).is_empty());
    }

    #[test]
    fn what_was_wrong_is_put_down_to_its_fault() {
        let chunk = cases(&options(Some("journal-go"), None));
        let step = |error: Option<&str>| json!({"error": error});
        let mut report = json!({
            "passed": false, "error": "step 5 failed", "unexpected": [],
            "steps": [step(None), step(None), step(None), step(None), step(Some("two copies"))],
            "guests": [{"verdict": [
                {"promise": "T8", "outcome": "fail", "evidence": ["move 1: record 3 is lost"]},
                {"promise": "S1", "outcome": "fail", "evidence": ["heard again"]},
                {"promise": "T1", "outcome": "pass", "evidence": ["move 1: same"]},
            ]}],
        });
        let found = outcomes(&report, &chunk).expect("outcomes");
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].wrong, ["T8: move 1: record 3 is lost"]);
        assert_eq!(found[1].wrong, ["two copies", "S1: heard again"]);
        let mut expected = report.clone();
        expected["passed"] = json!(true);
        let found = outcomes(&expected, &chunk).expect("outcomes");
        assert_eq!(found[0].wrong.len(), 0, "broken promises that the scenario expects");
        // A run that failed for a reason that is in no step still fails.
        report["guests"] = json!([]);
        report["steps"][4]["error"] = Value::Null;
        let found = outcomes(&report, &chunk).expect("outcomes");
        assert_eq!(found[1].wrong, ["step 5 failed"]);
        report["steps"] = json!([step(None)]);
        assert!(outcomes(&report, &chunk).is_err());
    }
}
