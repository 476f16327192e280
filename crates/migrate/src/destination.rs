//! The destination of migrations: carries out what [`handshake::Destination`](crate::handshake::Destination) asks for, one thread for
//! each migration, and hands what comes over connections to them.

use crate::guest::{Grants, GuestState, Offer};
use crate::handshake::{
    Denied, Destination, DestinationAction, DestinationEvent, DestinationRecord, DestinationState, ToDestination,
    ToSource,
};
use crate::host::{Fault, Host};
use crate::image::{Pages, Reader};
use crate::journal::{Journal, RecordKind, Role};
use crate::link::{Link, Sender};
use crate::placement;
use crate::preflight;
use crate::report::{Place, Timeline};
use crate::restore::{self, Away, PAUSES};
use crate::source::{GoDetails, StepsDetails, WhyDetails, kebab};
use crate::toolstack::Luggage;
use crate::trouble::{Doing, Result, Trouble};
use crate::wire::{Digest, Frame, Piece, Said};
use hypervisor::{DomId, Gfn, GtPortKind, PAGE_SIZE};
use serde::{Deserialize, Serialize};
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

/// Zero pages written at a time, and what is written.
const ZERO_PAGES: usize = 256;
static ZEROES: [u8; ZERO_PAGES * PAGE_SIZE] = [0; ZERO_PAGES * PAGE_SIZE];

/// So many times nothing was heard, and a refused migration is forgotten.
const FORGET_AFTER: u32 = 600;

/// What the journal's `Begin` and `Refused` hold.
#[derive(Debug, Serialize, Deserialize)]
struct Begin {
    offer: Offer,
    /// The domain under the offer's domid is this migration's shell.
    shell_is_ours: bool,
}

/// What the journal's `Ready` holds: all that is needed from then on.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    state: GuestState,
    luggage: Luggage,
    /// Should `Go` never be heard, but the source be fenced.
    away: Away,
}

#[derive(Debug)]
enum Input {
    Word(Sender, Said<ToDestination>),
    Stream(Sender, Piece),
    Lost(Sender),
    Operator(bool, mpsc::Sender<std::result::Result<(), Denied>>),
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
        let last = match journal.last() {
            None | Some(DestinationRecord::Closed) => return Ok(journal.delete()?),
            Some(last) => last,
        };
        let (machine, actions) = Destination::recover(last);
        let read = |what: DestinationRecord| journal.payload(what).unwrap_or_default();
        let begin: Begin = serde_json::from_slice(read(DestinationRecord::Begin))
            .doing(format!("journal {}: read its first record", journal.path().display()))?;
        let mut run = Run::new(&self.host, journal.id(), machine, actions);
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
        self.spawn(run);
        Ok(())
    }

    fn spawn(&self, mut run: Run) -> SyncSender<Input> {
        let id = run.id;
        let entry = (run.input_tx.clone(), run.incoming.clone());
        let tx = run.input_tx.clone();
        run.crashed = self.crashed.clone();
        self.running.lock().unwrap_or_else(PoisonError::into_inner).insert(id, entry);
        let running = self.running.clone();
        let name = format!("into-{}", self.host.name);
        let spawned = std::thread::Builder::new().name(name).spawn(move || {
            run.run();
            running.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        });
        if let Err(error) = spawned {
            tracing::error!("no thread for an incoming migration: {error}");
        }
        tx
    }

    pub fn list(&self) -> Vec<Incoming> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.values().map(|(_, incoming)| incoming.lock().unwrap_or_else(PoisonError::into_inner).clone()).collect()
    }

    /// The operator decides a migration that waits for its source.
    pub fn resolve(&self, id: Uuid, peer_fenced: bool) -> std::result::Result<(), Denied> {
        let tx = self.running.lock().unwrap_or_else(PoisonError::into_inner).get(&id).map(|(tx, _)| tx.clone());
        let (answer, answered) = mpsc::channel();
        let tx = tx.ok_or(Denied::NothingToResolve)?;
        tx.send(Input::Operator(peer_fenced, answer)).map_err(|_| Denied::NothingToResolve)?;
        answered.recv().unwrap_or(Err(Denied::NothingToResolve))
    }

    /// Serves one connection until it ends.
    pub fn serve(&self, link: Link) {
        let (sender, mut receiver) = match link.greet() {
            Ok(halves) => halves,
            Err(error) => {
                tracing::warn!("a connection was refused: {error}");
                return;
            }
        };
        // The migration whose image this connection carries, and those it has talked about.
        let mut image: Option<SyncSender<Input>> = None;
        let mut known: Vec<SyncSender<Input>> = Vec::new();
        let ended = loop {
            if self.crashed.load(Ordering::SeqCst) {
                break "crash, as planted".into();
            }
            match receiver.receive() {
                Ok(_) | Err(_) if self.crashed.load(Ordering::SeqCst) => {}
                Ok(Some(Frame::Ping(number))) => {
                    if let Err(error) = sender.send(&Frame::Pong(number)) {
                        break error.to_string();
                    }
                }
                Ok(Some(Frame::Pong(_))) => {}
                Ok(Some(Frame::Stream(piece))) => match &image {
                    Some(tx) if tx.send(Input::Stream(sender.clone(), piece)).is_ok() => {}
                    _ => break "memory without an offer that was accepted".into(),
                },
                Ok(Some(Frame::ToDestination(said))) => {
                    let is_offer = said.word == ToDestination::Offer;
                    let Some(tx) = self.dispatch(&sender, said) else { continue };
                    if is_offer {
                        image = Some(tx.clone());
                    }
                    known.push(tx);
                    // A connection is about one migration; a peer that goes through ids keeps no memory here.
                    if known.len() > 4 {
                        known.remove(0);
                    }
                }
                Ok(Some(Frame::ToSource(_))) => break "it said something that only a destination says".into(),
                Ok(None) => break "closed by the source".into(),
                Err(error) => break error.to_string(),
            }
        };
        tracing::info!("a connection has ended: {ended}");
        sender.close();
        for tx in known {
            let _ = tx.send(Input::Lost(sender.clone()));
        }
    }

    /// Hands a word to its migration, or answers it here if there is none.
    fn dispatch(&self, sender: &Sender, said: Said<ToDestination>) -> Option<SyncSender<Input>> {
        let found = {
            let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            running.get(&said.id).map(|(tx, _)| tx.clone()).ok_or(running.len())
        };
        let tx = match found {
            Ok(tx) => tx,
            Err(count) if said.word == ToDestination::Offer && count < self.host.max_incoming => {
                self.spawn(Run::new(&self.host, said.id, Destination::unknown(), Vec::new()))
            }
            Err(_) => {
                self.answer_unknown(sender, said);
                return None;
            }
        };
        tx.send(Input::Word(sender.clone(), said)).ok()?;
        Some(tx)
    }

    fn answer_unknown(&self, sender: &Sender, said: Said<ToDestination>) {
        let (word, why) = if said.word == ToDestination::Offer {
            (ToSource::Refuse, "as many guests as are allowed are coming in already; try again later")
        } else {
            let actions = Destination::unknown().on(DestinationEvent::Peer(said.word));
            let Some(DestinationAction::Send(word)) = actions.into_iter().next() else { return };
            (word, "this host knows nothing of this migration, so it will never run here")
        };
        let details =
            serde_json::to_value(WhyDetails { why: vec![why.into()], warnings: Vec::new() }).unwrap_or_default();
        if let Err(error) = sender.send(&Frame::ToSource(Said { id: said.id, word, details })) {
            tracing::info!("answer about an unknown migration: {error}");
        }
    }
}

struct Crashed;

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

    fn take(&mut self, input: Input) {
        match input {
            Input::Word(link, said) => {
                self.link = Some(link);
                self.word(said);
            }
            Input::Stream(link, piece) => {
                let present = self.link.as_ref().is_some_and(|l| l.is(&link));
                if present
                    && self.machine.state() == DestinationState::Receiving
                    && let Err(error) = self.receive(piece)
                {
                    self.fail("receive memory", error);
                }
            }
            Input::Lost(link) => {
                if self.link.as_ref().is_some_and(|l| l.is(&link)) {
                    self.link = None;
                    self.why.push("the connection was lost".into());
                    self.hear(DestinationEvent::LinkLost);
                }
            }
            Input::Operator(peer_fenced, answer) => {
                let actions = self.machine.on(DestinationEvent::Resolve { peer_fenced });
                let denied = actions.iter().find_map(|a| match a {
                    DestinationAction::Deny(denied) => Some(*denied),
                    _ => None,
                });
                self.todo.extend(actions);
                let _ = answer.send(denied.map_or(Ok(()), Err));
            }
        }
    }

    fn word(&mut self, said: Said<ToDestination>) {
        let state = self.machine.state();
        match (said.word, state) {
            (ToDestination::Offer, DestinationState::Unknown) => {
                match serde_json::from_value::<Offer>(said.details.clone()) {
                    Ok(offer) => {
                        self.see(&offer);
                        self.offer = Some(offer);
                    }
                    Err(error) => {
                        self.why.push(format!("the offer can't be read: {error}"));
                        self.say(ToSource::Refuse);
                        return;
                    }
                }
            }
            (ToDestination::Final, DestinationState::Receiving) => self.timeline = Timeline::start(Place::Destination),
            (ToDestination::Go, DestinationState::Ready) => self.timeline = Timeline::start(Place::Destination),
            (ToDestination::Abort, _) => {
                let details: WhyDetails = serde_json::from_value(said.details).unwrap_or_default();
                self.why.push(format!("the source ended it: {}", details.why.join("; ")));
                self.hear(DestinationEvent::Peer(said.word));
                return;
            }
            _ => {
                self.hear(DestinationEvent::Peer(said.word));
                return;
            }
        }
        if matches!(said.word, ToDestination::Final | ToDestination::Go) {
            // A wrong figure would show in the guest's clocks only.
            let details: GoDetails = match serde_json::from_value(said.details) {
                Ok(details) => details,
                Err(error) => return self.fail("read how long the guest has been away", error.into()),
            };
            match self.host.hypervisor.now() {
                Ok(now) => self.away = Away { away_ns: details.away_ns, at_host_ns: now },
                Err(error) => return self.fail("read the host's time", error.into()),
            }
        }
        self.hear(DestinationEvent::Peer(said.word));
    }

    fn fail(&mut self, what: &str, error: Trouble) {
        tracing::warn!("{}: {what}: {error}", self.title());
        self.why.push(format!("{what}: {error}"));
        self.hear(DestinationEvent::Failed);
    }

    // ---- actions ----

    fn act(&mut self, action: DestinationAction) -> std::result::Result<(), Crashed> {
        let name = action_name(action);
        if self.fault(&format!("destination.before.{name}"))? {
            let fault = Trouble::new("planted fault");
            match action {
                DestinationAction::Journal(record) => self.journal_failed(record, fault),
                DestinationAction::Send(_) => self.lose_link(),
                DestinationAction::Prepare | DestinationAction::Restore | DestinationAction::Connect => {
                    self.fail(&name, fault);
                }
                // These are tried until they succeed.
                _ => self.todo.push_front(action),
            }
            return Ok(());
        }
        let event = match action {
            DestinationAction::Journal(record) => {
                if let Err(error) = self.write_journal(record) {
                    self.journal_failed(record, error);
                }
                None
            }
            DestinationAction::Send(word) => {
                self.say(word);
                None
            }
            DestinationAction::Prepare => Some(self.prepare()),
            DestinationAction::Restore => self.stage("restore", Self::restore, DestinationEvent::Restored),
            DestinationAction::Connect => self.stage("connect", Self::connect, DestinationEvent::Connected),
            DestinationAction::Start => self.stubborn("start the guest", Self::start, DestinationEvent::Started),
            DestinationAction::Discard => self.stubborn("remove the shell", Self::discard, DestinationEvent::Discarded),
            DestinationAction::Deny(_) => None,
        };
        self.fault(&format!("destination.after.{name}"))?;
        if let Some(event) = event {
            self.hear(event);
        }
        Ok(())
    }

    fn fault(&mut self, point: &str) -> std::result::Result<bool, Crashed> {
        match self.host.faults.at(point) {
            None => Ok(false),
            Some(Fault::Crash) => Err(Crashed),
            Some(Fault::Fail) => Ok(true),
            Some(Fault::Cut) => {
                self.lose_link();
                Ok(false)
            }
        }
    }

    fn lose_link(&mut self) {
        if let Some(link) = self.link.take() {
            link.close();
        }
        self.hear(DestinationEvent::LinkLost);
    }

    fn stage(
        &mut self,
        name: &str,
        work: fn(&mut Self) -> Result<()>,
        done: DestinationEvent,
    ) -> Option<DestinationEvent> {
        match work(self) {
            Ok(()) => Some(done),
            Err(error) => {
                self.fail(name, error);
                None
            }
        }
    }

    fn stubborn(
        &mut self,
        name: &str,
        work: fn(&mut Self) -> Result<()>,
        done: DestinationEvent,
    ) -> Option<DestinationEvent> {
        loop {
            match work(self) {
                Ok(()) => {
                    self.show(|i| i.waiting_for = None);
                    return Some(done);
                }
                Err(error) => {
                    tracing::error!("{}: {name}: {error}; trying again", self.title());
                    self.show(|i| i.waiting_for = Some(format!("{name}: {error}")));
                    std::thread::sleep(self.host.timeouts.reconnect);
                }
            }
        }
    }

    fn begin(&self) -> Result<Vec<u8>> {
        let offer = self.offer.clone().ok_or_else(|| Trouble::new("there is no offer"))?;
        Ok(serde_json::to_vec(&Begin { offer, shell_is_ours: self.shell_is_ours })?)
    }

    fn write_journal(&mut self, record: DestinationRecord) -> Result<()> {
        let payload = match record {
            DestinationRecord::Begin => self.begin()?,
            DestinationRecord::Ready => {
                let (state, luggage) = self.restored.as_ref().ok_or_else(|| Trouble::new("nothing was restored"))?;
                // What has been put into the domain already is there as long as the domain is.
                let state = GuestState { grants: Grants::default(), shared_info: None, ..state.clone() };
                serde_json::to_vec(&Kept { state, luggage: luggage.clone(), away: self.away })?
            }
            DestinationRecord::Accepted => serde_json::to_vec(&self.away)?,
            DestinationRecord::Refused => self.why.join("; ").into_bytes(),
            _ => Vec::new(),
        };
        self.append(record, &payload)?;
        match record {
            DestinationRecord::Ready => self.timeline.mark("write what was restored to disk"),
            DestinationRecord::Accepted => self.timeline.mark("write the commit to disk"),
            DestinationRecord::Starting => self.timeline.mark("write the start to disk"),
            _ => {}
        }
        Ok(())
    }

    fn append(&mut self, record: DestinationRecord, payload: &[u8]) -> Result<()> {
        if self.journal.is_none() {
            // `Closed` for an offer that was refused at once needs no file.
            if record == DestinationRecord::Closed {
                return Ok(());
            }
            self.journal = Some(Journal::create(&self.host.journals, self.id)?);
        }
        match &mut self.journal {
            Some(journal) => Ok(journal.append(record, payload)?),
            None => Ok(()),
        }
    }

    /// Nothing may follow a record that is not on disk.
    fn journal_failed(&mut self, record: DestinationRecord, error: Trouble) {
        tracing::error!("{}: {error}", self.title());
        self.why.push(format!("write the journal: {error}"));
        match record {
            // Not started, so it may still be refused; without a record an unknown id is refused too.
            DestinationRecord::Begin
            | DestinationRecord::Ready
            | DestinationRecord::Accepted
            | DestinationRecord::Starting => {
                self.todo.clear();
                let (machine, actions) = Destination::recover(DestinationRecord::Begin);
                self.machine = machine;
                self.todo.extend(actions.into_iter().filter(|a| !matches!(a, DestinationAction::Journal(_))));
            }
            DestinationRecord::Refused | DestinationRecord::Running | DestinationRecord::Closed => {}
        }
    }

    fn say(&mut self, word: ToSource) {
        let details = match word {
            ToSource::Accept | ToSource::Refuse | ToSource::Returned => {
                serde_json::to_value(WhyDetails { why: self.why.clone(), warnings: self.warnings.clone() })
            }
            ToSource::Ready | ToSource::Running => {
                let digest = self.digest.value();
                let blackout_us = self.blackout_ns / 1000;
                serde_json::to_value(StepsDetails { steps: self.timeline.steps().to_vec(), digest, blackout_us })
            }
            ToSource::Bye => Ok(serde_json::Value::Null),
        };
        let said = Said { id: self.id, word, details: details.unwrap_or_default() };
        let Some(link) = &self.link else { return };
        if let Err(error) = link.send(&Frame::ToSource(said)) {
            tracing::warn!("{}: say {word:?}: {error}", self.title());
            self.lose_link();
        }
    }

    fn prepare(&mut self) -> DestinationEvent {
        match self.try_prepare() {
            Ok(None) => DestinationEvent::Prepared,
            Ok(Some(why)) => {
                self.why = why;
                DestinationEvent::Unfit
            }
            Err(error) => {
                tracing::warn!("{}: prepare: {error}", self.title());
                self.why.push(format!("prepare: {error}"));
                DestinationEvent::Failed
            }
        }
    }

    fn try_prepare(&mut self) -> Result<Option<Vec<String>>> {
        let offer = self.offer.clone().ok_or_else(|| Trouble::new("there is no offer"))?;
        let why = preflight::destination(&self.host, &offer)?;
        let plan = placement::plan(&self.host, &offer).doing("see where it may run here")?;
        self.warnings = preflight::remarks(&self.host.hypervisor.host_info()?, &offer);
        self.warnings.extend(plan.warnings.iter().cloned());
        if !why.is_empty() || offer.dry_run {
            return Ok(Some(why));
        }
        let dom = offer.identity.domid;
        // From here on the domain under this id is ours to destroy: the preflight has seen that there was none.
        self.shell_is_ours = true;
        let begin = self.begin()?;
        self.append(DestinationRecord::Begin, &begin)?;
        if let Err(error) = restore::make_shell(&*self.host.hypervisor, dom, &offer.shell, plan.pool) {
            // Somebody else was quicker.
            if let Ok(info) = self.host.hypervisor.domain_info(dom)
                && info.uuid != offer.identity.uuid
            {
                self.shell_is_ours = false;
            }
            return Err(error);
        }
        self.warnings.extend(placement::apply(&*self.host.hypervisor, dom, &plan));
        self.populated = crate::guest::gfns(&offer.shell.ram).collect();
        self.host.toolstack.prepare(&offer).doing("make its nodes and devices")?;
        Ok(None)
    }

    fn receive(&mut self, piece: Piece) -> Result<()> {
        self.digest.add(piece.crc, piece.bytes.len());
        let hv = self.host.hypervisor.clone();
        let dom = self.offer.as_ref().map(|o| o.identity.domid).ok_or_else(|| Trouble::new("there is no offer"))?;
        let populated = &mut self.populated;
        self.reader.feed(piece.bytes, |pages| write_pages(&*hv, dom, populated, pages))
    }

    fn restore(&mut self) -> Result<()> {
        let hv = self.host.hypervisor.clone();
        let offer = self.offer.clone().ok_or_else(|| Trouble::new("there is no offer"))?;
        let dom = offer.identity.domid;
        let (state, luggage) = std::mem::take(&mut self.reader).finish(&offer.identity)?;
        // Memory that was offered and never sent: the guest gave it up during the copying.
        self.timeline.mark("check the image");
        restore::platform(&*hv, dom, &state).doing("set event channels, grant table and parameters")?;
        self.timeline.mark("set event channels, grant table and parameters");
        restore::processors(&*hv, dom, &state).doing("set the vCPUs")?;
        self.timeline.mark("set the vCPUs");
        self.host.toolstack.unpack(&offer, &luggage).doing("import the store")?;
        self.timeline.mark("import the store");
        self.restored = Some((state, luggage));
        Ok(())
    }

    fn connect(&mut self) -> Result<()> {
        let hv = self.host.hypervisor.clone();
        let offer = self.offer.clone().ok_or_else(|| Trouble::new("there is no offer"))?;
        let dom = offer.identity.domid;
        let Some((state, luggage)) = &self.restored else { return Err(Trouble::new("nothing was restored")) };
        // Its number may be another guest's since this host was restarted, whose devices and clocks are not ours to touch.
        match hv.domain_info(dom) {
            Ok(info) if info.uuid == offer.identity.uuid && info.paused && !info.dying => {}
            Ok(info) if info.uuid == offer.identity.uuid => {
                return Err(Trouble::new("the shell that waited for it has been unpaused or destroyed meanwhile"));
            }
            Ok(_) => return Err(Trouble::new(format!("domid {dom} belongs to another guest here now"))),
            Err(error) if error.is_no_such_domain() => {
                return Err(Trouble::new(
                    "the shell with its memory is gone; this host has been restarted, or somebody destroyed it",
                ));
            }
            Err(error) => return Err(error.into()),
        }
        self.host.toolstack.go(&offer, luggage).doing("connect the backends")?;
        self.timeline.mark("connect backends, store and console");
        for port in &state.gt.ports {
            // Events that the backend sent into the void while it was away; one too many is allowed. Within the guest none was lost.
            if matches!(port.kind, GtPortKind::Interdomain { remote, .. } | GtPortKind::Unbound { remote } if remote != dom)
                && let Err(error) = hv.raise_guest_port(dom, port.port)
            {
                tracing::debug!("{}: raise port {}: {error}", self.title(), port.port);
            }
        }
        self.timeline.mark("raise the guest's ports");
        restore::clocks(&*hv, dom, state, self.away).doing("set the clocks")?;
        self.timeline.mark("set the clocks");
        Ok(())
    }

    fn start(&mut self) -> Result<()> {
        let hv = self.host.hypervisor.clone();
        let offer = self.offer.clone().ok_or_else(|| Trouble::new("there is no offer"))?;
        let dom = offer.identity.domid;
        let gt = self.restored.as_ref().map(|(state, _)| state.gt.clone()).unwrap_or_default();
        match hv.domain_info(dom) {
            Ok(info) if info.uuid == offer.identity.uuid => {
                if info.paused {
                    restore::watchdogs(&*hv, dom, &gt)?;
                }
                for _ in 0..PAUSES {
                    if hv.domain_info(dom)?.paused {
                        // The last of these counts: from then on the guest may run.
                        self.blackout_ns = self.away.at(hv.now()?);
                        hv.unpause(dom)?;
                    }
                }
                self.timeline.mark("unpause");
            }
            // It was started before this host was restarted, or has ended since: there is nothing to start any more.
            Ok(_) => return Ok(()),
            Err(error) if error.is_no_such_domain() => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        if let Err(error) = self.host.toolstack.announce(&offer) {
            tracing::warn!("{}: announce: {error}", self.title());
        }
        Ok(())
    }

    fn discard(&mut self) -> Result<()> {
        let Some(offer) = self.offer.clone() else { return Ok(()) };
        if !self.shell_is_ours {
            return Ok(());
        }
        let hv = &*self.host.hypervisor;
        let dom = offer.identity.domid;
        let there = match hv.domain_info(dom) {
            Ok(info) if info.uuid == offer.identity.uuid => true,
            // This host was restarted, and the number is another guest's now: so are nodes and devices of that number.
            Ok(info) => {
                tracing::warn!("{}: domid {dom} is that of {} now; nothing is removed", self.title(), info.uuid);
                return Ok(());
            }
            Err(error) if error.is_no_such_domain() => false,
            Err(error) => return Err(error.into()),
        };
        self.host.toolstack.discard(&offer).doing("remove its nodes and devices")?;
        if there {
            hv.destroy(dom)?;
        }
        Ok(())
    }
}

/// Puts pages into the shell; memory that the guest has got meanwhile is made, what it has given up is taken.
fn write_pages(
    hv: &dyn hypervisor::Hypervisor,
    dom: DomId,
    populated: &mut BTreeSet<Gfn>,
    pages: Pages<'_>,
) -> Result<()> {
    let there = pages.with_data.iter().chain(&pages.zero).copied();
    let new: Vec<Gfn> = there.filter(|gfn| !populated.contains(gfn)).collect();
    if !new.is_empty() {
        hv.populate(dom, &new, 0).doing("make room for memory that the guest got meanwhile")?;
        populated.extend(new);
    }
    write(hv, dom, &pages.with_data, pages.data)?;
    for gfns in pages.zero.chunks(ZERO_PAGES) {
        write(hv, dom, gfns, &ZEROES[..gfns.len() * PAGE_SIZE])?;
    }
    let gone: Vec<Gfn> = pages.gone.into_iter().filter(|gfn| populated.remove(gfn)).collect();
    if !gone.is_empty() {
        hv.depopulate(dom, &gone)?;
    }
    Ok(())
}

fn write(hv: &dyn hypervisor::Hypervisor, dom: DomId, gfns: &[Gfn], data: &[u8]) -> Result<()> {
    if gfns.is_empty() {
        return Ok(());
    }
    for (gfn, written) in gfns.iter().zip(hv.write_pages(dom, gfns, data)?) {
        written.map_err(|errno| Trouble::new(format!("write page {gfn}: {errno}")))?;
    }
    Ok(())
}

/// As points of planted faults and in docs/handshake.md.
pub fn action_name(action: DestinationAction) -> String {
    match action {
        DestinationAction::Journal(record) => format!("journal-{}", kebab(&format!("{record:?}"))),
        DestinationAction::Send(word) => format!("send-{}", kebab(&format!("{word:?}"))),
        DestinationAction::Prepare => "prepare".into(),
        DestinationAction::Restore => "restore".into(),
        DestinationAction::Connect => "connect".into(),
        DestinationAction::Start => "start".into(),
        DestinationAction::Discard => "discard".into(),
        DestinationAction::Deny(_) => "deny".into(),
    }
}

/// Which journals of a folder are whose.
pub fn role_of(path: &std::path::Path) -> Option<Role> {
    let extension = path.extension()?.to_str()?;
    [crate::handshake::SourceRecord::ROLE, DestinationRecord::ROLE].into_iter().find(|r| r.extension() == extension)
}
