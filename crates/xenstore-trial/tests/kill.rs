//! `kill -9` of our daemon, again and again, under guests and a kernel in the middle of things: each request gets its one
//! reply, none is carried out twice, no event is lost.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use xenstore_trial::fake_xen::DomainState;
use xenstore_trial::{Connection, FakeXen};
use xenstore_wire::{Message, Op, payload};

const KILLS: u32 = 40;
const WAIT: Duration = Duration::from_secs(5);

struct Daemon<'a> {
    xen: &'a FakeXen,
    run: &'a Path,
    child: Child,
}

impl<'a> Daemon<'a> {
    fn start(xen: &'a FakeXen, run: &'a Path) -> Daemon<'a> {
        Daemon { xen, run, child: Daemon::spawn(xen, run) }
    }

    fn spawn(xen: &FakeXen, run: &Path) -> Child {
        std::fs::create_dir_all(run).unwrap();
        Command::new(env!("CARGO_BIN_EXE_xenstored-on-files"))
            .env("FAKE_XEN", xen.dir())
            .env("XENSTORED_PATH", run.join("socket"))
            .env("XENSTORED_RUNDIR", run)
            .stdin(Stdio::null())
            .stderr(std::fs::File::options().create(true).append(true).open(run.join("log")).unwrap())
            .spawn()
            .unwrap()
    }

    fn kill(&mut self) {
        assert!(self.child.try_wait().unwrap().is_none(), "it ended by itself: {}", self.log());
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn again(&mut self) {
        self.child = Daemon::spawn(self.xen, self.run);
    }

    fn came_back(&self) -> u32 {
        self.log().matches("came back from").count() as u32
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.run.join("log")).unwrap_or_default()
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(m: &Message) -> String {
    String::from_utf8_lossy(&m.payload).into_owned()
}

fn ok(c: &mut Connection<'_>, op: Op, tx: u32, body: &str) -> String {
    let (m, _) = c.call(op, tx, body.as_bytes()).unwrap();
    assert_ne!(m.header.op, Op::Error.to_wire(), "{} {body:?}: {}", op.name(), text(&m));
    text(&m)
}

/// Counts up in a node, every other time in a transaction, and reads what it wrote. How far it came.
fn count(c: &mut Connection<'_>, stop: &AtomicBool) -> u32 {
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) {
        n += 1;
        if n % 2 == 0 {
            ok(c, Op::Write, 0, &format!("data/n\0{n}"));
        } else {
            let tx: u32 = ok(c, Op::TransactionStart, 0, "\0").trim_end_matches('\0').parse().unwrap();
            ok(c, Op::Write, tx, &format!("data/n\0{n}"));
            ok(c, Op::Mkdir, tx, &format!("data/of-{n}\0"));
            assert_eq!(ok(c, Op::Read, tx, "data/n\0"), n.to_string());
            ok(c, Op::TransactionEnd, tx, "T\0");
            ok(c, Op::Rm, 0, &format!("data/of-{n}\0"));
        }
        assert_eq!(ok(c, Op::Read, 0, "data/n\0"), n.to_string());
    }
    n
}

#[test]
fn a_kernel_and_its_guests_do_not_notice_that_the_daemon_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let xen = FakeXen::create(&dir.path().join("xen")).unwrap();
    let run = dir.path().join("run");
    let mut daemon = Daemon::start(&xen, &run);
    let mut kernel = Connection::ring(&xen, 0).unwrap();
    for domid in [1, 2, 3] {
        xen.add_domain(domid).unwrap();
        ok(&mut kernel, Op::Mkdir, 0, &format!("/local/domain/{domid}\0"));
        ok(&mut kernel, Op::SetPerms, 0, &format!("/local/domain/{domid}\0n{domid}\0"));
        ok(&mut kernel, Op::Introduce, 0, &format!("{domid}\x000\x001\0"));
    }
    ok(&mut kernel, Op::Watch, 0, "/local/domain/1/data/n\0count\0");
    ok(&mut kernel, Op::Watch, 0, "@releaseDomain\0rel\0");
    let (stop, done) = (AtomicBool::new(false), AtomicBool::new(false));
    let guests = [1, 2].map(|d| Connection::ring(&xen, d).unwrap());
    let counted = std::thread::scope(|s| {
        let counting: Vec<_> = guests
            .into_iter()
            .map(|mut c| {
                s.spawn({
                    let stop = &stop;
                    move || count(&mut c, stop)
                })
            })
            .collect();
        // The kernel reads its events, which say when the value is another: the last one must not be missed.
        let watching = s.spawn(|| {
            let (mut events, mut special) = (0, Vec::new());
            loop {
                match kernel.receive(Duration::from_millis(20)).unwrap() {
                    Some(m) if text(&m).starts_with('@') => special.push(text(&m)),
                    Some(_) => events += 1,
                    None if done.load(Ordering::Relaxed) => break,
                    None => {}
                }
            }
            (events, special, kernel)
        });
        let mut wait = 1;
        // On a busy machine most are killed before they have come so far as to serve anybody.
        let mut i = 0;
        while i < KILLS || (daemon.came_back() <= KILLS / 2 && i < 50 * KILLS) {
            // From at once to some milliseconds, which is hundreds of requests.
            wait = wait * 69 % 101;
            std::thread::sleep(Duration::from_micros(wait * 397));
            daemon.kill();
            if i == KILLS / 2 {
                // Nobody is there to be told.
                xen.set_state(3, DomainState::Dying).unwrap();
            }
            daemon.again();
            i += 1;
        }
        std::thread::sleep(Duration::from_millis(300));
        stop.store(true, Ordering::Relaxed);
        let counted: Vec<_> = counting.into_iter().map(|t| t.join()).collect();
        std::thread::sleep(Duration::from_millis(100));
        done.store(true, Ordering::Relaxed);
        let counted: Vec<u32> = counted.into_iter().map(|n| n.expect("a guest")).collect();
        let (events, special, mut kernel) = watching.join().unwrap();
        assert!(events > 0);
        assert_eq!(
            special.iter().filter(|e| e.starts_with("@releaseDomain")).count(),
            2,
            "one for the watch: {special:?}"
        );
        for (d, n) in [1, 2].iter().zip(&counted) {
            assert_eq!(ok(&mut kernel, Op::Read, 0, &format!("/local/domain/{d}/data/n\0")), n.to_string());
            assert_eq!(
                ok(&mut kernel, Op::Directory, 0, &format!("/local/domain/{d}/data\0")),
                "n\0",
                "nothing is left"
            );
        }
        assert_eq!(ok(&mut kernel, Op::Control, 0, "check\0"), "OK\0");
        counted
    });
    assert!(counted.iter().all(|n| *n > KILLS), "{counted:?}: the guests got nowhere");
    assert!(daemon.came_back() > KILLS / 2, "{}", daemon.log());
}

/// Waits until the daemon answers.
fn tool(run: &Path) -> Connection<'static> {
    let end = Instant::now() + WAIT;
    loop {
        match Connection::socket(&run.join("socket")) {
            Ok(c) => return c,
            Err(e) => assert!(Instant::now() < end, "{e:#}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_journal_that_another_daemon_made_stale_is_refused_and_one_of_another_boot_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let xen = FakeXen::create(&dir.path().join("xen")).unwrap();
    let run = dir.path().join("run");
    let mut daemon = Daemon::start(&xen, &run);
    let mut kernel = Connection::ring(&xen, 0).unwrap();
    ok(&mut kernel, Op::Write, 0, "/kept\0yes");
    let mut t = tool(&run);
    ok(&mut t, Op::Write, 0, "/also\0yes");
    daemon.kill();
    let journal = run.join("journal");
    let kept = std::fs::read(&journal).unwrap();
    assert!(t.call(Op::Read, 0, b"/kept\0").is_err(), "its socket died");
    daemon.again();
    let mut t = tool(&run);
    assert_eq!(ok(&mut t, Op::Read, 0, "/kept\0"), "yes");
    assert_eq!(ok(&mut t, Op::Read, 0, "/also\0"), "yes");
    // What the ring is asked now is not in the copy.
    ok(&mut kernel, Op::Read, 0, "/kept\0");
    daemon.kill();
    std::fs::write(&journal, &kept).unwrap();
    daemon.again();
    assert!(!daemon.child.wait().unwrap().success());
    assert!(daemon.log().contains("another daemon has served it since"), "{}", daemon.log());
    assert!(daemon.log().contains("remove it to start with an empty store"), "{}", daemon.log());
    // Damage, and another boot.
    let mut bad = kept.clone();
    bad[4096 + 40] ^= 1;
    std::fs::write(&journal, &bad).unwrap();
    daemon.again();
    assert!(!daemon.child.wait().unwrap().success());
    assert!(daemon.log().contains("byte 4096: the snapshot is damaged"), "{}", daemon.log());
    let boot = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap();
    let mut other = kept;
    other[16] ^= if boot[0] == b'0' { 1 } else { 2 };
    let check = crc32fast::hash(&other[16..68]);
    other[12..16].copy_from_slice(&check.to_le_bytes());
    std::fs::write(&journal, &other).unwrap();
    daemon.again();
    let mut t = tool(&run);
    let (m, _) = t.call(Op::Read, 0, &payload::join(["/kept"])).unwrap();
    assert_eq!(text(&m), "ENOENT\0");
    assert!(daemon.log().contains("is ignored: it is of another boot"), "{}", daemon.log());
}
