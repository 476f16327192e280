//! Two emulated Xen hosts, a switch and a peer on one machine.

pub mod net;
pub mod scenario;
pub mod verdict;
