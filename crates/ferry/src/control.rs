//! What commands say to the daemon over its socket: one JSON request on a line, answers on lines until the daemon closes.

use crate::exit::{Exit, Failure};
use anyhow::{Context, Result};
use migrate::report::{Progress, Report};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use uuid::Uuid;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Request {
    Migrate(Migrate),
    Status,
    Cancel {
        /// Id of a migration, or domid or name of its domain.
        which: String,
    },
    Resolve {
        which: String,
        peer_fenced: bool,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Migrate {
    /// Name or domid.
    pub domain: String,
    pub host: String,
    pub downtime_ms: Option<u64>,
    pub max_time_s: Option<u64>,
    pub dry_run: bool,
    /// Absolute path of a file that the daemon makes for the stream.
    #[serde(default)]
    pub record: Option<PathBuf>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum Answer {
    Progress(Progress),
    Report(Box<Report>),
    DryRun(DryRun),
    Status { migrations: Vec<Status> },
    Done,
    Failed { exit: u8, message: String },
}

/// What a migration would be like.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DryRun {
    pub domid: u16,
    pub name: String,
    pub memory_mib: u64,
    pub devices: Vec<String>,
    /// Why it would be refused; empty: it would not.
    pub refused: Vec<String>,
    /// What would not be as it was.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Pages a second that the guest dirties now.
    pub dirty_rate: u64,
    pub expected_blackout_ms: u64,
    pub downtime_limit_ms: u64,
}

/// A migration that the daemon knows of.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    pub id: Uuid,
    /// `out` or `in`.
    pub direction: String,
    pub domid: u16,
    pub name: String,
    /// The other host.
    pub peer: String,
    /// State of the handshake (docs/handshake.md).
    pub state: String,
    pub progress: Option<Progress>,
    pub waiting_for: Option<String>,
}

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    lines: std::io::Lines<BufReader<UnixStream>>,
}

impl Client {
    pub fn ask(socket: &Path, request: &Request) -> Result<Client> {
        let mut stream = UnixStream::connect(socket).map_err(|e| Failure {
            exit: Exit::Failed,
            message: format!("the daemon can't be reached at {} ({e}); start it with `ferry daemon`", socket.display()),
        })?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line).context("ask the daemon")?;
        Ok(Client { lines: BufReader::new(stream).lines() })
    }

    /// The next answer; `None` when there are no more. A failure that the daemon reports is an error here.
    pub fn answer(&mut self) -> Result<Option<Answer>> {
        let Some(line) = self.lines.next() else { return Ok(None) };
        let line = line.context("the daemon has gone away; `ferry status` tells when it is back")?;
        match serde_json::from_str(&line)
            .context("an answer of the daemon that can't be read; is it of another version?")?
        {
            Answer::Failed { exit, message } => Err(Failure { exit: Exit::from_number(exit), message }.into()),
            answer => Ok(Some(answer)),
        }
    }
}
