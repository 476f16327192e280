//! Children of a node, in the order in which they were made, which is the order that clients see.
//!
//! Their names stand behind each other as `DIRECTORY` answers them, so that an answer is one copy and a look for a name goes through
//! few lines of memory.

use crate::node::Node;
use hashbrown::HashTable;
use rustc_hash::FxHasher;
use std::hash::Hasher;
use std::rc::Rc;

/// Up to so many children are searched one by one.
const FEW: usize = 16;
/// With more than so many, going through their tags takes longer than a hash table.
const MANY: usize = 512;

/// Children of a node.
#[derive(Debug, Clone, Default)]
pub struct Children(Option<Box<Set>>);

#[derive(Debug, Clone, Default)]
struct Set {
    /// Names, each with its NUL. Those of removed ones stay until they are more than [`Set::is_sparse`] allows.
    names: Vec<u8>,
    /// Where in `names` each begins; it ends where the next one begins. It fits: 4 GiB of names in one node, which only dom0 could make,
    /// would be more children than a host has memory for.
    at: Vec<u32>,
    /// In their order; removed ones leave a gap until there are too many.
    nodes: Vec<Option<Rc<Node>>>,
    gaps: usize,
    /// Length of all names with a NUL each.
    bytes: usize,
    index: Index,
}

/// How a name is found.
#[derive(Debug, Clone, Default)]
enum Index {
    /// By comparing it with each.
    #[default]
    None,
    /// By a byte of its hash, in the order of the places: a look through few lines of memory.
    Tags(Vec<u8>),
    /// By its hash: places.
    Table(HashTable<u32>),
}

/// Children of one node are limited by its owner's quota, so that a guest that makes names collide slows down nobody but itself.
fn hash(name: &[u8]) -> u64 {
    let mut h = FxHasher::default();
    h.write(name);
    h.finish()
}

/// A byte of it.
fn tag(name: &[u8]) -> u8 {
    hash(name) as u8
}

/// Room for so much more in one that gets `more`: few bytes too many in a million small nodes would be many.
fn grow<T>(v: &mut Vec<T>, more: usize, small: usize) {
    if v.len() + more > v.capacity() {
        v.reserve_exact(if v.len() < small { more } else { more.max(v.len() / 16) });
    }
}

/// The name of a place, without its NUL.
fn name_of<'n>(names: &'n [u8], at: &[u32], i: usize) -> &'n [u8] {
    let from = at.get(i).map_or(names.len(), |&a| a as usize);
    let next = at.get(i + 1).map_or(names.len(), |&a| a as usize);
    names.get(from..next.saturating_sub(1)).unwrap_or_default()
}

impl Set {
    fn name(&self, i: usize) -> &[u8] {
        name_of(&self.names, &self.at, i)
    }

    fn is(&self, i: usize, name: &[u8]) -> bool {
        let own = self.name(i);
        // Names of the same length mostly differ in what comes last: a number.
        let may_be =
            own.len() == name.len() && own.last() == name.last() && self.nodes.get(i).is_some_and(Option::is_some);
        may_be && own == name
    }

    fn find(&self, name: &[u8]) -> Option<usize> {
        match &self.index {
            Index::None => (0..self.nodes.len()).find(|&i| self.is(i, name)),
            Index::Tags(tags) => memchr::memchr_iter(tag(name), tags).find(|&i| self.is(i, name)),
            Index::Table(places) => places.find(hash(name), |&i| self.is(i as usize, name)).map(|&i| i as usize),
        }
    }

    fn push(&mut self, name: &[u8], node: Rc<Node>) {
        self.bytes += name.len() + 1;
        grow(&mut self.nodes, 1, 8);
        grow(&mut self.at, 1, 8);
        grow(&mut self.names, name.len() + 1, 64);
        self.at.push(self.names.len() as u32);
        self.names.extend_from_slice(name);
        self.names.push(0);
        self.nodes.push(Some(node));
        match &mut self.index {
            Index::None => {}
            Index::Tags(tags) => {
                grow(tags, 1, 8);
                tags.push(tag(name));
            }
            Index::Table(places) => {
                let (names, at) = (&self.names, &self.at);
                places.insert_unique(hash(name), at.len() as u32 - 1, |&i| hash(name_of(names, at, i as usize)));
            }
        }
    }

    /// Whether they have become too many for their index.
    fn is_crowded(&self) -> bool {
        match self.index {
            Index::None => self.nodes.len() > FEW,
            // Not as soon as there are gaps: with just so many children each one that is made anew would make a gap.
            Index::Tags(_) => self.nodes.len() - self.gaps > MANY,
            Index::Table(_) => false,
        }
    }

    /// Whether much of it is of removed ones: no more may be kept than a few times what their owner is charged for.
    fn is_sparse(&self) -> bool {
        self.gaps > self.nodes.len() / 2 || self.names.len() > 2 * self.bytes + 1024
    }

    /// Closes the gaps, and makes the index that is right for so many.
    fn rebuild(&mut self) {
        let old = std::mem::take(self);
        let count = old.nodes.len() - old.gaps;
        self.names.reserve_exact(old.bytes);
        self.at.reserve_exact(count);
        self.nodes.reserve_exact(count);
        self.index = match count {
            n if n <= FEW => Index::None,
            n if n <= MANY => Index::Tags(Vec::with_capacity(n)),
            n => Index::Table(HashTable::with_capacity(n)),
        };
        for (i, node) in old.nodes.into_iter().enumerate() {
            if let Some(node) = node {
                self.push(name_of(&old.names, &old.at, i), node);
            }
        }
    }
}

impl Children {
    /// How many.
    pub fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |s| s.nodes.len() - s.gaps)
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
        s.nodes.get(s.find(name)?)?.as_ref()
    }

    /// By name, to be changed.
    pub fn get_mut(&mut self, name: &[u8]) -> Option<&mut Rc<Node>> {
        let s = self.0.as_mut()?;
        let i = s.find(name)?;
        s.nodes.get_mut(i)?.as_mut()
    }

    /// Appends; one of the same name is replaced where it stands.
    pub fn insert(&mut self, name: &[u8], node: Rc<Node>) {
        if let Some(old) = self.get_mut(name) {
            *old = node;
            return;
        }
        let s = self.0.get_or_insert_default();
        s.push(name, node);
        if s.is_crowded() {
            s.rebuild();
        }
    }

    /// Takes one out.
    pub fn remove(&mut self, name: &[u8]) -> Option<Rc<Node>> {
        let s = self.0.as_mut()?;
        let i = s.find(name)?;
        let node = s.nodes.get_mut(i)?.take()?;
        s.bytes -= name.len() + 1;
        s.gaps += 1;
        match &mut s.index {
            Index::None => {}
            // Not to be found by it any more: one name may be made and removed again and again.
            Index::Tags(tags) => tags.iter_mut().skip(i).take(1).for_each(|t| *t = !*t),
            Index::Table(places) => {
                if let Ok(e) = places.find_entry(hash(name), |&k| k as usize == i) {
                    e.remove();
                }
            }
        }
        if s.gaps == s.nodes.len() {
            self.0 = None;
        } else if s.nodes.len() <= FEW || s.is_sparse() {
            s.rebuild();
        }
        Some(node)
    }

    /// In their order: name, node.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &Rc<Node>)> {
        self.0.iter().flat_map(|s| s.nodes.iter().enumerate().filter_map(|(i, n)| Some((s.name(i), n.as_ref()?))))
    }

    /// Names with a NUL each.
    pub fn names(&self) -> Rc<[u8]> {
        match &self.0 {
            Some(s) if s.gaps == 0 => s.names[..].into(),
            _ => {
                let mut v = Vec::with_capacity(self.bytes());
                self.put_names(&mut v);
                v.into()
            }
        }
    }

    /// Appends them.
    pub fn put_names(&self, out: &mut Vec<u8>) {
        match &self.0 {
            Some(s) if s.gaps == 0 => out.extend_from_slice(&s.names),
            _ => {
                for (n, _) in self.iter() {
                    out.extend_from_slice(n);
                    out.push(0);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::PermList;
    use xenstore_wire::{Access, Perm};

    #[test]
    fn they_keep_their_order_however_many_there_are() {
        let perms: PermList = vec![Perm::new(Access::NONE, 0)].into();
        let mut c = Children::default();
        let name = |i: usize| format!("n{i}").into_bytes();
        for i in (0..100).rev() {
            c.insert(&name(i), Rc::new(Node::new(i as u64, perms.clone())));
        }
        for i in (0..100).filter(|i| i % 3 == 0) {
            assert_eq!(c.remove(&name(i)).unwrap().generation, i as u64);
        }
        let want: Vec<Vec<u8>> = (0..100).rev().filter(|i| i % 3 != 0).map(name).collect();
        let all = |c: &Children| c.iter().map(|(n, _)| n.to_vec()).collect::<Vec<_>>();
        let joined = |want: &[Vec<u8>]| want.iter().flat_map(|n| n.iter().copied().chain([0])).collect::<Vec<u8>>();
        assert_eq!(all(&c), want);
        assert_eq!(*c.names(), joined(&want), "with gaps");
        assert_eq!(c.bytes(), c.names().len());
        for n in &want[..60] {
            c.remove(n).unwrap();
        }
        assert!(matches!(c.0.as_ref().unwrap().index, Index::None), "a small set is small again");
        assert_eq!(all(&c), want[60..]);
        assert_eq!(*c.names(), joined(&want[60..]), "without");
        assert!(c.remove(b"nothing").is_none());
        for n in &want[60..] {
            assert!(c.get(n).is_some() && c.remove(n).is_some());
        }
        assert!(c.is_empty() && c.names().is_empty());
    }

    /// A guest is not charged for names that are gone.
    #[test]
    fn names_of_removed_ones_take_little() {
        let perms: PermList = vec![Perm::new(Access::NONE, 0)].into();
        let mut c = Children::default();
        for i in 0..200 {
            c.insert(format!("n{i}").as_bytes(), Rc::new(Node::new(0, perms.clone())));
        }
        for i in 0..90 {
            let long = vec![b'a' + (i % 26); 1900];
            c.insert(&long, Rc::new(Node::new(0, perms.clone())));
            assert!(c.remove(&long).is_some());
            assert!(c.0.as_ref().unwrap().names.capacity() < 3 * c.bytes() + 4096);
        }
        assert_eq!(c.len(), 200);
    }

    /// Neither is a name that is gone met again by its tag, nor is the index made anew each time with just as many as it may have.
    #[test]
    fn one_made_and_removed_again_and_again_costs_little() {
        let perms: PermList = vec![Perm::new(Access::NONE, 0)].into();
        let mut c = Children::default();
        for i in 0..MANY {
            c.insert(format!("n{i}").as_bytes(), Rc::new(Node::new(0, perms.clone())));
        }
        for gaps in 1..100 {
            assert!(c.remove(b"n7").is_some());
            c.insert(b"n7", Rc::new(Node::new(0, perms.clone())));
            let s = c.0.as_ref().unwrap();
            let Index::Tags(tags) = &s.index else { panic!("{:?}", s.index) };
            assert_eq!(s.gaps, gaps);
            assert_eq!(memchr::memchr_iter(tag(b"n7"), tags).filter(|&i| s.name(i) == b"n7").count(), 1);
        }
    }

    /// Against a plain list: what is found, in which order.
    #[test]
    fn they_are_what_a_list_would_be() {
        let perms: PermList = vec![Perm::new(Access::NONE, 0)].into();
        // Some, and more than MANY at times.
        for different in [70, 900] {
            let (mut c, mut list) = (Children::default(), Vec::<(Vec<u8>, u64)>::new());
            let (mut x, mut most) = (1_u64, 0);
            for step in 0..20_000 {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let name = format!("{}", (x >> 40) % different).into_bytes();
                let at = list.iter().position(|(n, _)| *n == name);
                // Phases in which there are many, and few.
                if (x >> 33) % 100 < if step / 2000 % 2 == 0 { 70 } else { 20 } {
                    c.insert(&name, Rc::new(Node::new(step, perms.clone())));
                    match at {
                        Some(i) => list[i].1 = step,
                        None => list.push((name, step)),
                    }
                } else {
                    assert_eq!(c.remove(&name).map(|n| n.generation), at.map(|i| list.remove(i).1));
                }
                most = most.max(c.len());
                assert_eq!(c.len(), list.len());
                assert_eq!(c.names().len(), c.bytes());
                assert!(c.iter().map(|(n, c)| (n, c.generation)).eq(list.iter().map(|(n, g)| (&n[..], *g))));
            }
            assert_eq!(most > MANY, different > 70);
        }
    }
}
