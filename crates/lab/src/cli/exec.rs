//! `ferry-lab exec`: a script in a fresh lab.

use super::Common;
use anyhow::{Context, Result, bail};
use clap::Args;
use lab::host::{Assets, Disk, Host, HostConfig, HostFile, Nic};
use lab::image::guest;
use lab::lock::Lock;
use lab::net::RunClock;
use lab::net::ports::Network;
use lab::process::{self, Scratch};
use lab_agent::frame::Kind;
use lab_agent::message::{Done, Exec, Failed, Request};
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Serial number of the shared disk.
const SHARED: &str = "shared";
/// The hosts' names, in the order of their addresses 10.9.0.1, 10.9.0.2, …
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// How many hosts to boot: a, b, c, d.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=4))]
    hosts: u8,
    /// Memory of each host, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 3072)]
    memory: u32,
    /// Memory of each dom0, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1400)]
    dom0_memory: u32,
    /// Put a file into every dom0.
    #[arg(long, value_name = "LOCAL:REMOTE")]
    put: Vec<String>,
    /// Copy a file out of the first dom0 when the script is over.
    #[arg(long, value_name = "REMOTE:LOCAL")]
    get: Vec<String>,
    /// A static program as a guest's init: /root/guest/{vmlinuz,ramdisk,guest.cfg} are put into every dom0.
    #[arg(long, value_name = "INIT")]
    guest: Option<PathBuf>,
    /// A disk of this many MiB that all hosts see as /dev/disk/by-id/shared.
    #[arg(long, value_name = "MIB")]
    shared_disk: Option<u64>,
    /// Added to Xen's command line.
    #[arg(long, value_name = "OPTIONS", default_value = "")]
    xen_options: String,
    /// Boot even if a saved state would do.
    #[arg(long)]
    cold: bool,
    /// Run this xenstored instead of the stock one (a path in dom0 and its arguments).
    #[arg(long, value_name = "COMMAND")]
    xenstored: Option<String>,
    /// Run another script in another host's dom0 (b, c, d) at the same time; its output goes to HOST/script.log in the
    /// run's folder. It is killed when the first one ends. May be given once for each host.
    #[arg(long, value_name = "HOST=SCRIPT")]
    on: Vec<String>,
    /// The script: a file on this machine, run by bash in the first dom0 (host a).
    #[arg(value_name = "SCRIPT")]
    script: PathBuf,
    /// The script's arguments.
    #[arg(value_name = "ARGUMENT", last = true)]
    arguments: Vec<String>,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let script = fs::read(&options.script).with_context(|| format!("read {}", options.script.display()))?;
    let mut files = options.put.iter().map(|put| file(put)).collect::<Result<Vec<_>>>()?;
    let gets = options
        .get
        .iter()
        .map(|get| get.split_once(':').with_context(|| format!("--get {get} is not REMOTE:LOCAL")))
        .collect::<Result<Vec<_>>>()?;
    process::end_cleanly(Some(options.common.time_limit()))?;
    let assets = Assets::prepare()?;
    let _lock = Lock::take(options.common.wait())?;
    let scratch = Scratch::new()?;
    let directory = &options.common.run_dir;
    fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    if let Some(init) = &options.guest {
        files.extend(guest_files(&assets, init, scratch.path())?);
    }
    let others = options
        .on
        .iter()
        .map(|on| on.split_once('=').with_context(|| format!("--on {on} is not HOST=SCRIPT")))
        .collect::<Result<Vec<_>>>()?;
    let mut network = Network::start(RunClock::start(), None).context("start the switch")?;
    let mut disks = Vec::new();
    if let Some(size) = options.shared_disk {
        let image = scratch.path().join("shared.raw");
        fs::File::create(&image)
            .and_then(|file| file.set_len(size << 20))
            .with_context(|| format!("make the shared disk {}", image.display()))?;
        disks.push(Disk { serial: SHARED.to_owned(), image });
    }
    let mut hosts = Vec::new();
    for (number, name) in (1u8..).zip(NAMES.iter().take(usize::from(options.hosts))) {
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
            files: files.clone(),
            xenstored: options.xenstored.as_ref().map(|line| line.split_whitespace().map(str::to_owned).collect()),
            ..HostConfig::new(*name)
        };
        hosts.push(Host::launch(&assets, config, directory, scratch.path())?);
    }
    for host in &hosts {
        host.wait_ready(Duration::from_secs(300))?;
    }
    let first = hosts.first().context("there is no host")?;
    first.put(&script, "/root/script", 0o755)?;
    for (name, script) in others {
        let host = hosts.iter().find(|host| host.name() == name).with_context(|| format!("--on: no host {name}"))?;
        host.put(&fs::read(script).with_context(|| format!("read {script}"))?, "/root/script", 0o755)?;
        let argv = vec!["bash".to_owned(), "/root/script".to_owned()];
        let program = Exec { argv, background: Some("/var/log/script.log".to_owned()), ..Exec::default() };
        host.exec(&program)?;
    }
    let mut argv = vec!["bash".to_owned(), "/root/script".to_owned()];
    argv.extend(options.arguments.iter().cloned());
    let code = stream_out(first, Exec { argv, ..Exec::default() })?;
    for (remote, local) in gets {
        first.get_file(remote, Path::new(local))?;
    }
    for host in &hosts {
        if let Ok(log) = host.get("/var/log/script.log") {
            fs::write(host.directory().join("script.log"), log).context("keep a script's output")?;
        }
        host.collect_logs();
    }
    Ok(ExitCode::from(code))
}

/// Runs a program, passing its output through as it comes; gives its exit code.
fn stream_out(host: &Host, program: Exec) -> Result<u8> {
    let stream = host.open(&Request::Exec(program))?;
    stream.send_all(&[])?;
    loop {
        let Some(frame) = stream.next(Duration::from_millis(500))? else {
            host.check()?;
            continue;
        };
        match frame.kind {
            Kind::Data => {
                let mut out = std::io::stdout().lock();
                out.write_all(&frame.body).and_then(|()| out.flush()).context("write to standard output")?;
            }
            Kind::ErrorData => std::io::stderr().write_all(&frame.body).context("write to standard error")?,
            Kind::Done => {
                return Ok(match serde_json::from_slice(&frame.body).context("the agent's answer")? {
                    Done::Exited { code } => u8::try_from(code).unwrap_or(255),
                    Done::Signalled { signal } => u8::try_from(128 + signal).unwrap_or(255),
                    Done::TimedOut => 124,
                    Done::Started { .. } | Done::Ok => 0,
                });
            }
            Kind::Failed => {
                let failed: Failed = serde_json::from_slice(&frame.body).context("the agent's answer")?;
                bail!("{}: {}", host.name(), failed.reason);
            }
            _ => {}
        }
    }
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
