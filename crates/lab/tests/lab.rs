//! The lab tested by itself: hosts do what they are told, and nothing is left of them whatever ends the program.
//!
//! These boot emulated hosts and need the static programs (`cargo xtask build`); `cargo xtask test` runs them.

use anyhow::{Context, Result, bail, ensure};
use lab::host::{Assets, Disk, Host, HostConfig};
use lab::lock::Lock;
use lab::process::Scratch;
use lab_agent::message::{Done, Exec, Request, Start};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const BOOT: Duration = Duration::from_secs(300);
const WAIT: Duration = Duration::from_secs(1500);

fn bash(script: &str) -> Exec {
    Exec { argv: vec!["bash".into(), "-c".into(), script.into()], ..Exec::default() }
}

/// Bytes that look random and are the same every time.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    })
    .take(len)
    .collect()
}

#[test]
#[ignore = "boots emulated hosts; cargo xtask test runs it"]
fn hosts_do_what_they_are_told() -> Result<()> {
    let assets = Assets::prepare()?;
    let _lock = Lock::take(Some(WAIT))?;
    let scratch = Scratch::new()?;
    let run = tempfile::tempdir()?;
    let image = scratch.path().join("lun.raw");
    fs::File::create(&image)?.set_len(16 << 20)?;
    let disks = vec![Disk { serial: "lun".into(), image }];
    let ahead = HostConfig { wallclock_skew_ms: 3_600_250, disks: disks.clone(), ..HostConfig::new("a") };
    let a = Host::launch(&assets, ahead, run.path(), scratch.path())?;
    let b = Host::launch(&assets, HostConfig { disks, ..HostConfig::new("b") }, run.path(), scratch.path())?;
    a.wait_ready(BOOT)?;
    b.wait_ready(BOOT)?;

    commands(&a)?;
    files(&a)?;
    clock(&a)?;
    stopped(&a)?;
    shared_disk(&a, &b)?;
    ensure!(a.sh("hostname")?.trim() == "a" && b.sh("hostname")?.trim() == "b");
    ensure!(a.sh("xl list")?.contains("Domain-0"), "the toolstack does not answer");

    b.kill();
    let since = Instant::now();
    let Err(error) = b.sh("true") else { bail!("a dead host answered") };
    ensure!(since.elapsed() < Duration::from_secs(10), "it took long to see that a host is dead");
    ensure!(format!("{error:#}").contains('b'), "the message does not name the host: {error:#}");
    ensure!(a.sh("echo alive")?.trim() == "alive", "the other host suffered");
    Ok(())
}

fn commands(host: &Host) -> Result<()> {
    let output = host.exec(&bash("echo out; echo err >&2; exit 3"))?;
    ensure!(output.done == Done::Exited { code: 3 } && output.stdout == b"out\n" && output.stderr == b"err\n");
    ensure!(host.exec(&bash("kill -9 $$"))?.done == Done::Signalled { signal: 9 });

    let output = host.request(&Request::Exec(bash("tr a-z A-Z")), b"typed")?;
    ensure!(output.stdout == b"TYPED", "standard input did not arrive: {output:?}");

    let since = Instant::now();
    let slow = Exec { timeout_ms: Some(500), ..bash("sleep 100 & sleep 100") };
    ensure!(host.exec(&slow)?.done == Done::TimedOut && since.elapsed() < Duration::from_secs(20));

    // A daemon that keeps the output open does not keep the lab waiting.
    let since = Instant::now();
    ensure!(host.exec(&bash("sleep 100 & echo started"))?.stdout == b"started\n");
    ensure!(since.elapsed() < Duration::from_secs(20));

    let started = host.exec(&Exec { background: Some("/tmp/bg.log".into()), ..bash("echo $$ here") })?;
    let Done::Started { pid } = started.done else { bail!("not started: {started:?}") };
    host.sh("for i in $(seq 100); do grep -q here /tmp/bg.log && exit 0; sleep 0.1; done; exit 1")?;
    ensure!(host.sh("cat /tmp/bg.log")?.trim() == format!("{pid} here"));

    let answers: Vec<Result<String>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|i| scope.spawn(move || host.sh(&format!("sleep 0.3; echo {i}")))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| bail!("a thread panicked"))).collect()
    });
    for (i, answer) in answers.into_iter().enumerate() {
        ensure!(answer?.trim() == i.to_string(), "answers of commands under way at once were mixed up");
    }

    let Err(error) = host.exec(&Exec { argv: vec!["/no/such".into()], ..Exec::default() }) else {
        bail!("a program that is not there ran")
    };
    ensure!(format!("{error:#}").contains("/no/such"), "{error:#}");
    let Err(error) = host.request(&Request::Start(Start::default()), &[]) else { bail!("started twice") };
    ensure!(format!("{error:#}").contains("before"), "{error:#}");
    Ok(())
}

fn files(host: &Host) -> Result<()> {
    let bytes = noise(24 << 20);
    let since = Instant::now();
    host.put(&bytes, "/tmp/new/folder/noise", 0o640)?;
    let put = since.elapsed();
    ensure!(host.sh("stat -c %a:%s /tmp/new/folder/noise")?.trim() == format!("640:{}", bytes.len()));
    let since = Instant::now();
    ensure!(host.get("/tmp/new/folder/noise")? == bytes, "a file changed on its way to dom0 and back");
    let rate = |took: Duration| bytes.len() as f64 / 1e6 / took.as_secs_f64();
    eprintln!("files: {:.0} MB/s in, {:.0} MB/s out", rate(put), rate(since.elapsed()));
    let Err(error) = host.get("/no/such/file") else { bail!("a file that is not there was read") };
    ensure!(format!("{error:#}").contains("/no/such/file"), "{error:#}");
    Ok(())
}

fn clock(host: &Host) -> Result<()> {
    let there: u64 = host.sh("date +%s")?.trim().parse()?;
    let here = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() + 3600;
    ensure!(there.abs_diff(here) <= 5, "the clock is {there}, expected {here}");
    Ok(())
}

fn stopped(host: &Host) -> Result<()> {
    host.pause()?;
    let answer = std::thread::scope(|scope| {
        let asked = scope.spawn(|| host.sh("echo back"));
        std::thread::sleep(Duration::from_secs(2));
        let early = asked.is_finished();
        host.resume()?;
        ensure!(!early, "a stopped host answered");
        asked.join().unwrap_or_else(|_| bail!("a thread panicked"))
    })?;
    ensure!(answer.trim() == "back");
    Ok(())
}

fn shared_disk(a: &Host, b: &Host) -> Result<()> {
    for round in 0..5 {
        let (from, to) = if round % 2 == 0 { (a, b) } else { (b, a) };
        from.sh(&format!(
            "printf 'round {round}' | dd of=/dev/disk/by-id/lun bs=4096 seek=7 count=1 conv=sync oflag=direct 2>&1"
        ))?;
        let read = to.sh("dd if=/dev/disk/by-id/lun bs=4096 skip=7 count=1 iflag=direct 2>/dev/null | tr -d '\\0'")?;
        ensure!(read == format!("round {round}"), "a write on one host is not seen on the other: {read:?}");
    }
    Ok(())
}

/// The files of the cache's folder of saved states, with their times.
fn states() -> Result<Vec<(SystemTime, std::path::PathBuf)>> {
    let folder = lab::cache::Cache::open()?.path("states");
    let mut states = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        states.push((entry.metadata()?.modified()?, entry.path()));
    }
    states.sort();
    Ok(states)
}

#[test]
#[ignore = "boots emulated hosts; cargo xtask test runs it"]
fn a_host_goes_on_from_its_saved_state_and_boots_if_that_is_broken() -> Result<()> {
    let assets = Assets::prepare()?;
    let _lock = Lock::take(Some(WAIT))?;
    let run = tempfile::tempdir()?;
    // An option that Xen ignores makes this host unlike any other, so that the state is this test's own.
    let config = || HostConfig { xen_options: format!("lab-test={}", std::process::id()), ..HostConfig::new("a") };
    let boot = || -> Result<(f64, Duration)> {
        let scratch = Scratch::new()?;
        let since = Instant::now();
        let host = Host::launch(&assets, config(), run.path(), scratch.path())?;
        host.wait_ready(BOOT)?;
        let took = since.elapsed();
        ensure!(host.sh("xl list")?.contains("Domain-0"), "the toolstack does not answer");
        let uptime = host.sh("cut -d' ' -f1 /proc/uptime")?.trim().parse()?;
        Ok((uptime, took))
    };
    let before = states()?.len();
    let (_, cold) = boot()?;
    let (_, path) = states()?.pop().context("no state was saved")?;
    let (_, warm) = boot()?;
    eprintln!("states: {before} before; booted in {cold:.1?}, went on from the saved state in {warm:.1?}");
    ensure!(warm < cold, "going on from a saved state took {warm:.1?}, booting {cold:.1?}");
    let size = fs::metadata(&path)?.len();
    fs::OpenOptions::new().write(true).open(&path)?.set_len(size / 2)?;
    boot().context("with half a saved state")?;
    ensure!(fs::metadata(&path)?.len() > size / 2, "the broken state was not replaced");
    fs::remove_file(&path)?;
    Ok(())
}

/// `ferry-lab exec` with a script that says "ready" and stays.
fn staying(run: &Path) -> Result<Child> {
    let script = run.join("script");
    fs::write(&script, "echo ready; sleep 1000\n")?;
    let mut child = Command::new(env!("CARGO_BIN_EXE_ferry-lab"))
        .args(["exec", "--shared-disk", "16", "--wait", "1500", "--run-dir"])
        .arg(run)
        .arg(&script)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("no output")?).read_line(&mut line)?;
    ensure!(line == "ready\n", "the lab did not come up: {line:?}");
    Ok(child)
}

/// The processes whose parent is `parent`.
fn children(parent: u32) -> Vec<u32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.lines().any(|line| line.strip_prefix("PPid:").is_some_and(|id| id.trim() == parent.to_string()))
        })
        .collect()
}

/// Scratch folders of a process.
fn leavings(of: u32) -> usize {
    let prefix = format!("ferry-lab-{of}-");
    fs::read_dir(std::env::temp_dir())
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .count()
}

fn gone(pids: &[u32]) -> bool {
    let end = Instant::now() + Duration::from_secs(5);
    while Instant::now() < end {
        if pids.iter().all(|pid| !Path::new(&format!("/proc/{pid}/exe")).exists()) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    false
}

#[test]
#[ignore = "boots emulated hosts; cargo xtask test runs it"]
fn nothing_is_left_after_a_signal() -> Result<()> {
    let run = tempfile::tempdir()?;
    let mut lab = staying(run.path())?;
    let machines = children(lab.id());
    ensure!(!machines.is_empty() && leavings(lab.id()) == 1, "{machines:?}, {} folders", leavings(lab.id()));

    // Meanwhile no second lab may run, and the message says who holds it.
    let second = Command::new(env!("CARGO_BIN_EXE_ferry-lab"))
        .args(["exec", "--run-dir"])
        .arg(run.path().join("second"))
        .arg(run.path().join("script"))
        .output()?;
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    ensure!(second.status.code() == Some(1) && said.contains(&format!("process {}", lab.id())), "{said}");

    Command::new("kill").arg(lab.id().to_string()).status()?;
    ensure!(lab.wait()?.code() == Some(128 + 15));
    ensure!(gone(&machines), "{machines:?} still run");
    ensure!(leavings(lab.id()) == 0, "a scratch folder is left");
    Ok(())
}

#[test]
#[ignore = "boots emulated hosts; cargo xtask test runs it"]
fn a_dead_qemu_ends_the_run_with_one_message() -> Result<()> {
    let run = tempfile::tempdir()?;
    let scenario = run.path().join("dies.toml");
    fs::write(
        &scenario,
        "about = \"x\"\n[[host]]\nname = \"a\"\n[[step]]\nexec = { on = \"a\", run = \"sleep 1000\", limit = \"20m\" }\n",
    )?;
    let mut lab = Command::new(env!("CARGO_BIN_EXE_ferry-lab"))
        .args(["run", "--wait", "1500", "--run-dir"])
        .arg(run.path())
        .arg(&scenario)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut said = BufReader::new(lab.stderr.take().context("no output")?).lines();
    for line in &mut said {
        if line?.contains("step 1/1") {
            break;
        }
    }
    let id = lab.id();
    let machines = children(id);
    let [machine] = machines[..] else { bail!("not one machine: {machines:?}") };
    Command::new("kill").args(["-KILL", &machine.to_string()]).status()?;
    let since = Instant::now();
    let output = lab.wait_with_output()?;
    ensure!(since.elapsed() < Duration::from_secs(60), "it took {:.1?} to see that QEMU is dead", since.elapsed());
    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.code() == Some(1), "it ended with {}: {report}", output.status);
    ensure!(report.matches("a: QEMU ended").count() == 1 && report.contains("FAILED"), "{report}");
    ensure!(gone(&machines) && leavings(id) == 0, "something is left");
    Ok(())
}

#[test]
#[ignore = "boots emulated hosts; cargo xtask test runs it"]
fn no_process_is_left_after_a_kill() -> Result<()> {
    let run = tempfile::tempdir()?;
    let mut lab = staying(run.path())?;
    let machines = children(lab.id());
    ensure!(!machines.is_empty());
    lab.kill()?;
    lab.wait()?;
    ensure!(gone(&machines), "{machines:?} still run");
    // Its folder could not be removed by a killed program; the next lab does that.
    ensure!(leavings(lab.id()) == 1);
    let _lock = Lock::take(Some(WAIT))?;
    let _scratch = Scratch::new()?;
    ensure!(leavings(lab.id()) == 0, "the folder of a killed lab is left");
    Ok(())
}

#[test]
#[ignore = "boots emulated hosts; cargo xtask test runs it"]
fn the_scripts_exit_code_is_the_labs() -> Result<()> {
    let run = tempfile::tempdir()?;
    let script = run.path().join("script");
    fs::write(&script, "cat /root/given; echo \"$1\"; echo made > /root/made; exit 42\n")?;
    fs::write(run.path().join("given"), "given\n")?;
    let output = Command::new(env!("CARGO_BIN_EXE_ferry-lab"))
        .args(["exec", "--shared-disk", "16", "--wait", "1500", "--run-dir"])
        .arg(run.path())
        .arg("--put")
        .arg(format!("{}:/root/given", run.path().join("given").display()))
        .arg("--get")
        .arg(format!("/root/made:{}", run.path().join("made").display()))
        .arg(&script)
        .args(["--", "argument"])
        .output()?;
    ensure!(output.status.code() == Some(42), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(output.stdout == b"given\nargument\n", "{:?}", String::from_utf8_lossy(&output.stdout));
    ensure!(fs::read_to_string(run.path().join("made"))? == "made\n");
    ensure!(run.path().join("a/dom0-log.tar").is_file(), "dom0's logs were not kept");
    Ok(())
}

#[test]
#[ignore = "boots emulated hosts; cargo xtask test runs it"]
fn a_run_leaves_what_is_asked_for_and_no_more() -> Result<()> {
    let run = tempfile::tempdir()?;
    let (scenario, json) = (run.path().join("small.toml"), run.path().join("small.json"));
    fs::write(
        &scenario,
        "about = \"x\"\n[[host]]\nname = \"a\"\n[[disk]]\nname = \"lun\"\n[[step]]\n\
         exec = { on = \"a\", run = \"printf kept | dd of=/dev/disk/by-id/lun conv=fsync; hostname\", expect = \"a\" }\n",
    )?;
    let lab = Command::new(env!("CARGO_BIN_EXE_ferry-lab"))
        .args(["run", "--keep", "--wait", "1500", "--run-dir"])
        .arg(run.path())
        .arg("--json")
        .arg(&json)
        .arg(&scenario)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let id = lab.id();
    let output = lab.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{said}");
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&json)?)?;
    ensure!(report["passed"] == true && report["steps"][0]["error"].is_null(), "{report}");
    ensure!(report["took"].as_f64().is_some_and(|took| took > 0.0), "durations are seconds: {}", report["took"]);
    ensure!(fs::read(run.path().join("small/lun.raw"))?.starts_with(b"kept"), "--keep kept another disk");
    ensure!(run.path().join("small/a/console.log").is_file() && run.path().join("small/network.pcap").is_file());
    ensure!(leavings(id) == 0, "a scratch folder is left");
    Ok(())
}

#[test]
#[ignore = "boots emulated hosts; cargo xtask test runs it"]
fn a_person_gets_a_prompt_on_each_host() -> Result<()> {
    let run = tempfile::tempdir()?;
    let since = Instant::now();
    let mut lab = Command::new(env!("CARGO_BIN_EXE_ferry-lab"))
        .args(["shell", "--hosts", "2", "--wait", "1500", "--run-dir"])
        .arg(run.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let id = lab.id();
    // To the first host, and by Ctrl-] to the second. When both shells have ended, so does the lab.
    let keys = b"echo \"I am <$(hostname)>\"; exit\n\x1dbecho \"I am <$(hostname)>\"; exit\n";
    lab.stdin.take().context("no input")?.write_all(keys)?;
    let output = lab.wait_with_output()?;
    let (seen, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    eprintln!("two prompts, used and ended, in {:.1?}", since.elapsed());
    ensure!(output.status.success(), "{said}");
    ensure!(seen.contains("I am <a>") && seen.contains("I am <b>"), "{seen}\n{said}");
    ensure!(leavings(id) == 0, "a scratch folder is left");
    Ok(())
}

#[test]
fn a_script_that_is_not_there_is_named() -> Result<()> {
    let output = Command::new(env!("CARGO_BIN_EXE_ferry-lab")).args(["exec", "/no/such/script"]).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1) && said.contains("/no/such/script"), "{said}");
    Ok(())
}
