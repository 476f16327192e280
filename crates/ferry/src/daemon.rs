//! `ferryd`: moves guests out on command, takes them in, and ends what a daemon before it began.

use crate::busy::Busy;
use crate::config::Config;
use crate::control::{Answer, DryRun, Migrate, Request, Status};
use crate::exit::Exit;
use crate::keeper::{self, Book};
use crate::learned::Learned;
use anyhow::{Context, Result, bail};
use hypervisor::{DomId, Hypervisor};
use migrate::command::NotDone;
use migrate::destination::{Destinations, Incoming, role_of};
use migrate::fault_points::Plant;
use migrate::handshake::{DestinationState, SourceState};
use migrate::host::{Fault, Faults, Host, NoFaults, Timeouts};
use migrate::journal::{Journal, Role};
use migrate::link::{Connector, Link, Tcp};
use migrate::report::{Ending, Report, millis};
use migrate::source::{self, Handle};
use migrate::{Limits, Trouble};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Longest request, bytes.
const REQUEST_MAX: u64 = 1 << 16;
/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);
/// How long a dry run watches what the guest dirties.
const SAMPLE: Duration = Duration::from_secs(1);
/// Connections of other hosts at the same time.
const MAX_CONNECTIONS: usize = 64;
/// After a connection that could not be taken: what is short of may be there again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Turns a name or a number into a domid.
pub type FindDomain = dyn Fn(&str) -> migrate::Result<DomId> + Send + Sync;

pub struct Daemon {
    config: Config,
    host: Host,
    find: Box<FindDomain>,
    destinations: Destinations,
    outgoing: Mutex<Vec<Handle>>,
    busy: Busy,
    learned: Learned,
    /// Held as long as the daemon lives, so that there is only one.
    _lock: File,
}

impl std::fmt::Debug for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Daemon").field("host", &self.host).finish_non_exhaustive()
    }
}

impl Daemon {
    /// Takes the state folder, and goes on with what its journals tell of.
    pub fn new(
        config: Config,
        hypervisor: Arc<dyn Hypervisor>,
        toolstack: Arc<dyn migrate::toolstack::Toolstack>,
        find: Box<FindDomain>,
    ) -> Result<Arc<Daemon>> {
        let dir = &config.state_dir;
        std::fs::create_dir_all(dir).with_context(|| format!("make the state folder {}", dir.display()))?;
        std::fs::set_permissions(dir, PermissionsExt::from_mode(0o700))?;
        let lock = File::create(dir.join("lock"))?;
        if rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!("another ferry daemon is running on this host (it holds {}/lock)", dir.display());
        }
        let connector: Arc<dyn Connector> = Arc::new(Tcp { default_port: crate::config::DEFAULT_PORT });
        let host = Host {
            hypervisor,
            toolstack,
            connector,
            name: config.host_name(),
            id: host_id(dir)?,
            journals: dir.join("journal"),
            writer: concat!("ferry ", env!("CARGO_PKG_VERSION")).into(),
            max_incoming: config.max_incoming,
            faults: planted_faults()?,
            timeouts: Timeouts::default(),
        };
        std::fs::create_dir_all(&host.journals)?;
        let daemon = Arc::new(Daemon {
            destinations: Destinations::new(host.clone()),
            learned: Learned::open(dir),
            config,
            host,
            find,
            outgoing: Mutex::default(),
            busy: Busy::default(),
            _lock: lock,
        });
        daemon.recover()?;
        Ok(daemon)
    }

    /// A journal that can't be read stops neither the daemon nor the others, but is told of at every start.
    fn recover(&self) -> Result<()> {
        for entry in std::fs::read_dir(&self.host.journals)? {
            let path = entry?.path();
            let done = match role_of(&path) {
                Some(Role::Source) => Journal::open(&path).map_err(Trouble::from).and_then(|journal| {
                    let handle = journal.map(|j| source::recover(&self.host, j)).transpose()?.flatten();
                    self.outgoing().extend(handle);
                    Ok(())
                }),
                Some(Role::Destination) => Journal::open(&path)
                    .map_err(Trouble::from)
                    .and_then(|journal| journal.map_or(Ok(()), |j| self.destinations.recover(j))),
                None => Ok(()),
            };
            if let Err(error) = done {
                tracing::error!("{}: {error}", path.display());
            }
        }
        Ok(())
    }

    fn outgoing(&self) -> std::sync::MutexGuard<'_, Vec<Handle>> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a migration has the domain in hand, so that its shutting down is nobody else's concern.
    fn is_busy(&self, dom: DomId) -> bool {
        self.outgoing().iter().any(|h| h.domid == dom && undecided(h.state()))
            || self.destinations.list().iter().any(|i| i.domid == dom && i.state != DestinationState::Running)
    }

    /// Serves until the process ends.
    pub fn serve(self: &Arc<Self>) -> Result<()> {
        let daemon = self.clone();
        keeper::start(Book::open(&self.config.state_dir)?, self.host.hypervisor.clone(), move |dom| {
            daemon.is_busy(dom)
        })?;
        if self.config.transport.insecure_tcp {
            let address = self.config.listen();
            let listener = TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
            tracing::warn!("listening on {address} over plain TCP, neither encrypted nor authenticated");
            let daemon = self.clone();
            std::thread::Builder::new().name("listen".into()).spawn(move || daemon.accept(&listener))?;
        }
        let socket = &self.config.socket;
        if let Some(dir) = socket.parent() {
            std::fs::create_dir_all(dir)?;
        }
        // The lock says that it is nobody's.
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).with_context(|| format!("listen on {}", socket.display()))?;
        std::fs::set_permissions(socket, PermissionsExt::from_mode(0o600))?;
        tracing::info!("ready at {}", socket.display());
        for stream in listener.incoming() {
            let daemon = self.clone();
            let taken = stream.and_then(|stream| {
                std::thread::Builder::new().name("command".into()).spawn(move || daemon.command(stream))
            });
            // A moment without descriptors or threads must not end the migrations that are under way.
            if let Err(error) = taken {
                tracing::error!("a command was not taken: {error}");
                std::thread::sleep(ACCEPT_PAUSE);
            }
        }
        Ok(())
    }

    fn accept(self: Arc<Self>, listener: &TcpListener) {
        let count = Arc::new(());
        for stream in listener.incoming() {
            let link = stream.and_then(|stream| {
                if Arc::strong_count(&count) > MAX_CONNECTIONS {
                    return Err(std::io::Error::other("too many connections"));
                }
                Link::tcp(stream)
            });
            match link {
                Ok(link) => {
                    let (destinations, count) = (self.destinations.clone(), count.clone());
                    let spawned = std::thread::Builder::new().name("from-source".into()).spawn(move || {
                        destinations.serve(link);
                        drop(count);
                    });
                    if let Err(error) = spawned {
                        tracing::error!("no thread for a connection: {error}");
                    }
                }
                Err(error) => {
                    tracing::warn!("a connection was not taken: {error}");
                    std::thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }

    // ---- commands ----

    fn command(&self, stream: UnixStream) {
        let mut line = String::new();
        let read = match stream.try_clone() {
            Ok(reader) => BufReader::new(std::io::Read::take(reader, REQUEST_MAX)).read_line(&mut line),
            Err(error) => Err(error),
        };
        if let Err(error) = read {
            tracing::warn!("a command could not be read: {error}");
            return;
        }
        let mut out = Answers { stream };
        let answered = match serde_json::from_str(&line) {
            Err(error) => out.failed(Exit::Failed, format!("a request that can't be read: {error}")),
            Ok(Request::Migrate(request)) if request.dry_run => self.dry_run(&request, &mut out),
            Ok(Request::Migrate(request)) => self.migrate(&request, &mut out),
            Ok(Request::Status) => out.say(&Answer::Status { migrations: self.status() }),
            Ok(Request::Cancel { which }) => match (self.find_outgoing(&which), self.find_incoming(&which)) {
                (Some(handle), _) => out.outcome(&which, Some(handle.cancel())),
                (None, Some(incoming)) => out.failed(Exit::Refused, comes_in(&which, &incoming.from)),
                (None, None) => out.outcome(&which, None),
            },
            Ok(Request::Resolve { which, peer_fenced }) => {
                let done = match self.find_outgoing(&which) {
                    Some(handle) => Some(handle.resolve(peer_fenced)),
                    None => self.find_incoming(&which).map(|i| self.destinations.resolve(i.id, peer_fenced)),
                };
                out.outcome(&which, done)
            }
        };
        if let Err(error) = answered {
            tracing::info!("a command's answer could not be given: {error}");
        }
    }

    fn limits(&self, request: &Migrate) -> Limits {
        let config = &self.config.limits;
        let fixed = self.learned.fixed(&request.host);
        Limits {
            downtime: Duration::from_millis(request.downtime_ms.unwrap_or(config.downtime_ms)),
            time: Duration::from_secs(request.max_time_s.unwrap_or(config.max_time_s)),
            rounds: config.rounds,
            fixed: fixed.unwrap_or(Duration::from_millis(config.fixed_blackout_ms)),
            after: self.learned.after(&request.host),
        }
    }

    fn check_transport(&self) -> std::result::Result<(), String> {
        if self.config.transport.insecure_tcp {
            return Ok(());
        }
        Err("no transport to other hosts is enabled; plain TCP, which is neither encrypted nor authenticated, is enabled with \
             `insecure-tcp = true` under [transport] in the configuration of both hosts"
            .into())
    }

    fn migrate(&self, request: &Migrate, out: &mut Answers) -> Result<()> {
        if let Err(why) = self.check_transport() {
            return out.failed(Exit::Refused, why);
        }
        let limits = self.limits(request);
        let started = (self.find)(&request.domain).and_then(|domid| {
            let _hold = self.busy.hold(domid)?;
            self.not_moving(domid)?;
            let (peer, record) = (request.host.clone(), request.record.clone());
            let handle = source::start(&self.host, source::Request { domid, peer, limits, record })?;
            let mut outgoing = self.outgoing();
            outgoing.retain(|h| !h.is_over());
            outgoing.push(handle.clone());
            Ok(handle)
        });
        let handle = match started {
            Ok(handle) => handle,
            Err(error) => return out.failed(Exit::Refused, format!("domain {}: {error}", request.domain)),
        };
        let mut told = Instant::now();
        let report = loop {
            if let Some(report) = handle.report() {
                break report;
            }
            if told.elapsed() >= PROGRESS_EVERY {
                told = Instant::now();
                // Whoever asked may be gone; the migration goes on.
                out.say(&Answer::Progress(handle.progress()))?;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        self.learned.learn(&request.host, &report);
        out.report(report)
    }

    fn not_moving(&self, domid: DomId) -> migrate::Result<()> {
        match self.outgoing().iter().find(|h| h.domid == domid && h.report().is_none() && undecided(h.state())) {
            Some(other) => Err(Trouble::new(format!("it is being moved to {} already", other.peer))),
            None => Ok(()),
        }
    }

    fn dry_run(&self, request: &Migrate, out: &mut Answers) -> Result<()> {
        if let Err(why) = self.check_transport() {
            return out.failed(Exit::Refused, why);
        }
        match self.try_dry_run(request) {
            Ok(dry) => out.say(&Answer::DryRun(dry)),
            Err(error) => out.failed(Exit::Refused, format!("domain {}: {error}", request.domain)),
        }
    }

    fn try_dry_run(&self, request: &Migrate) -> migrate::Result<DryRun> {
        let domid = (self.find)(&request.domain)?;
        // It looks into the dirty bitmap, which a migration needs for itself.
        let _hold = self.busy.hold(domid)?;
        self.not_moving(domid)?;
        let limits = self.limits(request);
        let (offer, _, mut refused) = source::judge(&self.host, domid, &limits)?;
        let answer = source::ask(&self.host, &request.host, &offer)?;
        refused.extend(answer.why);
        let dirty_rate = source::dirty_rate(&self.host, request.host.clone(), offer.clone(), SAMPLE)?;
        // What is dirtied while the last look's pages are sent stays for the pause.
        let rate = self.learned.rate(&request.host).unwrap_or(100 << 20);
        let per_second = dirty_rate.saturating_mul(4096);
        let left = per_second / 50;
        let expected = limits.fixed + Duration::from_millis(left.saturating_mul(1000) / rate.max(1));
        Ok(DryRun {
            domid: domid.0,
            name: offer.identity.name,
            memory_mib: offer.shell.total_pages / 256,
            devices: offer.devices.iter().map(migrate::guest::Device::title).collect(),
            refused,
            warnings: answer.warnings,
            dirty_rate,
            expected_blackout_ms: millis(expected),
            downtime_limit_ms: millis(limits.downtime),
        })
    }

    fn status(&self) -> Vec<Status> {
        let outgoing = self.outgoing().clone();
        let out = outgoing.iter().filter(|h| !h.is_over()).map(|h| {
            let progress = h.progress();
            Status {
                id: h.id,
                direction: "out".into(),
                domid: h.domid.0,
                name: h.name.clone(),
                peer: h.peer.clone(),
                state: serde_json::to_value(h.state()).ok().map(|v| state_text(&v)).unwrap_or_default(),
                waiting_for: progress.waiting_for.clone(),
                progress: Some(progress),
            }
        });
        let incoming = self.destinations.list().into_iter().map(|i| Status {
            id: i.id,
            direction: "in".into(),
            domid: i.domid.0,
            name: i.name,
            peer: i.from,
            state: serde_json::to_value(i.state).ok().map(|v| state_text(&v)).unwrap_or_default(),
            progress: None,
            waiting_for: i.waiting_for,
        });
        out.chain(incoming).collect()
    }

    fn find_outgoing(&self, which: &str) -> Option<Handle> {
        let outgoing = self.outgoing();
        let open = outgoing.iter().filter(|h| !h.is_over());
        let mut found = open.filter(|h| h.id.to_string() == which || h.name == which || h.domid.0.to_string() == which);
        found.next_back().cloned()
    }

    fn find_incoming(&self, which: &str) -> Option<Incoming> {
        let mut list = self.destinations.list().into_iter();
        list.find(|i| i.id.to_string() == which || i.name == which || i.domid.0.to_string() == which)
    }
}

/// It is not known yet where the guest will be. Once it is, there may be nothing left but to tell a peer that does not answer, and a daemon
/// that was started again in between has no report to give.
fn undecided(state: Option<SourceState>) -> bool {
    !matches!(state, Some(SourceState::RolledBack | SourceState::Left | SourceState::Closed(_)))
}

fn comes_in(which: &str, from: &str) -> String {
    format!("{which} comes in from {from}: cancel it there; if that host is gone for good, `ferry resolve` here")
}

/// `"committed"`, or the key of `{"closed": …}`.
fn state_text(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Object(map) => map.keys().next().cloned().unwrap_or_default(),
        _ => "starting".into(),
    }
}

struct Answers {
    stream: UnixStream,
}

impl Answers {
    fn say(&mut self, answer: &Answer) -> Result<()> {
        let mut line = serde_json::to_vec(answer)?;
        line.push(b'\n');
        Ok(self.stream.write_all(&line)?)
    }

    fn failed(&mut self, exit: Exit, message: String) -> Result<()> {
        self.say(&Answer::Failed { exit: exit as u8, message })
    }

    fn outcome(&mut self, which: &str, done: Option<std::result::Result<(), NotDone>>) -> Result<()> {
        match done {
            None => self.failed(Exit::Failed, format!("no migration {which} is under way; `ferry status` lists them")),
            Some(Ok(())) => self.say(&Answer::Done),
            Some(Err(NotDone::Denied(denied))) => self.failed(Exit::Refused, format!("{which}: {denied}")),
            Some(Err(busy)) => self.failed(Exit::Unresolved, format!("{which}: {busy}")),
        }
    }

    fn report(&mut self, report: Report) -> Result<()> {
        let exit = match report.ending {
            _ if report.moved => None,
            Ending::Refused => Some(Exit::Refused),
            Ending::GivenUp => Some(Exit::GivenUp),
            _ => Some(Exit::Failed),
        };
        let message = format!(
            "domain {} ({}) was not moved to {} and {}: {}",
            report.name,
            report.domid,
            report.peer,
            report.left,
            report.error.as_deref().unwrap_or("no reason is known")
        );
        self.say(&Answer::Report(Box::new(report)))?;
        match exit {
            None => Ok(()),
            Some(exit) => self.failed(exit, message),
        }
    }
}

/// A number that tells this host apart from others, made once.
fn host_id(dir: &std::path::Path) -> Result<Uuid> {
    let path = dir.join("host-id");
    match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().with_context(|| format!("{} holds no host id; remove it", path.display())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let id = Uuid::new_v4();
            std::fs::write(&path, format!("{id}\n")).with_context(|| format!("write {}", path.display()))?;
            Ok(id)
        }
        Err(e) => bail!("read {}: {e}", path.display()),
    }
}

/// For tests on real hosts: `FERRY_FAULT=<point>=<cut|fail|crash|panic|hang>,…` plants faults, each to happen once; docs/handshake.md
/// lists the points.
fn planted_faults() -> Result<Arc<dyn Faults>> {
    let Ok(text) = std::env::var("FERRY_FAULT") else { return Ok(Arc::new(NoFaults)) };
    let plants = text.split(',').map(str::parse).collect::<Result<Vec<Plant>, _>>().context("FERRY_FAULT")?;
    for plant in &plants {
        tracing::warn!("a fault is planted: {plant}");
    }
    Ok(Arc::new(Planted(Mutex::new(plants))))
}

/// Those that have not happened yet.
struct Planted(Mutex<Vec<Plant>>);

impl Faults for Planted {
    fn at(&self, point: &str) -> Option<Fault> {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let index = left.iter().position(|plant| plant.point == point)?;
        let Plant { fault, .. } = left.remove(index);
        tracing::warn!("planted fault at {point}: {fault}");
        if fault == Fault::Crash {
            // As kill -9 would: nothing is flushed, nobody is told.
            std::process::abort();
        }
        Some(fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use migrate::handshake::Outcome;

    #[test]
    fn a_guest_whose_place_is_known_can_move_though_its_old_peer_was_not_told() {
        assert!([None, Some(SourceState::Copying), Some(SourceState::Committed)].into_iter().all(undecided));
        let known = [SourceState::RolledBack, SourceState::Left, SourceState::Closed(Outcome::Stayed)];
        assert!(!known.map(Some).into_iter().any(undecided));
    }
}
