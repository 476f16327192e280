//! Tools of dom0 that ask at every pace, all at once: our daemon asks busy ones by itself and looks a moment longer before it sleeps
//! (`xenstored/src/daemon/busy.rs`), and must neither overlook one nor stay awake for nothing.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use xenstore_trial::stock::{Programs, Stock};
use xenstore_trial::{Connection, FakeXen};
use xenstore_wire::{Message, Op, payload};

fn start(dir: &Path) -> (FakeXen, Stock) {
    let programs = Programs::prepare(dir).unwrap();
    let xen = FakeXen::create(&dir.join("xen")).unwrap();
    let ours = Path::new(env!("CARGO_BIN_EXE_xenstored-on-files"));
    let d = programs.start_other(ours, &[], &xen, &dir.join("run")).unwrap();
    (xen, d)
}

/// Time that the daemon has had a processor.
fn on_cpu(d: &Stock) -> Duration {
    let text = std::fs::read_to_string(format!("/proc/{}/schedstat", d.pid())).unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// A reply that does not come in three seconds fails the call.
#[test]
fn tools_at_every_pace_have_all_their_replies() {
    let dir = tempfile::tempdir().unwrap();
    let (_xen, d) = start(dir.path());
    std::thread::scope(|s| {
        for tool in 0..24_u32 {
            let socket = d.socket();
            s.spawn(move || {
                let mut c = Connection::socket(socket).unwrap();
                let mut x = u64::from(tool) + 1;
                for i in 0..400 {
                    let path = format!("/busy/{tool}");
                    let write = payload::join([path.as_bytes()]).into_iter().chain(i.to_string().into_bytes());
                    c.call(Op::Write, 0, &write.collect::<Vec<u8>>()).unwrap();
                    let (m, _) = c.call(Op::Read, 0, &payload::join([path])).unwrap();
                    assert_eq!(m.payload, i.to_string().into_bytes());
                    // A third at full speed, a third with short breaks, a third now and then; all change their pace.
                    x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    match (tool + i / 50) % 3 {
                        0 => {}
                        1 => std::thread::sleep(Duration::from_micros((x >> 33) % 100)),
                        _ => std::thread::sleep(Duration::from_millis((x >> 33) % 4)),
                    }
                }
            });
        }
    });
}

/// Six tools that asked for much and read nothing of it: the daemon can do nothing, and does nothing.
#[test]
fn nobody_keeps_it_awake() {
    const IDLE: Duration = Duration::from_secs(1);
    let dir = tempfile::tempdir().unwrap();
    let (_xen, d) = start(dir.path());
    let mut tools: Vec<UnixStream> = (0..6).map(|_| UnixStream::connect(d.socket()).unwrap()).collect();
    let request = Message::new(Op::GetDomainPath.to_wire(), 1, 0, b"7\0".to_vec()).to_bytes();
    let reply = Message::new(Op::GetDomainPath.to_wire(), 1, 0, b"/local/domain/7\0".to_vec()).to_bytes();
    // As much as the daemon keeps and the sockets hold, by all at once: then all of them are busy.
    let asked: Vec<usize> = std::thread::scope(|s| {
        let flood = |mut c: &UnixStream| {
            c.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
            (0..).take_while(|_| c.write_all(&request).is_ok()).count()
        };
        let all: Vec<_> = tools.iter().map(|c| s.spawn(move || flood(c))).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(asked.iter().all(|&n| n > 20_000), "{asked:?}");
    std::thread::sleep(IDLE);
    let before = on_cpu(&d);
    std::thread::sleep(IDLE);
    let took = on_cpu(&d) - before;
    assert!(took < IDLE / 5, "{took:?} of {IDLE:?} on a processor");
    // And it goes on with them.
    for (c, asked) in tools.iter_mut().zip(asked) {
        c.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        let mut got = reply.clone();
        for i in 0..asked {
            c.read_exact(&mut got).unwrap();
            assert!(got == reply, "reply {i} of {asked}: {}", got.escape_ascii());
        }
    }
}

/// A look at a node that is there takes the shortest way of all.
#[test]
fn every_request_is_logged() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let (_xen, d) = start(dir.path());
    let mut c = Connection::socket(d.socket()).unwrap();
    for args in [["logfile", log.to_str().unwrap()], ["log", "on"]] {
        let (m, _) = c.call(Op::Control, 0, &payload::join(args)).unwrap();
        assert_eq!(m.payload, b"OK\0");
    }
    for op in [Op::Read, Op::Directory, Op::GetPerms] {
        c.call(op, 0, &payload::join(["/tool"])).unwrap();
    }
    let text = std::fs::read_to_string(log).unwrap();
    for op in ["READ", "DIRECTORY", "GET_PERMS"] {
        assert!(text.contains(&format!("op=\"{op}\"")), "{op} in {text}");
    }
}
