//! Programs that the lab runs in dom0.

use crate::agent::{Input, Output};
use anyhow::{Context, Result, bail};
use lab_agent::frame::{Frame, Kind};
use lab_agent::message::{Done, Exec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const CHUNK: usize = 64 << 10;

/// Runs a program to its end (or starts it in the background).
pub fn run(program: &Exec, stream: u32, input: &mpsc::Receiver<Input>, output: &Output) -> Result<Done> {
    let Some((name, arguments)) = program.argv.split_first() else { bail!("there is no program to run") };
    let mut command = Command::new(name);
    command.args(arguments).envs(program.env.iter().map(|(key, value)| (key, value)));
    command.current_dir(program.cwd.as_deref().unwrap_or("/root"));
    if let Some(log) = &program.background {
        return background(command, log).with_context(|| format!("start {name}"));
    }
    if let Some((rows, columns)) = program.terminal {
        return terminal(command, rows, columns, stream, input, output).with_context(|| format!("run {name}"));
    }
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("run {name}"))?;
    let over = Arc::new(AtomicBool::new(false));
    let mut readers = Vec::new();
    if let Some(pipe) = child.stdout.take() {
        readers.push(forward(OwnedFd::from(pipe), stream, Kind::Data, output, &over));
    }
    if let Some(pipe) = child.stderr.take() {
        readers.push(forward(OwnedFd::from(pipe), stream, Kind::ErrorData, output, &over));
    }
    let feeder = child.stdin.take().map(|pipe| feed(File::from(OwnedFd::from(pipe))));
    let done = supervise(
        &mut child,
        program.timeout_ms,
        |event| match event {
            Input::Data(bytes) => {
                if let Some(feeder) = &feeder {
                    let _ = feeder.send(Some(bytes));
                }
            }
            Input::End => {
                if let Some(feeder) = &feeder {
                    let _ = feeder.send(None);
                }
            }
            Input::Kill | Input::Resize(..) => {}
        },
        input,
    );
    over.store(true, Ordering::Release);
    for reader in readers {
        let _ = reader.join();
    }
    done
}

fn background(mut command: Command, log: &str) -> Result<Done> {
    let file = fs::OpenOptions::new().create(true).append(true).open(log).with_context(|| format!("open {log}"))?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(file.try_clone().context("duplicate the log")?)
        .stderr(file)
        .process_group(0)
        .spawn()?;
    let pid = child.id();
    std::thread::spawn(move || child.wait());
    Ok(Done::Started { pid })
}

/// Sends what comes out of `pipe`. It ends with the pipe, or a little after the program has: a daemon that the
/// program left behind may hold the pipe open for ever.
fn forward(
    pipe: OwnedFd,
    stream: u32,
    kind: Kind,
    output: &Output,
    over: &Arc<AtomicBool>,
) -> std::thread::JoinHandle<()> {
    let (output, over) = (output.clone(), Arc::clone(over));
    std::thread::spawn(move || {
        let mut pipe = File::from(pipe);
        let mut chunk = vec![0u8; CHUNK];
        loop {
            let last = over.load(Ordering::Acquire);
            let wait = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
            match poll(&mut [PollFd::new(&pipe, PollFlags::IN)], Some(&wait)) {
                Ok(0) if last => return,
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => {}
                Err(_) => return,
            }
            match pipe.read(&mut chunk) {
                Ok(n) if n > 0 => {
                    output.send(&Frame { stream, kind, body: chunk.get(..n).unwrap_or_default().to_vec() });
                }
                // A terminal whose last user is gone answers EIO.
                _ => return,
            }
        }
    })
}

/// A thread that writes to the program's standard input, so that a program which does not read can't stop the loop.
fn feed(mut pipe: File) -> mpsc::Sender<Option<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel::<Option<Vec<u8>>>();
    std::thread::spawn(move || {
        while let Ok(Some(bytes)) = receiver.recv() {
            if pipe.write_all(&bytes).is_err() {
                return;
            }
        }
    });
    sender
}

/// Waits for the program's end, its time limit, or a kill; passes all other input on.
fn supervise(
    child: &mut Child,
    timeout_ms: Option<u64>,
    mut pass: impl FnMut(Input),
    input: &mpsc::Receiver<Input>,
) -> Result<Done> {
    let group = Pid::from_child(child);
    let end = timeout_ms.map(|ms| Instant::now() + Duration::from_millis(ms));
    let pidfd = pidfd_open(group, PidfdFlags::empty()).context("watch the program")?;
    let mut timed_out = false;
    let mut lost = false;
    loop {
        let tick = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        let ended = poll(&mut [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)], Some(&tick)).unwrap_or(0) > 0;
        if ended {
            let status = child.wait().context("collect the program")?;
            if timed_out {
                return Ok(Done::TimedOut);
            }
            return Ok(match (status.code(), status.signal()) {
                (Some(code), _) => Done::Exited { code },
                (None, signal) => Done::Signalled { signal: signal.unwrap_or(0) },
            });
        }
        while !lost {
            match input.try_recv() {
                Ok(Input::Kill) => {
                    let _ = kill_process_group(group, Signal::KILL);
                }
                Ok(event) => pass(event),
                Err(mpsc::TryRecvError::Empty) => break,
                Err(mpsc::TryRecvError::Disconnected) => lost = true,
            }
        }
        if end.is_some_and(|end| Instant::now() >= end) && !timed_out {
            timed_out = true;
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

fn terminal(
    mut command: Command,
    rows: u16,
    columns: u16,
    stream: u32,
    input: &mpsc::Receiver<Input>,
    output: &Output,
) -> Result<Done> {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).context("open a terminal")?;
    grantpt(&master).context("grant the terminal")?;
    unlockpt(&master).context("unlock the terminal")?;
    let name = ptsname(&master, Vec::new()).context("name the terminal")?;
    let slave = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(name.to_str().context("the terminal's name is not text")?)
        .context("open the terminal's other end")?;
    let size = |rows, columns| rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let _ = rustix::termios::tcsetwinsize(&master, size(rows, columns));
    command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
    // SAFETY: between fork and exec only two system calls are made, both async-signal-safe, and no memory is taken.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    // The command holds copies of the terminal's other end, which must close with the program.
    drop(command);
    let over = Arc::new(AtomicBool::new(false));
    let reader = forward(master.try_clone()?, stream, Kind::Data, output, &over);
    let writer = feed(File::from(master.try_clone()?));
    let done = supervise(
        &mut child,
        None,
        |event| match event {
            Input::Data(bytes) => {
                let _ = writer.send(Some(bytes));
            }
            Input::Resize(rows, columns) => {
                let _ = rustix::termios::tcsetwinsize(&master, size(rows, columns));
            }
            Input::End | Input::Kill => {}
        },
        input,
    );
    over.store(true, Ordering::Release);
    let _ = reader.join();
    done
}
