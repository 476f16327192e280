//! The destination of migrations: carries out what [`handshake::Destination`](crate::handshake::Destination) asks for, one thread for
//! each migration, and hands what comes over connections to them.

mod acting;
mod connections;
mod records;
mod restoring;
mod starting;
mod talking;

pub use acting::action_name;

use crate::command::{self, Command, NotDone};
use crate::guest::{GuestState, Offer};
use crate::handshake::{
    Denied, Destination, DestinationAction, DestinationEvent, DestinationRecord, DestinationState, ToDestination,
};
use crate::host::Host;
use crate::image::Reader;
use crate::journal::{Journal, RecordKind, Role};
use crate::link::Sender;
use crate::own_fault;
use crate::report::{Place, Timeline};
use crate::restore::Away;
use crate::toolstack::Luggage;
use crate::trouble::{Doing, Result, Trouble};
use crate::wire::{Digest, Piece, Said};
use hypervisor::{DomId, Gfn};
use records::{Begin, Kept};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use uuid::Uuid;

/// Frames that wait for a migration's thread; a connection that brings more is not read from meanwhile.
const QUEUE: usize = 16;
/// How long an incoming migration that nobody talks to keeps its thread.
const IDLE: Duration = Duration::from_secs(1);

/// So many times nothing was heard, and a refused migration is forgotten.
const FORGET_AFTER: u32 = 600;

#[derive(Debug)]
enum Input {
    Word(Sender, Said<ToDestination>),
    Stream(Sender, Piece),
    Lost(Sender),
    /// The source is fenced, or not.
    Operator(Command<bool>),
}

/// An incoming migration, for whoever watches.
#[derive(Debug, Clone)]
pub struct Incoming {
    pub id: Uuid,
    pub domid: DomId,
    pub name: String,
    pub from: String,
    pub state: DestinationState,
    pub pages: u64,
    pub waiting_for: Option<String>,
}

/// What the daemon holds of a migration's thread.
type Entry = (SyncSender<Input>, Arc<Mutex<Incoming>>);

/// All migrations that come to this host.
#[derive(Debug, Clone)]
pub struct Destinations {
    host: Host,
    /// A planted fault has ended this daemon.
    crashed: Arc<AtomicBool>,
    running: Arc<Mutex<HashMap<Uuid, Entry>>>,
}

impl Destinations {
    pub fn new(host: Host) -> Self {
        Destinations { host, crashed: Arc::default(), running: Arc::default() }
    }

    /// Goes on with the migration that a journal tells of, after the daemon was started again.
    pub fn recover(&self, journal: Journal<DestinationRecord>) -> Result<()> {
        if let Some(run) = recovered(&self.host, journal)? {
            self.spawn(run);
        }
        Ok(())
    }

    fn spawn(&self, mut run: Run) {
        let id = run.id;
        let entry = (run.input_tx.clone(), run.incoming.clone());
        run.crashed = self.crashed.clone();
        self.running.lock().unwrap_or_else(PoisonError::into_inner).insert(id, entry);
        let running = self.running.clone();
        let name = format!("into-{}", self.host.name);
        let spawned = std::thread::Builder::new().name(name).spawn(move || {
            run.run_whatever_happens();
            running.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        });
        if let Err(error) = spawned {
            tracing::error!("no thread for an incoming migration: {error}");
        }
    }

    pub fn list(&self) -> Vec<Incoming> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.values().map(|(_, incoming)| incoming.lock().unwrap_or_else(PoisonError::into_inner).clone()).collect()
    }

    /// The operator decides a migration that waits for its source.
    pub fn resolve(&self, id: Uuid, peer_fenced: bool) -> std::result::Result<(), NotDone> {
        let entry = self.running.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        let (tx, incoming) = entry.ok_or(Denied::NothingToResolve)?;
        let look = || {
            let incoming = incoming.lock().unwrap_or_else(PoisonError::into_inner);
            (incoming.state, incoming.waiting_for.clone())
        };
        let (command, answer) = Command::without_peer(peer_fenced);
        match tx.try_send(Input::Operator(command)) {
            Ok(()) => answer.wait(look),
            Err(mpsc::TrySendError::Full(_)) => Err(command::busy(look())),
            Err(mpsc::TrySendError::Disconnected(_)) => Err(Denied::NothingToResolve.into()),
        }
    }
}

/// `None`: nothing is left to do.
fn recovered(host: &Host, journal: Journal<DestinationRecord>) -> Result<Option<Run>> {
    let last = match journal.last() {
        None | Some(DestinationRecord::Closed) => {
            journal.delete()?;
            return Ok(None);
        }
        Some(last) => last,
    };
    let (machine, actions) = Destination::recover(last);
    let read = |what: DestinationRecord| journal.payload(what).unwrap_or_default();
    let begin: Begin = serde_json::from_slice(read(DestinationRecord::Begin))
        .doing(format!("journal {}: read its first record", journal.path().display()))?;
    let mut run = Run::new(host, journal.id(), machine, actions);
    run.see(&begin.offer);
    run.shell_is_ours = begin.shell_is_ours;
    run.offer = Some(begin.offer);
    if let Some(payload) = journal.payload(DestinationRecord::Ready) {
        let kept: Kept = serde_json::from_slice(payload)
            .doing(format!("journal {}: read what was restored", journal.path().display()))?;
        run.away = kept.away;
        run.restored = Some((kept.state, kept.luggage));
    }
    if let Some(away) = journal.payload(DestinationRecord::Accepted).and_then(|p| serde_json::from_slice(p).ok()) {
        run.away = away;
    }
    run.journal = Some(journal);
    Ok(Some(run))
}

struct Run {
    host: Host,
    id: Uuid,
    crashed: Arc<AtomicBool>,
    machine: Destination,
    todo: VecDeque<DestinationAction>,
    journal: Option<Journal<DestinationRecord>>,
    incoming: Arc<Mutex<Incoming>>,
    input: mpsc::Receiver<Input>,
    input_tx: SyncSender<Input>,
    link: Option<Sender>,
    offer: Option<Offer>,
    shell_is_ours: bool,
    reader: Reader,
    digest: Digest,
    populated: BTreeSet<Gfn>,
    restored: Option<(GuestState, Luggage)>,
    away: Away,
    /// From the pause to the unpause, once it runs.
    blackout_ns: u64,
    /// It sent packets until the pause.
    talks: bool,
    /// From the unpause to the first packet of its vifs.
    first_packet: Option<Duration>,
    timeline: Timeline,
    why: Vec<String>,
    warnings: Vec<String>,
}

impl Run {
    fn new(host: &Host, id: Uuid, machine: Destination, actions: Vec<DestinationAction>) -> Run {
        let (input_tx, input) = mpsc::sync_channel(QUEUE);
        let incoming = Incoming {
            id,
            domid: DomId(0),
            name: String::new(),
            from: String::new(),
            state: machine.state(),
            pages: 0,
            waiting_for: None,
        };
        Run {
            host: host.clone(),
            id,
            crashed: Arc::default(),
            machine,
            todo: actions.into(),
            journal: None,
            incoming: Arc::new(Mutex::new(incoming)),
            input,
            input_tx,
            link: None,
            offer: None,
            shell_is_ours: false,
            reader: Reader::default(),
            digest: Digest::default(),
            populated: BTreeSet::new(),
            restored: None,
            away: Away::default(),
            blackout_ns: 0,
            talks: false,
            first_packet: None,
            timeline: Timeline::start(Place::Destination),
            why: Vec::new(),
            warnings: Vec::new(),
        }
    }

    fn title(&self) -> String {
        match &self.offer {
            Some(offer) => format!("domain {} ({}) from {}", offer.identity.name, offer.identity.domid, offer.host),
            None => format!("migration {}", self.id),
        }
    }

    fn see(&self, offer: &Offer) {
        self.show(|i| {
            i.domid = offer.identity.domid;
            i.name = offer.identity.name.clone();
            i.from = offer.host.clone();
        });
    }

    fn show(&self, change: impl FnOnce(&mut Incoming)) {
        change(&mut self.incoming.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// After a panic it goes on from the journal, as after a restart of the daemon.
    fn run_whatever_happens(mut self) {
        let mut again = false;
        while let Err(what) = own_fault::caught(|| self.run()) {
            let why = own_fault::explained(&what);
            tracing::error!("{}: {why}; going on from its journal", self.title());
            // The source comes again and asks.
            if let Some(link) = self.link.take() {
                link.close();
            }
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
                    let Run { crashed, incoming, input, input_tx, .. } = self;
                    self = Run { crashed, incoming, input, input_tx, why: vec![why], ..next };
                }
                Ok(None) => return,
                Err(error) => return tracing::error!("{}: {error}", self.title()),
            }
        }
    }

    fn run(&mut self) {
        // The first word makes it known; a journal has made it so before.
        let mut heard = self.journal.is_some();
        let mut quiet = 0;
        loop {
            self.show(|i| {
                i.state = self.machine.state();
                i.pages = self.reader.pages();
            });
            match self.todo.pop_front() {
                Some(action) => {
                    if self.act(action).is_err() {
                        tracing::error!("{}: crash, as planted", self.title());
                        self.crashed.store(true, Ordering::SeqCst);
                        if let Some(link) = &self.link {
                            link.close();
                        }
                        return;
                    }
                }
                None if heard && self.machine.state() == DestinationState::Unknown => break,
                None => match self.input.recv_timeout(IDLE) {
                    Ok(input) => {
                        (heard, quiet) = (true, 0);
                        self.take(input);
                    }
                    Err(_) if !heard => break,
                    // An id that is unknown is refused just the same.
                    Err(_) if self.machine.state() == DestinationState::Refused && quiet >= FORGET_AFTER => break,
                    Err(_) => quiet += 1,
                },
            }
        }
        if let Some(journal) = self.journal.take()
            && let Err(error) = journal.delete()
        {
            tracing::warn!("{}: {error}", self.title());
        }
    }

    fn hear(&mut self, event: DestinationEvent) {
        let before = self.machine.state();
        let actions = self.machine.on(event);
        if self.machine.state() != before {
            tracing::info!(id = %self.id, "{}: {before:?} → {:?} on {event:?}", self.title(), self.machine.state());
        }
        self.todo.extend(actions);
    }
}

/// Which journals of a folder are whose.
pub fn role_of(path: &std::path::Path) -> Option<Role> {
    let extension = path.extension()?.to_str()?;
    [crate::handshake::SourceRecord::ROLE, DestinationRecord::ROLE].into_iter().find(|r| r.extension() == extension)
}
