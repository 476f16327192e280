//! One domain moves from one daemon to another, and does not notice: docs/xenstore-migration-ops.md.

mod common;
use common::World;
use proptest::prelude::*;
use xenstore_wire::stream::{Record, read_all, write_all};
use xenstore_wire::{Errno, HEADER_LEN, Message, Op, payload};
use xenstored::{ConnId, DomainState, Options};

const PREFIXES: [&str; 3] = ["/local/domain/5", "/vm/uuid", "/local/domain/0/backend/vbd/5"];

fn source() -> (World, ConnId, ConnId) {
    let mut w = World::new(Options::default());
    let t = w.tool();
    // Other domains first, so that generations and ids differ from the destination's.
    w.guest(t, 2);
    w.guest(t, 3);
    let g = w.guest(t, 5);
    w.write(t, "/vm/uuid/name", "five").unwrap();
    w.write(t, "/local/domain/0/backend/vbd/5/51712/state", "4").unwrap();
    w.ok(t, Op::SetPerms, &["/local/domain/0/backend/vbd/5/51712", "n0", "r5"]);
    w.ok(t, Op::SetPerms, &["/local/domain/0/backend/vbd/5/51712/state", "n0", "r5"]);
    for (p, v) in [("device/vbd/51712/state", "4"), ("data/a", "1"), ("data/b", "\u{1}bin"), ("zz", "")] {
        w.write(g, p, v).unwrap();
    }
    w.write(t, "/local/domain/5/vm", "/vm/uuid").unwrap();
    w.ok(g, Op::Watch, &["device", "dev"]);
    w.ok(g, Op::Watch, &["/local/domain/0/backend/vbd/5/51712/state", "be"]);
    w.ok(g, Op::Watch, &["data", "d1", "1"]);
    w.events(g);
    (w, t, g)
}

fn destination() -> (World, ConnId) {
    let mut w = World::new(Options::default());
    let t = w.tool();
    w.host.domains.insert(5, DomainState::default());
    (w, t)
}

fn export(w: &mut World, t: ConnId, domid: u16, prefixes: &[&str]) -> Result<Vec<u8>, Errno> {
    let mut stream = Vec::new();
    loop {
        let mut b = payload::join([domid.to_string(), stream.len().to_string()]);
        b.extend(payload::join(prefixes));
        let r = w.raw(t, Op::DomainExport, 0, &b)?;
        let (total, bytes) = payload::split_first(&r).unwrap();
        stream.extend_from_slice(bytes);
        if stream.len() >= payload::decimal::<usize>(total).unwrap() {
            return Ok(stream);
        }
    }
}

fn import(w: &mut World, t: ConnId, domid: u16, stream: &[u8], notify: &str) -> Result<(), Errno> {
    let mut at = 0;
    for chunk in stream.chunks(4000) {
        let mut b = payload::join([domid.to_string(), at.to_string()]);
        b.extend_from_slice(chunk);
        w.raw(t, Op::DomainImportData, 0, &b)?;
        at += chunk.len();
    }
    w.req(t, Op::DomainImport, 0, &[&domid.to_string(), &at.to_string(), notify]).map(drop)
}

/// All nodes: path, value, permissions, in the order in which a client would list them.
fn nodes(w: &World, prefixes: &[&str]) -> Vec<String> {
    let mut v = Vec::new();
    for p in prefixes {
        w.store.tree().walk(p.as_bytes(), &mut |p, n| {
            let perms: Vec<String> = n.perms.iter().map(|p| p.to_string()).collect();
            let text = String::from_utf8_lossy;
            v.push(format!("{} = {:?} {}", text(p), text(&n.value), perms.join(",")));
        });
    }
    v
}

/// Moves domain 5 as the engine does.
fn migrate(src: &mut World, s: ConnId, dst: &mut World, d: ConnId) -> ConnId {
    src.ok(s, Op::DomainFreeze, &["5"]);
    let stream = export(src, s, 5, &PREFIXES).unwrap();
    import(dst, d, 5, &stream, "nobody").unwrap();
    dst.ok(d, Op::DomainAttach, &["5", "1"]);
    dst.store.domain_connection(5).unwrap()
}

#[test]
fn nodes_permissions_and_watches_arrive_and_nothing_is_sent() {
    let (mut src, s, g) = source();
    let (mut dst, d) = destination();
    dst.ok(d, Op::Watch, &["@introduceDomain", "i"]);
    dst.events(d);
    let before = nodes(&src, &PREFIXES);
    let generation = src.ok(s, Op::DirectoryPart, &["/local/domain/5/data", "0"]);
    let n = migrate(&mut src, s, &mut dst, d);
    assert_eq!(nodes(&dst, &PREFIXES), before);
    assert_eq!(dst.ok(d, Op::DirectoryPart, &["/local/domain/5/data", "0"]), generation);
    assert_eq!(dst.events(n), [], "no event for what it knows");
    assert_eq!(dst.host.resets, [0u16; 0], "the ring's indexes are the guest's");
    assert_eq!(dst.paths(d), ["@introduceDomain"]);
    assert_eq!(dst.ok(d, Op::DomainListWatches, &["5", "0"]), src.ok(s, Op::DomainListWatches, &["5", "0"]));
    // Its rights hold although the nodes' generations are from elsewhere.
    assert_eq!(dst.read(n, "/local/domain/0/backend/vbd/5/51712/state"), Ok("4".into()));
    dst.write(n, "data/a", "2").unwrap();
    // Its watches work, the relative ones too.
    dst.write(d, "/local/domain/0/backend/vbd/5/51712/state", "5").unwrap();
    dst.write(d, "/local/domain/5/device/x", "").unwrap();
    dst.write(n, "data/c/deeper", "").unwrap();
    let be = ("/local/domain/0/backend/vbd/5/51712/state".to_string(), "be".to_string());
    assert_eq!(dst.events(n), [("data/a".into(), "d1".into()), be, ("device/x".into(), "dev".into())]);
    dst.check();
    // The source's copy takes and gives nothing any more, and goes with the domain.
    assert_eq!(src.store.wants(g, 0), 0);
    src.host.domains.remove(&5);
    src.store.check_domains(&mut src.host);
    src.check();
}

#[test]
fn half_requests_and_unread_replies_go_on() {
    let (mut src, s, g) = source();
    let (mut dst, d) = destination();
    // Two replies unread, one of them half; then half a request.
    let first = src.send(g, Op::Read.to_wire(), 0, b"data/a\0");
    let second = src.send(g, Op::Directory.to_wire(), 0, b"data\0");
    src.write(s, "/local/domain/5/device/new", "").unwrap();
    let mut out = Vec::new();
    src.store.output(g, 10, &mut out);
    let mut received = out.clone();
    src.store.wrote(g, out.len());
    let request = Message::new(Op::Write.to_wire(), 99, 0, b"data/late\0value".to_vec()).to_bytes();
    assert_eq!(src.store.input(g, &request[..HEADER_LEN], &mut src.host), Ok(HEADER_LEN));
    assert_eq!(src.store.input(g, &request[16..22], &mut src.host), Ok(6));
    let n = migrate(&mut src, s, &mut dst, d);
    dst.store.output(n, usize::MAX, &mut out);
    dst.store.wrote(n, out.len());
    received.extend(&out);
    let mut expected = Message::new(Op::Read.to_wire(), first, 0, b"1".to_vec()).to_bytes();
    expected.extend(Message::new(Op::Directory.to_wire(), second, 0, b"a\0b\0".to_vec()).to_bytes());
    expected.extend(Message::new(Op::WatchEvent.to_wire(), 0, 0, b"device/new\0dev\0".to_vec()).to_bytes());
    assert_eq!(received, expected);
    assert_eq!(dst.store.wants(n, 0), request.len() - 22);
    assert_eq!(dst.store.input(n, &request[22..], &mut dst.host), Ok(request.len() - 22));
    assert_eq!(dst.read(n, "data/late"), Ok("value".into()));
    dst.check();
}

#[test]
fn open_transactions_go_on() {
    let (mut src, s, g) = source();
    let (mut dst, d) = destination();
    let tx = src.begin(g);
    assert_eq!(src.req(g, Op::Read, tx, &["data/a"]), Ok("1".into()));
    src.req(g, Op::Write, tx, &["data/a", "tx"]).unwrap();
    src.req(g, Op::Write, tx, &["made/in/tx", "m"]).unwrap();
    src.req(g, Op::Rm, tx, &["zz"]).unwrap();
    assert_eq!(src.req(g, Op::Read, tx, &["not-there"]), Err(Errno::ENOENT));
    let lost = src.begin(g);
    src.req(g, Op::Read, lost, &["data/b"]).unwrap();
    src.write(s, "/local/domain/5/data/b", "other").unwrap();
    let n = migrate(&mut src, s, &mut dst, d);
    dst.ok(d, Op::Watch, &["/local/domain/5", "t"]);
    dst.events(d);
    assert_eq!(dst.req(n, Op::Read, tx, &["made/in/tx"]), Ok("m".into()));
    assert_eq!(dst.req(n, Op::Directory, tx, &["data"]), Ok("a\0b\0".into()));
    let home = dst.req(n, Op::Directory, tx, &["/local/domain/5"]).unwrap();
    assert!(home.contains("made") && !home.contains("zz"), "{home}");
    assert_eq!(dst.read(n, "data/a"), Ok("1".into()), "not yet");
    assert_eq!(dst.commit(n, lost), Err(Errno::EAGAIN), "a conflict of before is one");
    dst.commit(n, tx).unwrap();
    assert_eq!(dst.read(n, "data/a"), Ok("tx".into()));
    assert_eq!(dst.read(n, "made/in/tx"), Ok("m".into()));
    assert_eq!(dst.read(n, "zz"), Err(Errno::ENOENT));
    let mut paths = dst.paths(d);
    paths.sort();
    let home = "/local/domain/5";
    assert_eq!(paths, [format!("{home}/data/a"), format!("{home}/made/in/tx"), format!("{home}/zz")]);
    assert_ne!(dst.begin(n), tx);
    dst.check();
}

#[test]
fn a_conflict_after_the_move_is_one_too() {
    let (mut src, s, g) = source();
    let (mut dst, d) = destination();
    let tx = src.begin(g);
    src.req(g, Op::Read, tx, &["data/a"]).unwrap();
    src.req(g, Op::Write, tx, &["data/sum", "1"]).unwrap();
    let n = migrate(&mut src, s, &mut dst, d);
    dst.write(d, "/local/domain/5/data/a", "7").unwrap();
    assert_eq!(dst.commit(n, tx), Err(Errno::EAGAIN));
    assert_eq!(dst.read(n, "data/sum"), Err(Errno::ENOENT));
    dst.check();
}

#[test]
fn thaw_takes_the_domain_back_without_the_events_of_the_attempt() {
    let (mut src, s, g) = source();
    src.ok(g, Op::Watch, &["control", "c"]);
    src.events(g);
    src.ok(s, Op::DomainFreeze, &["5"]);
    assert_eq!(src.req(s, Op::DomainFreeze, 0, &["5"]), Err(Errno::EBUSY));
    assert_eq!(src.store.wants(g, 0), 0);
    // The backend is unbound and bound again, its keys are put back; somebody else writes, too.
    for v in ["5", "6", "2", "4"] {
        src.write(s, "/local/domain/0/backend/vbd/5/51712/state", v).unwrap();
    }
    src.write(s, "/local/domain/5/control/shutdown", "poweroff").unwrap();
    assert_eq!(src.events(g), []);
    // The export is of the freeze, not of now.
    let stream = export(&mut src, s, 5, &PREFIXES).unwrap();
    let (_, records) = read_all(&stream).unwrap();
    assert!(!records.iter().any(|r| matches!(r, Record::Node { path, .. } if path.ends_with(b"shutdown"))));
    src.ok(s, Op::DomainThaw, &["5", "/local/domain/0/backend/vbd/5"]);
    assert_eq!(src.events(g), [("control/shutdown".into(), "c".into())]);
    assert_eq!(src.read(g, "data/a"), Ok("1".into()));
    assert_eq!(src.req(s, Op::DomainThaw, 0, &["5"]), Err(Errno::EINVAL));
    assert_eq!(export(&mut src, s, 5, &PREFIXES), Err(Errno::EINVAL), "only of a frozen domain");
    src.check();
}

#[test]
fn events_for_a_frozen_domain_count_against_its_memory() {
    let (mut w, t, g) = source();
    let other = w.guest(t, 6);
    w.ok(t, Op::SetPerms, &["/local/domain/6", "b6"]);
    w.ok(g, Op::Watch, &["/local/domain/6", "far"]);
    w.events(g);
    let before = w.store.usage(5).unwrap().3;
    w.ok(t, Op::DomainFreeze, &["5"]);
    let mut last = before;
    for i in 0..50_000 {
        let p = format!("/local/domain/6/{i}-{}", "x".repeat(200));
        w.write(other, &p, "").unwrap();
        w.ok(other, Op::Rm, &[&p]);
        let now = w.store.usage(5).unwrap().3;
        assert!(now < 2_621_440, "event {i}: {now} bytes");
        if i > 0 && now == last {
            break;
        }
        last = now;
    }
    let held = last - before;
    assert!(held > 2_000_000, "{held} bytes are accounted");
    w.ok(t, Op::DomainThaw, &["5"]);
    let sent = w.events(g).len() as i64;
    assert!((200..=300).contains(&(held / sent)), "{sent} events for {held} bytes");
    assert_eq!(w.store.usage(5).unwrap().3, before, "all is given back");
    w.check();
}

#[test]
fn an_import_can_be_taken_back() {
    let (mut src, s, _) = source();
    let (mut dst, d) = destination();
    dst.write(d, "/vm/uuid/name", "shell").unwrap();
    dst.write(d, "/vm/uuid/extra", "stays").unwrap();
    dst.ok(d, Op::Mkdir, &["/local/domain/5"]);
    let before = nodes(&dst, &["/"]);
    let memory = dst.store.usage(0);
    src.ok(s, Op::DomainFreeze, &["5"]);
    let stream = export(&mut src, s, 5, &PREFIXES).unwrap();
    import(&mut dst, d, 5, &stream, "others").unwrap();
    assert_eq!(dst.read(d, "/vm/uuid/name"), Ok("five".into()));
    assert_eq!(dst.read(d, "/vm/uuid/extra"), Ok("stays".into()));
    assert_eq!(dst.req(d, Op::Introduce, 0, &["5", "1", "1"]), Err(Errno::EBUSY), "that would lose its watches");
    assert_eq!(import(&mut dst, d, 5, &stream, "others"), Err(Errno::EBUSY));
    dst.check();
    dst.ok(d, Op::DomainImportAbort, &["5"]);
    let sorted = |mut v: Vec<String>| {
        v.sort();
        v
    };
    assert_eq!(sorted(nodes(&dst, &["/"])), sorted(before));
    assert_eq!(dst.store.usage(0).map(|u| (u.0, u.3)), memory.map(|u| (u.0, u.3)));
    assert_eq!(dst.req(d, Op::DomainImportAbort, 0, &["5"]), Err(Errno::ENOENT));
    assert_eq!(dst.req(d, Op::DomainAttach, 0, &["5", "1"]), Err(Errno::ENOENT));
    dst.check();
    // The source goes on, or tries again.
    src.ok(s, Op::DomainThaw, &["5"]);
    migrate(&mut src, s, &mut dst, d);
    dst.check();
}

#[test]
fn a_domain_that_dies_after_its_import_leaves_nothing() {
    let (mut src, s, _) = source();
    let (mut dst, d) = destination();
    let before = nodes(&dst, &["/"]);
    src.ok(s, Op::DomainFreeze, &["5"]);
    let stream = export(&mut src, s, 5, &PREFIXES).unwrap();
    import(&mut dst, d, 5, &stream, "others").unwrap();
    dst.host.domains.remove(&5);
    dst.store.check_domains(&mut dst.host);
    assert_eq!(nodes(&dst, &["/"]), before);
    dst.check();
}

#[test]
fn an_undone_import_gives_a_dead_domain_no_rights_again() {
    let (mut src, s, _) = source();
    src.ok(s, Op::DomainFreeze, &["5"]);
    let stream = export(&mut src, s, 5, &PREFIXES).unwrap();
    // Domain 7 dies before the import, or between it and its undoing.
    for before in [true, false] {
        let (mut dst, d) = destination();
        dst.guest(d, 7);
        dst.write(d, "/vm/uuid/name", "secret").unwrap();
        dst.ok(d, Op::SetPerms, &["/vm/uuid/name", "n0", "r7"]);
        dst.write(d, "/local/domain/5/data/a", "its own").unwrap();
        dst.ok(d, Op::SetPerms, &["/local/domain/5/data/a", "n7"]);
        let again = |dst: &mut World| {
            dst.host.domains.remove(&7);
            dst.store.check_domains(&mut dst.host);
            dst.guest(d, 7)
        };
        if before {
            again(&mut dst);
        }
        import(&mut dst, d, 5, &stream, "nobody").unwrap();
        if !before {
            again(&mut dst);
        }
        let g = dst.store.domain_connection(7).unwrap();
        dst.ok(d, Op::DomainImportAbort, &["5"]);
        assert_eq!(dst.read(d, "/vm/uuid/name"), Ok("secret".into()));
        assert_eq!(dst.read(g, "/vm/uuid/name"), Err(Errno::EACCES), "before: {before}");
        assert_eq!(dst.read(d, "/local/domain/5/data/a"), Err(Errno::ENOENT), "it would have gone with its owner");
        dst.check();
    }
}

#[test]
fn who_may_watch_the_import_sees_it() {
    let (mut src, s, _) = source();
    src.ok(s, Op::DomainFreeze, &["5"]);
    let stream = export(&mut src, s, 5, &PREFIXES).unwrap();
    for (notify, count) in [("others", 12), ("nobody", 0)] {
        let (mut dst, d) = destination();
        let u = dst.tool();
        dst.ok(u, Op::Watch, &["/local/domain/5", "u"]);
        dst.events(u);
        import(&mut dst, d, 5, &stream, notify).unwrap();
        let n = dst.events(u).len();
        assert!(if count == 0 { n == 0 } else { n >= 6 }, "{notify}: {n} events");
    }
}

#[test]
fn there_and_back_and_the_store_is_as_it_was() {
    let (mut a, ta, _) = source();
    let (mut b, tb) = destination();
    let before = nodes(&a, &PREFIXES);
    let watches = a.ok(ta, Op::DomainListWatches, &["5", "0"]);
    migrate(&mut a, ta, &mut b, tb);
    for p in PREFIXES {
        a.ok(ta, Op::Rm, &[p]);
    }
    a.host.domains.remove(&5);
    a.store.check_domains(&mut a.host);
    a.check();
    a.host.domains.insert(5, DomainState::default());
    let n = migrate(&mut b, tb, &mut a, ta);
    assert_eq!(nodes(&a, &PREFIXES), before);
    assert_eq!(a.ok(ta, Op::DomainListWatches, &["5", "0"]), watches);
    assert_eq!(a.events(n), []);
    a.check();
}

#[test]
fn watches_are_set_and_listed_for_others() {
    let (mut w, t, g) = source();
    w.ok(t, Op::DomainSetWatch, &["5", "data/a", "by-dom0"]);
    w.ok(t, Op::DomainSetWatch, &["5", "/vm", "v", "2"]);
    assert_eq!(w.req(t, Op::DomainSetWatch, 0, &["5", "data/a", "by-dom0"]), Err(Errno::EEXIST));
    assert_eq!(w.req(t, Op::DomainSetWatch, 0, &["77", "data", "x"]), Err(Errno::ENOENT));
    assert_eq!(w.events(g), [], "no first event");
    w.write(g, "data/a", "9").unwrap();
    assert_eq!(w.events(g), [("data/a".into(), "d1".into()), ("data/a".into(), "by-dom0".into())]);
    let list = w.ok(t, Op::DomainListWatches, &["5", "0"]);
    assert!(list.starts_with("5\0device\0dev\0\0"), "{list:?}");
    assert!(list.ends_with("data/a\0by-dom0\0\0/vm\0v\x002\0"), "{list:?}");
    let rest = w.ok(t, Op::DomainListWatches, &["5", "4"]);
    assert_eq!(rest, "5\0/vm\0v\x002\0");
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_touched() {
    let (mut src, s, _) = source();
    src.ok(s, Op::DomainFreeze, &["5"]);
    let good = export(&mut src, s, 5, &PREFIXES).unwrap();
    let (format, records) = read_all(&good).unwrap();
    let (mut dst, d) = destination();
    dst.host.domains.insert(6, DomainState::default());
    let before = nodes(&dst, &["/"]);
    assert_eq!(import(&mut dst, d, 6, &good, "nobody"), Err(Errno::EINVAL), "another domain's stream");
    assert_eq!(import(&mut dst, d, 9, &good, "nobody"), Err(Errno::ENOENT), "no such domain");
    assert_eq!(import(&mut dst, d, 0, &good, "nobody"), Err(Errno::EINVAL));
    assert_eq!(import(&mut dst, d, 5, &good[..good.len() - 9], "nobody"), Err(Errno::EINVAL), "cut off");
    let mut bad = records.clone();
    bad.push(Record::Global { socket_fd: 3, evtchn_fd: 4 });
    assert_eq!(import(&mut dst, d, 5, &write_all(format, &bad).unwrap(), "nobody"), Err(Errno::EINVAL));
    let mut bad = records.clone();
    for r in &mut bad {
        if let Record::Node { path, .. } = r {
            *path = b"/".to_vec();
        }
    }
    assert_eq!(import(&mut dst, d, 5, &write_all(format, &bad).unwrap(), "nobody"), Err(Errno::EINVAL));
    assert_eq!(nodes(&dst, &["/"]), before);
    dst.check();
    assert_eq!(src.req(s, Op::DomainFreeze, 0, &["0"]), Err(Errno::EINVAL), "dom0 does not move");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is damaged in a stream: it is refused, or imported; never a panic, and an abort takes it back.
    #[test]
    fn a_damaged_stream_does_no_harm(damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let (mut src, s, g) = source();
        let tx = src.begin(g);
        src.req(g, Op::Write, tx, &["data/new", "1"]).unwrap();
        src.ok(s, Op::DomainFreeze, &["5"]);
        let mut stream = export(&mut src, s, 5, &PREFIXES).unwrap();
        for (at, v) in damage {
            let i = at.index(stream.len());
            stream[i] = v;
        }
        let (mut dst, d) = destination();
        let before = nodes(&dst, &["/"]);
        if import(&mut dst, d, 5, &stream, "nobody").is_ok() {
            dst.check();
            dst.ok(d, Op::DomainImportAbort, &["5"]);
            prop_assert_eq!(&nodes(&dst, &["/"]), &before);
            import(&mut dst, d, 5, &stream, "nobody").unwrap();
            dst.ok(d, Op::DomainAttach, &["5", "1"]);
            let n = dst.store.domain_connection(5).unwrap();
            let _ = dst.store.wants(n, 0);
        }
        dst.check();
    }
}
