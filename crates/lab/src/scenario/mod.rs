//! What a run does, as a TOML file: the hosts, the guests and their load, the steps, and what must hold afterwards.
//! `docs/scenario.md` is the reference; a test holds it against these types.

mod check;
pub mod units;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use migrate::fault_points::Side;
use serde::Deserialize;
use toml::Spanned;

use self::units::{Size, Skew, Span};
use crate::net::Mac;
use crate::verdict::{Outcome, Promise};

/// A whole scenario.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Scenario {
    /// One or two sentences for `ferry-lab list` and the report.
    pub about: String,
    /// The run is ended as failed after this long.
    #[serde(default = "defaults::time_limit")]
    pub time_limit: Span,
    #[serde(rename = "host")]
    pub hosts: Vec<Host>,
    #[serde(default, rename = "disk")]
    pub disks: Vec<Disk>,
    #[serde(default, rename = "guest")]
    pub guests: Vec<Guest>,
    #[serde(default, rename = "step")]
    pub steps: Vec<Spanned<Step>>,
    #[serde(default)]
    pub expect: Expect,
}

/// An emulated machine with Xen and a dom0.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Host {
    pub name: Spanned<String>,
    #[serde(default = "defaults::host_memory")]
    pub memory: Size,
    #[serde(default = "defaults::dom0_memory")]
    pub dom0_memory: Size,
    #[serde(default = "defaults::host_vcpus")]
    pub vcpus: u32,
    /// Started this much before the others, so that its uptime differs.
    #[serde(default)]
    pub uptime_skew: Span,
    /// Its wall clock differs from the real one by this.
    #[serde(default)]
    pub wallclock_skew: Skew,
    /// Package version of the hypervisor; the pinned one if absent.
    pub xen: Option<String>,
    /// Package version of dom0's kernel; the pinned one if absent.
    pub dom0_kernel: Option<String>,
    /// Added to Xen's command line.
    #[serde(default)]
    pub xen_options: String,
    #[serde(default)]
    pub xenstored: Xenstored,
    /// Programs of this project, built for dom0, that are put into its PATH.
    #[serde(default)]
    pub programs: Vec<String>,
    /// Ferry is installed and running: its xenstored from the start, the hypervisor extension loaded, its daemon serving.
    #[serde(default)]
    pub ferry: bool,
    /// Ferry's files are installed, and nothing of it runs: a host before Ferry came.
    #[serde(default)]
    pub ferry_installed: bool,
    /// So many domain ids are used up before the first step, so that the next free one differs from the other host's.
    #[serde(default)]
    pub used_domids: u16,
}

/// Which xenstored runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Xenstored {
    /// Debian's C xenstored.
    #[default]
    Stock,
    /// Ferry's, from the start.
    Ferry,
}

/// A raw image that every host sees as the same disk.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Disk {
    pub name: Spanned<String>,
    #[serde(default = "defaults::disk_size")]
    pub size: Size,
    /// Each request takes this much longer (whole milliseconds), so that more of them are under way.
    #[serde(default)]
    pub delay: Span,
}

/// How Xen runs the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestType {
    #[default]
    Pvh,
    /// With a QEMU device model in dom0.
    Hvm,
}

/// A guest. It exists only once a `create` step made it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Guest {
    pub name: Spanned<String>,
    #[serde(default, rename = "type")]
    pub kind: GuestType,
    /// A file beside the scenario or an absolute path; the pinned Debian kernel if absent.
    pub kernel: Option<PathBuf>,
    /// A file beside the scenario or an absolute path; the witness if absent.
    pub ramdisk: Option<PathBuf>,
    /// A static program of this project that is the guest's init instead of the witness.
    pub init: Option<Spanned<String>>,
    /// Added to the kernel's command line.
    #[serde(default)]
    pub command_line: String,
    /// False: a guest of any kind that does not report; no promise is judged from inside it.
    #[serde(default = "defaults::yes")]
    pub witness: bool,
    #[serde(default = "defaults::guest_vcpus")]
    pub vcpus: u32,
    #[serde(default = "defaults::guest_memory")]
    pub memory: Size,
    /// The CPUID policy as `xl` takes it.
    #[serde(default = "defaults::cpuid")]
    pub cpuid: String,
    /// Lines added to the guest's `xl` configuration.
    #[serde(default)]
    pub xl: Vec<String>,
    #[serde(default, rename = "vif")]
    pub vifs: Vec<Vif>,
    #[serde(default, rename = "vbd")]
    pub vbds: Vec<Vbd>,
    /// The witness's settings.
    #[serde(default)]
    pub workload: Workload,
    /// What the peer sends to it.
    #[serde(default)]
    pub peer: PeerLoad,
}

/// A virtual network card. A witness uses the first to talk and the second, if there is one, only to receive.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Vif {
    pub mac: Spanned<Mac>,
    #[serde(default = "defaults::bridge")]
    pub bridge: String,
}

/// A virtual disk, `phy:` on a shared disk.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Vbd {
    pub disk: Spanned<String>,
    /// The guest's name for it.
    #[serde(default = "defaults::vbd_target")]
    pub target: String,
    #[serde(default)]
    pub read_only: bool,
}

/// What the witness does: its own settings ([`witness::config::Config`]), but those that the lab itself decides.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(transparent)]
pub struct Workload(BTreeMap<String, Spanned<toml::Value>>);

impl Workload {
    /// Keys that the lab itself sets.
    pub const TAKEN: [&str; 6] = ["addr", "dev", "peer", "port", "rx", "rxdev"];

    /// The witness's settings; the error says where and why.
    pub(crate) fn settings(&self) -> Result<witness::config::Config, (Range<usize>, String)> {
        let mut config = witness::config::Config::default();
        for (key, value) in &self.0 {
            let setting = key.replace('-', "_");
            if Self::TAKEN.contains(&setting.as_str()) {
                return Err((value.span(), format!("{key}: the lab itself sets it")));
            }
            let text = match value.get_ref() {
                toml::Value::String(text) => text.clone(),
                toml::Value::Integer(number) => number.to_string(),
                _ => return Err((value.span(), format!("{key}: want a number or a text"))),
            };
            config.set(&setting, &text).map_err(|error| match error {
                witness::config::ConfigError::Key(_) => {
                    let keys = witness::config::Config::KEYS;
                    let known: Vec<_> = keys.iter().filter(|k| !Self::TAKEN.contains(k)).copied().collect();
                    (value.span(), format!("{key}: the witness has no such setting (there is: {})", known.join(", ")))
                }
                error => (value.span(), error.to_string()),
            })?;
        }
        Ok(config)
    }
}

/// What the peer sends to the guest by itself, packets a second; 0 is none.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct PeerLoad {
    /// Frames on the TCP connection that the peer opens; the guest sends them back.
    pub tcp: u32,
    /// Datagrams that the guest sends back.
    pub udp: u32,
    /// Datagrams to the address that only receives.
    pub quiet: u32,
}

impl Default for PeerLoad {
    fn default() -> Self {
        Self { tcp: 20, udp: 20, quiet: 20 }
    }
}

/// One thing that the run does.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Make a guest.
    Create(Create),
    /// Wait until a witness has sent so many further reports.
    Wait(Wait),
    /// Let time pass.
    Sleep(Span),
    /// Run a shell command in a dom0.
    Exec(Exec),
    /// `xl save` a guest to a file in its dom0.
    Save(Save),
    /// `xl restore` a saved guest.
    Restore(Restore),
    /// Move a guest to another host.
    Migrate(Migrate),
    /// Wait for a step that was started with `background`.
    Join(Join),
    /// Destroy a guest.
    Destroy(OfGuest),
    /// Type on a guest's console, expect a text on it, or both.
    Console(Console),
    /// Unplug a host's network cable.
    Cut(OfHost),
    /// Plug it in again, with no delay and no drops.
    Heal(OfHost),
    /// Make a host's cable slow or lossy.
    Cable(CableStep),
    /// Send a signal to a process in a dom0.
    Kill(Kill),
    /// Start Ferry's daemon, again if it runs, with faults planted.
    Ferryd(Ferryd),
    /// Move a guest to the other host with a fault planted, and see that exactly one of the two runs it in the end.
    Fault(FaultStep),
    /// Move a guest to the other host and switch one of the two off at a point of the handshake.
    Gone(Gone),
    /// Say on a host that the other is fenced, so that the guest of an open migration goes on there.
    Resolve(Resolve),
    /// Stop a whole host (its vCPUs stand still; nothing is lost).
    PauseHost(OfHost),
    /// Let a paused host go on.
    ResumeHost(OfHost),
    /// Switch a host off, as if its power had failed.
    KillHost(OfHost),
    /// Copy a file into a dom0.
    Put(Put),
    /// Copy a file out of a dom0 into the run's folder.
    Get(Get),
    /// Hold what `ferry inspect` tells of a guest against its witness and stock tools.
    Inspect(Inspect),
    /// Compare the verdict so far.
    ExpectVerdict(BTreeMap<Promise, Expected>),
}

/// Make a guest.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Create {
    pub guest: Spanned<String>,
    pub on: Spanned<String>,
    /// It does not run yet; an `exec` step unpauses it.
    #[serde(default)]
    pub paused: bool,
    #[serde(default = "defaults::limit")]
    pub limit: Span,
}

/// Wait for reports of a witness.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Wait {
    pub guest: Spanned<String>,
    /// So many further reports.
    #[serde(default = "defaults::reports")]
    pub reports: u32,
    #[serde(default = "defaults::limit")]
    pub limit: Span,
}

/// Run a shell command in a dom0.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Exec {
    pub on: Spanned<String>,
    /// Given to `sh -c`.
    pub run: String,
    /// The exit code that it must have; -1 is any.
    #[serde(default)]
    pub exit: i32,
    /// A text that its output (standard output and error) must hold.
    pub expect: Option<String>,
    /// A text that its output must not hold.
    pub refuse: Option<String>,
    #[serde(default = "defaults::limit")]
    pub limit: Span,
    /// Go on with the next step meanwhile; a `join` step waits for this name.
    pub background: Option<Spanned<String>>,
}

/// `xl save`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Save {
    pub guest: Spanned<String>,
    /// Absolute path in the dom0.
    pub file: String,
    #[serde(default = "defaults::limit")]
    pub limit: Span,
}

/// `xl restore`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Restore {
    pub guest: Spanned<String>,
    pub on: Spanned<String>,
    /// Absolute path in the dom0.
    pub file: String,
    #[serde(default = "defaults::limit")]
    pub limit: Span,
}

/// What moves the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrateTool {
    /// Stock, co-operative `xl migrate`.
    Xl,
    /// `ferry migrate`.
    Ferry,
}

/// How a migration must end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrateEnd {
    /// The tool says that the guest runs on the other host.
    #[default]
    Moved,
    /// The tool fails and the guest goes on where it was.
    Stays,
    /// Either.
    Any,
}

/// Move a guest to another host.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Migrate {
    pub guest: Spanned<String>,
    pub to: Spanned<String>,
    pub tool: MigrateTool,
    /// Added to the tool's arguments, in the shell's syntax.
    #[serde(default)]
    pub options: String,
    #[serde(default)]
    pub end: MigrateEnd,
    /// A text that the tool's output must hold.
    pub expect: Option<String>,
    /// What must come out of each promise when this move is judged by itself.
    #[serde(default)]
    pub verdict: BTreeMap<Promise, Expected>,
    #[serde(default = "defaults::migrate_limit")]
    pub limit: Span,
    /// Go on with the next step meanwhile; a `join` step waits for this name.
    pub background: Option<Spanned<String>>,
}

/// Wait for a background step.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Join {
    pub name: Spanned<String>,
    #[serde(default = "defaults::limit")]
    pub limit: Span,
}

/// A step on a guest as a whole.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct OfGuest {
    pub guest: Spanned<String>,
}

/// A step on a host as a whole.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct OfHost {
    pub host: Spanned<String>,
}

/// Type on a guest's console, expect a text on it, or both.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Console {
    pub guest: Spanned<String>,
    /// Typed as it is; end it with `\n` for Enter.
    #[serde(rename = "type")]
    pub text: Option<String>,
    /// Must appear on the console after this step began; with no `type`, also if it came earlier.
    pub expect: Option<String>,
    #[serde(default = "defaults::limit")]
    pub limit: Span,
}

/// A slow or lossy cable.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct CableStep {
    pub host: Spanned<String>,
    /// Added to each frame, each way.
    #[serde(default)]
    pub delay: Span,
    /// Of 1000 frames, so many are lost.
    #[serde(default)]
    pub drop_per_mille: u16,
}

/// Send a signal to a process in a dom0.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Kill {
    pub on: Spanned<String>,
    /// Every process of this name.
    pub process: Option<String>,
    /// The process whose id is in this file.
    pub pidfile: Option<String>,
    /// Name of the signal, without SIG.
    #[serde(default = "defaults::signal")]
    pub signal: String,
}

/// Start Ferry's daemon, again if it runs.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Ferryd {
    pub on: Spanned<String>,
    /// Planted in it, as `<point>=<cut|fail|crash|panic|hang>`; gone when it is started again.
    #[serde(default)]
    pub faults: Vec<String>,
    /// It is started again when it ends.
    #[serde(default = "defaults::yes")]
    pub respawn: bool,
}

/// Move a guest to the other host with faults planted.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct FaultStep {
    pub guest: Spanned<String>,
    /// As `<point>=<cut|fail|crash|panic>`; each must come to pass.
    pub faults: Spanned<Vec<String>>,
    /// The destination's preflight refuses the guest: its name is taken there.
    #[serde(default)]
    pub unfit: bool,
    /// Where it must be in the end; on either if nothing is said.
    pub guest_on: Option<Side>,
    /// For the move, and again for both hosts to come to an end with it.
    #[serde(default = "defaults::migrate_limit")]
    pub limit: Span,
}

/// Move a guest to the other host and switch one of the two off.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Gone {
    pub guest: Spanned<String>,
    /// Point of the handshake before which the host that comes to it is switched off.
    pub point: Spanned<String>,
    pub then: Then,
    /// Faults that lead there, as in [`FaultStep`].
    #[serde(default)]
    pub faults: Vec<String>,
    /// As in [`FaultStep`].
    #[serde(default)]
    pub unfit: bool,
    /// For the point to be come to, and again for the other host to come to an end with the move.
    #[serde(default = "defaults::migrate_limit")]
    pub limit: Span,
}

/// What becomes of a guest when a host is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Then {
    /// The host that is left runs it, and asked nobody.
    Runs,
    /// The host that is left holds it until an operator says that the other is fenced.
    Waits,
    /// It was on the host that is gone; the other has nothing of it.
    Lost,
}

/// `ferry resolve`, first without `--peer-fenced`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Resolve {
    pub guest: Spanned<String>,
    pub on: Spanned<String>,
}

/// Copy a file into a dom0.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Put {
    pub on: Spanned<String>,
    /// A file beside the scenario or an absolute path.
    pub from: PathBuf,
    /// Absolute path in the dom0.
    pub to: String,
    #[serde(default)]
    pub executable: bool,
}

/// Copy a file out of a dom0.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Get {
    pub on: Spanned<String>,
    /// Absolute path in the dom0.
    pub from: String,
    /// Name in the run's folder.
    pub to: String,
}

/// `ferry inspect`, compared.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Inspect {
    pub guest: Spanned<String>,
    /// The guest may be held for less than this.
    #[serde(default = "defaults::pause_limit")]
    pub pause_limit: Span,
}

/// What must hold after the steps.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Expect {
    /// For each promise that is not named below.
    #[serde(default)]
    pub every_promise: Expected,
    /// Promise by promise.
    #[serde(default)]
    pub promise: BTreeMap<Promise, Expected>,
    #[serde(default)]
    pub limits: Limits,
}

impl Expect {
    /// What is expected of one promise.
    pub fn of(&self, promise: Promise) -> Expected {
        self.promise.get(&promise).copied().unwrap_or(self.every_promise)
    }
}

/// Upper limits on measured figures.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Limits {
    /// Longest time without a UDP datagram from the guest.
    pub udp_silence: Option<Span>,
    /// Longest time without an answer on the TCP connection.
    pub tcp_silence: Option<Span>,
    /// Longest time the guest itself saw its clock jump over.
    pub clock_gap: Option<Span>,
    /// Longest migration, from the command to its end.
    pub migration: Option<Span>,
}

/// What is expected of a promise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Expected {
    Pass,
    Fail,
    NotExercised,
    /// Reported, not judged.
    #[default]
    Any,
}

impl Expected {
    /// Whether the outcome is as expected.
    pub fn allows(self, outcome: Outcome) -> bool {
        match self {
            Expected::Any => true,
            Expected::Pass => outcome == Outcome::Pass,
            Expected::Fail => outcome == Outcome::Fail,
            Expected::NotExercised => outcome == Outcome::NotExercised,
        }
    }
}

mod defaults {
    use std::time::Duration;

    use super::{Size, Span};

    pub fn time_limit() -> Span {
        Span(Duration::from_secs(600))
    }
    pub fn limit() -> Span {
        Span(Duration::from_secs(90))
    }
    pub fn pause_limit() -> Span {
        Span(Duration::from_millis(50))
    }
    pub fn migrate_limit() -> Span {
        Span(Duration::from_secs(180))
    }
    pub fn host_memory() -> Size {
        Size::mib(2048)
    }
    pub fn dom0_memory() -> Size {
        Size::mib(1024)
    }
    /// One: two hosts of two processors each take each other's turns on a machine of two, and whoever holds a lock of Xen's waits for it.
    pub fn host_vcpus() -> u32 {
        1
    }
    pub fn disk_size() -> Size {
        Size::mib(64)
    }
    pub fn yes() -> bool {
        true
    }
    pub fn guest_vcpus() -> u32 {
        1
    }
    pub fn guest_memory() -> Size {
        Size::mib(256)
    }
    /// QEMU reports an intercepted RDTSCP as RDTSC, after which Xen crashes the guest: it must not see the feature.
    pub fn cpuid() -> String {
        "host,rdtscp=0".to_owned()
    }
    pub fn bridge() -> String {
        "xenbr0".to_owned()
    }
    pub fn vbd_target() -> String {
        "xvda".to_owned()
    }
    pub fn reports() -> u32 {
        1
    }
    pub fn signal() -> String {
        "KILL".to_owned()
    }
}

/// Why a file is not a scenario: where, and what is wrong there.
#[derive(Debug, thiserror::Error)]
#[error("{}:{line}:{column}: {message}\n    {excerpt}", file.display())]
pub struct ScenarioError {
    pub file: PathBuf,
    /// 1 is the first.
    pub line: usize,
    /// 1 is the first; counted in characters.
    pub column: usize,
    pub message: String,
    /// The line itself.
    pub excerpt: String,
}

impl ScenarioError {
    fn at(file: &Path, text: &str, span: Option<Range<usize>>, message: &str) -> Self {
        let at = span.map_or(0, |s| s.start).min(text.len());
        let before = text.get(..at).unwrap_or("");
        let line_start = before.rfind('\n').map_or(0, |n| n + 1);
        Self {
            file: file.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before.get(line_start..).unwrap_or("").chars().count() + 1,
            message: message.trim().replace('\n', ", "),
            excerpt: text.get(line_start..).unwrap_or("").lines().next().unwrap_or("").to_owned(),
        }
    }
}

impl Scenario {
    /// Reads a scenario from its text; `file` is for messages only.
    pub fn parse(file: &Path, text: &str) -> Result<Scenario, ScenarioError> {
        let scenario: Scenario =
            toml::from_str(text).map_err(|e| ScenarioError::at(file, text, e.span(), e.message()))?;
        check::check(&scenario).map_err(|e| ScenarioError::at(file, text, Some(e.span), &e.message))?;
        Ok(scenario)
    }

    /// The guest of that name.
    pub fn guest(&self, name: &str) -> Option<&Guest> {
        self.guests.iter().find(|g| g.name.get_ref() == name)
    }

    /// The host of that name.
    pub fn host(&self, name: &str) -> Option<&Host> {
        self.hosts.iter().find(|h| h.name.get_ref() == name)
    }
}

impl Step {
    /// The step's name as it is written in a scenario.
    pub fn name(&self) -> &'static str {
        match self {
            Step::Create(_) => "create",
            Step::Wait(_) => "wait",
            Step::Sleep(_) => "sleep",
            Step::Exec(_) => "exec",
            Step::Save(_) => "save",
            Step::Restore(_) => "restore",
            Step::Migrate(_) => "migrate",
            Step::Join(_) => "join",
            Step::Destroy(_) => "destroy",
            Step::Console(_) => "console",
            Step::Cut(_) => "cut",
            Step::Heal(_) => "heal",
            Step::Cable(_) => "cable",
            Step::Kill(_) => "kill",
            Step::Ferryd(_) => "ferryd",
            Step::Fault(_) => "fault",
            Step::Gone(_) => "gone",
            Step::Resolve(_) => "resolve",
            Step::PauseHost(_) => "pause-host",
            Step::ResumeHost(_) => "resume-host",
            Step::KillHost(_) => "kill-host",
            Step::Put(_) => "put",
            Step::Get(_) => "get",
            Step::Inspect(_) => "inspect",
            Step::ExpectVerdict(_) => "expect-verdict",
        }
    }
}

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;
