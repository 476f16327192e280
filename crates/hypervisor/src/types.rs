//! The shapes of what the trait's operations take and give.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use uuid::Uuid;

/// Bytes in a page, and in a guest frame.
pub const PAGE_SIZE: usize = 4096;

/// A domain id. Guests have 1..0x7ff0 (`DOMID_FIRST_RESERVED`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DomId(pub u16);

impl DomId {
    /// The control domain, which is also the usual service domain.
    pub const DOM0: DomId = DomId(0);
}

impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A guest frame number: guest-physical address / [`PAGE_SIZE`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
#[repr(transparent)]
pub struct Gfn(pub u64);

impl fmt::Debug for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gfn {:#x}", self.0)
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// An event-channel port, of the domain that the context says. 0 is never valid.
pub type Port = u32;

/// Nanoseconds of a hypervisor's system time (`NOW()`): since its boot, never stepping.
pub type SystemTimeNs = u64;

/// The hypervisor and the machine under it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    pub version: XenVersion,
    /// `XENVER_capabilities`: words such as `hvm-3.0-x86_64`.
    pub capabilities: String,
    /// The hypervisor's build id in lower-case hex, empty if it was linked without one.
    pub build_id: String,
    /// `XENVER_commandline`.
    pub command_line: String,
    pub total_pages: u64,
    pub free_pages: u64,
    /// Pages claimed by domains that are not yet populated; not for others to take.
    pub outstanding_pages: u64,
    pub cpus: u32,
    pub tsc_khz: u32,
    /// `XEN_SYSCTL_PHYSCAP_*`.
    pub physcaps: u32,
    /// Guest-transparent state can be read and written: the extension is loaded and speaks our version.
    pub extension: Option<ExtensionInfo>,
}

/// A Xen version, as `XENVER_version` and `XENVER_extraversion` tell it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct XenVersion {
    pub major: u16,
    pub minor: u16,
    /// With its leading point or hyphen: `.5`, `.4-pre`.
    pub extra: String,
}

impl fmt::Display for XenVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}{}", self.major, self.minor, self.extra)
    }
}

/// What the loaded extension says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtensionInfo {
    /// `xen_abi::ext::ABI_VERSION` of the one that is loaded; 0 if it is so different that it does not say.
    pub abi_version: u32,
}

/// A CPU policy: CPUID leaves and MSRs as `XEN_DOMCTL_get_cpu_policy` serialises them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuPolicy {
    pub leaves: Vec<CpuidLeaf>,
    pub msrs: Vec<MsrEntry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    pub leaf: u32,
    /// [`CpuidLeaf::NO_SUBLEAF`] where the leaf has none.
    pub subleaf: u32,
    pub a: u32,
    pub b: u32,
    pub c: u32,
    pub d: u32,
}

impl CpuidLeaf {
    /// `XEN_CPUID_NO_SUBLEAF`.
    pub const NO_SUBLEAF: u32 = u32::MAX;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsrEntry {
    pub index: u32,
    /// Reserved by Xen, zero.
    pub flags: u32,
    pub value: u64,
}

/// Which of the host's own policies (`XEN_SYSCTL_cpu_policy_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostPolicy {
    Raw,
    Host,
    HvmMax,
    HvmDefault,
}

/// `XEN_DOMCTL_getdomaininfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainInfo {
    pub domid: DomId,
    pub uuid: Uuid,
    pub hvm: bool,
    pub hap: bool,
    pub xs_domain: bool,
    /// Paused by control software (any pause count above zero).
    pub paused: bool,
    pub dying: bool,
    pub running: bool,
    pub blocked: bool,
    /// `SHUTDOWN_*` if the guest has shut down.
    pub shutdown: Option<u8>,
    pub total_pages: u64,
    pub max_pages: u64,
    pub outstanding_pages: u64,
    pub shared_pages: u64,
    pub paged_pages: u64,
    /// `None` while the guest has not placed shared_info anywhere.
    pub shared_info: Option<Gfn>,
    pub cpu_time_ns: u64,
    pub online_vcpus: u32,
    /// Number of vCPUs that exist (highest vCPU id + 1).
    pub vcpus: u32,
    pub ssidref: u32,
    pub cpupool: u32,
    /// Width of guest-physical addresses, bits.
    pub gpaddr_bits: u8,
    /// `XEN_X86_EMU_*`.
    pub emulation_flags: u32,
    /// `XEN_X86_MSR_RELAXED`, ….
    pub misc_flags: u32,
}

/// What `XEN_DOMCTL_createdomain` takes, for an HVM or PVH guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainConfig {
    pub uuid: Uuid,
    pub ssidref: u32,
    /// `XEN_DOMCTL_CDF_*`; must hold HVM.
    pub flags: u32,
    /// `XEN_DOMCTL_IOMMU_*`.
    pub iommu_opts: u32,
    pub max_vcpus: u32,
    pub max_evtchn_port: u32,
    /// Negative: the host's default.
    pub max_grant_frames: i32,
    pub max_maptrack_frames: i32,
    /// Highest grant-table version the guest may switch to, 1 or 2.
    pub grant_opts: u32,
    pub cpupool: u32,
    pub emulation_flags: u32,
    pub misc_flags: u32,
}

/// One vCPU as the scheduler sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuInfo {
    pub vcpu: u32,
    pub online: bool,
    pub blocked: bool,
    pub running: bool,
    pub cpu_time_ns: u64,
}

/// `XEN_DOMCTL_gettscinfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TscInfo {
    /// `XEN_CPUID_TSC_MODE_*`.
    pub mode: u32,
    /// What the guest's TSC ticks at, kHz.
    pub khz: u32,
    /// Counts the guest's migrations. `set` stores one more than it is given (Xen does so).
    pub incarnation: u32,
    /// Nanoseconds that the guest's TSC has counted, where Xen emulates it.
    pub elapsed_ns: u64,
}

/// One range of the guest's memory map (`XENMEM_memory_map`), in E820 terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRange {
    /// Bytes.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// E820 type: 1 RAM, 2 reserved, 3 ACPI, 4 NVS, 5 unusable.
    pub kind: u32,
}

/// What is behind a gfn, as far as a migration is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PageType {
    /// Ordinary guest memory: to be moved.
    Ram,
    /// Nothing, MMIO, or a page of Xen's own (shared_info, grant frames): not part of the memory image.
    NotRam,
    /// The host's memory under it is broken.
    Broken,
}

/// CPUs that are scheduled together (`XEN_SYSCTL_CPUPOOL_OP_INFO`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuPool {
    pub id: u32,
    /// `XEN_SCHEDULER_*`.
    pub scheduler: u32,
    pub cpus: BTreeSet<u32>,
}

/// What share of its pool's CPUs a domain gets, with the schedulers credit and credit2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// `XEN_SCHEDULER_*`.
    pub scheduler: u32,
    /// In relation to other domains' weights.
    pub weight: u16,
    /// Most that it gets, percent of one CPU; 0: no limit.
    pub cap: u16,
}

/// On which CPUs a vCPU may run, and on which it should; `None`: any.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Affinity {
    pub hard: Option<BTreeSet<u32>>,
    pub soft: Option<BTreeSet<u32>>,
}

/// Memory that a guest is told it has and that gets its pages when it is first touched (`XENMEM_get_pod_target`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PopulateOnDemand {
    /// gfns without a page yet.
    pub entries: u64,
    /// Pages that Xen keeps for them. If there are fewer than entries, a touch too many crashes the guest.
    pub cache_pages: u64,
}

/// What `XENMEM_add_to_physmap` can place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum XenPage {
    SharedInfo,
    /// Frame of the grant table, by index.
    GrantFrame(u32),
    /// Frame of the version-2 grant status area, by index.
    GrantStatusFrame(u32),
}

/// Counters of one look at the dirty bitmap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyStats {
    /// Pages the bitmap covers, from gfn 0.
    pub pages: u64,
    /// Faults since the last clean.
    pub fault_count: u32,
    /// Pages marked since the last clean.
    pub dirty_count: u32,
}

/// One bit for each gfn from 0 on; bit n of byte n/8 is gfn n.
#[derive(Clone, PartialEq, Eq)]
pub struct DirtyBitmap {
    words: Vec<u64>,
    pages: u64,
}

impl fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DirtyBitmap({} of {} pages)", self.count(), self.pages)
    }
}

impl DirtyBitmap {
    /// A bitmap for gfns 0..`pages`, none dirty.
    pub fn new(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        DirtyBitmap { words: vec![0; words], pages }
    }

    /// How many gfns it covers.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// `false` for a gfn that the bitmap does not cover.
    pub fn contains(&self, gfn: Gfn) -> bool {
        gfn.0 < self.pages && self.words.get((gfn.0 / 64) as usize).is_some_and(|w| w >> (gfn.0 % 64) & 1 == 1)
    }

    /// Ignores a gfn that the bitmap does not cover.
    pub fn insert(&mut self, gfn: Gfn) {
        if gfn.0 < self.pages {
            self.words[(gfn.0 / 64) as usize] |= 1 << (gfn.0 % 64);
        }
    }

    /// Ignores a gfn that the bitmap does not cover.
    pub fn remove(&mut self, gfn: Gfn) {
        if gfn.0 < self.pages {
            self.words[(gfn.0 / 64) as usize] &= !(1 << (gfn.0 % 64));
        }
    }

    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds every gfn of `other` that this bitmap covers too.
    pub fn union(&mut self, other: &DirtyBitmap) {
        for (w, o) in self.words.iter_mut().zip(&other.words) {
            *w |= o;
        }
        self.trim();
    }

    /// The dirty gfns, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Gfn> + '_ {
        self.words.iter().enumerate().flat_map(|(i, &word)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                (rest != 0).then(|| {
                    let bit = rest.trailing_zeros();
                    rest &= rest - 1;
                    Gfn(i as u64 * 64 + u64::from(bit))
                })
            })
        })
    }

    /// The 64-bit words, little-endian bit order, for whoever fills the bitmap. Call [`Self::trim`] after.
    pub fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// Clears bits past the last covered gfn.
    pub fn trim(&mut self) {
        if !self.pages.is_multiple_of(64)
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << (self.pages % 64)) - 1;
        }
    }
}

/// `EVTCHNOP_status`: what a port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortStatus {
    pub state: PortState,
    /// The vCPU that is notified.
    pub vcpu: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PortState {
    Closed,
    /// Waits for `remote` to bind to it.
    Unbound {
        remote: DomId,
    },
    Interdomain {
        remote: DomId,
        remote_port: Port,
    },
    Pirq(u32),
    Virq(u32),
    Ipi,
    /// In use by Xen itself (an ioreq server's port): Xen up to 4.18 answers EACCES for it.
    Xen,
}

/// Size of a domain's grant table (`GNTTABOP_query_size`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantTableSize {
    pub frames: u32,
    pub max_frames: u32,
}

/// The two arrays of a grant table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GrantArray {
    /// Entries: 8 bytes each in version 1, 16 in version 2.
    Shared,
    /// Version 2 only: status words, 2 bytes each.
    Status,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_covers_exactly_its_pages() {
        let mut b = DirtyBitmap::new(70);
        for g in [0, 63, 64, 69, 70, 1000] {
            b.insert(Gfn(g));
        }
        assert_eq!(b.iter().collect::<Vec<_>>(), [Gfn(0), Gfn(63), Gfn(64), Gfn(69)]);
        assert!(b.contains(Gfn(69)) && !b.contains(Gfn(70)) && !b.contains(Gfn(1)));
        b.words_mut()[1] |= 1 << 63;
        b.trim();
        assert_eq!(b.count(), 4);
        let mut c = DirtyBitmap::new(66);
        c.union(&b);
        assert_eq!(c.iter().collect::<Vec<_>>(), [Gfn(0), Gfn(63), Gfn(64)]);
        c.remove(Gfn(63));
        assert_eq!(c.count(), 2);
        c.clear();
        assert_eq!(c.count(), 0);
    }
}
