//! Any bytes as what two tools and two guests send, read and suffer: the store answers and stays consistent.
//!
//! Each step is a byte that says who and what, and for a message a length and so many bytes behind it; lengths from 240 up add a
//! value that is made, up to beyond what a message may have.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xenstore_wire::{Errno, Message, Op, payload};
use xenstored::{DomainState, Host, HostCommand, Options, Store};

#[derive(Default)]
struct Table {
    dead: [bool; 2],
    now: u64,
}

impl Host for Table {
    fn domain_state(&mut self, domid: u16) -> Option<DomainState> {
        match domid {
            1 | 2 if self.dead[usize::from(domid) - 1] => None,
            0..=2 => Some(DomainState::default()),
            _ => None,
        }
    }
    fn connect(&mut self, domid: u16, port: u32) -> Result<u32, Errno> {
        self.domain_state(domid).map(|_| port).ok_or(Errno::ENOENT)
    }
    fn adopt(&mut self, _: u16, _: u32) -> Result<u32, Errno> {
        Ok(0)
    }
    fn rebind(&mut self, _: u16, _: u32, port: u32) -> Result<u32, Errno> {
        Ok(port)
    }
    fn disconnect(&mut self, _: u16, _: u32) {}
    fn reset_ring(&mut self, _: u16) {}
    fn set_ring_error(&mut self, _: u16, _: u32) {}
    fn ring_features(&mut self, _: u16) -> Option<u32> {
        Some(0)
    }
    fn command(&mut self, _: HostCommand<'_>) -> Result<(), Errno> {
        Ok(())
    }
    fn now_ms(&self) -> u64 {
        self.now
    }
}

fn send(s: &mut Store, h: &mut Table, conn: u32, bytes: &[u8]) {
    let mut at = 0;
    // As the daemon does: the short way as far as it goes, and what was not sent of its replies is queued.
    while let Some(n) = s.input_directly(conn, &bytes[at..], h) {
        at += n;
    }
    let mut replies = Vec::new();
    s.take_direct(&mut replies);
    s.queue_direct(conn, &replies, replies.len() / 2);
    while at < bytes.len() {
        let n = s.wants(conn, h.now).min(bytes.len() - at);
        match s.input(conn, &bytes[at..at + n], h) {
            Ok(n) if n > 0 => at += n,
            _ => return,
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let (mut s, mut h) = (Store::new(Options::default()), Table::default());
    let tools = [s.add_socket(), s.add_socket()];
    let introduce = |s: &mut Store, h: &mut Table, d: u16| {
        let m = Message::new(Op::Introduce.to_wire(), 0, 0, payload::join([d.to_string(), "1".into(), "1".into()]));
        let t = s.add_socket();
        send(s, h, t, &m.to_bytes());
        s.close(t, h);
    };
    introduce(&mut s, &mut h, 1);
    introduce(&mut s, &mut h, 2);
    let mut rest = data;
    while let Some((&what, r)) = rest.split_first() {
        rest = r;
        let who = usize::from(what & 3);
        let Some(conn) = tools.get(who).copied().or_else(|| s.domain_connection(who as u16 - 1)) else { continue };
        match what >> 2 {
            0 => {
                let mut b = Vec::new();
                s.output(conn, 700, &mut b);
                s.wrote(conn, b.len());
            }
            1 => {
                h.now += 5000;
                s.timers(&mut h);
            }
            2 if who >= 2 => {
                h.dead[who - 2] = true;
                s.check_domains(&mut h);
                h.dead[who - 2] = false;
                introduce(&mut s, &mut h, who as u16 - 1);
            }
            op => {
                let op = Op::ALL[usize::from(op) % Op::ALL.len()];
                let Some((&[tx, len], r)) = rest.split_first_chunk::<2>() else { break };
                let (body, r) = r.split_at(r.len().min((len % 240).into()));
                rest = r;
                let mut body = body.to_vec();
                // 275 bytes to 4400.
                body.resize(body.len() + usize::from(len.saturating_sub(239)) * 275, b'v');
                send(&mut s, &mut h, conn, &Message::new(op.to_wire(), 1, (tx & 3).into(), body).to_bytes());
            }
        }
        s.take_woken();
    }
    assert!(s.check().is_empty(), "{:?}", s.check());
});
