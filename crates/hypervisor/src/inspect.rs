//! The whole state of a guest that a migration carries in the hypervisor, for a person to read and a script to compare.

mod diff;
mod print;

pub use diff::{Difference, diff};

use crate::{
    Access, CpuPolicy, DomId, DomainInfo, GrantArray, GtState, Hypervisor, HypervisorError, PAGE_SIZE, Port,
    PortStatus, Result, TscInfo, VcpuInfo, WallClock,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Instant;
use xen_abi::layout::StructLayout;
use xen_abi::{grant, hvm_op, hvm_save, shared};
use zerocopy::FromBytes;

/// Everything that the hypervisor holds of a guest, but for its memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestState {
    pub xen: String,
    pub build_id: String,
    pub domain: DomainInfo,
    pub vcpus: Vec<VcpuInfo>,
    pub tsc: TscInfo,
    /// `VMASST_TYPE_*` bits.
    pub vm_assist: u64,
    pub paging_pool_bytes: u64,
    pub cpu_policy: CpuPolicy,
    /// By name, without `HVM_PARAM_`. Those that Xen does not let be read are left out.
    pub hvm_params: BTreeMap<String, u64>,
    pub hvm_records: Vec<RecordReport>,
    pub ports: BTreeMap<Port, PortStatus>,
    pub grants: GrantReport,
    pub shared_info: Option<SharedInfoReport>,
    /// `None` if the extension is not loaded; `gt_missing` says so.
    pub gt: Option<GtState>,
    pub gt_missing: Option<String>,
    pub timing: Timing,
}

/// One HVM save record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordReport {
    pub name: String,
    /// The vCPU, or 0.
    pub instance: u16,
    /// Bytes.
    pub length: usize,
    /// The fields of the record's C structure: numbers as `0x…`, arrays as hex bytes in memory order. What lies behind the structure is
    /// under `(rest)`.
    pub fields: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantReport {
    pub version: u32,
    pub frames: u32,
    pub max_frames: u32,
    /// Where the guest has placed each frame.
    pub gfns: Vec<Option<crate::Gfn>>,
    /// Entries in use, by grant reference.
    pub entries: BTreeMap<u32, GrantEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantEntry {
    /// `GTF_*`, without the in-use flags.
    pub flags: u16,
    pub domid: DomId,
    /// gfn, or for a transitive grant the other grant reference.
    pub frame: u64,
    /// Mapped by the other domain now.
    pub in_use: bool,
}

/// What of shared_info is not to be copied blindly, and what shows whether events are lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedInfoReport {
    pub wall_clock: WallClock,
    /// Ports pending and masked in the 2-level bitmaps (always empty with the FIFO ABI).
    pub pending: Vec<Port>,
    pub masked: Vec<Port>,
}

/// How long looking took, microseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// From before the pause to the call that ends it; 0 if the guest was not paused.
    pub paused_us: u64,
    /// What the pause was spent on.
    pub parts_us: BTreeMap<String, u64>,
}

/// Reads it all. `pause`: hold the guest paused while reading what must fit together; without, a running guest changes under the eyes.
pub fn inspect(hv: &dyn Hypervisor, dom: DomId, pause: bool) -> Result<GuestState> {
    let host = hv.host_info()?;
    let info = hv.domain_info(dom)?;
    if !info.hvm {
        return Err(HypervisorError::unsupported(
            "inspect",
            dom,
            "a PV guest; only HVM and PVH guests can be looked at",
        ));
    }
    let cpu_policy = hv.cpu_policy(dom)?;
    let paging_pool_bytes = hv.paging_pool_size(dom)?;
    let tsc = hv.tsc_info(dom)?;
    let extension = host.extension.is_some();
    let vcpus = (0..info.vcpus).map(|v| hv.vcpu_info(dom, v)).collect::<Result<Vec<_>>>()?;
    let vm_assist = hv.vm_assist(dom)?;
    let hvm_params =
        hvm_op::PARAMS.iter().filter_map(|p| hv.hvm_param(dom, p.index).ok().map(|v| (p.name.to_owned(), v))).collect();

    let start = Instant::now();
    if pause {
        hv.pause(dom)?;
    }
    let pausing_us = micros(start);
    let held = held_part(hv, &info, extension);
    // What follows the call is the guest's time again: on a host with one processor it may run before this program does.
    let paused_us = if pause { micros(start) } else { 0 };
    if pause {
        // Whatever went wrong while looking, the guest goes on first.
        hv.unpause(dom)?;
    }
    let mut held = held?;
    if pause {
        held.parts_us.insert("pause".to_owned(), pausing_us);
    }

    Ok(GuestState {
        xen: host.version.to_string(),
        build_id: host.build_id,
        vcpus,
        vm_assist,
        paging_pool_bytes,
        cpu_policy,
        tsc,
        hvm_params,
        hvm_records: records(dom, &held.context)?,
        ports: held.ports.into_iter().collect(),
        grants: grants(&held.grants),
        shared_info: held.shared_info.as_deref().map(|page| shared_info(page, held.gt.as_ref())),
        gt_missing: (!extension)
            .then(|| "the hypervisor extension is not loaded; load it with `ferry host load`".to_owned()),
        gt: held.gt,
        timing: Timing { paused_us, parts_us: held.parts_us },
        domain: info,
    })
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

struct RawGrants {
    version: u32,
    max_frames: u32,
    gfns: Vec<Option<crate::Gfn>>,
    shared: Vec<u8>,
    status: Vec<u8>,
}

/// What is read while the guest is held.
struct Held {
    context: Vec<u8>,
    ports: Vec<(Port, PortStatus)>,
    grants: RawGrants,
    shared_info: Option<Vec<u8>>,
    gt: Option<GtState>,
    parts_us: BTreeMap<String, u64>,
}

fn held_part(hv: &dyn Hypervisor, info: &DomainInfo, extension: bool) -> Result<Held> {
    let dom = info.domid;
    let mut parts_us = BTreeMap::new();
    let mut timed = |name: &str, start: Instant| {
        parts_us.insert(name.to_owned(), micros(start));
    };
    // Before the context, whose CR2 is right only after it (docs/extension-abi.md).
    let start = Instant::now();
    let gt = if extension { Some(hv.gt_state(dom)?) } else { None };
    timed("gt", start);
    let start = Instant::now();
    let context = hv.hvm_context(dom)?;
    timed("hvm_context", start);
    let start = Instant::now();
    let ports = hv.ports(dom)?;
    timed("ports", start);
    let start = Instant::now();
    let size = hv.grant_table_size(dom)?;
    let version = hv.grant_table_version(dom)?;
    let gfns = hv.grant_table_gfns(dom)?;
    let shared = hv.read_grant_frames(dom, GrantArray::Shared, 0, size.frames)?;
    // One status word of two bytes for each entry of sixteen: a frame of them serves eight frames of entries.
    let status = match version {
        2 => hv.read_grant_frames(dom, GrantArray::Status, 0, size.frames.div_ceil(8))?,
        _ => Vec::new(),
    };
    timed("grants", start);
    let start = Instant::now();
    let shared_info = match info.shared_info {
        Some(gfn) => {
            let map = hv.map_pages(dom, &[gfn], Access::Read)?;
            let mut page = vec![0; PAGE_SIZE];
            map.read(0, &mut page);
            Some(page)
        }
        None => None,
    };
    timed("shared_info", start);
    Ok(Held {
        context,
        ports,
        grants: RawGrants { version, max_frames: size.max_frames, gfns, shared, status },
        shared_info,
        gt,
        parts_us,
    })
}

/// The C structure of a record, if it has one of fixed fields.
fn record_layout(code: u16) -> Option<&'static StructLayout> {
    let c_type = match code {
        hvm_save::CODE_HEADER => "struct hvm_save_header",
        hvm_save::CODE_CPU => "struct hvm_hw_cpu",
        hvm_save::CODE_PIC => "struct hvm_hw_vpic",
        hvm_save::CODE_IOAPIC => "struct hvm_hw_vioapic",
        hvm_save::CODE_LAPIC => "struct hvm_hw_lapic",
        hvm_save::CODE_LAPIC_REGS => "struct hvm_hw_lapic_regs",
        hvm_save::CODE_PCI_IRQ => "struct hvm_hw_pci_irqs",
        hvm_save::CODE_ISA_IRQ => "struct hvm_hw_isa_irqs",
        hvm_save::CODE_PCI_LINK => "struct hvm_hw_pci_link",
        hvm_save::CODE_PIT => "struct hvm_hw_pit",
        hvm_save::CODE_RTC => "struct hvm_hw_rtc",
        hvm_save::CODE_HPET => "struct hvm_hw_hpet",
        hvm_save::CODE_PMTIMER => "struct hvm_hw_pmtimer",
        hvm_save::CODE_MTRR => "struct hvm_hw_mtrr",
        hvm_save::CODE_VIRIDIAN_DOMAIN => "struct hvm_viridian_domain_context",
        hvm_save::CODE_CPU_XSAVE => "struct hvm_hw_cpu_xsave",
        hvm_save::CODE_VIRIDIAN_VCPU => "struct hvm_viridian_vcpu_context",
        hvm_save::CODE_VMCE_VCPU => "struct hvm_vmce_vcpu",
        hvm_save::CODE_TSC_ADJUST => "struct hvm_tsc_adjust",
        _ => return None,
    };
    hvm_save::LAYOUTS.iter().find(|l| l.c_type == c_type)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A little-endian number of up to 8 bytes, or bytes.
fn field(bytes: &[u8]) -> String {
    if matches!(bytes.len(), 1 | 2 | 4 | 8) {
        let n = bytes.iter().rev().fold(0u64, |n, &b| n << 8 | u64::from(b));
        format!("{n:#x}")
    } else {
        hex(bytes)
    }
}

fn records(dom: DomId, context: &[u8]) -> Result<Vec<RecordReport>> {
    let records = hvm_save::records(context)
        .map_err(|e| HypervisorError::malformed("XEN_DOMCTL_gethvmcontext", dom, e.to_string()))?;
    Ok(records
        .iter()
        .map(|r| {
            let mut fields = BTreeMap::new();
            let mut end = 0;
            if let Some(msrs) = (r.code == hvm_save::CODE_CPU_MSR).then(|| r.msrs()).flatten() {
                fields.extend(msrs.iter().map(|m| (format!("{:#x}", m.index), format!("{:#x}", m.val))));
                end = r.payload.len();
            } else if let Some(layout) = record_layout(r.code) {
                for f in layout.fields.iter().filter(|f| !f.c_name.is_empty()) {
                    if let Some(bytes) = r.payload.get(f.offset..f.offset + f.size) {
                        fields.insert(f.c_name.to_owned(), field(bytes));
                    }
                }
                end = layout.size;
            }
            if let Some(rest) = r.payload.get(end..).filter(|rest| !rest.is_empty()) {
                fields.insert("(rest)".to_owned(), hex(rest));
            }
            RecordReport {
                name: hvm_save::code_name(r.code).map_or_else(|| format!("record {}", r.code), str::to_owned),
                instance: r.instance,
                length: r.payload.len(),
                fields,
            }
        })
        .collect())
}

fn grants(g: &RawGrants) -> GrantReport {
    const IN_USE: u16 = grant::GTF_READING | grant::GTF_WRITING;
    let entry = |flags: u16, domid: u16, frame: u64, status: u16| {
        (flags & grant::GTF_TYPE_MASK != grant::GTF_INVALID).then_some(GrantEntry {
            flags: flags & !IN_USE,
            domid: DomId(domid),
            frame,
            in_use: (flags | status) & IN_USE != 0,
        })
    };
    let entries = match g.version {
        2 => (0u32..)
            .zip(g.shared.chunks_exact(size_of::<grant::EntryV2>()))
            .filter_map(|(r, c)| {
                let e = grant::EntryV2::read_from_bytes(c).ok()?;
                let status = g.status.get(r as usize * 2..r as usize * 2 + 2);
                Some((r, entry(e.flags, e.domid, e.frame, status.map_or(0, |s| u16::from_le_bytes([s[0], s[1]])))?))
            })
            .collect(),
        _ => (0u32..)
            .zip(g.shared.chunks_exact(size_of::<grant::EntryV1>()))
            .filter_map(|(r, c)| {
                let e = grant::EntryV1::read_from_bytes(c).ok()?;
                Some((r, entry(e.flags, e.domid, e.frame.into(), 0)?))
            })
            .collect(),
    };
    GrantReport {
        version: g.version,
        frames: (g.shared.len() / PAGE_SIZE) as u32,
        max_frames: g.max_frames,
        gfns: g.gfns.clone(),
        entries,
    }
}

fn bits<'a>(words: impl Iterator<Item = u64> + 'a, width: u32) -> Vec<Port> {
    (0u32..)
        .zip(words)
        .flat_map(|(i, w)| (0..width).filter(move |b| w >> b & 1 == 1).map(move |b| i * width + b))
        .collect()
}

fn shared_info(page: &[u8], gt: Option<&GtState>) -> SharedInfoReport {
    // Without the extension nothing says which layout the guest uses; nearly all guests use the 64-bit one.
    if gt.is_some_and(|gt| gt.guest_is_32bit) {
        let (s, _) = shared::bits32::SharedInfo::read_from_prefix(page).unwrap_or_default();
        SharedInfoReport {
            wall_clock: WallClock { sec: u64::from(s.arch.wc_sec_hi) << 32 | u64::from(s.wc_sec), nsec: s.wc_nsec },
            pending: bits(s.evtchn_pending.iter().map(|&w| w.into()), 32),
            masked: bits(s.evtchn_mask.iter().map(|&w| w.into()), 32),
        }
    } else {
        let (s, _) = shared::SharedInfo::read_from_prefix(page).unwrap_or_default();
        SharedInfoReport {
            wall_clock: WallClock { sec: u64::from(s.wc_sec_hi) << 32 | u64::from(s.wc_sec), nsec: s.wc_nsec },
            pending: bits(s.evtchn_pending.iter().copied(), 64),
            masked: bits(s.evtchn_mask.iter().copied(), 64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    #[test]
    fn records_are_told_field_by_field() {
        let mut s = Vec::new();
        let header =
            hvm_save::Header { magic: hvm_save::FILE_MAGIC, version: hvm_save::FILE_VERSION, ..Default::default() };
        hvm_save::push_record(&mut s, hvm_save::CODE_HEADER, 0, header.as_bytes());
        let cpu = hvm_save::Cpu { rip: 0xffff_8000_1234_5678, ..Default::default() };
        hvm_save::push_record(&mut s, hvm_save::CODE_CPU, 1, &[cpu.as_bytes(), &[9, 8]].concat());
        hvm_save::push_record(&mut s, 21, 0, &[1, 2, 3]);
        hvm_save::push_record(&mut s, hvm_save::CODE_END, 0, &[]);
        let r = records(DomId(1), &s).unwrap();
        assert_eq!((r[1].name.as_str(), r[1].instance), ("CPU", 1));
        assert_eq!(r[1].fields["rip"], "0xffff800012345678");
        assert_eq!(r[1].fields["(rest)"], "0908");
        assert_eq!((r[2].name.as_str(), r[2].fields["(rest)"].as_str()), ("record 21", "010203"));
        assert!(records(DomId(1), &s[..40]).is_err());
    }

    #[test]
    fn every_fixed_record_has_its_layout() {
        for code in 1..=hvm_save::CODE_MAX {
            assert_eq!(record_layout(code).is_some(), code != hvm_save::CODE_CPU_MSR, "code {code}");
        }
    }

    #[test]
    fn grants_are_told_without_their_in_use_flags() {
        let mut shared = vec![0; PAGE_SIZE];
        let e = grant::EntryV1 { flags: grant::GTF_PERMIT_ACCESS | grant::GTF_READING, domid: 3, frame: 77 };
        shared[16..24].copy_from_slice(e.as_bytes());
        let mut raw = RawGrants { version: 1, max_frames: 4, gfns: vec![None], shared, status: vec![] };
        let g = grants(&raw);
        let want = GrantEntry { flags: grant::GTF_PERMIT_ACCESS, domid: DomId(3), frame: 77, in_use: true };
        assert_eq!(g.entries.into_iter().collect::<Vec<_>>(), [(2, want)]);
        raw.version = 2;
        raw.status = vec![0, 0, 8, 0];
        raw.shared.fill(0);
        let e = grant::EntryV2 { flags: grant::GTF_PERMIT_ACCESS, domid: 3, detail: 0, frame: 1 << 40 };
        raw.shared[16..32].copy_from_slice(e.as_bytes());
        let g = grants(&raw);
        let want = GrantEntry { flags: grant::GTF_PERMIT_ACCESS, domid: DomId(3), frame: 1 << 40, in_use: true };
        assert_eq!(g.entries.into_iter().collect::<Vec<_>>(), [(1, want)]);
    }

    #[test]
    fn the_two_layouts_of_shared_info_are_told_apart() {
        let mut s = shared::SharedInfo { wc_sec: 5, wc_sec_hi: 1, wc_nsec: 9, ..Default::default() };
        s.evtchn_pending[1] = 1 << 3;
        let r = shared_info(&[s.as_bytes(), &[0; 512]].concat(), None);
        assert_eq!((r.wall_clock, r.pending), (WallClock { sec: 5 | 1 << 32, nsec: 9 }, vec![67]));
        let mut s = shared::bits32::SharedInfo { wc_sec: 6, ..Default::default() };
        s.evtchn_mask[1] = 1;
        let gt = GtState { guest_is_32bit: true, ..Default::default() };
        let r = shared_info(&[s.as_bytes(), &[0; 512]].concat(), Some(&gt));
        assert_eq!((r.wall_clock.sec, r.masked), (6, vec![32]));
    }
}
