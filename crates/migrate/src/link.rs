//! A connection between two hosts. What carries it is behind [`Connector`], so that an authenticated transport can take TCP's place.

use crate::wire::{self, Frame, WireError};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long a connection may take to come up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the bytes of a greeting may take to come.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// A peer that is silent is asked after the first, then so often every second, so that a host that has lost its power is noticed in half a
/// minute: a shell whose source is gone for good is discarded only then.
const ALIVE_AFTER: Duration = Duration::from_secs(20);
const ALIVE_TRIES: u32 = 10;
/// Longest that a write may be stuck: a peer that takes nothing for so long is gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// Opens connections to peers.
pub trait Connector: Send + Sync {
    fn connect(&self, peer: &str) -> io::Result<Link>;
}

/// Both directions of a connection, before the greeting.
pub struct Link {
    pub reader: Box<dyn Read + Send>,
    pub writer: Box<dyn Write + Send>,
    /// Ends both directions, whoever is blocked on them.
    pub close: Arc<dyn Fn() + Send + Sync>,
    /// Limits how long one read may wait; `None`: for ever.
    pub patience: Patience,
}

/// Sets the limit for reads of a connection.
pub type Patience = Box<dyn Fn(Option<Duration>) -> io::Result<()> + Send>;

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Link")
    }
}

impl Link {
    pub fn tcp(stream: TcpStream) -> io::Result<Link> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        notice_death(&stream)?;
        let (reader, control, limited) = (stream.try_clone()?, stream.try_clone()?, stream.try_clone()?);
        let close = Arc::new(move || drop(control.shutdown(Shutdown::Both)));
        let patience: Patience = Box::new(move |limit| limited.set_read_timeout(limit));
        Ok(Link { reader: Box::new(reader), writer: Box::new(stream), close, patience })
    }

    pub fn unix(stream: UnixStream) -> io::Result<Link> {
        let (reader, control, limited) = (stream.try_clone()?, stream.try_clone()?, stream.try_clone()?);
        let close = Arc::new(move || drop(control.shutdown(Shutdown::Both)));
        let patience: Patience = Box::new(move |limit| limited.set_read_timeout(limit));
        Ok(Link { reader: Box::new(reader), writer: Box::new(stream), close, patience })
    }

    /// Greets, and splits into what is shared for writing and what one thread reads.
    ///
    /// # Errors
    /// The other side is no ferry daemon, or says nothing in time: a source that waited for ever could not even be told by its operator
    /// that the destination is fenced.
    pub fn greet(self) -> Result<(Sender, Receiver), WireError> {
        self.greet_within(GREETING_TIMEOUT)
    }

    fn greet_within(self, limit: Duration) -> Result<(Sender, Receiver), WireError> {
        (self.patience)(Some(limit))?;
        let mut writer = BufWriter::with_capacity(1 << 20, self.writer);
        wire::write_greeting(&mut writer)?;
        let mut reader = BufReader::with_capacity(1 << 20, self.reader);
        wire::read_greeting(&mut reader).map_err(|error| match error {
            WireError::Io(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                let text =
                    format!("no greeting came within {limit:?}; is it a ferry daemon, and does it still answer?");
                io::Error::new(io::ErrorKind::TimedOut, text).into()
            }
            error => error,
        })?;
        (self.patience)(None)?;
        Ok((Sender { writer: Arc::new(Mutex::new(writer)), close: self.close }, Receiver { reader }))
    }
}

/// The writing half; its clones write to the same connection.
#[derive(Clone)]
pub struct Sender {
    writer: Arc<Mutex<BufWriter<Box<dyn Write + Send>>>>,
    close: Arc<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sender")
    }
}

impl Sender {
    /// Writes a frame and sends it off.
    pub fn send(&self, frame: &Frame) -> Result<(), WireError> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        frame.write(&mut *writer)?;
        Ok(writer.flush()?)
    }

    /// Writes bytes of the image, whose CRC-32 is `crc`; they go off when enough have come together, or with the next frame.
    pub fn stream(&self, bytes: &[u8], crc: u32) -> Result<(), WireError> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        wire::write_stream(&mut *writer, bytes, crc)
    }

    pub fn close(&self) {
        (self.close)();
    }

    /// Closes the connection after this time unless the answer is dropped before: whoever is stuck in a write to it gets an error.
    pub fn close_after(&self, time: Duration) -> io::Result<Fuse> {
        let (fuse, cut) = mpsc::channel::<()>();
        let close = self.close.clone();
        std::thread::Builder::new().name("fuse".into()).spawn(move || {
            if cut.recv_timeout(time) == Err(mpsc::RecvTimeoutError::Timeout) {
                close();
            }
        })?;
        Ok(Fuse { _cut: fuse })
    }

    /// Whether this is the same connection.
    pub fn is(&self, other: &Sender) -> bool {
        Arc::ptr_eq(&self.writer, &other.writer)
    }
}

/// A connection is closed when its time is over, unless this is dropped before.
#[derive(Debug)]
#[must_use]
pub struct Fuse {
    _cut: mpsc::Sender<()>,
}

/// The reading half.
pub struct Receiver {
    reader: BufReader<Box<dyn Read + Send>>,
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Receiver")
    }
}

impl Receiver {
    /// The next frame; `None` when the peer has closed the connection.
    pub fn receive(&mut self) -> Result<Option<Frame>, WireError> {
        Frame::read(&mut self.reader)
    }
}

fn notice_death(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, ALIVE_AFTER)?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(1))?;
    Ok(sockopt::set_tcp_keepcnt(stream, ALIVE_TRIES)?)
}

/// Plain TCP: neither encrypted nor authenticated.
#[derive(Debug)]
pub struct Tcp {
    /// Used when the peer is given without a port.
    pub default_port: u16,
}

impl Connector for Tcp {
    fn connect(&self, peer: &str) -> io::Result<Link> {
        let addresses: Vec<_> = match peer.to_socket_addrs() {
            Ok(addresses) => addresses.collect(),
            Err(_) => (peer, self.default_port).to_socket_addrs()?.collect(),
        };
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in addresses {
            match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                Ok(stream) => return Link::tcp(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_peer_that_does_not_greet_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        // Accepted by the kernel, never answered.
        let error = Link::tcp(stream).unwrap().greet_within(Duration::from_millis(20)).unwrap_err();
        assert!(error.to_string().contains("no greeting came within 20ms"), "{error}");
    }

    #[test]
    fn after_the_greeting_silence_is_no_error() {
        let (here, there) = UnixStream::pair().unwrap();
        let other = std::thread::spawn(move || Link::unix(there).unwrap().greet().unwrap());
        let (_sender, mut receiver) = Link::unix(here).unwrap().greet_within(Duration::from_millis(200)).unwrap();
        let (sender, _receiver) = other.join().unwrap();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            sender.send(&Frame::Ping(1)).unwrap();
        });
        assert_eq!(receiver.receive().unwrap(), Some(Frame::Ping(1)));
    }

    #[test]
    fn a_write_that_is_stuck_ends_with_the_fuse() {
        let (here, there) = UnixStream::pair().unwrap();
        let other = std::thread::spawn(move || Link::unix(there).unwrap().greet().unwrap());
        let (sender, _receiver) = Link::unix(here).unwrap().greet().unwrap();
        let _silent = other.join().unwrap();
        let _fuse = sender.close_after(Duration::from_millis(50)).unwrap();
        let piece = vec![0; 1 << 20];
        let stuck = (0..100).map(|_| sender.stream(&piece, crc32fast::hash(&piece))).find(Result::is_err);
        assert!(stuck.is_some(), "nobody reads, and nothing stopped");
    }

    #[test]
    fn a_dead_host_is_noticed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let seen = stream.try_clone().unwrap();
        let _link = Link::tcp(stream).unwrap();
        assert!(rustix::net::sockopt::socket_keepalive(&seen).unwrap());
        assert_eq!(rustix::net::sockopt::tcp_keepidle(&seen).unwrap(), ALIVE_AFTER);
    }
}
