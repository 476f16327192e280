//! Lines of the kernel's log: what they tell about a migration.
//!
//! Messages are those of Linux 6.1 and 6.12: drivers/xen/manage.c, kernel/power/process.c, kernel/watchdog.c,
//! kernel/rcu/tree_stall.h, kernel/hung_task.c, drivers/block/xen-blkfront.c, drivers/net/xen-netfront.c,
//! kernel/time/clocksource.c.

use crate::report::Promise;
use serde::{Deserialize, Serialize};

/// What kind of line it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LineClass {
    /// The guest took part in a suspend, freeze or resume.
    Suspend,
    /// A PV device or the store connected anew, or a backend went through its states.
    Reconnect,
    /// A clock or its source was found wrong. This one and [`LineClass::Stall`] may be the emulator's doing: see
    /// [`crate::judge`].
    Clock,
    /// Soft or hard lockup, RCU stall, hung task, workqueue lockup.
    Stall,
    /// The kernel found itself slow: an interrupt, or the reading of a clock, took long. No clock is wrong and no
    /// watchdog bites, so it breaks no promise; how long the guest did not run is judged by its clocks' gaps.
    Slow,
    /// A disk request failed, or a file system or block device complains.
    Disk,
    /// A network device complains or loses its carrier.
    Network,
    /// Xen itself: event channels, grants.
    Xen,
    /// Oops, BUG, WARNING, machine check.
    Fault,
    /// None of these.
    Other,
}

impl LineClass {
    /// The promise that a line of this class speaks against.
    pub fn promise(self) -> Promise {
        match self {
            // A guest that is asked to suspend sees `control/shutdown` in its store.
            LineClass::Suspend | LineClass::Reconnect => Promise::T2,
            LineClass::Clock | LineClass::Stall | LineClass::Slow => Promise::T7,
            LineClass::Disk => Promise::T8,
            LineClass::Network => Promise::T9,
            LineClass::Xen => Promise::T4,
            LineClass::Fault | LineClass::Other => Promise::T10,
        }
    }

    /// True for lines that emulation alone provokes, by starving a vCPU.
    pub fn by_starving(self) -> bool {
        matches!(self, LineClass::Clock | LineClass::Stall | LineClass::Slow)
    }

    /// False for lines that say nothing about a migration.
    pub fn of_interest(self) -> bool {
        self != LineClass::Other
    }
}

/// Patterns, lower case, first match counts. The order matters: `clocksource: … stall` is a clock line.
const PATTERNS: &[(LineClass, &[&str])] = &[
    (
        LineClass::Slow,
        &[
            "hrtimer: interrupt took",
            "perf: interrupt took too long",
            "long readout interval, skipping watchdog check",
            "read-back delay of",
        ],
    ),
    (
        LineClass::Fault,
        &["kernel bug at", "oops:", "general protection", "unable to handle", "warning: cpu", "mce:", "kernel panic"],
    ),
    (
        LineClass::Stall,
        &[
            "soft lockup",
            "hard lockup",
            "self-detected stall",
            "detected stalls",
            "detected expedited stalls",
            "rcu: info",
            "starved for",
            "blocked for more than",
            "workqueue lockup",
            "hogged cpu",
            "nmi watchdog",
        ],
    ),
    (
        LineClass::Suspend,
        &[
            "freezing user space",
            "freezing remaining freezable",
            "freezing of tasks",
            "restarting tasks",
            "suspending xen",
            "suspending console",
            "pm: suspend",
            "pm: resume",
            "xen suspend",
            "oom killer disabled",
            "oom killer enabled",
            "xen:manage",
            "xen_suspend",
            "shutdown request",
        ],
    ),
    (LineClass::Clock, &["clocksource", "timekeeping", "clock skew", "tsc unstable", "marking tsc", "time jump"]),
    (
        LineClass::Reconnect,
        &[
            "setting capacity",
            "detected capacity change",
            "blkfront:",
            "xenbus_dev_shutdown",
            "xenbus_probe",
            "xenbus: ",
            "grant tables using",
            "grant table initialized",
            "backend state",
            "backend is",
            "xen-netfront",
            "netfront",
        ],
    ),
    (
        LineClass::Disk,
        &["i/o error", "blk_update_request", "buffer i/o", "print_req_error", "ext4-fs error", "task abort"],
    ),
    (
        LineClass::Network,
        &["link is", "link becomes", "carrier", "tx timeout", "transmit queue", "netdev watchdog", "eth0:", "eth1:"],
    ),
    (LineClass::Xen, &["xen", "event channel", "evtchn", "gnttab", "grant"]),
];

/// Sorts a line. It looks at nothing but the text.
pub fn classify(text: &str) -> LineClass {
    let text = text.to_ascii_lowercase();
    PATTERNS
        .iter()
        .find(|(_, patterns)| patterns.iter().any(|p| text.contains(p)))
        .map_or(LineClass::Other, |(class, _)| *class)
}

/// The kernel's clock watchdog gives a clock up because reading it took long (kernel/time/clocksource.c, `cs_watchdog_read`). Of one that
/// it found wrong it says how wrong.
pub fn gives_up_reading(text: &str) -> bool {
    text.contains("read-back delay of") && text.contains("marking unstable")
}

/// What the watchdog says next of such a clock, whatever the reason (arch/x86/kernel/tsc.c, `tsc_cs_mark_unstable`).
pub fn drops_a_clock(text: &str) -> bool {
    text.contains("Marking TSC unstable due to clocksource watchdog")
}

/// How far back a stall or clock line speaks, in ms: what it says (`stuck for 22s!`, `(t=5250 jiffies` at 250 Hz,
/// `blocked for more than 120 seconds`), else 30 s, the longest that a kernel's detector
/// waits without saying so; 2 s for a clock line, four periods of the clock source's watchdog.
pub fn reaches_back_ms(class: LineClass, text: &str) -> u64 {
    let number_after = |key: &str| {
        let rest = text.split(key).nth(1)?;
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().ok()
    };
    let seconds = |s: u64| s.saturating_mul(1000);
    let jiffies = |j: u64| j.saturating_mul(4);
    number_after("stuck for ")
        .or_else(|| number_after("blocked for more than "))
        .map(seconds)
        .or_else(|| number_after("(t=").or_else(|| number_after("starved for ")).map(jiffies))
        .unwrap_or(if class == LineClass::Clock { 2000 } else { 30_000 })
}

/// A record of /dev/kmsg: `level,seq,timestamp_us,flags[,…];text\n key=value…` (Documentation/ABI/testing/dev-kmsg).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Syslog level.
    pub level: u8,
    /// Sequence number.
    pub seq: u64,
    /// µs since boot.
    pub at_us: u64,
    /// Text, without the dictionary; at most 300 bytes.
    pub text: String,
}

/// Reads a record of /dev/kmsg; `None` for what is none.
pub fn parse_record(bytes: &[u8]) -> Option<Record> {
    let text = String::from_utf8_lossy(bytes);
    let (head, rest) = text.split_once(';')?;
    let mut fields = head.split(',');
    let priority: u32 = fields.next()?.parse().ok()?;
    let seq = fields.next()?.parse().ok()?;
    let at_us = fields.next()?.parse().ok()?;
    let line = rest.split('\n').next()?;
    Some(Record { level: (priority & 7) as u8, seq, at_us, text: clip(line, 300) })
}

/// At most `most` bytes of a text, cut at a character.
pub fn clip(text: &str, most: usize) -> String {
    let mut end = most.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_lines() {
        for (line, class) in [
            ("Freezing user space processes ... (elapsed 0.001 seconds) done.", LineClass::Suspend),
            ("OOM killer disabled.", LineClass::Suspend),
            ("Restarting tasks ... done.", LineClass::Suspend),
            ("watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [witness:1]", LineClass::Stall),
            ("rcu: INFO: rcu_preempt self-detected stall on CPU", LineClass::Stall),
            ("INFO: task witness:33 blocked for more than 120 seconds.", LineClass::Stall),
            ("Setting capacity to 65536", LineClass::Reconnect),
            ("xvda: detected capacity change from 0 to 65536", LineClass::Reconnect),
            ("Grant tables using version 1 layout", LineClass::Reconnect),
            ("clocksource: timekeeping watchdog on CPU0: Marking clocksource 'tsc' as unstable", LineClass::Clock),
            ("blk_update_request: I/O error, dev xvda, sector 0 op 0x1", LineClass::Disk),
            ("hrtimer: interrupt took 37948591 ns", LineClass::Slow),
            (
                "clocksource: Long readout interval, skipping watchdog check: cs_nsec: 1225655369 wd_nsec: 1225618652",
                LineClass::Slow,
            ),
            ("clocksource: wd-tsc-wd read-back delay of 157081ns, clock-skew test skipped!", LineClass::Slow),
            ("xen:events: Event-channel device installed", LineClass::Xen),
            ("random: crng init done", LineClass::Other),
        ] {
            assert_eq!(classify(line), class, "{line}");
        }
    }

    #[test]
    fn stall_lengths() {
        for (line, ms) in [
            ("watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [witness:1]", 22_000),
            ("rcu: \t(t=5250 jiffies g=1 q=2 ncpus=1)", 21_000),
            ("INFO: task x:1 blocked for more than 120 seconds.", 120_000),
            ("rcu: INFO: rcu_preempt self-detected stall on CPU", 30_000),
        ] {
            assert_eq!(classify(line), if line.starts_with("rcu: \t") { LineClass::Other } else { LineClass::Stall });
            assert_eq!(reaches_back_ms(LineClass::Stall, line), ms, "{line}");
        }
        assert_eq!(reaches_back_ms(LineClass::Clock, "clocksource: Marking clocksource 'tsc' as unstable"), 2000);
    }

    #[test]
    fn kmsg_records() {
        let r = parse_record(b"4,1234,5678901,-;blkfront: xvda: flush diskcache\n SUBSYSTEM=xen\n").unwrap();
        assert_eq!(r, Record { level: 4, seq: 1234, at_us: 5_678_901, text: "blkfront: xvda: flush diskcache".into() });
        assert_eq!(parse_record(b"nonsense"), None);
    }

    proptest! {
        #[test]
        fn no_bytes_fail(bytes in prop::collection::vec(any::<u8>(), 0..400), most in 0usize..400) {
            let _ = parse_record(&bytes);
            let text = String::from_utf8_lossy(&bytes);
            let _ = reaches_back_ms(LineClass::Stall, &text);
            prop_assert!(clip(&text, most).len() <= most);
        }
    }
}
