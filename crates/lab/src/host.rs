//! An emulated host: Xen, dom0 and the agent in it, ready to take commands.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use lab::host::{Assets, Host, HostConfig};
//! use std::time::Duration;
//! let assets = Assets::prepare()?;
//! let scratch = lab::process::Scratch::new()?;
//! let host = Host::launch(&assets, HostConfig::new("a"), "run".as_ref(), scratch.path())?;
//! host.wait_ready(Duration::from_secs(180))?;
//! println!("{}", host.sh("xl info")?);
//! # Ok(())
//! # }
//! ```

mod agent;
mod snapshot;

use crate::cache::Cache;
use crate::image::dom0;
use crate::packages::{Pins, Unpacked};
use crate::progress::{self, Step};
use crate::qemu::{self, Machine, Qemu};
use agent::Agent;
pub use agent::Stream;
use anyhow::{Context, Result, bail};
use lab_agent::message::{Done, Exec, Request, Start};
pub use qemu::{Disk, Nic};
use snapshot::Snapshot;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long a vCPU runs, in microseconds, before another of the same priority may take its place (Xen's `sched_ratelimit_us`).
const SLICE_US: u32 = 5000;

/// What every host boots from, in the cache.
#[derive(Clone, Debug)]
pub struct Assets {
    /// QEMU's package.
    pub qemu: Unpacked,
    /// dom0's and the guests' kernel package.
    pub kernel: Unpacked,
    /// dom0's packages.
    pub dom0: Unpacked,
    /// The hypervisor's package.
    pub hypervisor: Unpacked,
    /// Xen, ungzipped.
    pub xen_image: PathBuf,
    /// The kernel's image (dom0's and the guests').
    pub kernel_image: PathBuf,
    /// dom0's ramdisk.
    pub ramdisk: PathBuf,
}

impl Assets {
    /// Fetches and makes whatever is not yet in the cache.
    pub fn prepare() -> Result<Assets> {
        let cache = Cache::open()?;
        let pins = Pins::load()?;
        let qemu = pins.fetch(&cache, "qemu")?;
        let kernel = pins.fetch(&cache, "kernel")?;
        let hypervisor = pins.fetch(&cache, "hypervisor")?;
        let dom0 = pins.fetch(&cache, "dom0")?;
        let xen_image = dom0::hypervisor(&cache, &hypervisor)?;
        let kernel_image = dom0::kernel(&kernel)?;
        let ramdisk = dom0::ramdisk(&cache, &dom0, None, &kernel, &static_binary("lab-agent")?)?;
        Ok(Assets { qemu, kernel, dom0, hypervisor, xen_image, kernel_image, ramdisk })
    }

    /// dom0's ramdisk with a device model, which is fetched when it is needed for the first time.
    fn ramdisk_with_device_model(&self) -> Result<PathBuf> {
        let cache = Cache::open()?;
        let model = Pins::load()?.fetch(&cache, "device-model")?;
        dom0::ramdisk(&cache, &self.dom0, Some(&model), &self.kernel, &static_binary("lab-agent")?)
    }
}

/// Path of one of our static programs for dom0 or a guest: in `$FERRY_LAB_BIN`, or where cargo puts them when
/// `cargo xtask lab` builds them.
pub fn static_binary(name: &str) -> Result<PathBuf> {
    let mut places = Vec::new();
    if let Some(directory) = std::env::var_os("FERRY_LAB_BIN") {
        places.push(PathBuf::from(directory));
    }
    if let Ok(program) = std::env::current_exe()
        && let Some(target) = program.ancestors().find(|path| path.ends_with("target"))
    {
        places.push(target.join("x86_64-unknown-linux-gnu/lab"));
    }
    for place in &places {
        let path = place.join(name);
        if path.is_file() {
            return Ok(path);
        }
    }
    let looked: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
    bail!("the static program {name} is not built (looked in {}); run `cargo xtask build`", looked.join(", "))
}

/// The hypervisor extension, one file for each build of Xen that it is made for: beside the folder of the static programs, where
/// `cargo xtask build` puts it, or in `$FERRY_LAB_BIN`.
pub fn extension_files() -> Result<Vec<PathBuf>> {
    let binary = static_binary("ferry")?;
    let mut places: Vec<PathBuf> = binary.parent().map(Path::to_owned).into_iter().collect();
    places.extend(binary.ancestors().find(|path| path.ends_with("target")).map(|target| target.join("extension")));
    let mut files = Vec::new();
    for place in &places {
        let entries = std::fs::read_dir(place).into_iter().flatten().flatten();
        files.extend(
            entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "livepatch")),
        );
    }
    if files.is_empty() {
        bail!("the hypervisor extension is not built; run `cargo xtask build`");
    }
    Ok(files)
}

/// A file for dom0.
#[derive(Clone, Debug)]
pub struct HostFile {
    /// On this machine.
    pub local: PathBuf,
    /// Absolute path in dom0.
    pub remote: String,
    /// Permission bits.
    pub mode: u32,
}

/// How one host is to be.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Its name, also dom0's host name.
    pub name: String,
    /// Processors of the emulated machine.
    pub vcpus: u32,
    /// Its memory, MiB.
    pub memory_mib: u32,
    /// What of it dom0 gets, MiB.
    pub dom0_memory_mib: u32,
    /// Added to Xen's command line.
    pub xen_options: String,
    /// Added to dom0's kernel command line.
    pub dom0_options: String,
    /// How far this host's wall clock is ahead of this machine's (negative: behind).
    pub wallclock_skew_ms: i64,
    /// Network card; in dom0 it is in the bridge `xenbr0`.
    pub nic: Option<Nic>,
    /// dom0's address on the bridge with prefix length.
    pub address: Option<String>,
    /// Disks; in dom0 each is `/dev/disk/by-id/SERIAL`.
    pub disks: Vec<Disk>,
    /// Put into dom0 before the toolstack starts.
    pub files: Vec<HostFile>,
    /// Command line of another xenstored than the stock one.
    pub xenstored: Option<Vec<String>>,
    /// Have a device model in dom0, for HVM guests. dom0 then wants 2200 MiB.
    pub device_model: bool,
    /// Boot even if a saved state would do; then Xen's start can be seen on the console and uptime begins at zero.
    pub cold: bool,
}

impl HostConfig {
    /// A host with the usual size and nothing special.
    pub fn new(name: impl Into<String>) -> HostConfig {
        HostConfig {
            name: name.into(),
            vcpus: 2,
            memory_mib: 3072,
            dom0_memory_mib: 1400,
            xen_options: String::new(),
            dom0_options: String::new(),
            wallclock_skew_ms: 0,
            nic: None,
            address: None,
            disks: Vec::new(),
            files: Vec::new(),
            xenstored: None,
            device_model: false,
            cold: false,
        }
    }
}

/// What a program in dom0 wrote and how it ended.
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended.
    pub done: Done,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Whether it ended with exit code 0.
    pub fn success(&self) -> bool {
        self.done == Done::Exited { code: 0 }
    }

    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// A running host. It ends when dropped.
#[derive(Debug)]
pub struct Host {
    config: HostConfig,
    directory: PathBuf,
    console: PathBuf,
    started: Instant,
    agent: OnceLock<Agent>,
    agent_socket: PathBuf,
    snapshot: Snapshot,
    resumed: bool,
    qemu: Qemu,
}

impl Host {
    /// Starts the machine. Its logs go to `directory`/NAME/, its sockets into `sockets`. Follow it with
    /// [`Host::wait_ready`]; start several hosts first, they boot together.
    pub fn launch(assets: &Assets, config: HostConfig, directory: &Path, sockets: &Path) -> Result<Host> {
        let directory = directory.join(&config.name);
        fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
        let console = directory.join("console.log");
        let agent_socket = sockets.join(format!("{}.agent", config.name));
        // Under emulation dom0's watchdog now and then takes the TSC for unstable. Linux then changes its clock source, tells Xen the time,
        // and with that moves the wall clock of every guest by some milliseconds: what a scenario about wall clocks sees.
        let dom0_options =
            format!("console=hvc0 rdinit=/init quiet loglevel=5 net.ifnames=0 tsc=nowatchdog {}", config.dom0_options);
        // Under emulation a change of the running vCPU costs milliseconds, since QEMU then has its translations of addresses to find again.
        // With Xen's 1 ms dom0 was at a tenth of its speed beside a guest with two busy vCPUs, which should leave it a third.
        let xen_options = format!(
            "dom0_mem={0}M,max:{0}M com1=115200 console=com1 loglvl=all guest_loglvl=all noreboot sched_ratelimit_us={SLICE_US} {1}",
            config.dom0_memory_mib, config.xen_options
        );
        let ramdisk = if config.device_model { assets.ramdisk_with_device_model()? } else { assets.ramdisk.clone() };
        let snapshot = Snapshot::of(assets, &ramdisk, &config, &[&xen_options, &dom0_options])?;
        let mut machine = Machine {
            name: config.name.clone(),
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
            kernel: assets.xen_image.clone(),
            command_line: xen_options,
            modules: vec![(assets.kernel_image.clone(), dom0_options.trim_end().to_owned()), (ramdisk, String::new())],
            console: console.clone(),
            log: directory.join("qemu.log"),
            clock_offset: config.wallclock_skew_ms.div_euclid(1000),
            agent: agent_socket.clone(),
            agent_name: lab_agent::PORT_NAME.to_owned(),
            control: sockets.join(format!("{}.qmp", config.name)),
            nic: config.nic.clone(),
            disks: config.disks.clone(),
            resume_from: if config.cold { None } else { snapshot.existing() },
        };
        let how = if machine.resume_from.is_some() { "resuming a saved" } else { "booting a" };
        progress::say(format!("{}: {how} host ({} vCPUs, {} MiB)", config.name, config.vcpus, config.memory_mib));
        let started = Instant::now();
        let qemu = match Qemu::start(&assets.qemu, &machine) {
            Err(error) if machine.resume_from.is_some() => {
                progress::say(format!("{}: the saved state can't be used, so it boots ({error:#})", config.name));
                snapshot.forget();
                machine.resume_from = None;
                Qemu::start(&assets.qemu, &machine)?
            }
            started => started?,
        };
        let resumed = machine.resume_from.is_some();
        Ok(Host { config, directory, console, started, agent: OnceLock::new(), agent_socket, snapshot, resumed, qemu })
    }

    /// Waits for dom0's agent, puts the files there, and starts the toolstack.
    pub fn wait_ready(&self, limit: Duration) -> Result<()> {
        self.wait_for_agent(limit).inspect_err(|_| {
            if self.resumed {
                self.snapshot.forget();
            }
        })?;
        progress::say(format!("{}: dom0 is up after {:.1} s", self.name(), self.started.elapsed().as_secs_f64()));
        if !self.resumed && !self.config.cold {
            self.snapshot.save(self.name(), &self.qemu)?;
        }
        self.qemu.tick()?;
        for file in &self.config.files {
            self.put_file(&file.local, &file.remote, file.mode)?;
        }
        let step = Step::begin(format!("{}: starting the toolstack", self.name()));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let wallclock = i128::try_from(now).unwrap_or(0) + i128::from(self.config.wallclock_skew_ms) * 1_000_000;
        let mut seed = [0; 32];
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty()).context("draw a seed")?;
        let start = Start {
            hostname: self.config.name.clone(),
            xenstored: self.config.xenstored.clone(),
            address: self.config.address.clone(),
            mac: self.config.nic.as_ref().map(|nic| nic.mac),
            wallclock_ns: Some(u64::try_from(wallclock).context("the wall clock would be before 1970")?),
            seed: Some(seed),
        };
        self.request(&Request::Start(start), &[])?;
        step.done();
        Ok(())
    }

    fn wait_for_agent(&self, limit: Duration) -> Result<()> {
        let end = self.started + limit;
        let agent = Agent::connect(&self.config.name, &self.agent_socket, || {
            self.check()?;
            if Instant::now() > end {
                bail!(
                    "{}: dom0's agent did not answer within {} s\n{}",
                    self.name(),
                    limit.as_secs(),
                    self.console_tail()
                );
            }
            Ok(())
        })?;
        let _ = self.agent.set(agent);
        Ok(())
    }

    /// The host's name.
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// What it was made from.
    pub fn config(&self) -> &HostConfig {
        &self.config
    }

    /// Where its logs are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Xen's and dom0's console (Xen's lines begin with `(XEN)`).
    pub fn console(&self) -> &Path {
        &self.console
    }

    /// The console's last lines, for an error message.
    pub fn console_tail(&self) -> String {
        qemu::tail(&self.console, 15)
    }

    /// Fails if the machine is dead: QEMU gone, or Xen in a panic.
    pub fn check(&self) -> Result<()> {
        self.qemu.check()?;
        let text = fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        if let Some(at) = text.find("Panic on CPU") {
            let report: Vec<&str> = text.get(at..).unwrap_or_default().lines().take(4).collect();
            bail!("{}: Xen panicked: {}\n{}", self.name(), report.join(" "), self.console_tail());
        }
        Ok(())
    }

    fn agent(&self) -> Result<&Agent> {
        self.agent.get().with_context(|| format!("{}: dom0 is not up yet", self.config.name))
    }

    /// Opens a stream for a request; for programs that are talked to while they run.
    pub fn open(&self, request: &Request) -> Result<Stream> {
        self.agent()?.open(request).map_err(|error| self.check().err().unwrap_or(error))
    }

    /// Carries out a request with the given input and collects its output. A time limit in the request is kept by
    /// dom0; without one, this waits as long as the host lives.
    pub fn request(&self, request: &Request, input: &[u8]) -> Result<Output> {
        let stream = self.open(request)?;
        stream.send_all(input)?;
        stream.collect(|| self.check())
    }

    /// Runs a program to its end. Only that it could not be run is an error here; look at the output for the rest.
    pub fn exec(&self, program: &Exec) -> Result<Output> {
        self.request(&Request::Exec(program.clone()), &[])
    }

    /// Runs a shell script and gives its standard output; an exit code other than 0 is an error with all it wrote.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.sh_limited(script, Duration::from_secs(300))
    }

    /// As [`Host::sh`] with a time limit of one's own.
    pub fn sh_limited(&self, script: &str, limit: Duration) -> Result<String> {
        let program = Exec {
            argv: vec!["bash".into(), "-c".into(), script.into()],
            timeout_ms: Some(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)),
            ..Exec::default()
        };
        let output = self.exec(&program)?;
        if !output.success() {
            bail!(
                "{}: `{script}` failed ({:?})\n{}{}",
                self.name(),
                output.done,
                output.text(),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(output.text())
    }

    /// Puts a file into dom0.
    pub fn put_file(&self, local: &Path, remote: &str, mode: u32) -> Result<()> {
        let bytes = fs::read(local).with_context(|| format!("read {}", local.display()))?;
        self.put(&bytes, remote, mode)
    }

    /// Puts bytes into dom0 as a file.
    pub fn put(&self, bytes: &[u8], remote: &str, mode: u32) -> Result<()> {
        self.request(&Request::Put { path: remote.to_owned(), mode }, bytes).map(|_| ())
    }

    /// Reads a file of dom0's.
    pub fn get(&self, remote: &str) -> Result<Vec<u8>> {
        self.request(&Request::Get { path: remote.to_owned() }, &[]).map(|output| output.stdout)
    }

    /// Copies a file of dom0's to this machine.
    pub fn get_file(&self, remote: &str, local: &Path) -> Result<()> {
        fs::write(local, self.get(remote)?).with_context(|| format!("write {}", local.display()))
    }

    /// Stops the host's processors and its clock.
    pub fn pause(&self) -> Result<()> {
        self.qemu.pause()
    }

    /// Lets it go on.
    pub fn resume(&self) -> Result<()> {
        self.qemu.resume()
    }

    /// Ends the host at once, as a power failure would. Everything asked of it afterwards fails.
    pub fn kill(&self) {
        self.qemu.kill();
    }

    /// The machine under it, for QMP commands.
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// Copies dom0's logs (`/var/log/xen`, the kernel's) into the host's folder. Never fails: the host may be dead.
    pub fn collect_logs(&self) {
        let archive = "dmesg > /var/log/dmesg.log 2>&1; xl dmesg > /var/log/xl-dmesg.log 2>&1; tar -C /var -cf - log";
        let program = Exec {
            argv: vec!["bash".into(), "-c".into(), archive.into()],
            timeout_ms: Some(20_000),
            ..Exec::default()
        };
        if let Ok(output) = self.exec(&program) {
            let _ = fs::write(self.directory.join("dom0-log.tar"), output.stdout);
        }
    }
}
