//! The stock daemon really runs on a Xen made of files, for tools and for guests.

use std::process::Stdio;
use xenstore_trial::fake_xen::DomainState;
use xenstore_trial::stock::Programs;
use xenstore_trial::{Connection, FakeXen};
use xenstore_wire::{Op, payload};

#[test]
fn the_stock_daemon_serves_tools_and_guests() {
    let dir = tempfile::tempdir().unwrap();
    let programs = Programs::prepare(dir.path()).unwrap();
    let xen = FakeXen::create(&dir.path().join("xen")).unwrap();
    let stock = programs.start_stock(&xen, &dir.path().join("run"), &[]).unwrap();

    let suite =
        programs.command("usr/lib/xen-4.17/bin/test-xenstore", stock.socket()).stdout(Stdio::null()).status().unwrap();
    assert!(suite.success(), "Debian's own suite passes on it");

    let mut tool = Connection::socket(stock.socket()).unwrap();
    xen.add_domain(1).unwrap();
    tool.call(Op::Mkdir, 0, &payload::join(["/local/domain/1"])).unwrap();
    tool.call(Op::SetPerms, 0, &payload::join(["/local/domain/1", "n1"])).unwrap();
    let (reply, _) = tool.call(Op::Introduce, 0, &payload::join(["1", "0", "1"])).unwrap();
    assert_eq!(reply.header.op, Op::Introduce.to_wire());
    let mut guest = Connection::ring(&xen, 1).unwrap();
    let (reply, _) = guest.call(Op::Write, 0, b"name\0value").unwrap();
    assert_eq!(reply.header.op, Op::Write.to_wire());
    let (reply, _) = tool.call(Op::Read, 0, b"/local/domain/1/name\0").unwrap();
    assert_eq!(reply.payload, b"value");

    let (_, _) = tool.call(Op::Watch, 0, &payload::join(["@releaseDomain", "t"])).unwrap();
    xen.set_state(1, DomainState::Dying).unwrap();
    xen.raise_dom_exc().unwrap();
    let first = tool.receive(std::time::Duration::from_secs(10)).unwrap().expect("the watch's first event");
    let second = tool.receive(std::time::Duration::from_secs(10)).unwrap().expect("the domain's end");
    assert_eq!(first.payload, second.payload);
}
