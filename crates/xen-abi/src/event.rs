//! `EVTCHNOP_*` and the shared structures of event channels (`xen/include/public/event_channel.h`).

use crate::layout::{abi_numbers, abi_structs};

abi_numbers! {
    BIND_INTERDOMAIN: u64 = 0, "EVTCHNOP_bind_interdomain";
    BIND_VIRQ: u64 = 1, "EVTCHNOP_bind_virq";
    CLOSE: u64 = 3, "EVTCHNOP_close";
    SEND: u64 = 4, "EVTCHNOP_send";
    STATUS: u64 = 5, "EVTCHNOP_status";
    ALLOC_UNBOUND: u64 = 6, "EVTCHNOP_alloc_unbound";
    BIND_IPI: u64 = 7, "EVTCHNOP_bind_ipi";
    BIND_VCPU: u64 = 8, "EVTCHNOP_bind_vcpu";
    UNMASK: u64 = 9, "EVTCHNOP_unmask";
    INIT_CONTROL: u64 = 11, "EVTCHNOP_init_control";
    EXPAND_ARRAY: u64 = 12, "EVTCHNOP_expand_array";
    SET_PRIORITY: u64 = 13, "EVTCHNOP_set_priority";

    STAT_CLOSED: u32 = 0, "EVTCHNSTAT_closed";
    STAT_UNBOUND: u32 = 1, "EVTCHNSTAT_unbound";
    STAT_INTERDOMAIN: u32 = 2, "EVTCHNSTAT_interdomain";
    STAT_PIRQ: u32 = 3, "EVTCHNSTAT_pirq";
    STAT_VIRQ: u32 = 4, "EVTCHNSTAT_virq";
    STAT_IPI: u32 = 5, "EVTCHNSTAT_ipi";

    /// Ports of a 64-bit guest with the 2-level ABI.
    NR_2L_PORTS: u32 = 4096, "EVTCHN_2L_NR_CHANNELS";
    /// Ports with the FIFO ABI.
    NR_FIFO_PORTS: u32 = 1 << 17, "EVTCHN_FIFO_NR_CHANNELS";
    FIFO_PRIORITY_DEFAULT: u8 = 7, "EVTCHN_FIFO_PRIORITY_DEFAULT";
    FIFO_MAX_QUEUES: u32 = 16, "EVTCHN_FIFO_MAX_QUEUES";
    /// Bit numbers in an event word.
    FIFO_PENDING: u32 = 31, "EVTCHN_FIFO_PENDING";
    FIFO_MASKED: u32 = 30, "EVTCHN_FIFO_MASKED";
    FIFO_LINKED: u32 = 29, "EVTCHN_FIFO_LINKED";
    FIFO_BUSY: u32 = 28, "EVTCHN_FIFO_BUSY";
    /// The low bits of an event word: the next port on its queue.
    FIFO_LINK_MASK: u32 = (1 << 17) - 1, "EVTCHN_FIFO_LINK_MASK";
}

/// Event words in a page of the FIFO event array.
pub const FIFO_WORDS_PER_PAGE: u32 = 1024;

/// Ports of a 32-bit guest with the 2-level ABI.
pub const NR_2L_PORTS_32BIT: u32 = 1024;

abi_structs! {
    struct AllocUnbound = "struct evtchn_alloc_unbound" {
        dom: u16,
        remote_dom: u16,
        port: u32,
    }

    struct BindInterdomain = "struct evtchn_bind_interdomain" {
        remote_dom: u16,
        _pad: u16,
        remote_port: u32,
        local_port: u32,
    }

    struct Close = "struct evtchn_close" {
        port: u32,
    }

    struct Send = "struct evtchn_send" {
        port: u32,
    }

    /// `u` holds: unbound: the remote domid; interdomain: domid, then port; pirq or virq: its number.
    struct Status = "struct evtchn_status" {
        dom: u16,
        _pad: u16,
        port: u32,
        status: u32,
        vcpu: u32,
        u: StatusDetail,
    }

    /// As for an interdomain port; for the others the first four bytes are a little-endian number.
    struct StatusDetail = "__typeof__(((struct evtchn_status *)0)->u)" {
        dom: u16 = "interdomain.dom",
        _pad: u16,
        port: u32 = "interdomain.port",
    }

    /// Shared between Xen and one vCPU: which queues have something, and the first port on each.
    struct FifoControlBlock = "struct evtchn_fifo_control_block" {
        ready: u32,
        _rsvd: u32,
        head: [u32; FIFO_MAX_QUEUES as usize],
    }
}

impl StatusDetail {
    /// The pirq or virq.
    pub fn number(&self) -> u32 {
        u32::from(self.dom) | u32::from(self._pad) << 16
    }
}
