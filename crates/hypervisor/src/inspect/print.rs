//! The report as text.

use super::{GuestState, RecordReport};
use crate::{DomId, GtPortKind, GuestArea, GuestPlace, PortState};
use std::fmt;
use xen_abi::domctl::EMU_NAMES;
use xen_abi::hypercall::virq_name;

fn virq(n: u32) -> String {
    virq_name(n).map_or_else(|| format!("VIRQ {n}"), |name| format!("VIRQ {name}"))
}

fn state(s: &PortState) -> String {
    match s {
        PortState::Closed => "closed".into(),
        PortState::Unbound { remote } => format!("unbound, waits for domain {remote}"),
        PortState::Interdomain { remote, remote_port } => format!("connected to domain {remote} port {remote_port}"),
        PortState::Pirq(n) => format!("PIRQ {n}"),
        PortState::Virq(n) => virq(*n),
        PortState::Ipi => "IPI".into(),
        PortState::Xen => "Xen's own".into(),
    }
}

fn kind(k: &GtPortKind) -> String {
    state(&match *k {
        GtPortKind::Unbound { remote } => PortState::Unbound { remote },
        GtPortKind::Interdomain { remote, remote_port } => PortState::Interdomain { remote, remote_port },
        GtPortKind::Virq(n) => PortState::Virq(n),
        GtPortKind::Ipi => PortState::Ipi,
        GtPortKind::Pirq(n) => PortState::Pirq(n),
    })
}

fn place(p: Option<GuestPlace>) -> String {
    p.map_or_else(|| "-".into(), |p| format!("{:#x}+{:#x}", p.gfn.0, p.offset))
}

fn area(a: Option<GuestArea>) -> String {
    match a {
        None => "-".into(),
        Some(GuestArea::Virtual(va)) => format!("virtual {va:#x}"),
        Some(GuestArea::Physical(p)) => place(Some(p)),
    }
}

fn seconds(ns: i64) -> String {
    format!("{}.{:09} s", ns / 1_000_000_000, (ns % 1_000_000_000).abs())
}

fn find<'a>(records: &'a [RecordReport], name: &str, vcpu: u16, field: &str) -> &'a str {
    records
        .iter()
        .find(|r| r.name == name && r.instance == vcpu)
        .and_then(|r| r.fields.get(field))
        .map_or("-", String::as_str)
}

impl fmt::Display for GuestState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let d = &self.domain;
        writeln!(f, "domain {} {} on Xen {} (build {})", d.domid, d.uuid, self.xen, self.build_id)?;
        let mut words = vec![if d.emulation_flags & 1 << 4 == 0 { "PVH" } else { "HVM" }];
        for (name, on) in [
            ("hap", d.hap),
            ("paused", d.paused),
            ("running", d.running),
            ("blocked", d.blocked),
            ("dying", d.dying),
            ("32-bit", self.gt.as_ref().is_some_and(|g| g.guest_is_32bit)),
        ] {
            if on {
                words.push(name);
            }
        }
        let emulated: Vec<_> =
            (0..).zip(EMU_NAMES).filter(|(i, _)| d.emulation_flags >> i & 1 == 1).map(|(_, n)| n).collect();
        writeln!(f, "  {}; emulates {}", words.join(", "), emulated.join(" "))?;
        if let Some(reason) = d.shutdown {
            writeln!(f, "  has shut down, reason {reason}")?;
        }
        writeln!(
            f,
            "  memory {} MiB of at most {} MiB; {} vCPUs, {} online; paging pool {} KiB; vm_assist {:#x}",
            d.total_pages >> 8,
            d.max_pages >> 8,
            d.vcpus,
            d.online_vcpus,
            self.paging_pool_bytes >> 10,
            self.vm_assist
        )?;
        writeln!(
            f,
            "  TSC mode {} at {} kHz, incarnation {}; CPU policy {} leaves, {} MSRs",
            self.tsc.mode,
            self.tsc.khz,
            self.tsc.incarnation,
            self.cpu_policy.leaves.len(),
            self.cpu_policy.msrs.len()
        )?;
        match d.shared_info {
            Some(gfn) => write!(f, "  shared_info at {gfn:?}")?,
            None => write!(f, "  shared_info is not placed")?,
        }
        match &self.shared_info {
            Some(s) => writeln!(
                f,
                ", wall clock base {}.{:09} s, 2-level pending {:?}",
                s.wall_clock.sec, s.wall_clock.nsec, s.pending
            )?,
            None => writeln!(f)?,
        }
        for v in &self.vcpus {
            let id = v.vcpu as u16;
            let cpu = |field| find(&self.hvm_records, "CPU", id, field);
            writeln!(
                f,
                "  vCPU {}: {}{}; rip {} rsp {} cr3 {} tsc {}, TSC_ADJUST {}",
                v.vcpu,
                if v.online { "online" } else { "offline" },
                if v.blocked { ", blocked" } else { "" },
                cpu("rip"),
                cpu("rsp"),
                cpu("cr3"),
                cpu("tsc"),
                find(&self.hvm_records, "TSC_ADJUST", id, "tsc_adjust")
            )?;
        }
        writeln!(f, "HVM parameters:")?;
        for (name, value) in self.hvm_params.iter().filter(|(_, v)| **v != 0) {
            writeln!(f, "  {name} = {value:#x}")?;
        }
        write!(f, "HVM records:")?;
        for r in &self.hvm_records {
            write!(f, " {}[{}]:{}", r.name, r.instance, r.length)?;
        }
        writeln!(f)?;
        let g = &self.grants;
        writeln!(
            f,
            "grant table: version {}, {} frames of at most {}, {} entries in use",
            g.version,
            g.frames,
            g.max_frames,
            g.entries.len()
        )?;
        let gfns: Vec<_> = g.gfns.iter().map(|g| g.map_or_else(|| "-".into(), |g| g.to_string())).collect();
        writeln!(f, "  placed at {}", gfns.join(" "))?;
        let mut by_domain = std::collections::BTreeMap::<DomId, (u32, u32)>::new();
        for e in g.entries.values() {
            let n = by_domain.entry(e.domid).or_default();
            n.0 += 1;
            n.1 += u32::from(e.in_use);
        }
        for (dom, (all, in_use)) in by_domain {
            writeln!(f, "  to domain {dom}: {all}, of them mapped now: {in_use}")?;
        }
        self.print_ports(f)?;
        match (&self.gt, &self.gt_missing) {
            (Some(_), _) => self.print_gt(f)?,
            (None, Some(why)) => writeln!(f, "guest-transparent state: not readable: {why}")?,
            (None, None) => {}
        }
        if self.timing.paused_us > 0 {
            write!(f, "paused for {} us:", self.timing.paused_us)?;
            for (part, us) in &self.timing.parts_us {
                write!(f, " {part} {us}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl GuestState {
    fn print_ports(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.gt {
            Some(gt) => {
                let abi = if gt.event_array.is_some() { "FIFO" } else { "2-level" };
                writeln!(f, "event channels: {abi}, {} in use, at most {}", gt.ports.len(), gt.max_evtchn_port)?;
                for p in &gt.ports {
                    write!(f, "  {:4}: vCPU {}, priority {:2}: {}", p.port, p.vcpu, p.priority, kind(&p.kind))?;
                    writeln!(f, "{}", if p.xen_consumer { " (Xen handles it)" } else { "" })?;
                }
            }
            None => {
                writeln!(f, "event channels: {} in use", self.ports.len())?;
                for (port, p) in &self.ports {
                    writeln!(f, "  {port:4}: vCPU {}: {}", p.vcpu, state(&p.state))?;
                }
            }
        }
        Ok(())
    }

    fn print_gt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(gt) = &self.gt else { return Ok(()) };
        writeln!(f, "time: guest {}, clock offset {}", seconds(gt.guest_now_ns()), seconds(gt.clock_offset_ns))?;
        if let Some(array) = &gt.event_array {
            let gfns: Vec<_> = array.iter().map(ToString::to_string).collect();
            writeln!(f, "FIFO event array at {}", gfns.join(" "))?;
        }
        for (id, v) in gt.vcpus.iter().enumerate() {
            writeln!(
                f,
                "vCPU {id}: upcall vector {:#x}, vcpu_info {}, runstate area {}, time area {}",
                v.upcall_vector,
                place(v.vcpu_info),
                area(v.runstate_area),
                area(v.time_area)
            )?;
            if let Some(fifo) = &v.fifo {
                let tails: Vec<_> =
                    (0..).zip(fifo.tails).filter(|(_, t)| *t != 0).map(|(q, t): (u32, _)| format!("{q}:{t}")).collect();
                writeln!(
                    f,
                    "  FIFO control block {}, queue tails {}",
                    place(Some(fifo.control_block)),
                    tails.join(" ")
                )?;
            }
            let timer = v.singleshot_ns.map_or_else(|| "stopped".into(), |t| format!("fires at {}", seconds(t)));
            write!(f, "  single-shot timer {timer}")?;
            match v.periodic_period_ns {
                0 => writeln!(f, "; periodic timer stopped")?,
                p => writeln!(f, "; periodic timer every {p} ns")?,
            }
            let r = v.runstate.at(gt.guest_now_ns()).time_ns.map(seconds);
            writeln!(f, "  has run {}, waited {}, blocked {}, offline {}", r[0], r[1], r[2], r[3])?;
        }
        for w in &gt.watchdogs {
            writeln!(f, "watchdog {}: bites in {}", w.id, seconds(w.remaining_ns))?;
        }
        for e in &gt.emuirqs {
            writeln!(f, "pirq {} stands for emulated interrupt {}", e.pirq, e.emuirq)?;
        }
        Ok(())
    }
}
