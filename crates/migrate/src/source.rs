//! The source of one migration: carries out what [`handshake::Source`](crate::handshake::Source) asks for.

use crate::capture;
use crate::guest::{GuestState, Offer, gfns};
use crate::handshake::{
    Denied, Outcome, Source, SourceAction, SourceEvent, SourceRecord, SourceState, ToDestination, ToSource,
};
use crate::host::{Fault, Host};
use crate::image;
use crate::journal::Journal;
use crate::link::Sender;
use crate::placement;
use crate::precopy::{Judgement, Limits, Precopy};
use crate::preflight;
use crate::report::{Ending, Phase, Place, Progress, Report, Step, Timeline, millis};
use crate::restore::PAUSES;
use crate::toolstack::Description;
use crate::trouble::{Doing, Result, Trouble};
use crate::wire::{Digest, Frame, Said};
use hypervisor::{DirtyBitmap, DomId, Gfn, GtStep, PAGE_SIZE, PageType, Watchdog};
use migration_stream::Encoder;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, VecDeque};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Pages read, and sent in one record.
const BATCH: usize = 1024;
/// So many times everything is sent once more because the guest's memory has changed in size.
const MAX_RESIZES: u32 = 5;
/// Time between two pings while waiting.
const PING_EVERY: Duration = Duration::from_secs(2);

/// A word without an answer is said again after so many times the pause between two connections.
const REPEAT_AFTER: u32 = 5;

/// What an operator asks for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    pub domid: DomId,
    /// The destination's address.
    pub peer: String,
    pub limits: Limits,
}

/// What the journal's `Begin` holds.
#[derive(Debug, Serialize, Deserialize)]
struct Begin {
    peer: String,
    offer: Offer,
}

/// What the journal's `Freeze` holds: all that a roll-back has to know besides.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Freeze {
    /// As they were at the pause, and the host's time then.
    watchdogs: Vec<Watchdog>,
    paused_at_ns: u64,
}

/// What the source says with `Go`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GoDetails {
    /// From the pause to this word, half the round trip included.
    pub away_ns: u64,
}

/// What the destination says with `Ready` and `Running`: how long each step took.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct StepsDetails {
    #[serde(default)]
    pub steps: Vec<Step>,
    /// Of the image, as it was received.
    #[serde(default)]
    pub digest: u32,
    /// With `Running`: from the pause to the unpause.
    #[serde(default)]
    pub blackout_us: u64,
}

/// What the destination says with `Accept`, `Refuse` and `Returned`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct WhyDetails {
    #[serde(default)]
    pub why: Vec<String>,
    /// What will not be as it was, and is no reason to refuse.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// What reaches the migration's thread.
#[derive(Debug)]
enum Input {
    Frame(Sender, Frame),
    Lost(Sender, String),
    Operator(SourceEvent, mpsc::Sender<std::result::Result<(), Denied>>),
}

/// A hold on a running migration, for whoever watches or commands it.
#[derive(Debug, Clone)]
pub struct Handle {
    pub id: Uuid,
    pub domid: DomId,
    pub name: String,
    pub peer: String,
    shared: Arc<Shared>,
    input: mpsc::Sender<Input>,
}

#[derive(Debug, Default)]
struct Shared {
    progress: Mutex<Progress>,
    state: Mutex<Option<SourceState>>,
    report: Mutex<Option<Report>>,
}

impl Handle {
    pub fn progress(&self) -> Progress {
        self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The report, once the outcome is known.
    pub fn report(&self) -> Option<Report> {
        self.shared.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// `None` before the first step.
    pub fn state(&self) -> Option<SourceState> {
        *self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing is left to do, not even to tell the destination.
    pub fn is_over(&self) -> bool {
        matches!(self.state(), Some(SourceState::Closed(_)))
    }

    pub fn cancel(&self) -> std::result::Result<(), Denied> {
        self.command(SourceEvent::Cancel)
    }

    pub fn resolve(&self, peer_fenced: bool) -> std::result::Result<(), Denied> {
        self.command(SourceEvent::Resolve { peer_fenced })
    }

    fn command(&self, event: SourceEvent) -> std::result::Result<(), Denied> {
        let (answer, answered) = mpsc::channel();
        // A migration whose thread has ended has nothing left to decide.
        self.input.send(Input::Operator(event, answer)).map_err(|_| Denied::NothingToResolve)?;
        answered.recv().unwrap_or(Err(Denied::NothingToResolve))
    }
}

/// Judges whether a guest can leave, changing nothing: what it is and, if it can't, why.
pub fn judge(host: &Host, dom: DomId, limits: &Limits) -> Result<(Offer, Description, Vec<String>)> {
    let hv = &*host.hypervisor;
    let info = hv.domain_info(dom)?;
    let here = hv.host_info()?;
    let Some(extension) = &here.extension else {
        return Err(Trouble::new("the hypervisor extension is not loaded on this host").todo("run `ferry host load`"));
    };
    let guest = host.toolstack.describe(dom)?;
    // Xen knows nothing of the kind for a PV guest, which is refused as such.
    if info.hvm {
        preflight::populated(hv, dom)?;
    }
    let gt = hv.gt_state(dom)?;
    let why = preflight::source(hv, &here, &info, &gt, &guest)?;
    preflight::reach(hv, &info)?;
    let ram = hv.ram_gfns(dom)?;
    let offer = Offer {
        identity: guest.identity.clone(),
        host: host.name.clone(),
        host_id: host.id,
        writer: host.writer.clone(),
        xen: here.version.clone(),
        build_id: here.build_id.clone(),
        extension_abi: extension.abi_version,
        shell: capture::shell(hv, &info, &gt, &ram)?,
        placement: placement::capture(hv, &*host.toolstack, &info).doing("read where it may run")?,
        devices: guest.devices.clone(),
        toolstack: guest.details.clone(),
        downtime_limit_ms: millis(limits.downtime),
        dry_run: false,
    };
    Ok((offer, guest, why))
}

/// Asks the destination what it would say to an offer: why not, or nothing, and what would not be as it was. Nothing is made there.
pub fn ask(host: &Host, peer: &str, offer: &Offer) -> Result<WhyDetails> {
    let link = host.connector.connect(peer).map_err(|e| unreachable_peer(peer, e))?;
    let (sender, mut receiver) = link.greet().doing(format!("talk to {peer}"))?;
    let details = serde_json::to_value(Offer { dry_run: true, ..offer.clone() })?;
    sender.send(&Frame::ToDestination(Said { id: Uuid::new_v4(), word: ToDestination::Offer, details }))?;
    let answer = receiver.receive();
    sender.close();
    match answer? {
        Some(Frame::ToSource(Said { word: ToSource::Refuse, details, .. })) => Ok(serde_json::from_value(details)?),
        other => Err(Trouble::new(format!("{peer} answered something else than was asked: {other:?}"))),
    }
}

fn unreachable_peer(peer: &str, error: std::io::Error) -> Trouble {
    Trouble::because(format!("connect to {peer}"), error).todo("is ferryd running there, and reachable?")
}

/// Starts a migration in a thread of its own.
pub fn start(host: &Host, request: Request) -> Result<Handle> {
    let (offer, guest, why) = judge(host, request.domid, &request.limits)?;
    if !why.is_empty() {
        return Err(Trouble::new(why.join("; ")));
    }
    let id = Uuid::new_v4();
    let (machine, actions) = Source::begin();
    Ok(spawn(host, Run::new(host, id, request.peer, request.limits, offer, guest, machine, actions)))
}

/// Goes on with the migration that a journal tells of, after the daemon was started again.
pub fn recover(host: &Host, journal: Journal<SourceRecord>) -> Result<Option<Handle>> {
    let Some(last) = journal.last() else {
        journal.delete()?;
        return Ok(None);
    };
    if last == SourceRecord::Closed {
        journal.delete()?;
        return Ok(None);
    }
    let begin: Begin = serde_json::from_slice(journal.payload(SourceRecord::Begin).unwrap_or_default())
        .doing("read what the journal's first record holds")?;
    let guest = Description {
        identity: begin.offer.identity.clone(),
        devices: begin.offer.devices.clone(),
        details: begin.offer.toolstack.clone(),
    };
    let (machine, actions) = Source::recover(last);
    let id = journal.id();
    let mut run = Run::new(host, id, begin.peer, Limits::default(), begin.offer, guest, machine, actions);
    let undo = journal.payload(SourceRecord::Go).or(journal.payload(SourceRecord::Freeze));
    run.freeze = undo.and_then(|p| serde_json::from_slice(p).ok());
    run.recovered = true;
    run.connected = true;
    run.journal = Some(journal);
    Ok(Some(spawn(host, run)))
}

fn spawn(host: &Host, mut run: Run) -> Handle {
    let handle = Handle {
        id: run.id,
        domid: run.guest.identity.domid,
        name: run.guest.identity.name.clone(),
        peer: run.peer.clone(),
        shared: run.shared.clone(),
        input: run.input_tx.clone(),
    };
    let name = format!("{}-to-{}", host.name, run.peer);
    // A daemon that can't make a thread can't do anything else either.
    let spawned = std::thread::Builder::new().name(name).spawn(move || run.run());
    if let Err(error) = spawned {
        tracing::error!("no thread for a migration: {error}");
    }
    handle
}

/// The daemon is to be gone (a planted fault).
struct Crashed;

struct Run {
    host: Host,
    id: Uuid,
    peer: String,
    limits: Limits,
    offer: Offer,
    guest: Description,
    machine: Source,
    todo: VecDeque<SourceAction>,
    journal: Option<Journal<SourceRecord>>,
    freeze: Option<Freeze>,
    recovered: bool,
    shared: Arc<Shared>,
    input: mpsc::Receiver<Input>,
    input_tx: mpsc::Sender<Input>,
    link: Option<Sender>,
    /// A connection was there once.
    connected: bool,
    last_heard: Instant,
    last_ping: Instant,
    last_said: Instant,
    pings: VecDeque<(u64, Instant)>,
    round_trip: Option<Duration>,
    waiting_since: Instant,
    encoder: Encoder,
    digest: Digest,
    precopy: Precopy,
    /// gfns that were sent with contents or as zero, and are there.
    known: BTreeSet<Gfn>,
    /// How much memory it had at the last look, and whether that was another amount than at the one before.
    size: u64,
    resized: bool,
    state: Option<GuestState>,
    timeline: Option<Timeline>,
    paused_at_ns: u64,
    started: Instant,
    ending: Ending,
    why: Option<String>,
    warnings: Vec<String>,
}

impl Run {
    #[allow(clippy::too_many_arguments, reason = "called twice, by the two ways a migration begins")]
    fn new(
        host: &Host,
        id: Uuid,
        peer: String,
        limits: Limits,
        offer: Offer,
        guest: Description,
        machine: Source,
        actions: Vec<SourceAction>,
    ) -> Run {
        let (input_tx, input) = mpsc::channel();
        let now = Instant::now();
        let size = offer.shell.total_pages;
        Run {
            host: host.clone(),
            id,
            peer,
            limits,
            offer,
            guest,
            machine,
            todo: actions.into(),
            journal: None,
            freeze: None,
            recovered: false,
            shared: Arc::default(),
            input,
            input_tx,
            link: None,
            connected: false,
            last_heard: now,
            last_ping: now,
            last_said: now,
            pings: VecDeque::new(),
            round_trip: None,
            waiting_since: now,
            encoder: Encoder::new(),
            digest: Digest::default(),
            precopy: Precopy::default(),
            known: BTreeSet::new(),
            size,
            resized: false,
            state: None,
            timeline: None,
            paused_at_ns: 0,
            started: now,
            ending: Ending::Failed,
            why: None,
            warnings: Vec::new(),
        }
    }

    fn dom(&self) -> DomId {
        self.guest.identity.domid
    }

    fn title(&self) -> String {
        format!("domain {} ({})", self.guest.identity.name, self.dom())
    }

    fn run(&mut self) {
        tracing::info!(id = %self.id, "{}: to {}, {:?}", self.title(), self.peer, self.machine.state());
        while !matches!(self.machine.state(), SourceState::Closed(_)) || !self.todo.is_empty() {
            if self.run_step().is_err() {
                tracing::error!("{}: crash, as planted", self.title());
                self.drop_link();
                return;
            }
        }
        self.drop_link();
        *self.shared.state.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.machine.state());
        if let Some(journal) = self.journal.take()
            && let Err(error) = journal.delete()
        {
            tracing::warn!("{}: {error}", self.title());
        }
    }

    fn run_step(&mut self) -> std::result::Result<(), Crashed> {
        *self.shared.state.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.machine.state());
        match self.todo.pop_front() {
            Some(action) => self.act(action),
            None => {
                if let Some(event) = self.wait() {
                    self.hear(event);
                }
                Ok(())
            }
        }
    }

    fn hear(&mut self, event: SourceEvent) {
        let before = self.machine.state();
        let actions = self.machine.on(event);
        if self.machine.state() != before {
            tracing::info!(id = %self.id, "{}: {before:?} → {:?} on {event:?}", self.title(), self.machine.state());
            self.waiting_since = Instant::now();
        }
        self.todo.extend(actions);
    }

    // ---- actions ----

    fn act(&mut self, action: SourceAction) -> std::result::Result<(), Crashed> {
        let name = action_name(action);
        if self.fault(&format!("source.before.{name}"))? {
            let fault = Trouble::new("planted fault");
            match action {
                SourceAction::Journal(record) => self.journal_failed(record, fault),
                SourceAction::Send(_) => self.lost(fault.to_string()),
                SourceAction::Precopy | SourceAction::Freeze => self.failed(&name, fault),
                // These are tried until they succeed.
                _ => self.todo.push_front(action),
            }
            return Ok(());
        }
        self.set_phase();
        let event = match action {
            SourceAction::Journal(record) => {
                if let Err(error) = self.write_journal(record) {
                    self.journal_failed(record, error);
                }
                None
            }
            SourceAction::Send(word) => {
                if let Err(error) = self.say(word) {
                    self.lost(error.to_string());
                }
                None
            }
            SourceAction::Precopy => self.stage("precopy", Self::precopy, SourceEvent::PrecopyDone),
            SourceAction::Freeze => self.stage("freeze", Self::freeze, SourceEvent::FreezeDone),
            SourceAction::RollBack => self.stubborn("roll back", Self::roll_back, SourceEvent::RolledBack),
            SourceAction::Destroy => {
                self.stubborn("remove what is left of the guest", Self::destroy, SourceEvent::Destroyed)
            }
            SourceAction::Deny(_) => None,
            SourceAction::Report(outcome) => {
                self.report(outcome);
                None
            }
        };
        self.fault(&format!("source.after.{name}"))?;
        if let Some(event) = event {
            self.hear(event);
        }
        Ok(())
    }

    /// A planted fault; `true`: the action shall fail.
    fn fault(&mut self, point: &str) -> std::result::Result<bool, Crashed> {
        match self.host.faults.at(point) {
            None => Ok(false),
            Some(Fault::Crash) => Err(Crashed),
            Some(Fault::Fail) => Ok(true),
            Some(Fault::Cut) => {
                self.lost("planted fault".into());
                Ok(false)
            }
        }
    }

    /// A stage that may fail: then the guest stays.
    fn stage(&mut self, name: &str, work: fn(&mut Self) -> Result<()>, done: SourceEvent) -> Option<SourceEvent> {
        match work(self) {
            Ok(()) => Some(done),
            Err(error) => {
                self.failed(name, error);
                None
            }
        }
    }

    fn failed(&mut self, stage: &str, error: Trouble) {
        tracing::warn!("{}: {stage}: {error}", self.title());
        if self.why.is_none() {
            self.why = Some(format!("{stage}: {error}"));
        }
        self.hear(SourceEvent::Failed);
    }

    /// A stage that must succeed in the end: it is tried until it does.
    fn stubborn(&mut self, name: &str, work: fn(&mut Self) -> Result<()>, done: SourceEvent) -> Option<SourceEvent> {
        loop {
            match work(self) {
                Ok(()) => {
                    self.progress(|p| p.waiting_for = None);
                    return Some(done);
                }
                Err(error) => {
                    tracing::error!("{}: {name}: {error}; trying again", self.title());
                    self.progress(|p| p.waiting_for = Some(format!("{name}: {error}")));
                    std::thread::sleep(self.host.timeouts.reconnect);
                }
            }
        }
    }

    fn write_journal(&mut self, record: SourceRecord) -> Result<()> {
        let payload = match record {
            SourceRecord::Begin => serde_json::to_vec(&Begin { peer: self.peer.clone(), offer: self.offer.clone() })?,
            SourceRecord::Freeze | SourceRecord::Go => serde_json::to_vec(self.freeze.get_or_insert_default())?,
            SourceRecord::Abort => self.why.clone().unwrap_or_default().into_bytes(),
            _ => Vec::new(),
        };
        if self.journal.is_none() {
            self.journal = Some(Journal::create(&self.host.journals, self.id)?);
        }
        if let Some(journal) = &mut self.journal {
            journal.append(record, &payload)?;
        }
        if record == SourceRecord::Go
            && let Some(timeline) = &mut self.timeline
        {
            timeline.mark("write the commit to disk");
        }
        Ok(())
    }

    /// Nothing may follow a record that is not on disk.
    fn journal_failed(&mut self, record: SourceRecord, error: Trouble) {
        tracing::error!("{}: {error}", self.title());
        self.why.get_or_insert_with(|| format!("write the journal: {error}"));
        self.todo.clear();
        match record {
            // Go has not been sent, so this side may still decide, and remembers that it does.
            SourceRecord::Begin | SourceRecord::Freeze | SourceRecord::Go => {
                let (machine, actions) = Source::recover(SourceRecord::Abort);
                self.machine = machine;
                self.todo.extend(actions);
            }
            // What the record would say is true all the same; a daemon that is started again does it once more.
            SourceRecord::Abort => self.todo.extend([SourceAction::RollBack]),
            SourceRecord::Done => self.todo.extend([SourceAction::Destroy]),
            SourceRecord::RolledBack => self.todo.extend([SourceAction::Report(Outcome::Stayed)]),
            SourceRecord::Left => self.todo.extend([SourceAction::Report(Outcome::Moved)]),
            SourceRecord::Closed => {}
        }
    }

    fn say(&mut self, word: ToDestination) -> Result<()> {
        let details = match word {
            ToDestination::Offer => {
                self.connect()?;
                serde_json::to_value(&self.offer)?
            }
            ToDestination::Final | ToDestination::Go => {
                let away_ns = self.away_ns()?.saturating_add(self.half_round_trip_ns());
                serde_json::to_value(GoDetails { away_ns })?
            }
            ToDestination::Abort => {
                serde_json::to_value(WhyDetails { why: self.why.clone().into_iter().collect(), warnings: Vec::new() })?
            }
            ToDestination::Moved => serde_json::Value::Null,
        };
        self.last_said = Instant::now();
        let link = self.link.as_ref().ok_or_else(|| Trouble::new("there is no connection"))?;
        link.send(&Frame::ToDestination(Said { id: self.id, word, details }))?;
        if word == ToDestination::Final
            && let Some(timeline) = &mut self.timeline
        {
            timeline.mark("send the last pages and the state");
        }
        Ok(())
    }

    fn away_ns(&self) -> Result<u64> {
        let since = self.freeze.as_ref().map_or(self.paused_at_ns, |f| f.paused_at_ns);
        Ok(self.host.hypervisor.now()?.saturating_sub(since))
    }

    fn half_round_trip_ns(&self) -> u64 {
        self.round_trip.map_or(0, |rtt| u64::try_from(rtt.as_nanos() / 2).unwrap_or(0))
    }

    // ---- the connection ----

    fn connect(&mut self) -> Result<()> {
        let peer = &self.peer;
        let link = self.host.connector.connect(peer).map_err(|e| unreachable_peer(peer, e))?;
        let (sender, mut receiver) = link.greet().doing(format!("talk to {peer}"))?;
        let (tx, reply_to) = (self.input_tx.clone(), sender.clone());
        std::thread::Builder::new().name("from-destination".into()).spawn(move || {
            let lost = loop {
                match receiver.receive() {
                    Ok(Some(Frame::Ping(number))) => {
                        if let Err(error) = reply_to.send(&Frame::Pong(number)) {
                            break error.to_string();
                        }
                    }
                    Ok(Some(frame)) => {
                        if tx.send(Input::Frame(reply_to.clone(), frame)).is_err() {
                            break "the migration is over".into();
                        }
                    }
                    Ok(None) => break "the destination closed it".into(),
                    Err(error) => break error.to_string(),
                }
            };
            reply_to.close();
            let _ = tx.send(Input::Lost(reply_to, lost));
        })?;
        self.last_heard = Instant::now();
        self.pings.clear();
        self.link = Some(sender);
        self.connected = true;
        self.ping();
        Ok(())
    }

    fn ping(&mut self) {
        let number = self.pings.back().map_or(0, |(n, _)| n + 1);
        self.last_ping = Instant::now();
        self.pings.push_back((number, self.last_ping));
        if let Some(link) = &self.link
            && let Err(error) = link.send(&Frame::Ping(number))
        {
            self.lost(error.to_string());
        }
    }

    fn drop_link(&mut self) {
        if let Some(link) = self.link.take() {
            link.close();
        }
    }

    fn lost(&mut self, why: String) {
        let had_link = self.link.is_some();
        self.drop_link();
        let before_commit = matches!(
            self.machine.state(),
            SourceState::Offering | SourceState::Copying | SourceState::Freezing | SourceState::AwaitingReady
        );
        if before_commit {
            self.why.get_or_insert_with(|| why.clone());
        }
        if had_link || before_commit {
            tracing::warn!("{}: connection to {} lost: {why}", self.title(), self.peer);
            self.hear(SourceEvent::LinkLost);
        }
    }

    /// The next event, or `None` when there was only time passing.
    fn wait(&mut self) -> Option<SourceEvent> {
        if self.machine.state() == SourceState::RolledBack && !self.connected {
            return Some(SourceEvent::PeerUnaware);
        }
        if self.link.is_none() && self.machine.needs_link() {
            self.progress_waiting();
            match self.connect() {
                Ok(()) => return Some(SourceEvent::LinkUp),
                Err(error) => tracing::info!("{}: {error}", self.title()),
            }
        }
        match self.input.recv_timeout(self.host.timeouts.reconnect) {
            Ok(input) => self.take(input),
            Err(_) => self.tick(),
        }
    }

    fn progress_waiting(&self) {
        let peer = self.peer.clone();
        self.progress(|p| p.waiting_for = Some(format!("{peer} can't be reached; trying again")));
    }

    /// Time passes while waiting for the peer.
    fn tick(&mut self) -> Option<SourceEvent> {
        let timeouts = self.host.timeouts;
        let limit = match self.machine.state() {
            SourceState::Offering => Some(timeouts.accept),
            SourceState::AwaitingReady => Some(timeouts.ready),
            _ => None,
        };
        if limit.is_some_and(|limit| self.waiting_since.elapsed() > limit) {
            self.why.get_or_insert_with(|| format!("{} did not answer in {:?}", self.peer, limit.unwrap_or_default()));
            return Some(SourceEvent::Failed);
        }
        if self.link.is_some() {
            // A word may have reached a migration's thread that was just ending; saying it again does no harm.
            let unanswered =
                matches!(self.machine.state(), SourceState::Committed | SourceState::RolledBack | SourceState::Left);
            if unanswered && self.last_said.elapsed() > timeouts.reconnect * REPEAT_AFTER {
                return Some(SourceEvent::LinkUp);
            }
            if self.last_heard.elapsed() > timeouts.silence && self.last_ping > self.last_heard {
                self.lost(format!("nothing heard for {:?}", timeouts.silence));
                return None;
            }
            if self.last_ping.elapsed() > PING_EVERY {
                self.ping();
            }
        }
        None
    }

    fn take(&mut self, input: Input) -> Option<SourceEvent> {
        match input {
            Input::Operator(event, answer) => {
                let before = self.machine.state();
                let actions = self.machine.on(event);
                let denied = actions.iter().find_map(|a| match a {
                    SourceAction::Deny(denied) => Some(*denied),
                    _ => None,
                });
                if denied.is_none() && before != self.machine.state() {
                    match event {
                        SourceEvent::Cancel => {
                            self.ending = Ending::GivenUp;
                            self.why.get_or_insert_with(|| "cancelled by the operator".into());
                        }
                        SourceEvent::Resolve { .. } => {
                            self.ending = Ending::Recovered;
                            self.why = Some("the operator has stated that the destination is fenced".into());
                        }
                        _ => {}
                    }
                }
                self.todo.extend(actions);
                let _ = answer.send(denied.map_or(Ok(()), Err));
                None
            }
            Input::Lost(link, why) => {
                // Only the present connection counts.
                if self.link.as_ref().is_some_and(|present| present.is(&link)) {
                    self.lost(why);
                }
                None
            }
            Input::Frame(link, frame) => {
                if !self.link.as_ref().is_some_and(|present| present.is(&link)) {
                    return None;
                }
                self.last_heard = Instant::now();
                match frame {
                    Frame::Pong(number) => {
                        self.pong(number);
                        None
                    }
                    Frame::ToSource(said) if said.id == self.id => self.word(said),
                    _ => {
                        self.lost("the peer said something that a destination does not say".into());
                        None
                    }
                }
            }
        }
    }

    fn pong(&mut self, number: u64) {
        while let Some((sent_number, sent)) = self.pings.pop_front() {
            if sent_number == number {
                let rtt = sent.elapsed();
                self.round_trip = Some(self.round_trip.map_or(rtt, |best| best.min(rtt)));
                return;
            }
        }
    }

    fn word(&mut self, said: Said<ToSource>) -> Option<SourceEvent> {
        let steps = || serde_json::from_value::<StepsDetails>(said.details.clone()).unwrap_or_default();
        let why = || serde_json::from_value::<WhyDetails>(said.details.clone()).unwrap_or_default().why.join("; ");
        match (said.word, self.machine.state()) {
            (ToSource::Ready, SourceState::AwaitingReady) => {
                let details = steps();
                if let Some(timeline) = &mut self.timeline {
                    timeline.mark_remote(details.steps, "carry the last pages and the state");
                }
                let sent = self.digest.value();
                if details.digest != sent {
                    self.why = Some(format!(
                        "the destination restored something else than was sent (digest {:#010x}, sent {sent:#010x})",
                        details.digest
                    ));
                    return Some(SourceEvent::Failed);
                }
            }
            (ToSource::Running, SourceState::Committed) => {
                let details = steps();
                if let Some(timeline) = &mut self.timeline {
                    timeline.end_remote(details.steps, details.blackout_us, "carry the commit");
                }
            }
            (ToSource::Accept, SourceState::Offering) => {
                self.warnings = serde_json::from_value::<WhyDetails>(said.details.clone()).unwrap_or_default().warnings;
            }
            (ToSource::Refuse, _) => {
                self.ending = Ending::Refused;
                self.why = Some(why());
            }
            (ToSource::Returned, SourceState::RolledBack) => {}
            (ToSource::Returned, _) => {
                let why = why();
                self.why = Some(format!("the destination gave the guest back: {why}"));
            }
            _ => {}
        }
        Some(SourceEvent::Peer(said.word))
    }

    /// Takes what has come meanwhile, without waiting. An error if the stage has to end because of it.
    fn check(&mut self) -> Result<()> {
        loop {
            match self.input.try_recv() {
                Err(_) => return Ok(()),
                Ok(Input::Operator(SourceEvent::Cancel, answer)) => {
                    let _ = answer.send(Ok(()));
                    self.ending = Ending::GivenUp;
                    return Err(Trouble::new("cancelled by the operator"));
                }
                Ok(Input::Operator(_, answer)) => drop(answer.send(Err(Denied::NothingToResolve))),
                Ok(Input::Lost(link, why)) => {
                    if self.link.as_ref().is_some_and(|present| present.is(&link)) {
                        self.drop_link();
                        return Err(Trouble::new(format!("connection to {} lost: {why}", self.peer)));
                    }
                }
                Ok(Input::Frame(_, Frame::Pong(number))) => {
                    self.last_heard = Instant::now();
                    self.pong(number);
                }
                Ok(Input::Frame(_, Frame::ToSource(said))) => {
                    let why = serde_json::from_value::<WhyDetails>(said.details).unwrap_or_default().why.join("; ");
                    return Err(Trouble::new(format!("the destination ended it ({:?}): {why}", said.word)));
                }
                Ok(Input::Frame(..)) => {
                    return Err(Trouble::new("the peer said something that a destination does not say"));
                }
            }
        }
    }

    // ---- precopy ----

    fn precopy(&mut self) -> Result<()> {
        let hv = self.host.hypervisor.clone();
        let dom = self.dom();
        if hv.log_dirty_enable(dom).is_err() {
            // Left on by a daemon that was killed, or by stock tools that were.
            hv.log_dirty_disable(dom)?;
            hv.log_dirty_enable(dom).doing("watch which pages the guest writes to")?;
        }
        let offer = self.offer.clone();
        image::write_head(&mut self.encoder, &offer);
        let mut todo: Vec<Gfn> = gfns(&offer.shell.ram).collect();
        self.progress(|p| p.total_pages = offer.shell.total_pages);
        self.precopy = Precopy::new(self.limits.clone());
        let mut resizes = 0;
        loop {
            self.precopy.begin_round();
            self.send_pages(&todo)?;
            self.flush()?;
            let mut bitmap = self.bitmap()?;
            hv.log_dirty_clean(dom, &mut bitmap, false)?;
            let judgement = self.precopy.end_round(bitmap.count());
            let (dirty_rate, expected) = (self.precopy.dirty_rate(), self.precopy.expected_blackout());
            self.progress(|p| {
                p.dirty_rate = dirty_rate;
                p.expected_blackout_ms = millis(expected);
            });
            // What this look at the bitmap has marked clean is sent in the next round, or after the pause.
            todo = bitmap.iter().collect();
            self.look_at_size()?;
            if std::mem::take(&mut self.resized) {
                resizes += 1;
                if resizes > MAX_RESIZES {
                    self.ending = Ending::GivenUp;
                    return Err(
                        Trouble::new("its memory changes in size all the time").todo("wait until its balloon rests")
                    );
                }
                let now: BTreeSet<Gfn> = hv.ram_gfns(dom)?.into_iter().collect();
                todo = now.union(&self.known).copied().collect();
                continue;
            }
            match judgement {
                Judgement::Again => {}
                Judgement::Freeze => {
                    self.precopy.left_over = bitmap;
                    return Ok(());
                }
                Judgement::GiveUp(why) => {
                    self.ending = Ending::GivenUp;
                    return Err(Trouble::new(why));
                }
            }
        }
    }

    /// Xen does not mark a page that a guest gets while its writes are watched, and marks writes to it only after the next look at the bitmap
    /// (`p2m_add_page`, xen/arch/x86/mm/p2m.c). So if memory went and came, everything is sent once more.
    fn look_at_size(&mut self) -> Result<()> {
        let size = self.host.hypervisor.domain_info(self.dom())?.total_pages;
        self.resized |= size != self.size;
        self.size = size;
        Ok(())
    }

    fn bitmap(&self) -> Result<DirtyBitmap> {
        let hv = &*self.host.hypervisor;
        Ok(DirtyBitmap::new(preflight::reach(hv, &hv.domain_info(self.dom())?)?.0 + 1))
    }

    fn send_pages(&mut self, pages: &[Gfn]) -> Result<()> {
        let hv = self.host.hypervisor.clone();
        let mut buffer = vec![0; BATCH * PAGE_SIZE];
        let mut left = pages.len() as u64;
        for batch in pages.chunks(BATCH) {
            self.check()?;
            self.look_at_size()?;
            let buffer = buffer.get_mut(..batch.len() * PAGE_SIZE).ok_or_else(|| Trouble::new("batch too long"))?;
            let read = hv.read_pages(self.dom(), batch, buffer).doing("read the guest's memory")?;
            let (mut full, mut zero, mut gone) = (Vec::new(), Vec::new(), Vec::new());
            // Those that are sent move together at the front.
            let mut data = 0;
            for ((gfn, read), at) in batch.iter().zip(read).zip((0..).step_by(PAGE_SIZE)) {
                match read {
                    // Given up by the guest since it was offered.
                    Err(_) => {
                        self.known.remove(gfn);
                        gone.push(*gfn);
                    }
                    // Only the first time: what the destination has of it may not be zero.
                    Ok(()) if is_zero(&buffer[at..at + PAGE_SIZE]) && !self.known.contains(gfn) => zero.push(*gfn),
                    Ok(()) => {
                        full.push(*gfn);
                        if at != data {
                            buffer.copy_within(at..at + PAGE_SIZE, data);
                        }
                        data += PAGE_SIZE;
                    }
                }
            }
            let types = hv.page_types(self.dom(), &gone)?;
            let mut there = types.iter().map(|kind| *kind == PageType::Ram);
            let (back, gone): (Vec<Gfn>, Vec<Gfn>) = gone.into_iter().partition(|_| there.next() == Some(true));
            for gfn in back {
                // Taken again just now; else the other host would take it for given up.
                // Its place in the batch is free, so there is room behind those that are sent.
                let page = &mut buffer[data..data + PAGE_SIZE];
                if let Some(Err(errno)) = hv.read_pages(self.dom(), &[gfn], page)?.first() {
                    return Err(Trouble::new(format!("its page {gfn} is there, but can't be read ({errno})")));
                }
                full.push(gfn);
                data += PAGE_SIZE;
            }
            self.known.extend(full.iter().chain(&zero));
            image::write_pages(&mut self.encoder, &full, &buffer[..data], &zero, &gone);
            self.flush()?;
            left -= batch.len() as u64;
            self.precopy.sent(batch.len() as u64, zero.len() as u64);
            let (round, rate, bytes) = (self.precopy.round(), self.precopy.rate(), self.precopy.total_bytes());
            self.progress(|p| {
                p.round = round;
                p.rate = rate;
                p.sent_bytes = bytes;
                p.remaining_pages = left;
            });
        }
        Ok(())
    }

    /// Sends what the encoder holds.
    fn flush(&mut self) -> Result<()> {
        let (bytes, crc) = (self.encoder.bytes(), self.encoder.crc());
        self.digest.add(crc, bytes.len());
        self.precopy.count_bytes(bytes.len() as u64);
        let link = self.link.as_ref().ok_or_else(|| Trouble::new("there is no connection"))?;
        link.stream(bytes, crc)?;
        self.encoder.clear();
        Ok(())
    }

    // ---- blackout ----

    fn freeze(&mut self) -> Result<()> {
        let hv = self.host.hypervisor.clone();
        let dom = self.dom();
        // The pages that Xen writes to by itself are found before the pause; what changes until then is found after it again.
        if hv.domain_info(dom)?.paused {
            // Nothing was done that a roll-back would have to undo, this pause least of all.
            self.freeze = None;
            return Err(Trouble::new("somebody has paused it while its memory was copied"));
        }
        let timeline = self.timeline.insert(Timeline::start(Place::Source));
        for _ in 0..PAUSES {
            hv.pause(dom)?;
        }
        timeline.mark("pause");
        let before = hv.gt_state(dom)?;
        self.paused_at_ns = u64::try_from(before.host_now_ns).unwrap_or(0);
        self.freeze = Some(Freeze { watchdogs: before.watchdogs.clone(), paused_at_ns: self.paused_at_ns });
        if !before.watchdogs.is_empty() {
            self.write_journal(SourceRecord::Freeze)?;
            let disarmed = hypervisor::GtState { watchdogs: Vec::new(), ..before.clone() };
            hv.set_gt_state(dom, GtStep::Watchdogs, &disarmed)?;
        }
        self.still_whole()?;
        self.look_at_size()?;
        if self.resized {
            return Err(Trouble::new("its memory changed in size just before the pause")
                .todo("try again when its balloon rests"));
        }
        self.mark("read clocks, disarm watchdogs");
        self.host.toolstack.freeze(&self.guest).doing("freeze the store and console")?;
        self.mark("freeze the store and console");
        self.host.toolstack.detach(&self.guest).doing("drain the backends")?;
        self.mark("drain the backends");

        let mut bitmap = self.bitmap()?;
        hv.log_dirty_clean(dom, &mut bitmap, true)?;
        bitmap.union(&self.precopy.left_over);
        let mut state = capture::state(&*hv, dom, before.guest_now_ns(), self.paused_at_ns)?;
        state.gt.watchdogs = before.watchdogs;
        capture::unmarked_pages(&state.params, &state.gt).into_iter().for_each(|gfn| {
            bitmap.insert(gfn);
        });
        let last = self.last_pages(&bitmap)?;
        self.mark("capture the hypervisor's state");
        if let Some(why) =
            self.precopy.too_late(self.timeline.as_ref().map(Timeline::elapsed).unwrap_or_default(), last.len() as u64)
        {
            self.ending = Ending::GivenUp;
            return Err(Trouble::new(why));
        }
        self.precopy.begin_round();
        self.send_pages(&last)?;
        self.precopy.end_round(0);
        self.mark("send the last pages");
        let luggage = self.host.toolstack.pack(&self.guest).doing("read the guest's part of the store")?;
        self.mark("export the store");
        image::write_tail(&mut self.encoder, &state, &luggage);
        self.state = Some(state);
        self.flush()
    }

    /// Nothing but its own vCPUs and watchdogs can shut the guest down, and they stand still now. One that shut down while its memory was
    /// copied must stay: its toolstack is about to start it anew here, and on the other host it would go on as if it had not.
    fn still_whole(&self) -> Result<()> {
        let info = self.host.hypervisor.domain_info(self.dom())?;
        if info.uuid != self.guest.identity.uuid || info.dying {
            return Err(Trouble::new("it has been destroyed while its memory was copied"));
        }
        match info.shutdown {
            Some(reason) => Err(Trouble::new(format!("it shut down while its memory was copied (reason {reason})"))),
            None => Ok(()),
        }
    }

    /// The dirty pages that are memory, and every page that is known on one side only.
    fn last_pages(&mut self, bitmap: &DirtyBitmap) -> Result<Vec<Gfn>> {
        let dirty: Vec<Gfn> = bitmap.iter().collect();
        let mut pages = BTreeSet::new();
        for batch in dirty.chunks(BATCH) {
            let types = self.host.hypervisor.page_types(self.dom(), batch)?;
            pages.extend(
                batch
                    .iter()
                    .zip(types)
                    .filter(|(gfn, kind)| *kind == PageType::Ram || self.known.contains(gfn))
                    .map(|(gfn, _)| *gfn),
            );
        }
        if self.host.hypervisor.domain_info(self.dom())?.total_pages != self.offer.shell.total_pages {
            // It has ballooned: find what came and went.
            let now: BTreeSet<Gfn> = self.host.hypervisor.ram_gfns(self.dom())?.into_iter().collect();
            pages.extend(now.symmetric_difference(&self.known));
        }
        Ok(pages.into_iter().collect())
    }

    fn mark(&mut self, step: &str) {
        if let Some(timeline) = &mut self.timeline {
            timeline.mark(step);
        }
    }

    // ---- the two ways out ----

    /// Whatever was done is undone; all of it can be done again.
    fn roll_back(&mut self) -> Result<()> {
        let hv = self.host.hypervisor.clone();
        let dom = self.dom();
        if let Err(error) = hv.log_dirty_disable(dom) {
            // Off already, or the guest is gone.
            tracing::debug!("{}: {error}", self.title());
        }
        let Some(freeze) = &self.freeze else { return Ok(()) };
        match hv.domain_info(dom) {
            Ok(info) if info.uuid == self.guest.identity.uuid && !info.dying => {}
            // Nothing is left to bring back: the host has been restarted, or an operator has destroyed it.
            Ok(_) => return Ok(()),
            Err(error) if error.is_no_such_domain() => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        self.host.toolstack.unfreeze(&self.guest).doing("connect the backends again")?;
        if !freeze.watchdogs.is_empty() {
            let gt = hypervisor::GtState { watchdogs: freeze.watchdogs.clone(), ..hv.gt_state(dom)? };
            hv.set_gt_state(dom, GtStep::Watchdogs, &gt)?;
        }
        for _ in 0..PAUSES {
            if !hv.domain_info(dom)?.paused {
                break;
            }
            hv.unpause(dom)?;
        }
        self.mark("roll back");
        self.freeze = None;
        Ok(())
    }

    fn destroy(&mut self) -> Result<()> {
        let dom = self.dom();
        match self.host.hypervisor.domain_info(dom) {
            Ok(info) if info.uuid == self.guest.identity.uuid => self.host.hypervisor.destroy(dom)?,
            // If this is done again after a restart of the host, the number may be another guest's, and so are the nodes and devices
            // of that number.
            Ok(info) => {
                tracing::warn!("{}: its domid is that of {} now; nothing is removed", self.title(), info.uuid);
                return Ok(());
            }
            Err(error) if error.is_no_such_domain() => {}
            Err(error) => return Err(error.into()),
        }
        self.host.toolstack.forget(&self.guest).doing("remove its nodes and devices")
    }

    // ---- telling ----

    fn progress(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn set_phase(&self) {
        let phase = match self.machine.state() {
            SourceState::Offering => Phase::Preflight,
            SourceState::Copying => Phase::Precopy,
            SourceState::Freezing | SourceState::AwaitingReady => Phase::Blackout,
            SourceState::Committed => Phase::Committed,
            SourceState::RollingBack => Phase::RollingBack,
            SourceState::Leaving => Phase::Leaving,
            SourceState::RolledBack | SourceState::Left | SourceState::Closed(_) => Phase::Done,
        };
        self.progress(|p| p.phase = phase);
    }

    fn report(&mut self, outcome: Outcome) {
        let moved = outcome == Outcome::Moved;
        let ending = match self.ending {
            _ if self.recovered => Ending::Recovered,
            _ if moved => Ending::Moved,
            ending => ending,
        };
        let steps = self.timeline.as_ref().map(|t| t.steps().to_vec()).unwrap_or_default();
        let report = Report {
            id: self.id,
            domid: self.dom().0,
            name: self.guest.identity.name.clone(),
            peer: self.peer.clone(),
            moved,
            error: (!moved).then(|| self.why.clone().unwrap_or_else(|| "the daemon was stopped meanwhile".into())),
            ending,
            warnings: self.warnings.clone(),
            rounds: self.precopy.rounds().to_vec(),
            bytes: self.precopy.total_bytes(),
            total_ms: millis(self.started.elapsed()),
            blackout_us: self.timeline.as_ref().map_or(0, Timeline::total_micros),
            steps,
        };
        tracing::info!(id = %self.id, "{}: {ending:?}, blackout {} µs", self.title(), report.blackout_us);
        *self.shared.report.lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
    }
}

fn is_zero(page: &[u8]) -> bool {
    // By 128 bytes at a time the compiler makes it a few wide instructions.
    page.chunks(128).all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}

/// `journal-go`, `send-offer`, `precopy`: as points of planted faults and in docs/handshake.md.
pub fn action_name(action: SourceAction) -> String {
    match action {
        SourceAction::Journal(record) => format!("journal-{}", kebab(&format!("{record:?}"))),
        SourceAction::Send(word) => format!("send-{}", kebab(&format!("{word:?}"))),
        SourceAction::Precopy => "precopy".into(),
        SourceAction::Freeze => "freeze".into(),
        SourceAction::RollBack => "roll-back".into(),
        SourceAction::Destroy => "destroy".into(),
        SourceAction::Deny(_) => "deny".into(),
        SourceAction::Report(_) => "report".into(),
    }
}

/// `RolledBack` → `rolled-back`.
pub(crate) fn kebab(camel: &str) -> String {
    let mut out = String::new();
    for c in camel.chars() {
        if c.is_ascii_uppercase() && !out.is_empty() {
            out.push('-');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}
