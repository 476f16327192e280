//! Which interface versions of Xen are known, as data.

/// What differs between the interface versions of Xen, for one `major.minor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interface {
    pub major: u16,
    pub minor: u16,
    /// `XEN_DOMCTL_INTERFACE_VERSION`; Xen refuses any other with EACCES.
    pub domctl: u32,
    /// `XEN_SYSCTL_INTERFACE_VERSION`, likewise.
    pub sysctl: u32,
    /// `XENPF_INTERFACE_VERSION`, likewise.
    pub platform: u32,
    /// `xen_domctl_createdomain` has `altp2m_opts`.
    pub createdomain_altp2m: bool,
    /// Bytes of the HVM save record LAPIC.
    pub lapic_record_len: u32,
    /// `EVTCHNOP_status` describes ports that Xen itself consumes (else: EACCES).
    pub status_of_xen_ports: bool,
    /// Areas can be registered by guest-physical address; vcpu_info's page keeps its contents on mapping.
    pub phys_areas: bool,
    /// Run against a real hypervisor of this version, or only checked against its headers.
    pub proven: bool,
}

/// Every supported version.
pub static INTERFACES: &[Interface] = &[
    Interface {
        major: 4,
        minor: 17,
        domctl: 0x15,
        sysctl: 0x15,
        platform: 0x0300_0001,
        createdomain_altp2m: false,
        lapic_record_len: 24,
        status_of_xen_ports: false,
        phys_areas: false,
        proven: true,
    },
    Interface {
        major: 4,
        minor: 20,
        domctl: 0x17,
        sysctl: 0x15,
        platform: 0x0300_0001,
        createdomain_altp2m: true,
        lapic_record_len: 32,
        status_of_xen_ports: true,
        phys_areas: true,
        proven: false,
    },
];

/// The numbers of one version, or `None` if it is not supported.
pub fn interface(major: u16, minor: u16) -> Option<&'static Interface> {
    INTERFACES.iter().find(|i| (i.major, i.minor) == (major, minor))
}
