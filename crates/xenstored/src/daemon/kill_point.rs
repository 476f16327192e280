//! Where tests kill the daemon: between any two of its effects that outlive it. Elsewhere this is nothing.

#[cfg(not(test))]
#[inline(always)]
pub(crate) fn may_die_here() {}

#[cfg(test)]
pub(crate) use test::may_die_here;

#[cfg(test)]
pub(crate) mod test {
    use std::cell::Cell;

    thread_local! {
        static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    }

    /// What unwinds in place of the signal.
    pub(crate) struct Killed;

    /// Lets the daemon come past so many points from now on. How many were left before.
    pub(crate) fn kill_after(points: u64) -> u64 {
        LEFT.replace(points)
    }

    pub(crate) fn may_die_here() {
        match LEFT.get() {
            u64::MAX => {}
            0 => {
                LEFT.set(u64::MAX);
                std::panic::resume_unwind(Box::new(Killed));
            }
            n => LEFT.set(n - 1),
        }
    }
}
