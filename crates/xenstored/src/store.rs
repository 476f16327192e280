//! The daemon's state, and what happens to it: no I/O in here. Whoever runs it feeds bytes of connections in and takes
//! bytes out; the hypervisor is behind [`Host`].

use crate::conn::{ByConn, ConnId, Connection, Outgoing, Peer, RequestId};
use crate::direct::Direct;
use crate::held::HeldEvent;
use crate::host::Host;
use crate::import::Import;
use crate::live_update::LiveUpdate;
use crate::node::{Node, PermList, Tree, owner};
use crate::quota::{Quotas, SOFT_MEMORY, node_size};
use crate::rate::{Credit, Limiter};
use crate::redo::Redo;
use crate::tx::{Accessed, NO_GENERATION, State, Transaction};
use crate::watch::Watches;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use tracing::{debug, info, warn};
use xenstore_wire::{Access, Errno, HEADER_LEN, Header, Message, Op, PAYLOAD_MAX, Perm, path, ring};

/// Settings.
#[derive(Debug, Clone)]
pub struct Options {
    /// Default quotas.
    pub quotas: Quotas,
    /// Memory above which a warning is logged.
    pub soft_memory: u32,
    /// How long an event waits for a domain to read it before it is dropped; 0 is for ever. In milliseconds.
    pub event_timeout_ms: u64,
    /// Nodes of a dead domain go to dom0 instead of being deleted.
    pub keep_orphans: bool,
    /// A second domain with all rights.
    pub privileged_domid: u16,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            quotas: Quotas::default(),
            soft_memory: SOFT_MEMORY,
            event_timeout_ms: 20_000,
            keep_orphans: false,
            privileged_domid: 0,
        }
    }
}

/// What is known of a domain: one that has a connection, or is named by a node's permissions.
#[derive(Debug, Default)]
pub struct Domain {
    /// Global generation when it became known: permissions on older nodes meant another domain of the same id.
    pub born: u64,
    /// Its connection, once introduced.
    pub conn: Option<ConnId>,
    /// The daemon's port.
    pub port: u32,
    /// The domain's own port that it is connected to; 0 if that is not known.
    pub remote_port: u32,
    /// Its shutdown was noticed.
    pub shutdown: bool,
    /// Nodes that it owns.
    pub nodes: i64,
    /// Its watches.
    pub watches: u32,
    /// Requests whose replies or events wait.
    pub outstanding: i64,
    /// Bytes accounted.
    pub memory: i64,
    /// Quotas of its own.
    pub quotas: Option<Box<Quotas>>,
    /// What `DIRECTORY_PART` says of nodes that were imported with the domain, as long as they are unchanged.
    pub shown_generations: HashMap<Vec<u8>, ShownGeneration>,
    /// Write rate.
    pub credit: Credit,
    /// The soft limit was reported.
    pub soft_reported: bool,
    /// The hard limit was reported.
    pub hard_reported: bool,
}

/// A node keeps its generation through a migration, as its clients see it; the store counts its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShownGeneration {
    /// The store's own, by which a change is noticed.
    pub local: u64,
    /// The one that is shown.
    pub shown: u64,
}

/// A request of a domain that is not finished.
#[derive(Debug)]
pub(crate) struct OpenRequest {
    pub(crate) domid: u16,
    pub(crate) events: u32,
    pub(crate) replied: bool,
}

/// On whose behalf something happens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caller {
    pub(crate) conn: ConnId,
    pub(crate) peer: Peer,
    pub(crate) domid: u16,
    pub(crate) target: Option<u16>,
    pub(crate) privileged: bool,
    pub(crate) request: Option<RequestId>,
}

/// What a caller may do with a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rights {
    pub(crate) read: bool,
    pub(crate) write: bool,
    pub(crate) owner: bool,
}

impl Rights {
    pub(crate) const READ: Rights = Rights { read: true, write: false, owner: false };
    pub(crate) const WRITE: Rights = Rights { read: false, write: true, owner: false };
    pub(crate) const OWN: Rights = Rights { read: false, write: true, owner: true };
    const ALL: Rights = Rights { read: true, write: true, owner: true };

    fn of(a: Access) -> Rights {
        Rights { read: a.read, write: a.write, owner: false }
    }

    pub(crate) fn covers(self, want: Rights) -> bool {
        (self.read || !want.read) && (self.write || !want.write) && (self.owner || !want.owner)
    }

    fn meets(self, want: Rights) -> bool {
        (self.read && want.read) || (self.write && want.write) || (self.owner && want.owner)
    }
}

/// A node as a request sees it.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) perms: PermList,
    pub(crate) stamp: u64,
    /// Length of its value and of its children's names, in bytes.
    pub(crate) value: usize,
    pub(crate) children: usize,
}

impl From<&Rc<Node>> for Found {
    fn from(n: &Rc<Node>) -> Found {
        Found { perms: n.perms.clone(), stamp: n.generation, value: n.value.len(), children: n.children.bytes() }
    }
}

/// Why a connection must be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    /// A message longer than allowed.
    TooLong,
    /// There is no such connection.
    Unknown,
}

/// Answer of an operation: payload of the reply, or `None` if it comes later.
pub(crate) type Answer = Result<Option<Rc<[u8]>>, Errno>;

pub(crate) fn ok() -> Answer {
    thread_local! {
        static OK: Rc<[u8]> = Rc::from(&b"OK\0"[..]);
    }
    Ok(Some(OK.with(Rc::clone)))
}

/// The store with its connections.
#[derive(Debug)]
pub struct Store {
    pub(crate) tree: Tree,
    pub(crate) generation: u64,
    pub(crate) domains: BTreeMap<u16, Domain>,
    pub(crate) conns: ByConn<Connection>,
    pub(crate) next_conn: ConnId,
    pub(crate) watches: Watches,
    pub(crate) requests: HashMap<RequestId, OpenRequest>,
    pub(crate) next_request: RequestId,
    pub(crate) options: Options,
    /// Quotas of the command line; those of `options` may have been set since.
    pub(crate) started_with: Quotas,
    pub(crate) release_perms: PermList,
    pub(crate) introduce_perms: PermList,
    pub(crate) limiter: Limiter,
    pub(crate) open_transactions: usize,
    /// One that is over, for its room.
    pub(crate) spare_transaction: Option<Box<Transaction>>,
    pub(crate) live_update: Option<LiveUpdate>,
    pub(crate) imports: BTreeMap<u16, Import>,
    /// Connections that have something to send since the last look.
    woken: Vec<ConnId>,
    /// Requests that had to wait may be served now.
    pub(crate) delayed_ready: bool,
    pub(crate) default_perms: PermList,
    /// `generation` as the journal knows it.
    pub(crate) logged_generation: u64,
    /// Changes for the journal.
    pub(crate) redo: Redo,
    pub(crate) direct: Direct,
}

impl Store {
    /// A store with its three initial nodes.
    pub fn new(options: Options) -> Store {
        let mut s = Store::empty(options);
        let dom0 = s.default_perms.clone();
        for (parent, name) in [("/", "tool"), ("/tool", "xenstored")] {
            s.generation += 1;
            let node = Rc::new(Node::new(s.generation, dom0.clone()));
            if let Some(p) = s.tree.get_mut(parent.as_bytes()) {
                p.children.insert(name.as_bytes(), node);
            }
        }
        s.account_all();
        s
    }

    /// A store with a root only, for a restore.
    pub(crate) fn empty(options: Options) -> Store {
        let perms: PermList = vec![Perm::new(Access::NONE, 0)].into();
        let mut s = Store {
            tree: Tree::new(perms.clone()),
            generation: 1,
            domains: BTreeMap::new(),
            conns: ByConn::default(),
            next_conn: 1,
            watches: Watches::default(),
            requests: HashMap::new(),
            next_request: 1,
            started_with: options.quotas.clone(),
            options,
            release_perms: perms.clone(),
            introduce_perms: perms.clone(),
            limiter: Limiter::default(),
            open_transactions: 0,
            spare_transaction: None,
            live_update: None,
            imports: BTreeMap::new(),
            woken: Vec::new(),
            delayed_ready: false,
            default_perms: perms,
            logged_generation: 0,
            redo: Redo::default(),
            direct: Direct::default(),
        };
        s.domains.insert(0, Domain::default());
        s
    }

    /// Counts nodes and memory of every domain anew.
    pub(crate) fn account_all(&mut self) {
        let mut sums: HashMap<u16, (i64, i64)> = HashMap::new();
        self.tree.walk(b"/", &mut |p, n| {
            let s = sums.entry(n.owner()).or_default();
            s.0 += 1;
            s.1 += node_cost(p, n) as i64;
        });
        for (d, (nodes, memory)) in sums {
            if let Some(d) = self.domains.get_mut(&d) {
                d.nodes = nodes;
                d.memory += memory;
            }
        }
    }

    // ---- connections ----

    /// A socket was accepted.
    pub fn add_socket(&mut self) -> ConnId {
        self.add_connection(Peer::Socket)
    }

    pub(crate) fn add_connection(&mut self, peer: Peer) -> ConnId {
        let id = self.next_conn;
        self.next_conn += 1;
        self.conns.insert(id, Connection::new(id, peer));
        id
    }

    /// The connection of a domain.
    pub fn domain_connection(&self, domid: u16) -> Option<ConnId> {
        self.domains.get(&domid).and_then(|d| d.conn)
    }

    /// Look at a connection.
    pub fn connection(&self, id: ConnId) -> Option<&Connection> {
        self.conns.get(&id)
    }

    /// All connections, the oldest first.
    pub(crate) fn conns_in_order(&self) -> impl Iterator<Item = &Connection> {
        let mut all: Vec<&Connection> = self.conns.values().collect();
        all.sort_unstable_by_key(|c| c.id);
        all.into_iter()
    }

    /// All domains with a connection: id, connection, local port.
    pub fn connected_domains(&self) -> impl Iterator<Item = (u16, ConnId, u32)> + '_ {
        self.domains.iter().filter_map(|(d, v)| v.conn.map(|c| (*d, c, v.port)))
    }

    /// Connections that got something to send since the last call.
    pub fn take_woken(&mut self) -> Vec<ConnId> {
        let mut v = std::mem::take(&mut self.woken);
        v.sort_unstable();
        v.dedup();
        v
    }

    /// A connection's output is looked at now, however often it was woken just before.
    pub fn unwake(&mut self, id: ConnId) {
        while self.woken.last() == Some(&id) {
            self.woken.pop();
        }
    }

    pub(crate) fn wake(&mut self, id: ConnId) {
        if self.woken.last() != Some(&id) {
            self.woken.push(id);
        }
    }

    pub(crate) fn domid_privileged(&self, domid: u16) -> bool {
        domid == 0 || domid == self.options.privileged_domid
    }

    pub(crate) fn caller(&self, conn: &Connection) -> Caller {
        let domid = conn.peer.domid();
        Caller {
            conn: conn.id,
            peer: conn.peer,
            domid,
            target: conn.target,
            privileged: self.domid_privileged(domid),
            request: None,
        }
    }

    pub(crate) fn quotas(&self, domid: u16) -> &Quotas {
        self.domains.get(&domid).and_then(|d| d.quotas.as_deref()).unwrap_or(&self.options.quotas)
    }

    /// How many bytes of the connection's stream may be taken now; 0 while it is stalled by a quota, frozen, or waits for
    /// a live update. Never more than what belongs to the request at hand.
    pub fn wants(&mut self, id: ConnId, now_ms: u64) -> usize {
        let Some(c) = self.conns.get(&id) else { return 0 };
        if c.ignored || c.frozen.is_some() || !c.delayed.is_empty() {
            return 0;
        }
        let wants = c.decoder.wants();
        let domid = c.peer.domid();
        if let Peer::Domain(_) = c.peer
            && !self.domid_privileged(domid)
        {
            let (outstanding, memory) = {
                let q = self.quotas(domid);
                (i64::from(q.outstanding), i64::from(q.memory))
            };
            let Some(d) = self.domains.get_mut(&domid) else { return 0 };
            if d.outstanding >= outstanding && outstanding != 0 || (d.memory >= memory && memory != 0) {
                return 0;
            }
            if self.limiter.wait(&mut d.credit, now_ms) > 0 {
                return 0;
            }
        }
        wants
    }

    /// Takes bytes of a connection, up to the end of one request, and serves that. How many were taken.
    ///
    /// # Errors
    /// The connection must be closed (a socket) or is ignored from now on (a domain).
    pub fn input(&mut self, id: ConnId, bytes: &[u8], host: &mut dyn Host) -> Result<usize, Broken> {
        let c = self.conns.get_mut(&id).ok_or(Broken::Unknown)?;
        if let Peer::Domain(d) = c.peer {
            self.redo.touch(d);
        }
        // Most come whole, and need not be copied.
        if !c.decoder.is_partial()
            && let Some((h, rest)) = bytes.split_first_chunk::<HEADER_LEN>()
        {
            let h = Header::from_bytes(h);
            let len = h.len as usize;
            if let Some(body) = rest.get(..len).filter(|_| len <= PAYLOAD_MAX) {
                c.logged.input_kept = false;
                self.consider(id, &h, body, host);
                return Ok(HEADER_LEN + len);
            }
        }
        let n = match c.decoder.feed(bytes) {
            Ok(n) => n,
            Err(e) => {
                warn!(conn = id, peer = ?c.peer, "{e}: connection dropped");
                self.ignore(id, ring::error::PROTOCOL, host);
                return Err(Broken::TooLong);
            }
        };
        if let Some(m) = c.decoder.take() {
            c.logged.input_kept = false;
            self.consider(id, &m.header, &m.payload, host);
        }
        Ok(n)
    }

    fn consider(&mut self, id: ConnId, h: &Header, body: &[u8], host: &mut dyn Host) {
        if self.live_update_delays(id, h.op) {
            if let Some(c) = self.conns.get_mut(&id) {
                c.delayed.push_back(Message { header: *h, payload: body.to_vec() });
            }
            return;
        }
        self.process(id, h, body, host);
    }

    /// Serves requests that had to wait.
    pub fn run_delayed(&mut self, host: &mut dyn Host) {
        if !std::mem::take(&mut self.delayed_ready) {
            return;
        }
        let ids: Vec<ConnId> = self.conns_in_order().filter(|c| !c.delayed.is_empty()).map(|c| c.id).collect();
        for id in ids {
            while let Some(m) =
                self.conns.get_mut(&id).filter(|c| c.frozen.is_none()).and_then(|c| c.delayed.pop_front())
            {
                self.input_changed(id);
                if self.live_update_delays(id, m.header.op) {
                    if let Some(c) = self.conns.get_mut(&id) {
                        c.delayed.push_front(m);
                    }
                    break;
                }
                self.process(id, &m.header, &m.payload, host);
            }
        }
    }

    /// The peer broke the rules: nothing is read or sent any more. A domain's connection stays, so that its end is
    /// noticed; a socket is for the caller to close.
    pub fn ignore(&mut self, id: ConnId, error: u32, host: &mut dyn Host) {
        let Some(c) = self.conns.get_mut(&id) else { return };
        c.ignored = true;
        c.decoder.reset();
        c.delayed.clear();
        let peer = c.peer;
        self.input_changed(id);
        self.forget_client_state(id);
        if let Peer::Domain(d) = peer {
            self.redo.ignored(d);
            host.set_ring_error(d, error);
        }
    }

    /// The beginning of a connection's unprocessed input is another.
    pub(crate) fn input_changed(&mut self, id: ConnId) {
        if let Some(c) = self.conns.get_mut(&id) {
            c.logged.input_kept = false;
            if let Peer::Domain(d) = c.peer {
                self.redo.touch(d);
            }
        }
    }

    /// Drops watches, transactions and queued messages.
    pub(crate) fn forget_client_state(&mut self, id: ConnId) {
        self.drop_watches(id);
        self.drop_transactions(id);
        while let Some(m) = self.conns.get_mut(&id).and_then(|c| c.out.pop_front()) {
            self.sent(id, m);
        }
    }

    pub(crate) fn drop_watches(&mut self, id: ConnId) {
        let Some(c) = self.conns.get_mut(&id) else { return };
        let domid = c.peer.domid();
        let is_domain = matches!(c.peer, Peer::Domain(_));
        if is_domain && !c.watches.is_empty() {
            self.redo.unwatch_all(domid);
        }
        for w in std::mem::take(&mut c.watches) {
            if let Some(w) = self.watches.remove(w) {
                let _ = self.charge(domid, -(w.size() as i64), false);
                if is_domain && let Some(d) = self.domains.get_mut(&domid) {
                    d.watches = d.watches.saturating_sub(1);
                }
            }
        }
    }

    pub(crate) fn drop_transactions(&mut self, id: ConnId) {
        let Some(c) = self.conns.get_mut(&id) else { return };
        let domid = c.peer.domid();
        let is_domain = matches!(c.peer, Peer::Domain(_));
        for t in c.transactions.take() {
            if is_domain {
                self.redo.tx_end(domid, t.id);
            }
            self.transaction_over(domid, &t);
        }
    }

    pub(crate) fn transaction_over(&mut self, domid: u16, t: &Transaction) {
        self.open_transactions = self.open_transactions.saturating_sub(1);
        let _ = self.charge(domid, -(t.charged as i64), false);
    }

    /// A connection is gone. For a domain this is its release.
    pub fn close(&mut self, id: ConnId, host: &mut dyn Host) {
        self.forget_client_state(id);
        let Some(c) = self.conns.remove(&id) else { return };
        self.live_update_closed(id);
        if let Peer::Domain(d) = c.peer {
            self.destroy_domain(d, host);
        }
    }

    /// What a connection has to send, up to `max` bytes; [`Store::wrote`] tells how much went.
    pub fn output(&self, id: ConnId, max: usize, buf: &mut Vec<u8>) {
        match self.conns.get(&id) {
            Some(c) => c.copy_output(max, buf),
            None => buf.clear(),
        }
    }

    /// So many bytes of the output went out.
    pub fn wrote(&mut self, id: ConnId, mut n: usize) {
        if let Some(Peer::Domain(d)) = self.conns.get(&id).map(|c| c.peer) {
            self.redo.touch(d);
        }
        while n > 0 {
            let Some(m) = self.conns.get_mut(&id).and_then(|c| c.out.front_mut()) else { return };
            let part = n.min(m.left());
            m.used += part;
            n -= part;
            if m.left() == 0
                && let Some(m) = self.conns.get_mut(&id).and_then(|c| c.out.pop_front())
            {
                self.sent(id, m);
            }
        }
    }

    /// Undoes the accounting of a message that is out or dropped.
    fn sent(&mut self, id: ConnId, m: Outgoing) {
        let Some(c) = self.conns.get_mut(&id) else { return };
        let domid = c.peer.domid();
        if matches!(c.peer, Peer::Domain(_)) {
            self.redo.touch(domid);
        }
        if m.event {
            c.pending_events.remove(&m.body);
        }
        let _ = self.charge(domid, -(m.size() as i64), false);
        let Some(r) = m.request else { return };
        let Some(open) = self.requests.get_mut(&r) else { return };
        if m.event {
            open.events -= 1;
        } else {
            open.replied = true;
        }
        if open.replied && open.events == 0 {
            let domid = open.domid;
            self.requests.remove(&r);
            if let Some(d) = self.domains.get_mut(&domid) {
                d.outstanding -= 1;
            }
        }
    }

    /// Drops events that a domain has not read in time, and says when to call again (milliseconds from now).
    pub fn timers(&mut self, host: &mut dyn Host) -> Option<u64> {
        let now = host.now_ms();
        let mut next: Option<u64> = None;
        let mut sooner = |t: u64| next = Some(next.map_or(t, |n: u64| n.min(t)));
        let mut expired = Vec::new();
        // Sockets have neither, and there may be many of them.
        let privileged = self.options.privileged_domid;
        for (&d, domain) in &mut self.domains {
            let Some(c) = domain.conn.and_then(|id| self.conns.get(&id)) else { continue };
            if d == 0 || d == privileged || c.frozen.is_some() {
                continue;
            }
            for m in &c.out {
                match m.deadline {
                    Some(t) if t <= now && m.used == 0 => expired.push(c.id),
                    Some(t) if t > now => {
                        sooner(t - now);
                        break;
                    }
                    _ => {}
                }
            }
            let w = self.limiter.wait(&mut domain.credit, now);
            if w > 0 {
                sooner(w);
            }
        }
        if self.live_update.as_ref().is_some_and(LiveUpdate::is_started) {
            sooner(1000);
        }
        expired.dedup();
        for id in expired {
            let Some(c) = self.conns.get_mut(&id) else { continue };
            let (old, keep) = std::mem::take(&mut c.out)
                .into_iter()
                .partition(|m| m.used == 0 && m.deadline.is_some_and(|t| t <= now));
            c.out = keep;
            let old: std::collections::VecDeque<Outgoing> = old;
            debug!(peer = ?c.peer, count = old.len(), "watch events timed out");
            if self.redo.is_on() {
                let known = c.logged.next_out;
                c.logged.dropped.extend(old.iter().map(|m| m.seq).filter(|&s| s < known));
            }
            for m in old {
                self.sent(id, m);
            }
        }
        next
    }

    // ---- accounting ----

    /// Adds to a domain's memory.
    ///
    /// # Errors
    /// With `check`: `ENOMEM` if that would be over the quota. `ENOENT`: no such domain.
    pub(crate) fn charge(&mut self, domid: u16, bytes: i64, check: bool) -> Result<(), Errno> {
        if self.domid_privileged(domid) {
            self.domains.get_mut(&domid).ok_or(Errno::ENOENT)?.memory += bytes;
            return Ok(());
        }
        let soft = i64::from(self.options.soft_memory);
        let hard = i64::from(self.quotas(domid).memory);
        let Some(d) = self.domains.get_mut(&domid) else { return Err(Errno::ENOENT) };
        let new = d.memory + bytes;
        let mut goes_on = None;
        // Its requests waited, and nobody may raise its port for that: others may have freed the memory.
        if hard != 0 && d.memory >= hard && new < hard {
            goes_on = d.conn;
        }
        let ignored = d.conn.and_then(|c| self.conns.get(&c)).is_some_and(|c| c.ignored);
        let over = hard != 0 && new >= hard && !ignored;
        if over != d.hard_reported {
            d.hard_reported = over;
            if over {
                warn!(domid, bytes = new, quota = hard, "domain exceeds its memory quota: its requests wait");
            } else {
                info!(domid, bytes = new, quota = hard, "domain is below its memory quota again");
            }
        }
        if over && check {
            return Err(Errno::ENOMEM);
        }
        if (new >= soft && soft != 0) != d.soft_reported {
            d.soft_reported = !d.soft_reported;
            if d.soft_reported {
                warn!(domid, bytes = new, quota = soft, "domain exceeds its soft memory quota");
            }
        }
        d.memory = new;
        if let Some(id) = goes_on {
            self.wake(id);
        }
        Ok(())
    }

    /// A node's generation as clients see it.
    pub(crate) fn shown_generation(&self, path: &[u8], n: &Node) -> u64 {
        let imported = self.domains.values().filter_map(|d| d.shown_generations.get(path));
        imported.filter(|g| g.local == n.generation).map(|g| g.shown).next().unwrap_or(n.generation)
    }

    /// The same permissions with another owner.
    pub(crate) fn owned_by(&self, perms: PermList, domid: u16) -> PermList {
        match perms.first() {
            Some(p) if p.domid != domid || p.stale => perms
                .iter()
                .enumerate()
                .map(|(i, p)| if i == 0 { Perm { domid, stale: false, ..*p } } else { *p })
                .collect(),
            _ => perms,
        }
    }

    /// Imports that are not attached forget what a domain had that is gone.
    pub(crate) fn domain_gone_from_imports(&mut self, domid: u16) {
        let heir = self.options.keep_orphans.then_some(self.options.privileged_domid);
        for i in self.imports.values_mut() {
            i.domain_gone(domid, heir);
        }
    }

    pub(crate) fn count_node(&mut self, domid: u16, n: i64) {
        if let Some(d) = self.domains.get_mut(&domid) {
            d.nodes += n;
        }
    }

    /// Makes a domain known if it exists.
    pub(crate) fn know_domain(&mut self, domid: u16, host: &mut dyn Host) -> bool {
        if self.domains.contains_key(&domid) {
            return true;
        }
        if host.domain_state(domid).is_none() {
            return false;
        }
        self.domains.insert(domid, Domain { born: self.generation, ..Domain::default() });
        self.redo.known(domid, self.generation);
        true
    }

    // ---- rights ----

    fn is_current(&self, domid: u16, stamp: u64) -> bool {
        self.domains.get(&domid).is_some_and(|d| d.born <= stamp)
    }

    /// Permissions with those entries marked whose domain is gone (another may have come under its id).
    pub(crate) fn settled(&self, perms: &PermList, stamp: u64) -> PermList {
        let stale = |p: &Perm| !p.stale && !self.is_current(p.domid, stamp);
        if !perms.iter().skip(1).any(stale) {
            return perms.clone();
        }
        perms.iter().enumerate().map(|(i, p)| Perm { stale: p.stale || (i > 0 && stale(p)), ..*p }).collect()
    }

    pub(crate) fn rights(&self, c: &Caller, perms: &[Perm], stamp: u64) -> Rights {
        let own = owner(perms);
        if c.privileged || own == c.domid || c.target == Some(own) {
            return Rights::ALL;
        }
        let named = perms
            .iter()
            .skip(1)
            .find(|p| (p.domid == c.domid || Some(p.domid) == c.target) && !p.stale && self.is_current(p.domid, stamp));
        Rights::of(named.or(perms.first()).map_or(Access::NONE, |p| p.access))
    }

    /// The node as the caller's transaction sees it, which joins the transaction if it had not.
    pub(crate) fn find(
        &mut self,
        c: &Caller,
        tx: &mut Option<Box<Transaction>>,
        path: &[u8],
    ) -> Result<Option<Found>, Errno> {
        match tx {
            None => Ok(self.tree.get(path).map(Found::from)),
            Some(t) => {
                let a = self.join(c, t, path)?;
                let (stamp, value, children) = (a.stamp(), a.value().len(), a.children_bytes());
                Ok(a.perms().cloned().map(|perms| Found { perms, stamp, value, children }))
            }
        }
    }

    /// Makes a node part of a transaction.
    pub(crate) fn join<'t>(
        &mut self,
        c: &Caller,
        t: &'t mut Transaction,
        path: &[u8],
    ) -> Result<&'t mut Accessed, Errno> {
        let place = match t.nodes.get_index_of(path) {
            Some(place) => place,
            None => self.first_access(c, t, path)?,
        };
        if self.redo.is_on() && matches!(c.peer, Peer::Domain(_)) && t.touched.last().is_none_or(|p| **p != *path) {
            t.touched.push(Rc::from(path));
        }
        t.nodes.get_index_mut(place).map(|(_, a)| a).ok_or(Errno::EIO)
    }

    /// Puts a node into a transaction; its place there.
    fn first_access(&mut self, c: &Caller, t: &mut Transaction, path: &[u8]) -> Result<usize, Errno> {
        if !c.privileged && t.nodes.len() >= self.quotas(c.domid).transaction_nodes as usize {
            t.fail = true;
            return Err(Errno::ENOSPC);
        }
        let base = self.tree.get(path).cloned();
        let charged = match &base {
            Some(b) => tx_cost(path, b.perms.len(), b.value.len(), b.children.bytes()),
            None => tx_cost(path, 0, 0, 0),
        };
        if self.charge(c.domid, charged as i64, true) == Err(Errno::ENOMEM) {
            t.fail = true;
            return Err(Errno::ENOMEM);
        }
        t.charged += charged;
        let generation = base.as_ref().map_or(NO_GENERATION, |b| b.generation);
        let a = Accessed { base, generation, state: State::Unchanged, fire: None, charged };
        Ok(t.nodes.insert_full(Rc::from(path), a).0)
    }

    /// Whether an absolute path may name a node.
    pub(crate) fn is_valid(&self, path: &[u8]) -> bool {
        path::is_valid(path, self.options.quotas.path_max as usize)
    }

    /// The node, if it is there and the caller has the rights. What is said otherwise depends on what the caller may
    /// know: without the right on the nearest existing parent it is always `EACCES`.
    pub(crate) fn find_for(
        &mut self,
        c: &Caller,
        tx: &mut Option<Box<Transaction>>,
        path: &[u8],
        want: Rights,
    ) -> Result<Found, Errno> {
        if !self.is_valid(path) {
            return Err(Errno::EINVAL);
        }
        let e = match self.find(c, tx, path)? {
            Some(f) if self.rights(c, &f.perms, f.stamp).covers(want) => return Ok(f),
            Some(_) => Errno::EACCES,
            None => Errno::ENOENT,
        };
        if c.privileged && tx.is_none() {
            return Err(e);
        }
        let mut at = path;
        loop {
            at = path::parent(at);
            if let Some(f) = self.find(c, tx, at)? {
                return Err(if self.rights(c, &f.perms, f.stamp).meets(want) { e } else { Errno::EACCES });
            }
            if at == b"/" {
                return Err(Errno::EACCES);
            }
        }
    }

    // ---- replies and events ----

    /// Serves one request.
    pub(crate) fn process(&mut self, id: ConnId, h: &Header, body: &[u8], host: &mut dyn Host) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let op = Op::from_wire(h.op).filter(|o| !matches!(o, Op::WatchEvent | Op::Error));
        let ignores_tx = matches!(op, Some(Op::Watch | Op::Unwatch));
        let mut tx = None;
        let mut tx_missing = false;
        if h.tx_id != 0 && !ignores_tx {
            tx = conn.transactions.remove(h.tx_id);
            tx_missing = tx.is_none();
        }
        let had_tx = tx.is_some();
        let conn = &self.conns[&id];
        let mut caller = self.caller(conn);
        if let Peer::Domain(domid) = conn.peer
            && !caller.privileged
        {
            caller.request = Some(self.next_request);
            self.requests.insert(self.next_request, OpenRequest { domid, events: 0, replied: false });
            self.next_request += 1;
        }
        let mut initial_event = None;
        let answer = match op {
            None => Err(Errno::ENOSYS),
            Some(op) if !caller.privileged && is_privileged(op) => Err(Errno::EACCES),
            Some(_) if tx_missing => Err(Errno::ENOENT),
            Some(op) => self.dispatch(&caller, &mut tx, op, h, body, &mut initial_event, host),
        };
        debug!(conn = id, op = op.map_or("?", Op::name), len = body.len(), ok = answer.is_ok(), "request");
        // The transaction is put back unless it was ended; the connection may be gone (a domain that released itself).
        if let Some(mut t) = tx {
            if let Peer::Domain(d) = caller.peer
                && self.conns.contains_key(&id)
            {
                self.log_transaction(d, &mut t);
            }
            match self.conns.get_mut(&id) {
                Some(c) => drop(c.transactions.insert(t)),
                None => self.transaction_over(caller.domid, &t),
            }
        } else if had_tx {
            self.open_transactions = self.open_transactions.saturating_sub(1);
            if let Peer::Domain(d) = caller.peer {
                self.redo.tx_end(d, h.tx_id);
            }
        }
        match answer {
            Ok(None) => self.forget_request(&caller),
            Ok(Some(body)) => self.reply(&caller, h, Ok(body)),
            Err(e) => self.reply(&caller, h, Err(e)),
        }
        if let Some((path, token)) = initial_event {
            self.queue_event(id, None, &path, &token, host.now_ms());
        }
    }

    fn forget_request(&mut self, c: &Caller) {
        if let Some(r) = c.request {
            self.requests.remove(&r);
        }
    }

    /// Queues the reply to a request.
    pub(crate) fn reply(&mut self, c: &Caller, h: &Header, answer: Result<Rc<[u8]>, Errno>) {
        let (op, body) = match answer {
            Ok(b) if b.len() > PAYLOAD_MAX => (Op::Error.to_wire(), Errno::E2BIG.payload().into()),
            Ok(b) => (h.op, b),
            Err(e) => (Op::Error.to_wire(), e.payload().into()),
        };
        if self.reply_directly(c.conn, h, op, &body) {
            return;
        }
        let size = (body.len() + HEADER_LEN) as i64;
        // Short replies always go: errors and acknowledgements must get through.
        let (op, body) = if body.len() > 16 && self.charge(c.domid, size, true).is_err() {
            let e = Errno::ENOMEM.payload();
            let _ = self.charge(c.domid, (e.len() + HEADER_LEN) as i64, false);
            (Op::Error.to_wire(), e.into())
        } else {
            if body.len() <= 16 {
                let _ = self.charge(c.domid, size, false);
            }
            (op, body)
        };
        let Some(conn) = self.conns.get_mut(&c.conn) else {
            let _ = self.charge(c.domid, -((body.len() + HEADER_LEN) as i64), false);
            self.forget_request(c);
            return;
        };
        let header = Header { op, req_id: h.req_id, tx_id: h.tx_id, len: body.len() as u32 };
        let mut m = Outgoing::new(header, body);
        m.request = c.request;
        conn.push(m);
        if let Peer::Domain(d) = conn.peer {
            self.redo.touch(d);
        }
        if c.request.is_some()
            && let Some(d) = self.domains.get_mut(&c.domid)
        {
            d.outstanding += 1;
        }
        self.wake(c.conn);
    }

    /// Queues a watch event, unless the same one waits already, or the domain's memory is used up.
    pub(crate) fn queue_event(
        &mut self,
        id: ConnId,
        request: Option<RequestId>,
        path: &[u8],
        token: &[u8],
        now_ms: u64,
    ) {
        let len = path.len() + token.len() + 2;
        if len > PAYLOAD_MAX {
            return;
        }
        let body: Rc<[u8]> = xenstore_wire::payload::join([path, token]).into();
        let special = path.first() == Some(&b'@');
        let Some(c) = self.conns.get(&id) else { return };
        if c.ignored || (!special && c.pending_events.contains(&body)) {
            return;
        }
        let peer = c.peer;
        let domid = peer.domid();
        if self.charge(domid, (len + HEADER_LEN) as i64, true).is_err() {
            return;
        }
        let header = Header { op: Op::WatchEvent.to_wire(), req_id: 0, tx_id: 0, len: len as u32 };
        let mut m = Outgoing::new(header, body.clone());
        m.event = true;
        if matches!(peer, Peer::Domain(_)) && !self.domid_privileged(domid) && self.options.event_timeout_ms > 0 {
            m.deadline = Some(now_ms + self.options.event_timeout_ms);
        }
        if let Some(open) = request.and_then(|r| self.requests.get_mut(&r)) {
            open.events += 1;
            m.request = request;
        }
        if let Some(c) = self.conns.get_mut(&id) {
            if !special {
                c.pending_events.insert(body);
            }
            c.push(m);
        }
        if let Peer::Domain(d) = peer {
            self.redo.touch(d);
        }
        self.wake(id);
    }

    /// Tells watchers of a change at `path`. `node` are the node's permissions if the caller has them at hand (it may be
    /// gone already), `old` those it had before the change.
    pub(crate) fn fire(
        &mut self,
        by: Option<&Caller>,
        path: &[u8],
        node: Option<(&Found, Option<&Found>)>,
        exact: bool,
        old: Option<&[Perm]>,
        host: &dyn Host,
    ) {
        let ids = self.watches.matching(path, exact);
        if ids.is_empty() {
            return;
        }
        let looked_up;
        let (node, parent) = match node {
            Some((n, p)) => (Some(n), p.cloned()),
            None => {
                looked_up = self.tree.get(path).map(Found::from);
                (looked_up.as_ref(), None)
            }
        };
        let parent = parent.or_else(|| self.tree.get(path::parent(path)).map(Found::from));
        let node = node.cloned();
        let (request, now_ms) = (by.and_then(|c| c.request), host.now_ms());
        let mut seen: Vec<(ConnId, bool)> = Vec::new();
        for w in ids {
            let Some(watch) = self.watches.get(w) else { continue };
            let conn = watch.conn;
            let may = match seen.iter().find(|(c, _)| *c == conn) {
                Some((_, may)) => *may,
                None => {
                    let may = self.conns.get(&conn).is_some_and(|c| {
                        let c = self.caller(c);
                        let reads = |f: &Found| self.rights(&c, &f.perms, f.stamp).read;
                        old.is_some_and(|p| self.rights(&c, p, u64::MAX).read)
                            || node.as_ref().is_some_and(|n| reads(n) || parent.as_ref().is_some_and(reads))
                    });
                    seen.push((conn, may));
                    may
                }
            };
            if may {
                self.event_for_watch(w, path, request, now_ms);
            }
        }
    }

    /// Sends or holds the event of one watch.
    pub(crate) fn event_for_watch(&mut self, w: u64, path: &[u8], request: Option<RequestId>, now_ms: u64) {
        let Some(watch) = self.watches.get(w) else { return };
        let id = watch.conn;
        if let Some(f) = self.conns.get_mut(&id).and_then(|c| c.frozen.as_mut()) {
            let e = HeldEvent { path: Rc::from(path), watch: w };
            if !f.held.contains(&e) {
                self.hold(id, e);
            }
            return;
        }
        let (shown, token) = (watch.shown(path).to_vec(), watch.token.clone());
        self.queue_event(id, request, &shown, &token, now_ms);
    }

    /// Keeps an event for a frozen domain, unless its memory is used up: then it is lost, as it would be otherwise.
    fn hold(&mut self, id: ConnId, e: HeldEvent) {
        let Some(Peer::Domain(domid)) = self.conns.get(&id).map(|c| c.peer) else { return };
        let Some(watch) = self.watches.get(e.watch) else { return };
        let size = watch.event_size(&e.path);
        if self.charge(domid, size as i64, true).is_err() {
            return;
        }
        let Some(watch) = self.watches.get(e.watch) else { return };
        self.redo.held(domid, &e.path, &watch.path, &watch.token);
        if let Some(f) = self.conns.get_mut(&id).and_then(|c| c.frozen.as_mut()) {
            f.held.push(e, size);
        }
    }

    /// Tells watchers of `@introduceDomain` or `@releaseDomain`. Those who are not shown which domains are told once for all.
    pub(crate) fn fire_special(&mut self, name: &[u8], domids: &[u16], now_ms: u64) {
        let perms = if name == b"@releaseDomain" { self.release_perms.clone() } else { self.introduce_perms.clone() };
        let with_domid: Vec<Vec<u8>> =
            domids.iter().map(|d| xenstore_wire::path::join(name, d.to_string().as_bytes())).collect();
        let mut events: Vec<(u64, Vec<u8>)> = Vec::new();
        for w in self.watches.matching(name, true) {
            if self.watches.get(w).is_some_and(|w| w.depth == Some(1)) {
                events.extend(with_domid.iter().map(|p| (w, p.clone())));
            } else {
                events.push((w, name.to_vec()));
            }
        }
        for p in &with_domid {
            events.extend(self.watches.matching(p, true).into_iter().map(|w| (w, p.clone())));
        }
        for (w, p) in events {
            let may = self
                .watches
                .get(w)
                .and_then(|w| self.conns.get(&w.conn))
                .is_some_and(|c| self.rights(&self.caller(c), &perms, u64::MAX).read);
            if may {
                self.event_for_watch(w, &p, None, now_ms);
            }
        }
    }

    // ---- for tests, reports and simulators ----

    /// The tree.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Accounting of a domain: nodes, watches, outstanding requests, bytes.
    pub fn usage(&self, domid: u16) -> Option<(i64, u32, i64, i64)> {
        self.domains.get(&domid).map(|d| (d.nodes, d.watches, d.outstanding, d.memory))
    }

    /// Checks that accounting, watches and connections fit together; what does not, in words.
    pub fn check(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut sums: HashMap<u16, i64> = HashMap::new();
        let mut memory: HashMap<u16, i64> = HashMap::new();
        self.tree.walk(b"/", &mut |p, n| {
            *sums.entry(n.owner()).or_default() += 1;
            *memory.entry(n.owner()).or_default() += node_cost(p, n) as i64;
            if n.perms.is_empty() {
                wrong.push(format!("node {} has no owner", String::from_utf8_lossy(p)));
            }
        });
        for c in self.conns.values() {
            let watches: usize = c.watches.iter().filter_map(|w| self.watches.get(*w)).map(|w| w.size()).sum();
            let waiting: usize = c.out.iter().map(Outgoing::size).sum();
            let held = c.frozen.as_ref().map_or(0, |f| f.held.charged());
            let open: usize = c.transactions.iter().map(|t| t.charged).sum();
            *memory.entry(c.peer.domid()).or_default() += (watches + waiting + held + open) as i64;
        }
        for (d, v) in &self.domains {
            let has = memory.get(d).copied().unwrap_or(0);
            if has != v.memory {
                wrong.push(format!("domain {d} is accounted {} bytes and has {has}", v.memory));
            }
            let n = sums.remove(d).unwrap_or(0);
            if n != v.nodes {
                wrong.push(format!("domain {d} is accounted {} nodes and has {n}", v.nodes));
            }
            if let Some(c) = v.conn
                && !self.conns.contains_key(&c)
            {
                wrong.push(format!("domain {d} has a connection that does not exist"));
            }
        }
        for (d, n) in sums {
            wrong.push(format!("{n} nodes belong to domain {d}, which does not exist"));
        }
        let of_conns: usize = self.conns.values().map(|c| c.watches.len()).sum();
        if of_conns != self.watches.len() {
            wrong.push(format!("{} watches, {of_conns} of them with connections", self.watches.len()));
        }
        let open: usize = self.conns.values().map(|c| c.transactions.len()).sum();
        if open != self.open_transactions {
            wrong.push(format!("{open} open transactions, counted {}", self.open_transactions));
        }
        wrong
    }
}

/// What the memory quota counts for a node.
pub(crate) fn node_cost(path: &[u8], n: &Node) -> usize {
    path.len() + node_size(n.perms.len(), n.value.len(), n.children.bytes())
}

/// What it counts for a transaction's copy of one (the path has the transaction's generation before it).
pub(crate) fn tx_cost(path: &[u8], perms: usize, value: usize, children: usize) -> usize {
    path.len() + 8 + node_size(perms, value, children)
}

/// Operations for dom0 and its tools only.
fn is_privileged(op: Op) -> bool {
    !matches!(
        op,
        Op::Directory
            | Op::DirectoryPart
            | Op::Read
            | Op::Write
            | Op::Mkdir
            | Op::Rm
            | Op::GetPerms
            | Op::SetPerms
            | Op::Watch
            | Op::Unwatch
            | Op::ResetWatches
            | Op::TransactionStart
            | Op::TransactionEnd
            | Op::GetDomainPath
    )
}
