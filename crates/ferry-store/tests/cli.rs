//! The command against a daemon of ours.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};
use xenstore_client::{Access, Client, Nodes, Perm};
use xenstored::Options;
use xenstored::daemon::{Daemon, JournalPlace, log::Log};

fn run(socket: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ferry-store")).arg("--socket").arg(socket).args(args).output().unwrap()
}

fn text(o: &Output) -> String {
    String::from_utf8_lossy(&o.stdout).into_owned()
}

#[test]
fn list_export_change_compare_import() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    // SAFETY: the only test of this process, before any thread is started.
    unsafe { std::env::set_var("XENSTORED_PATH", &socket) };
    let log = Log::start(None, false, false).unwrap();
    let place = JournalPlace { dir: dir.path().to_owned(), on: false };
    std::thread::spawn(move || Daemon::start(Options::default(), log, None, place).unwrap().run());
    let end = Instant::now() + Duration::from_secs(20);
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut c = Client::connect(&socket).unwrap();
    c.write("/a/b", "x\"\n").unwrap();
    c.write("/a/c/d", "1").unwrap();
    c.set_perms("/a/b", &[Perm::new(Access::NONE, 0), Perm::new(Access::READ, 3)]).unwrap();
    assert_eq!(text(&run(&socket, &["ls", "/a"])), "/a\n  b = \"x\\\"\\n\"\n  c\n    d = \"1\"\n");
    assert_eq!(text(&run(&socket, &["ls", "-pf", "/a/b"])), "/a/b = \"x\\\"\\n\"  (n0,r3)\n");
    assert!(text(&run(&socket, &["--color", "always", "ls", "/a"])).contains("\x1b[32m"));
    let json = text(&run(&socket, &["--json", "ls", "/a/c/d"]));
    assert_eq!(json.trim(), r#"[{"path":"/a/c/d","perms":["n0"],"value":"1"}]"#);

    let file = dir.path().join("export");
    let file = file.to_str().unwrap();
    assert!(run(&socket, &["export", file, "/a"]).status.success());
    assert_eq!(run(&socket, &["diff", file]).status.code(), Some(0));
    c.write("/a/c/d", "2").unwrap();
    c.rm("/a/b").unwrap();
    c.write("/a/new", "").unwrap();
    let d = run(&socket, &["diff", file]);
    assert_eq!(d.status.code(), Some(1));
    let want = "- /a/b = \"x\\\"\\n\" (n0,r3)\n- /a/c/d = \"1\" (n0)\n+ /a/c/d = \"2\" (n0)\n+ /a/new = \"\" (n0)\n";
    assert_eq!(text(&d), want);
    assert!(run(&socket, &["import", file]).status.success());
    assert_eq!(text(&run(&socket, &["diff", file])), "+ /a/new = \"\" (n0)\n");
    assert_eq!(c.get_perms("/a/b").unwrap().len(), 2);

    let none = run(&socket, &["ls", "/nothing"]);
    assert_eq!(none.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&none.stderr).contains("xenstore READ /nothing: ENOENT (no such node)"));

    let s = socket.clone();
    let watcher = std::thread::spawn(move || run(&s, &["watch", "/a/c", "-n", "2", "--seconds", "20"]));
    let end = Instant::now() + Duration::from_secs(20);
    while !watcher.is_finished() {
        assert!(Instant::now() < end, "no events");
        c.write("/a/c/d", "9").unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
    let seen = text(&watcher.join().unwrap());
    assert!(seen.lines().count() == 2 && seen.contains("/a/c/d \"9\""), "{seen}");
}
