//! The switch at work: threads that carry frames between the hosts' network cards (QEMU `-netdev dgram` over unix datagram
//! sockets, one datagram a frame), the in-process peer, and the forwarding rules of [`super::switch`].

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::RunClock;
use super::pcap::Pcap;
use super::switch::{PortId, Switch};

/// Frames that may wait for one station. About 12 MB of a guest's full frames, 74 MB of a host's: more than TCP keeps in flight here,
/// and a paused host costs no more.
const QUEUE: usize = 8192;
/// How long a station that takes nothing holds up its own queue before a frame is dropped.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often a waiting thread looks whether it should end.
const TICK: Duration = Duration::from_millis(100);

struct Queued {
    due: Instant,
    frame: Arc<[u8]>,
}

struct Shared {
    clock: RunClock,
    switch: Mutex<Switch>,
    queues: Mutex<Vec<SyncSender<Queued>>>,
    pcap: Mutex<Option<Pcap>>,
    stop: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panicked while it held the lock left plain counters behind; they are still worth reporting.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn ingress(&self, port: PortId, frame: &[u8]) {
        let now = self.clock.now();
        if let Some(pcap) = lock(&self.pcap).as_mut()
            && let Err(error) = pcap.frame(now, frame)
        {
            tracing::warn!(%error, "capture file: a frame could not be written");
        }
        let deliveries = lock(&self.switch).ingress(now, port, frame);
        if deliveries.is_empty() {
            return;
        }
        let frame: Arc<[u8]> = frame.into();
        let queues = lock(&self.queues);
        for (to, due) in deliveries {
            let queued = Queued { due: self.clock.instant(due), frame: frame.clone() };
            let sent = queues.get(to.0).map(|q| q.try_send(queued));
            if let None | Some(Err(TrySendError::Full(_) | TrySendError::Disconnected(_))) = sent {
                lock(&self.switch).count_undelivered(to);
            }
        }
    }
}

/// The running switch. Dropping it ends its threads and removes its sockets.
pub struct Network {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    sockets: Vec<PathBuf>,
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Network").field("sockets", &self.sockets).finish_non_exhaustive()
    }
}

/// The near end of a port that is served inside this process.
#[derive(Debug)]
pub struct LocalPort {
    injector: Injector,
    frames: Receiver<Arc<[u8]>>,
}

/// Puts frames into one port of the switch.
#[derive(Clone)]
pub struct Injector {
    shared: Arc<Shared>,
    port: PortId,
}

impl std::fmt::Debug for Injector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Injector").field("port", &self.port).finish_non_exhaustive()
    }
}

impl Injector {
    /// Sends a frame as the port's station.
    pub fn send(&self, frame: &[u8]) {
        self.shared.ingress(self.port, frame);
    }
}

impl LocalPort {
    /// Sends a frame as the port's station.
    pub fn send(&self, frame: &[u8]) {
        self.injector.send(frame);
    }

    /// A handle with which others send from this port too.
    pub fn injector(&self) -> Injector {
        self.injector.clone()
    }

    /// Waits for a frame; `None` when none came in time or the switch is gone.
    pub fn receive(&self, timeout: Duration) -> Option<Arc<[u8]>> {
        self.frames.recv_timeout(timeout).ok()
    }
}

impl Network {
    /// Starts a switch with no ports; `pcap` is the capture file to write, if any.
    pub fn start(clock: RunClock, pcap: Option<&Path>) -> io::Result<Self> {
        let pcap = pcap.map(Pcap::create).transpose()?;
        let shared = Shared {
            clock,
            switch: Mutex::new(Switch::default()),
            queues: Mutex::new(Vec::new()),
            pcap: Mutex::new(pcap),
            stop: AtomicBool::new(false),
        };
        Ok(Self { shared: Arc::new(shared), threads: Vec::new(), sockets: Vec::new() })
    }

    /// The time line of the switch.
    pub fn clock(&self) -> RunClock {
        self.shared.clock
    }

    /// The forwarding rules, for looking at and for cutting cables. Hold it shortly: frames wait meanwhile.
    pub fn switch(&self) -> MutexGuard<'_, Switch> {
        lock(&self.shared.switch)
    }

    /// Adds a port for a QEMU network card:
    /// `-netdev dgram,id=N,local.type=unix,local.path=<card>,remote.type=unix,remote.path=<ours>`.
    /// `ours` is bound here and removed at the end; `card` is made by QEMU, which may start and end when it likes.
    pub fn add_card(&mut self, name: &str, ours: &Path, card: &Path) -> io::Result<PortId> {
        let socket = UnixDatagram::bind(ours)
            .map_err(|e| io::Error::new(e.kind(), format!("the socket of {name}'s port, {}: {e}", ours.display())))?;
        self.sockets.push(ours.to_owned());
        socket.set_read_timeout(Some(TICK))?;
        socket.set_write_timeout(Some(TICK))?;
        let receiver = socket.try_clone()?;
        let card = card.to_owned();
        let port = self.add_port(name, move |frame| socket.send_to(frame, &card).map(drop))?;
        let shared = self.shared.clone();
        self.threads.push(std::thread::Builder::new().name(format!("switch-{name}-in")).spawn(move || {
            let mut buffer = vec![0; 65_536];
            while !shared.stop.load(Ordering::Relaxed) {
                match receiver.recv(&mut buffer) {
                    Ok(len) => shared.ingress(port, &buffer[..len]),
                    Err(e) if retriable(&e) => {}
                    Err(error) => {
                        tracing::error!(%error, port = port.0, "switch: a port can't be read any more");
                        break;
                    }
                }
            }
        })?);
        Ok(port)
    }

    /// Adds a port that is served inside this process.
    pub fn add_local(&mut self, name: &str) -> io::Result<(PortId, LocalPort)> {
        let (tx, frames) = mpsc::channel();
        let port =
            self.add_port(name, move |frame| tx.send(frame.into()).map_err(|_| io::ErrorKind::BrokenPipe.into()))?;
        let injector = Injector { shared: self.shared.clone(), port };
        Ok((port, LocalPort { injector, frames }))
    }

    fn add_port(&mut self, name: &str, sink: impl Fn(&[u8]) -> io::Result<()> + Send + 'static) -> io::Result<PortId> {
        let (tx, queue) = mpsc::sync_channel::<Queued>(QUEUE);
        let port = self.switch().add_port(name);
        lock(&self.shared.queues).push(tx);
        let shared = self.shared.clone();
        self.threads.push(std::thread::Builder::new().name(format!("switch-{name}-out")).spawn(move || {
            while !shared.stop.load(Ordering::Relaxed) {
                let Ok(Queued { due, frame }) = queue.recv_timeout(TICK) else { continue };
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                let give_up = Instant::now() + PATIENCE;
                loop {
                    match sink(&frame) {
                        Ok(()) => break,
                        Err(e) if retriable(&e) && Instant::now() < give_up => {}
                        // The station is not there (yet, or any more), as with an unplugged cable.
                        Err(_) => {
                            lock(&shared.switch).count_undelivered(port);
                            break;
                        }
                    }
                    if shared.stop.load(Ordering::Relaxed) {
                        return;
                    }
                }
            }
        })?);
        Ok(port)
    }
}

fn retriable(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
        || error.raw_os_error() == Some(105) // ENOBUFS
}

impl Drop for Network {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        lock(&self.shared.queues).clear();
        for thread in self.threads.drain(..) {
            // A panic of that thread was already printed; there is nothing more to do about it here.
            let _ = thread.join();
        }
        for socket in &self.sockets {
            // It may have been removed with the run's folder.
            let _ = std::fs::remove_file(socket);
        }
        if let Some(pcap) = lock(&self.shared.pcap).as_mut()
            && let Err(error) = pcap.flush()
        {
            tracing::warn!(%error, "capture file: the last frames could not be written");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Mac;

    const A: Mac = Mac([0, 0x16, 0x3e, 0, 0, 1]);
    const B: Mac = Mac([0, 0x16, 0x3e, 0, 0, 2]);
    const PEER: Mac = Mac([2, 0, 0, 0, 0, 9]);
    const SECOND: Duration = Duration::from_secs(1);

    fn frame(src: Mac, dst: Mac, tag: u8) -> Vec<u8> {
        [dst.0.as_slice(), &src.0, &[0x08, 0x00], &[tag; 46]].concat()
    }

    fn card(dir: &Path, name: &str, net: &mut Network) -> UnixDatagram {
        let (ours, theirs) = (dir.join(format!("{name}.switch")), dir.join(format!("{name}.card")));
        net.add_card(name, &ours, &theirs).unwrap();
        let card = UnixDatagram::bind(theirs).unwrap();
        card.connect(ours).unwrap();
        card.set_read_timeout(Some(SECOND)).unwrap();
        card
    }

    fn next(card: &UnixDatagram) -> Option<Vec<u8>> {
        let mut buffer = [0; 2000];
        card.recv(&mut buffer).ok().map(|n| buffer[..n].to_vec())
    }

    #[test]
    fn two_cards_and_a_local_station_talk() {
        let dir = tempfile::tempdir().unwrap();
        let pcap = dir.path().join("net.pcap");
        let mut net = Network::start(RunClock::start(), Some(&pcap)).unwrap();
        let (a, b) = (card(dir.path(), "a", &mut net), card(dir.path(), "b", &mut net));
        let (_, peer) = net.add_local("peer").unwrap();

        a.send(&frame(A, B, 1)).unwrap();
        assert_eq!(next(&b), Some(frame(A, B, 1)));
        assert_eq!(peer.receive(SECOND).as_deref(), Some(frame(A, B, 1).as_slice()), "flooded: B is not known yet");
        b.send(&frame(B, A, 2)).unwrap();
        assert_eq!(next(&a), Some(frame(B, A, 2)));
        assert!(peer.receive(Duration::from_millis(50)).is_none(), "A is known: the peer must not see its frames");
        peer.send(&frame(PEER, B, 3));
        assert_eq!(next(&b), Some(frame(PEER, B, 3)));
        b.send(&frame(B, PEER, 4)).unwrap();
        assert_eq!(peer.receive(SECOND).as_deref(), Some(frame(B, PEER, 4).as_slice()));
        drop(net);
        assert!(!dir.path().join("a.switch").exists());
        assert_eq!(std::fs::metadata(pcap).unwrap().len(), 24 + 4 * (16 + 60));
    }

    #[test]
    fn a_delayed_cable_is_late_and_keeps_the_order() {
        let dir = tempfile::tempdir().unwrap();
        let mut net = Network::start(RunClock::start(), None).unwrap();
        let a = card(dir.path(), "a", &mut net);
        let (_, peer) = net.add_local("peer").unwrap();
        let port = net.switch().port_by_name("a").unwrap();
        net.switch().cable_mut(port).unwrap().delay = Duration::from_millis(80);
        let start = Instant::now();
        for tag in 0..20 {
            a.send(&frame(A, PEER, tag)).unwrap();
        }
        for tag in 0..20 {
            assert_eq!(peer.receive(SECOND).unwrap()[14], tag);
        }
        assert!(start.elapsed() >= Duration::from_millis(80));
    }

    #[test]
    fn a_port_in_use_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
        let _other = UnixDatagram::bind(&ours).unwrap();
        let mut net = Network::start(RunClock::start(), None).unwrap();
        let error = net.add_card("a", &ours, &theirs).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        let said = error.to_string();
        assert!(said.contains("of a's port") && said.contains(&ours.display().to_string()), "{said}");
        drop(net);
        assert!(ours.exists(), "another's socket is left alone");
    }

    #[test]
    fn a_host_that_is_gone_costs_its_frames_only() {
        let dir = tempfile::tempdir().unwrap();
        let mut net = Network::start(RunClock::start(), None).unwrap();
        let a = card(dir.path(), "a", &mut net);
        let (_, peer) = net.add_local("peer").unwrap();
        a.send(&frame(A, PEER, 0)).unwrap();
        assert!(peer.receive(SECOND).is_some());
        drop(a);
        for _ in 0..10 {
            peer.send(&frame(PEER, A, 1));
        }
        let port = net.switch().port_by_name("a").unwrap();
        let until = Instant::now() + SECOND;
        while net.switch().counters(port).dropped_by_station < 10 {
            assert!(Instant::now() < until, "the frames to the dead host were not counted as lost");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
