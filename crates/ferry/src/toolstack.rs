//! The real service domain, put together from pv-backend and xenstore-client for the engine.

use crate::keeper::Book;
use crate::{autostart, stock_save, undo};
use hypervisor::{DomId, GtPortKind, Hypervisor};
use migrate::guest::{Device, GuestKind, Identity, Offer};
use migrate::toolstack::{Description, Luggage, Packets, Toolstack};
use migrate::{Doing, Result, Trouble};
use pv_backend::console::Hold;
use pv_backend::device::Inventory;
use pv_backend::disk::Evidence;
use pv_backend::dom0::Dom0;
use pv_backend::frozen::{self, Frozen};
use pv_backend::machine::Machine;
use pv_backend::records::{self, Node, Records};
use pv_backend::source::Limits;
use pv_backend::store::Store;
use pv_backend::{Refusal, announce, console, destination, device, disk, source};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use xenstore_client::migration::Notify;
use xenstore_client::{Access, Client, Errno, Nodes, Perm};

/// A frame that is lost does no harm if the announcement comes again after this.
const ANNOUNCE_AGAIN: Duration = Duration::from_millis(100);

/// Where libxl keeps the names of CPU pools.
const POOLS: &str = "/local/pool";

/// dom0 of this host.
pub struct ServiceDomain {
    hypervisor: Arc<dyn Hypervisor>,
    machine: Dom0,
    limits: Limits,
    /// What a roll-back needs, one file for each guest that is frozen.
    undo: PathBuf,
    holds: Mutex<BTreeMap<u16, Hold>>,
    /// Guests that came in and have no process of `xl`.
    book: Book,
}

impl std::fmt::Debug for ServiceDomain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServiceDomain").field("undo", &self.undo).finish_non_exhaustive()
    }
}

/// The network devices of a guest's vifs.
struct Vifs {
    machine: Dom0,
    vifs: Vec<String>,
}

impl Packets for Vifs {
    fn received(&mut self) -> Option<u64> {
        if self.vifs.is_empty() { None } else { self.vifs.iter().map(|vif| self.machine.packets(vif)).sum() }
    }
}

/// What travels in an offer for the destination's [`ServiceDomain`].
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Details {
    inventory: Inventory,
    /// By device number.
    #[serde(default)]
    disks: BTreeMap<u32, Evidence>,
}

impl Details {
    fn read(details: &serde_json::Value) -> Result<Details> {
        serde_json::from_value(details.clone()).doing("read what the guest's devices are")
    }
}

fn inventory(details: &serde_json::Value) -> Result<Inventory> {
    Ok(Details::read(details)?.inventory)
}

/// A guest may be paused while the store is asked. Healthy, it answers within milliseconds; its update may take a second, and one that was
/// killed is back by then.
pub(crate) const STORE_ANSWERS: Duration = Duration::from_secs(5);

/// A connection for one step; the next step has one of its own, with whatever daemon there is then.
fn store() -> Result<Client> {
    Client::open_within(STORE_ANSWERS).doing("")
}

impl ServiceDomain {
    /// `state` is the daemon's folder.
    pub fn new(hypervisor: Arc<dyn Hypervisor>, state: &Path) -> Result<ServiceDomain> {
        let undo = state.join("undo");
        std::fs::create_dir_all(&undo)?;
        Ok(ServiceDomain {
            hypervisor,
            machine: Dom0,
            limits: Limits::default(),
            undo,
            holds: Mutex::default(),
            book: Book::open(state)?,
        })
    }

    /// The domain that an operator means by a name or a number.
    pub fn find(which: &str) -> Result<DomId> {
        let mut store = store()?;
        let guests = store.list("/local/domain").doing("list domains")?.unwrap_or_default();
        let named = guests.iter().filter_map(|id| id.parse::<u16>().ok()).find(|id| {
            let name = store.text(&format!("/local/domain/{id}/name"));
            name.is_ok_and(|name| name.as_deref() == Some(which))
        });
        let number = which.parse::<u16>().ok().filter(|id| guests.iter().any(|g| *g == id.to_string()));
        match named.or(number) {
            Some(0) => Err(Trouble::new("dom0 itself can't move")),
            Some(id) => Ok(DomId(id)),
            None => Err(Trouble::new("there is no such domain").todo("`xl list` shows those that there are")),
        }
    }

    fn holds(&self) -> std::sync::MutexGuard<'_, BTreeMap<u16, Hold>> {
        self.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn export(store: &mut Client, domid: u16, prefixes: &[String]) -> Result<Vec<u8>> {
    let prefixes: Vec<&str> = prefixes.iter().map(String::as_str).collect();
    store.export_domain(domid, &prefixes).doing("export its part of the store")
}

/// An operation of the store's that may have been done by an attempt before this one.
fn unless_done(result: xenstore_client::Result<()>, done: Errno) -> Result<()> {
    match result {
        Err(error) if error.errno() == Some(done) => Ok(()),
        other => other.doing(""),
    }
}

impl Toolstack for ServiceDomain {
    fn describe(&self, dom: DomId) -> Result<Description> {
        self.alone(dom)?;
        let mut store = store()?;
        if store.ferry_features().doing("ask xenstored what it can do")?.is_empty() {
            return Err(Trouble::new("this host's xenstored can't carry a guest's connection")
                .todo("let Ferry's take over; `ferry host check` tells how"));
        }
        let info = self.hypervisor.domain_info(dom)?;
        let home = format!("/local/domain/{dom}");
        let name = store.text(&format!("{home}/name")).doing("read its name")?.unwrap_or_else(|| dom.to_string());
        let kind = match store.text(&format!("/libxl/{dom}/type")).doing("read its type")?.as_deref() {
            Some("pvh") => GuestKind::Pvh,
            Some("hvm") => GuestKind::Hvm,
            other => {
                let what = other.unwrap_or("unknown to libxl");
                return Err(Trouble::new(format!(
                    "its type is {what}; only HVM and PVH guests can move transparently"
                )));
            }
        };
        let inventory = device::discover(&mut store, dom.0).doing("find its devices")?;
        let mut refused = inventory.refused.clone();
        refused.extend(device::judge_channels(&*self.hypervisor, &inventory).doing("look who is connected with it")?);
        if let Some(config) = autostart::starts(Path::new(autostart::FOLDER), &name, info.uuid) {
            let why =
                "starts it when this host boots, while it runs elsewhere; move that file to the destination first";
            refused.push(Refusal::new(config.display().to_string(), why));
        }
        let disks = disk::survey(&self.machine, &inventory.devices).unwrap_or_else(|why| {
            refused.extend(why);
            BTreeMap::new()
        });
        if !refused.is_empty() {
            let list: Vec<String> = refused.iter().map(ToString::to_string).collect();
            return Err(Trouble::new(list.join("; ")));
        }
        let devices = inventory.devices.iter().map(|d| Device {
            class: d.class.name().into(),
            devid: d.devid,
            backend_domid: 0,
            frontend: d.frontend.clone(),
            backend: d.backend.clone(),
            frontend_state: d.frontend_state.parse().unwrap_or(0),
            backend_state: d.backend_state.parse().unwrap_or(0),
            needs: ["bridge", "mac", "params", "sectors", "sector-size", "mode", "script"]
                .into_iter()
                .filter_map(|key| Some((key.to_owned(), d.node(key)?.to_owned())))
                .collect(),
        });
        Ok(Description {
            identity: Identity { domid: dom, uuid: info.uuid, name, kind },
            devices: devices.collect(),
            details: serde_json::to_value(Details { inventory, disks })?,
        })
    }

    fn alone(&self, dom: DomId) -> Result<()> {
        stock_save::refuse(Path::new(stock_save::PROC), dom)
    }

    fn pool_name(&self, id: u32) -> Result<Option<String>> {
        store()?.text(&format!("{POOLS}/{id}/name")).doing("read its CPU pool's name")
    }

    fn pool_named(&self, name: &str) -> Result<Option<u32>> {
        let mut store = store()?;
        for id in store.list(POOLS).doing("list CPU pools")?.unwrap_or_default() {
            let found = store.text(&format!("{POOLS}/{id}/name")).doing("read a CPU pool's name")?;
            if found.as_deref() == Some(name) {
                return Ok(id.parse().ok());
            }
        }
        Ok(None)
    }

    fn freeze(&self, guest: &Description) -> Result<()> {
        let inventory = inventory(&guest.details)?;
        let domid = guest.identity.domid.0;
        let mut store = store()?;
        unless_done(store.freeze_domain(domid), Errno::EBUSY)?;
        // One export instead of hundreds of round trips: the guest stands still meanwhile.
        let prefixes = frozen::prefixes(domid, &guest.identity.uuid.to_string());
        let export = export(&mut store, domid, &prefixes)?;
        let mut frozen = Frozen::from_stream(&export).doing("read the frozen store")?;
        // The destination has made its devices from what was found before the copying. Nothing has been touched yet.
        let now = device::discover(&mut frozen, domid).doing("find its devices again")?;
        if let Some(what) = device::changed(&inventory, &now) {
            return Err(
                Trouble::new(format!("its devices changed while its memory was copied: {what}")).todo("try again")
            );
        }
        let snapshot = source::snapshot(&self.machine, &mut frozen, &inventory).doing("remember the devices' nodes")?;
        undo::write(&self.undo, guest.identity.uuid, domid, &snapshot).doing("write what a roll-back needs")?;
        if let Some(console) = &inventory.console
            && let Some(hold) = console::hold(console).doing("hold the console")?
        {
            self.holds().insert(domid, hold);
        }
        Ok(())
    }

    fn detach(&self, guest: &Description) -> Result<()> {
        let inventory = inventory(&guest.details)?;
        let released = source::release(&self.machine, &*self.hypervisor, &inventory, &self.limits).doing("")?;
        tracing::info!("backends released: {released:?}");
        Ok(())
    }

    fn pack(&self, guest: &Description) -> Result<Luggage> {
        let domid = guest.identity.domid.0;
        let uuid = guest.identity.uuid.to_string();
        // libxl's nodes ride in the stream, so that the destination need not write them one by one.
        let stream = export(&mut store()?, domid, &frozen::importable(domid, &uuid))?;
        let mut frozen = Frozen::from_stream(&stream).doing("read the frozen store")?;
        let books =
            records::capture(&mut frozen, domid, &uuid, Path::new(records::USERDATA)).doing("read libxl's records")?;
        Ok(Luggage { store: stream, nodes: Vec::new(), userdata: books.userdata })
    }

    fn unfreeze(&self, guest: &Description) -> Result<()> {
        // The backends are not touched before it is whole on disk.
        let snapshot = undo::read(&self.undo, guest.identity.uuid, guest.identity.domid.0)?;
        let inventory = inventory(&guest.details)?;
        let mut store = store()?;
        if let Some(snapshot) = snapshot {
            source::rollback(&self.machine, &mut store, &*self.hypervisor, &inventory, &snapshot, &self.limits)
                .doing("")?;
        }
        let prefixes = source::event_prefixes(&inventory);
        let prefixes: Vec<&str> = prefixes.iter().map(String::as_str).collect();
        unless_done(store.thaw_domain(guest.identity.domid.0, &prefixes), Errno::EINVAL)?;
        // A daemon that was killed has left the terminal stopped.
        if let Some(console) = &inventory.console
            && let Err(error) = console::release(console)
        {
            tracing::warn!("domain {}: {error}", guest.identity.domid);
        }
        self.holds().remove(&guest.identity.domid.0);
        undo::remove(&self.undo, guest.identity.uuid)
    }

    fn is_detached(&self, guest: &Description) -> bool {
        // What a roll-back needs is on disk before any of them is touched.
        !matches!(undo::read(&self.undo, guest.identity.uuid, guest.identity.domid.0), Ok(None))
    }

    fn abandon(&self, guest: &Description) -> Result<()> {
        self.holds().remove(&guest.identity.domid.0);
        undo::remove(&self.undo, guest.identity.uuid)
    }

    fn forget(&self, guest: &Description) -> Result<()> {
        let domid = guest.identity.domid.0;
        let inventory = inventory(&guest.details)?;
        let mut store = store()?;
        self.holds().remove(&domid);
        source::retire(&self.machine, &mut store, &inventory.devices, &self.limits).doing("clear its devices away")?;
        // xenstored sees by itself that the domain is gone, but perhaps not before the nodes are removed.
        unless_done(store.release(domid), Errno::ENOENT).or_else(|error| {
            tracing::debug!("release domain {domid}: {error}");
            Ok::<(), Trouble>(())
        })?;
        let uuid = guest.identity.uuid.to_string();
        records::remove(&mut store, domid, &uuid, Path::new(records::USERDATA)).doing("remove its records")?;
        records::quarantine(domid, Path::new(records::RUN)).doing("")?;
        self.book.remove(guest.identity.uuid)?;
        undo::remove(&self.undo, guest.identity.uuid)
    }

    fn fits(&self, offer: &Offer) -> Vec<String> {
        let mut why = Vec::new();
        let mut store = match store() {
            Ok(store) => store,
            Err(error) => return vec![error.to_string()],
        };
        match store.ferry_features() {
            Ok(features) if !features.is_empty() => {}
            Ok(_) => why.push(
                "the destination's xenstored can't carry a guest's connection; let Ferry's take over there \
                 (`ferry host check` tells how)"
                    .into(),
            ),
            Err(error) => why.push(format!("the destination's xenstored: {error}")),
        }
        let guests = store.list("/local/domain").ok().flatten().unwrap_or_default();
        for id in guests {
            let name = store.text(&format!("/local/domain/{id}/name")).ok().flatten();
            if name.as_deref() == Some(&offer.identity.name) {
                why.push(format!("the name {} is taken on the destination by domain {id}", offer.identity.name));
            }
        }
        match Details::read(&offer.toolstack) {
            Ok(Details { inventory, disks }) => {
                let misfits = destination::check(&self.machine, &inventory.devices, &disks);
                why.extend(misfits.iter().map(ToString::to_string));
            }
            Err(error) => why.push(error.to_string()),
        }
        why
    }

    fn prepare(&self, offer: &Offer) -> Result<()> {
        let inventory = inventory(&offer.toolstack)?;
        let mut store = store()?;
        let domid = offer.identity.domid.0;
        let home = format!("/local/domain/{domid}");
        store.mkdir(&home).doing("make its part of the store")?;
        let perms = [Perm::new(Access::NONE, 0), Perm::new(Access::READ, domid)];
        store.set_perms(&home, &perms).doing("make its part of the store")?;
        // Hotplug scripts look for these.
        for (key, value) in [("name", offer.identity.name.clone()), ("vm", format!("/vm/{}", offer.identity.uuid))] {
            Nodes::write(&mut store, &format!("{home}/{key}"), value).doing("make its part of the store")?;
        }
        destination::prepare(&self.machine, &mut store, &inventory.devices, &self.limits).doing("")
    }

    fn unpack(&self, offer: &Offer, luggage: &Luggage) -> Result<()> {
        let domid = offer.identity.domid.0;
        let mut store = store()?;
        let uuid = offer.identity.uuid.to_string();
        frozen::check_import(&luggage.store, domid, &uuid).doing("look at its part of the store")?;
        store.import_domain(domid, &luggage.store, Notify::Nobody).doing("import its part of the store")?;
        let books = Records {
            nodes: luggage
                .nodes
                .iter()
                .map(|n| Node { path: n.path.clone(), value: n.value.clone(), permissions: n.perms.clone() })
                .collect(),
            userdata: luggage.userdata.clone(),
        };
        records::install(&mut store, domid, &uuid, &books, Path::new(records::USERDATA)).doing("write libxl's records")
    }

    fn go(&self, offer: &Offer, _luggage: &Luggage) -> Result<()> {
        let inventory = inventory(&offer.toolstack)?;
        let domid = offer.identity.domid.0;
        let mut store = store()?;
        destination::connect(&self.machine, &mut store, &inventory.devices, &self.limits).doing("")?;
        let introduced = store.is_introduced(domid).doing("")?;
        // xenconsoled overlooks the introduction of a domain that it knows: it saw the shell if some other domain came or went. This it
        // does not overlook; the guest does, whose watches are served from the attaching on.
        console::attach(&mut store, &inventory, introduced).doing("make xenconsoled look at the console")?;
        if let Some(port) = inventory.store_port
            && !introduced
        {
            store.attach_domain(domid, port).doing("connect xenstored with the guest")?;
        }
        self.wait_console(&inventory)
    }

    fn packets(&self, details: &serde_json::Value) -> Result<Box<dyn Packets>> {
        let devices = inventory(details)?.devices;
        let vifs =
            devices.iter().filter(|device| device.class == device::Class::Vif).map(device::Device::netdev).collect();
        Ok(Box::new(Vifs { machine: self.machine, vifs }))
    }

    fn announce(&self, offer: &Offer) -> Result<()> {
        let identity = &offer.identity;
        self.book
            .add(identity.domid.0, identity.uuid, &identity.name)
            .doing("note that its shutting down is to be watched for")?;
        let inventory = inventory(&offer.toolstack)?;
        announce::announce(&self.machine, &inventory.devices).doing("")?;
        let (machine, devices) = (self.machine, inventory.devices);
        std::thread::Builder::new().name("announce".into()).spawn(move || {
            std::thread::sleep(ANNOUNCE_AGAIN);
            if let Err(error) = announce::announce(&machine, &devices) {
                tracing::warn!("second announcement: {error}");
            }
        })?;
        Ok(())
    }

    fn discard(&self, offer: &Offer) -> Result<()> {
        let inventory = inventory(&offer.toolstack)?;
        let domid = offer.identity.domid.0;
        let mut store = store()?;
        destination::abort(&self.machine, &mut store, &inventory.devices, &self.limits).doing("")?;
        if self.hypervisor.domain_info(offer.identity.domid).is_ok() {
            source::wait_drained(&self.machine, &*self.hypervisor, &inventory, self.limits.rollback_drain)
                .doing("let the backends finish")?;
        }
        // xenconsoled may hold the shell's page by now, and hears of its end only from a connection that ends with it: else the shell would
        // stay a zombie under the guest's domid. So one is made where there is none yet, and none is released here.
        let attached = match inventory.store_port {
            Some(port) if self.hypervisor.domain_info(offer.identity.domid).is_ok() => {
                match store.attach_domain(domid, port) {
                    Ok(()) => true,
                    Err(error) => error.errno() == Some(Errno::EISCONN),
                }
            }
            _ => false,
        };
        if !attached {
            unless_done(store.abort_import(domid), Errno::ENOENT)?;
        }
        let uuid = offer.identity.uuid.to_string();
        records::remove(&mut store, domid, &uuid, Path::new(records::USERDATA)).doing("remove its records")
    }
}

impl ServiceDomain {
    /// xenconsoled connects by itself when the guest is introduced. The guest does not need it to run, so only a little patience.
    fn wait_console(&self, inventory: &Inventory) -> Result<()> {
        let Some(console) = &inventory.console else { return Ok(()) };
        for _ in 0..20 {
            let gt = self.hypervisor.gt_state(DomId(inventory.domid))?;
            let connected =
                |p: &&hypervisor::GtPort| p.port == console.port && matches!(p.kind, GtPortKind::Interdomain { .. });
            if gt.ports.iter().any(|p| connected(&p)) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        tracing::warn!("domain {}: xenconsoled has not taken the console yet", inventory.domid);
        Ok(())
    }
}
