//! Watches of all connections, found by path in a few look-ups.

use crate::conn::ConnId;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use xenstore_wire::{HEADER_LEN, path};

/// Counts up, so that it orders watches by the time of their registration.
pub type WatchId = u64;

/// A watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watch {
    /// Whose.
    pub conn: ConnId,
    /// Absolute path, or a special event (`@…`).
    pub path: Rc<[u8]>,
    /// How many bytes of an event's path a client with a relative watch is not shown (0 for an absolute one).
    pub strip: usize,
    /// Given back with each event.
    pub token: Rc<[u8]>,
    /// Levels below `path` that count; `None` is all.
    pub depth: Option<u16>,
}

impl Watch {
    /// An event's path as this watch's client is to see it.
    pub fn shown<'a>(&self, path: &'a [u8]) -> &'a [u8] {
        let p = path.get(self.strip..).unwrap_or(b"");
        if self.strip > 0 { p.strip_prefix(b"/").unwrap_or(p) } else { p }
    }

    /// Memory accounted for an event of it.
    pub fn event_size(&self, path: &[u8]) -> usize {
        // Each with its NUL.
        self.shown(path).len() + self.token.len() + 2 + HEADER_LEN
    }

    /// Memory accounted for it.
    pub fn size(&self) -> usize {
        self.path.len() + self.token.len()
    }
}

/// All watches.
#[derive(Debug, Default)]
#[allow(clippy::len_without_is_empty, reason = "nobody asks whether there are none")]
pub struct Watches {
    all: BTreeMap<WatchId, Watch>,
    by_path: HashMap<Rc<[u8]>, Vec<WatchId>>,
    next: WatchId,
}

impl Watches {
    /// Registers.
    pub fn add(&mut self, w: Watch) -> WatchId {
        self.next += 1;
        self.by_path.entry(w.path.clone()).or_default().push(self.next);
        self.all.insert(self.next, w);
        self.next
    }

    /// By id.
    pub fn get(&self, id: WatchId) -> Option<&Watch> {
        self.all.get(&id)
    }

    /// Limits one that is registered already.
    pub fn set_depth(&mut self, id: WatchId, depth: Option<u16>) {
        if let Some(w) = self.all.get_mut(&id) {
            w.depth = depth;
        }
    }

    /// Takes one out.
    pub fn remove(&mut self, id: WatchId) -> Option<Watch> {
        let w = self.all.remove(&id)?;
        if let Some(v) = self.by_path.get_mut(&w.path) {
            v.retain(|&i| i != id);
            if v.is_empty() {
                self.by_path.remove(&w.path);
            }
        }
        Some(w)
    }

    /// A connection's watch by path and token.
    pub fn find(&self, conn: ConnId, path: &[u8], token: &[u8]) -> Option<WatchId> {
        let of_path = self.by_path.get(path)?;
        of_path.iter().copied().find(|i| self.all.get(i).is_some_and(|w| w.conn == conn && *w.token == *token))
    }

    /// Those that an event on `path` concerns, in the order of registration: at the path itself and, unless `exact`,
    /// at every path above it.
    pub fn matching(&self, path: &[u8], exact: bool) -> Vec<WatchId> {
        if self.by_path.is_empty() {
            return Vec::new();
        }
        let mut found = Vec::new();
        let mut at = path;
        loop {
            if let Some(v) = self.by_path.get(at) {
                found.extend(v.iter().copied().filter(|i| {
                    let depth = self.all.get(i).and_then(|w| w.depth);
                    depth.is_none_or(|d| path::depth_below(path, at).is_some_and(|n| n <= usize::from(d)))
                }));
            }
            if exact || at == b"/" || path.first() != Some(&b'/') {
                break;
            }
            at = path::parent(at);
        }
        found.sort_unstable();
        found
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.all.len()
    }
}
