//! S1 seen from outside: on which hosts a copy of a guest exists, and which of them uses CPU time.

use std::time::Duration;

use serde::Serialize;

use super::host::LabHost;

/// How long a look may take.
const LIMIT: Duration = Duration::from_secs(20);

/// One domain of `xl list`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Listed {
    pub host: String,
    pub name: String,
    pub domid: u16,
    /// As `xl list` shows it: r, b, p, s, c, d or dashes.
    pub state: String,
    /// CPU time used, s.
    pub seconds: f64,
}

/// Reads `xl list`; lines that are no domain are left out.
pub fn parse(host: &str, text: &str) -> Vec<Listed> {
    let domain = |line: &str| {
        // From the right, because a name may hold spaces: name, id, memory, vCPUs, state, time.
        let mut words = line.split_ascii_whitespace().rev();
        let seconds = words.next()?.parse().ok()?;
        let state = words.next()?.to_owned();
        let (_vcpus, _memory) = (words.next()?.parse::<u32>().ok()?, words.next()?.parse::<u64>().ok()?);
        let domid = words.next()?.parse().ok()?;
        let mut name: Vec<&str> = words.collect();
        name.reverse();
        Some(Listed { host: host.to_owned(), name: name.join(" "), domid, state, seconds })
    };
    text.lines().filter_map(domain).collect()
}

/// Two looks at all copies of one guest, a little apart.
#[derive(Clone, Debug, Serialize)]
pub struct Copies {
    pub guest: String,
    /// When the first look was.
    pub at: Duration,
    pub first: Vec<Listed>,
    pub second: Vec<Listed>,
    /// Hosts that could not be looked at.
    pub unseen: Vec<String>,
}

impl Copies {
    /// Looks twice at each host, `apart` from each other. Copies are known by the guest's name, with the suffixes that `xl migrate` gives.
    pub fn look<'h>(
        guest: &str,
        at: Duration,
        apart: Duration,
        hosts: impl Iterator<Item = &'h dyn LabHost> + Clone,
    ) -> Self {
        let mut unseen = Vec::new();
        let mut look = |pause: Duration| {
            std::thread::sleep(pause);
            let mut seen = Vec::new();
            for host in hosts.clone() {
                match host.shell("xl list", LIMIT) {
                    Ok(ran) if ran.success() => seen.extend(parse(host.name(), &ran.stdout)),
                    _ if !unseen.iter().any(|name| name == host.name()) => unseen.push(host.name().to_owned()),
                    _ => {}
                }
            }
            seen.retain(|d: &Listed| {
                d.name.strip_prefix(guest).is_some_and(|rest| rest.is_empty() || rest.starts_with("--"))
            });
            seen
        };
        let first = look(Duration::ZERO);
        let second = look(apart);
        Self { guest: guest.to_owned(), at, first, second, unseen }
    }

    /// Copies that used CPU time between the two looks, with how much.
    pub fn running(&self) -> Vec<(&Listed, f64)> {
        self.second
            .iter()
            .filter_map(|after| {
                let before = self.first.iter().find(|b| (&b.host, b.domid) == (&after.host, after.domid));
                let used = after.seconds - before.map_or(0.0, |b| b.seconds);
                (used > 0.0).then_some((after, used))
            })
            .collect()
    }

    /// One line for the evidence.
    pub fn describe(&self) -> String {
        let running = self.running();
        let used = |d: &Listed| running.iter().find(|(r, _)| *r == d).map_or(0.0, |(_, used)| *used);
        let copies: Vec<String> = self
            .second
            .iter()
            .map(|d| format!("{} as d{} {:?} used {:.1} s", d.host, d.domid, d.name, used(d)))
            .collect();
        let at = self.at.as_secs_f64();
        if copies.is_empty() {
            format!("at {at:.1} s no host has it")
        } else {
            format!("at {at:.1} s: {}", copies.join("; "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "\
Name                                        ID   Mem VCPUs\tState\tTime(s)
Domain-0                                     0  1024     2     r-----      61.4
g--migratedaway                              3   256     1     ---ss-       4.1
a guest                                      4   256     1     -b----       0.2
";

    #[test]
    fn the_list_is_read() {
        let list = parse("a", LIST);
        assert_eq!(list.len(), 3);
        assert_eq!((list[1].name.as_str(), list[1].domid, list[1].seconds), ("g--migratedaway", 3, 4.1));
        assert_eq!((list[2].name.as_str(), list[2].state.as_str()), ("a guest", "-b----"));
    }

    #[test]
    fn only_copies_that_use_time_run() {
        let at = |host: &str, domid, seconds| Listed {
            host: host.to_owned(),
            name: "g".to_owned(),
            domid,
            state: "-b----".to_owned(),
            seconds,
        };
        let copies = |second| Copies {
            guest: "g".to_owned(),
            at: Duration::ZERO,
            first: vec![at("a", 1, 5.0), at("b", 1, 2.0)],
            second,
            unseen: vec![],
        };
        assert_eq!(copies(vec![at("a", 1, 5.0), at("b", 1, 2.5)]).running().len(), 1);
        assert_eq!(copies(vec![at("a", 1, 5.1), at("b", 1, 2.5)]).running().len(), 2);
        assert!(copies(vec![at("a", 1, 5.0)]).running().is_empty());
    }
}
