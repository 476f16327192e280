use crate::error::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(crate) enum Transport {
    Socket(UnixStream),
    Device(File),
}

impl Transport {
    pub(crate) fn connect(path: &Path) -> Result<Transport> {
        let fail = |source| Error::Connect { path: path.display().to_string(), source };
        Ok(Transport::Socket(UnixStream::connect(path).map_err(fail)?))
    }

    /// Also connecting waits no longer: a daemon that is stopped takes no connection from its full queue.
    pub(crate) fn connect_within(path: &Path, limit: Duration) -> Result<Transport> {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};
        let open = || -> std::io::Result<UnixStream> {
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(limit))?;
            connect(&socket, &SocketAddrUnix::new(path)?)?;
            Ok(socket.into())
        };
        Ok(Transport::Socket(open().map_err(|source| Error::Connect { path: path.display().to_string(), source })?))
    }

    pub(crate) fn device(path: &Path) -> Result<Transport> {
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
