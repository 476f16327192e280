//! How a busy daemon waits: not at all.
//!
//! A client that just asked for something is likely to ask again at once. So those are asked by reading before epoll is, which spares a
//! busy daemon what epoll costs for each request; and when nobody has anything, the daemon looks a moment longer before it sleeps, as
//! being woken takes longer than most requests. Where looking longer does not help (there is one processor, and the client needs it;
//! or clients come rarely) it is soon given up, and tried again now and then.
//!
//! One that always has something is even taken from epoll, until it has nothing a few times or the daemon is going to sleep.
//!
//! No I/O and no clock in here.

use crate::conn::ConnId;

/// Clients that are asked by reading.
const MOST: usize = 64;
/// With fewer of them the daemon is not busy, and asking in vain costs more than it spares.
const SEVERAL: usize = 4;
/// One that had nothing so often in a row is left to epoll.
const VAIN: u8 = 2;
/// One that had something so often in a row is taken from epoll: to be told of each request and each reply read costs epoll's side of
/// the socket, which is the client's, a tenth of a request.
pub(super) const UNWATCHED_FROM: u8 = 100;
/// The same as [`VAIN`] for one that epoll does not watch. To have it watched again takes as long as asking it so often.
const VAIN_UNWATCHED: u8 = 8;
/// How long to look before sleeping, in nanoseconds: what it takes to wake a sleeping processor and have an answer from it.
const LOOK_NS: u64 = 50_000;
/// After so many vain looks in a row the next is 2^10 sleeps away, and it gets no further.
const MOST_VAIN: u32 = 10;

/// What is to be done about a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Ask it. True: there was something.
    Ask,
    /// Take it from epoll, which is to say nothing of it any more. True: epoll does not watch it now.
    Unwatch,
    /// Have epoll watch it again.
    Watch,
}

#[derive(Debug)]
struct Client {
    id: ConnId,
    /// How often in a row it had nothing, and had something.
    vain: u8,
    served: u8,
    watched: bool,
}

/// Clients that asked for something just now.
#[derive(Debug, Default)]
pub struct Recent {
    clients: Vec<Client>,
}

impl Recent {
    /// It asked for something.
    pub fn add(&mut self, id: ConnId) {
        if !self.is_full() && !self.clients.iter().any(|c| c.id == id) {
            self.clients.push(Client { id, vain: 0, served: 0, watched: true });
        }
    }

    /// Whether there may be others who are as busy and have no place.
    pub fn is_full(&self) -> bool {
        self.clients.len() >= MOST
    }

    /// Asks all of them, if they are several. How many had something.
    pub fn ask_all(&mut self, mut step: impl FnMut(ConnId, Step) -> bool) -> usize {
        let mut had = 0;
        if self.clients.len() < SEVERAL {
            self.watch_all(step);
            self.clients.clear();
            return had;
        }
        self.clients.retain_mut(|c| {
            if step(c.id, Step::Ask) {
                had += 1;
                c.vain = 0;
                c.served += 1;
                if c.served == UNWATCHED_FROM {
                    c.served = 0;
                    // Again if it is so already: it may be watched for something else meanwhile.
                    c.watched = !step(c.id, Step::Unwatch);
                }
                return true;
            }
            (c.vain, c.served) = (c.vain + 1, 0);
            let stays = c.vain < if c.watched { VAIN } else { VAIN_UNWATCHED };
            if !stays && !c.watched {
                step(c.id, Step::Watch);
            }
            stays
        });
        had
    }

    /// Has epoll watch all of them: nobody may be asked for a while.
    pub fn watch_all(&mut self, mut step: impl FnMut(ConnId, Step) -> bool) {
        for c in self.clients.iter_mut().filter(|c| !c.watched) {
            step(c.id, Step::Watch);
            (c.watched, c.served) = (true, 0);
        }
    }
}

/// Whether to look a moment longer before sleeping.
#[derive(Debug, Default)]
pub struct Look {
    /// Vain looks in a row.
    vain: u32,
    /// Sleeps until the next look.
    skip: u32,
    /// Until when this one goes on, in nanoseconds; `None`: none is under way.
    until: Option<u64>,
    /// The last one found something.
    found: bool,
    /// How often this process had lost its processor when the last one began.
    lost: u64,
}

impl Look {
    /// There was something to do.
    pub fn found(&mut self) {
        self.found |= self.until.take().is_some();
    }

    /// There is nothing to do. Whether to look again at once. `served`: something was done since the last sleep; `now_ns`: any clock;
    /// `lost`: how often this process lost its processor to another. Did it since the last look began, it may well have been to the
    /// client, as soon as that had its reply: then the look found something only because the client had to wait for it to end.
    pub fn again(&mut self, served: bool, now_ns: impl FnOnce() -> u64, lost: impl FnOnce() -> u64) -> bool {
        match self.until {
            None if !served => false,
            None if self.skip > 0 => {
                self.skip -= 1;
                false
            }
            None => {
                let lost = lost();
                if std::mem::take(&mut self.found) {
                    if lost == self.lost {
                        self.vain = 0;
                    } else {
                        self.was_vain();
                        return false;
                    }
                }
                self.lost = lost;
                self.until = Some(now_ns() + LOOK_NS);
                true
            }
            Some(until) if now_ns() < until => true,
            Some(_) => {
                self.until = None;
                self.was_vain();
                false
            }
        }
    }

    fn was_vain(&mut self) {
        self.vain = (self.vain + 1).min(MOST_VAIN);
        self.skip = (1 << self.vain) - 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_asked_until_it_has_nothing_twice() {
        let mut r = Recent::default();
        for id in [7, 1, 2, 3, 4, 7] {
            r.add(id);
        }
        let mut asked = Vec::new();
        let busy = |id, _| id < 5;
        assert_eq!(r.ask_all(|id, s| (asked.push(id), busy(id, s)).1), 4);
        assert_eq!(asked, [7, 1, 2, 3, 4]);
        assert_eq!(r.ask_all(busy), 4);
        assert_eq!(r.ask_all(|id, _| id == 7), 0, "7 is not asked any more");
        r.add(7);
        assert_eq!(r.ask_all(|id, _| id >= 4), 2);
    }

    #[test]
    fn few_are_not_asked_and_there_is_a_limit() {
        let mut r = Recent::default();
        r.add(1);
        assert_eq!(r.ask_all(|_, _| panic!("asked")), 0);
        (0..1000).for_each(|id| r.add(id));
        assert_eq!(r.ask_all(|_, _| true), MOST);
    }

    /// Whom epoll watches, as the steps say.
    #[derive(Default)]
    struct Epoll(std::collections::BTreeSet<ConnId>);

    impl Epoll {
        fn step(&mut self, id: ConnId, s: Step, busy: bool) -> bool {
            match s {
                Step::Ask => busy,
                Step::Unwatch => {
                    self.0.remove(&id);
                    true
                }
                Step::Watch => {
                    assert!(self.0.insert(id), "{id} is watched already");
                    true
                }
            }
        }
    }

    #[test]
    fn the_busiest_are_taken_from_epoll_and_come_back_once_they_are_not() {
        let (mut r, mut e) = (Recent::default(), Epoll((0..6).collect()));
        (0..5).for_each(|id| r.add(id));
        for _ in 1..UNWATCHED_FROM {
            r.ask_all(|id, s| e.step(id, s, true));
        }
        assert_eq!(e.0.len(), 6);
        r.ask_all(|id, s| e.step(id, s, true));
        assert_eq!(e.0.iter().collect::<Vec<_>>(), [&5]);
        // One has nothing to ask for a while, another for good.
        for round in 1..VAIN_UNWATCHED {
            r.ask_all(|id, s| e.step(id, s, id > 1 || (id == 1 && round == 3)));
        }
        assert_eq!(e.0.len(), 1);
        r.ask_all(|id, s| e.step(id, s, id > 1));
        assert_eq!(e.0.iter().collect::<Vec<_>>(), [&0, &5]);
        r.watch_all(|id, s| e.step(id, s, false));
        assert_eq!(e.0.len(), 6, "before a sleep");
        r.watch_all(|id, s| e.step(id, s, false));
    }

    #[test]
    fn when_few_are_left_epoll_watches_them() {
        let (mut r, mut e) = (Recent::default(), Epoll((0..4).collect()));
        (0..4).for_each(|id| r.add(id));
        for _ in 0..UNWATCHED_FROM {
            r.ask_all(|id, s| e.step(id, s, true));
        }
        assert!(e.0.is_empty());
        for _ in 0..VAIN_UNWATCHED {
            r.ask_all(|id, s| e.step(id, s, id != 0));
        }
        r.ask_all(|id, s| e.step(id, s, true));
        assert_eq!(e.0.len(), 4);
    }

    /// Looks begun while `sleeps` times nothing came, and something was done before each.
    fn vain_looks(l: &mut Look, sleeps: usize) -> usize {
        let (mut looks, mut now) = (0, 0);
        for _ in 0..sleeps {
            let mut first = true;
            while l.again(true, || now, || 0) {
                looks += usize::from(std::mem::take(&mut first));
                now += 10_000;
            }
        }
        looks
    }

    #[test]
    fn looking_in_vain_gets_rare_and_one_that_finds_brings_it_back() {
        let mut l = Look::default();
        assert!(!l.again(false, || 0, || 0), "nothing was done before");
        let begin = vain_looks(&mut l, 10_000);
        assert!((10..30).contains(&begin), "{begin}");
        assert_eq!(vain_looks(&mut l, 10_240), 10, "a thousandth of all sleeps");
        while !l.again(true, || 0, || 0) {}
        l.found();
        assert!(l.again(true, || 0, || 0), "the next look is at once");
    }

    #[test]
    fn looking_on_the_clients_own_processor_is_vain_though_it_finds() {
        let (mut l, mut looks) = (Look::default(), 0);
        for lost in 0..10_240 {
            if l.again(true, || 0, || lost) {
                looks += 1;
                l.found();
            }
        }
        assert!((10..30).contains(&looks), "{looks}");
    }
}
