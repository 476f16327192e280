//! `CONTROL`: the commands of `xenstore-control`, with the answers that the stock daemon gives.

use crate::domain_ops::domid_arg;
use crate::host::{Host, HostCommand};
use crate::quota::Quotas;
use crate::store::{Answer, Caller, Store, ok};
use std::fmt::Write;
use tracing::info;
use xenstore_wire::{Errno, Header, payload};

const HELP: &str = "check\t\nlog\ton|off\nlive-update\t[-c <cmdline>] [-F] [-t <timeout>] <file>\n    Default timeout is \
60 seconds.\nlogfile\t<file>\nmemreport\t[<file>]\nprint\t<string>\nquota\t[set <name> <val>|<domid>]\n\
quota-soft\t[set <name> <val>]\nhelp\t\n";

fn text(s: String) -> Answer {
    Ok(Some(payload::join([s]).into()))
}

impl Store {
    pub(crate) fn op_control(&mut self, c: &Caller, h: &Header, p: &[u8], host: &mut dyn Host) -> Answer {
        let (command, rest) = payload::split_first(p)?;
        let args: Vec<&[u8]> = payload::strings(rest).collect();
        match (command, &args[..]) {
            (b"check", []) => {
                let wrong = self.check();
                for w in &wrong {
                    tracing::error!("check: {w}");
                }
                if wrong.is_empty() { ok() } else { Err(Errno::EIO) }
            }
            (b"log", [b"on"]) => host.command(HostCommand::Log(true)).and_then(|()| ok()),
            (b"log", [b"off"]) => host.command(HostCommand::Log(false)).and_then(|()| ok()),
            (b"logfile", [f]) => host.command(HostCommand::LogFile(f)).and_then(|()| ok()),
            (b"memreport", []) => host.command(HostCommand::Report(None, &self.report())).and_then(|()| ok()),
            (b"memreport", [f]) => host.command(HostCommand::Report(Some(f), &self.report())).and_then(|()| ok()),
            (b"print", [s]) => host.command(HostCommand::Print(s)).and_then(|()| ok()),
            (b"quota", []) => {
                let mut s = String::from("Quota settings:\n");
                for (name, about) in Quotas::NAMES {
                    let v = self.options.quotas.get(name.as_bytes()).unwrap_or(0);
                    let _ = writeln!(s, "{name:<17}: {v:8} {about}");
                }
                text(s)
            }
            (b"quota", [b"set", name, value]) => {
                let v = quota_value(value)?;
                if self.options.quotas.set(name, v) {
                    self.log_quotas();
                    info!(quota = %String::from_utf8_lossy(name), value = v, "set quota");
                    ok()
                } else {
                    Err(Errno::EINVAL)
                }
            }
            (b"quota", [d]) if *d != b"set" => self.domain_report(domid_arg(d)?),
            (b"quota-soft", []) => {
                let v = self.options.soft_memory;
                text(format!(
                    "Quota settings:\n{:<17}: {v:8} Total Xenstore memory per domain (warning level)\n",
                    "memory"
                ))
            }
            (b"quota-soft", [b"set", b"memory", value]) => {
                self.options.soft_memory = quota_value(value)?;
                self.log_quotas();
                ok()
            }
            (b"live-update", [_, ..]) => self.control_live_update(c, h, &args, host),
            (b"help", []) => text(HELP.into()),
            _ => Err(Errno::EINVAL),
        }
    }

    fn domain_report(&self, domid: u16) -> Answer {
        let d = self.domains.get(&domid).ok_or(Errno::ENOENT)?;
        let open = d.conn.and_then(|c| self.conns.get(&c)).map_or(0, |c| c.transactions.len() as i64);
        let mut s = format!("Domain {domid}:\n");
        let rows = [
            ("nodes", d.nodes),
            ("watches", d.watches.into()),
            ("transactions", open),
            ("outstanding", d.outstanding),
            ("memory", d.memory),
        ];
        for (name, v) in rows {
            let _ = writeln!(s, "{name:<16}: {v:8}");
        }
        text(s)
    }

    /// What there is and who holds how much.
    pub fn report(&self) -> String {
        let mut s = format!(
            "xenstored: {} nodes, {} connections, {} watches, {} open transactions\n",
            self.tree.count(),
            self.conns.len(),
            self.watches.len(),
            self.open_transactions,
        );
        for (id, d) in &self.domains {
            let _ = writeln!(
                s,
                "domain {id}: {} bytes, {} nodes, {} watches, {} outstanding requests{}",
                d.memory,
                d.nodes,
                d.watches,
                d.outstanding,
                if d.conn.is_some() { "" } else { ", not introduced" },
            );
        }
        for c in self.conns_in_order() {
            let bytes: usize = c.out.iter().map(|m| m.left()).sum();
            let _ = writeln!(
                s,
                "connection {} ({:?}): {} messages with {bytes} bytes to send, {} watches, {} transactions{}{}",
                c.id,
                c.peer,
                c.out.len(),
                c.watches.len(),
                c.transactions.len(),
                if c.ignored { ", ignored" } else { "" },
                if c.frozen.is_some() { ", frozen" } else { "" },
            );
        }
        s
    }
}

fn quota_value(s: &[u8]) -> Result<u32, Errno> {
    u32::try_from(payload::atoi(s).unwrap_or(0)).ok().filter(|&v| v >= 1).ok_or(Errno::EINVAL)
}
