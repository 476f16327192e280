//! The daemon does not sleep over what came of asking a client by itself.

use super::busy::UNWATCHED_FROM;
use super::events::{Daemon, JournalPlace};
use super::log::Log;
use crate::store::Options;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use xenstore_wire::{Message, Op};

fn request() -> Vec<u8> {
    Message::new(Op::Read.to_wire(), 1, 0, b"/\0".to_vec()).to_bytes()
}

/// A daemon with so many tools that all asked for something just now.
fn with_busy_tools(dir: &std::path::Path, many: usize) -> (Daemon, Vec<UnixStream>) {
    let place = JournalPlace { dir: dir.to_owned(), on: false };
    let socket = dir.join("socket");
    let mut d = Daemon::start_at(
        Options::default(),
        Log::start(Some(dir.join("log").as_path()), false, false).unwrap(),
        None,
        place,
        &socket,
    )
    .unwrap();
    let request = request();
    let mut tools: Vec<_> = (0..many).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    for t in &mut tools {
        t.write_all(&request).unwrap();
    }
    let mut events = Vec::with_capacity(64);
    for t in &mut tools {
        // Not before all are accepted and served, so that nobody is left for epoll to tell of.
        while d.turn(&mut events, false).is_ok() && {
            t.set_nonblocking(true).unwrap();
            t.read(&mut [0; 64]).is_err()
        } {}
    }
    d.turn(&mut events, false).unwrap();
    (d, tools)
}

#[test]
fn something_follows_from_a_client_that_breaks_the_rules_or_goes() {
    let dir = tempfile::tempdir().unwrap();
    let (mut d, mut tools) = with_busy_tools(dir.path(), 6);
    // A request that is carried out, and in the same breath a message of 4 GiB.
    let mut bytes = Message::new(Op::Mkdir.to_wire(), 1, 0, b"/made\0".to_vec()).to_bytes();
    bytes.extend([0xff; 16]);
    tools[0].write_all(&bytes).unwrap();
    assert!(d.ask_recent(), "one had something, though it is gone now");
    assert!(d.store.tree().get(b"/made").is_some());
    tools.pop();
    assert!(d.ask_recent(), "one is gone");
    assert!(!d.ask_recent(), "nothing happened");
}

#[test]
fn nothing_is_asked_for_ever_where_there_is_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (mut d, _tools) = with_busy_tools(dir.path(), 6);
    assert!(!d.ask_recent());
}

/// Those that always had something are not watched by epoll any more. Before the daemon sleeps they are.
#[test]
fn the_busiest_are_heard_after_a_sleep() {
    const LONG: Duration = Duration::from_secs(3);
    let dir = tempfile::tempdir().unwrap();
    let (mut d, mut tools) = with_busy_tools(dir.path(), 6);
    for _ in 0..UNWATCHED_FROM {
        for t in &mut tools {
            t.write_all(&request()).unwrap();
        }
        assert_eq!(d.ask_each_recent(&mut false), tools.len());
        for t in &mut tools {
            assert!(t.read(&mut [0; 64]).unwrap() > 0);
        }
    }
    assert_eq!(d.watched(), 0);
    let (mut asks, mut hears) = (tools[3].try_clone().unwrap(), tools.remove(3));
    let (done, told) = std::sync::mpsc::channel();
    let socket = dir.path().join("socket");
    std::thread::scope(|s| {
        s.spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            asks.write_all(&request()).unwrap();
            if told.recv_timeout(LONG).is_err() {
                // Wakes it in any case.
                let _ = UnixStream::connect(socket);
            }
        });
        d.tire();
        let (start, mut events) = (Instant::now(), Vec::with_capacity(64));
        while hears.read(&mut [0; 64]).is_err() {
            assert!(start.elapsed() < LONG, "it sleeps on");
            d.turn(&mut events, true).unwrap();
        }
        done.send(()).unwrap();
    });
    assert_eq!(d.watched(), 6);
}
