//! The judgement: what a guest noticed, against the promises T1 to T10.
//!
//! [`diff`] compares two snapshots; [`judge`] adds what was noticed in between, what the peer and the lab saw from
//! outside, and the allowance from a control run, and gives a verdict with evidence for each promise.
//!
//! # The rule for lockup, stall and clock lines
//!
//! In software emulation a vCPU can be starved for seconds, and the guest's kernel says so: soft lockup, RCU stall, hung
//! task, a clock source found unstable. Such a line ([`LineClass::Stall`], [`LineClass::Clock`]) is charged to the move
//! if, and only if,
//!
//! 1. there was a move, and the time that the line speaks of (from its time stamp back by [`reaches_back_ms`]) overlaps
//!    the move's window or the [`SETTLE_NS`] after it; and
//! 2. it is one of more such lines than the control run would have had in a time as long as window and settling together,
//!    rounded up ([`Calm::stalls_per_minute`]).
//!
//! All other such lines are the emulator's, and so is every [`LineClass::Slow`] line: it says that the kernel found itself
//! slow, not that a clock is wrong or a watchdog bit. They are listed in the evidence either way, never dropped.

use crate::disk::JournalFault;
use crate::klog::{self, LineClass, reaches_back_ms};
use crate::report::{Anomaly, KernelLine, Noticed, Promise, Snapshot};
use crate::store_rules::may_change;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::{Debug, Display};

/// How long after a move its effects may still show.
pub const SETTLE_NS: u64 = 5_000_000_000;
/// Gap beyond blackout and calm that is put down to scheduling.
pub const GAP_SLACK_NS: u64 = 100_000_000;
/// Pieces of evidence kept for a promise; the rest is counted.
pub const MOST_EVIDENCE: usize = 24;
/// Pieces of evidence of one kind that are kept.
pub const MOST_OF_A_KIND: usize = 4;

/// A time span by the guest's CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Before the move began.
    pub from_ns: u64,
    /// After it had ended.
    pub to_ns: u64,
}

/// What the peer and the lab saw from outside of the guest.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outside {
    /// How long the guest did not run, as seen from outside.
    pub blackout_ns: Option<u64>,
    /// The peer's end of the TCP stream that was open before the move: still open after it?
    pub tcp_alive: Option<bool>,
    /// Datagrams that the peer sent to the receive-only address after the move had ended (settling included).
    pub receive_only_sent_after: Option<u64>,
    /// Those of them that the guest counted.
    pub receive_only_got_after: Option<u64>,
    /// What was wrong with the journal on the disk, held against what the peer was told; `None` if nobody looked.
    pub journal: Option<Vec<JournalFault>>,
}

/// What a control run without a move showed on this machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Calm {
    /// Length of the control run, s.
    pub seconds: f64,
    /// Lockup, stall and clock lines a minute.
    pub stalls_per_minute: f64,
    /// Largest gap between two clock readings, ns.
    pub gap_ns: u64,
}

impl Calm {
    /// From two snapshots of a control run.
    pub fn from_control(before: &Snapshot, after: &Snapshot) -> Calm {
        let ns = after.clocks.last.mono_ns.saturating_sub(before.clocks.last.mono_ns);
        let seconds = ns as f64 / 1e9;
        let stalls =
            new_lines(before, after).filter(|l| matches!(l.class, LineClass::Stall | LineClass::Clock)).count() as f64;
        let gap_ns = after.clocks.gaps.iter().map(|g| g.mono_ns).max().unwrap_or(0);
        Calm { seconds, stalls_per_minute: if seconds > 0.0 { stalls * 60.0 / seconds } else { 0.0 }, gap_ns }
    }
}

/// All that a judgement rests on.
#[derive(Clone, Debug)]
pub struct Evidence<'a> {
    /// Taken before the move, after start-up.
    pub before: &'a Snapshot,
    /// Taken after it, at best the final report's.
    pub after: &'a Snapshot,
    /// Every anomaly that was received.
    pub anomalies: &'a [Anomaly],
    /// When the move was; `None` for a run without one.
    pub window: Option<Window>,
    /// What was seen from outside.
    pub outside: Outside,
    /// The allowance.
    pub calm: Calm,
}

/// How a promise fared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Kept.
    Pass,
    /// Broken.
    Fail,
    /// Nothing in the run could have broken it, or nobody could see.
    NotExercised,
}

/// The verdict on a promise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Which.
    pub promise: Promise,
    /// How it fared.
    pub outcome: Outcome,
    /// Why: what broke it first, then what was looked at.
    pub evidence: Vec<String>,
}

/// A difference that breaks a promise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Which promise.
    pub promise: Promise,
    /// What is different.
    pub evidence: String,
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, promise: Promise, evidence: impl Into<String>) {
        self.0.push(Finding { promise, evidence: evidence.into() });
    }

    fn same<T: PartialEq + Debug>(&mut self, promise: Promise, what: &str, before: Option<&T>, after: Option<&T>) {
        if let (Some(b), Some(a)) = (before, after)
            && b != a
        {
            self.add(promise, format!("{what} was {b:?}, is {a:?}"));
        }
    }

    /// Compares two lists by key; `skip` says which keys may differ.
    fn same_list<'a, K: Ord + Display + 'a, T: 'a>(
        &mut self,
        (promise, what): (Promise, &str),
        before: impl Iterator<Item = (K, &'a T)>,
        after: impl Iterator<Item = (K, &'a T)>,
        equal: impl Fn(&T, &T) -> bool,
        skip: impl Fn(&K) -> bool,
        show: impl Fn(&T) -> String,
    ) {
        let before: BTreeMap<K, &T> = before.collect();
        let mut after: BTreeMap<K, &T> = after.collect();
        for (key, b) in before {
            match after.remove(&key) {
                _ if skip(&key) => {}
                None => self.add(promise, format!("{what} {key} went, was {}", show(b))),
                Some(a) if !equal(b, a) => self.add(promise, format!("{what} {key} was {}, is {}", show(b), show(a))),
                Some(_) => {}
            }
        }
        for (key, a) in after {
            if !skip(&key) {
                self.add(promise, format!("{what} {key} came: {}", show(a)));
            }
        }
    }
}

fn new_lines<'a>(before: &'a Snapshot, after: &'a Snapshot) -> impl Iterator<Item = &'a KernelLine> {
    let since = before.kernel_log.last_seq;
    after.kernel_log.lines.iter().filter(move |l| l.seq > since)
}

/// Compares two snapshots of one guest. Clocks' gaps and lockup lines are left to [`judge`], which knows when the move was.
pub fn diff(before: &Snapshot, after: &Snapshot) -> Vec<Finding> {
    let mut f = Findings::default();
    // What tells most comes first: evidence is cut to a length.
    for line in new_lines(before, after) {
        if line.class.of_interest() && !line.class.by_starving() {
            f.add(line.class.promise(), Noticed::KernelLine(line.clone()).to_string());
        }
    }
    for a in after.watches.iter().filter(|w| !w.load) {
        let had = before.watches.iter().find(|w| w.token == a.token).map_or(0, |w| w.events);
        if a.events > had {
            let last: Vec<&str> = a.last.iter().map(|e| e.path.as_str()).collect();
            f.add(
                Promise::T2,
                format!("watch on {} fired {} times, last for {}", a.path, a.events - had, last.join(", ")),
            );
        }
    }
    let (b, a) = (&before.identity, &after.identity);
    f.same(Promise::T1, "domid in the store", b.domid_store.seen(), a.domid_store.seen());
    f.same(Promise::T1, "domid by CPUID", b.domid_cpuid.seen(), a.domid_cpuid.seen());
    f.same(Promise::T1, "uuid by the kernel", b.uuid_kernel.seen(), a.uuid_kernel.seen());
    f.same(Promise::T1, "uuid in the store", b.uuid_store.seen(), a.uuid_store.seen());
    f.same(Promise::T1, "name", b.name.seen(), a.name.seen());
    f.same(Promise::T10, "Xen version", b.xen_version.seen(), a.xen_version.seen());
    f.same_list(
        (Promise::T10, "CPUID leaf"),
        b.cpuid.iter().map(|c| (format!("{:#010x}.{}", c.leaf, c.sub), c)),
        a.cpuid.iter().map(|c| (format!("{:#010x}.{}", c.leaf, c.sub), c)),
        |x, y| x == y,
        |_| false,
        |c| format!("{:08x?}", c.out),
    );
    f.same(Promise::T10, "MemTotal", Some(&before.mem_total_kib), Some(&after.mem_total_kib));

    if let (Some(b), Some(a)) = (before.store.seen(), after.store.seen()) {
        f.same_list(
            (Promise::T2, "store node"),
            b.iter().map(|n| (n.path.as_str(), n)),
            a.iter().map(|n| (n.path.as_str(), n)),
            |x, y| x == y,
            |path| may_change(path).is_some(),
            |n| format!("\"{}\" [{}]", n.value, n.perms),
        );
    }
    f.same_list(
        (Promise::T2, "device"),
        before.devices.iter().map(|d| (d.name.as_str(), d)),
        after.devices.iter().map(|d| (d.name.as_str(), d)),
        |x, y| x == y,
        |_| false,
        |d| format!("{} by {}", d.state, d.driver),
    );
    if let (Some(b), Some(a)) = (before.ports.seen(), after.ports.seen()) {
        f.same_list(
            (Promise::T4, "port"),
            b.iter().map(|p| (p.port, p)),
            a.iter().map(|p| (p.port, p)),
            |x, y| (x.status, x.vcpu, x.remote_dom, x.irq) == (y.status, y.vcpu, y.remote_dom, y.irq),
            |_| false,
            ToString::to_string,
        );
    }
    f.same_list(
        (Promise::T4, "interrupt line"),
        before.interrupts.iter().map(|i| (format!("{} {}", i.irq, i.name), i)),
        after.interrupts.iter().map(|i| (format!("{} {}", i.irq, i.name), i)),
        |_, _| true,
        |_| false,
        |i| format!("counted {}", i.count),
    );
    for (b, a) in before
        .interrupts
        .iter()
        .filter_map(|b| after.interrupts.iter().find(|a| (&a.irq, &a.name) == (&b.irq, &b.name)).map(|a| (b, a)))
    {
        if a.count < b.count {
            f.add(
                Promise::T10,
                format!("count of interrupt {} {} fell from {} to {}", b.irq, b.name, b.count, a.count),
            );
        }
    }

    if let (Some(b), Some(a)) = (before.grants.seen(), after.grants.seen()) {
        f.same(Promise::T5, "grant table's version", Some(&b.version), Some(&a.version));
        f.same(Promise::T5, "grant table's frames", Some(&b.frames), Some(&a.frames));
        f.same(Promise::T5, "grant table's most frames", Some(&b.max_frames), Some(&a.max_frames));
        f.same(Promise::T5, "own grants", b.own.seen(), a.own.seen());
    }
    if let (Some(b), Some(a)) = (before.hvm_params.seen(), after.hvm_params.seen()) {
        f.same_list(
            (Promise::T6, "HVM parameter"),
            b.iter().map(|p| (p.index, p)),
            a.iter().map(|p| (p.index, p)),
            |x, y| x == y,
            |_| false,
            |p| format!("{:#x}", p.value),
        );
    }
    if let (Some(b), Some(a)) = (before.runstates.seen(), after.runstates.seen()) {
        for (b, a) in b.iter().filter_map(|b| a.iter().find(|a| a.vcpu == b.vcpu).map(|a| (b, a))) {
            if a.entry_ns < b.entry_ns || a.time_ns.iter().zip(&b.time_ns).any(|(a, b)| a < b) {
                f.add(Promise::T6, format!("runstate of vCPU {} went back: was {b:?}, is {a:?}", b.vcpu));
            }
        }
    }

    let (b, a) = (&before.clocks, &after.clocks);
    for a in &a.backwards {
        let had = b.backwards.iter().find(|b| b.clock == a.clock).map_or(0, |b| b.count);
        if a.count > had {
            f.add(Promise::T7, format!("{:?} went back {} times, by {} at most", a.clock, a.count - had, a.most));
        }
    }
    if a.steal_backwards > b.steal_backwards {
        f.add(Promise::T7, format!("steal time went back {} times", a.steal_backwards - b.steal_backwards));
    }
    f.same(Promise::T7, "clock source", Some(&b.clocksource), Some(&a.clocksource));

    f.same_list(
        (Promise::T9, "link"),
        before.links.iter().map(|l| (l.dev.as_str(), l)),
        after.links.iter().map(|l| (l.dev.as_str(), l)),
        |x, y| x == y,
        |_| false,
        |l| format!("{} {} MTU {}, {} carrier changes", l.state, l.mac, l.mtu, l.carrier_changes),
    );

    let (b, a) = (&before.counters, &after.counters);
    for (promise, what, b, a) in [
        (Promise::T3, "store errors", b.store_errors, a.store_errors),
        (Promise::T3, "failed transactions", b.tx_failed, a.tx_failed),
        (Promise::T4, "events lost on the own channel", b.events_lost, a.events_lost),
        (Promise::T5, "failed copies through own grants", b.grant_bad, a.grant_bad),
        (Promise::T8, "wrong disk sectors or failed requests", b.disk_bad, a.disk_bad),
        (Promise::T9, "TCP streams broken", b.tcp_breaks, a.tcp_breaks),
        (Promise::T10, "wrong pages", b.pages_bad, a.pages_bad),
        (Promise::T10, "wrong registers", b.regs_bad, a.regs_bad),
    ] {
        if a > b {
            f.add(promise, format!("{what}: {}", a - b));
        }
    }
    f.0
}

/// Whether the loads behind a promise ran between the two snapshots; the text says what they did, or what was missing.
fn exercised(promise: Promise, e: &Evidence<'_>) -> Result<String, String> {
    let (b, a) = (e.before, e.after);
    let (bc, ac) = (&b.counters, &a.counters);
    let grew = |what: &str, b: u64, a: u64| {
        if a > b { Ok(format!("{} {what}", a - b)) } else { Err(format!("no {what} between the snapshots")) }
    };
    fn both<T>(what: &str, b: &crate::report::Item<T>, a: &crate::report::Item<T>) -> Result<(), String> {
        match (b.why_absent(), a.why_absent()) {
            (None, None) => Ok(()),
            (Some(why), _) | (_, Some(why)) => Err(format!("{what} could not be read: {why}")),
        }
    }
    match promise {
        Promise::T1 => {
            both("domid", &b.identity.domid_store, &a.identity.domid_store)?;
            both("uuid", &b.identity.uuid_store, &a.identity.uuid_store)?;
            Ok("domid, uuid and name compared".into())
        }
        Promise::T2 => {
            both("the store", &b.store, &a.store)?;
            if !a.watches.iter().any(|w| !w.load) {
                return Err("no watch was held".into());
            }
            let nodes = b.store.seen().map_or(0, Vec::len);
            Ok(format!("{nodes} nodes compared, {} watches held", a.watches.len()))
        }
        Promise::T3 => {
            let events = grew("events of the load's watch", bc.watch_events, ac.watch_events)?;
            let tx = grew("held transactions ended", bc.tx_committed + bc.tx_again, ac.tx_committed + ac.tx_again)
                .or_else(|e| if ac.tx_failed > bc.tx_failed { Ok(String::new()) } else { Err(e) })?;
            Ok(format!("{events}, {tx} ({} by EAGAIN)", ac.tx_again - bc.tx_again.min(ac.tx_again)))
        }
        Promise::T4 => {
            both("event channels", &b.ports, &a.ports)?;
            let events = grew("events through the own channel", bc.events_back, ac.events_back)?;
            Ok(format!("{} ports compared, {events}", b.ports.seen().map_or(0, Vec::len)))
        }
        Promise::T5 => {
            both("the grant table", &b.grants, &a.grants)?;
            grew("copies through own grants", bc.grant_copies + bc.grant_bad, ac.grant_copies + ac.grant_bad)
        }
        Promise::T6 => {
            both("HVM parameters", &b.hvm_params, &a.hvm_params)?;
            both("runstates", &b.runstates, &a.runstates)?;
            Ok("HVM parameters and runstates compared".into())
        }
        Promise::T7 => {
            let reads = grew("readings of the clocks", bc.clock_reads, ac.clock_reads)?;
            let ticks = grew("ticks of the fine timer", bc.ticks, ac.ticks)?;
            Ok(format!("{reads}, {ticks}"))
        }
        Promise::T8 => {
            let journal = grew("journal records acknowledged", bc.journal, ac.journal)?;
            let rewrites = grew("blocks rewritten", bc.rewrites, ac.rewrites)?;
            let rereads = grew("blocks read back", bc.rereads, ac.rereads)?;
            let Some(faults) = &e.outside.journal else {
                return Err("nobody looked at the journal on the disk".into());
            };
            Ok(format!("{journal}, {rewrites}, {rereads}, {} faults of the journal on the disk", faults.len()))
        }
        Promise::T9 => {
            let tcp = grew("TCP frames came back", bc.tcp_back, ac.tcp_back)?;
            let udp = grew("UDP datagrams came back", bc.udp_back, ac.udp_back)?;
            Ok(format!("{tcp}, {udp}"))
        }
        Promise::T10 => {
            let pages = grew("pages checked", bc.pages, ac.pages)?;
            let regs = grew("sets of registers checked", bc.regs, ac.regs)?;
            Ok(format!("{pages}, {regs}"))
        }
    }
}

/// A clock that is given up for slow reading is named so in the same run of the kernel's clock watchdog, printing included.
const SAME_WATCHDOG_RUN_US: u64 = 500_000;

/// Applies the rule for lockup, stall and clock lines (see the module): the lines charged to the move, and the emulator's.
pub fn sort_stalls<'a>(
    lines: impl Iterator<Item = &'a KernelLine>,
    window: Option<Window>,
    calm: &Calm,
) -> (Vec<&'a KernelLine>, Vec<&'a KernelLine>) {
    let stalls: Vec<_> = lines.filter(|l| l.class.by_starving()).collect();
    let slow_reading: Vec<u64> = stalls.iter().filter(|l| klog::gives_up_reading(&l.text)).map(|l| l.at_us).collect();
    let stalls = stalls.into_iter();
    let Some(window) = window else { return (Vec::new(), stalls.collect()) };
    let end = window.to_ns.saturating_add(SETTLE_NS);
    let (within, mut emulator): (Vec<_>, Vec<_>) = stalls.partition(|l| {
        let at = l.at_us.saturating_mul(1000);
        let outcome_of_slowness = klog::drops_a_clock(&l.text)
            && slow_reading.iter().any(|slow| l.at_us.saturating_sub(*slow) <= SAME_WATCHDOG_RUN_US);
        if l.class == LineClass::Slow || outcome_of_slowness {
            return false;
        }
        let long = reaches_back_ms(l.class, &l.text).saturating_mul(1_000_000);
        at >= window.from_ns && at.saturating_sub(long) <= end
    });
    let minutes = end.saturating_sub(window.from_ns) as f64 / 60e9;
    let allowed = (calm.stalls_per_minute * minutes).ceil() as usize;
    if within.len() > allowed {
        (within, emulator)
    } else {
        emulator.extend(within);
        (Vec::new(), emulator)
    }
}

/// Keeps the first few pieces of evidence of each kind, and counts the rest. Evidence of one kind begins with the same
/// two words, the time put aside.
fn shorten(evidence: &mut Vec<String>) {
    let kind_of = |text: &str| {
        let timeless = text.strip_prefix("at ").and_then(|t| t.split_once(": ")).map_or(text, |(_, rest)| rest);
        timeless.split(' ').take(2).collect::<Vec<_>>().join(" ")
    };
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    let all = evidence.len();
    evidence.retain(|e| {
        let n = kinds.entry(kind_of(e)).or_default();
        *n += 1;
        *n <= MOST_OF_A_KIND
    });
    evidence.truncate(MOST_EVIDENCE);
    if all > evidence.len() {
        evidence.push(format!("and {} more like these", all - evidence.len()));
    }
}

/// The verdict on each promise, in order.
pub fn judge(e: &Evidence<'_>) -> Vec<Verdict> {
    let mut broken: BTreeMap<Promise, Vec<String>> = BTreeMap::new();
    let mut noted: BTreeMap<Promise, Vec<String>> = BTreeMap::new();
    for f in diff(e.before, e.after) {
        broken.entry(f.promise).or_default().push(f.evidence);
    }
    let since = e.before.clocks.last.mono_ns;
    for anomaly in e.anomalies.iter().filter(|a| a.mono_ns > since) {
        match &anomaly.what {
            // Judged below, by the window.
            Noticed::ClockGap(_) | Noticed::KernelLine(_) => continue,
            Noticed::StoreNode { path, .. } if may_change(path).is_some() => continue,
            Noticed::WatchFired { path, .. } if may_change(path).is_some() => continue,
            what => {
                let evidence = format!("at {:.3} s: {what}", anomaly.mono_ns as f64 / 1e9);
                broken.entry(what.promise()).or_default().push(evidence);
            }
        }
    }

    let (charged, emulator) = sort_stalls(new_lines(e.before, e.after), e.window, &e.calm);
    for line in charged {
        broken.entry(Promise::T7).or_default().push(Noticed::KernelLine(line.clone()).to_string());
    }
    for line in emulator {
        let text = format!("put down to emulation: {}", Noticed::KernelLine(line.clone()));
        noted.entry(Promise::T7).or_default().push(text);
    }

    if let Some(window) = e.window {
        judge_gaps(e, window, &mut broken, &mut noted);
    }
    if let Some(faults) = &e.outside.journal {
        broken.entry(Promise::T8).or_default().extend(faults.iter().map(ToString::to_string));
    }
    if e.outside.tcp_alive == Some(false) {
        broken.entry(Promise::T9).or_default().push("the peer's end of the TCP stream is closed".into());
    }
    match (e.outside.receive_only_sent_after, e.outside.receive_only_got_after) {
        (Some(sent), Some(0)) if sent > 0 => broken
            .entry(Promise::T9)
            .or_default()
            .push(format!("none of {sent} datagrams to the receive-only address arrived after the move")),
        (Some(sent), Some(got)) if sent > 0 => noted
            .entry(Promise::T9)
            .or_default()
            .push(format!("{got} of {sent} datagrams to the receive-only address arrived after the move")),
        _ => noted.entry(Promise::T9).or_default().push("the receive-only address was not used".into()),
    }

    Promise::ALL
        .into_iter()
        .map(|promise| {
            let mut evidence = broken.remove(&promise).unwrap_or_default();
            evidence.dedup();
            shorten(&mut evidence);
            let done = exercised(promise, e);
            let outcome = match (&evidence[..], &done) {
                ([_, ..], _) => Outcome::Fail,
                ([], Ok(_)) => Outcome::Pass,
                ([], Err(_)) => Outcome::NotExercised,
            };
            evidence.push(done.unwrap_or_else(|missing| missing));
            evidence.extend(noted.remove(&promise).unwrap_or_default().into_iter().take(MOST_EVIDENCE));
            Verdict { promise, outcome, evidence }
        })
        .collect()
}

/// T7: the gaps of the clocks around the move.
fn judge_gaps(
    e: &Evidence<'_>,
    window: Window,
    broken: &mut BTreeMap<Promise, Vec<String>>,
    noted: &mut BTreeMap<Promise, Vec<String>>,
) {
    let end = window.to_ns.saturating_add(SETTLE_NS);
    let gap = e
        .after
        .clocks
        .gaps
        .iter()
        .filter(|g| g.at_ns <= end && g.at_ns.saturating_add(g.mono_ns) >= window.from_ns)
        .max_by_key(|g| g.mono_ns);
    let Some(gap) = gap else {
        noted.entry(Promise::T7).or_default().push("no gap of the clocks in the move's window".into());
        return;
    };
    let ms = |ns: u64| ns as f64 / 1e6;
    let text = format!(
        "largest gap of the clocks in the move's window: {:.3} ms by Monotonic, {:.3} by Boottime, {:.3} by Realtime, {} TSC ticks",
        ms(gap.mono_ns),
        gap.boot_ns as f64 / 1e6,
        gap.real_ns as f64 / 1e6,
        gap.tsc
    );
    match e.outside.blackout_ns {
        None => noted.entry(Promise::T7).or_default().push(format!("{text}; the blackout is not known")),
        Some(blackout) => {
            let most = blackout.saturating_add(e.calm.gap_ns).saturating_add(GAP_SLACK_NS);
            let text = format!(
                "{text}; blackout seen from outside {:.3} ms, largest gap of the control run {:.3} ms",
                ms(blackout),
                ms(e.calm.gap_ns)
            );
            let forwards = [gap.mono_ns, gap.boot_ns.max(0) as u64, gap.real_ns.max(0) as u64];
            let into = if forwards.iter().any(|g| *g > most) { broken } else { noted };
            into.entry(Promise::T7).or_default().push(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::*;

    fn seen<T>(t: T) -> Item<T> {
        Item::Seen(t)
    }

    fn node(path: &str, value: &str) -> StoreNode {
        StoreNode { path: path.into(), value: value.into(), perms: "n5".into() }
    }

    /// A guest in which all can be seen.
    fn calm_guest() -> Snapshot {
        let port = |port, status| Port { port, status, vcpu: 0, remote_dom: Some(0), remote_port: Some(9), irq: None };
        Snapshot {
            reason: "asked".into(),
            counters: Beat { journal: 1, ..Beat::default() },
            identity: Identity {
                domid_store: seen(5),
                domid_cpuid: seen(5),
                uuid_kernel: seen("u".into()),
                uuid_store: seen("u".into()),
                name: seen("g".into()),
                xen_version: seen("4.17".into()),
                cpuid: vec![CpuidLeaf { leaf: 1, sub: 0, out: [1, 2, 3, 4] }],
            },
            store: seen(vec![
                node("/local/domain/0/backend/vbd/5/51712/state", "4"),
                node("/local/domain/5/console/tty", "/dev/pts/1"),
                node("/local/domain/5/data/witness/watched", "1"),
                node("/local/domain/5/domid", "5"),
            ]),
            watches: vec![
                WatchState {
                    path: "/local/domain/0/backend/vbd/5/51712/state".into(),
                    token: "w1".into(),
                    load: false,
                    events: 0,
                    last: vec![],
                },
                WatchState { path: "data".into(), token: "load".into(), load: true, events: 3, last: vec![] },
            ],
            ports: seen(vec![port(1, 2), port(2, 2)]),
            grants: seen(Grants {
                version: 1,
                frames: 4,
                max_frames: 32,
                own: seen(vec![OwnGrant { gref: 700, domid: 5 }]),
            }),
            hvm_params: seen(vec![HvmParam { index: 0, value: 7 }]),
            runstates: seen(vec![Runstate { vcpu: 0, entry_ns: 10, time_ns: [1, 2, 3, 4] }]),
            interrupts: vec![Interrupt { irq: "24".into(), count: 5, name: "xen-dyn -event xenbus".into() }],
            kernel_log: KernelLog { lines: vec![], dropped: 0, last_seq: 100 },
            links: vec![Link {
                dev: "eth0".into(),
                mac: "m".into(),
                mtu: 1500,
                state: "up".into(),
                carrier_changes: 2,
            }],
            devices: vec![Device { name: "vbd-51712".into(), state: "Connected".into(), driver: "vbd".into() }],
            clocks: Clocks {
                last: ClockReading { mono_ns: 10_000_000_000, ..ClockReading::default() },
                ..Clocks::default()
            },
            mem_total_kib: 1000,
        }
    }

    /// The same guest 20 s later, with every load gone on.
    fn later() -> Snapshot {
        let mut s = calm_guest();
        s.counters = Beat {
            watch_events: 9,
            watch_writes: 9,
            tx_committed: 2,
            grant_copies: 5,
            events_sent: 20,
            events_back: 20,
            clock_reads: 100,
            ticks: 100,
            pages: 10,
            regs: 10,
            journal: 100,
            rewrites: 100,
            rereads: 50,
            tcp_back: 100,
            udp_back: 100,
            ..s.counters
        };
        s.watches[1].events = 99;
        s.interrupts[0].count = 50;
        s.kernel_log.last_seq = 200;
        s.clocks.last.mono_ns = 30_000_000_000;
        s
    }

    const WINDOW: Window = Window { from_ns: 15_000_000_000, to_ns: 18_000_000_000 };

    fn verdicts(after: &Snapshot, anomalies: &[Anomaly], window: Option<Window>) -> Vec<Verdict> {
        let outside = Outside {
            blackout_ns: Some(200_000_000),
            tcp_alive: Some(true),
            receive_only_sent_after: Some(10),
            receive_only_got_after: Some(10),
            journal: Some(vec![]),
        };
        let calm = Calm { seconds: 60.0, stalls_per_minute: 0.0, gap_ns: 50_000_000 };
        judge(&Evidence { before: &calm_guest(), after, anomalies, window, outside, calm })
    }

    fn failed(v: &[Verdict]) -> Vec<Promise> {
        v.iter().filter(|v| v.outcome == Outcome::Fail).map(|v| v.promise).collect()
    }

    #[test]
    fn an_undisturbed_guest_passes_all() {
        for window in [None, Some(WINDOW)] {
            let v = verdicts(&later(), &[], window);
            assert!(v.iter().all(|v| v.outcome == Outcome::Pass), "{v:#?}");
            assert_eq!(v.iter().map(|v| v.promise).collect::<Vec<_>>(), Promise::ALL);
        }
    }

    #[test]
    fn idle_loads_are_not_exercised() {
        let after = Snapshot { counters: calm_guest().counters, ..later() };
        let v = verdicts(&after, &[], None);
        let idle: Vec<Promise> = v.iter().filter(|v| v.outcome == Outcome::NotExercised).map(|v| v.promise).collect();
        assert_eq!(idle, [Promise::T3, Promise::T4, Promise::T5, Promise::T7, Promise::T8, Promise::T9, Promise::T10]);
    }

    #[test]
    fn what_cannot_be_seen_is_not_passed() {
        let mut after = later();
        after.ports = Item::Absent("EPERM".into());
        let v = verdicts(&after, &[], None);
        assert_eq!(v[3].outcome, Outcome::NotExercised);
        assert!(v[3].evidence[0].contains("EPERM"), "{:?}", v[3].evidence);
    }

    #[test]
    fn one_change_fails_one_promise() {
        type Change = fn(&mut Snapshot);
        let changes: &[(Promise, Change)] = &[
            (Promise::T1, |s| s.identity.domid_cpuid = seen(6)),
            (Promise::T1, |s| s.identity.name = seen("x".into())),
            (Promise::T2, |s| {
                if let Item::Seen(n) = &mut s.store {
                    n[0].value = "5".into();
                }
            }),
            (Promise::T2, |s| {
                if let Item::Seen(n) = &mut s.store {
                    n[3].perms = "b5".into();
                }
            }),
            (Promise::T2, |s| {
                if let Item::Seen(n) = &mut s.store {
                    n.remove(3);
                }
            }),
            (Promise::T2, |s| s.watches[0].events = 1),
            (Promise::T2, |s| s.devices[0].state = "Closing".into()),
            (Promise::T3, |s| s.counters.tx_failed = 1),
            (Promise::T4, |s| {
                if let Item::Seen(p) = &mut s.ports {
                    p[1].port = 3;
                }
            }),
            (Promise::T4, |s| {
                if let Item::Seen(p) = &mut s.ports {
                    p[1].vcpu = 1;
                }
            }),
            (Promise::T4, |s| s.interrupts[0].irq = "25".into()),
            (Promise::T4, |s| s.counters.events_lost = 1),
            (Promise::T5, |s| s.counters.grant_bad = 1),
            (Promise::T5, |s| {
                if let Item::Seen(g) = &mut s.grants {
                    g.frames = 1;
                }
            }),
            (Promise::T6, |s| s.hvm_params = seen(vec![HvmParam { index: 0, value: 8 }])),
            (Promise::T6, |s| s.runstates = seen(vec![Runstate { vcpu: 0, entry_ns: 9, time_ns: [1, 2, 3, 4] }])),
            (Promise::T7, |s| {
                s.clocks.backwards = vec![Backwards { clock: Clock::Tsc, count: 1, most: 5 }];
            }),
            (Promise::T7, |s| s.clocks.steal_backwards = 1),
            (Promise::T8, |s| s.counters.disk_bad = 1),
            (Promise::T9, |s| s.links[0].carrier_changes = 4),
            (Promise::T9, |s| s.counters.tcp_breaks = 1),
            (Promise::T10, |s| s.counters.pages_bad = 1),
            (Promise::T10, |s| s.identity.cpuid[0].out[2] = 0),
        ];
        for (i, (promise, change)) in changes.iter().enumerate() {
            let mut after = later();
            change(&mut after);
            assert_eq!(failed(&verdicts(&after, &[], Some(WINDOW))), [*promise], "change {i}");
        }
    }

    #[test]
    fn host_bound_nodes_and_remote_ports_may_change() {
        let mut after = later();
        if let Item::Seen(n) = &mut after.store {
            n[1].value = "/dev/pts/7".into();
            n[2].value = "200".into();
        }
        if let Item::Seen(p) = &mut after.ports {
            p[0].remote_port = Some(77);
        }
        assert_eq!(failed(&verdicts(&after, &[], Some(WINDOW))), []);
    }

    fn line(at_s: u64, class: LineClass, text: &str) -> KernelLine {
        KernelLine { seq: 150, at_us: at_s * 1_000_000, level: 4, class, text: text.into() }
    }

    #[test]
    fn suspend_lines_fail_and_old_ones_do_not_count() {
        let mut after = later();
        after.kernel_log.lines = vec![line(16, LineClass::Suspend, "Freezing user space processes")];
        assert_eq!(failed(&verdicts(&after, &[], Some(WINDOW))), [Promise::T2]);
        after.kernel_log.lines[0].seq = 100;
        assert_eq!(failed(&verdicts(&after, &[], Some(WINDOW))), []);
    }

    #[test]
    fn stall_lines_follow_the_written_rule() {
        let text = "watchdog: BUG: soft lockup - CPU#0 stuck for 2s!";
        let mut after = later();
        let mut calm = Calm { seconds: 60.0, stalls_per_minute: 0.0, gap_ns: 0 };
        // Within the window: the move's.
        after.kernel_log.lines = vec![line(17, LineClass::Stall, text)];
        assert_eq!(failed(&verdicts(&after, &[], Some(WINDOW))), [Promise::T7]);
        // No move, before the move, long after it: the emulator's.
        assert_eq!(failed(&verdicts(&after, &[], None)), []);
        for at in [14, 26] {
            after.kernel_log.lines = vec![line(at, LineClass::Stall, text)];
            let v = verdicts(&after, &[], Some(WINDOW));
            assert_eq!(failed(&v), [], "at {at} s");
            assert!(v[6].evidence.iter().any(|e| e.contains("put down to emulation")), "{:?}", v[6]);
        }
        // Long after, but it speaks of a time that reaches into the window.
        after.kernel_log.lines = vec![line(26, LineClass::Stall, "soft lockup - CPU#0 stuck for 22s!")];
        assert_eq!(failed(&verdicts(&after, &[], Some(WINDOW))), [Promise::T7]);
        // A slow interrupt bites nobody.
        after.kernel_log.lines = vec![line(17, LineClass::Slow, "hrtimer: interrupt took 37948591 ns")];
        let v = verdicts(&after, &[], Some(WINDOW));
        assert_eq!(failed(&v), []);
        assert!(v[6].evidence.iter().any(|e| e.contains("hrtimer")), "{:?}", v[6]);
        // The kernel gives a clock up because reading it took long, which is no wrong clock; one that it found wrong is.
        let mut slow = line(
            17,
            LineClass::Slow,
            "clocksource: timekeeping watchdog on CPU0: xen read-back delay of 115362ns, attempt 2, marking unstable",
        );
        let dropped = line(17, LineClass::Clock, "tsc: Marking TSC unstable due to clocksource watchdog");
        after.kernel_log.lines = vec![slow.clone(), dropped.clone()];
        assert_eq!(failed(&verdicts(&after, &[], Some(WINDOW))), []);
        slow.text = "clocksource: wd-tsc-wd read-back delay of 157081ns, clock-skew test skipped!".into();
        after.kernel_log.lines = vec![slow, dropped];
        assert_eq!(failed(&verdicts(&after, &[], Some(WINDOW))), [Promise::T7]);
        // The control run has as many.
        calm.stalls_per_minute = 2.0;
        let lines = [line(17, LineClass::Stall, text), line(18, LineClass::Stall, text)];
        assert_eq!(sort_stalls(lines[..1].iter(), Some(WINDOW), &calm).0.len(), 0);
        assert_eq!(sort_stalls(lines.iter(), Some(WINDOW), &calm).0.len(), 2);
    }

    #[test]
    fn a_gap_longer_than_the_blackout_fails() {
        let mut after = later();
        let mut gap =
            Gap { at_ns: 16_000_000_000, mono_ns: 240_000_000, boot_ns: 240_000_000, real_ns: 240_000_000, tsc: 1 };
        after.clocks.gaps = vec![gap];
        assert_eq!(failed(&verdicts(&after, &[], Some(WINDOW))), []);
        gap.real_ns = 1_000_000_000;
        after.clocks.gaps = vec![gap];
        assert_eq!(failed(&verdicts(&after, &[], Some(WINDOW))), [Promise::T7]);
        assert_eq!(failed(&verdicts(&after, &[], None)), []);
    }

    #[test]
    fn much_evidence_of_one_kind_does_not_hide_another() {
        let mut after = later();
        if let Item::Seen(n) = &mut after.store {
            n.extend((0..50).map(|i| node(&format!("/local/domain/5/x{i}"), "")));
        }
        after.kernel_log.lines = vec![line(16, LineClass::Suspend, "Freezing user space processes")];
        let v = verdicts(&after, &[], Some(WINDOW));
        let told: Vec<&str> = v[1].evidence.iter().map(String::as_str).collect();
        assert!(told[0].contains("Freezing"), "{told:?}");
        assert_eq!(told[1], "store node /local/domain/5/x0 came: \"\" [n5]");
        assert_eq!(told[5], "and 46 more like these");
    }

    #[test]
    fn anomalies_count_from_the_first_snapshot_on() {
        let what = Noticed::WatchFired { watch: "w".into(), path: "/local/domain/0/backend/vbd/5/1/state".into() };
        let early = [Anomaly { mono_ns: 5, what: what.clone() }];
        assert_eq!(failed(&verdicts(&later(), &early, None)), []);
        let late = [Anomaly { mono_ns: 20_000_000_000, what }];
        assert_eq!(failed(&verdicts(&later(), &late, None)), [Promise::T2]);
    }

    #[test]
    fn outside_evidence_counts() {
        let before = calm_guest();
        let after = later();
        let judge_with = |outside: Outside| {
            judge(&Evidence {
                before: &before,
                after: &after,
                anomalies: &[],
                window: None,
                outside,
                calm: Calm::default(),
            })
        };
        let fault = JournalFault::Read { record: 1, error: "x".into() };
        let v = judge_with(Outside {
            tcp_alive: Some(false),
            receive_only_sent_after: Some(3),
            receive_only_got_after: Some(0),
            journal: Some(vec![fault]),
            ..Outside::default()
        });
        assert_eq!(failed(&v), [Promise::T8, Promise::T9]);
        assert_eq!(v[8].evidence.len(), 3);
        assert_eq!(judge_with(Outside::default())[7].outcome, Outcome::NotExercised);
    }
}
