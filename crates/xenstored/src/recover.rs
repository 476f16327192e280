//! The store in a state journal (docs/xenstored-journal.md): what goes into it, and a store out of it.
//!
//! A journal is a snapshot, a batch with what the snapshot's format has no record for, and a batch for each step since.
//! Sockets are not in it: they die with the process.

use crate::conn::{ConnId, Frozen, Outgoing, Peer};
use crate::held::{Held, HeldEvent};
use crate::import::Import;
use crate::live_update::unprocessed;
use crate::node::{Name, Node, PermList, Tree, owner};
use crate::quota::Quotas;
use crate::redo::{Base, Change, Changes, Moved, Queued, Redo, RedoError, RingStep, TxNode, TxState};
use crate::store::{Domain, OpenRequest, Options, ShownGeneration, Store};
use crate::tx::{Accessed, Changed, State, Transaction};
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use thiserror::Error;
use tracing::warn;
use xenstore_wire::stream::{ConnSpec, EncodeError, Format, Record, StreamError, Writer, read_all};
use xenstore_wire::{ABS_PATH_MAX, DOMID_INVALID, Header, path, payload};

/// A journal that no store can be made of.
#[derive(Debug, Error)]
pub enum RecoverError {
    /// The snapshot's format.
    #[error("the snapshot: {0}")]
    Snapshot(#[from] StreamError),
    /// What the snapshot says.
    #[error("the snapshot, record {index}: {what}")]
    Record {
        /// Number of the record, from 0.
        index: usize,
        /// What is wrong.
        what: String,
    },
    /// A batch's format.
    #[error("batch {batch}: {error}")]
    Batch {
        /// Number of the batch, from 0.
        batch: usize,
        /// Where and what.
        error: RedoError,
    },
    /// What a batch says.
    #[error("batch {batch}: {what}")]
    Change {
        /// Number of the batch, from 0.
        batch: usize,
        /// What is wrong.
        what: String,
    },
}

/// A store that came back.
#[derive(Debug)]
pub struct Recovered {
    /// The store; the domains' ports are still to be bound.
    pub store: Store,
    /// Connected domains and their own ports.
    pub domains: Vec<(u16, u32)>,
    /// What the last batch says of rings, which the daemon may not have come to do.
    pub last: LastStep,
}

/// What was to be done to rings once the batch was written.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct LastStep {
    /// Rings to be emptied; first.
    pub resets: Vec<u16>,
    /// Indexes to be published.
    pub ring: Option<RingStep>,
}

impl Store {
    /// Keeps changes for a journal from now on, or does no longer.
    pub fn keep_changes(&mut self, yes: bool) {
        self.redo.turn(yes);
    }

    /// The changes since the last call and a ring's step as a batch, in `out`. False if there is nothing.
    pub fn take_changes(&mut self, step: Option<&RingStep>, out: &mut Vec<u8>) -> bool {
        out.clear();
        if !self.redo.is_on() || (self.redo.is_empty() && step.is_none()) {
            return false;
        }
        for d in self.redo.take_touched() {
            self.log_queues(d);
        }
        if let Some(s) = step {
            self.redo.ring(s);
            self.note_ring(s.domid, s.requests.to, s.replies.to);
        }
        if self.redo.is_empty() {
            return false;
        }
        if self.generation != self.logged_generation {
            self.logged_generation = self.generation;
            self.redo.generation(self.generation);
        }
        self.redo.swap(out);
        true
    }

    /// Where a domain's ring stands: consumer of requests, producer of replies.
    pub fn note_ring(&mut self, domid: u16, requests: u32, replies: u32) {
        if let Some(c) = self.domain_connection(domid).and_then(|id| self.conns.get_mut(&id)) {
            c.logged.ring = Some((requests, replies));
        }
    }

    /// Where the journal has a domain's ring.
    pub fn noted_ring(&self, domid: u16) -> Option<(u32, u32)> {
        self.domain_connection(domid).and_then(|id| self.conns.get(&id)).and_then(|c| c.logged.ring)
    }

    /// The state as a snapshot and the batch that belongs to it. Changes so far are part of it.
    ///
    /// # Errors
    /// A node does not fit the format.
    pub fn snapshot(&mut self) -> Result<(Vec<u8>, Vec<u8>), EncodeError> {
        let mut w = Writer::new(Format::V2);
        w.record(&Record::Global { socket_fd: -1, evtchn_fd: -1 })?;
        let domains: Vec<(u16, ConnId)> = self.connected_domains().map(|d| (d.0, d.1)).collect();
        for &(domid, id) in &domains {
            let (Some(c), Some(d)) = (self.conns.get(&id), self.domains.get(&domid)) else { continue };
            w.record(&Record::Connection {
                conn_id: c.id,
                spec: ConnSpec::Ring { domid, tdomid: c.target.unwrap_or(DOMID_INVALID), evtchn: d.remote_port },
                in_data: Vec::new(),
                out_resp_len: 0,
                out_data: Vec::new(),
            })?;
            for r in self.watch_records(c, true) {
                w.record(&r)?;
            }
        }
        self.write_tree(&self.tree, &mut w)?;
        let stream = w.finish();
        self.redo.turn(true);
        self.log_all(&domains)?;
        self.logged_generation = self.generation;
        self.redo.generation(self.generation);
        let mut first = Vec::new();
        self.redo.swap(&mut first);
        Ok((stream, first))
    }

    fn write_tree(&self, tree: &Tree, w: &mut Writer) -> Result<(), EncodeError> {
        let mut done = Ok(());
        tree.walk(b"/", &mut |p, n| {
            if done.is_ok() {
                done = w
                    .record(&self.node_record(p, n))
                    .and_then(|()| w.record(&Record::NodeMeta { generation: n.generation, flags: 0 }));
            }
        });
        done
    }

    /// All that the snapshot's stream has no record for.
    fn log_all(&mut self, connected: &[(u16, ConnId)]) -> Result<(), EncodeError> {
        for (domid, d) in &self.domains {
            self.redo.known(*domid, d.born);
            if d.shutdown {
                self.redo.shutdown(*domid, true);
            }
            if let Some(q) = &d.quotas {
                self.redo.domain_quotas(*domid, &q.values());
            }
            if !d.shown_generations.is_empty() {
                let all = d.shown_generations.iter().map(|(p, g)| (&p[..], g.local, g.shown));
                self.redo.shown(*domid, all);
            }
        }
        self.redo.special(true, &self.release_perms);
        self.redo.special(false, &self.introduce_perms);
        self.log_quotas();
        for &(domid, id) in connected {
            let Some(c) = self.conns.get(&id) else { continue };
            if c.ignored {
                self.redo.ignored(domid);
            }
            if let Some((requests, replies)) = c.logged.ring {
                let at = |i| Moved { from: i, to: i };
                self.redo.ring(&RingStep { domid, requests: at(requests), replies: at(replies) });
            }
            if let Some(f) = &c.frozen {
                let mut w = Writer::new(Format::V2);
                self.write_tree(&f.snapshot, &mut w)?;
                self.redo.freeze(domid, f.generation, Some(&w.finish()));
                for e in f.held.iter() {
                    if let Some(w) = self.watches.get(e.watch) {
                        self.redo.held(domid, &e.path, &w.path, &w.token);
                    }
                }
            }
            self.log_transactions(id);
            let Some(c) = self.conns.get_mut(&id) else { continue };
            self.redo.next_tx(domid, c.next_tx);
            let ring = c.logged.ring;
            c.logged = crate::conn::Logged { ring, ..Default::default() };
            self.log_queues(domid);
        }
        if let Some((domid, h)) = self.late_request() {
            self.redo.late(domid, Some(&h));
        }
        for (domid, i) in &self.imports {
            i.log(*domid, &mut self.redo);
        }
        Ok(())
    }

    /// A connection's open transactions, wholly.
    pub(crate) fn log_transactions(&mut self, id: ConnId) {
        let Some(c) = self.conns.get_mut(&id) else { return };
        let Peer::Domain(domid) = c.peer else { return };
        for mut t in c.transactions.take() {
            t.touched = t.nodes.keys().cloned().collect();
            t.logged = None;
            self.log_transaction(domid, &mut t);
            if let Some(c) = self.conns.get_mut(&id) {
                c.transactions.insert(t);
            }
        }
    }

    /// What a transaction's journal lacks.
    pub(crate) fn log_transaction(&mut self, domid: u16, t: &mut Transaction) {
        if !self.redo.is_on() {
            return;
        }
        if t.logged != Some((t.fail, t.created)) {
            t.logged = Some((t.fail, t.created));
            self.redo.tx_open(domid, t.id, t.generation, t.fail, t.created);
        }
        let mut done = std::collections::HashSet::new();
        for p in std::mem::take(&mut t.touched) {
            if let Some(a) = t.nodes.get(&p)
                && done.insert(p.clone())
            {
                self.redo.tx_node(domid, t.id, &p, a, self.tree.get(&p));
            }
        }
    }

    /// Quotas of all and the soft one.
    pub(crate) fn log_quotas(&mut self) {
        let mut v = self.options.quotas.values();
        v.push(self.options.soft_memory);
        self.redo.quotas(&v);
    }

    pub(crate) fn set_domain_quotas(&mut self, domid: u16, q: Quotas) {
        self.redo.domain_quotas(domid, &q.values());
        if let Some(d) = self.domains.get_mut(&domid) {
            d.quotas = Some(Box::new(q));
        }
    }

    /// What changed in a domain's queues.
    fn log_queues(&mut self, domid: u16) {
        let Some(c) = self.domain_connection(domid).and_then(|id| self.conns.get_mut(&id)) else { return };
        let l = &mut c.logged;
        let at = if l.input_kept { l.input } else { 0 };
        if c.decoder.is_partial() || !c.delayed.is_empty() || l.input > 0 {
            let input = unprocessed(c);
            let l = &mut c.logged;
            let at = at.min(input.len());
            if at < input.len() || at != l.input {
                self.redo.input(domid, at as u32, &input[at..]);
            }
            l.input = input.len();
        }
        let l = &mut c.logged;
        l.input_kept = true;
        // A message that came and went since the last batch is none of the journal's business.
        let (front, used) = c.out.front().map_or((c.next_out, 0), |m| (m.seq, m.used as u32));
        if l.waiting == 0 && c.out.is_empty() {
            l.next_out = c.next_out;
            l.dropped.clear();
            return;
        }
        let state = (front, used, c.next_out);
        if l.queue == Some(state) && l.dropped.is_empty() {
            return;
        }
        let known = l.next_out;
        let fresh = c.out.iter().filter(|m| m.seq >= known).map(|m| Queued {
            seq: m.seq,
            event: m.event,
            headless: m.headless,
            head: m.head,
            body: &m.body,
        });
        self.redo.output(domid, state, &l.dropped, fresh);
        l.dropped.clear();
        l.next_out = c.next_out;
        l.waiting = c.out.len();
        l.queue = Some(state);
    }

    /// A store out of a journal's snapshot and batches.
    ///
    /// # Errors
    /// They are broken or contradict themselves. Nothing was touched.
    pub fn recover<'a>(
        options: Options,
        snapshot: &[u8],
        batches: impl IntoIterator<Item = &'a [u8]>,
        now_ms: u64,
    ) -> Result<Recovered, RecoverError> {
        let mut r = Recovery { store: Store::empty(options), now_ms, input: BTreeMap::new(), late: BTreeMap::new() };
        r.snapshot(snapshot)?;
        let mut last = LastStep::default();
        for (batch, bytes) in batches.into_iter().enumerate() {
            last = LastStep::default();
            for c in Changes::new(bytes) {
                let c = c.map_err(|error| RecoverError::Batch { batch, error })?;
                match &c {
                    Change::Ring(s) => last.ring = Some(*s),
                    Change::RingReset { domid } => last.resets.push(*domid),
                    _ => {}
                }
                r.apply(c).map_err(|what| RecoverError::Change { batch, what })?;
            }
        }
        let domains = r.finish();
        Ok(Recovered { store: r.store, domains, last })
    }

    /// A domain that came back is bound to a port again.
    pub fn reconnected(&mut self, domid: u16, local_port: u32) {
        if let Some(d) = self.domains.get_mut(&domid) {
            d.port = local_port;
        }
    }
}

/// A batch that says nothing but what is to be done to rings; empty if there is nothing.
pub(crate) fn last_step(step: Option<&RingStep>, resets: &[u16]) -> Vec<u8> {
    let mut redo = Redo::default();
    redo.turn(true);
    for &d in resets {
        redo.ring_reset(d);
    }
    if let Some(s) = step {
        redo.ring(s);
    }
    let mut batch = Vec::new();
    redo.swap(&mut batch);
    batch
}

/// A store on its way back.
struct Recovery {
    store: Store,
    now_ms: u64,
    /// Unprocessed input of domains.
    input: BTreeMap<u16, Vec<u8>>,
    /// Requests that were to be answered later.
    late: BTreeMap<u16, Header>,
}

fn shown(p: &[u8]) -> String {
    String::from_utf8_lossy(p).into_owned()
}

impl Recovery {
    fn snapshot(&mut self, stream: &[u8]) -> Result<(), RecoverError> {
        let (_, records) = read_all(stream)?;
        let mut conns: BTreeMap<u32, u16> = BTreeMap::new();
        let mut node: Option<Vec<u8>> = None;
        for (index, r) in records.into_iter().enumerate() {
            let done = match r {
                Record::Global { .. } => Ok(()),
                Record::Connection { conn_id, spec: ConnSpec::Ring { domid, tdomid, evtchn }, .. } => {
                    conns.insert(conn_id, domid);
                    self.introduce(domid, evtchn).and_then(|()| {
                        let target = Some(tdomid).filter(|&t| t != DOMID_INVALID);
                        self.apply(Change::Target { domid, target })
                    })
                }
                Record::Watch { conn_id, path, token, depth } => match conns.get(&conn_id) {
                    Some(&domid) => {
                        let depth = depth.filter(|&d| d != xenstore_wire::stream::DEPTH_UNLIMITED);
                        self.apply(Change::Watch { domid, path: &path, token: &token, depth })
                    }
                    None => Err(format!("there is no connection {conn_id}")),
                },
                Record::Node { conn_id: 0, perms, path, value, .. } => {
                    node = Some(path.clone());
                    self.store.restore_node(&path, perms.into(), value)
                }
                Record::NodeMeta { generation, .. } => {
                    if let Some(n) = node.take().and_then(|p| self.store.tree.get_mut(&p)) {
                        n.generation = generation;
                    }
                    Ok(())
                }
                r => Err(format!("a snapshot has no such record: {r:?}")),
            };
            done.map_err(|what| RecoverError::Record { index, what })?;
        }
        Ok(())
    }

    /// A tree out of a stream.
    fn tree(&mut self, stream: &[u8]) -> Result<Tree, String> {
        let known: Vec<u16> = self.store.domains.keys().copied().collect();
        let empty = Tree::new(self.store.default_perms.clone());
        let now = std::mem::replace(&mut self.store.tree, empty);
        let done = self.snapshot(stream).map_err(|e| format!("the store of a frozen domain: {e}"));
        let tree = std::mem::replace(&mut self.store.tree, now);
        // Those that only the old store names.
        self.store.domains.retain(|d, _| known.binary_search(d).is_ok());
        done.map(|()| tree)
    }

    fn conn(&mut self, domid: u16) -> Result<&mut crate::conn::Connection, String> {
        let id = self.store.domain_connection(domid);
        id.and_then(|id| self.store.conns.get_mut(&id)).ok_or_else(|| format!("domain {domid} is not connected"))
    }

    fn domain(&mut self, domid: u16) -> Result<&mut Domain, String> {
        self.store.domains.get_mut(&domid).ok_or_else(|| format!("domain {domid} is not known"))
    }

    fn introduce(&mut self, domid: u16, remote_port: u32) -> Result<(), String> {
        if self.store.domain_connection(domid).is_some() {
            return Err(format!("domain {domid} is connected twice"));
        }
        self.store.introduced(domid, 0, remote_port, self.now_ms);
        Ok(())
    }

    fn node(&mut self, p: &[u8], generation: u64, perms: PermList, value: &[u8], to_end: bool) -> Result<(), String> {
        if !path::is_valid(p, ABS_PATH_MAX) {
            return Err(format!("{:?} is no path", shown(p)));
        }
        let s = &mut self.store;
        s.domains.entry(owner(&perms)).or_default();
        s.generation = s.generation.max(generation);
        if (p == b"/" || !to_end)
            && let Some(n) = s.tree.get_mut(p)
        {
            (n.generation, n.perms, n.value) = (generation, perms, value.into());
            return Ok(());
        }
        let name = path::leaf(p);
        let parent =
            s.tree.get_mut(path::parent(p)).ok_or_else(|| format!("node {} comes before its parent", shown(p)))?;
        let mut n = Node::new(generation, perms);
        n.value = value.into();
        if let Some(old) = parent.children.remove(name) {
            n.children = old.children.clone();
        }
        parent.children.insert(name, Rc::new(n));
        Ok(())
    }

    fn apply(&mut self, c: Change<'_>) -> Result<(), String> {
        let now_ms = self.now_ms;
        match c {
            Change::Node { path, generation, perms, value, to_end } => {
                return self.node(path, generation, perms.into(), value, to_end);
            }
            Change::Meta { path, generation, perms } => {
                let n = self.store.tree.get_mut(path).ok_or_else(|| format!("there is no node {}", shown(path)))?;
                (n.generation, n.perms) = (generation, perms.into());
                self.store.generation = self.store.generation.max(generation);
            }
            Change::Remove { path } => {
                if let Some(parent) = self.store.tree.get_mut(path::parent(path)) {
                    parent.children.remove(path::leaf(path));
                }
            }
            Change::Special { release: true, perms } => self.store.release_perms = perms.into(),
            Change::Special { release: false, perms } => self.store.introduce_perms = perms.into(),
            Change::Generation(n) => self.store.generation = n,
            Change::Known { domid, born } => self.store.domains.entry(domid).or_default().born = born,
            Change::Forgotten { domid } => {
                self.store.domain_gone_from_imports(domid);
                self.store.domains.remove(&domid);
            }
            Change::Introduced { domid, remote_port } => return self.introduce(domid, remote_port),
            Change::Gone { domid } => {
                if let Some(id) = self.store.domain_connection(domid) {
                    self.store.forget_client_state(id);
                    self.store.conns.remove(&id);
                }
                self.input.remove(&domid);
                self.late.remove(&domid);
                self.store.domains.remove(&domid);
                if domid != 0 {
                    self.store.domain_gone_from_imports(domid);
                } else {
                    self.store.domains.insert(0, Domain::default());
                }
            }
            Change::Port { domid, remote_port } => self.domain(domid)?.remote_port = remote_port,
            Change::Target { domid, target } => self.conn(domid)?.target = target,
            Change::Shutdown { domid, yes } => self.domain(domid)?.shutdown = yes,
            Change::Ignored { domid } => {
                self.conn(domid)?.ignored = true;
                self.input.remove(&domid);
            }
            Change::Quotas { values } => {
                let soft = Quotas::NAMES.len();
                self.store.options.quotas = Quotas::from_values(values.get(..soft).unwrap_or(&[]))?;
                self.store.options.soft_memory = *values.get(soft).ok_or("the soft quota is missing")?;
            }
            Change::DomainQuotas { domid, values } => {
                let q = Quotas::from_values(&values)?;
                self.domain(domid)?.quotas = Some(Box::new(q));
            }
            Change::Watch { domid, path, token, depth } => {
                let c = self.conn(domid)?;
                let id = c.id;
                let caller = self.store.conns.get(&id).map(|c| self.store.caller(c)).ok_or("no connection")?;
                // One that is there already stays as it is.
                if let Err(e) = self.store.add_watch(&caller, path, token, depth, false)
                    && e != xenstore_wire::Errno::EEXIST
                {
                    return Err(format!("a watch of domain {domid} at {:?}: {e}", shown(path)));
                }
            }
            Change::Unwatch { domid, path, token } => {
                let id = self.conn(domid)?.id;
                if let Some(w) = self.store.watches.find(id, path, token) {
                    self.store.watches.remove(w);
                    self.conn(domid)?.watches.remove(&w);
                }
            }
            Change::UnwatchAll { domid } => {
                let id = self.conn(domid)?.id;
                self.store.drop_watches(id);
            }
            Change::TxOpen { domid, tx, generation, fail, created } => {
                let c = self.conn(domid)?;
                let fresh = !c.transactions.contains(tx);
                if fresh {
                    c.transactions.insert(Box::new(Transaction::new(tx, generation, now_ms)));
                }
                if let Some(t) = c.transactions.get_mut(tx) {
                    (t.fail, t.created) = (fail, created);
                }
                if fresh {
                    c.next_tx = tx.wrapping_add(1);
                    self.store.open_transactions += 1;
                }
            }
            Change::TxNode { domid, tx, node } => return self.transaction_node(domid, tx, node),
            Change::TxEnd { domid, tx } => {
                if self.conn(domid)?.transactions.remove(tx).is_some() {
                    self.store.open_transactions -= 1;
                }
            }
            Change::NextTx { domid, tx } => self.conn(domid)?.next_tx = tx,
            Change::Freeze { domid, generation, tree } => {
                let snapshot = match tree {
                    Some(stream) => self.tree(stream)?,
                    None => self.store.tree.clone(),
                };
                self.conn(domid)?.frozen =
                    Some(Box::new(Frozen { snapshot, generation, held: Held::default(), export: None }));
            }
            Change::Thaw { domid } => {
                self.conn(domid)?.frozen = None;
                self.store.delayed_ready = true;
            }
            Change::Held { domid, path, watch, token } => {
                let id = self.conn(domid)?.id;
                let Some(watch) = self.store.watches.find(id, watch, token) else { return Ok(()) };
                let size = self.store.watches.get(watch).map_or(0, |w| w.event_size(path));
                if let Some(f) = self.conn(domid)?.frozen.as_mut() {
                    f.held.push(HeldEvent { path: Rc::from(path), watch }, size);
                }
            }
            Change::In { domid, at, bytes } => {
                let v = self.input.entry(domid).or_default();
                if at as usize > v.len() {
                    return Err(format!("unprocessed bytes of domain {domid} have a gap"));
                }
                v.truncate(at as usize);
                v.extend_from_slice(bytes);
            }
            Change::Out { domid, front, used, dropped, next, messages } => {
                let limited = !self.store.domid_privileged(domid);
                let timeout = self.store.options.event_timeout_ms;
                let c = self.conn(domid)?;
                while c.out.front().is_some_and(|m| m.seq < front) {
                    c.out.pop_front();
                }
                c.out.retain(|m| !dropped.contains(&m.seq));
                for q in messages {
                    let mut m = Outgoing::new(Header::from_bytes(&q.head), Rc::from(q.body));
                    (m.event, m.headless, m.seq) = (q.event, q.headless, q.seq);
                    m.deadline = (q.event && limited && timeout > 0).then(|| now_ms + timeout);
                    c.out.push_back(m);
                }
                c.next_out = next;
                if let Some(m) = c.out.front_mut() {
                    m.used = used as usize;
                    if m.used > m.total() {
                        return Err(format!("domain {domid} was sent more of a message than there is"));
                    }
                }
            }
            Change::Ring(s) => self.store.note_ring(s.domid, s.requests.to, s.replies.to),
            Change::RingReset { domid } => self.store.note_ring(domid, 0, 0),
            Change::Import { domid, notify, stream, undo } => {
                let undo = undo.into_iter().map(|(p, was)| {
                    let was = was.map(|(perms, value)| {
                        let mut n = Node::new(0, perms.into());
                        n.value = value.into();
                        Rc::new(n)
                    });
                    (p.to_vec(), was)
                });
                let i = Import::again(domid, notify, stream, undo.collect())?;
                self.store.imports.insert(domid, i);
            }
            Change::ImportGone { domid } => drop(self.store.imports.remove(&domid)),
            Change::ImportWatch { domid, path, token, depth } => {
                let i = self.store.imports.get_mut(&domid).ok_or_else(|| format!("domain {domid} is not imported"))?;
                i.add_watch(path, token, depth);
            }
            Change::Shown { domid, all } => {
                let all = all.into_iter().map(|(p, local, shown)| (p.to_vec(), ShownGeneration { local, shown }));
                self.domain(domid)?.shown_generations = all.collect::<HashMap<_, _>>();
            }
            Change::Late { domid, header: Some(h) } => drop(self.late.insert(domid, h)),
            Change::Late { domid, header: None } => drop(self.late.remove(&domid)),
        }
        Ok(())
    }

    fn transaction_node(&mut self, domid: u16, tx: u32, node: TxNode<'_>) -> Result<(), String> {
        let current = self.store.tree.get(node.path).cloned();
        let name = |n: &&[u8]| -> Name { Name::from(*n) };
        let base = match node.base {
            Base::None => None,
            Base::Current => current,
            Base::Past { perms, value, children } => {
                let perms = PermList::from(perms);
                let mut n = Node::new(node.generation, perms.clone());
                n.value = value.into();
                for c in &children {
                    // Nothing but their names is asked for.
                    n.children.insert(c, Rc::new(Node::new(0, perms.clone())));
                }
                Some(Rc::new(n))
            }
        };
        let state = match node.state {
            TxState::Unchanged => State::Unchanged,
            TxState::Deleted => State::Deleted,
            TxState::Present { value, perms, stamp, fresh, added, removed } => {
                let c = Changed {
                    value: value.into(),
                    perms: perms.into(),
                    stamp,
                    fresh,
                    added: added.iter().map(name).collect(),
                    removed: removed.iter().map(name).collect(),
                };
                State::Present(Box::new(c))
            }
        };
        let t = self.conn(domid)?.transactions.get_mut(tx);
        let t = t.ok_or_else(|| format!("domain {domid} has no transaction {tx}"))?;
        if let Some(a) = t.nodes.get_mut(node.path) {
            (a.state, a.fire) = (state, node.fire);
            return Ok(());
        }
        t.nodes.insert(
            Rc::from(node.path),
            Accessed { base, generation: node.generation, state, fire: node.fire, charged: 0 },
        );
        Ok(())
    }

    /// Feeds what was read, counts what everybody holds, answers what nobody else will.
    fn finish(&mut self) -> Vec<(u16, u32)> {
        let connected: Vec<(u16, ConnId)> = self.store.connected_domains().map(|d| (d.0, d.1)).collect();
        for (domid, bytes) in std::mem::take(&mut self.input) {
            let Some(id) = self.store.domain_connection(domid) else { continue };
            if let Err(e) = self.store.restore_buffers(id, &bytes, 0, &[], self.now_ms) {
                warn!(domid, "its unprocessed request is lost: {e}");
            }
        }
        for d in self.store.domains.values_mut() {
            (d.nodes, d.memory, d.watches) = (0, 0, 0);
        }
        self.store.account_all();
        for &(domid, id) in &connected {
            let Some(c) = self.store.conns.get_mut(&id) else { continue };
            // Each reply that waits keeps its request open.
            let limited = !matches!(c.peer, Peer::Domain(d) if d == 0 || d == self.store.options.privileged_domid);
            for m in c.out.iter_mut().filter(|m| limited && !m.event) {
                m.request = Some(self.store.next_request);
                let open = OpenRequest { domid, events: 0, replied: false };
                self.store.requests.insert(self.store.next_request, open);
                self.store.next_request += 1;
                if let Some(d) = self.store.domains.get_mut(&domid) {
                    d.outstanding += 1;
                }
            }
            c.pending_events =
                c.out.iter().filter(|m| m.event && m.body.first() != Some(&b'@')).map(|m| m.body.clone()).collect();
            let mut bytes: usize = c.out.iter().map(Outgoing::size).sum();
            bytes += c.frozen.as_ref().map_or(0, |f| f.held.charged());
            for t in c.transactions.iter_mut() {
                t.charged = 0;
                for (p, a) in &mut t.nodes {
                    a.charged = a.cost(p);
                    t.charged += a.charged;
                }
                bytes += t.charged;
            }
            let watches = c.watches.len() as u32;
            bytes += c.watches.iter().filter_map(|w| self.store.watches.get(*w)).map(|w| w.size()).sum::<usize>();
            if let Some(d) = self.store.domains.get_mut(&domid) {
                d.watches = watches;
                d.memory += bytes as i64;
            }
            self.store.wake(id);
        }
        for (domid, h) in std::mem::take(&mut self.late) {
            let Some(c) = self.store.domain_connection(domid).and_then(|id| self.store.conns.get(&id)) else {
                continue;
            };
            let caller = self.store.caller(c);
            let text = "The daemon was killed and came back from its journal.";
            self.store.reply(&caller, &h, Ok(payload::join([text]).into()));
        }
        let port = |d: &u16| self.store.domains.get(d).map_or(0, |d| d.remote_port);
        connected.iter().map(|(d, _)| (*d, port(d))).collect()
    }
}
