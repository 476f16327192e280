//! The tree of nodes: copy on write, so that a snapshot is one reference.
//!
//! A node is cloned only when it is changed while a snapshot (or an open transaction that read it) still holds it;
//! without one a change touches nothing but the node itself. Children keep the order in which they were made, which is
//! the order that clients see.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use xenstore_wire::{Perm, path};

/// Name of a child, without slashes.
pub type Name = Rc<[u8]>;

/// Up to so many children are searched one by one; more get an index.
const FEW: usize = 24;

/// A node.
#[derive(Debug, Clone)]
pub struct Node {
    /// Counts changes, over the whole store; clients see it in `DIRECTORY_PART`. Kept by a migration.
    pub generation: u64,
    /// Like `generation`, but always this daemon's own count: what permissions of younger domains are measured by.
    pub stamp: u64,
    /// Owner first; never empty.
    pub perms: Rc<[Perm]>,
    /// Any bytes.
    pub value: Box<[u8]>,
    /// Children in the order in which they were made.
    pub children: Children,
}

impl Node {
    /// A node without value and children.
    pub fn new(generation: u64, perms: Rc<[Perm]>) -> Node {
        Node { generation, stamp: generation, perms, value: Box::default(), children: Children::default() }
    }

    /// The owner.
    pub fn owner(&self) -> u16 {
        owner(&self.perms)
    }
}

/// The owner named by a node's permissions.
pub fn owner(perms: &[Perm]) -> u16 {
    perms.first().map_or(0, |p| p.domid)
}

/// Children of a node.
#[derive(Debug, Clone, Default)]
pub struct Children {
    set: Set,
    /// Length of all names with a NUL each.
    bytes: usize,
}

#[derive(Debug, Clone)]
enum Set {
    Few(Vec<(Name, Rc<Node>)>),
    Many(Box<Many>),
}

impl Default for Set {
    fn default() -> Self {
        Set::Few(Vec::new())
    }
}

#[derive(Debug, Clone, Default)]
struct Many {
    order: BTreeMap<u64, (Name, Rc<Node>)>,
    index: HashMap<Name, u64>,
    next: u64,
}

impl Children {
    /// How many.
    pub fn len(&self) -> usize {
        match &self.set {
            Set::Few(v) => v.len(),
            Set::Many(m) => m.order.len(),
        }
    }

    /// None at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Length of all names, with a NUL each.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// By name.
    pub fn get(&self, name: &[u8]) -> Option<&Rc<Node>> {
        match &self.set {
            Set::Few(v) => v.iter().find(|(n, _)| **n == *name).map(|(_, c)| c),
            Set::Many(m) => m.index.get(name).and_then(|i| m.order.get(i)).map(|(_, c)| c),
        }
    }

    /// By name, to be changed.
    pub fn get_mut(&mut self, name: &[u8]) -> Option<&mut Rc<Node>> {
        match &mut self.set {
            Set::Few(v) => v.iter_mut().find(|(n, _)| **n == *name).map(|(_, c)| c),
            Set::Many(m) => m.index.get(name).and_then(|i| m.order.get_mut(i)).map(|(_, c)| c),
        }
    }

    /// Appends; one of the same name is replaced where it stands.
    pub fn insert(&mut self, name: Name, node: Rc<Node>) {
        if let Some(old) = self.get_mut(&name) {
            *old = node;
            return;
        }
        self.bytes += name.len() + 1;
        if let Set::Few(v) = &mut self.set {
            if v.len() < FEW {
                v.reserve_exact(1);
                v.push((name, node));
                return;
            }
            let mut m = Many::default();
            for (n, c) in v.drain(..) {
                m.push(n, c);
            }
            self.set = Set::Many(Box::new(m));
        }
        if let Set::Many(m) = &mut self.set {
            m.push(name, node);
        }
    }

    /// Takes one out.
    pub fn remove(&mut self, name: &[u8]) -> Option<Rc<Node>> {
        let node = match &mut self.set {
            Set::Few(v) => {
                let i = v.iter().position(|(n, _)| **n == *name)?;
                v.remove(i).1
            }
            Set::Many(m) => {
                let i = m.index.remove(name)?;
                let (_, c) = m.order.remove(&i)?;
                if m.order.len() <= FEW / 2 {
                    self.set = Set::Few(std::mem::take(&mut m.order).into_values().collect());
                }
                c
            }
        };
        self.bytes -= name.len() + 1;
        Some(node)
    }

    /// In their order.
    pub fn iter(&self) -> Box<dyn Iterator<Item = (&Name, &Rc<Node>)> + '_> {
        match &self.set {
            Set::Few(v) => Box::new(v.iter().map(|(n, c)| (n, c))),
            Set::Many(m) => Box::new(m.order.values().map(|(n, c)| (n, c))),
        }
    }
}

impl Many {
    fn push(&mut self, name: Name, node: Rc<Node>) {
        self.index.insert(name.clone(), self.next);
        self.order.insert(self.next, (name, node));
        self.next += 1;
    }
}

/// The whole tree. A clone is a snapshot.
#[derive(Debug, Clone)]
pub struct Tree {
    root: Rc<Node>,
}

impl Tree {
    /// Only a root, of `owner`.
    pub fn new(perms: Rc<[Perm]>) -> Tree {
        Tree { root: Rc::new(Node::new(0, perms)) }
    }

    /// The node at an absolute path.
    pub fn get(&self, path: &[u8]) -> Option<&Rc<Node>> {
        let mut at = &self.root;
        for part in path::parts(path) {
            at = at.children.get(part)?;
        }
        Some(at)
    }

    /// The node at an absolute path, to be changed; nodes on the way that a snapshot holds are cloned.
    pub fn get_mut(&mut self, path: &[u8]) -> Option<&mut Node> {
        // Looked up first, so that a miss clones nothing.
        self.get(path)?;
        let mut at = Rc::make_mut(&mut self.root);
        for part in path::parts(path) {
            at = Rc::make_mut(at.children.get_mut(part)?);
        }
        Some(at)
    }

    /// The root.
    pub fn root(&self) -> &Rc<Node> {
        &self.root
    }

    /// Calls `f` for `path` and all below, parents first.
    pub fn walk(&self, path: &[u8], f: &mut dyn FnMut(&[u8], &Rc<Node>)) {
        if let Some(n) = self.get(path) {
            let mut p = path.to_vec();
            walk(&mut p, n, f);
        }
    }

    /// How many nodes there are.
    pub fn count(&self) -> usize {
        let mut n = 0;
        self.walk(b"/", &mut |_, _| n += 1);
        n
    }
}

/// Recursion is bounded by the length of a path: at most 3072 / 2 levels.
fn walk(path: &mut Vec<u8>, node: &Rc<Node>, f: &mut dyn FnMut(&[u8], &Rc<Node>)) {
    f(path, node);
    let len = path.len();
    for (name, child) in node.children.iter() {
        if len > 1 {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        walk(path, child, f);
        path.truncate(len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xenstore_wire::Access;

    fn perms() -> Rc<[Perm]> {
        Rc::from([Perm::new(Access::NONE, 0)])
    }

    #[test]
    fn children_keep_their_order_however_many_there_are() {
        let mut c = Children::default();
        let name = |i: usize| Name::from(format!("n{i}").as_bytes());
        for i in (0..100).rev() {
            c.insert(name(i), Rc::new(Node::new(i as u64, perms())));
        }
        for i in (0..100).filter(|i| i % 3 == 0) {
            assert_eq!(c.remove(&name(i)).unwrap().generation, i as u64);
        }
        let want: Vec<Name> = (0..100).rev().filter(|i| i % 3 != 0).map(name).collect();
        assert_eq!(c.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>(), want);
        assert_eq!(c.bytes(), want.iter().map(|n| n.len() + 1).sum::<usize>());
        for n in &want[..60] {
            c.remove(n).unwrap();
        }
        assert!(matches!(c.set, Set::Few(_)), "a small set is small again");
        assert_eq!(c.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>(), want[60..]);
        assert!(c.remove(b"nothing").is_none());
    }

    #[test]
    fn a_snapshot_stays_as_it_was_and_shares_what_is_unchanged() {
        let mut t = Tree::new(perms());
        for (p, n) in [("/", "a"), ("/a", "b"), ("/", "c")] {
            let node = t.get_mut(p.as_bytes()).unwrap();
            node.children.insert(Name::from(n.as_bytes()), Rc::new(Node::new(1, perms())));
        }
        let snap = t.clone();
        t.get_mut(b"/a/b").unwrap().value = b"new"[..].into();
        assert_eq!(&*snap.get(b"/a/b").unwrap().value, b"");
        assert_eq!(&*t.get(b"/a/b").unwrap().value, b"new");
        assert!(Rc::ptr_eq(snap.get(b"/c").unwrap(), t.get(b"/c").unwrap()));
        assert_eq!(t.count(), 4);
        assert!(t.get_mut(b"/a/x").is_none());
    }
}
