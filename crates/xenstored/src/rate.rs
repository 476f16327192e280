//! Write rate limit for domains: while somebody's transaction is open, a domain that changes the store all the time
//! would make it fail again and again. Each change then costs credit, which comes back with time, shared between the
//! domains. The numbers are the stock daemon's (`tools/xenstore/xenstored_domain.h`, `WRL_*`).

const UNIT: i64 = 1000;
/// Changes per second, of all domains together.
const RATE: i64 = 200 * UNIT;
/// What a domain may save up.
const DOMAIN_BURST: i64 = 10 * UNIT;
/// What all may save up together.
const RESERVE_MAX: i64 = 1000 * UNIT;
/// How far new domains may draw on the reserve.
const RESERVE_MIN: i64 = -(5 * DOMAIN_BURST);

/// A domain's credit.
#[derive(Debug, Clone, Copy, Default)]
pub struct Credit {
    amount: i64,
    at_ms: u64,
}

/// What all domains share.
#[derive(Debug, Default)]
pub struct Limiter {
    reserve: i64,
    domains: i64,
}

impl Limiter {
    /// A domain comes.
    pub fn join(&mut self, now_ms: u64) -> Credit {
        self.domains += 1;
        let take = (self.reserve - RESERVE_MIN).clamp(0, DOMAIN_BURST);
        self.reserve -= take;
        Credit { amount: take, at_ms: now_ms }
    }

    /// A domain goes.
    pub fn leave(&mut self, credit: Credit) {
        self.domains -= 1;
        self.reserve = (self.reserve + credit.amount.max(0)).min(RESERVE_MAX);
    }

    /// Adds what time brought.
    fn refresh(&mut self, c: &mut Credit, now_ms: u64) {
        let ms = now_ms.saturating_sub(c.at_ms).min(1_000_000_000) as i64;
        let gain = ms * RATE / (self.domains.max(1) * 1000);
        if gain == 0 && ms < 1000 {
            return; // keeps the fraction
        }
        c.at_ms = now_ms;
        c.amount += gain;
        if c.amount < 0 {
            let lend = self.reserve.clamp(0, -c.amount);
            self.reserve -= lend;
            c.amount += lend;
        }
        let surplus = (c.amount - DOMAIN_BURST).max(0);
        c.amount -= surplus;
        self.reserve = (self.reserve + surplus).min(RESERVE_MAX);
    }

    /// Takes the price of one change.
    pub fn debit(&mut self, c: &mut Credit, now_ms: u64) {
        self.refresh(c, now_ms);
        c.amount -= UNIT;
    }

    /// Milliseconds until the domain may go on; 0 is now.
    pub fn wait(&mut self, c: &mut Credit, now_ms: u64) -> u64 {
        if c.amount >= 0 {
            return 0;
        }
        self.refresh(c, now_ms);
        if c.amount >= 0 { 0 } else { (-c.amount * 1000 * self.domains.max(1) / RATE).max(1) as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_free_and_then_the_rate_counts() {
        let mut l = Limiter::default();
        let mut a = l.join(0);
        let mut n = 0;
        while l.wait(&mut a, 0) == 0 {
            l.debit(&mut a, 0);
            n += 1;
        }
        assert_eq!(n, 11);
        let mut done = 0;
        for ms in 0..10_000 {
            while l.wait(&mut a, ms) == 0 {
                l.debit(&mut a, ms);
                done += 1;
            }
        }
        assert!((1990..=2001).contains(&done), "{done} changes in ten seconds, the rate is 200 a second");
    }

    #[test]
    fn the_rate_is_shared() {
        let mut l = Limiter::default();
        let (mut a, mut b) = (l.join(0), l.join(0));
        let mut done = 0;
        for ms in 0..10_000 {
            for c in [&mut a, &mut b] {
                while l.wait(c, ms) == 0 {
                    l.debit(c, ms);
                    done += 1;
                }
            }
        }
        assert!((1980..=2040).contains(&done), "{done}");
        l.leave(b);
        assert_eq!(l.domains, 1);
    }
}
