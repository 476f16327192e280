//! Makes the stock Linux backends of dom0 let go of one guest, and take it up again: here after a migration that did
//! not happen, on another host after one that did.
//!
//! * [`device`] finds the guest's PV devices in the store and refuses what cannot move, by name and with the reason.
//! * [`drain`] judges, from event channels and grant table, whether every backend has let go.
//! * [`frozen`] is the store in memory, for reading within the blackout.
//! * [`source`] unbinds, waits for the drain, and binds again on a rollback.
//! * [`destination`] makes the backends ready before the blackout and connects them in it.
//! * [`console`] holds back what is typed while the guest is away.
//! * [`announce`] tells the network where the guest is now.
//! * [`records`] copies libxl's own books, so that stock `xl` manages the guest on its new host.
//!
//! What they do to the host goes through two small traits: [`store::Store`] (xenstore) and [`machine::Machine`] (sysfs,
//! hotplug scripts, block devices, bridges, time). The real ones are xenstore-client's `Client` and [`dom0::Dom0`].
//!
//! # How stock backends take up a running ring
//! blkback and netback attach to a ring at the response producer that they find in it, so requests that no backend has
//! taken survive a change of backend. Requests that were *taken but not answered* would be lost or done twice; hence
//! the source drains. A backend device that is unbound through sysfs finishes its requests first (blkback possibly
//! after the unbind has returned), unmaps every grant and closes its event channels: the guest's ends become unbound
//! ports for dom0, with their numbers.

pub mod announce;
pub mod console;
pub mod destination;
pub mod device;
pub mod disk;
pub mod dom0;
pub mod drain;
mod error;
pub mod frozen;
pub mod machine;
mod netlink;
pub mod records;
pub mod source;
pub mod store;

pub use error::{Error, Refusal, Result};
