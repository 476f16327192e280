//! What a Linux guest can notice of its own migration.
//!
//! Two halves share this crate:
//!
//! - the binary `witness` is a guest's init: it sets the guest up, runs loads at set rates, looks at everything that a
//!   guest can look at, and reports ([`report`]) to a peer on the network and on its console;
//! - the library has the types of those reports, their wire form ([`wire`]), the settings on the kernel command line
//!   ([`config`]), what is written to the disk ([`disk`]) and into memory ([`pattern`]), and the judgement of what was
//!   seen before and after a move against the promises T1 to T10 ([`judge`]). Nothing in the library does I/O.
//!
//! A second binary, `vandal`, is the init of a guest that attacks its host's xenstore ([`attack`]).
//!
//! The wire form for somebody who writes a peer is in `docs/witness.md`.

pub mod attack;
pub mod config;
pub mod disk;
pub mod judge;
pub mod klog;
pub mod pattern;
pub mod report;
pub mod store_rules;
pub mod wire;
