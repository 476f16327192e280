//! Xen's public ABI as Rust types and numbers, per interface version. No I/O.

pub mod ext;
