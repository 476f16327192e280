//! The destination: backends ready before the blackout, connected in it.
//!
//! Order: [`check`] (nothing is touched) → [`prepare`] (before the blackout) → restore the guest: memory, grant table,
//! event channels, its part of the store → commit → [`connect`] → resume. [`abort`] instead of, or after, any of them.
//!
//! The backends' areas are made here, not by importing the source's: dom0's kernel only looks at a backend whose state
//! is 1. A backend may carry out queued writes the moment it is connected, so `connect` comes after the commit.

use std::collections::BTreeMap;

use xenstore_client::{Access, Perm};

use crate::device::{Class, Device};
use crate::disk::Evidence;
use crate::error::{Error, Refusal, Result, all};
use crate::machine::Machine;
use crate::source::{Limits, POLL, Patience, closed, each, retire, run, wait_states};
use crate::store::{Store, join};

/// Nodes of a backend that belong to the host it runs on: left as this host's backends and scripts wrote them.
pub const HOST_BOUND: [&str; 3] = ["physical-device", "physical-device-path", "node"];

/// When a node of a backend's area is written, and by whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writer {
    /// The toolstack, before everything else.
    Toolstack,
    /// The driver when it probes, up to state 2.
    Probe,
    /// The driver when it connects (blkback), up to state 4.
    Connect,
    /// State, hotplug script, and what belongs to the host.
    Host,
}

fn writer(class: Class, name: &str) -> Writer {
    if HOST_BOUND.contains(&name) || matches!(name, "state" | "hotplug-status" | "hotplug-error") {
        return Writer::Host;
    }
    match (class, name) {
        (_, "multi-queue-max-queues") | (Class::Vbd, "max-ring-page-order" | "feature-max-indirect-segments") => {
            Writer::Probe
        }
        (Class::Vif, name) if name.starts_with("feature-") => Writer::Probe,
        (Class::Vbd, "sectors" | "info" | "sector-size" | "physical-sector-size") => Writer::Connect,
        (Class::Vbd, "discard-enable") => Writer::Toolstack,
        (Class::Vbd, name) if name.starts_with("feature-") || name.starts_with("discard-") => Writer::Connect,
        _ => Writer::Toolstack,
    }
}

/// Whether this host can take these devices: drivers, bridges, scripts, queues and ring pages, and disks, which must be those that the
/// source tells of in `disks`, by device number. Touches nothing.
pub fn check(machine: &dyn Machine, devices: &[Device], disks: &BTreeMap<u32, Evidence>) -> Vec<Refusal> {
    let mut refused = Vec::new();
    for device in devices {
        let what = format!("{} {}", device.class.name(), device.devid);
        let mut refuse = |why: String| refused.push(Refusal::new(what.clone(), why));
        if let Some(script) = device.node("script")
            && !machine.is_program(script)
        {
            refuse(format!("its hotplug script {script} is not here; install it"));
        }
        let module = match device.class {
            Class::Vif => "xen_netback",
            Class::Vbd => "xen_blkback",
        };
        match machine.module_parameter(module, "max_queues") {
            None => refuse(format!("the driver {module} is not loaded here (modprobe {})", module.replace('_', "-"))),
            Some(most) if device.queues > most => refuse(format!(
                "the guest uses {} queues, this host offers {most} (module parameter max_queues of {module})",
                device.queues
            )),
            Some(_) => {}
        }
        match device.class {
            Class::Vif => {
                // Scripts other than vif-bridge need no bridge.
                if let Some(bridge) = device.node("bridge").filter(|bridge| !bridge.is_empty())
                    && device.node("script").is_some_and(|script| script.ends_with("/vif-bridge"))
                    && !machine.is_bridge(bridge)
                {
                    refuse(format!("the bridge {bridge} is not here; make it (ip link add {bridge} type bridge)"));
                }
            }
            Class::Vbd => {
                let order = machine.module_parameter(module, "max_ring_page_order").unwrap_or(0);
                if device.ring_order > order {
                    refuse(format!(
                        "the guest's rings have 2^{} pages, this host's may have 2^{order} (module parameter \
                         max_ring_page_order of {module})",
                        device.ring_order
                    ));
                }
                check_disk(machine, device, disks.get(&device.devid), &mut refuse);
            }
        }
    }
    refused
}

fn check_disk(machine: &dyn Machine, device: &Device, source: Option<&Evidence>, refuse: &mut dyn FnMut(String)) {
    let Some(path) = device.node("params").filter(|path| !path.is_empty()) else {
        refuse("it has no medium; insert one or detach it".to_owned());
        return;
    };
    let disk = match machine.block_device(path) {
        Ok(disk) => disk,
        Err(error) => {
            refuse(format!("the disk {path} can't be used here: {error}; is the shared storage attached?"));
            return;
        }
    };
    let number = |name: &str| device.node(name).and_then(|value| value.parse::<u64>().ok());
    match source {
        Some(source) => source.differs(machine, path).into_iter().for_each(&mut *refuse),
        None => refuse(format!(
            "the source does not tell which disk {path} is; install the same version of ferry on both hosts"
        )),
    }
    // blkback tells it once it is connected.
    if let Some(there) = number("sector-size")
        && there != u64::from(disk.logical_block)
    {
        let here = disk.logical_block;
        refuse(format!("the disk {path} has sectors of {here} bytes here and {there} on the source"));
    }
    if number("feature-flush-cache") == Some(1) && !disk.write_back {
        refuse(format!("the guest flushes the cache of {path}, which has none that can be flushed on this host"));
    }
    if disk.read_only && device.node("mode").is_some_and(|mode| mode.contains('w')) {
        refuse(format!("the disk {path} is read-only here"));
    }
}

/// Makes both areas of every device, waits until dom0's backends are ready (state 2), makes the vifs and bridges them,
/// opens the disks, and compares what the backends offer with what the guest uses. The guest's domain must exist, so
/// that permissions can name it.
///
/// # Errors
/// Names the device. Call [`abort`] then.
pub fn prepare(machine: &dyn Machine, store: &mut dyn Store, devices: &[Device], limits: &Limits) -> Result<()> {
    let start = machine.now();
    for device in devices {
        // Left-overs of an attempt before this one, and what was said of a guest that had this number before. The kernel drops a bus device some time after its area has gone, and
        // would not look at a new area of the same name before.
        store.remove(&device.backend)?;
        store.remove(&device.frontend)?;
        store.remove(&device.error_area())?;
        while machine.is_present(&device.bus_id()) {
            if machine.now() - start >= limits.connect {
                let (state, wanted) = ("left over".to_owned(), "gone".to_owned());
                return Err(Error::Stuck { device: device.bus_id(), state, wanted, after: limits.connect });
            }
            machine.sleep(POLL);
        }
        make_areas(store, device)?;
    }
    for device in devices {
        let mut patience = Patience::new();
        loop {
            let state = store.text(&format!("{}/state", device.backend))?.unwrap_or_default();
            match state.as_str() {
                "2" => break,
                "5" | "6" => return Err(closed(store, device, state)),
                _ if machine.now() - start >= limits.connect => {
                    let wanted = "2".to_owned();
                    return Err(Error::Stuck { device: device.bus_id(), state, wanted, after: limits.connect });
                }
                _ => patience.wait(machine),
            }
        }
    }
    let results = each(devices, |device| match device.class {
        Class::Vif => run(machine, device, "online", limits),
        // Writes physical-device; blkback opens the disk then, and does no I/O before it is connected.
        Class::Vbd => run(machine, device, "add", limits),
    });
    all(results.into_iter().filter_map(Result::err).collect())?;
    let mut misfits = Vec::new();
    for device in devices {
        let done = match device.class {
            Class::Vif => store.text(&format!("{}/hotplug-status", device.backend))?.as_deref() == Some("connected"),
            Class::Vbd => store.text(&format!("{}/physical-device", device.backend))?.is_some(),
        };
        if !done {
            let why = store.text(&format!("{}/hotplug-error", device.backend))?;
            return Err(Error::Script {
                device: device.bus_id(),
                script: device.node("script").unwrap_or("(none)").to_owned(),
                why: why.unwrap_or_else(|| "it ended well but did not connect the device".to_owned()),
            });
        }
        let mut offered = |name: &str, used: u32| -> Result<()> {
            let here = store.number(&format!("{}/{name}", device.backend))?.unwrap_or(0);
            if here < used {
                let why = format!("its backend offers {name} {here} here, the guest uses {used}");
                misfits.push(Refusal::new(device.bus_id(), why));
            }
            Ok(())
        };
        if device.queues > 1 {
            offered("multi-queue-max-queues", device.queues)?;
        }
        if device.class == Class::Vbd {
            if device.ring_order > 0 {
                offered("max-ring-page-order", device.ring_order)?;
            }
            // The guest may have requests of this size in its ring.
            let indirect = device.node("feature-max-indirect-segments").and_then(|n| n.parse().ok()).unwrap_or(0);
            offered("feature-max-indirect-segments", indirect)?;
        }
    }
    if !misfits.is_empty() {
        return Err(Error::Misfit(misfits));
    }
    // Now, so that the blackout need not: what the drivers wrote so far becomes what the guest knows.
    for device in devices {
        give_values(store, device, Writer::Probe)?;
    }
    Ok(())
}

/// Puts the nodes of one writer to the source's values and removes those that the source did not have.
fn give_values(store: &mut dyn Store, device: &Device, which: Writer) -> Result<()> {
    for (name, value) in &device.nodes {
        if writer(device.class, name) == which {
            let path = join(&device.backend, name);
            // Not what is there already: a watch of the guest would fire.
            if store.text(&path)?.as_deref() != Some(value.as_str()) {
                store.write(&path, value.as_bytes())?;
            }
        }
    }
    for name in store.list(&device.backend)?.unwrap_or_default() {
        let foreign = !device.nodes.contains_key(&name) && writer(device.class, &name) == which;
        if foreign {
            store.remove(&join(&device.backend, &name))?;
        }
    }
    Ok(())
}

fn make_areas(store: &mut dyn Store, device: &Device) -> Result<()> {
    let guest = [Perm::new(Access::NONE, device.domid), Perm::new(Access::READ, 0)];
    let ours = [Perm::new(Access::NONE, 0), Perm::new(Access::READ, device.domid)];
    // New nodes take the permissions of the node above them.
    store.write(&device.frontend, b"")?;
    store.set_permissions(&device.frontend, &guest)?;
    for (name, value) in [
        ("backend", device.backend.as_str()),
        ("backend-id", "0"),
        ("state", "1"),
        ("device-type", device.node("device-type").unwrap_or("")),
    ] {
        if !value.is_empty() {
            store.write(&join(&device.frontend, name), value.as_bytes())?;
        }
    }
    store.write(&device.backend, b"")?;
    store.set_permissions(&device.backend, &ours)?;
    for (name, value) in &device.nodes {
        if writer(device.class, name) == Writer::Toolstack {
            store.write(&join(&device.backend, name), value.as_bytes())?;
        }
    }
    // Last: dom0's kernel probes a backend as soon as its state is 1.
    store.write(&join(&device.backend, "state"), b"1")
}

/// Connects the backends with the restored guest: writes the frontends' states, waits for every backend, and puts the
/// backends' nodes to the source's values, so that the guest finds what it left.
///
/// The guest's own part of the store must have been restored before, quietly
/// (`Client::import_domain` with `Notify::Nobody`): each frontend's state is written again here, which is what its backend
/// wakes up to. Can be repeated: what was connected before is left alone, since the guest's watches may be served by then; so is what was not
/// connected on the source, whose backend waits for the guest.
///
/// # Errors
/// A backend closed itself, failed or got stuck. The guest must not run then: [`abort`], and tell the source.
pub fn connect(machine: &dyn Machine, store: &mut dyn Store, devices: &[Device], limits: &Limits) -> Result<()> {
    for device in devices {
        if device.connected() && store.text(&join(&device.backend, "state"))?.as_deref() != Some("4") {
            store.write(&join(&device.frontend, "state"), device.frontend_state.as_bytes())?;
        }
    }
    wait_states(machine, store, devices, limits.connect)?;
    for device in devices.iter().filter(|device| device.class == Class::Vbd && device.connected()) {
        give_values(store, device, Writer::Connect)?;
    }
    Ok(())
}

/// Takes back whatever [`prepare`] and [`connect`] did. A backend that was connected finishes its requests before its
/// unbind is over; wait for the proof with [`crate::source::wait_drained`] before the domain is destroyed.
pub fn abort(machine: &dyn Machine, store: &mut dyn Store, devices: &[Device], limits: &Limits) -> Result<()> {
    retire(machine, store, devices, limits)
}
