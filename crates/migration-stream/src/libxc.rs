//! The libxc domain image format, versions 2 and 3: docs/specs/libxc-migration-stream.pandoc and
//! tools/libs/guest/xg_sr_stream_format.h.

use crate::error::ErrorKind;
use crate::gt;
use crate::wire::{Field, Reader, wire_struct};

/// All ones; older, headerless images have a zero bit here.
pub const MARKER: u64 = u64::MAX;
/// "XENF".
pub const ID: u32 = 0x5845_4e46;
/// The image version that this code writes.
pub const VERSION: u32 = 3;
/// Size of the image header in bytes.
pub const IMAGE_HEADER_SIZE: usize = 24;
/// Size of the domain header in bytes.
pub const DOMAIN_HEADER_SIZE: usize = 16;
/// `DHDR_TYPE_X86_PV`.
pub const DOMAIN_X86_PV: u32 = 1;
/// `DHDR_TYPE_X86_HVM`; PVH domains use it too.
pub const DOMAIN_X86_HVM: u32 = 2;
/// Guest page size as a power of two.
pub const PAGE_SHIFT: u16 = 12;
/// Guest page size in bytes.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;
/// `REC_LENGTH_MAX`: longer records are refused by Xen's own tools too.
pub const RECORD_MAX: u32 = 128 << 20;

/// `REC_TYPE_*` of libxc.
pub mod rec {
    pub const END: u32 = 0;
    pub const PAGE_DATA: u32 = 1;
    pub const X86_PV_INFO: u32 = 2;
    pub const X86_PV_P2M_FRAMES: u32 = 3;
    pub const X86_PV_VCPU_BASIC: u32 = 4;
    pub const X86_PV_VCPU_EXTENDED: u32 = 5;
    pub const X86_PV_VCPU_XSAVE: u32 = 6;
    pub const SHARED_INFO: u32 = 7;
    pub const X86_TSC_INFO: u32 = 8;
    pub const HVM_CONTEXT: u32 = 9;
    pub const HVM_PARAMS: u32 = 0xa;
    pub const TOOLSTACK: u32 = 0xb;
    pub const X86_PV_VCPU_MSRS: u32 = 0xc;
    pub const VERIFY: u32 = 0xd;
    pub const CHECKPOINT: u32 = 0xe;
    pub const CHECKPOINT_DIRTY_PFN_LIST: u32 = 0xf;
    pub const STATIC_DATA_END: u32 = 0x10;
    pub const X86_CPUID_POLICY: u32 = 0x11;
    pub const X86_MSR_POLICY: u32 = 0x12;
}

/// The image header. Its fields are big-endian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageHeader {
    /// 2 or 3.
    pub version: u32,
}

impl ImageHeader {
    /// Reads the header.
    pub fn decode(bytes: &[u8; IMAGE_HEADER_SIZE]) -> Result<Self, ErrorKind> {
        let marker = u64::from_be_bytes(crate::array(&bytes[..8]));
        let id = u32::from_be_bytes(crate::array(&bytes[8..12]));
        let version = u32::from_be_bytes(crate::array(&bytes[12..16]));
        let options = u16::from_be_bytes(crate::array(&bytes[16..18]));
        if marker != MARKER {
            return Err(ErrorKind::BadMagic { field: "marker", expected: MARKER, found: marker });
        }
        if id != ID {
            return Err(ErrorKind::BadMagic { field: "id", expected: ID.into(), found: id.into() });
        }
        if !(2..=3).contains(&version) {
            return Err(ErrorKind::UnsupportedVersion {
                what: "the libxc image",
                supported: "2 and 3",
                found: version,
            });
        }
        if options & 1 != 0 {
            return Err(ErrorKind::BigEndian);
        }
        if options != 0 {
            return Err(ErrorKind::BadValue { field: "options", value: options.into(), why: "reserved bits are set" });
        }
        if bytes[18..].iter().any(|&b| b != 0) {
            return Err(ErrorKind::NotZero { field: "reserved" });
        }
        Ok(ImageHeader { version })
    }

    /// Appends the header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&MARKER.to_be_bytes());
        out.extend_from_slice(&ID.to_be_bytes());
        out.extend_from_slice(&self.version.to_be_bytes());
        out.extend_from_slice(&[0; 8]);
    }
}

wire_struct! {
    /// The domain header.
    pub struct DomainHeader {
        /// `DHDR_TYPE_*`.
        pub domain_type: u32,
        /// Guest page size as a power of two: 12.
        pub page_shift: u16,
        /// Zero.
        pub reserved: u16,
        /// Major version of the Xen that saved; 0 from the legacy conversion tool.
        pub xen_major: u32,
        /// Minor version of the Xen that saved.
        pub xen_minor: u32,
    }
}

impl DomainHeader {
    /// A header for an HVM or PVH domain.
    pub fn hvm(xen_major: u32, xen_minor: u32) -> Self {
        DomainHeader { domain_type: DOMAIN_X86_HVM, page_shift: PAGE_SHIFT, reserved: 0, xen_major, xen_minor }
    }

    /// Refuses what no x86 host writes.
    pub fn validate(&self) -> Result<(), ErrorKind> {
        let bad = |field, value: u32, why| Err(ErrorKind::BadValue { field, value: value.into(), why });
        if self.domain_type != DOMAIN_X86_PV && self.domain_type != DOMAIN_X86_HVM {
            return bad("type", self.domain_type, "neither an x86 PV (1) nor an x86 HVM or PVH domain (2)");
        }
        if self.page_shift != PAGE_SHIFT {
            return bad("page_shift", self.page_shift.into(), "x86 guests have pages of 2^12 bytes");
        }
        if self.reserved != 0 {
            return Err(ErrorKind::NotZero { field: "reserved" });
        }
        Ok(())
    }
}

/// Names of libxc's record types.
pub fn record_name(rtype: u32) -> Option<&'static str> {
    Some(match rtype {
        rec::END => "END",
        rec::PAGE_DATA => "PAGE_DATA",
        rec::X86_PV_INFO => "X86_PV_INFO",
        rec::X86_PV_P2M_FRAMES => "X86_PV_P2M_FRAMES",
        rec::X86_PV_VCPU_BASIC => "X86_PV_VCPU_BASIC",
        rec::X86_PV_VCPU_EXTENDED => "X86_PV_VCPU_EXTENDED",
        rec::X86_PV_VCPU_XSAVE => "X86_PV_VCPU_XSAVE",
        rec::SHARED_INFO => "SHARED_INFO",
        rec::X86_TSC_INFO => "X86_TSC_INFO",
        rec::HVM_CONTEXT => "HVM_CONTEXT",
        rec::HVM_PARAMS => "HVM_PARAMS",
        rec::TOOLSTACK => "TOOLSTACK",
        rec::X86_PV_VCPU_MSRS => "X86_PV_VCPU_MSRS",
        rec::VERIFY => "VERIFY",
        rec::CHECKPOINT => "CHECKPOINT",
        rec::CHECKPOINT_DIRTY_PFN_LIST => "CHECKPOINT_DIRTY_PFN_LIST",
        rec::STATIC_DATA_END => "STATIC_DATA_END",
        rec::X86_CPUID_POLICY => "X86_CPUID_POLICY",
        rec::X86_MSR_POLICY => "X86_MSR_POLICY",
        _ => return gt::Type::of(crate::Layer::Libxc, rtype).map(|t| t.name()),
    })
}

/// The type of one page in PAGE_DATA: `XEN_DOMCTL_PFINFO_*` (public/domctl.h) shifted right by 28.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageType(u8);

impl PageType {
    /// A normal page.
    pub const NOTAB: PageType = PageType(0);
    /// A page that the saving host found broken; no contents.
    pub const BROKEN: PageType = PageType(0xd);
    /// To be allocated; no contents.
    pub const XALLOC: PageType = PageType(0xe);
    /// Not there any more; no contents.
    pub const XTAB: PageType = PageType(0xf);

    /// The four bits of the type.
    pub fn bits(self) -> u8 {
        self.0
    }

    /// Whether page contents follow for it.
    pub fn has_data(self) -> bool {
        self.0 < 0xd
    }
}

/// One element of PAGE_DATA's pfn array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageEntry {
    /// Guest frame number.
    pub gfn: u64,
    /// What it is.
    pub page_type: PageType,
}

impl PageEntry {
    /// A normal page at `gfn`.
    pub fn normal(gfn: u64) -> Self {
        PageEntry { gfn, page_type: PageType::NOTAB }
    }

    fn decode(raw: u64) -> Result<Self, ErrorKind> {
        let page_type = PageType((raw >> 60) as u8);
        let bad = |why| Err(ErrorKind::BadValue { field: "pfn", value: raw, why });
        if raw & 0x0ff0_0000_0000_0000 != 0 {
            return bad("reserved bits are set");
        }
        if (5..=8).contains(&page_type.0) {
            return bad("a page type that is not known");
        }
        Ok(PageEntry { gfn: raw & 0x000f_ffff_ffff_ffff, page_type })
    }

    fn encode(self) -> u64 {
        u64::from(self.page_type.0) << 60 | self.gfn & 0x000f_ffff_ffff_ffff
    }
}

/// PAGE_DATA: an array of pfns with their types, then the contents of those that have any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageData<'a> {
    pfns: &'a [u8],
    pages: &'a [u8],
}

impl<'a> PageData<'a> {
    /// Checks the counts, every pfn and the length, without copying any page.
    pub fn decode(body: &'a [u8]) -> Result<Self, ErrorKind> {
        let mut reader = Reader::new(body);
        let count: u32 = reader.get("count")?;
        reader.zero(4, "reserved")?;
        if count == 0 {
            return Err(ErrorKind::BadValue { field: "count", value: 0, why: "a record must have a page" });
        }
        let pfns = reader.bytes((count as usize).saturating_mul(8), "pfn")?;
        let mut with_data = 0;
        for raw in pfns.chunks_exact(8) {
            let entry = PageEntry::decode(u64::from_le_bytes(crate::array(raw)))?;
            with_data += usize::from(entry.page_type.has_data());
        }
        let pages = reader.bytes(with_data.saturating_mul(PAGE_SIZE), "page_data")?;
        reader.finish()?;
        Ok(PageData { pfns, pages })
    }

    /// Number of pfns.
    pub fn count(&self) -> usize {
        self.pfns.len() / 8
    }

    /// The entries with their contents: `None` for types that have none, else 4096 bytes.
    pub fn iter(&self) -> impl Iterator<Item = (PageEntry, Option<&'a [u8]>)> + use<'a> {
        let mut pages = self.pages.chunks_exact(PAGE_SIZE);
        // decode() has checked every entry, so none is lost by the filter.
        self.pfns
            .chunks_exact(8)
            .filter_map(|raw| PageEntry::decode(u64::from_le_bytes(crate::array(raw))).ok())
            .map(move |entry| (entry, if entry.page_type.has_data() { pages.next() } else { None }))
    }

    /// The contents, back to back, of the entries that have any.
    pub fn contents(&self) -> &'a [u8] {
        self.pages
    }

    /// Length of the body that [`PageData::encode`] puts.
    pub(crate) fn size(entries: &[PageEntry], pages: &[u8]) -> usize {
        8 + entries.len() * 8 + pages.len()
    }

    /// Puts a body from entries and the contents, back to back, of those that have any.
    ///
    /// # Panics
    /// If `pages` is not 4096 bytes for each entry with contents: the caller's mistake, not the peer's.
    pub(crate) fn encode(entries: &[PageEntry], pages: &[u8], out: &mut Vec<u8>) {
        let with_data = entries.iter().filter(|e| e.page_type.has_data()).count();
        assert_eq!(pages.len(), with_data * PAGE_SIZE, "page contents do not match the entries");
        (entries.len() as u32).put(out);
        0u32.put(out);
        entries.iter().for_each(|entry| entry.encode().put(out));
        out.extend_from_slice(pages);
    }
}

wire_struct! {
    /// X86_PV_INFO.
    pub struct PvInfo {
        /// 4 or 8 octets.
        pub guest_width: u8,
        /// 3 or 4.
        pub pt_levels: u8,
        /// Zero.
        pub reserved: [u8; 6],
    }
}

wire_struct! {
    /// X86_TSC_INFO: `XEN_DOMCTL_{get,set}tscinfo`.
    pub struct TscInfo {
        /// `TSC_MODE_*`.
        pub mode: u32,
        /// Guest TSC frequency in kHz.
        pub khz: u32,
        /// Elapsed time in ns.
        pub nsec: u64,
        /// Times the domain has been restored. `settscinfo` stores one more than it is given.
        pub incarnation: u32,
        /// Zero.
        pub reserved: u32,
    }
}

wire_struct! {
    /// One element of HVM_PARAMS.
    pub struct HvmParam {
        /// `HVM_PARAM_*` (public/hvm/params.h).
        pub index: u64,
        /// Its value.
        pub value: u64,
    }
}

wire_struct! {
    /// `xen_cpuid_leaf_t` (public/arch-x86/xen.h).
    pub struct CpuidLeaf {
        /// EAX of the query.
        pub leaf: u32,
        /// ECX of the query, or 0xffffffff where it does not matter.
        pub subleaf: u32,
        /// EAX of the answer.
        pub a: u32,
        /// EBX of the answer.
        pub b: u32,
        /// ECX of the answer.
        pub c: u32,
        /// EDX of the answer.
        pub d: u32,
    }
}

wire_struct! {
    /// `xen_msr_entry_t` (public/arch-x86/xen.h).
    pub struct MsrEntry {
        /// Index of the MSR.
        pub idx: u32,
        /// Zero.
        pub flags: u32,
        /// Its value.
        pub val: u64,
    }
}

/// A body of HVM_PARAMS, also that of GT_HVM_PARAMS_LATE.
pub fn decode_hvm_params(body: &[u8]) -> Result<Vec<HvmParam>, ErrorKind> {
    let mut reader = Reader::new(body);
    let count: u32 = reader.get("count")?;
    reader.zero(4, "reserved")?;
    let params = reader.list(count as usize, "param")?;
    reader.finish()?;
    Ok(params)
}

/// A body of HVM_PARAMS.
pub fn encode_hvm_params(params: &[HvmParam]) -> Vec<u8> {
    let mut body = Vec::with_capacity(8 + params.len() * HvmParam::SIZE);
    (params.len() as u32).put(&mut body);
    0u32.put(&mut body);
    params.iter().for_each(|param| param.put(&mut body));
    body
}

fn decode_array<T: Field>(body: &[u8], field: &'static str) -> Result<Vec<T>, ErrorKind> {
    let mut reader = Reader::new(body);
    let items = reader.list(body.len() / T::SIZE, field)?;
    reader.finish()?;
    if items.is_empty() {
        return Err(ErrorKind::Missing { what: field });
    }
    Ok(items)
}

fn encode_array<T: Field>(items: &[T]) -> Vec<u8> {
    let mut body = Vec::with_capacity(items.len() * T::SIZE);
    items.iter().for_each(|item| item.put(&mut body));
    body
}

/// Which of the four vCPU records of a PV domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PvVcpuKind {
    Basic,
    Extended,
    Xsave,
    Msrs,
}

impl PvVcpuKind {
    fn record_type(self) -> u32 {
        match self {
            PvVcpuKind::Basic => rec::X86_PV_VCPU_BASIC,
            PvVcpuKind::Extended => rec::X86_PV_VCPU_EXTENDED,
            PvVcpuKind::Xsave => rec::X86_PV_VCPU_XSAVE,
            PvVcpuKind::Msrs => rec::X86_PV_VCPU_MSRS,
        }
    }
}

/// A record of the libxc image, typed. Blobs are borrowed from the body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record<'a> {
    /// END.
    End,
    /// PAGE_DATA.
    PageData(PageData<'a>),
    /// X86_PV_INFO.
    PvInfo(PvInfo),
    /// X86_PV_P2M_FRAMES: first and last pfn of the p2m, then the pfns that hold it.
    PvP2mFrames(u32, u32, Vec<u64>),
    /// X86_PV_VCPU_{BASIC,EXTENDED,XSAVE,MSRS}: vCPU and the blob of the domctl.
    PvVcpu(PvVcpuKind, u32, &'a [u8]),
    /// SHARED_INFO: 4096 bytes. Stock HVM streams do not have it; ours do, see docs/stream-format.md.
    SharedInfo(&'a [u8]),
    /// X86_TSC_INFO.
    TscInfo(TscInfo),
    /// HVM_CONTEXT; see [`crate::hvm`] for what is inside.
    HvmContext(&'a [u8]),
    /// HVM_PARAMS.
    HvmParams(Vec<HvmParam>),
    /// TOOLSTACK (deprecated).
    Toolstack(&'a [u8]),
    /// VERIFY: the page records that follow repeat what was sent.
    Verify,
    /// CHECKPOINT.
    Checkpoint,
    /// CHECKPOINT_DIRTY_PFN_LIST.
    CheckpointDirtyPfnList(Vec<u64>),
    /// STATIC_DATA_END.
    StaticDataEnd,
    /// X86_CPUID_POLICY.
    CpuidPolicy(Vec<CpuidLeaf>),
    /// X86_MSR_POLICY.
    MsrPolicy(Vec<MsrEntry>),
    /// A record of a guest-transparent migration; true when it came with the optional bit.
    Gt(gt::LibxcRecord, bool),
    /// An optional record that is not known; a restore may skip it.
    UnknownOptional(u32, &'a [u8]),
}

impl<'a> Record<'a> {
    /// Reads the body of a record of type `rtype`. A mandatory type that is not known is an error.
    pub fn decode(rtype: u32, body: &'a [u8]) -> Result<Self, ErrorKind> {
        let empty = |record| Reader::new(body).finish().map(|()| record);
        let vcpu = |kind| {
            let mut reader = Reader::new(body);
            let id = reader.get("vcpu_id")?;
            reader.zero(4, "reserved")?;
            Ok(Record::PvVcpu(kind, id, reader.rest()))
        };
        match rtype {
            rec::END => empty(Record::End),
            rec::PAGE_DATA => Ok(Record::PageData(PageData::decode(body)?)),
            rec::X86_PV_INFO => Ok(Record::PvInfo(PvInfo::decode(body)?)),
            rec::X86_PV_P2M_FRAMES => {
                let mut reader = Reader::new(body);
                let (start, end) = (reader.get("p2m_start_pfn")?, reader.get("p2m_end_pfn")?);
                let pfns = reader.list(reader.left() / 8, "p2m_pfn")?;
                reader.finish()?;
                Ok(Record::PvP2mFrames(start, end, pfns))
            }
            rec::X86_PV_VCPU_BASIC => vcpu(PvVcpuKind::Basic),
            rec::X86_PV_VCPU_EXTENDED => vcpu(PvVcpuKind::Extended),
            rec::X86_PV_VCPU_XSAVE => vcpu(PvVcpuKind::Xsave),
            rec::X86_PV_VCPU_MSRS => vcpu(PvVcpuKind::Msrs),
            rec::SHARED_INFO => {
                let mut reader = Reader::new(body);
                let page = reader.bytes(PAGE_SIZE, "shared_info")?;
                reader.finish()?;
                Ok(Record::SharedInfo(page))
            }
            rec::X86_TSC_INFO => Ok(Record::TscInfo(TscInfo::decode(body)?)),
            rec::HVM_CONTEXT if body.is_empty() => Err(ErrorKind::Missing { what: "hvm_ctx" }),
            rec::HVM_CONTEXT => Ok(Record::HvmContext(body)),
            rec::HVM_PARAMS => Ok(Record::HvmParams(decode_hvm_params(body)?)),
            rec::TOOLSTACK => Ok(Record::Toolstack(body)),
            rec::VERIFY => empty(Record::Verify),
            rec::CHECKPOINT => empty(Record::Checkpoint),
            rec::CHECKPOINT_DIRTY_PFN_LIST => Ok(Record::CheckpointDirtyPfnList(decode_array(body, "pfn")?)),
            rec::STATIC_DATA_END => empty(Record::StaticDataEnd),
            rec::X86_CPUID_POLICY => Ok(Record::CpuidPolicy(decode_array(body, "CPUID_policy")?)),
            rec::X86_MSR_POLICY => Ok(Record::MsrPolicy(decode_array(body, "MSR_policy")?)),
            _ => match gt::LibxcRecord::decode(rtype, body)? {
                Some((record, optional)) => Ok(Record::Gt(record, optional)),
                None if rtype & crate::OPTIONAL != 0 => Ok(Record::UnknownOptional(rtype, body)),
                None => Err(ErrorKind::UnknownMandatory),
            },
        }
    }

    /// The record's type on the wire and its body.
    pub fn encode(&self) -> (u32, Vec<u8>) {
        match self {
            Record::End => (rec::END, Vec::new()),
            Record::PageData(data) => {
                let mut body = Vec::with_capacity(8 + data.pfns.len() + data.pages.len());
                (data.count() as u32).put(&mut body);
                0u32.put(&mut body);
                body.extend_from_slice(data.pfns);
                body.extend_from_slice(data.pages);
                (rec::PAGE_DATA, body)
            }
            Record::PvInfo(info) => (rec::X86_PV_INFO, info.encode()),
            Record::PvP2mFrames(start, end, pfns) => {
                let mut body = Vec::with_capacity(8 + pfns.len() * 8);
                start.put(&mut body);
                end.put(&mut body);
                pfns.iter().for_each(|pfn| pfn.put(&mut body));
                (rec::X86_PV_P2M_FRAMES, body)
            }
            Record::PvVcpu(kind, id, context) => {
                let mut body = Vec::with_capacity(8 + context.len());
                id.put(&mut body);
                0u32.put(&mut body);
                body.extend_from_slice(context);
                (kind.record_type(), body)
            }
            Record::SharedInfo(page) => (rec::SHARED_INFO, page.to_vec()),
            Record::TscInfo(info) => (rec::X86_TSC_INFO, info.encode()),
            Record::HvmContext(blob) => (rec::HVM_CONTEXT, blob.to_vec()),
            Record::HvmParams(params) => (rec::HVM_PARAMS, encode_hvm_params(params)),
            Record::Toolstack(blob) => (rec::TOOLSTACK, blob.to_vec()),
            Record::Verify => (rec::VERIFY, Vec::new()),
            Record::Checkpoint => (rec::CHECKPOINT, Vec::new()),
            Record::CheckpointDirtyPfnList(pfns) => (rec::CHECKPOINT_DIRTY_PFN_LIST, encode_array(pfns)),
            Record::StaticDataEnd => (rec::STATIC_DATA_END, Vec::new()),
            Record::CpuidPolicy(leaves) => (rec::X86_CPUID_POLICY, encode_array(leaves)),
            Record::MsrPolicy(msrs) => (rec::X86_MSR_POLICY, encode_array(msrs)),
            Record::Gt(record, optional) => {
                let (rtype, body) = record.encode();
                (rtype | if *optional { crate::OPTIONAL } else { 0 }, body)
            }
            Record::UnknownOptional(rtype, body) => (*rtype, body.to_vec()),
        }
    }
}
