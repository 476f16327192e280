//! The guest's PV devices, found in the store, and whether each can move.

use std::collections::{BTreeMap, BTreeSet};

use hypervisor::{DomId, PortState};
use serde::{Deserialize, Serialize};

use crate::drain::Channels;
use crate::error::{Refusal, Result};
use crate::store::Store;

/// A class of device that can move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// netback.
    Vif,
    /// blkback.
    Vbd,
}

impl Class {
    /// Directory in the store, and name of the driver.
    pub fn name(self) -> &'static str {
        match self {
            Class::Vif => "vif",
            Class::Vbd => "vbd",
        }
    }
}

/// A vif or vbd as it was found, with all of its backend's nodes. This is what travels to the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its class.
    pub class: Class,
    /// Device number.
    pub devid: u32,
    /// The guest.
    pub domid: u16,
    /// The frontend's area, in the guest's part of the store.
    pub frontend: String,
    /// The backend's area.
    pub backend: String,
    /// Nodes of the backend's area, relative paths; values are text.
    pub nodes: BTreeMap<String, String>,
    /// The frontend's state: "4" when connected; some guests stay at "3".
    pub frontend_state: String,
    /// The backend's state.
    pub backend_state: String,
    /// The guest's event channels for it.
    pub ports: Vec<u32>,
    /// Queues in use.
    pub queues: u32,
    /// Pages of a ring are 2^this.
    pub ring_order: u32,
}

impl Device {
    /// Its name on the xen-backend bus: "vbd-7-51712".
    pub fn bus_id(&self) -> String {
        format!("{}-{}-{}", self.class.name(), self.domid, self.devid)
    }

    /// Where dom0's kernel writes what its backend has failed on.
    pub fn error_area(&self) -> String {
        format!("/local/domain/0/error/backend/{}/{}/{}", self.class.name(), self.domid, self.devid)
    }

    /// What dom0's kernel writes there: "22 guest requested 1 queues …".
    pub fn error_node(&self) -> String {
        format!("{}/error", self.error_area())
    }

    /// A node of the backend.
    pub fn node(&self, name: &str) -> Option<&str> {
        self.nodes.get(name).map(String::as_str)
    }

    /// The rings are in use.
    pub fn connected(&self) -> bool {
        self.backend_state == "4"
    }

    /// The network device in dom0 for a vif.
    pub fn netdev(&self) -> String {
        self.node("vifname").map_or_else(|| format!("vif{}.{}", self.domid, self.devid), str::to_owned)
    }
}

/// The guest's console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Console {
    /// Its area in the store: `/local/domain/<domid>/console`.
    pub area: String,
    /// The guest's event channel.
    pub port: u32,
    /// The pseudo-terminal on this host, if xenconsoled has made one.
    pub tty: Option<String>,
}

/// All that was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// The guest.
    pub domid: u16,
    /// vifs and vbds, by class and number.
    pub devices: Vec<Device>,
    /// The console, if there is one.
    pub console: Option<Console>,
    /// The guest's event channel to xenstored.
    pub store_port: Option<u32>,
    /// What cannot move.
    pub refused: Vec<Refusal>,
}

impl Inventory {
    /// Event channels that lead to dom0 and are known.
    pub fn known_ports(&self) -> BTreeSet<u32> {
        let devices = self.devices.iter().flat_map(|device| device.ports.iter().copied());
        devices.chain(self.console.as_ref().map(|console| console.port)).chain(self.store_port).collect()
    }
}

/// Why a kind of backend cannot move.
fn why_not(kind: &str) -> &'static str {
    match kind {
        "qdisk" => {
            "QEMU serves it and starts a ring afresh, which loses requests; give the disk as a block device \
             (format=raw, backendtype=phy)"
        }
        "pci" => "a device is passed through; detach it (xl pci-detach)",
        "vscsi" => "scsiback starts a ring afresh, which loses requests; detach it (xl scsi-detach)",
        "pvcalls" | "pvcalls-back" => "pvcalls keeps connections in the backend; detach it",
        "vkbd" | "vfb" => "QEMU serves it and cannot resume its ring; configure the guest without (vfb, keyboard)",
        "9pfs" => "the server's open files are lost; unmount and remove it",
        "vtpm" => "the vTPM stays behind; detach it",
        "usb" | "vusb" | "qusb" => "a USB device is passed through; detach it (xl usbdev-detach)",
        _ => "no backend is known that could take up its ring on another host; detach it",
    }
}

/// Reads the guest's devices out of the store. Only dom0's own backends are known; everything else is refused by name.
pub fn discover(store: &mut dyn Store, domid: u16) -> Result<Inventory> {
    let mut inventory = Inventory { domid, ..Inventory::default() };
    let home = format!("/local/domain/{domid}");
    inventory.store_port = store.number(&format!("{home}/store/port"))?;
    inventory.console = discover_console(store, &home, &mut inventory.refused)?;

    // Every pair of areas once: as libxl knows it, as the guest knows it, and as dom0's backends know it.
    let mut found: BTreeMap<String, (String, String)> = BTreeMap::new();
    for root in [format!("/libxl/{domid}/device"), format!("{home}/device")] {
        for kind in store.list(&root)?.unwrap_or_default() {
            for id in store.list(&format!("{root}/{kind}"))?.unwrap_or_default() {
                let area = format!("{root}/{kind}/{id}");
                if let Some(backend) = store.text(&format!("{area}/backend"))? {
                    found.entry(backend).or_insert((kind.clone(), id));
                }
            }
        }
    }
    for kind in store.list("/local/domain/0/backend")?.unwrap_or_default() {
        let root = format!("/local/domain/0/backend/{kind}/{domid}");
        for id in store.list(&root)?.unwrap_or_default() {
            found.entry(format!("{root}/{id}")).or_insert((kind.clone(), id));
        }
    }
    for (backend, (kind, id)) in found {
        judge(store, &mut inventory, &backend, &kind, &id)?;
    }
    inventory.devices.sort_by_key(|device| (device.class, device.devid));
    Ok(inventory)
}

fn judge(store: &mut dyn Store, inventory: &mut Inventory, backend: &str, kind: &str, id: &str) -> Result<()> {
    let domid = inventory.domid;
    let parts: Vec<&str> = backend.split('/').collect();
    // "", "local", "domain", service domain, "backend", kind, guest, number
    let ["", "local", "domain", service, "backend", backend_kind, guest, number] = parts[..] else {
        let why = format!("its backend's area {backend} is not where backends are");
        inventory.refused.push(Refusal::new(format!("{kind} {id}"), why));
        return Ok(());
    };
    let what = if kind == backend_kind { format!("{kind} {id}") } else { format!("{kind} {id} ({backend_kind})") };
    let mut refuse = |why: &str| inventory.refused.push(Refusal::new(what.clone(), why));
    if service != "0" {
        refuse(&format!("its backend is in domain {service}; only dom0's backends can be drained"));
        return Ok(());
    }
    let class = match backend_kind {
        "vif" => Class::Vif,
        "vbd" => Class::Vbd,
        "console" => {
            if id != "0" {
                refuse("only the first console can move; configure the guest without further ones");
            }
            return Ok(());
        }
        other => {
            refuse(why_not(other));
            return Ok(());
        }
    };
    let Ok(devid) = number.parse::<u32>() else {
        refuse("its number is none");
        return Ok(());
    };
    if guest != domid.to_string() {
        refuse(&format!("its backend's area {backend} is that of another domain"));
        return Ok(());
    }
    let nodes: BTreeMap<String, String> = store
        .tree(backend)?
        .into_iter()
        .filter(|(path, _)| !path.is_empty())
        .map(|(path, value)| (path, String::from_utf8_lossy(&value).into_owned()))
        .collect();
    let frontend = match nodes.get("frontend") {
        Some(frontend) if *frontend == format!("/local/domain/{domid}/device/{}/{devid}", class.name()) => {
            frontend.clone()
        }
        _ => {
            refuse("its backend does not name the guest's own area as its frontend");
            return Ok(());
        }
    };
    let frontend_state = store.text(&format!("{frontend}/state"))?.unwrap_or_default();
    let backend_state = nodes.get("state").cloned().unwrap_or_default();
    if class == Class::Vbd && nodes.get("type").is_some_and(|t| t != "phy") {
        refuse("it is not served by blkback (type is not phy)");
        return Ok(());
    }
    // Anything but a device at work, or one that the guest has not looked at yet, is on its way somewhere.
    if !matches!((frontend_state.as_str(), backend_state.as_str()), ("3" | "4", "4") | ("1", "2")) {
        refuse(&format!(
            "it is being connected or closed (frontend state {frontend_state:?}, backend state {backend_state:?}); \
             wait until it is done"
        ));
        return Ok(());
    }
    // What these have made netback keep goes with its unbind, and nobody can read it.
    if class == Class::Vif && store.text(&format!("{frontend}/request-multicast-control"))?.as_deref() == Some("1") {
        refuse(
            "its frontend has netback filter multicast, and the list of groups can't be moved; switch that off in the guest's driver",
        );
        return Ok(());
    }
    if class == Class::Vif && store.read(&format!("{frontend}/event-channel-ctrl"))?.is_some() {
        refuse(
            "its frontend has given netback a hash for its queues (control ring), which can't be moved; switch receive-side scaling off in \
             the guest's driver",
        );
        return Ok(());
    }
    let (mut ports, mut queues, mut ring_order) = (Vec::new(), 1, 0);
    if backend_state == "4" {
        (ports, queues, ring_order) = rings(store, &frontend)?;
        if ports.is_empty() {
            refuse("it is connected, but the guest's area names no event channel");
            return Ok(());
        }
    }
    inventory.devices.push(Device {
        class,
        devid,
        domid,
        frontend,
        backend: backend.to_owned(),
        nodes,
        frontend_state,
        backend_state,
        ports,
        queues,
        ring_order,
    });
    Ok(())
}

/// Event channels, number of queues, and order of ring pages that the frontend names.
///
/// Its area is the guest's to write, so numbers are taken for hints: what must be drained is judged by the hypervisor.
fn rings(store: &mut dyn Store, frontend: &str) -> Result<(Vec<u32>, u32, u32)> {
    let queues = store.number(&format!("{frontend}/multi-queue-num-queues"))?.unwrap_or(1);
    let ring_order = store.number(&format!("{frontend}/ring-page-order"))?.unwrap_or(0);
    let mut areas = vec![frontend.to_owned()];
    for name in store.list(frontend)?.unwrap_or_default() {
        if name.starts_with("queue-") {
            areas.push(format!("{frontend}/{name}"));
        }
    }
    let mut ports = BTreeSet::new();
    for area in areas {
        for name in ["event-channel", "event-channel-tx", "event-channel-rx", "event-channel-ctrl"] {
            ports.extend(store.number(&format!("{area}/{name}"))?);
        }
    }
    Ok((ports.into_iter().collect(), queues, ring_order))
}

fn discover_console(store: &mut dyn Store, home: &str, refused: &mut Vec<Refusal>) -> Result<Option<Console>> {
    let area = format!("{home}/console");
    let Some(port) = store.number(&format!("{area}/port"))? else { return Ok(None) };
    match store.text(&format!("{area}/type"))?.as_deref() {
        None | Some("xenconsoled") => {}
        Some(other) => refused.push(Refusal::new(
            "console",
            format!("it is served by {other}; only xenconsoled's can move (serial console of an HVM guest: remove it)"),
        )),
    }
    let tty = store.text(&format!("{area}/tty"))?.filter(|tty| tty.starts_with("/dev/pts/"));
    Ok(Some(Console { area, port, tty }))
}

/// What is not as it was when the guest was looked at before: a device that came, went or changed. `None`: all is.
pub fn changed(before: &Inventory, now: &Inventory) -> Option<String> {
    let same = |a: &&Device, b: &Device| (a.class, a.devid) == (b.class, b.devid);
    let title = |device: &Device| format!("{} {}", device.class.name(), device.devid);
    for device in &before.devices {
        match now.devices.iter().find(|d| same(d, device)) {
            None => return Some(format!("{} has gone", title(device))),
            Some(d) if d.frontend_state != device.frontend_state || d.backend_state != device.backend_state => {
                let (was, is) =
                    ((&device.frontend_state, &device.backend_state), (&d.frontend_state, &d.backend_state));
                return Some(format!("{} went from states {was:?} to {is:?} (frontend, backend)", title(device)));
            }
            Some(d) if d != device => {
                let differs = |name: &&String| d.nodes.get(*name) != device.nodes.get(*name);
                let node = d.nodes.keys().chain(device.nodes.keys()).find(differs);
                return Some(match node {
                    Some(node) => format!("{}: its backend's node {node} changed", title(device)),
                    None => format!("{} has other rings or event channels", title(device)),
                });
            }
            Some(_) => {}
        }
    }
    if let Some(device) = now.devices.iter().find(|d| !before.devices.iter().any(|b| same(d, b))) {
        return Some(format!("{} has come", title(device)));
    }
    if let Some(refusal) = now.refused.iter().find(|refusal| !before.refused.contains(refusal)) {
        return Some(refusal.to_string());
    }
    (before.console != now.console || before.store_port != now.store_port)
        .then(|| "its console or its connection with the store is another".to_owned())
}

/// What of the guest's event channels and grants cannot move: those that lead to another domain than dom0, and event
/// channels to a program in dom0 that is not known.
pub fn judge_channels(channels: &(impl Channels + ?Sized), inventory: &Inventory) -> Result<Vec<Refusal>> {
    let known = inventory.known_ports();
    let mut refused = Vec::new();
    for (port, state) in channels.ports(inventory.domid)? {
        let (remote, does) = match state {
            PortState::Unbound { remote } => (remote, "waits for"),
            PortState::Interdomain { remote, .. } => (remote, "is connected to"),
            _ => continue,
        };
        let what = format!("event channel {port}");
        if remote == DomId::DOM0 {
            if matches!(state, PortState::Interdomain { .. }) && !known.contains(&port) {
                let why = "a program in dom0 that is not known holds its other end; stop it (vchan, device model, …)";
                refused.push(Refusal::new(what, why));
            }
        } else if remote.0 != inventory.domid {
            refused.push(Refusal::new(what, format!("it {does} domain {remote}, which does not move with the guest")));
        }
    }
    let mut others: BTreeMap<u16, u32> = BTreeMap::new();
    for grant in channels.grants(inventory.domid)?.iter().filter(|grant| grant.domid != 0) {
        // A guest may grant pages to itself (to copy between them, say). That moves, but a mapping of its own it would lose.
        if grant.domid != inventory.domid || grant.in_use {
            *others.entry(grant.domid).or_default() += 1;
        }
    }
    for (domid, count) in others {
        let why = if domid == inventory.domid {
            format!("the guest has mapped {count} pages that it granted to itself; mappings do not move")
        } else {
            format!("{count} pages are granted to domain {domid}, which does not move with the guest")
        };
        refused.push(Refusal::new("grant table", why));
    }
    Ok(refused)
}
