//! The host's configuration, `/etc/ferry/ferry.toml`. Every key may be left out; an unknown one is an error.

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

pub const DEFAULT_PATH: &str = "/etc/ferry/ferry.toml";
/// Where daemons listen if nothing else is said.
pub const DEFAULT_PORT: u16 = 8477;

/// How a guest is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The guest notices nothing.
    Transparent,
    /// The guest suspends and resumes itself; done by stock `xl migrate`.
    #[default]
    Cooperative,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Config {
    /// This host's name in messages; the system's host name if it is empty.
    pub name: String,
    /// What `ferry migrate` does without `--mode`.
    pub mode: Mode,
    /// Journals, and what is remembered over restarts.
    pub state_dir: PathBuf,
    /// The daemon's socket for commands.
    pub socket: PathBuf,
    /// Guests that may come in at the same time.
    pub max_incoming: usize,
    pub transport: Transport,
    pub limits: Limits,
}

/// How daemons of two hosts talk. With nothing enabled no guest can leave or come transparently.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Transport {
    /// Plain TCP: **neither encrypted nor authenticated**. Whoever reaches the port can read guests' memory on the way and start domains on
    /// this host. Only for a network that nobody else can reach.
    pub insecure_tcp: bool,
    /// Where to listen; port 8477 on every address if it is left out.
    pub listen: Option<SocketAddr>,
}

/// What a migration may cost if the command line does not say otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Limits {
    pub downtime_ms: u64,
    pub max_time_s: u64,
    pub rounds: u32,
    /// A guess at the blackout of a guest that changes nothing; only until a first migration to that host has been measured.
    pub fixed_blackout_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            name: String::new(),
            mode: Mode::default(),
            state_dir: "/var/lib/ferry".into(),
            socket: "/run/ferry/ferryd.sock".into(),
            max_incoming: 8,
            transport: Transport::default(),
            limits: Limits::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits { downtime_ms: 300, max_time_s: 3600, rounds: 30, fixed_blackout_ms: 50 }
    }
}

impl Config {
    /// Reads `path`; the defaults if it is the default path and there is no such file.
    pub fn read(path: &Path) -> Result<Config> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && path == Path::new(DEFAULT_PATH) => String::new(),
            Err(e) => bail!("can't read the configuration {}: {e}", path.display()),
        };
        toml::from_str(&text).with_context(|| format!("configuration {}", path.display()))
    }

    pub fn host_name(&self) -> String {
        if !self.name.is_empty() {
            return self.name.clone();
        }
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        if name.trim().is_empty() { "this host".into() } else { name.trim().into() }
    }

    pub fn listen(&self) -> SocketAddr {
        self.transport.listen.unwrap_or_else(|| SocketAddr::from(([0; 16], DEFAULT_PORT)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_insecure_by_default() {
        let config: Config = toml::from_str("").unwrap();
        assert_eq!(config, Config::default());
        assert!(!config.transport.insecure_tcp);
        assert_eq!(config.mode, Mode::Cooperative);
    }

    #[test]
    fn a_file_is_read_and_a_wrong_key_named() {
        let text = "mode = \"transparent\"\n[transport]\ninsecure-tcp = true\nlisten = \"10.0.0.1:9\"\n[limits]\ndowntime-ms = 1000\n";
        let config: Config = toml::from_str(text).unwrap();
        assert_eq!((config.mode, config.limits.downtime_ms), (Mode::Transparent, 1000));
        assert_eq!(config.listen(), "10.0.0.1:9".parse().unwrap());
        let error = toml::from_str::<Config>("[transport]\ninsecure_tcp = true\n").unwrap_err().to_string();
        assert!(error.contains("insecure_tcp"), "{error}");
    }
}
