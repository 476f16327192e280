//! A transaction: an overlay of the nodes that it touched.
//!
//! Opening one is a counter's increment. A node joins at its first access, as it is then; a commit goes through if every
//! joined node still is what it was (the rule of the C daemon, `xenstored_transaction.c`).

use crate::node::{Name, Node, PermList, Value};
use crate::store::tx_cost;
use std::collections::{HashMap, HashSet};
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

/// An open transaction.
#[derive(Debug, Clone)]
pub struct Transaction {
    /// The id that the client knows.
    pub id: u32,
    /// Global generation at its start.
    pub generation: u64,
    /// When it was opened, in milliseconds.
    pub started_ms: u64,
    /// Nodes in the order of their first access.
    pub order: Vec<Rc<[u8]>>,
    /// By path.
    pub nodes: HashMap<Rc<[u8]>, Accessed, Quick>,
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
        Transaction {
            id,
            generation,
            started_ms,
            order: Vec::new(),
            nodes: HashMap::default(),
            fail: false,
            created: false,
            charged: 0,
            touched: Vec::new(),
            logged: None,
        }
    }
}
