//! The engine from end to end over two simulated hosts: moves, refusals, limits, and every planted fault.

use hypervisor::{Affinity, CpuPool, DomId, Gfn, GtPortKind, Hypervisor, Share};
use migrate::Limits;
use migrate::command::NotDone;
use migrate::destination::{Destinations, role_of};
use migrate::fault_points::{Plant, Side, guest_is_on};
use migrate::handshake::{Denied, SourceState, ToDestination, ToSource};
use migrate::host::{Fault, Faults, Host, Timeouts};
use migrate::journal::{Journal, Role};
use migrate::link::{Connector, Link};
use migrate::report::{Ending, Left, Place, Report};
use migrate::source::{self, Handle, Request};
use migrate::wire::{Frame, Said};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use uuid::Uuid;
use xen_abi::domctl::{SCHEDULER_CREDIT, SCHEDULER_CREDIT2};
use xen_sim::toolstack::SimToolstack;
use xen_sim::{FIRST, Program, SimXen, World, expected_memory, still_page};

const DOM: DomId = DomId(41);
const GUEST: Uuid = Uuid::from_u128(0x5eed);
const PROGRAM: Program = Program { pages: 1200, working_set: 300, still: 60, ticks: 50 };
const PATIENCE: Duration = Duration::from_secs(20);

/// Fires once, at one point.
#[derive(Default)]
struct Planted(Mutex<Option<(String, Fault)>>, Mutex<Vec<String>>, Mutex<Option<Hook>>);

/// What happens to a host at one point.
type Hook = (String, Box<dyn FnOnce() + Send>);

impl Faults for Planted {
    fn at(&self, point: &str) -> Option<Fault> {
        self.1.lock().unwrap().push(point.into());
        // Not under the lock: the other host has its points too.
        let happens = self.2.lock().unwrap().take_if(|(at, _)| at == point);
        if let Some((_, happen)) = happens {
            happen();
        }
        let mut planted = self.0.lock().unwrap();
        match &*planted {
            Some((at, fault)) if at == point => {
                let fault = *fault;
                *planted = None;
                Some(fault)
            }
            _ => None,
        }
    }
}

/// What happens to one byte on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Harm {
    /// One of its bits is another.
    Flip,
    /// The connection ends before it.
    Cut,
}

/// Everything that one side has written, over all connections, and what harm is to come to it.
#[derive(Default)]
struct Tap {
    written: Vec<u8>,
    harm: Option<(usize, Harm)>,
}

/// A writer that harms what goes through it.
struct Tapped {
    tap: Arc<Mutex<Tap>>,
    inner: Box<dyn io::Write + Send>,
    close: Arc<dyn Fn() + Send + Sync>,
}

impl io::Write for Tapped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut bytes = bytes.to_vec();
        let harmed = {
            let mut tap = self.tap.lock().unwrap();
            let start = tap.written.len();
            tap.written.extend_from_slice(&bytes);
            let hit = tap.harm.filter(|(at, _)| (start..start + bytes.len()).contains(at));
            hit.map(|(at, harm)| {
                tap.harm = None;
                (at - start, harm)
            })
        };
        match harmed {
            Some((at, Harm::Flip)) => bytes[at] ^= 0x10,
            Some((at, Harm::Cut)) => {
                self.inner.write_all(&bytes[..at])?;
                self.inner.flush()?;
                (self.close)();
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            None => {}
        }
        self.inner.write_all(&bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Connects to the daemon that runs now, if one does.
#[derive(Default)]
struct Wire(Mutex<Option<Destinations>>, [Arc<Mutex<Tap>>; 2]);

impl Wire {
    /// What the first (0) or the second host writes goes through its tap.
    fn tapped(&self, side: usize, link: Link) -> Link {
        let (tap, close) = (self.1[side].clone(), link.close.clone());
        Link {
            writer: Box::new(Tapped { tap, inner: link.writer, close: close.clone() }),
            reader: link.reader,
            close,
            patience: link.patience,
        }
    }
}

impl Connector for Wire {
    fn connect(&self, _peer: &str) -> io::Result<Link> {
        let Some(daemon) = self.0.lock().unwrap().clone() else {
            return Err(io::ErrorKind::ConnectionRefused.into());
        };
        let (here, there) = UnixStream::pair()?;
        let link = self.tapped(1, Link::unix(there)?);
        std::thread::spawn(move || daemon.serve(link));
        Ok(self.tapped(0, Link::unix(here)?))
    }
}

struct Lab {
    world: Arc<World>,
    xen: [SimXen; 2],
    toolstacks: [SimToolstack; 2],
    hosts: [Host; 2],
    wire: Arc<Wire>,
    planted: Arc<Planted>,
    _dirs: [tempfile::TempDir; 2],
}

impl Lab {
    fn new() -> Lab {
        Lab::with(|_| {})
    }

    fn with(change: impl Fn(&mut SimToolstack)) -> Lab {
        let world = Arc::new(World::default());
        // The second host was booted much later.
        let xen = [SimXen::new(&world, "a", 90_000_000_000_000), SimXen::new(&world, "b", 5_000_000_000)];
        let toolstacks = xen.each_ref().map(SimToolstack::new);
        let planted = Arc::new(Planted::default());
        let wire = Arc::new(Wire::default());
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let hosts = [0, 1].map(|n| {
            let mut toolstack = toolstacks[n].clone();
            if n == 1 {
                change(&mut toolstack);
            }
            Host {
                hypervisor: Arc::new(xen[n].clone()),
                toolstack: Arc::new(toolstack),
                connector: wire.clone(),
                name: ["a", "b"][n].into(),
                id: Uuid::from_u128(n as u128 + 1),
                journals: dirs[n].path().into(),
                writer: "test".into(),
                max_incoming: 4,
                faults: planted.clone(),
                timeouts: Timeouts {
                    reconnect: Duration::from_millis(10),
                    silence: Duration::from_secs(1),
                    ..Timeouts::default()
                },
            }
        });
        let lab = Lab { world, xen, toolstacks, hosts, wire, planted, _dirs: dirs };
        lab.xen[0].boot_guest(DOM, GUEST, PROGRAM);
        lab.toolstacks[0].add(DOM, "web1");
        for _ in 0..20 {
            lab.xen[0].let_run(DOM);
        }
        lab.start_destination();
        lab
    }

    /// A daemon on the second host; it goes on with what its journals tell.
    fn start_destination(&self) {
        let daemon = Destinations::new(self.hosts[1].clone());
        for path in journals(&self.hosts[1], Role::Destination) {
            if let Some(journal) = Journal::open(&path).unwrap() {
                daemon.recover(journal).unwrap();
            }
        }
        *self.wire.0.lock().unwrap() = Some(daemon);
    }

    /// A daemon on the first host, after the one before crashed.
    fn restart_source(&self) -> Option<Handle> {
        let mut found = None;
        for path in journals(&self.hosts[0], Role::Source) {
            if let Some(journal) = Journal::open(&path).unwrap() {
                found = source::recover(&self.hosts[0], journal).unwrap().or(found);
            }
        }
        found
    }

    fn request(&self) -> Request {
        let limits =
            Limits { downtime: Duration::from_secs(5), after: Some(Duration::from_millis(50)), ..Limits::default() };
        Request { domid: DOM, peer: "b".into(), limits, record: None }
    }

    fn migrate(&self) -> Report {
        report(&source::start(&self.hosts[0], self.request()).unwrap())
    }

    fn runs_on(&self) -> Vec<String> {
        self.world.hosts_of(GUEST)
    }

    /// Exactly one host runs the guest, its memory is whole, and nothing is left on the other.
    fn settled_on(&self, n: usize) {
        self.settled_on_but_for(n, &[]);
    }

    /// The same, with pages that hold something else.
    fn settled_on_but_for(&self, n: usize, other: &[Gfn]) {
        let names = ["a", "b"];
        wait("the guest to run", || self.runs_on() == [names[n]]);
        assert!(self.world.doubled().is_empty(), "ran twice");
        self.xen[n].adopt(DOM, PROGRAM);
        for _ in 0..5 {
            self.xen[n].let_run(DOM);
        }
        let (ticks, memory) = self.xen[n].guest_memory(DOM).unwrap();
        assert!(ticks >= 1000 + 250, "{ticks}");
        let expected = expected_memory(&PROGRAM, ticks);
        let zeroes = vec![0; 4096];
        for gfn in (0..PROGRAM.pages).map(Gfn) {
            let page = memory.get(&gfn).unwrap_or_else(|| panic!("page {gfn} is missing"));
            let expected = expected.get(&gfn).unwrap_or(&zeroes);
            assert!(gfn.0 < FIRST || other.contains(&gfn) || page == expected, "{gfn} differs after {ticks} ticks");
        }
        for gfn in [8u8, 9, 10] {
            assert_eq!(memory[&Gfn(gfn.into())][..64], [gfn; 64], "what Xen wrote into page {gfn}");
        }
        let other = 1 - n;
        wait("the other copy to go", || self.xen[other].domain_info(DOM).is_err());
        wait("the other's nodes to go", || self.toolstacks[other].guest(DOM).is_none());
        let guest = self.toolstacks[n].guest(DOM).unwrap();
        assert!(guest.attached && !guest.frozen, "{guest:?}");
        assert_eq!(guest.nodes["name"], b"web1");
        assert!(self.xen[n].gt_state(DOM).unwrap().watchdogs.len() == 1, "the watchdog is armed");
        for host in &self.hosts {
            wait("the journals to go", || std::fs::read_dir(&host.journals).unwrap().next().is_none());
        }
    }
}

fn journals(host: &Host, role: Role) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(&host.journals).unwrap();
    entries.map(|e| e.unwrap().path()).filter(|p| role_of(p) == Some(role)).collect()
}

fn wait(what: &str, done: impl Fn() -> bool) {
    let since = Instant::now();
    while !done() {
        assert!(since.elapsed() < PATIENCE, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn report(handle: &Handle) -> Report {
    wait("the report", || handle.report().is_some());
    handle.report().unwrap()
}

#[test]
fn a_guest_moves_whole() {
    moves_whole(&Lab::new());
}

/// Xen does not say at what rate its TSC runs.
#[test]
fn a_guest_whose_tsc_is_never_emulated_moves_whole() {
    let lab = Lab::new();
    lab.xen[0].make_tsc_native(DOM);
    moves_whole(&lab);
    let lab = Lab::new();
    lab.xen[0].make_tsc_native(DOM);
    lab.xen[1].set_tsc_khz(2_010_000);
    let error = lab.migrate().error.unwrap();
    assert!(error.contains("2000 MHz on a and 2010 MHz here"), "{error}");
    lab.xen[1].set_tsc_khz(2_000_500);
    assert!(lab.migrate().moved, "two hosts of a kind");
}

fn moves_whole(lab: &Lab) {
    let before = lab.xen[0].gt_state(DOM).unwrap();
    let asked = Instant::now();
    let report = lab.migrate();
    assert!(report.moved, "{:?}", report.error);
    assert_eq!(report.ending, Ending::Moved);
    lab.settled_on(1);
    let after = lab.xen[1].gt_state(DOM).unwrap();
    let passed = asked.elapsed().as_nanos() as i64;

    // T7: its clock goes on as if nothing had happened, though this host is a day younger.
    let clock = after.guest_now_ns() - before.guest_now_ns();
    assert!((0..passed + 1_000_000_000).contains(&clock), "its clock went by {clock} ns in about {passed} ns");
    assert_eq!(after.vcpus[0].singleshot_ns, before.vcpus[0].singleshot_ns);
    assert_eq!(after.wall_clock, before.wall_clock);
    let (was, is) = (before.vcpus[0].tsc, after.vcpus[0].tsc);
    assert_eq!(is.ticks - was.ticks, 2 * (is.at_ns - was.at_ns) as u64, "the TSC went on with the clock");
    let grants = lab.xen[1].grants(DOM).unwrap();
    // T4, T5, T6.
    let numbers = |gt: &hypervisor::GtState| gt.ports.iter().map(|p| (p.port, p.vcpu, p.priority)).collect::<Vec<_>>();
    assert_eq!(numbers(&after), numbers(&before));
    let within = |gt: &hypervisor::GtState| {
        let leads_here = |kind: &GtPortKind| matches!(kind, GtPortKind::Interdomain { remote, .. } if *remote == DOM);
        gt.ports.iter().filter(|p| leads_here(&p.kind)).map(|p| (p.port, p.kind)).collect::<Vec<_>>()
    };
    assert_eq!(within(&after), within(&before), "a pair within the guest is connected");
    assert_eq!(within(&after).len(), 2);
    assert_eq!(after.vcpus[1].vcpu_info, before.vcpus[1].vcpu_info);
    assert_eq!(after.vcpus[0].fifo, before.vcpus[0].fifo);
    assert_eq!(after.event_array, before.event_array);
    assert_eq!(grants[..16], [1, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 6, 0, 0, 0], "in-use flags are gone");
    assert_eq!(lab.xen[1].raised(DOM), [1, 2].into());
    assert!(lab.toolstacks[1].guest(DOM).unwrap().announced);
    // The report adds up.
    let sum: u64 = report.steps.iter().map(|s| s.micros).sum();
    assert_eq!(sum, report.blackout_us);
    assert!(report.rounds[0].zero_pages > 800, "{:?}", report.rounds[0]);
}

#[test]
fn there_and_back_again() {
    let lab = Lab::new();
    assert!(lab.migrate().moved);
    lab.settled_on(1);
    // The same wire, the other way round.
    *lab.wire.0.lock().unwrap() = Some(Destinations::new(lab.hosts[0].clone()));
    let report = report(&source::start(&lab.hosts[1], lab.request()).unwrap());
    assert!(report.moved, "{:?}", report.error);
    lab.settled_on(0);
}

#[test]
fn a_recording_holds_what_was_sent() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stream");
    let lab = Lab::new();
    let recording = |lab: &Lab| Request { record: Some(path.clone()), ..lab.request() };
    let report = report(&source::start(&lab.hosts[0], recording(&lab)).unwrap());
    assert!(report.moved, "{:?}", report.error);
    lab.settled_on(1);
    let recorded = std::fs::read(&path).unwrap();
    let written = lab.wire.1[0].lock().unwrap().written.clone();
    let image = of_image(&frames(&written));
    let sent: Vec<u8> = image.iter().flat_map(|(at, length, _)| &written[at + 8..at + 8 + length]).copied().collect();
    assert!(recorded == sent, "{} bytes were recorded, {} were sent", recorded.len(), sent.len());
    assert_eq!(recorded.len() as u64, report.bytes);

    // What it holds is not written over, and a migration that was to do so touches nothing.
    let lab = Lab::new();
    let error = source::start(&lab.hosts[0], recording(&lab)).unwrap_err();
    assert!(error.to_string().contains("remove it"), "{error}");
    lab.settled_on(0);
    assert!(std::fs::read(&path).unwrap() == recorded);
}

/// The next attempt would be refused for its sake.
#[test]
fn a_recording_of_nothing_is_taken_away() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stream");
    let lab = Lab::with(|t| t.lacks = vec!["there is no bridge xenbr0".into()]);
    for _ in 0..2 {
        let request = Request { record: Some(path.clone()), ..lab.request() };
        assert_eq!(report(&source::start(&lab.hosts[0], request).unwrap()).ending, Ending::Refused);
        assert!(!path.exists());
    }
}

#[test]
fn what_does_not_fit_is_refused_untouched() {
    type Change = fn(&Lab);
    let cases: [(&str, Change); 11] = [
        ("Xen is 4.18.1 here and 4.17.5 on a, and the guest can see that; install the same version on both", |lab| {
            lab.xen[1].set_version(18, ".1")
        }),
        ("Xen is 4.17.5 here and 4.18.1 on a, and the guest can see that", |lab| lab.xen[0].set_version(18, ".1")),
        ("the hypervisor extension has version 2 here and 1 on a; load the same on both", |lab| {
            lab.xen[1].set_extension_abi(2)
        }),
        ("the hypervisor extension has version 1 here and 2 on a; load the same on both", |lab| {
            lab.xen[0].set_extension_abi(2)
        }),
        ("lacks what the guest was started with: bit 0 of ECX of CPUID leaf 0x1, pclmulqdq", |lab| {
            lab.xen[1].set_features(0, 0)
        }),
        ("domid 41 is taken", |lab| lab.xen[1].boot_guest(DOM, Uuid::from_u128(9), PROGRAM)),
        ("free memory", |lab| lab.xen[1].set_free_pages(100)),
        ("extension is not loaded on b", |lab| lab.xen[1].set_extension(false)),
        ("no bridge xenbr0", |_| {}),
        ("vif 0: its backend is in domain 3 on a, and would be in domain 0 here", |lab| {
            lab.toolstacks[0].serve_from(3)
        }),
        ("already", |lab| lab.hosts_full()),
    ];
    for (text, change) in cases {
        let lab = Lab::with(|t| {
            if text.starts_with("no bridge") {
                t.lacks = vec!["there is no bridge xenbr0".into()];
            }
        });
        change(&lab);
        let report = lab.migrate();
        assert!(!report.moved);
        assert_eq!(report.ending, Ending::Refused, "{report:?}");
        let error = report.error.unwrap();
        assert!(error.contains(text), "{text:?} is not in {error:?}");
        assert_eq!(report.steps, [], "it was never paused");
        assert_eq!(lab.runs_on(), ["a"]);
        if text.starts_with("domid") {
            assert_eq!(lab.world.hosts_of(Uuid::from_u128(9)), ["b"], "the other guest was left alone");
        } else {
            assert!(lab.xen[1].domain_info(DOM).is_err());
        }
    }
}

impl Lab {
    fn hosts_full(&self) {
        let host = Host { max_incoming: 0, ..self.hosts[1].clone() };
        *self.wire.0.lock().unwrap() = Some(Destinations::new(host));
    }
}

#[test]
fn nobody_there_leaves_no_trace() {
    let lab = Lab::new();
    *lab.wire.0.lock().unwrap() = None;
    let report = lab.migrate();
    assert_eq!(report.ending, Ending::Failed);
    assert!(report.error.unwrap().contains("connect to b"));
    lab.settled_on(0);
}

#[test]
fn limits_are_kept() {
    let lab = Lab::new();
    let mut request = lab.request();
    request.limits =
        Limits { downtime: Duration::from_millis(10), fixed: Duration::from_millis(20), ..Limits::default() };
    let report = report(&source::start(&lab.hosts[0], request).unwrap());
    assert_eq!(report.ending, Ending::GivenUp, "{report:?}");
    lab.settled_on(0);
}

/// Every point of the handshake with every fault: whatever happens, once the daemons are started again exactly one host runs the guest,
/// whole, and nothing is left over on the other. What is not in the list of points that a good move passes is not tested, so the test
/// counts them.
#[test]
fn any_fault_at_any_point_resolves() {
    let lab = Lab::new();
    assert!(lab.migrate().moved);
    lab.settled_on(1);
    let mut points = lab.planted.1.lock().unwrap().clone();
    points.sort();
    points.dedup();
    assert!(points.len() >= 48, "only {} points: {points:#?}", points.len());
    for point in &points {
        for fault in [Fault::Cut, Fault::Fail, Fault::Crash, Fault::Panic] {
            // What is done after the act has no way to fail.
            if fault == Fault::Fail && point.contains(".after.") {
                continue;
            }
            one_fault(point, fault);
        }
    }
}

/// A fault of our own in the worst places: the guest does not wait for somebody to start the daemon again.
#[test]
fn a_panic_does_not_leave_the_guest_paused() {
    for (point, n) in [
        ("source.before.send-offer", 0),
        ("source.before.precopy", 0),
        ("source.before.freeze", 0),
        ("source.after.freeze", 0),
        ("source.after.send-final", 0),
        ("source.after.journal-go", 1),
        ("source.before.destroy", 1),
        ("destination.before.prepare", 0),
        ("destination.before.restore", 0),
        ("destination.after.journal-ready", 0),
        ("destination.after.journal-accepted", 1),
        ("destination.before.start", 1),
    ] {
        let lab = Lab::new();
        *lab.planted.0.lock().unwrap() = Some((point.into(), Fault::Panic));
        let report = lab.migrate();
        assert_eq!(report.moved, n == 1, "{point}: {report:?}");
        lab.settled_on(n);
        if !report.moved && point.starts_with("source.") {
            assert!(report.error.unwrap().contains(&format!("panic: planted at {point}")), "{point}");
        }
    }
}

fn one_fault(point: &str, fault: Fault) {
    let lab = Lab::new();
    *lab.planted.0.lock().unwrap() = Some((point.into(), fault));
    source::start(&lab.hosts[0], lab.request()).unwrap();
    let fired = || lab.planted.0.lock().unwrap().is_none();
    wait(&format!("{point} to be reached"), fired);
    if fault == Fault::Crash {
        // The thread is gone; what it held of connections too.
        std::thread::sleep(Duration::from_millis(20));
        if point.starts_with("source.") {
            lab.restart_source();
        } else {
            lab.start_destination();
        }
    }
    let what = format!("{point} {fault:?}");
    wait(&format!("{what}: one copy to run"), || lab.runs_on().len() == 1 && idle(&lab));
    let n = if lab.runs_on() == ["a"] { 0 } else { 1 };
    println!("{what}: on {}", ["a", "b"][n]);
    if let Some(side) = guest_is_on(&Plant { point: point.into(), fault }) {
        assert_eq!(n, usize::from(side == Side::Destination), "{what}");
    }
    lab.settled_on(n);
}

/// Both sides have nothing left to do.
fn idle(lab: &Lab) -> bool {
    lab.hosts.iter().all(|host| std::fs::read_dir(&host.journals).unwrap().next().is_none())
}

/// Offset, length of the payload and kind of every frame in what one side has written, but for pings, which come at any time.
fn frames(written: &[u8]) -> Vec<(usize, usize, u8)> {
    let mut frames = Vec::new();
    let mut at = 8;
    while at + 12 <= written.len() {
        let length = u32::from_le_bytes(written[at..at + 4].try_into().unwrap()) as usize;
        if written[at + 4] < 4 {
            frames.push((at, length, written[at + 4]));
        }
        at += length + 12;
    }
    assert_eq!(at, written.len(), "whole frames were written");
    frames
}

/// Those of `frames` that carry the image.
fn of_image(frames: &[(usize, usize, u8)]) -> Vec<(usize, usize, u8)> {
    frames.iter().filter(|f| f.2 == 3).copied().collect()
}

/// Offsets of every kind of place in what one side has written: within the greeting, and of each word and of the first, a
/// middle and the last piece of the image, in the length, the kind, the padding, the payload's ends and middle, the CRC.
fn places(written: &[u8]) -> Vec<usize> {
    let frames = frames(written);
    let image = of_image(&frames);
    let some = [0, image.len() / 2, image.len().saturating_sub(1)].map(|n| image.get(n).copied());
    let words = frames.into_iter().filter(|f| f.2 != 3);
    let mut places = vec![0, 7];
    // Most of an image is pages.
    places.extend(image.iter().flat_map(|(at, length, _)| (1..8).map(move |n| at + 8 + length * n / 8)).take(40));
    for (at, length, _) in words.chain(some.into_iter().flatten()) {
        let (payload, crc) = (at + 8, at + 8 + length);
        places.extend([at, at + 3, at + 4, at + 7, payload, payload + length / 2, crc - 1, crc]);
    }
    places.sort_unstable();
    places.dedup();
    places
}

/// A byte that is wrong, or a connection that ends, anywhere in what either host sends: exactly one runs the guest, whole.
#[test]
fn any_harm_to_any_part_of_the_connection_resolves() {
    // On a busy machine words are said again, and a harmed move need not come as far.
    let words = |lab: &Lab, side: usize| {
        frames(&lab.wire.1[side].lock().unwrap().written).iter().filter(|(_, _, kind)| *kind != 3).count()
    };
    let clean = (0..10).filter_map(|_| {
        let lab = Lab::new();
        assert!(lab.migrate().moved);
        lab.settled_on(1);
        // Offer, Final, Go, Moved; Accept, Ready, Running, Bye.
        [0, 1].iter().all(|side| words(&lab, *side) == 4).then_some(lab)
    });
    // How many pages are sent again is a matter of time. What the shortest has, the others have.
    let length = |lab: &Lab| lab.wire.1[0].lock().unwrap().written.len();
    let clean = clean.take(3).min_by_key(length).expect("a move in which nothing is said twice");
    let mut tried = 0;
    for side in [0, 1] {
        let written = clean.wire.1[side].lock().unwrap().written.clone();
        let mut places = places(&written);
        if side == 0 {
            // In the middle of a page that is sent once.
            let page = still_page(PROGRAM.still_gfns().last().unwrap());
            let once: Vec<usize> = (0..written.len()).filter(|at| written[*at..].starts_with(&page)).collect();
            assert_eq!(once.len(), 1, "{once:?}");
            places.push(once[0] + 2048);
        }
        for at in places {
            for harm in [Harm::Flip, Harm::Cut] {
                let what = format!("{harm:?} of byte {at} of {} from {}", written.len(), ["a", "b"][side]);
                // Still it may be shorter now, and the digits of a time make words longer: the very end is not always reached.
                let attempts = if at + 16 > written.len() { 1 } else { 5 };
                let reached = (0..attempts).any(|_| {
                    let lab = Lab::new();
                    lab.wire.1[side].lock().unwrap().harm = Some((at, harm));
                    let handle = source::start(&lab.hosts[0], lab.request()).unwrap();
                    wait(&format!("{what}: one copy to run"), || {
                        handle.is_over() && lab.runs_on().len() == 1 && idle(&lab)
                    });
                    let n = if lab.runs_on() == ["a"] { 0 } else { 1 };
                    println!("{what}: on {}", ["a", "b"][n]);
                    lab.settled_on(n);
                    let wire = lab.wire.1[side].lock().unwrap();
                    wire.harm.is_none()
                });
                assert!(reached || attempts == 1, "{what} was not come to");
                tried += 1;
            }
        }
    }
    assert!(tried > 150, "only {tried} places");
}

/// A host that crashed with a record of a migration and was started again may have given the guest's number to another guest, whose
/// devices and nodes are not to be touched.
#[test]
fn another_guest_under_the_same_number_is_left_alone() {
    let other = Uuid::from_u128(9);
    // Where the daemon crashes, which host is restarted with it, and who runs the guest in the end.
    let cases: [(&str, usize, &[&str]); 3] = [
        ("destination.after.prepare", 1, &["a"]),
        ("destination.after.journal-accepted", 1, &["a"]),
        // This one has heard that the destination runs it.
        ("source.before.destroy", 0, &["b"]),
    ];
    for (point, host, runs_on) in cases {
        let lab = Lab::new();
        *lab.planted.0.lock().unwrap() = Some((point.into(), Fault::Crash));
        source::start(&lab.hosts[0], lab.request()).unwrap();
        wait(point, || lab.planted.0.lock().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(20));
        lab.xen[host].destroy(DOM).unwrap();
        lab.xen[host].boot_guest(DOM, other, PROGRAM);
        lab.toolstacks[host].add(DOM, "other");
        if host == 0 {
            lab.restart_source();
        } else {
            lab.start_destination();
        }
        wait(&format!("{point}: both to end"), || idle(&lab));
        assert_eq!(lab.runs_on(), runs_on, "{point}");
        assert_eq!(lab.world.hosts_of(other), [["a", "b"][host]], "{point}");
        let guest = lab.toolstacks[host].guest(DOM).unwrap_or_default();
        assert_eq!((guest.name.as_str(), guest.attached), ("other", true), "{point}");
    }
}

/// A guest that shuts down while its memory is copied stays: its toolstack will start it anew here.
#[test]
fn a_guest_that_shuts_down_meanwhile_stays() {
    let lab = Lab::new();
    let xen = lab.xen[0].clone();
    let hook: Hook = ("source.before.journal-freeze".into(), Box::new(move || xen.shut_down(DOM, 1)));
    *lab.planted.2.lock().unwrap() = Some(hook);
    let report = lab.migrate();
    assert!(!report.moved);
    assert!(report.error.unwrap().contains("it shut down while its memory was copied (reason 1)"));
    lab.settled_on(0);
}

#[test]
fn a_paused_guest_is_refused() {
    let lab = Lab::new();
    lab.xen[0].pause(DOM).unwrap();
    let error = source::start(&lab.hosts[0], lab.request()).unwrap_err().to_string();
    assert!(error.contains("it is paused; `xl unpause` it"), "{error}");
}

/// Xen takes features out of a policy and says nothing.
#[test]
fn features_that_xen_takes_out_end_the_migration() {
    let lab = Lab::new();
    lab.xen[1].set_features(u32::MAX, !2);
    let report = lab.migrate();
    assert!(!report.moved);
    let error = report.error.unwrap();
    assert!(error.contains("it lacks pclmulqdq"), "{error}");
    lab.settled_on(0);
}

#[test]
fn what_cannot_be_carried_is_refused_by_name() {
    type Change = fn(&mut hypervisor::GtState, &mut std::collections::BTreeMap<Gfn, hypervisor::XenPage>);
    let cases: [(&str, Change); 4] = [
        ("nested virtualisation", |gt, _| gt.create_flags |= 1 << 6),
        ("passed-through devices", |gt, _| gt.create_flags |= 1 << 5),
        ("vCPU 1 was taken down", |gt, _| (gt.vcpus[1].initialised, gt.vcpus[1].down) = (true, true)),
        ("far above its memory", |_, placed| {
            placed.insert(Gfn(1 << 36), hypervisor::XenPage::GrantFrame(7));
        }),
    ];
    for (text, change) in cases {
        let lab = Lab::new();
        lab.xen[0].change(DOM, change);
        let error = source::start(&lab.hosts[0], lab.request()).unwrap_err().to_string();
        assert!(error.contains(text), "{text:?} is not in {error:?}");
    }
}

/// What a peer asks for is judged before anything is made: sums do not overflow, and no domain with rights comes out of an offer.
#[test]
fn offers_that_no_guest_has_are_refused() {
    let lab = Lab::new();
    let (offer, _, _) = source::judge(&lab.hosts[0], DOM, &Limits::default()).unwrap();
    let mut huge = offer.clone();
    huge.shell.total_pages = u64::MAX;
    huge.shell.ram = vec![(0, 1 << 63), (0, 1 << 63)];
    let mut service = offer.clone();
    service.shell.config.flags |= 1 << 4;
    for (offer, text) in [(huge, "of free memory, the guest needs"), (service, "asks for a domain with flags 0x13")] {
        let (sender, mut receiver) = lab.wire.connect("b").unwrap().greet().unwrap();
        let details = serde_json::to_value(offer).unwrap();
        sender.send(&Frame::ToDestination(Said { id: Uuid::new_v4(), word: ToDestination::Offer, details })).unwrap();
        let Some(Frame::ToSource(answer)) = receiver.receive().unwrap() else { panic!("another answer") };
        assert_eq!(answer.word, ToSource::Refuse);
        assert!(answer.details.to_string().contains(text), "{text}: {answer:?}");
        assert!(lab.xen[1].domain_info(DOM).is_err());
    }
}

#[test]
fn a_guest_that_somebody_pauses_meanwhile_stays_paused() {
    // Seen by the freeze, or the freeze is not come to: either way nothing of it is undone.
    for (fault, wanted) in [(None, "somebody has paused it"), (Some(Fault::Fail), "planted fault")] {
        let lab = Lab::new();
        let xen = lab.xen[0].clone();
        let hook: Hook = ("source.before.freeze".into(), Box::new(move || xen.pause(DOM).unwrap()));
        *lab.planted.2.lock().unwrap() = Some(hook);
        *lab.planted.0.lock().unwrap() = fault.map(|fault| ("source.before.freeze".into(), fault));
        let error = lab.migrate().error.unwrap();
        assert!(error.contains(wanted), "{error}");
        assert!(lab.xen[0].domain_info(DOM).unwrap().paused, "{error}");
        lab.xen[0].unpause(DOM).unwrap();
        lab.settled_on(0);
    }
}

/// S1: an operator who unpauses a copy that waits, and again because nothing happens.
#[test]
fn unpausing_a_waiting_copy_does_not_let_it_run() {
    let lab = Lab::new();
    let both = lab.xen.clone();
    let hook: Hook = (
        "destination.before.connect".into(),
        Box::new(move || {
            for xen in both {
                (0..3).for_each(|_| drop(xen.unpause(DOM)));
            }
        }),
    );
    *lab.planted.2.lock().unwrap() = Some(hook);
    assert!(lab.migrate().moved);
    lab.settled_on(1);
}

/// What a guest writes into pages that it has just got back is not marked.
#[test]
fn a_guest_whose_balloon_works_moves_whole() {
    let lab = Lab::new();
    let pages: Vec<Gfn> = (400..410).map(Gfn).collect();
    lab.xen[0].balloon(DOM, &pages);
    let report = lab.migrate();
    assert!(report.moved, "{report:?}");
    lab.settled_on_but_for(1, &pages);
    let (_, memory) = lab.xen[1].guest_memory(DOM).unwrap();
    for gfn in pages {
        assert!(memory[&gfn] == [0x77; 4096], "{gfn}");
    }
}

#[test]
fn a_page_that_cannot_be_read_is_not_taken_for_given_up() {
    let lab = Lab::new();
    lab.xen[0].make_unreadable(DOM, Gfn(500));
    let report = lab.migrate();
    assert!(report.error.unwrap().contains("its page 0x1f4 is there, but can't be read"));
    lab.settled_on(0);
}

/// To look at a page that is populated on demand makes it: the guest is refused before anybody looks.
#[test]
fn memory_that_is_populated_on_demand_is_refused_and_left_alone() {
    let lab = Lab::new();
    let pages: Vec<Gfn> = (512..1024).map(Gfn).collect();
    lab.xen[0].populate_on_demand_at(DOM, &pages);
    let error = source::start(&lab.hosts[0], lab.request()).unwrap_err().to_string();
    assert!(error.contains("2 MiB of its memory have no pages yet"), "{error}");
    assert!(error.contains("maxmem"), "it says what to do: {error}");
    assert_eq!(lab.xen[0].populate_on_demand(DOM).unwrap().entries, 512, "none was populated by the look");
    // The guest has touched the last of them.
    lab.xen[0].page_types(DOM, &pages).unwrap();
    assert!(lab.migrate().moved);
    lab.settled_on(1);
}

/// Stock tools' hands in the log of its writes: looked at (`xl migrate`, a round of it), begun anew (its start), ended (its end, and that of
/// `xl save`). Pages are lost from the copy, and Xen reports nothing.
#[test]
fn a_move_ends_when_others_use_the_log_of_its_writes() {
    type Meddle = fn(&SimXen);
    let meddle: [(&str, Meddle); 3] = [
        ("looked at", |xen| {
            xen.let_run(DOM);
            xen.log_dirty_clean(DOM, &mut hypervisor::DirtyBitmap::new(1 << 18), false).map(drop).unwrap();
        }),
        ("begun anew", |xen| {
            xen.let_run(DOM);
            xen.log_dirty_disable(DOM).unwrap();
            xen.log_dirty_enable(DOM).unwrap();
            xen.log_dirty_mark(DOM, &[Gfn(500)]).unwrap();
        }),
        ("ended", |xen| {
            xen.log_dirty_disable(DOM).unwrap();
            xen.let_run(DOM);
        }),
    ];
    for (what, meddle) in meddle {
        let lab = Lab::new();
        let xen = lab.xen[0].clone();
        // Between the last look of the copying and the pause.
        let hook: Hook = ("source.before.freeze".into(), Box::new(move || meddle(&xen)));
        *lab.planted.2.lock().unwrap() = Some(hook);
        let report = lab.migrate();
        assert!(!report.moved, "{what}");
        let error = report.error.unwrap();
        assert!(error.contains("the copy is not whole; is it being saved or migrated by xl?"), "{what}: {error}");
        let (marked, on) = log_of(&lab.xen[0]);
        assert_eq!(on, what != "ended", "{what}: the others' log is left as it is");
        assert_eq!(marked, usize::from(what == "begun anew"), "{what}: and what is in it");
        lab.settled_on(0);
    }
}

/// How many of the pages that the others mark (500 and 501) are in the log, and whether it is on. The guest writes on meanwhile.
fn log_of(xen: &SimXen) -> (usize, bool) {
    let mut bitmap = hypervisor::DirtyBitmap::new(1 << 18);
    xen.log_dirty_peek(DOM, &mut bitmap).unwrap();
    let on = xen.log_dirty_enable(DOM).is_err();
    (bitmap.iter().filter(|gfn| (500..=501).contains(&gfn.0)).count(), on)
}

/// Begun by others who are at work, at any time before Ferry's: it is theirs, with what is in it.
#[test]
fn a_log_that_others_have_begun_is_left_alone() {
    for point in ["source.before.send-offer", "source.before.precopy"] {
        let lab = Lab::new();
        let (xen, tools) = (lab.xen[0].clone(), lab.toolstacks[0].clone());
        let begin = move || {
            tools.save(true);
            xen.log_dirty_enable(DOM).unwrap();
            xen.log_dirty_mark(DOM, &[Gfn(500), Gfn(501)]).unwrap();
        };
        *lab.planted.2.lock().unwrap() = Some((point.into(), Box::new(begin)));
        let error = lab.migrate().error.unwrap();
        assert!(error.contains("it is being saved by stock tools"), "{point}: {error}");
        assert_eq!(log_of(&lab.xen[0]), (2, true), "{point}");
        lab.settled_on(0);
    }
    // A move that never came to the copying has nothing to end either.
    let lab = Lab::with(|t| t.lacks = vec!["there is no bridge xenbr0".into()]);
    lab.xen[0].log_dirty_enable(DOM).unwrap();
    assert_eq!(lab.migrate().ending, Ending::Refused);
    assert!(log_of(&lab.xen[0]).1);
}

/// Stock tools that were killed leave it on.
#[test]
fn a_log_that_nobody_reads_is_taken_over() {
    let lab = Lab::new();
    lab.xen[0].log_dirty_enable(DOM).unwrap();
    lab.xen[0].log_dirty_mark(DOM, &[Gfn(500)]).unwrap();
    assert!(lab.migrate().moved);
    lab.settled_on(1);
}

/// Stock tools that come between the preflight and the beginning end Ferry's log when they begin their own; a look of Ferry's would take
/// pages from them.
#[test]
fn stock_tools_that_come_before_the_first_look_are_left_alone() {
    let lab = Lab::new();
    let tools = lab.toolstacks[0].clone();
    *lab.planted.2.lock().unwrap() = Some(("source.before.precopy".into(), Box::new(move || tools.save(true))));
    let error = lab.migrate().error.unwrap();
    assert!(error.contains("it is being saved by stock tools"), "{error}");
    assert!(log_of(&lab.xen[0]).1, "what is on is theirs");
    lab.settled_on(0);
}

#[test]
fn a_log_that_a_daemon_has_left_on_is_ended_by_the_next() {
    for others in [false, true] {
        let lab = Lab::new();
        *lab.planted.0.lock().unwrap() = Some(("source.after.precopy".into(), Fault::Crash));
        source::start(&lab.hosts[0], lab.request()).unwrap();
        wait("the crash", || lab.planted.0.lock().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(20));
        lab.xen[0].log_dirty_mark(DOM, &[Gfn(500)]).unwrap();
        // They have begun while there was no daemon.
        lab.toolstacks[0].save(others);
        report(&lab.restart_source().unwrap());
        lab.settled_on(0);
        assert_eq!(log_of(&lab.xen[0]).1, others);
        lab.toolstacks[0].save(false);
        if !others {
            lab.xen[0].log_dirty_disable(DOM).unwrap();
            assert!(lab.migrate().moved);
        }
    }
}

#[test]
fn a_dry_run_watches_and_leaves_nothing() {
    let lab = Lab::new();
    let (offer, _, _) = source::judge(&lab.hosts[0], DOM, &lab.request().limits).unwrap();
    let rate = || source::dirty_rate(&lab.hosts[0], "b".into(), offer.clone(), Duration::from_millis(20));
    assert!(rate().unwrap() > 0);
    assert!(idle(&lab));
    // Off, until that of others is on.
    assert_eq!(log_of(&lab.xen[0]), (0, false));
    lab.toolstacks[0].save(true);
    assert!(rate().unwrap_err().to_string().contains("it is being saved by stock tools"));
    assert!(idle(&lab) && log_of(&lab.xen[0]).1);
    lab.settled_on(0);
}

#[test]
fn a_topology_of_its_own_is_refused() {
    let lab = Lab::new();
    lab.xen[0].set_vnuma(DOM);
    let error = source::start(&lab.hosts[0], lab.request()).unwrap_err().to_string();
    assert!(error.contains("it has a NUMA topology of its own (vnuma)"), "{error}");
}

/// A guest in the pool "db" (number 3 on the first host), with a share of its own, pinned.
fn pinned() -> Lab {
    let lab = Lab::new();
    lab.xen[0].set_pool(CpuPool { id: 3, scheduler: SCHEDULER_CREDIT2, cpus: (4..8).collect() });
    lab.toolstacks[0].name_pool(3, "db");
    lab.xen[0].move_to_pool(DOM, 3);
    lab.xen[0].set_share(DOM, &Share { scheduler: SCHEDULER_CREDIT2, weight: 700, cap: 40 }).unwrap();
    lab.xen[0].set_affinity(DOM, 1, &pinned_to([4, 5])).unwrap();
    lab
}

fn pinned_to(cpus: impl IntoIterator<Item = u32>) -> Affinity {
    Affinity { hard: Some(cpus.into_iter().collect()), soft: None }
}

#[test]
fn pool_share_and_affinity_go_along_where_they_fit() {
    let lab = pinned();
    lab.xen[1].set_pool(CpuPool { id: 1, scheduler: SCHEDULER_CREDIT, cpus: (4..8).collect() });
    lab.toolstacks[1].name_pool(1, "db");
    let report = lab.migrate();
    assert!(report.moved, "{report:?}");
    assert_eq!(report.warnings, Vec::<String>::new());
    let there = &lab.xen[1];
    assert_eq!(there.domain_info(DOM).unwrap().cpupool, 1, "the same name has another number");
    let share = Share { scheduler: SCHEDULER_CREDIT, weight: 700, cap: 40 };
    assert_eq!(there.share(DOM, SCHEDULER_CREDIT).unwrap(), share);
    assert_eq!(there.affinity(DOM, 1).unwrap(), pinned_to([4, 5]));
    assert_eq!(there.affinity(DOM, 0).unwrap(), Affinity::default());
    lab.settled_on(1);
}

#[test]
fn what_of_pool_share_and_affinity_does_not_fit_is_said_and_stops_nothing() {
    let lab = pinned();
    lab.xen[1].set_version(17, ".4");
    let (offer, _, why) = source::judge(&lab.hosts[0], DOM, &Limits::default()).unwrap();
    let answer = source::ask(&lab.hosts[0], "b", &offer).unwrap();
    assert_eq!((why, answer.why), (vec![], vec![]));
    assert!(lab.xen[1].domain_info(DOM).is_err(), "a dry run makes nothing");
    let report = lab.migrate();
    assert!(report.moved, "{report:?}");
    assert_eq!(report.warnings, answer.warnings);
    assert_eq!(
        report.warnings,
        [
            "Xen is 4.17.4 here and 4.17.5 on a, another build; the guest can ask for it",
            "the CPU pool db is not on b: it goes into Pool-0",
            "vCPUs 1 had hard affinity to CPUs 4-5, of which its pool on b has none of them: any CPU",
        ]
    );
    let there = &lab.xen[1];
    assert_eq!(there.domain_info(DOM).unwrap().cpupool, 0);
    assert_eq!(there.share(DOM, SCHEDULER_CREDIT2).unwrap().weight, 700);
    assert_eq!(there.affinity(DOM, 1).unwrap(), Affinity::default());
    lab.settled_on(1);
}

/// What an operator does with stock tools while the other host restores the guest: the commit does not follow.
#[test]
fn what_others_do_to_a_frozen_guest_is_seen_before_the_commit() {
    type Meddle = fn(&SimXen);
    let cases: [(&str, Meddle, Left); 3] = [
        ("it has been destroyed while it was being moved", |xen| xen.destroy(DOM).unwrap(), Left::Gone),
        ("somebody has unpaused it", |xen| while xen.unpause(DOM).is_ok() {}, Left::Runs),
        ("its memory limit was changed", |xen| xen.set_max_mem(DOM, 9000).unwrap(), Left::Runs),
    ];
    for (text, meddle, left) in cases {
        let lab = Lab::new();
        let xen = lab.xen[0].clone();
        let hook: Hook = ("source.after.send-final".into(), Box::new(move || meddle(&xen)));
        *lab.planted.2.lock().unwrap() = Some(hook);
        let report = lab.migrate();
        assert!(!report.moved, "{text}");
        let error = report.error.unwrap();
        assert!(error.contains(text), "{text:?} is not in {error:?}");
        assert_eq!(report.left, left);
        if left == Left::Runs {
            lab.settled_on(0);
        } else {
            wait("both to end", || idle(&lab));
            assert_eq!(lab.runs_on(), [""; 0]);
            assert!(lab.xen[1].domain_info(DOM).is_err(), "what was destroyed does not come back elsewhere");
        }
    }
}

#[test]
fn a_guest_whose_memory_limit_changes_meanwhile_stays() {
    let lab = Lab::new();
    let xen = lab.xen[0].clone();
    let hook: Hook = ("source.before.freeze".into(), Box::new(move || xen.set_max_mem(DOM, 9000).unwrap()));
    *lab.planted.2.lock().unwrap() = Some(hook);
    let report = lab.migrate();
    assert!(report.error.unwrap().contains("its memory limit was changed while its memory was copied"));
    let frozen = report.steps.iter().any(|step| step.name == "freeze the store and console");
    assert!(!frozen, "it is seen at the pause, not only before the commit: {:?}", report.steps);
    lab.settled_on(0);
}

/// Whatever keeps the other host from restoring, the guest is not held for longer than the operator's limit and a little.
#[test]
fn a_destination_that_takes_too_long_does_not_hold_the_guest() {
    let lab = Lab::new();
    let hook: Hook = ("destination.before.restore".into(), Box::new(|| std::thread::sleep(Duration::from_secs(3))));
    *lab.planted.2.lock().unwrap() = Some(hook);
    let limits = Limits { downtime: Duration::from_millis(300), after: Some(Duration::ZERO), ..Limits::default() };
    let report = report(&source::start(&lab.hosts[0], Request { limits, ..lab.request() }).unwrap());
    assert!(!report.moved);
    let error = report.error.unwrap();
    assert!(error.contains("b had not restored the guest 30") && error.contains("raise --downtime-limit"), "{error}");
    assert_eq!(report.ending, Ending::GivenUp);
    assert!((300_000..2_000_000).contains(&report.blackout_us), "paused for {} us", report.blackout_us);
    lab.settled_on(0);
}

/// The other host was in time for the wait, and what is left to do is too much for the limit: nothing was committed, so the guest goes on here.
#[test]
fn a_blackout_that_would_be_too_long_is_given_up_before_the_commit() {
    let lab = Lab::new();
    let hook: Hook = ("source.after.send-final".into(), Box::new(|| std::thread::sleep(Duration::from_millis(400))));
    *lab.planted.2.lock().unwrap() = Some(hook);
    let limits = Limits { downtime: Duration::from_millis(350), ..Limits::default() };
    let report = report(&source::start(&lab.hosts[0], Request { limits, ..lab.request() }).unwrap());
    assert_eq!(report.ending, Ending::GivenUp);
    let error = report.error.unwrap();
    assert!(error.contains("the guest was away for 4") && error.contains("the limit of 350 ms"), "{error}");
    assert!(report.steps.iter().all(|step| step.name != "write the commit to disk" || step.place != Place::Source));
    lab.settled_on(0);
}

/// A destination that takes everything, and answers `Final` with these; pings after so long.
struct Answers(fn(Uuid) -> Vec<Frame>, Duration);

impl Connector for Answers {
    fn connect(&self, _peer: &str) -> io::Result<Link> {
        let (here, there) = UnixStream::pair()?;
        let Answers(answers, think) = *self;
        std::thread::spawn(move || {
            let (sender, mut receiver) = Link::unix(there).unwrap().greet().unwrap();
            while let Ok(Some(frame)) = receiver.receive() {
                let sent = match frame {
                    Frame::ToDestination(Said { id, word: ToDestination::Offer, .. }) => {
                        vec![said(id, ToSource::Accept)]
                    }
                    Frame::ToDestination(Said { id, word: ToDestination::Final, .. }) => answers(id),
                    Frame::Ping(number) => {
                        std::thread::sleep(think);
                        vec![Frame::Pong(number)]
                    }
                    _ => Vec::new(),
                };
                if sent.iter().any(|frame| sender.send(frame).is_err()) {
                    return;
                }
            }
        });
        Link::unix(here)
    }
}

fn said(id: Uuid, word: ToSource) -> Frame {
    Frame::ToSource(Said { id, word, details: serde_json::Value::Null })
}

fn answered_by(answers: fn(Uuid) -> Vec<Frame>) -> Lab {
    let mut lab = Lab::new();
    lab.hosts[0].timeouts.ready = Duration::from_millis(300);
    lab.hosts[0].connector = Arc::new(Answers(answers, Duration::ZERO));
    lab
}

/// Time passes also while something comes all the time.
#[test]
fn a_destination_that_never_stops_talking_does_not_hold_the_guest() {
    let lab = answered_by(|id| [vec![said(id, ToSource::Accept); 5], vec![said(id, ToSource::Ready)]].concat());
    // The time is over when the first of it is looked at.
    let hook: Hook = ("source.after.send-final".into(), Box::new(|| std::thread::sleep(Duration::from_millis(400))));
    *lab.planted.2.lock().unwrap() = Some(hook);
    let error = lab.migrate().error.unwrap();
    assert!(error.contains("b had not restored the guest"), "{error}");
    assert_eq!(lab.runs_on(), ["a"]);
}

/// A step of the source's own that took long is no silence of the peer's, which is given the time to answer.
#[test]
fn a_peer_is_not_silent_before_it_was_asked() {
    let mut lab = answered_by(|_| Vec::new());
    lab.hosts[0].timeouts.ready = Duration::from_secs(3);
    lab.hosts[0].connector = Arc::new(Answers(|_| Vec::new(), Duration::from_millis(100)));
    let hook: Hook = ("source.after.send-final".into(), Box::new(|| std::thread::sleep(Duration::from_millis(2200))));
    *lab.planted.2.lock().unwrap() = Some(hook);
    let error = lab.migrate().error.unwrap();
    assert!(error.contains("b had not restored the guest 30"), "{error}");
}

/// A guest that stands still is not kept so as long as one that runs would be kept moving.
#[test]
fn a_peer_that_falls_silent_before_it_is_ready_does_not_hold_the_guest() {
    let mut lab = answered_by(|_| {
        std::thread::sleep(PATIENCE);
        Vec::new()
    });
    let timeouts = &mut lab.hosts[0].timeouts;
    timeouts.ready = Duration::from_secs(20);
    timeouts.silence = Duration::from_secs(20);
    timeouts.silence_paused = Duration::from_millis(200);
    let error = lab.migrate().error.unwrap();
    assert!(error.contains("nothing heard for 200ms"), "{error}");
    assert_eq!(lab.runs_on(), ["a"]);
}

/// One for each ping: more would only fill the source's memory.
#[test]
fn a_pong_that_nobody_asked_for_ends_the_connection() {
    let lab = answered_by(|_| vec![Frame::Pong(7)]);
    let error = lab.migrate().error.unwrap();
    assert!(error.contains("the peer said something that a destination does not say"), "{error}");
    assert_eq!(lab.runs_on(), ["a"]);
}

/// A way to the destination that takes everything but `Final`: whoever writes that is stuck until the connection is closed.
struct StuckAtFinal(Arc<Wire>);

impl Connector for StuckAtFinal {
    fn connect(&self, peer: &str) -> io::Result<Link> {
        let link = self.0.connect(peer)?;
        let closed = Arc::new((Mutex::new(false), Condvar::new()));
        let (close, mark) = (link.close.clone(), closed.clone());
        let writer = Box::new(StuckWriter { inner: link.writer, closed });
        let close = Arc::new(move || {
            *mark.0.lock().unwrap() = true;
            mark.1.notify_all();
            close();
        });
        Ok(Link { writer, close, ..link })
    }
}

struct StuckWriter {
    inner: Box<dyn io::Write + Send>,
    closed: Arc<(Mutex<bool>, Condvar)>,
}

impl io::Write for StuckWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let word = b"\"word\":\"Final\"";
        if bytes.windows(word.len()).any(|part| part == word) {
            let closed = self.closed.0.lock().unwrap();
            drop(self.closed.1.wait_while(closed, |closed| !*closed).unwrap());
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[test]
fn a_destination_that_does_not_take_the_last_word_does_not_hold_the_guest() {
    let mut lab = Lab::new();
    lab.hosts[0].timeouts.ready = Duration::from_millis(300);
    lab.hosts[0].connector = Arc::new(StuckAtFinal(lab.wire.clone()));
    let error = lab.migrate().error.unwrap();
    assert!(error.contains("connection: broken pipe"), "{error}");
    lab.settled_on(0);
}

/// A store that hangs: the guest, whose backends nobody has touched yet, does not wait for it.
#[test]
fn a_store_that_hangs_does_not_keep_the_guest_paused() {
    let lab = Lab::new();
    let toolstack = lab.toolstacks[0].clone();
    let hook: Hook = ("source.before.freeze".into(), Box::new(move || toolstack.hang(true)));
    *lab.planted.2.lock().unwrap() = Some(hook);
    let handle = source::start(&lab.hosts[0], lab.request()).unwrap();
    wait("the roll-back to be stuck", || handle.progress().waiting_for.is_some());
    assert_eq!(lab.runs_on(), ["a"]);
    assert!(handle.report().is_none());
    // A roll-back that is tried again and again still answers.
    let asked = Instant::now();
    assert_eq!(handle.cancel(), Ok(()));
    assert_eq!(handle.resolve(true), Err(Denied::NothingToResolve.into()));
    assert!(asked.elapsed() < Duration::from_secs(1));
    // It is somebody's own pause from here on.
    lab.xen[0].pause(DOM).unwrap();
    lab.toolstacks[0].hang(false);
    let report = report(&handle);
    assert!(report.error.unwrap().contains("xenstored did not answer"));
    assert_eq!(report.left, Left::Paused);
    lab.xen[0].unpause(DOM).unwrap();
    lab.settled_on(0);
}

/// A step that hangs: whoever commands is told so, and what he said is not done later behind his back.
#[test]
fn a_command_to_a_migration_that_hangs_is_answered() {
    let lab = Lab::new();
    let (go_on, hangs) = std::sync::mpsc::channel::<()>();
    let hook: Hook = ("source.before.freeze".into(), Box::new(move || hangs.recv().unwrap_or_default()));
    *lab.planted.2.lock().unwrap() = Some(hook);
    let handle = source::start(&lab.hosts[0], lab.request()).unwrap();
    wait("the pause", || handle.state() == Some(SourceState::Freezing));
    let error = handle.cancel().unwrap_err();
    assert!(matches!(&error, NotDone::Busy { state, .. } if state == "freezing"), "{error:?}");
    drop(go_on);
    let report = report(&handle);
    assert!(report.moved, "the command came too late, but {:?}", report.error);
    lab.settled_on(1);
}
