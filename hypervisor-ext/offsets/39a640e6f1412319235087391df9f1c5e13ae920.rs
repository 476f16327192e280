// SPDX-License-Identifier: GPL-2.0-only
// Xen 4.17.5+72-g01140da4e8-1, build-id 39a640e6f1412319235087391df9f1c5e13ae920.
// Written by `cargo xtask extension-table`; not to be edited.

pub const BUILD_ID: [u8; 20] = [0x39, 0xa6, 0x40, 0xe6, 0xf1, 0x41, 0x23, 0x19, 0x23, 0x50, 0x87, 0x39, 0x1d, 0xf9, 0xf1, 0xc5, 0xe1, 0x3a, 0xe9, 0x20];
pub const ASSIST_RUNSTATE_UPDATE: usize = 5;
pub const CDF_HVM: usize = 1;
pub const CPUINFO_CURRENT: usize = 208;
pub const CPUINFO_PERCPU: usize = 216;
pub const CPUINFO_PROCESSOR: usize = 200;
pub const CPUINFO_SIZE: usize = 264;
pub const CT_LOCAL_STIME: usize = 8;
pub const CT_LOCAL_TSC: usize = 0;
pub const CT_SCALE: usize = 24;
pub const DOMCTL_U: usize = 16;
pub const DOMCTL_U_SIZE: usize = 128;
pub const D_32BIT: usize = 1632;
pub const D_ACTIVE_EVTCHNS: usize = 224;
pub const D_DOMAIN_LOCK: usize = 24;
pub const D_EMULATION: usize = 2012;
pub const D_EVENT_LOCK: usize = 236;
pub const D_EVTCHN: usize = 176;
pub const D_EVTCHN_GROUP: usize = 184;
pub const D_FIFO: usize = 256;
pub const D_ID: usize = 0;
pub const D_IS_DYING: usize = 320;
pub const D_MAX_PORT: usize = 216;
pub const D_MAX_VCPUS: usize = 4;
pub const D_NR_PIRQS: usize = 312;
pub const D_OPTIONS: usize = 316;
pub const D_PAUSE_COUNT: usize = 324;
pub const D_PIRQ_TREE: usize = 272;
pub const D_PL_TIME: usize = 704;
pub const D_POLL_MASK: usize = 480;
pub const D_PORT_OPS: usize = 248;
pub const D_SHARED_INFO: usize = 16;
pub const D_SHUTTING_DOWN: usize = 512;
pub const D_SHUT_DOWN: usize = 513;
pub const D_TIME_OFFSET: usize = 328;
pub const D_TIME_OFFSET_SET: usize = 336;
pub const D_VALID_EVTCHNS: usize = 220;
pub const D_VCPU: usize = 8;
pub const D_VM_ASSIST: usize = 536;
pub const D_VTSC: usize = 1868;
pub const D_VTSC_TO_NS: usize = 1892;
pub const D_WATCHDOG_LOCK: usize = 2104;
pub const D_WATCHDOG_MAP: usize = 2112;
pub const D_WATCHDOG_TIMER: usize = 2120;
pub const D_XEN_EVTCHNS: usize = 228;
pub const ECS_FREE_: usize = 0;
pub const ECS_INTERDOMAIN_: usize = 3;
pub const ECS_IPI_: usize = 6;
pub const ECS_PIRQ_: usize = 4;
pub const ECS_RESERVED_: usize = 1;
pub const ECS_UNBOUND_: usize = 2;
pub const ECS_VIRQ_: usize = 5;
pub const EMU_USE_PIRQ: usize = 512;
pub const E_GROUPS: usize = 4;
pub const E_LASTQ: usize = 44;
pub const E_LOCK: usize = 0;
pub const E_NOTIFY: usize = 42;
pub const E_PENDING: usize = 40;
pub const E_PER_BUCKET: usize = 64;
pub const E_PER_GROUP: usize = 32768;
pub const E_PIRQ: usize = 24;
pub const E_PIRQ_NEXT: usize = 28;
pub const E_PIRQ_PREV: usize = 32;
pub const E_PORT: usize = 16;
pub const E_PRIORITY: usize = 41;
pub const E_REMOTE_DOM: usize = 32;
pub const E_REMOTE_PORT: usize = 24;
pub const E_SIZE: usize = 64;
pub const E_STATE: usize = 12;
pub const E_UNBOUND_DOMID: usize = 24;
pub const E_VIRQ: usize = 24;
pub const FD_NUM: usize = 1024;
pub const FD_PAGES: usize = 128;
pub const FD_SIZE: usize = 1032;
pub const FIFO_CONTROL_SIZE: usize = 72;
pub const FQ_LOCK: usize = 16;
pub const FQ_PRIORITY: usize = 12;
pub const FQ_SIZE: usize = 24;
pub const FQ_TAIL: usize = 8;
pub const FV_QUEUE: usize = 8;
pub const FV_SIZE: usize = 392;
pub const HF_NAME: usize = 0;
pub const HF_TSC_SCALING_BITS: usize = 576;
pub const LP_FUNC_EXPECT: usize = 72;
pub const LP_FUNC_SIZE: usize = 104;
pub const LP_VERSION: usize = 2;
pub const M2P_BASE: usize = 18446606085000265728;
pub const NR_VIRQS_: usize = 24;
pub const NR_WATCHDOGS: usize = 2;
pub const PIRQ_EMUIRQ: usize = 40;
pub const PIRQ_EVTCHN: usize = 4;
pub const PLT_READ_COUNTER: usize = 24;
pub const PL_LAST_GUEST_TIME: usize = 1080;
pub const PL_STIME_OFFSET: usize = 1072;
pub const POLL_MASK_IS_POINTER: usize = 1;
pub const READ_TSC_POISON: usize = 8486853683728643520;
pub const RS32_ENTRY: usize = 4;
pub const RS32_SIZE: usize = 44;
pub const RS32_TIME: usize = 12;
pub const RS_ENTRY: usize = 8;
pub const RS_SIZE: usize = 48;
pub const RS_STATE: usize = 0;
pub const RS_TIME: usize = 16;
pub const RW_COUNTS: usize = 0;
pub const RW_CPU_MASK: usize = 4095;
pub const RW_WRITE_LOCKED: usize = 12288;
pub const RW_WRITE_MASK: usize = 12288;
pub const SI32_EVTCHN_MASK: usize = 2176;
pub const SI32_EVTCHN_PENDING: usize = 2048;
pub const SI32_WC_NSEC: usize = 2312;
pub const SI32_WC_SEC: usize = 2308;
pub const SI32_WC_SEC_HI: usize = 2340;
pub const SI32_WC_VERSION: usize = 2304;
pub const SI_EVTCHN_MASK: usize = 2560;
pub const SI_EVTCHN_PENDING: usize = 2048;
pub const SI_WC_NSEC: usize = 3080;
pub const SI_WC_SEC: usize = 3076;
pub const SI_WC_SEC_HI: usize = 3084;
pub const SI_WC_VERSION: usize = 3072;
pub const SPINLOCK_NO_CPU_: usize = 4095;
pub const SPINLOCK_SIZE: usize = 8;
pub const STACK_BYTES: usize = 32768;
pub const TS_MUL: usize = 4;
pub const TS_SHIFT: usize = 0;
pub const T_EXPIRES: usize = 0;
pub const T_IN_HEAP: usize = 3;
pub const T_IN_LIST: usize = 4;
pub const T_SIZE: usize = 48;
pub const T_STATUS: usize = 42;
pub const VI32_ALIGN: usize = 4;
pub const VI32_TIME: usize = 32;
pub const VIRQ_ARCH_FIRST: usize = 16;
pub const VI_ALIGN: usize = 8;
pub const VI_SIZE: usize = 64;
pub const VI_TIME: usize = 32;
pub const VMCB_CR2: usize = 1600;
pub const VPF_BLOCKED_BIT: usize = 0;
pub const VPF_DOWN_BIT: usize = 1;
pub const V_CR2: usize = 1040;
pub const V_DOMAIN: usize = 16;
pub const V_FIFO: usize = 568;
pub const V_HVM_STIME_OFFSET: usize = 2424;
pub const V_ID: usize = 0;
pub const V_INFO: usize = 8;
pub const V_INFO_MFN: usize = 560;
pub const V_INITIALISED: usize = 270;
pub const V_PAUSE_FLAGS: usize = 296;
pub const V_PERIOD: usize = 40;
pub const V_PERIODIC: usize = 56;
pub const V_PERIODIC_LOCK: usize = 32;
pub const V_PERIOD_LAST: usize = 48;
pub const V_PIRQ_HEAD: usize = 288;
pub const V_POLL_EVTCHN: usize = 284;
pub const V_POLL_TIMER: usize = 152;
pub const V_PROCESSOR: usize = 4;
pub const V_RUNSTATE: usize = 208;
pub const V_RUNSTATE_GUEST: usize = 256;
pub const V_SINGLESHOT: usize = 104;
pub const V_TIME_AREA: usize = 3400;
pub const V_TSC_OFFSET: usize = 1360;
pub const V_UPCALL: usize = 2432;
pub const V_VIRQ: usize = 332;
pub const V_VMCB: usize = 1472;

pub const ARCH_DO_DOMCTL: crate::patch::Original =
    crate::patch::Original { name: "arch_do_domctl\0", size: 9039, head: &[0x41, 0x57, 0x41, 0x56, 0x49, 0x89, 0xf6] };
pub const UPDATE_VCPU_SYSTEM_TIME: crate::patch::Original =
    crate::patch::Original { name: "arch/x86/time.c#__update_vcpu_system_time\0", size: 674, head: &[0x41, 0x56, 0x41, 0x55, 0x41, 0x54] };
pub const UPDATE_RUNSTATE_AREA: crate::patch::Original =
    crate::patch::Original { name: "update_runstate_area\0", size: 692, head: &[0x41, 0x55, 0x41, 0x54, 0x41, 0xbc, 0x01, 0x00, 0x00, 0x00] };
pub const COMMON_VCPU_OP: crate::patch::Original =
    crate::patch::Original { name: "common_vcpu_op\0", size: 1479, head: &[0x41, 0x55, 0x41, 0x54, 0x49, 0x89, 0xd4] };
pub const COMPAT_COMMON_VCPU_OP: crate::patch::Original =
    crate::patch::Original { name: "compat_common_vcpu_op\0", size: 873, head: &[0x41, 0x57, 0x41, 0x56, 0x49, 0x89, 0xd6] };
pub const COMPAT_VCPU_OP: crate::patch::Original =
    crate::patch::Original { name: "compat_vcpu_op\0", size: 694, head: &[0x53, 0x49, 0x89, 0xd2, 0x41, 0x89, 0xf1] };
pub const DO_SET_TIMER_OP: crate::patch::Original =
    crate::patch::Original { name: "do_set_timer_op\0", size: 150, head: &[0x55, 0x53, 0x48, 0x89, 0xfb] };
pub const DO_POLL: crate::patch::Original =
    crate::patch::Original { name: "common/sched/core.c#do_poll\0", size: 950, head: &[0x41, 0x57, 0x41, 0x56, 0x41, 0x55] };
pub const DO_HVM_OP: crate::patch::Original =
    crate::patch::Original { name: "do_hvm_op\0", size: 2704, head: &[0x41, 0x55, 0x41, 0x54, 0x55] };
pub const ARCH_DOMAIN_DESTROY: crate::patch::Original =
    crate::patch::Original { name: "arch_domain_destroy\0", size: 165, head: &[0x53, 0x48, 0x89, 0xfb, 0xf6, 0x87, 0x3c, 0x01, 0x00, 0x00, 0x01] };
pub const UPDATE_DOMAIN_WALLCLOCK_TIME: crate::patch::Original =
    crate::patch::Original { name: "update_domain_wallclock_time\0", size: 227, head: &[0x55, 0x48, 0x8d, 0x2d, 0x48] };

/// The displaced beginning of a function, and the jump behind it.
macro_rules! original {
    (arch_do_domctl) => { ".byte 0x41, 0x57, 0x41, 0x56, 0x49, 0x89, 0xf6\njmp \"arch_do_domctl\" + 7" };
    (update_vcpu_system_time) => { ".byte 0x41, 0x56, 0x41, 0x55, 0x41, 0x54\njmp \"arch/x86/time.c#__update_vcpu_system_time\" + 6" };
    (update_runstate_area) => { ".byte 0x41, 0x55, 0x41, 0x54, 0x41, 0xbc, 0x01, 0x00, 0x00, 0x00\njmp \"update_runstate_area\" + 10" };
    (common_vcpu_op) => { ".byte 0x41, 0x55, 0x41, 0x54, 0x49, 0x89, 0xd4\njmp \"common_vcpu_op\" + 7" };
    (compat_common_vcpu_op) => { ".byte 0x41, 0x57, 0x41, 0x56, 0x49, 0x89, 0xd6\njmp \"compat_common_vcpu_op\" + 7" };
    (compat_vcpu_op) => { ".byte 0x53, 0x49, 0x89, 0xd2, 0x41, 0x89, 0xf1\njmp \"compat_vcpu_op\" + 7" };
    (do_set_timer_op) => { ".byte 0x55, 0x53, 0x48, 0x89, 0xfb\njmp \"do_set_timer_op\" + 5" };
    (do_poll) => { ".byte 0x41, 0x57, 0x41, 0x56, 0x41, 0x55\njmp \"common/sched/core.c#do_poll\" + 6" };
    (do_hvm_op) => { ".byte 0x41, 0x55, 0x41, 0x54, 0x55\njmp \"do_hvm_op\" + 5" };
    (arch_domain_destroy) => { ".byte 0x53, 0x48, 0x89, 0xfb, 0xf6, 0x87, 0x3c, 0x01, 0x00, 0x00, 0x01\njmp \"arch_domain_destroy\" + 11" };
}
pub(crate) use original;
