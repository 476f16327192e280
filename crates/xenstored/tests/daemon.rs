//! The program itself, over its socket, without Xen.

use rustix::process::{Pid, Signal, kill_process};
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use xenstore_client::{Client, Errno, Error, Nodes};
use xenstore_wire::{HEADER_LEN, Header, Message, Op};

struct Running {
    child: Child,
    dir: tempfile::TempDir,
}

impl Running {
    fn start() -> Running {
        let dir = tempfile::tempdir().unwrap();
        let r = Running { child: Running::spawn(dir.path()), dir };
        let end = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(r.socket()).is_err() {
            assert!(Instant::now() < end, "it does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        r
    }

    fn command(dir: &Path) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_xenstored"));
        c.args(["--no-domain-init", "--no-fork", "--pid-file"]).arg(dir.join("pid"));
        c.env("XENSTORED_RUNDIR", dir).env_remove("XENSTORED_PATH").env_remove("NOTIFY_SOCKET");
        c
    }

    fn spawn(dir: &Path) -> Child {
        Running::command(dir).spawn().unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// kill -9, and another one a moment later.
    fn kill_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::thread::sleep(Duration::from_millis(200));
        self.child = Running::spawn(self.dir.path());
    }

    /// What `ask` says whose request the daemon has received and not answered when it is killed.
    fn killed_amid<T: Send>(&mut self, ask: impl FnOnce() -> T + Send) -> T {
        self.signal(Signal::STOP);
        std::thread::scope(|s| {
            let asked = s.spawn(ask);
            std::thread::sleep(Duration::from_millis(200));
            assert!(!asked.is_finished(), "it did not wait for its answer");
            self.kill_and_restart();
            asked.join().unwrap()
        })
    }

    fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("socket")
    }

    fn client(&self) -> Client {
        Client::connect(self.socket()).unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn it_serves_clients_side_by_side() {
    let d = Running::start();
    let (mut a, mut b) = (d.client(), d.client());
    a.write("/x/y", "1").unwrap();
    assert_eq!(b.read_string("/x/y").unwrap(), "1");
    assert_eq!(b.read_opt("/x/z").unwrap(), None);
    assert_eq!(b.read("/x/z").unwrap_err().to_string(), "xenstore READ /x/z: ENOENT (no such node)");
    b.watch("/x", "tok").unwrap();
    assert_eq!(b.next_event(None).unwrap().unwrap().path, "/x");
    a.write("/x/y", "2").unwrap();
    assert_eq!(b.next_event(Some(Duration::from_secs(5))).unwrap().unwrap().path, "/x/y");
    assert_eq!(b.next_event(Some(Duration::from_millis(20))).unwrap(), None);
    for i in 0..500 {
        a.write(&format!("/many/a-rather-long-name-{i}"), "").unwrap();
    }
    assert_eq!(a.directory("/many").unwrap().len(), 500);
    assert_eq!(a.directory("/many").unwrap()[499], "a-rather-long-name-499");
    // Two that count up together never lose a step.
    a.write("/n", "0").unwrap();
    let step = |c: &mut Client| {
        for _ in 0..200 {
            c.transaction(|t| {
                let n: u32 = t.read_string("/n")?.parse().unwrap();
                t.write("/n", (n + 1).to_string())
            })
            .unwrap();
        }
    };
    std::thread::scope(|s| {
        s.spawn(|| step(&mut b));
        step(&mut a);
    });
    assert_eq!(a.read_string("/n").unwrap(), "400");
    assert_eq!(a.control(&["check"]).unwrap(), "OK");
    assert!(a.control(&["quota"]).unwrap().contains("nodes            :     1000 Nodes per domain"));
    assert_eq!(a.ferry_features().unwrap().len(), xenstored::FEATURES.len());
    let e = a.introduce(5, 1, 1).unwrap_err();
    assert_eq!(e.errno(), Some(Errno::ENOSYS), "there is no Xen here");
    // One that does not read its replies keeps nobody else waiting.
    let mut deaf = UnixStream::connect(d.socket()).unwrap();
    deaf.set_nonblocking(true).unwrap();
    let request = xenstore_wire::Message::new(1, 0, 0, b"/many\0".to_vec()).to_bytes().repeat(50);
    for _ in 0..200 {
        if std::io::Write::write(&mut deaf, &request).is_err() {
            break;
        }
    }
    assert_eq!(a.read_string("/x/y").unwrap(), "2");
}

#[test]
fn a_second_daemon_with_the_same_pid_file_gives_up() {
    let d = Running::start();
    let pid = d.dir.path().join("pid");
    assert_eq!(std::fs::read_to_string(&pid).unwrap().trim(), d.child.id().to_string());
    let out = Command::new(env!("CARGO_BIN_EXE_xenstored"))
        .args(["-D", "-N", "-F"])
        .arg(&pid)
        .env("XENSTORED_RUNDIR", d.dir.path())
        .output()
        .unwrap();
    assert!(!out.status.success());
    assert!(String::from_utf8_lossy(&out.stderr).contains("a xenstored is running already"));
    assert_eq!(d.client().directory("/").unwrap(), ["tool"], "the first one is well");
}

#[test]
fn systemd_hears_once_that_the_daemon_listens() {
    for is_abstract in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        // Abstract names live in a space of their own: the folder's makes this one nobody else's.
        let (socket, name) = if is_abstract {
            let name = path.to_str().unwrap().to_string();
            let address = SocketAddr::from_abstract_name(&name).unwrap();
            (UnixDatagram::bind_addr(&address).unwrap(), format!("@{name}"))
        } else {
            (UnixDatagram::bind(&path).unwrap(), path.to_str().unwrap().to_string())
        };
        let child = Running::command(dir.path()).env("NOTIFY_SOCKET", name).spawn().unwrap();
        let d = Running { child, dir };
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut word = [0; 64];
        let n = socket.recv(&mut word).unwrap();
        assert_eq!(&word[..n], b"READY=1");
        // Who is started because of it finds a daemon that serves.
        let mut c = d.client();
        assert_eq!(c.directory("/").unwrap(), ["tool"]);
        live_update(&mut c, Path::new(env!("CARGO_BIN_EXE_xenstored")));
        assert_eq!(c.directory("/").unwrap(), ["tool"]);
        socket.set_nonblocking(true).unwrap();
        assert!(socket.recv(&mut word).is_err(), "the one that took over is not a new start");
    }
}

fn live_update(c: &mut Client, program: &Path) {
    assert_eq!(c.control(&["live-update", "-f", program.to_str().unwrap()]).unwrap(), "OK");
    assert_eq!(c.control(&["live-update", "-s", "-t", "5"]).unwrap(), "OK");
}

#[test]
fn a_live_update_keeps_clients_watches_and_nodes() {
    let d = Running::start();
    let (mut a, mut b) = (d.client(), d.client());
    a.write("/x/y", "1").unwrap();
    a.set_perms("/x", &[xenstore_client::Perm::new(xenstore_client::Access::READ, 3)]).unwrap();
    b.watch("/x", "tok").unwrap();
    b.watch("rel", "r").unwrap();
    let started = d.child.id();
    for round in 0..3 {
        live_update(&mut a, Path::new(env!("CARGO_BIN_EXE_xenstored")));
        a.write("/x/y", round.to_string()).unwrap();
        a.write("/local/domain/0/rel", "").unwrap();
        assert_eq!(b.read_string("/x/y").unwrap(), round.to_string());
    }
    assert!(Path::new(&format!("/proc/{started}")).exists(), "it is the same process");
    let mut paths: Vec<String> = Vec::new();
    while let Some(e) = b.next_event(Some(Duration::from_millis(100))).unwrap() {
        paths.push(e.path);
    }
    let want: Vec<&str> = ["/x", "rel"].into_iter().chain(["/x/y", "rel"].into_iter().cycle().take(6)).collect();
    assert_eq!(paths, want);
    assert_eq!(a.get_perms("/x").unwrap().len(), 1);
    assert_eq!(a.control(&["check"]).unwrap(), "OK");
    // What can't be executed leaves everything as it is.
    assert_eq!(a.control(&["live-update", "-f", "/nowhere"]).unwrap(), "File not accessible.");
    let junk = d.dir.path().join("junk");
    std::fs::write(&junk, b"\x7fELFjunk").unwrap();
    std::fs::set_permissions(&junk, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    assert_eq!(a.control(&["live-update", "-f", junk.to_str().unwrap()]).unwrap(), "OK");
    let why = a.control(&["live-update", "-s"]).unwrap();
    assert!(why.contains("junk"), "{why}");
    assert_eq!(b.read_string("/x/y").unwrap(), "2");
}

#[test]
fn a_burst_is_served_to_its_end_and_who_left_is_forgotten() {
    const REQUESTS: usize = 3000;
    let d = Running::start();
    let read = Message::new(Op::Read.to_wire(), 1, 0, b"/tool/xenstored\0".to_vec()).to_bytes();
    // Much more than is read at once, with nothing to come after it.
    let mut s = UnixStream::connect(d.socket()).unwrap();
    s.set_read_timeout(SOON).unwrap();
    let mut sender = s.try_clone().unwrap();
    let burst = read.repeat(REQUESTS);
    let sent = std::thread::spawn(move || sender.write_all(&burst).unwrap());
    let mut reply = [0; HEADER_LEN];
    for i in 0..REQUESTS {
        s.read_exact(&mut reply).unwrap_or_else(|e| panic!("reply {i}: {e}"));
        assert_eq!(Header::from_bytes(&reply), Header { op: Op::Read.to_wire(), req_id: 1, tx_id: 0, len: 0 });
    }
    sent.join().unwrap();
    // The daemon finds the end with what came before it, to which there may be no answer.
    d.signal(Signal::STOP);
    for part in [0, 8, 20, read.len()] {
        for _ in 0..20 {
            UnixStream::connect(d.socket()).unwrap().write_all(&read[..part]).unwrap();
        }
    }
    d.signal(Signal::CONT);
    let mut c = d.client();
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let report = d.dir.path().join("report");
        let _ = std::fs::remove_file(&report);
        c.control(&["memreport", report.to_str().unwrap()]).unwrap();
        let report = std::fs::read_to_string(&report).unwrap();
        if report.contains(" 2 connections") {
            break;
        }
        assert!(Instant::now() < end, "{report}");
    }
}

const SOON: Option<Duration> = Some(Duration::from_secs(5));

#[test]
fn a_client_goes_on_with_a_daemon_that_was_killed_and_started_again() {
    let mut d = Running::start();
    let (mut c, mut other) = (d.client(), d.client());
    c.write("/x/y", "1").unwrap();
    c.watch("/x", "kept").unwrap();
    c.watch("/x", "given up").unwrap();
    c.unwatch("/x", "given up").unwrap();
    assert_eq!(c.next_event(SOON).unwrap().unwrap().token, "kept");
    while c.next_event(Some(Duration::from_millis(20))).unwrap().is_some() {}
    d.kill_and_restart();
    assert_eq!(c.read_string("/x/y").unwrap(), "1");
    let first = c.next_event(SOON).unwrap().unwrap();
    assert_eq!((&*first.path, &*first.token), ("/x", "kept"), "something may have changed meanwhile");
    assert_eq!(c.next_event(Some(Duration::from_millis(50))).unwrap(), None, "only the watch that it still had");
    other.write("/x/z", "").unwrap();
    assert_eq!(c.next_event(SOON).unwrap().unwrap().path, "/x/z");
    // One that only waits.
    let event = std::thread::scope(|s| {
        let waits = s.spawn(|| c.next_event(None));
        std::thread::sleep(Duration::from_millis(50));
        d.kill_and_restart();
        waits.join().unwrap()
    });
    assert_eq!(event.unwrap().unwrap().token, "kept");
}

#[test]
fn what_a_killed_daemon_did_not_answer_is_asked_again_or_said_to_be_unsure() {
    let mut d = Running::start();
    let mut c = d.client();
    c.write("/x", "1").unwrap();
    assert_eq!(d.killed_amid(|| c.read_string("/x")).unwrap(), "1");
    let e = d.killed_amid(|| c.write("/x", "2")).unwrap_err();
    assert!(matches!(&e, Error::Unsure { what, .. } if what == "/x"), "{e}");
    // It is connected again all the same, and this daemon had not come to it.
    assert_eq!(c.read_string("/x").unwrap(), "1");
    d.killed_amid(|| c.watch("/x", "t")).unwrap();
    assert_eq!(c.next_event(SOON).unwrap().unwrap().token, "t");
    d.killed_amid(|| c.unwatch("/x", "t")).unwrap();
    c.write("/x", "3").unwrap();
    assert_eq!(c.next_event(Some(Duration::from_millis(50))).unwrap(), None);
}

#[test]
fn a_transaction_that_a_killed_daemon_had_is_lost_as_by_a_conflict() {
    let mut d = Running::start();
    let mut c = d.client();
    c.write("/n", "5").unwrap();
    let mut tries = 0;
    c.transaction(|t| {
        tries += 1;
        let n: u32 = t.read_string("/n")?.parse().unwrap();
        if tries == 1 {
            d.kill_and_restart();
        }
        t.write("/n", (n + 1).to_string())
    })
    .unwrap();
    assert_eq!((tries, &*c.read_string("/n").unwrap()), (2, "6"));
    // The next connection's first transaction has the same number as the one before: the old one must not touch it.
    let mut t = c.begin().unwrap();
    t.write("/n", "7").unwrap();
    d.kill_and_restart();
    assert_eq!(t.read("/n").unwrap_err().errno(), Some(Errno::EAGAIN));
    assert_eq!(t.write("/n", "8").unwrap_err().errno(), Some(Errno::EAGAIN));
    assert_eq!(t.commit().unwrap_err().errno(), Some(Errno::EAGAIN));
    assert_eq!(c.read_string("/n").unwrap(), "6");
    let mut t = c.begin().unwrap();
    t.write("/n", "9").unwrap();
    d.kill_and_restart();
    t.abort().unwrap();
    // Whether a commit came to be can't be known.
    let mut t = c.begin().unwrap();
    t.write("/n", "9").unwrap();
    let e = d.killed_amid(|| t.commit()).unwrap_err();
    assert!(matches!(e, Error::Unsure { .. }), "{e}");
}

#[test]
fn one_that_comes_while_the_daemon_is_away_may_wait() {
    let mut d = Running::start();
    let socket = d.socket();
    d.child.kill().unwrap();
    d.child.wait().unwrap();
    assert!(matches!(Client::connect(&socket), Err(Error::Connect { .. })), "nobody listens");
    let got = std::thread::scope(|s| {
        let waits = s.spawn(|| Client::connect_within(&socket, Duration::from_secs(10))?.read_opt("/x"));
        std::thread::sleep(Duration::from_millis(100));
        d.child = Running::spawn(d.dir.path());
        waits.join().unwrap()
    });
    assert_eq!(got.unwrap(), None);
}
