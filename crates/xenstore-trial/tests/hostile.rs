//! A guest attacks our daemon over its ring ([`witness::attack`]) while a tool of dom0 and another guest go on: what they wait, what
//! the daemon's memory grows by, and that the store is consistent afterwards.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use witness::attack::{ATTACKS, Guest, Ring};
use xenstore_trial::fake_xen::{DomainState, PORT_BASE, SharedPage};
use xenstore_trial::stock::{Programs, Stock};
use xenstore_trial::{Connection, FakeXen};
use xenstore_wire::{Op, payload, ring};

const HOSTILE: u16 = 1;
const BYSTANDER: u16 = 2;
/// How long an attack that takes its time goes on.
const TIME: Duration = Duration::from_secs(2);

struct Page<'x> {
    xen: &'x FakeXen,
    page: SharedPage,
}

impl Ring for Page<'_> {
    fn load(&self, offset: usize) -> u32 {
        self.page.load(offset)
    }
    fn store(&self, offset: usize, value: u32) {
        self.page.store(offset, value);
    }
    fn load_byte(&self, offset: usize) -> u8 {
        self.page.load_byte(offset)
    }
    fn store_byte(&self, offset: usize, value: u8) {
        self.page.store_byte(offset, value);
    }
    fn notify(&self) -> Result<(), String> {
        self.xen.raise_again(PORT_BASE + u32::from(HOSTILE)).map_err(|e| format!("{e:#}"))
    }
}

fn introduce(tool: &mut Connection<'_>, xen: &FakeXen, domid: u16) {
    let home = format!("/local/domain/{domid}");
    xen.add_domain(domid).unwrap();
    tool.call(Op::Mkdir, 0, &payload::join([format!("{home}/data")])).unwrap();
    for path in [&home, &format!("{home}/data")] {
        tool.call(Op::SetPerms, 0, &payload::join([path.clone(), format!("n{domid}")])).unwrap();
    }
    let (m, _) = tool.call(Op::Introduce, 0, &payload::join([&domid.to_string(), "0", "1"])).unwrap();
    assert_eq!(m.payload, b"OK\0");
}

fn resident(d: &Stock) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", d.pid())).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

/// Our daemon, and the Xen that it sees, with all their files in `dir`.
fn start(dir: &Path) -> (FakeXen, Stock) {
    let programs = Programs::prepare(dir).unwrap();
    let xen = FakeXen::create(&dir.join("xen")).unwrap();
    let ours = Path::new(env!("CARGO_BIN_EXE_xenstored-on-files"));
    let daemon = programs.start_other(ours, &[], &xen, &dir.join("run")).unwrap();
    (xen, daemon)
}

#[test]
fn the_others_are_served_whatever_a_guest_does() {
    let dir = tempfile::tempdir().unwrap();
    let (xen, daemon) = start(dir.path());
    let mut tool = Connection::socket(daemon.socket()).unwrap();
    introduce(&mut tool, &xen, BYSTANDER);
    let mut bystander = Connection::ring(&xen, BYSTANDER).unwrap();
    let before = resident(&daemon);
    for (name, _) in ATTACKS {
        introduce(&mut tool, &xen, HOSTILE);
        let over = AtomicBool::new(false);
        let seen = std::thread::scope(|s| {
            let attack = s.spawn(|| {
                let page = Page { xen: &xen, page: xen.map_ring(HOSTILE).unwrap() };
                let seen = Guest::new(page, 7).attack(name, TIME);
                over.store(true, Ordering::Relaxed);
                seen
            });
            let mut longest = [Duration::ZERO; 2];
            let mut asked = 0;
            loop {
                for (c, longest) in [&mut tool, &mut bystander].into_iter().zip(&mut longest) {
                    let since = Instant::now();
                    let (m, _) = c.call(Op::GetPerms, 0, b"/local/domain/2/data\0").unwrap();
                    assert_eq!(m.payload, b"n2\0");
                    *longest = (*longest).max(since.elapsed());
                }
                asked += 1;
                if over.load(Ordering::Relaxed) {
                    break;
                }
            }
            let seen = attack.join().unwrap().unwrap_or_else(|e| panic!("{name}: {e}"));
            println!("{name:13} {seen}; {asked} rounds of the others, at most {longest:?}; {} KiB", resident(&daemon));
            assert!(longest.iter().all(|&t| t < Duration::from_millis(500)), "{name}: somebody waited {longest:?}");
            seen
        });
        assert!(!seen.is_empty());
        let (m, _) = tool.call(Op::Control, 0, &payload::join(["check"])).unwrap();
        assert_eq!(m.payload, b"OK\0", "after {name}");
        // Its quota of memory is 2.5 MiB as it is accounted; nodes and events take up to three times that.
        let grown = resident(&daemon).saturating_sub(before);
        assert!(grown < 8 << 10, "{name}: {grown} KiB more");
        xen.set_state(HOSTILE, DomainState::Dying).unwrap();
        xen.remove_domain(HOSTILE).unwrap();
        xen.raise_dom_exc().unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        while tool.call(Op::IsDomainIntroduced, 0, b"1\0").unwrap().0.payload == b"T\0" {
            assert!(Instant::now() < end, "{name}: the dead guest is not noticed");
        }
        tool.call(Op::Rm, 0, b"/local/domain/1\0").unwrap();
    }
    assert_eq!(ring::error::NONE, xen.map_ring(BYSTANDER).unwrap().load(ring::ERROR));
}

/// The guest asks, and is not heard: it is over its quota.
fn unheard(guest: &mut Connection<'_>, why: &str) {
    guest.send(Op::GetDomainPath, 0, b"0\0").unwrap();
    let answer = guest.receive(Duration::from_millis(300)).unwrap();
    assert_eq!(answer, None, "{why}: an answer came while the guest is over its quota");
}

/// And then is heard, though nobody raises its event channel.
fn heard(guest: &mut Connection<'_>, why: &str) {
    let since = Instant::now();
    let answer = guest.receive(Duration::from_secs(3)).unwrap().unwrap_or_else(|| panic!("{why}: no answer"));
    assert_eq!(answer.payload, b"/local/domain/0\0");
    println!("{why}: heard after {:?}", since.elapsed());
}

#[test]
fn a_guest_over_its_quota_is_served_as_soon_as_the_quota_is_raised() {
    let dir = tempfile::tempdir().unwrap();
    let (xen, daemon) = start(dir.path());
    let mut tool = Connection::socket(daemon.socket()).unwrap();
    introduce(&mut tool, &xen, BYSTANDER);
    let mut guest = Connection::ring(&xen, BYSTANDER).unwrap();
    guest.call(Op::Write, 0, b"data/x\x000123456789").unwrap();
    let mut set = |op: Op, words: &[&str]| {
        let (m, _) = tool.call(op, 0, &payload::join(words)).unwrap();
        assert_eq!(m.payload, b"OK\0", "{words:?}");
    };
    set(Op::Control, &["quota", "set", "memory", "1"]);
    unheard(&mut guest, "quota of all domains");
    set(Op::Control, &["quota", "set", "memory", "1000000"]);
    heard(&mut guest, "quota of all domains");
    set(Op::SetQuota, &["2", "memory", "1"]);
    unheard(&mut guest, "quota of one domain");
    set(Op::SetQuota, &["2", "memory", "1000000"]);
    heard(&mut guest, "quota of one domain");
    // Its replies wait: more than the quota of them than fit into the ring.
    let q = payload::join(["data/big"]);
    let big = [&q[..], &[b'x'; 900]].concat();
    guest.call(Op::Write, 0, &big).unwrap();
    set(Op::SetQuota, &["2", "outstanding", "2"]);
    for _ in 0..8 {
        guest.send(Op::Read, 0, &q).unwrap();
    }
    let taken = |n: &str| {
        let end = Instant::now() + Duration::from_millis(500);
        while Instant::now() < end {
            let text = tool_report(daemon.socket());
            if text.contains(n) {
                return true;
            }
        }
        false
    };
    assert!(taken("outstanding     :        2\n"), "{}", tool_report(daemon.socket()));
    set(Op::SetQuota, &["2", "outstanding", "5"]);
    assert!(taken("outstanding     :        5\n"), "{}", tool_report(daemon.socket()));
}

/// What `xenstore-control quota DOMID` says of the bystander.
fn tool_report(socket: &Path) -> String {
    let mut c = Connection::socket(socket).unwrap();
    let (m, _) = c.call(Op::Control, 0, &payload::join(["quota", "2"])).unwrap();
    String::from_utf8_lossy(&m.payload).into_owned()
}
