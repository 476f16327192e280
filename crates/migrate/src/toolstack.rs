//! What of a guest lives outside the hypervisor: its part of the store, its devices, the toolstack's records. One trait, so that the
//! engine runs over the real service domain and over a simulated one.

use crate::guest::{Device, Identity, Offer};
use crate::trouble::Result;
use hypervisor::DomId;
use serde::{Deserialize, Serialize};

/// What the source's toolstack tells of a guest before anything is touched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    pub identity: Identity,
    pub devices: Vec<Device>,
    /// For the destination's toolstack: what it makes devices and nodes from. Its own JSON.
    pub details: serde_json::Value,
}

/// A node of the store outside what the guest can see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreNode {
    pub path: String,
    pub value: Vec<u8>,
    /// As the store's protocol writes them, the owner first: `n0`, `r7`.
    pub perms: Vec<String>,
}

/// What travels besides memory and the hypervisor's state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Luggage {
    /// The guest's connection, watches, transactions and nodes: a xenstore-migration stream.
    pub store: Vec<u8>,
    /// Nodes of the toolstack: `/libxl/<domid>`, `/vm/<uuid>`, backends.
    pub nodes: Vec<StoreNode>,
    /// The toolstack's files, by name.
    pub userdata: Vec<(String, Vec<u8>)>,
}

/// Counts what comes from a guest's vifs.
pub trait Packets: Send {
    /// So many packets so far; `None` if no vif is there to be asked.
    fn received(&mut self) -> Option<u64>;
}

/// The service domain's side of a guest. Every operation that comes after [`Toolstack::freeze`] or [`Toolstack::go`] can be repeated: it
/// finds what is done already.
pub trait Toolstack: Send + Sync {
    // ---- on both hosts ----

    /// What can be told of its vifs here. `details` are those of the guest's [`Description`] or [`Offer`].
    fn packets(&self, details: &serde_json::Value) -> Result<Box<dyn Packets>>;

    // ---- on the source ----

    /// Everything the guest has. Refuses, by name and reason, what can't move.
    fn describe(&self, dom: DomId) -> Result<Description>;

    /// Refuses a guest whose memory somebody else is copying (`xl save`, `xl migrate`), as far as that is to be seen. The look at it may
    /// take milliseconds.
    fn alone(&self, dom: DomId) -> Result<()>;

    /// What a CPU pool is called; only the number is Xen's.
    fn pool_name(&self, id: u32) -> Result<Option<String>>;

    /// The guest is paused: stop serving its store and console, take the snapshot that [`Toolstack::pack`] reads.
    fn freeze(&self, guest: &Description) -> Result<()>;

    /// Take the backends off the guest, and return when no request is in flight: no port bound, no grant in use.
    fn detach(&self, guest: &Description) -> Result<()>;

    /// The store as it was at the freeze, and the toolstack's records.
    fn pack(&self, guest: &Description) -> Result<Luggage>;

    /// Undo freeze and detach, as far as they were done: backends connected as before, the guest's nodes as at the freeze, nothing
    /// of it seen by the guest. The guest is still paused.
    fn unfreeze(&self, guest: &Description) -> Result<()>;

    /// Whether the backends may have been touched since the freeze, so that the guest must not run before [`Toolstack::unfreeze`] has succeeded.
    fn is_detached(&self, guest: &Description) -> bool;

    /// The guest was destroyed while it was frozen: let go of what was held for it. Its nodes are not ours to remove.
    fn abandon(&self, guest: &Description) -> Result<()>;

    /// The guest runs elsewhere and its domain here is gone: remove nodes, devices and files, keep its domid from being used again soon.
    fn forget(&self, guest: &Description) -> Result<()>;

    // ---- on the destination ----

    /// What this service domain lacks for the guest: bridge, disk, backend's limits, a taken name. Changes nothing.
    fn fits(&self, offer: &Offer) -> Vec<String>;

    /// The number of the CPU pool of that name.
    fn pool_named(&self, name: &str) -> Result<Option<u32>>;

    /// The shell domain is there: make its nodes and devices, backends waiting for their frontends.
    fn prepare(&self, offer: &Offer) -> Result<()>;

    /// The guest's store and the toolstack's records, all that can be put in place before the backends may connect.
    fn unpack(&self, offer: &Offer, luggage: &Luggage) -> Result<()>;

    /// Connect the backends, and return when all are connected and look to the guest as before; then store and console.
    fn go(&self, offer: &Offer, luggage: &Luggage) -> Result<()>;

    /// The guest runs: tell the network where it is now, let the toolstack watch over it.
    fn announce(&self, offer: &Offer) -> Result<()>;

    /// It will never run here: let the backends finish what they have begun and remove them, the nodes, the files. The domain may or may not
    /// be there still.
    fn discard(&self, offer: &Offer) -> Result<()>;
}
