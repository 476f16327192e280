//! Plain hosts on one switch, as the options of `exec` and `shell` describe them.

use super::Common;
use anyhow::{Context, Result};
use clap::Args;
use lab::host::{Assets, Disk, Host, HostConfig, HostFile, Nic};
use lab::image::guest;
use lab::lock::Lock;
use lab::net::RunClock;
use lab::net::ports::Network;
use lab::process::{self, Scratch};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Serial number of the shared disk.
const SHARED: &str = "shared";
/// The hosts' names, in the order of their addresses 10.9.0.1, 10.9.0.2, …
const NAMES: [&str; 4] = ["a", "b", "c", "d"];
/// How long a host may take to come up when others use the machine too.
const BOOT: Duration = Duration::from_secs(300);
/// How long hosts run if nobody says otherwise.
const HALF_AN_HOUR: Duration = Duration::from_secs(1800);

/// What the hosts are like.
#[derive(Debug, Args)]
pub struct SiteOptions {
    #[command(flatten)]
    pub common: Common,
    /// Memory of each host, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 3072)]
    memory: u32,
    /// Memory of each dom0, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1400)]
    dom0_memory: u32,
    /// Put a file into every dom0.
    #[arg(long, value_name = "LOCAL:REMOTE")]
    put: Vec<String>,
    /// A static program as a guest's init: /root/guest/{vmlinuz,ramdisk,guest.cfg} are put into every dom0.
    #[arg(long, value_name = "INIT")]
    guest: Option<PathBuf>,
    /// A disk of this many MiB that all hosts see as /dev/disk/by-id/shared.
    #[arg(long, value_name = "MIB")]
    shared_disk: Option<u64>,
    /// Added to Xen's command line.
    #[arg(long, value_name = "OPTIONS", default_value = "")]
    xen_options: String,
    /// Have a device model in dom0, for HVM guests (give each dom0 2200 MiB and each host 4096 then).
    #[arg(long)]
    device_model: bool,
    /// Boot even if a saved state would do.
    #[arg(long)]
    cold: bool,
    /// Run this xenstored instead of the stock one (a path in dom0 and its arguments).
    #[arg(long, value_name = "COMMAND")]
    xenstored: Option<String>,
}

/// Running hosts and all that they need. Fields are dropped in this order: the hosts before their sockets and the lock.
#[derive(Debug)]
pub struct Site {
    /// The hosts, the first is a.
    pub hosts: Vec<Host>,
    _network: Network,
    _scratch: Scratch,
    _lock: Lock,
}

/// Boots `count` hosts and waits until all take commands.
pub fn boot(options: &SiteOptions, count: u8) -> Result<Site> {
    let mut files = options.put.iter().map(|put| file(put)).collect::<Result<Vec<_>>>()?;
    process::end_cleanly(Some(options.common.time_limit().unwrap_or(HALF_AN_HOUR)))?;
    let assets = Assets::prepare()?;
    let lock = Lock::take(options.common.wait())?;
    let scratch = Scratch::new()?;
    let directory = &options.common.run_dir;
    fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    if let Some(init) = &options.guest {
        files.extend(guest_files(&assets, init, scratch.path())?);
    }
    let mut disks = Vec::new();
    if let Some(size) = options.shared_disk {
        let image = scratch.path().join("shared.raw");
        fs::File::create(&image)
            .and_then(|file| file.set_len(size << 20))
            .with_context(|| format!("make the shared disk {}", image.display()))?;
        disks.push(Disk { serial: SHARED.to_owned(), image });
    }
    let mut network = Network::start(RunClock::start(), None).context("start the switch")?;
    let mut hosts = Vec::new();
    for (number, name) in (1u8..).zip(NAMES.iter().take(usize::from(count))) {
        let nic = Nic {
            mac: [0x02, 0, 0, 0, 0, number],
            local: scratch.path().join(format!("{name}.card")),
            remote: scratch.path().join(format!("{name}.switch")),
        };
        network.add_card(name, &nic.remote, &nic.local).context("add a port to the switch")?;
        let config = HostConfig {
            nic: Some(nic),
            address: Some(format!("10.9.0.{number}/24")),
            memory_mib: options.memory,
            dom0_memory_mib: options.dom0_memory,
            xen_options: options.xen_options.clone(),
            disks: disks.clone(),
            cold: options.cold,
            device_model: options.device_model,
            files: files.clone(),
            xenstored: options.xenstored.as_ref().map(|line| line.split_whitespace().map(str::to_owned).collect()),
            ..HostConfig::new(*name)
        };
        hosts.push(Host::launch(&assets, config, directory, scratch.path())?);
    }
    for host in &hosts {
        host.wait_ready(BOOT)?;
    }
    Ok(Site { hosts, _network: network, _scratch: scratch, _lock: lock })
}

fn file(put: &str) -> Result<HostFile> {
    let (local, remote) = put.rsplit_once(':').with_context(|| format!("--put {put} is not LOCAL:REMOTE"))?;
    let meta = fs::metadata(local).with_context(|| format!("look at {local}"))?;
    Ok(HostFile { local: PathBuf::from(local), remote: remote.to_owned(), mode: meta.permissions().mode() & 0o7777 })
}

/// Kernel, ramdisk and configuration of a plain PVH guest.
fn guest_files(assets: &Assets, init: &Path, scratch: &Path) -> Result<Vec<HostFile>> {
    let ramdisk = scratch.join("guest-ramdisk");
    guest::ramdisk(&ramdisk, init, &assets.kernel, guest::FRONTENDS, &[])?;
    let config = scratch.join("guest.cfg");
    let text = "name = \"guest\"\ntype = \"pvh\"\nvcpus = 1\nmemory = 256\nkernel = \"/root/guest/vmlinuz\"\n\
                ramdisk = \"/root/guest/ramdisk\"\nextra = \"console=hvc0 rdinit=/init\"\n\
                cpuid = \"host,rdtscp=0\"\non_crash = \"preserve\"\non_reboot = \"destroy\"\n";
    fs::write(&config, text).context("write the guest's configuration")?;
    let file = |local: PathBuf, name: &str| HostFile { local, remote: format!("/root/guest/{name}"), mode: 0o644 };
    Ok(vec![file(assets.kernel_image.clone(), "vmlinuz"), file(ramdisk, "ramdisk"), file(config, "guest.cfg")])
}
