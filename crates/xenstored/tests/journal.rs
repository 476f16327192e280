//! A store goes into a journal and comes out of it: what the kill tests, whose clients are rings, have no eye for.

mod common;
use common::{World, nodes};
use proptest::prelude::*;
use xenstore_wire::{Errno, Op, payload};
use xenstored::{DomainState, Moved, Options, Recovered, RingStep, Store};

/// A journal in memory.
struct Journal {
    snapshot: Vec<u8>,
    batches: Vec<Vec<u8>>,
}

impl Journal {
    fn begin(s: &mut Store) -> Journal {
        let (snapshot, first) = s.snapshot().unwrap();
        Journal { snapshot, batches: vec![first] }
    }

    fn commit(&mut self, s: &mut Store) {
        let mut b = Vec::new();
        if s.take_changes(None, &mut b) {
            self.batches.push(b);
        }
    }

    fn recover(&self) -> Recovered {
        Store::recover(Options::default(), &self.snapshot, self.batches.iter().map(|b| &b[..]), 0).unwrap()
    }
}

/// Puts a world's store in place of the one that it had, as a daemon does that comes back.
fn kill(w: &mut World, j: &Journal) -> u32 {
    let r = j.recover();
    w.store = r.store;
    for (domid, port) in r.domains {
        w.store.reconnected(domid, 100 + port);
    }
    w.check();
    w.events.clear();
    w.replies.clear();
    w.tool()
}

fn exported() -> Vec<u8> {
    let mut w = World::new(Options::default());
    let t = w.tool();
    let g = w.guest(t, 5);
    for (p, v) in [("data/a", "1"), ("data/b", "2"), ("device/x", "")] {
        w.write(g, p, v).unwrap();
    }
    w.ok(g, Op::Watch, &["data", "d"]);
    let tx = w.begin(g);
    w.req(g, Op::Write, tx, &["data/a", "in it"]).unwrap();
    w.events(g);
    w.ok(t, Op::DomainFreeze, &["5"]);
    let body = payload::join(["5", "0", "/local/domain/5"]);
    let r = w.raw(t, Op::DomainExport, 0, &body).unwrap();
    let (total, bytes) = payload::split_first(&r).unwrap();
    assert_eq!(payload::decimal::<usize>(total).unwrap(), bytes.len(), "it fits one reply");
    bytes.to_vec()
}

#[test]
fn an_import_outlives_the_daemon_whether_it_is_attached_or_taken_back() {
    let stream = exported();
    // Killed before the import, after it, after another journal was begun, and after the attachment.
    for kills in 0u32..16 {
        let mut w = World::new(Options::default());
        w.host.domains.insert(5, DomainState::default());
        let mut t = w.tool();
        w.write(t, "/local/domain/5/data/b", "of before").unwrap();
        let mut j = Journal::begin(&mut w.store);
        let mut step = |w: &mut World, t: &mut u32, bit: u32, anew: bool| {
            j.commit(&mut w.store);
            if kills >> bit & 1 != 0 {
                if anew {
                    j = Journal::begin(&mut w.store);
                }
                let before = nodes(&w.store);
                *t = kill(w, &j);
                assert_eq!(nodes(&w.store), before);
                j = Journal::begin(&mut w.store);
            }
        };
        step(&mut w, &mut t, 0, false);
        w.raw(t, Op::DomainImportData, 0, &[&b"5\x000\0"[..], &stream].concat()).unwrap();
        w.ok(t, Op::DomainImport, &["5", &stream.len().to_string(), "nobody"]);
        w.ok(t, Op::DomainSetWatch, &["5", "device", "set"]);
        step(&mut w, &mut t, 1, false);
        step(&mut w, &mut t, 2, true);
        if kills % 3 == 0 {
            w.ok(t, Op::DomainImportAbort, &["5"]);
            assert_eq!(w.read(t, "/local/domain/5/data/b"), Ok("of before".into()), "{kills:b}");
            assert!(w.read(t, "/local/domain/5/data/a").is_err());
            w.check();
            continue;
        }
        w.ok(t, Op::DomainAttach, &["5", "1"]);
        step(&mut w, &mut t, 3, false);
        let g = w.store.domain_connection(5).unwrap();
        assert_eq!(w.ok(t, Op::DomainListWatches, &["5", "0"]), "2\0data\0d\0\0device\0set\0\0", "{kills:b}");
        assert_eq!(w.events(g), [], "{kills:b}");
        assert_eq!(w.commit(g, 1), Ok("OK\0".into()), "{kills:b}");
        assert_eq!(w.read(g, "data/a"), Ok("in it".into()));
        w.check();
    }
}

/// An import whose nodes somebody removed before it was taken back: none of them comes again, and the journal can be read.
#[test]
fn an_import_whose_tree_was_removed_is_taken_back() {
    let stream = exported();
    for gone in [true, false] {
        let mut w = World::new(Options::default());
        w.host.domains.insert(5, DomainState::default());
        let t = w.tool();
        w.write(t, "/local/domain/5/data/a", "of before").unwrap();
        let usage = w.store.usage(0).map(|u| (u.0, u.3));
        let mut j = Journal::begin(&mut w.store);
        w.raw(t, Op::DomainImportData, 0, &[&b"5\x000\0"[..], &stream].concat()).unwrap();
        w.ok(t, Op::DomainImport, &["5", &stream.len().to_string(), "nobody"]);
        w.ok(t, Op::Rm, &["/local/domain/5"]);
        if gone {
            w.host.domains.remove(&5);
            w.store.check_domains(&mut w.host);
        } else {
            w.ok(t, Op::DomainImportAbort, &["5"]);
        }
        j.commit(&mut w.store);
        w.check();
        assert_eq!(w.read(t, "/local/domain/5"), Err(Errno::ENOENT), "{gone}");
        let before = nodes(&w.store);
        let t = kill(&mut w, &j);
        assert_eq!(nodes(&w.store), before, "{gone}");
        w.write(t, "/local/domain/5/data/a", "of before").unwrap();
        assert_eq!(w.store.usage(0).map(|u| (u.0, u.3)), usage, "{gone}");
    }
}

#[test]
fn what_an_import_puts_back_knows_of_deaths_also_after_a_kill() {
    let stream = exported();
    let mut w = World::new(Options::default());
    w.host.domains.insert(5, DomainState::default());
    let t = w.tool();
    w.guest(t, 7);
    for (p, perms) in [("data", ["n0", "r7"]), ("data/a", ["n0", "r7"]), ("device", ["n7", "n0"])] {
        let p = format!("/local/domain/5/{p}");
        w.write(t, &p, "of before").unwrap();
        w.ok(t, Op::SetPerms, &[&p, perms[0], perms[1]]);
    }
    let mut j = Journal::begin(&mut w.store);
    w.raw(t, Op::DomainImportData, 0, &[&b"5\x000\0"[..], &stream].concat()).unwrap();
    w.ok(t, Op::DomainImport, &["5", &stream.len().to_string(), "nobody"]);
    j.commit(&mut w.store);
    w.host.domains.remove(&7);
    w.store.check_domains(&mut w.host);
    j.commit(&mut w.store);
    let t = kill(&mut w, &j);
    let g = w.guest(t, 7);
    w.ok(t, Op::DomainImportAbort, &["5"]);
    assert_eq!(w.read(t, "/local/domain/5/data/a"), Ok("of before".into()));
    assert_eq!(w.read(g, "/local/domain/5/data/a"), Err(Errno::EACCES));
    assert_eq!(w.read(t, "/local/domain/5/device"), Err(Errno::ENOENT), "its own goes with it");
    w.check();
}

/// A journal of some traffic.
fn some() -> Journal {
    let mut w = World::new(Options::default());
    let t = w.tool();
    let mut j = Journal::begin(&mut w.store);
    let g = w.guest(t, 5);
    j.commit(&mut w.store);
    w.ok(g, Op::Watch, &["data", "d"]);
    w.write(g, "data/a", "1").unwrap();
    let tx = w.begin(g);
    w.req(g, Op::Write, tx, &["data/b", "in it"]).unwrap();
    j.commit(&mut w.store);
    w.write(t, "/local/domain/5/data/a", "2").unwrap();
    w.ok(t, Op::DomainFreeze, &["5"]);
    w.write(t, "/local/domain/5/data/a", "3").unwrap();
    w.ok(t, Op::SetQuota, &["5", "nodes", "20"]);
    j.commit(&mut w.store);
    let (_, first) = w.store.snapshot().unwrap();
    j.batches[0].extend(first);
    j
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(
        places in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<Option<prop::sample::Index>>(),
    ) {
        let mut j = some();
        for (batch, place, byte) in places {
            let b = batch.get(&j.batches).len();
            let i = batch.index(j.batches.len());
            j.batches[i][place.index(b)] = byte;
        }
        if let Some(c) = cut {
            let n = c.index(j.snapshot.len());
            j.snapshot.truncate(n);
        }
        if let Ok(r) = Store::recover(Options::default(), &j.snapshot, j.batches.iter().map(|b| &b[..]), 0) {
            r.store.check();
        }
    }
}

#[test]
fn a_read_costs_a_guest_its_indexes_and_a_tool_nothing() {
    let mut w = World::new(Options::default());
    let t = w.tool();
    let g = w.guest(t, 5);
    w.write(g, "a", "1").unwrap();
    let _ = Journal::begin(&mut w.store);
    let mut batch = Vec::new();
    w.read(t, "/local/domain/5/a").unwrap();
    assert!(!w.store.take_changes(None, &mut batch));
    w.read(g, "a").unwrap();
    let moved = |n| Moved { from: 0, to: n };
    let step = RingStep { domid: 5, requests: moved(18), replies: moved(17) };
    assert!(w.store.take_changes(Some(&step), &mut batch));
    // Kind, domain, four indexes.
    assert_eq!(batch.len(), 1 + 2 + 16);
    w.write(g, "a", "2").unwrap();
    assert!(w.store.take_changes(Some(&step), &mut batch));
    assert!(batch.len() < 100, "{} bytes for a write", batch.len());
}
