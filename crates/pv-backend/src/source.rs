//! The source: make the backends let go, prove it, and take the guest up again if it stays.
//!
//! Order for a migration, with the guest paused and its store connection frozen:
//! [`snapshot`] → [`release`] → (capture the guest) → [`rollback`], or [`retire`] once it runs elsewhere.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::device::{Class, Device, Inventory};
use crate::drain::{self, Channels};
use crate::error::{Error, Result, all};
use crate::machine::{BridgePort, Machine, Script};
use crate::store::{Store, restore};

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// From the first unbind until nothing of the guest is held any more.
    pub drain: Duration,
    /// The same before a rollback binds again: a guest whose disk hangs waits rather than lose requests.
    pub rollback_drain: Duration,
    /// Until a backend is ready or connected.
    pub connect: Duration,
    /// For one hotplug script.
    pub script: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let s = Duration::from_secs;
        Limits { drain: s(5), rollback_drain: s(60), connect: s(10), script: s(30) }
    }
}

/// Wait between two looks at the hypervisor.
pub(crate) const POLL: Duration = Duration::from_micros(500);

/// Waits between two looks at the store, growing from 0.25 to 5 ms: the daemon that answers also serves the drivers that
/// are waited for.
#[derive(Debug)]
pub(crate) struct Patience(Duration);

impl Patience {
    pub(crate) fn new() -> Self {
        Patience(Duration::from_micros(250))
    }

    pub(crate) fn wait(&mut self, machine: &dyn Machine) {
        machine.sleep(self.0);
        self.0 = (self.0 * 3 / 2).min(Duration::from_millis(5));
    }
}

/// The nodes of every device's two areas as they were when the guest was frozen. It goes into the journal, so that a
/// rollback after a crash finds it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// By area, then by relative path.
    pub areas: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// Vifs' network devices that are in a bridge, by the device's name on the bus of backends.
    pub ports: BTreeMap<String, BridgePort>,
}

/// How the vifs' network devices are set up now.
fn bridge_ports(machine: &dyn Machine, inventory: &Inventory) -> BTreeMap<String, BridgePort> {
    let vifs = inventory.devices.iter().filter(|device| device.class == Class::Vif);
    vifs.filter_map(|device| Some((device.bus_id(), machine.bridge_port(&device.netdev())?))).collect()
}

/// Takes the snapshot; within the blackout, from a [`crate::frozen::Frozen`]. netback's unbind deletes nodes and the network
/// device, so before it.
pub fn snapshot(machine: &dyn Machine, store: &mut dyn Store, inventory: &Inventory) -> Result<Snapshot> {
    let mut areas = BTreeMap::new();
    for device in &inventory.devices {
        for area in [&device.frontend, &device.backend] {
            areas.insert(area.clone(), store.tree(area)?);
        }
    }
    Ok(Snapshot { areas, ports: bridge_ports(machine, inventory) })
}

/// What the release cost.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Released {
    /// Unbinding each device, by its name on the bus; they run side by side.
    pub unbind: BTreeMap<String, Duration>,
    /// From the first unbind to the proof.
    pub total: Duration,
}

/// Runs `work` for every device at the same time and gives all results in order.
pub(crate) fn each<T: Send>(devices: &[Device], work: impl Fn(&Device) -> T + Sync) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = devices.iter().map(|device| scope.spawn(move || work(device))).collect();
        // A panic in a thread is a mistake of ours and goes on in this one.
        threads.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// Unbinds every backend of the paused guest and waits until the hypervisor shows that none holds anything of it.
///
/// # Errors
/// Names the device that could not be unbound, or what is still held at the time limit. Call [`rollback`] then.
pub fn release(
    machine: &dyn Machine,
    channels: &(impl Channels + ?Sized),
    inventory: &Inventory,
    limits: &Limits,
) -> Result<Released> {
    let start = machine.now();
    let unbound = each(&inventory.devices, |device| {
        let before = machine.now();
        unbind(machine, device).map(|()| (device.bus_id(), machine.now() - before))
    });
    let mut released = Released::default();
    let mut errors = Vec::new();
    for result in unbound {
        match result {
            Ok((name, took)) => {
                released.unbind.insert(name, took);
            }
            Err(error) => errors.push(error),
        }
    }
    all(errors)?;
    wait_drained(machine, channels, inventory, limits.drain)?;
    released.total = machine.now() - start;
    Ok(released)
}

pub(crate) fn unbind(machine: &dyn Machine, device: &Device) -> Result<()> {
    let (driver, name) = (device.class.name(), device.bus_id());
    if !machine.is_bound(driver, &name) {
        return Ok(());
    }
    machine.unbind(driver, &name).map_err(|source| Error::Sysfs {
        device: name,
        driver: driver.to_owned(),
        action: "unbind",
        source,
    })
}

/// Waits for the proof of [`drain::left`].
pub fn wait_drained(
    machine: &dyn Machine,
    channels: &(impl Channels + ?Sized),
    inventory: &Inventory,
    limit: Duration,
) -> Result<()> {
    let start = machine.now();
    loop {
        // The whole proof costs a hypercall for each port and a copy of the table: first the cheap half.
        let left = if drain::device_ports_connected(channels, inventory)? && machine.now() - start < limit {
            None
        } else {
            Some(drain::left(channels, inventory)?)
        };
        match left {
            Some(left) if left.is_empty() => return Ok(()),
            Some(left) if machine.now() - start >= limit => {
                return Err(Error::NotDrained { domid: inventory.domid, after: limit, left });
            }
            _ => machine.sleep(POLL),
        }
    }
}

/// Gives the guest its backends again, on the same host: waits until what was unbound is drained, binds, puts the vifs
/// into their bridges, waits until every backend is where it was, and puts every node back to what it was.
///
/// Can be called in any state that [`release`] may leave, and again. Goes on after an error, so that one device that
/// fails does not keep the others away; the guest must not be resumed before it returns `Ok`.
///
/// The store's events for the devices' areas must be kept from the guest (`Client::thaw_domain` with
/// [`event_prefixes`]); the backends' states go through 2 to 4 meanwhile.
pub fn rollback(
    machine: &dyn Machine,
    store: &mut dyn Store,
    channels: &(impl Channels + ?Sized),
    inventory: &Inventory,
    snapshot: &Snapshot,
    limits: &Limits,
) -> Result<()> {
    // What somebody has taken from the guest meanwhile (`xl block-detach --force`) can't be given back, and must not keep it paused.
    let mut here = Vec::new();
    let mut gone: Vec<&str> = Vec::new();
    for device in &inventory.devices {
        if machine.is_present(&device.bus_id()) || store.read(&device.backend)?.is_some() {
            here.push(device.clone());
        } else {
            tracing::warn!(
                "{}: it was removed from this host meanwhile; the guest goes on without it",
                device.bus_id()
            );
            gone.extend([device.frontend.as_str(), device.backend.as_str()]);
        }
    }
    // One that failed at an attempt before this is bound, and tries again only when it is bound anew. So would be one that its kernel has
    // complained of at any time before; the guest stands still, and that does it no harm.
    for device in &here {
        if store.read(&device.error_node())?.is_some() {
            unbind(machine, device)?;
        }
    }
    let (bound, free): (Vec<Device>, Vec<Device>) =
        here.iter().cloned().partition(|device| machine.is_bound(device.class.name(), &device.bus_id()));
    // With a device still at work its grants can't be told from those of one that drains; then only the event channels of
    // the free ones are waited for.
    let draining = Inventory { devices: free.clone(), ..inventory.clone() };
    if bound.is_empty() {
        wait_drained(machine, channels, &draining, limits.rollback_drain)?;
    } else {
        let start = machine.now();
        while drain::device_ports_connected(channels, &draining)? && machine.now() - start < limits.rollback_drain {
            machine.sleep(POLL);
        }
    }
    // What its kernel says from here on is of this attempt.
    for device in &free {
        store.remove(&device.error_area())?;
    }
    let mut errors: Vec<Error> = each(&free, |device| {
        let (driver, name) = (device.class.name(), device.bus_id());
        machine.bind(driver, &name).map_err(|source| Error::Sysfs {
            device: name,
            driver: driver.to_owned(),
            action: "bind",
            source,
        })?;
        match (device.class, snapshot.ports.get(&device.bus_id())) {
            // What the script would do again, at a fraction of its time. Firewall rules name the device and are still there. A
            // device that is to be renamed, and one that is not in a bridge, is the script's.
            (Class::Vif, Some(port)) if device.node("vifname").is_none() && by_bridge(device) => {
                machine.join_bridge(&device.netdev(), port).or_else(|error| {
                    tracing::warn!(
                        "{}: back into the bridge {}: {error}; its script is run",
                        device.bus_id(),
                        port.bridge
                    );
                    run(machine, device, "online", limits)
                })
            }
            (Class::Vif, _) => run(machine, device, "online", limits),
            // physical-device is still there.
            (Class::Vbd, _) => Ok(()),
        }
    })
    .into_iter()
    .filter_map(Result::err)
    .collect();
    // netback goes to state 4 when it reads this; the script writes it, and we do where no script ran.
    for device in free.iter().filter(|device| device.class == Class::Vif) {
        let path = format!("{}/hotplug-status", device.backend);
        if device.connected() && store.text(&path)?.is_none() {
            store.write(&path, b"connected")?;
        }
    }
    if let Err(error) = wait_states(machine, store, &here, limits.connect) {
        errors.push(error);
    }
    for (area, nodes) in snapshot.areas.iter().filter(|(area, _)| !gone.contains(&area.as_str())) {
        if let Err(error) = restore(store, area, nodes, &[]) {
            errors.push(error);
        }
    }
    all(errors)
}

/// Its script does no more than make it the port of a bridge: others (routes, Open vSwitch, VLANs) must be run again.
fn by_bridge(device: &Device) -> bool {
    device.node("script").is_none_or(|script| script.ends_with("/vif-bridge")) && device.node("vlan").is_none()
}

/// Prefixes of the store's paths whose events the guest must not see after a [`rollback`].
pub fn event_prefixes(inventory: &Inventory) -> Vec<String> {
    inventory.devices.iter().flat_map(|device| [device.frontend.clone(), device.backend.clone()]).collect()
}

/// A backend that has closed itself.
pub(crate) fn closed(store: &mut dyn Store, device: &Device, state: String) -> Error {
    // Why is an explanation only: without one the error is as true.
    match store.text(&device.error_node()) {
        Ok(Some(why)) => Error::Unconnected { device: device.bus_id(), why },
        _ => Error::Closed { device: device.bus_id(), state },
    }
}

/// Waits until every backend is in the state in which it was found, and its kernel has nothing against it: a netback that can't connect
/// goes to state 5 and at once on to 4 as if it had (`set_backend_state`, drivers/net/xen-netback/xenbus.c).
pub(crate) fn wait_states(
    machine: &dyn Machine,
    store: &mut dyn Store,
    devices: &[Device],
    limit: Duration,
) -> Result<()> {
    let start = machine.now();
    let mut errors = Vec::new();
    for device in devices {
        let path = format!("{}/state", device.backend);
        let mut patience = Patience::new();
        loop {
            let state = store.text(&path)?.unwrap_or_default();
            if state == device.backend_state {
                // It is written before the state.
                let why = store.text(&device.error_node())?;
                errors.extend(why.map(|why| Error::Unconnected { device: device.bus_id(), why }));
                break;
            }
            if state == "5" || state == "6" {
                errors.push(closed(store, device, state));
                break;
            }
            if machine.now() - start >= limit {
                let wanted = device.backend_state.clone();
                errors.push(Error::Stuck { device: device.bus_id(), state, wanted, after: limit });
                break;
            }
            patience.wait(machine);
        }
    }
    all(errors)
}

/// Runs a device's hotplug script as libxl does (tools/libs/light/libxl_linux.c, `libxl__get_hotplug_script_info`).
pub(crate) fn run(machine: &dyn Machine, device: &Device, action: &str, limits: &Limits) -> Result<()> {
    let Some(program) = device.node("script") else { return Ok(()) };
    let kind = device.class.name();
    let mut arguments = vec![action.to_owned()];
    let text = |name: &str, value: String| (name.to_owned(), value);
    let mut environment = vec![
        text("script", program.to_owned()),
        text("XENBUS_TYPE", kind.to_owned()),
        text("XENBUS_PATH", format!("backend/{kind}/{}/{}", device.domid, device.devid)),
        text("XENBUS_BASE_PATH", "backend".to_owned()),
    ];
    if device.class == Class::Vif {
        arguments.push("type_if=vif".to_owned());
        environment.push(text("netdev", device.node("gatewaydev").unwrap_or_default().to_owned()));
        // The kernel's name; the script renames it if the configuration says so.
        let original = format!("vif{}.{}", device.domid, device.devid);
        environment.push(text("vif", original));
    }
    let script = Script { program: program.to_owned(), arguments, environment };
    machine.run(&script, limits.script).map_err(|why| Error::Script {
        device: device.bus_id(),
        script: format!("{program} {action}"),
        why,
    })
}

/// Clears away what is left of the guest's devices here once it runs elsewhere and its domain is gone: scripts, bus
/// devices, both areas. Goes on after an error.
pub fn retire(machine: &dyn Machine, store: &mut dyn Store, devices: &[Device], limits: &Limits) -> Result<()> {
    // Without its area a script can't do anything, and has done it: this is called until it succeeds.
    let mut areas = Vec::new();
    for device in devices {
        if store.read(&device.backend)?.is_some() {
            areas.push(device.bus_id());
        }
    }
    let mut errors: Vec<Error> = each(devices, |device| {
        unbind(machine, device)?;
        if !areas.contains(&device.bus_id()) {
            return Ok(());
        }
        run(machine, device, if device.class == Class::Vif { "offline" } else { "remove" }, limits)
    })
    .into_iter()
    .filter_map(Result::err)
    .collect();
    for device in devices {
        // The kernel drops the bus device when its area goes.
        let error_area = device.error_area();
        for area in [&device.backend, &device.frontend, &error_area] {
            errors.extend(store.remove(area).err());
        }
        // As libxl does, the guest's directory of that kind goes with its last device.
        for area in [&device.backend, &error_area] {
            if let Some((parent, _)) = area.rsplit_once('/')
                && store.list(parent)?.is_some_and(|children| children.is_empty())
            {
                errors.extend(store.remove(parent).err());
            }
        }
    }
    all(errors)
}
