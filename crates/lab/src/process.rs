//! Children that end with this program, whatever ends it.
//!
//! Each child leads its own session and asks the kernel to be killed when the thread that started it ends
//! (PR_SET_PDEATHSIG); one thread that lives as long as the program starts them all. On SIGINT, SIGTERM, SIGHUP and at
//! a time limit the groups are killed and the scratch folder removed before the program exits.

use crate::progress;
use anyhow::{Context, Result, anyhow};
use rustix::process::{Pid, Signal, kill_process_group, set_parent_process_death_signal};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

type Order = (Command, SyncSender<io::Result<Child>>);

/// What must be gone when the program ends.
#[derive(Default)]
struct Leavings {
    groups: Vec<Pid>,
    folders: Vec<PathBuf>,
    /// What else must be done then.
    acts: Vec<Box<dyn FnOnce() + Send>>,
}

fn leavings() -> MutexGuard<'static, Leavings> {
    static LEAVINGS: Mutex<Leavings> =
        Mutex::new(Leavings { groups: Vec::new(), folders: Vec::new(), acts: Vec::new() });
    LEAVINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn starter() -> &'static Mutex<mpsc::Sender<Order>> {
    static STARTER: OnceLock<Mutex<mpsc::Sender<Order>>> = OnceLock::new();
    STARTER.get_or_init(|| {
        let (sender, receiver) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, reply) in receiver {
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(sender)
    })
}

/// A child that is killed, with its process group, when this value is dropped or the program ends.
#[derive(Debug)]
pub struct Owned {
    child: Mutex<Child>,
    group: Pid,
}

/// Starts a child.
pub fn spawn(mut command: Command) -> Result<Owned> {
    let name = command.get_program().to_string_lossy().into_owned();
    // SAFETY: between fork and exec only two system calls are made, both async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            // A session of its own is also a process group, and what the kernel's scheduler weighs as one (autogroup).
            rustix::process::setsid()?;
            Ok(set_parent_process_death_signal(Some(Signal::KILL))?)
        });
    }
    let (reply, answer) = mpsc::sync_channel(1);
    starter()
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send((command, reply))
        .map_err(|_| anyhow!("the thread that starts children is gone"))?;
    let child =
        answer.recv().context("the thread that starts children is gone")?.with_context(|| format!("start {name}"))?;
    let group = Pid::from_child(&child);
    leavings().groups.push(group);
    Ok(Owned { child: Mutex::new(child), group })
}

impl Owned {
    /// The child's process id.
    pub fn id(&self) -> u32 {
        self.group.as_raw_nonzero().get().cast_unsigned()
    }

    /// Asks the scheduler to prefer it to other sessions on this machine, compilers for instance: an emulated guest's
    /// watchdogs and timers bite when it is starved. Needs privilege and a kernel with autogroups; without, nothing
    /// changes.
    pub fn prefer(&self) {
        let _ = std::fs::write(format!("/proc/{}/autogroup", self.id()), "-10");
    }

    /// How it ended, if it did.
    pub fn ended(&self) -> Option<ExitStatus> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner).try_wait().ok().flatten()
    }

    /// Kills it and waits until it is gone.
    pub fn kill(&self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        if !matches!(child.try_wait(), Ok(Some(_))) {
            let _ = kill_process_group(self.group, Signal::KILL);
            let _ = child.wait();
        }
    }

    /// Sends a signal to the child's group.
    pub fn signal(&self, signal: Signal) {
        if self.ended().is_none() {
            let _ = kill_process_group(self.group, signal);
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.kill();
        leavings().groups.retain(|group| *group != self.group);
    }
}

/// A folder for sockets and other things that must not stay; it goes when dropped or when the program ends.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

/// How the scratch folders' names begin.
const SCRATCH: &str = "ferry-lab-";

impl Scratch {
    /// Makes a scratch folder. Its path is short, because a socket's path may have at most 107 bytes. Folders that
    /// killed runs left behind are removed; the machine-wide lock must be held.
    pub fn new() -> Result<Scratch> {
        let base = std::env::temp_dir();
        for entry in std::fs::read_dir(&base).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let owner = name.strip_prefix(SCRATCH).and_then(|rest| rest.split('-').next()?.parse::<i32>().ok());
            if let Some(owner) = owner.and_then(Pid::from_raw)
                && rustix::process::test_kill_process(owner).is_err()
            {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let path = tempfile::Builder::new()
            .prefix(&format!("{SCRATCH}{}-", std::process::id()))
            .tempdir_in(base)
            .context("make a scratch folder")?
            .keep();
        leavings().folders.push(path.clone());
        Ok(Scratch { path })
    }

    /// Where it is.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
        leavings().folders.retain(|folder| *folder != self.path);
    }
}

/// Has something done when the program is ended by a signal, a panic or the time limit.
pub fn at_end(act: impl FnOnce() + Send + 'static) {
    leavings().acts.push(Box::new(act));
}

/// Kills every child, removes every scratch folder, and does what [`at_end`] was given.
pub fn clean_up() {
    let mut leavings = leavings();
    for act in leavings.acts.drain(..) {
        act();
    }
    for group in leavings.groups.drain(..) {
        let _ = kill_process_group(group, Signal::KILL);
    }
    for folder in leavings.folders.drain(..) {
        let _ = std::fs::remove_dir_all(folder);
    }
}

/// From now on a signal or the time limit ends the program cleanly: exit code 128 + signal, or 124. Also a panic of any
/// thread ends it, with 101, instead of leaving a half-dead lab.
pub fn end_cleanly(limit: Option<Duration>) -> Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals =
        signal_hook::iterator::Signals::new([SIGHUP, SIGINT, SIGTERM]).context("take over the signals' handling")?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            progress::say(format!("ended by signal {signal}; cleaning up"));
            clean_up();
            std::process::exit(128 + signal);
        }
    });
    if let Some(limit) = limit {
        std::thread::spawn(move || {
            std::thread::sleep(limit);
            progress::say(format!("the time limit of {} s is over; cleaning up", limit.as_secs()));
            clean_up();
            std::process::exit(124);
        });
    }
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        default(info);
        clean_up();
        std::process::exit(101);
    }));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_and_its_children_end_with_the_value() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 & wait"]);
        let child = spawn(command).expect("sh starts");
        let pid = child.id();
        let session = |pid: u32| rustix::process::getsid(Pid::from_raw(pid.cast_signed()));
        assert_eq!(session(pid).map(|id| id.as_raw_nonzero().get().cast_unsigned()), Ok(pid));
        let alive = || rustix::process::test_kill_process_group(child.group).is_ok();
        assert!(alive());
        let group = child.group;
        drop(child);
        for _ in 0..100 {
            if rustix::process::test_kill_process_group(group).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("something of the group is left");
    }

    #[test]
    fn a_scratch_folder_goes_with_the_value() {
        let scratch = Scratch::new().expect("a scratch folder");
        let path = scratch.path().to_owned();
        std::fs::write(path.join("file"), "x").expect("a file in it");
        drop(scratch);
        assert!(!path.exists());
    }
}
