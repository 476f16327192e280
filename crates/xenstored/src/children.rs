//! Children of a node, in the order in which they were made, which is the order that clients see.
//!
//! Their names stand behind each other as `DIRECTORY` answers them, so that an answer is one copy and a look for a name goes through
//! few lines of memory.

use crate::node::Node;
use hashbrown::HashTable;
use std::rc::Rc;

/// Up to so many children are searched one by one; more get an index.
const FEW: usize = 24;

/// Children of a node.
#[derive(Debug, Clone, Default)]
pub struct Children(Option<Box<Set>>);

#[derive(Debug, Clone, Default)]
struct Set {
    /// Names, each with its NUL. Those of removed ones stay until they are more than [`Set::is_sparse`] allows.
    names: Vec<u8>,
    /// In their order; removed ones leave a gap until there are too many.
    list: Vec<Child>,
    gaps: usize,
    /// Length of all names with a NUL each.
    bytes: usize,
    /// Places in `list`, if there are many.
    index: HashTable<u32>,
}

#[derive(Debug, Clone)]
struct Child {
    /// Where the name is, and its length without the NUL. Both fit: a name is part of a path, and 4 GiB of names in one node, which
    /// only dom0 could make, would be more children than a host has memory for.
    at: u32,
    len: u32,
    /// `None`: a gap.
    node: Option<Rc<Node>>,
}

fn hash(name: &[u8]) -> u64 {
    // FNV-1a, its bits spread. Children of one node are limited by its quota, so that a guest that makes names collide
    // slows down nobody but itself.
    let h = name.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    h ^ (h >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Child {
    fn name<'n>(&self, names: &'n [u8]) -> &'n [u8] {
        names.get(self.at as usize..self.at as usize + self.len as usize).unwrap_or_default()
    }

    fn is(&self, names: &[u8], name: &[u8]) -> bool {
        // Names of the same length mostly differ in what comes last: a number.
        self.len as usize == name.len() && self.node.is_some() && {
            let own = self.name(names);
            own.last() == name.last() && own == name
        }
    }
}

/// Room for so much more in one that gets `more`: few bytes too many in a million small nodes would be many.
fn grow<T>(v: &mut Vec<T>, more: usize, small: usize) {
    if v.len() + more > v.capacity() {
        v.reserve_exact(if v.len() < small { more } else { more.max(v.len() / 8) });
    }
}

impl Set {
    fn find(&self, name: &[u8]) -> Option<usize> {
        if self.index.is_empty() {
            self.list.iter().position(|c| c.is(&self.names, name))
        } else {
            let is = |&i: &u32| self.list.get(i as usize).is_some_and(|c| c.is(&self.names, name));
            self.index.find(hash(name), is).map(|&i| i as usize)
        }
    }

    /// Whether much of it is of removed ones: no more may be kept than a few times what their owner is charged for.
    fn is_sparse(&self) -> bool {
        self.gaps > self.list.len() / 2 || self.names.len() > 2 * self.bytes + 1024
    }

    /// Closes the gaps.
    fn rebuild(&mut self) {
        let mut names = Vec::with_capacity(self.bytes);
        self.list.retain_mut(|c| {
            let at = names.len() as u32;
            if c.node.is_some() {
                names.extend_from_slice(c.name(&self.names));
                names.push(0);
            }
            c.at = at;
            c.node.is_some()
        });
        self.names = names;
        self.list.shrink_to_fit();
        self.gaps = 0;
        self.index_again();
    }

    fn index_again(&mut self) {
        self.index = HashTable::new();
        if self.list.len() > FEW {
            let (list, names) = (&self.list, &self.names);
            let at = |i: &u32| list.get(*i as usize).map_or(0, |c| hash(c.name(names)));
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
        s.list.get(s.find(name)?)?.node.as_ref()
    }

    /// By name, to be changed.
    pub fn get_mut(&mut self, name: &[u8]) -> Option<&mut Rc<Node>> {
        let s = self.0.as_mut()?;
        let i = s.find(name)?;
        s.list.get_mut(i)?.node.as_mut()
    }

    /// Appends; one of the same name is replaced where it stands.
    pub fn insert(&mut self, name: &[u8], node: Rc<Node>) {
        if let Some(old) = self.get_mut(name) {
            *old = node;
            return;
        }
        let s = self.0.get_or_insert_default();
        s.bytes += name.len() + 1;
        grow(&mut s.list, 1, 8);
        grow(&mut s.names, name.len() + 1, 64);
        s.list.push(Child { at: s.names.len() as u32, len: name.len() as u32, node: Some(node) });
        s.names.extend_from_slice(name);
        s.names.push(0);
        if s.index.is_empty() {
            if s.list.len() > FEW {
                s.rebuild();
            }
        } else {
            let (list, names, i) = (&s.list, &s.names, s.list.len() as u32 - 1);
            let at = |i: &u32| list.get(*i as usize).map_or(0, |c| hash(c.name(names)));
            s.index.insert_unique(at(&i), i, at);
        }
    }

    /// Takes one out.
    pub fn remove(&mut self, name: &[u8]) -> Option<Rc<Node>> {
        let s = self.0.as_mut()?;
        let i = s.find(name)?;
        let node = s.list.get_mut(i)?.node.take()?;
        s.bytes -= name.len() + 1;
        s.gaps += 1;
        if let Ok(e) = s.index.find_entry(hash(name), |&k| k as usize == i) {
            e.remove();
        }
        if s.gaps == s.list.len() {
            self.0 = None;
        } else if s.list.len() <= FEW || s.is_sparse() {
            s.rebuild();
        }
        Some(node)
    }

    /// In their order: name, node.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &Rc<Node>)> {
        self.0.iter().flat_map(|s| s.list.iter().filter_map(|c| Some((c.name(&s.names), c.node.as_ref()?))))
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
        assert!(c.0.as_ref().unwrap().index.is_empty(), "a small set is small again");
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

    /// Against a plain list: what is found, in which order.
    #[test]
    fn they_are_what_a_list_would_be() {
        let perms: PermList = vec![Perm::new(Access::NONE, 0)].into();
        let (mut c, mut list) = (Children::default(), Vec::<(Vec<u8>, u64)>::new());
        let mut x = 1_u64;
        for step in 0..20_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let name = format!("{}", (x >> 40) % 70).into_bytes();
            let at = list.iter().position(|(n, _)| *n == name);
            // Phases in which there are many, and few.
            if (x >> 33) % 100 < if step / 2000 % 2 == 0 { 70 } else { 30 } {
                c.insert(&name, Rc::new(Node::new(step, perms.clone())));
                match at {
                    Some(i) => list[i].1 = step,
                    None => list.push((name, step)),
                }
            } else {
                assert_eq!(c.remove(&name).map(|n| n.generation), at.map(|i| list.remove(i).1));
            }
            assert_eq!(c.len(), list.len());
            assert_eq!(c.names().len(), c.bytes());
            assert!(c.iter().map(|(n, c)| (n, c.generation)).eq(list.iter().map(|(n, g)| (&n[..], *g))));
        }
    }
}
