//! A script of operations by several clients, and the transcript of all that a daemon answers.
//!
//! After each step every client is asked for something harmless, so that all watch events that the step caused have
//! arrived: the daemons serve their clients in one thread and answer in order. What may differ between two daemons
//! without anybody noticing (transaction ids, generation counts) is replaced by names.

use crate::client::Connection;
use crate::fake_xen::{DomainState, FakeXen};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};
use xenstore_wire::{Message, Op, payload};

/// Domids of the guests that scripts know.
pub const GUESTS: [u16; 2] = [1, 2];
/// Clients: two tools over the socket, then the guests.
pub const CLIENTS: usize = 2 + GUESTS.len();
/// Transactions that one client may name.
pub const SLOTS: usize = 3;

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A request outside transactions, or in the client's transaction `slot` (one that is not open uses an id that
    /// cannot be).
    Request { client: usize, op: Op, slot: Option<usize>, body: Vec<u8> },
    /// Opens the client's transaction `slot`, if it is not open.
    Begin { client: usize, slot: usize },
    /// Ends it.
    End { client: usize, slot: usize, commit: bool },
    /// A tool drops its connection and comes back.
    Reconnect { client: usize },
    /// A guest shuts down and stays.
    ShutDown { guest: usize },
    /// A guest dies; then it is created anew, and introduced.
    DieAndReturn { guest: usize },
}

struct Player<'x> {
    socket: &'x Path,
    xen: &'x FakeXen,
    clients: Vec<Connection<'x>>,
    /// Transaction ids by client and slot.
    open: BTreeMap<(usize, usize), u32>,
    /// The client whose guest is dying: nobody answers it.
    dying: Option<usize>,
    lines: Vec<String>,
}

/// Plays the script to a fresh daemon; the transcript has one line for everything that came back.
///
/// # Errors
/// The daemon does not answer, dies, or sends something that is no message.
pub fn play(socket: &Path, xen: &FakeXen, script: &[Step]) -> Result<Vec<String>> {
    let mut p = Player { socket, xen, clients: Vec::new(), open: BTreeMap::new(), dying: None, lines: Vec::new() };
    for _ in 0..2 {
        p.clients.push(Connection::socket(socket)?);
    }
    p.must(Op::Mkdir, &["/t"])?;
    p.must(Op::SetPerms, &["/t", "b0"])?;
    for i in 0..GUESTS.len() {
        let c = p.bring_up(i)?;
        p.clients.push(c);
    }
    for (n, step) in script.iter().enumerate() {
        p.lines.push(format!("--- {n}: {}", describe(step)));
        p.step(step).with_context(|| format!("step {n}, {step:?}; so far:\n{}", p.lines.join("\n")))?;
        p.settle().with_context(|| format!("after step {n}, {step:?}; so far:\n{}", p.lines.join("\n")))?;
    }
    p.lines.push("--- the tree".into());
    p.dump("/")?;
    Ok(p.lines)
}

impl<'x> Player<'x> {
    fn must(&mut self, op: Op, args: &[&str]) -> Result<()> {
        let (m, _) = self.clients[0].call(op, 0, &payload::join(args))?;
        if m.header.op != op.to_wire() {
            bail!("{} {args:?} was refused: {}", op.name(), show(&m.payload));
        }
        Ok(())
    }

    /// Makes a guest with its area and introduces it, as a toolstack does.
    fn bring_up(&mut self, guest: usize) -> Result<Connection<'x>> {
        let domid = GUESTS[guest];
        self.xen.add_domain(domid)?;
        let home = format!("/local/domain/{domid}");
        self.must(Op::Mkdir, &[&home])?;
        self.must(Op::SetPerms, &[&home, &format!("n{domid}")])?;
        self.must(Op::Introduce, &[&domid.to_string(), "0", "1"])?;
        Connection::ring(self.xen, domid)
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        match step {
            Step::Request { client, op, slot, body } => {
                let tx = match slot {
                    None => 0,
                    Some(s) => self.open.get(&(*client, *s)).copied().unwrap_or(0x7fff_0000),
                };
                let (reply, events) = self.clients[*client].call(*op, tx, body)?;
                self.note(*client, &events);
                self.lines.push(format!("{client}: {}", show_reply(*op, &reply)));
            }
            Step::Begin { client, slot } => {
                if self.open.contains_key(&(*client, *slot)) {
                    return Ok(());
                }
                let (reply, events) = self.clients[*client].call(Op::TransactionStart, 0, &[0])?;
                self.note(*client, &events);
                if reply.header.op == Op::TransactionStart.to_wire() {
                    let id = payload::one_arg(&reply.payload).and_then(payload::decimal);
                    let id = id.map_err(|e| anyhow::anyhow!("a transaction id that is none: {e:?}"))?;
                    self.open.insert((*client, *slot), id);
                    self.lines.push(format!("{client}: transaction open"));
                } else {
                    self.lines.push(format!("{client}: {}", show_reply(Op::TransactionStart, &reply)));
                }
            }
            Step::End { client, slot, commit } => {
                let tx = self.open.remove(&(*client, *slot)).unwrap_or(0x7fff_0000);
                let body: &[u8] = if *commit { b"T\0" } else { b"F\0" };
                let (reply, events) = self.clients[*client].call(Op::TransactionEnd, tx, body)?;
                self.note(*client, &events);
                self.lines.push(format!("{client}: {}", show_reply(Op::TransactionEnd, &reply)));
            }
            Step::Reconnect { client } => {
                self.open.retain(|(c, _), _| c != client);
                self.clients[*client] = Connection::socket(self.socket)?;
            }
            Step::ShutDown { guest } => {
                self.xen.set_state(GUESTS[*guest], DomainState::ShutDown)?;
                self.dom_exc()?;
            }
            Step::DieAndReturn { guest } => {
                let domid = GUESTS[*guest];
                self.xen.set_state(domid, DomainState::Dying)?;
                self.dying = Some(2 + guest);
                self.dom_exc()?;
                let end = Instant::now() + Duration::from_secs(10);
                while self.is_introduced(domid)? {
                    if Instant::now() > end {
                        bail!("the daemon does not notice that domain {domid} died");
                    }
                }
                self.xen.remove_domain(domid)?;
                self.dom_exc()?;
                self.open.retain(|(c, _), _| *c != 2 + guest);
                self.must(Op::Rm, &[&format!("/local/domain/{domid}")])?;
                self.clients[2 + guest] = self.bring_up(*guest)?;
                self.dying = None;
            }
        }
        Ok(())
    }

    /// Raises the domain exception and waits until the daemon has surely looked: events of the Xen made of files are
    /// taken before the second of two requests at the latest.
    fn dom_exc(&mut self) -> Result<()> {
        self.xen.raise_dom_exc()?;
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(1));
            self.settle()?;
        }
        Ok(())
    }

    fn is_introduced(&mut self, domid: u16) -> Result<bool> {
        let (m, events) = self.clients[0].call(Op::IsDomainIntroduced, 0, &payload::join([domid.to_string()]))?;
        self.note(0, &events);
        Ok(m.payload.first() == Some(&b'T'))
    }

    /// Lets all events arrive.
    fn settle(&mut self) -> Result<()> {
        let dying = self.dying;
        for client in (0..self.clients.len()).filter(|c| dying != Some(*c)) {
            let (_, events) = self.clients[client].call(Op::GetDomainPath, 0, b"0\0")?;
            self.note(client, &events);
        }
        Ok(())
    }

    fn note(&mut self, client: usize, events: &[Message]) {
        for e in events {
            self.lines.push(format!("{client}: event {}", show(&e.payload)));
        }
    }

    fn dump(&mut self, path: &str) -> Result<()> {
        let (perms, _) = self.clients[0].call(Op::GetPerms, 0, &payload::join([path]))?;
        let (value, _) = self.clients[0].call(Op::Read, 0, &payload::join([path]))?;
        self.lines.push(format!("{path} {} = {}", show(&perms.payload), show_reply(Op::Read, &value)));
        let (names, _) = self.clients[0].call(Op::Directory, 0, &payload::join([path]))?;
        if names.header.op != Op::Directory.to_wire() {
            return Ok(());
        }
        for name in payload::strings(&names.payload) {
            let name = String::from_utf8_lossy(name);
            let child = if path == "/" { format!("/{name}") } else { format!("{path}/{name}") };
            self.dump(&child)?;
        }
        Ok(())
    }
}

fn describe(step: &Step) -> String {
    match step {
        Step::Request { client, op, slot, body } => {
            let tx = slot.map_or(String::new(), |s| format!(" in transaction {s}"));
            format!("{client} {} {}{tx}", op.name(), show(body))
        }
        other => format!("{other:?}"),
    }
}

fn show_reply(op: Op, m: &Message) -> String {
    let name = Op::from_wire(m.header.op).map_or_else(|| m.header.op.to_string(), |o| o.name().to_string());
    if op == Op::DirectoryPart && m.header.op == op.to_wire() {
        // The first string is a generation count.
        let rest = payload::split_first(&m.payload).map_or(&m.payload[..], |(_, rest)| rest);
        return format!("{name} <generation> {}", show(rest));
    }
    format!("{name} {}", show(&m.payload))
}

fn show(bytes: &[u8]) -> String {
    let text = bytes.escape_ascii().to_string();
    if text.len() > 200 { format!("{}… ({} bytes)", &text[..200], bytes.len()) } else { text }
}
