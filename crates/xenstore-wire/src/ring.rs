//! Layout of the page shared with a domain (`struct xenstore_domain_interface` in `io/xs_wire.h`,
//! `docs/misc/xenstore-ring.txt`). All fields are little-endian `u32`, offsets are in bytes from the page's start.

/// Size of each of the two rings, in bytes; a power of two.
pub const RING_SIZE: usize = 1024;
/// Requests, guest to daemon.
pub const REQ: usize = 0;
/// Replies and watch events, daemon to guest.
pub const RSP: usize = 1024;
/// Index up to which the daemon has read requests.
pub const REQ_CONS: usize = 2048;
/// Index up to which the guest has written requests.
pub const REQ_PROD: usize = 2052;
/// Index up to which the guest has read replies.
pub const RSP_CONS: usize = 2056;
/// Index up to which the daemon has written replies.
pub const RSP_PROD: usize = 2060;
/// Feature bits of the server, see [`features`].
pub const SERVER_FEATURES: usize = 2064;
/// 0 connected, 1 a reconnection is in progress.
pub const CONNECTION: usize = 2068;
/// Why the daemon stopped serving the ring, see [`error`].
pub const ERROR: usize = 2072;

/// Bits of the feature field.
pub mod features {
    /// The ring can be closed and opened again.
    pub const RECONNECTION: u32 = 1;
    /// The error field is there.
    pub const ERROR: u32 = 2;
    /// `WATCH` takes a depth.
    pub const WATCH_DEPTH: u32 = 4;
}

/// Values of the error field.
pub mod error {
    /// None.
    pub const NONE: u32 = 0;
    /// The event channel does not work.
    pub const COMM: u32 = 1;
    /// Indexes that can't be.
    pub const RING_INDEX: u32 = 2;
    /// A message that is too long.
    pub const PROTOCOL: u32 = 3;
}

/// Bytes between a consumer and a producer index; `None` if they can't be (more than the ring holds).
pub fn used(cons: u32, prod: u32) -> Option<usize> {
    let n = prod.wrapping_sub(cons) as usize;
    (n <= RING_SIZE).then_some(n)
}

/// Offset of an index in its ring.
pub fn offset(index: u32) -> usize {
    index as usize & (RING_SIZE - 1)
}
