//! What a host brings to a migration, and what every migration on it shares.

use crate::link::Connector;
use crate::toolstack::Toolstack;
use hypervisor::Hypervisor;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// One host, as its daemon sees it.
#[derive(Clone)]
pub struct Host {
    pub hypervisor: Arc<dyn Hypervisor>,
    pub toolstack: Arc<dyn Toolstack>,
    pub connector: Arc<dyn Connector>,
    /// For messages.
    pub name: String,
    /// Tells hosts apart; kept over restarts of the daemon.
    pub id: Uuid,
    /// Folder of the journals.
    pub journals: PathBuf,
    /// The program, with its version.
    pub writer: String,
    /// Guests that may come in at the same time.
    pub max_incoming: usize,
    pub faults: Arc<dyn Faults>,
    pub timeouts: Timeouts,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("name", &self.name).field("id", &self.id).finish_non_exhaustive()
    }
}

/// How long a host waits for the other. None of them applies after `Go`.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// For the answer to an offer: the destination makes the shell and its devices meanwhile.
    pub accept: Duration,
    /// From the pause to `Ready` at most, if the limit for the guest's downtime is not less anyhow.
    pub ready: Duration,
    /// Between two attempts to reach the peer again.
    pub reconnect: Duration,
    /// A peer from which nothing is heard for so long, though it was asked, is taken for unreachable.
    pub silence: Duration,
    /// The same while the guest stands still until the peer is ready, if `silence` is not less: its kernel tells of a stall after 21 s.
    pub silence_paused: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            accept: Duration::from_secs(120),
            ready: Duration::from_secs(60),
            reconnect: Duration::from_secs(1),
            silence: Duration::from_secs(15),
            silence_paused: Duration::from_secs(5),
        }
    }
}

/// What a test makes happen at a point of the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The connection is cut.
    Cut,
    /// The action fails, where it can.
    Fail,
    /// The daemon is gone: the migration's thread ends as if it had never been, whatever it was doing.
    Crash,
    /// The migration's thread panics.
    Panic,
    /// The migration's thread stands still for ever, until whoever planted it switches the host off.
    Hang,
}

/// Asked before and after every action of either machine; the points are listed in docs/handshake.md.
pub trait Faults: Send + Sync {
    fn at(&self, point: &str) -> Option<Fault>;
}

/// The daemon is to be gone (a planted fault).
pub(crate) struct Crashed;

/// Lets what is planted at a point happen; `cut` cuts the connection. `true`: the action shall fail.
pub(crate) fn meet(faults: &dyn Faults, point: &str, cut: impl FnOnce()) -> Result<bool, Crashed> {
    match faults.at(point) {
        None => Ok(false),
        Some(Fault::Crash) => Err(Crashed),
        Some(Fault::Panic) => panic!("planted at {point}"),
        Some(Fault::Hang) => loop {
            std::thread::park();
        },
        Some(Fault::Fail) => Ok(true),
        Some(Fault::Cut) => {
            cut();
            Ok(false)
        }
    }
}

/// No faults.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoFaults;

impl Faults for NoFaults {
    fn at(&self, _point: &str) -> Option<Fault> {
        None
    }
}
