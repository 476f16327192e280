//! The tree of nodes: copy on write, so that a snapshot is one reference.
//!
//! A node is cloned only when it is changed while a snapshot (or an open transaction that read it) still holds it;
//! without one a change touches nothing but the node itself. Children keep the order in which they were made, which is
//! the order that clients see.

use hashbrown::HashTable;
use std::collections::HashSet;
use std::ops::Deref;
use std::rc::Rc;
use xenstore_wire::{Perm, path};

/// Name of a child, without slashes. Equal names share their memory, see [`Names`].
pub type Name = Rc<[u8]>;

/// Up to so many children are searched one by one; more get an index.
const FEW: usize = 24;

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

/// Names in use: the same few hundred come again and again.
#[derive(Debug, Default)]
pub struct Names {
    all: HashSet<Name>,
    sweep_at: usize,
}

impl Names {
    /// The one copy of a name.
    pub fn get(&mut self, name: &[u8]) -> Name {
        if let Some(n) = self.all.get(name) {
            return n.clone();
        }
        if self.all.len() >= self.sweep_at {
            self.all.retain(|n| Rc::strong_count(n) > 1);
            self.sweep_at = (2 * self.all.len()).max(1024);
        }
        let n = Name::from(name);
        self.all.insert(n.clone());
        n
    }
}

/// Children of a node.
#[derive(Debug, Clone, Default)]
pub struct Children(Option<Box<Set>>);

#[derive(Debug, Clone, Default)]
struct Set {
    /// In their order; removed ones leave a gap until there are too many.
    list: Vec<Option<(Name, Rc<Node>)>>,
    gaps: usize,
    /// Length of all names with a NUL each.
    bytes: usize,
    /// Places in `list`, if there are many.
    index: HashTable<u32>,
}

fn hash(name: &[u8]) -> u64 {
    // FNV-1a, its bits spread. Children of one node are limited by its quota, so that a guest that makes names collide
    // slows down nobody but itself.
    let h = name.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    h ^ (h >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Set {
    fn find(&self, name: &[u8]) -> Option<usize> {
        let is = |e: &Option<(Name, Rc<Node>)>| e.as_ref().is_some_and(|(n, _)| **n == *name);
        if self.index.is_empty() {
            self.list.iter().position(is)
        } else {
            self.index.find(hash(name), |&i| self.list.get(i as usize).is_some_and(is)).map(|&i| i as usize)
        }
    }

    fn rebuild(&mut self) {
        self.list.retain(Option::is_some);
        self.list.shrink_to_fit();
        self.gaps = 0;
        self.index = HashTable::new();
        if self.list.len() > FEW {
            let list = &self.list;
            let at = |i: &u32| list.get(*i as usize).and_then(Option::as_ref).map_or(0, |(n, _)| hash(n));
            self.index.reserve(list.len(), at);
            for i in 0..list.len() as u32 {
                self.index.insert_unique(at(&i), i, at);
            }
        }
    }
}

impl Children {
    /// How many.
    pub fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |s| s.list.len() - s.gaps)
    }

    /// None at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Length of all names, with a NUL each.
    pub fn bytes(&self) -> usize {
        self.0.as_ref().map_or(0, |s| s.bytes)
    }

    /// By name.
    pub fn get(&self, name: &[u8]) -> Option<&Rc<Node>> {
        let s = self.0.as_ref()?;
        s.list.get(s.find(name)?)?.as_ref().map(|(_, c)| c)
    }

    /// By name, to be changed.
    pub fn get_mut(&mut self, name: &[u8]) -> Option<&mut Rc<Node>> {
        let s = self.0.as_mut()?;
        let i = s.find(name)?;
        s.list.get_mut(i)?.as_mut().map(|(_, c)| c)
    }

    /// Appends; one of the same name is replaced where it stands.
    pub fn insert(&mut self, name: Name, node: Rc<Node>) {
        if let Some(old) = self.get_mut(&name) {
            *old = node;
            return;
        }
        let s = self.0.get_or_insert_default();
        s.bytes += name.len() + 1;
        let h = hash(&name);
        if s.list.len() < 8 {
            s.list.reserve_exact(1);
        } else if s.list.len() == s.list.capacity() {
            s.list.reserve_exact(s.list.len() / 8);
        }
        s.list.push(Some((name, node)));
        if s.index.is_empty() {
            if s.list.len() > FEW {
                s.rebuild();
            }
        } else {
            let (list, i) = (&s.list, s.list.len() as u32 - 1);
            let at = |i: &u32| list.get(*i as usize).and_then(Option::as_ref).map_or(0, |(n, _)| hash(n));
            s.index.insert_unique(h, i, at);
        }
    }

    /// Takes one out.
    pub fn remove(&mut self, name: &[u8]) -> Option<Rc<Node>> {
        let s = self.0.as_mut()?;
        let i = s.find(name)?;
        let (name, node) = s.list.get_mut(i)?.take()?;
        s.bytes -= name.len() + 1;
        s.gaps += 1;
        if let Ok(e) = s.index.find_entry(hash(&name), |&k| k as usize == i) {
            e.remove();
        }
        if s.gaps == s.list.len() {
            self.0 = None;
        } else if s.list.len() <= FEW || s.gaps > s.list.len() / 2 {
            s.rebuild();
        }
        Some(node)
    }

    /// In their order.
    pub fn iter(&self) -> impl Iterator<Item = (&Name, &Rc<Node>)> {
        self.0.iter().flat_map(|s| s.list.iter()).flatten().map(|(n, c)| (n, c))
    }

    /// Names with a NUL each.
    pub fn names(&self) -> Vec<u8> {
        let mut v = Vec::with_capacity(self.bytes());
        for (n, _) in self.iter() {
            v.extend_from_slice(n);
            v.push(0);
        }
        v
    }
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
    fn names_that_nobody_uses_are_forgotten() {
        let mut names = Names::default();
        let kept = names.get(b"state");
        for i in 0..100_000 {
            names.get(format!("x{i}").as_bytes());
        }
        assert!(names.all.len() < 3000);
        assert!(Rc::ptr_eq(&kept, &names.get(b"state")));
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
        assert!(c.0.as_ref().unwrap().index.is_empty(), "a small set is small again");
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
