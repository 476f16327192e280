//! Tells what is in a stream: a line for each header and record, and everything as JSON.

use serde_json::{Map, Value};

use crate::decoder::{Event, RawRecord};
use crate::error::{Layer, StreamError};
use crate::wire::{Field, hex, object};
use crate::{gt, hvm, libxc, libxl, xl};

/// One header, one record, or a run of PAGE_DATA records.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Bytes from the start of the stream.
    pub offset: u64,
    /// Layer it belongs to.
    pub layer: Layer,
    /// Name of the record's type, or "header".
    pub name: String,
    /// Type on the wire; `None` for headers.
    pub rtype: Option<u32>,
    /// Length of the body in bytes, of all bodies for a run of PAGE_DATA.
    pub length: u64,
    /// What is in it, in a few words.
    pub summary: String,
    /// What is in it.
    pub detail: Value,
}

impl Item {
    /// As an object: offset, layer, name, type, length, optional, detail.
    pub fn json(&self) -> Value {
        object([
            ("offset", self.offset.into()),
            ("layer", self.layer.name().into()),
            ("name", self.name.as_str().into()),
            ("type", self.rtype.map_or(Value::Null, |rtype| format!("{rtype:#010x}").into())),
            ("optional", self.rtype.is_some_and(|rtype| rtype & crate::OPTIONAL != 0).into()),
            ("length", self.length.into()),
            ("detail", self.detail.clone()),
        ])
    }

    /// As a line for people.
    pub fn line(&self) -> String {
        let optional = if self.rtype.is_some_and(|rtype| rtype & crate::OPTIONAL != 0) { " (optional)" } else { "" };
        format!(
            "{:#012x} {:5} {:24} {:>11} {}{optional}",
            self.offset,
            self.layer.name(),
            self.name,
            self.length,
            self.summary
        )
        .trim_end()
        .to_owned()
    }
}

#[derive(Debug, Default)]
struct Pages {
    offset: u64,
    length: u64,
    records: u64,
    pages: u64,
    without_data: u64,
    lowest: u64,
    highest: u64,
}

impl Pages {
    fn item(self) -> Item {
        Item {
            offset: self.offset,
            layer: Layer::Libxc,
            name: "PAGE_DATA".to_owned(),
            rtype: Some(libxc::rec::PAGE_DATA),
            length: self.length,
            summary: format!(
                "{} records, {} pages with contents, {} without, gfns {:#x} to {:#x}",
                self.records, self.pages, self.without_data, self.lowest, self.highest
            ),
            detail: object([
                ("records", self.records.into()),
                ("pages", self.pages.into()),
                ("without_contents", self.without_data.into()),
                ("lowest_gfn", self.lowest.json()),
                ("highest_gfn", self.highest.json()),
            ]),
        }
    }
}

/// Turns events into items; runs of PAGE_DATA become one.
#[derive(Debug, Default)]
pub struct Shower {
    pages: Option<Pages>,
    offset: u64,
}

impl Shower {
    /// At the start of a stream.
    pub fn new() -> Self {
        Shower::default()
    }

    /// Takes the next event and the offset behind it ([`crate::Decoder::offset`] after the event). Gives finished items.
    pub fn event(&mut self, event: &Event<'_>) -> Result<Vec<Item>, StreamError> {
        let mut items = Vec::new();
        if let Event::Record(record) = event
            && record.layer == Layer::Libxc
            && record.rtype == libxc::rec::PAGE_DATA
        {
            self.page_data(record)?;
            return Ok(items);
        }
        items.extend(self.finish());
        let (name, length, summary, detail) = match event {
            Event::Xl(header, data) => {
                let config = xl::config(data).unwrap_or_default();
                let shown = serde_json::from_slice(config)
                    .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(config).into_owned()));
                let name = shown.pointer("/c_info/name").and_then(Value::as_str).unwrap_or("?").to_owned();
                let detail = object([
                    ("mandatory_flags", header.mandatory_flags.into()),
                    ("optional_flags", header.optional_flags.into()),
                    ("config", shown),
                ]);
                let summary = format!("domain {name}, {} bytes of configuration", config.len());
                ("header", (xl::HEADER_SIZE + data.len()) as u64, summary, detail)
            }
            Event::Libxl(header) => {
                let legacy = header.options & libxl::OPT_LEGACY != 0;
                let detail = object([("version", libxl::VERSION.into()), ("legacy", legacy.into())]);
                ("header", libxl::HEADER_SIZE as u64, "version 2, little-endian".to_owned(), detail)
            }
            Event::Image(header) => {
                let summary = format!("version {}, little-endian", header.version);
                let detail = object([("version", header.version.into())]);
                ("header", libxc::IMAGE_HEADER_SIZE as u64, summary, detail)
            }
            Event::Domain(header) => {
                let kind = if header.domain_type == libxc::DOMAIN_X86_PV { "PV" } else { "HVM or PVH" };
                let summary = format!("x86 {kind} domain, saved by Xen {}.{}", header.xen_major, header.xen_minor);
                ("domain header", libxc::DOMAIN_HEADER_SIZE as u64, summary, header.json())
            }
            Event::Record(record) => {
                let (summary, detail) = describe(record)?;
                (record.name(), record.body.len() as u64, summary, detail)
            }
        };
        let (layer, rtype, offset) = match event {
            Event::Xl(..) => (Layer::Xl, None, 0),
            Event::Libxl(_) => (Layer::Libxl, None, self.offset),
            Event::Image(_) | Event::Domain(_) => (Layer::Libxc, None, self.offset),
            Event::Record(record) => (record.layer, Some(record.rtype), record.offset),
        };
        self.offset = offset
            + match rtype {
                None => length,
                Some(_) => (crate::RECORD_HEADER_SIZE + crate::padding(length as usize)) as u64 + length,
            };
        items.push(Item { offset, layer, name: name.to_owned(), rtype, length, summary, detail });
        Ok(items)
    }

    /// The run of PAGE_DATA that is still open, if any.
    pub fn finish(&mut self) -> Option<Item> {
        self.pages.take().map(Pages::item)
    }

    fn page_data(&mut self, record: &RawRecord<'_>) -> Result<(), StreamError> {
        let libxc::Record::PageData(data) = record.libxc()? else { return Ok(()) };
        let run =
            self.pages.get_or_insert_with(|| Pages { offset: record.offset, lowest: u64::MAX, ..Pages::default() });
        run.records += 1;
        run.length += record.body.len() as u64;
        for (entry, contents) in data.iter() {
            *(if contents.is_some() { &mut run.pages } else { &mut run.without_data }) += 1;
            run.lowest = run.lowest.min(entry.gfn);
            run.highest = run.highest.max(entry.gfn);
        }
        Ok(())
    }
}

fn describe(record: &RawRecord<'_>) -> Result<(String, Value), StreamError> {
    match record.layer {
        Layer::Libxl | Layer::Xl => describe_libxl(record),
        Layer::Libxc => describe_libxc(record),
    }
}

fn describe_libxl(record: &RawRecord<'_>) -> Result<(String, Value), StreamError> {
    Ok(match record.libxl()? {
        libxl::Record::EmulatorXenstoreData(emulator, data) => {
            let mut pairs = Map::new();
            let mut texts = data.split(|&b| b == 0).map(|text| String::from_utf8_lossy(text).into_owned());
            while let (Some(key), Some(value)) = (texts.next(), texts.next()) {
                pairs.insert(key, value.into());
            }
            let summary = format!("emulator {} index {}, {} nodes", emulator.id, emulator.index, pairs.len());
            (summary, object([("emulator", emulator.id.into()), ("nodes", Value::Object(pairs))]))
        }
        libxl::Record::EmulatorContext(emulator, data) => {
            let summary = format!("emulator {} index {}, {} bytes", emulator.id, emulator.index, data.len());
            (summary, object([("emulator", emulator.id.into()), ("bytes", data.len().into())]))
        }
        libxl::Record::Gt(gt, _) => {
            let summary = match &gt {
                gt::LibxlRecord::Identity(id) => {
                    format!(
                        "domain {} ({}), {} from host {}, Xen {}",
                        id.domid,
                        id.name,
                        id.kind.name(),
                        id.host,
                        id.xen_version
                    )
                }
                gt::LibxlRecord::Devices(devices) => {
                    devices.iter().map(|d| format!("{} {}", d.class, d.devid)).collect::<Vec<_>>().join(", ")
                }
                gt::LibxlRecord::Xenstore(stream) => format!("{} bytes of xenstore-migration stream", stream.len()),
                gt::LibxlRecord::Checksum(crc) => format!("CRC-32 {crc:#010x}"),
                gt::LibxlRecord::Toolstack(t) => format!("{} nodes, {} files", t.nodes.len(), t.userdata.len()),
            };
            (summary, gt.json())
        }
        libxl::Record::UnknownOptional(_, body) => ("not known, may be skipped".to_owned(), hex(body).into()),
        _ => (String::new(), Value::Null),
    })
}

fn list<T: Field>(items: &[T]) -> Value {
    items.iter().map(Field::json).collect()
}

fn describe_libxc(record: &RawRecord<'_>) -> Result<(String, Value), StreamError> {
    Ok(match record.libxc()? {
        libxc::Record::PvInfo(info) => (
            format!("{}-bit guest, {} levels of page tables", u32::from(info.guest_width) * 8, info.pt_levels),
            info.json(),
        ),
        libxc::Record::PvP2mFrames(start, end, pfns) => (format!("pfns {start:#x} to {end:#x}"), list(&pfns)),
        libxc::Record::PvVcpu(_, vcpu, context) => {
            let detail = object([("vcpu", vcpu.into()), ("context", hex(context).into())]);
            (format!("vCPU {vcpu}, {} bytes", context.len()), detail)
        }
        libxc::Record::SharedInfo(page) => (String::new(), hex(page).into()),
        libxc::Record::TscInfo(info) => (
            format!("mode {}, {} kHz, {} ns, incarnation {}", info.mode, info.khz, info.nsec, info.incarnation),
            info.json(),
        ),
        libxc::Record::HvmContext(blob) => {
            let context = hvm::Context::decode(blob).map_err(|kind| record.error(kind))?;
            let entries: Value = context
                .entries
                .iter()
                .map(|entry| {
                    object([
                        ("name", entry.name().into()),
                        ("instance", entry.instance.into()),
                        ("contents", entry.contents.json()),
                    ])
                })
                .collect();
            (format!("{} entries, {} vCPUs", context.entries.len(), context.cpus().count()), entries)
        }
        libxc::Record::HvmParams(params) => (format!("{} parameters", params.len()), list(&params)),
        libxc::Record::Toolstack(blob) => (String::new(), hex(blob).into()),
        libxc::Record::CheckpointDirtyPfnList(pfns) => (format!("{} pfns", pfns.len()), list(&pfns)),
        libxc::Record::CpuidPolicy(leaves) => (format!("{} leaves", leaves.len()), list(&leaves)),
        libxc::Record::MsrPolicy(msrs) => (format!("{} MSRs", msrs.len()), list(&msrs)),
        libxc::Record::Gt(gt, _) => (describe_gt(&gt), gt.json()),
        libxc::Record::UnknownOptional(_, body) => ("not known, may be skipped".to_owned(), hex(body).into()),
        libxc::Record::End
        | libxc::Record::Verify
        | libxc::Record::Checkpoint
        | libxc::Record::StaticDataEnd
        | libxc::Record::PageData(_) => (String::new(), Value::Null),
    })
}

fn describe_gt(record: &gt::LibxcRecord) -> String {
    use gt::LibxcRecord as R;
    match record {
        R::Domain(d) => format!("domain {}, {} vCPUs, {} pages", d.domid, d.max_vcpus, d.total_pages),
        R::MemoryMap(ranges) => format!("{} ranges", ranges.len()),
        R::SharedInfo(info) if info.gfn == gt::NO_GFN => "not placed".to_owned(),
        R::SharedInfo(info) => format!("gfn {:#x}", info.gfn),
        R::Vcpu(vcpu) => format!("vCPU {}, upcall vector {:#x}", vcpu.vcpu_id, vcpu.upcall_vector),
        R::Evtchn(evtchn) => format!("{} ports, {}", evtchn.ports.len(), if evtchn.fifo { "FIFO" } else { "2-level" }),
        R::EvtchnFifo(fifo) => format!("{} control blocks, {} pages", fifo.controls.len(), fifo.array.len()),
        R::GrantTable(t) => {
            format!("version {}, {} frames, {} status", t.table_version, t.frames.len(), t.status_frames.len())
        }
        R::GrantFrames(f) => {
            format!("{} {} from {}", f.count(), if f.status { "status frames" } else { "frames" }, f.first)
        }
        R::Clock(clock) => format!("system time {} ns", clock.system_time),
        R::Watchdog(watchdogs) => format!("{} armed", watchdogs.len()),
        R::Emuirq(entries) => format!("{} pirqs", entries.len()),
        R::HvmParamsLate(params) => format!("{} parameters", params.len()),
        R::Checksum(crc) => format!("CRC-32 {crc:#010x}"),
    }
}
