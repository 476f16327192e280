//! Events that came up for a connection while it was frozen.

use crate::watch::WatchId;
use std::collections::HashSet;
use std::rc::Rc;

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HeldEvent {
    /// Absolute path of what changed.
    pub path: Rc<[u8]>,
    /// The watch.
    pub watch: WatchId,
}

/// All of them, in order, without repetitions.
#[derive(Debug, Default)]
pub struct Held {
    events: Vec<HeldEvent>,
    known: HashSet<HeldEvent>,
    charged: usize,
}

impl Held {
    /// Whether the same one is held.
    pub fn contains(&self, e: &HeldEvent) -> bool {
        self.known.contains(e)
    }

    /// Holds one for which so much memory is accounted.
    pub fn push(&mut self, e: HeldEvent, charged: usize) {
        if self.known.insert(e.clone()) {
            self.events.push(e);
            self.charged += charged;
        }
    }

    /// In order.
    pub fn iter(&self) -> impl Iterator<Item = &HeldEvent> {
        self.events.iter()
    }

    /// Memory accounted for all.
    pub fn charged(&self) -> usize {
        self.charged
    }
}
