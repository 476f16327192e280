//! What each kind of step does.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hypervisor::inspect::GuestState;
use migrate::report::Report;

use super::host::{End, Ran};
use super::plan::{self, DOM0_FOLDER, GuestFiles, shell_word};
use super::reach::type_text;
use super::{Executor, Pending, ferryd};
use crate::inspection::{self, Witnesses};
use crate::progress;
use crate::scenario::{Console, Inspect, Migrate, MigrateEnd, MigrateTool, Step};

/// How long a look at a log or at a domid may take.
pub(super) const SHORT: Duration = Duration::from_secs(20);

/// What a step does, for a person.
pub(super) fn describe(executor: &Executor<'_>, step: &Step) -> String {
    let first_line = |text: &str| text.trim().lines().next().unwrap_or("").chars().take(80).collect::<String>();
    match step {
        Step::Create(s) => format!("create {} on {}", s.guest.get_ref(), s.on.get_ref()),
        Step::Wait(s) => format!("wait for {} reports of {}", s.reports, s.guest.get_ref()),
        Step::Sleep(s) => format!("let {:.1} s pass", s.0.as_secs_f64()),
        Step::Exec(s) => format!("on {}: {}", s.on.get_ref(), first_line(&s.run)),
        Step::Save(s) => format!("xl save {} to {}", s.guest.get_ref(), s.file),
        Step::Restore(s) => format!("xl restore {} on {} from {}", s.guest.get_ref(), s.on.get_ref(), s.file),
        Step::Migrate(s) => {
            let from = executor.guests.get(s.guest.get_ref()).and_then(|r| r.on.as_deref()).unwrap_or("nowhere");
            let tool = tool_name(s.tool);
            format!("{tool} {} from {from} to {}", s.guest.get_ref(), s.to.get_ref())
        }
        Step::Join(s) => format!("wait for {}", s.name.get_ref()),
        Step::Destroy(s) => format!("destroy {}", s.guest.get_ref()),
        Step::Console(s) => match (&s.text, &s.expect) {
            (Some(text), Some(want)) => format!("type {text:?} on {}'s console, expect {want:?}", s.guest.get_ref()),
            (Some(text), None) => format!("type {text:?} on {}'s console", s.guest.get_ref()),
            (None, want) => format!("expect {:?} on {}'s console", want.as_deref().unwrap_or(""), s.guest.get_ref()),
        },
        Step::Cut(s) => format!("cut the cable of {}", s.host.get_ref()),
        Step::Heal(s) => format!("heal the cable of {}", s.host.get_ref()),
        Step::Cable(s) => format!(
            "cable of {}: {:.1} ms delay, {} of 1000 frames lost",
            s.host.get_ref(),
            s.delay.0.as_secs_f64() * 1e3,
            s.drop_per_mille
        ),
        Step::Kill(s) => {
            let what = s.process.as_deref().or(s.pidfile.as_deref()).unwrap_or("");
            format!("on {}: send SIG{} to {what}", s.on.get_ref(), s.signal)
        }
        Step::Ferryd(s) if s.faults.is_empty() => format!("on {}: start ferryd", s.on.get_ref()),
        Step::Ferryd(s) => format!("on {}: start ferryd with {}", s.on.get_ref(), s.faults.join(", ")),
        Step::Fault(s) => format!("move {} with {}", s.guest.get_ref(), s.faults.get_ref().join(", ")),
        Step::Gone(s) => format!("move {} and switch a host off at {}", s.guest.get_ref(), s.point.get_ref()),
        Step::Resolve(s) => format!("resolve {} on {}, its peer being fenced", s.guest.get_ref(), s.on.get_ref()),
        Step::PauseHost(s) => format!("pause host {}", s.host.get_ref()),
        Step::ResumeHost(s) => format!("resume host {}", s.host.get_ref()),
        Step::KillHost(s) => format!("switch host {} off", s.host.get_ref()),
        Step::Put(s) => format!("put {} on {} as {}", s.from.display(), s.on.get_ref(), s.to),
        Step::Get(s) => format!("get {} from {} as {}", s.from, s.on.get_ref(), s.to),
        Step::Inspect(s) => format!("ferry inspect {}, compared with the guest and stock tools", s.guest.get_ref()),
        Step::ExpectVerdict(_) => "compare the verdict so far".to_owned(),
    }
}

fn tool_name(tool: MigrateTool) -> &'static str {
    match tool {
        MigrateTool::Xl => "xl migrate",
        MigrateTool::Ferry => "ferry migrate",
    }
}

impl Executor<'_> {
    pub(super) fn carry_out(&mut self, number: usize, what: &str, step: Step) -> Result<()> {
        match &step {
            Step::Create(s) => self.create(s.guest.get_ref(), s.on.get_ref(), s.paused, s.limit.0),
            Step::Wait(s) => {
                let guest = s.guest.get_ref();
                if let Err(error) = self.wait_beats(guest, s.reports, s.limit.0) {
                    let logs = self.host_of(guest).map(|host| self.logs(host.name(), Some(guest))).unwrap_or_default();
                    bail!("{error}{logs}");
                }
                if self.guests.get(guest).is_some_and(|r| r.first.is_none()) {
                    let first = self.snapshot(guest)?;
                    self.record(guest).first = Some(first);
                }
                Ok(())
            }
            Step::Sleep(span) => {
                std::thread::sleep(span.0);
                Ok(())
            }
            Step::Exec(s) => {
                if let Some(name) = &s.background {
                    return self.start(number, what, &step, name.get_ref(), s.on.get_ref(), &s.run, s.limit.0, None);
                }
                let ran = self.host(s.on.get_ref())?.shell(&s.run, s.limit.0)?;
                check_exec(s, &ran)
            }
            Step::Save(s) => self.save(s.guest.get_ref(), &s.file, s.limit.0),
            Step::Restore(s) => self.restore(s.guest.get_ref(), s.on.get_ref(), &s.file, s.limit.0),
            Step::Migrate(s) => self.migrate(number, what, &step, s),
            Step::Join(s) => self.join(s.name.get_ref(), s.limit.0),
            Step::Destroy(s) => {
                let guest = s.guest.get_ref();
                let host = self.host_of(guest)?;
                self.lab.peer.rest(guest);
                let ran = host.shell(&format!("xl destroy {}", shell_word(guest)), SHORT)?;
                self.must(&ran, "xl destroy", host.name(), Some(guest))?;
                self.record(guest).on = None;
                Ok(())
            }
            Step::Console(s) => self.console(s),
            Step::Cut(s) => self.cable(s.host.get_ref(), |cable| cable.up = false),
            Step::Heal(s) => self.cable(s.host.get_ref(), |cable| *cable = Default::default()),
            Step::Cable(s) => self.cable(s.host.get_ref(), |cable| {
                cable.delay = s.delay.0;
                cable.drop_per_mille = s.drop_per_mille;
            }),
            Step::Kill(s) => {
                let pids = match (&s.process, &s.pidfile) {
                    (Some(name), _) => format!("$(pidof {})", shell_word(name)),
                    (None, Some(file)) => format!("$(cat {})", shell_word(file)),
                    (None, None) => bail!("neither a process nor a pidfile is named"),
                };
                let script =
                    format!("p={pids}; [ -n \"$p\" ] || {{ echo no such process; exit 1; }}; kill -s {} $p", s.signal);
                let ran = self.host(s.on.get_ref())?.shell(&script, SHORT)?;
                self.must(&ran, "kill", s.on.get_ref(), None)
            }
            Step::Ferryd(s) => self.ferryd(s.on.get_ref(), &s.faults, s.respawn),
            Step::Fault(s) => self.fault(s),
            Step::Gone(s) => self.gone(s),
            Step::Resolve(s) => self.resolve(s.guest.get_ref(), s.on.get_ref()),
            Step::PauseHost(s) => self.host(s.host.get_ref())?.pause(),
            Step::ResumeHost(s) => self.host(s.host.get_ref())?.resume(),
            Step::KillHost(s) => {
                self.host(s.host.get_ref())?.kill();
                let gone: Vec<String> = self
                    .guests
                    .iter()
                    .filter(|(_, r)| r.on.as_deref() == Some(s.host.get_ref()))
                    .map(|(name, _)| name.clone())
                    .collect();
                for guest in gone {
                    self.record(&guest).on = None;
                }
                Ok(())
            }
            Step::Put(s) => {
                let from = self.beside(&s.from);
                let bytes = std::fs::read(&from).with_context(|| format!("read {}", from.display()))?;
                let mode = if s.executable { 0o755 } else { 0o644 };
                self.host(s.on.get_ref())?.put(&bytes, &s.to, mode)
            }
            Step::Get(s) => {
                let bytes = self.host(s.on.get_ref())?.get(&s.from)?;
                let to = self.lab.folder.join(&s.to);
                std::fs::write(&to, bytes).with_context(|| format!("write {}", to.display()))
            }
            Step::Inspect(s) => self.inspect(s),
            Step::ExpectVerdict(_) => bail!("the verdict is compared elsewhere"),
        }
    }

    /// A file that the scenario names: beside it, unless its path is absolute.
    fn beside(&self, path: &std::path::Path) -> PathBuf {
        self.lab.base.join(path)
    }

    /// The last lines of the logs that tell why a guest's step failed on a host.
    fn logs(&self, host: &str, guest: Option<&str>) -> String {
        let Ok(host) = self.host(host) else { return String::new() };
        let mut text = String::new();
        if let Some(guest) = guest {
            let files = [format!("/var/log/xen/xl-{guest}.log"), format!("/var/log/xen/console/guest-{guest}.log")];
            let words: Vec<String> = files.iter().map(|f| shell_word(f)).collect();
            let script =
                format!("for f in {}; do [ -s \"$f\" ] && echo \"$f:\" && tail -n 10 \"$f\"; done", words.join(" "));
            if let Ok(ran) = host.shell(&script, SHORT) {
                text.extend(ran.stdout.lines().map(|line| format!("\n    | {line}")));
            }
        }
        format!("{text}\n{}", host.console_tail())
    }

    /// Turns a command that did not end with exit code 0 into an error with the right logs.
    fn must(&self, ran: &Ran, what: &str, host: &str, guest: Option<&str>) -> Result<()> {
        if ran.success() {
            return Ok(());
        }
        bail!("{what} on {host}: {}{}", ran.describe(), self.logs(host, guest))
    }

    /// Starts Ferry's daemon on a host, after ending one that runs.
    pub(super) fn ferryd(&self, on: &str, faults: &[String], respawn: bool) -> Result<()> {
        let host = self.host(on)?;
        self.must(&host.shell(&ferryd::stop(), SHORT)?, "stop ferryd", on, None)?;
        self.must(&host.shell(&ferryd::start(faults, respawn), SHORT * 2)?, "start ferryd", on, None)
    }

    fn create(&mut self, guest: &str, on: &str, paused: bool, limit: Duration) -> Result<()> {
        let Some((index, entry)) = self.lab.scenario.guests.iter().enumerate().find(|(_, g)| g.name.get_ref() == guest)
        else {
            bail!("there is no guest {guest}");
        };
        let host = self.host(on)?;
        let files = GuestFiles::new(entry);
        host.put(plan::xl_config(index, entry, self.lab.disks).as_bytes(), &files.config, 0o644)?;
        for (own, path) in [(&entry.kernel, &files.kernel), (&entry.ramdisk, &files.ramdisk)] {
            if let Some(own) = own {
                let local = self.beside(own);
                let bytes =
                    std::fs::read(&local).with_context(|| format!("guest {guest}: read {}", local.display()))?;
                host.put(&bytes, path, 0o644)?;
            }
        }
        {
            let mut switch = self.lab.network.switch();
            for vif in &entry.vifs {
                switch.watch(*vif.mac.get_ref(), guest);
            }
            switch.new_epoch(&format!("create {guest} on {on}"));
        }
        if !entry.vifs.is_empty() {
            self.lab.peer.begin(guest);
        }
        let paused = if paused { "-p " } else { "" };
        let ran = host.shell(&format!("xl create {paused}{}", shell_word(&files.config)), limit)?;
        self.must(&ran, "xl create", on, Some(guest))?;
        let record = self.record(guest);
        record.on = Some(on.to_owned());
        record.created = true;
        Ok(())
    }

    /// Asks `ferry inspect`, the guest and stock tools, and compares. A guest whose ports change meanwhile is asked again.
    fn inspect(&mut self, step: &Inspect) -> Result<()> {
        let guest = step.guest.get_ref();
        let host = self.host_of(guest)?;
        let word = shell_word(guest);
        let ask = |me: &Self, what: &str, script: &str| -> Result<String> {
            let ran = host.shell(script, SHORT)?;
            me.must(&ran, what, host.name(), Some(guest))?;
            Ok(ran.stdout)
        };
        for last in [false, false, false, false, true] {
            let before = self.snapshot(guest)?.body;
            let text = ask(self, "ferry inspect", &format!("ferry inspect {word} --json"))?;
            let state: GuestState = serde_json::from_str(&text).context("read what `ferry inspect --json` wrote")?;
            let lsevtchn = ask(self, "lsevtchn", &format!("/usr/lib/xen-*/bin/lsevtchn {}", state.domain.domid))?;
            // Before the key, whose output may push the vectors out of Xen's log, and after it.
            let mut dmesg = ask(self, "xl dmesg", "xl dmesg")?;
            dmesg.push_str(&ask(self, "xl debug-keys e", "xl debug-keys e && xl dmesg")?);
            let console = ask(self, "read the console", &format!("cat /var/log/xen/console/guest-{guest}.log"))?;
            let after = self.snapshot(guest)?.body;
            let others =
                Witnesses { before: &before, after: &after, console: &console, lsevtchn: &lsevtchn, dmesg: &dmesg };
            // A kernel that is between two timers is as little of use as one that opens ports.
            let usable = others.settled() && inspection::has_timer(&state);
            if !usable && !last {
                continue;
            }
            let file = self.lab.folder.join(format!("inspect-{guest}.json"));
            std::fs::write(&file, &text).with_context(|| format!("write {}", file.display()))?;
            let timing = &state.timing;
            let parts: Vec<String> =
                timing.parts_us.iter().map(|(part, us)| format!("{part} {:.1} ms", *us as f64 / 1e3)).collect();
            let paused = Duration::from_micros(timing.paused_us);
            progress::say(format!(
                "ferry inspect {guest}: held for {:.1} ms: {}",
                paused.as_secs_f64() * 1e3,
                parts.join(", ")
            ));
            let mut odds = inspection::disagreements(&state, &others);
            if timing.paused_us == 0 || paused >= step.pause_limit.0 {
                odds.push(format!("the guest was held for {paused:?}; the limit is {:?}", step.pause_limit.0));
            }
            if !odds.is_empty() {
                bail!("ferry inspect {guest} (kept in {}):\n    {}", file.display(), odds.join("\n    "));
            }
            return Ok(());
        }
        Ok(())
    }

    fn save(&mut self, guest: &str, file: &str, limit: Duration) -> Result<()> {
        let host = self.host_of(guest)?;
        let index = self.begin_move(guest, "xl save, xl restore", host.name())?;
        let ran = host.shell(&format!("xl save {} {}", shell_word(guest), shell_word(file)), limit)?;
        self.must(&ran, "xl save", host.name(), Some(guest))?;
        self.saves.insert(guest.to_owned(), index);
        Ok(())
    }

    fn restore(&mut self, guest: &str, on: &str, file: &str, limit: Duration) -> Result<()> {
        let host = self.host(on)?;
        let index =
            self.saves.remove(guest).with_context(|| format!("guest {guest} was not saved by a step before"))?;
        if let Some(entry) = self.moves.get_mut(index) {
            entry.to = on.to_owned();
        }
        let ran = host.shell(&format!("xl restore {}", shell_word(file)), limit)?;
        let length = host.shell(&format!("stat -c %s {}", shell_word(file)), SHORT)?;
        let bytes = length.stdout.trim().parse().ok();
        self.end_move(index, &ran, ran.success(), bytes);
        self.must(&ran, "xl restore", on, Some(guest))
    }

    fn migrate(&mut self, number: usize, what: &str, step: &Step, how: &Migrate) -> Result<()> {
        let guest = how.guest.get_ref();
        let to = how.to.get_ref();
        let from = self.host_of(guest)?;
        let Some(index) = self.lab.hosts.iter().position(|h| h.name() == to) else { bail!("there is no host {to}") };
        let addr = plan::host_addr(index);
        let (word, options) = (shell_word(guest), &how.options);
        let script = match how.tool {
            MigrateTool::Xl => format!("xl migrate -s {DOM0_FOLDER}/lab-remote {options} {word} {addr}"),
            MigrateTool::Ferry => {
                format!("ferry migrate --report {} {options} {word} {addr}", plan::report_file(self.moves.len()))
            }
        };
        let moving = self.begin_move(guest, tool_name(how.tool), to)?;
        if let Some(entry) = self.moves.get_mut(moving) {
            entry.expected = how.verdict.clone();
        }
        if let Some(name) = &how.background {
            return self.start(number, what, step, name.get_ref(), from.name(), &script, how.limit.0, Some(moving));
        }
        let ran = from.shell(&script, how.limit.0)?;
        self.migrated(how, moving, &ran)
    }

    /// The migration's command has ended: is the guest where it should be?
    fn migrated(&mut self, how: &Migrate, moving: usize, ran: &Ran) -> Result<()> {
        let guest = how.guest.get_ref();
        let (from, to) = self.moves.get(moving).map(|m| (m.from.clone(), m.to.clone())).unwrap_or_default();
        if how.tool == MigrateTool::Ferry {
            let report = self.report_of(&from, moving, ran)?;
            self.moves.get_mut(moving).into_iter().for_each(|m| m.report.clone_from(&report));
        }
        let arrived = ran.success() && self.is_on(guest, &to);
        self.end_move(moving, ran, arrived, None);
        let tool = tool_name(how.tool);
        match how.end {
            MigrateEnd::Moved if !arrived => {
                bail!(
                    "{tool} {guest} to {to}: {}{}{}",
                    ran.describe(),
                    self.logs(&from, Some(guest)),
                    self.logs(&to, Some(guest))
                )
            }
            MigrateEnd::Stays if ran.success() || !self.is_on(guest, &from) => {
                bail!("{tool} {guest} to {to} should have failed and left it on {from}: {}", ran.describe())
            }
            _ => {}
        }
        if let Some(want) = &how.expect
            && !ran.text().contains(want.as_str())
        {
            bail!("{tool} {guest} to {to} did not write {want:?}: {}", ran.describe());
        }
        Ok(())
    }

    /// The report that `ferry migrate` has written for its caller; `None` if it has come to none.
    fn report_of(&self, from: &str, moving: usize, ran: &Ran) -> Result<Option<Report>> {
        if !matches!(ran.end, End::Exited(_)) {
            return Ok(None);
        }
        let cat = self.host(from)?.shell(&format!("cat {}", plan::report_file(moving)), SHORT)?;
        if !cat.success() || cat.stdout.trim().is_empty() {
            return Ok(None);
        }
        serde_json::from_str(&cat.stdout).map(Some).context("read the report of ferry migrate")
    }

    pub(super) fn is_on(&self, guest: &str, host: &str) -> bool {
        let script = format!("xl domid {}", shell_word(guest));
        self.host(host).and_then(|h| h.shell(&script, SHORT)).is_ok_and(|ran| ran.success())
    }

    #[expect(clippy::too_many_arguments, reason = "all of it is what a step in the background is")]
    fn start(
        &mut self,
        number: usize,
        what: &str,
        step: &Step,
        name: &str,
        on: &str,
        script: &str,
        limit: Duration,
        moving: Option<usize>,
    ) -> Result<()> {
        let host = self.host(on)?.clone();
        let script = script.to_owned();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || host.shell(&script, limit))?;
        let began = self.lab.clock.now();
        let pending = Pending { number, what: what.to_owned(), began, step: step.clone(), moving, thread };
        self.pending.insert(name.to_owned(), pending);
        Ok(())
    }

    pub(super) fn join(&mut self, name: &str, limit: Duration) -> Result<()> {
        let pending =
            self.pending.remove(name).with_context(|| format!("nothing runs in the background as {name:?}"))?;
        let end = Instant::now() + limit;
        while !pending.thread.is_finished() {
            if Instant::now() > end {
                bail!("step {} ({}) did not end within {} s more", pending.number, pending.what, limit.as_secs());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let Ok(ran) = pending.thread.join() else { bail!("the thread of step {} panicked", pending.number) };
        let ran = ran.with_context(|| format!("step {}: {}", pending.number, pending.what))?;
        let took = self.lab.clock.now().saturating_sub(pending.began);
        progress::say(format!("step {} ended {:.1} s after it began", pending.number, took.as_secs_f64()));
        match (&pending.step, pending.moving) {
            (Step::Migrate(how), Some(moving)) => self.migrated(how, moving, &ran),
            (Step::Exec(s), _) => check_exec(s, &ran),
            _ => Ok(()),
        }
    }

    fn cable(&mut self, host: &str, change: impl FnOnce(&mut crate::net::switch::Cable)) -> Result<()> {
        let port = self.port(host).with_context(|| format!("host {host} is not on the switch"))?;
        if let Some(cable) = self.lab.network.switch().cable_mut(port) {
            change(cable);
        }
        Ok(())
    }

    fn console(&mut self, step: &Console) -> Result<()> {
        let guest = step.guest.get_ref();
        let host = self.host_of(guest)?;
        let log = shell_word(&format!("/var/log/xen/console/guest-{guest}.log"));
        let mut from = 0;
        if let Some(text) = &step.text {
            let size = host.shell(&format!("stat -c %s {log} 2>/dev/null || echo 0"), SHORT)?;
            from = size.stdout.trim().parse::<u64>().unwrap_or(0);
            self.note_typed(guest, text);
            let ran = host.shell(&type_text(guest, text), SHORT)?;
            self.must(&ran, "type on the console", host.name(), Some(guest))?;
        }
        let Some(want) = &step.expect else { return Ok(()) };
        let end = Instant::now() + step.limit.0;
        let script = format!("tail -c +{} {log} | grep -qaF -- {}", from + 1, shell_word(want));
        loop {
            let ran = host.shell(&script, SHORT)?;
            match ran.end {
                End::Exited(0) => return Ok(()),
                _ if Instant::now() < end => std::thread::sleep(Duration::from_millis(300)),
                _ => bail!(
                    "{want:?} did not appear on {guest}'s console within {} s{}",
                    step.limit.0.as_secs(),
                    self.logs(host.name(), Some(guest))
                ),
            }
        }
    }
}

fn check_exec(step: &crate::scenario::Exec, ran: &Ran) -> Result<()> {
    if step.exit != -1 && ran.end != End::Exited(step.exit) {
        bail!("exit code {} was expected: {}", step.exit, ran.describe());
    }
    let text = ran.text();
    if let Some(want) = &step.expect
        && !text.contains(want.as_str())
    {
        bail!("{want:?} was expected in the output: {}", ran.describe());
    }
    if let Some(refused) = &step.refuse
        && text.contains(refused.as_str())
    {
        bail!("{refused:?} must not be in the output: {}", ran.describe());
    }
    Ok(())
}
