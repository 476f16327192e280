//! Times the stock daemons (C and OCaml) and ours side by side, with a bare echo server beside them: `cargo xtask bench xenstored`.
//!
//! The echo server does what any daemon must do for a request: it waits with epoll for all its clients, reads once, and writes once.
//! One thread drives all clients: it sends one request on each connection, then takes the replies. A latency is that of
//! one operation from its first byte out to its last byte in; a transaction is start, read, write, commit. Beside them
//! stands the daemon's own time on a CPU for each operation: with many clients the driver is the bottleneck, and what
//! counts is how much of the machine the daemon takes, and how much of that is not the socket's.

use anyhow::{Context, Result, bail};
use clap::Parser;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use xenstore_trial::stock::{Programs, Stock};
use xenstore_trial::{Connection, FakeXen};
use xenstore_wire::{HEADER_LEN, Header, Op, payload};

#[derive(Debug, Parser)]
struct Args {
    /// Sizes of the tree, in nodes
    #[arg(long, value_delimiter = ',', default_value = "1000,100000,1000000")]
    nodes: Vec<usize>,
    /// Numbers of clients
    #[arg(long, value_delimiter = ',', default_value = "1,32")]
    clients: Vec<usize>,
    /// Milliseconds for each row
    #[arg(long, default_value_t = 500)]
    time: u64,
    /// What the state journal costs: ours without it in the stock daemon's place, and rows for dom0's ring
    #[arg(long, conflicts_with = "check")]
    journal: bool,
    /// Fail unless ours is at least as fast as the stock C daemon on every row, takes at most half of its CPU time (beyond what the
    /// echo server takes) on those with several clients, and no more memory
    #[arg(long)]
    check: bool,
}

/// Children of one node of the tree.
const FAN: usize = 100;

fn path(i: usize) -> String {
    format!("/bench/{}/{}/node-{}", i / FAN / FAN, i / FAN % FAN, i % FAN)
}

struct Client {
    stream: UnixStream,
    /// Bytes `at..end` are read and not taken.
    buf: Box<[u8]>,
    at: usize,
    end: usize,
}

impl Client {
    fn connect(socket: &Path) -> Result<Client> {
        Ok(Client { stream: UnixStream::connect(socket)?, buf: vec![0; 16384].into(), at: 0, end: 0 })
    }

    fn send(&mut self, op: Op, tx: u32, body: &[u8]) -> Result<()> {
        let mut message = [0; 256];
        let header = Header { op: op.to_wire(), req_id: 1, tx_id: tx, len: body.len() as u32 };
        let whole = message.get_mut(..HEADER_LEN + body.len()).context("a long request")?;
        whole[..HEADER_LEN].copy_from_slice(&header.to_bytes());
        whole[HEADER_LEN..].copy_from_slice(body);
        self.stream.write_all(whole)?;
        Ok(())
    }

    /// The next message: type and payload.
    fn receive(&mut self) -> Result<(u32, Vec<u8>)> {
        loop {
            if let Some((h, rest)) = self.buf[self.at..self.end].split_first_chunk::<HEADER_LEN>() {
                let h = Header::from_bytes(h);
                if let Some(body) = rest.get(..h.len as usize) {
                    let body = body.to_vec();
                    self.at += HEADER_LEN + body.len();
                    return Ok((h.op, body));
                }
            }
            self.buf.copy_within(self.at..self.end, 0);
            (self.at, self.end) = (0, self.end - self.at);
            let n = self.stream.read(&mut self.buf[self.end..])?;
            if n == 0 {
                bail!("the daemon closed the connection");
            }
            self.end += n;
        }
    }

    fn reply(&mut self, op: Op) -> Result<Vec<u8>> {
        loop {
            let (got, body) = self.receive()?;
            if got == op.to_wire() {
                return Ok(body);
            }
            if got != Op::WatchEvent.to_wire() {
                bail!("{} was refused: {}", op.name(), body.escape_ascii());
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Row {
    Read,
    Write,
    Directory,
    Transaction,
    Watch,
    /// Through dom0's ring, by one client that looks at it every 20 µs.
    RingRead,
    RingWrite,
}

struct Figures {
    median: Duration,
    p99: Duration,
    rate: f64,
    /// The daemon's time on a CPU for each operation.
    cpu: Duration,
}

/// Spreads the accesses over the tree.
struct Places {
    next: usize,
    nodes: usize,
}

impl Places {
    fn next(&mut self) -> usize {
        self.next = (self.next + 7919) % self.nodes;
        self.next
    }
}

fn measure(d: &Stock, xen: &FakeXen, row: Row, clients: usize, nodes: usize, time: Duration) -> Result<Figures> {
    let socket = d.socket();
    let mut c = (0..clients).map(|_| Client::connect(socket)).collect::<Result<Vec<_>>>()?;
    let mut places = Places { next: 0, nodes };
    let mut kernel = Connection::ring(xen, 0)?;
    let mut writer = Client::connect(socket)?;
    if row == Row::Watch {
        for (i, c) in c.iter_mut().enumerate() {
            c.send(Op::Watch, 0, &payload::join(["/bench/watched", &i.to_string()]))?;
            c.reply(Op::Watch)?;
            c.receive()?;
        }
    }
    let mut times: Vec<Duration> = Vec::new();
    let mut sent = vec![Instant::now(); clients];
    let write = |i: usize, v: &str| {
        let mut b = payload::join([path(i)]);
        b.extend_from_slice(v.as_bytes());
        b
    };
    let cpu = on_cpu(d.pid())?;
    let start = Instant::now();
    while start.elapsed() < time {
        match row {
            Row::RingRead | Row::RingWrite => {
                let i = places.next();
                let t = Instant::now();
                if row == Row::RingRead {
                    kernel.call(Op::Read, 0, &payload::join([path(i)]))?;
                } else {
                    kernel.call(Op::Write, 0, &write(i, "0123456789"))?;
                }
                times.push(t.elapsed());
            }
            Row::Read | Row::Write | Row::Directory => {
                let op = match row {
                    Row::Read => Op::Read,
                    Row::Write => Op::Write,
                    _ => Op::Directory,
                };
                for (c, t) in c.iter_mut().zip(&mut sent) {
                    let i = places.next();
                    let body = match row {
                        Row::Read => payload::join([path(i)]),
                        Row::Write => write(i, "0123456789"),
                        _ => payload::join([format!("/bench/{}/{}", i / FAN / FAN, i / FAN % FAN)]),
                    };
                    *t = Instant::now();
                    c.send(op, 0, &body)?;
                }
                for (c, t) in c.iter_mut().zip(&sent) {
                    c.reply(op)?;
                    times.push(t.elapsed());
                }
            }
            Row::Transaction => {
                let at: Vec<usize> = c.iter().map(|_| places.next()).collect();
                for (c, t) in c.iter_mut().zip(&mut sent) {
                    *t = Instant::now();
                    c.send(Op::TransactionStart, 0, &[0])?;
                }
                let mut ids = Vec::new();
                for c in &mut c {
                    let id = c.reply(Op::TransactionStart)?;
                    ids.push(payload::one_arg(&id).and_then(payload::decimal::<u32>)?);
                }
                for ((c, id), i) in c.iter_mut().zip(&ids).zip(&at) {
                    c.send(Op::Read, *id, &payload::join([path(*i)]))?;
                }
                for c in &mut c {
                    c.reply(Op::Read)?;
                }
                for ((c, id), i) in c.iter_mut().zip(&ids).zip(&at) {
                    c.send(Op::Write, *id, &write(*i, "in a transaction"))?;
                }
                for c in &mut c {
                    c.reply(Op::Write)?;
                }
                for (c, id) in c.iter_mut().zip(&ids) {
                    c.send(Op::TransactionEnd, *id, b"T\0")?;
                }
                for (c, t) in c.iter_mut().zip(&sent) {
                    c.reply(Op::TransactionEnd)?;
                    times.push(t.elapsed());
                }
            }
            Row::Watch => {
                let t = Instant::now();
                writer.send(Op::Write, 0, b"/bench/watched\0x")?;
                for c in &mut c {
                    c.receive()?;
                    times.push(t.elapsed());
                }
                writer.reply(Op::Write)?;
            }
        }
    }
    let rate = times.len() as f64 / start.elapsed().as_secs_f64();
    let cpu = (on_cpu(d.pid())? - cpu) / times.len().max(1) as u32;
    times.sort_unstable();
    let at = |q: f64| times.get((times.len() as f64 * q) as usize).copied().unwrap_or_default();
    Ok(Figures { median: at(0.5), p99: at(0.99), rate, cpu })
}

fn fill(socket: &Path, nodes: usize) -> Result<()> {
    const BATCH: usize = 64;
    let mut c = Client::connect(socket)?;
    let mut i = 0;
    while i < nodes {
        let n = BATCH.min(nodes - i);
        for k in i..i + n {
            let mut b = payload::join([path(k)]);
            b.extend_from_slice(b"0123456789");
            c.send(Op::Write, 0, &b)?;
        }
        for _ in 0..n {
            c.reply(Op::Write)?;
        }
        i += n;
    }
    Ok(())
}

/// Time that a process has had a CPU.
fn on_cpu(pid: u32) -> Result<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat"))?;
    Ok(Duration::from_nanos(text.split(' ').next().context("schedstat")?.parse()?))
}

/// Resident memory of a process, in bytes.
fn resident(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024)
}

/// Serves `clients` connections by sending back what comes, until all are closed; its time on a CPU.
fn serve_echo(listener: &UnixListener, clients: usize) -> Result<Duration> {
    use rustix::event::epoll;
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let mut streams = Vec::new();
    for i in 0..clients {
        let (stream, _) = listener.accept()?;
        epoll::add(&poll, &stream, epoll::EventData::new_u64(i as u64), epoll::EventFlags::IN)?;
        streams.push(Some(stream));
    }
    let (mut buf, mut ready) = ([0; 4096], Vec::with_capacity(64));
    while streams.iter().any(Option::is_some) {
        ready.clear();
        epoll::wait(&poll, rustix::buffer::spare_capacity(&mut ready), None)?;
        for event in &ready {
            let place = streams.get_mut(event.data.u64() as usize).context("a stream that is none")?;
            let Some(stream) = place else { continue };
            match stream.read(&mut buf)? {
                0 => *place = None,
                n => stream.write_all(&buf[..n])?,
            }
        }
    }
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Ok(Duration::new(t.tv_sec as u64, t.tv_nsec as u32))
}

/// A server that sends back what it gets: what the socket itself costs.
fn echo(socket: &Path, clients: usize, time: Duration) -> Result<Figures> {
    let listener = UnixListener::bind(socket)?;
    let server = std::thread::spawn(move || serve_echo(&listener, clients));
    let mut c = (0..clients).map(|_| Client::connect(socket)).collect::<Result<Vec<_>>>()?;
    let body = payload::join([path(0)]);
    let (mut times, mut sent) = (Vec::new(), vec![Instant::now(); clients]);
    let start = Instant::now();
    while start.elapsed() < time {
        for (c, t) in c.iter_mut().zip(&mut sent) {
            *t = Instant::now();
            c.send(Op::Read, 0, &body)?;
        }
        for (c, t) in c.iter_mut().zip(&sent) {
            c.reply(Op::Read)?;
            times.push(t.elapsed());
        }
    }
    let rate = times.len() as f64 / start.elapsed().as_secs_f64();
    drop(c);
    let Ok(cpu) = server.join() else { bail!("the echo server panicked") };
    let cpu = cpu? / times.len().max(1) as u32;
    times.sort_unstable();
    Ok(Figures { median: times[times.len() / 2], p99: times[times.len() * 99 / 100], rate, cpu })
}

fn show(f: &Figures) -> String {
    let us = |d: Duration| d.as_secs_f64() * 1e6;
    format!("{:8.1} {:8.1} {:8.0} {:7.1}", us(f.median), us(f.p99), f.rate, us(f.cpu))
}

/// Columns of the table.
const NAMES: [&str; 3] = ["stock C 4.17", "oxenstored 4.17", "ours"];
const STOCK: usize = 0;
const OXENSTORED: usize = 1;
const OURS: usize = 2;

fn main() -> Result<()> {
    let a = Args::parse();
    let time = Duration::from_millis(a.time);
    let dir = tempfile::tempdir()?;
    let programs = Programs::prepare(dir.path())?;
    let ours: PathBuf = std::env::current_exe()?.with_file_name("xenstored-on-files");
    let start = |which: usize, nodes: usize| -> Result<(Stock, FakeXen)> {
        let name = format!("{which}-{nodes}");
        let xen = FakeXen::create(&dir.path().join(format!("xen-{name}")))?;
        let run = dir.path().join(format!("run-{name}"));
        let d = match which {
            STOCK if a.journal => programs.start_other(&ours, &["--no-journal"], &xen, &run)?,
            STOCK => programs.start_stock(&xen, &run, &[])?,
            OXENSTORED => programs.start_oxenstored(&xen, &run)?,
            _ => programs.start_other(&ours, &[], &xen, &run)?,
        };
        Ok((d, xen))
    };
    let heads = format!("{:>8} {:>8} {:>8} {:>7}", "median", "p99", "ops/s", "CPU/op");
    let first = if a.journal { "ours, no journal" } else { NAMES[STOCK] };
    println!("{:34} {:>34}   {:>34}   {:>34}   ours/first", "times in µs", first, NAMES[OXENSTORED], NAMES[OURS]);
    println!("{:34} {heads}   {heads}   {heads}", "");
    let mut floors = Vec::new();
    for &clients in &a.clients {
        let e = echo(&dir.path().join(format!("echo-{clients}")), clients, time)?;
        println!("{:34} {}", format!("echo server, {clients} clients"), show(&e));
        floors.push(e.cpu);
    }
    let mut slow = Vec::new();
    for &nodes in &a.nodes {
        let mut daemons = Vec::new();
        let mut per_node = Vec::new();
        for (which, name) in NAMES.into_iter().enumerate() {
            let d = match start(which, nodes) {
                Ok(d) => d,
                Err(e) if which == OXENSTORED => {
                    println!("note: {name} does not start here: {e:#}");
                    daemons.push(None);
                    per_node.push(0.0);
                    continue;
                }
                Err(e) => return Err(e),
            };
            let before = resident(d.0.pid())?;
            fill(d.0.socket(), nodes).with_context(|| format!("fill {name}"))?;
            per_node.push((resident(d.0.pid())?.saturating_sub(before)) as f64 / nodes as f64);
            daemons.push(Some(d));
        }
        for (&clients, floor) in a.clients.iter().zip(&floors) {
            let mut rows = vec![Row::Read, Row::Write, Row::Directory, Row::Transaction, Row::Watch];
            if a.journal && clients == 1 {
                rows.extend([Row::RingRead, Row::RingWrite]);
            }
            for row in rows {
                // Twice each, turn and turn about; the better one counts.
                let mut best: [Option<Figures>; 3] = [None, None, None];
                for _ in 0..2 {
                    for (best, d) in best.iter_mut().zip(&daemons) {
                        let Some((d, xen)) = d else { continue };
                        let f = measure(d, xen, row, clients, nodes, time / 2)?;
                        if best.as_ref().is_none_or(|b| f.rate > b.rate) {
                            *best = Some(f);
                        }
                    }
                }
                let name = format!("{nodes} nodes, {clients} clients, {row:?}").to_lowercase();
                let cells: Vec<String> =
                    best.iter().map(|f| f.as_ref().map_or_else(|| format!("{:34}", ""), show)).collect();
                let [Some(s), _, Some(o)] = best else { bail!("nothing was measured") };
                let times = o.rate / s.rate;
                println!("{name:34} {} {times:6.1}x", cells.join("   "));
                if times < 1.0 {
                    slow.push(format!("{name}: {times:.2} times as fast"));
                }
                // A transaction is four requests; an event is written by the daemon and nothing is read for it.
                let sockets = match row {
                    Row::Transaction => *floor * 4,
                    Row::Watch => Duration::ZERO,
                    _ => *floor,
                };
                let own = |f: &Figures| f.cpu.saturating_sub(sockets).as_secs_f64();
                let share = own(&o) / own(&s);
                if clients > 1 && share > 0.5 {
                    slow.push(format!("{name}: {share:.2} of the CPU time beyond the socket's"));
                }
            }
        }
        let name = format!("{nodes} nodes, bytes a node");
        println!(
            "{name:34} {:8.0} {:>27} {:8.0} {:>27} {:8.0}",
            per_node[STOCK], "", per_node[OXENSTORED], "", per_node[OURS]
        );
        if nodes >= 100_000 && per_node[OURS] > per_node[STOCK] {
            slow.push(format!("{name}: {:.0}, the stock daemon takes {:.0}", per_node[OURS], per_node[STOCK]));
        }
    }
    if a.check && !slow.is_empty() {
        bail!("ours falls short:\n{}", slow.join("\n"));
    }
    Ok(())
}
