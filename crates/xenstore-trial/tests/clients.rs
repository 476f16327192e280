//! Debian's clients against our daemon: its suite `test-xenstore`, the `xenstore-*` commands, and pyxs. The commands and
//! pyxs are run against the stock daemon, too, and must say the same there.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;
use xenstore_trial::stock::{Programs, Stock};
use xenstore_trial::{Connection, FakeXen};
use xenstore_wire::{Op, payload};

/// A daemon on a Xen of its own.
struct Trial {
    programs: Programs,
    daemon: Stock,
    _xen: FakeXen,
    dir: tempfile::TempDir,
}

impl Trial {
    fn of(ours: bool) -> Trial {
        let dir = tempfile::tempdir().unwrap();
        let programs = Programs::prepare(dir.path()).unwrap();
        let xen = FakeXen::create(&dir.path().join("xen")).unwrap();
        let run = dir.path().join("run");
        let daemon = if ours {
            programs.start_other(Path::new(env!("CARGO_BIN_EXE_xenstored-on-files")), &[], &xen, &run).unwrap()
        } else {
            programs.start_stock(&xen, &run, &[]).unwrap()
        };
        Trial { programs, daemon, _xen: xen, dir }
    }

    fn command(&self, program: &str) -> Command {
        self.programs.command(program, self.daemon.socket())
    }

    /// Runs a command line, in which `DIR` is a folder of this trial; its exit code and all that it wrote.
    fn says(&self, line: &str) -> String {
        let dir = self.dir.path().to_string_lossy();
        let mut words = line.split_whitespace().map(|w| w.replace("DIR", &dir));
        let name = words.next().unwrap();
        // In usr/bin there may be a script before it that looks for Xen in /sys.
        let direct = format!("usr/lib/xen-4.17/bin/{name}");
        let program = if self.programs.tree().join(&direct).exists() { direct } else { format!("usr/bin/{name}") };
        let out = self.command(&program).args(words).output().unwrap();
        let tree = self.programs.tree().to_string_lossy();
        let text = |b: &[u8]| String::from_utf8_lossy(b).replace(&*tree, "").replace(&*dir, "DIR");
        format!("{line}\n[{}] {}{}", out.status.code().unwrap_or(-1), text(&out.stdout), text(&out.stderr))
    }
}

fn suite(t: &Trial, arguments: &[&str]) -> String {
    let out = t.command("usr/lib/xen-4.17/bin/test-xenstore").args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "test-xenstore {arguments:?}: {}\n{text}", out.status);
    assert!(!text.contains("failed"), "{text}");
    text
}

#[test]
fn debians_suite_passes_every_case() {
    let t = Trial::of(true);
    let list = suite(&t, &["--list-tests"]);
    let all = suite(&t, &["--iterations", "20"]);
    assert!(list.lines().count() >= 12, "{list}");
    for case in list.lines() {
        let name = case.split(':').next().unwrap().trim();
        assert!(all.lines().any(|l| l.starts_with(name) && l.contains(" ns")), "{name} did not run:\n{all}");
    }
}

#[test]
fn debians_suite_passes_a_minute_of_random_cases() {
    let t = Trial::of(true);
    suite(&t, &["--random", "60"]);
    let mut tool = Connection::socket(t.daemon.socket()).unwrap();
    let (m, _) = tool.call(Op::Control, 0, &payload::join(["check"])).unwrap();
    assert_eq!(m.payload, b"OK\0", "the store is consistent after it");
}

/// One command after another, with what each must say.
const COMMANDS: &[(&str, &str)] = &[
    ("xenstore-write /t/a one /t/b two /t/a/deep three", "[0] "),
    ("xenstore-read /t/a", "[0] one\n"),
    ("xenstore-read -p /t/a /t/b", "[0] /t/a: one\n/t/b: two\n"),
    ("xenstore-read /t/none", "[1] xenstore-read: couldn't read path /t/none\n"),
    ("xenstore-list /t", "[0] a\nb\n"),
    ("xenstore-list /t/none", "[1] xenstore-list: could not list path /t/none\n"),
    ("xenstore-exists /t/a", "[0] "),
    ("xenstore-exists /t/none", "[1] "),
    ("xenstore-chmod -r /t/a n0 r1 w2", "[0] "),
    ("xenstore-ls -p /t", "(n0,r1,w2)\n deep = \"three\"  . . ."),
    ("xenstore-ls -f /t", "[0] /t/a = \"one\"\n/t/a/deep = \"three\"\n/t/b = \"two\"\n"),
    ("xenstore-chmod /t/none n0", "[1] "),
    ("xenstore-rm /t/a/deep", "[0] "),
    // With -t a parent that became empty goes, too.
    ("xenstore-write /t/x/y/z 1", "[0] "),
    ("xenstore-rm -t /t/x/y/z", "[0] "),
    ("xenstore-ls /t", "[0] a = \"one\"\nb = \"two\"\n"),
    ("xenstore-rm /t", "[0] "),
    ("xenstore-exists /t", "[1] "),
];

#[test]
fn debians_commands_say_what_they_say_on_the_stock_daemon() {
    let (ours, stock) = (Trial::of(true), Trial::of(false));
    for (line, want) in COMMANDS {
        let (got, other) = (ours.says(line), stock.says(line));
        assert!(got.contains(want), "{got}\ninstead of {want:?}");
        assert_eq!(got, other);
    }
}

/// Of `xenstore-control`, with what each must say.
const CONTROLS: &[(&str, &str)] = &[
    ("xenstore-control check", "[0] OK\n"),
    ("xenstore-control log on", "[0] OK\n"),
    ("xenstore-control logfile DIR/log", "[0] OK\n"),
    ("xenstore-read /tool/none", "[1] "),
    ("xenstore-control memreport", "[0] OK\n"),
    ("xenstore-control memreport DIR/report", "[0] OK\n"),
    ("xenstore-control log off", "[0] OK\n"),
    ("xenstore-control log maybe", "[3] Command not supported. Valid commands are:\n"),
    ("xenstore-control print hello", "[0] OK\n"),
    ("xenstore-control quota", "nodes            :     1000 Nodes per domain\n"),
    ("xenstore-control quota set nodes 900", "[0] OK\n"),
    ("xenstore-control quota set watches 60", "[0] OK\n"),
    ("xenstore-control quota set nodes 0", "[3] Command not supported. Valid commands are:\n"),
    ("xenstore-control quota set nothing 5", "[3] Command not supported. Valid commands are:\n"),
    ("xenstore-control quota", "nodes            :      900 Nodes per domain\n"),
    ("xenstore-control quota 7", "[3] Error 2 "),
    ("xenstore-control quota-soft", "memory           :  2097152 "),
    ("xenstore-control quota-soft set memory 1000000", "[0] OK\n"),
    ("xenstore-control quota-soft", "memory           :  1000000 "),
    ("xenstore-control help", "live-update"),
    ("xenstore-control nonsense", "[3] Command not supported. Valid commands are:\n"),
    ("xenstore-control check too much", "[3] Command not supported. Valid commands are:\n"),
    ("xenstore-control live-update DIR/none", "File not accessible.\n"),
    ("xenstore-control live-update DIR/log", "File not executable.\n"),
    ("xenstore-control check", "[0] OK\n"),
];

#[test]
fn xenstore_control_says_what_it_says_on_the_stock_daemon() {
    let (ours, stock) = (Trial::of(true), Trial::of(false));
    for (line, want) in CONTROLS {
        let (got, other) = (ours.says(line), stock.says(line));
        assert!(got.contains(want), "{got}\ninstead of {want:?}");
        assert_eq!(got, other);
    }
    // A domain's use: the same rows; what the daemons' own nodes weigh is theirs.
    let rows = |t: &Trial| {
        let text = t.says("xenstore-control quota 0");
        text.lines().map(|l| l.split(':').next().unwrap().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(rows(&ours), rows(&stock));
    assert!(rows(&ours).iter().any(|r| r.trim() == "nodes"), "{:?}", rows(&ours));
    for t in [&ours, &stock] {
        let file = |name| std::fs::read_to_string(t.dir.path().join(name)).unwrap();
        let log = file("log");
        assert!(log.contains("READ"), "the request is logged: {log}");
        let begins = file("report").split_whitespace().next().expect("a report").to_string();
        assert!(log.contains(&begins), "there is a report in the log, too: {log}");
        let size = log.len();
        t.says("xenstore-read /tool/none");
        assert_eq!(file("log").len(), size, "log off");
    }
}

#[test]
fn xenstore_watch_tells_of_changes() {
    for ours in [true, false] {
        let t = Trial::of(ours);
        let mut watch =
            t.command("usr/bin/xenstore-watch").args(["-n", "3", "/w"]).stdout(Stdio::piped()).spawn().unwrap();
        let (tell, told) = mpsc::channel();
        let out = BufReader::new(watch.stdout.take().unwrap());
        std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|l| tell.send(l)));
        let next = || told.recv_timeout(Duration::from_secs(10)).expect("an event");
        assert_eq!(next(), "/w", "the first comes at once");
        t.says("xenstore-write /w/a 1");
        assert_eq!(next(), "/w/a");
        t.says("xenstore-rm /w");
        assert_eq!(next(), "/w", "of what went with it, only those that watch it are told");
        assert!(watch.wait().unwrap().success(), "it ends after the third");
    }
}

/// What pyxs can do, as lines of text.
const PYXS: &str = r#"
import os, threading
from pyxs import Client, PyXSError
path = os.environ["XENSTORED_PATH"]
with Client(unix_socket_path=path) as c, Client(unix_socket_path=path) as d:
    c.write(b"/p/a", b"1"); c.mkdir(b"/p/b"); c.write(b"/p/c/d", b"x y")
    print(c.read(b"/p/a"), c[b"/p/c/d"], c.read(b"/p/none", b"default"), c.list(b"/p"), c.exists(b"/p/none"))
    try:
        c.read(b"/p/none")
    except PyXSError as e:
        print(e)
    c.set_perms(b"/p/a", [b"b0", b"r1"]); print(c.get_perms(b"/p/a"))
    print(list(c.walk(b"/p")), c.get_domain_path(7), c.is_domain_introduced(0), c.is_domain_introduced(7))
    c.transaction(); c.write(b"/p/a", b"2"); print(d.read(b"/p/a"), c.read(b"/p/a"), c.commit(), d.read(b"/p/a"))
    c.transaction(); c.read(b"/p/a"); d.write(b"/p/a", b"3"); c.write(b"/p/a", b"4"); print(c.commit(), d.read(b"/p/a"))
    c.transaction(); c.delete(b"/p"); c.rollback(); print(c.exists(b"/p"))
    with c.monitor() as m:
        m.watch(b"/p", b"token"); events = m.wait(); print(next(events))
        d.write(b"/p/a", b"5"); print(next(events)); d.delete(b"/p/c"); print(next(events))
        m.unwatch(b"/p", b"token")
    # Threads over one connection: each reply finds its asker.
    def work(i):
        for n in range(50):
            c.write(b"/p/%d" % i, b"%d" % n); assert c.read(b"/p/%d" % i) == b"%d" % n
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [t.start() for t in threads]; [t.join() for t in threads]
    print([c.read(b"/p/%d" % i) for i in range(8)])
    c.delete(b"/p"); print(c.exists(b"/p"))
"#;

#[test]
fn pyxs_works() {
    let says = |ours| {
        let t = Trial::of(ours);
        let out =
            t.programs.python_with_pyxs(t.daemon.socket()).unwrap().arg("-c").arg(PYXS).output().expect("run python");
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
        text
    };
    let (ours, stock) = (says(true), says(false));
    assert_eq!(ours, stock);
    assert!(ours.contains("b'1' b'2' True b'2'\nFalse b'3'\nTrue"), "{ours}");
    assert!(ours.contains("[b'49', b'49', b'49', b'49', b'49', b'49', b'49', b'49']\nFalse"), "{ours}");
}
