//! Xenstore daemons on a machine without Xen: a Xen made of files, the stock C daemon run on it, and clients that speak
//! raw messages over a socket or as a guest over a ring.
//!
//! It serves two purposes: a differential test that gives the same operations to the stock daemon and to another and
//! compares all that comes back (`tests/differential.rs`), and the bench that times them side by side.

pub mod client;
pub mod fake_xen;
pub mod ours;
pub mod script;
pub mod stock;

pub use client::{Connection, Link};
pub use fake_xen::FakeXen;
pub use stock::Stock;
