//! One known fault of the emulator, recognised by its exact signature, so that a run that it spoiled may be repeated,
//! and only such a run. Any other triple fault is shown with its dump, for a person to judge.
//!
//! Under load QEMU 7.2's emulation of SVM now and then enters a guest with the hypervisor's own state. Xen then reports a
//! "Triple fault" of the guest and dumps its registers, and in the dump, whose context is the guest, stand the
//! hypervisor's own RIP and stack pointer. No guest can get there by itself: these addresses are Xen's
//! (xen/arch/x86/include/asm/config.h, "Memory layout").

use serde::Serialize;

/// Xen's text, data and bss.
const XEN_TEXT: std::ops::Range<u64> = 0xffff_82d0_4000_0000..0xffff_82d0_8000_0000;
/// Xen's map of all memory, where its stacks are.
const XEN_DIRECTMAP: std::ops::Range<u64> = 0xffff_8300_0000_0000..0xffff_8800_0000_0000;
/// Lines after "Triple fault" that its dump may take.
const DUMP_LINES: usize = 40;
/// Triple faults of one host that are kept.
const MOST: usize = 4;

/// The emulator's fault, as it stands in Xen's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EmulatorRace {
    /// The line with "Triple fault".
    pub line: String,
    /// The guest's instruction pointer in the dump: an address in Xen's own text.
    pub rip: u64,
    /// The guest's stack pointer in the dump: an address on a stack of Xen's.
    pub rsp: u64,
}

fn hex(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(text.len());
    u64::from_str_radix(text.get(..end)?, 16).ok()
}

fn after<'a>(line: &'a str, mark: &str) -> Option<&'a str> {
    line.find(mark).and_then(|at| line.get(at + mark.len()..))
}

/// A guest's triple fault that has another signature: its own, or a fault of somebody's that is not known yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TripleFault {
    /// The line with "Triple fault".
    pub line: String,
    /// Xen's dump of the guest's registers, which follows it.
    pub dump: Vec<String>,
}

/// All "Triple fault" lines of Xen's log, each with the lines that may be its dump: up to the next such line.
fn faults(log: &str) -> impl Iterator<Item = (&str, Vec<&str>)> {
    let mut lines = log.lines().peekable();
    std::iter::from_fn(move || {
        let line = lines.find(|line| line.contains("Triple fault"))?;
        let mut dump = Vec::new();
        while dump.len() < DUMP_LINES
            && let Some(next) = lines.next_if(|next| !next.contains("Triple fault"))
        {
            dump.push(next);
        }
        Some((line, dump))
    })
}

fn emulators((line, dump): &(&str, Vec<&str>)) -> Option<EmulatorRace> {
    let rip = dump.iter().find_map(|l| after(l, "RIP:").and_then(|l| after(l, ":[<")).and_then(hex))?;
    let guest = dump.iter().any(|l| l.contains("CONTEXT: hvm guest"));
    let rsp = dump.iter().find_map(|l| after(l, "rsp: ").and_then(hex))?;
    (guest && XEN_TEXT.contains(&rip) && XEN_DIRECTMAP.contains(&rsp)).then(|| EmulatorRace {
        line: line.trim().to_owned(),
        rip,
        rsp,
    })
}

/// Looks for the emulator's fault in Xen's log.
pub fn find(log: &str) -> Option<EmulatorRace> {
    faults(log).find_map(|fault| emulators(&fault))
}

/// The first few triple faults that are not the emulator's known one.
pub fn find_others(log: &str) -> Vec<TripleFault> {
    let others = faults(log).filter(|fault| emulators(fault).is_none());
    others
        .map(|(line, dump)| {
            // Registers, stack and code stand there as Xen's own lines; what dom0 says meanwhile is left out.
            let dump = dump.into_iter().filter(|l| l.contains("(XEN)")).map(|l| l.trim().to_owned()).collect();
            TripleFault { line: line.trim().to_owned(), dump }
        })
        .take(MOST)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(context: &str, rip: &str, rsp: &str) -> String {
        format!(
            "(XEN) [   61.1] d1v1 Triple fault - invoking HVM shutdown action 1\n\
             (XEN) [   61.1] *** Dumping Dom1 vcpu#1 state: ***\n\
             (XEN) [   61.1] ----[ Xen-4.17.5-pre  x86_64  debug=n  Not tainted ]----\n\
             (XEN) [   61.1] CPU:    1\n\
             (XEN) [   61.1] RIP:    e008:[<{rip}>]\n\
             (XEN) [   61.1] RFLAGS: 0000000000000046   CONTEXT: {context} (d1v1)\n\
             (XEN) [   61.1] rax: 0000000000000000   rbx: 0000000000000000   rcx: 0000000000000000\n\
             (XEN) [   61.1] rbp: ffff83007fe4fef8   rsp: {rsp}   r8:  0000000000000000\n\
             (XEN) [   61.1] ds: 0000   es: 0000   fs: 0000   gs: 0000   ss: 0000   cs: e008\n"
        )
    }

    #[test]
    fn the_emulators_fault_is_recognised() {
        let race = find(&log("hvm guest", "ffff82d0402a1b2c", "ffff83007fe4fe98")).unwrap();
        assert_eq!((race.rip, race.rsp), (0xffff_82d0_402a_1b2c, 0xffff_8300_7fe4_fe98));
        assert!(race.line.contains("Triple fault"));
    }

    #[test]
    fn another_triple_fault_is_shown_with_its_dump() {
        let own = log("hvm guest", "ffffffff81a00000", "ffffc90000003e98");
        let race = log("hvm guest", "ffff82d0402a1b2c", "ffff83007fe4fe98");
        let found = find_others(&format!("{race}{own}[  1.0] dom0 says something\n"));
        let [fault] = &found[..] else { panic!("{found:?}") };
        assert!(fault.line.contains("Triple fault"), "{fault:?}");
        assert!(fault.dump.iter().any(|l| l.contains("ffffffff81a00000")), "{fault:?}");
        assert!(!fault.dump.iter().any(|l| l.contains("dom0 says")), "{fault:?}");
        assert_eq!(find_others(&race), []);
        assert_eq!(find_others(&own.repeat(9)).len(), MOST);
        assert!(find(&format!("{own}{race}")).is_some(), "one does not hide the other");
    }

    #[test]
    fn nothing_else_is() {
        let (xen_rip, xen_rsp) = ("ffff82d0402a1b2c", "ffff83007fe4fe98");
        // The guest's own triple fault, with its own addresses; all or only one of them.
        assert_eq!(find(&log("hvm guest", "ffffffff81a00000", "ffffc90000003e98")), None);
        assert_eq!(find(&log("hvm guest", "ffffffff81a00000", xen_rsp)), None);
        assert_eq!(find(&log("hvm guest", xen_rip, "ffffc90000003e98")), None);
        // Xen's own crash.
        assert_eq!(find(&log("hypervisor", xen_rip, xen_rsp)), None);
        // A dump that belongs to no triple fault.
        assert_eq!(find(&log("hvm guest", xen_rip, xen_rsp).replace("Triple fault", "Something")), None);
        // A triple fault with another event's dump long after it.
        let far = format!(
            "(XEN) d1v0 Triple fault - invoking HVM shutdown action 1\n{}{}",
            "(XEN) x\n".repeat(60),
            log("hvm guest", xen_rip, xen_rsp).replace("Triple fault", "Something")
        );
        assert_eq!(find(&far), None);
        assert_eq!(find(""), None);
    }
}
