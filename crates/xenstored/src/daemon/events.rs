//! The loop.

use super::busy::{Look, Recent, Step};
use super::devices::Devices;
use super::journal::{self, BOOT_ID, Contents, Journal, Loaded};
use super::kill_point::may_die_here;
use super::log::Log;
use super::machine::Machine;
use super::{process, run_dir, socket_path};
use crate::conn::{ByConn, ConnId, Peer};
use crate::host::Host;
use crate::live_update::Plan;
use crate::redo::{Moved, RingStep};
use crate::store::{Options, Store};
use anyhow::{Context, bail};
use rustix::event::epoll;
use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::net::{RecvFlags, SendFlags};
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use tracing::{debug, error, info, warn};
use xenstore_wire::ring;

/// What is read from a socket at once, in bytes. Bounds how long one client keeps the others waiting.
const READ_SIZE: usize = 16 << 10;
/// Requests of one domain served before the others get their turn.
const RING_BUDGET: usize = 16;
/// A socket client that leaves so many messages unread is not listened to until it reads.
const MAX_UNREAD: usize = 20_000;
/// How long those who asked just now are asked before epoll is, which knows of everybody, in nanoseconds; a round is finished.
const ASK_NS: u64 = 500_000;
/// Bytes offered to a socket in one write.
const WRITE_SIZE: usize = 64 << 10;

const SEND: SendFlags = SendFlags::NOSIGNAL.union(SendFlags::DONTWAIT);

/// How often a domain that lives is connected anew after a kill, and how long between, in milliseconds.
const RECONNECT_TRIES: u32 = 10;
const RECONNECT_MS: u64 = 20;
/// How long until a journal is tried again for which there was no room, in milliseconds.
const RETRY_JOURNAL_MS: u64 = 10_000;

const TOKEN_LISTEN: u64 = 0;
const TOKEN_EVENTS: u64 = 1;
const TOKEN_SIGNAL: u64 = 2;
const TOKEN_CLIENT: u64 = 1 << 32;

/// What is always watched for on a client's socket. Only news: one that was read empty is not looked at a second time.
const CLIENT_FLAGS: epoll::EventFlags = epoll::EventFlags::ET.union(epoll::EventFlags::RDHUP);
/// The other side is gone, or sends nothing any more.
const CLIENT_ENDS: epoll::EventFlags =
    epoll::EventFlags::RDHUP.union(epoll::EventFlags::HUP).union(epoll::EventFlags::ERR);

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    /// Read and not yet given to the store.
    unread: Vec<u8>,
    /// What epoll watches for, if it watches it at all.
    flags: epoll::EventFlags,
    /// False: one of those who asked just now, and are asked without epoll.
    watched: bool,
}

/// What came of asking a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Nothing,
    Served,
    Gone,
}

/// Readable once SIGHUP came.
#[derive(Debug)]
struct Hangup {
    stream: UnixStream,
    handler: signal_hook::SigId,
}

impl Hangup {
    fn new() -> std::io::Result<Hangup> {
        let (stream, sender) = UnixStream::pair()?;
        stream.set_nonblocking(true)?;
        let handler = signal_hook::low_level::pipe::register(libc::SIGHUP, sender)?;
        Ok(Hangup { stream, handler })
    }
}

impl Drop for Hangup {
    fn drop(&mut self) {
        signal_hook::low_level::unregister(self.handler);
    }
}

/// Where the state journal is.
#[derive(Debug, Clone)]
pub struct JournalPlace {
    /// The folder.
    pub dir: PathBuf,
    /// Whether there is to be one. One that is there goes otherwise: it would say what was.
    pub on: bool,
}

impl JournalPlace {
    fn file(&self) -> PathBuf {
        self.dir.join("journal")
    }
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    pub(super) store: Store,
    machine: Machine,
    listener: UnixListener,
    clients: ByConn<Client>,
    epoll: OwnedFd,
    hangup: Hangup,
    /// For what is sent.
    buf: Vec<u8>,
    /// For what is read from sockets; as long as that may be.
    read_buf: Vec<u8>,
    place: JournalPlace,
    boot: [u8; BOOT_ID],
    /// `None`: there is to be none, or there is no room.
    journal: Option<Journal>,
    /// When to try again to make one, in milliseconds.
    pub(super) retry_journal: Option<u64>,
    /// When something that had to wait for time to pass may go on. It is kept from round to round: others may keep the loop busy all
    /// the time.
    due: Option<u64>,
    /// What goes into the journal next.
    batch: Vec<u8>,
    /// What the next daemon is started with at a live update.
    words: Vec<OsString>,
    /// Domains that had their turn while what came up was sent. Kept for its room only.
    served: Vec<u16>,
    recent: Recent,
    look: Look,
    /// Something was done since the last sleep.
    active: bool,
}

impl Daemon {
    /// Starts: with the store that a killed daemon left in its journal, or afresh; with dom0's ring if there is Xen; with a
    /// new socket.
    ///
    /// # Errors
    /// The journal can't be used, the socket can't be made, or this is no dom0.
    pub fn start(
        options: Options,
        log: Log,
        xen: Option<Box<dyn Devices>>,
        place: JournalPlace,
    ) -> anyhow::Result<Daemon> {
        Daemon::start_at(options, log, xen, place, &socket_path())
    }

    /// The same with another socket.
    pub(super) fn start_at(
        options: Options,
        log: Log,
        xen: Option<Box<dyn Devices>>,
        place: JournalPlace,
        socket: &Path,
    ) -> anyhow::Result<Daemon> {
        let boot = journal::boot_id().context("/proc/sys/kernel/random/boot_id")?;
        let with_xen = xen.is_some();
        let mut machine = Machine::new(xen, log);
        let file = place.file();
        let left = if place.on {
            let advice = "it can't be used; remove it to start with an empty store (running guests will have to be \
                          shut down or restarted then)";
            let why = || format!("state journal {}: {advice}", file.display());
            match journal::load(&file, &boot).with_context(why)? {
                Loaded::State(c) => Some((come_back(options.clone(), &c, &mut machine).with_context(why)?, c)),
                Loaded::Nothing(Some(why)) => {
                    info!("state journal {} is ignored: {why}", file.display());
                    None
                }
                Loaded::Nothing(None) => None,
            }
        } else {
            match std::fs::remove_file(&file) {
                Err(e) if e.kind() != ErrorKind::NotFound => {
                    return Err(anyhow::Error::from(e).context(format!("remove the old journal {}", file.display())));
                }
                _ => None,
            }
        };
        let back = left.is_some();
        let (mut store, contents) = match left {
            Some((store, c)) => (store, Some(c)),
            None => (Store::new(options), None),
        };
        if with_xen && store.domain_connection(0).is_none() {
            let port = machine.connect_dom0().context("dom0's own ring")?;
            store.introduce_dom0(port, machine.now_ms());
        }
        let listener = listen(socket).with_context(|| format!("socket {}", socket.display()))?;
        let mut d = Daemon::assemble(store, machine, listener, place, boot)?;
        // In its place, and only now let go of the old one.
        d.start_journal();
        drop(contents);
        if back {
            d.store.check_domains(&mut d.machine);
            d.machine.notify_all();
            info!(domains = d.store.connected_domains().count(), "came back from {}", file.display());
        }
        Ok(d)
    }

    /// Takes over from the daemon before, in this same process. `open` makes the devices out of the event channel
    /// device that it left open.
    ///
    /// # Errors
    /// There is no state, or it can't be restored.
    pub fn take_over(
        options: Options,
        log: Log,
        place: JournalPlace,
        open: impl FnOnce(OwnedFd) -> anyhow::Result<Box<dyn Devices>>,
    ) -> anyhow::Result<Daemon> {
        let path = state_path();
        let stream =
            std::fs::read(&path).with_context(|| format!("state of the daemon before us, {}", path.display()))?;
        let (mut store, restored, mut machine) = Store::restore(options, &stream, |r| {
            let xen = if r.evtchn_fd >= 0 {
                let events = inherit(r.evtchn_fd).map_err(|e| format!("event channel device: {e}"))?;
                Some(open(events).map_err(|e| format!("{e:#}"))?)
            } else {
                None
            };
            Ok(Machine::new(xen, log))
        })
        .with_context(|| format!("{}", path.display()))?;
        let listener = UnixListener::from(inherit(restored.socket_fd).context("the listening socket")?);
        listener.set_nonblocking(true)?;
        store.check_domains(&mut machine);
        let boot = journal::boot_id().context("/proc/sys/kernel/random/boot_id")?;
        let mut d = Daemon::assemble(store, machine, listener, place, boot)?;
        for (id, fd) in restored.sockets {
            let stream = UnixStream::from(inherit(fd).with_context(|| format!("socket {fd} of a client"))?);
            d.add_client(id, stream)?;
        }
        // Its place is taken: a second take-over from it must fail.
        std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        d.start_journal();
        info!(connections = d.clients.len(), domains = d.store.connected_domains().count(), "took over");
        Ok(d)
    }

    /// The words of a command line that the next daemon is started with at a live update, if whoever asks for it gives none.
    #[must_use]
    pub fn handing_on(self, words: Vec<OsString>) -> Daemon {
        Daemon { words, ..self }
    }

    fn assemble(
        store: Store,
        machine: Machine,
        listener: UnixListener,
        place: JournalPlace,
        boot: [u8; BOOT_ID],
    ) -> anyhow::Result<Daemon> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let add =
            |fd: BorrowedFd<'_>, token| epoll::add(&epoll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN);
        add(listener.as_fd(), TOKEN_LISTEN)?;
        if let Some(x) = &machine.xen {
            add(x.events(), TOKEN_EVENTS)?;
        }
        let hangup = Hangup::new()?;
        add(hangup.stream.as_fd(), TOKEN_SIGNAL)?;
        Ok(Daemon {
            store,
            machine,
            listener,
            clients: ByConn::default(),
            epoll,
            hangup,
            buf: Vec::new(),
            read_buf: vec![0; READ_SIZE],
            place,
            boot,
            journal: None,
            retry_journal: None,
            due: None,
            batch: Vec::new(),
            words: Vec::new(),
            served: Vec::new(),
            recent: Recent::default(),
            look: Look::default(),
            active: false,
        })
    }

    // ---- the journal ----

    /// Begins a journal with the store as it is, if there is to be one.
    fn start_journal(&mut self) {
        if !self.place.on {
            return;
        }
        self.retry_journal = None;
        // They went on while there was none.
        for d in self.store.connected_domains().map(|d| d.0).collect::<Vec<_>>() {
            if let Some(ring) = self.machine.ring(d) {
                self.store.note_ring(d, ring.requests_at(), ring.replies_at());
            }
        }
        let file = self.place.file();
        let made = self
            .store
            .snapshot()
            .map_err(anyhow::Error::from)
            .and_then(|(snapshot, first)| Ok(Journal::create(&file, self.boot, &snapshot, &[&first], false)?));
        match made {
            Ok(j) => self.journal = Some(j),
            Err(e) => self.lose_journal(&e),
        }
    }

    /// Goes on without one, and tries again later.
    pub(super) fn lose_journal(&mut self, e: &anyhow::Error) {
        let file = self.place.file();
        error!("state journal {}: {e:#}; a killed daemon loses the store until there is one again", file.display());
        if let Some(j) = self.journal.take() {
            // It says what was. Marked first, as that takes no room.
            j.hand_over(true);
            let _ = std::fs::remove_file(&file);
        }
        self.store.keep_changes(false);
        self.retry_journal = Some(self.machine.now_ms() + RETRY_JOURNAL_MS);
    }

    /// Writes what changed to the journal; then shows it to the rings: nobody sees anything of a change that the journal
    /// does not have.
    fn commit(&mut self, step: Option<&RingStep>) {
        let mut batch = std::mem::take(&mut self.batch);
        let mut wrote = false;
        if let Some(j) = &mut self.journal
            && self.store.take_changes(step, &mut batch)
        {
            may_die_here();
            wrote = true;
            if !j.append(&batch)
                && let Err(e) = self.compact(step)
            {
                self.lose_journal(&e);
            }
        }
        self.batch = batch;
        self.machine.do_resets();
        if let Some(s) = step
            && let Some(ring) = self.machine.ring(s.domid)
        {
            may_die_here();
            // In this order: one who has read a reply may take it that the request is gone from the ring.
            if s.requests.from != s.requests.to {
                ring.consume(s.requests.to);
                may_die_here();
            }
            if s.replies.from != s.replies.to {
                ring.publish(s.replies.to);
                may_die_here();
            }
        }
        if wrote && let Some(j) = &mut self.journal {
            j.published();
        }
    }

    /// Begins the journal anew: it is full.
    pub(super) fn compact(&mut self, step: Option<&RingStep>) -> anyhow::Result<()> {
        let Some(j) = &mut self.journal else { return Ok(()) };
        let (snapshot, first) = self.store.snapshot()?;
        let last = crate::recover::last_step(step, &self.machine.resets());
        if last.is_empty() {
            j.replace(&snapshot, &[&first], false)?;
        } else {
            j.replace(&snapshot, &[&first, &last], true)?;
        }
        debug!(bytes = j.size(), "state journal begun anew");
        Ok(())
    }

    /// Serves for ever.
    ///
    /// # Errors
    /// epoll fails, or the event channel device does.
    pub fn run(mut self) -> anyhow::Result<()> {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(256);
        loop {
            self.turn(&mut events, true)?;
        }
    }

    /// Serves what there is, once; waits for something first if it may.
    pub(super) fn turn(&mut self, events: &mut Vec<epoll::Event>, may_wait: bool) -> anyhow::Result<()> {
        if self.retry_journal.is_some_and(|at| self.machine.now_ms() >= at) {
            self.start_journal();
        }
        self.store.run_delayed(&mut self.machine);
        self.serve_woken();
        let mut next = self.store.timers(&mut self.machine);
        if let Some(at) = self.retry_journal {
            let ms = at.saturating_sub(self.machine.now_ms()) + 1;
            next = Some(next.map_or(ms, |n| n.min(ms)));
        }
        self.serve_woken();
        // After the timers were asked: one that waits for its rate has one running, or need not wait any more.
        for d in std::mem::take(&mut self.machine.stalled) {
            let Some(id) = self.store.domain_connection(d) else { continue };
            if self.store.wants(id, self.machine.now_ms()) > 0 {
                self.machine.ready.insert(d);
            } else {
                self.machine.stalled.insert(d);
            }
        }
        self.commit(None);
        let now = self.machine.now_ms();
        self.due = self.due.into_iter().chain(next.map(|ms| now + ms)).min();
        let asked = may_wait && self.ask_recent();
        let idle = self.machine.ready.is_empty() && may_wait && !asked;
        let mut sleeps = idle && !self.look.again(self.active, || self.machine.now_ns(), process::times_preempted);
        if sleeps {
            let mut recent = std::mem::take(&mut self.recent);
            recent.watch_all(|id, _| {
                let there = self.watch_again(id);
                // Something may follow from its end.
                sleeps &= there;
                there
            });
            self.recent = recent;
        }
        let wait = if sleeps { self.due.map(|due| due.saturating_sub(now)) } else { Some(0) };
        let wait = wait
            .map(|ms| rustix::event::Timespec { tv_sec: (ms / 1000) as i64, tv_nsec: (ms % 1000 * 1_000_000) as i64 });
        events.clear();
        let raised = match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(events), wait.as_ref()) {
            Ok(raised) => raised,
            Err(Errno::INTR) => return Ok(()),
            Err(e) => bail!("epoll: {e}"),
        };
        if asked || raised > 0 {
            self.look.found();
        }
        self.active = asked || raised > 0 || (self.active && !sleeps);
        // A turn that may not wait stands for the time that it would have waited.
        let waited = !may_wait && raised == 0;
        if waited || self.due.is_some_and(|due| due <= self.machine.now_ms()) {
            self.due = None;
            self.machine.ready.extend(self.store.connected_domains().map(|d| d.0));
        }
        for e in events.iter() {
            let flags = e.flags;
            match e.data.u64() {
                TOKEN_LISTEN => self.accept(),
                TOKEN_EVENTS => self.ports_raised()?,
                TOKEN_SIGNAL => {
                    let mut b = [0; 64];
                    while matches!((&self.hangup.stream).read(&mut b), Ok(n) if n > 0) {}
                    if let Err(e) = self.machine.log.reopen() {
                        warn!("the log file can't be opened again: {e}");
                    }
                }
                t => {
                    let id = (t - TOKEN_CLIENT) as ConnId;
                    if flags.intersects(epoll::EventFlags::OUT) {
                        self.flush(id);
                    }
                    let ends = flags.intersects(CLIENT_ENDS);
                    if (ends || flags.intersects(epoll::EventFlags::IN))
                        && self.client_readable(id, ends) == Asked::Served
                    {
                        self.recent.add(id);
                    }
                }
            }
        }
        for d in std::mem::take(&mut self.machine.ready) {
            self.serve_ring(d);
        }
        self.serve_woken();
        if let Some(plan) = self.store.live_update_due(&mut self.machine) {
            self.hand_over(&plan);
        }
        Ok(())
    }

    // ---- sockets ----

    fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    let id = self.store.add_socket();
                    if let Err(e) = self.add_client(id, stream) {
                        warn!("a client can't be served: {e}");
                        self.store.close(id, &mut self.machine);
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) => {
                    warn!("accept: {e}");
                    return;
                }
            }
        }
    }

    fn add_client(&mut self, id: ConnId, stream: UnixStream) -> std::io::Result<()> {
        stream.set_nonblocking(true)?;
        let flags = CLIENT_FLAGS | epoll::EventFlags::IN;
        epoll::add(&self.epoll, &stream, epoll::EventData::new_u64(TOKEN_CLIENT + u64::from(id)), flags)?;
        self.clients.insert(id, Client { stream, unread: Vec::new(), flags, watched: true });
        Ok(())
    }

    fn drop_client(&mut self, id: ConnId) {
        if let Some(c) = self.clients.remove(&id) {
            let _ = epoll::delete(&self.epoll, &c.stream);
        }
        self.store.close(id, &mut self.machine);
    }

    /// Asks those who asked for something just now, again and again while they have something and nobody else is known to have.
    /// Whether anything happened: then the daemon must not sleep before it has seen to what follows from it.
    pub(super) fn ask_recent(&mut self) -> bool {
        let (mut any, end) = (false, self.machine.now_ns() + ASK_NS);
        loop {
            let had = self.ask_each_recent(&mut any);
            if had == 0 || self.recent.is_full() || !self.machine.ready.is_empty() || self.machine.now_ns() > end {
                return any;
            }
            self.serve_woken();
        }
    }

    /// The same once. How many had something, and `any` if something happened.
    pub(super) fn ask_each_recent(&mut self, any: &mut bool) -> usize {
        let mut recent = std::mem::take(&mut self.recent);
        let had = recent.ask_all(|id, step| match step {
            Step::Ask => {
                let asked = self.client_readable(id, false);
                *any |= asked != Asked::Nothing;
                asked == Asked::Served
            }
            Step::Unwatch => self.unwatch(id),
            Step::Watch => {
                let there = self.watch_again(id);
                *any |= !there;
                there
            }
        });
        self.recent = recent;
        had
    }

    /// `ends`: what is read now may be followed by the end, of which there will be no more news.
    fn client_readable(&mut self, id: ConnId, ends: bool) -> Asked {
        let Some(c) = self.clients.get_mut(&id) else { return Asked::Nothing };
        let (mut more, waiting) = (false, c.unread.len());
        if waiting == 0 {
            more = ends;
            let mut buf = std::mem::take(&mut self.read_buf);
            let n = match rustix::net::recv(&c.stream, &mut buf[..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => None,
                Ok((_, n)) => Some(n),
                Err(Errno::AGAIN) if !ends => {
                    self.read_buf = buf;
                    return Asked::Nothing;
                }
                Err(Errno::AGAIN) => Some(0),
                Err(Errno::INTR) => {
                    more = true;
                    Some(0)
                }
                Err(_) => None,
            };
            // Less than was asked for: the socket is empty.
            more |= n == Some(buf.len());
            let done = n.map(|n| self.feed(id, &buf[..n]));
            self.read_buf = buf;
            match done {
                None | Some(Err(())) => {
                    self.drop_client(id);
                    return Asked::Gone;
                }
                Some(Ok(())) => {}
            }
        } else {
            let bytes = std::mem::take(&mut c.unread);
            if self.feed(id, &bytes).is_err() {
                self.drop_client(id);
                return Asked::Gone;
            }
        }
        if waiting == 0 && !more && self.is_all_sent(id) {
            return Asked::Served;
        }
        // At once: what it asked for is there, and nothing has to be watched for then.
        let wrote = self.flush(id);
        if more {
            // Asking again makes it news again, once the others had their turn.
            self.tell_epoll(id);
        }
        match self.clients.get(&id) {
            None => Asked::Gone,
            // One that reads no replies is not busy, whatever it asked for.
            Some(c) if waiting == 0 || wrote || c.unread.len() < waiting => Asked::Served,
            Some(_) => Asked::Nothing,
        }
    }

    /// Whether a client has nothing to wait for, and epoll watches it for requests.
    fn is_all_sent(&self, id: ConnId) -> bool {
        let idle = self
            .clients
            .get(&id)
            .is_some_and(|c| c.unread.is_empty() && c.flags == CLIENT_FLAGS | epoll::EventFlags::IN);
        idle && self.store.connection(id).is_some_and(|c| c.out.is_empty())
    }

    /// Has epoll watch a client for what its flags say, and tell at once what is there already.
    fn tell_epoll(&mut self, id: ConnId) {
        if let Some(c) = self.clients.get_mut(&id) {
            let data = epoll::EventData::new_u64(TOKEN_CLIENT + u64::from(id));
            let told = if c.watched {
                epoll::modify(&self.epoll, &c.stream, data, c.flags)
            } else {
                epoll::add(&self.epoll, &c.stream, data, c.flags)
            };
            c.watched |= told.is_ok();
            if let Err(e) = told {
                // The kernel is out of memory, or of what one user may have watched. It can connect again; unwatched it would wait for ever.
                warn!(conn = id, "epoll: {e}: connection dropped");
                self.drop_client(id);
            }
        }
    }

    /// Has epoll say nothing of a client, as it is asked without. Whether that can be: one for which something else is watched for stays.
    fn unwatch(&mut self, id: ConnId) -> bool {
        if !self.is_all_sent(id) {
            return false;
        }
        let Some(c) = self.clients.get_mut(&id) else { return false };
        c.watched = c.watched && epoll::delete(&self.epoll, &c.stream).is_err();
        !c.watched
    }

    /// How many clients epoll watches.
    #[cfg(test)]
    pub(super) fn watched(&self) -> usize {
        self.clients.values().filter(|c| c.watched).count()
    }

    /// Has it sleep without a longer look as soon as there is nothing to do.
    #[cfg(test)]
    pub(super) fn tire(&mut self) {
        self.active = false;
    }

    /// Ends that, unless it ended already. Whether the client is there.
    fn watch_again(&mut self, id: ConnId) -> bool {
        if self.clients.get(&id).is_some_and(|c| !c.watched) {
            self.tell_epoll(id);
        }
        self.clients.contains_key(&id)
    }

    /// Gives bytes to the store as far as it takes them; the rest is kept.
    fn feed(&mut self, id: ConnId, mut bytes: &[u8]) -> Result<(), ()> {
        while !bytes.is_empty() && self.store.direct_len() < WRITE_SIZE {
            let Some(n) = self.store.input_directly(id, bytes, &mut self.machine) else { break };
            bytes = &bytes[n..];
        }
        // What came in is served though nobody may be left to hear of it.
        let sent = self.send_directly(id);
        // What depends on the time is for domains.
        let now = 0;
        while !bytes.is_empty() {
            let full = self.store.connection(id).is_none_or(|c| c.out.len() > MAX_UNREAD);
            if full || self.store.wants(id, now) == 0 {
                break;
            }
            match self.store.input(id, bytes, &mut self.machine) {
                Ok(n) => bytes = &bytes[n..],
                Err(_) => return Err(()),
            }
        }
        if let Some(c) = self.clients.get_mut(&id) {
            c.unread.extend_from_slice(bytes);
        }
        sent
    }

    /// Sends what waits for a client. Whether anything went out, or the client is gone.
    fn flush(&mut self, id: ConnId) -> bool {
        let mut any = false;
        loop {
            self.store.unwake(id);
            let wrote = match self.write_out(id) {
                Ok(wrote) => wrote,
                Err(()) => {
                    self.drop_client(id);
                    return true;
                }
            };
            any |= wrote;
            // What waited for room in the queue can go on.
            let Some(c) = self.clients.get_mut(&id) else { return true };
            if !wrote || c.unread.is_empty() {
                break;
            }
            let bytes = std::mem::take(&mut c.unread);
            if self.feed(id, &bytes).is_err() {
                self.drop_client(id);
                return true;
            }
        }
        self.watch_client(id);
        any
    }

    /// Writes as much as the socket takes. Whether it took anything.
    fn write_out(&mut self, id: ConnId) -> Result<bool, ()> {
        let mut buf = std::mem::take(&mut self.buf);
        let mut done = Ok(false);
        loop {
            self.store.output(id, WRITE_SIZE, &mut buf);
            if buf.is_empty() {
                break;
            }
            // What was done is written down before anybody hears that it was.
            self.commit(None);
            let Some(c) = self.clients.get(&id) else { break };
            match rustix::net::send(&c.stream, &buf, SEND) {
                Ok(n) => {
                    self.store.wrote(id, n);
                    done = Ok(true);
                    if n == buf.len() && n < WRITE_SIZE {
                        break;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    done = Err(());
                    break;
                }
            }
        }
        self.buf = buf;
        done
    }

    /// Sends the replies that go the short way.
    fn send_directly(&mut self, id: ConnId) -> Result<(), ()> {
        if self.store.direct_len() == 0 {
            return Ok(());
        }
        let mut buf = std::mem::take(&mut self.buf);
        self.store.take_direct(&mut buf);
        // What was done is written down before anybody hears that it was.
        self.commit(None);
        let sent = match self.clients.get(&id) {
            None => Err(Errno::PIPE),
            Some(c) => loop {
                match rustix::net::send(&c.stream, &buf, SEND) {
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => break Ok(0),
                    r => break r,
                }
            },
        };
        if let Ok(n) = sent
            && n < buf.len()
        {
            self.store.queue_direct(id, &buf, n);
        }
        self.buf = buf;
        sent.map(drop).map_err(drop)
    }

    /// Adjusts what epoll looks for.
    fn watch_client(&mut self, id: ConnId) {
        let Some(c) = self.clients.get_mut(&id) else { return };
        let mut flags = CLIENT_FLAGS;
        if c.unread.is_empty() {
            flags |= epoll::EventFlags::IN;
        }
        if self.store.connection(id).is_some_and(|c| c.can_send()) {
            flags |= epoll::EventFlags::OUT;
        }
        if flags != c.flags {
            c.flags = flags;
            self.tell_epoll(id);
        }
    }

    /// Sends what came up, until nothing more does. A domain has one turn; what comes up for it afterwards waits until the
    /// others had theirs: one that fills its ring as fast as it is emptied would never let this end.
    fn serve_woken(&mut self) {
        self.served.clear();
        loop {
            let woken = self.store.take_woken();
            if woken.is_empty() {
                return;
            }
            for id in woken {
                match self.store.connection(id).map(|c| c.peer) {
                    Some(Peer::Socket) => {
                        self.flush(id);
                    }
                    Some(Peer::Domain(d)) if self.served.contains(&d) => drop(self.machine.ready.insert(d)),
                    Some(Peer::Domain(d)) => {
                        self.served.push(d);
                        self.serve_ring(d);
                    }
                    None => {}
                }
            }
        }
    }

    // ---- rings ----

    fn ports_raised(&mut self) -> anyhow::Result<()> {
        let Some(x) = &mut self.machine.xen else { return Ok(()) };
        let raised = x.raised().context("event channel device")?;
        if raised.domain_exception {
            self.store.check_domains(&mut self.machine);
        }
        for p in raised.ports {
            if let Some(d) = self.machine.domain_of(p) {
                self.machine.ready.insert(d);
            }
        }
        Ok(())
    }

    fn serve_ring(&mut self, domid: u16) {
        let Some((_, id, port)) = self.store.connected_domains().find(|d| d.0 == domid) else { return };
        // Its indexes would be found broken at each event that it raises.
        if self.store.connection(id).is_none_or(|c| c.ignored) {
            return;
        }
        let mut buf = std::mem::take(&mut self.buf);
        let (mut moved, mut more) = (false, false);
        for _ in 0..RING_BUDGET {
            match self.ring_step(domid, id, &mut buf) {
                Some(true) => (moved, more) = (true, true),
                Some(false) => {
                    more = false;
                    break;
                }
                None => {
                    warn!(domid, "ring indexes that can't be: domain ignored from now on");
                    self.store.ignore(id, ring::error::RING_INDEX, &mut self.machine);
                    self.commit(None);
                    (moved, more) = (true, false);
                    break;
                }
            }
        }
        self.buf = buf;
        // Whatever it was woken for, it had its turn.
        self.store.unwake(id);
        if moved {
            self.machine.notify(port);
        }
        if more {
            self.machine.ready.insert(domid);
        }
    }

    /// Takes up to one request and puts what fits. Whether anything moved; `None`: the indexes are broken.
    fn ring_step(&mut self, domid: u16, id: ConnId, buf: &mut Vec<u8>) -> Option<bool> {
        may_die_here();
        if self.machine.has_reset(domid) {
            self.commit(None);
        }
        let Some(ring) = self.machine.ring(domid) else { return Some(false) };
        let from = ring.requests_at();
        let mut taken = 0;
        // The header, and what it announces.
        loop {
            let wants = self.store.wants(id, self.machine.now_ms());
            let Some(ring) = self.machine.ring(domid) else { break };
            buf.clear();
            if wants == 0 || ring.peek(from.wrapping_add(taken), wants, buf).ok()? == 0 {
                break;
            }
            taken += buf.len() as u32;
            let served = self.store.input(id, buf, &mut self.machine);
            may_die_here();
            if served.is_err() || self.store.connection(id).is_none_or(|c| !c.decoder.is_partial()) {
                break;
            }
        }
        if taken > 0 && self.machine.has_reset(domid) {
            // It had its own ring emptied: where that stood means nothing any more.
            self.commit(None);
            return Some(true);
        }
        let Some(ring) = self.machine.ring(domid) else {
            // It released itself.
            self.commit(None);
            return Some(taken > 0);
        };
        let at = ring.replies_at();
        let mut put = 0;
        if self.store.connection(id).is_some_and(|c| c.can_send()) {
            let room = ring.room().ok()?;
            if room > 0 {
                self.store.output(id, room, buf);
                put = ring.fill(at, buf).ok()? as u32;
                self.store.wrote(id, put as usize);
            }
        }
        if taken == 0 && put == 0 {
            if ring.has_requests().ok()? {
                self.machine.stalled.insert(domid);
            }
            return Some(false);
        }
        self.commit(Some(&RingStep {
            domid,
            requests: Moved { from, to: from.wrapping_add(taken) },
            replies: Moved { from: at, to: at.wrapping_add(put) },
        }));
        Some(true)
    }

    // ---- live update ----

    fn hand_over(&mut self, plan: &Plan) {
        let why = match self.try_hand_over(plan) {
            Ok(never) => match never {},
            Err(e) => format!("{e:#}"),
        };
        self.store.live_update_failed(&why);
        self.serve_woken();
    }

    fn try_hand_over(&mut self, plan: &Plan) -> anyhow::Result<std::convert::Infallible> {
        let evtchn = self.machine.xen.as_ref().map_or(-1, |x| x.events().as_raw_fd());
        let clients = &self.clients;
        let stream = self.store.dump(self.listener.as_raw_fd(), evtchn, &mut |id| match clients.get(&id) {
            Some(c) => (c.stream.as_raw_fd(), c.unread.clone()),
            None => (-1, Vec::new()),
        })?;
        let path = state_path();
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        file.write_all(&stream).with_context(|| format!("{}", path.display()))?;
        drop(file);
        let program = OsStr::from_bytes(&plan.program);
        let mut args: Vec<OsString> = match &plan.cmdline {
            Some(c) => c
                .split(u8::is_ascii_whitespace)
                .filter(|w| !w.is_empty())
                .map(|w| OsStr::from_bytes(w).to_owned())
                .collect(),
            None => self.words.clone(),
        };
        if !args.iter().any(|a| a == "-U" || a == "--live-update") {
            args.push("-U".into());
        }
        info!(program = %program.display(), bytes = stream.len(), "live update: handing over");
        if let Some(x) = &mut self.machine.xen {
            x.watch_domains(false)?;
        }
        self.make_inheritable(true)?;
        self.commit(None);
        if let Some(j) = &self.journal {
            j.hand_over(true);
        }
        let error = execute(program, &args);
        // Still here: it did not work.
        if let Some(j) = &self.journal {
            j.hand_over(false);
        }
        let _ = std::fs::remove_file(&path);
        self.make_inheritable(false)?;
        if let Some(x) = &mut self.machine.xen {
            x.watch_domains(true).context("VIRQ_DOM_EXC")?;
            self.store.check_domains(&mut self.machine);
        }
        Err(anyhow::Error::from(error).context(format!("{}", program.display())))
    }

    /// The stock daemon wants blocking sockets, we don't.
    fn make_inheritable(&self, yes: bool) -> anyhow::Result<()> {
        let events = self.machine.xen.as_ref().map(|x| x.events());
        let fds = self.clients.values().map(|c| c.stream.as_fd()).chain(events).chain([self.listener.as_fd()]);
        for fd in fds {
            let old = fcntl_getfd(fd)?;
            fcntl_setfd(fd, if yes { old - FdFlags::CLOEXEC } else { old | FdFlags::CLOEXEC })?;
            rustix::io::ioctl_fionbio(fd, !yes)?;
        }
        Ok(())
    }
}

/// Connects a domain of a daemon that was killed. The kernel may still be busy with closing that one's ends.
fn connect_again(machine: &mut Machine, domid: u16, remote_port: u32) -> Result<u32, xenstore_wire::Errno> {
    let mut tries = 0;
    loop {
        let r = machine.connect(domid, remote_port);
        let lives = machine.domain_state(domid).is_some_and(|s| !s.dying);
        if r.is_ok() || !lives || tries == RECONNECT_TRIES {
            return r;
        }
        tries += 1;
        std::thread::sleep(std::time::Duration::from_millis(RECONNECT_MS));
    }
}

/// The store of a daemon that was killed, its rings taken up where it left them.
fn come_back(options: Options, c: &Contents, machine: &mut Machine) -> anyhow::Result<Store> {
    let r = Store::recover(options, c.snapshot(), c.batches(), machine.now_ms())?;
    let mut store = r.store;
    for &(domid, remote_port) in &r.domains {
        let port = match domid {
            0 => machine.connect_dom0().context("dom0's own ring")?,
            _ => match connect_again(machine, domid, remote_port) {
                Ok(port) => port,
                Err(e) => {
                    warn!(domid, port = remote_port, "it can't be connected again: {e}; ignored until it is gone");
                    if let Some(id) = store.domain_connection(domid) {
                        store.ignore(id, ring::error::COMM, machine);
                    }
                    0
                }
            },
        };
        store.reconnected(domid, port);
    }
    let step = r.last.ring.filter(|_| c.unpublished);
    // dom0 never empties its ring itself. If it is not where it was left, another daemon has served it since.
    let to_be_emptied = c.unpublished && r.last.resets.contains(&0);
    if !to_be_emptied && let (Some((requests, replies)), Some(ring)) = (store.noted_ring(0), machine.ring(0)) {
        let own = step.filter(|s| s.domid == 0);
        let is = |now: u32, then: u32, before: Option<u32>| now == then || Some(now) == before;
        if !is(ring.requests_at(), requests, own.map(|s| s.requests.from))
            || !is(ring.replies_at(), replies, own.map(|s| s.replies.from))
        {
            bail!(
                "dom0's ring stands at {} and {}, the journal left it at {requests} and {replies}: another daemon has \
                 served it since",
                ring.requests_at(),
                ring.replies_at()
            );
        }
    }
    if c.unpublished {
        for &domid in &r.last.resets {
            // Empty already if the daemon had come to it; then the domain may be using it.
            if machine.ring(domid).is_some_and(|r| r.requests_at() != 0 || r.replies_at() != 0) {
                machine.reset_ring(domid);
            }
        }
        machine.do_resets();
    }
    if let Some(s) = step
        && let Some(ring) = machine.ring(s.domid)
    {
        if ring.requests_at() == s.requests.from {
            ring.consume(s.requests.to);
        }
        may_die_here();
        if ring.replies_at() == s.replies.from {
            ring.publish(s.replies.to);
        }
        may_die_here();
    }
    Ok(store)
}

fn state_path() -> PathBuf {
    run_dir().join("state_dump")
}

/// A descriptor that the daemon before us left open.
fn inherit(fd: i32) -> anyhow::Result<OwnedFd> {
    if fd < 3 {
        bail!("descriptor {fd} in the state");
    }
    // SAFETY: only borrowed to see whether it is open; an invalid one gives EBADF.
    let flags = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) }).with_context(|| format!("descriptor {fd}"))?;
    // SAFETY: it is open, came through exec with the state that names it, and every descriptor is taken once: nobody else
    // in this process, which has just started, knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    fcntl_setfd(&fd, flags | FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// Replaces this process; returns only on failure. Not by way of a shell: a file that is no program is an error.
fn execute(program: &OsStr, args: &[OsString]) -> std::io::Error {
    let words: Result<Vec<CString>, _> =
        std::iter::once(program).chain(args.iter().map(|a| &**a)).map(|w| CString::new(w.as_bytes())).collect();
    let Ok(words) = words else { return ErrorKind::InvalidInput.into() };
    let mut argv: Vec<*const libc::c_char> = words.iter().map(|w| w.as_ptr()).collect();
    argv.push(std::ptr::null());
    // SAFETY: `argv` holds pointers to the NUL-terminated words, which live until the call returns, and ends with a null
    // pointer. No other thread changes the environment: there is none.
    unsafe { libc::execv(argv[0], argv.as_ptr()) };
    std::io::Error::last_os_error()
}

fn listen(path: &Path) -> std::io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let l = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    l.set_nonblocking(true)?;
    Ok(l)
}
