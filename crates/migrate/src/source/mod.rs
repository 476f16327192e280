//! The source of one migration: carries out what [`handshake::Source`](crate::handshake::Source) asks for.

mod acting;
mod blackout;
mod copying;
mod handle;
mod leaving;
mod offering;
mod records;
mod talking;
mod telling;

pub use acting::action_name;
pub(crate) use acting::kebab;
pub use handle::Handle;
pub use offering::{ask, judge};

use crate::command::Command;
use crate::dirty_log::DirtyLog;
use crate::guest::{GuestState, Offer};
use crate::handshake::{Outcome, Source, SourceAction, SourceEvent, SourceRecord, SourceState};
use crate::host::{Crashed, Host};
use crate::journal::Journal;
use crate::link::{Fuse, Sender};
use crate::own_fault;
use crate::precopy::{Limits, Precopy};
use crate::recording::Recording;
use crate::report::{Ending, Silence, Step, Timeline};
use crate::silence::Ear;
use crate::toolstack::Description;
use crate::trouble::{Doing, Result, Trouble};
use crate::wire::{Digest, Frame};
use handle::Shared;
use hypervisor::{DomId, Gfn};
use migration_stream::Encoder;
use records::{Begin, Freeze};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::mpsc;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Pages read, and sent in one record.
const BATCH: usize = 1024;
/// So many times everything is sent once more because the guest's memory has changed in size.
const MAX_RESIZES: u32 = 5;
/// Time between two pings while waiting.
const PING_EVERY: Duration = Duration::from_secs(2);

/// And at least so long at a time.
const LEAST_PAUSE: Duration = Duration::from_millis(1);

/// A word without an answer is said again after so many times the pause between two connections.
const REPEAT_AFTER: u32 = 5;

/// What an operator asks for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    pub domid: DomId,
    /// The destination's address.
    pub peer: String,
    pub limits: Limits,
    /// A file that is made for the image, as it is sent.
    #[serde(default)]
    pub record: Option<PathBuf>,
}

/// What the source says with `Go`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GoDetails {
    /// From the pause to this word, half the round trip included.
    pub away_ns: u64,
    /// Packets came from its vifs shortly before the pause, so that they may be waited for after the unpause.
    #[serde(default)]
    pub talks: bool,
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
    /// With `Running`: from the unpause to the first packet of the guest's vifs, if one came.
    #[serde(default)]
    pub first_packet_us: Option<u64>,
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
    Operator(Command<SourceEvent>),
}

/// Starts a migration in a thread of its own.
pub fn start(host: &Host, request: Request) -> Result<Handle> {
    let (offer, guest, why) = judge(host, request.domid, &request.limits)?;
    if !why.is_empty() {
        return Err(Trouble::new(why.join("; ")));
    }
    let recording = request.record.as_deref().map(Recording::create).transpose()?;
    let id = Uuid::new_v4();
    let (machine, actions) = Source::begin();
    let mut run = Run::new(host, id, request.peer, request.limits, offer, guest, machine, actions);
    run.recording = recording;
    Ok(spawn(host, run))
}

/// Pages a second that the guest writes to, by what it does in so long. There is a journal meanwhile: a daemon that is killed at it must
/// switch the log of its writes off when it is started again, and so it does for a migration that has only begun.
pub fn dirty_rate(host: &Host, peer: String, offer: Offer, watch: Duration) -> Result<u64> {
    let (dom, ram) = (offer.identity.domid, offer.shell.ram.clone());
    let mut journal = Journal::create(&host.journals, Uuid::new_v4())?;
    let rate = journal
        .append(SourceRecord::Begin, &serde_json::to_vec(&Begin { peer, offer })?)
        .map_err(Trouble::from)
        .and_then(|()| DirtyLog::rate(&*host.hypervisor, dom, &ram, &|| host.toolstack.alone(dom), watch));
    journal.delete()?;
    rate
}

/// Goes on with the migration that a journal tells of, after the daemon was started again.
pub fn recover(host: &Host, journal: Journal<SourceRecord>) -> Result<Option<Handle>> {
    Ok(recovered(host, journal)?.map(|run| spawn(host, run)))
}

/// `None`: nothing is left to do.
fn recovered(host: &Host, journal: Journal<SourceRecord>) -> Result<Option<Run>> {
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
    run.dirty_log = DirtyLog::left_over();
    run.connected = true;
    run.journal = Some(journal);
    Ok(Some(run))
}

fn spawn(host: &Host, run: Run) -> Handle {
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
    let spawned = std::thread::Builder::new().name(name).spawn(move || run.run_whatever_happens());
    if let Err(error) = spawned {
        tracing::error!("no thread for a migration: {error}");
    }
    handle
}

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
    /// It was unpaused by the roll-back, which may not be over yet.
    runs_again: bool,
    shared: Arc<Shared>,
    input: mpsc::Receiver<Input>,
    input_tx: mpsc::Sender<Input>,
    link: Option<Sender>,
    /// From the pause until the last word before `Ready` is written.
    fuse: Option<Fuse>,
    /// A connection was there once.
    connected: bool,
    last_heard: Instant,
    last_ping: Instant,
    last_said: Instant,
    pings: VecDeque<(u64, Instant)>,
    round_trip: Option<Duration>,
    waiting_since: Instant,
    encoder: Encoder,
    recording: Option<Recording>,
    digest: Digest,
    precopy: Precopy,
    dirty_log: DirtyLog,
    /// gfns that were sent with contents or as zero, and are there.
    known: BTreeSet<Gfn>,
    /// How much memory it had at the last look, and whether that was another amount than at the one before.
    size: u64,
    resized: bool,
    state: Option<GuestState>,
    timeline: Option<Timeline>,
    ear: Option<Ear>,
    /// How long nothing came from its vifs before the pause.
    silent_before: Option<Duration>,
    silence: Option<Silence>,
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
            runs_again: false,
            shared: Arc::default(),
            input,
            input_tx,
            link: None,
            fuse: None,
            connected: false,
            last_heard: now,
            last_ping: now,
            last_said: now,
            pings: VecDeque::new(),
            round_trip: None,
            waiting_since: now,
            encoder: Encoder::new(),
            recording: None,
            digest: Digest::default(),
            precopy: Precopy::default(),
            dirty_log: DirtyLog::default(),
            known: BTreeSet::new(),
            size,
            resized: false,
            state: None,
            timeline: None,
            ear: None,
            silent_before: None,
            silence: None,
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

    /// After a panic it goes on from the journal, as after a restart of the daemon.
    fn run_whatever_happens(mut self) {
        let mut again = false;
        while let Err(what) = own_fault::caught(|| self.run()) {
            let why = own_fault::explained(&what);
            tracing::error!("{}: {why}; going on from its journal", self.title());
            self.drop_link();
            self.why = Some(why);
            let host = self.host.clone();
            if std::mem::replace(&mut again, true) {
                // The same over and over: not too fast.
                std::thread::sleep(host.timeouts.reconnect);
            }
            let journal = self.journal.take().map(|journal| Journal::open(journal.path())).transpose();
            match journal
                .map_err(Trouble::from)
                .map(Option::flatten)
                .and_then(|j| Ok(j.map(|j| recovered(&host, j)).transpose()?.flatten()))
            {
                Ok(Some(next)) => {
                    let Run { shared, input, input_tx, timeline, started, why, .. } = self;
                    self = Run { shared, input, input_tx, timeline, started, why, ..next };
                }
                Ok(None) => return self.end_without_journal(),
                Err(error) => {
                    tracing::error!("{}: {error}", self.title());
                    self.why = self.why.map(|why| format!("{why}; and its journal can't be gone on with: {error}"));
                    return self.report_once();
                }
            }
        }
    }

    /// Nothing was begun that is not over.
    fn end_without_journal(&mut self) {
        self.report_once();
        *self.shared.state.lock().unwrap_or_else(PoisonError::into_inner) = Some(SourceState::Closed(Outcome::Stayed));
    }

    fn report_once(&mut self) {
        if self.shared.report.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            self.report(Outcome::Stayed);
        }
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
                let before = self.machine.state();
                if let Some(event) = self.wait() {
                    self.hear(event);
                }
                if self.todo.is_empty()
                    && self.machine.state() == before
                    && let Some(event) = self.tick()
                {
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
}
