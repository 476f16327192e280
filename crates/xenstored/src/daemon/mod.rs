//! The daemon: one thread, one loop, over [`crate::store::Store`].

mod args;
mod busy;
#[cfg(test)]
mod busy_tests;
pub mod devices;
mod events;
pub mod journal;
mod kill_point;
#[cfg(test)]
mod kill_tests;
pub mod log;
pub mod machine;
pub mod process;
pub mod ring;
#[cfg(test)]
mod ring_tests;
pub mod xen;

pub use args::Args;
pub use devices::Devices;
pub use events::{Daemon, JournalPlace};

use std::path::PathBuf;

/// Folder of the socket and of the state at a live update, as the stock daemon finds it.
pub fn run_dir() -> PathBuf {
    std::env::var_os("XENSTORED_RUNDIR").map_or_else(|| PathBuf::from("/run/xenstored"), PathBuf::from)
}

/// The socket, as xenstore's tools find it.
pub fn socket_path() -> PathBuf {
    std::env::var_os("XENSTORED_PATH").map_or_else(|| run_dir().join("socket"), PathBuf::from)
}
