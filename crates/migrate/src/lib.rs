//! The migration engine.

pub mod capture;
pub mod command;
mod cpu;
mod dirty_log;
pub mod fault_points;
pub mod guest;
pub mod handshake;
pub mod image;
pub mod journal;
mod own_fault;
pub mod placement;
pub mod restore;
pub mod toolstack;
mod trouble;
mod tsc;
pub mod wire;

pub use trouble::{Doing, Result, Trouble};
pub mod host;
pub mod link;
mod precopy;
pub mod preflight;
mod recording;
pub mod report;
mod silence;
pub mod source;

pub use precopy::Limits;
pub mod destination;
