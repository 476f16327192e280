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

mod error;
pub mod migration;
mod transport;

pub use error::{Error, Result};
pub use xenstore_wire::{Access, Errno, Perm};

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};
use transport::Transport;
use xenstore_wire::{FrameDecoder, Message, Op, PAYLOAD_MAX, payload, perm};

/// Where a daemon listens if `XENSTORED_PATH` does not say otherwise.
pub const DEFAULT_SOCKET: &str = "/run/xenstored/socket";
/// How often [`Client::transaction`] tries before it gives up.
const TRANSACTION_TRIES: u32 = 1000;

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
    io: Transport,
    decoder: FrameDecoder,
    /// Bytes read from the transport and not yet framed.
    unread: VecDeque<u8>,
    events: VecDeque<Event>,
    next_req: u32,
    tx: u32,
    /// For each request.
    limit: Option<Duration>,
    /// An answer has not come in time; it could come later and be taken for another's.
    late: bool,
}

impl Client {
    /// Connects as xenstore's own tools do: to `XENSTORED_PATH`, or [`DEFAULT_SOCKET`], or `/dev/xen/xenbus`.
    pub fn open() -> Result<Client> {
        if let Some(p) = std::env::var_os("XENSTORED_PATH") {
            return Client::connect(p);
        }
        if Path::new(DEFAULT_SOCKET).exists() { Client::connect(DEFAULT_SOCKET) } else { Client::open_device() }
    }

    /// As [`Client::open`]; connecting, and then each request, fails when the daemon has not answered within `limit`. After that the
    /// connection is of no use any more. A device has no limit for writing.
    pub fn open_within(limit: Duration) -> Result<Client> {
        match std::env::var_os("XENSTORED_PATH") {
            Some(path) => Client::connect_within(path, limit),
            None if Path::new(DEFAULT_SOCKET).exists() => Client::connect_within(DEFAULT_SOCKET, limit),
            None => Ok(Client { limit: Some(limit), ..Client::open_device()? }),
        }
    }

    /// As [`Client::connect`], with a limit as for [`Client::open_within`].
    pub fn connect_within(path: impl AsRef<Path>, limit: Duration) -> Result<Client> {
        Ok(Client { limit: Some(limit), ..Client::over(Transport::connect_within(path.as_ref(), limit)?) })
    }

    /// Connects to a daemon's socket.
    pub fn connect(path: impl AsRef<Path>) -> Result<Client> {
        Ok(Client::over(Transport::connect(path.as_ref())?))
    }

    /// Opens the kernel's device, `/dev/xen/xenbus`.
    pub fn open_device() -> Result<Client> {
        Ok(Client::over(Transport::device(Path::new("/dev/xen/xenbus"))?))
    }

    fn over(io: Transport) -> Client {
        Client {
            io,
            decoder: FrameDecoder::new(),
            unread: VecDeque::new(),
            events: VecDeque::new(),
            next_req: 1,
            tx: 0,
            limit: None,
            late: false,
        }
    }

    /// Sends one request and waits for its reply. The building block of all the other calls; `what` goes into errors.
    ///
    /// # Errors
    /// The daemon's error, with operation and `what`; a broken connection; a payload that is too long (`E2BIG`,
    /// without sending it).
    pub fn request(&mut self, op: Op, tx: u32, body: &[u8], what: &str) -> Result<Vec<u8>> {
        if body.len() > PAYLOAD_MAX {
            return Err(Error::refused(op, what, Errno::E2BIG));
        }
        let id = self.next_req;
        self.next_req = self.next_req.wrapping_add(1).max(1);
        let limit = self.limit.unwrap_or_default();
        let late = || Error::TimedOut { op, what: what.into(), limit };
        if self.late {
            return Err(late());
        }
        let deadline = self.limit.map(|limit| Instant::now() + limit);
        match self.io.send(&Message::new(op.to_wire(), id, tx, body.to_vec()).to_bytes()) {
            Err(Error::Io(e)) if self.limit.is_some() && e.kind() == std::io::ErrorKind::WouldBlock => {
                self.late = true;
                return Err(late());
            }
            sent => sent?,
        }
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

    /// The next event, waiting up to `timeout` (for ever if `None`). `Ok(None)` when the time is over.
    pub fn next_event(&mut self, timeout: Option<Duration>) -> Result<Option<Event>> {
        if let Some(e) = self.events.pop_front() {
            return Ok(Some(e));
        }
        let deadline = timeout.map(|t| Instant::now() + t);
        match self.next_message(deadline)? {
            None => Ok(None),
            Some(m) if m.header.op == Op::WatchEvent.to_wire() => {
                self.queue_event(&m)?;
                Ok(self.events.pop_front())
            }
            Some(_) => Err(Error::protocol(Op::WatchEvent, "a reply that nobody asked for")),
        }
    }

    /// Registers a watch. An event for the path itself follows at once.
    pub fn watch(&mut self, path: &str, token: &str) -> Result<()> {
        self.request(Op::Watch, 0, &payload::join([path, token]), path).map(drop)
    }

    /// Removes a watch.
    pub fn unwatch(&mut self, path: &str, token: &str) -> Result<()> {
        self.request(Op::Unwatch, 0, &payload::join([path, token]), path).map(drop)
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
        self.tx = id;
        Ok(Transaction { client: self, id, open: true })
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

impl AsFd for Client {
    /// For waiting with others; call [`Client::next_event`] with a time of zero once it is readable.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.as_fd()
    }
}

/// An open transaction.
#[derive(Debug)]
pub struct Transaction<'a> {
    client: &'a mut Client,
    id: u32,
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
        self.client.tx = 0;
        self.client.request(Op::TransactionEnd, self.id, &payload::join([how]), "").map(drop)
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
        self.client.request(op, self.id, body, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    const LIMIT: Duration = Duration::from_millis(50);

    fn daemon() -> (tempfile::TempDir, std::path::PathBuf, UnixListener) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        (dir, path, listener)
    }

    /// A daemon that is stopped: its kernel takes the connection and the request, nobody answers.
    #[test]
    fn a_daemon_that_hangs_is_given_up() {
        let (_dir, path, listener) = daemon();
        let mut client = Client::connect_within(&path, LIMIT).unwrap();
        let since = Instant::now();
        let error = client.read("/local").unwrap_err();
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
        let since = Instant::now();
        let mut taken = Vec::new();
        let error = loop {
            match Client::connect_within(&path, LIMIT) {
                Ok(client) => taken.push(client),
                Err(error) => break error,
            }
            assert!(taken.len() < 10_000, "the queue has no end");
        };
        assert!(matches!(error, Error::Connect { .. }), "{error}");
        assert!(since.elapsed() < Duration::from_secs(20));
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
