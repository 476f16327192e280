//! Judges a whole stream: every body, the order of the records, and what must be there.

use crate::decoder::{Event, RawRecord};
use crate::error::{ErrorKind, Layer, Place, StreamError};
use crate::libxc::{self, rec};
use crate::{gt, hvm, libxl};

/// What a stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// As stock tools write: the guest must take part when it is resumed.
    Ordinary,
    /// A guest-transparent migration.
    Transparent,
}

/// Takes every event of a stream and collects what is wrong.
#[derive(Debug, Default)]
pub struct Checker {
    findings: Vec<StreamError>,
    in_libxl: bool,
    hvm: bool,
    version: u32,
    static_end: bool,
    pages_seen: bool,
    state_seen: bool,
    verify_seen: bool,
    params_seen: bool,
    context_seen: bool,
    libxc_seen: bool,
    /// Ranks of the libxc records, for the order of a GT image.
    last_rank: u8,
    identity: Option<gt::Identity>,
    devices_seen: bool,
    xenstore_seen: bool,
    domain: Option<gt::Domain>,
    shared_info: Option<gt::SharedInfo>,
    shared_info_page: bool,
    fifo: Option<gt::EvtchnFifo>,
    evtchn_seen: bool,
    grant_table: Option<gt::GrantTable>,
    grant_frames: [u32; 2],
    clock_seen: bool,
    tsc_seen: bool,
    vcpus_seen: u32,
    /// The record before was the layer's checksum: libxc, libxl.
    checksum_last: [bool; 2],
}

/// Place of a record in the order that a GT image must have; docs/stream-format.md, "Order".
fn rank(rtype: u32) -> Option<u8> {
    use gt::Type;
    if let Some(gt) = gt::Type::of(Layer::Libxc, rtype) {
        return Some(match gt {
            Type::Domain | Type::MemoryMap => 0,
            Type::GrantTable => 4,
            Type::GrantFrames => 5,
            Type::SharedInfo => 6,
            Type::Emuirq | Type::EvtchnFifo => 8,
            Type::Evtchn => 9,
            Type::Vcpu => 11,
            Type::Clock | Type::Watchdog => 12,
            Type::HvmParamsLate => 13,
            Type::Checksum => 14,
            Type::Identity | Type::Devices | Type::Xenstore | Type::Toolstack | Type::StreamChecksum => return None,
        });
    }
    Some(match rtype {
        rec::X86_CPUID_POLICY | rec::X86_MSR_POLICY => 0,
        rec::STATIC_DATA_END => 1,
        rec::PAGE_DATA | rec::VERIFY => 2,
        rec::X86_TSC_INFO | rec::HVM_PARAMS => 3,
        rec::SHARED_INFO => 7,
        rec::HVM_CONTEXT => 10,
        rec::END => 15,
        _ => return None,
    })
}

impl Checker {
    /// At the start of a stream.
    pub fn new() -> Self {
        Checker::default()
    }

    /// What the stream is for, as far as it has come.
    pub fn purpose(&self) -> Purpose {
        if self.domain.is_some() { Purpose::Transparent } else { Purpose::Ordinary }
    }

    /// Takes the next event.
    pub fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Xl(_, data) => {
                if let Err(kind) = crate::xl::config(data) {
                    self.findings.push(StreamError { offset: 0, place: Place::Header(Layer::Xl), kind });
                }
            }
            Event::Libxl(_) => self.in_libxl = true,
            Event::Image(header) => {
                self.version = header.version;
                self.libxc_seen = true;
            }
            Event::Domain(header) => self.hvm = header.domain_type == libxc::DOMAIN_X86_HVM,
            Event::Record(record) => {
                let result = match record.layer {
                    Layer::Libxc => self.libxc(record),
                    Layer::Libxl | Layer::Xl => self.libxl(record),
                };
                if let Err(kind) = result {
                    self.findings.push(record.error(kind));
                }
            }
        }
    }

    /// The end of the input. Gives everything that was found, in the order of the stream.
    pub fn finish(mut self, end: Result<(), StreamError>) -> Vec<StreamError> {
        self.findings.extend(end.err());
        self.findings
    }

    fn libxl(&mut self, record: &RawRecord<'_>) -> Result<(), ErrorKind> {
        let was_checksum = std::mem::take(&mut self.checksum_last[1]);
        match libxl::Record::decode(record.rtype, record.body)? {
            libxl::Record::Gt(gt::LibxlRecord::Identity(identity), _) => {
                if self.libxc_seen {
                    return Err(ErrorKind::OutOfOrder { why: "it must come before LIBXC_CONTEXT" });
                }
                self.identity = Some(identity);
            }
            libxl::Record::Gt(gt::LibxlRecord::Devices(_), _) => {
                if self.libxc_seen || self.identity.is_none() {
                    return Err(ErrorKind::OutOfOrder {
                        why: "it must come after GT_IDENTITY and before LIBXC_CONTEXT",
                    });
                }
                self.devices_seen = true;
            }
            libxl::Record::Gt(gt::LibxlRecord::Toolstack(_), _) if self.domain.is_none() => {
                return Err(ErrorKind::OutOfOrder { why: "it belongs after the image of a GT migration" });
            }
            libxl::Record::Gt(gt::LibxlRecord::Xenstore(_), _) => {
                if self.domain.is_none() {
                    return Err(ErrorKind::OutOfOrder { why: "it belongs after the image of a GT migration" });
                }
                self.xenstore_seen = true;
            }
            libxl::Record::Gt(gt::LibxlRecord::Checksum(_), _) => self.checksum_last[1] = true,
            libxl::Record::End => {
                if !self.libxc_seen {
                    return Err(ErrorKind::Missing { what: "LIBXC_CONTEXT" });
                }
                if self.domain.is_some() {
                    let missing = [
                        (self.identity.is_some(), "GT_IDENTITY"),
                        (self.devices_seen, "GT_DEVICES"),
                        (self.xenstore_seen, "GT_XENSTORE"),
                        (was_checksum, "GT_STREAM_CHECKSUM directly before END"),
                    ];
                    require(&missing)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn libxc(&mut self, record: &RawRecord<'_>) -> Result<(), ErrorKind> {
        let parsed = libxc::Record::decode(record.rtype, record.body)?;
        let was_checksum = std::mem::take(&mut self.checksum_last[0]);
        if self.domain.is_some() {
            match rank(record.rtype) {
                Some(rank) if rank < self.last_rank => {
                    return Err(ErrorKind::OutOfOrder { why: "it must come earlier in the image of a GT migration" });
                }
                Some(rank) => self.last_rank = rank,
                None if record.optional() => {}
                None => return Err(ErrorKind::OutOfOrder { why: "it has no place in the image of a GT migration" }),
            }
        }
        match parsed {
            libxc::Record::CpuidPolicy(_) | libxc::Record::MsrPolicy(_) if self.static_end => {
                return Err(ErrorKind::OutOfOrder { why: "it must come before STATIC_DATA_END" });
            }
            libxc::Record::StaticDataEnd => {
                if self.version < 3 {
                    return Err(ErrorKind::OutOfOrder { why: "images of version 2 do not have it" });
                }
                self.static_end = true;
            }
            libxc::Record::PageData(_) => {
                if self.version >= 3 && !self.static_end {
                    return Err(ErrorKind::OutOfOrder { why: "STATIC_DATA_END must come first" });
                }
                if self.state_seen && !self.verify_seen {
                    return Err(ErrorKind::OutOfOrder { why: "memory must come before the state" });
                }
                self.pages_seen = true;
            }
            libxc::Record::Verify => self.verify_seen = true,
            libxc::Record::PvInfo(_) | libxc::Record::PvP2mFrames(..) | libxc::Record::PvVcpu(..) if self.hvm => {
                return Err(ErrorKind::OutOfOrder { why: "a record of PV domains in the image of an HVM domain" });
            }
            libxc::Record::TscInfo(_) => self.tsc_seen = true,
            // Xen's document wants HVM_PARAMS before HVM_CONTEXT; stock libxc 4.17 writes them the other way round, and
            // its receiver keeps the context until the end. So only a GT image has an order here (by rank).
            libxc::Record::HvmParams(_) => {
                self.params_seen = true;
                self.state_seen = true;
            }
            libxc::Record::HvmContext(blob) => {
                self.context_seen = true;
                self.state_seen = true;
                let context = hvm::Context::decode(blob)?;
                if context.cpus().next().is_none() && !has_raw_cpu(&context) {
                    return Err(ErrorKind::Missing { what: "a CPU entry in hvm_ctx" });
                }
            }
            libxc::Record::SharedInfo(_) => self.shared_info_page = true,
            libxc::Record::End => self.libxc_end(was_checksum)?,
            libxc::Record::Gt(record, _) => self.gt(record)?,
            _ => {}
        }
        Ok(())
    }

    fn libxc_end(&self, was_checksum: bool) -> Result<(), ErrorKind> {
        if self.hvm {
            require(&[
                (self.pages_seen, "PAGE_DATA"),
                (self.params_seen, "HVM_PARAMS"),
                (self.context_seen, "HVM_CONTEXT"),
            ])?;
        }
        let Some(domain) = &self.domain else { return Ok(()) };
        let placed = self.shared_info.as_ref().is_some_and(|info| info.gfn != gt::NO_GFN);
        let table = self.grant_table.as_ref();
        let frames = table.map_or(0, |table| table.frames.len() as u32);
        let status = table.map_or(0, |table| table.status_frames.len() as u32);
        require(&[
            (self.tsc_seen, "X86_TSC_INFO"),
            (table.is_some(), "GT_GRANT_TABLE"),
            (self.grant_frames == [frames, status], "GT_GRANT_FRAMES for every frame of GT_GRANT_TABLE"),
            (self.shared_info.is_some(), "GT_SHARED_INFO"),
            (!placed || self.shared_info_page, "SHARED_INFO"),
            (self.evtchn_seen, "GT_EVTCHN"),
            (self.vcpus_seen == domain.max_vcpus, "GT_VCPU for every vCPU"),
            (self.clock_seen, "GT_CLOCK"),
            (was_checksum, "GT_CHECKSUM directly before END"),
        ])
    }

    fn gt(&mut self, record: gt::LibxcRecord) -> Result<(), ErrorKind> {
        let max_vcpus = self.domain.as_ref().map(|domain| domain.max_vcpus);
        let vcpu_exists = |vcpu: u32| max_vcpus.is_none_or(|max| vcpu < max);
        let no_vcpu = |field, vcpu: u32| {
            Err(ErrorKind::BadValue { field, value: vcpu.into(), why: "GT_DOMAIN has no such vCPU" })
        };
        if max_vcpus.is_none() && !record.gt_type().may_be_optional() && !matches!(record, gt::LibxcRecord::Domain(_)) {
            return Err(ErrorKind::OutOfOrder { why: "GT_DOMAIN must come first" });
        }
        match record {
            gt::LibxcRecord::Domain(domain) => {
                if self.static_end || self.domain.is_some() {
                    return Err(ErrorKind::OutOfOrder { why: "it comes once, before STATIC_DATA_END" });
                }
                if self
                    .identity
                    .as_ref()
                    .is_some_and(|identity| u32::from(identity.domid) != domain.domid || identity.uuid != domain.handle)
                {
                    return Err(ErrorKind::BadValue {
                        field: "domid",
                        value: domain.domid.into(),
                        why: "GT_IDENTITY tells of another domain",
                    });
                }
                self.domain = Some(domain);
            }
            gt::LibxcRecord::MemoryMap(_) if self.static_end => {
                return Err(ErrorKind::OutOfOrder { why: "it must come before STATIC_DATA_END" });
            }
            gt::LibxcRecord::GrantTable(table) => self.grant_table = Some(table),
            gt::LibxcRecord::GrantFrames(frames) => {
                let seen = &mut self.grant_frames[usize::from(frames.status)];
                if frames.first != *seen {
                    return Err(ErrorKind::BadValue {
                        field: "first",
                        value: frames.first.into(),
                        why: "the frames must come in order, each once",
                    });
                }
                *seen = seen.saturating_add(frames.count() as u32);
            }
            gt::LibxcRecord::SharedInfo(info) => self.shared_info = Some(info),
            gt::LibxcRecord::EvtchnFifo(fifo) => {
                if let Some(control) = fifo.controls.iter().find(|control| !vcpu_exists(control.vcpu_id)) {
                    return no_vcpu("vcpu_id", control.vcpu_id);
                }
                self.fifo = Some(fifo);
            }
            gt::LibxcRecord::Evtchn(evtchn) => {
                self.evtchn_seen = true;
                if evtchn.fifo != self.fifo.is_some() {
                    return Err(ErrorKind::OutOfOrder { why: "GT_EVTCHN_FIFO must come before it, with FIFO only" });
                }
                if let Some(port) = evtchn.ports.iter().find(|port| !vcpu_exists(port.notify_vcpu)) {
                    return no_vcpu("notify_vcpu", port.notify_vcpu);
                }
                let limit = match (&self.fifo, &self.domain) {
                    (Some(fifo), _) => fifo.array.len() as u32 * 1024,
                    (None, Some(domain)) => domain.max_evtchn_port.saturating_add(1),
                    (None, None) => gt::PORTS_MAX,
                };
                if let Some(port) = evtchn.ports.iter().find(|port| port.port >= limit) {
                    return Err(ErrorKind::BadValue {
                        field: "port",
                        value: port.port.into(),
                        why: "past the event array or the domain's last port",
                    });
                }
            }
            gt::LibxcRecord::Vcpu(vcpu) => {
                if !vcpu_exists(vcpu.vcpu_id) {
                    return no_vcpu("vcpu_id", vcpu.vcpu_id);
                }
                if vcpu.vcpu_id != self.vcpus_seen {
                    return Err(ErrorKind::OutOfOrder { why: "the vCPUs must come in order, each once" });
                }
                self.vcpus_seen += 1;
            }
            gt::LibxcRecord::Clock(_) => self.clock_seen = true,
            gt::LibxcRecord::Checksum(_) => self.checksum_last[0] = true,
            gt::LibxcRecord::MemoryMap(_)
            | gt::LibxcRecord::Watchdog(_)
            | gt::LibxcRecord::Emuirq(_)
            | gt::LibxcRecord::HvmParamsLate(_) => {}
        }
        Ok(())
    }
}

/// A CPU record of a length that this code has no structure for.
fn has_raw_cpu(context: &hvm::Context) -> bool {
    context.entries.iter().any(|entry| entry.typecode == 2)
}

fn require(wanted: &[(bool, &'static str)]) -> Result<(), ErrorKind> {
    match wanted.iter().find(|(there, _)| !there) {
        Some((_, what)) => Err(ErrorKind::Missing { what }),
        None => Ok(()),
    }
}
