//! How long nothing came from the guest's vifs: it is longer than the blackout, since the last packet before the pause and the first one
//! after the unpause are some way off. Its peers notice this, not the blackout.

use crate::report::{Silence, micros};
use crate::toolstack::Packets;
use std::thread;
use std::time::{Duration, Instant};

/// How often it is looked for the first packet, and how long. A guest that says nothing for longer is waiting for somebody itself.
const LISTEN_EVERY: Duration = Duration::from_millis(3);
const LISTEN: Duration = Duration::from_millis(500);
/// A guest that has said nothing for so long before the pause is not expected to say anything right after it.
const TALKATIVE: Duration = Duration::from_millis(500);

/// Listens to a guest.
pub struct Ear {
    packets: Box<dyn Packets>,
    count: Option<u64>,
    heard: Option<Instant>,
}

impl Ear {
    /// Knows from now on how many packets there were.
    pub fn new(mut packets: Box<dyn Packets>) -> Ear {
        let count = packets.received();
        Ear { packets, count, heard: None }
    }

    /// Whether something came since the last time.
    pub fn listen(&mut self) -> bool {
        let count = self.packets.received();
        let came = count.is_some() && count != self.count;
        self.count = count.or(self.count);
        if came {
            self.heard = Some(Instant::now());
        }
        came
    }

    /// What is known at the pause: how long the guest has been silent. `None` for one that says next to nothing.
    pub fn silent_for(&self) -> Option<Duration> {
        self.heard.map(|heard| heard.elapsed()).filter(|silent| *silent < TALKATIVE)
    }

    /// Waits for the first packet of a guest that has just been unpaused, and rests meanwhile: the guest has just what the service domain
    /// leaves it of a CPU that they share.
    pub fn wait(&mut self, unpaused: Instant) -> Option<Duration> {
        while unpaused.elapsed() < LISTEN {
            if self.listen() {
                return self.heard.map(|heard| heard.saturating_duration_since(unpaused));
            }
            thread::sleep(LISTEN_EVERY);
        }
        None
    }
}

impl Silence {
    pub(crate) fn new(before: Duration, after: Duration) -> Silence {
        Silence { before_us: micros(before), after_us: micros(after) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Script(Vec<Option<u64>>);

    impl Packets for Script {
        fn received(&mut self) -> Option<u64> {
            if self.0.len() > 1 { self.0.remove(0) } else { self.0[0] }
        }
    }

    fn ear(counts: &[Option<u64>]) -> Ear {
        Ear::new(Box::new(Script(counts.to_vec())))
    }

    #[test]
    fn a_packet_is_heard_once() {
        let mut ear = ear(&[Some(7), Some(7), Some(8), Some(8)]);
        assert_eq!(ear.silent_for(), None, "what came before is not known");
        assert!(!ear.listen());
        assert!(ear.listen());
        assert!(!ear.listen());
        assert!(ear.silent_for().is_some());
    }

    #[test]
    fn a_vif_that_is_gone_says_nothing() {
        let mut ear = ear(&[Some(7), None, Some(7), Some(8)]);
        assert!(!ear.listen());
        assert!(!ear.listen(), "it is back with what it had");
        assert!(ear.listen());
    }

    #[test]
    fn the_first_packet_is_waited_for_and_no_longer() {
        let unpaused = Instant::now();
        assert!(ear(&[Some(0), Some(0), Some(1)]).wait(unpaused).is_some_and(|after| after < LISTEN));
        assert_eq!(ear(&[Some(0)]).wait(Instant::now()), None);
        assert_eq!(ear(&[None]).wait(Instant::now().checked_sub(LISTEN).unwrap()), None);
    }
}
