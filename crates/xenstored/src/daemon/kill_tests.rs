//! A daemon that is killed between any two of its effects that outlive it, and started again, answers its rings as one
//! that was never killed: byte for byte, nothing lost, nothing twice.

use super::devices::{Devices, Raised};
use super::events::{Daemon, JournalPlace};
use super::kill_point::test::{Killed, kill_after};
use super::log::Log;
use super::ring::{PAGE, RingPage};
use crate::host::DomainState;
use crate::store::Options;
use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use xenstore_wire::ring::{REQ, REQ_CONS, REQ_PROD, RING_SIZE, RSP, RSP_CONS, RSP_PROD, offset};
use xenstore_wire::{HEADER_LEN, Header, Message, Op, payload};

/// What outlives the daemon.
#[derive(Debug)]
pub(super) struct Outside {
    events: OwnedFd,
    pages: BTreeMap<u16, OwnedFd>,
    domains: BTreeMap<u16, DomainState>,
    exception: bool,
    /// Domains that were notified.
    pub(super) notified: Vec<u16>,
    /// What guests with processors of their own do as soon as they are notified.
    pub(super) busy: Option<fn(u16, &RingPage)>,
    next_port: u32,
    /// Domains' ports that a daemon is bound to, and its own.
    bound: BTreeMap<u32, (u16, u32)>,
}

#[derive(Debug)]
struct Board {
    outside: Rc<RefCell<Outside>>,
    events: OwnedFd,
    rings: BTreeMap<u16, RingPage>,
}

impl Devices for Board {
    fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    fn raised(&mut self) -> io::Result<Raised> {
        let _ = rustix::io::read(&self.events, &mut [0u8; 8][..]);
        let domain_exception = std::mem::take(&mut self.outside.borrow_mut().exception);
        Ok(Raised { ports: Vec::new(), domain_exception })
    }

    fn watch_domains(&mut self, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn connect_dom0(&mut self) -> anyhow::Result<u32> {
        self.map(0)?;
        Ok(self.bind(0, 77)?)
    }

    fn map(&mut self, domid: u16) -> io::Result<()> {
        let o = self.outside.borrow();
        let page = o.pages.get(&domid).filter(|_| o.domains.contains_key(&domid));
        self.rings.insert(domid, RingPage::map(page.ok_or(io::ErrorKind::NotFound)?, 0)?);
        Ok(())
    }

    fn unmap(&mut self, domid: u16) {
        self.rings.remove(&domid);
    }

    fn ring(&self, domid: u16) -> Option<&RingPage> {
        self.rings.get(&domid)
    }

    fn bind(&mut self, domid: u16, remote_port: u32) -> io::Result<u32> {
        let mut o = self.outside.borrow_mut();
        assert!(remote_port == 77 + u32::from(domid), "domain {domid} has no port {remote_port}");
        if o.bound.values().any(|b| *b == (domid, remote_port)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        o.next_port += 1;
        let port = o.next_port;
        o.bound.insert(port, (domid, remote_port));
        Ok(port)
    }

    fn remote_port(&self, port: u32) -> Option<u32> {
        self.outside.borrow().bound.get(&port).map(|b| b.1)
    }

    fn unbind(&mut self, port: u32) {
        self.outside.borrow_mut().bound.remove(&port);
    }

    fn notify(&self, port: u32) {
        let mut o = self.outside.borrow_mut();
        if let Some(&(domid, _)) = o.bound.get(&port) {
            o.notified.push(domid);
            if let (Some(busy), Some(page)) = (o.busy, self.rings.get(&domid)) {
                busy(domid, page);
            }
        }
    }

    fn domain_state(&self, domid: u16) -> Option<DomainState> {
        self.outside.borrow().domains.get(&domid).copied()
    }
}

/// A guest's side of its ring.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) page: RingPage,
    unsent: Vec<u8>,
    received: Vec<u8>,
    deaf: bool,
}

impl Guest {
    /// Writes what fits, and reads what there is. Whether anything moved.
    fn act(&mut self) -> bool {
        let word = |at| self.page.word(at).load(Ordering::SeqCst);
        let (cons, prod) = (word(REQ_CONS), word(REQ_PROD));
        let n = (RING_SIZE - prod.wrapping_sub(cons) as usize).min(self.unsent.len());
        for (i, b) in self.unsent.drain(..n).enumerate() {
            self.page.byte(REQ + offset(prod.wrapping_add(i as u32))).store(b, Ordering::SeqCst);
        }
        self.page.word(REQ_PROD).store(prod.wrapping_add(n as u32), Ordering::SeqCst);
        let (from, to) = (word(RSP_CONS), word(RSP_PROD));
        let m = if self.deaf { 0 } else { to.wrapping_sub(from) };
        assert!(m as usize <= RING_SIZE);
        for i in 0..m {
            self.received.push(self.page.byte(RSP + offset(from.wrapping_add(i))).load(Ordering::SeqCst));
        }
        self.page.word(RSP_CONS).store(from.wrapping_add(m), Ordering::SeqCst);
        n > 0 || m > 0
    }

    fn all_taken(&self) -> bool {
        let word = |at| self.page.word(at).load(Ordering::SeqCst);
        self.unsent.is_empty() && word(REQ_CONS) == word(REQ_PROD)
    }
}

/// A host: its daemon, which may be dead, and its guests.
pub(super) struct Host {
    pub(super) dir: tempfile::TempDir,
    log: Log,
    pub(super) outside: Rc<RefCell<Outside>>,
    pub(super) guests: BTreeMap<u16, Guest>,
    pub(super) daemon: Option<Daemon>,
    /// How many points each next life lasts; then they are without end.
    lives: Vec<u64>,
    pub(super) kills: usize,
    /// What each guest received, act by act.
    transcript: Vec<String>,
}

/// Messages in words: replies in their order, then events in the order in which each came first. An event is not queued
/// while the same one waits, and how long it waits is a matter of luck; special ones always are.
fn words(domid: u16, mut bytes: &[u8]) -> Vec<String> {
    let (mut replies, mut events) = (Vec::new(), Vec::new());
    while let Some((head, rest)) = bytes.split_first_chunk::<HEADER_LEN>() {
        let h = Header::from_bytes(head);
        let (body, rest) = rest.split_at(h.len as usize);
        bytes = rest;
        let word = format!("to domain {domid}: {:?} {} {}", Op::from_wire(h.op), h.tx_id, body.escape_ascii());
        if h.op != Op::WatchEvent.to_wire() {
            replies.push(word);
        } else if body.first() == Some(&b'@') || !events.contains(&word) {
            events.push(word);
        }
    }
    assert!(bytes.is_empty(), "half a message is left: {}", bytes.escape_ascii());
    replies.append(&mut events);
    replies
}

const GUESTS: [u16; 3] = [0, 1, 2];

impl Host {
    pub(super) fn new(lives: Vec<u64>) -> Host {
        let events = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        let outside = Outside {
            events,
            pages: BTreeMap::new(),
            domains: BTreeMap::new(),
            exception: false,
            notified: Vec::new(),
            busy: None,
            next_port: 0,
            bound: BTreeMap::new(),
        };
        let mut h = Host {
            dir: tempfile::tempdir().unwrap(),
            log: Log::start(Some(Path::new("/dev/null")), false, false).unwrap(),
            outside: Rc::new(RefCell::new(outside)),
            guests: BTreeMap::new(),
            daemon: None,
            lives,
            kills: 0,
            transcript: Vec::new(),
        };
        h.lives.reverse();
        for d in GUESTS {
            h.come(d);
        }
        h
    }

    /// A domain comes into being, with a fresh page.
    fn come(&mut self, domid: u16) {
        let fd = memfd_create("ring", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, PAGE as u64).unwrap();
        let page = RingPage::map(&fd, 0).unwrap();
        self.guests.insert(domid, Guest { page, unsent: Vec::new(), received: Vec::new(), deaf: false });
        let mut o = self.outside.borrow_mut();
        o.pages.insert(domid, fd);
        o.domains.insert(domid, DomainState::default());
    }

    fn die(&mut self, domid: u16) {
        self.guests.remove(&domid);
        let mut o = self.outside.borrow_mut();
        o.domains.remove(&domid);
        o.exception = true;
        rustix::io::write(&o.events, &1u64.to_ne_bytes()).unwrap();
    }

    /// Something is to be looked at; what, the ports say.
    pub(super) fn raise(&self) {
        rustix::io::write(&self.outside.borrow().events, &1u64.to_ne_bytes()).unwrap();
    }

    /// A domain goes on. Who says so with RESUME has seen to it; else its shutdown is noticed again whenever the daemon looks.
    fn resume(&mut self, body: &[u8]) {
        let domid = payload::strings(body).next().and_then(|d| payload::decimal::<u16>(d).ok());
        let mut o = self.outside.borrow_mut();
        if let Some(s) = domid.and_then(|d| o.domains.get_mut(&d)) {
            s.shutdown = false;
        }
    }

    /// Notes what guests received; those that are deaf may have half a message.
    fn keep_transcript(&mut self) {
        self.transcript.push("--".into());
        for (d, g) in self.guests.iter_mut().filter(|(_, g)| !g.deaf) {
            self.transcript.extend(words(*d, &std::mem::take(&mut g.received)));
        }
    }

    fn start(&self) -> Daemon {
        let board = Board {
            outside: self.outside.clone(),
            events: self.outside.borrow().events.try_clone().unwrap(),
            rings: BTreeMap::new(),
        };
        let place = JournalPlace { dir: self.dir.path().to_owned(), on: true };
        let socket = self.dir.path().join("socket");
        Daemon::start_at(Options::default(), self.log.clone(), Some(Box::new(board)), place, &socket).unwrap()
    }

    /// Lets the daemon (a new one if the last was killed) have its turn.
    pub(super) fn turn(&mut self) {
        let mut daemon = self.daemon.take();
        let r = catch_unwind(AssertUnwindSafe(|| {
            let mut d = match daemon.take() {
                Some(d) => d,
                None => self.start(),
            };
            d.turn(&mut Vec::with_capacity(16), false).unwrap();
            d
        }));
        match r {
            Ok(d) => self.daemon = Some(d),
            Err(e) if e.is::<Killed>() => {
                self.kills += 1;
                // The kernel closes its ports.
                self.outside.borrow_mut().bound.clear();
                kill_after(self.lives.pop().unwrap_or(u64::MAX));
            }
            Err(e) => resume_unwind(e),
        }
    }

    /// Ends the daemon; the next turn starts another.
    pub(super) fn kill(&mut self) {
        self.daemon = None;
        // The kernel closes its ports.
        self.outside.borrow_mut().bound.clear();
    }

    /// Until nobody has anything to do.
    pub(super) fn settle(&mut self) {
        let mut last = Instant::now();
        let mut quiet = 0;
        while quiet < 2 {
            let kills = self.kills;
            self.turn();
            let mut moved = kills != self.kills || self.daemon.is_none();
            for g in self.guests.values_mut() {
                moved |= g.act();
            }
            // A guest that is limited in its rate waits a few milliseconds.
            if !moved && last.elapsed() < Duration::from_millis(100) && self.is_awaited() {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            last = Instant::now();
            quiet = if moved { 0 } else { quiet + 1 };
        }
    }

    /// Whether the daemon is going to serve one that it has not.
    fn is_awaited(&self) -> bool {
        let Some(store) = self.daemon.as_ref().map(|d| &d.store) else { return true };
        let served = |d: &u16| {
            let c = store.domain_connection(*d).and_then(|id| store.connection(id));
            c.is_some_and(|c| !c.ignored && c.frozen.is_none())
        };
        self.guests.iter().any(|(d, g)| !g.deaf && !g.all_taken() && served(d))
    }

    pub(super) fn send(&mut self, domid: u16, op: Op, tx: u32, body: &[u8]) {
        if let Some(g) = self.guests.get_mut(&domid) {
            g.unsent.extend(Message::new(op.to_wire(), 7, tx, body.to_vec()).to_bytes());
        }
    }

    pub(super) fn introduce(&mut self, domid: u16) {
        // Its ring is emptied.
        if let Some(g) = self.guests.get_mut(&domid) {
            g.unsent.clear();
        }
        self.send(0, Op::Introduce, 0, &payload::join([domid.to_string(), "1".into(), (77 + domid).to_string()]));
        self.settle();
    }

    fn carry_out(&mut self, a: &Act) {
        match a {
            Act::Send { who, requests, cut } => {
                for (op, tx, body) in requests {
                    if *op == Op::Resume {
                        self.resume(body);
                    }
                    self.send(*who, *op, *tx, body);
                }
                let Some(g) = self.guests.get_mut(who) else { return };
                let rest = g.unsent.split_off((*cut).min(g.unsent.len()));
                self.settle();
                if let Some(g) = self.guests.get_mut(who) {
                    g.unsent.extend(rest);
                }
                self.settle();
            }
            Act::Deaf { who, yes } => {
                if let Some(g) = self.guests.get_mut(who) {
                    g.deaf = *yes;
                }
                self.settle();
            }
            Act::Die { who } => {
                self.die(*who);
                self.settle();
            }
            Act::Shutdown { who } => {
                {
                    let mut o = self.outside.borrow_mut();
                    if let Some(d) = o.domains.get_mut(who) {
                        d.shutdown = true;
                    }
                    o.exception = true;
                    rustix::io::write(&o.events, &1u64.to_ne_bytes()).unwrap();
                }
                self.settle();
            }
            Act::Come { who } => {
                if !self.guests.contains_key(who) {
                    self.come(*who);
                }
                // Else its shutdown is noticed again whenever the daemon looks.
                self.outside.borrow_mut().domains.insert(*who, DomainState::default());
                self.introduce(*who);
            }
        }
    }

    /// All that can be seen from outside.
    fn result(&mut self) -> Vec<String> {
        for d in GUESTS {
            if let Some(g) = self.guests.get_mut(&d) {
                g.deaf = false;
            }
        }
        self.settle();
        let mut v = Vec::new();
        self.keep_transcript();
        v.append(&mut self.transcript);
        let store = &self.daemon.as_ref().unwrap().store;
        assert_eq!(store.check(), Vec::<String>::new());
        v.push(format!("generation {}", store.generation));
        store.tree().walk(b"/", &mut |p, n| {
            // Entries for domains that are gone are marked at different times.
            let perms = store.settled(&n.perms, n.generation);
            v.push(format!("{} = {} {:?} {}", p.escape_ascii(), n.value.escape_ascii(), &*perms, n.generation));
        });
        for d in GUESTS {
            if let Some(u) = store.usage(d) {
                v.push(format!("domain {d} holds {u:?}"));
            }
        }
        v
    }
}

#[derive(Debug, Clone)]
enum Act {
    /// Some requests of a guest, of whose bytes the daemon sees only so many at first.
    Send {
        who: u16,
        requests: Vec<(Op, u32, Vec<u8>)>,
        cut: usize,
    },
    /// A guest reads nothing, or does again.
    Deaf {
        who: u16,
        yes: bool,
    },
    Die {
        who: u16,
    },
    Shutdown {
        who: u16,
    },
    /// A guest is there (again), and is introduced (again).
    Come {
        who: u16,
    },
}

fn run(acts: &[Act], lives: Vec<u64>) -> (Vec<String>, usize) {
    let mut lives = lives;
    let first = if lives.is_empty() { u64::MAX } else { lives.remove(0) };
    let mut h = Host::new(lives);
    kill_after(first);
    for (d, op, body) in [
        (0, Op::Watch, &b"@releaseDomain\0rel\0"[..]),
        (0, Op::Watch, b"/local\0all\0"),
        (0, Op::Mkdir, b"/local/domain/1\0"),
        (0, Op::SetPerms, b"/local/domain/1\0n1\0r2\0"),
        (0, Op::Mkdir, b"/local/domain/2\0"),
        (0, Op::SetPerms, b"/local/domain/2\0n2\0"),
    ] {
        h.send(d, op, 0, body);
    }
    h.settle();
    for d in [1, 2] {
        h.introduce(d);
    }
    h.keep_transcript();
    for a in acts {
        h.carry_out(a);
        h.keep_transcript();
    }
    let r = h.result();
    kill_after(u64::MAX);
    (r, h.kills)
}

fn requests() -> impl Strategy<Value = Vec<(Op, u32, Vec<u8>)>> {
    let path = prop::sample::select(vec!["/", "/a", "/a/b", "a", "a/b", "a/c", "/local/domain/1", "/local/domain/2/x"]);
    let more = prop::sample::select(vec!["", "t", "n0", "b1", "r2", "1", "2", "5", "T", "F", "x"]);
    let ops = Op::ALL.iter().copied().filter(|o| {
        !matches!(o, Op::Control | Op::Introduce | Op::Error | Op::WatchEvent | Op::DomainImportData | Op::DomainImport)
    });
    let some = (
        prop::sample::select(ops.collect::<Vec<_>>()),
        prop::sample::select(vec![0u32, 0, 1, 2, 3]),
        prop_oneof![
            4 => (path, prop::collection::vec(more.clone(), 0..3)).prop_map(|(p, m)| {
                let mut b = payload::join([p]);
                b.extend(payload::join(m));
                b
            }),
            2 => prop::collection::vec(more, 1..3).prop_map(payload::join),
            1 => (0usize..2100).prop_map(|n| [&b"a/big\0"[..], &vec![b'v'; n]].concat()),
        ],
    );
    // What a driver does; and what comes up often, so that transactions get somewhere.
    let usual = prop::sample::select(vec![
        (Op::TransactionStart, 0, b"\0".to_vec()),
        (Op::TransactionEnd, 1, b"T\0".to_vec()),
        (Op::TransactionEnd, 2, b"T\0".to_vec()),
        (Op::Write, 1, b"a/b\0in a transaction".to_vec()),
        (Op::Write, 1, b"n/e/w\0in a transaction".to_vec()),
        (Op::Rm, 1, b"a\0".to_vec()),
        (Op::Read, 1, b"a/b\0".to_vec()),
        (Op::Directory, 1, b"a\0".to_vec()),
        (Op::Write, 0, b"a/b\0directly".to_vec()),
        (Op::Read, 0, b"a/b\0".to_vec()),
        (Op::DirectoryPart, 0, b"a\x000\0".to_vec()),
        (Op::Rm, 0, b"a\0".to_vec()),
        (Op::Watch, 0, b"a\0tok\0".to_vec()),
        (Op::Watch, 0, b"/local/domain/1\0deep\x001\0".to_vec()),
        (Op::Unwatch, 0, b"a\0tok\0".to_vec()),
        (Op::DomainFreeze, 0, b"1\0".to_vec()),
        (Op::DomainThaw, 0, b"1\0".to_vec()),
        (Op::SetQuota, 0, b"1\0nodes\x005\0".to_vec()),
        (Op::Release, 0, b"2\0".to_vec()),
    ]);
    prop::collection::vec(prop_oneof![some, usual], 1..5)
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        20 => (prop::sample::select(vec![0u16, 0, 1, 1, 1, 2]), requests(), prop_oneof![Just(usize::MAX), 0usize..200])
            .prop_map(|(who, requests, cut)| Act::Send { who, requests, cut }),
        2 => (1u16..3, any::<bool>()).prop_map(|(who, yes)| Act::Deaf { who, yes }),
        1 => (1u16..3).prop_map(|who| Act::Die { who }),
        1 => (1u16..3).prop_map(|who| Act::Shutdown { who }),
        2 => (1u16..3).prop_map(|who| Act::Come { who }),
    ]
}

proptest! {
    // More with PROPTEST_CASES.
    #![proptest_config(ProptestConfig {
        cases: if std::env::var_os("PROPTEST_CASES").is_some() { ProptestConfig::default().cases } else { 60 },
        max_shrink_iters: 2000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn kills_at_any_time_change_no_answer(
        acts in prop::collection::vec(act(), 1..15),
        lives in prop::collection::vec(0u64..200, 1..30),
    ) {
        let (calm, _) = run(&acts, Vec::new());
        let (killed, kills) = run(&acts, lives);
        prop_assume!(kills > 0);
        let other = killed.iter().zip(&calm).position(|(k, c)| k != c).unwrap_or(calm.len().min(killed.len()));
        prop_assert_eq!(killed.get(other), calm.get(other), "line {}", other);
    }
}

/// One kill at each of the points that a life has, in turn.
#[test]
fn a_kill_at_each_single_point_changes_no_answer() {
    let send = |who, requests: &[(Op, u32, &str)], cut| Act::Send {
        who,
        requests: requests.iter().map(|(o, t, b)| (*o, *t, b.as_bytes().to_vec())).collect(),
        cut,
    };
    let big = format!("big\0{}", "v".repeat(1500));
    let acts = [
        send(1, &[(Op::Watch, 0, "a\0tok\0"), (Op::Write, 0, "a/b\x001"), (Op::Read, 0, "a/b\0")], 21),
        send(1, &[(Op::TransactionStart, 0, "\0"), (Op::Write, 1, "a/b\x002"), (Op::Mkdir, 1, "a/n\0")], usize::MAX),
        send(1, &[(Op::Rm, 1, "a/n\0"), (Op::Write, 1, "a/n/m\x003"), (Op::Directory, 1, "a\0")], usize::MAX),
        send(1, &[(Op::TransactionEnd, 1, "T\0"), (Op::Directory, 0, "a\0")], usize::MAX),
        Act::Deaf { who: 1, yes: true },
        send(1, &[(Op::Write, 0, &big), (Op::Read, 0, "big\0"), (Op::Read, 0, "big\0")], 1040),
        send(0, &[(Op::Write, 0, "/local/domain/1/a/x\x004"), (Op::DomainFreeze, 0, "1\0")], usize::MAX),
        send(0, &[(Op::Write, 0, "/local/domain/1/a/y\x005"), (Op::DomainThaw, 0, "1\0")], usize::MAX),
        Act::Deaf { who: 1, yes: false },
        send(2, &[(Op::TransactionStart, 0, "\0"), (Op::Write, 1, "x\x006")], usize::MAX),
        Act::Die { who: 2 },
        Act::Come { who: 2 },
        Act::Come { who: 1 },
        send(2, &[(Op::Read, 0, "x\0"), (Op::Write, 0, "x\x007")], usize::MAX),
    ];
    let (calm, kills) = run(&acts, Vec::new());
    assert_eq!(kills, 0);
    let mut points = 0;
    loop {
        let (killed, kills) = run(&acts, vec![points]);
        assert_eq!(killed, calm, "killed after {points} points");
        if kills == 0 {
            break;
        }
        points += 1;
    }
    assert!(points > 500, "{points} points");
}
