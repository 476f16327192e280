use crate::error::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Between two attempts to connect.
pub(crate) const PAUSE: Duration = Duration::from_millis(20);

/// Where a daemon is reached.
#[derive(Debug)]
pub(crate) enum Place {
    Socket(PathBuf),
    Device(PathBuf),
}

impl Place {
    /// A socket ends with its daemon. The kernel's device outlives it: what the daemon owes comes from the next one.
    pub(crate) fn is_socket(&self) -> bool {
        matches!(self, Place::Socket(_))
    }

    /// Connects, waiting up to `patience` for a daemon that is being started, and up to `queue` for one that is there to take the
    /// connection. `limit` is for each write then; a device has none.
    pub(crate) fn open_within(
        &self,
        patience: Duration,
        queue: Duration,
        limit: Option<Duration>,
    ) -> Result<Transport> {
        let path = match self {
            Place::Device(path) => return Transport::device(path),
            Place::Socket(path) => path,
        };
        let end = Instant::now() + patience;
        loop {
            match Transport::connect(path, queue, limit) {
                // Nobody listens there yet.
                Err(Error::Connect { source, .. })
                    if matches!(source.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound)
                        && Instant::now() + PAUSE < end =>
                {
                    std::thread::sleep(PAUSE);
                }
                r => return r,
            }
        }
    }
}

#[derive(Debug)]
pub(crate) enum Transport {
    Socket(UnixStream),
    Device(File),
}

impl Transport {
    /// A daemon that is stopped takes no connection from its full queue.
    fn connect(path: &Path, queue: Duration, limit: Option<Duration>) -> Result<Transport> {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};
        let open = || -> std::io::Result<UnixStream> {
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(queue))?;
            connect(&socket, &SocketAddrUnix::new(path)?)?;
            sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, limit)?;
            Ok(socket.into())
        };
        Ok(Transport::Socket(open().map_err(|source| Error::Connect { path: path.display().to_string(), source })?))
    }

    fn device(path: &Path) -> Result<Transport> {
        let fail = |source| Error::Connect { path: path.display().to_string(), source };
        Ok(Transport::Device(File::options().read(true).write(true).open(path).map_err(fail)?))
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Transport::Socket(s) => s.write_all(bytes),
            Transport::Device(f) => f.write_all(bytes),
        }
        .map_err(Error::Io)
    }

    /// Nothing more is sent or received: a socket says from now on that it is broken.
    pub(crate) fn give_up(&self) {
        if let Transport::Socket(s) = self {
            // One that is not connected any more is given up already.
            let _ = s.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Blocks until there is something. The end of the stream is an error.
    pub(crate) fn receive(&mut self, buf: &mut [u8]) -> Result<usize> {
        loop {
            let r = match self {
                Transport::Socket(s) => s.read(buf),
                Transport::Device(f) => f.read(buf),
            };
            match r {
                Ok(0) => return Err(Error::Io(ErrorKind::UnexpectedEof.into())),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                r => return r.map_err(Error::Io),
            }
        }
    }

    /// False when the deadline comes first.
    pub(crate) fn wait_readable(&self, deadline: Option<Instant>) -> Result<bool> {
        let Some(deadline) = deadline else { return Ok(true) };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let time = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(self, PollFlags::IN)], Some(&time)) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::Io(e.into())),
            }
        }
    }
}

impl AsFd for Transport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Transport::Socket(s) => s.as_fd(),
            Transport::Device(f) => f.as_fd(),
        }
    }
}
