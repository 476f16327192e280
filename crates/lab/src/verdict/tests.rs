use witness::report::{Beat, Body, Envelope, Gap, Item};

use super::*;
use crate::net::Mac;
use crate::net::flow::Silence;
use crate::net::switch::{DoubleSender, PortId, PortReport, StationReport};
use crate::steps::copies::{Copies, Listed};
use crate::steps::ring::Ring;

const MAC: Mac = Mac([0, 0x16, 0x3e, 0, 0, 1]);

fn s(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn look(at: u64, domid: u16) -> Received<Snapshot> {
    let mut body = Snapshot::default();
    body.identity.domid_store = Item::Seen(domid);
    body.identity.uuid_store = Item::Seen("u".to_owned());
    body.counters = Beat { rx: at * 20, ..Beat::default() };
    Received { at: s(at), mono_ns: nanos(s(at)), real_ns: 0, body }
}

fn listed(host: &str, seconds: f64) -> Listed {
    Listed { host: host.to_owned(), name: "g".to_owned(), domid: 1, state: "r".to_owned(), seconds }
}

fn copies(after: Vec<Listed>) -> Copies {
    let first = after.iter().map(|l| Listed { seconds: 1.0, ..l.clone() }).collect();
    Copies { guest: "g".to_owned(), at: s(30), first, second: after, unseen: vec![] }
}

fn a_move(domid_after: u16) -> Move {
    Move {
        guest: "g".to_owned(),
        how: "xl migrate",
        from: "a".to_owned(),
        to: "b".to_owned(),
        began: s(20),
        ended: Some(s(25)),
        moved: true,
        bytes: 1,
        window: Some(witness::judge::Window { from_ns: nanos(s(20)), to_ns: nanos(s(26)) }),
        output: String::new(),
        report: None,
        expected: Default::default(),
        at_start: Default::default(),
        before: Some(look(19, 1)),
        after: Some(look(40, domid_after)),
    }
}

fn switch() -> SwitchReport {
    let port =
        |name: &str| PortReport { name: name.to_owned(), counters: Default::default(), cable: Default::default() };
    let station = StationReport {
        mac: MAC,
        owner: "g".to_owned(),
        port: Some("b".to_owned()),
        last_heard: Some(s(40)),
        moves: vec![],
        move_count: 1,
    };
    SwitchReport {
        ports: vec![port("a"), port("b")],
        stations: vec![station],
        double_senders: vec![],
        double_sender_frames: 0,
    }
}

fn outcome(moves: &[Move], record: &GuestRecord, view: &GuestView, switch: &SwitchReport, p: Promise) -> Judged {
    let last = record.first.as_ref();
    let seen = Seen { guest: "g", record, moves: moves.iter().collect(), view, switch, journal: Some(vec![]), last };
    judge(&seen).into_iter().find(|j| j.promise == p).unwrap()
}

fn record() -> GuestRecord {
    GuestRecord {
        on: Some("b".to_owned()),
        created: true,
        first: Some(look(5, 1)),
        copies: vec![copies(vec![listed("b", 2.0)])],
        console: None,
    }
}

#[test]
fn the_guests_own_findings_count_for_each_move() {
    let view = GuestView::default();
    let is = |moves: &[Move]| outcome(moves, &record(), &view, &switch(), Promise::T1);
    assert_eq!(is(&[a_move(1)]).outcome, Outcome::Pass);
    let failed = is(&[a_move(1), a_move(4)]);
    assert_eq!(failed.outcome, Outcome::Fail);
    assert!(failed.evidence[0].contains("move 2: domid"), "{:?}", failed.evidence);
    assert_eq!(is(&[a_move(4), a_move(1)]).outcome, Outcome::Fail, "a later pass heals nothing");
}

#[test]
fn each_move_can_be_judged_by_itself() {
    let at_start = |tcp_accepted| crate::steps::PeerMark { tcp_accepted, tcp_broken: 0 };
    // The first move is clean. The second gives another domid, breaks the TCP connection and leaves two copies that run.
    let first = Move { at_start: at_start(1), ..a_move(1) };
    let second = Move { began: s(60), ended: Some(s(65)), at_start: at_start(1), ..a_move(4) };
    let two = Copies { at: s(70), ..copies(vec![listed("a", 1.5), listed("b", 2.0)]) };
    let mut record = record();
    record.copies.push(two);
    let view = GuestView { tcp_accepted: 2, ..GuestView::default() };
    let switch = switch();
    let moves = vec![&first, &second];
    let seen =
        Seen { guest: "g", record: &record, moves, view: &view, switch: &switch, journal: Some(vec![]), last: None };
    let failed = |judged: Vec<Judged>| -> Vec<Promise> {
        judged.into_iter().filter(|j| j.outcome == Outcome::Fail).map(|j| j.promise).collect()
    };
    assert_eq!(failed(judge_move(&seen, 0)), []);
    let broken = [Promise::T1, Promise::T9, Promise::S1];
    assert_eq!(failed(judge_move(&seen, 1)), broken);
    assert_eq!(failed(judge(&seen)), broken);
    let passed = judge_move(&seen, 0);
    assert_eq!(passed.iter().find(|j| j.promise == Promise::S1).map(|j| j.outcome), Some(Outcome::Pass));
}

#[test]
fn a_guest_that_is_silent_after_its_move_fails() {
    let lost = Move { after: None, ..a_move(1) };
    for promise in [Promise::T9, Promise::T10] {
        let judged = outcome(std::slice::from_ref(&lost), &record(), &GuestView::default(), &switch(), promise);
        assert_eq!(judged.outcome, Outcome::Fail);
        assert!(judged.evidence[0].contains("has not reported since xl migrate"), "{:?}", judged.evidence);
    }
    let judged = outcome(&[lost], &record(), &GuestView::default(), &switch(), Promise::T1);
    assert_eq!(judged.outcome, Outcome::NotExercised);
}

#[test]
fn one_copy_at_a_time_is_judged_from_outside() {
    let view = GuestView::default();
    let is = |record: &GuestRecord, view: &GuestView, switch: &SwitchReport| {
        outcome(&[a_move(1)], record, view, switch, Promise::S1).outcome
    };
    assert_eq!(is(&record(), &view, &switch()), Outcome::Pass);
    assert_eq!(is(&GuestRecord { copies: vec![], ..record() }, &view, &switch()), Outcome::NotExercised);

    let two = GuestRecord { copies: vec![copies(vec![listed("a", 1.5), listed("b", 2.0)])], ..record() };
    assert_eq!(is(&two, &view, &switch()), Outcome::Fail);
    let paused = GuestRecord { copies: vec![copies(vec![listed("a", 1.0), listed("b", 2.0)])], ..record() };
    assert_eq!(is(&paused, &view, &switch()), Outcome::Pass);

    let double = |owner: &str| {
        let mut switch = switch();
        switch.double_senders.push(DoubleSender {
            mac: MAC,
            owner: owner.to_owned(),
            epoch: "x".to_owned(),
            port: PortId(0),
            heard_again: s(30),
            moved_to: PortId(1),
            last_on_moved_to: s(29),
        });
        switch
    };
    assert_eq!(is(&record(), &view, &double("g")), Outcome::Fail);
    assert_eq!(is(&record(), &view, &double("another")), Outcome::Pass);

    let mut twice = GuestView::default();
    twice.udp_stream.counts.conflicting = 1;
    assert_eq!(is(&record(), &twice, &switch()), Outcome::Fail);
}

#[test]
fn damaged_packets_and_a_fresh_start_are_seen_from_outside() {
    let mut view = GuestView { restarts: 1, ..GuestView::default() };
    view.tcp_echo.counts.corrupt = 2;
    for promise in [Promise::T9, Promise::T10] {
        assert_eq!(outcome(&[a_move(1)], &record(), &view, &switch(), promise).outcome, Outcome::Fail, "{promise:?}");
    }
}

#[test]
fn silences_and_gaps_are_those_of_the_move() {
    let mut view = GuestView::default();
    view.udp_stream.silences =
        vec![Silence { from: s(1), to: s(9) }, Silence { from: s(22), to: s(24) }, Silence { from: s(30), to: s(31) }];
    let mut entry = a_move(1);
    assert_eq!(udp_silence(&view, &entry), Some(s(2)));
    assert_eq!(tcp_silence(&view, &entry), None);
    let gap = |at, mono, real| Gap { at_ns: nanos(s(at)), mono_ns: mono, boot_ns: 0, real_ns: real, tsc: 0 };
    entry.after.as_mut().unwrap().body.clocks.gaps = vec![gap(5, 9_000_000_000, 0), gap(23, 700, 0), gap(24, 10, -900)];
    assert_eq!(clock_gap(&entry), Some(Duration::from_nanos(900)));
}

#[test]
fn a_run_without_a_move_needs_two_looks() {
    let mut record = record();
    let view = GuestView::default();
    let judged = outcome(&[], &record, &view, &switch(), Promise::T10);
    assert_eq!(judged.outcome, Outcome::Fail, "the only look is the first");
    let last = look(30, 1);
    record.copies.clear();
    let seen = Seen {
        guest: "g",
        record: &record,
        moves: vec![],
        view: &view,
        switch: &switch(),
        journal: None,
        last: Some(&last),
    };
    let judged = judge(&seen);
    assert_eq!(judged[0].outcome, Outcome::Pass);
}

/// A console on which reports were read at these seconds from these hosts, after a command each.
fn console(came: &[(u64, &str, u64)]) -> Ring {
    let mut ring = Ring::default();
    came.iter().for_each(|line| report_on(&mut ring, line));
    ring
}

fn report_on(ring: &mut Ring, &(at, host, seq): &(u64, &str, u64)) {
    let body = Body::Snapshot(Box::new(Snapshot { reason: "x".repeat(1500), ..Snapshot::default() }));
    let report = Envelope { v: witness::wire::VERSION, run: 7, seq, mono_ns: 0, real_ns: 0, body };
    let line = witness::wire::console_line(&serde_json::to_vec(&report).unwrap());
    ring.typed(s(at), "report now\n");
    ring.take(s(at), host, "witness: report follows");
    ring.take(s(at), host, std::str::from_utf8(&line).unwrap());
}

#[test]
fn the_ring_of_a_guest_with_a_console_only_is_judged_over_both_hosts() {
    let is = |came: &[(u64, &str, u64)]| {
        let record = GuestRecord { console: Some(console(came)), ..record() };
        let judged = outcome(&[a_move(1)], &record, &GuestView::default(), &switch(), Promise::T8);
        (judged.outcome, judged.evidence.join("\n"))
    };
    let (fine, text) = is(&[(18, "a", 1), (19, "a", 2), (25, "a", 3), (26, "b", 4), (40, "b", 5)]);
    assert_eq!(fine, Outcome::Pass, "{text}");
    assert!(text.contains("before xl migrate: reports 1 to 2 and 2 answers on a; after it: reports 4 to 5"), "{text}");

    let (lost, text) = is(&[(18, "a", 1), (19, "a", 2), (26, "b", 4), (40, "b", 5)]);
    assert_eq!(lost, Outcome::Fail);
    assert!(text.starts_with("console: report 3 did not come: on b came 4 after 2"), "{text}");
    let (twice, text) = is(&[(18, "a", 1), (19, "a", 2), (26, "b", 2), (40, "b", 3)]);
    assert_eq!(twice, Outcome::Fail);
    assert!(text.starts_with("console: report 2 came twice: on b after report 2"), "{text}");

    // Nothing came from the destination, or all was read there.
    for few in [&[(18, "a", 1), (19, "a", 2), (30, "a", 3)][..], &[(26, "b", 1), (40, "b", 2)], &[]] {
        assert_eq!(is(few).0, Outcome::NotExercised, "{few:?}");
    }
}

#[test]
fn a_console_does_not_vouch_for_a_disk_nor_for_a_log_that_was_not_read() {
    let came = [(18, "a", 1), (19, "a", 2), (26, "b", 3), (40, "b", 4)];
    let is =
        |record: &GuestRecord| outcome(&[a_move(1)], record, &GuestView::default(), &switch(), Promise::T8).outcome;
    let mut with_disk = GuestRecord { console: Some(console(&came)), ..record() };
    let device =
        witness::report::Device { name: "vbd-51712".to_owned(), state: String::new(), driver: "vbd".to_owned() };
    with_disk.first.as_mut().unwrap().body.devices.push(device);
    assert_eq!(is(&with_disk), Outcome::NotExercised);

    let mut ring = console(&came[..2]);
    ring.blind("a is gone".to_owned());
    [(26, "b", 4), (40, "b", 5)].iter().for_each(|line| report_on(&mut ring, line));
    assert_eq!(is(&GuestRecord { console: Some(ring), ..record() }), Outcome::NotExercised);
}

#[test]
fn a_fault_of_the_console_counts_to_the_move_in_which_it_was_seen() {
    let (first, second) =
        (a_move(1), Move { began: s(60), ended: Some(s(65)), from: "b".into(), to: "a".into(), ..a_move(1) });
    let came = [(18, "a", 1), (19, "a", 2), (26, "b", 3), (40, "b", 4), (66, "a", 6), (70, "a", 7)];
    let record = GuestRecord { console: Some(console(&came)), ..record() };
    let (view, switch) = (GuestView::default(), switch());
    let moves = vec![&first, &second];
    let seen = Seen { guest: "g", record: &record, moves, view: &view, switch: &switch, journal: None, last: None };
    let t8 = |judged: Vec<Judged>| judged.into_iter().find(|j| j.promise == Promise::T8).unwrap().outcome;
    assert_eq!((t8(judge_move(&seen, 0)), t8(judge_move(&seen, 1))), (Outcome::Pass, Outcome::Fail));
    assert_eq!(t8(judge(&seen)), Outcome::Fail);
}
