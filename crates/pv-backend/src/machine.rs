//! What dom0's kernel and its programs are asked for.

use std::io;
use std::time::{Duration, Instant};

use crate::disk::{Name, Sample};
use serde::{Deserialize, Serialize};

/// A block device of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    /// Device number.
    pub major: u32,
    /// Device number.
    pub minor: u32,
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Logical block size in bytes.
    pub logical_block: u32,
    /// Physical block size in bytes.
    pub physical_block: u32,
    /// It has a volatile write cache, so that flushes mean something.
    pub write_back: bool,
    /// Opening it for writing would fail.
    pub read_only: bool,
    /// What the storage says of itself.
    pub name: Option<Name>,
}

/// How a vif's network device in dom0 is set up as a port of a bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgePort {
    /// The bridge.
    pub bridge: String,
    /// The device's own MAC address.
    pub address: [u8; 6],
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its `IFF_*` flags as they were set, those that the kernel adds left out.
    pub flags: u16,
}

/// A hotplug script to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script {
    /// The program.
    pub program: String,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Its environment, on top of PATH.
    pub environment: Vec<(String, String)>,
}

/// This host, apart from its store and its hypervisor. Calls come from several threads.
pub trait Machine: Sync {
    /// Whether the device ("vbd-7-51712") is on the bus of backends, driven or not.
    fn is_present(&self, device: &str) -> bool;
    /// Whether the driver ("vbd", "vif") drives the device ("vbd-7-51712").
    fn is_bound(&self, driver: &str, device: &str) -> bool;
    /// Takes the device from its driver. Returns when the driver says that it is done.
    fn unbind(&self, driver: &str, device: &str) -> io::Result<()>;
    /// Gives the device to the driver, which probes it before this returns.
    fn bind(&self, driver: &str, device: &str) -> io::Result<()>;
    /// Runs a script to its end. The error is what it wrote, or how it ended.
    fn run(&self, script: &Script, limit: Duration) -> Result<(), String>;
    /// Whether there is such a program.
    fn is_program(&self, path: &str) -> bool;
    /// Whether there is such a bridge.
    fn is_bridge(&self, name: &str) -> bool;
    /// How a network device is set up, if it is a port of a bridge.
    fn bridge_port(&self, device: &str) -> Option<BridgePort>;
    /// Sets a network device up that way, and makes it a port of that bridge.
    fn join_bridge(&self, device: &str, port: &BridgePort) -> io::Result<()>;
    /// What kind of block device is at this path.
    fn block_device(&self, path: &str) -> io::Result<BlockDevice>;
    /// What stands on a block device at these places (bytes, multiples of [`crate::disk::SAMPLE`]), past this host's cache.
    fn samples(&self, path: &str, places: &[u64]) -> io::Result<Vec<Sample>>;
    /// A parameter of a module of dom0's kernel, "xen_blkback", "max_queues". `None` if there is none.
    fn module_parameter(&self, module: &str, name: &str) -> Option<u32>;
    /// How many packets a network device has received; of a vif, those that the guest has sent. `None` if there is no such device.
    fn packets(&self, device: &str) -> Option<u64>;
    /// Teaches the bridge of a network device that this address is behind it, whatever it had learned before.
    fn teach_bridge(&self, device: &str, address: [u8; 6]) -> io::Result<()>;
    /// Sends whole Ethernet frames out of a network device, in order.
    fn send_frames(&self, device: &str, frames: &[Vec<u8>]) -> io::Result<()>;
    /// The present time.
    fn now(&self) -> Instant;
    /// Waits.
    fn sleep(&self, time: Duration);
}
