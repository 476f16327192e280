// SPDX-License-Identifier: GPL-2.0-only
//! Ferry's extension of the Xen hypervisor: a livepatch payload that reads and writes the state of a guest that stock Xen has no
//! operation for, and gives each domain a clock offset. See docs/extension-abi.md.
//!
//! Built by `cargo xtask extension` for one build-id of Xen, from the table of that build in `offsets/`.
//! Everything but the wrapped functions runs inside one domctl, with Xen's domctl lock held: so at most one operation runs at a time.
#![no_std]
#![deny(unsafe_op_in_unsafe_fn)]
#![deny(clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)]

/// The ABI, the same file that the tools use.
#[path = "../../crates/xen-abi/src/ext.rs"]
#[allow(dead_code, reason = "the tools use the rest")]
mod abi;
mod clock;
mod get;
mod patch;
mod request;
mod set;
#[allow(dead_code, reason = "a table for all that a build of Xen may need")]
mod table {
    //! Offsets and bytes of the Xen build that this payload is for, written by `cargo xtask extension-table`.
    include!(env!("FERRY_XEN_TABLE"));
}
#[allow(dead_code, reason = "error numbers are there as a set")]
mod xen;

/// Never called: code that could panic refers to core's panic functions, which are not in Xen, and the build's check refuses that.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {
        core::hint::spin_loop();
    }
}
