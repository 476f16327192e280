//! A xenstore daemon: [`Store`] holds its state and speaks the protocol without doing any I/O; `daemon` runs it over unix
//! sockets, rings and event channels.

pub mod children;
pub mod conn;
mod control;
pub mod daemon;
mod direct;
mod domain_ops;
pub mod held;
mod host;
mod import;
mod live_update;
pub mod node;
mod ops;
pub mod quota;
mod rate;
mod recover;
mod redo;
pub mod store;
mod tx;
mod watch;
mod wrapped;

pub use conn::{ConnId, Peer};
pub use host::{DomainState, Host, HostCommand};
pub use import::{FEATURES, IMPORT_MAX};
pub use live_update::{Plan, RestoreError, Restored};
pub use quota::Quotas;
pub use recover::{LastStep, RecoverError, Recovered};
pub use redo::{Moved, RedoError, RingStep};
pub use store::{Broken, Options, Store};
