//! `HVMOP_*` and `HVM_PARAM_*` (`xen/include/public/hvm/{hvm_op,params}.h`).

use crate::layout::{abi_numbers, abi_structs};

abi_numbers! {
    /// Answers with the hypervisor's `NOW()`, to any caller: how the control domain reads it.
    GET_TIME: u64 = 10, "HVMOP_get_time";
    SET_PARAM: u64 = 0, "HVMOP_set_param";
    GET_PARAM: u64 = 1, "HVMOP_get_param";

    PARAM_CALLBACK_IRQ: u32 = 0, "HVM_PARAM_CALLBACK_IRQ";
    PARAM_STORE_PFN: u32 = 1, "HVM_PARAM_STORE_PFN";
    PARAM_STORE_EVTCHN: u32 = 2, "HVM_PARAM_STORE_EVTCHN";
    PARAM_PAE_ENABLED: u32 = 4, "HVM_PARAM_PAE_ENABLED";
    PARAM_IOREQ_PFN: u32 = 5, "HVM_PARAM_IOREQ_PFN";
    PARAM_BUFIOREQ_PFN: u32 = 6, "HVM_PARAM_BUFIOREQ_PFN";
    PARAM_VIRIDIAN: u32 = 9, "HVM_PARAM_VIRIDIAN";
    PARAM_TIMER_MODE: u32 = 10, "HVM_PARAM_TIMER_MODE";
    PARAM_HPET_ENABLED: u32 = 11, "HVM_PARAM_HPET_ENABLED";
    PARAM_IDENT_PT: u32 = 12, "HVM_PARAM_IDENT_PT";
    PARAM_ACPI_S_STATE: u32 = 14, "HVM_PARAM_ACPI_S_STATE";
    PARAM_VM86_TSS: u32 = 15, "HVM_PARAM_VM86_TSS";
    PARAM_VPT_ALIGN: u32 = 16, "HVM_PARAM_VPT_ALIGN";
    PARAM_CONSOLE_PFN: u32 = 17, "HVM_PARAM_CONSOLE_PFN";
    PARAM_CONSOLE_EVTCHN: u32 = 18, "HVM_PARAM_CONSOLE_EVTCHN";
    PARAM_ACPI_IOPORTS_LOCATION: u32 = 19, "HVM_PARAM_ACPI_IOPORTS_LOCATION";
    PARAM_NESTEDHVM: u32 = 24, "HVM_PARAM_NESTEDHVM";
    PARAM_BUFIOREQ_EVTCHN: u32 = 26, "HVM_PARAM_BUFIOREQ_EVTCHN";
    PARAM_PAGING_RING_PFN: u32 = 27, "HVM_PARAM_PAGING_RING_PFN";
    PARAM_MONITOR_RING_PFN: u32 = 28, "HVM_PARAM_MONITOR_RING_PFN";
    PARAM_SHARING_RING_PFN: u32 = 29, "HVM_PARAM_SHARING_RING_PFN";
    PARAM_TRIPLE_FAULT_REASON: u32 = 31, "HVM_PARAM_TRIPLE_FAULT_REASON";
    PARAM_IOREQ_SERVER_PFN: u32 = 32, "HVM_PARAM_IOREQ_SERVER_PFN";
    PARAM_NR_IOREQ_SERVER_PAGES: u32 = 33, "HVM_PARAM_NR_IOREQ_SERVER_PAGES";
    PARAM_VM_GENERATION_ID_ADDR: u32 = 34, "HVM_PARAM_VM_GENERATION_ID_ADDR";
    PARAM_ALTP2M: u32 = 35, "HVM_PARAM_ALTP2M";
    PARAM_X87_FIP_WIDTH: u32 = 36, "HVM_PARAM_X87_FIP_WIDTH";
    PARAM_VM86_TSS_SIZED: u32 = 37, "HVM_PARAM_VM86_TSS_SIZED";
    PARAM_MCA_CAP: u32 = 38, "HVM_PARAM_MCA_CAP";
    NR_PARAMS: u32 = 39, "HVM_NR_PARAMS";

}

abi_structs! {
    struct HvmParam = "struct xen_hvm_param" {
        domid: u16,
        _pad: u16,
        index: u32,
        value: u64,
    }

    struct GetTime = "struct xen_hvm_get_time" {
        now: u64,
    }
}

/// What a parameter means to somebody who moves a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamRole {
    /// Part of the guest's state: to be set again with the same value.
    Guest,
    /// The guest's callback: set last of all, because setting it asserts the upcall again.
    Callback,
    /// A port number: set to the same number, after the port exists.
    Port,
    /// The device model's or Xen's own business; made anew by them.
    DeviceModel,
    /// Not 0 means a feature that cannot be moved.
    MustBeZero,
}

/// One parameter that Xen lets the control domain read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    pub index: u32,
    pub name: &'static str,
    pub role: ParamRole,
}

/// Every parameter that has a meaning in 4.17 to 4.20, in ascending order.
pub static PARAMS: &[Param] = {
    use ParamRole::*;
    const fn p(index: u32, name: &'static str, role: ParamRole) -> Param {
        Param { index, name, role }
    }
    &[
        p(PARAM_CALLBACK_IRQ, "CALLBACK_IRQ", Callback),
        p(PARAM_STORE_PFN, "STORE_PFN", Guest),
        p(PARAM_STORE_EVTCHN, "STORE_EVTCHN", Port),
        p(PARAM_IOREQ_PFN, "IOREQ_PFN", DeviceModel),
        p(PARAM_BUFIOREQ_PFN, "BUFIOREQ_PFN", DeviceModel),
        p(PARAM_VIRIDIAN, "VIRIDIAN", Guest),
        p(PARAM_TIMER_MODE, "TIMER_MODE", Guest),
        p(PARAM_HPET_ENABLED, "HPET_ENABLED", Guest),
        p(PARAM_IDENT_PT, "IDENT_PT", Guest),
        p(PARAM_ACPI_S_STATE, "ACPI_S_STATE", Guest),
        p(PARAM_VM86_TSS, "VM86_TSS", Guest),
        p(PARAM_VPT_ALIGN, "VPT_ALIGN", Guest),
        p(PARAM_CONSOLE_PFN, "CONSOLE_PFN", Guest),
        p(PARAM_CONSOLE_EVTCHN, "CONSOLE_EVTCHN", Port),
        p(PARAM_ACPI_IOPORTS_LOCATION, "ACPI_IOPORTS_LOCATION", Guest),
        p(PARAM_PAGING_RING_PFN, "PAGING_RING_PFN", DeviceModel),
        p(PARAM_MONITOR_RING_PFN, "MONITOR_RING_PFN", DeviceModel),
        p(PARAM_SHARING_RING_PFN, "SHARING_RING_PFN", DeviceModel),
        p(PARAM_TRIPLE_FAULT_REASON, "TRIPLE_FAULT_REASON", Guest),
        p(PARAM_IOREQ_SERVER_PFN, "IOREQ_SERVER_PFN", DeviceModel),
        p(PARAM_NR_IOREQ_SERVER_PAGES, "NR_IOREQ_SERVER_PAGES", DeviceModel),
        p(PARAM_VM_GENERATION_ID_ADDR, "VM_GENERATION_ID_ADDR", Guest),
        p(PARAM_ALTP2M, "ALTP2M", MustBeZero),
        p(PARAM_X87_FIP_WIDTH, "X87_FIP_WIDTH", Guest),
        p(PARAM_VM86_TSS_SIZED, "VM86_TSS_SIZED", Guest),
        p(PARAM_MCA_CAP, "MCA_CAP", Guest),
    ]
};

/// The parameter of that index, if it has a meaning.
pub fn param(index: u32) -> Option<&'static Param> {
    PARAMS.iter().find(|p| p.index == index)
}
