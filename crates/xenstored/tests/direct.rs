//! Requests of tools that are answered without a queue: nothing but the time that they take differs from those that go by one.

mod common;
use common::{World, nodes};
use proptest::prelude::*;
use xenstore_wire::{Message, Op, payload};
use xenstored::{ConnId, Options, Store};

/// What tools ask for: which tool, operation, transaction, payload.
type Ask = (usize, Op, u32, Vec<u8>);

fn ask() -> impl Strategy<Value = Ask> {
    let path =
        prop::sample::select(vec!["/", "/a", "/a/b", "/a/c", "/b", "a", "@x", "/bad//x", "/a/", "/local/domain/1/own"]);
    let more =
        prop::sample::select(vec!["", "v", "longer than what a node keeps in itself", "n0", "n1", "r2", "T", "F", "t"]);
    let ops = vec![
        Op::Read,
        Op::Read,
        Op::Write,
        Op::Write,
        Op::Write,
        Op::Directory,
        Op::DirectoryPart,
        Op::Mkdir,
        Op::Rm,
        Op::SetPerms,
        Op::GetPerms,
        Op::Watch,
        Op::Unwatch,
        Op::TransactionStart,
        Op::TransactionEnd,
    ];
    (0usize..2, prop::sample::select(ops), 0u32..3, path, prop::collection::vec(more, 0..3), any::<bool>()).prop_map(
        |(tool, op, tx, path, more, end)| {
            let mut body = match op {
                Op::TransactionStart => vec![0],
                Op::TransactionEnd => payload::join([if end { "T" } else { "F" }]),
                _ => payload::join([path]),
            };
            body.extend(payload::join(&more));
            let whole = matches!(
                op,
                Op::Read
                    | Op::Directory
                    | Op::Mkdir
                    | Op::Rm
                    | Op::GetPerms
                    | Op::TransactionStart
                    | Op::TransactionEnd
            );
            if whole && end {
                body.truncate(payload::split_first(&body).map_or(0, |(first, _)| first.len() + 1));
            } else if op == Op::Write {
                body.pop();
            }
            (tool, op, tx, body)
        },
    )
}

/// A store after all that, what each tool received of it, and how many requests went the short way.
fn run(asks: &[Ask], directly: bool) -> (Vec<String>, [Vec<u8>; 2], usize) {
    let mut w = World::new(Options::default());
    let tools = [w.tool(), w.tool()];
    let guest = w.guest(tools[0], 1);
    w.write(guest, "own", "1").unwrap();
    w.receive(guest);
    for t in tools {
        w.receive(t);
    }
    let (snapshot, first) = w.store.snapshot().unwrap();
    let (mut batches, mut short) = (vec![first], 0);
    let mut got = [Vec::new(), Vec::new()];
    let receive = |s: &mut Store, c: ConnId, got: &mut Vec<u8>| {
        let mut bytes = Vec::new();
        s.output(c, usize::MAX, &mut bytes);
        s.wrote(c, bytes.len());
        got.extend(bytes);
    };
    for (i, (tool, op, tx, body)) in asks.iter().enumerate() {
        let m = Message::new(op.to_wire(), i as u32, *tx, body.clone()).to_bytes();
        let c = tools[*tool];
        let taken = if directly { w.store.input_directly(c, &m, &mut w.host) } else { None };
        match taken {
            Some(n) => {
                short += 1;
                assert_eq!(n, m.len());
                let mut bytes = Vec::new();
                w.store.take_direct(&mut bytes);
                got[*tool].extend(bytes);
            }
            None => assert_eq!(w.store.input(c, &m, &mut w.host), Ok(m.len())),
        }
        for (c, got) in tools.into_iter().zip(&mut got) {
            receive(&mut w.store, c, got);
        }
        let mut b = Vec::new();
        if w.store.take_changes(None, &mut b) {
            batches.push(b);
        }
    }
    assert_eq!(w.store.check(), Vec::<String>::new());
    let mut state = nodes(&w.store);
    let back = Store::recover(Options::default(), &snapshot, batches.iter().map(|b| &b[..]), 0).unwrap().store;
    assert_eq!(nodes(&back), state, "what comes back after a kill");
    // Its count of changes shows in the next one; an open transaction of a tool does not come back.
    for d in [0, 1] {
        state.push(format!("{:?}", w.store.usage(d)));
    }
    w.write(tools[0], "/next", "").unwrap();
    state.extend(nodes(&w.store));
    (state, got, short)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn the_short_way_leads_to_the_same(asks in prop::collection::vec(ask(), 1..60)) {
        let (state, got, none) = run(&asks, false);
        let (direct_state, direct_got, short) = run(&asks, true);
        prop_assert_eq!((none, short), (0, asks.len()), "a tool for which nothing waits always goes the short way");
        prop_assert_eq!(direct_got.map(|b| b.escape_ascii().to_string()), got.map(|b| b.escape_ascii().to_string()));
        prop_assert_eq!(direct_state, state);
    }
}
