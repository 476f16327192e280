//! The stock daemon hands over to ours, ours to itself, and ours back to the stock one, under tools and a guest that are
//! in the middle of things.

use std::path::Path;
use xenstore_trial::stock::Programs;
use xenstore_trial::{Connection, FakeXen};
use xenstore_wire::{HEADER_LEN, Message, Op, payload};

fn text(m: &Message) -> String {
    String::from_utf8_lossy(&m.payload).into_owned()
}

fn live_update(tool: &mut Connection<'_>, program: &Path) {
    live_update_with(tool, program, None);
}

fn live_update_with(tool: &mut Connection<'_>, program: &Path, words: Option<&str>) {
    control_live_update(tool, program, words, &["live-update", "-s", "-t", "5"]);
}

/// Over transactions that are open, however short a time.
fn forced_live_update(tool: &mut Connection<'_>, program: &Path) {
    control_live_update(tool, program, None, &["live-update", "-s", "-F", "-t", "0"]);
}

fn control_live_update(tool: &mut Connection<'_>, program: &Path, words: Option<&str>, start: &[&str]) {
    let program = ["live-update", "-f", program.to_str().unwrap()];
    let words = words.map(|w| ["live-update", "-c", w]);
    for args in [Some(&program[..]), words.as_ref().map(|w| &w[..]), Some(start)] {
        let Some(args) = args else { continue };
        let (m, _) = tool.call(Op::Control, 0, &payload::join(args)).unwrap();
        assert_eq!(text(&m), "OK\0");
    }
}

#[test]
fn nobody_notices_who_serves_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let programs = Programs::prepare(dir.path()).unwrap();
    let xen = FakeXen::create(&dir.path().join("xen")).unwrap();
    let run = dir.path().join("run");
    let ours = Path::new(env!("CARGO_BIN_EXE_xenstored-on-files"));
    let stock = programs.stock_path();
    let daemon = programs.start_stock(&xen, &run, &[]).unwrap();
    let exe = || std::fs::read_link(format!("/proc/{}/exe", daemon.pid())).unwrap();

    let mut tool = Connection::socket(daemon.socket()).unwrap();
    let mut other = Connection::socket(daemon.socket()).unwrap();
    for domid in [1, 2] {
        let home = format!("/local/domain/{domid}");
        xen.add_domain(domid).unwrap();
        tool.call(Op::Mkdir, 0, &payload::join([&home])).unwrap();
        tool.call(Op::SetPerms, 0, &payload::join([&home, &format!("n{domid}")])).unwrap();
        tool.call(Op::Introduce, 0, &payload::join([&domid.to_string(), "0", "1"])).unwrap();
    }
    // Its reply is three times as long as a ring.
    let long = vec![b'v'; 3000];
    tool.call(Op::Write, 0, &[b"/local/domain/2/long\0", long.as_slice()].concat()).unwrap();
    let mut guest = Connection::ring(&xen, 1).unwrap();
    let mut second = Connection::ring(&xen, 2).unwrap();
    guest.call(Op::Watch, 0, b"data\0rel\0").unwrap();
    other.call(Op::Watch, 0, b"/local/domain/1\0abs\0").unwrap();
    other.call(Op::Watch, 0, b"@releaseDomain\0rel\0").unwrap();

    let mut daemons = vec![ours, ours, &stock, ours, &stock, ours];
    daemons.extend([ours, &stock].repeat(4));
    for (round, program) in daemons.into_iter().enumerate() {
        // Half a request of a guest, half a request of a tool; of another guest a reply of which its ring has a part, and one behind it.
        let request = Message::new(Op::Write.to_wire(), 1000, 0, format!("data/{round}\0x").into_bytes()).to_bytes();
        let (head, tail) = request.split_at(HEADER_LEN + 3);
        guest.send_raw(head).unwrap();
        let read = Message::new(Op::Read.to_wire(), 1001, 0, b"/local/domain/1\0".to_vec()).to_bytes();
        other.send_raw(&read[..20]).unwrap();
        let half = second.send(Op::Read, 0, b"long\0").unwrap();
        let unread = second.send(Op::GetDomainPath, 0, b"2\0").unwrap();
        // The daemon has seen them.
        tool.call(Op::Read, 0, b"/tool\0").unwrap();
        live_update(&mut tool, program);
        assert_eq!(exe().file_name(), program.file_name(), "round {round}");
        guest.send_raw(tail).unwrap();
        other.send_raw(&read[20..]).unwrap();
        let wait = std::time::Duration::from_secs(5);
        let next = |c: &mut Connection<'_>| c.receive(wait).unwrap().expect("a message");
        let mut got = [next(&mut guest), next(&mut guest)].map(|m| (m.header.req_id, text(&m)));
        got.sort();
        let first = round == 0;
        if first {
            // The watch's initial event was not waited for.
            assert_eq!(got[0], (0, "data\0rel\0".into()));
            assert_eq!(text(&next(&mut guest)), "OK\0");
        } else {
            assert_eq!(got[0], (0, format!("data/{round}\0rel\0")));
            assert_eq!(got[1], (1000, "OK\0".into()));
        }
        loop {
            let m = next(&mut other);
            if m.header.req_id == 1001 {
                break;
            }
            assert_eq!(m.header.req_id, 0);
        }
        let m = next(&mut second);
        assert_eq!((m.header.req_id, &m.payload), (half, &long), "round {round}");
        let m = next(&mut second);
        assert_eq!((m.header.req_id, text(&m)), (unread, "/local/domain/2\0".into()));
        let (m, _) = tool.call(Op::Read, 0, format!("/local/domain/1/data/{round}\0").as_bytes()).unwrap();
        assert_eq!(text(&m), "x");
        let (m, _) = tool.call(Op::GetPerms, 0, b"/local/domain/1/data\0").unwrap();
        assert_eq!(text(&m), "n1\0");
    }
    // The last one notices a death, and the watch that was set 14 daemons ago tells.
    let (_, _) = other.call(Op::Read, 0, b"/tool\0").unwrap();
    xen.set_state(2, xenstore_trial::fake_xen::DomainState::Dying).unwrap();
    xen.raise_dom_exc().unwrap();
    let wait = std::time::Duration::from_secs(5);
    let m = other.receive(wait).unwrap().expect("the domain's end");
    assert_eq!(text(&m), "@releaseDomain\0rel\0");
}

#[test]
fn options_of_ours_do_not_end_the_stock_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let programs = Programs::prepare(dir.path()).unwrap();
    let xen = FakeXen::create(&dir.path().join("xen")).unwrap();
    let ours = Path::new(env!("CARGO_BIN_EXE_xenstored-on-files"));
    let daemon = programs.start_stock(&xen, &dir.path().join("run"), &[]).unwrap();
    let mut tool = Connection::socket(daemon.socket()).unwrap();
    tool.call(Op::Write, 0, b"/kept\0value").unwrap();
    let state = dir.path().join("state");
    let words = format!("--state-dir {} -p 0 -I on -Q nodes=900 -Q memory=4000000000", state.display());
    live_update_with(&mut tool, ours, Some(&words));
    live_update(&mut tool, ours);
    assert!(state.join("journal").exists(), "a word was lost on the way to one of ours");
    live_update(&mut tool, &programs.stock_path());
    let (m, _) = tool.call(Op::Read, 0, b"/kept\0").expect("the stock daemon gave up");
    assert_eq!(text(&m), "value");
}

/// A request's answer, or the error's name.
fn says(c: &mut Connection<'_>, op: Op, tx: u32, body: &str) -> String {
    let (m, _) = c.call(op, tx, body.as_bytes()).unwrap();
    text(&m).trim_end_matches('\0').to_string()
}

fn begin(c: &mut Connection<'_>) -> u32 {
    says(c, Op::TransactionStart, 0, "\0").parse().unwrap()
}

/// Makes domain 1 known to the daemon.
fn bring_up(tool: &mut Connection<'_>, xen: &FakeXen) {
    xen.add_domain(1).unwrap();
    for (op, body) in
        [(Op::Mkdir, "/local/domain/1\0"), (Op::SetPerms, "/local/domain/1\0n1\0"), (Op::Introduce, "1\x000\x001\0")]
    {
        assert_eq!(says(tool, op, 0, body), "OK");
    }
}

#[test]
fn ours_carries_open_transactions_to_ours() {
    let dir = tempfile::tempdir().unwrap();
    let programs = Programs::prepare(dir.path()).unwrap();
    let xen = FakeXen::create(&dir.path().join("xen")).unwrap();
    let ours = Path::new(env!("CARGO_BIN_EXE_xenstored-on-files"));
    let daemon = programs.start_other(ours, &[], &xen, &dir.path().join("run")).unwrap();
    let mut tool = Connection::socket(daemon.socket()).unwrap();
    let mut client = Connection::socket(daemon.socket()).unwrap();
    bring_up(&mut tool, &xen);
    let mut guest = Connection::ring(&xen, 1).unwrap();
    for node in ["/t/read", "/t/gone", "/t/before", "/t/after"] {
        assert_eq!(says(&mut tool, Op::Write, 0, &format!("{node}\x001")), "OK");
    }
    let good = begin(&mut client);
    assert_eq!(says(&mut client, Op::Read, good, "/t/read\0"), "1");
    assert_eq!(says(&mut client, Op::Write, good, "/t/made/deep\0x"), "OK");
    assert_eq!(says(&mut client, Op::Rm, good, "/t/gone\0"), "OK");
    // One whose conflict comes before the live update, one whose comes after it.
    let (before, after) = (begin(&mut client), begin(&mut client));
    for (tx, node) in [(before, "/t/before"), (after, "/t/after")] {
        assert_eq!(says(&mut client, Op::Read, tx, &format!("{node}\0")), "1");
        assert_eq!(says(&mut client, Op::Write, tx, &format!("{node}/mine\0x")), "OK");
    }
    let of_guest = begin(&mut guest);
    assert_eq!(says(&mut guest, Op::Write, of_guest, "data/sum\x003"), "OK");
    assert_eq!(says(&mut tool, Op::Write, 0, "/t/before\x002"), "OK");

    // Twice: what came out of a stream goes into the next one.
    for _ in 0..2 {
        forced_live_update(&mut tool, ours);
        assert_eq!(says(&mut client, Op::Read, good, "/t/made/deep\0"), "x");
        assert_eq!(says(&mut client, Op::Read, good, "/t/gone\0"), "ENOENT");
        assert_eq!(says(&mut client, Op::Read, 0, "/t/made/deep\0"), "ENOENT", "not committed");
        assert_eq!(says(&mut client, Op::Read, 0, "/t/gone\0"), "1");
    }
    assert_eq!(says(&mut tool, Op::Write, 0, "/t/after\x002"), "OK");

    assert_eq!(says(&mut client, Op::TransactionEnd, before, "T\0"), "EAGAIN");
    assert_eq!(says(&mut client, Op::TransactionEnd, after, "T\0"), "EAGAIN");
    assert_eq!(says(&mut client, Op::TransactionEnd, good, "T\0"), "OK");
    assert_eq!(says(&mut guest, Op::TransactionEnd, of_guest, "T\0"), "OK");
    assert_eq!(says(&mut tool, Op::Directory, 0, "/t\0"), "read\0before\0after\0made");
    assert_eq!(says(&mut tool, Op::Read, 0, "/t/made/deep\0"), "x");
    assert_eq!(says(&mut tool, Op::Read, 0, "/local/domain/1/data/sum\0"), "3");
    for node in ["/t/before/mine", "/t/after/mine"] {
        assert_eq!(says(&mut tool, Op::Read, 0, &format!("{node}\0")), "ENOENT");
    }
    assert_eq!(says(&mut tool, Op::Control, 0, "check\0"), "OK");
}

#[test]
fn a_stock_daemon_neither_takes_nor_gives_open_transactions() {
    let dir = tempfile::tempdir().unwrap();
    let programs = Programs::prepare(dir.path()).unwrap();
    let (ours, stock) = (Path::new(env!("CARGO_BIN_EXE_xenstored-on-files")), programs.stock_path());
    for (name, to_stock) in [("to", true), ("from", false)] {
        let xen = FakeXen::create(&dir.path().join(format!("xen-{name}"))).unwrap();
        let run = dir.path().join(name);
        let (daemon, next) = if to_stock {
            (programs.start_other(ours, &[], &xen, &run).unwrap(), &*stock)
        } else {
            (programs.start_stock(&xen, &run, &[]).unwrap(), ours)
        };
        let mut tool = Connection::socket(daemon.socket()).unwrap();
        let mut client = Connection::socket(daemon.socket()).unwrap();
        bring_up(&mut tool, &xen);
        let mut guest = Connection::ring(&xen, 1).unwrap();
        assert_eq!(says(&mut tool, Op::Write, 0, "/t/kept\x001"), "OK");
        let (tx, of_guest) = (begin(&mut client), begin(&mut guest));
        assert_eq!(says(&mut client, Op::Write, tx, "/t/kept\x002"), "OK");
        assert_eq!(says(&mut client, Op::Write, tx, "/t/made\0x"), "OK");
        assert_eq!(says(&mut guest, Op::Write, of_guest, "made\0x"), "OK");
        forced_live_update(&mut tool, next);
        let exe = std::fs::read_link(format!("/proc/{}/exe", daemon.pid())).unwrap();
        assert_eq!(exe.file_name(), next.file_name());
        for (c, tx, node) in [(&mut client, tx, "/t/made"), (&mut guest, of_guest, "made")] {
            assert_eq!(says(c, Op::Write, tx, &format!("{node}\0y")), "ENOENT");
            assert_eq!(says(c, Op::TransactionEnd, tx, "T\0"), "ENOENT");
            assert_eq!(says(c, Op::Read, 0, &format!("{node}\0")), "ENOENT", "nothing of it came to be");
            // It tries again, as after a conflict.
            let again = begin(c);
            assert_eq!(says(c, Op::Write, again, &format!("{node}\0z")), "OK");
            assert_eq!(says(c, Op::TransactionEnd, again, "T\0"), "OK");
            assert_eq!(says(c, Op::Read, 0, &format!("{node}\0")), "z");
        }
        assert_eq!(says(&mut tool, Op::Read, 0, "/t/kept\0"), "1");
    }
}

#[test]
fn a_watch_keeps_its_depth_until_a_stock_daemon_takes_over() {
    let dir = tempfile::tempdir().unwrap();
    let programs = Programs::prepare(dir.path()).unwrap();
    let xen = FakeXen::create(&dir.path().join("xen")).unwrap();
    let ours = Path::new(env!("CARGO_BIN_EXE_xenstored-on-files"));
    let daemon = programs.start_other(ours, &[], &xen, &dir.path().join("run")).unwrap();
    let mut tool = Connection::socket(daemon.socket()).unwrap();
    let mut other = Connection::socket(daemon.socket()).unwrap();
    let told = |tool: &mut Connection<'_>, other: &mut Connection<'_>| {
        assert_eq!(says(tool, Op::Write, 0, "/a/b/c\0"), "OK");
        assert_eq!(says(tool, Op::Write, 0, "/a/b\0"), "OK");
        let (_, events) = other.call(Op::GetDomainPath, 0, b"0\0").unwrap();
        events.iter().map(text).collect::<Vec<_>>()
    };
    assert_eq!(says(&mut other, Op::Watch, 0, "/a\0t\x001\0"), "OK");
    assert_eq!(told(&mut tool, &mut other), ["/a\0t\0", "/a/b\0t\0"]);
    live_update(&mut tool, ours);
    assert_eq!(told(&mut tool, &mut other), ["/a/b\0t\0"]);
    live_update(&mut tool, &programs.stock_path());
    assert_eq!(told(&mut tool, &mut other), ["/a/b/c\0t\0", "/a/b\0t\0"], "it does not know of depths");
}
