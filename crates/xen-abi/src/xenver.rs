//! `XENVER_*` (`xen/include/public/version.h`).

use crate::layout::abi_numbers;

abi_numbers! {
    VERSION: u64 = 0, "XENVER_version";
    EXTRAVERSION: u64 = 1, "XENVER_extraversion";
    CAPABILITIES: u64 = 3, "XENVER_capabilities";
    COMMANDLINE: u64 = 9, "XENVER_commandline";
    BUILD_ID: u64 = 10, "XENVER_build_id";
    EXTRAVERSION_LEN: usize = 16, "XEN_EXTRAVERSION_LEN";
    CAPABILITIES_LEN: usize = 1024, "XEN_CAPABILITIES_INFO_LEN";
    COMMANDLINE_LEN: usize = 1024, "sizeof(xen_commandline_t)";
}
