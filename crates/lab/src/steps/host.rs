//! What the steps need of a host. The trait has a real host behind it and, in the tests, one that answers from a script.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lab_agent::frame::Kind;
use lab_agent::message::{Done, Exec, Failed, Request};

use crate::host::Host;
use crate::qemu;

/// How a command in a dom0 ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Exited(i32),
    Signalled(i32),
    TimedOut,
}

/// A command that was run in a dom0.
#[derive(Clone, Debug)]
pub struct Ran {
    pub end: End,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// True if it ended with exit code 0.
    pub fn success(&self) -> bool {
        self.end == End::Exited(0)
    }

    /// All that it wrote.
    pub fn text(&self) -> String {
        let joined = self.stdout.is_empty() || self.stderr.is_empty() || self.stdout.ends_with('\n');
        let gap = if joined { "" } else { "\n" };
        format!("{}{gap}{}", self.stdout, self.stderr)
    }

    /// How it ended, and the last lines that it wrote, for a message.
    pub fn describe(&self) -> String {
        let end = match self.end {
            End::Exited(code) => format!("exit code {code}"),
            End::Signalled(signal) => format!("ended by signal {signal}"),
            End::TimedOut => "not done in time".to_owned(),
        };
        let text = self.text();
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let last: String =
            lines.iter().skip(lines.len().saturating_sub(12)).map(|line| format!("\n    | {line}")).collect();
        format!("{end}{last}")
    }
}

/// A host, as the steps see it.
pub trait LabHost: Send + Sync {
    /// Its name in the scenario.
    fn name(&self) -> &str;
    /// Runs a shell script in dom0. An error means that it could not be run at all.
    fn shell(&self, script: &str, limit: Duration) -> Result<Ran>;
    /// Writes a file in dom0.
    fn put(&self, bytes: &[u8], path: &str, mode: u32) -> Result<()>;
    /// Reads a file of dom0.
    fn get(&self, path: &str) -> Result<Vec<u8>>;
    /// Stops the host's vCPUs.
    fn pause(&self) -> Result<()>;
    /// Lets them go on.
    fn resume(&self) -> Result<()>;
    /// Switches the host off.
    fn kill(&self);
    /// The last lines of Xen's and dom0's console.
    fn console_tail(&self) -> String;
}

impl LabHost for Host {
    fn name(&self) -> &str {
        Host::name(self)
    }

    fn shell(&self, script: &str, limit: Duration) -> Result<Ran> {
        let exec = Exec {
            argv: vec!["bash".into(), "-c".into(), script.into()],
            timeout_ms: Some(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)),
            ..Exec::default()
        };
        let stream = self.open(&Request::Exec(exec))?;
        stream.send_all(&[])?;
        // dom0 keeps the limit itself; this one is for a dom0 that stands still.
        let end = Instant::now() + limit + Duration::from_secs(15);
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let Some(frame) = stream.next_while(Duration::from_millis(200), || self.check())? else {
                if Instant::now() > end {
                    return Ok(Ran { end: End::TimedOut, stdout: text(&stdout), stderr: text(&stderr) });
                }
                continue;
            };
            match frame.kind {
                Kind::Data => stdout.extend_from_slice(&frame.body),
                Kind::ErrorData => stderr.extend_from_slice(&frame.body),
                Kind::Done => {
                    let end = match serde_json::from_slice(&frame.body).context("the agent's answer")? {
                        Done::Exited { code } => End::Exited(code),
                        Done::Signalled { signal } => End::Signalled(signal),
                        Done::TimedOut => End::TimedOut,
                        Done::Started { .. } | Done::Ok => End::Exited(0),
                    };
                    return Ok(Ran { end, stdout: text(&stdout), stderr: text(&stderr) });
                }
                Kind::Failed => {
                    let failed: Failed = serde_json::from_slice(&frame.body).context("the agent's answer")?;
                    bail!("{}: {}", Host::name(self), failed.reason);
                }
                other => bail!("{}: the agent sent a frame of kind {other:?} on a request's stream", Host::name(self)),
            }
        }
    }

    fn put(&self, bytes: &[u8], path: &str, mode: u32) -> Result<()> {
        Host::put(self, bytes, path, mode)
    }

    fn get(&self, path: &str) -> Result<Vec<u8>> {
        Host::get(self, path)
    }

    fn pause(&self) -> Result<()> {
        Host::pause(self)
    }

    fn resume(&self) -> Result<()> {
        Host::resume(self)
    }

    fn kill(&self) {
        Host::kill(self);
    }

    fn console_tail(&self) -> String {
        qemu::tail(self.console(), 15)
    }
}
