//! What the lab is doing and how long it took, on standard error.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// When the program's first line was due.
fn epoch() -> Instant {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    *EPOCH.get_or_init(Instant::now)
}

/// Says one line, with the time since the program's start.
pub fn say(text: impl AsRef<str>) {
    let since = epoch().elapsed();
    eprintln!("[{:7.1}s] {}", since.as_secs_f64(), text.as_ref());
}

/// Something that takes time. It is announced when it begins and its end is said with how long it took.
#[derive(Debug)]
pub struct Step {
    what: String,
    since: Instant,
}

impl Step {
    /// Begins a step.
    pub fn begin(what: impl Into<String>) -> Step {
        let what = what.into();
        say(format!("{what} …"));
        Step { what, since: Instant::now() }
    }

    /// The step is done.
    pub fn done(self) -> Duration {
        let took = self.since.elapsed();
        say(format!("{} done in {:.1} s", self.what, took.as_secs_f64()));
        took
    }
}
