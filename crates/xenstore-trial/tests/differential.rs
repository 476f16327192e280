//! The same operations to two daemons, the same answers wanted.

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};
use std::path::Path;
use xenstore_trial::FakeXen;
use xenstore_trial::script::{CLIENTS, GUESTS, SLOTS, Step, play};
use xenstore_trial::stock::Programs;
use xenstore_wire::{Op, PAYLOAD_MAX, payload};

/// Options of both daemons by which a guest meets a quota within a few steps. Not `memory`, against which ours
/// counts what a transaction looked for in vain, too, nor `outstanding`: a script waits for each reply.
const SMALL_QUOTAS: &[&str] =
    &["-E", "4", "-S", "100", "-W", "2", "-t", "1", "-A", "2", "-M", "16", "-Q", "transaction-nodes=3"];
/// Longer than these allow.
const LONG: &str = "/t/seventeen-long";

fn path() -> impl Strategy<Value = String> {
    let plain = |paths: &[&str]| select(paths.iter().map(|p| p.to_string()).collect::<Vec<_>>());
    prop_oneof![
        20 => plain(&["/t", "/t/a", "/t/a/b", "/t/a/b/c", "/t/b", "/t/b/c", "/t/d"]),
        8 => plain(&["a", "a/b", "data", "data/x"]),
        6 => plain(&["/local/domain/1", "/local/domain/1/a", "/local/domain/2/a", "/local/domain/3", "/tool"]),
        2 => plain(&["/", "", "@releaseDomain", "@introduceDomain", "@foo"]),
        2 => plain(&["//t", "/t/", "/t//a", "/t/a b", "t/a/", "/t/a,b", "/t/_-@x"]),
        1 => select(vec![LONG.to_string(), format!("/t/{}", "x".repeat(3100)), "y".repeat(2100)]),
    ]
}

fn value() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => select(vec![&b"1"[..], b"two", b"", b"with\0zero"]).prop_map(<[u8]>::to_vec),
        1 => select(vec![2000_usize, 2048, 2049, 4000]).prop_map(|n| vec![b'v'; n]),
    ]
}

fn perms() -> impl Strategy<Value = Vec<&'static str>> {
    select(vec![
        vec!["n0"],
        vec!["b0"],
        vec!["r0"],
        vec!["w1"],
        vec!["n1", "r2"],
        vec!["n2", "b1", "w0"],
        vec!["r0", "b1", "b1"],
        vec!["b0", "n1"],
        vec!["x1"],
        vec!["n"],
        vec![""],
        vec![],
        vec!["n70000"],
    ])
}

/// The arguments of a request.
fn body() -> impl Strategy<Value = (Op, Vec<u8>)> {
    let with_path = |op: Op| path().prop_map(move |p| (op, payload::join([p])));
    let part = (path(), select(vec!["0", "1", "5000", "x", ""]));
    let watch =
        |op: Op| (path(), select(vec!["t1", "t2", ""])).prop_map(move |(p, t)| (op, payload::join([p.as_str(), t])));
    prop_oneof![
        8 => with_path(Op::Read),
        6 => with_path(Op::Directory),
        4 => with_path(Op::GetPerms),
        6 => with_path(Op::Mkdir),
        6 => with_path(Op::Rm),
        2 => part.prop_map(|(p, o)| (Op::DirectoryPart, payload::join([p.as_str(), o]))),
        12 => (path(), value()).prop_map(|(p, v)| {
            let mut b = payload::join([p]);
            b.extend(v);
            // Longer ones end the connection.
            b.truncate(PAYLOAD_MAX);
            (Op::Write, b)
        }),
        6 => (path(), perms()).prop_map(|(p, l)| {
            let mut b = payload::join([p]);
            b.extend(payload::join(l));
            (Op::SetPerms, b)
        }),
        6 => watch(Op::Watch),
        3 => watch(Op::Unwatch),
        1 => Just((Op::ResetWatches, vec![0])),
        1 => select(vec!["0", "1", "7", "x", ""]).prop_map(|d| (Op::GetDomainPath, payload::join([d]))),
        1 => select(vec!["0", "1", "7", "x"]).prop_map(|d| (Op::IsDomainIntroduced, payload::join([d]))),
        1 => select(vec!["1", "7", "0"]).prop_map(|d| (Op::Resume, payload::join([d]))),
        1 => select(vec!["7", "x", ""]).prop_map(|d| (Op::Release, payload::join([d]))),
        1 => select(vec![vec!["9", "0", "1"], vec!["0", "0", "1"], vec!["x", "0", "1"], vec!["1"]])
            .prop_map(|a| (Op::Introduce, payload::join(a))),
        // Bytes that no argument list is made of. Not for READ, MKDIR and the like: the stock daemon then answers with
        // whatever error came last, ours with EINVAL.
        1 => (select(vec![Op::Write, Op::Watch, Op::SetPerms, Op::TransactionEnd]),
              select(vec![&b""[..], b"/t/a", b"\0", b"\0\0", b"/t/a\0t", b"T"])).prop_map(|(o, b)| (o, b.to_vec())),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let slot = prop_oneof![3 => Just(None), 2 => (0..SLOTS).prop_map(Some)];
    prop_oneof![
        40 => (0..CLIENTS, slot, body()).prop_map(|(client, slot, (op, body))| {
            // The stock daemon dies of RESET_WATCHES inside a transaction.
            let slot = slot.filter(|_| op != Op::ResetWatches);
            // It refuses permissions of special events with whatever error came last: only those who may try.
            let special = op == Op::SetPerms && body.starts_with(b"@");
            let client = if special { client % 2 } else { client };
            let unknown = special && body.starts_with(b"@foo");
            let (op, body) = if unknown { (Op::GetPerms, b"@foo\0".to_vec()) } else { (op, body) };
            // It loses all of its store if a guest that owns the root dies.
            let given = op == Op::SetPerms && body.starts_with(b"/\0") && !body.starts_with(b"/\0b0") && !body.starts_with(b"/\0r0");
            let (op, body) = if given { (Op::GetPerms, b"/\0".to_vec()) } else { (op, body) };
            Step::Request { client, op, slot, body }
        }),
        6 => (0..CLIENTS, 0..SLOTS).prop_map(|(client, slot)| Step::Begin { client, slot }),
        6 => (0..CLIENTS, 0..SLOTS, prop::bool::weighted(0.8))
            .prop_map(|(client, slot, commit)| Step::End { client, slot, commit }),
        1 => Just(Step::Reconnect { client: 1 }),
        1 => (0..GUESTS.len()).prop_map(|guest| Step::ShutDown { guest }),
        1 => (0..GUESTS.len()).prop_map(|guest| Step::DieAndReturn { guest }),
    ]
}

/// Plays a script to the stock daemon.
fn stock(programs: &Programs, options: &[&str], script: &[Step]) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let xen = FakeXen::create(&dir.path().join("xen")).unwrap();
    let daemon = programs.start_stock(&xen, &dir.path().join("run"), options).unwrap();
    play(daemon.socket(), &xen, script).unwrap()
}

/// Plays a script to ours.
fn ours(programs: &Programs, options: &[&str], script: &[Step]) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let xen = FakeXen::create(&dir.path().join("xen")).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_xenstored-on-files"));
    let daemon = programs.start_other(program, options, &xen, &dir.path().join("run")).unwrap();
    play(daemon.socket(), &xen, script).unwrap()
}

/// The nodes of a dead domain go in another order: ours begins where most of them are.
fn any_order_at_a_death(mut lines: Vec<String>) -> Vec<String> {
    for block in lines.chunk_by_mut(|_, next| !next.starts_with("---")) {
        if block.first().is_some_and(|l| l.contains("DieAndReturn")) {
            block[1..].sort();
        }
    }
    lines
}

/// A transaction made a node, others made it too and a child of it, and the transaction removes the child: it sees one that its
/// parent's list lacks. The commit fails in any case; what comes after it in the script is not compared.
fn takes_its_store_for_corrupt(step: &str, stock: Option<&String>) -> bool {
    step.contains(" RM ") && step.contains(" in transaction ") && stock.is_some_and(|l| l.contains("ERROR EIO"))
}

#[test]
fn ours_answers_as_the_stock_daemon_does() {
    let dir: &Path = &tempfile::tempdir().unwrap().keep();
    let programs = Programs::prepare(dir).unwrap();
    let cases = std::env::var("FERRY_DIFFERENTIAL_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(36);
    let mut runner =
        TestRunner::new(Config { cases, failure_persistence: None, max_shrink_iters: 400, ..Config::default() });
    runner
        .run(&(any::<bool>(), prop::collection::vec(step(), 1..120)), |(small, script)| {
            let options = if small { SMALL_QUOTAS } else { &[] };
            let got = any_order_at_a_death(ours(&programs, options, &script));
            let want = any_order_at_a_death(stock(&programs, options, &script));
            if want != got {
                let at = want.iter().zip(&got).position(|(a, b)| a != b).unwrap_or(want.len().min(got.len()));
                let from = want[..at].iter().rposition(|l| l.starts_with("---")).unwrap_or(0);
                if takes_its_store_for_corrupt(&want[from], want.get(at)) {
                    return Ok(());
                }
                let show = |v: &[String]| v[from..].iter().take(at - from + 4).cloned().collect::<Vec<_>>().join("\n");
                prop_assert!(false, "small quotas: {small}; line {at}; stock:\n{}\nours:\n{}", show(&want), show(&got));
            }
            Ok(())
        })
        .unwrap();
    std::fs::remove_dir_all(dir).unwrap();
}

/// Scripts to which the answers once differed.
#[test]
fn what_once_differed_does_not_any_more() {
    let request = |client, op, slot, body: &[u8]| Step::Request { client, op, slot, body: body.to_vec() };
    let scripts = [
        // In a transaction a node is removed whose parent was not there for it.
        vec![
            Step::Begin { client: 1, slot: 2 },
            request(1, Op::Rm, Some(2), b"/t\0"),
            request(0, Op::Write, None, b"/t/a\x001"),
            request(1, Op::Rm, Some(2), b"/t/a\0"),
            Step::End { client: 1, slot: 2, commit: true },
        ],
    ];
    let dir = tempfile::tempdir().unwrap();
    let programs = Programs::prepare(dir.path()).unwrap();
    for script in scripts {
        assert_eq!(ours(&programs, &[], &script), stock(&programs, &[], &script), "{script:?}");
    }
}

#[test]
fn each_quota_is_met_in_the_same_place() {
    const TOOL: usize = 0;
    const GUEST: usize = 2;
    let request = |client, op, slot, args: &[&str]| {
        let mut body = payload::join(args);
        if op == Op::Write {
            body.pop();
        }
        Step::Request { client, op, slot, body }
    };
    let write = |node, slot| request(GUEST, Op::Write, slot, &[node, "1"]);
    let read = |node, slot| request(GUEST, Op::Read, slot, &[node]);
    let watch = |client, token| request(client, Op::Watch, None, &["a", token]);
    let begin = |slot| Step::Begin { client: GUEST, slot };
    let commit = |slot| Step::End { client: GUEST, slot, commit: true };
    let big = "v".repeat(200);
    // Each step, and what it must say.
    let steps = [
        // Its home is the first of four nodes.
        (write("a", None), "OK"),
        (write("b", None), "OK"),
        (write("c", None), "OK"),
        (write("d", None), "ENOSPC"),
        (write("d/e", None), "ENOSPC"),
        (request(GUEST, Op::Mkdir, None, &["d"]), "ENOSPC"),
        (write("a", None), "OK"),
        // A node's size.
        (request(GUEST, Op::Write, None, &["a", &big]), "ENOSPC"),
        (read("a", None), "READ 1"),
        // Both daemons count one watch and one transaction more than they say.
        (watch(GUEST, "1"), "OK"),
        (watch(GUEST, "2"), "OK"),
        (watch(GUEST, "3"), "OK"),
        (watch(GUEST, "4"), "E2BIG"),
        (request(GUEST, Op::Unwatch, None, &["a", "1"]), "OK"),
        (watch(GUEST, "4"), "OK"),
        (begin(0), "open"),
        (begin(1), "open"),
        (begin(2), "ENOSPC"),
        // Nodes of one transaction; beyond them it is lost.
        (read("a", Some(0)), "READ 1"),
        (read("b", Some(0)), "READ 1"),
        (read("c", Some(0)), "READ 1"),
        (request(GUEST, Op::Directory, Some(0), &["/local/domain/1"]), "ENOSPC"),
        (commit(0), "ENOMEM"),
        // Nodes of the domain when a transaction ends.
        (request(GUEST, Op::Rm, None, &["c"]), "OK"),
        (write("x", Some(1)), "OK"),
        (commit(1), "ENOSPC"),
        (read("x", None), "ENOENT"),
        (request(GUEST, Op::SetPerms, None, &["a", "n1", "r2"]), "OK"),
        (request(GUEST, Op::SetPerms, None, &["a", "n1", "r2", "r0"]), "ENOSPC"),
        (read(LONG, None), "EINVAL"),
        // Tools have no quota but that of a path's length.
        (request(TOOL, Op::Read, None, &[LONG]), "EINVAL"),
        (request(TOOL, Op::Write, None, &["/t/a", &big]), "OK"),
        (request(TOOL, Op::SetPerms, None, &["/t/a", "n0", "r1", "r2", "r1"]), "OK"),
        (watch(TOOL, "1"), "OK"),
        (watch(TOOL, "2"), "OK"),
        (watch(TOOL, "3"), "OK"),
        (watch(TOOL, "4"), "OK"),
        // What dom0 makes counts, too, when the guest gets it, and is not refused.
        (request(TOOL, Op::Write, None, &["/local/domain/1/t", "1"]), "OK"),
        (request(TOOL, Op::Write, None, &["/local/domain/1/u", "1"]), "OK"),
        (write("v", None), "ENOSPC"),
    ];
    let dir = tempfile::tempdir().unwrap();
    let programs = Programs::prepare(dir.path()).unwrap();
    let script: Vec<Step> = steps.iter().map(|(s, _)| s.clone()).collect();
    let want = stock(&programs, SMALL_QUOTAS, &script);
    assert_eq!(ours(&programs, SMALL_QUOTAS, &script), want);
    let blocks: Vec<&[String]> = want.chunk_by(|_, next| !next.starts_with("---")).collect();
    for (block, (_, says)) in blocks.iter().zip(&steps) {
        assert!(block[1..].iter().any(|l| l.contains(says)), "{block:?} instead of {says}");
    }
}
