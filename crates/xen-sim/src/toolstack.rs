//! The service domain of a simulated host: a store of a few nodes, backends that are attached or not.

use crate::xen::SimXen;
use hypervisor::DomId;
use hypervisor::Hypervisor;
use migrate::guest::{Device, GuestKind, Identity, Offer};
use migrate::toolstack::{Description, Luggage, Packets, StoreNode, Toolstack};
use migrate::{Result, Trouble};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use uuid::Uuid;

/// What the simulated service domain knows of one guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Guest {
    pub name: String,
    pub nodes: BTreeMap<String, Vec<u8>>,
    pub frozen: bool,
    pub attached: bool,
    pub announced: bool,
}

/// Simulated guests send no packets.
struct NoVifs;

impl Packets for NoVifs {
    fn received(&mut self) -> Option<u64> {
        None
    }
}

#[derive(Debug, Clone)]
pub struct SimToolstack {
    xen: SimXen,
    guests: Arc<Mutex<BTreeMap<DomId, Guest>>>,
    /// Names of CPU pools.
    pools: Arc<Mutex<BTreeMap<u32, String>>>,
    /// What [`Toolstack::fits`] answers, for tests of refusals.
    pub lacks: Vec<String>,
    /// Domain of the guests' backends.
    backend_domid: Arc<AtomicU16>,
    /// The store answers nobody.
    hangs: Arc<AtomicBool>,
    /// Stock tools save or migrate guests.
    saving: Arc<AtomicBool>,
}

impl SimToolstack {
    pub fn new(xen: &SimXen) -> Self {
        SimToolstack {
            xen: xen.clone(),
            guests: Arc::default(),
            pools: Arc::default(),
            lacks: Vec::new(),
            backend_domid: Arc::default(),
            hangs: Arc::default(),
            saving: Arc::default(),
        }
    }

    pub fn add(&self, dom: DomId, name: &str) {
        let nodes = [("name".to_string(), name.into()), ("memory/target".into(), b"1024".to_vec())].into();
        self.guests().insert(dom, Guest { name: name.into(), nodes, frozen: false, attached: true, announced: false });
    }

    pub fn name_pool(&self, id: u32, name: &str) {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner).insert(id, name.into());
    }

    pub fn guest(&self, dom: DomId) -> Option<Guest> {
        self.guests().get(&dom).cloned()
    }

    /// From now on the store answers nobody, or does again.
    pub fn hang(&self, hangs: bool) {
        self.hangs.store(hangs, Ordering::SeqCst);
    }

    /// From now on stock tools are at work on the guests, or no longer.
    pub fn save(&self, saving: bool) {
        self.saving.store(saving, Ordering::SeqCst);
    }

    /// From now on the guests' backends are in this domain.
    pub fn serve_from(&self, domid: u16) {
        self.backend_domid.store(domid, Ordering::SeqCst);
    }

    fn store(&self) -> Result<MutexGuard<'_, BTreeMap<DomId, Guest>>> {
        if self.hangs.load(Ordering::SeqCst) {
            return Err(Trouble::new("xenstored did not answer"));
        }
        Ok(self.guests())
    }

    fn guests(&self) -> MutexGuard<'_, BTreeMap<DomId, Guest>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn uuid(&self, dom: DomId) -> Result<Uuid> {
        Ok(self.xen.domain_info(dom)?.uuid)
    }
}

/// The ident of a xenstore-migration stream, then JSON: the simulated store has no rings.
const IDENT: &[u8] = b"xenstore";

impl Toolstack for SimToolstack {
    fn describe(&self, dom: DomId) -> Result<Description> {
        let guests = self.guests();
        let guest = guests.get(&dom).ok_or_else(|| Trouble::new("it is not known to the store"))?;
        Ok(Description {
            identity: Identity { domid: dom, uuid: self.uuid(dom)?, name: guest.name.clone(), kind: GuestKind::Pvh },
            devices: vec![Device {
                class: "vif".into(),
                devid: 0,
                backend_domid: self.backend_domid.load(Ordering::SeqCst),
                frontend: format!("/local/domain/{dom}/device/vif/0"),
                backend: format!("/local/domain/0/backend/vif/{dom}/0"),
                frontend_state: 4,
                backend_state: 4,
                needs: vec![("bridge".into(), "xenbr0".into())],
            }],
            details: serde_json::json!({"made": true}),
        })
    }

    fn alone(&self, _dom: DomId) -> Result<()> {
        if self.saving.load(Ordering::SeqCst) { Err(Trouble::new("it is being saved by stock tools")) } else { Ok(()) }
    }

    fn pool_name(&self, id: u32) -> Result<Option<String>> {
        Ok(self.pools.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned())
    }

    fn pool_named(&self, name: &str) -> Result<Option<u32>> {
        let pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(pools.iter().find(|(_, n)| *n == name).map(|(id, _)| *id))
    }

    fn freeze(&self, guest: &Description) -> Result<()> {
        let mut guests = self.store()?;
        let g = guests.get_mut(&guest.identity.domid).ok_or_else(|| Trouble::new("gone"))?;
        g.frozen = true;
        Ok(())
    }

    fn detach(&self, guest: &Description) -> Result<()> {
        let mut guests = self.store()?;
        let g = guests.get_mut(&guest.identity.domid).ok_or_else(|| Trouble::new("gone"))?;
        g.attached = false;
        Ok(self.xen.bind_ports(guest.identity.domid, false)?)
    }

    fn pack(&self, guest: &Description) -> Result<Luggage> {
        let guests = self.store()?;
        let g = guests.get(&guest.identity.domid).ok_or_else(|| Trouble::new("gone"))?;
        if !g.frozen || g.attached {
            return Err(Trouble::new("the store was read before it was frozen and the backends were off"));
        }
        Ok(Luggage {
            store: [IDENT, &serde_json::to_vec(&g.nodes)?].concat(),
            nodes: vec![StoreNode { path: "/libxl/1/type".into(), value: b"pvh".to_vec(), perms: vec!["n0".into()] }],
            userdata: vec![("libxl-json".into(), g.name.clone().into_bytes())],
        })
    }

    fn unfreeze(&self, guest: &Description) -> Result<()> {
        let mut guests = self.store()?;
        let g = guests.get_mut(&guest.identity.domid).ok_or_else(|| Trouble::new("gone"))?;
        (g.frozen, g.attached) = (false, true);
        Ok(self.xen.bind_ports(guest.identity.domid, true)?)
    }

    fn is_detached(&self, guest: &Description) -> bool {
        self.guests().get(&guest.identity.domid).is_some_and(|g| !g.attached)
    }

    fn abandon(&self, _guest: &Description) -> Result<()> {
        Ok(())
    }

    fn forget(&self, guest: &Description) -> Result<()> {
        self.guests().remove(&guest.identity.domid);
        Ok(())
    }

    fn fits(&self, _offer: &Offer) -> Vec<String> {
        self.lacks.clone()
    }

    fn prepare(&self, offer: &Offer) -> Result<()> {
        self.guests().insert(offer.identity.domid, Guest { name: offer.identity.name.clone(), ..Guest::default() });
        Ok(())
    }

    fn unpack(&self, offer: &Offer, luggage: &Luggage) -> Result<()> {
        let json = luggage.store.strip_prefix(IDENT).ok_or_else(|| Trouble::new("no store in the image"))?;
        let mut guests = self.guests();
        let g = guests.get_mut(&offer.identity.domid).ok_or_else(|| Trouble::new("not prepared"))?;
        g.nodes = serde_json::from_slice(json)?;
        Ok(())
    }

    fn go(&self, offer: &Offer, luggage: &Luggage) -> Result<()> {
        let mut guests = self.guests();
        let g = guests.get_mut(&offer.identity.domid).ok_or_else(|| Trouble::new("not prepared"))?;
        if luggage.userdata.is_empty() {
            return Err(Trouble::new("the toolstack's files are missing"));
        }
        g.attached = true;
        Ok(self.xen.bind_ports(offer.identity.domid, true)?)
    }

    fn packets(&self, _details: &serde_json::Value) -> Result<Box<dyn Packets>> {
        Ok(Box::new(NoVifs))
    }

    fn announce(&self, offer: &Offer) -> Result<()> {
        let mut guests = self.guests();
        let g = guests.get_mut(&offer.identity.domid).ok_or_else(|| Trouble::new("not prepared"))?;
        g.announced = true;
        Ok(())
    }

    fn discard(&self, offer: &Offer) -> Result<()> {
        self.guests().remove(&offer.identity.domid);
        Ok(())
    }
}
