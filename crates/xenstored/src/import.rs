//! Migration of one domain: docs/xenstore-migration-ops.md.
//!
//! Source: freeze (nothing is read from or sent to the domain, events are held, the store's snapshot is taken), export
//! as often as wanted, then either thaw or the end of the domain.
//! Destination: bring the stream, import (nodes are made, the connection's state is kept aside), then either attach
//! or abort.

use crate::conn::{ConnId, Connection, Export, Frozen};
use crate::domain_ops::domid_arg;
use crate::held::Held;
use crate::host::Host;
use crate::live_update::buffered;
use crate::node::{Name, Node, PermList, Tree, owner};
use crate::redo::Redo;
use crate::store::{Answer, Caller, ShownGeneration, Store, node_cost, ok};
use crate::tx::{Accessed, Changed, NO_GENERATION, State, Transaction};
use crate::wrapped;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;
use tracing::{info, warn};
use xenstore_wire::stream::{ConnSpec, DEPTH_UNLIMITED, Format, Record, TxAccess, Writer, read_all};
use xenstore_wire::{ABS_PATH_MAX, DOMID_INVALID, Errno, Op, PAYLOAD_MAX, Perm, path, payload};

/// What a daemon of ours can do, by the names in docs/xenstore-migration-ops.md.
pub const FEATURES: &[&str] = &["freeze", "export", "import", "attach", "list-watches", "set-watch"];
/// Longest stream that is taken for one domain, in bytes: many times what the default quotas allow.
pub const IMPORT_MAX: usize = 64 << 20;
mod flag {
    /// Watches fire at the commit.
    pub const FIRE: u32 = 1;
    /// Only watches at the path itself.
    pub const EXACT: u32 = 2;
    /// Somebody else changed the node: the commit will fail.
    pub const CONFLICT: u32 = 4;
    /// The node existed at the first access.
    pub const BASE: u32 = 8;
    /// Made in the transaction, children of an earlier node of that name don't count.
    pub const FRESH: u32 = 16;
}

/// A stream being brought, or applied.
#[derive(Debug, Default)]
pub(crate) struct Import {
    data: Vec<u8>,
    applied: Option<Applied>,
}

impl Import {
    pub(crate) fn is_applied(&self) -> bool {
        self.applied.is_some()
    }

    /// One that was applied, for the journal. A stream that is being brought has to be brought again.
    pub(crate) fn log(&self, domid: u16, redo: &mut Redo) {
        let Some(a) = &self.applied else { return };
        redo.import(domid, a.notify, &a.stream, &a.undo);
        for w in &a.watches[a.own_watches..] {
            redo.import_watch(domid, &w.path, &w.token, w.depth);
        }
    }

    /// One that was applied, out of the journal; its nodes are there.
    pub(crate) fn again(
        domid: u16,
        notify: bool,
        stream: &[u8],
        undo: Vec<(Vec<u8>, Option<Rc<Node>>)>,
    ) -> Result<Import, String> {
        let mut applied = Applied::new(plan_import(domid, stream)?, notify);
        (applied.stream, applied.undo) = (stream.into(), undo);
        Ok(Import { data: Vec::new(), applied: Some(applied) })
    }

    /// A domain is gone: what is put back is as if it had been there then. Nodes of its own go to the heir, if there is one.
    pub(crate) fn domain_gone(&mut self, domid: u16, heir: Option<u16>) {
        let Some(a) = &mut self.applied else { return };
        for (_, was) in &mut a.undo {
            let Some(n) = was.as_mut().filter(|n| n.perms.iter().any(|p| p.domid == domid)) else { continue };
            match heir {
                None if n.owner() == domid => *was = None,
                _ => {
                    let settle = |(i, p): (usize, &Perm)| match (i, heir) {
                        _ if p.domid != domid => *p,
                        (0, Some(to)) => Perm { domid: to, ..*p },
                        _ => Perm { stale: true, ..*p },
                    };
                    let perms = n.perms.iter().enumerate().map(settle).collect();
                    Rc::make_mut(n).perms = perms;
                }
            }
        }
    }

    pub(crate) fn add_watch(&mut self, path: &[u8], token: &[u8], depth: Option<u16>) {
        if let Some(a) = &mut self.applied {
            a.watches.push(ImportedWatch { path: path.to_vec(), token: token.to_vec(), depth });
        }
    }
}

#[derive(Debug)]
struct Applied {
    /// As it came; kept for the journal.
    stream: Rc<[u8]>,
    /// What the touched nodes were, in the order in which they were touched.
    undo: Vec<(Vec<u8>, Option<Rc<Node>>)>,
    notify: bool,
    conn: Option<ImportedConn>,
    watches: Vec<ImportedWatch>,
    /// So many of them are in the stream.
    own_watches: usize,
    txs: TxRecords,
    quotas: Vec<(Vec<u8>, u32)>,
}

impl Applied {
    fn new(plan: ImportPlan, notify: bool) -> Applied {
        let mut txs = plan.txs;
        txs.imported = Some(plan.nodes.into_iter().map(|n| n.path).collect());
        Applied {
            stream: Rc::from([]),
            undo: Vec::new(),
            notify,
            conn: plan.conn,
            own_watches: plan.watches.len(),
            watches: plan.watches,
            txs,
            quotas: plan.quotas,
        }
    }
}

#[derive(Debug)]
struct ImportedConn {
    stream_id: u32,
    tdomid: u16,
    in_data: Vec<u8>,
    out_resp_len: u16,
    out_data: Vec<u8>,
}

#[derive(Debug)]
struct ImportedWatch {
    path: Vec<u8>,
    token: Vec<u8>,
    depth: Option<u16>,
}

/// A node record of a transaction.
#[derive(Debug)]
struct TxNode {
    conn: u32,
    tx: u32,
    access: TxAccess,
    perms: Vec<Perm>,
    path: Vec<u8>,
    value: Vec<u8>,
    flags: u32,
}

/// Transactions found in a stream.
#[derive(Debug, Default)]
pub(crate) struct TxRecords {
    open: Vec<(u32, u32)>,
    nodes: Vec<TxNode>,
    /// Paths of the committed nodes of the stream; `None`: the whole store is in it.
    imported: Option<HashSet<Vec<u8>>>,
}

impl TxRecords {
    pub(crate) fn add(&mut self, r: Record) {
        match r {
            Record::Transaction { conn_id, tx_id } => self.open.push((conn_id, tx_id)),
            Record::Node { conn_id, tx_id, access, perms, path, value } if conn_id != 0 => {
                // What follows says more; without it (another daemon's stream) the commit has to be tried again.
                self.nodes.push(TxNode { conn: conn_id, tx: tx_id, access, perms, path, value, flags: flag::CONFLICT });
            }
            Record::NodeMeta { flags, .. } => {
                if let Some(n) = self.nodes.last_mut() {
                    n.flags = flags;
                }
            }
            r => warn!(record = ?r, "record of the state ignored"),
        }
    }
}

/// The nodes of a connection's open transactions. `hidden`: in records that a stock daemon skips.
pub(crate) fn transaction_records_in(c: &Connection, conn_id: u32, tree: Option<&Tree>, hidden: bool) -> Vec<Record> {
    let mut out = Vec::new();
    for t in c.transactions.iter() {
        for (p, a) in &t.nodes {
            let conflict = tree.is_some_and(|tree| tree.get(p).map_or(NO_GENERATION, |n| n.generation) != a.generation);
            let mut flags = if conflict || t.fail { flag::CONFLICT } else { 0 };
            if let Some(exact) = a.fire {
                flags |= flag::FIRE | if exact { flag::EXACT } else { 0 };
            }
            if a.base.is_some() {
                flags |= flag::BASE;
            }
            let (access, keep) = match &a.state {
                State::Unchanged => (TxAccess { read: true, written: false }, a.base.is_some()),
                State::Deleted => (TxAccess::default(), false),
                State::Present(ch) => {
                    if ch.fresh {
                        flags |= flag::FRESH;
                    }
                    (TxAccess { read: true, written: true }, true)
                }
            };
            let node = Record::Node {
                conn_id,
                tx_id: t.id,
                access,
                perms: if keep { a.perms().map_or(Vec::new(), |p| p.to_vec()) } else { Vec::new() },
                path: p.to_vec(),
                value: if keep { a.value().to_vec() } else { Vec::new() },
            };
            let meta = Record::NodeMeta { generation: a.generation, flags };
            if hidden {
                out.extend(wrapped::wrap([&node, &meta]));
            } else {
                out.extend([node, meta]);
            }
        }
    }
    out
}

/// Puts transactions of a stream back. What they had read counts as unchanged if it is in the stream as it was.
pub(crate) fn restore_transactions(s: &mut Store, id: ConnId, txs: &TxRecords, stream_conn: u32, now_ms: u64) {
    for &(_, tx_id) in txs.open.iter().filter(|(c, _)| *c == stream_conn) {
        let Some(domid) = s.conns.get(&id).map(|c| c.peer.domid()) else { return };
        s.generation += 1;
        let mut t = Transaction::new(tx_id, s.generation, now_ms);
        for n in txs.nodes.iter().filter(|n| n.conn == stream_conn && n.tx == tx_id) {
            let has = |f: u32| n.flags & f != 0;
            let current = s.tree.get(&n.path).cloned();
            let in_stream = txs.imported.as_ref().is_none_or(|i| i.contains(&n.path));
            let same = !has(flag::CONFLICT) && has(flag::BASE) == current.is_some() && (in_stream || !has(flag::BASE));
            t.fail |= n.path.len() > ABS_PATH_MAX;
            let generation = match (&current, same) {
                (None, true) => NO_GENERATION,
                (Some(c), true) => c.generation,
                // No node ever has this one.
                (_, false) => 0,
            };
            let perms: PermList = n.perms.clone().into();
            let state = match (n.access.written, n.perms.is_empty(), n.access.read) {
                (false, _, true) => State::Unchanged,
                (false, _, false) => State::Deleted,
                (true, true, _) => State::Deleted,
                (true, false, _) => State::Present(Box::new(Changed {
                    value: n.value.clone().into(),
                    perms,
                    stamp: s.generation,
                    fresh: has(flag::FRESH),
                    added: Vec::new(),
                    removed: HashSet::new(),
                })),
            };
            let fire = has(flag::FIRE).then_some(has(flag::EXACT));
            let base = if has(flag::BASE) { current } else { None };
            t.nodes.insert(Rc::from(&n.path[..]), Accessed { base, generation, state, fire, charged: 0 });
        }
        // Which children a node got and lost follows from the nodes themselves.
        for i in 0..t.nodes.len() {
            let Some((p, a)) = t.nodes.get_index(i) else { continue };
            let p = p.clone();
            let had = a.base.is_some();
            let (lost, got) = match &a.state {
                State::Unchanged => (false, false),
                State::Deleted => (had, false),
                State::Present(c) => (had && c.fresh, c.fresh),
            };
            t.created |= got;
            if let Some(State::Present(c)) = t.nodes.get_mut(path::parent(&p)).map(|a| &mut a.state) {
                if lost {
                    c.removed.insert(Name::from(path::leaf(&p)));
                }
                if got {
                    c.added.push(Name::from(path::leaf(&p)));
                }
            }
        }
        for (p, a) in &mut t.nodes {
            a.charged = a.cost(p);
            t.charged += a.charged;
        }
        let _ = s.charge(domid, t.charged as i64, false);
        if let Some(c) = s.conns.get_mut(&id)
            && c.transactions.insert(Box::new(t)).is_none()
        {
            c.next_tx = c.next_tx.max(tx_id.wrapping_add(1));
            s.open_transactions += 1;
        }
    }
}

impl Store {
    pub(crate) fn dispatch_migration_op(&mut self, c: &Caller, op: Op, p: &[u8], host: &mut dyn Host) -> Answer {
        match op {
            Op::FerryFeatures => Ok(Some(payload::join(FEATURES).into())),
            Op::DomainFreeze => self.op_freeze(p),
            Op::DomainThaw => self.op_thaw(p, host),
            Op::DomainExport => self.op_export(p, host),
            Op::DomainImportData => self.op_import_data(p),
            Op::DomainImport => self.op_import(c, p, host),
            Op::DomainAttach => self.op_attach(p, host),
            Op::DomainImportAbort => {
                let domid = domid_arg(payload::one_arg(p)?)?;
                if !self.imports.contains_key(&domid) {
                    return Err(Errno::ENOENT);
                }
                self.undo_import(domid, host);
                ok()
            }
            Op::DomainListWatches => self.op_list_watches(p),
            Op::DomainSetWatch => self.op_set_watch(p),
            _ => Err(Errno::ENOSYS),
        }
    }

    /// The connection of an unprivileged domain.
    fn guest_connection(&mut self, domid: u16) -> Result<&mut Connection, Errno> {
        if self.domid_privileged(domid) {
            return Err(Errno::EINVAL);
        }
        let id = self.domain_connection(domid).ok_or(Errno::ENOENT)?;
        self.conns.get_mut(&id).ok_or(Errno::ENOENT)
    }

    fn op_freeze(&mut self, p: &[u8]) -> Answer {
        let domid = domid_arg(payload::one_arg(p)?)?;
        let (snapshot, generation) = (self.tree.clone(), self.generation);
        let c = self.guest_connection(domid)?;
        if c.frozen.is_some() {
            return Err(Errno::EBUSY);
        }
        c.frozen = Some(Box::new(Frozen { snapshot, generation, held: Held::default(), export: None }));
        self.redo.freeze(domid, generation, None);
        info!(domid, "connection frozen");
        ok()
    }

    fn op_thaw(&mut self, p: &[u8], host: &mut dyn Host) -> Answer {
        let mut s = payload::strings(p);
        let domid = domid_arg(s.next().ok_or(Errno::EINVAL)?)?;
        let drop_below: Vec<&[u8]> = s.collect();
        if drop_below.iter().any(|p| !path::is_valid(p, ABS_PATH_MAX)) {
            return Err(Errno::EINVAL);
        }
        let c = self.guest_connection(domid)?;
        let id = c.id;
        let frozen = c.frozen.take().ok_or(Errno::EINVAL)?;
        self.redo.thaw(domid);
        let (mut sent, mut dropped) = (0, 0);
        // Each is accounted again as it is sent.
        let _ = self.charge(domid, -(frozen.held.charged() as i64), false);
        for e in frozen.held.iter() {
            if drop_below.iter().any(|p| path::is_child(&e.path, p)) {
                dropped += 1;
            } else {
                sent += 1;
                self.event_for_watch(e.watch, &e.path, None, host.now_ms());
            }
        }
        self.delayed_ready = true;
        self.wake(id);
        info!(domid, sent, dropped, "connection thawed");
        ok()
    }

    fn op_export(&mut self, p: &[u8], host: &mut dyn Host) -> Answer {
        let mut s = payload::strings(p);
        let domid = domid_arg(s.next().ok_or(Errno::EINVAL)?)?;
        let offset: usize = payload::decimal(s.next().ok_or(Errno::EINVAL)?)?;
        let prefixes: Vec<Vec<u8>> = s.map(<[u8]>::to_vec).collect();
        if prefixes.iter().any(|p| !path::is_valid(p, ABS_PATH_MAX)) {
            return Err(Errno::EINVAL);
        }
        let c = self.guest_connection(domid)?;
        let id = c.id;
        let stream = match &c.frozen.as_ref().ok_or(Errno::EINVAL)?.export {
            Some(e) if e.prefixes == prefixes => e.stream.clone(),
            _ => {
                let features = host.ring_features(domid).unwrap_or(0);
                let stream: Rc<[u8]> = self.export_stream(id, domid, features, &prefixes)?.into();
                if let Some(f) = self.conns.get_mut(&id).and_then(|c| c.frozen.as_mut()) {
                    f.export = Some(Export { prefixes, stream: stream.clone() });
                }
                stream
            }
        };
        let mut out = payload::join([stream.len().to_string()]);
        let room = PAYLOAD_MAX - out.len();
        let rest = stream.get(offset..).ok_or(Errno::EINVAL)?;
        out.extend_from_slice(&rest[..rest.len().min(room)]);
        Ok(Some(out.into()))
    }

    fn export_stream(&self, id: ConnId, domid: u16, features: u32, prefixes: &[Vec<u8>]) -> Result<Vec<u8>, Errno> {
        let c = self.conns.get(&id).ok_or(Errno::EIO)?;
        let frozen = c.frozen.as_ref().ok_or(Errno::EINVAL)?;
        let d = self.domains.get(&domid).ok_or(Errno::EIO)?;
        let mut w = Writer::new(Format::V2);
        let (in_data, out_resp_len, out_data) = buffered(c);
        let spec = ConnSpec::Ring { domid, tdomid: c.target.unwrap_or(DOMID_INVALID), evtchn: d.port };
        let quotas = d.quotas.as_ref().map_or(Vec::new(), |q| q.named());
        let mut records = vec![
            Record::Connection { conn_id: c.id, spec, in_data, out_resp_len, out_data },
            Record::Domain { domid, features, quotas },
        ];
        records.extend(self.watch_records(c, true));
        records.extend(c.transactions.iter().map(|t| Record::Transaction { conn_id: c.id, tx_id: t.id }));
        let mut seen: HashSet<Vec<u8>> = HashSet::new();
        for prefix in prefixes {
            frozen.snapshot.walk(prefix, &mut |p, n| {
                if seen.insert(p.to_vec()) {
                    records.push(self.node_record(p, n));
                    records.push(Record::NodeMeta { generation: self.shown_generation(p, n), flags: 0 });
                }
            });
        }
        records.extend(transaction_records_in(c, c.id, Some(&frozen.snapshot), false));
        for r in &records {
            w.record(r).map_err(|e| {
                warn!(domid, "export: {e}");
                Errno::E2BIG
            })?;
        }
        Ok(w.finish())
    }

    fn op_import_data(&mut self, p: &[u8]) -> Answer {
        let (d, rest) = payload::split_first(p)?;
        let (offset, bytes) = payload::split_first(rest)?;
        let domid = domid_arg(d)?;
        let offset: usize = payload::decimal(offset)?;
        if self.domid_privileged(domid) {
            return Err(Errno::EINVAL);
        }
        if self.domain_connection(domid).is_some() {
            return Err(Errno::EISCONN);
        }
        let i = self.imports.entry(domid).or_default();
        if i.applied.is_some() {
            return Err(Errno::EBUSY);
        }
        if offset == 0 {
            i.data.clear();
        }
        if offset != i.data.len() {
            return Err(Errno::EINVAL);
        }
        if i.data.len() + bytes.len() > IMPORT_MAX {
            return Err(Errno::ENOSPC);
        }
        i.data.extend_from_slice(bytes);
        ok()
    }

    fn op_import(&mut self, c: &Caller, p: &[u8], host: &mut dyn Host) -> Answer {
        let args: Vec<&[u8]> = payload::strings(p).collect();
        let [d, total, notify] = args[..] else { return Err(Errno::EINVAL) };
        let domid = domid_arg(d)?;
        let total: usize = payload::decimal(total)?;
        let notify = match notify {
            b"others" => true,
            b"nobody" => false,
            _ => return Err(Errno::EINVAL),
        };
        let i = self.imports.get_mut(&domid).ok_or(Errno::ENOENT)?;
        if i.applied.is_some() {
            return Err(Errno::EBUSY);
        }
        if i.data.len() != total {
            return Err(Errno::EINVAL);
        }
        let data = std::mem::take(&mut i.data);
        if self.domain_connection(domid).is_some() {
            return Err(Errno::EISCONN);
        }
        if !self.know_domain(domid, host) {
            warn!(domid, "import: there is no such domain");
            return Err(Errno::ENOENT);
        }
        let plan = plan_import(domid, &data).map_err(|e| {
            warn!(domid, "import: {e}");
            Errno::EINVAL
        })?;
        for n in &plan.nodes {
            let own = owner(&n.perms);
            if !self.know_domain(own, host) {
                let path = String::from_utf8_lossy(&n.path);
                warn!(domid, %path, "import: the node's owner, domain {own}, does not exist on this host");
                return Err(Errno::EINVAL);
            }
        }
        let nodes = plan.nodes.len();
        let undo = self.apply_nodes(c, domid, &plan, notify, host);
        let mut applied = Applied::new(plan, notify);
        (applied.stream, applied.undo) = (data.into(), undo);
        self.redo.import(domid, notify, &applied.stream, &applied.undo);
        info!(domid, nodes, watches = applied.watches.len(), "imported");
        self.imports.insert(domid, Import { data: Vec::new(), applied: Some(applied) });
        ok()
    }

    fn apply_nodes(
        &mut self,
        c: &Caller,
        domid: u16,
        plan: &ImportPlan,
        notify: bool,
        host: &mut dyn Host,
    ) -> Vec<(Vec<u8>, Option<Rc<Node>>)> {
        let mut undo = Vec::new();
        let generations: Vec<(Vec<u8>, u64)> =
            plan.nodes.iter().filter_map(|n| Some((n.path.clone(), n.generation?))).collect();
        for n in &plan.nodes {
            // Parents that this host lacks.
            let mut missing: Vec<Vec<u8>> = Vec::new();
            let mut at = path::parent(&n.path);
            while self.tree.get(at).is_none() {
                missing.push(at.to_vec());
                at = path::parent(at);
            }
            for m in missing.into_iter().rev() {
                undo.push((m.clone(), None));
                self.put_node(&m, self.inherited(&m), &[]);
            }
            let was = self.tree.get(&n.path).map(|was| {
                // As old as they are now: what is put back is a new node.
                let perms = self.settled(&was.perms, was.generation);
                Rc::new(Node { perms, ..(**was).clone() })
            });
            undo.push((n.path.clone(), was));
            let mut perms = n.perms.clone();
            for q in &mut perms {
                q.stale |= !self.know_domain(q.domid, host);
            }
            self.put_node(&n.path, perms.into(), &n.value);
            if notify {
                self.fire(Some(c), &n.path, None, false, None, host);
            }
        }
        // Only now: a child that comes counts as a change of its parent. Generations of here stay beyond those of there,
        // so that a number never stands for two states of a node.
        let highest = generations.iter().map(|(_, g)| *g).max().unwrap_or(0);
        self.generation = self.generation.max(highest);
        let shown: HashMap<Vec<u8>, ShownGeneration> = generations
            .into_iter()
            .filter_map(|(p, shown)| {
                let local = self.tree.get(&p)?.generation;
                Some((p, ShownGeneration { local, shown }))
            })
            .collect();
        self.redo.shown(domid, shown.iter().map(|(p, g)| (&p[..], g.local, g.shown)));
        if let Some(d) = self.domains.get_mut(&domid) {
            d.shown_generations = shown;
        }
        undo
    }

    /// Permissions that a node made by dom0 gets from its parent.
    fn inherited(&self, p: &[u8]) -> PermList {
        match self.tree.get(path::parent(p)) {
            Some(n) => self.settled(&n.perms, n.generation),
            None => self.default_perms.clone(),
        }
    }

    /// Makes or replaces a node as it is given; its children stay. It becomes the last of its parent's children, so that
    /// nodes put one after the other stand in that order. Nothing happens without a parent: a journal that had such a node could
    /// not be read back.
    fn put_node(&mut self, p: &[u8], perms: PermList, value: &[u8]) {
        if p != b"/" && self.tree.get(path::parent(p)).is_none() {
            return;
        }
        self.generation += 1;
        let now = self.generation;
        if let Some(n) = self.tree.get(p) {
            let (own, cost) = (n.owner(), node_cost(p, n) as i64);
            let _ = self.charge(own, -cost, false);
            self.count_node(own, -1);
        }
        let own = owner(&perms);
        let mut n = match self.tree.get(p) {
            Some(n) => Node { children: n.children.clone(), ..Node::new(now, perms) },
            None => Node::new(now, perms),
        };
        n.value = value.into();
        self.redo.node(p, &n, true);
        let cost = node_cost(p, &n) as i64;
        if p == b"/" {
            if let Some(root) = self.tree.get_mut(p) {
                *root = n;
            }
        } else {
            let leaf = path::leaf(p);
            let (mut grown, mut parent_owner) = (0, 0);
            if let Some(parent) = self.tree.get_mut(path::parent(p)) {
                let before = parent.children.bytes() as i64;
                parent.children.remove(leaf);
                parent.children.insert(leaf, Rc::new(n));
                grown = parent.children.bytes() as i64 - before;
                parent_owner = parent.owner();
                if grown != 0 {
                    let perms = parent.perms.clone();
                    let stamp = parent.generation;
                    let settled = self.settled(&perms, stamp);
                    if let Some(parent) = self.tree.get_mut(path::parent(p)) {
                        parent.perms = settled;
                        parent.generation = self.generation;
                        self.redo.meta(path::parent(p), parent);
                    }
                }
            }
            let _ = self.charge(parent_owner, grown, false);
        }
        let _ = self.charge(own, cost, false);
        self.count_node(own, 1);
    }

    /// Takes an import back.
    pub(crate) fn undo_import(&mut self, domid: u16, host: &mut dyn Host) {
        let Some(Import { applied: Some(a), .. }) = self.imports.remove(&domid) else { return };
        self.redo.import_gone(domid);
        for (p, was) in a.undo.into_iter().rev() {
            // What somebody removed since stays away.
            if self.tree.get(&p).is_none() {
                continue;
            }
            match was {
                None => self.remove_node(None, &p, a.notify, host),
                Some(n) => {
                    self.put_node(&p, n.perms.clone(), &n.value);
                    if a.notify {
                        self.fire(None, &p, None, false, None, host);
                    }
                }
            }
        }
        info!(domid, "import undone");
    }

    fn op_attach(&mut self, p: &[u8], host: &mut dyn Host) -> Answer {
        let args: Vec<&[u8]> = payload::strings(p).collect();
        let [d, port] = args[..] else { return Err(Errno::EINVAL) };
        let domid = domid_arg(d)?;
        let port: u32 = payload::decimal(port)?;
        if self.domain_connection(domid).is_some() {
            return Err(Errno::EISCONN);
        }
        if !self.imports.get(&domid).is_some_and(Import::is_applied) {
            return Err(Errno::ENOENT);
        }
        let local = host.connect(domid, port)?;
        let Some(a) = self.imports.remove(&domid).and_then(|i| i.applied) else { return Err(Errno::EIO) };
        let now = host.now_ms();
        self.redo.import_gone(domid);
        let id = self.introduced(domid, local, port, now);
        // Before its own watches are there: it is not to notice.
        self.fire_special(b"@introduceDomain", &[domid], now);
        let mut stream_id = 0;
        if let Some(ic) = a.conn {
            stream_id = ic.stream_id;
            if let Some(c) = self.conns.get_mut(&id) {
                c.target = Some(ic.tdomid).filter(|&t| t != DOMID_INVALID);
                self.redo.target(domid, c.target);
            }
            if let Err(e) = self.restore_buffers(id, &ic.in_data, ic.out_resp_len, &ic.out_data, now) {
                // Checked at the import already.
                warn!(domid, "attach: bytes in flight are lost: {e}");
            }
        }
        if !a.quotas.is_empty() {
            let mut q = self.quotas(domid).clone();
            for (name, v) in &a.quotas {
                q.set(name, *v);
            }
            self.set_domain_quotas(domid, q);
        }
        if let Some(caller) = self.conns.get(&id).map(|c| self.caller(c)) {
            for w in &a.watches {
                if let Err(e) = self.add_watch(&caller, &w.path, &w.token, w.depth, false) {
                    warn!(domid, path = %String::from_utf8_lossy(&w.path), "attach: watch not restored: {e}");
                }
            }
        }
        restore_transactions(self, id, &a.txs, stream_id, now);
        self.log_transactions(id);
        self.wake(id);
        info!(domid, port, local, watches = a.watches.len(), "attached");
        ok()
    }

    fn op_list_watches(&mut self, p: &[u8]) -> Answer {
        let args: Vec<&[u8]> = payload::strings(p).collect();
        let [d, offset] = args[..] else { return Err(Errno::EINVAL) };
        let domid = domid_arg(d)?;
        let offset: usize = payload::decimal(offset)?;
        let list: Vec<(Vec<u8>, Vec<u8>, Option<u16>)> = match self.domain_connection(domid) {
            Some(id) => {
                let c = self.conns.get(&id).ok_or(Errno::EIO)?;
                let all = c.watches.iter().filter_map(|&w| self.watches.get(w));
                all.map(|w| (w.shown(&w.path).to_vec(), w.token.to_vec(), w.depth)).collect()
            }
            None => {
                let a = self.imports.get(&domid).and_then(|i| i.applied.as_ref()).ok_or(Errno::ENOENT)?;
                a.watches.iter().map(|w| (w.path.clone(), w.token.clone(), w.depth)).collect()
            }
        };
        let mut out = payload::join([list.len().to_string()]);
        for (path, token, depth) in list.iter().skip(offset) {
            let depth = depth.map_or(String::new(), |d| d.to_string());
            let one = payload::join([&path[..], &token[..], depth.as_bytes()]);
            if out.len() + one.len() > PAYLOAD_MAX {
                break;
            }
            out.extend(one);
        }
        Ok(Some(out.into()))
    }

    fn op_set_watch(&mut self, p: &[u8]) -> Answer {
        let args: Vec<&[u8]> = payload::strings(p).collect();
        let (d, path, token, depth) = match args[..] {
            [d, p, t] => (d, p, t, None),
            [d, p, t, depth] => (d, p, t, Some(payload::decimal(depth)?)),
            _ => return Err(Errno::EINVAL),
        };
        let domid = domid_arg(d)?;
        if let Some(id) = self.domain_connection(domid) {
            let c = self.conns.get(&id).ok_or(Errno::EIO)?;
            let caller = self.caller(c);
            self.add_watch(&caller, path, token, depth, true)?;
            return ok();
        }
        let a = self.imports.get_mut(&domid).and_then(|i| i.applied.as_mut()).ok_or(Errno::ENOENT)?;
        if a.watches.iter().any(|w| w.path == path && w.token == token) {
            return Err(Errno::EEXIST);
        }
        check_watch_path(path)?;
        a.watches.push(ImportedWatch { path: path.to_vec(), token: token.to_vec(), depth });
        self.redo.import_watch(domid, path, token, depth);
        ok()
    }
}

fn check_watch_path(p: &[u8]) -> Result<(), Errno> {
    let abs = if matches!(p.first(), Some(b'/')) { p.to_vec() } else { path::join(b"/local/domain/0", p) };
    if p.first() == Some(&b'@') || path::is_valid(&abs, xenstore_wire::REL_PATH_MAX) {
        Ok(())
    } else {
        Err(Errno::EINVAL)
    }
}

struct ImportPlan {
    nodes: Vec<ImportNode>,
    conn: Option<ImportedConn>,
    watches: Vec<ImportedWatch>,
    txs: TxRecords,
    quotas: Vec<(Vec<u8>, u32)>,
}

struct ImportNode {
    path: Vec<u8>,
    perms: Vec<Perm>,
    value: Vec<u8>,
    generation: Option<u64>,
}

/// Checks a whole stream before anything is touched.
fn plan_import(domid: u16, data: &[u8]) -> Result<ImportPlan, String> {
    let (_, records) = read_all(data).map_err(|e| e.to_string())?;
    let mut plan = ImportPlan {
        nodes: Vec::new(),
        conn: None,
        watches: Vec::new(),
        txs: TxRecords::default(),
        quotas: Vec::new(),
    };
    let mut committed = false;
    let mut ids: BTreeMap<u32, ()> = BTreeMap::new();
    for r in records {
        match r {
            Record::Connection { conn_id, spec, in_data, out_resp_len, out_data } => {
                let ConnSpec::Ring { domid: of, tdomid, .. } = spec else {
                    return Err("a socket connection in the stream of a domain".into());
                };
                if of != domid {
                    return Err(format!("the connection in the stream is domain {of}'s"));
                }
                if plan.conn.is_some() {
                    return Err("two connections in the stream of one domain".into());
                }
                check_buffers(&in_data, out_resp_len, &out_data)?;
                ids.insert(conn_id, ());
                plan.conn = Some(ImportedConn { stream_id: conn_id, tdomid, in_data, out_resp_len, out_data });
            }
            Record::Domain { domid: of, .. } if of != domid => {
                return Err(format!("the stream has quotas of domain {of}"));
            }
            Record::Domain { quotas, .. } => plan.quotas = quotas,
            Record::Watch { conn_id, path, token, depth } => {
                if !ids.contains_key(&conn_id) {
                    return Err(format!("a watch of connection {conn_id}, which is not in the stream"));
                }
                check_watch_path(&path)
                    .map_err(|_| format!("watch at {:?}, which is no path", String::from_utf8_lossy(&path)))?;
                let depth = depth.filter(|&d| d != DEPTH_UNLIMITED);
                plan.watches.push(ImportedWatch { path, token, depth });
            }
            Record::Node { conn_id: 0, perms, path, value, .. } => {
                if !path::is_valid(&path, ABS_PATH_MAX) || path == b"/" {
                    return Err(format!("{:?} is no path of a node", String::from_utf8_lossy(&path)));
                }
                committed = true;
                plan.nodes.push(ImportNode { path, perms, value, generation: None });
            }
            Record::NodeMeta { generation, .. } if committed => {
                if generation >= u64::MAX / 2 {
                    return Err("a generation that can't be".into());
                }
                if let Some(n) = plan.nodes.last_mut() {
                    n.generation = Some(generation);
                }
                committed = false;
            }
            r @ (Record::Transaction { .. } | Record::Node { .. } | Record::NodeMeta { .. }) => {
                committed = false;
                plan.txs.add(r);
            }
            Record::Global { .. } | Record::GlobalQuota { .. } => {
                return Err("records of a live update in the stream of a domain".into());
            }
            Record::Unknown { kind, .. } => warn!(domid, "import: record of type {kind:#x} ignored"),
            Record::End => {}
        }
    }
    Ok(plan)
}

/// Bytes in flight must be whole messages but for the first to be sent and the last that was read.
fn check_buffers(in_data: &[u8], out_resp_len: u16, out_data: &[u8]) -> Result<(), String> {
    use xenstore_wire::FrameDecoder;
    let mut d = FrameDecoder::new();
    let mut rest = in_data;
    while !rest.is_empty() {
        let n = d.feed(rest).map_err(|e| format!("unprocessed request: {e}"))?;
        rest = &rest[n..];
        d.take();
    }
    let mut rest = out_data.get(usize::from(out_resp_len)..).ok_or("out-resp-len is too much")?;
    let mut d = FrameDecoder::new();
    while !rest.is_empty() {
        let n = d.feed(rest).map_err(|e| format!("message to be sent: {e}"))?;
        rest = &rest[n..];
        d.take();
    }
    if d.is_partial() { Err("a message to be sent is cut off".into()) } else { Ok(()) }
}
