//! A whole run of a scenario: boots its hosts, carries out its steps, judges, reports, and leaves nothing behind.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lab_agent::message::Exec;
use witness::disk::{JournalFault, check_journal};

use crate::cache::need_space;
use crate::host::{Assets, Host, HostConfig, HostFile, extension_files, static_binary};
use crate::image::guest;
use crate::lock::Lock;
use crate::net::RunClock;
use crate::net::peer::{GuestView, Peer, Received};
use crate::net::ports::Network;
use crate::process::{self, Scratch};
use crate::progress::{self, Step as Progress};
use crate::qemu::{Disk, Nic};
use crate::report::{GuestReport, MoveReport, RunReport, unexpected};
use crate::scenario::{GuestType, Host as HostWish, Scenario, Step, Xenstored};
use crate::steps::host::LabHost;
use crate::steps::plan::{self, DOM0_FOLDER};
use crate::steps::{Executor, Lab, Move, ferryd, race};
use crate::verdict::{self, Judged, Seen};

/// How long a host may take to boot.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// Room that a run's logs and its capture of the network may take.
const LOGS: u64 = 128 << 20;
/// Room that the guests' ramdisks and the sockets may take.
const RAMDISKS: u64 = 64 << 20;
/// How often a run that met the emulator's race is tried.
const ATTEMPTS: u32 = 3;
/// Time between two looks at the CPU time of a guest's copies: `xl list` counts tenths of seconds, and emulation is slow.
const LOOKS_APART: Duration = Duration::from_secs(3);

/// What is run, and where its traces go.
#[derive(Clone, Debug)]
pub struct Options {
    /// The scenario's file.
    pub scenario: PathBuf,
    /// The run's folder is made in this one.
    pub run_dir: PathBuf,
    /// Leave the disks' images in the run's folder.
    pub keep: bool,
    /// How long to wait for another lab's end.
    pub wait: Option<Duration>,
    /// The run is ended after this long, or after the scenario's own limit if that is shorter.
    pub time_limit: Option<Duration>,
}

/// Reads a scenario.
pub fn load(file: &Path) -> Result<Scenario> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    Ok(Scenario::parse(file, &text)?)
}

/// Runs a scenario. An error means that it could not be run; a run that failed is a report.
pub fn run(options: &Options) -> Result<(Scenario, RunReport)> {
    let scenario = load(&options.scenario)?;
    let limit = scenario.time_limit.0;
    process::end_cleanly(Some(options.time_limit.map_or(limit, |given| limit.min(given))))?;
    need_room(&scenario, options)?;
    let assets = Assets::prepare()?;
    let _lock = Lock::take(options.wait)?;
    let name = options.scenario.file_stem().map_or_else(|| "run".into(), |s| s.to_string_lossy().into_owned());
    let mut races = Vec::new();
    for attempt in 1.. {
        let folder = options.run_dir.join(&name);
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("remove the last run's {}", folder.display()))?;
        }
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let scratch = Scratch::new()?;
        let one = Attempt { scenario: &scenario, assets: &assets, options, folder: &folder, scratch: scratch.path() };
        let mut report = one.run(&name)?;
        report.attempt = attempt;
        let mut raced = false;
        for host in &scenario.hosts {
            let name = host.name.get_ref();
            let log = fs::read(folder.join(name).join("console.log")).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let found = race::find(&log).map(|race| (name.clone(), race));
            raced |= found.is_some();
            races.extend(found);
            report.triple_faults.extend(race::find_others(&log).into_iter().map(|fault| (name.clone(), fault)));
        }
        if report.passed || !raced || attempt >= ATTEMPTS {
            report.emulator_races = races;
            return Ok((scenario, report));
        }
        progress::say("the run met the emulator's race (a triple fault with Xen's own RIP and stack): once more");
    }
    bail!("the run was tried too often")
}

/// Says so at once if the run would fill a disk of this machine: a host whose disk can't take a write stands still.
fn need_room(scenario: &Scenario, options: &Options) -> Result<()> {
    fs::create_dir_all(&options.run_dir).with_context(|| format!("make {}", options.run_dir.display()))?;
    let disks: u64 = scenario.disks.iter().map(|disk| disk.size.0).fold(0, u64::saturating_add);
    let kept = if options.keep { disks } else { 0 };
    need_space(&options.run_dir, kept.saturating_add(LOGS), "name another folder with --run-dir")?;
    need_space(&std::env::temp_dir(), disks.saturating_add(RAMDISKS), "set TMPDIR to a folder that has it")
}

struct Attempt<'a> {
    scenario: &'a Scenario,
    assets: &'a Assets,
    options: &'a Options,
    folder: &'a Path,
    scratch: &'a Path,
}

/// What holds the run together once its hosts are up.
struct Booted {
    network: Network,
    peer: Peer,
    hosts: Vec<Arc<Host>>,
    clock: RunClock,
    disks: BTreeMap<String, String>,
}

impl Attempt<'_> {
    fn run(&self, name: &str) -> Result<RunReport> {
        let began = Instant::now();
        let booted = self.boot()?;
        let set_up = began.elapsed();
        let hosts: Vec<Arc<dyn LabHost>> = booted.hosts.iter().map(|h| h.clone() as Arc<dyn LabHost>).collect();
        let base = self.options.scenario.parent().unwrap_or(Path::new("")).to_owned();
        let lab = Lab {
            scenario: self.scenario,
            hosts: &hosts,
            network: &booted.network,
            peer: &booted.peer,
            clock: booted.clock,
            apart: LOOKS_APART,
            disks: &booted.disks,
            base: &base,
            folder: self.folder,
        };
        let mut executor = Executor::new(lab);
        let mut error = executor.run(&|executor, step| self.expect_verdict(executor, step)).err();
        if let Err(last) = executor.finish() {
            error = Some(match error {
                Some(first) => first.context(format!("{last:#}")),
                None => last,
            });
        }
        for host in &booted.hosts {
            self.collect(host);
        }
        let views = booted.peer.view();
        let switch = booted.network.switch().report();
        let moves = self.moves(&executor, &views);
        let guests = self.judge_all(&executor, &views);
        let steps = std::mem::take(&mut executor.results);
        drop(executor);
        drop(hosts);
        drop(booted);
        if self.options.keep {
            for disk in &self.scenario.disks {
                let from = self.image(disk.name.get_ref());
                let to = self.folder.join(format!("{}.raw", disk.name.get_ref()));
                fs::copy(&from, &to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
            }
        }
        let unexpected = unexpected(&self.scenario.expect, &guests, &moves);
        Ok(RunReport {
            passed: error.is_none() && unexpected.is_empty(),
            scenario: name.to_owned(),
            about: self.scenario.about.clone(),
            folder: self.folder.to_owned(),
            took: began.elapsed(),
            set_up,
            attempt: 1,
            emulator_races: Vec::new(),
            triple_faults: Vec::new(),
            steps,
            error: error.map(|e| format!("{e:#}")),
            moves,
            guests,
            switch,
            unexpected,
        })
    }

    fn image(&self, disk: &str) -> PathBuf {
        self.scratch.join(format!("{disk}.raw"))
    }

    /// Boots the hosts and makes everything ready for the first step.
    fn boot(&self) -> Result<Booted> {
        let clock = RunClock::start();
        let mut network = Network::start(clock, Some(&self.folder.join("network.pcap"))).context("start the switch")?;
        for disk in &self.scenario.disks {
            let image = self.image(disk.name.get_ref());
            File::create(&image)
                .and_then(|file| file.set_len(disk.size.0))
                .with_context(|| format!("make the disk {}", image.display()))?;
        }
        let files = self.files()?;
        let mut wishes: Vec<(usize, &HostWish)> = self.scenario.hosts.iter().enumerate().collect();
        for (index, wish) in &wishes {
            let (ours, card) = self.sockets(*index);
            network.add_card(wish.name.get_ref(), &ours, &card).context("add a port to the switch")?;
        }
        let (_, port) = network.add_local("peer").context("add the peer's port to the switch")?;
        let peer = Peer::start(port, clock, plan::peer_config(self.scenario, Some(self.folder.to_owned())))
            .context("start the peer")?;
        // The host with the longest uptime starts first.
        wishes.sort_by_key(|(_, wish)| std::cmp::Reverse(wish.uptime_skew.0));
        let longest = wishes.first().map(|(_, wish)| wish.uptime_skew.0).unwrap_or_default();
        let start = Instant::now();
        let mut launched = Vec::new();
        for (index, wish) in wishes {
            std::thread::sleep((start + (longest - wish.uptime_skew.0)).saturating_duration_since(Instant::now()));
            launched.push((
                index,
                Host::launch(self.assets, self.config(index, wish, &files)?, self.folder, self.scratch)?,
            ));
        }
        launched.sort_by_key(|(index, _)| *index);
        let hosts: Vec<Arc<Host>> = launched.into_iter().map(|(_, host)| Arc::new(host)).collect();
        for host in &hosts {
            host.wait_ready(BOOT_LIMIT)?;
        }
        let mut disks = BTreeMap::new();
        for (host, wish) in hosts.iter().zip(&self.scenario.hosts) {
            let serve = Exec {
                argv: vec![format!("{DOM0_FOLDER}/lab-remote"), "serve".to_owned()],
                background: Some("/var/log/xen/lab-remote.log".to_owned()),
                ..Exec::default()
            };
            host.exec(&serve).context("start the transport for xl migrate")?;
            use_up_domids(host, wish.used_domids)?;
            if wish.ferry {
                start_ferry(host)?;
            }
            for disk in &self.scenario.disks {
                disks.insert(disk.name.get_ref().clone(), disk_path(host, disk)?);
            }
        }
        Ok(Booted { network, peer, hosts, clock, disks })
    }

    fn sockets(&self, index: usize) -> (PathBuf, PathBuf) {
        (self.scratch.join(format!("port{index}")), self.scratch.join(format!("card{index}")))
    }

    /// What every dom0 gets.
    fn files(&self) -> Result<Vec<HostFile>> {
        let file = |local: PathBuf, name: &str, mode| HostFile { local, remote: format!("{DOM0_FOLDER}/{name}"), mode };
        let mut files = vec![
            file(self.assets.kernel_image.clone(), "kernel", 0o644),
            file(static_binary("lab-remote")?, "lab-remote", 0o755),
        ];
        let pack = |init: &str| -> Result<PathBuf> {
            let ramdisk = self.scratch.join(format!("{init}-ramdisk"));
            guest::ramdisk(&ramdisk, &static_binary(init)?, &self.assets.kernel, guest::FRONTENDS, &[])
                .with_context(|| format!("make the ramdisk with {init}"))?;
            Ok(ramdisk)
        };
        if self.scenario.guests.iter().any(|g| g.witness && g.ramdisk.is_none()) {
            files.push(file(pack("witness")?, "ramdisk", 0o644));
        }
        let inits: BTreeSet<&str> =
            self.scenario.guests.iter().filter_map(|g| Some(g.init.as_ref()?.get_ref().as_str())).collect();
        for init in inits {
            files.push(HostFile { local: pack(init)?, remote: plan::init_ramdisk(init), mode: 0o644 });
        }
        if let Some(guest) = self
            .scenario
            .guests
            .iter()
            .find(|g| !g.witness && g.init.is_none() && g.ramdisk.is_none() && g.kernel.is_none())
        {
            bail!(
                "guest {}: it has no witness, so name an init, or a kernel (and a ramdisk, if it needs one)",
                guest.name.get_ref()
            );
        }
        Ok(files)
    }

    fn config(&self, index: usize, wish: &HostWish, files: &[HostFile]) -> Result<HostConfig> {
        let name = wish.name.get_ref();
        for (key, wanted, tree, package) in [
            ("xen", &wish.xen, &self.assets.hypervisor, "xen-hypervisor-4.17-amd64"),
            ("dom0-kernel", &wish.dom0_kernel, &self.assets.kernel, "linux-image-6.1.0-50-amd64"),
        ] {
            if let Some(wanted) = wanted {
                let there = tree.version(package)?;
                if wanted != there {
                    bail!("host {name}: {key} = {wanted:?}, but the lab's packages have {there:?}; see packages.toml");
                }
            }
        }
        let (port, card) = self.sockets(index);
        let installed = wish.ferry || wish.ferry_installed;
        let ours = wish.ferry || wish.xenstored == Xenstored::Ferry;
        let xenstored = ours.then(|| ["/usr/sbin/xenstored", "--pid-file", "{pidfile}"].map(str::to_owned).to_vec());
        let mut files = files.to_vec();
        let mut install = |local: PathBuf, remote: String, mode| files.push(HostFile { local, remote, mode });
        if ours || wish.ferry_installed {
            install(static_binary("xenstored")?, "/usr/sbin/xenstored".to_owned(), 0o755);
        }
        for program in wish.programs.iter().map(String::as_str).chain(installed.then_some("ferry")) {
            install(static_binary(program)?, format!("/usr/sbin/{program}"), 0o755);
        }
        if installed {
            for local in extension_files()? {
                let name = local.file_name().unwrap_or_default().to_string_lossy().into_owned();
                install(local, format!("/usr/lib/ferry/hypervisor-ext/{name}"), 0o644);
            }
        }
        let disks = self
            .scenario
            .disks
            .iter()
            .map(|disk| Disk { serial: disk.name.get_ref().clone(), image: self.image(disk.name.get_ref()) });
        Ok(HostConfig {
            vcpus: wish.vcpus,
            memory_mib: u32::try_from(wish.memory.as_mib()).context("the host's memory")?,
            dom0_memory_mib: u32::try_from(wish.dom0_memory.as_mib()).context("dom0's memory")?,
            xen_options: wish.xen_options.clone(),
            wallclock_skew_ms: (wish.wallclock_skew.0 * 1e3) as i64,
            nic: Some(Nic { mac: plan::host_mac(index).0, local: card, remote: port }),
            address: Some(format!("{}/{}", plan::host_addr(index), plan::PREFIX)),
            disks: disks.collect(),
            files,
            xenstored,
            device_model: self.scenario.guests.iter().any(|guest| guest.kind == GuestType::Hvm),
            ..HostConfig::new(name)
        })
    }

    /// Copies a host's logs into the run's folder. The host may be dead, so nothing here fails the run.
    fn collect(&self, host: &Host) {
        for guest in &self.scenario.guests {
            let name = guest.name.get_ref();
            if let Ok(log) = host.get(&format!("/var/log/xen/console/guest-{name}.log"))
                && let Err(error) = fs::write(host.directory().join(format!("guest-{name}.log")), log)
            {
                progress::say(format!("{}: {name}'s console log could not be kept: {error}", Host::name(host)));
            }
        }
        host.collect_logs();
    }

    /// Holds the journal on each of a guest's first two disks against what the peer was told.
    fn journal(&self, guest: &str, view: &GuestView) -> Option<Vec<JournalFault>> {
        let guest = self.scenario.guest(guest)?;
        let settings = guest.workload.settings().ok()?;
        guest.vbds.first()?;
        let beat = view.beats.last().map(|beat| beat.body.journal);
        let acknowledged = view.journal.last().map(|a| a.record).max(beat)?;
        if acknowledged == 0 {
            return None;
        }
        let told =
            |record| view.journal.binary_search_by_key(&record, |a| a.record).ok().map(|at| view.journal[at].crc);
        let mut faults = Vec::new();
        for vbd in guest.vbds.iter().take(2) {
            let found = match File::open(self.image(vbd.disk.get_ref())) {
                Ok(image) => check_journal(settings.seed, acknowledged, told, |at, buf| image.read_exact_at(buf, at)),
                Err(error) => vec![JournalFault::Read { record: 0, error: error.to_string() }],
            };
            faults.extend(found);
        }
        Some(faults)
    }

    /// Has a guest judged by all that was seen of it.
    fn judge<T: Default>(&self, executor: &Executor<'_>, view: &GuestView, judge: impl FnOnce(&Seen<'_>) -> T) -> T {
        let Some(record) = executor.guests.get(&view.name) else { return T::default() };
        let switch = executor.lab().network.switch().report();
        let moves = executor.moves.iter().filter(|m| m.guest == view.name).collect();
        judge(&Seen {
            guest: &view.name,
            record,
            moves,
            view,
            switch: &switch,
            journal: self.journal(&view.name, view),
            last: view.snapshots.last(),
        })
    }

    /// The moves with their figures, each judged by itself, in the run's order.
    fn moves(&self, executor: &Executor<'_>, views: &[GuestView]) -> Vec<MoveReport> {
        let mut verdicts: BTreeMap<&str, VecDeque<Vec<Judged>>> = BTreeMap::new();
        for view in views {
            let each = |seen: &Seen<'_>| (0..seen.moves.len()).map(|i| verdict::judge_move(seen, i)).collect();
            verdicts.insert(&view.name, self.judge(executor, view, each));
        }
        let report = |entry: &Move| {
            let verdict = verdicts.get_mut(entry.guest.as_str()).and_then(VecDeque::pop_front);
            MoveReport::new(entry, views.iter().find(|v| v.name == entry.guest), verdict.unwrap_or_default())
        };
        executor.moves.iter().map(report).collect()
    }

    fn judge_all(&self, executor: &Executor<'_>, views: &[GuestView]) -> Vec<GuestReport> {
        let created = |view: &&GuestView| executor.guests.get(&view.name).is_some_and(|r| r.created);
        let report = |view: &GuestView| GuestReport {
            guest: view.name.clone(),
            verdict: self.judge(executor, view, verdict::judge),
            absent: view.hello.as_ref().map(|h: &Received<_>| h.body.absent.clone()).unwrap_or_default(),
            peer: view.clone(),
        };
        views.iter().filter(created).map(report).collect()
    }

    /// The `expect-verdict` step.
    fn expect_verdict(&self, executor: &Executor<'_>, step: &Step) -> Result<()> {
        let Step::ExpectVerdict(expected) = step else { return Ok(()) };
        let views = executor.lab().peer.view();
        let guests = self.judge_all(executor, &views);
        let expect = crate::scenario::Expect { promise: expected.clone(), ..Default::default() };
        let found = unexpected(&expect, &guests, &[]);
        if found.is_empty() { Ok(()) } else { bail!("{}", found.join("\n  ")) }
    }
}

/// Makes and destroys so many empty domains, so that the next one has a higher domid.
fn use_up_domids(host: &Host, count: u16) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    let step = Progress::begin(format!("{}: using up {count} domids", Host::name(host)));
    let script = format!(
        "python3 -c 'import xen.lowlevel.xc as x\nc = x.xc()\nfor _ in range({count}):\n c.domain_destroy(c.domain_create())'"
    );
    host.sh(&script).context("use up domids")?;
    step.done();
    Ok(())
}

/// Loads the hypervisor extension and starts Ferry's daemon, as its packages would.
fn start_ferry(host: &Host) -> Result<()> {
    let step = Progress::begin(format!("{}: starting Ferry", Host::name(host)));
    host.sh("ferry host load").context("load the hypervisor extension")?;
    host.sh(&ferryd::start(&[], true)).context("start Ferry's daemon")?;
    step.done();
    Ok(())
}

/// Where a shared disk is in a dom0; a slow one is a device-mapper target before it.
fn disk_path(host: &Host, disk: &crate::scenario::Disk) -> Result<String> {
    let name = disk.name.get_ref();
    let path = format!("/dev/disk/by-id/{name}");
    let delay = disk.delay.0.as_millis();
    if delay == 0 {
        return Ok(path);
    }
    let sectors = disk.size.0 / 512;
    let script = format!(
        "modprobe dm-delay && dmsetup create --noudevsync slow-{name} --table '0 {sectors} delay {path} 0 {delay}' && \
         dmsetup mknodes && ls /dev/mapper/slow-{name}"
    );
    host.sh(&script).with_context(|| format!("make the disk {name} slow"))?;
    Ok(format!("/dev/mapper/slow-{name}"))
}
