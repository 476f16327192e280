// SPDX-License-Identifier: GPL-2.0-only
//! What makes this object a livepatch payload: the list of patched functions, the ways on into their originals, the hook that
//! guards the revert, and the notes that bind it to one build-id.
//!
//! Xen writes a 5-byte jump over the first bytes of each function. `ferry_original_*` run the instructions that stood there and jump behind
//! them; the table has those bytes, and Xen compares them with its own before it applies the payload (`expect`).

use crate::table::{self, original};

pub const BUILD_ID: [u8; 20] = table::BUILD_ID;

/// A way on into an original: `original!` gives the displaced instructions and the jump behind them.
macro_rules! way_on {
    ($symbol:literal, $function:ident) => {
        core::arch::global_asm!(
            ".pushsection .text.ferry_original,\"ax\",@progbits",
            concat!(".globl ", $symbol),
            concat!(".type ", $symbol, ",@function"),
            concat!($symbol, ":"),
            original!($function),
            concat!(".size ", $symbol, ", . - ", $symbol),
            ".popsection",
            options(att_syntax)
        );
    };
}

way_on!("ferry_original_arch_do_domctl", arch_do_domctl);
way_on!("ferry_original_update_vcpu_system_time", update_vcpu_system_time);
way_on!("ferry_original_update_runstate_area", update_runstate_area);
way_on!("ferry_original_common_vcpu_op", common_vcpu_op);
way_on!("ferry_original_compat_common_vcpu_op", compat_common_vcpu_op);
way_on!("ferry_original_compat_vcpu_op", compat_vcpu_op);
way_on!("ferry_original_do_set_timer_op", do_set_timer_op);
way_on!("ferry_original_do_poll", do_poll);
way_on!("ferry_original_do_hvm_op", do_hvm_op);
way_on!("ferry_original_arch_domain_destroy", arch_domain_destroy);

// The hook is called through a pointer, so on a CPU with CET-IBT it has to begin with ENDBR64.
core::arch::global_asm!(
    ".pushsection .text.ferry_revert_hook,\"ax\",@progbits",
    ".globl ferry_revert_hook",
    ".type ferry_revert_hook,@function",
    "ferry_revert_hook:",
    "endbr64",
    "jmp ferry_revert",
    ".size ferry_revert_hook, . - ferry_revert_hook",
    ".popsection",
    options(att_syntax)
);

type Address = unsafe extern "C" fn();

unsafe extern "C" {
    fn ferry_arch_do_domctl();
    fn ferry_update_vcpu_system_time();
    fn ferry_update_domain_wallclock_time();
    fn ferry_update_runstate_area();
    fn ferry_common_vcpu_op();
    fn ferry_compat_common_vcpu_op();
    fn ferry_compat_vcpu_op();
    fn ferry_do_set_timer_op();
    fn ferry_do_poll();
    fn ferry_do_hvm_op();
    fn ferry_arch_domain_destroy();
    fn ferry_revert_hook();
}

/// `struct livepatch_func` (public/sysctl.h), 104 bytes.
#[repr(C, align(8))]
pub struct Patched {
    name: *const u8,
    new_address: Address,
    old_address: usize,
    new_size: u32,
    old_size: u32,
    version: u8,
    opaque: [u8; 39],
    /// `struct livepatch_expectation`: bit 0 enabled, bits 1 to 5 the number of bytes, then the bytes.
    expect: [u8; 32],
}

// SAFETY: no code of the payload looks at it; Xen alone reads it, and fills in the old address when it loads the payload.
unsafe impl Sync for Patched {}

const _: () = assert!(
    size_of::<Patched>() == table::LP_FUNC_SIZE && core::mem::offset_of!(Patched, expect) == table::LP_FUNC_EXPECT
);

/// A function of Xen's, as the table describes it.
pub struct Original {
    /// Name in Xen's symbol table, with a 0 behind it; a static function's has its file in front.
    pub name: &'static str,
    pub size: u32,
    /// Leading bytes that are displaced: whole instructions, at least 5 bytes.
    pub head: &'static [u8],
}

const fn patched(original: &Original, by: Address) -> Patched {
    let mut expect = [0; 32];
    expect[0] = 1 | (original.head.len() as u8) << 1;
    let mut i = 0;
    while i < original.head.len() {
        expect[i + 1] = original.head[i];
        i += 1;
    }
    Patched {
        name: original.name.as_ptr(),
        new_address: by,
        old_address: 0,
        // Only tells Xen that there is something to jump to.
        new_size: 16,
        old_size: original.size,
        version: table::LP_VERSION as u8,
        opaque: [0; 39],
        expect,
    }
}

// Not `#[used]`: that marks the object as a GNU one, which Xen refuses. Public and unmangled keeps it as well.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".livepatch.funcs")]
pub static FERRY_PATCHED: [Patched; 11] = [
    patched(&table::ARCH_DO_DOMCTL, ferry_arch_do_domctl),
    patched(&table::UPDATE_VCPU_SYSTEM_TIME, ferry_update_vcpu_system_time),
    patched(&table::UPDATE_DOMAIN_WALLCLOCK_TIME, ferry_update_domain_wallclock_time),
    patched(&table::UPDATE_RUNSTATE_AREA, ferry_update_runstate_area),
    patched(&table::COMMON_VCPU_OP, ferry_common_vcpu_op),
    patched(&table::COMPAT_COMMON_VCPU_OP, ferry_compat_common_vcpu_op),
    patched(&table::COMPAT_VCPU_OP, ferry_compat_vcpu_op),
    patched(&table::DO_SET_TIMER_OP, ferry_do_set_timer_op),
    patched(&table::DO_POLL, ferry_do_poll),
    patched(&table::DO_HVM_OP, ferry_do_hvm_op),
    patched(&table::ARCH_DOMAIN_DESTROY, ferry_arch_domain_destroy),
];

#[unsafe(no_mangle)]
#[unsafe(link_section = ".livepatch.hooks.revert")]
pub static FERRY_REVERT_HOOK: Address = ferry_revert_hook;

/// An ELF note of type NT_GNU_BUILD_ID.
#[repr(C, align(4))]
pub struct Note {
    name_size: u32,
    id_size: u32,
    kind: u32,
    name: [u8; 4],
    id: [u8; 20],
}

const BOUND_TO: Note = Note { name_size: 4, id_size: 20, kind: 3, name: *b"GNU\0", id: BUILD_ID };

/// The payload goes on top of the hypervisor itself, not of another payload ...
#[unsafe(no_mangle)]
#[unsafe(link_section = ".livepatch.depends")]
pub static FERRY_DEPENDS: Note = BOUND_TO;

/// ... and on no other hypervisor than this one.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".livepatch.xen_depends")]
pub static FERRY_XEN_DEPENDS: Note = BOUND_TO;
