//! Brings up what a Xen host runs: xenstored, dom0's own entries, xenconsoled, and the bridge.

use crate::boot;
use anyhow::{Context, Result, bail};
use lab_agent::message::{Done, Start};
use rustix::ioctl::{NoArg, Opcode, ioctl, opcode};
use rustix::time::{ClockId, Timespec, clock_settime};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Name of the bridge that xl.conf uses by default.
const BRIDGE: &str = "xenbr0";
/// Of the card and the bridge. What the hosts send each other, a migration above all, goes in few large frames, since each frame is
/// dear under emulation. Guests and the peer keep to 1500.
const MTU: u32 = 9000;
const XENSTORED_SOCKET: &str = "/run/xenstored/socket";
const CONSOLED_PID: &str = "/run/xenconsoled.pid";
const STARTED: &str = "/run/lab-started";

/// Makes the kernel's random numbers depend on the seed from here on (random(4)).
fn stir(seed: &[u8]) -> Result<()> {
    /// `RNDRESEEDCRNG` (linux/random.h).
    const RESEED: Opcode = opcode::none(b'R', 0x07);
    let mut random = File::options().write(true).open("/dev/urandom")?;
    random.write_all(seed)?;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    unsafe { ioctl(&random, NoArg::<RESEED>::new()) }?;
    Ok(())
}

/// Starts everything; the error names the step that failed.
pub fn start(how: &Start) -> Result<Done> {
    if fs::exists(STARTED).unwrap_or(false) {
        bail!("the toolstack was started before");
    }
    fs::write(STARTED, "").context("mark the start")?;
    if let Some(seed) = &how.seed {
        stir(seed).context("stir the random numbers")?;
    }
    if let Some(ns) = how.wallclock_ns {
        let tv_sec = i64::try_from(ns / 1_000_000_000).unwrap_or(i64::MAX);
        let tv_nsec = (ns % 1_000_000_000) as _;
        clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec }).context("set the wall clock")?;
    }
    rustix::system::sethostname(how.hostname.as_bytes()).context("set the host's name")?;
    fs::write("/etc/hostname", format!("{}\n", how.hostname)).context("write the host's name")?;
    bridge(how)?;
    link_disks();

    let tree = boot::xen_directory().context("the image has no Xen tools")?;
    let stock = || vec![format!("{tree}/bin/xenstored"), "--pid-file".to_owned(), "{pidfile}".to_owned()];
    let argv: Vec<String> = how
        .xenstored
        .clone()
        .unwrap_or_else(stock)
        .into_iter()
        .map(|word| word.replace("{pidfile}", "/run/xenstored.pid"))
        .collect();
    daemon(&argv, "/var/log/xen/xenstored.log").context("xenstored")?;
    let end = Instant::now() + Duration::from_secs(30);
    while UnixStream::connect(XENSTORED_SOCKET).is_err() {
        if Instant::now() > end {
            bail!("xenstored did not listen on {XENSTORED_SOCKET} within 30 s; see /var/log/xen/xenstored.log");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    run(&[&format!("{tree}/bin/xen-init-dom0")])?;
    let consoled = [format!("{tree}/bin/xenconsoled"), "--log=guest".to_owned(), format!("--pid-file={CONSOLED_PID}")];
    daemon(&consoled, "/var/log/xen/xenconsoled.log").context("xenconsoled")?;
    wait_for_console(Duration::from_secs(30))?;
    Ok(Done::Ok)
}

/// xenconsoled puts itself in the background before it is done setting up and tells only syslog why it gave up, so
/// that its process must be seen to stay.
fn wait_for_console(limit: Duration) -> Result<()> {
    let end = Instant::now() + limit;
    loop {
        let pid = fs::read_to_string(CONSOLED_PID).unwrap_or_default();
        if !pid.trim().is_empty() {
            std::thread::sleep(Duration::from_millis(100));
            if fs::exists(format!("/proc/{}", pid.trim())).unwrap_or(false) {
                return Ok(());
            }
            bail!("xenconsoled gave up right after its start; the reason is on dom0's console");
        }
        if Instant::now() > end {
            bail!("xenconsoled did not come up within {} s", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a program that puts itself in the background, or that stays: both are fine.
fn daemon(argv: &[String], log: &str) -> Result<()> {
    let Some((name, arguments)) = argv.split_first() else { bail!("the command line is empty") };
    let file = fs::OpenOptions::new().create(true).append(true).open(log).with_context(|| format!("open {log}"))?;
    let mut child = Command::new(name)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(file.try_clone().context("duplicate the log")?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("start {name}"))?;
    let name = name.clone();
    std::thread::spawn(move || match child.wait() {
        Ok(status) if status.success() => {}
        other => boot::log(&format!("{name} ended: {other:?}")),
    });
    Ok(())
}

fn run(argv: &[&str]) -> Result<()> {
    let Some((name, arguments)) = argv.split_first() else { bail!("the command line is empty") };
    let output =
        Command::new(name).args(arguments).stdin(Stdio::null()).output().with_context(|| format!("run {name}"))?;
    if !output.status.success() {
        bail!(
            "{} failed ({}): {}{}",
            argv.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stdout).trim(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// The bridge, with the network card in it if there is one. One `ip -batch` instead of six runs: each costs a tenth
/// of a second under emulation.
fn bridge(how: &Start) -> Result<()> {
    let mut batch = format!("link set lo up\nlink add name {BRIDGE} type bridge forward_delay 0 stp_state 0\n");
    if fs::exists("/sys/class/net/eth0").unwrap_or(false) {
        // A host that went on from a saved state has the saved card's address.
        if let Some([a, b, c, d, e, f]) = how.mac {
            batch += &format!("link set eth0 address {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}\n");
        }
        batch += &format!("link set eth0 mtu {MTU}\nlink set eth0 master {BRIDGE}\nlink set eth0 up\n");
    }
    if let Some(address) = &how.address {
        batch += &format!("addr add {address} dev {BRIDGE}\n");
    }
    // Said of the bridge itself, or it takes the least of its ports'.
    batch += &format!("link set {BRIDGE} mtu {MTU}\nlink set {BRIDGE} up\n");
    fs::write("/run/lab-bridge", batch).context("write the bridge's set-up")?;
    run(&["ip", "-batch", "/run/lab-bridge"]).context("bridge")
}

/// `/dev/disk/by-id/NAME` for every virtio disk, after the serial number that the lab gave it.
fn link_disks() {
    let _ = fs::create_dir_all("/dev/disk/by-id");
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        if let Ok(serial) = fs::read_to_string(entry.path().join("serial"))
            && !serial.trim().is_empty()
        {
            let device = format!("/dev/{}", entry.file_name().to_string_lossy());
            let _ = std::os::unix::fs::symlink(device, format!("/dev/disk/by-id/{}", serial.trim()));
        }
    }
}
