//! Sends reports: UDP at once, TCP and console by threads of their own, so that neither a dead peer nor a console that
//! nobody empties holds a load up.

use crate::clock;
use crate::context::{Context, lock};
use crate::counters::Counters;
use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::mem::Discriminant;
use std::net::{SocketAddr, SocketAddrV4, TcpStream, UdpSocket};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;
use witness::config::{Config, ConsoleLevel};
use witness::report::{Body, Envelope, Noticed};
use witness::wire::{MAX_DATAGRAM, MAX_LINE, Service, VERSION, console_line};

/// Anomalies of one type that are sent; the rest is counted.
const MOST_OF_A_TYPE: u32 = 32;
/// Lines that wait for the peer, and for the console.
const MOST_WAITING: usize = 256;

/// Lines for one thread that writes them out.
#[derive(Debug, Default)]
struct Queue {
    lines: Mutex<VecDeque<Arc<Vec<u8>>>>,
    more: Condvar,
}

impl Queue {
    /// False if it was full; then the oldest line was dropped for this one.
    fn push(&self, line: Arc<Vec<u8>>) -> bool {
        let mut lines = lock(&self.lines);
        let room = lines.len() < MOST_WAITING;
        if !room {
            lines.pop_front();
        }
        lines.push_back(line);
        self.more.notify_one();
        room
    }

    /// The next line, which stays in the queue until [`Queue::done`].
    fn peek(&self) -> Arc<Vec<u8>> {
        let mut lines = lock(&self.lines);
        loop {
            if let Some(line) = lines.front() {
                return line.clone();
            }
            lines = self.more.wait(lines).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    fn done(&self, line: &Arc<Vec<u8>>) {
        let mut lines = lock(&self.lines);
        if lines.front().is_some_and(|l| Arc::ptr_eq(l, line)) {
            lines.pop_front();
        }
    }

    fn is_empty(&self) -> bool {
        lock(&self.lines).is_empty()
    }
}

#[derive(Debug)]
pub struct Reporter {
    run: u64,
    /// The last report's number. Held until the report is in the queues: there too one follows the other.
    seq: Mutex<u64>,
    console_level: ConsoleLevel,
    peer: SocketAddr,
    udp: OnceLock<UdpSocket>,
    tcp: Queue,
    console: Queue,
    sent: Mutex<HashMap<Discriminant<Noticed>, u32>>,
}

impl Reporter {
    pub fn new(config: &Config, run: u64) -> Reporter {
        Reporter {
            run,
            seq: Mutex::new(0),
            console_level: config.console,
            peer: SocketAddrV4::new(config.peer, Service::Report.port(config.port)).into(),
            udp: OnceLock::new(),
            tcp: Queue::default(),
            console: Queue::default(),
            sent: Mutex::default(),
        }
    }

    /// Starts the threads. The network may be used only once it is set up.
    pub fn start(ctx: &Arc<Context>) {
        let c = ctx.clone();
        crate::spawn("console", move || write_console(&c.reporter.console));
        if ctx.config.addr.is_none() {
            return;
        }
        if let Ok(socket) = UdpSocket::bind("0.0.0.0:0") {
            // A send that would block is lost, as on any network.
            let _ = socket.set_nonblocking(true);
            let _ = ctx.reporter.udp.set(socket);
        }
        let c = ctx.clone();
        crate::spawn("report-tcp", move || write_tcp(&c.reporter.tcp, c.reporter.peer));
    }

    /// Whether this anomaly is to be sent and not just counted.
    pub fn may_send(&self, what: &Noticed) -> bool {
        let mut sent = lock(&self.sent);
        let n = sent.entry(std::mem::discriminant(what)).or_insert(0);
        *n += 1;
        *n <= MOST_OF_A_TYPE
    }

    /// Text for the console that is not a report.
    pub fn say(&self, text: &str) {
        self.console.push(Arc::new(format!("{text}\n").into_bytes()));
    }

    pub fn send(&self, body: Body, counters: &Counters) {
        let console = match &body {
            Body::Hello(_) | Body::Anomaly(_) => self.console_level >= ConsoleLevel::Events,
            Body::Beat(b) => {
                self.console_level == ConsoleLevel::All
                    || self.console_level == ConsoleLevel::Events && (b.up_ms / 1000) % 10 == 0
            }
            Body::Journal(_) => false,
            Body::Snapshot(_) => self.console_level == ConsoleLevel::All || self.udp.get().is_none(),
            Body::Final(_) => self.console_level >= ConsoleLevel::Events,
        };
        let short_final = match &body {
            // The long parts would keep a slow console busy for many seconds.
            Body::Final(f) if self.console_level < ConsoleLevel::All && self.udp.get().is_some() => {
                let mut f = f.clone();
                f.snapshot.store = witness::report::Item::Absent("left out on the console".into());
                f.snapshot.identity.cpuid.clear();
                f.snapshot.interrupts.clear();
                Some(Body::Final(f))
            }
            _ => None,
        };
        let to_network = self.udp.get().is_some();
        let (udp, tcp) = match &body {
            Body::Journal(_) => (true, false),
            Body::Snapshot(_) | Body::Final(_) => (false, true),
            Body::Hello(_) | Body::Beat(_) | Body::Anomaly(_) => (true, true),
        };
        // Who reads the console alone takes a number that is missing there for a report that got lost.
        if !console && !to_network {
            return;
        }
        let mut last = lock(&self.seq);
        let seq = *last + 1;
        let report = self.report(seq, body);
        if report.len() >= MAX_LINE {
            counters.reports_lost.add(1);
            return;
        }
        *last = seq;
        if udp
            && report.len() < MAX_DATAGRAM
            && let Some(socket) = self.udp.get()
        {
            let _ = socket.send_to(&report, self.peer);
        }
        let mut lost = false;
        if console {
            let short = short_final.map(|body| self.report(seq, body));
            let room = self.console.push(Arc::new(console_line(short.as_ref().unwrap_or(&report))));
            lost = !room && !to_network;
        }
        if tcp && to_network {
            let mut line = report;
            line.push(b'\n');
            lost = !self.tcp.push(Arc::new(line));
        }
        if lost {
            counters.reports_lost.add(1);
        }
    }

    fn report(&self, seq: u64, body: Body) -> Vec<u8> {
        let now = clock::read_once();
        let envelope = Envelope { v: VERSION, run: self.run, seq, mono_ns: now.mono_ns, real_ns: now.real_ns, body };
        // The types have no map with keys that are no strings and no number that is not finite: this cannot fail.
        serde_json::to_vec(&envelope).unwrap_or_default()
    }

    /// Waits until all is written, or for so long.
    pub fn flush(&self, most: Duration) {
        let end = std::time::Instant::now() + most;
        while std::time::Instant::now() < end && !(self.tcp.is_empty() && self.console.is_empty()) {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn write_console(queue: &Queue) {
    let mut out = std::io::stdout();
    loop {
        let line = queue.peek();
        // A console that fails takes nothing; there is nobody to tell.
        let _ = out.write_all(&line).and_then(|()| out.flush());
        queue.done(&line);
    }
}

fn write_tcp(queue: &Queue, peer: SocketAddr) {
    let mut stream: Option<TcpStream> = None;
    loop {
        let line = queue.peek();
        if stream.is_none() {
            stream = TcpStream::connect_timeout(&peer, Duration::from_secs(5)).ok();
            if let Some(s) = &stream {
                let _ = s.set_nodelay(true);
            }
        }
        match stream.as_mut().map(|s| s.write_all(&line)) {
            Some(Ok(())) => queue.done(&line),
            _ => {
                stream = None;
                std::thread::sleep(Duration::from_millis(500));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use witness::report::{Beat, JournalAck};
    use witness::wire::{from_console, parse_report};

    #[test]
    fn on_a_console_that_is_alone_the_numbers_have_no_gap() {
        let config = Config { console: ConsoleLevel::All, ..Config::default() };
        let (reporter, counters) = (Reporter::new(&config, 7), Counters::default());
        for body in
            [Body::Beat(Beat::default()), Body::Journal(JournalAck { record: 1, crc: 2 }), Body::Beat(Beat::default())]
        {
            reporter.send(body, &counters);
        }
        let lines = lock(&reporter.console.lines);
        let numbers: Vec<u64> = lines
            .iter()
            .map(|line| parse_report(from_console(std::str::from_utf8(line).unwrap()).unwrap().as_bytes()).unwrap().seq)
            .collect();
        assert_eq!(numbers, [1, 2]);
    }

    #[test]
    fn what_a_console_that_takes_nothing_loses_is_counted() {
        let config = Config { console: ConsoleLevel::All, ..Config::default() };
        let (reporter, counters) = (Reporter::new(&config, 7), Counters::default());
        for _ in 0..MOST_WAITING + 3 {
            reporter.send(Body::Beat(Beat::default()), &counters);
        }
        assert_eq!(counters.beat(true).reports_lost, 3);
    }
}
