//! What the types alone can't say: names that are used exist, and nothing contradicts itself.

use std::collections::HashSet;
use std::ops::Range;

use toml::Spanned;

use super::{Inspect, Scenario, Step, Wait};

pub(super) struct Misfit {
    pub span: Range<usize>,
    pub message: String,
}

type Checked = Result<(), Misfit>;

fn misfit<T>(at: &Spanned<T>, message: String) -> Checked {
    Err(Misfit { span: at.span(), message })
}

/// Longest host, disk or guest name: xl's own limit is higher, but the names become file names and socket paths.
const MAX_NAME: usize = 32;

fn usable_name(name: &Spanned<String>, what: &str, seen: &mut HashSet<String>) -> Checked {
    let text = name.get_ref();
    let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if text.is_empty() || text.len() > MAX_NAME || !plain || text.starts_with(['-', '.']) {
        let rule = format!("name: a {what}'s name has 1 to {MAX_NAME} letters, digits, '-', '_' or '.'");
        return misfit(name, format!("{rule}, not {text:?}"));
    }
    if !seen.insert(text.clone()) {
        return misfit(name, format!("name: there are two {what}s {text:?}"));
    }
    Ok(())
}

struct Names<'a> {
    what: &'static str,
    known: Vec<&'a str>,
}

impl Names<'_> {
    fn has(&self, key: &str, name: &Spanned<String>) -> Checked {
        if self.known.contains(&name.get_ref().as_str()) {
            return Ok(());
        }
        let known = if self.known.is_empty() { "none".to_owned() } else { self.known.join(", ") };
        misfit(name, format!("{key}: there is no {} {:?} (there is: {known})", self.what, name.get_ref()))
    }
}

pub(super) fn check(scenario: &Scenario) -> Result<(), Misfit> {
    if scenario.hosts.is_empty() {
        return Err(Misfit { span: 0..0, message: "host: a scenario needs at least one [[host]]".to_owned() });
    }
    let mut seen = HashSet::new();
    for host in &scenario.hosts {
        usable_name(&host.name, "host", &mut seen)?;
        if host.vcpus == 0 {
            return misfit(&host.name, "vcpus: a host needs at least one".to_owned());
        }
        if host.dom0_memory >= host.memory {
            let message = "dom0-memory: it must be less than the host's memory, or no guest fits".to_owned();
            return misfit(&host.name, message);
        }
    }
    seen.clear();
    for disk in &scenario.disks {
        usable_name(&disk.name, "disk", &mut seen)?;
        if disk.size.as_mib() == 0 {
            return misfit(&disk.name, "size: a disk has at least 1M".to_owned());
        }
    }
    let hosts = Names { what: "host", known: scenario.hosts.iter().map(|h| h.name.get_ref().as_str()).collect() };
    let disks = Names { what: "disk", known: scenario.disks.iter().map(|d| d.name.get_ref().as_str()).collect() };
    let guests = Names { what: "guest", known: scenario.guests.iter().map(|g| g.name.get_ref().as_str()).collect() };
    check_guests(scenario, &disks)?;
    check_steps(scenario, &hosts, &guests)
}

fn check_guests(scenario: &Scenario, disks: &Names<'_>) -> Checked {
    let (mut seen, mut macs) = (HashSet::new(), HashSet::new());
    for guest in &scenario.guests {
        usable_name(&guest.name, "guest", &mut seen)?;
        if guest.vcpus == 0 {
            return misfit(&guest.name, "vcpus: a guest needs at least one".to_owned());
        }
        if let Some(init) = &guest.init
            && (guest.witness || guest.ramdisk.is_some())
        {
            let message = "init: it takes the witness's place and is in a ramdisk of the lab's: set witness = false, and no ramdisk";
            return misfit(init, message.to_owned());
        }
        if let Err((span, message)) = guest.workload.settings() {
            return Err(Misfit { span, message });
        }
        for vif in &guest.vifs {
            if vif.mac.get_ref().is_group() {
                return misfit(&vif.mac, format!("mac: {} is a group address", vif.mac.get_ref()));
            }
            if !macs.insert(*vif.mac.get_ref()) {
                return misfit(&vif.mac, format!("mac: {} is used twice", vif.mac.get_ref()));
            }
        }
        for vbd in &guest.vbds {
            disks.has("disk", &vbd.disk)?;
        }
    }
    Ok(())
}

/// A planted fault names the host that has it.
fn sided(fault: &str) -> bool {
    fault.starts_with("source.") || fault.starts_with("destination.")
}

fn ferry_on_both(scenario: &Scenario, step: &str, at: &Spanned<String>) -> Checked {
    if scenario.hosts.iter().filter(|h| h.ferry).count() != 2 || scenario.hosts.len() != 2 {
        return misfit(at, format!("{step}: it wants two hosts, both with `ferry = true`"));
    }
    Ok(())
}

fn check_steps(scenario: &Scenario, hosts: &Names<'_>, guests: &Names<'_>) -> Checked {
    let mut in_background: HashSet<&str> = HashSet::new();
    for step in &scenario.steps {
        let mut background = None;
        match step.get_ref() {
            Step::Create(s) => {
                guests.has("guest", &s.guest)?;
                hosts.has("on", &s.on)?;
            }
            Step::Wait(Wait { guest, .. }) | Step::Inspect(Inspect { guest, .. }) => {
                guests.has("guest", guest)?;
                if scenario.guest(guest.get_ref()).is_some_and(|g| !g.witness) {
                    return misfit(guest, "guest: it has no witness, so no report ever comes".to_owned());
                }
            }
            Step::Sleep(_) | Step::ExpectVerdict(_) => {}
            Step::Exec(s) => {
                hosts.has("on", &s.on)?;
                background = s.background.as_ref();
            }
            Step::Save(s) => guests.has("guest", &s.guest)?,
            Step::Resolve(s) => {
                guests.has("guest", &s.guest)?;
                hosts.has("on", &s.on)?;
            }
            Step::Restore(s) => {
                guests.has("guest", &s.guest)?;
                hosts.has("on", &s.on)?;
            }
            Step::Migrate(s) => {
                guests.has("guest", &s.guest)?;
                hosts.has("to", &s.to)?;
                background = s.background.as_ref();
            }
            Step::Join(s) => {
                if !in_background.remove(s.name.get_ref().as_str()) {
                    let message = format!("name: no earlier step runs in the background as {:?}", s.name.get_ref());
                    return misfit(&s.name, message);
                }
            }
            Step::Destroy(s) => guests.has("guest", &s.guest)?,
            Step::Console(s) => {
                guests.has("guest", &s.guest)?;
                if s.text.is_none() && s.expect.is_none() {
                    return misfit(&s.guest, "console: give `type`, `expect` or both".to_owned());
                }
            }
            Step::Cut(s) | Step::Heal(s) | Step::PauseHost(s) | Step::ResumeHost(s) | Step::KillHost(s) => {
                hosts.has("host", &s.host)?;
            }
            Step::Cable(s) => {
                hosts.has("host", &s.host)?;
                if s.drop_per_mille > 1000 {
                    return misfit(&s.host, format!("drop-per-mille: {} is more than 1000", s.drop_per_mille));
                }
            }
            Step::Kill(s) => {
                hosts.has("on", &s.on)?;
                if s.process.is_some() == s.pidfile.is_some() {
                    return misfit(&s.on, "kill: give either `process` or `pidfile`".to_owned());
                }
            }
            Step::Ferryd(s) => {
                hosts.has("on", &s.on)?;
                let known = scenario.host(s.on.get_ref()).is_some_and(|h| h.ferry || h.ferry_installed);
                if !known {
                    return misfit(&s.on, "on: Ferry is not installed there (`ferry` or `ferry-installed`)".to_owned());
                }
            }
            Step::Fault(s) => {
                guests.has("guest", &s.guest)?;
                ferry_on_both(scenario, "fault", &s.guest)?;
                if s.faults.get_ref().is_empty() || !s.faults.get_ref().iter().all(|fault| sided(fault)) {
                    return misfit(&s.faults, "faults: a list of \"source.…\" and \"destination.…\"".to_owned());
                }
            }
            Step::Gone(s) => {
                guests.has("guest", &s.guest)?;
                ferry_on_both(scenario, "gone", &s.guest)?;
                if !sided(s.point.get_ref()) || !s.faults.iter().all(|fault| sided(fault)) {
                    return misfit(&s.point, "gone: points are \"source.…\" and \"destination.…\"".to_owned());
                }
            }
            Step::Put(s) => hosts.has("on", &s.on)?,
            Step::Get(s) => {
                hosts.has("on", &s.on)?;
                if s.to.contains('/') || s.to.is_empty() {
                    return misfit(&s.on, "to: a file name in the run's folder, without '/'".to_owned());
                }
            }
        }
        if let Some(name) = background
            && !in_background.insert(name.get_ref())
        {
            return misfit(name, format!("background: {:?} is already used and not joined", name.get_ref()));
        }
    }
    Ok(())
}
