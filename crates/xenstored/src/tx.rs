//! A transaction: an overlay of the nodes that it touched.
//!
//! Opening one is a counter's increment. A node joins at its first access, as it is then; a commit goes through if every
//! joined node still is what it was (the rule of the C daemon, `xenstored_transaction.c`).

use crate::node::{Name, Node, PermList, Value};
use crate::store::tx_cost;
use indexmap::IndexMap;
use std::collections::HashSet;
use std::rc::Rc;

/// Generation of a node that does not exist.
pub const NO_GENERATION: u64 = u64::MAX;

/// What a transaction made of a node.
#[derive(Debug, Clone)]
pub enum State {
    /// Only read.
    Unchanged,
    /// Removed.
    Deleted,
    /// Written or made.
    Present(Box<Changed>),
}

/// A node as a transaction changed it.
#[derive(Debug, Clone)]
pub struct Changed {
    /// New value.
    pub value: Value,
    /// New permissions.
    pub perms: PermList,
    /// The store's count at the last change, see [`Node::generation`].
    pub stamp: u64,
    /// Made in the transaction: children of the base don't count.
    pub fresh: bool,
    /// Children made, in order.
    pub added: Vec<Name>,
    /// Children of the base that are gone.
    pub removed: HashSet<Name>,
}

/// A node that a transaction accessed.
#[derive(Debug, Clone)]
pub struct Accessed {
    /// The node at the first access.
    pub base: Option<Rc<Node>>,
    /// Its generation then, or [`NO_GENERATION`].
    pub generation: u64,
    /// What became of it.
    pub state: State,
    /// Fire watches at the commit; `Some(true)`: only those at the path itself.
    pub fire: Option<bool>,
    /// Memory accounted for it.
    pub charged: usize,
}

impl Accessed {
    /// Whether there is a node as the transaction sees it.
    pub fn exists(&self) -> bool {
        match self.state {
            State::Unchanged => self.base.is_some(),
            State::Deleted => false,
            State::Present(_) => true,
        }
    }

    /// Permissions as the transaction sees them.
    pub fn perms(&self) -> Option<&PermList> {
        match &self.state {
            State::Unchanged => self.base.as_ref().map(|b| &b.perms),
            State::Deleted => None,
            State::Present(c) => Some(&c.perms),
        }
    }

    /// See [`Node::generation`].
    pub fn stamp(&self) -> u64 {
        match (&self.state, &self.base) {
            (State::Present(c), _) => c.stamp,
            (_, Some(b)) => b.generation,
            _ => 0,
        }
    }

    /// Value as the transaction sees it.
    pub fn value(&self) -> &[u8] {
        match (&self.state, &self.base) {
            (State::Present(c), _) => &c.value,
            (State::Unchanged, Some(b)) => &b.value,
            _ => &[],
        }
    }

    /// Names of the children as the transaction sees them.
    pub fn children(&self) -> Vec<Name> {
        let of_base = |removed: Option<&HashSet<Name>>| -> Vec<Name> {
            let Some(b) = &self.base else { return Vec::new() };
            let names = b.children.iter().map(|(n, _)| n);
            names.filter(|n| removed.is_none_or(|r| !r.contains(*n))).map(Name::from).collect()
        };
        match &self.state {
            State::Unchanged => of_base(None),
            State::Deleted => Vec::new(),
            State::Present(c) => {
                let mut v = if c.fresh { Vec::new() } else { of_base(Some(&c.removed)) };
                v.extend(c.added.iter().cloned());
                v
            }
        }
    }

    /// Length of the children's names with a NUL each.
    pub fn children_bytes(&self) -> usize {
        let base = self.base.as_ref().map_or(0, |b| b.children.bytes());
        match &self.state {
            State::Unchanged => base,
            State::Deleted => 0,
            State::Present(c) => {
                let sum = |n: &mut dyn Iterator<Item = &Name>| n.map(|n| n.len() + 1).sum::<usize>();
                let added = sum(&mut c.added.iter());
                if c.fresh { added } else { base.saturating_sub(sum(&mut c.removed.iter())) + added }
            }
        }
    }

    /// What the memory quota counts for it. One that is not there counts too: its path is kept.
    pub fn cost(&self, path: &[u8]) -> usize {
        tx_cost(path, self.perms().map_or(0, |p| p.len()), self.value().len(), self.children_bytes())
    }

    /// Turns it into one that can be changed, and hands that out. It must exist.
    pub fn change(&mut self) -> Option<&mut Changed> {
        if let (State::Unchanged, Some(b)) = (&self.state, &self.base) {
            self.state = State::Present(Box::new(Changed {
                value: b.value.clone(),
                perms: b.perms.clone(),
                stamp: b.generation,
                fresh: false,
                added: Vec::new(),
                removed: HashSet::new(),
            }));
        }
        match &mut self.state {
            State::Present(c) => Some(c),
            _ => None,
        }
    }
}

impl Changed {
    /// Adds a child's name.
    pub fn add_child(&mut self, name: Name) {
        self.added.push(name);
    }

    /// Removes a child's name.
    pub fn remove_child(&mut self, name: &[u8]) {
        match self.added.iter().position(|n| **n == *name) {
            Some(i) => {
                self.added.remove(i);
            }
            None => {
                self.removed.insert(Name::from(name));
            }
        }
    }
}

/// Enough where one guest's paths are by themselves, and few (`transaction-nodes`): one that makes them collide slows down itself.
type Quick = foldhash::quality::RandomState;

/// With more nodes than so many, a transaction that is over is not kept for its room.
const ROOM: usize = 64;

/// An open transaction.
#[derive(Debug, Clone, Default)]
pub struct Transaction {
    /// The id that the client knows.
    pub id: u32,
    /// Global generation at its start.
    pub generation: u64,
    /// When it was opened, in milliseconds.
    pub started_ms: u64,
    /// By path, in the order of their first access.
    pub nodes: IndexMap<Rc<[u8]>, Accessed, Quick>,
    /// It can't be committed any more.
    pub fail: bool,
    /// A node was made in it.
    pub created: bool,
    /// Memory accounted to its owner.
    pub charged: usize,
    /// Nodes that the journal does not know in their latest state; some more than once.
    pub touched: Vec<Rc<[u8]>>,
    /// What the journal knows of `fail` and `created`; `None`: it does not know the transaction.
    pub logged: Option<(bool, bool)>,
}

impl Transaction {
    /// A fresh one.
    pub fn new(id: u32, generation: u64, started_ms: u64) -> Transaction {
        Transaction { id, generation, started_ms, ..Transaction::default() }
    }

    /// Makes it a fresh one again, of no id. Whether its room is worth keeping.
    pub fn clear(&mut self) -> bool {
        let mut nodes = std::mem::take(&mut self.nodes);
        nodes.clear();
        *self = Transaction { nodes, ..Transaction::default() };
        self.nodes.capacity() <= ROOM
    }
}

/// Open transactions of a connection, by id. Mostly there is one, and each request takes it out and puts it back.
#[derive(Debug, Default)]
#[allow(clippy::vec_box, reason = "moving one must be cheap")]
pub struct Transactions(Vec<Box<Transaction>>);

impl Transactions {
    fn place(&self, id: u32) -> Result<usize, usize> {
        self.0.binary_search_by_key(&id, |t| t.id)
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// None at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether there is one of this id.
    pub fn contains(&self, id: u32) -> bool {
        self.place(id).is_ok()
    }

    /// By id.
    pub fn get_mut(&mut self, id: u32) -> Option<&mut Transaction> {
        let i = self.place(id).ok()?;
        self.0.get_mut(i).map(|t| &mut **t)
    }

    /// Puts one in; gives back one of the same id that was there.
    pub fn insert(&mut self, t: Box<Transaction>) -> Option<Box<Transaction>> {
        match self.place(t.id) {
            Ok(i) => self.0.get_mut(i).map(|old| std::mem::replace(old, t)),
            Err(i) => {
                self.0.insert(i, t);
                None
            }
        }
    }

    /// Takes one out.
    pub fn remove(&mut self, id: u32) -> Option<Box<Transaction>> {
        self.place(id).ok().map(|i| self.0.remove(i))
    }

    /// All, the lowest id first.
    pub fn iter(&self) -> impl Iterator<Item = &Transaction> {
        self.0.iter().map(|t| &**t)
    }

    /// The same, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Transaction> {
        self.0.iter_mut().map(|t| &mut **t)
    }

    /// Takes out all.
    pub fn take(&mut self) -> impl Iterator<Item = Box<Transaction>> + use<> {
        std::mem::take(&mut self.0).into_iter()
    }
}
