//! Xen's public ABI as Rust types and numbers. No I/O.
//!
//! Layouts are those of an x86-64 control domain for interface version 0x15 (Xen 4.17), with what later versions changed
//! beside them ([`version::INTERFACES`]). Names follow Xen's headers, without their prefixes; every structure says its C
//! name. The test `layout` compiles C against Xen's own headers and compares every number, size and offset. All numbers
//! are little-endian.

// zerocopy's derives make helper types, one for each field, that the lint cannot tell from ours when a macro declares the structure.
#![allow(missing_debug_implementations)]

pub mod dm_op;
pub mod domctl;
pub mod event;
pub mod ext;
pub mod grant;
pub mod hvm_op;
pub mod hvm_save;
pub mod hypercall;
pub mod layout;
pub mod memory;
pub mod shared;
pub mod sysctl;
pub mod version;
pub mod xenver;
