//! The migration engine.

pub mod handshake;
pub mod journal;
