//! From what was seen inside and outside the guest to each promise of the design: pass, fail or not exercised, with the
//! evidence.

use serde::{Deserialize, Serialize};

/// A promise of the design. The tests name them by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Promise {
    T1,
    T2,
    T3,
    T4,
    T5,
    T6,
    T7,
    T8,
    T9,
    T10,
    S1,
}

impl Promise {
    /// All of them, in the order of the design.
    pub const ALL: [Promise; 11] = [
        Promise::T1,
        Promise::T2,
        Promise::T3,
        Promise::T4,
        Promise::T5,
        Promise::T6,
        Promise::T7,
        Promise::T8,
        Promise::T9,
        Promise::T10,
        Promise::S1,
    ];

    /// What it promises, in a few words.
    pub fn title(self) -> &'static str {
        match self {
            Promise::T1 => "domid, uuid and name",
            Promise::T2 => "xenstore nodes and permissions",
            Promise::T3 => "watches and transactions",
            Promise::T4 => "event channels",
            Promise::T5 => "grant table",
            Promise::T6 => "shared info, vCPU info, upcalls",
            Promise::T7 => "clocks and timers",
            Promise::T8 => "ring requests and disk writes",
            Promise::T9 => "TCP connections and network place",
            Promise::T10 => "memory and vCPU state",
            Promise::S1 => "one running copy",
        }
    }
}

/// How a promise came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It was put to the test and held.
    Pass,
    /// It was put to the test and did not hold.
    Fail,
    /// Nothing in the run put it to the test.
    NotExercised,
}
