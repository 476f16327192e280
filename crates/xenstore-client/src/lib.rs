//! A blocking xenstore client over the daemon's unix socket, or over the kernel's device (`/dev/xen/xenbus`) where there
//! is none, as inside a guest.
//!
//! ```no_run
//! use xenstore_client::{Client, Nodes};
//! let mut c = Client::open()?;
//! c.write("/local/domain/0/x", "1")?;
//! c.watch("/local/domain/0/x", "tok")?;
//! let n = c.transaction(|t| {
//!     let n: u32 = t.read_string("/local/domain/0/x")?.parse().unwrap_or(0);
//!     t.write("/local/domain/0/x", (n + 1).to_string())?;
//!     Ok(n)
//! })?;
//! # Ok::<(), xenstore_client::Error>(())
//! ```
//!
//! The operations on a domain's connection (freeze, export, import, attach) are in [`migration`].
//!
//! # When the daemon is killed
//!
//! A client of a socket connects again, once a daemon listens there (it waits up to [`RECONNECT_WITHIN`], or for its own limit), and sets its watches again, so
//! that each fires once; of one that is refused then, [`Client::next_event`] tells by [`Error::WatchLost`]. A request that changes nothing is sent again; so is one that did not get out. What is said of the others:
//! in a transaction `EAGAIN`, as the transaction was lost with the connection; otherwise [`Error::Unsure`], as it was carried out or not.

mod error;
pub mod migration;
mod transport;

pub use error::{Error, Result};
pub use xenstore_wire::{Access, Errno, Perm};

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};
use transport::{PAUSE, Place, Transport};
use xenstore_wire::{FrameDecoder, Message, Op, PAYLOAD_MAX, payload, perm};

/// Where a daemon listens if `XENSTORED_PATH` does not say otherwise.
pub const DEFAULT_SOCKET: &str = "/run/xenstored/socket";
/// How often [`Client::transaction`] tries before it gives up.
const TRANSACTION_TRIES: u32 = 1000;
/// How long a client waits for a daemon to come back. One with a journal is back within a second or two.
pub const RECONNECT_WITHIN: Duration = Duration::from_secs(10);

/// A watch that fired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Path that changed (relative if the watch is).
    pub path: String,
    /// Token that was given with the watch.
    pub token: String,
}

/// A connection to a xenstored.
#[derive(Debug)]
pub struct Client {
    place: Place,
    io: Transport,
    decoder: FrameDecoder,
    /// Bytes read from the transport and not yet framed.
    unread: VecDeque<u8>,
    events: VecDeque<Event>,
    next_req: u32,
    /// For each request.
    limit: Option<Duration>,
    /// An answer has not come in time; it could come later and be taken for another's.
    late: bool,
    /// Path and token of each, as they were given.
    watches: Vec<Vec<u8>>,
    /// Of those that could not be set again.
    lost_watches: VecDeque<Error>,
    /// How long a daemon may take to come back, where there is no limit for each request.
    again_within: Duration,
    /// How many connections there were before this one: a transaction of an earlier one is lost.
    era: u32,
}

impl Client {
    /// Connects as xenstore's own tools do: to `XENSTORED_PATH`, or [`DEFAULT_SOCKET`], or `/dev/xen/xenbus`.
    pub fn open() -> Result<Client> {
        Client::at(Client::usual_place(), None)
    }

    /// As [`Client::open`], with a limit: for a daemon that is just being started again to come, and for each request then. A request that
    /// is not answered in time is the connection's last. A device has no limit for writing.
    pub fn open_within(limit: Duration) -> Result<Client> {
        Client::at(Client::usual_place(), Some(limit))
    }

    fn usual_place() -> Place {
        match std::env::var_os("XENSTORED_PATH") {
            Some(path) => Place::Socket(path.into()),
            None if Path::new(DEFAULT_SOCKET).exists() => Place::Socket(DEFAULT_SOCKET.into()),
            None => Place::Device("/dev/xen/xenbus".into()),
        }
    }

    /// Connects to a daemon's socket.
    pub fn connect(path: impl AsRef<Path>) -> Result<Client> {
        Client::at(Place::Socket(path.as_ref().into()), None)
    }

    /// As [`Client::connect`], with a limit as for [`Client::open_within`].
    pub fn connect_within(path: impl AsRef<Path>, limit: Duration) -> Result<Client> {
        Client::at(Place::Socket(path.as_ref().into()), Some(limit))
    }

    /// Opens the kernel's device, `/dev/xen/xenbus`.
    pub fn open_device() -> Result<Client> {
        Client::at(Place::Device("/dev/xen/xenbus".into()), None)
    }

    fn at(place: Place, limit: Option<Duration>) -> Result<Client> {
        Ok(Client {
            io: place.open_within(limit.unwrap_or_default(), limit.unwrap_or(RECONNECT_WITHIN), limit)?,
            place,
            decoder: FrameDecoder::new(),
            unread: VecDeque::new(),
            events: VecDeque::new(),
            next_req: 1,
            limit,
            late: false,
            watches: Vec::new(),
            lost_watches: VecDeque::new(),
            again_within: RECONNECT_WITHIN,
            era: 0,
        })
    }

    /// Sends one request and waits for its reply. The building block of all the other calls; `what` goes into errors.
    ///
    /// # Errors
    /// The daemon's error, with operation and `what`; a broken connection; a payload that is too long (`E2BIG`,
    /// without sending it). If the daemon was started anew meanwhile: what the crate's documentation says.
    pub fn request(&mut self, op: Op, tx: u32, body: &[u8], what: &str) -> Result<Vec<u8>> {
        if body.len() > PAYLOAD_MAX {
            return Err(Error::refused(op, what, Errno::E2BIG));
        }
        let deadline = Instant::now() + self.limit.unwrap_or(self.again_within);
        loop {
            let mut sent = false;
            let lost = match self.exchange(op, tx, body, what, self.limit, &mut sent) {
                Err(Error::Io(lost)) if self.place.is_socket() => lost,
                r => return r,
            };
            self.reconnect(lost, deadline)?;
            if tx != 0 {
                return Err(match (op, body) {
                    (Op::TransactionEnd, b"T\0") if sent => Error::unsure(op, what),
                    _ => Error::refused(op, what, Errno::EAGAIN),
                });
            }
            if op == Op::Unwatch {
                // It is not one of those that were set again, and went with the connection.
                return Ok(b"OK\0".to_vec());
            }
            if sent && !changes_nothing(op) {
                return Err(Error::unsure(op, what));
            }
        }
    }

    /// Connects again, and sets the watches again.
    fn reconnect(&mut self, lost: std::io::Error, deadline: Instant) -> Result<()> {
        self.era += 1;
        let mut lost = lost;
        'connect: loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Io(lost));
            }
            // One that takes connections and drops them at once is not asked in a circle.
            std::thread::sleep(PAUSE);
            self.io = self.place.open_within(left, self.limit.unwrap_or(left), self.limit)?;
            (self.decoder, self.unread) = (FrameDecoder::new(), VecDeque::new());
            // Events of before stay: something changed there. The new ones say once more that something may have.
            let mut refused = Vec::new();
            for watch in self.watches.clone() {
                match self.exchange(Op::Watch, 0, &watch, "again", Some(self.limit.unwrap_or(left)), &mut false) {
                    Ok(_) => {}
                    Err(Error::Refused { errno, .. }) => refused.push((watch, errno)),
                    Err(Error::Io(e)) => {
                        lost = e;
                        continue 'connect;
                    }
                    Err(e) => {
                        // It has not all watches: the next request must not go on with it.
                        self.io.give_up();
                        return Err(e);
                    }
                }
            }
            for (watch, errno) in refused {
                self.watches.retain(|w| *w != watch);
                self.lost_watches.push_back(Error::watch_lost(&watch, errno));
            }
            return Ok(());
        }
    }

    /// A request and its reply on the connection that there is. `sent`: all of the request got out.
    fn exchange(
        &mut self,
        op: Op,
        tx: u32,
        body: &[u8],
        what: &str,
        limit: Option<Duration>,
        sent: &mut bool,
    ) -> Result<Vec<u8>> {
        let id = self.next_req;
        self.next_req = self.next_req.wrapping_add(1).max(1);
        let late = || Error::TimedOut { op, what: what.into(), limit: limit.unwrap_or_default() };
        if self.late {
            return Err(late());
        }
        let deadline = limit.map(|limit| Instant::now() + limit);
        match self.io.send(&Message::new(op.to_wire(), id, tx, body.to_vec()).to_bytes()) {
            Err(Error::Io(e)) if self.limit.is_some() && e.kind() == std::io::ErrorKind::WouldBlock => {
                self.late = true;
                return Err(late());
            }
            r => r?,
        }
        *sent = true;
        loop {
            let Some(m) = self.next_message(deadline)? else {
                self.late = true;
                return Err(late());
            };
            if m.header.op == Op::WatchEvent.to_wire() {
                self.queue_event(&m)?;
                continue;
            }
            if m.header.req_id != id {
                return Err(Error::protocol(op, "a reply to a request that was not sent"));
            }
            if m.header.op == Op::Error.to_wire() {
                let e = Errno::from_payload(&m.payload).ok_or_else(|| Error::protocol(op, "an unknown error"))?;
                return Err(Error::refused(op, what, e));
            }
            if m.header.op != op.to_wire() {
                return Err(Error::protocol(op, "a reply of another type"));
            }
            return Ok(m.payload);
        }
    }

    fn queue_event(&mut self, m: &Message) -> Result<()> {
        let mut s = payload::strings(&m.payload);
        match (s.next(), s.next()) {
            (Some(path), Some(token)) => {
                let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
                self.events.push_back(Event { path: text(path), token: text(token) });
                Ok(())
            }
            _ => Err(Error::protocol(Op::WatchEvent, "a watch event without path and token")),
        }
    }

    /// The next message, or `None` at the deadline.
    fn next_message(&mut self, deadline: Option<Instant>) -> Result<Option<Message>> {
        loop {
            let (a, _) = self.unread.as_slices();
            if !a.is_empty() {
                let n = self.decoder.feed(a).map_err(|_| Error::protocol(Op::Error, "a message that is too long"))?;
                self.unread.drain(..n);
                if let Some(m) = self.decoder.take() {
                    return Ok(Some(m));
                }
                continue;
            }
            if !self.io.wait_readable(deadline)? {
                return Ok(None);
            }
            let mut buf = [0; 4096];
            let n = self.io.receive(&mut buf)?;
            self.unread.extend(&buf[..n]);
        }
    }

    /// The next event, waiting up to `timeout` (for ever if `None`). `Ok(None)` when the time is over. What connecting again takes is
    /// not counted.
    ///
    /// # Errors
    /// Among others [`Error::WatchLost`], once for each watch; the others go on.
    pub fn next_event(&mut self, timeout: Option<Duration>) -> Result<Option<Event>> {
        if let Some(lost) = self.lost_watches.pop_front() {
            return Err(lost);
        }
        if let Some(e) = self.events.pop_front() {
            return Ok(Some(e));
        }
        let deadline = timeout.map(|t| Instant::now() + t);
        loop {
            match self.next_message(deadline) {
                Ok(None) => return Ok(None),
                Ok(Some(m)) if m.header.op == Op::WatchEvent.to_wire() => {
                    self.queue_event(&m)?;
                    return Ok(self.events.pop_front());
                }
                Ok(Some(_)) => return Err(Error::protocol(Op::WatchEvent, "a reply that nobody asked for")),
                Err(Error::Io(lost)) if self.place.is_socket() => {
                    self.reconnect(lost, Instant::now() + self.again_within)?;
                    if let Some(lost) = self.lost_watches.pop_front() {
                        return Err(lost);
                    }
                    // The watches' first events may have come with their replies.
                    if let Some(e) = self.events.pop_front() {
                        return Ok(Some(e));
                    }
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Registers a watch. An event for the path itself follows at once.
    pub fn watch(&mut self, path: &str, token: &str) -> Result<()> {
        let watch = payload::join([path, token]);
        self.request(Op::Watch, 0, &watch, path)?;
        self.watches.push(watch);
        Ok(())
    }

    /// Removes a watch.
    pub fn unwatch(&mut self, path: &str, token: &str) -> Result<()> {
        let watch = payload::join([path, token]);
        self.watches.retain(|w| *w != watch);
        self.lost_watches
            .retain(|lost| !matches!(lost, Error::WatchLost { path: p, token: t, .. } if p == path && t == token));
        self.request(Op::Unwatch, 0, &watch, path).map(drop)
    }

    /// Runs `f` in a transaction and commits; again from the start while others get in the way (`EAGAIN`).
    /// If `f` fails, the transaction is discarded.
    pub fn transaction<T>(&mut self, mut f: impl FnMut(&mut Transaction<'_>) -> Result<T>) -> Result<T> {
        for _ in 0..TRANSACTION_TRIES {
            let mut t = self.begin()?;
            let r = match f(&mut t) {
                Ok(v) => t.commit().map(|()| v),
                Err(e) => {
                    // The first error is the one to report.
                    let _ = t.abort();
                    Err(e)
                }
            };
            match r {
                Err(e) if e.errno() == Some(Errno::EAGAIN) => continue,
                r => return r,
            }
        }
        Err(Error::refused(Op::TransactionEnd, "after 1000 tries", Errno::EAGAIN))
    }

    /// Opens a transaction that the caller ends. Dropping it discards it.
    pub fn begin(&mut self) -> Result<Transaction<'_>> {
        let r = self.request(Op::TransactionStart, 0, &[0], "")?;
        let id = payload::one_arg(&r)
            .and_then(payload::decimal)
            .map_err(|_| Error::protocol(Op::TransactionStart, "a transaction id that is no number"))?;
        Ok(Transaction { era: self.era, client: self, id, open: true })
    }

    /// Connects the daemon with a domain. `port` is the guest's port.
    pub fn introduce(&mut self, domid: u16, gfn: u64, port: u32) -> Result<()> {
        let body = payload::join([domid.to_string(), gfn.to_string(), port.to_string()]);
        self.request(Op::Introduce, 0, &body, &format!("domain {domid}")).map(drop)
    }

    /// Disconnects the daemon from a domain.
    pub fn release(&mut self, domid: u16) -> Result<()> {
        self.domain_op(Op::Release, domid).map(drop)
    }

    /// Makes the daemon look out for the domain's shutdown again.
    pub fn resume(&mut self, domid: u16) -> Result<()> {
        self.domain_op(Op::Resume, domid).map(drop)
    }

    /// Whether the daemon is connected with a domain.
    pub fn is_introduced(&mut self, domid: u16) -> Result<bool> {
        Ok(self.domain_op(Op::IsDomainIntroduced, domid)?.first() == Some(&b'T'))
    }

    /// Lets `domid` act for `target`.
    pub fn set_target(&mut self, domid: u16, target: u16) -> Result<()> {
        let body = payload::join([domid.to_string(), target.to_string()]);
        self.request(Op::SetTarget, 0, &body, &format!("domain {domid}")).map(drop)
    }

    fn domain_op(&mut self, op: Op, domid: u16) -> Result<Vec<u8>> {
        self.request(op, 0, &payload::join([domid.to_string()]), &format!("domain {domid}"))
    }

    /// A command to the daemon (`xenstore-control`); the answer is text.
    pub fn control<S: AsRef<[u8]>>(&mut self, args: &[S]) -> Result<String> {
        let r = self.request(Op::Control, 0, &payload::join(args), "")?;
        Ok(String::from_utf8_lossy(r.strip_suffix(&[0]).unwrap_or(&r)).into_owned())
    }
}

/// Doing it twice is like doing it once, whatever others do in between.
fn changes_nothing(op: Op) -> bool {
    matches!(
        op,
        Op::Read
            | Op::Directory
            | Op::DirectoryPart
            | Op::GetPerms
            | Op::GetDomainPath
            | Op::IsDomainIntroduced
            | Op::GetFeature
            | Op::GetQuota
            | Op::FerryFeatures
            | Op::DomainListWatches
            // What they make ends with the connection.
            | Op::Watch
            | Op::TransactionStart
    )
}

impl AsFd for Client {
    /// For waiting with others; call [`Client::next_event`] with a time of zero once it is readable. Ask for it anew each time: it is
    /// another one once the client has connected again.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.as_fd()
    }
}

/// An open transaction.
#[derive(Debug)]
pub struct Transaction<'a> {
    client: &'a mut Client,
    id: u32,
    /// The client's when it was opened.
    era: u32,
    open: bool,
}

impl Transaction<'_> {
    /// Commits. `EAGAIN` if others changed what was read.
    pub fn commit(mut self) -> Result<()> {
        self.end("T")
    }

    /// Discards.
    pub fn abort(mut self) -> Result<()> {
        self.end("F")
    }

    fn end(&mut self, how: &str) -> Result<()> {
        self.open = false;
        match self.request(Op::TransactionEnd, &payload::join([how]), "") {
            // It went with its connection.
            Err(e) if how == "F" && e.errno() == Some(Errno::EAGAIN) => Ok(()),
            r => r.map(drop),
        }
    }

    fn request(&mut self, op: Op, body: &[u8], what: &str) -> Result<Vec<u8>> {
        if self.era != self.client.era {
            // Another connection's transactions have the same numbers.
            return Err(Error::refused(op, what, Errno::EAGAIN));
        }
        self.client.request(op, self.id, body, what)
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        if self.open {
            // Nobody is left to tell.
            let _ = self.end("F");
        }
    }
}

/// Operations on nodes: of a [`Client`] directly, or inside a [`Transaction`].
pub trait Nodes {
    #[doc(hidden)]
    fn node_request(&mut self, op: Op, body: &[u8], path: &str) -> Result<Vec<u8>>;

    /// The value of a node.
    fn read(&mut self, path: &str) -> Result<Vec<u8>> {
        self.node_request(Op::Read, &payload::join([path]), path)
    }

    /// The value of a node as text; bytes that are no UTF-8 are replaced.
    fn read_string(&mut self, path: &str) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.read(path)?).into_owned())
    }

    /// The value, or `None` if there is no such node.
    fn read_opt(&mut self, path: &str) -> Result<Option<Vec<u8>>> {
        match self.read(path) {
            Err(e) if e.errno() == Some(Errno::ENOENT) => Ok(None),
            r => r.map(Some),
        }
    }

    /// Sets the value, making the node and its parents if need be.
    fn write(&mut self, path: &str, value: impl AsRef<[u8]>) -> Result<()>
    where
        Self: Sized,
    {
        let mut b = payload::join([path]);
        b.extend_from_slice(value.as_ref());
        self.node_request(Op::Write, &b, path).map(drop)
    }

    /// Makes sure that a node exists.
    fn mkdir(&mut self, path: &str) -> Result<()> {
        self.node_request(Op::Mkdir, &payload::join([path]), path).map(drop)
    }

    /// Removes a node and all below; no error if it is not there, but its parent is.
    fn rm(&mut self, path: &str) -> Result<()> {
        self.node_request(Op::Rm, &payload::join([path]), path).map(drop)
    }

    /// Names of the children, however many.
    fn directory(&mut self, path: &str) -> Result<Vec<String>> {
        let text = |p: &[u8]| payload::strings(p).map(|s| String::from_utf8_lossy(s).into_owned()).collect();
        match self.node_request(Op::Directory, &payload::join([path]), path) {
            Err(e) if e.errno() == Some(Errno::E2BIG) => self.directory_parts(path).map(|b| text(&b)),
            r => r.map(|b| text(&b)),
        }
    }

    #[doc(hidden)]
    fn directory_parts(&mut self, path: &str) -> Result<Vec<u8>> {
        let bad = || Error::protocol(Op::DirectoryPart, "a part without a generation");
        let mut all = Vec::new();
        let mut generation = Vec::new();
        loop {
            let b = payload::join([path, &all.len().to_string()]);
            let part = self.node_request(Op::DirectoryPart, &b, path)?;
            let (g, names) = payload::split_first(&part).map_err(|_| bad())?;
            if all.is_empty() {
                generation = g.to_vec();
            } else if generation != g {
                // The node changed between two parts: from the start.
                all.clear();
                continue;
            }
            // An empty string ends the list.
            match names.strip_suffix(b"\0\0") {
                Some(last) => {
                    all.extend_from_slice(last);
                    all.push(0);
                    return Ok(all);
                }
                None if names == [0] => return Ok(all),
                None if names.is_empty() => return Err(bad()),
                None => all.extend_from_slice(names),
            }
        }
    }

    /// Permissions, owner first.
    fn get_perms(&mut self, path: &str) -> Result<Vec<Perm>> {
        let r = self.node_request(Op::GetPerms, &payload::join([path]), path)?;
        perm::parse_list(&r).map_err(|_| Error::protocol(Op::GetPerms, "permissions that can't be read"))
    }

    /// Sets permissions, owner first.
    fn set_perms(&mut self, path: &str, perms: &[Perm]) -> Result<()> {
        let mut b = payload::join([path]);
        b.extend(perm::format_list(perms));
        self.node_request(Op::SetPerms, &b, path).map(drop)
    }
}

impl Nodes for Client {
    fn node_request(&mut self, op: Op, body: &[u8], path: &str) -> Result<Vec<u8>> {
        self.request(op, 0, body, path)
    }
}

impl Nodes for Transaction<'_> {
    fn node_request(&mut self, op: Op, body: &[u8], path: &str) -> Result<Vec<u8>> {
        self.request(op, body, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    const LIMIT: Duration = Duration::from_millis(50);

    fn daemon() -> (tempfile::TempDir, std::path::PathBuf, UnixListener) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        (dir, path, listener)
    }

    /// What `f` gives; a test that waits for ever fails.
    fn in_time<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, waits) = std::sync::mpsc::channel();
        std::thread::spawn(move || done.send(f()));
        waits.recv_timeout(Duration::from_secs(20)).expect("there is a limit")
    }

    /// A daemon that is stopped: its kernel takes the connection and the request, nobody answers.
    #[test]
    fn a_daemon_that_hangs_is_given_up() {
        let (_dir, path, listener) = daemon();
        let mut client = Client::connect_within(&path, LIMIT).unwrap();
        let since = Instant::now();
        let (mut client, error) = in_time(move || {
            let error = client.read("/local").unwrap_err();
            (client, error)
        });
        assert!(matches!(error, Error::TimedOut { op: Op::Read, .. }), "{error}");
        assert!(error.to_string().contains("xenstore READ /local: no answer within 50ms"), "{error}");
        assert!(since.elapsed() >= LIMIT);
        // The answer comes after all; the next request's it is not.
        let (mut stream, _) = listener.accept().unwrap();
        std::io::Write::write_all(&mut stream, &Message::new(Op::Read.to_wire(), 1, 0, b"late".to_vec()).to_bytes())
            .unwrap();
        assert!(matches!(client.read("/other").unwrap_err(), Error::TimedOut { .. }));
    }

    #[test]
    fn a_full_queue_is_given_up() {
        let (_dir, path, _listener) = daemon();
        let error = in_time(move || {
            let mut taken = Vec::new();
            loop {
                match Client::connect_within(&path, LIMIT) {
                    Ok(client) => taken.push(client),
                    Err(error) => break error,
                }
                assert!(taken.len() < 10_000, "the queue has no end");
            }
        });
        assert!(matches!(error, Error::Connect { .. }), "{error}");
    }

    /// Answers a connection's next request; gives the request's payload.
    fn answer(stream: &mut UnixStream, op: Op, id: u32, body: &[u8]) -> Vec<u8> {
        let mut request = [0; 4096];
        let n = std::io::Read::read(stream, &mut request).unwrap();
        assert!(n > 0, "there is a request");
        let reply = Message::new(op.to_wire(), id, 0, body.to_vec()).to_bytes();
        std::io::Write::write_all(stream, &reply).unwrap();
        request[xenstore_wire::HEADER_LEN..n].to_vec()
    }

    /// A client with the watches `/one`, `a` and `/two`, `b`, whose daemon ends then. `next` is the one that is started after it.
    fn watching<T: Send + 'static>(
        next: impl FnOnce(&UnixListener) -> T + Send + 'static,
    ) -> (tempfile::TempDir, Client, std::thread::JoinHandle<T>) {
        let (dir, path, listener) = daemon();
        let mut client = Client::connect_within(&path, Duration::from_secs(20)).unwrap();
        let (mut first, _) = listener.accept().unwrap();
        let served = std::thread::spawn(move || {
            answer(&mut first, Op::Watch, 1, b"OK\0");
            answer(&mut first, Op::Watch, 2, b"OK\0");
            drop(first);
            next(&listener)
        });
        client.watch("/one", "a").unwrap();
        client.watch("/two", "b").unwrap();
        (dir, client, served)
    }

    /// A daemon that was started anew may not have room for the watch, or may not let it be.
    #[test]
    fn a_watch_that_is_refused_the_second_time_is_told_of() {
        let (_dir, mut client, served) = watching(|listener| {
            let (mut second, _) = listener.accept().unwrap();
            answer(&mut second, Op::Error, 4, b"ENOSPC\0");
            answer(&mut second, Op::Watch, 5, b"OK\0");
            answer(&mut second, Op::Read, 6, b"value");
            second
        });
        // What is asked for has nothing to do with it.
        assert_eq!(client.read("/x").unwrap(), b"value");
        let _open = served.join().unwrap();
        let error = client.next_event(Some(Duration::ZERO)).unwrap_err();
        assert!(
            matches!(&error, Error::WatchLost { path, token, errno: Errno::ENOSPC } if path == "/one" && token == "a"),
            "{error}"
        );
        assert_eq!(client.next_event(Some(Duration::ZERO)).unwrap(), None, "once");
        assert_eq!(client.watches, [payload::join(["/two", "b"])]);
    }

    /// One that answers nonsense when watches are set again: the rest of them is set at the next connection.
    #[test]
    fn a_connection_without_all_watches_is_not_gone_on_with() {
        let (_dir, mut client, served) = watching(|listener| {
            let (mut second, _) = listener.accept().unwrap();
            answer(&mut second, Op::Watch, 77, b"OK\0");
            let (mut third, _) = listener.accept().unwrap();
            let set = [6, 7].map(|id| answer(&mut third, Op::Watch, id, b"OK\0"));
            answer(&mut third, Op::Read, 8, b"value");
            (set, second, third)
        });
        let error = client.read("/x").unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{error}");
        assert_eq!(client.read("/x").unwrap(), b"value");
        let (set, ..) = served.join().unwrap();
        assert_eq!(set, [payload::join(["/one", "a"]), payload::join(["/two", "b"])]);
    }

    /// Without a limit for its requests too: a daemon that is stopped takes no connection, and one that is killed is not back for ever.
    #[test]
    fn connecting_again_has_an_end() {
        let (_dir, path, listener) = daemon();
        let mut client = Client::connect(&path).unwrap();
        drop(listener.accept().unwrap());
        let mut taken = Vec::new();
        while let Ok(client) = Client::connect_within(&path, LIMIT) {
            taken.push(client);
        }
        client.again_within = LIMIT;
        let error = in_time(move || client.read("/local").unwrap_err());
        assert!(matches!(error, Error::Connect { .. }), "{error}");
    }

    #[test]
    fn an_answer_in_time_is_an_answer() {
        let (_dir, path, listener) = daemon();
        let answer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let answer = Message::new(Op::Read.to_wire(), 1, 0, b"value".to_vec()).to_bytes();
            std::io::Write::write_all(&mut stream, &answer).unwrap();
            stream
        });
        let mut client = Client::connect_within(&path, Duration::from_secs(20)).unwrap();
        assert_eq!(client.read("/local").unwrap(), b"value");
        answer.join().unwrap();
    }
}
