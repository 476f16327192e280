//! The store's behaviour, operation by operation.

mod common;
use common::World;
use xenstore_wire::stream::{Format, Record, read_all};
use xenstore_wire::{Errno, Op};
use xenstored::{DomainState, Options, Store};

fn world() -> (World, u32) {
    let mut w = World::new(Options::default());
    let t = w.tool();
    (w, t)
}

#[test]
fn nodes_are_made_with_their_parents_and_listed_in_the_order_of_making() {
    let (mut w, t) = world();
    w.write(t, "/a/b/c", "1").unwrap();
    w.write(t, "/a/z", "").unwrap();
    w.write(t, "/a/k", "x\0y").unwrap();
    assert_eq!(w.ok(t, Op::Directory, &["/a"]), "b\0z\0k\0");
    assert_eq!(w.read(t, "/a/b"), Ok(String::new()));
    assert_eq!(w.read(t, "/a/k"), Ok("x\0y".into()));
    assert_eq!(w.read(t, "/a/nothing"), Err(Errno::ENOENT));
    assert_eq!(w.read(t, "/a//b"), Err(Errno::EINVAL));
    w.ok(t, Op::Rm, &["/a/b"]);
    w.ok(t, Op::Rm, &["/a/b"]);
    assert_eq!(w.req(t, Op::Rm, 0, &["/x/y"]), Err(Errno::ENOENT));
    assert_eq!(w.req(t, Op::Rm, 0, &["/"]), Err(Errno::EINVAL));
    assert_eq!(w.ok(t, Op::Directory, &["/a"]), "z\0k\0");
    w.check();
}

#[test]
fn a_long_list_comes_in_parts() {
    let (mut w, t) = world();
    for i in 0..600 {
        w.write(t, &format!("/long/child-number-{i}"), "").unwrap();
    }
    assert_eq!(w.req(t, Op::Directory, 0, &["/long"]), Err(Errno::E2BIG));
    let mut all = Vec::new();
    let mut parts = 0;
    loop {
        let r = w.raw(t, Op::DirectoryPart, 0, format!("/long\0{}\0", all.len()).as_bytes()).unwrap();
        let at = r.iter().position(|&b| b == 0).unwrap() + 1;
        parts += 1;
        all.extend_from_slice(&r[at..]);
        if all.ends_with(b"\0\0") {
            break;
        }
    }
    let names: Vec<String> = (0..600).map(|i| format!("child-number-{i}")).collect();
    assert_eq!(String::from_utf8_lossy(&all).trim_end_matches('\0'), names.join("\0"));
    assert_eq!(parts, 3);
    // Behind the end there is an empty name.
    assert!(w.raw(t, Op::DirectoryPart, 0, b"/long\0999999\0").unwrap().ends_with(b"\0\0"));
}

#[test]
fn permissions_keep_guests_apart() {
    let (mut w, t) = world();
    let (a, b) = (w.guest(t, 1), w.guest(t, 2));
    w.write(a, "data", "secret").unwrap();
    assert_eq!(w.read(a, "/local/domain/1/data"), Ok("secret".into()));
    assert_eq!(w.read(b, "/local/domain/1/data"), Err(Errno::EACCES));
    assert_eq!(w.read(b, "/local/domain/1/nothing"), Err(Errno::EACCES), "what is not there is no news either");
    assert_eq!(w.write(a, "/evil", "1"), Err(Errno::EACCES));
    assert_eq!(w.ok(a, Op::GetPerms, &["data"]), "n1\0");
    w.ok(a, Op::SetPerms, &["data", "n1", "r2"]);
    assert_eq!(w.read(b, "/local/domain/1/data"), Ok("secret".into()));
    assert_eq!(w.write(b, "/local/domain/1/data", "x"), Err(Errno::EACCES));
    assert_eq!(w.req(a, Op::SetPerms, 0, &["data", "n2"]), Err(Errno::EPERM), "only dom0 gives nodes away");
    assert_eq!(w.req(b, Op::SetPerms, 0, &["/local/domain/1/data", "b2"]), Err(Errno::EACCES));
    assert_eq!(w.req(a, Op::SetPerms, 0, &["data", "n99"]), Err(Errno::ENOENT), "no such domain");
    assert_eq!(w.req(a, Op::Introduce, 0, &["2", "1", "3"]), Err(Errno::EACCES));
    w.ok(t, Op::SetTarget, &["2", "1"]);
    assert_eq!(w.write(b, "/local/domain/1/data", "x"), Ok("OK\0".into()));
    w.check();
}

#[test]
fn a_guest_may_not_use_the_operations_of_a_migration() {
    let (mut w, t) = world();
    let g = w.guest(t, 5);
    // Of itself and of another, in the form in which dom0 has them carried out or refused for another reason.
    w.guest(t, 6);
    w.host.domains.insert(7, DomainState::default());
    let ours: Vec<Op> = Op::ALL.iter().copied().filter(|o| o.to_wire() >> 16 == 0x4645).collect();
    assert_eq!(ours.len(), 10);
    for op in ours {
        for domid in ["5", "6", "7"] {
            let args: &[&str] = match op {
                Op::FerryFeatures => &[""],
                Op::DomainExport => &[domid, "0", "/local/domain/6"],
                Op::DomainImportData => &[domid, "0", "xenstore"],
                Op::DomainImport => &[domid, "9", "nobody"],
                Op::DomainAttach => &[domid, "1"],
                Op::DomainListWatches => &[domid, "0"],
                Op::DomainSetWatch => &[domid, "/local/domain/6", "token"],
                _ => &[domid],
            };
            assert_eq!(w.req(g, op, 0, args), Err(Errno::EACCES), "{} {args:?}", op.name());
            assert_ne!(w.req(t, op, 0, args), Err(Errno::EACCES), "{} {args:?} of dom0", op.name());
            // What dom0 was allowed is undone.
            let _ = w.req(t, Op::DomainThaw, 0, &[domid]);
            let _ = w.req(t, Op::DomainImportAbort, 0, &[domid]);
        }
    }
    w.check();
}

#[test]
fn a_new_domain_does_not_inherit_what_was_meant_for_a_dead_one() {
    let (mut w, t) = world();
    w.guest(t, 5);
    w.write(t, "/shared", "s").unwrap();
    w.ok(t, Op::SetPerms, &["/shared", "n0", "r5"]);
    let five = w.store.domain_connection(5).unwrap();
    assert_eq!(w.read(five, "/shared"), Ok("s".into()));
    w.host.domains.remove(&5);
    w.store.check_domains(&mut w.host);
    assert_eq!(w.read(t, "/local/domain/5"), Err(Errno::ENOENT), "its nodes went with it");
    let five = w.guest(t, 5);
    assert_eq!(w.read(five, "/shared"), Err(Errno::EACCES));
    assert_eq!(w.ok(t, Op::GetPerms, &["/shared"]), "n0\0r5\0");
    // A change of the node does not revive the entry.
    w.write(t, "/shared", "t").unwrap();
    assert_eq!(w.read(five, "/shared"), Err(Errno::EACCES));
    w.ok(t, Op::SetPerms, &["/shared", "n0", "r5"]);
    assert_eq!(w.read(five, "/shared"), Ok("t".into()));
    w.check();
}

#[test]
fn watches_fire_for_what_they_cover_and_what_may_be_read() {
    let (mut w, t) = world();
    let g = w.guest(t, 3);
    w.ok(t, Op::Watch, &["/local/domain/3", "t"]);
    w.ok(g, Op::Watch, &["x", "rel"]);
    w.ok(g, Op::Watch, &["/local/domain/0/hidden", "no"]);
    assert_eq!(w.events(t), [("/local/domain/3".into(), "t".into())]);
    assert_eq!(w.paths(g), ["x", "/local/domain/0/hidden"]);
    w.write(t, "/local/domain/3/x/y", "1").unwrap();
    w.write(t, "/local/domain/0/hidden", "1").unwrap();
    assert_eq!(w.paths(t), ["/local/domain/3/x/y"]);
    assert_eq!(
        w.paths(g),
        ["x/y"],
        "a relative watch is answered with relative paths, what may not be read not at all"
    );
    w.ok(t, Op::Rm, &["/local/domain/3/x"]);
    assert_eq!(w.paths(g), ["x"], "nothing for y: no watch is exactly there");
    assert_eq!(w.paths(t), ["/local/domain/3/x"]);
    assert_eq!(w.req(t, Op::Watch, 0, &["/local/domain/3", "t"]), Err(Errno::EEXIST));
    assert_eq!(w.req(t, Op::Unwatch, 0, &["/local/domain/3", "u"]), Err(Errno::ENOENT));
    w.ok(t, Op::Unwatch, &["/local/domain/3", "t"]);
    w.write(t, "/local/domain/3/x", "").unwrap();
    assert_eq!(w.paths(t), [""; 0]);
    w.ok(t, Op::Watch, &["/local/domain/3", "d", "1"]);
    w.write(t, "/local/domain/3/p/q", "").unwrap();
    w.write(t, "/local/domain/3/p", "").unwrap();
    assert_eq!(w.paths(t), ["/local/domain/3", "/local/domain/3/p"]);
    w.check();
}

#[test]
fn removing_a_parent_fires_at_watched_children() {
    let (mut w, t) = world();
    w.write(t, "/p/q/r", "").unwrap();
    w.ok(t, Op::Watch, &["/p/q/r", "r"]);
    w.ok(t, Op::Watch, &["/p/q", "q"]);
    w.events(t);
    w.ok(t, Op::Rm, &["/p"]);
    assert_eq!(w.events(t), [("/p/q/r".into(), "r".into()), ("/p/q".into(), "q".into())]);
}

#[test]
fn equal_events_that_wait_are_one() {
    let (mut w, t) = world();
    let u = w.tool();
    w.ok(u, Op::Watch, &["/x", "t"]);
    w.events(u);
    for _ in 0..10 {
        w.write(t, "/x", "1").unwrap();
    }
    assert_eq!(w.paths(u), ["/x"]);
    w.write(t, "/x", "1").unwrap();
    assert_eq!(w.paths(u), ["/x"]);
}

#[test]
fn special_watches() {
    let (mut w, t) = world();
    let g = w.guest(t, 4);
    for (p, tok) in [("@introduceDomain", "i"), ("@releaseDomain", "r"), ("@releaseDomain/6", "six")] {
        w.ok(t, Op::Watch, &[p, tok]);
    }
    w.ok(t, Op::Watch, &["@releaseDomain", "deep", "1"]);
    w.ok(g, Op::Watch, &["@introduceDomain", "g"]);
    w.events(t);
    w.events(g);
    w.guest(t, 6);
    assert_eq!(w.paths(t), ["@introduceDomain"]);
    assert_eq!(w.paths(g), [""; 0], "not for guests");
    w.ok(t, Op::SetPerms, &["@introduceDomain", "n0", "r4"]);
    w.host.domains.insert(6, DomainState { shutdown: true, dying: false });
    w.store.check_domains(&mut w.host);
    assert_eq!(w.events(t).len(), 3);
    w.store.check_domains(&mut w.host);
    assert_eq!(w.events(t).len(), 0, "told once");
    w.ok(t, Op::Resume, &["6"]);
    w.store.check_domains(&mut w.host);
    assert_eq!(w.events(t).len(), 3, "and after a resume again");
    w.ok(t, Op::Release, &["6"]);
    let mut e = w.events(t);
    e.sort();
    let want: Vec<(String, String)> =
        [("@releaseDomain", "r"), ("@releaseDomain/6", "deep"), ("@releaseDomain/6", "six")]
            .map(|(a, b)| (a.into(), b.into()))
            .into();
    assert_eq!(e, want);
    w.guest(t, 7);
    assert_eq!(w.paths(g), ["@introduceDomain"]);
    assert_eq!(w.ok(t, Op::IsDomainIntroduced, &["6"]), "F\0");
    assert_eq!(w.ok(t, Op::IsDomainIntroduced, &["7"]), "T\0");
    w.check();
}

#[test]
fn a_transaction_is_seen_as_a_whole_or_not_at_all() {
    let (mut w, t) = world();
    let u = w.tool();
    w.write(t, "/a", "1").unwrap();
    w.ok(u, Op::Watch, &["/", "w"]);
    w.events(u);
    let tx = w.begin(t);
    w.req(t, Op::Write, tx, &["/a", "2"]).unwrap();
    w.req(t, Op::Write, tx, &["/n/m", "3"]).unwrap();
    w.req(t, Op::Mkdir, tx, &["/gone"]).unwrap();
    w.req(t, Op::Rm, tx, &["/gone"]).unwrap();
    assert_eq!(w.req(t, Op::Read, tx, &["/a"]), Ok("2".into()));
    assert_eq!(w.req(t, Op::Directory, tx, &["/"]), Ok("tool\0a\0n\0".into()));
    assert_eq!(w.read(u, "/a"), Ok("1".into()));
    assert_eq!(w.read(u, "/n/m"), Err(Errno::ENOENT));
    assert_eq!(w.paths(u), [""; 0]);
    w.commit(t, tx).unwrap();
    assert_eq!(w.paths(u), ["/a", "/n/m"]);
    assert_eq!(w.read(u, "/n/m"), Ok("3".into()));
    assert_eq!(w.req(t, Op::Read, tx, &["/a"]), Err(Errno::ENOENT), "the transaction is over");
    assert_eq!(w.ok(t, Op::Directory, &["/"]), "tool\0a\0n\0");
    w.check();
}

#[test]
fn transactions_conflict_over_what_they_read_only() {
    let (mut w, t) = world();
    let u = w.tool();
    for p in ["/a", "/b", "/c/d"] {
        w.write(t, p, "0").unwrap();
    }
    // Read and changed by another: no.
    let tx = w.begin(t);
    w.req(t, Op::Read, tx, &["/a"]).unwrap();
    w.req(t, Op::Write, tx, &["/b", "1"]).unwrap();
    w.write(u, "/a", "9").unwrap();
    assert_eq!(w.commit(t, tx), Err(Errno::EAGAIN));
    assert_eq!(w.read(t, "/b"), Ok("0".into()));
    // Elsewhere: yes.
    let tx = w.begin(t);
    w.req(t, Op::Write, tx, &["/b", "1"]).unwrap();
    w.write(u, "/c/d", "9").unwrap();
    w.commit(t, tx).unwrap();
    assert_eq!(w.read(t, "/b"), Ok("1".into()));
    // A node that was not there and now is: no.
    let tx = w.begin(t);
    assert_eq!(w.req(t, Op::Read, tx, &["/c/new"]), Err(Errno::ENOENT));
    w.write(u, "/c/new", "").unwrap();
    assert_eq!(w.commit(t, tx), Err(Errno::EAGAIN));
    // Removed meanwhile: no.
    let tx = w.begin(t);
    w.req(t, Op::Read, tx, &["/c/d"]).unwrap();
    w.ok(u, Op::Rm, &["/c"]);
    assert_eq!(w.commit(t, tx), Err(Errno::EAGAIN));
    // Two that cross: the second to commit loses.
    let (x, y) = (w.begin(t), w.begin(u));
    w.req(t, Op::Read, x, &["/a"]).unwrap();
    w.req(u, Op::Read, y, &["/b"]).unwrap();
    w.req(t, Op::Write, x, &["/b", "x"]).unwrap();
    w.req(u, Op::Write, y, &["/a", "y"]).unwrap();
    w.commit(t, x).unwrap();
    assert_eq!(w.commit(u, y), Err(Errno::EAGAIN));
    assert_eq!(w.read(t, "/b"), Ok("x".into()));
    // Discarded ones leave nothing.
    let tx = w.begin(t);
    w.req(t, Op::Rm, tx, &["/a"]).unwrap();
    w.req(t, Op::TransactionEnd, tx, &["F"]).unwrap();
    assert_eq!(w.read(t, "/a"), Ok("9".into()));
    assert_eq!(w.req(t, Op::TransactionStart, 77, &[""]), Err(Errno::ENOENT));
    w.check();
}

#[test]
fn in_a_transaction_a_subtree_can_be_removed_and_made_again() {
    let (mut w, t) = world();
    w.write(t, "/s/a/b", "1").unwrap();
    w.write(t, "/s/c", "2").unwrap();
    let tx = w.begin(t);
    w.req(t, Op::Rm, tx, &["/s"]).unwrap();
    assert_eq!(w.req(t, Op::Read, tx, &["/s/a/b"]), Err(Errno::ENOENT));
    w.req(t, Op::Write, tx, &["/s/a/x", "3"]).unwrap();
    assert_eq!(w.req(t, Op::Directory, tx, &["/s"]), Ok("a\0".into()));
    w.commit(t, tx).unwrap();
    assert_eq!(w.ok(t, Op::Directory, &["/s"]), "a\0");
    assert_eq!(w.ok(t, Op::Directory, &["/s/a"]), "x\0");
    assert_eq!(w.read(t, "/s/a/b"), Err(Errno::ENOENT));
    w.check();
}

#[test]
fn quotas_stop_a_guest_and_not_the_others() {
    let (mut w, t) = world();
    let g = w.guest(t, 8);
    let other = w.guest(t, 9);
    // Nodes: its home counts.
    let mut made = 1;
    let e = loop {
        match w.write(g, &format!("n/{}/{}", made / 30, made % 30), "x") {
            Ok(_) => made += 1,
            Err(e) => break e,
        }
    };
    assert_eq!(e, Errno::ENOSPC);
    assert_eq!(w.store.usage(8).unwrap().0, 1000);
    w.check();
    w.write(other, "x", "").unwrap();
    // Size of a node.
    assert_eq!(w.write(other, "x", &"y".repeat(2100)), Err(Errno::ENOSPC));
    // Watches.
    let e = (0..).find_map(|i| w.req(other, Op::Watch, 0, &["x", &i.to_string()]).err().map(|e| (i, e))).unwrap();
    assert_eq!(e, (129, Errno::E2BIG), "as the stock daemon counts them");
    // Transactions.
    let e = (0..).find_map(|i| w.req(other, Op::TransactionStart, 0, &[""]).err().map(|e| (i, e))).unwrap();
    assert_eq!(e, (11, Errno::ENOSPC));
    // Permissions.
    assert_eq!(w.req(other, Op::SetPerms, 0, &["x", "n9", "r1", "r2", "r3", "r4", "r5"]), Err(Errno::ENOSPC));
    w.ok(other, Op::ResetWatches, &[""]);
    w.begin(other);
    assert_eq!(w.store.usage(9).unwrap().1, 0);
    w.ok(t, Op::SetQuota, &["9", "nodes", "3"]);
    assert_eq!(w.ok(t, Op::GetQuota, &["9", "nodes"]), "3\0");
    assert_eq!(w.ok(t, Op::GetQuota, &["nodes"]), "1000\0");
    w.write(other, "y", "").unwrap();
    assert_eq!(w.write(other, "z", ""), Err(Errno::ENOSPC));
    w.check();
}

#[test]
fn a_guest_that_does_not_read_is_not_heard_any_more_and_its_memory_stays_bounded() {
    let (mut w, t) = world();
    let g = w.guest(t, 8);
    w.write(g, "v", "x").unwrap();
    // Unread replies.
    let mut sent = 0;
    while w.store.wants(g, 0) > 0 {
        w.send(g, Op::Read.to_wire(), 0, b"v\0");
        sent += 1;
    }
    assert_eq!(sent, 20);
    w.receive(g);
    assert!(w.store.wants(g, 0) > 0, "it read them: on it goes");
    // A storm of events that it does not read.
    w.ok(t, Op::Mkdir, &["/storm"]);
    w.ok(t, Op::SetPerms, &["/storm", "n0", "r8"]);
    w.ok(g, Op::Watch, &["/storm", "t"]);
    w.events(g);
    let p = "p".repeat(1000);
    for i in 0..10_000 {
        w.write(t, &format!("/storm/{i}/{p}"), "").unwrap();
    }
    let memory = w.store.usage(8).unwrap().3;
    assert!(memory < 2_621_440, "{memory} bytes");
    // They time out.
    w.host.now += 20_001;
    w.store.timers(&mut w.host);
    assert_eq!(w.paths(g), [""; 0]);
    assert!(w.store.usage(8).unwrap().3 < 10_000);
    w.check();
}

#[test]
fn a_broken_guest_is_ignored_until_it_dies() {
    let (mut w, t) = world();
    let g = w.guest(t, 2);
    w.ok(g, Op::Watch, &["x", "t"]);
    let head = xenstore_wire::Header { op: 2, req_id: 0, tx_id: 0, len: 5000 }.to_bytes();
    assert!(w.store.input(g, &head, &mut w.host).is_err());
    assert_eq!(w.host.ring_errors[&2], xenstore_wire::ring::error::PROTOCOL);
    assert_eq!(w.store.wants(g, 0), 0);
    w.ok(t, Op::Watch, &["@releaseDomain", "r"]);
    w.events(t);
    w.host.domains.remove(&2);
    w.store.check_domains(&mut w.host);
    assert_eq!(w.paths(t), ["@releaseDomain"]);
    w.check();
}

#[test]
fn unknown_operations_and_odd_payloads_are_answered() {
    let (mut w, t) = world();
    for op in [20, 15, 16, 99, u32::MAX] {
        let id = w.send(t, op, 0, b"");
        w.receive(t);
        let m = w.replies.get_mut(&t).unwrap().pop().unwrap();
        assert_eq!((m.header.req_id, m.payload), (id, b"ENOSYS\0".to_vec()));
    }
    for op in Op::ALL.iter().filter(|o| !matches!(o, Op::WatchEvent | Op::Error)) {
        for body in [&b""[..], b"x", b"\0", b"\0\0\0\0", b"-1\0-1\0-1\0", b"99999999999\09\0x\0", &[255; 100]] {
            let _ = w.raw(t, *op, 0, body);
        }
    }
    w.check();
}

#[test]
fn quotas_that_were_set_outlive_a_live_update() {
    let (mut w, t) = world();
    w.guest(t, 5);
    w.host.domains.insert(6, DomainState::default());
    w.ok(t, Op::SetQuota, &["5", "nodes", "20"]);
    w.ok(t, Op::SetQuota, &["6", "nodes", "30"]);
    w.ok(t, Op::SetQuota, &["watches", "50"]);
    // The next one is started with other options: what nobody has set is for them to say.
    let mut options = Options::default();
    (options.quotas.transactions, options.quotas.watches) = (3, 4);
    for _ in 0..2 {
        let stream = w.store.dump(3, 4, &mut |_| (10, Vec::new())).unwrap();
        let host = std::mem::take(&mut w.host);
        let (store, r, host) = Store::restore(options.clone(), &stream, |_| Ok(host)).unwrap();
        (w.store, w.host) = (store, host);
        w.store.check_domains(&mut w.host);
        let t = r.sockets[0].0;
        let quota = |w: &mut World, args: &[&str]| w.ok(t, Op::GetQuota, args).trim_end_matches('\0').to_string();
        assert_eq!(quota(&mut w, &["5", "nodes"]), "20");
        assert_eq!(quota(&mut w, &["6", "nodes"]), "30");
        assert_eq!(quota(&mut w, &["nodes"]), "1000");
        assert_eq!(quota(&mut w, &["watches"]), "50");
        assert_eq!(quota(&mut w, &["transactions"]), "3");
    }
}

#[test]
fn a_watch_keeps_its_depth_over_a_live_update() {
    let (mut w, mut t) = world();
    let mut g = w.guest(t, 5);
    w.ok(t, Op::Watch, &["/a", "deep", "1"]);
    w.ok(t, Op::Watch, &["/a", "here", "0"]);
    w.ok(t, Op::Watch, &["/a", "all"]);
    w.ok(t, Op::Watch, &["@releaseDomain", "who", "1"]);
    w.ok(g, Op::Watch, &["data", "rel", "1"]);
    w.events(t);
    w.events(g);
    let event = |p: &str, token: &str| (p.to_string(), token.to_string());
    for round in 0..2 {
        let stream = w.store.dump(3, 4, &mut |_| (10, Vec::new())).unwrap();
        let (format, records) = read_all(&stream).unwrap();
        assert_eq!(format, Format::V1);
        let plain = records.iter().filter(|r| matches!(r, Record::Watch { depth: None, .. })).count();
        assert_eq!(plain, 5, "a stock daemon reads each as one that has no depth");
        let host = std::mem::take(&mut w.host);
        let (store, r, host) = Store::restore(Options::default(), &stream, |_| Ok(host)).unwrap();
        (w.store, w.host) = (store, host);
        (t, g) = (r.sockets[0].0, w.store.domain_connection(5).unwrap());
        for p in ["/a/b/c", "/a/b", "/a"] {
            w.write(t, p, "").unwrap();
        }
        let told = [
            event("/a/b/c", "all"),
            event("/a/b", "deep"),
            event("/a/b", "all"),
            event("/a", "deep"),
            event("/a", "here"),
            event("/a", "all"),
        ];
        assert_eq!(w.events(t), told, "after {} live updates", round + 1);
        w.write(g, "data/x/y", "").unwrap();
        w.write(g, "data/x", "").unwrap();
        assert_eq!(w.events(g), [event("data/x", "rel")], "after {} live updates", round + 1);
        w.check();
    }
    assert_eq!(w.ok(t, Op::DomainListWatches, &["5", "0"]), "1\0data\0rel\x001\0");
    w.host.domains.remove(&5);
    w.store.check_domains(&mut w.host);
    assert_eq!(w.events(t), [event("@releaseDomain/5", "who")]);
}

#[test]
fn shutdowns_noticed_together_are_told_to_whom_each_one_is() {
    let (mut w, t) = world();
    for d in [6, 7] {
        w.guest(t, d);
    }
    let g = w.guest(t, 8);
    w.ok(t, Op::Watch, &["@releaseDomain", "plain"]);
    w.ok(t, Op::Watch, &["@releaseDomain", "deep", "1"]);
    w.ok(t, Op::Watch, &["@releaseDomain/7", "seven"]);
    for p in ["@releaseDomain", "@releaseDomain/6", "@releaseDomain/7"] {
        w.ok(g, Op::Watch, &[p, "guest"]);
    }
    w.events(t);
    w.events(g);
    for d in [6, 7] {
        w.host.domains.insert(d, DomainState { shutdown: true, ..DomainState::default() });
    }
    w.store.check_domains(&mut w.host);
    assert_eq!(w.events(g), [], "it may not know of them");
    let event = |p: &str, token: &str| (p.to_string(), token.to_string());
    let told = [("", "plain"), ("/6", "deep"), ("/7", "deep"), ("/7", "seven")];
    assert_eq!(w.events(t), told.map(|(d, token)| event(&format!("@releaseDomain{d}"), token)));
}

#[test]
fn a_request_of_a_dead_domain_is_none_of_the_next_one_of_its_id() {
    let (mut w, t) = world();
    let g = w.guest(t, 5);
    let other = w.tool();
    w.ok(other, Op::Watch, &["/local/domain/5/a", "t"]);
    w.events(other);
    w.write(g, "a", "1").unwrap();
    // Its event waits on another connection.
    w.host.domains.remove(&5);
    w.store.check_domains(&mut w.host);
    w.guest(t, 5);
    assert!(!w.events(other).is_empty());
    assert_eq!(w.store.usage(5).unwrap().2, 0);
}

#[test]
fn a_child_that_others_made_below_a_node_of_a_transaction_can_be_removed_in_it() {
    let (mut w, t) = world();
    let u = w.tool();
    let tx = w.begin(t);
    w.req(t, Op::Write, tx, &["/a/b", "1"]).unwrap();
    w.ok(u, Op::Mkdir, &["/a/b/c"]);
    w.req(t, Op::Rm, tx, &["/a/b/c"]).unwrap();
    assert_eq!(w.commit(t, tx), Err(Errno::EAGAIN));
    assert_eq!(w.read(t, "/a/b/c"), Ok(String::new()));
    w.check();
}
