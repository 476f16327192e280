//! `ferry-lab shell`: hosts for a person, with a prompt on each in one terminal.

use super::site;
use anyhow::{Context, Result};
use clap::Args;
use lab::host::{Host, Stream};
use lab::{process, progress};
use lab_agent::frame::Kind;
use lab_agent::message::{Exec, Request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::Duration;

/// Ctrl-], after which one key commands this program.
const ESCAPE: u8 = 0x1d;
/// Ctrl-D, which ends a shell.
const END_OF_INPUT: u8 = 0x04;
/// How much of a host's output is kept while another host is shown, bytes.
const KEPT: usize = 64 << 10;
/// What the keys are, for the person.
const KEYS: &str = "Ctrl-] then a, b, … shows that host; n the next one; q ends the lab";

#[derive(Debug, Args)]
pub struct Options {
    /// How many hosts to boot: a, b, c, d.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=4))]
    hosts: u8,
    #[command(flatten)]
    site: site::SiteOptions,
}

/// One host's shell.
struct Session<'a> {
    host: &'a Host,
    stream: Stream,
    /// What it wrote while it was not shown.
    unseen: Vec<u8>,
    over: bool,
}

/// The terminal in raw mode; as it was when dropped.
struct Raw(Option<Termios>);

impl Raw {
    fn enter() -> Result<Raw> {
        let stdin = rustix::stdio::stdin();
        if !isatty(stdin) {
            return Ok(Raw(None));
        }
        let before = tcgetattr(stdin).context("ask for the terminal's mode")?;
        let restored = before.clone();
        process::at_end(move || {
            let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &restored);
        });
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin, OptionalActions::Now, &raw).context("set the terminal's mode")?;
        Ok(Raw(Some(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, before);
        }
    }
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let site = site::boot(&options.site, options.hosts)?;
    let mut sessions = Vec::new();
    for host in &site.hosts {
        let program = Exec { argv: vec!["bash".into(), "-l".into()], terminal: Some(size()), ..Exec::default() };
        let stream = host.open(&Request::Exec(program))?;
        sessions.push(Session { host, stream, unseen: Vec::new(), over: false });
    }
    progress::say(KEYS);
    let raw = Raw::enter()?;
    let result = talk(&mut sessions);
    drop(raw);
    println!();
    result.map(|()| ExitCode::SUCCESS)
}

/// Rows and columns of this terminal.
fn size() -> (u16, u16) {
    match tcgetwinsize(rustix::stdio::stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row, size.ws_col),
        _ => (24, 80),
    }
}

/// Passes keys and output until the person ends it, all shells have ended, or the input is over.
fn talk(sessions: &mut [Session<'_>]) -> Result<()> {
    let mut shown = 0;
    let mut escaped = false;
    let mut input = true;
    let mut known = size();
    show(sessions, shown)?;
    loop {
        for (index, session) in sessions.iter_mut().enumerate() {
            listen(session, index == shown)?;
        }
        if sessions.iter().all(|session| session.over) {
            // What came from a host while another was shown is still to be seen.
            let unseen = (0..sessions.len()).filter(|&index| sessions.get(index).is_some_and(|s| !s.unseen.is_empty()));
            return unseen.collect::<Vec<_>>().into_iter().try_for_each(|index| show(sessions, index));
        }
        if sessions.get(shown).is_none_or(|session| session.over) {
            shown = sessions.iter().position(|session| !session.over).unwrap_or(0);
            show(sessions, shown)?;
        }
        if size() != known {
            known = size();
            for session in sessions.iter().filter(|session| !session.over) {
                session.stream.resize(known.0, known.1)?;
            }
        }
        if !input {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        }
        let wait = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        if poll(&mut [PollFd::from_borrowed_fd(rustix::stdio::stdin(), PollFlags::IN)], Some(&wait)).unwrap_or(0) == 0 {
            continue;
        }
        let mut keys = [0u8; 1024];
        let count = std::io::stdin().read(&mut keys).context("read the terminal")?;
        input = count > 0;
        let mut plain = Vec::new();
        for &key in keys.get(..count).unwrap_or_default() {
            match (escaped, key) {
                (false, ESCAPE) => escaped = true,
                (false, _) => plain.push(key),
                (true, b'q') => return Ok(()),
                (true, ESCAPE) => {
                    escaped = false;
                    plain.push(key);
                }
                (true, _) => {
                    escaped = false;
                    let name = (key as char).to_string();
                    let wanted = match key {
                        b'n' => Some((shown + 1) % sessions.len()),
                        _ => sessions.iter().position(|session| session.host.name() == name),
                    };
                    match wanted {
                        Some(wanted) => {
                            type_into(sessions, shown, &mut plain)?;
                            shown = wanted;
                            show(sessions, shown)?;
                        }
                        None => print(format!("\r\n{KEYS}\r\n").as_bytes())?,
                    }
                }
            }
        }
        type_into(sessions, shown, &mut plain)?;
        if !input {
            for index in 0..sessions.len() {
                type_into(sessions, index, &mut vec![END_OF_INPUT])?;
            }
        }
    }
}

/// Sends keys to a host's shell; nobody is there to read them once it is over.
fn type_into(sessions: &[Session<'_>], index: usize, keys: &mut Vec<u8>) -> Result<()> {
    let keys = std::mem::take(keys);
    match sessions.get(index) {
        Some(session) if !session.over && !keys.is_empty() => session.stream.send(&keys),
        _ => Ok(()),
    }
}

fn show(sessions: &mut [Session<'_>], index: usize) -> Result<()> {
    let Some(session) = sessions.get_mut(index) else { return Ok(()) };
    print(format!("\r\n--- host {} ---\r\n", session.host.name()).as_bytes())?;
    print(&std::mem::take(&mut session.unseen))
}

fn listen(session: &mut Session<'_>, shown: bool) -> Result<()> {
    if session.over {
        return Ok(());
    }
    while let Some(frame) = session.stream.next_while(Duration::ZERO, || session.host.check())? {
        match frame.kind {
            Kind::Data if shown => print(&frame.body)?,
            Kind::Data => {
                session.unseen.extend_from_slice(&frame.body);
                let excess = session.unseen.len().saturating_sub(KEPT);
                session.unseen.drain(..excess);
            }
            Kind::Done | Kind::Failed => {
                session.over = true;
                return Ok(());
            }
            _ => {}
        }
    }
    Ok(())
}

fn print(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).context("write to the terminal")
}
