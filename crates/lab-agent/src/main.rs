//! `lab-agent`: `/init` of the lab's dom0.
//!
//! As process 1 it makes the system usable and then only reaps; the agent proper is its child, so that a crash of the
//! agent is seen (and the agent started again) and orphans never mix with the agent's own children.

mod agent;
mod boot;
mod exec;
mod files;
mod toolstack;

use std::os::unix::process::CommandExt;
use std::process::Command;

fn main() {
    let agent = std::env::args().nth(1).as_deref() == Some("agent");
    if agent {
        let error = agent::serve();
        boot::log(&format!("agent ended: {error:#}"));
        std::process::exit(1);
    }
    if std::process::id() != 1 {
        eprintln!("lab-agent is the init of the lab's dom0 and runs only there");
        std::process::exit(2);
    }
    if let Err(error) = boot::set_up() {
        boot::log(&format!("dom0 set-up failed: {error:#}"));
    }
    reap_for_ever();
}

/// Keeps the agent running and collects every orphan.
fn reap_for_ever() -> ! {
    let mut agent = start_agent();
    loop {
        match rustix::process::wait(rustix::process::WaitOptions::empty()) {
            Ok(Some((pid, status))) => {
                if Some(pid.as_raw_nonzero().get().cast_unsigned()) == agent {
                    boot::log(&format!("the agent ended ({status:?}); starting it again"));
                    std::thread::sleep(std::time::Duration::from_millis(500));
                    agent = start_agent();
                }
            }
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => {
                std::thread::sleep(std::time::Duration::from_secs(1));
                if agent.is_none() {
                    agent = start_agent();
                }
            }
        }
    }
}

fn start_agent() -> Option<u32> {
    match Command::new("/proc/self/exe").arg0("lab-agent").arg("agent").spawn() {
        Ok(child) => Some(child.id()),
        Err(error) => {
            boot::log(&format!("the agent could not be started: {error}"));
            None
        }
    }
}
