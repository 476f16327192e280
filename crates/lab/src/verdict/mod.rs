//! From what was seen inside and outside the guest to each promise of the design: pass, fail or not exercised, with the
//! evidence.

use serde::{Deserialize, Serialize};
pub use witness::judge::Outcome;

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
}

impl From<witness::report::Promise> for Promise {
    fn from(promise: witness::report::Promise) -> Promise {
        use witness::report::Promise as W;
        match promise {
            W::T1 => Promise::T1,
            W::T2 => Promise::T2,
            W::T3 => Promise::T3,
            W::T4 => Promise::T4,
            W::T5 => Promise::T5,
            W::T6 => Promise::T6,
            W::T7 => Promise::T7,
            W::T8 => Promise::T8,
            W::T9 => Promise::T9,
            W::T10 => Promise::T10,
        }
    }
}
