//! The program itself, over its socket, without Xen.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use xenstore_client::{Client, Errno, Nodes};

struct Running {
    child: Child,
    dir: tempfile::TempDir,
}

impl Running {
    fn start() -> Running {
        let dir = tempfile::tempdir().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_xenstored"))
            .args(["--no-domain-init", "--no-fork", "--pid-file"])
            .arg(dir.path().join("pid"))
            .env("XENSTORED_RUNDIR", dir.path())
            .env_remove("XENSTORED_PATH")
            .spawn()
            .unwrap();
        let r = Running { child, dir };
        let end = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(r.socket()).is_err() {
            assert!(Instant::now() < end, "it does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        r
    }

    fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("socket")
    }

    fn client(&self) -> Client {
        Client::connect(self.socket()).unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn it_serves_clients_side_by_side() {
    let d = Running::start();
    let (mut a, mut b) = (d.client(), d.client());
    a.write("/x/y", "1").unwrap();
    assert_eq!(b.read_string("/x/y").unwrap(), "1");
    assert_eq!(b.read_opt("/x/z").unwrap(), None);
    assert_eq!(b.read("/x/z").unwrap_err().to_string(), "xenstore READ /x/z: ENOENT (no such node)");
    b.watch("/x", "tok").unwrap();
    assert_eq!(b.next_event(None).unwrap().unwrap().path, "/x");
    a.write("/x/y", "2").unwrap();
    assert_eq!(b.next_event(Some(Duration::from_secs(5))).unwrap().unwrap().path, "/x/y");
    assert_eq!(b.next_event(Some(Duration::from_millis(20))).unwrap(), None);
    for i in 0..500 {
        a.write(&format!("/many/a-rather-long-name-{i}"), "").unwrap();
    }
    assert_eq!(a.directory("/many").unwrap().len(), 500);
    assert_eq!(a.directory("/many").unwrap()[499], "a-rather-long-name-499");
    // Two that count up together never lose a step.
    a.write("/n", "0").unwrap();
    let step = |c: &mut Client| {
        for _ in 0..200 {
            c.transaction(|t| {
                let n: u32 = t.read_string("/n")?.parse().unwrap();
                t.write("/n", (n + 1).to_string())
            })
            .unwrap();
        }
    };
    std::thread::scope(|s| {
        s.spawn(|| step(&mut b));
        step(&mut a);
    });
    assert_eq!(a.read_string("/n").unwrap(), "400");
    assert_eq!(a.control(&["check"]).unwrap(), "OK");
    assert!(a.control(&["quota"]).unwrap().contains("nodes            :     1000 Nodes per domain"));
    assert_eq!(a.ferry_features().unwrap().len(), xenstored::FEATURES.len());
    let e = a.introduce(5, 1, 1).unwrap_err();
    assert_eq!(e.errno(), Some(Errno::ENOSYS), "there is no Xen here");
    // One that does not read its replies keeps nobody else waiting.
    let mut deaf = UnixStream::connect(d.socket()).unwrap();
    deaf.set_nonblocking(true).unwrap();
    let request = xenstore_wire::Message::new(1, 0, 0, b"/many\0".to_vec()).to_bytes().repeat(50);
    for _ in 0..200 {
        if std::io::Write::write(&mut deaf, &request).is_err() {
            break;
        }
    }
    assert_eq!(a.read_string("/x/y").unwrap(), "2");
}

#[test]
fn a_second_daemon_with_the_same_pid_file_gives_up() {
    let d = Running::start();
    let pid = d.dir.path().join("pid");
    assert_eq!(std::fs::read_to_string(&pid).unwrap().trim(), d.child.id().to_string());
    let out = Command::new(env!("CARGO_BIN_EXE_xenstored"))
        .args(["-D", "-N", "-F"])
        .arg(&pid)
        .env("XENSTORED_RUNDIR", d.dir.path())
        .output()
        .unwrap();
    assert!(!out.status.success());
    assert!(String::from_utf8_lossy(&out.stderr).contains("a xenstored is running already"));
    assert_eq!(d.client().directory("/").unwrap(), ["tool"], "the first one is well");
}

fn live_update(c: &mut Client, program: &Path) {
    assert_eq!(c.control(&["live-update", "-f", program.to_str().unwrap()]).unwrap(), "OK");
    assert_eq!(c.control(&["live-update", "-s", "-t", "5"]).unwrap(), "OK");
}

#[test]
fn a_live_update_keeps_clients_watches_and_nodes() {
    let d = Running::start();
    let (mut a, mut b) = (d.client(), d.client());
    a.write("/x/y", "1").unwrap();
    a.set_perms("/x", &[xenstore_client::Perm::new(xenstore_client::Access::READ, 3)]).unwrap();
    b.watch("/x", "tok").unwrap();
    b.watch("rel", "r").unwrap();
    let started = d.child.id();
    for round in 0..3 {
        live_update(&mut a, Path::new(env!("CARGO_BIN_EXE_xenstored")));
        a.write("/x/y", round.to_string()).unwrap();
        a.write("/local/domain/0/rel", "").unwrap();
        assert_eq!(b.read_string("/x/y").unwrap(), round.to_string());
    }
    assert!(Path::new(&format!("/proc/{started}")).exists(), "it is the same process");
    let mut paths: Vec<String> = Vec::new();
    while let Some(e) = b.next_event(Some(Duration::from_millis(100))).unwrap() {
        paths.push(e.path);
    }
    let want: Vec<&str> = ["/x", "rel"].into_iter().chain(["/x/y", "rel"].into_iter().cycle().take(6)).collect();
    assert_eq!(paths, want);
    assert_eq!(a.get_perms("/x").unwrap().len(), 1);
    assert_eq!(a.control(&["check"]).unwrap(), "OK");
    // What can't be executed leaves everything as it is.
    assert_eq!(a.control(&["live-update", "-f", "/nowhere"]).unwrap(), "File not accessible or not executable.");
    let junk = d.dir.path().join("junk");
    std::fs::write(&junk, b"\x7fELFjunk").unwrap();
    std::fs::set_permissions(&junk, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    assert_eq!(a.control(&["live-update", "-f", junk.to_str().unwrap()]).unwrap(), "OK");
    let why = a.control(&["live-update", "-s"]).unwrap();
    assert!(why.contains("junk"), "{why}");
    assert_eq!(b.read_string("/x/y").unwrap(), "2");
}
