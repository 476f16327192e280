use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::drain::Left;

/// Why a guest cannot move, found before anything was touched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// What it is about: "vbd 51712 (qdisk)", "grant 17", "port 9".
    pub what: String,
    /// Why that cannot move, and what to do.
    pub why: String,
}

impl Refusal {
    /// From two texts.
    pub fn new(what: impl Into<String>, why: impl Into<String>) -> Self {
        Refusal { what: what.into(), why: why.into() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}

/// What went wrong while backends were handled.
#[derive(Debug, Error)]
pub enum Error {
    /// The store.
    #[error("{0}")]
    Store(#[from] xenstore_client::Error),
    /// The hypervisor.
    #[error("{0}")]
    Hypervisor(#[from] hypervisor::HypervisorError),
    /// A node that must be there is not, or holds what it must not.
    #[error("xenstore node {path}: {why}")]
    Node {
        /// The node.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// dom0's kernel refused to bind or unbind.
    #[error("{device}: dom0's kernel can't {action} it (/sys/bus/xen-backend/drivers/{driver}/{action}): {source}")]
    Sysfs {
        /// "vbd-7-51712".
        device: String,
        /// "vbd" or "vif".
        driver: String,
        /// "bind" or "unbind".
        action: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A hotplug script failed.
    #[error("{device}: hotplug script {script} failed: {why}")]
    Script {
        /// The device.
        device: String,
        /// The script with its arguments.
        script: String,
        /// What it said, or how it ended.
        why: String,
    },
    /// The backends did not let go in time.
    #[error("domain {domid}: the backends have not let go after {} ms: {}", .after.as_millis(), list(.left))]
    NotDrained {
        /// The guest.
        domid: u16,
        /// How long was waited.
        after: Duration,
        /// What is still held.
        left: Vec<Left>,
    },
    /// A backend went to Closing or Closed.
    #[error("{device}: its backend went to state {state} (closing): dom0's kernel log says why")]
    Closed {
        /// The device.
        device: String,
        /// 5 or 6.
        state: String,
    },
    /// A backend has failed and dom0's kernel says why.
    #[error("{device}: its backend does not connect; dom0's kernel says: {why}")]
    Unconnected {
        /// The device.
        device: String,
        /// In the kernel's words: an error number and a text.
        why: String,
    },
    /// A backend did not reach a state in time.
    #[error("{device}: its backend is in state {state} after {} ms, {wanted} is wanted", .after.as_millis())]
    Stuck {
        /// The device.
        device: String,
        /// State it is in.
        state: String,
        /// State it should be in.
        wanted: String,
        /// How long was waited.
        after: Duration,
    },
    /// This host cannot offer what the guest uses.
    #[error("this host can't take the guest: {}", list(.0))]
    Misfit(Vec<Refusal>),
    /// Something of this machine.
    #[error("{what}: {source}")]
    Machine {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Several things went wrong in a rollback or a clean-up, which go on after an error.
    #[error("{}", list(.0))]
    Several(Vec<Error>),
}

/// Shorthand.
pub type Result<T> = std::result::Result<T, Error>;

fn list(items: &[impl fmt::Display]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Nothing, the one error, or all of them.
pub(crate) fn all(mut errors: Vec<Error>) -> Result<()> {
    match errors.len() {
        0 => Ok(()),
        1 => Err(errors.remove(0)),
        _ => Err(Error::Several(errors)),
    }
}
