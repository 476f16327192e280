//! The forwarding rules of the lab's switch, without I/O: it learns where each station is, never forgets by itself (so a
//! guest that stays silent after its move shows whether anybody announced it), counts, delays and drops, and watches from
//! outside that one address never sends from two places (promise S1).

use std::collections::HashMap;
use std::time::Duration;

use serde::Serialize;

use super::Mac;

/// Stations a switch remembers; frames to any further one are flooded, so a guest that invents addresses costs no memory.
const MAX_STATIONS: usize = 4096;
/// Moves that are remembered for each station; later ones are only counted.
const MAX_MOVES: usize = 256;
/// Violations that are kept with their evidence.
const MAX_VIOLATIONS: usize = 64;

/// Number of a port of the switch, in the order in which they were added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct PortId(pub usize);

/// The state of the cable between a port and its station; it holds in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cable {
    /// False: nothing passes.
    pub up: bool,
    /// Added to every frame, each way.
    pub delay: Duration,
    /// Of 1000 frames, so many are dropped (by a seeded generator, so a run can be repeated).
    pub drop_per_mille: u16,
}

impl Default for Cable {
    fn default() -> Self {
        Self { up: true, delay: Duration::ZERO, drop_per_mille: 0 }
    }
}

/// What passed one port. "In" is from the station to the switch.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Counters {
    pub frames_in: u64,
    pub bytes_in: u64,
    pub frames_out: u64,
    pub bytes_out: u64,
    /// Lost on purpose: the cable was cut or told to drop.
    pub dropped_by_cable: u64,
    /// Lost because the station did not take its frames (a paused or dead host).
    pub dropped_by_station: u64,
}

/// One station was heard on another port than before.
#[derive(Clone, Debug, Serialize)]
pub struct Move {
    /// When the first frame came in on the new port.
    pub at: Duration,
    /// When the last frame came in on the old port.
    pub last_on_old: Duration,
    pub from: PortId,
    pub to: PortId,
}

/// A watched address sent from a port that it had left in the same epoch: two copies of it are at work.
#[derive(Clone, Debug, Serialize)]
pub struct DoubleSender {
    pub mac: Mac,
    /// Whose address it is, as given to [`Switch::watch`].
    pub owner: String,
    /// The epoch, as given to [`Switch::new_epoch`].
    pub epoch: String,
    /// The port it had left, and on which it was heard again.
    pub port: PortId,
    pub heard_again: Duration,
    /// The port it had moved to meanwhile, and when it was last heard there.
    pub moved_to: PortId,
    pub last_on_moved_to: Duration,
}

#[derive(Debug)]
struct Station {
    port: PortId,
    last_heard: Duration,
    moves: Vec<Move>,
    move_count: u64,
    /// Ports it has left in this epoch.
    left: Vec<PortId>,
    owner: Option<String>,
}

#[derive(Debug)]
struct Port {
    name: String,
    cable: Cable,
    counters: Counters,
}

/// Where a frame goes: port and the time at which it is due there.
pub type Deliveries = Vec<(PortId, Duration)>;

/// The switch.
#[derive(Debug)]
pub struct Switch {
    ports: Vec<Port>,
    stations: HashMap<Mac, Station>,
    watched: HashMap<Mac, String>,
    violations: Vec<DoubleSender>,
    violation_count: u64,
    epoch: String,
    /// Bytes from port (row) to port (column); flooded frames count for each port they reach.
    matrix: Vec<Vec<u64>>,
    rng: u64,
}

/// Everything the switch knows, for the report.
#[derive(Clone, Debug, Serialize)]
pub struct SwitchReport {
    pub ports: Vec<PortReport>,
    pub stations: Vec<StationReport>,
    pub double_senders: Vec<DoubleSender>,
    pub double_sender_frames: u64,
}

/// One port, for the report.
#[derive(Clone, Debug, Serialize)]
pub struct PortReport {
    pub name: String,
    pub counters: Counters,
    pub cable: Cable,
}

/// One watched station, for the report.
#[derive(Clone, Debug, Serialize)]
pub struct StationReport {
    pub mac: Mac,
    pub owner: String,
    /// Where it was heard last, if it was ever heard.
    pub port: Option<String>,
    pub last_heard: Option<Duration>,
    pub moves: Vec<Move>,
    pub move_count: u64,
}

impl Default for Switch {
    fn default() -> Self {
        Self::new(0x9e37_79b9_7f4a_7c15)
    }
}

impl Switch {
    /// A switch with no ports. `seed` (not 0) decides which frames a dropping cable drops.
    pub fn new(seed: u64) -> Self {
        Self {
            ports: Vec::new(),
            stations: HashMap::new(),
            watched: HashMap::new(),
            violations: Vec::new(),
            violation_count: 0,
            epoch: "start".to_owned(),
            matrix: Vec::new(),
            rng: seed.max(1),
        }
    }

    /// Adds a port.
    pub fn add_port(&mut self, name: &str) -> PortId {
        self.ports.push(Port { name: name.to_owned(), cable: Cable::default(), counters: Counters::default() });
        for row in &mut self.matrix {
            row.push(0);
        }
        self.matrix.push(vec![0; self.ports.len()]);
        PortId(self.ports.len() - 1)
    }

    /// The name given to [`Switch::add_port`].
    pub fn port_name(&self, port: PortId) -> &str {
        self.ports.get(port.0).map_or("?", |p| &p.name)
    }

    /// The port of that name.
    pub fn port_by_name(&self, name: &str) -> Option<PortId> {
        self.ports.iter().position(|p| p.name == name).map(PortId)
    }

    /// Watches that `mac` never sends from two ports in one epoch.
    pub fn watch(&mut self, mac: Mac, owner: &str) {
        self.watched.insert(mac, owner.to_owned());
        if let Some(station) = self.stations.get_mut(&mac) {
            station.owner = Some(owner.to_owned());
        }
    }

    /// Begins a time in which each station may move to each port once: one migration, say.
    pub fn new_epoch(&mut self, name: &str) {
        self.epoch = name.to_owned();
        for station in self.stations.values_mut() {
            station.left.clear();
        }
    }

    /// The cable of a port.
    pub fn cable_mut(&mut self, port: PortId) -> Option<&mut Cable> {
        self.ports.get_mut(port.0).map(|p| &mut p.cable)
    }

    /// What passed the port so far.
    pub fn counters(&self, port: PortId) -> Counters {
        self.ports.get(port.0).map(|p| p.counters).unwrap_or_default()
    }

    /// Bytes that went in at `from` and out at `to` so far.
    pub fn bytes_between(&self, from: PortId, to: PortId) -> u64 {
        self.matrix.get(from.0).and_then(|row| row.get(to.0)).copied().unwrap_or(0)
    }

    /// A station did not take a frame.
    pub fn count_undelivered(&mut self, port: PortId) {
        if let Some(port) = self.ports.get_mut(port.0) {
            port.counters.dropped_by_station += 1;
        }
    }

    /// Takes a frame that came in on `port` at `now` and says where it goes. A frame shorter than an Ethernet header is
    /// dropped.
    pub fn ingress(&mut self, now: Duration, port: PortId, frame: &[u8]) -> Deliveries {
        let Some((&dst, rest)) = frame.split_first_chunk::<6>() else { return Vec::new() };
        let Some((&src, _)) = rest.split_first_chunk::<6>() else { return Vec::new() };
        let (dst, src) = (Mac(dst), Mac(src));
        if !self.cable_passes(port) {
            return Vec::new();
        }
        let Some(from) = self.ports.get_mut(port.0) else { return Vec::new() };
        from.counters.frames_in += 1;
        from.counters.bytes_in += frame.len() as u64;
        let delay_in = from.cable.delay;
        self.learn(now, port, src);

        let known = (!dst.is_group()).then(|| self.stations.get(&dst).map(|s| s.port)).flatten();
        let targets: Vec<PortId> = match known {
            Some(to) if to == port => Vec::new(),
            Some(to) => vec![to],
            None => (0..self.ports.len()).map(PortId).filter(|p| *p != port).collect(),
        };
        let mut deliveries = Vec::with_capacity(targets.len());
        for to in targets {
            if !self.cable_passes(to) {
                continue;
            }
            if let Some(out) = self.ports.get_mut(to.0) {
                out.counters.frames_out += 1;
                out.counters.bytes_out += frame.len() as u64;
                deliveries.push((to, now + delay_in + out.cable.delay));
            }
            if let Some(cell) = self.matrix.get_mut(port.0).and_then(|row| row.get_mut(to.0)) {
                *cell += frame.len() as u64;
            }
        }
        deliveries
    }

    fn cable_passes(&mut self, port: PortId) -> bool {
        // xorshift64: good enough to choose frames, and the same choice in every run.
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        let dice = (self.rng >> 32) % 1000;
        let Some(port) = self.ports.get_mut(port.0) else { return false };
        let passes = port.cable.up && dice >= u64::from(port.cable.drop_per_mille);
        if !passes {
            port.counters.dropped_by_cable += 1;
        }
        passes
    }

    fn learn(&mut self, now: Duration, port: PortId, src: Mac) {
        if src.is_group() {
            return;
        }
        let Some(station) = self.stations.get_mut(&src) else {
            let owner = self.watched.get(&src).cloned();
            if self.stations.len() < MAX_STATIONS || owner.is_some() {
                let station =
                    Station { port, last_heard: now, moves: Vec::new(), move_count: 0, left: Vec::new(), owner };
                self.stations.insert(src, station);
            }
            return;
        };
        if station.port != port {
            if let Some(owner) = station.owner.as_ref().filter(|_| station.left.contains(&port)) {
                self.violation_count += 1;
                if self.violations.len() < MAX_VIOLATIONS {
                    self.violations.push(DoubleSender {
                        mac: src,
                        owner: owner.clone(),
                        epoch: self.epoch.clone(),
                        port,
                        heard_again: now,
                        moved_to: station.port,
                        last_on_moved_to: station.last_heard,
                    });
                }
            }
            if !station.left.contains(&station.port) {
                station.left.push(station.port);
            }
            station.move_count += 1;
            if station.moves.len() < MAX_MOVES {
                let last_on_old = station.last_heard;
                station.moves.push(Move { at: now, last_on_old, from: station.port, to: port });
            }
            station.port = port;
        }
        station.last_heard = now;
    }

    /// Where a station was heard last.
    pub fn station_port(&self, mac: Mac) -> Option<PortId> {
        self.stations.get(&mac).map(|s| s.port)
    }

    /// What there is to report.
    pub fn report(&self) -> SwitchReport {
        let mut stations: Vec<_> = self
            .watched
            .iter()
            .map(|(mac, owner)| {
                let station = self.stations.get(mac);
                StationReport {
                    mac: *mac,
                    owner: owner.clone(),
                    port: station.map(|s| self.port_name(s.port).to_owned()),
                    last_heard: station.map(|s| s.last_heard),
                    moves: station.map(|s| s.moves.clone()).unwrap_or_default(),
                    move_count: station.map_or(0, |s| s.move_count),
                }
            })
            .collect();
        stations.sort_by_key(|s| s.mac);
        SwitchReport {
            ports: self
                .ports
                .iter()
                .map(|p| PortReport { name: p.name.clone(), counters: p.counters, cable: p.cable })
                .collect(),
            stations,
            double_senders: self.violations.clone(),
            double_sender_frames: self.violation_count,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: Mac = Mac([0, 0x16, 0x3e, 0, 0, 1]);
    const PEER: Mac = Mac([2, 0, 0, 0, 0, 9]);

    fn frame(src: Mac, dst: Mac) -> Vec<u8> {
        [dst.0.as_slice(), &src.0, &[0x08, 0x00], &[0; 46]].concat()
    }

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn three() -> (Switch, PortId, PortId, PortId) {
        let mut switch = Switch::default();
        let (a, b, peer) = (switch.add_port("a"), switch.add_port("b"), switch.add_port("peer"));
        switch.watch(GUEST, "guest");
        (switch, a, b, peer)
    }

    fn to(deliveries: &Deliveries) -> Vec<PortId> {
        deliveries.iter().map(|(p, _)| *p).collect()
    }

    #[test]
    fn floods_until_it_has_learned_and_never_forgets() {
        let (mut s, a, b, peer) = three();
        assert_eq!(to(&s.ingress(ms(0), peer, &frame(PEER, GUEST))), [a, b]);
        assert_eq!(to(&s.ingress(ms(1), a, &frame(GUEST, PEER))), [peer]);
        assert_eq!(to(&s.ingress(ms(2), peer, &frame(PEER, GUEST))), [a]);
        // An ordinary switch would have aged the entry after five minutes.
        assert_eq!(to(&s.ingress(Duration::from_secs(86_400), peer, &frame(PEER, GUEST))), [a]);
        assert_eq!(to(&s.ingress(ms(3), a, &frame(GUEST, Mac::BROADCAST))), [b, peer]);
        assert_eq!(s.bytes_between(peer, a), 3 * 60);
    }

    #[test]
    fn a_station_on_the_same_port_gets_nothing_back() {
        let (mut s, a, _, _) = three();
        s.ingress(ms(0), a, &frame(GUEST, PEER));
        s.ingress(ms(0), a, &frame(PEER, GUEST));
        assert!(s.ingress(ms(1), a, &frame(GUEST, PEER)).is_empty());
    }

    #[test]
    fn one_move_is_a_migration_and_a_return_is_two_senders() {
        let (mut s, a, b, peer) = three();
        s.new_epoch("migrate guest");
        s.ingress(ms(10), a, &frame(GUEST, PEER));
        s.ingress(ms(50), b, &frame(GUEST, Mac::BROADCAST));
        s.ingress(ms(60), b, &frame(GUEST, PEER));
        let report = s.report();
        assert!(report.double_senders.is_empty());
        assert_eq!((report.stations[0].moves[0].at, report.stations[0].moves[0].last_on_old), (ms(50), ms(10)));
        assert_eq!(to(&s.ingress(ms(61), peer, &frame(PEER, GUEST))), [b]);

        s.ingress(ms(70), a, &frame(GUEST, PEER));
        let report = s.report();
        assert_eq!(report.double_sender_frames, 1);
        let seen = &report.double_senders[0];
        assert_eq!((seen.port, seen.moved_to, seen.last_on_moved_to), (a, b, ms(60)));
        assert_eq!(seen.epoch, "migrate guest");
    }

    #[test]
    fn a_second_migration_may_go_back() {
        let (mut s, a, b, _) = three();
        s.new_epoch("there");
        s.ingress(ms(1), a, &frame(GUEST, PEER));
        s.ingress(ms(2), b, &frame(GUEST, PEER));
        s.new_epoch("back");
        s.ingress(ms(3), a, &frame(GUEST, PEER));
        assert_eq!(s.report().double_sender_frames, 0);
        s.ingress(ms(4), b, &frame(GUEST, PEER));
        assert_eq!(s.report().double_sender_frames, 1);
    }

    #[test]
    fn unwatched_addresses_may_appear_anywhere() {
        let (mut s, a, b, _) = three();
        let vif = Mac([0xfe, 0xff, 0xff, 0xff, 0xff, 0xff]);
        for port in [a, b, a, b] {
            s.ingress(ms(1), port, &frame(vif, Mac::BROADCAST));
        }
        assert_eq!(s.report().double_sender_frames, 0);
    }

    #[test]
    fn a_cut_cable_passes_nothing_either_way_and_teaches_nothing() {
        let (mut s, a, b, peer) = three();
        s.ingress(ms(0), a, &frame(GUEST, PEER));
        s.cable_mut(b).unwrap().up = false;
        assert!(s.ingress(ms(1), b, &frame(GUEST, PEER)).is_empty());
        assert_eq!(s.station_port(GUEST), Some(a));
        assert_eq!(to(&s.ingress(ms(1), a, &frame(GUEST, Mac::BROADCAST))), [peer]);
        assert_eq!(s.counters(b).dropped_by_cable, 2);
        assert_eq!(s.counters(b).frames_in, 0);
    }

    #[test]
    fn delay_counts_both_cables_and_drops_follow_the_rate() {
        let (mut s, a, _, peer) = three();
        s.ingress(ms(0), a, &frame(GUEST, PEER));
        s.ingress(ms(0), peer, &frame(PEER, GUEST));
        s.cable_mut(a).unwrap().delay = ms(20);
        s.cable_mut(peer).unwrap().delay = ms(5);
        assert_eq!(s.ingress(ms(100), a, &frame(GUEST, PEER)), [(peer, ms(125))]);
        s.cable_mut(a).unwrap().drop_per_mille = 250;
        let passed = (0..4000).filter(|_| !s.ingress(ms(200), a, &frame(GUEST, PEER)).is_empty()).count();
        assert!((2800..3200).contains(&passed), "{passed} of 4000 passed a cable that drops a quarter");
    }

    #[test]
    fn invented_addresses_cost_bounded_memory_and_short_frames_nothing() {
        let (mut s, a, _, peer) = three();
        for n in 0..20_000u32 {
            let [w, x, y, z] = n.to_be_bytes();
            s.ingress(ms(0), a, &frame(Mac([2, 9, w, x, y, z]), PEER));
        }
        assert!(s.stations.len() <= MAX_STATIONS);
        s.ingress(ms(1), a, &frame(GUEST, PEER));
        assert_eq!(to(&s.ingress(ms(2), peer, &frame(PEER, GUEST))), [a], "a watched address is learned all the same");
        for len in 0..12 {
            assert!(s.ingress(ms(3), a, &frame(GUEST, PEER)[..len]).is_empty());
        }
    }
}
