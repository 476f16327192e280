//! One emulated machine: QEMU from its unpacked package, and its control socket (QMP).

use crate::packages::Unpacked;
use crate::process::{self, Owned};
use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What the machine boots and has.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Name for messages and in the process list.
    pub name: String,
    /// Processors.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Multiboot kernel (Xen) and its command line.
    pub kernel: PathBuf,
    /// See `kernel`.
    pub command_line: String,
    /// Multiboot modules with their command lines: dom0's kernel, dom0's ramdisk.
    pub modules: Vec<(PathBuf, String)>,
    /// Where COM1's output goes.
    pub console: PathBuf,
    /// Where QEMU's own messages go.
    pub log: PathBuf,
    /// Seconds that the machine's battery clock is ahead of this one's.
    pub clock_offset: i64,
    /// Unix socket of the agent's port, made by QEMU.
    pub agent: PathBuf,
    /// Name of the agent's port.
    pub agent_name: String,
    /// Unix socket for QMP, made by QEMU.
    pub control: PathBuf,
    /// Network card.
    pub nic: Option<Nic>,
    /// Disks.
    pub disks: Vec<Disk>,
    /// Go on from this saved state instead of booting.
    pub resume_from: Option<PathBuf>,
}

/// A network card whose frames travel one per datagram over Unix sockets.
#[derive(Clone, Debug)]
pub struct Nic {
    /// The card's address.
    pub mac: [u8; 6],
    /// The socket that QEMU binds.
    pub local: PathBuf,
    /// The socket that QEMU sends to; the switch binds it.
    pub remote: PathBuf,
}

/// A raw image as a virtio disk. Several machines may have the same image: all go through this machine's page cache,
/// so that a write acknowledged on one is seen on the others.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Serial number (at most 20 characters); dom0 has it as `/dev/disk/by-id/SERIAL`.
    pub serial: String,
    /// The image.
    pub image: PathBuf,
}

/// A running QEMU.
#[derive(Debug)]
pub struct Qemu {
    name: String,
    process: Owned,
    log: PathBuf,
    control: Mutex<Control>,
}

#[derive(Debug)]
struct Control {
    to: UnixStream,
    from: BufReader<UnixStream>,
    /// When [`Qemu::check`] last asked for the machine's state.
    looked: Option<Instant>,
}

/// Input of the interval timer.
const PIT_HZ: u32 = 1_193_182;
/// Ticks a second of [`Qemu::tick`].
const TICKS: u32 = 250;

/// How often [`Qemu::check`] asks QEMU itself.
const LOOK: Duration = Duration::from_secs(1);

/// The processor under which stock Xen 4.17 runs in QEMU 7.2: EPYC has SVM with nested paging, which QEMU emulates.
/// Without `smap` because PV dom0 otherwise dies of an unhandled page fault; without `monitor` because Xen's mwait
/// idle takes a #GP; without `xsave` because the sizes in CPUID leaf 0xD do not fit XCR0.
const PROCESSOR: &str = "EPYC,-smap,-monitor,-xsave";

impl Qemu {
    /// Starts the machine and connects to its control socket.
    pub fn start(package: &Unpacked, machine: &Machine) -> Result<Qemu> {
        let mut command = emulator(&package.tree);
        describe(&mut command, machine);
        let log = std::fs::File::create(&machine.log).with_context(|| format!("make {}", machine.log.display()))?;
        command.stdin(Stdio::null()).stdout(log.try_clone().context("duplicate the log")?).stderr(log);
        let process = process::spawn(command).with_context(|| format!("{}: QEMU", machine.name))?;
        process.prefer();
        let stream = connect(&machine.control, &process, machine)?;
        let from = BufReader::new(stream.try_clone().context("duplicate the control socket")?);
        let qemu = Qemu {
            name: machine.name.clone(),
            process,
            log: machine.log.clone(),
            control: Mutex::new(Control { to: stream, from, looked: None }),
        };
        qemu.greet()?;
        if machine.resume_from.is_some() {
            qemu.go_on()?;
        }
        Ok(qemu)
    }

    /// Waits until the saved state is loaded and lets the machine go on: it was saved standing still and is loaded so.
    fn go_on(&self) -> Result<()> {
        loop {
            self.check()?;
            let state = self.command("query-status", json!({}))?;
            if state.get("status").and_then(Value::as_str) != Some("inmigrate") {
                return self.resume();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn greet(&self) -> Result<()> {
        let mut line = String::new();
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        control.from.read_line(&mut line).context("QEMU's greeting")?;
        drop(control);
        self.command("qmp_capabilities", json!({})).map(|_| ())
    }

    /// Runs a QMP command and gives what it returned.
    pub fn command(&self, name: &str, arguments: Value) -> Result<Value> {
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        self.ask(&mut control, name, &arguments)
    }

    fn ask(&self, control: &mut Control, name: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": name, "arguments": arguments });
        let doing = || format!("{}: QEMU's {name}", self.name);
        writeln!(control.to, "{request}").with_context(doing)?;
        loop {
            let mut line = String::new();
            if control.from.read_line(&mut line).with_context(doing)? == 0 {
                bail!("{}: QEMU closed its control socket\n{}", self.name, tail(&self.log, 10));
            }
            let answer: Value = serde_json::from_str(&line).with_context(doing)?;
            if let Some(error) = answer.get("error") {
                let text = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given");
                return Err(anyhow!("{}: {text}", doing()));
            }
            // Anything else is an event.
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
        }
    }

    /// Stops the machine's processors and its clock.
    pub fn pause(&self) -> Result<()> {
        self.command("stop", json!({})).map(|_| ())
    }

    /// Lets it go on.
    pub fn resume(&self) -> Result<()> {
        self.command("cont", json!({})).map(|_| ())
    }

    /// Saves the whole machine's state (but not its disks) to a file, from which an equal machine can go on. The
    /// machine stands still meanwhile and goes on afterwards.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.pause()?;
        let saved = self.save_stopped(path);
        self.resume()?;
        saved
    }

    fn save_stopped(&self, path: &Path) -> Result<()> {
        self.command("migrate-set-parameters", json!({ "max-bandwidth": 1u64 << 36 }))?;
        let quoted = path.display().to_string().replace('\'', "'\\''");
        self.command("migrate", json!({ "uri": format!("exec:cat > '{quoted}'") }))?;
        loop {
            let state = self.command("query-migrate", json!({}))?;
            match state.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("{}: the machine's state was not saved: {state}", self.name),
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Lets the machine's interval timer (8254, channel 0) tick from now on, [`TICKS`] times a second, and with that repeats interrupts that
    /// were lost.
    ///
    /// QEMU 7.2 notes in one word (`interrupt_request`) that an interrupt is pending for an emulated processor. Its I/O thread sets it, and the
    /// processor's own thread changes it without a lock at each VMRUN and #VMEXIT (target/i386/tcg/sysemu/svm_helper.c). Now and then the
    /// note is lost: the local APIC has the interrupt pending and the processor has interrupts on, but takes it only when the next one comes.
    /// Seen with the local APIC's timer, every few seconds, for 0.3 to 0.9 s; a host with nothing else to wake it up stood still for
    /// minutes. Xen leaves this timer alone once it has the local APIC's, and does nothing at its interrupt but count it
    /// (`timer_interrupt`, xen/arch/x86/time.c).
    pub fn tick(&self) -> Result<()> {
        let [low, high] = u16::try_from(PIT_HZ / TICKS).unwrap_or(u16::MAX).to_le_bytes();
        // Counter 0, low byte then high byte, mode 2 (rate generator), binary.
        for (port, value) in [(0x43, 0x34), (0x40, low), (0x40, high)] {
            let line = format!("o /1 {port:#x} {value:#x}");
            self.command("human-monitor-command", json!({ "command-line": line }))?;
        }
        Ok(())
    }

    /// Ends it at once, as a power failure would.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// Fails if QEMU is no longer running, with its last words, or if it has stopped the machine for want of room on this machine's disk.
    pub fn check(&self) -> Result<()> {
        if let Some(status) = self.process.ended() {
            bail!("{}: QEMU ended ({status})\n{}", self.name, tail(&self.log, 10));
        }
        // Who holds the control socket asks something of QEMU already.
        let Ok(mut control) = self.control.try_lock() else { return Ok(()) };
        if control.looked.replace(Instant::now()).is_some_and(|last| last.elapsed() < LOOK) {
            return Ok(());
        }
        let state = self.ask(&mut control, "query-status", &json!({}));
        drop(control);
        if state.is_ok_and(|state| state.get("status").and_then(Value::as_str) == Some("io-error")) {
            bail!(
                "{}: it stands still because this machine's disk is full; make room in {}",
                self.name,
                std::env::temp_dir().display()
            );
        }
        Ok(())
    }

    /// Process id on this machine.
    pub fn id(&self) -> u32 {
        self.process.id()
    }
}

/// QEMU's command up to its own arguments: run by its package's loader with its package's libraries, so that nothing
/// on this machine matters.
fn emulator(tree: &Path) -> Command {
    let lib = tree.join("usr/lib/x86_64-linux-gnu");
    let mut command = Command::new(tree.join("lib64/ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(&lib).arg(tree.join("usr/bin/qemu-system-x86_64"));
    command.env("QEMU_MODULE_DIR", lib.join("qemu")).env_remove("LD_LIBRARY_PATH").env_remove("LD_PRELOAD");
    for firmware in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
        command.arg("-L").arg(tree.join(firmware));
    }
    command
}

fn describe(command: &mut Command, machine: &Machine) {
    let mut option = |name: &str, value: String| {
        command.arg(format!("-{name}")).arg(value);
    };
    let file = |path: &Path| escape(&path.display().to_string());
    option("name", format!("ferry-lab-{},debug-threads=on", machine.name));
    option("accel", "tcg,thread=multi,tb-size=512".to_owned());
    option("machine", "pc".to_owned());
    option("cpu", PROCESSOR.to_owned());
    option("smp", machine.vcpus.to_string());
    option("m", machine.memory_mib.to_string());
    option("rtc", format!("base={}", date_time(machine.clock_offset)));
    option("kernel", machine.kernel.display().to_string());
    option("append", machine.command_line.clone());
    let modules: Vec<String> =
        machine.modules.iter().map(|(path, line)| format!("{} {line}", file(path)).trim_end().to_owned()).collect();
    option("initrd", modules.join(","));
    option("chardev", format!("file,id=com1,path={}", file(&machine.console)));
    option("serial", "chardev:com1".to_owned());
    option("device", "virtio-serial-pci,max_ports=2".to_owned());
    option("chardev", format!("socket,id=agent,path={},server=on,wait=off", file(&machine.agent)));
    option("device", format!("virtserialport,chardev=agent,nr=1,name={}", machine.agent_name));
    option("chardev", format!("socket,id=qmp,path={},server=on,wait=off", file(&machine.control)));
    option("mon", "chardev=qmp,mode=control".to_owned());
    if let Some(nic) = &machine.nic {
        let mac: Vec<String> = nic.mac.iter().map(|byte| format!("{byte:02x}")).collect();
        option(
            "netdev",
            format!(
                "dgram,id=net0,local.type=unix,local.path={},remote.type=unix,remote.path={}",
                file(&nic.local),
                file(&nic.remote)
            ),
        );
        option("device", format!("virtio-net-pci,netdev=net0,romfile=,mac={}", mac.join(":")));
    }
    for (index, disk) in machine.disks.iter().enumerate() {
        option(
            "blockdev",
            format!(
                "driver=raw,node-name=disk{index},cache.direct=off,cache.no-flush=off,\
                 file.driver=file,file.locking=off,file.filename={}",
                file(&disk.image)
            ),
        );
        option(
            "device",
            format!("virtio-blk-pci,drive=disk{index},share-rw=on,write-cache=on,serial={}", escape(&disk.serial)),
        );
    }
    if let Some(state) = &machine.resume_from {
        command.arg("-incoming").arg(format!("exec:cat '{}'", state.display().to_string().replace('\'', "'\\''")));
    }
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-vga", "none"]);
}

/// QEMU's option parser takes a doubled comma for one.
fn escape(text: &str) -> String {
    text.replace(',', ",,")
}

fn connect(path: &Path, process: &Owned, machine: &Machine) -> Result<UnixStream> {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        if let Ok(stream) = UnixStream::connect(path) {
            return Ok(stream);
        }
        if let Some(status) = process.ended() {
            bail!("{}: QEMU did not start ({status})\n{}", machine.name, tail(&machine.log, 10));
        }
        if Instant::now() > end {
            bail!("{}: QEMU did not open {} within 30 s", machine.name, path.display());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// This machine's time plus `offset` seconds as `-rtc base=` takes it (UTC).
fn date_time(offset: i64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    civil(now.cast_signed() + offset)
}

/// Seconds since 1970 as `YYYY-MM-DDTHH:MM:SS` in the Gregorian calendar.
fn civil(seconds: i64) -> String {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let mut year = 1970;
    let mut day = days;
    let leap = |year: i64| (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    let length = |year| if leap(year) { 366 } else { 365 };
    while day >= length(year) {
        day -= length(year);
        year += 1;
    }
    while day < 0 {
        year -= 1;
        day += length(year);
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{:02}", day + 1, second % 60)
}

/// The last lines of a log, indented, for an error message.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let last = all.get(all.len().saturating_sub(lines)..).unwrap_or_default();
    let shown: Vec<String> = last.iter().map(|line| format!("    | {line}")).collect();
    format!("  last lines of {}:\n{}", path.display(), shown.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// QEMU's control socket with what it answers, one line a request; its process is the given command.
    fn stand_in(command: &[&str], answers: &'static [&'static str]) -> Qemu {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut requests = BufReader::new(theirs.try_clone().unwrap());
            let mut theirs = theirs;
            for answer in answers {
                if requests.read_line(&mut String::new()).unwrap_or(0) == 0 {
                    return;
                }
                let _ = writeln!(theirs, "{answer}");
            }
            let _ = requests.read_line(&mut String::new());
        });
        let mut process = Command::new(command[0]);
        process.args(&command[1..]);
        let from = BufReader::new(ours.try_clone().unwrap());
        Qemu {
            name: "a".to_owned(),
            process: crate::process::spawn(process).unwrap(),
            log: PathBuf::from("/nonexistent"),
            control: Mutex::new(Control { to: ours, from, looked: None }),
        }
    }

    #[test]
    fn a_machine_that_stands_still_for_want_of_room_is_told() {
        let full = stand_in(&["sleep", "100"], &[r#"{"return": {"status": "io-error", "running": false}}"#]);
        let said = full.check().unwrap_err().to_string();
        assert!(said.contains("disk is full"), "{said}");
        for state in ["running", "paused"] {
            let answer = format!("{{\"return\": {{\"status\": \"{state}\"}}}}");
            let answers: &'static [&'static str] = vec![&*answer.leak()].leak();
            assert!(stand_in(&["sleep", "100"], answers).check().is_ok(), "{state}");
        }
    }

    #[test]
    fn a_dead_qemu_is_told_and_not_asked() {
        let dead = stand_in(&["false"], &[]);
        let end = Instant::now() + Duration::from_secs(10);
        while dead.process.ended().is_none() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        let said = dead.check().unwrap_err().to_string();
        assert!(said.contains("a: QEMU ended (exit status: 1)"), "{said}");
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(civil(0), "1970-01-01T00:00:00");
        assert_eq!(civil(951_782_400), "2000-02-29T00:00:00");
        assert_eq!(civil(1_735_689_599), "2024-12-31T23:59:59");
        assert_eq!(civil(-1), "1969-12-31T23:59:59");
    }
}
