//! The xenstore protocol (Xen `docs/misc/xenstore.txt`, `xen/include/public/io/xs_wire.h`) and the xenstore-migration
//! stream (Xen `docs/designs/xenstore-migration.md`), encode and decode, without any I/O.
//!
//! Everything here reads hostile bytes: a guest's ring, a socket, a file, a peer. Decoding never panics and never
//! allocates more than the bytes it was given (plus [`PAYLOAD_MAX`]).

pub mod errno;
pub mod frame;
pub mod op;
pub mod path;
pub mod payload;
pub mod perm;
pub mod ring;
pub mod stream;

pub use errno::Errno;
pub use frame::{FrameDecoder, FrameError, HEADER_LEN, Header, Message};
pub use op::Op;
pub use perm::{Access, Perm, Perms};

/// Largest payload of a message in either direction, in bytes (`XENSTORE_PAYLOAD_MAX`).
pub const PAYLOAD_MAX: usize = 4096;
/// Longest absolute path, in bytes without the NUL (`XENSTORE_ABS_PATH_MAX`).
pub const ABS_PATH_MAX: usize = 3072;
/// Longest relative path, in bytes without the NUL (`XENSTORE_REL_PATH_MAX`).
pub const REL_PATH_MAX: usize = 2048;
/// "No domain" (`DOMID_INVALID`, `xen/include/public/xen.h`).
pub const DOMID_INVALID: u16 = 0x7ff4;
/// "The caller's own domain" (`DOMID_SELF`).
pub const DOMID_SELF: u16 = 0x7ff0;
/// Domids from here on are special values, not domains (`DOMID_FIRST_RESERVED`).
pub const DOMID_FIRST_RESERVED: u16 = 0x7ff0;
