//! The lab: emulated hosts that run real, stock Xen, a switch and a peer, on a machine that has no Xen.
//!
//! From the ground up: [`packages`] fetches and unpacks Debian's packages into a cache folder; [`image`] makes dom0's
//! and the guests' ramdisks of them; [`qemu`] runs one emulated machine; [`host`] is such a machine with Xen and dom0's
//! agent in it, ready to take commands. [`process`] and [`lock`] see to it that nothing outlives the program and that
//! one lab runs at a time. [`net`] joins the hosts' network cards, [`scenario`] says what a run does, [`verdict`] what
//! it proved.

pub mod cache;
pub mod host;
pub mod image;
pub mod inspection;
pub mod lock;
pub mod net;
pub mod packages;
pub mod process;
pub mod progress;
pub mod qemu;
pub mod report;
pub mod run;
pub mod scenario;
pub mod steps;
pub mod verdict;
