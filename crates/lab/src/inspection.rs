//! Holds what `ferry inspect` tells of a guest against what the guest itself and stock tools say. Text and structures in, differences
//! out; no I/O.

use std::collections::{BTreeMap, BTreeSet};

use hypervisor::inspect::GuestState;
use hypervisor::{GtPort, GtPortKind, GtState};
use witness::report::{self, Snapshot};

/// What a port is, in the terms that all of the sources share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Unbound { remote: u16 },
    Interdomain { remote: u16, port: u32 },
    Pirq(u32),
    Virq(u32),
    Ipi,
}

/// A guest's ports by number: what each is, and the vCPU that is notified.
pub type Ports = BTreeMap<u32, (Kind, u32)>;

/// A running guest's clock and timers move between the looks; a timer may be this late and is never set further ahead.
const TIMER_LATE_NS: i64 = 1_000_000_000;
const TIMER_AHEAD_NS: i64 = 3_600_000_000_000;

/// The ports as the extension tells them. Those that Xen itself consumes are no business of the guest's.
fn told(ports: &[GtPort]) -> Ports {
    let kind = |kind| match kind {
        GtPortKind::Unbound { remote } => Kind::Unbound { remote: remote.0 },
        GtPortKind::Interdomain { remote, remote_port } => Kind::Interdomain { remote: remote.0, port: remote_port },
        GtPortKind::Virq(n) => Kind::Virq(n),
        GtPortKind::Ipi => Kind::Ipi,
        GtPortKind::Pirq(n) => Kind::Pirq(n),
    };
    ports.iter().filter(|p| !p.xen_consumer).map(|p| (p.port, (kind(p.kind), p.vcpu))).collect()
}

/// The ports as the guest sees them (EVTCHNOP_status, xen/include/public/event_channel.h).
fn seen(ports: &[report::Port]) -> Result<Ports, String> {
    let one = |p: &report::Port| {
        let kind = match (p.status, p.remote_dom, p.remote_port, p.irq) {
            (1, Some(remote), _, _) => Kind::Unbound { remote },
            (2, Some(remote), Some(port), _) => Kind::Interdomain { remote, port },
            (3, _, _, Some(n)) => Kind::Pirq(n),
            (4, _, _, Some(n)) => Kind::Virq(n),
            (5, ..) => Kind::Ipi,
            _ => return Err(format!("the witness's port {p:?} makes no sense")),
        };
        Ok((p.port, (kind, p.vcpu)))
    };
    ports.iter().map(one).collect()
}

/// What `lsevtchn DOMID` prints: `   7: VCPU 1: Virtual IRQ 0`. It leaves out Xen's own ports and closed ones.
pub fn lsevtchn(text: &str) -> Result<Ports, String> {
    let mut ports = Ports::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let parsed = || {
            let (port, rest) = line.trim().split_once(": VCPU ")?;
            let (vcpu, what) = rest.split_once(": ")?;
            let after = |prefix: &str| what.strip_prefix(prefix)?.trim().parse::<u32>().ok();
            let kind = if let Some(remote) = after("Interdomain (Waiting connection) - Remote Domain ") {
                Kind::Unbound { remote: u16::try_from(remote).ok()? }
            } else if let Some(connected) = what.strip_prefix("Interdomain (Connected) - Remote Domain ") {
                let (remote, port) = connected.split_once(", Port ")?;
                Kind::Interdomain { remote: remote.parse().ok()?, port: port.trim().parse().ok()? }
            } else if let Some(n) = after("Physical IRQ ") {
                Kind::Pirq(n)
            } else if let Some(n) = after("Virtual IRQ ") {
                Kind::Virq(n)
            } else if what.trim() == "IPI" {
                Kind::Ipi
            } else {
                return None;
            };
            Some((port.trim().parse().ok()?, (kind, vcpu.parse().ok()?)))
        };
        let (port, entry) = parsed().ok_or_else(|| format!("lsevtchn printed {line:?}"))?;
        ports.insert(port, entry);
    }
    Ok(ports)
}

/// The last that `xl debug-keys e` made Xen write of a domain into `xl dmesg`, for example
/// `(XEN)       12 [0/0/  -   ]: s=3 n=0 x=0 d=0 p=31`.
pub fn debug_key(text: &str, domid: u16) -> Result<Ports, String> {
    let head = format!("Event channel information for domain {domid}:");
    let at = text.rfind(&head).ok_or_else(|| format!("Xen's log has no {head:?}"))?;
    let section = text.get(at + head.len()..).unwrap_or_default();
    let mut ports = Ports::new();
    for line in section.lines().skip(1) {
        let line = line.strip_prefix("(XEN)").unwrap_or(line).trim();
        if line.starts_with("Event channel information for domain") {
            break;
        }
        // Two lines of heading come first, and other messages of Xen's may lie between.
        let Some((front, fields)) = line.split_once("]: ") else { continue };
        let Some(port) = front.split_once('[').and_then(|(port, _)| port.trim().parse().ok()) else { continue };
        let field = |name: &str| fields.split_whitespace().find_map(|f| f.strip_prefix(name)?.parse::<u32>().ok());
        let remote = || field("d=").and_then(|d| u16::try_from(d).ok());
        // ECS_* (xen/include/xen/sched.h), the numbers of `xen_abi::ext::port_state`.
        let kind = match field("s=") {
            Some(1) => continue,
            Some(2) => remote().map(|remote| Kind::Unbound { remote }),
            Some(3) => remote().and_then(|remote| Some(Kind::Interdomain { remote, port: field("p=")? })),
            Some(4) => field("p=").map(Kind::Pirq),
            Some(5) => field("v=").map(Kind::Virq),
            Some(6) => Some(Kind::Ipi),
            _ => None,
        };
        let (Some(kind), Some(vcpu), Some(consumer)) = (kind, field("n="), field("x=")) else {
            return Err(format!("Xen's log has {line:?}"));
        };
        if consumer == 0 {
            ports.insert(port, (kind, vcpu));
        }
    }
    Ok(ports)
}

/// The upcall vectors that Xen noted when the guest asked for them: `(XEN) d1v0: upcall vector f3`.
fn vectors(dmesg: &str, domid: u16) -> BTreeMap<u32, u8> {
    let head = format!("d{domid}v");
    let one = |line: &str| {
        let (vcpu, vector) = line.split_once(": upcall vector ")?;
        let vcpu = vcpu.rsplit(' ').next()?.strip_prefix(&head)?;
        Some((vcpu.parse().ok()?, u8::from_str_radix(vector.trim(), 16).ok()?))
    };
    dmesg.lines().filter_map(one).collect()
}

/// Ports with a name: what the guest's frontends wrote into the store, and the parameters it was built with.
fn named(snapshot: &Snapshot, state: &GuestState) -> BTreeMap<String, u32> {
    let mut named = BTreeMap::new();
    for node in snapshot.store.seen().into_iter().flatten() {
        let device = node.path.split_once("/device/").map(|(_, device)| device);
        if let (Some(device), Ok(port)) = (device, node.value.parse())
            && ["event-channel", "event-channel-tx", "event-channel-rx"]
                .contains(&device.rsplit('/').next().unwrap_or(""))
        {
            named.insert(device.to_owned(), port);
        }
    }
    for name in ["STORE_EVTCHN", "CONSOLE_EVTCHN"] {
        if let Some(port) = state.hvm_params.get(name).and_then(|value| u32::try_from(*value).ok()) {
            named.insert(name.to_owned(), port);
        }
    }
    named
}

/// What was asked besides `ferry inspect`.
#[derive(Clone, Copy, Debug)]
pub struct Witnesses<'a> {
    /// The guest's own look, before the inspection ...
    pub before: &'a Snapshot,
    /// ... and after it.
    pub after: &'a Snapshot,
    /// The guest's console since it was made.
    pub console: &'a str,
    /// Output of `lsevtchn DOMID`.
    pub lsevtchn: &'a str,
    /// `xl dmesg`, from before and after `xl debug-keys e`.
    pub dmesg: &'a str,
}

impl Witnesses<'_> {
    /// Whether the guest stood still between its two looks, as far as ports go: only then can they be compared.
    pub fn settled(&self) -> bool {
        self.before.ports == self.after.ports
    }
}

/// Whether any vCPU has a timer armed: a running guest nearly always has.
pub fn has_timer(state: &GuestState) -> bool {
    state.gt.as_ref().is_some_and(armed)
}

fn armed(gt: &GtState) -> bool {
    gt.vcpus.iter().any(|v| v.singleshot_ns.is_some() || v.periodic_period_ns != 0)
}

/// Everything in which the inspection is at odds with the others; empty if they agree.
pub fn disagreements(state: &GuestState, others: &Witnesses<'_>) -> Vec<String> {
    let mut odds = Odds::default();
    let Some(gt) = &state.gt else {
        return vec![state.gt_missing.clone().unwrap_or_else(|| "the state has no GT part".to_owned())];
    };
    let guest = others.after;
    let ours = told(&gt.ports);
    match guest.ports.seen().map(|ports| seen(ports)) {
        Some(Ok(theirs)) => odds.ports("the witness", &ours, &theirs),
        Some(Err(why)) => odds.0.push(why),
        None => odds.0.push(format!("the witness saw no ports: {}", guest.ports.why_absent().unwrap_or_default())),
    }
    for (who, theirs) in
        [("lsevtchn", lsevtchn(others.lsevtchn)), ("debug-keys e", debug_key(others.dmesg, state.domain.domid.0))]
    {
        match theirs {
            Ok(theirs) => odds.ports(who, &ours, &theirs),
            Err(why) => odds.0.push(why),
        }
    }
    let named = named(guest, state);
    for (name, port) in &named {
        if !matches!(ours.get(port), Some((Kind::Interdomain { .. }, _))) {
            odds.0.push(format!("{name} is port {port}, which is {:?}", ours.get(port)));
        }
    }
    for kind in ["vif/", "vbd/", "CONSOLE_EVTCHN", "STORE_EVTCHN"] {
        if !named.keys().any(|name| name.starts_with(kind)) {
            odds.0.push(format!("nothing names a port of {kind}"));
        }
    }
    odds.event_channels(gt, state, others);
    odds.same("domid", Some(&state.domain.domid.0), guest.identity.domid_store.seen());
    odds.grants(state, guest);
    for param in guest.hvm_params.seen().into_iter().flatten() {
        if let Some(name) = xen_abi::hvm_op::param(param.index).map(|p| p.name) {
            odds.same(&format!("HVM parameter {name}"), state.hvm_params.get(name), Some(&param.value));
        }
    }
    odds.times(gt, others);
    odds.0
}

#[derive(Default)]
struct Odds(Vec<String>);

impl Odds {
    fn same<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, ours: Option<&T>, theirs: Option<&T>) {
        if ours.is_none() || ours != theirs {
            self.0.push(format!("{what}: inspect says {ours:?}, the guest {theirs:?}"));
        }
    }

    fn ports(&mut self, who: &str, ours: &Ports, theirs: &Ports) {
        let numbers: BTreeSet<&u32> = ours.keys().chain(theirs.keys()).collect();
        for port in numbers {
            let (a, b) = (ours.get(port), theirs.get(port));
            if a != b {
                self.0.push(format!("port {port}: inspect says {a:?}, {who} {b:?}"));
            }
        }
        if theirs.is_empty() {
            self.0.push(format!("{who} shows no port at all"));
        }
    }

    /// FIFO or 2-level, control blocks and upcall vectors.
    fn event_channels(&mut self, gt: &GtState, state: &GuestState, others: &Witnesses<'_>) {
        let fifo = gt.event_array.is_some();
        let said = [("FIFO-based ABI", true), ("2-level ABI", false)];
        let said = said.iter().find(|(text, _)| others.console.contains(text)).map(|(_, fifo)| fifo);
        self.same("FIFO event channels", Some(&fifo), said);
        let vectors = vectors(others.dmesg, state.domain.domid.0);
        if vectors.is_empty() {
            self.0.push("Xen's log does not say any more which upcall vectors the guest asked for".to_owned());
        }
        for (id, vcpu) in (0u32..).zip(&gt.vcpus).filter(|(_, v)| !v.down) {
            if vcpu.fifo.is_some() != fifo {
                self.0.push(format!("vCPU {id}: FIFO is {fifo}, its control block {:?}", vcpu.fifo));
            }
            if vectors.get(&id) != Some(&vcpu.upcall_vector) {
                let noted = vectors.get(&id);
                self.0.push(format!("vCPU {id}: upcall vector {:#x}, Xen noted {noted:x?}", vcpu.upcall_vector));
            }
        }
    }

    fn grants(&mut self, state: &GuestState, guest: &Snapshot) {
        let Some(grants) = guest.grants.seen() else {
            self.0.push(format!("the witness saw no grants: {}", guest.grants.why_absent().unwrap_or_default()));
            return;
        };
        self.same("grant table version", Some(&state.grants.version), Some(&grants.version));
        self.same("grant table frames", Some(&state.grants.frames), Some(&grants.frames));
        for own in grants.own.seen().into_iter().flatten() {
            let entry = state.grants.entries.get(&own.gref).map(|e| e.domid.0);
            self.same(&format!("domain of grant {}", own.gref), entry.as_ref(), Some(&own.domid));
        }
    }

    /// Runstate counters lie between the guest's two looks; timers are where a running guest's can be.
    fn times(&mut self, gt: &GtState, others: &Witnesses<'_>) {
        let (Some(before), Some(after)) = (others.before.runstates.seen(), others.after.runstates.seen()) else {
            self.0.push("the witness saw no runstates".to_owned());
            return;
        };
        let now = gt.guest_now_ns();
        for (id, vcpu) in (0u32..).zip(&gt.vcpus).filter(|(_, v)| !v.down) {
            let of = |all: &[report::Runstate]| all.iter().find(|r| r.vcpu == id).map(|r| r.time_ns);
            let ours = vcpu.runstate.at(now).time_ns;
            let between = |(ours, (from, to)): (i64, (u64, u64))| {
                u64::try_from(ours).is_ok_and(|ours| (from..=to).contains(&ours))
            };
            match (of(before), of(after)) {
                (Some(from), Some(to)) if ours.into_iter().zip(from.into_iter().zip(to)).all(between) => {}
                (from, to) => self.0.push(format!("vCPU {id}: runstate {ours:?} is not between {from:?} and {to:?}")),
            }
            if let Some(expires) = vcpu.singleshot_ns {
                let left = expires.saturating_sub(now);
                if !(-TIMER_LATE_NS..=TIMER_AHEAD_NS).contains(&left) {
                    self.0.push(format!("vCPU {id}: its timer fires {left} ns from now"));
                }
            }
        }
        if !armed(gt) {
            self.0.push("no vCPU has a timer armed".to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LSEVTCHN: &str = "   1: VCPU 0: Interdomain (Connected) - Remote Domain 0, Port 12\n   \
        4: VCPU 1: Virtual IRQ 0\n   5: VCPU 0: IPI\n   9: VCPU 0: Interdomain (Waiting connection) - Remote Domain 3\n";
    const DEBUG: &str = "(XEN) d7v0: upcall vector f3\n(XEN) d7v1: upcall vector f3\n\
        (XEN) Event channel information for domain 7:\n(XEN) Polling vCPUs: {}\n(XEN)     port [p/m/s]\n\
        (XEN)        4 [0/0/  -   ]: s=5 n=0 x=0 v=0\n\
        (XEN) 'e' pressed -> dumping event-channel info\n(XEN) Event channel information for domain 0:\n\
        (XEN)        1 [1/0/0]: s=6 n=0 x=0\n(XEN) Event channel information for domain 7:\n\
        (XEN) Polling vCPUs: {0}\n(XEN)     port [p/m/s]\n\
        (XEN)        1 [0/0/  -   ]: s=3 n=0 x=0 d=0 p=12\n(XEN)        4 [0/1/ 33   ]: s=5 n=1 x=0 v=0\n\
        (XEN)        5 [0/0/  -   ]: s=6 n=0 x=0\n(XEN)        6 [0/0/  -   ]: s=3 n=0 x=1 d=0 p=2\n\
        (XEN)        9 [0/0/  -   ]: s=2 n=0 x=0 d=3\n(XEN) Event channel information for domain 8:\n\
        (XEN)        2 [0/0/  -   ]: s=6 n=0 x=0\n";

    fn four() -> Ports {
        BTreeMap::from([
            (1, (Kind::Interdomain { remote: 0, port: 12 }, 0)),
            (4, (Kind::Virq(0), 1)),
            (5, (Kind::Ipi, 0)),
            (9, (Kind::Unbound { remote: 3 }, 0)),
        ])
    }

    #[test]
    fn stock_tools_are_understood() {
        assert_eq!(lsevtchn(LSEVTCHN).unwrap(), four());
        assert!(lsevtchn("   1: VCPU 0: Unknown\n").is_err());
        assert_eq!(debug_key(DEBUG, 7).unwrap(), four());
        assert!(debug_key(DEBUG, 9).is_err());
        assert_eq!(vectors(DEBUG, 7), BTreeMap::from([(0, 0xf3), (1, 0xf3)]));
        assert!(vectors(DEBUG, 8).is_empty());
    }

    /// A guest of one vCPU and what everybody says of it, in agreement.
    fn agreeing() -> (GuestState, Snapshot) {
        let ports = [
            report::Port { port: 1, status: 2, vcpu: 0, remote_dom: Some(0), remote_port: Some(12), irq: None },
            report::Port { port: 4, status: 4, vcpu: 1, remote_dom: None, remote_port: None, irq: Some(0) },
            report::Port { port: 5, status: 5, vcpu: 0, remote_dom: None, remote_port: None, irq: None },
            report::Port { port: 9, status: 1, vcpu: 0, remote_dom: Some(3), remote_port: None, irq: None },
        ];
        let node =
            |path: &str| report::StoreNode { path: path.to_owned(), value: "1".to_owned(), perms: String::new() };
        let snapshot = Snapshot {
            ports: report::Item::Seen(ports.to_vec()),
            store: report::Item::Seen(vec![
                node("/local/domain/7/device/vif/0/event-channel"),
                node("/local/domain/7/device/vbd/51712/event-channel"),
            ]),
            identity: report::Identity { domid_store: report::Item::Seen(7), ..Default::default() },
            grants: report::Item::Seen(report::Grants {
                version: 1,
                frames: 2,
                max_frames: 64,
                own: report::Item::Seen(vec![report::OwnGrant { gref: 9, domid: 7 }]),
            }),
            hvm_params: report::Item::Seen(vec![report::HvmParam { index: 2, value: 1 }]),
            runstates: report::Item::Seen(vec![report::Runstate { vcpu: 0, entry_ns: 0, time_ns: [5, 0, 105, 0] }]),
            ..Default::default()
        };
        let text = serde_json::json!({
            "xen": "4.17.5", "build_id": "",
            "domain": {
                "domid": 7, "uuid": "00000000-0000-0000-0000-000000000001", "hvm": true, "hap": true, "xs_domain": false,
                "paused": true, "dying": false, "running": false, "blocked": true, "shutdown": null, "total_pages": 1,
                "max_pages": 1, "outstanding_pages": 0, "shared_pages": 0, "paged_pages": 0, "shared_info": 5,
                "cpu_time_ns": 1, "online_vcpus": 1, "vcpus": 1, "ssidref": 0, "cpupool": 0, "gpaddr_bits": 39,
                "emulation_flags": 1, "misc_flags": 0
            },
            "vcpus": [], "tsc": { "mode": 0, "elapsed_ns": 0, "khz": 1, "incarnation": 0 }, "vm_assist": 32,
            "paging_pool_bytes": 0, "cpu_policy": { "leaves": [], "msrs": [] },
            "hvm_params": { "STORE_EVTCHN": 1, "CONSOLE_EVTCHN": 1 },
            "hvm_records": [], "ports": {},
            "grants": { "version": 1, "frames": 2, "max_frames": 64, "gfns": [],
                        "entries": { "9": { "flags": 1, "domid": 7, "frame": 3, "in_use": false } } },
            "shared_info": null, "gt": null, "gt_missing": null, "timing": { "paused_us": 900, "parts_us": {} }
        });
        let mut state: GuestState = serde_json::from_value(text).unwrap();
        let port = |port, kind, vcpu, xen_consumer| GtPort {
            port,
            kind,
            vcpu,
            priority: 7,
            last_vcpu: 0,
            last_priority: 7,
            pending_early: false,
            xen_consumer,
        };
        let dom0 = hypervisor::DomId(0);
        let place = hypervisor::GuestPlace { gfn: hypervisor::Gfn(3), offset: 0 };
        state.gt = Some(GtState {
            host_now_ns: 1000,
            event_array: Some(vec![hypervisor::Gfn(9)]),
            ports: vec![
                port(1, GtPortKind::Interdomain { remote: dom0, remote_port: 12 }, 0, false),
                port(4, GtPortKind::Virq(0), 1, false),
                port(5, GtPortKind::Ipi, 0, false),
                port(6, GtPortKind::Interdomain { remote: dom0, remote_port: 2 }, 0, true),
                port(9, GtPortKind::Unbound { remote: hypervisor::DomId(3) }, 0, false),
            ],
            vcpus: vec![hypervisor::GtVcpu {
                upcall_vector: 0xf3,
                fifo: Some(hypervisor::FifoVcpu { control_block: place, tails: [0; 16] }),
                singleshot_ns: Some(5_000_000),
                runstate: hypervisor::Runstate { state: 2, entry_time_ns: 900, time_ns: [5, 0, 5, 0] },
                ..Default::default()
            }],
            ..Default::default()
        });
        (state, snapshot)
    }

    fn odds(state: &GuestState, before: &Snapshot, after: &Snapshot, console: &str) -> Vec<String> {
        disagreements(state, &Witnesses { before, after, console, lsevtchn: LSEVTCHN, dmesg: DEBUG })
    }

    const CONSOLE: &str = "[    2.9] xen:events: Using FIFO-based ABI\n";

    #[test]
    fn agreement_is_found() {
        let (state, guest) = agreeing();
        assert_eq!(odds(&state, &guest, &guest, CONSOLE), Vec::<String>::new());
    }

    #[test]
    fn every_difference_is_found() {
        type Change = fn(&mut GtState);
        let changes: [(&str, Change); 11] = [
            ("port 4", |gt| gt.ports[1].vcpu = 0),
            ("port 4", |gt| gt.ports[1].kind = GtPortKind::Virq(1)),
            ("port 9", |gt| gt.ports.truncate(4)),
            ("port 6", |gt| gt.ports[3].xen_consumer = false),
            ("FIFO", |gt| gt.event_array = None),
            ("control block", |gt| gt.vcpus[0].fifo = None),
            ("upcall vector", |gt| gt.vcpus[0].upcall_vector = 0xf4),
            ("runstate", |gt| gt.vcpus[0].runstate.time_ns[0] = 6),
            ("runstate", |gt| gt.vcpus[0].runstate.entry_time_ns = 901),
            ("timer", |gt| gt.vcpus[0].singleshot_ns = None),
            ("timer", |gt| gt.vcpus[0].singleshot_ns = Some(1 << 60)),
        ];
        for (what, change) in changes {
            let (mut state, guest) = agreeing();
            change(state.gt.as_mut().unwrap());
            let odds = odds(&state, &guest, &guest, CONSOLE);
            assert!(odds.iter().any(|line| line.contains(what)), "{what}: {odds:?}");
        }
        let (state, guest) = agreeing();
        assert!(odds(&state, &guest, &guest, "Using 2-level ABI")[0].contains("FIFO"));
        let mut other = guest.clone();
        other.store = report::Item::Seen(Vec::new());
        assert!(odds(&state, &guest, &other, CONSOLE).iter().any(|line| line.contains("vbd/")));
        let mut other = guest.clone();
        other.grants = report::Item::default();
        assert!(odds(&state, &guest, &other, CONSOLE)[0].contains("grants"));
        other.ports = report::Item::default();
        assert!(odds(&state, &guest, &other, CONSOLE)[0].contains("ports"));
    }
}
