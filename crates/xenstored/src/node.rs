//! The tree of nodes: copy on write, so that a snapshot is one reference.
//!
//! A node is cloned only when it is changed while a snapshot (or an open transaction that read it) still holds it;
//! without one a change touches nothing but the node itself.

use crate::children::Children;
use std::ops::Deref;
use std::rc::Rc;
use xenstore_wire::{Perm, path};

/// Name of a child that a transaction made or removed, without slashes.
pub type Name = Rc<[u8]>;

/// Permissions of a node, owner first; never empty. Shared between nodes that inherited them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PermList(Rc<Vec<Perm>>);

impl Deref for PermList {
    type Target = [Perm];

    fn deref(&self) -> &[Perm] {
        &self.0
    }
}

impl From<Vec<Perm>> for PermList {
    fn from(mut v: Vec<Perm>) -> PermList {
        v.shrink_to_fit();
        PermList(Rc::new(v))
    }
}

impl FromIterator<Perm> for PermList {
    fn from_iter<I: IntoIterator<Item = Perm>>(i: I) -> PermList {
        i.into_iter().collect::<Vec<_>>().into()
    }
}

/// Bytes that a value may have to be kept inside of its node; most have.
const INLINE: usize = 14;

/// Value of a node.
#[derive(Debug, Clone)]
pub struct Value(Bytes);

#[derive(Debug, Clone)]
enum Bytes {
    Inline(u8, [u8; INLINE]),
    // Two steps, so that all of it fits into 16 bytes.
    #[allow(clippy::box_collection, clippy::redundant_allocation)]
    Heap(Box<Box<[u8]>>),
}

impl Deref for Value {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Bytes::Inline(len, b) => b.get(..usize::from(*len)).unwrap_or(b),
            Bytes::Heap(b) => b,
        }
    }
}

impl From<&[u8]> for Value {
    fn from(v: &[u8]) -> Value {
        let mut b = [0; INLINE];
        match b.get_mut(..v.len()) {
            Some(part) => {
                part.copy_from_slice(v);
                Value(Bytes::Inline(v.len() as u8, b))
            }
            None => Value(Bytes::Heap(Box::new(v.into()))),
        }
    }
}

impl From<Vec<u8>> for Value {
    fn from(v: Vec<u8>) -> Value {
        v[..].into()
    }
}

impl Default for Value {
    fn default() -> Value {
        Value(Bytes::Inline(0, [0; INLINE]))
    }
}

/// A node. There may be a million of them: 40 bytes.
#[derive(Debug, Clone)]
pub struct Node {
    /// The store's count of changes at this node's last one. Permissions of domains that became known later don't hold.
    pub generation: u64,
    /// Owner first; never empty.
    pub perms: PermList,
    /// Any bytes.
    pub value: Value,
    /// Children in the order in which they were made.
    pub children: Children,
}

impl Node {
    /// A node without value and children.
    pub fn new(generation: u64, perms: PermList) -> Node {
        Node { generation, perms, value: Value::default(), children: Children::default() }
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

/// The whole tree. A clone is a snapshot.
#[derive(Debug, Clone)]
pub struct Tree {
    root: Rc<Node>,
}

impl Tree {
    /// Only a root, of `owner`.
    pub fn new(perms: PermList) -> Tree {
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
        self.present_mut(path)
    }

    /// The same for a path that was looked up just now.
    pub fn present_mut(&mut self, path: &[u8]) -> Option<&mut Node> {
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

    fn perms() -> PermList {
        vec![Perm::new(Access::NONE, 0)].into()
    }

    #[test]
    fn a_node_is_small() {
        assert_eq!(size_of::<Node>(), 40);
        for n in [0, 1, 14, 15, 4000] {
            assert_eq!(*Value::from(vec![7; n]), *vec![7u8; n]);
        }
    }

    #[test]
    fn a_snapshot_stays_as_it_was_and_shares_what_is_unchanged() {
        let mut t = Tree::new(perms());
        for (p, n) in [("/", "a"), ("/a", "b"), ("/", "c")] {
            let node = t.get_mut(p.as_bytes()).unwrap();
            node.children.insert(n.as_bytes(), Rc::new(Node::new(1, perms())));
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
