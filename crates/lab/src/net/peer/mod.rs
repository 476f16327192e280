//! The third machine on the switch: a TCP/IP host inside this process that talks with the witnesses, answers their streams,
//! times every packet from outside, and keeps what they report.
//!
//! The wire form (ports, frames, report lines) is the witness's own: [`witness::wire`].

mod raw;
mod stack;

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;
use witness::disk::JOURNAL_SLOTS;
use witness::report::{Beat, Body, Envelope, Final, Hello, Snapshot};
use witness::wire::Command;

use self::stack::Stack;
use super::flow::{Counts, Numbers, Silence, Silences};
use super::ports::LocalPort;
use super::{Mac, RunClock};

/// Snapshots that are kept of one guest; the first always is.
const MAX_SNAPSHOTS: usize = 64;
/// Anomalies that are kept of one guest.
const MAX_ANOMALIES: usize = 2000;

/// A guest with a witness, as the peer knows it.
#[derive(Clone, Debug)]
pub struct GuestLink {
    pub name: String,
    /// Address of its first card.
    pub addr: Ipv4Addr,
    /// Card and address that only receive, if it has them.
    pub quiet: Option<(Mac, Ipv4Addr)>,
    /// What the peer sends it.
    pub rates: Rates,
}

/// What the peer sends to one guest, packets a second; 0 is none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    /// Frames on the TCP connection that the peer opens; the guest sends them back.
    pub tcp: u32,
    /// Datagrams that the guest sends back.
    pub udp: u32,
    /// Datagrams to the address that only receives.
    pub quiet: u32,
}

/// Where the peer lives, and with whom it talks.
#[derive(Clone, Debug)]
pub struct PeerConfig {
    pub mac: Mac,
    pub addr: Ipv4Addr,
    /// Length of the network's prefix.
    pub prefix: u8,
    /// Base port of [`witness::wire::Service`].
    pub port: u16,
    pub guests: Vec<GuestLink>,
    /// Every report goes as a line to `reports-GUEST.jsonl` in this folder.
    pub log_dir: Option<PathBuf>,
}

/// One direction or echo of a stream.
#[derive(Debug, Default)]
struct Flow {
    numbers: Numbers,
    silences: Silences,
    sent: u64,
    /// The sender's number of the run, to notice that it was started anew.
    run: Option<u64>,
    restarts: u64,
}

impl Flow {
    /// A numbered packet came in.
    fn came(&mut self, now: Duration, run: u64, n: u64, stamp: u64) {
        if self.run.is_some_and(|r| r != run) {
            self.restarts += 1;
            self.numbers.restart();
        }
        self.run = Some(run);
        self.silences.heard(now);
        self.numbers.came(n, stamp);
    }

    fn report(&self, now: Duration) -> FlowReport {
        FlowReport {
            sent: self.sent,
            counts: self.numbers.counts(),
            restarts: self.restarts,
            silences: self.silences.longest(now),
        }
    }
}

/// One stream with one guest, as the peer saw it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct FlowReport {
    /// Packets that the peer sent on it.
    pub sent: u64,
    /// What came in.
    pub counts: Counts,
    /// Times that the guest's end began anew with number 1.
    pub restarts: u64,
    /// The longest first.
    pub silences: Vec<Silence>,
}

impl FlowReport {
    /// The longest silence.
    pub fn longest(&self) -> Option<Duration> {
        self.silences.first().map(Silence::length)
    }

    /// The longest silence that touches a span of time.
    pub fn longest_within(&self, from: Duration, to: Duration) -> Option<Silence> {
        self.silences.iter().find(|s| s.from < to && s.to > from).copied()
    }
}

/// A record that the guest said is on the disk, and when the peer heard of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Acknowledged {
    pub record: u64,
    pub crc: u32,
    pub at: Duration,
}

/// An [`Envelope`]'s body and when it came.
#[derive(Clone, Debug, Serialize)]
pub struct Received<T> {
    /// On the run's time line.
    pub at: Duration,
    /// CLOCK_MONOTONIC of the guest when it was made, ns.
    pub mono_ns: u64,
    /// CLOCK_REALTIME of the guest when it was made, ns.
    pub real_ns: u64,
    pub body: T,
}

/// Everything that the peer knows of one guest.
#[derive(Debug, Default)]
struct Known {
    udp_stream: Flow,
    tcp_stream: Flow,
    tcp_echo: Flow,
    udp_echo: Flow,
    quiet: Flow,
    /// TCP connections of the guest to the stream service.
    tcp_accepted: u64,
    /// TCP connections with the guest that ended by a reset or a close that the peer did not ask for.
    tcp_broken: u64,
    /// Nothing more is expected of the guest: what ends now was not broken.
    resting: bool,
    run: Option<u64>,
    /// Times that a report came with another run: the guest was started anew.
    restarts: u64,
    seen: SeenReports,
    reports: u64,
    bad_reports: u64,
    last_bad: Option<String>,
    hello: Option<Received<Hello>>,
    beats: VecDeque<Received<Beat>>,
    anomalies: Vec<Received<witness::report::Anomaly>>,
    anomalies_dropped: u64,
    snapshots: Vec<Received<Snapshot>>,
    last: Option<Received<Final>>,
    journal: BTreeMap<u64, Acknowledged>,
    log: Option<BufWriter<File>>,
}

/// Which report numbers of a run came already: the same report may come by UDP and by TCP.
#[derive(Debug, Default)]
struct SeenReports(Numbers);

impl SeenReports {
    fn is_new(&mut self, n: u64) -> bool {
        let before = self.0.counts().received;
        self.0.came(n, 0);
        self.0.counts().received > before
    }
}

/// Beats that are kept of one guest: half an hour of the default rate.
const MAX_BEATS: usize = 1800;

impl Known {
    /// A connection ended that the peer did not end.
    fn broke(&mut self) {
        if !self.resting {
            self.tcp_broken += 1;
        }
    }

    fn report(&mut self, now: Duration, bytes: &[u8]) {
        let envelope: Envelope = match witness::wire::parse_report(bytes) {
            Ok(envelope) => envelope,
            Err(error) => {
                self.bad_reports += 1;
                self.last_bad = Some(error.to_string());
                return;
            }
        };
        if self.run.is_some_and(|r| r != envelope.run) {
            self.restarts += 1;
            self.seen = SeenReports::default();
        }
        self.run = Some(envelope.run);
        if !self.seen.is_new(envelope.seq) {
            return;
        }
        self.reports += 1;
        if let Some(log) = &mut self.log {
            let written = log.write_all(bytes).and_then(|()| log.write_all(b"\n"));
            if let Err(error) = written {
                tracing::warn!(%error, "a report could not be written to the run's folder");
                self.log = None;
            }
        }
        let (mono_ns, real_ns) = (envelope.mono_ns, envelope.real_ns);
        match envelope.body {
            Body::Hello(body) => self.hello = Some(Received { at: now, mono_ns, real_ns, body }),
            Body::Beat(body) => {
                if self.beats.len() == MAX_BEATS {
                    self.beats.pop_front();
                }
                self.beats.push_back(Received { at: now, mono_ns, real_ns, body });
            }
            Body::Anomaly(body) if self.anomalies.len() < MAX_ANOMALIES => {
                self.anomalies.push(Received { at: now, mono_ns, real_ns, body });
            }
            Body::Anomaly(_) => self.anomalies_dropped += 1,
            Body::Journal(ack) => {
                let acknowledged = Acknowledged { record: ack.record, crc: ack.crc, at: now };
                self.journal.insert(ack.record, acknowledged);
                while self.journal.len() as u64 > JOURNAL_SLOTS {
                    self.journal.pop_first();
                }
            }
            Body::Snapshot(body) => {
                if self.snapshots.len() == MAX_SNAPSHOTS {
                    self.snapshots.remove(1);
                }
                self.snapshots.push(Received { at: now, mono_ns, real_ns, body: *body });
            }
            Body::Final(body) => self.last = Some(Received { at: now, mono_ns, real_ns, body: *body }),
        }
    }
}

/// Everything that the peer knows of one guest, for verdict and report.
#[derive(Clone, Debug, Default, Serialize)]
pub struct GuestView {
    pub name: String,
    /// Guest's UDP stream, as it arrives here.
    pub udp_stream: FlowReport,
    /// Guest's TCP stream, as it arrives here.
    pub tcp_stream: FlowReport,
    /// The peer's TCP stream, as the guest's echo of it arrives here.
    pub tcp_echo: FlowReport,
    /// The peer's UDP stream, as the guest's echo of it arrives here.
    pub udp_echo: FlowReport,
    /// Datagrams sent to the address that only receives.
    pub quiet_sent: u64,
    /// So many of them a second; 0 if the guest has no such address.
    pub quiet_rate: f64,
    /// Stream connections that the guest opened: more than one is a connection that did not go on.
    pub tcp_accepted: u64,
    /// Connections that broke.
    pub tcp_broken: u64,
    /// Times that the guest was started anew.
    pub restarts: u64,
    pub reports: u64,
    pub bad_reports: u64,
    pub last_bad_report: Option<String>,
    #[serde(skip)]
    pub hello: Option<Received<Hello>>,
    #[serde(skip)]
    pub beats: Vec<Received<Beat>>,
    #[serde(skip)]
    pub anomalies: Vec<Received<witness::report::Anomaly>>,
    pub anomalies_dropped: u64,
    #[serde(skip)]
    pub snapshots: Vec<Received<Snapshot>>,
    #[serde(skip)]
    pub last: Option<Received<Final>>,
    /// The journal records that the guest said are on the disk, oldest first.
    #[serde(skip)]
    pub journal: Vec<Acknowledged>,
}

struct Shared {
    clock: RunClock,
    known: Mutex<Vec<(GuestLink, Known)>>,
    news: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<(GuestLink, Known)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` on what is known of the guest with that address.
    fn with(&self, addr: Ipv4Addr, f: impl FnOnce(&mut Known)) {
        if let Some((_, known)) = self.lock().iter_mut().find(|(link, _)| link.addr == addr) {
            f(known);
        }
    }
}

/// What the peer's thread is told.
enum Order {
    /// Send a command to the guest until it answers.
    Command(Ipv4Addr, Command),
    /// A guest is about to run: begin to talk with it.
    Begin(Ipv4Addr),
    /// Say nothing more to the guest and expect nothing more from it.
    Rest(Ipv4Addr),
    End,
}

/// The running peer. Dropping it ends its thread.
pub struct Peer {
    shared: Arc<Shared>,
    orders: Sender<Order>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer").finish_non_exhaustive()
    }
}

/// The witness did not do in time what was waited for.
#[derive(Debug, thiserror::Error)]
#[error("guest {guest}: {what} within {} s ({reports} reports came before)", limit.as_secs())]
pub struct NoReport {
    pub guest: String,
    pub what: &'static str,
    pub limit: Duration,
    pub reports: u64,
}

impl Peer {
    /// Starts the peer on its port of the switch.
    pub fn start(port: LocalPort, clock: RunClock, config: PeerConfig) -> io::Result<Self> {
        let mut known = Vec::new();
        for link in &config.guests {
            let log = match &config.log_dir {
                Some(dir) => Some(BufWriter::new(File::create(dir.join(format!("reports-{}.jsonl", link.name)))?)),
                None => None,
            };
            known.push((link.clone(), Known { log, ..Known::default() }));
        }
        let shared = Arc::new(Shared { clock, known: Mutex::new(known), news: Condvar::new() });
        let (orders, inbox) = mpsc::channel();
        let mut stack = Stack::new(port, clock, &config, shared.clone());
        let thread = std::thread::Builder::new().name("peer".to_owned()).spawn(move || stack.run(&inbox))?;
        Ok(Self { shared, orders, thread: Some(thread) })
    }

    fn order(&self, guest: &str, order: impl FnOnce(Ipv4Addr) -> Order) {
        let addr = self.shared.lock().iter().find(|(link, _)| link.name == guest).map(|(link, _)| link.addr);
        if let Some(addr) = addr {
            // The thread lives as long as this value; had it panicked, its message was already printed.
            let _ = self.orders.send(order(addr));
        }
    }

    /// Begins to talk with a guest (its streams start when it answers).
    pub fn begin(&self, guest: &str) {
        self.order(guest, Order::Begin);
    }

    /// Ends the streams with a guest; what follows counts neither as silence nor as loss.
    pub fn rest(&self, guest: &str) {
        self.order(guest, Order::Rest);
    }

    /// Sends a command to a witness, again and again until it answers.
    pub fn command(&self, guest: &str, command: Command) {
        self.order(guest, |addr| Order::Command(addr, command));
    }

    fn wait<T>(
        &self,
        guest: &str,
        what: &'static str,
        limit: Duration,
        mut ready: impl FnMut(&Known) -> Option<T>,
    ) -> Result<T, NoReport> {
        let until = Instant::now() + limit;
        let mut known = self.shared.lock();
        loop {
            let entry = known.iter().find(|(link, _)| link.name == guest).map(|(_, known)| known);
            if let Some(found) = entry.and_then(&mut ready) {
                return Ok(found);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let reports = entry.map_or(0, |k| k.reports);
                return Err(NoReport { guest: guest.to_owned(), what, limit, reports });
            }
            known = self
                .shared
                .news
                .wait_timeout(known, left)
                .map_or_else(|poison| poison.into_inner().0, |(guard, _)| guard);
        }
    }

    /// A report of a guest that came by its console.
    pub fn console_report(&self, guest: &str, line: &[u8]) {
        let now = self.shared.clock.now();
        if let Some((_, known)) = self.shared.lock().iter_mut().find(|(link, _)| link.name == guest) {
            known.report(now, line);
        }
    }

    /// Waits until the witness has sent `n` further beats.
    pub fn wait_beats(&self, guest: &str, n: u32, limit: Duration) -> Result<(), NoReport> {
        let now = self.shared.clock.now();
        let enough = |known: &Known| {
            let fresh = known.beats.iter().rev().take_while(|b| b.at > now).count();
            (fresh >= n as usize).then_some(())
        };
        self.wait(guest, "not enough reports came", limit, enough)
    }

    /// Asks for a snapshot and waits for one that was made after asking.
    pub fn snapshot(&self, guest: &str, limit: Duration) -> Result<Received<Snapshot>, NoReport> {
        let asked = self.shared.clock.now();
        self.command(guest, Command::Report);
        let fresh = |known: &Known| known.snapshots.last().filter(|s| s.at > asked).cloned();
        self.wait(guest, "no snapshot came", limit, fresh)
    }

    /// Asks for the final report and waits for it.
    pub fn finish(&self, guest: &str, limit: Duration) -> Result<(), NoReport> {
        self.command(guest, Command::Finish);
        let done = self.wait(guest, "no final report came", limit, |known| known.last.as_ref().map(drop));
        self.rest(guest);
        done
    }

    /// What is known so far of each guest.
    pub fn view(&self) -> Vec<GuestView> {
        let now = self.shared.clock.now();
        let known = self.shared.lock();
        known
            .iter()
            .map(|(link, k)| GuestView {
                name: link.name.clone(),
                udp_stream: k.udp_stream.report(now),
                tcp_stream: k.tcp_stream.report(now),
                tcp_echo: k.tcp_echo.report(now),
                udp_echo: k.udp_echo.report(now),
                quiet_sent: k.quiet.sent,
                quiet_rate: if link.quiet.is_some() { f64::from(link.rates.quiet) } else { 0.0 },
                tcp_accepted: k.tcp_accepted,
                tcp_broken: k.tcp_broken,
                restarts: k.restarts,
                reports: k.reports,
                bad_reports: k.bad_reports,
                last_bad_report: k.last_bad.clone(),
                hello: k.hello.clone(),
                beats: k.beats.iter().cloned().collect(),
                anomalies: k.anomalies.clone(),
                anomalies_dropped: k.anomalies_dropped,
                snapshots: k.snapshots.clone(),
                last: k.last.clone(),
                journal: k.journal.values().copied().collect(),
            })
            .collect()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // An error means that the thread is gone already.
        let _ = self.orders.send(Order::End);
        if let Some(thread) = self.thread.take() {
            // Its panic, had there been one, was already printed.
            let _ = thread.join();
        }
        for (_, known) in self.shared.lock().iter_mut() {
            if let Some(log) = &mut known.log
                && let Err(error) = log.flush()
            {
                tracing::warn!(%error, "the last reports could not be written to the run's folder");
            }
        }
    }
}

#[cfg(test)]
mod tests;
