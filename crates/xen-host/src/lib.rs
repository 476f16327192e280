//! A real Xen host, seen from its control domain.
//!
//! [`XenHost`] implements [`hypervisor::Hypervisor`] with hypercalls through /dev/xen/privcmd; nothing of libxenctrl is used. Versions
//! of Xen whose interfaces are not known (`xen_abi::version`) are refused by number when it is opened.

mod buffer;
mod calls;
mod domains;
mod events;
mod ext;
mod grants;
mod host;
pub mod livepatch;
mod mapping;
mod memory;
mod privcmd;
mod scheduling;

pub use buffer::Buffer;
pub use events::EventDevice;
pub use host::XenHost;
pub use mapping::Pages;
pub use privcmd::{Lent, Privcmd};
