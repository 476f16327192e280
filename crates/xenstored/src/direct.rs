//! The short way of most requests: a whole one of a tool of dom0 for which nothing else waits. Its reply is put beside that of the
//! request before, to be sent at once, and goes by no queue. What a tool has to wait for is not accounted, and no journal knows of it.

use crate::conn::{ConnId, Outgoing, Peer};
use crate::host::Host;
use crate::store::Store;
use tracing::debug;
use xenstore_wire::{HEADER_LEN, Header, Op, PAYLOAD_MAX, payload};

const OK: &[u8] = b"OK\0";

/// Replies on the short way.
#[derive(Debug, Default)]
pub(crate) struct Direct {
    /// Whose request is being served.
    to: Option<ConnId>,
    /// Whole messages.
    bytes: Vec<u8>,
}

impl Direct {
    fn put(&mut self, h: &Header, op: u32, body: impl FnOnce(&mut Vec<u8>)) {
        let at = self.bytes.len();
        self.bytes.extend_from_slice(&[0; HEADER_LEN]);
        body(&mut self.bytes);
        let len = (self.bytes.len() - at - HEADER_LEN) as u32;
        let header = Header { op, len, ..*h };
        self.bytes[at..at + HEADER_LEN].copy_from_slice(&header.to_bytes());
    }
}

impl Store {
    /// Serves the request that `bytes` begin with, if it may go the short way; how many bytes it has.
    pub fn input_directly(&mut self, id: ConnId, bytes: &[u8], host: &mut dyn Host) -> Option<usize> {
        let c = self.connection(id)?;
        let plain = c.peer == Peer::Socket && !c.ignored && c.frozen.is_none() && !c.decoder.is_partial();
        if !plain || !c.delayed.is_empty() || !c.out.is_empty() {
            return None;
        }
        let (h, rest) = bytes.split_first_chunk::<HEADER_LEN>()?;
        let h = Header::from_bytes(h);
        let body = rest.get(..h.len as usize).filter(|b| b.len() <= PAYLOAD_MAX)?;
        if self.live_update_delays(id, h.op) {
            return None;
        }
        self.direct.to = Some(id);
        if self.answer_now(&h, body) || self.write_now(id, &h, body, host) {
            debug!(conn = id, op = Op::from_wire(h.op).map_or("?", Op::name), len = body.len(), ok = true, "request");
        } else {
            self.process(id, &h, body, host);
        }
        self.direct.to = None;
        Some(HEADER_LEN + body.len())
    }

    /// Answers a look at a node that is there. Tools may look at all of them.
    fn answer_now(&mut self, h: &Header, body: &[u8]) -> bool {
        let (Some(op @ (Op::Read | Op::Directory)), 0) = (Op::from_wire(h.op), h.tx_id) else { return false };
        let Ok(path) = payload::one_arg(body) else { return false };
        if path.first() != Some(&b'/') || !self.is_valid(path) {
            return false;
        }
        match (self.tree.get(path), op) {
            (None, _) => false,
            (Some(n), Op::Directory) if n.children.bytes() > PAYLOAD_MAX => false,
            // No request makes such a value, but a stream may bring it.
            (Some(n), _) if n.value.len() > PAYLOAD_MAX => false,
            (Some(n), Op::Directory) => {
                self.direct.put(h, h.op, |b| n.children.put_names(b));
                true
            }
            (Some(n), _) => {
                self.direct.put(h, h.op, |b| b.extend_from_slice(&n.value));
                true
            }
        }
    }

    /// Gives a node that is there another value, where neither a quota nor permissions of domains that may be gone matter.
    fn write_now(&mut self, id: ConnId, h: &Header, body: &[u8], host: &mut dyn Host) -> bool {
        let (Some(Op::Write), 0) = (Op::from_wire(h.op), h.tx_id) else { return false };
        let Ok((path, value)) = payload::split_first(body) else { return false };
        if path.first() != Some(&b'/') || !self.is_valid(path) {
            return false;
        }
        let privileged = self.options.privileged_domid;
        let Some(n) = self.tree.present_mut(path) else { return false };
        let own = n.owner();
        if n.perms.len() > 1 || (own != 0 && own != privileged) {
            return false;
        }
        let grown = value.len() as i64 - n.value.len() as i64;
        self.generation += 1;
        (n.value, n.generation) = (value.into(), self.generation);
        self.redo.node(path, n, false);
        let _ = self.charge(own, grown, false);
        self.fire(None, path, None, false, None, host);
        if !self.reply_directly(id, h, h.op, OK)
            && let Some(c) = self.connection(id).map(|c| self.caller(c))
        {
            self.reply(&c, h, Ok(OK.into()));
        }
        true
    }

    /// Whether a reply goes the short way: nothing was queued for the client meanwhile, an event that its request caused, say.
    pub(crate) fn reply_directly(&mut self, to: ConnId, h: &Header, op: u32, body: &[u8]) -> bool {
        let short = self.direct.to == Some(to) && self.connection(to).is_some_and(|c| c.out.is_empty());
        if short {
            self.direct.put(h, op, |b| b.extend_from_slice(body));
        }
        short
    }

    /// Bytes of replies that are to be sent before anything that is queued.
    pub fn direct_len(&self) -> usize {
        self.direct.bytes.len()
    }

    /// Exchanges them for an empty buffer.
    pub fn take_direct(&mut self, with: &mut Vec<u8>) {
        with.clear();
        std::mem::swap(&mut self.direct.bytes, with);
    }

    /// So much of them was sent; the rest is queued before what is queued already.
    pub fn queue_direct(&mut self, id: ConnId, mut bytes: &[u8], mut sent: usize) {
        let mut rest = Vec::new();
        while let Some((h, b)) = bytes.split_first_chunk::<HEADER_LEN>() {
            let h = Header::from_bytes(h);
            let Some((body, after)) = b.split_at_checked(h.len as usize) else { break };
            let mut m = Outgoing::new(h, body.into());
            m.used = sent.min(m.total());
            sent -= m.used;
            bytes = after;
            if m.left() > 0 {
                rest.push(m);
            }
        }
        let Some(domid) = self.connection(id).map(|c| c.peer.domid()) else { return };
        for m in rest.iter() {
            let _ = self.charge(domid, m.size() as i64, false);
        }
        if let Some(c) = self.conns.get_mut(&id) {
            let queued = std::mem::take(&mut c.out);
            rest.into_iter().for_each(|m| c.push(m));
            c.out.extend(queued);
        }
    }
}
