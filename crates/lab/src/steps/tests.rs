//! The executor with hosts that answer from a script.

use std::sync::Mutex;

use super::host::End;
use super::*;
use crate::net::peer::Peer;

type Answer = (&'static str, i32, &'static str);

struct FakeHost {
    name: &'static str,
    /// What a script that holds the text answers: exit code and output. The first that fits counts; `{n}` is a number that
    /// rises.
    answers: Vec<Answer>,
    log: Mutex<Vec<String>>,
}

impl LabHost for FakeHost {
    fn name(&self) -> &str {
        self.name
    }
    fn shell(&self, script: &str, _: Duration) -> Result<Ran> {
        let n = {
            let mut log = self.log.lock().unwrap();
            log.push(script.to_owned());
            log.len()
        };
        let answer = self.answers.iter().find(|(text, ..)| script.contains(text));
        let (_, code, text) = answer.copied().unwrap_or(("", 0, ""));
        if text == "slow" {
            std::thread::sleep(Duration::from_secs(1));
        }
        Ok(Ran { end: End::Exited(code), stdout: text.replace("{n}", &n.to_string()), stderr: String::new() })
    }
    fn put(&self, bytes: &[u8], path: &str, _: u32) -> Result<()> {
        self.log.lock().unwrap().push(format!("put {path}\n{}", String::from_utf8_lossy(bytes)));
        Ok(())
    }
    fn get(&self, path: &str) -> Result<Vec<u8>> {
        Ok(format!("contents of {path}").into_bytes())
    }
    fn pause(&self) -> Result<()> {
        self.log.lock().unwrap().push("PAUSE".to_owned());
        Ok(())
    }
    fn resume(&self) -> Result<()> {
        self.log.lock().unwrap().push("RESUME".to_owned());
        Ok(())
    }
    fn kill(&self) {
        self.log.lock().unwrap().push("KILL".to_owned());
    }
    fn console_tail(&self) -> String {
        format!("  last lines of {}'s console", self.name)
    }
}

struct Done {
    result: Result<()>,
    results: Vec<StepResult>,
    moves: Vec<Move>,
    logs: [Vec<String>; 2],
    cut: bool,
    folder: tempfile::TempDir,
}

fn run(steps: &str, a: Vec<Answer>, b: Vec<Answer>) -> Done {
    run_on("", steps, a, b)
}

fn run_with_ferry(steps: &str, a: Vec<Answer>, b: Vec<Answer>) -> Done {
    run_on("ferry = true\n", steps, a, b)
}

fn run_on(host: &str, steps: &str, a: Vec<Answer>, b: Vec<Answer>) -> Done {
    let text = format!(
        "about = \"x\"\n[[host]]\nname = \"a\"\n{host}[[host]]\nname = \"b\"\n{host}[[guest]]\nname = \"g\"\nwitness = false\n\
         [[guest.vif]]\nmac = \"00:16:3e:00:00:01\"\n[[guest]]\nname = \"w\"\n[[guest.vif]]\n\
         mac = \"00:16:3e:00:00:02\"\n{steps}"
    );
    let scenario = Scenario::parse(Path::new("x.toml"), &text).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let clock = RunClock::start();
    let mut network = Network::start(clock, None).unwrap();
    network.add_local("a").unwrap();
    network.add_local("b").unwrap();
    let (_, port) = network.add_local("peer").unwrap();
    let peer = Peer::start(port, clock, plan::peer_config(&scenario, None)).unwrap();
    let fakes =
        [("a", a), ("b", b)].map(|(name, answers)| Arc::new(FakeHost { name, answers, log: Mutex::new(Vec::new()) }));
    let hosts: Vec<Arc<dyn LabHost>> = fakes.iter().map(|h| h.clone() as Arc<dyn LabHost>).collect();
    let disks = BTreeMap::new();
    let base = folder.path();
    let lab = Lab {
        scenario: &scenario,
        hosts: &hosts,
        network: &network,
        peer: &peer,
        clock,
        apart: Duration::from_millis(1),
        disks: &disks,
        base,
        folder: base,
    };
    let mut executor = Executor::new(lab);
    let result = executor.run(&|_, _| Ok(()));
    let port = network.switch().port_by_name("b").unwrap();
    let cut = !network.switch().cable_mut(port).unwrap().up;
    let (results, moves) = (executor.results, executor.moves);
    let logs = fakes.map(|fake| fake.log.lock().unwrap().clone());
    Done { result, results, moves, logs, cut, folder }
}

const CREATE: &str = "[[step]]\ncreate = { guest = \"g\", on = \"a\" }\n";
const XL: &str = "[[step]]\nmigrate = { guest = \"g\", to = \"b\", tool = \"xl\" }\n";

#[test]
fn a_guest_is_created_and_moved() {
    let done = run(&format!("{CREATE}{XL}"), vec![("xl migrate", 0, "done")], vec![]);
    done.result.unwrap();
    assert!(done.logs[0][0].starts_with("put /root/lab/g.cfg\nname = \"g\""));
    assert_eq!(done.logs[0][1], "xl create '/root/lab/g.cfg'");
    assert_eq!(done.logs[0][2], "xl migrate -s /root/lab/lab-remote  'g' 10.77.0.102");
    let it = &done.moves[0];
    assert_eq!((it.from.as_str(), it.to.as_str(), it.moved, it.output.as_str()), ("a", "b", true, "done"));
    assert_eq!(done.results.len(), 2);
    assert!(done.results[1].what.contains("xl migrate g from a to b"), "{}", done.results[1].what);
}

#[test]
fn a_failed_step_ends_the_run_and_shows_the_logs() {
    let steps = format!("{CREATE}[[step]]\nsleep = \"1ms\"\n");
    let answers = vec![("xl create", 3, "libxl: no memory"), ("tail -n 10", 0, "from the guest's log")];
    let done = run(&steps, answers, vec![]);
    let error = format!("{:#}", done.result.unwrap_err());
    for want in ["step 1/2 failed: create g on a", "exit code 3", "no memory", "from the guest's log", "a's console"] {
        assert!(error.contains(want), "{want} in {error}");
    }
    assert_eq!(done.results.len(), 1);
}

#[test]
fn a_migration_must_end_as_the_scenario_says() {
    let fails = || vec![("xl migrate", 1, "broken pipe")];
    let text = format!("{CREATE}{XL}");
    assert!(run(&text, fails(), vec![]).result.is_err());
    let stays = XL.replace("tool", "end = \"stays\", expect = \"pipe\", tool");
    let done = run(&format!("{CREATE}{stays}"), fails(), vec![("xl domid", 1, "")]);
    done.result.unwrap();
    assert!(!done.moves[0].moved);
    // It did not fail, or the guest is gone from the source, or the text is missing.
    assert!(run(&format!("{CREATE}{stays}"), vec![], vec![]).result.is_err());
    let gone = vec![("xl migrate", 1, "broken pipe"), ("xl domid", 1, "")];
    assert!(run(&format!("{CREATE}{stays}"), gone, vec![]).result.is_err());
    assert!(run(&format!("{CREATE}{stays}"), vec![("xl migrate", 1, "other")], vec![]).result.is_err());
    // The tool says yes, but the guest did not arrive.
    assert!(run(&text, vec![], vec![("xl domid", 1, "")]).result.is_err());
}

const FERRY: &str = "[[step]]\nmigrate = { guest = \"g\", to = \"b\", tool = \"ferry\" }\n";
const REPORT: &str = r#"{"id": "00000000-0000-0000-0000-000000000001", "domid": 1, "name": "g", "peer": "10.77.0.102",
    "moved": true, "error": null, "ending": "moved", "rounds": [], "bytes": 5, "total_ms": 9, "blackout_us": 7000,
    "steps": [{"place": "source", "name": "pause", "micros": 7000}]}"#;

#[test]
fn the_report_of_ferry_is_kept_beside_what_it_wrote() {
    let text = format!("{CREATE}{FERRY}{}", FERRY.replace("\"b\"", "\"a\""));
    let first = vec![("cat /run/ferry-report-0.json", 0, REPORT), ("ferry migrate --report", 0, "it runs")];
    let done = run_with_ferry(&text, first, vec![]);
    done.result.unwrap();
    let report = done.moves[0].report.as_ref().expect("a report");
    assert_eq!((report.blackout_us, report.steps[0].name.as_str()), (7000, "pause"));
    assert_eq!(done.moves[0].output, "it runs");
    // The second wrote none, on the other host.
    assert!(done.logs[1].iter().any(|s| s.starts_with("ferry migrate --report /run/ferry-report-1.json ")));
    assert_eq!(done.moves[1].report, None);
    // One that can't be read is not passed over.
    let broken = vec![("cat /run/ferry-report-0.json", 0, "{\"id\": 3}")];
    let error = format!("{:#}", run_with_ferry(&text, broken, vec![]).result.unwrap_err());
    assert!(error.contains("the report of ferry migrate"), "{error}");
}

#[test]
fn steps_go_on_while_one_runs_in_the_background() {
    let background = XL.replace("tool", "background = \"m\", tool");
    let steps =
        format!("{CREATE}{background}[[step]]\ncut = {{ host = \"b\" }}\n[[step]]\njoin = {{ name = \"m\" }}\n");
    let done = run(&steps, vec![("xl migrate", 0, "slow")], vec![]);
    done.result.unwrap();
    assert!(done.cut);
    assert!(done.results[1].took < Duration::from_millis(800), "{:?}", done.results[1].took);
    assert!(done.moves[0].ended.unwrap() - done.moves[0].began >= Duration::from_secs(1));
}

#[test]
fn commands_are_held_against_what_is_expected() {
    let exec = |rest: &str| format!("[[step]]\nexec = {{ on = \"a\", run = \"thing\"{rest} }}\n");
    let answers = |code, text| vec![("thing", code, text)];
    assert!(run(&exec(""), answers(0, "x"), vec![]).result.is_ok());
    assert!(run(&exec(""), answers(1, "x"), vec![]).result.is_err());
    assert!(run(&exec(", exit = 1"), answers(1, "x"), vec![]).result.is_ok());
    assert!(run(&exec(", exit = -1"), answers(7, "x"), vec![]).result.is_ok());
    assert!(run(&exec(", expect = \"yes\""), answers(0, "no"), vec![]).result.is_err());
    assert!(run(&exec(", refuse = \"no\""), answers(0, "no"), vec![]).result.is_err());
}

#[test]
fn a_witness_that_does_not_report_fails_the_wait() {
    let steps =
        "[[step]]\ncreate = { guest = \"w\", on = \"b\" }\n[[step]]\nwait = { guest = \"w\", limit = \"50ms\" }\n";
    let error = format!("{:#}", run(steps, vec![], vec![]).result.unwrap_err());
    assert!(error.contains("guest w: not enough reports came"), "{error}");
    assert!(error.contains("last lines of b's console"), "{error}");
}

#[test]
fn hosts_and_files_are_handled() {
    let steps = "[[step]]\npause-host = { host = \"a\" }\n[[step]]\nresume-host = { host = \"a\" }\n\
                 [[step]]\nget = { on = \"b\", from = \"/x\", to = \"y\" }\n\
                 [[step]]\nkill = { on = \"b\", process = \"ferryd\" }\n[[step]]\nkill-host = { host = \"a\" }\n";
    let done = run(steps, vec![], vec![]);
    done.result.unwrap();
    assert_eq!(done.logs[0], ["PAUSE", "RESUME", "KILL"]);
    assert!(done.logs[1][0].contains("pidof 'ferryd'"), "{}", done.logs[1][0]);
    assert_eq!(std::fs::read_to_string(done.folder.path().join("y")).unwrap(), "contents of /x");
}

const FAULT: &str = "[[step]]\nfault = { guest = \"g\", faults = [\"source.before.freeze=fail\"], limit = \"1ms\" }\n";
const ONE: &str = "g 1 256 1 r----- {n}.0\n";

/// The count of faults rises with each look.
const FIRES: Answer = ("grep -cF", 0, "{n}\n");

#[test]
fn a_fault_must_come_to_pass_and_be_resolved() {
    let text = format!("{CREATE}{FAULT}");
    let stays = || vec![("xl domid", 1, "")];
    let fails = |a| format!("{:#}", run_with_ferry(&text, a, stays()).result.unwrap_err());
    let error = fails(vec![("grep -cF", 0, "0\n"), ("xl list", 0, ONE)]);
    assert!(error.contains("the fault at source.before.freeze did not come to pass"), "{error}");
    let error = fails(vec![("find /var/lib/ferry/journal", 1, "g: committed"), FIRES, ("xl list", 0, ONE)]);
    assert!(error.contains("a is not done: g: committed"), "{error}");
    let done = run_with_ferry(&text, vec![FIRES, ("xl list", 0, ONE)], stays());
    done.result.unwrap();
    assert!(!done.moves[0].moved);
    let script = done.logs[0].iter().find(|s| s.contains("setsid")).unwrap();
    assert!(script.contains("FERRY_FAULT=source.before.freeze=fail "), "{script}");
    assert!(!done.logs[1].iter().any(|s| s.contains("setsid")), "the other daemon is left alone");
}

#[test]
fn a_guest_that_is_on_the_wrong_host_after_a_fault_is_an_error() {
    let on = |side: &str| {
        let text = format!("{CREATE}{}", FAULT.replace("limit", &format!("guest-on = \"{side}\", limit")));
        run_with_ferry(&text, vec![FIRES, ("xl list", 0, ONE)], vec![("xl domid", 1, "")]).result
    };
    assert!(on("source").is_ok());
    let error = format!("{:#}", on("destination").unwrap_err());
    assert!(error.contains("g must be on the Destination in the end, not on a"), "{error}");
}

#[test]
fn two_copies_or_none_after_a_fault_are_an_error() {
    let text = format!("{CREATE}{FAULT}");
    let fails = |a, b| format!("{:#}", run_with_ferry(&text, a, b).result.unwrap_err());
    let error = fails(vec![FIRES, ("xl list", 0, ONE)], vec![("xl list", 0, ONE)]);
    assert!(error.contains("exactly one copy of g must be there, and run: ") && error.contains("b as d1"), "{error}");
    let error = fails(vec![FIRES], vec![]);
    assert!(error.contains("no host has it"), "{error}");
    // It is there and stands still.
    let error = fails(vec![FIRES, ("xl list", 0, "g 1 256 1 --p--- 7.0\n")], vec![]);
    assert!(error.contains("used 0.0 s"), "{error}");
}

#[test]
fn an_open_migration_is_resolved_only_by_a_statement() {
    let text = format!("{CREATE}{XL}[[step]]\nresolve = {{ guest = \"g\", on = \"b\" }}\n");
    let says: Answer = ("ferry resolve 'g' --peer-fenced", 0, "");
    let good = vec![says, ("ferry resolve", 3, "say so with --peer-fenced"), ("xl list", 0, "g 1 256 1 -b---- 1.0\n")];
    assert!(run(&text, vec![], good).result.is_ok());
    let obeys_at_once = vec![says, ("ferry resolve", 0, "")];
    assert!(run(&text, vec![], obeys_at_once).result.is_err());
    let refuses = vec![("ferry resolve", 3, "say so with --peer-fenced")];
    assert!(run(&text, vec![], refuses).result.is_err());
}

const GONE: &str = "[[step]]\ngone = { guest = \"g\", point = \"POINT\", then = \"THEN\", limit = \"1ms\", faults = [\"destination.before.restore=fail\"] }\n";
/// What the daemon of the host that is left tells.
fn status(text: &'static str) -> Answer {
    ("ferry status --json", 0, text)
}

fn gone(point: &str, then: &str, a: Vec<Answer>, b: Vec<Answer>) -> Done {
    let step = GONE.replace("POINT", point).replace("THEN", then);
    run_with_ferry(&format!("{CREATE}{step}"), a, b)
}

#[test]
fn a_host_is_switched_off_at_a_point_and_the_other_goes_on() {
    let left = || vec![FIRES, status("[]"), ("xl list", 0, ONE)];
    let done = gone("destination.before.prepare", "runs", left(), vec![FIRES, ("xl domid", 1, "")]);
    done.result.unwrap();
    assert!(!done.moves[0].moved);
    assert!(done.logs[1].contains(&"KILL".to_owned()) && !done.logs[0].contains(&"KILL".to_owned()));
    let planted = "FERRY_FAULT=destination.before.restore=fail,destination.before.prepare=hang ";
    assert!(done.logs[1].iter().any(|s| s.contains(planted)), "{:?}", done.logs[1]);
    // The destination is left: the guest arrived.
    let done = gone("source.before.destroy", "runs", vec![FIRES], left());
    done.result.unwrap();
    assert!(done.moves[0].moved && done.logs[0].contains(&"KILL".to_owned()));
    // The daemon that is left does not know, or the guest stands still, or two are there.
    let fails = |a| {
        let done = gone("destination.before.prepare", "runs", a, vec![FIRES, ("xl domid", 1, "")]);
        format!("{:#}", done.result.unwrap_err())
    };
    let error = fails(vec![FIRES, status(r#"[{"state": "copying"}]"#), ("xl list", 0, ONE)]);
    assert!(error.contains("b was switched off at destination.before.prepare"), "{error}");
    assert!(error.contains("copying"), "{error}");
    let paused = "g 1 256 1 --p--- 7.0\n";
    assert!(fails(vec![FIRES, status("[]"), ("xl list", 0, paused)]).contains("has not come to Runs"));
    let two = "g 1 256 1 r----- {n}.0\ng--incoming 2 256 1 r----- {n}.0\n";
    assert!(fails(vec![FIRES, status("[]"), ("xl list", 0, two)]).contains("must have 1 copies"));
    let undo = ("find /var/lib/ferry/undo", 0, "/var/lib/ferry/undo/x");
    assert!(fails(vec![FIRES, status("[]"), undo, ("xl list", 0, ONE)]).contains("has still to undo"));
    let never = gone("source.before.freeze", "lost", vec![("grep -cF", 0, "0\n")], vec![FIRES]);
    assert!(format!("{:#}", never.result.unwrap_err()).contains("the point was not come to"));
    assert!(!never.logs[0].contains(&"KILL".to_owned()));
}

#[test]
fn a_guest_that_was_on_the_host_that_is_gone_leaves_nothing_behind() {
    let none: Answer = ("xl list 'g'", 1, "");
    let lost = |b| gone("source.before.freeze", "lost", vec![FIRES], b).result;
    assert!(lost(vec![FIRES, status("[]"), none]).is_ok());
    let shell = lost(vec![FIRES, status("[]"), none, ("xl list", 0, "g--incoming 1 256 1 --p--- 0.0\n")]);
    assert!(format!("{:#}", shell.unwrap_err()).contains("must have 0 copies"));
}

#[test]
fn who_can_not_know_waits_for_the_operator() {
    let says: Answer = ("ferry resolve 'g' --peer-fenced", 0, "");
    let asks: Answer = ("ferry resolve", 3, "say so with --peer-fenced");
    let waits = |state, answers: &[Answer]| {
        let left = [FIRES, status(state)].iter().chain(answers).copied().collect();
        gone("destination.before.start", "waits", left, vec![FIRES, ("xl domid", 1, "")]).result
    };
    // It stays paused whatever is said.
    let stuck = [says, asks, ("xl list", 0, "g 1 256 1 --p--- 7.0\n")];
    assert!(format!("{:#}", waits(r#"[{"state": "left"}]"#, &stuck).unwrap_err()).contains("has not come to Waits"));
    let at_once = [("ferry resolve", 0, ""), ("xl list", 0, "g 1 256 1 --p--- 7.0\n")];
    let error = format!("{:#}", waits(r#"[{"state": "committed"}]"#, &at_once).unwrap_err());
    assert!(error.contains("without --peer-fenced it must be refused"), "{error}");
    // It does not stand still while nobody has decided.
    let runs = [says, asks, ("xl list", 0, ONE)];
    assert!(
        format!("{:#}", waits(r#"[{"state": "committed"}]"#, &runs).unwrap_err()).contains("has not come to Waits")
    );
}
