//! Ramdisks: dom0's, in two parts, and the guests'.
//!
//! dom0's root is a cpio archive made once from Debian's packages, followed by a small one with our agent as `/init`;
//! the kernel unpacks both. All else goes through the agent after boot, so that a change of ours repacks nothing.

pub mod cpio;
pub mod dom0;
pub mod guest;
pub mod modules;
