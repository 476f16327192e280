//! An embedded Xen: [`hypervisor::Hypervisor`] in one process, with guests that really run and change their memory, and a service
//! domain's [`toolstack`]. It is small, and strict where the real one is treacherous: it destroys the state that Xen destroys when steps
//! come in the wrong order, its hosts' clocks differ, and it keeps watch that no guest ever runs twice.

mod domain;
mod guest;
pub mod toolstack;
mod xen;

pub use guest::{FIRST, Program, expected_memory, still_page};
pub use xen::{SimXen, World};
