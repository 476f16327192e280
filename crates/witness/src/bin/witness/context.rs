//! What all threads of the witness share.

use crate::clock::ClockState;
use crate::counters::Counters;
use crate::kmsg::KernelLogState;
use crate::reporter::Reporter;
use crate::store::WatchTable;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};
use witness::config::Config;
use witness::report::{Anomaly, Body, Noticed};

/// What the loads do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Set-up: nothing is an anomaly yet.
    Starting = 0,
    /// Loads run.
    Running = 1,
    /// Loads stand still.
    Quiet = 2,
}

/// Shared by all threads, for as long as the process lives.
#[derive(Debug)]
pub struct Context {
    pub config: Config,
    pub run: u64,
    pub counters: Counters,
    pub reporter: Reporter,
    pub clocks: Mutex<ClockState>,
    pub kernel_log: Mutex<KernelLogState>,
    pub watches: Mutex<WatchTable>,
    phase: AtomicU8,
}

impl Context {
    pub fn new(config: Config, run: u64) -> Context {
        let reporter = Reporter::new(&config, run);
        Context {
            config,
            run,
            counters: Counters::default(),
            reporter,
            clocks: Mutex::default(),
            kernel_log: Mutex::default(),
            watches: Mutex::default(),
            phase: AtomicU8::new(Phase::Starting as u8),
        }
    }

    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::SeqCst) {
            1 => Phase::Running,
            2 => Phase::Quiet,
            _ => Phase::Starting,
        }
    }

    pub fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::SeqCst);
    }

    /// Whether loads run now.
    pub fn loads(&self) -> bool {
        self.phase() == Phase::Running
    }

    /// Reports something that was noticed, and counts it. Nothing counts while the guest is being set up.
    pub fn notice(&self, what: Noticed) {
        if self.phase() == Phase::Starting {
            return;
        }
        let starved = match &what {
            Noticed::ClockGap(_) => true,
            Noticed::KernelLine(line) => line.class.by_starving(),
            _ => false,
        };
        self.counters.anomalies.add(u64::from(!starved));
        if self.reporter.may_send(&what) {
            self.send(Body::Anomaly(Anomaly { mono_ns: crate::clock::mono_ns(), what }));
        } else {
            self.counters.anomalies_unsent.add(1);
        }
    }

    pub fn send(&self, body: Body) {
        self.reporter.send(body, &self.counters);
    }
}

/// A mutex that a panicked thread had held is still good enough to report from.
pub fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Keeps a load at its rate.
#[derive(Debug)]
pub struct Pacer {
    period: Duration,
    next: Instant,
}

impl Pacer {
    /// `rate` a second, at least 1.
    pub fn new(rate: u32) -> Pacer {
        Pacer::every(Duration::from_secs(1) / rate.max(1))
    }

    pub fn every(period: Duration) -> Pacer {
        Pacer { period, next: Instant::now() + period }
    }

    /// Waits for the next turn, whether loads run or not.
    pub fn wait_always(&mut self) {
        if let Some(rest) = self.next.checked_duration_since(Instant::now()) {
            std::thread::sleep(rest);
        }
        self.next = (self.next + self.period).max(Instant::now());
    }

    /// Waits for the next turn, and while the loads stand still. What was missed is not made up for: a load that was
    /// held up must not flood its device afterwards.
    pub fn wait(&mut self, ctx: &Context) {
        loop {
            let now = Instant::now();
            if let Some(rest) = self.next.checked_duration_since(now) {
                std::thread::sleep(rest);
            }
            if ctx.loads() {
                break;
            }
            self.next = Instant::now() + Duration::from_millis(50).max(self.period.min(Duration::from_millis(200)));
        }
        self.next = (self.next + self.period).max(Instant::now());
    }
}
