//! A connection between two hosts. What carries it is behind [`Connector`], so that an authenticated transport can take TCP's place.

use crate::wire::{self, Frame, WireError};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long a connection may take to come up, and a greeting to come.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
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
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Link")
    }
}

impl Link {
    pub fn tcp(stream: TcpStream) -> io::Result<Link> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let (reader, control) = (stream.try_clone()?, stream.try_clone()?);
        let close = Arc::new(move || drop(control.shutdown(Shutdown::Both)));
        Ok(Link { reader: Box::new(reader), writer: Box::new(stream), close })
    }

    pub fn unix(stream: UnixStream) -> io::Result<Link> {
        let (reader, control) = (stream.try_clone()?, stream.try_clone()?);
        let close = Arc::new(move || drop(control.shutdown(Shutdown::Both)));
        Ok(Link { reader: Box::new(reader), writer: Box::new(stream), close })
    }

    /// Greets, and splits into what is shared for writing and what one thread reads.
    pub fn greet(self) -> Result<(Sender, Receiver), WireError> {
        let mut writer = BufWriter::with_capacity(1 << 20, self.writer);
        wire::write_greeting(&mut writer)?;
        let mut reader = BufReader::with_capacity(1 << 20, self.reader);
        wire::read_greeting(&mut reader)?;
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

    /// Whether this is the same connection.
    pub fn is(&self, other: &Sender) -> bool {
        Arc::ptr_eq(&self.writer, &other.writer)
    }
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
