//! The `fault` step: a move during which something breaks, and what must hold when both hosts are done with it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use migrate::fault_points::Side;

use super::each::SHORT;
use super::host::End;
use super::plan::{host_addr, shell_word};
use super::{Executor, ferryd};
use crate::progress;
use crate::scenario::FaultStep;

/// Time between two looks whether the daemons are done.
const PERIOD: Duration = Duration::from_secs(1);
/// Makes the guest's name taken in the eyes of the preflight; no such domain can exist.
const NOBODY: &str = "/local/domain/32751";

/// Fails, and writes what is left to do, unless the daemon is there and done with everything.
const IDLE: &str = "s=$(ferry status 2>&1); f=$(find /var/lib/ferry/journal /var/lib/ferry/undo -type f); \
                    [ \"$s\" = 'no migration is under way' ] && [ -z \"$f\" ] || { echo \"$s\"; echo $f; exit 1; }";

/// The two hosts of a move.
pub(super) struct Ends {
    pub from: String,
    pub to: String,
    /// What the source calls the destination.
    addr: String,
}

impl Ends {
    /// The host on which a fault or a point is.
    pub fn of(&self, fault: &str) -> &str {
        if fault.starts_with("source.") { &self.from } else { &self.to }
    }

    /// The move, for the source's shell.
    pub fn command(&self, guest: &str) -> String {
        format!("ferry migrate {} {}", shell_word(guest), self.addr)
    }
}

/// A fault that must come to pass.
pub(super) struct Planted {
    host: String,
    point: String,
    /// How often it had before, in the host's log.
    before: u64,
}

impl Executor<'_> {
    pub(super) fn fault(&mut self, step: &FaultStep) -> Result<()> {
        let guest = step.guest.get_ref();
        let ends = self.ends(guest)?;
        let Ends { from, to, .. } = &ends;
        let planted = self.plant(&ends, step.faults.get_ref())?;
        if step.unfit {
            self.make_unfit(to, guest)?;
        }
        let moving = self.begin_move(guest, "ferry migrate", to)?;
        let ran = self.host(from)?.shell(&ends.command(guest), step.limit.0)?;
        let settled = self.wait_done(&[from, to], &planted, step.limit.0);
        if step.unfit {
            self.shell(to, &format!("xenstore-rm {NOBODY}"))?;
        }
        let moved = self.is_on(guest, to);
        self.end_move(moving, &ran, moved, None);
        settled.with_context(|| format!("ferry migrate {guest} from {from} to {to}: {}", ran.describe()))?;
        self.must_run_once(guest)?;
        let wanted = step.guest_on.map(|side| if side == Side::Destination { to } else { from });
        let now = if moved { to } else { from };
        if wanted.is_some_and(|wanted| wanted != now) {
            bail!(
                "{guest} must be on the {:?} in the end, not on {now}: {}{}{}",
                step.guest_on.unwrap_or(Side::Source),
                ran.describe(),
                self.ferryd_log(from),
                self.ferryd_log(to)
            );
        }
        progress::say(format!("{guest} runs on {now}; ferry migrate: {}", ran.describe()));
        if self.has_witness(guest) {
            self.wait_beats(guest, 2, Duration::from_secs(90))?;
        }
        Ok(())
    }

    /// Where a guest is, and the other host.
    pub(super) fn ends(&self, guest: &str) -> Result<Ends> {
        let from = self.host_of(guest)?.name().to_owned();
        let there = self.lab.hosts.iter().position(|h| h.name() != from).context("there is no other host")?;
        let to = self.lab.hosts.get(there).map(|h| h.name().to_owned()).unwrap_or_default();
        Ok(Ends { from, to, addr: host_addr(there).to_string() })
    }

    /// Starts the daemons that have a fault anew, with it.
    pub(super) fn plant(&self, ends: &Ends, faults: &[String]) -> Result<Vec<Planted>> {
        for host in [&ends.from, &ends.to] {
            let here: Vec<String> = faults.iter().filter(|fault| ends.of(fault) == host).cloned().collect();
            if !here.is_empty() {
                self.ferryd(host, &here, true)?;
            }
        }
        let planted = faults.iter().map(|fault| {
            let host = ends.of(fault).to_owned();
            let point = fault.split_once('=').map_or(fault.as_str(), |(point, _)| point).to_owned();
            Ok(Planted { before: self.fired(&host, &point)?, host, point })
        });
        planted.collect()
    }

    /// Has the preflight of a host refuse a guest.
    pub(super) fn make_unfit(&self, host: &str, guest: &str) -> Result<()> {
        self.shell(host, &format!("xenstore-write {NOBODY}/name {}", shell_word(guest))).map(drop)
    }

    /// True if it has come to pass.
    pub(super) fn has_fired(&self, planted: &Planted) -> Result<bool> {
        Ok(self.fired(&planted.host, &planted.point)? > planted.before)
    }

    /// The operator's word that the other host is fenced. It must be asked for, and then the guest must go on here.
    pub(super) fn resolve(&mut self, guest: &str, on: &str) -> Result<()> {
        let host = self.host(on)?;
        let resolve = format!("ferry resolve {}", shell_word(guest));
        let refused = host.shell(&resolve, SHORT)?;
        if refused.end != End::Exited(3) || !refused.text().contains("--peer-fenced") {
            bail!("without --peer-fenced it must be refused with exit code 3 and say so: {}", refused.describe());
        }
        let ran = host.shell(&format!("{resolve} --peer-fenced"), SHORT)?;
        if !ran.success() {
            bail!("ferry resolve --peer-fenced on {on}: {}{}", ran.describe(), self.ferryd_log(on));
        }
        let end = Instant::now() + Duration::from_secs(60);
        while self.shell(on, &format!("xl list {}", shell_word(guest)))?.contains("--p---") {
            if Instant::now() > end {
                bail!("{guest} is still paused on {on}{}", self.ferryd_log(on));
            }
            std::thread::sleep(PERIOD);
        }
        // The move ends only now.
        self.record(guest).on = Some(on.to_owned());
        let moving = self.moves.iter().rposition(|m| m.guest == guest).context("no step has moved it")?;
        let moved = self.moves.get(moving).is_some_and(|m| m.to == on);
        self.end_move(moving, &ran, moved, None);
        Ok(())
    }

    pub(super) fn shell(&self, host: &str, script: &str) -> Result<String> {
        let ran = self.host(host)?.shell(script, SHORT)?;
        if !ran.success() {
            bail!("on {host}: {script}: {}", ran.describe());
        }
        Ok(ran.stdout)
    }

    /// How often a fault has come to pass on a host.
    fn fired(&self, host: &str, point: &str) -> Result<u64> {
        let text = self.shell(host, &ferryd::count_fired(point))?;
        text.trim().parse().with_context(|| format!("on {host}: a count of faults was expected, not {text:?}"))
    }

    /// Waits until every fault has come to pass and both daemons are done with the move.
    fn wait_done(&self, hosts: &[&str], planted: &[Planted], limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            let mut open = Vec::new();
            for fault in planted {
                if !self.has_fired(fault)? {
                    open.push(format!("the fault at {} did not come to pass", fault.point));
                }
            }
            for host in hosts {
                let ran = self.host(host)?.shell(IDLE, SHORT)?;
                if !ran.success() {
                    open.push(format!("{host} is not done: {}", ran.text().trim()));
                }
            }
            if open.is_empty() {
                return Ok(());
            }
            if Instant::now() > end {
                let logs: Vec<String> = hosts.iter().map(|host| self.ferryd_log(host)).collect();
                bail!("{}{}", open.join("; "), logs.concat());
            }
            std::thread::sleep(PERIOD);
        }
    }

    pub(super) fn ferryd_log(&self, host: &str) -> String {
        let text = self.shell(host, &format!("tail -n 25 {}", ferryd::LOG)).unwrap_or_default();
        let lines: String = text.lines().map(|line| format!("\n    | {line}")).collect();
        format!("\n  ferryd on {host}:{lines}")
    }

    /// By the look at all copies that ended the move.
    fn must_run_once(&self, guest: &str) -> Result<()> {
        let copies = self.guests.get(guest).and_then(|r| r.copies.last()).context("nobody looked at the guest")?;
        if copies.second.len() != 1 || copies.running().len() != 1 || !copies.unseen.is_empty() {
            bail!("exactly one copy of {guest} must be there, and run: {}", copies.describe());
        }
        Ok(())
    }
}
