//! Xenstore as the guest sees it: nodes read again and again, watches, writes under a watch, held transactions.

use crate::clock::mono_ns;
use crate::context::{Context, Pacer, Phase, lock};
use crate::pipeline::{Pipeline, show_perms};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use witness::report::{Noticed, StoreNode, WatchEvent, WatchState};
use witness::store_rules::{OWN_AREA, escape, may_change};
use xenstore_client::{Client, Errno, Nodes};

/// Nodes that a view holds at most.
const MOST_NODES: usize = 1024;
/// Token of the load's own watch.
const LOAD_TOKEN: &str = "witness-load";
/// How long an event may take.
const EVENT_NS: u64 = 10_000_000_000;
/// Of a turn of waiting for events no more than this counts; what is longer is an absence.
const LONGEST_TURN_NS: u64 = 2_000_000_000;

/// The watches that are held.
#[derive(Debug, Default)]
pub struct WatchTable {
    pub states: Vec<WatchState>,
    /// Tokens whose first event, the one that registering causes, has come.
    registered: BTreeSet<String>,
}

impl WatchTable {
    /// Counts an event. True if the watch guards what should not change and its path may not.
    fn event(&mut self, mono_ns: u64, path: &str, token: &str, starting: bool) -> Option<WatchState> {
        let state = self.states.iter_mut().find(|s| s.token == token)?;
        if self.registered.insert(token.to_owned()) || (starting && !state.load) {
            return None;
        }
        if !state.load && may_change(path).is_some() {
            return None;
        }
        state.events += 1;
        if state.load {
            return Some(state.clone());
        }
        state.last.push(WatchEvent { mono_ns, path: path.to_owned() });
        if state.last.len() > 16 {
            state.last.remove(0);
        }
        Some(state.clone())
    }
}

fn open() -> Result<Client, String> {
    if !std::path::Path::new("/dev/xen/xenbus").exists() {
        return Err("no /dev/xen/xenbus".into());
    }
    Client::open_device().map_err(|e| e.to_string())
}

/// Runs an operation, counted and timed.
fn timed<T>(ctx: &Context, f: impl FnOnce() -> xenstore_client::Result<T>) -> xenstore_client::Result<T> {
    let start = Instant::now();
    let r = f();
    ctx.counters.store_ops.add(1);
    ctx.counters.store_max_ms.max(u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX));
    r
}

/// The guest's own area, from its `domid` node.
fn home(c: &mut Client) -> Result<String, String> {
    let domid = c.read_string("domid").map_err(|e| e.to_string())?;
    Ok(format!("/local/domain/{domid}"))
}

/// Reads one node; `None` if it is gone or may not be read any more.
fn node(ctx: &Context, c: &mut Client, path: &str) -> xenstore_client::Result<Option<StoreNode>> {
    let gone = |e: &xenstore_client::Error| matches!(e.errno(), Some(Errno::ENOENT | Errno::EACCES));
    let value = match timed(ctx, || c.read(path)) {
        Ok(v) => v,
        Err(e) if gone(&e) => return Ok(None),
        Err(e) => return Err(e),
    };
    let perms = match timed(ctx, || c.get_perms(path)) {
        Ok(perms) => show_perms(&perms),
        Err(e) if gone(&e) => format!("? {}", e.errno().map_or("", Errno::name)),
        Err(e) => return Err(e),
    };
    Ok(Some(StoreNode { path: path.to_owned(), value: escape(&value), perms }))
}

/// The directories of the backends that the guest's frontends name, from nodes of its own area.
fn backends(nodes: &BTreeMap<String, StoreNode>, home: &str) -> Vec<String> {
    let mut found: Vec<String> = nodes
        .values()
        .filter(|n| n.path.starts_with(home) && n.path.ends_with("/backend") && n.value.starts_with('/'))
        .map(|n| n.value.clone())
        .collect();
    found.sort();
    found.dedup();
    found
}

/// All that the guest can see: its own area, its /vm area, its backends' areas.
pub fn view(ctx: &Context) -> Result<Vec<StoreNode>, String> {
    let home = home(&mut open()?)?;
    let mut pipe = Pipeline::open()?;
    let mut nodes = BTreeMap::new();
    walk(ctx, &mut pipe, &home, &mut nodes)?;
    if let Some(vm) = nodes.get(&format!("{home}/vm")).map(|n| n.value.clone()) {
        walk(ctx, &mut pipe, &vm, &mut nodes)?;
    }
    for backend in backends(&nodes, &home) {
        walk(ctx, &mut pipe, &backend, &mut nodes)?;
    }
    Ok(nodes.into_values().collect())
}

/// Adds a node and all below it. The nodes of one depth are asked for together: one after the other, a view would take
/// a minute on a slow host.
fn walk(ctx: &Context, pipe: &mut Pipeline, root: &str, nodes: &mut BTreeMap<String, StoreNode>) -> Result<(), String> {
    let mut level = vec![root.to_owned()];
    while !level.is_empty() {
        if nodes.len() + level.len() > MOST_NODES {
            return Err(format!("more than {MOST_NODES} nodes"));
        }
        let found = pipe.nodes(&level)?;
        ctx.counters.store_ops.add(3 * level.len() as u64);
        level.clear();
        for entry in found.into_iter().flatten() {
            level.extend(entry.children.iter().map(|name| format!("{}/{name}", entry.node.path)));
            nodes.insert(entry.node.path.clone(), entry.node);
        }
    }
    Ok(())
}

/// domid, uuid and name by the store.
pub struct Names {
    pub domid: Result<u16, String>,
    pub uuid: Result<String, String>,
    pub name: Result<String, String>,
}

pub fn names() -> Names {
    let mut c = match open() {
        Ok(c) => c,
        Err(e) => return Names { domid: Err(e.clone()), uuid: Err(e.clone()), name: Err(e) },
    };
    let mut read = |path: &str| c.read_string(path).map_err(|e| e.to_string());
    Names {
        domid: read("domid").and_then(|d| d.parse().map_err(|_| format!("domid is {d:?}"))),
        uuid: read("vm").map(|vm| vm.rsplit('/').next().unwrap_or_default().to_owned()),
        name: read("name"),
    }
}

fn failed(ctx: &Context, op: &str, error: impl std::fmt::Display) {
    ctx.counters.store_errors.add(1);
    ctx.notice(Noticed::StoreError { op: op.to_owned(), error: error.to_string() });
}

/// Starts all store loads; says why it can't.
pub fn start(ctx: &Arc<Context>) -> Result<(), String> {
    let baseline = view(ctx).map_err(|e| format!("xenstore: {e}"))?;
    start_watches(ctx, &baseline).map_err(|e| format!("xenstore: {e}"))?;
    if ctx.config.store > 0 {
        let mut c = open()?;
        let ctx = ctx.clone();
        crate::spawn("store-read", move || read_again(&ctx, &mut c, baseline));
    }
    if ctx.config.watch > 0 {
        let mut c = open()?;
        let ctx = ctx.clone();
        crate::spawn("store-write", move || {
            let path = format!("{OWN_AREA}/watched");
            let mut pacer = Pacer::new(ctx.config.watch);
            loop {
                pacer.wait(&ctx);
                let n = ctx.counters.watch_writes.get() + 1;
                match timed(&ctx, || c.write(&path, n.to_string())) {
                    Ok(()) => ctx.counters.watch_writes.add(1),
                    Err(e) => {
                        failed(&ctx, &format!("write {path}"), e);
                        std::thread::sleep(Duration::from_secs(1));
                    }
                }
            }
        });
    }
    if ctx.config.tx_hold_ms > 0 {
        let mut c = open()?;
        let ctx = ctx.clone();
        crate::spawn("store-tx", move || {
            let mut pacer = Pacer::every(Duration::from_millis(300));
            loop {
                pacer.wait(&ctx);
                hold_transaction(&ctx, &mut c);
            }
        });
    }
    Ok(())
}

/// Reads node after node and compares.
fn read_again(ctx: &Context, c: &mut Client, baseline: Vec<StoreNode>) {
    let mut known: BTreeMap<String, Option<StoreNode>> =
        baseline.into_iter().filter(|n| may_change(&n.path).is_none()).map(|n| (n.path.clone(), Some(n))).collect();
    let paths: Vec<String> = known.keys().cloned().collect();
    let mut pacer = Pacer::new(ctx.config.store);
    for path in paths.iter().cycle() {
        // Looking goes on while the loads stand still.
        pacer.wait_always();
        let now = match node(ctx, c, path) {
            Ok(now) => now,
            Err(e) => {
                failed(ctx, &format!("read {path}"), e);
                continue;
            }
        };
        let before = known.get(path).cloned().flatten();
        if before != now {
            let text = |n: &StoreNode| format!("\"{}\" [{}]", n.value, n.perms);
            ctx.notice(Noticed::StoreNode {
                path: path.clone(),
                before: before.as_ref().map(text),
                after: now.as_ref().map(text),
            });
            known.insert(path.clone(), now);
        }
    }
}

/// One transaction: opened, held, written in, committed, and what it wrote read from outside.
fn hold_transaction(ctx: &Context, c: &mut Client) {
    let path = format!("{OWN_AREA}/transaction");
    let n = ctx.counters.tx_committed.get() + ctx.counters.tx_again.get() + 1;
    let start = Instant::now();
    let result = (|| {
        let mut t = c.begin()?;
        // Reading it makes the node part of the transaction.
        let _ = t.read_opt(&path)?;
        let end = start + Duration::from_millis(ctx.config.tx_hold_ms.into());
        while Instant::now() < end && ctx.loads() {
            std::thread::sleep(Duration::from_millis(250));
        }
        t.write(&path, n.to_string())?;
        t.commit()
    })();
    let held_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let fail = |error: String| {
        ctx.counters.tx_failed.add(1);
        ctx.notice(Noticed::Transaction { held_ms, error });
    };
    match result {
        Ok(()) => match c.read_string(&path) {
            Ok(v) if v == n.to_string() => ctx.counters.tx_committed.add(1),
            Ok(v) => fail(format!("wrote {n} and committed, and then read {v:?}")),
            Err(e) => fail(format!("committed, and then: {e}")),
        },
        Err(e) if e.errno() == Some(Errno::EAGAIN) => ctx.counters.tx_again.add(1),
        Err(e) => {
            fail(e.to_string());
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

/// Registers the watches: the load's own, and one on each directory that should not change.
fn start_watches(ctx: &Arc<Context>, baseline: &[StoreNode]) -> Result<(), String> {
    let mut c = open()?;
    let home = home(&mut c)?;
    let nodes: BTreeMap<String, StoreNode> = baseline.iter().map(|n| (n.path.clone(), n.clone())).collect();
    let mut guarded = backends(&nodes, &home);
    guarded.extend(["device", "control", "domid", "name", "vm", "console", "store"].map(|n| format!("{home}/{n}")));
    guarded.retain(|p| nodes.contains_key(p));
    let load = format!("{OWN_AREA}/watched");
    c.write(&load, "0").map_err(|e| e.to_string())?;
    let mut watches = vec![(load, LOAD_TOKEN.to_owned(), true)];
    watches.extend(guarded.into_iter().enumerate().map(|(i, path)| (path, format!("witness-{i}"), false)));
    for (path, token, load) in watches {
        lock(&ctx.watches).states.push(WatchState {
            path: path.clone(),
            token: token.clone(),
            load,
            events: 0,
            last: Vec::new(),
        });
        c.watch(&path, &token).map_err(|e| format!("watch {path}: {e}"))?;
    }
    let ctx = ctx.clone();
    crate::spawn("store-watch", move || watch_events(&ctx, &mut c));
    Ok(())
}

/// How long an event has not come, by the time that the guest was there: a second in which it was away is nobody's delay.
#[derive(Debug, Default)]
struct Overdue {
    waited_ns: u64,
    last_ns: u64,
}

impl Overdue {
    /// A turn of the waiting, which lasts a second at the most.
    fn turn(&mut self, now_ns: u64) {
        self.waited_ns += now_ns.saturating_sub(self.last_ns).min(LONGEST_TURN_NS);
        self.last_ns = now_ns;
    }

    /// All has come.
    fn none(&mut self) {
        self.waited_ns = 0;
    }

    fn is_too_long(&self) -> bool {
        self.waited_ns > EVENT_NS
    }
}

fn watch_events(ctx: &Context, c: &mut Client) {
    let mut overdue = Overdue { waited_ns: 0, last_ns: mono_ns() };
    let mut told = false;
    loop {
        match c.next_event(Some(Duration::from_secs(1))) {
            Ok(Some(event)) => {
                let starting = ctx.phase() == Phase::Starting;
                let state = { lock(&ctx.watches).event(mono_ns(), &event.path, &event.token, starting) };
                match state {
                    Some(s) if s.load => {
                        ctx.counters.watch_events.set(s.events);
                        overdue.none();
                        told = false;
                    }
                    Some(s) => {
                        ctx.counters.watch_strays.add(1);
                        ctx.notice(Noticed::WatchFired { watch: s.path, path: event.path });
                    }
                    None => {}
                }
            }
            Ok(None) => {}
            Err(e) => {
                failed(ctx, "wait for a watch event", e);
                std::thread::sleep(Duration::from_secs(1));
            }
        }
        overdue.turn(mono_ns());
        let missing = ctx.counters.watch_writes.get().saturating_sub(ctx.counters.watch_events.get());
        if missing == 0 {
            overdue.none();
        } else if !told && overdue.is_too_long() {
            told = true;
            ctx.notice(Noticed::WatchSilent { path: format!("{OWN_AREA}/watched"), missing });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absence_does_not_make_an_event_late() {
        let second = 1_000_000_000;
        let mut overdue = Overdue { waited_ns: 0, last_ns: 0 };
        overdue.turn(16 * second);
        assert!(!overdue.is_too_long(), "the guest was paused");
        (17..=24).for_each(|n| overdue.turn(n * second));
        assert!(!overdue.is_too_long());
        overdue.turn(25 * second);
        assert!(overdue.is_too_long());
        overdue.none();
        overdue.turn(26 * second);
        assert!(!overdue.is_too_long());
    }

    fn table() -> WatchTable {
        let state = |path: &str, token: &str, load| WatchState {
            path: path.into(),
            token: token.into(),
            load,
            events: 0,
            last: vec![],
        };
        WatchTable {
            states: vec![state("data/witness/watched", LOAD_TOKEN, true), state("/local/domain/5/console", "w", false)],
            registered: BTreeSet::new(),
        }
    }

    #[test]
    fn registering_and_what_may_change_do_not_count() {
        let mut t = table();
        assert_eq!(t.event(1, "/local/domain/5/console", "w", false), None, "registering");
        assert_eq!(t.event(1, "/local/domain/5/console/tty", "w", false), None, "host-bound");
        assert_eq!(t.event(1, "/local/domain/5/console/port", "w", true), None, "set-up");
        assert_eq!(t.event(2, "/local/domain/5/console/port", "w", false).map(|s| s.events), Some(1));
        assert_eq!(t.event(2, "x", "another", false), None);
        assert_eq!(t.states[1].last, [WatchEvent { mono_ns: 2, path: "/local/domain/5/console/port".into() }]);
    }

    #[test]
    fn the_loads_events_count_from_the_second_on() {
        let mut t = table();
        assert_eq!(t.event(1, "data/witness/watched", LOAD_TOKEN, true), None);
        assert_eq!(t.event(1, "data/witness/watched", LOAD_TOKEN, false).map(|s| s.events), Some(1));
    }

    #[test]
    fn backends_are_found_in_the_own_area_only() {
        let node = |path: &str, value: &str| {
            (path.to_owned(), StoreNode { path: path.into(), value: value.into(), perms: "n0".into() })
        };
        let nodes = BTreeMap::from([
            node("/local/domain/5/device/vbd/51712/backend", "/local/domain/0/backend/vbd/5/51712"),
            node("/local/domain/5/device/vif/0/backend", "/local/domain/0/backend/vif/5/0"),
            node("/local/domain/5/device/vif/0/backend-id", "0"),
            node("/vm/u/backend", "/x"),
        ]);
        assert_eq!(
            backends(&nodes, "/local/domain/5"),
            ["/local/domain/0/backend/vbd/5/51712", "/local/domain/0/backend/vif/5/0"]
        );
    }
}
