//! The operations on domains: connect, disconnect, their quotas and features; and the end of a domain.

use crate::conn::Peer;
use crate::host::Host;
use crate::node::{Node, owner};
use crate::store::{Answer, Caller, Domain, Store, ok};
use std::rc::Rc;
use tracing::{info, warn};
use xenstore_wire::{DOMID_FIRST_RESERVED, DOMID_SELF, Errno, Op, Perm, payload};

/// A domid as the C daemon reads one, but checked for its range.
pub(crate) fn domid_arg(s: &[u8]) -> Result<u16, Errno> {
    u16::try_from(payload::atoi(s).unwrap_or(-1)).map_err(|_| Errno::EINVAL)
}

impl Store {
    pub(crate) fn dispatch_domain_op(&mut self, c: &Caller, op: Op, p: &[u8], host: &mut dyn Host) -> Answer {
        match op {
            Op::Introduce => self.op_introduce(p, host),
            Op::Release => {
                let (_, conn) = self.connected_arg(p)?;
                self.close(conn, host);
                ok()
            }
            Op::Resume => {
                let (d, _) = self.connected_arg(p)?;
                if let Some(known) = self.domains.get_mut(&d) {
                    known.shutdown = false;
                    self.redo.shutdown(d, false);
                }
                ok()
            }
            Op::SetTarget => self.op_set_target(p),
            Op::GetDomainPath => {
                let d = payload::atoi(payload::one_arg(p)?).unwrap_or(0) as u32;
                Ok(Some(payload::join([format!("/local/domain/{d}")]).into()))
            }
            Op::IsDomainIntroduced => {
                let d = payload::atoi(payload::one_arg(p)?).unwrap_or(-1);
                let known = u16::try_from(d)
                    .is_ok_and(|d| d == DOMID_SELF || self.domains.get(&d).is_some_and(|d| d.conn.is_some()));
                // Without a hypervisor dom0 is its tools.
                let known = known || (d == 0 && c.peer == Peer::Socket && self.domains[&0].conn.is_none());
                Ok(Some(payload::join([if known { "T" } else { "F" }]).into()))
            }
            Op::GetQuota => self.op_get_quota(p),
            Op::SetQuota => self.op_set_quota(p, host),
            Op::GetFeature => self.op_get_feature(p, host),
            // No feature is offered: a guest that comes from or goes to a stock host must see the same everywhere.
            Op::SetFeature => {
                let mut s = payload::strings(p);
                let (Some(d), Some(v)) = (s.next(), s.next()) else { return Err(Errno::EINVAL) };
                domid_arg(d)?;
                if payload::decimal::<u32>(v)? == 0 { ok() } else { Err(Errno::EINVAL) }
            }
            op => self.dispatch_migration_op(c, op, p, host),
        }
    }

    fn connected_arg(&self, p: &[u8]) -> Result<(u16, u32), Errno> {
        let d = domid_arg(payload::one_arg(p)?)?;
        if d == 0 {
            return Err(Errno::EINVAL);
        }
        self.domain_connection(d).map(|c| (d, c)).ok_or(Errno::ENOENT)
    }

    fn op_introduce(&mut self, p: &[u8], host: &mut dyn Host) -> Answer {
        let mut s = payload::strings(p);
        let (Some(d), Some(_gfn), Some(port)) = (s.next(), s.next(), s.next()) else { return Err(Errno::EINVAL) };
        let domid = domid_arg(d)?;
        let port = u32::try_from(payload::atoi(port).unwrap_or(0)).map_err(|_| Errno::EINVAL)?;
        if port == 0 || domid >= DOMID_FIRST_RESERVED {
            return Err(Errno::EINVAL);
        }
        if self.imports.get(&domid).is_some_and(|i| i.is_applied()) {
            // Its watches and transactions would be lost: DOMAIN_ATTACH or DOMAIN_IMPORT_ABORT is what is wanted.
            return Err(Errno::EBUSY);
        }
        match self.domain_connection(domid) {
            None => {
                let local = host.connect(domid, port)?;
                self.introduced(domid, local, port, host.now_ms());
                info!(domid, port, local, "introduced");
                self.fire_special(b"@introduceDomain", &[domid], host.now_ms());
            }
            Some(conn) => {
                if self.conns.get(&conn).is_some_and(|c| c.frozen.is_some()) {
                    return Err(Errno::EBUSY);
                }
                let old = self.domains.get(&domid).map_or(0, |d| d.port);
                let local = host.rebind(domid, old, port).unwrap_or(0);
                if let Some(d) = self.domains.get_mut(&domid) {
                    d.port = local;
                    d.remote_port = port;
                }
                self.redo.port(domid, port);
                info!(domid, port, local, "introduced again: its connection is reset");
                self.forget_client_state(conn);
                if let Some(c) = self.conns.get_mut(&conn) {
                    c.decoder.reset();
                    c.delayed.clear();
                }
                self.input_changed(conn);
            }
        }
        self.redo.ring_reset(domid);
        self.note_ring(domid, 0, 0);
        host.reset_ring(domid);
        ok()
    }

    /// Makes the connection of a domain whose ring is mapped.
    pub(crate) fn introduced(&mut self, domid: u16, local_port: u32, remote_port: u32, now_ms: u64) -> u32 {
        let born = self.generation;
        let conn = self.add_connection(Peer::Domain(domid));
        let credit = self.limiter.join(now_ms);
        let d = self.domains.entry(domid).or_insert_with(|| Domain { born, ..Domain::default() });
        d.conn = Some(conn);
        d.port = local_port;
        d.remote_port = remote_port;
        d.shutdown = false;
        d.credit = credit;
        self.redo.known(domid, d.born);
        self.redo.introduced(domid, remote_port);
        conn
    }

    /// Dom0's own ring, at the daemon's start.
    pub fn introduce_dom0(&mut self, local_port: u32, now_ms: u64) {
        // The kernel says which port is its, whenever it is asked.
        self.introduced(0, local_port, 0, now_ms);
    }

    fn op_set_target(&mut self, p: &[u8]) -> Answer {
        let mut s = payload::strings(p);
        let (Some(d), Some(t)) = (s.next(), s.next()) else { return Err(Errno::EINVAL) };
        let domid = domid_arg(d)?;
        let conn = self.domain_connection(domid).ok_or(Errno::ENOENT)?;
        let target = domid_arg(t)?;
        self.domain_connection(target).ok_or(Errno::ENOENT)?;
        if let Some(c) = self.conns.get_mut(&conn) {
            c.target = Some(target);
            self.redo.target(domid, Some(target));
        }
        ok()
    }

    fn op_get_quota(&mut self, p: &[u8]) -> Answer {
        let args: Vec<&[u8]> = payload::strings(p).filter(|s| !s.is_empty()).collect();
        let value = |v: Option<u32>| v.map(|v| Some(payload::join([v.to_string()]).into())).ok_or(Errno::EINVAL);
        match args[..] {
            [] => {
                let names: Vec<&str> = crate::quota::Quotas::NAMES.iter().map(|n| n.0).collect();
                Ok(Some(payload::join([names.join(" ")]).into()))
            }
            [name] => value(self.options.quotas.get(name)),
            [d, name] => {
                let d = payload::decimal::<u16>(d)?;
                if !self.domains.contains_key(&d) {
                    return Err(Errno::ENOENT);
                }
                value(self.quotas(d).get(name))
            }
            _ => Err(Errno::EINVAL),
        }
    }

    fn op_set_quota(&mut self, p: &[u8], host: &mut dyn Host) -> Answer {
        let args: Vec<&[u8]> = payload::strings(p).collect();
        let (name, value, done) = match args[..] {
            [name, value] => {
                let v = payload::decimal(value)?;
                let done = self.options.quotas.set(name, v);
                self.log_quotas();
                (name, value, done)
            }
            [d, name, value] => {
                let v = payload::decimal(value)?;
                let d = payload::decimal::<u16>(d)?;
                if !self.know_domain(d, host) {
                    return Err(Errno::ENOENT);
                }
                let mut q = self.quotas(d).clone();
                let done = q.set(name, v);
                self.set_domain_quotas(d, q);
                (name, value, done)
            }
            _ => return Err(Errno::EINVAL),
        };
        info!(quota = %String::from_utf8_lossy(name), value = %String::from_utf8_lossy(value), done, "set quota");
        if done { ok() } else { Err(Errno::EINVAL) }
    }

    fn op_get_feature(&mut self, p: &[u8], host: &mut dyn Host) -> Answer {
        let args: Vec<&[u8]> = payload::strings(p).filter(|s| !s.is_empty()).collect();
        let v = match args[..] {
            [] => 0,
            [d] => host.ring_features(payload::decimal(d)?).ok_or(Errno::ENOENT)?,
            _ => return Err(Errno::EINVAL),
        };
        Ok(Some(payload::join([v.to_string()]).into()))
    }

    /// Looks for domains that shut down or are gone (`VIRQ_DOM_EXC`, and after a live update).
    pub fn check_domains(&mut self, host: &mut dyn Host) {
        let ids: Vec<u16> = self.domains.keys().copied().collect();
        let mut notify = Vec::new();
        for domid in ids {
            let state = host.domain_state(domid);
            let Some(d) = self.domains.get_mut(&domid) else { continue };
            match (d.conn, state.filter(|s| !s.dying)) {
                (_, None) if domid == 0 => {}
                (None, _) => {
                    // Known from permissions, or imported; a dying one may still be named by them.
                    if state.is_none() {
                        self.undo_import(domid, host);
                        self.domain_gone(domid, host);
                        self.domains.remove(&domid);
                        self.redo.forgotten(domid);
                    }
                }
                (Some(_), Some(s)) => {
                    let news = s.shutdown && !d.shutdown;
                    d.shutdown |= s.shutdown;
                    if news {
                        self.redo.shutdown(domid, true);
                    }
                    notify.extend(news.then_some(domid));
                }
                (Some(conn), None) => {
                    info!(domid, "domain is gone");
                    self.close(conn, host);
                }
            }
        }
        if !notify.is_empty() {
            self.fire_special(b"@releaseDomain", &notify, host.now_ms());
        }
    }

    /// The connection of a domain is closed already.
    pub(crate) fn destroy_domain(&mut self, domid: u16, host: &mut dyn Host) {
        self.domain_gone(domid, host);
        if self.imports.remove(&domid).is_some() {
            self.redo.import_gone(domid);
        }
        self.redo.gone(domid);
        // Events of its requests may wait on other connections. They are not to count for the next domain of its id.
        self.requests.retain(|_, r| r.domid != domid);
        let Some(d) = self.domains.remove(&domid) else { return };
        self.limiter.leave(d.credit);
        host.disconnect(domid, d.port);
        if domid == 0 {
            self.domains.insert(0, Domain { nodes: d.nodes, memory: d.memory, ..Domain::default() });
        }
        self.fire_special(b"@releaseDomain", &[domid], host.now_ms());
    }

    /// Removes what belongs to a domain: its nodes with all below, its place in the special permissions.
    fn domain_gone(&mut self, domid: u16, host: &mut dyn Host) {
        if domid == 0 {
            return;
        }
        self.domain_gone_from_imports(domid);
        // The root may have been given to the domain. It stays, or everybody's nodes would go with it.
        if self.tree.get(b"/").is_some_and(|root| root.owner() == domid) {
            self.orphan(b"/", domid);
        }
        // Most lie here: then the rest of the tree needs no look.
        let home = format!("/local/domain/{domid}");
        for at in [home.as_bytes(), b"/"] {
            let left = |s: &Store| s.domains.get(&domid).is_some_and(|d| d.nodes > 0);
            if !left(self) {
                break;
            }
            let mut owned = Vec::new();
            if let Some(n) = self.tree.get(at) {
                list_owned(&mut at.to_vec(), n, domid, self.options.keep_orphans, &mut owned);
            }
            for p in owned {
                if self.options.keep_orphans {
                    self.orphan(&p, domid);
                } else {
                    self.remove_now(None, &p, host);
                }
            }
        }
        if let Some(d) = self.domains.get(&domid)
            && d.nodes != 0
        {
            warn!(domid, nodes = d.nodes, "accounting of a dead domain's nodes does not come out even");
        }
        for perms in [&mut self.release_perms, &mut self.introduce_perms] {
            let mut v: Vec<Perm> =
                perms.iter().enumerate().filter(|(i, p)| *i == 0 || p.domid != domid).map(|(_, p)| *p).collect();
            if let Some(p) = v.first_mut().filter(|p| p.domid == domid) {
                p.domid = self.options.privileged_domid;
            }
            *perms = v.into();
        }
        self.redo.special(true, &self.release_perms);
        self.redo.special(false, &self.introduce_perms);
    }

    fn orphan(&mut self, p: &[u8], domid: u16) {
        let to = self.options.privileged_domid;
        self.generation += 1;
        let now = self.generation;
        let Some(n) = self.tree.get(p) else { return };
        let cost = crate::store::node_cost(p, n) as i64;
        let mut perms = self.settled(&n.perms, n.generation).to_vec();
        if let Some(first) = perms.first_mut() {
            first.domid = to;
        }
        let Some(n) = self.tree.get_mut(p) else { return };
        n.perms = perms.into();
        n.generation = now;
        self.redo.meta(p, n);
        self.count_node(domid, -1);
        self.count_node(to, 1);
        let _ = self.charge(domid, -cost, false);
        let _ = self.charge(to, cost, false);
    }
}

/// Nodes of `domid`: all of them, or (they will be removed with all below) only the topmost.
fn list_owned(path: &mut Vec<u8>, n: &Rc<Node>, domid: u16, all: bool, out: &mut Vec<Vec<u8>>) {
    if owner(&n.perms) == domid {
        out.push(path.clone());
        if !all {
            return;
        }
    }
    let len = path.len();
    for (name, child) in n.children.iter() {
        if len > 1 {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        list_owned(path, child, domid, all, out);
        path.truncate(len);
    }
}
