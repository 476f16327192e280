//! The load: clients that each have one request on its way, driven by one thread.
//!
//! The thread never sleeps while there are several clients: it asks each socket in turn whether its reply is there. So no daemon pays for
//! waking it, and one send and one receive for each request is all that it does itself: it is the daemon that is slower. A single client
//! blocks, as a tool does, and the round trip has two wake-ups in it.

use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use xenstore_wire::{HEADER_LEN, Header, Op, path, payload};

/// Children of one node of the tree.
const FAN: usize = 100;
/// What is written.
const VALUE: &[u8] = b"0123456789";

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Row {
    Read,
    Write,
    Directory,
    /// Start, read, write, commit.
    Transaction,
    Watch,
    /// Through dom0's ring, by one client that looks at it every 20 µs.
    RingRead,
    RingWrite,
}

impl Row {
    /// What the sockets have to do for one operation, in requests with their replies. An event is half of one.
    pub fn round_trips(self) -> f64 {
        match self {
            Row::Watch => 0.5,
            _ => f64::from(self.requests()),
        }
    }

    /// Requests of one operation.
    fn requests(self) -> u32 {
        if self == Row::Transaction { 4 } else { 1 }
    }
}

/// Digits of a number. By hand: what formatting takes would be a tenth of a request.
fn put_number(out: &mut Vec<u8>, n: usize) {
    if n >= 10 {
        put_number(out, n / 10);
    }
    out.push(b'0' + (n % 10) as u8);
}

/// The path of a node's parent.
fn put_parent(out: &mut Vec<u8>, i: usize) {
    out.extend_from_slice(b"/bench/");
    put_number(out, i / FAN / FAN);
    out.push(b'/');
    put_number(out, i / FAN % FAN);
}

/// Payload: the path of a node of the tree, with its NUL.
pub fn put_path(out: &mut Vec<u8>, i: usize) -> Result<()> {
    put_parent(out, i);
    out.extend_from_slice(b"/node-");
    put_number(out, i % FAN);
    out.push(0);
    Ok(())
}

/// Payload of a write to it.
pub fn put_write(out: &mut Vec<u8>, i: usize) -> Result<()> {
    put_path(out, i)?;
    out.extend_from_slice(VALUE);
    Ok(())
}

/// Spreads the accesses over the tree.
#[derive(Debug)]
pub struct Places {
    next: usize,
    nodes: usize,
}

impl Places {
    pub fn new(nodes: usize) -> Places {
        Places { next: 0, nodes }
    }

    pub fn next(&mut self) -> usize {
        self.next = (self.next + 7919) % self.nodes;
        self.next
    }
}

/// One connection.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    out: Vec<u8>,
    /// Bytes `at..end` are read and not taken.
    buf: Box<[u8]>,
    at: usize,
    end: usize,
    /// Of the operation under way: when it began, the requests that are answered, its transaction, its node.
    since: Instant,
    step: u32,
    tx: u32,
    place: usize,
}

impl Client {
    pub fn connect(socket: &Path) -> Result<Client> {
        let stream = UnixStream::connect(socket)?;
        let buf = vec![0; 16384].into();
        Ok(Client { stream, out: Vec::new(), buf, at: 0, end: 0, since: Instant::now(), step: 0, tx: 0, place: 0 })
    }

    pub fn send(&mut self, op: Op, tx: u32, body: impl FnOnce(&mut Vec<u8>) -> Result<()>) -> Result<()> {
        self.out.clear();
        self.out.extend_from_slice(&[0; HEADER_LEN]);
        body(&mut self.out)?;
        let len = (self.out.len() - HEADER_LEN) as u32;
        let header = Header { op: op.to_wire(), req_id: 1, tx_id: tx, len };
        self.out[..HEADER_LEN].copy_from_slice(&header.to_bytes());
        let n = rustix::net::send(&self.stream, &self.out, SendFlags::empty()).context("send")?;
        if n != self.out.len() {
            bail!("the socket took {n} of {} bytes", self.out.len());
        }
        Ok(())
    }

    /// The next message, if it is there or if it may be waited for: type, and where its payload is.
    fn receive(&mut self, wait: bool) -> Result<Option<(u32, std::ops::Range<usize>)>> {
        loop {
            if let Some((h, rest)) = self.buf[self.at..self.end].split_first_chunk::<HEADER_LEN>() {
                let h = Header::from_bytes(h);
                if rest.len() >= h.len as usize {
                    let from = self.at + HEADER_LEN;
                    self.at = from + h.len as usize;
                    return Ok(Some((h.op, from..self.at)));
                }
            }
            self.buf.copy_within(self.at..self.end, 0);
            (self.at, self.end) = (0, self.end - self.at);
            let flags = if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
            match rustix::net::recv(&self.stream, &mut self.buf[self.end..], flags) {
                Ok((_, 0)) => bail!("the daemon closed the connection"),
                Ok((_, n)) => self.end += n,
                Err(Errno::AGAIN) => return Ok(None),
                Err(e) => return Err(e).context("receive"),
            }
        }
    }

    /// The payload of the next message that is not an event, if it is there or if it may be waited for.
    pub fn reply(&mut self, op: Op, wait: bool) -> Result<Option<&[u8]>> {
        while let Some((got, body)) = self.receive(wait)? {
            if got == op.to_wire() {
                return Ok(self.buf.get(body));
            }
            if got != Op::WatchEvent.to_wire() {
                bail!("{} was refused: {}", op.name(), self.buf[body].escape_ascii());
            }
        }
        Ok(None)
    }

    /// The next event.
    fn event(&mut self, wait: bool) -> Result<bool> {
        match self.receive(wait)? {
            Some((op, _)) if op == Op::WatchEvent.to_wire() => Ok(true),
            Some((op, _)) => bail!("message {op} instead of an event"),
            None => Ok(false),
        }
    }

    /// The next request of the operation under way.
    fn ask(&mut self, row: Row) -> Result<()> {
        let (place, tx) = (self.place, self.tx);
        match (row, self.step) {
            (Row::Read, _) => self.send(Op::Read, 0, |b| put_path(b, place)),
            (Row::Write, _) => self.send(Op::Write, 0, |b| put_write(b, place)),
            (Row::Directory, _) => self.send(Op::Directory, 0, |b| {
                put_parent(b, place);
                b.push(0);
                Ok(())
            }),
            (_, 0) => self.send(Op::TransactionStart, 0, |b| {
                b.push(0);
                Ok(())
            }),
            (_, 1) => self.send(Op::Read, tx, |b| put_path(b, place)),
            (_, 2) => self.send(Op::Write, tx, |b| put_write(b, place)),
            _ => self.send(Op::TransactionEnd, tx, |b| {
                b.extend_from_slice(b"T\0");
                Ok(())
            }),
        }
    }

    /// Takes the answer to the request on its way, if it is there or may be waited for.
    fn hear(&mut self, row: Row, wait: bool) -> Result<bool> {
        let op = match (row, self.step) {
            (Row::Read, _) | (Row::Transaction, 1) => Op::Read,
            (Row::Write, _) | (Row::Transaction, 2) => Op::Write,
            (Row::Directory, _) => Op::Directory,
            (_, 0) => Op::TransactionStart,
            _ => Op::TransactionEnd,
        };
        let Some(body) = self.reply(op, wait)? else { return Ok(false) };
        if op == Op::TransactionStart {
            self.tx = payload::one_arg(body).and_then(payload::decimal)?;
        }
        self.step += 1;
        Ok(true)
    }
}

/// Operations one after the other on each of the clients for so long; what each took.
pub fn requests(c: &mut [Client], row: Row, places: &mut Places, time: Duration) -> Result<Vec<Duration>> {
    let wait = c.len() == 1;
    let mut times = Vec::new();
    let start = Instant::now();
    let mut begin = |c: &mut Client, now: Instant| {
        (c.since, c.step, c.place) = (now, 0, places.next());
        c.ask(row)
    };
    for c in &mut *c {
        begin(c, Instant::now())?;
    }
    let mut under_way = c.len();
    while under_way > 0 {
        for c in &mut *c {
            if c.step == row.requests() || !c.hear(row, wait)? {
                continue;
            }
            if c.step < row.requests() {
                c.ask(row)?;
                continue;
            }
            let now = Instant::now();
            times.push(now - c.since);
            if now - start < time {
                begin(c, now)?;
            } else {
                under_way -= 1;
            }
        }
    }
    Ok(times)
}

/// A node that all clients watch is written again and again; what each event took.
pub fn events(c: &mut [Client], writer: &mut Client, time: Duration) -> Result<Vec<Duration>> {
    let wait = c.len() == 1;
    for (i, c) in c.iter_mut().enumerate() {
        c.send(Op::Watch, 0, |b| Ok(write!(b, "/bench/watched\0{i}\0")?))?;
        c.reply(Op::Watch, true)?;
        c.event(true)?;
    }
    let mut times = Vec::new();
    let start = Instant::now();
    while start.elapsed() < time {
        let since = Instant::now();
        writer.send(Op::Write, 0, |b| {
            b.extend_from_slice(b"/bench/watched\0x");
            Ok(())
        })?;
        for c in &mut *c {
            while !c.event(wait)? {}
            times.push(since.elapsed());
        }
        writer.reply(Op::Write, true)?;
    }
    Ok(times)
}

/// Makes the tree, as far as it comes in so much time. How many nodes it has then.
pub fn fill(socket: &Path, nodes: usize, limit: Duration) -> Result<usize> {
    const BATCH: usize = 64;
    let mut c = Client::connect(socket)?;
    let start = Instant::now();
    let mut path = Vec::new();
    for first in (0..nodes).step_by(BATCH) {
        if start.elapsed() > limit {
            return Ok(first);
        }
        let batch = first..(first + BATCH).min(nodes);
        for i in batch.clone().filter(|i| i % FAN == 0) {
            path.clear();
            put_parent(&mut path, i);
            if i % (FAN * FAN) == 0 {
                make_room(&mut c, path::parent(&path))?;
            }
            make_room(&mut c, &path)?;
        }
        for i in batch.clone() {
            c.send(Op::Write, 0, |b| put_write(b, i))?;
        }
        for _ in batch {
            c.reply(Op::Write, true)?;
        }
    }
    Ok(nodes)
}

/// Makes a node, without a value in the end, for which the C daemon has room for its children's names.
///
/// That daemon keeps a node with those names in one record of a database, moves it when it grows, and looks through all the pieces that
/// this leaves whenever it needs room: each node would take it longer than the one before.
fn make_room(c: &mut Client, path: &[u8]) -> Result<()> {
    for room in [FAN * b"node-00\0".len(), 0] {
        c.send(Op::Write, 0, |b| {
            b.extend_from_slice(path);
            b.push(0);
            b.resize(b.len() + room, b'x');
            Ok(())
        })?;
        c.reply(Op::Write, true)?;
    }
    Ok(())
}
