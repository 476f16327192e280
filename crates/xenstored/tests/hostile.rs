//! Guests that do whatever they like: nothing panics, accounting stays right, memory stays bounded, others are served.

mod common;
use common::World;
use proptest::prelude::*;
use xenstore_wire::{Errno, Header, Message, Op, payload};
use xenstored::{DomainState, Options, Store};

#[derive(Debug, Clone)]
enum Act {
    /// A message of client `who`, in its transaction `tx` (which need not be).
    Send { who: usize, op: u32, tx: u32, body: Vec<u8> },
    /// Bytes that are part of nothing.
    Raw { who: usize, bytes: Vec<u8> },
    /// It reads so much of what is there for it.
    Read { who: usize, bytes: usize },
    /// A guest dies and comes back.
    Die { guest: u16 },
    /// Time passes.
    Wait { ms: u64 },
    /// The whole state is written and read again.
    Restart,
}

fn body() -> impl Strategy<Value = Vec<u8>> {
    let path = prop::sample::select(vec![
        "/",
        "/a",
        "/a/b",
        "a",
        "a/b",
        "/local/domain/1",
        "/local/domain/2/x",
        "@releaseDomain",
        "",
        "/a//b",
    ]);
    let more =
        prop::sample::select(vec!["", "t", "n0", "b1", "r2", "n1", "1", "2", "5", "T", "F", "x", "others", "nobody"]);
    prop_oneof![
        4 => (path, prop::collection::vec(more.clone(), 0..4)).prop_map(|(p, m)| {
            let mut b = payload::join([p]);
            b.extend(payload::join(m));
            b
        }),
        2 => prop::collection::vec(more, 1..5).prop_map(payload::join),
        1 => prop::collection::vec(any::<u8>(), 0..60),
        1 => (0usize..4090).prop_map(|n| [&b"/a/big\0"[..], &vec![b'v'; n.min(4089)]].concat()),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    let ops: Vec<u32> =
        Op::ALL.iter().map(|o| o.to_wire()).filter(|&o| o != Op::Control.to_wire()).chain([20, 77]).collect();
    prop_oneof![
        40 => (0usize..4, prop::sample::select(ops), 0u32..4, body())
            .prop_map(|(who, op, tx, body)| Act::Send { who, op, tx, body }),
        1 => (2usize..4, prop::collection::vec(any::<u8>(), 1..40)).prop_map(|(who, bytes)| Act::Raw { who, bytes }),
        10 => (0usize..4, 1usize..3000).prop_map(|(who, bytes)| Act::Read { who, bytes }),
        1 => (1u16..3).prop_map(|guest| Act::Die { guest }),
        1 => (0u64..30_000).prop_map(|ms| Act::Wait { ms }),
        1 => Just(Act::Restart),
    ]
}

fn guests(w: &mut World, tool: u32) {
    for d in [1, 2] {
        w.host.domains.insert(d, DomainState::default());
        if w.store.domain_connection(d).is_none() {
            let body = payload::join([d.to_string(), "1".into(), "7".into()]);
            let m = Message::new(Op::Introduce.to_wire(), 0, 0, body).to_bytes();
            let _ = w.store.input(tool, &m[..16], &mut w.host);
            let _ = w.store.input(tool, &m[16..], &mut w.host);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn nothing_that_clients_do_breaks_the_store(acts in prop::collection::vec(act(), 1..150)) {
        let mut w = World::new(Options::default());
        // The last tool only brings guests up, so that its stream stays in order.
        let mut tools = [w.tool(), w.tool(), w.tool()];
        for d in [1u16, 2] {
            w.host.domains.insert(d, DomainState::default());
            let home = format!("/local/domain/{d}");
            w.ok(tools[2], Op::Mkdir, &[&home]);
            w.ok(tools[2], Op::SetPerms, &[&home, &format!("n{d}")]);
        }
        guests(&mut w, tools[2]);
        for a in acts {
            let conn = |w: &World, who: usize| match who {
                0 | 1 => Some(tools[who]),
                _ => w.store.domain_connection(who as u16 - 1),
            };
            match a {
                Act::Send { who, op, tx, body } => {
                    let Some(c) = conn(&w, who) else { continue };
                    let bytes = Message::new(op, 1, tx, body).to_bytes();
                    let mut at = 0;
                    while at < bytes.len() {
                        let n = w.store.wants(c, w.host.now).min(bytes.len() - at);
                        if n == 0 {
                            break;
                        }
                        match w.store.input(c, &bytes[at..at + n], &mut w.host) {
                            Ok(n) => at += n,
                            Err(_) => break,
                        }
                    }
                }
                Act::Raw { who, bytes } => {
                    let Some(c) = conn(&w, who) else { continue };
                    let n = w.store.wants(c, w.host.now).min(bytes.len());
                    if n > 0 {
                        let _ = w.store.input(c, &bytes[..n], &mut w.host);
                    }
                }
                Act::Read { who, bytes } => {
                    let Some(c) = conn(&w, who) else { continue };
                    let mut buf = Vec::new();
                    w.store.output(c, bytes, &mut buf);
                    w.store.wrote(c, buf.len());
                }
                Act::Die { guest } => {
                    w.host.domains.remove(&guest);
                    w.store.check_domains(&mut w.host);
                    prop_assert!(w.store.domain_connection(guest).is_none());
                    guests(&mut w, tools[2]);
                }
                Act::Wait { ms } => {
                    w.host.now += ms;
                    w.store.timers(&mut w.host);
                }
                Act::Restart => {
                    if w.store.connection(tools[2]).is_none() {
                        continue;
                    }
                    let Ok(stream) = w.store.dump(3, 4, &mut |c| (c as i32 + 100, Vec::new())) else { continue };
                    let host = std::mem::take(&mut w.host);
                    let (store, r, host) = Store::restore(Options::default(), &stream, |_| Ok(host)).unwrap();
                    let new = |old: u32| r.sockets.iter().find(|(_, fd)| *fd == old as i32 + 100).map_or(0, |s| s.0);
                    tools = tools.map(new);
                    (w.store, w.host) = (store, host);
                    w.store.check_domains(&mut w.host);
                    w.store.run_delayed(&mut w.host);
                    guests(&mut w, tools[2]);
                }
            }
            w.store.take_woken();
            prop_assert_eq!(w.store.check(), Vec::<String>::new());
            for d in [1, 2] {
                if let Some((nodes, watches, outstanding, memory)) = w.store.usage(d) {
                    prop_assert!(nodes <= 1000 && watches <= 129 && (0..=21).contains(&outstanding), "{} {} {}", nodes, watches, outstanding);
                    prop_assert!((0..2_700_000).contains(&memory), "{} bytes", memory);
                }
            }
        }
    }
}

#[test]
fn a_header_that_never_ends_and_an_open_transaction_cost_the_others_nothing() {
    let mut w = World::new(Options::default());
    let t = w.tool();
    let (a, b) = (w.guest(t, 1), w.guest(t, 2));
    let h = Header { op: Op::Read.to_wire(), req_id: 1, tx_id: 0, len: 4096 }.to_bytes();
    assert_eq!(w.store.input(a, &h[..15], &mut w.host), Ok(15));
    let tx = w.begin(b);
    w.req(b, Op::Write, tx, &["x", "1"]).unwrap();
    for i in 0..1000 {
        w.write(t, &format!("/elsewhere/{i}"), "").unwrap();
    }
    w.commit(b, tx).unwrap();
    assert_eq!(w.read(b, "x"), Ok("1".into()));
    assert_eq!(w.store.wants(a, 0), 1);
}

#[test]
fn a_guest_whose_memory_others_free_goes_on() {
    let mut w = World::new(Options::default());
    let t = w.tool();
    let g = w.guest(t, 1);
    for i in 0..20 {
        w.write(g, &format!("n{i}"), &"v".repeat(1000)).unwrap();
    }
    assert_eq!(w.store.wants(g, 0), 16);
    w.ok(t, Op::Control, &["quota", "set", "memory", "10000"]);
    assert_eq!(w.store.wants(g, 0), 0, "its requests wait");
    w.store.take_woken();
    for i in 0..20 {
        assert!(!w.store.take_woken().contains(&g), "too early, at {i}");
        w.ok(t, Op::Rm, &[&format!("/local/domain/1/n{i}")]);
        if w.store.wants(g, 0) > 0 {
            assert!(w.store.take_woken().contains(&g), "nobody looks at its ring");
            return;
        }
    }
    panic!("its requests wait for ever");
}

#[test]
fn the_root_outlives_the_domain_that_it_was_given_to() {
    let mut w = World::new(Options::default());
    let t = w.tool();
    w.guest(t, 1);
    w.write(t, "/elsewhere", "kept").unwrap();
    w.req(t, Op::SetPerms, 0, &["/", "b1"]).unwrap();
    w.host.domains.remove(&1);
    w.store.check_domains(&mut w.host);
    assert_eq!(w.store.check(), Vec::<String>::new());
    assert_eq!(w.read(t, "/elsewhere"), Ok("kept".into()));
}

#[test]
fn what_a_transaction_looked_for_in_vain_counts_against_memory() {
    let mut w = World::new(Options::default());
    let t = w.tool();
    let g = w.guest(t, 5);
    let memory = |w: &World| w.store.usage(5).unwrap().3;
    let before = memory(&w);
    let mut held = 0;
    let txs = [(); 11].map(|()| w.begin(g));
    let mut refused = 0;
    for tx in txs {
        for i in 0..1000 {
            let p = format!("/local/domain/5/{}{i}", "x".repeat(1900));
            match w.req(g, Op::Read, tx, &[&p]) {
                Err(Errno::ENOENT) => held += p.len() as i64,
                Err(Errno::ENOMEM) => {
                    refused += 1;
                    break;
                }
                r => panic!("{r:?}"),
            }
        }
        assert!(memory(&w) - before >= held, "{held} bytes of paths, {} are accounted", memory(&w) - before);
    }
    assert!(refused >= 9 && held < 2_700_000, "{refused} refused, {held} bytes held");
    assert_eq!(w.store.wants(g, 0), 16, "it can still end them");
    assert_eq!(w.commit(g, txs[10]), Err(Errno::ENOMEM), "what it did not see may have changed");
    for tx in &txs[..10] {
        w.req(g, Op::TransactionEnd, *tx, &["F"]).unwrap();
    }
    assert_eq!(memory(&w), before);
}
