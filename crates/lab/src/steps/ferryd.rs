//! How ferryd runs in a dom0: under a loop that starts it again when it ends, as a service manager would, and with
//! faults planted in its first run only. No I/O; a step hands the scripts to a host.

use super::plan::shell_word;

/// Process id of the loop, and of the daemon that it has started last.
const LOOP_PID: &str = "/run/ferryd-loop.pid";
/// The daemon's log; also the loop's, a line each time that the daemon has ended.
pub const LOG: &str = "/var/log/xen/ferryd.log";

/// An emulated host is too slow for the usual limit of the blackout.
const CONFIG: &str = "mode = \"transparent\"\n[transport]\ninsecure-tcp = true\n[limits]\ndowntime-ms = 60000\n";

/// Writes the configuration unless there is one.
pub fn configure() -> String {
    let config = shell_word(CONFIG);
    format!("mkdir -p /etc/ferry && {{ [ -e /etc/ferry/ferry.toml ] || printf %s {config} > /etc/ferry/ferry.toml; }}")
}

/// Kills the daemon and its loop as `kill -9` does, if they run, and waits until they are gone.
pub fn stop() -> String {
    // A zombie has no /proc/PID/exe.
    format!(
        "if [ -e {LOOP_PID} ]; then l=$(cat {LOOP_PID}); kill -9 -- -$l 2>/dev/null; \
         for i in $(seq 100); do [ -n \"$(for p in $(pgrep -g $l); do readlink /proc/$p/exe; done)\" ] || break; \
         sleep 0.1; done; rm -f {LOOP_PID}; fi"
    )
}

/// Starts the daemon with these faults planted (`<point>=<cut|fail|crash|panic|hang>`) and waits until it takes commands. With
/// `respawn` it is started again, without faults, whenever it ends.
pub fn start(faults: &[String], respawn: bool) -> String {
    let daemon = format!("FERRY_LOG=info ferry daemon >> {LOG} 2>&1 < /dev/null");
    let planted = if faults.is_empty() { String::new() } else { format!("FERRY_FAULT={} ", faults.join(",")) };
    let again = if respawn {
        format!("; while sleep 1; do {daemon}; echo \"ended: $?\" >> {LOG}; done")
    } else {
        String::new()
    };
    let body = shell_word(&format!("{planted}{daemon}; echo \"ended: $?\" >> {LOG}{again}"));
    // The loop is the leader of its own process group, by which it is stopped.
    format!(
        "{}; setsid bash -c {body} > /dev/null 2>&1 < /dev/null & echo $! > {LOOP_PID}\n\
         for i in $(seq 200); do ferry status > /dev/null 2>&1 && exit 0; sleep 0.1; done; tail -n 20 {LOG}; exit 1",
        configure()
    )
}

/// Writes how often a fault planted at the point has come to pass.
pub fn count_fired(point: &str) -> String {
    format!("grep -cF -- {} {LOG} || true", shell_word(&format!("planted fault at {point}:")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The real scripts, with a daemon that writes its faults to the log and ends at once if it has any.
    #[test]
    fn the_daemon_is_started_again_without_faults_and_stopped_for_good() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let fake = "#!/bin/bash\ncase $1 in\nstatus) [ -e $ROOM/up ];;\n\
                    daemon) touch $ROOM/up; echo \"run with: $FERRY_FAULT\"; [ -z \"$FERRY_FAULT\" ] || exit 134; exec sleep 100;;\nesac\n";
        std::fs::write(at("ferry"), fake).unwrap();
        std::fs::set_permissions(at("ferry"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let room = folder.path().display().to_string();
        let shell = |script: &str| {
            let script = script.replace("/run/", &format!("{room}/")).replace("/var/log/xen/", &format!("{room}/"));
            let script = script.replace("/etc/ferry", &format!("{room}/etc"));
            let path = format!("{room}:{}", std::env::var("PATH").unwrap());
            let mut bash = std::process::Command::new("bash");
            // As the lab's agent does it: the script leads a process group.
            std::os::unix::process::CommandExt::process_group(&mut bash, 0);
            bash.args(["-c", &script]).env("PATH", path).env("ROOM", &room).output().unwrap()
        };
        let log = || std::fs::read_to_string(at("ferryd.log")).unwrap_or_default();
        let started = shell(&start(&["source.before.freeze=crash".to_owned()], true));
        assert!(started.status.success(), "{started:?}");
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !log().ends_with("run with: \n") {
            assert!(std::time::Instant::now() < end, "{}", log());
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        assert_eq!(log(), "run with: source.before.freeze=crash\nended: 134\nrun with: \n");
        let pid = std::fs::read_to_string(at("ferryd-loop.pid")).unwrap();
        assert!(shell(&stop()).status.success());
        let left = shell(&format!("pgrep -r R,S,D -g {}", pid.trim()));
        assert!(left.stdout.is_empty(), "{left:?}");
        // There is none to stop now, which is well too.
        assert!(shell(&stop()).status.success());
        assert!(at("etc/ferry.toml").exists());
    }
}
