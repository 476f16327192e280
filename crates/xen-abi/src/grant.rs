//! `GNTTABOP_*` and grant entries, versions 1 and 2 (`xen/include/public/grant_table.h`).

use crate::layout::{abi_numbers, abi_structs};

abi_numbers! {
    SETUP_TABLE: u64 = 2, "GNTTABOP_setup_table";
    QUERY_SIZE: u64 = 6, "GNTTABOP_query_size";
    SET_VERSION: u64 = 8, "GNTTABOP_set_version";
    GET_STATUS_FRAMES: u64 = 9, "GNTTABOP_get_status_frames";
    GET_VERSION: u64 = 10, "GNTTABOP_get_version";

    RESERVED_ENTRIES: u32 = 8, "GNTTAB_NR_RESERVED_ENTRIES";
    RESERVED_CONSOLE: u32 = 0, "GNTTAB_RESERVED_CONSOLE";
    RESERVED_XENSTORE: u32 = 1, "GNTTAB_RESERVED_XENSTORE";

    GTF_TYPE_MASK: u16 = 3, "GTF_type_mask";
    GTF_INVALID: u16 = 0, "GTF_invalid";
    GTF_PERMIT_ACCESS: u16 = 1, "GTF_permit_access";
    GTF_ACCEPT_TRANSFER: u16 = 2, "GTF_accept_transfer";
    GTF_TRANSITIVE: u16 = 3, "GTF_transitive";
    GTF_READONLY: u16 = 1 << 2, "GTF_readonly";
    GTF_READING: u16 = 1 << 3, "GTF_reading";
    GTF_WRITING: u16 = 1 << 4, "GTF_writing";
    GTF_SUB_PAGE: u16 = 1 << 8, "GTF_sub_page";

    GNTST_OKAY: i16 = 0, "GNTST_okay";
    GNTST_GENERAL_ERROR: i16 = -1, "GNTST_general_error";
    GNTST_BAD_DOMAIN: i16 = -2, "GNTST_bad_domain";
    GNTST_BAD_GNTREF: i16 = -3, "GNTST_bad_gntref";
    GNTST_PERMISSION_DENIED: i16 = -8, "GNTST_permission_denied";
    GNTST_NO_SPACE: i16 = -13, "GNTST_no_space";
}

/// Entries in a frame of a version-1 table.
pub const V1_ENTRIES_PER_FRAME: usize = 512;
/// Entries in a frame of a version-2 table.
pub const V2_ENTRIES_PER_FRAME: usize = 256;
/// Status words in a status frame.
pub const STATUS_PER_FRAME: usize = 2048;

abi_structs! {
    struct EntryV1 = "struct grant_entry_v1" {
        flags: u16,
        domid: u16,
        frame: u32,
    }

    /// The layout of a full-page grant; for a sub-page grant `detail` holds page offset and length (16 bits each), for a transitive one the
    /// other domid, and `frame` its grant reference.
    struct EntryV2 = "union grant_entry_v2" {
        flags: u16 = "hdr.flags",
        domid: u16 = "hdr.domid",
        detail: u32 = "full_page.pad0",
        frame: u64 = "full_page.frame",
    }

    struct SetupTable = "struct gnttab_setup_table" {
        dom: u16,
        _pad: u16,
        nr_frames: u32,
        status: i16,
        _pad2: [u16; 3],
        frame_list: u64,
    }

    struct QuerySize = "struct gnttab_query_size" {
        dom: u16,
        _pad: u16,
        nr_frames: u32,
        max_nr_frames: u32,
        status: i16,
        _pad2: u16,
    }

    struct GetVersion = "struct gnttab_get_version" {
        dom: u16,
        _pad: u16,
        version: u32,
    }

    struct GetStatusFrames = "struct gnttab_get_status_frames" {
        nr_frames: u32,
        dom: u16,
        status: i16,
        frame_list: u64,
    }
}
