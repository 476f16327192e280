//! The `gone` step: a move during which one of the two hosts loses its power, and what must hold on the other.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::Executor;
use super::copies::Copies;
use super::each::SHORT;
use super::fault::{Ends, Planted};
use super::host::{End, Ran};
use super::plan::shell_word;
use crate::progress;
use crate::scenario::{Gone, Then};

/// Time between two looks at a host.
const PERIOD: Duration = Duration::from_millis(300);
/// States in which a daemon has nothing left to do but to tell a peer that is gone.
const SETTLED: [&str; 4] = ["rolled-back", "left", "running", "refused"];
/// States in which only an operator can decide.
const UNDECIDED: [&str; 2] = ["committed", "ready"];

/// What `ferry status --json` tells of a migration, as far as it matters here.
#[derive(Deserialize)]
struct Open {
    state: String,
}

impl Executor<'_> {
    pub(super) fn gone(&mut self, step: &Gone) -> Result<()> {
        let guest = step.guest.get_ref();
        let ends = self.ends(guest)?;
        let point = step.point.get_ref();
        let victim = ends.of(point);
        let left = if victim == ends.from { &ends.to } else { &ends.from };
        // The thread stands still and the daemon's others go on, so that its peer sees nothing until the power is gone.
        let mut faults = step.faults.clone();
        faults.push(format!("{point}=hang"));
        let planted = self.plant(&ends, &faults)?;
        if step.unfit {
            self.make_unfit(&ends.to, guest)?;
        }
        let moving = self.begin_move(guest, "ferry migrate", &ends.to)?;
        // It waits for the outcome, for as long as it takes.
        let source = Arc::clone(self.host(&ends.from)?);
        let script = ends.command(guest);
        let limit = step.limit.0 * 2;
        let command = thread::spawn(move || source.shell(&script, limit));
        self.wait_fired(&planted, &ends, step.limit.0)?;
        self.host(victim)?.kill();
        let began = Instant::now();
        self.wait_left(left, guest, step.then, step.limit.0)
            .with_context(|| format!("{victim} was switched off at {point}"))?;
        let waited = began.elapsed().as_secs_f64();
        progress::say(format!("{left} knew where it stands {waited:.1} s after {victim} was switched off"));
        if step.then == Then::Waits {
            self.resolve(guest, left)?;
        }
        let ran = match command.join() {
            Ok(Ok(ran)) => ran,
            // Whoever gave the command is gone with its host.
            Ok(Err(error)) => Ran { end: End::TimedOut, stdout: String::new(), stderr: format!("{error:#}") },
            Err(_) => bail!("the thread with `ferry migrate` panicked"),
        };
        if victim != ends.from && ran.end == End::TimedOut {
            bail!("`ferry migrate` on {left} did not end{}", self.ferryd_log(left));
        }
        match step.then {
            Then::Lost => {
                self.lab.peer.rest(guest);
                self.record(guest).on = None;
            }
            Then::Waits => {}
            Then::Runs => self.end_move(moving, &ran, left == &ends.to, None),
        }
        self.must_be_as(step.then, guest, left)?;
        if step.then != Then::Lost && self.has_witness(guest) {
            self.wait_beats(guest, 2, Duration::from_secs(90))?;
        }
        Ok(())
    }

    fn wait_fired(&self, planted: &[Planted], ends: &Ends, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            let fired: Vec<bool> = planted.iter().map(|fault| self.has_fired(fault)).collect::<Result<_>>()?;
            if fired.iter().all(|fired| *fired) {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("the point was not come to{}{}", self.ferryd_log(&ends.from), self.ferryd_log(&ends.to));
            }
            thread::sleep(PERIOD);
        }
    }

    /// Waits until the daemon of the host that is left knows where it stands.
    fn wait_left(&self, left: &str, guest: &str, then: Then, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            let text = self.shell(left, "ferry status --json")?;
            let open: Vec<Open> =
                serde_json::from_str(&text).with_context(|| format!("ferry status --json: {text}"))?;
            let listed = self.host(left)?.shell(&format!("xl list {}", shell_word(guest)), SHORT)?;
            let there = match then {
                Then::Lost => !listed.success(),
                Then::Runs => listed.success() && !listed.stdout.contains("--p---"),
                Then::Waits => listed.stdout.contains("--p---"),
            };
            let states = if then == Then::Waits { &UNDECIDED[..] } else { &SETTLED[..] };
            let known = open.iter().all(|migration| states.contains(&migration.state.as_str()));
            if there && known && (then != Then::Waits || open.len() == 1) {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("{left} has not come to {then:?}: {text}{}{}", listed.describe(), self.ferryd_log(left));
            }
            thread::sleep(PERIOD);
        }
    }

    /// Looks at what the host that is left has of the guest, in its list and in the daemon's folders.
    fn must_be_as(&mut self, then: Then, guest: &str, left: &str) -> Result<()> {
        let host = self.lab.hosts.iter().map(|h| &**h).filter(|h| h.name() == left);
        let copies = Copies::look(guest, self.lab.clock.now(), self.lab.apart, host);
        let (there, running) = if then == Then::Lost { (0, 0) } else { (1, 1) };
        if copies.second.len() != there || copies.running().len() != running || !copies.unseen.is_empty() {
            bail!("{left} must have {there} copies of {guest}, and run them: {}", copies.describe());
        }
        let undo = self.shell(left, "find /var/lib/ferry/undo -type f")?;
        if !undo.trim().is_empty() {
            bail!("{left} has still to undo: {undo}{}", self.ferryd_log(left));
        }
        Ok(())
    }
}
