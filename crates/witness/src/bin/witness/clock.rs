//! Reads all clocks, again and again, and notices steps and gaps.

use crate::context::{Context, Pacer, lock};
use std::sync::Arc;
use std::time::Duration;
use witness::report::{Backwards, Clock, ClockReading, Clocks, Gap, Noticed};

/// Most gaps that are kept: one for each move of a long run, and some of the emulator's.
const MOST_GAPS: usize = 32;
/// A reading whose clocks were read within this time can be compared across clocks.
const TIGHT_NS: u64 = 500_000;
/// Clocks made of the same source may differ by so much between two tight readings.
const STEP_NS: i64 = 2_000_000;
/// The TSC may differ from CLOCK_MONOTONIC by so much, plus a thousandth of the gap.
const TSC_STEP_NS: i64 = 5_000_000;
/// How long the TSC's frequency is measured.
const CALIBRATE_NS: u64 = 5_000_000_000;

fn clock_ns(id: libc::clockid_t) -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a valid timespec for the call to fill.
    let rc = unsafe { libc::clock_gettime(id, &mut t) };
    if rc != 0 {
        return 0;
    }
    u64::try_from(t.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(t.tv_nsec).unwrap_or(0)
}

/// CLOCK_MONOTONIC, ns.
pub fn mono_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC)
}

fn tsc() -> u64 {
    // SAFETY: LFENCE and RDTSC exist on every x86-64 CPU that Xen runs guests on and touch no memory; Linux leaves
    // RDTSC to user space unless a process asks otherwise.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    }
}

/// All clocks once, however long it takes.
pub fn read_once() -> ClockReading {
    ClockReading {
        mono_ns: mono_ns(),
        boot_ns: clock_ns(libc::CLOCK_BOOTTIME),
        real_ns: clock_ns(libc::CLOCK_REALTIME),
        tsc: tsc(),
    }
}

/// All clocks, and whether they were read close enough together to be compared with each other.
fn read_tight() -> (ClockReading, bool) {
    let mut reading = read_once();
    for _ in 0..4 {
        if mono_ns().saturating_sub(reading.mono_ns) < TIGHT_NS {
            return (reading, true);
        }
        reading = read_once();
    }
    (reading, false)
}

fn minus(a: u64, b: u64) -> i64 {
    a.wrapping_sub(b) as i64
}

/// What the readings told so far.
#[derive(Debug, Default)]
pub struct ClockState {
    clocks: Clocks,
    /// Last reading that was tight.
    tight: Option<ClockReading>,
    /// First tight reading of the calibration.
    calibrate: Option<ClockReading>,
    started: bool,
}

impl ClockState {
    /// Takes a reading; under the lock, so that readings of several CPUs are in order.
    fn read(&mut self, gap_limit_ns: u64) -> Vec<Noticed> {
        let (now, tight) = read_tight();
        self.take(now, tight, gap_limit_ns)
    }

    fn take(&mut self, now: ClockReading, tight: bool, gap_limit_ns: u64) -> Vec<Noticed> {
        let mut noticed = Vec::new();
        if !self.started {
            self.started = true;
            self.clocks.first = now;
            self.clocks.last = now;
        }
        let last = self.clocks.last;
        let gap = Gap {
            at_ns: last.mono_ns,
            mono_ns: now.mono_ns.saturating_sub(last.mono_ns),
            boot_ns: minus(now.boot_ns, last.boot_ns),
            real_ns: minus(now.real_ns, last.real_ns),
            tsc: minus(now.tsc, last.tsc),
        };
        for (clock, before, after) in [
            (Clock::Monotonic, last.mono_ns, now.mono_ns),
            (Clock::Boottime, last.boot_ns, now.boot_ns),
            (Clock::Realtime, last.real_ns, now.real_ns),
            (Clock::Tsc, last.tsc, now.tsc),
        ] {
            if after < before {
                let by = before - after;
                self.backwards(clock, by);
                noticed.push(Noticed::ClockBackwards { clock, by });
            }
        }
        if tight {
            self.compare(now, &mut noticed);
        }
        self.clocks.last = now;
        let smallest = self.clocks.gaps.last().map_or(0, |g| g.mono_ns);
        if gap.mono_ns > 0 && (self.clocks.gaps.len() < MOST_GAPS || gap.mono_ns > smallest) {
            let at = self.clocks.gaps.partition_point(|g| g.mono_ns >= gap.mono_ns);
            self.clocks.gaps.insert(at, gap);
            self.clocks.gaps.truncate(MOST_GAPS);
        }
        if gap.mono_ns > gap_limit_ns {
            noticed.push(Noticed::ClockGap(gap));
        }
        noticed
    }

    fn backwards(&mut self, clock: Clock, by: u64) {
        match self.clocks.backwards.iter_mut().find(|b| b.clock == clock) {
            Some(b) => {
                b.count += 1;
                b.most = b.most.max(by);
            }
            None => self.clocks.backwards.push(Backwards { clock, count: 1, most: by }),
        }
    }

    /// Compares the clocks' progress since the last tight reading.
    fn compare(&mut self, now: ClockReading, noticed: &mut Vec<Noticed>) {
        if let Some(last) = self.tight.replace(now) {
            let mono = minus(now.mono_ns, last.mono_ns);
            let gap_ns = now.mono_ns.saturating_sub(last.mono_ns);
            let mut step = |clock, by_ns: i64, most: i64| {
                if by_ns.abs() > most {
                    noticed.push(Noticed::ClockStep { clock, by_ns, gap_ns });
                }
            };
            step(Clock::Boottime, minus(now.boot_ns, last.boot_ns) - mono, STEP_NS);
            step(Clock::Realtime, minus(now.real_ns, last.real_ns) - mono, STEP_NS);
            if self.clocks.tsc_khz > 0 {
                let ticks = i128::from(minus(now.tsc, last.tsc));
                let ns = i64::try_from(ticks * 1_000_000 / i128::from(self.clocks.tsc_khz)).unwrap_or(i64::MAX);
                step(Clock::Tsc, ns.saturating_sub(mono), TSC_STEP_NS + mono.max(0) / 1000);
            }
        }
        let first = *self.calibrate.get_or_insert(now);
        let ns = now.mono_ns.saturating_sub(first.mono_ns);
        if self.clocks.tsc_khz == 0 && ns >= CALIBRATE_NS {
            let khz = u128::from(now.tsc.saturating_sub(first.tsc)) * 1_000_000 / u128::from(ns);
            self.clocks.tsc_khz = u64::try_from(khz).unwrap_or(0);
        }
    }

    /// Whether the TSC's frequency is known.
    pub fn calibrated(&self) -> bool {
        self.clocks.tsc_khz > 0
    }

    /// Forgets gaps and steps of the set-up; the frequency of the TSC stays.
    pub fn forget(&mut self) {
        let khz = self.clocks.tsc_khz;
        *self = ClockState::default();
        self.clocks.tsc_khz = khz;
    }

    pub fn clocks(&self) -> Clocks {
        self.clocks.clone()
    }

    pub fn steal(&mut self, ms: u64) -> Option<Noticed> {
        let before_ms = std::mem::replace(&mut self.clocks.steal_ms, ms);
        let back = ms < before_ms;
        self.clocks.steal_backwards += u64::from(back);
        back.then_some(Noticed::Steal { before_ms, after_ms: ms })
    }

    fn late(&mut self, us: u64) {
        const LIMITS_US: [u64; 8] = [100, 1_000, 2_000, 5_000, 10_000, 50_000, 100_000, 500_000];
        let at = LIMITS_US.partition_point(|l| *l <= us);
        if let Some(n) = self.clocks.tick_late.get_mut(at) {
            *n += 1;
        }
    }
}

/// One reading: counts it and reports what it shows.
fn look(ctx: &Context, late_us: Option<u64>) {
    let (noticed, gap) = {
        let mut state = lock(&ctx.clocks);
        let noticed = state.read(u64::from(ctx.config.gap_ms) * 1_000_000);
        if let Some(us) = late_us {
            state.late(us);
        }
        (noticed, state.clocks.gaps.first().copied())
    };
    ctx.counters.clock_reads.add(1);
    if let Some(gap) = gap {
        ctx.counters.gap_us.set(gap.mono_ns / 1000);
        ctx.counters.gap_at_ms.set(gap.at_ns / 1_000_000);
    }
    for n in noticed {
        if matches!(n, Noticed::ClockBackwards { .. }) {
            ctx.counters.clock_backwards.add(1);
        }
        ctx.notice(n);
    }
}

fn pin_to(cpu: usize) -> bool {
    // SAFETY: a zeroed cpu_set_t is an empty set, and CPU_SET writes only into it (it ignores numbers past its size).
    // sched_setaffinity reads `set` only.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) == 0
    }
}

/// Puts the calling thread above all that are scheduled fairly. A fair scheduler charges whatever runs at a pause of the
/// whole guest for the length of the pause, and makes it wait as long afterwards: the clocks would seem to have stood
/// still for longer than they did. Without the right to it (a plain user) the thread goes on as it is.
fn before_all_others() {
    let param = libc::sched_param { sched_priority: 1 };
    // SAFETY: `param` is a valid sched_param; 0 is the calling thread.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &param) };
}

fn sleep_until(ns: u64) {
    let t = libc::timespec {
        tv_sec: libc::time_t::try_from(ns / 1_000_000_000).unwrap_or(libc::time_t::MAX),
        tv_nsec: (ns % 1_000_000_000) as libc::c_long,
    };
    // SAFETY: `t` is a valid timespec; no remainder is asked for with an absolute time. An early return (signal) only
    // makes a tick early.
    unsafe { libc::clock_nanosleep(libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, &t, std::ptr::null_mut()) };
}

/// Starts a reader on every CPU; on CPU 0 the fine timer runs in its part of each second.
pub fn start(ctx: &Arc<Context>, cpus: usize) {
    for cpu in 1..cpus {
        let c = ctx.clone();
        crate::spawn("clock", move || {
            if !pin_to(cpu) {
                return;
            }
            before_all_others();
            loop {
                std::thread::sleep(Duration::from_millis(c.config.clock_ms.into()));
                look(&c, None);
            }
        });
    }
    let c = ctx.clone();
    crate::spawn("clock-0", move || {
        pin_to(0);
        before_all_others();
        let fine = u64::from(c.config.tick_us) * 1000;
        let coarse = u64::from(c.config.clock_ms) * 1_000_000;
        let duty = u64::from(c.config.tick_duty) * 10_000_000;
        let mut due = mono_ns();
        loop {
            let in_duty = due % 1_000_000_000 < duty && c.loads();
            due += if in_duty { fine } else { coarse };
            sleep_until(due);
            let now = mono_ns();
            let late = now.saturating_sub(due) / 1000;
            if in_duty {
                c.counters.ticks.add(1);
                if c.phase() != crate::context::Phase::Starting {
                    c.counters.tick_late_us.max(late);
                }
            }
            look(&c, in_duty.then_some(late));
            // Ticks that were missed are not made up for.
            due = due.max(now.saturating_sub(fine));
        }
    });
    let c = ctx.clone();
    crate::spawn("steal", move || {
        let mut pacer = Pacer::every(Duration::from_secs(1));
        loop {
            pacer.wait_always();
            if let Some(ms) = crate::system::steal_ms() {
                c.counters.steal_ms.set(ms);
                if let Some(n) = { lock(&c.clocks).steal(ms) } {
                    c.notice(n);
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> ClockReading {
        let ns = ms * 1_000_000;
        ClockReading { mono_ns: ns, boot_ns: ns + 5, real_ns: ns + 1_000_000_000, tsc: ns * 2 }
    }

    /// A state with a known TSC frequency.
    fn calibrated() -> ClockState {
        let mut s = ClockState::default();
        for ms in (0..=6000).step_by(10) {
            assert_eq!(s.take(at(ms), true, 1_000_000_000), vec![]);
        }
        assert_eq!(s.clocks.tsc_khz, 2_000_000);
        s
    }

    #[test]
    fn steady_clocks_are_quiet_and_gaps_are_kept_in_order() {
        let mut s = calibrated();
        s.forget();
        for ms in [7000, 7010, 7200, 7210, 7250] {
            assert_eq!(s.take(at(ms), true, 1_000_000_000), vec![]);
        }
        let gaps: Vec<u64> = s.clocks.gaps.iter().map(|g| g.mono_ns / 1_000_000).collect();
        assert_eq!(gaps, [190, 40, 10, 10]);
        assert!(
            matches!(s.take(at(9000), true, 1_000_000_000)[..], [Noticed::ClockGap(g)] if g.mono_ns == 1_750_000_000)
        );
    }

    #[test]
    fn each_clock_is_seen_to_step() {
        for (i, clock) in [Clock::Boottime, Clock::Realtime, Clock::Tsc].into_iter().enumerate() {
            for by in [20_000_000i64, -20_000_000] {
                let mut s = calibrated();
                let mut now = at(6100);
                let field = [&mut now.boot_ns, &mut now.real_ns, &mut now.tsc];
                let [boot, real, tsc] = field;
                *[boot, real, tsc][i] = match i {
                    2 => (now.mono_ns as i64 * 2 + by * 2) as u64,
                    1 => (now.mono_ns as i64 + 1_000_000_000 + by) as u64,
                    _ => (now.mono_ns as i64 + 5 + by) as u64,
                };
                let noticed = s.take(now, true, 1_000_000_000);
                assert!(
                    matches!(noticed[..], [Noticed::ClockStep { clock: c, by_ns, .. }] if c == clock && (by_ns - by).abs() < 10),
                    "{clock:?} {by}: {noticed:?}"
                );
            }
        }
    }

    #[test]
    fn backwards_is_seen_even_if_readings_are_not_tight() {
        let mut s = calibrated();
        let noticed = s.take(at(5900), false, 1_000_000_000);
        assert_eq!(noticed.len(), 4);
        assert_eq!(s.clocks.backwards.len(), 4);
        assert_eq!(s.clocks.backwards[0].most, 100_000_000);
    }

    #[test]
    fn steal_that_falls_is_seen() {
        let mut s = ClockState::default();
        assert_eq!(s.steal(50), None);
        assert_eq!(s.steal(60), None);
        assert_eq!(s.steal(10), Some(Noticed::Steal { before_ms: 60, after_ms: 10 }));
    }
}
