//! A store on a host made of a table, driven request by request.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::{BTreeMap, HashMap};
use xenstore_wire::{Errno, HEADER_LEN, Header, Message, Op, payload};
use xenstored::{ConnId, DomainState, Host, HostCommand, Options, Store};

/// Domains and their ports.
#[derive(Debug, Default)]
pub struct Table {
    pub domains: BTreeMap<u16, DomainState>,
    pub now: u64,
    /// Rings that were reset.
    pub resets: Vec<u16>,
    pub connected: Vec<u16>,
    pub ring_errors: HashMap<u16, u32>,
}

impl Host for Table {
    fn domain_state(&mut self, domid: u16) -> Option<DomainState> {
        if domid == 0 { Some(DomainState::default()) } else { self.domains.get(&domid).copied() }
    }

    fn connect(&mut self, domid: u16, remote_port: u32) -> Result<u32, Errno> {
        if !self.domains.contains_key(&domid) {
            return Err(Errno::ENOENT);
        }
        self.connected.push(domid);
        Ok(100 + remote_port)
    }

    fn adopt(&mut self, domid: u16, local_port: u32) -> Result<u32, Errno> {
        self.connected.push(domid);
        if self.domains.contains_key(&domid) || domid == 0 { Ok(local_port - 100) } else { Err(Errno::EIO) }
    }

    fn rebind(&mut self, _domid: u16, _local_port: u32, remote_port: u32) -> Result<u32, Errno> {
        Ok(100 + remote_port)
    }

    fn disconnect(&mut self, domid: u16, _local_port: u32) {
        self.connected.retain(|&d| d != domid);
    }

    fn reset_ring(&mut self, domid: u16) {
        self.resets.push(domid);
    }

    fn set_ring_error(&mut self, domid: u16, error: u32) {
        self.ring_errors.insert(domid, error);
    }

    fn ring_features(&mut self, domid: u16) -> Option<u32> {
        self.connected.contains(&domid).then_some(0)
    }

    fn command(&mut self, _command: HostCommand<'_>) -> Result<(), Errno> {
        Ok(())
    }

    fn now_ms(&self) -> u64 {
        self.now
    }
}

/// What came back, event or reply.
pub type Event = (String, String);

/// The store, its host, and what its clients have received.
pub struct World {
    pub store: Store,
    pub host: Table,
    pub events: HashMap<ConnId, Vec<Event>>,
    pub replies: HashMap<ConnId, Vec<Message>>,
    next_req: u32,
}

impl World {
    pub fn new(options: Options) -> World {
        World {
            store: Store::new(options),
            host: Table::default(),
            events: HashMap::new(),
            replies: HashMap::new(),
            next_req: 1,
        }
    }

    /// dom0's tools.
    pub fn tool(&mut self) -> ConnId {
        self.store.add_socket()
    }

    /// A domain with a home and a connection.
    pub fn guest(&mut self, tool: ConnId, domid: u16) -> ConnId {
        self.host.domains.insert(domid, DomainState::default());
        let home = format!("/local/domain/{domid}");
        self.ok(tool, Op::Mkdir, &[&home]);
        self.ok(tool, Op::SetPerms, &[&home, &format!("n{domid}")]);
        self.ok(tool, Op::Introduce, &[&domid.to_string(), "1", "7"]);
        self.store.domain_connection(domid).unwrap()
    }

    /// Receives what waits for a connection.
    pub fn receive(&mut self, c: ConnId) {
        let mut bytes = Vec::new();
        self.store.output(c, usize::MAX, &mut bytes);
        self.store.wrote(c, bytes.len());
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (h, r) = rest.split_first_chunk::<HEADER_LEN>().expect("whole messages");
            let h = Header::from_bytes(h);
            let (body, r) = r.split_at(h.len as usize);
            rest = r;
            if h.op == Op::WatchEvent.to_wire() {
                assert_eq!((h.req_id, h.tx_id), (0, 0));
                let s: Vec<String> = payload::strings(body).map(|s| String::from_utf8_lossy(s).into_owned()).collect();
                self.events.entry(c).or_default().push((s[0].clone(), s[1].clone()));
            } else {
                self.replies.entry(c).or_default().push(Message { header: h, payload: body.to_vec() });
            }
        }
    }

    /// Sends a message as it is.
    pub fn send(&mut self, c: ConnId, op: u32, tx: u32, body: &[u8]) -> u32 {
        let id = self.next_req;
        self.next_req += 1;
        let bytes = Message::new(op, id, tx, body.to_vec()).to_bytes();
        let mut at = 0;
        while at < bytes.len() {
            let n = self.store.wants(c, self.host.now).min(bytes.len() - at);
            assert!(n > 0, "connection {c} takes nothing");
            at += self.store.input(c, &bytes[at..at + n], &mut self.host).unwrap();
        }
        id
    }

    /// One request and its reply.
    pub fn raw(&mut self, c: ConnId, op: Op, tx: u32, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let id = self.send(c, op.to_wire(), tx, body);
        self.receive(c);
        let m = self.replies.get_mut(&c).and_then(|v| v.pop()).expect("a reply");
        assert_eq!((m.header.req_id, m.header.tx_id), (id, tx));
        if m.header.op == Op::Error.to_wire() {
            return Err(Errno::from_payload(&m.payload).unwrap());
        }
        assert_eq!(m.header.op, op.to_wire());
        Ok(m.payload)
    }

    /// One request of strings.
    pub fn req(&mut self, c: ConnId, op: Op, tx: u32, args: &[&str]) -> Result<String, Errno> {
        let mut body = payload::join(args);
        if op == Op::Write {
            body.pop();
        }
        self.raw(c, op, tx, &body).map(|b| String::from_utf8_lossy(&b).into_owned())
    }

    pub fn ok(&mut self, c: ConnId, op: Op, args: &[&str]) -> String {
        self.req(c, op, 0, args).unwrap_or_else(|e| panic!("{op:?} {args:?}: {e}"))
    }

    pub fn read(&mut self, c: ConnId, p: &str) -> Result<String, Errno> {
        self.req(c, Op::Read, 0, &[p])
    }

    pub fn write(&mut self, c: ConnId, p: &str, v: &str) -> Result<String, Errno> {
        self.req(c, Op::Write, 0, &[p, v])
    }

    pub fn begin(&mut self, c: ConnId) -> u32 {
        let r = self.req(c, Op::TransactionStart, 0, &[""]).unwrap();
        r.trim_end_matches('\0').parse().unwrap()
    }

    pub fn commit(&mut self, c: ConnId, tx: u32) -> Result<String, Errno> {
        self.req(c, Op::TransactionEnd, tx, &["T"])
    }

    /// Events since the last call.
    pub fn events(&mut self, c: ConnId) -> Vec<Event> {
        self.receive(c);
        self.events.remove(&c).unwrap_or_default()
    }

    /// Paths of events since the last call.
    pub fn paths(&mut self, c: ConnId) -> Vec<String> {
        self.events(c).into_iter().map(|e| e.0).collect()
    }

    /// Nothing may be wrong inside.
    pub fn check(&self) {
        assert_eq!(self.store.check(), Vec::<String>::new());
    }
}

/// All nodes of a store: path, value, permissions, generation.
pub fn nodes(s: &Store) -> Vec<String> {
    let mut v = Vec::new();
    s.tree().walk(b"/", &mut |p, n| {
        let perms: Vec<String> = n.perms.iter().map(ToString::to_string).collect();
        v.push(format!("{} {} {} {}", p.escape_ascii(), n.value.escape_ascii(), perms.join(","), n.generation));
    });
    v
}
