//! The loop.

use super::devices::Devices;
use super::log::Log;
use super::machine::Machine;
use super::{run_dir, socket_path};
use crate::conn::{ConnId, Peer};
use crate::host::Host;
use crate::live_update::Plan;
use crate::store::{Options, Store};
use anyhow::{Context, bail};
use rustix::event::epoll;
use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};
use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use tracing::{info, warn};
use xenstore_wire::ring;

/// What is read from a socket at once, in bytes. Bounds how long one client keeps the others waiting.
const READ_SIZE: usize = 16 << 10;
/// Requests of one domain served before the others get their turn.
const RING_BUDGET: usize = 16;
/// A socket client that leaves so many messages unread is not listened to until it reads.
const MAX_UNREAD: usize = 20_000;
/// Bytes offered to a socket in one write.
const WRITE_SIZE: usize = 64 << 10;

const TOKEN_LISTEN: u64 = 0;
const TOKEN_EVENTS: u64 = 1;
const TOKEN_SIGNAL: u64 = 2;
const TOKEN_CLIENT: u64 = 1 << 32;

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    /// Read and not yet given to the store.
    unread: Vec<u8>,
    /// What epoll watches for.
    flags: epoll::EventFlags,
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    store: Store,
    machine: Machine,
    listener: UnixListener,
    clients: BTreeMap<ConnId, Client>,
    epoll: OwnedFd,
    hangup: UnixStream,
    /// For what is sent.
    buf: Vec<u8>,
    /// For what is read from sockets; as long as that may be.
    read_buf: Vec<u8>,
}

impl Daemon {
    /// Starts afresh: a new store, a new socket, dom0's ring if there is Xen.
    ///
    /// # Errors
    /// The socket can't be made, or this is no dom0.
    pub fn start(options: Options, log: Log, xen: Option<Box<dyn Devices>>) -> anyhow::Result<Daemon> {
        let path = socket_path();
        let listener = listen(&path).with_context(|| format!("socket {}", path.display()))?;
        let with_xen = xen.is_some();
        let mut machine = Machine::new(xen, log);
        let mut store = Store::new(options);
        if with_xen {
            let port = machine.connect_dom0().context("dom0's own ring")?;
            store.introduce_dom0(port, machine.now_ms());
        }
        Daemon::assemble(store, machine, listener)
    }

    /// Takes over from the daemon before, in this same process. `open` makes the devices out of the event channel
    /// device that it left open.
    ///
    /// # Errors
    /// There is no state, or it can't be restored.
    pub fn take_over(
        options: Options,
        log: Log,
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
        let mut d = Daemon::assemble(store, machine, listener)?;
        for (id, fd) in restored.sockets {
            let stream = UnixStream::from(inherit(fd).with_context(|| format!("socket {fd} of a client"))?);
            d.add_client(id, stream)?;
        }
        // Its place is taken: a second take-over from it must fail.
        std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        info!(connections = d.clients.len(), domains = d.store.connected_domains().count(), "took over");
        Ok(d)
    }

    fn assemble(store: Store, machine: Machine, listener: UnixListener) -> anyhow::Result<Daemon> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let add =
            |fd: BorrowedFd<'_>, token| epoll::add(&epoll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN);
        add(listener.as_fd(), TOKEN_LISTEN)?;
        if let Some(x) = &machine.xen {
            add(x.events(), TOKEN_EVENTS)?;
        }
        let (hangup, sender) = UnixStream::pair()?;
        hangup.set_nonblocking(true)?;
        signal_hook::low_level::pipe::register(libc::SIGHUP, sender)?;
        add(hangup.as_fd(), TOKEN_SIGNAL)?;
        Ok(Daemon {
            store,
            machine,
            listener,
            clients: BTreeMap::new(),
            epoll,
            hangup,
            buf: Vec::new(),
            read_buf: vec![0; READ_SIZE],
        })
    }

    /// Serves for ever.
    ///
    /// # Errors
    /// epoll fails, or the event channel device does.
    pub fn run(mut self) -> anyhow::Result<()> {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(256);
        // When something that had to wait for time to pass may go on. It is kept from round to round: others may keep the
        // loop busy all the time.
        let mut due: Option<u64> = None;
        loop {
            self.store.run_delayed(&mut self.machine);
            self.serve_woken();
            let next = self.store.timers(&mut self.machine);
            self.serve_woken();
            let now = self.machine.now_ms();
            due = due.into_iter().chain(next.map(|ms| now + ms)).min();
            let wait = if self.machine.ready.is_empty() { due.map(|d| d.saturating_sub(now)) } else { Some(0) };
            let wait = wait.map(|ms| rustix::event::Timespec {
                tv_sec: (ms / 1000) as i64,
                tv_nsec: (ms % 1000 * 1_000_000) as i64,
            });
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), wait.as_ref()) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(e) => bail!("epoll: {e}"),
            }
            if due.is_some_and(|d| d <= self.machine.now_ms()) {
                due = None;
                self.machine.ready.extend(self.store.connected_domains().map(|d| d.0));
            }
            for e in &events {
                let flags = e.flags;
                match e.data.u64() {
                    TOKEN_LISTEN => self.accept(),
                    TOKEN_EVENTS => self.ports_raised()?,
                    TOKEN_SIGNAL => {
                        let mut b = [0; 64];
                        while matches!((&self.hangup).read(&mut b), Ok(n) if n > 0) {}
                        if let Err(e) = self.machine.log.reopen() {
                            warn!("the log file can't be opened again: {e}");
                        }
                    }
                    t => {
                        let id = (t - TOKEN_CLIENT) as ConnId;
                        if flags.intersects(epoll::EventFlags::OUT) {
                            self.flush(id);
                        }
                        if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
                            self.client_readable(id);
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
        }
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
        let flags = epoll::EventFlags::IN;
        epoll::add(&self.epoll, &stream, epoll::EventData::new_u64(TOKEN_CLIENT + u64::from(id)), flags)?;
        self.clients.insert(id, Client { stream, unread: Vec::new(), flags });
        Ok(())
    }

    fn drop_client(&mut self, id: ConnId) {
        if let Some(c) = self.clients.remove(&id) {
            let _ = epoll::delete(&self.epoll, &c.stream);
        }
        self.store.close(id, &mut self.machine);
    }

    fn client_readable(&mut self, id: ConnId) {
        let Some(c) = self.clients.get_mut(&id) else { return };
        if c.unread.is_empty() {
            let mut buf = std::mem::take(&mut self.read_buf);
            let r = (&c.stream).read(&mut buf);
            let n = match r {
                Ok(0) => None,
                Ok(n) => Some(n),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Some(0),
                Err(_) => None,
            };
            let done = n.map(|n| self.feed(id, &buf[..n]));
            self.read_buf = buf;
            match done {
                None | Some(Err(())) => return self.drop_client(id),
                Some(Ok(())) => {}
            }
        } else {
            let bytes = std::mem::take(&mut c.unread);
            if self.feed(id, &bytes).is_err() {
                return self.drop_client(id);
            }
        }
        // At once: what it asked for is there, and nothing has to be watched for then.
        self.flush(id);
    }

    /// Gives bytes to the store as far as it takes them; the rest is kept.
    fn feed(&mut self, id: ConnId, mut bytes: &[u8]) -> Result<(), ()> {
        let now = self.machine.now_ms();
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
        Ok(())
    }

    fn flush(&mut self, id: ConnId) {
        loop {
            let wrote = match self.write_out(id) {
                Ok(wrote) => wrote,
                Err(()) => return self.drop_client(id),
            };
            // What waited for room in the queue can go on.
            let Some(c) = self.clients.get_mut(&id) else { return };
            if !wrote || c.unread.is_empty() {
                break;
            }
            let bytes = std::mem::take(&mut c.unread);
            if self.feed(id, &bytes).is_err() {
                return self.drop_client(id);
            }
        }
        self.watch_client(id);
    }

    /// Writes as much as the socket takes. Whether it took anything.
    fn write_out(&mut self, id: ConnId) -> Result<bool, ()> {
        let mut buf = std::mem::take(&mut self.buf);
        let mut done = Ok(false);
        while let Some(c) = self.clients.get(&id) {
            self.store.output(id, WRITE_SIZE, &mut buf);
            if buf.is_empty() {
                break;
            }
            match (&c.stream).write(&buf) {
                Ok(n) => {
                    self.store.wrote(id, n);
                    done = Ok(true);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(_) => {
                    done = Err(());
                    break;
                }
            }
        }
        self.buf = buf;
        done
    }

    /// Adjusts what epoll looks for.
    fn watch_client(&mut self, id: ConnId) {
        let Some(c) = self.clients.get_mut(&id) else { return };
        let mut flags = epoll::EventFlags::empty();
        if c.unread.is_empty() {
            flags |= epoll::EventFlags::IN;
        }
        if self.store.connection(id).is_some_and(|c| c.can_send()) {
            flags |= epoll::EventFlags::OUT;
        }
        if flags != c.flags {
            c.flags = flags;
            let _ =
                epoll::modify(&self.epoll, &c.stream, epoll::EventData::new_u64(TOKEN_CLIENT + u64::from(id)), flags);
        }
    }

    /// Sends what came up, until nothing more does.
    fn serve_woken(&mut self) {
        loop {
            let woken = self.store.take_woken();
            if woken.is_empty() {
                return;
            }
            for id in woken {
                match self.store.connection(id).map(|c| c.peer) {
                    Some(Peer::Socket) => self.flush(id),
                    Some(Peer::Domain(d)) => self.serve_ring(d),
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
                    (moved, more) = (true, false);
                    break;
                }
            }
        }
        self.buf = buf;
        if moved {
            self.machine.notify(port);
        }
        if more {
            self.machine.ready.insert(domid);
        }
    }

    /// Takes up to one request and puts what fits. Whether anything moved; `None`: the indexes are broken.
    fn ring_step(&mut self, domid: u16, id: ConnId, buf: &mut Vec<u8>) -> Option<bool> {
        let mut moved = false;
        let wants = self.store.wants(id, self.machine.now_ms());
        if wants > 0 {
            let Some(ring) = self.machine.ring(domid) else { return Some(false) };
            buf.clear();
            if ring.take(wants, buf).ok()? > 0 {
                moved = true;
                if self.store.input(id, buf, &mut self.machine).is_err() {
                    return Some(true);
                }
            }
        }
        if self.store.connection(id).is_some_and(|c| c.can_send()) {
            let Some(ring) = self.machine.ring(domid) else { return Some(moved) };
            let room = ring.room().ok()?;
            if room > 0 {
                self.store.output(id, room, buf);
                let n = ring.put(buf).ok()?;
                self.store.wrote(id, n);
                moved |= n > 0;
            }
        }
        Some(moved)
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
            None => std::env::args_os().skip(1).collect(),
        };
        if !args.iter().any(|a| a == "-U" || a == "--live-update") {
            args.push("-U".into());
        }
        info!(program = %program.display(), bytes = stream.len(), "live update: handing over");
        if let Some(x) = &mut self.machine.xen {
            x.watch_domains(false)?;
        }
        self.make_inheritable(true)?;
        let error = execute(program, &args);
        // Still here: it did not work.
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
