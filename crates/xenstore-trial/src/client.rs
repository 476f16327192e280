//! Clients that send and receive raw messages: over the daemon's socket as a tool of dom0, or as a guest over its ring.

use crate::fake_xen::{FakeXen, PORT_BASE, SharedPage};
use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use xenstore_wire::{FrameDecoder, Message, Op, ring};

/// How long a daemon may take for one answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// The way to the daemon.
#[derive(Debug)]
pub enum Link<'x> {
    Socket(UnixStream),
    Ring { xen: &'x FakeXen, domid: u16, page: SharedPage },
}

/// A connection with what has come in on it.
#[derive(Debug)]
pub struct Connection<'x> {
    link: Link<'x>,
    decoder: FrameDecoder,
    arrived: VecDeque<Message>,
    next_id: u32,
}

impl<'x> Connection<'x> {
    /// A tool's connection.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn socket(path: &Path) -> Result<Connection<'x>> {
        let stream = UnixStream::connect(path).with_context(|| format!("connect to {}", path.display()))?;
        Ok(Connection::over(Link::Socket(stream)))
    }

    /// A guest's connection. The daemon must have been told of the guest with INTRODUCE.
    ///
    /// # Errors
    /// There is no such domain.
    pub fn ring(xen: &'x FakeXen, domid: u16) -> Result<Connection<'x>> {
        Ok(Connection::over(Link::Ring { xen, domid, page: xen.map_ring(domid)? }))
    }

    fn over(link: Link<'x>) -> Connection<'x> {
        Connection { link, decoder: FrameDecoder::new(), arrived: VecDeque::new(), next_id: 1 }
    }

    /// Sends bytes, whatever they are.
    ///
    /// # Errors
    /// The daemon is gone, or does not read.
    pub fn send_raw(&mut self, mut bytes: &[u8]) -> Result<()> {
        match &mut self.link {
            Link::Socket(stream) => stream.write_all(bytes).context("send to the daemon"),
            Link::Ring { xen, domid, page } => {
                let end = Instant::now() + PATIENCE;
                while !bytes.is_empty() {
                    let (cons, prod) = (page.load(ring::REQ_CONS), page.load(ring::REQ_PROD));
                    let used = ring::used(cons, prod).context("the request ring's indexes are impossible")?;
                    let n = bytes.len().min(ring::RING_SIZE - used);
                    let mut at = prod;
                    for b in &bytes[..n] {
                        page.store_byte(ring::REQ + ring::offset(at), *b);
                        at = at.wrapping_add(1);
                    }
                    page.store(ring::REQ_PROD, at);
                    xen.raise(PORT_BASE + u32::from(*domid))?;
                    bytes = &bytes[n..];
                    if n == 0 {
                        if Instant::now() > end {
                            bail!("the daemon does not take domain {domid}'s requests");
                        }
                        std::thread::yield_now();
                    }
                }
                Ok(())
            }
        }
    }

    /// Sends one request; its id is returned.
    ///
    /// # Errors
    /// As [`Connection::send_raw`].
    pub fn send(&mut self, op: Op, tx: u32, payload: &[u8]) -> Result<u32> {
        let id = self.next_id;
        self.next_id += 1;
        self.send_raw(&Message::new(op.to_wire(), id, tx, payload.to_vec()).to_bytes())?;
        Ok(id)
    }

    /// The next message, waiting for it up to `wait`.
    ///
    /// # Errors
    /// The connection broke, or what came is no message.
    pub fn receive(&mut self, wait: Duration) -> Result<Option<Message>> {
        let end = Instant::now() + wait;
        loop {
            if let Some(m) = self.arrived.pop_front() {
                return Ok(Some(m));
            }
            let bytes = self.read_some(end)?;
            if bytes.is_empty() {
                return Ok(None);
            }
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let n = self.decoder.feed(rest).context("the daemon sent something that is no message")?;
                rest = &rest[n..];
                self.arrived.extend(self.decoder.take());
            }
        }
    }

    /// Whatever has come; empty when nothing has by `end`.
    fn read_some(&mut self, end: Instant) -> Result<Vec<u8>> {
        match &mut self.link {
            Link::Socket(stream) => {
                let left = end.saturating_duration_since(Instant::now());
                let time = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
                if poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&time)).context("poll")? == 0 {
                    return Ok(Vec::new());
                }
                let mut buf = vec![0; 65536];
                let n = stream.read(&mut buf).context("receive from the daemon")?;
                if n == 0 {
                    bail!("the daemon closed the connection");
                }
                buf.truncate(n);
                Ok(buf)
            }
            Link::Ring { xen, domid, page } => loop {
                let (cons, prod) = (page.load(ring::RSP_CONS), page.load(ring::RSP_PROD));
                let used = ring::used(cons, prod).context("the response ring's indexes are impossible")?;
                if used > 0 {
                    let bytes = (0..used)
                        .map(|i| page.load_byte(ring::RSP + ring::offset(cons.wrapping_add(i as u32))))
                        .collect();
                    page.store(ring::RSP_CONS, prod);
                    // The daemon may wait for room.
                    xen.raise(PORT_BASE + u32::from(*domid))?;
                    return Ok(bytes);
                }
                if Instant::now() >= end {
                    return Ok(Vec::new());
                }
                std::thread::sleep(Duration::from_micros(20));
            },
        }
    }

    /// Sends a request and waits for its reply; watch events that come before it are returned, too.
    ///
    /// # Errors
    /// No reply comes, or the connection broke.
    pub fn call(&mut self, op: Op, tx: u32, payload: &[u8]) -> Result<(Message, Vec<Message>)> {
        let id = self.send(op, tx, payload)?;
        let mut events = Vec::new();
        loop {
            let m = self.receive(PATIENCE)?.with_context(|| format!("no reply to {}", op.name()))?;
            if m.header.op == Op::WatchEvent.to_wire() {
                events.push(m);
            } else if m.header.req_id == id {
                return Ok((m, events));
            } else {
                bail!("a reply to request {} instead of {id}", m.header.req_id);
            }
        }
    }
}
