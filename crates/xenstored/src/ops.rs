//! The operations on nodes, watches and transactions.

use crate::conn::Peer;
use crate::host::Host;
use crate::node::{Name, Node, PermList, Value, owner};
use crate::quota::node_size;
use crate::store::{Answer, Caller, Found, Rights, Store, node_cost, ok};
use crate::tx::{Changed, NO_GENERATION, State, Transaction};
use crate::watch::Watch;
use smallvec::SmallVec;
use std::borrow::Cow;
use std::collections::HashSet;
use std::rc::Rc;
use xenstore_wire::{Errno, Header, Op, PAYLOAD_MAX, Perm, REL_PATH_MAX, path, payload, perm};

type Tx = Option<Box<Transaction>>;
/// Most transactions touch no more nodes.
type Few<T> = SmallVec<[T; 4]>;
/// Path and token of the event that follows a `WATCH`.
type InitialEvent = Option<(Vec<u8>, Rc<[u8]>)>;

impl Store {
    #[allow(clippy::too_many_arguments, reason = "what a request is made of")]
    pub(crate) fn dispatch(
        &mut self,
        c: &Caller,
        tx: &mut Tx,
        op: Op,
        h: &Header,
        p: &[u8],
        initial: &mut InitialEvent,
        host: &mut dyn Host,
    ) -> Answer {
        match op {
            Op::Read => self.op_read(c, tx, p),
            Op::Write => self.op_write(c, tx, p, host),
            Op::Mkdir => self.op_mkdir(c, tx, p, host),
            Op::Rm => self.op_rm(c, tx, p, host),
            Op::Directory => self.op_directory(c, tx, p),
            Op::DirectoryPart => self.op_directory_part(c, tx, p),
            Op::GetPerms => self.op_get_perms(c, tx, p),
            Op::SetPerms => self.op_set_perms(c, tx, p, host),
            Op::Watch => self.op_watch(c, p, initial),
            Op::Unwatch => self.op_unwatch(c, p),
            Op::ResetWatches => {
                self.drop_watches(c.conn);
                self.drop_transactions(c.conn);
                if let Some(t) = tx.take() {
                    let _ = self.charge(c.domid, -(t.charged as i64), false);
                }
                ok()
            }
            Op::TransactionStart => self.op_transaction_start(c, tx, host),
            Op::TransactionEnd => self.op_transaction_end(c, tx, p, host),
            Op::Control => self.op_control(c, h, p, host),
            op => self.dispatch_domain_op(c, op, p, host),
        }
    }

    /// Makes a client's path absolute. Sockets count as domain 0.
    pub(crate) fn absolute<'p>(&self, c: &Caller, p: &'p [u8]) -> Cow<'p, [u8]> {
        match p.first() {
            Some(b'/' | b'@') => p.into(),
            _ => {
                let mut v = implicit_path(c.peer);
                v.push(b'/');
                v.extend_from_slice(p);
                v.into()
            }
        }
    }

    fn node_arg<'p>(
        &mut self,
        c: &Caller,
        tx: &mut Tx,
        p: &'p [u8],
        want: Rights,
    ) -> Result<(Cow<'p, [u8]>, Found), Errno> {
        let path = self.absolute(c, payload::one_arg(p)?);
        let f = self.find_for(c, tx, &path, want)?;
        Ok((path, f))
    }

    /// The short way to what most requests are about: a node that is there and may be read, outside of a transaction.
    fn readable_now(&self, c: &Caller, tx: &Tx, p: &[u8]) -> Result<Option<&Rc<Node>>, Errno> {
        let path = payload::one_arg(p)?;
        if tx.is_some() || path.first() != Some(&b'/') || !self.is_valid(path) {
            return Ok(None);
        }
        Ok(self.tree.get(path).filter(|n| self.rights(c, &n.perms, n.generation).covers(Rights::READ)))
    }

    fn op_read(&mut self, c: &Caller, tx: &mut Tx, p: &[u8]) -> Answer {
        if let Some(n) = self.readable_now(c, tx, p)? {
            return Ok(Some((*n.value).into()));
        }
        let (path, _) = self.node_arg(c, tx, p, Rights::READ)?;
        Ok(Some(match tx {
            Some(t) => t.nodes.get(&path[..]).map_or(&[][..], |a| a.value()).into(),
            None => self.tree.get(&path).map_or(&[][..], |n| &n.value).into(),
        }))
    }

    /// Names of the children joined with NULs, and the node's generation.
    fn children(&self, tx: &Tx, path: &[u8], max: usize) -> Result<(Rc<[u8]>, u64), Errno> {
        match tx {
            Some(t) => match t.nodes.get(path) {
                Some(a) if a.children_bytes() > max => Err(Errno::E2BIG),
                Some(a) => Ok((payload::join(a.children()).into(), a.stamp())),
                None => Err(Errno::EIO),
            },
            None => match self.tree.get(path) {
                Some(n) if n.children.bytes() > max => Err(Errno::E2BIG),
                Some(n) => Ok((n.children.names(), self.shown_generation(path, n))),
                None => Err(Errno::EIO),
            },
        }
    }

    fn op_directory(&mut self, c: &Caller, tx: &mut Tx, p: &[u8]) -> Answer {
        if let Some(n) = self.readable_now(c, tx, p)?
            && n.children.bytes() <= PAYLOAD_MAX
        {
            return Ok(Some(n.children.names()));
        }
        let (path, _) = self.node_arg(c, tx, p, Rights::READ)?;
        Ok(Some(self.children(tx, &path, PAYLOAD_MAX)?.0))
    }

    fn op_directory_part(&mut self, c: &Caller, tx: &mut Tx, p: &[u8]) -> Answer {
        if p.iter().filter(|&&b| b == 0).count() != 2 {
            return Err(Errno::EINVAL);
        }
        let (first, rest) = payload::split_first(p)?;
        let path = self.absolute(c, first);
        self.find_for(c, tx, &path, Rights::READ)?;
        let offset = payload::atoi(rest).unwrap_or(i64::MAX);
        let (names, generation) = self.children(tx, &path, usize::MAX)?;
        let mut out = generation.to_string().into_bytes();
        out.push(0);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        if offset >= names.len() {
            out.push(0);
            return Ok(Some(out.into()));
        }
        // Whole names only; an empty one ends the list.
        let room = PAYLOAD_MAX - out.len() - 1;
        let mut len = 0;
        let mut rest = &names[offset..];
        while let Ok((name, r)) = payload::split_first(rest) {
            if len + name.len() >= room {
                break;
            }
            len += name.len() + 1;
            rest = r;
        }
        out.extend_from_slice(&names[offset..offset + len]);
        if offset + len == names.len() {
            out.push(0);
        }
        Ok(Some(out.into()))
    }

    fn op_get_perms(&mut self, c: &Caller, tx: &mut Tx, p: &[u8]) -> Answer {
        let (_, f) = self.node_arg(c, tx, p, Rights::READ)?;
        Ok(Some(perm::format_list(&f.perms).into()))
    }

    fn op_write(&mut self, c: &Caller, tx: &mut Tx, p: &[u8], host: &mut dyn Host) -> Answer {
        let (first, value) = payload::split_first(p)?;
        let path = self.absolute(c, first);
        match self.find_for(c, tx, &path, Rights::WRITE) {
            Ok(f) => {
                self.store_node(c, tx, &path, &f, Some(value), None, host)?;
                self.changed(c, tx, &path, Some(&f), None, host);
            }
            Err(Errno::ENOENT) => {
                self.create(c, tx, &path, value, host)?;
                self.changed(c, tx, &path, None, None, host);
            }
            Err(e) => return Err(e),
        }
        ok()
    }

    fn op_mkdir(&mut self, c: &Caller, tx: &mut Tx, p: &[u8], host: &mut dyn Host) -> Answer {
        let path = self.absolute(c, payload::one_arg(p)?);
        match self.find_for(c, tx, &path, Rights::WRITE) {
            Ok(_) => {}
            Err(Errno::ENOENT) => {
                self.create(c, tx, &path, &[], host)?;
                self.changed(c, tx, &path, None, None, host);
            }
            Err(e) => return Err(e),
        }
        ok()
    }

    /// Watches for a change, now or at the commit.
    fn changed(
        &mut self,
        c: &Caller,
        tx: &mut Tx,
        path: &[u8],
        node: Option<&Found>,
        old: Option<&[Perm]>,
        host: &mut dyn Host,
    ) {
        match tx {
            Some(t) => mark_fire(t, path, false),
            None => self.fire(Some(c), path, node.map(|n| (n, None)), false, old, host),
        }
    }

    /// A change outside of a transaction costs write rate while there are transactions that it could make fail.
    fn debit_direct(&mut self, c: &Caller, host: &mut dyn Host) {
        if self.open_transactions > 0 {
            self.debit(c, host);
        }
    }

    fn debit(&mut self, c: &Caller, host: &mut dyn Host) {
        if c.privileged || !matches!(c.peer, Peer::Domain(_)) {
            return;
        }
        if let Some(d) = self.domains.get_mut(&c.domid) {
            self.limiter.debit(&mut d.credit, host.now_ms());
        }
    }

    /// Changes value or permissions of an existing node, `f`.
    #[allow(clippy::too_many_arguments, reason = "what a change is made of")]
    fn store_node(
        &mut self,
        c: &Caller,
        tx: &mut Tx,
        path: &[u8],
        f: &Found,
        value: Option<&[u8]>,
        perms: Option<PermList>,
        host: &mut dyn Host,
    ) -> Result<(), Errno> {
        self.generation += 1;
        let now = self.generation;
        match tx {
            None => {
                self.debit_direct(c, host);
                let perms = self.settled(perms.as_ref().unwrap_or(&f.perms), f.stamp.max(perms_stamp(&perms, now)));
                let value_len = value.map_or(f.value, <[u8]>::len);
                let size = node_size(perms.len(), value_len, f.children);
                if !c.privileged && size >= self.quotas(c.domid).node_size as usize {
                    return Err(Errno::ENOSPC);
                }
                let old_size = node_size(f.perms.len(), f.value, f.children);
                let (old_owner, old_cost) = (owner(&f.perms), (path.len() + old_size) as i64);
                let (new_owner, new_cost) = (owner(&perms), (path.len() + size) as i64);
                self.move_charge(old_owner, old_cost, new_owner, new_cost)?;
                if old_owner != new_owner {
                    self.count_node(old_owner, -1);
                    self.count_node(new_owner, 1);
                }
                let n = self.tree.present_mut(path).ok_or(Errno::EIO)?;
                if let Some(v) = value {
                    n.value = v.into();
                }
                n.perms = perms;
                n.generation = now;
                if value.is_some() {
                    self.redo.node(path, n, false);
                } else {
                    self.redo.meta(path, n);
                }
            }
            Some(t) => {
                let a = self.join(c, t, path)?;
                let old = a.perms().cloned().ok_or(Errno::EIO)?;
                let stamp = a.stamp();
                let new = self.settled(perms.as_ref().unwrap_or(&old), stamp.max(perms_stamp(&perms, now)));
                let a = t.nodes.get_mut(path).ok_or(Errno::EIO)?;
                let change = a.change().ok_or(Errno::EIO)?;
                if let Some(v) = value {
                    change.value = v.into();
                }
                change.perms = new;
                change.stamp = now;
                self.charge_tx_node(c, t, path)?;
            }
        }
        Ok(())
    }

    fn move_charge(&mut self, from: u16, old: i64, to: u16, new: i64) -> Result<(), Errno> {
        // The owner may be gone; then nothing is accounted.
        let _ = self.charge(from, -old, false);
        match self.charge(to, new, true) {
            Err(Errno::ENOMEM) => {
                let _ = self.charge(from, old, false);
                Err(Errno::EIO)
            }
            _ => Ok(()),
        }
    }

    /// Checks and accounts a node that a transaction changed. On an error the transaction is lost, as its state is.
    fn charge_tx_node(&mut self, c: &Caller, t: &mut Transaction, path: &[u8]) -> Result<(), Errno> {
        let Some(a) = t.nodes.get_mut(path) else { return Err(Errno::EIO) };
        let perms = a.perms().map_or(0, |p| p.len());
        let size = node_size(perms, a.value().len(), a.children_bytes());
        let r = if !c.privileged && a.exists() && size >= self.quotas(c.domid).node_size as usize {
            Err(Errno::ENOSPC)
        } else {
            let new = a.cost(path);
            let r = self.charge(c.domid, new as i64 - a.charged as i64, true).map_err(|_| Errno::EIO);
            if r.is_ok() {
                t.charged = t.charged + new - a.charged;
                a.charged = new;
            }
            r
        };
        if r.is_err() {
            t.fail = true;
        }
        r
    }

    /// Makes a node and its missing parents, which inherit the permissions of the nearest existing one.
    fn create(&mut self, c: &Caller, tx: &mut Tx, path: &[u8], value: &[u8], host: &mut dyn Host) -> Result<(), Errno> {
        // Nodes to be made, the deepest first.
        let mut missing = vec![path];
        let (mut at, parent) = (path, &mut None);
        while parent.is_none() {
            at = path::parent(at);
            *parent = self.find(c, tx, at)?;
            if parent.is_none() {
                if at == b"/" {
                    return Err(Errno::ENOENT);
                }
                missing.push(at);
            }
        }
        let top = at;
        let Some(parent) = parent.take() else { return Err(Errno::EIO) };
        let perms = self.settled(&parent.perms, parent.stamp);
        let perms: PermList = if c.privileged { perms } else { self.owned_by(perms, c.domid) };
        if let Some(t) = tx {
            t.created = true;
        }
        if !c.privileged {
            let have = self.domains.get(&c.domid).map_or(0, |d| d.nodes);
            // In a transaction the count changes at the commit.
            let more = if tx.is_some() { 0 } else { missing.len() as i64 - 1 };
            if have + more >= i64::from(self.quotas(c.domid).nodes) {
                return Err(Errno::ENOSPC);
            }
        }
        let limit = if c.privileged { usize::MAX } else { self.quotas(c.domid).node_size as usize };
        let leaf = |p: &[u8]| path::leaf(p).len() + 1;
        for (i, p) in missing.iter().enumerate() {
            let (v, child) = if i == 0 { (value.len(), 0) } else { (0, leaf(missing[i - 1])) };
            if node_size(perms.len(), v, child) >= limit {
                if let Some(t) = tx {
                    t.fail = true;
                }
                return Err(Errno::ENOSPC);
            }
            debug_assert!(!p.is_empty());
        }
        match tx {
            None => {
                self.debit_direct(c, host);
                self.create_now(&missing, top, perms, value, limit)
            }
            Some(t) => {
                // Parents first, each with its new child.
                for (i, p) in missing.iter().enumerate().rev() {
                    self.generation += 1;
                    let now = self.generation;
                    let a = self.join(c, t, p)?;
                    let added = i.checked_sub(1).and_then(|j| missing.get(j)).map(|q| Name::from(path::leaf(q)));
                    a.state = State::Present(Box::new(Changed {
                        value: if i == 0 { value.into() } else { Value::default() },
                        perms: perms.clone(),
                        stamp: now,
                        fresh: true,
                        added: added.into_iter().collect(),
                        removed: HashSet::new(),
                    }));
                    self.charge_tx_node(c, t, p)?;
                }
                self.generation += 1;
                let now = self.generation;
                let child = Name::from(path::leaf(missing.last().copied().unwrap_or(path)));
                let a = self.join(c, t, top)?;
                let change = a.change().ok_or(Errno::EIO)?;
                change.stamp = now;
                change.add_child(child);
                self.charge_tx_node(c, t, top)
            }
        }
    }

    fn create_now(
        &mut self,
        missing: &[&[u8]],
        top: &[u8],
        perms: PermList,
        value: &[u8],
        limit: usize,
    ) -> Result<(), Errno> {
        let deepest = missing.first().copied().unwrap_or(top);
        let child = path::leaf(missing.last().copied().unwrap_or(top));
        let parent = self.tree.get(top).ok_or(Errno::EIO)?;
        let parent_size = node_size(parent.perms.len(), parent.value.len(), parent.children.bytes() + child.len() + 1);
        if parent_size >= limit {
            return Err(Errno::ENOSPC);
        }
        let (parent_owner, grown) = (parent.owner(), child.len() as i64 + 1);
        let own = owner(&perms);
        let mut cost = 0;
        let mut node: Option<(&[u8], Rc<Node>)> = None;
        for p in missing {
            self.generation += 1;
            let mut n = Node::new(self.generation, perms.clone());
            if p.len() == deepest.len() {
                n.value = value.into();
            }
            if let Some((name, child)) = node.take() {
                n.children.insert(name, child);
            }
            cost += node_cost(p, &n) as i64;
            node = Some((path::leaf(p), Rc::new(n)));
        }
        if self.charge(own, cost, true).is_err() {
            return Err(Errno::EIO);
        }
        if self.charge(parent_owner, grown, true) == Err(Errno::ENOMEM) {
            let _ = self.charge(own, -cost, false);
            return Err(Errno::EIO);
        }
        self.count_node(own, missing.len() as i64);
        self.generation += 1;
        let now = self.generation;
        let parent = self.tree.get(top).ok_or(Errno::EIO)?;
        let settled = self.settled(&parent.perms, parent.generation);
        let parent = self.tree.get_mut(top).ok_or(Errno::EIO)?;
        if let Some((name, n)) = node {
            parent.children.insert(name, n);
        }
        parent.perms = settled;
        parent.generation = now;
        self.redo.meta(top, parent);
        if self.redo.is_on() {
            for p in missing.iter().rev() {
                if let Some(n) = self.tree.get(p) {
                    self.redo.node(p, n, false);
                }
            }
        }
        Ok(())
    }

    fn op_rm(&mut self, c: &Caller, tx: &mut Tx, p: &[u8], host: &mut dyn Host) -> Answer {
        let path = self.absolute(c, payload::one_arg(p)?);
        match self.find_for(c, tx, &path, Rights::WRITE) {
            Ok(_) => {}
            Err(Errno::ENOENT) => {
                // Fine if the parent is there.
                return if self.find(c, tx, path::parent(&path))?.is_some() { ok() } else { Err(Errno::ENOENT) };
            }
            Err(e) => return Err(e),
        }
        if *path == *b"/" {
            return Err(Errno::EINVAL);
        }
        match tx {
            None => {
                self.debit_direct(c, host);
                self.remove_now(Some(c), &path, host);
            }
            Some(_) => self.remove_in(c, tx, &path)?,
        }
        ok()
    }

    /// Removes a node and all below, children before parents.
    pub(crate) fn remove_now(&mut self, c: Option<&Caller>, path: &[u8], host: &mut dyn Host) {
        self.remove_node(c, path, true, host);
    }

    /// The same, with or without events.
    pub(crate) fn remove_node(&mut self, c: Option<&Caller>, path: &[u8], tell: bool, host: &mut dyn Host) {
        let parent_path = path::parent(path);
        let Some(parent) = self.tree.get(parent_path) else { return };
        let parent_perms = self.settled(&parent.perms, parent.generation);
        let found = Found::from(parent);
        let mut gone: Vec<(Vec<u8>, Found, Found)> = Vec::new();
        if let Some(n) = self.tree.get(path) {
            list_below(&mut path.to_vec(), n, &found, &mut gone);
        }
        let mut costs: Vec<(u16, i64)> = Vec::with_capacity(gone.len());
        for (p, f, _) in &gone {
            if let Some(n) = self.tree.get(p) {
                costs.push((owner(&f.perms), node_cost(p, n) as i64));
            }
        }
        self.generation += 1;
        let now = self.generation;
        let leaf = path::leaf(path);
        let Some(parent) = self.tree.get_mut(parent_path) else { return };
        parent.children.remove(leaf);
        parent.perms = parent_perms;
        parent.generation = now;
        self.redo.remove(path);
        self.redo.meta(parent_path, parent);
        let parent_owner = parent.owner();
        let _ = self.charge(parent_owner, -(leaf.len() as i64 + 1), false);
        for (own, cost) in costs {
            let _ = self.charge(own, -cost, false);
            self.count_node(own, -1);
        }
        for (p, f, parent) in gone.iter().filter(|_| tell) {
            self.fire(c, p, Some((f, Some(parent))), p.len() != path.len(), None, host);
        }
    }

    fn remove_in(&mut self, c: &Caller, tx: &mut Tx, path: &[u8]) -> Result<(), Errno> {
        if self.find(c, tx, path::parent(path))?.is_none() {
            // Others made it and the node since the transaction saw that it was not there; the commit will fail.
            return Err(Errno::EINVAL);
        }
        // Read parents first, remove children first.
        let mut todo = vec![path.to_vec()];
        let mut order = Vec::new();
        while let Some(p) = todo.pop() {
            if self.find(c, tx, &p)?.is_none() {
                // Somebody removed it since its parent joined the transaction, which has lost by that.
                return Err(Errno::EIO);
            }
            if let Some(a) = tx.as_ref().and_then(|t| t.nodes.get(&p[..])) {
                todo.extend(a.children().iter().rev().map(|n| path::join(&p, n)));
            }
            order.push(p);
        }
        let Some(t) = tx else { return Err(Errno::EIO) };
        for p in order.iter().rev() {
            self.generation += 1;
            let a = self.join(c, t, p)?;
            a.state = State::Deleted;
            self.charge_tx_node(c, t, p)?;
            mark_fire(t, p, p.len() != path.len());
        }
        self.generation += 1;
        let now = self.generation;
        let parent = path::parent(path);
        let a = self.join(c, t, parent)?;
        let change = a.change().ok_or(Errno::EIO)?;
        change.stamp = now;
        change.remove_child(path::leaf(path));
        self.charge_tx_node(c, t, parent)
    }

    fn op_set_perms(&mut self, c: &Caller, tx: &mut Tx, p: &[u8], host: &mut dyn Host) -> Answer {
        let n = p.iter().filter(|&&b| b == 0).count();
        if n < 2 {
            return Err(Errno::EINVAL);
        }
        if !c.privileged && n - 1 > self.quotas(c.domid).permissions as usize {
            return Err(Errno::ENOSPC);
        }
        let (first, rest) = payload::split_first(p)?;
        let mut perms = perm::parse_list(rest)?;
        for p in &mut perms {
            p.stale = !self.know_domain(p.domid, host);
        }
        if perms.first().is_some_and(|p| p.stale) {
            return Err(Errno::ENOENT);
        }
        let perms: PermList = perms.into();
        if first.first() == Some(&b'@') {
            let current = match first {
                b"@releaseDomain" => self.release_perms.clone(),
                b"@introduceDomain" => self.introduce_perms.clone(),
                _ => return Err(Errno::EINVAL),
            };
            let r = self.rights(c, &current, u64::MAX);
            if !(r.write && r.owner) {
                return Err(Errno::EACCES);
            }
            let release = first == b"@releaseDomain";
            self.redo.special(release, &perms);
            if release {
                self.release_perms = perms;
            } else {
                self.introduce_perms = perms;
            }
            return ok();
        }
        let path = self.absolute(c, first);
        let f = self.find_for(c, tx, &path, Rights::OWN)?;
        if !c.privileged && owner(&perms) != owner(&f.perms) {
            return Err(Errno::EPERM);
        }
        self.store_node(c, tx, &path, &f, None, Some(perms.clone()), host)?;
        let new = Found { perms, stamp: self.generation, ..f.clone() };
        self.changed(c, tx, &path, Some(&new), Some(&f.perms), host);
        ok()
    }

    // ---- watches ----

    /// Absolute path of a watch and how much of it the client is not shown.
    pub(crate) fn watch_path(&self, c: &Caller, p: &[u8]) -> Result<(Vec<u8>, usize), Errno> {
        if p.first() == Some(&b'@') {
            return if p.len() > REL_PATH_MAX { Err(Errno::EINVAL) } else { Ok((p.to_vec(), 0)) };
        }
        let abs = self.absolute(c, p);
        if !path::is_valid(&abs, self.options.quotas.path_max as usize) {
            return Err(Errno::EINVAL);
        }
        let strip = if p.first() == Some(&b'/') { 0 } else { implicit_path(c.peer).len() };
        Ok((abs.into_owned(), strip))
    }

    fn op_watch(&mut self, c: &Caller, p: &[u8], initial: &mut InitialEvent) -> Answer {
        let mut s = payload::strings(p);
        let (Some(wpath), Some(token)) = (s.next(), s.next()) else { return Err(Errno::EINVAL) };
        let depth = match s.next() {
            Some(d) => Some(payload::decimal::<u16>(d)?),
            None => None,
        };
        if s.next().is_some() {
            return Err(Errno::EINVAL);
        }
        let id = self.add_watch(c, wpath, token, depth, true)?;
        if let Some(w) = self.watches.get(id) {
            *initial = Some((w.shown(&w.path).to_vec(), w.token.clone()));
        }
        ok()
    }

    /// Registers a watch for a connection.
    pub(crate) fn add_watch(
        &mut self,
        c: &Caller,
        wpath: &[u8],
        token: &[u8],
        depth: Option<u16>,
        check: bool,
    ) -> Result<u64, Errno> {
        let (abs, strip) = self.watch_path(c, wpath)?;
        if self.watches.find(c.conn, &abs, token).is_some() {
            return Err(Errno::EEXIST);
        }
        let is_domain = matches!(c.peer, Peer::Domain(_));
        if check && is_domain && !c.privileged {
            let have = self.domains.get(&c.domid).map_or(0, |d| d.watches);
            if have > self.quotas(c.domid).watches {
                return Err(Errno::E2BIG);
            }
        }
        let w = Watch { conn: c.conn, path: abs.into(), strip, token: Rc::from(token), depth };
        self.charge(c.domid, w.size() as i64, check).map_err(|_| Errno::ENOMEM)?;
        if is_domain {
            self.redo.watch(c.domid, wpath, token, depth);
        }
        if is_domain && let Some(d) = self.domains.get_mut(&c.domid) {
            d.watches += 1;
        }
        let id = self.watches.add(w);
        if let Some(conn) = self.conns.get_mut(&c.conn) {
            conn.watches.insert(id);
        }
        Ok(id)
    }

    fn op_unwatch(&mut self, c: &Caller, p: &[u8]) -> Answer {
        let mut s = payload::strings(p);
        let (Some(wpath), Some(token)) = (s.next(), s.next()) else { return Err(Errno::EINVAL) };
        if s.next().is_some() {
            return Err(Errno::EINVAL);
        }
        let path = self.absolute(c, wpath);
        let id = self.watches.find(c.conn, &path, token).ok_or(Errno::ENOENT)?;
        if let Some(w) = self.watches.remove(id) {
            let _ = self.charge(c.domid, -(w.size() as i64), false);
        }
        if let Some(conn) = self.conns.get_mut(&c.conn) {
            conn.watches.remove(&id);
        }
        if matches!(c.peer, Peer::Domain(_))
            && let Some(d) = self.domains.get_mut(&c.domid)
        {
            d.watches = d.watches.saturating_sub(1);
            self.redo.unwatch(c.domid, &path, token);
        }
        ok()
    }

    // ---- transactions ----

    fn op_transaction_start(&mut self, c: &Caller, tx: &Tx, host: &mut dyn Host) -> Answer {
        if tx.is_some() {
            return Err(Errno::EBUSY);
        }
        let limit = self.quotas(c.domid).transactions as usize;
        let Some(conn) = self.conns.get_mut(&c.conn) else { return Err(Errno::EIO) };
        if !c.privileged && conn.transactions.len() > limit {
            return Err(Errno::ENOSPC);
        }
        while conn.next_tx == 0 || conn.transactions.contains(conn.next_tx) {
            conn.next_tx = conn.next_tx.wrapping_add(1);
        }
        let id = conn.next_tx;
        conn.next_tx = conn.next_tx.wrapping_add(1);
        self.generation += 1;
        let mut t = self.spare_transaction.take().unwrap_or_default();
        (t.id, t.generation, t.started_ms) = (id, self.generation, host.now_ms());
        if let Peer::Domain(d) = conn.peer {
            self.redo.tx_open(d, id, t.generation, false, false);
            t.logged = Some((false, false));
        }
        conn.transactions.insert(t);
        self.open_transactions += 1;
        let mut text: SmallVec<[u8; 16]> = itoa::Buffer::new().format(id).as_bytes().into();
        text.push(0);
        Ok(Some(text[..].into()))
    }

    fn op_transaction_end(&mut self, c: &Caller, tx: &mut Tx, p: &[u8], host: &mut dyn Host) -> Answer {
        let commit = match payload::one_arg(p)? {
            b"T" => true,
            b"F" => false,
            _ => return Err(Errno::EINVAL),
        };
        let Some(mut t) = tx.take() else { return Err(Errno::ENOENT) };
        let _ = self.charge(c.domid, -(t.charged as i64), false);
        let done = match commit {
            true if t.fail => Err(Errno::ENOMEM),
            true => self.commit(c, &mut t, host),
            false => Ok(()),
        };
        if t.clear() {
            self.spare_transaction = Some(t);
        }
        done.and_then(|()| ok())
    }

    fn commit(&mut self, c: &Caller, t: &mut Transaction, host: &mut dyn Host) -> Result<(), Errno> {
        // Node counts of the owners.
        let mut counts: Few<(u16, i64)> = Few::new();
        let mut add = |d: u16, n: i64| match counts.iter_mut().find(|(o, _)| *o == d) {
            Some((_, k)) => *k += n,
            None => counts.push((d, n)),
        };
        for a in t.nodes.values().filter(|a| !matches!(a.state, State::Unchanged)) {
            if let Some(b) = &a.base {
                add(b.owner(), -1);
            }
            if let Some(p) = a.perms() {
                add(owner(p), 1);
            }
        }
        for &(d, n) in &counts {
            if !self.know_domain(d, host) && n > 0 {
                return Err(Errno::ENOMEM);
            }
            let have = self.domains.get(&d).map_or(0, |d| d.nodes);
            if t.created && !c.privileged && !self.domid_privileged(d) && have + n >= i64::from(self.quotas(d).nodes) {
                return Err(Errno::ENOSPC);
            }
        }
        // Memory of what is changed, before and after.
        let mut costs: Few<(u16, i64)> = Few::new();
        for (p, a) in &t.nodes {
            let n = self.tree.get(p);
            if n.map_or(NO_GENERATION, |n| n.generation) != a.generation {
                return Err(Errno::EAGAIN);
            }
            if let Some(n) = n.filter(|_| !matches!(a.state, State::Unchanged)) {
                costs.push((n.owner(), -(node_cost(p, n) as i64)));
            }
        }
        for (d, n) in counts {
            self.count_node(d, n);
        }
        if self.open_transactions > 1 {
            self.debit(c, host);
        }
        // The overlay's references go first, so that nothing needs to be cloned.
        let mut changes: Few<(Rc<[u8]>, State)> = Few::new();
        let mut fires: Few<Fire> = Few::new();
        for (p, a) in t.nodes.drain(..) {
            let old = a.base.as_ref().map(|b| b.perms.clone());
            if let Some(exact) = a.fire {
                fires.push(Fire { path: p.clone(), exact, old });
            }
            if !matches!(a.state, State::Unchanged) {
                changes.push((p, a.state));
            }
        }
        // Parents before children: a node's place is made by its parent.
        changes.sort_by_key(|(p, _)| if &**p == b"/" { 0 } else { p.iter().filter(|&&b| b == b'/').count() });
        for (p, state) in &mut changes {
            let State::Present(change) = state else { continue };
            self.generation += 1;
            let now = self.generation;
            let perms = self.settled(&change.perms, change.stamp);
            let Some(n) = self.tree.present_mut(p) else { continue };
            n.value = std::mem::take(&mut change.value);
            n.perms = perms.clone();
            n.generation = now;
            for r in &change.removed {
                n.children.remove(r);
            }
            for a in &change.added {
                n.children.insert(a, Rc::new(Node::new(now, perms.clone())));
            }
            // What its own children get and lose is up to their own changes.
            costs.push((n.owner(), node_cost(p, n) as i64));
            self.redo.node(p, n, false);
            if self.redo.is_on() {
                for r in change.removed.iter() {
                    self.redo.remove(&path::join(p, r));
                }
                for a in &change.added {
                    if let Some(n) = n.children.get(a) {
                        self.redo.node(&path::join(p, a), n, false);
                    }
                }
            }
        }
        // One whose parent was not told, by a stream that contradicts itself, is still there.
        for (p, _) in changes.iter().filter(|(_, s)| matches!(s, State::Deleted)) {
            if let Some(n) = self.tree.get(p) {
                costs.push((n.owner(), node_cost(p, n) as i64));
            }
        }
        for (own, cost) in costs {
            let _ = self.charge(own, cost, false);
        }
        for f in fires {
            self.fire(Some(c), &f.path, None, f.exact, f.old.as_deref(), host);
        }
        Ok(())
    }
}

/// Watches to be fired once a commit is done.
struct Fire {
    path: Rc<[u8]>,
    exact: bool,
    /// Permissions before the transaction.
    old: Option<PermList>,
}

/// New permissions are for the domains of now; kept ones are as old as their node.
fn perms_stamp(new: &Option<PermList>, now: u64) -> u64 {
    if new.is_some() { now } else { 0 }
}

fn mark_fire(t: &mut Transaction, path: &[u8], exact: bool) {
    match t.nodes.get_mut(path) {
        Some(a) => a.fire = Some(exact && a.fire.unwrap_or(true)),
        None => t.fail = true,
    }
}

/// A node and all below with their permissions and their parents', children before parents.
fn list_below(path: &mut Vec<u8>, node: &Rc<Node>, parent: &Found, out: &mut Vec<(Vec<u8>, Found, Found)>) {
    let f = Found::from(node);
    let len = path.len();
    for (name, child) in node.children.iter() {
        path.push(b'/');
        path.extend_from_slice(name);
        list_below(path, child, &f, out);
        path.truncate(len);
    }
    out.push((path.clone(), f, parent.clone()));
}

/// What relative paths of a connection are relative to.
pub(crate) fn implicit_path(peer: Peer) -> Vec<u8> {
    format!("/local/domain/{}", peer.domid()).into_bytes()
}
