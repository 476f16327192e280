//! `XEN_DMOP_*` (`xen/include/public/hvm/dm_op.h`): what a device model may do, and the control domain too.

use crate::layout::{abi_numbers, abi_structs};

abi_numbers! {
    /// Marks pages in the log-dirty bitmap as an emulator's writes do; nothing happens while the mode is off.
    MODIFIED_MEMORY: u32 = 11, "XEN_DMOP_modified_memory";
}

abi_structs! {
    /// The first buffer of [`MODIFIED_MEMORY`], behind the operation's number (u32) and four bytes of padding. Xen counts in it.
    struct ModifiedMemory = "struct xen_dm_op_modified_memory" {
        nr_extents: u32,
        opaque: u32,
    }

    /// The second buffer is an array of these.
    struct ModifiedExtent = "struct xen_dm_op_modified_memory_extent" {
        nr: u32,
        _pad: u32,
        first_pfn: u64,
    }

    /// One of the hypercall's buffers.
    struct Buf = "struct xen_dm_op_buf" {
        /// Address.
        h: u64,
        /// Bytes.
        size: u64,
    }
}
