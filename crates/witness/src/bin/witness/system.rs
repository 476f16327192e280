//! What /proc, /sys and CPUID tell.

use std::fs;
use std::path::Path;
use witness::report::{CpuidLeaf, Device, Interrupt, Item, Link};

fn text(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok().map(|s| s.trim_end().to_owned())
}

/// Stolen time of all vCPUs, ms (field 8 of /proc/stat's first line, in 1/100 s).
pub fn steal_ms() -> Option<u64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let ticks: u64 = stat.lines().next()?.split_ascii_whitespace().nth(8)?.parse().ok()?;
    Some(ticks.saturating_mul(10))
}

/// MemTotal, KiB; 0 if it can't be read.
pub fn mem_total_kib() -> u64 {
    fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|m| {
            m.lines().find_map(|l| l.strip_prefix("MemTotal:")?.split_ascii_whitespace().next()?.parse().ok())
        })
        .unwrap_or(0)
}

/// Reads /proc/interrupts.
pub fn interrupts() -> Vec<Interrupt> {
    parse_interrupts(&fs::read_to_string("/proc/interrupts").unwrap_or_default())
}

fn parse_interrupts(table: &str) -> Vec<Interrupt> {
    let mut lines = table.lines();
    let cpus = lines.next().map_or(0, |head| head.split_ascii_whitespace().count());
    lines
        .filter_map(|line| {
            let (irq, rest) = line.split_once(':')?;
            let mut words = rest.split_ascii_whitespace().peekable();
            let mut count = 0u64;
            for _ in 0..cpus {
                match words.peek().and_then(|w| w.parse::<u64>().ok()) {
                    Some(n) => count = count.saturating_add(n),
                    None => break,
                }
                words.next();
            }
            Some(Interrupt { irq: irq.trim().to_owned(), count, name: words.collect::<Vec<_>>().join(" ") })
        })
        .collect()
}

fn entries(dir: &str) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .map(|d| d.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    names.sort();
    names
}

/// Network links but the loopback.
pub fn links() -> Vec<Link> {
    entries("/sys/class/net")
        .into_iter()
        .filter(|dev| dev != "lo")
        .map(|dev| {
            let of = |what: &str| text(format!("/sys/class/net/{dev}/{what}")).unwrap_or_default();
            Link {
                mac: of("address"),
                mtu: of("mtu").parse().unwrap_or(0),
                state: of("operstate"),
                carrier_changes: of("carrier_changes").parse().unwrap_or(0),
                dev,
            }
        })
        .collect()
}

/// PV devices.
pub fn devices() -> Vec<Device> {
    entries("/sys/bus/xen/devices")
        .into_iter()
        .map(|name| {
            let dir = format!("/sys/bus/xen/devices/{name}");
            let driver = fs::read_link(format!("{dir}/driver"))
                .ok()
                .and_then(|p| p.file_name().map(|n| n.to_string_lossy().into_owned()))
                .unwrap_or_else(|| "none".into());
            Device { state: text(format!("{dir}/state")).unwrap_or_default(), driver, name }
        })
        .collect()
}

pub fn clocksource() -> String {
    text("/sys/devices/system/clocksource/clocksource0/current_clocksource").unwrap_or_default()
}

pub fn uuid_kernel() -> Item<String> {
    text("/sys/hypervisor/uuid").map_or_else(|| Item::Absent("no /sys/hypervisor/uuid".into()), Item::Seen)
}

pub fn xen_version() -> Item<String> {
    let part = |name: &str| text(format!("/sys/hypervisor/version/{name}"));
    match (part("major"), part("minor"), part("extra")) {
        (Some(major), Some(minor), extra) => Item::Seen(format!("{major}.{minor}{}", extra.unwrap_or_default())),
        _ => Item::Absent("no /sys/hypervisor/version".into()),
    }
}

pub fn kernel_release() -> String {
    text("/proc/sys/kernel/osrelease").unwrap_or_default()
}

fn cpuid(leaf: u32, sub: u32) -> CpuidLeaf {
    let r = core::arch::x86_64::__cpuid_count(leaf, sub);
    CpuidLeaf { leaf, sub, out: [r.eax, r.ebx, r.ecx, r.edx] }
}

/// Base of Xen's CPUID leaves (xen/include/public/arch-x86/cpuid.h: 0x40000000, or in steps of 0x100 above it where
/// other hypervisors' leaves come first).
fn xen_cpuid_base() -> Option<u32> {
    (0x4000_0000..0x4001_0000).step_by(0x100).find(|base| {
        let out = cpuid(*base, 0).out;
        // "XenVMMXenVMM"
        out[1..] == [0x566e_6558, 0x6558_4d4d, 0x4d4d_566e]
    })
}

/// ECX of Xen's leaf 4, if bit 3 of EAX says that it holds the domid.
pub fn domid_by_cpuid() -> Item<u16> {
    let Some(base) = xen_cpuid_base() else { return Item::Absent("CPUID has no Xen leaves".into()) };
    let out = cpuid(base + 4, 0).out;
    if out[0] & 1 << 3 == 0 {
        return Item::Absent("Xen's CPUID leaf 4 does not hold the domid".into());
    }
    u16::try_from(out[2]).map_or_else(|_| Item::Absent("domid of more than 16 bits".into()), Item::Seen)
}

/// The CPUID leaves, read on CPU 0, without what belongs to one CPU or one moment: local APIC ids, OSXSAVE's dynamic
/// sizes, and of Xen's time leaf all but the mode. The incarnation that the leaf counts is kept: a transparent move
/// must not count it up.
pub fn cpuid_leaves() -> Vec<CpuidLeaf> {
    let mut leaves = Vec::new();
    let basic = cpuid(0, 0).out[0].min(0x40);
    for leaf in 0..=basic {
        // 0xb, 0x1f: topology of the CPU that reads; 0xd: depends on XCR0.
        if !matches!(leaf, 0xb | 0xd | 0x1f) {
            leaves.push(cpuid(leaf, 0));
        }
    }
    let extended = cpuid(0x8000_0000, 0).out[0].clamp(0x8000_0000, 0x8000_0040);
    for leaf in 0x8000_0000..=extended {
        // 0x8000_001e: topology.
        if leaf != 0x8000_001e {
            leaves.push(cpuid(leaf, 0));
        }
    }
    for l in &mut leaves {
        if l.leaf == 1 {
            // Bits 31..24 of EBX: the reader's APIC id.
            l.out[1] &= 0x00ff_ffff;
        }
    }
    if let Some(base) = xen_cpuid_base() {
        for leaf in 0..=2 {
            leaves.push(cpuid(base + leaf, 0));
        }
        // EAX: flags; EBX: TSC mode; ECX: frequency; EDX: incarnation.
        leaves.push(cpuid(base + 3, 0));
        let mut l = cpuid(base + 4, 0);
        // EBX: the reader's vCPU id; ECX: the domid, which is reported by itself.
        l.out[1] = 0;
        l.out[2] = 0;
        leaves.push(l);
    }
    leaves
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupt_tables() {
        let table = "           CPU0       CPU1       \n \
             24:        100          5  xen-dyn    -event     xenbus\n \
             HYP:         7          8   Hypervisor callback interrupts\n \
             ERR:          3\n";
        let lines = parse_interrupts(table);
        let want =
            [("24", 105, "xen-dyn -event xenbus"), ("HYP", 15, "Hypervisor callback interrupts"), ("ERR", 3, "")];
        assert_eq!(lines.len(), want.len());
        for (l, (irq, count, name)) in lines.iter().zip(want) {
            assert_eq!((l.irq.as_str(), l.count, l.name.as_str()), (irq, count, name));
        }
        assert!(parse_interrupts("").is_empty());
    }
}
