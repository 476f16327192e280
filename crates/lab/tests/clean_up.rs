//! Whatever ends the program, its children and its folder go with it. Needs no emulated host.

use anyhow::{Context, Result, ensure};
use lab::process::{self, Scratch};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Tells the program below how to end.
const END: &str = "FERRY_TEST_END";

/// What the tests start: a program with a child and a scratch folder, which it names on a line.
#[test]
#[ignore = "the other tests of this file run it"]
fn the_program() -> Result<()> {
    let Some(end) = std::env::var_os(END) else { return Ok(()) };
    let limit = (end == "limit").then_some(Duration::from_secs(1));
    process::end_cleanly(limit)?;
    let scratch = Scratch::new()?;
    let mut command = Command::new("sh");
    command.args(["-c", "sleep 1000 & wait"]).stdout(Stdio::null());
    let child = process::spawn(command)?;
    let mark = scratch.path().with_extension("mark");
    std::fs::write(&mark, "")?;
    process::at_end(move || drop(std::fs::remove_file(mark)));
    println!("\nready {} {}", child.id(), scratch.path().display());
    if end == "panic" {
        // Of any thread.
        let _ = std::thread::spawn(|| panic!("as the test wants")).join();
    }
    std::thread::sleep(Duration::from_secs(100));
    Ok(())
}

struct Started {
    program: Child,
    child: u32,
    folder: String,
}

fn start(end: &str) -> Result<Started> {
    let mut program = Command::new(std::env::current_exe()?)
        .args(["--ignored", "--exact", "the_program", "--nocapture", "--test-threads=1"])
        .env(END, end)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    for line in BufReader::new(program.stdout.take().context("no output")?).lines() {
        let line = line?;
        let mut words = line.split(' ').skip_while(|word| *word != "ready").skip(1);
        if let (Some(child), Some(folder)) = (words.next(), words.next()) {
            return Ok(Started { program, child: child.parse()?, folder: folder.to_owned() });
        }
    }
    anyhow::bail!("the program did not come up")
}

/// The program ends with this code, and nothing of it is left.
fn ends(mut started: Started, code: i32) -> Result<()> {
    let status = started.program.wait()?;
    ensure!(status.code() == Some(code), "it ended with {status}, not {code}");
    ensure!(!Path::new(&started.folder).exists(), "{} is left", started.folder);
    ensure!(!Path::new(&started.folder).with_extension("mark").exists(), "what was to be done at the end was not");
    let end = Instant::now() + Duration::from_secs(5);
    while Path::new(&format!("/proc/{}/exe", started.child)).exists() {
        ensure!(Instant::now() < end, "its child {} still runs", started.child);
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn signals_leave_nothing() -> Result<()> {
    for (signal, number) in [("INT", 2), ("TERM", 15), ("HUP", 1)] {
        let started = start("signal")?;
        ensure!(Path::new(&started.folder).is_dir() && Path::new(&format!("/proc/{}", started.child)).exists());
        Command::new("kill").args(["-s", signal, &started.program.id().to_string()]).status()?;
        ends(started, 128 + number).with_context(|| format!("SIG{signal}"))?;
    }
    Ok(())
}

#[test]
fn a_panic_leaves_nothing() -> Result<()> {
    ends(start("panic")?, 101)
}

#[test]
fn the_time_limit_leaves_nothing() -> Result<()> {
    ends(start("limit")?, 124)
}
