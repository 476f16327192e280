//! What changed in the store, as records for the state journal (docs/xenstored-journal.md): encoded where it happens, in
//! its order, decoded when a daemon comes back.
//!
//! All numbers are little endian. A text is its length (`u16`; `u32` for values and messages) and its bytes. A record is
//! the state afterwards, never a difference of numbers, so that it can't be applied wrongly twice.

use crate::node::Node;
use crate::tx::{Accessed, State};
use std::rc::Rc;
use thiserror::Error;
use xenstore_wire::{Access, HEADER_LEN, Header, Perm};

/// A record that makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("byte {offset} of the batch: {what}")]
pub struct RedoError {
    /// From the start of the batch.
    pub offset: usize,
    /// Which field, and what is wrong.
    pub what: &'static str,
}

/// How far a domain's ring was served: an index before the step and after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    /// Before.
    pub from: u32,
    /// After.
    pub to: u32,
}

/// One step of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingStep {
    /// Whose.
    pub domid: u16,
    /// The consumer index of requests.
    pub requests: Moved,
    /// The producer index of replies.
    pub replies: Moved,
}

/// A message of a domain's queue.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Queued<'a> {
    pub(crate) seq: u64,
    pub(crate) event: bool,
    pub(crate) headless: bool,
    pub(crate) head: [u8; HEADER_LEN],
    pub(crate) body: &'a [u8],
}

/// A node as a transaction has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TxNode<'a> {
    pub(crate) path: &'a [u8],
    /// At the first access, or `NO_GENERATION`.
    pub(crate) generation: u64,
    pub(crate) fire: Option<bool>,
    pub(crate) base: Base<'a>,
    pub(crate) state: TxState<'a>,
}

/// What a transaction found at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Base<'a> {
    None,
    /// The node that is there.
    Current,
    /// One that was changed since; the commit will fail for that.
    Past {
        perms: Vec<Perm>,
        value: &'a [u8],
        children: Vec<&'a [u8]>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TxState<'a> {
    Unchanged,
    Deleted,
    Present { value: &'a [u8], perms: Vec<Perm>, stamp: u64, fresh: bool, added: Vec<&'a [u8]>, removed: Vec<&'a [u8]> },
}

/// One change.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Change<'a> {
    Node { path: &'a [u8], generation: u64, perms: Vec<Perm>, value: &'a [u8], to_end: bool },
    Meta { path: &'a [u8], generation: u64, perms: Vec<Perm> },
    Remove { path: &'a [u8] },
    Special { release: bool, perms: Vec<Perm> },
    Known { domid: u16, born: u64 },
    Forgotten { domid: u16 },
    Introduced { domid: u16, remote_port: u32 },
    Gone { domid: u16 },
    Port { domid: u16, remote_port: u32 },
    Target { domid: u16, target: Option<u16> },
    Shutdown { domid: u16, yes: bool },
    Ignored { domid: u16 },
    Quotas { values: Vec<u32> },
    DomainQuotas { domid: u16, values: Vec<u32> },
    Watch { domid: u16, path: &'a [u8], token: &'a [u8], depth: Option<u16> },
    Unwatch { domid: u16, path: &'a [u8], token: &'a [u8] },
    UnwatchAll { domid: u16 },
    TxOpen { domid: u16, tx: u32, generation: u64, fail: bool, created: bool },
    TxNode { domid: u16, tx: u32, node: TxNode<'a> },
    TxEnd { domid: u16, tx: u32 },
    NextTx { domid: u16, tx: u32 },
    Freeze { domid: u16, generation: u64, tree: Option<&'a [u8]> },
    Thaw { domid: u16 },
    Held { domid: u16, path: &'a [u8], watch: &'a [u8], token: &'a [u8] },
    In { domid: u16, at: u32, bytes: &'a [u8] },
    Out { domid: u16, front: u64, used: u32, dropped: Vec<u64>, next: u64, messages: Vec<Queued<'a>> },
    Ring(RingStep),
    RingReset { domid: u16 },
    Import { domid: u16, notify: bool, stream: &'a [u8], undo: Vec<Undo<'a>> },
    ImportGone { domid: u16 },
    ImportWatch { domid: u16, path: &'a [u8], token: &'a [u8], depth: Option<u16> },
    Shown { domid: u16, all: Vec<(&'a [u8], u64, u64)> },
    Late { domid: u16, header: Option<Header> },
    Generation(u64),
}

/// What a node was before an import.
pub(crate) type Undo<'a> = (&'a [u8], Option<(Vec<Perm>, &'a [u8])>);

macro_rules! tags {
    ($($name:ident = $n:literal),* $(,)?) => {
        mod tag { $(pub const $name: u8 = $n;)* }
    };
}

tags! {
    NODE = 1, META = 2, REMOVE = 3, SPECIAL = 4, KNOWN = 5, FORGOTTEN = 6, INTRODUCED = 7, GONE = 8, PORT = 9, TARGET = 10,
    SHUTDOWN = 11, IGNORED = 12, QUOTAS = 13, DOMAIN_QUOTAS = 14, WATCH = 15, UNWATCH = 16, UNWATCH_ALL = 17, TX_OPEN = 18,
    TX_NODE = 19, TX_END = 20, NEXT_TX = 21, FREEZE = 22, THAW = 23, HELD = 24, IN = 25, OUT = 26, RING = 27,
    RING_RESET = 28, IMPORT = 29, IMPORT_GONE = 30, IMPORT_WATCH = 31, SHOWN = 32, LATE = 33, GENERATION = 34,
}

/// What changed since the last batch.
#[derive(Debug, Default)]
pub(crate) struct Redo {
    /// Off without a journal: then nothing is kept.
    on: bool,
    buf: Vec<u8>,
    /// Domains whose queues changed, perhaps more than once.
    touched: Vec<u16>,
    /// The highest generation of a node in `buf`.
    newest: u64,
}

impl Redo {
    pub(crate) fn is_on(&self) -> bool {
        self.on
    }

    /// Starts or stops keeping changes; those of before are forgotten.
    pub(crate) fn turn(&mut self, on: bool) {
        self.on = on;
        self.newest = 0;
        self.buf.clear();
        self.touched.clear();
    }

    /// Nothing changed.
    pub(crate) fn is_empty(&self) -> bool {
        self.buf.is_empty() && self.touched.is_empty()
    }

    /// Domains whose queues changed, each once.
    pub(crate) fn take_touched(&mut self) -> Vec<u16> {
        self.touched.sort_unstable();
        self.touched.dedup();
        std::mem::take(&mut self.touched)
    }

    /// Exchanges the changes for an empty buffer.
    pub(crate) fn swap(&mut self, with: &mut Vec<u8>) {
        with.clear();
        self.newest = 0;
        std::mem::swap(&mut self.buf, with);
    }

    /// A domain's queues changed.
    pub(crate) fn touch(&mut self, domid: u16) {
        if self.on && self.touched.last() != Some(&domid) {
            self.touched.push(domid);
        }
    }

    fn put(&mut self, tag: u8, f: impl FnOnce(&mut Vec<u8>)) {
        if self.on {
            self.buf.push(tag);
            f(&mut self.buf);
        }
    }

    fn put_domain(&mut self, tag: u8, domid: u16, f: impl FnOnce(&mut Vec<u8>)) {
        self.put(tag, |b| {
            b.extend(domid.to_le_bytes());
            f(b);
        });
    }

    // ---- nodes ----

    /// A node was made or changed. `to_end`: it became the last of its parent's children.
    pub(crate) fn node(&mut self, path: &[u8], n: &Node, to_end: bool) {
        self.newest = self.newest.max(n.generation);
        self.put(tag::NODE, |b| {
            b.push(to_end.into());
            meta(b, path, n);
            long(b, &n.value);
        });
    }

    /// A node's permissions or generation changed, and nothing else.
    pub(crate) fn meta(&mut self, path: &[u8], n: &Node) {
        self.newest = self.newest.max(n.generation);
        self.put(tag::META, |b| meta(b, path, n));
    }

    /// A node and all below are gone.
    pub(crate) fn remove(&mut self, path: &[u8]) {
        self.put(tag::REMOVE, |b| text(b, path));
    }

    pub(crate) fn special(&mut self, release: bool, p: &[Perm]) {
        self.put(tag::SPECIAL, |b| {
            b.push(release.into());
            perms(b, p);
        });
    }

    /// The store's count of changes, unless a node tells it: it is never less than a node's generation.
    pub(crate) fn generation(&mut self, n: u64) {
        if self.newest != n {
            self.put(tag::GENERATION, |b| b.extend(n.to_le_bytes()));
        }
    }

    // ---- domains ----

    pub(crate) fn known(&mut self, domid: u16, born: u64) {
        self.put_domain(tag::KNOWN, domid, |b| b.extend(born.to_le_bytes()));
    }

    pub(crate) fn forgotten(&mut self, domid: u16) {
        self.put_domain(tag::FORGOTTEN, domid, |_| {});
    }

    pub(crate) fn introduced(&mut self, domid: u16, remote_port: u32) {
        self.put_domain(tag::INTRODUCED, domid, |b| b.extend(remote_port.to_le_bytes()));
    }

    pub(crate) fn gone(&mut self, domid: u16) {
        self.put_domain(tag::GONE, domid, |_| {});
    }

    pub(crate) fn port(&mut self, domid: u16, remote_port: u32) {
        self.put_domain(tag::PORT, domid, |b| b.extend(remote_port.to_le_bytes()));
    }

    pub(crate) fn target(&mut self, domid: u16, target: Option<u16>) {
        self.put_domain(tag::TARGET, domid, |b| option16(b, target));
    }

    pub(crate) fn shutdown(&mut self, domid: u16, yes: bool) {
        self.put_domain(tag::SHUTDOWN, domid, |b| b.push(yes.into()));
    }

    pub(crate) fn ignored(&mut self, domid: u16) {
        self.put_domain(tag::IGNORED, domid, |_| {});
    }

    pub(crate) fn quotas(&mut self, values: &[u32]) {
        self.put(tag::QUOTAS, |b| numbers(b, values));
    }

    pub(crate) fn domain_quotas(&mut self, domid: u16, values: &[u32]) {
        self.put_domain(tag::DOMAIN_QUOTAS, domid, |b| numbers(b, values));
    }

    // ---- watches ----

    pub(crate) fn watch(&mut self, domid: u16, path: &[u8], token: &[u8], depth: Option<u16>) {
        self.put_domain(tag::WATCH, domid, |b| watch(b, path, token, depth));
    }

    /// `path` is absolute here.
    pub(crate) fn unwatch(&mut self, domid: u16, path: &[u8], token: &[u8]) {
        self.put_domain(tag::UNWATCH, domid, |b| {
            text(b, path);
            text(b, token);
        });
    }

    pub(crate) fn unwatch_all(&mut self, domid: u16) {
        self.put_domain(tag::UNWATCH_ALL, domid, |_| {});
    }

    // ---- transactions ----

    /// A transaction was opened, or what is said of it as a whole changed.
    pub(crate) fn tx_open(&mut self, domid: u16, tx: u32, generation: u64, fail: bool, created: bool) {
        self.put_domain(tag::TX_OPEN, domid, |b| {
            b.extend(tx.to_le_bytes());
            b.extend(generation.to_le_bytes());
            b.push(u8::from(fail) | u8::from(created) << 1);
        });
    }

    /// `current`: the node that is there now.
    pub(crate) fn tx_node(&mut self, domid: u16, tx: u32, path: &[u8], a: &Accessed, current: Option<&Rc<Node>>) {
        self.put_domain(tag::TX_NODE, domid, |b| {
            b.extend(tx.to_le_bytes());
            text(b, path);
            b.extend(a.generation.to_le_bytes());
            b.push(match a.fire {
                None => 0,
                Some(false) => 1,
                Some(true) => 2,
            });
            match &a.base {
                None => b.push(0),
                Some(base) if current.is_some_and(|c| Rc::ptr_eq(c, base)) => b.push(1),
                Some(base) => {
                    b.push(2);
                    perms(b, &base.perms);
                    long(b, &base.value);
                    names(b, base.children.len(), base.children.iter().map(|(n, _)| n));
                }
            }
            match &a.state {
                State::Unchanged => b.push(0),
                State::Deleted => b.push(1),
                State::Present(c) => {
                    b.push(2);
                    perms(b, &c.perms);
                    long(b, &c.value);
                    b.extend(c.stamp.to_le_bytes());
                    b.push(c.fresh.into());
                    names(b, c.added.len(), c.added.iter().map(|n| &**n));
                    names(b, c.removed.len(), c.removed.iter().map(|n| &**n));
                }
            }
        });
    }

    pub(crate) fn tx_end(&mut self, domid: u16, tx: u32) {
        self.put_domain(tag::TX_END, domid, |b| b.extend(tx.to_le_bytes()));
    }

    pub(crate) fn next_tx(&mut self, domid: u16, tx: u32) {
        self.put_domain(tag::NEXT_TX, domid, |b| b.extend(tx.to_le_bytes()));
    }

    // ---- migration ----

    /// Frozen; `tree` is the store of then as a stream if it is not that of now.
    pub(crate) fn freeze(&mut self, domid: u16, generation: u64, tree: Option<&[u8]>) {
        self.put_domain(tag::FREEZE, domid, |b| {
            b.extend(generation.to_le_bytes());
            b.push(tree.is_some().into());
            if let Some(t) = tree {
                long(b, t);
            }
        });
    }

    pub(crate) fn thaw(&mut self, domid: u16) {
        self.put_domain(tag::THAW, domid, |_| {});
    }

    pub(crate) fn held(&mut self, domid: u16, path: &[u8], watch: &[u8], token: &[u8]) {
        self.put_domain(tag::HELD, domid, |b| {
            text(b, path);
            text(b, watch);
            text(b, token);
        });
    }

    pub(crate) fn import(&mut self, domid: u16, notify: bool, stream: &[u8], undo: &[(Vec<u8>, Option<Rc<Node>>)]) {
        self.put_domain(tag::IMPORT, domid, |b| {
            b.push(notify.into());
            long(b, stream);
            b.extend((undo.len() as u32).to_le_bytes());
            for (p, n) in undo {
                text(b, p);
                b.push(n.is_some().into());
                if let Some(n) = n {
                    perms(b, &n.perms);
                    long(b, &n.value);
                }
            }
        });
    }

    pub(crate) fn import_gone(&mut self, domid: u16) {
        self.put_domain(tag::IMPORT_GONE, domid, |_| {});
    }

    pub(crate) fn import_watch(&mut self, domid: u16, path: &[u8], token: &[u8], depth: Option<u16>) {
        self.put_domain(tag::IMPORT_WATCH, domid, |b| watch(b, path, token, depth));
    }

    /// Path, the store's generation, the one that is shown.
    pub(crate) fn shown<'p>(&mut self, domid: u16, all: impl ExactSizeIterator<Item = (&'p [u8], u64, u64)>) {
        self.put_domain(tag::SHOWN, domid, |b| {
            b.extend((all.len() as u32).to_le_bytes());
            for (p, local, shown) in all {
                text(b, p);
                b.extend(local.to_le_bytes());
                b.extend(shown.to_le_bytes());
            }
        });
    }

    /// A request of a domain will be answered later, or is answered.
    pub(crate) fn late(&mut self, domid: u16, header: Option<&Header>) {
        self.put_domain(tag::LATE, domid, |b| {
            b.push(header.is_some().into());
            b.extend(header.map_or([0; HEADER_LEN], Header::to_bytes));
        });
    }

    // ---- queues and rings ----

    /// The bytes that were read and don't make up a request yet: those that are known before `at`, and these.
    pub(crate) fn input(&mut self, domid: u16, at: u32, bytes: &[u8]) {
        self.put_domain(tag::IN, domid, |b| {
            b.extend(at.to_le_bytes());
            long(b, bytes);
        });
    }

    /// The queue: messages before `front` are out, of the first `used` bytes are, `dropped` are gone, `messages` are new.
    pub(crate) fn output<'m>(
        &mut self,
        domid: u16,
        (front, used, next): (u64, u32, u64),
        dropped: &[u64],
        messages: impl Iterator<Item = Queued<'m>>,
    ) {
        self.put_domain(tag::OUT, domid, |b| {
            b.extend(front.to_le_bytes());
            b.extend(used.to_le_bytes());
            b.extend(next.to_le_bytes());
            b.extend((dropped.len() as u32).to_le_bytes());
            for d in dropped {
                b.extend(d.to_le_bytes());
            }
            let at = b.len();
            b.extend([0; 4]);
            let mut count = 0u32;
            for m in messages {
                count += 1;
                b.extend(m.seq.to_le_bytes());
                b.push(u8::from(m.event) | u8::from(m.headless) << 1);
                b.extend(m.head);
                long(b, m.body);
            }
            b[at..at + 4].copy_from_slice(&count.to_le_bytes());
        });
    }

    pub(crate) fn ring(&mut self, s: &RingStep) {
        self.put_domain(tag::RING, s.domid, |b| {
            for i in [s.requests.from, s.requests.to, s.replies.from, s.replies.to] {
                b.extend(i.to_le_bytes());
            }
        });
    }

    pub(crate) fn ring_reset(&mut self, domid: u16) {
        self.put_domain(tag::RING_RESET, domid, |_| {});
    }
}

fn text(b: &mut Vec<u8>, s: &[u8]) {
    // Paths and tokens come in messages of at most 4096 bytes.
    let n = s.len().min(usize::from(u16::MAX));
    b.extend((n as u16).to_le_bytes());
    b.extend_from_slice(&s[..n]);
}

fn long(b: &mut Vec<u8>, s: &[u8]) {
    b.extend((s.len() as u32).to_le_bytes());
    b.extend_from_slice(s);
}

fn perms(b: &mut Vec<u8>, all: &[Perm]) {
    b.extend((all.len() as u16).to_le_bytes());
    for p in all {
        b.push(p.access.letter() as u8);
        b.push(p.stale.into());
        b.extend(p.domid.to_le_bytes());
    }
}

fn meta(b: &mut Vec<u8>, path: &[u8], n: &Node) {
    text(b, path);
    b.extend(n.generation.to_le_bytes());
    perms(b, &n.perms);
}

fn numbers(b: &mut Vec<u8>, v: &[u32]) {
    b.extend((v.len() as u16).to_le_bytes());
    for n in v {
        b.extend(n.to_le_bytes());
    }
}

fn option16(b: &mut Vec<u8>, v: Option<u16>) {
    b.push(v.is_some().into());
    b.extend(v.unwrap_or(0).to_le_bytes());
}

fn watch(b: &mut Vec<u8>, path: &[u8], token: &[u8], depth: Option<u16>) {
    text(b, path);
    text(b, token);
    option16(b, depth);
}

fn names<'n>(b: &mut Vec<u8>, count: usize, all: impl Iterator<Item = &'n [u8]>) {
    b.extend((count as u32).to_le_bytes());
    for n in all {
        text(b, n);
    }
}

/// Reads a batch, change by change.
#[derive(Debug)]
pub(crate) struct Changes<'a> {
    bytes: &'a [u8],
    at: usize,
    failed: bool,
}

impl<'a> Changes<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Changes<'a> {
        Changes { bytes, at: 0, failed: false }
    }

    fn bad<T>(&self, what: &'static str) -> Result<T, RedoError> {
        Err(RedoError { offset: self.at, what })
    }

    fn raw(&mut self, n: usize, what: &'static str) -> Result<&'a [u8], RedoError> {
        match self.at.checked_add(n).and_then(|end| self.bytes.get(self.at..end)) {
            Some(s) => {
                self.at += n;
                Ok(s)
            }
            None => self.bad(what),
        }
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], RedoError> {
        match self.raw(N, what)?.try_into() {
            Ok(a) => Ok(a),
            Err(_) => self.bad(what),
        }
    }

    fn u8(&mut self, what: &'static str) -> Result<u8, RedoError> {
        Ok(self.array::<1>(what)?[0])
    }

    fn flag(&mut self, what: &'static str) -> Result<bool, RedoError> {
        match self.u8(what)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => self.bad(what),
        }
    }

    fn u16(&mut self, what: &'static str) -> Result<u16, RedoError> {
        self.array(what).map(u16::from_le_bytes)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, RedoError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, RedoError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn text(&mut self, what: &'static str) -> Result<&'a [u8], RedoError> {
        let n = self.u16(what)?;
        self.raw(n.into(), what)
    }

    fn long(&mut self, what: &'static str) -> Result<&'a [u8], RedoError> {
        let n = self.u32(what)?;
        self.raw(n as usize, what)
    }

    fn option16(&mut self, what: &'static str) -> Result<Option<u16>, RedoError> {
        let some = self.flag(what)?;
        let v = self.u16(what)?;
        Ok(some.then_some(v))
    }

    /// `f` so many times; each takes a byte at least, so that a wrong count ends early and needs no memory.
    fn list<T>(
        &mut self,
        n: usize,
        mut f: impl FnMut(&mut Changes<'a>) -> Result<T, RedoError>,
    ) -> Result<Vec<T>, RedoError> {
        let mut v = Vec::new();
        for _ in 0..n {
            v.push(f(self)?);
        }
        Ok(v)
    }

    fn perms(&mut self) -> Result<Vec<Perm>, RedoError> {
        let n = self.u16("number of permissions")?;
        self.list(n.into(), |c| {
            let Some(access) = Access::from_letter(c.u8("permission")?) else {
                return c.bad("a permission is none of w, r, b, n");
            };
            let stale = c.flag("permission's flag")?;
            Ok(Perm { access, domid: c.u16("permission's domain")?, stale })
        })
    }

    /// Of a node: there is an owner.
    fn owned(&mut self) -> Result<Vec<Perm>, RedoError> {
        let p = self.perms()?;
        if p.is_empty() { self.bad("a node without an owner") } else { Ok(p) }
    }

    fn numbers(&mut self) -> Result<Vec<u32>, RedoError> {
        let n = self.u16("number of quotas")?;
        self.list(n.into(), |c| c.u32("quota"))
    }

    fn names(&mut self) -> Result<Vec<&'a [u8]>, RedoError> {
        let n = self.u32("number of names")?;
        self.list(n as usize, |c| c.text("name"))
    }

    fn tx_node(&mut self) -> Result<TxNode<'a>, RedoError> {
        let path = self.text("path of a transaction's node")?;
        let generation = self.u64("generation of a transaction's node")?;
        let fire = match self.u8("watches of a transaction's node")? {
            0 => None,
            1 => Some(false),
            2 => Some(true),
            _ => return self.bad("watches of a transaction's node"),
        };
        let base = match self.u8("base of a transaction's node")? {
            0 => Base::None,
            1 => Base::Current,
            2 => Base::Past { perms: self.owned()?, value: self.long("value")?, children: self.names()? },
            _ => return self.bad("base of a transaction's node"),
        };
        let state = match self.u8("state of a transaction's node")? {
            0 => TxState::Unchanged,
            1 => TxState::Deleted,
            2 => {
                let perms = self.owned()?;
                let value = self.long("value")?;
                let stamp = self.u64("stamp")?;
                let fresh = self.flag("fresh")?;
                TxState::Present { perms, value, stamp, fresh, added: self.names()?, removed: self.names()? }
            }
            _ => return self.bad("state of a transaction's node"),
        };
        Ok(TxNode { path, generation, fire, base, state })
    }

    fn decode(&mut self) -> Result<Change<'a>, RedoError> {
        let tag = self.u8("tag")?;
        match tag {
            tag::NODE => {
                let to_end = self.flag("place of a node")?;
                let path = self.text("path of a node")?;
                let generation = self.u64("generation of a node")?;
                let perms = self.owned()?;
                return Ok(Change::Node { path, generation, perms, value: self.long("value of a node")?, to_end });
            }
            tag::META => {
                let path = self.text("path of a node")?;
                let generation = self.u64("generation of a node")?;
                return Ok(Change::Meta { path, generation, perms: self.owned()? });
            }
            tag::REMOVE => return Ok(Change::Remove { path: self.text("path of a node")? }),
            tag::SPECIAL => {
                let release = self.flag("special event")?;
                return Ok(Change::Special { release, perms: self.owned()? });
            }
            tag::QUOTAS => return Ok(Change::Quotas { values: self.numbers()? }),
            tag::GENERATION => return Ok(Change::Generation(self.u64("generation")?)),
            tag::KNOWN..=tag::LATE => {}
            _ => {
                self.at -= 1;
                return self.bad("there is no record of this kind");
            }
        }
        let domid = self.u16("domain")?;
        Ok(match tag {
            tag::KNOWN => Change::Known { domid, born: self.u64("born")? },
            tag::FORGOTTEN => Change::Forgotten { domid },
            tag::INTRODUCED => Change::Introduced { domid, remote_port: self.u32("port")? },
            tag::GONE => Change::Gone { domid },
            tag::PORT => Change::Port { domid, remote_port: self.u32("port")? },
            tag::TARGET => Change::Target { domid, target: self.option16("target")? },
            tag::SHUTDOWN => Change::Shutdown { domid, yes: self.flag("shut down")? },
            tag::IGNORED => Change::Ignored { domid },
            tag::DOMAIN_QUOTAS => Change::DomainQuotas { domid, values: self.numbers()? },
            tag::WATCH => Change::Watch {
                domid,
                path: self.text("path of a watch")?,
                token: self.text("token of a watch")?,
                depth: self.option16("depth of a watch")?,
            },
            tag::UNWATCH => {
                Change::Unwatch { domid, path: self.text("path of a watch")?, token: self.text("token of a watch")? }
            }
            tag::UNWATCH_ALL => Change::UnwatchAll { domid },
            tag::TX_OPEN => {
                let (tx, generation) = (self.u32("transaction")?, self.u64("generation")?);
                let flags = self.u8("transaction's flags")?;
                Change::TxOpen { domid, tx, generation, fail: flags & 1 != 0, created: flags & 2 != 0 }
            }
            tag::TX_NODE => Change::TxNode { domid, tx: self.u32("transaction")?, node: self.tx_node()? },
            tag::TX_END => Change::TxEnd { domid, tx: self.u32("transaction")? },
            tag::NEXT_TX => Change::NextTx { domid, tx: self.u32("transaction")? },
            tag::FREEZE => {
                let generation = self.u64("generation")?;
                let tree = if self.flag("tree")? { Some(self.long("tree")?) } else { None };
                Change::Freeze { domid, generation, tree }
            }
            tag::THAW => Change::Thaw { domid },
            tag::HELD => Change::Held {
                domid,
                path: self.text("path of an event")?,
                watch: self.text("path of a watch")?,
                token: self.text("token of a watch")?,
            },
            tag::IN => Change::In { domid, at: self.u32("place of unprocessed bytes")?, bytes: self.long("bytes")? },
            tag::OUT => {
                let (front, used, next) =
                    (self.u64("first message")?, self.u32("bytes sent")?, self.u64("next message")?);
                let n = self.u32("number of dropped messages")?;
                let dropped = self.list(n as usize, |c| c.u64("dropped message"))?;
                let n = self.u32("number of messages")?;
                let messages = self.list(n as usize, |c| {
                    let seq = c.u64("message")?;
                    let flags = c.u8("message's flags")?;
                    let head = c.array("message's header")?;
                    let body = c.long("message")?;
                    Ok(Queued { seq, event: flags & 1 != 0, headless: flags & 2 != 0, head, body })
                })?;
                Change::Out { domid, front, used, dropped, next, messages }
            }
            tag::RING => {
                let mut i = [0; 4];
                for i in &mut i {
                    *i = self.u32("ring index")?;
                }
                let (requests, replies) = (Moved { from: i[0], to: i[1] }, Moved { from: i[2], to: i[3] });
                Change::Ring(RingStep { domid, requests, replies })
            }
            tag::RING_RESET => Change::RingReset { domid },
            tag::IMPORT => {
                let notify = self.flag("notify")?;
                let stream = self.long("stream of an import")?;
                let n = self.u32("number of nodes of an import")?;
                let undo = self.list(n as usize, |c| {
                    let p = c.text("path of an import")?;
                    let was = c.flag("node of an import")?;
                    Ok((p, if was { Some((c.owned()?, c.long("value of an import")?)) } else { None }))
                })?;
                Change::Import { domid, notify, stream, undo }
            }
            tag::IMPORT_GONE => Change::ImportGone { domid },
            tag::IMPORT_WATCH => Change::ImportWatch {
                domid,
                path: self.text("path of a watch")?,
                token: self.text("token of a watch")?,
                depth: self.option16("depth of a watch")?,
            },
            tag::SHOWN => {
                let n = self.u32("number of shown generations")?;
                let all =
                    self.list(n as usize, |c| Ok((c.text("path")?, c.u64("generation")?, c.u64("shown generation")?)))?;
                Change::Shown { domid, all }
            }
            tag::LATE => {
                let some = self.flag("late answer")?;
                let h = self.array::<HEADER_LEN>("header")?;
                Change::Late { domid, header: some.then(|| Header::from_bytes(&h)) }
            }
            _ => return self.bad("there is no record of this kind"),
        })
    }
}

impl<'a> Iterator for Changes<'a> {
    type Item = Result<Change<'a>, RedoError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed || self.at == self.bytes.len() {
            return None;
        }
        let r = self.decode();
        self.failed = r.is_err();
        Some(r)
    }
}
