//! The network's loads: TCP and UDP streams, what only receives, echoes, commands.

use crate::clock::mono_ns;
use crate::context::{Context, Pacer};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;
use witness::report::Noticed;
use witness::wire::{Command, FRAME_LEN, Frame, FrameKind, Service, UNKNOWN};

/// Echo connections at a time.
const MOST_ECHOES: u32 = 8;

fn ms(ns: u64) -> u64 {
    ns / 1_000_000
}

fn peer(ctx: &Context, service: Service) -> SocketAddr {
    SocketAddrV4::new(ctx.config.peer, service.port(ctx.config.port)).into()
}

/// Starts all network loads. Returns what could not be started.
pub fn start(ctx: &Arc<Context>, commands: &Sender<(Command, Option<SocketAddr>)>) -> Vec<String> {
    let mut wrong = Vec::new();
    let Some(addr) = ctx.config.addr else { return wrong };
    if ctx.config.tcp > 0 {
        let c = ctx.clone();
        crate::spawn("tcp-stream", move || tcp_stream(&c));
    }
    if ctx.config.udp > 0 {
        wrong.extend(udp_stream(ctx).err().map(|e| format!("network: UDP stream: {e}")));
    }
    if let Some(rx) = ctx.config.rx {
        wrong.extend(receive_only(ctx, rx.addr).err().map(|e| format!("network: receive-only address: {e}")));
    }
    wrong.extend(control(ctx, addr.addr, commands.clone()).err().map(|e| format!("network: control port: {e}")));
    wrong.extend(tcp_echo(ctx, addr.addr).err().map(|e| format!("network: TCP echo: {e}")));
    wrong.extend(udp_echo(ctx, addr.addr).err().map(|e| format!("network: UDP echo: {e}")));
    wrong
}

/// The stream that must survive: frames out at a rate, each expected back, in order.
fn tcp_stream(ctx: &Arc<Context>) {
    let next = Arc::new(AtomicU64::new(1));
    loop {
        let stream = match TcpStream::connect_timeout(&peer(ctx, Service::TcpStream), Duration::from_secs(5)) {
            Ok(s) => s,
            Err(_) => {
                // Not open yet is not broken.
                std::thread::sleep(Duration::from_secs(1));
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let first = next.load(Ordering::SeqCst);
        let Ok(mut out) = stream.try_clone() else { continue };
        let (c, n) = (ctx.clone(), next.clone());
        let reader = crate::spawn("tcp-back", move || read_back(&c, stream, first, &n));
        let mut pacer = Pacer::new(ctx.config.tcp);
        loop {
            pacer.wait(ctx);
            let seq = next.fetch_add(1, Ordering::SeqCst);
            let frame = Frame { kind: FrameKind::Tcp, run: ctx.run, seq, sent_ns: mono_ns() };
            if out.write_all(&frame.encode()).is_err() {
                break;
            }
            ctx.counters.tcp_sent.add(1);
        }
        // The reader has the reason, or gets it now.
        let _ = out.shutdown(std::net::Shutdown::Both);
        if let Some(r) = reader {
            let _ = r.join();
        }
    }
}

/// Reads what comes back until the stream breaks.
fn read_back(ctx: &Context, mut stream: TcpStream, first: u64, next: &AtomicU64) {
    let mut want = first;
    let mut buf = [0; FRAME_LEN];
    let error = loop {
        if let Err(e) = stream.read_exact(&mut buf) {
            break e.to_string();
        }
        match Frame::decode(&buf) {
            Err(e) => break format!("what came back is no frame: {e}"),
            Ok(f) if f.seq != want || f.run != ctx.run || f.kind != FrameKind::Tcp => {
                ctx.notice(Noticed::TcpOrder { want, found: f.seq });
                want = f.seq + 1;
            }
            Ok(f) => {
                ctx.counters.tcp_back.add(1);
                ctx.counters.tcp_max_ms.max(ms(mono_ns().saturating_sub(f.sent_ns)));
                want += 1;
            }
        }
    };
    ctx.counters.tcp_breaks.add(1);
    let outstanding = next.load(Ordering::SeqCst).saturating_sub(want);
    ctx.notice(Noticed::TcpBroken { error, outstanding });
    let _ = stream.shutdown(std::net::Shutdown::Both);
}

fn udp_stream(ctx: &Arc<Context>) -> std::io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let back = socket.try_clone()?;
    let to = peer(ctx, Service::UdpStream);
    let c = ctx.clone();
    crate::spawn("udp-stream", move || {
        let mut pacer = Pacer::new(c.config.udp);
        loop {
            pacer.wait(&c);
            let seq = c.counters.udp_sent.get() + 1;
            let frame = Frame { kind: FrameKind::Udp, run: c.run, seq, sent_ns: mono_ns() };
            // A datagram may be lost; the peer sees by the numbers.
            let _ = socket.send_to(&frame.encode(), to);
            c.counters.udp_sent.add(1);
        }
    });
    let c = ctx.clone();
    crate::spawn("udp-back", move || {
        let mut last = None;
        let mut buf = [0; 2048];
        loop {
            let Ok(n) = back.recv(&mut buf) else {
                // An ICMP error of an earlier send.
                std::thread::sleep(Duration::from_millis(10));
                continue;
            };
            let Ok(f) = Frame::decode(buf.get(..n).unwrap_or_default()) else { continue };
            if f.kind != FrameKind::Udp || f.run != c.run {
                continue;
            }
            c.counters.udp_back.add(1);
            let now = mono_ns();
            if c.loads()
                && let Some(last) = last.replace(now)
            {
                c.counters.udp_max_ms.max(ms(now.saturating_sub(last)));
            }
            if !c.loads() {
                last = None;
            }
        }
    });
    Ok(())
}

fn receive_only(ctx: &Arc<Context>, addr: Ipv4Addr) -> std::io::Result<()> {
    let socket = UdpSocket::bind((addr, Service::ReceiveOnly.port(ctx.config.port)))?;
    let c = ctx.clone();
    crate::spawn("receive-only", move || {
        let mut last: Option<u64> = None;
        let mut buf = [0; 2048];
        loop {
            let Ok(n) = socket.recv(&mut buf) else { continue };
            let Ok(f) = Frame::decode(buf.get(..n).unwrap_or_default()) else { continue };
            if f.kind != FrameKind::Receive {
                continue;
            }
            let now = mono_ns();
            c.counters.rx.add(1);
            c.counters.rx_seq.max(f.seq);
            if let Some(last) = last.replace(now) {
                c.counters.rx_max_ms.max(ms(now.saturating_sub(last)));
            }
        }
    });
    Ok(())
}

fn control(ctx: &Arc<Context>, addr: Ipv4Addr, commands: Sender<(Command, Option<SocketAddr>)>) -> std::io::Result<()> {
    let socket = UdpSocket::bind((addr, Service::Control.port(ctx.config.port)))?;
    crate::spawn("control", move || {
        let mut buf = [0; 2048];
        loop {
            let Ok((n, from)) = socket.recv_from(&mut buf) else { continue };
            let text = String::from_utf8_lossy(buf.get(..n).unwrap_or_default()).into_owned();
            let answer = match Command::parse(&text) {
                Some(command) => {
                    let _ = commands.send((command, Some(from)));
                    command.answer()
                }
                None => UNKNOWN,
            };
            let _ = socket.send_to(answer.as_bytes(), from);
        }
    });
    Ok(())
}

fn tcp_echo(ctx: &Arc<Context>, addr: Ipv4Addr) -> std::io::Result<()> {
    let listener = TcpListener::bind((addr, Service::GuestTcpEcho.port(ctx.config.port)))?;
    crate::spawn("tcp-echo", move || {
        let open = Arc::new(AtomicU32::new(0));
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else {
                std::thread::sleep(Duration::from_millis(100));
                continue;
            };
            if open.fetch_add(1, Ordering::SeqCst) >= MOST_ECHOES {
                open.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let _ = stream.set_nodelay(true);
            let held = open.clone();
            let started = crate::spawn("tcp-echo-conn", move || {
                let mut buf = [0; 4096];
                loop {
                    match stream.read(&mut buf) {
                        Ok(0) => break,
                        Ok(n) => {
                            if stream.write_all(buf.get(..n).unwrap_or_default()).is_err() {
                                break;
                            }
                        }
                        Err(e) if e.kind() == ErrorKind::Interrupted => {}
                        Err(_) => break,
                    }
                }
                held.fetch_sub(1, Ordering::SeqCst);
            });
            if started.is_none() {
                open.fetch_sub(1, Ordering::SeqCst);
            }
        }
    });
    Ok(())
}

fn udp_echo(ctx: &Arc<Context>, addr: Ipv4Addr) -> std::io::Result<()> {
    let socket = UdpSocket::bind((addr, Service::GuestUdpEcho.port(ctx.config.port)))?;
    crate::spawn("udp-echo", move || {
        let mut buf = [0; 65536];
        loop {
            if let Ok((n, from)) = socket.recv_from(&mut buf) {
                let _ = socket.send_to(buf.get(..n).unwrap_or_default(), from);
            }
        }
    });
    Ok(())
}
