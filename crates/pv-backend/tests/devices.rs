//! Discovery, refusals, rollback, and the destination, on a host made of maps.

#[path = "support/mod.rs"]
mod fakes;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use fakes::{Host, disk, with_guest};
use hypervisor::{DomId, PortState};
use pv_backend::announce::announce;
use pv_backend::console;
use pv_backend::destination::{check, connect, prepare};
use pv_backend::device::{Class, Inventory, changed, discover, judge_channels};
use pv_backend::disk::{Evidence, Name, survey};
use pv_backend::drain::{Channels, Grant};
use pv_backend::frozen::Frozen;
use pv_backend::machine::{BlockDevice, BridgePort};
use pv_backend::source::{Limits, release, retire, rollback, snapshot};
use pv_backend::store::Store;
use pv_backend::{Error, Refusal, Result, records};

const DOM: u16 = 7;
const UUID: &str = "f8de82cf-3383-42a4-886c-aa87ce0f19fb";

fn found(host: &Host) -> Inventory {
    discover(&mut host.store(), DOM).unwrap()
}

fn refusals(refused: &[Refusal]) -> String {
    refused.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// Channels that let go after some looks.
struct Guest {
    ports: BTreeMap<u32, PortState>,
    grants: Vec<Grant>,
    /// Looks until the grants are free and the ports unbound.
    looks: Mutex<u32>,
}

impl Guest {
    fn drains_after(looks: u32) -> Guest {
        let to_dom0 = |port| (port, PortState::Interdomain { remote: DomId::DOM0, remote_port: port + 30 });
        let grant = |gref| Grant { gref, domid: 0, in_use: true };
        Guest {
            ports: [1, 2, 7, 9, 10].into_iter().map(to_dom0).chain([(3, PortState::Ipi)]).collect(),
            grants: vec![grant(0), grant(1), grant(8), grant(600)],
            looks: Mutex::new(looks),
        }
    }

    fn drained(&self) -> bool {
        *self.looks.lock().unwrap() == 0
    }
}

impl Channels for Guest {
    fn ports(&self, _: u16) -> Result<Vec<(u32, PortState)>> {
        let state = |port: u32| self.port(DOM, port).map(|state| (port, state.unwrap()));
        self.ports.keys().map(|&port| state(port)).collect()
    }

    fn port(&self, _: u16, port: u32) -> Result<Option<PortState>> {
        let free = PortState::Unbound { remote: DomId::DOM0 };
        Ok(self.ports.get(&port).map(|&state| if self.drained() && port > 3 { free } else { state }))
    }

    fn grants(&self, _: u16) -> Result<Vec<Grant>> {
        let mut looks = self.looks.lock().unwrap();
        *looks = looks.saturating_sub(1);
        let drained = *looks == 0;
        Ok(self
            .grants
            .iter()
            .map(|&grant| Grant { in_use: grant.in_use && (!drained || grant.gref < 2), ..grant })
            .collect())
    }
}

/// Counts every question as a look.
struct Counting<'a>(&'a Guest);

impl Channels for Counting<'_> {
    fn ports(&self, domid: u16) -> Result<Vec<(u32, PortState)>> {
        self.0.ports(domid)
    }
    fn port(&self, domid: u16, port: u32) -> Result<Option<PortState>> {
        self.0.grants(domid)?;
        self.0.port(domid, port)
    }
    fn grants(&self, domid: u16) -> Result<Vec<Grant>> {
        self.0.grants(domid)
    }
}

#[test]
fn the_devices_of_a_real_store_are_found() {
    let host = Host::new();
    with_guest(&host, DOM);
    let found = found(&host);
    assert_eq!(found.refused, []);
    assert_eq!(found.store_port, Some(1));
    let console = found.console.clone().unwrap();
    assert_eq!((console.port, console.tty.as_deref()), (2, Some("/dev/pts/0")));
    let names: Vec<_> = found.devices.iter().map(|d| (d.bus_id(), d.ports.clone())).collect();
    assert_eq!(names, [("vif-7-0".to_owned(), vec![9, 10]), ("vbd-7-51712".to_owned(), vec![7])]);
    assert_eq!(found.devices[0].netdev(), "vif7.0");
    assert_eq!(found.known_ports().into_iter().collect::<Vec<_>>(), [1, 2, 7, 9, 10]);
}

#[test]
fn queues_and_ring_pages_are_read() {
    let host = Host::new();
    with_guest(&host, DOM);
    let area = "/local/domain/7/device/vbd/51712";
    for (name, value) in [
        ("multi-queue-num-queues", "2"),
        ("ring-page-order", "2"),
        ("queue-0/event-channel", "20"),
        ("queue-1/event-channel", "21"),
    ] {
        host.put(&format!("{area}/{name}"), value);
    }
    let found = found(&host);
    let vbd = found.devices.iter().find(|d| d.class == Class::Vbd).unwrap();
    assert_eq!((vbd.queues, vbd.ring_order, vbd.ports.clone()), (2, 2, vec![7, 20, 21]));
}

#[test]
fn what_cannot_move_is_refused_by_name() {
    let host = Host::new();
    with_guest(&host, DOM);
    host.put("/libxl/7/device/vbd/51728/backend", "/local/domain/0/backend/qdisk/7/51728");
    host.put("/libxl/7/device/pci/0/backend", "/local/domain/0/backend/pci/7/0");
    host.put("/libxl/7/device/vif/1/backend", "/local/domain/3/backend/vif/7/1");
    host.put("/local/domain/0/backend/pvcalls/7/0/frontend", "/local/domain/7/device/pvcalls/0");
    host.put("/local/domain/7/device/vif/5/backend", "/local/domain/0/backend/vif/8/5");
    host.put("/local/domain/7/device/odd/0/backend", "nowhere");
    host.put("/local/domain/7/console/type", "ioemu");
    host.put("/local/domain/0/backend/vif/7/0/state", "5");
    let found = found(&host);
    let text = refusals(&found.refused);
    for wanted in [
        "vbd 51728 (qdisk): QEMU serves it",
        "pci 0: a device is passed through",
        "vif 1: its backend is in domain 3",
        "pvcalls 0: pvcalls keeps connections",
        "vif 5: its backend's area /local/domain/0/backend/vif/8/5 is that of another domain",
        "odd 0: its backend's area nowhere is not where backends are",
        "console: it is served by ioemu",
        "vif 0: it is being connected or closed (frontend state \"4\", backend state \"5\")",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is not in\n{text}");
    }
    assert_eq!(found.devices.len(), 1);
}

#[test]
fn what_only_netback_knows_is_refused() {
    for (node, wanted) in [
        ("request-multicast-control", "vif 0: its frontend has netback filter multicast"),
        ("event-channel-ctrl", "vif 0: its frontend has given netback a hash"),
    ] {
        let host = Host::new();
        with_guest(&host, DOM);
        host.put(&format!("/local/domain/7/device/vif/0/{node}"), "1");
        let text = refusals(&found(&host).refused);
        assert!(text.contains(wanted), "{wanted:?} is not in\n{text}");
    }
}

#[test]
fn channels_to_others_are_refused() {
    let host = Host::new();
    with_guest(&host, DOM);
    let mut guest = Guest::drains_after(100);
    assert_eq!(judge_channels(&guest, &found(&host)).unwrap(), []);
    guest.ports.insert(11, PortState::Unbound { remote: DomId(9) });
    guest.ports.insert(12, PortState::Interdomain { remote: DomId::DOM0, remote_port: 99 });
    guest.grants.push(Grant { gref: 700, domid: 9, in_use: false });
    guest.grants.push(Grant { gref: 701, domid: DOM, in_use: false });
    guest.grants.push(Grant { gref: 702, domid: DOM, in_use: true });
    let text = refusals(&judge_channels(&guest, &found(&host)).unwrap());
    assert_eq!(
        text,
        "event channel 11: it waits for domain 9, which does not move with the guest\n\
         event channel 12: a program in dom0 that is not known holds its other end; stop it (vchan, device model, …)\n\
         grant table: the guest has mapped 1 pages that it granted to itself; mappings do not move\n\
         grant table: 1 pages are granted to domain 9, which does not move with the guest"
    );
}

#[test]
fn a_release_waits_for_the_proof_and_a_rollback_leaves_no_trace() {
    let host = Host::new();
    with_guest(&host, DOM);
    host.state.lock().unwrap().nodes.get_mut("/local/domain/0/backend/vbd/7/51712/feature-discard").unwrap().0 =
        b"0".to_vec();
    let found = found(&host);
    let saved = snapshot(&host, &mut host.store(), &found).unwrap();
    let mut frozen = Frozen::from_stream(&host.export()).unwrap();
    assert_eq!(discover(&mut frozen, DOM).unwrap(), found);
    assert_eq!(snapshot(&host, &mut frozen, &found).unwrap(), saved);
    let nowhere = tempfile::tempdir().unwrap();
    let books = |store: &mut dyn Store| records::capture(store, DOM, UUID, nowhere.path()).unwrap();
    assert_eq!(books(&mut frozen), books(&mut host.store()));
    assert!(frozen.write("/local/domain/7/name", b"x").is_err());
    let guest = Guest::drains_after(40);
    let released = release(&host, &Counting(&guest), &found, &Limits::default()).unwrap();
    assert!(guest.drained() && released.total > Duration::from_millis(1), "{released:?}");
    assert_eq!(released.unbind.len(), 2);
    assert!(host.state.lock().unwrap().bound.is_empty());
    assert_eq!(host.get("/local/domain/0/backend/vif/7/0/hotplug-status"), None);

    rollback(&host, &mut host.store(), &Counting(&guest), &found, &saved, &Limits::default()).unwrap();
    assert_eq!(host.state.lock().unwrap().bound.len(), 2);
    // The fake's blkback changed one node and added one.
    assert_eq!(snapshot(&host, &mut host.store(), &found).unwrap(), saved);
    assert!(
        host.state
            .lock()
            .unwrap()
            .calls
            .contains(&"/etc/xen/scripts/vif-bridge online type_if=vif for /local/domain/0/backend/vif/7/0".to_owned())
    );
    // A vif that was in a bridge goes back without the script.
    let port = BridgePort { bridge: "xenbr0".into(), address: [0xfe; 6], mtu: 1500, flags: 1 };
    host.state.lock().unwrap().bridge_ports.insert("vif7.0".into(), port.clone());
    let with_port = snapshot(&host, &mut host.store(), &found).unwrap();
    assert_eq!(with_port.ports, [("vif-7-0".to_owned(), port)].into());
    release(&host, &Counting(&guest), &found, &Limits::default()).unwrap();
    host.state.lock().unwrap().calls.clear();
    rollback(&host, &mut host.store(), &Counting(&guest), &found, &with_port, &Limits::default()).unwrap();
    assert_eq!(snapshot(&host, &mut host.store(), &found).unwrap(), with_port);
    let calls = host.state.lock().unwrap().calls.join("\n");
    assert!(calls.contains("join vif7.0 xenbr0") && !calls.contains("vif-bridge"), "{calls}");
    // With its script where the bridge is not to be had that way.
    host.state.lock().unwrap().bridges.clear();
    release(&host, &Counting(&guest), &found, &Limits::default()).unwrap();
    host.state.lock().unwrap().calls.clear();
    rollback(&host, &mut host.store(), &Counting(&guest), &found, &with_port, &Limits::default()).unwrap();
    let calls = host.state.lock().unwrap().calls.join("\n");
    assert!(calls.contains("vif-bridge online"), "{calls}");
    // And once more does no harm.
    rollback(&host, &mut host.store(), &Counting(&guest), &found, &saved, &Limits::default()).unwrap();
}

#[test]
fn a_backend_that_does_not_let_go_is_named_at_the_time_limit() {
    let host = Host::new();
    with_guest(&host, DOM);
    let found = found(&host);
    let guest = Guest::drains_after(u32::MAX);
    let error = release(&host, &Counting(&guest), &found, &Limits::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "domain 7: the backends have not let go after 5000 ms: event channel 7 is still connected to dom0; event channel 9 is \
         still connected to dom0; event channel 10 is still connected to dom0; 2 granted pages are still in use by dom0 \
         (grant references 8, 600)"
    );
    // Nothing is bound again while requests may be out.
    let saved = snapshot(&host, &mut host.store(), &found).unwrap();
    let error = rollback(&host, &mut host.store(), &Counting(&guest), &found, &saved, &Limits::default()).unwrap_err();
    assert!(matches!(error, Error::NotDrained { .. }), "{error}");
    assert!(host.state.lock().unwrap().bound.is_empty());
}

#[test]
fn a_rollback_goes_on_after_a_device_that_fails_and_names_it() {
    let host = Host::new();
    with_guest(&host, DOM);
    let found = found(&host);
    let saved = snapshot(&host, &mut host.store(), &found).unwrap();
    let guest = Guest::drains_after(1);
    release(&host, &Counting(&guest), &found, &Limits::default()).unwrap();
    host.state.lock().unwrap().bind_fails.insert("vif-7-0".into());
    host.put("/local/domain/0/backend/vif/7/0/state", "6");
    let error = rollback(&host, &mut host.store(), &Counting(&guest), &found, &saved, &Limits::default()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("vif-7-0: dom0's kernel can't bind it") && text.contains("went to state 6"), "{text}");
    assert!(host.state.lock().unwrap().bound.contains("vbd-7-51712"));
}

/// As on the destination: netback says that it is connected when it could not connect.
#[test]
fn a_rollback_does_not_believe_a_backend_that_its_kernel_has_given_up() {
    let host = Host::new();
    with_guest(&host, DOM);
    let found = found(&host);
    // What its kernel said of it long ago, and has got over.
    host.put("/local/domain/0/error/backend/vbd/7/51712/error", "28 of old");
    let saved = snapshot(&host, &mut host.store(), &found).unwrap();
    let guest = Guest::drains_after(1);
    release(&host, &Counting(&guest), &found, &Limits::default()).unwrap();
    host.state.lock().unwrap().closes.insert("vif-7-0".into());
    let back = || rollback(&host, &mut host.store(), &Counting(&guest), &found, &saved, &Limits::default());
    for attempt in ["the first", "the next, which finds it bound"] {
        let error = back().unwrap_err();
        assert_eq!(host.get("/local/domain/0/backend/vif/7/0/state").as_deref(), Some("4"));
        assert!(matches!(&error, Error::Unconnected { device, .. } if device == "vif-7-0"), "{attempt}: {error}");
    }
    // Its guest can't be let run without it, so it is tried until it connects.
    host.state.lock().unwrap().closes.clear();
    back().unwrap();
    assert_eq!(host.get("/local/domain/0/error/backend/vif/7/0/error"), None);
    assert_eq!(snapshot(&host, &mut host.store(), &found).unwrap(), saved);
}

#[test]
fn a_rollback_does_without_a_device_that_was_taken_away() {
    let host = Host::new();
    with_guest(&host, DOM);
    let found = found(&host);
    let saved = snapshot(&host, &mut host.store(), &found).unwrap();
    let guest = Guest::drains_after(1);
    release(&host, &Counting(&guest), &found, &Limits::default()).unwrap();
    host.store().remove("/local/domain/0/backend/vif/7/0").unwrap();
    host.store().remove("/local/domain/7/device/vif/0").unwrap();
    rollback(&host, &mut host.store(), &Counting(&guest), &found, &saved, &Limits::default()).unwrap();
    assert_eq!(host.state.lock().unwrap().bound, ["vbd-7-51712".to_owned()].into());
    assert_eq!(host.get("/local/domain/0/backend/vif/7/0/state"), None, "nothing of it is made again");
}

#[test]
fn devices_that_change_during_the_copying_are_noticed() {
    let host = Host::new();
    with_guest(&host, DOM);
    let before = found(&host);
    let differs = |change: &dyn Fn(&Host)| {
        let host = Host::new();
        with_guest(&host, DOM);
        change(&host);
        changed(&before, &found(&host)).unwrap_or_default()
    };
    assert_eq!(differs(&|_| {}), "");
    assert_eq!(differs(&|h| h.store().remove("/local/domain/0/backend/vif/7/0").unwrap()), "vif 0 has gone");
    assert_eq!(
        differs(&|h| h.put("/local/domain/0/backend/vbd/7/51712/sectors", "9")),
        "vbd 51712: its backend's node sectors changed"
    );
    assert_eq!(
        differs(&|h| h.put("/local/domain/7/device/vif/0/event-channel-tx", "77")),
        "vif 0 has other rings or event channels"
    );
    assert_eq!(
        differs(&|h| h.put("/local/domain/7/store/port", "8")),
        "its console or its connection with the store is another"
    );
    let mut less = before.clone();
    less.devices.pop();
    assert!(changed(&less, &before).unwrap().ends_with("has come"));
}

#[test]
fn a_removal_whose_script_failed_ends_when_it_is_done_again() {
    let host = Host::new();
    with_guest(&host, DOM);
    let found = found(&host);
    host.state.lock().unwrap().script_fails = true;
    retire(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap_err();
    retire(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap();
}

/// The source's devices on another host that has no trace of the guest but its domain.
fn moved() -> (Host, Inventory) {
    let source = Host::new();
    with_guest(&source, DOM);
    let mut found = found(&source);
    // What the source's blkback had and this host's lacks, and the other way round.
    found.devices[1].nodes.insert("feature-discard".into(), "0".into());
    let host = Host::new();
    let mut state = host.state.lock().unwrap();
    state.disks.insert("/dev/ram0".into(), disk());
    state.bridges.insert("xenbr0".into());
    drop(state);
    host.put("/local/domain/7", "");
    (host, found)
}

#[test]
fn a_host_that_fits_prepares_and_connects_and_the_guest_finds_what_it_left() {
    let (host, found) = moved();
    assert_eq!(check(&host, &found.devices, &evidence()), []);
    prepare(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap();
    for device in &found.devices {
        assert_eq!(host.get(&format!("{}/state", device.backend)).as_deref(), Some("2"), "before the commit");
        let perms = host.store().permissions(&format!("{}/state", device.backend)).unwrap();
        assert_eq!(perms.iter().map(ToString::to_string).collect::<Vec<_>>(), ["n0", "r7"]);
        let perms = host.store().permissions(&format!("{}/state", device.frontend)).unwrap();
        assert_eq!(perms.iter().map(ToString::to_string).collect::<Vec<_>>(), ["n7", "r0"]);
    }
    connect(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap();
    for device in &found.devices {
        for (name, value) in &device.nodes {
            if !name.starts_with("physical-device") {
                assert_eq!(host.get(&format!("{}/{name}", device.backend)).as_ref(), Some(value), "{name}");
            }
        }
    }
    // This host's own: the real device number, and no node that the source did not have.
    assert_eq!(host.get("/local/domain/0/backend/vbd/7/51712/physical-device").as_deref(), Some("fe:10"));
    assert_eq!(host.get("/local/domain/0/backend/vbd/7/51712/feature-new"), None);
    announce(&host, &found.devices).unwrap();
    let state = host.state.lock().unwrap();
    assert_eq!((state.frames.len(), state.frames[0].0.as_str()), (1, "xenbr0"));
    assert_eq!(state.taught.iter().map(|(device, _)| device.as_str()).collect::<Vec<_>>(), ["vif7.0"]);
}

/// What the source of [`moved`] tells of its disk.
fn evidence() -> BTreeMap<u32, Evidence> {
    let source = Host::new();
    with_guest(&source, DOM);
    survey(&source, &found(&source).devices).unwrap()
}

/// A host whose disk has this name, or none, and these bytes at the start of two of its blocks.
fn host_with_disk(name: Option<&str>, first: u8, last: u8) -> (Host, Inventory) {
    let (host, found) = moved();
    let mut state = host.state.lock().unwrap();
    let name = name.map(|value| Name { kind: "wwid".into(), value: value.into(), start: 0 });
    state.disks.insert("/dev/ram0".into(), BlockDevice { name, ..disk() });
    for (at, byte) in [(0, first), ((64 << 20) - 4096, last)] {
        let mut block = vec![0; 4096];
        block[0] = byte;
        state.blocks.insert(("/dev/ram0".into(), at), block);
    }
    drop(state);
    (host, found)
}

#[test]
fn another_disk_of_the_same_size_is_refused() {
    let same = |(source, found): (Host, Inventory), (host, _): (Host, Inventory)| {
        refusals(&check(&host, &found.devices, &survey(&source, &found.devices).unwrap()))
    };
    // Named on both.
    assert_eq!(same(host_with_disk(Some("naa.6"), 1, 1), host_with_disk(Some("naa.6"), 1, 2)), "");
    let text = same(host_with_disk(Some("naa.6"), 1, 1), host_with_disk(Some("naa.7"), 1, 1));
    let wanted =
        "vbd 51712: the disk /dev/ram0 is wwid naa.7 here and wwid naa.6 on the source: it is not the same disk";
    assert_eq!(text, wanted);
    // Named on one, or on none: by what stands on it.
    for (there, here) in [(Some("naa.6"), None), (None, Some("naa.6")), (None, None)] {
        assert_eq!(same(host_with_disk(there, 1, 3), host_with_disk(here, 1, 3)), "", "{there:?} {here:?}");
        let text = same(host_with_disk(there, 1, 3), host_with_disk(here, 1, 4));
        assert!(text.contains("holds something else here than on the source (at byte 67104768)"), "{text}");
        let text = same(host_with_disk(there, 0, 0), host_with_disk(here, 0, 0));
        assert!(text.contains("nothing tells whether the disk /dev/ram0 is the same"), "{text}");
    }
    // What the guest writes all the time is no sign of another disk.
    let source = host_with_disk(None, 1, 3);
    source.0.state.lock().unwrap().busy.push(("/dev/ram0".into(), 0));
    assert_eq!(same(source, host_with_disk(None, 77, 3)), "");
    // Nothing told, and places of the peer's choice.
    let (host, found) = host_with_disk(None, 1, 3);
    assert!(refusals(&check(&host, &found.devices, &BTreeMap::new())).contains("does not tell which disk"));
    let mut evidence = survey(&host, &found.devices).unwrap();
    evidence.get_mut(&51712).unwrap().samples[0].at = 1 << 20;
    assert!(refusals(&check(&host, &found.devices, &evidence)).contains("of no places that are looked at"));
}

/// A clone has its original's name: a volume's or a LUKS header's UUID is copied with it, and serial numbers are what somebody typed.
#[test]
fn a_name_that_two_disks_have_is_not_believed_against_what_stands_on_them() {
    let with_blocks = |differ: usize| {
        let (host, found) = host_with_disk(Some("root"), 1, 1);
        let mut state = host.state.lock().unwrap();
        for n in 0..8_usize {
            let mut block = vec![0; 4096];
            (block[0], block[1]) = (7, u8::from(n < differ));
            state.blocks.insert(("/dev/ram0".into(), 4096 * (n as u64 + 1)), block);
        }
        drop(state);
        (host, found)
    };
    // Ten blocks tell something.
    let (source, found) = with_blocks(0);
    let judged = |host: &Host| refusals(&check(host, &found.devices, &survey(&source, &found.devices).unwrap()));
    for few in 0..=5 {
        assert_eq!(judged(&with_blocks(few).0), "", "{few} were written by the guest in between");
    }
    let (other, _) = with_blocks(6);
    let text = judged(&other);
    assert!(text.contains("the disk /dev/ram0 is wwid root on both hosts"), "{text}");
    assert!(text.contains("6 of 10 blocks that tell something differ, the first at byte 4096"), "{text}");
    // Blank there, but not here.
    let (other, _) = with_blocks(5);
    for at in [4096 * 20, 4096 * 21] {
        other.state.lock().unwrap().blocks.insert(("/dev/ram0".into(), at), (0..=255).cycle().take(4096).collect());
    }
    assert!(judged(&other).contains("7 of 12 blocks"), "{}", judged(&other));
    // Two blocks, both of which the guest has written to, are no evidence against a name.
    let (nearly_empty, found_there) = host_with_disk(Some("root"), 1, 1);
    let (written, _) = host_with_disk(Some("root"), 2, 2);
    assert_eq!(
        refusals(&check(&written, &found_there.devices, &survey(&nearly_empty, &found_there.devices).unwrap())),
        ""
    );
    // Nothing speaks against an empty disk's name.
    let (source, found) = host_with_disk(Some("root"), 0, 0);
    assert_eq!(refusals(&check(&source, &found.devices, &survey(&source, &found.devices).unwrap())), "");
    // Places of the peer's choice are not read for a name either.
    let mut evidence = survey(&source, &found.devices).unwrap();
    evidence.get_mut(&51712).unwrap().samples[0].at = 1 << 20;
    assert!(refusals(&check(&source, &found.devices, &evidence)).contains("of no places that are looked at"));
}

/// A path is a name that can lead elsewhere by now.
#[test]
fn a_path_that_is_no_longer_the_open_disk_is_refused_on_the_source() {
    let source = Host::new();
    with_guest(&source, DOM);
    let found = found(&source);
    source.state.lock().unwrap().disks.insert("/dev/ram0".into(), BlockDevice { minor: 16, ..disk() });
    let text = refusals(&survey(&source, &found.devices).unwrap_err());
    assert!(text.contains("vbd 51712: its backend has block device 1:0 open, and /dev/ram0 is 1:10 now"), "{text}");
    source.state.lock().unwrap().disks.clear();
    assert!(refusals(&survey(&source, &found.devices).unwrap_err()).contains("can't be looked at on the source"));
}

#[test]
fn the_frontends_states_come_last() {
    let (host, found) = moved();
    prepare(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap();
    let before = host.state.lock().unwrap().calls.len();
    connect(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap();
    let calls = host.state.lock().unwrap().calls[before..].to_vec();
    assert!(
        calls[0].ends_with("/device/vif/0/state=4") && calls[1].ends_with("/device/vbd/51712/state=4"),
        "{calls:?}"
    );
}

#[test]
fn the_console_is_attached_once_and_without_a_store_too() {
    let host = Host::new();
    with_guest(&host, DOM);
    let mut inventory = found(&host);
    let writes = |inventory: &Inventory, introduced| {
        let before = host.state.lock().unwrap().calls.len();
        console::attach(&mut host.store(), inventory, introduced).unwrap();
        host.state.lock().unwrap().calls[before..].join("\n")
    };
    assert_eq!(writes(&inventory, false), "write /local/domain/7/console/port=2");
    assert_eq!(writes(&inventory, true), "");
    inventory.store_port = None;
    assert_eq!(writes(&inventory, false), "write /local/domain/7/console/port=2");
    inventory.console = None;
    assert_eq!(writes(&inventory, false), "");
}

/// A daemon that was killed after it had connected them does it again, with the guest's watches served: each write would fire one.
#[test]
fn what_is_connected_is_not_written_again() {
    let (host, found) = moved();
    prepare(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap();
    connect(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap();
    let before = host.state.lock().unwrap().calls.len();
    connect(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap();
    assert_eq!(host.state.lock().unwrap().calls[before..], Vec::<String>::new());
    // One that the guest has not looked at yet waits for it; nobody need be woken, neither then nor again.
    let (host, mut found) = moved();
    let vif = &mut found.devices[0];
    (vif.frontend_state, vif.backend_state) = ("1".into(), "2".into());
    prepare(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap();
    let before = host.state.lock().unwrap().calls.len();
    for _ in 0..2 {
        connect(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap();
    }
    let calls = host.state.lock().unwrap().calls[before..].join("\n");
    assert!(!calls.contains("/vif/") && calls.matches("/device/vbd/51712/state=4").count() == 1, "{calls}");
    assert_eq!(host.get(&format!("{}/state", found.devices[0].frontend)).as_deref(), Some("1"));
}

#[test]
fn a_host_that_does_not_fit_is_refused_before_anything_is_touched() {
    let (host, mut found) = moved();
    {
        let mut state = host.state.lock().unwrap();
        state.bridges.clear();
        state.max_queues = 1;
        state.disks.get_mut("/dev/ram0").unwrap().sectors = 99;
        state.disks.get_mut("/dev/ram0").unwrap().read_only = true;
    }
    found.devices[0].queues = 2;
    found.devices[1].ring_order = 5;
    found.devices[1].nodes.insert("feature-flush-cache".into(), "1".into());
    let before = host.state.lock().unwrap().calls.len();
    let text = refusals(&check(&host, &found.devices, &evidence()));
    for wanted in [
        "vif 0: the bridge xenbr0 is not here",
        "vif 0: the guest uses 2 queues, this host offers 1",
        "vbd 51712: the disk /dev/ram0 has sectors 99 here and 131072 on the source",
        "vbd 51712: the guest's rings have 2^5 pages",
        "vbd 51712: the guest flushes the cache",
        "vbd 51712: the disk /dev/ram0 is read-only here",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is not in\n{text}");
    }
    host.state.lock().unwrap().disks.clear();
    assert!(refusals(&check(&host, &found.devices, &evidence())).contains("can't be used here"));
    assert_eq!(host.state.lock().unwrap().calls.len(), before);
}

#[test]
fn failures_on_the_destination_are_named_and_taken_back() {
    let (host, found) = moved();
    host.state.lock().unwrap().script_fails = true;
    let error = prepare(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap_err();
    assert!(error.to_string().contains("Could not find bridge device"), "{error}");
    host.state.lock().unwrap().script_fails = false;
    host.state.lock().unwrap().max_queues = 1;
    let mut two_queues = found.devices.clone();
    two_queues[0].queues = 2;
    let error = prepare(&host, &mut host.store(), &two_queues, &Limits::default()).unwrap_err();
    assert!(error.to_string().contains("multi-queue-max-queues 1 here, the guest uses 2"), "{error}");
    host.state.lock().unwrap().max_queues = 4;

    // What another guest under this number has left.
    host.put("/local/domain/0/error/backend/vif/7/0/error", "5 of old");
    prepare(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap();
    assert_eq!(host.get("/local/domain/0/error/backend/vif/7/0/error"), None);
    host.state.lock().unwrap().closes.insert("vbd-7-51712".into());
    let error = connect(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap_err();
    assert!(error.to_string().starts_with("vbd-7-51712: its backend does not connect"), "{error}");
    assert!(error.to_string().contains("kernel says: 22 guest requested 1 queues"), "{error}");
    retire(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap();
    assert_eq!(host.get("/local/domain/0/error/backend/vbd/7/51712/error"), None);

    // As netback does it: it says that it is connected.
    host.state.lock().unwrap().closes = ["vif-7-0".to_owned()].into();
    prepare(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap();
    let error = connect(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap_err();
    assert_eq!(host.get("/local/domain/0/backend/vif/7/0/state").as_deref(), Some("4"));
    assert!(matches!(&error, Error::Unconnected { device, .. } if device == "vif-7-0"), "{error}");
    retire(&host, &mut host.store(), &found.devices, &Limits::default()).unwrap();
    let mut left: Vec<_> = host.state.lock().unwrap().nodes.keys().cloned().collect();
    left.retain(|path| path.contains("backend/vbd/7") || path.contains("backend/vif/7") || path.ends_with("state"));
    assert_eq!(left, Vec::<String>::new());
    assert!(host.state.lock().unwrap().bound.is_empty());
}

#[test]
fn libxls_books_are_copied_and_foreign_paths_refused() {
    let uuid = UUID;
    let source = Host::new();
    with_guest(&source, DOM);
    let (there, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let file = format!("userdata-d.7.{uuid}.libxl-json");
    std::fs::write(there.path().join(&file), "{}").unwrap();
    std::fs::write(there.path().join("userdata-d.8.other.libxl-json"), "no").unwrap();
    let books = records::capture(&mut source.store(), DOM, uuid, there.path()).unwrap();
    assert_eq!(books.userdata, [("libxl-json".to_owned(), b"{}".to_vec())]);
    assert!(books.nodes.iter().any(|n| n.path == "/libxl/7/type" && n.value == b"pvh"));
    assert!(books.nodes.iter().any(|n| n.path == format!("/vm/{uuid}/name")));

    let host = Host::new();
    records::install(&mut host.store(), DOM, uuid, &books, here.path()).unwrap();
    assert_eq!(host.get("/libxl/7/type").as_deref(), Some("pvh"));
    assert_eq!(std::fs::read_to_string(here.path().join(&file)).unwrap(), "{}");
    let mut evil = books.clone();
    evil.nodes[0].path = "/libxl/71/type".into();
    assert!(matches!(records::install(&mut host.store(), DOM, uuid, &evil, here.path()), Err(Error::Node { .. })));
    let mut evil = books.clone();
    evil.userdata[0].0 = "../../etc/passwd".into();
    assert!(matches!(records::install(&mut host.store(), DOM, uuid, &evil, here.path()), Err(Error::Node { .. })));
    records::remove(&mut host.store(), DOM, uuid, here.path()).unwrap();
    assert_eq!(host.get("/libxl/7/type"), None);
    assert_eq!(std::fs::read_dir(here.path()).unwrap().count(), 0);
}
