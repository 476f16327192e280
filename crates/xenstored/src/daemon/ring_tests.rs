//! Guests that use their rings as no driver would, over simulated ones.

use super::kill_point::test::kill_after;
use super::kill_tests::Host;
use super::ring::RingPage;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use xenstore_wire::ring::{REQ, REQ_CONS, REQ_PROD, RING_SIZE, RSP_CONS, RSP_PROD, offset};
use xenstore_wire::{Message, Op, payload};

/// Requests that one who never stops sends before the test gives up.
const MANY: u32 = 10_000;

fn request() -> Vec<u8> {
    Message::new(Op::GetDomainPath.to_wire(), 1, 0, b"1\0".to_vec()).to_bytes()
}

/// Guest 1 fills its ring with requests, and takes its replies for read.
fn pour(domid: u16, page: &RingPage) {
    let request = request();
    let len = request.len() as u32;
    let (cons, prod) = (page.word(REQ_CONS).load(Ordering::SeqCst), page.word(REQ_PROD).load(Ordering::SeqCst));
    if domid != 1 || cons >= MANY * len {
        return;
    }
    let full = cons + RING_SIZE as u32;
    for i in prod..full {
        page.byte(REQ + offset(i)).store(request[(i % len) as usize], Ordering::SeqCst);
    }
    page.word(REQ_PROD).store(full, Ordering::SeqCst);
    let replies = page.word(RSP_PROD).load(Ordering::SeqCst);
    page.word(RSP_CONS).store(replies, Ordering::SeqCst);
}

#[test]
fn a_guest_that_keeps_its_ring_filled_leaves_others_their_turns() {
    let mut h = Host::new(Vec::new());
    h.introduce(1);
    let served = |h: &Host| h.guests[&1].page.word(REQ_CONS).load(Ordering::SeqCst) / request().len() as u32;
    pour(1, &h.guests[&1].page);
    h.outside.borrow_mut().busy = Some(pour);
    let mut before = 0;
    for turn in 0..10 {
        h.turn();
        let now = served(&h);
        assert!((1..=3 * 16).contains(&(now - before)), "turn {turn}: {} requests served", now - before);
        before = now;
        // What is raised now is not guest 1's port: that its ring is not empty has to be remembered.
        h.raise();
    }
}

#[test]
fn a_guest_whose_indexes_cannot_be_costs_nothing_once_it_is_ignored() {
    let mut h = Host::new(Vec::new());
    h.introduce(1);
    // How far the journal counts.
    let committed = |h: &Host| std::fs::read(h.dir.path().join("journal")).unwrap()[72..80].to_vec();
    h.guests[&1].page.word(REQ_PROD).store(5 * RING_SIZE as u32, Ordering::SeqCst);
    h.turn();
    let once = committed(&h);
    h.outside.borrow_mut().notified.clear();
    for _ in 0..100 {
        h.turn();
    }
    assert_eq!(committed(&h), once, "the journal grows");
    assert_eq!(h.outside.borrow().notified, [0u16; 0]);
}

fn read(h: &mut Host) {
    h.send(0, Op::Read, 0, b"/tool\0");
    h.settle();
}

#[test]
fn a_journal_that_is_made_again_knows_where_dom0s_ring_stands() {
    let mut h = Host::new(Vec::new());
    read(&mut h);
    h.daemon.as_mut().unwrap().lose_journal(&anyhow::anyhow!("no room"));
    read(&mut h);
    h.daemon.as_mut().unwrap().retry_journal = Some(0);
    h.turn();
    assert!(h.dir.path().join("journal").exists());
    h.kill();
    read(&mut h);
}

#[test]
fn dom0s_ring_may_be_emptied() {
    // By a tool, and killed once the journal was begun anew since.
    let mut h = Host::new(Vec::new());
    read(&mut h);
    let mut tool = UnixStream::connect(h.dir.path().join("socket")).unwrap();
    let introduce = payload::join(["0", "1", "77"]);
    tool.write_all(&Message::new(Op::Introduce.to_wire(), 1, 0, introduce).to_bytes()).unwrap();
    h.settle();
    assert_eq!(h.guests[&0].page.word(REQ_CONS).load(Ordering::SeqCst), 0);
    h.daemon.as_mut().unwrap().compact(None).unwrap();
    h.kill();
    read(&mut h);
    // By its kernel, and killed at any point of it.
    for points in 0.. {
        let mut h = Host::new(Vec::new());
        read(&mut h);
        kill_after(points);
        h.introduce(0);
        read(&mut h);
        kill_after(u64::MAX);
        if h.kills == 0 {
            assert!(points > 20, "{points} points");
            break;
        }
    }
}
