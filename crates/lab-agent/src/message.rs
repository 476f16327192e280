//! What the JSON frames carry.

use serde::{Deserialize, Serialize};

/// The agent's first words, and its answer to a ping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`crate::PROTOCOL_VERSION`] of the agent.
    pub protocol: u32,
    /// Copied from the ping's body, so that an answer can be told from an older one; empty otherwise.
    pub nonce: String,
    /// Milliseconds since dom0's kernel started (CLOCK_BOOTTIME).
    pub uptime_ms: u64,
}

/// What the lab asks for. It travels in [`crate::frame::Kind::Open`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Run a program. Its output comes as data frames, then a `Done`.
    Exec(Exec),
    /// Write a file: the bytes follow as data frames, then an end. Missing directories are made. The file appears
    /// under its name only when it is complete.
    Put {
        /// Absolute path in dom0.
        path: String,
        /// Permission bits.
        mode: u32,
    },
    /// Read a file; its bytes come as data frames, then a `Done`.
    Get {
        /// Absolute path in dom0.
        path: String,
    },
    /// Start the toolstack's daemons and the bridge. Refused the second time.
    Start(Start),
}

/// A program to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// Program (looked up in PATH) and arguments.
    pub argv: Vec<String>,
    /// Variables added to the agent's own (PATH, HOME, LANG, PYTHONPATH).
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Working directory; `/root` if absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// The process group is killed after this many milliseconds.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
    /// A terminal of rows × columns instead of pipes; standard error then comes as data too.
    #[serde(default)]
    pub terminal: Option<(u16, u16)>,
    /// Leave it running: `Done` comes at once with the process id; output goes to this file in dom0.
    #[serde(default)]
    pub background: Option<String>,
}

/// How the toolstack is brought up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// The host's name.
    pub hostname: String,
    /// Command line of the xenstored to run; the stock C one if absent. It must stay in the background by itself or
    /// be told to (`{pidfile}` is replaced).
    #[serde(default)]
    pub xenstored: Option<Vec<String>>,
    /// Address of the bridge with prefix length, such as `10.9.0.1/24`.
    #[serde(default)]
    pub address: Option<String>,
    /// Address of the network card.
    #[serde(default)]
    pub mac: Option<[u8; 6]>,
    /// Set dom0's (and so Xen's) wall clock to this many nanoseconds since 1970, UTC.
    #[serde(default)]
    pub wallclock_ns: Option<u64>,
    /// For dom0's random numbers, which go on from where they stood when the host's state was saved: on every host the same.
    #[serde(default)]
    pub seed: Option<[u8; 32]>,
}

/// How a stream ended well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "end", rename_all = "snake_case")]
pub enum Done {
    /// The program ended by itself.
    Exited {
        /// Its exit code.
        code: i32,
    },
    /// A signal ended it.
    Signalled {
        /// The signal's number.
        signal: i32,
    },
    /// It ran out of its time and was killed.
    TimedOut,
    /// It runs in the background.
    Started {
        /// Its process id in dom0.
        pid: u32,
    },
    /// The file was written or read, or the toolstack is up.
    Ok,
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// What failed and why, for a person.
    pub reason: String,
}
