//! Looks at everything again and again, compares with the last look, and makes the snapshots.

use crate::clock;
use crate::context::{Context, Pacer, lock};
use crate::store;
use crate::system;
use crate::xen::{OwnGrants, Xen};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use witness::report::{Device, Grants, Identity, Interrupt, Item, Link, Noticed, Port, Snapshot};

/// What Xen tells, or why not.
#[derive(Debug)]
pub struct XenSide {
    xen: Result<Xen, String>,
    own: Result<OwnGrants, String>,
    vcpus: u32,
}

impl XenSide {
    pub fn open(seed: u64, vcpus: u32) -> XenSide {
        let domid = store::names().domid.or_else(|e| system::domid_by_cpuid().seen().copied().ok_or(e));
        let own = domid.and_then(|d| OwnGrants::new(d, seed));
        XenSide { xen: Xen::open(), own, vcpus }
    }

    fn with<T>(&mut self, f: impl FnOnce(&mut Xen) -> Result<T, String>) -> Item<T> {
        match &mut self.xen {
            Ok(x) => f(x).into(),
            Err(e) => Item::Absent(e.clone()),
        }
    }

    fn grants(&mut self) -> Item<Grants> {
        let own = match &self.own {
            Ok(o) => Item::Seen(o.list()),
            Err(e) => Item::Absent(e.clone()),
        };
        self.with(|x| x.grants(own))
    }

    fn copy(&mut self, ctx: &Context) {
        let (Ok(xen), Ok(own)) = (&mut self.xen, &mut self.own) else { return };
        match own.copy(xen) {
            Ok(()) => ctx.counters.grant_copies.add(1),
            Err(error) => {
                ctx.counters.grant_bad.add(1);
                ctx.notice(Noticed::GrantCopy { grefs: own.references(), error });
            }
        }
    }

    /// What can't be looked at, for the hello.
    pub fn absent(&mut self) -> Vec<String> {
        let mut absent = Vec::new();
        let mut note = |what: &str, why: Option<&str>| absent.extend(why.map(|w| format!("{what}: {w}")));
        note("event channels", self.with(Xen::ports).why_absent());
        let grants = self.grants();
        note("grant table", grants.why_absent());
        if let Some(g) = grants.seen() {
            note("own grants", g.own.why_absent());
        }
        note("HVM parameters", self.with(Xen::hvm_params).why_absent());
        let vcpus = self.vcpus;
        note("runstates", self.with(|x| x.runstates(vcpus)).why_absent());
        if let (Ok(xen), Ok(own)) = (&mut self.xen, &mut self.own) {
            note("copies through own grants", own.copy(xen).err().as_deref());
        }
        absent
    }
}

/// What one look saw, to be compared with the next.
#[derive(Debug, Default)]
struct Look {
    identity: BTreeMap<&'static str, String>,
    ports: BTreeMap<u32, Port>,
    ports_seen: bool,
    grants: Option<(u32, u32, u32)>,
    lines: BTreeMap<String, ()>,
    links: Vec<Link>,
    devices: Vec<Device>,
}

fn take_look(xen: &mut XenSide) -> Look {
    let ports = xen.with(Xen::low_ports);
    let names = store::names();
    let mut identity = BTreeMap::new();
    if let Some(d) = system::domid_by_cpuid().seen() {
        identity.insert("domid_cpuid", d.to_string());
    }
    if let Some(u) = system::uuid_kernel().seen() {
        identity.insert("uuid_kernel", u.clone());
    }
    identity.extend(names.domid.ok().map(|d| ("domid_store", d.to_string())));
    identity.extend(names.uuid.ok().map(|u| ("uuid_store", u)));
    identity.extend(names.name.ok().map(|n| ("name", n)));
    Look {
        identity,
        ports_seen: ports.seen().is_some(),
        ports: ports.seen().into_iter().flatten().map(|p| (p.port, *p)).collect(),
        grants: xen.grants().seen().map(|g| (g.version, g.frames, g.max_frames)),
        lines: system::interrupts().into_iter().map(|i| (line(&i), ())).collect(),
        links: system::links(),
        devices: system::devices(),
    }
}

fn line(i: &Interrupt) -> String {
    format!("{} {}", i.irq, i.name)
}

/// Two ports that a guest cannot tell apart: the remote port is not its business.
fn same_port(a: &Port, b: &Port) -> bool {
    (a.status, a.vcpu, a.remote_dom, a.irq) == (b.status, b.vcpu, b.remote_dom, b.irq)
}

fn compare(before: &Look, after: &Look) -> Vec<Noticed> {
    let mut noticed = Vec::new();
    for (field, b) in &before.identity {
        let a = after.identity.get(field).cloned().unwrap_or_else(|| "none".into());
        if a != *b {
            noticed.push(Noticed::Identity { field: (*field).into(), before: b.clone(), after: a });
        }
    }
    if before.ports_seen && after.ports_seen {
        for port in before.ports.keys().chain(after.ports.keys().filter(|p| !before.ports.contains_key(p))) {
            let (b, a) = (before.ports.get(port).copied(), after.ports.get(port).copied());
            if !matches!((&b, &a), (Some(b), Some(a)) if same_port(b, a)) {
                noticed.push(Noticed::PortChanged { port: *port, before: b, after: a });
            }
        }
    }
    if let (Some(b), Some(a)) = (before.grants, after.grants) {
        for (field, before, after) in [("version", b.0, a.0), ("frames", b.1, a.1), ("max_frames", b.2, a.2)] {
            if before != after {
                noticed.push(Noticed::GrantTable { field: field.into(), before, after });
            }
        }
    }
    for line in before.lines.keys().filter(|l| !after.lines.contains_key(*l)) {
        noticed.push(Noticed::InterruptLine { line: line.clone(), came: false });
    }
    for line in after.lines.keys().filter(|l| !before.lines.contains_key(*l)) {
        noticed.push(Noticed::InterruptLine { line: line.clone(), came: true });
    }
    for b in &before.links {
        match after.links.iter().find(|a| a.dev == b.dev) {
            Some(a) if a == b => {}
            Some(a) => noticed.push(Noticed::LinkChanged { before: b.clone(), after: a.clone() }),
            None => {
                let after = Link { state: "gone".into(), ..b.clone() };
                noticed.push(Noticed::LinkChanged { before: b.clone(), after });
            }
        }
    }
    for b in &before.devices {
        let after = after.devices.iter().find(|a| a.name == b.name).map_or("gone", |a| &a.state);
        if after != b.state {
            noticed.push(Noticed::DeviceChanged { name: b.name.clone(), before: b.state.clone(), after: after.into() });
        }
    }
    noticed
}

fn links_changes(links: &[Link]) -> u64 {
    links.iter().map(|l| l.carrier_changes).sum()
}

/// Starts looking.
pub fn start(ctx: &Arc<Context>, xen: &Arc<Mutex<XenSide>>) {
    if ctx.config.look_ms == 0 {
        return;
    }
    let (c, xen) = (ctx.clone(), xen.clone());
    crate::spawn("look", move || {
        let mut pacer = Pacer::every(std::time::Duration::from_millis(c.config.look_ms.into()));
        let mut last: Option<Look> = None;
        loop {
            pacer.wait_always();
            let look = {
                let mut xen = lock(&xen);
                if c.loads() {
                    xen.copy(&c);
                }
                take_look(&mut xen)
            };
            c.counters.xen_reads.add(1);
            c.counters.link_changes.set(links_changes(&look.links));
            if let Some(last) = &last {
                for n in compare(last, &look) {
                    c.notice(n);
                }
            }
            last = Some(look);
        }
    });
}

/// Everything.
pub fn snapshot(ctx: &Context, xen: &Mutex<XenSide>, reason: &str) -> Snapshot {
    let names = store::names();
    let store = store::view(ctx).into();
    let (ports, grants, hvm_params, runstates) = {
        let mut xen = lock(xen);
        let vcpus = xen.vcpus;
        let (ports, grants) = (xen.with(Xen::ports), xen.grants());
        (ports, grants, xen.with(Xen::hvm_params), xen.with(|x| x.runstates(vcpus)))
    };
    let links = system::links();
    let mut clocks = lock(&ctx.clocks).clocks();
    clocks.clocksource = system::clocksource();
    clocks.last = clock::read_once();
    Snapshot {
        reason: reason.into(),
        counters: ctx.counters.beat(ctx.loads()),
        identity: Identity {
            domid_store: names.domid.into(),
            domid_cpuid: system::domid_by_cpuid(),
            uuid_kernel: system::uuid_kernel(),
            uuid_store: names.uuid.into(),
            name: names.name.into(),
            xen_version: system::xen_version(),
            cpuid: system::cpuid_leaves(),
        },
        store,
        watches: lock(&ctx.watches).states.clone(),
        ports,
        grants,
        hvm_params,
        runstates,
        interrupts: system::interrupts(),
        kernel_log: lock(&ctx.kernel_log).log(),
        links,
        devices: system::devices(),
        clocks,
        mem_total_kib: system::mem_total_kib(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look() -> Look {
        let port = Port { port: 3, status: 2, vcpu: 0, remote_dom: Some(0), remote_port: Some(8), irq: None };
        Look {
            identity: BTreeMap::from([("name", "g".to_owned())]),
            ports: BTreeMap::from([(3, port)]),
            ports_seen: true,
            grants: Some((1, 2, 3)),
            lines: BTreeMap::from([("24 xenbus".to_owned(), ())]),
            links: vec![Link { dev: "eth0".into(), mac: "m".into(), mtu: 1, state: "up".into(), carrier_changes: 2 }],
            devices: vec![Device { name: "vif-0".into(), state: "Connected".into(), driver: "vif".into() }],
        }
    }

    #[test]
    fn every_part_is_compared() {
        assert_eq!(compare(&look(), &look()), vec![]);
        type Change = fn(&mut Look);
        let changes: &[(usize, Change)] = &[
            (1, |l| l.identity.clear()),
            (2, |l| {
                let p = l.ports.remove(&3).unwrap();
                l.ports.insert(4, p);
            }),
            (1, |l| l.ports.values_mut().for_each(|p| p.vcpu = 1)),
            (0, |l| l.ports.values_mut().for_each(|p| p.remote_port = Some(9))),
            (1, |l| l.grants = Some((1, 2, 4))),
            (2, |l| l.lines = BTreeMap::from([("25 xenbus".to_owned(), ())])),
            (1, |l| l.links[0].carrier_changes = 4),
            (1, |l| l.links.clear()),
            (1, |l| l.devices[0].state = "Closing".into()),
            (1, |l| l.devices.clear()),
        ];
        for (i, (n, change)) in changes.iter().enumerate() {
            let mut after = look();
            change(&mut after);
            assert_eq!(compare(&look(), &after).len(), *n, "change {i}");
        }
    }
}
