//! The peer's thread: smoltcp over its port of the switch, and the services of [`witness::wire::Service`].

use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr, IpEndpoint};
use witness::wire::{Command, FRAME_LEN, Frame, FrameKind, LineReader, MAX_DATAGRAM, Service};

use super::raw::{End, datagram};
use super::{GuestLink, Known, Order, PeerConfig, Shared};
use crate::net::ports::{Injector, LocalPort};
use crate::net::{Mac, RunClock};

/// Sockets that wait for connections to each TCP service: enough for four guests that reconnect at once.
const LISTENERS: usize = 4;
/// Bytes buffered each way by a TCP socket.
const TCP_BUFFER: usize = 64 << 10;
/// The loop looks at its orders and its clock at least this often.
const TICK: Duration = Duration::from_millis(10);
/// A command or a connection that got no answer is tried again after this long.
const AGAIN: Duration = Duration::from_secs(1);

/// The port of the switch as smoltcp's device.
struct Card {
    inbox: VecDeque<Arc<[u8]>>,
    out: Injector,
}

struct Incoming(Arc<[u8]>);
struct Outgoing<'a>(&'a Injector);

impl phy::RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.send(&frame);
        result
    }
}

impl Device for Card {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Incoming, Outgoing<'_>)> {
        let frame = self.inbox.pop_front()?;
        Some((Incoming(frame), Outgoing(&self.out)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Outgoing<'_>> {
        Some(Outgoing(&self.out))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

/// What a TCP socket that accepts is for, and what it holds of an unfinished item.
enum Serving {
    Reports(LineReader),
    Stream(Vec<u8>),
}

struct Listener {
    handle: SocketHandle,
    service: Service,
    serving: Serving,
    /// Who is connected.
    remote: Option<Ipv4Addr>,
}

/// Sends so many packets a second, counted from its start, so that a late loop catches up without bursts over one second.
struct Pacer {
    every: Duration,
    next: Duration,
}

impl Pacer {
    fn new(rate: u32, now: Duration) -> Option<Self> {
        (rate > 0).then(|| Self { every: Duration::from_secs(1) / rate, next: now })
    }

    /// How many are due now.
    fn due(&mut self, now: Duration) -> u32 {
        if now.saturating_sub(self.next) > Duration::from_secs(1) {
            self.next = now.saturating_sub(Duration::from_secs(1));
        }
        let mut n = 0;
        while self.next <= now {
            self.next += self.every;
            n += 1;
        }
        n
    }
}

/// The peer's own streams to one guest.
struct Talk {
    link: GuestLink,
    handle: SocketHandle,
    local_port: u16,
    connected: bool,
    retry_at: Duration,
    held: Vec<u8>,
    tcp_seq: u64,
    udp_seq: u64,
    quiet_seq: u64,
    tcp: Option<Pacer>,
    udp: Option<Pacer>,
    quiet: Option<Pacer>,
}

pub(super) struct Stack {
    port: LocalPort,
    clock: RunClock,
    mac: Mac,
    addr: Ipv4Addr,
    base: u16,
    run: u64,
    guests: Vec<GuestLink>,
    shared: Arc<Shared>,
    card: Card,
    interface: Interface,
    sockets: SocketSet<'static>,
    listeners: Vec<Listener>,
    report_udp: SocketHandle,
    stream_udp: SocketHandle,
    control: SocketHandle,
    echo_udp: SocketHandle,
    talks: HashMap<Ipv4Addr, Talk>,
    commands: Vec<(Ipv4Addr, Command, Duration)>,
    next_port: u16,
}

fn smol(now: Duration) -> Instant {
    Instant::from_micros(i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}

fn v4(endpoint: IpEndpoint) -> Ipv4Addr {
    // smoltcp is built with IPv4 only.
    let IpAddress::Ipv4(addr) = endpoint.addr;
    addr
}

fn new_tcp() -> tcp::Socket<'static> {
    let buffer = || tcp::SocketBuffer::new(vec![0; TCP_BUFFER]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.set_nagle_enabled(false);
    socket
}

fn new_udp(port: u16) -> udp::Socket<'static> {
    let buffer =
        || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 256], vec![0; 256 * (MAX_DATAGRAM + FRAME_LEN)]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    // A fresh socket is closed and the port is not 0, so this can't fail; a socket that did would receive nothing, and
    // every run would say so.
    if let Err(error) = socket.bind(port) {
        tracing::error!(%error, port, "peer: UDP port can't be bound");
    }
    socket
}

impl Stack {
    pub(super) fn new(port: LocalPort, clock: RunClock, config: &PeerConfig, shared: Arc<Shared>) -> Self {
        let mut card = Card { inbox: VecDeque::new(), out: port.injector() };
        let hardware = HardwareAddress::Ethernet(EthernetAddress(config.mac.0));
        let mut interface = Interface::new(Config::new(hardware), &mut card, smol(clock.now()));
        interface.update_ip_addrs(|addrs| {
            // There is room for two addresses and this is the first.
            let _ = addrs.push(IpCidr::new(IpAddress::from(config.addr), config.prefix));
        });
        let mut sockets = SocketSet::new(Vec::new());
        let mut listeners = Vec::new();
        for service in [Service::Report, Service::TcpStream] {
            for _ in 0..LISTENERS {
                let serving = match service {
                    Service::Report => Serving::Reports(LineReader::default()),
                    _ => Serving::Stream(Vec::new()),
                };
                listeners.push(Listener { handle: sockets.add(new_tcp()), service, serving, remote: None });
            }
        }
        let mut udp = |service: Service| sockets.add(new_udp(service.port(config.port)));
        let (report_udp, stream_udp) = (udp(Service::Report), udp(Service::UdpStream));
        let (control, echo_udp) = (udp(Service::Control), udp(Service::GuestUdpEcho));
        // The run number tells this peer's packets from an earlier one's.
        let run = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |t| t.as_nanos() as u64);
        Self {
            port,
            clock,
            mac: config.mac,
            addr: config.addr,
            base: config.port,
            run,
            guests: config.guests.clone(),
            shared,
            card,
            interface,
            sockets,
            listeners,
            report_udp,
            stream_udp,
            control,
            echo_udp,
            talks: HashMap::new(),
            commands: Vec::new(),
            next_port: 49_152,
        }
    }

    pub(super) fn run(&mut self, orders: &Receiver<Order>) {
        loop {
            loop {
                match orders.try_recv() {
                    Ok(Order::End) | Err(TryRecvError::Disconnected) => return,
                    Ok(order) => self.obey(order),
                    Err(TryRecvError::Empty) => break,
                }
            }
            let now = self.clock.now();
            self.interface.poll(smol(now), &mut self.card, &mut self.sockets);
            self.serve_tcp(now);
            self.serve_udp(now);
            self.talk(now);
            self.send_commands(now);
            let now = self.clock.now();
            self.interface.poll(smol(now), &mut self.card, &mut self.sockets);
            let wait = self.interface.poll_delay(smol(now), &self.sockets).map_or(TICK, Into::into);
            let mut wait = wait.min(TICK).min(self.next_due(now));
            while let Some(frame) = self.port.receive(wait) {
                self.card.inbox.push_back(frame);
                wait = Duration::ZERO;
            }
        }
    }

    fn next_due(&self, now: Duration) -> Duration {
        let pacers = self.talks.values().flat_map(|t| [&t.tcp, &t.udp, &t.quiet]).flatten();
        pacers.map(|p| p.next.saturating_sub(now)).min().unwrap_or(TICK)
    }

    fn obey(&mut self, order: Order) {
        let now = self.clock.now();
        match order {
            Order::Command(addr, command) => {
                self.commands.retain(|(to, ..)| *to != addr);
                self.commands.push((addr, command, now));
            }
            Order::Begin(addr) => {
                if self.talks.contains_key(&addr) {
                    return;
                }
                self.shared.with(addr, |known| known.resting = false);
                if let Some(link) = self.guests.iter().find(|g| g.addr == addr).cloned() {
                    let talk = Talk {
                        handle: self.sockets.add(new_tcp()),
                        local_port: 0,
                        connected: false,
                        retry_at: now,
                        held: Vec::new(),
                        tcp_seq: 0,
                        udp_seq: 0,
                        quiet_seq: 0,
                        // Nothing is sent before the witness has said that it is there.
                        tcp: None,
                        udp: None,
                        quiet: None,
                        link,
                    };
                    self.talks.insert(addr, talk);
                }
            }
            Order::Rest(addr) => {
                if let Some(talk) = self.talks.remove(&addr) {
                    self.sockets.get_mut::<tcp::Socket<'_>>(talk.handle).abort();
                    self.interface.poll(smol(now), &mut self.card, &mut self.sockets);
                    self.sockets.remove(talk.handle);
                }
                self.shared.with(addr, |known| {
                    known.resting = true;
                    for flow in [&mut known.udp_stream, &mut known.tcp_stream, &mut known.tcp_echo, &mut known.udp_echo]
                    {
                        flow.silences.stop();
                    }
                });
            }
            Order::End => {}
        }
    }

    /// The connections that guests open: reports, and the stream that is sent back to them.
    fn serve_tcp(&mut self, now: Duration) {
        let mut news = false;
        for listener in &mut self.listeners {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(listener.handle);
            if !socket.is_open() {
                if let Some(addr) = listener.remote.take() {
                    self.shared.with(addr, Known::broke);
                }
                listener.serving = match listener.service {
                    Service::Report => Serving::Reports(LineReader::default()),
                    _ => Serving::Stream(Vec::new()),
                };
                if let Err(error) = socket.listen(listener.service.port(self.base)) {
                    tracing::error!(%error, "peer: a TCP socket can't listen");
                }
                continue;
            }
            if socket.is_listening() {
                continue;
            }
            if listener.remote.is_none()
                && let Some(remote) = socket.remote_endpoint().filter(|_| socket.may_send())
            {
                let addr = v4(remote);
                listener.remote = Some(addr);
                if listener.service == Service::TcpStream {
                    self.shared.with(addr, |known| known.tcp_accepted += 1);
                }
            }
            let Some(addr) = listener.remote else { continue };
            match &mut listener.serving {
                Serving::Reports(lines) => {
                    let mut complete = Vec::new();
                    while socket.can_recv() {
                        let taken = socket.recv(|bytes| {
                            complete.extend(lines.push(bytes));
                            (bytes.len(), ())
                        });
                        if taken.is_err() {
                            break;
                        }
                    }
                    if !complete.is_empty() {
                        news = true;
                        self.shared.with(addr, |known| complete.iter().for_each(|line| known.report(now, line)));
                    }
                }
                Serving::Stream(held) => {
                    // Only what can be sent back at once is taken.
                    let room = socket.send_capacity() - socket.send_queue();
                    let mut bytes = vec![0; room.min(socket.recv_queue())];
                    let len = socket.recv_slice(&mut bytes).unwrap_or(0);
                    bytes.truncate(len);
                    if !bytes.is_empty() {
                        // There is room for it, as was looked up above, so all of it is taken.
                        let _ = socket.send_slice(&bytes);
                        self.shared.with(addr, |known| {
                            take_frames(held, &bytes, FrameKind::Tcp, |frame| match frame {
                                Some(f) => known.tcp_stream.came(now, f.run, f.seq, f.sent_ns),
                                None => known.tcp_stream.numbers.corrupt(),
                            })
                        });
                    }
                }
            }
            if !socket.may_recv() && !socket.can_recv() && socket.may_send() {
                socket.close();
            }
        }
        if news {
            self.shared.news.notify_all();
        }
    }

    fn serve_udp(&mut self, now: Duration) {
        let socket = self.sockets.get_mut::<udp::Socket<'_>>(self.report_udp);
        let mut news = false;
        while let Ok((bytes, from)) = socket.recv() {
            news = true;
            self.shared.with(v4(from.endpoint), |known| known.report(now, bytes));
        }
        if news {
            self.shared.news.notify_all();
        }
        let socket = self.sockets.get_mut::<udp::Socket<'_>>(self.stream_udp);
        while let Ok((bytes, from)) = socket.recv() {
            let bytes = bytes.to_vec();
            self.shared.with(v4(from.endpoint), |known| match Frame::decode(&bytes) {
                Ok(f) if f.kind == FrameKind::Udp => known.udp_stream.came(now, f.run, f.seq, f.sent_ns),
                _ => known.udp_stream.numbers.corrupt(),
            });
            // A full queue loses the echo, which the guest then counts as lost.
            let _ = socket.send_slice(&bytes, from.endpoint);
        }
        let socket = self.sockets.get_mut::<udp::Socket<'_>>(self.echo_udp);
        while let Ok((bytes, from)) = socket.recv() {
            self.shared.with(v4(from.endpoint), |known| match Frame::decode(bytes) {
                Ok(f) if f.kind == FrameKind::Udp => known.udp_echo.came(now, f.run, f.seq, f.sent_ns),
                _ => known.udp_echo.numbers.corrupt(),
            });
        }
        let socket = self.sockets.get_mut::<udp::Socket<'_>>(self.control);
        while let Ok((bytes, from)) = socket.recv() {
            let addr = v4(from.endpoint);
            self.commands.retain(|(to, command, _)| *to != addr || command.answer().as_bytes() != bytes.trim_ascii());
        }
    }

    fn send_commands(&mut self, now: Duration) {
        let socket = self.sockets.get_mut::<udp::Socket<'_>>(self.control);
        for (addr, command, due) in &mut self.commands {
            if *due <= now {
                *due = now + AGAIN;
                let to = IpEndpoint::new(IpAddress::from(*addr), Service::Control.port(self.base));
                // Not sent, not answered, so sent again.
                let _ = socket.send_slice(command.text().as_bytes(), to);
            }
        }
    }

    /// The streams that the peer itself sends.
    fn talk(&mut self, now: Duration) {
        let frame = |kind, seq| Frame { kind, run: self.run, seq, sent_ns: now.as_nanos() as u64 }.encode();
        for (addr, talk) in &mut self.talks {
            if talk.tcp.is_none() && talk.udp.is_none() && talk.quiet.is_none() {
                let mut there = false;
                self.shared.with(*addr, |known| there = known.hello.is_some() || !known.beats.is_empty());
                if !there {
                    continue;
                }
                talk.tcp = Pacer::new(talk.link.rates.tcp, now);
                talk.udp = Pacer::new(talk.link.rates.udp, now);
                talk.quiet = Pacer::new(talk.link.rates.quiet, now).filter(|_| talk.link.quiet.is_some());
            }
            if let Some(pacer) = &mut talk.udp {
                let socket = self.sockets.get_mut::<udp::Socket<'_>>(self.echo_udp);
                let to = IpEndpoint::new(IpAddress::from(*addr), Service::GuestUdpEcho.port(self.base));
                for _ in 0..pacer.due(now) {
                    if socket.send_slice(&frame(FrameKind::Udp, talk.udp_seq + 1), to).is_ok() {
                        talk.udp_seq += 1;
                    }
                }
                self.shared.with(*addr, |known| known.udp_echo.sent = talk.udp_seq);
            }
            if let (Some(pacer), Some((mac, quiet))) = (&mut talk.quiet, talk.link.quiet) {
                let port = Service::ReceiveOnly.port(self.base);
                let (from, to) = (End { mac: self.mac, addr: self.addr, port }, End { mac, addr: quiet, port });
                for _ in 0..pacer.due(now) {
                    talk.quiet_seq += 1;
                    self.card.out.send(&datagram(from, to, &frame(FrameKind::Receive, talk.quiet_seq)));
                }
                self.shared.with(*addr, |known| known.quiet.sent = talk.quiet_seq);
            }
            let Some(pacer) = &mut talk.tcp else { continue };
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(talk.handle);
            if !socket.is_open() {
                if std::mem::take(&mut talk.connected) {
                    self.shared.with(*addr, Known::broke);
                }
                if now >= talk.retry_at {
                    talk.retry_at = now + AGAIN;
                    talk.held.clear();
                    talk.tcp_seq = 0;
                    self.next_port = self.next_port.checked_add(1).unwrap_or(49_152);
                    talk.local_port = self.next_port;
                    let to = IpEndpoint::new(IpAddress::from(*addr), Service::GuestTcpEcho.port(self.base));
                    if let Err(error) = socket.connect(self.interface.context(), to, talk.local_port) {
                        tracing::warn!(%error, "peer: can't connect");
                    }
                }
                continue;
            }
            if !talk.connected && socket.may_send() {
                talk.connected = true;
                talk.tcp = Pacer::new(talk.link.rates.tcp, now);
                self.shared.with(*addr, |known| {
                    known.tcp_echo.numbers.restart();
                    known.tcp_echo.silences.stop();
                });
                continue;
            }
            for _ in 0..pacer.due(now) {
                // Whole frames only; what finds no room is not sent, and its number comes next time.
                if talk.connected && socket.send_capacity() - socket.send_queue() >= FRAME_LEN {
                    talk.tcp_seq += 1;
                    let _ = socket.send_slice(&frame(FrameKind::Tcp, talk.tcp_seq));
                    self.shared.with(*addr, |known| known.tcp_echo.sent += 1);
                }
            }
            let mut bytes = vec![0; socket.recv_queue()];
            let len = socket.recv_slice(&mut bytes).unwrap_or(0);
            self.shared.with(*addr, |known| {
                take_frames(&mut talk.held, bytes.get(..len).unwrap_or(&[]), FrameKind::Tcp, |frame| match frame {
                    Some(f) => known.tcp_echo.came(now, f.run, f.seq, f.sent_ns),
                    None => known.tcp_echo.numbers.corrupt(),
                });
            });
            if !socket.may_recv() && socket.may_send() {
                socket.close();
            }
        }
    }
}

/// Cuts a byte stream into frames; `held` keeps the start of an unfinished one. `None` is what is no frame of that kind.
fn take_frames(held: &mut Vec<u8>, bytes: &[u8], kind: FrameKind, mut each: impl FnMut(Option<Frame>)) {
    held.extend_from_slice(bytes);
    let whole = held.len() - held.len() % FRAME_LEN;
    for chunk in held.chunks_exact(FRAME_LEN) {
        each(Frame::decode(chunk).ok().filter(|f| f.kind == kind));
    }
    held.drain(..whole);
}
