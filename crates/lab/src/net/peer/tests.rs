//! The peer against another smoltcp stack that plays the witness, over a real switch.

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant as SmolInstant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr, IpEndpoint};
use witness::report::{Anomaly, Gap, JournalAck, Noticed};
use witness::wire::{FRAME_LEN, Frame, FrameKind, Service, VERSION};

use super::*;
use crate::net::ports::Network;

const PEER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 10);
const QUIET: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 11);
const GUEST_MAC: Mac = Mac([0, 0x16, 0x3e, 0, 0, 1]);
const QUIET_MAC: Mac = Mac([0, 0x16, 0x3e, 0, 0, 2]);
const BASE: u16 = witness::wire::DEFAULT_PORT;
const LIMIT: Duration = Duration::from_secs(30);

struct Card(LocalPort, std::collections::VecDeque<Arc<[u8]>>);
struct Rx(Arc<[u8]>);
struct Tx<'a>(&'a LocalPort);

impl phy::RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let r = f(&mut frame);
        self.0.send(&frame);
        r
    }
}

impl Device for Card {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;
    fn receive(&mut self, _: SmolInstant) -> Option<(Rx, Tx<'_>)> {
        self.1.pop_front().map(|f| (Rx(f), Tx(&self.0)))
    }
    fn transmit(&mut self, _: SmolInstant) -> Option<Tx<'_>> {
        Some(Tx(&self.0))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut c = DeviceCapabilities::default();
        c.medium = Medium::Ethernet;
        c.max_transmission_unit = 1514;
        c
    }
}

/// A guest that is driven by the test, one poll at a time.
struct FakeGuest {
    card: Card,
    clock: RunClock,
    interface: Interface,
    sockets: SocketSet<'static>,
    quiet_frames: u64,
}

impl FakeGuest {
    fn new(port: LocalPort, clock: RunClock) -> Self {
        let mut card = Card(port, Default::default());
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress(GUEST_MAC.0)));
        let mut interface = Interface::new(config, &mut card, SmolInstant::ZERO);
        interface.update_ip_addrs(|a| a.push(IpCidr::new(IpAddress::from(GUEST), 24)).unwrap());
        Self { card, clock, interface, sockets: SocketSet::new(Vec::new()), quiet_frames: 0 }
    }

    fn tcp(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 65_536]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    fn connect(&mut self, service: Service, local: u16) -> SocketHandle {
        let handle = self.tcp();
        let to = IpEndpoint::new(PEER.into(), service.port(BASE));
        self.sockets.get_mut::<tcp::Socket<'_>>(handle).connect(self.interface.context(), to, local).unwrap();
        self.until(|g| g.sockets.get_mut::<tcp::Socket<'_>>(handle).may_send());
        handle
    }

    fn udp(&mut self, port: u16) -> SocketHandle {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 65_536]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(port).unwrap();
        self.sockets.add(socket)
    }

    fn send_udp(&mut self, handle: SocketHandle, service: Service, bytes: &[u8]) {
        let to = IpEndpoint::new(PEER.into(), service.port(BASE));
        self.sockets.get_mut::<udp::Socket<'_>>(handle).send_slice(bytes, to).unwrap();
        self.poll();
    }

    fn poll(&mut self) {
        while let Some(frame) = self.card.0.receive(Duration::from_millis(1)) {
            self.quiet_frames += u64::from(frame.starts_with(&QUIET_MAC.0));
            self.card.1.push_back(frame);
        }
        let now = SmolInstant::from_micros(self.clock.now().as_micros() as i64);
        self.interface.poll(now, &mut self.card, &mut self.sockets);
    }

    fn until(&mut self, mut ready: impl FnMut(&mut Self) -> bool) {
        let end = std::time::Instant::now() + LIMIT;
        loop {
            self.poll();
            if ready(self) {
                return;
            }
            assert!(std::time::Instant::now() < end, "nothing happened in time");
        }
    }
}

fn envelope(seq: u64, body: Body) -> Vec<u8> {
    serde_json::to_vec(&Envelope { v: VERSION, run: 7, seq, mono_ns: seq * 1000, real_ns: 0, body }).unwrap()
}

fn frame(kind: FrameKind, seq: u64) -> [u8; FRAME_LEN] {
    Frame { kind, run: 7, seq, sent_ns: seq * 10 }.encode()
}

fn set_up(rates: Rates, log_dir: Option<PathBuf>) -> (Network, Peer, FakeGuest) {
    let clock = RunClock::start();
    let mut net = Network::start(clock, None).unwrap();
    let (_, guest) = net.add_local("a").unwrap();
    let (_, port) = net.add_local("peer").unwrap();
    let link = GuestLink { name: "g".to_owned(), addr: GUEST, quiet: Some((QUIET_MAC, QUIET)), rates };
    let mac = Mac([2, 0, 0, 0, 0, 1]);
    let config = PeerConfig { mac, addr: PEER, prefix: 24, port: BASE, guests: vec![link], log_dir };
    let peer = Peer::start(port, clock, config).unwrap();
    (net, peer, FakeGuest::new(guest, clock))
}

#[test]
fn reports_come_by_udp_and_tcp_and_count_once() {
    let dir = tempfile::tempdir().unwrap();
    let (_net, peer, mut guest) = set_up(Rates::default(), Some(dir.path().to_owned()));
    let udp = guest.udp(5000);
    let beat = envelope(1, Body::Beat(Beat { up_ms: 5, ..Beat::default() }));
    guest.send_udp(udp, Service::Report, &beat);
    guest.send_udp(udp, Service::Report, &envelope(2, Body::Journal(JournalAck { record: 1, crc: 99 })));
    guest.send_udp(udp, Service::Report, b"{\"v\":1,\"nonsense\":true}");
    let gap = Gap { at_ns: 1, mono_ns: 2, boot_ns: 3, real_ns: 4, tsc: 5 };
    let anomaly = Body::Anomaly(Anomaly { mono_ns: 1, what: Noticed::ClockGap(gap) });
    let tcp = guest.connect(Service::Report, 5001);
    let lines = [beat, envelope(3, anomaly), envelope(4, Body::Snapshot(Box::default()))].join(&b"\n"[..]);
    guest.sockets.get_mut::<tcp::Socket<'_>>(tcp).send_slice(&lines).unwrap();
    guest.sockets.get_mut::<tcp::Socket<'_>>(tcp).send_slice(b"\n").unwrap();
    guest.until(|_| peer.view()[0].reports == 4);
    let view = peer.view().remove(0);
    assert_eq!((view.beats.len(), view.anomalies.len(), view.snapshots.len()), (1, 1, 1));
    assert_eq!((view.journal[0].record, view.journal[0].crc), (1, 99));
    assert_eq!((view.bad_reports, view.restarts), (1, 0));
    drop(peer);
    let log = std::fs::read_to_string(dir.path().join("reports-g.jsonl")).unwrap();
    assert_eq!(log.lines().count(), 4);
}

#[test]
fn streams_are_echoed_numbered_and_timed() {
    let (_net, peer, mut guest) = set_up(Rates::default(), None);
    let udp = guest.udp(5000);
    for seq in [1, 2, 4] {
        guest.send_udp(udp, Service::UdpStream, &frame(FrameKind::Udp, seq));
    }
    guest.send_udp(udp, Service::UdpStream, b"damaged");
    // All of these have come before the silence begins, however busy the machine is.
    guest.until(|_| peer.view()[0].udp_stream.counts.corrupt == 1);
    std::thread::sleep(Duration::from_millis(150));
    guest.send_udp(udp, Service::UdpStream, &frame(FrameKind::Udp, 5));
    let mut echoes = 0;
    guest.until(|g| {
        while g.sockets.get_mut::<udp::Socket<'_>>(udp).recv().is_ok() {
            echoes += 1;
        }
        echoes == 5
    });
    let tcp = guest.connect(Service::TcpStream, 5001);
    let bytes: Vec<u8> = (1..=100).flat_map(|n| frame(FrameKind::Tcp, n)).collect();
    // Cut in the middle of a frame, as TCP may.
    for part in bytes.chunks(45) {
        let mut left = part;
        while !left.is_empty() {
            // On a busy machine the buffer may be full.
            let taken = guest.sockets.get_mut::<tcp::Socket<'_>>(tcp).send_slice(left).unwrap();
            left = &left[taken..];
            guest.poll();
        }
    }
    let mut back = Vec::new();
    guest.until(|g| {
        let socket = g.sockets.get_mut::<tcp::Socket<'_>>(tcp);
        while socket.can_recv() {
            socket.recv(|b| (b.len(), back.extend_from_slice(b))).unwrap();
        }
        back.len() == bytes.len()
    });
    assert_eq!(back, bytes);
    let view = peer.view().remove(0);
    let counts = view.udp_stream.counts;
    assert_eq!((counts.received, counts.lost, counts.corrupt), (4, 1, 1));
    let longest = view.udp_stream.silences[0].length();
    assert!(longest >= Duration::from_millis(150), "{longest:?}");
    assert_eq!((view.tcp_stream.counts.received, view.tcp_stream.counts.lost), (100, 0));
    assert_eq!((view.tcp_accepted, view.tcp_broken), (1, 0));

    guest.sockets.get_mut::<tcp::Socket<'_>>(tcp).abort();
    guest.until(|_| peer.view()[0].tcp_broken == 1);
    guest.connect(Service::TcpStream, 5002);
    guest.until(|_| peer.view()[0].tcp_accepted == 2);
}

#[test]
fn the_peers_own_streams_start_with_the_witness_and_are_counted() {
    let (_net, peer, mut guest) = set_up(Rates { tcp: 100, udp: 100, quiet: 100 }, None);
    peer.begin("g");
    let echo = guest.udp(Service::GuestUdpEcho.port(BASE));
    let listen = guest.tcp();
    guest.sockets.get_mut::<tcp::Socket<'_>>(listen).listen(Service::GuestTcpEcho.port(BASE)).unwrap();
    for _ in 0..20 {
        guest.poll();
    }
    assert_eq!(guest.quiet_frames, 0, "nothing is sent before the witness has reported");
    guest.send_udp(echo, Service::Report, &envelope(1, Body::Beat(Beat::default())));
    guest.until(|g| {
        while let Some((bytes, from)) = {
            let socket = g.sockets.get_mut::<udp::Socket<'_>>(echo);
            socket.recv().ok().map(|(b, m)| (b.to_vec(), m.endpoint))
        } {
            g.sockets.get_mut::<udp::Socket<'_>>(echo).send_slice(&bytes, from).unwrap();
        }
        let socket = g.sockets.get_mut::<tcp::Socket<'_>>(listen);
        if socket.can_recv() {
            let bytes = socket.recv(|b| (b.len(), b.to_vec())).unwrap();
            socket.send_slice(&bytes).unwrap();
        }
        let view = peer.view().remove(0);
        view.tcp_echo.counts.received >= 20 && view.udp_echo.counts.received >= 20 && g.quiet_frames >= 20
    });
    let view = peer.view().remove(0);
    assert_eq!((view.tcp_echo.counts.lost, view.udp_echo.counts.corrupt, view.tcp_broken), (0, 0, 0));
    assert!(view.quiet_sent >= guest.quiet_frames);
    peer.rest("g");
    let quiet = {
        std::thread::sleep(Duration::from_millis(50));
        peer.view()[0].quiet_sent
    };
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(peer.view()[0].quiet_sent, quiet, "a resting guest is sent nothing more");
}

#[test]
fn a_command_is_repeated_until_it_is_answered() {
    let (_net, peer, mut guest) = set_up(Rates::default(), None);
    let control = guest.udp(Service::Control.port(BASE));
    peer.command("g", witness::wire::Command::Finish);
    let mut asked = 0;
    let mut from = None;
    guest.until(|g| {
        while let Ok((bytes, meta)) = g.sockets.get_mut::<udp::Socket<'_>>(control).recv() {
            assert_eq!(bytes, b"stop workload and final report");
            from = Some(meta.endpoint);
            asked += 1;
        }
        asked == 2
    });
    let answer = witness::wire::Command::Finish.answer().as_bytes();
    guest.sockets.get_mut::<udp::Socket<'_>>(control).send_slice(answer, from.unwrap()).unwrap();
    let end = std::time::Instant::now() + Duration::from_millis(1500);
    while std::time::Instant::now() < end {
        guest.poll();
        assert!(guest.sockets.get_mut::<udp::Socket<'_>>(control).recv().is_err(), "asked again after the answer");
    }
    let error = peer.finish("g", Duration::from_millis(50)).expect_err("no final report was sent");
    assert!(error.to_string().contains("guest g: no final report came"), "{error}");
}
