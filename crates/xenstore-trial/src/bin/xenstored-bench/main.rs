//! Times the stock daemons (C and OCaml) and ours side by side, with a bare echo server beside them: `cargo xtask bench xenstored`.
//!
//! A latency is that of one operation from its first byte out to its last byte in; a transaction is start, read, write, commit. Several
//! clients have one processor and the daemon another, where there are two: what the table tells is how fast the daemon is, as long as
//! its processor is busy, and that is a column. A single client shares its processor, or waking each other would be all that is measured.
//! Another column is the daemon's own time on a CPU for each operation, which a loaded machine changes least.

mod echo;
mod load;

use anyhow::{Context, Result, bail};
use clap::Parser;
use load::{Client, Places, Row};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use xenstore_trial::stock::{Programs, Stock};
use xenstore_trial::{Connection, FakeXen};
use xenstore_wire::Op;

#[derive(Debug, Parser)]
struct Args {
    /// Sizes of the tree, in nodes
    #[arg(long, value_delimiter = ',', default_value = "1000,100000,1000000")]
    nodes: Vec<usize>,
    /// Numbers of clients
    #[arg(long, value_delimiter = ',', default_value = "1,32")]
    clients: Vec<usize>,
    /// Milliseconds for each row
    #[arg(long, default_value_t = 1000)]
    time: u64,
    /// Seconds for making a tree. A daemon that is slower is measured with the nodes that it has by then
    #[arg(long, default_value_t = 120)]
    fill_limit: u64,
    /// Rows to measure; all if none is named
    #[arg(long, value_delimiter = ',')]
    rows: Vec<Row>,
    /// What the state journal costs: ours without it in the stock daemon's place, and rows for dom0's ring
    #[arg(long, conflicts_with = "check")]
    journal: bool,
    /// A single client and the daemon have a processor each, so that waking each other is most of what is measured
    #[arg(long, conflicts_with = "check")]
    apart: bool,
    /// Fail unless ours is at least as fast as the stock C daemon on every row, and on those with several clients or a large tree twice
    /// as fast or (where the socket's own cost does not allow that) at least 0.75 times as fast as the echo server; and unless it takes
    /// no more memory
    #[arg(long)]
    check: bool,
    /// Be the echo server
    #[arg(long, hide = true)]
    echo: Option<PathBuf>,
    /// Be the one that never sleeps
    #[arg(long, hide = true)]
    echo_loop: Option<PathBuf>,
}

/// How often each row is measured with each daemon.
const TURNS: u32 = 4;
/// A tree from so many nodes on is a large one.
const LARGE: usize = 100_000;
/// What of the echo server's rate is near it: most of what is left is the socket's.
const NEAR: f64 = 0.75;

#[derive(Debug)]
struct Figures {
    median: Duration,
    p99: Duration,
    rate: f64,
    /// The daemon's time on a CPU for each operation.
    cpu: Duration,
    /// The share of the time that it was on a CPU.
    busy: f64,
}

/// Something that is measured.
struct Server<'a> {
    socket: &'a Path,
    pid: u32,
}

/// `work` measured: the times of its operations.
fn timed(pid: u32, work: impl FnOnce() -> Result<Vec<Duration>>) -> Result<Figures> {
    let (cpu, start) = (on_cpu(pid)?, Instant::now());
    let mut times = work()?;
    let (elapsed, cpu) = (start.elapsed().as_secs_f64(), on_cpu(pid)?.saturating_sub(cpu));
    times.sort_unstable();
    let at = |q: f64| times.get((times.len() as f64 * q) as usize).copied().unwrap_or_default();
    Ok(Figures {
        median: at(0.5),
        p99: at(0.99),
        rate: times.len() as f64 / elapsed,
        cpu: cpu / times.len().max(1) as u32,
        busy: cpu.as_secs_f64() / elapsed,
    })
}

fn measure(
    processors: &Processors,
    server: &Server<'_>,
    row: Row,
    clients: usize,
    nodes: usize,
    time: Duration,
) -> Result<Figures> {
    processors.give(server.pid, clients)?;
    let mut c = (0..clients).map(|_| Client::connect(server.socket)).collect::<Result<Vec<_>>>()?;
    match row {
        Row::Watch => {
            let mut writer = Client::connect(server.socket)?;
            timed(server.pid, || load::events(&mut c, &mut writer, time))
        }
        _ => timed(server.pid, || load::requests(&mut c, row, &mut Places::new(nodes), time)),
    }
}

/// Through dom0's ring.
fn measure_ring(pid: u32, xen: &FakeXen, row: Row, nodes: usize, time: Duration) -> Result<Figures> {
    let mut kernel = Connection::ring(xen, 0)?;
    let mut places = Places::new(nodes);
    timed(pid, || {
        let (start, mut times) = (Instant::now(), Vec::new());
        while start.elapsed() < time {
            let mut body = Vec::new();
            let op = if row == Row::RingRead {
                load::put_path(&mut body, places.next())?;
                Op::Read
            } else {
                load::put_write(&mut body, places.next())?;
                Op::Write
            };
            let since = Instant::now();
            kernel.call(op, 0, &body)?;
            times.push(since.elapsed());
        }
        Ok(times)
    })
}

/// Time that a process has had a CPU.
fn on_cpu(pid: u32) -> Result<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat"))?;
    Ok(Duration::from_nanos(text.split(' ').next().context("schedstat")?.parse()?))
}

/// Resident memory of a process, in bytes: its own, and that of mapped files (our journal).
fn resident(pid: u32) -> Result<[u64; 2]> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let bytes = |name: &str| -> Result<u64> {
        let line = text.lines().find_map(|l| l.strip_prefix(name)).context("resident memory")?;
        Ok(line.trim().trim_end_matches("kB").trim().parse::<u64>()? * 1024)
    };
    Ok([bytes("RssAnon:")?, bytes("RssFile:")? + bytes("RssShmem:")?])
}

/// Where the load runs and where the daemons do.
struct Processors {
    load_and_daemon: Option<(usize, usize)>,
    apart: bool,
}

impl Processors {
    /// The first two that this process may use, and the load on one of them.
    fn take(apart: bool) -> Result<Processors> {
        let all = sched_getaffinity(None).context("processors")?;
        let mut usable = (0..CpuSet::MAX_CPU).filter(|&i| all.is_set(i));
        let (Some(load), Some(daemon)) = (usable.next(), usable.next()) else {
            return Ok(Processors { load_and_daemon: None, apart });
        };
        let p = Processors { load_and_daemon: Some((load, daemon)), apart };
        p.keep(None, load)?;
        Ok(p)
    }

    fn keep(&self, pid: Option<rustix::process::Pid>, processor: usize) -> Result<()> {
        let mut set = CpuSet::new();
        set.set(processor);
        sched_setaffinity(pid, &set).context("keep a process on one processor")
    }

    fn give(&self, daemon: u32, clients: usize) -> Result<()> {
        let Some((load, other)) = self.load_and_daemon else { return Ok(()) };
        self.keep(rustix::process::Pid::from_raw(daemon as i32), if clients == 1 && !self.apart { load } else { other })
    }
}

/// The echo server's process. It ends with the value.
struct Echo {
    child: Child,
    socket: PathBuf,
}

impl Echo {
    fn start(how: &str, socket: PathBuf) -> Result<Echo> {
        let child = Command::new(std::env::current_exe()?).arg(how).arg(&socket).spawn()?;
        let echo = Echo { child, socket };
        let end = Instant::now() + Duration::from_secs(5);
        while UnixStream::connect(&echo.socket).is_err() {
            if Instant::now() > end {
                bail!("the echo server does not start");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(echo)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn show(f: &Figures) -> String {
    let us = |d: Duration| d.as_secs_f64() * 1e6;
    format!("{:8.1} {:8.1} {:8.0} {:7.2} {:4.0}%", us(f.median), us(f.p99), f.rate, us(f.cpu), f.busy * 100.0)
}

/// Columns of the table.
const NAMES: [&str; 3] = ["stock C 4.17", "oxenstored 4.17", "ours"];
const STOCK: usize = 0;
const OXENSTORED: usize = 1;
const OURS: usize = 2;

fn main() -> Result<()> {
    let a = Args::parse();
    if let Some(socket) = &a.echo {
        return echo::serve(socket);
    }
    if let Some(socket) = &a.echo_loop {
        return echo::serve_in_a_loop(socket);
    }
    let time = Duration::from_millis(a.time);
    // In memory, as the daemons' own folder below /run is.
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())?;
    let programs = Programs::prepare(dir.path())?;
    let ours: PathBuf = std::env::current_exe()?.with_file_name("xenstored-on-files");
    let processors = Processors::take(a.apart)?;
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
    let heads = format!("{:>8} {:>8} {:>8} {:>7} {:>5}", "median", "p99", "ops/s", "CPU/op", "busy");
    let first = if a.journal { "ours, no journal" } else { NAMES[STOCK] };
    println!(
        "{:32} {:>40}   {:>40}   {:>40}   ours/first, /echo",
        "times in µs, busy: its processor", first, NAMES[OXENSTORED], NAMES[OURS]
    );
    println!("{:32} {heads}   {heads}   {heads}", "");
    // What the sockets alone allow, for each number of clients.
    let mut floors = Vec::new();
    for &clients in &a.clients {
        let mut best: f64 = 0.0;
        let ways = [("echo server", "--echo"), ("the same in a bare loop", "--echo-loop")];
        // A loop that never sleeps would keep a single client, which shares its processor, from running.
        for (name, how) in ways.into_iter().take(if clients == 1 { 1 } else { 2 }) {
            let echo = Echo::start(how, dir.path().join(format!("{}-{clients}", &how[2..])))?;
            let server = Server { socket: &echo.socket, pid: echo.child.id() };
            let f = measure(&processors, &server, Row::Read, clients, 1000, time)?;
            println!("{:32} {}", format!("{name}, {clients} clients"), show(&f));
            best = best.max(f.rate);
        }
        floors.push(best);
    }
    let mut slow = Vec::new();
    for &nodes in &a.nodes {
        let mut daemons = Vec::new();
        let (mut per_node, mut filled) = (Vec::new(), Vec::new());
        for (which, name) in NAMES.into_iter().enumerate() {
            // oxenstored runs for tools only, so it serves no ring.
            let started = if which == OXENSTORED && a.journal { None } else { Some(start(which, nodes)) };
            let d = match started {
                Some(Ok(d)) => d,
                Some(Err(e)) if which != OXENSTORED => return Err(e),
                not => {
                    if let Some(Err(e)) = not {
                        println!("note: {name} does not start here: {e:#}");
                    }
                    daemons.push(None);
                    per_node.push([0.0; 2]);
                    continue;
                }
            };
            let before = resident(d.0.pid())?;
            processors.give(d.0.pid(), 2)?;
            let since = Instant::now();
            let limit = Duration::from_secs(a.fill_limit);
            let made = load::fill(d.0.socket(), nodes, limit).with_context(|| format!("fill {name}"))?;
            filled.push(format!("{name} {made} in {:.1} s", since.elapsed().as_secs_f64()));
            let now = resident(d.0.pid())?;
            per_node.push([0, 1].map(|i| now[i].saturating_sub(before[i]) as f64 / made as f64));
            daemons.push(Some((d.0, d.1, made)));
        }
        println!("nodes made: {}", filled.join(", "));
        for (&clients, echo) in a.clients.iter().zip(&floors) {
            let mut rows = vec![Row::Read, Row::Write, Row::Directory, Row::Transaction, Row::Watch];
            if a.journal && clients == 1 {
                rows.extend([Row::RingRead, Row::RingWrite]);
            }
            rows.retain(|r| a.rows.is_empty() || a.rows.contains(r));
            for row in rows {
                // Turn and turn about; the best of each counts, which is what it does when nothing disturbs it.
                let mut best: [Option<Figures>; 3] = [None, None, None];
                for _ in 0..TURNS {
                    for (best, d) in best.iter_mut().zip(&daemons) {
                        let Some((d, xen, nodes)) = d else { continue };
                        let f = match row {
                            Row::RingRead | Row::RingWrite => measure_ring(d.pid(), xen, row, *nodes, time / TURNS)?,
                            _ => {
                                let server = Server { socket: d.socket(), pid: d.pid() };
                                measure(&processors, &server, row, clients, *nodes, time / TURNS)?
                            }
                        };
                        if best.as_ref().is_none_or(|b| f.rate > b.rate) {
                            *best = Some(f);
                        }
                    }
                }
                let name = format!("{nodes} nodes, {clients} clients, {row:?}").to_lowercase();
                let cells: Vec<String> =
                    best.iter().map(|f| f.as_ref().map_or_else(|| format!("{:40}", ""), show)).collect();
                let [Some(s), _, Some(o)] = best else { bail!("nothing was measured") };
                let times = o.rate / s.rate;
                let near = o.rate * row.round_trips() / echo;
                println!("{name:32} {} {times:6.2}x {near:6.2}x", cells.join("   "));
                if times < 1.0 {
                    slow.push(format!("{name}: {times:.2} times as fast"));
                } else if (clients > 1 || nodes >= LARGE) && times < 2.0 && near < NEAR {
                    slow.push(format!("{name}: {times:.2} times as fast, {near:.2} times as fast as the echo server"));
                }
            }
        }
        let name = format!("{nodes} nodes, bytes a node");
        let cells = per_node.iter().map(|[own, mapped]| format!("{:40}", format!("{own:.0}, and {mapped:.0} mapped")));
        println!("{name:32} {}", cells.collect::<Vec<_>>().join("   "));
        if nodes >= LARGE && per_node[OURS][0] > per_node[STOCK][0] {
            slow.push(format!("{name}: {:.0}, the stock daemon takes {:.0}", per_node[OURS][0], per_node[STOCK][0]));
        }
    }
    if a.check && !slow.is_empty() {
        bail!("ours falls short:\n{}", slow.join("\n"));
    }
    Ok(())
}
