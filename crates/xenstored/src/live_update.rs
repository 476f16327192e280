//! Live update: another program takes over, in the same process, with the same descriptors.
//!
//! `xenstore-control live-update` gives the program, then the command line, then starts. Once nothing stands against it
//! the daemon writes its state as a xenstore-migration stream and executes the program with `-U`. The next one answers
//! the command, out of the stream.
//!
//! The stock daemon can't carry transactions over and waits until there are none. We can, and don't wait for them if the
//! program is one of ours; a stock program gets what it knows.

use crate::conn::{ConnId, Connection, Outgoing, Peer};
use crate::host::{Host, HostCommand};
use crate::import::{TxRecords, restore_transactions, transaction_records_in};
use crate::node::{Node, PermList, owner};
use crate::store::{Answer, Caller, Domain, Options, Store, ok};
use crate::wrapped::{self, WRAPPED};
use std::collections::BTreeMap;
use std::rc::Rc;
use thiserror::Error;
use tracing::{info, warn};
use xenstore_wire::stream::{ConnSpec, DEPTH_UNLIMITED, EncodeError, Format, Record, StreamError, TxAccess, Writer};
use xenstore_wire::{DOMID_INVALID, Errno, HEADER_LEN, Header, Message, Op, payload, ring};

/// A live update being prepared.
#[derive(Debug)]
pub(crate) struct LiveUpdate {
    conn: ConnId,
    program: Vec<u8>,
    cmdline: Option<Vec<u8>>,
    start: Option<Start>,
}

#[derive(Debug, Clone)]
struct Start {
    header: Header,
    force: bool,
    timeout_ms: u64,
    at_ms: u64,
}

impl LiveUpdate {
    pub(crate) fn is_started(&self) -> bool {
        self.start.is_some()
    }
}

/// What to execute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Path of the program.
    pub program: Vec<u8>,
    /// New command line, blanks between the words; the old one if there is none.
    pub cmdline: Option<Vec<u8>>,
    /// The client that asked.
    pub conn: ConnId,
}

/// A state that can't be restored.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The stream is no good.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// It contradicts itself.
    #[error("record {index} of the state: {what}")]
    Record {
        /// Number of the record, from 0.
        index: usize,
        /// What is wrong.
        what: String,
    },
}

/// What a restore found besides the store.
#[derive(Debug, Default)]
pub struct Restored {
    /// The listening socket.
    pub socket_fd: i32,
    /// The event channel device.
    pub evtchn_fd: i32,
    /// Sockets of clients.
    pub sockets: Vec<(ConnId, i32)>,
}

impl Store {
    /// Whether a request has to wait for the live update: a new transaction would put it off for ever.
    pub(crate) fn live_update_delays(&self, id: ConnId, op: u32) -> bool {
        self.live_update.as_ref().is_some_and(LiveUpdate::is_started)
            && op == Op::TransactionStart.to_wire()
            && self.conns.get(&id).is_some_and(|c| c.transactions.is_empty())
    }

    /// The request for a live update that a domain waits to have answered.
    pub(crate) fn late_request(&self) -> Option<(u16, Header)> {
        let l = self.live_update.as_ref()?;
        match self.conns.get(&l.conn)?.peer {
            Peer::Domain(d) => Some((d, l.start.as_ref()?.header)),
            Peer::Socket => None,
        }
    }

    pub(crate) fn live_update_closed(&mut self, id: ConnId) {
        if self.live_update.as_ref().is_some_and(|l| l.conn == id) {
            info!("live update: the client that asked is gone, abandoned");
            self.live_update = None;
            self.delayed_ready = true;
        }
    }

    pub(crate) fn control_live_update(
        &mut self,
        c: &Caller,
        h: &Header,
        args: &[&[u8]],
        host: &mut dyn Host,
    ) -> Answer {
        let say = |s: &str| Ok(Some(payload::join([s]).into()));
        let mine = self.live_update.as_ref().is_some_and(|l| l.conn == c.conn);
        match args {
            [b"-a"] => match self.live_update.take() {
                Some(l) => {
                    info!("live update: aborted");
                    self.delayed_ready = true;
                    if let Some(s) = l.start {
                        self.late_reply(l.conn, &s.header, "Cancellation was requested");
                    }
                    ok()
                }
                None => say("No live-update session active."),
            },
            [b"-f", program] => {
                if self.live_update.is_some() {
                    return say("live-update session already active.");
                }
                match host.command(HostCommand::CheckProgram(program)) {
                    Ok(()) => {}
                    Err(Errno::EINVAL) => return say("File not executable."),
                    Err(_) => return say("File not accessible."),
                }
                info!(program = %String::from_utf8_lossy(program), "live update: program");
                self.live_update =
                    Some(LiveUpdate { conn: c.conn, program: program.to_vec(), cmdline: None, start: None });
                ok()
            }
            [b"-c", cmdline] => match self.live_update.as_mut().filter(|_| mine) {
                Some(l) => {
                    l.cmdline = Some(cmdline.to_vec());
                    ok()
                }
                None => say("Not in live-update session."),
            },
            [b"-s", rest @ ..] => {
                let (mut force, mut timeout) = (false, 0);
                let mut rest = rest.iter();
                while let Some(&a) = rest.next() {
                    match a {
                        b"-F" => force = true,
                        b"-t" => {
                            let t = rest.next().ok_or(Errno::EINVAL)?;
                            timeout = u64::try_from(payload::atoi(t).unwrap_or(0)).unwrap_or(0);
                        }
                        _ => return Err(Errno::EINVAL),
                    }
                }
                match self.live_update.as_mut().filter(|_| mine) {
                    Some(l) => {
                        let at_ms = host.now_ms();
                        l.start = Some(Start { header: *h, force, timeout_ms: timeout * 1000, at_ms });
                        if let Peer::Domain(d) = c.peer {
                            self.redo.late(d, Some(h));
                        }
                        info!(force, timeout, "live update: start");
                        Ok(None)
                    }
                    None => say("Not in live-update session."),
                }
            }
            _ => Err(Errno::EINVAL),
        }
    }

    /// What to execute, if a live update was asked for and nothing stands against it (any more). The caller then dumps
    /// the state and executes; if that fails, it calls [`Store::live_update_failed`].
    pub fn live_update_due(&mut self, host: &mut dyn Host) -> Option<Plan> {
        let l = self.live_update.as_ref()?;
        let s = l.start.clone()?;
        let (conn, now) = (l.conn, host.now_ms());
        let mut reason = String::new();
        let (mut open, mut long) = (0, 0);
        for c in self.conns_in_order() {
            let Some(started) = c.transactions.iter().map(|t| t.started_ms).min() else { continue };
            open += 1;
            let age = now.saturating_sub(started);
            if age >= s.timeout_ms {
                long += 1;
                reason.push_str(&format!("\nDomain {}: {} s", c.peer.domid(), age / 1000));
            }
        }
        let frozen = self.conns.values().any(|c| c.frozen.is_some()) || !self.imports.is_empty();
        if (open == 0 || (s.force && open == long)) && !frozen {
            return Some(Plan { program: l.program.clone(), cmdline: l.cmdline.clone(), conn });
        }
        if now.saturating_sub(s.at_ms) < s.timeout_ms {
            return None;
        }
        let why = if frozen {
            "A domain is being migrated.".into()
        } else if reason.is_empty() {
            "Overlapping transactions".into()
        } else {
            format!("Domains with long running transactions:{reason}")
        };
        self.live_update_failed(&why);
        None
    }

    /// Tells the client, and goes on.
    pub fn live_update_failed(&mut self, why: &str) {
        let Some(l) = self.live_update.take() else { return };
        self.delayed_ready = true;
        warn!(why, "live update failed, going on");
        if let Some(s) = l.start {
            self.late_reply(l.conn, &s.header, why);
        }
    }

    fn late_reply(&mut self, conn: ConnId, h: &Header, text: &str) {
        if let Some(c) = self.conns.get(&conn) {
            let caller = self.caller(c);
            if let Peer::Domain(d) = caller.peer {
                self.redo.late(d, None);
            }
            self.reply(&caller, h, Ok(payload::join([text]).into()));
        }
    }

    /// The whole state as a stream of version 1, which every daemon reads. `socket` gives a socket's descriptor and
    /// what was read from it and not given to [`Store::input`]. The
    /// answer to a started live update is part of it.
    ///
    /// # Errors
    /// Something does not fit the format (a client with more than 64 KiB of unread requests, say).
    pub fn dump(
        &self,
        socket_fd: i32,
        evtchn_fd: i32,
        socket: &mut dyn FnMut(ConnId) -> (i32, Vec<u8>),
    ) -> Result<Vec<u8>, EncodeError> {
        let mut w = Writer::new(Format::V1);
        w.record(&Record::Global { socket_fd, evtchn_fd })?;
        for c in self.conns_in_order() {
            let mut unread = Vec::new();
            let spec = match c.peer {
                Peer::Socket => {
                    let (fd, bytes) = socket(c.id);
                    unread = bytes;
                    ConnSpec::Socket { fd }
                }
                Peer::Domain(domid) => ConnSpec::Ring {
                    domid,
                    tdomid: c.target.unwrap_or(DOMID_INVALID),
                    evtchn: self.domains.get(&domid).map_or(0, |d| d.port),
                },
            };
            let (mut in_data, out_resp_len, mut out_data) = buffered(c);
            in_data.extend(unread);
            if let Some(s) = self.live_update.as_ref().filter(|l| l.conn == c.id).and_then(|l| l.start.as_ref()) {
                out_data
                    .extend(Message::new(s.header.op, s.header.req_id, s.header.tx_id, b"OK\0".to_vec()).to_bytes());
            }
            w.record(&Record::Connection { conn_id: c.id, spec, in_data, out_resp_len, out_data })?;
            for r in self.watch_records(c, false) {
                w.record(&r)?;
            }
            // A depth is unknown to version 1: to one of ours it is told once more, with the depth.
            for r in self.watch_records(c, true) {
                if matches!(r, Record::Watch { depth: Some(d), .. } if d != DEPTH_UNLIMITED)
                    && let Some(r) = wrapped::wrap([&r])
                {
                    w.record(&r)?;
                }
            }
            for t in c.transactions.iter() {
                w.record(&Record::Transaction { conn_id: c.id, tx_id: t.id })?;
            }
        }
        for (name, perms) in [("@releaseDomain", &self.release_perms), ("@introduceDomain", &self.introduce_perms)] {
            w.record(&Record::Node {
                conn_id: 0,
                tx_id: 0,
                access: TxAccess::default(),
                perms: perms.to_vec(),
                path: name.into(),
                value: Vec::new(),
            })?;
        }
        let mut failed = Ok(());
        self.tree.walk(b"/", &mut |p, n| {
            if failed.is_ok() {
                failed = w.record(&self.node_record(p, n));
            }
        });
        failed?;
        for r in self.quota_records() {
            w.record(&r)?;
        }
        // A stock daemon takes every node record for a committed one: transactions' nodes go only to one of ours, in
        // records that a stock daemon skips.
        for c in self.conns_in_order() {
            for r in transaction_records_in(c, c.id, Some(&self.tree), true) {
                w.record(&r)?;
            }
        }
        Ok(w.finish())
    }

    /// Quotas that were set while the daemon ran; a stock daemon skips them. Those that were not are for the next one's command line
    /// to say.
    fn quota_records(&self) -> Vec<Record> {
        let mut domain = self.options.quotas.named();
        let of_start = self.started_with.named();
        domain.retain(|q| !of_start.contains(q));
        let global = (!domain.is_empty()).then(|| Record::GlobalQuota { domain, global: Vec::new() });
        let own = self.domains.iter().filter_map(|(domid, d)| {
            Some(Record::Domain { domid: *domid, features: 0, quotas: d.quotas.as_ref()?.named() })
        });
        global.into_iter().chain(own).collect()
    }

    pub(crate) fn node_record(&self, p: &[u8], n: &Node) -> Record {
        Record::Node {
            conn_id: 0,
            tx_id: 0,
            access: TxAccess::default(),
            perms: self.settled(&n.perms, n.generation).to_vec(),
            path: p.to_vec(),
            value: n.value.to_vec(),
        }
    }

    /// A connection's watches, in order, with their paths as the client gave them.
    pub(crate) fn watch_records(&self, c: &Connection, extended: bool) -> Vec<Record> {
        c.watches
            .iter()
            .filter_map(|&id| self.watches.get(id))
            .map(|w| Record::Watch {
                conn_id: c.id,
                path: w.shown(&w.path).to_vec(),
                token: w.token.to_vec(),
                depth: extended.then(|| w.depth.unwrap_or(DEPTH_UNLIMITED)),
            })
            .collect()
    }

    /// A store out of a stream that a daemon dumped at a live update.
    ///
    /// # Errors
    /// The stream is broken or contradicts itself. A domain whose ring can't be mapped any more is no error: its
    /// connection is kept, ignored, until it dies.
    pub fn restore<H: Host>(
        options: Options,
        stream: &[u8],
        host: impl FnOnce(&Restored) -> Result<H, String>,
    ) -> Result<(Store, Restored, H), RestoreError> {
        let (_, records) = xenstore_wire::stream::read_all(stream)?;
        let fail = |index: usize, what: String| RestoreError::Record { index, what };
        let mut out = Restored { socket_fd: -1, evtchn_fd: -1, sockets: Vec::new() };
        if let Some(Record::Global { socket_fd, evtchn_fd }) = records.first() {
            (out.socket_fd, out.evtchn_fd) = (*socket_fd, *evtchn_fd);
        }
        let mut host = host(&out).map_err(|e| fail(0, e))?;
        let host_ref: &mut dyn Host = &mut host;
        let mut s = Store::empty(options);
        let mut conns: BTreeMap<u32, ConnId> = BTreeMap::new();
        let mut txs = TxRecords::default();
        for (index, r) in records.into_iter().enumerate() {
            match r {
                Record::Connection { conn_id, spec, in_data, out_resp_len, out_data } => {
                    let id = match spec {
                        ConnSpec::Socket { fd } => {
                            let id = s.add_socket();
                            out.sockets.push((id, fd));
                            id
                        }
                        ConnSpec::Ring { domid, tdomid, evtchn } => {
                            if s.domain_connection(domid).is_some() {
                                return Err(fail(index, format!("domain {domid} has two connections")));
                            }
                            let id = s.introduced(domid, evtchn, 0, host_ref.now_ms());
                            let adopted = host_ref.adopt(domid, evtchn);
                            if let Some(d) = s.domains.get_mut(&domid) {
                                d.remote_port = adopted.unwrap_or(0);
                            }
                            if let Err(e) = adopted {
                                warn!(domid, port = evtchn, "its ring can't be mapped again: {e}; domain ignored");
                                s.ignore(id, ring::error::COMM, host_ref);
                            }
                            if tdomid != DOMID_INVALID
                                && let Some(c) = s.conns.get_mut(&id)
                            {
                                c.target = Some(tdomid);
                            }
                            id
                        }
                    };
                    conns.insert(conn_id, id);
                    s.restore_buffers(id, &in_data, out_resp_len, &out_data, host_ref.now_ms())
                        .map_err(|what| fail(index, what.into()))?;
                }
                Record::Watch { conn_id, path, token, depth } => {
                    let id = *conns.get(&conn_id).ok_or_else(|| fail(index, format!("no connection {conn_id}")))?;
                    let Some(c) = s.conns.get(&id) else { continue };
                    let caller = s.caller(c);
                    let depth = depth.filter(|&d| d != DEPTH_UNLIMITED);
                    match s.add_watch(&caller, &path, &token, depth, false) {
                        Ok(_) | Err(Errno::EEXIST) => {}
                        Err(e) => return Err(fail(index, format!("a watch: {e}"))),
                    }
                }
                Record::Node { conn_id: 0, perms, path, value, .. } => {
                    s.restore_node(&path, perms.into(), value).map_err(|what| fail(index, what))?;
                }
                Record::Unknown { kind: WRAPPED, body } => {
                    for r in wrapped::unwrap(&body) {
                        match r {
                            Record::Watch { conn_id, path, token, depth } => {
                                let id = conns.get(&conn_id).copied();
                                let id = id.ok_or_else(|| fail(index, format!("no connection {conn_id}")))?;
                                s.restore_depth(id, &path, &token, depth);
                            }
                            r => txs.add(r),
                        }
                    }
                }
                Record::Transaction { .. } | Record::Node { .. } | Record::NodeMeta { .. } | Record::Unknown { .. } => {
                    txs.add(r);
                }
                Record::Global { .. } if index == 0 => {}
                Record::Global { .. } => return Err(fail(index, "a second GLOBAL_DATA record".into())),
                Record::GlobalQuota { domain, .. } => {
                    for (name, v) in domain {
                        s.options.quotas.set(&name, v);
                    }
                }
                Record::Domain { domid, quotas, .. } => {
                    let mut q = s.quotas(domid).clone();
                    for (name, v) in quotas {
                        q.set(&name, v);
                    }
                    // One may be known by nothing else.
                    s.domains.entry(domid).or_default().quotas = Some(Box::new(q));
                }
                Record::End => {}
            }
        }
        for (stream_conn, id) in &conns {
            restore_transactions(&mut s, *id, &txs, *stream_conn, host_ref.now_ms());
        }
        s.account_all();
        s.next_conn = s.next_conn.max(conns.keys().max().map_or(0, |m| m + 1));
        Ok((s, out, host))
    }

    /// The depth of a watch that was restored without.
    fn restore_depth(&mut self, conn: ConnId, path: &[u8], token: &[u8], depth: Option<u16>) {
        let Some(c) = self.conns.get(&conn) else { return };
        let caller = self.caller(c);
        if let Ok((path, _)) = self.watch_path(&caller, path)
            && let Some(id) = self.watches.find(conn, &path, token)
        {
            self.watches.set_depth(id, depth.filter(|&d| d != DEPTH_UNLIMITED));
        }
    }

    pub(crate) fn restore_node(&mut self, p: &[u8], perms: PermList, value: Vec<u8>) -> Result<(), String> {
        match p {
            b"@releaseDomain" => self.release_perms = perms,
            b"@introduceDomain" => self.introduce_perms = perms,
            _ => {
                let shown = || String::from_utf8_lossy(p).into_owned();
                if !xenstore_wire::path::is_valid(p, xenstore_wire::ABS_PATH_MAX) {
                    return Err(format!("{:?} is no path", shown()));
                }
                // Domains that are known from permissions only. They are as old as what names them; whether they still
                // exist is checked once all is restored.
                for q in perms.iter().filter(|q| !q.stale) {
                    self.domains.entry(q.domid).or_insert_with(|| Domain { born: 0, ..Domain::default() });
                }
                self.domains.entry(owner(&perms)).or_default();
                self.generation += 1;
                let mut n = Node::new(self.generation, perms);
                n.value = value.into();
                if p == b"/" {
                    n.children = self.tree.root().children.clone();
                    if let Some(root) = self.tree.get_mut(b"/") {
                        *root = n;
                    }
                    return Ok(());
                }
                let parent = self
                    .tree
                    .get_mut(xenstore_wire::path::parent(p))
                    .ok_or_else(|| format!("node {} comes before its parent", shown()))?;
                let name = xenstore_wire::path::leaf(p);
                if parent.children.get(name).is_some() {
                    return Err(format!("node {} comes twice", shown()));
                }
                parent.children.insert(name, Rc::new(n));
            }
        }
        Ok(())
    }

    /// Bytes in flight of a connection.
    pub(crate) fn restore_buffers(
        &mut self,
        id: ConnId,
        in_data: &[u8],
        out_resp_len: u16,
        out_data: &[u8],
        now_ms: u64,
    ) -> Result<(), &'static str> {
        let Some(c) = self.conns.get_mut(&id) else { return Ok(()) };
        if c.ignored {
            return Ok(());
        }
        let mut rest = in_data;
        while !rest.is_empty() {
            let n = c.decoder.feed(rest).map_err(|_| "an unprocessed request is longer than allowed")?;
            rest = &rest[n..];
            match c.decoder.take() {
                Some(m) => {
                    c.delayed.push_back(m);
                    self.delayed_ready = true;
                }
                None if n == 0 => return Err("unprocessed bytes don't make up requests"),
                None => {}
            }
        }
        let peer = c.peer;
        let (first, rest) = out_data.split_at_checked(out_resp_len.into()).ok_or("out-resp-len is too much")?;
        let mut messages = Vec::new();
        if !first.is_empty() {
            let mut m = Outgoing::new(Header::default(), Rc::from(first));
            m.headless = true;
            messages.push(m);
        }
        let mut rest = rest;
        while let Some((h, r)) = rest.split_first_chunk::<HEADER_LEN>() {
            let h = Header::from_bytes(h);
            let (body, r) = r.split_at_checked(h.len as usize).ok_or("a message to be sent is cut off")?;
            let mut m = Outgoing::new(h, Rc::from(body));
            m.event = h.op == Op::WatchEvent.to_wire();
            let limited = matches!(peer, Peer::Domain(d) if !self.domid_privileged(d));
            if m.event && limited && self.options.event_timeout_ms > 0 {
                m.deadline = Some(now_ms + self.options.event_timeout_ms);
            }
            messages.push(m);
            rest = r;
        }
        if !rest.is_empty() {
            return Err("a message to be sent is cut off");
        }
        let size: usize = messages.iter().map(Outgoing::size).sum();
        let _ = self.charge(peer.domid(), size as i64, false);
        let Some(c) = self.conns.get_mut(&id) else { return Ok(()) };
        for m in messages {
            if m.event && m.body.first() != Some(&b'@') {
                c.pending_events.insert(m.body.clone());
            }
            c.push(m);
        }
        self.input_changed(id);
        self.wake(id);
        Ok(())
    }
}

/// Bytes that were read and make up requests that wait, or a part of one.
pub(crate) fn unprocessed(c: &Connection) -> Vec<u8> {
    let mut input: Vec<u8> = c.delayed.iter().flat_map(Message::to_bytes).collect();
    input.extend(c.decoder.partial());
    input
}

/// Unprocessed bytes, length of the half-sent message's rest, bytes to send.
pub(crate) fn buffered(c: &Connection) -> (Vec<u8>, u16, Vec<u8>) {
    let input = unprocessed(c);
    let mut out = Vec::new();
    let mut first = 0;
    for (i, m) in c.out.iter().enumerate() {
        m.copy_left(&mut out, usize::MAX);
        if i == 0 && (m.used > 0 || m.headless) {
            first = out.len();
        }
    }
    (input, first as u16, out)
}
