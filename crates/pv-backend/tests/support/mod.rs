//! A host made of maps: a store, and backends that behave as stock Linux' do (seen on 6.1): they probe an area whose state
//! is 1, write their features, wait for physical-device or hotplug-status, and connect when the frontend's state is 3 or 4.
#![allow(missing_debug_implementations, reason = "no test prints them")]
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use pv_backend::disk::{Name, SAMPLE, Sample};
use pv_backend::machine::{BlockDevice, BridgePort, Machine, Script};
use pv_backend::store::Store;
use pv_backend::{Error, Result};
use xenstore_client::{Access, Perm};
use xenstore_wire::stream::{Format, Record, TxAccess, write_all};

#[derive(Default)]
pub struct State {
    pub nodes: BTreeMap<String, (Vec<u8>, Vec<Perm>)>,
    /// "vbd-7-51712"
    pub bound: BTreeSet<String>,
    pub calls: Vec<String>,
    pub clock: Duration,
    /// Backends that fail: their kernel says why, and they go to state 5; a vif goes on to 4.
    pub closes: BTreeSet<String>,
    pub bind_fails: BTreeSet<String>,
    pub disks: BTreeMap<String, BlockDevice>,
    /// What stands on them, by path and place; zeroes where there is nothing.
    pub blocks: BTreeMap<(String, u64), Vec<u8>>,
    /// Places that the guest writes to whenever somebody waits.
    pub busy: Vec<(String, u64)>,
    pub bridges: BTreeSet<String>,
    pub bridge_ports: BTreeMap<String, BridgePort>,
    pub frames: Vec<(String, Vec<u8>)>,
    /// Addresses that a bridge was taught, with the port's device.
    pub taught: Vec<(String, [u8; 6])>,
    pub max_queues: u32,
    pub script_fails: bool,
}

pub struct Host {
    pub state: Mutex<State>,
    start: Instant,
}

impl Host {
    pub fn new() -> Host {
        let state = State { max_queues: 4, ..State::default() };
        Host { state: Mutex::new(state), start: Instant::now() }
    }

    pub fn store(&self) -> View<'_> {
        View(self)
    }

    pub fn get(&self, path: &str) -> Option<String> {
        self.state.lock().unwrap().nodes.get(path).map(|(v, _)| String::from_utf8(v.clone()).unwrap())
    }

    pub fn put(&self, path: &str, value: &str) {
        self.store().write(path, value.as_bytes()).unwrap();
    }

    /// The whole store as a daemon exports it.
    pub fn export(&self) -> Vec<u8> {
        let state = self.state.lock().unwrap();
        let nodes: Vec<Record> = state
            .nodes
            .iter()
            .map(|(path, (value, perms))| Record::Node {
                conn_id: 0,
                tx_id: 0,
                access: TxAccess::default(),
                perms: perms.clone(),
                path: path.clone().into_bytes(),
                value: value.clone(),
            })
            .collect();
        write_all(Format::V2, &nodes).unwrap()
    }

    /// What dom0's kernel does after a change of the store.
    fn settle(&self, state: &mut State) {
        loop {
            let mut writes: Vec<(String, String)> = Vec::new();
            let text =
                |state: &State, path: &str| state.nodes.get(path).map(|(v, _)| String::from_utf8_lossy(v).into_owned());
            let backends: Vec<String> = state
                .nodes
                .keys()
                .filter_map(|path| path.strip_prefix("/local/domain/0/backend/"))
                .filter_map(|rest| rest.strip_suffix("/frontend-id"))
                .map(str::to_owned)
                .collect();
            for rest in backends {
                let area = format!("/local/domain/0/backend/{rest}");
                let bus = rest.replace('/', "-");
                let (Some(own), Some(front)) =
                    (text(state, &format!("{area}/state")), text(state, &format!("{area}/frontend")))
                else {
                    continue;
                };
                let kind = rest.split('/').next().unwrap_or_default().to_owned();
                if !matches!(kind.as_str(), "vif" | "vbd") {
                    continue;
                }
                if own == "1" && !state.bound.contains(&bus) {
                    state.bound.insert(bus.clone());
                    writes.push((format!("{area}/multi-queue-max-queues"), state.max_queues.to_string()));
                    if kind == "vbd" {
                        writes.push((format!("{area}/feature-max-indirect-segments"), "256".into()));
                        writes.push((format!("{area}/max-ring-page-order"), "4".into()));
                    } else {
                        writes.push((format!("{area}/feature-sg"), "1".into()));
                    }
                    writes.push((format!("{area}/state"), "2".into()));
                    continue;
                }
                let front_state = text(state, &format!("{front}/state")).unwrap_or_default();
                let ready = match kind.as_str() {
                    "vbd" => text(state, &format!("{area}/physical-device")).is_some(),
                    _ => text(state, &format!("{area}/hotplug-status")).as_deref() == Some("connected"),
                };
                if own == "2" && state.bound.contains(&bus) && ready && matches!(front_state.as_str(), "3" | "4") {
                    if state.closes.contains(&bus) {
                        let why = "22 guest requested 1 queues, exceeding the maximum of 0.";
                        writes.push((format!("/local/domain/0/error/backend/{rest}/error"), why.into()));
                        writes.push((format!("{area}/state"), if kind == "vif" { "4" } else { "5" }.into()));
                        continue;
                    }
                    if kind == "vbd" {
                        // Another host's kernel writes one that the source did not, and another value.
                        writes.push((format!("{area}/feature-discard"), "1".into()));
                        writes.push((format!("{area}/feature-new"), "1".into()));
                    }
                    writes.push((format!("{area}/state"), "4".into()));
                }
            }
            if writes.is_empty() {
                return;
            }
            for (path, value) in writes {
                insert(state, &path, value.as_bytes());
            }
        }
    }
}

fn insert(state: &mut State, path: &str, value: &[u8]) {
    let mut parent = path.to_owned();
    let mut missing = Vec::new();
    while !state.nodes.contains_key(&parent) {
        missing.push(parent.clone());
        match parent.rsplit_once('/') {
            Some((up, _)) if !up.is_empty() => parent = up.to_owned(),
            _ => break,
        }
    }
    let perms = state.nodes.get(&parent).map_or_else(|| vec![Perm::new(Access::NONE, 0)], |(_, perms)| perms.clone());
    for path in missing {
        state.nodes.insert(path, (Vec::new(), perms.clone()));
    }
    if let Some((v, _)) = state.nodes.get_mut(path) {
        *v = value.to_vec();
    }
}

pub struct View<'a>(&'a Host);

impl Store for View<'_> {
    fn read(&mut self, path: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.0.state.lock().unwrap().nodes.get(path).map(|(v, _)| v.clone()))
    }

    fn write(&mut self, path: &str, value: &[u8]) -> Result<()> {
        let mut state = self.0.state.lock().unwrap();
        state.calls.push(format!("write {path}={}", String::from_utf8_lossy(value)));
        insert(&mut state, path, value);
        self.0.settle(&mut state);
        Ok(())
    }

    fn remove(&mut self, path: &str) -> Result<()> {
        let mut state = self.0.state.lock().unwrap();
        let below = format!("{path}/");
        state.nodes.retain(|node, _| node != path && !node.starts_with(&below));
        if let Some(rest) = path.strip_prefix("/local/domain/0/backend/") {
            state.bound.remove(&rest.replace('/', "-"));
        }
        Ok(())
    }

    fn list(&mut self, path: &str) -> Result<Option<Vec<String>>> {
        let state = self.0.state.lock().unwrap();
        if !state.nodes.contains_key(path) {
            return Ok(None);
        }
        let below = format!("{path}/");
        let names = state.nodes.keys().filter_map(|node| node.strip_prefix(&below)).filter(|rest| !rest.contains('/'));
        Ok(Some(names.map(str::to_owned).collect()))
    }

    fn permissions(&mut self, path: &str) -> Result<Vec<Perm>> {
        let state = self.0.state.lock().unwrap();
        match state.nodes.get(path) {
            Some((_, perms)) => Ok(perms.clone()),
            None => Err(Error::Node { path: path.to_owned(), why: "not there".into() }),
        }
    }

    fn set_permissions(&mut self, path: &str, permissions: &[Perm]) -> Result<()> {
        let mut state = self.0.state.lock().unwrap();
        match state.nodes.get_mut(path) {
            Some((_, perms)) => {
                *perms = permissions.to_vec();
                Ok(())
            }
            None => Err(Error::Node { path: path.to_owned(), why: "not there".into() }),
        }
    }
}

impl Machine for Host {
    fn is_present(&self, device: &str) -> bool {
        self.state.lock().unwrap().nodes.contains_key(&format!("/local/domain/0/backend/{}", device.replace('-', "/")))
    }

    fn is_bound(&self, _driver: &str, device: &str) -> bool {
        self.state.lock().unwrap().bound.contains(device)
    }

    fn unbind(&self, driver: &str, device: &str) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.calls.push(format!("unbind {driver} {device}"));
        state.bound.remove(device);
        if driver == "vif" {
            let area = format!("/local/domain/0/backend/{}/hotplug-status", device.replace('-', "/"));
            state.nodes.remove(&area);
        }
        Ok(())
    }

    fn bind(&self, driver: &str, device: &str) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.calls.push(format!("bind {driver} {device}"));
        if state.bind_fails.contains(device) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let area = format!("/local/domain/0/backend/{}", device.replace('-', "/"));
        insert(&mut state, &format!("{area}/state"), b"1");
        self.settle(&mut state);
        Ok(())
    }

    fn run(&self, script: &Script, _limit: Duration) -> std::result::Result<(), String> {
        let mut state = self.state.lock().unwrap();
        let env = |name: &str| script.environment.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone()).unwrap();
        let area = format!("/local/domain/0/{}", env("XENBUS_PATH"));
        state.calls.push(format!("{} {} for {area}", script.program, script.arguments.join(" ")));
        if state.script_fails {
            return Err("exit status: 1: Could not find bridge device".into());
        }
        match script.arguments[0].as_str() {
            "online" => insert(&mut state, &format!("{area}/hotplug-status"), b"connected"),
            "add" => {
                insert(&mut state, &format!("{area}/physical-device"), b"fe:10");
                insert(&mut state, &format!("{area}/hotplug-status"), b"connected");
            }
            _ => {}
        }
        self.settle(&mut state);
        Ok(())
    }

    fn is_program(&self, path: &str) -> bool {
        path.starts_with("/etc/xen/scripts/")
    }

    fn is_bridge(&self, name: &str) -> bool {
        self.state.lock().unwrap().bridges.contains(name)
    }

    fn bridge_port(&self, device: &str) -> Option<BridgePort> {
        self.state.lock().unwrap().bridge_ports.get(device).cloned()
    }

    fn join_bridge(&self, device: &str, port: &BridgePort) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.calls.push(format!("join {device} {}", port.bridge));
        if !state.bridges.contains(&port.bridge) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.bridge_ports.insert(device.to_owned(), port.clone());
        Ok(())
    }

    fn block_device(&self, path: &str) -> io::Result<BlockDevice> {
        self.state.lock().unwrap().disks.get(path).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn samples(&self, path: &str, places: &[u64]) -> io::Result<Vec<Sample>> {
        self.block_device(path)?;
        let state = self.state.lock().unwrap();
        let zeroes = vec![0; SAMPLE];
        let block = |at: u64| state.blocks.get(&(path.to_owned(), at)).unwrap_or(&zeroes);
        Ok(places.iter().map(|at| Sample::of(*at, block(*at))).collect())
    }

    fn module_parameter(&self, _module: &str, name: &str) -> Option<u32> {
        Some(if name == "max_queues" { self.state.lock().unwrap().max_queues } else { 4 })
    }

    fn packets(&self, _device: &str) -> Option<u64> {
        None
    }

    fn teach_bridge(&self, device: &str, address: [u8; 6]) -> io::Result<()> {
        self.state.lock().unwrap().taught.push((device.to_owned(), address));
        Ok(())
    }

    fn send_frames(&self, device: &str, frames: &[Vec<u8>]) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.frames.extend(frames.iter().map(|frame| (device.to_owned(), frame.clone())));
        Ok(())
    }

    fn now(&self) -> Instant {
        self.start + self.state.lock().unwrap().clock
    }

    fn sleep(&self, time: Duration) {
        let mut state = self.state.lock().unwrap();
        state.clock += time;
        for place in state.busy.clone() {
            let count = state.blocks.entry(place).or_insert_with(|| vec![0; SAMPLE]);
            count[0] = count[0].wrapping_add(1);
        }
    }
}

/// The store of a host with a guest that has a vbd, a vif and a console, all connected; from a real host's listing.
pub fn with_guest(host: &Host, domid: u16) {
    let listing = include_str!("../data/store-of-a-guest.txt").replace("@", &domid.to_string());
    for line in listing.lines() {
        let (path, value) = line.split_once(" = ").unwrap();
        let mut state = host.state.lock().unwrap();
        insert(&mut state, path, value.as_bytes());
    }
    let mut state = host.state.lock().unwrap();
    state.bound.extend([format!("vbd-{domid}-51712"), format!("vif-{domid}-0")]);
    state.disks.insert("/dev/ram0".into(), disk());
    state.bridges.insert("xenbr0".into());
}

pub fn disk() -> BlockDevice {
    BlockDevice {
        major: 1,
        minor: 0,
        sectors: 131_072,
        logical_block: 512,
        physical_block: 4096,
        write_back: false,
        read_only: false,
        name: Some(Name { kind: "serial".into(), value: "lun".into(), start: 0 }),
    }
}
