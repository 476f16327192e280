//! What a hostile guest does to its host's xenstore, over any ring page: the program `vandal` does it on a real one, the
//! trials of xenstored on one made of a file. Each attack says what it saw, and fails if the daemon let it through.

use crate::pattern::Rng;
use std::fmt::Write;
use std::time::{Duration, Instant};
use xenstore_wire::ring::{self, RING_SIZE};
use xenstore_wire::{Errno, FrameDecoder, HEADER_LEN, Header, Message, Op, PAYLOAD_MAX, payload};

/// The page that a guest shares with the daemon, and the event channel to it.
pub trait Ring {
    /// A word of the page, at one of the offsets of [`xenstore_wire::ring`].
    fn load(&self, offset: usize) -> u32;
    /// Sets a word.
    fn store(&self, offset: usize, value: u32);
    /// A byte of the rings.
    fn load_byte(&self, offset: usize) -> u8;
    /// Sets a byte.
    fn store_byte(&self, offset: usize, value: u8);
    /// Raises the daemon's event channel.
    ///
    /// # Errors
    /// As the system says.
    fn notify(&self) -> Result<(), String>;
}

/// How long a daemon may take for what it must do.
const PATIENCE: Duration = Duration::from_secs(60);
/// More than any quota allows, so that an attack ends even if nothing stops it.
const MANY: usize = 5000;

/// Names of the attacks and what they do. Those from `length` on cost the guest its connection.
pub const ATTACKS: &[(&str, &str)] = &[
    ("bystander", "none: reads a node now and then and says how long that took, what the others do to it"),
    ("spin", "burns its vCPU and leaves xenstore alone: what the others are compared with"),
    ("flood", "well-formed requests as fast as they go"),
    ("quotas", "nodes, sizes, watches, permissions, path lengths and transactions up to every quota"),
    ("storm", "every write fires as many watches as it may have"),
    (
        "transactions",
        "as many transactions as it may have are left open, each over the nodes that are written meanwhile",
    ),
    ("unread", "requests and watch events without end, and nothing is read"),
    ("partial", "half a header, for a while; and one that stays for ever"),
    ("length", "a header that announces more than 4096 bytes"),
    ("indexes", "a producer index that is further than the ring is long"),
    ("wild", "random bytes and indexes, over and over"),
];

/// A guest at its ring.
#[derive(Debug)]
pub struct Guest<R> {
    ring: R,
    decoder: FrameDecoder,
    rng: Rng,
    id: u32,
    events: u64,
}

impl<R: Ring> Guest<R> {
    /// A guest that has not sent anything yet.
    pub fn new(ring: R, seed: u64) -> Guest<R> {
        Guest { ring, decoder: FrameDecoder::new(), rng: Rng::new(seed), id: 0, events: 0 }
    }

    /// Carries out an attack. What was seen, in a line.
    ///
    /// # Errors
    /// The daemon did not do what it must.
    pub fn attack(&mut self, name: &str, time: Duration) -> Result<String, String> {
        match name {
            "spin" => {
                let end = Instant::now() + time;
                while Instant::now() < end {
                    std::hint::spin_loop();
                }
                Ok("spun".into())
            }
            "bystander" => self.bystander(time),
            "flood" => self.flood(time),
            "quotas" => self.quotas(),
            "storm" => self.storm(time),
            "transactions" => self.transactions(time),
            "unread" => self.unread(time),
            "partial" => self.partial(time),
            "length" => self.length(),
            "indexes" => self.indexes(),
            "wild" => self.wild(time),
            _ => {
                let known: Vec<&str> = ATTACKS.iter().map(|(name, _)| *name).collect();
                Err(format!("there is no such attack; there are {}", known.join(", ")))
            }
        }
    }

    // ---- the ring ----

    /// Puts what fits. How many bytes.
    fn put_some(&self, bytes: &[u8]) -> Result<usize, String> {
        let (cons, prod) = (self.ring.load(ring::REQ_CONS), self.ring.load(ring::REQ_PROD));
        let used = ring::used(cons, prod).ok_or("the daemon left impossible indexes in the request ring")?;
        let n = bytes.len().min(RING_SIZE - used);
        for (i, b) in bytes[..n].iter().enumerate() {
            self.ring.store_byte(ring::REQ + ring::offset(prod.wrapping_add(i as u32)), *b);
        }
        if n > 0 {
            self.ring.store(ring::REQ_PROD, prod.wrapping_add(n as u32));
            self.ring.notify()?;
        }
        Ok(n)
    }

    fn put(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        let end = Instant::now() + PATIENCE;
        while !bytes.is_empty() {
            let n = self.put_some(bytes)?;
            bytes = &bytes[n..];
            if n == 0 {
                if Instant::now() > end {
                    return Err(format!("the daemon took no request for {} s", PATIENCE.as_secs()));
                }
                pause();
            }
        }
        Ok(())
    }

    /// Takes all that is there.
    fn take(&mut self) -> Result<Vec<u8>, String> {
        let (cons, prod) = (self.ring.load(ring::RSP_CONS), self.ring.load(ring::RSP_PROD));
        let used = ring::used(cons, prod).ok_or("the daemon left impossible indexes in the reply ring")?;
        let at = |i: usize| ring::RSP + ring::offset(cons.wrapping_add(i as u32));
        let bytes = (0..used).map(|i| self.ring.load_byte(at(i))).collect();
        if used > 0 {
            self.ring.store(ring::RSP_CONS, prod);
            self.ring.notify()?;
        }
        Ok(bytes)
    }

    fn message(&mut self, op: Op, tx: u32, body: &[u8]) -> Vec<u8> {
        self.id = self.id.wrapping_add(1);
        Message::new(op.to_wire(), self.id, tx, body.to_vec()).to_bytes()
    }

    /// Counts events; gives the reply to the last request if it is there.
    fn absorb(&mut self, mut bytes: &[u8]) -> Result<Option<Message>, String> {
        let mut found = None;
        while !bytes.is_empty() {
            let n = self.decoder.feed(bytes).map_err(|e| format!("the daemon sent no message: {e}"))?;
            bytes = &bytes[n..];
            let Some(m) = self.decoder.take() else { continue };
            if m.header.op == Op::WatchEvent.to_wire() {
                self.events += 1;
            } else if m.header.req_id == self.id {
                found = Some(m);
            }
        }
        Ok(found)
    }

    /// The reply to the last request; events that come before it are counted.
    fn reply(&mut self) -> Result<Result<Vec<u8>, Errno>, String> {
        let end = Instant::now() + PATIENCE;
        let mut found = None;
        while found.is_none() {
            let bytes = self.take()?;
            if bytes.is_empty() {
                if Instant::now() > end {
                    return Err(format!("no reply came for {} s", PATIENCE.as_secs()));
                }
                pause();
            }
            found = self.absorb(&bytes)?;
        }
        let m = found.unwrap_or_default();
        if m.header.op == Op::Error.to_wire() {
            return Ok(Err(Errno::from_payload(&m.payload).ok_or("the daemon sent an unknown error")?));
        }
        Ok(Ok(m.payload))
    }

    fn call(&mut self, op: Op, tx: u32, body: &[u8]) -> Result<Result<Vec<u8>, Errno>, String> {
        let bytes = self.message(op, tx, body);
        self.put(&bytes)?;
        self.reply()
    }

    /// A request that must be granted.
    fn must(&mut self, op: Op, tx: u32, body: &[u8]) -> Result<Vec<u8>, String> {
        self.call(op, tx, body)?.map_err(|e| format!("{} {} gave {}", op.name(), body.escape_ascii(), e.name()))
    }

    /// Repeats until it is refused, which must come, and with this error. How often it was granted.
    fn until(
        &mut self,
        what: &str,
        want: &[Errno],
        mut one: impl FnMut(&mut Self, usize) -> Result<Result<Vec<u8>, Errno>, String>,
    ) -> Result<usize, String> {
        for i in 0..MANY {
            match one(self, i)? {
                Ok(_) => {}
                Err(e) if want.contains(&e) => return Ok(i),
                Err(e) => return Err(format!("{what} {i} was refused with {}", e.name())),
            }
        }
        Err(format!("{MANY} {what} were granted: no quota held"))
    }

    fn refused(&mut self, what: &str, want: Errno, op: Op, body: &[u8]) -> Result<(), String> {
        match self.call(op, 0, body)? {
            Err(e) if e == want => Ok(()),
            Err(e) => Err(format!("{what} was refused with {}", e.name())),
            Ok(_) => Err(format!("{what} was granted")),
        }
    }

    fn start_transaction(&mut self) -> Result<Result<u32, Errno>, String> {
        match self.call(Op::TransactionStart, 0, &[0])? {
            Ok(id) => payload::one_arg(&id)
                .and_then(payload::decimal::<u32>)
                .map(Ok)
                .map_err(|_| "TRANSACTION_START gave no number".to_owned()),
            Err(e) => Ok(Err(e)),
        }
    }

    // ---- the attacks ----

    fn bystander(&mut self, time: Duration) -> Result<String, String> {
        let (end, mut times) = (Instant::now() + time, Vec::new());
        while Instant::now() < end {
            let since = Instant::now();
            let bytes = self.message(Op::GetPerms, 0, b"data\0");
            self.put(&bytes)?;
            // One that looks more often would be an attacker itself where guests share a processor.
            while self.ring.load(ring::RSP_PROD) == self.ring.load(ring::RSP_CONS) && since.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(1));
            }
            self.reply()?.map_err(|e| format!("GET_PERMS gave {}", e.name()))?;
            times.push(since.elapsed());
            std::thread::sleep(Duration::from_millis(100));
        }
        times.sort_unstable();
        let at =
            |part: usize| times.get(times.len() * part / 1000).or(times.last()).map_or(0.0, |t| t.as_secs_f64() * 1e3);
        Ok(format!(
            "{} reads: median {:.2} ms, p99 {:.2} ms, longest {:.2} ms",
            times.len(),
            at(500),
            at(990),
            at(1000)
        ))
    }

    fn flood(&mut self, time: Duration) -> Result<String, String> {
        let end = Instant::now() + time;
        let mut n = 0;
        while Instant::now() < end {
            self.must(Op::Write, 0, b"data/flood\0x")?;
            self.must(Op::Read, 0, b"data/flood\0")?;
            n += 2;
        }
        self.must(Op::Rm, 0, b"data/flood\0")?;
        Ok(format!("{n} requests served"))
    }

    fn quotas(&mut self) -> Result<String, String> {
        let mut out = String::new();
        let nodes = self.until("nodes", &[Errno::ENOSPC], |g, i| g.call(Op::Write, 0, &write(&node(i), b"")))?;
        let _ = write!(out, "{nodes} nodes");
        self.refused("a node of 2100 bytes", Errno::ENOSPC, Op::Write, &write(&node(0), &[b'v'; 2100]))?;
        self.refused("a path of 2100 bytes", Errno::EINVAL, Op::Write, &write(&"p".repeat(2100), b""))?;
        let perms = payload::join(std::iter::once(node(0)).chain((0..9).map(|d| format!("r{d}"))));
        self.refused("9 permissions", Errno::ENOSPC, Op::SetPerms, &perms)?;
        // As much memory as the nodes may have.
        for i in 0..nodes {
            if self.call(Op::Write, 0, &write(&node(i), &[b'v'; 1900]))?.is_err() {
                break;
            }
        }
        for i in 0..=nodes / 100 {
            self.must(Op::Rm, 0, &payload::join([format!("data/{i}")]))?;
        }
        let watches = self.until("watches", &[Errno::E2BIG], |g, i| {
            g.call(Op::Watch, 0, &payload::join(["data".into(), format!("token-{i}")]))
        })?;
        let open =
            self.until("transactions", &[Errno::ENOSPC], |g, _| Ok(g.start_transaction()?.map(|_| Vec::new())))?;
        self.must(Op::ResetWatches, 0, &[0])?;
        let id = self.start_transaction()?.map_err(|e| format!("no transaction after a reset: {}", e.name()))?;
        let touched = self.until("nodes of a transaction", &[Errno::ENOSPC], |g, i| {
            match g.call(Op::Read, id, &payload::join([node(i)]))? {
                Err(Errno::ENOENT) => Ok(Ok(Vec::new())),
                other => Ok(other),
            }
        })?;
        self.must(Op::TransactionEnd, id, b"F\0")?;
        let _ = write!(out, ", {watches} watches, {open} transactions, {touched} nodes in one");
        Ok(out)
    }

    fn add_watches(&mut self) -> Result<usize, String> {
        self.until("watches", &[Errno::E2BIG], |g, i| {
            g.call(Op::Watch, 0, &payload::join(["data".into(), format!("storm-{i}")]))
        })
    }

    fn storm(&mut self, time: Duration) -> Result<String, String> {
        let watches = self.add_watches()?;
        let (before, end) = (self.events, Instant::now() + time);
        let mut writes = 0;
        while Instant::now() < end {
            self.must(Op::Write, 0, b"data/storm\0x")?;
            writes += 1;
        }
        let events = self.events - before;
        self.must(Op::ResetWatches, 0, &[0])?;
        self.must(Op::Rm, 0, b"data/storm\0")?;
        Ok(format!("{writes} writes, {watches} watches, {events} events"))
    }

    /// The transactions stay open: they end with the guest.
    fn transactions(&mut self, time: Duration) -> Result<String, String> {
        for i in 0..20 {
            self.must(Op::Write, 0, &write(&node(i), b"0"))?;
        }
        let mut open = 0;
        while let Ok(id) = self.start_transaction()? {
            for i in 0..20 {
                self.must(Op::Read, id, &payload::join([node(i)]))?;
            }
            self.must(Op::Write, id, &write(&node(0), b"in a transaction"))?;
            open += 1;
            if open > MANY {
                return Err(format!("{open} transactions are open: no quota held"));
            }
        }
        let (begin, mut writes) = (Instant::now(), 0);
        while begin.elapsed() < time {
            self.must(Op::Write, 0, &write(&node(writes % 20), b"x"))?;
            writes += 1;
        }
        let rate = writes as f64 / begin.elapsed().as_secs_f64();
        Ok(format!("{open} transactions open, {writes} writes ({rate:.0} a second)"))
    }

    fn unread(&mut self, time: Duration) -> Result<String, String> {
        self.add_watches()?;
        let end = Instant::now() + time;
        let mut bytes = Vec::new();
        let mut taken = 0;
        while Instant::now() < end {
            if bytes.is_empty() {
                bytes = self.message(Op::Write, 0, format!("data/u{}\0x", self.id % 900).as_bytes());
            }
            let n = self.put_some(&bytes)?;
            bytes.drain(..n);
            taken += n;
            if n == 0 {
                pause();
            }
            if taken > 64 << 10 {
                return Err(format!("{taken} bytes of requests were taken and no reply was read"));
            }
        }
        // Once it reads again it is served again.
        let end = Instant::now() + PATIENCE;
        while !bytes.is_empty() {
            let read = self.take()?;
            self.absorb(&read)?;
            let n = self.put_some(&bytes)?;
            bytes.drain(..n);
            if Instant::now() > end {
                return Err("replies are read again, and no request is taken".into());
            }
        }
        self.reply()?.map_err(|e| format!("the last write gave {}", e.name()))?;
        self.must(Op::ResetWatches, 0, &[0])?;
        Ok(format!("{taken} bytes of requests were taken until the ring was full; served again once they were read"))
    }

    fn partial(&mut self, time: Duration) -> Result<String, String> {
        let bytes = self.message(Op::GetDomainPath, 0, b"0\0");
        self.put(&bytes[..HEADER_LEN / 2])?;
        std::thread::sleep(time);
        self.put(&bytes[HEADER_LEN / 2..])?;
        self.reply()?.map_err(|e| format!("the request that was late gave {}", e.name()))?;
        let bytes = self.message(Op::Read, 0, b"data\0");
        self.put(&bytes[..HEADER_LEN / 2])?;
        Ok("a request in two pieces was answered; half a header stays".into())
    }

    /// The daemon must say why it does not serve this ring any more.
    fn given_up(&self, error: u32) -> Result<(), String> {
        let end = Instant::now() + PATIENCE;
        while self.ring.load(ring::ERROR) != error {
            if Instant::now() > end {
                return Err(format!("the ring's error is {}, not {error}", self.ring.load(ring::ERROR)));
            }
            pause();
        }
        Ok(())
    }

    fn length(&mut self) -> Result<String, String> {
        let header = Header { op: Op::Write.to_wire(), req_id: 1, tx_id: 0, len: PAYLOAD_MAX as u32 + 1 };
        self.put(&header.to_bytes())?;
        self.given_up(ring::error::PROTOCOL)?;
        Ok("not served any more, and told why".into())
    }

    fn indexes(&mut self) -> Result<String, String> {
        let cons = self.ring.load(ring::REQ_CONS);
        self.ring.store(ring::REQ_PROD, cons.wrapping_add(RING_SIZE as u32 + 1));
        self.ring.notify()?;
        self.given_up(ring::error::RING_INDEX)?;
        Ok("not served any more, and told why".into())
    }

    fn wild(&mut self, time: Duration) -> Result<String, String> {
        let end = Instant::now() + time;
        let mut rounds = 0;
        while Instant::now() < end {
            let word = self.rng.next();
            self.ring.store_byte(word as usize % (2 * RING_SIZE), (word >> 16) as u8);
            let index = [ring::REQ_PROD, ring::REQ_CONS, ring::RSP_CONS, ring::RSP_PROD][(word >> 24) as usize % 4];
            // Now and then one that could be true, so that some of the bytes are taken.
            let near = self.ring.load(index).wrapping_add((word >> 40) as u32 % 64);
            let value = if word >> 62 == 0 { self.rng.next() as u32 } else { near };
            // At first only those that a guest may move; the daemon gives up at the first that can't be.
            let index = if rounds < 1000 { ring::REQ_PROD } else { index };
            self.ring.store(index, if rounds < 1000 { near } else { value });
            self.ring.notify()?;
            rounds += 1;
        }
        Ok(format!("{rounds} random changes"))
    }
}

fn pause() {
    std::thread::sleep(Duration::from_micros(200));
}

/// Spread over folders: the names of a node's children count for its size, which has a quota of its own.
fn node(i: usize) -> String {
    format!("data/{}/n{i}", i / 100)
}

/// The payload of a WRITE.
fn write(path: &str, value: &[u8]) -> Vec<u8> {
    let mut body = payload::join([path]);
    body.extend_from_slice(value);
    body
}
