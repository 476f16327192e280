//! One client's connection: the request being put together, what waits to be sent, its watches and transactions.

use crate::held::Held;
use crate::node::Tree;
use crate::tx::Transactions;
use crate::watch::WatchId;
use std::collections::{BTreeSet, HashSet, VecDeque};
use std::rc::Rc;
use xenstore_wire::{FrameDecoder, HEADER_LEN, Header, Message};

/// Never used twice in a daemon's life.
pub type ConnId = u32;
/// A request whose reply, or whose last watch event, is still to be sent.
pub type RequestId = u64;
/// Found quickly; in no order. Nobody outside chooses the ids.
pub type ByConn<T> = rustc_hash::FxHashMap<ConnId, T>;

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// A socket: dom0's tools.
    Socket,
    /// A domain's ring.
    Domain(u16),
}

impl Peer {
    /// The domain that rights are measured by: sockets count as domain 0.
    pub fn domid(self) -> u16 {
        match self {
            Peer::Socket => 0,
            Peer::Domain(d) => d,
        }
    }
}

/// A message to be sent.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// What is left of the header and the payload.
    pub head: [u8; HEADER_LEN],
    /// Payload.
    pub body: Rc<[u8]>,
    /// Bytes of header and payload that are out.
    pub used: usize,
    /// A watch event, subject to coalescing and time-out.
    pub event: bool,
    /// When an unread event is dropped, in milliseconds.
    pub deadline: Option<u64>,
    /// The request it answers, or that caused the event.
    pub request: Option<RequestId>,
    /// No header: the rest of a message whose beginning another daemon sent.
    pub headless: bool,
    /// Its place among all messages that the connection ever had.
    pub seq: u64,
}

impl Outgoing {
    /// A whole message.
    pub fn new(header: Header, body: Rc<[u8]>) -> Outgoing {
        Outgoing {
            head: header.to_bytes(),
            body,
            used: 0,
            event: false,
            deadline: None,
            request: None,
            headless: false,
            seq: 0,
        }
    }

    /// Bytes left to send.
    pub fn left(&self) -> usize {
        self.total() - self.used
    }

    /// Bytes of it, sent or not.
    pub fn total(&self) -> usize {
        self.body.len() + if self.headless { 0 } else { HEADER_LEN }
    }

    /// Appends what is left, up to `max` bytes in all in `out`.
    pub fn copy_left(&self, out: &mut Vec<u8>, max: usize) {
        let mut skip = self.used;
        let head: &[u8] = if self.headless { &[] } else { &self.head };
        for part in [head, &self.body] {
            let from = skip.min(part.len());
            skip -= from;
            let n = (part.len() - from).min(max.saturating_sub(out.len()));
            out.extend_from_slice(&part[from..from + n]);
        }
    }

    /// What the quota counts.
    pub fn size(&self) -> usize {
        self.body.len() + HEADER_LEN
    }
}

/// A stream that was made.
#[derive(Debug)]
pub struct Export {
    /// The paths that were asked for.
    pub prefixes: Vec<Vec<u8>>,
    /// The stream.
    pub stream: Rc<[u8]>,
}

/// A connection taken out of service for a migration.
#[derive(Debug)]
pub struct Frozen {
    /// The store at that moment.
    pub snapshot: Tree,
    /// Global generation at that moment.
    pub generation: u64,
    /// Events since then.
    pub held: Held,
    /// Stream made for the prefixes last asked for.
    pub export: Option<Export>,
}

/// What the journal knows of a connection's queues.
#[derive(Debug, Default)]
pub struct Logged {
    /// Bytes of the unprocessed input.
    pub input: usize,
    /// They still are the beginning of the input.
    pub input_kept: bool,
    /// Messages before this one.
    pub next_out: u64,
    /// How many of those wait.
    pub waiting: usize,
    /// The first message of the queue, what of it is out, and the next message.
    pub queue: Option<(u64, u32, u64)>,
    /// Messages that were dropped since.
    pub dropped: Vec<u64>,
    /// Where the ring stood after the last step: consumer of requests, producer of replies.
    pub ring: Option<(u32, u32)>,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    /// Its id.
    pub id: ConnId,
    /// Its other end.
    pub peer: Peer,
    /// The request being read.
    pub decoder: FrameDecoder,
    /// Whole requests that wait: for a live update, or handed over by the daemon before us.
    pub delayed: VecDeque<Message>,
    /// Replies and events, oldest first.
    pub out: VecDeque<Outgoing>,
    /// `seq` of the next message.
    pub next_out: u64,
    /// Payloads of the events in `out`: an event is not queued twice.
    pub pending_events: HashSet<Rc<[u8]>>,
    /// In the order of registration.
    pub watches: BTreeSet<WatchId>,
    /// Those that are open.
    pub transactions: Transactions,
    /// Where the search for a free id begins.
    pub next_tx: u32,
    /// The domain it acts for.
    pub target: Option<u16>,
    /// Broken by its peer; kept only so that the end of the domain is noticed.
    pub ignored: bool,
    /// Out of service for a migration.
    pub frozen: Option<Box<Frozen>>,
    /// What the journal knows.
    pub logged: Logged,
}

impl Connection {
    /// A fresh one.
    pub fn new(id: ConnId, peer: Peer) -> Connection {
        Connection {
            id,
            peer,
            decoder: FrameDecoder::new(),
            delayed: VecDeque::new(),
            out: VecDeque::new(),
            next_out: 0,
            pending_events: HashSet::new(),
            watches: BTreeSet::new(),
            transactions: Transactions::default(),
            next_tx: 1,
            target: None,
            ignored: false,
            frozen: None,
            logged: Logged::default(),
        }
    }

    /// Queues a message.
    pub fn push(&mut self, mut m: Outgoing) {
        m.seq = self.next_out;
        self.next_out += 1;
        self.out.push_back(m);
    }

    /// Whether replies or events wait and may be sent.
    pub fn can_send(&self) -> bool {
        !self.ignored && self.frozen.is_none() && !self.out.is_empty()
    }

    /// The next bytes to send, up to `max`.
    pub fn copy_output(&self, max: usize, buf: &mut Vec<u8>) {
        buf.clear();
        if self.ignored || self.frozen.is_some() {
            return;
        }
        for m in &self.out {
            if buf.len() >= max {
                break;
            }
            m.copy_left(buf, max);
        }
    }
}
