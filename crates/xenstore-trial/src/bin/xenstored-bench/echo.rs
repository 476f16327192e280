//! A server that sends back what it gets, by what any daemon must do for a request: wait with epoll for all its clients, read once, write
//! once. What the socket itself costs.

use anyhow::{Context, Result};
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Serves connections for ever.
pub fn serve(socket: &Path) -> Result<()> {
    const LISTENER: u64 = u64::MAX;
    let listener = UnixListener::bind(socket)?;
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let add = |fd: &dyn std::os::fd::AsFd, token| {
        epoll::add(&poll, fd.as_fd(), epoll::EventData::new_u64(token), epoll::EventFlags::IN)
    };
    add(&listener, LISTENER)?;
    let mut streams = Vec::new();
    let (mut buf, mut ready) = ([0; 4096], Vec::with_capacity(64));
    loop {
        ready.clear();
        epoll::wait(&poll, rustix::buffer::spare_capacity(&mut ready), None)?;
        for event in &ready {
            let token = event.data.u64();
            if token == LISTENER {
                let (stream, _) = listener.accept()?;
                add(&stream, streams.len() as u64)?;
                streams.push(Some(stream));
                continue;
            }
            let place = streams.get_mut(token as usize).context("a stream that is none")?;
            let Some(stream) = place else { continue };
            match stream.read(&mut buf)? {
                0 => *place = None,
                n => stream.write_all(&buf[..n])?,
            }
        }
    }
}

/// The same by a loop that does nothing but receive and send, without a look at who has something: no daemon for several clients can be
/// faster.
pub fn serve_in_a_loop(socket: &Path) -> Result<()> {
    /// How often the clients are asked before a new one is.
    const ROUNDS: usize = 100;
    let listener = UnixListener::bind(socket)?;
    listener.set_nonblocking(true)?;
    let (mut streams, mut buf) = (Vec::new(), [0; 4096]);
    loop {
        match listener.accept() {
            Ok((stream, _)) => streams.push(stream),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e.into()),
        }
        for _ in 0..ROUNDS {
            let mut failed = None;
            streams.retain(|stream| match rustix::net::recv(stream, &mut buf, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => false,
                Ok((_, n)) => match rustix::net::send(stream, &buf[..n], SendFlags::NOSIGNAL) {
                    Ok(sent) => sent == n,
                    Err(_) => false,
                },
                Err(Errno::AGAIN) => true,
                Err(e) => {
                    failed = Some(e);
                    false
                }
            });
            if let Some(e) = failed {
                return Err(e.into());
            }
        }
    }
}
